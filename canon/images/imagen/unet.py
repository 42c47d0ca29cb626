"""The U-Nets of the cascade: how they are told of time and text, the base's, and the Efficient U-Net (appendix B).

Each is a diffusion model of its own, with the loss it learns by (Eq. 1).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from canon.core.generation import diffusion
from canon.core.generation.diffusion import V, add_noise, cosine
from canon.core.nn.group_norm import GroupNorm, channels_last
from canon.core.nn.unet import CrossAttention, Downsample, ResBlock, Upsample, attend, timestep_embedding, zero

SKIP_SCALE = 1 / math.sqrt(2)
"""Of the Efficient U-Net's skip connections: "significantly improves convergence speed" (appendix B.1)."""


# --------------------------------------------------------------------------------------------------- time and text


class LevelEmbedding(nn.Module):
    """A number in [0, 1], time or the level of augmentation, as a vector."""

    def __init__(self, channels: int, d_emb: int):
        super().__init__()
        self.channels = channels
        self.hidden, self.out = nn.Linear(channels, d_emb), nn.Linear(d_emb, d_emb)

    def forward(self, level: Float[Tensor, " batch"]) -> Float[Tensor, "batch d_emb"]:
        waves = timestep_embedding(1000 * level, self.channels).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(waves)))


class AttentionPool(nn.Module):
    """One vector of a sequence: attention whose query is the sequence's mean (appendix D.3).

    Args:
        d_model: a multiple of ``n_heads``.
        n_heads: heads.

    Source: Radford et al. 2021 (CLIP), section 2.4, with one learned position, the query's.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.position = nn.Parameter(torch.randn(d_model) / d_model**0.5)
        self.q, self.v = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.k = nn.Linear(d_model, d_model, bias=False)  # a bias moves all scores of a query alike

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch d_model"]:
        mean = x.mean(1, keepdim=True) + self.position
        x = torch.cat([mean, x], dim=1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.n_heads) for y in (self.q(mean), self.k(x), self.v(x)))
        return rearrange(attend(q, k, v), "b h 1 d -> b (h d)")


class Conditioning(nn.Module):
    """The text, used twice: pooled and added to the time embedding, and as a sequence to attend to (section 2.5).

    Args:
        channels: of the U-Net at full resolution.
        d_emb: of the time embedding.
        text_width: of the frozen encoder's vectors.
        d_context: of what the U-Net attends to.
        n_heads: heads of the pooling.
    """

    def __init__(self, channels: int, d_emb: int, text_width: int, d_context: int, n_heads: int):
        super().__init__()
        self.time = LevelEmbedding(channels, d_emb)
        # "Layer Normalization for text embeddings in the attention and pooling layers" (section 2.5)
        self.text_norm, self.context_norm = nn.LayerNorm(text_width), nn.LayerNorm(d_context)
        self.text = nn.Linear(text_width, d_context)
        self.pool = AttentionPool(d_context, n_heads)
        self.pooled = nn.Linear(d_context, d_emb)

    def forward(
        self, t: Float[Tensor, " batch"], text: Float[Tensor, "batch time text_width"]
    ) -> tuple[Float[Tensor, "batch d_emb"], Float[Tensor, "batch time d_context"]]:
        context = self.context_norm(self.text(self.text_norm(text.to(self.text.weight.dtype))))
        return self.time(t) + self.pooled(self.pool(context)), context


class TextAttention(nn.Module):
    """Pixels attend to the text, and before that to each other; each added to what it started from.

    Args:
        channels: a multiple of ``groups`` and of ``n_heads``.
        n_heads: heads.
        d_context: of the text.
        groups: of the GroupNorm.
        self_attention: whether pixels attend to each other, too.
    """

    def __init__(self, channels: int, n_heads: int, d_context: int, groups: int, self_attention: bool = True):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.self_attention = CrossAttention(channels, n_heads, channels) if self_attention else None
        self.cross_norm = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, n_heads, d_context)
        for layer in (self.self_attention, self.cross_attention):
            if layer is not None:
                zero(layer.out)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], context: Float[Tensor, "batch time d_context"]
    ) -> Float[Tensor, "batch channels height width"]:
        h, pixels = self.norm(x).flatten(2).mT, x.flatten(2).mT
        if self.self_attention is not None:
            pixels = pixels + self.self_attention(h, h)
            h = pixels
        pixels = pixels + self.cross_attention(self.cross_norm(h), context)
        return pixels.mT.unflatten(2, x.shape[2:])


def groups_of(channels: int) -> int:
    """Groups of a GroupNorm: at least four channels each, since groups of one or two forget colours; at most 32."""
    return max(1, min(32, channels // 4))


# ------------------------------------------------------------------------------------------------------------ base


class Block(nn.Module):
    """A residual block, and attention if there is one."""

    def __init__(self, res: ResBlock, attention: TextAttention | None):
        super().__init__()
        self.res, self.attention = res, attention

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        emb: Float[Tensor, "batch d_emb"],
        context: Float[Tensor, "batch time d_context"],
    ) -> Float[Tensor, "batch out_channels height width"]:
        x = self.res(x, emb)
        return x if self.attention is None else self.attention(x, context)


class UNet(nn.Module):
    """The base: predicts v of a small picture from its noisy self, time and text (section 2.5; Nichol and Dhariwal).

    Args:
        channels: at full resolution; a multiple of 4, and of 32 from 128 on.
        multipliers: channels of each level, finest first, in multiples of ``channels``; each level has half the height
            and width of the one before.
        res_blocks: residual blocks a level on the way down; one more on the way up.
        attention: which levels have attention; the middle always has it.
        n_heads: attention heads; a divisor of all widths and of ``d_context``.
        text_width: of the frozen encoder's vectors.
        d_context: of what pixels attend to.
    """

    sharded_methods = ("loss",)

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        res_blocks: int,
        attention: Sequence[bool],
        n_heads: int,
        text_width: int,
        d_context: int,
    ):
        super().__init__()
        d_emb, groups = 4 * channels, groups_of(channels)
        widths = [channels * m for m in multipliers]

        def block(before: int, level: int) -> Block:
            found = TextAttention(widths[level], n_heads, d_context, groups) if attention[level] else None
            return Block(ResBlock(before, widths[level], d_emb, groups, scale_shift=True), found)

        self.conditioning = Conditioning(channels, d_emb, text_width, d_context, n_heads)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, [channels]
        for level in range(len(widths)):
            if level:
                self.down.append(Downsample(width))
                skips.append(width)
            for _ in range(res_blocks):
                self.down.append(block(width, level))
                width = widths[level]
                skips.append(width)
        self.middle = nn.ModuleList(
            Block(ResBlock(width, width, d_emb, groups, scale_shift=True), found)
            for found in (TextAttention(width, n_heads, d_context, groups), None)
        )
        for level in reversed(range(len(widths))):
            for _ in range(res_blocks + 1):
                self.up.append(block(width + skips.pop(), level))
                width = widths[level]
            if level:
                self.up.append(Upsample(width))
        self.norm_out = GroupNorm(groups, width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        quiet(self)

    def forward(
        self,
        x: Float[Tensor, "batch 3 height width"],
        t: Float[Tensor, " batch"],
        text: Float[Tensor, "batch time text_width"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """v of x at time t in [0, 1]; height and width are multiples of 2^(levels - 1)."""
        emb, context = self.conditioning(t, text)
        emb = F.silu(emb)
        x = self.conv_in(channels_last(x))
        skips = [x]
        for layer in self.down:
            x = layer(x, emb, context) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, emb, context)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], 1), emb, context) if isinstance(layer, Block) else layer(x)
        return self.conv_out(self.norm_out(x, silu=True))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Mean squared error of v.

        Args:
            batch: ``images`` in [-1, 1] and their ``noise`` (batch, 3, size, size), ``t`` in [0, 1], ``text`` (batch,
                time, text_width), zeros where the caption was dropped.
        """
        # Eq. 1: E [ w_t || x^_theta(alpha_t x + sigma_t eps, c) - x ||^2 ], w_t = SNR + 1 being the plain error of v
        losses = diffusion.loss(
            lambda x_t, t: self(x_t, t, batch["text"]), batch["images"], batch["noise"], cosine(batch["t"]), V
        )
        return losses.mean(), {}


