"""What holds of all kernels of ours: derivatives of derivatives, hooks, and what is no number."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from canon.core.nn.group_norm import GroupNorm, channels_last
from canon.core.nn.layers import Conv2d
from canon.core.nn.narrow import written_out
from canon.core.nn.unet import ResBlock, attend


def convolution():
    layer = Conv2d(16, 17, 3, padding=1)
    inputs = [channels_last(torch.randn(8, 16, 8, 8)), layer.weight, layer.bias]
    return lambda x, *_: layer(x), lambda *given: F.conv2d(*given, padding=1), inputs


def norm():
    layer = GroupNorm(4, 16)
    film = torch.randn(3, 16), torch.randn(3, 16)

    def exactly(x, gain, bias, scale, shift):
        h = F.group_norm(x, 4, gain, bias)
        return F.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    inputs = [channels_last(torch.randn(3, 16, 5, 6)), layer.weight, layer.bias, *film]
    return lambda x, _gain, _bias, *film: layer(x, film, silu=True), exactly, inputs


def attention(shape):
    return attend, written_out, [torch.randn(shape) for _ in range(3)]


CASES = {
    "winograd": convolution,
    "group_norm": norm,
    "narrow": lambda: attention((2, 3, 20, 5)),
    "one tensor as all three": lambda: (
        lambda x: attend(x, x, x),
        lambda x: written_out(x, x, x),
        [torch.randn(2, 3, 20, 5)],
    ),
}


def same(given, wanted, error=2e-5):
    for a, b in zip(given, wanted):
        assert_close(a.double(), b.double(), atol=error * float(b.abs().max()), rtol=error)


@pytest.mark.parametrize("name", CASES)
def test_a_penalty_on_gradients_has_gradients(name):
    """Of which those must count, too, that do not go through the gradient of the output."""
    torch.manual_seed(0)
    ours, exactly, inputs = CASES[name]()

    def penalised(function, given):
        y = function(*given)
        loss = y.square().mean()
        for slope in (torch.ones_like(y), y):
            for gradient in torch.autograd.grad(y, given, slope, create_graph=True):
                loss = loss + gradient.square().mean()
        return torch.autograd.grad(loss, given)

    for x in inputs:
        x.requires_grad_()
    same(penalised(ours, inputs), penalised(exactly, [x.detach().double().requires_grad_() for x in inputs]))


@pytest.mark.parametrize("name", CASES)
def test_a_product_with_the_hessian(name):
    torch.manual_seed(0)
    ours, exactly, inputs = CASES[name]()
    direction = torch.randn_like(inputs[0])

    def product(function, x, others, v):
        return torch.autograd.functional.hvp(lambda x: function(x, *others).pow(3).sum(), x, v)[1]

    high = [x.detach().double() for x in inputs]
    found, wanted = (
        product(ours, inputs[0], inputs[1:], direction),
        product(exactly, high[0], high[1:], direction.double()),
    )
    same([found], [wanted])


def test_bfloat16_attention_has_second_derivatives():
    x = torch.randn(256, 8, 64, 24, dtype=torch.bfloat16)
    high = x[:4].double().requires_grad_()
    x.requires_grad_()

    def twice(function, x):
        (gradient,) = torch.autograd.grad(function(x, x, x).float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.float().square().sum(), x)[0]

    found, wanted = twice(attend, x)[:4].double(), twice(written_out, high).double()
    assert (found - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.parametrize("name", CASES)
def test_saved_tensors_may_come_back_in_another_layout(name):
    torch.manual_seed(0)
    ours, exactly, inputs = CASES[name]()
    for x in inputs:
        x.requires_grad_()
    with saved_tensors_hooks(lambda x: x.mT.contiguous().mT.clone() if x.dim() > 1 else x.clone(), lambda x: x):
        y = ours(*inputs)
    high = [x.detach().double().requires_grad_() for x in inputs]
    same(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(exactly(*high).sum(), high))


def test_who_watches_a_block_sees_what_its_layers_returned():
    block, seen = ResBlock(16, 16, d_emb=8, groups=4), {}
    x, emb = channels_last(torch.randn(2, 16, 8, 8)), torch.randn(2, 8)
    expected = block(x, emb)
    for name in ("conv1", "conv2"):
        layer = getattr(block, name)
        layer.register_forward_hook(lambda layer, given, y: seen.update({layer: (given[0], y)}))
        layer.register_full_backward_hook(lambda *_: None)
    block(x, emb).sum().backward()
    assert torch.equal(block(x, emb), expected)
    for layer, (given, y) in seen.items():
        assert_close(y, F.conv2d(given, layer.weight, layer.bias, padding=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernels", ["native", "haswell", "x86-64"], indirect=True)
def test_no_number_is_rounded_to_none(kernels):
    """That of CUDA, whose bits are all ones, would overflow to -0."""
    layer, x = GroupNorm(4, 16), channels_last(torch.randn(2, 16, 4, 4)).bfloat16()
    with torch.no_grad():
        layer.bias.view(torch.int32)[3] = 0x7FFFFFFF
        y = layer(x)
        assert y[:, 3].isnan().all()
        assert y[:, :3].isfinite().all()
        largest = torch.finfo(torch.float32).max
        layer.bias[5] = largest  # rounds to infinity
        assert torch.equal(layer(x)[:, 5], torch.full((2, 4, 4), torch.inf).bfloat16())
