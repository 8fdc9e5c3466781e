"""Operations on archives and price files that need no server."""
