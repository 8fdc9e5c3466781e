"""Rollbacks, aliases and canaries: the table of names (`table`), how it changes (`service`), and who follows it."""
