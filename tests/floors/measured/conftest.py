"""Try fewer examples of each property, because an oracle's search over all choices takes long."""

from hypothesis import settings

settings.register_profile("measured", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("measured")
