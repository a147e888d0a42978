"""Give every layer of a model its own method, and choose these methods for a number of bytes from measured costs."""
