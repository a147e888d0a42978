"""Positions within the cache: against loops that turn one key and one query at a time by their ranks."""

from __future__ import annotations

import cmath
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import count, repeat
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.blocked import Blocked
from kvfloor.core.rotation import Rotation
from tests import support
from tests.literal import Rule, Token, kept_by
from tests.support import Draw, between, fed, positions, stream

D, BUDGET, SCALE = 8, 12, 0.5
HALF = Rotation((1.0, 0.31, 0.052, 0.003))
PAIRS = Rotation((0.9, 0.2), start=4, interleaved=True)  # two pairs at the end, the rest is not turned


def turned(x: Tensor, place: int, rotation: Rotation) -> list[float]:
    """One vector at one place, by complex numbers."""
    out, pairs = x.tolist(), len(rotation.frequencies)
    for i, frequency in enumerate(rotation.frequencies):
        a, b = (2 * i, 2 * i + 1) if rotation.interleaved else (i, i + pairs)
        a, b = a + rotation.start, b + rotation.start
        angle = float(np.float32(place) * np.float32(frequency))
        new = complex(out[a], out[b]) * cmath.exp(1j * angle)
        out[a], out[b] = new.real, new.imag
    return out


PROTECTED = {"window": (0, 0), "sinks": (2, 0), "h2o": (2, 3), "tova": (2, 3), "keydiff": (2, 3), "snapkv": (0, 4)}
TEXTS = {
    "window": "window(block={})@12",
    "sinks": "sinks(2,block={})@12",
    "h2o": "h2o(sinks=2,recent=3,block={})@12",
    "tova": "tova(sinks=2,recent=3,block={})@12",
    "keydiff": "keydiff(sinks=2,recent=3,block={})@12",
    "snapkv": "snapkv(window=4,kernel=1,decode=evict,prefill=stream,block={})@12",
}


class Ranked(Rule):
    """A rule whose held tokens and queries are turned to their ranks among what is held."""

    def __init__(self, rule: str, rotation: Rotation) -> None:
        super().__init__(SCALE, *PROTECTED[rule])
        self.rule, self.rotation = rule, rotation
        self.queries: list[tuple[int, Tensor]] = []

    def turned(self, vectors: list[Tensor], places: Iterable[int]) -> Tensor:
        made = [turned(x, place, self.rotation) for x, place in zip(vectors, places, strict=False)]
        return torch.tensor(made, dtype=torch.float64)

    def meeting(self, held: list[Token], q: Tensor) -> tuple[Tensor, Tensor]:
        return self.turned([token.k for token in held], count()), self.turned(list(q), repeat(len(held) - 1))

    def ask(self, held: list[Token], position: int, q: Tensor) -> None:
        self.queries.append((position, q))
        for token, weight in zip(held, self.weights(held, q).mean(0).tolist(), strict=True):
            token.marks["score"] = (token.marks.get("score", 0.0) if self.rule == "h2o" else 0.0) + weight

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        if self.rule in ("window", "sinks"):
            return [float(token.position) for token in held]
        if self.rule == "keydiff":
            keys = self.turned([token.k for token in held], count())
            unit = keys / keys.norm(dim=1, keepdim=True)
            return (-(unit @ unit.sum(0)) / unit.sum(0).norm()).tolist()
        if self.rule == "snapkv":
            votes = torch.zeros(len(held), dtype=torch.float64)
            for position, q in self.queries[-4:]:
                place = [token.position for token in held].index(position)
                votes[: place + 1] += self.weights(held[: place + 1], q).mean(0)
            return votes.tolist()
        return [token.marks["score"] for token in held]


def reference(rule: str, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, block: int) -> tuple[Tensor, list[int]]:
    """One row, token by token: q (g, n, d), k (n, d), v (n, dv) -> answers (g, n, dv), positions kept at the end."""
    answers: list[Tensor] = []
    kept = kept_by(Ranked(rule, rotation), BUDGET, q, k, v, block, answers=answers)
    return torch.stack(answers, 1), kept


def opened(rule: str, rotation: Rotation | None, block: int, rows: int) -> Any:
    return support.opened(TEXTS[rule].format(block), rows, D, 6, scale=SCALE, rotation=rotation)


@pytest.mark.parametrize("rotation", [HALF, PAIRS], ids=["half", "pairs"])
@pytest.mark.parametrize("block", [1, 4, 5])
@pytest.mark.parametrize("rule", list(TEXTS))
def test_answers_equal_the_loops_whatever_the_chunks(draw: Draw, rule: str, block: int, rotation: Rotation) -> None:
    q, k, v = stream(draw, 2, 3, 60, D, 6)
    expected = [reference(rule, q[row], k[row], v[row], rotation, block) for row in range(2)]
    for cuts in ((), (7, 8, 9, 31), range(60)):
        state = opened(rule, rotation, block, 2)
        out = fed(state, (q, k, v), *cuts)
        for row in range(2):
            assert positions(state)[row] == expected[row][1]
            torch.testing.assert_close(out[row], expected[row][0], rtol=0, atol=1e-12)


