"""Check that `State.nbytes` counts all storage, and that saved states are restored exactly or refused.

A method is a KV-cache compressor; its state is the cache of the tokens that it was given, empty when `Method.open`
makes it. A check tests one law of docs/contract.md on a method under a setting `at` (dtype of the cache, size of the
GQA group, seed), and raises `Broken` if the law fails. An answer is the attention output for a query. A message is the
bytes of `State.to_bytes`, from which `Method.from_bytes` restores a state.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from kvfloor.check.law import Broken, Setting, require
from kvfloor.check.streams import play, probes, small_pieces, some_absent, spec_for, stream_for
from kvfloor.check.tolerance import require_same_bits
from kvfloor.core.message import CorruptState
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.methods.tiered.cold_blocks import Blocks

_SAMPLED = 24
_SLACK_BYTES = 8  # bytes that nbytes may count for a number, a flag or a container


def storages(state: State) -> tuple[dict[int, int], int]:
    """Return ({address: bytes} of all tensor storages that the state refers to, limit in bytes for all other objects).

    Every attribute and container is followed, without the code that computes nbytes. The limit is the most that nbytes
    may count for the other objects: 8 bytes each, and for strings and large integers their own size besides. The
    method, specs and `state.shared` (tensors that method and spec determine) are left out, because a saved state need
    not contain them; and so are blocks outside the memory, which `State.cold_nbytes` counts and copies share.
    """
    found: dict[int, int] = {}
    others, met = 0, {id(state.shared)}  # a part may hold the same dictionary
    waiting: list[Any] = [value for name, value in vars(state).items() if name != "shared"]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (Method, Spec, Blocks)):
            continue
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (str, bytes, bytearray)):
            others += _SLACK_BYTES + len(item)
        elif isinstance(item, int):
            others += _SLACK_BYTES + item.bit_length() // 8
        elif id(item) not in met:
            met.add(id(item))
            others += _SLACK_BYTES
            if isinstance(item, dict):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set, frozenset)):
                waiting += item
            elif hasattr(item, "__dict__"):
                waiting += vars(item).values()
    found.pop(0, None)  # the address of every empty storage
    return found, others


def check_nbytes(method: Method, at: Setting) -> None:
    """Require that at every step nbytes equals the bytes of all tensors of the state, which this check finds by itself.

    nbytes may exceed them by the few bytes of numbers, flags and containers.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    state = method.open(spec)

    def look(i: int) -> None:
        found, others = storages(state)
        tensors, stated = sum(found.values()), state.nbytes
        within = tensors <= stated <= tensors + others
        require(within, f"after {i} tokens nbytes is {stated}, a walk finds {tensors} in tensors and {others} beside")

    look(0)
    play(state, stream, cuts=small_pieces(stream.n), after=look)


def check_message_round_trip(method: Method, at: Setting) -> None:
    """Require that a state restored from its message gives the same bits as the live one, at once and on later tokens.

    It is restored several times in the course of one stream with padding, and after rows were selected.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    present = some_absent(stream, at.seed)
    live = method.open(spec)
    edges = [1, stream.prompt // 2, stream.prompt, stream.prompt + 5, stream.n]
    _require_twin(live, spec, "before the first token")
    at_token = 0
    for edge in edges:
        restored = _restored(method, live.to_bytes())
        here = play(live, stream, start=at_token, stop=edge, present=present)
        there = play(restored, stream, start=at_token, stop=edge, present=present)
        where = f"between tokens {at_token} and {edge}"
        require_same_bits(there, here, f"the outputs of a restored state and the live one {where}")
        require(restored.to_bytes() == live.to_bytes(), f"a restored state and the live one part ways {where}")
        _require_twin(live, spec, f"after {edge} tokens")
        at_token = edge
    live.select_rows(torch.tensor([spec.rows - 1, 0]))
    _require_twin(live, live.spec, "after rows were selected")


def _restored(method: Method, message: bytes) -> State:
    try:
        return method.from_bytes(message)
    except CorruptState as cause:
        raise Broken(f"a state's own message is refused: {cause}") from cause


def _require_twin(live: State, spec: Spec, when: str) -> None:
    message = live.to_bytes()
    restored = _restored(live.method, message)
    require(restored.to_bytes() == message, f"{when} the message of a restored state is another one")
    mine, theirs = live.read(probes(spec)), restored.read(probes(spec))
    require_same_bits(theirs.mean, mine.mean, f"{when} the answers of a restored state and the live one")
    require_same_bits(theirs.log_mass, mine.log_mass, f"{when} the log-masses of a restored state and the live one")


def check_corrupt_message(method: Method, at: Setting) -> None:
    """Require that a message (`to_bytes`) that was truncated, lengthened or changed in a bit raises CorruptState."""
    state = method.open(spec_for(method, at))
    play(state, stream_for(method, at))
    message = state.to_bytes()
    size, rng = len(message), random.Random(at.seed)
    damaged = {"lengthened by a byte": message + b"\0", "empty": b"", "doubled": message + message}
    for cut in (1, 8, 16, 31, 33, size - 1, *rng.sample(range(size), _SAMPLED)):
        damaged[f"truncated to {cut} of {size} bytes"] = message[:cut]
    for place in (*range(0, 24, 3), size - 32, size - 1, *rng.sample(range(size), _SAMPLED)):
        bit = 1 << rng.randrange(8)
        damaged[f"changed in byte {place}"] = message[:place] + bytes([message[place] ^ bit]) + message[place + 1 :]
    for how, data in damaged.items():
        try:
            method.from_bytes(data)
        except CorruptState:
            continue
        except Exception as cause:
            raise Broken(f"a message {how} raises {type(cause).__name__}, not CorruptState: {cause}") from cause
        raise Broken(f"a message {how} is accepted")
