"""Latent diffusion as a system: the first stage's losses, what training sees, what sampling promises."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from canon.core.data.images import to_float
from canon.core.data.shapes import shapes
from canon.core.errors import UserError
from canon.core.generation.diffusion_samplers import last
from canon.core.lab import Run
from canon.images import latent_diffusion as ldm
from canon.images.clip.tokenizer import tokenize
from canon.images.latent_diffusion import training, views, weights
from canon.images.latent_diffusion.first_stage import FirstStage, adaptive_weight, lpips
from canon.images.latent_diffusion.model import PRESETS, Config, LatentDiffusion, autoencoder
from canon.images.latent_diffusion.sampling import generate, paste

TINY = dataclasses.replace(
    PRESETS["shapes"], first_channels=8, channels=16, multipliers=(1, 2), d_model=32, n_heads=2, prediction="eps"
)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return to_float(shapes(count, seed=seed).images)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    """Random weights, also where training starts from zeros."""
    torch.manual_seed(0)
    found = LatentDiffusion(TINY).eval()
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return training.corpus("shapes", 32, TINY.vocab_size)[1]


# ------------------------------------------------------------------------------------------------------ first stage


def test_the_perceptual_distance_is_the_published_one():
    """The numbers are those of PyPI's lpips 0.1.4 on VGG-16 with these weights (its own linear layers are equal)."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 32, 32, generator=g) * 2 - 1
    y = (x + 0.3 * torch.randn(3, 3, 32, 32, generator=g)).clamp(-1, 1).requires_grad_()
    distance = lpips()(x, y)
    torch.testing.assert_close(distance, torch.tensor([0.0618726276, 0.0639945641, 0.0609476194]), atol=2e-6, rtol=0)
    (gradient,) = torch.autograd.grad(distance.sum(), y)
    assert float(gradient.norm()) == pytest.approx(0.06021934, rel=1e-4)
    expected = torch.tensor([-2.183356809837278e-05, -0.0002005440037464723, -0.00019361569138709456])
    torch.testing.assert_close(gradient[0, :, 5, 7], expected, atol=1e-7, rtol=1e-3)


