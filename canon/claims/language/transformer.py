"""Claims of "Attention Is All You Need": parity, reordering, the scale of the scores, decoding, and warm-up."""

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from canon.claims.language.synthetic_translation import GRUTranslator, Languages, count_parameters
from canon.core.data.translation import BOS, EOS, PAD, TranslationBatches, padded
from canon.core.generation.search import beam_search, greedy_search
from canon.core.lab import Lab, Measurement, claim
from canon.core.training.fit import Diverged, TrainingConfig, fit
from canon.language.transformer import PRESETS
from canon.language.transformer.model import Config, DecoderCache, Transformer, attention, positional_encoding

Pairs = list[tuple[list[int], list[int]]]

STEPS = 1500  # of `reordering`: about five epochs
WARM_UP_PEAK = 2e-3  # learning rate of `warm_up`


# ---------------------------------------------------------------------------------------------------- (3) the scale


@claim(
    "Dividing scores by sqrt(d_k) keeps the softmax soft where plain dot products saturate it",
    source="§3.2.1",
    passes="scaled >= 0.85 and unscaled <= 0.10",
    seeds=3,
    minutes=0.1,
)
def scaled_scores(lab: Lab, sabotage: bool = False) -> Measurement:
    """Mean entropy of attention over log n, for unit-variance queries and keys, n = 64, d_k = 512.

    Sabotage: the division is undone.
    """
    n, d_k = 64, 512
    Q, K, V = torch.randn(3, 200, n, d_k)
    everywhere = torch.ones(n, n, dtype=torch.bool)

    def entropy(scale: float) -> float:
        _, weights = attention(Q * scale, K, V, everywhere)
        return float(torch.special.entr(weights).sum(dim=-1).mean() / math.log(n))

    return Measurement(scaled=entropy(math.sqrt(d_k) if sabotage else 1.0), unscaled=entropy(math.sqrt(d_k)))


# ---------------------------------------------------------------------------------------------------- (1) parity


