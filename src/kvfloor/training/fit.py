"""Fit the kernels of LESS, one layer of a model after the other.

LESS (Dong et al. 2024, arXiv 2402.09398) keeps a linear-attention state of the evicted tokens. Its kernels are two
small networks per kv head, phi of queries and psi of keys, each with R outputs (the rank): phi(q).psi(k) replaces
exp(scale q.k) of an evicted token. In shapes, P is the number of kv heads, g of query heads per kv head, m of queries,
dv the width of a value. A lesson is the training data from one text in one layer of the model: queries, keys and
values, and the times at which a policy evicts the tokens. The last tenth of the texts is kept out of training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.bounded import Bounded
from kvfloor.hf import CompressedCache
from kvfloor.methods.summaries.low_rank import Kernels
from kvfloor.training.lessons import Lesson, Text, lesson, recorded
from kvfloor.validation import count, positive, within

LEAST_MASS = 1e-6  # below which the logarithm is cut in training
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo")


@dataclass(frozen=True)
class Recipe:
    """Hold the settings of a training run. Settings, model, policy and texts together decide the kernels.

    rank, hidden        R, the outputs of each network; its hidden units
    samples, length     number of texts, and tokens of context in each; a tenth of the texts, kept out of training,
                        decides which epoch's kernels are returned
    epochs, batch       passes over the texts; texts per step
    lr, dropout, seed   Adam's learning rate; share of hidden units off in training; seed of all randomness
    The defaults are the LESS paper's, except for samples and hidden: each is 512 in the paper.
    """

    rank: int = 8
    hidden: int = 128
    samples: int = 72
    length: int = 512
    epochs: int = 40
    batch: int = 2
    lr: float = 1e-3
    dropout: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError naming a setting that is outside the allowed limits."""
        whole_numbers = ("rank", "hidden", "length", "epochs", "batch")
        count("train-less", least=1, **{name: value for name, value in asdict(self).items() if name in whole_numbers})
        count("train-less", least=2, samples=self.samples)
        count("train-less", seed=self.seed)
        positive("train-less: lr", self.lr)
        within("train-less: dropout", self.dropout, 0.0, 1.0, high_open=True)


def answers(kernels: Kernels, given: Lesson, dropout: float = 0.0) -> Tensor:
    """Return attention outputs (P, g, m, dv) with LESS's linear-attention state in place of the evicted tokens.

    kernels  the networks phi and psi of each kv head
    given    training data from one text in one layer, with the queries of m tokens
    dropout  share of the networks' hidden units that are off
    The output of a query is attention over two sets of tokens together: those still held, with exact weights, and those
    evicted before the query, with the weights phi(q).psi(k).
    """
    heads, g, m, _ = given.q.shape
    psi = kernels.psi(given.k, dropout)
    values = torch.cat([given.v, torch.ones_like(given.v[..., :1])], -1)
    added = psi.new_zeros(heads * (given.departures + 1), psi.shape[2], values.shape[2])
    group = torch.arange(heads, device=psi.device).unsqueeze(1) * (given.departures + 1) + given.rank
    # Tokens that are never evicted go to a group of their own, which no query reaches.
    added = added.index_add(0, group.flatten(), torch.einsum("pnr,pnv->pnrv", psi, values).flatten(0, 1))
    state = added.view(heads, given.departures + 1, *added.shape[1:]).cumsum(1)[:, given.gone - 1]  # (P, m, R, dv+1)
    phi = kernels.phi(given.q.flatten(1, 2), dropout).view(heads, g, m, -1)
    sums = torch.einsum("pgmr,pmrv->pgmv", phi, state)
    mass = sums[..., -1].clamp_min(LEAST_MASS)
    share = torch.sigmoid(torch.log(mass) - given.log_mass).unsqueeze(-1)
    return given.mean + share * (sums[..., :-1] / mass.unsqueeze(-1) - given.mean)


def output_weight(model: Any, layer: int, width: int) -> Tensor | None:
    """Return the weight of the attention's output projection in model layer `layer`, float32; None if not found.

    It has shape (model's hidden size, width). The projection is a linear module with `width` inputs and a usual name,
    such as o_proj.
    """
    for module in model.modules():
        if getattr(module, "layer_idx", None) != layer:
            continue
        for name, child in module.named_children():
            if name in _OUTPUT_NAMES and isinstance(child, torch.nn.Linear) and child.in_features == width:
                return child.weight.detach().float()
    return None


