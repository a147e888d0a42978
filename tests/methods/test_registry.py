"""The text grammar: every configuration is written and read back equal, every mistake is named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfloor import Bounded, Exact, Method, Spec, parse
from kvfloor.core.policy import Held, Policy
from kvfloor.core.selector import Everything
from kvfloor.core.summary import Drop
from kvfloor.methods.grammar import default_method
from kvfloor.methods.policies.expected import Expected
from kvfloor.methods.policies.heavy_hitters import HeavyHitters
from kvfloor.methods.policies.key_difference import KeyDifference
from kvfloor.methods.policies.key_norm import KeyNorm
from kvfloor.methods.policies.last_query import LastQuery
from kvfloor.methods.policies.leverage import RidgeLeverage
from kvfloor.methods.policies.milestones import Milestones
from kvfloor.methods.policies.observation import Observation
from kvfloor.methods.policies.random import Random
from kvfloor.methods.policies.sinks import Sinks
from kvfloor.methods.policies.window import Window
from kvfloor.methods.registry import ALIASES, TABLE, kind, lookup
from kvfloor.methods.selectors.best_first import BestFirst
from kvfloor.methods.selectors.hierarchical import Hierarchical
from kvfloor.methods.selectors.pages import Pages
from kvfloor.methods.selectors.top_k import TopK
from kvfloor.methods.selectors.zcurve import ZCurve
from kvfloor.methods.sketches.quantized import Quantized
from kvfloor.methods.sketches.subgen import SubGen
from kvfloor.methods.sketches.window_sample import WindowSample
from kvfloor.methods.summaries.low_rank import Less
from kvfloor.methods.summaries.moments import Moments
from kvfloor.methods.summaries.taylor import Taylor
from kvfloor.methods.summaries.value_sample import ValueSample
from kvfloor.methods.summaries.value_sum import ValueSum

small = st.integers(0, 20)
fractions = st.floats(0.01, 0.99)
budgets = st.one_of(
    st.none(),
    st.integers(500, 10**6),
    st.lists(st.integers(500, 9999), min_size=1, max_size=4).map(tuple),
    st.sampled_from(["25%", "12.5%", "64MiB", "8MB"]),
)
policies = st.one_of(
    st.just(Window()),
    st.builds(Sinks, small),
    st.builds(Random, small, small),
    st.builds(
        HeavyHitters,
        st.sampled_from(["sum", "mean", "decay"]),
        st.none() | small,
        small,
        fractions,
        st.sampled_from(["mean", "max"]),
    ),
    *(st.builds(part, small, st.none() | small) for part in (LastQuery, KeyNorm, KeyDifference)),
    st.builds(Expected, small, st.none() | small, st.sampled_from(["pool", "each"]), fractions),
    st.builds(
        RidgeLeverage,
        small,
        st.none() | small,
        fractions,
        st.integers(1, 99),
        st.sampled_from(["gaussian", "count"]),
        st.sampled_from(["seen", "held"]),
        st.booleans(),
    ),
    st.builds(
        Observation,
        st.integers(1, 99),
        st.integers(0, 9).map(lambda half: 2 * half + 1),
        st.sampled_from(["max", "avg"]),
        st.just("evict"),  # a method that keeps the answer or the prompt takes no bytes: see `sparing` below
        small,
    ),
    st.builds(Milestones, st.integers(1, 64), fractions, st.none() | fractions, st.just("evict"), small),
)
sparing = st.one_of(
    st.builds(Bounded, st.just(Observation()), budget=st.none() | st.integers(500, 999), block=st.integers(1, 128)),
    st.builds(Bounded, st.just(Observation()), prefill=st.just("stream")),
    st.builds(Bounded, st.builds(Milestones, st.integers(1, 64)), budget=st.sampled_from([None, "25%", (500, 600)])),
)
some = st.integers(1, 99)
selectors = st.one_of(
    st.just(Everything()),
    st.builds(TopK, st.integers(1, 999)),
    st.builds(Pages, some, some),
    st.builds(BestFirst, some, some),
    st.builds(lambda blocks, b, *rest: Hierarchical(blocks * b, b, *rest), some, some, small, some, some, some),
    st.builds(ZCurve, some, some, some, some),
)
summaries = st.one_of(
    st.sampled_from([Drop(), ValueSum(), Less(kernels="builtin")]),
    st.builds(ValueSample, copies=st.none() | some, groups=st.none() | some.map(lambda g: 2 * g - 1)),
    st.builds(ValueSample, epsilon=fractions, delta=fractions, spread=st.floats(1.0, 9.0), horizon=some),
    st.builds(Less, some),
    st.builds(Moments, st.sampled_from(["full", "diagonal", "none"])),
    st.builds(Taylor, small, st.none() | st.floats(0.01, 9.0)),
)
methods = st.one_of(
    st.builds(
        Bounded,
        policies,
        summaries,
        selectors,
        budgets,
        st.integers(1, 128),
        st.sampled_from([None, "stream", "dense"]),
    ),
    sparing,
    st.builds(Exact, selectors),
    st.builds(Quantized, st.sampled_from([8, 4, 2]), st.integers(1, 256)),
    st.builds(
        WindowSample, some, some.map(lambda g: 2 * g - 1), st.none() | st.floats(1.0, 9.0), st.none() | some, some
    ),
    st.builds(
        SubGen,
        st.floats(1e-6, 1e6),
        st.integers(1, 9),
        st.integers(1, 999),
        st.none() | st.integers(1, 999),
        st.integers(1, 64),
        st.none() | st.floats(0.1, 9),
        fractions,
        st.none() | st.integers(200, 9999) | st.just("64MiB"),
    ),
)


@given(methods)
def test_every_configuration_is_read_back_equal(method: Method) -> None:
    assert parse(str(method)) == method


@given(methods)
def test_spaces_between_parts_do_not_matter(method: Method) -> None:
    text = str(method)
    spaced = "".join(f" {c} " if c in "@|+,()" else c for c in text)
    assert parse(spaced) == method


@pytest.mark.parametrize("name", [*TABLE, *ALIASES])
def test_every_name_makes_a_method_that_opens(name: str) -> None:
    method = default_method(name)
    assert parse(str(method)) == method
    method.open(Spec(1, 4, 4))


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_means_its_part(alias: str, name: str) -> None:
    assert lookup(alias) is TABLE[name]


@pytest.mark.parametrize("part", TABLE.values())
def test_every_part_of_the_table_has_a_kind_and_a_source(part: type) -> None:
    assert kind(part) in ("method", "policy", "summary", "selector")
    assert part.__doc__


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("h2o(mean)@64", "h2o(score=mean)@64"),
        ("streaming_llm(2)@64", "sinks(count=2)@64"),
        ("window+drop|everything@64", "window@64"),
        ("h2o(score='mean')@64", "h2o(score=mean)@64"),
        ("window()@64", "window@64"),
        ("subgen@25%", "sinks(4)+clusters(m=64)@25%"),
        ("subgen|top_k(k=8):k4v4@64", "sinks+clusters(m=64)|top_k(k=8):k4v4@64"),
        ("kvfloor.methods.policies.sinks:Sinks(2)@64", "sinks(2)@64"),
    ],
)
def test_two_ways_of_writing_the_same(text: str, same: str) -> None:
    assert parse(text) == parse(same)


@dataclass(frozen=True)
class Oldest(Policy):
    """A third party's policy: what came first stays."""

    name: ClassVar[str] = "oldest"
    factor: float = 1.0

    def priority(self, held: Held) -> Tensor:
        return -held.position * self.factor


