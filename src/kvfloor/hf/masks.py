"""Keep the rule and the padding of a compressed layer's mask, and make a tensor of them only on use."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

if TYPE_CHECKING:
    from kvfloor.hf.layer import CompressedLayer

EVERY = slice(None)


class SlotCount(int):
    """Carry the number of slots that a mask covers, and the compressed layer that returned the number.

    transformers passes sizes and no cache to a mask function. This number reaches the function unchanged, so that it
    can distinguish a compressed cache from all others.
    """

    layer: CompressedLayer

    def __new__(cls, count: int, layer: CompressedLayer) -> Self:
        slots = super().__new__(cls, count)
        slots.layer = layer
        return slots


class LazyMask:
    """Hold the rule and the padding of a compressed layer's mask, and act as its tensor in any tensor operation."""

    ndim = 4

    def __init__(
        self, arguments: dict[str, Any], form: Callable[..., Tensor | None] = sdpa_mask, queries: slice = EVERY
    ) -> None:
        """Keep the call `form(**arguments)` that makes the tensor, and the slice of queries to make it for."""
        self._arguments, self._form, self._queries = arguments, form, queries
        self._built: dict[bool, Tensor | None] = {}
        self._plain: bool | None = None
        self._device: torch.device | str | int | None = None  # where it was moved; None: where its parts are

    @property
    def plainly_causal(self) -> bool:
        """Return True if each token sees all before it and nothing else, padding apart.

        A rule that adds to this, such as images whose tokens see each other, may add nothing for the present tokens.
        Both rules are written out then and compared, once for all layers.
        """
        if self._arguments.get("mask_function", causal_mask_function) is causal_mask_function:
            return True
        if self._plain is None:
            unpadded: dict[str, Any] = self._arguments | {"attention_mask": None, "allow_is_causal_skip": False}
            unpadded |= {"allow_is_bidirectional_skip": False}
            its_own: Any = sdpa_mask(**unpadded)
            unpadded["mask_function"] = causal_mask_function
            plain: Any = sdpa_mask(**unpadded)
            self._plain = bool((its_own == plain).all())
        return self._plain

    @property
    def padding(self) -> Tensor | None:
        """Return a bool tensor (batch, slots seen and new), True where a token is real; None if all are."""
        return self._moved(self._arguments.get("attention_mask"))

    def for_stock(self) -> Tensor | None:
        """Make the mask that transformers' own attention would have got, once for all layers; None if it needs none."""
        return self._make(self._queries == EVERY)

    def tensor(self) -> Tensor:
        """Make the mask (batch, 1, queries, slots), never None. It is made once for all layers."""
        mask = self._make(False)
        assert mask is not None
        return mask

    def _make(self, may_be_left_out: bool) -> Tensor | None:
        if may_be_left_out not in self._built:
            always = {} if may_be_left_out else {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            mask = self._form(**(self._arguments | always))
            self._built[may_be_left_out] = None if mask is None else mask[:, :, self._queries, :]
        return self._moved(self._built[may_be_left_out])

    def _moved(self, tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or self._device is None else tensor.to(self._device)

    # ---- used as a tensor ----------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> LazyMask | Tensor:
        """Move the mask to a device, which leaves it one of its kind; any other conversion gives a tensor.

        Models whose layers are on several devices move each layer's arguments there. What is made is made once for all.
        """
        device = args[0] if len(args) == 1 else kwargs.get("device")
        other = len(args) > 1 or not set(kwargs) <= {"device", "non_blocking"} or (args and "device" in kwargs)
        if other or isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
            return self.tensor().to(*args, **kwargs)
        there = copy.copy(self)
        there._device = device
        return there

    def __getitem__(self, index: Any) -> LazyMask | Tensor:
        """Cut the mask. A cut along the queries alone, as layers without keys of their own make, stays a LazyMask."""
        if isinstance(index, tuple) and len(index) == 4 and self._queries == EVERY:
            batch, heads, queries, keys = index
            if (batch, heads, keys) == (EVERY, EVERY, EVERY) and isinstance(queries, slice):
                cut = LazyMask(self._arguments, self._form, queries)
                cut._device = self._device
                return cut
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the tensor that this mask makes."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass the mask as a tensor to any function of torch."""
        del types
        made = [_made(x) for x in args]
        return func(*made, **{name: _made(x) for name, x in (kwargs or {}).items()})

    def __eq__(self, other: object) -> Any:
        return self.tensor() == _made(other)

    def __ne__(self, other: object) -> Any:
        return self.tensor() != _made(other)

    def __lt__(self, other: Any) -> Any:
        return self.tensor() < _made(other)

    def __gt__(self, other: Any) -> Any:
        return self.tensor() > _made(other)

    __hash__ = object.__hash__

    def __invert__(self) -> Tensor:
        return ~self.tensor()

    def __add__(self, other: Any) -> Any:
        return operator.add(self.tensor(), _made(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return operator.sub(self.tensor(), _made(other))

    def __rsub__(self, other: Any) -> Any:
        return operator.sub(_made(other), self.tensor())

    def __mul__(self, other: Any) -> Any:
        return operator.mul(self.tensor(), _made(other))

    __rmul__ = __mul__

    def __and__(self, other: Any) -> Any:
        return operator.and_(self.tensor(), _made(other))

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        return operator.or_(self.tensor(), _made(other))

    __ror__ = __or__


def _made(x: Any) -> Any:
    if isinstance(x, LazyMask):
        return x.tensor()
    return type(x)(_made(each) for each in x) if isinstance(x, (list, tuple)) else x


def mask_over(before: str, *args: Any, **kwargs: Any) -> LazyMask | Tensor | None:
    """Make a mask where attention `before` was selected: its own for all caches, a lazy one for a compressed layer.

    Raises ValueError, before any layer has changed, for a rule that a compressed layer cannot follow.
    """
    if args:
        raise TypeError("this transformers release passes mask arguments by position; kvfloor supports 5.2 and newer")
    if isinstance(kwargs.get("attention_mask"), LazyMask):
        return kwargs["attention_mask"]  # a mask that was made already and is handed on
    form = eager_mask if before.endswith("eager") else sdpa_mask
    if not isinstance(kwargs.get("kv_length"), SlotCount):
        if getattr(kwargs.get("config"), "num_kv_shared_layers", 0):
            kwargs["allow_is_causal_skip"] = False  # such models cut it along its queries, and need one to cut
        return form(**kwargs)
    asked: Any = torch.compiler.disable(_asked) if torch.compiler.is_compiling() else _asked
    return asked(form, kwargs)


def _asked(form: Callable[..., Tensor | None], arguments: dict[str, Any]) -> LazyMask:
    slots: SlotCount = arguments["kv_length"]
    mask = LazyMask(arguments | {"kv_length": int(slots)}, form)
    if arguments.get("local_size") is None:  # a window's mask, which some models make whether a layer has one or not
        refuse_other_rules(mask)
    slots.layer.expect(arguments["batch_size"])
    return mask


def refuse_other_rules(mask: LazyMask) -> None:
    """Raise ValueError unless the rule is the plain causal one."""
    if not mask.plainly_causal:
        raise ValueError(
            "a compressed layer follows the plain causal rule, and this model's mask adds to it, as for images whose "
            "tokens see each other: give it text alone, or use a stock cache"
        )
