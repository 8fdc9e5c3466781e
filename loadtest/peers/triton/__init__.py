"""Triton as a peer: its server from the wheel of pytriton, started without Docker, with the Python backend."""
