"""Make rows of texts with random figures."""

from __future__ import annotations

import numpy as np

from kvfloor.audit.nats import TextRow


def text_row(
    method: str = "h2o@8", text: str = "speech", seed: int = 0, scored: int = 640, nats: float = 0.01, **changes: object
) -> TextRow:
    """Make a row of random figures with a mean KL near `nats`; the exact cache's is 0."""
    rng = np.random.default_rng(seed)
    kl = np.zeros(scored) if method == "exact" else rng.gamma(0.5, 2 * nats, scored)
    exact_loss = rng.gamma(2.0, 1.0, scored)
    values: dict[str, object] = {
        "method": method,
        "configuration": method.partition("@")[0],
        "name": method.partition("@")[0].partition("(")[0],
        "budget": method.partition("@")[2] or None,
        "baseline": method == "exact",
        "budget_tokens": None,
        "text": text,
        "context": 256,
        "continuation": scored,
        "kl": tuple(kl.tolist()),
        "loss": tuple((exact_loss + kl).tolist()),
        "exact_loss": tuple(exact_loss.tolist()),
        "same_top": tuple((kl < 0.05).astype(int).tolist()),
        "state_bytes": 1000,
        "peak_state_bytes": 2000,
        "exact_bytes": 4000,
        "state_16_bit_bytes": 600,
        "exact_16_bit_bytes": 2000,
        "floor_bytes": 300,
        "token_id_bytes": 100,
        "seconds": 1.0,
    }
    return TextRow(**values | changes)  # type: ignore[arg-type]
