"""Captioned pictures: emoji in three styles, the user's own, and batches of them."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from canon.core.checks import check_batch
from canon.core.data import assets
from canon.core.data.picture_files import SUFFIXES, opened, upright
from canon.core.data.shapes import shapes, shorter
from canon.core.errors import UserError, disk_errors, require

Style = Literal["noto", "twemoji", "fluent"]
LANGUAGES = ("en", "de", "fr", "zh")
THINGS = ("smileys & emotion", "animals & nature", "food & drink", "activities")
DROPPED_CAPTIONS = 0.1  # as in Stable Diffusion and Imagen
LARGEST = 64 << 20  # pixels of a picture that is opened

_ASSETS: dict[Style, str] = {"noto": "noto-emoji", "twemoji": "twemoji", "fluent": "fluent-emoji"}
_VERSION = 1  # part of the name of cached drawings: raise it when what they hold changes


@dataclass(frozen=True)
class Emoji:
    """The emoji that one style has, in Unicode's order."""

    images: UInt8[Tensor, "emoji 3 size size"]
    """Drawn on white."""
    characters: list[str]
    """The emoji itself."""
    groups: list[str]
    """Unicode's category, such as ``food & drink``: stratify by it, since a quarter are people."""
    labels: dict[str, list[str]]
    """By language (en, de, fr, zh): the name, such as ``red apple``."""
    tags: dict[str, list[list[str]]]
    """By language: words that go with it, such as ``apple, fruit, red``."""


def emoji(size: int = 32, style: Style = "noto") -> Emoji:
    """Emoji as pictures with names and tags in four languages.

    Args:
        size: of the pictures, in pixels.
        style: noto to learn from; twemoji and fluent to test what was learned on drawings of another hand.

    Raises:
        UserError: the drawings cannot be fetched, or the [images] extra is missing.
    """
    drawings = json.loads((assets.fetch(_ASSETS[style]) / "chars.json").read_bytes())
    drawn = {_key(code): name for code, name in drawings.items()}
    rows = [row for row in _names("en") if _key(row["hexcode"]) in drawn and "group" in row]
    images = _drawn(style, size, [drawn[_key(row["hexcode"])] for row in rows])
    groups = json.loads((assets.fetch("emoji-names") / "en" / "messages.json").read_bytes())["groups"]
    group_names = {group["order"]: group["message"] for group in groups}
    translated = {language: {row["hexcode"]: row for row in _names(language)} for language in LANGUAGES}
    return Emoji(
        images=images,
        characters=[row["emoji"] for row in rows],
        groups=[group_names[row["group"]] for row in rows],
        labels={lang: [table[row["hexcode"]]["label"] for row in rows] for lang, table in translated.items()},
        tags={lang: [table[row["hexcode"]].get("tags", []) for row in rows] for lang, table in translated.items()},
    )


def _key(code: str) -> str:
    return code.lower().replace("-fe0f", "")  # a selector that fonts leave out as they like


def _names(language: str) -> list[dict[str, Any]]:
    return json.loads((assets.fetch("emoji-names") / language / "data.json").read_bytes())


def _drawn(style: Style, size: int, names: list[str]) -> UInt8[Tensor, "emoji 3 size size"]:
    """Pictures of the named drawings; drawn once (seconds), then read from the cache."""
    version = assets.find(_ASSETS[style]).version
    path = assets.cache_home() / "images" / f"{style}-{version}-{size}-v{_VERSION}.npy"
    with disk_errors(f"emoji to {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            if not path.is_file() or len(np.load(path, mmap_mode="r")) != len(names):
                resvg = require("resvg_py", "images")
                icons = json.loads((assets.fetch(_ASSETS[style]) / "icons.json").read_bytes())
                box = f"0 0 {icons['width']} {icons.get('height', icons['width'])}"
                pictures = []
                for name in names:
                    svg = _SVG.format(box=box, size=size, body=_icon(icons, name))
                    pictures.append(np.asarray(Image.open(io.BytesIO(bytes(resvg.svg_to_bytes(svg)))).convert("RGB")))
                partial = path.with_suffix(".part")
                with partial.open("wb") as file:
                    np.save(file, np.stack(pictures).transpose(0, 3, 1, 2))
                partial.replace(path)
    return torch.from_numpy(np.load(path))


_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
    'width="{size}" height="{size}"><rect x="-10%" y="-10%" width="120%" height="120%" fill="white"/>{body}</svg>'
)


