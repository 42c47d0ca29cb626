"""What the U-Nets of diffusion models and the autoencoders below them are made of.

Residual blocks, attention over pixels and text, and the layers between two resolutions. Maps are (batch, channels,
height, width); a Transformer inside a U-Net sees them as tokens (batch, height * width, channels).

Sources: Ho et al. 2020, arXiv 2006.11239; Dhariwal and Nichol 2021, arXiv 2105.05233; Rombach et al. 2022, arXiv
2112.10752, whose released models these blocks can load.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from canon.core import native
from canon.core.nn import narrow
from canon.core.nn.group_norm import GroupNorm
from canon.core.nn.layers import Conv2d, Linear, linear, prepared_for


def timestep_embedding(t: Num[Tensor, " batch"], dim: int, max_period: float = 10_000.0) -> Float[Tensor, "batch dim"]:
    """Sinusoids of t, cosines first, in float32.

    Args:
        t: what the diffusion model is told of the noise; any real number.
        dim: even.
        max_period: the longest wavelength over 2 pi.

    Source: Ho et al. 2020, section 4, after Vaswani et al. 2017, section 3.5.
    """
    half = dim // 2
    # w_i = max_period^(-i / half);  [cos(w t), sin(w t)]
    w = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * w
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero(layer: nn.Conv2d | nn.Linear) -> None:
    """Zero a layer's weights, so that the residual branch that it ends starts as nothing (Goyal et al. 2017)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, around which the input passes.

    Args:
        in_channels: a multiple of ``groups``, as is ``out_channels``.
        out_channels: where they differ, the input passes through a 1x1 convolution.
        d_emb: width of the time embedding; None: there is no time.
        groups: of both GroupNorms (Wu and He 2018, arXiv 1803.08494).
        eps: of both GroupNorms.
        scale_shift: whether the time embedding scales and shifts what the second GroupNorm makes, and is not added
            before it (Nichol and Dhariwal 2021, arXiv 2102.09672).

    Source: Ho et al. 2020, appendix B.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        d_emb: int | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        scale_shift: bool = False,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = None if d_emb is None else Linear(d_emb, (1 + scale_shift) * out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"], emb: Float[Tensor, "batch d_emb"] | None = None
    ) -> Float[Tensor, "batch out_channels height width"]:
        """``emb`` is the time embedding after its SiLU, which all blocks of a network share."""
        h = self.conv1(self.norm1(x, silu=True))
        film = None
        if self.time is not None and self.scale_shift:
            film = self.time(emb).chunk(2, dim=1)
        elif self.time is not None:
            h = _plus(self.conv1, h, self.time(emb)[:, :, None, None])
        h = self.conv2(self.norm2(h, film, silu=True))
        return _plus(self.conv2, h, self.shortcut(x))


