"""Who may do what over HTTP: tokens with scopes, hosts and origins, TLS. For every listener; no torch."""
