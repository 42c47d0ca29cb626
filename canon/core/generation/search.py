"""From a source to the best sequence an encoder-decoder can write: greedy search and beam search, cached."""

import math
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from canon.core.data.translation import BOS, EOS, PAD


@runtime_checkable
class Memory(Protocol):
    """What an encoder-decoder keeps between two steps."""

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order; a row may be repeated or dropped."""
        ...


M = TypeVar("M", bound=Memory)


@runtime_checkable
class EncoderDecoder(Protocol[M]):
    """A model that reads a source once and then writes token by token."""

    def encode(self, source: Int[Tensor, "rows source"]) -> M:
        """Read the sources."""
        ...

    def decode(self, target: Int[Tensor, "rows time"], cache: M) -> Float[Tensor, "rows time vocab"]:
        """Logits of the token after each of `target`, which continues what `cache` holds and is added to it."""
        ...


class Hypothesis(NamedTuple):
    """A finished translation."""

    tokens: list[int]
    """Its ids, without BOS and EOS."""
    log_prob: float
    """Natural logarithm of its probability under the model, EOS included."""
    score: float
    """What the search maximised: the log-probability divided by the length penalty."""


def length_penalty(length: int | Tensor, alpha: float) -> float | Tensor:
    """What the log-probability of a translation of `length` tokens (EOS included) is divided by."""
    # lp(Y) = ((5 + |Y|) / (5 + 1))^alpha   (Wu et al. 2016, Eq. 14)
    return ((5 + length) / 6) ** alpha


def _next_log_probs(logits: Float[Tensor, "rows 1 vocab"], must_end: Tensor) -> Float[Tensor, "rows vocab"]:
    """Log-probabilities of the next token; PAD and BOS never follow, and EOS must where the length limit is reached."""
    log_p = logits[:, -1].float().log_softmax(dim=-1)
    log_p[:, [PAD, BOS]] = -math.inf
    ending = torch.full_like(log_p, -math.inf)
    ending[:, EOS] = log_p[:, EOS]
    return torch.where(must_end[:, None], ending, log_p)


@torch.no_grad()
def greedy_search(
    model: EncoderDecoder[M], source: Int[Tensor, "rows source"], extra_length: int = 50, alpha: float = 0.6
) -> list[Hypothesis]:
    """Take the most probable token at every step.

    Args:
        model: in evaluation mode.
        source: ids of the sentences with EOS, padded.
        extra_length: a translation has at most the source's tokens and this many more, EOS included in both.
        alpha: of the length penalty, for the score alone.
    """
    rows, device = len(source), source.device
    limit = (source != PAD).sum(dim=1) + extra_length
    cache = model.encode(source)
    tokens = torch.full((rows, 1), BOS, device=device)
    log_prob = torch.zeros(rows, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for length in range(1, int(limit.max()) + 1):
        step = _next_log_probs(model.decode(tokens[:, -1:], cache), limit <= length)
        best, token = step.max(dim=1)
        log_prob += best.masked_fill(done, 0)
        tokens = torch.cat([tokens, token.masked_fill(done, PAD)[:, None]], dim=1)
        done |= token == EOS
        if done.all():
            break
    found = []
    for row, total in zip(tokens.tolist(), log_prob.tolist()):
        ids = row[1 : row.index(EOS)]
        found.append(Hypothesis(ids, total, total / length_penalty(len(ids) + 1, alpha)))
    return found


@torch.no_grad()
def beam_search(
    model: EncoderDecoder[M],
    source: Int[Tensor, "rows source"],
    beam: int = 4,
    alpha: float = 0.6,
    extra_length: int = 50,
) -> list[Hypothesis]:
    """The best-scored translation of each sentence among those that a beam search finishes.

    At every step each sentence keeps its `beam` most probable unfinished hypotheses. The search of a sentence ends
    when none of them can overtake the best finished one any more, or at the length limit, where EOS must follow.

    Args:
        model: in evaluation mode.
        source: ids of the sentences with EOS, padded. What a sentence gets does not depend on the others.
        beam: hypotheses kept.
        alpha: of the length penalty.
        extra_length: a translation has at most the source's tokens and this many more, EOS included in both.
    """
    device = source.device
    open_rows = torch.arange(len(source), device=device)  # sentences still searched, by their place in `source`
    found: dict[int, Hypothesis] = {}
    best = torch.full((len(source),), -math.inf, device=device)  # score of the best finished hypothesis
    limit = (source != PAD).sum(dim=1) + extra_length
    cache = model.encode(source)
    cache.select(open_rows.repeat_interleave(beam))
    tokens = torch.full((len(source), beam, 1), BOS, device=device)
    # All hypotheses of a sentence begin alike, so only the first may be continued at the first step.
    log_prob = torch.full((len(source), beam), -math.inf, device=device)
    log_prob[:, 0] = 0

    while len(open_rows):
        length = tokens.shape[2]  # |Y| of what this step finishes
        logits = model.decode(tokens[:, :, -1:].flatten(0, 1), cache)
        step = _next_log_probs(logits, (limit <= length).repeat_interleave(beam)).unflatten(0, (-1, beam))
        # At most `beam` of the 2 beam best continuations end here, so at least `beam` of them go on.
        top, index = (log_prob[..., None] + step).flatten(1).topk(2 * beam)
        parent, token = index // step.shape[2], index % step.shape[2]

        ends = token == EOS
        score, place = (top.masked_fill(~ends, -math.inf) / length_penalty(length, alpha)).max(dim=1)
        for row in (score > best).nonzero()[:, 0].tolist():
            ids = tokens[row, parent[row, place[row]], 1:].tolist()
            found[int(open_rows[row])] = Hypothesis(ids, float(top[row, place[row]]), float(score[row]))
        best = torch.maximum(best, score)

        log_prob, chosen = top.masked_fill(ends, -math.inf).topk(beam)
        parent, token = parent.gather(1, chosen), token.gather(1, chosen)
        tokens = tokens.gather(1, parent[..., None].expand(-1, -1, length))
        tokens = torch.cat([tokens, token[..., None]], dim=2)
        # A hypothesis only loses log-probability, and its penalty is at most that of the limit.
        alive = (log_prob[:, 0] / length_penalty(limit, alpha) > best).nonzero()[:, 0]
        cache.select((parent + beam * torch.arange(len(parent), device=device)[:, None])[alive].flatten())
        tokens, log_prob, best, limit, open_rows = (x[alive] for x in (tokens, log_prob, best, limit, open_rows))
    return [found[row] for row in range(len(source))]
