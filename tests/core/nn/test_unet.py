"""Blocks of U-Nets: outputs and gradients of diffusers' layers, and what attention must be."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as TheirAttention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.testing import assert_close

from canon.core.nn import unet
from canon.core.nn.layers import Prepared, prepared_weights
from canon.core.nn.unet import (
    GEGLU,
    CrossAttention,
    Downsample,
    PixelAttention,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    Upsample,
    attend,
    capture_attention,
    timestep_embedding,
)


def randomise(module):
    """Weights of which none is zero or one, in float64."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return module


def same(mine, theirs, pairs, inputs, theirs_of=lambda y: y):
    """Equal outputs, and equal gradients of the inputs and of every parameter.

    ``pairs``: our parameter -> theirs; every one of ours must be there.
    """
    mine, theirs = randomise(mine), theirs.double()
    own, other = dict(mine.named_parameters()), dict(theirs.named_parameters())
    assert own.keys() == pairs.keys()
    assert set(pairs.values()) == other.keys()
    with torch.no_grad():
        for a, b in pairs.items():
            other[b].copy_(own[a].view_as(other[b]))
    y, z = mine(*inputs), theirs_of(theirs(*inputs))
    assert_close(y, z)
    g = torch.randn_like(y)
    wanted = [x for x in inputs if x is not None]
    ours = torch.autograd.grad(y, [*wanted, *own.values()], g)
    expected = torch.autograd.grad(z, [*wanted, *(other[pairs[name]] for name in own)], g)
    for name, a, b in zip([*(f"input {i}" for i in range(len(wanted))), *own], ours, expected):
        assert_close(a, b.view_as(a), msg=name)


def both(names):
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")}


def map_of(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("dim", "period"), [(32, 10_000.0), (6, 100.0)])
def test_timestep_embedding(dim, period):
    t = torch.tensor([0, 1, 17, 999])
    theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=period)
    assert_close(timestep_embedding(t, dim, period), theirs)
    row = timestep_embedding(torch.tensor([0.25]), 4, 100.0)[0]
    assert_close(row, torch.tensor([math.cos(0.25), math.cos(0.025), math.sin(0.25), math.sin(0.025)]))


@pytest.mark.parametrize(("ins", "outs", "d_emb"), [(32, 64, 12), (64, 64, 12), (64, 32, None)])
def test_res_block(ins, outs, d_emb):
    theirs = ResnetBlock2D(in_channels=ins, out_channels=outs, temb_channels=d_emb, eps=1e-5)
    pairs = both({name: name for name in ("norm1", "conv1", "norm2", "conv2")})
    if d_emb:
        pairs |= both({"time": "time_emb_proj"})
    if ins != outs:
        pairs |= both({"shortcut": "conv_shortcut"})
    theirs.nonlinearity = nn.SiLU()
    emb = map_of(2, 12) if d_emb else None
    mine = ResBlock(ins, outs, d_emb)
    # Ours takes the embedding after its SiLU, once for all blocks.
    before = None if emb is None else lambda x, e: ResBlock.forward(mine, x, F.silu(e))
    mine.forward = before or mine.forward
    same(mine, theirs, pairs, (map_of(2, ins, 6, 5), emb))


TRANSFORMER = {
    "norm": "norm",
    "proj_in": "proj_in",
    "proj_out": "proj_out",
    **{f"blocks.{k}.{a}": f"transformer_blocks.{k}.{b}" for k in range(2) for a, b in {
        "self_attention_norm": "norm1",
        "self_attention.out": "attn1.to_out.0",
        "cross_attention_norm": "norm2",
        "cross_attention.out": "attn2.to_out.0",
        "feed_forward_norm": "norm3",
        "feed_forward.up": "ff.net.0.proj",
        "feed_forward.out": "ff.net.2",
    }.items()},
}  # fmt: skip


@pytest.mark.parametrize("linear", [False, True])
def test_spatial_transformer(linear):
    theirs = Transformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=64,
        num_layers=2,
        cross_attention_dim=24,
        use_linear_projection=linear,
    )
    pairs = both(TRANSFORMER)
    for k in range(2):
        for n, kind in ((1, "self"), (2, "cross")):
            for p in "qkv":
                pairs[f"blocks.{k}.{kind}_attention.{p}.weight"] = f"transformer_blocks.{k}.attn{n}.to_{p}.weight"
    inputs = map_of(2, 64, 4, 6), map_of(2, 5, 24)
    same(SpatialTransformer(64, 4, 24, depth=2), theirs, pairs, inputs, lambda y: y.sample)


def test_spatial_transformer_starts_as_the_identity():
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(SpatialTransformer(32, 4, 8)(x, torch.randn(2, 3, 8)), x)


def test_pixel_attention():
    theirs = TheirAttention(
        64, heads=1, dim_head=64, norm_num_groups=32, eps=1e-6, residual_connection=True, bias=True,
        _from_deprecated_attn_block=True,
    )  # fmt: skip
    pairs = both({"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"})
    same(PixelAttention(64), theirs, pairs, (map_of(2, 64, 3, 5),))


def test_resolutions():
    x = torch.randn(2, 8, 6, 10)
    down, up = Downsample(8), Upsample(8)
    assert_close(down(x), F.conv2d(x, down.conv.weight, down.conv.bias, stride=2, padding=1))
    assert down(x).shape == (2, 8, 3, 5)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(up(x), F.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1))


