"""Quantisers: values, gradients and updates against their formulas and against diffusers."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import VectorQuantizer as TheirQuantizer
from torch.testing import assert_close

from canon.core.nn.quantizers import (
    EMAQuantizer,
    VectorQuantizer,
    gumbel_quantize,
    kl_to_uniform,
    lookup,
    nearest,
    restart_dead_codes,
)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 4, 5), (1, 3, 2, 2, 2)])
def test_nearest_is_the_nearest(shape):
    z, codes = torch.randn(shape), torch.randn(20, 3)
    rows = z.movedim(1, -1)
    expected = (rows[..., None, :] - codes).square().sum(-1).argmin(-1)
    assert torch.equal(nearest(z, codes), expected)
    assert torch.equal(lookup(expected, codes).movedim(1, -1), codes[expected])


def test_nearest_keeps_its_precision_under_autocast():
    codes = 2 + torch.arange(10.0)[:, None] * 0.01  # alike in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(codes[None, :, 0][:, None], codes)[0], torch.arange(10))


@pytest.mark.parametrize(("legacy", "codebook", "commitment"), [(False, 1.0, 0.25), (True, 0.25, 1.0)])
def test_vector_quantizer_against_diffusers(legacy, codebook, commitment):
    """``legacy`` is the order of the weights in the released VQGAN."""
    mine = VectorQuantizer(11, 4, codebook, commitment).double()
    theirs = TheirQuantizer(11, 4, beta=0.25, legacy=legacy, sane_index_shape=True).double()
    with torch.no_grad():
        theirs.embedding.weight.copy_(mine.codes.normal_())
    z = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    ours = mine(z)
    other, loss, (_, _, indices) = theirs(z)
    assert torch.equal(ours.indices, indices)
    assert_close(ours.z, other)
    assert_close(ours.loss, loss)
    g = torch.randn_like(z)
    a = torch.autograd.grad((ours.z * g).sum() + ours.loss, (z, mine.codes))
    b = torch.autograd.grad((other * g).sum() + loss, (z, theirs.embedding.weight))
    assert_close(a, b)


def test_gradients_of_the_vector_quantizer_by_hand():
    quantizer = VectorQuantizer(5, 3, codebook=0.7, commitment=0.3).double()
    torch.nn.init.normal_(quantizer.codes)
    z = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    found = quantizer(z)
    e = quantizer.codes[found.indices].movedim(-1, 1)
    assert_close(found.z, e)
    g = torch.randn_like(z)
    dz, dcodes = torch.autograd.grad((found.z * g).sum() + found.loss, (z, quantizer.codes))
    # straight through, and 2 beta (z - e) / n; the codes only feel the codebook's term
    assert_close(dz, g + 2 * 0.3 * (z - e) / z.numel())
    pull = (2 * 0.7 * (e - z) / z.numel()).movedim(1, -1).flatten(0, 1)
    assert_close(dcodes, torch.zeros_like(quantizer.codes).index_add(0, found.indices.flatten(), pull))


def test_running_means_follow_their_formula():
    quantizer = EMAQuantizer(6, 2, decay=0.9, commitment=0.5)
    counts, sums, codes = torch.ones(6), quantizer.codes.clone(), quantizer.codes.clone()
    for step in range(4):
        z = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(step), requires_grad=True)
        found = quantizer(z)
        rows = z.detach().movedim(1, -1).reshape(-1, 2)
        chosen = torch.cdist(rows, codes).argmin(1)
        assert torch.equal(found.indices.flatten(), chosen)
        assert_close(found.z, codes[chosen].view(3, 8, 2).movedim(-1, 1))  # before they move
        (dz,) = torch.autograd.grad(found.loss, z)
        assert_close(dz, 2 * 0.5 * (z - found.z.detach()) / z.numel())
        one_hot = F.one_hot(chosen, 6).float()
        counts = 0.9 * counts + 0.1 * one_hot.sum(0)
        sums = 0.9 * sums + 0.1 * one_hot.T @ rows
        codes = sums / counts[:, None]
        assert_close(quantizer.codes, codes)
    quantizer.eval()(torch.randn(3, 2, 8))
    assert_close(quantizer.codes, codes)
    assert not list(quantizer.parameters())


def test_running_means_find_the_means():
    centres = torch.tensor([[3.0, 0.0], [-3.0, 1.0], [0.0, -4.0]])
    quantizer = EMAQuantizer(3, 2, decay=0.9)
    quantizer.codes.copy_(centres + 0.8)
    quantizer.sums.copy_(quantizer.codes)
    for _ in range(60):
        quantizer(centres[torch.randint(3, (50,))].T[None] + 0.1 * torch.randn(1, 2, 50))
    assert_close(quantizer.codes, centres, atol=0.05, rtol=0)


def test_a_code_that_is_never_chosen_stays():
    quantizer = EMAQuantizer(2, 1, decay=0.1)
    quantizer.codes.copy_(torch.tensor([[0.0], [100.0]]))
    quantizer.sums.copy_(quantizer.codes)
    for _ in range(100):
        quantizer(torch.randn(1, 1, 4))
    assert quantizer.codes[1].item() == pytest.approx(100, rel=1e-4)
    assert quantizer.codes.isfinite().all()


def test_dead_codes_restart_among_the_inputs():
    quantizer = EMAQuantizer(4, 2)
    quantizer.counts.copy_(torch.tensor([5.0, 0.2, 1.0, 0.99]))
    before = quantizer.codes.clone()
    z = 10 + torch.randn(2, 2, 30)
    dead = restart_dead_codes(quantizer, z, generator=torch.Generator().manual_seed(0))
    assert dead.tolist() == [False, True, False, True]
    assert torch.equal(quantizer.codes[~dead], before[~dead])
    inputs = {tuple(row) for row in z.movedim(1, -1).reshape(-1, 2).tolist()}
    assert {tuple(row) for row in quantizer.codes[dead].tolist()} <= inputs
    assert len(set(quantizer.codes[:, 0].tolist())) == 4
    assert torch.equal(quantizer.sums[dead], quantizer.codes[dead])
    assert quantizer.counts.tolist() == pytest.approx([5.0, 1.0, 1.0, 1.0])
    assert restart_dead_codes(quantizer, z, threshold=math.inf).all()
    assert {tuple(row) for row in quantizer.codes.tolist()} <= inputs


def test_processes_update_together(monkeypatch):
    """With two processes that see the same inputs, every sum is twice as large."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(2))
    of_first = torch.randn(5, 2)
    monkeypatch.setattr(dist, "broadcast", lambda x, source: x.copy_(of_first))
    both, z = EMAQuantizer(5, 2), torch.randn(4, 2, 9)
    alone = copy.deepcopy(both)
    both(z)
    restarted = copy.deepcopy(both)
    restart_dead_codes(restarted, z, math.inf)
    assert torch.equal(restarted.codes, of_first)
    monkeypatch.undo()
    alone(torch.cat([z, z]))
    assert both.state_dict().keys() == {"codes", "counts", "sums"}
    for name, value in alone.state_dict().items():
        assert_close(both.state_dict()[name], value)


