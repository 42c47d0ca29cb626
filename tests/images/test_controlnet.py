"""ControlNet against diffusers and OpenCV; what its zeros, its lock and its control promise."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from canon.core.data.images import load_pictures, to_float
from canon.core.data.shapes import shapes
from canon.core.errors import UserError
from canon.core.hub.pretrained import save_pretrained
from canon.core.lab import Run
from canon.images import controlnet
from canon.images.clip.tokenizer import train_tokenizer
from canon.images.controlnet import Control, ControlNet, canny, connection_weights, controlled, load_control, steered
from canon.images.latent_diffusion import PRESETS, LatentDiffusion
from canon.images.latent_diffusion.sampling import captions
from canon.images.latent_diffusion.sampling import generate as uncontrolled
from canon.images.latent_diffusion.unet import UNet
from tests.images.test_latent_diffusion_networks import SMALL, compvis, double, randomise

TINY = dataclasses.replace(
    PRESETS["shapes"], first_channels=8, channels=16, multipliers=(1, 2), d_model=32, n_heads=2, prediction="eps"
)
RECIPE = dataclasses.replace(
    controlnet.PRESETS["laptop"].training, steps=3, batch_size=4, precision="fp32", log_every=1, evaluate_every=0
)
OPENCV_EDGES = (
    "1092084210a2484230a2504220425042210610422304a0c36204008c430c20824118d1825131c1074587001cf0643c60"
    "030000045e79e0bf010986101e0c3800018000fcf871cf03064c087c0100e1800881003c707e3c608710c38f00000000"
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
    return controlnet.Config(base=base, pairs=40, training=RECIPE)


def awake(model):
    """A model whose zero convolutions are not zero."""
    with torch.no_grad():
        for p in [*model.control.zero_convs.parameters(), *model.control.hint[-1].parameters()]:
            p.normal_(0, 0.1)
    return model


def queries(model, rows=2):
    own = model.base.config
    z_t = torch.randn(rows, own.latent_channels, own.latent_size, own.latent_size)
    return z_t, torch.linspace(100, 900, rows), torch.randn(rows, own.context_length, own.d_model)


# ----------------------------------------------------------------------------------------- the network, and its names


def their_control(channels, attention, heads, d_context, hint):
    return ControlNetModel(
        block_out_channels=channels,
        down_block_types=[("CrossAttn" if a else "") + "DownBlock2D" for a in attention],
        attention_head_dim=heads,  # the number of heads, by an old mistake of theirs
        cross_attention_dim=d_context,
        conditioning_embedding_out_channels=hint,
    )


@pytest.mark.parametrize("factor", [4, 8])
def test_outputs_and_gradients_are_those_of_diffusers(factor):
    hint = (16, 32, 96, 256)[: factor.bit_length()]
    theirs = randomise(their_control((32, 64, 64), (True, True, False), 4, 24, hint))
    mine, fresh = (ControlNet(UNet(*SMALL), factor).double() for _ in range(2))
    load_control(mine, theirs.state_dict())
    z_t, context, t = double(2, 4, 8, 8), double(2, 5, 24), torch.tensor([3.0, 777.0])
    image = (torch.rand(2, 3, 8 * factor, 8 * factor, dtype=torch.float64) * 2 - 1).requires_grad_()
    ours = mine(z_t, t, context, image)
    skips, middle = theirs(z_t, t, context, (image + 1) / 2, return_dict=False)
    assert len(ours) == len(mine.copy.down) + 1 == 10
    for a, b in zip(ours, [*skips, middle], strict=True):
        assert float(b.detach().std()) > 0.1
        assert_close(a, b)

    weights = [torch.randn_like(x) for x in ours]
    inputs, of_mine, of_theirs = (z_t, context, image), dict(mine.named_parameters()), dict(theirs.named_parameters())
    a = torch.autograd.grad(sum((x * w).sum() for x, w in zip(ours, weights)), [*inputs, *of_mine.values()])
    total = sum((x * w).sum() for x, w in zip([*skips, middle], weights))
    b = torch.autograd.grad(total, [*inputs, *of_theirs.values()])
    for x, y in zip(a[:3], b):
        assert_close(x, y)
    load_control(fresh, dict(zip(of_theirs, b[3:])))  # their gradients, renamed as if they were weights
    for (name, x), y in zip(fresh.named_parameters(), a[3:], strict=True):
        assert_close(y, x.detach(), msg=name)


def authors(net):
    """The weights of a ControlNet under the names of the authors' files."""
    found = {f"control_model.{name}": tensor for name, tensor in compvis(net.copy).items()}
    state, end = net.state_dict(), len(net.zero_convs) - 1
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        number, _, kind = rest.rpartition(".")
        if part == "hint":
            found[f"control_model.input_hint_block.{number}.{kind}"] = tensor
        elif part == "zero_convs":
            place = "middle_block_out.0" if int(number) == end else f"zero_convs.{number}.0"
            found[f"control_model.{place}.{kind}"] = tensor
    assert len(found) == len(state)
    return found


