"""Attention of one query a row over a key-value cache on a processor, in one pass over the memory (`attention.c`)."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from canon.core import native

N = ctypes.c_int64
FIELDS = ("batch", "heads", "kv_heads", "d", "capacity")
STRIDES = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")


class ShapeStruct(ctypes.Structure):
    """`Shape` of attention.c."""

    _fields_ = tuple((name, N) for name in (*FIELDS, *STRIDES, "half", "threads"))


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled attention.c; None where there is no C compiler."""
    return native.load_functions(Path(__file__).with_name("attention.c"), ShapeStruct, {"attend_one": 7})


def applies(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> bool:
    """Whether the kernel can serve these: on a CPU, no gradients, float32 or bfloat16, heads of whole vectors."""
    return (
        native.serves(q, k, v, keys)
        and q.dtype == k.dtype == v.dtype == keys.dtype
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.shape[-1] % 16 == 0
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and kernel() is not None
    )


def attend_one(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Store k and v behind the past of each row, and attend to all of it.

    Args:
        q: (batch, heads, 1, d_head).
        k: (batch, kv_heads, 1, d_head).
        v: like k.
        keys: (batch, kv_heads, capacity, d_head), contiguous.
        values: like keys.
        lengths: (batch,), keys and values that each row holds.
    """
    batch, heads, _, d_head = q.shape
    shape = ShapeStruct(
        batch,
        heads,
        *(k.shape[1], d_head, keys.shape[2]),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(q.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    y = q.new_empty(batch, 1, heads, d_head)
    native.call(kernel(), "attend_one", shape, q, k, v, keys, values, lengths, y)
    return y.transpose(1, 2)
