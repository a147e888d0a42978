"""Measure the memory cost and the lost quality of every method at every budget, on one model and its tasks.

A method is a KV-cache compressor. Its cost is the bytes of its cache; its loss is measured against a cache that keeps
every token.
"""
