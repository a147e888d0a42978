"""A state under `compact`: exact until a span is compacted, then attention over what is kept, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Partial, Spec, parse
from kvfloor.check.breaking import broken
from kvfloor.core.message import CorruptState
from kvfloor.core.rotation import Rotation
from kvfloor.methods.compaction.compact import Compact, CompactState
from kvfloor.methods.compaction.weighted import LOG_WEIGHT

ROWS, G, D, N = 3, 2, 8, 240
SPEC = Spec(ROWS, D, D, scale=D**-0.5, dtype=torch.float64)


def drawn(n: int = N, seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, G, n, D, generator=source, dtype=torch.float64)
    k, v = (torch.randn(rows, n, D, generator=source, dtype=torch.float64) for _ in range(2))
    return 2 * q, k, v


PRESENT = torch.ones(ROWS, N, dtype=torch.bool)
PRESENT[1, :100] = False  # left padding: 140 tokens
PRESENT[2, ::3] = False  # 160 tokens, with gaps
SEEN = PRESENT.sum(1).tolist()


def filled(spec: Spec = SPEC, present: Tensor | None = PRESENT, method: str = "compact") -> CompactState:
    state = parse(method).open(spec)
    q, k, v = (x.to(spec.dtype) for x in drawn())
    state.step(q, k, v, present)
    return state  # type: ignore[return-value]


def probes(m: int = 6) -> Tensor:
    return torch.randn(ROWS, m, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def literal(state: CompactState, q: Tensor) -> Partial:
    """Return attention over the slots row by row, each token's logit raised by its log-weight."""
    means, masses = [], []
    for row in range(state.spec.rows):
        here = slice(int(state.slots.offset[row]), int(state.slots.offset[row] + state.slots.held[row]))
        weight = getattr(state.slots.columns, LOG_WEIGHT)[here]
        logits = state.spec.scale * q[row].double() @ state.slots.k[here].double().T + weight.double()
        means.append(logits.softmax(-1) @ state.slots.v[here].double())
        masses.append(logits.logsumexp(-1))
    return Partial(torch.stack(means), torch.stack(masses))


def require_reads(state: CompactState) -> None:
    """Require every way of reading to add the log-weights: read, attend, a step of several tokens, and of one."""
    q, k, v = drawn(4, seed=5)
    asked = probes()
    truth = literal(state, asked)
    part = state.read(asked)
    assert torch.allclose(part.mean, truth.mean) and torch.allclose(part.log_mass, truth.log_mass)
    for n in (1, 4):
        copy = state.clone()
        last = copy.step(q[:, :, :n], k[:, :n], v[:, :n])[:, :, -1]
        assert torch.allclose(last, literal(copy, q[:, :, n - 1]).mean)
        copy = state.clone()
        mass = copy.step_partial(q[:, :, :n], k[:, :n], v[:, :n]).log_mass[:, :, -1]
        assert torch.allclose(mass, literal(copy, q[:, :, n - 1]).log_mass)
    copy = state.clone()
    for i in range(4):  # the first one makes room for the others, which rows of one length answer without masks
        at = slice(i, i + 1)
        last = copy.step(q[:, :, at], k[:, at], v[:, at])[:, :, 0]
        assert torch.allclose(last, literal(copy, q[:, :, i]).mean)


@pytest.mark.parametrize("present", [None, PRESENT])
def test_every_way_of_reading_adds_the_log_weights(present: Tensor | None) -> None:
    state = filled(present=present)
    require_reads(state)
    state.compact(to=0.2)
    assert bool(getattr(state.slots.columns, LOG_WEIGHT).any())
    require_reads(state)


def test_a_read_without_the_log_weights_is_found() -> None:
    state = filled()
    state.compact(to=0.2)
    state.slots.weighted = False
    with pytest.raises(AssertionError):
        require_reads(state)


