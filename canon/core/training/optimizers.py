"""Optimisers and learning-rate schedules by name, built from plain numbers."""

import math
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

Schedule = Literal["cosine", "linear", "constant", "inverse_sqrt"]


def learning_rate_at(
    step: int, *, peak: float, schedule: Schedule, warmup_steps: int, steps: int, final_fraction: float
) -> float:
    """Learning rate of optimiser step ``step`` (from 0).

    All schedules rise linearly to ``peak`` over ``warmup_steps``. Then ``cosine`` (Loshchilov and Hutter 2017,
    arXiv 1608.03983, eq. 5) and ``linear`` fall to ``final_fraction * peak`` at the last step, ``constant`` stays,
    and ``inverse_sqrt`` falls as 1/sqrt(step) (Vaswani et al. 2017, eq. 3, whose peak is d_model^-0.5 warmup^-0.5).
    """
    done = step + 1
    if done <= warmup_steps:
        return peak * done / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup_steps) / done)
    progress = min(1.0, (done - warmup_steps) / max(1, steps - warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return peak * (final_fraction + (1 - final_fraction) * fall)


def optimizers(
    model: nn.Module,
    name: Literal["adamw", "adam", "muon"],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> list[Optimizer]:
    """The optimisers that together update every trainable parameter once.

    - ``adamw`` (Loshchilov and Hutter 2019, arXiv 1711.05101): decoupled decay on matrices; none on gains and biases.
    - ``adam`` (Kingma and Ba 2015, arXiv 1412.6980): no decay at all.
    - ``muon`` (Jordan 2024): hidden matrices move along their orthogonalised momentum, scaled to AdamW's step size
      (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that one learning rate serves both; embeddings, the output head,
      gains and biases stay with AdamW.
    """
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    hidden = _hidden_matrices(model) & set(trainable) if name == "muon" else set()
    rest = {key: p for key, p in trainable.items() if key not in hidden}
    decay = 0.0 if name == "adam" else weight_decay
    groups = [
        {"params": [p for p in rest.values() if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in rest.values())
    built: list[Optimizer] = []
    if groups:
        built.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused))
    if hidden:
        matrices = [p for key, p in trainable.items() if key in hidden]
        built.append(
            torch.optim.Muon(
                matrices,
                lr=learning_rate,
                weight_decay=weight_decay,
                momentum=betas[0],
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return built


def _hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the 2-D parameters that are neither an embedding nor the output head (a linear layer named head)."""
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding) or prefix.split(".")[-1] == "head":
            continue
        names |= {f"{prefix}.{key}".lstrip(".") for key, p in module.named_parameters(recurse=False) if p.dim() == 2}
    return names
