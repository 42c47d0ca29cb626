"""From tokens to text, piece by piece: the bytes of each token, whole UTF-8 characters, stop strings."""

import codecs
import re
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from canon.core.data.bpe import BYTES
from canon.core.data.tokenizers import BPETokenizer, Tokenizer

_known: WeakKeyDictionary[Tokenizer, list[bytes]] = WeakKeyDictionary()


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token adds to a text, by token id; none for special tokens such as the end of text.

    The same tokenizer gives the same list: made once, and constraints know it again.
    """
    pieces = _known.get(tokenizer)
    if pieces is None or len(pieces) != tokenizer.vocab_size:  # tokens may have been added since
        pieces = _known[tokenizer] = _token_bytes(tokenizer)
    return pieces


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    tokens = getattr(tokenizer, "tokens", None)  # ByteLevelBPE: they are at hand
    if tokens is not None:
        pieces = list(tokens)
    elif isinstance(tokenizer, BPETokenizer):
        rust = tokenizer.rust
        # A space is written Ġ by byte-level vocabularies and U+2581 by SentencePiece's, which may hold a letter Ġ too.
        byte_level = rust.token_to_id("Ġ") is not None and rust.token_to_id("\u2581") is None
        names = (rust.id_to_token(index) or "" for index in range(tokenizer.vocab_size))
        pieces = [_byte_level(name) if byte_level else _sentencepiece(name) for name in names]
        for index, added in rust.get_added_tokens_decoder().items():
            pieces[index] = b"" if added.special else added.content.encode()
    else:
        pieces = [tokenizer.decode([index]).encode() for index in range(tokenizer.vocab_size)]
    if tokenizer.eot is not None:
        pieces[tokenizer.eot] = b""
    return pieces


def _byte_level(name: str) -> bytes:
    """The bytes of a token whose every character stands for a byte (GPT-2); an added token is plain text."""
    if all(character in BYTES for character in name):
        return bytes(BYTES[character] for character in name)
    return name.encode()


def _sentencepiece(name: str) -> bytes:
    """The bytes of a token that is text with U+2581 for spaces, or one byte written as <0x0A> (LLaMA)."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    return name.replace("\u2581", " ").encode()


class TextStream:
    """Turns tokens into text that can be shown at once: whole characters only, and nothing of a stop string.

    ``text`` grows by what :meth:`push` returns and never shrinks. Bytes that are not UTF-8 become U+FFFD.

    Args:
        pieces: the bytes of each token, see :func:`token_bytes`.
        stop: strings before the first of which the text ends.
    """

    def __init__(self, pieces: Sequence[bytes], stop: Sequence[str] = ()):
        self.pieces, self.stop = pieces, tuple(stop)
        self.text = ""
        self.stopped = False
        self._held = ""  # may be the beginning of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, often empty. After a stop string there is no more."""
        return self._add(self._decoder.decode(self.pieces[token] if token < len(self.pieces) else b""))

    def close(self) -> str:
        """What was held back, now that no token follows."""
        piece = self._add(self._decoder.decode(b"", final=True)) + self._held
        self.text += self._held
        self._held = ""
        return piece

    def _add(self, new: str) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        ends = [place for place in (held.find(stop) for stop in self.stop) if place >= 0]
        if ends:
            self.stopped, certain, self._held = True, min(ends), ""
        else:
            certain = len(held) - self._overlap(held)
            self._held = held[certain:]
        self.text += held[:certain]
        return held[:certain]

    def _overlap(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
