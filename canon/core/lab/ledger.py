"""The ledger of results: committed records of verified claims, and the page ``docs/RESULTS.md`` made of them.

``canon/claims/records/<system>.json`` holds ``{claim: record}``, in the order of :class:`~canon.core.lab.claim.Record`.
``python -m canon.core.lab.ledger`` writes the page anew; what failed stands in it as plainly as what held.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import canon
from canon.core.lab.claim import Record
from canon.core.lab.files import merge_json, read_json, write_atomic
from canon.core.lab.wording import spread

ROOT = Path(canon.__file__).parent.parent
RECORDS = ROOT / "canon" / "claims" / "records"
PAGE = ROOT / "docs" / "RESULTS.md"
VERDICTS = ("reproduced", "partly", "not reproduced here", "error")
HEAD = """# Results

Every claim that has been verified, with what was measured, and at the end those that have not been yet. A claim is
*reproduced* only if the mean over its seeds meets the threshold, every single seed agrees, and the same experiment with
its essential part removed, the sabotage, fails. Thresholds were fixed beforehand. `canon verify NAME` measures them
again on your machine.

This page is generated from `canon/claims/records/` by `python -m canon.core.lab.ledger`; do not edit it.
"""


def publish(records: Iterable[Record], folder: Path = RECORDS, page: Path = PAGE) -> Path:
    """Put records into the repository, write the page from all of them and return its path.

    A claim verified again is replaced.

    Raises:
        UserError: the disk is full or not writable.
    """
    systems: dict[str, dict[str, Any]] = {}
    for record in records:
        kept = {name: value for name, value in record.as_json().items() if name != "workdir"}  # a path of one machine
        systems.setdefault(record.system, {})[record.claim] = kept
    for system, found in systems.items():
        merge_json(folder / f"{system}.json", found)
    return write(folder, page)


def committed(folder: Path = RECORDS) -> dict[str, list[Record]]:
    """The records in the repository, by system: in the catalog's order, and others after it by name."""
    from canon.catalog import entries

    order = {entry.id: place for place, entry in enumerate(entries())}
    files = sorted(folder.glob("*.json"), key=lambda file: (order.get(file.stem, len(order)), file.stem))
    return {file.stem: [Record.from_json(record) for record in read_json(file).values()] for file in files}


def orphans(folder: Path = RECORDS) -> list[str]:
    """``system/claim`` of every record whose claim is gone or has got another threshold since: verify it again."""
    from canon.catalog import find
    from canon.catalog.status import claims

    stated = {system: {claim.name: claim.passes for claim in claims(find(system))} for system in committed(folder)}
    records = [record for found in committed(folder).values() for record in found]
    return [f"{r.system}/{r.claim}" for r in records if stated[r.system].get(r.claim) != r.passes]


def render(systems: dict[str, list[Record]]) -> str:
    """The page as Markdown."""
    from canon.catalog import entries

    titles = {entry.id: f"*{entry.title}*, {entry.by}, {entry.year}." for entry in entries()}
    counts = Counter(record.verdict for records in systems.values() for record in records)
    total = counts.total()
    lines = [HEAD, "| verdict | claims |", "| :-- | --: |"]
    lines += [f"| {verdict} | {counts[verdict]} |" for verdict in VERDICTS if counts[verdict] or verdict != "error"]
    lines += [f"| **all, in {len(systems)} system{'s' * (len(systems) != 1)}** | **{total}** |", ""]
    for system, records in systems.items():
        lines += [
            f"## {system}",
            "",
            *([titles[system], ""] if system in titles else []),
            "| claim | source | passes when | measured | sabotaged | verdict | seconds |",
        ]
        lines += ["| :-- | :-- | :-- | :-- | :-- | :-- | --: |"]
        lines += [_row(record) for record in records]
        places = dict.fromkeys(f"{record.machine}, on {record.date}" for record in records)
        lines += ["", f"Measured on {'; '.join(places)}.", ""]
    if waiting := pending(systems):
        lines += ["## Not verified yet", "", *(f"- {system}: {statement}" for system, statement in waiting), ""]
    return "\n".join(lines)


def pending(systems: dict[str, list[Record]]) -> list[tuple[str, str]]:
    """System and statement of the claims that are written down and have no record."""
    from canon.catalog import entries
    from canon.catalog.status import claims

    known = {system: {record.claim for record in records} for system, records in systems.items()}
    stated = [(entry.id, claim) for entry in entries() if entry.system for claim in claims(entry)]
    return [(system, claim.statement) for system, claim in stated if claim.name not in known.get(system, set())]


def stale(folder: Path = RECORDS, page: Path = PAGE) -> bool:
    """Whether the page in the repository differs from the one its records make."""
    return not page.is_file() or page.read_text("utf-8") != render(committed(folder))


def write(folder: Path = RECORDS, page: Path = PAGE) -> Path:
    """Write the page from the records and return its path.

    Raises:
        UserError: the disk is full or not writable.
    """
    write_atomic(page, render(committed(folder)))
    return page


def _row(record: Record) -> str:
    verdict = f"**{record.verdict}**"
    if record.verdict != "reproduced":
        verdict += f": {record.reason}"
    passes = f"`{record.passes}`" + (f"; partly: `{record.partly}`" if record.partly else "")
    cells = [record.statement, record.source, passes, _numbers(record.measured), _numbers(record.sabotage), verdict]
    cells.append(f"{record.seconds:.1f}")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _numbers(measured: dict[str, dict[str, Any]]) -> str:
    """Each number as mean ± standard deviation [95% interval of the mean], and over how many seeds."""
    shown = "<br>".join(f"{name} {spread(entry)}" for name, entry in measured.items())
    runs = max((len(entry["values"]) for entry in measured.values()), default=0)
    return f"{shown} ({runs} seeds)" if runs > 1 else shown


if __name__ == "__main__":
    print(write().relative_to(ROOT), file=sys.stderr)
