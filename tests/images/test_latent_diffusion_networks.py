"""The networks of latent diffusion against diffusers: outputs, gradients, and the names of released weights."""

import re

import pytest
import torch
from diffusers import AutoencoderKL as TheirKL
from diffusers import UNet2DConditionModel, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch.testing import assert_close

from canon.core.errors import UserError
from canon.core.nn.unet import capture_attention
from canon.images.latent_diffusion import weights
from canon.images.latent_diffusion.autoencoder import AutoencoderKL, AutoencoderVQ, DiagonalGaussian
from canon.images.latent_diffusion.unet import UNet
from canon.images.latent_diffusion.weights import load_autoencoder, load_unet, names_of, read_parts, split

SMALL = (4, 4, 32, (1, 2, 2), (True, True, False), 2, 4, 24)
"""A U-Net with every kind of stage of Stable Diffusion's."""


def their_unet(channels, attention, heads, d_context, **options):
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        down_block_types=[("CrossAttn" if a else "") + "DownBlock2D" for a in attention],
        up_block_types=[("CrossAttn" if a else "") + "UpBlock2D" for a in reversed(attention)],
        attention_head_dim=heads,  # the number of heads, by an old mistake of theirs
        cross_attention_dim=d_context,
        **options,
    )


def their_kl(channels=(32, 64, 64), res_blocks=1):
    return TheirKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=res_blocks,
        latent_channels=4,
    )


def their_vq():
    return VQModel(
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        block_out_channels=[32, 64],
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=50,
    )


