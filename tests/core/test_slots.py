"""Slots against a plain list of tokens per row, under random programs of every operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.slots import Slots

D, DV = 3, 2


@dataclass
class Token:
    k: list[float]
    v: list[float]
    position: int
    mark: float = 0.0


class Model:
    """What slots are: for each row a list of tokens, packed to the front."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[Token]] = [[] for _ in range(rows)]

    def evict(self, leaving: list[list[bool]]) -> None:
        for tokens, flags in zip(self.rows, leaving, strict=True):
            kept = len(tokens) - sum(flags)
            movers = [token for i, token in enumerate(tokens) if i >= kept and not flags[i]]
            front = [None if flags[i] else tokens[i] for i in range(kept)]
            tokens[:] = [token or movers.pop(0) for token in front]


def tokens_of(slots: Slots) -> list[list[Token]]:
    """What the slots hold, read through `view` and `column`."""
    view = slots.view()
    mark = slots.column("mark", None, view.k.shape[1])
    found = []
    for row in range(slots.spec.rows):
        live = range(int(slots.held[row]))
        if view.live is not None:
            assert view.live[row].tolist() == [i in live for i in range(view.k.shape[1])]
        found.append(
            [
                Token(view.k[row, i].tolist(), view.v[row, i].tolist(), int(view.position[row, i]), float(mark[row, i]))
                for i in live
            ]
        )
    return found


def opened(capacities: list[int], dtype: torch.dtype = torch.float32) -> Slots:
    return Slots(Spec(len(capacities), D, DV, dtype=dtype), capacities, {"mark": torch.float32})


def push(slots: Slots, model: Model, take: list[int], numbers: st.DataObject | torch.Generator) -> None:
    generator = numbers if isinstance(numbers, torch.Generator) else torch.Generator().manual_seed(0)
    rows, a = len(take), max(take)
    k, v = torch.randn(rows, a, D, generator=generator), torch.randn(rows, a, DV, generator=generator)
    position = torch.randint(0, 1000, (rows, a), generator=generator)
    slots.push(k, v, position, torch.tensor(take))
    for row, number in enumerate(take):
        for i in range(number):
            model.rows[row].append(Token(k[row, i].tolist(), v[row, i].tolist(), int(position[row, i])))


@given(st.data())
@settings(max_examples=150)
def test_any_program_leaves_what_a_plain_list_would_hold(data: st.DataObject) -> None:
    capacities = data.draw(
        st.one_of(
            st.lists(st.integers(1, 6), min_size=1, max_size=4),
            st.tuples(st.integers(1, 4), st.integers(1, 6)).map(lambda pair: [pair[1]] * pair[0]),
        )
    )
    slots, model = opened(capacities), Model(len(capacities))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    for _ in range(data.draw(st.integers(1, 12))):
        rows = slots.spec.rows
        verb = data.draw(st.sampled_from(["push", "level push", "evict", "mark", "resize", "select", "travel", "copy"]))
        if verb == "push":
            take = data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows))
            if max(take):
                push(slots, model, take, generator)
        elif verb == "level push":
            push(slots, model, [data.draw(st.integers(1, 5))] * rows, generator)
        elif verb == "evict":
            leaving = [[data.draw(st.booleans()) for _ in tokens] for tokens in model.rows]
            width = int(slots.held.max())
            marked = [flags + [False] * (width - len(flags)) for flags in leaving]
            slots.evict(torch.tensor(marked, dtype=torch.bool).view(rows, width))
            model.evict(leaving)
        elif verb == "mark":
            width = int(slots.held.max()) + data.draw(st.integers(0, 1)) * 0
            values = torch.randn(rows, width, generator=generator)
            slots.put_column("mark", None, values)
            for row, tokens in enumerate(model.rows):
                for i, token in enumerate(tokens):
                    token.mark = float(values[row, i])
        elif verb == "resize":
            slots.resize(slots.held + data.draw(st.integers(0, 3)))
        elif verb == "select":
            index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
            slots.select_rows(torch.tensor(index))
            model.rows = [[Token(**vars(token)) for token in model.rows[i]] for i in index]
        elif verb == "travel":
            fresh = opened([1] * rows)
            fresh.adopt(slots.export())
            slots = fresh
        else:
            slots = slots.copied()
        assert tokens_of(slots) == model.rows
        assert slots.held.tolist() == [len(tokens) for tokens in model.rows]
        assert bool((slots.held <= slots.capacity).all())
        assert slots.k.shape[0] == int(slots.capacity.sum())


