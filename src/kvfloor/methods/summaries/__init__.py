"""Summarise the evicted tokens in a few numbers, one form per file."""
