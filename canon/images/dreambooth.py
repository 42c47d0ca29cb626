"""DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation (Ruiz et al., 2022).

Paper: https://arxiv.org/abs/2208.12242 (CVPR 2023)

The idea. Three to five pictures of one subject, captioned "a [V] dog" with a word V that means nothing yet, are enough
to teach a diffusion model that subject, if all of it is tuned. What keeps it from forgetting what other dogs look like
are its own pictures of "a dog", drawn before the tuning and learned along:

    E [ w_t || x^(a_t x + s_t e, c) - x ||^2 + lambda w_t' || x^(a_t' x_pr + s_t' e', c_pr) - x_pr ||^2 ]        (Eq. 2)

Faithful. Every layer of the U-Net and the text encoder is tuned, on pairs of a subject's and a class's picture, each
with its own noise and time; lambda = 1; the class's pictures come from the frozen original by ancestral sampling, a
thousand of them; V is drawn among rare tokens of at most three characters, by their rank; the metrics DINO, CLIP-I,
CLIP-T, PRES and DIV, of whatever network is given to them.

Scaled down. `laptop` teaches a small latent diffusion model of shapes, which are of one colour each, a square that is
yellow above and blue below, from four pictures of it and 128 of the class.

Deviations.
    paper                        ours                            why
    Imagen, with its two         latent diffusion, as in the     our Imagen's cascade is its own system
    super-resolution stages      paper's second half
    ranks 5,000 to 10,000 of     40,000 and more of CLIP's; of   other vocabularies; a small one has no words of
    T5-XXL's tokens              a small model those that its    three characters that are rare and known
                                 captions never use
    DINO's features              VGG-16's (LPIPS) by default     comes with the autoencoder; give any other network

Run. `canon run dreambooth`, on the model of shapes that comes with the repository or the one given as --base: 28
seconds of training on one thread, after the class's pictures are drawn.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn

from canon.core.data.images import SUFFIXES, load_pictures, open_image, sheet, to_float, to_uint8
from canon.core.data.shapes import COLOURS, FORMS, PLACES, SIZES, draw_shapes
from canon.core.data.tokenizers import BPETokenizer
from canon.core.device import pick_device
from canon.core.errors import UserError
from canon.core.generation import diffusion
from canon.core.generation.diffusion_samplers import last
from canon.core.hub import pretrained
from canon.core.lab import Run
from canon.core.lab.maps import picture_figure
from canon.core.training.fit import TrainingConfig, fit
from canon.images import latent_diffusion
from canon.images.clip.tokenizer import load_clip_tokenizer
from canon.images.latent_diffusion import LatentDiffusion, load_base, load_base_of
from canon.images.latent_diffusion.first_stage import lpips
from canon.images.latent_diffusion.sampling import SamplerName, captions, generate

LONGEST = 3  # characters of a rare word
Embed = Callable[[Float[Tensor, "n 3 size size"]], Float[Tensor, "n features"]]


@dataclass(frozen=True)
class Config:
    """The subject, what keeps the class, and how both are learned; all shapes are those of the base."""

    base: str = ""
    """The latent diffusion model to tune: a run of it, or Stable Diffusion; by default the one of shapes here."""
    data: str = "sprite"
    """The subject: sprite (a square in two colours, drawn), or a folder with three to five pictures of it."""
    class_noun: str = "square"
    """What the subject is one of."""
    identifier: str = ""
    """The word V that stands for the subject; by default a rare one, drawn by rank and seed."""
    ranks: tuple[int, int] = (5_000, 10_000)
    """Rarity of the words that V is drawn from: first rank, and the one behind the last; 0 is the commonest token."""
    prior_images: int = 1_000
    """Pictures of the class that the original model draws."""
    prior_steps: int = 100
    """Steps of the ancestral sampler that draws them."""
    prior_guidance: float = 4.0
    """Weight of the class's prompt when they are drawn."""
    prior_weight: float = 1.0
    """Lambda: weight of the prior preservation; 0 is none."""
    contexts: tuple[str, ...] = (
        "a small [V] {} in the middle",
        "a large [V] {} at the top left",
        "a small [V] {} at the bottom right",
    )
    """Prompts for the report, with {} for the class noun: what the subject's pictures do not show."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it learns; a batch of n is n pictures of the subject and n of the class."""

    def __post_init__(self) -> None:
        if not self.class_noun.strip():
            raise UserError("class_noun is empty: say what the subject is, such as --class-noun dog")
        if self.prior_images < 1 or self.prior_steps < 1 or not 0 <= self.prior_weight < math.inf:
            raise UserError(
                "prior_images and prior_steps must be at least 1, prior_weight at least 0 (preserve nothing)"
            )
        if not math.isfinite(self.prior_guidance):
            raise UserError(f"prior_guidance must be a finite number, not {self.prior_guidance}")


