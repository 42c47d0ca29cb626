"""A loop's progress on standard error: one live line in a terminal, a few plain lines anywhere else."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from canon.core.lab.wording import duration, number, words

UNSEEN = ("learning_rate", "gradient_norm")  # in the metrics and the report; too much for one line


class Progress:
    """Where a loop is. Made by :func:`show_progress`."""

    def __init__(self, total: int, description: str, done: int, live: Any, silent: bool):
        self.total, self.description, self.done = total, description, done
        self._live, self._silent = live, silent
        self._task = live.add_task(description, total=total, completed=done, facts="", left="") if live else None
        self._began, self._began_at = time.monotonic(), done
        self._tenth = done * 10 // max(total, 1)

    def update(self, step: int, **facts: float | str) -> None:
        """Tell how many steps are done, and the latest metrics under their usual names."""
        self.done = step
        if self._silent:
            return
        tenth = step * 10 // max(self.total, 1)
        if self._live:
            self._live.update(self._task, completed=step, facts=_line(facts), left=self._left())
        elif tenth > self._tenth:
            self._tenth = tenth
            pieces = [self.description, f"{step}/{self.total}", _line(facts), self._left()]
            print("  ".join(filter(None, pieces)), file=sys.stderr, flush=True)

    def _left(self) -> str:
        """Time left at the mean speed of this process (an interrupted run's earlier steps do not count)."""
        steps = self.done - self._began_at
        if steps <= 0 or self.done >= self.total:
            return ""
        return f"{duration((time.monotonic() - self._began) / steps * (self.total - self.done))} left"


@contextmanager
def show_progress(total: int, description: str, done: int = 0, silent: bool = False) -> Iterator[Progress]:
    """Show the progress of a loop of ``total`` steps of which ``done`` are behind it; ``silent`` shows nothing."""
    if silent or not sys.stderr.isatty():
        yield Progress(total, description, done, None, silent)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Live

    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("[cyan]{task.fields[facts]}"),
        TextColumn("[dim]{task.fields[left]}"),
    ]
    with Live(*columns, console=Console(stderr=True)) as live:
        yield Progress(total, description, done, live, silent)


def _line(facts: dict[str, float | str]) -> str:
    """Facts in one line: ``loss 1.47  41 203 tokens/s  31% MFU``."""
    shown = []
    for name, value in facts.items():
        if name in UNSEEN or (name == "examples_per_second" and "tokens_per_second" in facts):
            continue
        if isinstance(value, str):
            shown.append(f"{words(name)} {value}")
        elif name == "utilisation":
            shown.append(f"{value:.0%} MFU")
        elif name.endswith("_per_second"):
            shown.append(f"{number(value)} {words(name)}")
        else:
            shown.append(f"{words(name)} {number(value)}")
    return "  ".join(shown)