def test_gumbel_softmax_limits():
    logits = torch.randn(2, 5, 3, 4)

    def draw(temperature):
        return gumbel_quantize(logits, temperature, torch.Generator().manual_seed(0))

    assert_close(draw(1.0).sum(1), torch.ones(2, 3, 4))
    cold = draw(1e-4)
    assert_close(cold, F.one_hot(draw(1.0).argmax(1), 5).movedim(-1, 1).float())
    assert_close(draw(1e6), torch.full_like(cold, 0.2), atol=1e-4, rtol=0)
    # log y = (logits + g) / tau up to a constant: the same noise at each temperature
    assert_close(draw(0.5).log().diff(dim=1), 2 * draw(1.0).log().diff(dim=1), atol=1e-3, rtol=1e-3)


def test_gumbel_softmax_draws_from_the_distribution():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).view(1, 4, 1).expand(1, 4, 40_000).clone().requires_grad_()
    drawn = gumbel_quantize(logits, 0.1, torch.Generator().manual_seed(0))
    shares = F.one_hot(drawn.argmax(1)[0], 4).float().mean(0)
    assert_close(shares, logits[0, :, 0].softmax(0).detach(), atol=0.01, rtol=0)
    (gradient,) = torch.autograd.grad(drawn[:, 3].sum(), logits)
    assert gradient[0, 3].sum() > 0 > gradient[0, 1].sum()


def test_kl_to_uniform():
    assert_close(kl_to_uniform(torch.full((2, 7, 3), 4.0)), torch.zeros(2, 3), atol=1e-6, rtol=0)
    sure = torch.zeros(1, 7, 1)
    sure[0, 2] = 100
    assert_close(kl_to_uniform(sure), torch.full((1, 1), math.log(7)))
    logits = torch.randn(3, 7, 4, 5)
    q = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    uniform = torch.distributions.Categorical(logits=torch.zeros(3, 4, 5, 7))
    assert_close(kl_to_uniform(logits), torch.distributions.kl_divergence(q, uniform))
