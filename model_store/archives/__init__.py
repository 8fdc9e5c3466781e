"""The archive format: containers (zip, gzipped tar), manifest records, reading and packing."""
