"""Claims of latent diffusion, and of "The Illustrated Stable Diffusion", on pictures that an oracle can judge.

They ask the model that comes with the repository (``checkpoints/latent_diffusion-shapes``), so what they say of
solvers, attention and the grid holds for this one training run; seeds are those of the noise and the prompts. What
latents cost and what guidance trades is measured on models trained for the claim.
"""

import time
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

import canon
from canon.core.data.images import to_float
from canon.core.data.shapes import ATTRIBUTES, Shapes, oracle, shapes
from canon.core.data.tokenizers import BPETokenizer
from canon.core.errors import UserError
from canon.core.generation import diffusion
from canon.core.generation.diffusion_samplers import ddim, dpm_solver, last
from canon.core.lab import Lab, Measurement, claim
from canon.core.lab.maps import picture_figure
from canon.core.training.fit import fit
from canon.core.training.optimizers import optimizers
from canon.images.latent_diffusion import PRESETS, Config, LatentDiffusion, batches, build, from_pretrained, views
from canon.images.latent_diffusion.autoencoder import AutoencoderKL
from canon.images.latent_diffusion.sampling import denoiser, generate, noise, paste, path
from canon.images.latent_diffusion.training import corpus


@cache
def shipped() -> tuple[LatentDiffusion, BPETokenizer]:
    """The model of shapes that comes with the repository.

    Raises:
        UserError: this is not a clone of it.
    """
    folder = Path(canon.__file__).parents[1] / "checkpoints" / "latent_diffusion-shapes" / "model"
    if not folder.is_dir():
        raise UserError(f"there is no {folder}: verify these claims in a clone of the repository")
    model, tokenizer = from_pretrained(folder)
    assert tokenizer is not None
    return model, tokenizer


def early(lab: Lab) -> tuple[LatentDiffusion, BPETokenizer]:
    """A U-Net after a quarter of the preset's steps, on the autoencoder that comes with the repository."""
    preset = PRESETS["shapes"]
    recipe = replace(preset.training, steps=preset.training.steps // 4, seed=lab.seed, evaluate_every=0)
    config = replace(preset, training=recipe)
    tokenizer = corpus(config.data, config.image_size, config.vocab_size)[1]
    return fit(_untrained(config), batches(config), lab.stage("early", config), recipe), tokenizer


@torch.no_grad()
def draw(
    model: LatentDiffusion,
    tokenizer: BPETokenizer,
    prompts: list[str],
    seed: int,
    guidance: float,
    steps: int = 20,
) -> Float[Tensor, "n 3 size size"]:
    """One picture of each prompt, a hundred at a time."""
    made = []
    for start in range(0, len(prompts), 100):
        states = generate(
            model, tokenizer, prompts[start : start + 100], steps=steps, guidance=guidance, seed=seed + start
        )
        made.append(model.decode(last(states)).float())
    return torch.cat(made)


def accuracy(images: Float[Tensor, "n 3 size size"], asked: Shapes) -> float:
    """Share of pictures whose colour and form are those asked for."""
    read = oracle(images.shape[-1]).read(images)
    return float(((read["colour"] == asked.colour) & (read["form"] == asked.form)).float().mean())


def frechet(one: Float[Tensor, "n 3 size size"], other: Float[Tensor, "m 3 size size"]) -> float:
    """Fréchet distance in the features of a fixed random network (Heusel et al. 2017, Eq. 6)."""
    draw = torch.Generator()

    def features(x: Tensor) -> Tensor:
        draw.manual_seed(0)
        for before, after, stride in ((3, 24, 1), (24, 48, 2), (48, 48, 2)):
            kernel = torch.randn(after, before, 3, 3, generator=draw) * (2 / (9 * before)) ** 0.5
            x = F.relu(F.conv2d(x, kernel, stride=stride, padding=1))
        return F.adaptive_avg_pool2d(x, 1).flatten(1).double()

    a, b = features(one), features(other)
    # |m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2))
    root = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root)


