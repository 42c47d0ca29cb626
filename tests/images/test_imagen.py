"""Imagen: the frozen encoder, conditioning, thresholding, the Efficient U-Net, augmentation, and the three stages."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from canon.core.data.images import Pictures, to_float
from canon.core.data.shapes import shapes
from canon.core.data.tokenizers import CharTokenizer
from canon.core.device import generator
from canon.core.errors import UserError
from canon.core.generation.diffusion import CLEAN, cosine, path
from canon.core.generation.diffusion_samplers import ddim, last
from canon.core.lab import Run
from canon.images import imagen
from canon.images.imagen import sampling, text, training, unet, views
from canon.images.imagen.model import PRESETS, Config, Imagen, parameters
from canon.images.imagen.text import Captions, Statistics
from canon.language import llama

WIDTH = 12
RECIPE = dataclasses.replace(
    PRESETS["laptop"].training, steps=3, batch_size=4, precision="fp32", log_every=1, evaluate_every=0
)
TINY = Config(
    data="shapes", text_encoder="hash", text_width=WIDTH, text_length=9, image_size=8, scale=2, crop=16, n_heads=2,
    d_context=16, channels=8, multipliers=(1, 2), res_blocks=1, attention=(False, True), sr_channels=(8, 8),
    sr_multipliers=(1, 2), sr_blocks=(1, 2), sr_batch_size=4, first_sr_steps=2, last_sr_steps=2, training=RECIPE,
)  # fmt: skip


def hashed(texts) -> list[torch.Tensor]:
    """A vector for each word, drawn from its letters."""
    found = []
    for words in (each.split() for each in texts):
        seeds = [int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) for word in words]
        rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        found.append(torch.stack(rows) if rows else torch.zeros(0, WIDTH))
    return found


@pytest.fixture(scope="module")
def no_language_model():
    """Words are hashed where the language model would be asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "encoded", lambda texts, source: Captions.of(texts, hashed))
        patch.setattr(training, "load_encoder", lambda source: hashed)
        patch.setattr(training, "load_pictures", few_shapes)
        training.corpus.cache_clear()
        yield
    training.corpus.cache_clear()


def few_shapes(source: str, size: int) -> Pictures:
    drawn = shapes(1_000, size)
    return Pictures(drawn.images, [(caption,) for caption in drawn.captions])


