"""How fast training goes: examples and tokens a second, and the share of the hardware's speed that is used."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from canon.core import device as devices
from canon.core.training import distributed


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **_: Any
) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# torch counts the attention kernels of CUDA; these are the CPU's
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    # What has no entry is decomposed while counting, which rounds differently: the counted step must equal the others.
    torch.ops.aten.silu_backward.default: lambda *args, **kwargs: 0,
}


class Meter:
    """Loss, speed and utilisation between two readings."""

    def __init__(self, device: torch.device, dtype: torch.dtype, processes: int):
        self.device, self.dtype, self.processes = device, dtype, processes
        self.flops = 0.0
        self._reset()

    def _reset(self) -> None:
        self.since, self.steps, self.examples, self.tokens = time.perf_counter(), 0, 0, 0.0

    @contextmanager
    def counting(self, batch: Any, count_flops: bool) -> Iterator[None]:
        """Count this step; in a first one also the floating-point operations of its matrix products."""
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) if count_flops else nullcontext() as counter:
            yield
        if counter:
            self.flops = counter.get_total_flops()
        self.steps, self.examples = self.steps + 1, self.examples + distributed.rows_of(batch)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training and does not count against its speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def read(self, loss: Tensor, metrics: dict[str, Any], **more: float) -> dict[str, float]:
        """Numbers of the latest step, with speeds averaged since the last reading."""
        devices.synchronize(self.device)
        seconds = time.perf_counter() - self.since
        numbers = {key: float(value) for key, value in metrics.items() if key != "tokens"}
        tokens = float(metrics.get("tokens", 1))
        all_tokens = distributed.sum_over_processes(tokens, self.device)
        mean = distributed.sum_over_processes(float(loss) * tokens, self.device) / all_tokens
        numbers = {"loss": mean, **numbers, **more, "examples_per_second": self.processes * self.examples / seconds}
        if "tokens" in metrics:
            numbers["tokens_per_second"] = all_tokens * self.steps / seconds
        peak = devices.peak_flops(self.device, self.dtype)
        numbers["utilisation"] = self.flops * self.steps / seconds / peak
        self._reset()
        return numbers
