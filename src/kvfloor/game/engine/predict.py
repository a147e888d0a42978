"""Compute predictive distributions over the hidden levels, for the log-loss certificate.

In the game, Alice hides levels in the values of a state (the memory of a KV-cache method), and Bob decodes them from
the state's answers to queries. The certificate (`certificates.log_loss`) turns the probability that a predictor gives
to the hidden levels into a lower bound on the bits that a state carries.
    level      hidden value x of 0..2^bits-1, streamed as the number x / (2^bits - 1)
    answer     attention output for one hidden value: near the streamed number, in [0, 1]
    predictor  rule that gives, from the answers of the state alone, a probability to every level of every hidden value
    gain       log2 of a ratio: the probability given to the true levels, over the probability of guessing them
    belief     weight in [0, 1] of the prediction for a row (the dv values that one query reads), when it is mixed with
               a uniform guess of weight 1 - belief
Every distribution here sums to 1 over all levels by construction. Level x gets the mass between x - 1/2 and x + 1/2 of
a logistic distribution around the answer, and the two end levels get its tails too. A uniform distribution over all
levels is then mixed in. A row's distribution is a mixture of the product over its values and of a uniform guess. No
distribution depends on the hidden values; they only select which probability is scored.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_UNIFORM_SHARES = (2.0**-14, 2.0**-5)
_CERTAIN_AND_NOT = (1.0 - 2.0**-7, 2.0**-7)  # belief in a trusted and in an untrusted row
_EQUAL_BELIEFS = (1.0 - 2.0**-20, 0.75, 0.25, 0.05)


def log2_level_probability(centre: Tensor, level: Tensor, levels: int, width: float, uniform_share: float) -> Tensor:
    """Return log2 of the probability of `level`, predicted by a logistic distribution around the answer `centre`.

    `centre`, `level` and the result have one shape. Levels are 0..levels-1, and `centre` is in the same unit. `width`
    is the scale of the logistic, and `uniform_share` the share of a uniform distribution over all levels that is mixed
    in.
    """
    top = levels - 1
    below = torch.where(level == 0, -math.inf, (level - 0.5 - centre) / width)
    above = torch.where(level == top, math.inf, (level + 0.5 - centre) / width)
    right = below + above > 0  # sigmoid loses nothing on the negative side
    low, high = torch.where(right, -above, below), torch.where(right, -below, above)
    mass = torch.sigmoid(high) - torch.sigmoid(low)
    return torch.log2((1.0 - uniform_share) * mass + uniform_share / levels)


def log2_row_gain(row_gain: Tensor, belief: Tensor) -> Tensor:
    """Return the gain (m,), in bits, of each row's prediction mixed with a guess: weights `belief` (m,) and 1 - belief.

    A row is the dv hidden levels that one query reads. A gain is log2 of the probability given to these levels over the
    probability of guessing them. row_gain (m,) is the gain of each row's prediction before it is mixed.
    Law: log2(belief 2^row_gain + 1 - belief).
    """
    return torch.logaddexp2(row_gain + torch.log2(belief), torch.log2(1.0 - belief))


def predictor_gains(answers: Tensor, trusted: Tensor, hidden: Tensor, levels: int) -> list[float]:
    """Return the gain, in bits, of each predictor in a fixed public list, for answers and hidden levels (m, dv).

    An answer is on a scale on which level x is x / (levels - 1); `hidden` has the levels x of 0..levels-1.
    A predictor gives, from the answers alone, a probability P to the dv hidden levels of each row. Its gain is the sum
    over all rows of dv log2(levels) + log2 P. P is the product of one logistic distribution per value, mixed with a
    guess. The predictors are all combinations of
        scaling        two: the answers as they are, or divided by the largest answer of their row
        width          scale of the logistic distribution, from 1/64 of a level to half the range
        uniform share  share of a uniform distribution that is mixed into each value's distribution: two values
        belief         weight of a row's prediction against a guess of the whole row, in five ways: high for rows where
                       `trusted` (m,) is True and low for the others; or one of four values for all rows
    """
    m = hidden.shape[0]
    beliefs = [torch.where(trusted, *(torch.tensor(b, dtype=torch.float64) for b in _CERTAIN_AND_NOT))]
    beliefs += [torch.full((m,), b, dtype=torch.float64) for b in _EQUAL_BELIEFS]
    gains = []
    for centre in _centres(answers, levels):
        for width in (2.0**power for power in range(-6, (levels - 1).bit_length())):
            for uniform_share in _UNIFORM_SHARES:
                entries = log2_level_probability(centre, hidden, levels, width, uniform_share)
                row_gain = (math.log2(levels) + entries).sum(dim=1)
                gains += [log2_row_gain(row_gain, belief).sum().item() for belief in beliefs]
    return gains


def _centres(answers: Tensor, levels: int) -> Iterator[Tensor]:
    """Yield two scalings of the answers (m, dv), each (m, dv) in units of the level spacing.

    On the answers' scale the top level is 1. The first scaling multiplies them by levels - 1. In the second, each row
    is scaled so that its largest answer lies on the top level.
    """
    top = levels - 1
    answers = torch.nan_to_num(answers.double(), nan=0.5, posinf=1.0, neginf=0.0)
    yield answers * top
    yield answers / answers.amax(dim=1, keepdim=True).clamp_min(1e-3) * top
