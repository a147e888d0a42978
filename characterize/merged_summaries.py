"""Measure what summaries of dropped tokens do for SmolLM2's predictions, in nats at equal bytes: clusters and samples.

    python -m characterize.merged_summaries [--contexts TOKENS] [--out DIR]

The protocol is that of `characterize/frontier.py`: a context of a text is taken in under the method and sealed, then
512 tokens are predicted; two texts. All settings hold 256 tokens per kv head, or as many bytes. The first 4 tokens and
the newest ones are exact. What else is held differs:
  clusters  64 clusters of dropped tokens: mean key, mean value and number
  nystrom   the same, with values and masses that are solved for
  sample    64 dropped tokens, drawn uniformly, each with the weight of all dropped ones per drawn one
  uniform   64 dropped tokens, drawn uniformly, that count as one token each
  recent    64 more of the newest tokens
  sketch    no exact sinks and few exact tokens, but SubGen's own estimate (`subgen_sketch`); likewise `balance`
Each row gives the share of the 16-bit keys' and values' bytes that the setting holds at the context's end in a 16-bit
model, and the mean KL divergence from exact predictions in nats per token with its 95 % interval over blocks of 64
tokens. `more` is this less the KL of the clusters, block by block, with its interval. With --out, rows that are in the
folder are not measured again. Forty minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from characterize.frontier import CONTINUATION, SOURCES, TEXTS
from characterize.lib.table import ResultTable, Row
from characterize.newer_evictors import MODULE, TrialFile
from kvfloor.audit.nats import BLOCK_TOKENS
from kvfloor.audit.reading import Reader
from kvfloor.audit.texts import excerpts
from kvfloor.hf import prepare
from kvfloor.methods.grammar import parse
from kvfloor.models import load
from kvfloor.splitting import split_list
from kvfloor.statistics import blocks, mean_interval

SOURCE = SOURCES["smollm2-2048"]
CONTEXTS = ("1024", "2048", "4096")
CLUSTERS = "sinks+clusters(m=64)@192"
SETTINGS = {
    "clusters": CLUSTERS,
    "nystrom": "sinks+nystrom(m=64)@192",
    "sample": f"sinks+{MODULE}UniformTokens(m=64)@192",
    "uniform": "random(sinks=4,recent=188)@256",
    "recent": "sinks@256",
    "sketch": "subgen_sketch@256",
    "balance": "balance@256",
}
FIELDS = (
    *("context", "held", "setting", "share", "kl", "low", "high", "same_top", "tokens"),
    *("more", "more_low", "more_high"),
)


def measure(journal: TrialFile, contexts: Sequence[str]) -> None:
    """Measure the settings that are not in the journal, whose lines name a text and a context as "text 1024"."""
    if all((text, f"{name} {n}") in journal.found for text in SETTINGS.values() for name in TEXTS for n in contexts):
        return
    model, tokenizer = load(SOURCE.model)
    prepare(model)
    reader = Reader(model, 0)
    lengths = [int(n) for n in contexts]
    for excerpt in excerpts(TEXTS, lengths, CONTINUATION, lambda text: tokenizer(text).input_ids):
        n, where = excerpt.cell.context, f"{excerpt.cell.text} {excerpt.cell.context}"
        todo = [text for text in SETTINGS.values() if (text, where) not in journal.found]
        reference = reader.reference(excerpt) if todo else []
        for text in todo:
            got = reader.read(parse(text), excerpt, reference)
            line = {"setting": text, "text": where, "share": got.state_16_bit_bytes / (SOURCE.whole / 2048 * n)}
            journal.add(line | {"kl": got.figures.kl, "same_top": got.figures.same_top})
            print(where, text, f"{sum(got.figures.kl) / CONTINUATION:.4f}", flush=True)


def rows(journal: TrialFile, context: str) -> list[Row]:
    """Return one row per setting for a context of so many tokens; columns as in FIELDS."""
    lines = {text: [journal.found[text, f"{name} {context}"] for name in TEXTS] for text in SETTINGS.values()}
    parts = {text: [b for line in found for b in blocks(line["kl"], BLOCK_TOKENS)] for text, found in lines.items()}
    made: list[Row] = []
    for held, text in SETTINGS.items():
        share = sum(line["share"] for line in lines[text]) / len(TEXTS)
        same = [x for line in lines[text] for x in line["same_top"]]
        kl, low, high = mean_interval(parts[text])
        more: Row = ("", "", "")
        if text != CLUSTERS:
            pairs = zip(parts[text], parts[CLUSTERS], strict=True)
            more = mean_interval([(mine - clusters, n) for (mine, n), (clusters, _) in pairs])
        setting = text.replace(MODULE, "")
        made.append((context, held, setting, share, kl, max(0.0, low), high, sum(same) / len(same), len(same), *more))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", default=",".join(CONTEXTS), help=f"of {', '.join(CONTEXTS)}; with commas")
    parser.add_argument("--out", type=Path, help="folder that keeps the measured rows")
    given = parser.parse_args()
    contexts = split_list(given.contexts)
    results = ResultTable(__file__, FIELDS, contexts, CONTEXTS)
    with tempfile.TemporaryDirectory() as scratch:
        journal = TrialFile(given.out or Path(scratch), __file__)
        measure(journal, contexts)
        for context in contexts:
            for row in rows(journal, context):
                results.add(*row)
        results.save()


if __name__ == "__main__":
    main()
