"""Mutated inputs for every reader of untrusted bytes; some hundreds in `make test`, minutes of them in `make fuzz`."""
