"""Make a synthetic audit with the shape of a real one: recency loses recall, 8 bits lose nothing, and so on."""

import math
import random
from typing import get_args

import pytest

from kvfloor.audit.examples import Answered, SideBySide
from kvfloor.audit.meta import Meta
from kvfloor.audit.output_errors import ErrorMap
from kvfloor.audit.recommend import Recommendation, recommend
from kvfloor.audit.rows import Protocol, Row, measured_row
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.methods.grammar import parse

LAYERS, HEADS, HEAD_DIM, VOCABULARY, CONTEXT = 4, 2, 32, 512, 2048
EXACT_BYTES = CONTEXT * LAYERS * HEADS * 2 * HEAD_DIM * 4
FLOOR_BYTES = math.ceil(LAYERS * HEADS * CONTEXT * (0.9 * HEAD_DIM - 0.469) / 8)
TOKEN_ID_BYTES = math.ceil(CONTEXT * math.log2(VOCABULARY) / 8)

SPAN = {
    "recall": 1.0,
    "kv": 1.2,
    "passkey": 0.5,
    "passkey64": 0.7,
    "needles": 0.8,
    "vartrack": 1.0,
    "words": 0.3,
    "copy": 1.1,
    "registers": 0.9,
}
"""Task -> relative share of the context that it depends on."""

STRENGTH = {"h2o(recent=32)": 1.6, "window": 0.55, "sinks": 0.6, "random": 0.5}
"""Method -> how well it keeps the tokens that matter; `h2o` gets worse if the question comes afterwards."""


def synthetic_rows(n: int = 40, seed: int = 0, tasks: tuple[str, ...] = tuple(SPAN)) -> list[Row]:
    """Make rows of 15 settings (exact, 2 quantised, 4 methods x 3 budgets) on every task and both protocols."""
    rng = random.Random(seed)
    rows = []
    for task in tasks:
        for protocol in get_args(Protocol):
            exact = [int(rng.random() < 0.985) for _ in range(n)]
            rows.append(_row("exact", None, task, protocol, 1.0, exact, exact, EXACT_BYTES, rng))
            for bits in (8, 4):
                right = [one and int(rng.random() < (1.0 if bits == 8 else 0.97)) for one in exact]
                size = EXACT_BYTES * bits // 32 + CONTEXT * LAYERS * HEADS * 8
                rows.append(_row(f"quant(bits={bits})", None, task, protocol, 0.95, right, exact, size, rng))
            for method, strength in STRENGTH.items():
                for budget in (64, 256, 1024):
                    reach = strength * (budget / CONTEXT) ** 0.5 / SPAN[task]
                    if protocol == "after" and method.startswith("h2o"):
                        reach *= 0.55
                    share = min(1.0, max(0.0, 1.6 * reach - 0.1))
                    right = [one and int(rng.random() < share) for one in exact]
                    size = LAYERS * HEADS * (budget + 32) * (2 * HEAD_DIM * 4 + (16 if "h2o" in method else 8))
                    rows.append(_row(f"{method}@{budget}", budget, task, protocol, share, right, exact, size, rng))
    return rows


def _row(
    method: str,
    budget: int | None,
    task: str,
    protocol: Protocol,
    quality: float,
    right: list[int],
    exact: list[int],
    size: int,
    rng: random.Random,
) -> Row:
    zero = method == "exact"
    by_head = [
        [0.0 if zero else (1.02 - quality) * rng.uniform(0.2, 1.0) * (layer + 1) / LAYERS for _ in range(HEADS)]
        for layer in range(LAYERS)
    ]
    return measured_row(
        setting=BudgetedMethod(parse(method), baseline=not method.startswith("h2o")),
        budget_tokens=budget,
        task=task,
        context=CONTEXT,
        protocol=protocol,
        outcomes=right,
        exact_outcomes=exact,
        state_bytes=size,
        peak_state_bytes=size + 16384,
        exact_bytes=EXACT_BYTES,
        floor_bytes=FLOOR_BYTES,
        token_id_bytes=TOKEN_ID_BYTES,
        bytes_read_per_token=size * 0.99,
        output_error_by_layer=[sum(layer) / HEADS for layer in by_head],
        output_error_by_head=by_head,
        prefill_ms=rng.uniform(280, 420),
        decode_ms_per_token=rng.uniform(1.5, 4.0),
        output_tokens=rng.uniform(3, 9),
    )


def synthetic_meta() -> Meta:
    return Meta(
        model="builtin",
        seed=0,
        command="kvfloor audit --model builtin --budgets 64,256,1024 --out runs/audit",
        versions={"kvfloor": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        machine="2 cores, CPU",
        duration_s=161.0,
        hashes={"model.safetensors": "ab" * 32},
        notes=("Contexts of 4,096 tokens were left out to stay within three minutes.",),
    )


def synthetic_example(poison: str = "") -> SideBySide:
    """Make the example of a text that a setting continues otherwise than exact from its third token on."""
    exact = Answered("exact", (5, 6, 7), 3, f"one two three{poison}", "", "", True)
    other = Answered(f"h2o@64{poison}", (5, 6, 8, 9), 2, f"one two{poison}", f" four{poison}", f" five{poison}", False)
    same = Answered(f"quant{poison}", (5, 6, 7), 3, f"one two three{poison}", "", "", True)
    return SideBySide(
        "text", f"sea{poison}", 256, f"begin{poison}", f"ask{poison}", f"truth{poison}", exact, (other, same)
    )


def synthetic_maps(poison: str = "", layers: int = 30, heads: int = 3) -> list[ErrorMap]:
    """Make the maps of two settings on a model of which every second layer has a compressed cache."""
    table = tuple(tuple((layer + head) / 100 for head in range(heads)) for layer in range(layers))
    numbers = tuple(range(1, 2 * layers, 2))
    return [ErrorMap(f"{one}{poison}", f"sea{poison}", 256, 64, 1000, numbers, table) for one in ("h2o@64", "quant")]


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return synthetic_rows()


@pytest.fixture(scope="session")
def answer(rows: list[Row]) -> Recommendation:
    return recommend(rows)


@pytest.fixture
def meta() -> Meta:
    return synthetic_meta()
