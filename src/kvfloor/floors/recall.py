"""Bound how many independent facts can be recalled from a message, such as a model's KV cache. Sizes are in bits.

A fact is a value that is drawn uniformly from `choices` different ones, independently of all other facts and of
everything that the receiver knows. The bounds speak about a model's answers: they hold for any way to keep the cache,
also for one that keeps token ids and recomputes keys and values.
"""

import math

from kvfloor.floors.entropy import H2
from kvfloor.validation import whole, within


def fact_bits(choices: int, p: float) -> float:
    """Return a lower bound on the bits that a message holds about each fact that is recalled from it.

    `p` is the probability that a fact is recalled right, on average over facts, their values, and all random draws.
    Law: log2(choices) - H2(p) - (1-p) log2(choices - 1), where H2 is the binary entropy; 0 for p <= 1/choices, which
    guessing reaches. It is at least p log2(choices) - H2(p).
    Source: Fano's inequality for each fact (docs/floors.md, "Recall"); Jelassi et al. 2024 (arXiv 2402.01032) state
    that a state-space model needs memory in proportion to what it copies.
    """
    choices = whole("choices", choices, least=2)
    p = within("p", p, 0.0, 1.0)
    if p * choices <= 1.0:
        return 0.0
    return max(0.0, math.log2(choices) - H2(p) - (1.0 - p) * math.log2(choices - 1))


def recall_bits(facts: int, choices: int, p: float) -> float:
    """Return a lower bound on the bits of a message from which `facts` facts are recalled.

    Law: facts * fact_bits(choices, p), with `p` as there.
    """
    return whole("facts", facts, least=0) * fact_bits(choices, p)


def most_facts(bits: float, choices: int, p: float) -> float:
    """Return an upper bound on the number of facts that a message of `bits` bits returns with probability `p` each.

    Law: bits / fact_bits(choices, p), with `p` as there; infinite where guessing suffices.
    """
    bits, each = within("bits", bits, 0.0, math.inf), fact_bits(choices, p)
    return bits / each if each else math.inf
