"""Captions as tokens (section 2.4): a byte-level BPE of lower-cased words, whose last symbol carries ``</w>``.

Words are cut by the released code's regular expression; digits stand alone. The text is brought to Unicode's NFC and
its white space to single spaces, as Hugging Face does, where the released code mends broken text with a library.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from jaxtyping import Int
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from canon.core.data.tokenizers import EOT, TOKENIZER_FILE, BPETokenizer, load_tokenizer
from canon.core.errors import UserError
from canon.core.hub.pretrained import resolve

SOT = "<|startoftext|>"
END_OF_WORD = "</w>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each of the 256 bytes, as in GPT-2
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_FIRST = 2 * len(BYTES)  # every byte within a word, and at its end
_PUBLISHED_MERGES = 48_894


def bpe_tokenizer(merges: Sequence[tuple[str, str]]) -> BPETokenizer:
    """The tokenizer of these merges; ids are the bytes, the bytes at the end of a word, the merges, start, end."""
    symbols = [*BYTES, *(symbol + END_OF_WORD for symbol in BYTES), *(left + right for left, right in merges)]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    rust = _empty(models.BPE(vocab=vocabulary, merges=list(merges), end_of_word_suffix=END_OF_WORD))
    # in the alphabet of bytes Ġ is the space
    rust.decoder = decoders.Sequence([decoders.Replace(END_OF_WORD, "Ġ"), decoders.ByteLevel()])
    rust.add_special_tokens([AddedToken(token, normalized=False) for token in (SOT, EOT)])
    return BPETokenizer(rust)


def _empty(model: models.BPE) -> tokenizers.Tokenizer:
    rust = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    rust.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    return rust


def published_tokenizer() -> BPETokenizer:
    """The tokenizer of the released models: 49,408 tokens.

    Raises:
        UserError: the vocabulary (1.3 MB) is not here and cannot be fetched.
    """
    with gzip.open(resolve("clip-bpe"), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 1 + _PUBLISHED_MERGES]  # the file goes on beyond what the models use
    return bpe_tokenizer([(left, right) for left, right in map(str.split, lines)])


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A tokenizer of the same kind learned from captions, of at most ``vocab_size`` tokens.

    Raises:
        UserError: ``vocab_size`` is too small for the bytes and the two special tokens.
    """
    if vocab_size < _FIRST + 2:
        raise UserError(f"vocab_size {vocab_size} is too small: a byte-level BPE of words has at least {_FIRST + 2}")
    rust = _empty(models.BPE(end_of_word_suffix=END_OF_WORD))
    ends = [symbol + END_OF_WORD for symbol in BYTES]  # numbered beforehand, or ties are broken at random
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=ends,
        initial_alphabet=BYTES,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    rust.train_from_iterator(captions, trainer)
    merges = json.loads(rust.to_str())["model"]["merges"][: vocab_size - _FIRST - 2]
    return bpe_tokenizer([(left, right) for left, right in merges])


def load_clip_tokenizer(folder: str | Path) -> BPETokenizer:
    """The tokenizer in a folder: ours, or Hugging Face's ``tokenizer.json``, or its ``vocab.json`` and ``merges.txt``.

    Raises:
        UserError: there is none, or it is another kind of tokenizer.
    """
    folder = Path(folder)
    if not (folder / TOKENIZER_FILE).is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
        return bpe_tokenizer([(left, right) for left, right in pairs])
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, BPETokenizer) or tokenizer.eot is None or tokenizer.rust.token_to_id(SOT) is None:
        raise UserError(f"the tokenizer in {folder} is not CLIP's, which has {SOT} and {EOT}")
    return tokenizer


def tokenize(
    tokenizer: BPETokenizer, texts: Sequence[str], context_length: int = 77, pad: int = 0
) -> Int[Tensor, "texts context_length"]:
    """Token ids of captions between start and end; the longer are cut, the shorter are filled up.

    Args:
        tokenizer: see above.
        texts: the captions.
        context_length: tokens of each row, start and end included.
        pad: what stands after the end. CLIP has 0; Stable Diffusion the end of text once more.
    """
    start, end = (tokenizer.rust.token_to_id(token) for token in (SOT, EOT))
    rows = torch.full((len(texts), context_length), pad)
    for row, ids in zip(rows, tokenizer.encode_batch(list(texts))):
        ids = torch.tensor([start, *ids[: context_length - 2], end])
        row[: len(ids)] = ids
    return rows
