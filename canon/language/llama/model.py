"""The model: configuration, modules, loss, key-value memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from canon.core.data.corpora import CorpusName, TokenizerName
from canon.core.generation.cache import KVCache
from canon.core.training.fit import TrainingConfig


@dataclass(frozen=True)
class Config:
    """Shape and training of a LLaMA."""

    vocab_size: int = 32_000
    """Number of tokens."""
    context_length: int = 2048
    """Longest sequence in tokens."""
    d_model: int = 4096
    """Width of the residual stream."""
    n_layers: int = 32
    """Number of blocks."""
    n_heads: int = 32
    """Query heads a block."""
    n_kv_heads: int = 32
    """Key and value heads a block; fewer than n_heads share them (grouped-query attention, later models)."""
    d_ff: int = 11_008
    """Width of the feed-forward network; the paper's rule is `feed_forward_width`."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    tied: bool = False
    """Whether the head is the embedding (small later models)."""
    corpus: CorpusName = "mixture"
    """What it learns from: shakespeare, standard_library (Python's source) or a mixture of English and Python."""
    tokenizer: TokenizerName = "bpe"
    """characters, a byte-level bpe of vocab_size trained on the corpus, or the published gpt2 vocabulary."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it learns."""

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads


def feed_forward_width(d_model: int) -> int:
    """2/3 of 4 d_model (section 2.2), rounded up to a multiple of 256: SwiGLU has three matrices instead of two."""
    return -(-(2 * 4 * d_model // 3) // 256) * 256


def rotations(d_head: int, length: int, theta: float) -> Float[Tensor, "length pairs 2"]:
    """Cosine and sine of m theta^(-2i / d_head) for each position m and pair i (RoFormer, section 3.2.2)."""
    frequencies = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float64, device="cpu") / d_head)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotate(
    x: Float[Tensor, "batch heads time d_head"], rotation: Float[Tensor, "... time pairs 2"]
) -> Float[Tensor, "batch heads time d_head"]:
    """Rotary position embedding (Su et al., 2021): the pair (x_2i, x_2i+1) is a point, turned by its position's angle.

    The product of a query and a key then depends on their positions through the difference only.
    """
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    # Eq. 34: (x_2i, x_2i+1) -> (x_2i cos - x_2i+1 sin, x_2i sin + x_2i+1 cos)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * g (Zhang and Sennrich, 2019, Eq. 4): LayerNorm without mean and bias."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal attention with rotary positions; groups of query heads may share a key/value head."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.qkv = nn.Linear(config.d_model, (config.n_heads + 2 * config.n_kv_heads) * config.d_head, bias=False)
        self.out = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        rotation: Float[Tensor, "... time pairs 2"],
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "batch time d_model"]:
        heads = rearrange(self.qkv(x), "b t (h d) -> b h t d", d=self.d_head)
        qk, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        q, k = rotate(qk, rotation).split([self.n_heads, self.n_kv_heads], dim=1)
        if cache is not None:
            y = cache.attend(layer, q, k, v)
        else:  # softmax(q k^T / sqrt(d_head)) v, each position seeing itself and the past
            grouped = self.n_kv_heads < self.n_heads
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020, Eq. 6): (silu(x W) * x V) W_2."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)  # W and V
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)  # W_2

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): pre-normalisation, as in GPT-3 (section 2.2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        rotation: Float[Tensor, "... time pairs 2"],
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "batch time d_model"]:
        x = x + self.attention(self.attention_norm(x), rotation, cache, layer)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """The language model: tokens in, next-token logits out."""

    rotation: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.register_buffer("rotation", None, persistent=False)
        self.set_rotations()
        # Decodes single tokens, where from_pretrained left the weights packed.
        self.fused: Callable[[Tensor, KVCache], Tensor] | None = None
        self.apply(self._initialise)

    def set_rotations(self) -> None:
        """Fill the table of rotations, which is not stored with the weights."""
        c = self.config
        self.rotation = rotations(c.d_head, c.context_length, c.rope_theta)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        residual = math.sqrt(2 * self.config.n_layers)
        if isinstance(module, Attention):
            nn.init.normal_(module.out.weight, std=0.02 / residual)
        if isinstance(module, FeedForward):
            nn.init.normal_(module.down.weight, std=0.02 / residual)

    def forward(
        self, tokens: Int[Tensor, "batch time"], cache: KVCache | None = None, last_only: bool = False
    ) -> Float[Tensor, "batch _ vocab"]:
        """Logits of the next token at every position (at the last one only with ``last_only``).

        With a ``cache`` the tokens continue what it holds, and their keys and values are added to it.
        """
        if self.fused is not None and cache is not None and tokens.numel() == 1:
            return self.fused(tokens, cache)
        time = tokens.shape[1]
        # One more dimension, for the heads.
        rotation = self.rotation[:time] if cache is None else self.rotation[cache.positions(time)].unsqueeze(1)
        x = self.token_embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, cache, layer)
        if cache is not None:
            cache.advance(time)
        return self.head(self.final_norm(x[:, -1:] if last_only else x))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Mean cross-entropy in nats a token of ``batch["tokens"]`` (batch, time + 1), each predicting the next."""
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        loss = F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())
        return loss, {"tokens": targets.numel()}

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """Empty key and value memory for ``batch`` sequences of at most ``max_length`` tokens."""
        c, norm = self.config, self.final_norm.weight
        dtype = norm.dtype if self.fused is None else torch.bfloat16
        return KVCache(c.n_layers, batch, c.n_kv_heads, min(max_length, c.context_length), c.d_head, dtype, norm.device)
