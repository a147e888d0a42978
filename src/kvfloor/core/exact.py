"""Keep every token: exact attention as the reference, optionally with a selector of the tokens that a query reads.

A slot is the place of one held token. A row is one (batch item, kv head) stream, a block `block` consecutive tokens of
a row. A selector's index, if it keeps one, is what it stores about the held keys to find those of large logit. To pin a
token is to protect it from eviction; to forget a token is to drop it on request.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.blocked import Blocked
from kvfloor.core.fields import require_equal
from kvfloor.core.method import Guarantee, Method, Parts, Traits, lossy, part_text
from kvfloor.core.selector import Everything, Indexed, Selector
from kvfloor.core.spec import Spec
from kvfloor.core.state import ANEW
from kvfloor.core.store import Full, Store

_FIRST_SLOTS = 64
_QUERIES_AT_ONCE = 256  # bounds the mask and the logits of a long chunk


@dataclass(frozen=True)
class Exact(Method):
    """Keep all keys and values; a query attends exactly to the tokens that a selector chooses, by default to all."""

    name: ClassVar[str] = "exact"
    paper: ClassVar[str] = "Vaswani et al. 2017"
    selector: Selector = field(default_factory=Everything)
    store: Store = field(default_factory=Full)

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector):
            raise TypeError(f"exact: selector must be a Selector, got {self.selector!r}")
        if not isinstance(self.store, Store):
            raise TypeError(f"exact: store must be a Store, got {self.store!r}")

    @property
    def traits(self) -> Traits:
        traits = Traits(constant_memory=False, pins=True, turns=not isinstance(self.selector, Indexed))
        return traits if self.store.plain else lossy(traits)

    @property
    def parts(self) -> Parts:
        return Parts(selector=self.selector, store=self.store)

    def open(self, spec: Spec) -> ExactState:
        return ExactState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del n, prompt, pinned
        return None

    def with_error(self, epsilon: float) -> Exact | None:
        del epsilon  # the error is 0
        return self if self.store.plain and isinstance(self.selector, Everything) else None

    def guarantee(self, spec: Spec) -> Guarantee | None:
        del spec
        if not isinstance(self.selector, Everything) or not self.store.plain:
            return None
        return Guarantee(0.0, 0.0, "max norm, up to rounding", "every query", (), "the definition of attention")

    def __str__(self) -> str:
        text = "exact" if isinstance(self.selector, Everything) else f"exact|{part_text(self.selector)}"
        return text if self.store.plain else f"{text}:{self.store}"

    def with_store(self, store: Store) -> Exact:
        return replace(self, store=store)


class ExactState(Blocked[Method]):
    """Keep every token in slots, whose storage grows by a quarter whenever it is full.

    The method has a selector and a store among its parts: it is `Exact`, or another name for it.
    Nothing is evicted at the end of a block. Here a block is the most tokens whose queries are answered in one matrix
    product; if the selector keeps an index, the index is updated at block ends.
    """

    def __init__(self, method: Method, spec: Spec) -> None:
        selector, store = method.parts.selector, method.parts.store
        assert selector is not None and store is not None
        block = selector.block() if isinstance(selector, Indexed) else None
        block = block or store.block(_QUERIES_AT_ONCE)
        slots = store.open(spec, [_FIRST_SLOTS] * spec.rows, block, lose=False)
        super().__init__(method, spec, slots, block, in_order=True)

    @property
    def _selector(self) -> Selector:
        selector = self.method.parts.selector
        assert selector is not None
        return selector

    @property
    def _plainly_read(self) -> bool:
        return isinstance(self._selector, Everything)

    def guarantee(self) -> Guarantee | None:
        stated = super().guarantee()
        return self.slots.guarantee() if stated is None and self._plainly_read else stated

    def _close(self, rows: Tensor | None) -> None:
        """Do nothing at the end of a block in these rows: no token is ever evicted."""

    def _reserve(self, g: int, tokens: int | None) -> None:
        if tokens is None or self.selection is not None:
            super()._reserve(g, tokens)
        else:
            self.slots.resize(torch.full_like(self.slots.capacity, tokens))

    def _pin(self, start: int, stop: int) -> None:
        """Do nothing for positions start .. stop - 1: no token is ever evicted, so every span is pinned."""

    def _require_forgettable(self, row: Tensor, position: Tensor) -> None:
        del row, position
        if self.selection is not None:
            raise ValueError(f"{self.method} indexes its tokens in their order, so it cannot drop some of them: {ANEW}")
        if self.spec.rotation is not None and self.slots.bare is None:
            raise ValueError(
                f"{self.method} has turned its keys to their places among all tokens, so it cannot drop some: {ANEW}"
            )

    def _forget(self, row: Tensor, position: Tensor) -> None:
        self.slots.evict(self.slots.find(row, position))

    def _at_once(self, seen: int, left: int) -> int:
        del seen
        return left if self.selection is None and self.slots.plain else 0

    @property
    def bytes_read(self) -> int:
        return self.slot_bytes_read

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        held, seen = fields["slots"]["held"], fields["seen"]
        if self.selection is not None or bool((held >= seen).all()):  # no token was dropped by `forget`
            require_equal(held, seen, "tokens held")
            order = torch.cat([torch.arange(n) for n in seen.tolist()])
            require_equal(fields["slots"]["position"], order, "positions")
