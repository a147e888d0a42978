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

from kvfloor.audit.fact_rows import FactRow, FactSheet, SheetRow, fact_summary
from kvfloor.audit.measure import BATCH_BYTES, CHUNK_SLOTS
from kvfloor.audit.reading import at_16_bits
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.core.method import standard_law
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.held import Shares
from kvfloor.hf.intake import SharedPrompt
from kvfloor.methods.grammar import parse
from kvfloor.tasks.lexicon import FULL
from kvfloor.tasks.recall import RECALL
from kvfloor.tasks.sample import Sample, apart
from kvfloor.validation import whole

METHODS = ("exact", "exact:k4v4", "exact:k4v3", "h2o@25%", "snapkv@25%", "sinks@25%", "random@25%")
MOST_FACTS = len(FULL.things)
"""Facts of one sheet, at most: each has a word of its own."""

USUAL_FACTS = 32
"""Facts of one sheet of an audit, where its context has room for them."""

_TOKENS_PER_FACT = 16  # of a context; shorter ones have fewer facts
_FEWEST_TOKENS = 64  # of a context in which an audit hides facts


@dataclass(frozen=True)
class Sheet:
    """Hold a sheet's token ids: its prompt, and per fact its question and its right answer."""

    cell: FactSheet
    prompt: list[int]
    asks: list[list[int]]
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        """Return the number of tokens that one setting reads."""
        return sum(map(len, (self.prompt, *self.asks, *self.answers)))


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
    asked = [BudgetedMethod(standard_law(parse(text), "a cache")) for text in dict.fromkeys(methods)]
    shares: Shares = {}
    found: list[list[SheetRow]] = [[] for _ in asked]
    for sheet in fact_sheets(tokenizer, context, facts, sheets, seed):
        prompt = SharedPrompt(model, [sheet.prompt], CHUNK_SLOTS, [one.method for one in asked])
        for setting, rows in zip(asked, found, strict=True):
            track(sheets * len(asked), f"sheet {sheet.cell.sheet}: {setting.text}")
            rows.append(sheet_row(model, setting, sheet, prompt, seed, shares))
    return [fact_summary(rows) for rows in found]


def fact_sheets(tokenizer: Any, context: int, facts: int, sheets: int, seed: int) -> list[Sheet]:
    """Return `sheets` sheets of `facts` facts in at most `context` tokens, from the seed.

    Raises ValueError for more facts than fit, and for a tokenizer in which one number's tokens are the beginning of
    another's.
    """

    def encode(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    require_prefix_code([encode(apart(pair)) for pair in FULL.pairs])
    made = []
    for index in range(sheets):
        text = RECALL.generate(
            seed, index, context, difficulty=facts, questions=facts, count=lambda text: len(encode(text, True))
        )
        made.append(_encoded(FactSheet(context, facts, index + 1), text, encode))
    return made


def audited_sheets(tokenizer: Any, contexts: Sequence[int], sheets: int, seed: int) -> tuple[list[Sheet], str]:
    """Return (the sheets of an audit, a sentence for its report on those that it does not have, or "").

    Each context of 64 tokens or more has `sheets` of them, with 32 facts (`USUAL_FACTS`) or one per 16 tokens. A
    tokenizer with which nothing can be certified has none.
    """
    lengths = [context for context in contexts if context >= _FEWEST_TOKENS] if sheets else []
    try:
        found = [
            sheet
            for context in lengths
            for sheet in fact_sheets(tokenizer, context, min(USUAL_FACTS, context // _TOKENS_PER_FACT), sheets, seed)
        ]
    except ValueError as error:
        return [], f"No facts were hidden: {error}."
    return found, ""


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


def _encoded(cell: FactSheet, text: Sample, encode: Callable[..., list[int]]) -> Sheet:
    questions = text.questions
    return Sheet(
        cell,
        encode(text.context, True),
        [encode(question.lead) for question in questions],
        [encode(apart(question.answer)) for question in questions],
    )


def sheet_row(
    model: Any, setting: BudgetedMethod, sheet: Sheet, prompt: SharedPrompt, seed: int, shares: Shares
) -> SheetRow:
    """Return what a setting returns of a sheet: each fact is asked from a copy of the cache after the prompt.

    prompt  feeds the sheet's prompt to the cache of any method
    seed    seed of the method's random draws
    shares  results of earlier calls for this model (`at_16_bits`); the call adds its own
    """
    cache = CompressedCache(model, setting.method, seed=seed, context=len(sheet.prompt))
    dialogue = Dialogue.start(model, cache, 1)
    prompt.feed(dialogue)
    cache.seal()
    size = math.ceil(cache.bytes["total"])
    bets: list[float] = []
    right: list[int] = []
    most = max(1, BATCH_BYTES // max(1, size))
    for start in range(0, len(sheet.asks), most):
        piece = slice(start, start + most)
        for log_p, likeliest in _asked(dialogue, sheet.asks[piece], sheet.answers[piece]):
            bets.append(math.exp(min(0.0, float(log_p.double().sum()))))
            right.append(int(likeliest.all()))
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return SheetRow(
        setting.text,
        setting.baseline,
        *sheet.cell,
        bets=tuple(bets),
        right=tuple(right),
        cache_bytes=size,
        cache_16_bit_bytes=at_16_bits(model, cache, len(sheet.prompt), shares),
        token_id_bytes=math.ceil(len(sheet.prompt) * math.log2(vocabulary) / 8),
    )


def _asked(
    dialogue: Dialogue, asks: list[list[int]], answers: list[list[int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ask each question from a copy of the dialogue, and return its answer's scores as `Dialogue.score` does."""
    cache = copy.deepcopy(dialogue.cache)
    cache.batch_repeat_interleave(len(asks))
    alone = Dialogue(dialogue.model, cache, dialogue.mask.repeat_interleave(len(asks), 0))
    alone.feed(asks)
    return alone.score(answers)