def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer():
    torch.manual_seed(0)
    last_layer = nn.Conv2d(6, 3, 3, padding=1)
    h, a, b = torch.randn(2, 6, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    y = last_layer(h)
    norms = [torch.autograd.grad((y * g).sum(), last_layer.weight, retain_graph=True)[0].norm() for g in (a, b)]
    found = adaptive_weight(a, b, h, last_layer.weight)
    torch.testing.assert_close(found, norms[0] / (norms[1] + 1e-4))
    assert adaptive_weight(a, torch.zeros_like(b), h, last_layer.weight) == 1e4


@pytest.mark.parametrize("codebook", [0, 16])
def test_the_first_stage_learns_what_two_optimisers_would(codebook):
    """The gradients of one backward pass equal those of the generator's and the discriminator's own losses."""
    torch.manual_seed(0)
    stage = FirstStage(
        autoencoder(dataclasses.replace(TINY, codebook=codebook)), width=8, adversary_from=3, perceptual_every=4,
        adversary_weight=0.7,
    )  # fmt: skip
    x, noise = pictures(8), torch.randn(8, 4, 8, 8)
    with torch.no_grad():
        stage.logvar.fill_(0.3)
    loss, metrics = stage.loss({"images": x, "noise": noise, "step": torch.full((8,), 3), "row": torch.arange(8)})
    loss.backward()
    found = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    stage.zero_grad()

    # the generator's loss as the paper writes it, with the adversary's weight as a constant
    x_hat, penalty, _ = stage.autoencoder.reconstruct(x, noise)
    nll = ((x - x_hat).abs().sum() / 8 + lpips()(x[::4], x_hat[::4]).mean() * 3072) / stage.logvar.exp()
    nll = nll + stage.logvar * 3072
    adversary = -stage.discriminator(x_hat).mean()
    (nll + penalty + 0.7 * metrics["adversary_weight"] * adversary).backward()
    for name, p in stage.named_parameters():
        if not name.startswith("discriminator"):
            torch.testing.assert_close(found[name], p.grad, atol=2e-3, rtol=2e-3, msg=name)
    last_layer = stage.autoencoder.decoder.conv_out.weight
    x_hat, *_ = stage.autoencoder.reconstruct(x, noise)
    nll = ((x - x_hat).abs().sum() / 8 + lpips()(x[::4], x_hat[::4]).mean() * 3072) / stage.logvar.exp()
    norms = [
        torch.autograd.grad(value, last_layer, retain_graph=True)[0].norm()
        for value in (nll, -stage.discriminator(x_hat).mean())
    ]
    torch.testing.assert_close(metrics["adversary_weight"], norms[0] / (norms[1] + 1e-4), atol=1e-3, rtol=1e-3)

    stage.zero_grad()
    real, fake = stage.discriminator(x), stage.discriminator(x_hat.detach())
    (0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())).backward()
    for name, p in stage.discriminator.named_parameters():
        torch.testing.assert_close(found[f"discriminator.{name}"], p.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_the_adversary_waits():
    torch.manual_seed(0)
    stage = FirstStage(autoencoder(TINY), width=8, adversary_from=3)
    batch = {
        "images": pictures(8),
        "noise": torch.zeros(8, 4, 8, 8),
        "step": torch.full((8,), 2),
        "row": torch.arange(8),
    }
    stage.loss(batch)[0].backward()
    assert all(not p.grad.any() for p in stage.discriminator.parameters())


# --------------------------------------------------------------------------------------------------------- the model


def test_the_loss_is_that_of_the_predicted_noise(model):
    torch.manual_seed(1)
    noise, tokens = torch.randn(4, 2, 4, 8, 8), torch.randint(0, 600, (4, 16))
    batch = {"images": pictures(4), "tokens": tokens, "noise": noise, "t": torch.tensor([0.0, 0.25, 0.5, 0.9999])}
    loss, _ = model.loss(batch)
    z = model.encode(batch["images"], noise[:, 1])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = (1 - betas).cumprod(0)[[0, 250, 500, 999]].float()[:, None, None, None]
    z_t = bar.sqrt() * z + (1 - bar).sqrt() * noise[:, 0]
    expected = (model(z_t, torch.tensor([0, 250, 500, 999]), model.text(tokens)) - noise[:, 0]).square().mean()
    torch.testing.assert_close(loss, expected)


def test_the_first_stage_is_frozen_and_the_rest_is_not():
    found = LatentDiffusion(TINY)
    assert not any(p.requires_grad for p in found.autoencoder.parameters())
    assert all(p.requires_grad for p in [*found.unet.parameters(), *found.text.parameters()])


def test_a_tenth_of_the_captions_is_dropped():
    config = dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, batch_size=1000))
    stream = ldm.batches(config)
    batch = next(stream)
    empty = (batch["tokens"] == stream.empty).all(1).float().mean()
    assert 0.07 < empty < 0.13
    assert abs(float(batch["t"].mean()) - 0.5) < 0.03
    assert abs(float(batch["noise"].std()) - 1) < 0.01


def test_pictures_depend_on_the_prompt_and_the_seed(model, tokenizer):
    def draw(prompts, seed=0, **more):
        return last(generate(model, tokenizer, prompts, steps=4, seed=seed, **more))

    both = draw(["a large red circle in the middle", "a small blue star in the middle"], sampler="ddim")
    alone = draw(["a small blue star in the middle"], seed=1, sampler="ddim")
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)  # row i depends on seed + i
    assert (draw(["a red circle"]) - draw(["a blue star"])).abs().max() > 1e-3
    assert (draw(["a red circle"], guidance=1.0) - draw(["a red circle"], guidance=8.0)).abs().max() > 1e-3


def test_image_to_image_starts_where_the_strength_says(model, tokenizer):
    x = pictures(1)[0]
    states = list(generate(model, tokenizer, ["a star"], steps=10, image=x, strength=0.3))
    assert len(states) == 3
    with pytest.raises(UserError, match="leaves none"):
        list(generate(model, tokenizer, ["a star"], steps=10, image=x, strength=0.01))


