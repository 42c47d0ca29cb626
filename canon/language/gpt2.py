"""GPT-2: Language Models are Unsupervised Multitask Learners (Radford et al., 2019).

Paper: https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
Lecture: "Let's build GPT: from scratch, in code, spelled out" (Karpathy, 2023) and its repository nanoGPT.

The idea. A Transformer decoder that only ever learns to predict the next token of text, p(x) = prod_t p(x_t | x_<t),
learns many tasks on the way, because text contains demonstrations of them. Tokens are byte-level BPE, so that any
string can be scored. Blocks normalise their input instead of their output, which keeps the residual path clean and
deep stacks trainable.

Faithful. Pre-LN blocks and a final LayerNorm, GELU (tanh form), learned positions, fused query-key-value projection,
head tied to the token embedding, N(0, 0.02) initialisation with residual projections scaled by 1/sqrt(2 n_layers),
byte-level BPE; AdamW with decay on matrices only, clipping at 1, warm-up and cosine decay; the four published sizes.

Scaled down. `laptop` models the characters of Shakespeare; `tinylm` is a BPE model of a few million parameters that
later systems fine-tune. Both train with Muon on the hidden matrices, which learns faster at this size.

Deviations.
    paper                        ours                                  why
    WebText, 40 GB of linked     `mixture`: Shakespeare, Moby-Dick,    WebText was never released
    web pages                    speeches and Python's source
    optimiser not stated         AdamW as nanoGPT's; Muon in `laptop`  the paper gives no recipe; measured faster

Run. `canon run gpt2`: 96 s of training on 2 cores, to 1.65 nats a character on the last 10% (docs/PERFORMANCE.md).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from canon.core.hub.pretrained import load_pretrained, save_description
from canon.core.lab import Run
from canon.core.nn.attention import causal_attention
from canon.core.training.fit import TrainingConfig, fit


@dataclass(frozen=True)
class Config:
    """Shape and training of a GPT-2."""

    vocab_size: int = 50_257
    """Number of tokens."""
    context_length: int = 1024
    """Longest sequence in tokens."""
    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 12
    """Number of blocks."""
    n_heads: int = 12
    """Attention heads a block."""
    dropout: float = 0.1
    """Dropout on embeddings, attention weights and residual branches."""
    corpus: CorpusName = "mixture"
    """What it learns from: shakespeare, standard_library (Python's source) or a mixture of English and Python."""
    tokenizer: TokenizerName = "gpt2"
    """characters, a byte-level bpe of vocab_size trained on the corpus, or the published gpt2 vocabulary."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it learns."""

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise UserError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}: change one of them")


def _published(n_layers: int, d_model: int, n_heads: int, learning_rate: float) -> Config:
    # nanoGPT's recipe for 124M on OpenWebText; the larger take the learning rate of GPT-3's nearest size (Table 2.1).
    recipe = TrainingConfig(
        steps=600_000,
        batch_size=480,
        accumulation=40,
        learning_rate=learning_rate,
        warmup_steps=2_000,
        weight_decay=0.1,
    )
    return Config(n_layers=n_layers, d_model=d_model, n_heads=n_heads, dropout=0.0, training=recipe)


