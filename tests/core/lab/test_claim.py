"""Claims: verdicts that cannot flatter, and verifications that survive interruption."""

import json
import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from canon.core.lab import Lab, Measurement, Record, claim, claims_of, verify
from canon.core.lab.claim import judge
from canon.core.lab.sources import ROOT, closure, fingerprint
from canon.core.lab.threshold import Threshold
from canon.core.training.fit import Interrupted


def values(*numbers):
    return [{"x": number} for number in numbers]


# Verdicts


@pytest.mark.parametrize(
    ("passes", "partly", "seeds", "sabotaged", "verdict"),
    [
        ("x >= 1", None, (1.2, 1.3, 1.1), (0.0,), "reproduced"),
        ("x >= 1", None, (1.2, 1.3, 1.1), (1.0,), "not reproduced here"),  # the sabotage passes
        ("x >= 1", None, (1.2, 1.3, 1.1), (0.0, 1.0), "not reproduced here"),  # one of two sabotaged runs passes
        ("x >= 1", None, (2.0, 2.0, -0.5), (0.0,), "partly"),  # the mean passes, one seed does not
        ("x >= 1", None, (0.9, 0.9, 1.1), (0.0,), "not reproduced here"),  # the best seed passes, the mean does not
        ("x >= 1", "x > 0", (0.5, 0.6, 0.4), (-1.0,), "partly"),  # weaker threshold
        ("x >= 1", "x > 0", (0.5, 0.6, 0.4), (0.1,), "not reproduced here"),  # ... which the sabotage meets too
        ("x >= 1", "x > 0", (1.5, 1.6, 0.4), (0.1,), "reproduced"),  # no seed reverses, the sabotage fails
        ("x >= 1", "x > 0", (3.0, 3.0, -0.4), (-1.0,), "partly"),  # one seed reverses
        ("x >= 1", "x > 0", (-0.5, 0.1, 0.1), (-1.0,), "not reproduced here"),
        ("x >= 1", None, (float("nan"), 2.0, 2.0), (0.0,), "not reproduced here"),
        ("x <= 1", None, (0.5, 0.5, 0.5), (float("nan"),), "reproduced"),  # a sabotage that diverges has failed
        ("x >= 1", None, (float("inf"), 2.0, 2.0), (0.0,), "reproduced"),
        ("x >= 1", None, (float("inf"), float("-inf"), 2.0), (0.0,), "not reproduced here"),
    ],
)
def test_verdicts(passes, partly, seeds, sabotaged, verdict):
    threshold = Threshold(passes)
    weaker = Threshold(partly) if partly else threshold
    assert judge(threshold, weaker, values(*seeds), values(*sabotaged))[0] == verdict


def test_reasons_say_what_is_wrong():
    threshold = Threshold("x >= 1 and x <= 3")
    assert "sabotaged run passes too" in judge(threshold, threshold, values(2, 2), values(2))[1]
    assert "seed 1 does not" in judge(threshold, threshold, values(2.5, 0.5), values(0))[1]
    assert judge(threshold, threshold, values(4, 4), values(0))[1] == "the mean over seeds misses x <= 3"


# Thresholds


@pytest.mark.parametrize(
    ("text", "numbers", "holds"),
    [
        ("a >= 0.9 and b <= .5", {"a": 0.9, "b": 0.5}, True),
        ("a >= 0.9 and b <= .5", {"a": 0.9, "b": 0.51}, False),
        ("0.1 <= ratio <= 10", {"ratio": 10.1}, False),
        ("a >= 2 * b or not a > 0", {"a": -1, "b": 3}, True),
        ("abs(a - b) < 1e-5", {"a": 1.0, "b": 1.000001}, True),
        ("max(a, b) / min(a, b) < 2", {"a": 1.0, "b": 3.0}, False),
        ("not a > 1", {"a": float("nan")}, False),
        ("a / b > 1", {"a": 1.0, "b": 0.0}, False),
        ("a == 1", {"a": 1.0}, True),
    ],
)
def test_thresholds_hold_or_not(text, numbers, holds):
    assert Threshold(text).holds(numbers) is holds


