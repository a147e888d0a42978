"""Remember a stream without keeping whole tokens, one sketch per file."""
