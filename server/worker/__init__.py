"""The worker process: holds models and computes their answers."""
