"""Stage 1, the discrete VAE (section 2.1, appendix A): a picture as a grid of codes, and back."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from canon.core.nn.quantizers import gumbel_quantize, kl_to_uniform
from canon.images.dalle.config import Config

EPS = 0.1
"""Of the pixel map: it keeps pixels away from 0 and 1, where the density has poles."""
LAST_TEMPERATURE = 1 / 16


# ------------------------------------------------------------------------------------- likelihood (appendix A.3)


def map_pixels(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """Pictures in [-1, 1] to [eps, 1 - eps], for which the likelihood is made."""
    # Eq. 3: phi(x) = (1 - 2 eps) x / 255 + eps for bytes x; x / 255 is (images + 1) / 2
    return (1 - 2 * EPS) * (images + 1) / 2 + EPS


def unmap_pixels(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """The inverse of :func:`map_pixels`, clipped to [-1, 1]."""
    return (2 * (x - EPS) / (1 - 2 * EPS) - 1).clamp(-1, 1)


def logit_laplace(
    x: Float[Tensor, "*shape"], mu: Float[Tensor, "*shape"], log_b: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Log density in nats at x in (0, 1) of the sigmoid of a Laplace variable of centre mu and scale b."""
    # Eq. 2: f(x | mu, b) = 1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b)
    return -(x.logit() - mu).abs() * (-log_b).exp() - log_b - math.log(2) - (x * (1 - x)).log()


# ----------------------------------------------------------------------------------------- schedules (appendix A.2)


def temperature_at(step: int, steps: int) -> float:
    """tau of the relaxation at a step: from 1 to 1/16 by a cosine over ``steps``, then constant."""
    # tau = 1/16 + (1 - 1/16) (1 + cos(pi t)) / 2
    return LAST_TEMPERATURE + (1 - LAST_TEMPERATURE) * (1 - _rise(step, steps))


def kl_weight_at(step: int, steps: int, weight: float) -> float:
    """beta at a step: from 0 to ``weight`` by a cosine over ``steps``, then constant."""
    return weight * _rise(step, steps)


