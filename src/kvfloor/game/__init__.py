"""Play games ("barriers") on token streams against any KV-cache method; by a theorem, winning takes much memory.

A method is a way to keep a KV cache, exact or compressed; its state is the memory that it keeps of a stream. A barrier
is the game of one theorem. Alice appends tokens with random hidden values to the method's state and sends the bytes of
the state, the message. Bob rebuilds the state from the message, queries it, and decodes the hidden values from the
answers. If he decodes enough of them, the message must be long. Every barrier is a file of `instances` with an
`Instance` (what Alice and Bob both know: keys, stream, queries) and a function `play`. docs/floors.md has the proofs.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvfloor.core.method import Method
from kvfloor.floors.question import METRICS
from kvfloor.game.engine.instance import DTYPES, Instance, KeyedInstance, RowPerKey
from kvfloor.game.engine.result import Result
from kvfloor.game.instances import packing, probing, sparse, spike, tensor, visual, window
from kvfloor.game.instances.levels import format_of
from kvfloor.game.keys.families import FAMILIES


@dataclass(frozen=True)
class Barrier:
    """Hold one barrier, the game of a memory theorem.

    play   the function that plays it against a method
    about  a sentence about the game
    most   the largest number n of tokens in a stream; `play_all` lowers a larger n to it
    """

    play: Callable[..., Result]
    about: str
    most: int

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the names of the arguments that `play` takes besides the method."""
        return tuple(inspect.signature(self.play).parameters)[1:]


_SIGNIFICANT_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}

BARRIERS: dict[str, Barrier] = {
    "spike": Barrier(spike.play, "every key of a near-orthogonal set hides a row; one query reads each", 2**20),
    "packing": Barrier(packing.play, "few dimensions and bounded logits: as many keys as such queries separate", 2**20),
    "sparse": Barrier(sparse.play, "the spike with every attention row one-sparse, the places undisclosed", 4096),
    "window": Barrier(window.play, "zeros, then a window of coded tokens, masked or unmasked", 2**20),
    "probing": Barrier(probing.play, "one heavy key or none: the probes of readers that have not looked before", 2**16),
    "tensor": Barrier(tensor.play, "pairs of tokens are the keys: four caches of tokens, or two of pairs", 1024),
    "visual": Barrier(visual.play, "a pyramid of scales hides rows; one more scale reads a whole map at once", 2**14),
}
ARGUMENTS: dict[str, str] = {
    "n": "Tokens of the stream",
    "d": "Width of a key",
    "dv": "Width of a value; d (packing: 64) unless given",
    "bits": "Hidden bits per value coordinate, 1 to 24; 1, then once more than the message can hold, unless given",
    "eta": "Relative error that answers may have, in [0, 1); values have one bit where it is left out",
    "seed": "Seeds the public keys and the method, never the hidden bits",
    "dtype": f"What the method is opened for: {', '.join(DTYPES)}",
    "heads": "Kv heads, independent instances in one state",
    "layers": "Layers, likewise",
    "rows": "Rows to ask, drawn with replacement; all up to n = 16,384 unless given, else 2,048",
    "family": f"Public keys: {', '.join(FAMILIES)}; the one that separates best unless given",
    "values": "fp16 or bf16: hide as many of its numbers as answers within eta tell apart; so does eta without bits",
    "metric": f"The error that --epsilon bounds: {', '.join(METRICS[1:])} (see kvfloor floors); --eta's unless given",
    "epsilon": "Error of the metric, relative to the values' size, in [0, 1)",
    "codebook": "Hide which n of so many public keys come",
    "radius": "The largest logit; 32 unless given",
    "window": "Coded tokens at the end; a quarter of them unless given",
    "append": "Append a zero token before each query",
    "runs": "Independent streams; 256 unless given, fewer where n d is large",
    "caches": "4 (tokens are kept) or 2 (pairs are); what the method keeps unless given",
}
"""Map each argument of a `play` function that the command line offers to its description."""

INSTANCES: dict[str, type[Instance]] = {
    kind.__name__: kind
    for base in (Instance, KeyedInstance, RowPerKey)
    for kind in base.__subclasses__()
    if kind.__module__.startswith("kvfloor.game.instances.")  # others come from tests
}


