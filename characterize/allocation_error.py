"""Divide one budget among a model's kv heads in several ways, and compare the attention output's error.

    python -m characterize.allocation_error [--keys "built-in 2k,SmolLM2 2k,SmolLM2 8k"]

All layers of recorded models (`characterize.lib.real_keys`). The budget is a sixteenth of the tokens per kv head on
average, so bytes are equal; no head gets fewer than 16 tokens. A policy streams over a text; then the queries of its
last 16 tokens are answered. It also holds the newest 16 tokens before them, of an open block. `h2o` is left out at 8k
tokens, where it would take ten minutes. The ways to divide the budget:
  even      equal shares
  pyramid   shares that fall with depth, by PyramidKV's rule
  mild      half of the mean, and the rest by PyramidKV's rule
  inverted  PyramidKV's shares from the last layer to the first
  floor     half of the mean, and the rest in proportion to the tokens that a head's queries read apart
  keys95    half of the mean, and the rest in proportion to the keys that carry 95 % of the softmax mass
The last two are measured on the first 2,048 tokens of another text of the same source. A head's error is
||answer - exact|| / ||exact||. Each line has the mean over all kv heads and texts, the mean difference from `even` with
its 95 % interval, and in how many of the heads the error is smaller. The script takes six minutes on one core.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from characterize.lib.mass import keys_for_mass, softmax_weights
from characterize.lib.real_keys import REAL, RealKeys, Streams, after, chosen, real
from characterize.lib.table import ResultTable, mean_interval
from kvfloor import parse
from kvfloor.hf.allocate import Shares, pyramid, spread
from kvfloor.hf.calibrate import distinguished, in_proportion
from kvfloor.hf.recording import Recorded

ASKED, SHARE, LEAST, CALIBRATION, KEPT = 16, 16, 16, 2048, 0.5
POLICIES = {"built-in 2k": ("sinks(4)", "h2o"), "SmolLM2 2k": ("sinks(4)", "h2o"), "SmolLM2 8k": ("sinks(4)",)}
FIELDS = ("keys", "policy", "budget", "allocation", "heads", "error", "difference", "low", "high", "better")


def measured_shares(layers: Sequence[Streams]) -> dict[str, Shares]:
    """Return the shares of `floor` and `keys95`, measured on one text: one Streams per layer."""
    floor, spreads = [], []
    for one in layers:
        q, k, v = one.q[:, :, :CALIBRATION], one.k[:, :CALIBRATION], one.v[:, :CALIBRATION]
        floor.append(distinguished(Recorded(q.flatten(0, 1)[None], k[None], v[None], one.scale, None, CALIBRATION)))
        asked, keys = q[:, :, -ASKED:].flatten(1, 2), k[:, :-ASKED]
        spreads.append(keys_for_mass(softmax_weights(asked, keys, one.scale), 0.95).double().mean(1).tolist())
    return {"floor": in_proportion(floor, KEPT), "keys95": in_proportion(spreads, KEPT)}


def shares_by_text(source: RealKeys) -> dict[str, dict[str, Shares]]:
    """Return each text's shares by allocation; the measured ones come from the text before it."""
    measured = {}
    for text in source.texts:
        measured[text] = measured_shares([one for one in source.streams() if one.texts[0] == text])
    found = {}
    for i, text in enumerate(source.texts):
        falling = pyramid(len(measured[text]["floor"]))
        fixed = {"even": ((1.0,),) * len(falling), "pyramid": falling, "mild": in_proportion(falling, KEPT)}
        fixed["inverted"] = falling[::-1]
        found[text] = fixed | measured[source.texts[i - 1]]
    return found


def errors(policy: str, budgets: tuple[int, ...], streams: Streams) -> Tensor:
    """Return the error (rows,) of each stream at its own budget in tokens."""
    q, k, v = streams.asked(ASKED)
    method = parse(policy).with_budget(budgets)
    assert method is not None
    state = after(method, streams, ASKED)
    exact = softmax_weights(q, k, streams.scale) @ v.double()
    return (state.read(q).mean.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__, sources := tuple(source.name for source in REAL))
    table = ResultTable(__file__, FIELDS, names, sources)
    for name in names:
        source = real(name)
        shares, budget = shares_by_text(source), source.tokens // SHARE
        heads = next(source.streams(1)).k.shape[0]
        for policy in POLICIES[name]:
            found: dict[str, list[Tensor]] = {}
            for how in next(iter(shares.values())):
                given = {
                    text: spread([line if len(line) > 1 else line * heads for line in ways[how]], budget, LEAST)
                    for text, ways in shares.items()
                }
                found[how] = [
                    errors(policy, given[one.texts[0]][i % len(given[one.texts[0]])], one)
                    for i, one in enumerate(source.streams())
                ]
                mine, even = torch.cat(found[how]), torch.cat(found["even"])
                difference = mean_interval((mine - even).tolist()) if how != "even" else (0.0, 0.0, 0.0)
                better = int((mine < even).sum())
                table.add(name, policy, budget, how, len(mine), float(mine.mean()), *difference, better)
    table.save()


if __name__ == "__main__":
    main()
