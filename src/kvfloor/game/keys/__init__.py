"""Make public keys for the game: families of nearly orthogonal keys, codes, and the gaps between keys.

In the game, Alice hides values under keys that Bob knows, in the KV cache of a method, and Bob reads each value by a
query along its key. The gap of a key is its squared norm less its largest inner product with another key. If it is
positive, a long enough query along the key gives this key nearly all softmax mass.
"""
