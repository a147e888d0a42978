"""Plant faults in the source of a kernel in C."""

from __future__ import annotations

import shutil
from pathlib import Path


def faulty(source: Path, folder: Path, *faults: tuple[str, str]) -> Path:
    """Copy the C files beside `source` to a new folder, with faults; return the path of the copy of `source`.

    faults  pairs of a text, which must stand in one place of these files, and of what it is replaced by
    """
    folder.mkdir()
    for file in source.parent.glob("*.[ch]"):
        shutil.copy(file, folder)
    for right, fault in faults:
        (file,) = (file for file in folder.iterdir() if right in file.read_text())
        assert file.read_text().count(right) == 1
        file.write_text(file.read_text().replace(right, fault))
    return folder / source.name
