"""Collect every method of the library and the one table that names the methods."""
