"""Draw random token streams for the conformance checks, feed them to caches, and compare what the caches hold.

A method is the configuration of a KV-cache compressor. A state is the cache that a method opens for a spec: sizes,
dtype and constants. A check tests one law that a method must keep, under a setting: dtype, GQA group size and seed. It
raises Broken if the law fails. An answer is the attention output for a query. A row is the stream of one kv head of one
sequence; its row id in the spec seeds its random draws. A block is `Method.block` consecutive tokens of a row; tokens
are evicted at block ends. A slot is the place of one held token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise

import torch
from torch import Tensor

from kvfloor.check.law import Setting, require
from kvfloor.check.tolerance import require_agreement
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.state import State

WIDTH = 17  # odd, so that few rows start on an aligned address: the rounding of some kernels depends on alignment
_ROWS = 3
_BLOCK_ENDS = 20
_LONG = 1 << 20  # so many tokens that `capacity` has reached its bound, if it has one


@dataclass(frozen=True)
class Stream:
    """Hold a stream of n tokens per row: queries q (rows, g, n, d), keys k (rows, n, d) and values v (rows, n, dv).

    g is the GQA group, i.e. query heads per row; d and dv are the widths of a key and a value. The first `prompt`
    tokens are the prompt. Where the prompt ends, the test calls `State.seal`, which tells the state so.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prompt: int

    @property
    def n(self) -> int:
        return self.k.shape[1]

    def rows(self, index: Sequence[int]) -> Stream:
        at = list(index)
        return replace(self, q=self.q[at], k=self.k[at], v=self.v[at])

    def with_tail(self, other: Stream, start: int) -> Stream:
        """Return a stream with this one's tokens before the index `start`, and the tokens of `other` from there on."""
        q = torch.cat([self.q[:, :, :start], other.q[:, :, start:]], 2)
        k = torch.cat([self.k[:, :start], other.k[:, start:]], 1)
        return replace(self, q=q, k=k, v=torch.cat([self.v[:, :start], other.v[:, start:]], 1))

    def packed(self, present: Tensor) -> Stream:
        """Return the stream without padding: in every row, only the tokens where the mask `present` (n,) is True."""
        prompt = int(present[: self.prompt].sum())
        return Stream(self.q[:, :, present], self.k[:, present], self.v[:, present], prompt)


def rows_of(method: Method) -> int:
    """Return the number of rows to test a method with: one per budget if it has a budget per row, otherwise 3."""
    budget = method.budget
    return len(budget) if isinstance(budget, tuple) else _ROWS


def of_rows(method: Method, index: Sequence[int]) -> Method:
    """Return the method to open for the rows at `index` alone.

    If the method has a budget per row, the budgets of these rows are kept. Otherwise the method is returned unchanged.
    """
    budget = method.budget
    if not isinstance(budget, tuple):
        return method
    changed = method.with_budget(tuple(budget[i] for i in index))
    return method if changed is None else changed


def spec_for(method: Method, at: Setting) -> Spec:
    """Return the spec to test a method with, under the setting `at`.

    Row ids differ from row indices, so that code which confuses them fails a check.
    """
    rows, d = rows_of(method), width_of(method)
    ids = [11 + 5 * ((r + 1) % rows) for r in range(rows)]
    plain = Spec(rows=rows, d=d, dv=WIDTH, scale=d**-0.5, dtype=at.dtype, seed=at.seed, row_ids=ids)
    return placed(method, plain)


def width_of(method: Method, otherwise: int = WIDTH) -> int:
    """Return the key width d to test a method with.

    It is the width that the method's parameters were trained for or, if it has no trained parameters, `otherwise`.
    """
    return otherwise if method.traits.trained_for is None else method.traits.trained_for[2]


