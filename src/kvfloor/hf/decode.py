"""Decode greedily from a prepared model and a cache, step by step: feed a context, feed a question, decode the answer.

A prepared model is one that went through `kvfloor.hf.prepare`, so that its attention can use a compressed cache. This
is a plain loop over the model's forward, instead of generate(). So the caller can time each step, inspect the cache in
between, and feed the question after the context was compressed. Batch items of different length are left-padded; the
cache never stores pads.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.weights import input_device


@dataclass
class Dialogue:
    """Hold a batch that is being decoded: its model, its cache, the attention mask over all slots, the last logits.

    A slot is one column of the padded batch. The mask is 1 in slots of real tokens and 0 in pads.
    """

    model: PreTrainedModel
    cache: CompressedCache | Cache
    mask: Tensor  # (batch, slots) int64
    logits: Tensor | None = None  # (batch, vocabulary)

    @classmethod
    def start(cls, model: PreTrainedModel, cache: CompressedCache | Cache, batch: int) -> Dialogue:
        return cls(model, cache, torch.zeros(batch, 0, dtype=torch.int64, device=input_device(model)))

    @torch.inference_mode()
    def feed(self, token_ids: Sequence[Sequence[int]], chunk: int | None = None) -> None:
        """Feed one list of token ids per batch item to the model, left-padded, `chunk` slots per forward.

        With chunk None, all tokens go into one forward. A last chunk of a single slot joins the chunk before it,
        because the cache treats a forward of one slot as the first decoded token.
        """
        batch, real = padded(token_ids)
        width = batch.shape[1]
        cuts = [*range(0, width, chunk or width), width]
        if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:  # a lone token would count as the first decoded one
            del cuts[-2]
        for start, stop in pairwise(cuts):
            self._forward(batch[:, start:stop], real[:, start:stop])

    @torch.inference_mode()
    def score(self, token_ids: Sequence[Sequence[int]], chunk: int = 512) -> list[tuple[Tensor, Tensor]]:
        """Feed one list of token ids per batch item, and score each token given all tokens before it.

        Returns per item of t tokens two CPU tensors: each token's log-probability (t,) float32, and a bool (t,) that
        is True where the token was the likeliest one. Call `feed` first. A forward has at most `chunk` slots, which
        bounds the memory of the logits. Shorter lists are padded at their end, so no tokens can be fed afterwards.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        for tokens, logits in self.predict(token_ids, chunk):
            at = tokens.unsqueeze(-1)
            log_p = (logits.gather(-1, at) - logits.logsumexp(-1, keepdim=True)).squeeze(-1)
            parts.append((log_p.cpu(), (logits.argmax(-1) == tokens).cpu()))
        log_ps, likeliest = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return [(log_ps[row, : len(ids)], likeliest[row, : len(ids)]) for row, ids in enumerate(token_ids)]

    @torch.inference_mode()
    def predict(self, token_ids: Sequence[Sequence[int]], chunk: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
        """Feed one list of token ids per batch item, and yield the logits by which the model predicts them.

        Yields, per chunk of c <= `chunk` slots, (tokens (batch, c) int64, logits (batch, c, vocabulary) float32) on the
        model's device. The logits at a token are the model's output after all tokens before it. Call `feed` first.
        Shorter lists are padded at their end, so no tokens can be fed afterwards.
        """
        assert self.logits is not None
        batch, real = padded(token_ids, side="right")
        for start in range(0, batch.shape[1], chunk):
            tokens = batch[:, start : start + chunk]
            before = self.logits.unsqueeze(1)
            after = self._forward(tokens, real[:, start : start + chunk], every=True)
            yield tokens.to(after.device), torch.cat([before, after[:, :-1]], 1).float()

    @torch.inference_mode()
    def answer(self, most: int, stop: int | Collection[int] | None) -> tuple[list[list[int]], list[float]]:
        """Decode greedily: return the new token ids per batch item, and the milliseconds of each decode step.

        Call `feed` first. An item ends after `most` tokens, or at its first stop token, which is not returned.
        stop: the id of the stop token, several such ids, or None for no stop token. Only the returned tokens enter the
        cache.
        """
        assert self.logits is not None
        batch = self.mask.shape[0]
        stops = torch.tensor([] if stop is None else [stop] if isinstance(stop, int) else sorted(stop))
        done = torch.zeros(batch, dtype=torch.bool)
        said: list[list[int]] = [[] for _ in range(batch)]
        steps_ms: list[float] = []
        for _ in range(most):
            token = self.logits.argmax(-1).cpu()
            done |= torch.isin(token, stops)
            if bool(done.all()):
                break
            for row in (~done).nonzero().flatten().tolist():
                said[row].append(int(token[row]))
            begin = time.perf_counter()
            self._forward(token.unsqueeze(1), (~done).to(torch.int64).unsqueeze(1))
            steps_ms.append((time.perf_counter() - begin) * 1e3)
        return said, steps_ms

    def _forward(self, token_ids: Tensor, real: Tensor, every: bool = False) -> Tensor:
        """Run the model over new slots, token_ids (batch, slots); return the last one's logits (batch, 1, vocabulary).

        real: 1 in slots of tokens, 0 in pads. With `every`, returns the logits after every slot (batch, slots,
        vocabulary). Extends the dialogue's mask by `real`, and stores the last slot's logits in it. Raises RuntimeError
        if the model used another cache than the dialogue's.
        """
        device = input_device(self.model)
        self.mask = torch.cat([self.mask, real.to(device)], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -token_ids.shape[1] :]
        output = self.model(
            input_ids=token_ids.to(device),
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if every else 1,
        )
        if output.past_key_values is not self.cache:
            raise RuntimeError(
                f"{type(self.model).__name__} was given a {type(self.cache).__name__} and used a "
                f"{type(output.past_key_values).__name__}: what is measured would not be what was asked for"
            )
        self.logits = output.logits[:, -1]
        return output.logits


def padded(
    token_ids: Sequence[Sequence[int]], pad: int = 0, side: Literal["left", "right"] = "left"
) -> tuple[Tensor, Tensor]:
    """Pad lists of token ids to one width: return the batch (b, width), int64, and its mask (b, width).

    The mask is 1 in slots of tokens and 0 in pads. pad: the token id in pads. side: where the pads go.
    """
    width = max(len(ids) for ids in token_ids)
    batch = torch.full((len(token_ids), width), pad, dtype=torch.int64)
    real = torch.zeros_like(batch)
    for row, ids in enumerate(token_ids):
        start = width - len(ids) if side == "left" else 0
        batch[row, start : start + len(ids)] = torch.tensor(list(ids), dtype=torch.int64)
        real[row, start : start + len(ids)] = 1
    return batch, real
