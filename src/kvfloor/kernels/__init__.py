"""Attention products: the torch definitions, and the faster paths that must equal them."""
