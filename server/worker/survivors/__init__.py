"""Rows that outlive their worker: the ledger beside the pool, and the models that the next worker takes back."""
