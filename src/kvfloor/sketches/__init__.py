"""Whole-state methods whose memory is not a set of whole tokens."""
