"""The text of a method names its store after a colon, is read back equal, and every mistake in it is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfloor import Bounded, Exact, Spec, parse
from kvfloor.core.policy import Held, Policy
from kvfloor.core.store import Full, Store
from kvfloor.methods.policies.heavy_hitters import HeavyHitters
from kvfloor.methods.policies.sinks import Sinks
from kvfloor.methods.selectors.pages import Pages
from kvfloor.methods.selectors.top_k import TopK
from kvfloor.methods.stores.coded import Coded
from kvfloor.methods.summaries.value_sum import ValueSum


@dataclass(frozen=True)
class Tagged(Policy):
    """A third party's policy with a text argument."""

    name: ClassVar[str] = "tagged"
    tag: str = ""

    def priority(self, held: Held) -> Tensor:
        return held.position.double()

    def __str__(self) -> str:
        return f"{__name__}:Tagged(tag={self.tag!r})"


bits = st.integers(2, 8)
stores = st.one_of(st.just(Full()), st.builds(Coded, bits, bits), st.builds(Coded, bits, bits, st.integers(0, 99)))
budgets = st.sampled_from([None, 64, (64, 80, 99), "25%", "64MiB"])
methods = st.one_of(
    st.builds(
        Bounded,
        st.sampled_from([Sinks(3), HeavyHitters(recent=9)]),
        st.sampled_from([ValueSum()]),
        st.sampled_from([TopK(8), Pages(4, 5)]),
        budgets,
        st.integers(1, 40),
        st.sampled_from([None, "dense"]),
        stores,
    ),
    st.builds(Bounded, st.just(HeavyHitters()), budget=budgets, store=stores),
    st.builds(Exact, st.sampled_from([TopK(8), Pages(4, 5), Exact().selector]), stores),
)


@given(methods)
def test_every_store_is_read_back_equal(method: Bounded | Exact) -> None:
    assert parse(str(method)) == method
    assert (":k" in str(method)) == (not method.store.plain)


@given(methods)
def test_spaces_do_not_matter(method: Bounded | Exact) -> None:
    body, colon, rest = str(method).partition(":k")
    store, at, budget = rest.partition("@")
    assert (
        parse(
            "".join(f" {c} " if c in "@|+,()" else c for c in body) + f" {colon[:1]} {colon[1:]}{store} {at} {budget}"
        )
        == method
    )


def test_a_space_before_a_stores_arguments_does_not_matter() -> None:
    assert parse("h2o:k4v4 (first=1)@64") == parse("h2o:k4v4(first=1)@64")


@given(methods)
def test_the_store_may_follow_the_budget(method: Bounded | Exact) -> None:
    if method.budget is None:
        return
    body = str(replace(method, store=Full()))
    assert parse(f"{body}:{method.store}") == method


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("h2o@512:k4v4", "h2o:k4v4@512"),
        ("h2o@512:k4v4(first=4)", "h2o:k4v4@512"),
        ("h2o@50:60:70:k4v4", "h2o:k4v4@50:60:70"),
        ("exact:full", "exact"),
        ("exact:kivi4(group=32)", "exact:kivi4"),
        ("exact|pages(pages=8):kivi2 (first=4, group=16)", "exact|pages(pages=8):kivi2(group=16,first=4)"),
        ("h2o:full@64", "h2o@64"),
        ("sinks(4)+value_sum|top_k(k=8)@64:k8v8(first=0)", "sinks(4)+value_sum|top_k(k=8):k8v8(first=0)@64"),
        ("kvfloor.methods.policies.sinks:Sinks(2):k4v4@64", "sinks(2):k4v4@64"),
    ],
)
def test_two_ways_of_writing_the_same(text: str, same: str) -> None:
    assert parse(text) == parse(same)


