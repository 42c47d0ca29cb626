"""What a person sees of a CLIP: pictures found by words, pictures named, and the table of how often that is right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from canon.core.data.images import SUFFIXES, load_pictures, open_image, sheet, to_float, to_uint8
from canon.core.data.tokenizers import BPETokenizer
from canon.core.errors import UserError
from canon.core.lab import Run
from canon.core.lab.labels import TEXT, cut
from canon.images.clip.model import CLIP
from canon.images.clip.tokenizer import load_clip_tokenizer
from canon.images.clip.training import STYLES, known_emoji
from canon.images.clip.transfer import (
    accuracy,
    class_embeddings,
    image_embeddings,
    image_features,
    linear_probe,
    probabilities,
)

TEMPLATES = ("{}", "a {}", "a picture of {}")
QUERIES = ("red fruit", "a happy face", "an animal in the sea", "something to drink", "flowers", "a car", "music")
SHOWN = ("red apple", "dog face", "rocket", "guitar", "rose", "pizza", "crab", "sun", "airplane", "money bag")
_SIDE = 72  # of an emoji on a sheet, in pixels


class Gallery:
    """Pictures to search, with their features and embeddings.

    Args:
        model: a trained model.
        title: what they are.
        images: as the model sees them.
        shown: the same for the eye, perhaps larger.
        names: of each picture, if known.
        groups: what kind of thing each shows, if known.
    """

    def __init__(
        self,
        model: CLIP,
        title: str,
        images: Float[Tensor, "n 3 size size"],
        shown: UInt8[Tensor, "n 3 side side"],
        names: Sequence[str] = (),
        groups: Sequence[str] = (),
    ):
        self.title, self.shown, self.names, self.groups = title, shown, list(names), list(groups)
        with torch.no_grad():
            self.features = image_features(model, images)
            self.embeddings = F.normalize(model.image_projection(self.features).float(), dim=1).cpu()


def galleries(model: CLIP, folder: str = "") -> list[Gallery]:
    """The pictures to search: those of a folder, or what the model was trained on; of emoji, all three styles.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    config, size = model.config, model.config.image_size
    if folder:
        files = sorted(file for file in Path(folder).expanduser().glob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{folder} is no folder of pictures ({', '.join(SUFFIXES)})")
        images = torch.stack([open_image(file, size) for file in files])
        large = torch.stack([to_uint8(open_image(file, 2 * _SIDE)) for file in files])
        return [Gallery(model, folder, images, large, [file.stem for file in files])]
    if config.data != "emoji":
        pictures = load_pictures(config.data, size)
        names = [captions[0] for captions in pictures.captions]
        return [Gallery(model, config.data, to_float(pictures.images), pictures.images, names)]
    found = []
    for style in ("noto", *STYLES):
        images, names, groups = known_emoji(style, size)
        found.append(Gallery(model, style, to_float(images), known_emoji(style, _SIDE)[0], names, groups))
    return found


def retrieval_sheet(
    model: CLIP, tokenizer: BPETokenizer, query: str, places: Sequence[Gallery], top: int = 8
) -> Image.Image:
    """The pictures that fit a text best, one row for each gallery, best first."""
    text = class_embeddings(model, tokenizer, [query], TEMPLATES)[0].float().cpu()
    rows = []
    for place in places:
        best = (place.embeddings @ text).topk(min(top, len(place.shown))).indices
        rows.append(sheet(to_float(place.shown[best]), columns=top, scale=1, gap=6))
    font = ImageFont.load_default(size=15)
    margin = 8 + max(int(font.getlength(place.title)) for place in places) + 8
    height = sum(row.height + 8 for row in rows)
    page = Image.new("RGB", (margin + max(row.width for row in rows) + 8, 36 + height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((8, 8), f"“{query}”", "black", ImageFont.load_default(size=18))
    y = 36
    for place, row in zip(places, rows):
        draw.text((8, y + row.height // 2 - 8), place.title, "gray", font)
        page.paste(row, (margin, y))
        y += row.height + 8
    return page


def sample(
    model: CLIP, run: Run, prompt: str = "", *, top: int = 8, names: str = "", pictures: str = ""
) -> str | Image.Image:
    """Pictures for a text, names for a picture, or without a prompt an overview of both; kept among the samples.

    Args:
        model: a trained model.
        run: the run that trained it, which holds its tokenizer.
        prompt: words, for which pictures are found; or a picture's file, which is named.
        top: how many pictures or names.
        names: of the classes, separated by commas; by default those of the training pictures.
        pictures: a folder to search; by default the training pictures, and of emoji two other styles as well.

    Raises:
        UserError: a picture cannot be read, the prompt names one that is not there, or ``top`` is below 1.
    """
    if top < 1:
        raise UserError(f"top must be at least 1, not {top}")
    tokenizer = load_clip_tokenizer(run.path / "model")
    if not prompt:
        return _overview(model, tokenizer, run, galleries(model, pictures))
    if _is_picture(prompt):
        image = open_image(prompt, model.config.image_size)
        classes = [name.strip() for name in names.split(",") if name.strip()] or _known_names(model)
        text = _named(model, tokenizer, image, classes, top)
        run.text(f"names of {prompt}", text)
        return text
    page = retrieval_sheet(model, tokenizer, prompt, galleries(model, pictures), top)
    run.image(f"“{prompt}”", page)
    return page


def _is_picture(prompt: str) -> bool:
    """Whether the prompt is a file; what looks like one and is none is refused, for else its name would be looked for.

    Raises:
        UserError: it is a folder, or it ends like a picture and is not there.
    """
    try:
        if Path(prompt).is_file():
            return True
        folder = Path(prompt).is_dir()
    except (OSError, ValueError):  # longer than a name may be, or with a zero byte: a text
        return False
    if folder:
        raise UserError(f"{prompt} is a folder: search it with --pictures, or to search for the word say 'a {prompt}'")
    if Path(prompt).suffix.lower() in SUFFIXES:
        raise UserError(f"there is no picture {prompt}: check the path, or leave out the ending to search for words")
    return False


def _known_names(model: CLIP) -> list[str]:
    """The names of what it was trained on, each once."""
    if model.config.data == "emoji":
        return known_emoji("noto", model.config.image_size)[1]
    pictures = load_pictures(model.config.data, model.config.image_size)
    return list(dict.fromkeys(captions[0] for captions in pictures.captions))


def _named(
    model: CLIP, tokenizer: BPETokenizer, image: Float[Tensor, "3 size size"], names: Sequence[str], top: int
) -> str:
    classes = class_embeddings(model, tokenizer, names, TEMPLATES)
    likely = probabilities(model, image_embeddings(model, image[None]), classes)[0].topk(min(top, len(names)))
    pairs = zip(likely.values.tolist(), likely.indices.tolist())
    return "\n".join(f"{p:6.1%}  {names[index]}" for p, index in pairs)


def _overview(model: CLIP, tokenizer: BPETokenizer, run: Run, places: Sequence[Gallery]) -> str:
    """Sheets of found pictures, how often each gallery's pictures are named right, and figures of a few of them."""
    known = set().union(*(place.names for place in places))
    queries = QUERIES if model.config.data == "emoji" else sorted(known)[:: max(1, len(known) // 6)][:6]
    for query in queries:
        run.image(f"“{query}”", retrieval_sheet(model, tokenizer, query, places))
    probe = _probe_of_kinds(places[0]) if places[0].groups else None
    rows = [_scores(model, tokenizer, place, probe) for place in places]
    run.table("naming pictures by their closest name", rows)
    run.summary(**{f"{row['pictures']}_top1": row["top-1"] for row in rows})
    place = places[-1] if len(places) == 1 else places[1]
    chosen = [place.names.index(name) for name in SHOWN if name in place.names] or list(range(min(10, len(known))))
    run.figure(f"names for pictures: {place.title}", names_figure(model, tokenizer, place, chosen))
    run.figure(f"pictures and names: {place.title}", similarity_figure(model, tokenizer, place, chosen))
    return "\n".join(
        f"{row['pictures']}: {row['top-1']:.1%} of {row['number']} named right, {row['top-5']:.1%} within the first 5 "
        f"of {row['names']} names (chance {1 / row['names']:.2%})"
        for row in rows
    )


def _scores(
    model: CLIP, tokenizer: BPETokenizer, place: Gallery, probe: tuple[nn.Linear, list[str]] | None
) -> dict[str, Any]:
    names = list(dict.fromkeys(place.names))
    classes = class_embeddings(model, tokenizer, names, TEMPLATES).float().cpu()
    labels = torch.tensor([names.index(name) for name in place.names])
    row: dict[str, Any] = {"pictures": place.title, "number": len(place.names), "names": len(names)}
    for top in (1, 5):
        row[f"top-{top}"] = accuracy(place.embeddings, classes, labels, min(top, len(names)))
    if probe is not None:
        linear, kinds = probe
        guessed = linear(place.features).argmax(dim=1).tolist()
        right = sum(kinds[guess] == kind for guess, kind in zip(guessed, place.groups))
        row[f"kind of {len(kinds)}, by a linear probe"] = right / len(guessed)
    return row


def _probe_of_kinds(place: Gallery) -> tuple[nn.Linear, list[str]]:
    """A linear probe on a gallery's features for the kind of thing each picture shows, and the kinds."""
    kinds = sorted(set(place.groups))
    labels = torch.tensor([kinds.index(group) for group in place.groups], device=place.features.device)
    return linear_probe(place.features, labels, len(kinds), max_iterations=200), kinds


def names_figure(model: CLIP, tokenizer: BPETokenizer, place: Gallery, chosen: Sequence[int], top: int = 5) -> Figure:
    """Pictures beside their likeliest names and how likely each is; the right one is dark."""
    names = list(dict.fromkeys(place.names))
    classes = class_embeddings(model, tokenizer, names, TEMPLATES)
    images = place.embeddings[list(chosen)].to(classes.device)
    likely = probabilities(model, images, classes).float().cpu().topk(min(top, len(names)), dim=1)
    rows = -(-len(chosen) // 2)
    figure = Figure(figsize=(9, 1.25 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False, width_ratios=(1, 3.4, 1, 3.4))
    for ax in axes.flat:
        ax.axis("off")
    for n, index in enumerate(chosen):
        picture, bars = axes[n // 2][2 * (n % 2)], axes[n // 2][2 * (n % 2) + 1]
        picture.imshow(place.shown[index].permute(1, 2, 0))
        for line, (p, label) in enumerate(zip(likely.values[n].tolist(), likely.indices[n].tolist())):
            right = names[label] == place.names[index]
            bars.barh(-line, p, color="tab:blue" if right else "lightgray")
            bars.text(0.01, -line, f"{cut(names[label])}  {p:.0%}", va="center", fontsize=8, **TEXT)
        bars.set_xlim(0, 1)
    return figure


def similarity_figure(model: CLIP, tokenizer: BPETokenizer, place: Gallery, chosen: Sequence[int]) -> Figure:
    """Cosine of every picture with every name; the diagonal should be dark."""
    names = [place.names[index] for index in chosen]
    texts = class_embeddings(model, tokenizer, names, TEMPLATES).float().cpu()
    cosines = texts @ place.embeddings[list(chosen)].t()
    figure = Figure(figsize=(0.62 * len(chosen) + 2.2, 0.62 * len(chosen) + 0.7), layout="constrained")
    grid = figure.subplots()
    grid.imshow(cosines, cmap="Blues")
    for column, index in enumerate(chosen):  # each above its column
        grid.imshow(place.shown[index].permute(1, 2, 0), extent=(column - 0.42, column + 0.42, -0.6, -1.44))
    grid.set_xlim(-0.5, len(chosen) - 0.5)
    grid.set_ylim(len(chosen) - 0.5, -1.5)
    grid.set_frame_on(False)
    grid.set_yticks(range(len(names)), map(cut, names), fontsize=9, **TEXT)
    grid.set_xticks([])
    for (row, column), value in zip(torch.cartesian_prod(*[torch.arange(len(names))] * 2).tolist(), cosines.flatten()):
        light = float(value) > float(cosines.min() + 0.6 * (cosines.max() - cosines.min()))
        grid.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if light else "black"
        )
    return figure
