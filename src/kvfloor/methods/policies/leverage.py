"""Evict the tokens whose keys are nearly linear combinations of the other keys (low ridge leverage).

In this file a row is one (batch item, kv head) stream, and a slot the place of one held token. A sketched key is x =
S'k, the key k projected to fewer channels by the matrix S. X is the matrix with the sketched keys as rows, and X'X its
Gram matrix; ' is the transpose. A state is the memory of a method, a `Spec` the sizes and constants of a state. A
rotation is a rotary embedding (RoPE); `Spec.applied` is the rotation by which keys are already rotated when a state
gets them, None if unknown. In shapes, r are rows, s slots, w is the width of a sketched key, d that of a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.device import sent
from kvfloor.core.fields import Field
from kvfloor.core.policy import Guarded, Held, PolicyMemory
from kvfloor.core.randomness import normal, row_keys, uniform
from kvfloor.core.rowwise import row_by_row, total
from kvfloor.core.spec import Spec
from kvfloor.validation import count, literals, positives

_ROUNDING = 1e-4  # of float32 sums, as a share of the trace


@dataclass(frozen=True)
class RidgeLeverage(Guarded):
    """Evict the token whose key has the lowest ridge leverage score, without looking at queries.

    A low score means that the key is nearly a linear combination of the other keys.
    Law (after Compactor, 2025): score(token) = x' (X'X + lambda I)^-1 x with x = S'k and lambda = ridge tr(X'X) / d.
    K has the keys k as rows, X the sketched keys x; tr is the trace, I the unit matrix. S (d, sketch) is a random
    matrix fixed by the spec's seed, and SS' is I on average. Where (1 - e) ||u||^2 <= ||S'u||^2 <= (1 + e) ||u||^2 for
    all u in the span of the keys, every score lies within factors (1 - e)/(1 + e) and (1 + e)/(1 - e) of the exact k'
    (K'K + lambda I)^-1 k. A Gaussian S satisfies this if sketch is of the order (rank of K) / e^2. With sketch >= d
    there is no S: x = k, and the scores are exact.
    ridge    lambda, as a share of tr(X'X) / d, which is the mean eigenvalue of K'K or (if sketched) an estimate of it
    sketch   width of the sketched keys: 48 by default; only their Gram matrix is stored
    kind     kind of matrix S: "gaussian" (normal entries), or "count" (each key channel is added, with a random sign,
             to one random channel of the sketched key)
    over     "seen": X has the keys of all tokens so far; "held": X has the keys of the held tokens only, so the score
             of a key rises as similar keys are evicted
    centre   True: the mean of the keys is subtracted first
    keys     "cached": keys as the cache holds them, after the rotary embedding (RoPE); "unrotated": keys before it, as
             in the paper. For this, a cache of kvfloor.hf must be given the model when it is made, so that it can
             measure the rotation (`Spec.applied`); otherwise the keys are taken as cached
    sinks    first tokens that are never evicted: 4 by default
    recent   newest tokens that are never evicted; by default 16, or a quarter of a budget below 64 tokens
    Compactor scores the whole prompt once, as ridge_leverage(centre=True,keys=unrotated,sinks=8,recent=4,prefill=dense)
    does. It blends these scores with attention weights, which this policy does not use. Scores are float64, the stored
    Gram matrix float32.
    """

    name: ClassVar[str] = "ridge_leverage"
    paper: ClassVar[str] = "Chari and Van Durme 2025, Compactor (arXiv 2507.08143); streaming form"
    wants_keys: ClassVar[bool] = True

    ridge: float = 0.01
    sketch: int = 48
    kind: Literal["gaussian", "count"] = "gaussian"
    over: Literal["seen", "held"] = "seen"
    centre: bool = False
    keys: Literal["cached", "unrotated"] = "cached"

    def __post_init__(self) -> None:
        super().__post_init__()
        positives("ridge_leverage", ridge=self.ridge)
        count("ridge_leverage", least=1, sketch=self.sketch)
        literals(self)
        if not isinstance(self.centre, bool):
            raise ValueError(f"ridge_leverage: centre must be True or False, got {self.centre!r}")

    @property
    def wants_rotation(self) -> bool:
        return self.keys == "unrotated"

    def shared(self, spec: Spec) -> dict[str, Tensor]:
        return {} if self.sketch >= spec.d else {"key sketch": self._sketch(spec)}

    def _sketch(self, spec: Spec) -> Tensor:
        """Return the random projection S (d, sketch) of keys, float64, the same for all rows."""
        keys = row_keys(spec.seed, torch.zeros(1, dtype=torch.int64), f"leverage sketch {self.kind}")
        if self.kind == "gaussian":
            at = torch.arange(spec.d * self.sketch).view(spec.d, self.sketch)
            return sent(normal(keys, at) * self.sketch**-0.5, spec.device)
        channel = torch.arange(spec.d)
        sign = 1.0 - 2.0 * (uniform(keys, 2 * channel) < 0.5).to(torch.float64)
        place = (uniform(keys, 2 * channel + 1) * self.sketch).to(torch.int64)
        sketch = torch.zeros(spec.d, self.sketch, dtype=torch.float64)
        return sent(sketch.scatter(1, place.unsqueeze(1), sign.unsqueeze(1)), spec.device)

    def open(self, spec: Spec, shared: dict[str, Tensor]) -> KeyGram | None:
        if self.over != "seen":
            return None
        kind = UnrotatedKeyGram if self.keys == "unrotated" else KeyGram
        return kind(spec, min(self.sketch, spec.d), shared, self.centre)

    def priority(self, held: Held) -> Tensor:
        def scores(k: Tensor, *moments: Tensor) -> Tensor:
            x = sketched(k, held.shared)
            gram, total, n = moments or (
                torch.matmul(x.transpose(1, 2), x),
                x.sum(1),
                held.count.new_tensor(len(x[0])),
            )
            if self.centre:
                mean = total / n.clamp_min(1)
                gram = gram - mean.unsqueeze(2) * total.unsqueeze(1)
                x = x - mean.unsqueeze(1)
            return leverage(x, gram, self.ridge, held.spec.d)

        seen = () if self.over == "held" else held.memory.moments(held.rows)
        k = unrotated(held.k, held.position, held.spec) if self.keys == "unrotated" else held.k
        return row_by_row(scores, k, beside=seen, held=held.filled)


def unrotated(k: Tensor, position: Tensor, spec: Spec) -> Tensor:
    """Return the keys k (r, s, d) with the rotation `Spec.applied` undone, in float32 or wider.

    position (r, s) are the positions by which the keys are rotated. If `Spec.applied` is None, the keys are returned as
    given.
    """
    if spec.applied is None:
        return k
    k = k.to(spec.compute_dtype)
    return spec.applied.turned(k, spec.applied.circle(position, spec.compute_dtype), back=True)


def sketched(k: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Return keys k (..., d) projected to (..., sketch), float64, or k itself if there is no projection.

    shared maps names to tensors; the projection S (d, sketch), if any, has the name "key sketch".
    """
    sketch = shared.get("key sketch")
    k = k.to(torch.float64)
    return k if sketch is None else torch.matmul(k, sketch)


def leverage(x: Tensor, gram: Tensor, ridge: float, d: int) -> Tensor:
    """Return the ridge leverage score x' (gram + lambda I)^-1 x of each sketched key of x (r, s, w): (r, s).

    gram (r, w, w) is the Gram matrix of sketched keys, which have width w; d is the width of the keys before
    sketching. lambda = ridge tr(gram) / d.
    """
    size = gram.diagonal(dim1=1, dim2=2).sum(1) / d
    size = torch.where(size > 0, ridge * size, torch.ones_like(size))  # all keys are zero: every score is 0
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky(gram + size.view(-1, 1, 1) * eye)
    half = torch.linalg.solve_triangular(root, x.transpose(1, 2), upper=False)
    return half.square().sum(1)


class KeyGram(PolicyMemory):
    """Hold the Gram matrix of all sketched keys so far, and the sum of the sketched keys if the keys are centred.

    gram   (rows, w, w) float32; w is the width of the sketched keys
    total  (rows, w) float32: the sum of the sketched keys; (rows, 0) unless keys are centred
    met    (rows,) number of tokens whose keys are in the Gram matrix
    """

    def __init__(self, spec: Spec, width: int, shared: dict[str, Tensor], centred: bool) -> None:
        self.spec = spec
        self.shared = shared  # public: the sketch
        self.gram = torch.zeros(spec.rows, width, width, device=spec.device)
        self.total = torch.zeros(spec.rows, width if centred else 0, device=spec.device)
        self.met = torch.zeros(spec.rows, dtype=torch.int64, device=spec.device)

    def on_keys(self, rows: Tensor, k: Tensor, position: Tensor, live: Tensor) -> None:
        rows = sent(rows, self.met.device)
        fresh = live & (position >= self.met[rows].unsqueeze(1))
        x = row_by_row(lambda k: sketched(k, self.shared), k).masked_fill(~fresh.unsqueeze(-1), 0.0)
        self.gram[rows] += row_by_row(lambda x: torch.matmul(x.transpose(1, 2), x), x).to(self.gram.dtype)
        if self.total.shape[1]:
            self.total[rows] += total(x, 1).to(self.total.dtype)
        self.met[rows] += fresh.sum(1)

    def fields(self) -> dict[str, Any]:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("gram", "total")}
        return {name: Field(torch.float32, shape, finite=True) for name, shape in shapes.items()}

    def require_sound(self, fields: dict[str, Any]) -> None:
        """Raise ValueError if the Gram matrix of a saved state has a negative eigenvalue.

        fields: the saved tensors by name: "gram", "total" and "met". No true Gram matrix of keys has a negative
        eigenvalue. If keys are centred, the matrix after subtraction of the mean key is tested.
        """
        gram, total = fields["gram"].double(), fields["total"].double()
        if total.shape[1]:
            mean = total / fields["met"].clamp_min(1).unsqueeze(1)
            gram = gram - mean.unsqueeze(2) * total.unsqueeze(1)
        size = gram.diagonal(dim1=1, dim2=2).sum(1)
        if bool((torch.linalg.eigvalsh(gram).amin(1) < -_ROUNDING * size.abs()).any()):
            raise ValueError("gram is the Gram matrix of no keys")

    def moments(self, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Gram matrix (r, w, w) and sum (r, w) of the sketched keys, and the number of keys (r, 1).

        Matrix and sum are float64. The sum is (r, 0) unless keys are centred. rows (r,): indices of the rows, None:
        all.
        """
        mine = slice(None) if rows is None else sent(rows, self.met.device)
        return self.gram[mine].double(), self.total[mine].double(), self.met[mine].unsqueeze(1)


class UnrotatedKeyGram(KeyGram):
    """Hold the Gram matrix of all sketched keys so far; before sketching, their rotation `Spec.applied` is undone."""

    def on_keys(self, rows: Tensor, k: Tensor, position: Tensor, live: Tensor) -> None:
        super().on_keys(rows, unrotated(k, position, self.spec), position, live)
