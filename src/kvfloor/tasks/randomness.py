"""Give every sample its own independent random stream, decided by its names and numbers alone."""

from __future__ import annotations

import hashlib
import random


def stream(*names: str | int) -> random.Random:
    """Return a generator keyed by `names`, e.g. `stream("recall", seed, index)`; no global one is touched."""
    key = hashlib.sha256(repr(names).encode()).digest()
    return random.Random(int.from_bytes(key[:16], "big"))