# ------------------------------------------------------------------------------------------------ super-resolution


class CombineEmbs(nn.Module):
    """Channels scaled and shifted by what time, text and level say (``use_scale_shift_norm``, appendix F.2)."""

    def __init__(self, channels: int, d_emb: int):
        super().__init__()
        self.emb = nn.Linear(d_emb, 2 * channels)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], emb: Float[Tensor, "batch d_emb"]
    ) -> Float[Tensor, "batch channels height width"]:
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class DBlock(nn.Module):
    """One resolution on the way down (figure A.28): a convolution of stride 2 first, then embeddings, residual blocks,
    attention.

    The usual order is reversed, so that a block's convolutions run at the lower resolution (appendix B.1).

    Args:
        in_channels: of the resolution above.
        channels: of this one.
        blocks: residual blocks.
        d_emb: of the time embedding.
        groups: of every GroupNorm.
        attention: at the end, or None.
    """

    def __init__(
        self, in_channels: int, channels: int, blocks: int, d_emb: int, groups: int, attention: TextAttention | None
    ):
        super().__init__()
        self.resample = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.combine = CombineEmbs(channels, d_emb)
        self.blocks = nn.ModuleList(ResBlock(channels, channels, groups=groups) for _ in range(blocks))
        self.attention = attention

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        emb: Float[Tensor, "batch d_emb"],
        context: Float[Tensor, "batch time d_context"],
    ) -> Float[Tensor, "batch channels half_height half_width"]:
        x = self.combine(self.resample(x), emb)
        for block in self.blocks:
            x = block(x)
        return x if self.attention is None else self.attention(x, context)