def shaken(module: nn.Module) -> nn.Module:
    """Random weights, also where training starts from zeros."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return module.eval()


@pytest.fixture
def model() -> Imagen:
    torch.manual_seed(0)
    found = shaken(Imagen(TINY))
    assert isinstance(found, Imagen)
    return found


def words(rows: int) -> torch.Tensor:
    return torch.randn(rows, TINY.text_length, WIDTH, generator=torch.Generator().manual_seed(3))


def inputs(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, size, size), torch.rand(rows), words(rows)


# ------------------------------------------------------------------------------------------------------ text encoder


LETTERS = CharTokenizer("abcdefghxyz")


def test_hidden_states_are_those_of_transformers():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = llama.Config(
        vocab_size=40, context_length=32, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24, norm_eps=1e-5,
        rope_theta=1e4, tied=True,
    )  # fmt: skip
    ours = shaken(llama.Llama(config))
    assert isinstance(ours, llama.Llama)
    theirs = LlamaModel(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip
    published = llama.to_hugging_face(ours)
    theirs.load_state_dict(
        {name.removeprefix("model."): w for name, w in published.items() if name.startswith("model.")}
    )
    ours.head = nn.Identity()
    texts = ["bcd", "xyz", "", "b", "dcb", "abcdefgh"]
    found = text.hidden_states(ours, LETTERS.encode, start=0, batch_size=2)(texts)
    for each, states in zip(texts, found):
        with torch.no_grad():
            expected = theirs(torch.tensor([[0, *LETTERS.encode(each)]])).last_hidden_state[0, 1:]
        assert_close(states, expected, atol=1e-5, rtol=1e-4)


def test_a_language_model_of_the_library_is_loaded_frozen_and_without_its_head(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = dataclasses.replace(llama.PRESETS["laptop"], d_model=32, n_heads=2, n_kv_heads=2, n_layers=1, d_ff=32)
    trained = llama.Llama(config)
    language_model = trained.to(torch.float32)

    class Loaded:
        model, tokenizer = language_model, LETTERS

    monkeypatch.setattr(text, "Local", lambda source, precision: Loaded)
    states = text.load_encoder.__wrapped__("anything")(["bcd"])[0]
    assert states.shape == (3, 32)
    assert states.dtype == torch.float32
    assert not any(p.requires_grad for p in language_model.parameters())


def test_each_distinct_caption_is_encoded_once_and_shown_standardised():
    asked: list[str] = []

    def encoder(texts):
        asked.extend(texts)
        return hashed(texts)

    captions = Captions.of(["red star", "blue circle", "red star"], encoder)
    assert asked == ["red star", "blue circle"]
    rows = captions.rows(torch.tensor([1, -1, 0]), 3)
    states = torch.cat(hashed(["red star", "blue circle"]))
    expected = (hashed(["blue circle"])[0] - states.mean(0)) / states.std(0)
    assert_close(rows[0, :2].float(), expected, atol=5e-3, rtol=5e-3)
    assert not rows[0, 2].any()
    assert not rows[1].any()  # a dropped caption is zeros
    assert torch.equal(captions.rows(torch.tensor([0]), 1)[0, 0], rows[2, 0])  # long ones are cut


def test_prompts_are_standardised_as_the_captions_were():
    captions = Captions.of(["red star", "blue circle"], hashed)
    prompts = text.embed(["blue circle", "", "red star"], hashed, 4, captions.statistics)
    assert torch.equal(prompts[[2, 0]], captions.rows(torch.tensor([0, 1]), 4))
    assert not prompts[1].any()


def test_encoded_captions_are_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CANON_HOME", str(tmp_path))
    monkeypatch.setattr(text, "load_encoder", lambda source: hashed)
    place = tmp_path / "encoder.gguf"
    place.write_bytes(b"one")
    first = text.encoded(["red star", "blue circle"], str(place))
    monkeypatch.setattr(text, "load_encoder", None)
    again = text.encoded(["red star", "blue circle"], str(place))
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.rows(torch.tensor([1]), 4), again.rows(torch.tensor([1]), 4))
    with pytest.raises(TypeError):  # other captions, another file
        text.encoded(["red star"], str(place))
    place.write_bytes(b"another")
    with pytest.raises(TypeError):  # another encoder at the same place
        text.encoded(["red star", "blue circle"], str(place))


def test_an_encoder_of_another_width_or_kind_is_one_line(monkeypatch):
    other = Statistics(torch.zeros(WIDTH + 1), torch.ones(WIDTH + 1))
    with pytest.raises(UserError, match="another encoder"):
        text.embed(["red star"], hashed, 4, other)
    headless = type("", (), {"__init__": lambda self, *given: None, "model": torch.nn.Linear(2, 2)})
    monkeypatch.setattr(text, "Local", headless)
    with pytest.raises(UserError, match="LLaMA"):
        text.load_encoder("gpt2")


# ------------------------------------------------------------------------------------------------------ conditioning


def test_attention_pooling_is_deepfloyds():
    """Outputs and gradients of the pooling of DeepFloyd IF, the open model built like Imagen."""
    from diffusers.models.embeddings import AttentionPooling

    torch.manual_seed(0)
    ours, theirs = shaken(unet.AttentionPool(12, 3)), AttentionPooling(3, 12)
    with torch.no_grad():
        for layer in ("q", "k", "v"):
            getattr(theirs, f"{layer}_proj").weight.copy_(getattr(ours, layer).weight)
        theirs.q_proj.bias.copy_(ours.q.bias)
        theirs.v_proj.bias.copy_(ours.v.bias)  # that of the keys changes nothing
        theirs.positional_embedding.copy_(ours.position)
    x = torch.randn(2, 5, 12, requires_grad=True)
    weights = torch.randn(2, 12)
    found = [torch.autograd.grad((pool(x) * weights).sum(), [x, *pool.parameters()]) for pool in (ours, theirs)]
    assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    for layer in ("q", "k", "v"):
        ours_w, theirs_w = getattr(ours, layer).weight, getattr(theirs, f"{layer}_proj").weight
        both = [
            torch.autograd.grad((pool(x) * weights).sum(), w)[0] for pool, w in ((ours, ours_w), (theirs, theirs_w))
        ]
        assert_close(*both, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["pooled", "attended"])
def test_text_is_used_twice(model, way):
    """Each way alone lets the text through."""
    x, t, both = inputs(2, 8)
    with torch.no_grad():
        if way == "pooled":
            for module in model.base.modules():
                if isinstance(module, unet.TextAttention):
                    module.cross_attention.out.weight.zero_()
        else:
            model.base.conditioning.pooled.weight.zero_()
        changed = model.base(x, t, both) - model.base(x, t, both.flip(0))
    assert changed.abs().max() > 1e-4


def test_there_is_no_encoder_to_train_and_the_other_stages_are_frozen(no_language_model):
    found = imagen.build(TINY)
    assert all(p.requires_grad for p in found.base.parameters())
    assert not any(p.requires_grad for stage in found.stages for p in stage.parameters())
    batch = next(imagen.batches(TINY))
    assert not batch["text"].requires_grad
    shaken(found).loss(batch)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in found.base.parameters())
    assert all(p.grad is None for stage in found.stages for p in stage.parameters())


def test_the_loss_is_that_of_v(model):
    batch = {"images": torch.rand(3, 3, 8, 8) * 2 - 1, "noise": torch.randn(3, 3, 8, 8), "text": words(3).half()}
    batch["t"] = torch.tensor([0.0, 0.3, 1.0])
    angle = (torch.pi / 2 * batch["t"])[:, None, None, None]
    x_t = angle.cos() * batch["images"] + angle.sin() * batch["noise"]
    v = angle.cos() * batch["noise"] - angle.sin() * batch["images"]
    expected = (model.base(x_t, batch["t"], words(3).half()) - v).square().mean()
    assert_close(model.loss(batch)[0], expected, atol=1e-3, rtol=1e-3)  # its cosine is bounded


# ------------------------------------------------------------------------------------------- guidance and thresholds


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_dynamic_thresholding_is_that_of_diffusers_for_each_sample(scale):
    from diffusers import DDPMScheduler

    x = scale * torch.randn(4, 3, 8, 8) * torch.tensor([0.1, 1.0, 2.0, 5.0])[:, None, None, None]
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.995, sample_max_value=1e9)
    found = sampling.THRESHOLDS["dynamic"](x)
    assert_close(found, scheduler._threshold_sample(x), atol=1e-6, rtol=1e-5)
    for row, whole in zip(x, found):  # nobody else's pixels count
        assert torch.equal(sampling.THRESHOLDS["dynamic"](row[None])[0], whole)
    assert_close(found[0], x[0].clamp(-1, 1))  # within the range it is static thresholding
    by_hand = np.quantile(x[3].abs().numpy(), 0.995)
    assert float(found[3].abs().max()) <= 1
    assert_close(found[3], x[3].clamp(-by_hand, by_hand) / max(by_hand, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threshold", ["dynamic", "static", "none"])
def test_guidance_is_thresholded_at_every_step_and_eps_taken_anew(model, threshold):
    x, _, both = inputs(2, 8)
    denoise = sampling.denoiser(model.base, both, 6.0, threshold)
    levels = path(cosine(torch.tensor([0.9, 0.5], dtype=torch.float64)))
    states = list(ddim(denoise, x, levels))
    z = x
    for state, now, after in zip(states, levels, [*list(levels)[1:], CLEAN]):
        t = torch.full((2,), float(now.t))
        with torch.no_grad():
            v = model.base(z, t, torch.zeros_like(both))
            v = v + 6.0 * (model.base(z, t, both) - v)
        x0 = sampling.THRESHOLDS[threshold](float(now.alpha) * z - float(now.sigma) * v)
        assert_close(state.x0, x0, atol=1e-4, rtol=1e-4)
        eps = (z - float(now.alpha) * x0) / float(now.sigma)
        z = float(after.alpha) * x0 + float(after.sigma) * eps
        assert_close(state.x, z, atol=1e-4, rtol=1e-4)


def test_a_weight_of_one_asks_the_network_once():
    seen = []

    def network(x, t, said, *more):
        seen.append((len(x), len(more)))
        return torch.zeros_like(x)

    x, _, both = inputs(2, 8)
    for weight in (1.0, 2.0):
        last(ddim(sampling.denoiser(network, both, weight, "none", x, torch.ones(2)), x, sampling.path(1)))
    assert seen == [(2, 2), (4, 2)]


def test_pictures_depend_on_the_prompt_and_the_seed(model):
    def draw(said, seed=0, **more):
        return imagen.generate(model, said, steps=3, seed=seed, **more)

    both = words(2)
    made = draw(both)
    assert [tuple(each.shape[2:]) for each in made] == [(8, 8), (16, 16), (32, 32)]
    assert torch.equal(made[2], draw(both)[2])
    for other in (draw(both, seed=1), draw(both.flip(0)), draw(both, guidance=9.0), draw(both, threshold="none")):
        assert (made[0] - other[0]).abs().max() > 1e-3
    augmented = draw(both, augmentation=0.5)
    assert torch.equal(augmented[0], made[0])
    assert (augmented[1] - made[1]).abs().max() > 1e-3
    assert torch.equal(sampling.noise(2, 8, 5)[1], sampling.noise(1, 8, 6)[0])  # row i depends on seed + i


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"augmentation": 1.5}, "augmentation"),
        ({"augmentation": float("nan")}, "augmentation"),
        ({"guidance": float("inf")}, "guidance must be a finite number"),
        ({"seed": 2**64}, "seed"),
        ({"steps": 0}, "steps"),
    ],
)
def test_impossible_samples_are_one_line(model, change, said):
    with pytest.raises(UserError, match=said) as error:
        imagen.generate(model, words(1), **({"steps": 2} | change))
    assert "\n" not in str(error.value)


def test_nothing_is_drawn_from_the_noise_of_something_else(model, no_language_model):
    """A seed says everything, and yet each use of noise has its own: PyTorch would forget all but 32 bits of a seed."""
    base, low, large = (
        sampling.noise(1, size, 5, *purpose).flatten() for size, purpose in ((8, ()), (8, (2,)), (16, ()))
    )
    assert not torch.equal(base, low)
    assert not torch.equal(low, large[: len(low)])
    assert not torch.equal(base, large[: len(base)])
    state = next(iter(sampling.draw_base(model, words(1), steps=2, seed=5)))
    first = torch.randn(base.shape, generator=generator(5, 8, 1))
    assert state.x.shape[-1] == 8
    assert not torch.equal(first, base)
    pictures, captions = training._corpus(TINY)
    batch = next(training.stage_batches(TINY, pictures, captions, training.sr_recipe(TINY, "first"), "first"))
    told = batch["low_noise"].flatten()[:64]
    stream = torch.randn(4096, generator=torch.Generator().manual_seed(TINY.training.seed * 1_000_003))
    assert not torch.isin(told, batch["noise"]).any()
    assert not torch.isin(told, stream).any()


# ------------------------------------------------------------------------------------------------- super-resolution


def test_augmentation_is_the_forward_process_and_its_level_is_told(model):
    low, noise, level = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([0.0, 0.5, 1.0])
    angle = (torch.pi / 2 * level)[:, None, None, None]
    assert_close(unet.augment(low, noise, level), angle.cos() * low + angle.sin() * noise, atol=1e-3, rtol=1e-3)
    x, t, said = inputs(3, 16)
    with torch.no_grad():
        told = [model.first_sr(x, t, said, low, torch.full((3,), value)) for value in (0.0, 0.2, 0.9)]
    assert (told[0] - told[1]).abs().max() > 1e-4
    assert (told[1] - told[2]).abs().max() > 1e-4


def test_super_resolution_learns_from_small_pictures_under_noise_of_random_levels(model, no_language_model):
    pictures, captions = training._corpus(TINY)
    recipe = dataclasses.replace(training.sr_recipe(TINY, "first"), batch_size=256)
    batch = next(training.stage_batches(TINY, pictures, captions, recipe, "first"))
    assert_close(batch["low"], nn.functional.avg_pool2d(batch["images"], 2))
    assert 0.45 < float(batch["level"].mean()) < 0.55
    assert 0.95 < float(batch["low_noise"].std()) < 1.05
    few = {name: value[:4] for name, value in batch.items()}
    seen = []
    handle = model.first_sr.register_forward_pre_hook(lambda module, given: seen.append(given))
    loss = model.first_sr.loss(few)[0]
    handle.remove()
    assert torch.equal(seen[0][3], unet.augment(few["low"], few["low_noise"], few["level"]))
    assert torch.equal(seen[0][4], few["level"])
    shaken(model.first_sr.requires_grad_(True))
    model.first_sr.loss(few)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.first_sr.parameters())
    assert loss.isfinite()


def test_the_last_stage_sees_only_crops(no_language_model):
    """Windows of the pictures whose corners are where a pixel of the small picture begins."""
    pictures, captions = training._corpus(TINY)
    recipe = dataclasses.replace(training.sr_recipe(TINY, "last"), batch_size=64)
    stream = training.stage_batches(TINY, pictures, captions, recipe, "last")
    images = next(stream)["images"]
    order = np.random.default_rng([recipe.seed, 0]).permutation(len(pictures.images))[:64]
    whole = to_float(pictures.images[order])
    windows = whole.unfold(2, 16, 2).unfold(3, 16, 2)  # every even corner
    same = (windows == images[:, :, None, None]).all(5).all(4).all(1)
    assert bool(same.flatten(1).any(1).all())
    corners = same.flatten(1).float().argmax(1)
    assert len(corners.unique()) > 10  # from all over the picture
    odd = whole[:, :, 1:, 1:].unfold(2, 16, 2).unfold(3, 16, 2)
    assert not bool((odd == images[:, :, None, None]).all(5).all(4).all(1).flatten(1).any(1).all())


def test_the_last_stage_draws_pictures_of_any_size(model):
    """Without self-attention, what is far from a pixel does not reach it, but through the statistics of the norms."""
    assert all(
        module.self_attention is None
        for module in model.last_sr.modules()
        if isinstance(module, unet.TextAttention)
    )  # fmt: skip
    assert any(
        module.self_attention is not None
        for module in model.first_sr.modules()
        if isinstance(module, unet.TextAttention)
    )
    for module in model.last_sr.modules():
        if isinstance(module, nn.GroupNorm):
            # only convolutions and text are left
            module.forward = lambda x, *_, silu=False: nn.functional.silu(x) if silu else x
    x, t, said = inputs(1, 64)
    low, level = torch.randn(1, 3, 32, 32), torch.full((1,), 0.1)
    with torch.no_grad():
        whole = model.last_sr(x, t, said, low, level)
        part = model.last_sr(x[:, :, 16:48, 16:48], t, said, low[:, :, 8:24, 8:24], level)
    assert_close(whole[:, :, 28:36, 28:36], part[:, :, 12:20, 12:20], atol=1e-3, rtol=1e-3)


def test_blocks_of_the_efficient_unet_work_at_the_lower_resolution():
    """Down-sampling comes before a block's convolutions and up-sampling after them; most blocks are the lowest, and
    none works on the picture's own pixels."""
    network = unet.EfficientUNet(8, (1, 2, 4), (1, 2, 4), 2, WIDTH, 16, True).eval()
    sides: list[int] = []
    for module in network.modules():
        if isinstance(module, unet.ResBlock):
            module.register_forward_hook(lambda module, given, made: sides.append(given[0].shape[-1]))
    x, t, said = inputs(1, 32)
    network(x, t, said, torch.randn(1, 3, 16, 16), torch.zeros(1))
    assert sides == [16] + [8] * 2 + [4] * 4 + [4] * 4 + [8] * 2 + [16]
    at_lowest = sum(parameters(block) for block in (network.down[2], network.up[0]))
    assert at_lowest > 0.6 * parameters(network)


