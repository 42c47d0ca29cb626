"""Vectors to codes and back: a learned codebook, one of running means, and a relaxed choice between codes.

Maps are (batch, width, *positions): positions of a sequence, of a picture or of a video.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What a quantiser makes of a map."""

    z: Float[Tensor, "batch width *positions"]
    """The nearest codes, through which gradients pass as if they were the input."""
    indices: Int[Tensor, " batch *positions"]
    """Which codes they are."""
    loss: Float[Tensor, ""]
    """Draws codes and inputs together; to be added to the loss of the reconstruction."""


class VectorQuantizer(nn.Module):
    """The nearest vectors of a codebook that learns by gradient.

    Args:
        n_codes: size of the codebook.
        width: of each code.
        codebook: weight of the loss that moves the codes towards the inputs.
        commitment: weight (beta) of the loss that moves the inputs towards the codes. The code that VQGAN and latent
            diffusion released has the two the other way round: ``codebook=0.25, commitment=1``.

    Source: van den Oord et al. 2017, arXiv 1711.00937, Eqs. 1 to 3; means over elements, as in VQGAN (Esser et al.
    2021, arXiv 2012.09841, Eq. 4).
    """

    def __init__(self, n_codes: int, width: int, codebook: float = 1.0, commitment: float = 0.25):
        super().__init__()
        self.codebook, self.commitment = codebook, commitment
        self.codes = nn.Parameter(torch.empty(n_codes, width).uniform_(-1 / n_codes, 1 / n_codes))

    def forward(self, z: Float[Tensor, "batch width *positions"]) -> Quantized:
        indices = nearest(z, self.codes)
        e = lookup(indices, self.codes)
        # Eq. 3: || sg[z] - e ||^2 + beta || z - sg[e] ||^2
        loss = self.codebook * F.mse_loss(e, z.detach()) + self.commitment * F.mse_loss(z, e.detach())
        return Quantized(straight_through(z, e), indices, loss)


