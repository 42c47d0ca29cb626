"""Decoding with the cache equals the full forward pass, whatever the rows have been through."""

import pytest
import torch
import torch.nn.functional as F

from canon.core.errors import UserError
from canon.core.generation import attention
from canon.core.generation.cache import KVCache
from tests.core.generation.tiny import TinyDecoder

# That there is a kernel wherever there is a compiler is tests/core/test_native.py's.
WAYS = ["torch", "kernel"] if attention.kernel() else ["torch"]


@pytest.fixture(params=WAYS)
def _both_ways(request, monkeypatch):
    """Single-query attention in C and in PyTorch."""
    if request.param == "torch":
        monkeypatch.setattr(attention, "applies", lambda *_: False)


def qkv(batch, heads, kv_heads, time, d_head=16):
    return torch.randn(batch, heads, time, d_head), *torch.randn(2, batch, kv_heads, time, d_head)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[1] * 70, [33, 1, 1, 5, 30], [64, 6], [70]])
def test_attend_equals_causal_attention(kv_heads, chunks):
    torch.manual_seed(0)
    q, k, v = qkv(3, 4, kv_heads, 70)
    cache = KVCache(1, 3, kv_heads, 70, 16)
    outputs, start = [], 0
    for time in chunks:
        part = slice(start, start + time)
        outputs.append(cache.attend(0, q[:, :, part], k[:, :, part], v[:, :, part]))
        cache.advance(time)
        start += time
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(torch.cat(outputs, 2), expected)


@pytest.mark.usefixtures("_both_ways")
def test_update_and_mask_serve_the_same_attention():
    torch.manual_seed(0)
    q, k, v = qkv(2, 4, 4, 40)
    one, other = KVCache(1, 2, 4, 40, 16), KVCache(1, 2, 4, 40, 16)
    for cache in (one, other):
        cache.attend(0, q[:, :, :20], k[:, :, :20], v[:, :, :20])
        cache.advance(20)
        cache.lengths = torch.tensor([20, 11])
    for start, time in ((20, 1), (21, 6), (27, 1)):
        part = slice(start, start + time)
        mask = other.mask(time)
        keys, values = other.update(0, k[:, :, part], v[:, :, part])
        expected = F.scaled_dot_product_attention(q[:, :, part], keys, values, mask)
        torch.testing.assert_close(one.attend(0, q[:, :, part], k[:, :, part], v[:, :, part]), expected)
        one.advance(time)
        other.advance(time)


def test_mask_is_none_only_for_one_token_of_even_rows():
    cache = KVCache(1, 2, 1, 8, 4)
    assert cache.mask(1) is None
    cache.advance(3)
    assert cache.mask(1) is None
    assert cache.mask(2)[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]
    cache.lengths = torch.tensor([3, 1])
    assert cache.mask(1)[:, 0, 0].tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.usefixtures("_both_ways")
def test_ragged_rows_equal_rows_alone():
    """Each row of a padded batch sees its own tokens only, through growth, selection and rewinding."""
    model = TinyDecoder(context=96).eval()
    rows = [torch.randint(50, (n,)) for n in (40, 3, 17)]
    cache = model.new_cache(3, 90)
    padded = torch.full((3, 40), 49)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    model(padded, cache)
    cache.lengths = torch.tensor([len(row) for row in rows])

    def go(count):
        for _ in range(count):
            new = torch.randint(50, (len(rows), 1))
            logits = model(new, cache)
            for i in range(len(rows)):
                rows[i] = torch.cat([rows[i], new[i]])
                torch.testing.assert_close(logits[i, -1], model(rows[i][None])[0, -1])

    go(10)
    order = [2, 0, 0, 1, 2]  # more rows than were reserved
    cache.select(order)
    rows = [rows[i] for i in order]
    go(30)
    cache.select([3, 1])
    rows = [rows[3], rows[1]]
    cache.rewind([5, 45])
    rows = [rows[0][:5], rows[1][:45]]
    assert cache.lengths.tolist() == [5, 45]
    new = torch.randint(50, (2, 4))  # several tokens for ragged rows at once
    logits = model(new, cache)
    for i in range(2):
        rows[i] = torch.cat([rows[i], new[i]])
        torch.testing.assert_close(logits[i], model(rows[i][None])[0, -4:])
    go(20)


def test_overflow_names_the_limit():
    cache = KVCache(1, 2, 1, 4, 16)
    q, k, v = qkv(2, 1, 1, 5)
    with pytest.raises(UserError, match="max_length=4"):
        cache.attend(0, q, k, v)


def test_rewind_goes_back_only():
    cache = KVCache(1, 2, 1, 4, 16)
    cache.advance(2)
    for wrong in ([3, 1], [-1, 0], [1]):
        with pytest.raises(ValueError, match="cannot rewind"):
            cache.rewind(wrong)


@pytest.mark.usefixtures("_both_ways")
def test_bfloat16_stays_close():
    model = TinyDecoder().eval()
    tokens = torch.randint(50, (4, 30))
    expected = model(tokens)[:, -1]
    model.to(torch.bfloat16)
    cache = model.new_cache(4, 30)
    for i in range(30):
        logits = model(tokens[:, i : i + 1], cache)
    assert logits.dtype == torch.bfloat16
    assert (logits[:, -1].float() - expected).abs().max() < 0.15 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if "kernel" in WAYS else [])
@pytest.mark.parametrize("d_head", [16, 64, 80, 128])
def test_kernel_equals_attention(dtype, d_head):
    """Against float32 attention over the same rounded numbers, ragged rows, shared heads, strided inputs, outliers."""
    lengths = torch.tensor([0, 1, 30, 15, 49])
    q = torch.randn(5, 1, 6, d_head, dtype=dtype).transpose(1, 2) * 4
    k, v = torch.randn(5, 1, 2, 2, d_head, dtype=dtype).permute(2, 0, 3, 1, 4)
    keys, values = torch.randn(2, 5, 2, 50, d_head, dtype=dtype)
    keys[2, :, 7] *= 50  # a score that dwarfs the others
    whole_keys, whole_values = keys.clone(), values.clone()
    for row, length in enumerate(lengths):
        whole_keys[row, :, length], whole_values[row, :, length] = k[row, :, 0], v[row, :, 0]
        keys[row, :, length:] = values[row, :, length:] = torch.nan  # not yet written
    assert attention.applies(q, k, v, keys)
    y = attention.attend_one(q, k, v, keys, values, lengths)
    for row, length in enumerate(lengths + 1):
        expected = F.scaled_dot_product_attention(
            q[row].float(), whole_keys[row, :, :length].float(), whole_values[row, :, :length].float(), enable_gqa=True
        )
        torch.testing.assert_close(y[row], expected.to(dtype))
        assert torch.equal(keys[row, :, :length], whole_keys[row, :, :length])
        assert torch.equal(values[row, :, :length], whole_values[row, :, :length])


def test_gradients_go_through_torch():
    q, k, v = (torch.randn(2, 2, 1, 16, requires_grad=True) for _ in range(3))
    KVCache(1, 2, 2, 4, 16).attend(0, q, k, v).sum().backward()
    assert q.grad is not None
    assert v.grad is not None
