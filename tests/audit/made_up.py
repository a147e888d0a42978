"""Make rows of texts with random figures, and rows of tasks with given numbers of right answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvfloor.audit.nats import TextRow
from kvfloor.audit.rows import Row, measured_row
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.methods.grammar import parse


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


def task_row(
    method: str,
    lost: int = 0,
    gained: int = 0,
    n: int = 40,
    task: str = "recall",
    number: int = 1,
    size: int = 1000,
    **changes: Any,
) -> Row:
    """Make a row of a task: exact is wrong on the first `gained` samples, and the setting on the last `lost`."""
    values: dict[str, Any] = {
        "setting": BudgetedMethod(parse(method)),
        "budget_tokens": None,
        "task": task,
        "context": 512,
        "protocol": "after",
        "outcomes": [1] * (n - lost) + [0] * lost,
        "exact_outcomes": [0] * gained + [1] * (n - gained),
        "state_bytes": size,
        "peak_state_bytes": 2 * size,
        "exact_bytes": 10_000,
        "floor_bytes": 500,
        "token_id_bytes": 100,
        "bytes_read_per_token": size,
        "output_error_by_layer": [0.1, 0.3] if number == 1 else [],
        "output_error_by_head": [[0.1, 0.1], [0.2, 0.4]] if number == 1 else [],
        "prefill_ms": 1.0,
        "decode_ms_per_token": 0.5,
        "output_tokens": 3.0,
        "round": number,
    }
    return measured_row(**values | changes)