class EMAQuantizer(nn.Module):
    """The nearest vectors of a codebook of running means: each code is the mean of the inputs that chose it.

    While training, every call moves the codes, by the inputs of all processes.

    Args:
        n_codes: size of the codebook.
        width: of each code.
        decay: gamma, of the means.
        commitment: weight (beta) of the loss that moves the inputs towards the codes.

    Attributes:
        counts: how often each code was chosen, a running mean.
        sums: of the inputs that chose it, a running mean.

    Source: van den Oord et al. 2017, appendix A.1.
    """

    codes: Float[Tensor, "codes width"]
    counts: Float[Tensor, " codes"]
    sums: Float[Tensor, "codes width"]

    def __init__(self, n_codes: int, width: int, decay: float = 0.99, commitment: float = 0.25):
        super().__init__()
        self.decay, self.commitment = decay, commitment
        self.register_buffer("codes", torch.randn(n_codes, width))
        self.register_buffer("counts", torch.ones(n_codes))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, z: Float[Tensor, "batch width *positions"]) -> Quantized:
        indices = nearest(z, self.codes)
        e = lookup(indices, self.codes)
        if self.training:
            self._update(z, indices)
        loss = self.commitment * F.mse_loss(z, e.to(z.dtype))
        return Quantized(straight_through(z, e), indices, loss)

    @torch.no_grad()
    def _update(self, z: Tensor, indices: Tensor) -> None:
        rows, chosen = _rows(z).to(self.sums.dtype), indices.flatten()
        counts = torch.zeros_like(self.counts).index_add_(0, chosen, torch.ones_like(rows[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, rows)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        # Eq. 6: N_i = gamma N_i + (1 - gamma) n_i
        self.counts.lerp_(counts, 1 - self.decay)
        # Eq. 7: m_i = gamma m_i + (1 - gamma) sum_j z_ij
        self.sums.lerp_(sums, 1 - self.decay)
        # Eq. 8: e_i = m_i / N_i; a code that is never chosen stays where it is, though both go to zero
        alive = self.counts[:, None] > 1e-20
        self.codes.copy_(torch.where(alive, self.sums / self.counts[:, None], self.codes))


@torch.no_grad()
def restart_dead_codes(
    quantizer: EMAQuantizer,
    z: Float[Tensor, "batch width *positions"],
    threshold: float = 1.0,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, " codes"]:
    """Move the codes that are chosen less than ``threshold`` times a call to random inputs, and count them as one.

    Args:
        quantizer: is changed.
        z: inputs; on several processes the first one's are taken.
        threshold: of ``counts``; infinity moves all codes, which initialises them from data.
        generator: draws the inputs.

    Returns:
        Which codes were moved.

    Source: Dhariwal et al. 2020 (Jukebox), arXiv 2005.00341, section 3.1.
    """
    rows, dead = _rows(z), quantizer.counts < threshold
    drawn = torch.randint(len(rows), dead.shape, generator=generator, device=rows.device)
    fresh = rows[drawn].to(quantizer.codes.dtype)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(fresh, 0)
    for buffer in (quantizer.codes, quantizer.sums):
        buffer.copy_(torch.where(dead[:, None], fresh, buffer))
    quantizer.counts.masked_fill_(dead, 1)
    return dead


def gumbel_quantize(
    logits: Float[Tensor, "batch codes *positions"], temperature: float, generator: torch.Generator | None = None
) -> Float[Tensor, "batch codes *positions"]:
    """A relaxed random choice of one code at each position: weights that sum to 1, one-hot as temperature goes to 0.

    Source: Jang et al. 2017, arXiv 1611.01144, Eq. 2; Maddison et al. 2017, arXiv 1611.00712.
    """
    # g = -log(-log(u)), and -log(u) is exponentially distributed
    g = -torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator).log()
    # Eq. 2: y_i = exp((log pi_i + g_i) / tau) / sum_j exp((log pi_j + g_j) / tau)
    return ((logits.float() + g) / temperature).softmax(1)


def kl_to_uniform(logits: Float[Tensor, "batch codes *positions"]) -> Float[Tensor, " batch *positions"]:
    """KL divergence in nats of the choice at each position from a uniform one: 0 to log(codes)."""
    log_q = logits.float().log_softmax(1)
    # KL(q || uniform) = sum_k q_k log q_k + log K
    return (log_q.exp() * log_q).sum(1) + torch.tensor(float(logits.shape[1])).log()


# ----------------------------------------------------------------------------------------------------------- parts


@torch.no_grad()
def nearest(
    z: Float[Tensor, "batch width *positions"], codes: Float[Tensor, "codes width"]
) -> Int[Tensor, " batch *positions"]:
    """Index of the code at the smallest distance, in the precision of the codes also under autocast."""
    rows = _rows(z).to(codes.dtype)
    with torch.autocast(z.device.type, enabled=False):
        # argmin_k || z - e_k ||^2 = argmin_k || e_k ||^2 - 2 z e_k
        distances = torch.addmm(codes.square().sum(1), rows, codes.T, alpha=-2)
    return distances.argmin(1).view(z.shape[0], *z.shape[2:])


def lookup(
    indices: Int[Tensor, " batch *positions"], codes: Float[Tensor, "codes width"]
) -> Float[Tensor, "batch width *positions"]:
    """The codes of these indices."""
    return rearrange(F.embedding(indices, codes), "b ... c -> b c ...")


def straight_through(
    z: Float[Tensor, "batch width *positions"], e: Float[Tensor, "batch width *positions"]
) -> Float[Tensor, "batch width *positions"]:
    """The value of e with the gradient of z (Bengio et al. 2013, arXiv 1308.3432)."""
    return z + (e - z).detach()


def _rows(z: Tensor) -> Tensor:
    return rearrange(z, "b c ... -> (b ...) c")
