"""Convolution of 3 x 3 pixels in float32 by Winograd's algorithm F(4 x 4, 3 x 3), on a processor (`winograd.c`).

Source: Lavin and Gray 2016, arXiv 1509.09308, section 4.3. Maps have their channels as neighbours in memory.
"""

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from canon.core import native

FIELDS = ("height", "width", "channels", "first", "count", "stride", "threads")
FLOATS = 2**19  # of a part of a transform, so that it stays in the cache


class ShapeStruct(ctypes.Structure):
    """`Shape` of winograd.c."""

    _fields_ = tuple((name, ctypes.c_int64) for name in FIELDS)


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled winograd.c; None where there is no C compiler."""
    tensors = {"transform_input": 2, "transform_output": 3, "transform_gradient": 2}
    return native.load_functions(Path(__file__).with_name("winograd.c"), ShapeStruct, tensors)


def tiles(x: Float[Tensor, "batch channels height width"]) -> int:
    """Number of 4 x 4 tiles that cover a batch of maps."""
    return x.shape[0] * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)


A, B = 0.75, 1.5  # where polynomials are evaluated: at these, at their negatives, at 0 and at infinity
G = torch.tensor(
    [
        [1 / (A * A * B * B), 0, 0],
        *([c, c * x, c * x * x] for a, b in ((A, B), (B, A)) for c in [0.5 / (a**4 - (a * b) ** 2)] for x in (a, -a)),
        [0, 0, 1],
    ]
)
GG = torch.kron(G, G)  # of the rows and of the columns


@torch.autocast("cpu", enabled=False)
def transform_kernel(weight: Float[Tensor, "out in 3 3"], turned: bool = False) -> Float[Tensor, "36 out in"]:
    """U = G g G^T, of the kernel as it is or turned by half a circle."""
    g = GG.flip(1) if turned else GG
    return (g @ weight.detach().reshape(-1, 9).T).view(36, *weight.shape[:2])


def convolve(
    x: Float[Tensor, "batch before height width"],
    weight: Float[Tensor, "after before 3 3"],
    bias: Float[Tensor, " after"] | None = None,
    transformed: Float[Tensor, "36 after before"] | None = None,
) -> Float[Tensor, "batch after height width"]:
    """Convolution by 3 x 3 weights of a map in zeros.

    Args:
        x: float32; its channels, at least 16, are neighbours in memory.
        weight: float32. It, the map and the bias have first gradients.
        bias: of each channel.
        transformed: of the weights, where it is at hand (`transform_kernel`).
    """
    return _Winograd.apply(x, weight, bias, transformed)


class _Winograd(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, x, weight, bias, transformed):
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        u = transform_kernel(weight) if transformed is None else transformed
        return _convolve(x, u.mT, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _convolve(dy, transform_kernel(weight, turned=True))
        if ctx.needs_input_grad[1]:
            du = x.new_zeros(36, *weight.shape[:2])
            for (d, out_shape), (v, in_shape) in zip(_parts(dy, x.shape[1]), _parts(x, dy.shape[1])):
                _call("input", in_shape, x, v)
                _call("gradient", out_shape, dy, d)
                du.baddbmm_(d.mT, v)
            dweight = (GG.T @ du.flatten(1)).T.reshape(weight.shape)
        if ctx.bias and ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 2, 3))
        return dx, dweight, dbias, None


def _convolve(x: Tensor, u: Float[Tensor, "36 before after"], bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((x.shape[0], u.shape[2], *x.shape[2:]), memory_format=torch.channels_last)
    for (v, in_shape), (m, out_shape) in zip(_parts(x, y.shape[1]), _parts(y, x.shape[1])):
        _call("input", in_shape, x, v)
        torch.bmm(v, u, out=m)
        _call("output", out_shape, m, bias, y)
    return y


def _parts(x: Tensor, others: int) -> Iterator[tuple[Float[Tensor, "36 tiles channels"], ShapeStruct]]:
    """Parts of the transform of a map, in the same memory one after the other, and what the kernel is told of each."""
    _, channels, height, width = x.shape
    most = max(1, min(tiles(x), FLOATS // (36 * max(channels, others))))
    memory = torch.empty(36, most, channels)
    threads = torch.get_num_threads()
    for first in range(0, tiles(x), most):
        count = min(most, tiles(x) - first)
        yield (
            memory[:, :count],
            ShapeStruct(height, width, channels, first, count, memory.stride(0), threads),
        )


def _call(name: str, shape: ShapeStruct, *tensors: Tensor | None) -> None:
    pointers = (None if x is None else x.data_ptr() for x in tensors)
    getattr(kernel(), f"transform_{name}")(ctypes.byref(shape), *pointers)
