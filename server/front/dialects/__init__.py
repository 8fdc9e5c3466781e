"""One file a protocol: its routes, its requests, its replies and its error bodies."""
