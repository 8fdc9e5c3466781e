"""Who may do what: request signatures."""
