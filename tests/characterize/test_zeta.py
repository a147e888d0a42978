"""ZETA attention: the law written out token by token, causality, decoding, and gradients where they should flow."""

from __future__ import annotations

import bisect
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from characterize.lib.zeta_attention import ZetaAttention
from kvfloor.methods.selectors.morton import cells, interleave

LAYER = {"width": 12, "heads": 2, "k": 5, "window": 6, "curves": 3, "chunk": 8, "bits": 8}


def layer(seed: int = 0, **changed: int) -> ZetaAttention:
    torch.manual_seed(seed)
    return ZetaAttention(**(LAYER | changed)).double()


def stream(n: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, n, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(made: ZetaAttention, x: Tensor) -> Tensor:
    """The layer by plain loops over batch, heads, tokens and candidates."""
    q, k, v = (f(x).unflatten(2, (made.heads, -1)) for f in (made.queries, made.keys, made.values))
    out = torch.zeros_like(v)
    gamma = torch.sigmoid(made.theta)
    for b in range(x.shape[0]):
        for h in range(made.heads):
            for i in range(x.shape[1]):
                whole = i // made.chunk * made.chunk
                candidates = set(range(whole, i + 1))
                for c in range(made.curves):
                    shift = c * 2**made.bits // made.curves
                    codes = [int(interleave(cells(p, made.bits) + shift, made.bits + 1)) for p in k[b, : i + 1, h]]
                    asked = int(interleave(cells(q[b, i, h], made.bits) + shift, made.bits + 1))
                    line = sorted((codes[j], j) for j in range(whole))
                    at = bisect.bisect_left([code for code, _ in line], asked) - made.window // 2
                    at = max(0, min(at, whole - made.window))
                    candidates |= {j for _, j in line[at : at + made.window]}
                far = {j: float((q[b, i, h] - k[b, j, h]).square().sum()) for j in candidates}
                near = sorted(far, key=lambda j, far=far: (far[j], -j))[: made.k]
                points = torch.stack([k[b, j, h] for j in near] + [k[b, : i + 1, h].mean(0)])
                values = torch.stack([v[b, j, h] for j in near] + [v[b, : i + 1, h].mean(0)])
                weight = 1.0 / ((q[b, i, h] - points).square().sum(1) + gamma[h] ** 2)
                out[b, i, h] = weight @ values / weight.sum()
    return made.mix(out.flatten(2))


@torch.no_grad()
def test_the_layer_equals_the_law_written_out() -> None:
    made, x = layer(), stream(29)
    torch.testing.assert_close(made(x), written_out(made, x), rtol=1e-10, atol=1e-12)


class OwnWindowOnly(ZetaAttention):
    def _sorted(self, k: Tensor, whole: int, past: object) -> tuple[Tensor, Tensor]:
        return super()._sorted(k, 0, None)


class Softmaxed(ZetaAttention):
    def _weigh(self, *arguments: Tensor) -> Tensor:
        with torch.no_grad():
            self.theta += 1.0
        return super()._weigh(*arguments)


@torch.no_grad()
@pytest.mark.parametrize("kind", [OwnWindowOnly, Softmaxed])
def test_the_comparison_notices_a_wrong_line(kind: type[ZetaAttention]) -> None:
    """Nothing found on the curves; a gamma that is not the layer's."""
    torch.manual_seed(0)
    made, x = kind(**LAYER).double(), stream(29)
    wanted = written_out(made, x)
    assert float((made(x) - wanted).abs().max()) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 7, 8, 9, 25])
def test_later_tokens_never_change_an_answer(cut: int) -> None:
    made, x = layer(), stream(40)
    other = torch.cat([x[:, :cut], 3.0 * stream(40, seed=2)[:, cut:]], 1)
    assert torch.equal(made(x)[:, :cut], made(other)[:, :cut])


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 40, [40], [7, 1, 1, 20, 11], [8, 8, 24]])
def test_decoding_equals_the_whole_sequence_at_once(cuts: list[int]) -> None:
    made, x = layer(), stream(40)
    past, pieces = made.open(), []
    for a, b in pairwise([0, *torch.tensor(cuts).cumsum(0).tolist()]):
        pieces.append(made(x[:, a:b], past))
    assert past.seen == 40
    torch.testing.assert_close(torch.cat(pieces, 1), made(x), rtol=1e-11, atol=1e-13)


@torch.no_grad()
def test_the_causality_test_notices_a_grid_that_follows_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Least and largest coordinate over the sequence set the grid: what comes later moves earlier codes."""
    made, x = layer(window=2, curves=1, k=2), stream(40)

    def scaled(self: ZetaAttention, points: Tensor) -> Tensor:
        spread = made.keys(current).abs().amax()
        return true_codes(self, points / spread * 2.0)

    true_codes = ZetaAttention._codes
    monkeypatch.setattr(ZetaAttention, "_codes", scaled)
    outs = []
    for tail in (1.0, 50.0):
        current = torch.cat([x[:, :32], tail * x[:, 32:]], 1)
        outs.append(made(current)[:, :32])
    assert not torch.equal(*outs)


def test_gradients_reach_every_part_and_only_tokens_that_were_seen() -> None:
    made, x = layer(), stream(30).requires_grad_()
    made(x)[:, 17].sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in made.parameters())
    assert x.grad is not None and bool((x.grad[:, 18:] == 0).all()) and bool((x.grad[:, 17] != 0).any())


def test_a_past_takes_no_gradient() -> None:
    made, past = layer(), layer().open()
    made(stream(10), past)
    x = stream(3, seed=5).requires_grad_()
    made(x, past).sum().backward()
    assert past.k is not None and not past.k.requires_grad


@torch.no_grad()
def test_batch_items_do_not_touch_one_another() -> None:
    made, x = layer(), stream(30, batch=3)
    other = x.clone()
    other[1] = 9.0 * other[1]
    torch.testing.assert_close(made(x)[[0, 2]], made(other)[[0, 2]], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made(x)[:1], made(x[:1]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"heads": 5}, "multiple of heads"), ({"k": 0}, "k must be"), ({"bits": 25}, "at most 62")],
)
def test_impossible_layers_are_refused(changed: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ZetaAttention(**(LAYER | changed))
