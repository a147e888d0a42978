"""Keep the rows of the report on SmolLM2 that the README shows: one per setting, over all texts that it read.

    make audit-smollm2
    python -m characterize.smollm2_report [out/smollm2]

The columns are those of the report's table of texts. Bytes are of the cache at the end of the context, in the audit's
float32 and as they would be in a model of 16 bits. KL is in nats per token with its 95 % interval, which allows for
every look of the race; the figures per token stay in the folder's `nats.jsonl`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from characterize.lib.table import save
from kvfloor.audit.nats import read_text_rows, summaries

FIELDS = ("setting", "texts", "tokens", "state_bytes", "exact_bytes", "state_16_bit_bytes", "exact_16_bit_bytes")
FIGURES = ("kl", "kl_low", "kl_high", "kl_median", "kl_999", "same_top", "loss_change")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/smollm2")
    rows = []
    for one in summaries(read_text_rows(folder / "nats.jsonl"), racing=True):
        sizes = (one.state_bytes, one.exact_bytes, one.state_16_bit_bytes, one.exact_16_bit_bytes)
        figures = (getattr(one.figures, name) for name in FIGURES)
        rows.append((one.setting, one.texts, one.figures.tokens, *(round(size) for size in sizes), *figures))
    save(__file__, (*FIELDS, *FIGURES), rows)


if __name__ == "__main__":
    main()
