"""Draw random signs for vectors one by one, so that the signed sum stays short (the self-balancing walk).

A walk takes vectors x_1, x_2, ... one by one and gives each a random sign; w is the signed sum so far. A step is the
choice of one sign. The sign of x_j is + with probability 1/2 - <w, x_j> / (2 c), for vectors of length <= 1. So the
sign that shortens w is the more likely one. The threshold c sets how much more likely: with a small c the choice is
nearly certain (greedy), with a large c it is nearly a fair coin. A step is clamped if this formula leaves [0, 1]. A
walk needs only the matrix of the vectors' inner products. In shapes, r are rows, i.e. (batch item, kv head) streams,
each with a walk of its own, and m vectors per row.
The method `Balance` calls this: each vector stands for a token, and tokens of one sign are evicted. A level is the set
of tokens of equal weight 2^l; halving a level evicts half of its tokens and moves the others to level l + 1. A level is
full at `batch` tokens, and n is the number of tokens of the stream. e^{q} and e^{k} stand for feature vectors of a
query q and a key k, with inner product e^{q.k}. The paper is Kochetkova et al. 2025, BalanceKV (arXiv 2502.07861). A
random number X is sub-Gaussian with deviation sigma, or sigma-sub-Gaussian, if E exp(t X) <= exp(t^2 sigma^2 / 2) for
all t, as for a normal number of standard deviation sigma; a vector is, if its component in every direction is.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Keep = Literal["pairs", "smaller"]


def safe_threshold(steps: float, failure: float) -> float:
    """Return c = 1/2 + ln(2 steps / failure), at least 1: a threshold at which a walk probably clamps no step.

    With this c or a larger one, and vectors of length <= 1, a walk of `steps` steps has no clamped step with
    probability 1 - failure or more.
    Proof: let w be the signed sum so far and x the next vector. Replace each clamped step by a move of w by
    -(<w, x> / c) x. Then every step moves w by -(<w, x> / c) x on average, plus x times a random number of mean 0 in an
    interval of length 2. In a fixed direction theta, that random part adds at most (theta.x)^2 to the sub-Gaussian
    sigma^2 of w (Hoeffding). The mean move shrinks w by enough that sigma^2 never exceeds c^2 / (2c - 1). A step is
    clamped if |<w, x>| > c, so with probability 2 exp(-c^2 / (2 sigma^2)) <= 2 exp(1/2 - c). Sum this over the steps.
    The paper's threshold 30 ln(n / failure) is safe as well, and makes the walk nearly a fair coin.
    """
    return max(1.0, 0.5 + math.log(2.0 * steps / failure))


def sub_gaussian(c: float) -> float:
    """Return sigma = c / sqrt(2c - 1): a walk's signed sum of vectors of length <= 1 is sigma-sub-Gaussian.

    c is the walk's threshold, at least 1; no step may be clamped. The proof is at `safe_threshold`.
    """
    return c / math.sqrt(2.0 * c - 1.0)


def worst_growth(sharpness: float, centre: bool) -> float:
    """Return g, the number in the factor exp(g r^2) by which the error bound of `Balance` grows.

    r is a bound on the lengths sqrt(|scale|) |q| and sqrt(|scale|) |k| of all queries and keys. The error bound is
    x max |v| / (batch - y), and both x and y (from `tree_error`) have this factor.
    sharpness  h, where two tokens' vectors in the walk have an inner product with the factor exp(h |scale| k.k'), for
               their keys k and k'
    centre     True: the mean key is subtracted from the keys before the walk
    Law, with the scale put into q and k: e^{q.k} is the inner product of features of length e^{|q|^2 / (2h)} and
    e^{h |k|^2 / 2}, and the denominator of attention over n tokens is at least n e^{-r^2}. This gives
    g = 1/(2h) + h/2 + 1. With the mean subtracted, |k - mean| can be 2r, and a factor e^{q.mean} <= e^{r^2} is added:
    g = 1/(2h) + 2h + 2.
    """
    return 0.5 / sharpness + (2.0 * sharpness + 2.0 if centre else 0.5 * sharpness + 1.0)


def tree_error(dv: int, growth: float, constant: float, c: float, failure: float) -> tuple[float, float]:
    """Return (x, y) of the bound ||answer - attention||_2 <= x max |v| / (batch - y) for `Balance` with keep="pairs".

    With keep="pairs", one of each two neighbouring tokens stays. The bound holds for one fixed query with probability
    1 - 2 failure, if no step of a walk is clamped.
    dv        width of a value v
    growth    g r^2, with g from `worst_growth` and r a bound on sqrt(|scale|) |q| and sqrt(|scale|) |k|: x and y have
              the factor e^growth
    constant  a = const^2 / max |v|^2; the walk appends the number const to every value, to balance the denominator too
    c         the walk's threshold
    failure   half of the probability that the bound does not hold
    Proof: let A be exact attention. The answer is A plus (numerator - A denominator) / denominator, both estimated. In
    a direction u, the error of (numerator - A denominator).u is the signed sum of e^{q.k} (v - A).u over the tokens.
    This sum is linear in the walk's vectors e^{k} (v, const). Differences of two of these are at most
    2 |e^{k}| sqrt(1 + a) max |v| long. So the error that one halving of level l adds is sub-Gaussian; the square of its
    deviation is 4^l 4 sigma^2 |e^{q}|^2 |e^{k}|^2 (1 + a)^2 / a max |v|^2, with sigma from `sub_gaussian`. As halvings
    are martingale differences, these squares add up. Level l has at most n / (2^l batch) halvings, so the 4^l of all
    halvings sum to at most 2 n^2 / batch^2. With probability 1 - failure, a sub-Gaussian vector is no longer than its
    deviation times sqrt(dv) + sqrt(2 ln 1/failure) (Hsu, Kakade and Zhang 2012). The error of the denominator is
    bounded in the same way.
    """
    walked = 2.0 * math.sqrt(2.0) * sub_gaussian(c) * math.exp(min(600.0, growth))
    x = walked * (1 + constant) / math.sqrt(constant) * (math.sqrt(dv) + math.sqrt(2.0 * math.log(1.0 / failure)))
    y = walked * math.sqrt((1 + constant) / constant) * math.sqrt(2.0 * math.log(2.0 / failure))
    return x, y


def gram(k: Tensor, v: Tensor, live: Tensor, scale: float, constant: float, centre: bool) -> Tensor:
    """Return the kernel matrix K of the walk, i.e. the inner products of its m vectors per row: (r, m, m) float64.

    Each vector stands for a token with key k and value v.
    K(i, j) = exp(|scale| (k_i.k_j - max |k|^2)) (v_i.v_j / max |v|^2 + constant), at most 1 + constant, with the maxima
    over the row's tokens. The signs depend only on ratios of inner products, so the division by the maxima changes no
    sign.
    k, v      (r, m, d) and (r, m, dv) keys and values
    live      (r, m) True for entries that are tokens; K is 0 for the others
    scale     factor on k_i.k_j in K
    constant  term in K: const^2 / max |v|^2, where const is the number that the walk appends to every value
    centre    True: the row's mean key is subtracted from its keys first. This divides exp(q.k) by exp(q.mean), which is
              the same for all keys, so attention does not change
    """
    there = live.unsqueeze(-1)
    k = k.to(torch.float64).masked_fill(~there, 0.0)
    v = v.to(torch.float64).masked_fill(~there, 0.0)
    if centre:
        k = (k - k.sum(1, keepdim=True) / live.sum(1).clamp_min(1).view(-1, 1, 1)).masked_fill(~there, 0.0)
    exponent = abs(scale) * torch.matmul(k, k.transpose(1, 2))
    top = exponent.diagonal(dim1=1, dim2=2).amax(1).view(-1, 1, 1)
    # Keys beyond 1e150 overflow the product itself; their entries become 0 and their coin is fair.
    exponent = torch.nan_to_num(exponent - top, nan=-torch.inf).clamp_max(0.0)
    v = v / v.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    v = v / v.norm(dim=2, keepdim=True).amax(1, keepdim=True).clamp_min(1.0)
    both = (there & live.unsqueeze(1)).to(torch.float64)
    return torch.exp(exponent) * (torch.matmul(v, v.transpose(1, 2)) + constant) * both


def of_pairs(products: Tensor) -> Tensor:
    """Return the inner products (r, m/2, m/2) of the differences x_0 - x_1, x_2 - x_3, ... of neighbouring vectors.

    products (r, m, m) are the inner products of the m vectors x_0, x_1, ... themselves.
    """
    rows = products[:, 0::2] - products[:, 1::2]
    return rows[:, :, 0::2] - rows[:, :, 1::2]


def walk(products: Tensor, draws: Tensor, c: float, even: bool) -> tuple[Tensor, Tensor]:
    """Return a sign (r, m), -1 or 1, for each of the m vectors x_j of a row, and the number (r,) of clamped steps.

    products (r, m, m) are the vectors' inner products, draws (r, m) uniform random numbers, one per vector.
    Let R be the length of the longest vector. In step j, let y = <sum of the signed vectors so far, x_j>, and let a be
        c R^2       if `even` is False, as in the paper
        c |x_j| R   if `even` is True, so that only the direction of x_j matters
    The sign is + if the vector's draw is below 1/2 - y / (2a), else -.
    If |y| > a, the step is clamped: the probability is taken as 0 or 1. In both cases, probably no step is clamped if c
    is at least `safe_threshold`. A vector of zeros gets the sign of a fair coin.
    """
    length = products.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()
    longest = length.amax(1, keepdim=True)
    allowed = c * longest * (length if even else longest.expand_as(length))
    signs, along = torch.zeros_like(draws), torch.zeros_like(draws)
    clamped = torch.zeros(draws.shape[0], dtype=torch.int64, device=draws.device)
    for j in range(draws.shape[1]):
        y, a = along[:, j], allowed[:, j]
        pull = torch.where(a > 0, y / a.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        signs[:, j] = torch.where(draws[:, j] < 0.5 - 0.5 * pull, 1.0, -1.0)
        clamped += (pull.abs() > 1.0) & (length[:, j] > 0)
        along = along + signs[:, j : j + 1] * products[:, j]
    return signs, clamped


def halve(products: Tensor, count: Tensor, draws: Tensor, c: float, keep: Keep) -> tuple[Tensor, Tensor, Tensor]:
    """Choose about half of each row's vectors by `walk`; return (kept, dropped, clamped).

    kept and dropped are masks (r, m), True for the vectors to keep and to drop; clamped (r,) is the number of clamped
    steps. Only the first count[r] of row r's m vectors take part, and m is even. products (r, m, m) are the vectors'
    inner products, zero beyond the count; draws (r, m) are uniform random numbers, one per vector; c is the threshold
    of `walk`. keep is one of:
    "pairs"    one of each two neighbours stays, so exactly half stay, each with probability 1/2. `walk`, with
               even=True, gives a sign to each difference of two neighbours: the first stays for +, the second for -. If
               count[r] is odd, the last vector is neither kept nor dropped.
    "smaller"  the paper's rule: `walk`, with even=False, gives a sign to each vector, and the vectors of the rarer sign
               stay, or the vectors of sign + if both signs are equally frequent
    """
    place = torch.arange(products.shape[1], device=products.device)
    if keep == "pairs":
        whole = place < (count - count % 2).unsqueeze(1)
        differences = of_pairs(products) * (whole[:, 0::2].unsqueeze(2) & whole[:, 0::2].unsqueeze(1))
        signs, clamped = walk(differences, draws[:, 0::2], c, even=True)
        plus = torch.stack([signs > 0, signs < 0], 2).flatten(1)
        return plus & whole, ~plus & whole, clamped
    live = place < count.unsqueeze(1)
    signs, clamped = walk(products, draws, c, even=False)
    plus, minus = (signs > 0) & live, (signs < 0) & live
    stays = torch.where((plus.sum(1) <= minus.sum(1)).unsqueeze(1), plus, minus)
    return stays, live & ~stays, clamped