@pytest.mark.parametrize(("span", "start", "stop"), [(None, 0, N), ((0, 50), 0, 50), (slice(120, None), 120, N)])
@pytest.mark.parametrize("to", [0.05, 0.3])
def test_each_row_keeps_its_share_of_the_span_and_all_other_tokens(span: Any, start: int, stop: int, to: float) -> None:
    state = filled()
    before = {(r, p): (k, v) for r, p, k, v in tokens(state)}
    state.compact(span, to)
    for row, seen in enumerate(SEEN):
        length = max(0, min(stop, seen) - start)
        assert int(state.held[row]) == seen - length + math.ceil(to * length)
    assert state.seen.tolist() == SEEN
    for row, position, k, v in tokens(state):
        was_k, was_v = before[row, position]
        assert torch.equal(k, was_k)  # keys stay as they came
        assert torch.equal(v, was_v) == (not start <= position < stop)


def test_a_row_that_has_too_few_tokens_in_the_span_keeps_them_as_they_are() -> None:
    state = filled()
    before = sorted_tokens(state, 1)
    state.compact((139, N), to=0.5)  # row 1 has one token there
    assert state.held.tolist() == [139 + 51, 140, 139 + 11]
    assert all(torch.equal(a, b) for a, b in zip(sorted_tokens(state, 1), before, strict=True))
    state.forget(torch.tensor([1]), torch.tensor([139]))
    assert state.held.tolist() == [139 + 51, 139, 139 + 11]


def tokens(state: CompactState) -> list[tuple[int, int, Tensor, Tensor]]:
    row, k, v, position = state.slots.flat(state._inside(0, N))
    return list(zip(row.tolist(), position.tolist(), k, v, strict=True))


def test_the_memory_of_the_tokens_that_left_and_of_the_sample_is_freed() -> None:
    state = filled(present=None)
    exact = parse("exact").open(SPEC)
    exact.step(*drawn())
    sample = state.references.nbytes
    assert state.nbytes - sample < 1.1 * exact.nbytes
    state.compact(to=0.05)
    assert state.nbytes < 0.12 * exact.nbytes  # 16 slots at least, and each token's log-weight
    assert state.peak_nbytes < 1.35 * exact.nbytes + sample


def test_a_span_compacted_again_keeps_the_same_share() -> None:
    state = filled()
    state.compact(to=0.2)
    once = [(row, position) for row, position, _, _ in tokens(state)]
    state.compact(to=0.2)  # holds no more than that: nothing to do, although no query came since
    assert [(row, position) for row, position, _, _ in tokens(state)] == once
    q, k, v = drawn(60, seed=3)
    state.step(q, k, v)
    state.compact((0, 100), to=0.1)
    require_reads(state)
    inside = [sum(row == r and p < 100 for r, p, _, _ in tokens(state)) for row in range(ROWS)]
    assert inside == [10, 10, 10]


def test_turns_are_compacted_one_after_the_other() -> None:
    state, before = filled(present=None), filled(present=None)
    state.compact(to=0.1)
    q, k, v = drawn(100, seed=4)
    for one in (state, before):
        one.step(q, k, v)
    state.compact((N, N + 100), to=0.1)
    assert state.held.tolist() == [34] * ROWS and state.compacted.shape[1] == 2
    q, k, v = drawn(20, seed=6)
    state.step(q, k, v)
    state.compact(to=0.1)
    assert state.held.tolist() == [36] * ROWS and state.compacted.tolist() == [[[0, N + 120]]] * ROWS
    require_reads(state)


def test_the_fit_is_nearer_to_exact_than_the_same_tokens_unfitted() -> None:
    state = filled(present=None)
    q = drawn()[0].flatten(1, 2)
    whole = state.read(q)
    state.compact(to=0.2)
    fitted = state.read(q)
    bare = state.clone()
    getattr(bare.slots.columns, LOG_WEIGHT).zero_()
    evicted = bare.read(q)
    assert (fitted.log_mass - whole.log_mass).abs().mean() < 0.4 * (evicted.log_mass - whole.log_mass).abs().mean()
    assert (fitted.mean - whole.mean).norm() < 0.8 * whole.mean.norm()


