"""The attention weights that a policy is given are those of the tokens that each query read, and 0 elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.bounded import Bounded
from kvfloor.core.policy import Held, Policy, Queries
from tests.support import Draw, fed, stream

BUDGET, BLOCK, READ = 20, 6, 5


@dataclass(frozen=True)
class Recording(Policy):
    """Keeps the newest tokens, and records the weights that it is given."""

    name: ClassVar[str] = "recording"
    wants_weights: ClassVar[bool] = True
    seen: list[tuple[Tensor, ...]] = field(default_factory=list, compare=False, repr=False)

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        self.seen.append((held.position.clone(), held.live.clone(), weights.clone(), queries.position.clone()))
        return {}

    def priority(self, held: Held) -> Tensor:
        return held.position.double()


def read_by(logits: Tensor, visible: Tensor, most: int | None) -> Tensor:
    """The mask of the tokens that a query reads: the `most` of largest logit among the visible ones, None: all."""
    if most is None:
        return visible
    order = logits.masked_fill(~visible, -torch.inf).argsort(descending=True)[:most]
    return visible & torch.zeros_like(visible).index_fill(0, order, True)


@pytest.mark.parametrize(("selector", "most"), [("", None), (f"|top_k(k={READ})", READ)])
def test_weights_are_the_softmax_over_what_each_query_read(draw: Draw, selector: str, most: int | None) -> None:
    rows, g, n, scale = 2, 3, 61, 0.7
    policy = Recording()
    method = Bounded(policy, selector=parse(f"window{selector}@8").selector, budget=BUDGET, block=BLOCK)  # type: ignore[attr-defined]
    q, k, v = stream(draw, rows, g, n, scale=2.0)
    fed(method.open(Spec(rows=rows, d=4, dv=4, scale=scale, dtype=q.dtype)), (q, k, v), 17)
    assert len(policy.seen) == n // BLOCK
    for position, live, weights, asked in policy.seen:
        for row in range(rows):
            for j, own in enumerate(asked[row].tolist()):
                for head in range(g):
                    logits = scale * (k[row, position[row]].double() @ q[row, head, own].double())
                    reads = read_by(logits, live[row] & (position[row] <= own), most)
                    wanted = logits.masked_fill(~reads, -torch.inf).softmax(0)
                    torch.testing.assert_close(weights[row, head, j].double(), wanted, rtol=1e-4, atol=1e-6)
