"""Certify how many bits one message carries, from the values that its receiver decoded. All results are in bits.

Alice hides values X in a method's state (the memory of a KV cache) and sends the state as a message of S bits; Bob
decodes X from it. X is uniform and independent of everything public. A certificate turns one decoding of X into a
number T, its gain, which rarely exceeds S: Pr_X[T >= S + t] <= 2^-t for every message of S bits. So from a single run S
>= T - log2(1/alpha) with confidence 1 - alpha. If the best of k certificates is taken, log2 k is subtracted from this
bound.
The decoder may use the message and public randomness only. The certificate is then computed with knowledge of X. If X
is used to choose anything (rows to leave out, a threshold, a width), log2 of the number of possible choices is
subtracted from the bound. Derived here; docs/floors.md ("Certificates") has the proofs.
The message length is taken as public; where a method's length depends on the values, add log2 of the number of possible
lengths to S.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvfloor.floors.entropy import H2
from kvfloor.statistics import clopper_pearson_limit
from kvfloor.validation import whole, within

ALPHA = 2.0**-20


def hard(bits: int, wrong: int) -> float:
    """Return the gain T, in bits, of decoding `bits` hidden bits of which `wrong` are decoded wrong.

    T - log2(1/alpha) is a lower bound on the message's length at confidence 1 - alpha.
    Law: bits (1 - H2(rho)), where rho = wrong/bits and H2 is the binary entropy; 0 for rho >= 1/2. The reason: for rho
    < 1/2, at most 2^(bits H2(rho)) strings differ from the decoded one in a share of at most rho of their bits. Raises
    ValueError where wrong > bits.
    """
    bits, wrong = whole("bits", bits, least=0), whole("wrong", wrong, least=0)
    if wrong > bits:
        raise ValueError(f"wrong must be at most bits = {bits}, got {wrong}")
    return 0.0 if 2 * wrong >= bits else bits * (1.0 - H2(wrong / bits))


def erasure(row_bits: int, wrong: Tensor, trusted: Tensor) -> float:
    """Return the gain T, in bits, of the rows that the decoder trusts; the other rows are not counted.

    A row is the dv hidden values that one query reads. T - log2(1/alpha) is a lower bound on the message's length at
    confidence 1 - alpha.
    Law: b (1 - H2(w/b)), with b the hidden bits in trusted rows, w those of them that are decoded wrong, and H2 the
    binary entropy; 0 for w >= b/2.
    row_bits  hidden bits per row
    wrong     (m,) number of wrong bits of every row
    trusted   (m,) bool, True for the rows that count. It must be chosen from the answers only: if `wrong` is used to
              choose it, the bound does not hold
    """
    return hard(row_bits * int(trusted.sum()), int(wrong[trusted].sum()))


def log_loss(gains: Sequence[float]) -> float:
    """Return the gain T, in bits, of the best of several predictors, less log2 of their number.

    A predictor gives, from the answers alone, a probability to every possible choice of all hidden values; these
    probabilities sum to 1. Its gain is log2(P / G), where P is the probability that it gives to the true hidden values,
    and G that of guessing all of them. `gains` holds the gains of all predictors. log2 of their number is the price of
    choosing the best one by looking at the hidden values. T - log2(1/alpha) is a lower bound on the message's length at
    confidence 1 - alpha. Raises ValueError without a gain.
    """
    if not gains:
        raise ValueError("gains must hold the gain of at least one predictor, got none")
    return max(gains) - math.log2(len(gains))


def rows(log2_chance: Tensor, wrong: int) -> float:
    """Return the gain T, in bits, of answers that serve all but `wrong` hidden rows.

    A row is the dv hidden values that one query reads. log2_chance (m,) is, for each row, log2 of the share of all
    possible rows that its answer serves, or an upper bound on it; it may depend on the answers, not on the hidden
    values. T - log2(1/alpha) is a lower bound on the message's length at confidence 1 - alpha.
    Law: T = -log2 of Chernoff's bound on the chance that at most `wrong` answers miss a uniform hidden row: the least
    value over t >= 0 of e^(t wrong) times the product over rows of c + (1-c) e^-t, where c is the row's chance. If all
    rows have the same c, and w = wrong/m, this is m D(1-w || c), as in the floor (`floors.row_bits`).
    Raises ValueError where wrong > m.
    """
    m, wrong = len(log2_chance), whole("wrong", wrong, least=0)
    if wrong > m:
        raise ValueError(f"wrong must be at most m = {m}, got {wrong}")
    log_hit = (log2_chance.double() * math.log(2.0)).clamp_max(0.0)
    log_miss = torch.log1p(-log_hit.exp())  # -inf where every row is served
    possible = log_hit[log_hit.isfinite()]  # an answer may serve no row at all
    low, high = 0.0, 64.0 + math.log(m + 1.0) - 2.0 * (possible.min().item() if len(possible) else 0.0)
    for _ in range(200):  # any t gives a bound; at the best one, `wrong` answers miss on average
        t = 0.5 * (low + high)
        either = torch.logaddexp(log_hit, log_miss - t)
        low, high = (t, high) if (log_miss - t - either).exp().sum() > wrong else (low, t)
    bound = wrong * low + torch.logaddexp(log_hit, log_miss - low).sum().item()
    return max(0.0, -bound / math.log(2.0))


def certified(gains: Sequence[float], alpha: float = ALPHA) -> float:
    """Return the bits that a message certifiably carries at confidence 1 - alpha, given the gains of all certificates.

    A gain is what `hard`, `erasure`, `log_loss` or `rows` returns.
    Law: max(gains) - log2 len(gains) - log2(1/alpha), and at least 0. Raises ValueError without a gain.
    """
    alpha = within("alpha", alpha, 0.0, 1.0, low_open=True)
    if not gains:
        raise ValueError("gains must hold at least one certificate's gain, got none")
    return max(0.0, max(gains) - math.log2(len(gains)) - math.log2(1.0 / alpha))


def certified_from_sample(n: int, row_bits: float, wrong: int, drawn: int, alpha: float = ALPHA) -> float:
    """Return the bits that a message about `n` rows certifiably carries at confidence 1 - alpha, by a sample of rows.

    n         number of hidden rows; a row is the dv hidden values that one query reads
    row_bits  hidden bits per row
    drawn     number of rows in the sample, which is drawn with replacement. Draw it after the message is fixed, from
              entropy that the method never sees
    wrong     number of drawn rows that were decoded with an error
    Law: n (row_bits (1-e) - H2(e)) - log2(2/alpha), and at least 0. H2 is the binary entropy, and e the upper
    Clopper-Pearson limit on the share of wrong rows at alpha/2. The result is 0 for e >= 1 - 2^-row_bits, the error
    rate of guessing.
    """
    n, row_bits = whole("n", n), within("row_bits", row_bits, 0.0, math.inf, low_open=True, high_open=True)
    e = clopper_pearson_limit(wrong, drawn, alpha / 2.0)
    if e >= 1.0 - 2.0**-row_bits:
        return 0.0
    return max(0.0, n * (row_bits * (1.0 - e) - H2(e)) - math.log2(2.0 / alpha))


def certified_lists_from_sample(
    n: int, dv: int, log2_levels: float, lists: Tensor, missed: int, drawn: int, alpha: float = ALPHA
) -> float:
    """Return the bits that a message about `n` rows certifiably carries, by a sample of rows with coarse answers.

    The confidence is 1 - alpha. A row is the dv hidden values that one query reads; an answer may be right for several
    levels, so rows are answered, not decoded.
    log2_levels  log2 of the number of levels of a hidden value, which are equally likely
    lists        for levels that are equally likely (all of them, or one for each block of as many), log2 of the most
                 levels that an answer can be right for which is right for this one
    drawn        number of rows in the sample, which is drawn with replacement. Draw it after the message is fixed, from
                 entropy that the method never sees
    missed       number of drawn rows that were not answered right
    Law: n (dv (log2_levels (1-e) - mean(lists)) - H2(e)) - max(lists) sqrt(n dv ln(3/alpha)/2) - log2(3/alpha), and at
    least 0. H2 is the binary entropy, and e the upper Clopper-Pearson limit on the share of missed rows at alpha/3. The
    root is what the hidden values' lists may exceed their mean by (Hoeffding). The result is 0 for e >= 1 - 1/(number
    of rows' values).
    """
    n, dv, told = whole("n", n), whole("dv", dv), within("log2_levels", log2_levels, 0.0, math.inf, high_open=True)
    e = clopper_pearson_limit(missed, drawn, alpha / 3.0)
    if e >= 1.0 - 2.0 ** -(dv * told):
        return 0.0
    left_open, largest = lists.double().mean().item(), lists.max().item()
    beyond = largest * math.sqrt(n * dv * math.log(3.0 / alpha) / 2.0)
    return max(0.0, n * (dv * (told * (1.0 - e) - left_open) - H2(e)) - beyond - math.log2(3.0 / alpha))
