"""Choose which held token leaves, one rule per file."""
