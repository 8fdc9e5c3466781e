"""Mosec as a peer: one model behind its Rust front, with batches and without."""
