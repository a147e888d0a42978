"""Build the hard instance of each theorem, one barrier per file."""
