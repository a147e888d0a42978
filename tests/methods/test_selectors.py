"""What selectors with an index share: what they touch, whom they answer, and what travels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.memory import Memory
from kvfloor.core.slots import Slots
from tests.support import Draw, between, close, fed, filled, stream

SELECTORS = [
    "pages(pages=3,page=4)",
    "hip(k=16,sinks=2,window=6)",
    "zeta(k=6,window=5,curves=2,chunk=8)",
    "best_first(k=6,page=4)",
]


def touched(state: Any, q: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the distinct keys and values that one `read` fetches from the slots."""
    met: dict[str, set[int]] = {"keys": set(), "values": set()}

    def noting(name: str) -> Callable[[Slots, Tensor], Tensor]:
        copied = getattr(Slots, name)

        def noted(self: Slots, place: Tensor) -> Tensor:
            met[name].update(place.flatten().tolist())
            return copied(self, place)

        return noted

    for name in met:
        monkeypatch.setattr(Slots, name, noting(name))
    state.read(q)
    monkeypatch.undo()
    slots = state.slots
    return (len(met["keys"]) * slots.k.shape[1] + len(met["values"]) * slots.v.shape[1]) * slots.k.itemsize


@pytest.mark.parametrize(
    ("selector", "stated"),
    [
        # 249 full pages' boxes and 3 * 4 + 4 tokens: n = 1000 ends a page, which is the newest
        ("pages(pages=3,page=4)", 2 * 249 * 8 * 4 + 16 * 12 * 4),
        # 496 blocks in 8 intervals of 62: 6 rounds of 2 * 16 keys; 16 + 2 + 6 tokens; 8 block numbers
        ("hip(k=16,sinks=2,window=6)", 6 * 32 * 8 * 4 + 24 * 12 * 4 + 8 * 4),
        # 2 curves: 10 steps of a search and 5 slots of 4 bytes; 10 candidates' keys (none waits), 6 values
        ("zeta(k=6,window=5,curves=2,chunk=8)", 2 * (10 + 5) * 4 + 10 * 8 * 4 + 6 * 4 * 4),
    ],
)
def test_bytes_read_are_index_keys_and_values_truly_touched(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, selector: str, stated: int
) -> None:
    rows = 2
    state = filled(
        f"exact|{selector}", draw(rows, 1000, 8, dtype=torch.float32), draw(rows, 1000, 4, dtype=torch.float32)
    )
    state.seal()
    assert state.bytes_read == rows * stated
    one_token = rows * 12 * 4  # a place without a choice fetches slot 0
    fetched = max(touched(state, draw(rows, 1, 8, dtype=torch.float32), monkeypatch) for _ in range(5))
    index = {"pages": 2 * 249 * 8 * 4, "hip": 8 * 4, "zeta": 2 * (10 + 5) * 4}[selector.partition("(")[0]]
    assert 0.4 * rows * (stated - index) <= fetched <= rows * (stated - index) + one_token


def test_sharing_a_choice_saves_its_descents() -> None:
    one, eight = (parse(f"exact|hip(k=16,refresh={r})").open(Spec(1, 8, 8)) for r in (1, 8))
    for state in (one, eight):
        state.append(torch.zeros(1, 500, 8), torch.zeros(1, 500, 8))
        state.seal()
    descent = 8 * 4 * 2 * 16 * 5  # 232 blocks in 8 intervals of 29: 5 rounds
    assert one.bytes_read - eight.bytes_read == descent * 7 // 8


@pytest.mark.parametrize("head", ["exact|{0}", "h2o(sinks=1,recent=4,block=4)|{0}@40"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_step_is_an_append_and_a_read_of_its_own_queries(draw: Draw, head: str, selector: str) -> None:
    """Where no choice is shared (hip: after the seal) the answers of `step` are those of `read` after `append`.

    But at a chunk's end: zeta has merged the chunk by then, and a policy has evicted.
    """
    method = parse(head.format(selector))
    q, k, v = stream(draw, 2, 3, 60, 6)
    stepped, read = (method.open(Spec(2, 6, 6, dtype=torch.float64)) for _ in range(2))
    for state in (stepped, read):
        state.seal()
    out = stepped.step(q, k, v)
    if head.startswith("exact"):
        for i in range(60):
            read.append(k[:, i : i + 1], v[:, i : i + 1])
            if selector.startswith("zeta") and i % 8 == 7:
                continue
            torch.testing.assert_close(out[:, :, i], read.read(q[:, :, i]).mean, rtol=1e-11, atol=1e-12)
    else:
        close(out, fed(read, (q, k, v), *range(60)))
        assert stepped.to_bytes() == read.to_bytes()


@pytest.mark.parametrize("head", ["exact|{0}", "random(block=8)|{0}@24:40:56"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_copy_and_a_restored_state_go_on_to_the_bit(draw: Draw, head: str, selector: str) -> None:
    method = parse(head.format(selector))
    present = torch.arange(75) >= torch.tensor([0, 20, 41]).unsqueeze(1)  # rows of different length
    tokens = stream(draw, 3, 2, 150, 6)
    state = method.open(Spec(3, 6, 6, dtype=torch.float64))
    state.step(*between(tokens, 0, 75), present)
    others = [state.clone(), method.from_bytes(state.to_bytes())]
    state.seal()
    rest = between(tokens, 75)
    out = state.step(*rest)
    for other in others:
        other.seal()
        assert torch.equal(other.step(*rest), out)
        assert other.to_bytes() == state.to_bytes()


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_index_is_counted_and_public_tensors_are_not(draw: Draw, selector: str) -> None:
    spec = Spec(2, 6, 6)
    plain, state = parse("window@64").open(spec), parse(f"window|{selector}@64").open(spec)
    tensors = list(_tensors(state.selection))  # type: ignore[attr-defined]
    scalars = state.nbytes - plain.nbytes - sum(x.untyped_storage().nbytes() for x in tensors)
    assert tensors and 0 <= scalars <= 64


def _tensors(part: Memory) -> Iterator[Tensor]:
    for value in vars(part).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Memory):
            yield from _tensors(value)


def test_a_query_reads_the_bytes_of_every_held_token(draw: Draw) -> None:
    state = filled("exact", draw(2, 9, 4), draw(2, 9, 6))
    assert state.bytes_read == 2 * 9 * (4 + 6) * 8
