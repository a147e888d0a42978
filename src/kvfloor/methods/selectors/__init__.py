"""Select which held tokens a query reads, one selector per file; no token is evicted by this."""
