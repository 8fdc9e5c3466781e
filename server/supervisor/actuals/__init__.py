"""Observed prices and what follows from them: the one owner of that state. Runs in the supervisor."""
