"""Teaching views, after "The Illustrated Stable Diffusion" (Alammar 2022): the inside, shown by the model itself.

Every picture here is a state of the real sampler or an activation of the real networks, decoded.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from canon.core.data.images import Pictures, to_float
from canon.core.data.tokenizers import BPETokenizer
from canon.core.generation.diffusion import add_noise
from canon.core.generation.diffusion_samplers import last
from canon.core.lab import Run
from canon.core.lab.maps import picture_figure
from canon.core.nn.unet import capture_attention
from canon.images.latent_diffusion.model import LatentDiffusion
from canon.images.latent_diffusion.sampling import captions, generate, noise, paste, path

EXAMPLES = ("red apple", "cat face", "blue heart", "birthday cake", "soccer ball", "sunflower", "elephant", "pizza")


def show(model: LatentDiffusion, tokenizer: BPETokenizer, pictures: Pictures, run: Run) -> None:
    """Put all views into the report of a run."""
    texts = [ways[0] for ways in pictures.captions]
    known = [prompt for prompt in EXAMPLES if any(prompt in ways for ways in pictures.captions)]
    prompts = (known + [text for text in texts[:: max(1, len(texts) // 8)] if text not in known])[:8]
    source = to_float(pictures.images[next(i for i, ways in enumerate(pictures.captions) if prompts[0] in ways)])
    run.figure("samples and their nearest training pictures", neighbours(model, tokenizer, prompts, pictures.images))
    run.figure("guidance: one noise, one prompt a row, rising weight", guidance_grid(model, tokenizer, prompts[:4]))
    run.figure(f"denoising {prompts[0]!r}", denoising_strip(model, tokenizer, prompts[0]))
    run.figure("forward diffusion: a picture at rising noise", forward_strip(model, source))
    fewer = f"{compression(model):g} times fewer numbers"
    run.figure(f"the latents of a picture: {fewer}", latent_view(model, source))
    run.figure(f"where the words of {prompts[0]!r} act", word_maps(model, tokenizer, prompts[0]))
    run.figure("image to image: rising strength", strength_strip(model, tokenizer, prompts[1], source))
    run.figure("inpainting: the right half anew", inpainting_view(model, tokenizer, prompts[:4], pictures))
    run.table("components", components(model))
    run.table("the checkpoint", checkpoint(model))


def decoded(model: LatentDiffusion, latents: Sequence[Tensor]) -> Float[Tensor, "n 3 size size"]:
    """One picture of each."""
    return model.decode(torch.cat(list(latents))).float().cpu()


@torch.no_grad()
def neighbours(
    model: LatentDiffusion,
    tokenizer: BPETokenizer,
    prompts: list[str],
    images: UInt8[Tensor, "n 3 size size"],
    samples: int = 3,
) -> Figure:
    """Samples of each prompt, and the training picture nearest to the first, mirrored or not: to see memorising."""
    rows = [prompt for prompt in prompts for _ in range(samples)]
    made = model.decode(last(generate(model, tokenizer, rows))).float().cpu().unflatten(0, (len(prompts), samples))
    training = to_float(images)
    both = torch.cat([training, training.flip(3)])
    nearest = torch.cdist(made[:, 0].flatten(1), both.flatten(1)).argmin(1)
    columns = [*(f"sample {i + 1}" for i in range(samples)), "nearest"]
    return picture_figure(torch.cat([made, both[nearest][:, None]], 1), prompts, columns)


@torch.no_grad()
def guidance_grid(
    model: LatentDiffusion,
    tokenizer: BPETokenizer,
    prompts: list[str],
    weights: Sequence[float] = (0, 1, 2, 4, 8, 16),
) -> Figure:
    """The same noise under rising guidance: a row a prompt, a column a weight, of which 0 leaves the prompt out."""
    made = [model.decode(last(generate(model, tokenizer, prompts, guidance=w))).float().cpu() for w in weights]
    return picture_figure(torch.stack(made, 1), prompts, [f"w = {w:g}" for w in weights])


@torch.no_grad()
def denoising_strip(model: LatentDiffusion, tokenizer: BPETokenizer, prompt: str, steps: int = 12) -> Figure:
    """What the sampler holds, from noise to the end, and the picture that it then expects."""
    states = list(generate(model, tokenizer, [prompt], steps=steps, sampler="ddim"))
    held = [noise(model, 1, 0), *(state.x for state in states)]
    expected = [*(state.x0 for state in states), held[-1]]
    times = [path(model, steps)[0].t, *(state.level.t for state in states)]
    rows = torch.stack([decoded(model, held), decoded(model, expected)])
    return picture_figure(rows, ["decoded z_t", "predicted z_0"], [f"t = {int(t)}" for t in times])


@torch.no_grad()
def forward_strip(model: LatentDiffusion, image: Float[Tensor, "3 size size"], steps: int = 10) -> Figure:
    """Training examples: latents at rising noise, the noise to be predicted, and what decoding them shows."""
    z = model.encode(image[None].to(model.latent_scale.device))
    eps = noise(model, 1, 0)
    table = model.schedule
    levels = [table[i] for i in torch.linspace(0, len(table) - 1, steps).long().tolist()]
    noisy = [add_noise(z, eps, level) for level in levels]
    size = image.shape[-1]
    channels = torch.cat([_grey(x, size) for x in noisy])
    shown = torch.stack([decoded(model, noisy), channels, _grey(eps, size).expand(steps, -1, -1, -1)])
    names = ["decoded z_t", "first channel of z_t", "noise"]
    return picture_figure(shown, names, [f"{float(level.sigma**2):.0%} noise" for level in levels])


@torch.no_grad()
def latent_view(model: LatentDiffusion, image: Float[Tensor, "3 size size"]) -> Figure:
    """A picture, the channels of its latents, and the picture decoded from them."""
    z = model.encode(image[None].to(model.latent_scale.device))
    channels = torch.cat([_grey(z, image.shape[-1], channel) for channel in range(z.shape[1])])
    names = ["picture", *(f"channel {i + 1}" for i in range(z.shape[1])), "decoded"]
    return picture_figure(torch.cat([image[None].cpu(), channels, decoded(model, [z])])[None], columns=names)


def _grey(z: Float[Tensor, "1 channels h w"], size: int, channel: int = 0) -> Float[Tensor, "1 3 size size"]:
    scaled = (z[:, channel : channel + 1].float().cpu() / 2.5).clamp(-1, 1)
    return F.interpolate(scaled, size=(size, size)).expand(-1, 3, -1, -1)


@torch.no_grad()
def attention_maps(
    model: LatentDiffusion, tokenizer: BPETokenizer, prompt: str, seed: int = 0, steps: int = 20
) -> tuple[Float[Tensor, "tokens h w"], list[str], Float[Tensor, "3 size size"]]:
    """How much each place of the latents looks at each token while a picture is drawn; (maps, tokens, the picture).

    A mean over steps, heads and layers, all brought to the latents' resolution. Without guidance, so that only the
    prompt is looked at.
    """
    side = model.config.latent_size
    with capture_attention(model.unet) as found:
        z = last(generate(model, tokenizer, [prompt], steps=steps, guidance=1.0, seed=seed))
    maps = []
    for weights in (call for calls in found.values() for call in calls):  # (batch, heads, places, tokens)
        size = round(weights.shape[2] ** 0.5)
        of_tokens = weights[0].mean(0).t().reshape(1, -1, size, size)
        maps.append(F.interpolate(of_tokens.float().cpu(), size=(side, side), mode="bilinear"))
    ids = captions(model, tokenizer, [prompt])[0].tolist()
    end = ids.index(tokenizer.eot)
    words = ["start", *(tokenizer.decode([token]).strip() for token in ids[1:end]), "end"]
    return torch.stack(maps).mean(0)[0, : end + 1], words, decoded(model, [z])[0]


def word_maps(model: LatentDiffusion, tokenizer: BPETokenizer, prompt: str) -> Figure:
    """The picture, and for each token where the U-Net looks at it (bright: more than elsewhere)."""
    maps, words, picture = attention_maps(model, tokenizer, prompt)
    size = picture.shape[-1]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    shown = F.interpolate(((maps - low) / (high - low + 1e-9) * 2 - 1)[:, None], size=(size, size)).expand(
        -1, 3, -1, -1
    )
    return picture_figure(torch.cat([picture[None], shown])[None], columns=["picture", *words])


@torch.no_grad()
def strength_strip(
    model: LatentDiffusion,
    tokenizer: BPETokenizer,
    prompt: str,
    image: Float[Tensor, "3 size size"],
    strengths: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0),
) -> Figure:
    """A picture drawn anew as the prompt says, by rising strength."""
    made = [
        model.decode(last(generate(model, tokenizer, [prompt], image=image, strength=strength))).float().cpu()
        for strength in strengths
    ]
    names = ["picture", *(f"{strength:g}" for strength in strengths)]
    return picture_figure(torch.cat([image[None].cpu(), *made])[None], [prompt], names)


@torch.no_grad()
def inpainting_view(model: LatentDiffusion, tokenizer: BPETokenizer, prompts: list[str], pictures: Pictures) -> Figure:
    """Pictures whose right half is painted anew as the prompt says; the prompts are turned by one."""
    index = [next((i for i, ways in enumerate(pictures.captions) if p in ways), 0) for p in prompts]
    originals = to_float(pictures.images[index])
    mask = torch.zeros(1, *originals.shape[2:])
    mask[:, :, mask.shape[2] // 2 :] = 1
    turned = [*prompts[1:], prompts[0]]
    made = [
        paste(model.decode(last(generate(model, tokenizer, [text], image=x, mask=mask))).float().cpu(), x, mask)
        for text, x in zip(turned, originals)
    ]
    hidden = torch.where(mask > 0.5, 0.0, originals)
    rows = torch.stack([originals, hidden, torch.cat(made)], 1)
    names = [f"{own}, then {other}" for own, other in zip(prompts, turned)]
    return picture_figure(rows, names, ["picture", "given", "painted"])


def components(model: LatentDiffusion) -> list[dict[str, Any]]:
    """What the parts take and give, and how large they are: the map of the system, and of its checkpoint."""
    c = model.config
    latents = f"{c.latent_channels} x {c.latent_size} x {c.latent_size}"
    text = f"{c.context_length} x {c.d_model}"
    image = f"3 x {c.image_size} x {c.image_size}"
    times = len(model.schedule)
    rows = (
        ("text encoder", f"{c.context_length} tokens", text, model.text),
        ("U-Net, once a step", f"{latents}, t of {times}, {text}", latents, model.unet),
        ("decoder", latents, image, model.autoencoder.decoder),
        ("encoder (training, image to image)", image, latents, model.autoencoder.encoder),
    )
    return [
        {"part": name, "takes": takes, "gives": gives, "parameters": sum(p.numel() for p in part.parameters())}
        for name, takes, gives, part in rows
    ]


def checkpoint(model: LatentDiffusion) -> list[dict[str, Any]]:
    """What the file of weights holds: a row for each of the names with which its tensors begin."""
    found: dict[str, list[Tensor]] = {}
    for key, tensor in model.state_dict().items():
        found.setdefault(key.split(".")[0], []).append(tensor)
    return [
        {
            "names begin with": name,
            "tensors": len(tensors),
            "numbers": sum(x.numel() for x in tensors),
            "megabytes in float32": round(sum(4 * x.numel() for x in tensors) / 1e6, 1),
        }
        for name, tensors in found.items()
    ]


def compression(model: LatentDiffusion) -> float:
    """How many numbers of a picture stand for one of its latents: 48 for Stable Diffusion."""
    c = model.config
    return 3 * c.image_size**2 / (c.latent_channels * c.latent_size**2)
