"""Compare a method's next-token distributions with the exact cache's on a text, in nats, token by token.

The exact cache keeps every token. The model reads the first part of a text (the context) under the method, and the
cache is told that the prompt ends. Then the model predicts each token of the next part (the continuation) from the true
tokens before it, while the method goes on compressing. The tokens of the continuation are the scored tokens. p is the
exact cache's distribution of a token, q the method's. The definitions are those of llama.cpp's `--kl-divergence`; its
logarithms are natural, so the unit is the nat.

A setting is a method with its budget. A block is a run of about BLOCK_TOKENS (64) scored tokens, whose mean is one
observation of a confidence interval. An audit with a time limit is a race: it judges a setting after every text. Each
such judgement is a look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvfloor.audit.records import read_records, write_records
from kvfloor.statistics import blocks, confidence_of_look, mean_interval

BLOCK_TOKENS = 64
"""Tokens whose mean is one observation of an interval: neighbouring tokens are not independent of each other."""

FIRST_LOOK = 32
"""Blocks of scored tokens that a race needs to call a setting safe: with fewer, an interval is too rough."""

MOST_BYTES = 2**30  # of a nats.jsonl
_DIGITS = 8  # significant digits of a token's figures in the file
_TOKENS_AT_ONCE = 64


class TextCell(NamedTuple):
    """Identify a text by its name, its number of tokens of context, and its number of scored tokens."""

    text: str
    context: int
    continuation: int

    def __str__(self) -> str:
        return f"{self.text}, {self.context:,} tokens of context, {self.continuation:,} scored"


@dataclass(frozen=True)
class TokenFigures:
    """Hold the figures of a method on a text, one entry per scored token.

    kl          KL(p || q), nats: how far the method's distribution is from the exact one
    loss        -log q(token), nats
    exact_loss  -log p(token), nats
    same_top    1 where p and q have the same likeliest token, else 0
    """

    kl: tuple[float, ...]
    loss: tuple[float, ...]
    exact_loss: tuple[float, ...]
    same_top: tuple[int, ...]


def figures(exact: Iterable[Tensor], method: Iterable[Tensor], tokens: Iterable[Tensor]) -> TokenFigures:
    """Return the figures of each scored token, from the logits of the exact cache and of a method on one text.

    The scored tokens come in pieces, i.e. runs of c tokens; all three arguments have the same pieces.

    exact, method  logits (c, vocabulary) of each piece under the exact cache and under the method
    tokens         token ids (c,) of each piece
    All sums are float64.
    """
    parts: list[tuple[Tensor, ...]] = []
    for p_logits, q_logits, ids in zip(exact, method, tokens, strict=True):
        for piece in range(0, len(ids), _TOKENS_AT_ONCE):
            at = slice(piece, piece + _TOKENS_AT_ONCE)
            log_p, log_q = (torch.log_softmax(logits[at].double(), -1) for logits in (p_logits, q_logits))
            chosen = ids[at].unsqueeze(-1)
            parts.append(
                (
                    (log_p.exp() * (log_p - log_q)).nan_to_num_(0.0).sum(-1),  # a probability of 0 adds nothing
                    -log_q.gather(-1, chosen).squeeze(-1),
                    -log_p.gather(-1, chosen).squeeze(-1),
                    (p_logits[at].argmax(-1) == q_logits[at].argmax(-1)).long(),
                )
            )
    kl, loss, exact_loss, same = (torch.cat(column).tolist() for column in zip(*parts, strict=True))
    return TokenFigures(_short(kl), _short(loss), _short(exact_loss), tuple(same))


@dataclass(frozen=True)
class TextRow:
    """Record one setting measured on one text.

    Bytes are of the whole cache: all layers and heads (of all ranks, on a sharded model) of one sequence.

    method                 the setting as text, e.g. `h2o(recent=64)@256`
    configuration          the setting without its budget, e.g. `h2o(recent=64)`
    name                   the setting without budget and arguments, e.g. `h2o`
    budget                 the budget as the user gave it; None without one
    baseline               True for the settings that every audit compares with
    budget_tokens          tokens kept per kv head; None if the budget is not one number
    text                   the text's name
    context, continuation  numbers of tokens of the context and of the scored continuation
    kl                     KL(p || q) of each scored token, nats
    loss, exact_loss       -log q(token) and -log p(token) of each scored token, nats
    same_top               1 for each scored token where p and q have the same likeliest token, else 0
    state_bytes            bytes at the end of the context
    peak_state_bytes       the most bytes at any moment
    exact_bytes            bytes of the exact cache at the end of the context, in the model's own dtype
    state_16_bit_bytes     bytes at the end of the context if the model's dtype had 16 bits; `exact_16_bit_bytes` is the
                           same for the exact cache
    floor_bytes            lower bound on the bytes that any method needs, for worst-case keys and values
    token_id_bytes         bytes of the context's token ids, from which the model could recompute the cache:
                           context x log2(vocabulary) / 8
    seconds                time to read context and continuation, in seconds
    """

    method: str
    configuration: str
    name: str
    budget: str | None
    baseline: bool
    budget_tokens: int | None
    text: str
    context: int
    continuation: int
    kl: tuple[float, ...]
    loss: tuple[float, ...]
    exact_loss: tuple[float, ...]
    same_top: tuple[int, ...]
    state_bytes: int
    peak_state_bytes: int
    exact_bytes: int
    state_16_bit_bytes: int
    exact_16_bit_bytes: int
    floor_bytes: int
    token_id_bytes: int
    seconds: float

    def __post_init__(self) -> None:
        where = f"row {self.method!r} on the text {self.text!r}"
        lists = (self.kl, self.loss, self.exact_loss, self.same_top)
        if self.continuation < 1 or any(len(column) != self.continuation for column in lists):
            raise ValueError(f"{where}: give one figure for each of the {self.continuation} scored tokens")
        if not all(math.isfinite(x) for column in lists for x in column):
            raise ValueError(f"{where}: a figure is not finite; the model's logits are broken")
        if self.exact_bytes < 1 or self.peak_state_bytes < self.state_bytes:
            raise ValueError(f"{where}: exact_bytes = {self.exact_bytes}, peak {self.peak_state_bytes} below the end")

    @property
    def cell(self) -> TextCell:
        return TextCell(self.text, self.context, self.continuation)

    @property
    def loss_change(self) -> tuple[float, ...]:
        """Return log p(token) - log q(token) of each scored token, in nats."""
        return tuple(q - p for q, p in zip(self.loss, self.exact_loss, strict=True))


@dataclass(frozen=True)
class Divergence:
    """Summarise one setting over the scored tokens of all texts.

    kl, kl_low, kl_high          mean KL(p || q), nats per token, and its two-sided confidence interval
    kl_median, kl_999            median and 99.9 % quantile of the tokens' KL
    same_top                     share of tokens whose likeliest next token is the same under p and q
    loss_change                  mean of log p(token) - log q(token): the change in cross-entropy, nats per token;
                                 `loss_low`..`loss_high` is its interval
    perplexity_ratio             exp(loss_change): the method's perplexity over exact's
    tokens                       number of scored tokens
    """

    kl: float
    kl_low: float
    kl_high: float
    kl_median: float
    kl_999: float
    same_top: float
    loss_change: float
    loss_low: float
    loss_high: float
    tokens: int

    @property
    def perplexity_ratio(self) -> float:
        return math.exp(self.loss_change)


def divergence(rows: Sequence[TextRow], confidence: float = 0.95) -> Divergence:
    """Summarise the rows of one setting, one per text.

    The intervals show how far the figures could move on other passages like these. They are computed by resampling the
    blocks of all texts together. Their level is `confidence`. Raises ValueError for rows of several settings, and if
    all texts together have fewer blocks than an interval needs.
    """
    if len({row.method for row in rows}) != 1:
        raise ValueError("summarise the rows of one setting at a time")
    kls = [block for row in rows for block in blocks(row.kl, BLOCK_TOKENS)]
    changes = [block for row in rows for block in blocks(row.loss_change, BLOCK_TOKENS)]
    kl, kl_low, kl_high = mean_interval(kls, confidence)
    change, loss_low, loss_high = mean_interval(changes, confidence)
    every = torch.tensor([x for row in rows for x in row.kl], dtype=torch.float64)
    same = [x for row in rows for x in row.same_top]
    return Divergence(
        kl=kl,
        kl_low=max(0.0, kl_low),
        kl_high=kl_high,
        kl_median=float(every.median()),
        kl_999=float(every.quantile(0.999)),
        same_top=sum(same) / len(same),
        loss_change=change,
        loss_low=loss_low,
        loss_high=loss_high,
        tokens=len(every),
    )


def block_means(rows: Iterable[TextRow]) -> list[float]:
    """Return the mean KL of each block of scored tokens, in nats per token, for one setting's rows in their order."""
    return [total / count for row in rows for total, count in blocks(row.kl, BLOCK_TOKENS)]


