"""Claims as code: what a paper says, as an experiment with a threshold fixed beforehand and a sabotage.

    @claim("Scaling scores by 1/sqrt(d_k) keeps attention soft at initialisation", source="§3.2.1",
           passes="scaled >= 0.85 and unscaled <= 0.10", seeds=3, minutes=0.1)
    def scaled_scores(lab: Lab, sabotage: bool = False) -> Measurement:
        ...
        return Measurement(scaled=..., unscaled=...)

The function measures; it never judges. Where training may diverge, it catches that and measures infinity. The
threshold is one line in the names of what is measured, applied by :func:`judge` to the mean over seeds, to each seed,
and to the sabotaged run, which must fail it.
"""

import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from canon.core.lab.environment import machine
from canon.core.lab.files import merge_json, plain, to_json, write_atomic
from canon.core.lab.progress import show_progress
from canon.core.lab.run import Run
from canon.core.lab.sources import fingerprint
from canon.core.lab.statistics import mean_interval
from canon.core.lab.threshold import Threshold

Verdict = Literal["reproduced", "partly", "not reproduced here", "error"]
QUICK_MINUTES = 0.5


class Measurement:
    """What one run of an experiment measured: ``Measurement(scaled=0.886, unscaled=0.139)``.

    Attributes:
        numbers: the measured numbers by name; booleans count as 0 and 1.

    Raises:
        ValueError: nothing was measured.
    """

    def __init__(self, **numbers: Any):
        if not numbers:
            raise ValueError("a measurement needs at least one number")
        self.numbers: dict[str, float] = {name: float(value) for name, value in numbers.items()}

    def __repr__(self) -> str:
        return f"Measurement({', '.join(f'{name}={value:.6g}' for name, value in self.numbers.items())})"


class Lab:
    """What an experiment is given. Making one seeds Python, NumPy and torch with its seed.

    Args:
        seed: the run's seed.
        workdir: folder for whatever the experiment writes; an interrupted experiment finds it again.
        device: where to compute.
        threads: threads to compute with; None leaves torch's choice.

    Attributes:
        run: the record of this experiment, to pass to ``fit`` when it trains one thing.
    """

    def __init__(self, seed: int, workdir: str | Path, device: str = "cpu", threads: int | None = None):
        import numpy
        import torch

        self.seed, self.workdir, self.device, self.threads = seed, Path(workdir), device, threads
        self.run = Run(workdir)
        self.run.quiet, self.run.track = True, False
        if threads is not None:
            torch.set_num_threads(threads)
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)

    def stage(self, name: str, config: Any = None) -> Run:
        """A run of its own for each thing the experiment trains: ``fit(model, data, lab.stage("control"), ...)``."""
        return self.run.stage(name, config)

    def log(self, step: int, **metrics: float) -> None:
        """Log metrics of one step."""
        self.run.log(step, **metrics)

    def once(self, name: str, measure: Callable[[], float]) -> float:
        """A number that is measured once: an interrupted experiment that goes on finds it as it was.

        It is for what differs from one time to the next, such as the seconds that a step takes.
        """
        path = self.workdir / f"{name}.json"
        if not path.exists():
            write_atomic(path, json.dumps(float(measure())))
        return json.loads(path.read_text())

    def text(self, name: str, value: str) -> None:
        """Keep a text."""
        self.run.text(name, value)

    def figure(self, name: str, value: Any) -> None:
        """Keep a matplotlib figure; the first seed's figures stand in the report beside the claim."""
        self.run.figure(name, value)

    def table(self, name: str, value: list[dict[str, Any]]) -> None:
        """Keep a table, as a list of rows."""
        self.run.table(name, value)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper with the experiment that tests it; made by :func:`claim`, called like the function."""

    statement: str
    source: str
    passes: Threshold
    partly: Threshold
    seeds: int
    sabotages: int
    minutes: float
    experiment: Callable[..., Measurement]

    @property
    def name(self) -> str:
        """The function's name."""
        return self.experiment.__name__

    @property
    def system(self) -> str:
        """The system it is about: the last part of the name of the module it stands in."""
        return self.experiment.__module__.rsplit(".", 1)[-1]

    @property
    def quick(self) -> bool:
        """Whether ``canon run`` and continuous integration verify it: half a minute at most."""
        return self.minutes <= QUICK_MINUTES

    def __call__(self, lab: Lab, sabotage: bool = False) -> Measurement:
        """Run the experiment once."""
        return self.experiment(lab, sabotage)


