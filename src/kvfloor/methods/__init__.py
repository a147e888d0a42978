"""Collect every way to remember, and the one table that names them."""