def test_geglu_gates_the_first_half_with_the_second():
    layer, x = GEGLU(6, 10), torch.randn(2, 3, 6)
    value, gate = layer.up(x).chunk(2, dim=-1)
    assert_close(layer(x), layer.out(value * 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))))


# Every way through the blocks: all rows at once, some rows, one row at a time, some queries of one row.
@pytest.mark.parametrize("block", [2**19, 3 * 7 * 5, 7 * 5, 3 * 5, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_in_blocks(monkeypatch, block, dtype):
    monkeypatch.setattr(unet._WrittenOut, "BLOCK", block)
    q, k, v = (torch.randn(2, 2, n, 6, dtype=torch.float64, requires_grad=True) for n in (7, 5, 5))
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    y = unet._WrittenOut.apply(*(x.flatten(0, 1) for x in low)).view_as(q)
    exact = (q @ k.mT / math.sqrt(6)).softmax(-1) @ v
    g = torch.randn_like(exact)
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert y.dtype == dtype
    assert_close(y.double(), exact, atol=error, rtol=error)
    for a, b in zip(torch.autograd.grad(y, low, g.to(dtype)), torch.autograd.grad(exact, (q, k, v), g)):
        assert_close(a.double(), b, atol=error, rtol=error)


def test_which_attention_is_written_out(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: calls.append(q.shape[3]) or q)
    for width, dtype in ((8, torch.float32), (18, torch.float32), (18, torch.bfloat16)):
        attend(*(torch.randn(1, 1, 96, width, dtype=dtype, requires_grad=True) for _ in range(3)))
    assert calls == [18]
    attend(*(torch.randn(1, 1, 96, 17, dtype=torch.bfloat16) for _ in range(3)))  # few, and no gradients
    attend(*(torch.randn(32, 1, 64, 18, dtype=torch.bfloat16) for _ in range(3)))
    assert calls == [18, 17]


@pytest.mark.parametrize("autocast", [False, True])
def test_backward_under_autocast(autocast):
    """A second network's loss may be differentiated inside the context: the written-out attention must not mind."""
    torch.manual_seed(1)
    layer, x = CrossAttention(32, 2, 32), torch.randn(2, 9, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, x)
        assert y.dtype == torch.bfloat16
        if autocast:
            y.float().square().sum().backward()
    if not autocast:
        y.float().square().sum().backward()
    low = x.grad.clone()
    (exact,) = torch.autograd.grad(layer(x, x).square().sum(), x)
    assert float((low - exact).norm() / exact.norm()) < 0.03


def test_captured_attention():
    torch.manual_seed(0)
    model = nn.Sequential(SpatialTransformer(32, 4, 8), nn.Identity())[0]
    nn.init.normal_(model.proj_out.weight)
    x, context = torch.randn(2, 32, 3, 5), torch.randn(2, 7, 8)
    seen = []
    handle = model.blocks[0].cross_attention.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs))
    plain = model(x, context)
    with capture_attention(model) as maps:
        assert torch.equal(model(x, context), plain)
        model(x, 2 * context)
    handle.remove()
    assert list(maps) == ["blocks.0.cross_attention"]
    first, second = maps["blocks.0.cross_attention"]
    assert first.shape == (2, 4, 15, 7)
    assert not first.requires_grad
    assert_close(first.sum(-1), torch.ones(2, 4, 15))
    assert not torch.allclose(first, second)
    # the weights are those that made the output
    layer, (h, text) = model.blocks[0].cross_attention, seen[0]
    v = layer.v(text).view(2, 7, 4, 8).transpose(1, 2)
    assert_close(layer.out((first @ v).transpose(1, 2).flatten(2)), layer(h, text))
    model(x, context)
    assert len(maps["blocks.0.cross_attention"]) == 2
    block = TransformerBlock(8, 2, 8)
    with capture_attention(block) as maps:
        block(torch.randn(1, 4, 8), torch.randn(1, 3, 8))
    assert list(maps) == ["cross_attention"]


def test_a_text_is_read_once_by_a_sampler():
    torch.manual_seed(0)
    layer, reads = CrossAttention(32, 2, 24), []
    layer.k.register_forward_hook(lambda *_: reads.append(1))
    pixels, texts = [torch.randn(2, 9, 32) for _ in range(3)], [torch.randn(2, 5, 24) for _ in range(2)]
    expected = [[layer(x, text).detach() for text in texts] for x in pixels]
    reads.clear()
    with prepared_weights(Prepared()):
        with torch.no_grad():
            for text, column in zip(texts, zip(*expected)):
                for x, wanted in zip(pixels, column):
                    assert_close(layer(x, text), wanted)
            assert len(reads) == 2
            assert_close(layer(pixels[0], texts[0]), expected[0][0])  # another text was read in between
        texts[0].requires_grad_()
        layer(pixels[0], texts[0]).sum().backward()
    assert len(reads) == 4
    assert texts[0].grad is not None
    itself = CrossAttention(32, 2, 32)
    kept = Prepared()
    with torch.no_grad(), prepared_weights(kept):
        itself(pixels[0], pixels[0])
    assert not kept  # pixels are others at every call
