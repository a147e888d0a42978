"""Read texts under every setting of an audit (method with budget), and compare the predictions with the exact cache's.

An excerpt is the context and the continuation that an audit reads of a text; the scored tokens are those of the
continuation. The exact cache keeps every token. Here it is transformers' own cache with the model's own attention,
without kvfloor, and called the reference. So kvfloor's method `exact` is compared with it like any other method. The
reference's logits are computed once per excerpt and used for all settings. On a sharded model, every rank makes the
same calls, and bytes are those of all ranks together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from kvfloor.audit.measure import CHUNK_SLOTS
from kvfloor.audit.nats import TextRow, TokenFigures, figures
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.audit.texts import Excerpt
from kvfloor.audit.worst_case import worst_case_bytes
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.held import Shares, bytes_at_16_bits
from kvfloor.hf.intake import SharedPrompt


@dataclass(frozen=True)
class Read:
    """Record one setting's reading of an excerpt.

    figures           what is measured at each scored token: KL to the exact cache, losses, same likeliest token
    state_bytes       bytes of the cache at the end of the context
    peak_state_bytes  the most bytes of the cache at any moment
    state_16_bit_bytes  bytes at the end of the context if the model's dtype had 16 bits
    budget_tokens     tokens kept per kv head; None if the budget is not one number
    floor_bytes       lower bound on the bytes that any method needs at the end of the context, for worst-case keys and
                      values
    seconds           time to read context and continuation, in seconds
    """

    figures: TokenFigures
    state_bytes: int
    peak_state_bytes: int
    state_16_bit_bytes: int
    budget_tokens: int | None
    floor_bytes: int
    seconds: float


class Reader:
    """Read excerpts with one model, which `kvfloor.hf.prepare` made ready for compressed caches.

    seed: seed of the random draws of methods.
    """

    def __init__(self, model: Any, seed: int, methods: Sequence[Method] = ()) -> None:
        """Build the reader.

        methods: those that will be measured. Those of them that compress only at the context's end share one run of the
        model over a context, unless the record of the run would be too large.
        """
        self.model, self.seed, self._methods = model, seed, methods
        self._shares: Shares = {}

    def prompt(self, excerpt: Excerpt) -> SharedPrompt:
        """Return an object that feeds the excerpt's context to the cache of any method.

        If some of the reader's `methods` compress only at the context's end, the object records one run of the model,
        and fills their caches from the record. For any other cache the model runs again.
        """
        return SharedPrompt(self.model, [excerpt.context], CHUNK_SLOTS, self._methods)

    def reference(self, excerpt: Excerpt) -> list[tuple[Tensor, Tensor]]:
        """Return the continuation in pieces of c tokens, as (token ids (c,), the exact cache's logits (c, vocabulary)).

        The ids are the text's own tokens, and each token's logits predict it from the tokens before. The logits are
        float32, on the CPU.
        """
        dialogue = Dialogue.start(self.model, DynamicCache(config=self.model.config), 1)
        alone = self.prompt(excerpt)
        return [(tokens.cpu(), logits.cpu()) for tokens, logits in self._predictions(dialogue, excerpt, alone)]

    def read(
        self,
        method: Method,
        excerpt: Excerpt,
        reference: Sequence[tuple[Tensor, Tensor]],
        prompt: SharedPrompt | None = None,
    ) -> Read:
        """Read an excerpt under a method, and compare its predictions with the exact cache's.

        reference  result of `Reader.reference` for this excerpt: the continuation with the exact cache's logits
        prompt     result of `Reader.prompt` for this excerpt: feeds the context to the cache. Calls that are given the
                   same object may share a run of the model. None: this call makes an object of its own
        """
        begin = time.perf_counter()
        cache = CompressedCache(self.model, method, seed=self.seed, context=excerpt.cell.context)
        dialogue = Dialogue.start(self.model, cache, 1)
        sizes: list[int] = []

        def weigh() -> None:
            sizes.extend((math.ceil(cache.nbytes), at_16_bits(self.model, cache, excerpt.cell.context, self._shares)))

        def logits() -> Iterator[Tensor]:
            feeder = prompt or self.prompt(excerpt)
            for _, found in self._predictions(dialogue, excerpt, feeder, weigh):
                yield found.cpu()

        found = figures([exact for _, exact in reference], logits(), [tokens for tokens, _ in reference])
        states = [layer.state for layer in cache.compressed if layer.state is not None]
        budget = getattr(states[0].method, "budget", None) if states else None
        return Read(
            found,
            state_bytes=sizes[0],
            state_16_bit_bytes=sizes[1],
            peak_state_bytes=math.ceil(cache.peak_nbytes),
            budget_tokens=budget if isinstance(budget, int) else None,
            floor_bytes=sum(
                _floor(self.model.config, state.spec, excerpt.cell.context, cache.ranks.count) for state in states
            ),
            seconds=time.perf_counter() - begin,
        )

    @torch.inference_mode()
    def _predictions(
        self, dialogue: Dialogue, excerpt: Excerpt, prompt: SharedPrompt, sealed: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Feed the context, seal the cache (end of the prompt), and yield the continuation in pieces of c tokens.

        A piece is (token ids (c,), logits (c, vocabulary)): the ids are the text's own tokens, and each token's logits
        predict it from the tokens before.

        dialogue  the model with an empty cache
        excerpt   context and continuation
        prompt    object that feeds the excerpt's context to the cache
        sealed    function that is called when the cache has been sealed, before the continuation
        """
        prompt.feed(dialogue)
        if isinstance(dialogue.cache, CompressedCache):
            dialogue.cache.seal()
        sealed()
        for tokens, logits in dialogue.predict([excerpt.continuation], CHUNK_SLOTS):
            yield tokens[0], logits[0]


def at_16_bits(model: Any, cache: CompressedCache, tokens: int, shares: Shares) -> int:
    """Return the bytes that the cache would have, after a context of `tokens` tokens, if the dtype had 16 bits.

    shares: results of earlier calls for this model, by method and length; the call adds its own.
    """
    if model.dtype.itemsize == 2:
        return math.ceil(cache.nbytes)
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    states = [layer.state for layer in cache.compressed if layer.state is not None]
    groups = [heads // (state.spec.rows * cache.ranks.count) for state in states]
    return sum(cache.ranks.gather("bytes at 16 bits", bytes_at_16_bits(states, groups, tokens, shares)))


def _floor(config: PreTrainedConfig, spec: Spec, context: int, ranks: int) -> int:
    """Return a lower bound on the bytes that any method needs for one layer, for worst-case keys and values.

    config   the model's configuration
    spec     sizes of the layer: widths of key and value, and its number of rows, which are this process's kv heads
    context  number of tokens
    ranks    number of processes over which the layer is sharded; each has the same number of kv heads
    """
    return worst_case_bytes(config, context, spec.d, spec.dv, heads=ranks * spec.rows, tied=spec.tied)


def text_row(setting: BudgetedMethod, excerpt: Excerpt, read: Read, exact: tuple[int, int], vocabulary: int) -> TextRow:
    """Build the row of a setting on an excerpt, i.e. the record that an audit writes.

    read         the setting's reading of the excerpt
    exact        bytes of kvfloor's `exact` cache at the end of the context: (in the model's dtype, in a 16-bit dtype)
    vocabulary   number of token ids that the model has
    """
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
        exact_bytes=exact[0],
        state_16_bit_bytes=read.state_16_bit_bytes,
        exact_16_bit_bytes=exact[1],
        floor_bytes=read.floor_bytes,
        token_id_bytes=math.ceil(cell.context * math.log2(vocabulary) / 8),
        seconds=read.seconds,
    )
