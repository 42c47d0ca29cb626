"""The pages of the catalog: the map of the whole list, and one page per entry, for a terminal or as plain data.

``map_page`` and ``show_page`` return what ``rich.console.Console().print`` prints, at any width and also into a pipe;
``map_json`` and ``show_json`` return the same facts as dicts. Neither torch nor any system is imported.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canon import catalog
from canon.catalog import Entry, Section, status
from canon.catalog.status import ClaimStatus

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

MAX_WIDTH = 100  # wider terminals keep the columns together
VERDICT_STYLES = {"reproduced": "green", "partly": "yellow", "not reproduced here": "red", "error": "red"}
WORDS = {
    "en": {
        "heading": "Canon: the AI Canon, running",
        "totals": "{entries} entries, {systems} run",
        "reproduced_of": ", {reproduced} of {claims} claims reproduced",
        "legend": "{runs} runs (minutes on two cores, claims reproduced)  {shown} shown by another  {reads} to read\n"
        "canon show NAME tells more of each",
        "silent": "Nothing of it runs here yet.",
        "shown": "{name} shows it from the inside: canon run {name}, then open the report.",
        "links": "Links",
        "first": "Understand first",
        "then": "Leads to",
        "presets": "Presets",
        "claims": "Claims, {reproduced} of {claims} reproduced",
        "passes": "passes if {passes}; {seeds} seeds, {time}",
        "one_seed": "passes if {passes}; one seed, {time}",
        "measured": "measured {numbers} on {date}",
        "files": "Open",
        "commands": "Run",
        "run": "train, sample, quick claims, report",
        "train": "train another preset",
        "sample": "sample from what was trained",
        "verify": "every claim, its seeds and its sabotage",
        "unverified": "not verified yet",
    },
    "zh": {
        "heading": "Canon：让 AI Canon 运行起来",
        "totals": "共 {entries} 条，{systems} 条可运行",
        "reproduced_of": "，{claims} 条论断中 {reproduced} 条已复现",
        "legend": "{runs} 可运行（两个 CPU 核上的训练时间、已复现的论断）   {shown} 由其他条目展示   {reads} 供阅读\n"
        "canon show NAME 查看每条详情",
        "silent": "尚无可运行的部分。",
        "shown": "{name} 从内部展示它：运行 canon run {name}，再打开报告。",
        "links": "链接",
        "first": "先读",
        "then": "之后可读",
        "presets": "预设",
        "claims": "论断，{claims} 条中 {reproduced} 条已复现",
        "passes": "通过条件：{passes}；{seeds} 个种子，{time}",
        "one_seed": "通过条件：{passes}；1 个种子，{time}",
        "measured": "{date} 测得 {numbers}",
        "files": "打开",
        "commands": "运行",
        "run": "训练、采样、快速论断、报告",
        "train": "训练另一个预设",
        "sample": "从训练结果采样",
        "verify": "检验每条论断：全部种子与破坏实验",
        "unverified": "尚未检验",
        "reproduced": "已复现",
        "partly": "部分复现",
        "not reproduced here": "此处未复现",
        "error": "出错",
    },
}
RUNS, SHOWN, READS = "●", "◐", "○"


def map_page(section: str | None = None, lang: str = "en", runs: str | Path = "runs") -> "RenderableType":
    """The map: sections in the list's order, and in them every entry with what runs of it.

    Args:
        section: a section's id or a part of one (see :func:`canon.catalog.entries`); None for all.
        lang: ``"en"`` or ``"zh"``.
        runs: folder of the user's own runs, where newer verdicts may stand.

    Raises:
        UserError: no section is called so.
    """
    from rich.console import Group
    from rich.constrain import Constrain
    from rich.text import Text

    words, chosen = WORDS[lang], catalog.entries(section)
    claims = {entry.id: status.claims(entry, runs) for entry in chosen}
    every = [claim for found in claims.values() for claim in found]
    totals = words["totals"].format(entries=len(chosen), systems=sum(bool(entry.system) for entry in chosen))
    if every:
        totals += words["reproduced_of"].format(reproduced=_reproduced(every), claims=len(every))
    parts: list[RenderableType] = [Text(words["heading"], "bold"), Text(totals, "dim")]
    id_width = 0
    for heading in catalog.sections():
        inside = [entry for entry in chosen if f"{entry.section}.".startswith(f"{heading.id}.")]
        if inside and not heading.depth:
            parts += [Text(), Text(_title(heading, lang), "bold cyan")]
            id_width = max(len(entry.id) for entry in inside)
        if rows := [entry for entry in inside if entry.section == heading.id]:
            if heading.depth:
                parts += [Text(), Text("  " + _path(heading, lang), "bold", no_wrap=True, overflow="ellipsis")]
            parts.append(_rows(rows, claims, lang, id_width))
    parts += [Text(), Text(words["legend"].format(runs=RUNS, shown=SHOWN, reads=READS), "dim")]
    return Constrain(Group(*parts), MAX_WIDTH)


def show_page(entry: Entry, lang: str = "en", runs: str | Path = "runs") -> "RenderableType":
    """The page of one entry: idea, links, what to understand first, and for a system presets, claims, files, commands.

    Args:
        entry: an entry of the catalog.
        lang: ``"en"`` or ``"zh"``.
        runs: folder of the user's own runs, where newer verdicts may stand.
    """
    from rich.console import Group
    from rich.constrain import Constrain
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    words, facts = WORDS[lang], show_json(entry, runs)
    parts: list[RenderableType] = [
        Text.assemble((entry.id, "bold cyan"), "  ", (_title(entry, lang), "bold")),
        Text(f"{entry.by}, {entry.year}, {entry.kind}", "dim"),
        Text(),
        Text(entry.note_zh if lang == "zh" else entry.note),
    ]

    def block(heading: str, lines: "Iterable[RenderableType]") -> None:
        if body := [Padding(line, (0, 0, 0, 2), expand=False) for line in lines]:
            parts.extend([Text(), Text(heading, "bold"), *body])

    block(words["links"], [_link(link.label, link.url) for link in entry.urls])
    block(words["first"], [_reference(catalog.find(name), lang) for name in facts["needs"]])
    block(words["then"], [Text(", ".join(facts["needed_by"]))] if facts["needed_by"] else [])
    if not entry.system:
        shown = Text(words["shown"].format(name=entry.shown_by)) if entry.shown_by else Text(words["silent"], "dim")
        parts += [Text(), shown]
        return Constrain(Group(*parts), MAX_WIDTH)
    claims = status.claims(entry, runs)
    counts = {"claims": len(claims), "reproduced": _reproduced(claims)}
    block(words["presets"], [Text(", ".join(facts["presets"]))] if facts["presets"] else [])
    block(words["claims"].format(**counts), [line for claim in claims for line in _claim_lines(claim, lang)])
    block(words["files"], [Text(name, overflow="fold") for name in facts["files"]])
    commands = Table.grid(padding=(0, 2, 0, 0))
    for purpose, command in facts["commands"].items():
        commands.add_row(Text(command, "cyan", no_wrap=True), Text(words[purpose], "dim"))
    block(words["commands"], [commands])
    return Constrain(Group(*parts), MAX_WIDTH)


def map_json(section: str | None = None, runs: str | Path = "runs") -> dict[str, Any]:
    """The map as plain data: ``source``, ``sections`` and ``entries``, each with its count of claims.

    Raises:
        UserError: no section is called so.
    """
    rows = []
    for entry in catalog.entries(section):
        claims = status.claims(entry, runs)
        verified = sum(claim.verdict is not None for claim in claims)
        counts = {"total": len(claims), "verified": verified, "reproduced": _reproduced(claims)}
        rows.append({**_plain(entry), "runs": bool(entry.system), "claims": counts})
    sections = [asdict(row) for row in catalog.sections()]
    return {"source": catalog.source(), "sections": sections, "entries": rows}


def show_json(entry: Entry, runs: str | Path = "runs") -> dict[str, Any]:
    """The page of one entry as plain data; for a system with ``presets``, ``claims``, ``files`` and ``commands``."""
    facts = {
        **_plain(entry),
        "needed_by": [other.id for other in catalog.entries() if entry.id in other.needs],
        "runs": bool(entry.system),
    }
    if not entry.system:
        return facts
    presets, claims = status.presets(entry), status.claims(entry, runs)
    files = status.files(entry) + [file for file in [status.claims_file(entry)] if file]
    return {
        **facts,
        "presets": presets,
        "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in claims],
        "files": [_shorten(file) for file in files],
        "commands": _commands(entry, presets, claims),
    }


def _commands(entry: Entry, presets: list[str], claims: list[ClaimStatus]) -> dict[str, str]:
    """Command lines by their purpose."""
    larger = [name for name in presets if name != "laptop"]
    commands = {"run": f"canon run {entry.id}"}
    if larger:
        commands["train"] = f"canon train {entry.id} --preset {larger[0]}"
    commands["sample"] = f"canon sample {entry.id}"
    if claims:
        commands["verify"] = f"canon verify {entry.id}"
    return commands


def _rows(rows: list[Entry], claims: dict[str, list[ClaimStatus]], lang: str, id_width: int) -> "RenderableType":
    """Entries of one section, a line each: mark, name, year, title, minutes, claims reproduced."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False, expand=True)
    table.add_column(no_wrap=True, width=1)
    table.add_column(no_wrap=True, width=id_width)
    table.add_column(no_wrap=True, width=4, style="dim")
    table.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
    any_runs = any(entry.system for entry in rows)
    if any_runs:
        table.add_column(no_wrap=True, width=7, justify="right")
        table.add_column(no_wrap=True, width=4, justify="right")
    for entry in rows:
        cells = [_mark(entry), Text(entry.id, "bold" if entry.system else ""), str(entry.year), _title(entry, lang)]
        if any_runs:
            cells += [_time(entry.minutes) if entry.minutes else "", _score(claims[entry.id])]
        table.add_row(*cells)
    return Padding(table, (0, 0, 0, 2))


