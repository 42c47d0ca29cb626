"""Real translation pairs: the user interfaces of free software, as its translators published them.

English messages and their translations come from the gettext catalogues of packages under BSD and Apache
licences. They are cleaned, freed of duplicates, and divided by source sentence so that nothing near a test sentence is
trained on. Placeholders such as ``%(name)s`` or ``{count}`` become the symbols ①, ②, ... on both sides.
"""

import ast
import hashlib
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from canon.core.data.assets import fetch
from canon.core.data.tokenizers import Tokenizer, load_tokenizer
from canon.core.errors import UserError

PAD, BOS, EOS = 0, 1, 2
N_SPECIAL = 3

# Assets with catalogues in all languages; JupyterLab's come as one asset a language.
PACKAGES = ("django", "wagtail", "sphinx", "superset", "horizon", "heat", "nova", "neutron", "glance", "keystone")
# A package names the folder of a language as its framework does.
FOLDERS = {"de": ("de",), "fr": ("fr",), "zh": ("zh_Hans", "zh_CN", "zh")}
SYMBOLS = "①②③④⑤⑥⑦⑧⑨"
HELD_OUT = 0.04  # share of the test set, and again of the validation set


class Pair(NamedTuple):
    """A source sentence and its translation."""

    source: str
    target: str


@dataclass(frozen=True)
class Pairs:
    """Translation pairs in three parts that share no source sentence.

    Nor do they share one that differs only in case, punctuation, digits or placeholders. ``left_out`` is how many of
    the pairs that were read are in none of the parts: unfit, repeated, too near a held-out sentence, or too long.
    """

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    left_out: int = 0


def translation_pairs(languages: str = "en-de", file: str | Path = "") -> Pairs:
    """Pairs of English and another language from all catalogues, or pairs of any languages from a file.

    Args:
        languages: ``en-de``, ``en-fr`` or ``en-zh`` (simplified Chinese); a file may hold any.
        file: a UTF-8 file with one pair a line, source and target separated by a tab; "" means the catalogues.

    Raises:
        UserError: another language without a file, a file that is not of this form, or no network.
    """
    if file:
        return divide(_lines(Path(file)), mask)  # the user has chosen these pairs: nothing is taken from them
    source, _, target = languages.partition("-")
    if source != "en" or target not in FOLDERS:
        raise UserError(f"no translations for {languages!r}: choose {', '.join(f'en-{name}' for name in FOLDERS)}")
    return divide(_messages(target))


