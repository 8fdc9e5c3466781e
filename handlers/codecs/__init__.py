"""Request and answer bodies: tensors, DeepAR JSON, features, joint scenarios."""
