"""Compare compressed caches with transformers' own over every model family it knows: `python -m survey`."""
