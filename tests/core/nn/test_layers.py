"""Our convolutions and linear maps give PyTorch's numbers, whichever way they are computed, and never stale ones."""

import copy
import math
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from canon.core import native
from canon.core.nn import layers, winograd
from canon.core.nn.group_norm import GroupNorm, channels_last
from canon.core.nn.layers import Conv2d, Linear, Prepared, prepared_weights


def exactly(layer, x):
    """In double precision."""
    bias = None if layer.bias is None else layer.bias.double()
    return F.conv2d(x, layer.weight.double(), bias, layer.stride, layer.padding)


# sides: whole tiles, parts of them; channels: whole vectors, parts of one; tiles: enough for Winograd, and too few
@pytest.mark.parametrize(
    ("before", "after", "size"), [(16, 16, (8, 4, 16)), (40, 24, (2, 19, 16)), (32, 17, (1, 4, 4))]
)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_and_its_gradients(before, after, size, kernel, dtype, bias):
    torch.manual_seed(0)
    layer = Conv2d(before, after, kernel, padding=kernel // 2, bias=bias)
    x = channels_last(torch.randn(size[0], before, *size[1:])).requires_grad_()
    g = torch.randn(size[0], after, *size[1:])
    high = x.detach().double().requires_grad_()
    expected = exactly(layer, high)
    parameters = list(layer.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
        with torch.no_grad(), prepared_weights(Prepared()):
            prepared = layer(x)
    found = torch.autograd.grad(y, [x, *parameters], g.to(dtype))
    wanted = torch.autograd.grad(expected, [high, *parameters], g.to(dtype).double())
    error = {torch.float32: 5e-6, torch.bfloat16: 2e-2}[dtype]  # of the largest
    for a, b in zip((y, prepared, *found), (expected, expected, *wanted)):
        assert_close(a.double(), b.double(), atol=error * float(b.detach().abs().max()), rtol=error)
    assert y.dtype == prepared.dtype == dtype


@pytest.mark.parametrize(("before", "after", "stride"), [(4, 24, 1), (24, 4, 1), (16, 32, 2), (3, 16, 2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_other_convolutions_of_a_sampler(before, after, stride, autocast):
    torch.manual_seed(0)
    layer = Conv2d(before, after, 3, stride=stride, padding=1)
    with torch.no_grad(), prepared_weights(Prepared()):
        for size in ((2, 8, 8), (5, 7, 12)):  # the second finds the weights prepared
            x = channels_last(torch.randn(size[0], before, *size[1:]))
            expected = exactly(layer, x.double())
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x)
            error = (2e-2 if autocast else 5e-6) * float(expected.abs().max())
            assert_close(y.double(), expected, atol=error, rtol=0)


def test_which_way_a_convolution_goes(monkeypatch):
    calls = []
    convolve, packed = winograd.convolve, torch.ops.mkldnn._convolution_pointwise
    monkeypatch.setattr(winograd, "convolve", lambda *given: calls.append("winograd") or convolve(*given))
    monkeypatch.setattr(
        torch.ops.mkldnn, "_convolution_pointwise", lambda *given: calls.append("packed") or packed(*given)
    )
    layer, many, few = Conv2d(16, 16, 3, padding=1), torch.randn(8, 16, 8, 8), torch.randn(1, 16, 8, 8)
    wide = Conv2d(16, 2**13 + 1, 3, padding=1)
    layer(channels_last(many))
    wide(channels_last(many))  # many weights: PyTorch's
    layer(channels_last(few))  # too small: PyTorch's
    layer(many)  # another layout: PyTorch's
    Conv2d(16, 16, 3, stride=2, padding=1)(channels_last(many))
    Conv2d(16, 16, 3, padding=1, padding_mode="circular")(channels_last(many))
    with torch.autocast("cpu", torch.bfloat16):
        layer(channels_last(many))  # bfloat16: PyTorch's
    assert calls == ["winograd"]
    with prepared_weights(Prepared()):
        layer(channels_last(few))  # learns: PyTorch's
        with torch.no_grad():
            layer(channels_last(many))
            layer(channels_last(few))
            with torch.autocast("cpu", torch.bfloat16):
                layer(channels_last(many))
    low = ["packed"] * layers._packs(low=True)
    assert calls == ["winograd", "winograd", "packed", *low]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [lambda: Conv2d(16, 16, 3, padding=1), lambda: Linear(16, 16)])
@pytest.mark.parametrize("side", [4, 16])
def test_weights_are_prepared_for_a_while_only(make, autocast, side):
    """The fused optimizers of PyTorch leave no trace of a change: what was prepared must not outlive its context."""
    torch.manual_seed(0)
    layer = make()
    x = channels_last(torch.randn(4, 16, side, side)) if isinstance(layer, Conv2d) else torch.randn(64, 16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        wanted = exactly(layer, x.double()) if isinstance(layer, Conv2d) else F.linear(x, layer.weight, layer.bias)
        kept = Prepared()
        for _ in range(2):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                with prepared_weights(kept):
                    found = layer(x)
                assert torch.equal(layer(x).isfinite(), found.isfinite())
            error = (found.double() - wanted.detach().double()).abs().max() / wanted.detach().abs().max()
            assert error < (2e-2 if autocast else 5e-6)
        layer(x).square().mean().backward()
        optimizer.step()


def test_contexts_do_not_leak():
    layer, x, one, two = Conv2d(16, 16, 3, padding=1), channels_last(torch.randn(1, 16, 8, 8)), Prepared(), Prepared()
    with torch.no_grad():
        with prepared_weights(one):
            with prepared_weights(two):
                layer(x)
            assert not one
            assert len(two) == 1
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        assert not layer(x).any()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [lambda: Conv2d(16, 16, 3, padding=1), lambda: Linear(16, 16)])
@pytest.mark.parametrize("learns", ["input", "weight", "bias"])
def test_each_may_learn_alone(make, learns, autocast, prepared):
    layer = make().requires_grad_(False)
    x = channels_last(torch.randn(2, 16, 4, 4)) if isinstance(layer, Conv2d) else torch.randn(8, 16)
    {"input": x, "weight": layer.weight, "bias": layer.bias}[learns].requires_grad_()
    kept = Prepared() if prepared else None
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        nullcontext() if kept is None else prepared_weights(kept),
    ):
        y = layer(x)
    (found,) = torch.autograd.grad(y.float().square().sum(), {"input": x}.get(learns, getattr(layer, learns, None)))
    high = [value.detach().double() for value in (x, layer.weight, layer.bias)]
    place = ["input", "weight", "bias"].index(learns)
    high[place].requires_grad_()
    exact = F.conv2d(*high, padding=1) if isinstance(layer, Conv2d) else F.linear(*high)
    (wanted,) = torch.autograd.grad(exact.square().sum(), high[place])
    assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < (3e-2 if autocast else 5e-6)


def test_padding_may_be_circular():
    layer, x = Conv2d(16, 16, 3, padding=1, padding_mode="circular"), torch.randn(8, 16, 8, 8)
    with torch.no_grad(), prepared_weights(Prepared()):
        assert_close(layer(channels_last(x)), layer(x), atol=1e-5, rtol=1e-5)


def test_transforms_and_forward_derivatives_see_pytorch():
    block, x = (
        nn.Sequential(Conv2d(16, 16, 3, padding=1), GroupNorm(2, 16), Conv2d(16, 32, 1)),
        torch.randn(8, 16, 8, 8),
    )
    x, tangent = channels_last(x), torch.randn_like(x)
    found = block(x)
    mapped = torch.vmap(lambda row: block(row[None])[0])(x)
    assert_close(mapped, found, atol=1e-5, rtol=1e-5)
    double = nn.Sequential(block[0], block[2])  # PyTorch's GroupNorm has no such derivative in this layout
    with forward_ad.dual_level():
        _, derivative = forward_ad.unpack_dual(double(forward_ad.make_dual(x, tangent)))
    double = double.double()
    step = (double(x.double() + 1e-6 * tangent.double()) - double(x.double() - 1e-6 * tangent.double())) / 2e-6
    assert_close(derivative.double(), step, atol=1e-4, rtol=1e-3)


def test_a_compiler_finds_one_graph():
    """In a process of its own: here, types are checked at every call, of which no compiler makes sense."""
    source = """
import torch
from canon.core.nn.group_norm import channels_last
from canon.core.nn.unet import ResBlock, SpatialTransformer
block, transformer = ResBlock(16, 32, groups=2), SpatialTransformer(32, 2, 24, groups=2)
x, text = torch.randn(8, 16, 8, 8), torch.randn(8, 5, 24)
compiled = torch.compile(lambda x: transformer(block(channels_last(x)), text), fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(x), transformer(block(channels_last(x)), text), atol=1e-4, rtol=1e-4)
"""
    subprocess.run([sys.executable, "-c", source], check=True)


def test_copies_and_files_have_nothing_prepared():
    layer, x = Conv2d(16, 16, 3, padding=1), channels_last(torch.randn(1, 16, 8, 8))
    with torch.no_grad(), prepared_weights(Prepared()):
        y = layer(x)
        other = copy.deepcopy(layer)
        nn.init.zeros_(other.weight)
        nn.init.zeros_(other.bias)
        assert not other(x).any()
        assert torch.equal(layer(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)


def test_a_linear_map_under_autocast():
    layer, x = Linear(24, 40), torch.randn(2, 3, 24)
    with torch.autocast("cpu", torch.bfloat16), prepared_weights(Prepared()):
        learned = layer(x)
        with torch.no_grad():
            found = layer(x)
            assert layer(x[:, :0]).shape == (2, 0, 40)
    assert found.dtype == learned.dtype == torch.bfloat16
    assert_close(found.float(), learned.detach().float(), atol=2e-2, rtol=2e-2)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_operations_are_counted():
    layer, x = Conv2d(16, 16, 3, padding=1), channels_last(torch.randn(8, 16, 8, 8))
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 8 * 64 * 9 * 16 * 16


@pytest.mark.parametrize(("before", "after", "side"), [(40, 24, 16), (16, 90, 9), (33, 64, 4)])
def test_neither_threads_nor_the_cache_change_a_bit(monkeypatch, before, after, side):
    """Sums are taken in the same order, however many threads share the tiles and however many tiles fit in a cache."""
    x, g = (channels_last(torch.randn(12, channels, side, side)).requires_grad_() for channels in (before, after))
    weight, threads, found = torch.randn(after, before, 3, 3, requires_grad=True), torch.get_num_threads(), []
    try:
        for count, floats in ((1, 2**30), (2, 2**18), (3, 1), (5, 2**16)):
            monkeypatch.setattr(winograd, "FLOATS", floats)
            torch.set_num_threads(count)
            y = winograd.convolve(x, weight)
            found.append((y, *torch.autograd.grad(y, (x, weight), g)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("kernels", ["x86-64", "haswell"], indirect=True)
@pytest.mark.parametrize(("before", "after", "side"), [(40, 24, 16), (17, 90, 9)])
def test_processors_with_other_registers(kernels, before, after, side):
    layer, x = Conv2d(before, after, 3, padding=1), channels_last(torch.randn(4, before, side, side)).requires_grad_()
    norm = GroupNorm(1, before)
    y = layer(norm(x, silu=True))
    high = x.detach().double().requires_grad_()
    expected = exactly(layer, F.silu(F.group_norm(high, 1, norm.weight.double(), norm.bias.double())))
    g, learned = torch.randn_like(y), (layer.weight, layer.bias, norm.weight, norm.bias)
    found, wanted = (
        torch.autograd.grad(y, (x, *learned), g),
        torch.autograd.grad(expected, (high, *learned), g.double()),
    )
    for a, b in zip((y, *found), (expected, *wanted)):
        assert_close(a.double(), b.double(), atol=5e-6 * float(b.detach().abs().max()), rtol=5e-6)


def test_a_default_type_changes_nothing():
    layer, x = Conv2d(16, 16, 3, padding=1), channels_last(torch.randn(8, 16, 8, 8))
    norm, expected = GroupNorm(4, 16), None
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            y = norm(layer(x))
            (gradient,) = torch.autograd.grad(y.sum(), layer.weight)
            expected = (y, gradient) if expected is None else expected
            assert torch.equal(y, expected[0])
            assert torch.equal(gradient, expected[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_tracer_sees_pytorch():
    layer, x = Conv2d(16, 16, 3, padding=1), channels_last(torch.randn(8, 16, 8, 8))
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        assert_close(traced(2 * x), layer(2 * x), atol=1e-5, rtol=1e-4)


def test_a_kernel_is_transformed_as_in_the_paper():
    """U = G g G^T, G from the Lagrange polynomials at 0, +-3/4, +-3/2 and infinity (section 5.2)."""
    points = (0.0, 0.75, -0.75, 1.5, -1.5)
    rows = [[x**k / math.prod(x - y for y in points if y != x) for k in range(3)] for x in points]
    g = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    weight = torch.randn(20, 17, 3, 3)
    expected = torch.einsum("ya,xb,oiab->yxio", g, g, weight.double()).flatten(0, 1)
    turned = torch.einsum("ya,xb,oiab->yxoi", g, g, weight.double().flip(2, 3)).flatten(0, 1)
    for found, wanted in (
        (winograd.transform_kernel(weight), expected),
        (winograd.transform_kernel(weight, True), turned),
    ):
        assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_without_a_compiler_pytorch_takes_its_place(monkeypatch):
    layer, x = Conv2d(16, 16, 3, padding=1), channels_last(torch.randn(8, 16, 8, 8))
    found = layer(x)
    winograd.kernel.cache_clear()
    monkeypatch.setattr(native, "load_c", lambda source: None)
    try:
        assert_close(layer(x), found, atol=1e-5, rtol=1e-4)
        assert winograd.tiles(x) >= layers.FEWEST_TILES
    finally:
        winograd.kernel.cache_clear()
