"""Serve bounded KV caches inside stock vLLM, as a plug-in that vLLM finds by its entry point.

No file of vLLM is changed. A bounded cache keeps at most a fixed number of tokens per kv head, its budget, and evicts
the others.
"""