def _claim_lines(claim: ClaimStatus, lang: str) -> "list[RenderableType]":
    """A claim: name and verdict; below them its statement, its threshold, and what was measured."""
    from rich.padding import Padding
    from rich.text import Text

    words, verdict = WORDS[lang], claim.verdict or "unverified"
    below = [
        Text(f"{claim.statement} ({claim.source})"),
        Text(
            words["one_seed" if claim.seeds == 1 else "passes"].format(
                passes=claim.passes, seeds=claim.seeds, time=_time(claim.minutes)
            ),
            "dim",
        ),
    ]
    if claim.record and claim.record.get("measured"):
        means = {name: float(spread["mean"]) for name, spread in claim.record["measured"].items()}
        numbers = ", ".join(f"{name} {mean:.3g}" for name, mean in means.items())
        below.append(Text(words["measured"].format(numbers=numbers, date=claim.record["date"]), "dim"))
    heading = Text.assemble(
        (claim.name, "bold"), "  ", (words.get(verdict, verdict), VERDICT_STYLES.get(verdict, "dim"))
    )
    return [heading, *(Padding(line, (0, 0, 0, 2), expand=False) for line in below)]


def _reference(entry: Entry, lang: str) -> "Text":
    """Another entry in one line."""
    from rich.text import Text

    return Text.assemble(_mark(entry), " ", (entry.id, "bold"), "  ", _title(entry, lang))


