"""Derive an independent random generator for every sample, from its task's name, seed and index alone."""

from __future__ import annotations

import hashlib
import random


def stream(*names: str | int) -> random.Random:
    """Return a random generator seeded by a hash of `names`, e.g. `stream("recall", seed, index)`.

    Python's global generator is not used.
    """
    key = hashlib.sha256(repr(names).encode()).digest()
    return random.Random(int.from_bytes(key[:16], "big"))
