"""Evict half of the tokens repeatedly, chosen by a self-balancing walk, and double the kept ones' weight (BalanceKV).

In this file a row is one (batch item, kv head) stream, and a slot the place of one held token. A block is
`block` consecutive tokens of a row; levels are halved at the end of a block only.
Level l is the set of a row's tokens of weight 2^l; new tokens are at level 0. Halving level l evicts about half of its
tokens and moves the others up to level l + 1, so that their weight doubles.
A walk takes the tokens of a level one by one and gives each a random sign, such that the signed sum of the tokens'
feature vectors stays short; the signs decide which half is evicted. The sign that shortens the sum is the more likely
one, and the walk's threshold c sets how much more likely. A step of a walk (one sign) is clamped if its formula for the
probability of a sign leaves [0, 1].
A `Partial` is a result of attention: the mean of values and the log-mass (log-sum-exp of logits). A `Spec` holds the
sizes and constants of a cache, such as d and dv, the scale and the softcap on logits. In shapes, r are the rows of a
call, m queries per row, s slots, d and dv the widths of a key and a value; n is the number of tokens seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.blocked import Blocked
from kvfloor.core.budget import Budget, tokens
from kvfloor.core.fields import Field
from kvfloor.core.method import Guarantee, Method, Traits
from kvfloor.core.partial import Partial
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.core.rowwise import aligned, length, total
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.methods.sketches.self_balancing import Keep, gram, halve, safe_threshold, tree_error, worst_growth
from kvfloor.validation import count, literals, positives

_LEVELS = 64  # a token of level l stands for 2^l; positions are below 2^57
_BLOCKS = 8  # number of blocks in a budget less sinks and recent tokens; a block has at least a token
_WALK = 4  # blocks of one level halved at once: large walks balance better, small walks keep weights similar


@dataclass(frozen=True)
class Balance(Method):
    """Halve the number of tokens repeatedly, by a random walk over the tokens that nearly preserves attention sums.

    Source: Kochetkova et al. 2025 (arXiv 2502.07861), SoftmaxBalance, here with one set of kept tokens for the
    numerator and the denominator of attention.
    A token of level l has weight 2^l: answer = sum 2^l e^{q.k} v / sum 2^l e^{q.k}, log_mass = log of the denominator.
    Halving a level evicts half of the level's tokens and moves the other half up one level. Let e^{q} and e^{k} stand
    for feature vectors with inner product e^{q.k}. Let (v, const) be a value v with the number const appended, the same
    for all tokens. The walk chooses the kept half so that the sum of e^{k} (v, const) over kept tokens minus the sum
    over evicted tokens is short. The paper keeps separate sets of tokens for the numerator and for the denominator.
    Here one set serves both, because the entry const balances the denominator too. So numerator and denominator have
    the same weights, and answers are convex combinations of values.
    batch     number of tokens that makes a level full. Without a budget, a row halves every full level at each batch-th
              token; tokens since then have weight 1. This leaves at most batch tokens per level and
              log2(n / batch) + 2 levels.
    budget    upper bound on tokens per row at all times. At the end of each block, tokens are halved until the held
              tokens and those of the next block fit into the budget; a block has (budget - sinks - recent) / 8 tokens,
              rounded down, or `batch` if that is less. A halving takes the oldest tokens of one level, at most four
              blocks of them: halving few at once keeps the held tokens' weights similar. Let a_l be the number of
              tokens of level l, or four blocks if that is less. The level with the largest a_l / 4^l is halved. The
              reason is that halving level l adds to the squared error in proportion to 4^l, however many tokens are
              halved. Where every level has one token, a fair coin drops the token of the lowest level or doubles its
              weight.
    keep      "pairs": one of each two tokens of the level that are neighbours in age stays, so weights add up to n.
              "smaller" (the paper's rule): the tokens of the rarer sign in the walk stay, so the sum of weights falls a
              little each time
    c         threshold of the walk: a small c is greedy, a large c is a fair coin; None: the safe threshold for
              `horizon` and `failure`, at which the guarantee holds. The paper's code has 1/8.
    constant  const^2, in units of the largest |v|^2 of the tokens halved; the paper's code has 0.025, and the error
              bound of the guarantee is smallest at 1
    sharpness factor in exp(sharpness |scale| k.k'), by which two tokens' inner product in the walk depends on their
              keys k and k'; the paper has 1, and a smaller factor lets more distant keys balance each other
    centre    True: the level's mean key is subtracted in the walk; answers always use the original keys
    sinks, recent   numbers of first and newest tokens that are never halved
    radius, spread, horizon, failure   assumptions of the guarantee: bound on the lengths of keys and queries, bound on
              max |v|^2 / mean |v|^2, bound on the tokens seen, and failure probability (see the method `guarantee`)
    The paper's algorithm is balance(keep=smaller,centre=False,sharpness=1,c=None,horizon=n,sinks=0,recent=0).
    """

    name: ClassVar[str] = "balance"
    paper: ClassVar[str] = "Kochetkova et al. 2025, BalanceKV (arXiv 2502.07861), Theorems 3.1 and 3.3"
    batch: int = 64
    keep: Keep = "pairs"
    c: float | None = 0.125
    constant: float = 0.025
    sharpness: float = 0.25
    centre: bool = True
    sinks: int = 4
    recent: int = 16
    radius: float | None = None
    spread: float | None = None
    horizon: int | None = None
    failure: float = 0.1
    budget: Budget | None = None

    def __post_init__(self) -> None:
        count(self.name, sinks=self.sinks, recent=self.recent)
        count(self.name, least=2, batch=self.batch)
        positives(self.name, constant=self.constant, sharpness=self.sharpness, failure=self.failure)
        for name in ("c", "radius", "spread"):
            if getattr(self, name) is not None:
                positives(self.name, **{name: getattr(self, name)})
        if self.horizon is not None:
            count(self.name, least=1, horizon=self.horizon)
        if self.batch % 2:
            raise ValueError(f"balance: batch must be even, got {self.batch}")
        literals(self)
        if not isinstance(self.centre, bool):
            raise ValueError(f"balance: centre must be True or False, got {self.centre!r}")
        if self.failure >= 1:
            raise ValueError(f"balance: failure must lie in (0, 1), got {self.failure}")
        if self.spread is not None and self.spread < 1:
            raise ValueError(f"balance: spread is max / mean of |v|^2, at least 1, got {self.spread}")
        if self.c is None and self.horizon is None:
            raise ValueError("balance: c=None is the safe threshold for at most `horizon` tokens: give the horizon")
        if isinstance(self.budget, tuple):
            raise ValueError("balance takes one budget for all rows, not one per row")
        if self.budget is not None and not isinstance(self.budget, str):
            count(self.name, least=1, budget=self.budget)
            least = self.sinks + self.recent + _BLOCKS
            if self.budget < least:
                raise ValueError(
                    f"a budget of {self.budget} tokens is too small for balance: it needs at least {least}, which is "
                    f"sinks + recent + {_BLOCKS}"
                )

    @property
    def traits(self) -> Traits:
        """Return what this method promises, and what it does not, as `Traits`.

        constant_memory   True if there is a budget: the bytes of the memory never grow
        normalised        True: answers are convex combinations of values
        lossy_values      True: a value enters answers with an error even where its token is held, as its weight may be
                          2^l instead of 1
        value_linear      False: answers are not linear in the values, on which the choice of kept tokens depends
        """
        return Traits(value_linear=False, lossy_values=True, constant_memory=self.budget is not None)

    @property
    def block(self) -> int:
        """Return the block length in tokens; a row's levels are halved, if necessary, at the end of a block only."""
        if not isinstance(self.budget, int):
            return self.batch
        return min(self.batch, (self.budget - self.sinks - self.recent) // _BLOCKS)

    @property
    def threshold(self) -> float:
        """Return the walk's threshold: c, or the safe threshold for `horizon` tokens if c is None.

        At the safe threshold, probably no step of any walk is clamped in a stream of `horizon` tokens. All walks over n
        tokens together have at most n steps with keep="pairs", and 2n with keep="smaller".
        """
        if self.c is not None:
            return self.c
        return self._safe_threshold()

    def _safe_threshold(self) -> float:
        assert self.horizon is not None
        return safe_threshold(self.horizon * (1 if self.keep == "pairs" else 2), self.failure / 3)

    def open(self, spec: Spec) -> BalanceState:
        return BalanceState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del prompt, pinned
        if self.budget is not None:
            return min(n, tokens(self.budget, 1)[0])
        levels = max(0, (n // self.batch).bit_length()) + 1
        return min(n, self.sinks + self.recent + self.batch * (levels + 1))

    def with_budget(self, budget: Budget) -> Balance:
        return replace(self, budget=budget)

    # ---- the theorem ---------------------------------------------------------------------------------------

    def _error_terms(self, spec: Spec) -> tuple[float, float]:
        assert self.radius is not None
        growth = self.radius**2 * worst_growth(self.sharpness, self.centre)
        return tree_error(spec.dv, growth, self.constant, self._safe_threshold(), self.failure / 3)

    def guarantee(self, spec: Spec) -> Guarantee | None:
        """Return the bound ||answer - attention||_2 <= epsilon ||softmax||_2 ||V||_F for one query fixed in advance.

        V is the matrix of all values, and softmax the vector of exact attention weights. With probability
        1 - `failure` the bound holds for epsilon = sqrt(spread) x / (batch - y). The numbers x and y do not depend on
        the tokens; the function `tree_error` derives them. Of `spec`, dv and the softcap are used. The method's
        arguments give the assumptions:
        radius    bound on sqrt(|scale|) |q| and sqrt(|scale|) |k|
        spread    bound on max |v|^2 / mean |v|^2, so that ||softmax||_2 ||V||_F >= max|v| / sqrt(spread)
        horizon   bound on the tokens seen
        Returns None if one of these is None, if there is a budget or a softcap, or if keep is "smaller". The paper's
        theorem for "smaller" does not state its constants. The result has holds=False if c is below the safe threshold,
        or if epsilon is 2 sqrt(spread) or more: such a bound says nothing, as no answer errs by more than 2 max|v|.
        """
        if self.radius is None or self.spread is None or self.horizon is None:
            return None
        if self.keep != "pairs" or self.budget is not None or spec.softcap is not None:
            return None
        x, y = self._error_terms(spec)
        epsilon = math.sqrt(self.spread) * x / (self.batch - y) if self.batch > y else math.inf
        why = ""
        if self.threshold < self._safe_threshold():
            why = f"c = {self.threshold:g} is below the safe threshold {self._safe_threshold():.3g}: use c=None"
        elif epsilon >= 2 * math.sqrt(self.spread):
            why = f"epsilon = {epsilon:.3g} is vacuous: a larger batch is needed"
        return Guarantee(
            epsilon,
            self.failure,
            "l2, relative to ||softmax||_2 ||V||_F",
            "one query, asked at one moment, both fixed before the stream (oblivious)",
            (
                f"sqrt(|scale|) |q| and sqrt(|scale|) |k| <= {self.radius}",
                f"max |v|^2 <= {self.spread} mean |v|^2",
                f"n <= {self.horizon}",
                "no step of a walk was clamped",
            ),
            "Kochetkova et al. 2025, Theorem 3.1; constants derived",
            holds=not why,
            why=why,
        )

    def _sized_for(self, epsilon: float, delta: float, spec: Spec) -> Balance:
        """Return this method with the least even `batch` that gives error epsilon and failure probability delta.

        This is the epsilon of ||answer - attention||_2 <= epsilon ||softmax||_2 ||V||_F, as in `guarantee`, for the
        value width dv of `spec`. c becomes the safe threshold and budget None. Returns the method unchanged if radius,
        spread or horizon is None, or if epsilon or delta is not positive. Raises ValueError if batch exceeds 2^40.
        Law: sqrt(spread) x / (batch - y) <= epsilon, with x and y from `tree_error`.
        """
        if self.radius is None or self.spread is None or self.horizon is None or not (epsilon > 0 and delta > 0):
            return self
        sized = replace(self, c=None, failure=delta, budget=None)
        x, y = sized._error_terms(spec)
        batch = y + math.sqrt(self.spread) * x / epsilon
        if batch > 2**40:
            raise ValueError(f"{self}: a radius of {self.radius:g} needs more than 2^40 tokens in a batch")
        return replace(sized, batch=2 * math.ceil(batch / 2))


class BalanceState(Blocked[Balance]):
    """Hold tokens in slots and the level l of each, i.e. its weight 2^l in answers.

    For each row, the state also holds the length of its longest key, value and query, the sum of |v|^2 over its tokens,
    and the number of clamped steps of its walks. These numbers test the assumptions of the guarantee.
    """

    def __init__(self, method: Balance, spec: Spec) -> None:
        room = 2 * method.batch if method.budget is None else tokens(method.budget, 1)[0]
        slots = Slots(spec, [room] * spec.rows, {"level": torch.uint8})
        super().__init__(method, spec, slots, method.block)
        wide = {"dtype": torch.float64, "device": spec.device}
        self.clamped = torch.zeros(spec.rows, dtype=torch.int64, device=spec.device)  # clamped steps of walks
        self.longest_key = torch.zeros(spec.rows, **wide)  # of completed blocks; 0 without a radius, as all below
        self.longest_value = torch.zeros(spec.rows, **wide)
        self.square_sum = torch.zeros(spec.rows, **wide)  # of values
        self.longest_query = torch.zeros(spec.rows, **wide)

    def fields(self) -> dict[str, Any]:
        names = ("longest_key", "longest_value", "square_sum", "longest_query")
        return super().fields() | {name: Field(torch.float64, (self.spec.rows,), least=0) for name in names}

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        if bool((fields["slots"]["columns"]["level"] >= _LEVELS).any()):
            raise ValueError(f"a token's level is {_LEVELS} or more")
        if bool((fields["slots"]["held"] < fields["seen"] % self.block).any()):
            raise ValueError("tokens of the open block are missing")

    # ---- reading -------------------------------------------------------------------------------------------

    def _weighted(self, q: Tensor, width: int, hide: Tensor | None) -> Partial:
        """Return the attention of q (rows, m, d) over the first `width` slots, with weight 2^level for each token.

        Returns a `Partial` (rows, m). hide is broadcast to (rows, m, width), True for slots that a query does not see;
        None: a query sees all slots.
        """
        view = self.slots.view(width=width)
        log_weight = self.slots.column("level", None, width).to(self.spec.compute_dtype) * math.log(2.0)
        return Partial.over(q, view.k, view.v, self.spec, log_weight, hide)

    def _answer(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        rows, g, a, d = q.shape
        flat = q.reshape(rows, g * a, d)
        later = torch.ones(a, a, dtype=torch.bool, device=q.device).triu(1).repeat(g, 1).unsqueeze(0)
        part = Partial.over(flat, new_k, new_v, self.spec, hide=later)
        past = int(before.max())
        if past:
            gone = (torch.arange(past) >= before.unsqueeze(1)).unsqueeze(1).to(q.device)
            part = self._weighted(flat, past, gone if bool(gone.any()) else None).merge(part)
        return part.shaped(rows, g, a)

    def _read(self, q: Tensor) -> Partial:
        width = int(self.slots.held.max())
        live = self.slots.view().live
        return self._weighted(q, width, None if live is None else ~live.unsqueeze(1))

    # ---- halving -------------------------------------------------------------------------------------------

    def _close(self, rows: Tensor | None) -> None:
        rows = torch.arange(self.spec.rows) if rows is None else rows
        if self.method.radius is not None:
            self._measure(rows)
        while len(rows):
            level, size, free = self._due(rows)
            due = size > 0
            rows = rows[due]
            if len(rows):
                self._halve(rows, level[due], size[due], free[due])

    def _due(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (level, number, members): the level to halve in each of `rows`, and how many of its tokens to halve.

        level and number are (r,); number is 0 if a row needs no halving now. members (r, s), bool, is True for the
        slots with a token of this level that may be halved, i.e. is neither among the first `sinks` tokens nor among
        the newest `recent` tokens.
        """
        plan, seen = self.method, self.seen[rows].unsqueeze(1)
        view = self.slots.view(rows)
        position, level = view.position.cpu(), self.slots.column("level", rows, view.position.shape[1]).long().cpu()
        live = torch.arange(position.shape[1]) < self.slots.held[rows].unsqueeze(1)
        free = live & (position >= plan.sinks) & (position < seen - plan.recent)
        sizes = torch.zeros(len(rows), _LEVELS, dtype=torch.int64).scatter_add(1, level, free.long())
        if plan.budget is None:
            full = (sizes >= plan.batch).long()
            chosen, due = full.argmax(1), full.any(1)
        else:
            sizes = sizes.clamp_max(_WALK * self.block)
            worth = sizes.double() * 4.0 ** -torch.arange(_LEVELS)
            worth = worth + (sizes > 1) * 2.0  # a level with two tokens comes before any with one
            chosen = worth.argmax(1)
            due = self.slots.held[rows] + self.block > tokens(plan.budget, 1)[0]
        size = sizes.gather(1, chosen.unsqueeze(1)).squeeze(1).masked_fill(~due, 0)
        return chosen, size, free & (level == chosen.unsqueeze(1))

    def _halve(self, rows: Tensor, level: Tensor, size: Tensor, members: Tensor) -> None:
        """Evict about half of the size[r] oldest `members` of each row, and raise the other half by one level.

        members (r, s) is True for the slots of tokens of level[r] that may be halved; level and size are (r,). If
        size[r] is 1, a fair coin decides whether the single token is evicted or raised.
        """
        plan, device, width = self.method, self.slots.k.device, int(size.max() + 1) // 2 * 2
        view = self.slots.view(rows, members.shape[1])
        age = view.position.masked_fill(~members.to(device), torch.iinfo(torch.int64).max)
        slot = torch.nn.functional.pad(age.argsort(1)[:, :width], (0, max(0, width - age.shape[1])))
        there = torch.arange(width, device=device) < size.to(device).unsqueeze(1)
        k, v = (x.gather(1, slot.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in (view.k, view.v))
        lane = row_keys(self.spec.seed, self.spec.ids(), "balance")[rows.to(device)].unsqueeze(1)
        draws = uniform(lane, view.position.gather(1, slot) * _LEVELS + level.to(device).unsqueeze(1))
        products = k.new_zeros(len(rows), width, width, dtype=torch.float64)
        for row, n in enumerate(size.tolist()):  # each as wide as its own members, whatever the other rows'
            own_k, own_v, live = (aligned(x[row : row + 1, : n + n % 2]) for x in (k, v, there))
            own = gram(own_k, own_v, live, self.spec.scale * plan.sharpness, plan.constant, plan.centre)
            products[row, : own.shape[1], : own.shape[1]] = own[0]
        stays, goes, clamped = halve(products, size.to(device), draws, plan.threshold, plan.keep)
        alone = (size == 1).to(device)
        stays[:, 0] = torch.where(alone, draws[:, 0] < 0.5, stays[:, 0])
        goes[:, 0] = torch.where(alone, draws[:, 0] >= 0.5, goes[:, 0])
        self.clamped[rows.to(device)] += clamped

        levels = self.slots.column("level", rows, members.shape[1]).clone()
        r, i = stays.nonzero(as_tuple=True)
        levels[r, slot[r, i]] += 1
        self.slots.put_column("level", rows, levels)
        leaving = torch.zeros(self.spec.rows, members.shape[1], dtype=torch.bool)
        r, i = goes.nonzero(as_tuple=True)
        leaving[rows[r.cpu()], slot[r, i].cpu()] = True
        self.slots.evict(leaving)

    # ---- the guarantee's assumptions -----------------------------------------------------------------------

    def _measure(self, rows: Tensor) -> None:
        """Update the longest key, longest value and sum of |v|^2 of each of `rows` by the tokens of the ended block.

        These are the newest `block` tokens of each row; older tokens were counted at earlier block ends.
        """
        slot = (self.slots.offset + self.slots.held - self.block)[rows].unsqueeze(1) + torch.arange(self.block)
        at, slot = rows.to(self.slots.k.device), slot.to(self.slots.k.device)
        key = length(self.slots.k[slot].to(torch.float64)).amax(1)
        value = total(self.slots.v[slot].to(torch.float64).square())
        self.longest_key[at] = torch.maximum(self.longest_key[at], key)
        self.longest_value[at] = torch.maximum(self.longest_value[at], value.amax(1).sqrt())
        self.square_sum[at] += total(value, 1)

    def _on_queries(self, q: Tensor, before: Tensor, take: Tensor) -> None:
        if self.method.radius is None:
            return
        real = torch.arange(q.shape[2]) < take.unsqueeze(1)
        asked = length(q.to(torch.float64)).masked_fill(~real.unsqueeze(1).to(q.device), 0.0)
        self.longest_query = torch.maximum(self.longest_query, asked.amax((1, 2)))

    def _attend(self, q: Tensor) -> Partial:
        if q.shape[2]:
            self._on_queries(q, self.slots.held, torch.full_like(self.seen, q.shape[2]))
        return super()._attend(q)

    def guarantee(self) -> Guarantee | None:
        stated, plan = self.method.guarantee(self.spec), self.method
        if stated is None or not stated.holds:
            return stated
        assert plan.radius is not None and plan.spread is not None and plan.horizon is not None
        view = self.slots.view()
        new = (view.position >= (self.seen - self.seen % self.block).unsqueeze(1).to(view.k.device)).unsqueeze(-1)
        if view.live is not None:
            new = new & view.live.unsqueeze(-1)
        key = view.k.to(torch.float64).masked_fill(~new, 0.0).norm(dim=-1)
        value = view.v.to(torch.float64).masked_fill(~new, 0.0).square().sum(-1)
        root = math.sqrt(abs(self.spec.scale))
        longest = [float(x.max()) * root if x.numel() else 0.0 for x in (self.longest_key, key, self.longest_query)]
        squares = self.square_sum + value.sum(1)
        most = self.longest_value.square()
        most = torch.maximum(most, value.amax(1)) if value.shape[1] else most
        spread = most * self.seen.to(most.device) / squares.clamp_min(torch.finfo(torch.float64).tiny)
        why = ""
        if bool((self.clamped > 0).any()):
            why = f"{int(self.clamped.max())} steps of a row's walks were clamped"
        elif max(longest) > plan.radius:
            why = f"a key or query of length {max(longest):.4g} (times sqrt(|scale|)) came, beyond the radius"
        elif bool((spread > plan.spread).any()):
            why = f"max |v|^2 is {float(spread.max()):.4g} times the mean"
        elif int(self.seen.max()) > plan.horizon:
            why = f"{int(self.seen.max())} tokens came, more than the horizon"
        return replace(stated, holds=False, why=why) if why else stated
