"""Train the kernels of LESS for a model of your own: small networks that summarise the evicted tokens of a KV cache."""
