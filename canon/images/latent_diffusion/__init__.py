"""High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2021), https://arxiv.org/abs/2112.10752.

The idea. Diffuse not pixels but the small latents of an autoencoder, which keep what the eye sees and drop what it does
not. A U-Net denoises them and looks at a caption by cross-attention. Stable Diffusion is this with CLIP's text tower:

    L = E [ || eps - eps_theta(z_t, t, tau_theta(y)) ||^2 ],   z = E(x)
"""

from canon.images.latent_diffusion.model import PRESETS, Config, LatentDiffusion
from canon.images.latent_diffusion.training import batches, build, sample, train
from canon.images.latent_diffusion.weights import from_pretrained

__all__ = ["PRESETS", "Config", "LatentDiffusion", "batches", "build", "from_pretrained", "sample", "train"]
