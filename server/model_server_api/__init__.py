"""What the protocols of TorchServe and Multi Model Server need in fronts and supervisor: bodies and descriptions."""
