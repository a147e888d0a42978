"""Summarise the evicted tokens of a kv head in a few numbers that stand for them in attention, one summary per file."""