def _lines(path: Path) -> Iterator[dict[str, str]]:
    """Pairs of a tab-separated file, in the form of catalogue messages."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: it should hold one source<tab>target pair a line")
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                source, tab, target = line.rstrip("\n").partition("\t")
                if not tab:
                    raise UserError(f"{path}, line {number}: no tab between source and target")
                yield {"msgid": source, "msgstr": target}
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: convert it first") from error


def _messages(language: str) -> Iterator[dict[str, str]]:
    """All finished messages in one language, in a fixed order."""
    for package in PACKAGES:
        paths = fetch(f"{package}-catalogues").rglob("LC_MESSAGES/*.po")
        for path in sorted(path for path in paths if path.parents[1].name in FOLDERS[language]):
            yield from read_po(path.read_text(encoding="utf-8"))
    for path in sorted(fetch(f"jupyterlab-{language}").rglob("*.mo")):
        yield from read_mo(path.read_bytes())


# ---------------------------------------------------------------------------------------------------- catalogues


def read_po(text: str) -> Iterator[dict[str, str]]:
    """Messages of a gettext catalogue in its text form.

    Untranslated, fuzzy (unsure) and obsolete messages are left out, as gettext's own compiler does.

    Args:
        text: a PO file.

    Yields:
        The fields of a message: ``msgid``, ``msgstr``; or ``msgid``, ``msgid_plural``, ``msgstr[0]``, ``msgstr[1]`` ...
    """
    message: dict[str, str] = {}
    field, fuzzy = "", False
    for line in (*text.split("\n"), "#"):  # the last one ends the last message
        line = line.strip()
        keyword, _, rest = line.partition(" ")
        if line.startswith('"') and field:  # a string that goes on
            message[field] += ast.literal_eval(line)
            continue
        begins = line.startswith("#") or keyword == "msgctxt" or (keyword == "msgid" and "msgid" in message)
        if begins and "msgid" in message:
            if message["msgid"] and not fuzzy and any(message[key] for key in message if key.startswith("msgstr")):
                yield message  # the empty msgid is the catalogue's header
            message, field, fuzzy = {}, "", False
        if line.startswith("#,"):
            fuzzy |= "fuzzy" in line
        elif keyword.startswith(("msgid", "msgstr", "msgctxt")):
            field, message[keyword] = keyword, ast.literal_eval(rest.strip())


def read_mo(data: bytes) -> Iterator[dict[str, str]]:
    """Messages of a gettext catalogue in its compiled form; the fields are those of :func:`read_po`.

    Raises:
        ValueError: the data are no such catalogue.
    """
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise ValueError("not a compiled gettext catalogue (MO file)")
    count, sources, targets = struct.unpack_from(order + "3I", data, 8)
    for index in range(count):
        texts = []
        for table in (sources, targets):
            length, start = struct.unpack_from(order + "2I", data, table + 8 * index)
            texts.append(data[start : start + length].decode("utf-8"))
        source, target = texts[0].rpartition("\x04")[2].split("\0"), texts[1].split("\0")  # \x04 ends a context
        if not source[0] or not any(target):
            continue
        if len(source) == 1:
            yield {"msgid": source[0], "msgstr": target[0]}
        else:
            forms = {f"msgstr[{form}]": text for form, text in enumerate(target)}
            yield {"msgid": source[0], "msgid_plural": source[1], **forms}


# ---------------------------------------------------------------------------------------------------- cleaning

# %(name)s, %s %5.2f, %1, {name} {0} {{name}} ${name}
_PLACEHOLDER = re.compile(
    r"%\(\w+\)[-#0+]*\d*(?:\.\d+)?[a-zA-Z]|%[-#0+]*\d*(?:\.\d+)?[sdrifgxu]\b|%\d\b|\$?\{\{?[^{}]*\}?\}"
)
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|&[a-z]+;|`")


def mask_placeholders(text: str, names: list[str]) -> str:
    """Replace placeholders by ①, ② ... in order of appearance, in a text made tidy.

    Args:
        text: a message.
        names: the placeholders known so far; new ones are appended (at most nine).
    """

    def symbol(match: re.Match[str]) -> str:
        if match[0] not in names:
            names.append(match[0])
        return SYMBOLS[min(names.index(match[0]), len(SYMBOLS) - 1)]

    return _PLACEHOLDER.sub(symbol, tidy(text))


def restore_placeholders(text: str, names: Sequence[str]) -> str:
    """Undo :func:`mask_placeholders`; a symbol without a name stays as it is."""
    return re.sub(f"[{SYMBOLS}]", lambda match: dict(zip(SYMBOLS, names)).get(match[0], match[0]), text)


def mask(source: str, target: str) -> Pair | None:
    """The pair with placeholders masked and white space made single.

    None if a side is empty or there are more placeholders than symbols.
    """
    names: list[str] = []
    pair = Pair(*(mask_placeholders(text, names) for text in (source, target)))
    return pair if all(pair) and len(names) <= len(SYMBOLS) else None


def clean(source: str, target: str) -> Pair | None:
    """The masked pair, or None if a message and its translation cannot serve as an example.

    They cannot if they have markup, are not of 2 to 40 words in the source, were left untranslated, or if the two
    sides do not use the same placeholders.
    """
    pair = mask(source, target)
    if pair is None or any(set(SYMBOLS) & set(text) or _MARKUP.search(text) for text in (source, target)):
        return None
    used = [{symbol for symbol in text if symbol in SYMBOLS} for text in pair]
    words = [len(text.split()) for text in pair]
    if used[0] != used[1] or not 2 <= words[0] <= 40 or not 1 <= words[1] <= 60 or pair.source == pair.target:
        return None
    return pair


def tidy(text: str) -> str:
    """Unicode in its composed form (NFC), with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def sentence_key(text: str) -> str:
    """What near duplicates have in common: the words without case, with every digit and placeholder the same."""
    masked = re.sub(rf"[\d{SYMBOLS}]+", "0", mask_placeholders(text, []))
    return " ".join(re.findall(r"[^\W_]+", masked.casefold()))


