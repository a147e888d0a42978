"""Shrink a span of held tokens to a few weighted ones that answer reference queries alike (Attention Matching)."""
