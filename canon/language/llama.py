"""LLaMA: Open and Efficient Foundation Language Models (Touvron et al., 2023).

Paper: https://arxiv.org/abs/2302.13971

The idea. A model is trained once and run for ever, so the best size is not the one that reaches a loss with the least
training compute (Chinchilla), but a smaller one trained on far more tokens, from public data alone. The architecture
is GPT's with what had proved itself since: RMSNorm before each sub-layer (GPT-3), SwiGLU (PaLM), rotary positions
(GPT-Neo). Its one equation is attention between rotated queries and keys, in which positions count by distance only:
(R_m q)^T (R_n k) = q^T R_(n-m) k.

Faithful. RMSNorm with eps 1e-6, SwiGLU of width 2/3 4 d_model rounded up to a multiple of 256, rotary embedding of
queries and keys in every layer with base 10,000, no biases, untied head, context 2048; AdamW with betas 0.9 and 0.95,
cosine decay to 10%, weight decay 0.1, clipping at 1, 2,000 steps of warm-up, 4 M tokens a batch; the four published
sizes. Weights in Meta's release, Hugging Face's layout and GGUF load, so SmolLM2-135M (Allal et al., 2025), a later
LLaMA with grouped-query attention and a tied head, speaks here.

Scaled down. `laptop` models the characters of Shakespeare with 3.4 M parameters.

Deviations.
    paper                        ours                                  why
    CommonCrawl 67%, C4 15%,     `mixture`: Shakespeare, Moby-Dick,    no package carries 1.4 T tokens
    GitHub, Wikipedia and        speeches and Python's source, by
    books 4.5% each, arXiv       their sizes
    2.5%, StackExchange 2%
    (Table 1)
    initialisation not stated    N(0, 0.02), residual projections      as GPT-2's
                                 scaled by 1/sqrt(2 n_layers)
    SentencePiece BPE, 32k       characters or byte-level BPE in       no package carries LLaMA's vocabulary
                                 training; the checkpoint's own else
    separate W_q, W_k, W_v       one matrix each for q, k, v and for   4 products a layer instead of 7
    and W, V of SwiGLU           gate and up

Run. `canon run llama`: 5 min 12 s of training on 2 cores, to 1.68 nats a character on the last 10% (256 windows of 128
characters). `canon chat` talks to SmolLM2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from canon.core.data.corpora import Corpus, CorpusName, TokenizerName, load_corpus, validation_loss
from canon.core.data.tokenizers import Tokenizer, load_tokenizer
from canon.core.data.tokens import TokenBatches
from canon.core.errors import UserError
from canon.core.generation.cache import KVCache
from canon.core.generation.decode import Sampling, generate
from canon.core.hub.llama_weights import Kind, Precision, load_llama, published_weights
from canon.core.hub.pretrained import save_description
from canon.core.lab import Run
from canon.core.nn.attention import causal_attention
from canon.core.training.fit import TrainingConfig, fit


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

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.d_model % (2 * self.n_heads):  # each head turns pairs of numbers
            raise UserError(f"d_model {self.d_model} is not an even multiple of n_heads {self.n_heads}: change one")
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}: change one")

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads


def feed_forward_width(d_model: int) -> int:
    """The paper's width of SwiGLU, which has three matrices where GPT-2's network has two of 4 d_model."""
    # 2/3 4 d_model (section 2.2), rounded up to a multiple of 256
    return -(-(2 * 4 * d_model // 3) // 256) * 256


def _published(d_model: int, n_heads: int, n_layers: int, learning_rate: float, tokens: float) -> Config:
    """A size of Table 2; a batch is 2048 sequences of 2048 tokens, the paper's 4 M."""
    steps, width = round(tokens / 2048**2), feed_forward_width(d_model)
    recipe = TrainingConfig(
        steps, batch_size=2048, accumulation=64, learning_rate=learning_rate, warmup_steps=2000, weight_decay=0.1
    )
    return Config(d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_heads, d_ff=width, training=recipe)


PRESETS = {
    "laptop": Config(
        vocab_size=77,
        context_length=128,
        d_model=256,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        d_ff=feed_forward_width(256),
        corpus="shakespeare",
        tokenizer="characters",
        training=TrainingConfig(steps=600, batch_size=32, learning_rate=2e-3, warmup_steps=30, weight_decay=0.1),
    ),
    "smollm2-135m": Config(
        vocab_size=49_152,
        context_length=8192,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        d_ff=1536,
        norm_eps=1e-5,
        rope_theta=100_000.0,
        tied=True,
    ),
    "6.7b": _published(4096, 32, 32, 3e-4, 1.0e12),
    "13b": _published(5120, 40, 40, 3e-4, 1.0e12),
    "32.5b": _published(6656, 52, 60, 1.5e-4, 1.4e12),
    "65.2b": _published(8192, 64, 80, 1.5e-4, 1.4e12),
}


