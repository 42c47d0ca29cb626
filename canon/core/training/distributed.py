"""Training on several processes, outside the models: ``torchrun`` starts them, this module connects them.

Every process sees the whole global batch and takes its own rows, so the data position does not depend on the number of
processes and a run may be resumed on more or fewer of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from canon.core import device as devices
from canon.core.errors import UserError

T = TypeVar("T")

# Below this many parameters a copy of everything on each device is cheaper than gathering shards at every layer.
_SHARD_FROM = 500_000_000


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun. Joins the process group at the first call."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        device = devices.pick_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # collectives run on the current device
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Leave the process group, if this process had joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def distribute(model: nn.Module, device: torch.device, parallel: Literal["auto", "ddp", "fsdp"]) -> nn.Module:
    """Make a module train on all processes that take part; the module itself where there is only one.

    The module's one child is the system's model, which must compute its loss through its own forward pass, or name the
    methods that need its weights in ``sharded_methods``.

    ``ddp`` keeps a full copy on each process (Li et al. 2020, arXiv 2006.15704). ``fsdp`` shards parameters, gradients
    and optimiser state (FSDP2's ``fully_shard``; Zhao et al. 2023, arXiv 2304.11277), layer by layer: every member of
    an outermost ``ModuleList`` is one unit. ``auto`` shards from half a billion parameters on.
    """
    if world()[1] == 1:
        return model
    if parallel == "auto":
        parallel = "fsdp" if sum(p.numel() for p in model.parameters()) >= _SHARD_FROM else "ddp"
    if parallel == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    # a second of imports that a single process never needs
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    def shard_layers(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                for layer in child:
                    fully_shard(layer)
            else:
                shard_layers(child)

    shard_layers(model)
    for child in model.children():  # not the wrapper itself, so that evaluation may call the model without it
        fully_shard(child)
        for method in getattr(child, "sharded_methods", ()):
            register_fsdp_forward_method(child, method)
    return model


@contextmanager
def synchronise_gradients(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Average gradients over the processes in this backward pass, or only accumulate them locally."""
    if isinstance(model, DistributedDataParallel) and not wanted:
        with model.no_sync():
            yield
        return
    for child in model.children():
        if sync := getattr(child, "set_requires_gradient_sync", None):  # FSDP2 has sharded it
            sync(wanted)
    yield


def my_rows(batch: Any, part: int, parts: int) -> Any:
    """Rows ``part`` of ``parts`` of every tensor in a (nested) batch.

    Raises:
        UserError: the batch has fewer rows than there are parts.
    """
    if isinstance(batch, Tensor):
        if len(batch) < parts:
            raise UserError(f"a batch of {len(batch)} rows cannot be split in {parts}: raise the batch size")
        return batch.tensor_split(parts)[part]
    if isinstance(batch, dict):
        return {key: my_rows(value, part, parts) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(my_rows(value, part, parts) for value in batch)
    return batch


def move(batch: Any, device: torch.device) -> Any:
    """The (nested) batch with its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(move(value, device) for value in batch)
    return batch


def rows_of(batch: Any) -> int:
    """Number of rows of a (nested) batch."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return len(batch)


def of_leader(value: T) -> T:
    """What the first process says, on all of them: a value that each would choose differently, such as the time."""
    if world()[1] == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]


def sum_over_processes(value: float, device: torch.device) -> float:
    """Sum of a number over all processes."""
    if world()[1] == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process; all of them get the same answer."""
    return sum_over_processes(float(flag), device) > 0