class NotFrozen(Policy):
    """No dataclass, so its arguments cannot be written."""

    name: ClassVar[str] = "bare"

    def priority(self, held: Held) -> Tensor:
        return held.position


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which this module can be imported."""
    monkeypatch.setitem(sys.modules, Oldest.__module__, sys.modules[Oldest.__module__])
    return Oldest.__module__


def test_a_third_partys_policy_is_imported_and_read_back(here: str) -> None:
    method = parse(f"{here}:Oldest(factor=2.0,block=4)+value_sum@16")
    assert isinstance(method, Bounded) and method.policy == Oldest(2.0) and method.block == 4
    assert str(method) == f"{here}:Oldest(factor=2.0,block=4)+value_sum@16"
    assert parse(str(method)) == method


def test_a_part_that_is_no_dataclass_is_refused(here: str) -> None:
    with pytest.raises(ValueError, match="must be a frozen dataclass"):
        parse(f"{here}:NotFrozen@8")


def names(*kinds: str) -> str:
    return ", ".join(sorted(name for name, part in TABLE.items() if kind(part) in kinds))


BAD = [
    ("", "a method is text such as"),
    ("   ", "a method is text such as"),
    ("nonsense@8", f"unknown policy or method 'nonsense'; there are {names('policy', 'method')}"),
    ("windw@8", "did you mean 'window'?"),
    ("window+nothing@8", f"unknown summary 'nothing'; there are {names('summary')}"),
    ("window|all@8", f"unknown selector 'all'; there are {names('selector')}"),
    ("drop@8", "drop is a summary; a policy or method is needed here"),
    ("window+top_k@8", "top_k is a selector; a summary is needed here"),
    ("exact+value_sum", "'+' adds a summary to an eviction policy only"),
    ("subgen_sketch|top_k", "'|' needs exact or an eviction policy before it"),
    ("subgen(t=3)@8", "subgen stands for 'sinks+clusters(m=64)' and takes nothing more: write that instead"),
    ("subgen+value_sum@8", "subgen stands for 'sinks+clusters(m=64)' and takes nothing more"),
    ("subgn@8", "did you mean 'subgen'?"),
    ("subgen.mine:Policy@8", "subgen.mine:Policy cannot be imported"),
    ("exact@8", "leave the budget out"),
    ("window(3)@8", "window does not take 1 values; it takes block, prefill"),
    ("h2o(rcent=3)@8", "h2o does not take rcent; it takes score, recent, sinks, decay, group, decode, block, prefill"),
    ("top_k(k=3)@8", "top_k is a selector"),
    ("window(block=4,block=5)@8", "each once"),
    ("window(1),(2)@8", "the arguments must be numbers or words"),
    ("window(**{})@8", "does not take **"),
    ("window(*[1])@8", "the arguments must be numbers or words"),
    ("sinks(1+1)@8", "the arguments must be numbers or words"),
    ("sinks(open)@8", "count must be a whole number >= 0, got 'open'"),
    ("sinks(__import__(os))@8", "the arguments must be numbers or words"),
    ("sinks(" + "(" * 500 + ")@8", "is not name or name(arg=value, ...)"),
    ("sinks(" + "-" * 9000 + "1)@8", "the arguments must be numbers or words"),
    ("window(@8", "is not name or name(arg=value, ...)"),
    ("window)@8", "is not name or name(arg=value, ...)"),
    ("window@", "is not a budget"),
    ("window@@8", "is not a budget"),
    ("window@8@9", "is not a budget"),
    ("window@8:", "budgets per row are whole numbers >= 1"),
    ("window@8:x", "budgets per row are whole numbers >= 1"),
    ("subgen_sketch(block=4,prefill=dense)", "subgen_sketch does not take prefill"),
    ("exact(block=4)", "exact does not take block; it takes no arguments"),
    ("quant(bits=3)", "bits must be 8, 4 or 2"),
    ("quant(bits=4.0)", "bits must be 8, 4 or 2"),
    ("exact|top_k(k=2.5)", "k must be a whole number >= 1"),
    ("exact|top_k(k=0)", "k must be a whole number >= 1"),
    ("h2o(score=best)@64", "score must be sum, mean or decay"),
    ("h2o(group=min)@64", "group must be mean or max"),
    ("h2o(decay=1.0)@64", "decay must lie in (0, 1)"),
    ("h2o(sinks=None)@64", "sinks must be a whole number >= 0"),
    ("h2o(sum,score=sum)@64", "score"),
    ("random(recent=-1)@64", "recent must be a whole number >= 0"),
    ("window(prefill=lazy)@64", "prefill must be stream or dense"),
    ("h2o@8", "needs at least 9"),
    ("no.such.module:Thing@8", "no.such.module:Thing cannot be imported"),
    ("math:nothing@8", "math:nothing cannot be imported"),
    (":Thing@8", ":Thing cannot be imported"),
    (".relative:Thing@8", ".relative:Thing cannot be imported"),
    ("math:pi@8", "math:pi is a float; give a class"),
    ("collections:OrderedDict@8", "is no Method, Policy, Summary or Selector"),
    ("kvfloor.core.policy:Policy@8", "must be a frozen dataclass"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[text[:40] or "empty" for text, _ in BAD])
def test_a_mistake_is_named(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize("given_", [None, 3, b"window@8", ["window@8"]])
def test_what_is_not_text_is_refused(given_: object) -> None:
    with pytest.raises(ValueError, match="a method is text"):
        parse(given_)  # type: ignore[arg-type]


PROGRAM = """
import json, sys
from kvfloor import parse
import torch
from kvfloor import Spec
found = []
def attempt(call):
    try:
        call()
        found.append("accepted")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
