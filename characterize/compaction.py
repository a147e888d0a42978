"""Compare compacting a finished context with evicting from it, in nats per predicted token.

    python -m characterize.compaction [PART ...]

A text's first tokens (the context) are taken in: under `compact`, which then shrinks all of them to a share, or under
an eviction policy that keeps every token until the context ends and then as many tokens per kv head. "Queries as they
came" are not turned to the positions to come, as in a cache that was given the configuration alone. "Bytes of" an
evictor: compacted to as many tokens as fit into the bytes that it holds at the context's end. The following
tokens are predicted from the true ones before them, and compared with an exact cache's predictions. Each row gives the
bytes held at the context's end, and the mean KL divergence in nats per token with its 95 % interval over blocks of 64
tokens of all texts. Rows of `compact` also give, of the worst text, the processor time of the compaction for 4,096
tokens, and two shares of the exact cache's bytes: what the state holds more than the exact one before the compaction,
and the most that the process grew during it.
A part is a model with a length of its contexts; all parts run unless some are named, and the rows of the others stay.
The part builtin-512 takes ten seconds on one core, smollm2-2048 five minutes.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from characterize.lib.table import Row, save
from kvfloor.audit.measure import CHUNK_SLOTS
from kvfloor.audit.nats import BLOCK_TOKENS, TokenFigures, figures
from kvfloor.audit.texts import text_of
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.intake import Room, SharedPrompt
from kvfloor.methods.grammar import parse
from kvfloor.models import load
from kvfloor.statistics import blocks, mean_interval

UNTURNED = "compact, queries as they came"
COMPACTORS = ("compact", "compact(queries=256)", UNTURNED)
DENSE = ("h2o(prefill=dense)", "tova(prefill=dense)", "expected(prefill=dense)")
FIELDS = (
    "model",
    "context",
    "method",
    "share",
    "kept",
    "state_bytes",
    "exact_bytes",
    "kl",
    "low",
    "high",
    "same_top",
    "tokens",
)
FIELDS += ("cpu_seconds_per_4k", "sample_share", "peak_share")
FEW_TOKENS = 128  # predicted at a time


class CompactionPart(NamedTuple):
    """Hold a model, the numbers of tokens of a context and of its continuation, the texts, shares and evictors."""

    model: str
    context: int
    continuation: int
    texts: tuple[str, ...]
    shares: tuple[float, ...]
    evictors: tuple[str, ...]


MIXTURES, TEXTS = ("mixture-0", "mixture-1", "mixture-2"), ("speech", "facts")
PARTS = {
    f"{part.model}-{part.context}": part
    for part in (
        CompactionPart("builtin", 512, 256, MIXTURES, (0.125, 0.05), ("snapkv(window=8)", *DENSE)),
        CompactionPart("smollm2", 2048, 512, TEXTS, (0.05, 0.02), ("snapkv", *DENSE)),
        CompactionPart("smollm2", 4096, 512, TEXTS, (0.05,), ("snapkv",)),
    )
}


class CompactionReading(NamedTuple):
    """Hold one setting's reading of a text: tokens kept per kv head, bytes at the context's end, figures, costs."""

    kept: int
    nbytes: int
    exact_bytes: int
    told: TokenFigures
    cost: tuple[float, ...]


class CompactionBench:
    """Measure all settings on one text, whose exact cache is filled once.

    context, continuation  token ids
    """

    def __init__(self, model, tokenizer, text: str, part: CompactionPart) -> None:
        length = part.context + part.continuation
        ids = tokenizer(text_of(text, length), verbose=False).input_ids[:length]
        self.model, self.part, self.context, self.continuation = model, part, ids[: part.context], ids[part.context :]
        methods = [parse(f"{evictor}@{self.tokens(share)}") for evictor in part.evictors for share in part.shares]
        self._prompt = SharedPrompt(model, [self.context], CHUNK_SLOTS, methods, Room())
        cache, exact = self._filled("exact")
        self.exact_bytes = cache.nbytes
        self._exact = list(self._predicted(exact))

    def tokens(self, share: float) -> int:
        """Return the number of tokens per kv head that this share of the context is."""
        return math.ceil(share * len(self.context))

    def _filled(self, text: str) -> tuple[CompressedCache, Dialogue]:
        cache = CompressedCache(self.model, text, seed=0)
        dialogue = Dialogue.start(self.model, cache, 1)
        self._prompt.feed(dialogue)
        cache.seal()
        return cache, dialogue

    def _predicted(self, dialogue: Dialogue) -> Iterator[tuple[Tensor, Tensor]]:
        return dialogue.predict([self.continuation], FEW_TOKENS)

    def _figures(self, dialogue: Dialogue) -> TokenFigures:
        exact, tokens = [logits[0] for _, logits in self._exact], [ids[0] for ids, _ in self._exact]
        return figures(exact, (logits[0] for _, logits in self._predicted(dialogue)), tokens)

    def evicted(self, evictor: str, share: float) -> tuple[int, TokenFigures]:
        """Return the bytes at the context's end, and the figures of the predictions, under an eviction policy."""
        cache, dialogue = self._filled(f"{evictor}@{self.tokens(share)}")
        return cache.nbytes, self._figures(dialogue)

    def taken_in(self, method: str) -> tuple[CompressedCache, Dialogue]:
        """Return a cache under a form of `compact` that has taken in the context, and its dialogue."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a configuration, which does not tell how queries can be turned
            source = self.model.config if method == UNTURNED else self.model
            filled = CompressedCache(source, method.partition(",")[0])
        dialogue = Dialogue.start(self.model, filled, 1)
        dialogue.feed([self.context], CHUNK_SLOTS)
        return filled, dialogue

    def compacted(
        self, filled: CompressedCache, dialogue: Dialogue, kept: int
    ) -> tuple[int, TokenFigures, tuple[float, float, float]]:
        """Compact a copy of a cache to so many tokens per kv head, and predict.

        Return (bytes, figures, (processor seconds for 4,096 tokens, sample share, peak share)).
        """
        cache, sample = copy.deepcopy(filled), filled.nbytes / self.exact_bytes - 1
        before, begin = peak_resident_bytes(anew=True), time.process_time()
        cache.compact(to=kept / len(self.context))
        seconds = time.process_time() - begin
        grown = (peak_resident_bytes() - before) / self.exact_bytes
        held, fresh = cache.nbytes, Dialogue(self.model, cache, dialogue.mask.clone(), dialogue.logits)
        return held, self._figures(fresh), (seconds * 4096 / len(self.context), sample, grown)


def peak_resident_bytes(anew: bool = False) -> int:
    """Return the most memory that this process has had resident; with `anew`, begin from what it has now (Linux)."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measured(part: CompactionPart) -> list[Row]:
    """Return the rows of one part, the smallest divergence of each share first; columns as in FIELDS."""
    torch.set_num_threads(1)
    model, tokenizer = load(part.model)
    model = prepare(model)
    found: dict[tuple[str, float], list[CompactionReading]] = {}

    def note(text: str, method: str, share: float, reading: CompactionReading) -> None:
        found.setdefault((method, share), []).append(reading)
        print(text, method, share, sum(reading.told.kl) / len(reading.told.kl), *reading[:2], reading.cost, flush=True)

    for text in part.texts:
        bench = CompactionBench(model, tokenizer, text, part)
        for evictor in part.evictors:
            for share in part.shares:
                held, told = bench.evicted(evictor, share)
                note(text, evictor, share, CompactionReading(bench.tokens(share), held, bench.exact_bytes, told, ()))
        for method in COMPACTORS:
            filled, dialogue = bench.taken_in(method)
            for share in part.shares:
                kept, best = bench.tokens(share), part.evictors[0]
                reading = CompactionReading(kept, *_with_exact(bench, filled, dialogue, kept))
                note(text, method, share, reading)
                if method == "compact":
                    most = found[best, share][-1].nbytes * kept // reading.nbytes
                    reading = CompactionReading(most, *_with_exact(bench, filled, dialogue, most))
                    note(text, f"compact, bytes of {best}", share, reading)
    rows: list[Row] = []
    for (method, share), texts in found.items():
        kept, held = (sum(column) // len(texts) for column in zip(*(one[:2] for one in texts), strict=True))
        interval = mean_interval([block for one in texts for block in blocks(one.told.kl, BLOCK_TOKENS)], 0.95)
        same = [x for one in texts for x in one.told.same_top]
        costs = [f"{max(column):.3g}" for column in zip(*(one.cost for one in texts), strict=True)] or ["", "", ""]
        exact, agreed = texts[0].exact_bytes, sum(same) / len(same)
        row = (part.model, part.context, method, share, kept, held, exact, *interval, agreed, len(same))
        rows.append((*row, *costs))
    return sorted(rows, key=lambda row: (-float(str(row[3])), float(str(row[7]))))


def _with_exact(
    bench: CompactionBench, filled: CompressedCache, dialogue: Dialogue, kept: int
) -> tuple[int, int, TokenFigures, tuple[float, ...]]:
    held, told, cost = bench.compacted(filled, dialogue, kept)
    return held, bench.exact_bytes, told, cost


def with_other_parts(rows: list[Row]) -> list[Row]:
    """Return the rows with those of parts that were not measured, as they stand in the table."""
    path, named = Path(__file__).with_suffix(".tsv"), {f"{row[0]}-{row[1]}" for row in rows}
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    kept: list[Row] = [line for line in (tuple(x.split("\t")) for x in lines) if f"{line[0]}-{line[1]}" not in named]
    return sorted([*kept, *rows], key=lambda row: list(PARTS).index(f"{row[0]}-{row[1]}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all unless given")
    given = parser.parse_args().parts
    if unknown := set(given) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    for name in given or PARTS:
        save(__file__, FIELDS, with_other_parts(measured(PARTS[name])))


if __name__ == "__main__":
    main()
