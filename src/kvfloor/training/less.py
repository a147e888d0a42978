"""The trainer of LESS kernels: `python -m kvfloor.training.less --policy 'sinks(4)@64' --out FILE`.

The model stays as it is. Layer by layer its queries, keys and values are recorded once; the policy runs over them and
says which tokens have left when a query is asked; the kernels of that layer's heads learn to give back what the
layer's output lost. Everything is decided by the arguments and the seed.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from kvfloor.audit import traces
from kvfloor.audit.plan import Item, read_prompts
from kvfloor.core.attend import attend
from kvfloor.core.bounded import Bounded, BoundedState
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Drop
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.recording import Recorder
from kvfloor.methods.registry import parse
from kvfloor.methods.summaries.low_rank import Kernels, Less
from kvfloor.models import load
from kvfloor.tasks import TASKS

TRAINING_SEED = 1_000_000_000  # added to the seed: training samples are never evaluation samples
LEAST_MASS = 1e-6  # below which the logarithm is cut in training
_QUERIES_AT_ONCE = 256
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo")


@dataclass(frozen=True)
class Recipe:
    """All that decides the kernels, beside model and policy.

    samples texts with contexts of `length` tokens; a tenth of them, not learnt from, chooses among the epochs. The
    paper takes 512 texts and a hidden width of 512; the other defaults are its own.
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


@dataclass(frozen=True)
class Text:
    """Token ids of a context and of what follows it; the prompt ends between the two."""

    context: list[int]
    rest: list[int]


@dataclass(frozen=True)
class Lesson:
    """One text in one layer: the queries that came after tokens had left, and what was held for them.

    q (P, g, m, d); k (P, n, d), v (P, n, dv); rank (P, n): the departure at which each token left, 0 the first,
    or `departures` if never; gone (m,): departures before each query; mean (P, g, m, dv) and log_mass (P, g, m) of
    attention over the held tokens; exact (P, g, m, dv).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rank: Tensor
    departures: int
    gone: Tensor
    mean: Tensor
    log_mass: Tensor
    exact: Tensor


# ---- material ------------------------------------------------------------------------------------------------------


def texts(tokenizer: Any, items: Sequence[Item]) -> list[Text]:
    """Every item's context, and its question with the right answer."""

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids if text else []

    return [
        Text(
            tokenizer(item.context).input_ids,
            plain(" " + item.question if item.question else "") + plain(" " + item.answer),
        )
        for item in items
    ]


def task_items(tokenizer: Any, samples: int, length: int, seed: int) -> list[Item]:
    """Samples of the built-in tasks in turn, with contexts of `length` tokens."""

    def size(text: str) -> int:
        return len(tokenizer(text).input_ids)

    tasks = list(TASKS.values())
    drawn = (tasks[i % len(tasks)].generate(seed, i, length, count=size) for i in range(samples))
    return [Item(s.context, s.questions[0].ask, s.questions[0].answer) for s in drawn]


def recorded(model: Any, material: Sequence[Text], layer: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Any, Any]]:
    """q (kv heads, g, n, d), k and v (kv heads, n, .), scale and softcap of one layer for each text, run exactly."""
    for text in material:
        cache = CompressedCache(model.config, "exact")
        seen = Recorder(one for one in cache.compressed if one.index == layer)
        Dialogue.start(model, cache, 1).feed([text.context + text.rest])
        one = seen.of(layer)
        yield *one.by_row, one.scale, one.softcap