def _plus(layer: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """y + x; in place where nobody looks at what the layer returned: no gradient needs a convolution's own output."""
    watched = layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return y + x if watched or nn.modules.module._has_any_global_hook() else y.add_(x)


class Downsample(nn.Module):
    """Half the height and width, by a 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels half_h half_w"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width, by repeating pixels; then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels twice_h twice_w"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ------------------------------------------------------------------------------------------------------- attention


def attend(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
) -> Float[Tensor, "batch heads queries d_head"]:
    """softmax(q k^T / sqrt(d_head)) v by whichever kernel is fastest (Vaswani et al. 2017, eq. 1)."""
    # On a CPU, PyTorch's fused kernel is slow with narrow heads (float32, 32 maps of 1,024 queries and keys of width 5,
    # forward and backward on one Zen 4 core: 310 ms against 67 ms), with small ones (256 maps of 16 x 16 of width 32 on
    # two threads: 1.5 ms against 0.6 ms) and in bfloat16 (256 maps of 64 queries and keys of width 24: 38 ms against
    # 7 ms written out).
    if narrow.applies(q, k, v):
        return narrow.attend_narrow(q, k, v)
    learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few = not learning and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] < 2**17  # of 16 x 16, 32: 0.08 and 0.17 ms
    if few or q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    return _WrittenOut.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view_as(q)


class _WrittenOut(torch.autograd.Function):
    """Attention in blocks whose weights fit into the cache; the backward pass computes them again.

    Every product below has its long side last: with a tall and narrow result, BLAS takes up to nine times as long.
    """

    BLOCK = 2**19  # weights

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        y = torch.empty_like(q)
        for rows, some in _WrittenOut.blocks(q, k):
            w = _WrittenOut.weights(q[rows, some], k[rows])
            y[rows, some] = torch.bmm(v[rows].mT, w.mT).mT
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        if torch.is_grad_enabled():
            return native.differentiable(narrow.written_out, (q, k, v), dy)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x.mT, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for rows, some in _WrittenOut.blocks(q, k):
            w = _WrittenOut.weights(q[rows, some], k[rows])
            dv[rows] += torch.bmm(dy[rows, some].mT, w)
            dw = torch.bmm(dy[rows, some], v[rows].mT)
            # softmax: ds = w (dw - sum_j w_j dw_j)
            ds = torch._softmax_backward_data(dw, w, -1, w.dtype).mul_(q.shape[2] ** -0.5)
            dq[rows, some] = torch.bmm(k[rows].mT, ds.mT).mT
            dk[rows] += torch.bmm(q[rows, some].mT, ds)
        return dq, dk.mT.to(k.dtype), dv.mT.to(v.dtype)

    @staticmethod
    def blocks(q, k):
        """Slices of the rows and of their queries: several rows with all queries, or one row with some of them."""
        rows = max(1, _WrittenOut.BLOCK // (q.shape[1] * k.shape[1]))
        some = q.shape[1] if rows > 1 else max(1, _WrittenOut.BLOCK // k.shape[1])
        for i in range(0, q.shape[0], rows):
            for j in range(0, q.shape[1], some):
                yield slice(i, i + rows), slice(j, j + some)

    @staticmethod
    def weights(q, k):
        """softmax(q k^T / sqrt(d))."""
        scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[2] ** -0.5)
        return torch.softmax(scores, -1, out=scores)


class CrossAttention(nn.Module):
    """Multi-head attention of pixels to a context; self-attention where the context is the pixels themselves.

    Args:
        d_model: of the pixels; a multiple of ``n_heads``.
        n_heads: heads.
        d_context: of the context.

    Source: Rombach et al. 2022, section 3.3.
    """

    def __init__(self, d_model: int, n_heads: int, d_context: int):
        super().__init__()
        self.n_heads = n_heads
        self.q = Linear(d_model, d_model, bias=False)
        self.k = Linear(d_context, d_model, bias=False)
        self.v = Linear(d_context, d_model, bias=False)
        self.out = Linear(d_model, d_model)

    def forward(
        self, x: Float[Tensor, "batch pixels d_model"], context: Float[Tensor, "batch time d_context"]
    ) -> Float[Tensor, "batch pixels d_model"]:
        q = self._heads(self.q(x))
        k, v = self._read(context) if context is x else prepared_for(self, context, lambda: self._read(context))
        # Attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V,  Q = W_Q phi(z), K = W_K tau(y), V = W_V tau(y)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))

    @torch.no_grad()
    def probabilities(
        self, x: Float[Tensor, "batch pixels d_model"], context: Float[Tensor, "batch time d_context"]
    ) -> Float[Tensor, "batch heads pixels time"]:
        """How much each pixel looks at each place of the context, in float32."""
        q, k = self._heads(self.q(x)).float(), self._heads(self.k(context)).float()
        return (q @ k.mT * q.shape[3] ** -0.5).softmax(-1)

    def _read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.k(context)), self._heads(self.v(context))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """Feed-forward network W_2 (value * GELU(gate)), of which one matrix makes value and gate.

    Source: Shazeer 2020, arXiv 2002.05202, Eq. 6.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.up = Linear(d_model, 2 * d_ff)
        self.out = Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, "batch pixels d_model"]) -> Float[Tensor, "batch pixels d_model"]:
        # Halves of the matrix, not of its product: what follows runs over contiguous memory, 1.3 times as fast.
        weights, biases = self.up.weight.chunk(2), self.up.bias.chunk(2)
        value, gate = (linear(x, weights[i], biases[i], (self.up, i)) for i in (0, 1))
        # FFN_GEGLU(x) = (GELU(x W) * x V) W_2
        return self.out(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and GEGLU, each on a normalised input and added to it (appendix E.2.2)."""

    def __init__(self, d_model: int, n_heads: int, d_context: int):
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(d_model)
        self.self_attention = CrossAttention(d_model, n_heads, d_model)
        self.cross_attention_norm = nn.LayerNorm(d_model)
        self.cross_attention = CrossAttention(d_model, n_heads, d_context)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward = GEGLU(d_model, 4 * d_model)

    def forward(
        self, x: Float[Tensor, "batch pixels d_model"], context: Float[Tensor, "batch time d_context"]
    ) -> Float[Tensor, "batch pixels d_model"]:
        h = self.self_attention_norm(x)
        x = x + self.self_attention(h, h)
        x = x + self.cross_attention(self.cross_attention_norm(x), context)
        return x + self.feed_forward(self.feed_forward_norm(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a map, between two linear maps of which the last starts at zero.

    Args:
        channels: a multiple of ``groups`` and of ``n_heads``.
        n_heads: heads.
        d_context: width of the text.
        depth: number of blocks.
        groups: of the GroupNorm.

    Source: Rombach et al. 2022, appendix E.2.1, Table 17.
    """

    def __init__(self, channels: int, n_heads: int, d_context: int, depth: int = 1, groups: int = 32):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, n_heads, d_context) for _ in range(depth))
        self.proj_out = Linear(channels, channels)
        zero(self.proj_out)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], context: Float[Tensor, "batch time d_context"]
    ) -> Float[Tensor, "batch channels height width"]:
        h = self.proj_in(self.norm(x).flatten(2).mT)
        for block in self.blocks:
            h = block(h, context)
        return x + self.proj_out(h).mT.unflatten(2, x.shape[2:])


