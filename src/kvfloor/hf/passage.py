"""Track the layers of a cache that the tokens of one forward have reached.

A forward hands its tokens to one layer after the other. If it breaks off, some layers have them and others do not, and
the cache is of no use. No layer can detect that alone, and a cache gets no signal when a forward begins or ends. But a
model makes the same requests to each layer in every forward: a request made a second time belongs to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from kvfloor.core.broken import BrokenState
from kvfloor.hf.families import layer_roles

# Releases before that let models take linear states out of the layers themselves, unseen by the cache.
_LINEAR_SEEN = hasattr(Cache, "get_conv_state")
_KEYS = "keys"
_REMEDY = "reset() it, load the last one you saved, or begin with a new one"
_CROSSING = (
    ". If it was given alone, its model asked it for the encoder's tokens too: give an encoder-decoder model "
    "EncoderDecoderCache(CompressedCache(...), DynamicCache())"
)

Request = tuple[int, str, int]  # layer, kind of tensor read or given, index among several


class Passage:
    """Record which layers have taken in the tokens of the newest forward.

    kinds   per layer the type of its linear state, if it has one, else None: those of one type are filled alike
    keeps   per layer, True if it keeps anything that a forward has to fill
    """

    def __init__(self, kinds: Sequence[str | None], keeps: Sequence[bool], hint: str = "") -> None:
        """Begin with no forward. `hint` names another likely cause where a forward seems to have broken off."""
        self._kinds, self._keeps, self._hint = list(kinds), list(keeps), hint
        self._known: set[int] = set()  # layers whose keys came in forwards before
        self._broke: str | None = None
        self._clear()

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Passage:
        """Return the passage of a cache for this model."""
        roles = layer_roles(config)
        return cls(
            [type(theirs).__name__ if hasattr(theirs, "conv_states") else None for _, theirs in roles],
            [keeps_something(theirs, own=role == "own") for role, theirs in roles],
            _CROSSING if getattr(config, "is_encoder_decoder", False) else "",
        )

    def _clear(self) -> None:
        self._made: set[Request] = set()
        self._open: set[int] = set()  # keys were given to these layers, and are not taken in yet
        self._moved = False
        # Linear states that models may change in place, with their version when they were handed out; filled ones.
        self._handed: dict[Request, tuple[Tensor, int]] = {}
        self._filled: set[Request] = set()

    # ---- what the cache and its layers report --------------------------------------------------------------

    def begin_keys(self, layer: int) -> None:
        """Note that a layer, still unchanged, is given keys. Raises BrokenState if an earlier forward broke off."""
        self._request((layer, _KEYS, 0))
        self._open.add(layer)

    def passed_over(self, layer: int) -> bool:
        """Return True if staged keys that wait for their attention were passed over, now that keys come to `layer`.

        They were if the same forward has gone on to this layer. If this is a new forward instead, the old one broke
        off, or a model of one layer is not prepared.
        """
        return (layer, _KEYS, 0) not in self._made or sum(self._keeps) == 1

    def changing(self, layer: int) -> None:
        """Note that the layer begins to take the keys in."""
        self._moved = True

    def unchanged(self, layer: int) -> None:
        """Note that the layer refused the keys, and is as it was before."""
        self._open.discard(layer)
        self._made.discard((layer, _KEYS, 0))
        self._moved = bool(self._made)

    def took_keys(self, layer: int) -> None:
        """Note that the layer has taken the keys in."""
        self._moved = True
        self._open.discard(layer)

    def hand_out(self, layer: int, kind: str, index: int, state: Tensor | None) -> None:
        """Note that the model gets a linear state, which it may change in place."""
        self._request((layer, kind, index))
        if state is not None:
            self._moved = True
            self._handed[layer, kind, index] = (state, _version(state))

    def begin_state(self, layer: int, kind: str, index: int) -> None:
        """Note that a linear state is about to be filled."""
        self._request((layer, f"new {kind}", index))
        self._moved = True

    def filled_state(self, layer: int, kind: str, index: int) -> None:
        """Note that a linear state was filled."""
        self._filled.add((layer, kind, index))

    def _request(self, request: Request) -> None:
        if self._broke is not None or request in self._made:  # the second time: a new forward
            self.settle()
        self._made.add(request)

    # ---- completed or broken --------------------------------------------------------------------------------

    def settle(self) -> None:
        """End the newest forward. Raises BrokenState, now and in later calls, if it broke off halfway."""
        self._broke = self._broke or self._fault()
        self.check()
        self._known |= {layer for layer, kind, _ in self._made if kind == _KEYS and self._moved}
        self._clear()

    def check(self) -> None:
        """Raise BrokenState if a forward broke off halfway, or is halfway through."""
        fault = self._broke or self._fault()
        if fault is not None:
            raise BrokenState(fault)

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Change all layers outside a forward: the cache is broken unless the change is completed."""
        self.settle()
        self._broke = f"{what} broke off after some layers of this cache had changed: {_REMEDY}"
        yield
        self._broke = None

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Empty all layers, whatever their state."""
        self._broke = f"reset() broke off halfway: call it again, {_REMEDY.partition(', ')[2]}"
        yield
        self._broke = None
        self._known.clear()
        self._clear()

    def _fault(self) -> str | None:
        """Return the reason why only some layers have the newest forward's tokens; None if there is no such fault."""
        if not self._made:
            return None
        last, given = max(layer for layer, _, _ in self._made), {layer for layer, _, _ in self._made}
        unanswered = sorted(self._open)
        if unanswered and (unanswered[0] < last or sum(self._keeps) == 1):
            return (
                f"the keys of layer {unanswered[0]} were never asked for: the forward broke off there, or its model "
                f"does not use kvfloor's attention and needs kvfloor.hf.prepare(model) first. This cache is of no use: "
                f"{_REMEDY}"
            )
        if not self._moved:
            return None
        keyed = {layer for layer, kind, _ in self._made if kind == _KEYS}
        after = {layer for layer in range(last + 1, len(self._keeps)) if self._keeps[layer]}
        missing = sorted(self._open | (self._known - keyed) | (after - given) | self._half_filled(last))
        if not missing:
            return None
        return (
            f"the last forward broke off (or has not ended): some layers of this cache have its tokens, layer "
            f"{missing[0]} does not, so that it is of no use: {_REMEDY}{self._hint}"
        )

    def _half_filled(self, last: int) -> set[int]:
        """Return the last layer if its linear states are not filled as those of layers of its kind; else the empty set.

        Earlier layers are complete, since the forward went past them.
        """
        kind = self._kinds[last]
        like = [i for i in {layer for layer, _, _ in self._made} if self._kinds[i] == kind]
        if kind is None or len({self._changed(layer) for layer in like}) == 1:
            return set()
        return {last}

    def _changed(self, layer: int) -> frozenset[tuple[str, int, int]]:
        """Return the layer's linear states, each with its count of in-place changes.

        A model may change one state several times, head by head.
        """
        often = {request: _version(state) - version for request, (state, version) in self._handed.items()}
        filled = {(f"new {kind}", index, 1) for at, kind, index in self._filled if at == layer}
        return frozenset(filled | {(kind, index, times) for (at, kind, index), times in often.items() if at == layer})

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of a copy, with the fault found now: a copy's tensors count their versions anew."""
        plain = dict(self.__dict__)
        try:
            self.check()
        except BrokenState as fault:
            plain["_broke"] = str(fault)
        return plain | {"_made": set(), "_open": set(), "_moved": False, "_handed": {}, "_filled": set()}


def _version(state: Tensor) -> int:
    """Count the in-place changes of a tensor. A tensor made in inference mode does not count them, and gives 0."""
    return 0 if state.is_inference() else state._version


def outside_inference(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the call outside inference mode, so that the tensors it makes count their in-place changes."""
    if not torch.is_inference_mode_enabled():
        return call(*args, **kwargs)
    with torch.inference_mode(False), torch.no_grad():
        return call(*args, **kwargs)


def keeps_something(layer: Any, own: bool) -> bool:
    """Return True if a forward must fill this layer: it keeps keys, or linear states whose use the cache can see."""
    if not own or hasattr(layer, "get_seq_length"):
        return True
    return _LINEAR_SEEN and hasattr(layer, "conv_states")
