"""Text to token ids and back: characters, and every subword tokenizer that is published as `tokenizer.json`."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from canon.core.errors import UserError
from canon.core.lab.files import merge_json, read_json

EOT = "<|endoftext|>"
CHARACTERS_FILE = "characters.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer can do."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def eot(self) -> int | None:
        """Id of the end-of-text token, if there is one."""
        ...

    def encode(self, text: str, /) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of token ids."""
        ...

    def save(self, folder: str | Path, /) -> Path:
        """Write it for `load_tokenizer`."""
        ...


class CharTokenizer:
    """One token per character; the vocabulary is the sorted set of the characters of a text.

    Args:
        text: a text that holds every character there is.
    """

    eot: int | None = None

    def __init__(self, text: str):
        self.characters = "".join(sorted(set(text)))
        self._ids = {character: index for index, character in enumerate(self.characters)}

    @property
    def vocab_size(self) -> int:
        """Number of different characters."""
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Ids of the characters.

        Raises:
            UserError: a character is not in the vocabulary.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"the character {error.args[0]!r} is not among the {self.vocab_size} of this tokenizer"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The characters of the ids."""
        return "".join(self.characters[index] for index in ids)

    def save(self, folder: str | Path) -> Path:
        """Write `characters.json` into a folder and return its path."""
        path = Path(folder) / CHARACTERS_FILE
        path.write_text(json.dumps({"characters": self.characters}), encoding="utf-8")
        return path


class BPETokenizer:
    """A subword tokenizer run by the `tokenizers` library (Rust): fast, for bulk encoding and for published models.

    Args:
        rust: the library's tokenizer.
        eot: its end-of-text token; None if that is not in the vocabulary.
    """

    def __init__(self, rust: tokenizers.Tokenizer, eot: str = EOT):
        self.rust = rust
        self.eot: int | None = rust.token_to_id(eot)

    @classmethod
    def from_vocabulary(cls, vocabulary: str | Path, merges: str | Path, eot: str = EOT) -> "BPETokenizer":
        """The byte-level BPE of GPT-2 from its two published files (vocab.json and merges.txt, or their old names)."""
        vocab = json.loads(Path(vocabulary).read_text(encoding="utf-8"))
        lines = Path(merges).read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return cls(byte_level(vocab, [(left, right) for left, right in pairs], eot), eot)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return self.rust.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; none are added at its ends.

        The library takes a long text in one piece slowly: megabytes are better cut into documents for `encode_batch`.

        Args:
            text: the text.
            special: read special tokens such as <|endoftext|> in it as what they are; False: as plain characters,
                which is right for text that a stranger wrote.

        Raises:
            UserError: see `encode_batch`.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of many texts, on all cores.

        Raises:
            UserError: a text holds bytes that are not UTF-8, which Python passes on as lone surrogates.
        """
        self.rust.encode_special_tokens = not special
        try:
            encodings = self.rust.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:  # what the library makes of lone surrogates
            raise UserError("the text is not valid UTF-8: convert it to UTF-8 first") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self.rust.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into a folder and return its path; `tokenizer_config.json` names the end of text."""
        path = Path(folder) / TOKENIZER_FILE
        self.rust.save(str(path))
        if self.eot is not None:
            merge_json(path.with_name(TOKENIZER_CONFIG_FILE), {"eos_token": self.rust.id_to_token(self.eot)})
        return path


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], eot: str = EOT) -> tokenizers.Tokenizer:
    """A byte-level BPE of the `tokenizers` library from a vocabulary and its merges, in the alphabet of GPT-2."""
    rust = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(eot, normalized=False)])
    return rust


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved in a folder or file: ours, any `tokenizer.json`, or the two vocabulary files of GPT-2.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    names = [path.name] if path.is_file() else [TOKENIZER_FILE, CHARACTERS_FILE, "vocab.json", "encoder.json"]
    for file in (folder / name for name in names):
        if not file.is_file():
            continue
        try:
            if file.name == CHARACTERS_FILE:
                return CharTokenizer(json.loads(file.read_text(encoding="utf-8"))["characters"])
            if file.name in ("vocab.json", "encoder.json"):
                return BPETokenizer.from_vocabulary(
                    file, folder / ("merges.txt" if file.name == "vocab.json" else "vocab.bpe")
                )
            rust = tokenizers.Tokenizer.from_file(str(file))
            return BPETokenizer(rust, _end_of_text(folder, rust))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} is not a tokenizer that can be read: {error}") from error
    raise UserError(f"there is no tokenizer at {path}: expected {' or '.join(names)}")


def _end_of_text(folder: Path, rust: tokenizers.Tokenizer) -> str:
    """The token that ends a text, as the files published beside a `tokenizer.json` name it; `EOT` where none does.

    It is what a model writes at the end of its answer, so a chat that took another one would never stop.
    """
    token = read_json(folder / TOKENIZER_CONFIG_FILE).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        return token
    for name in ("generation_config.json", "config.json"):
        index = read_json(folder / name).get("eos_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and (token := rust.id_to_token(index)):
            return token
    return EOT


def sha256(tokenizer: Tokenizer) -> str:
    """What identifies a tokenizer: the sha256 of the file it saves."""
    with tempfile.TemporaryDirectory() as folder:
        return hashlib.sha256(tokenizer.save(folder).read_bytes()).hexdigest()
