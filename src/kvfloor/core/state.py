"""Define the state of a cache method, i.e. the memory of its streams of tokens.

This module implements the checks of input, the padding, the token counts and the saving for all methods.
A method is the configuration of a KV cache; a policy is its rule of eviction, a summary its compressed form of evicted
tokens. The spec has the sizes, dtype and constants of a state. A row is one (batch item, kv head) stream; its clock
`seen` counts its tokens. A call's real tokens are those that are not padding; packed tokens have each row's real tokens
first. To seal a state is to mark the end of the prompt, to pin tokens is to protect them from eviction, to forget
tokens is to drop them on request. A token's position is its index in its row's stream; e tokens of any rows are named
by two tensors (e,), their rows and their positions. A message is a saved state, as bytes.
A `Partial` is the result of attention: the mean of values under the softmax weights, and the log of the softmax mass.
Its compute dtype is float32, or float64 for float64 tokens. In shapes, g is the GQA group (query heads per kv head), d
and dv are the widths of a key and a value, t tokens and m queries per row.
"""

from __future__ import annotations

import math
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from kvfloor.core import message
from kvfloor.core.broken import broken_state
from kvfloor.core.device import FiniteWatch, sent
from kvfloor.core.fields import Field, require_equal
from kvfloor.core.memory import Memory
from kvfloor.core.method import Guarantee, Method
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec

if TYPE_CHECKING:
    from kvfloor.core.slots import Slots

Self = TypeVar("Self", bound="State")
M = TypeVar("M", bound=Method)  # the class of the method that opens a state
Call = TypeVar("Call", bound=Callable[..., Any])
DECODING = ("step", "step_partial", "append")
"""Public calls that do not wait for a device to learn whether earlier tokens were finite."""
ANEW = (
    "start again with an empty state and without these tokens, or use a method that keeps whole tokens and no summary"
)


