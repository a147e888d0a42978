"""Measure the memory cost and the lost quality of KV-cache compressors at several budgets, on one model.

A method is a KV-cache compressor. A budget limits its cache, e.g. to 256 tokens per kv head. The cost is the bytes of
the cache. The loss is measured on texts and tasks, against a cache that keeps every token.
"""
