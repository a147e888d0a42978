"""Check that an exception in the middle of a call leaves a state unchanged, or makes it refuse further calls.

A method is a KV-cache compressor; its state is the cache of the tokens that it was given, empty when `Method.open`
makes it. A check tests one law of docs/contract.md on a method under a setting `at` (dtype of the cache, size of the
GQA group, seed), and raises `Broken` if the law fails. A block is the run of a row's tokens between two evictions; a
row is the stream of one kv head of one sequence. A call here is a function of a state that makes one call on it, e.g.
`lambda state: state.append(k, v)`.
"""

from __future__ import annotations

import torch

from kvfloor.check.faults import Call, FaultTally, broken_at, operations, spread_out
from kvfloor.check.law import Setting, require
from kvfloor.check.streams import prompt_length, spec_for
from kvfloor.core.method import Method
from kvfloor.core.state import State

_POINTS = 7  # failures per call, so that the check is fast; characterize/broken.py tries every operation


def check_broken(method: Method, at: Setting) -> None:
    """Require that an exception within a call leaves the state as it was, or makes it refuse every further call.

    Every kind of call that changes a state, such as `append`, is made several times on copies of a state. Each time an
    exception is raised after a different one of the call's torch operations.
    """
    for what, (state, call) in situations(method, at).items():
        tally = broken(state, call, _POINTS)
        require(not tally.silent, f"{what}, failed {' '.join(tally.silent[:1])}")


def broken(state: State, call: Call, most: int | None = None) -> FaultTally:
    """Make a call on `state` fail at each of its torch operations, each time on a new copy, and count the outcomes.

    call: function of a state that makes the call. most: largest number of failures, spread evenly over the operations;
    None: one failure per operation.

    Returns a `FaultTally`: how many copies were unchanged after the failure, how many refused all further calls, and a
    sentence for each that did neither, which is a fault.
    """
    copy = state.clone()
    return broken_at(state, call, spread_out(operations(lambda: call(copy)), most))


def situations(method: Method, at: Setting) -> dict[str, tuple[State, Call]]:
    """Return {description: (state, call)} for each call that changes a state, such as `append`; call(state) makes it.

    Each state holds the first tokens of a random stream, which end inside a block. All states have evicted tokens,
    except perhaps the one whose call marks the end of the prompt (`seal`).
    """
    block, prompt = method.block, prompt_length(method)
    spec, source = spec_for(method, at), torch.Generator().manual_seed(at.seed)
    opened = method.open(spec)
    n = prompt + 2 * block + 7
    shapes = ((spec.rows, at.g, n, spec.d), (spec.rows, n, opened.key_width), (spec.rows, n, opened.value_width))
    q, k, v = (torch.randn(*shape, generator=source).to(spec.dtype) for shape in shapes)

    def step(start: int, stop: int) -> Call:
        return lambda state: state.step(q[:, :, start:stop], k[:, start:stop], v[:, start:stop])

    opened.step(q[:, :, :prompt], k[:, :prompt], v[:, :prompt])
    state = opened.clone()
    state.seal()
    due = prompt + block - 1 - prompt % block  # the token that completes the block
    ending = state.clone()
    if due > prompt:
        step(prompt, due)(ending)
    after = slice(due, due + block + 3)
    return {
        "a step of one token": (state, step(prompt, prompt + 1)),
        "a step of one token that ends a block": (ending, step(due, due + 1)),
        f"a step of {block + 3} tokens": (ending, step(after.start, after.stop)),
        f"a step_partial of {block + 3} tokens": (
            ending,
            lambda state: state.step_partial(q[:, :, after], k[:, after], v[:, after]).log_mass,
        ),
        f"an append of {block + 3} tokens": (ending, lambda state: state.append(k[:, after], v[:, after])),
        "an attend": (state, lambda state: state.attend(q[:, :, :2])),
        "a seal": (opened, lambda state: state.seal()),
        "a select_rows": (state, lambda state: state.select_rows(torch.arange(spec.rows).flip(0))),
    }
