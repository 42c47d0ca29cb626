"""What a person wants to see of a run: the cascade at work, and what thresholding and augmentation do."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from canon.core.data.images import Pictures, to_float
from canon.core.generation.diffusion_samplers import last
from canon.core.lab import Run
from canon.core.lab.maps import picture_figure
from canon.images.imagen.model import Imagen, parameters
from canon.images.imagen.sampling import ThresholdName, draw_base, enlarge, generate, noise, path
from canon.images.imagen.text import Captions

EXAMPLES = ("red apple", "cat face", "rocket", "birthday cake", "soccer ball", "sunflower", "guitar", "crescent moon")
CORRUPTION = 0.2
"""Standard deviation of the noise that stands for the mistakes of a stage before."""


def show(model: Imagen, captions: Captions, pictures: Pictures, run: Run) -> None:
    """Put all views into the report of a run."""
    first = [ways[0] for ways in pictures.captions]
    texts = list(dict.fromkeys(first))
    known = [prompt for prompt in EXAMPLES if prompt in texts]
    prompts = (known + [text for text in texts[:: max(1, len(texts) // 8)] if text not in known])[:8]
    number = captions.index()
    text = captions.rows(torch.tensor([number[prompt] for prompt in prompts]), model.config.text_length)
    rows = [first.index(prompt) for prompt in prompts]
    run.figure("the cascade, and the nearest training picture", cascade(model, text, prompts, pictures.images))
    run.figure("guidance under static and dynamic thresholds", guidance_grid(model, text[:2], prompts[:2]))
    run.figure(
        "super-resolution of a small picture with faults, under rising augmentation",
        augmentation_grid(model, text[:2], to_float(pictures.images[rows[:2]])),
    )
    run.figure(f"the base denoises {prompts[0]!r}", denoising_strip(model, text[:1]))
    run.figure("many samples of one prompt", variety(model, text[:3], prompts[:3]))
    run.table("components", components(model))


def enlarged(pictures: Sequence[Float[Tensor, "n 3 _ _"]]) -> list[Float[Tensor, "n 3 size size"]]:
    """Pictures of several sizes at that of the largest, pixel by pixel."""
    side = pictures[-1].shape[-1]
    return [F.interpolate(each, size=(side, side), mode="nearest") for each in pictures]


@torch.no_grad()
def cascade(
    model: Imagen, text: Float16[Tensor, "n time width"], prompts: list[str], images: UInt8[Tensor, "all 3 size size"]
) -> Figure:
    """Two samples of each prompt after each stage, and the training picture nearest to the first, mirrored or not."""
    made = [torch.stack(enlarged(generate(model, text, seed=seed)), dim=1) for seed in (0, 1000)]
    # compared at the base's size: there everything but detail is decided, and it is quick
    times, small = model.config.sizes[2] // model.config.sizes[0], model.config.sizes[0]
    training = F.avg_pool2d(to_float(images), times)
    both = torch.cat([training, training.flip(3)])
    final = F.avg_pool2d(made[0][:, -1], times)
    index = torch.cdist(final.flatten(1), both.flatten(1)).argmin(1)
    nearest = to_float(images[index % len(images)])
    nearest = torch.where((index >= len(images))[:, None, None, None], nearest.flip(3), nearest)
    sides = [f"{side} px" for side in (small, *model.config.sizes[1:])]
    return picture_figure(torch.cat([*made, nearest[:, None]], 1), prompts, [*sides, *sides, "nearest"], size=1.0)


@torch.no_grad()
def guidance_grid(
    model: Imagen,
    text: Float16[Tensor, "n time width"],
    prompts: list[str],
    weights: Sequence[float] = (1, 3, 6, 12),
) -> Figure:
    """The base from the same noise under rising guidance: a row a prompt and threshold, a column a weight."""
    names: tuple[ThresholdName, ...] = ("static", "dynamic")
    made = [
        torch.stack([last(draw_base(model, text, guidance=w, threshold=name)).cpu() for w in weights], 1)
        for name in names
    ]
    rows = torch.stack(made, 1).flatten(0, 1)
    return picture_figure(
        rows, [f"{prompt}, {name}" for prompt in prompts for name in names], [f"w = {w:g}" for w in weights]
    )


@torch.no_grad()
def augmentation_grid(
    model: Imagen,
    text: Float16[Tensor, "n time width"],
    images: Float[Tensor, "n 3 size size"],
    levels: Sequence[float] = (0.0, 0.1, 0.2, 0.4),
) -> Figure:
    """Clean and faulty small pictures made larger by the first stage, under rising augmentation."""
    scale = model.config.scale
    right = F.avg_pool2d(images, scale)
    clean = F.avg_pool2d(right, scale)
    faults = CORRUPTION * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for small in (clean, clean + faults):
        made = [enlarge(model.first_sr, text, small, scale, augmentation=level).cpu() for level in levels]
        rows.append(torch.stack([*enlarged([small, *made]), right], 1))
    names = [name for _ in images for name in ("clean", "faulty")]
    columns = ["given", *(f"level {level:g}" for level in levels), "picture"]
    return picture_figure(torch.stack(rows, 1).flatten(0, 1), names, columns)


@torch.no_grad()
def denoising_strip(model: Imagen, text: Float16[Tensor, "1 time width"], steps: int = 12) -> Figure:
    """What the base's sampler holds, from noise to the end, and the thresholded picture that it then expects."""
    states = list(draw_base(model, text, steps=steps))
    held = [noise(1, model.config.image_size, 0), *(state.x.cpu() for state in states)]
    expected = [*(state.x0.cpu() for state in states), held[-1]]
    times = [path(steps)[0].t, *(state.level.t for state in states)]
    rows = torch.stack([torch.cat(held), torch.cat(expected)])
    return picture_figure(rows, ["z_t", "expected x"], [f"t = {float(t):.2f}" for t in times])


@torch.no_grad()
def variety(model: Imagen, text: Float16[Tensor, "n time width"], prompts: list[str], samples: int = 6) -> Figure:
    """Several samples of each prompt from the whole cascade."""
    rows = generate(model, text.repeat_interleave(samples, 0), seed=2000)[-1]
    return picture_figure(rows.unflatten(0, (len(prompts), samples)), prompts)


def components(model: Imagen) -> list[dict[str, Any]]:
    """What the parts take and give, and how large they are: the map of the system."""
    c = model.config
    sides = [f"3 x {side} x {side}" for side in c.sizes]
    text = f"{c.text_length} x {c.text_width}"
    rows = (
        ("base", f"{sides[0]}, time, {text}", sides[0], model.base),
        ("first super-resolution", f"{sides[1]}, time, {text}, {sides[0]}, level", sides[1], model.first_sr),
        ("last super-resolution", f"{sides[2]}, time, {text}, {sides[1]}, level", sides[2], model.last_sr),
    )
    return [
        {"part": name, "takes": takes, "gives": gives, "parameters": parameters(part)}
        for name, takes, gives, part in rows
    ]
