"""Batches of token windows from a corpus in memory, on disk or in documents; every position can be resumed exactly."""

import json
import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from canon.core.data.tokenizers import Tokenizer
from canon.core.errors import UserError, disk_errors

Batch = dict[str, Int64[Tensor, "batch window"]]


class TokenBatches:
    """Endless batches of windows of one long token sequence, each token predicted about once per epoch.

    An epoch cuts the sequence into windows side by side, starting at a random place, and deals them out in random
    order without repetition; windows of one epoch share only the token that is last target here and first input
    there. Batch number n is a function of (seed, n) alone, so the whole state is that number.

    Args:
        tokens: the sequence: a list, a 1-D array (a memory map is read where needed) or a 1-D tensor.
        context_length: inputs of a window; a window holds one token more, the last target.
        batch_size: windows of a batch.
        seed: of the order.

    Raises:
        UserError: the sequence is shorter than one window.
    """

    def __init__(
        self, tokens: Sequence[int] | np.ndarray | Tensor, context_length: int, batch_size: int, seed: int = 0
    ):
        self.tokens = np.asarray(tokens)
        self.context_length, self.batch_size, self.seed = context_length, batch_size, seed
        self.position = 0  # batches dealt out
        if len(self.tokens) <= context_length:
            raise UserError(
                f"the corpus has {len(self.tokens)} tokens, but one window of context_length {context_length} takes "
                f"{context_length + 1}: use more text or a shorter context"
            )
        # All windows that fit, less one (where there are two): that leaves room to start at other places each epoch.
        self.windows_per_epoch = max(1, (len(self.tokens) - 1) // context_length - 1)
        self._epoch, self._starts = -1, np.empty(0, np.int64)
        self._window = np.arange(context_length + 1)

    def __iter__(self) -> "TokenBatches":
        return self

    def __next__(self) -> Batch:
        first = self.position * self.batch_size
        starts = np.empty(self.batch_size, np.int64)
        filled = 0
        while filled < self.batch_size:  # a batch may end one epoch and begin the next
            epoch, index = divmod(first + filled, self.windows_per_epoch)
            part = self._epoch_starts(epoch)[index : index + self.batch_size - filled]
            starts[filled : filled + len(part)] = part
            filled += len(part)
        self.position += 1
        return {"tokens": torch.from_numpy(self.tokens[starts[:, None] + self._window].astype(np.int64))}

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch start, in the order of the epoch; 8 bytes per window are kept."""
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            spare = len(self.tokens) - 1 - self.windows_per_epoch * self.context_length
            offset = generator.integers(spare + 1)
            self._starts = offset + self.context_length * generator.permutation(self.windows_per_epoch)
            self._epoch = epoch
        return self._starts

    def state_dict(self) -> dict[str, int]:
        """The number of batches dealt out."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict()` was taken."""
        self.position = state["position"]


class PackedBatches:
    """Endless batches packed from documents: tokenised as they come, an end-of-text token after each, no padding.

    Every epoch takes the documents in another random order. Windows follow each other in the resulting stream and
    share one token, as above. The state is the place of the next window: its document and the token within.

    Args:
        documents: texts by index; an object that reads them from disk on access serves as well as a list.
        tokenizer: must have an end-of-text token.
        context_length: inputs of a window; a window holds one token more, the last target.
        batch_size: windows of a batch.
        seed: of the order.

    Raises:
        UserError: there are no documents, or the tokenizer has no end-of-text token.
    """

    def __init__(
        self, documents: Sequence[str], tokenizer: Tokenizer, context_length: int, batch_size: int, seed: int = 0
    ):
        if not len(documents):
            raise UserError("there are no documents to pack")
        if tokenizer.eot is None:
            raise UserError("packing documents needs a tokenizer with an end-of-text token")
        self.documents, self.tokenizer, self.eot = documents, tokenizer, tokenizer.eot
        self.context_length, self.batch_size, self.seed = context_length, batch_size, seed
        self.load_state_dict({"document": 0, "offset": 0})

    def __iter__(self) -> "PackedBatches":
        return self

    def __next__(self) -> Batch:
        length = self.context_length
        while len(self._pending) < self.batch_size * length + 1:
            document = self.document + len(self._lengths)
            tokens = [*self.tokenizer.encode(self._text(document)), self.eot]
            self._pending.extend(tokens if self._lengths else tokens[self.offset :])
            self._lengths.append(len(tokens))
        flat = np.array(self._pending[: self.batch_size * length + 1], np.int64)
        self._advance(self.batch_size * length)
        windows = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]
        return {"tokens": torch.from_numpy(windows.copy())}

    def _text(self, document: int) -> str:
        """Document number `document` of the endless sequence of epochs."""
        epoch, index = divmod(document, len(self.documents))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            self._epoch = epoch
        return self.documents[int(self._order[index])]

    def _advance(self, count: int) -> None:
        del self._pending[:count]
        self.offset += count
        while self._lengths and self.offset >= self._lengths[0]:
            self.offset -= self._lengths.popleft()
            self.document += 1

    def state_dict(self) -> dict[str, int]:
        """The document of the next window, counted on through the epochs, and the token within it."""
        return {"document": self.document, "offset": self.offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict()` was taken; that one document is tokenised again."""
        self.document, self.offset = state["document"], state["offset"]
        self._pending: list[int] = []  # tokens from the next window on
        self._lengths: deque[int] = deque()  # of the documents that _pending reaches into
        self._epoch, self._order = -1, np.empty(0, np.int64)


def write_tokens(
    path: str | Path, chunks: Iterable[Sequence[int] | np.ndarray], dtype: str = "uint16", tokenizer: str = ""
) -> int:
    """Write a corpus larger than memory: the raw tokens, and beside them `<path>.json` that describes them.

    Args:
        path: the file to write; it appears whole or not at all.
        chunks: tokens in pieces of any size, for instance one document each.
        dtype: "uint16" holds vocabularies of up to 65,536 tokens, "uint32" any.
        tokenizer: the sha256 of the tokenizer (`tokenizers.sha256`), to notice a wrong one when reading.

    Returns:
        the number of tokens.

    Raises:
        UserError: a token does not fit the dtype, or the disk refuses.
    """
    path = Path(path)
    limit, count, temporary = np.iinfo(dtype).max, 0, path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with disk_errors(str(path)):
            with temporary.open("wb") as file:
                for chunk in chunks:
                    tokens = np.asarray(chunk, np.int64)
                    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= limit:
                        raise UserError(f"the tokens of {path} lie outside 0..{limit} of {dtype}: choose uint32")
                    file.write(tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
                    count += tokens.size
                file.flush()
                os.fsync(file.fileno())
            _sidecar(path).unlink(missing_ok=True)  # never an old description beside new tokens
            os.replace(temporary, path)
            description = {"dtype": dtype, "count": count, "tokenizer": tokenizer}
            temporary.write_text(json.dumps(description), encoding="utf-8")
            os.replace(temporary, _sidecar(path))
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read_tokens(path: str | Path, tokenizer: str = "") -> np.ndarray:
    """Map a file of `write_tokens` into memory (read-only), for `TokenBatches`.

    Raises:
        UserError: the file or its description is missing, it is truncated, or it was written with a tokenizer other
            than the one whose sha256 is given.
    """
    path = Path(path)
    try:
        description = json.loads(_sidecar(path).read_text(encoding="utf-8"))
        size = path.stat().st_size
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a finished token file: write it again") from error
    dtype = np.dtype(description["dtype"]).newbyteorder("<")
    if size != description["count"] * dtype.itemsize:
        expected = description["count"] * dtype.itemsize
        raise UserError(f"{path} has {size} bytes instead of {expected}: it is damaged, write it again")
    if tokenizer and description["tokenizer"] != tokenizer:
        raise UserError(f"{path} was written with another tokenizer: write it again with this one")
    # A plain array over the map: np.memmap's own indexing is slower.
    return np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")
