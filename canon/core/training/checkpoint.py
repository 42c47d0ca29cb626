"""Checkpoints: everything a run needs to go on exactly where it stopped.

A checkpoint is a folder ``step-00001200`` written by ``torch.distributed.checkpoint`` (so that it may be read by more
or fewer processes than wrote it), next to a manifest with the SHA-256 of every file. It is written under another name
and renamed when it is complete and on the disk: whatever kills the process, the newest complete one is whole.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from canon.core.errors import UserError, disk_errors
from canon.core.training.distributed import world

_MANIFEST = "manifest.json"
_KEEP = 2  # the newest checkpoint, and the one before it in case the newest is damaged


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizers: list[Optimizer], extra: dict[str, Any]
) -> None:
    """Write checkpoint ``step`` and remove all but the newest two.

    Args:
        folder: where the checkpoints of this training stage live.
        step: optimiser steps done.
        model: the model, possibly sharded.
        optimizers: its optimisers.
        extra: further state as nested dictionaries of tensors and plain JSON values (the data position, averages).

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    rank, processes = world()
    target, partial = folder / f"step-{step:08d}", folder / f"step-{step:08d}.partial"
    weights, state = get_state_dict(model, optimizers)
    tensors = {key: value for key, value in extra.items() if isinstance(value, dict) and _holds_tensors(value)}
    plain = {key: value for key, value in extra.items() if key not in tensors}
    with disk_errors(f"checkpoint {target}"):
        try:
            if rank == 0:
                for abandoned in folder.glob("*.partial"):  # by a process that was killed while it saved
                    shutil.rmtree(abandoned)
                partial.mkdir(parents=True)
            _barrier(processes)
            _quietly(dcp.save, {"model": weights, "optimizer": state, **tensors}, partial, no_dist=processes == 1)
            if rank == 0:
                manifest = {"step": step, "extra": plain, "files": _digests(partial)}
                (partial / _MANIFEST).write_text(json.dumps(manifest))
                for file in (*partial.iterdir(), partial):
                    _to_disk(file)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                _to_disk(folder)
                for old in checkpoints(folder)[:-_KEEP]:
                    shutil.rmtree(old)
        except BaseException as error:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if cause := _refusal(error):
                raise cause from error
            raise
    _barrier(processes)


def load_checkpoint(
    path: Path, model: nn.Module, optimizers: list[Optimizer], extra: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Read a checkpoint into ``model``, ``optimizers`` and the tensors of ``extra``, in place.

    Returns:
        The step, and the plain part of ``extra`` as it was saved.

    Raises:
        UserError: a file is missing or damaged, or the checkpoint belongs to a model of another shape.
    """
    manifest = _verified(path)
    weights, state = get_state_dict(model, optimizers)
    tensors = {key: value for key, value in extra.items() if isinstance(value, dict) and _holds_tensors(value)}
    state_dict = {"model": weights, "optimizer": state, **tensors}
    try:
        _quietly(dcp.load, state_dict, path, no_dist=world()[1] == 1)
    except (dcp.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} was written by another model or recipe: start a new run with --name") from error
    set_state_dict(model, optimizers, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optimizer"])
    return manifest["step"], manifest["extra"]


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-????????") if p.is_dir())


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU, gathered from all processes (empty except on the first of them)."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}


def set_full_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a model, possibly sharded, the weights that :func:`full_weights` gathered (the same on every process)."""
    for module in model.modules():
        if reshard := getattr(module, "reshard", None):  # FSDP2 leaves weights gathered after an evaluation
            reshard()
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))


def _refusal(error: BaseException | None) -> OSError | None:
    """What the operating system refused, such as more space, behind the errors of torch's writers."""
    if error is None or isinstance(error, OSError):
        return error
    behind = [error.__cause__, error.__context__]
    if isinstance(error, dcp.CheckpointException):
        behind += [failure[0] for failure in error.failures.values()]
    return next(filter(None, map(_refusal, behind)), None)


def _verified(path: Path) -> dict[str, Any]:
    earlier = [other for other in checkpoints(path.parent) if other < path]
    advice = f"delete that folder to resume from {earlier[-1].name}" if earlier else "delete that folder to start again"
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        expected = manifest["files"]
        if not {"step", "extra"} <= manifest.keys():
            raise KeyError("step")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} has no readable {_MANIFEST}: {advice}") from error
    for name, digest in expected.items():
        file = path / name
        if not file.is_file() or _sha256(file) != digest:
            raise UserError(f"checkpoint {path} is damaged ({name}): {advice}")
    return manifest


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in sorted(folder.iterdir())}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, dict) and any(map(_holds_tensors, value.values())))


def _barrier(processes: int) -> None:
    if processes > 1:
        dist.barrier()


def _quietly(function: Any, state: dict[str, Any], path: Path, no_dist: bool) -> None:
    # dcp warns on every call that a single process saves without a process group, which is what is wanted here
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(state, checkpoint_id=path, no_dist=no_dist)
