"""Slots of few bits: new and first tokens are kept as given, all others are coded once and for good."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import CorruptState, Spec
from kvfloor.core import message
from kvfloor.methods.stores import coded as coded_module
from kvfloor.methods.stores.coded import Coded, CodedSlots, CodedView
from kvfloor.methods.stores.codes import TokenCodes
from kvfloor.methods.stores.levels import error
from kvfloor.methods.stores.packing import size
from tests.corruption import require_every_flip_is_noticed
from tests.support import Draw, Stream, attention, between, fed, opened, positions, seeded, stream

ROWS, G, D, DV = 3, 2, 12, 10
PLAIN = (
    "exact:k4v4",
    "exact:k3v2(first=0)",
    "exact:k4v2(recent=16)",
    "exact:k2v3(first=0,recent=41)",
    "h2o(block=8):k4v3@24",
    "random(block=1):k2v5@12:20:16",
    "window(block=24):k3v3@40",
    "snapkv(window=4,block=8):k4v4@24",
    "k_center(block=8):k5v6@24",
    "exact:kivi4(group=8,first=2)",
)
"""Methods in which a query reads every held token and nothing else."""
OTHERS = (
    "exact|pages(pages=2,page=5):k4v4",
    "h2o(block=8)|top_k(k=6):k4v4(first=1)@24",
    "sinks(2,block=8)+value_sum:k8v8(first=0)@24",
    "exact|hip(k=8,key_block=2):k2v2",
    "exact|pages(pages=2,page=5):kivi2(group=8)",
)
TIED = ("exact:k4v4", "exact:kivi4", "h2o(block=8):k4v3@24")
Numbers = dict[int, tuple[Tensor, Tensor]]  # a token's position -> its key and value


def numbers(state: Any) -> list[Numbers]:
    """Return what every row holds, as its slots give it."""
    slots, found = state.slots, []
    for offset, held in zip(slots.offset.tolist(), slots.held.tolist(), strict=True):
        place = torch.arange(offset, offset + held)
        k, v = slots.keys(place), slots.values(place)
        found.append({at: (k[i], v[i]) for i, at in enumerate(slots.arrived(place).tolist())})
    return found


def uncoded(slots: CodedSlots, position: int, seen: int) -> bool:
    return position < slots.first or position >= seen - seen % slots.group - slots.recent


@dataclass
class Watch:
    """Compare what a state holds with its stream, and with what it held before.

    rows  index in the stream of each of the state's rows, in order
    """

    k: Tensor
    v: Tensor
    rows: list[int]
    known: dict[int, Numbers] = field(default_factory=dict)

    def look(self, state: Any) -> None:
        dtype = state.spec.compute_dtype
        for held, row, seen in zip(numbers(state), self.rows, state.seen.tolist(), strict=True):
            known = self.known.setdefault(row, {})
            for at, now in held.items():
                given = self.k[row, at].to(dtype), self.v[row, at].to(dtype)
                wanted = given if uncoded(state.slots, at, seen) else known.setdefault(at, now)
                assert all(map(torch.equal, now, wanted)), (row, at, seen)
                if not uncoded(state.slots, at, seen):
                    assert not torch.equal(now[0], given[0]), (row, at, seen)
        self.look_at_message(state)

    def look_at_message(self, state: Any) -> None:
        """Require that the uncoded tokens that are sent are those held and no others, and all else is zero."""
        slots = state.slots
        wanted_k = torch.zeros_like(slots.fresh_k)
        wanted_v = torch.zeros_like(slots.fresh_v)
        for i, (held, seen) in enumerate(zip(positions(state), state.seen.tolist(), strict=True)):
            for at in held:
                if uncoded(slots, at, seen):
                    index = at if at < slots.first else slots.first + at % (slots.group + slots.recent)
                    wanted_k[i, index], wanted_v[i, index] = self.k[self.rows[i], at], self.v[self.rows[i], at]
        sent = slots.export()
        assert torch.equal(sent["fresh_k"], wanted_k)
        assert state.spec.tied or torch.equal(sent["fresh_v"], wanted_v)

    def select(self, state: Any, index: list[int]) -> None:
        state.select_rows(torch.tensor(index))
        self.rows = [self.rows[i] for i in index]

    def forget(self, state: Any, which: Callable[[list[int]], list[int]]) -> None:
        """Let the state forget the held tokens of every row that `which` names."""
        named = [(row, at) for row, held in enumerate(positions(state)) for at in which(held)]
        row, position = (torch.tensor(x) for x in zip(*named, strict=True))
        state.forget(row, position)
        held = positions(state)
        assert not any(at in held[r] for r, at in named)


def tokens(draw: Draw, text: str, n: int, tied: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Any, Stream]:
    dv = D if tied else DV
    state = opened(text, ROWS, D, dv, scale=0.4, dtype=dtype, tied=tied)
    q, k, v = stream(draw, ROWS, G, n, D, dv, dtype=dtype)
    return state, (q, k, k if tied else v)


def run(state: Any, whole: Stream, watch: Watch) -> Any:
    """Step through 190 tokens with every call that moves tokens in between; look after each."""
    movable = "exact|" not in str(state.method) and "+" not in str(state.method)
    budgets = str(state.method).partition("@")[2].count(":") > 0
    at = 0

    def go(*sizes: int) -> None:
        nonlocal at
        for n in sizes:
            q, k, v = (x[watch.rows] for x in between(whole, at, at + n))
            state.step(q, k, k if state.spec.tied else v)
            at += n
            watch.look(state)

    go(1, 2, 20, 9, 1, 7)
    if movable:
        watch.forget(state, lambda held: [held[0], held[-1]])
        watch.look(state)
    go(3, 50, 1, 1)
    state.seal()
    watch.look(state)
    state = state.method.from_bytes(state.to_bytes())
    watch.look(state)
    go(7)
    if movable:
        watch.forget(state, lambda held: held[2:5] + held[-3:-1])
        watch.look(state)
    watch.select(state, [2, 0, 1])
    watch.look(state)
    go(1, 30)
    state = copy.deepcopy(state) if budgets else state.method.from_bytes(state.to_bytes())
    watch.look(state)
    if not budgets:
        watch.select(state, [1, 1, 2])
    go(4, 1, 40, 12)
    before = state.to_bytes()
    twin = state.clone()
    go(1)
    assert twin.to_bytes() == before
    return twin


@pytest.mark.parametrize("text", PLAIN + OTHERS)
def test_a_tokens_numbers_change_once_when_its_group_is_coded(draw: Draw, text: str) -> None:
    state, whole = tokens(draw, text, 191)
    run(state, whole, Watch(whole[1], whole[2], list(range(ROWS))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", TIED)
def test_it_is_so_for_keys_that_are_values_and_for_narrow_numbers(draw: Draw, text: str, dtype: torch.dtype) -> None:
    for tied in (True, False):
        state, whole = tokens(draw, text, 191, tied, dtype)
        run(state, whole, Watch(whole[1], whole[2], list(range(ROWS))))


def wrong_settle(change: Callable[[CodedSlots], None]) -> Callable[..., None]:
    settle = CodedSlots.settle

    def settled(self: CodedSlots, seen: Tensor, rows: Tensor | None) -> None:
        settle(self, seen, rows)
        change(self)

    return settled


def louder(slots: CodedSlots) -> None:
    assert isinstance(slots.value_codes, TokenCodes)
    slots.value_codes.scale *= 1.01


def tidier(slots: CodedSlots) -> None:
    """Code every held token, the newest ones too, by the levels of now."""
    slots.coded = slots.coded + slots.group


@pytest.mark.parametrize("change", [louder, tidier])
def test_codes_that_change_are_found(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, change: Callable[[CodedSlots], None]
) -> None:
    monkeypatch.setattr(CodedSlots, "settle", wrong_settle(change))
    state, whole = tokens(draw, "h2o(block=8):k4v3@24", 191)
    with pytest.raises(AssertionError):
        run(state, whole, Watch(whole[1], whole[2], list(range(ROWS))))


@pytest.mark.parametrize("text", ["exact:k4v4", "random(block=1):k2v5@12:20:16"])
def test_a_token_that_left_and_is_still_there_is_found(draw: Draw, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(CodedSlots, "evict", coded_module.Slots.evict)
    state, whole = tokens(draw, text, 191)
    with pytest.raises(AssertionError):
        run(state, whole, Watch(whole[1], whole[2], list(range(ROWS))))


@pytest.mark.parametrize("text", ["exact:k4v4", "window(block=1):k4v4(first=0)@8", "h2o(block=4):k4v4@12"])
def test_no_byte_of_a_forgotten_or_evicted_token_is_sent(draw: Draw, text: str) -> None:
    state, (_, k, v) = tokens(draw, text, 40)
    mark = 1234.5678
    k[:, 1:3], v[:, 1:3], k[:, 33], v[:, 33] = mark, mark, mark, mark
    row, position = torch.arange(ROWS), torch.tensor([[1], [2], [33]])
    sign = torch.tensor(mark, dtype=torch.float64).numpy().tobytes()
    state.append(k[:, :4], v[:, :4])
    assert sign in state.to_bytes()
    for at in position[:2]:
        state.forget(row, at.expand(ROWS))
    assert sign not in state.to_bytes()
    state.append(k[:, 4:35], v[:, 4:35])
    assert sign in state.to_bytes()
    if text == "exact:k4v4":
        state.forget(row, position[2].expand(ROWS))
    else:
        for i in range(5):
            state.append(k[:, 35 + i : 36 + i], v[:, 35 + i : 36 + i])
        state.forget(row, position[2].expand(ROWS))
    assert sign not in state.to_bytes()


def test_a_token_that_left_before_its_group_was_coded_does_not_count(draw: Draw) -> None:
    """Neither in the centre of the keys nor in the ranges of channels."""
    _, k, v = stream(draw, ROWS, G, 64, D)
    k = k + 100
    for text in ("window(block=8):k4v4(first=0)@16", "exact:k4v4(first=0)"):
        state = opened(text, ROWS, D)
        state.append(k[:, :20], v[:, :20])
        if text.startswith("exact"):
            state.forget(torch.arange(ROWS), torch.full((ROWS,), 19))
        state.append(k[:, 20:], v[:, 20:])
        for row, held in enumerate(numbers(state)):
            for at, (key, _) in held.items():
                assert float((key - k[row, at]).abs().max()) < 2, (text, at)


# ---- answers ---------------------------------------------------------------------------------------------------------

# Queries and values are rotated by a matrix product in the compute dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}


def require_attention(state: Any, q: Tensor) -> None:
    """Require that `read` is exact attention over the decoded tokens, in float64."""
    spec, part = state.spec, state.read(q)
    for row, held in enumerate(numbers(state)):
        k, v = (torch.stack([pair[i] for pair in held.values()]) for i in (0, 1))
        mean, log_mass = attention(q[row], k, v, spec.scale, spec.softcap)
        atol = TOLERANCE[spec.dtype]
        if spec.dtype == torch.bfloat16 and all(codes.rounded for codes in state.slots.parts):
            atol = 2**-8  # as `exact`, whose weights are bfloat16 there
        torch.testing.assert_close(part.mean[row].double(), mean, rtol=0, atol=atol * float(v.abs().max()))
        torch.testing.assert_close(part.log_mass[row].double(), log_mass, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("text", PLAIN)
def test_answers_are_attention_over_the_decoded_tokens(
    draw: Draw, text: str, softcap: float | None, dtype: torch.dtype
) -> None:
    for tied in (False, True):
        dv = D if tied else DV
        state = opened(text, ROWS, D, dv, scale=0.4, softcap=softcap, dtype=dtype, tied=tied)
        q, k, v = stream(draw, ROWS, G, 75, D, dv, dtype=dtype)
        v = k if tied else v
        for at in (slice(0, 3), slice(3, 40), slice(40, 75)):
            state.append(k[:, at], k[:, at] if tied else v[:, at])
            require_attention(state, q[:, 0, at][:, :4])


@pytest.mark.parametrize("text", ["exact:k4v4", "h2o(block=8):k4v3@24"])
def test_a_rotation_the_wrong_way_round_is_found(draw: Draw, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = coded_module.matrix
    monkeypatch.setattr(coded_module, "matrix", lambda *of: right(*of).T)
    state, (q, k, v) = tokens(draw, text, 75)
    state.append(k, v)
    with pytest.raises(AssertionError):
        require_attention(state, q[:, 0, :4])


@pytest.mark.parametrize("text", PLAIN)
def test_a_tokens_answer_is_attention_over_what_was_held_and_itself(draw: Draw, text: str) -> None:
    state, (q, k, v) = tokens(draw, text, 70)
    for i in range(70):
        near = i % 32 < 4 or i % 32 > 29  # the groups' ends
        held, at = numbers(state) if near else [], slice(i, i + 1)
        out = state.step(q[:, :, at], k[:, at], v[:, at])
        for row in range(len(held)):
            keys = torch.stack([pair[0] for pair in held[row].values()] + [k[row, i]])
            values = torch.stack([pair[1] for pair in held[row].values()] + [v[row, i]])
            wanted = attention(q[row, :, i], keys, values, state.spec.scale)[0]
            torch.testing.assert_close(out[row, :, 0], wanted, rtol=0, atol=1e-11)


def sent(state: Any) -> bytes:
    """Return the state's message but for the capacities, which in `exact` depend on the calls as those of plain slots.

    They grow by a quarter, or to the tokens that a call brings.
    """

    def without_capacity(fields: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in fields.items() if name != "capacity"}
        return {name: without_capacity(x) if isinstance(x, dict) else x for name, x in kept.items()}

    header, fields = message.unpack(state.to_bytes())
    return message.pack(header, without_capacity(fields))


@pytest.mark.parametrize("text", PLAIN + OTHERS)
def test_neither_chunks_nor_padding_change_a_byte(draw: Draw, text: str) -> None:
    """The answers agree up to rounding, the states bit for bit."""
    n = 80
    one, whole = tokens(draw, text, n)
    wanted = fed(one, whole)
    for cuts in (range(1, n), (5, 6, 40, 41, 70), (31, 64, 65)):
        other = opened(text, ROWS, D, DV, scale=0.4)
        torch.testing.assert_close(fed(other, whole, *cuts), wanted, rtol=0, atol=1e-10)
        assert sent(other) == sent(one)
    padded = opened(text, ROWS, D, DV, scale=0.4)
    present = torch.zeros(ROWS, n + 40, dtype=torch.bool)
    for row in range(ROWS):
        present[row, torch.randperm(n + 40, generator=torch.Generator().manual_seed(row))[:n]] = True
    q, k, v = (torch.full((*x.shape[:-2], n + 40, x.shape[-1]), torch.nan, dtype=x.dtype) for x in whole)
    for row in range(ROWS):
        q[row, :, present[row]], k[row, present[row]], v[row, present[row]] = (x[row] for x in whole)
    out = fed(padded, (q, k, v), 13, 60, 61, present=present)
    answers = torch.stack([out[row, :, present[row]] for row in range(ROWS)])
    torch.testing.assert_close(answers, wanted, rtol=0, atol=1e-10)
    assert sent(padded) == sent(one)


def test_codes_that_depend_on_the_calls_are_found(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    push = CodedSlots.push

    def pushed(self: CodedSlots, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> None:
        push(self, k * (1 + 1e-6 * k.shape[1]), v, *rest, **named)

    monkeypatch.setattr(CodedSlots, "push", pushed)
    with pytest.raises(AssertionError):
        test_neither_chunks_nor_padding_change_a_byte(draw, "exact:k4v4")


@pytest.mark.parametrize("text", PLAIN)
def test_more_bits_answer_better(draw: Draw, text: str) -> None:
    wanted, errors = None, []
    for store in ("full", "k8v8", "k4v4", "k2v2"):
        body, at, budget = text.partition(":")[0], *text.partition("@")[1:]
        state, (q, k, v) = tokens(seeded(3), f"{body}:{store}{at}{budget}", 96)
        state.append(k, v)
        out = state.read(q[:, 0, :8]).mean
        wanted = out if wanted is None else wanted
        errors.append(float((out - wanted).norm() / wanted.norm()))
    if "h2o" not in text and "snapkv" not in text and "k_center" not in text:  # whose choice of tokens reads keys
        assert 0 == errors[0] < errors[1] < 0.02 < errors[2] < 0.3 and errors[2] < errors[3]


# ---- groups, sizes and messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("exact:k4v4", 32),
        ("exact|pages(page=5,pages=2):k4v4", 32),
        ("exact|zeta(k=4,chunk=20):k4v4", 40),
        ("h2o:k4v4@64", 32),
        ("h2o(block=24):k4v4@64", 48),
        ("h2o(block=64):k4v4@64", 64),
        ("h2o(block=1):k4v4@64", 32),
        ("h2o(block=33):k4v4@64", 33),
    ],
)
@pytest.mark.parametrize("first", [0, 4, 40])
def test_a_group_is_whole_blocks_of_32_tokens_or_more(draw: Draw, text: str, group: int, first: int) -> None:
    text = text.replace(":k4v4", f":k4v4(first={first})")
    state, (_, k, v) = tokens(draw, text, 140)
    assert state.slots.group == group and state.slots.group % state.block == 0
    watch = Watch(k, v, list(range(ROWS)))
    for i in (1, group - 1, group, group + 1, 2 * group - 1, 2 * group, 140):
        at = slice(int(state.seen[0]), i)
        state.append(k[:, at], v[:, at])
        watch.look(state)
        assert state.slots.coded.tolist() == [i - i % group] * ROWS


@pytest.mark.parametrize("recent", [1, 16, 32, 50])
@pytest.mark.parametrize(("selector", "group"), [("", 32), ("|zeta(k=4,chunk=20)", 40)])
def test_the_newest_tokens_have_no_codes(draw: Draw, selector: str, group: int, recent: int) -> None:
    state, (_, k, v) = tokens(draw, f"exact{selector}:k4v4(recent={recent})", 140)
    watch = Watch(k, v, list(range(ROWS)))
    for i in sorted({1, group, group + recent, 2 * group - 1, 2 * group, 3 * group + 1, 140}):
        state.append(k[:, int(state.seen[0]) : i], v[:, int(state.seen[0]) : i])
        watch.look(state)
        assert state.slots.coded.tolist() == [max(0, i - i % group - recent)] * ROWS
        assert state.method.from_bytes(state.to_bytes()).to_bytes() == state.to_bytes()
        key, given = state.slots.keys(state.slots.offset + i - min(i, recent)), k[:, i - min(i, recent)]
        assert torch.equal(key, given.to(key.dtype))


def test_rows_of_different_lengths_are_coded_at_their_own_times(draw: Draw) -> None:
    state, (q, k, v) = tokens(draw, "h2o(block=8):k4v4@24", 100)
    lengths = torch.tensor([100, 31, 64])
    present = torch.arange(100) < lengths.unsqueeze(1)
    fed(state, (q, k, v), 30, 33, 70, present=present)
    assert state.slots.coded.tolist() == [96, 0, 64]
    Watch(k, v, list(range(ROWS))).look(state)
    for row, n in enumerate(lengths.tolist()):
        alone = Spec(1, D, DV, scale=0.4, dtype=torch.float64, row_ids=[row])
        single = state.method.open(alone)
        single.step(*between((q[row : row + 1], k[row : row + 1], v[row : row + 1]), 0, n))
        twin = state.clone()
        twin.select_rows(torch.tensor([row]))
        assert twin.to_bytes() == single.to_bytes()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("text", "columns"), [("exact:k4v3", 0), ("exact:k4v3(recent=20)", 0), ("h2o(block=8):k5v2(first=2)@40:24:80", 4)]
)
def test_slots_take_the_stated_bytes(draw: Draw, text: str, columns: int, dtype: torch.dtype, tied: bool) -> None:
    state, (_, k, v) = tokens(draw, text, 150, tied, dtype)
    state.append(k, v)
    slots, dv = state.slots, (0 if tied else DV)
    store: Any = state.method.store
    assert isinstance(store, Coded)
    capacity, lose = int(slots.capacity.sum()), not text.startswith("exact")
    coded = by_token = size(D, store.keys) + (0 if tied else size(dv, store.values) + 2)
    if lose:
        coded += 2
        by_token += 2 + 4 + columns  # a scale, a position
        shared = ROWS * D * dtype.itemsize
    else:
        groups, item = slots.key_codes.low.shape[1], state.spec.compute_dtype.itemsize
        assert groups * slots.group < 150 * 1.3 + slots.group
        shared = ROWS * groups * (2 * D + 4 * item)
    fresh = ROWS * (store.first + slots.group + store.recent) * (D + dv) * dtype.itemsize
    clocks = 4 * ROWS * 8  # held, capacity, offset and coded
    tensors = capacity * by_token + shared + fresh + clocks
    assert tensors <= slots.nbytes <= tensors + 16 * 8  # and a few numbers
    assert slots.token_bytes == pytest.approx(
        coded + (0 if lose else (2 * D + 4 * state.spec.compute_dtype.itemsize) / slots.group)
    )


def test_a_long_stream_takes_little_more_than_its_bits(draw: Draw) -> None:
    """4.5 bits per number and 4 bytes of position, of the 16 bits and 8 bytes of plain slots."""
    k, v = (draw(1, 2048, 64, dtype=torch.bfloat16) for _ in range(2))
    taken = {}
    for text in ("exact", "exact:k4v4", "window@1024", "window:k4v4@1024"):
        state = opened(text, 1, 64, dtype=torch.bfloat16)
        for at in range(0, 2048, 32):
            state.append(k[:, at : at + 32], v[:, at : at + 32])
        taken[text] = state.nbytes
    assert taken["exact:k4v4"] < 0.33 * taken["exact"]
    assert taken["window:k4v4@1024"] < 0.36 * taken["window@1024"]
    assert taken["exact:k4v4"] > 0.26 * taken["exact"]


@pytest.mark.parametrize("text", ["exact:k4v4", "h2o:k4v4@64"])
def test_a_stream_of_more_tokens_than_32_bits_number_is_refused(draw: Draw, text: str) -> None:
    state, (q, k, v) = tokens(draw, text, 9)
    state.append(k[:, :5], v[:, :5])
    state.seen[:] = 2**31 - 3
    before = state.to_bytes()
    for call in (lambda: state.append(k[:, 5:8], v[:, 5:8]), lambda: state.step(q[:, :, 5:8], k[:, 5:8], v[:, 5:8])):
        with pytest.raises(ValueError, match=r"numbers tokens in 32 bits: a stream ends after 2,147,483,647"):
            call()
        assert state.to_bytes() == before
    state.append(k[:, 5:7], v[:, 5:7])
    assert state.seen.tolist() == [2**31 - 1] * ROWS
    assert opened("h2o@64", ROWS, D, DV).slots.longest > 2**60


@pytest.mark.parametrize("text", ["exact:k4v4", "h2o:k4v4@64"])
def test_one_token_more_is_refused_too(draw: Draw, text: str) -> None:
    state, (q, k, v) = tokens(draw, text, 9)
    state.append(k[:, :5], v[:, :5])
    state.seen[:] = 2**31 - 1
    before = state.to_bytes()
    with pytest.raises(ValueError, match="numbers tokens in 32 bits"):
        state.step(q[:, :, 5:6], k[:, 5:6], v[:, 5:6])
    assert state.to_bytes() == before


@pytest.mark.parametrize("text", ["exact:k4v4", "h2o(block=8):k3v2@24"])
def test_a_flipped_bit_of_a_message_is_found(draw: Draw, text: str) -> None:
    state, (_, k, v) = tokens(draw, text, 75)
    state.append(k, v)
    data = state.to_bytes()
    places = random.Random(0).sample(range(len(data)), 60)
    require_every_flip_is_noticed(data, state.method.from_bytes, places)
    assert state.method.from_bytes(data).to_bytes() == data


def entry(*path: str, to: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    """Return a function that replaces a field of a state by a changed copy."""

    def change(fields: dict[str, Any]) -> None:
        *parents, name = path
        for parent in parents:
            fields = fields[parent]
        fields[name] = to(fields[name].clone())

    return change


def written(x: Tensor, value: float) -> Tensor:
    x.view(-1)[-1] = value
    return x


EDITS = {
    "a negative position": entry("slots", "position", to=lambda x: written(x, -1)),
    "a position beyond the stream": entry("slots", "position", to=lambda x: written(x, 75)),
    "a position twice": entry("slots", "position", to=lambda x: written(x, int(x[-2]))),
    "positions of 64 bits": entry("slots", "position", to=lambda x: x.long()),
    "half a group coded": entry("slots", "coded", to=lambda x: x - 1),
    "a group more coded than complete": entry("slots", "coded", to=lambda x: x + 32),
    "a group fewer coded than complete": entry("slots", "coded", to=lambda x: x - 32),
    "a negative number of coded tokens": entry("slots", "coded", to=lambda x: x - 320),
    "an infinite new key": entry("slots", "fresh_k", to=lambda x: written(x, torch.inf)),
    "a new value that is no number": entry("slots", "fresh_v", to=lambda x: written(x, torch.nan)),
    "a new key too few": entry("slots", "fresh_k", to=lambda x: x[:, 1:]),
    "new keys of another dtype": entry("slots", "fresh_k", to=lambda x: x.float()),
    "a code too few": entry("slots", "key_codes", "packed", to=lambda x: x[1:]),
    "a code too many": entry("slots", "value_codes", "packed", to=lambda x: torch.cat([x, x[:1]])),
    "codes of another width": entry("slots", "key_codes", "packed", to=lambda x: x[:, 1:]),
    "a length that is no number": entry("slots", "value_codes", "scale", to=lambda x: written(x, torch.nan)),
    "an infinite length": entry("slots", "value_codes", "scale", to=lambda x: written(x, torch.inf)),
    "lengths of another dtype": entry("slots", "value_codes", "scale", to=lambda x: x.float()),
    "a length too few": entry("slots", "value_codes", "scale", to=lambda x: x[1:]),
}
BY_TOKEN = {
    "a centre that is no number": entry("slots", "key_codes", "centre", to=lambda x: written(x, torch.nan)),
    "a centre too few": entry("slots", "key_codes", "centre", to=lambda x: x[1:]),
}
BY_CHANNEL = {
    "a range that is no number": entry("slots", "key_codes", "range", to=lambda x: written(x, torch.nan)),
    "a row without ranges": entry("slots", "key_codes", "low", to=lambda x: x[1:]),
    "ranges of another number of groups": entry("slots", "key_codes", "low", to=lambda x: x[:, 1:]),
    "no ranges": lambda fields: [
        entry("slots", "key_codes", name, to=lambda x: x[:, :0])(fields) for name in ("low", "high", "range")
    ],
}
CASES = [("h2o(block=8):k3v2@24", what, change) for what, change in (EDITS | BY_TOKEN).items()] + [
    ("exact:k4v4", what, change) for what, change in (EDITS | BY_CHANNEL).items()
]


@pytest.mark.parametrize(("text", "what", "change"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_field_that_cannot_be_is_refused(
    draw: Draw, text: str, what: str, change: Callable[[dict[str, Any]], None]
) -> None:
    state, (_, k, v) = tokens(draw, text, 75)
    state.append(k, v)
    header, fields = message.unpack(state.to_bytes())
    state.method.from_bytes(message.pack(header, fields))
    change(fields)
    with pytest.raises(CorruptState):
        state.method.from_bytes(message.pack(header, fields))


def test_a_view_decodes_what_it_is_asked_for(draw: Draw) -> None:
    state, (_, k, v) = tokens(draw, "h2o(block=8):k4v3@24", 75, dtype=torch.bfloat16)
    state.append(k, v)
    view, slots = state.slots.view(), state.slots
    assert isinstance(view, CodedView) and view.k.dtype == torch.bfloat16 and view.position.dtype == torch.int64
    some = slots.view(torch.tensor([2, 0]), width=7)
    for name in ("k", "v", "position"):
        assert torch.equal(getattr(some, name), getattr(view, name)[[2, 0], :7])
    marked = torch.zeros(ROWS, view.width, dtype=torch.bool)
    marked[1, 3:5] = True
    row, key, value, position = slots.flat(marked)
    assert row.tolist() == [1, 1] and torch.equal(key, view.k[1, 3:5]) and torch.equal(value, view.v[1, 3:5])
    assert torch.equal(position, view.position[1, 3:5]) and key.dtype == torch.bfloat16


def test_values_of_a_long_stream_err_as_their_levels_do(draw: Draw) -> None:
    state = opened("exact:k8v3(first=0)", 1, 64)
    k, v = draw(1, 1024, 64), draw(1, 1024, 64)
    state.append(k, v)
    found = state.slots.values(torch.arange(1024))
    errors = (found - v[0]).square().sum(-1) / v[0].square().sum(-1)
    wanted = error(3, 64)
    assert float(errors.mean()) == pytest.approx(wanted / (1 - wanted), rel=0.05)
