"""Archives and where they live: records, reading and packing, object stores, the disk tier, the cache policy."""