def _rise(step: int, steps: int) -> float:
    return (1 - math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2


# ------------------------------------------------------------------------------------------ networks (appendix A.1)


def convolution(d_in: int, d_out: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the resolution, initialised as the released code does."""
    layer = nn.Conv2d(d_in, d_out, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=(d_in * kernel**2) ** -0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Bottleneck(nn.Module):
    """ReLUs and convolutions through a quarter of the width, added to the input.

    Args:
        d_in: channels that come in.
        d_out: channels that go out, a multiple of four.
        kernels: sides of the convolutions.
        gain: multiplies what is added.
    """

    def __init__(self, d_in: int, d_out: int, kernels: Sequence[int], gain: float):
        super().__init__()
        widths = [d_in, *[d_out // 4] * (len(kernels) - 1), d_out]
        self.gain = gain
        self.convolutions = nn.ModuleList(convolution(a, b, k) for (a, b), k in zip(pairwise(widths), kernels))
        self.shortcut = nn.Identity() if d_in == d_out else convolution(d_in, d_out, 1)

    def forward(self, x: Float[Tensor, "batch d_in height width"]) -> Float[Tensor, "batch d_out height width"]:
        y = x
        for layer in self.convolutions:
            y = layer(y.relu())
        # "multiplication of the outgoing activations from the encoder and decoder resblocks by a small constant"
        return self.shortcut(x) + self.gain * y


class Encoder(nn.Module):
    """Pixels to logits over the codes; each group of blocks has half the resolution and twice the width of the last.

    Args:
        width: channels at full resolution.
        n_codes: size of the codebook.
        groups: resolutions.
        blocks: of each resolution.
    """

    def __init__(self, width: int, n_codes: int, groups: int, blocks: int):
        super().__init__()
        widths = [width, *(width * 2**group for group in range(groups))]
        self.input = convolution(3, width, 7)
        self.groups = nn.ModuleList()
        for group, (d_in, d_out) in enumerate(pairwise(widths)):
            layers: list[nn.Module] = [
                Bottleneck(d_out if block else d_in, d_out, (3, 3, 3, 1), (groups * blocks) ** -2.0)
                for block in range(blocks)
            ]
            if group < groups - 1:
                layers.append(nn.MaxPool2d(2))  # "which we found to yield better ELB than average-pooling"
            self.groups.append(nn.Sequential(*layers))
        self.output = convolution(widths[-1], n_codes, 1)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch n_codes h w"]:
        x = self.input(x.contiguous(memory_format=torch.channels_last))  # in which convolutions are faster
        for group in self.groups:
            x = group(x)
        with torch.autocast(x.device.type, enabled=False):  # the convolutions at the relaxation are never in 16 bits
            return self.output(x.float().relu())


class Decoder(nn.Module):
    """Weights of the codes to the statistics of the likelihood; the encoder's resolutions in reverse order.

    Args:
        width: channels at full resolution.
        n_codes: size of the codebook.
        groups: resolutions.
        blocks: of each resolution.
    """

    def __init__(self, width: int, n_codes: int, groups: int, blocks: int):
        super().__init__()
        widths = [width // 2, *(width * 2**group for group in reversed(range(groups)))]
        self.input = convolution(n_codes, widths[0], 1)
        self.groups = nn.ModuleList()
        for group, (d_in, d_out) in enumerate(pairwise(widths)):
            layers: list[nn.Module] = [
                Bottleneck(d_out if block else d_in, d_out, (1, 3, 3, 3), (groups * blocks) ** -2.0)
                for block in range(blocks)
            ]
            if group < groups - 1:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            self.groups.append(nn.Sequential(*layers))
        self.output = convolution(width, 6, 1)

    def forward(self, z: Float[Tensor, "batch n_codes h w"]) -> Float[Tensor, "batch 6 height width"]:
        with torch.autocast(z.device.type, enabled=False):
            x = self.input(z.float().contiguous(memory_format=torch.channels_last))
        for group in self.groups:
            x = group(x)
        # "the first three feature maps represent the mu parameter for the RGB channels, and the last three ln b"
        return self.output(x.relu())


class DVAE(nn.Module):
    """The discrete VAE of a configuration, with fresh weights."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c.dvae_width, c.codebook_size, c.dvae_groups, c.dvae_blocks)
        self.decoder = Decoder(c.dvae_width, c.codebook_size, c.dvae_groups, c.dvae_blocks)

    def logits(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch n_codes h w"]:
        """Of q(z | x) at each place of the grid, for pictures in [-1, 1]."""
        return self.encoder(map_pixels(images))

    @torch.no_grad()
    def codes(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch h w"]:
        """The likeliest code at each place, "without adding any gumbel noise" (section 2.2)."""
        return self.logits(images).argmax(1)

    def statistics(
        self, z: Float[Tensor, "batch n_codes h w"]
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 3 height width"]]:
        """mu and ln b of each pixel, for weights of the codes."""
        mu, log_b = self.decoder(z).float().chunk(2, dim=1)
        return mu, log_b

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "batch h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Pictures in [-1, 1] of grids of codes."""
        z = F.one_hot(codes, self.config.codebook_size).permute(0, 3, 1, 2).float()
        # x^ = phi^-1(sigmoid(mu))
        return unmap_pixels(self.statistics(z)[0].sigmoid())

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], temperature: float, seeds: Int[Tensor, " batch"]
    ) -> tuple[
        Float[Tensor, "batch n_codes h w"], Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 3 height width"]
    ]:
        """Logits of the codes, and mu and ln b of a relaxed sample of them; a picture's seed draws its noise."""
        logits = self.logits(images)
        draw = torch.Generator(logits.device)
        z = [gumbel_quantize(row[None], temperature, draw.manual_seed(int(seed))) for row, seed in zip(logits, seeds)]
        return logits, *self.statistics(torch.cat(z))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor | float]]:
        """The negative of the relaxed evidence lower bound, in nats a pixel's channel.

        Args:
            batch: ``images`` in [-1, 1], ``step`` (which sets tau and beta) and ``seed`` of each.
        """
        x, step, c = batch["images"], int(batch["step"][0]), self.config
        tau, beta = temperature_at(step, c.temperature_steps), kl_weight_at(step, c.kl_steps, c.kl_weight)
        logits, mu, log_b = self(x, tau, batch["seed"])
        # Eq. 1 with q relaxed: -ln p(x | y, z) + beta KL(q(z | x) || p(z)), "a joint distribution over the 32 x 32
        # positions", p being uniform; "we divide the overall loss by 256 x 256 x 3", the number of values in a picture
        nll, kl = -logit_laplace(map_pixels(x), mu, log_b).mean(), kl_to_uniform(logits).mean()
        values_of_a_code = (
            x[0].numel() / logits[0, 0].numel()
        )  # 192 in the paper, "so that the weight becomes beta/192"
        error = (unmap_pixels(mu.detach().sigmoid()) - x).square().mean()
        metrics = {"nll": nll.detach(), "kl": kl.detach(), "mse": error, "temperature": tau, "kl_weight": beta}
        return nll + beta / values_of_a_code * kl, metrics
