"""Every registered method, and what users combine them to, keeps every law that it claims."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import parse
from kvfloor.check import CHECKS, Setting, breaking, run_checks, suite
from kvfloor.check.streams import play, spec_for, stream_for
from kvfloor.methods.grammar import default_method
from kvfloor.methods.registry import TABLE

COMBINATIONS = (
    "h2o(score=mean)@64",
    "h2o(score=decay,group=max)+value_sum@64",
    "h2o(prefill=dense)@64",
    "h2o(block=1,recent=4)@16",
    "window+value_sum|top_k(k=16)@48",
    "h2o|pages(pages=2,page=4)@64",
    "exact|hip(k=16,window=4,query_block=7)",
    "sinks(4)@64",
    "sinks(2)+value_sum@24:40:32",
    "sinks(4)+less(kernels=builtin)@40",
    "random(block=1)@32",
    "random(sinks=2,recent=4,block=64)@40",
    "subgen_sketch(centres=32,s=64)",
    "balance@64",
    "balance(keep=smaller,centre=False,c=1.0,sinks=0,recent=0)@40",
    "quant(bits=4,group=16)",
    "third_party:EverySecond@32",
    "third_party:Diary",
)
SUMMARISING = (
    "h2o+value_sample(copies=3,groups=3)@48",
    "random(block=1)+value_sample(epsilon=0.9,spread=2.0,horizon=50)@24:32:40",
    "sinks(4)+less(rank=3)@40",
    "sinks(2)+moments(covariance=diagonal)@24:40:32",
    "h2o(prefill=dense)+moments@48",
    "window(block=1)+moments(covariance=none)@32",
    "h2o+clusters(m=5)@48",
    "snapkv(window=8,block=1)+clusters(m=3)@24:32:40",
    "h2o+nystrom(m=5)@48",
    "snapkv(window=8,block=1)+nystrom(m=3,sharpness=1.0)@24:32:40",
    "random+taylor(degree=1)@32",
    "h2o(block=1)+taylor(radius=4.0)|top_k(k=8)@32",
    "window(block=1)+taylor(degree=0)@1",
    "window_sample(copies=2,groups=3)@20",
)
OPTIONS = (
    "tova(sinks=0,recent=0,block=1)@16",
    "snapkv(decode=evict,prefill=stream,pool=avg)@64",
    "snapkv(window=8,kernel=1,block=1)@24:32:40",
    "raas(prompt=evict,top=0.5)@48",
    "h2o(decode=keep,prefill=dense)@48",
    "h2o(decode=keep,block=4)@24:32:40",
    "raas(page=4,alpha=0.05)+value_sum@24:30:60",
    "ridge_leverage(sketch=6,kind=count,centre=True)@40",
    "ridge_leverage(sketch=6,over=held)@40",
    "ridge_leverage(keys=unrotated)@40",
    "expected(heads=each)@24:40:32",
)
SELECTING = (
    "exact|pages(pages=8)",
    "exact|pages(pages=2,page=1)",
    "h2o|pages(pages=4)@128",
    "random(block=1)|pages(pages=2,page=3)@32",
    "exact|hip(k=64)",
    "exact|hip(k=8,key_block=1,sinks=0,window=1,query_block=1,refresh=5)",
    "h2o(prefill=dense)|hip(k=16,window=4,query_block=5,refresh=3)@64",
    "sinks(2)+value_sum|hip(k=8,window=3)@24:40:32",
    "exact|zeta(k=32)",
    "exact|zeta(k=8,curves=2,window=2,chunk=7)",
    "h2o|zeta(k=16,curves=2,window=4)@24:40:64",
    "snapkv|zeta(k=8,curves=1,window=8)@40",
    "exact|best_first(k=16)",
    "h2o|best_first(k=8,page=4)@24:40:64",
)
STORED = (
    "exact:k4v2",
    "exact:kivi4(group=16)",
    "exact|pages(pages=4):kivi2(group=8,first=4)",
    "exact|pages(pages=4):k2v2(first=0)",
    "window(block=16):k8v8@48",
    "sinks(block=16)|top_k(k=12):k4v4@48",
    "random(block=16):k3v3(first=0)@40:48:56",
    "h2o(block=16)|pages(pages=4):k3v2@48",
    "tova(block=16)+value_sum:k4v3@48",
    "window(block=1):k4v4(first=1)@8",
    "snapkv(window=4,block=16):k2v5@40",
    "tiered(epsilon=0.05,page=16)",
)
"""Methods that keep their tokens in few bits, with streams long enough that several groups of tokens are coded."""
PLAYED = (
    *(text for text in STORED if not text.startswith("tiered")),  # which has two kinds of slots
    "random(block=1):k3v3@12",
    "sinks:k4v4@16",
    "quant",
    "quant(group=5)",
    "exact|zeta(k=4,chunk=20):k4v4",
)
REGISTERED = tuple(dict.fromkeys(str(default_method(name, budget=32)) for name in TABLE))
METHODS = REGISTERED + COMBINATIONS
ALIKE = {"tiered", "h2o(score=mean)@64", "sinks(4)@64", "random(block=1)@32", "balance@64"} | {
    "window(block=16):k8v8@48",
    "window(block=1):k4v4(first=1)@8",
    "sinks(block=16)|top_k(k=12):k4v4@48",
    "tova(block=16)+value_sum:k4v3@48",
    "exact|pages(pages=4):k2v2(first=0)",
}
"""Methods that take nearly the same path as another of `METHODS` or `STORED`, so that only the slow tests try them."""
QUICK = {"tiered": "tiered(page=16)", "balance": "balance(batch=16)"}
"""In place of a method whose streams must be long, the same one with smaller parts; the slow tests try the method."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Every dtype; the first stands for all in a law that is not over dtypes, so a seed turns their order."""