@claim(
    "The model is the post-LN encoder-decoder that torch.nn.Transformer implements independently",
    source="§3, Figure 1",
    passes="output_error < 1e-5 and gradient_error < 1e-5",
    seeds=3,
    minutes=0.1,
)
def parity(lab: Lab, sabotage: bool = False) -> Measurement:
    """Largest differences after copying the weights, on padded sources with causal targets.

    Gradients are those of the embedding, which every path of the model reaches, relative to their largest entry.
    Sabotage: the reference normalises before each sub-layer (pre-LN), a change often passed off as the original.
    """
    config = Config(vocab_size=50, d_model=64, n_layers=3, n_heads=4, d_ff=128, dropout=0.0)
    model = Transformer(config)
    reference = _as_torch(model, pre_norm=sabotage)
    source = torch.randint(3, 50, (4, 12))
    source[1, 9:] = source[2, 4:] = PAD
    target = torch.randint(3, 50, (4, 10))
    embedding = model.embedding.weight.detach().clone().requires_grad_()

    def embed(tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time d_model"]:
        positions = positional_encoding(torch.arange(tokens.shape[1]), config.d_model)
        return embedding[tokens] * math.sqrt(config.d_model) + positions

    expected = embedding @ reference(
        embed(source),
        embed(target),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(10),
        src_key_padding_mask=source == PAD,
        memory_key_padding_mask=source == PAD,
    ).transpose(1, 2)
    logits = model(source, target).transpose(1, 2)
    direction = torch.randn_like(logits)
    (logits * direction).mean().backward()
    (expected * direction).mean().backward()
    assert model.embedding.weight.grad is not None
    assert embedding.grad is not None
    difference = (model.embedding.weight.grad - embedding.grad).abs().max()
    return Measurement(
        output_error=(logits - expected).detach().abs().max(), gradient_error=difference / embedding.grad.abs().max()
    )


def _as_torch(model: Transformer, pre_norm: bool) -> nn.Transformer:
    """torch's own with our weights: no attention biases, no final norms, which the paper does not have."""
    c = model.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces that norm_first rules out an optimisation not wanted here
        theirs = nn.Transformer(
            c.d_model, c.n_heads, c.n_layers, c.n_layers, c.d_ff, dropout=0.0, batch_first=True, norm_first=pre_norm
        )
    weights = {}
    for side, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        for i, layer in enumerate(layers):
            ours, name = layer.state_dict(), f"{side}.layers.{i}."
            for here, there in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn")):
                if f"{here}.W_Q.weight" in ours:
                    stacked = torch.cat([ours[f"{here}.W_{letter}.weight"] for letter in "QKV"])
                    weights[f"{name}{there}.in_proj_weight"] = stacked
                    weights[f"{name}{there}.in_proj_bias"] = torch.zeros(3 * c.d_model)
                    weights[f"{name}{there}.out_proj.weight"] = ours[f"{here}.W_O.weight"]
                    weights[f"{name}{there}.out_proj.bias"] = torch.zeros(c.d_model)
            for key, value in ours.items():
                if "attention" not in key:
                    for here, there in (("feed_forward.W_", "linear"), *_NORMS):
                        key = key.replace(here, there)
                    weights[name + key] = value
    theirs.load_state_dict(weights, strict=False)
    theirs.encoder.norm = theirs.decoder.norm = None
    return theirs


_NORMS = tuple((f"residuals.{i}.norm", f"norm{i + 1}") for i in range(3))


# ---------------------------------------------------------------------------------------------------- (4) decoding


@claim(
    "Beam search never does worse than greedy search, from a cache that changes nothing, over positions that are "
    "linear functions of one another",
    source="§6.1 and §3.5",
    passes="no_worse >= 1 and cache_error < 1e-5 and position_error < 1e-5",
    partly="no_worse >= 0.98 and cache_error < 1e-5 and position_error < 1e-5",
    seeds=3,
    minutes=1.5,
)
def decoding(lab: Lab, sabotage: bool = False) -> Measurement:
    """A half-trained model translates 200 new sentences of the synthetic languages.

    `no_worse` is the share of sentences to which beam search (beam 4, log-probability as the score) gives at least
    greedy search's log-probability, both measured afresh without a cache. Nothing forces that: a beam may drop the
    greedy path. After 60 steps instead of 300, when the model still babbles, it was 0.965, 0.98 and 0.99 (and as much
    with the sabotage, for such a model hardly looks at what it wrote). With the paper's schedule, tried first, it was
    0.985 for all three seeds after 300 steps; the model now learns by the cosine of `_small`. Sabotage: hypotheses
    change places in the beam and their keys and values do not.
    """
    languages = Languages(lab.seed)
    pairs = languages.pairs(10_200)
    model = Transformer(_small(languages.vocab_size, n_layers=2))
    _fit(lab, "model", model, pairs[:10_000], model.config.training, steps=300)
    source = padded([[*ids, EOS] for ids, _ in pairs[10_000:]])

    select = DecoderCache.select

    def stay(cache: DecoderCache, rows: Int[Tensor, " rows"]) -> None:
        """Drop the sentences that are finished, and leave the hypotheses of the others where they are."""
        select(cache, 4 * (rows // 4) + torch.arange(len(rows)) % 4 if cache.length else rows)

    with patch.object(DecoderCache, "select", stay if sabotage else select):
        beam = beam_search(model, source, beam=4, alpha=0.0)
    greedy = greedy_search(model, source)
    gains = [
        _log_prob(model, row, b.tokens) - _log_prob(model, row, g.tokens)
        for row, b, g in zip(source.tolist(), beam, greedy)
    ]
    target = padded([[BOS, *g.tokens] for g in greedy[:50]])
    model.double()  # so that rounding does not hide a mistake, nor look like one
    with torch.no_grad():
        cache = model.encode(source[:50])
        steps = torch.cat([model.decode(token, cache) for token in target.split(1, dim=1)], dim=1)
        cache_error = (steps - model(source[:50], target)).abs().max()
    table, k = positional_encoding(torch.arange(101), 64), 7
    angle = k / 10000 ** (torch.arange(0, 64, 2) / 64)
    M_k = torch.block_diag(*(torch.tensor([[c, s], [-s, c]]) for c, s in zip(angle.cos(), angle.sin())))
    return Measurement(
        no_worse=statistics.fmean(gain > -1e-4 for gain in gains),
        mean_gain=statistics.fmean(gains),
        cache_error=cache_error,
        position_error=(table[:-k] @ M_k.T - table[k:]).abs().max(),
    )


def _log_prob(model: Transformer, source: list[int], tokens: Sequence[int]) -> float:
    """Log-probability of one translation with its EOS, in one pass without a search."""
    with torch.no_grad():
        log_p = model(torch.tensor([source]), torch.tensor([[BOS, *tokens]])).log_softmax(dim=-1)[0]
    return float(log_p[range(len(tokens) + 1), [*tokens, EOS]].sum())


# ---------------------------------------------------------------------------------------------------- (2) reordering


class WithoutPositions(Transformer):
    """The Transformer, whose encoder then sees a bag of words."""

    def embed(self, tokens: Int[Tensor, "batch time"], start: int = 0) -> Float[Tensor, "batch time d_model"]:
        """Embeddings alone."""
        return self.dropout(self.embedding(tokens) * math.sqrt(self.config.d_model))


@claim(
    "Attention translates sentences it never saw between languages of different word order and agreement, and long "
    "ones better than a recurrent network that passes the source through one state",
    source="§1, §4 and §6.1",
    passes="exact_match >= 0.90 and long_gap >= 0.15 and without_positions <= 0.30",
    partly="exact_match >= 0.75 and long_gap >= 0.15 and without_positions <= 0.30",
    seeds=3,
    minutes=14,
)
def reordering(lab: Lab, sabotage: bool = False) -> Measurement:
    """30,000 sentence pairs of a synthetic subject-verb-object and a subject-object-verb language (see
    `synthetic_translation`), d_model = 128, N = 2; greedy translations of 500 new sentences must be exactly right.

    Controls, on the same batches for as many steps with the same recipe: a GRU encoder-decoder without attention of at
    least as many parameters (`long_gap` is the difference in exact matches among sentences longer than the median of
    training), and the Transformer without positional encodings, of which at most 0.30 may come out right. The learning
    rate falls by a cosine: with the paper's schedule, made for 100,000 steps, the Transformer got 0.71 right after as
    many (seed 0). Sabotage: the claim is made of the Transformer without positions; the GRU is not trained again and
    counts as 0.
    """
    languages = Languages(lab.seed)
    pairs = languages.pairs(30_500)
    training, test = pairs[:30_000], pairs[30_000:]
    median = statistics.median(len(source) for source, _ in training)
    long = [len(source) > median for source, _ in test]
    config = _small(languages.vocab_size, n_layers=2)
    source = padded([[*ids, EOS] for ids, _ in test])

    def hits(name: str, model: Transformer) -> list[bool]:
        _fit(lab, name, model, training, config.training, STEPS)
        return [found.tokens == target for found, (_, target) in zip(greedy_search(model, source), test)]

    model, blind = Transformer(config), WithoutPositions(config)
    blind.load_state_dict(model.state_dict())  # both start from the same weights
    right_blind = hits("without-positions", blind)
    right, right_gru = right_blind, [False] * len(test)
    if not sabotage:
        right = hits("transformer", model)
        gru = GRUTranslator(languages.vocab_size, config.d_model, 296, config.label_smoothing)
        assert count_parameters(gru) >= count_parameters(model)
        _fit(lab, "gru", gru, training, config.training, STEPS)
        right_gru = [found == target for found, (_, target) in zip(gru.greedy(source), test)]

    def share(found: list[bool], among: list[bool]) -> float:
        return sum(f for f, a in zip(found, among) if a) / sum(among)

    return Measurement(
        exact_match=share(right, [True] * len(test)),
        without_positions=share(right_blind, [True] * len(test)),
        long_match=share(right, long),
        gru_exact_match=share(right_gru, [True] * len(test)),
        gru_long_match=share(right_gru, long),
        long_gap=share(right, long) - share(right_gru, long),
    )


# ---------------------------------------------------------------------------------------------------- (5) warm-up


@claim(
    "A post-LN Transformer of six layers needs its warm-up: without it the same peak learning rate learns less",
    source="§5.3",
    passes="nats_lost >= 0.3",
    seeds=3,
    minutes=4,
)
def warm_up(lab: Lab, sabotage: bool = False) -> Measurement:
    """Validation loss on the synthetic languages after 200 steps, N = 6: 0 against 100 warm-up steps to one peak.

    The peak is the same and is kept afterwards; a run that diverges counts as untrained. Published whatever it is:
    it is a risky claim at this scale. Sabotage: one layer, where post-LN needs no warm-up.
    """
    languages = Languages(lab.seed)
    pairs = languages.pairs(10_200)
    nll = {}
    for steps in (0, 100):
        torch.manual_seed(lab.seed)
        model = Transformer(_small(languages.vocab_size, n_layers=1 if sabotage else 6))
        recipe = replace(model.config.training, schedule="constant", learning_rate=WARM_UP_PEAK, warmup_steps=steps)
        try:
            _fit(lab, f"warm-up-{steps}", model, pairs[:10_000], recipe, steps=200)
            nll[steps] = _nll(model, pairs[10_000:])
        except Diverged:
            nll[steps] = math.log(languages.vocab_size)
    return Measurement(nats_lost=nll[0] - nll[100], with_warm_up=nll[100], without=nll[0])


# ---------------------------------------------------------------------------------------------------- shared


def _small(vocab_size: int, n_layers: int) -> Config:
    """d_model = 128, and the recipe of the laptop preset."""
    laptop = PRESETS["laptop"]
    recipe = replace(laptop.training, learning_rate=2e-3, warmup_steps=150, evaluate_every=0)
    shape = {"vocab_size": vocab_size, "n_layers": n_layers, "d_model": 128, "n_heads": 4, "d_ff": 512}
    return replace(laptop, **shape, dropout=0.0, training=recipe)


def _fit(lab: Lab, name: str, model: nn.Module, pairs: Pairs, recipe: TrainingConfig, steps: int) -> None:
    """Train on batches of about 1000 tokens a side; what follows is measured on the CPU."""
    recipe = replace(recipe, steps=steps, seed=lab.seed, log_every=50)
    fit(model, TranslationBatches(pairs, 1000, lab.seed), lab.stage(name), recipe).to("cpu")


def _nll(model: Transformer, pairs: Pairs) -> float:
    """Nats a token on sentences that were not trained on."""
    source = padded([[*ids, EOS] for ids, _ in pairs])
    target = padded([[BOS, *ids, EOS] for _, ids in pairs])
    with torch.no_grad():
        return float(model.loss({"source": source, "target": target})[1]["nll"])
