"""Define VerifiedCache, which holds a conversation's tokens exactly and in a bounded state, for `generate_verified`.

A committed token is one whose keys and values both memories hold. The prompt's tokens are committed at once, drafted
ones after they were verified. If a prompt or a commit breaks off halfway, some layers have changed and others have not.
The cache is then unusable. A drafted token or a verification that breaks off changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvfloor.core.broken import BrokenState
from kvfloor.core.method import Method
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.families import key_readers, layer_roles, layer_types
from kvfloor.hf.prepare import is_prepared
from kvfloor.hf.ranks import ranks_of
from kvfloor.hf.verified.layer import Phase, VerifiedLayer
from kvfloor.hf.weights import input_device
from kvfloor.hf.wrappers import unwrapped


class VerifiedCache(Cache):
    """Hold tokens exactly and, beside that, by a bounded method, to go on with one conversation in several calls.

    Give it to `generate_verified` in place of a method. Each full-attention layer has an exact state and a state of the
    method; a sliding-window layer has its window once, which drafting and verifying share.

    model    the prepared model
    method   a Method or its text, as for `CompressedCache`
    The other arguments are those of `CompressedCache`: context, seed, requests, budgets, allocate, calibration, pinned.
    Raises TypeError and ValueError naming the argument. Raises ValueError for a model that is not prepared, and for one
    whose layers cannot take back drafted tokens: encoder-decoders, linear or convolution states, chunked attention,
    keys shared between layers, and models sharded by tensor parallelism.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method | str,
        *,
        context: int | None = None,
        seed: int = 0,
        requests: Sequence[int] | None = None,
        budgets: Sequence[int | Sequence[int]] | None = None,
        allocate: Any = None,
        calibration: Sequence[int] | Tensor | None = None,
        pinned: Sequence[tuple[int, int]] = (),
    ) -> None:
        inner = unwrapped(model)
        windows = _windows(inner)
        if not is_prepared(model):
            raise ValueError("this model is not prepared: call kvfloor.hf.prepare(model) first")
        bounded = CompressedCache(
            model,
            method,
            context=context,
            seed=seed,
            requests=requests,
            budgets=budgets,
            allocate=allocate,
            calibration=calibration,
            pinned=pinned,
        )
        self.method = bounded.method
        self.tokens: list[list[int]] = []  # the committed token ids of each batch item
        self._phase, self._broken, self._sealed = Phase(), "", False
        opening, places = bounded.compressed[0].opening, iter(range(len(windows)))
        super().__init__(
            layers=[
                VerifiedLayer(opening, index, next(places) if window is None else -1, window, self._phase)
                for index, window in enumerate(windows)
            ]
        )

    @property
    def verified_layers(self) -> list[VerifiedLayer]:
        """Return the layers, in the model's order."""
        return [layer for layer in self.layers if isinstance(layer, VerifiedLayer)]

    @property
    def hot_bytes(self) -> int:
        """Return the bytes of the bounded states, which drafting reads."""
        return sum(layer.tokens.hot_bytes for layer in self.verified_layers if layer.tokens is not None)

    @property
    def cold_bytes(self) -> int:
        """Return the bytes of the exact states and of sliding windows, which every verification reads."""
        return sum(layer.tokens.cold_bytes for layer in self.verified_layers if layer.tokens is not None)

    def check_whole(self) -> None:
        """Raise BrokenState if a prompt or a commit broke off halfway."""
        if self._broken:
            raise BrokenState(self._broken)

    # ---- forwards ------------------------------------------------------------------------------------------

    def feed(self, model: Any, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Run the model over a prompt, one list of new token ids per batch item; return the logits (B, vocabulary).

        The tokens are committed; the logits are those after each item's last one, in float32. The first prompt is then
        sealed, i.e. methods that compress a prompt do so. Raises BrokenState if an earlier call broke off halfway.
        """
        self.check_whole()
        if not self.tokens:
            self.tokens = [[] for _ in token_ids]
        n = max(map(len, token_ids))
        batch = torch.zeros(len(token_ids), n, dtype=torch.int64)
        real = torch.zeros_like(batch)
        for row, ids in enumerate(token_ids):
            batch[row, n - len(ids) :] = torch.tensor(ids, dtype=torch.int64)
            real[row, n - len(ids) :] = 1
        before = torch.tensor([len(ids) for ids in self.tokens])
        position = (before.unsqueeze(1) + real.cumsum(1) - 1).clamp_min(0)
        mask = torch.cat([_past(before), real], 1)
        try:
            whole = bool(mask.all())
            logits = self._forward(model, "prompt", int(before.max()), batch, position, None if whole else mask)
            if not self._sealed:
                self._phase.taken += 1
                for layer in self.verified_layers:
                    if layer.tokens is not None:
                        layer.tokens.seal()
                self._sealed = True
        except BaseException:
            if self._phase.taken:
                self._broken = _told("a prompt")
            elif not self._sealed:
                self.reset()
            raise
        for held, ids in zip(self.tokens, token_ids, strict=True):
            held.extend(ids)
        return logits[:, -1]

    def draft(self, model: Any, token: Tensor, offset: int) -> Tensor:
        """Run the model over one uncommitted token per batch item (B, 1); return the logits (B, vocabulary) after it.

        offset: number of uncommitted tokens that were drafted from before it.
        """
        return self._forward(model, "draft", *self._places(offset, token))[:, -1]

    def verify(self, model: Any, token_ids: Tensor) -> Tensor:
        """Run the model over uncommitted tokens (B, n), answered exactly; return all logits (B, n, vocabulary)."""
        self.check_whole()
        for layer in self.verified_layers:
            layer.drop()
        return self._forward(model, "verify", *self._places(0, token_ids))

    def commit(self, token_ids: Tensor, count: Tensor) -> None:
        """Commit the first count[b] of the tokens (B, n) of the last verification; the others were never stored.

        If it breaks off, the cache refuses further use.
        """
        count, chosen = count.cpu(), token_ids.tolist()
        self._broken = _told("a commit")
        for layer in self.verified_layers:
            layer.commit(count)
        for held, ids, number in zip(self.tokens, chosen, count.tolist(), strict=True):
            held.extend(ids[:number])
        self._broken = ""

    def drop(self) -> None:
        """Forget all tokens that are not committed."""
        for layer in self.verified_layers:
            layer.drop()

    def reset(self) -> None:
        """Empty the cache; one that became unusable can then be used again."""
        self._broken = _told("reset()")
        for layer in self.verified_layers:
            layer.reset()
        self.tokens, self._sealed = [], False
        self._broken = ""

    def _places(self, offset: int, token_ids: Tensor) -> tuple[int, Tensor, Tensor, Tensor | None]:
        """Return what a forward over uncommitted tokens (B, n) needs, for n tokens after `offset` uncommitted ones.

        It is the number of slots before them, the tokens themselves, their positions (B, n), and the mask over all
        slots. The mask is None if all batch items hold equally many tokens.
        """
        batch, n = token_ids.shape
        before = torch.tensor([len(ids) for ids in self.tokens]) + offset
        past = _past(before)
        mask = None if bool(past.all()) else torch.cat([past, torch.ones(batch, n, dtype=torch.int64)], 1)
        return int(before.max()), token_ids, before.unsqueeze(1) + torch.arange(n), mask

    def _forward(
        self,
        model: Any,
        kind: Literal["prompt", "draft", "verify"],
        slots: int,
        token_ids: Tensor,
        position: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Run the model over token_ids (B, n), and return its logits in float32.

        They are (B, n, vocabulary) for a verification, otherwise (B, 1, vocabulary), of the last slot. slots: columns
        before this forward. Raises RuntimeError if a layer's attention was never asked for, or the model used another
        cache.
        """
        device, phase = input_device(unwrapped(model)), self._phase
        phase.kind, phase.slots, phase.taken = kind, slots, 0
        try:
            output = model(
                input_ids=token_ids.to(device),
                attention_mask=None if mask is None else mask.to(device),
                position_ids=position.to(device),
                past_key_values=self,
                use_cache=True,
                logits_to_keep=0 if kind == "verify" else 1,
            )
        finally:
            phase.kind = None
        unasked = [layer.index for layer in self.verified_layers if layer.waiting or layer.tokens is None]
        if unasked or output.past_key_values is not self:
            raise RuntimeError(
                f"{type(unwrapped(model)).__name__} did not use this cache in layer {(unasked or [0])[0]}, so that no "
                f"draft can be verified: call kvfloor.hf.prepare(model) again"
            )
        return output.logits.float()

    # ---- what it refuses -----------------------------------------------------------------------------------

    def crop(self, *args: Any) -> None:
        _refuse("cropped")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        _refuse("reordered")

    def batch_repeat_interleave(self, repeats: int) -> None:
        _refuse("repeated")

    def batch_select_indices(self, indices: Tensor) -> None:
        _refuse("cut to some of its batch items")


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"a VerifiedCache cannot be {what}: begin with a new one")