PRESETS = {
    "laptop": Config(
        vocab_size=77,
        context_length=64,
        d_model=128,
        n_layers=4,
        n_heads=2,
        dropout=0.0,
        corpus="shakespeare",
        tokenizer="characters",
        training=TrainingConfig(
            steps=1_500,
            batch_size=16,
            learning_rate=0.02,
            schedule="linear",
            warmup_steps=60,
            final_fraction=0.0,
            optimizer="muon",
            weight_decay=0.1,
            evaluate_every=300,
        ),
    ),
    "tinylm": Config(
        vocab_size=4096,
        context_length=256,
        d_model=320,
        n_layers=2,
        n_heads=5,
        dropout=0.0,
        corpus="mixture",
        tokenizer="bpe",
        training=TrainingConfig(
            steps=1_500,
            batch_size=8,
            learning_rate=0.005,
            schedule="linear",
            warmup_steps=60,
            final_fraction=0.0,
            optimizer="muon",
            weight_decay=0.1,
            evaluate_every=300,
        ),
    ),
    "gpt2-124m": _published(12, 768, 12, 6e-4),
    "gpt2-355m": _published(24, 1024, 16, 3e-4),
    "gpt2-774m": _published(36, 1280, 20, 2.5e-4),
    "gpt2-1.5b": _published(48, 1600, 25, 2e-4),
}


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused query-key-value projection."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, x: Float[Tensor, "batch time d_model"], cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "batch time d_model"]:
        # q, k, v = x W_qkv + b, dealt out to the heads
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.n_heads).unbind()
        if cache is not None:
            y = cache.attend(layer, q, k, v)
        else:
            # softmax(q k^T / sqrt(d_head)) v, each position seeing itself and the past
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    """The same network of width 4 d_model at every position."""

    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.d_model, 4 * config.d_model)
        self.out = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        # GELU(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))  (Hendrycks and Gimpel, 2016, section 2)
        return self.out(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "batch time d_model"], cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "batch time d_model"]:
        # "layer normalization was moved to the input of each sub-block" (section 2.3): x + sublayer(norm(x))
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, layer))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class GPT2(nn.Module):
    """The language model: tokens in, next-token logits out."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Attention | FeedForward):
            # "scale the weights of residual layers at initialization by 1/sqrt(N)", N = 2 n_layers (section 2.3)
            nn.init.normal_(module.out.weight, std=0.02 / math.sqrt(2 * self.config.n_layers))

    def forward(
        self, tokens: Int[Tensor, "batch time"], cache: KVCache | None = None, last_only: bool = False
    ) -> Float[Tensor, "batch predicted vocab"]:
        """Logits of the next token at every position (at the last one only with ``last_only``).

        With a ``cache`` the tokens continue what it holds, and their keys and values are added to it.
        """
        time = tokens.shape[1]
        positions = torch.arange(time, device=tokens.device) if cache is None else cache.positions(time)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        if cache is not None:
            cache.advance(time)
        # "an additional layer normalization was added after the final self-attention block" (section 2.3)
        x = self.final_norm(x[:, -1:] if last_only else x)
        # the head is the embedding, transposed
        return F.linear(x, self.token_embedding.weight)

    def loss(self, batch: dict[str, Int[Tensor, "batch time_and_next"]]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Mean cross-entropy in nats a token of ``batch["tokens"]``, each predicting the next."""
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        # p(x) = prod_t p(x_t | x_<t), hence -1/T sum_t log p(x_t | x_<t)
        loss = F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())
        return loss, {"tokens": targets.numel()}

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """Empty key and value memory for ``batch`` sequences of at most ``max_length`` tokens."""
        c, weight = self.config, self.token_embedding.weight
        max_length = min(max_length, c.context_length)
        return KVCache(c.n_layers, batch, c.n_heads, max_length, c.d_model // c.n_heads, weight.dtype, weight.device)


# Published name -> ours. The published projections are stored transposed ("Conv1D"), hence the T.
NAMES = {
    "wte.weight": "token_embedding.weight",
    "wpe.weight": "position_embedding.weight",
    "h.{i}.ln_1.weight": "blocks.{i}.attention_norm.weight",
    "h.{i}.ln_1.bias": "blocks.{i}.attention_norm.bias",
    "h.{i}.attn.c_attn.weight": ("blocks.{i}.attention.qkv.weight", "T"),
    "h.{i}.attn.c_attn.bias": "blocks.{i}.attention.qkv.bias",
    "h.{i}.attn.c_proj.weight": ("blocks.{i}.attention.out.weight", "T"),
    "h.{i}.attn.c_proj.bias": "blocks.{i}.attention.out.bias",
    "h.{i}.ln_2.weight": "blocks.{i}.feed_forward_norm.weight",
    "h.{i}.ln_2.bias": "blocks.{i}.feed_forward_norm.bias",
    "h.{i}.mlp.c_fc.weight": ("blocks.{i}.feed_forward.up.weight", "T"),
    "h.{i}.mlp.c_fc.bias": "blocks.{i}.feed_forward.up.bias",
    "h.{i}.mlp.c_proj.weight": ("blocks.{i}.feed_forward.out.weight", "T"),
    "h.{i}.mlp.c_proj.bias": "blocks.{i}.feed_forward.out.bias",
    "ln_f.weight": "final_norm.weight",
    "ln_f.bias": "final_norm.bias",
    "h.{i}.attn.bias": None,  # stored causal masks
    "h.{i}.attn.masked_bias": None,
}


def from_pretrained(source: str | Path) -> tuple[GPT2, Tokenizer | None]:
    """A trained GPT-2 and its tokenizer, from a folder of ours, or in the published layout (``openai-community/gpt2``).

    Raises:
        UserError: there is nothing there, it is damaged, or it is not a GPT-2 but one of the models that share its
            layout and compute something else.
    """
    tied = {"lm_head.weight": "wte.weight"}
    return load_pretrained(source, "gpt2", Config, GPT2, NAMES, _from_published, tied=tied)


# What a published GPT-2 states, or leaves out; others with its layout (Cerebras-GPT, Mistral of Stanford) differ here.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}


def _from_published(settings: dict[str, Any]) -> Config:
    for name, values in FIXED.items():
        if (value := settings.get(name, values[0])) not in values:
            raise UserError(f"the checkpoint has {name} {value!r}, and GPT-2 has {values[0]!r}: it is another model")
    return Config(
        vocab_size=settings["vocab_size"],
        context_length=settings["n_positions"],
        d_model=settings["n_embd"],
        n_layers=settings["n_layer"],
        n_heads=settings["n_head"],
        dropout=settings.get("resid_pdrop", 0.1),
    )


def build(config: Config) -> GPT2:
    """A GPT-2 with fresh weights."""
    torch.manual_seed(config.training.seed)
    return GPT2(config)


def batches(config: Config) -> TokenBatches:
    """Training batches of the configured corpus."""
    return _batches(config, _corpus(config))


def train(config: Config, run: Run) -> GPT2:
    """Train on the configured corpus; goes on where the run was stopped. The loss is in nats a token."""
    corpus = _corpus(config)
    model = build(config)
    if run.leader:
        save_description(config, run.path / "model", system="gpt2", tokenizer=corpus.tokenizer)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"validation_loss": validation_loss(model, corpus.validation, config.context_length, windows=256)}

    return fit(model, _batches(config, corpus), run, config.training, evaluate=evaluate)


