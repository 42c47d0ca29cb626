"""The first stage of latent diffusion: pictures to small latents and back (section 3.1, appendix G).

Two regularisations keep the latents in bounds: a slight pull towards a standard normal (KL), or a codebook (VQ).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from canon.core.nn.group_norm import GroupNorm, channels_last
from canon.core.nn.quantizers import VectorQuantizer
from canon.core.nn.unet import PixelAttention, ResBlock, Upsample

EPS = 1e-6  # of every GroupNorm
KL_WEIGHT = 1e-6  # "a very small weight" (appendix G), as released; of sums over pictures and latents


class Downsample(nn.Module):
    """Half the height and width by a 3x3 convolution of stride 2 that pads only below and on the right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels half_h half_w"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks of one resolution, an attention after each or none, then a change of resolution.

    Args:
        in_channels: of the first block.
        out_channels: of the others.
        blocks: number of residual blocks.
        attention: whether pixels attend to each other after each block.
        resample: the last layer; None: the resolution stays.
        groups: of every GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        attention: bool,
        resample: nn.Module | None,
        groups: int = 32,
    ):
        super().__init__()
        ins = [in_channels] + [out_channels] * (blocks - 1)
        self.blocks = nn.ModuleList(ResBlock(width, out_channels, groups=groups, eps=EPS) for width in ins)
        self.attentions = nn.ModuleList(PixelAttention(out_channels, groups) for _ in range(blocks * attention))
        self.resample = nn.Identity() if resample is None else resample

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels new_height new_width"]:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return self.resample(x)


def middle(channels: int, groups: int = 32) -> nn.Sequential:
    """The coarsest resolution: two residual blocks around an attention."""
    first, second = (ResBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2))
    return nn.Sequential(first, PixelAttention(channels, groups), second)