def looks(rows: Iterable[TextRow]) -> int:
    """Return how many times a race has judged a setting, given its rows in the order of reading; at least 1.

    A race judges a setting after each text, but only once the texts read so far have FIRST_LOOK blocks together.
    """
    counts = accumulate(len(blocks(row.kl, BLOCK_TOKENS)) for row in rows)
    return max(1, sum(count >= FIRST_LOOK for count in counts))


@dataclass(frozen=True)
class TextSummary:
    """Hold one setting's figures over all texts: its bytes, and its divergence from the exact cache.

    Bytes are those at the end of the context, as means over the texts; the peak alone is a maximum.

    setting             the setting as text, e.g. `h2o@256`
    configuration       the setting without its budget, e.g. `h2o`
    baseline            True for the settings that every audit compares with
    budget_tokens       tokens kept per kv head; None if the budget is not one number
    state_bytes         bytes of the setting's cache; `exact_bytes` is the same for the exact cache
    peak_state_bytes    the most bytes of the setting's cache at any moment, on any text
    state_16_bit_bytes  bytes of the setting's cache if the model's dtype had 16 bits; `exact_16_bit_bytes` is the same
                        for the exact cache
    floor_bytes         lower bound on the bytes that any method needs, for worst-case keys and values
    token_id_bytes      bytes of the context's token ids
    seconds             time to read all texts, in seconds
    texts               number of texts
    figures             KL and other figures of the predictions, over the scored tokens of all texts
    """

    setting: str
    configuration: str
    baseline: bool
    budget_tokens: int | None
    state_bytes: float
    peak_state_bytes: int
    exact_bytes: float
    state_16_bit_bytes: float
    exact_16_bit_bytes: float
    floor_bytes: float
    token_id_bytes: float
    seconds: float
    texts: int
    figures: Divergence


