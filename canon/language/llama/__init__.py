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
    initialisation not stated    N(0, 0.02), residual projections      as GPT-2's
                                 scaled by 1/sqrt(2 n_layers)
    SentencePiece BPE, 32k       characters or byte-level BPE in       no package carries LLaMA's vocabulary
                                 training; the checkpoint's own else
    separate W_q, W_k, W_v       one matrix each for q, k, v and for   4 products a layer instead of 7
    and W, V of SwiGLU           gate and up

Run. `canon run llama`; `canon chat` talks to SmolLM2.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from canon.core.data.corpora import Corpus, load_corpus, validation_loss
from canon.core.data.tokenizers import Tokenizer, load_tokenizer
from canon.core.data.tokens import TokenBatches
from canon.core.generation.decode import Sampling, generate
from canon.core.hub.llama_weights import Kind, Precision, load_llama, published_weights
from canon.core.hub.pretrained import save_pretrained
from canon.core.lab import Run
from canon.core.training.fit import TrainingConfig, fit
from canon.language.llama.model import Config, Llama, feed_forward_width

__all__ = [
    "PRESETS",
    "Config",
    "Llama",
    "batches",
    "build",
    "feed_forward_width",
    "from_pretrained",
    "sample",
    "to_hugging_face",
    "train",
]


def _published(d_model: int, n_heads: int, n_layers: int, learning_rate: float, tokens: float) -> Config:
    """A size of Table 2, with 4 M tokens a batch."""
    recipe = TrainingConfig(
        steps=round(tokens / 4e6),
        batch_size=2048,  # of 2048 tokens: 4.2 M
        accumulation=64,
        learning_rate=learning_rate,
        warmup_steps=2000,
        weight_decay=0.1,
    )
    return Config(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_ff=feed_forward_width(d_model),
        training=recipe,
    )


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
    save_pretrained(model, config, run.path / "model", system="llama", tokenizer=corpus.tokenizer)

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


def from_pretrained(source: str | Path, precision: Precision = "exact") -> tuple[Llama, Tokenizer | None]:
    """A trained LLaMA and its tokenizer; the arguments and errors are those of `load_llama`."""
    return load_llama(source, precision, Kind(Config, Llama))


def to_hugging_face(model: Llama) -> dict[str, Tensor]:
    """The weights of a model under the names and in the order of Hugging Face's `LlamaForCausalLM`."""
    return published_weights(model, model.config)


def _corpus(config: Config) -> Corpus:
    return load_corpus(config.corpus, config.tokenizer, config.vocab_size)


def _batches(config: Config, corpus: Corpus) -> TokenBatches:
    return TokenBatches(corpus.train, config.context_length, config.training.batch_size, config.training.seed)
