"""Constrained decoding: every output is in the language, and the distribution is the model's own, restricted."""

import itertools
import re

import numpy as np
import pytest
import torch

from canon.core.data import bpe
from canon.core.data.tokenizers import CharTokenizer
from canon.core.errors import UserError
from canon.core.generation.constraints import choices, regex
from canon.core.generation.decode import Sampling, generate, stream
from tests.core.generation.tiny import ByteTokenizer, FixedDecoder, TinyDecoder

# Many tokenisations of one string, a duplicate token, and halves of a character.
TOKENS = ByteTokenizer([b"a", b"b", b"c", b"ab", b"bc", b"abc", b"aa", b"b", b"\xc3", b"\xa9", b"\xc3\xa9", b"ca"])
STRINGS = ["a", "ab", "abc", "abca", "bb", "é", "aé"]
LONGEST = 6


def beginnings(language):
    """All beginnings, as bytes, of a language of bytes."""
    return {string[:end] for string in language for end in range(len(string) + 1)}


def words(pattern):
    """The strings of at most LONGEST bytes that a pattern matches as a whole, and beginnings of longer ones."""
    letters = ["a", "b", "c", "é"]
    strings = ["".join(s) for n in range(LONGEST + 3) for s in itertools.product(letters, repeat=n)]
    return {s.encode() for s in strings if re.fullmatch(pattern, s)}


def expected_mask(text, language, starts):
    mask = [bool(piece) and text + piece in starts for piece in TOKENS.tokens]
    mask[TOKENS.eot] = text in language
    return mask


def walk(constraint, language, limit):
    """Compare the mask with the definition in every state that tokens lead to."""
    starts = beginnings(language)
    seen, todo = 0, [[]]
    while todo:
        tokens = todo.pop()
        matcher = constraint.start(TOKENS.tokens, TOKENS.eot)
        for token in tokens:
            matcher.advance(token)
        text = b"".join(TOKENS.tokens[t] for t in tokens)
        mask = matcher.allowed()
        assert mask.tolist() == expected_mask(text, language, starts), text
        assert matcher.complete == (mask.nonzero()[0].tolist() == [TOKENS.eot])
        seen += 1
        todo += [[*tokens, int(t)] for t in mask.nonzero()[0] if t != TOKENS.eot and len(text) < limit]
    return seen


def test_choices_are_exact_in_every_state():
    assert walk(choices(STRINGS), {s.encode() for s in STRINGS}, LONGEST) > 15


@pytest.mark.parametrize(
    "pattern", ["abc|ab|bb", "(ab|c)*", "a+b?", "[^a]{1,2}", "é?a{2,3}(bc)?", "(a|aa)(b|bb)", "a.c"]
)
def test_regex_is_exact_in_every_state(pattern):
    assert walk(regex(pattern), words(pattern), 2) > 3


@pytest.mark.parametrize("constraint", [choices(STRINGS), regex("a|ab|abc|abca|bb|é|aé")], ids=["choices", "regex"])
def test_the_distribution_is_the_models_restricted_and_renormalised(constraint):
    logits = torch.randn(len(TOKENS.tokens))
    language = {s.encode() for s in STRINGS}
    starts = beginnings(language)
    weights = logits.double().exp().numpy()
    expected = {}

    def follow(text, probability):
        mask = np.array(expected_mask(text, language, starts))
        shares = np.where(mask, weights, 0) / weights[mask].sum()
        for token in mask.nonzero()[0]:
            if token == TOKENS.eot:
                expected[text] = expected.get(text, 0) + probability * shares[token]
            else:
                follow(text + TOKENS.tokens[token], probability * shares[token])

    follow(b"", 1.0)
    assert sum(expected.values()) == pytest.approx(1)
    n = 3000
    results = generate(
        FixedDecoder(logits), [[0]] * n, Sampling(max_tokens=10), tokenizer=TOKENS, constraint=constraint, batch_size=n
    )
    counts = dict.fromkeys(expected, 0)
    for result in results:
        counts[result.text.encode()] += 1  # a KeyError: not in the language
        assert result.finish in ("eot", "constraint")
    statistic = sum((counts[t] - n * p) ** 2 / (n * p) for t, p in expected.items())
    assert statistic < len(expected) + 4 * (2 * len(expected)) ** 0.5


