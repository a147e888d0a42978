"""Fewer examples of each property: an oracle's search over all choices is long."""

from hypothesis import settings

settings.register_profile("measured", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("measured")
