"""Check randomness: random draws depend on seed and row ids alone, and shared tensors on method and spec alone.

A method is a KV-cache compressor; its state is the cache of the tokens that it was given, empty when `Method.open`
makes it. A check tests one law of docs/contract.md on a method under a setting `at` (dtype of the cache, size of the
GQA group, seed), and raises `Broken` if the law fails. An answer is the attention output for a query. The spec has the
sizes, dtype, seed and constants that a state is opened for. A row is the stream of one kv head of one sequence. Its row
id is a number in the spec that, with the seed, determines its random draws.
"""

from __future__ import annotations

import random

import torch

from kvfloor.check.law import Setting, require
from kvfloor.check.storage import storages
from kvfloor.check.streams import play, probes, spec_for, stream_for
from kvfloor.check.tolerance import require_same_bits
from kvfloor.core.method import Method


def check_seeded(method: Method, at: Setting) -> None:
    """Require that results depend on seed and row ids alone, and no global random generator is read or advanced.

    The stream of tokens is the same in all runs. The global generators are those of torch and of Python.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    messages, outputs = [], []
    mine = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            for reseed in (1, 2):
                torch.manual_seed(reseed)
                random.seed(reseed)
                before, before_python = torch.get_rng_state(), random.getstate()
                state = method.open(spec)
                outputs.append(play(state, stream))
                state.attend(stream.q[:, :, :2])
                state.read(probes(spec))
                messages.append(method.from_bytes(state.clone().to_bytes()).to_bytes())
                require(torch.equal(torch.get_rng_state(), before), "torch's global generator was advanced")
                require(random.getstate() == before_python, "python's global generator was advanced")
    finally:
        random.setstate(mine)
    require_same_bits(outputs[0], outputs[1], "the outputs of two runs with the same seed")
    require(messages[0] == messages[1], "two runs with the same seed remember different things")


def check_shared(method: Method, at: Setting) -> None:
    """Require that the tensors in `State.shared` depend on method and spec alone, never on the stream.

    Such tensors, random projections for example, are not counted as memory, and a saved state need not contain them.
    """
    spec = spec_for(method, at)
    fresh, used = method.open(spec), method.open(spec)
    play(used, stream_for(method, at))
    used.read(probes(spec))
    require(isinstance(used.shared, dict), f"shared is a {type(used.shared).__name__}, not a dict")
    require(used.shared.keys() == fresh.shared.keys(), f"the stream changed what is in shared: {sorted(used.shared)}")
    for name, tensor in used.shared.items():
        require(isinstance(tensor, torch.Tensor), f"shared[{name!r}] is a {type(tensor).__name__}, not a tensor")
        require_same_bits(tensor, fresh.shared[name], f"shared[{name!r}] before and after a stream")


def check_clone(method: Method, at: Setting) -> None:
    """Require that a clone shares no storage with its original, and gives the same bits on the same further tokens.

    A clone is the copy that the state's call `clone` returns.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    middle = stream.prompt + 5
    state = method.open(spec)
    play(state, stream, stop=middle)
    twin, stray = state.clone(), state.clone()
    common = storages(state)[0].keys() & storages(twin)[0].keys()
    require(not common, f"a clone shares {len(common)} storages with its original")
    before = state.to_bytes()
    require(twin.to_bytes() == before, "a clone remembers something else than its original")
    play(stray, stream_for(method, at, salt=1), start=middle)
    require(state.to_bytes() == before, "feeding a clone changed its original")
    outputs, answers = play(state, stream, start=middle), play(twin, stream, start=middle)
    require_same_bits(answers, outputs, "the outputs of a clone and its original on the same stream")
    require(twin.to_bytes() == state.to_bytes(), "a clone and its original part ways on the same stream")
