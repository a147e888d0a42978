"""Make public keys for the game: families of near-orthogonal keys, codes, and the gaps between keys."""
