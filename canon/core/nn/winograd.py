"""Convolution of 3 x 3 pixels in float32 by Winograd's algorithm F(4 x 4, 3 x 3), on a processor (`winograd.c`).

Source: Lavin and Gray 2016, arXiv 1509.09308, section 4.3. Maps have their channels as neighbours in memory.
"""

import ctypes
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from canon.core import native

FIELDS = ("height", "width", "channels", "others", "tiles", "block", "groups", "other_groups", "threads")
FLOATS = 2**18  # of the transformed tiles that a thread takes at a time, which stay in its cache
ROWS = 8  # blocks hold a multiple of so many tiles; products of as many, or of half of them, are made at once


class ShapeStruct(ctypes.Structure):
    """`Shape` of winograd.c."""

    _fields_ = tuple((name, ctypes.c_int64) for name in FIELDS)


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled winograd.c; None where there is no C compiler."""
    tensors = {"transform_kernel": 2, "transform_kernel_turned": 2, "convolve": 4, "convolve_backward": 3}
    return native.load_functions(Path(__file__).with_name("winograd.c"), ShapeStruct, tensors, ctypes.c_int)


def tiles(x: Float[Tensor, "batch channels height width"]) -> int:
    """Number of 4 x 4 tiles that cover a batch of maps."""
    return x.shape[0] * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)


def transform_kernel(weight: Float[Tensor, "out in 3 3"], turned: bool = False) -> Float[Tensor, "36 before after"]:
    """U = G g G^T, for a map of channels that come in; or of those that go out, the kernel turned by half a circle."""
    after, before = weight.shape[1::-1] if turned else weight.shape[:2]
    u = weight.new_empty(36, before, after)
    shape = ShapeStruct(channels=before, others=after, threads=torch.get_num_threads())
    _call("transform_kernel_turned" if turned else "transform_kernel", shape, weight.detach().contiguous(), u)
    return u


def convolve(
    x: Float[Tensor, "batch before height width"],
    weight: Float[Tensor, "after before 3 3"],
    bias: Float[Tensor, " after"] | None = None,
    transformed: Float[Tensor, "36 before after"] | None = None,
) -> Float[Tensor, "batch after height width"]:
    """Convolution by 3 x 3 weights of a map in zeros.

    Args:
        x: float32; its channels, at least 16, are neighbours in memory.
        weight: float32, to at least 16 channels. It, the map and the bias have gradients.
        bias: of each channel.
        transformed: of the weights, where it is at hand (`transform_kernel`).
    """
    u = transform_kernel(weight) if transformed is None else transformed
    return _Winograd.apply(x, weight, bias, u) if torch.is_grad_enabled() else _convolve(x, u, bias)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, u):
        ctx.save_for_backward(x, weight, bias)
        return _convolve(x, u, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *native.differentiable(partial(F.conv2d, padding=1), (x, weight, bias), dy), None
        x, dy = (map_.contiguous(memory_format=torch.channels_last) for map_ in (x, dy))  # a hook may have saved them
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _convolve(dy, transform_kernel(weight, turned=True))
        if ctx.needs_input_grad[1]:
            dweight = _convolve_backward(x, dy)
        if bias is not None and ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 2, 3))
        return dx, dweight, dbias, None


def _convolve(
    x: Tensor, u: Float[Tensor, "36 before after"], bias: Tensor | None = None
) -> Float[Tensor, "batch after height width"]:
    size = (x.shape[0], u.shape[2], *x.shape[2:])
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    blocks = -(-tiles(x) // (_rows_in_cache(u.shape[1]) * threads)) * threads  # the same number for each thread
    block = -(-tiles(x) // (blocks * ROWS)) * ROWS
    shape = ShapeStruct(*x.shape[2:], *u.shape[1:], tiles(x), block, groups=1, other_groups=1, threads=threads)
    _call("convolve", shape, x, u, None if bias is None else bias.contiguous(), y)
    return y


def _convolve_backward(x: Tensor, dy: Tensor) -> Float[Tensor, "after before 3 3"]:
    before, after, threads = x.shape[1], dy.shape[1], torch.get_num_threads()
    dweight = x.new_empty(after, before, 3, 3)
    # each thread makes a part of the kernel: of at least 32 channels that come in, if there are as many, and 16 others
    groups = min(threads, -(-before // 32))
    other_groups = min(threads // groups, -(-after // 16))
    block = min(tiles(x), _rows_in_cache(before // groups + after // other_groups))
    shape = ShapeStruct(*x.shape[2:], before, after, tiles(x), block, groups, other_groups, threads)
    _call("convolve_backward", shape, x, dy, dweight)
    return dweight


def _rows_in_cache(channels: int) -> int:
    return max(1, FLOATS // (36 * channels * ROWS)) * ROWS


def _call(name: str, shape: ShapeStruct, *tensors: Tensor | None) -> None:
    if native.call(kernel(), name, shape, *tensors):
        raise MemoryError(f"no memory to convolve maps of {shape.channels:,} channels")
