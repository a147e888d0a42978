"""Build token sequences with marked answers, and pad them into batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvfloor.tasks.sample import Question
from kvfloor.tasks.tokenizer import encode, vocabulary

_VOCABULARY = vocabulary()
EOS_ID, PAD_ID, STOP_ID = _VOCABULARY["<eos>"], _VOCABULARY["<pad>"], _VOCABULARY["."]
BY_AGE = ("registers",)  # tasks that ask for the latest of several facts: a single jump in positions would blur it
NEAR = 96  # tokens at the end whose positions `widen` leaves alone


@dataclass(frozen=True)
class Span:
    """Mark tokens `start` to `end` (exclusive) as one answer of task `task`, end-of-text included."""

    task: str
    start: int
    end: int


@dataclass(frozen=True)
class Example:
    """Hold one sequence; the loss is taken over `spans` only."""

    ids: list[int]
    spans: list[Span]


def example(context: str, questions: Sequence[tuple[str, Question]]) -> Example:
    """Join the context and each question with its answer and an end-of-text token into one sequence."""
    ids = encode(context)
    spans: list[Span] = []
    for task, question in questions:
        ids += encode(question.ask, bos=False)
        start = len(ids)
        ids += [*encode(question.answer, bos=False), EOS_ID]
        spans.append(Span(task, start, len(ids)))
    return Example(ids, spans)


@dataclass(frozen=True)
class Batch:
    """Hold padded tensors: `ids`, `positions` (rows, t); `where`, `targets`, `weights` (rows, m).

    where    token index whose logits predict the target
    targets  ids of the answer tokens; those of weight 0 are padding
    spans    for each row its answers, as (task, first column, column after the last)
    """

    ids: torch.Tensor
    positions: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    spans: list[list[tuple[str, int, int]]]


def batch(examples: Sequence[Example], reach: int = 0, rng: random.Random | None = None) -> Batch:
    """Pad `examples` to one length. With `rng`, positions get random gaps, and stay below `reach`."""
    t = max(len(e.ids) for e in examples)
    m = max(sum(s.end - s.start for s in e.spans) for e in examples)
    ids = torch.full((len(examples), t), PAD_ID)
    positions = torch.arange(t).repeat(len(examples), 1)
    where = torch.zeros(len(examples), m, dtype=torch.long)
    targets = torch.full((len(examples), m), PAD_ID)
    weights = torch.zeros(len(examples), m)
    columns: list[list[tuple[str, int, int]]] = []
    for i, e in enumerate(examples):
        ids[i, : len(e.ids)] = torch.tensor(e.ids)
        if rng is not None:
            spread = widen if any(s.task in BY_AGE for s in e.spans) else jump
            positions[i] += spread(rng, e.ids, t, reach)
        at, row = 0, []
        for s in e.spans:
            n = s.end - s.start
            where[i, at : at + n] = torch.arange(s.start - 1, s.end - 1)
            targets[i, at : at + n] = torch.tensor(e.ids[s.start : s.end])
            # between "every token counts the same" and "every answer counts the same"
            weights[i, at : at + n] = n**-0.5
            row.append((s.task, at, at + n))
            at += n
        columns.append(row)
    return Batch(ids, positions, where, targets, weights, columns)


def jump(rng: random.Random, ids: list[int], t: int, reach: int) -> torch.Tensor:
    """Draw offsets (t,) to add to positions: up to three jumps, at sentence ends if the text has any."""
    stops = sentence_ends(ids, t) or list(range(1, t))
    jumps = torch.zeros(t, dtype=torch.long)
    room = rng.randint(0, max(0, reach - t))
    cuts = sorted(rng.sample(stops, min(len(stops), rng.randint(1, 3))))
    for cut in cuts:
        size = rng.randint(0, room)
        jumps[cut] = size
        room -= size
    return jumps.cumsum(0)


def widen(rng: random.Random, ids: list[int], t: int, reach: int) -> torch.Tensor:
    """Draw offsets (t,) to add to positions: an equal gap after every sentence but the last few.

    Equal gaps keep the ratios between the ages of facts.
    """
    stops = [i for i in sentence_ends(ids, t) if i < len(ids) - NEAR]
    jumps = torch.zeros(t, dtype=torch.long)
    if stops:
        jumps[stops] = rng.randint(0, max(0, reach - t) // len(stops))
    return jumps.cumsum(0)


def sentence_ends(ids: list[int], t: int) -> list[int]:
    """List the token indexes below `t` that come right after a full stop."""
    return [i + 1 for i, token in enumerate(ids) if token == STOP_ID and i + 1 < t]