def departures(method: Bounded, spec: Spec, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> Tensor:
    """(rows, n): how many tokens had been seen when each token left, n + 1 if it stayed. Sealed after `prompt`."""
    state = replace(method, summary=Drop()).open(spec)
    assert isinstance(state, BoundedState)
    n = k.shape[1]
    left = torch.full((spec.rows, n), n + 1)
    cuts = sorted({*range(method.block, n, method.block), prompt, n})
    for start, stop in zip([0, *cuts], cuts, strict=False):
        state.step(q[:, :, start:stop], k[:, start:stop], v[:, start:stop])
        if stop == prompt:
            state.seal()
        view = state.slots.view()
        held = torch.zeros(spec.rows, n + 1, dtype=torch.bool)
        position = view.position if view.live is None else view.position.masked_fill(~view.live, n)
        held.scatter_(1, position.cpu(), True)
        fresh = ~held[:, :stop] & (left[:, :stop] > n)
        left[:, :stop][fresh] = stop
    return left


def lesson(method: Bounded, layer: int, text: Text, taken: tuple[Tensor, Tensor, Tensor, Any, Any]) -> Lesson | None:
    """What the layer's kernels can learn from one text; None if nothing had left when a query was asked."""
    q, k, v, scale, softcap = taken
    rows, g, n, d = q.shape
    places = [(layer, head) for head in range(rows)]
    spec = Spec(rows, d, v.shape[2], scale, softcap, k.dtype, places=places)
    left = departures(method, spec, q, k, v, len(text.context)).to(q.device)
    times, order = torch.unique(left.clamp_max(n), return_inverse=True)
    times = times[times < n]  # what leaves with the last token is missed by none
    if not len(times):
        return None
    first = int(times[0])
    asked = torch.arange(first, n, device=q.device)
    token = torch.arange(n, device=q.device)
    means, masses, exact = [], [], []
    for piece in asked.split(_QUERIES_AT_ONCE):
        flat = q[:, :, piece].flatten(1, 2)
        later = token > piece.unsqueeze(1)
        away = (left.unsqueeze(1) <= piece.unsqueeze(1)) | later  # (rows, m, n)
        mean, mass = attend(flat, k, v, scale, softcap, hide=away.repeat(1, g, 1))
        means.append(mean.unflatten(1, (g, -1)))
        masses.append(mass.unflatten(1, (g, -1)))
        exact.append(attend(flat, k, v, scale, softcap, hide=later.repeat(g, 1).unsqueeze(0))[0].unflatten(1, (g, -1)))
    gone = (times.unsqueeze(0) <= asked.unsqueeze(1)).sum(1)
    return Lesson(
        q[:, :, first:].float(),
        k.float(),
        v.float(),
        order.clamp_max(len(times)),
        len(times),
        gone,
        torch.cat(means, 2),
        torch.cat(masses, 2),
        torch.cat(exact, 2),
    )


# ---- learning ------------------------------------------------------------------------------------------------------


def answers(kernels: Kernels, given: Lesson, dropout: float = 0.0) -> Tensor:
    """The layer's answers (P, g, m, dv) with the kernels' state in place of the tokens that have left."""
    heads, g, m, _ = given.q.shape
    psi = kernels.psi(given.k, dropout)
    values = torch.cat([given.v, torch.ones_like(given.v[..., :1])], -1)
    added = psi.new_zeros(heads * (given.departures + 1), psi.shape[2], values.shape[2])
    group = torch.arange(heads, device=psi.device).unsqueeze(1) * (given.departures + 1) + given.rank
    # What never leaves is added to a group of its own, which no query reaches.
    added = added.index_add(0, group.flatten(), torch.einsum("pnr,pnv->pnrv", psi, values).flatten(0, 1))
    state = added.view(heads, given.departures + 1, *added.shape[1:]).cumsum(1)[:, given.gone - 1]  # (P, m, R, dv+1)
    phi = kernels.phi(given.q.flatten(1, 2), dropout).view(heads, g, m, -1)
    sums = torch.einsum("pgmr,pmrv->pgmv", phi, state)
    mass = sums[..., -1].clamp_min(LEAST_MASS)
    share = torch.sigmoid(torch.log(mass) - given.log_mass).unsqueeze(-1)
    return given.mean + share * (sums[..., :-1] / mass.unsqueeze(-1) - given.mean)


def output_weight(model: Any, layer: int, width: int) -> Tensor | None:
    """The weight (hidden, width) by which the model mixes this layer's heads, if its module has a usual name."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) != layer:
            continue
        for name, child in module.named_children():
            if name in _OUTPUT_NAMES and isinstance(child, torch.nn.Linear) and child.in_features == width:
                return child.weight.detach().float()
    return None


def mixed(x: Tensor, weight: Tensor | None) -> Tensor:
    """x (P, g, m, dv) as the layer's output (m, hidden): heads side by side, times the output weight."""
    heads = x.permute(2, 0, 1, 3).flatten(1)
    return heads if weight is None else heads @ weight.T


def loss_of(kernels: Kernels, given: Lesson, weight: Tensor | None, dropout: float = 0.0) -> Tensor:
    """The sum of squared errors of the layer's output."""
    return mixed(answers(kernels, given, dropout) - given.exact, weight).square().sum()


def fit(
    lessons: Sequence[Lesson], weight: Tensor | None, start: Kernels, recipe: Recipe, say: Callable[[str], None]
) -> Kernels:
    """Adam on the mean squared error of the layer's output; the kernels that were best on the last tenth are kept."""
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
    """Kernels for every layer of a prepared model, as the file's tensors (layers, kv heads, ...).

    Layers that no compressed cache serves keep untrained kernels. Raises ValueError where the policy drops nothing.
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


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """The file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(save(tensors, facts))
    os.replace(partial, path)


def weights_tag(model: Any) -> str:
    """Names a model's weights: kernels serve the weights they were trained for."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- what it is worth -----------------------------------------------------------------------------------------------


def compare(model: Any, material: Sequence[Text], methods: Sequence[Method]) -> list[tuple[str, int, list[float]]]:
    """(method, bytes per kv head, error per layer) on the last part of each text, which follows the prompt's end."""
    seen = traces.record(model, [text.context for text in material], [text.rest for text in material])
    d, dv, dtype = seen[0].k.shape[2], seen[0].v.shape[2], seen[0].k.dtype
    rows = []
    for method in methods:
        one = Spec(1, d, dv, dtype=dtype, places=[(seen[0].layer, 0)])
        by_layer = [sum(heads) / len(heads) for heads in traces.errors(seen, method)]
        rows.append((str(method), method.open(one).nbytes, by_layer))
    return rows


def rivals(method: Bounded, less: Less, spec: Spec) -> list[Bounded]:
    """The policy alone, the policy with as many tokens more as the state's bytes buy, and the policy with the state."""
    budget = method.budget
    assert isinstance(budget, int)
    plain, more, with_state = (
        replace(method, summary=Drop(), budget=budget),
        replace(method, summary=Drop(), budget=budget + 64),
        replace(method, summary=less),
    )
    size = plain.open(spec).nbytes
    token = (more.open(spec).nbytes - size) / 64
    extra = round((with_state.open(spec).nbytes - size) / token)
    return [plain, replace(plain, budget=budget + extra), with_state]


def main() -> None:
    """Command line."""
    usual = Recipe()
    parser = argparse.ArgumentParser(prog="python -m kvfloor.training.less", description=__doc__)
    parser.add_argument("--model", default="builtin", help="builtin, or the folder of a transformers model")
    parser.add_argument("--policy", required=True, help="policy and budget in tokens, such as 'sinks(4)@64'")
    parser.add_argument("--out", type=Path, required=True, help="file for the kernels (.safetensors)")
    parser.add_argument("--prompts", type=Path, help="JSON lines as for `kvfloor audit`; the built-in tasks otherwise")
    parser.add_argument("--compare", type=int, default=18, help="samples to compare on afterwards; 0: none")
    for name in ("rank", "hidden", "samples", "length", "epochs", "batch", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    for name in ("lr", "dropout"):
        parser.add_argument(f"--{name}", type=float, default=getattr(usual, name))
    given = vars(parser.parse_args())
    name, policy, out, prompts, compared = (given.pop(key) for key in ("model", "policy", "out", "prompts", "compare"))
    recipe = Recipe(**given)
    try:
        _run(name, policy, out, prompts, compared, recipe)
    except ValueError as cause:
        print(f"error: {cause}", file=sys.stderr)
        sys.exit(2)


def _run(name: str, policy: str, out: Path, prompts: Path | None, compared: int, recipe: Recipe) -> None:
    method = parse(policy)
    if not isinstance(method, Bounded) or not isinstance(method.budget, int):
        raise ValueError(f"--policy {policy!r} must be an eviction policy with a budget in tokens, as in 'sinks(4)@64'")
    if not out.parent.is_dir():
        raise ValueError(f"--out {str(out)!r}: its folder does not exist")
    model, tokenizer = load(name)
    prepare(model)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if prompts is None:
        items = task_items(tokenizer, recipe.samples, recipe.length, recipe.seed + TRAINING_SEED)
        fresh = task_items(tokenizer, compared, recipe.length, recipe.seed)
    else:
        everything = list(read_prompts(prompts, recipe.samples + compared))
        items, fresh = everything[: recipe.samples], everything[recipe.samples :][:compared]
    tensors = train(model, texts(tokenizer, items), method, recipe, say)
    facts = {"model": name, "weights": weights_tag(model), "policy": str(method), "recipe": repr(recipe)}
    write(out, tensors, facts)
    if not compared:
        return
    less = Less(recipe.rank, str(out))
    _, _, d, _ = tensors["query_in"].shape
    dv = d  # what a token more costs, in the model's own widths
    spec = Spec(1, d, dv, places=[(0, 0)])
    for text, size, errors in compare(model, texts(tokenizer, fresh), rivals(method, less, spec)):
        layers = " ".join(f"{error:.4f}" for error in errors)
        print(f"{text:<60} {size:>8,} bytes per kv head   output error by layer {layers}")


if __name__ == "__main__":
    main()
