"""One method per layer: its text, its parts, its promises, and what cannot be a layer's method."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import Spec, parse, resolve
from kvfloor.methods.mixed.auto import Auto
from kvfloor.methods.mixed.layered import Layered

TEXTS = ("exact", "exact:k5v4", "snapkv:k4v3@25%", "h2o(recent=16)@64", "exact|top_k(k=8)", "h2o@64:128", "quant")


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=12))
def test_the_text_parses_back_and_shortens_runs(texts: list[str]) -> None:
    method = Layered(tuple(map(parse, texts)))
    assert parse(str(method)) == method and [str(method.of_layer(i)) for i in range(len(texts))] == texts
    assert str(method).count("(") <= 1 + sum(text.count("(") for text in texts)
    runs = 1 + sum(a != b for a, b in pairwise(texts))
    assert len([part for part in str(method).split(",") if part]) == runs
    assert method.kinds == tuple(map(parse, dict.fromkeys(texts)))


def test_spaces_and_counts_are_read() -> None:
    assert str(parse(" layers ( 2 * exact:k5v4 , exact:k5v4,snapkv@25% ) ")) == "layers(3*exact:k5v4,snapkv@25%)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layers()", "at least one"),
        ("layers(0*exact)", "N >= 1"),
        ("layers(layers(exact))", "no method of layers"),
        ("layers(auto(rows='x')@1MiB)", "for a whole model"),
        ("layers(h2o@2MiB)", "bytes are for a whole cache"),
        ("layers(exact)@512", "nothing follows layers"),
        ("layers(exact", "nothing follows layers"),
        ("layers(exact):k4v4", "nothing follows layers"),
        ("layers(2*nosuch)", "unknown"),
        ("auto@512", "such as @64MiB"),
        ("auto@25%", "such as @64MiB"),
        ("auto(rows=3)@1MiB", "path of a file"),
        ("auto:k4v4@1MiB", "no slots"),
        ("auto+value_sum@1MiB", "whole method"),
    ],
)
def test_what_is_no_method_of_a_model_is_refused(text: str, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        parse(text)


def test_auto_parses_back() -> None:
    for text in ("auto@64MiB", "auto(rows='a b/c.json')@64MiB", "auto"):
        assert str(parse(text)) == text and isinstance(parse(text), Auto)


def test_layers_promise_what_all_of_them_promise() -> None:
    exact, coded, evicting = (parse(text).traits for text in ("exact", "exact:k5v4", "sinks@64"))
    both = parse("layers(exact,sinks@64)").traits
    assert both.pins and both.turns and not both.constant_memory and evicting.constant_memory and exact.normalised
    lossy = parse("layers(exact,exact:k5v4)").traits
    assert coded.lossy_values and lossy.lossy_values and not lossy.turns and not lossy.normalised
    assert parse("layers(sinks@64,h2o@32)").traits.constant_memory


def test_budgets_are_resolved_layer_by_layer() -> None:
    spec = Spec(2, 8, 8)
    sized = resolve(parse("layers(snapkv@25%,exact,h2o@64)"), spec, layers=3, length=400)
    assert str(sized) == "layers(snapkv@100,exact,h2o@64)"
    assert sized.capacity(1000, prompt=900) is None
    assert parse("layers(sinks@64,sinks@90)").capacity(1000) == parse("sinks@90").capacity(1000)


def test_no_state_is_opened_of_all_layers_together() -> None:
    with pytest.raises(ValueError, match="one method per layer"):
        parse("layers(exact,exact)").open(Spec(1, 4, 4))
    for use in (lambda one: one.open(Spec(1, 4, 4)), lambda one: resolve(one, Spec(1, 4, 4))):
        with pytest.raises(ValueError, match="is chosen for a model"):
            use(parse("auto@1MiB"))
