"""ControlNet: Adding Conditional Control to Text-to-Image Diffusion Models (Zhang, Rao and Agrawala, 2023).

Paper: https://arxiv.org/abs/2302.05543

The idea. A trained diffusion model is locked; a copy of its encoder learns to read a condition, such as edges, and adds
what it finds to what the locked decoder reads. Both ends of the copy are convolutions that start at zero, so that
training begins with the very model that was locked, and no noise ever harms its features:

    y_c = F(x; Theta) + Z(F(x + Z(c; Theta_z1); Theta_c); Theta_z2)

Faithful. The copy of all encoder blocks and the middle; zero convolutions to every skip and the middle; the hint
encoder, with as many halvings as the first stage has; latent diffusion's loss with half of the prompts empty; no
gradients in the locked encoder; only_mid_control and sd_locked; guess mode, CFG resolution weighting, a strength for
each connection, several ControlNets at once; OpenCV's edges. Released weights load from both layouts.

Scaled down. `laptop` controls a small latent diffusion model of shapes by their edges, learned from 2,000 pairs.

Deviations.
    paper                         ours                              why
    poses, depth, normals, HED,   edges, coarse edges and colours;  those need trained detectors: make the maps with
    segments, straight lines      `files` takes any other map       them, and learn from `files`
    scribbles: warped HED edges   edges of a reduced picture        one function for pictures of any size

Run. `canon run controlnet`, on the model of shapes that comes with the repository or the one given as --base: 6 minutes
on one thread beside other work.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from canon.core.checks import check_numbers
from canon.core.data.images import SUFFIXES, PictureBatches, load_pictures, open_image, sheet, to_float, to_uint8
from canon.core.data.tokenizers import BPETokenizer
from canon.core.errors import UserError
from canon.core.generation import diffusion
from canon.core.generation.diffusion_samplers import last
from canon.core.hub import pretrained
from canon.core.hub.tensors import load_tensors
from canon.core.lab import Run
from canon.core.lab.maps import picture_figure
from canon.core.training.fit import TrainingConfig, fit
from canon.images.clip.tokenizer import load_clip_tokenizer
from canon.images.latent_diffusion import LatentDiffusion, load_base, load_base_of, weights
from canon.images.latent_diffusion.sampling import SAMPLERS, SamplerName, captions, noise, path
from canon.images.latent_diffusion.unet import UNet

HINT_WIDTHS = (16, 32, 96, 256)  # channels of the hint encoder at each resolution
Condition = Literal["canny", "scribble", "palette", "files"]
Mode = Literal["both", "guess", "resolution"]
Images = Float[Tensor, "batch 3 height width"]
Latents = Float[Tensor, "batch latent_channels h w"]
Context = Float[Tensor, "batch time d_model"]
Times = Float[Tensor, " batch"]


@dataclass(frozen=True)
class Config:
    """What is controlled, by what, and how that is learned; all shapes are those of the base."""

    base: str = ""
    """The latent diffusion model to control: a run of it, or Stable Diffusion; by default the one of shapes here."""
    data: str = "shapes"
    """What it learns from: shapes, emoji, things, or a folder of pictures, each with its captions in a .txt beside."""
    condition: Condition = "canny"
    """canny (edges), scribble (coarse edges), palette (coarse colours), or files: of the same names in DATA/hints."""
    pairs: int = 2_000
    """Learn from so many pictures, the first of the data; 0 takes all."""
    only_mid_control: bool = False
    """Control the middle of the U-Net alone, and none of the skips."""
    sd_locked: bool = True
    """Keep the base's decoder as it is, too."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it learns."""

    def __post_init__(self) -> None:
        if self.pairs < 0:
            raise UserError(f"pairs must be at least 0, not {self.pairs}")


_RECIPE = TrainingConfig(
    steps=2_400, batch_size=32, learning_rate=1e-3, warmup_steps=50, final_fraction=0.05, beta2=0.99, evaluate_every=400
)
# The released recipe; give a folder of captioned pictures as --data.
_SD = TrainingConfig(
    steps=50_000, batch_size=32, learning_rate=1e-5, schedule="constant", beta2=0.999, weight_decay=0.01, clip_norm=0.0
)
PRESETS = {
    "laptop": Config(training=_RECIPE),
    "scribble": Config(condition="scribble", training=_RECIPE),
    "palette": Config(condition="palette", training=_RECIPE),
    "sd-v1": Config("stable-diffusion-v1-5/stable-diffusion-v1-5", data="things", pairs=0, training=_SD),
}


