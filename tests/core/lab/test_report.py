"""The report holds everything it was given, fetches nothing, and draws nothing that is not a number."""

import base64
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from canon.core.lab import Lab, Measurement, Run, claim, verify
from canon.core.lab.charts import Series, line_chart, linear_ticks, log_ticks, moving_average, strip
from canon.core.lab.wording import duration, number, spread

VOID = {"meta", "img", "br", "line", "circle", "path"}


class Page(HTMLParser):
    """What matters of a page: balanced tags, everything a browser would fetch, visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        fetched = ["src", "srcset", "poster", "data", "xlink:href", "action"]
        if tag not in ("a",):
            fetched.append("href")
        self.fetched += [attributes[name] for name in fetched if attributes.get(name)]
        assert not any(name.startswith("on") for name in attributes), attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words += data


def page_of(run: Run) -> Page:
    text = run.report().read_text()
    assert "@import" not in text
    assert "url(" not in text
    page = Page(text)
    assert all(address.startswith("data:") for address in page.fetched)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r'(?:d|x|y|x1|x2|y1|y2|cx|cy)="[^"]*(?:nan|inf)', text)
    return page


@pytest.fixture
def run(tmp_path):
    run = Run.create(
        "nosuch", "laptop", {"d_model": 8, "training": {"learning_rate": 3e-4, "betas": [0.9, 0.95]}}, tmp_path
    )
    run.track = False
    return run


def test_an_empty_run_still_has_a_page(run):
    page = page_of(run)
    assert "This run has logged no metrics." in page.words
    assert "learning_rate" in page.words
    assert "3×10⁻⁴" in page.words


def test_every_sample_of_every_kind_is_in_the_page(run):
    from matplotlib.figure import Figure

    for index in range(50):
        run.text(f"text {index}", f"<script>alert({index})</script> & so on")
    for step in (1, 2, 3):
        run.text("poem", f"verse of step {step}", step=step)
        run.image("digits", torch.full((1, 4, 4), step / 3), step=step)
        run.audio("tone", torch.zeros(1, 10) + step / 10, rate=8000, step=step)
    figure = Figure()
    figure.subplots().plot([1, 2])
    run.figure("curve", figure)
    run.table("scores", [{"task": "a|b", "top_1": 0.12345}, {"task": None, "top_1": 3, "extra": True}])
    run.table("nothing", [])
    page = page_of(run)
    for index in range(50):
        assert f"<script>alert({index})</script> & so on" in page.words
    for step in (1, 2, 3):
        assert f"verse of step {step}" in page.words
    for row in run.samples():
        if row["kind"] in ("image", "figure", "audio"):
            data = base64.b64encode((run.path / "samples" / row["file"]).read_bytes()).decode()
            assert sum(address.endswith(f";base64,{data}") for address in page.fetched) == 1
    for cell in ("a|b", "0.1235", "extra", "yes", "An empty table."):
        assert cell in page.words


def test_curves_survive_gaps_spikes_and_nothing_at_all(run):
    for step in range(1, 2001):
        run.log(step, loss=math.nan if 500 < step < 600 else math.exp(-step / 50) + 1e-9, never=math.nan, constant=1.0)
    run.log(2000, validation_loss=0.5, learning_rate=0.0, lone=math.inf)
    page = page_of(run)
    assert "loss: 99 values are not finite, the first at step 501" in page.words
    assert "2000 values are not finite" in page.words
    assert page.words.count("no value is finite") == 2
    assert "validation 0.5" in page.words


def test_the_first_figure_is_what_has_a_held_out_side(run):
    for step in range(1, 4):
        run.log(step, loss=3.0, nll=2.0, tokens_per_second=10.0, validation_nll=2.5)
    page = page_of(run)
    assert re.findall(r"Figure \d\. (\S+)\.", page.words) == ["Nll", "Loss", "Tokens/s"]
    assert "training 2" in page.words
    assert "validation 2.5" in page.words


def test_stages_and_environment_and_commands(run):
    run.environment(command=["canon", "run", "nosuch", "--training.steps", "7"], commit=None)
    run.summary(parameters=124_000_000, wall_time="6 min 12 s")
    stage = run.stage("autoencoder")
    stage.log(1, loss=2.0)
    stage.text("reconstruction", "of the stage")
    page = page_of(run)
    for piece in ("Stage: autoencoder", "of the stage", "124 M", "6 min 12 s", "canon run nosuch --training.steps 7"):
        assert piece in page.words
    assert "canon verify nosuch" in page.words


def test_claims_show_verdict_numbers_threshold_and_their_figures(run, tmp_path):
    @claim("Two is more than <one>", source="§2", passes="two >= 2 and ratio <= 2 * two", minutes=0.1)
    def two(lab: Lab, sabotage: bool = False) -> Measurement:
        lab.text("remark", f"drawn by seed {lab.seed}")
        return Measurement(two=1.0 if sabotage else 2.0 + lab.seed, ratio=math.nan if sabotage else 1.0)

    @claim("This one breaks", source="§3", passes="x > 0", minutes=0.1)
    def broken(lab: Lab, sabotage: bool = False) -> Measurement:
        raise RuntimeError("no such data")

    run.claims([verify(tested, root=tmp_path, quiet=True) for tested in (two, broken)])
    page = page_of(run)
    for piece in ("Two is more than <one>", "reproduced", "3 ± 1", "two ≥ 2", "ratio ≤ 2 × two", "not a number"):
        assert piece in page.words
    assert "drawn by seed 0" in page.words
    assert "drawn by seed 1" not in page.words
    assert "RuntimeError: no such data" in page.words


def test_the_catalog_gives_the_title(tmp_path):
    from canon.catalog import entries

    entry = next(entry for entry in entries() if entry.system)
    page = page_of(Run.create(entry.id, "laptop", {}, tmp_path))
    assert entry.title in page.words
    assert str(entry.year) in page.words


# Drawing


def coordinates(svg: str, tag: str, *names: str) -> list[tuple[float, ...]]:
    found = re.findall(rf"<{tag} [^>]*>", svg)
    return [tuple(float(re.search(rf'\b{name}="([^"]+)"', element).group(1)) for name in names) for element in found]


def test_points_stand_where_the_axis_says():
    svg = line_chart([Series("", [0, 5, 10], [0.0, 1.0, 4.0])], 400, 200, "test")
    points = coordinates(svg, 'circle class="s0"', "cx", "cy")
    grid = sorted({y for (y,) in coordinates(svg, 'line class="grid"', "y1")}, reverse=True)
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] == pytest.approx(grid[0], abs=0.1)  # 0 on the lowest rule
    assert points[2][1] == pytest.approx(grid[-1], abs=0.1)  # 4 on the highest
    assert (points[0][1] - points[1][1]) * 4 == pytest.approx(points[0][1] - points[2][1], abs=0.5)


def test_long_lines_keep_their_extremes_and_their_gaps():
    values = [1.0] * 5000
    values[1234], values[4321] = 9.0, math.nan
    svg = line_chart([Series("", list(range(5000)), values)], 400, 200, "test")
    path = max(re.findall(r'd="([^"]+)"', svg), key=len)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert len(heights) < 500
    assert min(heights) < 30 < max(heights)  # the spike reaches the top
    assert path.count("M") == 2  # the gap is one


def test_labels_at_the_end_do_not_cover_each_other():
    lines = [Series(f"line {index}", [0, 1], [0.0, 1 + index / 1000]) for index in range(5)]
    svg = line_chart(lines, 400, 200, "test")
    heights = sorted(y for (y,) in coordinates(svg, 'text class="s[0-9]"', "y"))
    assert all(after - before >= 14.9 for before, after in pairwise(heights))
    assert 8 <= heights[0] <= heights[-1] <= 200  # inside the drawing


def test_a_smooth_line_is_not_averaged_and_a_noisy_one_is():
    steps = list(range(1, 201))
    warmup = Series("", steps, [min(step / 20, 1.0) for step in steps])
    noisy = Series("", steps, [1 + (step % 2) * 0.5 for step in steps])
    assert warmup.average() is None
    assert noisy.average() is not None
    averaged = moving_average([1 + (step % 2) * 0.5 for step in steps])
    assert averaged[100] == pytest.approx(1.25, abs=0.05)
    assert averaged[0] == 1.5  # no smoothing where a curve begins


def test_strip_places_seeds_beside_the_threshold():
    svg = strip([2.0, 3.0], [math.inf, 0.5], [1.0], "test")
    seeds = coordinates(svg, 'circle class="seed"', "cx")
    (limit,) = coordinates(svg, 'line class="limit"', "x1")
    (mean,) = coordinates(svg, 'line class="mean"', "x1")
    crosses = [float(x) for x in re.findall(r'class="cross" d="M([\d.]+)', svg)]
    assert limit[0] < seeds[0][0] < mean[0] < seeds[1][0]
    assert mean[0] == pytest.approx((seeds[0][0] + seeds[1][0]) / 2, abs=0.2)
    assert crosses[0] > seeds[1][0] - 10  # what diverged stands at the edge
    assert crosses[1] < limit[0]


def test_ticks_span_the_data_in_round_steps():
    assert linear_ticks(0.0, 10.0, 5) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(1.38, 4.2, 5) == [1, 2, 3, 4, 5]
    assert linear_ticks(-3e-5, 2e-5, 5) == pytest.approx([-3e-5, -2e-5, -1e-5, 0, 1e-5, 2e-5])
    assert linear_ticks(7.0, 7.0, 4)[0] < 7 < linear_ticks(7.0, 7.0, 4)[-1]
    assert log_ticks(0.5, 2000) == [0.1, 1, 10, 100, 1000, 10000]
    assert len(log_ticks(1e-30, 1e30)) <= 8


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1.4731, "1.473"),
        (-2.0, "−2"),
        (3e-4, "3×10⁻⁴"),
        (0.00123, "0.00123"),
        (41_203.4, "41 203"),
        (1_234_567, "1.235 M"),
        (175e9, "175 B"),
        (3.14e23, "3.14×10²³"),
        (math.nan, "not a number"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_as_people_read_them(value, shown):
    assert number(value) == shown


def test_spans_and_spreads():
    assert [duration(seconds) for seconds in (0.04, 9.97, 42, 200, 7500)] == [
        "0.0 s",
        "10 s",
        "42 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    entry = {"mean": 0.88571, "sd": 0.0025091, "interval": [0.87947, 0.89194]}
    assert spread(entry) == "0.8857 ± 0.0025 [0.8795, 0.8919]"
    assert spread({"mean": 2.0, "sd": None, "interval": None}) == "2"
    assert spread({"mean": 2.0, "sd": 0.0, "interval": [2.0, 2.0]}) == "2"