def randomise(model):
    """Weights of which none is zero or one, in float64."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    return model


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same_gradients(load, fresh, mine, theirs, ours, expected, inputs):
    """Gradients of the inputs, and of all parameters: theirs are renamed as if they were weights."""
    g = torch.randn_like(ours)
    of_mine = dict(mine.named_parameters())
    of_theirs = {name: p for name, p in theirs.named_parameters() if not name.startswith("quantize.")}
    a = torch.autograd.grad(ours, [*inputs, *of_mine.values()], g, allow_unused=True)
    b = torch.autograd.grad(expected, [*inputs, *of_theirs.values()], g)
    for x, y in zip(a[: len(inputs)], b):
        assert_close(x, y, atol=1e-6, rtol=1e-6)
    renamed = dict(zip(of_theirs, b[len(inputs) :]))
    if hasattr(mine, "quantizer"):
        renamed["quantize.embedding.weight"] = torch.zeros_like(mine.quantizer.codes)
    load(fresh, renamed)
    for (name, x), y in zip(fresh.named_parameters(), a[len(inputs) :]):
        assert_close(torch.zeros_like(x) if y is None else y, x.detach(), atol=1e-6, rtol=1e-6, msg=name)


# ----------------------------------------------------------------------------------------------------------- U-Net


@pytest.mark.parametrize("heads", [4, (2, 4, 8)])
def test_unet(heads):
    """One number of heads, as Stable Diffusion v1; or one for each level and linear projections, as v2."""
    options = {} if heads == 4 else {"use_linear_projection": True}
    theirs = randomise(their_unet((32, 64, 64), (True, True, False), heads, 24, **options))
    mine, fresh = (UNet(*SMALL[:6], heads, 24).double() for _ in range(2))
    load_unet(mine, theirs.state_dict())
    x, context, t = double(2, 4, 8, 12), double(2, 5, 24), torch.tensor([3, 777])
    ours, expected = mine(x, t, context), theirs(x, t, context).sample
    assert float(expected.detach().std()) > 0.1
    assert_close(ours, expected)
    same_gradients(load_unet, fresh, mine, theirs, ours, expected, (x, context))


def test_control_is_added_to_the_skips_and_the_middle():
    theirs = randomise(their_unet((32, 64, 64), (True, True, False), 4, 24))
    mine = UNet(*SMALL).double()
    load_unet(mine, theirs.state_dict())
    x, context, t = double(1, 4, 8, 8), double(1, 5, 24), torch.tensor([500])
    skips, h = mine.encode(x, mine.embed(t), context)
    assert len(skips) == len(mine.down) == len(mine.up) == 9
    control = [torch.randn_like(y) for y in [*skips, h]]
    expected = theirs(
        x, t, context, down_block_additional_residuals=control[:-1], mid_block_additional_residual=control[-1]
    )
    ours = mine(x, t, context, control)
    assert_close(ours, expected.sample)
    assert_close(mine.decode(h, skips, mine.embed(t), context), mine(x, t, context))
    assert_close(mine(x, t, context, [0 * y for y in control]), mine(x, t, context))
    with pytest.raises(ValueError, match="zip"):
        mine(x, t, context, control[:-1])


def test_unet_under_autocast_and_in_bfloat16():
    theirs = their_unet((32, 64, 64), (True, True, False), 4, 24)
    mine = UNet(*SMALL)
    load_unet(mine, theirs.state_dict())
    x, context, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.tensor([3, 777])
    exact = mine(x, t, context)
    with torch.autocast("cpu", torch.bfloat16):
        low = mine(x, t, context)
    low.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mine.parameters())
    assert float((low.float() - exact).norm() / exact.norm()) < 0.03
    low = mine.bfloat16()(x.bfloat16(), t, context.bfloat16())
    assert low.dtype == torch.bfloat16
    assert float((low.float() - exact).norm() / exact.norm()) < 0.05


def test_unet_starts_at_zero():
    mine = UNet(*SMALL)
    y = mine(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 24))
    assert torch.equal(y, torch.zeros_like(y))
    ends = [p for name, p in mine.named_parameters() if re.search(r"conv2\.|proj_out\.|conv_out\.", name)]
    assert len(ends) == 2 * (17 + 11 + 1)  # residual blocks, Transformers, the last layer
    assert not any(p.any() for p in ends)


def test_every_word_is_looked_at_from_every_transformer():
    mine = UNet(*SMALL)
    with capture_attention(mine) as maps:
        mine(torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), torch.randn(2, 3, 24))
    assert len(maps) == 2 * 2 + 1 + 2 * 3
    assert maps["down.1.attention.blocks.0.cross_attention"][0].shape == (2, 4, 64, 3)
    assert maps["middle.attention.blocks.0.cross_attention"][0].shape == (2, 4, 4, 3)


# ----------------------------------------------------------------------------------------------------- autoencoders


def test_autoencoder_kl():
    theirs = randomise(their_kl())
    mine, fresh = (AutoencoderKL(32, (1, 2, 2), 1).double() for _ in range(2))
    load_autoencoder(mine, theirs.state_dict())
    x, noise = double(2, 3, 16, 24), double(2, 4, 4, 6)
    q, p = mine.posterior(x), theirs.encode(x).latent_dist
    # the distribution is in float32
    assert_close(q.mean.double(), p.mode(), atol=1e-5, rtol=1e-5)
    assert_close(q.kl().double(), p.kl(), atol=1e-5, rtol=1e-5)
    assert_close(mine.encode(x), q.mean)
    assert_close(mine.encode(x, noise), p.mean + p.std * noise, atol=1e-5, rtol=1e-5)
    z = p.mode() + noise
    assert_close(mine.decode(z), theirs.decode(z).sample)
    # one path through everything, of which only the posterior is in float32
    ours = mine.decode(mine.quant_conv(mine.encoder(x)).chunk(2, 1)[0] + noise)
    same_gradients(load_autoencoder, fresh, mine, theirs, ours, theirs.decode(z).sample, (x, noise))


def test_reconstruction_and_its_penalty():
    mine = AutoencoderKL(32, (1, 2), 1)
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    torch.manual_seed(5)
    y, penalty, last = mine.reconstruct(x)
    torch.manual_seed(5)
    z = mine.posterior(x).sample()
    assert_close(y, mine.decode(z))
    assert_close(y, mine.decoder.conv_out(last))
    assert_close(penalty, 1e-6 * mine.posterior(x).kl().mean())
    vq = AutoencoderVQ(32, (1, 2), 1, codebook=20)
    y, penalty, last = vq.reconstruct(x)
    assert_close(y, vq.decode(vq.encode(x)))
    assert_close(y, vq.decoder.conv_out(last))
    assert_close(penalty, vq.quantizer(vq.encode(x)).loss * 3 * 8 * 8)


def test_diagonal_gaussian():
    q = DiagonalGaussian(torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4))
    normal = torch.distributions.Normal(q.mean, (0.5 * q.log_var).exp())
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert_close(q.kl(), exact.sum((1, 2, 3)))
    samples = torch.stack([q.sample() for _ in range(4000)])
    assert_close(samples.mean(0), q.mean, atol=0.3, rtol=0)
    assert_close(samples.std(0), normal.scale, atol=0.0, rtol=0.1)


def test_autoencoder_vq():
    theirs = randomise(their_vq())
    mine, fresh = (AutoencoderVQ(32, (1, 2), 2, attention=(1,), codebook=50).double() for _ in range(2))
    load_autoencoder(mine, theirs.state_dict())
    x = double(2, 3, 8, 12)
    z = theirs.encode(x).latents
    assert_close(mine.encode(x), z)
    assert_close(mine.decode(mine.encode(x)), theirs.decode(z).sample)
    assert_close(mine.quantizer(z).loss, theirs.quantize(z)[1])
    ours = mine.decode(mine.encode(x))
    same_gradients(load_autoencoder, fresh, mine, theirs, ours, theirs.decode(z).sample, (x,))


# ---------------------------------------------------------------------------------------------- the published names


def compvis(model):
    """The model's weights under the names of the CompVis layout, with its 1x1 convolutions."""
    if isinstance(model, UNet):
        modules = weights.UNET_COMPVIS
    else:
        modules = weights.autoencoder_compvis(len(model.decoder.up))
    published = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        for theirs, ours in modules.items():
            pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(ours))
            if not (hit := re.fullmatch(pattern, module)):
                continue
            # an up-sampling is the third module of a stage with a Transformer, else the second
            if re.fullmatch(r"up\.\d+\.resample\.conv", module):
                has_transformer = model.up[int(hit["i"])].attention is not None
                if theirs.endswith("2.conv") != has_transformer:
                    continue
            if re.search("(up|down)sample", theirs) and ("upsample" in theirs) != module.startswith("decoder"):
                continue
            convolution = re.search(r"attn_1\.|\.proj_(in|out)$|attn\.\d+\.(q|k|v|proj_out)$", theirs)
            if convolution and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            assert theirs.format(**hit.groupdict()) + f".{kind}" not in published
            published[theirs.format(**hit.groupdict()) + f".{kind}"] = tensor
    assert len(published) == len([name for name in model.state_dict() if name != "quantizer.codes"])
    return published


