"""The survey of model families: a tiny random model of each, a compressed cache against the stock one.

    python -m kvfloor.hf.survey [--json] [--write FOLDER] [FAMILY ...]

`exact` has to give the stock cache's logits and greedy tokens on a left-padded batch that grows past every sliding
window, in chunks and at once, and on a second turn; then each family runs with eviction on, its bound held.
docs/models.md is rendered from the committed results of both ends of the supported range (`make models`).
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
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from kvfloor.files import replace_file
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.families import layer_roles, layer_types, refusal
from kvfloor.hf.prepare import prepare
from kvfloor.hf.tiny import VOCABULARY, WINDOW, families, tiny_model

TOLERANCE = 1e-4  # of the largest logit, in float32: products are summed in another order, nothing else may differ
PROMPT, PADS, TURN, ANSWER, CHUNK = 40, 13, 9, 6, 11  # tokens: the window is full before the first answer
assert PROMPT - PADS > WINDOW
BUDGET, BLOCK = 16, 8  # tokens per row, and how many may wait beside it


@dataclass(frozen=True)
class Finding:
    """What the survey saw of one family in one release.

    verdict     "identical", "differs", "refused" (by kvfloor, with the reason), "no stock run" (transformers' own
                cache fails on it), "not built" (no tiny model of it here)
    layers      how many layers of each type the tiny model has, the compressed ones first, e.g. "2 full, 2 sliding"
    difference  the largest of |logit - stock logit| / max |stock logit| over all runs with `exact`
    evicted     the same with `sinks` at 16 tokens: how much the comparison would see; None if it did not run
    held        tokens that a row of it holds in the end, of the 49 seen
    reason      for whatever is not identical
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
    """One finding per family, for all that this release knows unless `names` says which."""
    for family in names or families():
        yield look_at(family)


def look_at(family: str) -> Finding:
    """What this family's tiny model does with a compressed cache."""
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
    """The runs of one family: stock, exact, evicting."""
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
    verdict = "identical" if largest <= TOLERANCE else "differs"
    return Finding(family, model_name, verdict, layers, _rounded(largest), _rounded(evicted), held)


@dataclass(frozen=True)
class Heard:
    """What a run gave: logits (tokens, vocabulary) at every real position looked at, and the tokens chosen."""

    logits: Tensor
    tokens: Tensor


@torch.inference_mode()
def by_forwards(model: Any, cache: Cache | None) -> Heard:
    """A prompt and a second turn, a chunk of slots per forward; every logit of a real token."""
    ids, mask = prompt(PROMPT + TURN)
    logits = []
    for start in range(0, ids.shape[1], CHUNK):
        stop = min(start + CHUNK, ids.shape[1])
        out: Any = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        if isinstance(cache, CompressedCache):
            _check_bound(cache)
    whole = torch.cat(logits, 1)[mask.bool()]
    return Heard(whole, whole.argmax(-1))


@torch.inference_mode()
def by_generate(model: PreTrainedModel, cache: Cache | None, **prefill: Any) -> Heard:
    """A prompt, a greedy answer, a second turn, another answer; the logits of every answered token.

    `prefill` is for the first turn alone: generate() of transformers 5.2 starts at position 0 again if it is told to
    feed a second turn in chunks.
    """
    ids, mask = prompt(PROMPT)
    turn = torch.randint(2, VOCABULARY - 1, (2, TURN), generator=torch.Generator().manual_seed(5))
    logits: list[Tensor] = []
    for more, options in ((ids[:, :0], prefill), (turn, {})):
        ids = torch.cat([ids, more], 1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        out: Any = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=ANSWER,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        ids, cache = out.sequences, out.past_key_values
        logits += out.logits
    return Heard(torch.cat(logits), ids)


def in_chunks(model: PreTrainedModel, cache: Cache | None) -> Heard:
    """As `by_generate`, the prompt fed in chunks."""
    return by_generate(model, cache, prefill_chunk_size=CHUNK)


RUNS = (by_forwards, by_generate, in_chunks)


def prompt(slots: int) -> tuple[Tensor, Tensor]:
    """Two rows of tokens, the first left-padded by 13, and their mask."""
    ids = torch.randint(2, VOCABULARY - 1, (2, slots), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[0, :PADS], mask[0, :PADS] = 0, 0
    return ids, mask


def difference(mine: Heard, theirs: Heard) -> float:
    """Largest difference of two logits over the largest stock logit; infinite if other tokens were chosen."""
    if mine.tokens.shape != theirs.tokens.shape or not bool(torch.isfinite(mine.logits).all()):
        return float("inf")
    if not torch.equal(mine.tokens, theirs.tokens):
        return float("inf")
    return float((mine.logits - theirs.logits).abs().max() / theirs.logits.abs().max())


def evicting(model: PreTrainedModel, stock: Heard) -> tuple[float, int]:
    """Runs with eviction on, by tokens and by bytes: the logits' difference from stock, and the most tokens held."""
    cache = CompressedCache(model.config, f"sinks(4,block={BLOCK})@{BUDGET}")
    heard = by_forwards(model, cache)
    if not bool(torch.isfinite(heard.logits).all()):
        raise ValueError("logits are not finite once tokens are evicted")
    kibibytes = 2 * cache.nbytes // 1024
    in_bytes = CompressedCache(model.config, f"h2o(recent=4,block={BLOCK})@{kibibytes}KiB")
    again = by_generate(model, in_bytes)
    if not bool(torch.isfinite(again.logits).all()) or in_bytes.nbytes > kibibytes * 1024:
        raise ValueError(f"{in_bytes.nbytes} bytes are held of {kibibytes} KiB")
    held = max(int(layer.state.held.max()) for layer in cache.compressed if layer.state is not None)
    return float((heard.logits - stock.logits).abs().max() / stock.logits.abs().max()), held


def _check_bound(cache: CompressedCache) -> None:
    for layer in cache.compressed:
        if layer.state is None:
            continue  # a layer that was not asked, such as one that looks at images
        limit = layer.state.method.capacity(layer.seen)
        if limit is not None and int(layer.state.held.max()) > limit:
            raise ValueError(f"layer {layer.index} holds {layer.state.held.tolist()} tokens of {limit}")


def described(config: PreTrainedConfig) -> str:
    """How many layers of each type there are, the compressed ones first."""
    roles, words = layer_roles(config), {"dummy": "without keys"}
    own = [
        i >= len(roles) or roles[i][0] == "own" for i in range(config.get_text_config(decoder=True).num_hidden_layers)
    ]
    counts = Counter(zip(own, layer_types(config), strict=True))
    return ", ".join(
        f"{count} {words.get(kind, kind.removesuffix('_attention'))}" for (_, kind), count in sorted(counts.items())
    )


def _rounded(figure: float) -> float:
    return float(f"{figure:.2g}")


def _told(error: Exception) -> str:
    """An error in one line."""
    return f"{' '.join(str(error).split())[:240]}" or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a family differs."""
    parser = argparse.ArgumentParser(prog="python -m kvfloor.hf.survey", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", nargs="*", help="transformers' names, such as llama or gemma3_text; all by default")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, the lines on stderr")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="the JSON document as FOLDER/<release>.json")
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
    document = json.dumps({"schema": 1, "transformers": transformers.__version__, "rows": found}, indent=1) + "\n"
    if given.json:
        print(document, end="")
    if given.write:
        replace_file(given.write / f"{transformers.__version__}.json", document)
    return 1 if any(row["verdict"] == "differs" for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
