"""What needs a CUDA device. Skipped, with the reason, where there is none."""
