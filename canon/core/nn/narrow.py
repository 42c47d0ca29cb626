"""Attention of narrow heads on a processor, with its gradients, without the map of weights in memory (`narrow.c`)."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from canon.core import native

N = ctypes.c_int64
FIELDS = ("batch", "heads", "queries", "keys", "d", "half", "threads")
WIDEST = 15
"""Channels of a head; from 16 on, matrix products are as fast."""


class ShapeStruct(ctypes.Structure):
    """`Shape` of narrow.c."""

    _fields_ = (*((name, N) for name in FIELDS), *((name, N * 3) for name in "qkvy"))


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled narrow.c; None where there is no C compiler."""
    compiled = native.load_c(Path(__file__).with_name("narrow.c"))
    if compiled is not None:
        for function, tensors in ((compiled.attend_narrow, 5), (compiled.attend_narrow_backward, 9)):
            function.argtypes = [ctypes.POINTER(ShapeStruct), *[ctypes.c_void_p] * tensors]
            function.restype = None
    return compiled


def applies(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can serve these: on a CPU, float32 or bfloat16, and narrow."""
    return (
        q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float32, torch.bfloat16)
        and 0 < q.shape[3] <= WIDEST
        and min(q.numel(), k.numel()) > 0
        and not torch.compiler.is_compiling()
        and kernel() is not None
    )


def attend_narrow(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
) -> Float[Tensor, "batch heads queries d_head"]:
    """softmax(q k^T / sqrt(d_head)) v; in memory, heads lie beside each other behind each query."""
    return _Narrow.apply(*(x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)))


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        y, lse = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        _call("attend_narrow", (q, k, v, y), q, k, v, y, lse)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, y, lse = ctx.saved_tensors
        dy = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype).copy_(dy) if dy.stride() != y.stride() else dy
        dq, dk, dv = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in (q, k, v))
        _call("attend_narrow_backward", (q, k, v, y), q, k, v, y, dy, lse, dq, dk, dv)
        return dq, dk, dv


def _like(q: Tensor) -> Tensor:
    batch, heads, queries, d = q.shape
    return q.new_empty(batch, queries, heads, d).transpose(1, 2)


def _call(name: str, shaped: tuple[Tensor, ...], *tensors: Tensor) -> None:
    q, k = shaped[:2]
    sizes = (*q.shape[:3], k.shape[2], q.shape[3], q.dtype == torch.bfloat16, torch.get_num_threads())
    shape = ShapeStruct(*sizes, *((N * 3)(*x.stride()[:3]) for x in shaped))
    getattr(kernel(), name)(ctypes.byref(shape), *(tensor.data_ptr() for tensor in tensors))
