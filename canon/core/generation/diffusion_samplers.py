"""Diffusion samplers: from noise to a sample along a path of noise levels, one function for each algorithm.

Every sampler takes ``(denoise, x, path)`` and yields a :class:`State` after each step, whose ``x`` may be replaced
before the next one:

    picture = last(dpm_solver(denoise, noise, path))            # only the end
    strip = [state.x0 for state in ddim(denoise, noise, path)]  # every predicted picture
    picture = last(reinject(plms(denoise, noise, path), photo, mask, generator))  # inpainting

- ``denoise(x_t, level)``: the predicted x (batch, ...), see :func:`canon.core.generation.diffusion.denoiser`.
- ``x`` (batch, ...): at the level ``path[0]``, of any floating type and device; standard normal if that is pure noise.
- ``path``: n + 1 levels for n steps, see :func:`canon.core.generation.diffusion.path`.
- ``generator``: random numbers are drawn on its device, so that the same ones serve every device.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from canon.core.errors import UserError
from canon.core.generation.diffusion import Levels, add_noise, eps_from_x0, x0_from_eps

Denoiser = Callable[[Tensor, Levels], Tensor]
"""From x_t (batch, ...) and its level, of shape (), to the predicted x (batch, ...)."""

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the last one, two, three and four slopes, newest first."""


@dataclass
class State:
    """Where a sampler stands after a step."""

    level: Levels
    """Of ``x``, of shape ()."""
    x: Float[Tensor, "*shape"]
    """The state itself. Put another in its place, and the sampler goes on from there."""
    x0: Float[Tensor, "*shape"]
    """The picture predicted from the state before this step, with which the step was made."""


def last(states: Iterable[State]) -> Float[Tensor, "*shape"]:
    """Run a sampler to its end, keeping nothing else.

    Raises:
        UserError: its path has no step.
    """
    final = deque(states, maxlen=1)
    if not final:
        raise UserError("the path has no step: sample with at least 1")
    return final[0].x


