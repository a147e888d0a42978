"""Train LESS's kernels for SmolLM2, and compare them with as many bytes of tokens, in nats.

    python -m characterize.less_on_smollm2 [--out DIR]

The kernels are trained for `sinks(4)@128` on passages of 512 + 256 tokens of the shipped texts, all behind the first
2,048 tokens. Then `kvfloor audit` measures, on the beginnings of the texts (512 tokens of context, 512 predicted), the
policy alone, the policy with as many tokens more as LESS's state takes, and the policy with LESS. Each row has the
bytes of the cache at the context's end and the mean KL divergence from exact predictions in nats per token, with its
95 % interval over blocks of 64 tokens; then how much more it is than LESS's, block by block, with the normal 95 %
interval of the mean, and the number of blocks. The script takes half an hour on one core. With --out, kernels and rows
that are in the folder are not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from characterize.lib.table import Row, mean_interval, save
from kvfloor import Spec
from kvfloor.audit.nats import block_means, summaries
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.run import run
from kvfloor.audit.texts import SHIPPED, text_of
from kvfloor.core.bounded import Bounded
from kvfloor.hf import prepare
from kvfloor.methods.grammar import parse
from kvfloor.methods.summaries.low_rank import Less
from kvfloor.models import load
from kvfloor.training.fit import Recipe, train
from kvfloor.training.less import rivals
from kvfloor.training.lessons import Text

MODEL, POLICY = "smollm2", "sinks(4)@128"
CONTEXT, REST, FROM, SCORED = 512, 256, 2048, 512
RECIPE = Recipe(samples=24, epochs=12)
FIELDS = (
    "method",
    "texts",
    "state_bytes",
    "kl",
    "low",
    "high",
    "same_top",
    "tokens",
    "more",
    "more_low",
    "more_high",
    "blocks",
)


def passages(tokenizer: Any) -> list[Text]:
    """Return the passages to train on, the texts in turns, none of them within the first tokens of a text."""
    found = []
    ids = [tokenizer(text_of(name, 0), verbose=False).input_ids[FROM:] for name in SHIPPED]
    for i in range(RECIPE.samples):
        of, start = ids[i % len(ids)], i // len(ids) * (CONTEXT + REST)
        part = of[start : start + CONTEXT + REST]
        if len(part) < CONTEXT + REST:
            raise ValueError(f"the text {SHIPPED[i % len(ids)]} is too short for {RECIPE.samples} passages")
        found.append(Text(part[:CONTEXT], part[CONTEXT:]))
    return found


def trained(folder: Path) -> Path:
    """Train the kernels into `folder`, unless they are there; return their file."""
    path = folder / "kernels.safetensors"
    if not path.exists():
        model, tokenizer = load(MODEL)
        prepare(model)
        method = parse(POLICY)
        assert isinstance(method, Bounded)
        tensors = train(model, passages(tokenizer), method, RECIPE, lambda line: print(line, flush=True))
        save_file(tensors, path, {"model": MODEL, "policy": POLICY, "recipe": repr(RECIPE)})
    return path


def measured(folder: Path) -> list[Row]:
    """Return the rows of the table: the policy, the policy with more tokens, and the policy with LESS."""
    method, less = parse(POLICY), Less(RECIPE.rank, str(trained(folder)))
    assert isinstance(method, Bounded)
    settings = [str(one) for one in rivals(method, less, Spec(1, 64, 64, places=[(0, 0)]))]
    request = AuditRequest(
        model=MODEL,
        methods=tuple(settings),
        budgets=("128",),
        tasks=(),
        texts=SHIPPED,
        contexts=(CONTEXT,),
        continuation=SCORED,
        facts=0,
        out=folder / "audit",
    )
    answer = run(request, lambda total, text: print(text, flush=True))
    found = {one.setting: one for one in summaries(answer.texts)}
    names = [*settings[:2], f"{POLICY.partition('@')[0]}+less(trained for it)@128"]
    blocks = {setting: block_means(row for row in answer.texts if row.method == setting) for setting in settings}
    rows: list[Row] = []
    for name, setting in zip(names, settings, strict=True):
        one = found[setting]
        more = [a - b for a, b in zip(blocks[setting], blocks[settings[-1]], strict=True)]
        rows.append((name, one.texts, int(one.state_bytes), *_figures(one.figures), *mean_interval(more), len(more)))
    return rows


def _figures(found: Any) -> tuple[float, ...]:
    return (found.kl, found.kl_low, found.kl_high, found.same_top, found.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder that keeps the kernels and the measured rows")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        save(__file__, FIELDS, measured(folder))


if __name__ == "__main__":
    main()
