"""GroupNorm with SiLU equals PyTorch's and its gradients, whatever the layout."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from canon.core import native
from canon.core.nn import group_norm
from canon.core.nn.group_norm import GroupNorm, channels_last


def exactly(norm, x, scale, shift, silu):
    h = F.group_norm(x, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    if scale is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(h) if silu else h


# channels: whole vectors, a part of one, one group, a group of every channel; pixels: not all fours
@pytest.mark.parametrize(("channels", "groups", "side"), [(32, 8, 4), (40, 8, 3), (17, 1, 5), (48, 48, 2), (64, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_outputs_and_gradients(channels, groups, side, dtype, silu, each):
    torch.manual_seed(0)
    norm = GroupNorm(groups, channels, eps=1e-4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = channels_last((3 + 2 * torch.randn(3, channels, side, side + 1)).to(dtype)).requires_grad_()
    given = [x, *(torch.randn(3, channels, requires_grad=True) for _ in range(2 * each))]
    assert norm._applies(x)
    y = norm(x, tuple(given[1:]) or None, silu=silu)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    high = [value.detach().double().requires_grad_() for value in given]
    expected = exactly(norm, *(high if each else [*high, None, None]), silu)
    error = {torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]  # of the largest
    assert_close(y.double(), expected, atol=error * float(expected.detach().abs().max()), rtol=error)
    g = torch.randn_like(expected).to(dtype)
    parameters = [norm.weight, norm.bias]
    found = torch.autograd.grad(y, [*given, *parameters], g)
    wanted = torch.autograd.grad(expected, [*high, *parameters], g.double())
    for a, b in zip(found, wanted):
        assert_close(a.double(), b.double(), atol=3 * error * float(b.abs().max()), rtol=error)


def test_a_large_mean_costs_no_precision():
    norm = GroupNorm(4, 32)
    x = channels_last(1000 + torch.randn(2, 32, 8, 8))
    expected = exactly(norm, x.double(), None, None, False)
    assert_close(norm(x).double(), expected, atol=2e-3, rtol=0)  # 1000 in float32 is known to 6e-5


@pytest.mark.parametrize("outlier", [300.0, -1e4])
def test_an_outlier_costs_no_precision(outlier):
    norm = GroupNorm(1, 16)
    x = torch.randn(1, 16, 128, 128)
    x[:, :, 0, 0] = outlier
    expected = exactly(norm, x.double(), None, None, False)
    assert_close(norm(channels_last(x)).double(), expected, atol=2e-6 * float(expected.abs().max()), rtol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(64, 4), (80, 10), (96, 32), (40, 5)])
def test_one_map_on_several_threads(channels, groups):
    norm, x = GroupNorm(groups, channels), channels_last(torch.randn(1, channels, 9, 9)).requires_grad_()
    nn.init.normal_(norm.weight)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        y = norm(x, silu=True)
        found = torch.autograd.grad(y.square().sum(), (x, norm.weight, norm.bias))
    finally:
        torch.set_num_threads(threads)
    high = x.detach().double().requires_grad_()
    expected = exactly(norm, high, None, None, True)
    wanted = torch.autograd.grad(expected.square().sum(), (high, norm.weight, norm.bias))
    assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(found, wanted):
        assert_close(a.double(), b.double(), atol=1e-5 * float(b.abs().max()), rtol=1e-4)


def test_odd_parameters():
    x = channels_last(torch.randn(4, 32, 3, 3))
    norm = GroupNorm(4, 32)
    scale, shift = torch.randn(32, 1).T, torch.randn(32, 4).T  # one for all maps; another order in memory
    found = norm(x, (scale.expand(4, 32), shift), silu=True)
    assert_close(found, exactly(norm, x.double(), scale, shift, True).float(), atol=1e-5, rtol=1e-5)
    norm.weight = nn.Parameter(torch.randn(64)[::2])
    assert_close(norm(x), exactly(norm, x.double(), None, None, False).float(), atol=1e-5, rtol=1e-5)
    plain = GroupNorm(4, 32, affine=False)
    assert_close(plain(x), nn.GroupNorm(4, 32, affine=False)(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="channels"):
        GroupNorm(4, 32)(channels_last(torch.randn(1, 64, 3, 3)))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_stays_none(wrong):
    norm, x = GroupNorm(2, 32), channels_last(torch.randn(2, 32, 3, 3))
    x[0, 3, 1, 1] = wrong
    assert torch.equal(norm(x, silu=True).isfinite(), F.silu(nn.GroupNorm(2, 32)(x.contiguous())).isfinite())


def test_large_numbers_saturate():
    norm, x = GroupNorm(2, 32), channels_last(torch.randn(1, 32, 2, 2))
    nn.init.constant_(norm.weight, 1e4)
    assert_close(norm(x, silu=True), exactly(norm, x.double(), None, None, True).float(), atol=1e-2, rtol=1e-5)


def test_a_gradient_of_any_layout():
    norm, x = GroupNorm(2, 32), channels_last(torch.randn(2, 32, 3, 3)).requires_grad_()
    (found,) = torch.autograd.grad((norm(x) * torch.arange(9.0).view(3, 3)).sum(), x)
    other = x.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad((norm(other) * torch.arange(9.0).view(3, 3)).sum(), other)
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_threads_do_not_change_the_bits():
    norm, x = GroupNorm(4, 40), channels_last(torch.randn(5, 40, 6, 6)).requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = norm(x, silu=True)
            found.append((y, *torch.autograd.grad(y.square().sum(), (x, norm.weight))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_hooks_see_it():
    norm, seen = GroupNorm(2, 32), []
    norm.register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    norm(channels_last(torch.randn(1, 32, 2, 2)), silu=True)
    assert seen == [(1, 32, 2, 2)]


def test_without_a_compiler_pytorch_takes_its_place(monkeypatch):
    norm, x = GroupNorm(4, 32), torch.randn(2, 32, 4, 4)
    scale, shift = torch.randn(2, 32), torch.randn(2, 32)
    found = norm(channels_last(x), (scale, shift), silu=True)
    group_norm.kernel.cache_clear()
    monkeypatch.setattr(native, "load_c", lambda source: None)
    try:
        assert channels_last(x) is x
        assert_close(norm(x, (scale, shift), silu=True), found, atol=1e-5, rtol=1e-4)
    finally:
        group_norm.kernel.cache_clear()
