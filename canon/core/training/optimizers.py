"""Optimisers and learning-rate schedules by name."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from canon.core.training.fit import TrainingConfig

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


def optimizers(model: nn.Module, config: "TrainingConfig") -> list[Optimizer]:
    """The optimisers that together update every trainable parameter once.

    - ``adamw`` (Loshchilov and Hutter 2019, arXiv 1711.05101): decoupled decay on matrices; none on gains and biases.
    - ``adam`` (Kingma and Ba 2015, arXiv 1412.6980): no decay at all.
    - ``muon``: hidden matrices and kernels of convolutions by :class:`Muon`, scaled so that one learning rate serves
      both; embeddings, the first and the last layer, gains and biases stay with AdamW.
    """
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    hidden = _hidden_matrices(model) & set(trainable) if config.optimizer == "muon" else set()
    rest = {key: p for key, p in trainable.items() if key not in hidden}
    decay = 0.0 if config.optimizer == "adam" else config.weight_decay
    groups = [
        {"params": [p for p in rest.values() if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in rest.values())
    built: list[Optimizer] = []
    if groups:
        betas = (config.beta1, config.beta2)
        built.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=fused))
    if hidden:
        matrices = [p for key, p in trainable.items() if key in hidden]
        built.append(Muon(matrices, lr=config.learning_rate, momentum=config.beta1, weight_decay=config.weight_decay))
    return built


def _hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices and kernels that are neither an embedding nor the first or last layer.

    The last layer is a linear one named head, or a convolution to few channels; the first a convolution of few. Layers
    in and out of a wide code count as hidden.
    """
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding) or prefix.split(".")[-1] == "head":
            continue
        for key, p in module.named_parameters(recurse=False):
            if p.dim() == 2 or (p.dim() == 4 and min(p.shape[:2]) >= FEWEST_CHANNELS):
                names.add(f"{prefix}.{key}".lstrip("."))
    return names


FEWEST_CHANNELS = 16  # a convolution of or to fewer reads or makes pixels, latents or a mask


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal before each step (Jordan 2024, https://kellerjordan.github.io/posts/muon).

    A kernel of a convolution is the matrix (out_channels, in_channels * height * width), which PyTorch's own Muon
    leaves out; on matrices the two take the same steps.

    Args:
        params: matrices and kernels.
        lr: learning rate, on the scale of AdamW's (Liu et al. 2025, arXiv 2502.16982, Eq. 4).
        momentum: of Nesterov's kind.
        weight_decay: decoupled.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have gradients."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                # B_t = mu B_{t-1} + G_t, here as an average; O_t = NewtonSchulz5(B_t)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalised(p.grad.lerp(buffer, momentum).flatten(1))
                p.mul_(1 - lr * group["weight_decay"])
                # Eq. 4 of Liu et al.: W_t = W_{t-1} - eta (0.2 sqrt(max(A, B)) O_t + lambda W_{t-1})
                p.add_(update.view_as(p), alpha=-lr * (0.2 * math.sqrt(max(update.shape))))


def orthogonalised(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Roughly U V^T of the matrix's U S V^T, in bfloat16: singular values come to between 0.7 and 1.2.

    Source: Jordan 2024, "NewtonSchulz5".
    """
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        # X <- a X + b (X X^T) X + c (X X^T)^2 X
        a = x @ x.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, b, x, beta=3.4445)
    return x.T if tall else x
