"""Store samples, clusters or quantised codes of a stream's keys and values (a sketch of it), one method per file."""
