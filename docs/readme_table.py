"""Print the README's table of methods from an audit's rows: `python docs/readme_table.py out/methods/rows.jsonl`."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from kvfloor.methods.catalogue import rows as catalogue

TASKS = ("recall", "passkey64", "vartrack", "registers")


def table(rows: list[dict[str, Any]]) -> str:
    """Return one line per setting: its paper, mean bytes, share of right answers by task, and guarantee."""
    known = {row["name"]: row for row in catalogue()}
    settings: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        settings[row["method"]][row["task"]] = row
    lines = [
        f"| method | paper | bytes | {' | '.join(TASKS)} | guarantee |",
        f"|---|---|--:|{'--:|' * len(TASKS)}---|",
    ]
    for setting, cells in sorted(settings.items(), key=lambda item: -_kibibytes(item[1])):
        parts = [known[name] for name in re.split(r"[+|]", re.sub(r"\([^)]*\)|@.*", "", setting))]
        papers = "; ".join(_paper(part["paper"]) for part in parts if part["name"] != "exact" or len(parts) == 1)
        scores = " | ".join(f"{cells[task]['score']:.0%}" for task in TASKS)
        text = setting.replace("|", "\\|")
        lines.append(f"| `{text}` | {papers} | {_kibibytes(cells):,.0f} KiB | {scores} | {_guarantee(parts)} |")
    return "\n".join(lines)


def _kibibytes(cells: dict[str, dict[str, Any]]) -> float:
    return sum(cell["state_bytes"] for cell in cells.values()) / len(cells) / 1024


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
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    print(table(rows))


if __name__ == "__main__":
    main()
