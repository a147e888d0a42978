"""Every registered method, and what users combine them to, keeps every law that it claims."""

import pytest
import torch

from kvfloor import parse
from kvfloor.check import run_checks
from kvfloor.registry import TABLE, default_method

COMBINATIONS = (
    "h2o(score=mean)@64",
    "h2o(score=decay,group=max)+value_sum@64",
    "h2o(prefill=dense)@64",
    "h2o(block=1,recent=4)@16",
    "window+value_sum|top_k(k=16)@48",
    "sinks(4)@64",
    "sinks(2)+value_sum@24:40:32",
    "random(block=1)@32",
    "random(sinks=2,recent=4,block=64)@40",
    "subgen(centres=32,s=64)",
    "quant(bits=4,group=16)",
    "third_party:EverySecond@32",
    "third_party:Diary",
)
REGISTERED = tuple(dict.fromkeys(str(default_method(name, budget=32)) for name in TABLE))
METHODS = REGISTERED + COMBINATIONS
NEVER_UNCLAIMED = {"chunking", "causality", "pads", "capacity", "row_isolation", "reference", "index_floor"}


def _require_conformance(text: str, dtype: torch.dtype, g: int, seed: int = 0) -> None:
    outcome = run_checks(parse(text), dtypes=(dtype,), groups=(g,), seed=seed)
    assert outcome.failed == []
    assert not NEVER_UNCLAIMED & {skip["check"] for skip in outcome.skipped}


@pytest.mark.parametrize("text", METHODS)
def test_method_keeps_its_laws(text: str) -> None:
    _require_conformance(text, torch.float32, g=4)


@pytest.mark.parametrize("text", REGISTERED)
def test_method_keeps_its_laws_in_half_precision_and_without_a_group(text: str) -> None:
    _require_conformance(text, torch.bfloat16, g=1)


BLOCKS = tuple(
    f"{policy}(block={block}){rest}@{budget}"
    for policy in ("window", "sinks", "random", "h2o")
    for block, budget in ((1, 24), (16, 48), (64, 96))
    for rest in ("", "+value_sum", "|top_k(k=12)")
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("g", [1, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("text", METHODS)
def test_method_keeps_its_laws_in_every_setting(text: str, dtype: torch.dtype, g: int, seed: int) -> None:
    _require_conformance(text, dtype, g, seed)


@pytest.mark.slow
@pytest.mark.parametrize("text", BLOCKS)
def test_method_keeps_its_laws_at_every_block(text: str) -> None:
    assert run_checks(parse(text)).failed == []
