"""The operators' page on the management listener: what the fleet does, its models, and what can be done with them."""
