"""What runs in the template and in the children. INVARIANT: it is imported before any fork, and imports no torch."""