def canny(images: Images, low: int = 100, high: int = 200) -> Images:
    """Edges, one pixel wide, white on black; the thresholds are of |g_x| + |g_y|, in grey levels from 0 to 255.

    Source: Canny 1986, "A computational approach to edge detection", as OpenCV computes it (there is no blur).
    """
    p = F.pad(((images.clamp(-1, 1) + 1) * 127.5).round(), (1, 1, 1, 1), mode="replicate")
    x, y = p[..., 2:] - p[..., :-2], p[..., 2:, :] - p[..., :-2, :]
    # Sobel: the difference along one axis, smoothed by 1 2 1 along the other; of the channels the strongest
    gx = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    gy = y[..., :-2] + 2 * y[..., 1:-1] + y[..., 2:]
    strongest = (gx.abs() + gy.abs()).argmax(1, keepdim=True)
    gx, gy = gx.gather(1, strongest), gy.gather(1, strongest)
    m = gx.abs() + gy.abs()
    # Thinning: an edge is stronger than both neighbours in the gradient's direction, which is one of four.
    around = F.unfold(F.pad(m, (1, 1, 1, 1)), 3).view(len(m), 9, *m.shape[2:]).split(1, dim=1)
    falls, tangent = (gx < 0) == (gy < 0), 13573 / 2**15  # of 22.5 degrees
    across = torch.where(falls, (m > around[0]) & (m > around[8]), (m > around[2]) & (m > around[6]))
    across = torch.where(gy.abs() > (tangent + 2) * gx.abs(), (m > around[1]) & (m >= around[7]), across)
    across = torch.where(gy.abs() < tangent * gx.abs(), (m > around[3]) & (m >= around[5]), across)
    # Hysteresis: weak edges count where they hang on strong ones.
    weak = across & (m > low)
    edges, before = weak & (m > high), torch.zeros_like(weak)
    while not torch.equal(edges, before):
        before, edges = edges, weak & (F.max_pool2d(edges.float(), 3, 1, 1) > 0)
    return (edges.float() * 2 - 1).expand(-1, 3, -1, -1)


def scribble(images: Images) -> Images:
    """Outlines drawn with a thick pen: the edges of a picture so reduced that a pixel is the pen's width."""
    pen = max(2, images.shape[-1] // 64)
    return F.interpolate(canny(F.avg_pool2d(images, pen)), size=images.shape[2:])


def palette(images: Images) -> Images:
    """The mean colours of sixteen fields: which colour is where, but no form."""
    return F.interpolate(F.adaptive_avg_pool2d(images, 4), size=images.shape[2:])


CONDITIONS: dict[str, Callable[[Images], Images]] = {"canny": canny, "scribble": scribble, "palette": palette}


def zero_convolution(in_channels: int, out_channels: int, size: int = 1) -> nn.Conv2d:
    """Z: a convolution "with both weight and bias initialized to zeros" (section 3.1)."""
    layer = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def hint_encoder(channels: int, factor: int) -> nn.Sequential:
    """E (Eq. 4), which brings a condition to the latents' resolution, and the zero convolution Z(.; Theta_z1).

    Args:
        channels: of the U-Net's first level.
        factor: by which the first stage shrinks pictures, a power of two; 8 makes the released encoder.
    """
    widths = [HINT_WIDTHS[min(i, len(HINT_WIDTHS) - 1)] for i in range(factor.bit_length())]
    layers = [nn.Conv2d(3, widths[0], 3, padding=1), nn.SiLU()]
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, a, 3, padding=1), nn.SiLU(), nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, zero_convolution(widths[-1], channels, 3))