def test_inpainting_keeps_the_rest_bit_for_bit(model, tokenizer):
    x = pictures(1)[0]
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 8:20] = 1
    z = last(generate(model, tokenizer, ["a star"], steps=4, image=x, mask=mask))
    known = model.encode(x[None])
    touched = nn.functional.adaptive_max_pool2d(mask, 8)[0] > 0
    assert torch.equal(z[0][:, ~touched], known[0][:, ~touched])
    assert (z - known)[0][:, touched].abs().min() > 0
    painted = paste(model.decode(z), x, mask)
    assert torch.equal(painted[0][:, mask[0] == 0], x[:, mask[0] == 0])
    assert not torch.equal(painted[0][:, mask[0] == 1], x[:, mask[0] == 1])


def test_an_inpainting_model_is_shown_the_mask_and_what_stays(tokenizer):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, condition_channels=5)
    shown = LatentDiffusion(config).eval()
    x, mask = pictures(2), torch.zeros(2, 1, 32, 32)
    mask[:, :, :, 16:] = 1
    condition = shown.masked(x, mask)
    assert torch.equal(condition[:, 0, :, 4:], torch.ones(2, 8, 4))
    other = x.clone()
    other[:, :, :, 16:] = 0.3  # what is hidden does not matter
    assert torch.equal(condition, shown.masked(other, mask))
    stream = ldm.batches(dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=256)))
    state = stream.state_dict()
    masks = next(stream)["mask"]
    stream.load_state_dict(state)
    assert torch.equal(next(stream)["mask"], masks)
    assert 0.08 < (masks.flatten(1).mean(1) == 1).float().mean() < 0.22
    assert 0.1 < masks.mean() < 0.5


def test_the_strips_are_the_samplers_own_states(model, tokenizer):
    states = list(generate(model, tokenizer, ["a red star"], steps=5, sampler="ddim"))
    again = last(generate(model, tokenizer, ["a red star"], steps=5, sampler="ddim"))
    assert torch.equal(states[-1].x, again)


def test_attention_maps_are_probabilities_over_the_tokens(model, tokenizer):
    maps, words, picture = views.attention_maps(model, tokenizer, "a large red star in the middle", steps=2)
    assert words[0] == "start"
    assert "star" in words
    assert maps.shape == (len(words), 8, 8)
    assert (maps.sum(0) <= 1 + 1e-4).all()
    assert maps.min() >= 0
    assert picture.shape == (3, 32, 32)


def test_compression_of_stable_diffusion_is_48():
    with torch.device("meta"):
        assert views.compression(LatentDiffusion(PRESETS["sd-v1"])) == 48


def test_the_whole_of_it_resumes_after_either_stage(tmp_path, monkeypatch):
    recipe = dataclasses.replace(TINY.training, steps=3, batch_size=4, precision="fp32", log_every=1, evaluate_every=0)
    config = dataclasses.replace(TINY, first_steps=3, training=recipe)
    monkeypatch.setattr(views, "show", lambda *arguments: None)

    def run(name):
        made = Run(tmp_path / name, config)
        made.quiet = True
        return made

    straight = ldm.train(config, run("a"))
    training.train_first_stage(config, run("b"))
    resumed = ldm.train(config, run("b"))
    again = ldm.train(config, run("b"))
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
        assert torch.equal(value, again.state_dict()[key]), key
    loaded, _ = ldm.from_pretrained(tmp_path / "a" / "model")
    assert torch.equal(loaded.latent_scale, straight.latent_scale)
    z = straight.encode(pictures(64))
    assert 0.5 < float(z.std()) < 2


# ---------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_perfect_prediction_has_no_loss_and_draws_the_picture(prediction, tokenizer, monkeypatch):
    config = dataclasses.replace(TINY, prediction=prediction)
    model = ldm.build(config)
    batch = next(ldm.batches(config))
    z = model.encode(batch["images"][:1], batch["noise"][:1, 1])
    alphas, sigmas = (getattr(model.schedule, name) for name in ("alpha", "sigma"))

    def knows(z_t, t, context, condition=None):
        alpha, sigma = (x[t.long()].view(-1, 1, 1, 1).float() for x in (alphas, sigmas))
        eps = (z_t - alpha * z) / sigma
        return eps if prediction == "eps" else alpha * eps - sigma * z

    monkeypatch.setattr(model, "forward", knows)
    assert float(model.loss({key: value[:1] for key, value in batch.items()})[0]) < 1e-8
    drawn = last(generate(model, tokenizer, ["a star"], steps=4, guidance=2.0))
    torch.testing.assert_close(drawn, z, atol=1e-3, rtol=1e-3)


