"""Policies: which held token leaves when the budget is exceeded."""
