"""Training in two stages (section 3), weights in and out, and samples."""

from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from canon.core.checks import check_numbers
from canon.core.data.images import PictureBatches, Pictures, jitter, load_pictures, open_image, sheet, to_float
from canon.core.data.picture_files import example_caption
from canon.core.data.tokenizers import BPETokenizer
from canon.core.device import generator
from canon.core.errors import UserError
from canon.core.generation.diffusion_samplers import last
from canon.core.hub.pretrained import save_description
from canon.core.hub.tensors import WEIGHTS_FILE, load_tensors
from canon.core.lab import Run
from canon.core.training import distributed
from canon.core.training.fit import fit
from canon.images.clip.tokenizer import load_clip_tokenizer, tokenize, train_tokenizer
from canon.images.latent_diffusion import views
from canon.images.latent_diffusion.first_stage import FirstStage
from canon.images.latent_diffusion.model import Config, LatentDiffusion, autoencoder
from canon.images.latent_diffusion.sampling import SamplerName, generate, paste

FIRST_BATCH_SIZE = 16
"""Pictures a step of the autoencoder (12 in the released configuration); fewer where there are not so many."""


def build(config: Config) -> LatentDiffusion:
    """A model with fresh weights."""
    torch.manual_seed(config.training.seed)
    return LatentDiffusion(config)


@cache
def corpus(data: str, image_size: int, vocab_size: int) -> tuple[Pictures, BPETokenizer]:
    """The pictures, and a tokenizer learned from their captions.

    Raises:
        UserError: there are no pictures, or no captions.
    """
    pictures = load_pictures(data, image_size)
    return pictures, train_tokenizer((text for ways in pictures.captions for text in ways), vocab_size)


def batches(config: Config) -> "PictureBatches | Inpainting":
    """Pictures with captions, noise and times; for inpainting also masks."""
    pictures, tokenizer = corpus(config.data, config.image_size, config.vocab_size)
    c, ways = config, max(map(len, pictures.captions))
    texts = [captions[i % len(captions)] for captions in pictures.captions for i in range(ways)]
    tokens = tokenize(tokenizer, [*texts, ""], c.context_length, pad=tokenizer.eot or 0)
    found = PictureBatches(
        pictures.images,
        tokens[:-1].view(len(pictures.captions), ways, -1),
        c.training.batch_size,
        c.training.seed,
        None if config.data == "shapes" else jitter,  # the places of shapes are in their captions
        noise=(2, c.latent_channels, c.latent_size, c.latent_size),
        empty=tokens[-1],
    )
    return Inpainting(found) if c.condition_channels else found


