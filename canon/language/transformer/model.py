"""The model of §3 and its regularised loss (§5.4), bottom-up; parts and symbols carry the paper's names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from canon.core.data.translation import BOS, PAD
from canon.core.errors import UserError
from canon.core.training.fit import TrainingConfig

KeysValues = tuple[Float[Tensor, "batch heads source d_k"], Float[Tensor, "batch heads source d_k"]]


@dataclass(frozen=True)
class Config:
    """Shape, data and training of a Transformer; the defaults are the paper's base model."""

    vocab_size: int = 37_000
    """Tokens of the vocabulary that source and target share, PAD, BOS and EOS included."""
    d_model: int = 512
    """Width of the embeddings and of every sub-layer's output."""
    n_layers: int = 6
    """N: layers of the encoder, and as many of the decoder."""
    n_heads: int = 8
    """h: attention heads, each of d_k = d_v = d_model / h dimensions."""
    d_ff: int = 2048
    """Inner width of the feed-forward network."""
    dropout: float = 0.1
    """P_drop: on sub-layer outputs, and on the sums of embeddings and positional encodings."""
    label_smoothing: float = 0.1
    """eps_ls of the training loss."""
    languages: Literal["en-de", "en-fr", "en-zh"] = "en-de"
    """From English to German, French or Chinese: see canon.core.data.translation."""
    corpus: str = ""
    """A file of tab-separated sentence pairs to learn from instead (WMT 2014 in the paper)."""
    tokens_per_batch: int = 25_000
    """Source tokens of a batch, and as many target tokens. It takes the place of training.batch_size."""
    averaged_checkpoints: int = 5
    """How many of the last evaluated weights are averaged into the final ones."""
    beam: int = 4
    """Hypotheses kept while translating."""
    length_penalty: float = 0.6
    """alpha: 0 compares plain log-probabilities, which favour short translations."""
    extra_length: int = 50
    """A translation has at most this many tokens more than its source."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it learns (§5.3)."""

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise UserError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}: change one of them")
        if self.d_model % 2:  # positions are pairs of a sine and a cosine
            raise UserError(f"d_model {self.d_model} is odd: take {self.d_model + 1}")


# §5.3; the paper does not clip.
ADAM = TrainingConfig(optimizer="adam", beta1=0.9, beta2=0.98, eps=1e-9, clip_norm=0.0, schedule="inverse_sqrt")


def _published(d_model: int, steps: int, evaluate_every: int) -> TrainingConfig:
    # Eq. 3: lrate = d_model^-0.5 min(step_num^-0.5, step_num warmup_steps^-1.5), whose peak is at warmup_steps = 4000
    peak = (d_model * 4000) ** -0.5
    return replace(ADAM, steps=steps, learning_rate=peak, warmup_steps=4000, evaluate_every=evaluate_every)


PRESETS = {
    "laptop": Config(
        vocab_size=2000,
        d_model=256,
        n_layers=2,
        n_heads=4,
        d_ff=512,
        tokens_per_batch=800,
        training=replace(
            ADAM,
            steps=3800,
            learning_rate=1.5e-3,
            warmup_steps=300,
            schedule="cosine",
            final_fraction=0.02,
            evaluate_every=190,
        ),
    ),
    # Checkpoints were 10 minutes apart (§6.1) and a step took 0.4 s and 1.0 s (§5.2).
    "base": Config(training=_published(512, steps=100_000, evaluate_every=1500)),
    "big": Config(
        d_model=1024,
        n_heads=16,
        d_ff=4096,
        dropout=0.3,
        averaged_checkpoints=20,
        training=_published(1024, steps=300_000, evaluate_every=600),
    ),
}


