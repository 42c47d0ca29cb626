"""Translation pairs: catalogues as gettext reads them, cleaning, a split without leaks, batches by length."""

import gettext
import io
import itertools
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from canon.core.data.translation import (
    BOS,
    EOS,
    HELD_OUT,
    N_SPECIAL,
    PAD,
    SYMBOLS,
    Pair,
    SharedVocabulary,
    TranslationBatches,
    clean,
    divide,
    mask_placeholders,
    read_mo,
    read_po,
    restore_placeholders,
    sentence_key,
    translation_pairs,
)
from canon.core.errors import UserError

CATALOGUE = r'''# Header comment
msgid ""
msgstr ""
"Language: de\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\n"

#: views.py:3
#, python-format
msgid "Delete %(name)s"
msgstr "%(name)s löschen"

#, fuzzy
msgid "Not sure"
msgstr "Unsicher"

msgid "Not translated"
msgstr ""

msgctxt "verb"
msgid ""
"Open the "
"\"file\"\t"
"now"
msgstr ""
"Die „Datei“ "
"jetzt öffnen"
#, python-format
msgid "%d old file"
msgid_plural "%d old files"
msgstr[0] "%d alte Datei"
msgstr[1] "%d alte Dateien"

#~ msgid "Gone for good"
#~ msgstr "Fort"

msgid "The last one"
msgstr "Die letzte"'''


def compile_mo(messages: dict[str, str], order: str = "<") -> bytes:
    """A compiled catalogue, written from the format's description."""
    pairs = sorted((key.encode(), value.encode()) for key, value in messages.items())
    start = 28 + 16 * len(pairs)
    tables, texts = [b"", b""], b""
    for side in (0, 1):
        for pair in pairs:
            tables[side] += struct.pack(order + "2I", len(pair[side]), start + len(texts))
            texts += pair[side] + b"\0"
    header = struct.pack(order + "7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + tables[0] + tables[1] + texts


def test_po_files_are_read_as_gettext_compiles_them():
    assert list(read_po(CATALOGUE)) == [
        {"msgid": "Delete %(name)s", "msgstr": "%(name)s löschen"},
        {"msgctxt": "verb", "msgid": 'Open the "file"\tnow', "msgstr": "Die „Datei“ jetzt öffnen"},
        {
            "msgid": "%d old file",
            "msgid_plural": "%d old files",
            "msgstr[0]": "%d alte Datei",
            "msgstr[1]": "%d alte Dateien",
        },
        {"msgid": "The last one", "msgstr": "Die letzte"},
    ]


@pytest.mark.parametrize("order", ["<", ">"])
def test_mo_files_equal_what_gettext_reads(order):
    messages = {
        "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n",
        "Save all": "Alles speichern",
        "menu\x04Open it": "Öffnen",
        "%d file\0%d files": "%d Datei\0%d Dateien",
        "Left empty": "",
    }
    data = compile_mo(messages, order)
    ours = list(read_mo(data))
    reference = gettext.GNUTranslations(io.BytesIO(data))
    assert {"msgid": "Save all", "msgstr": reference.gettext("Save all")} in ours
    assert {"msgid": "Open it", "msgstr": reference.pgettext("menu", "Open it")} in ours
    plural = next(message for message in ours if "msgid_plural" in message)
    assert plural["msgstr[0]"] == reference.ngettext("%d file", "%d files", 1)
    assert plural["msgstr[1]"] == reference.ngettext("%d file", "%d files", 5)
    assert len(ours) == 3
    with pytest.raises(ValueError, match="MO file"):
        list(read_mo(b"something else entirely"))


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("Delete %(a)s\n from  {b}", "%(a)s aus {b} löschen", Pair("Delete ① from ②", "① aus ② löschen")),
        ("%s of %(n).2f", "%(n).2f, %s", Pair("① of ②", "②, ①")),
        ("Copy {{x}} to ${y} and %1", "{{x}} nach ${y} und %1", Pair("Copy ① to ② and ③", "① nach ② und ③")),
        ("Reached 100% now", "Nun 100% erreicht", Pair("Reached 100% now", "Nun 100% erreicht")),
        ("Lost %(a)s here", "Verloren", None),  # a placeholder is missing
        ("One <b>bold</b> word", "Ein <b>fettes</b> Wort", None),
        ("Word", "Wort", None),
        ("word " * 41, "Wort", None),
        ("Not translated", "Not translated", None),
        ("Step ① of it", "Schritt ① davon", None),  # would be taken for a placeholder
    ],
)
def test_cleaning(source, target, expected):
    assert clean(source, target) == expected


@given(st.lists(st.sampled_from(["%(a)s", "%d", "{b}", "word", "x%"]), max_size=12))
def test_placeholders_come_back(words):
    text, names = " ".join(words), []
    assert restore_placeholders(mask_placeholders(text, names), names) == text


def test_near_duplicates_share_a_key():
    same = ["Delete %(name)s (3 files)!", "delete {0}: 17 files", "Delete ① 9 Files"]
    assert len({sentence_key(text) for text in same}) == 1
    assert sentence_key("Delete files") != sentence_key("Delete file")


