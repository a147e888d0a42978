"""Keep keys that are spread out, so that every key has a kept key near it (greedy k-center).

In this file a row is one (batch item, kv head) stream; a slot is the place of one held token. The answer is all tokens
after the prompt, and a block is the new tokens between two evictions. Farthest-first traversal picks keys one after
the other, each time the key that is farthest (l2) from all picked keys; the picked keys are the centres. In shapes, r
are rows, s slots, d the width of a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.policy import Guarded, Held
from kvfloor.validation import literals


@dataclass(frozen=True)
class FarthestKey(Guarded):
    """Evict the tokens that greedy k-center over the keys leaves out, without looking at queries.

    This is the offline clustering in the experiments of the SubGen paper (Zandieh et al. 2024).
    Law (Gonzalez 1985): the protected tokens (`sinks` and `recent`) are kept first, or the oldest token if none is
    protected. Then the held token whose key is farthest in l2 from all kept keys is kept next, again and again until
    the budget is full. Let the radius be the largest distance from a held key to its nearest kept key. It is at most
    twice the least radius of any choice of equally many tokens that includes the protected ones. Tokens that the caller
    pinned (`State.pin`) are never evicted, and use up part of the budget. The traversal treats them like other tokens.
    If it never picks a pinned key, distances to this key have no influence on the choice.
    sinks   first tokens that are never evicted: 4 by default
    recent  newest tokens that are never evicted; by default 16, or a quarter of a budget below 64 tokens
    decode  "evict": the choice is made anew after each block of the answer, so memory stays bounded in decode;
            "keep": tokens after the prompt are never evicted, as in the paper's experiments
    By default tokens are first evicted at the end of the prompt (`prefill=dense`), as in the experiments; with
    `prefill=stream` tokens are evicted after each block of the prompt. Evicted tokens have no weight: unlike the method
    `subgen_sketch`, this policy does not keep the clusters' sizes and samples. Each kept token costs one pass over the
    held keys.
    """

    name: ClassVar[str] = "k_center"
    paper: ClassVar[str] = "Zandieh et al. 2024, SubGen (arXiv 2402.06082), experiments; Gonzalez 1985"

    decode: Literal["keep", "evict"] = "evict"

    def __post_init__(self) -> None:
        super().__post_init__()
        literals(self)

    @property
    def usual_prefill(self) -> Literal["stream", "dense"]:
        return "dense"

    @property
    def spares(self) -> Literal["nothing", "prompt", "answer"]:
        return "answer" if self.decode == "keep" else "nothing"

    def priority(self, held: Held) -> Tensor:
        last = torch.tensor([self.protected_last(b) for b in held.budget[:, 0].tolist()]).unsqueeze(1)
        kept = self.protected(held, last.to(held.position.device)) & held.live
        return -picked(held.k, held.live, kept, held.position, int(held.budget.max()))


def picked(k: Tensor, live: Tensor, kept: Tensor, position: Tensor, most: int) -> Tensor:
    """Return the turn (r, s), float64, at which farthest-first traversal of the keys k (r, s, d) picks each slot.

    Every turn picks one key per row, the farthest from all keys picked before. Slots that are not picked within `most`
    turns have turn `most` + 1.
    kept      (r, s) True for slots that count as picked at turn 0; in a row without any, turn 1 picks the oldest token
    live      (r, s) True for slots that hold a token
    position  (r, s) index of the slot's token in the stream
    """
    k = k if k.dtype == torch.float64 else k.to(torch.float32)
    rows, width, d = k.shape
    line = torch.arange(rows, device=k.device)
    turn = torch.full((rows, width), float(most + 1), dtype=torch.float64, device=k.device).masked_fill(kept, 0.0)
    near = _distance(k, k, kept).masked_fill(kept | ~live, -torch.inf)
    start = position.masked_fill(~live, torch.iinfo(position.dtype).max).argmin(1)  # first pick if none is kept
    oldest = torch.where(kept.any(1), near.argmax(1), start)
    for step in range(1, most + 1):
        farthest = oldest if step == 1 else near.argmax(1)
        open_ = near[line, farthest] > -torch.inf
        if not bool(open_.any()):
            break
        turn[line[open_], farthest[open_]] = step
        centre = k.gather(1, farthest.view(-1, 1, 1).expand(-1, 1, d))
        near = torch.minimum(near, torch.cdist(k, centre, compute_mode="donot_use_mm_for_euclid_dist").squeeze(2))
        near[line, farthest] = -torch.inf
    return turn


def _distance(k: Tensor, centres: Tensor, which: Tensor) -> Tensor:
    """Return the l2 distance (r, s) of every key k (r, s, d) to the nearest centre in its row.

    The centres are the vectors of `centres` (r, s, d) for which `which` (r, s) is True. The distance is inf in a row
    without a centre.
    """
    order = torch.argsort((~which).to(torch.int8), dim=1, stable=True)[:, : max(1, int(which.sum(1).max()))]
    index = order.unsqueeze(-1).expand(-1, -1, k.shape[2])
    apart = torch.cdist(k, centres.gather(1, index), compute_mode="donot_use_mm_for_euclid_dist")
    return apart.masked_fill(~which.gather(1, order).unsqueeze(1), torch.inf).amin(2)