def ddpm(
    denoise: Denoiser,
    x: Float[Tensor, "*shape"],
    path: Levels,
    v: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[State]:
    """Ancestral sampling.

    ``v`` says where the log-variance lies between the posterior's (0, "fixed small") and beta's (1, "fixed large").

    Source: Ho et al. 2020, arXiv 2006.11239, Algorithm 2; v: Nichol and Dhariwal 2021, arXiv 2102.09672, Eq. 15.
    """
    for now, after in pairwise(path):
        x0 = denoise(x, now)
        # The step's own alpha_t = alphabar_t / alphabar_{t-1} and beta_t = 1 - alpha_t, of a step of any length
        alpha_t = (now.alpha / after.alpha) ** 2
        beta_t = 1 - alpha_t
        # Eq. 7: mu~ = sqrt(alphabar_{t-1}) beta_t / (1 - alphabar_t) x_0
        #            + sqrt(alpha_t) (1 - alphabar_{t-1}) / (1 - alphabar_t) x_t
        mean = (after.alpha * beta_t / now.sigma**2) * x0 + (alpha_t.sqrt() * (after.sigma / now.sigma) ** 2) * x
        # Eq. 7: beta~_t = (1 - alphabar_{t-1}) / (1 - alphabar_t) beta_t
        posterior = (after.sigma / now.sigma) ** 2 * beta_t
        # Algorithm 2, lines 3 and 4: no noise in the last step; Eq. 15: exp(v log beta_t + (1 - v) log beta~_t)
        if after.sigma > 0:
            mean = mean + (beta_t**v * posterior ** (1 - v)).sqrt() * _normal(x, generator)
        x = yield from _step(after, mean, x0)


def ddim(
    denoise: Denoiser,
    x: Float[Tensor, "*shape"],
    path: Levels,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[State]:
    """Denoising diffusion implicit model: deterministic for eta = 0, ancestral sampling for eta = 1.

    Source: Song et al. 2021, arXiv 2010.02502, Eqs. 12 and 16.
    """
    for now, after in pairwise(path):
        x0 = denoise(x, now)
        eps = eps_from_x0(x, x0, now)
        # Eq. 16: sigma_t = eta sqrt((1 - alphabar_{t-1}) / (1 - alphabar_t)) sqrt(1 - alphabar_t / alphabar_{t-1})
        deviation = eta * after.sigma / now.sigma * (1 - (now.alpha / after.alpha) ** 2).sqrt()
        # Eq. 12: x_{t-1} = sqrt(alphabar_{t-1}) x_0 + sqrt(1 - alphabar_{t-1} - sigma_t^2) eps + sigma_t z
        following = after.alpha * x0 + (after.sigma**2 - deviation**2).clamp(min=0).sqrt() * eps
        if deviation > 0:
            following = following + deviation * _normal(x, generator)
        x = yield from _step(after, following, x0)


def plms(denoise: Denoiser, x: Float[Tensor, "*shape"], path: Levels) -> Iterator[State]:
    """Pseudo linear multi-step: DDIM steps along a fourth-order extrapolation of eps; one evaluation more than steps.

    Source: Liu et al. 2022 (PNDM), arXiv 2202.09778, Eqs. 11 and 12, begun as Stable Diffusion's sampler begins it: a
    pseudo improved Euler step, then lower orders, in place of the paper's three Runge-Kutta steps.
    """
    past: deque[Tensor] = deque(maxlen=4)
    for now, after in pairwise(path):
        x0 = denoise(x, now)
        past.appendleft(eps_from_x0(x, x0, now))
        if len(past) == 1 and after.sigma > 0:
            # eps' = (eps_t + eps_{t-1}) / 2, the second at the end of a trial step
            trial = _transfer(x, past[0], now, after)
            eps = (past[0] + eps_from_x0(trial, denoise(trial, after), after)) / 2
        else:
            # Eq. 12: eps' = (55 eps_t - 59 eps_{t+1} + 37 eps_{t+2} - 9 eps_{t+3}) / 24
            eps = torch.stack([w * e for w, e in zip(ADAMS_BASHFORTH[len(past) - 1], past)]).sum(0)
        x = yield from _step(after, _transfer(x, eps, now, after), x0)


def dpm_solver(denoise: Denoiser, x: Float[Tensor, "*shape"], path: Levels) -> Iterator[State]:
    """DPM-Solver++(2M): second order with one evaluation a step.

    The last step is of first order where it ends without noise, and in paths of fewer than 15 steps, as the authors'
    code does it for stability.

    Source: Lu et al. 2022, arXiv 2211.01095, Algorithm 2.
    """
    steps = len(path) - 1
    x0_before = h_before = None
    for i, (now, after) in enumerate(pairwise(path)):
        x0 = denoise(x, now)
        final = i == steps - 1 and (after.sigma == 0 or steps < 15)
        # h_i = lambda_i - lambda_{i-1}, lambda = log(alpha / sigma)
        h = (after.alpha / after.sigma).log() - (now.alpha / now.sigma).log()
        if x0_before is None or h_before is None or final:
            D = x0
        else:
            # r_i = h_{i-1} / h_i;  D_i = (1 + 1 / (2 r_i)) x0_{i-1} - 1 / (2 r_i) x0_{i-2}
            r = h_before / h
            D = x0 + (x0 - x0_before) / (2 * r)
        # x_i = sigma_i / sigma_{i-1} x_{i-1} - alpha_i (e^{-h_i} - 1) D_i
        following = (after.sigma / now.sigma) * x - (after.alpha * torch.expm1(-h)) * D
        x0_before, h_before = x0, h
        x = yield from _step(after, following, x0)


def heun(denoise: Denoiser, x: Float[Tensor, "*shape"], path: Levels) -> Iterator[State]:
    """Heun's method on the probability-flow ODE: second order with two evaluations a step (one in a last, clean one).

    Source: Karras et al. 2022, arXiv 2206.00364, Algorithm 1 with sigma(t) = t and s(t) = 1, which is Algorithm 2
    without churn; their x and sigma are our x / alpha and sigma / alpha.
    """
    for now, after in pairwise(path):
        x0 = denoise(x, now)
        start, t, t_after = x / now.alpha, now.sigma / now.alpha, after.sigma / after.alpha
        # Line 4: d_i = (x_i - D(x_i; t_i)) / t_i
        slope = (start - x0) / t
        # Line 5: x_{i+1} = x_i + (t_{i+1} - t_i) d_i
        end = start + (t_after - t) * slope
        if t_after > 0:
            # Line 7: d'_i = (x_{i+1} - D(x_{i+1}; t_{i+1})) / t_{i+1}
            slope_after = (end - denoise(after.alpha * end, after)) / t_after
            # Line 8: x_{i+1} = x_i + (t_{i+1} - t_i) (d_i / 2 + d'_i / 2)
            end = start + (t_after - t) * (slope + slope_after) / 2
        x = yield from _step(after, after.alpha * end, x0)


def reinject(
    states: Iterable[State],
    known: Float[Tensor, "*shape"],
    keep: Float[Tensor, "*mask"],
    generator: torch.Generator | None = None,
) -> Iterator[State]:
    """Inpainting with any sampler: after each step, what is known is put back, as noisy as the rest.

    Where the path ends without noise, the known part ends up exactly as given.

    Args:
        states: of a sampler.
        known: the picture; anything where it is not known.
        keep: 1 where it is known, 0 where it is to be painted; broadcast to the picture.
        generator: of the noise on the known part.

    Source: Rombach et al. 2022, arXiv 2112.10752 (the released sampler); Lugmayr et al. 2022 (RePaint),
    arXiv 2201.09865, Eq. 8.
    """
    for state in states:
        # Eq. 8a: x_known ~ q(x_t | x_0);  Eq. 8c: x = m x_known + (1 - m) x_unknown
        noisy = add_noise(known, _normal(known, generator), state.level)
        state.x = torch.where(keep == 1, noisy, keep * noisy + (1 - keep) * state.x)
        yield state


def _step(level: Levels, x: Tensor, x0: Tensor) -> Generator[State, None, Tensor]:
    """Show a state, and return what the sampler is to go on with."""
    state = State(level, x, x0)
    yield state
    return state.x


def _transfer(x: Tensor, eps: Tensor, now: Levels, after: Levels) -> Tensor:
    """Move to another level, keeping the noise."""
    # PNDM, Eq. 11, which is DDIM's Eq. 12 with sigma_t = 0
    return after.alpha * x0_from_eps(x, eps, now) + after.sigma * eps


def _normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