def positional_encoding(positions: Int[Tensor, " time"], d_model: int) -> Float[Tensor, "time d_model"]:
    """Sinusoids with wavelengths from 2 pi to 10000 * 2 pi (§3.5); any position has one, seen in training or not."""
    i = torch.arange(0, d_model, 2, device=positions.device)
    angle = positions[:, None] / 10000 ** (i / d_model)
    # PE(pos, 2i) = sin(pos / 10000^(2i/d_model)),  PE(pos, 2i+1) = cos(pos / 10000^(2i/d_model))
    return rearrange([angle.sin(), angle.cos()], "two time i -> time (i two)")


def attention(
    Q: Float[Tensor, "*batch time d_k"],
    K: Float[Tensor, "*batch source d_k"],
    V: Float[Tensor, "*batch source d_v"],
    mask: Bool[Tensor, "*#batch #time source"],
) -> tuple[Float[Tensor, "*batch time d_v"], Float[Tensor, "*batch time source"]]:
    """Scaled dot-product attention (§3.2.1).

    Written out, and not replaced by torch's fused kernel: at the length of sentences that is no faster on a CPU (in
    bfloat16 several times slower), and here the weights can be looked at.

    Args:
        Q: queries.
        K: keys.
        V: values.
        mask: True where a query may look; every query must have one such place.

    Returns:
        The attended values, and the weights: one distribution over the keys per query.
    """
    # Eq. 1: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V
    scores = Q @ K.mT / math.sqrt(Q.shape[-1])
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return weights @ V, weights


class MultiHeadAttention(nn.Module):
    """`n_heads` attentions in parallel, each in its own projection of d_model / n_heads dimensions (§3.2.2)."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        # The h matrices W_i^Q stand side by side in one, likewise W_i^K and W_i^V; the paper gives them no bias.
        self.W_Q = nn.Linear(d_model, d_model, bias=False)
        self.W_K = nn.Linear(d_model, d_model, bias=False)
        self.W_V = nn.Linear(d_model, d_model, bias=False)
        self.W_O = nn.Linear(d_model, d_model, bias=False)

    def split(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch heads time d_k"]:
        """Deal the projected features out to the heads."""
        return rearrange(x, "batch time (heads d_k) -> batch heads time d_k", heads=self.n_heads)

    def keys_values(self, x: Float[Tensor, "batch source d_model"]) -> KeysValues:
        """Keys and values of every head."""
        return self.split(self.W_K(x)), self.split(self.W_V(x))

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        K: Float[Tensor, "batch heads source d_k"],
        V: Float[Tensor, "batch heads source d_k"],
        mask: Bool[Tensor, "#batch 1 #time source"],
        maps: list[Float[Tensor, "batch heads time source"]] | None = None,
    ) -> Float[Tensor, "batch time d_model"]:
        """Let every position of `x` look at `K` and `V`; `maps` receives the weights."""
        Q = self.split(self.W_Q(x))
        # head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)
        heads, weights = attention(Q, K, V, mask)
        if maps is not None:
            maps.append(weights)
        # MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O
        return self.W_O(rearrange(heads, "batch heads time d_k -> batch time (heads d_k)"))


class FeedForward(nn.Module):
    """The same two-layer network at every position (§3.3)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.W_1 = nn.Linear(d_model, d_ff)
        self.W_2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """Eq. 2."""
        # Eq. 2: FFN(x) = max(0, x W_1 + b_1) W_2 + b_2
        return self.W_2(F.relu(self.W_1(x)))


class Residual(nn.Module):
    """What stands around every sub-layer: dropout (§5.4), the residual sum, layer normalisation *after* it (§3.1)."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch time d_model"], sublayer: Float[Tensor, "batch time d_model"]
    ) -> Float[Tensor, "batch time d_model"]:
        """Join the sub-layer's output to its input."""
        # LayerNorm(x + Dropout(Sublayer(x)))
        return self.norm(x + self.dropout(sublayer))