class Encoder(nn.Module):
    """Pictures to latents, 2^(levels - 1) times smaller.

    Args:
        in_channels: of the picture.
        out_channels: of the latent.
        channels: of the finest level; a multiple of ``groups``.
        multipliers: channels of each level, finest first, in multiples of ``channels``.
        res_blocks: residual blocks a level.
        attention: levels with attention, 0 is the finest; the middle always has it.
        groups: of every GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        multipliers: Sequence[int],
        res_blocks: int,
        attention: Sequence[int] = (),
        groups: int = 32,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip([channels, *widths], widths)):
            down = Downsample(width) if level < len(widths) - 1 else None
            self.down.append(Level(before, width, res_blocks, level in attention, down, groups))
        self.middle = middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels latent_height latent_width"]:
        x = self.conv_in(channels_last(x))
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.middle(x), silu=True))


class Decoder(nn.Module):
    """Latents to pictures: the mirror image of the encoder, with one more residual block a level.

    Args:
        in_channels: of the latent.
        out_channels: of the picture.
        channels: as the encoder's, and so the rest.
        multipliers: finest first.
        res_blocks: of the encoder.
        attention: levels with attention, 0 is the finest.
        groups: of every GroupNorm.

    Attributes:
        up: levels, coarsest first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        multipliers: Sequence[int],
        res_blocks: int,
        attention: Sequence[int] = (),
        groups: int = 32,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for level, before in reversed(list(enumerate([*widths[1:], widths[-1]]))):
            up = Upsample(widths[level]) if level else None
            self.up.append(Level(before, widths[level], res_blocks + 1, level in attention, up, groups))
        self.norm_out = GroupNorm(groups, channels * multipliers[0], EPS)
        self.conv_out = nn.Conv2d(channels * multipliers[0], out_channels, 3, padding=1)

    def features(
        self, z: Float[Tensor, "batch in_channels latent_height latent_width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """What the last convolution reads."""
        x = self.middle(self.conv_in(channels_last(z)))
        for level in self.up:
            x = level(x)
        return self.norm_out(x, silu=True)

    def forward(
        self, z: Float[Tensor, "batch in_channels latent_height latent_width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        return self.conv_out(self.features(z))


@dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution of independent elements."""

    mean: Float[Tensor, "batch channels height width"]
    """Also the mode."""
    log_var: Float[Tensor, "batch channels height width"]
    """Logarithm of the variance."""

    def sample(
        self, noise: Float[Tensor, "batch channels height width"] | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Draw one; ``noise`` is standard normal."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (0.5 * self.log_var).exp() * noise

    def kl(self) -> Float[Tensor, " batch"]:
        """Divergence from a standard normal distribution in nats, summed over the elements of each row."""
        # KL = 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2)
        return 0.5 * (self.mean**2 + self.log_var.exp() - 1 - self.log_var).flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """Autoencoder whose latents are normally distributed.

    Args:
        channels: of the finest level; a multiple of ``groups``.
        multipliers: channels of each level, finest first, in multiples of ``channels``.
        res_blocks: residual blocks a level.
        z_channels: of the latent.
        attention: levels with attention besides the middle, 0 is the finest.
        in_channels: of the picture.
        groups: of every GroupNorm.

    The defaults are Stable Diffusion's (f = 8).
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        res_blocks: int = 2,
        z_channels: int = 4,
        attention: Sequence[int] = (),
        in_channels: int = 3,
        groups: int = 32,
    ):
        super().__init__()
        shape = channels, multipliers, res_blocks, attention, groups
        self.encoder = Encoder(in_channels, 2 * z_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.decoder = Decoder(z_channels, in_channels, *shape)

    def posterior(self, x: Float[Tensor, "batch channels height width"]) -> DiagonalGaussian:
        """The distribution q(z | x) of the latent, in float32."""
        mean, log_var = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return DiagonalGaussian(mean, log_var.clamp(-30, 20))

    def encode(
        self,
        x: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch z_channels latent_height latent_width"] | None = None,
    ) -> Float[Tensor, "batch z_channels latent_height latent_width"]:
        """A latent of a picture: a sample made of standard normal ``noise``, or the mode."""
        posterior = self.posterior(x)
        return posterior.mean if noise is None else posterior.sample(noise)

    def decode(
        self, z: Float[Tensor, "batch z_channels latent_height latent_width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The picture of a latent."""
        return self.decoder(self.post_quant_conv(z))

    def reconstruct(
        self,
        x: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch z_channels latent_height latent_width"] | None = None,
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, ""], Tensor]:
        """What remains of a picture, the weighted KL divergence a row, and what the decoder's last layer read."""
        posterior = self.posterior(x)
        h = self.decoder.features(self.post_quant_conv(posterior.sample(noise)))
        return self.decoder.conv_out(h), KL_WEIGHT * posterior.kl().mean(), h


class AutoencoderVQ(nn.Module):
    """Autoencoder whose latents are quantised, in the decoder: the diffusion model sees them before that.

    Args:
        channels: of the finest level; a multiple of ``groups``.
        multipliers: channels of each level, finest first, in multiples of ``channels``.
        res_blocks: residual blocks a level.
        z_channels: of the latent and of each code.
        attention: levels with attention besides the middle, 0 is the finest.
        in_channels: of the picture.
        groups: of every GroupNorm.
        codebook: number of codes.

    The defaults are VQ-f4 of Table 8.
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4),
        res_blocks: int = 2,
        z_channels: int = 3,
        attention: Sequence[int] = (),
        in_channels: int = 3,
        groups: int = 32,
        codebook: int = 8192,
    ):
        super().__init__()
        shape = channels, multipliers, res_blocks, attention, groups
        self.encoder = Encoder(in_channels, z_channels, *shape)
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        # As released: beta stands at the other term of the loss.
        self.quantizer = VectorQuantizer(codebook, z_channels, codebook=0.25, commitment=1.0)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.decoder = Decoder(z_channels, in_channels, *shape)

    def encode(
        self,
        x: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch z_channels latent_height latent_width"] | None = None,
    ) -> Float[Tensor, "batch z_channels latent_height latent_width"]:
        """The latent of a picture, not yet quantised; it is not random, ``noise`` has no part in it."""
        return self.quant_conv(self.encoder(x))

    def decode(
        self, z: Float[Tensor, "batch z_channels latent_height latent_width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The picture of a latent, which is quantised first."""
        return self.decoder(self.post_quant_conv(self.quantizer(z).z))

    def reconstruct(
        self,
        x: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch z_channels latent_height latent_width"] | None = None,
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, ""], Tensor]:
        """What remains of a picture, the quantiser's loss a row, and what the decoder's last layer read."""
        quantized = self.quantizer(self.encode(x))
        h = self.decoder.features(self.post_quant_conv(quantized.z))
        # Released with a mean over pixels of all other terms; here they are sums.
        return self.decoder.conv_out(h), quantized.loss * x[0].numel(), h
