"""Define the interface of a streaming KV cache, and two caches that keep uncompressed tokens: `Exact` and `Bounded`.

`Exact` keeps all tokens. `Bounded` keeps at most a budget of them.
"""
