"""Training in two stages (appendices A.2 and B.2), and samples."""

from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from canon.core.checks import check_batch, check_numbers
from canon.core.data.images import PictureBatches, Pictures, jitter, load_pictures, sheet, to_float
from canon.core.data.picture_files import example_caption
from canon.core.data.tokenizers import BPETokenizer
from canon.core.errors import UserError
from canon.core.hub.pretrained import save_description
from canon.core.hub.tensors import WEIGHTS_FILE, load_tensors
from canon.core.lab import Run
from canon.core.training import distributed
from canon.core.training.fit import TrainingConfig, fit
from canon.images.clip.tokenizer import load_clip_tokenizer, train_tokenizer
from canon.images.dalle import views
from canon.images.dalle.captions import DROPOUT, Captions
from canon.images.dalle.config import Config
from canon.images.dalle.dvae import DVAE, LAST_TEMPERATURE, unmap_pixels
from canon.images.dalle.model import DALLE, generate_images, rank

HELD_OUT = 20
"""One picture in so many is not learned from."""


def build(config: Config) -> DALLE:
    """A model with fresh weights."""
    torch.manual_seed(config.training.seed)
    return DALLE(config)


@cache
def corpus(data: str, image_size: int, vocab_size: int) -> tuple[Pictures, Pictures, BPETokenizer]:
    """Pictures to learn from, pictures held out, and a tokenizer learned from the captions of the first.

    Raises:
        UserError: there are no pictures, or no captions.
    """
    every = load_pictures(data, image_size)
    held = torch.arange(len(every.images)) % HELD_OUT == HELD_OUT - 1
    parts = [
        Pictures(every.images[chosen], [every.captions[i] for i in chosen.nonzero()[:, 0].tolist()])
        for chosen in (~held, held if bool(held.any()) else ~held)
    ]
    return parts[0], parts[1], train_tokenizer((text for ways in parts[0].captions for text in ways), vocab_size)


class CaptionedCodes:
    """Endless pictures and captions for the Transformer; merges of the captions are dropped out anew at every use."""

    def __init__(self, pictures: Pictures, captions: Captions, recipe: TrainingConfig, moved: bool):
        self.captions, most = captions, max(map(len, pictures.captions))
        self.texts = [ways[i % len(ways)] for ways in pictures.captions for i in range(most)]
        index = torch.arange(len(self.texts)).view(-1, most, 1)
        augment = jitter if moved else None
        self.batches = PictureBatches(pictures.images, index, recipe.batch_size, recipe.seed, augment)

    def __next__(self) -> dict[str, Tensor]:
        seed = self.batches.seed * 1_000_003 + self.batches.position
        batch = next(self.batches)
        texts = [self.texts[index] for index in batch["tokens"][:, 0].tolist()]
        return {"images": batch["images"], "tokens": self.captions.encode(texts, DROPOUT, seed)}

    def state_dict(self) -> dict[str, int]:
        """The position, as plain JSON values."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.batches.load_state_dict(state)


class NoisyPictures:
    """Endless pictures for the dVAE, which know the step they are for and the seed of each one's relaxation.

    Args:
        pictures: what to learn from.
        recipe: batch size and seed.
        moved: whether pictures are moved, resized and mirrored a little.
        noise: uniform, of up to so much, added to pixels. A flat drawing has none, so the density of its pixels can
            grow without bound, and the codes would be spent on its shades of grey. Unclipped: the likelihood has room.
    """

    def __init__(self, pictures: Pictures, recipe: TrainingConfig, moved: bool, noise: float):
        def augment(
            images: Float[Tensor, "batch 3 size size"], draw: torch.Generator
        ) -> Float[Tensor, "batch 3 size size"]:
            images = jitter(images, draw) if moved else images
            return images + noise * (2 * torch.rand(images.shape, generator=draw) - 1)

        nothing = torch.zeros(len(pictures.images), 1, 1, dtype=torch.long)
        self.batches = PictureBatches(pictures.images, nothing, recipe.batch_size, recipe.seed, augment)

    def __next__(self) -> dict[str, Tensor]:
        step = self.batches.position
        images = next(self.batches)["images"]
        first = (self.batches.seed * 1_000_003 + step) * len(images)
        return {"images": images, "step": torch.full((len(images),), step), "seed": first + torch.arange(len(images))}

    def state_dict(self) -> dict[str, int]:
        """The position, as plain JSON values."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.batches.load_state_dict(state)


def batches(config: Config) -> CaptionedCodes:
    """Pictures and captions for the Transformer."""
    pictures, _, tokenizer = corpus(config.data, config.image_size, config.vocab_size)
    # the places of shapes are in their captions, so they must not be moved
    return CaptionedCodes(pictures, _captions(config, tokenizer), config.training, config.data != "shapes")


def _captions(config: Config, tokenizer: BPETokenizer) -> Captions:
    return Captions(tokenizer, config.vocab_size, config.text_length)


