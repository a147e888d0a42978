"""Collect the library's ways to cache a stream of keys and values, and the table of their names.

A policy chooses the tokens to evict, a summary keeps a compressed form of evicted tokens, and a selector chooses the
held tokens that a query reads. A sketch is a method without these three parts: it stores samples, clusters or quantised
codes of the tokens. A variant computes another form of attention, such as attention over pairs of tokens.
"""
