"""Attention of narrow heads equals softmax(q k^T / sqrt(d)) v and its gradients."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from canon.core import native
from canon.core.nn import narrow
from canon.core.nn.unet import CrossAttention, attend
from canon.core.training.meter import _CPU_ATTENTION


def exactly(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[3])).softmax(-1) @ v


# keys: fewer than a vector, whole vectors, more than one tile of the backward pass; queries: not all rows of four
@pytest.mark.parametrize(
    ("queries", "keys", "d"),
    [(7, 5, 5), (4, 32, 1), (64, 64, 8), (13, 77, 10), (9, 300, 15), (6, 17, 16), (16, 300, 40)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_outputs_and_gradients(queries, keys, d, dtype, side_by_side):
    torch.manual_seed(0)
    shapes = [(2, n, 3, d) if side_by_side else (2, 3, n, d) for n in (queries, keys, keys)]
    low = [(2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]  # in memory, as networks make them
    given = [x.transpose(1, 2) if side_by_side else x for x in low]
    assert narrow.applies(*given) == (d <= 16 or keys * d <= 1024)
    y = narrow.attend_narrow(*given)
    high = [x.detach().double().requires_grad_() for x in low]
    expected = exactly(*(x.transpose(1, 2) if side_by_side else x for x in high))
    error = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]  # of the largest
    assert y.dtype == dtype
    assert_close(y.double(), expected, atol=error * float(expected.detach().abs().max()), rtol=error)
    g = torch.randn_like(expected).to(dtype)
    grads = torch.autograd.grad(y, low, g), torch.autograd.grad(expected, high, g.double())
    for a, b in zip(*grads):
        assert_close(a.double(), b, atol=2 * error * float(b.abs().max()), rtol=error)


def test_large_scores_do_not_overflow():
    q, k, v = (torch.randn(1, 2, 40, 4) for _ in range(3))
    assert_close(narrow.attend_narrow(300 * q, k, v), exactly((300 * q).double(), k.double(), v.double()).float())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(wrong):
    q, k, v = (torch.randn(1, 1, 20, 4) for _ in range(3))
    for broken in (q, k, v):
        kept, broken[0, 0, 3, 1] = broken[0, 0, 3, 1].clone(), wrong
        expected = exactly(q, k, v).isfinite()
        assert torch.equal(narrow.attend_narrow(q, k, v).isfinite(), expected)
        broken[0, 0, 3, 1] = kept


def test_heads_that_share_memory_get_their_own_gradients():
    k, v = (torch.randn(2, 1, 6, 4, requires_grad=True) for _ in range(2))
    qkv = torch.randn(2, 6, 3, 12, requires_grad=True)  # parts of one matrix, with other things between
    q = qkv[..., :4].transpose(1, 2)
    found = narrow.attend_narrow(q, k.expand(2, 3, 6, 4), v.expand(2, 3, 6, 4))
    expected = exactly(q, k, v)
    g = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(y, (qkv, k, v), g) for y in (found, expected)))
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in pairs)


def test_operations_are_counted_where_it_is_used():
    layer, x = CrossAttention(32, 4, 32), torch.randn(1, 64, 32)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter, torch.no_grad():
        layer(x, x)
    assert counter.get_total_flops() == 2 * (4 * 64 * 32 * 32 + 2 * 64 * 64 * 32)


def test_a_gradient_of_any_layout():
    q, k, v = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    summed = torch.autograd.grad(narrow.attend_narrow(q, k, v).sum(), (q, k, v))  # its gradient has strides of 0
    for a, b in zip(summed, torch.autograd.grad(exactly(q, k, v).sum(), (q, k, v))):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_threads_do_not_change_the_bits():
    q, k, v = (torch.randn(2, 3, 50, 7, requires_grad=True) for _ in range(3))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = narrow.attend_narrow(q, k, v)
            found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_what_it_does_not_serve_goes_another_way(monkeypatch):
    wide, double, empty = torch.randn(1, 1, 99, 17), torch.randn(1, 1, 3, 4).double(), torch.randn(1, 1, 0, 4)
    assert not any(narrow.applies(x, x, x) for x in (wide, double, empty))
    few, many = torch.randn(1, 1, 3, 4), torch.randn(2, 1, 3, 4)
    for q, k, v in ((many, few, few), (few, wide, few), (few, few, wide), (few, few, few[:, :, :2])):
        assert not narrow.applies(q, k, v)
    x = torch.randn(1, 2, 5, 4)
    found = attend(x, x, x)
    narrow.kernel.cache_clear()
    monkeypatch.setattr(native, "load_c", lambda source: None)
    try:
        assert not narrow.applies(x, x, x)
        assert_close(attend(x, x, x), found, atol=1e-6, rtol=1e-5)
    finally:
        narrow.kernel.cache_clear()


@pytest.mark.parametrize("kernels", ["x86-64", "haswell"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "d"), [(7, 5, 5), (13, 77, 10), (6, 17, 20)])
def test_processors_with_other_registers(kernels, queries, keys, d, dtype):
    test_outputs_and_gradients(queries, keys, d, dtype, True)
