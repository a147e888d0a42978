"""Choose which held tokens to evict, by one of several rules (policies), one per file."""
