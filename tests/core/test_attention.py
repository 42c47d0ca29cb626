import pytest
import torch
import torch.nn.functional as F

from canon.core.nn.attention import causal_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_written_out_equals_the_fused_kernel(dtype, kv_heads):
    inputs = [torch.randn(2, heads, 40, 16, requires_grad=True) for heads in (6, kv_heads, kv_heads)]
    upstream = torch.randn(2, 6, 40, 16)
    results = []
    for attend, kind in ((causal_attention, dtype), (_fused, torch.float32)):
        y = attend(*(x.to(kind) for x in inputs)).float()
        results.append((y, *torch.autograd.grad(y, inputs, upstream)))
    for ours, theirs in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def _fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_dropout_keeps_the_mean():
    q, k, v = (torch.randn(1, 1, 8, 4, dtype=torch.bfloat16) for _ in range(3))
    mean = torch.stack([causal_attention(q, k, v, 0.5) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, causal_attention(q, k, v), rtol=0.1, atol=0.1)
    assert not torch.equal(causal_attention(q, k, v, 0.5), causal_attention(q, k, v))
