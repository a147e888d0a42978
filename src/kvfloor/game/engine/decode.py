"""Decode the values hidden in a state from its answers to queries, and certify the bits that its message carries.

In the game, Alice hides values in a method's state (the memory of a KV cache) and sends its bytes; Bob restores the
state and queries it.
    row      the dv values that one query reads: a row of the hidden levels (m, dv) and of the answers (m, dv)
    level    hidden value x of 0..2^bits-1, streamed as the number x / (2^bits - 1)
    answer   attention output for one hidden value: near the streamed number, in [0, 1]
    leak     softmax mass on tokens other than the one that the query aims at
    message  the bytes of the state that Alice sends
    gain     bits that the message is shown to carry, before the allowance for chance is subtracted (`certificates`)
A certificate is a rule that turns one decoding into bits that the message provably carries. There are six:
    hard          counts the wrong bits of all rows
    erasure       counts the wrong bits of trusted rows only: those whose answers look reliable
    log-loss      scores the probabilities that the answers give to the hidden levels
    rows          counts the rows that are not answered within the allowed error
    sampled rows  counts the wrong rows in a random sample of rows
    sampled lists  the same, but the rows that are not answered within the allowed error
Decoding uses the answers and the public sizes of the game only.
"""

import dataclasses

import torch
from torch import Tensor

from kvfloor.floors.separation import eps_s, level_eps_s, tau
from kvfloor.game.engine import certificates
from kvfloor.game.engine.predict import predictor_gains

SUCCESS = 0.9  # p of the theorems: the share of rows that must be answered
_ROUNDING = 2.0**-20  # error that float32 arithmetic may add to an answer in [0, 1], also at eta = 0
_BOUNDARY = 1e-6  # of a level: rounding of the ends of a level's range
_BLOCK_BITS = 16
_LARGEST_ANSWER = 0.3  # a row whose largest answer is below it is no spike, whatever its pattern
_OFF_LEVEL = 0.15  # mean distance to the nearest level, in level spacings, from which a row is not trusted
_SPREAD = 0.15  # standard deviation in [0, 1] below which a row is an average of many tokens


def leak_ratio(bits: int, eta: float) -> float:
    """Return the largest ratio (softmax mass on other tokens)/(mass on the queried token) that the game allows.

    The ratio is (1-eta)/4 for single hidden bits, and the lesser of (1-eta)/4 and 2^-(bits+3) for values of more bits.
    eta is the relative error that answers may have.
    """
    return eps_s(eta) if bits == 1 else min(eps_s(eta), level_eps_s(bits))


def nearest_levels(answers: Tensor, bits: int, eta: float) -> Tensor:
    """Decode answers (m, dv) to the hidden levels (m, dv), int64 in [0, 2^bits).

    Level x stands for the value x / (2^bits - 1). Single bits are decoded by a threshold (`tau`): the middle between
    the largest answer to a hidden 0 and the least answer to a hidden 1 that relative error `eta` allows. Values of more
    bits are decoded as the nearest level. An answer that is not finite decodes as level 0.
    """
    answers = torch.nan_to_num(answers.double(), nan=0.0, posinf=0.0, neginf=0.0)
    if bits == 1:
        return (answers > tau(eta, leak_ratio(bits, eta))).long()
    top = 2**bits - 1
    return (answers * top).round().clamp(0, top).long()


