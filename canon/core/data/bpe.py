"""Byte-level byte-pair encoding, as in GPT-2: any text is a sequence of at most 256 + merges different tokens.

Title: Language Models are Unsupervised Multitask Learners (Radford et al., 2019), section 2.2; the merging itself is
Sennrich et al., 2016. A text is cut into words by a regular expression, a word is a sequence of bytes, and the
vocabulary starts as the 256 bytes. Training repeats one step: the pair of neighbouring tokens that is most frequent
within words becomes a new token. Encoding replays the merges in the order in which they were learnt.

The result equals that of the `tokenizers` library: the same merges, ties included, and the same tokens (but for
characters newer than the Unicode tables of either). `ByteLevelBPE.fast()` hands over to it; it encodes many texts on
all cores.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

import regex

from canon.core.data.tokenizers import EOT, BPETokenizer, byte_level
from canon.core.errors import UserError

# English contractions, then runs of letters, of digits and of other signs, each with the space before it, then white
# space, of which the last goes with the next word: merges never cross the ends of these words.
WORDS = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")

Pair = tuple[int, int]


def byte_alphabet() -> list[str]:
    """A printable character for each of the 256 bytes, under which published vocabularies write them.

    Printable Latin-1 characters stand for themselves, the other bytes are counted on from U+0100.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


CHARACTERS = byte_alphabet()
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}
# GPT-2 numbers the bytes in the order of their characters: "!" is token 0.
FIRST_IDS = sorted(CHARACTERS)
BYTE_IDS = [FIRST_IDS.index(character) for character in CHARACTERS]


class ByteLevelBPE:
    """A byte-level BPE in plain Python: the 256 bytes, one token per merge, and last the end of text.

    It keeps the tokens of every word it has met, so that a long text costs little more than finding its words.

    Args:
        merges: pairs of token ids in the order learnt; merge number n makes token 256 + n.
    """

    def __init__(self, merges: Sequence[Pair]):
        self.merges = list(merges)
        self.tokens = [bytes([BYTES[character]]) for character in FIRST_IDS]
        for left, right in self.merges:
            self.tokens.append(self.tokens[left] + self.tokens[right])
        self.eot = len(self.tokens)
        self.tokens.append(EOT.encode())
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._words: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the end of text included."""
        return len(self.tokens)

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of a text or of any bytes; "<|endoftext|>" in it is plain text."""
        if isinstance(text, bytes):
            # Bytes that are not UTF-8 pass through as lone surrogates, and come back as the same bytes below.
            text = text.decode("utf-8", "surrogateescape")
        ids = []
        for word in WORDS.findall(text):
            tokens = self._words.get(word)
            if tokens is None:
                tokens = self._words[word] = self._merge(word.encode("utf-8", "surrogateescape"))
            ids += tokens
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of token ids: the exact inverse of `encode`."""
        return b"".join(self.tokens[index] for index in ids)

    def _merge(self, word: bytes) -> list[int]:
        """Apply to a word the earliest learnt merge that fits, the leftmost first, until none fits.

        The symbols are a linked list and the merges that fit a heap, so a word of n bytes takes n log n steps.
        """
        symbols = [BYTE_IDS[byte] for byte in word]
        before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
        heap: list[Pair] = []  # (rank of the merge, place of its left symbol)

        def offer(place: int) -> None:
            if place >= 0 and after[place] >= 0:
                rank = self._ranks.get((symbols[place], symbols[after[place]]))
                if rank is not None:
                    heappush(heap, (rank, place))

        for place in range(len(symbols)):
            offer(place)
        while heap:
            rank, place = heappop(heap)
            right = after[place]
            # The offer is stale when one of its symbols has been merged since; a merged right symbol is left as -1.
            if right < 0 or self._ranks.get((symbols[place], symbols[right])) != rank:
                continue
            symbols[place], symbols[right] = 256 + rank, -1
            after[place] = after[right]
            if after[right] >= 0:
                before[after[right]] = place
            offer(before[place])
            offer(place)
        return [symbol for symbol in symbols if symbol >= 0]

    def fast(self) -> BPETokenizer:
        """The same tokenizer, run by the `tokenizers` library."""
        names = ["".join(CHARACTERS[byte] for byte in token) for token in self.tokens[:-1]]
        vocab = {name: index for index, name in enumerate(names)} | {EOT: self.eot}
        return BPETokenizer(byte_level(vocab, [(names[left], names[right]) for left, right in self.merges]))

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into a folder and return its path; `load_tokenizer` reads it as a BPETokenizer."""
        return self.fast().save(folder)

    @classmethod
    def from_merges(cls, lines: Iterable[str]) -> "ByteLevelBPE":
        """Read merges written in the alphabet of bytes, one "left right" a line: GPT-2's merges.txt or vocab.bpe."""
        ids = {bytes([BYTES[character]]): index for index, character in enumerate(FIRST_IDS)}
        merges = []
        for line in lines:
            if line.strip() and not line.startswith("#version"):
                left, right = (bytes(BYTES[character] for character in name) for name in line.split())
                merges.append((ids[left], ids[right]))
                ids[left + right] = len(ids)
        return cls(merges)


