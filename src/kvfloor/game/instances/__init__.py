"""Build the hard instance of each memory theorem (a barrier), one barrier per file."""
