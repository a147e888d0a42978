"""Read the tokens found by halving intervals of the stream repeatedly, by the logits at their centres (HiP).

In this file a row is one (batch item, kv head) stream, and a slot the place of one held token. A key block is
`key_block` consecutive tokens. An interval [low, high) is a range of block numbers; its centre block stands for it. A
choice is the list of key blocks that a query reads. The positions of the stream are cut into spans, and the queries of
one span share a choice. The seal is the end of the prompt. `Slots` is the store of all held keys and values, by row
and slot. `Chosen` is the slots that each query reads, with a mask that is True for padding entries. In shapes, r are
rows, m queries per row, g query heads per kv head, c entries per query, d the width of a key; an argument `rows` (r,)
has the indices of these rows (None: all).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.fields import MOST, Field, require_equal
from kvfloor.core.selector import Chosen, Indexed, SelectorState
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.core.stretches import Stretches
from kvfloor.validation import count

_KEY_NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Hierarchical(Indexed):
    """Read about k of n tokens, found by log2(n / k) rounds of halving the stream instead of by n logits.

    Law (Lee et al. 2024, HiP attention): between the first `sinks` and the newest `window` tokens the stream is cut
    into blocks of `key_block` tokens, and the sequence of blocks into k / key_block equal intervals. Each round splits
    every interval into two halves, scores each half by the largest logit in its centre block, and keeps the better half
    of all these halves as the new intervals. Rounds end when every interval is one block. The query reads the sinks,
    these blocks, and all tokens after the cut part. Every token is read while there are at most k / key_block blocks.
    With more blocks, a token of large logit among tokens of small logit is found only if it lies in a centre block:
    there is no guarantee.

    k            tokens read per query, besides the sinks and the newest tokens
    key_block    tokens per key block
    sinks        first tokens, which every query reads
    window       newest tokens, which every query reads
    query_block  number of positions whose queries share a choice, before the seal (end of the prompt). The first query
                 of each such span makes the choice, so a choice depends neither on later queries nor on how the
                 stream is split into calls
    refresh      number of decoded tokens that share a choice, after the seal
    Each query of a GQA group has its own choice. Queries that come without new tokens (`State.read`, `State.attend`)
    share no choice: each makes one of its own.
    """

    name: ClassVar[str] = "hip"
    paper: ClassVar[str] = "Lee et al. 2024, HiP (arXiv 2406.09827), from its description"
    k: int = 512
    key_block: int = 2
    sinks: int = 4
    window: int = 32
    query_block: int = 32
    refresh: int = 1

    def __post_init__(self) -> None:
        count("hip", least=1, k=self.k, key_block=self.key_block, query_block=self.query_block, refresh=self.refresh)
        count("hip", least=0, sinks=self.sinks)
        count("hip", least=1, window=self.window)
        if self.k % self.key_block:
            raise ValueError(f"hip: k must be a multiple of key_block, got k={self.k}, key_block={self.key_block}")

    def open(self, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> HierarchicalState:
        del shared
        return HierarchicalState(spec, slots, self, in_order)


class HierarchicalState(SelectorState):
    """Hold each row's current choice, i.e. the key blocks that its queries read, and its slots in order of age.

    k, key_block, query_block and refresh are the settings of `Hierarchical`: about k tokens are read, in blocks of
    key_block tokens; queries of query_block positions in the prompt, or of refresh positions after it, share a choice.
    block    (rows, g, k / key_block) numbers of the chosen blocks, ascending, -1 for unused entries; None before the
             first choice
    blocks   (rows,) number of blocks that the choice was made from: all tokens after these blocks are read
    span     (rows,) index of the span whose queries share the current choice; -1: the row has no current choice
    order    the slots of each row from the oldest to the newest token; None if no token is ever evicted, because slots
             are then in order of age anyway
    """

    def __init__(self, spec: Spec, slots: Slots, method: Hierarchical, in_order: bool) -> None:
        self.spec = spec
        self.method = method  # frozen: no part of the memory
        self.order: Stretches | None = None
        if not in_order:
            self.order = Stretches(spec, slots.capacity, {"slot": ((), torch.int32)})
        self.block: Tensor | None = None
        self.blocks = torch.zeros(spec.rows, dtype=torch.int64, device=spec.device)
        self.span = torch.full((spec.rows,), -1, dtype=torch.int64, device=spec.device)
        self.sealed = False

    # ---- keeping up ----------------------------------------------------------------------------------------

    def append(self, slots: Slots, before: Tensor) -> None:
        if self.order is None:
            return
        if not torch.equal(self.order.capacity, slots.capacity):
            self.order.resize(slots.capacity)
        self.order.held = slots.held
        self._number(slots, before, torch.arange(int(slots.held.max())).expand(self.spec.rows, -1))

    def evict(self, slots: Slots, leaving: Tensor) -> None:
        assert self.order is not None, "slots that stay in order were emptied"
        changed = leaving.any(1)
        self.span[changed.to(self.span.device)] = -1
        self.order.held = slots.held
        width = int(slots.held.max())
        live = (torch.arange(width) < slots.held.unsqueeze(1)).to(slots.position.device)
        position = slots.positions(None, width).masked_fill(~live, torch.iinfo(torch.int64).max)
        first = torch.where(changed, 0, slots.held)
        self._number(slots, first, position.argsort(dim=1, stable=True))

    def _number(self, slots: Slots, first: Tensor, slot: Tensor) -> None:
        """Set the entries from first[r] on of each row r's list `order`: entry i becomes slot[r, i].

        Entry i is the slot of the row's i-th oldest token. first is (rows,), slot (rows, c), with c the largest number
        of tokens that a row holds; columns beyond a row's own number are ignored.
        """
        assert self.order is not None
        width = slot.shape[1]
        rank = torch.arange(width)
        wanted = (rank >= first.unsqueeze(1)) & (rank < slots.held.unsqueeze(1))
        wanted = wanted.to(self.spec.device)
        place = self.order.places(None, width)[:, 0][wanted]
        self.order.slot[place] = slot.to(self.spec.device)[wanted].to(torch.int32)  # type: ignore[attr-defined]

    def fields(self) -> dict[str, Any]:
        rows, any_span = self.spec.rows, Field(torch.int64, (self.spec.rows,), least=-1, most=MOST)
        block = Field(torch.int32, (rows, "g", self._most), least=-1, optional=True)
        return {"block": block, "span": any_span, "sealed": Field(bool)}

    def require_fitting(self, fields: dict[str, Any], slots: dict[str, Any]) -> None:
        order = fields["order"]
        if order is None:
            return
        require_equal(order["capacity"], slots["capacity"], "room for the order of arrival")
        require_equal(order["held"], slots["held"], "tokens in the order of arrival")
        for number, ranks in enumerate(order["slot"].split(slots["held"].tolist())):
            require_equal(ranks.sort().values, torch.arange(len(ranks)), f"slots in the order of row {number}")

    def resize(self, slots: Slots) -> None:
        if self.order is not None:
            self.order.resize(slots.capacity)

    def reserve(self, g: int) -> None:
        self.block = self._no_choice(g)

    def seal(self) -> None:
        self.sealed = True
        self.span = torch.full_like(self.span, -1)

    # ---- choosing ------------------------------------------------------------------------------------------

    def choose(self, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
        blocks = self._blocks(visible)
        return self._to_read(self._descend(q, slots, blocks, rows), blocks, visible, slots, rows)

    def follow(self, q: Tensor, slots: Slots, visible: Tensor, position: Tensor) -> Chosen:
        (rows, g, a, d), device = q.shape, q.device
        share = self.method.refresh if self.sealed else self.method.query_block
        span, asked = position // share, (position >= 0).any(1)
        first = span[:, :1]
        step = (span - first).clamp_min(0)  # index of the query's span among the spans of this call
        met = torch.arange(int(step.max()) + 1, device=device)
        if self.block is None or self.block.shape[1] != g:
            self.block = self._no_choice(g)
            self.span = torch.full_like(self.span, -1)
        # The first query of a span makes its choice. An open span keeps its choice, unless eviction dropped it.
        known = (self.span == first[:, 0]) & asked
        leader = ((first + met) * share - position[:, :1]).clamp(0, a - 1)
        blocks = self._blocks(visible.gather(1, leader))
        blocks[:, 0] = torch.where(known, self.blocks, blocks[:, 0])
        chosen = self.block.unsqueeze(2).expand(-1, -1, len(met), -1)
        skip = int(bool((known | ~asked).all()))
        if skip < len(met):
            leads = q.gather(2, leader[:, skip:].view(rows, 1, -1, 1).expand(-1, g, -1, d)).flatten(1, 2)
            fresh = self._descend(leads, slots, blocks[:, skip:].repeat(1, g), None).view(rows, g, -1, self._most)
            keep = (known.unsqueeze(1) & (met == 0)).view(rows, 1, -1, 1)
            chosen = torch.where(keep, chosen, torch.cat([chosen[:, :, :skip], fresh], 2))
        row, last = torch.arange(rows, device=device), step.masked_fill(position < 0, 0).amax(1)
        self.block = torch.where(asked.view(-1, 1, 1), chosen[row, :, last], self.block)
        self.blocks = torch.where(asked, blocks[row, last], self.blocks)
        self.span = torch.where(asked, first[:, 0] + last, self.span)
        each = chosen.gather(2, step.view(rows, 1, a, 1).expand(-1, g, -1, self._most))
        blocks, visible = blocks.gather(1, step).repeat(1, g), visible.repeat(1, g)
        return self._to_read(each.flatten(1, 2), blocks, visible, slots, None)

    @property
    def _most(self) -> int:
        return self.method.k // self.method.key_block

    def _no_choice(self, g: int) -> Tensor:
        return torch.full((self.spec.rows, g, self._most), -1, dtype=torch.int32, device=self.spec.device)

    def _blocks(self, visible: Tensor) -> Tensor:
        """Return how many whole key blocks lie between the sinks and the window of a query that sees `visible` tokens.

        The sinks are a row's first `sinks` tokens, the window the newest `window` tokens that the query sees; both
        numbers are settings of `Hierarchical`. Key block i is the tokens from index sinks + i key_block on. The result
        has the shape of `visible`.
        """
        return (visible - self.method.sinks - self.method.window).clamp_min(0) // self.method.key_block

    def _descend(self, q: Tensor, slots: Slots, blocks: Tensor, rows: Tensor | None) -> Tensor:
        """Return the key blocks chosen for queries q (r, m, d) by halving: (r, m, most) int32, ascending, -1 for none.

        most = k / key_block is the greatest number of chosen blocks; blocks (r, m) is the number of blocks that each
        query chooses from. Of two halves with equal scores the newer one is kept.
        """
        most, (r, m) = self._most, blocks.shape
        share = torch.arange(most, device=q.device).flip(0)
        low, high = share * blocks.unsqueeze(2) // most, (share + 1) * blocks.unsqueeze(2) // most
        for _ in range(math.ceil(math.log2(max(1, -(-int(blocks.max()) // most)))) if blocks.numel() else 0):
            middle = (low + high + 1) // 2
            low = torch.stack([middle, low], 3).flatten(2)
            high = torch.stack([high, middle], 3).flatten(2)
            best = self._worth(q, slots, low, high, rows).argsort(dim=-1, descending=True, stable=True)
            best = best[..., :most].sort(dim=-1).values  # back to newest first
            low, high = low.gather(2, best), high.gather(2, best)
        kept = torch.where(high > low, low, torch.iinfo(torch.int64).max).sort(dim=-1).values
        kept = kept.masked_fill(kept == torch.iinfo(torch.int64).max, -1)
        return kept.to(torch.int32).view(r, m, most)

    def _worth(self, q: Tensor, slots: Slots, low: Tensor, high: Tensor, rows: Tensor | None) -> Tensor:
        """Return the score (r, m, c), float64, of each interval [low, high) of blocks: the largest logit in its centre.

        The logits are those of the query with the keys of the centre block. low and high are (r, m, c), for c intervals
        per query q (r, m, d). The score of an empty interval is -inf.
        """
        (r, m, c), b = low.shape, self.method.key_block
        rank = (
            ((low + high - 1) // 2).clamp_min(0).unsqueeze(3) * b + self.method.sinks + torch.arange(b, device=q.device)
        )
        q, worth = q.double() * self.spec.scale, []
        at_once = max(1, _KEY_NUMBERS_AT_ONCE // max(1, r * c * b * self.spec.d))
        for start in range(0, m, at_once):
            part = slice(start, start + at_once)
            slot = self._slots(rank[:, part].flatten(2), slots, rows)
            keys = slots.keys(slots.at(slot, rows)).double()
            worth.append(torch.einsum("rmcd,rmd->rmc", keys, q[:, part]).unflatten(2, (c, b)).amax(3))
        return torch.cat(worth, 1).masked_fill(high <= low, -torch.inf)

    def _to_read(self, block: Tensor, blocks: Tensor, visible: Tensor, slots: Slots, rows: Tensor | None) -> Chosen:
        """Return the slots that each query reads: those of the sinks, the chosen blocks and all newer tokens.

        block    (r, m, most) numbers of the chosen blocks, -1 for none
        blocks   (r, m) number of blocks that the choice was made from; all tokens after these blocks are read
        visible  (r, m) number of tokens that the query sees, from the oldest on
        """
        sinks, b, device = self.method.sinks, self.method.key_block, block.device
        r, m, _ = block.shape
        middle = sinks + block.unsqueeze(3) * b + torch.arange(b, device=device)
        start = (sinks + blocks * b).unsqueeze(2)
        rest = start + torch.arange(max(0, int((visible.unsqueeze(2) - start).max())), device=device)
        rank = torch.cat([torch.arange(sinks, device=device).expand(r, m, -1), middle.flatten(2), rest], 2)
        dead = rank >= visible.unsqueeze(2)
        dead[..., sinks : sinks + middle[0, 0].numel()] |= (block < 0).repeat_interleave(b, 2)
        return Chosen(self._slots(rank.masked_fill(dead, 0), slots, rows), dead)

    def _slots(self, rank: Tensor, slots: Slots, rows: Tensor | None) -> Tensor:
        """Return the slots (r, m, c) of the tokens with age ranks `rank` (r, m, c); a row's oldest token has rank 0."""
        width = int(slots.held.max())
        if self.order is None or width == 0:
            return rank
        slot = self.order.across("slot", rows, width)[:, 0]
        at = rank.clamp_max(width - 1).flatten(1)
        return slot.gather(1, at).view(rank.shape).long()

    # ---- what it costs -------------------------------------------------------------------------------------

    def bytes_read(self, held: Tensor) -> int:
        """Return the bytes that one query per row reads, summed over the rows.

        held (rows,) is the number of tokens that each row holds. The result is an average over the queries of a span:
        one of them makes the choice, and all of them read the keys and values of the chosen tokens. The choice takes
        rounds of halving, each of which reads the keys of 2 k / key_block centre blocks. Counted too are the bytes of
        the current choice (the chosen blocks' numbers) and, if tokens may be evicted, of the entries of `order` (slots
        by age) for the tokens read.
        """
        method, number = self.method, self.spec.dtype.itemsize
        share = method.refresh if self.sealed else method.query_block
        blocks = self._blocks(held)
        rounds = torch.ceil(torch.log2((-(-blocks // self._most)).clamp_min(1).double())).long()
        looked_at = rounds * 2 * method.k
        tokens = held - (blocks - self._most).clamp_min(0) * method.key_block
        order = 4 * int((tokens + looked_at // share).sum()) if self.order is not None else 0
        index = 4 * self._most * self.spec.rows + order
        keys = self.spec.d * number * float(looked_at.sum()) / share
        return index + math.ceil(keys) + int(tokens.sum()) * (self.spec.d + self.spec.dv) * number
