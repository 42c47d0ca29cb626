"""The denoising U-Net of latent diffusion, eps_theta(z_t, t, tau(y)), as Stable Diffusion v1 uses it (section 3.2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from canon.core.nn.group_norm import GroupNorm, channels_last
from canon.core.nn.layers import Conv2d, Linear
from canon.core.nn.unet import Downsample, ResBlock, SpatialTransformer, Upsample, timestep_embedding, zero


class Stage(nn.Module):
    """What lies between two skip connections: a residual block, a Transformer, a change of resolution; each optional.

    Args:
        res: takes a map and the time embedding.
        attention: takes a map and the text.
        resample: takes a map.
    """

    def __init__(
        self,
        res: ResBlock | None = None,
        attention: SpatialTransformer | None = None,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.res, self.attention, self.resample = res, attention, resample

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        emb: Float[Tensor, "batch d_emb"],
        context: Float[Tensor, "batch time d_context"],
    ) -> Float[Tensor, "batch out_channels new_height new_width"]:
        if self.res is not None:
            x = self.res(x, emb)
        if self.attention is not None:
            x = self.attention(x, context)
        return x if self.resample is None else self.resample(x)


class Middle(nn.Module):
    """The coarsest resolution, between the two halves."""

    def __init__(self, channels: int, d_emb: int, n_heads: int, d_context: int, groups: int = 32):
        super().__init__()
        self.res1 = ResBlock(channels, channels, d_emb, groups)
        self.attention = SpatialTransformer(channels, n_heads, d_context, groups=groups)
        self.res2 = ResBlock(channels, channels, d_emb, groups)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        emb: Float[Tensor, "batch d_emb"],
        context: Float[Tensor, "batch time d_context"],
    ) -> Float[Tensor, "batch channels height width"]:
        return self.res2(self.attention(self.res1(x, emb), context), emb)


class UNet(nn.Module):
    """Predicts the noise in a latent, given the time and a text.

    Args:
        in_channels: of the latent, and of what is concatenated to it.
        out_channels: of the prediction.
        channels: of the finest level; a multiple of ``groups``.
        multipliers: channels of each level, finest first, in multiples of ``channels``; each level has half the height
            and width of the one before.
        attention: which levels have Transformers; the middle always has one.
        res_blocks: residual blocks a level on the way down; one more on the way up.
        n_heads: attention heads, one number for all levels or one for each (Stable Diffusion v2).
        d_context: width of the text.
        groups: of every GroupNorm.

    The defaults are Stable Diffusion v1.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        channels: int = 320,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        attention: Sequence[bool] = (True, True, True, False),
        res_blocks: int = 2,
        n_heads: int | Sequence[int] = 8,
        d_context: int = 768,
        groups: int = 32,
    ):
        super().__init__()
        self.channels, self.res_blocks, d_emb = channels, res_blocks, 4 * channels
        levels = range(len(multipliers))
        widths = [channels * m for m in multipliers]
        heads = [n_heads] * len(widths) if isinstance(n_heads, int) else list(n_heads)

        def transformer(level: int) -> SpatialTransformer | None:
            if not attention[level]:
                return None
            return SpatialTransformer(widths[level], heads[level], d_context, groups=groups)

        self.time1, self.time2 = Linear(channels, d_emb), Linear(d_emb, d_emb)

        width = channels
        self.down = nn.ModuleList([Stage(resample=Conv2d(in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level in levels:
            for _ in range(res_blocks):
                self.down.append(Stage(ResBlock(width, widths[level], d_emb, groups), transformer(level)))
                width = widths[level]
                skips.append(width)
            if level != levels[-1]:
                self.down.append(Stage(resample=Downsample(width)))
                skips.append(width)

        self.middle = Middle(width, d_emb, heads[-1], d_context, groups)

        self.up = nn.ModuleList()
        for level in reversed(levels):
            for block in range(res_blocks + 1):
                res = ResBlock(width + skips.pop(), widths[level], d_emb, groups)
                width = widths[level]
                up = Upsample(width) if level and block == res_blocks else None
                self.up.append(Stage(res, transformer(level), up))

        self.norm_out = GroupNorm(groups, width)
        self.conv_out = Conv2d(width, out_channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, ResBlock):
                zero(module.conv2)
        zero(self.conv_out)

    def embed(self, t: Num[Tensor, " batch"]) -> Float[Tensor, "batch d_emb"]:
        """Time embedding, as the residual blocks take it."""
        emb = timestep_embedding(t, self.channels).to(self.time1.weight.dtype)
        return F.silu(self.time2(F.silu(self.time1(emb))))

    def encode(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        emb: Float[Tensor, "batch d_emb"],
        context: Float[Tensor, "batch time d_context"],
    ) -> tuple[list[Tensor], Tensor]:
        """The way down and the middle: what each stage of ``down`` made, and what the middle made of the last."""
        skips, x = [], channels_last(x)
        for stage in self.down:
            x = stage(x, emb, context)
            skips.append(x)
        return skips, self.middle(x, emb, context)

    def decode(
        self,
        x: Float[Tensor, "batch channels height width"],
        skips: Sequence[Tensor],
        emb: Float[Tensor, "batch d_emb"],
        context: Float[Tensor, "batch time d_context"],
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """The way up: each stage of ``up`` also sees the skip of the opposite stage."""
        for stage, skip in zip(self.up, reversed(skips)):
            x = stage(torch.cat([x, skip], dim=1), emb, context)
        return self.conv_out(self.norm_out(x, silu=True))

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        t: Num[Tensor, " batch"],
        context: Float[Tensor, "batch time d_context"],
        control: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """The prediction.

        Args:
            x: noisy latent; height and width are multiples of 2^(levels - 1).
            t: what the network is told of the noise, 0 to 999 in a discrete schedule.
            context: the encoded text tau(y).
            control: added to the skips and, the last of them, to the middle's output (ControlNet).
        """
        emb = self.embed(t)
        skips, h = self.encode(x, emb, context)
        if control is not None:
            *skips, h = (a + b for a, b in zip([*skips, h], control, strict=True))
        return self.decode(h, skips, emb, context)
