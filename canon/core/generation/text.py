"""From tokens to text, piece by piece: the bytes of each token, whole UTF-8 characters, stop strings."""

import codecs
from collections.abc import Sequence

from canon.core.data.bpe import BYTES
from canon.core.data.tokenizers import BPETokenizer, Tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token adds to a text, by token id; none for special tokens such as the end of text."""
    tokens = getattr(tokenizer, "tokens", None)  # ByteLevelBPE: they are at hand
    if tokens is not None:
        pieces = list(tokens)
    elif isinstance(tokenizer, BPETokenizer):
        pieces = [_published(tokenizer.rust.id_to_token(index)) for index in range(tokenizer.vocab_size)]
        for index, added in tokenizer.rust.get_added_tokens_decoder().items():
            pieces[index] = b"" if added.special else added.content.encode()
    else:
        pieces = [tokenizer.decode([index]).encode() for index in range(tokenizer.vocab_size)]
    if tokenizer.eot is not None:
        pieces[tokenizer.eot] = b""
    return pieces


def _published(name: str | None) -> bytes:
    """The bytes of a token from its published name: byte-level (GPT-2), or with U+2581 for spaces (LLaMA)."""
    if name is None:
        return b""
    if all(character in BYTES for character in name):
        return bytes(BYTES[character] for character in name)
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
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
