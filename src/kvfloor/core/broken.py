"""Define the error that a state raises after a call on it broke off halfway."""

from __future__ import annotations


class BrokenState(RuntimeError):
    """Report that a call broke off while it changed a state or a cache, which therefore refuses every further call.

    A call changes many tensors one after the other, so an exception in the middle (out of memory, Ctrl-C, a failing
    kernel or callback) leaves a mixture of old and new that would answer wrongly.
    """


def broken_state(call: str) -> BrokenState:
    """Return the error of a state whose call of this name, e.g. "append", broke off or has not returned yet.

    The latter happens if a callback of the call, or another thread, uses the state before the call has returned.
    """
    return BrokenState(
        f"{call} broke off halfway (or has not returned yet), so this state is neither the old one nor the new one and "
        f"refuses every call: reset() the cache that it belongs to, open a new state, or load the last one you saved"
    )
