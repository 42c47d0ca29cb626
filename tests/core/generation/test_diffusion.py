import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch.testing import assert_close

from canon.core.errors import UserError
from canon.core.generation.diffusion import (
    CLEAN,
    EPS,
    X0,
    Levels,
    V,
    add_noise,
    cosine,
    cosine_betas,
    denoiser,
    dynamic_threshold,
    eps_from_x0,
    from_betas,
    from_log_snr,
    guide,
    guided,
    karras,
    leading,
    linear_betas,
    linspace,
    loss,
    min_snr,
    path,
    scaled_linear_betas,
    static_threshold,
    tail,
    trailing,
    truncated_snr,
    v_target,
    x0_from_eps,
    x0_from_v,
)
from canon.core.generation.diffusion_samplers import ddim, ddpm, dpm_solver, heun, last, plms, reinject

SCHEDULES = {
    "linear": (linear_betas, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        scaled_linear_betas,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (cosine_betas, {"beta_schedule": "squaredcos_cap_v2"}),
}
PREDICTIONS = {"epsilon": EPS, "v_prediction": V}
PARITY = {"atol": 1e-5, "rtol": 0}


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Mixture:
    """Data of a Gaussian mixture with spherical components: the best possible denoiser is known."""

    def __init__(self, means, deviations, weights):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.variances = torch.tensor(deviations, dtype=torch.float64) ** 2
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def denoise(self, x_t, level):
        """E[x | x_t], by Bayes."""
        z = x_t.flatten(1)[:, None]
        spread = (level.alpha**2 * self.variances + level.sigma**2)[:, None]
        off = z - level.alpha * self.means
        logs = self.weights.log() - 0.5 * (off**2 / spread + spread.log()).sum(-1)
        posterior = self.means + level.alpha * self.variances[:, None] / spread * off
        return (logs.softmax(-1)[..., None] * posterior).sum(1).view_as(x_t)

    def model(self, table, predicts):
        """The same as a network of (x_t, t); between the levels of the table, log(sigma / alpha) is linear in t."""
        log_ratio = (table.sigma / table.alpha).log()

        def predict(x_t, t):
            ratio = float(np.exp(np.interp(float(t.flatten()[0]), table.t, log_ratio)))
            alpha = torch.tensor(1 / math.sqrt(1 + ratio**2), dtype=torch.float64)
            level = Levels(t.flatten()[0].double(), alpha, ratio * alpha)
            x0 = self.denoise(x_t, level)
            return predicts.target(x0, eps_from_x0(x_t, x0, level), level)

        return predict

    def mean(self):
        return self.weights @ self.means

    def covariance(self):
        off = self.means - self.mean()
        within = self.weights @ self.variances * torch.eye(len(off[0]), dtype=torch.float64)
        return within + (self.weights[:, None] * off).T @ off


PLANE = Mixture([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], [0.3, 0.5, 0.2], [0.5, 0.3, 0.2])
PICTURES = Mixture(normal(3, 48, seed=7).clamp(-1, 1), [0.2, 0.3, 0.1], [0.5, 0.3, 0.2])  # of 3 x 4 x 4


# ------------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_and_levels_equal_diffusers(name):
    betas, config = SCHEDULES[name]
    theirs = DDPMScheduler(**config)
    assert_close(betas().float(), theirs.betas, atol=1e-7, rtol=1e-6)
    table = from_betas(betas())
    assert_close((table.alpha**2).float(), theirs.alphas_cumprod, atol=1e-6, rtol=0)
    assert_close(table.alpha**2 + table.sigma**2, torch.ones(1000, dtype=torch.float64))
    assert_close(table.snr, table.alpha**2 / table.sigma**2)


def test_published_ends_of_the_schedules():
    assert_close(
        from_betas(scaled_linear_betas()).alpha[-1] ** 2, torch.tensor(0.00466, dtype=torch.float64), atol=5e-6, rtol=0
    )
    assert float(cosine_betas()[-1]) == 0.999
    assert float(from_betas(linear_betas()).alpha[-1] ** 2) == pytest.approx(4.0e-5, rel=0.02)  # DDPM: almost noise


def test_continuous_cosine():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    levels = cosine(t)
    assert_close(levels.alpha, torch.cos(math.pi * t / 2), atol=1e-4, rtol=0)
    assert_close(levels.snr.log()[[0, -1]], torch.tensor([20.0, -20.0], dtype=torch.float64))
    again = from_log_snr(t, levels.snr.log())
    assert_close((again.alpha, again.sigma), (levels.alpha, levels.sigma))


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 1000])
def test_spacings_equal_diffusers(steps):
    for spacing in (leading, trailing, linspace):
        theirs: Any = DDIMScheduler.from_config({"timestep_spacing": spacing.__name__})
        theirs.set_timesteps(steps)
        mine = spacing(steps, 1000)
        if steps > 1 or spacing is not linspace:  # of a single step theirs is t = 0
            assert mine.tolist() == theirs.timesteps.tolist()
    assert leading(50, 1000, offset=1)[:2].tolist() == [981, 961]
    for bad in (0, 1001):
        with pytest.raises(UserError, match="1 to 1000"):
            trailing(bad, 1000)


