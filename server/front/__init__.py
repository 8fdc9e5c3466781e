"""The process that speaks HTTP. It imports neither torch nor numpy."""
