"""Bound the length of a message from which a receiver answers questions about hidden bits. Results are in bits.

In the proofs of memory floors (lower bounds on the memory of any KV-cache method), the message is the state of a
method: the memory that it keeps of a stream of tokens. The sender (Alice) hides random bits in the values of the
stream, and sends the state after the stream to the receiver (Bob).
"""

import math

from kvfloor.validation import whole, within


def H2(p: float) -> float:
    """Return the binary entropy of `p` in bits: -p log2 p - (1-p) log2(1-p), and 0 at p = 0 and p = 1."""
    p = within("p", p, 0.0, 1.0)
    if p in (0.0, 1.0):
        return 0.0
    return -p * math.log2(p) - (1.0 - p) * math.log2(1.0 - p)


def index_bits(N: int, p: float) -> float:
    """Return a lower bound on the bits of a message from which any one of `N` hidden bits can be decoded.

    The hidden bit's position is chosen after the message is sent (the problem INDEX). The bit is decoded right with
    probability `p`, on average over uniform hidden bits, the position, and random bits that sender and receiver share.
    Law: S >= N (1 - H2(1-p)), where S is the message's length and H2 the binary entropy. The bound is 0 for p <= 1/2,
    which guessing reaches.
    Source: Haris & Onak (COLT 2025), Theorem 5 states Omega(N); the constant is Fano's inequality with the concavity of
    H2 (derived here: docs/floors.md, "INDEX").
    """
    N = whole("N", N, least=0)
    p = within("p", p, 0.0, 1.0)
    return 0.0 if p <= 0.5 else N * (1.0 - H2(1.0 - p))


def row_bits(n: int, dv: int, p: float, told: float = 1.0, spread: float = 0.0) -> float:
    """Return a lower bound on the bits of a message from which `n` rows of `dv` hidden values can be answered.

    p       probability that a whole row is answered right, on average over the rows
    told    bits that a right answer tells about a value: those of a hidden value if right answers decode it. If answers
            may be so coarse that one is right for several values, the mean over hidden values x of log2 (number of
            values) - log2 s(x), where s(x) bounds the number of values for which an answer right for x can be right
    spread  standard deviation of log2 s(x) over the hidden values
    Law, with c = 2^(-dv told): S >= n D(p || c), where S is the message's length and D(p || c) = p log2(p/c) + (1-p)
    log2((1-p)/(1-c)), and 0 for p <= c. This is n (p dv told - H2(p)), H2 the binary entropy, but for a term that is
    next to nothing for wide rows. With a spread the bound is n (p dv told - H2(p) - spread sqrt(dv p (1-p))), and at
    least 0.
    Source: Haris & Onak (COLT 2025), Remark 7, where the receiver recovers a whole row; the constant is Fano's
    inequality per row, with lists (derived here: docs/floors.md, "Whole rows").
    """
    n, dv = whole("n", n, least=0), whole("dv", dv)
    p = within("p", p, 0.0, 1.0, low_open=True)
    told, spread = within("told", told, 0.0, math.inf), within("spread", spread, 0.0, math.inf)
    by_row = p * dv * told - H2(p)
    if spread > 0.0:
        return max(0.0, n * (by_row - spread * math.sqrt(dv * p * (1.0 - p))))
    chance = 2.0 ** -(dv * told)
    return 0.0 if p <= chance else n * (by_row - (1.0 - p) * math.log1p(-chance) / math.log(2.0))


def token_ids(n: int, vocabulary: int) -> float:
    """Return the bits of `n` stored token ids, from which a fixed model can always recompute all keys and values.

    Law: n log2(vocabulary), where `vocabulary` is the number of different tokens. This may be less than a space floor
    (`floors.space`, the bits that any method needs). There is no contradiction: the floors are for arbitrary keys and
    values, and those of a fixed model are functions of its tokens.
    """
    return whole("n", n, least=0) * math.log2(whole("vocabulary", vocabulary))


def log2_choose(n: int, k: int) -> float:
    """Return log2 of the number of ways to choose k of n things, 0 <= k <= n: the bits that a secret choice holds.

    Raises ValueError for k > n.
    """
    n, k = whole("n", n, least=0), whole("k", k, least=0)
    if k > n:
        raise ValueError(f"k must be at most n = {n}, got {k}")
    return math.log2(math.comb(n, k))