def train(text: str | Iterable[str], vocab_size: int) -> ByteLevelBPE:
    """Learn the merges of a text (or of many) that fill a vocabulary: bytes, merges and the end of text.

    Of equally frequent pairs the one with the smaller ids comes first, the left id before the right. No two merges
    make the same bytes: what happens between the ends of a token-to-be depends on its bytes alone.

    Args:
        text: what to learn from.
        vocab_size: number of token ids wanted, at least 257; fewer come out when the text has no pair left to merge.

    Raises:
        UserError: the vocabulary is too small for the bytes.
    """
    if vocab_size < 257:
        raise UserError(
            f"a byte-level vocabulary has at least 257 tokens (256 bytes and the end of text): {vocab_size}"
        )
    counts: Counter[str] = Counter()
    for part in [text] if isinstance(text, str) else text:
        counts.update(WORDS.findall(part))
    words = [[BYTE_IDS[byte] for byte in word.encode()] for word in counts]
    weights = list(counts.values())

    pair_counts: dict[Pair, int] = {}
    places: dict[Pair, set[int]] = {}  # the words that hold a pair
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] = pair_counts.get(pair, 0) + weights[index]
            places.setdefault(pair, set()).add(index)

    merges: list[Pair] = []
    # The counts in the heap may be too large, for pairs vanish: an entry is set right only when it comes up.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)
    while heap and len(merges) < vocab_size - 257:
        count, pair = heappop(heap)
        if -count != pair_counts[pair]:
            heappush(heap, (-pair_counts[pair], pair))
            continue
        if not count:
            break
        token = 256 + len(merges)
        merges.append(pair)
        appeared = set()
        for index in places.pop(pair):
            for changed, change in _replace(words[index], pair, token):
                pair_counts[changed] = pair_counts.get(changed, 0) + change * weights[index]
                if change > 0:
                    places.setdefault(changed, set()).add(index)
                    appeared.add(changed)
        # Every pair that appears holds the new token, so it has no older entry in the heap.
        for changed in appeared:
            heappush(heap, (-pair_counts[changed], changed))
    return ByteLevelBPE(merges)


def _replace(word: list[int], pair: Pair, token: int) -> list[tuple[Pair, int]]:
    """Replace a pair by its token within a word, in place; returns the pairs that vanished (-1) and appeared (+1)."""
    left, right = pair
    changes = []
    place = 0
    while place < len(word) - 1:
        if word[place] == left and word[place + 1] == right:
            if place:
                changes += [((word[place - 1], left), -1), ((word[place - 1], token), 1)]
            if place + 2 < len(word):
                changes += [((right, word[place + 2]), -1), ((token, word[place + 2]), 1)]
            word[place : place + 2] = [token]
        place += 1
    return changes
