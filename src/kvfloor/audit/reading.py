"""Read texts under every setting of an audit (method with budget), and compare the predictions with the exact cache's.

The reference is transformers' own cache with the model's own attention, without kvfloor. So kvfloor's `exact` is
measured against it like any other method. The reference's logits are computed once per excerpt (context and
continuation) and used for all settings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvfloor import floors
from kvfloor.audit.measure import CHUNK_SLOTS
from kvfloor.audit.nats import TextRow, TokenFigures, figures
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.audit.texts import Excerpt
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue


@dataclass(frozen=True)
class Read:
    """Record one setting's reading of an excerpt: its figures per scored token, the cache's bytes, and the time.

    state_bytes    bytes at the end of the context; peak_state_bytes: the most bytes at any moment
    budget_tokens  tokens kept per kv head; None if the budget is not one number
    floor_bytes    bytes that any method needs for worst-case keys and values of the context's length
    """

    figures: TokenFigures
    state_bytes: int
    peak_state_bytes: int
    budget_tokens: int | None
    floor_bytes: int
    seconds: float


class Reader:
    """Read excerpts with one model, which `kvfloor.hf.prepare` made ready for compressed caches."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.seed = model, seed

    def reference(self, excerpt: Excerpt) -> list[tuple[Tensor, Tensor]]:
        """Return the continuation in pieces of c tokens, as (token ids (c,), the exact cache's logits (c, vocabulary)).

        The ids are the text's own tokens, and each token's logits predict it from the tokens before. The logits are
        float32, on the CPU.
        """
        dialogue = Dialogue.start(self.model, DynamicCache(config=self.model.config), 1)
        return [(tokens.cpu(), logits.cpu()) for tokens, logits in self._predictions(dialogue, excerpt)]

    def read(self, method: Method, excerpt: Excerpt, reference: Sequence[tuple[Tensor, Tensor]]) -> Read:
        """Read an excerpt under a method, and compare its predictions with the exact cache's (`reference`)."""
        begin = time.perf_counter()
        cache = CompressedCache(self.model, method, seed=self.seed, context=excerpt.cell.context)
        dialogue = Dialogue.start(self.model, cache, 1)
        sizes: list[int] = []

        def logits() -> Iterator[Tensor]:
            for _, found in self._predictions(dialogue, excerpt, lambda: sizes.append(cache.nbytes)):
                yield found.cpu()

        found = figures([exact for _, exact in reference], logits(), [tokens for tokens, _ in reference])
        states = [layer.state for layer in cache.compressed if layer.state is not None]
        budget = getattr(states[0].method, "budget", None) if states else None
        return Read(
            found,
            state_bytes=math.ceil(sizes[0]),
            peak_state_bytes=math.ceil(cache.peak_nbytes),
            budget_tokens=budget if isinstance(budget, int) else None,
            floor_bytes=math.ceil(sum(_floor(state.spec, excerpt.cell.context, cache.ranks.count) for state in states)),
            seconds=time.perf_counter() - begin,
        )

    @torch.inference_mode()
    def _predictions(
        self, dialogue: Dialogue, excerpt: Excerpt, sealed: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Feed the context, seal the cache (end of the prompt), and yield the continuation in pieces of c tokens.

        A piece is (token ids (c,), logits (c, vocabulary)): the ids are the text's own tokens, and each token's logits
        predict it from the tokens before. `sealed` is called after the seal.
        """
        dialogue.feed([excerpt.context], CHUNK_SLOTS)
        if isinstance(dialogue.cache, CompressedCache):
            dialogue.cache.seal()
        sealed()
        for tokens, logits in dialogue.predict([excerpt.continuation], CHUNK_SLOTS):
            yield tokens[0], logits[0]


def _floor(spec: Spec, context: int, ranks: int) -> float:
    """Return the worst-case floor in bytes of one layer, whose kv heads are the rows of `spec` on each of the ranks."""
    return floors.space(context, spec.d, spec.dv, heads=ranks * spec.rows).bytes


def text_row(setting: BudgetedMethod, excerpt: Excerpt, read: Read, exact_bytes: int, model: Any) -> TextRow:
    """Build the row of a setting on an excerpt, from its reading and the bytes that `exact` has after the context."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    cell, found = excerpt.cell, read.figures
    return TextRow(
        method=setting.text,
        configuration=setting.configuration,
        name=setting.name,
        budget=setting.budget,
        baseline=setting.baseline,
        budget_tokens=read.budget_tokens,
        text=cell.text,
        context=cell.context,
        continuation=cell.continuation,
        kl=found.kl,
        loss=found.loss,
        exact_loss=found.exact_loss,
        same_top=found.same_top,
        state_bytes=read.state_bytes,
        peak_state_bytes=read.peak_state_bytes,
        exact_bytes=exact_bytes,
        exact_16_bit_bytes=exact_bytes * 2 // model.dtype.itemsize,
        floor_bytes=read.floor_bytes,
        token_id_bytes=math.ceil(cell.context * math.log2(vocabulary) / 8),
        seconds=read.seconds,
    )