_MEANS = ("state_bytes", "exact_bytes", "state_16_bit_bytes", "exact_16_bit_bytes", "floor_bytes", "token_id_bytes")


def summaries(rows: Sequence[TextRow], racing: bool = False, confidence: float = 0.95) -> list[TextSummary]:
    """Return one summary per setting, in the order of the rows.

    racing      True if the rows are those of a race. Then the intervals are wider, so that they hold with `confidence`
                although a setting may have stopped reading after any text
    confidence  level of the two-sided intervals
    """
    groups: dict[str, list[TextRow]] = {}
    for row in rows:
        groups.setdefault(row.method, []).append(row)
    return [
        TextSummary(
            setting=setting,
            configuration=group[0].configuration,
            baseline=group[0].baseline,
            budget_tokens=group[0].budget_tokens,
            peak_state_bytes=max(row.peak_state_bytes for row in group),
            **{name: sum(getattr(row, name) for row in group) / len(group) for name in _MEANS},
            seconds=sum(row.seconds for row in group),
            texts=len(group),
            figures=divergence(group, confidence_of_look(confidence, looks(group)) if racing else confidence),
        )
        for setting, group in groups.items()
    ]


def write_text_rows(path: Path, rows: Iterable[TextRow]) -> None:
    """Write the rows to a `nats.jsonl` at `path`, one per line; a failed write leaves the file as it was."""
    write_records(path, rows)


def read_text_rows(path: Path) -> list[TextRow]:
    """Read the rows that `write_text_rows` wrote. Raises ValueError naming the file and line that is not a row.

    A file of more than MOST_BYTES raises ValueError too.
    """
    return read_records(path, TextRow, MOST_BYTES, "nats.jsonl", "a row of an audit's texts")


def _short(column: Iterable[float]) -> tuple[float, ...]:
    """Round each value, such as the KL of each scored token, to the significant digits kept in the file (_DIGITS)."""
    return tuple(float(f"{x:.{_DIGITS}g}") for x in column)