@pytest.mark.parametrize(
    "text",
    [
        "entropy >= 0.9 log n with the scale",
        "a",
        "a and b >= 1",
        "1",
        "",
        "a.b > 1",
        "a[0] > 1",
        "open('x') > 1",
        "__import__('os') == 1",
        "max(a, key=b) > 1",
        "a > 'b'",
        "a > True",
        "(lambda: 1)() > 0",
        "[x for x in a] > 1",
    ],
)
def test_only_conditions_on_numbers_are_thresholds(text):
    with pytest.raises(ValueError, match="is not a condition"):
        Threshold(text)


def test_limits_are_what_a_strip_can_draw():
    assert Threshold("0.1 <= ratio <= 10").limits() == ("ratio", [0.1, 10.0])
    assert Threshold("a >= 2 * b").limits() is None
    assert [part.text for part in Threshold("a > 1 and (b > 2 or c > 3) and d < 4").parts()] == [
        "a > 1",
        "b > 2 or c > 3",
        "d < 4",
    ]


# Verification


def declared(experiment, **options):
    options = {"source": "§1", "passes": "x >= 1", "minutes": 0.1} | options
    return claim("The statement", **options)(experiment)


def test_every_seed_runs_before_the_sabotage_and_the_mean_decides(tmp_path):
    calls = []

    def experiment(lab: Lab, sabotage: bool = False) -> Measurement:
        calls.append((lab.seed, sabotage))
        return Measurement(x=0.0 if sabotage else [3.0, 1.0, 2.0][lab.seed], steps=torch.tensor(7))

    record = verify(declared(experiment, sabotages=2), root=tmp_path, quiet=True)
    assert calls == [(0, False), (1, False), (2, False), (0, True), (1, True)]
    assert record.verdict == "reproduced"
    reach = 4.302653 / 3**0.5  # Student's t for three values
    interval = pytest.approx([2 - reach, 2 + reach], abs=1e-5)
    assert record.measured["x"] == {"mean": 2.0, "sd": 1.0, "interval": interval, "values": [3.0, 1.0, 2.0]}
    assert record.sabotage["x"] == {"mean": 0.0, "sd": 0.0, "interval": [0.0, 0.0], "values": [0.0, 0.0]}
    assert record.measured["steps"]["mean"] == 7
    assert Record.from_json(json.loads(json.dumps(record.as_json()))) == record
    kept = json.loads((tmp_path / record.system / "claims" / "claims.json").read_text())
    assert kept["experiment"]["verdict"] == "reproduced"


def test_a_lab_seeds_every_random_source(tmp_path):
    def draw(seed):
        Lab(seed, tmp_path)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first, second, other = draw(3), draw(3), draw(4)
    assert first == second
    assert all(a != b for a, b in zip(first, other))


def test_an_interrupted_verification_goes_on_with_the_rest(tmp_path):
    calls, patience = [], [1]

    def experiment(lab: Lab, sabotage: bool = False) -> Measurement:
        calls.append((lab.seed, sabotage))
        lab.log(1, loss=1.0)
        if lab.seed == 2 and patience:
            patience.clear()
            raise KeyboardInterrupt
        return Measurement(x=float("-inf") if sabotage else 2.0)

    tested = declared(experiment)
    with pytest.raises(KeyboardInterrupt):
        verify(tested, root=tmp_path, quiet=True)
    assert calls == [(0, False), (1, False), (2, False)]
    record = verify(tested, root=tmp_path, quiet=True)
    assert calls[3:] == [(2, False), (0, True)]
    assert record.verdict == "reproduced"
    for file in tmp_path.rglob("metrics.jsonl"):
        assert len(file.read_text().splitlines()) == 1  # the interrupted attempt's lines are gone
    assert verify(tested, root=tmp_path, quiet=True).sabotage["x"]["mean"] == float("-inf")
    assert len(calls) == 5
    verify(tested, root=tmp_path, quiet=True, fresh=True)
    assert len(calls) == 9


def test_training_stopped_by_the_user_is_no_finding(tmp_path):
    def experiment(lab: Lab, sabotage: bool = False) -> Measurement:
        raise Interrupted("stopped after step 3")

    with pytest.raises(KeyboardInterrupt):
        verify(declared(experiment), root=tmp_path, quiet=True)


