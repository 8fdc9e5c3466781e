"""Which models stay in memory, and where their rows lie. Pure decisions."""
