"""What the computation runs on: device, threads, precision, randomness, and how fast the device can go."""

import hashlib
import os
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path

import torch

from canon.core.errors import UserError

_chosen = "auto"


def use_device(name: str) -> torch.device:
    """Choose the device of this process: ``auto``, or a torch device such as ``cpu`` or ``cuda:1``.

    Raises:
        UserError: there is no such device here.
    """
    global _chosen
    device = pick_device(name)
    _chosen = name
    return device


def pick_device(name: str | None = None) -> torch.device:
    """The device to compute on: the one chosen, or for ``auto`` CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: there is no such device here.
    """
    name = name or _chosen
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":  # under torchrun every process of a machine has its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here; use --device cpu, or --device auto for the best") from error
    return device


def usable_cores() -> int:
    """Cores that this process may compute on: its affinity, a container's quota, and `$OMP_NUM_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # OpenMP allows one number for each nested level
    with suppress(OSError, ValueError):  # no cgroup (v2), or a quota of "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return min(cores, max(1, int(wanted))) if wanted.isdigit() else cores


def use_threads(count: int | None = None) -> int:
    """Let torch compute with ``count`` threads, by default as many as there are usable cores; returns the number."""
    if count is not None and count < 1:
        raise UserError(f"--threads must be at least 1, not {count}")
    count = count or usable_cores()
    torch.set_num_threads(count)
    return count


def bf16_pays(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device's hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type matrix products run in: ``fp32``, ``bf16``, or for ``auto`` bfloat16 where :func:`bf16_pays`."""
    wanted = precision == "bf16" or (precision == "auto" and bf16_pays(device))
    return torch.bfloat16 if wanted else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision: products in ``dtype``, sums and norms in float32 (Micikevicius et al. 2018)."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@lru_cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product, measured here: the base of utilisation.

    The best of several tries, because other programs may be running. Takes about a tenth of a second.
    """
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def generator(*numbers: int) -> torch.Generator:
    """A stream of random numbers on the CPU that belongs to these numbers, such as a seed, a step and a purpose.

    PyTorch keeps 32 bits of a seed, so that two purposes cannot be told apart by adding large numbers to it.
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on the device is done (a CPU is always done)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
