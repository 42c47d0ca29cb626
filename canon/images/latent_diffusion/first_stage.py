"""How the autoencoder learns (section 3.1, appendix G): likeness to the eye, an adversary, a slight regularisation."""

import pickletools
from functools import cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from canon.core.data.assets import fetch
from canon.images.latent_diffusion.autoencoder import AutoencoderKL, AutoencoderVQ

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of the convolutions of its five resolutions."""


class LPIPS(nn.Module):
    """Perceptual distance: how differently a network that recognises photographs sees two pictures.

    Source: Zhang et al. 2018, arXiv 1801.03924, Eq. 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        widths = [3, *(width for group in VGG16 for width in group)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.weights = nn.ParameterList(torch.ones(group[-1]) for group in VGG16)
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def features(self, x: Float[Tensor, "batch 3 height width"]) -> list[Float[Tensor, "batch channels h w"]]:
        """VGG-16's last activation of each resolution, of unit length at every place."""
        x, found, layers = (x - self.mean) / self.std, [], iter(self.convolutions)
        for index, group in enumerate(VGG16):
            x = F.max_pool2d(x, 2) if index else x
            for _ in group:
                x = next(layers)(x).relu()
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(
        self, x: Float[Tensor, "batch 3 height width"], y: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        # Eq. 1: d(x, y) = sum_l 1/(H_l W_l) sum_hw || w_l * (phi_l(x)_hw - phi_l(y)_hw) ||^2
        parts = zip(self.features(x), self.features(y), self.weights)
        return torch.stack([((a - b).square() * w[:, None, None]).sum(1).mean((1, 2)) for a, b, w in parts]).sum(0)


@cache
def lpips() -> LPIPS:
    """The published distance, frozen.

    Raises:
        UserError: the weights cannot be fetched.
    """
    # The file is a pickle of float32 arrays, kernels as (height, width, in, out). Its opcodes are read, never executed.
    operations = pickletools.genops(fetch("lpips-vgg16").read_bytes())
    arrays = [
        torch.tensor(np.frombuffer(data, "<f4")) for code, data, _ in operations if code.name == "BINBYTES" and data
    ]
    model = LPIPS().requires_grad_(False).eval()
    for layer in model.convolutions.children():
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        rows, columns = layer.weight.shape[:2]
        layer.weight.copy_(arrays.pop(0).view(3, 3, columns, rows).permute(3, 2, 0, 1))
        layer.bias.copy_(arrays.pop(0))
    for weight in model.weights:
        weight.copy_(arrays.pop(0))
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def discriminator(width: int = 64, layers: int = 3) -> nn.Sequential:
    """PatchGAN: from a picture to a map of logits, each judging one patch as real or not.

    Source: Isola et al. 2017 (pix2pix), arXiv 1611.07004, appendix 6.1.2.
    """

    def convolution(a: int, b: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]

    widths = [width * min(2**i, 8) for i in range(layers + 1)]
    steps = [convolution(a, b, 2 if i + 1 < layers else 1) for i, (a, b) in enumerate(pairwise(widths))]
    first = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*first, *(layer for step in steps for layer in step), nn.Conv2d(widths[-1], 1, 4, 1, 1))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return model


def adaptive_weight(
    nll: Float[Tensor, "batch 3 height width"],
    adversarial: Float[Tensor, "batch 3 height width"],
    last_input: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "3 channels k k"],
) -> Float[Tensor, ""]:
    """How much the adversary counts, so that both pull equally at the decoder's last layer.

    Args:
        nll: gradient of the reconstruction loss with respect to the reconstruction.
        adversarial: that of the generator's loss.
        last_input: what the last convolution read.
        weight: its kernel.

    Source: Esser et al. 2021 (VQGAN), arXiv 2012.09841, Eq. 7; clamped as in the released code.
    """

    def norm(gradient: Tensor) -> Tensor:
        return conv2d_weight(last_input, weight.shape, gradient, padding=1).norm()

    # Eq. 7: lambda = ||grad_GL L_rec|| / (||grad_GL L_GAN|| + delta)
    return (norm(nll) / (norm(adversarial) + 1e-4)).clamp(max=1e4)


class FirstStage(nn.Module):
    """The autoencoder and its adversary, trained on the same batches; by default as the KL ones that were released.

    Args:
        autoencoder: of either kind.
        width: of the discriminator.
        perceptual_from: step from which the perceptual distance counts.
        adversary_from: step from which the discriminator takes part.
        perceptual_every: of so many pictures one has its perceptual distance computed.
        adversary_weight: share of the adversary in the gradient at the last layer, ``disc_weight``.
    """

    sharded_methods = ("loss",)

    def __init__(
        self,
        autoencoder: AutoencoderKL | AutoencoderVQ,
        width: int,
        perceptual_from: int = 0,
        adversary_from: int = 50_001,
        perceptual_every: int = 1,
        adversary_weight: float = 0.5,
    ):
        super().__init__()
        self.autoencoder, self.perceptual_from, self.adversary_from = autoencoder, perceptual_from, adversary_from
        self.perceptual_every, self.adversary_weight = perceptual_every, adversary_weight
        self.discriminator = discriminator(width)
        self.logvar = nn.Parameter(torch.zeros(1))  # a number of its own cannot be sharded

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss of generator and discriminator.

        Args:
            batch: ``images`` in [-1, 1], ``noise`` of the posterior, ``step`` in every row, ``row``: its number.

        The loss network and the adversary are differentiated once, with respect to the reconstruction: the adaptive
        weight needs that gradient, and the autoencoder's own is the chain rule from there. What the discriminator
        learns is added; neither touches the other's parameters.
        """
        x = batch["images"]
        x_hat, penalty, last_input = self.autoencoder.reconstruct(x, batch["noise"])
        seen = x_hat.detach().float().requires_grad_(torch.is_grad_enabled())
        # |x - x^| + LPIPS(x, x^), the distance of a picture standing at each of its pixels
        pixels = (x - seen).abs()
        distance, metrics = pixels.sum() / len(x), {"l1": pixels.detach().mean()}
        step = int(batch["step"][0])
        if step >= self.perceptual_from:
            rows = batch["row"] % self.perceptual_every == 0  # of the batch, which is in random order
            eye = lpips().to(x.device)(x[rows], seen[rows]).float().sum() / len(x) * self.perceptual_every
            distance, metrics["lpips"] = distance + eye * x[0].numel(), eye.detach()
        # nll = (|x - x^| + LPIPS) / exp(logvar) + logvar
        logvar = self.logvar.sum()
        scale = (-logvar).exp()
        value = distance.detach() * scale + logvar * x[0].numel() + penalty
        if not seen.requires_grad:
            return value, metrics
        (pull,) = torch.autograd.grad(distance, seen)
        pull = pull * scale.detach()
        if step >= self.adversary_from:
            (push,) = torch.autograd.grad(-self.discriminator(seen).float().mean(), seen)
            weight = adaptive_weight(pull, push, last_input.detach().float(), self.autoencoder.decoder.conv_out.weight)
            pull = pull + self.adversary_weight * weight * push
            real, fake = self.discriminator(x).float(), self.discriminator(seen.detach()).float()
            # hinge: 1/2 (E[max(0, 1 - D(x))] + E[max(0, 1 + D(x^))])
            judged = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
            value = value + judged
            metrics |= {"discriminator": judged.detach(), "adversary_weight": weight}
        else:
            value = value + 0.0 * sum(p.sum() for p in self.discriminator.parameters())  # DDP waits for every gradient
        carried = (x_hat.float() * pull).sum()  # its gradient with respect to x^ is pull
        return value + carried - carried.detach(), metrics
