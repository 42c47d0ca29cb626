"""Choosing the next token from logits: temperature, filters, and a draw that needs one random number a row.

A token is drawn by inverting the cumulative distribution at a uniform number, rather than with Gumbel noise or
`torch.multinomial`, which need a random number per entry of the vocabulary: for 256 rows of 4,096 logits, on one core
and softmax included, 1 ms against 9 and 26 ms. On a processor, and without filters, `sampling.c` does it in one go.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from canon.core import native
from canon.core.errors import UserError

PART = 64
"""Rows handled at a time: their temporaries stay in the processor's cache, and need no fresh pages."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. The filters apply in the order of their fields."""

    max_tokens: int = 128
    """Most new tokens of a row; fewer where the model's context ends."""
    repetition_penalty: float = 1.0
    """Divides the odds of tokens that the prompt or the text already holds, see :func:`repetition_penalty`."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Keep the k likeliest tokens, see :func:`top_k`; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability, see :func:`top_p`."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the likeliest, see :func:`min_p`."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the text, besides the tokenizer's end of text."""
    seed: int = 0
    """Of the random numbers."""

    def __post_init__(self) -> None:
        for name, fine in {
            "max_tokens": self.max_tokens >= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "stop": not isinstance(self.stop, str) and all(self.stop),
            "seed": 0 <= self.seed < 2**64,
        }.items():
            if not fine:
                raise UserError(f"Sampling: {name} cannot be {getattr(self, name)!r}")


def repetition_penalty(
    logits: Float[Tensor, "batch vocab"], seen: Int[Tensor, "batch time"], penalty: float
) -> Float[Tensor, "batch vocab"]:
    """Make the tokens ``seen`` less likely, however often they were: positive logits are divided by the penalty,
    negative ones multiplied.

    Source: CTRL (Keskar et al., 2019), section 4.1, with the rule for negative logits that all implementations add.
    """
    values = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(values > 0, values / penalty, values * penalty))


def top_k(logits: Float[Tensor, "batch vocab"], k: int) -> Float[Tensor, "batch vocab"]:
    """Remove (set to minus infinity) all but the k likeliest tokens; equals of the last one stay.

    Source: Fan et al., 2018, Hierarchical Neural Story Generation, section 5.3.
    """
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def top_p(logits: Float[Tensor, "batch vocab"], p: float) -> Float[Tensor, "batch vocab"]:
    """Remove all but the nucleus: the smallest set of likeliest tokens of total probability at least p; equals stay.

    Source: Holtzman et al., 2020, The Curious Case of Neural Text Degeneration, section 3.1.
    """
    candidates = min(256, logits.shape[-1])
    values = logits.topk(candidates).values
    mass = (values - logits.logsumexp(-1, keepdim=True)).exp()
    if candidates < logits.shape[-1] and bool((mass.sum(-1) < p).any()):  # a nucleus is larger: sort everything
        values = logits.sort(-1, descending=True).values
        mass = values.softmax(-1)
    # A token is in the nucleus if those before it do not reach p.
    size = ((mass.cumsum(-1) - mass) < p).sum(-1, keepdim=True)
    return logits.masked_fill(logits < values.gather(-1, size.clamp(min=1) - 1), -torch.inf)


def min_p(logits: Float[Tensor, "batch vocab"], p: float) -> Float[Tensor, "batch vocab"]:
    """Remove tokens less probable than p times the likeliest.

    Source: Nguyen et al., 2024, Turning Up the Heat: Min-p Sampling, section 3.
    """
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + np.log(p), -torch.inf) if p > 0 else logits


