"""Compute the length of a query that gives one key nearly all softmax mass. Logits are in nats, as in exp(q.k).

Such a query, C times the key, is a spike query. It is characterised by `eps_s`, the ratio (softmax mass off the
key)/(mass on the key). The one-sided gap of key i is |k_i|^2 less the largest inner product <k_i, k_j> with another
key. In the proofs of the floors (lower bounds on a method's memory), hidden values are read by spike queries: a sender
stores them under keys of a stream, and a receiver of the method's state asks the queries.
"""

import math

from kvfloor.validation import positive, relative_error, whole, within


def spike_C(n_eff: int, z: int, g: float, gamma: float, eps_s: float) -> float:
    """Return the factor C at which the query C k_i leaves all other tokens at most `eps_s` times the mass of key i.

    Mass is softmax mass. For a key of length 1, C is the length of the query.
    n_eff  number of keys: n_eff - 1 others compete with key i
    z      number of further tokens of logit 0 (an appended token, padding, tokens outside a window)
    g      lower bound on the one-sided gap, |k_i|^2 less the largest <k_i, k_j>
    gamma  |k_i|^2
    Law: C = ln((n_eff - 1 + z) / eps_s) / min(g, gamma). Then the softmax weight of key i is at least 1/(1 + eps_s). C
    is 0 when there is no other token.
    Source: the proof of Haris & Onak (COLT 2025), Theorems 6 and 8, made exact (docs/floors.md, "The spike").
    """
    others = whole("n_eff", n_eff) - 1 + whole("z", z, least=0)
    slope = min(positive("g", g), positive("gamma", gamma))
    eps_s = within("eps_s", eps_s, 0.0, 1.0, low_open=True)
    return math.log(others / eps_s) / slope if others else 0.0


def paper_C(n: int, eta: float, coherence: float) -> float:
    """Return the query length C of Haris & Onak's Theorem 8, for n keys of two-sided coherence `coherence`.

    Two-sided coherence c means that |<k_i,k_j>| <= c for all i != j and that ||k_i|^2 - 1| <= c.
    Law: (ln n + ln((1+eta)/(1-eta))) / (1 - 2 coherence), for relative error eta. The theorem needs a query that is
    longer than C. Source: Haris & Onak (COLT 2025), Theorem 8.
    """
    eta = relative_error(eta)
    coherence = within("coherence", coherence, 0.0, 0.5, high_open=True)
    return (math.log(whole("n", n)) + math.log((1.0 + eta) / (1.0 - eta))) / (1.0 - 2.0 * coherence)


def window_C(W: int, n: int, z: int, g: float, eps_s: float, gamma: float = 1.0) -> float:
    """Return the length C of a query for one of the `W` keys of a window, if the n - W older tokens keep logit 0.

    The older tokens are left out of the window but not of the softmax. The query is C times the key, and leaves all
    other tokens, the older ones included, at most `eps_s` times the softmax mass of this key.
    W      number of keys in the window
    n, z   n - W older tokens and `z` further tokens have logit 0
    g      one-sided gap of the keys: squared norm less the largest inner product with another key
    gamma  squared norm of the keys
    Law: max(ln(2 (W-1) / eps_s) / g, ln(2 (n - W + z) / eps_s) / gamma), with ln 0 as -inf, and at least 0. Half of
    eps_s is for the other W - 1 keys of the window, half for the tokens of logit 0. If the receiver of the state
    appends a token before he asks, and `n` does not count it, z = 2: for this token and the one that it pushes out of
    the window.
    Source: Haris & Onak (COLT 2025), Theorem 25; its printed constant is too small (docs/floors.md, "Window").
    """
    W, n, z = whole("W", W), whole("n", n), whole("z", z, least=0)
    g, gamma = positive("g", g), positive("gamma", gamma)
    eps_s = within("eps_s", eps_s, 0.0, 1.0, low_open=True)
    inside, outside = W - 1, max(0, n - W) + z
    from_inside = math.log(2.0 * inside / eps_s) / g if inside else 0.0
    from_outside = math.log(2.0 * outside / eps_s) / gamma if outside else 0.0
    return max(from_inside, from_outside, 0.0)
