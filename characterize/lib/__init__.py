"""Provide the scripts with result tables, measures, and reference forms of attention that no cache uses."""
