"""Captions as tokens (section 2.2): their own byte-pair encoding, its dropout, and padding tokens by position."""

import json
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from canon.core.data.tokenizers import BPETokenizer
from canon.images.clip.tokenizer import END_OF_WORD, SOT

DROPOUT = 0.1


class Captions:
    """Turns captions into rows of tokens.

    A row is the start of text, the caption, and then the padding token of each position that is left:
    ``vocab_size`` + position.

    Args:
        tokenizer: of CLIP's kind (lower-cased, byte-level, words end in ``</w>``).
        vocab_size: tokens before the padding tokens.
        length: of a row; longer captions are cut.
    """

    def __init__(self, tokenizer: BPETokenizer, vocab_size: int, length: int):
        self.tokenizer, self.vocab_size, self.length = tokenizer, vocab_size, length
        merges = json.loads(tokenizer.rust.to_str())["model"]["merges"]
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        self.ids = tokenizer.rust.get_vocab(with_added_tokens=True)

    def encode(self, texts: Sequence[str], dropout: float = 0.0, seed: int = 0) -> Int[Tensor, "texts length"]:
        """Rows of tokens.

        Args:
            texts: the captions.
            dropout: probability with which a merge is left out, each time that it could be made.
            seed: of what is left out. (The tokenizers library has BPE dropout too, but its chance cannot be seeded, and
                then an interrupted training could not be resumed exactly.)
        """
        draw = random.Random(seed)
        found = [self._with_dropout(t, dropout, draw) for t in texts] if dropout else self._encode(texts)
        rows = (self.vocab_size + torch.arange(self.length)).repeat(len(texts), 1)
        for row, tokens in zip(rows, found):
            tokens = torch.tensor([self.ids[SOT], *tokens][: self.length])
            row[: len(tokens)] = tokens
        return rows

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(list(texts), special=False)

    def _with_dropout(self, text: str, dropout: float, draw: random.Random) -> list[int]:
        rust = self.tokenizer.rust
        assert rust.normalizer is not None
        assert rust.pre_tokenizer is not None
        words = rust.pre_tokenizer.pre_tokenize_str(rust.normalizer.normalize_str(text))
        return [self.ids[symbol] for word, _ in words for symbol in merge(word, self.ranks, dropout, draw)]


def merge(word: str, ranks: Mapping[tuple[str, str], int], dropout: float, draw: random.Random) -> list[str]:
    """The symbols of one word.

    Source: Provilkov et al. 2020 (BPE-dropout), arXiv 1910.13267, algorithm 1.
    """
    symbols = [*word[:-1], word[-1] + END_OF_WORD]
    while len(symbols) > 1:
        # "merges <- all possible merges between tokens"; "for merge from merges: remove it with probability p"
        pairs = enumerate(pairwise(symbols))
        merges = [(ranks[pair], at) for at, pair in pairs if pair in ranks and draw.random() >= dropout]
        if not merges:
            break
        # "merge <- the one with the highest priority"
        _, at = min(merges)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols
