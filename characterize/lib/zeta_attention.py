"""Define ZETA, a trainable attention layer that finds its few keys along Z-order curves and weighs them by nearness.

Law (Zeng et al. 2025, arXiv 2501.14577): queries and keys are points of `key_width` (3) numbers, q' = f_q(x) and
k' = f_k(x) by two small networks; values stay wide. A token's answer is

    o = sum_j w_j v_j / sum_j w_j        w_j = 1 / (|q' - k'_j|^2 + gamma^2)        gamma = sigmoid(theta), learned

over the `k` keys nearest to q' among its candidates, and over one smoothing token: the mean key and mean value of all
tokens so far. Candidates are the `window` neighbours of q' on each Z-order curve through the keys of complete chunks.
In so few dimensions near points are mostly near on the curve, so a sort and a search replace n distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvfloor.methods.selectors.morton import cells, interleave
from kvfloor.validation import count


class ZetaAttention(nn.Module):
    """Map x (batch, n, width) to (batch, n, width); token i depends on tokens 0..i alone.

    width      numbers per token
    heads      attention heads, each with its own points
    key_width  numbers per point
    k          keys weighed per query, beside the smoothing token
    window     candidates per curve
    curves     number of curves, shifted by equal shares of the grid: a single curve separates near points at its seams
    chunk      tokens that wait before they are sorted in
    bits       bits of the grid per coordinate

    A query also attends to the tokens of its own chunk up to itself, which are not sorted yet; the paper leaves those
    to the smoothing token. The grid is fixed, at quantiles of the standard normal: a range taken from the data would
    change the codes of earlier tokens. Gradients flow through the chosen keys and the smoothing token, not the search.
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        key_width: int = 3,
        k: int = 32,
        window: int = 32,
        curves: int = 2,
        chunk: int = 64,
        bits: int = 10,
    ) -> None:
        super().__init__()
        count("ZetaAttention", least=1, width=width, heads=heads, key_width=key_width, k=k, window=window)
        count("ZetaAttention", least=1, curves=curves, chunk=chunk, bits=bits)
        if width % heads:
            raise ValueError(f"ZetaAttention: width must be a multiple of heads, got {width} and {heads}")
        if key_width * (bits + 1) > 62:
            raise ValueError(f"ZetaAttention: key_width * (bits + 1) must be at most 62, got {key_width * (bits + 1)}")
        self.heads, self.key_width, self.k, self.window = heads, key_width, k, window
        self.curves, self.chunk, self.bits = curves, chunk, bits
        self.queries, self.keys = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, heads * key_width)) for _ in range(2)
        )
        self.values = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.theta = nn.Parameter(torch.zeros(heads))

    def open(self) -> ZetaPast:
        """Return an empty past, from which `forward` continues token by token or in pieces."""
        return ZetaPast()

    def forward(self, x: Tensor, past: ZetaPast | None = None) -> Tensor:
        """Apply the layer to a whole sequence, or to the piece that follows the tokens in `past`.

        Every way of cutting a sequence into pieces gives the same answers. No gradient flows into a past.
        """
        q, k, v = (self._split(f(x)) for f in (self.queries, self.keys, self.values))
        seen = 0
        mean_k, mean_v = k.cumsum(2), v.cumsum(2)
        if past is not None:
            seen = past.seen
            k, v, before_k, before_v = past.take(k, v)
            mean_k, mean_v = mean_k + before_k, mean_v + before_v
        number = torch.arange(seen + 1, seen + q.shape[2] + 1, dtype=x.dtype, device=x.device).unsqueeze(1)
        mean_k, mean_v = mean_k / number, mean_v / number
        pieces, start = [], seen
        while start < k.shape[2]:
            whole = start - start % self.chunk  # tokens of complete chunks
            stop = min(k.shape[2], whole + self.chunk)
            at = slice(start - seen, stop - seen)
            index, dead = self._nearest(q[:, :, at], k[:, :, :stop], start, self._sorted(k, whole, past))
            pieces.append(self._weigh(q[:, :, at], k, v, index, dead, mean_k[:, :, at], mean_v[:, :, at]))
            start = stop
        out = torch.cat(pieces, 2) if pieces else v[:, :, :0]
        return self.mix(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    # ---- searching -----------------------------------------------------------------------------------------

    def _codes(self, points: Tensor) -> Tensor:
        """Return the codes (batch, heads, curves, s) int64 of points (batch, heads, s, key_width) on the curves."""
        shift = torch.arange(self.curves, device=points.device) * 2**self.bits // self.curves
        cell = cells(points.detach(), self.bits).unsqueeze(2) + shift.view(-1, 1, 1)
        return interleave(cell, self.bits + 1)

    def _sorted(self, k: Tensor, whole: int, past: ZetaPast | None) -> tuple[Tensor, Tensor]:
        """Return the sorted codes of the first `whole` keys and their tokens: each (batch, heads, curves, whole)."""
        if past is not None and past.curve is not None and past.curve[0].shape[3] == whole:
            return past.curve
        code, order = self._codes(k[:, :, :whole]).sort(dim=-1, stable=True)
        if past is not None:
            past.curve = code, order
        return code, order

    @torch.no_grad()
    def _nearest(self, q: Tensor, k: Tensor, start: int, curve: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the k nearest candidates of queries q (batch, heads, a, .) of tokens start .. start + a - 1.

        They come as (index, dead), each (batch, heads, a, c); a dead entry is no candidate.
        """
        (batch, heads, a, _), device = q.shape, q.device
        code, order = curve
        whole = code.shape[3]
        at = torch.searchsorted(code, self._codes(q)) - self.window // 2
        at = at.clamp_max(max(0, whole - self.window)).clamp_min(0)
        width = min(self.window, whole)
        at = at.unsqueeze(4) + torch.arange(width, device=device)
        near = order.gather(3, at.flatten(3)).view(batch, heads, self.curves, a, width)
        waiting = torch.arange(whole, start + a, device=device).expand(batch, heads, a, -1)
        token = torch.cat([near.transpose(2, 3).flatten(3), waiting], 3)
        last = torch.arange(start, start + a, device=device).unsqueeze(1)
        token = token.masked_fill(token > last, -1).sort(dim=-1, descending=True).values
        dead = token < 0
        dead[..., 1:] |= token[..., 1:] == token[..., :-1]  # found on another curve already
        token = token.clamp_min(0)
        far = _distance(q, _pick(k.detach(), token)).masked_fill(dead, torch.inf)
        best = far.argsort(dim=-1, stable=True)[..., : self.k]  # the newer first among equals
        return token.gather(3, best), far.gather(3, best) == torch.inf

    def _weigh(
        self, q: Tensor, k: Tensor, v: Tensor, index: Tensor, dead: Tensor, mean_k: Tensor, mean_v: Tensor
    ) -> Tensor:
        """Return the Cauchy-weighted mean (batch, heads, a, dv) of the chosen values and the smoothing token's."""
        far = torch.cat([_distance(q, _pick(k, index)), _distance(q, mean_k.unsqueeze(3))], 3)
        gamma = torch.sigmoid(self.theta).view(-1, 1, 1)
        weight = 1.0 / (far + gamma**2)
        weight = weight * torch.nn.functional.pad(~dead, (0, 1), value=True)
        weight = weight / weight.sum(-1, keepdim=True)
        chosen = torch.einsum("bhac,bhacv->bhav", weight[..., :-1], _pick(v, index))
        return chosen + weight[..., -1:] * mean_v


def _distance(q: Tensor, k: Tensor) -> Tensor:
    """Return squared distances (batch, heads, a, c) of q (batch, heads, a, .) to k (batch, heads, a, c, .)."""
    return (q.unsqueeze(3) - k).square().sum(-1)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Gather x (batch, heads, s, w) at index (batch, heads, a, c): (batch, heads, a, c, w)."""
    batch, heads, s, _ = x.shape
    stream = torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1)
    return x.flatten(0, 2).index_select(0, (index + stream * s).flatten()).view(*index.shape, -1)


@dataclass
class ZetaPast:
    """Hold every key and value between pieces of a sequence, and the sorted codes of the complete chunks.

    k (batch, heads, s, key_width) and v (batch, heads, s, .) hold `seen` tokens of at most s; k_sum and v_sum are their
    sums.
    """

    seen: int = 0
    k: Tensor | None = None
    v: Tensor | None = None
    k_sum: Tensor | None = None
    v_sum: Tensor | None = None
    curve: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def take(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
        """Store new tokens; return all keys and values so far, and the sums of the earlier ones."""
        sums = (0.0 if self.k_sum is None else self.k_sum, 0.0 if self.v_sum is None else self.v_sum)
        stop = self.seen + k.shape[2]
        self.k, self.v = self._room(self.k, k, stop), self._room(self.v, v, stop)
        self.k[:, :, self.seen : stop], self.v[:, :, self.seen : stop] = k, v
        self.k_sum, self.v_sum = (x.sum(2, keepdim=True) + total for x, total in zip((k, v), sums, strict=True))
        self.seen = stop
        return self.k[:, :, :stop], self.v[:, :, :stop], *sums

    def _room(self, store: Tensor | None, new: Tensor, needed: int) -> Tensor:
        """Return the store, grown to twice its size or more if it is too small for `needed` tokens."""
        if store is not None and store.shape[2] >= needed:
            return store
        size = max(needed, 0 if store is None else 2 * store.shape[2])
        grown = new.new_zeros(*new.shape[:2], size, new.shape[3])
        if store is not None:
            grown[:, :, : self.seen] = store[:, :, : self.seen]
        return grown
