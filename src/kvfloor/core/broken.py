"""Define the error that a state raises after a call on it broke off halfway."""

from __future__ import annotations


class BrokenState(RuntimeError):
    """Report that a call broke off while it changed a state or a cache, which therefore refuses every further call.

    A call changes many tensors one after the other. So an exception in the middle (out of memory, Ctrl-C, a failing
    kernel or callback) leaves a mixture of old and new tensors, and answers computed from it would be wrong.
    """


def broken_state(call: str) -> BrokenState:
    """Return the error to raise when a state is used after its method `call`, e.g. "append", broke off.

    The same error is raised if that method still runs while one of its callbacks, or another thread, uses the state.
    """
    return BrokenState(
        f"{call} broke off halfway (or has not returned yet), so this state is neither the old one nor the new one and "
        f"refuses every call: reset() the cache that it belongs to, open a new state, or load the last one you saved"
    )