def test_the_turn_matters(draw: Draw) -> None:
    """Without it, or turned by age, the same stream is answered otherwise: what the test above would see."""
    q, k, v = stream(draw, 2, 3, 60, D, 6)
    age = torch.arange(60)
    circle = HALF.circle(age, torch.float64)
    by_rank = opened("sinks", HALF, 4, 2).step(q, k, v)
    unturned = opened("sinks", None, 4, 2).step(q, k, v)
    by_age = opened("sinks", None, 4, 2).step(HALF.turned(q, circle), HALF.turned(k, circle), v)
    torch.testing.assert_close(by_rank[:, :, :12], by_age[:, :, :12], rtol=0, atol=1e-12)  # nothing has left yet
    for other in (unturned, by_age):
        assert float((by_rank - other)[:, :, 20:].abs().max()) > 0.05


@pytest.mark.parametrize("rule", list(TEXTS))
def test_padded_rows_equal_the_row_alone(draw: Draw, rule: str) -> None:
    q, k, v = stream(draw, 3, 2, 70, D, 6)
    present = torch.ones(3, 70, dtype=torch.bool)
    present[0, :9] = False
    present[1, 20:33] = False
    state = opened(rule, HALF, 4, 3)
    out = fed(state, (q, k, v), 25, present=present)
    for row in range(3):
        real = present[row]
        alone, kept = reference(rule, q[row][:, real], k[row][real], v[row][real], HALF, 4)
        torch.testing.assert_close(out[row][:, real], alone, rtol=0, atol=1e-12)
        assert positions(state)[row] == kept


@pytest.mark.parametrize("rule", ["sinks", "h2o"])
def test_ragged_rows_restored_rows_and_copies_go_on_alike(draw: Draw, rule: str) -> None:
    q, k, v = stream(draw, 2, 2, 60, D, 6)
    method = parse(TEXTS[rule].format(4).replace("@12", "@12:20"))
    spec = Spec(2, D, 6, scale=SCALE, dtype=torch.float64, rotation=PAIRS)
    state = method.open(spec)
    state.step(*between((q, k, v), 0, 37))
    others = [state.clone(), method.from_bytes(state.to_bytes())]
    swapped = state.clone()
    swapped.select_rows(torch.tensor([1, 0]))
    expected, _ = reference(rule, q[0], k[0], v[0], PAIRS, 4)
    rest = between((q, k, v), 37)
    out = state.step(*rest)
    torch.testing.assert_close(out[0], expected[:, 37:], rtol=0, atol=1e-12)
    for other in others:
        assert torch.equal(other.step(*rest), out)
    flipped = swapped.step(*(x.flip(0) for x in rest))
    torch.testing.assert_close(flipped.flip(0), out, rtol=0, atol=1e-12)


