"""The smallest decoder and tokenizer that the contracts of `canon.core.generation` allow."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from canon.core.generation.cache import KVCache


class TinyDecoder(nn.Module):
    """Two layers of causal attention with learned positions; random weights with some contrast."""

    def __init__(self, vocab=50, context=48, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(context_length=context)
        self.shape = n_layers, n_heads, n_kv_heads, d_model // n_heads
        self.tokens = nn.Embedding(vocab, d_model)
        self.positions = nn.Embedding(context, d_model)
        kv = n_kv_heads * d_model // n_heads
        self.q = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(n_layers))
        self.k = nn.ModuleList(nn.Linear(d_model, kv) for _ in range(n_layers))
        self.v = nn.ModuleList(nn.Linear(d_model, kv) for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab)
        self.dropout = nn.Dropout(0.5)  # would spoil every test, were it left on
        self.requires_grad_(False)

    def forward(self, tokens, cache=None, last_only=False):
        time = tokens.shape[1]
        positions = torch.arange(time) if cache is None else cache.positions(time)
        x = self.tokens(tokens) + self.positions(positions)
        d_head = self.shape[-1]
        for layer in range(self.shape[0]):
            q, k, v = (m[layer](x).unflatten(-1, (-1, d_head)).transpose(1, 2) for m in (self.q, self.k, self.v))
            if cache is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            else:
                y = cache.attend(layer, q, k, v)
            x = F.layer_norm(x + self.dropout(y.transpose(1, 2).flatten(2)), x.shape[-1:])
        if cache is not None:
            cache.advance(time)
        return 3 * self.head(x[:, -1:] if last_only else x)

    def new_cache(self, batch, max_length):
        n_layers, _, n_kv_heads, d_head = self.shape
        return KVCache(n_layers, batch, n_kv_heads, max_length, d_head, self.tokens.weight.dtype)


class FixedDecoder(nn.Module):
    """Always the same logits, whatever came before."""

    def __init__(self, logits, context=64):
        super().__init__()
        self.config = SimpleNamespace(context_length=context)
        self.logits = torch.as_tensor(logits, dtype=torch.float32)

    def forward(self, tokens, cache=None, last_only=False):
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.logits.expand(len(tokens), 1 if last_only else tokens.shape[1], -1)

    def new_cache(self, batch, max_length):
        return KVCache(0, batch, 1, max_length, 1)


class ScriptedDecoder(FixedDecoder):
    """Says the given tokens, one after the other, with certainty."""

    def __init__(self, script, vocab, context=64):
        super().__init__(torch.zeros(vocab), context)
        self.script = script

    def forward(self, tokens, cache=None, last_only=False):
        place = int(cache.lengths[0]) + tokens.shape[1] - 1
        logits = torch.full((len(tokens), 1, len(self.logits)), -1e9)
        logits[:, :, self.script[place % len(self.script)]] = 0.0
        cache.advance(tokens.shape[1])
        return logits


class ByteTokenizer:
    """Tokens given as bytes; the last is the end of text unless there is none."""

    def __init__(self, tokens, eot=True):
        self.tokens = [*tokens, b""] if eot else list(tokens)
        self.eot = len(tokens) if eot else None

    @property
    def vocab_size(self):
        return len(self.tokens)

    def encode(self, text):
        """Longest match first."""
        data, ids = text.encode(), []
        while data:
            piece = max((t for t in self.tokens if t and data.startswith(t)), key=len)
            ids.append(self.tokens.index(piece))
            data = data[len(piece) :]
        return ids

    def decode(self, ids):
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", "replace")

    def save(self, folder):
        raise AssertionError("no test saves this tokenizer")
