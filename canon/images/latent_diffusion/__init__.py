"""High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2021), https://arxiv.org/abs/2112.10752.

The idea. Diffuse not pixels but the small latents of an autoencoder, which keep what the eye sees and leave out what
it does not. A U-Net denoises them and looks at a caption by cross-attention; the decoder paints the result. Stable
Diffusion is this with CLIP's text tower:

    L = E [ || eps - eps_theta(z_t, t, tau_theta(y)) ||^2 ],   z = E(x)                                          (Eq. 3)

Faithful. The KL and the VQ autoencoder with perceptual and adversarial losses and the adaptive weight; latents scaled
to unit variance; the U-Net of Stable Diffusion v1 to the last weight; its noise schedule; a Transformer over the
caption's tokens, trained with the U-Net as in the paper; guidance, with a tenth of the captions dropped; averaged
weights; five samplers; image-to-image; inpainting by concatenation and by putting back what is known. Loads Stable
Diffusion v1 and its inpainting model, from one file or a folder.

Scaled down. ``laptop``: 547 emoji of 32 pixels, latents of 8 x 8 x 4, 2.9 M parameters in all (860 M + 84 M + 123 M),
1,400 + 2,600 steps. ``shapes``: drawn shapes, whose pictures an oracle can judge.

Deviations. The first four are those of the small presets.
    paper                                ours                                why
    adversary from step 50,001           from 4/5 of the steps               so few steps
    perceptual distance from the start   from 1/2 of the steps, on 1/4 of    VGG-16 costs three times the small
                                         the pictures                        autoencoder
    betas 0.5 and 0.9                    0.9 and 0.99                        learns faster before the adversary comes
    log-variance begins at 0             at -6                               19.3 against 17.1 dB after 60 s
    a bidirectional Transformer for      CLIP's causal tower, also where     one text encoder; Stable Diffusion's,
    text (BERT's tokens)                 it learns                           frozen, is loaded but not trained upon
    super-resolution and layouts by      inpainting alone is conditioned     Imagen shows super-resolution
    concatenation                        so
    Adam, AdamW                          Muon in the small presets           decoded pixels differ by 0.090, not by
                                                                             0.131 after 700 steps
    the U-Net predicts the noise         v in the small presets, as Stable   what is drawn weighs little in the noise of
                                         Diffusion 2                         the noisiest steps: after 4 minutes CLIP
                                                                             knows 4% of the emoji, and not 1%
    32 groups a norm                     8 in the small U-Net, 1 in its      groups of one or two channels forget
                                         autoencoder                         colours
    BERT or CLIP vocabulary              CLIP's kind, learned from captions  1,024 tokens are enough for emoji

Run. `canon run latent_diffusion`: 11 minutes on two threads, its report included (seed 0). The checkpoint learned
longer (`--first-steps 1400 --steps 2600`, 18 minutes on one thread beside other work): of 160 emoji drawn by
their names, with guidance 4, our CLIP gives 59% the right one of 547 names, and 87% among its first five. `--preset
shapes`: 10 minutes on two threads beside other work; of 200 pictures of the checkpoint (18 minutes on one), with
guidance 3, an oracle reads colour, form, place and size as asked off all. Place is learned last, and not always: six
trainings of the U-Net that differed in seed or in rounding had it right in 100, 100, 100, 85, 61 and 19% of 200, all
else in 99.5% or more.
"""

from canon.images.latent_diffusion.model import PRESETS, Config, LatentDiffusion
from canon.images.latent_diffusion.training import batches, build, example, sample, train
from canon.images.latent_diffusion.weights import from_pretrained, load_base, load_base_of

__all__ = [
    "PRESETS",
    "Config",
    "LatentDiffusion",
    "batches",
    "build",
    "example",
    "from_pretrained",
    "load_base",
    "load_base_of",
    "sample",
    "train",
]