def test_trained_tokenizer_outputs_match():
    tokenizer = bpe.train("the answer is yes or no, 12 or 345, 中文 🙂\n" * 50, 300).fast()
    model = TinyDecoder(vocab=tokenizer.vocab_size)
    batch = [tokenizer.encode("the answer")] * 40
    answers = ["yes", "no", "yes, 12", "中文 🙂"]
    for result in generate(model, batch, Sampling(max_tokens=30), tokenizer=tokenizer, constraint=choices(answers)):
        assert result.text in answers
    pattern = r"(yes|no), [0-9]{1,4}( 🙂|[中文]{2})?"
    for result in generate(model, batch, Sampling(max_tokens=30), tokenizer=tokenizer, constraint=regex(pattern)):
        assert re.fullmatch(pattern, result.text)
    pieces = stream(model, batch[0], Sampling(max_tokens=30), tokenizer=tokenizer, constraint=regex(pattern))
    assert re.fullmatch(pattern, "".join(pieces))


def test_one_constraint_for_each_prompt():
    model = TinyDecoder(vocab=len(TOKENS.tokens))
    each = [choices(["ab"]), choices(["c", "bb"]), regex("é+a")]
    results = generate(model, [[0], [1], [2]], Sampling(max_tokens=20, seed=5), tokenizer=TOKENS, constraint=each)
    assert results[0].text == "ab"
    assert results[1].text in ("c", "bb")
    with pytest.raises(UserError, match="3 constraints for 1 prompts"):
        generate(model, [[0]], Sampling(), tokenizer=TOKENS, constraint=each)


def test_without_an_end_of_text():
    tokenizer = CharTokenizer("abc")
    model = TinyDecoder(vocab=3)
    results = generate(model, [[0]] * 30, Sampling(max_tokens=9), tokenizer=tokenizer, constraint=choices(["ab", "ca"]))
    assert {(g.text, g.finish) for g in results} == {("ab", "constraint"), ("ca", "constraint")}
    results = generate(model, [[0]] * 30, Sampling(max_tokens=9), tokenizer=tokenizer, constraint=regex("(ab){2}|c"))
    assert {g.text for g in results} == {"abab", "c"}
    with pytest.raises(UserError, match="'a' begins the choice 'ab'"):
        generate(model, [[0]], Sampling(), tokenizer=tokenizer, constraint=choices(["a", "ab"]))


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", r"(a)\1", "[z-a]", "a{3,1}"])
def test_patterns_that_are_not_regular_expressions(pattern):
    with pytest.raises(UserError) as error:
        regex(pattern)
    assert "\n" not in str(error.value)
    assert repr(pattern) in str(error.value)


def test_what_the_tokenizer_cannot_write():
    model = TinyDecoder(vocab=len(TOKENS.tokens))
    with pytest.raises(UserError, match="'ax'"):
        generate(model, [[0]], Sampling(), tokenizer=TOKENS, constraint=choices(["ab", "ax"]))
    with pytest.raises(UserError, match="no token"):
        generate(model, [[0]], Sampling(), tokenizer=TOKENS, constraint=regex("x+"))


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "(a|aa)+" * 200, "a" * 50_000])
def test_large_patterns(pattern):
    model = TinyDecoder(vocab=len(TOKENS.tokens))
    result = generate(model, [[0]], Sampling(max_tokens=5), tokenizer=TOKENS, constraint=regex(pattern))[0]
    assert set(result.text) == {"a"}


def test_patterns_beyond_the_librarys_limits():
    with pytest.raises(UserError, match="nested") as error:
        regex("(" * 2000 + "a" + ")" * 2000)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_choices_must_be_some():
    for wrong in ([], ["a", ""]):
        with pytest.raises(UserError, match="choices"):
            choices(wrong)


def test_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"aicanon\[constrain\]"):
        regex("a")