NEVER_UNCLAIMED = {"chunking", "causality", "pads", "capacity", "row_isolation", "index_floor"}


def _require_conformance(text: str, **setting: Any) -> None:
    outcome = run_checks(parse(text), **setting)
    assert outcome.failed == []
    assert not NEVER_UNCLAIMED & {skip["check"] for skip in outcome.skipped}


@pytest.fixture
def fewer_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls fail at their first operation, in the middle and at their last one; the slow tests have more places."""
    monkeypatch.setattr(breaking, "_POINTS", 3)


@pytest.mark.usefixtures("fewer_failures")
@pytest.mark.parametrize("text", [text for text in METHODS if text not in ALIKE])
def test_method_keeps_its_laws(text: str) -> None:
    _require_conformance(QUICK.get(text, text), dtypes=(torch.float32,), groups=(4,))


@pytest.mark.usefixtures("fewer_failures")
@pytest.mark.parametrize("text", [text for text in STORED if text not in ALIKE])
def test_method_that_codes_its_tokens_keeps_its_laws(text: str) -> None:
    _require_conformance(text, dtypes=(DTYPES[len(text) % 2],), groups=(1 + len(text) % 3,))


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.05, 0.0])
@pytest.mark.parametrize("cold", ["ram", "disk"])
def test_method_with_tokens_outside_its_memory_keeps_its_laws(cold: str, epsilon: float) -> None:
    _require_conformance(f"tiered(epsilon={epsilon},page=16,cold={cold})", dtypes=(torch.float32,), groups=(2,))


@pytest.mark.slow
def test_method_that_reads_plane_by_plane_keeps_its_laws() -> None:
    _require_conformance("tiered(epsilon=0.05,page=16,planes=True)", dtypes=(torch.float32,), groups=(2,))


@pytest.mark.parametrize("text", PLAYED)
def test_streams_code_several_groups_evict_coded_tokens_and_end_within_a_group(text: str) -> None:
    method, at = parse(text), Setting()
    stream, state = stream_for(method, at), method.open(spec_for(method, at))
    slots: Any = state.slots
    coded, evicted = [], 0

    def left(row: Tensor, position: Tensor) -> None:
        nonlocal evicted
        evicted += int((position < slots.coded[row]).sum())

    state.on_evict = left  # type: ignore[attr-defined]
    play(state, stream, after=lambda i: coded.append(int(slots.coded[0])))
    assert coded[-1] >= 3 * slots.group and stream.n % slots.group
    assert coded[-1] > stream.prompt > 2 * slots.group
    assert evicted > 0 or method.budget is None


@pytest.mark.parametrize("text", REGISTERED)
def test_method_keeps_its_laws_in_half_precision_and_without_a_group(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The laws that depend on neither dtype nor group would be tried again as they were above."""
    monkeypatch.setattr(suite, "CHECKS", {name: check for name, check in CHECKS.items() if check.over})
    _require_conformance(QUICK.get(text, text), dtypes=(torch.bfloat16,), groups=(1,))


BLOCKS = tuple(
    f"{policy}(block={block}){rest}@{budget}"
    for policy in (
        *("window", "sinks", "random", "h2o"),
        *("tova", "snapkv", "raas", "knorm", "keydiff", "ridge_leverage", "expected"),
    )
    for block, budget in ((1, 24), (16, 48), (64, 96))
    for rest in ("", "+value_sum", "|top_k(k=12)")
)

POLICIES = ("window", "sinks", "random", "h2o", "tova", "snapkv")
KEPT = ("full", "k8v8", "k4v4", "k3v3", "k4v2", "k2v2")
READ = ("", "|top_k(k=12)", "|pages(pages=4)")
STORES = (
    *(f"exact{selector}:{store}" for store in (*KEPT, "kivi8", "kivi4", "kivi2") for selector in READ),
    *(f"{policy}(block=16){rest}:{store}@48" for policy in POLICIES for store in KEPT for rest in READ),
)
"""Every policy with every store and every selector, and `exact` with every store and every selector."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("text", METHODS + STORED)
def test_method_keeps_its_laws_in_every_setting(text: str, seed: int) -> None:
    _require_conformance(text, dtypes=DTYPES[seed:] + DTYPES[:seed], seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("text", SUMMARISING + SELECTING + OPTIONS + BLOCKS + STORES)
def test_every_combination_keeps_its_laws(text: str) -> None:
    assert run_checks(parse(text)).failed == []
