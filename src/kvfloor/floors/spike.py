"""Compute the length of a query that gives one key nearly all softmax mass. Logits are in nats, as in exp(q.k).

Such a query, C times the key, is a spike query; `eps_s` is the ratio (mass off the key)/(mass on the key) that it
leaves. The one-sided gap of key i is |k_i|^2 less the largest inner product <k_i, k_j> with another key. In the proofs,
the receiver of a state (Bob) reads hidden values by spike queries.
"""

import math

from kvfloor.validation import positive, relative_error, whole, within


def spike_C(n_eff: int, z: int, g: float, gamma: float, eps_s: float) -> float:
    """Return the length C at which the query q = C k_i leaves all other tokens `eps_s` times the mass of key i.

    Mass is softmax mass.
    Law: C = ln((n_eff - 1 + z) / eps_s) / min(g, gamma), for n_eff - 1 other keys with one-sided gap
    |k_i|^2 - <k_i, k_j> >= g, z tokens of logit 0 (the token of the receiver of the state, padding, tokens outside a
    window) and gamma = |k_i|^2. Then the softmax weight of key i is at least 1/(1 + eps_s). C is 0 when there is no
    other token.
    Source: the proof of Haris & Onak (COLT 2025), Theorems 6 and 8, made exact (docs/floors.md, "The spike").
    """
    others = whole("n_eff", n_eff) - 1 + whole("z", z, least=0)
    slope = min(positive("g", g), positive("gamma", gamma))
    eps_s = within("eps_s", eps_s, 0.0, 1.0, low_open=True)
    return math.log(others / eps_s) / slope if others else 0.0


def paper_C(n: int, eta: float, coherence: float) -> float:
    """Return the query length C of Haris & Onak's Theorem 8, for n keys of two-sided coherence `coherence`.

    Two-sided coherence c means |<k_i,k_j>| <= c for all i != j and ||k_i|^2 - 1| <= c.
    Law: (ln n + ln((1+eta)/(1-eta))) / (1 - 2 coherence), for relative error eta. The query must be strictly longer.
    Source: Haris & Onak (COLT 2025), Theorem 8.
    """
    eta = relative_error(eta)
    coherence = within("coherence", coherence, 0.0, 0.5, high_open=True)
    return (math.log(whole("n", n)) + math.log((1.0 + eta) / (1.0 - eta))) / (1.0 - 2.0 * coherence)


def window_C(W: int, n: int, z: int, g: float, eps_s: float, gamma: float = 1.0) -> float:
    """Return the query length C for a window of `W` keys, if the n - W older tokens stay in the softmax at logit 0.

    The query is C times one key of the window. It leaves all other tokens, the older ones included, at most `eps_s`
    times the softmax mass of this key.
    Law: max(ln(2 (W-1) / eps_s) / g, ln(2 (n - W + z) / eps_s) / gamma): half the ratio goes to the other W - 1 keys of
    the window, half to the n - W + z tokens of logit 0: the n - W older ones and `z` more. g is the one-sided gap of
    the keys (squared norm less the largest inner product with another key) and gamma their squared norm; ln 0 counts as
    -inf. When `n` excludes the token that the receiver of the state appends before he asks, z = 2: this token, and the
    row that it pushes out of the window.
    Source: Haris & Onak (COLT 2025), Theorem 25; its printed constant is too small (docs/floors.md, "Window").
    """
    W, n, z = whole("W", W), whole("n", n), whole("z", z, least=0)
    g, gamma = positive("g", g), positive("gamma", gamma)
    eps_s = within("eps_s", eps_s, 0.0, 1.0, low_open=True)
    inside, outside = W - 1, max(0, n - W) + z
    from_inside = math.log(2.0 * inside / eps_s) / g if inside else 0.0
    from_outside = math.log(2.0 * outside / eps_s) / gamma if outside else 0.0
    return max(from_inside, from_outside, 0.0)
