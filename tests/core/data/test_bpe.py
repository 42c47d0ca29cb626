"""Our byte-level BPE against the `tokenizers` library: the same merges, the same tokens, and nothing is ever lost."""

import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from canon.core.data import bpe
from canon.core.data.assets import fetch
from canon.core.data.bpe import CHARACTERS, ByteLevelBPE, train
from canon.core.data.text import shakespeare, standard_library
from canon.core.data.tokenizers import BPETokenizer, load_tokenizer
from canon.core.errors import UserError


def reference(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """The library's own training; its vocabulary has no end of text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def names(tokenizer: ByteLevelBPE) -> list[str]:
    return ["".join(CHARACTERS[byte] for byte in token) for token in tokenizer.tokens]


def assert_same(text: str, vocab_size: int) -> ByteLevelBPE:
    ours, theirs = train(text, vocab_size), reference(text, vocab_size)
    tokens = names(ours)
    merges = [[tokens[left], tokens[right]] for left, right in ours.merges]
    assert merges == [list(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    assert {token: theirs.token_to_id(token) for token in tokens[:-1]} == {t: i for i, t in enumerate(tokens[:-1])}
    assert ours.encode(text) == theirs.encode(text).ids == ours.fast().encode(text, special=False)
    return ours


def test_merges_of_real_text_equal_the_library():
    tokenizer = assert_same(shakespeare()[:600_000], 2048)
    assert tokenizer.vocab_size == 2048
    assert b" the" in tokenizer.tokens


def test_merges_of_source_code_equal_the_library():
    text = standard_library()[:600_000]
    tokenizer = assert_same(text, 2048)
    assert len(text.encode()) / len(tokenizer.encode(text)) > 2.5


@pytest.mark.parametrize("alphabet", ["ab", "abc", "ab ", "a", "aé日🙂 '\n1"])
def test_ties_follow_the_library(alphabet: str):
    generator = random.Random(0)
    for _ in range(30):  # nearly all counts of such short texts are ties
        assert_same("".join(generator.choices(alphabet, k=generator.choice([30, 100, 400]))), 257 + 60)


@pytest.fixture(scope="module")
def small() -> ByteLevelBPE:
    return train(standard_library()[:200_000], 1000)


@pytest.fixture(scope="module")
def fast(small: ByteLevelBPE) -> BPETokenizer:
    return small.fast()


@given(data=st.binary(max_size=200))
def test_any_bytes_come_back(small: ByteLevelBPE, data: bytes):
    assert small.decode_bytes(small.encode(data)) == data


@given(text=st.text(max_size=200))
def test_any_text_comes_back(small: ByteLevelBPE, text: str):
    assert small.decode(small.encode(text)) == text
    assert small.encode(text.encode()) == small.encode(text)


# Assigned since before either Unicode table was made: newer characters may be letters in one and nothing in the other.
OLD = st.characters(max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn"))


@settings(max_examples=200)
@given(text=st.text(st.one_of(st.sampled_from("  \n\t'stre11.é日"), OLD), max_size=100))
def test_any_text_has_the_library_s_tokens(small: ByteLevelBPE, fast: BPETokenizer, text: str):
    ids = small.encode(text)
    assert fast.encode(text, special=False) == ids
    assert fast.decode(ids) == text


def test_a_long_word_is_quick(small: ByteLevelBPE, fast: BPETokenizer):
    text = "self" * 50_000  # would take minutes if every merge searched the whole word
    assert small.encode(text) == fast.encode(text)


def test_gpt2_s_merges_give_gpt2_s_tokens():
    lines = (fetch("gpt2-bpe") / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    ours, published = ByteLevelBPE.from_merges(lines), load_tokenizer(fetch("gpt2-bpe"))
    assert ours.vocab_size == published.vocab_size == 50_257
    assert ours.eot == published.eot
    text = shakespeare()[:200_000] + " Ünïcödé 日本語 🙂\r\n\t 12345 don't"
    assert ours.encode(text) == published.encode(text)


def test_alphabet():
    assert len(set(CHARACTERS)) == 256
    assert CHARACTERS[ord("A")] == "A"
    assert CHARACTERS[ord(" ")] == "Ġ"
    assert sorted(CHARACTERS) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_the_vocabulary_is_at_least_the_bytes():
    assert train("aaaa", 257).encode("aaaa") == [64] * 4
    assert train("aaaa", 300).vocab_size == 259, "no pair is left after aa and aaaa"
    assert bpe.train(["ab", "ab"], 258).tokens[256] == b"ab"
    with pytest.raises(UserError, match="at least 257"):
        train("aaaa", 256)
    assert train("", 300).vocab_size == 257
