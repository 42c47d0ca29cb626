"""Configurations (tables 1, 18 to 20), the two towers together, and the contrastive loss (figure 3)."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from canon.core.checks import at_least
from canon.core.errors import UserError
from canon.core.training.fit import TrainingConfig
from canon.images.clip.text import TextTransformer, pool
from canon.images.clip.vision import ModifiedResNet, VisionTransformer

# Mean and standard deviation of the channels of the paper's pictures, for pixels in [0, 1].
CHANNEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
CHANNEL_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class Config:
    """Shape and training of a CLIP; d_model, n_layers and n_heads are the text tower's."""

    d_embedding: int = 512
    """Width of the space that both towers map into."""
    image_size: int = 224
    """Side of the pictures in pixels."""
    image_layers: tuple[int, ...] = (12,)
    """Blocks of the image tower: one number makes a Vision Transformer, four make a ResNet of so many a stage."""
    image_width: int = 768
    """Width of the Vision Transformer, or channels in the middle of the ResNet's first stage."""
    image_heads: int = 12
    """Attention heads of a block of the Vision Transformer, or of the ResNet's attention pool."""
    patch_size: int = 32
    """Side of a patch of the Vision Transformer."""
    vocab_size: int = 49_408
    """Number of tokens."""
    context_length: int = 77
    """Most tokens of a caption, its start and end included."""
    d_model: int = 512
    """Width of the text tower."""
    n_layers: int = 12
    """Blocks of the text tower."""
    n_heads: int = 8
    """Attention heads a block of the text tower."""
    data: str = "emoji"
    """What it learns from: emoji, things, shapes, or a folder of pictures, each with its captions in a .txt beside."""
    tokenizer: Literal["clip", "bpe"] = "clip"
    """The published vocabulary, or one of vocab_size tokens learned from the captions."""
    augmentation: Literal["crop", "jitter"] = "crop"
    """A random square crop, as in the paper, or changes of place, size and colour that suit drawings on white."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it learns; the batch is the contrast, so accumulation must be 1."""

    def __post_init__(self) -> None:
        at_least(self, 1, "d_embedding", "image_size", "image_layers", "image_width")
        at_least(self, 1, "vocab_size", "d_model", "n_layers")
        at_least(self, 2, "context_length")  # a caption has a start and an end
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise UserError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}: change one of them")
        if len(self.image_layers) not in (1, 4):
            raise UserError(f"image_layers has {len(self.image_layers)} numbers: give 1 (Transformer) or 4 (ResNet)")
        width = self.image_width * (1 if len(self.image_layers) == 1 else 32)
        if self.image_heads < 1 or width % self.image_heads:
            raise UserError(f"the image tower's width {width} is not a multiple of image_heads {self.image_heads}")
        patch = self.patch_size if len(self.image_layers) == 1 else 32
        if patch < 1 or self.image_size % patch:
            raise UserError(f"image_size {self.image_size} is not a multiple of {patch}, the side of a patch")
        if self.training.accumulation > 1:
            raise UserError("CLIP contrasts all of a batch, so accumulation must be 1: lower batch_size instead")


# Table 18 but for the learning rate: 32 epochs of 400 million pairs are 390,625 steps.
_RECIPE = TrainingConfig(
    steps=390_625,
    batch_size=32_768,
    learning_rate=5e-4,
    warmup_steps=2_000,
    final_fraction=0.0,
    beta2=0.999,
    weight_decay=0.2,
    clip_norm=0.0,
)


def _resnet(
    layers: tuple[int, ...], width: int, image_size: int, d_embedding: int, d_model: int, rate: float
) -> Config:
    return Config(
        d_embedding=d_embedding,
        image_size=image_size,
        image_layers=layers,
        image_width=width,
        image_heads=width * 32 // 64,
        d_model=d_model,
        n_heads=d_model // 64,
        training=replace(_RECIPE, learning_rate=rate),
    )


def _vit(patch_size: int, n_layers: int, width: int, d_embedding: int, d_model: int, rate: float) -> Config:
    return Config(
        d_embedding=d_embedding,
        image_layers=(n_layers,),
        image_width=width,
        image_heads=width // 64,
        patch_size=patch_size,
        d_model=d_model,
        n_heads=d_model // 64,
        training=replace(_RECIPE, learning_rate=rate, beta2=0.98, eps=1e-6),
    )


_VIT_L_14 = _vit(14, 24, 1024, 768, 768, 4e-4)

PRESETS = {
    "laptop": Config(
        d_embedding=128,
        image_size=32,
        image_layers=(4,),
        image_width=128,
        image_heads=2,
        patch_size=8,
        vocab_size=2048,
        context_length=32,
        d_model=128,
        n_layers=2,
        n_heads=2,
        data="emoji",
        tokenizer="bpe",
        augmentation="jitter",
        training=TrainingConfig(
            steps=2_000,
            batch_size=128,
            learning_rate=0.01,
            schedule="linear",
            warmup_steps=60,
            final_fraction=0.0,
            optimizer="muon",
            beta2=0.98,
            eps=1e-6,
            weight_decay=0.1,
            evaluate_every=500,
        ),
    ),
    "rn50": _resnet((3, 4, 6, 3), 64, 224, 1024, 512, 5e-4),
    "rn101": _resnet((3, 4, 23, 3), 64, 224, 512, 512, 5e-4),
    "rn50x4": _resnet((4, 6, 10, 6), 80, 288, 640, 640, 5e-4),
    "rn50x16": _resnet((6, 8, 18, 8), 96, 384, 768, 768, 4e-4),
    "rn50x64": _resnet((3, 15, 36, 10), 128, 448, 1024, 1024, 3.6e-4),
    "vit-b-32": _vit(32, 12, 768, 512, 512, 5e-4),
    "vit-b-16": _vit(16, 12, 768, 512, 512, 5e-4),
    "vit-l-14": _VIT_L_14,
    # one more epoch at a higher resolution, which goes on from vit-l-14
    "vit-l-14-336": replace(
        _VIT_L_14, image_size=336, training=replace(_VIT_L_14.training, steps=12_207, learning_rate=2e-5)
    ),
}