def test_skip_connections_are_scaled():
    network = shaken(unet.EfficientUNet(8, (1, 2), (1, 1), 2, WIDTH, 16, True))
    made, given = [], []
    network.down[0].register_forward_hook(lambda module, inputs, output: made.append(output))
    network.up[1].register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    x, t, said = inputs(1, 16)
    network(x, t, said, torch.randn(1, 3, 8, 8), torch.zeros(1))
    assert_close(given[0][:, 8:], made[0] / 2**0.5)


def test_the_published_sizes():
    with torch.device("meta"):
        found = Imagen(PRESETS["paper"])
    sizes = [parameters(part) for part in (found.base, *found.stages)]
    # 2 B, 600 M and 400 M in the paper; the shape that appendix F.2 gives the second has no more than this
    assert sizes == [2_118_503_939, 428_115_715, 419_725_059]
    assert PRESETS["paper"].sizes == (64, 256, 1024)
    assert found.base.conditioning.text.in_features == 4096


def test_the_laptops_weights_can_be_shipped():
    with torch.device("meta"):
        assert 2 * parameters(Imagen(PRESETS["laptop"])) <= 6_000_000


# ---------------------------------------------------------------------------------------------------------- training


def test_a_tenth_of_the_captions_is_dropped_in_every_stage(no_language_model):
    pictures, captions = training._corpus(TINY)
    for stage in ("base", "first", "last"):
        recipe = dataclasses.replace(RECIPE, batch_size=1000)
        batch = next(training.stage_batches(TINY, pictures, captions, recipe, stage))
        assert 0.07 < float((batch["text"] == 0).all(2).all(1).float().mean()) < 0.13


