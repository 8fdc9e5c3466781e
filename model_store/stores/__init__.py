"""Where archives lie: object stores, the disk cache in front of them."""