def test_a_row_alone_is_compacted_as_in_a_batch_and_so_is_a_stream_in_pieces() -> None:
    together = filled()
    together.compact(to=0.1)
    for row in range(ROWS):
        spec = replace(SPEC, rows=1, row_ids=[row])
        alone: Any = Compact().open(spec)
        q, k, v = (x[row : row + 1] for x in drawn())
        for piece in torch.arange(N).split(37):
            at = slice(int(piece[0]), int(piece[-1]) + 1)
            alone.step(q[:, :, at], k[:, at], v[:, at], PRESENT[row : row + 1, at])
        alone.compact(to=0.1)
        mine, theirs = (sorted_tokens(state, r) for state, r in ((alone, 0), (together, row)))
        assert torch.equal(mine[0], theirs[0])
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(mine, theirs, strict=True))


def sorted_tokens(state: CompactState, row: int) -> tuple[Tensor, Tensor, Tensor]:
    here = slice(int(state.slots.offset[row]), int(state.slots.offset[row] + state.slots.held[row]))
    order = state.slots.position[here].argsort()
    weight = getattr(state.slots.columns, LOG_WEIGHT)[here]
    return state.slots.position[here][order], weight[order], state.slots.v[here][order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_a_known_rotation(dtype: torch.dtype) -> None:
    spec = replace(SPEC, dtype=dtype, applied=Rotation((1.0, 0.1, 0.01, 0.001)))
    state = filled(spec)
    state.compact(to=0.1)
    asked = probes().to(dtype)
    part, truth = state.read(asked), literal(state, asked)
    assert torch.allclose(part.mean.double(), truth.mean, atol=0.05)
    assert torch.allclose(part.log_mass.double(), truth.log_mass, atol=0.05)


def test_messages_clones_and_chosen_rows_hold_the_log_weights() -> None:
    state = filled()
    state.compact((0, 120), to=0.1)
    q, k, v = drawn(50, seed=7)
    state.step(q, k, v)
    truth = state.read(probes())
    restored: Any = state.method.from_bytes(state.to_bytes())
    index = torch.tensor([2, 0, 0])
    chosen = state.clone()
    chosen.select_rows(index)
    assert torch.equal(restored.read(probes()).mean, truth.mean)
    assert torch.allclose(chosen.read(probes()[index]).mean, truth.mean[index])
    for one in (restored, state):
        one.compact(to=0.05)
    assert torch.equal(restored.read(probes()).mean, state.read(probes()).mean)
    chosen.compact(to=0.05)
    assert torch.allclose(chosen.read(probes()[index]).mean, state.read(probes()).mean[index])
    assert chosen.held.tolist() == state.held[index].tolist()


def _weight_of_nan(fields: dict[str, Any]) -> None:
    fields["slots"]["columns"][LOG_WEIGHT][0] = torch.nan


def _span_beyond(fields: dict[str, Any]) -> None:
    fields["compacted"][0, 0, 1] = N + 50


def _no_span(fields: dict[str, Any]) -> None:
    fields["compacted"] = fields["compacted"][:, :0]


def _query_to_come(fields: dict[str, Any]) -> None:
    fields["references"]["position"][0, 0] = N + 50


def _fewer_places(fields: dict[str, Any]) -> None:
    for name in ("codes", "scale"):
        fields["references"][name] = fields["references"][name][:, :3]


def _no_scale(fields: dict[str, Any]) -> None:
    fields["references"]["scale"] = None


@pytest.mark.parametrize("spoil", [_weight_of_nan, _span_beyond, _no_span, _query_to_come, _fewer_places, _no_scale])
def test_a_changed_message_is_refused(spoil: Callable[[dict[str, Any]], None]) -> None:
    from kvfloor.core.method import rebuilt

    state = filled()
    state.compact((0, 50), to=0.1)
    state.step(*drawn(9, seed=7))
    sent = state.clone().export()
    rebuilt(state.method, SPEC.as_dict(), sent, "cpu")
    spoil(sent)
    with pytest.raises(CorruptState):
        rebuilt(state.method, SPEC.as_dict(), sent, "cpu")


@pytest.mark.parametrize("to", [0.0, -0.1, 1.1, math.nan, math.inf, "half", None, True])
def test_a_share_out_of_its_domain_is_refused(to: Any) -> None:
    require_refused(lambda state: state.compact(to=to), "to, the share of a span's tokens that stays")


@pytest.mark.parametrize(
    "span", [(5, 5), (9, 3), (-4, 8), slice(0, 9, 2), (1,), (0, 1, 2), 7, "all", (0.0, 4), (True, 4), slice(-3, None)]
)
def test_a_span_that_is_none_is_refused(span: Any) -> None:
    require_refused(lambda state: state.compact(span), "a span to compact is")


@pytest.mark.parametrize("span", [(0, N + 1), (N, None), (N + 5, N + 9), slice(N, None)])
def test_a_span_outside_the_stream_is_refused(span: Any) -> None:
    require_refused(lambda state: state.compact(span), "must lie within the 240 tokens")


def require_refused(call: Callable[[CompactState], None], said: str) -> None:
    state = filled()
    before = state.to_bytes()
    with pytest.raises(ValueError, match=said):
        call(state)
    assert state.to_bytes() == before


def test_without_queries_nothing_can_be_fitted() -> None:
    state: Any = Compact().open(SPEC)
    state.append(*drawn()[1:])
    with pytest.raises(ValueError, match="no queries since"):
        state.compact(to=0.1)
    state.compact(to=1.0)  # nothing leaves, so nothing needs a fit
    assert state.held.tolist() == [N] * ROWS and not state.slots.weighted
    state.step(*drawn(1, seed=8))
    state.compact(to=0.1)
    assert state.held.tolist() == [25] * ROWS


def test_an_empty_state_has_no_span() -> None:
    with pytest.raises(ValueError, match="must lie within the 0 tokens"):
        Compact().open(SPEC).compact()


def test_an_exception_within_leaves_the_state_as_it_was_or_makes_it_refuse() -> None:
    tally = broken(filled(), lambda state: state.compact((0, 150), 0.1), 40)  # type: ignore[attr-defined]
    assert not tally.silent, tally.silent[:1]
    assert tally.refused and tally.as_before


def test_tokens_of_a_compacted_span_cannot_be_forgotten_and_others_can() -> None:
    state = filled(present=None)
    state.compact((0, 100), to=0.1)
    with pytest.raises(ValueError, match="stand for each other"):
        state.forget(torch.tensor([1]), torch.tensor([99]))
    state.forget(torch.tensor([1]), torch.tensor([100]))
    assert state.held.tolist() == [150, 149, 150]
    require_reads(state)


def test_the_guarantee_of_exact_attention_is_withdrawn() -> None:
    state = filled()
    assert state.guarantee() is not None and state.guarantee().holds  # type: ignore[union-attr]
    state.compact(to=0.5)
    stated = state.guarantee()
    assert stated is not None and not stated.holds and "compacted" in stated.why


def test_what_compact_cannot_do_is_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match="its key"):
        Compact().open(replace(SPEC, tied=True))
    with pytest.raises(ValueError, match="grows with its tokens"):
        Compact().open(SPEC).reserve(2, 100)
    with pytest.raises(ValueError, match="queries"):
        parse("compact(queries=0)")
    with pytest.raises(ValueError, match="cannot bound it"):
        parse("compact@512")
    state = filled()
    with pytest.raises(ValueError, match="GQA group"):
        q, k, v = drawn(2)
        state.step(q[:, :1], k, v)
    assert parse("attention_matching(queries=64)") == Compact(64) and str(Compact(64)) == "compact(queries=64)"


def test_the_sample_and_the_log_weights_are_small_beside_the_tokens() -> None:
    n, spec = 4096, Spec(1, 64, 64)
    q, k, v = (torch.randn(1, *size, 64) for size in ((3, n), (n,), (n,)))
    state: Any = Compact().open(spec)
    exact = parse("exact").open(spec)
    for one in (state, exact):
        one.append(k, v)
    state.references.record(q, torch.tensor([0]), torch.tensor([n]))
    assert exact.nbytes < state.nbytes <= 1.025 * exact.nbytes
