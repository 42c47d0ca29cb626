"""Training in three stages, each alone (section 4.1), weights in and out, and samples."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from canon.core.checks import check_batch, check_numbers
from canon.core.data.images import Augment, PictureBatches, Pictures, load_pictures, sheet
from canon.core.data.picture_files import example_caption
from canon.core.device import generator
from canon.core.errors import UserError
from canon.core.hub.pretrained import load_pretrained, save_description
from canon.core.hub.tensors import WEIGHTS_FILE, load_tensors
from canon.core.lab import Run
from canon.core.training import distributed
from canon.core.training.fit import TrainingConfig, fit
from canon.images.imagen import views
from canon.images.imagen.model import Config, Imagen, super_resolution
from canon.images.imagen.sampling import ThresholdName, check_sampling, generate
from canon.images.imagen.text import Captions, embed, encoded, load_encoder
from canon.images.imagen.unet import EfficientUNet

STAGES = ("first", "last")
"""The super-resolution stages."""


def from_pretrained(source: str | Path) -> tuple[Imagen, None]:
    """A trained model from a folder of ours; its text encoder is loaded when a prompt is given.

    Raises:
        UserError: there is nothing there, it is damaged, or it is another model.
    """
    model, _ = load_pretrained(source, "imagen", Config, Imagen, {}, _not_ours)
    return model, None


def _not_ours(settings: Mapping[str, object]) -> Config:
    raise UserError("Imagen's weights were never published: give a folder that canon train imagen wrote")


def build(config: Config) -> Imagen:
    """A model with fresh weights."""
    torch.manual_seed(config.training.seed)
    return Imagen(config)


@cache
def corpus(data: str, size: int, text_encoder: str, text_width: int) -> tuple[Pictures, Captions]:
    """Pictures at their largest, and their captions, encoded.

    Raises:
        UserError: there are no pictures, or the encoder's vectors have another width.
    """
    pictures = load_pictures(data, size)
    captions = encoded((text for ways in pictures.captions for text in ways), text_encoder)
    check_width(captions.vectors, text_width, text_encoder)
    return pictures, captions


def check_width(vectors: Tensor, wanted: int, text_encoder: str) -> None:
    """Refuse embeddings that do not fit the U-Nets.

    Raises:
        UserError: their width is another.
    """
    if vectors.shape[-1] != wanted:
        raise UserError(f"text_encoder {text_encoder} gives vectors of {vectors.shape[-1]}: set text_width to that")


def shrink(images: Float[Tensor, "batch 3 size size"], times: int) -> Float[Tensor, "batch 3 small small"]:
    """Smaller pictures, each pixel the mean of those it stands for."""
    return F.avg_pool2d(images, times)


class CaptionedBatches:
    """Endless pictures with embedded captions; for super-resolution also the small pictures and their noise.

    Everything random is a function of the position, however often training was resumed and however many share a batch.

    Args:
        batches: pictures at the size of the stage, and the numbers of their captions.
        captions: embedded.
        text_length: tokens of a caption that are kept.
        scale: of a super-resolution stage; 1: it is the base.
    """

    def __init__(self, batches: PictureBatches, captions: Captions, text_length: int, scale: int = 1):
        self.batches, self.captions, self.text_length, self.scale = batches, captions, text_length, scale

    def __next__(self) -> dict[str, Tensor]:
        draw = generator(self.batches.seed, self.batches.position)
        batch = next(self.batches)
        batch["text"] = self.captions.rows(batch.pop("tokens")[:, 0], self.text_length)
        if self.scale > 1:
            batch["low"] = shrink(batch["images"], self.scale)
            batch["low_noise"] = torch.randn(batch["low"].shape, generator=draw)
            batch["level"] = torch.rand(len(batch["low"]), generator=draw)  # aug_level ~ U(0, 1)
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position, as plain JSON values."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.batches.load_state_dict(state)


def changes(config: Config, stage: str) -> Augment:
    """What makes the largest pictures into those of a stage, ``base``, ``first`` or ``last``; the last gets crops."""

    def change(images: Float[Tensor, "batch 3 size size"], draw: torch.Generator) -> Float[Tensor, "batch 3 to to"]:
        if config.data != "shapes":  # their places are in their captions
            images = moved(images, draw)
        if stage == "last":
            return crops(images, config.crop, config.scale, draw)
        return shrink(images, config.scale ** (2 if stage == "base" else 1))

    return change


def moved(
    images: Float[Tensor, "batch 3 size size"], draw: torch.Generator, most: int = 3
) -> Float[Tensor, "batch 3 size size"]:
    """Each picture moved by up to ``most`` pixels; what comes in from outside is white."""
    return crops(F.pad(images, (most,) * 4, value=1.0), images.shape[-1], 1, draw)


def crops(
    images: Float[Tensor, "batch 3 size size"], side: int, step: int, draw: torch.Generator
) -> Float[Tensor, "batch 3 side side"]:
    """A square of each picture; its corner is a multiple of ``step``, where a pixel of the small picture begins."""
    places = (images.shape[-1] - side) // step + 1
    corners = step * torch.randint(places, (len(images), 2), generator=draw)
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners.tolist())])


def stage_batches(
    config: Config, pictures: Pictures, captions: Captions, recipe: TrainingConfig, stage: str
) -> CaptionedBatches:
    """What one stage learns from, with a tenth of the captions dropped.

    Raises:
        UserError: there are fewer pictures than a batch holds.
    """
    check_batch(len(pictures.images), recipe.batch_size, "--batch-size" if stage == "base" else "--sr-batch-size")
    number, most = captions.index(), max(map(len, pictures.captions))
    numbers = torch.tensor([[number[ways[i % len(ways)]] for i in range(most)] for ways in pictures.captions])
    side = config.crop if stage == "last" else config.sizes[0 if stage == "base" else 1]
    stream = PictureBatches(
        pictures.images,
        numbers[:, :, None],
        recipe.batch_size,
        recipe.seed,
        changes(config, stage),
        noise=(3, side, side),
        empty=torch.tensor([-1]),
    )
    return CaptionedBatches(stream, captions, config.text_length, 1 if stage == "base" else config.scale)


def _corpus(config: Config) -> tuple[Pictures, Captions]:
    return corpus(config.data, config.sizes[2], config.text_encoder, config.text_width)


def batches(config: Config) -> CaptionedBatches:
    """Pictures and captions for the base."""
    return stage_batches(config, *_corpus(config), config.training, "base")


def sr_recipe(config: Config, stage: str) -> TrainingConfig:
    """How a super-resolution stage learns."""
    steps = config.first_sr_steps if stage == "first" else config.last_sr_steps
    return replace(
        config.training,
        steps=steps,
        batch_size=config.sr_batch_size,
        accumulation=min(config.training.accumulation, config.sr_batch_size),
        warmup_steps=min(config.training.warmup_steps, steps // 10),
    )


def train_super_resolution(
    config: Config, pictures: Pictures, captions: Captions, run: Run, stage: str
) -> dict[str, Tensor]:
    """Train one super-resolution stage, in a stage of the run; goes on where it was stopped. Returns its weights."""
    recipe = sr_recipe(config, stage)
    torch.manual_seed(recipe.seed)
    network = super_resolution(config, STAGES.index(stage))
    fixed = next(stage_batches(config, pictures, captions, replace(recipe, seed=recipe.seed + 1), stage))

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, EfficientUNet)
        return {"fixed_loss": float(model.loss(distributed.move(fixed, model.conv_in.weight.device))[0])}

    place = run.stage(f"{stage}_super_resolution", recipe)
    fit(network, stage_batches(config, pictures, captions, recipe, stage), place, recipe, evaluate=evaluate)
    distributed.of_leader(None)  # which has written the weights when it says this
    return load_tensors(place.path / "model" / WEIGHTS_FILE)


def train(config: Config, run: Run) -> Imagen:
    """Train the super-resolution stages, then the base; goes on where the run was stopped."""
    pictures, captions = _corpus(config)
    stream = batches(config)  # now, so that what is wrong with it is said before the other stages take their time
    if run.leader:
        save_description(config, run.path / "model", system="imagen")
    stages = [train_super_resolution(config, pictures, captions, run, stage) for stage in STAGES]
    model = build(config)
    model.text_mean.copy_(captions.statistics.mean)
    model.text_std.copy_(captions.statistics.std)
    for network, weights in zip(model.stages, stages):
        network.load_state_dict(weights)
        network.eval()
    other = replace(config.training, seed=config.training.seed + 1)
    fixed = next(stage_batches(config, pictures, captions, other, "base"))

    def evaluate(_: nn.Module) -> dict[str, float]:
        return {"fixed_loss": float(model.loss(distributed.move(fixed, model.base.conv_in.weight.device))[0])}

    model = fit(model, stream, run, config.training, evaluate=evaluate)
    if run.leader:
        shown = model
        if distributed.world()[1] > 1:  # this process may hold a shard only
            shown = build(config).eval()
            shown.load_state_dict(load_tensors(run.path / "model" / WEIGHTS_FILE))
        views.show(shown, captions, pictures, run)
    return model


def example(config: Config) -> str:
    """A prompt that shows what a model with this configuration has learned."""
    return example_caption(config.data)


def sample(
    model: Imagen,
    run: Run,
    prompt: str = "red apple",
    *,
    count: int = 4,
    steps: int = 32,
    guidance: float = 2.0,
    threshold: ThresholdName = "static",
    augmentation: float = 0.1,
    seed: int = 0,
) -> Image.Image:
    """Pictures of ``prompt``, each as the three stages drew it; kept among the run's samples.

    Args:
        model: a trained model.
        run: the run that trained it, which keeps the picture.
        prompt: what to draw; nothing in particular if it is empty.
        count: how many, side by side.
        steps: of the base's sampler.
        guidance: weight of the prompt; 1 is none, more obeys better and varies less.
        threshold: dynamic, static or none: how a strongly guided picture is kept within its range. Dynamic is the
            paper's, for photographs; a white ground, which is the end of the range, it turns grey.
        augmentation: noise put on each small picture before it is made larger, in [0, 1]: what it hides is drawn anew.
        seed: another seed, other pictures.
    """
    check_numbers(least=1, count=count)
    c = model.config
    check_sampling(steps, guidance, augmentation, seed)
    text = embed([prompt] * count, load_encoder(c.text_encoder), c.text_length, model.statistics)
    pictures = generate(
        model, text, steps=steps, guidance=guidance, threshold=threshold, augmentation=augmentation, seed=seed
    )
    page = sheet(torch.cat(views.enlarged(pictures)), columns=count, scale=max(1, 192 // c.sizes[2]))
    run.image(prompt or "no prompt", page, keep=True)
    return page
