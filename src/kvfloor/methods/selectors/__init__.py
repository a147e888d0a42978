"""Choose which held tokens a query reads, one rule per file."""
