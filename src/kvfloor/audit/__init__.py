"""Measure the memory cost and the lost quality of every method at every budget, on one model and its tasks."""