def sample(
    model: GPT2,
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

    Where the text outgrows the context, its last half context is read again and the text goes on from there.

    Args:
        model: a trained model.
        run: the run that trained it, which holds its tokenizer.
        prompt: what to continue; it is part of the result.
        max_tokens: at most so many new tokens.
        temperature: 0 always takes the likeliest token, 1 samples from the model's distribution.
        top_k: sample from the k likeliest tokens only; 0 from all.
        top_p: sample from the likeliest tokens that hold this much probability.
        seed: another seed, another text.
    """
    tokenizer = load_tokenizer(run.path / "model")
    tokens, context = tokenizer.encode(prompt), model.config.context_length
    left = max_tokens
    while left > 0:
        window = tokens if len(tokens) < context else tokens[-max(1, context // 2) :]
        sampling = Sampling(
            max_tokens=min(left, context - len(window)), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        piece = generate(model, [window], sampling, tokenizer=tokenizer)[0]
        tokens, left, seed = tokens + piece.tokens, left - len(piece.tokens), seed + 1
        if piece.finish != "length":
            tokens = tokens[: -len(piece.tokens)] + tokenizer.encode(piece.text)  # without the end of text
            break
    text = tokenizer.decode(tokens)
    run.text(f"sample from {prompt!r}" if prompt.strip() else "sample", text)
    return text


def _corpus(config: Config) -> Corpus:
    return load_corpus(config.corpus, config.tokenizer, config.vocab_size)


def _batches(config: Config, corpus: Corpus) -> TokenBatches:
    return TokenBatches(corpus.train, config.context_length, config.training.batch_size, config.training.seed)
