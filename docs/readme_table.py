"""Print the README's table of methods from an audit of texts: `python docs/readme_table.py out/methods/nats.jsonl`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfloor.audit.format import number_of_nats
from kvfloor.audit.nats import TextRow, read_text_rows, summaries
from kvfloor.methods.catalogue import rows as catalogue


def table(rows: Sequence[TextRow]) -> str:
    """Return one line per setting, the smallest divergence first: paper, bytes, divergence from exact, guarantee."""
    known = {row["name"]: row for row in catalogue()}
    lines = [
        "| method | paper | bytes | at 16 bits | KL, nats | 95 % | same top token | guarantee |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for one in sorted(summaries(rows), key=lambda one: one.figures.kl):
        parts = [known[name] for name in re.split(r"[+|]", re.sub(r"\([^)]*\)|@.*", "", one.setting))]
        papers = "; ".join(_paper(part["paper"]) for part in parts if part["name"] != "exact" or len(parts) == 1)
        found, text = one.figures, one.setting.replace("|", "\\|")
        interval = f"{number_of_nats(found.kl_low)} to {number_of_nats(found.kl_high)}"
        sizes = (f"{size / 2**20:,.1f} MiB" for size in (one.state_bytes, one.state_16_bit_bytes))
        cells = (f"`{text}`", papers, *sizes, number_of_nats(found.kl), interval)
        lines.append(f"| {' | '.join(cells)} | {found.same_top:.1%} | {_guarantee(parts)} |")
    return "\n".join(lines)


def _paper(text: str) -> str:
    """Return the paper's short name, as a link to arXiv if it has a number there."""
    number = re.search(r"arXiv (\d{4}\.\d{5})", text)
    name = re.split(r" \(|, Theorem|; |, section", text)[0]
    return name if number is None else f"[{name}](https://arxiv.org/abs/{number[1]})"


def _guarantee(parts: list[dict[str, Any]]) -> str:
    """Return the norm of the last part's theorem and its assumptions; a policy alone has no theorem."""
    text = parts[-1]["guarantee"] if len(parts) == 1 or parts[-1]["kind"] == "summary" else "none"
    if text.startswith("max norm, up to rounding"):
        return "exact under the unmasked law" if "unmasked law" in text else "exact"
    given = re.search(r", given (.*)$", text)
    return text if text == "none" else re.split(r"[:,]", text)[0] + " error" + (f", given {given[1]}" if given else "")


def main() -> None:
    print(table(read_text_rows(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