def first_recipe(config: Config) -> TrainingConfig:
    """How the dVAE learns (appendix A.2)."""
    return replace(
        config.training,
        steps=config.first_steps,
        batch_size=config.first_batch_size,
        accumulation=1,
        learning_rate=config.first_learning_rate,
        schedule="cosine",
        warmup_steps=min(20, config.first_steps // 10),
        final_fraction=1 / 80,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=1e-4,
        ema_decay=0.999 if config.first_steps >= 10_000 else 0.995,
        compile="off",  # each picture's noise comes from a generator of its own
        evaluate_every=max(1, config.first_steps // 5),
    )


@torch.no_grad()
def dvae_scores(
    model: DVAE, images: Float[Tensor, "n 3 size size"], temperature: float = LAST_TEMPERATURE
) -> dict[str, float]:
    """How well pictures in [-1, 1] come back, from relaxed samples and from the likeliest codes, and how many are used.

    Args:
        model: in evaluation mode.
        images: some hundred.
        temperature: of the relaxed samples.
    """
    images = images.to(next(model.parameters()).device)
    logits, mu, _ = model(images, temperature, torch.arange(len(images)))
    codes = logits.argmax(1)
    share = codes.flatten().bincount(minlength=logits.shape[1]).float() / codes.numel()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    soft, hard = unmap_pixels(mu.sigmoid()), model.decode(codes)
    return {
        "soft_mse": float((soft - images).square().mean()),
        "hard_mse": float((hard - images).square().mean()),
        "codes_used": float((share > 0).float().mean()),
        "perplexity": float(entropy.exp()),
    }


def train_dvae(config: Config, run: Run) -> dict[str, Tensor]:
    """Train the first stage, in a stage of the run; goes on where it was stopped. Returns the averaged weights."""
    pictures, held, _ = corpus(config.data, config.image_size, config.vocab_size)
    recipe, stage = first_recipe(config), run.stage("dvae", first_recipe(config))
    torch.manual_seed(recipe.seed)
    stream = NoisyPictures(pictures, recipe, config.data != "shapes", config.pixel_noise)
    images = to_float(held.images[:256])

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, DVAE)
        return dvae_scores(model, images)

    fit(DVAE(config), stream, stage, recipe, evaluate=evaluate)
    distributed.of_leader(None)  # which has written the weights when it says this
    return load_tensors(stage.path / "model" / WEIGHTS_FILE)


def train(config: Config, run: Run) -> DALLE:
    """Train the dVAE, then the Transformer on its codes; goes on where the run was stopped."""
    pictures, held, tokenizer = corpus(config.data, config.image_size, config.vocab_size)
    check_batch(len(pictures.images), config.first_batch_size, "--first-batch-size")
    check_batch(len(pictures.images), config.training.batch_size)  # now rather than after the first stage
    if run.leader:
        save_description(config, run.path / "model", system="dalle", tokenizer=tokenizer)
    first = train_dvae(config, run)
    model = build(config)
    model.dvae.load_state_dict(first)
    captions = _captions(config, tokenizer)
    fixed = {
        "images": to_float(held.images[:128]),
        "tokens": captions.encode([ways[0] for ways in held.captions[:128]]),
    }

    def evaluate(_: nn.Module) -> dict[str, float]:
        found = model.loss(distributed.move(fixed, model.transformer.token_embedding.weight.device))
        return {"validation_loss": float(found[0]), "validation_image_loss": float(found[1]["image_loss"])}

    fit(model, batches(config), run, config.training, evaluate=evaluate)
    if run.leader:
        shown = model
        if distributed.world()[1] > 1:  # this process may hold a shard only
            shown = build(config).eval()
            shown.load_state_dict(load_tensors(run.path / "model" / WEIGHTS_FILE))
        views.show(shown, captions, pictures, held, run)
    return model


def example(config: Config) -> str:
    """A prompt that shows what a model with this configuration has learned."""
    return example_caption(config.data)


def sample(
    model: DALLE,
    run: Run,
    prompt: str = "a large red star in the middle",
    *,
    count: int = 8,
    candidates: int = 0,
    clip: str = "",
    temperature: float = 1.0,
    seed: int = 0,
) -> Image.Image:
    """Pictures of ``prompt``; kept among the run's samples.

    Args:
        model: a trained model.
        run: the run that trained it, which holds its tokenizer.
        prompt: what to draw.
        count: pictures to show; where a CLIP ranks them the best ones, in its order.
        candidates: pictures to draw, of which CLIP chooses; 0 draws 4 for each that is shown.
        clip: folder of a trained CLIP's run; by default one beside this run that learned from the same pictures.
        temperature: 1 samples from the model's distribution; less varies less.
        seed: another seed, another picture.
    """
    check_numbers(least=1, count=count)
    if candidates and candidates < count:
        raise UserError(f"candidates must be at least count ({count}), not {candidates}")
    judge = views.clip_beside(run, clip)
    if candidates and judge is None:
        raise UserError(
            "choosing among candidates needs a CLIP that knows such pictures: train one "
            f"(canon run clip --data {model.config.data}) and name it with --clip"
        )
    captions = _captions(model.config, load_clip_tokenizer(run.path / "model"))
    drawn = (candidates or 4 * count) if judge else count
    images = generate_images(model, captions.encode([prompt] * drawn), temperature=temperature, seed=seed)
    if judge is not None:
        images = images[rank(*judge, prompt, images)[0][:count]]
    page = sheet(images, columns=min(count, 8), scale=max(1, 128 // model.config.image_size))
    run.image(prompt or "no prompt", page, keep=True)
    return page
