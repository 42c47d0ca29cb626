"""Autoregressive decoding: text from a model that predicts the next token, in bulk or streamed.

A decoder is any module with ``forward(tokens, cache, last_only)`` and ``new_cache(batch, max_length)``, see
:class:`Decoder`. The prompts are read into a key-value cache at once (prefill); then every step feeds each row its
last token, and draws the next from the logits.

Each row and step has a random number of its own (see `canon.core.generation.sampling`), which depends on nothing but
(seed, index of the prompt, step). So a row draws the same numbers alone and in a batch, and its tokens are then the
same too, up to rounding in the model's logits (matrix products of other shapes sum in another order). The same call
gives the same result, bit for bit.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from canon.core.data.tokenizers import Tokenizer
from canon.core.errors import UserError
from canon.core.generation.cache import KVCache
from canon.core.generation.constraints import Constraint
from canon.core.generation.sampling import Sampling, repetition_penalty, sample_with_log_probability
from canon.core.generation.text import TextStream, token_bytes

Finish = Literal["eot", "stop", "constraint", "length"]


@runtime_checkable
class Decoder(Protocol):
    """A model that predicts the next token."""

    config: Any
    """Has ``context_length``, the longest sequence in tokens."""
    training: bool

    def __call__(
        self, tokens: Int[Tensor, "batch time"], cache: KVCache | None = None, last_only: bool = False
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits of the next token after each of ``tokens``, which continue what the cache holds."""
        ...

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on or off."""
        ...


@dataclass(frozen=True)
class Timing:
    """What a batch took."""

    prefill_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens a second (those that were in the cache already are not counted)."""
        return self.prefill_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_speed(self) -> float:
        """New tokens a second, over all rows of the batch."""
        return self.new_tokens / max(self.decode_seconds, 1e-9)


@dataclass(frozen=True)
class Generation:
    """What one prompt was continued with."""

    tokens: list[int]
    """All tokens drawn, the end of text and those of a stop string included."""
    text: str
    """Their text without either; empty if no tokenizer was given."""
    log_probs: list[float]
    """Of each token under the model itself: nats, from its logits before penalty, constraint, temperature, filters."""
    finish: Finish
    """Why it ended: a token that ends the text, a stop string, a constraint that allows no more, or the length."""
    timing: Timing
    """Of its whole batch."""


class Memory:
    """The cache of a conversation: a prompt that begins as the last one did is not read again.

    Args:
        model: the decoder it serves.
    """

    def __init__(self, model: Decoder):
        self.cache = model.new_cache(1, model.config.context_length)
        self.tokens: list[int] = []

    def recall(self, prompt: Sequence[int]) -> int:
        """Forget all but what ``prompt`` begins with; returns its length, less than the prompt's."""
        known = 0
        while known < min(len(prompt) - 1, len(self.tokens)) and self.tokens[known] == prompt[known]:
            known += 1
        self.cache.rewind([known])
        self.tokens = list(prompt[:known])
        return known


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    tokenizer: Tokenizer | None = None,
    constraint: Constraint | Sequence[Constraint] | None = None,
    batch_size: int = 256,
) -> list[Generation]:
    """Continue each of many prompts; equal ones are read once. Dropout is off, and no gradients are kept.

    In bulk, weights in bfloat16 (``model.to(torch.bfloat16)``) decode faster where the hardware has it; sampling is
    in float32 always.

    Args:
        model: predicts the next token.
        prompts: token ids, at least one each.
        sampling: how to choose tokens.
        tokenizer: gives the text and the end-of-text token; needed for stop strings and constraints.
        constraint: what the texts must be: one for all, or one for each prompt. A text that ends for its length
            (``finish`` says so) is only the beginning of one.
        batch_size: rows decoded at a time; rows that have ended leave the batch.

    Raises:
        UserError: a prompt is empty or longer than the model's context; the tokenizer is missing; a logit is NaN.
    """
    constraints = [constraint] * len(prompts) if not isinstance(constraint, Sequence) else constraint
    if len(constraints) != len(prompts):
        raise UserError(f"{len(constraints)} constraints for {len(prompts)} prompts: give one for all, or one for each")
    pieces = token_bytes(tokenizer) if tokenizer else None
    results = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        decoding = _Decoding(
            model, [prompts[row] for row in rows], rows, sampling, tokenizer, pieces, [constraints[r] for r in rows]
        )
        while decoding.step():
            pass
        results += decoding.results()
    return results


