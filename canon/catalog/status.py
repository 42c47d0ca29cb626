"""What a system offers and what has been measured of it, read from its files without importing them.

Presets are the keys of ``PRESETS`` in the system's source, claims are the functions under ``@claim`` in
``canon/claims/``, and verdicts come from the records of ``canon verify``. Parsing takes milliseconds where importing
the systems would load torch.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canon.catalog import Entry

ROOT = Path(__file__).parents[2]  # what holds the package: the repository, or site-packages
DEFAULT_SEEDS = 3


@dataclass(frozen=True)
class ClaimStatus:
    """A claim as its source states it, with the latest record of its verification (None when there is none)."""

    name: str
    statement: str
    source: str
    passes: str
    seeds: int
    minutes: float
    record: dict[str, Any] | None

    @property
    def verdict(self) -> str | None:
        """``reproduced``, ``partly``, ``not reproduced here`` or ``error``; None when it was never verified."""
        return self.record["verdict"] if self.record else None


def files(entry: Entry) -> list[Path]:
    """Source files of the entry's system, the one to open first coming first; empty while nothing runs."""
    if not entry.system:
        return []
    place = ROOT / entry.system.replace(".", "/")
    if place.is_dir():
        return sorted(place.glob("*.py"))  # __init__.py sorts first
    return [place.with_suffix(".py")]


def claims_file(entry: Entry) -> Path | None:
    """The file of the entry's claims; None when there is none."""
    if not entry.system:
        return None
    package, _, inside = entry.system.partition(".")
    file = (ROOT / package / "claims" / inside.replace(".", "/")).with_suffix(".py")
    return file if file.is_file() else None


def presets(entry: Entry) -> list[str]:
    """Names of the system's presets, in the order they stand in its source."""
    for file in files(entry):
        for node in _parse(file).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            named = any(isinstance(target, ast.Name) and target.id == "PRESETS" for target in targets)
            if named and isinstance(value := getattr(node, "value", None), ast.Dict):
                return [_literal(key, file) for key in value.keys if key is not None]
    return []


def claims(entry: Entry, runs: str | Path = "runs") -> list[ClaimStatus]:
    """The entry's claims in the order of their file, with the latest verdicts.

    A record counts only for the threshold it was measured against: after ``passes`` changes, the claim is unverified.

    Args:
        entry: an entry of the catalog.
        runs: folder of the user's own runs.
    """
    file = claims_file(entry)
    if file is None:
        return []
    records = _records(entry.id, Path(runs))
    found = []
    for node in _parse(file).body:
        call = _claim_call(node)
        if call is None or not isinstance(node, ast.FunctionDef):
            continue
        stated = {word.arg: _literal(word.value, file) for word in call.keywords}
        passes = " ".join(stated["passes"].split())
        record = records.get(node.name)
        if record and record.get("passes") != passes:
            record = None
        found.append(
            ClaimStatus(
                name=node.name,
                statement=_literal(call.args[0], file),
                source=stated["source"],
                passes=passes,
                seeds=stated.get("seeds", DEFAULT_SEEDS),
                minutes=stated["minutes"],
                record=record,
            )
        )
    return found


def _claim_call(node: ast.stmt) -> ast.Call | None:
    """The ``claim(...)`` above a function."""
    for call in getattr(node, "decorator_list", ()):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "claim":
            return call
    return None


def _literal(node: ast.expr, file: Path) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        where = f"{file}:{node.lineno}"
        raise ValueError(f"{where}: presets and claims are read without importing them; write a literal here") from None


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def _records(system: str, runs: Path) -> dict[str, dict[str, Any]]:
    """Latest record of each claim: the published ones, and over them whatever the user measured since."""
    latest = _read(ROOT / "canon" / "claims" / "records" / f"{system}.json")
    own = [file for file in runs.glob(f"{system}/*/claims.json") if file.is_file()]
    for file in sorted(own, key=lambda file: file.stat().st_mtime):
        for name, record in _read(file).items():
            if name not in latest or record["date"] >= latest[name]["date"]:
                latest[name] = record
    return latest


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Records in a file, by claim; none where the file is missing or is not a file of records."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    rows = content.items() if isinstance(content, dict) else ()
    return {name: row for name, row in rows if isinstance(row, dict) and {"verdict", "date"} <= row.keys()}
