"""Sample the queries that a state answers, as reference queries for a later compaction of its tokens.

A row is one (batch item, kv head) stream. A token has g queries per row, those of its GQA group. In shapes, a are new
tokens, d is the width of a query, p the places of the sample: tokens whose queries it holds. A token's position is its
index in its row's stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfloor.core.fields import MOST, Field
from kvfloor.core.memory import Memory
from kvfloor.core.spec import Spec

HORIZON = 128
_ZERO, _MOST_CODE = 128, 127
_GOLDEN = 0.6180339887498949


class ReferenceQueries(Memory):
    """Hold the queries of up to p tokens of each row: the newest, and others spread evenly over its stream.

    The first half of the places has the newest tokens. The others have every `stride`-th token since `start`; the
    stride is the smallest power of two for which they fit. So the sample depends on a row's stream alone, not on how
    the stream was cut into calls. A query is stored in 8 bits per entry, which is (code - 128) times the query's scale:
    it only chooses what is kept.

    most      largest number of queries per row; p is most / g, but at least 2
    start     (rows,) position from which tokens are sampled
    stride    (rows,) distance between two sampled tokens of the second half
    codes     (rows, p, g, d) uint8; None before the first query
    scale     (rows, p, g) float32; None before the first query
    position  (rows, p) position of each place's token; -1 where there is none
    """

    def __init__(self, spec: Spec, most: int) -> None:
        self.spec, self.most = spec, most
        self.start, self.stride = torch.zeros(spec.rows, dtype=torch.int64), torch.ones(spec.rows, dtype=torch.int64)
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None
        self.position = torch.zeros(spec.rows, 0, dtype=torch.int64)

    def places(self, g: int) -> int:
        """Return p, the number of tokens whose queries are held, for g queries per token."""
        return max(2, self.most // g)

    @property
    def group(self) -> int | None:
        """Return g, the number of queries per token; None before the first query."""
        return None if self.codes is None else self.codes.shape[2]

    # ---- sampling --------------------------------------------------------------------------------------------------

    def restart(self, seen: Tensor) -> None:
        """Drop all queries, free their memory, and sample from the next token on; seen (rows,): tokens so far."""
        self.start, self.stride = seen.clone(), torch.ones_like(self.stride)
        self.codes, self.scale, self.position = None, None, self.position.new_zeros(self.spec.rows, 0)

    def record(self, q: Tensor, seen: Tensor, take: Tensor) -> None:
        """Sample from queries q (rows, g, a, d) of new tokens: the first take[r] of row r, which has had seen[r]."""
        a = q.shape[2]
        codes, scale = self._opened(q.shape[1])
        newest, after = self._newest, seen + take
        self._thin((codes, scale), after)
        position = seen.unsqueeze(1) + torch.arange(a)
        real = torch.arange(a) < take.unsqueeze(1)
        offset, stride = position - self.start.unsqueeze(1), self.stride.unsqueeze(1)
        recent = real & (position >= after.unsqueeze(1) - newest)
        spread = real & (offset % stride == 0)
        for wanted, place in ((recent, position % newest), (spread, newest + offset // stride)):
            row, j = wanted.nonzero(as_tuple=True)
            at = place[row, j]
            there = row.to(q.device), at.to(q.device)
            codes[there], scale[there] = _coded(q[there[0], :, j.to(q.device)])
            self.position[row, at] = position[row, j]

    def record_one(self, q: Tensor, seen: int) -> None:
        """Sample from the queries q (rows, g, 1, d) of one new token in every row; all rows have had `seen` tokens."""
        start, stride = self.start.tolist(), self.stride.tolist()
        offset, (codes, scale) = seen - start[0], self._opened(q.shape[1])
        newest = self._newest
        room = offset // stride[0] < codes.shape[1] - newest
        if min(start) != max(start) or min(stride) != max(stride) or not room:
            ones = torch.ones(self.spec.rows, dtype=torch.int64)
            self.record(q, seen * ones, ones)
            return
        for place in (seen % newest, *((newest + offset // stride[0],) if offset % stride[0] == 0 else ())):
            codes[:, place], scale[:, place] = _coded(q[:, :, 0])
            self.position[:, place] = seen

    @property
    def _newest(self) -> int:
        """Return the number of places for the newest tokens."""
        return (self.position.shape[1] + 1) // 2

    def _opened(self, g: int) -> tuple[Tensor, Tensor]:
        """Return the stored codes and scales; allocate them for g queries per token if there are none."""
        if self.codes is None or self.scale is None:
            rows, p, d = self.spec.rows, self.places(g), self.spec.d
            self.codes = torch.zeros(rows, p, g, d, dtype=torch.uint8, device=self.spec.device)
            self.scale = torch.zeros(rows, p, g, dtype=torch.float32, device=self.spec.device)
            self.position = torch.full((rows, p), -1, dtype=torch.int64)
        return self.codes, self.scale

    def _thin(self, stored: tuple[Tensor, Tensor], after: Tensor) -> None:
        """Double the stride of each row until its spread tokens fit once it has had after (rows,) tokens.

        Of the spread tokens held, those that the new stride passes over are dropped. `stored` are codes and scales.
        """
        first, places = self._newest, self.position.shape[1] - self._newest
        factor = torch.ones_like(self.stride)
        while bool((full := (after - 1 - self.start) // (self.stride * factor) >= places).any()):
            factor[full] *= 2
        rows = (factor > 1).nonzero().squeeze(1)
        if not len(rows):
            return
        source = torch.arange(places) * factor[rows].unsqueeze(1)
        inside, source = source < places, source.clamp_max(places - 1) + first
        self.position[rows, first:] = self.position[rows].gather(1, source).masked_fill(~inside, -1)
        there, source = rows.to(stored[0].device), source.to(stored[0].device)
        for one in stored:
            one[there, first:] = one[there.unsqueeze(1), source]
        self.stride = self.stride * factor

    # ---- answering -------------------------------------------------------------------------------------------------

    def of(self, row: int, seen: int) -> Tensor:
        """Return the reference queries (1, m, d) of a row that has had `seen` tokens, in the compute dtype.

        They stand for queries to come. If the keys' rotation is known (`Spec.applied`), each token's queries are turned
        from its position to one among the next HORIZON, which together they cover evenly. If not, the queries are
        returned as they came. m is 0 for a row without queries.
        """
        if self.codes is None or self.scale is None:
            return torch.zeros(1, 0, self.spec.d, dtype=self.spec.compute_dtype, device=self.spec.device)
        place = (self.position[row] >= 0).nonzero().squeeze(1)
        position, there = self.position[row, place], place.to(self.spec.device)
        q = self.codes[row, there].to(self.spec.compute_dtype) - _ZERO  # (tokens, g, d)
        q *= self.scale[row, there].unsqueeze(-1)
        rotation = self.spec.applied
        if rotation is None:
            return q.reshape(1, -1, self.spec.d)
        ahead = (torch.arange(len(place), dtype=torch.float64) * _GOLDEN) % 1.0
        target = seen + (ahead * HORIZON).to(torch.int64)
        circle = rotation.circle((target - position).to(q.device).unsqueeze(1), q.dtype)
        return rotation.turned(q, circle).reshape(1, -1, self.spec.d)

    # ---- as a part of a state --------------------------------------------------------------------------------------

    def fields(self) -> dict[str, Any]:
        rows, whole = self.spec.rows, torch.int64
        codes = (rows, "places", "g", self.spec.d)
        return {
            "stride": Field(whole, (rows,), least=1, most=MOST),
            "codes": Field(torch.uint8, codes, optional=True),
            "scale": Field(torch.float32, codes[:-1], least=0, finite=True, optional=True),
            "position": Field(whole, (rows, None), least=-1, most=MOST),
        }

    def require_fitting(self, fields: dict[str, Any], seen: Tensor) -> None:
        """Raise ValueError if the saved `fields` of a sample contradict each other or `seen` (rows,), tokens so far."""
        codes, scale, position = fields["codes"], fields["scale"], fields["position"]
        wanted = 0 if codes is None else self.places(max(1, codes.shape[2]))
        if (codes is None) != (scale is None):
            raise ValueError("the sample of queries has codes without scales, or scales without codes")
        if position.shape[1] != wanted or (codes is not None and codes.shape[1] != wanted):
            raise ValueError(f"the sample of queries has {position.shape[1]} places, not {wanted}")
        if bool((fields["start"] > seen).any()) or bool((position >= seen.unsqueeze(1)).any()):
            raise ValueError("the sample has queries of tokens that its row has not seen")


def _coded(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (..., d) of queries q (..., d), and scales (...): q is about (code - 128) times its scale."""
    scale = (q.abs().amax(-1) / _MOST_CODE).float()
    codes = (q / scale.unsqueeze(-1)).nan_to_num(0.0)  # a query of zeros has scale 0
    return (codes.round().clamp(-_MOST_CODE, _MOST_CODE) + _ZERO).to(torch.uint8), scale
