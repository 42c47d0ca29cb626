"""Training on captioned pictures (section 2.5)."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from canon.core.checks import check_batch
from canon.core.data.images import Pictures, Style, emoji, load_pictures, to_float
from canon.core.data.tokenizers import BPETokenizer
from canon.core.errors import UserError
from canon.core.hub.pretrained import save_description
from canon.core.lab import Run
from canon.core.training.fit import fit
from canon.images.clip.model import CLIP, Config
from canon.images.clip.tokenizer import published_tokenizer, tokenize, train_tokenizer

Augment = Callable[[Float[Tensor, "batch 3 height width"], torch.Generator], Float[Tensor, "batch 3 size size"]]
STYLES: tuple[Style, ...] = ("twemoji", "fluent")
"""Drawings of the same emoji by other hands; they are never learned from."""


def crop(size: int) -> Augment:
    """The paper's only augmentation: "a random square crop from resized images"."""

    def augment(images: Tensor, draw: torch.Generator) -> Tensor:
        spare = images.shape[2] - size + 1
        corners = torch.randint(spare, (len(images), 2), generator=draw).tolist()
        return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(images, corners)])

    return augment


def jitter(images: Float[Tensor, "batch 3 size size"], draw: torch.Generator) -> Float[Tensor, "batch 3 size size"]:
    """Move, resize and recolour drawings on white a little; they are not mirrored, since arrows have names."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=draw) - 1

    batch = len(images)
    zoom = 1 + 0.15 * uniform(batch)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom, zoom * (1 + 0.05 * uniform(batch))
    theta[:, :, 2] = 0.16 * uniform(batch, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = 1 + F.grid_sample(images - 1, grid, align_corners=False)  # what comes in from outside is white
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (1 + 0.5 * uniform(batch, 1, 1, 1))  # more or less colour
    return (1 + (images - 1) * (1 + 0.3 * uniform(batch, 3, 1, 1))).clamp(-1, 1)  # more or less ink of each kind


class CaptionedBatches:
    """Endless batches of pictures with one of their captions each, no two of which are alike.

    Two pictures of the same words in one batch would be each other's false negatives, so pictures that share a caption
    are taken for one: an epoch deals all of these out in random order, and draws one picture of each. Batch number n
    is a function of (seed, n) alone, so the whole state is that number.

    Args:
        images: the pictures.
        tokens: captions of each as token ids; one of the ``ways`` is drawn at every use.
        batch_size: pairs of a batch.
        seed: of the order, of the choice, and of the augmentation.
        augment: changes pictures in [-1, 1] at random, drawing from the generator it is given.

    Raises:
        UserError: there are fewer different captions than a batch holds.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "n 3 height width"],
        tokens: Int[Tensor, "n ways length"],
        batch_size: int,
        seed: int = 0,
        augment: Augment | None = None,
    ):
        self.images, self.tokens, self.batch_size = images, tokens, batch_size
        self.seed, self.augment, self.position = seed, augment, 0
        numbers = np.unique(_sharing(tokens).numpy(), return_inverse=True)[1]
        self.groups = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
        check_batch(len(self.groups), batch_size, what="pictures with captions of their own")

    def __iter__(self) -> "CaptionedBatches":
        return self

    def __next__(self) -> dict[str, Tensor]:
        epoch, place = divmod(self.position, len(self.groups) // self.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.position)
        self.position += 1
        which = torch.randint(2**31, (self.batch_size,), generator=draw).tolist()
        rows = torch.tensor([int(group[n % len(group)]) for group, n in zip((self.groups[i] for i in chosen), which)])
        tokens = self.tokens[rows, torch.randint(self.tokens.shape[1], rows.shape, generator=draw)]
        images = to_float(self.images[rows])
        images = self.augment(images, draw) if self.augment else images
        # what stands after the last caption's end is seen by no end: the text tower is causal
        return {"images": images, "tokens": tokens[:, : int(tokens.argmax(dim=1).max()) + 1]}

    def state_dict(self) -> dict[str, int]:
        """The number of batches dealt out."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict()` was taken."""
        self.position = state["position"]


def _sharing(tokens: Int[Tensor, "n ways length"]) -> Int[Tensor, " n"]:
    """A number for each picture, the same for pictures that share a caption, directly or through others."""
    n, ways, _ = tokens.shape
    captions = tokens.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view(n, ways)
    numbers = torch.arange(n)
    while True:
        least = torch.full((int(captions.max()) + 1,), n)
        least = least.scatter_reduce(0, captions.flatten(), numbers.repeat_interleave(ways), "amin")
        merged = least[captions].amin(dim=1)
        if torch.equal(merged, numbers):
            return numbers
        numbers = merged


def build(config: Config) -> CLIP:
    """A CLIP with fresh weights."""
    torch.manual_seed(config.training.seed)
    return CLIP(config)


def batches(config: Config) -> CaptionedBatches:
    """Training batches of the configured pictures."""
    return _corpus(config)[0]


def _corpus(config: Config) -> tuple[CaptionedBatches, BPETokenizer]:
    cropped = config.augmentation == "crop"
    pictures = load_pictures(config.data, config.image_size * 8 // 7 if cropped else config.image_size)
    tokenizer = tokenizer_of(config, pictures)
    # what says less of a shape is true of too many pictures to tell them apart
    captions = [some[:1] if config.data == "shapes" else some for some in pictures.captions]
    ways = max(map(len, captions))
    flat = [some[way % len(some)] for some in captions for way in range(ways)]
    tokens = tokenize(tokenizer, flat, config.context_length).view(len(captions), ways, -1)
    augment = crop(config.image_size) if cropped else jitter
    training = config.training
    return CaptionedBatches(pictures.images, tokens, training.batch_size, training.seed, augment), tokenizer


def tokenizer_of(config: Config, pictures: Pictures) -> BPETokenizer:
    """The configured tokenizer.

    Raises:
        UserError: it has more tokens than the model's ``vocab_size``.
    """
    if config.tokenizer == "bpe":
        return train_tokenizer([caption for captions in pictures.captions for caption in captions], config.vocab_size)
    tokenizer = published_tokenizer()
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"the published tokenizer needs {tokenizer.vocab_size} tokens: raise --vocab-size to that")
    return tokenizer


def train(config: Config, run: Run) -> CLIP:
    """Train on the configured pictures; goes on where the run was stopped. The loss is in nats a picture.

    On emoji it is scored on how many drawings of other styles it names, among all names that both styles have.
    """
    stream, tokenizer = _corpus(config)
    model = build(config)
    if run.leader:
        save_description(config, run.path / "model", system="clip", tokenizer=tokenizer)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {f"{style}_top1": style_accuracy(model, tokenizer, config, style) for style in STYLES}

    return fit(model, stream, run, config.training, evaluate=evaluate if config.data == "emoji" else None)


def known_emoji(style: Style, size: int) -> tuple[UInt8[Tensor, "n 3 size size"], list[str], list[str]]:
    """Drawings of a style whose emoji Noto has too, which is what the training saw: pictures, names and groups."""
    learned, drawn = set(emoji(size).characters), emoji(size, style)
    kept = [index for index, character in enumerate(drawn.characters) if character in learned]
    names, groups = ([values[index] for index in kept] for values in (drawn.labels["en"], drawn.groups))
    return drawn.images[kept], names, groups


def style_accuracy(model: nn.Module, tokenizer: BPETokenizer, config: Config, style: Style) -> float:
    """Share of a style's drawings that are closest to their own name among the names of all."""
    images, names, _ = known_emoji(style, config.image_size)
    device = next(model.parameters()).device
    tokens = tokenize(tokenizer, [f"a picture of {name}" for name in names], config.context_length)
    pairs = zip(to_float(images).split(256), tokens.split(256))
    # through the model's own forward pass, which gathers its weights where processes share them
    found = [model(picture.to(device), text.to(device))[:2] for picture, text in pairs]
    image, text = (torch.cat(side) for side in zip(*found))
    return float(((image @ text.t()).argmax(dim=1).cpu() == torch.arange(len(names))).float().mean())
