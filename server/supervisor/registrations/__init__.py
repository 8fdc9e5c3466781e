"""Models that clients of TorchServe and Multi Model Server have registered: the table, and how it is carried out."""