for text in json.loads(sys.argv[1]):
    attempt(lambda: parse(text))
state = parse("h2o@16").open(Spec(2, 4, 4))
x = torch.zeros(2, 3, 4)
for q, k, v in (
    (x, x, x), (x[:, None], x * torch.nan, x), (x[:, None], x, x[:1]), (x[:, None], x[..., :2], x),
    (x[:, None].double(), x, x), (x[:, None, :2], x, x), (None, x, x), (x[:, None], x.to_sparse(), x),
):
    attempt(lambda: state.step(q, k, v))
attempt(lambda: state.pin(4, 2))
attempt(lambda: state.select_rows(torch.tensor([5])))
attempt(lambda: state.method.from_bytes(b"nonsense" * 20))
attempt(lambda: Spec(0, 1, 1))
attempt(lambda: Spec(1, 1, 1, row_ids=[1, 2]))
attempt(lambda: Spec(1, 1, 1, seed="x"))
print(json.dumps([__debug__, found]))
"""


def test_errors_are_the_same_without_assertions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    texts = json.dumps([text for text, _ in BAD])
    monkeypatch.setattr(sys, "argv", ["-c", texts])
    exec(compile(PROGRAM, "PROGRAM", "exec"), {})
    debug, plain = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-O", "-c", PROGRAM, texts]
    told = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    no_debug, optimised = json.loads(told)
    assert debug and not no_debug
    assert plain == optimised
    assert "accepted" not in plain
    assert all(error.startswith(("ValueError", "TypeError", "CorruptState")) for error in plain)
