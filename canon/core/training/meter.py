"""How fast training goes: examples and tokens a second, and the share of the hardware's speed that is used."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from canon.core import device as devices
from canon.core.training import distributed


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


# torch counts the attention kernels of CUDA; this is the CPU's
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class Meter:
    """Loss, speed and utilisation between two readings.

    A training step is taken to be three forward passes' worth of floating-point operations, as usual: the backward
    pass multiplies twice where the forward pass does once.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, processes: int):
        self.device, self.dtype, self.processes = device, dtype, processes
        self.flops = 0.0  # of a training step, by token (by example where the model does not count tokens)
        self._reset()

    def _reset(self) -> None:
        self.since, self.examples = time.perf_counter(), 0
        self.tokens: float | Tensor = 0.0  # stays on the device: asking at every step would stall a GPU

    def measure(self, model: Any, batch: Any) -> None:
        """Count the operations of a forward pass, in one that leaves no trace.

        Training itself is not counted: a counter takes some operations apart, which rounds differently.
        """
        training = model.training
        model.eval()
        with torch.no_grad(), devices.autocast(self.device, self.dtype):
            with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
                metrics = model.loss(batch)[1]
        model.train(training)
        self.flops = 3 * counter.get_total_flops() / float(metrics.get("tokens", distributed.rows_of(batch)))
        self._reset()

    def count(self, batch: Any, metrics: dict[str, Any]) -> None:
        """Count a training step."""
        rows = distributed.rows_of(batch)
        self.examples, self.tokens = self.examples + rows, self.tokens + metrics.get("tokens", rows)

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
        weight = float(metrics.get("tokens", 1))
        total = distributed.sum_over_processes(weight, self.device)
        mean = distributed.sum_over_processes(float(loss) * weight, self.device) / total
        numbers = {"loss": mean, **numbers, **more, "examples_per_second": self.processes * self.examples / seconds}
        tokens = float(self.tokens)
        if "tokens" in metrics:
            numbers["tokens_per_second"] = distributed.sum_over_processes(tokens, self.device) / seconds
        numbers["utilisation"] = self.flops * tokens / seconds / devices.peak_flops(self.device, self.dtype)
        self._reset()
        return numbers
