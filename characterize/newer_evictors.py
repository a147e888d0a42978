"""Measure newer evictors and merging beside SnapKV on SmolLM2, in nats at equal bytes: those kept and those dropped.

    python -m characterize.newer_evictors [--out DIR]

The protocol is that of `characterize/frontier.py`: 2,048 tokens of a text are taken in under the method and sealed,
then 512 tokens are predicted; two texts. Each row gives the share of the 16-bit keys' and values' bytes that the
setting holds at the context's end in a 16-bit model, and the mean KL divergence from exact predictions in nats per
token with its 95 % interval over blocks of 64 tokens. Then follows how much more it is than that of the setting
`against`, block by block, with the interval of this mean. A row is on the frontier if no other setting of this table
and none of `frontier.tsv` diverges less in no more bytes, give or take 1 %.

Tried parts that are not in kvfloor are in `characterize/lib/candidates.py`. `Reread` is given scores that a second pass
of the model has made. They are the largest (max) or summed (sum) attention that a token receives from later tokens. For
`zip` the model reads the context again after "Repeat the previous context exactly."; for `future` it reads the 512
tokens to be predicted. The latter cheats: it shows how much a better choice of tokens could gain at most.
About half an hour on one core; with --out, rows that are in the folder are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from characterize.frontier import CONTINUATION, SOURCES, TEXTS, FrontierPoint, axis, read
from characterize.lib.candidates import has_scores, save_scores
from characterize.lib.table import Row, save
from kvfloor.audit.nats import BLOCK_TOKENS
from kvfloor.audit.reading import Reader
from kvfloor.audit.texts import Excerpt, excerpts
from kvfloor.hf import prepare
from kvfloor.hf.layers import watched_cache
from kvfloor.hf.recording import Recorded, Recorder
from kvfloor.methods.grammar import parse
from kvfloor.models import load
from kvfloor.statistics import blocks, mean_interval

SOURCE, SLOTS = "smollm2-2048", 256
MODEL, CONTEXT = SOURCES[SOURCE].model, SOURCES[SOURCE].context
MODULE = "characterize.lib.candidates:"
REQUEST = "\n\nRepeat the previous context exactly.\n"
FIELDS = (
    *("tried", "setting", "share", "kl", "low", "high", "same_top", "tokens"),
    *("against", "more", "more_low", "more_high", "frontier"),
)


@dataclass(frozen=True)
class Trial:
    """Name what is tried, its setting, and the setting that it is compared with (None: none).

    In a setting, `?` stands for the module of candidates and TEXT for the name of the text.
    cheats: True if the setting knows the tokens to be predicted, so that it has no place on the frontier
    """

    tried: str
    setting: str
    against: str | None = None
    cheats: bool = False

    def method(self, text: str) -> str:
        """Return the setting as text for `parse`, on the text of this name."""
        return self.setting.replace("?", MODULE).replace("TEXT", text)


QUARTER, EIGHTH = "snapkv@25%", "snapkv@12.5%"
WIDE, WIDE_EIGHTH = "snapkv(window=256)@25%", "snapkv(window=128)@12.5%"
KEPT, CODED = "h2o(decode=keep,prefill=dense)@25%", "snapkv(window=256):k5v4@25%"
TRIALS = (
    Trial("SnapKV", QUARTER),
    Trial("SnapKV", EIGHTH),
    Trial("SnapKV, half of the budget is the window", WIDE, QUARTER),
    Trial("SnapKV, half of the budget is the window", WIDE_EIGHTH, EIGHTH),
    Trial("ChunkKV", "?ChunkVotes@25%", QUARTER),
    Trial("ChunkKV", "?ChunkVotes(window=256)@25%", WIDE),
    Trial("ChunkKV", "?ChunkVotes@12.5%", EIGHTH),
    Trial("ChunkKV", "?ChunkVotes(window=128)@12.5%", WIDE_EIGHTH),
    Trial("LagKV", "?LagRelative(recent=32)@25%", QUARTER),
    Trial("LagKV", "?LagRelative(recent=32,lag=32)@12.5%", EIGHTH),
    Trial("KVzip's scores", "?Reread(recent=32,scores=zip_max_TEXT)@25%", QUARTER),
    Trial("KVzip's scores", "?Reread(recent=256,scores=zip_max_TEXT)@25%", WIDE),
    Trial("KVzip's scores, summed", "?Reread(recent=256,scores=zip_sum_TEXT)@25%", WIDE),
    Trial("KVzip's scores", "?Reread(recent=32,scores=zip_max_TEXT)@12.5%", EIGHTH),
    Trial("attention to come (cheats)", "?Reread(recent=32,scores=future_sum_TEXT)@25%", QUARTER, cheats=True),
    Trial("attention to come (cheats)", "?Reread(recent=256,scores=future_sum_TEXT)@25%", WIDE, cheats=True),
    Trial("attention to come (cheats)", "?Reread(recent=32,scores=future_sum_TEXT)@12.5%", EIGHTH, cheats=True),
    Trial("expected, once", "?ExpectedOnce(recent=32)@25%", QUARTER),
    Trial("expected, once", "?ExpectedOnce(recent=256)@25%", WIDE),
    Trial("expected without |v|", "?ExpectedOnce(recent=256,values=False)@25%", WIDE),
    Trial("expected without covariance", "?ExpectedOnce(recent=256,spread=False)@25%", WIDE),
    Trial("expected, head by head", "?ExpectedOnce(recent=256,heads=each)@25%", WIDE),
    Trial("expected, once", "?ExpectedOnce(recent=128)@12.5%", WIDE_EIGHTH),
    Trial("CaM", "?MergedValues@25%", QUARTER),
    Trial("one mean of all evicted", "snapkv+moments(covariance=none)@508", QUARTER),
    Trial("h2o(decode=keep)", KEPT, WIDE),
    Trial("h2o(decode=keep), coded", "h2o(decode=keep,prefill=dense):k5v4@50%"),
    Trial("h2o(decode=keep), streamed", "h2o(decode=keep)@25%", KEPT),
    Trial("clusters", "snapkv(window=256)+clusters(m=8)@504", WIDE),
    Trial("clusters", "snapkv(window=256)+clusters(m=32)@480", WIDE),
    Trial("clusters", "snapkv(window=128)+clusters(m=32)@224", WIDE_EIGHTH),
    Trial("clusters", "h2o(decode=keep,prefill=dense)+clusters(m=32)@480", KEPT),
    Trial("SnapKV, coded", CODED),
    Trial("clusters, coded", "snapkv(window=256)+clusters(m=8):k5v4@486", CODED),
)


@dataclass(frozen=True)
class TriedFigures:
    """Hold what was measured of a setting on the texts: its share of bytes, and the figures of each scored token."""

    share: float
    kl: tuple[tuple[float, ...], ...]
    same_top: tuple[tuple[int, ...], ...]

    def blocks(self) -> list[tuple[float, int]]:
        """Return (sum of KL, number of tokens) of each block of scored tokens, text after text."""
        return [block for one in self.kl for block in blocks(one, BLOCK_TOKENS)]


class TrialFile:
    """Keep the lines of measured settings in a script's file in a folder, so that none is measured twice."""

    def __init__(self, folder: Path, script: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{Path(script).stem}.jsonl"
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        self.found: dict[tuple[str, str], Any] = {(x["setting"], x["text"]): x for x in map(json.loads, lines)}

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, which has the keys "setting" and "text"."""
        self.found[line["setting"], line["text"]] = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def measure(journal: TrialFile, trials: Sequence[Trial]) -> None:
    """Measure the trials that are not in the journal, text by text."""
    missing = [(one, text) for text in TEXTS for one in trials if (one.setting, text) not in journal.found]
    if not missing:
        return
    model, tokenizer = load(MODEL)
    prepare(model)
    reader = Reader(model, 0, [parse("h2o(prefill=dense)@512")])  # a method that needs all queries of a recorded prompt
    for excerpt in excerpts(TEXTS, [CONTEXT], CONTINUATION, lambda text: tokenizer(text).input_ids):
        text = excerpt.cell.text
        todo = [one for one, of in missing if of == text]
        if not todo:
            continue
        if any("Reread" in one.setting for one in todo):
            make_scores(model, excerpt, tokenizer(REQUEST, add_special_tokens=False).input_ids)
        reference, prompt = reader.reference(excerpt), reader.prompt(excerpt)
        whole = SOURCES[SOURCE].whole
        for one in todo:
            got = reader.read(parse(one.method(text)), excerpt, reference, prompt)
            line = {"setting": one.setting, "text": text, "share": got.state_16_bit_bytes / whole}
            journal.add(line | {"kl": got.figures.kl, "same_top": got.figures.same_top})
            print(text, one.setting, f"{sum(got.figures.kl) / CONTINUATION:.4f}", flush=True)


def make_scores(model: Any, excerpt: Excerpt, request: list[int]) -> None:
    """Make the files of scores for `Reread` on this text, unless they are there."""
    text = excerpt.cell.text
    if has_scores(f"future_sum_{text}"):
        return
    for kind, tail in (("zip", request + excerpt.context), ("future", excerpt.continuation)):
        cache, layers = watched_cache(model.config)
        seen = Recorder(layers)
        ids = torch.tensor([excerpt.context + tail])
        with torch.inference_mode():
            for piece in ids.split(2 * SLOTS, 1):
                model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            found = {str(layer.index): received(seen.of(layer.index), CONTEXT) for layer in layers}
        for number, how in enumerate(("max", "sum")):
            save_scores(f"{kind}_{how}_{text}", {layer: both[number] for layer, both in found.items()})


def received(one: Recorded, context: int) -> tuple[Tensor, Tensor]:
    """Return the largest and the summed attention (kv heads, context) that tokens of the context receive later."""
    q, k, _ = one.by_row
    most = total = torch.zeros(k.shape[0], context)
    for start in range(context, k.shape[1], SLOTS):
        stop = min(start + SLOTS, k.shape[1])
        later = torch.arange(stop) > torch.arange(start, stop).unsqueeze(1)
        logits = one.scale * torch.einsum("rgnd,rsd->rgns", q[:, :, start:stop], k[:, :stop])
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)[..., :context]
        most, total = torch.maximum(most, weights.amax((1, 2))), total + weights.sum((1, 2))
    return most, total


def outcomes(journal: TrialFile, trials: Iterable[Trial]) -> dict[str, TriedFigures]:
    """Return what the journal has of each setting, over all texts."""
    found = {}
    for one in trials:
        lines = [journal.found[one.setting, text] for text in TEXTS]
        share = sum(line["share"] for line in lines) / len(lines)
        kl, same = (tuple(tuple(line[name]) for line in lines) for name in ("kl", "same_top"))
        found[one.setting] = TriedFigures(share, kl, same)
    return found


def table(found: dict[str, TriedFigures], trials: Sequence[Trial]) -> list[Row]:
    """Return one row per trial in their order; columns as in FIELDS."""
    points = {
        name: FrontierPoint(axis(name), name, one.share, *mean_interval(one.blocks())) for name, one in found.items()
    }
    honest = [points[one.setting] for one in trials if not one.cheats]
    others = [*honest, *(point for point in read(SOURCE)[0] if point.setting not in points)]
    rows: list[Row] = []
    for one in trials:
        mine, point = found[one.setting], points[one.setting]
        same = [x for text in mine.same_top for x in text]
        more: Row = ("", "", "", "")
        if one.against is not None:
            pairs = zip(mine.blocks(), found[one.against].blocks(), strict=True)
            more = (one.against, *mean_interval([(a - b, n) for (a, n), (b, _) in pairs]))
        rows.append(
            (one.tried, one.setting.replace("?", ""), point.share, point.kl, max(0.0, point.low), point.high)
            + (sum(same) / len(same), len(same), *more, "" if one.cheats or point.beaten(others) else "yes")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder that keeps the measured rows")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        journal = TrialFile(given.out or Path(scratch), __file__)
        measure(journal, TRIALS)
        save(__file__, FIELDS, table(outcomes(journal, TRIALS), TRIALS))


if __name__ == "__main__":
    main()
