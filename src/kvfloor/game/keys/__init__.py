"""Make public keys for the game: families of near-orthogonal keys, codes, and the gaps between keys.

The gap of a key is the squared norm of this key less its largest inner product with another key.
"""