class PixelAttention(nn.Module):
    """Single-head self-attention over the pixels of a map, added to it.

    Args:
        channels: a multiple of ``groups``.
        groups: of the GroupNorm.
        eps: of the GroupNorm.

    Source: Ho et al. 2020, appendix B; Esser et al. 2021, arXiv 2012.09841, Table 7.
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps)
        self.q, self.k, self.v, self.out = (Linear(channels, channels) for _ in range(4))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        h = self.norm(x).flatten(2).mT[:, None].contiguous()
        h = self.out(attend(self.q(h), self.k(h), self.v(h)))
        return x + h[:, 0].mT.unflatten(2, x.shape[2:])


@contextmanager
def capture_attention(model: nn.Module) -> Iterator[dict[str, list[Float[Tensor, "batch heads pixels time"]]]]:
    """Record how much each pixel looks at each word, while the body runs.

    Yields:
        Name of the cross-attention layer -> its weights at each call, pixels row by row, on the CPU.
    """
    maps: dict[str, list[Tensor]] = {}

    def record(name: str, layer: CrossAttention, inputs: tuple[Tensor, Tensor]) -> None:
        maps.setdefault(name, []).append(layer.probabilities(*inputs).cpu())

    blocks = {name: module for name, module in model.named_modules() if isinstance(module, TransformerBlock)}
    handles = [
        block.cross_attention.register_forward_pre_hook(partial(record, f"{name}.cross_attention".lstrip(".")))
        for name, block in blocks.items()
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
