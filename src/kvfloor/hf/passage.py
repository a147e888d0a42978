"""Detect forwards that broke off halfway, by recording which layers of a cache have received their tokens.

A forward passes its tokens to one layer after the other. If it breaks off, some layers have stored them and others have
not, and the cache is unusable. No layer can detect this alone, and a cache gets no signal when a forward begins or
ends. But a model makes each request to a layer (give keys, read or write a linear state) only once per forward. So a
request that is made a second time belongs to the next forward. The record of a forward is the set of requests made
since it began, with the layers that have stored their keys or states.

Linear states are those of convolutions and of linear attention. Models may change them in place. Each tensor counts its
in-place changes (torch's `Tensor._version`). So if these counts differ between two layers of one class, the forward
broke off between them.
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

# In older transformers releases, models read linear states from the layers themselves, unseen by the cache.
_LINEAR_SEEN = hasattr(Cache, "get_conv_state")
_KEYS = "keys"
_REMEDY = "reset() it, load the last one you saved, or begin with a new one"
_CROSSING = (
    ". If it was given alone, its model asked it for the encoder's tokens too: give an encoder-decoder model "
    "EncoderDecoderCache(CompressedCache(...), DynamicCache())"
)

Request = tuple[int, str, int]  # layer, kind of tensor read or given, index among several


class Passage:
    """Record which layers of a cache have stored the tokens of the newest forward.

    kinds   per layer: name of the class that holds its linear states, None without such states. A forward changes the
            linear states of all layers of one class in the same way
    keeps   per layer: True if a forward must store something in it
    """

    def __init__(self, kinds: Sequence[str | None], keeps: Sequence[bool], hint: str = "") -> None:
        """Build the record of a cache before its first forward.

        kinds, keeps: one entry per layer, as for the class. hint: added to the error if a forward broke off.
        """
        self._kinds, self._keeps, self._hint = list(kinds), list(keeps), hint
        self._known: set[int] = set()  # layers whose keys came in forwards before
        self._broke: str | None = None
        self._clear()

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Passage:
        """Return the record for an empty cache of the model that has the configuration `config`."""
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
        """Record that a layer receives keys and has stored nothing of them yet.

        Raises BrokenState if an earlier forward broke off.
        """
        self._request((layer, _KEYS, 0))
        self._open.add(layer)

    def passed_over(self, layer: int) -> bool:
        """Return True if the model bypasses kvfloor's attention, False if the newest forward broke off.

        It tells apart two reasons why keys that a layer received earlier still wait for kvfloor's attention. Call it
        when keys wait and `layer` receives new ones, before `begin_keys` records that.
        True   `layer` has received no keys in the newest forward yet. So this forward still runs, and has gone past the
               waiting keys without attending to them
        False  `layer` has received keys in it. So the new keys begin another forward, and the newest one ended while
               keys waited
        In a model with only one layer that stores anything, the two cases look alike, and the result is True.
        """
        return (layer, _KEYS, 0) not in self._made or sum(self._keeps) == 1

    def changing(self, layer: int) -> None:
        """Record that the layer begins to store the keys, so that a failure from now on makes the cache unusable."""
        self._moved = True

    def unchanged(self, layer: int) -> None:
        """Record that the layer refused the keys, and is as it was before it received them."""
        self._open.discard(layer)
        self._made.discard((layer, _KEYS, 0))
        self._moved = bool(self._made)

    def took_keys(self, layer: int) -> None:
        """Record that the layer has stored the keys."""
        self._moved = True
        self._open.discard(layer)

    def hand_out(self, layer: int, kind: str, index: int, state: Tensor | None) -> None:
        """Record that the model reads a convolution or recurrent state of the layer, which it may change in place.

        kind: "conv" or "recurrent". index: which of the layer's states of that kind. state: its tensor, None if empty.
        """
        self._request((layer, kind, index))
        if state is not None:
            self._moved = True
            self._handed[layer, kind, index] = (state, _version(state))

    def begin_state(self, layer: int, kind: str, index: int) -> None:
        """Record that the model is about to write a convolution or recurrent state of the layer.

        kind: "conv" or "recurrent". index: which of the layer's states of that kind.
        """
        self._request((layer, f"new {kind}", index))
        self._moved = True

    def filled_state(self, layer: int, kind: str, index: int) -> None:
        """Record that the model has written a convolution or recurrent state of the layer.

        kind: "conv" or "recurrent". index: which of the layer's states of that kind.
        """
        self._filled.add((layer, kind, index))

    def _request(self, request: Request) -> None:
        if self._broke is not None or request in self._made:  # the second time: a new forward
            self.settle()
        self._made.add(request)

    # ---- completed or broken --------------------------------------------------------------------------------

    def settle(self) -> None:
        """Close the record of the newest forward, so that the next request begins the record of another forward.

        Raises BrokenState, now and in later calls, if the newest forward broke off halfway.
        """
        self._broke = self._broke or self._fault()
        self.check()
        self._known |= {layer for layer, kind, _ in self._made if kind == _KEYS and self._moved}
        self._clear()

    def check(self) -> None:
        """Raise BrokenState if a forward broke off halfway, or has not ended yet."""
        fault = self._broke or self._fault()
        if fault is not None:
            raise BrokenState(fault)

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Guard a change of all layers outside a forward.

        An exception in the `with` block leaves the cache marked as broken.
        what: name of the change, for the error that later calls raise after such an exception. Raises BrokenState,
        before the block, if the newest forward broke off.
        """
        self.settle()
        self._broke = f"{what} broke off after some layers of this cache had changed: {_REMEDY}"
        yield
        self._broke = None

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Guard a reset of all layers, which repairs a broken cache.

        Once the `with` block completes, the cache is no longer marked as broken, and the record is empty. An exception
        in the block leaves the cache marked as broken.
        """
        self._broke = f"reset() broke off halfway: call it again, {_REMEDY.partition(', ')[2]}"
        yield
        self._broke = None
        self._known.clear()
        self._clear()

    def break_off(self, why: str) -> None:
        """Mark the cache as broken, until it is reset: later calls raise BrokenState with the message `why`."""
        self._broke = why

    def _fault(self) -> str | None:
        """Return an error message if only some layers have stored the newest forward's tokens; otherwise None.

        A message is also returned if a layer received keys, and the forward went on without attending to them.
        """
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
        """Return {last} if layer `last` lacks something that it must store in this forward; otherwise the empty set.

        last: the last layer that the forward has reached. It is compared with the earlier layers that have linear
        states of the same class (`kinds`). These have stored everything, because the forward has gone on to later
        layers. `last` lacks something if `_changed` lists other keys, states or numbers of changes for it than for
        them. If `last` has no linear states, the result is the empty set.
        """
        kind = self._kinds[last]
        like = [i for i in {layer for layer, _, _ in self._made} if self._kinds[i] == kind]
        if kind is None or len({self._changed(layer) for layer in like}) == 1:
            return set()
        return {last}

    def _changed(self, layer: int) -> frozenset[tuple[str, int, int]]:
        """Return what this forward has stored in the layer: (kind, index, number of changes) of each tensor.

        For a linear state that the model read, the number counts the changes since then; a model may change one state
        several times, head by head. A state that the model wrote anew gives the entry ("new conv" or "new recurrent",
        index, 1), and keys that the layer received give the entry ("keys", 0, 1).
        """
        often = {request: _version(state) - version for request, (state, version) in self._handed.items()}
        filled = {(f"new {kind}", index, 1) for at, kind, index in self._filled if at == layer}
        changed = {(kind, index, times) for (at, kind, index), times in often.items() if at == layer}
        return frozenset(changed | filled | ({(_KEYS, 0, 1)} if (layer, _KEYS, 0) in self._made else set()))

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy or pickle, without the record of the newest forward.

        If that forward broke off or still runs, its error message is included. The copy could not detect this later:
        detection compares the tensors' counts of in-place changes, and the count of a copied tensor starts from 0.
        """
        plain = dict(self.__dict__)
        try:
            self.check()
        except BrokenState as fault:
            plain["_broke"] = str(fault)
        return plain | {"_made": set(), "_open": set(), "_moved": False, "_handed": {}, "_filled": set()}


def _version(state: Tensor) -> int:
    """Return the number of in-place changes of a tensor; 0 for an inference-mode tensor, which does not count them."""
    return 0 if state.is_inference() else state._version


def outside_inference(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Return call(*args, **kwargs), made outside inference mode, so that new tensors count their in-place changes."""
    if not torch.is_inference_mode_enabled():
        return call(*args, **kwargs)
    with torch.inference_mode(False), torch.no_grad():
        return call(*args, **kwargs)


def keeps_something(layer: Any, own: bool) -> bool:
    """Return True if every forward must store something in this cache layer.

    own: True if the layer's class is transformers' own. Then the result is True if the layer keeps keys, or linear
    states that models access through the cache. For any other class the result is always True.
    """
    if not own or hasattr(layer, "get_seq_length"):
        return True
    return _LINEAR_SEEN and hasattr(layer, "conv_states")