def _link(label: str, url: str) -> "Text":
    """A label and an address that a terminal can open; long addresses break at the edge, never lose a character."""
    from rich.text import Text

    return Text.assemble(f"{label}  ", (url, f"cyan link {url}"), overflow="fold")


def _mark(entry: Entry) -> "Text":
    from rich.text import Text

    return Text(RUNS, "green") if entry.system else Text(SHOWN, "green") if entry.shown_by else Text(READS, "dim")


def _title(row: Entry | Section, lang: str) -> str:
    return row.title_zh if lang == "zh" else row.title


def _path(heading: Section, lang: str) -> str:
    """A section's title below the list's own section: ``Large language models · New models``."""
    above = [row for row in catalog.sections() if row.depth and f"{heading.id}.".startswith(f"{row.id}.")]
    return " · ".join(_title(row, lang) for row in above)


def _score(claims: list[ClaimStatus]) -> str:
    """Claims reproduced of all: 4/5, with a dash before the first verification."""
    if not claims:
        return ""
    verified = any(claim.verdict for claim in claims)
    return f"{_reproduced(claims) if verified else '–'}/{len(claims)}"


def _reproduced(claims: list[ClaimStatus]) -> int:
    return sum(claim.verdict == "reproduced" for claim in claims)


def _time(minutes: float) -> str:
    return f"{minutes:g} min" if minutes >= 1 else f"{60 * minutes:.0f} s"


def _shorten(file: Path) -> str:
    """The path as one would type it here."""
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)


def _plain(entry: Entry) -> dict[str, Any]:
    """An entry as JSON values."""
    return {**asdict(entry), "urls": [asdict(link) for link in entry.urls], "needs": list(entry.needs)}