def placed(method: Method, spec: Spec) -> Spec:
    """Return the spec with the (layer, kv head) of each row filled in, if the method has trained parameters.

    Trained parameters belong to one head of a model, so each row must stand for one: the first rows for the heads of
    the first layer, the next rows for those of the next. Without trained parameters the spec is returned unchanged.
    """
    if method.traits.trained_for is None:
        return spec
    layers, heads, _ = method.traits.trained_for
    return replace(spec, places=[(r // heads % layers, r % heads) for r in range(spec.rows)])


def prompt_length(method: Method) -> int:
    """Return the prompt length to test a method with, in tokens: so long that the prompt already causes evictions.

    It is the most tokens that a row holds of a long stream with an empty prompt, plus one block and 5 tokens. A method
    without such a limit gets 64 in place of it. Where groups of tokens are coded together, it is at least two groups
    and 5 tokens.
    """
    bound = method.capacity(_LONG, prompt=0)
    return max(method.block + 5 + (64 if bound is None else bound), 2 * coded_together(method) + 5)


def coded_together(method: Method) -> int:
    """Return how many tokens of a row the method's store codes together; 0 if it codes none."""
    store = method.parts.store
    if store is None or store.plain:
        return 0
    slots = method.open(spec_for(method, Setting())).slots
    return 0 if slots is None else slots.group


def stream_length(method: Method) -> int:
    """Return the stream length to test a method with, in tokens: the prompt (`prompt_length`), a block, and 14 more.

    Where groups of tokens are coded together, at least one more group is complete after the prompt, and the last group
    is not.
    """
    prompt, group = prompt_length(method), coded_together(method)
    n = prompt + max(method.block, group) + 14
    return n if not group or n % group else n + 5


def long_stream_length(method: Method) -> int:
    """Return a longer stream length, in tokens: at least 20 whole blocks, and no less than `stream_length(method)`."""
    return max(stream_length(method), _BLOCK_ENDS * method.block + method.block // 2 + 1)


def stream_for(method: Method, at: Setting, spec: Spec | None = None, n: int | None = None, salt: int = 0) -> Stream:
    """Draw a random stream of n tokens: queries and keys from a normal distribution, values uniform in [-1, 1].

    at    the setting: dtype, GQA group size and seed
    spec  sizes and dtype of the stream; None: those of `spec_for(method, at)`
    n     number of tokens per row; None: `stream_length(method)`
    salt  another number gives another stream
    """
    spec = spec_for(method, at) if spec is None else spec
    n = stream_length(method) if n is None else n
    source = torch.Generator().manual_seed(1000 * at.seed + salt)
    q = 2.0 * torch.randn(spec.rows, at.g, n, spec.d, generator=source)
    k = torch.randn(spec.rows, n, spec.d, generator=source)
    v = 2.0 * torch.rand(spec.rows, n, spec.dv, generator=source) - 1.0
    q, k, v = (_off_boundary(x.to(at.dtype)) for x in (q, k, v))
    return Stream(q, k, v, prompt_length(method))


def _off_boundary(x: Tensor) -> Tensor:
    """Return a copy of x whose memory address is unaligned, as that of a slice may be.

    The copy starts three elements into a larger storage.
    """
    return x.new_empty(x.numel() + 3)[3:].view(x.shape).copy_(x)


def probes(spec: Spec, m: int = 5) -> Tensor:
    """Draw m random queries per row, (rows, m, d), that belong to no token of a stream.

    They are for `State.read`, which stores no tokens.
    """
    source = torch.Generator().manual_seed(977 + spec.seed)
    return (2.0 * torch.randn(spec.rows, m, spec.d, generator=source)).to(spec.dtype)


def some_absent(stream: Stream, seed: int) -> Tensor:
    """Draw a mask (rows, n), True for real tokens, False for padding.

    The expected share of padding rises from row to row; its mean over the rows is a third.
    """
    rows, n = stream.k.shape[:2]
    source = torch.Generator().manual_seed(31 + seed)
    share = 1.0 - torch.arange(1, rows + 1).unsqueeze(1) / (1.5 * (rows + 1))
    return torch.rand(rows, n, generator=source) < share


def small_pieces(n: int) -> list[int]:
    """Return token counts at which to cut a stream of n tokens into pieces of 1 to 9 tokens: 1, 2, 4, 9, 10, 19, ...

    The last count is n or more.
    """
    cuts, sizes = [], cycle((1, 1, 2, 5, 1, 9, 3))
    while sum(cuts[-1:]) < n:
        cuts.append(sum(cuts[-1:]) + next(sizes))
    return cuts


def play(
    state: State,
    stream: Stream,
    start: int = 0,
    stop: int | None = None,
    cuts: Iterable[int] = (),
    present: Tensor | None = None,
    after: Callable[[int], None] | None = None,
) -> Tensor:
    """Feed the tokens start .. stop - 1 of a stream to a state, piece by piece; return the attention outputs.

    Each piece goes to `State.step`, which appends its tokens and answers their queries. Outputs are
    (rows, g, stop - start, dv). Where the prompt ends, `State.seal` is called.
    stop     None: the end of the stream
    cuts     indices of tokens before which a new piece begins
    present  mask (rows, n), False for padding; None: no padding
    after    called as `after(i)` after each piece, where i is the number of tokens fed so far
    """
    stop = stream.n if stop is None else stop
    edges = sorted({start, stop, *(c for c in (*cuts, stream.prompt) if start < c < stop)})
    outputs = []
    for a, b in pairwise(edges):
        mask = None if present is None else present[:, a:b]
        outputs.append(state.step(stream.q[:, :, a:b], stream.k[:, a:b], stream.v[:, a:b], mask))
        if b == stream.prompt:
            state.seal()
        if after is not None:
            after(b)
    return torch.cat(outputs, 2)


@dataclass(frozen=True)
class Tokens:
    """Hold the h tokens in one row's slots, oldest first: position in the stream (h,), k (h, d), v (h, dv)."""

    position: Tensor
    k: Tensor
    v: Tensor


def tokens_of(state: State) -> list[Tokens]:
    """Return the held tokens of every row, one `Tokens` per row; an empty list for a state that has no slots."""
    slots = state.slots
    if slots is None:
        return []
    rows = []
    for offset, held in zip(slots.offset.tolist(), slots.held.tolist(), strict=True):
        here = torch.arange(offset, offset + held)
        position = slots.arrived(here)
        order = position.argsort(stable=True)
        rows.append(Tokens(position[order], slots.keys(here)[order], slots.values(here)[order]))
    return rows


def require_same_tokens(a: Sequence[Tokens], b: Sequence[Tokens], what: str) -> None:
    """Raise Broken unless a and b, one `Tokens` per row each, have the same positions, keys and values, bit for bit.

    `what` begins the error's message.
    """
    require(len(a) == len(b), f"{what}: one holds {len(a)} rows of tokens, the other {len(b)}")
    for row, (one, two) in enumerate(zip(a, b, strict=True)):
        if not torch.equal(one.position, two.position):
            mine, theirs = set(one.position.tolist()), set(two.position.tolist())
            only = f"positions {sorted(mine - theirs)[:5]} against {sorted(theirs - mine)[:5]}"
            require(False, f"{what}: row {row} keeps different tokens, {only}")
        require(torch.equal(one.k, two.k) and torch.equal(one.v, two.v), f"{what}: row {row} holds other numbers")


def require_same_memory(a: State, b: State, at: Setting, what: str) -> None:
    """Raise Broken unless states a and b have seen equally many tokens, hold the same tokens and answer alike.

    Answers may differ by the tolerance of the setting's dtype (`at.dtype`). If the method's memory never grows and it
    keeps tokens in slots, the saved states must also be equal byte for byte. `what` names the two states in the error.
    """
    require(torch.equal(a.seen, b.seen), f"{what}: they saw {a.seen.tolist()} and {b.seen.tolist()} tokens")
    require(torch.equal(a.held, b.held), f"{what}: they hold {a.held.tolist()} and {b.held.tolist()} tokens")
    require_same_tokens(tokens_of(a), tokens_of(b), what)
    one, two = a.read(probes(a.spec)), b.read(probes(a.spec))
    require_agreement(one.mean, two.mean, at.dtype, f"{what}: their answers")
    require_agreement(one.log_mass, two.log_mass, at.dtype, f"{what}: their log-masses", size=4.0)
    if a.method.traits.constant_memory and a.slots is not None:
        require(a.to_bytes() == b.to_bytes(), f"the messages of {what} differ")
