"""List the scripts of this folder, or run them one after another: `python -m characterize [all | NAME ...]`

Each script writes the table beside it. All of them take a day on one core, so name those whose subject changed. The
exit status is the number of scripts that failed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("__"))


def about(name: str) -> str:
    """Return the first line of a script's docstring."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0]


def run(names: list[str]) -> list[str]:
    """Run the scripts one after another, and return the names of those that failed."""
    failed = []
    for name in names:
        print(f"characterize.{name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"characterize.{name}"], cwd=HERE.parent, check=False).returncode:
            failed.append(name)
    return failed


def main() -> int:
    asked = sys.argv[1:]
    unknown = [] if asked == ["all"] else [name for name in asked if name not in NAMES]
    if not asked or unknown:
        print("\n".join(f"{name:22} {about(name)}" for name in NAMES))
        return refuse(unknown) if unknown else 0
    failed = run(NAMES if asked == ["all"] else asked)
    print("\n".join(f"failed: {name}" for name in failed), end="\n" if failed else "")
    return len(failed)


def refuse(names: list[str]) -> int:
    print(f"\nno script of these names: {', '.join(names)}; give `all`, or names from the list above", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
