"""One archive: its container, its manifest, how it is read and packed."""
