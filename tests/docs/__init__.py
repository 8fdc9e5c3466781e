"""The pages of docs/: as a site, and the blocks of code in them."""