def test_karras_levels_equal_diffusers():
    table = from_betas(scaled_linear_betas())
    theirs = HeunDiscreteScheduler(**SCHEDULES["scaled_linear"][1], use_karras_sigmas=True)
    theirs.set_timesteps(12)
    mine = karras(table, 12)
    assert_close((mine.sigma / mine.alpha).float(), theirs.sigmas[:-1][[0, *range(1, 23, 2)]], rtol=1e-5, atol=1e-5)
    assert_close(mine.t.float(), theirs.timesteps[[0, *range(1, 23, 2)]].float(), rtol=1e-4, atol=1e-3)


def test_a_path_goes_to_clean():
    table = from_betas(linear_betas())
    steps = path(table[trailing(4, 1000)])
    assert steps.t.tolist() == [999, 749, 499, 249, 0]
    assert (float(steps.alpha[-1]), float(steps.sigma[-1])) == (1, 0)
    assert path(table[leading(4, 1000)], end=table[0]).sigma[-1] == table.sigma[0]
    with pytest.raises(ValueError, match="noise to clean"):
        path(table[:5])


# ------------------------------------------------------------------------------------- parameterisations and losses


def test_conversions_are_inverse():
    x, eps = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=2)
    level = from_betas(cosine_betas())[torch.tensor([0, 10, 500, 990])]
    x_t, v = add_noise(x, eps, level), v_target(x, eps, level)
    assert_close(x0_from_eps(x_t, eps, level), x)
    assert_close(eps_from_x0(x_t, x, level), eps)
    assert_close(x0_from_v(x_t, v, level), x)
    theirs: Any = DDPMScheduler(**SCHEDULES["cosine"][1])
    assert_close(x_t, theirs.add_noise(x, eps, torch.tensor([0, 10, 500, 990])), **PARITY)
    assert_close(v, theirs.get_velocity(x, eps, torch.tensor([0, 10, 500, 990])), **PARITY)


