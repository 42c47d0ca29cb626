"""The one training loop: everything that learns by gradient steps on batches learns here."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from canon.core import device as devices
from canon.core.errors import UserError
from canon.core.hub.tensors import WEIGHTS_FILE, save_tensors
from canon.core.lab.run import Run
from canon.core.training import averaging, distributed
from canon.core.training.checkpoint import checkpoints, full_weights, load_checkpoint, save_checkpoint
from canon.core.training.meter import Meter
from canon.core.training.optimizers import Schedule, learning_rate_at, optimizers
from canon.core.training.signals import stop_signals

M = TypeVar("M", bound=nn.Module)
_SHOWN = ("loss", "validation_loss", "fixed_loss", "tokens_per_second", "examples_per_second", "utilisation")


@dataclass(frozen=True)
class TrainingConfig:
    """How a model learns."""

    steps: int = 1000
    """Optimiser steps in all."""
    batch_size: int = 32
    """Examples a step, over all processes and accumulation parts."""
    accumulation: int = 1
    """Parts a process's share of the batch is computed in, to save memory."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """What the learning rate does after warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    optimizer: Literal["adamw", "adam", "muon"] = "adamw"
    """See canon.core.training.optimizers."""
    beta1: float = 0.9
    """Decay of the gradient's mean."""
    beta2: float = 0.95
    """Decay of the gradient's square."""
    eps: float = 1e-8
    """Added to the root of the gradient's square."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is then what is evaluated and exported; 0 keeps none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs matrix products in bfloat16; auto does so where the hardware gains."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles long runs on CUDA, where it pays."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work; auto shards from half a billion parameters on."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    evaluate_every: int = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    checkpoint_every: float = 60.0
    """Seconds between two checkpoints; 0 writes one after every step."""
    seed: int = 0
    """Seeds weights, data order and dropout."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "learning_rate", "log_every"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be greater than 0, not {getattr(self, name)}")
        for name, limit in (("warmup_steps", math.inf), ("clip_norm", math.inf), ("ema_decay", 1), ("seed", 2**32)):
            if not 0 <= getattr(self, name) < limit:
                raise UserError(f"{name} must be at least 0 and less than {limit}, not {getattr(self, name)}")
        if self.accumulation > self.batch_size:
            raise UserError(f"a batch of {self.batch_size} cannot be computed in {self.accumulation} parts")


