"""Wherever the exact tokens are kept, answers have the same bits, copies stay apart, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfloor import Spec, parse
from kvfloor.methods.tiered.cold_blocks import Blocks
from kvfloor.methods.tiered.tiered import Tiered
from tests.methods.tiered.lives import PAGE, PLACES, ROWS, D, live, opened_at, tokens
from tests.support import between, causal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.01, 0.0])
@pytest.mark.parametrize("tied", [False, True])
def test_every_place_gives_the_same_bits(tied: bool, epsilon: float, dtype: torch.dtype) -> None:
    given = tokens(dtype=dtype, tied=tied)
    device, *others = (opened_at(place, epsilon, dtype=dtype, tied=tied) for place in ("device", *PLACES))
    wanted = live(device, given)
    for state in others:
        found = live(state, given)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert state.tally == device.tally
        assert state.cold_read_bytes > 0 == device.cold_read_bytes
    if epsilon:
        assert device.tally.tokens > device.tally.queries


@pytest.mark.parametrize("place", PLACES)
def test_with_epsilon_zero_it_is_exact_to_the_bit(place: str) -> None:
    q, k, v = tokens()
    exact, state = parse("exact").open(Spec(ROWS, D, D, D**-0.5)), opened_at(place, 0.0)
    for start, stop in ((0, 60), (60, 61), (61, 62), (62, 100), (100, 101)):
        piece = between((q, k, v), start, stop)
        assert torch.equal(exact.step(*piece), state.step(*piece))
    assert torch.equal(exact.read(q[:, 0]).mean, state.read(q[:, 0]).mean)


@pytest.mark.parametrize("place", PLACES)
def test_answers_are_within_epsilon_of_the_truth(place: str) -> None:
    q, k, v = tokens()
    out = opened_at(place).step(q, k, v)
    largest = v.norm(dim=-1).cummax(1).values.unsqueeze(1)
    error = (out - causal(q, k, v, D**-0.5)).norm(dim=-1) / largest
    assert 0 < float(error.max()) <= 0.01


@pytest.mark.parametrize("place", PLACES)
def test_a_saved_state_goes_on_to_the_bit_in_blocks_of_its_own(place: str) -> None:
    given, state = tokens(), opened_at(place)
    q, k, v = given
    live(state, given)
    again = state.method.from_bytes(state.to_bytes())
    assert again.to_bytes() == state.to_bytes() and again.slots.cold is not state.slots.cold
    assert torch.equal(again.step(q, k, v), state.step(q, k, v))
    assert again.to_bytes() == state.to_bytes()


@pytest.mark.parametrize("place", PLACES)
def test_copies_share_what_they_have_and_append_apart(place: str) -> None:
    state, other = opened_at(place), opened_at("device")
    first, mine, theirs = (tokens(seed) for seed in range(3))
    state.append(*first[1:])
    other.append(*first[1:])
    for twin in (state.clone(), copy.deepcopy(state)):
        assert twin.slots.cold is state.slots.cold
        alone = other.clone()
        assert torch.equal(twin.step(*theirs), alone.step(*theirs))
    assert torch.equal(state.step(*mine), other.step(*mine))
    with pytest.raises(TypeError, match="to_bytes"):
        pickle.dumps(state)


@pytest.mark.parametrize("place", PLACES)
def test_copies_append_at_the_same_time(place: str) -> None:
    first, *streams = (tokens(seed) for seed in range(4))
    state, plain = opened_at(place), opened_at("device")
    state.append(*first[1:])
    plain.append(*first[1:])
    found: dict[int, Any] = {}

    def go(i: int, twin: Any) -> None:
        q, k, v = streams[i]
        found[i] = [twin.step(q[:, :, j : j + 5], k[:, j : j + 5], v[:, j : j + 5]) for j in range(0, 60, 5)]

    threads = [threading.Thread(target=go, args=(i, state.clone())) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        twin, (q, k, v) = plain.clone(), streams[i]
        for j, out in zip(range(0, 60, 5), found[i], strict=True):
            assert torch.equal(out, twin.step(q[:, :, j : j + 5], k[:, j : j + 5], v[:, j : j + 5]))


@pytest.mark.parametrize("place", PLACES)
def test_what_is_in_memory_does_not_grow_with_the_exact_tokens(place: str) -> None:
    _, k, v = tokens()
    states = {where: opened_at(where, 0.0) for where in ("device", place)}
    for _ in range(10):
        for state in states.values():
            state.append(k, v)
    state, n = states[place], 10 * k.shape[1]
    token_bytes = 2 * D * 4
    assert state.nbytes < ROWS * (PAGE * token_bytes + 2 * n * 8 // PAGE) + 400
    assert state.nbytes < states["device"].nbytes / 20
    assert state.cold_nbytes >= ROWS * (n - PAGE) * token_bytes
    assert states["device"].cold_nbytes == 0


@pytest.mark.parametrize("place", PLACES)
def test_blocks_that_no_row_needs_do_not_pile_up(place: str) -> None:
    q, k, v = tokens()
    state = opened_at(place, 0.0)
    state.append(k, v)
    for _ in range(30):
        twin = state.clone()
        twin.append(k, v)
        state.append(k[:, :PAGE], v[:, :PAGE])
        state.select_rows(torch.tensor([1, 1, 2]))
    pages = int((state.seen // PAGE).sum())
    assert state.slots.cold.count <= 2 * pages + 2 * ROWS * k.shape[1] // PAGE
    state.select_rows(torch.tensor([2]))
    assert state.slots.cold.count <= 2 * pages // ROWS
    plain = parse("exact").open(Spec(1, D, D, D**-0.5))
    plain.append(k[2:], v[2:])
    for _ in range(30):
        plain.append(k[2:, :PAGE], v[2:, :PAGE])
    assert torch.equal(state.read(q[2:, 0]).mean, plain.read(q[2:, 0]).mean)


def test_a_fetch_is_one_read_of_ascending_tokens_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tokens()
    state = opened_at("disk")
    state.append(k, v)
    reads, offsets = [], []
    real, system = Blocks.read, os.preadv
    monkeypatch.setattr(Blocks, "read", lambda self, token: reads.append(token) or real(self, token))
    monkeypatch.setattr(os, "preadv", lambda f, to, at: offsets.append((at, len(to[0]))) or system(f, to, at))
    state.read_certified(q[:, :, -1:].contiguous(), 1e-3)
    rounds = (int(state.tally.tokens / ROWS / 8)).bit_length() + 2
    assert 1 <= len(reads) <= rounds
    assert all(bool((token.diff() > 0).all()) for token in reads)
    starts = [at for at, _ in offsets]
    assert len(offsets) < sum(map(len, reads))  # neighbours come in one read
    assert sum(a > b for a, b in pairwise(starts)) < len(reads)  # sorted within each


def test_the_file_has_no_name_and_is_closed_with_the_state(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.disable()  # nothing here waits for it
    try:
        before, (_, k, v) = open_files(), tokens()
        state = opened_at("disk", folder=tmp_path)
        state.append(k, v)
        assert list(tmp_path.iterdir()) == [] and open_files() == before + 1
        mode = os.fstat(state.slots.cold._file).st_mode & 0o777
        twin = state.clone()
        del state
        assert mode == 0o600 and open_files() == before + 1
        del twin
        assert open_files() == before
    finally:
        gc.enable()


def test_a_name_that_cannot_be_removed_at_once_is_removed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any) -> None:
        raise PermissionError("this file system keeps names of open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        state = opened_at("disk", folder=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".cold"]
    del state
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_part_of_the_method(tmp_path: Path) -> None:
    text = f"tiered(epsilon=0.05,cold=disk,folder={str(tmp_path)!r})"
    method = parse(text)
    assert isinstance(method, Tiered) and method.folder == str(tmp_path)
    assert str(method) == "tiered(epsilon=0.05,cold=disk)" and parse(str(method)) == method
    assert str(method.with_error(0.01)) == "tiered(epsilon=0.01,cold=disk)"
    state: Any = method.open(Spec(1, 4, 4))
    again: Any = method.from_bytes(state.to_bytes())
    assert state.slots.cold.folder == again.slots.cold.folder == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tiered(cold=tape)", "cold must be one of device, ram, disk, got 'tape'"),
        ("tiered(planes=True,keys=6)", "planes=True goes with keys=8, values=8 and delta=0, got keys=6"),
        ("tiered(planes=True,delta=0.01)", "got keys=8, values=8, delta=0.01"),
        ("tiered(folder='/tmp')", "with cold=disk alone"),
        ("tiered(cold=ram,folder='/tmp')", "with cold=disk alone"),
        ("tiered(cold=disk,folder='')", "names a folder as text"),
        ("tiered(cold=disk,folder=3)", "names a folder as text"),
    ],
)
def test_impossible_places_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text)


@pytest.mark.parametrize("place", PLACES)
def test_no_block_of_fixed_size_holds_it(place: str) -> None:
    with pytest.raises(ValueError, match="outside of its memory"):
        opened_at(place).reserve(2, 100)
