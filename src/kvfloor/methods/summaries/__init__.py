"""Keep evicted tokens in compressed form, as a few numbers that stand for them in attention; one summary per file."""
