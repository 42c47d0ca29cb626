"""Configurations (appendices A.2 and B.2)."""

from dataclasses import dataclass, field, replace

from canon.core.checks import at_least
from canon.core.errors import UserError
from canon.core.training.fit import TrainingConfig


@dataclass(frozen=True)
class Config:
    """Shape and training of both stages; the defaults are the paper's."""

    data: str = "things"
    """What it learns from: emoji, things, shapes, or a folder of pictures, each with its captions in a .txt beside."""
    image_size: int = 256
    """Side of the pictures in pixels."""
    codebook_size: int = 8192
    """Codes of the dVAE, K."""
    dvae_width: int = 256
    """Channels of the dVAE at full resolution; each lower resolution has twice as many."""
    dvae_groups: int = 4
    """Resolutions of the dVAE; a code stands for 2^(groups - 1) pixels on a side."""
    dvae_blocks: int = 2
    """Residual blocks of each resolution."""
    kl_weight: float = 6.6
    """beta, the weight of the KL divergence of the codes from uniform ones."""
    kl_steps: int = 5_000
    """Steps over which it rises from 0."""
    temperature_steps: int = 150_000
    """Steps over which tau, the temperature of the relaxation, falls from 1 to 1/16."""
    pixel_noise: float = 0.0
    """Stage 1 adds uniform noise of up to so much to pixels; drawings need it, photographs have their own."""
    first_steps: int = 3_000_000
    """Training steps of the dVAE."""
    first_batch_size: int = 512
    """Pictures a step of the dVAE."""
    first_learning_rate: float = 1e-4
    """Peak learning rate of the dVAE, which falls to an eightieth of it."""
    vocab_size: int = 16_384
    """Tokens of the captions' byte-pair encoding."""
    text_length: int = 256
    """Positions for the caption, the start of text included."""
    d_model: int = 3968
    """Width of the Transformer."""
    n_layers: int = 64
    """Blocks of the Transformer."""
    n_heads: int = 62
    """Attention heads a block."""
    kernel_size: int = 11
    """Side of the kernel of the convolutional attention."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the Transformer learns."""

    def __post_init__(self) -> None:
        at_least(self, 1, "codebook_size", "dvae_groups", "dvae_blocks", "first_steps", "first_batch_size")
        at_least(self, 1, "d_model", "n_layers", "kernel_size")
        at_least(self, 2, "text_length")  # the start and one token
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise UserError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}: change one of them")
        if self.dvae_width < 4 or self.dvae_width % 4:
            raise UserError(f"dvae_width must be a multiple of 4, not {self.dvae_width}")
        if self.image_size < 1 or self.image_size % 2 ** (self.dvae_groups - 1):
            code = 2 ** (self.dvae_groups - 1)
            raise UserError(f"image_size {self.image_size} is not a multiple of {code}, the pixels on a code's side")
        if not 0 <= self.pixel_noise <= 0.2:
            raise UserError(f"pixel_noise must be between 0 and 0.2, not {self.pixel_noise}")
        if self.kernel_size % 2 == 0:
            raise UserError(f"kernel_size must be odd, not {self.kernel_size}")

    @property
    def side(self) -> int:
        """Side of the grid of codes."""
        return self.image_size // 2 ** (self.dvae_groups - 1)

    @property
    def context_length(self) -> int:
        """Tokens that the Transformer reads: the caption, the start of image, and all codes but the last."""
        return self.text_length + self.side**2


_LAPTOP = Config(
    data="shapes",
    image_size=32,
    codebook_size=128,
    dvae_width=24,
    dvae_groups=3,
    dvae_blocks=1,
    kl_weight=1.65,
    kl_steps=30,
    temperature_steps=2_400,
    pixel_noise=0.2,
    first_steps=3_000,
    first_batch_size=16,
    first_learning_rate=5e-3,
    vocab_size=640,
    text_length=20,
    d_model=160,
    n_layers=6,
    n_heads=4,
    kernel_size=3,
    training=TrainingConfig(
        steps=900,
        batch_size=32,
        learning_rate=1e-2,
        warmup_steps=50,
        final_fraction=0.05,
        optimizer="muon",
        beta2=0.96,
        weight_decay=0.045,
        ema_decay=0.99,
        evaluate_every=250,
    ),
)

PRESETS = {
    "laptop": _LAPTOP,
    "emoji": replace(_LAPTOP, data="things", vocab_size=1536, text_length=24),
    # 12 billion parameters; stage 1 is the released one
    "paper": Config(
        training=TrainingConfig(
            steps=430_000,
            batch_size=1024,
            learning_rate=4.5e-4,
            warmup_steps=5_000,
            final_fraction=1 / 32,  # "halved each time the training loss appears to plateau", five times
            beta2=0.96,
            weight_decay=0.045,
            clip_norm=4.0,
            ema_decay=0.9996,  # 0.99 every 25 updates
        )
    ),
}
