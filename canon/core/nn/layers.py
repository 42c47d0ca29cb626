"""Convolutions and linear maps that are PyTorch's, faster on a processor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from canon.core import native
from canon.core.nn import winograd

FEWEST_CHANNELS = 16  # of a vector
FEWEST_TILES = 32  # with fewer, transforms of weights, which have four times their size, cost more than they save
MOST_PAIRS = 2**17  # of channels that come in and go out; with more, all that counts is how many weights are read

Prepared = dict[Any, Any]
_prepared: ContextVar[Prepared | None] = ContextVar("prepared", default=None)


@contextmanager
def prepared_weights(kept: Prepared) -> Iterator[None]:
    """Weights are put in order once for what computes with them, and not at every call, as by PyTorch.

    That takes time in which small products could be computed, and under autocast the weights are rounded, too. A
    sampler calls a network many times: it keeps one dictionary for all calls, which live in it and die with it. While
    it does, weights must not change, and it serves one network on one thread.

    Args:
        kept: what was prepared; empty at first.
    """
    token = _prepared.set(kept)
    try:
        yield
    finally:
        _prepared.reset(token)


def prepared_for(name: Any, x: Tensor, make: Callable[[], Any]) -> Any:
    """What is made of an input that is the same tensor at every call of a sampler, such as its text: made once.

    Args:
        name: by which it is found, no other's.
        x: the input, which must not change while weights are prepared.
        make: makes it.
    """
    kept = None if torch.is_grad_enabled() else _kept()
    if kept is None:
        return make()
    key = name, torch.is_autocast_enabled(x.device.type)
    if key not in kept or kept[key][0] is not x:
        kept[key] = x, make()
    return kept[key][1]


class Conv2d(nn.Conv2d):
    """PyTorch's; maps whose channels are neighbours in memory go a faster way."""

    def forward(
        self, input: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels new_height new_width"]:
        """The same numbers as those of ``nn.Conv2d``, but for rounding and for where an infinite one spreads to."""
        weight, bias = self.weight, self.bias
        if not (_ordinary(input, weight, bias) and self._simple(input)):
            return super().forward(input)
        wide = min(self.in_channels, self.out_channels) >= FEWEST_CHANNELS and self.stride == (1, 1)
        if wide and (self.kernel_size, self.padding) == ((1, 1), (0, 0)):
            return linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias, self).permute(0, 3, 1, 2)
        low = torch.is_autocast_enabled("cpu")
        kept = None if _learns(input, weight, bias) else _kept()
        if wide and (self.kernel_size, self.padding) == ((3, 3), (1, 1)) and not low:
            tiles = winograd.tiles(input)
            covered = 16 * tiles <= 1.5 * input.shape[0] * input.shape[2] * input.shape[3]  # not much beyond the map
            pays = covered and tiles >= FEWEST_TILES and weight.numel() <= 9 * MOST_PAIRS
            if pays and winograd.kernel() is not None:
                if kept is None:
                    return winograd.convolve(input, weight, bias)
                u = _once(kept, (self, "transformed"), lambda: winograd.transform_kernel(weight))
                return winograd.convolve(input, weight, bias, u)
        if kept is None or not _packs(low):
            return super().forward(input)
        where = self.padding, self.stride, self.dilation, 1
        dtype = torch.bfloat16 if low else torch.float32

        def pack() -> tuple[Tensor, Tensor | None]:
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight.detach().to(dtype), *where, input.shape)
            return packed, None if bias is None else bias.detach().to(dtype)

        return torch.ops.mkldnn._convolution_pointwise(
            input.to(dtype), *_once(kept, (self, dtype), pack), *where, "none", [], ""
        )

    def _simple(self, x: Tensor) -> bool:
        """Nothing but pixels around a pixel in zeros, on the layout that is wanted."""
        return (
            x.dim() == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and (self.dilation, self.groups) == ((1, 1), 1)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and x.shape[1] == self.in_channels
        )


class Linear(nn.Linear):
    """PyTorch's; in bfloat16, weights may be prepared."""

    def forward(self, input: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:
        """The same numbers as those of ``nn.Linear``."""
        return linear(input, self.weight, self.bias, self)


def linear(
    x: Float[Tensor, "*rows in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None,
    name: Any,
) -> Float[Tensor, "*rows out_features"]:
    """x W^T + b.

    Args:
        x: rows.
        weight: W.
        bias: b.
        name: by which W and b are found, where they are prepared; no other layer's.
    """
    kept = _kept()
    if kept is None or not torch.is_autocast_enabled("cpu") or not _ordinary(x, weight, bias):
        return F.linear(x, weight, bias)
    if _learns(x, weight, bias) or not _packs(low=True):
        return F.linear(x, weight, bias)

    def rounded() -> tuple[Tensor, Tensor | None]:  # and not put in order: that costs more than 20 calls save
        return weight.detach().bfloat16(), None if bias is None else bias.detach().bfloat16()

    return torch.ops.mkldnn._linear_pointwise(
        x.bfloat16(), *_once(kept, (name, torch.bfloat16), rounded), "none", [], ""
    )


def _ordinary(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is a plain computation on a processor, in float32 or by autocast in bfloat16."""
    if not native.serves(x, weight, *(() if bias is None else (bias,))):
        return False
    low = torch.is_autocast_enabled("cpu")
    return (
        x.numel() > 0
        and weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.dtype in ((torch.float32, torch.bfloat16) if low else (torch.float32,))
        and (not low or torch.get_autocast_dtype("cpu") == torch.bfloat16)
    )


def _packs(low: bool) -> bool:
    """Whether oneDNN serves this processor, in bfloat16 if it is to."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return not low or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _kept() -> Prepared | None:
    return None if torch.compiler.is_compiling() else _prepared.get()


def _once(kept: Prepared, key: Any, prepare: Callable[[], Any]) -> Any:
    if key not in kept:
        kept[key] = prepare()
    return kept[key]