def _plain(call: Call) -> Call:
    """Wrap `call` so that it runs outside autograd and outside inference mode.

    Tensors made in inference mode could not be written to later.
    """

    @wraps(call)
    def inside(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
            return call(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return call(*args, **kwargs)

    return inside  # type: ignore[return-value]


def whole(call: Call) -> Call:
    """Wrap a state's method so that it raises the exception BrokenState if an earlier call on the state broke off.

    If none broke off, the call runs, outside autograd and outside inference mode. A call breaks off if an exception
    ends it while it changes the state. To tell this, every call sets the attribute `_underway` to its own name after
    the check of its input, just before it changes the state. The wrapper sets `_underway` to None when a call returns.
    """

    @wraps(call)
    def inside(self: State, *args: Any, **kwargs: Any) -> Any:
        if self._underway is not None:
            raise broken_state(self._underway)
        if self._known_finite is not None:
            self._require_finite_so_far(wait=call.__name__ not in DECODING)
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                out = call(self, *args, **kwargs)
        else:
            out = call(self, *args, **kwargs)
        self._underway = None
        return out

    return inside  # type: ignore[return-value]


class _Plain(ABCMeta):
    """Define a metaclass that runs the constructors of states outside autograd and outside inference mode."""

    @_plain
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class State(Memory, Generic[M], metaclass=_Plain):
    """Store a method's memory of `rows` independent streams of tokens.

    A variant (subclass) implements `_append` and `_read`. It overrides `_step_partial` if it has a form that is faster
    than token by token. Before anything changes, `_require_tokens` refuses tokens that the variant cannot take, and
    `_require_group` a wrong number of queries per kv head.
    Tokens are k (rows, t, d) and v (rows, t, dv). Queries are (rows, g, t, d) for `step`, (rows, g, m, d) for `attend`,
    with g the GQA group, and (rows, m, d) for `read`. The mask `present` (rows, t), bool, is False for padding; None:
    all tokens are real.
    All public calls raise TypeError or ValueError on bad input and leave the state as it was. After any other exception
    the state is either unchanged, or every further call raises the exception BrokenState. A state that keeps whole
    tokens (each with its own key and value) holds them in `slots`.
    On a device other than the CPU, calls with one token do not wait to learn whether it is finite. The device keeps
    record. A later call raises ValueError and leaves the state broken: the first one after the device's report, which
    it sends every `SENT_EVERY` tokens, or the first call that is no such step.
    """

    slots: Slots | None = None
    _underway: str | None = None  # the call that is changing this state, or that broke off while it did
    _known_finite: FiniteWatch | None = None  # of the tokens that a device got one by one

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "guarantee" in vars(cls):  # a theorem about the tokens seen, which a broken state holds in part only
            cls.guarantee = whole(cls.guarantee)

    def __init__(self, method: M, spec: Spec) -> None:
        if spec.rotation is not None and not method.traits.turns:
            raise ValueError(
                f"{method} does not hold every key that it reads, so none can be turned to its place among what is "
                f"held: open it without Spec.rotation, or take a policy such as sinks or h2o, without a summary of "
                f"keys or coded numbers"
            )
        self.method = method
        self.spec = spec
        self.shared: dict[str, Tensor] = {}  # tensors fixed by (method, spec) alone: public, uncounted
        self.seen = torch.zeros(spec.rows, dtype=torch.int64)  # tokens per row; on the CPU, as all clocks
        self.sealed = False

    # ---- methods that a variant writes -----------------------------------------------------------------------------

    @property
    def key_width(self) -> int:
        """Return the width of `k`: the spec's d, or more in tensor attention (several keys per token)."""
        return self.spec.d

    @property
    def value_width(self) -> int:
        """Return the width of `v`: the spec's dv, or more in tensor attention (several values per token)."""
        return self.spec.dv

    @abstractmethod
    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        """Append the first take[r] tokens of each row r to the memory, and add take (rows,) to `seen`."""

    @abstractmethod
    def _read(self, q: Tensor) -> Partial:
        """Return attention of q (rows, m, d) over all tokens seen, a `Partial` (rows, m); change nothing."""

    def _step_partial(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Partial:
        """Append the first take[r] tokens of each row r, and answer each token's queries: a `Partial` (rows, g, t).

        A token's queries are answered right after it is appended, before the next token. Faster variants must give the
        same answers as this token-by-token form. From index take[r] on, row r is padding, and its results have no
        meaning: the caller replaces them.
        """
        out = Partial.empty(*q.shape[:3], dv=self.spec.dv, dtype=self.spec.compute_dtype, device=q.device)
        for i in range(int(take.max())):
            self._append(k[:, i : i + 1], v[:, i : i + 1], (take > i).to(torch.int64))
            part = self._read(q[:, :, i])
            out.mean[:, :, i], out.log_mass[:, :, i] = part.mean, part.log_mass
        return out

    def _step(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Tensor:
        """Append the first take[r] tokens of each row r, and return the outputs (rows, g, t, dv) of all their queries.

        Each token's queries are answered right after the token is appended, before the next one. From index take[r] on,
        row r is padding, and its outputs have no meaning: the caller replaces them.
        """
        return self._step_partial(k, v, q, take).mean

    @property
    def _steps_alone(self) -> bool:
        """Return True if the state is ready for `_step_one`, a faster form of `_step` for one new token in every row.

        False for variants that have no such form.
        """
        return False

    def _step_one(self, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        """Append one token to every row and return the outputs (rows, g, 1, dv) of its queries q (rows, g, 1, d).

        Called only while `_steps_alone` is True, and without padding. A variant overrides it with a faster form.
        """
        return self._step(k, v, q, torch.ones(self.spec.rows, dtype=torch.int64))

    def _attend(self, q: Tensor) -> Partial:
        """Return attention of q (rows, g, m, d) over all tokens seen: a `Partial` (rows, g*m).

        Unlike `_read`, it may change the state: an eviction policy may learn from the queries.
        """
        return self._read(q.flatten(1, 2))

    def _seal(self) -> None:
        """Handle the end of the prompt, for example by compressing the prompt."""

    def _require_group(self, g: int, attending: bool = False) -> None:
        """Raise ValueError if g, the number of queries per kv head, differs from that of the queries stored so far.

        The default accepts any g, as it stores no queries. attending: True for queries given by `attend`, i.e. without
        tokens of their own.
        """

    def _require_tokens(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        """Raise ValueError if the method does not accept the tokens: the first take[r] of each row r.

        The default accepts all tokens.
        """

    def _select_rows(self, index: Tensor) -> None:
        """Keep only the rows at `index` (r,), in this order, repeats allowed; `select_rows` has checked the indices."""
        super().select_rows(index)

    def _pin(self, start: int, stop: int) -> None:
        """Keep the tokens start <= position < stop of every row for good; raise ValueError if the method cannot."""
        raise ValueError(f"{self.method} cannot pin tokens: take a method that keeps whole tokens, such as 'h2o@512'")

    def _require_forgettable(self, row: Tensor, position: Tensor) -> None:
        """Raise ValueError if the memory cannot drop one of the tokens, each named by row (e,) and position (e,).

        For example, a token that a summary has absorbed cannot be subtracted from it.
        """
        del row, position
        raise ValueError(
            f"{self.method} does not keep whole tokens, so it cannot drop some of those it has taken in: {ANEW}"
        )

    def _forget(self, row: Tensor, position: Tensor) -> None:
        """Drop tokens, named by row (e,) and position (e,) on the CPU, which `_require_forgettable` accepted."""

    # ---- public calls -----------------------------------------------------------------------------------

    @whole
    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        """Append tokens k (rows, t, d), v (rows, t, dv) without answering queries.

        present (rows, t), bool, is False for padding, which is skipped; None: all tokens are real.
        """
        k, v = self._checked(k, "k", self.key_width), self._checked(v, "v", self.value_width)
        take, order = self._arrange(k, v, None, present)
        if order is not None:
            k, v = _pack(k, order), _pack(v, order)
        if bool(take.any()):
            self._require_tokens(k, v, take)
            self._underway = "append"
            self._append(k, v, take)

    @whole
    def step(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Tensor:
        """Append tokens and answer their queries causally: token i attends to every token up to and including itself.

        q (rows, g, t, d) -> (rows, g, t, dv) in the spec's dtype; zeros where `present` is False.
        """
        if present is None and self._steps_alone and self._one_token(k, v, q):
            self._require_group(q.shape[1])
            self._underway = "step"
            return self._step_one(k, v, q).to(self.spec.dtype)
        k, v, q, take, order = self._packed(k, v, q, present)
        if not any(take.tolist()):
            return q.new_zeros(*q.shape[:3], self.spec.dv)
        self._require_group(q.shape[1])
        self._require_tokens(k, v, take)
        self._underway = "step"
        return _unpack(self._step(k, v, q, take), take, order, 0.0).to(self.spec.dtype)

    @whole
    def step_partial(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None = None) -> Partial:
        """Append tokens and return outputs and log-masses of their queries: a `Partial` (rows, g, t).

        Token i attends to every token up to and including itself. The result is in the compute dtype, and empty (mean
        0, log-mass -inf) where `present` is False. Use this call instead of `step` to merge further terms into the
        answer, such as a sink's logit.
        """
        k, v, q, take, order = self._packed(k, v, q, present)
        if not any(take.tolist()):
            return Partial.empty(*q.shape[:3], dv=self.spec.dv, dtype=self.spec.compute_dtype, device=q.device)
        self._require_group(q.shape[1])
        self._require_tokens(k, v, take)
        self._underway = "step_partial"
        part = self._step_partial(k, v, q, take)
        log_mass = _unpack(part.log_mass.unsqueeze(-1), take, order, -torch.inf).squeeze(-1)
        return Partial(_unpack(part.mean, take, order, 0.0), log_mass)

    @whole
    def read(self, q: Tensor) -> Partial:
        """Return attention of q (rows, m, d) over the remembered tokens: a `Partial` (rows, m). Changes nothing."""
        return self._read(self._checked(q, "q", self.spec.d, finite=True))

    @whole
    def attend(self, q: Tensor) -> Tensor:
        """Return the attention outputs (rows, g, m, dv) of q (rows, g, m, d) over the remembered tokens; append none.

        An eviction policy may learn from the queries.
        """
        q = self._checked(q, "q", self.spec.d, axes=4, finite=True)
        if q.shape[1] < 1:
            raise ValueError(f"q must be (rows, g, m, d) with g >= 1, got {tuple(q.shape)}")
        self._require_group(q.shape[1], attending=True)
        if type(self)._attend is not State._attend:  # the base method only reads
            self._underway = "attend"
        mean = self._attend(q).mean
        return mean.view(*q.shape[:3], self.spec.dv).to(self.spec.dtype)

    @whole
    def seal(self) -> None:
        """Mark the end of the prompt, once; methods that compress the prompt do so now."""
        if not self.sealed:
            self._underway = "seal"
            self._seal()
            self.sealed = True

    @whole
    def require_forgettable(self, row: Tensor, position: Tensor) -> None:
        """Raise ValueError if one of these tokens, named by row (e,) and position (e,), cannot be dropped by `forget`.

        The call changes nothing.
        """
        self._named(row, position)

    @whole
    def forget(self, row: Tensor, position: Tensor) -> None:
        """Drop tokens, named by row (e,) and position (e,), int64: no later query attends to them.

        The counts `seen` do not change, and a policy keeps what it learnt from these tokens. Tokens that were evicted
        without a summary are ignored. Raises ValueError, the state unchanged, if a token cannot be dropped, e.g.
        because a summary has absorbed it.
        """
        row, position = self._named(row, position)
        if row.numel():
            self._underway = "forget"
            self._forget(row, position)

    def _named(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Check the arguments of `forget`, and return them on the CPU: row (e,) and position (e,).

        Raises ValueError unless both are 1-d int64 tensors of one length, and every token was seen and can be dropped.
        """
        row, position = (torch.as_tensor(x).to("cpu") for x in (row, position))
        if row.ndim != 1 or row.shape != position.shape or row.dtype != torch.int64 or position.dtype != torch.int64:
            raise ValueError(
                f"forget needs a row and a position per token, 1-d int64 tensors, got {row.dtype} {tuple(row.shape)} "
                f"and {position.dtype} {tuple(position.shape)}"
            )
        if not row.numel():
            return row, position
        if int(row.min()) < 0 or int(row.max()) >= self.spec.rows:
            raise ValueError(f"rows must lie in 0..{self.spec.rows - 1}, got {row.unique().tolist()}")
        if bool(((position < 0) | (position >= self.seen[row])).any()):
            raise ValueError(f"only tokens that were seen can be dropped: rows have seen {self.seen.tolist()}")
        self._require_forgettable(row, position)
        return row, position

    @whole
    def reserve(self, g: int, tokens: int | None = None) -> None:
        """Allocate all memory that the state will ever need, so that its size is final; for a state without tokens.

        g       query heads per kv head (GQA group), as a state may store queries
        tokens  most tokens of a row, for methods that keep all of them; None: not known
        Raises ValueError for a state that has tokens already, and for a method whose memory grows with the stream,
        unless it keeps all tokens and `tokens` is given.
        """
        if bool(self.seen.any()):
            raise ValueError(f"reserve memory before the first token; rows have seen {self.seen.tolist()}")
        self._reserve(g, tokens)

    def _reserve(self, g: int, tokens: int | None) -> None:
        """Allocate all memory that the state will need for g query heads per kv head and `tokens` tokens per row.

        tokens None: the number is not known. Raises ValueError for a method whose memory grows with the stream.
        """
        del g, tokens
        if not self.method.traits.constant_memory:
            raise ValueError(
                f"the memory of {self.method} grows with its tokens, so no block of fixed size can hold it: take a "
                f"method that evicts while it reads, such as 'sinks(4)@512' or 'h2o@512'"
            )

    @whole
    def pin(self, start: int, stop: int) -> None:
        """Keep the tokens start <= position < stop of every row for good; call it before they are evicted.

        Raises ValueError if the method cannot protect tokens (its `traits.pins` is False), if its budget is too small
        for all protected tokens, and if some of the tokens are evicted already.
        """
        whole_numbers = all(isinstance(end, int) and not isinstance(end, bool) for end in (start, stop))
        if not whole_numbers or not 0 <= start < stop:
            raise ValueError(f"a pinned span needs whole numbers 0 <= start < stop, got {start!r}..{stop!r}")
        self._pin(start, stop)

    @whole
    def guarantee(self) -> Guarantee | None:
        """Return the method's proved error bound, with `holds` False if the tokens seen break one of its assumptions.

        None if the method has no such bound.
        """
        return self.method.guarantee(self.spec)

    @property
    def held(self) -> Tensor:
        """Return the number of tokens per row whose own key and value are kept, (rows,) int64."""
        return torch.zeros_like(self.seen)

    @property
    def bytes_read(self) -> int:
        """Return the bytes that are read to answer one query per row, summed over all rows.

        The default is all bytes of the state (`nbytes`); a variant that reads only a part of its memory returns less.
        """
        return self.nbytes

    @property
    def scores_read(self) -> int:
        """Return the number of scores q.k that one query per row reads, summed over all rows.

        A key counts once, in however few bits it is stored. The default is one for each key and value of full size that
        the bytes read have room for; a variant that holds tokens in fewer bytes returns their number.
        """
        return -(-self.bytes_read // self.spec.token_bytes)

    @property
    def cold_nbytes(self) -> int:
        """Return the bytes that are kept outside the memory which `nbytes` counts, on the host or on a disk."""
        return 0

    def fields(self) -> dict[str, Any]:
        return {"sealed": Field(bool)}

    def require_sound(self, fields: dict[str, Any]) -> None:
        """Raise ValueError if the values of a saved state, `fields` (name -> value), contradict each other.

        A state may have another state as an attribute, whose values are then fields[attribute name]. Both must have
        seen equally many tokens per row, and both or neither must be sealed (past the end of the prompt).
        """
        for name, value in vars(self).items():
            if isinstance(value, State):
                require_equal(fields[name]["seen"], fields["seen"], f"{name}/seen")
                if fields[name]["sealed"] != fields["sealed"]:
                    raise ValueError(f"{name} and the state it is a part of disagree on whether the prompt is over")

    @property
    def broken(self) -> bool:
        """Return True if a call broke off halfway, so that every other call on this state raises BrokenState."""
        return self._underway is not None

    def export(self) -> dict[str, Any]:
        if self._underway is not None:
            raise broken_state(self._underway)
        return super().export()

    @whole
    def to_bytes(self) -> bytes:
        """Return the state as bytes, a message from which `Method.from_bytes` restores it.

        The message has all that is needed to answer queries and to append tokens, except the tensors in `shared`: they
        are fixed by method and spec, and are made anew. The method is stored as its text only.
        """
        return message.pack({"method": str(self.method), "spec": self.spec.as_dict()}, self.export())

    @whole
    def clone(self: Self) -> Self:
        """Return an independent copy of this state."""
        return self.copied()

    @whole
    def select_rows(self, index: Tensor) -> None:
        """Keep the rows at `index` (r,), int64, in that order; repeats are allowed, as beam search needs them.

        Each row keeps its row id, which seeds its random draws.
        """
        try:
            index = torch.as_tensor(index)
            _require_dense(index, "index")
            index = index.to("cpu")
        except RuntimeError as cause:  # raised by torch for objects that no tensor can be made of
            raise TypeError(f"select_rows needs a 1-d integer tensor, got {type(index).__name__}: {cause}") from None
        if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32) or index.numel() == 0:
            raise ValueError(
                f"select_rows needs a non-empty 1-d integer tensor, got {index.dtype} {tuple(index.shape)}"
            )
        if int(index.min()) < 0 or int(index.max()) >= self.spec.rows:
            raise ValueError(f"row indices must lie in 0..{self.spec.rows - 1}, got {index.tolist()}")
        self._underway = "select_rows"
        self._select_rows(index.to(torch.int64))

    # ---- input ---------------------------------------------------------------------------------------------

    def _checked(self, x: Tensor, name: str, width: int, axes: int = 3, finite: bool = False) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
        _require_dense(x, name)
        shape, spec = x.shape, self.spec
        if len(shape) != axes or shape[0] != spec.rows or shape[-1] != width:
            wanted = f"(rows={spec.rows}, {'t' if axes == 3 else 'g, t'}, {width})"
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(shape)}")
        if x.dtype != spec.dtype:
            raise TypeError(f"{name} must be {spec.dtype} as the spec says, got {x.dtype}: convert it first")
        if x.device.type != spec.device_type:
            raise ValueError(f"{name} is on {x.device}, the state on {spec.device}: move it first")
        if finite and not _all_finite(x):
            raise ValueError(f"{name} has NaN or infinite entries; the state was not changed")
        return x.detach() if x.requires_grad else x

    def _one_token(self, k: Tensor, v: Tensor, q: Tensor) -> bool:
        """Return True if a fast check shows that k, v and q are valid input with one token for every row.

        False means that the check is not sure: the input must then be checked in full.
        """
        spec, dense = self.spec, torch.strided
        for x in (k, v, q):
            if not isinstance(x, Tensor) or x.dtype != spec.dtype or x.layout != dense:
                return False
            if x.device.type != spec.device_type or x.is_nested or is_lazy(x):
                return False
        if k.shape != (spec.rows, 1, self.key_width) or v.shape != (spec.rows, 1, self.value_width):
            return False
        if spec.tied and not _one(k, v):
            return False
        if q.ndim != 4 or q.shape != (spec.rows, q.shape[1] or 1, 1, spec.d):
            return False
        if self._defers:
            self._watch(k, v, q)
            return True
        finite = math.isfinite
        return finite(k.sum().item()) and finite(v.sum().item()) and finite(q.sum().item())

    @property
    def _defers(self) -> bool:
        """Return True if a device records whether single tokens are finite, and the host does not wait to learn it."""
        return self.spec.device_type != "cpu"

    def _watch(self, *tensors: Tensor) -> None:
        """Let the device record whether these tensors are finite."""
        if self._known_finite is None:
            self._known_finite = FiniteWatch(tensors[0].device)
        self._known_finite.add(*tensors)

    def _require_finite_so_far(self, wait: bool) -> None:
        """Raise ValueError, and leave the state broken, if the device has recorded a NaN or an infinity.

        wait: False: look only at the reports that have arrived.
        """
        watch = self._known_finite
        assert watch is not None
        if not (watch.finite() if wait else watch.told_finite()):
            self._underway = "step"
            raise ValueError(
                "q, k or v of an earlier token had NaN or infinite entries: the state has taken them in, and is broken"
            )

    def _packed(
        self, k: Tensor, v: Tensor, q: Tensor, present: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Check k, v, q and `present`, move each row's padding behind its real tokens; return (k, v, q, take, order).

        The padding keeps its numbers, which may be NaN.
        take (rows,) is the number of real tokens of each row. order (rows, t) names the tokens in their new order, by
        their index in the call: the token now at i was at order[r, i]; `order` is None if all tokens are real.
        """
        k, v = self._checked(k, "k", self.key_width), self._checked(v, "v", self.value_width)
        q = self._checked(q, "q", self.spec.d, axes=4)
        take, order = self._arrange(k, v, q, present)
        if order is None:
            return k, v, q, take, None
        by_query = order.unsqueeze(1).expand(-1, q.shape[1], -1)
        return _pack(k, order), _pack(v, order), _pack(q, by_query), take, order

    def _arrange(self, k: Tensor, v: Tensor, q: Tensor | None, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Check that k, v, q and `present` fit together; return the number of real tokens per row, and an order.

        The number is (rows,). The order (rows, t) lists the token indices of each row, those of real tokens first. It
        is None if all tokens are real.
        """
        rows, t = k.shape[:2]
        if v.shape[1] != t:
            raise ValueError(f"k has {t} tokens and v has {v.shape[1]}; they must match")
        if self.spec.tied and not _one(k, v):
            raise ValueError("this spec says that values are the keys: give one tensor for both")
        if q is not None and (q.shape[2] != t or q.shape[1] < 1):
            raise ValueError(f"q must be (rows, g, {t}, d) with g >= 1 for {t} tokens, got {tuple(q.shape)}")
        if present is not None:
            if isinstance(present, Tensor):
                _require_dense(present, "present")
            if not isinstance(present, Tensor) or present.dtype != torch.bool or present.shape != (rows, t):
                got = (present.dtype, tuple(present.shape)) if isinstance(present, Tensor) else type(present).__name__
                raise ValueError(f"present must be a bool tensor (rows={rows}, t={t}), got {got}")
            if bool(present.all()):
                present = None
        if t == 1 and present is None and self._defers:
            self._watch(*(x for x in (k, v, q) if x is not None))
            return torch.ones(rows, dtype=torch.int64), None
        for name, x in (("k", k), ("v", v), ("q", q)):
            if x is not None and not _all_finite(x):
                bad = ~torch.isfinite(x).all(-1)
                bad = bad.any(1) if bad.ndim == 3 else bad
                if present is None or bool((bad & present).any()):
                    raise ValueError(f"{name} has NaN or infinite entries; the state was not changed")
        if present is None:
            return torch.full((rows,), t, dtype=torch.int64), None
        order = torch.argsort((~present).to(torch.int8), dim=1, stable=True)
        return present.sum(1).cpu(), order


def _require_dense(x: Tensor, name: str) -> None:
    """Raise TypeError unless the tensor x is dense and has data, so that its shape and numbers can be read.

    Nested, sparse and quantised tensors, tensors on the meta device, and lazy ones without data yet are refused. The
    error calls the tensor `name`.
    """
    if is_lazy(x):
        raise TypeError(f"{name} must be a dense tensor with data, got a {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided or x.is_quantized or x.is_meta:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor with data, got a {kind} one on {x.device}: convert it first")


def _all_finite(x: Tensor) -> bool:
    """Return True if all entries of x are finite, without writing a mask.

    A NaN or an infinity makes the sum not finite. The sum of finite numbers may overflow too, so if the sum is not
    finite, the least and the largest entry decide.
    """
    if x.numel() == 0 or math.isfinite(x.sum().item()):
        return True
    return all(math.isfinite(end.item()) for end in torch.aminmax(x))


def _one(k: Tensor, v: Tensor) -> bool:
    """Return True if k and v are views of the same memory, with the same shape and strides.

    Then one copy can serve as both.
    """
    return k is v or (k.data_ptr() == v.data_ptr() and k.shape == v.shape and k.stride() == v.stride())


def _pack(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the token axis (the last but one) of x (..., t, d): token i of the result is token order[..., i] of x."""
    return x.gather(x.ndim - 2, order.unsqueeze(-1).expand_as(x))


def _unpack(out: Tensor, take: Tensor, order: Tensor | None, empty: float) -> Tensor:
    """Move each answer from its packed place, real tokens first, back to the index that its token had in the call.

    out    (rows, g, t, w): the answers to packed tokens, w numbers each
    take   (rows,): the number of real tokens of each row; the answers at padding are replaced by `empty`
    order  (rows, t): index in the call of each packed token; None: no token was moved, and `out` is returned
    """
    if order is None:
        return out
    real = sent(torch.arange(out.shape[2]) < take.unsqueeze(1), out.device)
    out = out.masked_fill(~real[:, None, :, None], empty)  # not a product: a pad's answer may be NaN
    place = order.unsqueeze(1).unsqueeze(-1).expand(-1, out.shape[1], -1, out.shape[-1])
    return torch.zeros_like(out).scatter(2, place, out)
