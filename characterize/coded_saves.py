"""Measure coded saves of SmolLM2's caches: bytes of the file, divergence of the predictions, and seconds.

    python -m characterize.coded_saves [--out DIR]

A cache of the method `exact` takes in the first 2,048 tokens of a text and is saved with `coded=` at several aims. The
loaded cache predicts the next 512 tokens. Each row has, over two texts, the bytes of the file, how many times smaller
that is than a 16-bit cache of the same tokens, the mean KL divergence from exact predictions in nats per token with its
95 % interval over blocks of 64 tokens, and the mean seconds of a save and of a load on one core. The axes are those of
the cache's own tokens ("own", in the file), the principal axes of another text without a metric ("principal", in a file
of their own), or those that `coding_basis` calibrates on that text ("calibrated", likewise). Takes six minutes; with
--out, bases and rows that are in the folder are not made again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from characterize.lib.table import Row, save
from kvfloor.audit.nats import BLOCK_TOKENS, TokenFigures, figures
from kvfloor.audit.texts import Excerpt, excerpts, text_of
from kvfloor.hf import CodingBasis, CompressedCache, coding_basis, prepare
from kvfloor.hf.bases import FIRST, CalibrationText, LayerAxes
from kvfloor.hf.coded import relative
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.methods.transform.fineness import features
from kvfloor.models import load
from kvfloor.statistics import blocks, mean_interval

MODEL, TEXTS, CALIBRATION = "smollm2", ("speech", "facts"), "novel"
CONTEXT, CONTINUATION = 2048, 512
AIMS = {"calibrated": (0.002, 0.005, 0.01, 0.02), "own": (0.01,), "principal": (0.01,)}
FIELDS = (
    "axes",
    "aim",
    "file_bytes",
    "times_smaller",
    "kl",
    "low",
    "high",
    "same_top",
    "tokens",
    "save_seconds",
    "load_seconds",
)


def principal(model: Any, tokens: list[int]) -> CodingBasis:
    """Return the principal axes of a text's keys and values, without a metric, and with equal steps for all tokens."""
    ids = torch.tensor([tokens])
    text = CalibrationText(model, ids[:, :-1], ids[:, -1:])
    vectors = {i: {name: text.wide(x, i, name)[FIRST:] for name, x in text.given(i).items()} for i in text.served}
    axes = relative(vectors)
    count = features(torch.zeros(1, len(axes[0]["k"].mean)), torch.ones(1), axes[0]["k"]).shape[1]
    none = {name: torch.zeros(count, dtype=torch.float64) for name in ("k", "v")}
    return CodingBasis(fingerprint(model), {i: LayerAxes(kinds, none) for i, kinds in axes.items()})


@torch.inference_mode()
def continued(model: Any, cache: Any, excerpt: Excerpt) -> Tensor:
    """Return the logits (scored, vocabulary) of the continuation's tokens after its first, which the cache is fed."""
    return model(torch.tensor([excerpt.continuation]), past_key_values=cache).logits[0, :-1]


class Started:
    """Hold an exact cache that has taken in a text's context, and the exact predictions after it."""

    def __init__(self, model: Any, excerpt: Excerpt, folder: Path) -> None:
        self.model, self.excerpt, self.path = model, excerpt, folder / excerpt.cell.text
        self.cache = CompressedCache(model.config, "exact")
        with torch.inference_mode():
            model(torch.tensor([excerpt.context]), past_key_values=self.cache, logits_to_keep=1)
        self.cache.save(self.path)
        self.exact = continued(model, CompressedCache.load(self.path, model), excerpt)

    def coded(self, aim: float, basis: CodingBasis | None) -> tuple[int, float, float, TokenFigures]:
        """Return the file's bytes, the seconds of a save and of a load, and the figures of the predictions."""
        start = time.perf_counter()
        self.cache.save(self.path, coded=aim, basis=basis)
        saved = time.perf_counter()
        loaded = CompressedCache.load(self.path, self.model, basis=basis)
        done = time.perf_counter()
        found = continued(self.model, loaded, self.excerpt)
        told = figures([self.exact], [found], [torch.tensor(self.excerpt.continuation[1:])])
        return self.path.stat().st_size, saved - start, done - saved, told


def row(found: list[Started], name: str, aim: float, basis: CodingBasis | None) -> Row:
    """Return the row of one kind of axes and one aim."""
    sizes, saves, loads, got = zip(*(one.coded(aim, basis) for one in found), strict=True)
    size, count = sum(sizes) / len(sizes), len(found)
    times = _raw(found[0].model) / size
    return (name, aim, int(size), times, *_divergence(got), sum(saves) / count, sum(loads) / count)


def _raw(model: Any) -> int:
    """Return the bytes of a 16-bit exact cache of the context."""
    config = model.config
    return 2 * 2 * CONTEXT * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def _divergence(got: Sequence[TokenFigures]) -> tuple[float, ...]:
    kl, low, high = mean_interval([block for one in got for block in blocks(one.kl, BLOCK_TOKENS)])
    same = [x for one in got for x in one.same_top]
    return kl, max(0.0, low), high, sum(same) / len(same), len(same)


def basis_in(folder: Path, name: str, make: Callable[[], CodingBasis]) -> CodingBasis:
    """Return the basis that the folder keeps under this name, made now if it is not there."""
    path = folder / f"{name}.basis"
    if not path.exists():
        make().save(path)
    return CodingBasis.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder that keeps the bases and the measured rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(MODEL)
    prepare(model)

    def encode(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        book = encode(text_of(CALIBRATION, 0))
        tokens, held_out = (book[at : at + CONTEXT + CONTINUATION] for at in (0, CONTEXT + CONTINUATION))
        kinds = {
            "calibrated": basis_in(folder, "calibrated", lambda: coding_basis(model, tokens, held_out)),
            "own": None,
            "principal": basis_in(folder, "principal", lambda: principal(model, tokens)),
        }
        kept = folder / "rows.tsv"
        lines = kept.read_text("utf-8").splitlines() if kept.exists() else []
        rows: list[Row] = [line.split("\t") for line in lines]
        found = [Started(model, one, Path(scratch)) for one in excerpts(TEXTS, (CONTEXT,), CONTINUATION + 1, encode)]
        for name, basis in kinds.items():
            for aim in AIMS[name]:
                if not any((one[0], float(str(one[1]))) == (name, aim) for one in rows):
                    rows.append(row(found, name, aim, basis))
                    print(*rows[-1], sep="\t", flush=True)
                    kept.write_text("".join("\t".join(map(str, one)) + "\n" for one in rows), "utf-8")
    rows.sort(key=lambda one: (list(AIMS).index(str(one[0])), float(str(one[1]))))
    save(__file__, FIELDS, map(_numbers, rows))


def _numbers(one: Row) -> Row:
    return [float(str(x)) if "." in str(x) else x for x in one]


if __name__ == "__main__":
    main()