@claim(
    "What inpainting leaves is the original, bit for bit, and image-to-image moves away from its source as its "
    "strength grows",
    source="section 4.5; SDEdit, section 3",
    passes="changed_outside == 0 and changed_inside > 0.02 and smallest_step > 0",
    seeds=3,
    minutes=1.2,
)
def edits_keep_their_contracts(lab: Lab, sabotage: bool = False) -> Measurement:
    """Held-out shapes, another prompt each. Distances are mean absolute differences of pixels.

    `smallest_step` is the least growth of the distance to the source from one strength to the next, over 0.2, 0.4, 0.6,
    0.8, 1. Sabotage: the painted picture as the decoder made it, without the final paste.
    """
    model, tokenizer = shipped()
    held = shapes(16, seed=10_000 + lab.seed)
    images, prompts = to_float(held.images), shapes(16, seed=20_000 + lab.seed).captions
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    outside, inside = [], []
    with torch.no_grad():
        for prompt, image in zip(prompts, images):
            made = model.decode(last(generate(model, tokenizer, [prompt], steps=10, image=image, mask=mask))).float()
            made = made if sabotage else paste(made, image, mask)
            change = (made[0] - image).abs()
            outside.append(float(change[:, mask[0] == 0].max()))
            inside.append(float(change[:, mask[0] == 1].mean()))
        distances = []
        for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
            made = [
                model.decode(last(generate(model, tokenizer, [p], steps=20, image=x, strength=strength, seed=lab.seed)))
                for p, x in zip(prompts, images)
            ]
            distances.append(float((torch.cat(made).float() - images).abs().mean()))
    steps = [b - a for a, b in pairwise(distances)]
    return Measurement(
        changed_outside=max(outside), changed_inside=sum(inside) / len(inside), smallest_step=min(steps),
        distance_weakest=distances[0], distance_strongest=distances[-1],
    )  # fmt: skip


@claim(
    "DPM-Solver++(2M) comes as near to the exact solution in 10 steps as DDIM, whose error falls with the steps, does "
    "not in the same number",
    source="DPM-Solver++ (Lu et al. 2022), section 5; DDIM (Song et al. 2021), section 4",
    passes="dpm_10 <= 0.5 * ddim_10 and ddim_50 < ddim_20 and ddim_20 < ddim_10 and ddim_10 < ddim_5",
    seeds=3,
    minutes=0.8,
)
def few_step_solvers(lab: Lab, sabotage: bool = False) -> Measurement:
    """Root mean square distance of latents to those of 200 DDIM steps from the same noise, 24 captions, no guidance.

    A caption whose picture turns into another one with few steps weighs much in the mean. Sabotage: DPM-Solver++ of
    first order, which is DDIM.
    """
    model, tokenizer = shipped()
    prompts = shapes(24, seed=30_000 + lab.seed).captions
    z, denoise = noise(model, len(prompts), 1000 * lab.seed), denoiser(model, tokenizer, prompts, 1.0)

    def error(sampler, steps: int) -> float:
        return float((last(sampler(denoise, z, path(model, steps))) - exact).square().mean().sqrt())

    exact = last(ddim(denoise, z, path(model, 200)))
    return Measurement(
        dpm_10=error(ddim if sabotage else dpm_solver, 10),
        **{f"ddim_{steps}": error(ddim, steps) for steps in (5, 10, 20, 50)},
    )


