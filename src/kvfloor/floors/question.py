"""Compute a lower bound on the bits that any method must hold to answer attention: the space floor.

A method is a way to keep a KV cache. It processes a stream of tokens, and then answers queries from what it has kept.
The bound follows from one of several theorems, chosen by the kind of attention (such as standard or sliding window) and
the allowed error.
"""

from kvfloor.floors.floor import Floor
from kvfloor.floors.metric import NORMS, metric_space
from kvfloor.floors.standard import additive_space
from kvfloor.floors.standard import space as standard_space
from kvfloor.floors.tensor import tensor_space
from kvfloor.floors.visual import visual_space
from kvfloor.validation import MOST_WHOLE, one_of, whole

ATTENTIONS = ("standard", "window", "tensor", "visual")
METRICS = ("entrywise", *NORMS, "additive")


def space(
    n: int,
    d: int,
    dv: int | None = None,
    *,
    attention: str = "standard",
    metric: str = "entrywise",
    epsilon: float | None = None,
    eta: float = 0.5,
    p: float = 0.9,
    radius: float | None = None,
    window: int | None = None,
    caches: int | None = None,
    ratio: float | None = None,
    heads: int = 1,
    layers: int = 1,
    values: str = "fp16",
) -> Floor:
    """Return a lower bound on the bits that any streaming method must hold to answer attention.

    n, d, dv   tokens of the stream, width of a key, width of a value (d unless given)
    attention  the kind of attention:
        standard  softmax over all tokens
        window    over the last `window` tokens. "standard" with `window` given means the same
        tensor    pairs of tokens are the keys. `caches` says what arrives in the stream: 4, tokens (the default); 2,
                  pairs
        visual    an image pyramid of square maps. `n` is the side of the last map, which has n^2 tokens; each earlier
                  side is smaller by the factor `ratio` (2 unless given)
    metric     the error guarantee. entrywise: each value of an answer is within a factor 1±`eta`. max, frobenius,
               operator (for standard and window only): the l2 error is at most `epsilon` times max |v_i|, ||softmax||_2
               ||V||_F or ||softmax||_2 ||V||_op, where V is the matrix of the values v_i. additive (likewise): each
               number of an answer errs by at most `epsilon` times the largest size of a number of V
    p          probability that an answer meets the error guarantee
    radius     bound on |logit|, not for visual; None: no bound
    heads, layers   number of kv heads and of layers, which multiply the bound
    values     number format of the values: fp16, bf16 or fp32. The finer the answers, the more values of the format
               they tell apart, and the larger the bound. Of the two formats of a 16-bit cache, fp16 has the smaller
               bound for entrywise, and bf16 for the other metrics. binary: values of one bit each, a bound that holds
               for every format and every eta below 1
    Returns a `Floor`: the bound in bits, and memory sizes that suffice.
    The formulas are those of the functions for each case: `standard.space` (standard and window, entrywise),
    `additive_space` and `metric_space` (the other error guarantees), `tensor_space` and `visual_space`. The bound is
    for worst-case keys and values, not for those of one model. Raises ValueError naming the argument, what was given
    and what is allowed.
    """
    counts = {"n": n, "d": d, "dv": dv, "window": window, "caches": caches, "heads": heads, "layers": layers}
    for name, value in counts.items():
        if value is not None:
            whole(name, value, most=MOST_WHOLE)
    one_of("attention", attention, ATTENTIONS)
    one_of("metric", metric, METRICS)
    _belongs("window", window, attention, ("standard", "window"))
    _belongs("radius", radius, attention, ("standard", "window", "tensor"))
    _belongs("caches", caches, attention, ("tensor",))
    _belongs("ratio", ratio, attention, ("visual",))
    if attention == "window" and window is None:
        raise ValueError("attention='window' needs window, the number of tokens that it holds")
    if (metric == "entrywise") != (epsilon is None):
        raise ValueError(
            f"metric={metric!r} needs epsilon, the error allowed" if epsilon is None
            else f"epsilon belongs to the metrics {', '.join(METRICS[1:])}; entrywise has eta, got epsilon={epsilon!r}"
        )  # fmt: skip
    if epsilon is not None:
        if attention in ("tensor", "visual"):
            raise ValueError(f"metric must be entrywise with attention={attention!r}, got {metric!r}")
        common = {"epsilon": epsilon, "p": p, "radius": radius, "window": window}
        if metric == "additive":
            return additive_space(n, d, dv, **common, heads=heads, layers=layers, values=values)
        return metric_space(n, d, dv, metric=metric, **common, heads=heads, layers=layers, values=values)
    shared = {"eta": eta, "p": p, "heads": heads, "layers": layers, "values": values}
    if attention == "tensor":
        return tensor_space(n, d, dv, caches=4 if caches is None else caches, radius=radius, **shared)
    if attention == "visual":
        return visual_space(n, d, dv, ratio=2.0 if ratio is None else ratio, **shared)
    return standard_space(n, d, dv, radius=radius, window=window, **shared)


def _belongs(name: str, value: object, attention: str, to: tuple[str, ...]) -> None:
    if value is not None and attention not in to:
        raise ValueError(f"{name} belongs to attention {' or '.join(to)}, got {name}={value!r} with {attention!r}")
