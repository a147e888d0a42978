"""Define the contract of a streaming cache, and the two methods that keep whole tokens: exact and bounded."""