class ControlNet(nn.Module):
    """The trainable copy of a U-Net's way down and middle, between zero convolutions.

    Args:
        unet: what is copied, weights included; it stays as it is.
        factor: by which the first stage shrinks pictures.
        only_mid_control: add to the middle alone.
    """

    def __init__(self, unet: UNet, factor: int, only_mid_control: bool = False):
        super().__init__()
        self.only_mid_control = only_mid_control
        self.copy = deepcopy(unet).requires_grad_(True)
        for part in ("up", "norm_out", "conv_out"):  # there is one way up, the locked model's
            delattr(self.copy, part)
        self.hint = hint_encoder(unet.channels, factor)
        self.zero_convs = nn.ModuleList()
        for stage in (*unet.down, unet.middle):
            width = [layer.out_channels for layer in stage.modules() if isinstance(layer, nn.Conv2d)][-1]
            self.zero_convs.append(zero_convolution(width, width))

    def forward(self, z_t: Latents, t: Times, context: Context, hint: Images) -> list[Tensor]:
        """What is added to the skips of the locked U-Net, finest first, and to its middle: 12 and 1 in SD."""
        emb = self.copy.embed(t)
        first, *rest = self.copy.down
        # x + Z(c; Theta_z1), x being what the first convolution makes of the latents; released weights read [0, 1]
        outputs = [first(z_t, emb, context) + self.hint((hint + 1) / 2)]
        for stage in [*rest, self.copy.middle]:
            outputs.append(stage(outputs[-1], emb, context))
        # Z(F(x + Z(c; Theta_z1); Theta_c); Theta_z2)
        added = [connect(x) for connect, x in zip(self.zero_convs, outputs, strict=True)]
        return [*(0 * x for x in added[:-1]), added[-1]] if self.only_mid_control else added


def controlled(unet: UNet, z_t: Latents, t: Times, context: Context, control: list[Tensor]) -> Latents:
    """The locked U-Net's prediction with control added to its skips and its middle; its encoder gets no gradient."""
    with torch.no_grad():
        emb = unet.embed(t)
        skips, h = unet.encode(z_t, emb, context)
    # Eq. 2: y_c = F(x; Theta) + Z(...)
    skips = [skip + added for skip, added in zip(skips, control[:-1], strict=True)]
    return unet.decode(h + control[-1], skips, emb, context)


class ControlledDiffusion(nn.Module):
    """A locked latent diffusion model and the ControlNet that learns to steer it."""

    def __init__(self, config: Config, base: LatentDiffusion):
        super().__init__()
        if base.config.condition_channels:
            raise UserError("the base is an inpainting model: give one that draws whole pictures")
        self.config, self.base = config, base.requires_grad_(False)
        factor = base.config.image_size // base.config.latent_size
        self.control = ControlNet(base.unet, factor, config.only_mid_control)
        if not config.sd_locked:
            nn.ModuleList([base.unet.up, base.unet.norm_out, base.unet.conv_out]).requires_grad_(True)

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, " batch"]:
        """The loss of each picture."""
        images, hint = batch["images"].split(3, dim=1)
        eps, posterior = batch["noise"].unbind(1)
        with torch.no_grad():
            z, context = self.base.encode(images, posterior), self.base.text(batch["tokens"])

        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            return controlled(self.base.unet, z_t, t, context, self.control(z_t, t, context, hint))

        table = self.base.schedule.to(z.device)
        level = table[(batch["t"] * len(table)).long()]
        # Eq. 5: L = E_{z_0, t, c_t, c_f, eps} [ || eps - eps_theta(z_t, t, c_t, c_f) ||^2 ]
        return diffusion.loss(predict, z, eps, level, self.base.predicts)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Mean squared error of the prediction; ``batch`` as `batches` yields it."""
        return self(batch).mean(), {}


@dataclass(frozen=True)
class Control:
    """A ControlNet at work."""

    net: ControlNet
    hint: Images  # one a picture, in [-1, 1]
    strength: float | Sequence[float] = 1.0  # of all connections, or of each: the skips, finest first, and the middle

    def __call__(self, z_t: Latents, t: Times, context: Context) -> list[Tensor]:
        """What it adds; the hints are repeated where there are more rows than pictures."""
        added = self.net(z_t, t, context, self.hint.to(z_t).repeat(len(z_t) // len(self.hint), 1, 1, 1))
        many = [self.strength] * len(added) if isinstance(self.strength, int | float) else self.strength
        return [weight * x for weight, x in zip(many, added, strict=True)]


def connection_weights(mode: Mode, sizes: Sequence[int]) -> list[float]:
    """Weights of the connections, of which the sizes of their maps are given, the middle's last."""
    if mode == "guess":  # 0.825^(12 - i), i from 0 to 12, as released
        return [0.825 ** (len(sizes) - 1 - i) for i in range(len(sizes))]
    if mode == "resolution":  # w_i = 64 / h_i, 64 being the latents' size (section 3.4)
        return [max(sizes) / size for size in sizes]
    return [1.0] * len(sizes)


