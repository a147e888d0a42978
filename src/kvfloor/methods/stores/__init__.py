"""Keep keys and values in few bits per number: the stores of coded tokens."""