class EncoderLayer(nn.Module):
    """Self-attention over the whole source, then the feed-forward network (§3.1)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.residuals = nn.ModuleList(Residual(d_model, dropout) for _ in range(2))

    def forward(
        self,
        x: Float[Tensor, "batch source d_model"],
        mask: Bool[Tensor, "batch 1 1 source"],
        maps: list[Float[Tensor, "batch heads source source"]] | None = None,
    ) -> Float[Tensor, "batch source d_model"]:
        """One layer."""
        x = self.residuals[0](x, self.self_attention(x, *self.self_attention.keys_values(x), mask, maps))
        return self.residuals[1](x, self.feed_forward(x))


class DecoderCache:
    """What the decoder looks at: the encoder's output, and keys and values, which are computed once and kept.

    Args:
        memory: the encoder's output.
        source_mask: True on the source's tokens.

    Attributes:
        source: per layer, keys and values of the encoder's output.
        target: per layer, keys and values of the target's tokens so far.
    """

    def __init__(self, memory: Float[Tensor, "batch source d_model"], source_mask: Bool[Tensor, "batch 1 1 source"]):
        self.memory, self.source_mask = memory, source_mask
        self.source: list[KeysValues] = []
        self.target: list[KeysValues] = []

    @property
    def length(self) -> int:
        """Number of target tokens stored."""
        return self.target[-1][0].shape[2] if self.target else 0

    def of_source(self, layer: int, attention: MultiHeadAttention) -> KeysValues:
        """Keys and values of the encoder's output in this layer."""
        if layer == len(self.source):
            self.source.append(attention.keys_values(self.memory))
        return self.source[layer]

    def of_target(
        self, layer: int, K: Float[Tensor, "batch heads time d_k"], V: Float[Tensor, "batch heads time d_k"]
    ) -> KeysValues:
        """Append the keys and values of new tokens; returns those of all tokens so far."""
        if layer == len(self.target):
            self.target.append((K, V))
        else:
            past_K, past_V = self.target[layer]
            self.target[layer] = torch.cat([past_K, K], dim=2), torch.cat([past_V, V], dim=2)
        return self.target[layer]

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the batch, in this order; a row may be repeated (beam search) or dropped."""
        self.memory, self.source_mask = self.memory[rows], self.source_mask[rows]
        self.source = [(K[rows], V[rows]) for K, V in self.source]
        self.target = [(K[rows], V[rows]) for K, V in self.target]


class DecoderLayer(nn.Module):
    """Masked self-attention, attention over the encoder's output, then the feed-forward network (§3.1)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_heads)
        self.cross_attention = MultiHeadAttention(d_model, n_heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.residuals = nn.ModuleList(Residual(d_model, dropout) for _ in range(3))

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        mask: Bool[Tensor, "time past_and_time"],
        cache: DecoderCache,
        layer: int,
        maps: list[Float[Tensor, "batch heads time source"]] | None = None,
    ) -> Float[Tensor, "batch time d_model"]:
        """One layer for the positions of `x`, which follow the tokens in `cache`."""
        K, V = cache.of_target(layer, *self.self_attention.keys_values(x))
        x = self.residuals[0](x, self.self_attention(x, K, V, mask[None, None]))
        K, V = cache.of_source(layer, self.cross_attention)
        x = self.residuals[1](x, self.cross_attention(x, K, V, cache.source_mask, maps))
        return self.residuals[2](x, self.feed_forward(x))


