"""The text tower: a causal Transformer that is read where the caption ends (section 2.4)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from canon.core.nn.vision import Activation, TransformerBlock, initialise_blocks, quick_gelu


class TextTransformer(nn.Module):
    """Tokens in, a vector at each of them out; Stable Diffusion conditions on all of these.

    Args:
        vocab_size: number of tokens.
        context_length: most tokens of a caption, its start and end included.
        d_model: width.
        n_layers: number of blocks.
        n_heads: attention heads a block.
        activation: of the blocks; CLIP's own models have QuickGELU.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        activation: Activation = quick_gelu,
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(context_length, d_model)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, 4 * d_model, activation) for _ in range(n_layers)
        )
        self.final_norm = nn.LayerNorm(d_model)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        initialise_blocks(self.blocks)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time d_model"]:
        """The last hidden state after the final LayerNorm, at every position."""
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)  # "masked self-attention was used in the text encoder"
        return self.final_norm(x)


def pool(
    hidden: Float[Tensor, "batch time d_model"], tokens: Int[Tensor, "batch time"]
) -> Float[Tensor, "batch d_model"]:
    """The hidden state at the end-of-text token, which has the highest id of all: the caption's feature."""
    # "activations of the highest layer of the transformer at the [EOS] token"; argmax finds the first of several
    return hidden[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=1)]