def divide(messages: Iterable[dict[str, str]], prepare: Callable[[str, str], Pair | None] = clean) -> Pairs:
    """Clean messages, keep the first translation of each source sentence, and split them by a hash of the sentence.

    The split is a function of the sentence alone: more catalogues move no sentence from one part to another. Singular
    and plural of one message stay together.

    Args:
        messages: with the fields of :func:`read_po`.
        prepare: makes the pair of a source and a target, or None if they shall not serve.
    """
    parts: dict[str, dict[str, tuple[Pair, str]]] = {"train": {}, "validation": {}, "test": {}}
    seen: set[str] = set()
    read = 0
    for message in messages:
        group = sentence_key(message["msgid"])
        draw = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") / 2**32
        part = "test" if draw < HELD_OUT else "validation" if draw < 2 * HELD_OUT else "train"
        for source, target in _forms(message):
            read += 1
            pair = prepare(source, target)
            if pair and pair.source not in seen:
                seen.add(pair.source)
                parts[part][pair.source] = pair, sentence_key(pair.source)
    # A plural may equal another message, whose hash is its own: whatever is near a test sentence leaves training.
    test = {key for _, key in parts["test"].values()}
    held_out = test | {key for _, key in parts["validation"].values()}
    kept = (
        [pair for pair, key in parts["train"].values() if key not in held_out],
        [pair for pair, key in parts["validation"].values() if key not in test],
        [pair for pair, _ in parts["test"].values()],
    )
    return Pairs(*kept, left_out=read - sum(map(len, kept)))


def _forms(message: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs of one message. The last plural form is the general one; a language with one form has no singular."""
    if "msgid_plural" not in message:
        yield message["msgid"], message.get("msgstr", "")
        return
    forms = [text for key, text in sorted(message.items()) if key.startswith("msgstr[")]
    if len(forms) > 1:
        yield message["msgid"], forms[0]
    yield message["msgid_plural"], forms[-1]


# ---------------------------------------------------------------------------------------------------- tokens


class SharedVocabulary:
    """One byte-pair vocabulary for both languages (§5.1 of "Attention Is All You Need"), with PAD, BOS and EOS.

    Args:
        tokenizer: the byte-pair encoding; its ids are moved up by three.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, pairs: Iterable[Pair], vocab_size: int) -> "SharedVocabulary":
        """Learn the merges from both sides of the training pairs."""
        text = "\n".join(side for pair in pairs for side in pair)
        from canon.core.data import bpe

        return cls(bpe.train(text, vocab_size - N_SPECIAL))

    @property
    def vocab_size(self) -> int:
        """Number of ids, the three special ones included."""
        return self.tokenizer.vocab_size + N_SPECIAL

    @classmethod
    def load(cls, folder: str | Path) -> "SharedVocabulary":
        """The vocabulary saved in a folder."""
        return cls(load_tokenizer(folder))

    def save(self, folder: str | Path) -> None:
        """Write it into a folder."""
        self.tokenizer.save(folder)

    def encode(self, text: str) -> list[int]:
        """Ids of a sentence, without special ones."""
        return [token + N_SPECIAL for token in self.tokenizer.encode(text)]

    def encode_pairs(self, pairs: Iterable[Pair]) -> list[tuple[list[int], list[int]]]:
        """Ids of both sides."""
        return [(self.encode(pair.source), self.encode(pair.target)) for pair in pairs]

    def decode(self, tokens: Iterable[int]) -> str:
        """The sentence; special ids are left out."""
        return self.tokenizer.decode([token - N_SPECIAL for token in tokens if token >= N_SPECIAL])