def steered(
    unet: UNet, context: Context, controls: Sequence[Control], guidance: float, mode: Mode = "both"
) -> diffusion.Model:
    """The base's prediction for (z_t, t), steered by classifier-free guidance and one control or several, which add up.

    Args:
        unet: the locked one.
        context: of the prompts, then of as many empty prompts.
        controls: each with a hint a prompt.
        guidance: its weight; 1 is none.
        mode: ``both`` predictions, the conditional and the other, are controlled, so that guidance follows the prompt
            alone; with ``guess`` and ``resolution`` the conditional one, by `connection_weights`: guidance follows
            the control too, which is what draws where there is no prompt.
    """
    n, copies = len(context) // 2, 1 if guidance == 1 else 2
    rows = n * copies if mode == "both" else n  # with control; the conditional ones come first
    text, controlled_text = context[: n * copies], context[:rows]  # the same tensors at every step

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        z_t, t = z_t.repeat(copies, 1, 1, 1), t.repeat(copies)
        parts = zip(*(control(z_t[:rows], t[:rows], controlled_text) for control in controls))
        sums = [torch.stack(part).sum(0) for part in parts]
        scales = connection_weights(mode, [x.shape[-1] for x in sums])
        sums = [F.pad(w * x, (0,) * 7 + (len(z_t) - rows,)) for w, x in zip(scales, sums)]
        eps = controlled(unet, z_t, t, text, sums)
        return eps if copies == 1 else diffusion.guide(eps[:n], eps[n:], guidance)

    return predict


@torch.no_grad()
def generate(
    base: LatentDiffusion, tokenizer: BPETokenizer, prompts: list[str], controls: Sequence[Control], *,
    steps: int = 30, guidance: float = 4.0, mode: Mode = "both", sampler: SamplerName = "dpm", seed: int = 0,
) -> Images:  # fmt: skip
    """Pictures, one a prompt, from the noise of latent diffusion's own samples with the seed; see `steered`.

    Errors: as `diffusion.check_sampling`.
    """
    diffusion.check_sampling(steps, guidance, seed)
    context = base.text(captions(base, tokenizer, [*prompts, *[""] * len(prompts)]))
    denoise = diffusion.denoiser(steered(base.unet, context, controls, guidance, mode), base.predicts)
    draw, start = torch.Generator().manual_seed(seed), noise(base, len(prompts), seed)
    return base.decode(last(SAMPLERS[sampler](denoise, start, path(base, steps), draw))).float().cpu()


# What a folder of diffusers may state, and must not state differently.
FIXED = {"_class_name": "ControlNetModel", "global_pool_conditions": False}
FIXED |= {"controlnet_conditioning_channel_order": "rgb"}


