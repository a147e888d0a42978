"""Selectors: which of the held tokens a query reads. All are kept; fewer are touched."""