class UBlock(nn.Module):
    """One resolution on the way up (figure A.29): embeddings, residual blocks, attention; up-sampling comes last.

    Args:
        in_channels: of what comes from below, and of the skip connection if there is one.
        channels: of this resolution.
        out_channels: of the resolution above.
        blocks: residual blocks.
        d_emb: of the time embedding.
        groups: of every GroupNorm.
        attention: before the up-sampling, or None.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        blocks: int,
        d_emb: int,
        groups: int,
        attention: TextAttention | None,
    ):
        super().__init__()
        self.combine = CombineEmbs(in_channels, d_emb)
        ins = [in_channels] + [channels] * (blocks - 1)
        self.blocks = nn.ModuleList(ResBlock(width, channels, groups=groups) for width in ins)
        self.attention = attention
        self.resample = nn.ConvTranspose2d(channels, out_channels, 3, stride=2, padding=1, output_padding=1)

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        emb: Float[Tensor, "batch d_emb"],
        context: Float[Tensor, "batch time d_context"],
    ) -> Float[Tensor, "batch out_channels twice_height twice_width"]:
        x = self.combine(x, emb)
        for block in self.blocks:
            x = block(x)
        return self.resample(x if self.attention is None else self.attention(x, context))


class EfficientUNet(nn.Module):
    """Super-resolution: v of a picture from its noisy self, time, text and the small picture (appendices B.1, F).

    No residual block stands at the picture's own resolution, and more at lower ones; the lowest alone attends.
    It is convolutional elsewhere: where pixels do not attend to each other, it learns from crops and draws whole
    pictures.

    Args:
        channels: of the first resolution, half of the picture's; a multiple of 4, and of 32 from 128 on.
        multipliers: channels of each resolution, finest first, in multiples of ``channels``.
        blocks: residual blocks of each resolution, on the way down and again on the way up.
        n_heads: attention heads.
        text_width: of the frozen encoder's vectors.
        d_context: of what pixels attend to.
        self_attention: whether the pixels of the lowest resolution attend to each other, besides the text.
    """

    sharded_methods = ("loss",)

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        blocks: Sequence[int],
        n_heads: int,
        text_width: int,
        d_context: int,
        self_attention: bool,
    ):
        super().__init__()
        d_emb, groups = 4 * channels, groups_of(channels)
        widths = [channels * m for m in multipliers]
        above, lowest = [channels, *widths], len(widths) - 1

        def attention(level: int) -> TextAttention | None:
            return TextAttention(widths[level], n_heads, d_context, groups, self_attention) if level == lowest else None

        self.conditioning = Conditioning(channels, d_emb, text_width, d_context, n_heads)
        self.augmentation = LevelEmbedding(channels, d_emb)
        self.conv_in = nn.Conv2d(6, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.down.append(DBlock(above[level], width, blocks[level], d_emb, groups, attention(level)))
        for level in reversed(range(len(widths))):
            width = widths[level]
            both = width if level == lowest else 2 * width
            self.up.append(UBlock(both, width, above[level], blocks[level], d_emb, groups, attention(level)))
        self.norm_out = GroupNorm(groups, channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)
        quiet(self)

    def forward(
        self,
        x: Float[Tensor, "batch 3 height width"],
        t: Float[Tensor, " batch"],
        text: Float[Tensor, "batch time text_width"],
        low: Float[Tensor, "batch 3 low_height low_width"],
        level: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """The prediction.

        Args:
            x: noisy picture; height and width are multiples of 2^resolutions.
            t: its time in [0, 1].
            text: of the frozen encoder.
            low: the small picture, augmented (:func:`augment`).
            level: of that augmentation, in [0, 1].
        """
        emb, context = self.conditioning(t, text)
        emb = F.silu(emb + self.augmentation(level))
        low = F.interpolate(low, size=x.shape[2:], mode="bilinear", align_corners=False)
        x = self.conv_in(channels_last(torch.cat([x, low], dim=1)))
        skips = []
        for block in self.down:
            x = block(x, emb, context)
            skips.append(SKIP_SCALE * x)
        skips.pop()  # the lowest resolution's is what the way up begins with
        x = self.up[0](x, emb, context)
        for block in self.up[1:]:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        # v = alpha eps - sigma x: what the small picture says of x need not be learned
        sigma = cosine(t).sigma.to(low)[:, None, None, None]
        return self.conv_out(self.norm_out(x, silu=True)) - sigma * low

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Mean squared error of v (Eq. 1), given the small picture under noise of a random level (figure A.32).

        Args:
            batch: as the base's; with ``low`` (batch, 3, low, low), its ``low_noise``, and the ``level`` of it in
                [0, 1].
        """
        low = augment(batch["low"], batch["low_noise"], batch["level"])
        losses = diffusion.loss(
            lambda x_t, t: self(x_t, t, batch["text"], low, batch["level"]),
            batch["images"],
            batch["noise"],
            cosine(batch["t"]),
            V,
        )
        return losses.mean(), {}


def augment(
    low: Float[Tensor, "batch 3 height width"],
    noise: Float[Tensor, "batch 3 height width"],
    level: Float[Tensor, " batch"],
) -> Float[Tensor, "batch 3 height width"]:
    """Noise-conditioning augmentation: the small picture as the forward process leaves it at time ``level`` (§2.4)."""
    return add_noise(low, noise, cosine(level))


def quiet(network: UNet | EfficientUNet) -> None:
    """Let every residual block, and the prediction, begin as nothing (Ho et al. 2020)."""
    for module in network.modules():
        if isinstance(module, ResBlock):
            zero(module.conv2)
    zero(network.conv_out)
