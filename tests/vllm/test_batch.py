"""The plan of a forward: which requests begin, whose prompt is over, and where each one's tokens are."""

from __future__ import annotations

import pytest
import torch

from kvfloor.core.pool import Pool, block_bytes
from kvfloor.core.spec import Spec
from kvfloor.methods.grammar import parse
from kvfloor.vllm.batch import Plan, Planner


def planned(planner: Planner, *rows: tuple[int, int, int, bool]) -> Plan:
    """Plan a forward of requests, each (block, tokens before, tokens now, True if these begin in its prompt)."""
    blocks, before, new, prompting = (torch.tensor(column) for column in zip(*rows, strict=True))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)])
    return planner.plan(starts.int(), (before + new).int(), blocks.int(), prompting)


def test_decodes_and_chunks_of_a_mixed_batch() -> None:
    plan = planned(Planner(), (7, 0, 5, True), (3, 9, 1, False), (4, 0, 1, True), (9, 20, 4, True), (5, 8, 1, True))
    assert plan.begun.tolist() == [7, 4]
    assert plan.over.tolist() == [3]
    assert plan.singles.tolist() == [3, 4, 5]
    assert plan.seen.tolist() == [9, 0, 8]
    assert plan.places.tolist() == [5, 6, 11]
    assert plan.chunks == ((7, 0, 5), (9, 7, 11))
    assert plan.blocks.tolist() == [3, 4, 5, 7, 9]


def test_padding_takes_part_in_nothing() -> None:
    """Padding rows have no tokens, or the block that belongs to no request, and may claim anything else."""
    plan = planned(Planner(), (2, 4, 1, False), (0, 0, 3, True), (6, 0, 0, True), (0, 5, 1, False))
    assert plan.blocks.tolist() == [2] and plan.over.tolist() == [2] and not len(plan.begun) and not plan.chunks


def test_a_prompt_is_over_once_and_again_for_the_next_request_of_the_block() -> None:
    planner = Planner()
    assert planned(planner, (2, 0, 4, True)).over.tolist() == []
    assert planned(planner, (2, 4, 1, False), (8, 0, 2, True)).over.tolist() == [2]
    assert planned(planner, (2, 5, 1, False), (8, 2, 1, False)).over.tolist() == [8]
    assert planned(planner, (2, 6, 1, False), (8, 3, 1, False)).over.tolist() == []
    assert planned(planner, (2, 0, 4, True), (8, 4, 1, False)).over.tolist() == []
    assert planned(planner, (2, 4, 1, False), (8, 5, 1, False)).over.tolist() == [2]


def test_a_recomputed_request_ends_its_prompt_at_the_first_chunk_after_it() -> None:
    """A request with 6 tokens of prompt and 5 generated ones is computed again, in chunks of 4."""
    planner = Planner()
    assert planned(planner, (3, 0, 4, True)).over.tolist() == []
    assert planned(planner, (3, 4, 4, True)).over.tolist() == []  # the chunk goes on past the prompt's end
    assert planned(planner, (3, 8, 3, False)).over.tolist() == [3]
    assert planned(planner, (3, 11, 1, False)).over.tolist() == []


def test_a_forward_says_afterwards_that_a_number_was_not_finite() -> None:
    """On a device no layer waits for its numbers; here the check is put off by hand."""
    method, spec = parse("h2o@24"), Spec(2, 16, 16)
    pool = Pool(method, spec, 2, torch.zeros(8, block_bytes(method, spec, 2), dtype=torch.uint8))
    pool.clear(torch.tensor([5, 3]))
    plan = planned(Planner(), (5, 0, 1, True), (3, 0, 1, True))
    plan.require_finite()  # no layer ran yet
    plan._step = pool.batch(plan.singles, plan.seen, deferred=True)
    assert plan.step_of(pool) is plan._step
    k = torch.zeros(2, 2, 1, 16)
    pool.step(plan.step_of(pool), torch.zeros(2, 2, 2, 1, 16), k, k)
    plan.require_finite()
    pool.clear(torch.tensor([5, 3]))
    plan._step = pool.batch(plan.singles, plan.seen, deferred=True)
    k[1, 1] = torch.nan
    pool.step(plan.step_of(pool), torch.zeros(2, 2, 2, 1, 16), k, k)
    with pytest.raises(ValueError, match=r"blocks \[3\] had NaN"):
        plan.require_finite()
