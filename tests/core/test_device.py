"""Threads and devices."""

from pathlib import Path

import pytest
import torch

from canon.core import device
from canon.core.errors import UserError


@pytest.mark.parametrize(("value", "threads"), [("1", 1), ("1,4", 1), ("1000000", 2), ("many", 2)])
def test_threads_follow_openmp(value, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: "max 100000")
    assert device.usable_cores() == threads


@pytest.mark.parametrize(("quota", "threads"), [("max 100000", 64), ("350000 100000", 3), ("50000 100000", 1)])
def test_a_containers_quota_counts(quota, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: quota)
    assert device.usable_cores() == threads


def test_streams_are_told_apart_by_every_number():
    def drawn(*numbers):
        return tuple(torch.randn(4, generator=device.generator(*numbers)).tolist())

    assert drawn(1, 2) == drawn(1, 2)
    others = [(1,), (2, 1), (12,), (1, 2, 0), (1, 2 + 2**32), (1 + 2**32, 2), (-1, 2)]
    assert len({drawn(*numbers) for numbers in [(1, 2), *others]}) == 8


def test_no_such_device():
    for name in ("tpu9", "cuda:99", ""):
        with pytest.raises(UserError, match="there is no device"):
            device.pick_device(name or "nothing")


def test_too_few_threads():
    with pytest.raises(UserError, match="at least 1"):
        device.use_threads(0)