def stream(
    model: Decoder,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    tokenizer: Tokenizer,
    constraint: Constraint | None = None,
    memory: Memory | None = None,
) -> Iterator[str]:
    """Continue one prompt, piece by piece as the text becomes certain: whole characters, nothing of a stop string.

    The pieces joined are the ``text`` of the Generation, which is the generator's return value
    (``result = yield from stream(...)``).

    Args:
        model: predicts the next token.
        prompt: token ids, at least one.
        sampling: how to choose tokens.
        tokenizer: gives the text and the end-of-text token.
        constraint: what the text must be.
        memory: of the conversation that the prompt continues; holds this turn afterwards.

    Raises:
        UserError: the prompt is empty or longer than the model's context; a logit is NaN.
    """
    pieces = token_bytes(tokenizer)
    decoding = _Decoding(model, [prompt], range(1), sampling, tokenizer, pieces, [constraint], memory)
    text, shown = decoding.text(0), 0
    going = True
    while going:
        going = decoding.step()
        if len(text.text) > shown:
            yield text.text[shown:]
            shown = len(text.text)
    result = decoding.results()[0]
    if len(result.text) > shown:
        yield result.text[shown:]
    return result


class _Decoding:
    """A batch of prompts on the way: the constructor reads them, each :meth:`step` adds a token to each row."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        rows: range,
        sampling: Sampling,
        tokenizer: Tokenizer | None,
        pieces: list[bytes] | None,
        constraints: Sequence[Constraint | None],
        memory: Memory | None = None,
    ):
        self.model, self.sampling, self.pieces, self.memory = model, sampling, pieces, memory
        context = model.config.context_length
        for row, prompt in zip(rows, prompts):
            if not 1 <= len(prompt) <= context:
                what = "is empty" if not prompt else f"has {len(prompt)} tokens, and the model's context is {context}"
                raise UserError(f"prompt {row} {what}: give it between 1 and {context} tokens")
        if pieces is None and (sampling.stop or any(constraints)):
            raise UserError("stop strings and constraints need the tokenizer")
        eot = tokenizer.eot if tokenizer else None
        self.ends = {*sampling.stop_tokens, *([] if eot is None else [eot])}
        count = len(prompts)
        self.limits = [min(sampling.max_tokens, context - len(prompt) + 1) for prompt in prompts]
        known = pieces or []
        self.streams = {row: TextStream(known, sampling.stop) for row in range(count)} if sampling.stop else {}
        self.matchers = {row: c.start(known, eot) for row, c in enumerate(constraints) if c is not None}
        # Philox is counter-based: a (seed, row) key is a stream of its own, ready without a warm-up.
        self.uniform = torch.from_numpy(
            np.stack(
                [
                    np.random.Generator(np.random.Philox(key=[sampling.seed, row])).random((max(self.limits), 2))
                    for row in rows
                ]
            )
        )
        self.tokens = torch.zeros(count, max(self.limits), dtype=torch.long)
        self.log_probs = torch.zeros(count, max(self.limits))
        self.finish: dict[int, tuple[Finish, int]] = {}  # row -> why, number of tokens
        self.rows = list(range(count))  # place in the batch -> row
        self.index = torch.arange(count)  # the same, for indexing
        self.steps = 0
        self.prompts = prompts
        start = time.perf_counter()
        with _evaluating(model):
            self.prefill_tokens = self._prefill()
        self.started = time.perf_counter()
        self.prefill_seconds = self.started - start

    def text(self, row: int) -> TextStream:
        """The text of a row as it grows."""
        assert self.pieces is not None
        return self.streams.setdefault(row, TextStream(self.pieces, self.sampling.stop))

    def _prefill(self) -> int:
        """Read every prompt but its last token, which the first step feeds; returns the number of tokens read."""
        if self.memory is not None:
            self.cache = self.memory.cache
            known = self.memory.recall(self.prompts[0])
            unique = [tuple(self.prompts[0])]
        else:
            known = 0
            unique = list(dict.fromkeys(map(tuple, self.prompts)))
            longest = max(len(prompt) + limit - 1 for prompt, limit in zip(self.prompts, self.limits))
            self.cache = self.model.new_cache(len(unique), longest)
        device = self.cache.lengths.device
        lengths = torch.tensor([len(prompt) - 1 for prompt in unique])
        padded = torch.zeros(len(unique), int(lengths.max()) - known, dtype=torch.long)
        for row, prompt in enumerate(unique):
            padded[row, : len(prompt) - 1 - known] = torch.tensor(prompt[known:-1])
        # In pieces, so that the activations of long prompts stay small.
        for piece in padded.to(device).split(max(1, 32_768 // len(unique)), dim=1):
            if piece.shape[1]:
                self.model(piece, self.cache, last_only=True)
        if self.memory is not None:
            self.memory.tokens += self.prompts[0][known:-1]
        if len(unique) > 1:
            self.cache.lengths = lengths.to(device)
        if len(unique) < len(self.prompts):
            index = {prompt: row for row, prompt in enumerate(unique)}
            self.cache.select([index[tuple(prompt)] for prompt in self.prompts])
        self.next = torch.tensor([prompt[-1] for prompt in self.prompts], device=device)
        longest = max(map(len, self.prompts))  # padded with a token seen anyway
        self.seen = torch.tensor([[*p, *p[:1] * (longest - len(p))] for p in map(list, self.prompts)], device=device)
        return int((lengths - known).sum())

    def step(self) -> bool:
        """Draw a token of each row; returns whether any row goes on."""
        with _evaluating(self.model):
            logits = self.model(self.next[:, None], self.cache, last_only=True)[:, -1]
            if self.memory is not None:
                self.memory.tokens.append(int(self.next))
            scores = self._restrict(logits)
            uniform = self.uniform[self.index, self.steps].to(logits.device)
            self.next, log_probs = sample_with_log_probability(logits, scores, uniform, self.sampling)
            if self.sampling.repetition_penalty != 1:
                self.seen = torch.cat([self.seen, self.next[:, None]], 1)
            self.tokens[self.index, self.steps] = self.next.cpu()
            self.log_probs[self.index, self.steps] = log_probs.cpu()
            self.steps += 1
            self._finish(self.next.tolist())
            going = len(self.finish) < len(self.prompts)
            if going:
                self._compact()
            return going

    def results(self) -> list[Generation]:
        """What became of each prompt."""
        if bool(self.log_probs.isnan().any()):
            raise UserError("the model's logits are not numbers (NaN): its weights or its precision are at fault")
        new_tokens = sum(count for _, count in self.finish.values())
        seconds = time.perf_counter() - self.started
        timing = Timing(self.prefill_tokens, self.prefill_seconds, new_tokens, seconds)
        results = []
        for row in range(len(self.prompts)):
            finish, count = self.finish[row]
            tokens, text = self.tokens[row, :count].tolist(), ""
            if row in self.streams:
                self.streams[row].close()
                text = self.streams[row].text
            elif self.pieces is not None:
                pieces, said = self.pieces, tokens[:-1] if finish == "eot" else tokens
                text = b"".join(pieces[t] for t in said if t < len(pieces)).decode("utf-8", "replace")
            results.append(Generation(tokens, text, self.log_probs[row, :count].tolist(), finish, timing))
        return results

    def _restrict(self, logits: Tensor) -> Tensor:
        """Penalty and constraints."""
        if self.sampling.repetition_penalty != 1:
            logits = repetition_penalty(logits.float(), self.seen, self.sampling.repetition_penalty)
        if self.matchers:
            allowed = np.ones(logits.shape, bool)
            for place, row in enumerate(self.rows):
                if row in self.matchers and row not in self.finish:
                    mask = self.matchers[row].allowed()
                    allowed[place, : len(mask)], allowed[place, len(mask) :] = mask[: logits.shape[1]], False
                    if not allowed[place].any():
                        raise UserError("the constraint asks for a character that this tokenizer has no token for")
            logits = logits.masked_fill(torch.from_numpy(~allowed).to(logits.device), -torch.inf)
        return logits

    def _finish(self, tokens: list[int]) -> None:
        """Note the rows that end with these tokens."""
        if not (self.streams or self.matchers or self.steps >= min(self.limits) or not self.ends.isdisjoint(tokens)):
            return
        for row, token in zip(self.rows, tokens):
            if row in self.finish:
                continue
            reason: Finish | None = "length" if self.steps == self.limits[row] else None
            if token in self.ends:
                reason = "eot"
            else:
                if row in self.matchers:
                    self.matchers[row].advance(token)
                    reason = "constraint" if self.matchers[row].complete else reason
                if row in self.streams:
                    self.streams[row].push(token)
                    reason = "stop" if self.streams[row].stopped else reason
            if reason:
                self.finish[row] = reason, self.steps

    def _compact(self) -> None:
        """Drop rows that have ended: when a quarter has (a copy of the cache costs about a step), or one must go."""
        going = [place for place, row in enumerate(self.rows) if row not in self.finish]
        if len(going) <= 0.75 * len(self.rows) or (
            len(going) < len(self.rows) and self.cache.filled == self.cache.max_length
        ):
            self.cache.select(going)
            self.next = self.next[going]
            self.seen = self.seen[going]
            self.rows = [self.rows[place] for place in going]
            self.index = self.index[going]


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    """No gradients, and dropout off; on again afterwards if it was."""
    training = model.training
    if training:
        model.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train(True)