def load_control(net: ControlNet, tensors: Mapping[str, Tensor]) -> None:
    """Copy released weights, in the layout of diffusers or of the authors; a UserError where they do not fit."""
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("control_model.")} or tensors
    layers, middle = range(0, len(net.hint), 2), len(net.zero_convs) - 1
    if any("input_hint_block." in name for name in tensors):
        modules, hint = weights.UNET_COMPVIS, {"input_hint_block.{i}": "hint.{i}"}
        zeros = {"zero_convs.{i}.0": "zero_convs.{i}", "middle_block_out.0": f"zero_convs.{middle}"}
    else:
        modules = weights.unet_diffusers(len(net.copy.down) // (net.copy.res_blocks + 1), net.copy.res_blocks)
        inner = ["conv_in", *(f"blocks.{i}" for i in range(len(layers) - 2)), "conv_out"]
        hint = {f"controlnet_cond_embedding.{name}": f"hint.{i}" for name, i in zip(inner, layers)}
        zeros = {"controlnet_down_blocks.{i}": "zero_convs.{i}", "controlnet_mid_block": f"zero_convs.{middle}"}
    down = {a: f"copy.{b}" for a, b in modules.items() if not b.startswith(("up.", "norm_out", "conv_out"))}
    pretrained.load_weights(net, tensors, weights.names_of({**down, **zeros, **hint}), what="the ControlNet")


def from_pretrained(source: str | Path, base: str = "") -> tuple[ControlledDiffusion, BPETokenizer]:
    """A ControlNet on its base, and the base's tokenizer.

    Args:
        source: a folder that a run wrote; or a released ControlNet: a folder or repository in diffusers' layout
            (``lllyasviel/sd-controlnet-canny``), or a file with ``control_model.*``.
        base: the model that a released ControlNet was made for, as in `Config`.

    Raises:
        UserError: there is nothing there, it is damaged, or it does not fit the base.
    """
    place = pretrained.resolve(source)
    settings = pretrained.load_config(place) if place.is_dir() else {}
    if "system" not in settings:
        for name, value in FIXED.items():
            if (found := settings.get(name, value)) != value:
                raise UserError(f"{place} has {name} {found!r}, and ControlNet {value!r}: it is another model")
        locked, tokenizer = load_base(base)
        model = ControlledDiffusion(Config(base=base), locked)
        file = place / "diffusion_pytorch_model.safetensors" if place.is_dir() else place
        load_control(model.control, load_tensors(file))
        return model.eval(), tokenizer

    tensors = {} if (place / "base").is_dir() or settings["system"] != "controlnet" else load_tensors(place)
    if tensors and not any(name.startswith("base.") for name in tensors):  # the control alone, as it is shipped
        config = pretrained.from_plain(Config, {key: value for key, value in settings.items() if key != "system"})
        locked, tokenizer = load_base(config.base)
        model = ControlledDiffusion(config, locked)
        own = {name.removeprefix("control."): tensor for name, tensor in tensors.items()}
        pretrained.load_weights(model.control, own, what=f"{place}, a ControlNet,")
        return model.eval(), tokenizer

    def empty(config: Config) -> ControlledDiffusion:
        return ControlledDiffusion(config, load_base_of(place, config.base))

    model, tokenizer = pretrained.load_pretrained(place, "controlnet", Config, empty, {}, lambda read: Config(**read))
    return model, load_clip_tokenizer(place) if tokenizer else load_base(model.config.base)[1]


@cache
def corpus(data: str, condition: Condition, size: int) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Pictures with their conditions, as bytes (n, 6, size, size), and captions; a UserError where one is missing."""
    pictures = load_pictures(data, size)
    if condition != "files":
        hints = [to_uint8(CONDITIONS[condition](to_float(some))) for some in pictures.images.split(256)]
        return torch.cat([pictures.images, torch.cat(hints)], dim=1), pictures.captions
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserError(f"the condition 'files' needs a folder as data, with conditions in {folder / 'hints'}")
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    hints = [to_uint8(open_image(folder / "hints" / name, size)) for name in names]
    return torch.cat([pictures.images, torch.stack(hints)], dim=1), pictures.captions


def examples(config: Config, size: int, count: int) -> tuple[Images, Images, list[str]]:
    """Pictures, their conditions and last captions: the first that are held out or, if none is, the first of all."""
    both, texts = corpus(config.data, config.condition, size)
    start = config.pairs if config.pairs < len(both) else 0
    images, hints = to_float(both[start : start + count]).split(3, dim=1)
    return images, hints, [ways[-1] for ways in texts[start : start + count]]


def build(config: Config) -> ControlledDiffusion:
    """The base with a fresh ControlNet."""
    base, _ = load_base(config.base)
    torch.manual_seed(config.training.seed)
    return ControlledDiffusion(config, base)


def batches(config: Config, held_out: bool = False) -> PictureBatches:
    """Training batches, or those of the pictures behind them, if there are enough.

    They are those of latent diffusion, but ``images`` (batch, 6, size, size) holds conditions behind the pictures.
    """
    base, tokenizer = load_base(config.base)
    c, own = config, base.config
    both, texts = corpus(c.data, c.condition, own.image_size)
    later = held_out and 0 < c.pairs <= len(texts) - c.training.batch_size
    kept = slice(c.pairs, None) if later else slice(c.pairs or None)
    # "we randomly replace 50% text prompts c_t with empty strings" (section 3.3): half the ways to ask for a picture
    ways = max(map(len, texts))
    prompts = [prompt for some in texts[kept] for i in range(ways) for prompt in (some[i % len(some)], "")]
    tokens = captions(base, tokenizer, prompts).view(-1, 2 * ways, own.context_length)
    shape = (2, own.latent_channels, own.latent_size, own.latent_size)
    return PictureBatches(both[kept], tokens, c.training.batch_size, c.training.seed, noise=shape)


def train(config: Config, run: Run) -> ControlledDiffusion:
    """Train a ControlNet on its locked base; goes on where the run was stopped."""
    model, stream = build(config), batches(config)
    if run.leader:
        tokenizer = load_base(config.base)[1]
        pretrained.save_description(config, run.path / "model", system="controlnet", tokenizer=tokenizer)
        pretrained.save_description(model.base.config, run.path / "model" / "base", system="latent_diffusion")
    fixed = next(batches(config, held_out=True))

    def evaluate(_: nn.Module) -> dict[str, float]:
        device = model.base.latent_scale.device
        return {"validation_loss": float(model.loss({key: value.to(device) for key, value in fixed.items()})[0])}

    model = fit(model, stream, run, config.training, evaluate=evaluate)
    if run.leader:
        whole, tokenizer = from_pretrained(run.path / "model")  # this process may hold a shard only
        show(whole.to(model.base.latent_scale.device), tokenizer, run)
    return model


def show(model: ControlledDiffusion, tokenizer: BPETokenizer, run: Run) -> None:
    """Put into the report what the control does: held-out conditions, each sample of a row from the same noise."""
    images, hints, prompts = examples(model.config, model.base.config.image_size, 6)

    def draw(texts: list[str], strength: float = 1.0, mode: Mode = "both") -> Images:
        return generate(model.base, tokenizer, texts, [Control(model.control, hints, strength)], steps=20, mode=mode)

    strengths = (1.0, 0.0, 0.3, 0.6, 1.5)
    rows = torch.stack([images, hints, *(draw(prompts, strength) for strength in strengths)], 1)
    names = ["picture", "condition", "controlled", "without", *(f"strength {s:g}" for s in strengths[2:])]
    run.figure("held-out conditions", picture_figure(rows, prompts, names))
    modes: list[Mode] = ["both", "guess", "resolution"]
    rows = torch.stack([hints, *(draw([""] * len(hints), mode=mode) for mode in modes)], 1)
    run.figure("without a prompt", picture_figure(rows, columns=["condition", *modes]))


def sample(
    model: ControlledDiffusion, run: Run, prompt: str = "", *, hint: str = "", drawn: bool = False, count: int = 1,
    steps: int = 30, guidance: float = 4.0, strength: float = 1.0, mode: Mode = "both", sampler: SamplerName = "dpm",
    seed: int = 0,
) -> Image.Image:  # fmt: skip
    """The condition, and pictures of ``prompt`` that obey it; kept among the run's samples.

    Args:
        model: a trained model.
        run: the run that trained it.
        prompt: what to draw; with neither prompt nor hint a held-out example.
        hint: file of a picture whose condition is taken; by default a held-out example.
        drawn: the hint is a condition already, such as white lines on black.
        count: how many pictures.
        steps: of the sampler.
        guidance: weight of the prompt; 1 is none, more obeys better and varies less.
        strength: of the control; 0 is none.
        mode: both; without a prompt guess or resolution, where the control takes its place.
        sampler: dpm, ddim, plms, heun or ddpm.
        seed: another seed, another picture.
    """
    check_numbers(least=1, count=count)
    check_numbers(strength=strength)
    if drawn and not hint:
        raise UserError("drawn says that a hint is a condition already: give one with --hint")
    size, kind = model.base.config.image_size, model.config.condition
    if hint:
        condition = open_image(hint, size)[None]
        condition = condition if drawn or kind == "files" else CONDITIONS[kind](condition)
    else:
        _, condition, texts = examples(model.config, size, 1)
        prompt = prompt or texts[0]
    controls = [Control(model.control, condition.expand(count, -1, -1, -1), strength)]
    tokenizer, prompts = load_clip_tokenizer(run.path / "model"), [prompt] * count
    pictures = generate(
        model.base, tokenizer, prompts, controls, steps=steps, guidance=guidance, mode=mode, sampler=sampler, seed=seed
    )
    page = sheet(torch.cat([condition, pictures]), columns=min(count + 1, 8), scale=max(1, 256 // size))
    run.image(prompt or "no prompt", page, keep=True)
    return page