def draw(weights: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Draw index i with probability ``weights[i] / weights.sum()``: the first whose cumulative weight exceeds u times
    the total, found among sums of 64 weights and then within the 64.

    Args:
        weights: at least one of each row is positive.
        uniform: u in [0, 1), float64.
    """
    if weights.shape[-1] % 64:
        weights = F.pad(weights, (0, -weights.shape[-1] % 64))
    blocks = weights.unflatten(-1, (-1, 64))
    sums = blocks.sum(-1).double().cumsum(-1)
    target = uniform.clamp(max=1 - 1e-12)[:, None] * sums[:, -1:]
    block = (sums <= target).sum(-1, keepdim=True)
    before = F.pad(sums, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, 64))[:, 0].double().cumsum(-1)
    # The sums of the two levels differ by rounding, so the target is kept below the block's end.
    target = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-12))
    return (64 * block + (inside <= target).sum(-1, keepdim=True))[:, 0]


def sample(
    logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, "batch 2"], sampling: Sampling
) -> Int[Tensor, " batch"]:
    """Draw a token of each row after temperature and filters.

    Filtering a whole vocabulary costs more than drawing from it, so with a single filter the token is drawn first. If
    the filter keeps it, it stands; if not, the row is filtered and drawn again. That is the filtered distribution:
    with Z the mass kept, a kept token has p + (1 - Z) p / Z = p / Z.

    Args:
        logits: penalised and constrained already; any floating type, computed with in float32.
        uniform: two independent numbers in [0, 1) of each row, float64.
        sampling: temperature, top_k, top_p, min_p.
    """
    parts = zip(logits.split(PART), uniform.split(PART))
    return torch.cat([_sample(part.float(), u, sampling) for part, u in parts])


def sample_with_log_probability(
    logits: Float[Tensor, "batch vocab"],
    scores: Float[Tensor, "batch vocab"],
    uniform: Float[Tensor, "batch 2"],
    sampling: Sampling,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Draw a token of each row, and say how likely it was to the model itself.

    Args:
        logits: of the model, any floating type.
        scores: the logits, penalised and constrained (or the very same tensor).
        uniform: two independent numbers in [0, 1) of each row, float64.
        sampling: temperature, top_k, top_p, min_p.

    Returns:
        Tokens, and their log-probabilities under ``logits`` in nats, float32 (NaN where a logit is NaN).
    """
    filtered = 0 < sampling.top_k < logits.shape[-1] or sampling.top_p < 1 or sampling.min_p > 0
    plain = scores is logits and sampling.temperature > 0 and not filtered
    if plain and native.serves(logits, uniform) and logits.dtype in (torch.float32, torch.bfloat16) and kernel():
        return _draw_compiled(logits, uniform, sampling.temperature)
    tokens = sample(scores, uniform, sampling)
    return tokens, log_probability(logits, tokens)


def log_probability(logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Of one token of each row: nats, float32."""
    parts = zip(logits.split(PART), tokens.split(PART))
    return torch.cat([part.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for part, ids in parts])


class ShapeStruct(ctypes.Structure):
    """`Shape` of sampling.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "stride", "half", "threads")),
        ("inverse_temperature", ctypes.c_float),
    )


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled sampling.c; None where there is no C compiler."""
    return native.load_functions(Path(__file__).with_name("sampling.c"), ShapeStruct, {"draw": 4})


def _draw_compiled(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    uniform = uniform.contiguous()
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.long, device="cpu")
    log_probs = torch.empty(rows, dtype=torch.float32, device="cpu")  # whatever the default is
    inverse = min(1 / temperature, 1e30)  # of the smallest temperatures it would be infinite
    half, threads = logits.dtype == torch.bfloat16, torch.get_num_threads()
    shape = ShapeStruct(rows, vocab, logits.stride(0), half, threads, inverse)
    native.call(kernel(), "draw", shape, logits, uniform, tokens, log_probs)
    return tokens, log_probs


def _sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    filters = (0 < sampling.top_k < logits.shape[-1]) + (sampling.top_p < 1) + (sampling.min_p > 0)
    if filters > 1 and 0 < sampling.top_k < logits.shape[-1]:  # the other filters see only what the first one keeps
        logits, ids = logits.topk(sampling.top_k)
        return ids.gather(-1, draw(_filtered(logits, sampling).softmax(-1), uniform[:, 0])[:, None])[:, 0]
    if filters > 1:
        return draw(_filtered(logits, sampling).softmax(-1), uniform[:, 0])
    p = logits.softmax(-1)
    tokens = draw(p, uniform[:, 0])
    if filters == 0:
        return tokens
    drawn = p.gather(-1, tokens[:, None])
    if sampling.min_p > 0:
        kept = drawn >= sampling.min_p * p.amax(-1, keepdim=True)
    else:
        larger = torch.gt(p, drawn, out=torch.empty_like(p))  # 0 or 1 as floats: sums of booleans are slow
        if sampling.top_p < 1:
            kept = larger.mul_(p).sum(-1, keepdim=True) < sampling.top_p
        else:
            kept = larger.sum(-1, keepdim=True) < sampling.top_k
    again = (~kept[:, 0]).nonzero()[:, 0]
    if len(again):
        tokens[again] = draw(_filtered(logits[again], sampling).softmax(-1), uniform[again, 1])
    return tokens


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = top_p(logits, sampling.top_p)
    return min_p(logits, sampling.min_p)
