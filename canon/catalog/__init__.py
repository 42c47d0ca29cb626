"""The reading list itself, as data: every entry of the AI Canon with its links, its idea and what runs of it.

``canon.toml`` beside this file is the single registry. Importing this module reads nothing; the table is read once,
at the first question.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from canon.core.errors import UserError

CLOSEST = 4  # names offered when a name is not known


@dataclass(frozen=True)
class Section:
    """A section of the list. The dots of its id are the nesting: ``landmarks.language.models``."""

    id: str
    title: str
    title_zh: str

    @property
    def depth(self) -> int:
        """0 for a section of the list itself, 1 for a subsection, 2 for its parts."""
        return self.id.count(".")


@dataclass(frozen=True)
class Link:
    """An address and what is found there: paper, blog post, website ..."""

    label: str
    url: str


@dataclass(frozen=True)
class Entry:
    """One entry of the list.

    Attributes:
        id: stable name; for a system, also the file name of its module.
        section: id of its section.
        title: title as published.
        title_zh: title in Chinese.
        by: authors, with their house in brackets.
        year: of first publication.
        kind: paper, post, course, video, project, benchmark, report or book.
        urls: the main link first, then everything else the list links to from this entry.
        note: the idea in one sentence.
        note_zh: the same in Chinese.
        needs: ids of the entries to understand first.
        system: dotted name of the module that runs it; None while nothing does.
        shown_by: id of another entry whose system, and whose report, show what this one explains; else None.
        minutes: training time of the system's laptop preset on two CPU cores.
    """

    id: str
    section: str
    title: str
    title_zh: str
    by: str
    year: int
    kind: str
    urls: tuple[Link, ...]
    note: str
    note_zh: str
    needs: tuple[str, ...]
    system: str | None = None
    shown_by: str | None = None
    minutes: float | None = None


def source() -> str:
    """Address of the reading list."""
    return _table()["source"]


def sections() -> list[Section]:
    """All sections, in the list's order, parents before children."""
    return list(_sections())


def entries(section: str | None = None) -> list[Entry]:
    """Entries in the list's order.

    Args:
        section: keep these only. A whole id (``"landmarks.images"``) or any part of one (``"images"``, ``"landmarks"``,
            ``"courses"``); the subsections come along.

    Raises:
        UserError: no section is called so.
    """
    if section is None:
        return list(_entries())
    chosen = {row.id for row in _sections() if f".{section}." in f".{row.id}."}
    if not chosen:
        parts = list(dict.fromkeys(part for row in _sections() for part in row.id.split(".")))
        raise UserError(f'no section is called "{section}"; sections: {", ".join(parts)}')
    return [entry for entry in _entries() if entry.section in chosen]


def find(name: str) -> Entry:
    """The entry of that id or title; case, hyphens and underscores do not matter (``GPT-2`` finds ``gpt2``).

    Raises:
        UserError: there is none; the line names the closest.
    """
    wanted = _squeeze(name)
    for key in ("id", "title", "title_zh"):
        for entry in _entries():
            if wanted and _squeeze(getattr(entry, key)) == wanted:
                return entry
    closest = _closest(wanted)
    advice = f"closest: {', '.join(closest)}" if closest else "`canon list` names them all"
    raise UserError(f'the catalog has no entry "{name}"; {advice}')


def _closest(wanted: str) -> list[str]:
    """Ids of the entries whose id or title holds, or nearly spells, what was asked for."""
    from difflib import get_close_matches

    holds = [entry.id for entry in _entries() if len(wanted) > 2 and wanted in _squeeze(f"{entry.id} {entry.title}")]
    spelled = {_squeeze(entry.id): entry.id for entry in _entries()}
    near = [spelled[match] for match in get_close_matches(wanted, spelled, CLOSEST, cutoff=0.5)]
    return list(dict.fromkeys(near + holds))[:CLOSEST]


def _squeeze(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


@cache
def _table() -> dict[str, Any]:
    with Path(__file__).with_name("canon.toml").open("rb") as file:
        return tomllib.load(file)


@cache
def _sections() -> tuple[Section, ...]:
    return tuple(Section(**row) for row in _table()["sections"])


@cache
def _entries() -> tuple[Entry, ...]:
    return tuple(
        Entry(**{**row, "urls": tuple(Link(**link) for link in row["urls"]), "needs": tuple(row["needs"])})
        for row in _table()["entries"]
    )