@runtime_checkable
class Batches(Protocol):
    """A source of global batches whose position can be saved."""

    def __next__(self) -> Any:
        """The next batch: a tensor or a nested dict or tuple of tensors, rows first."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        ...


class Interrupted(Exception):
    """Training was asked to stop and did so cleanly; the run can be resumed."""


class Diverged(UserError):
    """The loss or the gradient stopped being finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class _Loss(nn.Module):
    """The model as a function from batch to loss, the form in which DDP and FSDP see its forward pass."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.model.loss(batch)


def fit(
    model: M,
    batches: Batches,
    run: Run,
    config: TrainingConfig,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> M:
    """Train ``model`` for ``config.steps`` steps, or go on with a run that was stopped, exactly where it was.

    The randomness of a step is a function of (seed, step, process) and the position of ``batches`` is part of every
    checkpoint, so a resumed run ends with the weights of an uninterrupted one, bit for bit on the same machine.

    Args:
        model: has ``loss(batch) -> (scalar loss, metrics)``. If the loss is a mean over a number of tokens that varies
            from batch to batch, ``metrics["tokens"]`` gives that number, and parts of a batch are weighted by it.
        batches: yields global batches; every process takes its own rows.
        run: receives metrics, checkpoints (``checkpoint/``) and the trained weights (``model/``).
        config: how.
        evaluate: called with the model in evaluation mode; its numbers are logged under their own names.

    Returns:
        The model, in evaluation mode, with the averaged weights if ``ema_decay`` is set.

    Raises:
        Diverged: the loss is no longer finite; names the step and the last good checkpoint.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written first.
        UserError: a checkpoint is damaged or of another model, or the disk is full.
    """
    rank, processes = distributed.world()
    device = devices.pick_device()
    dtype = devices.compute_dtype(device, config.precision)
    model.to(device).train()
    wrapped = distributed.distribute(_Loss(model), device, config.parallel)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda" and config.steps >= 1000):
        wrapped.compile()
    optims = optimizers(model, config)
    average = {key: p.detach().clone() for key, p in model.state_dict().items()} if config.ema_decay else {}
    folder = run.path / "checkpoint"
    start = 0
    if saved := checkpoints(folder):
        start, state = load_checkpoint(saved[-1], model, optims, {"average": average})
        batches.load_state_dict(state["batches"])
    run.truncate_after(start if saved else -1)
    run.environment(device=str(device), precision=str(dtype), threads=torch.get_num_threads(), processes=processes)

    meter = Meter(device, dtype, processes)
    first_bad = torch.full((), -1, device=device)  # stays on the device: asking at every step would stall a GPU
    last_save = time.monotonic()
    with stop_signals() as stop, run.progress(config.steps, "training", start) as progress:
        for step in range(start, config.steps):
            seed = (config.seed * 1_000_003 + step) * 1_009 + rank
            _seed(seed, device)
            batch = next(batches)
            batch = distributed.move(distributed.my_rows(batch, rank, processes) if processes > 1 else batch, device)
            parts = min(config.accumulation, distributed.rows_of(batch))
            if step == start:
                meter.measure(model, distributed.my_rows(batch, 0, parts))
                _seed(seed, device)
            loss, metrics = _backward(wrapped, batch, parts, dtype, device)
            meter.count(batch, metrics)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
            first_bad = torch.where((first_bad < 0) & ~(loss.isfinite() & norm.isfinite()), step, first_bad)
            rate = learning_rate_at(
                step,
                peak=config.learning_rate,
                schedule=config.schedule,
                warmup_steps=config.warmup_steps,
                steps=config.steps,
                final_fraction=config.final_fraction,
            )
            for optimizer in optims:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            if average:
                averaging.update(average, model.state_dict(), config.ema_decay)

            done = step + 1
            last = done == config.steps
            logging = last or done % config.log_every == 0
            evaluating = evaluate and (last or (config.evaluate_every and done % config.evaluate_every == 0))
            saving = last or stop.is_set() or time.monotonic() - last_save >= config.checkpoint_every
            if processes > 1:  # all processes must stop and save together, so they agree at the logged steps
                saving = logging and distributed.any_process(saving, device)
            if not (logging or evaluating or saving):
                continue
            if first_bad >= 0:
                raise _diverged(int(first_bad), config, checkpoints(folder))
            numbers = meter.read(loss, metrics, learning_rate=rate, gradient_norm=float(norm)) if logging else {}
            with meter.paused():
                if evaluating:
                    numbers |= _evaluated(model, average, evaluate, dtype, device)
                if numbers:
                    run.log(done, **numbers)
                    progress.update(done, **{key: value for key, value in numbers.items() if key in _SHOWN})
                if saving:
                    state = {"average": average, "batches": batches.state_dict()}
                    save_checkpoint(folder, done, model, optims, state)
                    last_save = time.monotonic()
            if saving and not last and distributed.any_process(stop.is_set(), device):
                _export(model, average, run.path / "model")
                raise Interrupted(f"stopped after step {done} of {config.steps}; everything is saved")
    _export(model, average, run.path / "model")
    if average:
        model.load_state_dict(average)
    return model.eval()


def _backward(
    wrapped: nn.Module, batch: Any, parts: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    """Gradients of the mean loss over the whole batch of all processes; returns this process's loss and metrics.

    Parts of a batch, and processes, may hold different numbers of tokens. So each part adds the gradient of its sum,
    and the total is divided by the number of tokens (of rows where the model does not count tokens) at the end.
    """
    processes = distributed.world()[1]
    loss_sum, total, metrics = torch.zeros((), device=device), 0.0, {}
    for part in range(parts):
        rows = distributed.my_rows(batch, part, parts) if parts > 1 else batch
        with distributed.synchronise_gradients(wrapped, part == parts - 1):
            with devices.autocast(device, dtype):
                loss, metrics = wrapped(rows)
            weight = float(metrics.get("tokens", distributed.rows_of(rows)))
            (loss if parts * processes == 1 else loss * weight).backward()
        loss_sum, total = loss_sum + loss.detach() * weight, total + weight
    if parts * processes > 1:
        scale = processes / distributed.sum_over_processes(total, device)  # DDP and FSDP have divided by processes
        for p in wrapped.parameters():
            if p.grad is not None:
                p.grad.mul_(scale)
    return loss_sum / total, metrics | {"tokens": total} if "tokens" in metrics else metrics


def _seed(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also asks every absent GPU: 2 ms a step
    if device.type != "cpu":
        torch.manual_seed(seed)


def _evaluated(
    model: nn.Module,
    average: dict[str, Tensor],
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    model.eval()
    with torch.no_grad(), averaging.using(model, average), devices.autocast(device, dtype):
        numbers = evaluate(model) if evaluate else {}
    model.train()
    return numbers


def _export(model: nn.Module, average: dict[str, Tensor], folder: Path) -> None:
    """Write the weights where ``from_pretrained`` finds them."""
    with torch.no_grad(), averaging.using(model, average):
        weights = full_weights(model)  # the model's own tensors where nothing is sharded
        if distributed.world()[0] == 0:
            save_tensors(weights, folder / WEIGHTS_FILE)


def _diverged(step: int, config: TrainingConfig, saved: list[Path]) -> Diverged:
    kept = f"; {saved[-1].name} is the last good checkpoint" if saved else ""
    advice = f"lower the learning rate (now {config.learning_rate:g}) or lengthen the warm-up"
    return Diverged(f"the loss or its gradient is not finite at step {step + 1}{kept}: {advice}", step + 1)