def fitting(pairs: Pairs, vocabulary: SharedVocabulary, tokens_per_batch: int) -> Pairs:
    """The pairs of which each side fits a batch, with the special ids that are added to it.

    Raises:
        UserError: a part has none.
    """
    kept = [
        [pair for pair in part if max(len(vocabulary.encode(side)) + 1 for side in pair) <= tokens_per_batch]
        for part in (pairs.train, pairs.validation, pairs.test)
    ]
    left_out = pairs.left_out + sum(map(len, (pairs.train, pairs.validation, pairs.test))) - sum(map(len, kept))
    if not all(kept):
        train, validation, test = map(len, kept)
        raise UserError(
            f"{train} pairs to train on, {validation} to validate and {test} to test with ({left_out} were unfit, "
            f"repeated or longer than {tokens_per_batch} tokens): give more pairs or larger batches"
        )
    return Pairs(*kept, left_out=left_out)


def padded(sequences: Sequence[Sequence[int]]) -> Int[Tensor, "rows longest"]:
    """Sequences of ids as one tensor, filled up with PAD on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[PAD] * (longest - len(ids))] for ids in sequences])


class TranslationBatches:
    """Endless batches of sentence pairs of about equal length (§5.1), in an order fixed by (seed, position).

    Every epoch shuffles the pairs, groups them by length, and shuffles the groups. A batch holds as many pairs as fit
    `tokens_per_batch` source and as many target tokens, padding included.

    Args:
        pairs: ids of source and target, without special ones.
        tokens_per_batch: upper limit, for each side.
        seed: of the shuffling.

    Yields (``next``):
        ``source`` (batch, S): the sentence, EOS; ``target`` (batch, T + 2): BOS, the translation, EOS; both padded.

    Raises:
        ValueError: no pairs, or one that is longer than a batch.
    """

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], tokens_per_batch: int, seed: int = 0):
        self.sources = [[*source, EOS] for source, _ in pairs]
        self.targets = [[BOS, *target, EOS] for _, target in pairs]
        # the target's first token is only read and its last only predicted, hence - 1
        self.lengths = [(len(s), len(t) - 1) for s, t in zip(self.sources, self.targets)]
        self.tokens_per_batch, self.seed = tokens_per_batch, seed
        self.epoch = self.position = 0
        if not pairs or max(map(max, self.lengths)) > tokens_per_batch:
            raise ValueError(f"{len(pairs)} pairs do not fit batches of {tokens_per_batch} tokens")
        self.plan = self._plan()

    def _plan(self) -> list[list[int]]:
        """Indices of the pairs of each batch of this epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        longest = (0, 0)
        for index in sorted(shuffled, key=lambda i: self.lengths[i]):  # stable: equal lengths stay shuffled
            source, target = self.lengths[index]
            longest = max(longest[0], source), max(longest[1], target)
            if not batches or (len(batches[-1]) + 1) * max(longest) > self.tokens_per_batch:
                batches.append([])
                longest = source, target
            batches[-1].append(index)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self.position == len(self.plan):
            self.epoch, self.position = self.epoch + 1, 0
            self.plan = self._plan()
        chosen = self.plan[self.position]
        self.position += 1
        return {
            "source": padded([self.sources[i] for i in chosen]),
            "target": padded([self.targets[i] for i in chosen]),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self.epoch, self.position = state["epoch"], state["position"]
        self.plan = self._plan()