@pytest.mark.parametrize("capacities", [[4, 4], [4, 7]])
def test_a_new_token_starts_at_zero_where_an_evicted_one_left_a_number(capacities: list[int]) -> None:
    slots, model = opened(capacities), Model(2)
    generator = torch.Generator().manual_seed(0)
    push(slots, model, [4, 4], generator)
    slots.put_column("mark", None, torch.full((2, 4), 9.0))
    slots.evict(torch.tensor([[False, True, False, True]] * 2))
    push(slots, model, [2, 1], generator)
    assert slots.column("mark", None, 4).tolist()[0] == [9.0, 9.0, 0.0, 0.0]
    assert slots.column("mark", None, 3).tolist()[1] == [9.0, 9.0, 0.0]


def test_growth_is_by_a_quarter_and_keeps_rows_in_step() -> None:
    slots, model = opened([4, 4]), Model(2)
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(33):
        push(slots, model, [1, 0], generator)
        sizes.append(slots.k.shape[0])
    assert sorted(set(sizes)) == [2 * size for size in (4, 5, 7, 9, 12, 15, 19, 24, 30, 38)]
    assert slots.stride == 38


def test_only_the_ragged_rows_that_need_room_grow() -> None:
    slots, model = opened([4, 2]), Model(2)
    push(slots, model, [4, 3], torch.Generator().manual_seed(0))
    assert slots.capacity.tolist() == [4, 3]


def test_ragged_storage_takes_the_bytes_of_its_capacities() -> None:
    ragged, level = opened([3, 100]), opened([100, 100])
    per_token = (D + DV) * 4 + 8 + 4  # key and value, position, mark
    assert ragged.nbytes - level.nbytes == (103 - 200) * per_token


def test_an_evicted_token_is_not_in_what_travels() -> None:
    slots = opened([4])
    slots.push(torch.full((1, 2, D), 5.0), torch.full((1, 2, DV), 7.0), torch.tensor([[0, 1]]), torch.tensor([2]))
    slots.evict(torch.tensor([[True, True]]))
    assert all(value.numel() == 0 for value in slots.export().values() if isinstance(value, Tensor) and value.ndim > 1)
    assert slots.export()["position"].numel() == 0


def test_flat_names_row_key_value_and_position_of_each_marked_slot() -> None:
    slots, model = opened([3, 5]), Model(2)
    push(slots, model, [3, 2], torch.Generator().manual_seed(0))
    row, k, v, position = slots.flat(torch.tensor([[False, True, True], [True, False, False]]))
    assert row.tolist() == [0, 0, 1]
    chosen = [model.rows[0][1], model.rows[0][2], model.rows[1][0]]
    assert k.tolist() == [token.k for token in chosen] and v.tolist() == [token.v for token in chosen]
    assert position.tolist() == [token.position for token in chosen]


def test_a_view_of_level_rows_is_no_copy() -> None:
    slots, model = opened([4, 4]), Model(2)
    push(slots, model, [3, 3], torch.Generator().manual_seed(0))
    assert slots.view().k.untyped_storage().data_ptr() == slots.k.untyped_storage().data_ptr()
    assert slots.view().live is None


def test_pushing_copies_what_the_caller_gave() -> None:
    slots, k = opened([4]), torch.ones(1, 2, D)
    slots.push(k, torch.ones(1, 2, DV), torch.tensor([[0, 1]]), torch.tensor([2]))
    k.zero_()
    assert bool((slots.view().k == 1).all())


def test_a_view_wider_than_a_row_ends_with_the_row() -> None:
    slots = Slots(Spec(2, 1, 1), [2, 2])
    slots.push(torch.ones(2, 2, 1), torch.ones(2, 2, 1), torch.tensor([[0, 1]] * 2), torch.tensor([2, 2]))
    assert slots.view(width=3).k.shape == (2, 2, 1)


