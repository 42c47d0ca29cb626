"""What diffusion systems share: noise schedules, what the model predicts, its loss, guidance and thresholding.

A noise level is data, ``Levels(t, alpha, sigma)``: x_t = alpha x + sigma eps, and t is what the model is told. A table
of a thousand, the levels of a batch and the path of a sampler are all Levels. The rest is functions put together:

    table = from_betas(scaled_linear_betas())
    steps = path(table[leading(50, 1000, offset=1)], end=table[0])
    denoise = denoiser(guided(unet, prompt, empty, 7.5), EPS)
    picture = last(ddim(denoise, noise, steps))  # canon.core.generation.diffusion_samplers
    picture = last(ddim(denoise, add_noise(photo, noise, tail(steps, 0.6)[0]), tail(steps, 0.6)))  # from a picture

All processes here preserve variance: alpha^2 + sigma^2 = 1.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from canon.core.errors import UserError
from canon.core.nn.layers import Prepared, prepared_weights

Model = Callable[[Tensor, Tensor], Tensor]
"""From x_t (batch, ...) and t (batch,) to a prediction shaped like x_t."""
Weight = Callable[[Tensor], Tensor]
"""From the signal-to-noise ratio alpha^2 / sigma^2 to the weight of the squared error of x."""


@dataclass(frozen=True)
class Levels:
    """Noise levels x_t = alpha x + sigma eps: one (shape ``()``), one of each row (``batch``), or a path (``steps``).

    Paths stay on the CPU in float64: single numbers of theirs multiply tensors of any device and type, and a sampler
    can look at them without waiting for the device.
    """

    t: Float[Tensor, "*levels"]
    """What the model is told: the index of a discrete schedule, or continuous time in [0, 1]."""
    alpha: Float[Tensor, "*levels"]
    """How much of x is left."""
    sigma: Float[Tensor, "*levels"]
    """Standard deviation of the noise."""

    def __getitem__(self, index: int | slice | Tensor) -> "Levels":
        return Levels(self.t[index], self.alpha[index], self.sigma[index])

    def __iter__(self) -> Iterator["Levels"]:
        return map(Levels, self.t, self.alpha, self.sigma)

    def __len__(self) -> int:
        return len(self.t)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Levels":
        """A copy on a device, for a table that random indices of a batch are drawn from there."""
        return Levels(*(field.to(device, dtype) for field in (self.t, self.alpha, self.sigma)))

    @property
    def snr(self) -> Float[Tensor, "*levels"]:
        """Signal-to-noise ratio (Kingma et al. 2021, arXiv 2107.00630, Eq. 2)."""
        return self.alpha**2 / self.sigma**2


CLEAN = Levels(*torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
"""No noise at all: where a path usually ends."""


# ------------------------------------------------------------------------------------------------------ schedules


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Float[Tensor, " steps"]:
    """Variances of the single steps, rising linearly. Source: Ho et al. 2020, arXiv 2006.11239, section 4."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Float[Tensor, " steps"]:
    """Variances whose square roots rise linearly. Source: the released configurations of Stable Diffusion v1."""
    return linear_betas(steps, first**0.5, last**0.5) ** 2