def _icon(icons: dict[str, Any], name: str) -> str:
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    return icons["icons"][name]["body"]


# ------------------------------------------------------------------------------------------------ pictures to learn


@dataclass(frozen=True)
class Pictures:
    """Pictures to learn from, each with one caption or several that say it differently."""

    images: UInt8[Tensor, "pictures 3 size size"]
    captions: list[tuple[str, ...]]


def load_pictures(source: str, size: int) -> Pictures:
    """Captioned pictures by name, or from a folder.

    Args:
        source: ``emoji`` (all), ``things`` (the 547 emoji of faces, animals, plants, food and games), ``shapes``
            (6,000 drawn ones, fully described half of the time), or a folder: every picture in it has its caption in a
            text file of the same name, one caption a line.
        size: the side of the pictures; those of a folder are cut square in the middle and resized.

    Raises:
        UserError: there is nothing to learn from, or a picture cannot be used.
    """
    if source in ("emoji", "things"):
        every = emoji(size)
        kept = [index for index, group in enumerate(every.groups) if source == "emoji" or group in THINGS]
        captions = [_phrases(every.labels["en"][index], every.tags["en"][index]) for index in kept]
        return Pictures(every.images[kept], captions)
    if source == "shapes":
        drawn = shapes(6_000, size)
        return Pictures(drawn.images, shorter(drawn.captions))
    return _folder(Path(source).expanduser(), size)


def _phrases(label: str, tags: Sequence[str]) -> tuple[str, ...]:
    """Ways to ask for one emoji."""
    some = [tag for tag in tags if tag not in label][:4]
    longer = (f"{label}, {', '.join(some)}", f"{', '.join(some)}, {label}") if some else (label, label)
    return (label, f"a {label}", f"a picture of {label}", *longer)


def _folder(folder: Path, size: int) -> Pictures:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of pictures; data is emoji, things, shapes or such a folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no picture ({', '.join(SUFFIXES)}): put pictures there, each with a .txt")
    images, captions = [], []
    for file in files:
        words = file.with_suffix(".txt")
        lines = words.read_text("utf-8", "replace").splitlines() if words.is_file() else []
        phrases = tuple(line.strip() for line in lines if line.strip())
        if not phrases:
            raise UserError(f"{file} has no caption: write it into {words.name} beside it, one caption a line")
        images.append(to_uint8(open_image(file, size)))
        captions.append(phrases)
    return Pictures(torch.stack(images), captions)


