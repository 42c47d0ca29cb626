"""Our convolutions and linear maps give PyTorch's numbers, whichever way they are computed, and never stale ones."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from canon.core import native
from canon.core.nn import layers, winograd
from canon.core.nn.group_norm import channels_last
from canon.core.nn.layers import Conv2d, Linear


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
        with torch.no_grad():
            prepared = layer(x)
    found = torch.autograd.grad(y, [x, *parameters], g.to(dtype))
    wanted = torch.autograd.grad(expected, [high, *parameters], g.to(dtype).double())
    error = {torch.float32: 5e-6, torch.bfloat16: 2e-2}[dtype]  # of the largest
    for a, b in zip((y, prepared, *found), (expected, expected, *wanted)):
        assert_close(a.double(), b.double(), atol=error * float(b.detach().abs().max()), rtol=error)
    assert y.dtype == prepared.dtype == dtype


def test_which_way_a_convolution_goes(monkeypatch):
    calls = []
    convolve, packed = winograd.convolve, torch.ops.mkldnn._convolution_pointwise
    monkeypatch.setattr(winograd, "convolve", lambda *given: calls.append("winograd") or convolve(*given))
    monkeypatch.setattr(
        torch.ops.mkldnn, "_convolution_pointwise", lambda *given: calls.append("packed") or packed(*given)
    )
    layer, many, few = Conv2d(16, 16, 3, padding=1), torch.randn(8, 16, 8, 8), torch.randn(1, 16, 8, 8)
    layer(channels_last(many))
    layer(channels_last(few))  # learns, and is small: PyTorch's
    layer(many)  # another layout: PyTorch's
    with torch.no_grad():
        layer(channels_last(many))
        layer(channels_last(few))
    with torch.autocast("cpu", torch.bfloat16):
        layer(channels_last(many))  # learns in bfloat16: PyTorch's
        with torch.no_grad():
            layer(channels_last(many))
    strided = Conv2d(16, 16, 3, stride=2, padding=1)
    strided(channels_last(many))
    low = ["packed"] * layers._packs(torch.bfloat16)
    assert calls == ["winograd", "winograd", "packed", *low]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [lambda: Conv2d(16, 16, 3, padding=1), lambda: Linear(16, 16)])
def test_weights_that_change_are_prepared_anew(make, autocast):
    torch.manual_seed(0)
    layer = make()
    x = channels_last(torch.randn(4, 16, 16, 16)) if isinstance(layer, Conv2d) else torch.randn(64, 16)

    def now():
        exact = exactly(layer, x.double()) if isinstance(layer, Conv2d) else F.linear(x, layer.weight, layer.bias)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return float((layer(x).double() - exact.detach().double()).abs().max() / exact.detach().abs().max())

    limit = 2e-2 if autocast else 5e-6
    assert now() < limit
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x).square().mean().backward()
    optimizer.step()
    assert now() < limit  # learned
    layer.load_state_dict(make().state_dict())
    assert now() < limit  # loaded
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.add_(1)
    assert now() < limit  # of the bias alone
    for _ in range(20):  # new weights where old ones may have been
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        assert now() < limit
    assert layer.double().float() is layer
    assert now() < limit


def test_copies_and_files_have_nothing_prepared():
    layer, x = Conv2d(16, 16, 3, padding=1), channels_last(torch.randn(1, 16, 8, 8))
    with torch.no_grad():
        y = layer(x)
        other = copy.deepcopy(layer)
        nn.init.zeros_(other.weight)
        nn.init.zeros_(other.bias)
        assert not other(x).any()
        assert torch.equal(layer(x), y)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)


def test_a_large_map_is_done_in_parts(monkeypatch):
    layer, x = Conv2d(16, 32, 3, padding=1), channels_last(torch.randn(2, 16, 20, 24)).requires_grad_()
    whole = layer(x)
    expected = torch.autograd.grad(whole.square().sum(), (x, layer.weight))
    monkeypatch.setattr(winograd, "FLOATS", 36 * 32 * 7)  # seven of sixty tiles at a time
    parts = layer(x)
    found = torch.autograd.grad(parts.square().sum(), (x, layer.weight))
    assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    for a, b in zip(found, expected):
        assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-4)


def test_a_linear_map_under_autocast():
    layer, x = Linear(24, 40), torch.randn(2, 3, 24)
    with torch.autocast("cpu", torch.bfloat16):
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


def test_threads_do_not_change_the_transforms():
    _layer, x = Conv2d(32, 32, 3, padding=1), channels_last(torch.randn(3, 32, 16, 16))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            (v, shape), *_ = winograd._parts(x, 32)
            winograd._call("input", shape, x, v)
            found.append(v.clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert found[0].isfinite().all()


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