class CLIP(nn.Module):
    """Pictures and captions in one space, where those that belong together are close."""

    channel_mean: Tensor
    channel_std: Tensor

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        resnet = len(c.image_layers) == 4
        if resnet:
            self.image = ModifiedResNet(c.image_size, c.image_width, c.image_layers, c.image_heads)
        else:
            self.image = VisionTransformer(c.image_size, c.patch_size, c.image_width, c.image_layers[0], c.image_heads)
        self.text = TextTransformer(c.vocab_size, c.context_length, c.d_model, c.n_layers, c.n_heads)
        # "we use only a linear projection"; that of the ResNets ends their attention pool, which has biases throughout
        self.image_projection = nn.Linear(self.image.d_features, c.d_embedding, bias=resnet)
        self.text_projection = nn.Linear(c.d_model, c.d_embedding, bias=False)
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        if resnet:
            nn.init.zeros_(self.image_projection.bias)
        # t: "initialized to the equivalent of 0.07" (section 2.5)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        for name, value in (("channel_mean", CHANNEL_MEAN), ("channel_std", CHANNEL_STD)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)

    def image_features(self, images: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch d_features"]:
        """I_f: what the image tower says of pictures in [-1, 1], before the projection; for linear probes."""
        return self.image(((images + 1) / 2 - self.channel_mean) / self.channel_std)

    def encode_image(self, images: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch d_embedding"]:
        """I_e: embeddings of length 1 of pictures in [-1, 1]."""
        # I_e = l2_normalize(np.dot(I_f, W_i), axis=1)
        return F.normalize(self.image_projection(self.image_features(images)).float(), dim=1)

    def encode_text(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch d_embedding"]:
        """T_e: embeddings of length 1 of captions, as :func:`tokenize` makes them."""
        # T_e = l2_normalize(np.dot(T_f, W_t), axis=1)
        return F.normalize(self.text_projection(pool(self.text(tokens), tokens)).float(), dim=1)

    def scale(self) -> Float[Tensor, "1"]:
        """exp(t), by which cosines are multiplied to give logits."""
        # "clipped to prevent scaling the logits by more than 100" (section 2.5)
        return self.logit_scale.clamp(max=math.log(LARGEST_SCALE)).exp()

    def forward(
        self, images: Float[Tensor, "images 3 size size"], tokens: Int[Tensor, "texts time"]
    ) -> tuple[Float[Tensor, "images d_embedding"], Float[Tensor, "texts d_embedding"], Float[Tensor, "1"]]:
        """Embeddings of pictures and of captions, and exp(t)."""
        return self.encode_image(images), self.encode_text(tokens), self.scale()

    def loss(self, batch: dict[str, Shaped[Tensor, "batch ..."]]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Symmetric cross-entropy over which caption of the batch belongs to which picture, in nats.

        Args:
            batch: ``images`` in [-1, 1] and ``tokens``, row by row in pairs; no two captions alike. Where several
                processes train, each has its own rows of the batch and they are contrasted with those of all.
        """
        with torch.no_grad():  # where the last step left t above the bound, its gradient would vanish for ever
            self.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        image, text, scale = self(batch["images"], batch["tokens"])
        images, first = of_all_processes(image)
        texts, _ = of_all_processes(text)
        labels = first + torch.arange(len(image), device=image.device)
        with torch.autocast(image.device.type, enabled=False):  # in bfloat16 a logit of 50 is rounded by 0.1
            # logits = np.dot(I_e, T_e.T) * np.exp(t), by rows and by columns
            by_image, by_text = scale * image @ texts.t(), scale * text @ images.t()
            # loss = (loss_i + loss_t) / 2
            loss = (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2
        right = (by_image.argmax(dim=1) == labels).float().mean()
        return loss, {"batch_accuracy": right, "logit_scale": scale.detach()[0]}


class _Sum(torch.autograd.Function):
    """Sum over processes of what each holds; the gradient of it is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return _Sum.apply(gradients[0])


def of_all_processes(x: Float[Tensor, "rows d"]) -> tuple[Float[Tensor, "all d"], int]:
    """The rows of all processes, with their gradient, and where this process's own begin among them."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if processes == 1:
        return x, 0
    counts = torch.zeros(processes, dtype=torch.long, device=x.device)
    counts[rank] = len(x)
    dist.all_reduce(counts)
    before, after = int(counts[:rank].sum()), int(counts[rank + 1 :].sum())
    return _Sum.apply(F.pad(x, (0, 0, before, after))), before
