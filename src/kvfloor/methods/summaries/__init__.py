"""Summarise the evicted tokens of a kv head in a few numbers, so that they still count in attention; one way a file."""
