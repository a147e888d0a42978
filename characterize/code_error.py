"""Measure how far attention outputs move when keys or values alone are coded in few bits, one code beside the other.

    python -m characterize.code_error [--keys "built-in 2k,SmolLM2 2k"]

All layers of recorded models (`characterize.lib.real_keys`); the queries of a text's last 64 tokens attend to all
tokens before them. Each line has a code of the keys or of the values:
  channel      each channel of 32 tokens by a range of its own, the ranges in 8 bits: keys of `exact:k4v4`
  channel16    the same with ranges of 16 bits: keys of `quant`
  token        each token by itself, rotated, less the mean of the first 32: keys of `h2o:k4v4@512`
  uncentred    the same without the mean: values, with `unbiased` lengths, of every store
  least        the same with the lengths of least squared error
  asymmetric   each token by its own range in 16 bits: values of `quant`
  principal    on the principal axes of the row's first 512 tokens, with bits by reverse water-filling: no store
`bits` are those of a code; `per_number` counts what the code needs beside them. `first` tokens of each row are kept in
full. error is ||coded - exact|| / ||exact|| of the output, the mean over a row's queries; the median over all rows with
its bootstrap 95 % interval. The script takes five minutes on one core, once the models are recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from characterize.lib.mass import softmax_weights
from characterize.lib.real_keys import REAL, chosen, real
from characterize.lib.table import ResultTable, median_interval
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.codes import ChannelCodes, SlotCodes, TokenCodes
from kvfloor.methods.stores.levels import levels

ASKED, GROUP, FIT = 64, 32, 512
FIELDS = ("keys", "part", "code", "bits", "per_number", "first", "streams", "error", "low", "high")
Coder = Callable[[Tensor, int], Tensor]


def by_store(make: Callable[[Spec, int], SlotCodes]) -> Coder:
    """Return a coder of x (rows, n, w), n a multiple of 32, that codes it as the slots of a store do."""

    def coder(x: Tensor, first: int) -> Tensor:
        rows, n, width = x.shape
        part, every = make(Spec(rows, width, width), width), torch.arange(rows)
        groups = x.unflatten(1, (-1, GROUP)).unbind(1)
        entries: dict[str, list[Tensor]] = {name: [] for name in part.own}
        for i, group in enumerate(groups):
            real = i * GROUP + torch.arange(GROUP) >= first
            found = part.encode(every, torch.full((rows,), i), group, real.expand(rows, -1))
            for name, value in found.items():
                entries[name].append(value)
        index = (torch.arange(n) // GROUP).expand(rows, -1)
        return part.decode({name: torch.cat(value, 1) for name, value in entries.items()}, None, index)

    return coder


def ranged(bits: int, axis: int) -> Coder:
    """Return KIVI's coder: ranges in 16 bits, of each channel of 32 tokens (axis 2) or of each token (axis 3)."""

    def coder(x: Tensor, first: int) -> Tensor:
        del first
        group = x.unflatten(1, (-1, GROUP))
        low = group.amin(axis, keepdim=True).half().float()
        step = ((group.amax(axis, keepdim=True) - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
        return (low + step * ((group - low) / step).round().clamp(0, 2**bits - 1)).flatten(1, 2)

    return coder


def principal(bits: int) -> Coder:
    """Return a coder on the principal axes of each row's tokens `first` .. 511, fitted to the row."""

    def coder(x: Tensor, first: int) -> Tensor:
        found = []
        for row in x:
            fit = row[max(first, 4) : FIT]
            mean = fit.mean(0)
            spread, axes = torch.linalg.eigh(torch.cov(fit.T))
            spread = spread.clamp_min(1e-6 * float(spread.max()))
            given, left = torch.zeros(len(spread), dtype=torch.int64), spread.clone()
            for _ in range(bits * len(spread)):
                most = int(left.argmax())
                given[most] += 1
                left[most] = left[most] / 4 if given[most] < 8 else -1
            scale = spread.sqrt()
            y = ((row - mean) @ axes) / scale
            length = y.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
            near = torch.zeros_like(y)
            for one in given.unique().tolist():
                at = given == one
                if one:  # levels of one entry of a unit vector, for entries of standard deviation 1
                    level = levels(one, 256) * 16
                    code = torch.bucketize((y / length)[:, at].contiguous(), (level[1:] + level[:-1]) / 2)
                    near[:, at] = level[code]
            found.append(mean + (near * length * scale) @ axes.T)
        return torch.stack(found)

    return coder


def coders(part: str, bits: int, d: int) -> dict[str, tuple[float, Coder]]:
    """Return name -> (bits per number, coder) for the keys or the values of width d."""
    length = bits + 16 / d

    def token(centred: bool, unbiased: bool) -> Coder:
        return by_store(lambda spec, width: TokenCodes(spec, width, bits, 0, centred, unbiased))

    if part == "keys":
        return {
            "channel": (
                bits + 16 / GROUP + 128 / (GROUP * d),
                by_store(lambda s, w: ChannelCodes(s, w, bits, 0, GROUP)),
            ),
            "channel16": (bits + 32 / GROUP, ranged(bits, 2)),
            "token": (length, token(True, False)),
            "uncentred": (length, token(False, False)),
            "principal": (length, principal(bits)),
        }
    return {
        "uncentred": (length, token(False, True)),
        "least": (length, token(False, False)),
        "asymmetric": (bits + 32 / d, ranged(bits, 3)),
        "principal": (length, principal(bits)),
    }


def error(q: Tensor, k: Tensor, v: Tensor, scale: float, part: str, coded: Tensor) -> Tensor:
    """Return the relative error (rows,) of outputs (rows, m, d) with coded keys or values."""
    exact = softmax_weights(q, k, scale) @ v.double()
    keys, values = (coded, v) if part == "keys" else (k, coded)
    moved = softmax_weights(q, keys, scale) @ values.double()
    return ((moved - exact).norm(dim=2) / exact.norm(dim=2)).mean(1)


def main() -> None:
    torch.set_num_threads(1)
    sources = tuple(source.name for source in REAL if source.tokens == 2048)
    names = chosen(__doc__, sources)
    table = ResultTable(__file__, FIELDS, names, sources)
    for name in names:
        found: dict[tuple[object, ...], list[Tensor]] = {}
        for streams in real(name).streams():
            q, k, v = streams.asked(ASKED)
            for part, x in (("keys", k), ("values", v)):
                for bits in (2, 3, 4, 5):
                    for code, (per_number, coder) in coders(part, bits, x.shape[2]).items():
                        for first in (0, 4):
                            coded = coder(x, first)
                            coded[:, :first] = x[:, :first]
                            key = (part, code, bits, per_number, first)
                            found.setdefault(key, []).append(error(q, k, v, streams.scale, part, coded))
        for key, errors in found.items():
            streams_errors = torch.cat(errors).tolist()
            table.add(name, *key, len(streams_errors), *median_interval(streams_errors))
    table.save()


if __name__ == "__main__":
    main()
