"""Print the README's table of methods from an audit's texts: `python docs/readme_table.py out/methods/nats.jsonl`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from kvfloor.audit.format import bytes_text, number_of_nats, smaller_text
from kvfloor.audit.nats import TextSummary, read_text_rows, summaries
from kvfloor.methods.catalogue import rows as catalogue


def table(lines: list[TextSummary]) -> str:
    """Return one line per setting: its paper, bytes, divergence from exact in nats, and guarantee."""
    known = {row["name"]: row for row in catalogue()}
    text = [
        "| method | paper | bytes | smaller than 16 bits | nats | 95 % interval | same top token | guarantee |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for one in sorted(lines, key=lambda one: one.figures.kl):
        parts = [known[name] for name in re.split(r"[+|]", re.sub(r"\([^)]*\)|@.*", "", one.setting))]
        papers = "; ".join(_paper(part["paper"]) for part in parts if part["name"] != "exact" or len(parts) == 1)
        found = one.figures
        cells = (
            f"`{one.setting}`".replace("|", "\\|"),
            papers,
            bytes_text(one.state_bytes),
            smaller_text(one.exact_16_bit_bytes, one.state_bytes),
            number_of_nats(found.kl),
            f"{number_of_nats(found.kl_low)} to {number_of_nats(found.kl_high)}",
            f"{100 * found.same_top:.1f}%",
            _guarantee(parts),
        )
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


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


if __name__ == "__main__":
    print(table(summaries(read_text_rows(Path(sys.argv[1])))))
