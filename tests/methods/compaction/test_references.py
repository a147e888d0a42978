"""The sample of queries against a plain list of all queries, however the stream is cut, and its turning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfloor import Spec
from kvfloor.core.rotation import Rotation
from kvfloor.methods.compaction.references import HORIZON, ReferenceQueries

G, D, MOST = 2, 4, 22  # 11 places: 6 for the newest tokens, 5 spread


def stream(rows: int, n: int) -> Tensor:
    """Return queries (rows, G, n, D) that 8 bits hold exactly: multiples of a power of two, the largest 127 of it."""
    source = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (rows, G, n, D), generator=source)
    codes[..., 0] = 127
    return codes * 2.0 ** torch.randint(-9, 3, (rows, G, n, 1), generator=source)


def expected(n: int, start: int = 0) -> set[int]:
    """Return the positions whose queries are held after n tokens, of which those from `start` on were sampled."""
    stride = 1
    while (n - 1 - start) // stride >= 5:
        stride *= 2
    return set(range(max(start, n - 6), n)) | set(range(start, n, stride))


def held(sample: ReferenceQueries, row: int) -> dict[int, Tensor]:
    """Return {position: queries (g, d)} of a row; twice held tokens must agree."""
    found: dict[int, Tensor] = {}
    for place, position in enumerate(sample.position[row].tolist()):
        if position >= 0:
            assert sample.codes is not None and sample.scale is not None
            q = (sample.codes[row, place].float() - 128) * sample.scale[row, place].unsqueeze(-1)
            assert torch.equal(found.setdefault(position, q), q)
    return found


def require_sample(sample: ReferenceQueries, q: Tensor, counts: list[int], starts: list[int]) -> None:
    for row, (n, start) in enumerate(zip(counts, starts, strict=True)):
        mine = held(sample, row)
        assert set(mine) == expected(n, start)
        assert all(torch.equal(x, q[row, :, position]) for position, x in mine.items())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6), st.booleans())
def test_the_sample_is_that_of_the_whole_stream_however_it_is_cut(cuts: list[tuple[int, int]], singly: bool) -> None:
    q, seen = stream(2, 300), torch.zeros(2, dtype=torch.int64)
    sample = ReferenceQueries(Spec(2, D, D), MOST)
    for cut in cuts:
        take = torch.tensor(cut)
        piece = torch.full((2, G, max(1, int(take.max())), D), torch.nan)  # what follows a row's tokens is padding
        for row in range(2):
            piece[row, :, : cut[row]] = q[row, :, int(seen[row]) : int(seen[row]) + cut[row]]
        sample.record(piece, seen, take)
        seen = seen + take
    if singly and bool((seen == seen[0]).all()):
        for i in range(int(seen[0]), int(seen[0]) + 30):
            sample.record_one(q[:, :, i : i + 1], i)
        seen = seen + 30
    require_sample(sample, q, seen.tolist(), [0, 0])


def test_one_token_at_a_time_gives_the_same_sample_and_a_restart_begins_anew() -> None:
    q, sample = stream(3, 90), ReferenceQueries(Spec(3, D, D), MOST)
    for i in range(70):
        sample.record_one(q[:, :, i : i + 1], i)
        require_sample(sample, q, [i + 1] * 3, [0] * 3)
    sample.restart(torch.full((3,), 70))
    assert sample.codes is None and sample.scale is None and sample.nbytes < 100
    for i in range(70, 90):
        sample.record_one(q[:, :, i : i + 1], i)
    require_sample(sample, q, [90] * 3, [70] * 3)


def test_a_sample_of_every_kept_token_but_the_newest_is_refused_by_the_check() -> None:
    q, sample = stream(1, 90), ReferenceQueries(Spec(1, D, D), MOST)
    sample.record(q, torch.tensor([0]), torch.tensor([90]))
    sample.position[0, 3] = -1
    with pytest.raises(AssertionError):
        require_sample(sample, q, [90], [0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_queries_are_turned_to_positions_that_cover_the_horizon(interleaved: bool) -> None:
    """A query turned to position p gives the logits that the same content would have there, but for its codes."""
    n, rotation = 100, Rotation((1.0, 0.01), interleaved=interleaved)
    spec = Spec(1, D, D, dtype=torch.float64, applied=rotation)
    content = torch.randn(1, 1, n, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    asked = rotation.turned(content, rotation.circle(torch.arange(n), torch.float64))
    sample = ReferenceQueries(spec, 2 * n)
    sample.record(asked, torch.tensor([0]), torch.tensor([n]))
    got = sample.of(0, n)[0]
    ahead = rotation.circle(torch.arange(n, n + HORIZON), torch.float64)
    positions = sample.position[0][sample.position[0] >= 0]
    targets = []
    for query, token in zip(got, positions.tolist(), strict=True):
        errors = (rotation.turned(content[0, 0, token].expand(HORIZON, D), ahead) - query).abs().amax(-1)
        targets.append(int(errors.argmin()))
        assert float(errors.min()) < 0.02
    counts = torch.bincount(torch.tensor(targets), minlength=HORIZON)
    assert len(targets) > HORIZON and int(counts.max()) - int(counts.min()) <= 2, "the horizon is covered evenly"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_codes_are_within_half_a_step_of_the_queries(dtype: torch.dtype) -> None:
    q = torch.randn(2, G, 11, D, generator=torch.Generator().manual_seed(5)).to(dtype)
    q[0, 0, 3], q[1, 0, 4] = 0.0, 1000 * q[1, 0, 4]
    sample = ReferenceQueries(Spec(2, D, D, dtype=dtype), 1000)
    sample.record(q, torch.zeros(2, dtype=torch.int64), torch.tensor([11, 11]))
    for row in range(2):
        mine = held(sample, row)
        assert set(mine) == set(range(11))
        for position, found in mine.items():
            asked = q[row, :, position].double()
            step = asked.abs().amax(-1, keepdim=True) / 127
            rounding = asked.abs().amax(-1, keepdim=True) * torch.finfo(dtype).eps  # of the scale, in the dtype
            assert bool(((found.double() - asked).abs() <= 0.5001 * step + rounding).all())


def test_without_a_known_rotation_queries_are_used_as_they_came() -> None:
    q, sample = stream(2, 9), ReferenceQueries(Spec(2, D, D), 1000)
    sample.record(q, torch.zeros(2, dtype=torch.int64), torch.tensor([9, 4]))
    assert sorted(map(tuple, sample.of(1, 4)[0].tolist())) == sorted(
        map(tuple, 2 * q[1, :, :4].reshape(-1, D).tolist())
    )
    assert ReferenceQueries(Spec(2, D, D), 8).of(0, 0).shape == (1, 0, D)