def equal(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("kind", ["unet", "kl", "vq"])
def test_both_layouts_carry_every_weight_to_its_place(kind):
    """Their converter must make their own model of our CompVis names."""
    if kind == "unet":
        theirs, mine, fresh = randomise(their_unet((32, 64, 64), SMALL[4], 4, 24)), UNet(*SMALL), UNet(*SMALL)
        load, convert, prefix = load_unet, convert_ldm_unet_checkpoint, "model.diffusion_model."
    else:
        theirs = randomise(their_kl() if kind == "kl" else their_vq())
        mine, fresh = (
            AutoencoderKL(32, (1, 2, 2), 1) if kind == "kl" else AutoencoderVQ(32, (1, 2), 2, 3, (1,), codebook=50)
            for _ in range(2)
        )
        load, convert, prefix = load_autoencoder, convert_ldm_vae_checkpoint, "first_stage_model."
    theirs.float()
    state = theirs.state_dict()
    load(mine, state)
    published = compvis(mine)
    if kind == "vq":
        assert torch.equal(state.pop("quantize.embedding.weight"), mine.quantizer.codes)
    if kind != "vq":  # theirs knows no attention but the middle's
        equal(convert({prefix + name: tensor for name, tensor in published.items()}, theirs.config), state)
    else:
        published["quantize.embedding.weight"] = mine.quantizer.codes.detach()
    load(fresh, {**published, **({} if kind == "unet" else {"loss.logvar": torch.zeros(())})})
    equal(fresh.state_dict(), mine.state_dict())


def test_old_names_of_the_autoencoder_s_attention():
    """As the folder of Stable Diffusion v1 has them."""
    theirs = randomise(their_kl()).float()
    new, old = AutoencoderKL(32, (1, 2, 2), 1), AutoencoderKL(32, (1, 2, 2), 1)
    load_autoencoder(new, theirs.state_dict())
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = theirs.state_dict()
    for a, b in renames.items():
        state = {name.replace(f"attentions.0.{a}.", f"attentions.0.{b}."): tensor for name, tensor in state.items()}
    assert state.keys() != theirs.state_dict().keys()
    load_autoencoder(old, state)
    equal(old.state_dict(), new.state_dict())


def test_stable_diffusion_v1_at_full_size():
    with torch.device("meta"):
        unet, autoencoder = UNet(), AutoencoderKL()
        theirs = their_unet((320, 640, 1280, 1280), (True, True, True, False), 8, 768)
        their_autoencoder = their_kl((128, 256, 512, 512), 2)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863
    for mine, other, load, convert, prefix, count in (
        (unet, theirs, load_unet, convert_ldm_unet_checkpoint, "model.diffusion_model.", 686),
        (autoencoder, their_autoencoder, load_autoencoder, convert_ldm_vae_checkpoint, "first_stage_model.", 248),
    ):
        state = other.state_dict()
        assert len(state) == len(mine.state_dict()) == count
        load(mine, state)
        published = compvis(mine)
        assert len(published) == count
        load(mine, published)
        converted = convert({prefix + name: tensor for name, tensor in published.items()}, other.config)
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in state.items()}
        missing = dict(state)
        name = next(reversed(missing))
        del missing[name]
        with pytest.raises(UserError, match="1 missing"):
            load(mine, missing)
        with pytest.raises(UserError, match=r"1 unexpected \(strange"):
            load(mine, {**state, "strange.weight": state[name]})


