"""Make public keys for the game: families of near-orthogonal keys, codes, and the gaps between keys.

In the game, Alice hides values under keys that Bob knows, and Bob reads each value by a query along its key. The gap of
a key is the squared norm of this key less its largest inner product with another key.
"""
