"""Model archives: their format (`archives`), the stores they are fetched from (`stores`), the model cache (`cache`)."""
