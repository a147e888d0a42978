"""Store a stream in a sketch (samples, clusters, codes) instead of whole tokens, one method per file."""
