"""The frozen text encoder (section 2.1): a language model that never saw a picture, asked once for each caption."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from filelock import FileLock
from jaxtyping import Float, Float16, Int
from torch import Tensor, nn

from canon.core.data import assets
from canon.core.device import compute_dtype, pick_device
from canon.core.errors import UserError, disk_errors
from canon.core.hub.pretrained import resolve
from canon.core.hub.tensors import load_tensors, save_tensors
from canon.core.llm import Local

Encoder = Callable[[Sequence[str]], list[Float[Tensor, "tokens width"]]]
"""From captions to a vector for each of their tokens. Any such function can stand in the language model's place."""

MOST_TOKENS = 256  # of a caption
_VERSION = 1  # part of the name of cached embeddings: raise it when what they hold changes


def hidden_states(
    model: nn.Module, tokens_of: Callable[[str], list[int]], start: int, most: int = MOST_TOKENS, batch_size: int = 64
) -> Encoder:
    """The encoder that a language model is: its last hidden states, after the final norm.

    Args:
        model: from tokens (batch, time) to hidden states (batch, time, width).
        tokens_of: from a caption to its tokens.
        start: the token put before each caption. A causal language model takes its first position for a resting place
            of attention whatever stands there; this one's state is not handed on.
        most: tokens of a caption that it can read.
        batch_size: captions at once, all of one length.
    """

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> list[Float[Tensor, "tokens width"]]:
        device = next(model.parameters()).device
        tokens = [[start, *tokens_of(text)[:most]] for text in texts]
        found: dict[int, Tensor] = {}
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        for _, group in groupby(order, key=lambda i: len(tokens[i])):
            for rows in torch.tensor(list(group)).split(batch_size):
                states = model(torch.tensor([tokens[i] for i in rows.tolist()], device=device))
                found |= zip(rows.tolist(), states[:, 1:].float().cpu())
        return [found[i] for i in range(len(texts))]

    return encode


def load_encoder(source: str) -> Encoder:
    """The encoder of a language model's name, folder or GGUF file, see `canon.core.llm`.

    Raises:
        UserError: there is nothing there, no system of the library can load it, or it is no model of LLaMA's kind.
    """
    local = Local(source, "exact")
    if not isinstance(getattr(local.model, "head", None), nn.Linear):
        raise UserError(f"text_encoder {source} has no separate head to take off: give a model of LLaMA's kind")
    device = pick_device()
    dtype = compute_dtype(device, "auto")
    model = local.model.to(device).eval().requires_grad_(False)
    model.head = nn.Identity()  # the states themselves, not the words they predict
    for p in model.parameters():  # and not the table of rotations, which needs its float32
        p.data = p.data.to(dtype)
    most = min(MOST_TOKENS, local.model.config.context_length - 1)
    return hidden_states(model, local.tokenizer.encode, local.tokenizer.eot or 0, most)


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of each dimension of a language model's hidden states.

    Half of their energy lies in three of SmolLM2's 576 dimensions, the same for all words. LayerNorm alone leaves it
    there: then 3% of emoji names are nearest, by the mean of their states, to "a picture of" themselves, but 28% where
    each dimension is standardised.
    """

    mean: Float[Tensor, " width"]
    std: Float[Tensor, " width"]


@dataclass(frozen=True)
class Captions:
    """Distinct captions with the vectors of all their tokens, one after the other."""

    texts: list[str]
    vectors: Float16[Tensor, "tokens width"]
    ends: Int[Tensor, " captions"]
    """Where each caption's vectors end."""
    statistics: Statistics
    """By which vectors are standardised when they are shown."""

    @classmethod
    def of(cls, texts: Iterable[str], encoder: Encoder, statistics: Statistics | None = None) -> "Captions":
        """Encode each distinct caption once; ``statistics`` are those of the captions themselves if not given.

        Raises:
            UserError: the statistics are of vectors of another width.
        """
        distinct = list(dict.fromkeys(texts))
        states = encoder(distinct)
        ends = torch.tensor([len(each) for each in states]).cumsum(0)
        vectors = torch.cat(states).half()
        if statistics is not None and len(statistics.mean) != vectors.shape[1]:
            learned = f"the model learned from vectors of {len(statistics.mean)}"
            raise UserError(
                f"the text encoder gives vectors of {vectors.shape[1]}, but {learned}: it is another encoder"
            )
        return cls(distinct, vectors, ends, statistics or measured(vectors))

    def index(self) -> dict[str, int]:
        """The number of each caption."""
        return {text: number for number, text in enumerate(self.texts)}

    def rows(self, numbers: Int[Tensor, " batch"], length: int) -> Float16[Tensor, "batch length width"]:
        """What the U-Nets are shown of captions: the vectors of their first tokens, then zeros.

        Args:
            numbers: of captions; any other number stands for none, which is zeros alone ("zeroing out the text
                embeddings", section 4.1).
            length: tokens of a row.
        """
        out = self.vectors.new_zeros(len(numbers), length, self.vectors.shape[1])
        bounds = [0, *self.ends.tolist()]
        for row, number in zip(out, numbers.tolist()):
            if 0 <= number < len(self.texts):
                states = self.vectors[bounds[number] : bounds[number + 1]][:length].float()
                row[: len(states)] = (states - self.statistics.mean) / self.statistics.std
        return out


def measured(vectors: Float16[Tensor, "tokens width"]) -> Statistics:
    """Statistics of these vectors."""
    if len(vectors) < 2:
        return Statistics(torch.zeros(vectors.shape[1]), torch.ones(vectors.shape[1]))
    return Statistics(vectors.float().mean(0), vectors.float().std(0).clamp(min=1e-3))


def embed(
    texts: Sequence[str], encoder: Encoder, length: int, statistics: Statistics
) -> Float16[Tensor, "texts length width"]:
    """Embeddings of prompts, as :meth:`Captions.rows` gives them."""
    captions = Captions.of(texts, encoder, statistics)
    number = captions.index()
    return captions.rows(torch.tensor([number[text] for text in texts]), length)


def encoded(texts: Iterable[str], source: str) -> Captions:
    """Captions encoded by a language model; once (5,000 short ones take a minute), then read from the cache.

    Raises:
        UserError: the language model cannot be loaded, or the disk is full.
    """
    distinct = list(dict.fromkeys(texts))
    place = resolve(source)  # another model may lie there tomorrow
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    stamps = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    key = hashlib.sha256(json.dumps([_VERSION, stamps, distinct]).encode()).hexdigest()[:20]
    path = assets.cache_home() / "text" / f"{key}.safetensors"
    with disk_errors(f"text embeddings to {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):  # several processes of a training may ask at once
            if not path.is_file():
                found = Captions.of(distinct, load_encoder(source))
                save_tensors({"vectors": found.vectors, "ends": found.ends}, path)
    tensors = load_tensors(path)
    return Captions(distinct, tensors["vectors"], tensors["ends"], measured(tensors["vectors"]))
