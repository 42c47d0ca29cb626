"""The catalog is the whole reading list, once, in order, and in two languages."""

import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from canon import catalog
from canon.catalog import status
from canon.core.errors import UserError

KINDS = {"paper", "post", "course", "video", "project", "benchmark", "report", "book"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")
ENTRIES = catalog.entries()
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)


def test_every_url_of_the_list_stands_once_and_in_its_order():
    listed = Path(__file__).with_name("seed_urls.txt").read_text("utf-8").split()
    assert [catalog.source(), *(link.url for entry in ENTRIES for link in entry.urls)] == listed


def test_ids_and_titles_name_one_entry_each():
    for names in ([entry.id for entry in ENTRIES], [entry.title for entry in ENTRIES]):
        squeezed = ["".join(filter(str.isalnum, name)).lower() for name in names]
        assert len(set(squeezed)) == len(ENTRIES)


def test_entries_follow_their_sections():
    order = [section.id for section in catalog.sections()]
    assert len(set(order)) == len(order)
    for place, name in enumerate(order):
        assert "." not in name or name.rpartition(".")[0] in order[:place], f"{name} stands before its parent"
    places = [order.index(entry.section) for entry in ENTRIES]
    assert places == sorted(places)
    assert {name for name in order if not any(other.startswith(f"{name}.") for other in order)} == {
        entry.section for entry in ENTRIES
    }


def test_what_to_understand_first_has_no_cycle():
    names = {entry.id for entry in ENTRIES}
    for entry in ENTRIES:
        assert set(entry.needs) <= names, entry.id
        assert len(set(entry.needs)) == len(entry.needs), entry.id
    order = list(TopologicalSorter({entry.id: entry.needs for entry in ENTRIES}).static_order())
    assert len(order) == len(ENTRIES)


def test_no_two_notes_are_alike():
    for notes in ([entry.note for entry in ENTRIES], [entry.note_zh for entry in ENTRIES]):
        assert len(set(notes)) == len(ENTRIES)


def test_chinese_section_titles():
    assert all(CHINESE.search(section.title_zh) for section in catalog.sections())


@every_entry
def test_fields(entry):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", entry.id)
    assert entry.title
    assert entry.by
    assert entry.kind in KINDS
    assert 2010 <= entry.year <= 2023
    assert all(link.label and link.url.startswith("http") for link in entry.urls)
    assert len({link.label for link in entry.urls}) == len(entry.urls)


@every_entry
def test_note_is_one_sentence(entry):
    assert re.fullmatch(r"[A-Z0-9].*\.", entry.note)
    assert not re.search(r"[.?!]\s+[A-Z]", entry.note)
    assert 40 <= len(entry.note) <= 215
    assert entry.note_zh.endswith("。")
    assert not re.search(r"[。？！]", entry.note_zh[:-1])
    assert CHINESE.search(entry.note_zh)
    assert CHINESE.search(entry.title_zh)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.system], ids=lambda entry: entry.id)
def test_system_is_there(entry):
    assert entry.system.rsplit(".", 1)[-1] == entry.id
    assert all(file.is_file() for file in status.files(entry))
    assert "laptop" in status.presets(entry)
    assert entry.minutes > 0


def test_minutes_only_for_what_runs():
    assert {entry.id for entry in ENTRIES if entry.minutes} == {entry.id for entry in ENTRIES if entry.system}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt2", "gpt2"),
        ("GPT-2", "gpt2"),
        ("Auto-GPT", "auto_gpt"),
        ("attention is all you need", "transformer"),
        ("注意力就是你所需要的一切", "transformer"),
    ],
)
def test_find(name, found):
    assert catalog.find(name).id == found


@pytest.mark.parametrize(
    ("name", "offered"), [("gtp2", "gpt2"), ("lama", "llama"), ("diffusion", "latent_diffusion"), ("NeRFs", "nerf")]
)
def test_unknown_name_offers_the_closest(name, offered):
    with pytest.raises(UserError, match=rf'"{name}"; closest: .*\b{offered}\b'):
        catalog.find(name)


@pytest.mark.parametrize("name", ["", "--", "zzzzzzzz"])
def test_unknown_name_without_a_neighbour(name):
    with pytest.raises(UserError, match="canon list"):
        catalog.find(name)


def test_entries_of_a_section():
    images = catalog.entries("landmarks.images")
    assert [entry.id for entry in images] == [
        "clip", "dalle", "latent_diffusion", "imagen", "dreambooth", "controlnet",
    ]  # fmt: skip
    assert catalog.entries("images") == images
    assert {entry.id for entry in catalog.entries("courses")} == {
        "cs229", "cs224n", "cs25", "cs324", "llm_bootcamp", "hugging_face_course",
    }  # fmt: skip
    assert len(catalog.entries("landmarks")) == 45
    with pytest.raises(UserError, match='"pictures"; sections: introduction, foundations'):
        catalog.entries("pictures")


def test_reading_the_catalog_loads_nothing_heavy():
    heavy = {"torch", "numpy", "rich", "tyro", "matplotlib", "transformers", "canon.language"}
    script = "import sys, canon.catalog as c; c.entries(); c.find('gpt2'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)
