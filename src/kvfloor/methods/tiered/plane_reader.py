"""Read the upper plane of all keys, and further planes and exact tokens until the bound on the error is small enough.

In shapes, r are rows, i.e. (batch item, kv head) streams, g query heads per kv head, m queries of each head, s slots of
a row, u tokens of which something is read in one round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvfloor.certify.certified import Certified
from kvfloor.certify.planes import (
    BOTH,
    BOTH_VALUE,
    CENTRE,
    EXACT_KEY,
    EXACT_VALUE,
    UPPER,
    UPPER_VALUE,
    PlaneGlimpse,
    put,
)
from kvfloor.certify.rounding import products, unit
from kvfloor.core.rowwise import length, total
from kvfloor.core.spec import Spec
from kvfloor.logits import capped
from kvfloor.methods.stores.nibbles import COARSER, NibbleChannels, NibbleTokens
from kvfloor.methods.tiered.cold import ExactSlots
from kvfloor.methods.tiered.fetch import replaced
from kvfloor.methods.tiered.hot import Hot, logit_rounding

_FIRST = 32  # planes of tokens that the first round reads; each later one reads half as many as all before it
_RADIUS_BYTES = 2


@dataclass
class _Scene:
    """Hold what is known of the tokens of some rows, while planes are read.

    every   (r,) indices of the rows in the tier, on the CPU
    seen    what the queries see so far
    asked   (r, g, m, d) queries times the scale
    upper   (r, s, d) keys as their upper planes tell them
    both    (r, s, d) keys as both planes tell them, where these were read
    doubt   (r, g, m, s) bounds on |eta| of keys that are known from both planes, rounding included
    whole   (r, g, m, 2) bounds on the roots of the sums of eta^2 over all coded tokens, by the way they are known
    gone    two (r, g, m, s): what is certain to be in these sums, but of a token that is known better
    summed  (r, m) bool, True where the sum over keys that are known from both planes has been read
    """

    every: Tensor
    seen: PlaneGlimpse
    asked: Tensor
    upper: Tensor
    both: Tensor
    doubt: Tensor
    whole: Tensor
    gone: tuple[Tensor, Tensor]
    summed: Tensor

    def rows(self, at: Tensor) -> _Scene:
        """Return what is known of the rows `at` (r,)."""
        names = ("asked", "upper", "both", "doubt", "whole", "summed")
        kept: dict[str, Any] = {name: getattr(self, name)[at] for name in names}
        gone = (self.gone[UPPER][at], self.gone[BOTH][at])
        return replace(self, every=self.every[at.cpu()], seen=self.seen.rows(at), gone=gone, **kept)

    def times(self, x: Tensor) -> Tensor:
        """Return the products (r, g, m, u) of the queries and x (r, u, d)."""
        return products(self.asked.flatten(1, 2), x).view(*self.asked.shape[:3], x.shape[1])

    def at(self, x: Tensor, index: Tensor) -> Tensor:
        """Return the entries (r, g, m, u) of x (r, g, m, s) at the tokens index (r, u)."""
        return x.gather(-1, index[:, None, None].expand(*x.shape[:-1], -1))

    def leave(self, way: int, index: Tensor, where: Tensor, eta: Tensor, allowed: Tensor) -> None:
        """Note that the tokens index (r, u) are known better, where `where` (r, m, u): they have left a sum of eta^2.

        eta, allowed  (r, g, m, u): their |eta| is at least |eta| - allowed
        """
        sure = (eta.abs() - allowed).clamp_min(0).square()
        one = put(self.gone[way], index, where, sure)
        self.gone = (one, self.gone[1]) if way == UPPER else (self.gone[0], one)

    def settle(self) -> None:
        """Bound the sums of eta^2, and each token by them, anew."""
        eps, s = unit(self.asked.dtype), self.upper.shape[1]
        left = torch.stack([x.sum(-1) for x in self.gone], -1) * (1 - eps * (s + 8))
        grams = (self.whole.square() - left).clamp_min(0).sqrt()
        doubt, rounding, key = self.seen.doubt, self.seen.rounding, self.seen.key.unsqueeze(1)
        for way in (UPPER, BOTH):
            most = grams[..., way].unsqueeze(-1) + rounding
            doubt = torch.where(key == way, torch.minimum(doubt, most), doubt)
        self.seen = replace(self.seen, grams=grams, doubt=doubt)


@dataclass(frozen=True)
class PlaneReader:
    """Answer queries from as few planes of the codes as certify the answers, and exact tokens where these do not.

    hot      the coded tokens, in planes
    exact    the same tokens as they were given, in the same slots
    epsilon  the largest bound allowed, relative to the largest value norm that a query sees
    """

    spec: Spec
    hot: Hot
    exact: ExactSlots
    epsilon: float

    def read(self, q: Tensor, hide: Tensor | None, real: Tensor | None) -> tuple[Certified, Tensor, Tensor]:
        """Return certified answers (r, g, m) to q (r, g, m, d), the exact tokens fetched for each (r, m), and bytes.

        hide  bool (r, m, s), True for tokens that the queries do not see; None: they see all that their row holds
        real  bool (r, m), False for padding, for which nothing is read; None: there is none
        The bytes (r, m) are those of planes and sums that were read beyond what every query reads. The queries of a
        group share what they read.
        """
        rows, _, m, _ = q.shape
        wanted = torch.ones(rows, m, dtype=torch.bool, device=q.device) if real is None else real
        scene = self._opened(q, hide)
        found, by_key, by_value = scene.seen.answer()
        fetched, planes = (torch.zeros(rows, m, dtype=torch.int64, device=q.device) for _ in range(2))
        at, known = torch.arange(rows, device=q.device), 0
        unsure = ~found.within(self.epsilon) & wanted.unsqueeze(1)
        while True:
            score = self._scores(scene.seen, by_key, by_value, unsure)
            going = (score >= 0).any(-1).any(1).nonzero().squeeze(1)
            if not len(going):
                return self.hot.upright(found), fetched, planes
            if len(going) < len(at):
                at, scene, unsure, score = at[going], scene.rows(going), unsure[going], score[going]
            count = max(_FIRST, known // 2)
            known += count
            picked, index = score.topk(min(count, score.shape[-1]), -1)
            marked = torch.zeros_like(score, dtype=torch.bool).scatter(-1, index, picked >= 0)
            tokens, spent = self._refine(scene, *marked.chunk(2, -1))
            fetched[at] += tokens
            planes[at] += spent
            answer, by_key, by_value = scene.seen.answer()
            found = replaced(found, answer, at, unsure)
            unsure = unsure & ~answer.within(self.epsilon)

    def _opened(self, q: Tensor, hide: Tensor | None) -> _Scene:
        """Return what the upper planes of the keys, the centres of the values and the uncoded tokens tell q."""
        spec, dtype, codes, sums = self.spec, self.spec.compute_dtype, self.hot.codes, self.hot.coarse
        assert sums is not None
        rows, g, m, _ = q.shape
        width = int(codes.held.max())
        live, position = codes.view(None, width).live, codes.positions(None, width)
        coded = codes.has_code(position, None)
        if live is not None:
            coded, gone = coded & live, ~live.unsqueeze(1)
            hide = gone.expand(-1, m, -1) if hide is None else hide | gone
        k = codes.coarse_keys(None, width)
        asked = q.to(dtype) * spec.scale
        flat = asked.flatten(1, 2)
        size = torch.where(coded, self.hot.reach.unsqueeze(1), length(k))
        rounding = logit_rounding(flat, size, spec).view(rows, g, m, width)
        pages = int(codes.coded.max()) // codes.group
        page = (position // codes.group).clamp_max(max(0, pages - 1))
        whole, doubts = [], []
        for gram, excess, steps in ((sums.key_gram, sums.excess, COARSER), (self.hot.key_gram, self.hot.excess, 1)):
            most, each = self._doubt(flat, gram, excess, steps / 2, pages, page)
            whole.append(most.view(rows, g, m))
            doubts.append(each.view(rounding.shape) * coded[:, None, None] + rounding)
        logits = capped(products(flat, k), spec.softcap).view(rounding.shape)
        if hide is not None:
            logits = logits.masked_fill(hide.unsqueeze(1), -torch.inf)
        values = self._values(k, coded, page)
        first = UPPER_VALUE if spec.tied else CENTRE
        key, value = (
            torch.where(coded, start, end).to(torch.uint8).unsqueeze(1).expand(-1, m, -1)
            for start, end in ((UPPER, EXACT_KEY), (first, EXACT_VALUE))
        )
        radii = (codes.column(name, None, width) for name in ("centre_radius", "upper_radius", "radius"))
        seen = PlaneGlimpse(
            *(logits, doubts[UPPER], rounding, key, value, torch.stack(whole, -1), values, self._lengths(values)),
            radii=torch.stack([x.to(dtype) * coded for x in radii], 1),
            operators=torch.cat((sums.operators, self.hot.operator.unsqueeze(1)), 1),
            least=self._least(coded, page, hide, m),
        )
        nothing = torch.zeros_like(rounding)
        every, summed = torch.arange(rows), torch.zeros(rows, m, dtype=torch.bool, device=q.device)
        return _Scene(every, seen, asked, k, k.clone(), doubts[BOTH], seen.grams, (nothing, nothing), summed)

    def _doubt(
        self, asked: Tensor, gram: Tensor, excess: Tensor, half: float, pages: int, page: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return bounds on the root of a row's sum of eta^2 (r, m), and on each token's |eta| (r, m, s).

        asked   (r, m, d) queries times the scale
        gram    (r, d, d) sum of the outer products of the keys' residuals
        excess  (r,) most that residuals exceed `half` of a step of the whole code, as a norm over channels
        page    (r, s) index of each token's page, of the `pages` coded ones
        """
        d, dtype = self.spec.d, asked.dtype
        codes, eps, norm = self.hot.codes, unit(dtype), length(asked)
        square = (torch.matmul(asked, gram) * asked).sum(-1).clamp_min(0)
        trace = total(gram.diagonal(dim1=-2, dim2=-1)).unsqueeze(1)
        lost = eps * (2 * d + codes.group + pages + 32) * norm.square() * trace
        grown = 1 + eps * (2 * d + 32)
        most = (square + lost).sqrt() * grown
        if not pages:
            return most, most.unsqueeze(2).expand(-1, -1, page.shape[1]) * 0
        keys = codes.key_codes
        assert isinstance(keys, NibbleChannels)
        steps = keys.steps(None)[:, :pages] * half
        by_page = torch.matmul(asked.abs(), steps.transpose(1, 2)) + (norm * excess.unsqueeze(1)).unsqueeze(2)
        each = by_page.gather(2, page.unsqueeze(1).expand(-1, asked.shape[1], -1)) * grown
        return most, torch.minimum(each, most.unsqueeze(2))

    def _values(self, k: Tensor, coded: Tensor, page: Tensor) -> Tensor:
        """Return the values (r, 4, s, dv) as the ways of knowing them that cost nothing tell them; 0 elsewhere."""
        codes, parts = self.hot.codes, EXACT_VALUE + 1
        values = torch.zeros(len(k), parts, k.shape[1], self.spec.dv, dtype=k.dtype, device=k.device)
        if self.spec.tied:
            values[:, UPPER_VALUE] = values[:, EXACT_VALUE] = k
            return values
        held = codes.value_codes
        assert isinstance(held, NibbleTokens)
        values[:, EXACT_VALUE] = codes.uncoded_values(k.shape[1])
        if held.centre.shape[1]:
            row = torch.arange(len(k), device=k.device).unsqueeze(1)
            values[:, CENTRE] = held.centre[row, page].to(k.dtype) * coded.unsqueeze(-1)
        return values

    def _lengths(self, values: Tensor) -> Tensor:
        return length(values) * (1 + unit(values.dtype) * (self.spec.dv + 8))

    def _least(self, coded: Tensor, page: Tensor, hide: Tensor | None, m: int) -> Tensor:
        """Return a number (r, m) of at most the largest norm of a value, of the pages that queries see whole."""
        codes, dtype = self.hot.codes, self.spec.compute_dtype
        held, rows = codes.value_codes, len(coded)
        if not isinstance(held, NibbleTokens) or not held.longest.shape[1]:
            return torch.zeros(rows, m, dtype=dtype, device=coded.device)
        longest = held.longest.squeeze(2).to(dtype)
        start = torch.arange(longest.shape[1], device=coded.device) * codes.group
        whole = codes.group - (codes.first - start).clamp(0, codes.group)
        there = coded.unsqueeze(1).expand(-1, m, -1)
        if hide is not None:
            there = there & ~hide
        count = torch.zeros(rows, m, longest.shape[1], dtype=torch.int64, device=coded.device)
        count.scatter_add_(2, page.unsqueeze(1).expand(-1, m, -1), there.long())
        return (longest.unsqueeze(1) * (count == whole) * (whole > 0)).amax(-1)

    def _scores(self, seen: PlaneGlimpse, by_key: Tensor, by_value: Tensor, unsure: Tensor) -> Tensor:
        """Return what reading the next plane of each key and of each value may gain for a byte: (r, m, 2 s).

        unsure: bool (r, g, m), True for the queries whose bounds are too large. -1 where nothing is to be read.
        """
        there = (seen.logits > -torch.inf).any(1) & unsure.any(1).unsqueeze(-1)
        exact, tiny = self.spec.token_bytes, torch.finfo(by_key.dtype).tiny
        if self.spec.tied:
            by_key = by_key + by_value
        upper, both = self._value_bytes
        found = []
        for by, known, price in (
            (by_key, seen.key, (self._key_bytes, exact)),
            (by_value, seen.value, (upper, both, exact)),
        ):
            best = by.masked_fill(~unsure.unsqueeze(-1), 0.0).amax(1).nan_to_num(0.0)
            cost = torch.tensor([*price, 1], dtype=best.dtype, device=best.device)[known.long()]
            left = there & (known < len(price))
            if by is by_value and self.spec.tied:
                left = torch.zeros_like(left)
            found.append(torch.where(left, (best / cost).clamp_min(tiny), -1.0))
        return torch.cat(found, -1)

    @property
    def _key_bytes(self) -> int:
        """Return the bytes of the lower plane of a key; with the radius of the value, if that is the key."""
        keys = self.hot.codes.key_codes
        assert isinstance(keys, NibbleChannels)
        return keys.fine.shape[1] + (_RADIUS_BYTES if self.spec.tied else 0)

    @property
    def _value_bytes(self) -> tuple[int, int]:
        """Return the bytes of the upper plane of a value, its scale and its radius, and those of the lower plane."""
        values = self.hot.codes.value_codes
        if not isinstance(values, NibbleTokens):
            return 0, 0
        scale = values.scale.element_size()
        return values.packed.shape[1] + scale + _RADIUS_BYTES, values.fine.shape[1] + _RADIUS_BYTES

    def _refine(self, scene: _Scene, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Read the next plane of the keys and of the values that are marked, two bool (r, m, s).

        Returns the exact tokens and the bytes of planes that were read, two (r, m). A token whose last plane is known
        is fetched exactly.
        """
        key, value, codes = scene.seen.key, scene.seen.value, self.hot.codes
        fetch = (keys & (key == BOTH)) | (values & (value == BOTH_VALUE))
        finer = keys & (key == UPPER) & ~fetch
        raised = [values & (value == way) & ~fetch for way in (CENTRE, UPPER_VALUE)]
        upper, both = self._value_bytes
        spent = finer.sum(-1) * self._key_bytes + raised[0].sum(-1) * upper + raised[1].sum(-1) * both
        sums = (self.spec.d**2 + 1) * self.hot.key_gram.element_size()
        spent = spent + (finer.any(-1) & ~scene.summed) * sums
        scene.summed = scene.summed | finer.any(-1)
        for way, mask in enumerate(raised):
            index, where = _union(mask)
            if index.shape[1]:
                place = codes.at(index.unsqueeze(1), scene.every).squeeze(1)
                self._know_values(scene, way + 1, index, where, codes.values(place, coarse=way == CENTRE, turn=True))
        index, where = _union(finer)
        if index.shape[1]:
            self._know_keys(scene, index, where, codes.keys(codes.at(index.unsqueeze(1), scene.every).squeeze(1)))
        index, where = _union(fetch)
        if index.shape[1]:
            self._know_exactly(scene, index, where)
        scene.settle()
        return fetch.sum(-1), spent

    def _know_keys(self, scene: _Scene, index: Tensor, where: Tensor, k: Tensor) -> None:
        """Note that the tokens index (r, u) have the keys k (r, u, d), as both planes tell them, where `where`."""
        moved = k - _rows_of(scene.upper, index)
        allowed = scene.at(scene.doubt, index) + scene.at(scene.seen.rounding, index)
        scene.leave(UPPER, index, where, scene.times(moved), allowed)
        scene.both.scatter_(1, index.unsqueeze(-1).expand(-1, -1, k.shape[-1]), k)
        new = {
            "logits": capped(scene.times(k), self.spec.softcap),
            "doubt": scene.at(scene.doubt, index),
            "key": torch.full_like(where, BOTH, dtype=torch.uint8),
        }
        scene.seen = scene.seen.raised(index, where, **new)
        if self.spec.tied:
            self._know_values(scene, BOTH_VALUE, index, where, k)

    def _know_values(self, scene: _Scene, way: int, index: Tensor, where: Tensor, v: Tensor) -> None:
        """Note that the tokens index (r, u) have the values v (r, u, dv), rotated, known in this way, where `where`."""
        values, lengths, row = scene.seen.values, scene.seen.lengths, torch.arange(len(v), device=v.device).unsqueeze(1)
        v = torch.where(where.any(1).unsqueeze(-1), v, values[row, way, index])
        values[row, way, index] = v  # these are the read's own
        lengths[row, way, index] = self._lengths(v)
        scene.seen = scene.seen.raised(index, where, value=torch.full_like(where, way, dtype=torch.uint8))

    def _know_exactly(self, scene: _Scene, index: Tensor, where: Tensor) -> None:
        """Fetch the tokens index (r, u) exactly, where `where` (r, m, u)."""
        wanted = where.any(1)
        place = self.exact.at(index.unsqueeze(1), scene.every)
        k, v = (x.to(self.spec.compute_dtype).squeeze(1) for x in self.exact.pair(place, wanted.unsqueeze(1)))
        allowed = scene.at(scene.seen.rounding, index)
        both = where & (scene.seen.key.gather(-1, index.unsqueeze(1).expand_as(where)) == BOTH)
        scene.leave(UPPER, index, where, scene.times(k - _rows_of(scene.upper, index)), allowed)
        scene.leave(BOTH, index, both, scene.times(k - _rows_of(scene.both, index)), allowed)
        new = {
            "logits": capped(scene.times(k), self.spec.softcap),
            "doubt": allowed,
            "key": torch.full_like(where, EXACT_KEY, dtype=torch.uint8),
        }
        scene.seen = scene.seen.raised(index, where, **new)
        self._know_values(scene, EXACT_VALUE, index, where, self.hot.turned(v))


def _union(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens (r, u) that some query of a row marks, bool (r, m, s), and which queries do: bool (r, m, u)."""
    some = marked.any(1)
    most = int(some.sum(-1).max()) if some.numel() else 0
    index = some.to(torch.uint8).topk(most, -1).indices
    return index, marked.gather(-1, index.unsqueeze(1).expand(-1, marked.shape[1], -1))


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Return the entries (r, u, w) of x (r, s, w) at index (r, u)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
