"""Train LESS's kernels for a model of your own."""
