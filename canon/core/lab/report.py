"""The report: one self-contained page about a run, light or dark, for a screen or a phone."""

import base64
import json
import math
import shlex
import statistics
from pathlib import Path
from typing import Any

from canon.core.errors import UserError
from canon.core.lab import charts
from canon.core.lab.claim import Record
from canon.core.lab.files import read_json, write_atomic
from canon.core.lab.run import Run
from canon.core.lab.threshold import Threshold
from canon.core.lab.wording import UNITS, duration, number, signs, spread, words

SIDES = ("training", "train", "validation", "val", "test", "held_out", "fixed", "average", "ema")  # of a quantity
JUDGED = ("validation", "val", "test", "held_out", "fixed")  # fixed: a batch of what is learned, always the same
INSTRUMENTS = ("learning_rate", "gradient_norm", "utilisation", "_per_second")  # how it ran, not what it learnt
MIME = {".png": "image/png", ".wav": "audio/wav"}
HEADLINES = 6


def write_report(run: Run) -> Path:
    """Write ``report.html`` into the run's folder and return its path.

    Raises:
        UserError: the disk is full or not writable.
    """
    path = run.path / "report.html"
    if run.leader:
        write_atomic(path, render(run))
    return path


def render(run: Run) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template.filters |= {"number": _number, "duration": duration}
    environment = read_json(run.path / "environment.json")
    stages = [stage for stage in [run, *run.stages()] if stage is run or stage.metrics() or stage.samples()]
    return template.get_template("report.html").render(
        run=run,
        paper=_paper(run.system),
        headlines=headlines(run),
        sections=[_section(stage, "" if stage is run else stage.name) for stage in stages],
        claims=[_claim(Record.from_json(record)) for record in read_json(run.path / "claims.json").values()],
        config=_leaves(run.config),
        environment=[(words(name), _fact(name, value)) for name, value in environment.items() if value is not None],
        date=str(environment.get("date", ""))[:10],
        commands=_commands(run, environment),
    )


def headlines(run: Run) -> list[tuple[str, str, str]]:
    """Up to six headline numbers as (value, name, remark): the run's summary, then what its metrics tell."""
    summary = read_json(run.path / "summary.json")
    found = [(_number(value), words(name), "") for name, value in summary.items()]
    logged = [lines for lines in map(_series, [run, *reversed(run.stages())]) if lines]  # its own, or the last stage's
    series = {line.name: line for line in (logged[0] if logged else [])}
    result = next((name for name in series if _side(name) in JUDGED), "loss")
    if result in series and (points := series[result].finite()):
        found.append((number(points[-1][1]), words(result), f"at step {number(points[-1][0])}"))
    if series:
        found.append((number(max(line.steps[-1] for line in series.values())), "steps", ""))
    for name in ("tokens_per_second", "utilisation"):
        if name in series and (points := series[name].finite()):
            middle = statistics.median(value for _, value in points)
            found.append((f"{middle:.0%}" if name == "utilisation" else number(middle), UNITS[name], "median"))
    names: set[str] = set()
    return [row for row in found if not (row[1] in names or names.add(row[1]))][:HEADLINES]


def _paper(system: str) -> dict[str, Any]:
    """Title, authors, year and address of the paper, where the catalog knows the system."""
    try:
        from canon.catalog import find

        entry = find(system)
    except UserError:
        return {"title": system, "by": "", "year": "", "url": "", "label": "", "note": ""}
    link = entry.urls[0]
    return {
        "title": entry.title,
        "by": entry.by,
        "year": entry.year,
        "url": link.url,
        "label": link.label,
        "note": entry.note,
    }


# Curves ------------------------------------------------------------------------------------------------------------


def _section(run: Run, title: str) -> dict[str, Any]:
    """Charts and samples of a run or a stage."""
    groups: dict[str, list[charts.Series]] = {}
    for line in _series(run):
        groups.setdefault(_quantity(line.name), []).append(line)
    # What has a held-out side first, and the loss before others; beyond that as they were logged.
    ordered = sorted(groups, key=lambda name: (len(groups[name]) == 1, name != "loss"))
    results = [name for name in ordered if not name.endswith(INSTRUMENTS)]
    figures = [_figure(name, groups[name], main=place == 0) for place, name in enumerate(results)]
    instruments = [_figure(name, groups[name], main=False) for name in ordered if name not in results]
    return {"title": title, "figures": figures, "instruments": instruments, "samples": _samples(run)}