def rotations(d_head: int, length: int, theta: float) -> Float[Tensor, "length pairs 2"]:
    """Cosine and sine of every position's angle for every pair of a head (RoFormer, section 3.2.2)."""
    # theta_i = theta^(-2i / d_head), i = 0 ... d_head / 2 - 1
    frequencies = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float64, device="cpu") / d_head)
    # position m turns pair i by m theta_i
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
    """Root mean square normalisation (Zhang and Sennrich, 2019): LayerNorm without mean and bias."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        # Eq. 4: x_i / RMS(x) g_i, RMS(x) = sqrt(mean(x^2)), with eps under the root
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
        # q_m = R_m W_q x_m, k_n = R_n W_k x_n (RoFormer, Eq. 14); values are not turned
        q, k = rotate(qk, rotation).split([self.n_heads, self.n_kv_heads], dim=1)
        if cache is not None:
            y = cache.attend(layer, q, k, v)
        else:
            # softmax(q k^T / sqrt(d_head)) v, each position seeing itself and the past
            y = causal_attention(q, k, v)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): a network whose hidden units are gated by others."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)  # W and V
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)  # W_2

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        # Eq. 6: FFN_SwiGLU(x, W, V, W_2) = (silu(x W) * x V) W_2
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then the feed-forward network, each added to the residual stream (section 2.2)."""

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
        # pre-normalisation, as in GPT-3: x + attention(norm(x)), then x + feed_forward(norm(x))
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
        # Reads and decodes what it can, where from_pretrained left the weights packed.
        self.fused: Callable[[Tensor, KVCache, bool], Tensor | None] | None = None
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
        if self.fused and cache is not None and (logits := self.fused(tokens, cache, last_only)) is not None:
            return logits
        time = tokens.shape[1]
        # One more dimension, for the heads.
        rotation = self.rotation[:time] if cache is None else self.rotation[cache.positions(time)].unsqueeze(1)
        x = self.token_embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, cache, layer)
        if cache is not None:
            cache.advance(time)
        return self.head(self.final_norm(x[:, -1:] if last_only else x))

    def loss(self, batch: dict[str, Int[Tensor, "batch time_and_next"]]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Mean cross-entropy in nats a token of ``batch["tokens"]``, each predicting the next."""
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        # -1/T sum_t log p(x_t+1 | x_<=t)
        loss = F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())
        return loss, {"tokens": targets.numel()}

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """Empty key and value memory for ``batch`` sequences of at most ``max_length`` tokens."""
        c, norm = self.config, self.final_norm.weight
        dtype = norm.dtype if self.fused is None else torch.bfloat16
        return KVCache(c.n_layers, batch, c.n_kv_heads, min(max_length, c.context_length), c.d_head, dtype, norm.device)


def from_pretrained(source: str | Path, precision: Precision = "exact") -> tuple[Llama, Tokenizer | None]:
    """A trained LLaMA and its tokenizer; the arguments and errors are those of `load_llama`."""
    return load_llama(source, precision, Kind(Config, Llama))


def to_hugging_face(model: Llama) -> dict[str, Float[Tensor, "..."]]:
    """The weights of a model under the names and in the order of Hugging Face's `LlamaForCausalLM`."""
    return published_weights(model, model.config)


def build(config: Config) -> Llama:
    """A LLaMA with fresh weights."""
    torch.manual_seed(config.training.seed)
    return Llama(config)


def batches(config: Config) -> TokenBatches:
    """Training batches of the configured corpus."""
    return _batches(config, _corpus(config))


def train(config: Config, run: Run) -> Llama:
    """Train on the configured corpus; goes on where the run was stopped. The loss is in nats a token."""
    corpus = _corpus(config)
    model = build(config)
    if run.leader:
        save_description(config, run.path / "model", system="llama", tokenizer=corpus.tokenizer)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"validation_loss": validation_loss(model, corpus.validation, config.context_length, windows=256)}

    return fit(model, _batches(config, corpus), run, config.training, evaluate=evaluate)


def sample(
    model: Llama,
    run: Run,
    prompt: str = "\n",
    *,
    max_tokens: int = 400,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Text that continues ``prompt``; kept among the run's samples.

    Args:
        model: a trained model.
        run: the run that trained it, which holds its tokenizer.
        prompt: what to continue; it is part of the result.
        max_tokens: at most so many new tokens, and no more than the context has room for.
        temperature: 0 always takes the likeliest token, 1 samples from the model's distribution.
        top_k: sample from the k likeliest tokens only; 0 from all.
        top_p: sample from the likeliest tokens that hold this much probability.
        seed: another seed, another text.
    """
    tokenizer = load_tokenizer(run.path / "model")
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    text = prompt + generate(model, [tokenizer.encode(prompt)], sampling, tokenizer=tokenizer)[0].text
    run.text(f"sample from {prompt!r}" if prompt.strip() else "sample", text)
    return text


def _corpus(config: Config) -> Corpus:
    return load_corpus(config.corpus, config.tokenizer, config.vocab_size)


def _batches(config: Config, corpus: Corpus) -> TokenBatches:
    return TokenBatches(corpus.train, config.context_length, config.training.batch_size, config.training.seed)