def test_known_names():
    """A few names from memory of the files, so that no two mistakes can agree."""
    unet = names_of(weights.UNET_COMPVIS)
    assert unet["input_blocks.{i}.1.transformer_blocks.{k}.attn2.to_k.weight"]
    published = compvis(UNet(*SMALL[:3], (1, 2, 2, 2), (True, True, True, False), 2, 4, 24))
    for name in (
        "time_embed.2.bias",
        "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight",
        "input_blocks.8.1.proj_in.weight",
        "input_blocks.11.0.emb_layers.1.weight",
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias",
        "out.2.bias",
    ):
        assert name in published
    assert published["input_blocks.8.1.proj_in.weight"].ndim == 4
    autoencoder = compvis(AutoencoderKL(32, (1, 2, 2, 2), 2))
    for name in (
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.proj_out.bias",
        "decoder.up.0.block.2.conv2.weight",
        "decoder.up.3.upsample.conv.weight",
        "post_quant_conv.weight",
    ):
        assert name in autoencoder
    assert "decoder.up.0.upsample.conv.weight" not in autoencoder


def test_files_and_folders(tmp_path):
    unet, autoencoder = UNet(*SMALL), AutoencoderKL(32, (1, 2), 1)
    text = {"text_model.final_layer_norm.weight": torch.randn(3)}
    whole = {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in compvis(unet).items()}
    whole |= {f"first_stage_model.{name}": tensor.contiguous() for name, tensor in compvis(autoencoder).items()}
    whole |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text.items()}
    extra = {
        "betas": torch.zeros(3),
        "model_ema.decay": torch.zeros(()),
        "model_ema.diffusion_modelout2bias": torch.zeros(4),
    }
    save_file({**whole, **extra}, tmp_path / "sd.safetensors")
    parts = read_parts(tmp_path / "sd.safetensors")
    equal(parts["text"], text)
    other = UNet(*SMALL), AutoencoderKL(32, (1, 2), 1)
    load_unet(other[0], parts["unet"])
    load_autoencoder(other[1], parts["autoencoder"])
    equal(other[0].state_dict(), unet.state_dict())
    equal(other[1].state_dict(), autoencoder.state_dict())
    assert set(split(extra)["unet"]) == set()

    for part, file in weights.FILES.items():
        path = (tmp_path / "folder" / file).with_suffix(".safetensors")
        path.parent.mkdir(parents=True)
        save_file(parts[part], path)
    again = read_parts(tmp_path / "folder")
    for part in parts:
        equal(again[part], parts[part])
    path.unlink()
    with pytest.raises(UserError, match="has no text_encoder/model"):
        read_parts(tmp_path / "folder")
    save_file({name: tensor for name, tensor in whole.items() if "first" not in name}, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match="has no first_stage_model"):
        read_parts(tmp_path / "sd.safetensors")
