"""Curves and dot strips as inline SVG: no script, no font file; colours come from the page, so dark mode just works.

Classes used: ``s0`` ... ``s5`` (series colours), ``grid``, ``axis``, ``raw`` (a noisy line behind its average).
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from canon.core.lab.wording import number

MOST_POINTS = 400  # drawn in a line: more than a page has pixels for
SMOOTH_FROM = 60  # points from which a noisy line gets a moving average drawn over it
NOISE = 0.002  # median distance from the moving average, as a share of the range, that makes a line noisy
MARKED = 30  # points up to which each is marked by a dot
COLOURS = 6
LOG_FROM = 200  # ratio of the greatest to the least of positive values from which their axis is logarithmic


@dataclass(frozen=True)
class Series:
    """One line of a chart: values over steps. Values that are not finite leave a gap."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]

    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(step, value) for step, value in zip(self.steps, self.values) if math.isfinite(value)]

    def average(self) -> "Series | None":
        """The moving average of a long noisy line, with the same gaps; None for one that is short or smooth already."""
        points = self.finite()
        if len(points) < SMOOTH_FROM:
            return None
        raw = [value for _, value in points]
        averaged = moving_average(raw)
        noise = statistics.median(abs(value - mean) for value, mean in zip(raw, averaged))
        if noise <= NOISE * (max(raw) - min(raw)):
            return None
        rest = iter(averaged)
        return Series(self.name, self.steps, [next(rest) if math.isfinite(v) else math.nan for v in self.values])


