"""Work on archives and price files that needs no server."""
