"""Certify how many bits of hidden facts a compressed cache returns, from the model's own predictions.

A fact is a word with a two-digit number, such as "fox 47."; its number is drawn uniformly, independently of everything
else. A model reads facts among filler sentences through a cache, and the cache is told that the prompt ends. Its bytes
are then a message. Each fact is asked from a copy of this cache, so that no question changes the message, and the
model's probability of the right number is a bet on the hidden number. Bets that are won show that the message carried
bits: `kvfloor.game.engine.certificates` has the proof. A sheet is one prompt with its facts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from kvfloor.audit.measure import BATCH_BYTES, CHUNK_SLOTS
from kvfloor.audit.reading import at_16_bits
from kvfloor.core.method import Method, standard_law
from kvfloor.floors.recall import most_facts, recall_bits
from kvfloor.game.engine.certificates import certified, log_loss
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.held import Shares
from kvfloor.hf.intake import SharedPrompt
from kvfloor.methods.grammar import parse
from kvfloor.statistics import wilson_interval
from kvfloor.tasks.lexicon import FULL
from kvfloor.tasks.recall import RECALL
from kvfloor.tasks.sample import Sample, apart
from kvfloor.validation import whole

METHODS = ("exact", "exact:k4v4", "exact:k4v3", "h2o@25%", "snapkv@25%", "sinks@25%", "random@25%")
CHOICES = len(FULL.pairs)
"""Number of values that a fact may have."""

MOST_FACTS = len(FULL.things)
"""Facts of one sheet, at most: each has a word of its own."""

_DOUBTS = tuple(2.0**-i for i in range(1, 9))  # shares of each bet that are spread over all values, tried side by side


@dataclass(frozen=True)
class FactRow:
    """Hold what one setting returned of the facts of all sheets.

    method       the setting
    context      tokens of a sheet, at most
    sheets       number of prompts; facts: number of facts of all of them together
    right        facts whose number was decoded right
    cache_bytes  bytes of the caches of all sheets, after their prompts
    cache_16_bit_bytes  bytes of their compressed layers in a model of 16 bits per number
    gain         bits that the bets won, less those of having several bettors; may be negative
    """

    method: str
    context: int
    sheets: int
    facts: int
    right: int
    cache_bytes: int
    cache_16_bit_bytes: int
    gain: float

    @property
    def hidden_bits(self) -> float:
        """Return the bits of all facts, which is the most that can be certified."""
        return self.facts * math.log2(CHOICES)

    @property
    def certified_bits(self) -> float:
        """Return the bits that the caches carried, at confidence 1 - 2^-20."""
        return certified([self.gain])

    @property
    def bits_per_kib(self) -> float:
        """Return the certified bits per KiB of `cache_16_bit_bytes`, 0 where these are 0."""
        return self.certified_bits / (self.cache_16_bit_bytes / 1024) if self.cache_16_bit_bytes else 0.0

    @property
    def right_interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the share of right facts (Wilson)."""
        return wilson_interval(self.right, self.facts)

    @property
    def needed_bytes(self) -> float:
        """Return the least bytes from which anything returns facts with this share right, on average over facts."""
        return recall_bits(self.facts, CHOICES, self.right / self.facts) / 8

    @property
    def most_facts(self) -> float:
        """Return the most facts that as many bytes could hold."""
        return most_facts(8 * self.cache_bytes, CHOICES, 1.0)

    @property
    def hides_memory(self) -> bool:
        """Return True if more bits came out of the caches than they hold: the method keeps memory elsewhere."""
        return self.certified_bits > 8 * self.cache_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return fields and results for `--json`."""
        names = (
            *("hidden_bits", "certified_bits", "bits_per_kib", "right_interval", "needed_bytes", "most_facts"),
            "hides_memory",
        )
        return vars(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Sheet:
    """Hold a sheet's token ids: its prompt, and per fact its question and its right answer."""

    prompt: list[int]
    asks: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class _Returned:
    """Hold what a cache returned of one sheet: per fact the probability of the right number; how many are likeliest."""

    cache_bytes: int
    cache_16_bit_bytes: int
    bets: list[float]
    right: int


