"""Collect all methods of the library (eviction policies, summaries, selectors, sketches) and the table of names."""
