"""Configurations (tables 12 to 15), the three networks together, and the loss (Eq. 3)."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from canon.core.checks import at_least
from canon.core.errors import UserError
from canon.core.generation import diffusion
from canon.core.generation.diffusion import EPS, Levels, Parameterization, V
from canon.core.training.fit import TrainingConfig
from canon.images.clip.text import TextTransformer
from canon.images.latent_diffusion.autoencoder import AutoencoderKL, AutoencoderVQ
from canon.images.latent_diffusion.unet import UNet

INITIAL_LOG_VARIANCE = -6.0
"""Of the latents: with the usual 0, noise of their own size is the first thing that the KL autoencoder must unlearn."""


@dataclass(frozen=True)
class Config:
    """Shape and training of a latent diffusion model; the text encoder's fields are those of CLIP's."""

    data: str = "things"
    """What it learns from: emoji, things, shapes, or a folder of pictures, each with its captions in a .txt beside."""
    image_size: int = 512
    """Side of the pictures in pixels."""
    first_channels: int = 128
    """Channels of the autoencoder at full resolution."""
    first_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of the autoencoder's resolutions, each half the one before, as multiples of these."""
    latent_channels: int = 4
    """Channels of the latents."""
    codebook: int = 0
    """Codes of the VQ autoencoder; 0 makes the KL one."""
    first_steps: int = 100_000
    """Training steps of the autoencoder."""
    channels: int = 320
    """Channels of the U-Net at the latents' resolution."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of the U-Net's resolutions as multiples of these."""
    attention: tuple[bool, ...] = (True, True, True, False)
    """Which of its resolutions attend to the text."""
    res_blocks: int = 2
    """Residual blocks a resolution, of all three networks."""
    unet_heads: int = 8
    """Attention heads of the U-Net."""
    prediction: Literal["eps", "v"] = "eps"
    """What the U-Net predicts: eps, the noise; or v, as in Stable Diffusion 2, which makes captions count earlier."""
    condition_channels: int = 0
    """Channels concatenated to the latents: one for the mask and latent_channels for the rest, to learn inpainting."""
    vocab_size: int = 49_408
    """Tokens of the text encoder; its vocabulary is CLIP's, or one of this size learned from the captions."""
    context_length: int = 77
    """Tokens of a caption, its start, end and padding included."""
    d_model: int = 768
    """Width of the text encoder."""
    n_layers: int = 12
    """Blocks of the text encoder."""
    n_heads: int = 12
    """Attention heads a block of the text encoder."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the U-Net and the text encoder learn."""

    def __post_init__(self) -> None:
        at_least(self, 0, "codebook")
        at_least(self, 1, "image_size", "first_channels", "first_multipliers", "latent_channels", "first_steps")
        at_least(self, 1, "channels", "multipliers", "res_blocks", "vocab_size", "d_model", "n_layers")
        at_least(self, 2, "context_length")  # a caption has a start and an end
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise UserError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}: change one of them")
        if self.unet_heads < 1 or self.channels % self.unet_heads:
            raise UserError(f"channels {self.channels} is not a multiple of unet_heads {self.unet_heads}")
        if self.channels % 2:
            raise UserError(f"channels must be even (time is told by sines and cosines), not {self.channels}")
        if self.condition_channels not in (0, 1 + self.latent_channels):
            raise UserError(f"condition_channels is 0, or 1 + latent_channels = {1 + self.latent_channels}: inpainting")
        if len(self.attention) != len(self.multipliers):
            raise UserError("attention needs one value for each of the multipliers")
        steps = 2 ** (len(self.first_multipliers) + len(self.multipliers) - 2)
        if self.image_size % steps:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of {steps}, by which the networks shrink it"
            )

    @property
    def small(self) -> bool:
        """Whether the autoencoder is narrower than the released ones, and learns in minutes: see the deviations."""
        return self.first_channels < 128

    @property
    def latent_size(self) -> int:
        """Side of the latents."""
        return self.image_size // 2 ** (len(self.first_multipliers) - 1)


_LAPTOP = Config(
    image_size=32,
    first_channels=16,
    first_multipliers=(1, 2, 2),
    first_steps=1_300,
    channels=32,
    multipliers=(2, 3),
    attention=(False, True),
    res_blocks=1,
    unet_heads=4,
    prediction="v",
    vocab_size=1024,
    context_length=16,
    d_model=96,
    n_layers=2,
    n_heads=3,
    training=TrainingConfig(
        steps=2_200,
        batch_size=64,
        learning_rate=1e-2,
        warmup_steps=100,
        final_fraction=0.05,
        optimizer="muon",
        beta2=0.99,
        weight_decay=0.01,
        ema_decay=0.995,
        evaluate_every=500,
    ),
)

