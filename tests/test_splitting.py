"""Splitting: joined texts come apart as they were, whatever stands in their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from kvfloor import Bounded, parse
from kvfloor.core.method import Method
from kvfloor.core.policy import Held, Policy
from kvfloor.core.selector import Everything
from kvfloor.core.summary import Drop
from kvfloor.methods.policies.sinks import Sinks
from kvfloor.methods.selectors.top_k import TopK
from kvfloor.methods.sketches.quantized import Quantized
from kvfloor.methods.summaries.value_sum import ValueSum
from kvfloor.methods.variants.tensor import TensorAttention
from kvfloor.splitting import outline, split_list, split_once, split_words


@dataclass(frozen=True)
class Tagged(Policy):
    """A policy with free text among its arguments, such as a file's path."""

    name: ClassVar[str] = "tagged"
    word: str = ""
    other: str = "x"

    def priority(self, ledger: Held) -> Tensor:
        return ledger.position


free = st.text(st.sampled_from("ab,()[]{}'\"\\@|+: \n=#\0") | st.characters(), max_size=12)
tagged = st.builds(Tagged, free, free)
budgets = st.none() | st.integers(90, 999) | st.sampled_from(["25%", "64MiB", (90, 99)])
whole = st.one_of(
    st.builds(
        Bounded,
        tagged | st.builds(Sinks, st.integers(0, 9)),
        st.sampled_from([Drop(), ValueSum()]),
        st.sampled_from([Everything(), TopK(k=3)]),
        budgets,
    ),
    st.just(Quantized(bits=2)),
    st.builds(lambda policy, budget: TensorAttention(Bounded(policy, budget=budget)), tagged, budgets),
)


@given(st.lists(whole, max_size=4), st.sampled_from([",", " , ", ",,", ",\n"]))
def test_any_methods_joined_by_commas_come_apart_again(methods: list[Method], comma: str) -> None:
    texts = [str(method) for method in methods]
    assert split_list(comma.join(texts)) == texts


@example(Bounded(Tagged("if", "\N{LATIN SMALL LIGATURE FI}")))  # identifiers that Python reads as something else
@given(whole)
def test_any_argument_is_read_back_equal(method: Method) -> None:
    assert parse(str(method)) == method


@given(st.text(st.sampled_from("ab,()'\"\\@"), max_size=20))
def test_an_outline_keeps_positions_and_nothing_is_lost(text: str) -> None:
    assert len(outline(text)) == len(text)
    assert all(kept in (c, "_") for c, kept in zip(text, outline(text), strict=True))
    before, mark, after = split_once(text, "@")
    assert before + mark + after == text
    assert "".join(split_list(text)).count("a") == text.count("a")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "window,sinks+less(kernels='x(y.safetensors')@64,h2o",
            ["window", "sinks+less(kernels='x(y.safetensors')@64", "h2o"],
        ),
        (r"less(kernels='it\'s, (mine')@8,h2o", [r"less(kernels='it\'s, (mine')@8", "h2o"]),
        (r"""less(kernels="\\"),h2o""", [r"""less(kernels="\\")""", "h2o"]),
        ("tensor(store=sinks(4,recent=8)@32), h2o", ["tensor(store=sinks(4,recent=8)@32)", "h2o"]),
        ("h2o(recent=8,score=mean), window,", ["h2o(recent=8,score=mean)", "window"]),
        ("a),b", ["a)", "b"]),
        ("it's,b", ["it's", "b"]),
        ("", []),
    ],
)
def test_lists(text: str, parts: list[str]) -> None:
    assert split_list(text) == parts


def test_marks_within_a_nested_method_are_its_own() -> None:
    assert split_once("tensor(store=sinks(4)@32)", "@") == ("tensor(store=sinks(4)@32)", "", "")
    assert split_once("tensor(store=sinks(4))@32", "@") == ("tensor(store=sinks(4))", "@", "32")
    assert parse("tensor(store=sinks(4)@32)") == parse("tensor(store=sinks(4))@32")
    assert split_words("a('x and y')>=1  and b>=2", r"\s+and\s+") == ["a('x and y')>=1", "b>=2"]
