"""Serve the scripts: tables, and reference forms that no cache needs."""
