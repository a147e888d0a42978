"""The members of a method that have a usual value, and how third parties declare their own."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace

import pytest
import torch

from kvfloor import Method, Spec, State, Traits, parse
from kvfloor.check.streams import rows_of
from kvfloor.check.suite import CHECKS
from kvfloor.core.budget import resolve
from kvfloor.core.exact import Exact
from kvfloor.core.method import Parts, standard_law
from kvfloor.core.selector import Everything
from kvfloor.core.store import Full
from kvfloor.core.summary import Drop
from kvfloor.methods.policies.window import Window
from kvfloor.methods.stores.kivi import Kivi
from kvfloor.methods.summaries.value_sum import ValueSum
from tests.support import opened


@dataclass(frozen=True)
class Bare(Method):
    """A third party's method that declares nothing but what it must."""

    @property
    def traits(self) -> Traits:
        return Traits(constant_memory=False)

    def open(self, spec: Spec) -> State:
        return Exact().open(spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        return None


@dataclass(frozen=True)
class Sized(Bare):
    """A third party's method with a budget that must be given, and an argument behind it."""

    budget: int
    block: int
    rank: int = 3


def test_what_is_not_declared_has_its_usual_value() -> None:
    method = Bare()
    assert (method.budget, method.block, method.parts) == (None, 32, Parts())
    assert method.with_summary(Drop()) is None
    assert str(method) == f"{Bare.__module__}:Bare" and rows_of(method) == 3
    assert resolve(method, Spec(1, 4, 4)) is method
    claims = {name: check.not_claimed(method) for name, check in CHECKS.items()}
    assert claims["pinned"] and claims["selector_subset"] and claims["absorbed_once"]


def test_usual_values_are_no_defaults_of_a_third_partys_fields() -> None:
    assert [field.default is MISSING for field in fields(Sized)] == [True, True, False]
    with pytest.raises(TypeError):
        Sized(64)  # type: ignore[call-arg]
    assert Sized(64, 8).budget == 64 and Sized(64, 8).block == 8
    assert str(Sized(64, 8, rank=4)) == f"{Sized.__module__}:Sized(block=8,rank=4)@64"
    assert str(replace(Sized(64, 8), budget=(3, 4))).endswith("@3:4")  # type: ignore[arg-type]


def test_parts_of_the_tables_methods() -> None:
    assert parse("window+value_sum@8").parts == (Window(), ValueSum(), Everything(), Full())
    assert parse("exact").parts == (None, None, Everything(), Full())
    assert parse("quant(bits=4)").parts == parse("exact:kivi4").parts == (None, None, Everything(), Kivi(4))
    assert parse("subgen_sketch").parts == Parts()
    assert parse("window@8").with_summary(ValueSum()) == parse("window+value_sum@8")


@pytest.mark.parametrize("text", ["window@64", "exact", "exact|top_k(k=8)", "quant"])
def test_methods_that_claim_pins_take_a_span(text: str) -> None:
    method = parse(text)
    assert method.traits.pins
    state = method.open(Spec(1, 4, 4))
    state.append(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
    state.pin(0, 3)
    before = state.to_bytes()
    for span in ((2, 2), (-1, 3), (3, 1), (0, 1.5), (0.0, 3), ("0", 3), (None, 3), (True, 3)):
        with pytest.raises(ValueError, match=r"a pinned span needs .*0 <= start < stop"):
            state.pin(*span)
    assert state.to_bytes() == before


@pytest.mark.parametrize("text", ["subgen_sketch@64", "balance@64", "tensor"])
def test_the_others_refuse_a_pin_and_stay_as_they_were(text: str) -> None:
    method = parse(text)
    assert not method.traits.pins
    state = method.open(Spec(1, 4, 4))
    before = state.to_bytes()
    with pytest.raises(ValueError, match="cannot pin tokens"):
        state.pin(0, 3)
    assert state.to_bytes() == before


def test_tensor_attention_is_refused_where_standard_attention_is_needed() -> None:
    method = parse("h2o@64")
    assert standard_law(method, "an audit") is method
    with pytest.raises(ValueError, match="tensor is tensor attention, over pairs of tokens; an audit takes"):
        standard_law(parse("tensor"), "an audit")


def test_exact_states_that_it_is_exact_unless_a_selector_skips_tokens() -> None:
    stated = opened("exact").guarantee()
    assert stated is not None and (stated.epsilon, stated.delta, stated.quantifier) == (0.0, 0.0, "every query")
    assert opened("exact|top_k(k=4)").guarantee() is None