PRESETS = {
    "laptop": _LAPTOP,
    # Places are said of finer maps than kinds of things: the finest level attends, as in Stable Diffusion.
    "shapes": replace(
        _LAPTOP,
        data="shapes",
        first_steps=1_600,
        attention=(True, False),
        training=replace(_LAPTOP.training, steps=2_400, ema_decay=0.99),
    ),
    "inpainting": replace(_LAPTOP, condition_channels=5),
    # The released configuration, but for its text tower, which is CLIP's, frozen: ours learns. Batch 2048.
    "sd-v1": Config(
        training=TrainingConfig(
            steps=431_000,
            batch_size=2048,
            learning_rate=1e-4,
            schedule="constant",
            warmup_steps=10_000,
            ema_decay=0.9999,
            beta2=0.999,
            weight_decay=0.01,
            clip_norm=0.0,
        )
    ),
}


def groups_of(channels: int, fewest: int) -> int:
    """Groups of the GroupNorms of a network: 32, or what leaves at least so many channels a group.

    Groups of one or two channels forget colours.
    """
    return max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or channels // n >= fewest))


def autoencoder(config: Config) -> AutoencoderKL | AutoencoderVQ:
    """The first stage of a configuration, with fresh weights."""
    c = config
    shape = c.first_channels, c.first_multipliers, c.res_blocks, c.latent_channels
    groups = groups_of(c.first_channels, fewest=4 if c.first_channels >= 128 else 16)
    if c.codebook:
        return AutoencoderVQ(*shape, groups=groups, codebook=c.codebook)
    model = AutoencoderKL(*shape, groups=groups)
    assert model.quant_conv.bias is not None
    if c.small:
        nn.init.constant_(model.quant_conv.bias[c.latent_channels :], INITIAL_LOG_VARIANCE)
    return model


class LatentDiffusion(nn.Module):
    """From captions to pictures: a frozen autoencoder, a text encoder, and the U-Net that denoises latents."""

    latent_scale: Tensor
    sharded_methods = ("loss",)

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.autoencoder = autoencoder(c).requires_grad_(False)
        self.text = TextTransformer(c.vocab_size, c.context_length, c.d_model, c.n_layers, c.n_heads)
        self.unet = UNet(
            c.latent_channels + c.condition_channels,
            c.latent_channels,
            c.channels,
            c.multipliers,
            c.attention,
            c.res_blocks,
            c.unet_heads,
            c.d_model,
            groups_of(c.channels, fewest=4),
        )
        # "we rescale the latent by its component-wise standard deviation", estimated on the first batch (appendix G)
        self.register_buffer("latent_scale", torch.ones(()))

    @property
    def schedule(self) -> Levels:
        """The thousand noise levels of training: betas from 0.00085 to 0.012, linear in their square roots."""
        return diffusion.from_betas(diffusion.scaled_linear_betas())

    @property
    def predicts(self) -> Parameterization:
        """What the U-Net predicts."""
        return {"eps": EPS, "v": V}[self.config.prediction]

    @torch.no_grad()
    def encode(
        self,
        images: Float[Tensor, "batch 3 size size"],
        noise: Float[Tensor, "batch latent_channels h w"] | None = None,
    ) -> Float[Tensor, "batch latent_channels h w"]:
        """Latents of pictures, of about unit variance; with ``noise`` a sample of the posterior, else its mode."""
        return self.latent_scale * self.autoencoder.encode(images, noise)

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "batch latent_channels h w"]) -> Float[Tensor, "batch 3 size size"]:
        """Pictures of latents."""
        return self.autoencoder.decode(z / self.latent_scale)

    def forward(
        self,
        z_t: Float[Tensor, "batch latent_channels h w"],
        t: Num[Tensor, " batch"],
        context: Float[Tensor, "batch time d_model"],
        condition: Float[Tensor, "batch condition_channels h w"] | None = None,
    ) -> Float[Tensor, "batch latent_channels h w"]:
        """eps_theta(z_t, t, tau(y)): the noise in the latents (or v), given the text and what is concatenated."""
        return self.unet(z_t if condition is None else torch.cat([z_t, condition], dim=1), t, context)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Mean squared error of the predicted noise, or of v.

        Args:
            batch: ``images`` in [-1, 1]; ``tokens``, some of them the empty caption's; ``noise`` (batch, 2, channels,
                h, w): of the diffusion and of the posterior; ``t`` in [0, 1); for inpainting also ``mask``
                (batch, 1, size, size).
        """
        eps, posterior = batch["noise"].unbind(1)
        z = self.encode(batch["images"], posterior)
        context = self.text(batch["tokens"])
        condition = self.masked(batch["images"], batch["mask"]) if "mask" in batch else None
        table = self.schedule.to(z.device)
        # Eq. 3: L_LDM = E_{E(x), y, eps, t} [ || eps - eps_theta(z_t, t, tau_theta(y)) ||^2 ], or of v in eps' place
        level = table[(batch["t"] * len(table)).long()]
        losses = diffusion.loss(lambda z_t, t: self(z_t, t, context, condition), z, eps, level, self.predicts)
        return losses.mean(), {}

    def masked(
        self, images: Float[Tensor, "batch 3 size size"], mask: Float[Tensor, "batch 1 size size"]
    ) -> Float[Tensor, "batch condition_channels h w"]:
        """What an inpainting model is shown: the mask (1: to be painted) and the latents of what stays."""
        small = nn.functional.interpolate(mask, size=self.config.latent_size)
        return torch.cat([small, self.encode(images * (mask < 0.5))], dim=1)