def test_division_has_no_leak_and_does_not_depend_on_what_else_there_is():
    words = ["alpha", "beta", "gamma", "delta", "eps"]
    texts = [" ".join(p) for n in (3, 4) for p in itertools.product(words, repeat=n)]
    messages = [{"msgid": text, "msgstr": text.upper() + "!"} for text in texts]
    plurals = [{"msgid": f"{t} 1", "msgid_plural": f"{t}, {t}", "msgstr[0]": "x 1", "msgstr[1]": "x 2"} for t in texts]
    variants = [{"msgid": text.title() + ".", "msgstr": "y"} for text in texts]
    small, large = divide(messages), divide([*messages, *plurals, *variants, *messages])
    for part in ("validation", "test"):
        assert set(getattr(small, part)) <= set(getattr(large, part))
        share = len(getattr(small, part)) / len(messages)
        assert share == pytest.approx(HELD_OUT, abs=0.02)
    keys = [{sentence_key(p.source) for p in part} for part in (large.train, large.validation, large.test)]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    sources = [p.source for part in (large.train, large.validation, large.test) for p in part]
    assert len(sources) == len(set(sources))


def test_pairs_from_a_file(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"sentence {i}\tphrase {i}\n" for i in "abcdefghij"), encoding="utf-8")
    pairs = translation_pairs("any", file)
    assert len(pairs.train) + len(pairs.validation) + len(pairs.test) == 10
    file.write_text("no tab\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1"):
        translation_pairs("any", file)
    with pytest.raises(UserError, match="en-de, en-fr, en-zh"):
        translation_pairs("de-en")


def test_vocabulary_is_shared_and_lossless(tmp_path):
    pairs = [Pair("Delete network ①", "Netzwerk ① löschen"), Pair("Create network ①", "Netzwerk ① erstellen")]
    vocabulary = SharedVocabulary.train(pairs, 300)
    assert vocabulary.vocab_size <= 300
    vocabulary.save(tmp_path)
    again = SharedVocabulary.load(tmp_path)
    for text in ("Delete network ①", "Grüße, 世界"):
        ids = vocabulary.encode(text)
        assert min(ids) >= N_SPECIAL
        assert vocabulary.decode([BOS, *ids, EOS, PAD]) == text
        assert again.encode(text) == ids


def numbered(count: int = 300) -> list[tuple[list[int], list[int]]]:
    """Pairs of varied lengths, each recognisable by its first source id."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (count, 2), generator=draw).tolist()
    return [([N_SPECIAL + i] + [5] * s, [6] * t) for i, (s, t) in enumerate(lengths)]


def test_batches_hold_every_pair_once_an_epoch_within_the_token_budget():
    pairs = numbered()
    batches = TranslationBatches(pairs, 200, seed=1)
    orders = []
    for _ in range(2):
        seen: list[int] = []
        for _ in range(len(batches.plan)):
            batch = next(batches)
            source, target = batch["source"], batch["target"]
            assert source.numel() <= 200
            assert target[:, 1:].numel() <= 200
            assert source.dtype == target.dtype == torch.int64
            seen += (source[:, 0] - N_SPECIAL).tolist()
            for row, ids in zip(target.tolist(), source[:, 0].tolist()):
                words = pairs[ids - N_SPECIAL][1]
                assert row == [BOS, *words, EOS, *[PAD] * (len(row) - len(words) - 2)]
        assert sorted(seen) == list(range(len(pairs)))
        orders.append(seen)
    assert orders[0] != orders[1]
    real = sum(len(s) + 1 for s, _ in pairs)
    assert real / (200 * len(batches.plan)) > 0.5  # little of a batch is padding


def test_batches_continue_from_a_saved_position():
    batches = TranslationBatches(numbered(), 200, seed=3)
    for _ in range(len(batches.plan) + 5):
        next(batches)
    state = batches.state_dict()
    ahead = [next(batches) for _ in range(30)]
    again = TranslationBatches(numbered(), 200, seed=3)
    again.load_state_dict(state)
    for batch in ahead:
        other = next(again)
        assert all(torch.equal(batch[side], other[side]) for side in batch)
    assert not torch.equal(next(TranslationBatches(numbered(), 200, seed=4))["source"], ahead[0]["source"])


def test_a_pair_longer_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        TranslationBatches([([5] * 50, [6])], 40)


@pytest.mark.parametrize(("languages", "least"), [("en-de", 11_000), ("en-fr", 12_000), ("en-zh", 11_000)])
def test_real_catalogues(languages, least):
    """Downloads the catalogues once (a hundred megabytes, most of it Superset's)."""
    pairs = translation_pairs(languages)
    assert len(pairs.train) > least
    assert 400 < len(pairs.test) < 700
    keys = {sentence_key(pair.source) for pair in pairs.train}
    assert not any(sentence_key(pair.source) in keys for pair in (*pairs.test, *pairs.validation))
    for pair in pairs.train:
        assert {c for c in pair.source if c in SYMBOLS} == {c for c in pair.target if c in SYMBOLS}
    assert translation_pairs(languages).test == pairs.test