def claim(
    statement: str,
    *,
    source: str,
    passes: str,
    minutes: float,
    seeds: int = 3,
    partly: str | None = None,
    sabotages: int = 1,
) -> Callable[[Callable[..., Measurement]], Claim]:
    """Declare a claim over a function ``(lab: Lab, sabotage: bool = False) -> Measurement``.

    Args:
        statement: the claim in one sentence.
        source: where the paper makes it, such as ``"§3.2.1"`` or ``"Table 2"``.
        passes: the threshold, a :class:`Threshold` line over the measured names.
        minutes: of the whole verification, all seeds and the sabotage, on two CPU cores.
        seeds: how many seeds, numbered from 0; 1 for what is deterministic.
        partly: a weaker threshold, fixed beforehand as well: the main part of the claim, such as its direction. It
            is what every single seed must meet. By default it is ``passes`` itself.
        sabotages: how many seeds of the sabotaged experiment to run.
    """
    if seeds < 1 or not 1 <= sabotages <= seeds:
        raise ValueError("a claim needs at least one seed, and one sabotaged run up to one for each seed")
    threshold = Threshold(passes)
    weaker = threshold if partly is None else Threshold(partly)
    return lambda experiment: Claim(statement, source, threshold, weaker, seeds, sabotages, minutes, experiment)


def claims_of(module: ModuleType) -> list[Claim]:
    """The claims a module defines, in the order they stand; claims it imported from elsewhere are not its own."""
    found = [value for value in vars(module).values() if isinstance(value, Claim)]
    return [claim for claim in found if claim.experiment.__module__ == module.__name__]