# ---- keys that are values as well --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["exact", "h2o(recent=4,block=4)@12", "h2o(recent=2,block=4)@8:12:9"])
def test_tied_keys_are_held_once_and_answer_as_two_copies_would(draw: Callable[..., Tensor], text: str) -> None:
    k, q = draw(3, 40, 8).float(), draw(3, 2, 40, 8).float()
    method = parse(text)
    tied, apart = method.open(Spec(3, 8, 8, tied=True)), method.open(Spec(3, 8, 8))
    present = draw(3, 12) > -0.5
    for state, v in ((tied, k), (apart, k.clone())):
        state.step(q[:, :, :12], k[:, :12], v[:, :12], present)
        state.step(q[:, :, 12:30], k[:, 12:30], v[:, 12:30])
        state.seal()
        state.select_rows(torch.tensor([2, 0, 1]))
        for i in range(30, 34):
            state.step(q[:, :, i : i + 1], k[:, i : i + 1], v[:, i : i + 1])
    restored = method.from_bytes(tied.to_bytes()) if ":" not in text else tied.clone()
    for i in range(34, 40):
        given = (q[:, :, i : i + 1], k[:, i : i + 1])
        out = apart.step(*given, k[:, i : i + 1].clone())
        for state in (tied, restored):
            assert torch.equal(state.step(*given, given[1]), out)
    assert torch.equal(tied.held, apart.held) and torch.equal(restored.held, tied.held)
    assert tied.nbytes < apart.nbytes and tied.peak_nbytes < apart.peak_nbytes
    assert len(tied.to_bytes()) < len(apart.to_bytes())


def test_tied_keys_want_one_tensor_and_one_width(draw: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="dv must be d = 8, got 4"):
        Spec(1, 8, 4, tied=True)
    state, k, q = parse("exact").open(Spec(1, 8, 8, tied=True)), draw(1, 3, 8).float(), draw(1, 1, 3, 8).float()
    state.append(k, k)
    before = state.to_bytes()
    for n in (3, 1):
        with pytest.raises(ValueError, match="one tensor for both"):
            state.step(q[:, :, :n], k[:, :n], k[:, :n].clone())
    with pytest.raises(ValueError, match="one tensor for both"):
        state.append(k, k + 1)
    assert state.to_bytes() == before


@pytest.mark.parametrize(
    "text", ["window(block=4)@12", "h2o(block=4)@24", "random(block=4)+value_sum@12", "raas(block=4)@32"]
)
def test_what_stands_in_empty_slots_is_never_read(text: str) -> None:
    draw, spec = torch.Generator().manual_seed(0), Spec(2, 4, 4, dtype=torch.float64)
    clean, dirty = parse(text).open(spec), parse(text).open(spec)
    present = torch.arange(50) >= torch.tensor([[0], [7]])
    q, k, v = (torch.randn(2, *shape, 4, generator=draw, dtype=torch.float64) for shape in ((1, 50), (50,), (50,)))
    for i in range(50):
        slots, at = dirty.slots, slice(i, i + 1)
        empty = torch.ones_like(slots.position, dtype=torch.bool)
        empty[slots.live()] = False
        slots.position[empty] = int(torch.randint(1 << 40, (1,), generator=draw))
        given = q[:, :, at], k[:, at], v[:, at], present[:, at]
        assert torch.equal(clean.step(*given), dirty.step(*given))
    assert clean.to_bytes() == dirty.to_bytes()


@pytest.mark.parametrize("capacities", [[5, 9], [9, 9]])
def test_rows_in_step_keep_their_tokens_in_stretches_of_any_length(capacities: list[int]) -> None:
    slots, model = opened([6, 6]), Model(2)
    push(slots, model, [4, 4], torch.Generator().manual_seed(0))
    slots.resize(torch.tensor(capacities))
    assert slots.stride == (0 if capacities[0] != capacities[1] else 9)
    assert tokens_of(slots) == model.rows
