"""Text arrives in whole characters, ends before stop strings, and is the same however it is cut into tokens."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canon.core.data import bpe
from canon.core.data.tokenizers import CharTokenizer
from canon.core.generation.decode import Sampling, generate, stream
from canon.core.generation.text import TextStream, token_bytes
from tests.core.generation.tiny import ByteTokenizer, ScriptedDecoder


def cuts(data):
    """Every way to cut bytes into pieces."""
    for places in itertools.product([False, True], repeat=len(data) - 1):
        ends = [i + 1 for i, cut in enumerate(places) if cut] + [len(data)]
        yield [data[a:b] for a, b in zip([0, *ends], ends)]


def say(pieces, stop=()):
    text = TextStream(pieces, stop)
    parts = []
    for token in range(len(pieces)):
        parts.append(text.push(token))
        if text.stopped:
            break
    parts.append(text.close())
    assert "".join(parts) == text.text
    return parts, text


@pytest.mark.parametrize("string", ["a🙂b", "中文é", "👍🏽"])
def test_characters_are_never_split(string):
    for pieces in cuts(string.encode()):
        parts, text = say(pieces)
        assert text.text == string
        assert "�" not in "".join(parts)


@pytest.mark.parametrize(
    ("string", "stop"),
    [("ab##cd", ("##",)), ("a#b##c", ("##",)), ("x中文y", ("文",)), ("aaab", ("aab",)), ("one\n\ntw", ("\n\n", "tw"))],
)
def test_stop_strings_under_every_cut(string, stop):
    expected = string[: min(string.index(s) for s in stop)]
    for pieces in cuts(string.encode()):
        parts, text = say(pieces, stop)
        assert text.text == expected
        assert text.stopped
        shown = ""
        for part in parts:  # nothing shown is ever taken back
            shown += part
            assert expected.startswith(shown)


def test_what_looked_like_a_stop_string_is_shown_in_the_end():
    parts, text = say([b"end ", b"#", b"#"], ("###",))
    assert (parts, text.text, text.stopped) == (["end ", "", "", "##"], "end ##", False)


def test_bytes_that_are_no_text():
    _, text = say([b"a\xf0\x9f", b"b\xff", b"\xe4\xb8"])
    assert text.text == b"a\xf0\x9fb\xff\xe4\xb8".decode("utf-8", "replace")


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=2), st.randoms())
def test_any_text_any_stop_any_cut(string, stop, random):
    data = string.encode()
    places = sorted(random.sample(range(1, len(data)), random.randint(0, len(data) - 1))) if len(data) > 1 else []
    pieces = [data[a:b] for a, b in zip([0, *places], [*places, len(data)])]
    found = [string.index(s) for s in stop if s in string]
    # A stop string may be complete before an overlapping longer one that begins earlier is.
    _, text = say(pieces, stop)
    assert text.stopped == bool(found)
    assert string.startswith(text.text)
    if not found:
        assert text.text == string
    elif len(stop) == 1:
        assert text.text == string[: min(found)]


def test_stream_and_generate_agree_on_split_characters_and_stop_strings():
    tokenizer = ByteTokenizer([bytes([b]) for b in range(256)])
    data = "🙂 中文 stop at ## here".encode()
    decoder = ScriptedDecoder(data, 257, context=128)
    sampling = Sampling(max_tokens=60, stop=("##",), temperature=0)
    parts = list(stream(decoder, [0], sampling, tokenizer=tokenizer))
    result = generate(decoder, [[0]], sampling, tokenizer=tokenizer)[0]
    assert "".join(parts) == result.text == "🙂 中文 stop at "
    assert result.finish == "stop"
    assert bytes(result.tokens) == data.split(b"##")[0] + b"##"
    assert all(parts)


def test_token_bytes_of_every_tokenizer():
    corpus = "low lower lowest 中文 🙂 é\n" * 30
    plain = bpe.train(corpus, 300)
    for tokenizer in (plain, plain.fast(), CharTokenizer(corpus)):
        pieces = token_bytes(tokenizer)
        assert len(pieces) == tokenizer.vocab_size
        ids = tokenizer.encode("lowest 🙂 中文é\n")
        assert b"".join(pieces[i] for i in ids).decode() == "lowest 🙂 中文é\n"
        assert tokenizer.eot is None or pieces[tokenizer.eot] == b""


def test_token_bytes_are_made_once():
    tokenizer = bpe.train("low lower lowest", 270).fast()
    pieces = token_bytes(tokenizer)
    assert token_bytes(tokenizer) is pieces
    tokenizer.rust.add_tokens(["<new>"])
    assert token_bytes(tokenizer) == [*pieces, b"<new>"]
