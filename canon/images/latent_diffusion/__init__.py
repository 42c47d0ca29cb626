"""High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2021), https://arxiv.org/abs/2112.10752.

The idea. Diffuse not pixels but the small latents of an autoencoder, which keep what the eye sees and leave out what
it does not. A U-Net denoises them and looks at a caption by cross-attention; the decoder paints the result. Stable
Diffusion is this with CLIP's text tower:

    L = E [ || eps - eps_theta(z_t, t, tau_theta(y)) ||^2 ],   z = E(x)                                          (Eq. 3)

Faithful. The KL and the VQ autoencoder with perceptual and adversarial losses and the adaptive weight; latents scaled
to unit variance; the U-Net of Stable Diffusion v1 to the last weight; its noise schedule; a Transformer over the
caption's tokens, trained with the U-Net as in the paper, or frozen (Stable Diffusion); guidance, with a tenth of the
captions dropped; averaged weights; five samplers; image-to-image; inpainting by concatenation and by putting back what
is known. Loads Stable Diffusion v1 and its inpainting model, from one file or a folder.

Scaled down. ``laptop``: 1,032 emoji of 32 pixels, latents of 8 x 8 x 4, 2.9 M parameters in all (860 M + 84 M + 123 M),
2,000 + 3,200 steps. ``shapes``: drawn shapes, whose pictures an oracle can judge.

Deviations.
    paper                                ours                                why
    adversary from step 50,001           from 4/5 of the steps               so few steps
    perceptual distance from the start   from 1/2 of the steps, on 1/4 of    VGG-16 costs three times the small
                                         the pictures                        autoencoder
    betas 0.5 and 0.9                    0.9 and 0.99                        learns faster before the adversary comes
    log-variance begins at 0             at -6                               19.3 against 17.1 dB after 60 s
    32 groups a norm                     8 in the small U-Net, 1 in its      groups of one or two channels forget
                                         autoencoder                         colours
    BERT or CLIP vocabulary              CLIP's kind, learned from captions  1,024 tokens are enough for emoji

Run. `canon run latent_diffusion`: 25 minutes on one thread beside other work, to a validation loss of 0.113; pictures
have the colours and kinds of things and do not obey captions clearly yet. `--preset shapes`: 17 minutes likewise; an
oracle reads colour and form as asked off 95 of its 100 pictures, with guidance 3 off all, the place off 71.
"""

from canon.images.latent_diffusion.model import PRESETS, Config, LatentDiffusion
from canon.images.latent_diffusion.training import batches, build, sample, train
from canon.images.latent_diffusion.weights import from_pretrained, load_base

__all__ = [
    "PRESETS",
    "Config",
    "LatentDiffusion",
    "batches",
    "build",
    "from_pretrained",
    "load_base",
    "sample",
    "train",
]