class Inpainting:
    """Batches with masks: a rectangle of each picture is to be painted, in an eighth of them all of it."""

    def __init__(self, batches: PictureBatches):
        self.batches = batches

    def __next__(self) -> dict[str, Tensor]:
        draw = generator(self.batches.seed, self.batches.position)
        batch = next(self.batches)
        rows, size = len(batch["images"]), batch["images"].shape[-1]
        corners = torch.rand(2, rows, 2, 1, generator=draw) * (size + 1)
        low, high = corners.amin(0), corners.amax(0)
        place = torch.arange(size)
        inside = (place >= low.floor()) & (place < high)  # (rows, axis, size)
        everything = torch.rand(rows, 1, 1, generator=draw) < 1 / 8
        mask = (inside[:, 0, :, None] & inside[:, 1, None, :]) | everything
        return batch | {"mask": mask[:, None].float()}

    def state_dict(self) -> dict[str, int]:
        """The position, as plain JSON values."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.batches.load_state_dict(state)


class _Counted:
    """Batches whose rows know the step they are for, and their number."""

    def __init__(self, batches: PictureBatches):
        self.batches = batches

    def __next__(self) -> dict[str, Tensor]:
        step = self.batches.position
        batch = next(self.batches)
        rows = len(batch["images"])
        return batch | {"step": torch.full((rows,), step), "row": torch.arange(rows)}

    def state_dict(self) -> dict[str, int]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches.load_state_dict(state)


def train_first_stage(config: Config, run: Run) -> dict[str, Tensor]:
    """Train the autoencoder, in a stage of the run; goes on where it was stopped. Returns its weights."""
    images = corpus(config.data, config.image_size, config.vocab_size)[0].images
    if config.data == "shapes":  # alone they teach colours slowly, being small on grey
        emoji = load_pictures("things", config.image_size).images
        images = torch.cat([emoji, emoji, emoji, images[: 3 * len(emoji)]])
    muon = config.training.optimizer == "muon"
    recipe = replace(
        config.training,
        steps=config.first_steps,
        batch_size=min(FIRST_BATCH_SIZE, len(images)),
        learning_rate=1e-2 if muon else 3e-3 if config.small else 4.5e-6 * FIRST_BATCH_SIZE,  # released
        schedule="cosine",
        warmup_steps=min(50, config.first_steps // 10),
        final_fraction=0.03,
        optimizer="muon" if muon else "adam",
        beta1=0.9 if config.small else 0.5,
        beta2=0.99 if config.small else 0.9,
        clip_norm=0.0,
        ema_decay=0.0,
        accumulation=1,
    )
    torch.manual_seed(config.training.seed)
    steps = config.first_steps
    if config.small:
        few = {"perceptual_from": steps // 2, "perceptual_every": 4, "adversary_from": steps - steps // 5}
        model = FirstStage(autoencoder(config), width=2 * config.first_channels, **few)
    elif config.codebook:
        model = FirstStage(autoencoder(config), width=64, adversary_from=0, adversary_weight=0.75)
    else:
        model = FirstStage(autoencoder(config), width=64)
    stream = PictureBatches(
        images, torch.zeros(len(images), 1, 1).long(), recipe.batch_size, recipe.seed, jitter,
        noise=(config.latent_channels, config.latent_size, config.latent_size),
    )  # fmt: skip
    shown = to_float(images[:: max(1, len(images) // 128)][:128])

    def evaluate(stage: nn.Module) -> dict[str, float]:
        assert isinstance(stage, FirstStage)
        device, rows = next(stage.parameters()).device, len(shown)
        noise = torch.zeros(rows, config.latent_channels, config.latent_size, config.latent_size, device=device)
        numbers = torch.arange(rows, device=device)
        batch = {"images": shown.to(device), "noise": noise, "step": torch.zeros_like(numbers), "row": numbers}
        return {"fixed_l1": float(stage.loss(batch)[1]["l1"])}

    stage = run.stage("autoencoder", recipe)
    fit(model, _Counted(stream), stage, recipe, evaluate=evaluate)
    distributed.of_leader(None)  # which has written the weights when it says this
    weights = load_tensors(stage.path / "model" / WEIGHTS_FILE)
    return {key.removeprefix("autoencoder."): w for key, w in weights.items() if key.startswith("autoencoder.")}


def train(config: Config, run: Run) -> LatentDiffusion:
    """Train the autoencoder, then the U-Net with the text encoder; goes on where the run was stopped."""
    pictures, tokenizer = corpus(config.data, config.image_size, config.vocab_size)
    batches(config)  # now rather than after the first stage, if something is wrong with them
    if run.leader:
        save_description(config, run.path / "model", system="latent_diffusion", tokenizer=tokenizer)
    first = train_first_stage(config, run)
    model = build(config)
    model.autoencoder.load_state_dict(first)
    model.latent_scale.copy_(1 / model.encode(next(batches(config))["images"]).std())
    model.autoencoder.eval()
    fixed = next(batches(replace(config, training=replace(config.training, seed=config.training.seed + 1))))

    def evaluate(_: nn.Module) -> dict[str, float]:
        device = model.latent_scale.device
        return {"fixed_loss": float(model.loss({key: value.to(device) for key, value in fixed.items()})[0])}

    model = fit(model, batches(config), run, config.training, evaluate=evaluate)
    if run.leader:
        shown = model
        if distributed.world()[1] > 1:  # this process may hold a shard only
            shown = build(config).eval()
            shown.load_state_dict(load_tensors(run.path / "model" / WEIGHTS_FILE))
        views.show(shown, tokenizer, pictures, run)
    return model


def open_mask(path: str, image: str, size: int) -> Float[Tensor, "1 size size"]:
    """1 where a picture is to be painted: where the file is more white than black. What is transparent is black.

    Raises:
        UserError: there is nothing white, or the mask and the picture are of different shapes.
    """
    (height, width), (rows, columns) = (open_image(file).shape[1:] for file in (path, image))
    if abs(width * rows - height * columns) > 0.02 * width * rows:
        raise UserError(
            f"the mask is {width} x {height} pixels and the picture {columns} x {rows}, so they do not lie upon each "
            "other: save the mask with the picture's size"
        )
    mask = (open_image(path, size, background="black").mean(0, keepdim=True) > 0).float()
    if not mask.any():
        raise UserError(f"nothing of the mask {path} is white, and white is what is painted: paint some of it white")
    return mask


def example(config: Config) -> str:
    """A prompt that shows what a model with this configuration has learned."""
    return example_caption(config.data)


def sample(
    model: LatentDiffusion,
    run: Run,
    prompt: str = "a red apple",
    *,
    count: int = 1,
    steps: int = 30,
    guidance: float = 4.0,
    sampler: SamplerName = "dpm",
    image: str = "",
    strength: float | None = None,
    mask: str = "",
    seed: int = 0,
) -> Image.Image:
    """A picture of ``prompt``; kept among the run's samples, each pixel eight wide.

    Args:
        model: a trained model.
        run: the run that trained it, which holds its tokenizer.
        prompt: what to draw.
        count: how many, side by side.
        steps: of the sampler.
        guidance: weight of the prompt; 1 is none, more obeys better and varies less.
        sampler: dpm, ddim, plms, heun or ddpm.
        image: file of a picture to start from or, with a mask, to paint in.
        strength: how much of the picture is drawn anew, in (0, 1]; 0.6 by default.
        mask: file of a picture that is white where the other is to be painted.
        seed: another seed, another picture.
    """
    check_numbers(least=1, count=count)
    if mask and not image:
        raise UserError("a mask says where to paint in a picture: give one with --image")
    if strength is not None and (mask or not image):
        raise UserError(
            "a strength says how much of a picture is drawn anew, and a mask already does: leave one out"
            if mask
            else "a strength says how much of a picture is drawn anew: give one with --image"
        )
    tokenizer = load_clip_tokenizer(run.path / "model")
    size = model.config.image_size
    source = open_image(image, size) if image else None
    where = open_mask(mask, image, size) if mask else None
    states = generate(
        model, tokenizer, [prompt] * count, steps=steps, guidance=guidance, sampler=sampler, seed=seed, image=source,
        strength=0.6 if strength is None else strength, mask=where,
    )  # fmt: skip
    pictures = model.decode(last(states))
    if source is not None and where is not None:
        pictures = paste(pictures, source, where)
    page = sheet(pictures, columns=min(count, 8), scale=max(1, 256 // size))
    run.image(prompt or "no prompt", page, keep=True)
    return page
