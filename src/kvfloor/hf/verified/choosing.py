"""Turn logits into scores or probabilities by transformers' own logits processors, alike for drafts and targets.

In shapes, B is the batch, n the number of positions, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


class Choosing:
    """Score the tokens that may come next, by processors that look at the tokens so far and by sampling settings.

    processors   transformers' logits processors, called as (token ids (1, length), scores (1, V)), item by item: a
                 batch item's padding is never among the ids
    temperature  divides the scores; top_k: number of likeliest tokens kept, 0 for all; top_p: least share of
                 probability that the kept likeliest tokens have together
    """

    def __init__(self, processors: Sequence[Any] = (), temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
        self._processors = list(processors)
        self._warpers: list[Any] = []  # in the order of generate()
        if temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(top_p))

    def scores(self, logits: Tensor, histories: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
        """Return the processed logits (B, n, V) of float32 logits (B, n, V).

        histories  token ids of each batch item before `tokens`
        tokens     (B, n) token ids: logits i are those after the first i + 1 of them
        """
        if not self._processors:
            return logits
        logits = logits.clone()
        for row, (history, new) in enumerate(zip(histories, tokens.tolist(), strict=True)):
            ids = torch.tensor([[*history, *new]], device=logits.device)
            for i in range(logits.shape[1]):
                score = logits[row : row + 1, i]
                for process in self._processors:
                    score = process(ids[:, : len(history) + i + 1], score)
                logits[row, i] = score[0]
        return logits

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities (B, n, V) to sample from, for scores (B, n, V)."""
        flat = scores.flatten(0, 1)
        for warp in self._warpers:
            flat = warp(None, flat)
        return torch.softmax(flat, -1).view(scores.shape)