def cosine_betas(steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> Float[Tensor, " steps"]:
    """Variances whose cumulative product falls as a squared cosine.

    Source: Nichol and Dhariwal 2021, arXiv 2102.09672, Eq. 17 and the clipping below it.
    """
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    # Eq. 17: alphabar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2)
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    # beta_t = 1 - alphabar_t / alphabar_{t-1}
    return (1 - f[1:] / f[:-1]).clamp(max=largest)


def from_betas(betas: Float[Tensor, " steps"]) -> Levels:
    """The table of a discrete schedule: level t (from 0) has seen the noise of steps 0 to t. Source: DDPM, Eq. 4."""
    # Eq. 4: alphabar_t = prod_s (1 - beta_s); alpha = sqrt(alphabar), sigma = sqrt(1 - alphabar)
    alpha_bar = (1 - betas).cumprod(0)
    return Levels(torch.arange(len(betas), dtype=betas.dtype), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def from_log_snr(t: Float[Tensor, "*levels"], log_snr: Float[Tensor, "*levels"]) -> Levels:
    """Levels of a continuous schedule, from log(alpha^2 / sigma^2). Source: Kingma et al. 2021, Eqs. 3 and 4."""
    # sigma^2 = sigmoid(-lambda), alpha^2 = sigmoid(lambda)
    return Levels(t, log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())


def cosine(t: Float[Tensor, "*levels"], lowest: float = -20.0, highest: float = 20.0) -> Levels:
    """Cosine schedule in continuous time, between two log-SNRs: Imagen's, and that of progressive distillation.

    Args:
        t: in [0, 1], from clean to noise; float64 for a path.
        lowest: log-SNR at t = 1.
        highest: log-SNR at t = 0.

    Source: Salimans and Ho 2022, arXiv 2202.00512 (alpha = cos(pi t / 2)); its bounded form is that of their code.
    """
    start, end = (math.atan(math.exp(-bound / 2)) for bound in (highest, lowest))
    # alpha = cos(u), sigma = sin(u), with the angle u from almost 0 to almost pi/2
    u = start + (end - start) * t
    return Levels(t, u.cos(), u.sin())


# -------------------------------------------------------------------------------------------- the path of a sampler


def leading(steps: int, total: int, offset: int = 0) -> Int[Tensor, " steps"]:
    """Indices offset + k floor(total / steps), falling: they miss the noisiest levels. Stable Diffusion: offset 1.

    Source of all three spacings: Lin et al. 2023, arXiv 2305.08891, Table 2.

    Raises:
        UserError: there are not as many levels.
    """
    _enough(steps, total - offset)
    return torch.arange(steps - 1, -1, -1) * (total // steps) + offset


def trailing(steps: int, total: int) -> Int[Tensor, " steps"]:
    """Indices total - 1, then down in steps of total / steps: they begin at the noisiest level. Errors: as above."""
    _enough(steps, total)
    return (total - torch.arange(steps, dtype=torch.float64) * total / steps).round().long() - 1


def linspace(steps: int, total: int) -> Int[Tensor, " steps"]:
    """Indices evenly from total - 1 down to 0, both included. Errors: as above."""
    _enough(steps, total)
    return torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0)


def karras(table: Levels, steps: int, rho: float = 7.0) -> Levels:
    """Levels between the noisiest and the cleanest of a table, dense where there is little noise.

    t falls between the table's where it must: for models that take any t.

    Source: Karras et al. 2022, arXiv 2206.00364, Eq. 5; their sigma is our sigma / alpha.
    """
    ratios = table.sigma / table.alpha
    # Eq. 5: sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    low, high = ratios[0] ** (1 / rho), ratios[-1] ** (1 / rho)
    ratio = (high + torch.linspace(0, 1, steps, dtype=ratios.dtype) * (low - high)) ** rho
    t = torch.from_numpy(np.interp(ratio.log(), ratios.log(), table.t)).to(ratios)
    alpha = (1 + ratio**2).rsqrt()
    return Levels(t, alpha, ratio * alpha)


def path(levels: Levels, end: Levels = CLEAN) -> Levels:
    """The levels that a sampler visits, noisiest first, and the one it ends at: a step between each two.

    Args:
        levels: one or more, for example ``table[trailing(50, 1000)]`` or ``cosine(torch.linspace(1, 0, 51)[:-1])``.
        end: of shape (). The cleanest level of the table where the released sampler of a model stops there.

    Raises:
        ValueError: the noise grows on the way.
    """
    t, alpha, sigma = (
        torch.cat([many.double(), one.double()[None]])
        for many, one in zip((levels.t, levels.alpha, levels.sigma), (end.t, end.alpha, end.sigma))
    )
    if bool((sigma.diff() > 0).any()):
        raise ValueError("the levels of a path go from noise to clean")
    return Levels(t, alpha, sigma)


def tail(path: Levels, strength: float) -> Levels:
    """The last part of a path: image-to-image starts with a picture that has the noise of its first level.

    Args:
        path: of n steps.
        strength: in (0, 1]; the last floor(strength n) steps are kept.

    Raises:
        UserError: the strength is not in (0, 1], or no step is left.

    Source: Meng et al. 2022 (SDEdit), arXiv 2108.01073, Algorithm 1.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength must be above 0 and at most 1, not {strength}")
    steps = len(path) - 1
    kept = int(steps * strength)
    if kept < 1:
        raise UserError(f"strength {strength} leaves none of {steps} steps: at least {1 / steps:.3f} is needed")
    return path[steps - kept :]


# -------------------------------------------------------------------------------------------- what a model predicts


def add_noise(x: Float[Tensor, "*shape"], eps: Float[Tensor, "*shape"], level: Levels) -> Float[Tensor, "*shape"]:
    """Draw x_t given x and standard normal noise: (batch, ...). Source: Ho et al. 2020, Eq. 4."""
    # Eq. 4: x_t = sqrt(alphabar_t) x + sqrt(1 - alphabar_t) eps
    return _over(level.alpha, x) * x + _over(level.sigma, x) * eps


def x0_from_eps(x_t: Float[Tensor, "*shape"], eps: Float[Tensor, "*shape"], level: Levels) -> Float[Tensor, "*shape"]:
    """The x that this noise would make x_t of: (batch, ...). Source: Ho et al. 2020, Eq. 15."""
    # Eq. 15: x = (x_t - sqrt(1 - alphabar_t) eps) / sqrt(alphabar_t)
    return (x_t - _over(level.sigma, x_t) * eps) / _over(level.alpha, x_t)


def eps_from_x0(x_t: Float[Tensor, "*shape"], x0: Float[Tensor, "*shape"], level: Levels) -> Float[Tensor, "*shape"]:
    """The noise that would make x_t of this x: (batch, ...)."""
    return (x_t - _over(level.alpha, x_t) * x0) / _over(level.sigma, x_t)


def x0_from_v(x_t: Float[Tensor, "*shape"], v: Float[Tensor, "*shape"], level: Levels) -> Float[Tensor, "*shape"]:
    """The x of a predicted v: (batch, ...). Source: Salimans and Ho 2022, section 4."""
    # x = alpha x_t - sigma v
    return _over(level.alpha, x_t) * x_t - _over(level.sigma, x_t) * v


def v_target(x: Float[Tensor, "*shape"], eps: Float[Tensor, "*shape"], level: Levels) -> Float[Tensor, "*shape"]:
    """The direction in which x_t turns from x to eps: (batch, ...). Source: Salimans and Ho 2022, section 4."""
    # v = alpha eps - sigma x
    return _over(level.alpha, x) * eps - _over(level.sigma, x) * x


@dataclass(frozen=True)
class Parameterization:
    """What a model predicts, as three functions; :data:`EPS`, :data:`X0` and :data:`V`."""

    target: Callable[[Tensor, Tensor, Levels], Tensor]
    """What it learns, from x, eps and the level."""
    x0: Callable[[Tensor, Tensor, Levels], Tensor]
    """The x that this means, from x_t, the prediction and the level."""
    weight: Weight
    """The weight that a plain squared error of the prediction gives to the squared error of x."""


EPS = Parameterization(lambda x, eps, level: eps, x0_from_eps, lambda snr: snr)
X0 = Parameterization(lambda x, eps, level: x, lambda x_t, x0, level: x0, torch.ones_like)
V = Parameterization(v_target, x0_from_v, lambda snr: snr + 1)


# ------------------------------------------------------------------------------------------------------------ loss


def truncated_snr(snr: Float[Tensor, "*levels"]) -> Float[Tensor, "*levels"]:
    """max(SNR, 1): never forget the noisy end. Source: Salimans and Ho 2022, section 4."""
    return snr.clamp(min=1)


def min_snr(snr: Float[Tensor, "*levels"], gamma: float = 5.0) -> Float[Tensor, "*levels"]:
    """min(SNR, gamma): do not dwell on the clean end. Source: Hang et al. 2023, arXiv 2303.09556, section 3.4."""
    return snr.clamp(max=gamma)


def loss(
    model: Model,
    x: Float[Tensor, "*shape"],
    eps: Float[Tensor, "*shape"],
    level: Levels,
    predicts: Parameterization,
    weight: Weight | None = None,
) -> Float[Tensor, " batch"]:
    """Denoising loss of each row, a mean over its elements.

    Args:
        model: called once, with x_t and t.
        x: clean.
        eps: standard normal.
        level: one of each row, for example ``table[indices]`` or ``cosine(torch.rand(batch))``.
        predicts: what the model is to predict.
        weight: of the squared error of x, as the papers state it (:func:`min_snr` ...). None: the plain squared error
            of the prediction, which for EPS is the weight SNR (DDPM's L_simple) and for V is SNR + 1.

    Source: Ho et al. 2020, Eq. 14 and Algorithm 1.
    """
    target = predicts.target(x, eps, level)
    prediction = model(add_noise(x, eps, level), _times(level, x)).to(target.dtype)
    # Eq. 14: || eps - eps_theta(sqrt(alphabar) x + sqrt(1 - alphabar) eps, t) ||^2
    errors = ((prediction - target) ** 2).flatten(1).mean(1)
    return errors if weight is None else errors * (weight(level.snr) / predicts.weight(level.snr)).to(errors)


# ------------------------------------------------------------------------------------------- guidance and denoising


def check_sampling(steps: int, guidance: float, seed: int) -> None:
    """Say what is wrong with the numbers of a sample, before anything is drawn.

    Raises:
        UserError: there is no step, the guidance is not finite, or the seed is below 0 or has more than 32 bits, of
            which PyTorch keeps no more on the CPU.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    if not math.isfinite(guidance):
        raise UserError(f"guidance must be a finite number, not {guidance}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be at least 0 and below 2^32, not {seed}")


def guide(
    conditional: Float[Tensor, "*shape"], unconditional: Float[Tensor, "*shape"], weight: float
) -> Float[Tensor, "*shape"]:
    """Classifier-free guidance: 1 is none, 0 is unconditional. The same whether eps, x or v is predicted.

    Source: Ho and Salimans 2022, arXiv 2207.12598, Eq. 6, whose w is our weight - 1; Imagen, Eq. 2.
    """
    # eps~ = eps(z) + w (eps(z, c) - eps(z))
    return unconditional + weight * (conditional - unconditional)


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Num[Tensor, "*condition"],
    nothing: Num[Tensor, "*condition"],
    weight: float,
) -> Model:
    """A model of (x_t, t) from one of (x_t, t, condition): both predictions in one batch of twice the size.

    Args:
        model: trained with some of its conditions replaced by ``nothing``.
        condition: of each row.
        nothing: what stands for no condition, for each row.
        weight: of :func:`guide`.
    """
    both = torch.cat([condition, nothing])

    def guided_model(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return guide(conditional, unconditional, weight)

    return guided_model


def static_threshold(x0: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clip to [-1, 1]. Source: Saharia et al. 2022 (Imagen), arXiv 2205.11487, section 2.3."""
    return x0.clamp(-1, 1)


def dynamic_threshold(x0: Float[Tensor, "*shape"], fraction: float = 0.995) -> Float[Tensor, "*shape"]:
    """Clip each row to [-s, s] and divide by s: the quantile of its absolute values, at least 1.

    Source: Saharia et al. 2022 (Imagen), section 2.3.
    """
    s = torch.stack([row.abs().float().quantile(fraction) for row in x0.flatten(1)]).clamp(min=1)
    s = _over(s, x0)
    return x0.clamp(-s, s) / s


def denoiser(
    model: Model, predicts: Parameterization, threshold: Callable[[Tensor], Tensor] = lambda x0: x0
) -> Callable[[Tensor, Levels], Tensor]:
    """What samplers ask for: the predicted x of x_t at one level, without gradients. They take eps from it.

    As long as it is used, the weights of the model stay as they are, and so does the text: both are prepared once.

    Args:
        model: gets t in float32 (float64 where x_t is).
        predicts: what the model was trained to predict.
        threshold: of the predicted x.
    """
    kept = Prepared()

    @torch.no_grad()
    def denoise(x_t: Tensor, level: Levels) -> Tensor:
        with prepared_weights(kept):
            predicted = model(x_t, _times(level, x_t)).to(x_t.dtype)
        return threshold(predicts.x0(x_t, predicted, level))

    return denoise


def _over(level: Tensor, x: Tensor) -> Tensor:
    """Numbers of each row, shaped to multiply x; a single number as it is."""
    return level if level.dim() == 0 else level.to(x).view(-1, *[1] * (x.dim() - 1))


def _times(level: Levels, x: Tensor) -> Tensor:
    """What the model is told of each row; half precision would confuse neighbouring t."""
    return level.t.to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(len(x))


def _enough(steps: int, total: int) -> None:
    if not 1 <= steps <= total:
        raise UserError(f"{steps} sampling steps are not possible: choose 1 to {total}")