@dataclass(frozen=True)
class Record:
    """What the verification of a claim found: mean, sd, interval and values of what was measured, by name."""

    system: str
    claim: str
    statement: str
    source: str
    passes: str
    verdict: Verdict
    reason: str
    seeds: int
    measured: dict[str, dict[str, Any]]
    sabotage: dict[str, dict[str, Any]]
    seconds: float
    date: str
    machine: str
    device: str = "cpu"
    partly: str | None = None
    workdir: str | None = field(default=None, compare=False)

    def as_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return plain(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """The record written by :meth:`as_json`."""
        return cls(**{**values, "measured": _floats(values["measured"]), "sabotage": _floats(values["sabotage"])})


def judge(
    passes: Threshold, partly: Threshold, seeds: Sequence[dict[str, float]], sabotaged: Sequence[dict[str, float]]
) -> tuple[Verdict, str]:
    """The verdict on measured numbers, and why.

    - *reproduced*: the mean over seeds passes, each seed holds at least partly, and no sabotaged run passes.
    - *partly*: not reproduced, but the mean holds partly and no sabotaged run does.
    - *not reproduced here*: everything else, whatever the seeds show when a sabotaged run passes as well.

    A number meets the weaker threshold also by meeting ``passes``.

    Args:
        passes: the claim's threshold.
        partly: the weaker one; equal to ``passes`` when none was declared.
        seeds: measured numbers of each seed.
        sabotaged: measured numbers of each sabotaged run.
    """

    def holds_partly(numbers: dict[str, float]) -> bool:
        return passes.holds(numbers) or partly.holds(numbers)

    mean = {name: _mean([numbers[name] for numbers in seeds]) for name in seeds[0]}
    if any(passes.holds(numbers) for numbers in sabotaged):
        return "not reproduced here", "the sabotaged run passes too, so the experiment shows nothing"
    reversed_seeds = [str(seed) for seed, numbers in enumerate(seeds) if not holds_partly(numbers)]
    if passes.holds(mean) and not reversed_seeds:
        return "reproduced", "the mean over seeds passes, every seed agrees, and the sabotaged run fails"
    missed = "; ".join(part.text for part in passes.parts() if not part.holds(mean))
    if not holds_partly(mean):
        return "not reproduced here", f"the mean over seeds misses {missed}"
    if any(holds_partly(numbers) for numbers in sabotaged):
        return "not reproduced here", "only the weaker threshold holds, and it holds for the sabotaged run too"
    if passes.holds(mean):
        return "partly", f"the mean over seeds passes, but seed {', '.join(reversed_seeds)} does not"
    return "partly", f"the mean over seeds meets the weaker threshold but misses {missed}"


def verify(
    claim: Claim,
    *,
    root: str | Path = "runs",
    device: str = "cpu",
    threads: int | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Record:
    """Run a claim's every seed, then its sabotage, and judge.

    Each finished run is kept under ``root/<system>/claims/<claim>/<fingerprint>/``, so an interrupted verification
    goes on where it stopped. The fingerprint covers every source file of Canon that the claim reaches: after an edit
    to any of them it starts anew. An experiment that raises gives a record with the verdict ``error``.

    Args:
        claim: what to verify.
        root: folder of the runs; the record is kept in ``root/<system>/claims/claims.json`` too.
        device: where to compute.
        threads: threads to compute with; None leaves torch's choice.
        fresh: forget what an earlier verification left.
        quiet: show no progress.
    """
    from canon.core.training.fit import Interrupted  # late: it brings torch

    folder = Path(root) / claim.system / "claims" / claim.name / fingerprint(claim.experiment, device)
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    trials = [(seed, False) for seed in range(claim.seeds)] + [(seed, True) for seed in range(claim.sabotages)]
    honest: list[dict[str, float]] = []
    sabotaged: list[dict[str, float]] = []
    seconds, began = 0.0, time.perf_counter()
    try:
        with show_progress(len(trials), f"{claim.system}: {claim.name}", silent=quiet) as progress:
            for done, (seed, sabotage) in enumerate(trials):
                workdir = folder / (f"sabotage{seed}" if sabotage else f"seed{seed}")
                began = time.perf_counter()
                numbers, spent = _trial(claim, Lab(seed, workdir, device, threads), sabotage)
                (sabotaged if sabotage else honest).append(numbers)
                seconds += spent
                progress.update(done + 1, run=workdir.name)
        verdict, reason = judge(claim.passes, claim.partly, honest, sabotaged)
    except Interrupted as stop:  # by Ctrl-C while the experiment trained: not a finding about the claim
        raise KeyboardInterrupt from stop
    except Exception as error:  # whatever an experiment may raise belongs in the record, not in a lost traceback
        seconds += time.perf_counter() - began
        first_line = next(iter(str(error).strip().splitlines()), "")
        verdict, reason = "error", f"{type(error).__name__}: {first_line}".rstrip(": ")
    record = Record(
        system=claim.system,
        claim=claim.name,
        statement=claim.statement,
        source=claim.source,
        passes=claim.passes.text,
        verdict=verdict,
        reason=reason,
        seeds=claim.seeds,
        measured=_spread(honest),
        sabotage=_spread(sabotaged),
        seconds=round(seconds, 2),
        date=datetime.now(UTC).date().isoformat(),
        machine=machine(),
        device=device,
        partly=claim.partly.text if claim.partly is not claim.passes else None,
        workdir=str(folder),
    )
    merge_json(Path(root) / claim.system / "claims" / "claims.json", {claim.name: record})
    return record


def _trial(claim: Claim, lab: Lab, sabotage: bool) -> tuple[dict[str, float], float]:
    """Numbers and seconds of one run, taken from an earlier verification where it has finished that run."""
    result = lab.workdir / "result.json"
    if not result.is_file():
        lab.run.truncate_after(-1)  # what an interrupted attempt logged; the stages it trained resume by themselves
        began = time.perf_counter()
        measurement = claim(lab, sabotage)
        if not isinstance(measurement, Measurement):
            raise TypeError(f"{claim.name} returned {type(measurement).__name__}, not a Measurement")
        claim.passes.holds(measurement.numbers)  # raises now, not after hours, if a number it speaks of is missing
        seconds = time.perf_counter() - began
        write_atomic(result, to_json({"numbers": measurement.numbers, "seconds": seconds}) + "\n")
    stored = json.loads(result.read_text("utf-8"))
    return {name: float(value) for name, value in stored["numbers"].items()}, stored["seconds"]


def _spread(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation, its 95% interval (both None for one run) and values of each number over runs."""
    spread = {}
    for name in runs[0] if runs else ():
        values = [numbers[name] for numbers in runs if name in numbers]
        finite = len(values) > 1 and all(abs(value) < sys.float_info.max for value in values)
        deviation = statistics.stdev(values) if finite else None
        interval = list(mean_interval(values)) if finite else None
        spread[name] = {"mean": _mean(values), "sd": deviation, "interval": interval, "values": values}
    return spread


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # fmean refuses infinities of both signs, which are nan here


def _floats(spread: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Undo what JSON does to numbers that are not finite."""
    return {
        name: {**entry, "mean": float(entry["mean"]), "values": [float(value) for value in entry["values"]]}
        for name, entry in spread.items()
    }
