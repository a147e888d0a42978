"""Measure coded saves of SmolLM2's caches: bytes of the file, divergence of the predictions, and seconds.

    python -m characterize.coded_saves

A cache of the method `exact` takes in the first 2,048 tokens of a text and is saved with `coded=` at several aims. The
loaded cache predicts the next 512 tokens. Each row has, over two texts, the bytes of the file, how many times smaller
that is than a 16-bit cache of the same tokens, the mean KL divergence from exact predictions in nats per token with its
95 % interval over blocks of 64 tokens, and the mean seconds of a save and of a load on one core. The axes are those of
the cache's own tokens ("own", in the file), the principal axes of another text without a metric ("principal", in a file
of their own), or those that `coding_basis` calibrates on that text ("calibrated", likewise). About ten minutes.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from characterize.lib.table import Row, save
from kvfloor.audit.nats import BLOCK_TOKENS, TokenFigures, figures
from kvfloor.audit.texts import Excerpt, excerpts
from kvfloor.hf import CodingBasis, CompressedCache, coding_basis, prepare
from kvfloor.hf.bases import CalibrationText
from kvfloor.hf.coded import relative
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.models import load
from kvfloor.statistics import blocks, mean_interval

MODEL, TEXTS, CALIBRATION = "smollm2", ("speech", "facts"), "novel"
CONTEXT, CONTINUATION = 2048, 512
AIMS = (0.001, 0.003, 0.01, 0.03, 0.1)
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
    """Return the principal axes of a text's keys and values, without a metric; relative errors count as in own axes."""
    ids = torch.tensor([tokens])
    served = list(range(model.config.num_hidden_layers))
    text = CalibrationText(model, ids[:, :-1], ids[:, -1:], served)
    vectors = {i: {name: text.wide(x, i, name) for name, x in text.given(i).items()} for i in served}
    return CodingBasis(fingerprint(model), relative(vectors))


@torch.inference_mode()
def continued(model: Any, cache: Any, excerpt: Excerpt) -> Tensor:
    """Return the logits (scored, vocabulary) of the continuation's tokens after its first, which the cache is fed."""
    return model(torch.tensor([excerpt.continuation]), past_key_values=cache).logits[0, :-1]


def measured(model: Any, found: list[Excerpt], basis: CodingBasis | None, aim: float, name: str) -> Row:
    """Return the row of one kind of axes and one aim."""
    size, seconds, got = 0, [0.0, 0.0], []
    for excerpt in found:
        cache = CompressedCache(model.config, "exact")
        with torch.inference_mode():
            model(torch.tensor([excerpt.context]), past_key_values=cache, logits_to_keep=1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            start = time.perf_counter()
            cache.save(path, coded=aim, basis=basis)
            saved = time.perf_counter()
            loaded = CompressedCache.load(path, model, basis=basis)
            seconds = [seconds[0] + saved - start, seconds[1] + time.perf_counter() - saved]
            size += path.stat().st_size
        tokens = torch.tensor(excerpt.continuation[1:])
        got.append(figures([continued(model, cache, excerpt)], [continued(model, loaded, excerpt)], [tokens]))
    return (name, aim, size // len(found), _raw(model) / (size / len(found)), *_divergence(got)) + tuple(
        total / len(found) for total in seconds
    )


def _raw(model: Any) -> int:
    """Return the bytes of a 16-bit exact cache of the context."""
    config = model.config
    return 2 * 2 * CONTEXT * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def _divergence(got: list[TokenFigures]) -> tuple[float, ...]:
    kl, low, high = mean_interval([block for one in got for block in blocks(one.kl, BLOCK_TOKENS)])
    same = [x for one in got for x in one.same_top]
    return kl, max(0.0, low), high, sum(same) / len(same), len(same)


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load(MODEL)
    prepare(model)

    def encode(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    found = excerpts(TEXTS, (CONTEXT,), CONTINUATION + 1, encode)
    (other,) = excerpts((CALIBRATION,), (CONTEXT,), CONTINUATION, encode)
    tokens = other.context + other.continuation
    kinds = {"own": None, "principal": principal(model, tokens), "calibrated": coding_basis(model, tokens)}
    rows = []
    for name, basis in kinds.items():
        for aim in AIMS:
            rows.append(measured(model, found, basis, aim, name))
            print(*rows[-1], sep="\t", flush=True)
    save(__file__, FIELDS, rows)


if __name__ == "__main__":
    main()