def test_both_layouts_carry_every_weight_to_its_place():
    """Their converter must make their own model of our names for the authors' files."""
    theirs = randomise(their_control((32, 64, 64), (True, True, False), 4, 24, (16, 32, 96, 256))).float()
    mine, fresh = (ControlNet(UNet(*SMALL), 8) for _ in range(2))
    load_control(mine, theirs.state_dict())
    published = authors(mine)
    converted = convert_controlnet_checkpoint(dict(published), theirs.config)
    assert converted.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(converted[name].view_as(tensor), tensor), name
    whole = {"model.diffusion_model.out.0.weight": torch.ones(3)}  # the files hold Stable Diffusion, too
    load_control(fresh, {**published, **whole})
    for name, tensor in mine.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_stable_diffusion_v1_at_full_size():
    with torch.device("meta"):
        net = ControlNet(UNet(), 8)
        theirs = their_control((320, 640, 1280, 1280), (True, True, True, False), 8, 768, (16, 32, 96, 256))
    assert sum(p.numel() for p in net.parameters()) == 361_279_120
    assert len(net.zero_convs) == 13
    state = theirs.state_dict()
    assert len(state) == len(net.state_dict()) == 340
    for tensors in (state, authors(net)):
        load_control(net, tensors)
        name = next(reversed(tensors))
        with pytest.raises(UserError, match="1 missing"):
            load_control(net, {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(UserError, match=r"1 unexpected \(strange"):
        load_control(net, {**state, "strange.weight": state["conv_in.weight"]})


# -------------------------------------------------------------------------------------------------- zeros and the lock


def test_zero_convolutions_are_a_bit_exact_no_op(config):
    model = controlnet.build(config)
    batch = next(controlnet.batches(config))
    z_t, t, context = queries(model)
    added = model.control(z_t, t, context, torch.rand(2, 3, 32, 32) * 2 - 1)
    assert not any(x.any() for x in added)
    assert torch.equal(controlled(model.base.unet, z_t, t, context, added), model.base.unet(z_t, t, context))
    plain = {**batch, "images": batch["images"][:, :3]}
    assert torch.equal(model.loss(batch)[0], model.base.loss(plain)[0])


def test_zeros_learn_first_and_the_copy_after_them(config):
    model, stream = controlnet.build(config), controlnet.batches(config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    began = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        model.loss(next(stream))[0].backward()
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, began[name])}
        ends = {name for name in began if name.startswith("control.zero_convs.")}
        inner = {name for name in began if name.startswith("control.copy.")}
        entry = {name for name in began if name.startswith("control.hint.")}
        first = {name for name in entry if name.startswith(f"control.hint.{len(model.control.hint) - 1}.")}
        gradients = {name for name, p in model.named_parameters() if p.requires_grad and p.grad.any()}
        assert gradients == (ends, ends | inner | first, ends | inner | entry)[step]
        assert moved >= (ends, ends | first, ends | first)[step]
        assert bool(moved & inner) == (step > 0)


def test_training_leaves_the_base_bit_for_bit(config, tmp_path, monkeypatch):
    monkeypatch.setattr(controlnet, "show", lambda *arguments: None)
    run = Run(tmp_path / "controlnet" / "r", config)
    run.quiet = True
    model = controlnet.train(config, run)
    original, _ = controlnet.load_base(config.base)
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.base.state_dict()[name], tensor), name
    assert any(p.any() for p in model.control.zero_convs.parameters())
    assert not any(p.requires_grad for p in model.base.parameters())
    assert all(p.requires_grad for p in model.control.parameters())
    # what it wrote needs no base any more
    (tmp_path / "elsewhere").mkdir()
    moved = (run.path / "model").rename(tmp_path / "elsewhere" / "model")
    monkeypatch.setattr(controlnet, "load_base", lambda source: pytest.fail("the base was asked for"))
    loaded, tokenizer = controlnet.from_pretrained(moved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert tokenizer.encode("a red star")
    moved.rename(run.path / "model")
    page = controlnet.sample(model, run, steps=2, count=2)
    assert page.size == (3 * 256 + 2 * 2, 256)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "hint.png")
    drawn = controlnet.sample(model, run, "a star", hint=str(tmp_path / "hint.png"), drawn=True, steps=2, mode="guess")
    assert np.asarray(drawn)[:, :256].max() == 0
    assert len(run.samples()) == 2


