"""A corpus, ready to learn from: its tokenizer, and its tokens cut into training and validation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock

from canon.core.data import assets, bpe, text
from canon.core.data.tokenizers import (
    TOKENIZER_FILE,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    sha256,
)
from canon.core.data.tokens import read_tokens, write_tokens
from canon.core.errors import UserError, disk_errors

CorpusName = Literal["shakespeare", "standard_library", "mixture"]
TokenizerName = Literal["characters", "bpe", "gpt2"]

_SHAKESPEARE = 1_115_394  # the size of the "tiny Shakespeare" that nanoGPT trains on, so that losses compare
_VERSION = 2  # part of the name of cached corpora: raise it when what they hold changes


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and tokens to test on: the first 90% and the last 10% of every source.

    Subwords are followed by the end of text after each document (a play, a speech, a file of source code).
    """

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray


def load_corpus(name: CorpusName, tokenizer: TokenizerName, vocab_size: int) -> Corpus:
    """Read a corpus; what takes long to make is made once and kept in the cache folder.

    Args:
        name: ``shakespeare`` (the first 1,115,394 characters), ``standard_library`` (Python's own source), or
            ``mixture`` (all of Shakespeare, Moby-Dick, speeches, the standard library).
        tokenizer: ``characters``, a byte-level ``bpe`` of ``vocab_size`` trained on the training part, or ``gpt2``.
        vocab_size: most tokens the model knows.

    Raises:
        UserError: the corpus has more different tokens than ``vocab_size``.
    """
    parts = [text.split(documents) for documents in _sources(name)]
    train, validation = ([document for part in parts for document in part[side]] for side in (0, 1))
    if tokenizer == "characters":
        characters = CharTokenizer("".join(train + validation))
        _check(characters, vocab_size)
        sides = ("".join(side) for side in (train, validation))
        return Corpus(characters, *(np.array(characters.encode(side), np.uint16) for side in sides))
    folder = assets.cache_home() / "corpora" / f"{name}-{tokenizer}-{vocab_size}-{_python(name)}v{_VERSION}"
    with disk_errors(f"corpus {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # several processes of a training may ask at once
            if not (folder / TOKENIZER_FILE).is_file():
                _tokenize(folder, tokenizer, vocab_size, train, validation)
    subwords = load_tokenizer(folder)
    check = sha256(subwords)
    return Corpus(subwords, *(read_tokens(folder / f"{side}.tokens", check) for side in ("train", "validation")))


def _tokenize(folder: Path, tokenizer: TokenizerName, vocab_size: int, train: list[str], validation: list[str]) -> None:
    if tokenizer == "gpt2":
        subwords = load_tokenizer(assets.fetch("gpt2-bpe"))
        assert isinstance(subwords, BPETokenizer)
    else:
        subwords = bpe.train(train, vocab_size).fast()
    _check(subwords, vocab_size)
    for side, documents in (("train", train), ("validation", validation)):
        pieces = ([*subwords.encode(document), subwords.eot] for document in documents)
        write_tokens(folder / f"{side}.tokens", pieces, tokenizer=sha256(subwords))
    subwords.save(folder)  # last: it says that the folder is complete


def validation_loss(model: Any, tokens: np.ndarray, context_length: int, windows: int | None = None) -> float:
    """Mean ``model.loss`` over non-overlapping windows of ``tokens``, in nats a token.

    Args:
        model: a module whose ``loss`` takes ``{"tokens": (batch, context_length + 1)}``.
        tokens: the validation tokens.
        context_length: inputs of a window.
        windows: how many windows, spread evenly; all that fit by default.
    """
    device = next(model.parameters()).device
    starts = np.arange(0, len(tokens) - context_length, context_length)
    if windows is not None and windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, windows).astype(int)]
    total = 0.0
    with torch.no_grad():
        for chunk in np.array_split(starts, -(-len(starts) // 64)):
            batch = tokens[chunk[:, None] + np.arange(context_length + 1)].astype(np.int64)
            total += float(model.loss({"tokens": torch.from_numpy(batch).to(device)})[0]) * len(chunk)
    return total / len(starts)


def _sources(name: CorpusName) -> list[list[str]]:
    """The documents of each source."""
    if name == "shakespeare":
        return [[text.shakespeare()[:_SHAKESPEARE]]]
    code = list(text.standard_library_files().values())
    if name == "standard_library":
        return [code]
    return [list(text.shakespeare_files().values()), [text.moby_dick()], list(text.sotu_files().values()), code]


def _python(name: CorpusName) -> str:
    import platform

    return "" if name == "shakespeare" else f"python{platform.python_version()}-"


def _check(tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the corpus needs {tokenizer.vocab_size} tokens: raise --vocab-size to at least that")
