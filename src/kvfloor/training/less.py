"""Train the kernels of LESS for a model and an eviction policy of your own: the command `kvfloor train-less`.

LESS (Dong et al. 2024) keeps a linear-attention state of the tokens that the policy evicts. Its kernels are small
networks, one pair per layer and kv head, that map queries and keys to this state's features. The model itself is not
trained. Its queries, keys and values are recorded once, layer by layer. The policy runs over them and decides which
tokens are evicted before each query. The kernels then learn to make up for the evicted tokens in the layer's output.
Arguments and seed decide everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from kvfloor.audit import traces
from kvfloor.audit.prompts import read_prompts
from kvfloor.core.bounded import Bounded
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Drop
from kvfloor.files import replace_file
from kvfloor.hf import prepare
from kvfloor.methods.grammar import parse
from kvfloor.methods.summaries.low_rank import Less
from kvfloor.models import load
from kvfloor.training.fit import Recipe, train
from kvfloor.training.lessons import Text, task_items, texts

TRAINING_SEED = 1_000_000_000  # added to the seed: training samples are never evaluation samples


def run(
    name: str,
    policy: str,
    out: Path,
    prompts: Path | None,
    compared: int,
    recipe: Recipe,
    say: Callable[[str], None],
) -> list[tuple[str, int, list[float]]]:
    """Train kernels of LESS for a model and a policy, write them to the file `out`, and compare them on other texts.

    name      the model: "builtin", the name of a published model that `kvfloor.models.load` knows, a `.gguf` file, or
              the folder of a transformers model
    policy    an eviction policy with a budget in tokens, such as "sinks(4)@64"
    prompts   file of JSON lines, each {"prompt", "answer"} or {"context", "question", "answer"}; None: samples of the
              built-in tasks
    compared  number of texts, not used in training, to compare on; 0: nothing is compared, and [] is returned
    recipe    the settings of the training: rank of LESS's state, texts, epochs, learning rate and so on
    say       called with each line of progress
    Three methods are compared: the policy alone, the policy with a larger budget, and the policy with the kernels. The
    last two take equal memory. Returns one tuple per method: the method written as text, its bytes per kv head, and a
    list with one mean relative error of the attention output per layer. Raises ValueError for an argument that cannot
    be used.
    """
    method = parse(policy)
    if not isinstance(method, Bounded) or not isinstance(method.budget, int):
        raise ValueError(f"--policy {policy!r} must be an eviction policy with a budget in tokens, as in 'sinks(4)@64'")
    if not out.parent.is_dir():
        raise ValueError(f"--out {str(out)!r}: its folder does not exist")
    model, tokenizer = load(name)
    prepare(model)

    if prompts is None:
        items = task_items(tokenizer, recipe.samples, recipe.length, recipe.seed + TRAINING_SEED)
        fresh = task_items(tokenizer, compared, recipe.length, recipe.seed)
    else:
        everything = list(read_prompts(prompts, recipe.samples + compared))
        items, fresh = everything[: recipe.samples], everything[recipe.samples :][:compared]
    tensors = train(model, texts(tokenizer, items), method, recipe, say)
    facts = {"model": name, "weights": weights_tag(model), "policy": str(method), "recipe": repr(recipe)}
    replace_file(out, save(tensors, facts))
    if not compared:
        return []
    less = Less(recipe.rank, str(out))
    _, _, d, _ = tensors["query_in"].shape
    dv = d  # the kernels' file holds no width of values: bytes are counted as if they were as wide as keys
    spec = Spec(1, d, dv, places=[(0, 0)])
    return compare(model, texts(tokenizer, fresh), rivals(method, less, spec))


def weights_tag(model: Any) -> str:
    """Return a digest of a model's weights, 16 hex digits of a SHA-256, to be recorded in the kernels' file.

    Kernels fit only the weights that they were trained for; the digest tells which weights these are.
    """
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def compare(model: Any, material: Sequence[Text], methods: Sequence[Method]) -> list[tuple[str, int, list[float]]]:
    """Measure each method's relative l2 error of the attention output against exact attention, on the texts `material`.

    `model` must have been prepared for compressed caches (`kvfloor.hf.prepare`). Each text has a context, which the
    method compresses, and a second part (question and answer), on whose queries the error is measured. Returns one
    tuple per method: the method written as text, the bytes that it allocates for one kv head before the first token,
    and a list with one error per layer, the mean over the layer's kv heads.
    """
    seen = traces.record(model, [text.context for text in material], [text.rest for text in material])
    d, dv, dtype = seen[0].k.shape[2], seen[0].v.shape[2], seen[0].k.dtype
    rows = []
    for method in methods:
        one = Spec(1, d, dv, dtype=dtype, places=[(seen[0].layer, 0)])
        by_layer = [sum(heads) / len(heads) for heads in traces.errors(seen, method)]
        rows.append((str(method), method.open(one).nbytes, by_layer))
    return rows


def rivals(method: Bounded, less: Less, spec: Spec) -> list[Bounded]:
    """Return [policy, policy with a larger budget, policy with LESS], three methods to compare.

    The policy and its budget are those of `method`. `less` is the summary that keeps the LESS state of evicted tokens.
    The larger budget has as many more tokens as fit into the bytes of this state, so the last two methods take equal
    memory. Bytes are counted for `spec`, the sizes of one kv head.
    """
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
