"""Convolutions and linear maps that are PyTorch's, faster on a processor.

Weights that do not learn are put in order once, for what computes with them: PyTorch does that, and under autocast the
rounding to bfloat16, at every call.
"""

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from canon.core.nn import winograd

FEWEST_CHANNELS = 16  # of a vector
FEWEST_TILES = 32  # with fewer, transforms of weights, which have four times their size, cost more than they save


class Conv2d(nn.Conv2d):
    """PyTorch's; maps whose channels are neighbours in memory go a faster way. It has first gradients only there.

    A change of weights through ``.data``, of which PyTorch keeps no record, goes unseen as long as nothing learns.
    """

    def forward(
        self, input: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels new_height new_width"]:
        """The same numbers as those of ``nn.Conv2d``, but for rounding."""
        x = input
        if not (x.is_contiguous(memory_format=torch.channels_last) and _ordinary(self, x) and self._simple(x)):
            return super().forward(x)
        if self.kernel_size == (1, 1):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if _dtype(x) == torch.float32 and winograd.tiles(x) >= FEWEST_TILES and winograd.kernel() is not None:
            u = None if _learns(self.weight) else _once(self, _transformed)
            return winograd.convolve(x, self.weight, self.bias, u)
        if _learns(self.weight, x) or not _packs(_dtype(x)):
            return super().forward(x)
        weight, bias = _once(self, _packed_convolution, _dtype(x), x.shape)
        return torch.ops.mkldnn._convolution_pointwise(
            x.to(weight.dtype), weight, bias, self.padding, self.stride, self.dilation, 1, "none", [], ""
        )

    def _simple(self, x: Tensor) -> bool:
        """Nothing but 3 x 3 or 1 x 1, and not much of a tile beyond the map."""
        return (
            (self.stride, self.dilation, self.groups) == ((1, 1), (1, 1), 1)
            and (self.kernel_size, self.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
            and min(self.in_channels, self.out_channels) >= FEWEST_CHANNELS
            and 16 * winograd.tiles(x) <= 1.5 * x.shape[0] * x.shape[2] * x.shape[3]
        )


class Linear(nn.Linear):
    """PyTorch's, with the same restriction as :class:`Conv2d`."""

    def forward(self, input: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:
        """The same numbers as those of ``nn.Linear``."""
        low = torch.is_autocast_enabled("cpu") and _ordinary(self, input) and _dtype(input) == torch.bfloat16
        if not low or _learns(self.weight, input) or not _packs(torch.bfloat16):
            return F.linear(input, self.weight, self.bias)
        weight, bias = _once(self, _packed_linear, torch.bfloat16, input.shape)
        return torch.ops.mkldnn._linear_pointwise(input.to(weight.dtype), weight, bias, "none", [], "")


def _ordinary(layer: nn.Conv2d | nn.Linear, x: Tensor) -> bool:
    """Whether this is a plain computation on a processor, in float32 or by autocast in bfloat16."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.numel() > 0
        and layer.weight.dtype == torch.float32
        and not layer.weight.is_inference()
        and (x.dtype == torch.float32 or torch.is_autocast_enabled("cpu"))
        and _dtype(x) in (torch.float32, torch.bfloat16)
        and not is_in_torch_dispatch_mode()
        and not torch.compiler.is_compiling()
    )


def _dtype(x: Tensor) -> torch.dtype:
    """In which a product is computed."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN serves this processor in this precision."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


_KEPT: WeakKeyDictionary[nn.Module, tuple[Any, Tensor, Any]] = WeakKeyDictionary()


def _once(layer: nn.Conv2d | nn.Linear, prepare: Callable[..., Any], *given: Any) -> Any:
    """What is made of a layer's weights, kept until they change."""
    state = (prepare, layer.weight._version, None if layer.bias is None else layer.bias._version, *given[:1])
    kept = _KEPT.get(layer)
    if kept is None or kept[0] != state or kept[1].data_ptr() != layer.weight.data_ptr():
        # the weights are kept, too, so that no others can come to lie in their place
        kept = _KEPT[layer] = state, layer.weight.detach(), prepare(layer, *given)
    return kept[2]


def _transformed(layer: nn.Conv2d) -> Tensor:
    return winograd.transform_kernel(layer.weight)


def _packed_convolution(layer: nn.Conv2d, dtype: torch.dtype, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    where = layer.padding, layer.stride, layer.dilation, 1
    weight = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach().to(dtype), *where, shape)
    return weight, None if layer.bias is None else layer.bias.detach().to(dtype)


def _packed_linear(layer: nn.Linear, dtype: torch.dtype, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    rows = shape.numel() // shape[-1]
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), rows)
    return weight, None if layer.bias is None else layer.bias.detach().to(dtype)
