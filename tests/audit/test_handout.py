"""Workers keep to their places while they can, and nothing is measured before its exact row is there."""

from __future__ import annotations

import random

from kvfloor.audit.grid import EXACT, Grid, Pair
from kvfloor.audit.handout import Handout
from kvfloor.audit.nats import TextCell
from kvfloor.audit.rows import Cell

GRID = Grid((TextCell("a", 1, 2), TextCell("b", 1, 2), Cell("kv", 3, "after")), (EXACT, "x", "y", "z"))
A, B, KV = GRID.places


def test_a_worker_stays_on_its_place_and_others_take_new_ones() -> None:
    handout = Handout(GRID.pairs, ())
    assert [handout.next(worker) for worker in (1, 2)] == [(A, EXACT), (B, EXACT)]
    assert handout.next(3) == (KV, EXACT)
    assert handout.next(4) is None  # no exact row is there yet
    handout.done((B, EXACT))
    assert handout.next(1) == (B, "x")
    assert handout.next(2) == (B, "y")
    handout.done((A, EXACT))
    assert handout.next(2) == (B, "z")
    assert handout.next(2) == (A, "x")


def test_a_worker_helps_where_most_is_left() -> None:
    handout = Handout([*GRID.pairs[2:4], *GRID.pairs[5:8]], [(A, EXACT), (B, EXACT)])
    assert [handout.next(worker) for worker in (1, 2, 3)] == [(B, "x"), (A, "y"), (B, "y")]


def test_everything_is_handed_out_once_whoever_dies() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        recorded: set[Pair] = {pair for pair in GRID.pairs if rng.random() < 0.2}
        handout = Handout([pair for pair in GRID.pairs if pair not in recorded], recorded)
        busy: dict[int, Pair] = {}
        while len(recorded) < len(GRID.pairs):
            for worker in range(3):
                if worker not in busy and (pair := handout.next(worker)) is not None:
                    assert pair not in recorded and pair not in busy.values()
                    assert pair[1] == EXACT or (pair[0], EXACT) in recorded
                    busy[worker] = pair
            worker = rng.choice(sorted(busy))
            pair = busy.pop(worker)
            if rng.random() < 0.3:
                handout.lost(worker, pair)
            else:
                recorded.add(pair)
                handout.done(pair)
        assert handout.next(0) is None
