"""Choose which held tokens to evict, one policy per file."""
