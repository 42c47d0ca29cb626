"""Stage 2, the Transformer over captions and codes (section 2.2, appendix B.1)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from canon.core.generation.cache import KVCache
from canon.images.dalle.config import Config

Pattern = Literal["row", "column", "convolution"]
PATTERNS: tuple[Pattern, ...] = ("row", "column", "convolution")


def layer_patterns(n_layers: int) -> list[Pattern]:
    """Which part of the picture a code sees in each layer: row, column, row, row, and so on; at last convolution."""
    # "given the index i of a self-attention layer (with i in [1, 63]), we use the column attention mask if
    # i - 2 mod 4 = 0, and row attention otherwise"; "the convolutional attention mask is only used in the last"
    return [*("column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layers)), "convolution"]


def attention_mask(pattern: Pattern, text_length: int, side: int, kernel_size: int) -> Bool[Tensor, "time time"]:
    """Which inputs each input sees, True meaning yes: ``text_length`` tokens, the start of image, side^2 - 1 codes.

    Args:
        pattern: of the codes among each other. All else is causal: codes see the whole text and the start of image.
        text_length: positions for the caption.
        side: of the grid of codes.
        kernel_size: of the convolution.
    """
    positions = torch.arange(text_length + side**2)
    code = positions > text_length
    before = positions[:, None] - positions  # how far back, in raster order
    if pattern == "row":
        # "each image token attends to the previous 5 image tokens in raster order", itself included, on a grid 4 wide:
        # "the last token being attended to is the one in the same column of the previous row"
        seen = before <= side
    elif pattern == "column":
        seen = before % side == 0
    else:
        # "a causal convolutional attention pattern with wraparound behavior (similar to the row attention)"
        half, rows = kernel_size // 2, torch.arange(kernel_size // 2 + 1)
        seen = ((before[..., None] - side * rows).abs() <= half).any(-1)
    return (before >= 0) & (seen | ~(code[:, None] & code))


def masked_attention(
    q: Float[Tensor, "batch heads time d_head"],
    k: Float[Tensor, "batch heads source d_head"],
    v: Float[Tensor, "batch heads source d_head"],
    mask: Bool[Tensor, "time source"],
) -> Float[Tensor, "batch heads time d_head"]:
    """softmax(q k^T / sqrt(d_head)) v over what the mask allows (Vaswani et al. 2017, Eq. 1)."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # PyTorch's kernel for masks is slow in bfloat16 on a CPU without matrix tiles: the products are written out
    hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    scores = torch.baddbmm(hidden, rows[0], rows[1].transpose(1, 2), alpha=q.shape[3] ** -0.5)
    return torch.bmm(scores.softmax(-1), rows[2]).view_as(q)


class Block(nn.Module):
    """Self-attention under a mask, then a network at each position; norms stand before both, as in GPT-2."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        mask: Bool[Tensor, "time source"],
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "batch time d_model"]:
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.n_heads).unbind()
        if cache is not None:
            k, v = cache.update(layer, k, v)
        x = x + self.out(rearrange(masked_attention(q, k, v, mask), "b h t d -> b t (h d)"))
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """Predicts one stream: the caption's tokens, its padding, the start of image, the codes in raster order.

    Ids of the stream: ``vocab_size`` tokens of text, a padding token for each of the ``text_length`` positions, the
    start of image, and the codes. It is a decoder for :func:`canon.core.generation.decode.generate`.
    """

    masks: Bool[Tensor, "patterns time time"]
    follows: Bool[Tensor, "time stream_ids"]

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.start_of_image = c.vocab_size + c.text_length
        self.first_code = self.start_of_image + 1
        ids = self.first_code + c.codebook_size
        self.token_embedding = nn.Embedding(ids, c.d_model)
        self.text_position = nn.Embedding(c.text_length, c.d_model)
        self.row_position = nn.Embedding(c.side, c.d_model)
        self.column_position = nn.Embedding(c.side, c.d_model)
        self.blocks = nn.ModuleList(Block(c.d_model, c.n_heads) for _ in range(c.n_layers))
        self.final_norm = nn.LayerNorm(c.d_model)
        self.head = nn.Linear(c.d_model, ids, bias=False)
        self.patterns = [PATTERNS.index(pattern) for pattern in layer_patterns(c.n_layers)]
        masks = [attention_mask(pattern, c.text_length, c.side, c.kernel_size) for pattern in PATTERNS]
        self.register_buffer("masks", torch.stack(masks), persistent=False)
        # text is followed by text, the start of image and codes by codes
        of_codes = torch.arange(c.context_length)[:, None] >= c.text_length
        follows = of_codes == (torch.arange(ids) >= self.first_code)
        follows[:, self.start_of_image] = False
        self.register_buffer("follows", follows, persistent=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for residual in (module.out, module.down):
                nn.init.normal_(residual.weight, std=0.02 / math.sqrt(2 * self.config.n_layers))

    def stream(
        self, text: Int[Tensor, "batch text_length"], codes: Int[Tensor, "batch side side"]
    ) -> Int[Tensor, "batch time"]:
        """Caption, start of image and codes as ids of the stream."""
        start = text.new_full((len(text), 1), self.start_of_image)
        return torch.cat([text, start, codes.flatten(1) + self.first_code], dim=1)

    def positions(self) -> Float[Tensor, "time d_model"]:
        """What is added to the embedding at each position: one vector in the text, a row's and a column's at a code."""
        # "each image vocabulary embedding is summed with a row and column embedding" (figure 10)
        grid = (self.row_position.weight[:, None] + self.column_position.weight).flatten(0, 1)
        return torch.cat([self.text_position.weight, torch.zeros_like(grid[:1]), grid[:-1]])

    def forward(
        self, tokens: Int[Tensor, "batch time"], cache: KVCache | None = None, last_only: bool = False
    ) -> Float[Tensor, "batch predicted stream_ids"]:
        """Logits of the next token at every position (at the last one only with ``last_only``).

        What cannot follow has minus infinity: text among codes, codes within the text.

        Args:
            tokens: ids of the stream from its beginning, or from where the cache ends.
            cache: keys and values of what came before, to which those of ``tokens`` are added.
            last_only: of the last position alone.
        """
        begin = 0 if cache is None else cache.filled
        end = begin + tokens.shape[1]
        x = self.token_embedding(tokens) + self.positions()[begin:end]
        for layer, block in enumerate(self.blocks):
            x = block(x, self.masks[self.patterns[layer], begin:end, :end], cache, layer)
        if cache is not None:
            cache.advance(tokens.shape[1])
        if last_only:
            x, begin = x[:, -1:], end - 1
        return self.head(self.final_norm(x)).masked_fill(~self.follows[begin:end], -math.inf)

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """Empty key and value memory for ``batch`` streams of at most ``max_length`` tokens."""
        c, weight = self.config, self.token_embedding.weight
        max_length = min(max_length, c.context_length)
        return KVCache(c.n_layers, batch, c.n_heads, max_length, c.d_model // c.n_heads, weight.dtype, weight.device)
