"""The ledger shows what failed as plainly as what held, and knows when it is out of date."""

import json

import pytest

from canon.core.lab import Record, ledger


def record(name: str, verdict: str = "reproduced", **changes) -> Record:
    facts = {
        "system": "gpt2",
        "claim": name,
        "statement": f"Statement of {name}",
        "source": "§2",
        "passes": "x >= 1",
        "verdict": verdict,
        "reason": f"because of {name}",
        "seeds": 3,
        "measured": {"x": {"mean": 1.23456, "sd": 0.0123, "interval": [1.2, 1.27], "values": [1.2, 1.23, 1.26]}},
        "sabotage": {"x": {"mean": float("inf"), "sd": None, "interval": None, "values": [float("inf")]}},
        "seconds": 12.34,
        "date": "2026-01-02",
        "machine": "A processor, 2 cores",
        "workdir": "/somewhere/private",
    }
    return Record(**{**facts, **changes})


@pytest.fixture
def places(tmp_path):
    return {"folder": tmp_path / "records", "page": tmp_path / "RESULTS.md"}


def test_failures_stand_in_the_page_with_their_reasons(places):
    records = [
        record("good"),
        record("half", "partly"),
        record("bad", "not reproduced here"),
        record("broken", "error"),
    ]
    page = ledger.publish(records, **places).read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| Statement")}
    assert list(rows) == [f"Statement of {name}" for name in ("good", "half", "bad", "broken")]
    assert "**not reproduced here**: because of bad" in rows["Statement of bad"]
    assert "**error**: because of broken" in rows["Statement of broken"]
    assert rows["Statement of good"].split("|")[2:] == [
        " §2 ", " `x >= 1` ", " x 1.235 ± 0.012 [1.2, 1.27] (3 seeds) ", " x ∞ ", " **reproduced** ", " 12.3 ", "",
    ]  # fmt: skip
    for verdict in ("reproduced", "partly", "not reproduced here", "error"):
        assert f"| {verdict} | 1 |" in page
    assert "| **all, in 1 system** | **4** |" in page
    assert "Measured on A processor, 2 cores, on 2026-01-02." in page


def test_publishing_again_replaces_and_keeps_the_rest(places):
    ledger.publish([record("one"), record("two")], **places)
    ledger.publish([record("one", "partly"), record("other", system="lora")], **places)
    stored = ledger.committed(places["folder"])
    assert {system: [(r.claim, r.verdict) for r in found] for system, found in stored.items()} == {
        "gpt2": [("one", "partly"), ("two", "reproduced")],
        "lora": [("other", "reproduced")],
    }
    assert "/somewhere/private" not in (places["folder"] / "gpt2.json").read_text()
    json.loads((places["folder"] / "gpt2.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_the_page_is_stale_once_a_record_changes(places):
    assert ledger.stale(**places)
    ledger.publish([record("one")], **places)
    assert not ledger.stale(**places)
    file = places["folder"] / "gpt2.json"
    file.write_text(file.read_text().replace('"partly": null', '"partly": "x > 0"'))
    assert ledger.stale(**places)
    ledger.write(**places)
    assert not ledger.stale(**places)


def test_pipes_and_newlines_cannot_break_the_table(places):
    page = ledger.publish([record("one", statement="a | b\nc")], **places).read_text()
    assert "| a \\| b c | §2 |" in page


def test_records_of_claims_that_are_gone_or_changed_are_orphans(places):
    ledger.publish([record("no_such_claim")], **places)
    assert ledger.orphans(places["folder"]) == ["gpt2/no_such_claim"]


def test_the_committed_page_is_the_one_its_records_make():
    if ledger.RECORDS.is_dir():
        assert not ledger.stale(), "docs/RESULTS.md is out of date: python -m canon.core.lab.ledger"
        assert ledger.orphans() == []
