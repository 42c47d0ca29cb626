"""A small language model and a data stream for the tests of the training loop."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stream:
    """Batches of a language where every second token repeats the first half; position = number of batches drawn."""

    def __init__(self, rows: int = 12) -> None:
        self.rows, self.position = rows, 0

    def __next__(self) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(self.position)
        self.position += 1
        tokens = torch.randint(0, 50, (self.rows, 17), generator=noise)
        tokens[:, 9:] = tokens[:, :8]
        return {"tokens": tokens}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Toy(nn.Module):
    """Embedding, two residual layers with attention and dropout, tied head."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            heads = x.unflatten(2, (2, 16)).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
            x = x + self.dropout(F.gelu(layer(mixed)))
        return F.linear(x, self.embedding.weight)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Mean over the tokens that are not 0, so that rows weigh differently."""
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        loss = F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten(), ignore_index=0)
        return loss, {"tokens": int((targets != 0).sum())}