class Transformer(nn.Module):
    """Encoder-decoder Transformer (§3)."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        # §3.4: one matrix for the source, the target and the linear map before the softmax
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.dropout = nn.Dropout(c.dropout)
        shape = c.d_model, c.n_heads, c.d_ff, c.dropout
        self.encoder = nn.ModuleList(EncoderLayer(*shape) for _ in range(c.n_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*shape) for _ in range(c.n_layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Times sqrt(d_model), an embedding has unit variance like its positional encoding; as the last matrix, so
        # have the logits of a normalised x.
        nn.init.normal_(self.embedding.weight, std=c.d_model**-0.5)

    def embed(self, tokens: Int[Tensor, "batch time"], start: int = 0) -> Float[Tensor, "batch time d_model"]:
        """Embeddings plus positions, the first token standing at position `start`."""
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        # §3.4: embeddings times sqrt(d_model); §5.4: dropout on the sum
        x = self.embedding(tokens) * math.sqrt(self.config.d_model)
        return self.dropout(x + positional_encoding(positions, self.config.d_model))

    def encode(
        self,
        source: Int[Tensor, "batch source"],
        maps: list[Float[Tensor, "batch heads source source"]] | None = None,
    ) -> DecoderCache:
        """Read the source once; returns what the decoder looks at.

        Args:
            source: token ids, padded with PAD.
            maps: receives each layer's attention weights.
        """
        mask = (source != PAD)[:, None, None, :]
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x, mask, maps)
        return DecoderCache(x, mask)

    def decode(
        self,
        target: Int[Tensor, "batch time"],
        cache: DecoderCache,
        maps: list[Float[Tensor, "batch heads time source"]] | None = None,
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits of the token after each of `target`, which continues what `cache` holds and is added to it.

        Args:
            target: token ids; all of them at once in training, one by one while translating.
            cache: from :meth:`encode`.
            maps: receives each layer's attention over the source.
        """
        time, past = target.shape[1], cache.length
        # §3.2.3: position i may look at positions <= i, never at what follows
        mask = torch.ones(time, past + time, dtype=torch.bool, device=target.device).tril(past)
        x = self.embed(target, start=past)
        for index, layer in enumerate(self.decoder):
            x = layer(x, mask, cache, index, maps)
        return F.linear(x, self.embedding.weight)

    def forward(
        self, source: Int[Tensor, "batch source"], target: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits of the token after each token of `target` (which begins with BOS)."""
        return self.decode(target, self.encode(source))

    def loss(self, batch: dict[str, Int[Tensor, "batch _"]]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Label-smoothed cross-entropy, averaged over the target's tokens.

        Args:
            batch: `source` (batch, S) and `target` (batch, T + 2): BOS, the translation, EOS; both padded with PAD.

        Returns:
            The loss in nats per token, and the metrics `nll` (without smoothing), `accuracy` of the next token, and
            the number of target `tokens`.
        """
        source, target = batch["source"], batch["target"]
        logits = self(source, target[:, :-1])
        return smoothed_cross_entropy(logits, target[:, 1:], self.config.label_smoothing)


def smoothed_cross_entropy(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"], smoothing: float
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Cross-entropy against labels softened towards the uniform distribution (§5.4); PAD labels count for nothing."""
    keep = (labels != PAD).float()
    log_p = logits.float().log_softmax(dim=-1)

    def mean(x: Float[Tensor, "batch time"]) -> Float[Tensor, ""]:
        return (x * keep).sum() / keep.sum()

    nll = mean(-log_p.gather(2, labels[..., None])[..., 0])
    # H(q', p) with q'(k) = (1 - eps) [k = label] + eps / K   (Szegedy et al. 2015, §7, as §5.4 cites)
    loss = (1 - smoothing) * nll - smoothing * mean(log_p.mean(dim=-1))
    accuracy = mean((log_p.argmax(dim=-1) == labels).float())
    return loss, {"nll": nll.detach(), "accuracy": accuracy, "tokens": keep.sum()}


@torch.no_grad()
def attention_maps(
    model: Transformer, source: Sequence[int], target: Sequence[int]
) -> tuple[Float[Tensor, "layers heads source source"], Float[Tensor, "layers heads time source"]]:
    """Weights of one sentence pair, with Eq. 1 written out.

    Args:
        model: in evaluation mode.
        source: its token ids.
        target: ids of the translation without BOS; row t of the second result is what the model looked at
            while it predicted target[t].

    Returns:
        The encoder's self-attention and the decoder's attention over the source.
    """
    device = model.embedding.weight.device
    encoder, decoder = list[Tensor](), list[Tensor]()
    cache = model.encode(torch.tensor([list(source)], device=device), encoder)
    model.decode(torch.tensor([[BOS, *target[:-1]]], device=device), cache, decoder)
    return torch.cat(encoder), torch.cat(decoder)
