"""Implement one layer of a `VerifiedCache`: transformers' cache-layer protocol over two memories of the tokens.

A forward is of one of three kinds, its phase. A prompt is answered exactly, and its tokens are committed at once: the
layer's memories take them in. A drafted token is answered from the bounded state. A verification answers several
tokens, the drafted ones among them, from the exact state. The tokens of the last two are uncommitted: the layer holds
their keys and values until `commit` or `drop`. A row is one (batch item, kv head). In shapes, B is the batch, H and Hkv
the numbers of query heads and kv heads, n the number of new slots, d and dv the widths of a key and of a value.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvfloor.core.exact import Exact
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.hf import latent, precision
from kvfloor.hf.answering import marked
from kvfloor.hf.masks import LazyMask, SlotCount, refuse_other_rules
from kvfloor.hf.opener import Opening
from kvfloor.hf.replaced import refuse_other_attention
from kvfloor.hf.rows import present_rows
from kvfloor.hf.verified.both import ExactAndBounded
from kvfloor.hf.verified.window import WindowTokens


@dataclass
class Phase:
    """Hold what the layers of one cache share: the kind of the running forward, and how many slots it has behind it.

    kind   None between forwards
    slots  columns of the padded batch before this forward's
    taken  number of layers that have changed in the running prompt
    """

    kind: Literal["prompt", "draft", "verify"] | None = None
    slots: int = 0
    taken: int = 0


class VerifiedLayer(CacheLayerMixin):
    """Answer a layer's queries from the bounded state while drafting, and from the exact state otherwise.

    index, place  index of the layer in the model, and among those with attention over all tokens
    window        tokens that a query attends to at most, in a sliding-window layer; None: all
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, opening: Opening, index: int, place: int, window: int | None, phase: Phase) -> None:
        super().__init__()
        self.opening, self.index, self.place, self.window, self.phase = opening, index, place, window, phase
        self.tokens: ExactAndBounded | WindowTokens | None = None
        self.batch = 0
        self.served_by: weakref.ref[torch.nn.Module] | None = None
        self.room: int | None = None
        self.waiting = False  # keys came, and were not answered yet
        self._side: tuple[Tensor, Tensor] | None = None  # keys and values of the drafted tokens
        self._verified: tuple[Tensor, Tensor, Tensor] | None = None  # queries, keys and values

    # ---- transformers' protocol ----------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return this forward's `key_states` and `value_states` (B, Hkv, n, .), marked as this layer's.

        Nothing is stored yet: kvfloor's attention function recognises the mark on the keys and calls `answer`.
        """
        self._require_phase()
        if not self.place:  # the attention function is one for all layers of a forward
            refuse_other_attention(self.served_by)
        self.expect(key_states.shape[0])
        self.is_initialized = self.waiting = True
        keys = marked(key_states, self)
        latent.remember_update(keys, value_states)
        return keys, value_states

    def _require_phase(self) -> None:
        if self.phase.kind is None:
            raise ValueError(
                "a VerifiedCache is used by kvfloor.hf.generate_verified alone, which tells it what a forward is for: "
                "give generate() a CompressedCache"
            )

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of slots before the running forward."""
        return self.phase.slots

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (slots, 0): the number of slots that the attention mask covers, and the index of the first of them.

        query_length: the number of new slots; before transformers 5.3, a tensor of their positions.
        """
        self._require_phase()
        n = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return SlotCount(self.phase.slots + n, self), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name until transformers 5.12

    def reset(self) -> None:
        self.tokens, self.batch = None, 0
        self.drop()

    # ---- what the attention function asks ------------------------------------------------------------------

    def expect(self, batch: int) -> None:
        """Raise ValueError unless the layer is empty or holds `batch` batch items."""
        if self.tokens is not None and batch != self.batch:
            raise ValueError(f"this cache holds a batch of {self.batch} and cannot go on with one of {batch}")

    def refuse_rule(self, mask: LazyMask) -> None:
        """Raise ValueError unless the mask is causal, or that of this layer's sliding window, possibly with padding."""
        if self.window is None:
            refuse_other_rules(mask)
        elif mask.window != self.window:
            raise ValueError(
                f"layer {self.index} has a window of {self.window} tokens in the configuration, and the model made a "
                f"mask of {mask.window}: its drafts cannot be verified"
            )

    def unstage(self) -> None:
        self.waiting = False

    def answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        scale: float,
        softcap: float | None,
        sink: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the attention output (B, n, H, dv) of the queries, by the rule of the running forward's phase.

        query       (B, H, n, d)
        key, value  (B, Hkv, n, .), the keys and values that this forward's `update` returned
        padding     bool (B, slots), True where a slot holds a real token; None if all do. Used for prompts only
        scale       the factor on q.k; softcap: the cap on logits, or None
        sink        one logit per query head (H,) that takes its share of the softmax and has no value; None without
        positions   not used
        """
        del positions
        (batch, heads, n, d), kv_heads, dv = query.shape, key.shape[1], value.shape[-1]
        g, rows = heads // kv_heads, batch * kv_heads
        if self.tokens is None:
            self.tokens = self._opened(key, dv, g, scale, softcap, value is key)
            self.batch = batch
        dtype = query.dtype
        query, key, value = precision.one_dtype(self._dtype, None, query, key, value)
        q, k = query.reshape(rows, g, n, d), key.reshape(rows, n, d)
        v = k if value is key else value.reshape(rows, n, dv)
        if self.phase.kind == "prompt":
            present = present_rows(padding, slice(self.phase.slots, self.phase.slots + n), kv_heads)
            self.phase.taken += 1
            part = self.tokens.take(q, k, v, present)
        elif self.phase.kind == "draft":
            self._side = (k, v) if self._side is None else _longer(self._side, k, v)
            part = self.tokens.attend(q, *self._side, drafting=True)
        else:
            self._verified = q, k, v
            part = self.tokens.attend(q, k, v, drafting=False)
        self.waiting = False
        if sink is not None:
            by_head = sink.detach().to(part.log_mass.dtype).view(1, kv_heads, g, 1).expand(batch, -1, -1, n)
            part = part.merge(Partial(torch.zeros_like(part.mean), by_head.reshape(part.log_mass.shape)))
        out = part.mean.to(dtype).view(batch, kv_heads, g, n, dv).permute(0, 3, 1, 2, 4)
        return out.reshape(batch, n, heads, dv).contiguous()

    @property
    def _dtype(self) -> torch.dtype | None:
        held = self.tokens
        if held is None:
            return None
        return held.spec.dtype if isinstance(held, WindowTokens) else held.exact.spec.dtype

    def _opened(
        self, key: Tensor, dv: int, g: int, scale: float, softcap: float | None, tied: bool
    ) -> ExactAndBounded | WindowTokens:
        """Return the layer's empty memories, for keys (B, Hkv, n, d) and values of width dv."""
        if self.window is not None:
            rows = key.shape[0] * key.shape[1]
            return WindowTokens(Spec(rows, key.shape[-1], dv, scale, softcap, key.dtype, key.device), self.window)
        bounded = self.opening.open(self.index, self.place, key, dv, g, scale, softcap, tied)
        exact = Opening(Exact(), self.opening.layers).open(self.index, self.place, key, dv, g, scale, softcap, tied)
        return ExactAndBounded(exact, bounded)

    # ---- what generate_verified asks -----------------------------------------------------------------------

    def drop(self) -> None:
        """Forget all uncommitted tokens."""
        self._side = self._verified = None
        self.waiting = False

    def drop_drafts(self) -> None:
        """Forget the drafted tokens; those of a verification stay."""
        self._side = None

    def commit(self, count: Tensor) -> None:
        """Append the first count[b] tokens of the verified ones to the memories of batch item b; forget the others."""
        if self._verified is None or self.tokens is None:
            raise RuntimeError(f"layer {self.index} has no verified tokens to commit")
        q, k, v = self._verified
        most, least = int(count.max()), int(count.min())
        tied = v is k
        q, k = q[:, :, :most], k[:, :most]
        v = k if tied else v[:, :most]
        present = None
        if least < most:
            present = (torch.arange(most) < count.unsqueeze(1)).repeat_interleave(k.shape[0] // self.batch, 0)
            present = present.to(k.device)
        self.drop()
        if most:
            self.tokens.commit(q, k, v, present)


def _longer(held: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Append the tokens k (rows, n, d), v (rows, n, dv) to those held; one tensor stays one, if values are keys."""
    keys = torch.cat([held[0], k], 1)
    return keys, keys if held[1] is held[0] else torch.cat([held[1], v], 1)
