"""Decoding that can only produce what is allowed: one of some strings, or a string that a regular expression matches.

Exact for every tokenizer. A string has many tokenisations, and a model may use any of them, so what is allowed is
decided byte by byte: a token is allowed if the bytes so far and its own begin a string of the language. The model's
distribution is restricted to the allowed tokens and renormalised at every step; the end of text is allowed exactly
where the string is complete. (This is the distribution of greedy local restriction, as in Willard and Louf, 2023,
arXiv 2307.09702, and not the model's distribution over whole strings, conditioned on the language.)

Choices are matched here; regular expressions by `llguidance` (extra ``constrain``), which compiles them to automata
over bytes and masks a vocabulary in microseconds, whatever the pattern.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from canon.core.errors import UserError, require


@runtime_checkable
class Matcher(Protocol):
    """Where one row stands in the language."""

    complete: bool
    """The string is in the language and nothing can be added to it."""

    def allowed(self) -> Bool[np.ndarray, " vocab"]:
        """Tokens that may come next, the end of text among them if the string is in the language."""
        ...

    def advance(self, token: int) -> None:
        """Add an allowed token that is not the end of text."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """A set of strings."""

    def start(self, pieces: Sequence[bytes], eot: int | None) -> Matcher:
        """The matcher of a new row.

        Args:
            pieces: bytes of each token, see `canon.core.generation.text.token_bytes`.
            eot: the end-of-text token.
        """
        ...


def choices(strings: Sequence[str]) -> Constraint:
    """Exactly one of some strings.

    Raises:
        UserError: there is none, or one of them is empty.
    """
    if not strings or not all(strings):
        raise UserError("choices need at least one string, and none of them empty")
    return Choices(strings)


def regex(pattern: str) -> Constraint:
    """A string that a regular expression matches as a whole.

    The syntax is that of Rust's `regex` crate: no look-around, no back-references.

    Raises:
        UserError: the pattern is not valid, too large, or the package `llguidance` is missing.
    """
    return Regex(pattern)


class Choices:
    """The strings of a finite set."""

    def __init__(self, strings: Sequence[str]):
        self.strings = tuple(dict.fromkeys(string.encode() for string in strings))
        self._table: _Prefixes | None = None

    def start(self, pieces: Sequence[bytes], eot: int | None) -> Matcher:
        """The matcher of a new row.

        Raises:
            UserError: the tokenizer cannot write one of the strings, or cannot end one that begins another.
        """
        if self._table is None or self._table.pieces is not pieces or self._table.eot != eot:
            self._table = _Prefixes(pieces, self.strings, eot)
        return _ChoicesMatcher(self._table)


class _Prefixes:
    """Masks of the tokens that lead from a beginning to one of the strings, computed once for each beginning."""

    def __init__(self, pieces: Sequence[bytes], strings: Sequence[bytes], eot: int | None):
        self.pieces, self.strings, self.eot = pieces, strings, eot
        self.ids: dict[bytes, list[int]] = {}
        for index, piece in enumerate(pieces):
            if piece:
                self.ids.setdefault(piece, []).append(index)
        self.longest = max(map(len, self.ids), default=0)
        self._masks: dict[bytes, np.ndarray] = {}
        # Places of each string from which its end can be reached by whole tokens.
        self._ways: dict[bytes, set[int]] = {string: self._places(string) for string in strings}
        for string, places in self._ways.items():
            if 0 not in places:
                raise UserError(f"the tokenizer has no tokens for the choice {string.decode()!r}")
            longer = [other for other in strings if other != string and other.startswith(string)]
            if longer and eot is None:
                raise UserError(
                    f"the choice {string.decode()!r} begins the choice {longer[0].decode()!r}, and this tokenizer has "
                    "no end-of-text token to tell them apart; add a closing character to each"
                )

    def _places(self, string: bytes) -> set[int]:
        places = {len(string)}
        for start in range(len(string) - 1, -1, -1):
            ends = range(start + 1, min(start + self.longest, len(string)) + 1)
            if any(end in places and string[start:end] in self.ids for end in ends):
                places.add(start)
        return places

    def mask(self, text: bytes) -> np.ndarray:
        mask = self._masks.get(text)
        if mask is None:
            mask = self._masks[text] = np.zeros(len(self.pieces), bool)
            start = len(text)
            for string, places in self._ways.items():
                if not string.startswith(text):
                    continue
                if len(string) == start and self.eot is not None:
                    mask[self.eot] = True
                for end in range(start + 1, min(start + self.longest, len(string)) + 1):
                    if end in places:
                        mask[self.ids.get(string[start:end], [])] = True
        return mask


class _ChoicesMatcher:
    def __init__(self, table: _Prefixes):
        self.table, self.text = table, b""
        self.complete = False

    def allowed(self) -> np.ndarray:
        return self.table.mask(self.text)

    def advance(self, token: int) -> None:
        self.text += self.table.pieces[token]
        possible = [string for string in self.table.strings if string.startswith(self.text)]
        self.complete = possible == [self.text]


class Regex:
    """The strings that a regular expression matches."""

    def __init__(self, pattern: str):
        self._library = require("llguidance", "constrain")
        self.pattern = pattern
        # Left to itself the library forces text that has only one continuation, in its own tokenisation.
        rule = self._library.regex_to_lark(pattern)
        self._grammar = f'%llguidance {{"no_forcing": true}}\nstart: /{rule}/'
        error = self._library.LLMatcher.validate_grammar(self._grammar)
        if error:
            raise UserError(f"the regular expression {_short(pattern)} cannot be used: {_reason(error)}")
        self._first: tuple[Sequence[bytes], int | None, Any] | None = None

    def start(self, pieces: Sequence[bytes], eot: int | None) -> Matcher:
        """The matcher of a new row.

        Raises:
            UserError: the pattern is too large for the library's limits.
        """
        if self._first is None or self._first[0] is not pieces or self._first[1] != eot:
            # Slices are an optimisation for large vocabularies of known make-up.
            tokenizer = self._library.LLTokenizer(self._library.TokenizerWrapper(_Vocabulary(pieces, eot)), slices=[])
            self._first = pieces, eot, self._library.LLMatcher(tokenizer, self._grammar, log_level=0)
        # A copy takes microseconds, the construction nearly a millisecond.
        return _RegexMatcher(self._first[2].deep_copy(), len(pieces), self.pattern)


class _Vocabulary:
    """A vocabulary as llguidance wants it. It insists on an end of text; without one, a token is added for it."""

    def __init__(self, pieces: Sequence[bytes], eot: int | None):
        self.eos_token_id = len(pieces) if eot is None else eot
        self.bos_token_id = None
        self.tokens = [*pieces, b""] if eot is None else list(pieces)
        # A token without bytes must not be confused with text: 0xFF marks the special ones.
        self.tokens = [piece or b"\xff<%d>" % index for index, piece in enumerate(self.tokens)]
        self.special_token_ids = [index for index, piece in enumerate(self.tokens) if piece.startswith(b"\xff<")]

    def __call__(self, text: bytes) -> list[int]:
        """Tokenise a text: the library asks for it once, and needs it only for forced text, which is off."""
        return []


class _RegexMatcher:
    def __init__(self, matcher, vocab: int, pattern: str):
        self.matcher, self.vocab, self.pattern = matcher, vocab, pattern
        self.complete = False
        self._check()

    def allowed(self) -> np.ndarray:
        mask = np.frombuffer(self.matcher.compute_logit_bias(), np.uint8)[: self.vocab] != 0
        self._check()
        return mask

    def advance(self, token: int) -> None:
        self.matcher.consume_token(token)
        self._check()
        self.complete = self.matcher.is_stopped()

    def _check(self) -> None:
        if self.matcher.is_error():
            reason = _reason(self.matcher.get_error())
            if reason == "NoExtensionBias":
                reason = "the tokenizer has no token for the next character"
            raise UserError(f"the regular expression {_short(self.pattern)} cannot be used: {reason}")


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:57] + "...")


def _reason(error: str) -> str:
    """The essential line of one of the library's messages."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error:")), lines[0] if lines else "no reason given")
