"""Tokenizers: round trips, files, and what happens with text or files that do not fit."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canon.core.data import tokenizers
from canon.core.data.assets import fetch
from canon.core.data.bpe import train
from canon.core.data.tokenizers import BPETokenizer, CharTokenizer, load_tokenizer
from canon.core.errors import UserError


@given(st.text())
def test_characters_round_trip(text: str):
    tokenizer = CharTokenizer(text)
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_characters(tmp_path: Path):
    tokenizer = CharTokenizer("hello\n")
    assert tokenizer.characters == "\nehlo"
    assert tokenizer.encode("hole\n") == [2, 4, 3, 1, 0]
    assert tokenizer.eot is None
    with pytest.raises(UserError, match="character 'x' is not among the 5"):
        tokenizer.encode("hex")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("hole") == tokenizer.encode("hole")
    assert load_tokenizer(tmp_path / "characters.json").vocab_size == 5


def test_gpt2_vocabulary(tmp_path: Path):
    tokenizer = load_tokenizer(fetch("gpt2-bpe"))
    assert isinstance(tokenizer, BPETokenizer)
    assert (tokenizer.vocab_size, tokenizer.eot) == (50_257, 50_256)
    # Published examples of GPT-2's tokens.
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("Not all heroes wear capes.") == [3673, 477, 10281, 5806, 1451, 274, 13]
    assert tokenizer.encode("a<|endoftext|>") == [64, 50_256]
    assert tokenizer.decode([64, 50_256]) == "a<|endoftext|>"
    plain = tokenizer.encode("a<|endoftext|>", special=False)
    assert 50_256 not in plain
    assert tokenizer.decode(plain) == "a<|endoftext|>"
    assert tokenizer.encode("a<|endoftext|>") == [64, 50_256], "the choice holds for one call"
    assert tokenizer.encode_batch(["Hello", " world"]) == [[15496], [995]]
    for name, old in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (tmp_path / name).write_bytes((fetch("gpt2-bpe") / old).read_bytes())
    assert load_tokenizer(tmp_path).encode("Hello world") == [15496, 995]


def test_saved_tokenizers_are_the_same(tmp_path: Path):
    bpe = train("the cat sat on the mat, the rat sat on the hat", 280)
    bpe.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "the matted cat 猫 <|endoftext|>"
    assert loaded.encode(text)[:-1] == bpe.encode(text.removesuffix("<|endoftext|>"))
    assert (loaded.vocab_size, loaded.eot) == (bpe.vocab_size, bpe.eot)
    assert tokenizers.sha256(loaded) == tokenizers.sha256(bpe)
    assert tokenizers.sha256(CharTokenizer("ab")) != tokenizers.sha256(CharTokenizer("abc"))


def test_bytes_that_are_not_text_are_one_line():
    tokenizer = train("the cat", 260).fast()
    with pytest.raises(UserError, match="not valid UTF-8"):
        tokenizer.encode("a\udcff")
    assert tokenizer.decode(tokenizer.encode("a\ufffd")) == "a\ufffd"


def test_what_is_not_a_tokenizer_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path / "missing" / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(UserError, match="not a tokenizer that can be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer that can be read"):
        load_tokenizer(tmp_path / "vocab.json")