PRESETS = {
    "laptop": Config(
        ranks=(100, 600),
        prior_images=128,
        prior_steps=50,
        training=TrainingConfig(steps=400, batch_size=4, learning_rate=2e-4, schedule="constant", beta2=0.999),
    ),
    "sd-v1": Config(
        base="stable-diffusion-v1-5/stable-diffusion-v1-5",
        ranks=(40_000, 49_406),
        prior_guidance=7.5,
        contexts=("a [V] {} on the beach", "a [V] {} in the jungle", "a painting of a [V] {}", "a red [V] {}"),
        training=TrainingConfig(
            steps=1_000, batch_size=1, learning_rate=5e-6, schedule="constant", beta2=0.999, weight_decay=0.01
        ),
    ),
}


def sprite(size: int) -> UInt8[Tensor, "4 3 size size"]:
    """The laptop's subject: a large square, yellow above blue, at four of the five places."""
    place = torch.tensor([list(PLACES).index(name) for name in PLACES if name != "at the bottom right"])
    form, large = (torch.full((4,), list(table).index(name)) for table, name in ((FORMS, "square"), (SIZES, "large")))
    yellow, blue = (
        draw_shapes(
            torch.full((4,), list(COLOURS).index(name)), form, place, large, side=size,
            generator=torch.Generator().manual_seed(0),
        )
        for name in ("yellow", "blue")
    )  # fmt: skip
    rows = yellow.masks.any(2).float()
    middle = (rows.argmax(1) + size - rows.flip(1).argmax(1)) / 2
    above = torch.arange(size) < middle[:, None]
    return torch.where(above[:, None, :, None], yellow.images, blue.images)


