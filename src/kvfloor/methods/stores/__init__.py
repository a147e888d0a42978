"""Keep keys and values of held tokens as codes of few bits per number."""