@pytest.mark.parametrize("in_sabotage", [False, True])
def test_an_experiment_that_raises_is_on_record_with_one_line(tmp_path, in_sabotage):
    def experiment(lab: Lab, sabotage: bool = False) -> Measurement:
        if sabotage == in_sabotage and lab.seed == (0 if sabotage else 1):
            raise RuntimeError("shapes do not fit\nand a long explanation")
        return Measurement(x=2.0)

    record = verify(declared(experiment), root=tmp_path, quiet=True)
    assert (record.verdict, record.reason) == ("error", "RuntimeError: shapes do not fit")
    assert record.measured["x"]["values"] == [2.0] * (3 if in_sabotage else 1)


def test_a_threshold_on_what_is_not_measured_stops_after_the_first_run(tmp_path):
    calls = []

    def experiment(lab: Lab, sabotage: bool = False) -> Measurement:
        calls.append(lab.seed)
        return Measurement(y=2.0)

    record = verify(declared(experiment), root=tmp_path, quiet=True)
    assert record.verdict == "error"
    assert "x was not measured (measured: y)" in record.reason
    assert calls == [0]


def test_a_function_that_returns_no_measurement_is_an_error(tmp_path):
    record = verify(declared(lambda lab, sabotage=False: {"x": 2.0}), root=tmp_path, quiet=True)
    assert (record.verdict, record.reason) == ("error", "TypeError: <lambda> returned dict, not a Measurement")


def test_claims_must_have_a_seed_and_a_sabotage():
    for options in ({"seeds": 0}, {"sabotages": 0}, {"seeds": 1, "sabotages": 2}):
        with pytest.raises(ValueError, match="seed"):
            declared(lambda lab, sabotage=False: Measurement(x=1), **options)
    with pytest.raises(ValueError, match="at least one number"):
        Measurement()


def test_claims_of_a_module_in_order_without_those_it_imports():
    module = ModuleType("canon.claims.language.fake")

    def make(name, where):
        def experiment(lab: Lab, sabotage: bool = False) -> Measurement:
            return Measurement(x=1)

        experiment.__name__, experiment.__module__ = name, where
        return declared(experiment)

    module.zebra = make("zebra", module.__name__)
    module.imported = make("imported", "canon.claims.language.other")
    module.ant = make("ant", module.__name__)
    assert [(found.name, found.system) for found in claims_of(module)] == [("zebra", "fake"), ("ant", "fake")]


def test_quick_claims_take_half_a_minute_at_most():
    assert declared(lambda lab: Measurement(x=1), minutes=0.5).quick
    assert not declared(lambda lab: Measurement(x=1), minutes=0.6).quick


# Fingerprints


def test_the_closure_follows_imports_also_those_inside_functions():
    reached = {str(path.relative_to(ROOT)) for path in closure(ROOT / "canon/core/lab/run.py")}
    assert {"canon/core/lab/files.py", "canon/core/errors.py", "canon/core/lab/samples.py"} <= reached
    assert "canon/core/lab/ledger.py" not in reached


def test_an_edit_to_the_source_makes_a_new_fingerprint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = tmp_path / "edited_claims.py"
    source.write_text("def experiment(lab, sabotage=False):\n    return 1\n")
    import edited_claims

    before = fingerprint(edited_claims.experiment, "cpu")
    assert fingerprint(edited_claims.experiment, "cpu") == before
    assert fingerprint(edited_claims.experiment, "cuda") != before
    source.write_text("def experiment(lab, sabotage=False):\n    return 2\n")
    assert fingerprint(edited_claims.experiment, "cpu") != before


def test_a_number_measured_once_outlives_an_interruption(tmp_path):
    times = iter((0.1 + 0.2, 4.0))
    first = Lab(0, tmp_path / "seed0").once("seconds_a_step", lambda: next(times))
    again = Lab(0, tmp_path / "seed0").once("seconds_a_step", lambda: next(times))
    other = Lab(1, tmp_path / "seed1").once("seconds_a_step", lambda: next(times))
    assert (first, again, other) == (0.1 + 0.2, 0.1 + 0.2, 4.0)