def test_a_dense_prompt_is_turned_to_its_ranks_where_it_ends(draw: Draw) -> None:
    q, k, v = stream(draw, 1, 2, 50, D, 6)
    state = parse("sinks(2,block=4,prefill=dense)@12").open(
        Spec(1, D, 6, scale=SCALE, dtype=torch.float64, rotation=HALF)
    )
    state.step(q, k, v)
    state.seal()
    assert positions(state)[0] == [0, 1, *range(40, 50)]
    asked, held = draw(1, 1, D), [0, 1, *range(40, 50)]
    keys = torch.tensor([turned(k[0, at], rank, HALF) for rank, at in enumerate(held)], dtype=torch.float64)
    query = torch.tensor(turned(asked[0, 0], 11, HALF), dtype=torch.float64)  # as of the newest token
    expected = torch.softmax(keys @ query * SCALE, 0) @ v[0, held]
    torch.testing.assert_close(state.read(asked).mean[0, 0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.attend(asked.unsqueeze(1))[0, 0, 0], expected, rtol=0, atol=1e-12)


def test_values_that_are_the_keys_stay_as_they_came(draw: Draw) -> None:
    q, k = draw(1, 2, 40, D), draw(1, 40, D)
    for text in ("exact", "sinks(2,block=4)@12", "sinks(2,block=1)@12"):
        spec = Spec(1, D, D, scale=SCALE, dtype=torch.float64, rotation=PAIRS)
        apart, tied = parse(text).open(spec), parse(text).open(replace(spec, tied=True))
        for a, b in ((0, 17), (17, 18), (18, 40)):
            torch.testing.assert_close(
                tied.step(q[:, :, a:b], k[:, a:b], k[:, a:b]),
                apart.step(q[:, :, a:b], k[:, a:b], k[:, a:b].clone()),
                rtol=0,
                atol=1e-12,
            )


def test_rounding_does_not_build_up(draw: Draw) -> None:
    """A token that lives through thousands of evictions is as exact as a new one, in bfloat16 too."""
    n = 4000
    k, v = draw(1, n, D), draw(1, n, 6)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        state = parse("random(block=1,sinks=2,recent=2)@300").open(Spec(1, D, 6, dtype=dtype, rotation=HALF))
        state.append(k.to(dtype), v.to(dtype))
        assert isinstance(state, Blocked)
        view = state.slots.view()
        order = view.position[0].argsort()
        keys, came = view.k[0, order].double(), k.to(dtype)[0, view.position[0, order]].double()
        expected = torch.tensor([turned(x, rank, HALF) for rank, x in enumerate(came)], dtype=torch.float64)
        assert float((keys - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("rotation", [HALF, PAIRS], ids=["half", "pairs"])
def test_turning_back_undoes_the_turn_however_far(draw: Draw, rotation: Rotation) -> None:
    x, far = draw(5, D), torch.tensor([0, 3, 8191, 2**24 + 7, 10**12])
    circle = rotation.circle(far, torch.float64)
    torch.testing.assert_close(rotation.turned(rotation.turned(x, circle), circle, back=True), x, rtol=0, atol=1e-12)
    by_hand = torch.tensor([turned(x[i], int(far[i]), rotation) for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(rotation.turned(x, circle), by_hand, rtol=0, atol=1e-12)


def test_places_looked_up_equal_those_computed() -> None:
    rotation, place = Rotation((0.7, 0.01)), torch.tensor([[0, 5], [1999, 1024]])
    for dtype in (torch.float32, torch.float64):
        for looked_up, computed in zip(rotation.circle(place, dtype, 2000), rotation.circle(place, dtype), strict=True):
            assert torch.equal(looked_up, computed)


@pytest.mark.parametrize(
    "text",
    [
        "window+less@64", "window+taylor@64", "window+moments@64", "exact|pages", "exact|hip", "exact|zeta",
        "window|pages@64", "quant", "subgen_sketch", "balance", "window_sample",
    ],
)  # fmt: skip
def test_methods_whose_keys_cannot_be_turned_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(parse(text)))} does not hold"):
        parse(text).open(Spec(1, 16, 16, rotation=HALF))


@pytest.mark.parametrize("text", ["window+value_sum@8", "window+value_sample@8", "sinks(2)|top_k(k=4)@12"])
def test_summaries_of_values_and_selectors_without_an_index_are_served(text: str, draw: Draw) -> None:
    state = parse(text).open(Spec(1, D, 6, dtype=torch.float64, rotation=HALF))
    q, k, v = stream(draw, 1, 2, 40, D, 6)
    assert bool(torch.isfinite(state.step(q, k, v)).all())


def test_what_cannot_be_a_rotation_is_refused() -> None:
    for bad in ((), (float("nan"),)):
        with pytest.raises(ValueError, match="frequencies"):
            Rotation(bad)
    with pytest.raises(ValueError, match="start"):
        Rotation((1.0,), start=-1)
    with pytest.raises(ValueError, match="turns entries up to 8 of keys that have d = 6"):
        Spec(1, 6, 6, rotation=HALF)
    with pytest.raises(ValueError, match="must be None or a Rotation"):
        Spec(1, 6, 6, rotation=(1.0,))  # type: ignore[arg-type]


def test_a_spec_with_a_rotation_is_plain_and_back() -> None:
    spec = Spec(2, D, 6, rotation=PAIRS)
    assert Spec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec
    assert "rotation" not in Spec(2, D, 6).as_dict()


def test_more_places_than_the_first_table_has_are_turned_in_one_call_as_in_several(draw: Draw) -> None:
    q, k, v = stream(draw, 1, 1, 1030, D)
    spec = Spec(1, D, D, scale=SCALE, rotation=Rotation((1.0, 0.31, 0.052, 0.0031)), dtype=torch.float64)
    whole = parse("window(block=1030)@2000").open(spec).step(q, k, v)
    cut = parse("window(block=1030)@2000").open(replace(spec, rotation=Rotation((1.0, 0.31, 0.052, 0.0031))))
    torch.testing.assert_close(fed(cut, (q, k, v), 7, 1000), whole, rtol=1e-11, atol=1e-12)


def test_a_spec_tells_the_rotation_that_keys_came_with() -> None:
    spec = Spec(2, D, D, applied=PAIRS)
    assert Spec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec and spec.select(torch.tensor([1])).applied
    with pytest.raises(ValueError, match="give one of them"):
        replace(spec, rotation=HALF)
    with pytest.raises(ValueError, match=re.escape("Spec.applied turns entries up to 8 of keys that have d = 4")):
        Spec(1, 4, 4, applied=PAIRS)
    with pytest.raises(ValueError, match=re.escape("Spec.applied must be None or a Rotation, got 1.0")):
        Spec(1, D, D, applied=1.0)  # pyright: ignore[reportArgumentType]
