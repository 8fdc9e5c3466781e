"""Tests that need a CUDA device. Without one they are skipped with the reason."""
