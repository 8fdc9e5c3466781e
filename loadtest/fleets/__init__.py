"""Archives to test with."""
