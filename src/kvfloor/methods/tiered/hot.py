"""Keep all tokens in 8-bit codes, and beside them the numbers that bound what the codes make of an answer.

A row is one (batch item, kv head) stream, a slot the place of one held token, a page a number of consecutive tokens of
a row that are coded together. A residual is a token's key, or value, minus the decoded one. In shapes, r are rows, m
queries, s slots, d and dv the widths of a key and a value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfloor.certify.certified import Certified
from kvfloor.certify.chance import Dither
from kvfloor.certify.glimpse import Glimpse
from kvfloor.certify.operator_norm import operator_norm
from kvfloor.certify.rounding import LEAST, RUN, product_rounding, products, unit
from kvfloor.core.fields import Field, require_equal
from kvfloor.core.memory import Memory
from kvfloor.core.partial import Partial
from kvfloor.core.rowwise import length, product, total
from kvfloor.core.spec import Spec
from kvfloor.logits import capped
from kvfloor.methods.stores.coded import CodedSlots
from kvfloor.methods.stores.codes import GroupCodes
from kvfloor.methods.stores.dithered_tokens import DitheredTokens
from kvfloor.methods.stores.turn import turned, turned_back
from kvfloor.methods.tiered import kernel
from kvfloor.methods.tiered.coarse import COLUMNS, CoarseSums
from kvfloor.methods.tiered.hot_store import HotStore

_RADIUS = torch.bfloat16


class Hot(Memory):
    """Keep every token in codes of 8 bits and more, and the sums of the residuals' outer products by row.

    codes         the coded tokens; the first ones, the newest and those of the open page as they were given
    key_gram      (rows, d, d) sum over coded tokens of the key residual's outer product with itself
    value_gram    (rows, dv, dv) the same of the value residuals
    operator      (rows,) bound on the operator norm of the matrix of the value residuals
    excess        (rows,) most that key residuals exceed half a step of their channel, as a norm over channels
    reach         (rows,) bound on the norm of any coded key, and of its range's ends
    longest       (rows,) the largest norm of a coded value, up to the rounding of a sum of dv squares
    coarse        the same sums for coarser readings, where codes lie in planes; otherwise None

    The column `radius` of the codes' slots bounds the norm of each value's residual. Tokens that are dropped stay in
    the sums, which remain upper bounds.
    """

    coarse: CoarseSums | None = None  # an attribute of the object only where codes lie in planes

    def __init__(self, spec: Spec, places: int, store: HotStore, page: int) -> None:
        """Open an empty tier.

        places  slots of each row
        store   how keys and values are coded
        page    tokens that are coded together
        """
        self.spec = spec
        columns = {"radius": _RADIUS} | (COLUMNS if store.planes else {})
        self.codes = CodedSlots(spec, [places] * spec.rows, store, page, columns, lose=False)
        if store.planes:
            self.coarse = CoarseSums(spec)
        how: dict[str, Any] = {"dtype": spec.compute_dtype, "device": spec.device}
        self.key_gram = torch.zeros(spec.rows, spec.d, spec.d, **how)
        self.value_gram = torch.zeros(spec.rows, spec.dv, spec.dv, **how)
        self.operator, self.excess, self.reach, self.longest = (torch.zeros(spec.rows, **how) for _ in range(4))
        kernel.serves(self)  # which loads the kernel where there is one: not later, when a step may be timed

    # ---- writing ---------------------------------------------------------------------------------------------------

    def settle(self, seen: Tensor, rows: Tensor | None) -> None:
        """Code the pages that are due in these rows (None: all), and add their residuals to the sums.

        seen: (rows,) tokens that each row has seen.
        """
        codes, device = self.codes, self.key_gram.device
        at = codes.due(seen, rows)
        if not len(at):
            return
        row, slot, from_page = codes.waiting(at, seen)
        here = at.to(device)
        place = codes.offset.to(device)[here[row]] + slot

        def paged(x: Tensor) -> Tensor:
            pages = torch.zeros(len(at), codes.group, x.shape[-1], dtype=self.spec.compute_dtype, device=device)
            pages[row, from_page] = x
            return pages

        k, v = codes.keys(place), codes.values(place)  # as they were given
        codes.settle(seen, rows)
        residual = paged(k - codes.keys(place))
        self.key_gram[here] += product(residual.transpose(1, 2), residual)
        self._bound_keys(here, paged(k), residual, codes.coded[at] // codes.group - 1)
        if not self.spec.tied:
            residual = paged(v - codes.values(place))
        self.value_gram[here] += product(residual.transpose(1, 2), residual)
        terms = unit(self.spec.compute_dtype) * (codes.group + self._pages + 8)
        self.operator[here] = operator_norm(self.value_gram[here], terms).to(residual.dtype) * (
            1 + unit(residual.dtype)
        )
        if self.coarse is not None:
            self.coarse.settle(codes, here, codes.coded[at] // codes.group - 1, k, v, (place, row, from_page))
        self.longest[here] = torch.maximum(self.longest[here], length(paged(v)).amax(1))
        radius = length(residual)[row, from_page] * (1 + 2.0**-7)  # bfloat16 rounds by at most 2^-8
        radius = torch.where(radius > 0, radius.clamp_min(torch.finfo(_RADIUS).tiny), radius)
        codes.columns.radius[place] = radius.to(_RADIUS)  # type: ignore[attr-defined]

    def _bound_keys(self, here: Tensor, given: Tensor, residual: Tensor, page: Tensor) -> None:
        """Update `excess` and `reach` of the rows `here` by a page of keys (r, page, d) and their residuals."""
        codes = self.codes.key_codes
        assert isinstance(codes, GroupCodes)
        half = codes.steps(here.cpu())[torch.arange(len(here)), page.to(here.device)] / 2
        over = (residual.abs().amax(1) - half).clamp_min(0)
        grown = 1 + unit(given.dtype) * (given.shape[-1] + 8)
        self.excess[here] = torch.maximum(self.excess[here], length(over) * grown)
        end = given.abs().amax(1)
        if codes.dithered:  # a decoded number may lie half a step beyond its range
            end = end + half
        reach = length(end) * (1 + 2.0**-6)  # ranges are rounded outwards by at most 1/255 each
        self.reach[here] = torch.maximum(self.reach[here], reach)

    @property
    def _pages(self) -> int:
        return int(self.codes.coded.max()) // self.codes.group

    # ---- reading ---------------------------------------------------------------------------------------------------

    def glimpse(self, q: Tensor, hide: Tensor | None, rows: Tensor | None = None) -> tuple[Glimpse, Tensor]:
        """Return what the codes tell q (r, m, d) of all tokens, and the decoded keys (r, s, d).

        The values are rotated (`turned`), so the answer's mean is too: `upright` rotates it back.
        hide  bool (r, m, s), True for tokens that a query does not see; None: it sees all
        rows  (r,) indices of the rows that are asked, on the CPU; None: all rows
        """
        spec, dtype = self.spec, self.spec.compute_dtype
        width = int(self.codes.held.max())  # of all rows, as `hide` is for all
        view: Any = self.codes.view(rows, width)  # a `CodedView`
        here = slice(None) if rows is None else rows.to(q.device)
        reach, excess, key_gram = self.reach[here], self.excess[here], self.key_gram[here]
        k, v = self.codes.decoded(view, turn=True)
        position = view.position
        coded = self.codes.has_code(position, rows)
        if view.live is not None:
            coded = coded & view.live
        asked = q.to(dtype) * spec.scale
        eps, norm = unit(dtype), length(asked)
        size = torch.where(coded, reach.unsqueeze(1), length(k))
        rounding = logit_rounding(asked, size, spec)
        grown = 1 + eps * (2 * spec.d + 32)
        codes = self.codes.key_codes
        assert isinstance(codes, GroupCodes)
        half = codes.steps(rows)[:, : max(1, self._pages)] / 2
        square = (torch.matmul(asked, key_gram) * asked).sum(-1).clamp_min(0)
        trace = total(key_gram.diagonal(dim1=-2, dim2=-1)).unsqueeze(1)
        lost = eps * (2 * spec.d + self.codes.group + self._pages + 32) * norm.square() * trace
        gram = (square + lost).sqrt() * grown
        doubt = torch.zeros_like(rounding)
        if half.shape[1]:
            by_page = torch.matmul(asked.abs(), half.transpose(1, 2)) + (norm * excess.unsqueeze(1)).unsqueeze(2)
            page = (position // self.codes.group).clamp_max(half.shape[1] - 1)
            doubt = by_page.gather(2, page.unsqueeze(1).expand(-1, q.shape[1], -1)) * grown
            doubt = torch.minimum(doubt, gram.unsqueeze(2)) * coded.unsqueeze(1)
        logits = capped(products(asked, k), spec.softcap)
        if hide is not None:
            logits = logits.masked_fill(hide, -torch.inf)
        radius = self.codes.column("radius", rows, view.width).to(dtype) * coded
        found = Glimpse(
            logits,
            doubt + rounding,
            rounding,
            coded.unsqueeze(1).expand(-1, q.shape[1], -1),
            gram,
            v,
            length(v) * (1 + eps * (spec.dv + 8)),
            radius,
            self.operator[here],
            dither=self._dither(asked, half, position, coded, rows),
        )
        return found, k

    def _dither(
        self, asked: Tensor, half: Tensor, position: Tensor, coded: Tensor, rows: Tensor | None
    ) -> Dither | None:
        """Return what is known of the residuals before the dither is drawn; None if they are not random.

        asked     (r, m, d) queries times the scale
        half      (r, pages, d) half steps of each page
        position  (r, s) positions of the tokens
        coded     bool (r, s), True for tokens that have codes
        A softcap bends the errors of logits, so that their law is not known.
        """
        codes = self.codes
        if not codes.key_codes.dithered or self.spec.softcap is not None or not half.shape[1]:
            return None
        grown = 1 + unit(asked.dtype) * (2 * self.spec.d + 32)
        page = (position // codes.group).clamp_max(half.shape[1] - 1).unsqueeze(1).expand(-1, asked.shape[1], -1)

        def by_token(by_page: Tensor) -> Tensor:
            return by_page.gather(2, page) * grown * coded.unsqueeze(1)

        square = by_token(torch.matmul(asked.square(), half.square().transpose(1, 2)))
        widest = by_token(torch.matmul(asked.abs(), half.transpose(1, 2)))
        values, step = codes.value_codes, None
        if isinstance(values, DitheredTokens):
            step = values.step(codes.across(values.widest, rows, position.shape[1])) * coded
        return Dither(square, widest, step)

    @property
    def _turns(self) -> bool:
        return self.codes.value_codes is not None and self.codes.value_codes.turns

    def turned(self, v: Tensor) -> Tensor:
        """Rotate values (..., dv) as those of a glimpse are."""
        return turned(v) if self._turns else v

    def upright(self, found: Certified) -> Certified:
        """Return a glimpse's answer with its mean rotated back."""
        if not self._turns:
            return found
        return replace(found, partial=Partial(turned_back(found.partial.mean), found.partial.log_mass))

    @property
    def bytes_read(self) -> int:
        """Return the bytes that one query per row reads: codes, bounds and sums, and the tokens without codes."""
        codes = self.codes
        coded = torch.minimum((codes.coded - codes.first).clamp_min(0), codes.held)
        if self.coarse is not None:
            each, sums = self.coarse.bytes_read(codes)
            sums += self.reach.nbytes + self.operator.nbytes
        else:
            each = codes.token_bytes + torch.finfo(_RADIUS).bits // 8
            sums = sum(x.nbytes for x in (self.key_gram, self.operator, self.excess, self.reach))
        return round(int(coded.sum()) * each + int((codes.held - coded).sum()) * self.spec.token_bytes + sums)

    # ---- as a part of a state --------------------------------------------------------------------------------------

    def fields(self) -> dict[str, Any]:
        rows, dtype = self.spec.rows, self.spec.compute_dtype
        grams = {
            name: Field(dtype, (rows, width, width), finite=True)
            for name, width in (("key_gram", self.spec.d), ("value_gram", self.spec.dv))
        }
        return grams | {
            n: Field(dtype, (rows,), least=0, finite=True) for n in ("operator", "excess", "reach", "longest")
        }

    def require_beside(self, fields: dict[str, Any], exact: dict[str, Any], seen: Tensor) -> None:
        """Raise ValueError unless the saved codes `fields["codes"]` are of the same tokens as the exact slots' fields.

        seen: (rows,) tokens that each row has seen.
        """
        codes = fields["codes"]
        require_equal(codes["held"], exact["held"], "coded tokens held")
        require_equal(codes["position"].long(), exact["position"], "positions of coded tokens")
        self.codes.require_settled(codes, seen)


def logit_rounding(asked: Tensor, size: Tensor, spec: Spec, run: int = RUN) -> Tensor:
    """Return a bound (r, m, s) on what rounding makes of logits, and of the weights computed from them.

    asked  (r, m, d) queries times the scale
    size   (r, s) bounds on the keys' norms, and on what they are decoded from
    run    most terms of a product that are summed at once: those of `products` by default
    """
    eps, dtype = unit(asked.dtype), asked.dtype
    fixed = eps * (16 - LEAST[dtype] + 8 * (spec.softcap or 0.0))
    return product_rounding(spec.d, dtype, run) * length(asked).unsqueeze(2) * size.unsqueeze(1) + fixed
