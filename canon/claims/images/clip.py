"""Claims of CLIP."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from canon.core.data.images import Pictures, emoji, load_pictures, to_float
from canon.core.data.shapes import COLOURS, FORMS, PLACES, SIZES, Shapes, shapes
from canon.core.data.tokenizers import BPETokenizer
from canon.core.lab import Lab, Measurement, claim
from canon.core.training.fit import fit
from canon.images.clip import (
    CLIP,
    PRESETS,
    Config,
    build,
    class_embeddings,
    image_embeddings,
    tokenize,
    train_tokenizer,
)
from canon.images.clip.gallery import TEMPLATES
from canon.images.clip.model import CHANNEL_MEAN, CHANNEL_STD
from canon.images.clip.training import STYLES, CaptionedBatches, jitter, known_emoji, tokenizer_of
from canon.images.clip.transfer import accuracy
from canon.images.clip.vision import VisionTransformer


def _laptop(seed: int, steps: int) -> Config:
    """The laptop preset, trained for so many steps."""
    preset = PRESETS["laptop"]
    return replace(preset, training=replace(preset.training, steps=steps, seed=seed, evaluate_every=0))


def _stream(
    config: Config, pictures: Pictures, tokens: Int[Tensor, "n ways length"], shuffled: bool = False
) -> CaptionedBatches:
    """Batches of pictures with their captions, or with those of others."""
    training = config.training
    if shuffled:
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(training.seed))]
    return CaptionedBatches(pictures.images, tokens, training.batch_size, training.seed, jitter)


def _all_captions(pictures: Pictures) -> list[str]:
    return [caption for captions in pictures.captions for caption in captions]


# Exactness -----------------------------------------------------------------------------------------------------------


@claim(
    "The symmetric contrastive loss pulls each pair together and pushes all others apart by their probability, and "
    "starts at the logarithm of the batch size",
    source="figure 3; section 2.3",
    passes="gradient_error <= 1e-5 and abs(initial_excess) <= 0.05",
    seeds=3,
    minutes=0.2,
)
def gradient_by_hand(lab: Lab, sabotage: bool = False) -> Measurement:
    """A fresh laptop model on 256 emoji. With logits Z = exp(t) I T^T, P the softmax of its rows, Q that of its
    columns and n pairs, dL/dZ = G = (P + Q - 2) / 2n on the diagonal and (P + Q) / 2n elsewhere; hence dL/dI =
    exp(t) G T, dL/dT = exp(t) G^T I, dL/dt = sum(G Z). `gradient_error` is the largest deviation of autograd's from
    these, relative to the largest entry of each; `initial_excess` is L / log n - 1. Sabotage: the formula knows of
    rows only, that is of a loss that asks for the caption of a picture but never for the picture of a caption.
    """
    config = _laptop(lab.seed, steps=1)
    config = replace(config, training=replace(config.training, batch_size=256))
    pictures = load_pictures("emoji", config.image_size)
    tokenizer = tokenizer_of(config, pictures)
    captions = [captions[0] for captions in pictures.captions]
    model = build(config)
    kept: list[Any] = []
    model.register_forward_hook(lambda module, inputs, outputs: kept.append(outputs))
    tokens = tokenize(tokenizer, captions, config.context_length)[:, None]
    loss, _ = model.loss(next(_stream(config, pictures, tokens)))
    images, texts, scale = kept[0]
    found = [
        *torch.autograd.grad(loss, (images, texts), retain_graph=True),
        torch.autograd.grad(loss, scale)[0] * scale,
    ]
    with torch.no_grad():
        logits = scale * images @ texts.t()
        n = len(logits)
        halves = [logits.softmax(dim=1)] if sabotage else [logits.softmax(dim=1), logits.softmax(dim=0)]
        G = (torch.stack(halves).mean(dim=0) - torch.eye(n)) / n
        expected = [scale * G @ texts, scale * G.t() @ images, (G * logits).sum()[None]]
    errors = [float((a - b).detach().abs().max() / b.abs().max()) for a, b in zip(found, expected)]
    return Measurement(gradient_error=max(errors), initial_excess=float(loss.detach()) / math.log(n) - 1)


# Prompts -------------------------------------------------------------------------------------------------------------

LEARNED = (
    "a {size} {colour} {form} {place}",
    "{colour} {form}, {size}, {place}",
    "{place} there is a {size} {form} in {colour}",
    "this is a picture of a {form}: {colour}, {size} and {place}",
    "{size} and {colour}: a {form} {place}",
    "look, a {form} {place}, it is {colour} and {size}",
    "the {form} {place} is {size} and {colour}",
    "the {colour} {form} is {size} and {place}",
    "a drawing of a {size} {form} {place} in {colour}",
    "one {form}, {colour}, {place}, rather {size}",
    "we see a {colour} {form} {place} that is {size}",
    "{form} of {size} size and {colour} colour {place}",
)
# Twelve of the released code's eighty for ImageNet; most of their words stand in no caption above.
PROMPTS = (
    "a bad photo of a {}.",
    "a rendering of a {}.",
    "a tattoo of a {}.",
    "a photo of a clean {}.",
    "a dark photo of the {}.",
    "a pixelated photo of the {}.",
    "a plastic {}.",
    "a jpeg corrupted photo of a {}.",
    "a painting of the {}.",
    "the origami {}.",
    "a sketch of a {}.",
    "itap of my {}.",
)
NAME = "{size} {colour} {form} {place}"


@claim(
    "Averaging the embeddings of several prompts classifies better than one prompt",
    source="section 3.1.4",
    passes="ensemble >= single + 0.01 and ensemble >= worst + 0.05",
    seeds=3,
    minutes=3,
)
def prompt_ensemble(lab: Lab, sabotage: bool = False) -> Measurement:
    """Shapes of 240 kinds, learned with captions of twelve templates, named with twelve prompts of the released code.

    `single` is the mean accuracy of one prompt over all, `worst` that of the worst. Sabotage: each name of the
    ensemble is averaged with prompts of other names. Where the prompts are worded like the captions, all of them work
    and there is little to gain (half a point in a trial).
    """
    drawn, test = shapes(6_000, seed=lab.seed), shapes(2_000, seed=10_000 + lab.seed)
    kinds = [
        {"size": size, "colour": colour, "form": form, "place": place}
        for colour in COLOURS
        for form in FORMS
        for place in PLACES
        for size in SIZES
    ]

    def number(of: Shapes) -> Int[Tensor, " n"]:
        return ((of.colour * len(FORMS) + of.form) * len(PLACES) + of.place) * len(SIZES) + of.size

    captions = [tuple(template.format(**kinds[kind]) for template in LEARNED) for kind in number(drawn).tolist()]
    pictures = Pictures(drawn.images, captions)
    config = replace(_laptop(lab.seed, steps=250), image_width=64, image_layers=(3,), d_model=64, d_embedding=64)
    tokenizer = train_tokenizer(_all_captions(pictures), config.vocab_size)
    tokens = tokenize(tokenizer, _all_captions(pictures), config.context_length).view(len(captions), len(LEARNED), -1)
    stream = _stream(config, pictures, tokens)
    model = fit(build(config), stream, lab.stage("clip", config.training), config.training)

    images, labels = image_embeddings(model, to_float(test.images)), number(test)

    names = [NAME.format(**kind) for kind in kinds]
    each = [class_embeddings(model, tokenizer, names, (prompt,)) for prompt in PROMPTS]
    one = [accuracy(images, classes, labels) for classes in each]
    together = class_embeddings(model, tokenizer, names, PROMPTS)
    if sabotage:
        wrong = [classes.roll(n, dims=0) for n, classes in enumerate(each)]
        together = F.normalize(torch.stack(wrong).mean(dim=0), dim=1)
    ensemble = accuracy(images, together, labels)
    rows = [{"prompt": prompt, "accuracy": value} for prompt, value in zip(PROMPTS, one)]
    lab.table("prompts", [*rows, {"prompt": "all twelve, averaged", "accuracy": ensemble}])
    return Measurement(ensemble=ensemble, single=sum(one) / len(one), worst=min(one), best=max(one))


# Transfer ------------------------------------------------------------------------------------------------------------


def _pixels(images: UInt8[Tensor, "n 3 size size"]) -> Float[Tensor, "n d"]:
    return F.adaptive_avg_pool2d(to_float(images), 16).flatten(1)


def _colours(images: UInt8[Tensor, "n 3 size size"]) -> Float[Tensor, "n 64"]:
    """A histogram of 4 x 4 x 4 colours."""
    levels = images.long() // 64
    return F.one_hot((16 * levels[:, 0] + 4 * levels[:, 1] + levels[:, 2]).flatten(1), 64).float().mean(dim=1)


def _neighbours(features: Callable[[Tensor], Tensor], size: int) -> float:
    """How often the most similar training picture has the right name, averaged over styles."""
    learned = emoji(size)
    found = []
    for style in STYLES:
        images, names, _ = known_emoji(style, size)
        closest = torch.cdist(features(images), features(learned.images)).argmin(dim=1).tolist()
        found.append(sum(learned.labels["en"][index] == name for index, name in zip(closest, names)) / len(names))
    return sum(found) / len(found)


def _learned_clip(lab: Lab, name: str, config: Config, shuffled: bool) -> tuple[CLIP, BPETokenizer]:
    """A CLIP trained on Noto's emoji."""
    pictures = load_pictures("emoji", config.image_size)
    tokenizer = tokenizer_of(config, pictures)
    ways = len(pictures.captions[0])
    tokens = tokenize(tokenizer, _all_captions(pictures), config.context_length).view(-1, ways, config.context_length)
    stream = _stream(config, pictures, tokens, shuffled)
    return fit(build(config), stream, lab.stage(name, config.training), config.training), tokenizer


