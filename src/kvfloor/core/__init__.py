"""Define the interface of a streaming KV cache, and two methods that keep uncompressed tokens: `Exact` and `Bounded`.

`Exact` keeps all tokens, `Bounded` at most a budget of them.
"""
