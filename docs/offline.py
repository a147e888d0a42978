"""Check that the built docs site loads nothing from the network: `python docs/offline.py site`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Addresses that a browser fetches by itself; a link (<a href>) is followed only when the reader clicks it.
LOADS = (
    re.compile(r"""<(?!a\b|link\b)\w+[^>]*?\s(?:src|srcset|data|poster)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""),
    re.compile(r"""<link\b(?![^>]*rel=["']?canonical)[^>]*?\shref\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""),
    re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)"""),
)


def loads(text: str) -> list[str]:
    """List the addresses on other hosts that this HTML or CSS makes a browser load."""
    return [address for pattern in LOADS for address in pattern.findall(text)]


def main(folder: Path) -> int:
    pages = [path for path in folder.rglob("*") if path.suffix in (".html", ".css")]
    if not pages:
        print(f"{folder} has no pages: build the site first (make docs)", file=sys.stderr)
        return 2
    found = [f"{path.relative_to(folder)}: {address}" for path in pages for address in loads(path.read_text("utf-8"))]
    for line in found:
        print(f"loaded from the network: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
