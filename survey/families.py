"""Compare a compressed cache with transformers' own on a tiny random model of every model family.

    python -m survey [--json] [--write FOLDER] [FAMILY ...]

`exact` must give the logits and greedy tokens of the stock cache in every run of `conversations`. Then each family runs
with eviction, and must stay within its bound. docs/models.md is rendered from the committed results for the oldest and
the newest supported release of transformers (`make models`).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from kvfloor.files import replace_file
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.families import layer_roles, layer_types, refusal
from kvfloor.hf.prepare import prepare
from survey.conversations import RUNS, Heard, apart, by_forwards, by_generate, difference
from survey.tiny import families, tiny_model

TOLERANCE = 1e-4  # of the largest logit, in float32: only the order in which products are summed may differ
BUDGET, BLOCK = 16, 8  # tokens kept per row, and tokens per block between two evictions


@dataclass(frozen=True)
class Finding:
    """Record the result of one family in one release of transformers.

    verdict     "identical", "differs", "refused" (by kvfloor, with the reason), "no stock run" (transformers' own
                cache fails on the tiny model), "not built" (the tiny model cannot be made)
    layers      the number of layers of each type in the tiny model, the compressed ones first: "2 full, 2 sliding"
    difference  the largest of |logit - stock logit| / max |stock logit| over all runs with `exact`
    evicted     the same with `sinks` at 16 tokens, which shows that the comparison sees the compressed layers; None if
                it did not run
    held        tokens that a row of the evicting cache holds at the end, of the 49 seen
    reason      the cause of any verdict but "identical"
    """

    family: str
    model: str
    verdict: str
    layers: str = ""
    difference: float | None = None
    evicted: float | None = None
    held: int | None = None
    reason: str = ""


def survey(names: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield one finding per family in `names`, or for every family of this transformers release."""
    for family in names or families():
        yield look_at(family)


def look_at(family: str) -> Finding:
    """Build this family's tiny model and return how a compressed cache does on it."""
    model_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    try:
        default = CONFIG_MAPPING[family]()
        reason = refusal(default)
        if reason is not None:
            return Finding(family, model_name, "refused", reason=reason)
        model = tiny_model(family)
    except Exception as error:
        return Finding(family, model_name, "not built", reason=_told(error))
    try:
        prepare(model)
        layers = described(model.config)
        CompressedCache(model.config, "exact")
    except ValueError as error:
        return Finding(family, model_name, "refused", reason=_told(error))
    except Exception as error:
        return Finding(family, model_name, "differs", reason=_told(error))
    return compared(family, model_name, layers)


def compared(family: str, model_name: str, layers: str) -> Finding:
    """Run one family with the stock cache, with `exact` and with eviction, and return the finding."""
    stock = tiny_model(family)
    try:
        expected = [run(stock, None) for run in RUNS]
    except Exception as error:
        return Finding(family, model_name, "no stock run", layers, reason=_told(error))
    model = prepare(tiny_model(family))
    try:
        exact = [run(model, CompressedCache(model.config, "exact")) for run in RUNS]
        differences = [difference(mine, theirs) for mine, theirs in zip(exact, expected, strict=True)]
        evicted, held = evicting(model, expected[0])
    except Exception as error:
        return Finding(family, model_name, "differs", layers, reason=_told(error))
    largest = max(differences)
    if largest == float("inf"):
        return Finding(family, model_name, "differs", layers, None, _rounded(evicted), held, "other tokens are chosen")
    verdict = "identical" if largest <= TOLERANCE else "differs"
    return Finding(family, model_name, verdict, layers, _rounded(largest), _rounded(evicted), held)


def evicting(model: PreTrainedModel, stock: Heard) -> tuple[float, int]:
    """Run with a budget in tokens and one in bytes; return the logits' difference from stock and the most tokens held.

    Raises ValueError if logits are not finite or the budget in bytes is exceeded.
    """
    cache = CompressedCache(model.config, f"sinks(4,block={BLOCK})@{BUDGET}")
    heard = by_forwards(model, cache)
    if not bool(torch.isfinite(heard.logits).all()):
        raise ValueError("logits are not finite once tokens are evicted")
    kibibytes = 3 * cache.nbytes // 1024
    in_bytes = CompressedCache(model.config, f"h2o(recent=4,block={BLOCK})@{kibibytes}KiB")
    again = by_generate(model, in_bytes)
    if not bool(torch.isfinite(again.logits).all()) or in_bytes.nbytes > kibibytes * 1024:
        raise ValueError(f"{in_bytes.nbytes} bytes are held of {kibibytes} KiB")
    held = max(int(layer.state.held.max()) for layer in cache.compressed if layer.state is not None)
    return apart(heard, stock), held


def described(config: PreTrainedConfig) -> str:
    """Return the number of layers of each type as text, the compressed ones first."""
    roles, words = layer_roles(config), {"dummy": "without keys"}
    kinds = layer_types(config)
    own = [i >= len(roles) or roles[i][0] == "own" for i in range(len(kinds))]
    counts = Counter(zip(own, kinds, strict=True))
    return ", ".join(
        f"{count} {words.get(kind, kind.removesuffix('_attention'))}" for (_, kind), count in sorted(counts.items())
    )


def _rounded(figure: float) -> float:
    return float(f"{figure:.2g}")


def _told(error: Exception) -> str:
    """Return an error's message in one line, or its type's name if it has none."""
    return " ".join(str(error).split())[:240] or type(error).__name__


def _document(rows: list[dict[str, Any]]) -> str:
    return json.dumps({"schema": 1, "transformers": transformers.__version__, "rows": rows}, indent=1) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the survey from the command line; return 1 if a family differs."""
    parser = argparse.ArgumentParser(prog="python -m survey", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", nargs="*", help="transformers' names, such as llama or gemma3_text; all by default")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, the lines on stderr")
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="into FOLDER/<release>.json; keeps other families there"
    )
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.family) - set(families()))
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no causal language model named {', '.join(unknown)}")
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = []
    for finding in survey(given.family):
        found.append(asdict(finding))
        numbers = " ".join(f"{x:.0e}" if x is not None else "    -" for x in (finding.difference, finding.evicted))
        line = f"{finding.family:<24} {finding.verdict:<13} {numbers}  {finding.layers or finding.reason}"
        print(line, file=sys.stderr if given.json else sys.stdout, flush=True)
    if given.json:
        print(_document(found), end="")
    if given.write:
        path = given.write / f"{transformers.__version__}.json"
        kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if given.family and path.exists() else []
        kept = [row for row in kept if row["family"] not in given.family]
        replace_file(path, _document(sorted(kept + found, key=lambda row: row["family"])))
    return 1 if any(row["verdict"] == "differs" for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
