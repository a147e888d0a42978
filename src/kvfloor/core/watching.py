"""Give an eviction policy, at block ends, the queries, attention weights and keys that it learns from.

A row is one (batch item, kv head) stream, and a slot the place of one held token. A block is `block` consecutive tokens
of a row, and the open block the tokens since the last block end. A selector picks the held tokens that a query reads; a
summary is a compressed form of evicted tokens. A policy decides which tokens are evicted, by numbers that it keeps per
slot (columns) and by further tensors (its memory, `PolicyMemory`). To learn is to update these. `Queries` holds the
queries of a block, with the positions of their tokens. In shapes, r are the rows of a call, b tokens of a block, m
queries, s slots, g query heads per kv head, a new tokens, d the width of a key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfloor.core.blocked import Blocked
from kvfloor.core.device import sent
from kvfloor.core.partial import Partial
from kvfloor.core.policy import Held, Queries
from kvfloor.core.selector import Everything, Selector
from kvfloor.core.spec import Spec
from kvfloor.core.tiles import weights_by_tile

if TYPE_CHECKING:
    from kvfloor.core.bounded import Bounded


class Watching(Blocked["Bounded"]):
    """Answer queries from slots and a summary, and let the policy learn from queries, attention weights and keys.

    The queries of the open block are buffered. At the block's end the policy gets them all at once, and their attention
    weights are computed by a matrix product of fixed shape. So its decisions do not depend on how the stream was split
    into calls.
    """

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        slots = method.store.open(
            spec, [budget + method.block for budget in budgets], method.block, method.policy.columns
        )
        super().__init__(method, spec, slots, method.block)
        self.budget = torch.tensor(budgets, dtype=torch.int64)
        self.summary = method.summary.open(spec)
        if self.summary is not None:
            self.shared.update(self.summary.shared)
            self.summary.shared = self.shared
        self.shared.update(method.policy.shared(spec))
        self.memory = method.policy.open(spec, self.shared)
        self.prompt: Tensor | None = None  # tokens per row before the seal, -1 until then; if the policy spares some
        if method.policy.spares != "nothing":
            self.prompt = torch.full((spec.rows,), -1, dtype=torch.int64)
        self.queries: Tensor | None = None  # (rows, g, block, d) of the open block, if the policy needs them
        self.asked = torch.zeros(spec.rows, method.block, dtype=torch.bool)  # True where such a query was really given

    # ---- answering -------------------------------------------------------------------------------------------------

    @property
    def learns_from_queries(self) -> bool:
        """Return True if the policy learns from the queries of the present phase: the prompt, or what follows it."""
        return self._learns(self.sealed)

    def _learns(self, sealed: bool) -> bool:
        """Return True if the policy learns from the queries after the seal (end of the prompt), or else before it.

        A policy that spares the answer evicts nothing more after the seal, so it learns no more. sealed: True asks
        about the queries after the seal.
        """
        policy = self.method.policy
        if sealed and policy.spares == "answer":
            return False
        return policy.wants_weights or policy.wants_queries(sealed)

    @property
    def _selector(self) -> Selector:
        return self.method.selector

    @property
    def _plainly_read(self) -> bool:
        return self.summary is None and isinstance(self._selector, Everything)

    def _rest(self, q: Tensor) -> Partial | None:
        return None if self.summary is None else self.summary.read(q)

    def _on_queries(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        _rows, g, a, _d = q.shape
        if self.summary is not None:
            real = (torch.arange(a) < take.unsqueeze(1))[:, None, :, None]
            padded = not bool(real.all())
            self.summary.on_queries(q.masked_fill(~sent(real, q.device), 0) if padded else q)  # padding may be NaN
        if not self.learns_from_queries or a > self.block:  # taken at once: the policy needs newer queries only
            return
        seen, taken = self.seen.tolist(), take.tolist()
        if min(seen) == max(seen) and min(taken) == max(taken) == a:
            start = seen[0] % self.block
            self._open_queries(g)[:, :, start : start + a] = q
            self.asked.narrow(1, start, a).fill_(True)
            return
        queries = self._open_queries(g)
        row, j = (torch.arange(a) < take.unsqueeze(1)).nonzero(as_tuple=True)
        place = (self.seen % self.block)[row] + j
        self.asked[row, place] = True
        row, j, place = (sent(x, q.device) for x in (row, j, place))
        queries[row, :, place] = q[row, :, j]

    def _on_query(self, q: Tensor, seen: int) -> None:
        if self.learns_from_queries:
            start = seen % self.block
            self._open_queries(q.shape[1])[:, :, start : start + 1] = q

    def _count_query(self, seen: int) -> None:
        if self.learns_from_queries:
            self.asked.narrow(1, seen % self.block, 1).fill_(True)

    def _open_queries(self, g: int) -> Tensor:
        """Return the buffer (rows, g, block, d) of the queries since the last block end; allocate it at first use."""
        if self.queries is None:
            spec = self.spec
            self.queries = torch.zeros(spec.rows, g, self.block, spec.d, dtype=spec.dtype, device=spec.device)
            if self.memory is not None:
                self.memory.group(g)
        return self.queries

    def _reserve(self, g: int, tokens: int | None) -> None:
        super()._reserve(g, tokens)
        if self.selection is not None:
            self.selection.reserve(g)
        if self.learns_from_queries:
            self._open_queries(g)

    def _require_group(self, g: int, attending: bool = False) -> None:
        if attending and self.memory is None:  # such queries go to the policy at once and are not kept
            return
        if self.queries is not None and self.queries.shape[1] != g:
            raise ValueError(f"the GQA group was {self.queries.shape[1]} so far and is {g} now: it is fixed")

    def _attend(self, q: Tensor) -> Partial:
        rows, g, m, d = q.shape
        flat = q.reshape(rows, g * m, d)
        if self.summary is not None:
            self.summary.on_queries(q)
        if self.learns_from_queries and m > 0:
            if self.memory is not None:
                self._open_queries(g)
            made = torch.ones(rows, m, dtype=torch.bool)
            newest = (self.seen - 1).unsqueeze(1).expand(-1, m)
            asked = Queries(q, sent(made, q.device), sent(newest, q.device), given=made)
            self._show_queries(torch.arange(rows), asked, self.slots.held.unsqueeze(1).expand(-1, m))
        return self._read(flat)

    # ---- learning --------------------------------------------------------------------------------------------------

    def _at_once(self, seen: int, left: int) -> int:
        """Return how many of a row's next `left` tokens may be appended in one piece, without a stop at block ends.

        seen: number of tokens that the row saw before. 0 means that the caller must stop at the next block end.
        The result is 0 in each of these cases: the prompt is over; the method evicts tokens before the prompt's end; a
        selector picks the tokens that queries read; the policy needs attention weights or keys. In all other cases it
        depends on the queries that the policy needs:
            none                all `left` tokens
            the newest n only   as many whole blocks as fit before the last n tokens; 0 if the open block has tokens
            all                 0
        """
        policy = self.method.policy
        if self.sealed or not self.method.answers_prompt_exactly:
            return 0
        if policy.wants_weights or policy.wants_keys:
            return 0
        if not policy.wants_queries(self.sealed):
            return left
        if policy.newest_queries is None or seen % self.block:
            return 0
        return max(0, left - policy.newest_queries) // self.block * self.block

    def _show_open_blocks(self) -> None:
        """Pass to the policy the queries, attention weights and keys that it learns from, before the block ends.

        This is called at the end of the prompt, where tokens may be evicted, and before chosen tokens are removed:
        both move tokens to other slots. The queries are those since each row's last block end, with their attention
        weights. The keys are those of each row's newest `block` held tokens.
        """
        every = torch.arange(self.spec.rows)
        self._show_keys(every)
        for fill in (self.seen % self.block).unique().tolist():
            self._show_block(every[(self.seen % self.block) == fill], fill)

    def _show_keys(self, rows: Tensor) -> None:
        """Pass the keys of the newest `block` tokens of these rows to the method `on_keys` of the policy's memory.

        The keys are read from the slots, where an eviction moves them. So call this before the eviction. Do nothing if
        the policy does not learn from keys.
        """
        if self.memory is None or not self.method.policy.wants_keys:
            return
        slot = self.slots.held[rows].unsqueeze(1) - self.block + torch.arange(self.block)
        index = sent(self.slots.offset[rows].unsqueeze(1) + slot.clamp_min(0), self.slots.position.device)
        live = sent(slot >= 0, index.device)
        self.memory.on_keys(rows, self.slots.keys(index).to(self.spec.dtype), self.slots.position[index].long(), live)

    def _show_block(self, rows: Tensor, fill: int) -> None:
        """Pass the queries of the last `fill` tokens of these rows, and their attention weights, to the policy.

        This calls `on_queries` and `on_weights` of the policy. The last `fill` tokens are those since the last block
        end. The weights of a query are over the tokens that were held when the query came.
        """
        rows = rows[self.asked[rows].any(1)]
        if self.queries is None or not len(rows):
            return
        everyone = len(rows) == self.spec.rows
        queries = self.queries if everyone else self.queries[sent(rows, self.queries.device)]
        place, device = torch.arange(self.block), queries.device
        position = (self.seen[rows] - fill).unsqueeze(1) + place
        visible = (self.slots.held[rows] - fill).unsqueeze(1) + place + 1
        made = self.asked[rows]
        asked = Queries(queries, sent(made, device), sent(position, device), given=made)
        self._show_queries(rows, asked, visible)
        if everyone:
            self.asked.zero_()
        else:
            self.asked[rows] = False

    def _show_queries(self, rows: Tensor, asked: Queries, visible: Tensor) -> None:
        """Pass the queries `asked` of these rows to the policy, and store the numbers per slot that the policy returns.

        visible (r, b) is the number of slots, from the row's first on, that each query of `asked` sees. If the spec has
        a rotation, each query is first rotated (RoPE) to the rank of its own token on arrival, i.e. the token's index
        among the held ones. A row's weights are computed from its own queries and held tokens alone. So they round
        alike however the stream was split into calls and whichever rows are in a call.
        """
        policy, width = self.method.policy, int(self.slots.capacity.max())
        every = None if len(rows) == self.spec.rows else rows
        if self.spec.rotation is not None:  # a query's place is its own token's rank among those held when it came
            asked = replace(asked, q=self._turned(asked.q, (visible - 1).clamp(0, width - 1), width), bare=asked.q)
        learnt = policy.on_queries(self._held(every, width), asked) if policy.wants_queries(self.sealed) else {}
        if policy.wants_weights:
            if policy.weights_of == "last":
                asked, place = asked.last()
                visible = visible.gather(1, place)
            learnt = learnt | self._observed(every, asked, visible, width)
        for name, values in learnt.items():
            self.slots.put_column(name, every, values)

    def _observed(self, rows: Tensor | None, asked: Queries, visible: Tensor, width: int) -> dict[str, Tensor]:
        """Compute attention weights, pass them to the policy, and return its new columns: name -> (r, s).

        rows     (r,) the rows that the queries are of; None: all
        asked    the queries (r, g, b, d) whose weights are computed, for one range of slots after another
        visible  (r, b) number of slots, from the row's first on, that each query sees
        width    s, the number of slots to return numbers for
        """
        r, g, b, d = asked.q.shape
        flat, held = asked.q.reshape(r, g * b, d), self._held(rows, width)
        unread = self._unread(rows, flat, sent(visible.repeat(1, g), flat.device), width)
        clear = int(visible.min()) if isinstance(self._selector, Everything) else 0
        made = None if bool(asked.given.all()) else asked.made.view(r, 1, b, 1)
        law = (self.spec.scale, self.spec.softcap)
        parts: list[dict[str, Tensor]] = []
        fill = held.filled
        for at, weights in weights_by_tile(flat, held.k, *law, unread, clear, fill):
            weights = weights.view(r, g, b, -1)
            weights = weights if made is None else weights * made
            parts.append(self.method.policy.on_weights(held.part(at), weights, asked))
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}

    def _unread(self, rows: Tensor | None, q: Tensor, visible: Tensor, width: int) -> Callable[[slice], Tensor]:
        """Return a function from a slice of slots to the mask of those slots that queries q (r, m, d) do not read.

        The mask (r, m, slots of the slice) is True for slots that are not read. Query j of row i reads only slots below
        visible[i, j], and among these only the slots that the selector chose. Slices end at `width` at most.
        rows: (r,) the rows that the queries are of; None: all
        """
        if isinstance(self._selector, Everything):
            slot = torch.arange(width, device=q.device)
            return lambda at: slot[at] >= visible.unsqueeze(-1)
        if self.selection is not None:
            held = sent((self.slots.held if rows is None else self.slots.held[rows]).unsqueeze(1), q.device)
            hide = self.selection.choose(q, self.slots, torch.minimum(visible, held), rows).unread(width)
        else:
            beyond = torch.arange(width, device=q.device) >= visible.unsqueeze(-1)
            chosen = self._selector.hide(q, self.slots.view(rows, width), self.spec, beyond)
            hide = beyond if chosen is None else chosen.expand_as(beyond)
        return lambda at: hide[..., at]

    def _held(self, rows: Tensor | None, width: int) -> Held:
        policy, slots, ids = self.method.policy, self.slots, self.spec.ids()

        def clock(x: Tensor) -> Tensor:
            return sent((x if rows is None else x[rows]).unsqueeze(1), ids.device)

        return Held(
            position=slots.positions(rows, width),
            columns={name: slots.column(name, rows, width) for name in policy.columns},
            seen=clock(self.seen),
            row_ids=ids if rows is None else ids[sent(rows, ids.device)],
            spec=self.spec,
            count=clock(slots.held),
            budget=clock(self.budget),
            filled=(slots.held if rows is None else slots.held[rows]).tolist(),
            fetch=lambda name: slots.numbers(name, rows, width),
            rows=rows,
            prompt=None if self.prompt is None else clock(self.prompt),
            memory=self.memory,
            shared=self.shared,
        )
