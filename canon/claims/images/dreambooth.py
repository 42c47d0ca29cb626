"""Claims of DreamBooth, on shapes: a function tells the two-coloured subject and its place, an oracle the others.

They tune the model of shapes that comes with the repository; data order, identifier and noise change with the seed.
"""

from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from canon.core.data.shapes import COLOURS, FORMS, PLACES, SIZES, oracle
from canon.core.data.tokenizers import BPETokenizer
from canon.core.lab import Lab, Measurement, claim
from canon.core.training.fit import fit
from canon.images.dreambooth import PRESETS, Config, DreamBooth, PairBatches, batches, build, draw, load_base, prompts
from canon.images.latent_diffusion import LatentDiffusion
from canon.images.latent_diffusion.sampling import captions


def _with_seed(lab: Lab, **changes) -> Config:
    """The laptop preset with the lab's seed."""
    config = replace(PRESETS["laptop"], **changes)
    return replace(config, training=replace(config.training, seed=lab.seed))


def _tuned(lab: Lab, name: str, config: Config, stream: PairBatches | None = None) -> DreamBooth:
    return fit(build(config), stream or batches(config), lab.stage(name, config), config.training)


def _samples(model: LatentDiffusion, asked: list[str], seed: int) -> Float[Tensor, "n 3 32 32"]:
    """One picture of each prompt, a hundred at a time."""
    tokenizer = _tokenizer()
    parts = [
        draw(model, tokenizer, asked[start : start + 100], steps=20, seed=1000 * seed + start)
        for start in range(0, len(asked), 100)
    ]
    return torch.cat(parts)


def _tokenizer() -> BPETokenizer:
    return load_base("")[1]


def _mask(images: Float[Tensor, "n 3 32 32"]) -> Bool[Tensor, "n 32 32"]:
    """Where the shape is: what differs from the median colour, the ground, by half of what paint differs from it."""
    ground = images.flatten(2).median(2).values[..., None, None]
    return (images - ground).abs().amax(1) > 0.65


def _is_subject(images: Float[Tensor, "n 3 32 32"]) -> Bool[Tensor, " n"]:
    """Whether blue and yellow each are the nearest paint of a quarter of the shape's pixels, at least twenty in all."""
    paints = torch.tensor(list(COLOURS.values()))
    nearest = (images[:, None] - paints[None, :, :, None, None]).square().sum(2).argmin(1)
    mask = _mask(images)
    size = mask.sum((1, 2))
    shares = [(mask & (nearest == list(COLOURS).index(name))).sum((1, 2)) / size for name in ("blue", "yellow")]
    return (size >= 20) & (shares[0] >= 0.25) & (shares[1] >= 0.25)


def _place(images: Float[Tensor, "n 3 32 32"]) -> Int[Tensor, " n"]:
    """The place nearest to the middle of the shape."""
    mask, axis = _mask(images).float(), (torch.arange(32) + 0.5) / 16 - 1
    size = mask.sum((1, 2)).clamp(min=1)
    middle = torch.stack([(mask.sum(1) * axis).sum(1) / size, (mask.sum(2) * axis).sum(1) / size], 1)
    return torch.cdist(middle, torch.tensor(list(PLACES.values()))).argmin(1)


def _share(found: Bool[Tensor, " n"]) -> float:
    return float(found.float().mean())


@claim(
    "Four pictures bind a subject to a rare word: it is drawn when it is named, also in places that are asked for",
    source="sections 3.2 and 4.2, figures 1 and 7",
    passes="subject_after >= 0.80 and subject_before <= 0.05 and context_obeyed >= 0.70",
    seeds=3,
    minutes=5,
)
def a_rare_word_names_the_subject(lab: Lab, sabotage: bool = False) -> Measurement:
    """The laptop preset. 64 samples of "a [V] square" before and after; then 80 whose prompts ask for a size and one of
    five places, which no picture's caption named and of which one was never shown: `context_obeyed` is the share at
    the right place, `subject_in_context` that of the subject. Sabotage: the pictures are captioned without the word.
    """
    config = _with_seed(lab)
    stream, original = batches(config), load_base("")[0]
    if sabotage:
        stream.tokens = captions(original, _tokenizer(), [prompts(config)[1]] * 2)
    model = _tuned(lab, "subject", config, stream)
    named, _ = prompts(model.config)
    word, noun = model.config.identifier, config.class_noun
    asked = [(place, f"a {size} {word} {noun} {place}") for size, place in product(SIZES, PLACES) for _ in range(8)]
    drawn = _samples(model.model, [text for _, text in asked], lab.seed)
    places = torch.tensor([list(PLACES).index(place) for place, _ in asked])
    return Measurement(
        subject_after=_share(_is_subject(_samples(model.model, [named] * 64, lab.seed))),
        subject_before=_share(_is_subject(_samples(original, [named] * 64, lab.seed))),
        context_obeyed=_share(_place(drawn) == places),
        subject_in_context=_share(_is_subject(drawn)),
    )


@claim(
    "Without prior preservation the class becomes the subject and loses its variety; with it, it does not",
    source="section 3.3 and table 3",
    passes="drift_without >= 0.30 and drift_with <= 0.10 and variety_with >= 0.90 and variety_without <= 0.75",
    seeds=3,
    minutes=6,
)
def prior_preservation_stops_drift(lab: Lab, sabotage: bool = False) -> Measurement:
    """128 samples of "a square": the share that shows the subject, and the mean standard deviation of a pixel over them
    as a fraction of the original model's. Sabotage: lambda is 0 in both.
    """
    original, asked = load_base("")[0], [prompts(_with_seed(lab))[1]] * 128

    def variety(images: Tensor) -> float:
        return float(images.std(0).mean())

    before = variety(_samples(original, asked, lab.seed))
    numbers = {}
    for name, weight in (("with", 0.0 if sabotage else 1.0), ("without", 0.0)):
        images = _samples(_tuned(lab, name, _with_seed(lab, prior_weight=weight)).model, asked, lab.seed)
        numbers |= {f"drift_{name}": _share(_is_subject(images)), f"variety_{name}": variety(images) / before}
    return Measurement(**numbers)


@claim(
    "A common word as identifier loses its own meaning; a rare one has none to lose",
    source="section 3.2 (rare-token identifiers)",
    passes="drop_common - drop_rare >= 0.20",
    seeds=3,
    minutes=6,
)
def a_common_word_is_damaged(lab: Lab, sabotage: bool = False) -> Measurement:
    """Colour and form, read by the oracle off 120 samples whose prompts ask for something red, before and after tuning
    with the identifier "red", and with a rare one. Sabotage: both are rare.
    """
    every = [*product(FORMS, PLACES, SIZES)] * 3
    asked = [f"a {size} red {form} {place}" for form, place, size in every]
    wanted = torch.tensor([FORMS.index(form) for form, _, _ in every])

    def accuracy(model: LatentDiffusion) -> float:
        read = oracle(32).read(_samples(model, asked, lab.seed))
        return _share((read["colour"] == list(COLOURS).index("red")) & (read["form"] == wanted))

    before = accuracy(load_base("")[0])
    common = _tuned(lab, "common", _with_seed(lab, identifier="" if sabotage else "red"))
    rare = _tuned(lab, "rare", _with_seed(lab))
    return Measurement(
        drop_common=before - accuracy(common.model), drop_rare=before - accuracy(rare.model), accuracy_before=before
    )
