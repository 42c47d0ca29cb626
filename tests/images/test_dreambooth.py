"""DreamBooth: its loss, its rare words, whose pictures keep the class, and what is tuned."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from canon.core.data.images import to_float, to_uint8
from canon.core.data.shapes import COLOURS, shapes
from canon.core.errors import UserError
from canon.core.generation.diffusion_samplers import last
from canon.core.hub.pretrained import save_pretrained
from canon.core.lab import Run
from canon.images import dreambooth
from canon.images.clip.tokenizer import published_tokenizer, train_tokenizer
from canon.images.dreambooth import rare_words
from canon.images.latent_diffusion import PRESETS, LatentDiffusion
from canon.images.latent_diffusion.first_stage import lpips
from canon.images.latent_diffusion.sampling import captions, generate

TINY = dataclasses.replace(
    PRESETS["shapes"], first_channels=8, channels=16, multipliers=(1, 2), d_model=32, n_heads=2, prediction="eps"
)
RECIPE = dataclasses.replace(
    dreambooth.PRESETS["laptop"].training, steps=3, batch_size=4, precision="fp32", log_every=1, evaluate_every=0
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model whose weights are random, also where training starts from zeros."""
    torch.manual_seed(0)
    model = LatentDiffusion(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(shapes(200).captions, TINY.vocab_size)
    save_pretrained(model, TINY, folder, system="latent_diffusion", tokenizer=tokenizer)
    return str(folder)


@pytest.fixture
def config(base):
    return dreambooth.Config(base=base, ranks=(100, 600), prior_images=6, prior_steps=2, training=RECIPE)


# -------------------------------------------------------------------------------------------------------- rare words


def test_rare_words_of_clip_are_ranked_by_their_merges():
    tokenizer = published_tokenizer()
    assert rare_words(tokenizer, (48_136, 48_137)) == ["sks"]  # the word that everybody took
    found = rare_words(tokenizer, (40_000, 49_406))
    assert all(len(tokenizer.encode(word)) == 1 and 1 <= len(word) <= 3 for word in found)
    assert {tokenizer.encode(word)[0] for word in found} <= set(range(40_000, 49_406))
    common = rare_words(tokenizer, (512, 900))
    assert {"the", "and", "for"} <= set(common)
    assert not {"the", "and", "for"} & set(found)


def test_rare_words_of_a_small_vocabulary_are_those_its_captions_never_use():
    texts = shapes(200).captions
    tokenizer = train_tokenizer(texts, TINY.vocab_size)
    used = {token for ids in tokenizer.encode_batch(texts) for token in ids}
    found = rare_words(tokenizer, (len(used), tokenizer.vocab_size), texts)
    assert "q" in found
    assert not {tokenizer.encode(word)[0] for word in found} & used
    # the commonest come first: "a" stands in every caption, "at" in four of five, "red" in one of six
    ranks = {word: next(r for r in range(40) if _at(tokenizer, r, texts) == word) for word in ("a", "at", "red")}
    assert 0 == ranks["a"] < ranks["at"] < ranks["red"] < len(used)
    with pytest.raises(UserError, match="change ranks"):
        rare_words(tokenizer, (10**6, 10**6 + 1))


def _at(tokenizer, rank, texts):
    try:
        return rare_words(tokenizer, (rank, rank + 1), texts)[0]
    except UserError:
        return None


def test_the_identifier_is_drawn_by_the_seed_or_given(config):
    words = {
        dreambooth.build(dataclasses.replace(config, training=dataclasses.replace(RECIPE, seed=seed))).config.identifier
        for seed in range(4)
    }
    assert len(words) > 1
    assert all(1 <= len(word) <= 3 for word in words)
    given = dreambooth.build(dataclasses.replace(config, identifier="zwx"))
    assert given.config.identifier == "zwx"
    assert dreambooth.prompts(given.config) == ("a zwx square", "a square")
    assert dreambooth.contexts(given.config)[0] == "a small zwx square in the middle"


# ------------------------------------------------------------------------------------------------------------ the data


def test_the_subject_has_two_colours_and_four_places():
    drawn = dreambooth.sprite(32)
    blue, yellow = (torch.tensor(COLOURS[name])[None, :, None, None] for name in ("blue", "yellow"))
    for image in to_float(drawn)[:, None]:
        near = [((image - paint).abs().amax(1) < 0.2).sum() for paint in (blue, yellow)]
        assert min(near) > 40
    solid = (to_float(drawn) - 0.67).abs().amax(1) > 0.65
    middle = torch.stack([solid.float().mean(axis).argmax(1) for axis in (1, 2)], 1)
    assert torch.cdist(middle.float(), middle.float()).add(100 * torch.eye(4)).min() > 5
    known = to_float(shapes(500).images).flatten(1)
    assert torch.cdist(to_float(drawn).flatten(1), known).min() > 5
    assert dreambooth.sprite(64).shape == (4, 3, 64, 64)


def test_a_subject_from_a_folder(config, tmp_path):
    for index in range(3):
        Image.fromarray(np.full((40, 50, 3), 10 + index, np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no caption is needed")
    own = dataclasses.replace(config, data=str(tmp_path))
    values = {int(x) for x in to_uint8(next(dreambooth.batches(own))["images"][:, 0]).unique()}
    assert values <= {10, 11, 12}


def test_the_class_is_drawn_by_the_frozen_original_with_the_ancestral_sampler(config):
    model, stream = dreambooth.build(config), dreambooth.batches(config)
    original, tokenizer = dreambooth.load_base(config.base)
    with torch.no_grad():
        states = generate(original, tokenizer, ["a square"] * 6, steps=2, guidance=4.0, sampler="ddpm", seed=0)
        expected = to_uint8(original.decode(last(states)))
    assert torch.equal(stream.images[1], expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.loss(next(stream))[0].backward()
    optimizer.step()
    dreambooth.prior.cache_clear()  # drawn again, while a model is tuned: the same
    assert torch.equal(dreambooth.batches(config).images[1], expected)


def test_batches_are_pairs_with_their_own_noise_and_times(config):
    stream = dreambooth.batches(config)
    batch = next(stream)
    assert [tuple(value.shape[:2]) for value in batch.values()] == [(4, 2)] * 4
    both = [to_float(images) for images in stream.images]
    for side in (0, 1):
        distances = torch.cdist(batch["images"][:, side].flatten(1), both[side].flatten(1))
        assert distances.amin(1).max() == 0
    tokenizer = dreambooth.load_base(config.base)[1]
    word = dreambooth.build(config).config.identifier
    assert tokenizer.encode(word)[0] in batch["tokens"][0, 0]
    assert tokenizer.encode(word)[0] not in batch["tokens"][0, 1]
    assert len(batch["t"].unique()) == 8
    assert not torch.equal(batch["noise"][:, 0], batch["noise"][:, 1])
    state = stream.state_dict()
    more = dreambooth.batches(config)
    more.load_state_dict(state)
    assert all(torch.equal(value, next(more)[key]) for key, value in [("t", next(stream)["t"])])


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_is_equation_2(config, weight):
    """As the paper writes it: errors of the predicted picture, with w_t = alpha^2 / sigma^2, each a mean."""
    model = dreambooth.build(dataclasses.replace(config, prior_weight=weight))
    batch = next(dreambooth.batches(config))
    batch["t"] = 0.9 * batch["t"] + 0.05
    loss, metrics = model.loss(batch)
    inner, terms = model.model, []
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    for side in (0, 1):
        eps, posterior = batch["noise"][:, side].unbind(1)
        x = inner.encode(batch["images"][:, side], posterior)
        t = (batch["t"][:, side] * 1000).long()
        bar = (1 - betas).cumprod(0)[t].float()[:, None, None, None]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        z_t = alpha * x + sigma * eps
        x_hat = (z_t - sigma * inner(z_t, t.float(), inner.text(batch["tokens"][:, side]))) / alpha
        terms.append((alpha**2 / sigma**2 * (x_hat - x).square()).mean())
    assert_close(loss, terms[0] + weight * terms[1], atol=1e-4, rtol=1e-3)
    assert_close(metrics["subject_loss"], terms[0].detach(), atol=1e-4, rtol=1e-3)
    assert_close(metrics["prior_loss"], terms[1].detach(), atol=1e-4, rtol=1e-3)


def test_lambda_0_learns_nothing_of_the_class(config):
    model = dreambooth.build(dataclasses.replace(config, prior_weight=0.0))
    batch = next(dreambooth.batches(config))
    gradients = []
    for images in (batch["images"], batch["images"].flip(1)[:, :1].expand(-1, 2, -1, -1, -1) * 0):
        kept = torch.stack([batch["images"][:, 0], images[:, 1]], 1)
        model.zero_grad()
        model.loss({**batch, "images": kept})[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_layer_is_tuned_but_the_autoencoder(config, tmp_path, monkeypatch):
    monkeypatch.setattr(dreambooth, "show", lambda *arguments: None)
    run = Run(tmp_path / "dreambooth" / "r", config)
    run.quiet = True
    model = dreambooth.train(config, run)
    original, _ = dreambooth.load_base(config.base)
    before, after = dict(original.named_parameters()), dict(model.model.named_parameters())
    for name, p in after.items():
        same = torch.equal(p, before[name])
        assert same == name.startswith("autoencoder."), name
    word = model.config.identifier
    assert word
    # what it wrote needs no base, and knows the word
    moved = (run.path / "model").rename(tmp_path / "moved")
    monkeypatch.setattr(dreambooth, "load_base", lambda source: pytest.fail("the base was asked for"))
    loaded, tokenizer = dreambooth.from_pretrained(moved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.identifier == word
    assert tokenizer.encode(word)
    moved.rename(run.path / "model")
    page = dreambooth.sample(loaded, run, "a small [V] square", count=2, steps=2)
    assert page.size == (2 * 256 + 2, 256)
    dreambooth.sample(loaded, run, steps=2)
    assert [row["name"] for row in run.samples()] == [f"a small {word} square", f"a {word} square"]
    with pytest.raises(UserError, match="count must be"):
        dreambooth.sample(loaded, run, count=0)
    with pytest.raises(UserError, match="guidance must be a finite number"):
        dreambooth.sample(loaded, run, guidance=float("nan"))
    with pytest.raises(UserError, match="seed must be"):
        dreambooth.sample(loaded, run, seed=10**20)


# --------------------------------------------------------------------------------------------------------- the metrics


def test_metrics_are_averages_over_pairs():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 7, generator=g), torch.randn(3, 7, generator=g)
    cosines = [float(x @ y / (x.norm() * y.norm())) for x in a for y in b]
    assert dreambooth.similarity(a, b) == pytest.approx(sum(cosines) / 12, abs=1e-6)
    own = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b)]
    assert dreambooth.prompt_fidelity(a[:3], b) == pytest.approx(sum(own) / 3, abs=1e-6)
    images = torch.rand(4, 3, 32, 32, generator=g) * 2 - 1
    pairs = [float(lpips()(images[i : i + 1], images[j : j + 1])) for i, j in combinations(range(4), 2)]
    assert dreambooth.diversity(images) == pytest.approx(sum(pairs) / 6, rel=1e-5)
    same = images[:1].expand(4, -1, -1, -1)
    assert dreambooth.diversity(same) == pytest.approx(0, abs=1e-6)


def test_scores_tell_the_subject_from_the_class():
    real = to_float(dreambooth.sprite(32))
    noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = dreambooth.scores(real, real, noise, real)
    assert found["subject fidelity"] > found["PRES"] + 0.1
    assert found["DIV"] == pytest.approx(dreambooth.diversity(real))


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_is_missing_is_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setattr("canon.images.latent_diffusion.weights.SHIPPED", tmp_path / "nothing")
    for base in ("", str(tmp_path / "elsewhere")):
        with pytest.raises(UserError, match="canon train latent_diffusion --preset shapes") as said:
            dreambooth.build(dataclasses.replace(config, base=base))
        assert "\n" not in str(said.value)
    save_pretrained(dreambooth.load_base(config.base)[0], TINY, tmp_path / "bare", system="latent_diffusion")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        dreambooth.build(dataclasses.replace(config, base=str(tmp_path / "bare")))
    for change, match in (
        ({"class_noun": " "}, "class_noun is empty"),
        ({"prior_images": 0}, "prior_images and"),
        ({"prior_steps": 0}, "prior_steps must be at least 1"),
        ({"prior_weight": -1.0}, "prior_weight"),
        ({"prior_weight": float("nan")}, "prior_weight"),
        ({"prior_guidance": float("inf")}, "prior_guidance"),
    ):
        with pytest.raises(UserError, match=match):
            dataclasses.replace(config, **change)
    with pytest.raises(UserError, match="no folder of pictures"):
        dreambooth.batches(dataclasses.replace(config, data=str(tmp_path / "cats")))
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match="three to five"):
        dreambooth.batches(dataclasses.replace(config, data=str(tmp_path / "cats")))
    with torch.device("meta"), pytest.raises(UserError, match="inpainting"):
        dreambooth.DreamBooth(config, LatentDiffusion(dataclasses.replace(TINY, condition_channels=5)))


def test_prompts_are_the_models_own(config):
    original, tokenizer = dreambooth.load_base(config.base)
    stream = dreambooth.batches(dataclasses.replace(config, identifier="q"))
    assert torch.equal(stream.tokens, captions(original, tokenizer, ["a q square", "a square"]))
