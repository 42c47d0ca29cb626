"""The record of one run: a folder that says what was run, where, how it went and what came out.

``runs/<system>/<name>/`` holds ``config.json``, ``environment.json``, ``summary.json`` (headline numbers),
``metrics.jsonl``, ``samples/``, ``claims.json``, ``checkpoint/`` (written by training), TensorBoard events under
``events/`` when the ``[track]`` extra is installed, and ``report.html``. Under ``torchrun`` only rank 0 writes.
"""

import hashlib
import os
import re
import shutil
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from canon.core.errors import UserError
from canon.core.lab.environment import environment
from canon.core.lab.files import (
    append_line,
    merge_json,
    plain,
    read_json,
    read_lines,
    repair_lines,
    to_json,
    write_atomic,
)
from canon.core.lab.progress import Progress, show_progress

FLUSH_EVERY = 10.0  # seconds between two flushes of TensorBoard events
SHIPPED = "shipped"  # name of the run that is a copy of a checkpoint of the repository


class Run:
    """One run's folder, open for writing and reading.

    Args:
        path: the folder; it is made at the first use.
        config: the configuration, a dataclass or a dict. Given for a folder that already holds a run, it must be
            the same one: a run never changes its configuration half-way.

    Attributes:
        path: the folder.
        config: the configuration as plain JSON values.
        quiet: show no progress (set by callers that print machine-readable output).
        track: mirror metrics to TensorBoard when it is installed.
        leader: whether this process writes; false on every rank but 0 under ``torchrun``.

    Raises:
        UserError: the folder holds a run with another configuration, or cannot be written.
    """

    def __init__(self, path: str | Path, config: Any = None):
        self.path = Path(path)
        self.quiet, self.track = False, True
        self.leader = int(os.environ.get("RANK", "0")) == 0
        self._events: Any = None  # the TensorBoard writer: None before the first log, False when there is none
        self._flushed = 0.0
        self._appended: set[Path] = set()  # line files whose torn tail has been cut by this process
        wanted = plain(config) if config is not None else None
        existing = read_json(self.path / "config.json")
        if existing and wanted is not None and existing != wanted:
            changes = ", ".join(_differences(existing, wanted))
            raise UserError(f"{self.path} holds a run with another configuration ({changes}): give this one a new name")
        self.config: dict[str, Any] = wanted or existing or {}
        begun = (self.path / "config.json").is_file()
        if self.leader and not begun:
            write_atomic(self.path / "environment.json", to_json(environment(), indent=2) + "\n")
        if self.leader and (not begun or self.config != existing):
            write_atomic(self.path / "config.json", to_json(self.config, indent=2) + "\n")  # last: it makes it a run

    @classmethod
    def create(cls, system: str, name: str, config: Any, root: str | Path = "runs") -> Self:
        """Start the run ``root/system/name``, or go on with it when it is there with the same configuration.

        Raises:
            UserError: a name is not a plain folder name, or the run exists with another configuration.
        """
        return cls(Path(root) / folder_name(system) / folder_name(name), config)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run that exists.

        Raises:
            UserError: there is no run in that folder.
        """
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{path} holds no run (no config.json): start one with  canon run NAME")
        return cls(path)

    @classmethod
    def latest(cls, system: str, root: str | Path = "runs", holding: str = "") -> Self:
        """Open the run of a system that was written to last; a copy of a shipped checkpoint does not count.

        Args:
            system: its name.
            root: folder of all runs.
            holding: a file that the run must hold.

        Raises:
            UserError: the system has no such run yet.
        """
        found = (Path(root) / folder_name(system)).glob("*/config.json")
        configs = [c for c in found if c.parent.name != SHIPPED and (c.parent / holding).exists()]
        if not configs:
            raise UserError(f"{system} has no run under {root}: start one with  canon run {system}")
        return cls(max(configs, key=lambda config: _last_written(config.parent)).parent)

    @property
    def system(self) -> str:
        """Name of the system: the folder the run lies in."""
        return self.path.resolve().parent.name

    @property
    def name(self) -> str:
        """Name of the run: its own folder."""
        return self.path.resolve().name

    def stage(self, name: str, config: Any = None) -> "Run":
        """A run inside this one, for a system trained in stages or an experiment with a control.

        It has its own metrics and checkpoint, so each stage resumes by itself; the report shows them in order.
        """
        stage = Run(self.path / "stages" / folder_name(name), config)
        stage.quiet, stage.track = self.quiet, self.track
        return stage

    def stages(self) -> list["Run"]:
        """The stages so far, in the order they were begun."""
        configs = (self.path / "stages").glob("*/config.json")
        return [Run(config.parent) for config in sorted(configs, key=lambda config: config.stat().st_mtime_ns)]

    # What happened -------------------------------------------------------------------------------------------------

    def log(self, step: int, **metrics: float) -> None:
        """Append metrics of one step to ``metrics.jsonl``; nan and infinities are stored as strings.

        Raises:
            UserError: the disk is full; the file then still ends with the last whole line.
        """
        if not self.leader:
            return
        self._append(self.path / "metrics.jsonl", {"step": int(step), **metrics})
        self._log_events(step, metrics)

    def metrics(self) -> list[dict[str, float]]:
        """Every logged line in order, ``{"step": ..., name: value}``."""
        rows = read_lines(self.path / "metrics.jsonl")
        return [{name: float(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]

    def truncate_after(self, step: int) -> None:
        """Forget what was logged past a checkpoint, so that a resumed run leaves the file an unbroken one would.

        Args:
            step: last step to keep; -1 forgets everything (a run that never reached a checkpoint starts over).
        """
        if not self.leader:
            return
        for path in (self.path / "metrics.jsonl", self.path / "samples" / "index.jsonl"):
            if path.is_file():
                kept = [row for row in read_lines(path) if (row.get("step") or 0) <= step]
                write_atomic(path, "".join(to_json(row) + "\n" for row in kept))
        if self._events:
            self._events.close()
        self._events = None
        if step < 0:
            shutil.rmtree(self.path / "events", ignore_errors=True)

    def summary(self, **numbers: float | str) -> None:
        """Record headline numbers (parameters, final score, wall time ...); a name given again is replaced."""
        self._merge("summary.json", numbers)

    def environment(self, **facts: Any) -> None:
        """Add what only the run itself knows of its environment: device, precision, threads, world size."""
        self._merge("environment.json", facts)

    def claims(self, records: Iterable[Any]) -> None:
        """Record verified claims in ``claims.json``, by function name; a claim verified again is replaced."""
        self._merge("claims.json", {record.claim: record for record in records})

    @contextmanager
    def progress(self, total: int, description: str, done: int = 0) -> Iterator[Progress]:
        """Show how far a loop is: one live line in a terminal, a line every tenth of the way elsewhere.

        Args:
            total: steps in all.
            description: what is going on, such as ``"training gpt2"``.
            done: steps already done by the interrupted run that this one continues.

        Yields:
            A :class:`Progress`; call ``update(step, loss=..., speed=..., mfu=...)``.
        """
        with show_progress(total, description, done, silent=self.quiet or not self.leader) as progress:
            yield progress

    # What came out -------------------------------------------------------------------------------------------------

    def text(self, name: str, value: str, step: int | None = None) -> None:
        """Keep a text sample."""
        self._sample(name, "text", step, {".txt": value.encode("utf-8", "replace")})

    def table(self, name: str, value: list[dict[str, Any]], step: int | None = None) -> None:
        """Keep a table: a list of rows, each a dict with the same keys."""
        self._sample(name, "table", step, {".json": to_json(value, indent=1).encode()})

    def image(self, name: str, value: Any, step: int | None = None, keep: bool = False) -> None:
        """Keep an image: ``Float[Tensor, "channels height width"]`` in [-1, 1], channels 1 or 3, or a PIL image.

        With ``keep``, another image of that name stays, and this one's gets a number.
        """
        if self.leader:
            from canon.core.lab.samples import image_png

            data, number, own = image_png(value), 1, name
            while keep and _differs(self.path / "samples" / f"{_file_stem(own)}.png", data):
                number += 1
                own = f"{name} ({number})"
            self._sample(own, "image", step, {".png": data})

    def figure(self, name: str, value: Any, step: int | None = None) -> None:
        """Keep a matplotlib figure, as PNG (shown in the report) and as SVG (for a paper or a slide)."""
        if self.leader:
            from canon.core.lab.samples import figure_files

            self._sample(name, "figure", step, figure_files(value))

    def audio(self, name: str, value: Any, rate: int, step: int | None = None) -> None:
        """Keep a sound: ``Float[Tensor, "channels samples"]`` in [-1, 1] at ``rate`` samples a second."""
        if self.leader:
            from canon.core.lab.samples import audio_wav

            self._sample(name, "audio", step, {".wav": audio_wav(value, rate)})

    def samples(self) -> list[dict[str, Any]]:
        """Index of the samples in order: ``name``, ``kind``, ``file`` (under ``samples/``), ``step`` or None."""
        latest: dict[tuple[str, int | None], dict[str, Any]] = {}
        for row in read_lines(self.path / "samples" / "index.jsonl"):
            latest.pop((row["name"], row["step"]), None)  # a sample made again takes its place at the end
            latest[row["name"], row["step"]] = row
        return list(latest.values())

    def report(self) -> Path:
        """Write ``report.html``, one self-contained page about the run, and return its path."""
        from canon.core.lab.report import write_report

        return write_report(self)

    # Files ---------------------------------------------------------------------------------------------------------

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if path not in self._appended:
            repair_lines(path)
            self._appended.add(path)
        append_line(path, row)

    def _sample(self, name: str, kind: str, step: int | None, files: dict[str, bytes]) -> None:
        if not self.leader:
            return
        stem = _file_stem(name) + ("" if step is None else f"-step{step}")
        for suffix, data in files.items():
            write_atomic(self.path / "samples" / (stem + suffix), data)
        row = {"name": name, "kind": kind, "file": stem + next(iter(files)), "step": step}
        self._append(self.path / "samples" / "index.jsonl", row)

    def _merge(self, name: str, values: dict[str, Any]) -> None:
        if self.leader:
            merge_json(self.path / name, values)

    def _log_events(self, step: int, metrics: dict[str, float]) -> None:
        """Mirror metrics to TensorBoard where it is installed; imported at the first log, as it takes a second."""
        if self._events is None:
            self._events = False
            if self.track and find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(self.path / "events"), purge_step=step)
                weakref.finalize(self, self._events.close)  # flushes, also when the process ends
        if self._events:
            for name, value in metrics.items():
                self._events.add_scalar(name, float(value), step)
            if time.monotonic() - self._flushed > FLUSH_EVERY:
                self._events.flush()
                self._flushed = time.monotonic()


def folder_name(name: str) -> str:
    """Check that a name is a plain folder name: no separators, no leading dot, at most 100 characters.

    Raises:
        UserError: it is not.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}", name):
        raise UserError(f"{name!r} cannot name a run: use letters, digits, '.', '_', '+' and '-'")
    return name


def _file_stem(name: str) -> str:
    """A file stem for a sample's free-form name; names that look alike after cleaning stay apart by a digest."""
    stem = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:60]
    return stem if stem == name else f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:6]}".lstrip("-")


def _differs(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() != data


def _last_written(run: Path) -> int:
    files = [run / "config.json", run / "metrics.jsonl", run / "samples" / "index.jsonl"]
    return max(file.stat().st_mtime_ns for file in files if file.is_file())


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Leaves in which two configurations differ, as ``training.steps 100, now 200``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} {old}, now {new}"
