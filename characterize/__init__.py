"""Measure published claims, one seeded script each, with the table it wrote beside it."""