def mixed(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the attention layer's output for m tokens, (m, model's hidden size), from its heads' outputs x.

    x (P, g, m, dv) is concatenated to (m, P * g * dv) and multiplied by the output projection `weight`, (hidden size,
    P * g * dv). If `weight` is None, the concatenation itself is returned.
    """
    heads = x.permute(2, 0, 1, 3).flatten(1)
    return heads if weight is None else heads @ weight.T


def loss_of(kernels: Kernels, given: Lesson, weight: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Return the squared error of one layer's output on one text, against exact attention, summed to a scalar.

    kernels  the networks phi and psi of each kv head; LESS's state, made with them, replaces the evicted tokens
    given    training data from the text in this layer, with the outputs of exact attention
    weight   the output projection (model's hidden size, P * g * dv), applied to both outputs; None: the error is that
             of the heads' outputs before the projection
    dropout  share of the networks' hidden units that are off
    """
    return mixed(answers(kernels, given, dropout) - given.exact, weight).square().sum()


def fit(
    lessons: Sequence[Lesson], weight: Tensor | None, start: Kernels, recipe: Recipe, say: Callable[[str], None]
) -> Kernels:
    """Train one layer's kernels by Adam on the squared error of the layer's output, and return the best ones.

    lessons   the training data of this layer, one entry per text; the last tenth, at least one, is kept out of training
    weight    the output projection of the layer (model's hidden size, P * g * dv); None: the error is that of the
              heads' outputs before the projection
    start     the untrained kernels
    recipe    the settings of the training: learning rate, epochs, dropout and so on
    say       called at the end with one line of text: the error before training and that of the best kernels
    The best kernels are those with the least error on the last tenth, after any epoch or before the first.
    """
    kept_back = max(1, len(lessons) // 10)
    seen, unseen = lessons[:-kept_back], lessons[-kept_back:]
    size = sum(float(mixed(one.exact, weight).square().sum()) for one in lessons) / len(lessons)
    tensors = {name: x.clone().requires_grad_() for name, x in start.tensors().items()}
    kernels = Kernels(**tensors)
    optimizer = torch.optim.Adam(list(tensors.values()), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, recipe.epochs // 4), 0.5)

    def missed() -> float:
        with torch.no_grad():
            return sum(float(loss_of(kernels, one, weight)) for one in unseen)

    first = best = missed()
    kept = {name: x.detach().clone() for name, x in tensors.items()}
    source = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(seen), generator=source).tolist()
        for at in range(0, len(order), recipe.batch):
            some = order[at : at + recipe.batch]
            loss = sum(loss_of(kernels, seen[i], weight, recipe.dropout) for i in some) / (len(some) * size)
            assert isinstance(loss, Tensor)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), 1.0)
            optimizer.step()
        schedule.step()
        now = missed()
        if now < best:
            best, kept = now, {name: x.detach().clone() for name, x in tensors.items()}
    whole = sum(float(mixed(one.exact, weight).square().sum()) for one in unseen)
    say(f"output error on unseen texts {math.sqrt(first / whole):.4f} -> {math.sqrt(best / whole):.4f}")
    return Kernels(**kept)


def train(
    model: Any, material: Sequence[Text], method: Bounded, recipe: Recipe, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """Train kernels for every layer of a model; return them by name as tensors (layers, kv heads, ...), for a file.

    model      a transformers model that `kvfloor.hf.prepare` has prepared for compressed caches
    material   texts that the model runs over
    method     the eviction policy with its budget, which decides the tokens that the kernels learn to replace
    recipe     the settings of the training: rank, hidden units, learning rate, epochs and so on
    say        called with each line of progress
    Only layers with attention over all tokens are compressed. Any other layer, such as one with a sliding window, gets
    copies of the kernels of the layer before it, or untrained ones if it is the first. So the file has kernels for each
    layer up to the last compressed one. Raises ValueError if fewer than two texts have a query after an eviction.
    """
    compressed = {layer.index for layer in CompressedCache(model.config, "exact").compressed}
    layers: list[Kernels] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # of dropout
        for layer in range(max(compressed) + 1):
            begin, lessons, weight = time.perf_counter(), [], None
            if layer not in compressed:
                layers.append(layers[-1] if layers else _start(model, recipe, 0))
                continue
            for text, taken in zip(material, recorded(model, material, layer), strict=True):
                one = lesson(method, layer, text, taken)
                if one is not None:
                    lessons.append(one)
            if len(lessons) < 2:
                raise ValueError(f"{method} keeps (nearly) all of these texts: give longer ones, or a smaller budget")
            heads, g, _, d = lessons[0].q.shape
            weight = output_weight(model, layer, heads * g * lessons[0].v.shape[2])
            start = Kernels.untrained(heads, d, recipe.rank, recipe.hidden, recipe.seed + layer)
            layers.append(fit(lessons, weight, start, recipe, lambda text, layer=layer: say(f"layer {layer}: {text}")))
            say(f"layer {layer}: {len(lessons)} texts, {time.perf_counter() - begin:.0f} s")
    names = layers[0].tensors()
    return {name: torch.stack([one.tensors()[name] for one in layers]).contiguous() for name in names}


def _start(model: Any, recipe: Recipe, layer: int) -> Kernels:
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Kernels.untrained(heads, d, recipe.rank, recipe.hidden, recipe.seed + layer)
