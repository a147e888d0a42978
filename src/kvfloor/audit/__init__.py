"""The audit: what every method costs and breaks at every budget, measured on one model and its tasks."""
