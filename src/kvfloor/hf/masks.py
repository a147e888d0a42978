"""Represent the attention mask of a compressed layer by its rule and padding, and build its tensor only if used.

A rule is transformers' function that decides which slots a query attends to, such as the causal one. A slot is one
column of the padded batch; a mask covers the slots of earlier forwards too. A compressed layer is one whose keys and
values kvfloor compresses, by evicting tokens for example. Such a layer needs only the padding. So the mask tensor
(batch, 1, queries, slots), which is large for a long cache, is seldom built.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

if TYPE_CHECKING:
    from kvfloor.hf.answering import AnsweringLayer

EVERY = slice(None)


class SlotCount(int):
    """Represent the number of slots that a mask covers, with a reference to the compressed layer that returned it.

    transformers passes a mask function the mask's sizes, but not the cache. It passes on this object, unchanged, as one
    of the sizes. So the mask function can distinguish a compressed cache from all others.
    """

    layer: AnsweringLayer

    def __new__(cls, count: int, layer: AnsweringLayer) -> Self:
        slots = super().__new__(cls, count)
        slots.layer = layer
        return slots


class LazyMask:
    """Stand in for the mask tensor (batch, 1, queries, slots) of a compressed layer, and build it when it is used.

    The tensor is bool, True for slots that a query attends to, if the model used sdpa before kvfloor's attention. For
    eager attention it is a float tensor to be added to the logits.
    Any tensor operation on this object builds the tensor, once, and is applied to the tensor. Only a move to another
    device and a slice of the queries return a LazyMask again.
    """

    ndim = 4

    def __init__(
        self, arguments: dict[str, Any], form: Callable[..., Tensor | None] = sdpa_mask, queries: slice = EVERY
    ) -> None:
        """Store the call `form(**arguments)` that builds the tensor, and `queries`, the slice of queries to keep of it.

        form: a mask function of transformers, such as `sdpa_mask`, which returns None if no mask is needed; arguments:
        its keyword arguments. EVERY keeps all queries.
        """
        self._arguments, self._form, self._queries = arguments, form, queries
        self._built: dict[bool, Tensor | None] = {}
        self._plain: bool | None = None
        self._device: torch.device | str | int | None = None  # where it was moved; None: where its parts are

    @property
    def plainly_causal(self) -> bool:
        """Return True if each token attends to itself and all tokens before it and to nothing else, pads disregarded.

        A rule that lets image tokens attend to later ones is still causal for a text without images. So for any rule
        other than the causal one, the mask is built and compared with the causal mask, once for all layers.
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
    def window(self) -> int | None:
        """Return the number of slots that a query attends to at most, its own among them; None if all before it."""
        return self._arguments.get("local_size")

    @property
    def padding(self) -> Tensor | None:
        """Return the padding mask, bool (batch, slots), True in slots of real tokens; None if all are real.

        It covers the slots of earlier forwards too.
        """
        return self._moved(self._arguments.get("attention_mask"))

    def for_stock(self) -> Tensor | None:
        """Build the mask that transformers' own attention would have received; None if no mask is needed.

        No mask is needed, for example, where sdpa can use is_causal instead. The mask is built once for all layers, and
        is bool or additive, as the class says.
        """
        return self._make(self._queries == EVERY)

    def tensor(self) -> Tensor:
        """Build the mask tensor (batch, 1, queries, slots), once for all layers.

        It is bool for sdpa, additive for eager attention. It is built even where sdpa would need no mask. There
        `for_stock`, which returns the mask for transformers' own attention, returns None.
        """
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
        """Return the mask on another device, still a LazyMask; any other conversion, as to a dtype, returns a tensor.

        Models whose layers are on several devices move each layer's arguments there. All copies share one built tensor.
        """
        device = args[0] if len(args) == 1 else kwargs.get("device")
        other = len(args) > 1 or not set(kwargs) <= {"device", "non_blocking"} or (args and "device" in kwargs)
        if other or isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
            return self.tensor().to(*args, **kwargs)
        there = copy.copy(self)
        there._device = device
        return there

    def __getitem__(self, index: Any) -> LazyMask | Tensor:
        """Return a part of the mask: a LazyMask if only its queries are sliced, otherwise a tensor.

        `index` is any index of the tensor; mask[:, :, a:b, :] slices the queries. Models do this for layers that use
        the keys of an earlier layer.
        """
        if isinstance(index, tuple) and len(index) == 4 and self._queries == EVERY:
            batch, heads, queries, keys = index
            if (batch, heads, keys) == (EVERY, EVERY, EVERY) and isinstance(queries, slice):
                cut = LazyMask(self._arguments, self._form, queries)
                cut._device = self._device
                return cut
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        """Build the tensor, and return its attribute `name`."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the torch function `func` with the built tensor in place of each LazyMask among its arguments.

        args and kwargs are the function's arguments; `types`, which torch passes too, is not used.
        """
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
    """Return the attention mask of a forward: a `LazyMask` for compressed layers, for others a tensor or None.

    None means that no mask is needed. This is the mask function that transformers calls, with its arguments for masks
    in `kwargs`. before: name of the attention that the model used before kvfloor's. If it ends with "eager", a tensor
    has the form for eager attention (additive), otherwise the form for sdpa (bool).
    Raises TypeError if any mask arguments are passed by position (`args`).
    Raises ValueError, before any layer has changed, for a mask rule that a compressed layer cannot follow.
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
    """Raise ValueError unless the mask is the causal mask, possibly with padding."""
    if not mask.plainly_causal:
        raise ValueError(
            "a compressed layer follows the plain causal rule, and this model's mask adds to it, as for images whose "
            "tokens see each other: give it text alone, or use a stock cache"
        )
