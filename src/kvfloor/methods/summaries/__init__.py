"""Remember a little of the tokens that left, one form per file."""