def subject(data: str, size: int) -> UInt8[Tensor, "n 3 size size"]:
    """The pictures of the subject.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    if data == "sprite":
        return sprite(size)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of pictures; data is sprite, or such a folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no picture ({', '.join(SUFFIXES)}): put three to five of the subject there")
    return torch.stack([to_uint8(open_image(file, size)) for file in files])


def rare_words(tokenizer: BPETokenizer, ranks: tuple[int, int], texts: Iterable[str] = ()) -> list[str]:
    """Words of one token and at most three characters whose token is of such a rank (section 3.2).

    Tokens are ranked by how often they stand in the texts, then by their number: a BPE learns frequent words first.

    Args:
        tokenizer: of the model.
        ranks: first, and the one behind the last.
        texts: what the model was trained on, if that is known.

    Raises:
        UserError: there is none.
    """
    seen = Counter(token for ids in tokenizer.encode_batch(list(texts)) for token in ids)
    ranked = sorted(range(tokenizer.vocab_size), key=lambda token: (-seen[token], token))[slice(*ranks)]
    words = [(tokenizer.decode([token]).strip(), token) for token in ranked]
    found = [
        word for word, token in words if word.isalnum() and len(word) <= LONGEST and tokenizer.encode(word) == [token]
    ]
    if not found:
        raise UserError(f"no token of ranks {ranks} is a word of up to {LONGEST} characters: change ranks or give one")
    return found


def prompts(config: Config) -> tuple[str, str]:
    """The subject's and the class's: "a [identifier] [class noun]" and "a [class noun]" (section 3.2)."""
    return f"a {config.identifier} {config.class_noun}", f"a {config.class_noun}"


@cache
def prior(base: str, prompt: str, count: int, steps: int, guidance: float) -> UInt8[Tensor, "count 3 size size"]:
    """x_pr: what the frozen original draws of the class, by ancestral sampling (section 3.3)."""
    model, tokenizer = load_base(base)
    model.to(pick_device())
    drawn = []
    for start in range(0, count, 64):
        some = [prompt] * min(64, count - start)
        states = generate(model, tokenizer, some, steps=steps, guidance=guidance, sampler="ddpm", seed=start)
        drawn.append(to_uint8(model.decode(last(states)).float().cpu()))
    return torch.cat(drawn)


class DreamBooth(nn.Module):
    """A latent diffusion model that is taught a subject."""

    def __init__(self, config: Config, model: LatentDiffusion):
        super().__init__()
        if model.config.condition_channels:
            raise UserError("the base is an inpainting model: give one that draws whole pictures")
        self.config, self.model = config, model

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, " pictures"]:
        """The loss of each picture, the subject's and the class's in turn, with its own prompt, noise and time."""
        rows = {name: value.flatten(0, 1) for name, value in batch.items()}
        eps, posterior = rows["noise"].unbind(1)
        z, context = self.model.encode(rows["images"], posterior), self.model.text(rows["tokens"])
        table = self.model.schedule.to(z.device)
        level = table[(rows["t"] * len(table)).long()]
        # w_t || x^(alpha_t x + sigma_t eps, c) - x ||^2, with the w_t that makes it the error of the prediction
        return diffusion.loss(lambda z_t, t: self.model(z_t, t, context), z, eps, level, self.model.predicts)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Eq. 2 of ``batch`` as `PairBatches` yields it."""
        of_subject, of_class = self(batch).unflatten(0, (-1, 2)).mean(0)
        # Eq. 2: E [ w_t || ... - x ||^2 + lambda w_t' || ... - x_pr ||^2 ]
        loss = of_subject + self.config.prior_weight * of_class
        return loss, {"subject_loss": of_subject.detach(), "prior_loss": of_class.detach()}


# The metrics (section 4.1), of networks that are given: DINO's ViT-S/16 and CLIP in the paper.


