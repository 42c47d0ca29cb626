"""Attention of narrow and of small heads on a processor, with its gradients (`narrow.c`).

The map of weights is never in memory.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from canon.core import native

N = ctypes.c_int64
FIELDS = ("batch", "heads", "queries", "keys", "d", "half", "threads")
WIDEST = 16
"""Channels of a head; in wider ones, matrix products are as fast, unless PyTorch makes too much of small ones."""
SMALL = 1024
"""Numbers in a head's keys; with more of them, matrix products are as fast."""


class ShapeStruct(ctypes.Structure):
    """`Shape` of narrow.c."""

    _fields_ = (*((name, N) for name in FIELDS), *((name, N * 3) for name in "qkvy"))


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled narrow.c; None where there is no C compiler."""
    source, tensors = Path(__file__).with_name("narrow.c"), {"attend_narrow": 5, "attend_narrow_backward": 9}
    return native.load_functions(source, ShapeStruct, tensors, ctypes.c_int)


def applies(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can serve these: plain tensors on a CPU, float32 or bfloat16, and narrow or small."""
    return (
        native.serves(q, k, v)
        and q.dtype == k.dtype == v.dtype
        and k.shape == v.shape
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] == k.shape[3]
        and q.dtype in (torch.float32, torch.bfloat16)
        and (q.shape[3] <= WIDEST or k.shape[2] * k.shape[3] <= SMALL)
        and min(q.numel(), k.numel()) > 0
        and kernel() is not None
    )


def attend_narrow(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
) -> Float[Tensor, "batch heads queries d_head"]:
    """softmax(q k^T / sqrt(d_head)) v. It has neither vmap nor functional transforms."""
    q, k, v = map(_dense, (q, k, v))
    y = _Narrow.apply(q, k, v) if torch.is_grad_enabled() else _forward(q, k, v)[0]
    return y.transpose(1, 2)


def written_out(
    q: Float[Tensor, "*heads queries d_head"],
    k: Float[Tensor, "*heads keys d_head"],
    v: Float[Tensor, "*heads keys d_head"],
) -> Float[Tensor, "*heads queries d_head"]:
    """The same by PyTorch, of which any derivative can be taken."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def _dense(x: Tensor) -> Tensor:
    """Heads behind each other or side by side, nothing between them, and nothing twice."""
    return x if x.is_contiguous() or x.transpose(1, 2).is_contiguous() else x.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, d = q.shape
    y, lse = q.new_empty(batch, queries, heads, d), q.new_empty(batch, heads, queries, dtype=torch.float32)
    _call("attend_narrow", q, k, v, y, lse)
    return y, lse


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        y, lse = _forward(q, k, v)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return native.differentiable(written_out, (q, k, v), dy.transpose(1, 2))
        (q, k, v), y, lse = map(_dense, (q, k, v)), y.contiguous(), lse.contiguous()  # a hook may have saved them
        dq, dk, dv = (x.new_empty_strided(x.shape, x.stride()) for x in (q, k, v))
        _call("attend_narrow_backward", q, k, v, y, dy.contiguous(), lse, dq, dk, dv)
        return dq, dk, dv


def _call(name: str, q: Tensor, k: Tensor, v: Tensor, y: Tensor, *others: Tensor) -> None:
    sizes = (*q.shape[:3], k.shape[2], q.shape[3], q.dtype == torch.bfloat16, torch.get_num_threads())
    shape = ShapeStruct(*sizes, *((N * 3)(*x.stride()[:3]) for x in (q, k, v, y.transpose(1, 2))))
    if native.call(kernel(), name, shape, q, k, v, y, *others):
        raise MemoryError(f"no memory to attend to {k.shape[2]:,} keys")