def test_unlocked_the_decoder_learns_too(config):
    model = controlnet.build(dataclasses.replace(config, sd_locked=False))
    learning = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and "base." in name}
    assert learning == {"up", "norm_out", "conv_out"}
    model.loss(next(controlnet.batches(config)))[0].backward()
    assert all(p.grad is None for p in [*model.base.unet.down.parameters(), *model.base.text.parameters()])
    assert all(p.grad.any() for p in model.base.unet.up.parameters())


def test_the_locked_encoder_keeps_no_graph(config):
    model = awake(controlnet.build(config))
    model.base.requires_grad_(True)  # even if someone unlocks it
    model.loss(next(controlnet.batches(config)))[0].backward()
    assert all(p.grad is None for p in [*model.base.unet.down.parameters(), *model.base.unet.middle.parameters()])
    assert all(p.grad is None for p in [*model.base.text.parameters(), *model.base.autoencoder.parameters()])
    assert all(p.grad is not None and p.grad.any() for p in model.control.parameters())


# --------------------------------------------------------------------------------------------- loss, data, conditions


def test_the_loss_is_that_of_the_predicted_noise(config):
    model, batch = awake(controlnet.build(config)), next(controlnet.batches(config))
    images, hint = batch["images"][:, :3], batch["images"][:, 3:]
    eps, posterior = batch["noise"].unbind(1)
    z = model.base.encode(images, posterior)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    t = (batch["t"] * 1000).long()
    bar = (1 - betas).cumprod(0)[t].float()[:, None, None, None]
    z_t, context = bar.sqrt() * z + (1 - bar).sqrt() * eps, model.base.text(batch["tokens"])
    control = model.control(z_t, t.float(), context, hint)
    expected = (model.base.unet(z_t, t.float(), context, control) - eps).square().mean()
    assert_close(model.loss(batch)[0], expected)


def test_half_of_the_prompts_are_empty_and_hints_are_of_the_pictures(config):
    recipe = dataclasses.replace(RECIPE, batch_size=400)
    stream = controlnet.batches(dataclasses.replace(config, pairs=500, training=recipe))
    batch = next(stream)
    base, tokenizer = controlnet.load_base(config.base)
    empty = (batch["tokens"] == captions(base, tokenizer, [""])).all(1)
    assert 0.42 < empty.float().mean() < 0.58
    assert torch.equal(canny(batch["images"][:8, :3]), batch["images"][:8, 3:])
    state = stream.state_dict()
    again, more = next(stream), controlnet.batches(dataclasses.replace(config, pairs=500, training=recipe))
    more.load_state_dict(state)
    assert all(torch.equal(again[key], value) for key, value in next(more).items())
    held = next(controlnet.batches(config, held_out=True))["images"][:, :3]
    learned = to_float(load_pictures("shapes", 32).images[: config.pairs])
    assert torch.cdist(held.flatten(1), learned.flatten(1)).min() > 1


def test_edges_are_those_of_opencv():
    """What cv2.Canny(picture, 100, 200) of OpenCV 5.0.0 finds."""
    i, j, c = np.meshgrid(np.arange(24), np.arange(32), np.arange(3), indexing="ij")
    picture = 128 + 90 * np.sin(i * i / 40 + c) + 60 * np.cos(j * (3 + c) / 9 + i / 7)
    picture = torch.from_numpy(picture.clip(0, 255).round().astype(np.uint8)).permute(2, 0, 1)
    assert int(picture.sum()) == 326_522
    found = canny(to_float(picture)[None])
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(found[0, 0], found[0, 2])
    assert np.packbits(found[0, 0].numpy() > 0).tobytes().hex() == OPENCV_EDGES


