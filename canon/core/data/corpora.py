"""A corpus, ready to learn from: its tokenizer, and its tokens cut into training and validation."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from canon.core.data import assets, bpe, text
from canon.core.data.tokenizers import EOT, BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer, sha256
from canon.core.data.tokens import read_tokens, write_tokens
from canon.core.errors import UserError, disk_errors

CorpusName = Literal["shakespeare", "standard_library", "mixture"]
TokenizerName = Literal["characters", "bpe", "gpt2"]

_SHAKESPEARE = 1_115_394  # the size of the "tiny Shakespeare" that nanoGPT trains on, so that losses compare
_VERSION = 1  # part of the name of cached corpora: raise it when what they hold changes


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and tokens to test on: the first 90% and the last 10% of every text."""

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
    parts = [text.split(part) for part in _texts(name)]
    train, validation = (EOT.join(part[side] for part in parts) for side in (0, 1))
    if tokenizer == "characters":
        characters = CharTokenizer(train + validation)
        _check(characters, vocab_size)
        return Corpus(characters, *(np.array(characters.encode(side), np.uint16) for side in (train, validation)))
    folder = assets.cache_home() / "corpora" / f"{name}-{tokenizer}-{vocab_size}-{_python(name)}v{_VERSION}"
    if not (folder / "tokenizer.json").is_file():
        with disk_errors(f"corpus {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        if tokenizer == "gpt2":
            subwords = load_tokenizer(assets.fetch("gpt2-bpe"))
            assert isinstance(subwords, BPETokenizer)
        else:
            subwords = bpe.train(train.split(EOT), vocab_size).fast()
        _check(subwords, vocab_size)
        for side, whole in (("train", train), ("validation", validation)):
            pieces = ([*subwords.encode(piece), subwords.eot] for piece in whole.split(EOT))
            write_tokens(folder / f"{side}.tokens", pieces, tokenizer=sha256(subwords))
        with disk_errors(f"corpus {folder}"):
            subwords.save(folder)  # last: it says that the folder is complete
    subwords = load_tokenizer(folder)
    return Corpus(subwords, *(read_tokens(folder / f"{side}.tokens") for side in ("train", "validation")))


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


def _texts(name: CorpusName) -> list[str]:
    if name == "shakespeare":
        return [text.shakespeare()[:_SHAKESPEARE]]
    if name == "standard_library":
        return [text.standard_library()]
    return [text.shakespeare(), text.moby_dick(), text.sotu(), text.standard_library()]


def _python(name: CorpusName) -> str:
    import platform

    return "" if name == "shakespeare" else f"python{platform.python_version()}-"


def _check(tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the corpus needs {tokenizer.vocab_size} tokens: raise --vocab-size to at least that")
