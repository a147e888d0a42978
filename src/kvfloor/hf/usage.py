"""Sum the tokens and bytes of many compressed caches, beside the bytes that exact caches would have taken.

An exact cache keeps every token. In an evaluation's results, the totals show that the compression was really applied.
On a sharded model, they count the kv heads of all ranks.
"""

from __future__ import annotations

from kvfloor.hf.cache import CompressedCache


class Usage:
    """Add up sequences, tokens per kv head and bytes of many caches, each recorded once, at the end of its use."""

    def __init__(self) -> None:
        self._sequences = self._most_seen = self._most_held = 0
        self._state_bytes = self._exact_bytes = self._peak_bytes = 0

    def record(self, cache: CompressedCache) -> None:
        """Add one cache to the totals, at the end of its batch. Collective on a sharded model."""
        batch = 0
        for layer, entry in zip(cache.compressed, cache.report(), strict=True):
            if layer.state is None:
                continue
            spec = layer.state.spec
            batch = max(batch, layer.batch)
            self._most_seen = max(self._most_seen, *entry["tokens"])
            self._most_held = max(self._most_held, *entry["held"])
            self._state_bytes += entry["state_bytes"]
            self._exact_bytes += sum(entry["tokens"]) * (spec.d + spec.dv) * spec.dtype.itemsize
        self._sequences += batch
        self._peak_bytes = max(self._peak_bytes, cache.peak_nbytes)

    def totals(self) -> dict[str, int]:
        """Return the totals over all recorded caches, JSON-ready.

        sequences                            number of batch items
        most_tokens_seen, most_tokens_held   the largest number of tokens that one kv head was fed, and that one held
        state_bytes                          sum over caches: bytes of the compressed layers' memory when recorded
        exact_bytes                          sum over caches: bytes of the same layers in a cache that keeps every token
        peak_bytes                           the largest peak of bytes of any one cache
        """
        return {
            "sequences": self._sequences,
            "most_tokens_seen": self._most_seen,
            "most_tokens_held": self._most_held,
            "state_bytes": self._state_bytes,
            "exact_bytes": self._exact_bytes,
            "peak_bytes": self._peak_bytes,
        }