def test_conditions_say_form_or_colour():
    drawn = shapes(64)
    images = to_float(drawn.images)
    outline = torch.nn.functional.max_pool2d(drawn.masks[:, None].float(), 5, 1, 2) - (
        1 - torch.nn.functional.max_pool2d(1 - drawn.masks[:, None].float(), 5, 1, 2)
    )
    for condition in (controlnet.canny, controlnet.scribble):
        found = (condition(images)[:, :1] > 0).float()
        assert (found * outline).sum() / found.sum() > 0.9
        assert (found.sum((1, 2, 3)) > 10).all()
    assert (controlnet.scribble(images) > 0).float().mean() > 1.5 * (controlnet.canny(images) > 0).float().mean()
    coarse = controlnet.palette(images)
    assert len(coarse[0].flatten(1).unique(dim=1).t()) <= 16
    assert_close(coarse.mean((2, 3)), images.mean((2, 3)))


def test_conditions_from_files(base, tmp_path):
    (tmp_path / "hints").mkdir()
    for name, value in (("a", 10), ("b", 200)):
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
        Image.fromarray(np.full((32, 32, 3), value + 5, np.uint8)).save(tmp_path / "hints" / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    recipe = dataclasses.replace(RECIPE, batch_size=2)
    config = controlnet.Config(base=base, data=str(tmp_path), condition="files", training=recipe)
    images, hints = next(controlnet.batches(config))["images"].split(3, 1)
    assert_close(hints - images, torch.full_like(images, 5 / 127.5), atol=1e-6, rtol=0)
    (tmp_path / "hints" / "b.png").unlink()
    controlnet.corpus.cache_clear()
    with pytest.raises(UserError, match="no picture"):
        controlnet.batches(config)


# --------------------------------------------------------------------------------------------------------- at sampling


def test_control_is_added_where_the_u_net_takes_it(config):
    model = awake(controlnet.build(config))
    z_t, t, context = queries(model)
    hint = torch.rand(2, 3, 32, 32) * 2 - 1
    added = model.control(z_t, t, context, hint)
    assert [x.shape[-1] for x in added] == [8, 8, 4, 4, 4]
    expected = model.base.unet(z_t, t, context, added)
    assert_close(controlled(model.base.unet, z_t, t, context, added), expected)
    assert (expected - model.base.unet(z_t, t, context)).abs().max() > 1e-3
    only_middle = awake(controlnet.build(dataclasses.replace(config, only_mid_control=True)))
    only_middle.control.load_state_dict(model.control.state_dict())
    *skips, middle = only_middle.control(z_t, t, context, hint)
    assert not any(x.any() for x in skips)
    assert torch.equal(middle, added[-1])
    only_middle.loss(next(controlnet.batches(config)))[0].backward()  # on several processes, each must have a gradient
    assert all(p.grad is not None for p in only_middle.control.parameters())


def test_controls_add_up_by_their_strengths(config):
    torch.manual_seed(3)
    one, two = awake(controlnet.build(config)), awake(controlnet.build(config))
    z_t, t, context = queries(one)
    hints = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    empty = torch.randn_like(context)
    levels = [0.1, 0.2, 0.3, 0.4, 0.5]
    controls = [Control(one.control, hints[0], 0.5), Control(two.control, hints[1], levels)]
    found = steered(one.base.unet, torch.cat([context, empty]), controls, 1.0)(z_t, t)
    a, b = one.control(z_t, t, context, hints[0]), two.control(z_t, t, context, hints[1])
    total = [0.5 * x + s * y for x, y, s in zip(a, b, levels, strict=True)]
    assert_close(found, one.base.unet(z_t, t, context, total))
    with pytest.raises(ValueError, match="zip"):
        Control(one.control, hints[0], levels[1:])(z_t, t, context)


@pytest.mark.parametrize("mode", ["both", "guess", "resolution"])
def test_guidance_and_control(config, mode):
    model = awake(controlnet.build(config))
    z_t, t, context = queries(model)
    empty, hint = torch.randn_like(context), torch.rand(2, 3, 32, 32) * 2 - 1
    found = steered(model.base.unet, torch.cat([context, empty]), [Control(model.control, hint)], 3.0, mode)(z_t, t)
    unet, with_prompt = model.base.unet, model.control(z_t, t, context, hint)
    scales = {"both": [1.0] * 5, "guess": [0.825**i for i in (4, 3, 2, 1, 0)], "resolution": [1, 1, 2, 2, 2]}[mode]
    conditional = unet(z_t, t, context, [w * x for w, x in zip(scales, with_prompt)])
    without = model.control(z_t, t, empty, hint) if mode == "both" else None
    unconditional = unet(z_t, t, empty, without)
    assert_close(found, unconditional + 3 * (conditional - unconditional))


def test_connection_weights_of_stable_diffusion():
    sizes = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 4
    guess = connection_weights("guess", sizes)
    assert_close(torch.tensor(guess), 0.825 ** torch.arange(12, -1, -1.0))
    assert guess[0] == pytest.approx(0.0994, abs=1e-4)
    assert connection_weights("resolution", sizes) == [1.0] * 3 + [2.0] * 3 + [4.0] * 3 + [8.0] * 4
    assert connection_weights("both", sizes) == [1.0] * 13


def test_samples_start_from_the_noise_of_latent_diffusion(config):
    base, tokenizer = controlnet.load_base(config.base)
    net, prompts = ControlNet(base.unet, 4), ["a large red star in the middle", "a small blue circle in the middle"]
    hint = torch.rand(2, 3, 32, 32)
    found = controlnet.generate(base, tokenizer, prompts, [Control(net, hint)], steps=3, seed=5)
    *_, state = uncontrolled(base, tokenizer, prompts, steps=3, seed=5)
    assert_close(found, base.decode(state.x), atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_is_missing_is_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setattr("canon.images.latent_diffusion.weights.SHIPPED", tmp_path / "nothing")
    for base in ("", str(tmp_path / "elsewhere")):
        with pytest.raises(UserError, match="canon train latent_diffusion --preset shapes") as said:
            controlnet.build(dataclasses.replace(config, base=base))
        assert "\n" not in str(said.value)
    save_pretrained(controlnet.load_base(config.base)[0], TINY, tmp_path / "bare", system="latent_diffusion")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        controlnet.build(dataclasses.replace(config, base=str(tmp_path / "bare")))
    with pytest.raises(UserError, match="pairs must be"):
        dataclasses.replace(config, pairs=-1)
    with pytest.raises(UserError, match="'files' needs a folder"):
        controlnet.batches(dataclasses.replace(config, condition="files"))
    with torch.device("meta"), pytest.raises(UserError, match="inpainting"):
        controlnet.ControlledDiffusion(config, LatentDiffusion(dataclasses.replace(TINY, condition_channels=5)))
    run = Run(tmp_path / "run", config)
    with pytest.raises(UserError, match="count must be"):
        controlnet.sample(controlnet.build(config), run, count=0)
    with pytest.raises(UserError, match="strength must be a finite number"):
        controlnet.sample(controlnet.build(config), run, strength=math.nan)
    base, tokenizer = controlnet.load_base(config.base)
    for change, match in (
        ({"guidance": math.nan}, "guidance must be a finite number, not nan"),
        ({"guidance": math.inf}, "guidance must be a finite number, not inf"),
        ({"seed": 10**20}, "seed must be"),
        ({"steps": 0}, "steps must be"),
    ):
        with pytest.raises(UserError, match=match):
            controlnet.generate(base, tokenizer, ["a star"], [], **change)


def test_a_run_of_the_base_may_be_named_by_its_folder(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(config.base)
    model, _ = controlnet.load_base(str(tmp_path / "run"))
    assert model.config == TINY


def test_released_folders_and_files(config, tmp_path):
    net = awake(controlnet.build(config)).control
    save_file({name: tensor.contiguous() for name, tensor in authors(net).items()}, tmp_path / "control.safetensors")
    model, tokenizer = controlnet.from_pretrained(tmp_path / "control.safetensors", config.base)
    for name, tensor in net.state_dict().items():
        assert torch.equal(model.control.state_dict()[name], tensor), name
    assert tokenizer.encode("a red star")
    theirs = their_control((32, 64, 64), (True, True, False), 4, 24, (16, 32, 96, 256))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="the weights of the ControlNet do not fit"):
        controlnet.from_pretrained(tmp_path / "theirs", config.base)
    theirs.register_to_config(global_pool_conditions=True)
    theirs.save_config(tmp_path / "theirs")
    with pytest.raises(UserError, match="global_pool_conditions True"):
        controlnet.from_pretrained(tmp_path / "theirs", config.base)
