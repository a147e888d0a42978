"""Store a stream in a sketch instead of whole tokens, one sketch per file."""