def open_image(path: str | Path, size: int | None = None, background: str = "white") -> Float[Tensor, "3 height width"]:
    """A picture from a file, in [-1, 1], upright as its EXIF data say.

    Args:
        path: PNG, JPEG, WebP, BMP or GIF (its first frame).
        size: cut the largest square out of the middle and resize it to this side; None keeps it as it is.
        background: colour of what is transparent.

    Raises:
        UserError: there is no such file, it is damaged, too large, or its pixels are not colours or grey levels.
    """
    path = Path(path)
    try:
        with opened(path, LARGEST) as file:
            if file.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
                raise UserError(f"{path} has pixels of mode {file.mode}: save it as an ordinary RGB or grey picture")
            picture = upright(file).convert("RGBA")
            opaque = Image.new("RGBA", picture.size, background)
            opaque.alpha_composite(picture)
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is no readable picture ({' '.join(str(error).split())[:80]})") from error
    picture = opaque.convert("RGB")
    if size is not None:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))
    return to_float(torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def to_float(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to bytes; what lies outside is clipped.

    Raises:
        UserError: a pixel is not a number.
    """
    if not bool(images.isfinite().all()):
        raise UserError("the picture has pixels that are not numbers (NaN or infinite)")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def sheet(images: Float[Tensor, "n 3 height width"], columns: int, scale: int = 3, gap: int = 2) -> Image.Image:
    """A contact sheet: pictures in [-1, 1] row by row, each pixel ``scale`` wide, on white."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    page = Image.new("RGB", (columns * (width * scale + gap) - gap, rows * (height * scale + gap) - gap), "white")
    for index, picture in enumerate(to_uint8(images.float().cpu())):
        tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        page.paste(tile, (index % columns * (width * scale + gap), index // columns * (height * scale + gap)))
    return page


# ------------------------------------------------------------------------------------------------------- batches

Augment = Callable[[Float[Tensor, "batch 3 size size"], torch.Generator], Float[Tensor, "batch 3 size size"]]


class PictureBatches:
    """Pictures and captions in endless random order, the same after a resume.

    Args:
        images: bytes, or numbers that stand for pictures (latents).
        tokens: captions of each picture as token ids; one of the ``ways`` is drawn at every use.
        batch_size: pictures a batch; no picture stands twice in one.
        seed: of the order, the choice of captions, and the augmentation.
        augment: changes float pictures at random, drawing from the generator it is given.
        noise: shape of the standard normal ``noise`` of each picture, for systems that learn to remove it; with it come
            the times ``t``, uniform in [0, 1). Drawn here, they are a function of the position alone, however many
            processes share the batch.
        empty: tokens that take the place of a tenth of the captions, for classifier-free guidance.

    Yields ``{"images": Float[Tensor, "batch 3 size size"] in [-1, 1], "tokens": Int[Tensor, "batch length"]}``, with
    ``noise`` also ``"noise": Float[Tensor, "batch *noise"]`` and ``"t": Float[Tensor, "batch"]``.

    Raises:
        UserError: there are fewer pictures than a batch holds.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "n 3 size size"] | Float[Tensor, "n channels size size"],
        tokens: Int[Tensor, "n ways length"],
        batch_size: int,
        seed: int = 0,
        augment: Augment | None = None,
        noise: tuple[int, ...] | None = None,
        empty: Int[Tensor, " length"] | None = None,
    ):
        check_batch(len(images), batch_size)
        self.images, self.tokens, self.batch_size, self.augment = images, tokens, batch_size, augment
        self.noise, self.empty, self.seed, self.position = noise, empty, seed, 0

    def __iter__(self) -> "PictureBatches":
        return self

    def __next__(self) -> dict[str, Tensor]:
        epoch, place = divmod(self.position, len(self.images) // self.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        rows = torch.from_numpy(order[place * self.batch_size : (place + 1) * self.batch_size])
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.position)
        way = torch.randint(self.tokens.shape[1], rows.shape, generator=draw)
        images = self.images[rows]
        images = to_float(images) if images.dtype == torch.uint8 else images
        self.position += 1
        batch = {"images": self.augment(images, draw) if self.augment else images, "tokens": self.tokens[rows, way]}
        if self.noise is not None:
            batch["noise"] = torch.randn(len(rows), *self.noise, generator=draw)
            batch["t"] = torch.rand(len(rows), generator=draw)
        if self.empty is not None:
            dropped = torch.rand(len(rows), 1, generator=draw) < DROPPED_CAPTIONS
            batch["tokens"] = torch.where(dropped, self.empty, batch["tokens"])
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position, as plain JSON values."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.position = int(state["position"])


def jitter(
    images: Float[Tensor, "batch 3 size size"], generator: torch.Generator, shift: float = 0.06, scale: float = 0.1
) -> Float[Tensor, "batch 3 size size"]:
    """Move and resize each picture a little and mirror half of them; what comes in from outside is white.

    Args:
        images: in [-1, 1].
        generator: of the random numbers.
        shift: largest move, as a fraction of the side.
        scale: largest change of the size.
    """
    batch = len(images)
    zoom = 1 + scale * (2 * torch.rand(batch, generator=generator) - 1)
    mirror = 1 - 2.0 * (torch.rand(batch, generator=generator) < 0.5)
    move = 2 * shift * (2 * torch.rand(batch, 2, generator=generator) - 1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * mirror, zoom, move
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return 1 + torch.nn.functional.grid_sample(images - 1, grid, align_corners=False)