def _style_accuracies(model: CLIP, tokenizer: BPETokenizer) -> list[tuple[float, float]]:
    """Zero-shot top-1 and top-5 accuracy on each style among the names of its emoji that the training style has."""
    scores = []
    for style in STYLES:
        images, names, _ = known_emoji(style, model.config.image_size)
        classes, labels = class_embeddings(model, tokenizer, names, TEMPLATES), torch.arange(len(names))
        embeddings = image_embeddings(model, to_float(images))
        scores.append((accuracy(embeddings, classes, labels), accuracy(embeddings, classes, labels, 5)))
    return scores


def _chance(size: int) -> float:
    return sum(1 / len(known_emoji(style, size)[1]) for style in STYLES) / len(STYLES)


@claim(
    "What is learned from one style of pictures names pictures of other styles that it never saw",
    source="section 3.3",
    passes="top1 >= 100 * chance and top1 >= 2 * colours and top1 >= 2 * pixels",
    partly="top1 >= 100 * chance and top1 >= 2 * colours",
    seeds=3,
    minutes=7,
)
def zero_shot_across_styles(lab: Lab, sabotage: bool = False) -> Measurement:
    """Learned from Noto's emoji with their names and tags, tested on Twitter's and Microsoft's among 1,652 and 1,594
    names, averaged. `pixels` and `colours` name a picture like the most similar Noto emoji, by 16 x 16 pixels or by a
    histogram of 64 colours. Sabotage: every picture has the captions of another.

    The neighbour in pixels needs no training and is strong, since the three houses draw most emoji alike: 29% and 25%.
    Twice that is out of reach of seven minutes; the threshold stays as it was set before that was known.
    """
    config = _laptop(lab.seed, steps=700)
    model, tokenizer = _learned_clip(lab, "clip", config, shuffled=sabotage)
    size = config.image_size
    scores = _style_accuracies(model, tokenizer)
    pixels, colours = (_neighbours(features, size) for features in (_pixels, _colours))
    rows = [{"style": style, "top-1": one, "top-5": five} for style, (one, five) in zip(STYLES, scores)]
    lab.table("naming other styles", rows)
    return Measurement(
        top1=sum(one for one, _ in scores) / len(scores),
        top5=sum(five for _, five in scores) / len(scores),
        chance=_chance(size),
        pixels=pixels,
        colours=colours,
    )