def similarity(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> float:
    """Average cosine between two sets of embeddings.

    DINO and CLIP-I: of drawn and real pictures of the subject. PRES: of drawn pictures of the class and real ones of
    the subject, where less is less drift.
    """
    return float((F.normalize(a, dim=1) @ F.normalize(b, dim=1).t()).mean())


def prompt_fidelity(images: Float[Tensor, "n features"], texts: Float[Tensor, "n features"]) -> float:
    """CLIP-T: average cosine between pictures and their prompts, embedded by CLIP."""
    return float(F.cosine_similarity(images, texts, dim=1).mean())


def diversity(images: Float[Tensor, "n 3 size size"]) -> float:
    """DIV: average LPIPS distance between drawn pictures of one prompt."""
    first, second = torch.tensor(list(combinations(range(len(images)), 2))).t()
    return float(lpips()(images[first], images[second]).mean())


def vgg(images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n 512"]:
    """What VGG-16 sees in pictures, on average over their places."""
    return lpips().features(images)[-1].mean((2, 3))


@torch.no_grad()
def scores(
    of_subject: Float[Tensor, "n 3 size size"],
    in_contexts: Float[Tensor, "m 3 size size"],
    of_class: Float[Tensor, "k 3 size size"],
    real: Float[Tensor, "pictures 3 size size"],
    embed: Embed = vgg,
) -> dict[str, float]:
    """Subject fidelity, PRES and DIV of pictures that a model drew: of one prompt, in contexts, and of the class."""
    return {
        "subject fidelity": similarity(embed(torch.cat([of_subject, in_contexts])), embed(real)),
        "PRES": similarity(embed(of_class), embed(real)),
        "DIV": diversity(of_subject),
    }


def contexts(config: Config) -> list[str]:
    """The prompts of `Config.contexts` with their words."""
    return [text.replace("[V]", config.identifier).replace("{}", config.class_noun) for text in config.contexts]


def draw(model: LatentDiffusion, tokenizer: BPETokenizer, asked: list[str], **how) -> Float[Tensor, "n 3 size size"]:
    """One picture of each prompt; ``how`` is for latent diffusion's `generate`."""
    return model.decode(last(generate(model, tokenizer, asked, **how))).float().cpu()


def from_pretrained(source: str | Path) -> tuple[DreamBooth, BPETokenizer]:
    """A tuned model and its tokenizer, from a folder that a run wrote; one of Stable Diffusion is latent diffusion's.

    Raises:
        UserError: there is nothing there, or it is damaged.
    """
    place = pretrained.resolve(source)

    def empty(config: Config) -> DreamBooth:
        return DreamBooth(config, load_base_of(place, config.base))

    model, tokenizer = pretrained.load_pretrained(place, "dreambooth", Config, empty, {}, lambda read: Config(**read))
    return model, load_clip_tokenizer(place) if tokenizer else load_base(model.config.base)[1]


class PairBatches:
    """Endless pairs of a picture of the subject and one of the class, with noise and times.

    Args:
        images: of the subject, and of the class.
        tokens: their prompts.
        noise: shape of the noise of one picture.
        batch_size: pairs a batch.
        seed: of everything drawn.

    Yields ``images`` (batch, 2, 3, size, size) in [-1, 1], ``tokens`` (batch, 2, time), ``noise`` (batch, 2, *noise)
    and ``t`` (batch, 2) in [0, 1).
    """

    def __init__(
        self,
        images: tuple[UInt8[Tensor, "n 3 size size"], UInt8[Tensor, "m 3 size size"]],
        tokens: Int[Tensor, "2 time"],
        noise: tuple[int, ...],
        batch_size: int,
        seed: int,
    ):
        self.images, self.tokens, self.noise, self.batch_size = images, tokens, noise, batch_size
        self.seed, self.position = seed, 0

    def __next__(self) -> dict[str, Tensor]:
        g, n = torch.Generator().manual_seed(self.seed * 1_000_003 + self.position), self.batch_size
        self.position += 1
        return {
            "images": to_float(torch.stack([x[torch.randint(len(x), (n,), generator=g)] for x in self.images], 1)),
            "tokens": self.tokens.expand(n, -1, -1),
            "noise": torch.randn(n, 2, *self.noise, generator=g),
            "t": torch.rand(n, 2, generator=g),
        }

    def state_dict(self) -> dict[str, int]:
        """The position, as plain JSON values."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.position = int(state["position"])


@cache
def texts_of(data: str, size: int) -> list[str]:
    """All captions of the data that a model of ours was trained on."""
    return [way for ways in load_pictures(data, size).captions for way in ways]


def named(config: Config, base: LatentDiffusion, tokenizer: BPETokenizer) -> Config:
    """The configuration with an identifier: its own, or one drawn among the rare words."""
    if config.identifier:
        return config
    own = base.config
    published = own.vocab_size == latent_diffusion.PRESETS["sd-v1"].vocab_size  # whose tokens are in order of rank
    words = rare_words(tokenizer, config.ranks, [] if published else texts_of(own.data, own.image_size))
    choice = torch.randint(len(words), (), generator=torch.Generator().manual_seed(config.training.seed))
    return replace(config, identifier=words[int(choice)])


def build(config: Config) -> DreamBooth:
    """The base, ready to be tuned."""
    base, tokenizer = load_base(config.base)
    return DreamBooth(named(config, base, tokenizer), base)


def batches(config: Config) -> PairBatches:
    """Training batches; the class's pictures are drawn at the first call."""
    base, tokenizer = load_base(config.base)
    c, own = named(config, base, tokenizer), base.config
    of_class = prior(c.base, prompts(c)[1], c.prior_images, c.prior_steps, c.prior_guidance)
    shape = (2, own.latent_channels, own.latent_size, own.latent_size)
    tokens = captions(base, tokenizer, list(prompts(c)))
    return PairBatches(
        (subject(c.data, own.image_size), of_class), tokens, shape, c.training.batch_size, c.training.seed
    )


def train(config: Config, run: Run) -> DreamBooth:
    """Teach the base the subject; goes on where the run was stopped."""
    model, stream = build(config), batches(config)
    original, tokenizer = load_base(config.base)
    if run.leader:
        pretrained.save_description(model.config, run.path / "model", system="dreambooth", tokenizer=tokenizer)
        pretrained.save_description(original.config, run.path / "model" / "base", system="latent_diffusion")
    fixed = next(batches(replace(config, training=replace(config.training, seed=2**31))))

    def evaluate(_: nn.Module) -> dict[str, float]:
        device = model.model.latent_scale.device
        return {"fixed_loss": float(model.loss({key: value.to(device) for key, value in fixed.items()})[0])}

    model = fit(model, stream, run, config.training, evaluate=evaluate)
    if run.leader:
        whole, _ = from_pretrained(run.path / "model")  # this process may hold a shard only
        show(whole, original, tokenizer, run)
    return model


@torch.no_grad()
def show(tuned: DreamBooth, original: LatentDiffusion, tokenizer: BPETokenizer, run: Run) -> None:
    """Put into the report what was learned: the same prompts and noise before and after, and the metrics."""
    config, samples = tuned.config, 4
    real = to_float(subject(config.data, original.config.image_size))
    run.figure("the subject", picture_figure(real[None, :5]))
    asked, drawn = [*prompts(config), *contexts(config)], {}
    for when, model in (("before", original), ("after", tuned.model)):
        model.to(pick_device())
        drawn[when] = torch.stack([draw(model, tokenizer, [prompt] * samples, steps=20) for prompt in asked])
    names = [f"{when} {i + 1}" for when in drawn for i in range(samples)]
    run.figure("before and after", picture_figure(torch.cat([*drawn.values()], dim=1), asked, names))
    metrics = {when: scores(x[0], x[2:].flatten(0, 1), x[1], real) for when, x in drawn.items()}
    run.table("metrics", [{"model": when, **numbers} for when, numbers in metrics.items()])


def sample(
    model: DreamBooth,
    run: Run,
    prompt: str = "",
    *,
    count: int = 1,
    steps: int = 30,
    guidance: float = 4.0,
    sampler: SamplerName = "dpm",
    seed: int = 0,
) -> Image.Image:
    """Pictures of ``prompt``, in which [V] stands for the subject's word; kept among the run's samples.

    Args:
        model: a tuned model.
        run: the run that tuned it.
        prompt: what to draw, such as "a small [V] square at the top left"; by default the subject.
        count: how many, side by side.
        steps: of the sampler.
        guidance: weight of the prompt; 1 is none, more obeys better and varies less.
        sampler: dpm, ddim, plms, heun or ddpm.
        seed: another seed, another picture.
    """
    if count < 1:
        raise UserError(f"count must be at least 1, not {count}")
    prompt = prompt.replace("[V]", model.config.identifier) or prompts(model.config)[0]
    asked, size = [prompt] * count, model.model.config.image_size
    tokenizer = load_clip_tokenizer(run.path / "model")
    pictures = draw(model.model, tokenizer, asked, steps=steps, guidance=guidance, sampler=sampler, seed=seed)
    page = sheet(pictures, columns=min(count, 8), scale=max(1, 256 // size))
    run.image(prompt, page, keep=True)
    return page
