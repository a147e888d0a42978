"""Make public keys: near-orthogonal families, codes, and how far apart keys lie."""
