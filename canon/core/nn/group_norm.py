"""GroupNorm and SiLU on a processor, for maps whose channels are neighbours in memory (`group_norm.c`)."""

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from canon.core import native

FIELDS = ("batch", "pixels", "channels", "groups", "half", "silu", "each", "threads")
FEWEST_CHANNELS = 16  # of a vector


class ShapeStruct(ctypes.Structure):
    """`Shape` of group_norm.c."""

    _fields_ = (*((name, ctypes.c_int64) for name in FIELDS), ("eps", ctypes.c_double))


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled group_norm.c; None where there is no C compiler."""
    source = Path(__file__).with_name("group_norm.c")
    return native.load_functions(source, ShapeStruct, {"group_norm": 6, "group_norm_backward": 10})


def channels_last(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """The same map, its channels neighbours in memory where that is faster: on a processor that has the kernel."""
    return x.contiguous(memory_format=torch.channels_last) if native.serves(x) and kernel() is not None else x


class GroupNorm(nn.GroupNorm):
    """PyTorch's, and what often follows it."""

    def forward(
        self,
        input: Float[Tensor, "batch channels height width"],
        film: tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]] | None = None,
        silu: bool = False,
    ) -> Float[Tensor, "batch channels height width"]:
        """GroupNorm(x) (1 + scale) + shift (Wu and He 2018, Eq. 7), and SiLU of that if asked for.

        Args:
            input: the map.
            film: scale and shift of each map's channels (Perez et al. 2018, arXiv 1709.07871).
            silu: whether SiLU follows.
        """
        if not self._applies(input):
            h = super().forward(input)
            if film is not None:
                scale, shift = film
                h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
            return F.silu(h) if silu else h
        gain, bias = self.weight, self.bias
        if film is not None:
            scale, shift = (value.float().expand(input.shape[:2]) for value in film)
            gain, bias = gain * (1 + scale), bias * (1 + scale) + shift
        given = (input, gain.contiguous(), bias.contiguous(), self.num_groups, self.eps, silu)
        if torch.is_grad_enabled() and (input.requires_grad or gain.requires_grad or bias.requires_grad):
            return _GroupNorm.apply(*given)
        return _forward(*given)[0]

    def _applies(self, x: Tensor) -> bool:
        gain, bias = self.weight, self.bias
        return (
            gain is not None
            and bias is not None
            and native.serves(x, gain, bias)
            and gain.dtype == bias.dtype == torch.float32
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.dim() == 4
            and x.shape[1] == self.num_channels >= FEWEST_CHANNELS
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.numel() > 0
            and kernel() is not None
        )


def _forward(
    x: Tensor, gain: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, ShapeStruct]:
    batch, channels, height, width = x.shape
    sizes = (batch, height * width, channels, groups, x.dtype == torch.bfloat16, silu, gain.dim() == 2)
    shape = ShapeStruct(*sizes, torch.get_num_threads(), eps)
    mean, rstd = x.new_empty(2, batch, channels, dtype=torch.float32)
    y = torch.empty_like(x)
    native.call(kernel(), "group_norm", shape, x, gain, bias, y, mean, rstd)
    return y, mean, rstd, shape


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, bias, groups, eps, silu):
        y, mean, rstd, ctx.shape = _forward(x, gain, bias, groups, eps, silu)
        ctx.save_for_backward(x, gain, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gain, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():

            def formula(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
                y = F.group_norm(x.float(), ctx.shape.groups, eps=ctx.shape.eps)
                y = y * gain[..., None, None] + bias[..., None, None]
                return (F.silu(y) if ctx.shape.silu else y).to(x.dtype)

            return *native.differentiable(formula, (x, gain, bias), dy), None, None, None
        x = x.contiguous(memory_format=torch.channels_last)  # a hook may have saved it, and the others
        gain, bias, mean, rstd = (value.contiguous() for value in (gain, bias, mean, rstd))
        dx, dgain, dbias = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
        dy = dy.contiguous(memory_format=torch.channels_last)
        means = mean.new_empty(2, *mean.shape)
        sums = dx, dgain, dbias, means
        native.call(kernel(), "group_norm_backward", ctx.shape, x, gain, bias, mean, rstd, dy, *sums)
        if gain.dim() == 1:
            dgain, dbias = dgain.sum(0), dbias.sum(0)
        return dx, dgain, dbias, None, None, None
