"""Choose the held token to evict, one rule per file."""