@dataclass(frozen=True)
class Frame:
    """Where a chart's axes stand, in pixels, and the data they span."""

    left: float
    right: float
    top: float
    bottom: float
    steps: tuple[float, float]
    values: tuple[float, float]
    log: bool

    def x(self, step: float) -> float:
        """Pixel of a step; the middle when there is only one."""
        first, last = self.steps
        return self.left + ((step - first) / (last - first) if last > first else 0.5) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Pixel of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (*self.values, value))
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def axes(self, ticks: Sequence[float]) -> list[str]:
        """Horizontal rules at the value ticks and a step axis."""
        parts = []
        for tick in ticks:
            y = f"{self.y(tick):.1f}"
            parts.append(f'<line class="grid" x1="{self.left:.1f}" x2="{self.right:.1f}" y1="{y}" y2="{y}"/>')
            label = f'x="{self.left - 7:.1f}" y="{self.y(tick) + 4:.1f}" text-anchor="end"'
            parts.append(f"<text {label}>{number(tick)}</text>")
        first, last = self.steps
        steps = linear_ticks(first, last, max(3, int((self.right - self.left) // 90))) if last > first else [first]
        steps = [step for step in steps if first <= step <= last]
        base = self.bottom
        parts.append(f'<line class="axis" x1="{self.left:.1f}" x2="{self.right:.1f}" y1="{base}" y2="{base}"/>')
        for step in steps:
            x = f"{self.x(step):.1f}"
            parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
            label = f"step {number(step)}" if step == steps[0] else number(step)
            parts.append(f'<text x="{x}" y="{base + 18}" text-anchor="middle">{label}</text>')
        return parts

    def path(self, line: Series) -> str:
        """SVG path of a line: a gap at every value that is not finite, thinned where points outnumber pixels."""
        values = line.values
        commands, pen = [], "M"
        for index in _extremes(values) if len(values) > MOST_POINTS else range(len(values)):
            if math.isfinite(values[index]):
                commands.append(f"{pen}{self.x(line.steps[index]):.1f} {self.y(values[index]):.1f}")
                pen = "L"
            else:
                pen = "M"
        return "".join(commands)


def line_chart(series: Sequence[Series], width: int, height: int, label: str) -> str:
    """Lines over steps with their names and last values at the right end, as an ``<svg>`` element.

    Args:
        series: at most six, with at least one finite value among them.
        width: of the drawing, in CSS pixels; text stands at 12.
        height: of the drawing.
        label: what the drawing shows, for readers that cannot see it.
    """
    drawn = [(index, line, line.average()) for index, line in enumerate(series[:COLOURS]) if line.finite()]
    xs = [step for _, line, _ in drawn for step, _ in line.finite()]
    ys = [value for _, line, _ in drawn for _, value in line.finite()]
    log = min(ys) > 0 and max(ys) > LOG_FROM * min(ys)
    ticks = log_ticks(min(ys), max(ys)) if log else linear_ticks(min(ys), max(ys), max(3, height // 55))
    ends = [(average or line).finite()[-1][1] for _, line, average in drawn]
    names = [f"{line.name} {number(end)}".strip() for (_, line, _), end in zip(drawn, ends)]
    frame = Frame(
        left=10 + 6.4 * max(len(number(tick)) for tick in ticks),
        right=max(width - 10 - 6.3 * max(map(len, names)), width / 2),
        top=8,
        bottom=height - 24,
        steps=(min(xs), max(xs)),
        values=(ticks[0], ticks[-1]),
        log=log,
    )
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    parts += frame.axes(ticks)
    for index, line, average in drawn:
        if average:
            parts.append(f'<path class="raw s{index}" d="{frame.path(line)}"/>')
        parts.append(f'<path class="s{index}" d="{frame.path(average or line)}"/>')
        if len(points := line.finite()) <= MARKED:
            dots = [(frame.x(step), frame.y(value)) for step, value in points]
            parts += [f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in dots]
    labels = [(frame.y(end), index, name) for end, (index, _, _), name in zip(ends, drawn, names)]
    for y, index, name in _apart(labels, 15, frame.top + 4, frame.bottom):
        parts.append(f'<text class="s{index}" x="{frame.right + 7:.1f}" y="{y + 4:.1f}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def strip(values: Sequence[float], sabotaged: Sequence[float], limits: Sequence[float], label: str) -> str:
    """Seeds as dots, their mean as a bar, sabotaged runs as crosses and the threshold as a line, on one scale."""
    width, height, margin = 260, 30, 9
    known = [v for v in [*values, *sabotaged, *limits] if math.isfinite(v)]
    low, high = min(known), max(known)
    spread = (high - low) or abs(high) or 1.0
    low, high = low - 0.04 * spread, high + 0.04 * spread

    def place(value: float) -> float:
        return margin + (min(max(value, low), high) - low) / (high - low) * (width - 2 * margin)

    parts = [f'<svg class="strip" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    parts.append(f'<line class="axis" x1="{margin}" x2="{width - margin}" y1="15" y2="15"/>')
    parts.extend(f'<line class="limit" x1="{place(v):.1f}" x2="{place(v):.1f}" y1="2" y2="28"/>' for v in limits)
    seeds = [v for v in values if not math.isnan(v)]
    parts.extend(f'<circle class="seed" cx="{place(v):.1f}" cy="15" r="4"/>' for v in seeds)
    if len(seeds) == len(values) and seeds:
        mean = place(math.fsum(seeds) / len(seeds))
        parts.append(f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="7" y2="23"/>')
    for value in (v for v in sabotaged if not math.isnan(v)):
        x = place(value)
        parts.append(f'<path class="cross" d="M{x - 4:.1f} 11l8 8m0-8l-8 8"/>')
    return "".join([*parts, "</svg>"])


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that span ``[low, high]``."""
    if high == low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (-1.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * multiple for multiple in (1, 2, 2.5, 5, 10) if power * multiple >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that span ``[low, high]``, thinned to at most seven."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    return [10.0**exponent for exponent in range(first, last + stride, stride)]


def moving_average(values: Sequence[float]) -> list[float]:
    """Moving average over a twentieth of the values, centred; the window shrinks at the start, where curves are steep.

    At the end it loses its right half only: shrinking there would let the last noisy value stand for all.
    """
    half = max(1, len(values) // 40)
    sums = [0.0, *itertools.accumulate(values)]
    averaged = []
    for index in range(len(values)):
        first, last = index - min(half, index), min(index + min(half, index), len(values) - 1)
        averaged.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return averaged


def _extremes(values: Sequence[float]) -> list[int]:
    """Indices of each bucket's least and greatest value and of what is not finite: no spike and no gap is lost."""
    size = math.ceil(len(values) / (MOST_POINTS // 2))
    kept = {0, len(values) - 1}
    for start in range(0, len(values), size):
        bucket = range(start, min(start + size, len(values)))
        finite = [index for index in bucket if math.isfinite(values[index])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        kept |= set([index for index in bucket if not math.isfinite(values[index])][:1])
    return sorted(kept)


def _apart(ends: list[tuple[float, int, str]], gap: float, top: float, bottom: float) -> list[tuple[float, int, str]]:
    """Move labels so that none covers another, keeping their order and staying inside ``[top, bottom]``."""
    ordered = sorted(ends)
    places: list[float] = []
    for y, _, _ in ordered:
        places.append(max(y, places[-1] + gap) if places else max(y, top))
    limit = bottom
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return [(place, index, name) for place, (_, index, name) in zip(places, ordered)]