def test_weights_are_those_of_the_papers():
    x, eps, wrong = normal(5, 6), normal(5, 6, seed=2), normal(5, 6, seed=3)
    level = from_betas(scaled_linear_betas())[torch.tensor([0, 100, 300, 600, 999])]
    snr = level.alpha**2 / (1 - level.alpha**2)
    five, one = torch.tensor(5.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    for predicts, weight, expected in (
        (EPS, None, torch.ones(5, dtype=torch.float64)),
        (V, None, torch.ones(5, dtype=torch.float64)),
        (X0, min_snr, torch.minimum(snr, five)),  # Hang et al., section 3.4: its three forms
        (EPS, min_snr, torch.minimum(snr, five) / snr),
        (V, min_snr, torch.minimum(snr, five) / (snr + 1)),
        (X0, truncated_snr, torch.maximum(snr, one)),  # Salimans and Ho, section 4
        (X0, EPS.weight, snr),
        (X0, V.weight, snr + 1),
    ):
        target = predicts.target(x, eps, level)
        expected = expected * ((wrong - target) ** 2).mean(1)
        assert_close(loss(lambda x_t, t: wrong, x, eps, level, predicts, weight), expected)


@pytest.mark.parametrize("weight", [EPS.weight, V.weight, min_snr, truncated_snr])
def test_a_weighted_loss_does_not_depend_on_what_is_predicted(weight):
    table = from_betas(scaled_linear_betas())
    x, eps = normal(1, 3, 4, 4), normal(1, 3, 4, 4, seed=2)
    for t in ([50], [900]):
        losses = [loss(PICTURES.model(table, p), x, eps, table[torch.tensor(t)], p, weight) for p in (EPS, X0, V)]
        assert_close(losses[1], losses[0])
        assert_close(losses[2], losses[0])


def test_the_loss_is_least_for_the_posterior_mean():
    x = PLANE.means[torch.multinomial(PLANE.weights, 4000, True)] + 0.3 * normal(4000, 2)
    best = Mixture(PLANE.means, [0.3] * 3, PLANE.weights.tolist())
    table, eps = from_betas(linear_betas()), normal(4000, 2, seed=2)
    level = table[torch.full((4000,), 300)]

    def mean_loss(scale):
        model = best.model(table, EPS)
        return float(loss(lambda x_t, t: scale * model(x_t, t), x, eps, level, EPS).mean())

    assert mean_loss(1.0) < min(mean_loss(0.9), mean_loss(1.1))


# --------------------------------------------------------------------------------------- guidance and thresholding


def test_guidance_by_hand():
    conditional, unconditional = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert guide(conditional, unconditional, 3.0).tolist() == [[3.0, -2.0]]
    assert guide(conditional, unconditional, 1.0).tolist() == conditional.tolist()


def test_guidance_is_the_same_for_every_parameterisation():
    table, x_t = from_betas(scaled_linear_betas()), normal(2, 3, 4, 4)
    other = Mixture(-PICTURES.means, [0.2] * 3, [0.2, 0.3, 0.5])
    guesses = []
    for predicts in (EPS, X0, V):
        models = PICTURES.model(table, predicts), other.model(table, predicts)

        def both(x, t, condition, models=models):
            rows = zip(x, t, condition)
            return torch.cat([models[int(c)](row[None], time[None]) for row, time, c in rows])

        conditions = torch.zeros(2), torch.ones(2)
        guesses.append(denoiser(guided(both, *conditions, 4.0), predicts)(x_t, table[400]))
    assert_close(guesses[0], guesses[2])
    assert_close(guesses[1], guesses[2])
    by_hand = 4 * PICTURES.denoise(x_t, table[400]) - 3 * other.denoise(x_t, table[400])
    assert_close(guesses[1], by_hand)


def test_thresholds_by_hand():
    x0 = torch.tensor([[-4.0, 0.0, 1.0, 2.0, 3.0], [0.1, -0.2, 0.3, 0.4, -0.5]])
    assert static_threshold(x0)[0].tolist() == [-1, 0, 1, 1, 1]
    # absolute values 0 1 2 3 4: the 75th percentile is 3; the second row is within [-1, 1] and stays
    expected = torch.tensor([[-1.0, 0.0, 1 / 3, 2 / 3, 1.0], [0.1, -0.2, 0.3, 0.4, -0.5]])
    assert_close(dynamic_threshold(x0, 0.75), expected)
    pictures = 3 * normal(2, 3, 4, 4)
    theirs = DDIMScheduler(thresholding=True, sample_max_value=100.0)._threshold_sample(pictures)
    assert_close(dynamic_threshold(pictures), theirs)
    assert dynamic_threshold(pictures.bfloat16()).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------- samplers against diffusers


def by_diffusers(scheduler, model, x, table, steps, **options):
    """Every state of diffusers' loop along a path, and the predicted x0 where the scheduler tells it.

    Its times and levels must be ours up to float32. Then it gets ours in float64: what float32 loses in 1 - alphabar
    and in x0 = (x - sigma eps) / alpha near pure noise would hide everything else.
    """
    alpha_bar = table.alpha**2
    assert_close(scheduler.alphas_cumprod, alpha_bar.float(), atol=1e-6, rtol=0)
    scheduler.alphas_cumprod = alpha_bar
    if getattr(scheduler, "final_alpha_cumprod", 1) != 1:
        scheduler.final_alpha_cumprod = alpha_bar[0]
    scheduler.set_timesteps(len(steps) - 1)
    own = [t for i, t in enumerate(scheduler.timesteps.tolist()) if t not in scheduler.timesteps[:i]]
    np.testing.assert_allclose(own, steps.t[:-1], atol=2e-3)
    if hasattr(scheduler, "sigmas"):
        ratios = steps.sigma / steps.alpha
        if scheduler.order == 2:
            ratios = torch.cat([ratios[:1], ratios[1:-1].repeat_interleave(2), ratios[-1:]])
        assert_close(scheduler.sigmas, ratios.float(), rtol=1e-4, atol=1e-5)
        scheduler.sigmas = ratios
    if scheduler.order == 2:
        scheduler.timesteps = torch.cat([steps.t[:1], steps.t[1:-1].repeat_interleave(2)])
    for t in scheduler.timesteps:
        done = scheduler.step(model(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x, **options)
        x = done.prev_sample
        yield x.double(), getattr(done, "pred_original_sample", None)


@pytest.fixture(params=[(s, p) for s in SCHEDULES for p in PREDICTIONS], ids="-".join)
def setting(request):
    name, prediction = request.param
    betas, config = SCHEDULES[name]
    table, predicts = from_betas(betas()), PREDICTIONS[prediction]
    return table, {**config, "prediction_type": prediction}, PICTURES.model(table, predicts), predicts


def same(mine, theirs, check_x0=True):
    mine, theirs = list(mine), list(theirs)
    assert len(mine) == len(theirs)
    for ours, (x, x0) in zip(mine, theirs):
        assert_close(ours.x, x, **PARITY)
        if check_x0:
            assert_close(ours.x0, x0, **PARITY)


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize(("v", "variance"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_ddpm(setting, v, variance):
    table, config, model, predicts = setting
    theirs = DDPMScheduler(**config, clip_sample=False, variance_type=variance, timestep_spacing="trailing")
    steps = path(table[trailing(20, 1000)])
    x = normal(2, 3, 4, 4)
    states = list(by_diffusers(theirs, model, x, table, steps, generator=seeded()))
    mine = list(ddpm(denoiser(model, predicts), x, steps, v, seeded()))
    same(mine[:-1], states[:-1])
    if v == 0:  # theirs adds noise in the last step, unless that is t = 0; Algorithm 2 does not
        same(mine[-1:], states[-1:])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(setting, eta):
    table, config, model, predicts = setting
    x = normal(2, 3, 4, 4)
    theirs = DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    steps = path(table[leading(20, 1000, offset=1)], end=table[0])  # as Stable Diffusion
    states = by_diffusers(theirs, model, x, table, steps, eta=eta, generator=seeded())
    same(ddim(denoiser(model, predicts), x, steps, eta, seeded()), states)


def test_ddim_with_clipped_x0(setting):
    table, config, model, predicts = setting
    x = 2 * normal(2, 3, 4, 4)
    theirs = DDIMScheduler(**config, clip_sample=True, timestep_spacing="trailing")
    steps = path(table[trailing(10, 1000)])
    states = by_diffusers(theirs, model, x, table, steps, use_clipped_model_output=True)
    same(ddim(denoiser(model, predicts, static_threshold), x, steps), states)


def test_ddpm_is_ddim_with_eta_1(setting):
    table, _, model, predicts = setting
    x, steps = normal(2, 3, 4, 4), path(table[trailing(10, 1000)])
    a = last(ddim(denoiser(model, predicts), x, steps, 1.0, seeded()))
    assert_close(last(ddpm(denoiser(model, predicts), x, steps, 0.0, seeded())), a)


@pytest.mark.parametrize("count", [1, 2, 12])
def test_plms(setting, count):
    table, config, model, predicts = setting
    # Eq. 12 combines predicted noise; given v, diffusers combines the v's, so it is given the noise.
    config = {**config, "prediction_type": "epsilon"}
    theirs = PNDMScheduler(**config, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    steps = path(table[leading(count, 1000, offset=1)], end=table[0])
    x = normal(2, 3, 4, 4)
    states = list(by_diffusers(theirs, PICTURES.model(table, EPS), x, table, steps))
    mine = list(plms(denoiser(model, predicts), x, steps))
    if count == 1:  # there, theirs makes no trial step
        assert len(mine) == 1
        return
    same(mine, states[1:], check_x0=False)  # their first state is the trial step


@pytest.mark.parametrize(
    ("count", "spacing"), [(1, "trailing"), (2, "leading"), (10, "linspace"), (16, "leading"), (20, "trailing")]
)
def test_dpm_solver(setting, count, spacing):
    table, config, model, predicts = setting
    theirs = DPMSolverMultistepScheduler(**config, solver_order=2, timestep_spacing=spacing)
    times = {
        "linspace": linspace(count + 1, 1000)[:-1],
        "trailing": trailing(count, 1000),
        "leading": leading(count + 1, 1000)[:-1],
    }[spacing]
    x, steps = normal(2, 3, 4, 4), path(table[times])
    states = by_diffusers(theirs, model, x, table, steps)
    same(dpm_solver(denoiser(model, predicts), x, steps), states, check_x0=False)


@pytest.mark.parametrize("count", [10, 20])
def test_dpm_solver_that_ends_with_noise(setting, count):
    table, config, model, predicts = setting
    theirs = DPMSolverMultistepScheduler(**config, final_sigmas_type="sigma_min", timestep_spacing="trailing")
    x, steps = normal(2, 3, 4, 4), path(table[trailing(count, 1000)], end=table[0])
    same(dpm_solver(denoiser(model, predicts), x, steps), by_diffusers(theirs, model, x, table, steps), check_x0=False)


@pytest.mark.parametrize("levels", ["trailing", "karras"])
def test_heun(setting, levels):
    table, config, model, predicts = setting
    steps = path(table[trailing(10, 1000)] if levels == "trailing" else karras(table, 10))
    theirs = HeunDiscreteScheduler(**config, timestep_spacing="trailing" if levels == "trailing" else "linspace")
    theirs = HeunDiscreteScheduler.from_config(theirs.config, use_karras_sigmas=levels == "karras")
    x = normal(2, 3, 4, 4)
    mine = list(heun(denoiser(model, predicts), x, steps))
    # Theirs moves x / alpha, and shows the trial step of each step but the last.
    states = list(by_diffusers(theirs, model, x / steps.alpha[0], table, steps))
    ends = [*states[1::2], states[-1]]
    assert len(mine) == len(ends) == 10
    for state, (y, _), first in zip(mine, ends, states[::2]):
        assert_close(state.x, state.level.alpha * y, **PARITY)
        assert_close(state.x0, first[1], **PARITY)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_stable_diffusion_as_diffusers_runs_it(prediction):
    """With its own float32 schedule, untouched."""
    betas, config = SCHEDULES["scaled_linear"]
    table, predicts = from_betas(betas()), PREDICTIONS[prediction]
    model, x = PICTURES.model(table, predicts), normal(2, 3, 4, 4).float()
    config = {**config, "prediction_type": prediction}
    theirs: Any
    for sampler, theirs, steps in (
        (
            ddim,
            DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            path(table[leading(25, 1000, offset=1)], end=table[0]),
        ),
        (dpm_solver, DPMSolverMultistepScheduler(**config), path(table[linspace(26, 1000)[:-1]])),
    ):
        theirs.set_timesteps(25)
        y = x
        for t, state in zip(theirs.timesteps, sampler(denoiser(model, predicts), x, steps), strict=True):
            y = theirs.step(model(y, t.expand(2)).float(), t, y).prev_sample
            assert_close(state.x, y, **PARITY)


# ------------------------------------------------------------------------------------------- samplers against truth


SAMPLERS = {
    "ddpm": lambda denoise, x, steps: ddpm(denoise, x, steps, 0.0, seeded()),
    "ddim": ddim,
    "ddim-1": lambda denoise, x, steps: ddim(denoise, x, steps, 1.0, seeded()),
    "plms": plms,
    "dpm_solver": dpm_solver,
    "heun": heun,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_right_mean_and_covariance(name):
    table = from_betas(linear_betas())
    denoise = denoiser(PLANE.model(table, EPS), EPS)
    x = last(SAMPLERS[name](denoise, normal(4000, 2), path(table[trailing(60, 1000)])))
    assert_close(x.mean(0), PLANE.mean(), atol=0.06, rtol=0)
    assert_close(x.T.cov(), PLANE.covariance(), atol=0.08, rtol=0)
    nearest = torch.cdist(x, PLANE.means).argmin(1).bincount() / len(x)
    assert_close(nearest.double(), PLANE.weights, atol=0.04, rtol=0)


def test_flow_of_a_gaussian_in_closed_form():
    data = Mixture([[0.7, -0.4]], [0.5], [1.0])
    levels = cosine(torch.linspace(0.98, 0.02, 301, dtype=torch.float64))
    steps = path(levels[:-1], end=levels[-1])
    x = normal(50, 2)
    spread = (steps.alpha**2 * 0.25 + steps.sigma**2).sqrt()
    exact = steps.alpha[-1] * data.means + spread[-1] / spread[0] * (x - steps.alpha[0] * data.means)
    for sampler, error in ((ddim, 1e-2), (plms, 5e-4), (dpm_solver, 5e-4), (heun, 5e-4)):
        assert float((last(sampler(data.denoise, x, steps)) - exact).abs().max()) < error, sampler.__name__


def test_orders_of_convergence():
    x = normal(64, 2)

    def end(sampler, count):
        times = torch.linspace(0.95, 0.1, count + 1, dtype=torch.float64)
        return last(sampler(PLANE.denoise, x, path(cosine(times[:-1]), end=cosine(times[-1]))))

    exact = end(heun, 600)
    for sampler, least, most in ((ddim, 0.8, 1.3), (dpm_solver, 1.7, 2.6), (heun, 1.7, 2.6), (plms, 1.7, 4.5)):
        errors = [float((end(sampler, count) - exact).abs().mean()) for count in (60, 120)]
        assert least < math.log2(errors[0] / errors[1]) < most, sampler.__name__


# ------------------------------------------------------------------------------------------------------ how to use


def test_states_are_the_path_and_can_be_replaced():
    table = from_betas(linear_betas())
    steps, x = path(table[trailing(6, 1000)]), normal(2, 3, 4, 4)
    denoise = denoiser(PICTURES.model(table, EPS), EPS)
    states = list(ddim(denoise, x, steps))
    assert [float(s.level.sigma) for s in states] == steps.sigma[1:].tolist()
    assert_close(states[0].x0, PICTURES.denoise(x, steps[0]))
    for before, state, level in zip(states, states[1:], steps[1:]):
        assert_close(state.x0, PICTURES.denoise(before.x, level))
    assert_close(states[-1].x, states[-1].x0)  # ends without noise
    # one step after another, and a state put in the place of another
    once = x
    for i in range(6):
        once = last(ddim(denoise, once, steps[i : i + 2]))
    assert torch.equal(once, states[-1].x)
    for i, state in enumerate(ddim(denoise, normal(2, 3, 4, 4, seed=3), steps)):
        if i == 2:
            state.x = states[2].x
    assert torch.equal(state.x, states[-1].x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_inpainting(name):
    corners = Mixture([[2.0, 2.0], [-2.0, -2.0]], [0.2, 0.2], [0.5, 0.5])
    known = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(200, 2)
    keep = torch.tensor([1.0, 0.0], dtype=torch.float64)
    table = from_betas(linear_betas())
    denoise = denoiser(corners.model(table, V), V)
    steps = path(table[trailing(25, 1000)])
    x = last(reinject(SAMPLERS[name](denoise, normal(200, 2), steps), known, keep, seeded()))
    assert torch.equal(x[:, 0], known[:, 0])
    assert float((x[:, 1] > 1).double().mean()) > 0.9  # without it, a half
    free = last(SAMPLERS[name](denoise, normal(200, 2), steps))
    assert 0.3 < float((free[:, 1] > 1).double().mean()) < 0.7


def test_image_to_image():
    table = from_betas(linear_betas())
    denoise = denoiser(PLANE.model(table, EPS), EPS)
    steps, x, eps = path(table[trailing(20, 1000)]), PLANE.means[:1].expand(300, 2), normal(300, 2)
    distances = []
    for strength in (0.1, 0.4, 0.6, 1.0):
        part = tail(steps, strength)
        assert len(part) - 1 == int(20 * strength)
        y = last(dpm_solver(denoise, add_noise(x, eps, part[0]), part))
        distances.append(float((y - x).norm(dim=1).mean()))
    assert distances == sorted(distances)
    assert distances[-1] > 3 * distances[0]
    with pytest.raises(UserError, match="none of 20 steps"):
        tail(steps, 0.01)
    for strength in (0.0, -0.5, 1.5, math.nan, math.inf):
        with pytest.raises(UserError, match=r"^strength must be above 0 and at most 1, not"):
            tail(steps, strength)
    with pytest.raises(UserError, match="no step"):
        last(ddim(denoise, x, steps[-1:]))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_kept_and_no_gradient(name, dtype):
    gain = torch.nn.Parameter(torch.tensor(0.5))
    seen = []

    def model(x_t, t):
        seen.append(t.dtype)
        return (gain * x_t).to(dtype)

    x = normal(2, 3).to(dtype)
    a, b = (
        last(SAMPLERS[name](denoiser(model, V), x, path(from_betas(linear_betas())[trailing(8, 1000)]))) for _ in "ab"
    )
    assert a.dtype == dtype
    assert not a.requires_grad
    assert torch.equal(a, b)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_looks_at_the_values(name):
    """On the meta device there are none: so nothing ever waits for a GPU, and only numbers come from the CPU."""
    steps = path(from_betas(linear_betas())[trailing(6, 1000)])
    denoise = denoiser(lambda x_t, t: x_t * t[:, None], EPS, static_threshold)
    x = torch.empty(2, 3, device="meta")
    states = reinject(SAMPLERS[name](denoise, x, steps), x, torch.ones(2, 3, device="meta"), seeded())
    assert last(states).device.type == "meta"


def test_the_loss_trains():
    table, predicts = from_betas(cosine_betas()).to("cpu"), V
    net = torch.nn.Linear(2, 2)
    level = table[torch.tensor([3, 500, 900])]
    values = loss(lambda x_t, t: net(x_t), torch.randn(3, 2), torch.randn(3, 2), level, predicts, min_snr)
    assert values.shape == (3,)
    assert values.dtype == torch.float32
    values.mean().backward()
    assert net.weight.grad is not None
    assert net.weight.grad.abs().sum() > 0


def test_clean_is_clean():
    x = normal(2, 3)
    assert torch.equal(add_noise(x, normal(2, 3, seed=2), CLEAN), x)
