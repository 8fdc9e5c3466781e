"""Who may ask for what in a front: request signatures, and the models that a token allows."""
