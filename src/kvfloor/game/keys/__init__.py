"""Make public keys: near-orthogonal families, codes, and the gaps between keys."""
