"""Budgets: what can be written, and what bytes really buy."""

from dataclasses import replace

import pytest
import torch

from kvfloor import Method, Spec, parse, resolve
from kvfloor.core.budget import parse_budget, size_bytes
from tests.support import fitting, seeded


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("512", 512),
        (" 7 ", 7),
        ("25%", "25%"),
        ("12.5%", "12.5%"),
        ("100%", "100%"),
        ("64MiB", "64MiB"),
        ("8 MB", "8 MB"),
    ],
)
def test_the_three_forms_are_read(text: str, budget: int | str) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1.5MiB", 3 << 19),
        ("3mb", 3_000_000),
        ("1GiB", 1 << 30),
        ("1 GB", 10**9),
    ],
)
def test_sizes_mean_their_units(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1e3", "5T", "5iB", "%", "-5%", "64 Mi", "1,000", "0x10", "1.5"])
def test_what_is_no_budget_is_told_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"512.*25%.*64MiB"):
        parse_budget(text)


def test_zero_tokens_and_shares_beyond_the_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        parse_budget("0")
    for share in ("0%", "100.5%", "300%"):
        with pytest.raises(ValueError, match=r"\(0, 100\] %"):
            parse_budget(share)


def measured(method: Method, spec: Spec, g: int) -> int:
    """Bytes of a state that was opened and has answered once."""
    state = method.open(spec)
    state.step(*fitting(seeded(0), state, g, 1))
    return state.nbytes


@pytest.mark.parametrize(
    "head",
    [
        "window",
        "sinks(4)",
        "random",
        "h2o",
        "h2o(recent=700,sinks=2)",
        "window+value_sum",
        "h2o:k4v3",
        "window(block=1):k2v2(first=0)",
        "h2o(block=1)",
        "tova",
        "keydiff",
        "expected(heads=each)",
        "ridge_leverage(sketch=8,centre=True)",
        "raas(prompt=evict)",
        "snapkv(decode=evict)",
        "window|top_k(k=8)",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("g", [1, 4])
def test_bytes_are_kept_and_used(head: str, dtype: torch.dtype, g: int) -> None:
    layers, total = 3, 8 << 20
    spec = Spec(4, 32, 32, dtype=dtype)
    method = resolve(parse(f"{head}@8MiB"), spec, layers=layers, g=g)
    assert 0.95 * total < layers * measured(method, spec, g) <= total


@pytest.mark.parametrize("head", ["subgen_sketch", "subgen_sketch(t=2,block=64)"])
def test_bytes_bound_a_sketch_too(head: str) -> None:
    spec = Spec(4, 32, 16)
    method = resolve(parse(f"{head}@4MiB"), spec)
    assert 0.95 * (4 << 20) < measured(method, spec, 1) <= 4 << 20


def test_one_token_more_would_not_fit() -> None:
    spec = Spec(1, 16, 16)
    method = resolve(parse("window@256KiB"), spec)
    more = method.with_budget(method.budget + 1)  # type: ignore[attr-defined]
    assert more is not None and measured(more, spec, 1) > 256 << 10


def test_values_of_another_width_are_counted() -> None:
    narrow = resolve(parse("window@1MiB"), Spec(1, 16, 16)).budget  # type: ignore[attr-defined]
    wide = resolve(parse("window@1MiB"), Spec(1, 16, 240)).budget  # type: ignore[attr-defined]
    assert wide < narrow / 5


@pytest.mark.parametrize(("share", "length", "tokens"), [("25%", 1000, 250), ("12.5%", 100, 12), ("0.1%", 10, 1)])
def test_a_share_is_taken_of_the_length(share: str, length: int, tokens: int) -> None:
    assert str(resolve(parse(f"window@{share}"), Spec(1, 4, 4), length=length)) == f"window@{tokens}"


@pytest.mark.parametrize("text", ["window@512", "window@5:6", "exact", "quant", "window"])
def test_what_is_resolved_or_has_no_budget_stays_as_it_is(text: str) -> None:
    method = parse(text)
    assert resolve(method, Spec(2, 4, 4)) is method


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("window@25%", {}, "share of the context, whose length is not known here: give tokens"),
        ("window@100B", {}, "window@100B needs .* for its smallest budget of 1 tokens: raise the budget"),
        ("h2o(recent=500)@64KiB", {}, r"h2o\(recent=500\)@64KiB needs .* budget of 505 tokens"),
        ("sinks(4)@1%", {"length": 100}, "a budget of 1 tokens is too small for sinks.* needs at least 5"),
        ("window@1MiB", {"layers": 0}, "layers must be a whole number >= 1"),
        ("window@5%", {"length": -3}, "length must be a whole number >= 1"),
        ("window@1MiB", {"g": 0}, "g must be a whole number >= 1"),
    ],
)
def test_a_refusal_names_the_method_and_the_remedy(text: str, arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve(parse(text), Spec(2, 16, 16), **arguments)


@pytest.mark.parametrize("text", ["exact@1MiB", "quant@512", "exact|top_k@25%"])
def test_what_no_budget_bounds_refuses_one_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text[:5]}.*keeps every token.*leave the budget out"):
        parse(text)


@pytest.mark.parametrize("budget", ["lots", "150%", "0%"])
def test_a_budget_given_in_python_is_checked_as_text_is(budget: str) -> None:
    from kvfloor import Bounded
    from kvfloor.methods.policies.window import Window

    with pytest.raises(ValueError):
        resolve(Bounded(Window(), budget=budget), Spec(1, 4, 4), length=100)


def test_bytes_buy_more_tokens_where_values_are_the_keys() -> None:
    spec = Spec(2, 64, 64)
    apart, tied = (resolve(parse("window@64KiB"), each) for each in (spec, replace(spec, tied=True)))
    assert tied.open(replace(spec, tied=True)).nbytes <= 64 * 1024
    assert tied.budget > 1.8 * apart.budget  # type: ignore[attr-defined]