def _series(run: Run) -> list[charts.Series]:
    """Every metric over steps, in the order the metrics first appear."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in run.metrics():
        for name, value in row.items():
            if name != "step":
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return [charts.Series(name, steps, values) for name, (steps, values) in found.items()]


def _figure(name: str, lines: list[charts.Series], main: bool) -> dict[str, Any]:
    """One quantity as drawings for wide and narrow screens, with a caption that owns up to what cannot be drawn."""
    alone = len(lines) == 1
    named = [charts.Series("" if alone else _side(line.name) or "training", line.steps, line.values) for line in lines]
    title = words(lines[0].name if alone else name)
    remarks = []
    for line in lines:
        lost = [step for step, value in zip(line.steps, line.values) if not math.isfinite(value)]
        if lost:
            count = "one value is" if len(lost) == 1 else f"{len(lost)} values are"
            whose = "" if alone else f"{words(line.name)}: "
            remarks.append(f"{whose}{count} not finite, the first at step {number(lost[0])}")
    if any(line.average() for line in lines):
        remarks.append("pale: as logged; full: moving average")
    shape = [(720, 310), (380, 270)] if main else [(340, 190)]
    if any(line.finite() for line in lines):
        drawings = [charts.line_chart(named, width, height, f"{title} over steps") for width, height in shape]
    else:
        drawings = []
    return {"title": title, "drawings": drawings, "remark": "; ".join(remarks), "main": main}


def _quantity(name: str) -> str:
    """What a metric measures, whichever side it was measured on: ``validation_loss`` and ``loss`` are both loss."""
    side = _side(name)
    return name.replace("/", "_").removeprefix(f"{side}_").removesuffix(f"_{side}") if side else name


def _side(name: str) -> str:
    flat = name.replace("/", "_")
    return next((side for side in SIDES if flat.startswith(f"{side}_") or flat.endswith(f"_{side}")), "")


# Samples -----------------------------------------------------------------------------------------------------------


def _samples(run: Run) -> list[dict[str, Any]]:
    """Samples grouped by name in the order the names first appear; of each name every step, the latest last."""
    groups: dict[str, dict[str, Any]] = {}
    for row in run.samples():
        file = run.path / "samples" / row["file"]
        if file.is_file():
            group = groups.setdefault(row["name"], {"name": row["name"], "kind": row["kind"], "items": []})
            group["items"].append({"step": row["step"], "kind": row["kind"], "value": _content(row["kind"], file)})
    return list(groups.values())


def _content(kind: str, file: Path) -> Any:
    if kind == "text":
        return file.read_text("utf-8", "replace")
    if kind == "table":
        rows = json.loads(file.read_text("utf-8"))
        columns = list(dict.fromkeys(name for row in rows for name in row))
        numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in columns]
        return {
            "columns": [words(name) for name in columns],
            "numeric": numeric,
            "rows": [[row.get(n) for n in columns] for row in rows],
        }
    return f"data:{MIME[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"


# Claims ------------------------------------------------------------------------------------------------------------


def _claim(record: Record) -> dict[str, Any]:
    """A record with its rows: each number's mean, spread and sabotaged value, and where the threshold lies."""
    means = {name: entry["mean"] for name, entry in record.measured.items()}
    parts = Threshold(record.passes).parts()
    seed = Path(record.workdir or ".") / "seed0"
    limits: dict[str, list[float]] = {}
    for part in parts:
        if found := part.limits():
            limits.setdefault(found[0], []).extend(found[1])
    broken = {name: entry["mean"] for name, entry in record.sabotage.items()}
    rows = []
    for name, entry in record.measured.items():
        sabotaged = record.sabotage.get(name, {"values": []})["values"]
        drawn = name in limits and any(map(math.isfinite, entry["values"]))
        rows.append(
            {
                "name": words(name),
                "mean": spread(entry),
                "sabotaged": number(broken[name]) if name in broken else "",
                "strip": charts.strip(entry["values"], sabotaged, limits[name], words(name)) if drawn else "",
            }
        )
    judged = [(words(signs(part.text)), part.names <= means.keys() and part.holds(means)) for part in parts]
    return {
        "record": record,
        "rows": rows,
        "reason": signs(record.reason[:1].upper() + record.reason[1:]),
        "threshold": judged if means else [(words(signs(part.text)), None) for part in parts],
        "figures": _samples(Run.open(seed)) if (seed / "config.json").is_file() else [],
    }


# Words -------------------------------------------------------------------------------------------------------------


def _leaves(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
    """(group, name, value) of every leaf of the configuration."""
    leaves = []
    for name, value in config.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{prefix}.{name}" if prefix else name)
        else:
            leaves.append(
                (
                    prefix,
                    name,
                    json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else _shown(value),
                )
            )
    return sorted(leaves, key=lambda leaf: leaf[0])  # stable: top-level fields first, groups together


def _shown(value: Any) -> str:
    """A leaf of the configuration, exactly where it is whole; its digits are grouped from five on."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") if abs(value) >= 10_000 else str(value)
    return number(value) if isinstance(value, float) else str(value) or '""'


def _number(value: Any) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else _shown(value)


def _fact(name: str, value: Any) -> str:
    return shlex.join(value) if name == "command" else _shown(value)


def _commands(run: Run, environment: dict[str, Any]) -> list[tuple[str, str]]:
    """(comment, command) lines that make this run again."""
    commit = str(environment.get("commit") or "")
    install = [("the version that ran", f"pip install aicanon=={environment.get('canon', '')}")]
    if commit:
        changed = ", with uncommitted changes" if commit.endswith("+changes") else ""
        install = [
            (
                f"the source that ran{changed}",
                f"git checkout {commit.removesuffix('+changes')[:12]} && pip install -e .",
            )
        ]
    typed = environment.get("command") or []
    again = shlex.join(typed) if typed and typed[0] == "canon" else f"canon run {run.system}"
    return [*install, ("the run", again), ("its claims, each with its sabotage", f"canon verify {run.system}")]
