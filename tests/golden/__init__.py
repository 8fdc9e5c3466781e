"""Recorded exchanges of the public servers whose clients this server serves, and what replays and compares them."""
