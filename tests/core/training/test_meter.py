"""Speed and utilisation, against operations counted by hand."""

import time

import pytest
import torch
from torch import Tensor, nn

from canon.core import device as devices
from canon.core.training.meter import Meter
from tests.core.training.toy import Stream, Toy


def test_a_step_is_three_forward_passes(monkeypatch: pytest.MonkeyPatch):
    """Matrix products of the toy: two layers of 32x32, attention of two heads, the tied head of 50 tokens."""
    cpu = torch.device("cpu")
    model, batch = Toy(), next(Stream())
    meter = Meter(cpu, torch.float32, 1)
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    model.train()
    meter.measure(model, batch)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before))
    rows, time_ = 12, 16
    linear, attention = 2 * rows * time_ * 32 * (2 * 32 + 50), 2 * (2 * 2 * rows * 2 * time_ * time_ * 16)
    forward = linear + attention
    tokens = int((batch["tokens"][:, 1:] != 0).sum())
    assert meter.flops == pytest.approx(3 * forward / tokens)
    monkeypatch.setattr(devices, "peak_flops", lambda *_: 1e9)
    meter.count(batch, {"tokens": tokens})
    meter.count(batch, {"tokens": 2 * tokens})
    meter.since = time.perf_counter() - 2.0
    numbers = meter.read(torch.tensor(1.5), {"tokens": 2 * tokens})
    assert numbers["tokens_per_second"] == pytest.approx(3 * tokens / 2, rel=0.01)
    assert numbers["examples_per_second"] == pytest.approx(12, rel=0.01)
    assert numbers["utilisation"] == pytest.approx(9 * forward / 2 / 1e9, rel=0.01)


def test_a_model_that_counts_no_tokens_is_measured_by_rows():
    class Regression(nn.Module):
        """One matrix."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
            """Mean square."""
            return self.linear(batch).square().mean(), {}

    meter = Meter(torch.device("cpu"), torch.float32, 1)
    meter.measure(Regression(), torch.randn(6, 8))
    assert meter.flops == 3 * 2 * 8 * 4
    meter.count(torch.randn(6, 8), {})
    meter.since = time.perf_counter() - 3.0
    numbers = meter.read(torch.tensor(1.0), {})
    assert numbers["examples_per_second"] == pytest.approx(2, rel=0.01)
    assert "tokens_per_second" not in numbers
