"""What an archive may be, from the bytes of a request to the bytes of its answer: kinds, networks, codecs, training."""
