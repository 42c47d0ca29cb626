"""Drawn shapes with captions: a world whose pictures can be judged exactly.

Every picture holds one shape; its colour, form, place and size are known, and :func:`oracle` reads them off a picture,
a generated one too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from canon.core.data import assets
from canon.core.lab.run import Run
from canon.core.training.fit import TrainingConfig, fit

COLOURS = {
    "red": (0.72, -0.66, -0.60),
    "green": (-0.60, 0.42, -0.52),
    "blue": (-0.62, -0.36, 0.74),
    "yellow": (0.74, 0.60, -0.64),
    "purple": (0.22, -0.62, 0.52),
    "orange": (0.76, -0.02, -0.72),
}
"""Red, green and blue in [-0.8, 0.8]: guidance can overshoot them without leaving [-1, 1] at once."""
FORMS = ("circle", "square", "triangle", "star")
PLACES = {
    "in the middle": (0.0, 0.0),
    "at the top left": (-0.42, -0.42),
    "at the top right": (0.42, -0.42),
    "at the bottom left": (-0.42, 0.42),
    "at the bottom right": (0.42, 0.42),
}
SIZES = {"small": 0.3, "large": 0.5}
TEMPLATE = "a {size} {colour} {form} {place}"
SHORTER = ("a {form}", "a {colour} {form}", "a {form} {place}", "a {colour} {form} {place}", "a {size} {colour} {form}")
"""Ways to say less."""
ATTRIBUTES = {"colour": len(COLOURS), "form": len(FORMS), "place": len(PLACES), "size": len(SIZES)}
"""How many values each attribute has."""


@dataclass(frozen=True)
class Shapes:
    """Pictures of one shape each, and what they show."""

    images: UInt8[Tensor, "n 3 side side"]
    masks: Bool[Tensor, "n side side"]
    """Where the shape is."""
    captions: list[str]
    colour: Int[Tensor, " n"]
    form: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    size: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.captions)


def shapes(count: int, side: int = 32, seed: int = 0) -> Shapes:
    """Random shapes, every attribute independent and uniform; place, size, angle and background vary a little.

    Args:
        count: pictures.
        side: in pixels.
        seed: another seed, other pictures.
    """
    draw = torch.Generator().manual_seed(seed)
    values = {name: torch.randint(n, (count,), generator=draw) for name, n in ATTRIBUTES.items()}
    return draw_shapes(**values, side=side, generator=draw)


def draw_shapes(
    colour: Int[Tensor, " n"],
    form: Int[Tensor, " n"],
    place: Int[Tensor, " n"],
    size: Int[Tensor, " n"],
    *,
    side: int = 32,
    generator: torch.Generator,
) -> Shapes:
    """Pictures of the given shapes; the arguments index the tables of this file."""

    def uniform(low: float, high: float) -> Float[Tensor, "n 1 1"]:
        return low + (high - low) * torch.rand(len(colour), 1, 1, generator=generator)

    centre = torch.tensor(list(PLACES.values()))[place]
    radius = torch.tensor(list(SIZES.values()))[size][:, None, None] * uniform(0.9, 1.1)
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    x = (axis[None, None, :] - centre[:, 0, None, None] - uniform(-0.06, 0.06)) / radius
    y = (axis[None, :, None] - centre[:, 1, None, None] - uniform(-0.06, 0.06)) / radius
    angle = uniform(-0.15, 0.15)
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    distance = torch.stack([_circle(x, y), _square(x, y), _triangle(x, y), _star(x, y)], 1)
    distance = distance[torch.arange(len(form)), form] * radius * side / 2  # in pixels, negative inside
    cover = (0.5 - distance).clamp(0, 1)[:, None]  # how much of a pixel the shape covers
    paint = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None] + uniform(-0.05, 0.05)[:, None]
    ground = uniform(0.55, 0.8)[:, None]
    images = ((cover * paint + (1 - cover) * ground + 1) * 127.5).round().to(torch.uint8)
    colours, places, sizes = list(COLOURS), list(PLACES), list(SIZES)
    captions = [
        TEMPLATE.format(colour=colours[c], form=FORMS[f], place=places[p], size=sizes[s])
        for c, f, p, s in torch.stack([colour, form, place, size], 1).tolist()
    ]
    return Shapes(images, cover[:, 0] > 0.5, captions, colour, form, place, size)


# Signed distances to the outlines of forms of radius 1, roughly; y points down.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x**2 + y**2).sqrt() - 0.9


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.8


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.15
    return torch.maximum(y - 0.5, 0.866 * x.abs() - 0.5 * y - 0.5)


def _star(x: Tensor, y: Tensor) -> Tensor:
    angle = torch.atan2(x, -y)  # from the upper tip
    sector = 2 * torch.pi / 5
    angle = (angle + sector / 2) % sector - sector / 2
    r = (x**2 + y**2).sqrt()
    # the line from the tip (radius 1.1) to the notch (radius 0.45) in a tenth of the star
    px, py = r * angle.sin().abs(), r * angle.cos()
    notch = 0.45 * torch.tensor([torch.pi / 5]).sin(), 0.45 * torch.tensor([torch.pi / 5]).cos()
    dx, dy = notch[0], notch[1] - 1.1
    return (-(px * dy - (py - 1.1) * dx)) / (dx**2 + dy**2).sqrt()


# ------------------------------------------------------------------------------------------------------- the oracle


class Oracle(nn.Module):
    """A small convolutional network that reads colour, form, place and size off a picture."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers = [(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*(layer for group in layers for layer in group), nn.AdaptiveAvgPool2d(2))
        self.heads = nn.ModuleDict({name: nn.Linear(4 * widths[-1], n) for name, n in ATTRIBUTES.items()})

    def forward(self, images: Float[Tensor, "batch 3 side side"]) -> dict[str, Float[Tensor, "batch values"]]:
        features = self.body(images).flatten(1)
        return {name: head(features) for name, head in self.heads.items()}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Mean cross-entropy over the four attributes."""
        logits = self(batch["images"])
        return torch.stack([F.cross_entropy(logits[name].float(), batch[name]) for name in ATTRIBUTES]).mean(), {}

    @torch.no_grad()
    def read(self, images: Float[Tensor, "n 3 side side"]) -> dict[str, Int[Tensor, " n"]]:
        """The likeliest value of each attribute of pictures in [-1, 1]."""
        return {name: scores.argmax(1) for name, scores in self(images.float().clamp(-1, 1)).items()}


class _NoisyShapes:
    """Endless fresh shapes under noise of many strengths, so that imperfect pictures are read well too."""

    def __init__(self, side: int, batch_size: int):
        self.side, self.batch_size, self.position = side, batch_size, 0

    def __next__(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(10**9 + self.position)
        self.position += 1
        batch = shapes(self.batch_size, self.side, seed=10**9 + self.position)
        images = batch.images.float() / 127.5 - 1
        noise = torch.randn(images.shape, generator=draw) * 0.3 * torch.rand(len(images), 1, 1, 1, generator=draw) ** 2
        blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        blur = 0.8 * torch.rand(len(images), 1, 1, 1, generator=draw)
        images = (images + blur * (blurred - images) + noise).clamp(-1, 1)
        return {"images": images} | {name: getattr(batch, name) for name in ATTRIBUTES}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@cache
def oracle(side: int = 32) -> Oracle:
    """The trained oracle for pictures of a side; trained once (half a minute), then read from the cache."""
    config = TrainingConfig(steps=250, batch_size=128, learning_rate=3e-3, warmup_steps=20, final_fraction=0.0, seed=1)
    folder = assets.cache_home() / "oracles" / f"shapes-{side}-v{_VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        run = Run(folder, config)
        run.quiet, run.track = True, False
        torch.manual_seed(1)
        return fit(Oracle(), _NoisyShapes(side, config.batch_size), run, config)


_VERSION = 1  # part of the name of cached oracles: raise it when the pictures or the network change


def shorter(captions: Sequence[str]) -> list[tuple[str, ...]]:
    """Each caption of :func:`shapes`, as often as all ways to say less of it, and these."""
    found = []
    for caption in captions:
        tables = {"colour": list(COLOURS), "form": FORMS, "place": list(PLACES), "size": list(SIZES)}
        words = {name: tables[name][index] for name, index in read_prompt(caption).items()}
        ways = [template.format(**words) for template in SHORTER]
        found.append((*[caption] * len(ways), *ways))
    return found


def read_prompt(caption: str) -> dict[str, int]:
    """The attributes that a caption of :func:`shapes` names, by their indices.

    Raises:
        ValueError: it is no such caption.
    """
    tables = {"colour": list(COLOURS), "form": list(FORMS), "place": list(PLACES), "size": list(SIZES)}
    found = {name: [i for i, word in enumerate(table) if word in caption] for name, table in tables.items()}
    if any(len(values) != 1 for values in found.values()):
        raise ValueError(f"{caption!r} does not name one colour, form, place and size")
    return {name: values[0] for name, values in found.items()}
