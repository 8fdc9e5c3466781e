"""Where archives are stored: object stores, and the disk cache in front of them."""
