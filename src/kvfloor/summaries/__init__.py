"""Summaries: what stays of the tokens that left, as one more partial."""