def play(method: Method | str, *, barrier: str = "spike", **arguments: Any) -> Result:
    """Play one barrier, the game of a memory theorem, against a method; return the result with its verdict.

    The verdict is "holds" (enough answers were right), "breaks" (too few were), or "cheats" (the answers carry more
    bits than the bytes of the state can hold).
    barrier    a name in `BARRIERS`, such as "spike"
    method     a method object or its text: "h2o@16" is H2O with a budget of 16 tokens
    arguments  the barrier's own, such as n (tokens), d (width of a key) and seed. `ARGUMENTS` describes them in a line
               each, the barrier's module in `instances` in full
    If `eta` is given without `bits`, the barrier spike hides as many numbers of a 16-bit format as its floor claims at
    this error (`values`; that of `dtype`, fp16 for float32). Else, unless `bits` is given, values are of one bit, and
    the game is then played again, in this process, with values of so many bits that more is hidden than the message can
    hold (24 at most). A method that hides memory elsewhere, behind an idle message, answers more of these than the
    message holds, and "cheats". Else the result's `unseen_bits` are those of the finer game, and its details have
    `finer_bits` (hidden per value) and `finer_certified_bits`.
    Raises ValueError for an unknown barrier, for an argument that the barrier does not take (either error lists what is
    allowed), and for the errors of the barrier's own `play`.
    """
    if barrier not in BARRIERS:
        raise ValueError(f"barrier must be one of {', '.join(BARRIERS)}, got {barrier!r}")
    chosen = BARRIERS[barrier]
    foreign = [name for name in arguments if name not in chosen.arguments]
    if foreign:
        raise ValueError(f"barrier {barrier!r} takes no {foreign[0]}; it takes {', '.join(chosen.arguments)}")
    if "eta" in arguments and "epsilon" in arguments:
        raise ValueError("eta is the error of the metric entrywise, epsilon that of the others: give one of them")
    if "eta" in arguments and "values" in chosen.arguments and not {"bits", "values", "codebook"} & arguments.keys():
        arguments["values"] = format_of(arguments.get("dtype", "float32"))
    result = chosen.play(method, **arguments)
    chosen_bits = "bits" not in chosen.arguments or not {"bits", "values", "metric"}.isdisjoint(arguments)
    return result if chosen_bits else _finer(method, chosen, arguments, result)


def _finer(method: Method | str, chosen: Barrier, arguments: dict[str, Any], result: Result) -> Result:
    """Play a game again with finer values, so that it can show hidden memory; return the first game's result with both.

    The number of bits per value is the least with which more is hidden than the message of the first game holds, or the
    most that the values' format has room for.
    """
    values = int(result.hidden_bits / result.bits)
    bits = min(_SIGNIFICANT_BITS[arguments.get("dtype", "float32")], 2 + 8 * result.message_bytes // values)
    if result.verdict == "cheats" or bits <= result.bits:
        return result
    finer = chosen.play(method, **arguments | {"bits": bits, "isolated": False})
    if finer.verdict == "cheats":
        both = {"live_certified_bits": finer.live_certified_bits, "certified_bits": finer.certified_bits}
        return dataclasses.replace(result, verdict="cheats", why=f"with values of {bits} bits, {finer.why}", **both)
    details = {"finer_bits": bits, "finer_certified_bits": finer.certified_bits}
    unseen = min(result.unseen_bits, finer.unseen_bits)
    return dataclasses.replace(result, unseen_bits=unseen, details=result.details | details)


def play_all(method: Method | str, **arguments: Any) -> list[Result]:
    """Play every barrier, the game of a memory theorem, against a method; return one result per barrier.

    `method` is a method object or its text, such as "h2o@16". Each barrier gets those entries of `arguments` that its
    `play` takes. An n (tokens of a stream) above the largest that a barrier allows is lowered to that number. Raises
    ValueError for an argument that no barrier takes, and for the errors of each barrier's own `play`.
    """
    known = {name for barrier in BARRIERS.values() for name in barrier.arguments}
    foreign = [name for name in arguments if name not in known]
    if foreign:
        raise ValueError(f"no barrier takes {foreign[0]}; they take {', '.join(sorted(known))}")
    results = []
    for name, barrier in BARRIERS.items():
        own = {key: value for key, value in arguments.items() if key in barrier.arguments}
        if isinstance(own.get("n"), int):
            own["n"] = min(own["n"], barrier.most)
        results.append(play(method, barrier=name, **own))
    return results


__all__ = ["ARGUMENTS", "BARRIERS", "INSTANCES", "Barrier", "Instance", "Result", "play", "play_all"]