def test_too_few_pictures_name_the_option_of_their_stage(no_language_model):
    pictures, captions = training._corpus(TINY)
    recipe = dataclasses.replace(RECIPE, batch_size=10**6)
    for stage, option in (("base", "--batch-size"), ("first", "--sr-batch-size"), ("last", "--sr-batch-size")):
        with pytest.raises(UserError, match=rf"do not fill a batch of 1000000: lower {option}$"):
            training.stage_batches(TINY, pictures, captions, recipe, stage)


def test_a_batch_is_a_function_of_its_position(no_language_model):
    pictures, captions = training._corpus(TINY)
    for stage in ("base", "first", "last"):
        stream = training.stage_batches(TINY, pictures, captions, RECIPE, stage)
        next(stream)
        state, batch = stream.state_dict(), next(stream)
        fresh = training.stage_batches(TINY, pictures, captions, RECIPE, stage)
        fresh.load_state_dict(state)
        again = next(fresh)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        assert not torch.equal(batch["images"], next(fresh)["images"])


def quiet_run(folder, config) -> Run:
    run = Run(folder, config)
    run.quiet, run.track = True, False
    return run


def test_all_of_it_resumes_after_any_stage(tmp_path, monkeypatch, no_language_model):
    monkeypatch.setattr(views, "show", lambda *arguments: None)
    straight = imagen.train(TINY, quiet_run(tmp_path / "a", TINY))
    pictures, captions = training._corpus(TINY)
    broken = quiet_run(tmp_path / "b", TINY)
    training.train_super_resolution(TINY, pictures, captions, broken, "first")
    resumed = imagen.train(TINY, quiet_run(tmp_path / "b", TINY))
    again = imagen.train(TINY, quiet_run(tmp_path / "b", TINY))
    fresh = imagen.build(TINY).state_dict()
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
        assert torch.equal(value, again.state_dict()[key]), key
    assert all(
        not torch.equal(fresh[key], value) for key, value in straight.state_dict().items() if "conv_out.weight" in key
    )
    loaded, _ = imagen.from_pretrained(tmp_path / "a" / "model")
    for key, value in straight.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_a_tiny_cascade_learns_and_reports(tmp_path, monkeypatch, no_language_model):
    recipe = dataclasses.replace(
        RECIPE, steps=24, batch_size=8, learning_rate=1e-2, optimizer="adam", ema_decay=0.0, warmup_steps=0,
        evaluate_every=8,
    )  # fmt: skip
    config = dataclasses.replace(TINY, first_sr_steps=160, last_sr_steps=160, sr_batch_size=8, training=recipe)
    run = quiet_run(tmp_path / "imagen" / "tiny", config)
    quick = {"steps": 2}
    for name in ("generate", "enlarge", "draw_base"):
        drawn = getattr(views, name)
        monkeypatch.setattr(views, name, lambda *given, drawn=drawn, **more: drawn(*given, **(more | quick)))
    found = imagen.train(config, run)
    pictures, captions = training._corpus(config)
    for stage, name in (("base", "base"), ("first", "first_sr"), ("last", "last_sr")):
        held = next(training.stage_batches(config, pictures, captions, dataclasses.replace(recipe, seed=7), stage))
        with torch.no_grad():
            learned, fresh = (float(getattr(each, name).loss(held)[0]) for each in (found, imagen.build(config)))
        assert learned < 0.8 * fresh, stage
    assert all("fixed_loss" in part.metrics()[-1] for part in (*run.stages(), run))
    assert [part.name for part in run.stages()] == ["first_super_resolution", "last_super_resolution"]
    assert len([row for row in run.samples() if row["kind"] == "figure"]) == 5
    page = imagen.sample(found, run, "a red star", count=2, steps=2)
    assert page.size == (2 * 192 + 2, 3 * 192 + 4)
    assert "figure" in run.report().read_text()
    with pytest.raises(UserError, match="count"):
        imagen.sample(found, run, count=0)


