"""Pictures from text embeddings: guidance with thresholding, and the cascade (sections 2.2 to 2.4)."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from canon.core.device import generator
from canon.core.errors import UserError
from canon.core.generation import diffusion
from canon.core.generation.diffusion import Levels, V, cosine
from canon.core.generation.diffusion_samplers import Denoiser, State, ddpm, last
from canon.images.imagen.model import Imagen
from canon.images.imagen.unet import EfficientUNet, augment

ThresholdName = Literal["dynamic", "static", "none"]
THRESHOLDS: dict[ThresholdName, Callable[[Tensor], Tensor]] = {
    "dynamic": diffusion.dynamic_threshold,
    "static": diffusion.static_threshold,
    "none": lambda x0: x0,
}
GAMMA = 0.3
"""Between the smallest and the largest variance of a step (Eq. 6); the paper states no value."""
SR_GUIDANCE = 1.0
"""Weight of the text in super-resolution, where the small picture says almost everything."""


def denoiser(
    network: Callable[..., Tensor],
    text: Float[Tensor, "batch time text_width"],
    guidance: float,
    threshold: ThresholdName,
    *condition: Tensor,
) -> Denoiser:
    """The picture expected of a noisy one, guided and then thresholded; samplers take eps from it anew.

    Args:
        network: a trained stage.
        text: of each row.
        guidance: weight of the text; 1 is none.
        threshold: dynamic, static or none.
        condition: what else the network is given for each row: the small picture and its level.
    """
    nothing = torch.zeros_like(text)
    twice = [torch.cat([part, part]) for part in condition]

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        if guidance == 1:
            return network(x_t, t, text, *condition)
        both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, nothing]), *twice)
        conditional, unconditional = both.chunk(2)
        # Eq. 2: eps~ = w eps(z, c) + (1 - w) eps(z), and so for v
        return diffusion.guide(conditional, unconditional, guidance)

    return diffusion.denoiser(guided, V, THRESHOLDS[threshold])


def check_sampling(steps: int, guidance: float, augmentation: float, seed: int) -> None:
    """Say what is wrong with the numbers of a sample, before anything is drawn.

    Raises:
        UserError: as :func:`diffusion.check_sampling`, or the augmentation is not in [0, 1].
    """
    diffusion.check_sampling(steps, guidance, seed)
    if not 0 <= augmentation <= 1:
        raise UserError(f"augmentation must be between 0 and 1, not {augmentation}")


def path(steps: int) -> Levels:
    """The times that sampling visits: evenly from pure noise to none."""
    return diffusion.path(cosine(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]))


def noise(rows: int, size: int, seed: int, *purpose: int) -> Float[Tensor, "rows 3 size size"]:
    """Standard normal noise; row i depends on seed + i, the size and the purpose alone."""
    draws = [generator(seed + i, size, *purpose) for i in range(rows)]
    return torch.stack([torch.randn(3, size, size, generator=draw) for draw in draws])


def draw_base(
    model: Imagen,
    text: Float[Tensor, "batch time text_width"],
    *,
    steps: int = 32,
    guidance: float = 2.0,
    threshold: ThresholdName = "static",
    seed: int = 0,
) -> Iterator[State]:
    """The states of the base on its way from noise to a small picture; `last` takes the end of it."""
    check_sampling(steps, guidance, 0, seed)
    x = noise(len(text), model.config.image_size, seed).to(model.base.conv_in.weight.device)
    denoise = denoiser(model.base, text.to(x), guidance, threshold)
    return ddpm(denoise, x, path(steps), GAMMA, generator(seed, model.config.image_size, 1))


def enlarge(
    network: EfficientUNet,
    text: Float[Tensor, "batch time text_width"],
    low: Float[Tensor, "batch 3 low low"],
    scale: int,
    *,
    steps: int = 16,
    augmentation: float = 0.1,
    threshold: ThresholdName = "static",
    seed: int = 0,
) -> Float[Tensor, "batch 3 size size"]:
    """Small pictures made larger by a super-resolution stage.

    Args:
        network: a trained stage.
        text: of each row.
        low: the small pictures in [-1, 1].
        scale: how much larger.
        steps: of the sampler.
        augmentation: level of the noise put on the small pictures, in [0, 1]: what it hides is drawn anew.
        threshold: dynamic, static or none.
        seed: of all noise.

    Raises:
        UserError: as :func:`check_sampling`.
    """
    check_sampling(steps, SR_GUIDANCE, augmentation, seed)
    device = network.conv_in.weight.device
    low, text = low.to(device), text.to(device, torch.float32)
    level = torch.full((len(low),), float(augmentation), device=device)
    if augmentation > 0:
        low = augment(low, noise(len(low), low.shape[-1], seed, 2).to(low), level)
    size = low.shape[-1] * scale
    x = noise(len(low), size, seed).to(low)
    denoise = denoiser(network, text, SR_GUIDANCE, threshold, low, level)
    return last(ddpm(denoise, x, path(steps), GAMMA, generator(seed, size, 1)))


def generate(
    model: Imagen,
    text: Float[Tensor, "batch time text_width"],
    *,
    steps: int = 32,
    guidance: float = 2.0,
    threshold: ThresholdName = "static",
    augmentation: float = 0.1,
    seed: int = 0,
) -> list[Float[Tensor, "batch 3 size size"]]:
    """The pictures of all three stages, small ones first, one row a prompt.

    Args:
        model: trained.
        text: embeddings of the prompts, see `canon.images.imagen.text`.
        steps: of the base; the others take half as many.
        guidance: weight of the prompt in the base; 1 is none.
        threshold: dynamic, static or none.
        augmentation: noise put on each small picture before it is made larger, in [0, 1].
        seed: another seed, other pictures.

    Raises:
        UserError: as :func:`check_sampling`.
    """
    check_sampling(steps, guidance, augmentation, seed)
    pictures = [last(draw_base(model, text, steps=steps, guidance=guidance, threshold=threshold, seed=seed))]
    for stage in model.stages:
        pictures.append(
            enlarge(
                stage, text, pictures[-1].clamp(-1, 1), model.config.scale, steps=-(-steps // 2),
                augmentation=augmentation, threshold=threshold, seed=seed,
            )
        )  # fmt: skip
    return [picture.float().cpu() for picture in pictures]
