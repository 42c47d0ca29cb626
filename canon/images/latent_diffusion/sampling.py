"""Pictures from a trained model: from text, from another picture, with a part painted anew (sections 4.3 to 4.5)."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from canon.core.data.tokenizers import BPETokenizer
from canon.core.generation import diffusion
from canon.core.generation.diffusion import Levels
from canon.core.generation.diffusion_samplers import Denoiser, State, ddim, ddpm, dpm_solver, heun, plms, reinject
from canon.images.clip.tokenizer import tokenize
from canon.images.latent_diffusion.model import LatentDiffusion

SamplerName = Literal["dpm", "ddim", "plms", "heun", "ddpm"]
Sampler = Callable[[Denoiser, Tensor, Levels, torch.Generator], Iterator[State]]
SAMPLERS: dict[SamplerName, Sampler] = {
    "dpm": lambda denoise, x, path, generator: dpm_solver(denoise, x, path),
    "ddim": lambda denoise, x, path, generator: ddim(denoise, x, path),
    "plms": lambda denoise, x, path, generator: plms(denoise, x, path),
    "heun": lambda denoise, x, path, generator: heun(denoise, x, path),
    "ddpm": lambda denoise, x, path, generator: ddpm(denoise, x, path, generator=generator),
}


def captions(model: LatentDiffusion, tokenizer: BPETokenizer, prompts: list[str]) -> Int[Tensor, "prompts time"]:
    """Token ids of prompts, filled up with the end of text as in Stable Diffusion."""
    rows = tokenize(tokenizer, prompts, model.config.context_length, pad=tokenizer.eot or 0)
    return rows.to(model.latent_scale.device)


@torch.no_grad()
def denoiser(
    model: LatentDiffusion,
    tokenizer: BPETokenizer,
    prompts: list[str],
    guidance: float,
    condition: Float[Tensor, "prompts channels h w"] | None = None,
) -> Denoiser:
    """The predicted latents of noisy ones, one row a prompt, with classifier-free guidance."""
    without = [] if guidance == 1 else [""] * len(prompts)
    context = model.text(captions(model, tokenizer, [*prompts, *without]))

    def guided(z_t: Tensor, t: Tensor) -> Tensor:
        if guidance == 1:
            return model(z_t, t, context, condition)
        twice = None if condition is None else torch.cat([condition, condition])
        conditional, unconditional = model(torch.cat([z_t, z_t]), torch.cat([t, t]), context, twice).chunk(2)
        return diffusion.guide(conditional, unconditional, guidance)

    return diffusion.denoiser(guided, model.predicts)


def noise(model: LatentDiffusion, count: int, seed: int) -> Float[Tensor, "count channels h w"]:
    """Standard normal latents to start from; row i depends on seed + i alone."""
    c = model.config
    shape = (c.latent_channels, c.latent_size, c.latent_size)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    return torch.stack(rows).to(model.latent_scale.device)


def path(model: LatentDiffusion, steps: int, strength: float = 1.0) -> Levels:
    """The levels that sampling visits: evenly spaced from the noisiest; of image-to-image only the last part."""
    table = model.schedule
    return diffusion.tail(diffusion.path(table[diffusion.trailing(steps, len(table))]), strength)


def generate(
    model: LatentDiffusion,
    tokenizer: BPETokenizer,
    prompts: list[str],
    *,
    steps: int = 30,
    guidance: float = 4.0,
    sampler: SamplerName = "dpm",
    seed: int = 0,
    image: Float[Tensor, "3 size size"] | None = None,
    strength: float = 0.6,
    mask: Float[Tensor, "1 size size"] | None = None,
) -> Iterator[State]:
    """The states of a sampler on its way from noise to latents, one row a prompt; `last` takes the end of it.

    Args:
        model: trained.
        tokenizer: of its text encoder.
        prompts: what to draw.
        steps: of the sampler, before ``strength``.
        guidance: weight of the prompt; 1 is none.
        sampler: see :mod:`canon.core.generation.diffusion_samplers`.
        seed: of the noise.
        image: start from it (SDEdit, Meng et al. 2022) or, with a mask, paint in it.
        strength: how much of the way from noise is gone anew, in (0, 1]; without a mask only.
        mask: 1 where the picture is to be painted. A model with condition channels is shown it; any other gets what
            is known put back after every step.

    Raises:
        UserError: there is no step, the strength is not in (0, 1], the guidance is not finite, or the seed is below 0
            or has more than 32 bits.
    """
    diffusion.check_sampling(steps, guidance, seed)
    z = noise(model, len(prompts), seed)
    generator = torch.Generator().manual_seed(seed)
    pictures = None if image is None else image.to(z).expand(len(prompts), *image.shape)
    masks = None if mask is None or pictures is None else mask.to(z).expand(len(prompts), *mask.shape)
    condition = None
    if model.config.condition_channels:  # it learned with masks: of everything where none is given
        size = (len(prompts), 3, model.config.image_size, model.config.image_size)
        seen = z.new_zeros(size) if pictures is None else pictures
        condition = model.masked(seen, torch.ones_like(seen[:, :1]) if masks is None else masks)
    denoise = denoiser(model, tokenizer, prompts, guidance, condition)
    if pictures is not None and masks is None:
        levels = path(model, steps, strength)
        return SAMPLERS[sampler](denoise, diffusion.add_noise(model.encode(pictures), z, levels[0]), levels, generator)
    states = SAMPLERS[sampler](denoise, z, path(model, steps), generator)
    if pictures is None or masks is None or condition is not None:
        return states
    # a latent is kept where nothing under it is to be painted
    keep = 1 - torch.nn.functional.adaptive_max_pool2d(masks, model.config.latent_size)
    return reinject(states, model.encode(pictures), keep, generator)


def paste(
    painted: Float[Tensor, "batch 3 size size"],
    image: Float[Tensor, "3 size size"],
    mask: Float[Tensor, "1 size size"],
) -> Float[Tensor, "batch 3 size size"]:
    """The painted part in the original, whose other pixels stay as they are, bit for bit."""
    return torch.where(mask.to(painted) > 0.5, painted, image.to(painted))
