"""Make slots in blocks of bytes, as an engine has them, and compare attention over them with float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor.core.decoding import DecodeBatch
from tests.support import seeded

Attends = Callable[[Tensor, Tensor, Tensor, DecodeBatch, float, float | None], Tensor]
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Case:
    """Name sizes: kv heads, queries per kv head, widths of key and value, slots, tokens held before the newest."""

    heads: int
    g: int
    d: int
    dv: int
    slots: int
    held: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    consecutive: bool = False

    def __str__(self) -> str:
        return f"{self.heads}x{self.g}-{self.d}-{self.dv}-{self.slots}-{self.held}-{self.dtype}-{self.softcap}"


CASES = (
    Case(2, 3, 64, 64, 40, (0, 39, 17)),
    Case(3, 1, 16, 16, 300, (299, 255, 256)),
    Case(1, 5, 20, 12, 70, (31, 64)),
    Case(2, 17, 128, 128, 33, (5, 32, 31, 1)),
    Case(2, 2, 64, 64, 150, (149, 3), torch.bfloat16),
    Case(2, 4, 80, 80, 150, (140, 130, 2), torch.float16),
    Case(2, 2, 16, 8, 90, (89, 40), softcap=5.0),
    Case(1, 2, 32, 32, 50, (49, 0), torch.bfloat16, softcap=30.0),
    Case(2, 2, 32, 32, 64, (63, 63, 63), consecutive=True),
)


def made(case: Case) -> tuple[Tensor, Tensor, Tensor, DecodeBatch]:
    """Return q, k, v and the batch: blocks with gaps between them, in any order, of which every request has one."""
    draw, n, padding = seeded(3), len(case.held), 24
    blocks, width = n + 2, case.slots * (case.d + case.dv) * case.heads
    memory = draw(blocks, width + padding, dtype=case.dtype)
    k = memory[:, : case.heads * case.slots * case.d].view(blocks, case.heads, case.slots, case.d)
    v = memory[:, case.heads * case.slots * case.d : width].view(blocks, case.heads, case.slots, case.dv)
    q = 2 * draw(n, case.heads, case.g, case.d, dtype=case.dtype)
    ids = torch.arange(1, n + 1) if case.consecutive else torch.tensor([*range(n, 1, -1), 0])
    held = torch.tensor(case.held)
    return q, k, v, DecodeBatch.of(ids, blocks, held, held, 1000, torch.device("cpu"), False)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return attention of q (H, g, d) over all of k (H, s, d), v (H, s, dv) in float64."""
    logits = scale * q.double() @ k.double().transpose(1, 2)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.softmax(logits, -1) @ v.double()


def error(attends: Attends, case: Case) -> float:
    """Return the largest distance of an answer from float64 over the request's own slots, in units of the tolerance."""
    (q, k, v, batch), scale = made(case), case.d**-0.5
    out = attends(q, k, v, batch, scale, case.softcap)
    assert out.shape == (*q.shape[:3], case.dv) and out.dtype == case.dtype
    worst = 0.0
    for i, (block, held) in enumerate(zip(batch.named, case.held, strict=True)):
        one = exact(q[i], k[block, :, : held + 1], v[block, :, : held + 1], scale, case.softcap)
        worst = max(worst, float((out[i] - one).abs().max()))
    return worst / TOLERANCES[case.dtype]


def error_of_equal_keys(attends: Attends, case: Case) -> float:
    """Return the distance from the mean of the values, for keys of one large logit, in units of the tolerance."""
    q, k, v, batch = made(case)
    q, k = torch.ones_like(q), torch.full_like(k, 50.0)
    out = attends(q, k, v, batch, 1.0, None)
    means = [v[b, :, : held + 1].double().mean(1) for b, held in zip(batch.named, case.held, strict=True)]
    return float((out - torch.stack(means).unsqueeze(2)).abs().max()) / TOLERANCES[case.dtype]
