"""Play the game of the read floor: hide levels in the values of token groups, and decode them from a method's state.

A method is a way to keep a KV cache; its state is the memory that it keeps. The read floor (`floors.measured`) is a
lower bound on the bits that a state must hold to answer queries over given keys. In the game of its proof, Alice hides
values in a method's state, and Bob restores the state from its bytes and decodes the values.
    group    tokens that share one row of dv hidden values, read by one query
    levels   equally spaced values in [-1, 1]; each hidden value is one of them
    message  the bytes of a method's state
    decode   reconstruct the hidden values of one group after the other from the answers of a state; the contribution of
             groups decoded earlier is subtracted from an answer
The method is trusted to keep no data outside its message; `kvfloor.game.engine.play` is for methods that are not.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.floors.measured.inputs import matrix
from kvfloor.floors.measured.readable import Readable
from kvfloor.floors.measured.spectral import attention_matrix

_TOKENS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class MeasuredGame:
    """Record one game of the read floor: a lower bound on the bits of a state that answers queries over given keys.

    Each group of tokens shares one row of dv hidden values, which one query reads. The two shares are of groups; a
    group counts only if its whole row is right.
    answered       share of groups whose answer is within eta of exact attention in every value. eta is the largest
                   error that the floor allows. The floor does not assume a share of 1, but only that each answer is
                   within eta with probability p
    decoded        share of groups whose hidden row is decoded right if the levels of groups decoded earlier are given,
                   as in the proof
    worst_error    largest deviation of an answer from exact attention
    floor_bits     bits of the read floor
    hidden_bits    number of hidden bits
    message_bytes  size of the message, i.e. of the state that was sent
    """

    answered: float
    decoded: float
    worst_error: float
    floor_bits: float
    hidden_bits: float
    message_bytes: int

    @property
    def contradicts(self) -> bool:
        """Return True if every answer was within eta although the message is shorter than the floor.

        Then the floor is wrong: it says that no such message exists.
        """
        return self.answered == 1.0 and 8 * self.message_bytes < self.floor_bits


def play(method: Method, readable: Readable, k: Tensor, *, seed: int = 0) -> MeasuredGame:
    """Hide random levels in the values of `readable`'s token groups, send a method's state, and decode the levels.

    readable  the read floor, computed for the keys k: it says which tokens are streamed (`stream`), which of them form
              a group, how many levels each group has, and by which query it is read
    k         (n, d), the keys
    seed      draws the levels, uniformly
    The streamed tokens are appended to the state, with values in the format that the floor was computed for. A second
    state, restored from the message (the bytes of the first), answers each group's query. The floor may assume that
    queries also see tokens outside the stream (`readable.later_mass`); these then count in each answer's softmax, with
    value 0.
    Returns a `MeasuredGame`: the shares of right answers and the sizes.
    """
    demand, groups, dv = readable.demand, readable.groups, readable.demand.dv
    keys = matrix("k", k)[readable.stream].to(demand.dtype)
    queries = readable.queries.to(demand.dtype)
    levels = readable.levels.double().unsqueeze(1)
    draw = torch.rand(groups, dv, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hidden = (draw * levels).floor()
    rows = (2.0 * hidden / (levels - 1.0) - 1.0).to(demand.dtype)
    values = torch.cat([rows, rows.new_zeros(1, dv)])[readable.group]

    spec = Spec(1, keys.shape[1], dv, readable.scale, readable.softcap, demand.dtype, seed=seed)
    state = method.open(spec)
    for part, v in zip(keys.split(_TOKENS_AT_ONCE), values.split(_TOKENS_AT_ONCE), strict=True):
        state.append(part.unsqueeze(0), v.unsqueeze(0))
    state.seal()
    message = state.to_bytes()
    if groups == 0:
        return MeasuredGame(1.0, 1.0, 0.0, readable.bits, 0.0, len(message))
    read = method.from_bytes(message).read(queries.unsqueeze(0))
    if readable.later_mass is not None:
        beyond = readable.later_mass.to(read.log_mass.dtype).unsqueeze(0)
        read = read.merge(Partial(torch.zeros_like(read.mean), beyond))
    answers = read.mean[0].double()

    weights = attention_matrix(
        queries, keys, scale=readable.scale, softcap=readable.softcap, later_mass=readable.later_mass
    )
    error = (answers - weights @ values.double()).abs().amax(1)
    member = torch.nn.functional.one_hot(readable.group + 1, groups + 1)[:, 1:].double()
    pairs = weights @ member  # (G, G): the weight of query g on group h, known to both sides
    rest = answers - pairs.tril(-1) @ rows.double()
    found = ((rest / pairs.diagonal().unsqueeze(1) + 1.0) * (levels - 1.0) / 2.0).round().clamp(0.0)
    right = (torch.minimum(found, levels - 1.0) == hidden).all(1)
    return MeasuredGame(
        answered=float((error <= demand.eta).double().mean()),
        decoded=float(right.double().mean()),
        worst_error=float(error.max()),
        floor_bits=readable.bits,
        hidden_bits=float(dv * levels.log2().sum()),
        message_bytes=len(message),
    )