def test_stable_diffusion_loads_whole_from_both_layouts(tmp_path, monkeypatch):
    """At a small size, with a text encoder of transformers: every tensor of ours is set, and computes as theirs."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    widths = {"block_out_channels": (32, 64), "layers_per_block": 1}
    unet = UNet2DConditionModel(
        sample_size=8, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8, **widths,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=2, **widths, **kinds)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
        )
    )
    config = Config(
        image_size=16, first_channels=32, first_multipliers=(1, 2), channels=32, multipliers=(1, 2),
        attention=(True, True), res_blocks=1, unet_heads=4, d_model=32, n_layers=2, n_heads=2,
    )  # fmt: skip
    monkeypatch.setattr(weights, "PRESETS", {"sd-v1": config})
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        name = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
        (tmp_path / "sd" / part).mkdir(parents=True)
        save_file(module.state_dict(), tmp_path / "sd" / part / name)
    model, tokenizer = ldm.from_pretrained(tmp_path / "sd")
    tokens = tokenizer_rows(tokenizer, "a red apple")
    x, z, t = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        context = text(tokens).last_hidden_state
        torch.testing.assert_close(model.text(tokens), context, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(z, t, context), unet(z, t, context).sample, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.encode(x), 0.18215 * vae.encode(x).latent_dist.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.decode(z), vae.decode(z / 0.18215).sample, atol=1e-5, rtol=1e-4)

    # The single file: the same tensors under CompVis's names. Its autoencoder stores matrices as 1x1 convolutions.
    one = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text.state_dict().items()}
    one["model_ema.decay"] = torch.tensor(0.9999)
    for prefix, modules, part in (
        ("model.diffusion_model.", weights.UNET_COMPVIS, model.unet),
        ("first_stage_model.", weights.autoencoder_compvis(2), model.autoencoder),
    ):
        for ours, tensor in part.state_dict().items():
            theirs = published_name(ours, weights.names_of(modules))
            kernel = (tensor.dim() == 2 and "attn_1" in theirs) or ".proj_in" in theirs or ".proj_out" in theirs
            one[prefix + theirs] = tensor[:, :, None, None].clone() if kernel and tensor.dim() == 2 else tensor.clone()
    save_file(one, tmp_path / "v1.safetensors")
    single, _ = ldm.from_pretrained(tmp_path / "v1.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, single.state_dict()[key]), key


def tokenizer_rows(tokenizer, text: str) -> torch.Tensor:
    return tokenize(tokenizer, [text], 77, pad=tokenizer.eot)


def published_name(ours: str, names) -> str:
    """The name that the table reads as ours; of several the first."""
    for theirs, to in names.items():
        pattern = re.escape(to if isinstance(to, str) else to[0])
        if found := re.fullmatch(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", pattern), ours):
            return theirs.format(**found.groupdict())
    raise AssertionError(ours)


@pytest.mark.parametrize("what", ["unet alone", "another system", "another size", "nothing"])
def test_other_checkpoints_are_one_line(what, tmp_path):
    import json

    from safetensors.torch import save_file

    said = {
        "unet alone": "give the folder above it",
        "another system": "holds the system 'clip'",
        "another size": "not that of Stable Diffusion v1",
        "nothing": "has no unet",
    }
    if what == "unet alone":
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    if what == "another system":
        (tmp_path / "config.json").write_text(json.dumps({"system": "clip"}))
    if what == "another size":
        for part in weights.FILES.values():
            (tmp_path / part).parent.mkdir()
            save_file({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, (tmp_path / part).with_suffix(".safetensors"))
    with pytest.raises(UserError, match=said[what]) as error:
        ldm.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_heads": 5}, "n_heads"),
        ({"unet_heads": 3}, "unet_heads"),
        ({"condition_channels": 2}, "condition_channels"),
        ({"attention": (True,)}, "attention"),
        ({"image_size": 36}, "image_size"),
    ],
)
def test_configurations_that_do_not_fit_are_one_line(change, said):
    with pytest.raises(UserError, match=said):
        Config(**{f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)} | change)
