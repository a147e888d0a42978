"""Select the held tokens that a query reads, without evicting any; one selector per file."""