def _told(what: str) -> str:
    return f"{what} broke off after some layers of this cache had changed: reset() it, or begin with a new one"


def _past(before: Tensor) -> Tensor:
    """Return the mask (B, slots) of the tokens before a forward: the last before[b] slots of item b are real."""
    slots = int(before.max())
    return (torch.arange(slots) >= slots - before.unsqueeze(1)).to(torch.int64)


def _windows(model: PreTrainedModel) -> list[int | None]:
    """Return, for each layer of the model, the length of its sliding window, or None if it attends to all tokens.

    Raises ValueError naming the family and the reason where drafted tokens cannot be taken back.
    """
    config, family = model.config, model.config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{family} is an encoder-decoder: generate_verified serves models that are decoders alone")
    if ranks_of(model).count > 1:
        raise ValueError("generate_verified serves models on one process, not sharded by tensor parallelism")
    if any(key_readers(config)):
        raise ValueError(f"{family} shares keys between layers, which generate_verified does not serve")
    windows: list[int | None] = []
    for index, (kind, (role, theirs)) in enumerate(zip(layer_types(config), layer_roles(config), strict=False)):
        window = getattr(theirs, "sliding_window", None)
        if role == "full":
            windows.append(None)
        elif kind == "sliding_attention" and isinstance(window, int) and window > 0:
            windows.append(window)
        else:
            raise ValueError(
                f"layer {index} of {family} is of the type {kind!r}: generate_verified serves full and sliding-window "
                f"attention, from whose memory drafted tokens can be left out"
            )
    return windows
