"""Collect the library's ways to cache a stream of keys and values, and the table of their names.

A policy chooses the tokens to evict, a summary keeps a compressed form of evicted tokens, and a selector chooses the
held tokens that a query reads. A sketch is a whole method that stores samples, clusters or quantised codes instead of
whole tokens.
"""
