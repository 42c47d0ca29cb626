"""Configurations (appendix F), and the cascade of three diffusion models (section 2.4 and 2.5)."""

from dataclasses import dataclass, field, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from canon.core.checks import at_least
from canon.core.errors import UserError
from canon.core.training.fit import TrainingConfig
from canon.images.imagen.text import Statistics
from canon.images.imagen.unet import EfficientUNet, UNet, groups_of


@dataclass(frozen=True)
class Config:
    """Shape and training of an Imagen; the defaults are the paper's where it states them."""

    data: str = "things"
    """What it learns from: emoji, things, shapes, or a folder of pictures, each with its captions in a .txt beside."""
    text_encoder: str = "smollm2-135m-instruct"
    """The frozen language model: an asset, a folder or a GGUF file that the library can load."""
    text_width: int = 4096
    """Width of its hidden states."""
    text_length: int = 128
    """Tokens of a caption that are kept."""
    image_size: int = 64
    """Side of the base's pictures in pixels."""
    scale: int = 4
    """How much larger each super-resolution stage makes a picture."""
    crop: int = 256
    """Side of the crops on which the last stage learns."""
    n_heads: int = 8
    """Attention heads of the U-Nets, and of the pooling of the text."""
    d_context: int = 512
    """Width of the text as the U-Nets attend to it."""
    channels: int = 512
    """Channels of the base at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of the base's resolutions, each half the one before, as multiples of these."""
    res_blocks: int = 3
    """Residual blocks of the base at each resolution."""
    attention: tuple[bool, ...] = (False, True, True, True)
    """Which of its resolutions attend, to themselves and to the text."""
    sr_channels: tuple[int, ...] = (128, 128)
    """Channels of the two super-resolution stages at their first resolution, half of the picture's."""
    sr_multipliers: tuple[int, ...] = (1, 2, 4, 8)
    """Channels of their resolutions, each half the one before, in multiples of these; the lowest attends to text."""
    sr_blocks: tuple[int, ...] = (2, 4, 8, 8)
    """Residual blocks of their resolutions."""
    sr_batch_size: int = 2048
    """Pictures a step of theirs."""
    first_sr_steps: int = 2_500_000
    """Training steps of the first one."""
    last_sr_steps: int = 2_500_000
    """Training steps of the last one."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the base learns, and, but for steps and batch size, the others."""

    def __post_init__(self) -> None:
        at_least(self, 1, "multipliers", "sr_multipliers", "sr_blocks", "sr_channels", "text_width", "d_context")
        at_least(self, 1, "channels", "text_length", "res_blocks", "sr_batch_size", "first_sr_steps", "last_sr_steps")
        if len(self.sr_channels) != 2:
            raise UserError(f"sr_channels needs two numbers, one a stage, not {len(self.sr_channels)}")
        if len(self.attention) != len(self.multipliers):
            raise UserError("attention needs one value for each of the multipliers")
        if len(self.sr_blocks) != len(self.sr_multipliers):
            raise UserError("sr_blocks needs one number for each of the sr_multipliers")
        lowest_widths = [("sr_channels", c * self.sr_multipliers[-1]) for c in self.sr_channels]
        for name, width in [("channels", self.channels), ("d_context", self.d_context), *lowest_widths]:
            if self.n_heads < 1 or width % self.n_heads:
                raise UserError(f"{name} makes a width of {width}, no multiple of n_heads {self.n_heads}: change one")
        for name, channels in (("channels", self.channels), *(("sr_channels", c) for c in self.sr_channels)):
            if channels < 4 or channels % 4 or channels % groups_of(channels):
                raise UserError(f"{name} must be a multiple of 4, and of 32 from 128 on, not {channels}")
        if self.scale < 2:
            raise UserError(f"scale must be at least 2, not {self.scale}")
        lowest, sr_lowest = 2 ** (len(self.multipliers) - 1), 2 ** len(self.sr_multipliers)
        if self.image_size < 1 or self.image_size % lowest or self.image_size * self.scale % sr_lowest:
            raise UserError(
                f"image_size {self.image_size} must be a multiple of {lowest}, by which the base shrinks it, and the "
                f"first stage's {self.image_size * self.scale} one of {sr_lowest}: change image_size"
            )
        if not 0 < self.crop <= self.sizes[2] or self.crop % sr_lowest or self.crop % self.scale:
            raise UserError(
                f"crop {self.crop} must be a multiple of {sr_lowest} and of scale {self.scale}, at most {self.sizes[2]}"
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Sides of the pictures of the three stages."""
        return self.image_size, self.image_size * self.scale, self.image_size * self.scale**2


_LAPTOP = Config(
    text_width=576,
    text_length=16,
    image_size=16,
    scale=2,
    crop=32,
    n_heads=4,
    d_context=88,
    channels=32,
    multipliers=(1, 2, 3),
    res_blocks=1,
    attention=(False, True, True),
    sr_channels=(32, 32),
    sr_multipliers=(1, 1),
    sr_blocks=(1, 2),
    sr_batch_size=16,
    first_sr_steps=2_000,
    last_sr_steps=1_500,
    training=TrainingConfig(
        steps=1_250,
        batch_size=64,
        learning_rate=1e-2,
        warmup_steps=50,
        final_fraction=0.03,
        optimizer="muon",
        beta2=0.99,
        weight_decay=0.01,
        ema_decay=0.995,
        evaluate_every=500,
    ),
)

PRESETS = {
    "laptop": _LAPTOP,
    "shapes": replace(
        _LAPTOP, data="shapes", first_sr_steps=1_200, last_sr_steps=800, training=replace(_LAPTOP.training, steps=1_200)
    ),
    # 2 B, 600 M and 400 M parameters under T5-XXL's 4.6 B, which the library does not load
    "paper": Config(
        data="pictures",
        text_encoder="google/t5-v1_1-xxl",
        training=TrainingConfig(
            steps=2_500_000,
            batch_size=2048,
            learning_rate=1e-4,
            warmup_steps=10_000,
            ema_decay=0.9999,
            beta2=0.999,
        ),
    ),
}


def base(config: Config) -> UNet:
    """The base of a configuration, with fresh weights."""
    c = config
    return UNet(c.channels, c.multipliers, c.res_blocks, c.attention, c.n_heads, c.text_width, c.d_context)


def super_resolution(config: Config, stage: int) -> EfficientUNet:
    """A super-resolution stage of a configuration, 0 or 1, with fresh weights; the last has no self-attention."""
    c = config
    shape = c.sr_channels[stage], c.sr_multipliers, c.sr_blocks, c.n_heads, c.text_width, c.d_context
    return EfficientUNet(*shape, self_attention=stage == 0)


class Imagen(nn.Module):
    """From text embeddings to pictures: the base, and two stages that have learned before it."""

    text_mean: Tensor
    text_std: Tensor
    sharded_methods = ("loss",)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # of the frozen encoder's vectors, over the captions that the model learns from
        self.register_buffer("text_mean", torch.zeros(config.text_width))
        self.register_buffer("text_std", torch.ones(config.text_width))
        self.base = base(config)
        self.first_sr, self.last_sr = (super_resolution(config, stage).requires_grad_(False) for stage in (0, 1))

    @property
    def statistics(self) -> Statistics:
        """By which the vectors of prompts are standardised."""
        return Statistics(self.text_mean.cpu(), self.text_std.cpu())

    @property
    def stages(self) -> tuple[EfficientUNet, EfficientUNet]:
        """The super-resolution stages in the order they work."""
        return self.first_sr, self.last_sr

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The base's, see :meth:`UNet.loss`; the others learn by their own, each alone."""
        return self.base.loss(batch)


def parameters(module: nn.Module) -> int:
    """How many parameters there are."""
    return sum(prod(p.shape) for p in module.parameters())