class _Pixels(nn.Module):
    """An autoencoder that does nothing: the latents are the picture."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images

    def decode(self, z: Tensor) -> Tensor:
        return z


def _untrained(config: Config) -> LatentDiffusion:
    """A fresh U-Net on the autoencoder that comes with the repository, or on pixels where it would not shrink them."""
    model = build(config)
    if len(config.first_multipliers) == 1:
        model.autoencoder = cast(AutoencoderKL, _Pixels())
    else:
        model.autoencoder.load_state_dict(shipped()[0].autoencoder.state_dict())
        model.latent_scale.copy_(shipped()[0].latent_scale)
    return model


def _seconds_a_step(config: Config) -> float:
    """CPU-seconds of a training step, a mean over three."""
    model, stream, start = _untrained(config), batches(config), 0.0
    both = optimizers(model, config.training)
    for step in range(4):
        if step == 1:  # the first warms up
            start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model.loss(next(stream))
        loss.backward()
        for optimizer in both:
            optimizer.step()
    return (time.process_time() - start) / 3


BUDGET = 500.0  # CPU-seconds of training a side; with its samples, a seed takes ten minutes of two cores


@claim(
    "In a time in which a diffusion model of pixels hardly learns to draw, one of latents does",
    source="section 4.1, figures 6 and 7, which compare FID",
    passes="(accuracy_latents - accuracy_pixels >= 0.10 or distance_latents <= 0.8 * distance_pixels) "
    "and accuracy_decoded >= 0.9 and steps_pixels >= 50",
    seeds=3,
    minutes=60,
)
def latents_are_cheaper(lab: Lab, sabotage: bool = False) -> Measurement:
    """Shapes of 64 pixels; latents of 16 x 16 by the autoencoder that comes with the repository, and the very same
    U-Net on pixels. Each side takes the steps that fit into 500 CPU-seconds, of 16 pictures: with 64, that of pixels
    took 12 steps in 200 CPU-seconds, too few to judge it by, and after 240 neither side had learned to draw (72 and 706
    steps, 9% each). 100 captions, colour and form read by the oracle, and the Fréchet distance to 300 other pictures;
    `accuracy_decoded` is that of real pictures through the autoencoder, `distance_real` theirs. The autoencoder's own
    training (18 minutes of a thread with its own U-Net) is not counted: it serves every model after. Sabotage: the side
    of latents takes no more steps than that of pixels, so that nothing is left of its being cheaper.
    """
    # no attention at full resolution, whose 4,096 pixels would take all of the time; no average over so few steps
    recipe = replace(PRESETS["shapes"].training, batch_size=16, ema_decay=0.0, evaluate_every=0, seed=lab.seed)
    latents = replace(PRESETS["shapes"], image_size=64, attention=(False, True), training=recipe)
    pixels = replace(latents, first_multipliers=(1,), latent_channels=3)
    asked, numbers = shapes(100, 64, seed=90_000 + lab.seed), {}
    real, rows = to_float(shapes(300, 64, seed=95_000 + lab.seed).images), {"asked for": to_float(asked.images)}
    for side, config in (("pixels", pixels), ("latents", latents)):
        steps = round(BUDGET / lab.once(f"seconds_a_step_{side}", partial(_seconds_a_step, config)))
        steps = numbers["steps_pixels"] if sabotage and side == "latents" else steps
        config = replace(config, training=replace(recipe, steps=steps, warmup_steps=steps // 20))
        model = fit(_untrained(config), batches(config), lab.stage(side, config), config.training)
        tokenizer = corpus(config.data, config.image_size, config.vocab_size)[1]
        numbers[f"steps_{side}"] = steps
        images = rows[side] = draw(model, tokenizer, asked.captions, lab.seed, 3.0)
        numbers |= {f"accuracy_{side}": accuracy(images, asked), f"distance_{side}": frechet(images, real)}
    lab.figure("in the same time", picture_figure(torch.stack([row[:8] for row in rows.values()]), [*rows]))
    with torch.no_grad():
        decoded = shipped()[0].decode(shipped()[0].encode(to_float(asked.images))).float()
    floor = frechet(rows["asked for"], real)
    return Measurement(**numbers, accuracy_decoded=accuracy(decoded, asked), distance_real=floor)


@claim(
    "Guidance trades variety for fidelity: a weight of 3 draws what the caption says more often than none, and its "
    "pictures of one caption differ less",
    source="section 4.3 and figure 3; Ho and Salimans 2022, figure 1",
    passes="gain >= 0.10 and variety_ratio <= 0.95",
    seeds=3,
    minutes=8,
)
def guidance_trades_variety_for_fidelity(lab: Lab, sabotage: bool = False) -> Measurement:
    """A U-Net after a quarter of its steps: at their end 95% of the pictures are right without guidance. 300 random
    captions for the accuracy of colour and form, read by the oracle; 20 captions with 12 samples each for the mean
    standard deviation of a pixel within a caption. Sabotage: the predictions with and without caption change places.
    """
    model = early(lab)
    asked = shapes(300, seed=40_000 + lab.seed)
    varied = [caption for caption in shapes(20, seed=50_000 + lab.seed).captions for _ in range(12)]

    def variety(images: Tensor) -> float:
        return float(images.unflatten(0, (20, 12)).std(1).mean())

    strong = 1.0 - 3.0 if sabotage else 3.0
    weak_images, strong_images = (draw(*model, asked.captions, lab.seed, weight) for weight in (1.0, strong))
    weak, guided = accuracy(weak_images, asked), accuracy(strong_images, asked)
    ratio = variety(draw(*model, varied, lab.seed, strong)) / variety(draw(*model, varied, lab.seed, 1.0))
    return Measurement(gain=guided - weak, variety_ratio=ratio, accuracy_1=weak, accuracy_3=guided)


@claim(
    "The expected picture comes nearer to the final one with every step of the last four fifths, and the strip shows "
    "the sampler's own states",
    source="The Illustrated Stable Diffusion, the denoising strip",
    passes="monotone == 1 and states_equal == 1",
    seeds=3,
    minutes=0.1,
)
def denoising_strip_is_real(lab: Lab, sabotage: bool = False) -> Measurement:
    """25 DDIM steps of 8 captions. Sabotage: the strip that noise added to the final picture would make."""
    model, tokenizer = shipped()
    prompts = shapes(8, seed=60_000 + lab.seed).captions
    states = list(generate(model, tokenizer, prompts, steps=25, sampler="ddim", seed=lab.seed))
    final = states[-1].x
    x0, shown = [state.x0 for state in states], [state.x for state in states]
    if sabotage:
        eps = torch.randn(final.shape, generator=torch.Generator().manual_seed(lab.seed))
        shown = [diffusion.add_noise(final, eps, state.level) for state in states]
        x0 = shown
    again = list(generate(model, tokenizer, prompts, steps=25, sampler="ddim", seed=lab.seed))
    distances = torch.stack([(x - final).square().mean() for x in x0])[5:]
    return Measurement(
        monotone=bool((distances.diff() <= 0).all()),
        states_equal=all(torch.equal(a, b.x) for a, b in zip(shown, again)),
        first_distance=distances[0],
    )


@claim(
    "The form's word is looked at where the form is",
    source="section 3.3 (cross-attention); The Illustrated Stable Diffusion",
    passes="concentration >= 1.5",
    seeds=3,
    minutes=0.5,
)
def attention_finds_the_object(lab: Lab, sabotage: bool = False) -> Measurement:
    """Share of the attention to the form's word that falls inside the drawn object, over the object's share of the
    picture; the object is what differs from the median grey by more than 0.25 in some channel. 16 captions whose place
    varies. Sabotage: the map of one caption against the object of another.
    """
    model, tokenizer = shipped()
    asked = shapes(16, seed=70_000 + lab.seed)
    ratios, maps, masks = [], [], []
    for caption in asked.captions:
        found, words, picture = views.attention_maps(model, tokenizer, caption, seed=lab.seed)
        form = next(i for i, word in enumerate(words) if word and caption.split(" ")[3].startswith(word))
        ground = picture.flatten(1).median(1).values[:, None, None]
        object_ = ((picture - ground).abs().amax(0) > 0.25).float()[None, None]
        maps.append(found[form])
        masks.append(torch.nn.functional.adaptive_avg_pool2d(object_, found.shape[1])[0, 0])
    if sabotage:
        masks = masks[1:] + masks[:1]
    for weights, mask in zip(maps, masks):
        if float(mask.sum()) > 0:
            ratios.append(float((weights * mask).sum() / weights.sum() / mask.mean()))
    return Measurement(concentration=sum(ratios) / len(ratios), drawn=len(ratios) / len(asked.captions))


@claim(
    "Stable Diffusion's latents hold 48 times fewer numbers than its pictures",
    source="section 3.1; the released configuration (f = 8, 4 channels)",
    passes="ratio == 48",
    seeds=1,
    minutes=0.05,
)
def latents_are_48_times_smaller(lab: Lab, sabotage: bool = False) -> Measurement:
    """Counted on the model itself, built without memory. Sabotage: the laptop's."""
    with torch.device("meta"):
        model = LatentDiffusion(PRESETS["laptop" if sabotage else "sd-v1"])
        z = model.autoencoder.encode(torch.empty(1, 3, model.config.image_size, model.config.image_size))
    return Measurement(ratio=3 * model.config.image_size**2 / z.numel())


@claim(
    "The guidance grid's accuracy rises with the weight and its variety falls",
    source="The Illustrated Stable Diffusion; Ho and Salimans 2022, figure 1",
    passes="accuracy_8 > accuracy_1 and variety_8 < variety_3 and variety_3 < variety_1",
    seeds=3,
    minutes=3,
)
def guidance_grid(lab: Lab, sabotage: bool = False) -> Measurement:
    """20 captions with 8 samples each at weights 1, 3 and 8. Sabotage: the captions of other pictures are asked for."""
    asked = shapes(20, seed=80_000 + lab.seed)
    every = [i for i in range(20) for _ in range(8)]
    prompts = [asked.captions[(i + 7) % 20 if sabotage else i] for i in every]
    numbers = {}
    for weight in (1, 3, 8):
        images = draw(*shipped(), prompts, lab.seed, float(weight))
        read = oracle(32).read(images)
        right = [int(read[name][n]) == int(getattr(asked, name)[i]) for n, i in enumerate(every) for name in ATTRIBUTES]
        numbers[f"accuracy_{weight}"] = sum(right) / len(right)
        numbers[f"variety_{weight}"] = float(images.unflatten(0, (20, 8)).std(1).mean())
    return Measurement(**numbers)
