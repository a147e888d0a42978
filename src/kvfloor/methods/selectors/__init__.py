"""Select the held tokens that a query reads, one rule per file."""
