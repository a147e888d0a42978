"""Train the kernels of LESS for a model: small networks that keep evicted tokens of a KV cache in compressed form."""
