"""What an archive may hold, an entry a kind."""
