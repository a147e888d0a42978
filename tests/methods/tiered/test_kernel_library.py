"""The kernel is compiled once, in a folder of the user's own; where that fails, torch answers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from kvfloor import Spec
from kvfloor.methods.tiered import kernel, kernel_library
from kvfloor.methods.tiered.tiered import Tiered
from tests.faulty_c import faulty

pytestmark = pytest.mark.skipif(not kernel.installed(), reason="the kernel needs a C compiler, such as gcc or clang")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_library, "OPTIONS", ("-O0", *kernel_library.OPTIONS[1:]))
    return tmp_path / "kvfloor" / "kernels"


def test_it_is_compiled_once_for_each_version_of_its_source(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_library.library.__wrapped__() is not None
    (made,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    before = made.stat().st_mtime_ns
    assert kernel_library.library.__wrapped__() is not None and made.stat().st_mtime_ns == before
    changed = shutil.copytree(kernel_library.SOURCE.parent, cache.parent / "changed")
    monkeypatch.setattr(kernel_library, "SOURCE", changed / "certify.c")
    for made, name in enumerate(("certify.c", "vectors.h"), 2):
        (changed / name).write_text((changed / name).read_text() + "\n")
        assert kernel_library.library.__wrapped__() is not None and len(list(cache.iterdir())) == made


@pytest.mark.parametrize("command", ["no-such-compiler", "false", f"{sys.executable} -c pass"])
def test_without_a_compiler_torch_answers(command: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", command)
    assert kernel_library.library.__wrapped__() is None and not list(cache.iterdir())
    monkeypatch.setattr(kernel_library, "library", kernel_library.library.__wrapped__)
    kernel.installed.cache_clear()
    try:
        state = Tiered(page=32, recent=32).open(Spec(1, 64, 64))
        state.append(torch.randn(1, 100, 64), torch.randn(1, 100, 64))
        assert state.hot is not None and not kernel.serves(state.hot)
        assert bool(state.read_certified(torch.randn(1, 2, 64)).within(0.02).all())
    finally:
        kernel.installed.cache_clear()


def test_a_file_that_others_can_write_is_not_run(cache: Path) -> None:
    assert kernel_library.library.__wrapped__() is not None
    (made,) = cache.iterdir()
    for path, mode in ((made, 0o777), (cache, 0o777)):
        old = path.stat().st_mode
        path.chmod(mode)
        assert kernel_library.library.__wrapped__() is None
        path.chmod(old)


def test_a_file_that_is_no_library_gives_no_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    junk = "import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('junk')"
    monkeypatch.setenv("CC", f'{sys.executable} -c "{junk}"')
    assert kernel_library.library.__wrapped__() is None and len(list(cache.iterdir())) == 1


def test_a_folder_that_cannot_be_written_gives_no_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    assert kernel_library.library.__wrapped__() is None


def test_a_kernel_that_takes_other_arguments_is_not_used(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    more = ("int64_t rows, m,", "int64_t rows, more, m,")
    monkeypatch.setattr(kernel_library, "SOURCE", faulty(kernel_library.SOURCE, cache.parent.parent / "changed", more))
    monkeypatch.setattr(kernel_library, "library", kernel_library.library.__wrapped__)
    kernel.installed.cache_clear()
    try:
        assert not kernel.installed()
    finally:
        kernel.installed.cache_clear()