class _WordPrediction(nn.Module):
    """The control: the same image tower predicts the words of the caption (Joulin et al., 2016)."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, n_words: int):
        super().__init__()
        c = config
        self.n_words = n_words
        self.image = VisionTransformer(c.image_size, c.patch_size, c.image_width, c.image_layers[0], c.image_heads)
        self.head = nn.Linear(c.image_width, n_words)
        nn.init.normal_(self.head.weight, std=c.image_width**-0.5)
        nn.init.zeros_(self.head.bias)
        mean, std = (torch.tensor(values)[:, None, None] for values in (CHANNEL_MEAN, CHANNEL_STD))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        """log p(word | picture)."""
        return self.head(self.image(((images + 1) / 2 - self.mean) / self.std)).float().log_softmax(dim=1)

    def bags(self, tokens: Tensor) -> Tensor:
        """Each caption's words in equal shares; 0 and the last number, which end a row, are none."""
        counts = torch.zeros(len(tokens), self.n_words + 2).scatter_add_(1, tokens, torch.ones(tokens.shape))
        counts = counts[:, 1:-1]
        return counts / counts.sum(dim=1, keepdim=True)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Mean over words of -log p, averaged over pictures."""
        return -(self.bags(batch["tokens"]) * self(batch["images"])).sum(dim=1).mean(), {}


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", caption.lower())


@claim(
    "Predicting which caption belongs to a picture learns faster than predicting the words of the caption",
    source="section 2.3, figure 2",
    passes="contrastive >= 1.5 * words and words >= 5 * chance",
    partly="contrastive > words and words >= 5 * chance",
    seeds=3,
    minutes=8,
)
def contrastive_beats_words(lab: Lab, sabotage: bool = False) -> Measurement:
    """The same image tower, the same 500 batches of the same pictures and captions, the same optimiser; accuracy of
    naming the two other styles. The control names a picture by the mean log-probability of a name's words; it must be
    alive for the comparison to count. Sabotage: for the contrast only, every picture has the captions of another.
    """
    config = _laptop(lab.seed, steps=500)
    pictures = load_pictures("emoji", config.image_size)
    model, tokenizer = _learned_clip(lab, "contrastive", config, shuffled=sabotage)

    numbers = {word: n for n, word in enumerate(sorted({w for c in _all_captions(pictures) for w in _words(c)}), 1)}
    split = [[numbers[word] for word in _words(caption)] for caption in _all_captions(pictures)]
    rows = torch.zeros(len(split), max(map(len, split)) + 1, dtype=torch.long)
    for row, caption in zip(rows, split):
        row[: len(caption) + 1] = torch.tensor([*caption, len(numbers) + 1])
    torch.manual_seed(lab.seed)
    control = _WordPrediction(config, len(numbers))
    stream = _stream(config, pictures, rows.view(len(pictures.captions), -1, rows.shape[1]))
    fit(control, stream, lab.stage("words", config.training), config.training)

    scores = []
    with torch.no_grad():
        for style in STYLES:
            images, names, _ = known_emoji(style, config.image_size)
            bags = torch.zeros(len(names), len(numbers))
            for bag, name in zip(bags, names):
                bag[[numbers[word] - 1 for word in _words(name)]] = 1
            bags = bags / bags.sum(dim=1, keepdim=True)
            likely = torch.cat([control(part) for part in to_float(images).split(256)]) @ bags.t()
            scores.append(float((likely.argmax(dim=1) == torch.arange(len(names))).float().mean()))
    contrastive = [one for one, _ in _style_accuracies(model, tokenizer)]
    lab.table(
        "naming other styles",
        [{"style": s, "contrastive": a, "words": b} for s, a, b in zip(STYLES, contrastive, scores)],
    )
    return Measurement(
        contrastive=sum(contrastive) / len(contrastive),
        words=sum(scores) / len(scores),
        chance=_chance(config.image_size),
    )
