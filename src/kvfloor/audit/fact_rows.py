"""Hold how many hidden facts come back through a cache: a row per setting and sheet, and a summary over sheets.

A fact is a word with a two-digit number that is drawn uniformly; a sheet is one prompt with its facts
(`kvfloor.audit.facts` measures). A setting is a method with its budget. The setting `exact` keeps every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvfloor.floors.recall import most_facts, recall_bits
from kvfloor.game.engine.certificates import certified, log_loss
from kvfloor.statistics import wilson_interval
from kvfloor.tasks.lexicon import FULL

CHOICES = len(FULL.pairs)
"""Number of values that a fact may have."""

_DOUBTS = tuple(2.0**-i for i in range(1, 9))  # shares of each bet that are spread over all values, tried side by side


class FactSheet(NamedTuple):
    """Identify a sheet by the tokens of its prompt (at most), its number of facts, and its number in the audit.

    Sheets are numbered from 1.
    """

    context: int
    facts: int
    sheet: int

    def __str__(self) -> str:
        return f"sheet {self.sheet} of {self.facts} facts, {self.context:,} tokens of context"


@dataclass(frozen=True)
class SheetRow:
    """Record what one setting returned of one sheet.

    method               the setting as text, e.g. `h2o@256`
    baseline             True for the settings that every audit compares with
    context, facts       most tokens of the prompt, number of its facts
    sheet                number of the sheet, from 1
    bets                 per fact, the probability that the model gave to the tokens of the right number
    right                per fact, 1 if these tokens were the likeliest ones, else 0
    cache_bytes          bytes of the cache after the prompt, of all ranks; the message that facts are asked from
    cache_16_bit_bytes   bytes of its compressed layers in a model of 16 bits per number
    token_id_bytes       bytes of the prompt's token ids, from which a model could recompute the cache
    """

    method: str
    baseline: bool
    context: int
    facts: int
    sheet: int
    bets: tuple[float, ...]
    right: tuple[int, ...]
    cache_bytes: int
    cache_16_bit_bytes: int
    token_id_bytes: int

    def __post_init__(self) -> None:
        where = f"row {self.method!r} on {self.cell}"
        if self.facts < 1 or {len(self.bets), len(self.right)} != {self.facts}:
            raise ValueError(f"{where}: give one bet and one outcome for each of the {self.facts} facts")
        if not all(0.0 <= p <= 1.0 for p in self.bets):
            raise ValueError(f"{where}: a bet is no probability; the model's logits are broken")

    @property
    def cell(self) -> FactSheet:
        return FactSheet(self.context, self.facts, self.sheet)

    @property
    def only_guesses(self) -> bool:
        """Return True if no more facts came back right than guesses would explain (Wilson, 95 %)."""
        return wilson_interval(sum(self.right), self.facts)[0] <= 1 / CHOICES


@dataclass(frozen=True)
class FactRow:
    """Hold what one setting returned of the facts of all sheets of one context length.

    method       the setting
    context      tokens of a sheet, at most
    sheets       number of prompts; facts: number of facts of all of them together
    right        facts whose number was decoded right
    cache_bytes  bytes of the caches of all sheets, after their prompts
    cache_16_bit_bytes  bytes of their compressed layers in a model of 16 bits per number
    gain         bits that the bets won, less those of having several bettors; may be negative
    token_id_bytes  bytes of the token ids of all prompts
    baseline     True for the settings that every audit compares with
    """

    method: str
    context: int
    sheets: int
    facts: int
    right: int
    cache_bytes: int
    cache_16_bit_bytes: int
    gain: float
    token_id_bytes: int = 0
    baseline: bool = False

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
    def most_facts_of_token_ids(self) -> float:
        """Return the most facts that the prompts' token ids could hold, from which a model could recompute the cache.

        The facts are in the prompts, so this is at least their number wherever a prompt's tokens are not too few.
        """
        return most_facts(8 * self.token_id_bytes, CHOICES, 1.0)

    @property
    def hides_memory(self) -> bool:
        """Return True if more bits came out of the caches than they hold: the method keeps memory elsewhere."""
        return self.certified_bits > 8 * self.cache_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return fields and results for `--json`."""
        names = (
            *("hidden_bits", "certified_bits", "bits_per_kib", "right_interval", "needed_bytes", "most_facts"),
            *("most_facts_of_token_ids", "hides_memory"),
        )
        return vars(self) | {name: getattr(self, name) for name in names}


def gain(probabilities: Sequence[float], choices: int) -> float:
    """Return the bits that bets on hidden values won, less the price of trying several bettors.

    probabilities  per hidden value, the probability that was given to the right one, before it was known
    choices        number of values, which are equally likely
    Each bettor spreads a share of every bet evenly over all values, so that a wrong bet costs little. There are eight
    of them, with the shares 1/2 to 1/256; the best one counts, less log2 of their number.
    """
    return log_loss([sum(math.log2((1 - doubt) * p * choices + doubt) for p in probabilities) for doubt in _DOUBTS])


def fact_summary(rows: Sequence[SheetRow]) -> FactRow:
    """Summarise one setting's rows of one context length, one per sheet. Raises ValueError for other rows."""
    if len({(row.method, row.context) for row in rows}) != 1:
        raise ValueError("summarise the rows of one setting and context at a time")
    first, bets = rows[0], [p for row in rows for p in row.bets]
    return FactRow(
        method=first.method,
        context=first.context,
        sheets=len(rows),
        facts=len(bets),
        right=sum(sum(row.right) for row in rows),
        cache_bytes=sum(row.cache_bytes for row in rows),
        cache_16_bit_bytes=sum(row.cache_16_bit_bytes for row in rows),
        gain=gain(bets, CHOICES),
        token_id_bytes=sum(row.token_id_bytes for row in rows),
        baseline=first.baseline,
    )


def fact_summaries(rows: Iterable[SheetRow]) -> list[FactRow]:
    """Return one summary per setting and context length, in the order of the rows' contexts and settings."""
    groups: dict[tuple[int, str], list[SheetRow]] = {}
    for row in rows:
        groups.setdefault((row.context, row.method), []).append(row)
    return [fact_summary(groups[key]) for key in sorted(groups, key=lambda key: key[0])]
