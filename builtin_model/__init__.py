"""Train the built-in model, and measure what it learnt: `python -m builtin_model.train`."""
