"""The pages render for every entry, in both languages, at 80 columns; and they tell what the files say."""

import io
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
from rich.cells import cell_len
from rich.console import Console

from canon import catalog
from canon.catalog import status
from canon.catalog.pages import map_json, map_page, show_json, show_page

ENTRIES = catalog.entries()
CLAIMED = [entry for entry in ENTRIES if status.claims_file(entry)]
GPT2 = catalog.find("gpt2")

SYSTEM = '''
"""A system."""
PRESETS: dict[str, object] = {"laptop": object(), **{}, "paper": object()}
'''
CLAIMS = """
from canon.core.lab import Lab, Measurement, claim

@claim("Two is more " "than one", source="Table 1", passes="two >=   2", minutes=0.1, seeds=1)
def more(lab: Lab, sabotage: bool = False) -> Measurement:
    return Measurement(two=2)

def helper():
    return 1

@claim("Water is wet", source="p. 3", passes="wet > 0.5", minutes=4)
def wet(lab: Lab, sabotage: bool = False) -> Measurement:
    return Measurement(wet=1)
"""


def render(page, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(page)
    return console.file.getvalue()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A package of one system with two claims in place of the real one, as working directory."""
    for name, text in {"language/gpt2.py": SYSTEM, "claims/language/gpt2.py": CLAIMS}.items():
        file = tmp_path / "canon" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(status, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_records(file, **verdicts):
    """Records by claim name: (verdict, date) or (verdict, date, threshold)."""
    thresholds = {"more": "two >= 2", "wet": "wet > 0.5"}
    rows = {
        name: {"claim": name, "verdict": row[0], "date": row[1], "passes": row[2] if row[2:] else thresholds[name]}
        for name, row in verdicts.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))


def verdicts(**arguments):
    return {claim.name: claim.verdict for claim in status.claims(GPT2, **arguments)}


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("width", [80, 50, 200])
def test_map_names_everything_within_the_width(lang, width):
    lines = render(map_page(lang=lang), width).splitlines()
    assert max(map(cell_len, lines)) <= width
    rows = {line.split()[1]: line.split()[0] for line in lines if line.split()[:1] in (["●"], ["◐"], ["○"])}
    for entry in ENTRIES:
        assert rows[entry.id] == ("●" if entry.system else "◐" if entry.shown_by else "○")


def test_what_another_system_shows_says_which():
    for entry in ENTRIES:
        if entry.shown_by:
            assert catalog.find(entry.shown_by).system
            assert not entry.system
            assert f"canon run {entry.shown_by}" in " ".join(render(show_page(entry)).split())
    assert catalog.find("illustrated_diffusion").shown_by == "latent_diffusion"


def test_map_of_a_section():
    page = render(map_page("images"))
    assert "Landmark research results\n\n  Image generation models\n" in page
    assert "controlnet" in page
    assert "transformer" not in page


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_show_page(entry, lang):
    page = render(show_page(entry, lang=lang))
    assert max(map(cell_len, page.splitlines())) <= 80
    together = "".join(page.split())
    for text in [entry.by, entry.note_zh if lang == "zh" else entry.note, *(link.url for link in entry.urls)]:
        assert "".join(text.split()) in together
    for name in entry.needs:
        assert name in page


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_show_json_is_plain_data(entry):
    facts = show_json(entry)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["runs"] == bool(entry.system)
    assert all(entry.id in catalog.find(name).needs for name in facts["needed_by"])


def test_map_json_is_plain_data():
    facts = map_json()
    assert json.loads(json.dumps(facts)) == facts
    assert [row["id"] for row in facts["entries"]] == [entry.id for entry in ENTRIES]
    assert len(facts["sections"]) == len(catalog.sections())


@pytest.mark.parametrize("entry", CLAIMED, ids=lambda entry: entry.id)
def test_what_is_parsed_is_what_python_imports(entry):
    from canon.core.lab import claims_of

    module = import_module(entry.system)
    assert status.presets(entry) == list(module.PRESETS)
    imported = claims_of(import_module(entry.system.replace("canon.", "canon.claims.", 1)))
    parsed = status.claims(entry)
    assert parsed
    for ours, theirs in zip(parsed, imported, strict=True):
        assert (ours.name, ours.statement, ours.source) == (theirs.name, theirs.statement, theirs.source)
        assert (ours.passes, ours.seeds, ours.minutes) == (theirs.passes.text, theirs.seeds, theirs.minutes)


def test_presets_and_claims_without_importing(tree):
    assert status.presets(GPT2) == ["laptop", "paper"]
    more, wet = status.claims(GPT2)
    assert (more.statement, more.source, more.passes) == ("Two is more than one", "Table 1", "two >= 2")
    assert (more.seeds, more.minutes, more.verdict) == (1, 0.1, None)
    assert (wet.name, wet.seeds) == ("wet", status.DEFAULT_SEEDS)
    page = render(show_page(GPT2))
    assert "more  not verified yet\n    Two is more than one (Table 1)\n" in page
    assert "passes if two >= 2; one seed, 6 s" in page
    assert "passes if wet > 0.5; 3 seeds, 4 min" in page
    assert "canon train gpt2 --preset paper" in page
    assert "–/2" in render(map_page())


def test_presets_of_a_package(tree):
    (tree / "canon/language/gpt2.py").unlink()
    package = tree / "canon/language/gpt2"
    package.mkdir()
    (package / "__init__.py").write_text('"""A system in parts."""')
    (package / "model.py").write_text(SYSTEM)
    assert status.presets(GPT2) == ["laptop", "paper"]
    assert status.files(GPT2)[0] == package / "__init__.py"


def test_latest_verdict_wins(tree):
    published = tree / "canon/claims/records/gpt2.json"
    write_records(published, more=("reproduced", "2026-05-02"), wet=("partly", "2026-05-02"))
    assert verdicts() == {"more": "reproduced", "wet": "partly"}
    write_records(tree / "runs/gpt2/old/claims.json", wet=("error", "2026-05-01"))
    write_records(tree / "runs/gpt2/new/claims.json", more=("not reproduced here", "2026-05-03"))
    assert verdicts() == {"more": "not reproduced here", "wet": "partly"}
    assert verdicts(runs=tree / "elsewhere") == {"more": "reproduced", "wet": "partly"}
    assert "0/2" in render(map_page())
    assert "1/2" in render(map_page(runs="elsewhere"))
    counts = {row["id"]: row["claims"] for row in map_json(runs="elsewhere")["entries"]}
    assert counts["gpt2"] == {"total": 2, "verified": 2, "reproduced": 1}


def test_latest_of_one_day_is_the_file_written_last(tree):
    first, second = tree / "runs/gpt2/b/claims.json", tree / "runs/gpt2/a/claims.json"
    write_records(first, wet=("error", "2026-05-01"))
    write_records(second, wet=("reproduced", "2026-05-01"))
    os.utime(first, (1, 1))
    assert verdicts()["wet"] == "reproduced"


def test_show_page_tells_verdict_and_numbers(tree):
    file = tree / "runs/gpt2/x/claims.json"
    write_records(file, wet=("reproduced", "2026-05-01"))
    rows = json.loads(file.read_text())
    rows["wet"]["measured"] = {"wet": {"mean": 0.98765, "sd": 0.1, "values": [1.0]}, "far": {"mean": "inf"}}
    file.write_text(json.dumps(rows))
    page = render(show_page(GPT2))
    assert "Claims, 1 of 2 reproduced" in page
    assert "wet  reproduced\n" in page
    assert "measured wet 0.988, far inf on 2026-05-01" in page
    assert "2026-05-01 测得 wet 0.988" in render(show_page(GPT2, lang="zh"))


def test_verdict_of_another_threshold_does_not_count(tree):
    write_records(tree / "runs/gpt2/x/claims.json", wet=("reproduced", "2026-05-01", "wet > 0.4"))
    assert verdicts()["wet"] is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"wet": 1}', '{"wet": {"verdict": "reproduced"}}'])
def test_damaged_record_is_no_record(tree, damage):
    file = tree / "runs/gpt2/x/claims.json"
    write_records(file)
    file.write_text(damage)
    assert verdicts() == {"more": None, "wet": None}


def test_claim_that_cannot_be_read_without_importing(tree):
    file = tree / "canon/claims/language/gpt2.py"
    file.write_text(CLAIMS.replace('"wet > 0.5"', "THRESHOLD"))
    with pytest.raises(ValueError, match=r"gpt2\.py:11: .* write a literal"):
        status.claims(GPT2)


def test_pages_load_no_torch_and_no_system():
    script = (
        "import sys; from rich.console import Console; from canon import catalog; from canon.catalog import pages;"
        "console = Console(stderr=True);"
        "console.print(pages.map_page()); console.print(pages.show_page(catalog.find('gpt2'))); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "canon.language", "canon.claims"} & set(loaded)
