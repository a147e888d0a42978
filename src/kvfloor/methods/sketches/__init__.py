"""Store a stream as a sketch (samples, clusters, quantised codes) instead of as whole tokens, one method per file."""
