"""The INDEX floor: nobody answers more hidden bits than the message, or the memory, has room for."""

from __future__ import annotations

import math

import torch

from kvfloor.barriers.decode import judge
from kvfloor.barriers.instance import Hidden, Instance
from kvfloor.check.ground import of_rows
from kvfloor.check.law import Setting, require
from kvfloor.method import Method
from kvfloor.state import State

_D = 32
_BITS = 8  # per value: the more, the fewer tokens it takes to ask for more than whole tokens of float32 can hold
_LEAST, _MOST = 128, 1024
_ETA = 0.5


def check_index_floor(method: Method, at: Setting) -> None:
    """Certified bits are at most 8 times the message's bytes and 8 times nbytes, live and restored.

    A short game in this process: random bits are hidden in values, streamed, and asked back by spike queries. The
    literal game, where a fresh process answers, is `kvfloor break`.
    """
    method = of_rows(method, [0])
    state = method.open(Instance.agree(_LEAST, _D, None, _BITS, _ETA, at.seed, None).spec())
    # Enough tokens that the hidden bits outnumber those of a memory that does not grow.
    n = min(_MOST, max(_LEAST, math.ceil(1.5 * 8 * state.nbytes / (_D * _BITS))))
    instance = Instance.agree(n, _D, None, _BITS, _ETA, at.seed, None)
    keys, levels = instance.keys(), Hidden().levels(instance)
    values = levels.float() / (2**_BITS - 1)
    state = method.open(instance.spec())
    for k, v in zip(keys.split(128), values.split(128), strict=True):
        state.append(k.unsqueeze(0), v.unsqueeze(0))
    state.seal()
    message, queries = state.to_bytes(), instance.queries(keys, torch.arange(n))[0]
    for side in (state, method.from_bytes(message)):
        where = "the live state" if side is state else "the restored state"
        carried = judge(_answers(side, queries), levels, _BITS, _ETA).certified_bits
        for what, size in (("message", len(message)), ("nbytes", side.nbytes)):
            enough = carried <= 8 * size
            require(enough, f"{where} answers {carried:.0f} hidden bits, its {what} holds {8 * size}")


def _answers(state: State, queries: torch.Tensor) -> torch.Tensor:
    return torch.cat([state.read(part.unsqueeze(0)).mean[0] for part in queries.split(256)]).float()