def test_captions_of_another_width_are_one_line(no_language_model):
    with pytest.raises(UserError, match="set text_width"):
        imagen.batches(dataclasses.replace(TINY, text_width=WIDTH + 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_heads": 5}, "n_heads"),
        ({"n_heads": 0}, "n_heads"),
        ({"attention": (True,)}, "attention"),
        ({"sr_channels": (8,)}, "sr_channels"),
        ({"sr_channels": ()}, "sr_channels"),
        ({"sr_multipliers": (), "sr_blocks": ()}, "sr_multipliers"),
        ({"sr_blocks": (1, -1)}, "sr_blocks"),
        ({"multipliers": (), "attention": ()}, "multipliers"),
        ({"text_width": -1}, "text_width"),
        ({"d_context": 0}, "d_context"),
        ({"sr_blocks": (1,)}, "sr_blocks"),
        ({"channels": 6}, "channels"),
        ({"channels": 144}, "channels"),
        ({"image_size": 9}, "image_size"),
        ({"crop": 15}, "crop"),
        ({"crop": 64}, "crop"),
        ({"scale": 1}, "scale"),
        ({"text_length": 0}, "text_length"),
    ],
)
def test_configurations_that_do_not_fit_are_one_line(change, said):
    with pytest.raises(UserError, match=said) as error:
        dataclasses.replace(TINY, **change)
    assert "\n" not in str(error.value)


def test_other_weights_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="never published"):
        imagen.from_pretrained(tmp_path)


def test_prompts_of_shapes_differ_in_their_embeddings():
    captions = Captions.of(shapes(50).captions, hashed)
    assert isinstance(captions.statistics, Statistics)
    rows = captions.rows(torch.arange(len(captions.texts)), 9).float().flatten(1)
    assert float(torch.pdist(rows).min()) > 0.1