def test_parts_and_bits_are_what_was_written() -> None:
    method: Any = parse("sinks(4)+value_sum|top_k(k=8):k8v3(first=0)@64")
    assert method.store == Coded(8, 3, 0) and method.parts.store == method.store and method.budget == 64
    assert method.with_store(Full()) == parse("sinks(4)+value_sum|top_k(k=8)@64")
    assert str(method) == "sinks(count=4)+value_sum|top_k(k=8):k8v3(first=0)@64" or parse(str(method)) == method


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quant:k4v4", "quant has no slots whose store could be chosen: leave ':k4v4' out"),
        ("subgen_sketch:k4v4", "no slots whose store could be chosen"),
        ("balance:k4v4@64", "no slots whose store could be chosen"),
        ("tensor:k4v4", "no slots whose store could be chosen"),
        ("exact:k9v4", "2 to 8 bits per number, got 9 for keys"),
        ("exact:k4v1", "2 to 8 bits per number, got 1 for values"),
        ("h2o:k0v4@64", "2 to 8 bits per number, got 0 for keys"),
        ("exact:k4", "unknown|module|is not"),
        ("exact:v4k4", "unknown|module|is not"),
        ("exact:k4v4v4", "unknown|module|is not"),
        ("h2o:k4v4(5)@64", r"a store such as k4v4 takes first=N and recent=N, .* full takes nothing, got '5\)'"),
        ("h2o:k4v4(last=5)@64", r"takes first=N"),
        ("h2o:k4v4(first=1, first=2)@64", "each once"),
        ("h2o:k4v4(first=-1)@64", "first"),
        ("exact:k4v4(recent=-1)", "recent"),
        ("h2o:k4v4(recent=16)@64", r"k4v4\(recent=16\) codes groups of tokens that all stay"),
        ("h2o:k4v4(first=1.5)@64", "first"),
        ("h2o:k4v4(first=many)@64", "first"),
        ("h2o:full(first=1)@64", "full takes nothing"),
        ("h2o:k4v4(group=8)@64", r"takes first=N"),
        ("exact:kivi3", "bits must be 8, 4 or 2, got 3"),
        ("exact:kivi4(group=0)", "group must be a whole number >= 1, got 0"),
        ("exact:kivi4(first=-1)", "first must be a whole number >= 0, got -1"),
        ("exact:kivi4(8)", "such as kivi4 group=N and first=N"),
        ("exact:kivi4(bits=2)", "such as kivi4 group=N and first=N"),
        ("exact:kivi", "unknown|module|is not"),
        ("quant:kivi4", "quant has no slots whose store could be chosen: leave ':kivi4' out"),
        ("h2o:kivi4@64", "kivi4 codes groups of tokens that all stay, but h2o drops some .*use a store such as k4v4"),
        ("h2o:k4v4:k4v4@64", "unknown|module|is not"),
        ("h2o:k4v4@64:k4v4", "budgets per row are whole numbers"),
        ("h2o@64:k4", "budgets per row are whole numbers"),
        ("h2o:k4v4", None),
        ("h2o(k4v4)@64", "score"),
        (":k4v4", "is not name"),
        ("h2o|:k4v4@64", "is not name"),
    ],
)
def test_a_mistake_is_named(text: str, said: str | None) -> None:
    if said is None:
        assert parse(text).budget is None
        return
    with pytest.raises(ValueError, match=said):
        parse(text)


@pytest.mark.parametrize("bad", [1, 9, 4.0, True, "4", None])
def test_bits_out_of_range_are_refused(bad: Any) -> None:
    for arguments in ({"keys": bad, "values": 4}, {"keys": 4, "values": bad}):
        with pytest.raises(ValueError, match="2 to 8 bits per number"):
            Coded(**arguments)


@pytest.mark.parametrize("bad", ["k4v4", None, Coded])
def test_a_store_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="store must be a Store, got"):
        Exact(store=bad)
    with pytest.raises(TypeError, match="store must be a Store, got"):
        Bounded(Sinks(), store=bad)


@pytest.mark.parametrize("tag", ["a", "a:b", ":k4v4", "x:k4v4(first=1)", "@:k4v4", "k4v4", "):k4v4("])
def test_a_quoted_argument_with_a_colon_is_no_store(tag: str) -> None:
    name = f"{__name__}:Tagged"
    plain = Bounded(Tagged(tag), budget=64)
    assert parse(f"{name}(tag={tag!r})@64") == plain
    assert parse(f"{name}(tag={tag!r}):k4v3@64") == replace(plain, store=Coded(4, 3))
    assert parse(f"{name}(tag={tag!r})@64:k4v3") == replace(plain, store=Coded(4, 3))
    assert parse(f"{name}(tag={tag!r}):full@64") == plain


@pytest.mark.parametrize(
    "tag",
    ["a:b", ":k4v4", "x:k4v4(first=1)", "):k4v4("],
)
def test_it_is_so_before_a_store_with_arguments(tag: str) -> None:
    plain = Bounded(Tagged(tag), budget=64)
    wanted = replace(plain, store=Coded(4, 3, 1))
    assert parse(f"{__name__}:Tagged(tag={tag!r}):k4v3(first=1)@64") == wanted


def test_a_third_partys_part_named_like_bits_is_looked_up() -> None:
    with pytest.raises(ValueError, match="some_module"):
        parse("some_module:k4v@64")
    assert parse(f"{__name__}:Tagged@64") == Bounded(Tagged(), budget=64)


@given(stores)
def test_a_store_keeps_its_text_in_a_method(store: Store) -> None:
    if isinstance(store, Coded):
        text = str(store)
        assert text.startswith(f"k{store.keys}v{store.values}")
        assert ("first" in text) == (store.first != 4)
        name, _, rest = text.partition("(")
        named = {"first": int(rest.removeprefix("first=").removesuffix(")"))} if rest else {}
        assert Coded.parsed(name, **named) == store
    assert Coded.parsed("window") is None and Coded.parsed("k4v4x") is None


@pytest.mark.parametrize("text", ["h2o:k4v4", "sinks(4):k2v2", "exact:k8v8"])
def test_traits_and_guarantee_admit_that_numbers_are_coded(text: str) -> None:
    stored, plain = parse(text), parse(text.partition(":")[0])
    spec = Spec(1, 4, 4, dtype=torch.float64)
    assert stored.traits.lossy_values and not plain.traits.lossy_values
    assert not (stored.traits.value_linear or stored.traits.normalised or stored.traits.turns)
    assert stored.guarantee(spec) is None
    assert stored.traits.constant_memory == plain.traits.constant_memory