def measure_facts(
    model: Any,
    tokenizer: Any,
    methods: Sequence[str] = METHODS,
    *,
    context: int = 1024,
    facts: int = 32,
    sheets: int = 4,
    seed: int = 0,
    track: Callable[[int, str], None] = lambda total, text: None,
) -> list[FactRow]:
    """Return one row per method: how many facts come back through its cache, and the bits that this certifies.

    model, tokenizer  a model that `kvfloor.hf.prepare` prepared
    methods           texts of methods, each with its budget in tokens, bytes, or as a share of the context
    context           tokens of each prompt, at most; facts: facts of each prompt
    sheets            number of prompts
    seed              decides the facts, and seeds the methods' own randomness
    track             called with the number of all steps, and a line of text, before each
    Raises ValueError for a method that is none, for more facts than fit, and for a tokenizer in which one number's
    tokens are the beginning of another's.
    """
    whole("context", context)
    whole("facts", facts, most=MOST_FACTS)
    whole("sheets", sheets)
    asked = [standard_law(parse(text), "a cache") for text in dict.fromkeys(methods)]

    def encode(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    require_prefix_code([encode(apart(pair)) for pair in FULL.pairs])
    shares: Shares = {}
    found: list[list[_Returned]] = [[] for _ in asked]
    for index in range(sheets):
        text = RECALL.generate(
            seed, index, context, difficulty=facts, questions=facts, count=lambda text: len(encode(text, True))
        )
        sheet = _encoded(text, encode)
        prompt = SharedPrompt(model, [sheet.prompt], CHUNK_SLOTS, asked)
        for method, results in zip(asked, found, strict=True):
            track(sheets * len(asked), f"sheet {index + 1}: {method}")
            results.append(_returned(model, method, sheet, prompt, seed, shares))
    return [_row(method, context, results) for method, results in zip(asked, found, strict=True)]


def require_prefix_code(codes: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if one of the token lists `codes` is the beginning of another one.

    Otherwise the model's probabilities of all of them sum to at most 1, as those of bets must.
    """
    for one, other in pairwise(sorted(map(tuple, codes))):
        if other[: len(one)] == one:
            raise ValueError(
                f"the tokens of one number, {list(one)}, begin those of another one, {list(other)}: no bits can be "
                "certified with this tokenizer"
            )


def gain(probabilities: Sequence[float], choices: int) -> float:
    """Return the bits that bets on hidden values won, less the price of trying several bettors.

    probabilities  per hidden value, the probability that was given to the right one, before it was known
    choices        number of values, which are equally likely
    Each bettor spreads a share of every bet evenly over all values, so that a wrong bet costs little. There are eight
    of them, with the shares 1/2 to 1/256; the best one counts, less log2 of their number.
    """
    return log_loss([sum(math.log2((1 - doubt) * p * choices + doubt) for p in probabilities) for doubt in _DOUBTS])


def _encoded(text: Sample, encode: Callable[..., list[int]]) -> _Sheet:
    questions = text.questions
    return _Sheet(
        encode(text.context, True),
        [encode(question.lead) for question in questions],
        [encode(apart(question.answer)) for question in questions],
    )


def _row(method: Method, context: int, results: Sequence[_Returned]) -> FactRow:
    bets = [p for sheet in results for p in sheet.bets]
    right, size, size_16_bit = (
        sum(getattr(sheet, name) for sheet in results) for name in ("right", "cache_bytes", "cache_16_bit_bytes")
    )
    return FactRow(str(method), context, len(results), len(bets), right, size, size_16_bit, gain(bets, CHOICES))


def _returned(model: Any, method: Method, sheet: _Sheet, prompt: SharedPrompt, seed: int, shares: Shares) -> _Returned:
    cache = CompressedCache(model, method, seed=seed, context=len(sheet.prompt))
    dialogue = Dialogue.start(model, cache, 1)
    prompt.feed(dialogue)
    cache.seal()
    size = cache.bytes["total"]
    bets, right = [], 0
    most = max(1, BATCH_BYTES // max(1, size))
    for start in range(0, len(sheet.asks), most):
        piece = slice(start, start + most)
        for log_p, likeliest in _asked(dialogue, sheet.asks[piece], sheet.answers[piece]):
            bets.append(math.exp(min(0.0, float(log_p.double().sum()))))
            right += bool(likeliest.all())
    return _Returned(size, at_16_bits(model, cache, len(sheet.prompt), shares), bets, right)


def _asked(
    dialogue: Dialogue, asks: list[list[int]], answers: list[list[int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ask each question from a copy of the dialogue, and return its answer's scores as `Dialogue.score` does."""
    cache = copy.deepcopy(dialogue.cache)
    cache.batch_repeat_interleave(len(asks))
    alone = Dialogue(dialogue.model, cache, dialogue.mask.repeat_interleave(len(asks), 0))
    alone.feed(asks)
    return alone.score(answers)