def trusted_rows(answers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Find the rows of answers (m, dv) that look like the values of one token, not like an average of many.

    Returns (trusted, levels): which rows are trusted, (m,) bool, and the decoded levels of all rows, (m, dv) int64,
    where level x stands for the value x / (2^bits - 1).
    A trusted row is finite, large enough, close to levels, and not flat: if a token was evicted, the answer to its
    query is an average of other tokens, which is nearly the same number in all dv values. For single bits, a row is
    first divided by its largest answer, because methods that sample tokens return scaled answers.
    """
    answers = answers.double()
    finite = torch.isfinite(answers).all(dim=1)
    answers = torch.nan_to_num(answers, nan=0.0, posinf=0.0, neginf=0.0)
    largest = answers.amax(dim=1, keepdim=True)
    if bits == 1:
        answers = answers / largest.clamp_min(_LARGEST_ANSWER)
    top = 2**bits - 1
    levels = (answers * top).round().clamp(0, top)
    off = (answers * top - levels).abs().mean(dim=1)
    spread = answers.std(dim=1, correction=0)
    trusted = finite & (largest[:, 0] > _LARGEST_ANSWER) & (off < _OFF_LEVEL) & (spread > _SPREAD)
    return trusted, levels.long()


def wrong_bits(decoded: Tensor, hidden: Tensor, bits: int) -> Tensor:
    """Count the bits in which decoded and hidden levels (m, dv) differ, per row: (m,).

    The `bits` bits of a level are those of its Gray code, in which neighbouring levels differ in one bit.
    """
    differing = (decoded ^ (decoded >> 1)) ^ (hidden ^ (hidden >> 1))
    return sum(((differing >> place) & 1).sum(dim=1) for place in range(bits))  # type: ignore[return-value]


def answered_rows(answers: Tensor, hidden: Tensor, bits: int, eta: float) -> Tensor:
    """Mark the rows (m,), bool, of answers (m, dv) that count as right at an allowed relative error eta.

    hidden (m, dv) has the hidden levels, of `bits` bits each. With one bit, a row is right if all its answers decode to
    the hidden levels. With more bits, exact attention is bounded first. Let x in [0, 1] be the hidden value. Let l be
    the largest ratio (softmax mass on other tokens)/(mass on the queried token) that the game allows (`leak_ratio`).
    The share of all mass that is on other tokens is then at most l, and their values lie in [0, 1] too. So exact
    attention lies between a = (1-l) x and b = x + l (1-x). A row is right if every answer lies in [(1-eta) a, (1+eta)
    b], up to float32 rounding.
    """
    if bits == 1:
        return (nearest_levels(answers, bits, eta) == hidden).all(dim=1)
    leak, x = leak_ratio(bits, eta), hidden.double() / (2**bits - 1)
    least, most = (1.0 - leak) * x, x + leak * (1.0 - x)
    answers = answers.double()
    inside = (answers >= (1.0 - eta) * least - _ROUNDING) & (answers <= (1.0 + eta) * most + _ROUNDING)
    return inside.all(dim=1)


def levels_served(answers: Tensor, bits: int, eta: float) -> Tensor:
    """Count the levels of `bits` bits for which each answer counts as right by `answered_rows`: float64, as answers.

    The count is 1 for single bits, which a threshold decodes. It may be 1 too high where an answer lies within rounding
    of the end of a level's range.
    """
    if bits == 1:
        return torch.ones_like(answers, dtype=torch.float64)
    leak, top = leak_ratio(bits, eta), 2**bits - 1
    z = torch.nan_to_num(answers.double(), nan=-1.0)
    highest = (z + _ROUNDING) / ((1.0 - eta) * (1.0 - leak))
    lowest = ((z - _ROUNDING) / (1.0 + eta) - leak) / (1.0 - leak)
    first, last = (lowest * top - _BOUNDARY).ceil().clamp_min(0.0), (highest * top + _BOUNDARY).floor().clamp_max(top)
    return (last - first + 1.0).clamp_min(0.0)


def information(bits: int, eta: float) -> tuple[float, float]:
    """Return (told, spread): the bits that an answer that counts as right tells about a level, over uniform levels.

    told is the mean over levels x of bits - log2 s(x), and spread the standard deviation, where s(x) is the number of
    levels that the answer serves which is right for x and serves most. This is the largest answer that is right for x,
    unless that serves levels beyond the top one: then it is the least answer that serves the top level. So s grows with
    x. Levels of more than 16 bits are taken in 2^16 blocks, each at its largest s.
    """
    told = bits - log2_lists(bits, eta)
    return told.mean().item(), told.std(correction=0).item()


def log2_lists(bits: int, eta: float) -> Tensor:
    """Return log2 s(x) of `information` for all levels x, or for blocks of them at their largest s: float64."""
    leak, top = leak_ratio(bits, eta), 2**bits - 1
    block = 2 ** max(0, bits - _BLOCK_BITS)
    x = torch.arange(block - 1, 2**bits, block, dtype=torch.float64) / top
    largest = (1.0 + eta) * (x + leak * (1.0 - x)) + _ROUNDING
    serves_top = (1.0 - eta) * (1.0 - leak) - _ROUNDING
    served = levels_served(largest.clamp_max(serves_top), bits, eta)
    return torch.log2(served.clamp_min(1.0))


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Record the decoding of one set of answers of a state.

    certified_bits  bits that the message (the bytes of the state) certifiably carries
    certificate     name of the rule that proves these bits, as in the module: hard, erasure, log-loss, rows, sampled
                    rows or sampled lists
    bit_error       share of hidden bits decoded wrong
    row_success     share of rows (the dv values that one query reads) answered within the allowed relative error
    """

    certified_bits: float
    certificate: str
    bit_error: float
    row_success: float


def judge(answers: Tensor, hidden: Tensor, bits: int, eta: float, *, sampled_from: int | None = None) -> Decoded:
    """Compare answers (m, dv) with the hidden levels (m, dv), and certify the bits that a state's message carries.

    A row is the dv values that one query reads. The message is the bytes of the state.
    bits          bits of a hidden level
    eta           relative error that answers may have
    sampled_from  None: every row was asked once, in order, and the best of the hard, erasure, log-loss and rows
                  certificates counts. A number n: the m rows were drawn with replacement from n, and the sampled-rows
                  certificate counts: a row is right if all its bits are. With several bits and an error above 0, the
                  better of sampled rows and sampled lists counts
    Returns the certified bits, and the shares of bits decoded wrong and of rows answered right (`Decoded`).
    """
    m, dv = hidden.shape
    decoded = nearest_levels(answers, bits, eta)
    wrong = wrong_bits(decoded, hidden, bits)
    answered = answered_rows(answers, hidden, bits, eta)
    if sampled_from is not None:
        coarse = bits > 1 and eta > 0.0  # then the best of two counts, each at half of alpha
        alpha = certificates.ALPHA / (2.0 if coarse else 1.0)
        wrong_rows, missed = int((wrong > 0).sum()), m - int(answered.sum())
        kind, value = "sampled rows", certificates.certified_from_sample(sampled_from, dv * bits, wrong_rows, m, alpha)
        if coarse:
            of_lists = certificates.certified_lists_from_sample(
                sampled_from, dv, bits, log2_lists(bits, eta), missed, m, alpha
            )
            kind, value = max((kind, value), ("sampled lists", of_lists), key=lambda one: one[1])
    else:
        trusted, trusted_levels = trusted_rows(answers, bits)
        log2_chance = (torch.log2(levels_served(answers, bits, eta)) - bits).sum(dim=1)
        gains = {
            "hard": certificates.hard(m * dv * bits, int(wrong.sum())),
            "erasure": certificates.erasure(dv * bits, wrong_bits(trusted_levels, hidden, bits), trusted),
            "log-loss": certificates.log_loss(predictor_gains(answers, trusted, hidden, 2**bits)),
            "rows": certificates.rows(log2_chance, m - int(answered.sum())),
        }
        kind, value = max(gains, key=lambda name: gains[name]), certificates.certified(list(gains.values()))
    return Decoded(value, kind, int(wrong.sum()) / (m * dv * bits), answered.double().mean().item())
