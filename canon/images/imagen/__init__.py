"""Imagen: Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022).

Paper: https://arxiv.org/abs/2205.11487

The idea. A large language model that has only ever read text already knows what captions mean: frozen, it guides a
diffusion model of small pictures, and two more diffusion models make these larger. Enlarging the language model helps
more than enlarging the U-Nets. Each of the three learns to denoise, and is sampled under guidance (Eqs. 1 and 2):

    L = E [ w_t || x^_theta(alpha_t x + sigma_t eps, c) - x ||^2 ]
    eps~ = w eps_theta(z_t, c) + (1 - w) eps_theta(z_t)

Faithful. The text is used twice, pooled by attention into the time embedding and as a sequence to attend to, under
LayerNorm. Base: a U-Net with attention to pixels and text. Super-resolution: the Efficient U-Net (more blocks at
lower resolutions and none at the picture's own, down-sampling before and up-sampling after a block's convolutions, skip
connections scaled by 1/sqrt 2, embeddings that scale and shift); the last stage learns from crops and has no
self-attention. Noise-conditioning augmentation of a random level that is told, and chosen at sampling. Continuous time,
cosine schedule, ancestral sampling. A tenth of the captions zeroed. Static and dynamic thresholds, of each sample at
each step. 2.1 B, 0.43 B and 0.42 B parameters in ``paper``.

Scaled down. ``laptop``: 547 emoji at 16, 32 and 64 pixels; SmolLM2 with 135 M parameters reads captions;
3.0 M parameters in all three U-Nets. ``shapes``: drawn shapes, whose pictures an oracle can judge.

Deviations.
    paper                              ours                                why
    T5-XXL, 4.6 B, an encoder          SmolLM2-135M, a causal decoder:     in reach of a laptop; its first position
                                       states after the last norm, behind  holds no word
                                       a start token
    embeddings as they are             each dimension standardised         three of 576 dimensions hold half of the
                                                                           energy, the same for all words
    eps predicted (base)               v, with its plain squared error     eps says nothing of x where alpha is 0
    super-resolution predicts all      the network adds to what the        to copy takes a small network half of the
    of the picture                     enlarged small picture says         steps that there is time for
    64, 256 and 1024 pixels            16, 32 and 64 (laptop)              minutes of a processor
    Adafactor (base), Adam             Muon with AdamW                     learns faster
    dynamic thresholding               static, unless asked for            a white ground is no overshooting: divided by
                                                                           its percentile, it turns grey
    guidance in all stages             in the base alone                   half the time; the small picture says almost
                                                                           everything
    last stage: linear schedule        cosine in all stages                one schedule is simpler
    text beside the pixels in the      cross-attention of its own          reads as the equation of attention does;
    keys of self-attention             (``paper``, too)                    padding is zeros that are attended to
    BigGAN blocks, heads of 64         residual blocks of DDPM with scale  shared with the other U-Nets; the base alone
    channels (base)                    and shift, 8 heads                  differs
    first stage: 600 M                 428 M (``paper``)                   the shape in appendix F.2 has no more

Run. `canon run imagen`: 9.4 minutes on two threads, beside other work, its report included (seed 0). The checkpoint
learned longer (`--steps 3000 --first-sr-steps 5000 --last-sr-steps 5000`, 44 minutes on one busy thread). Of 100 emoji
that it draws by name, our CLIP names 77% (97% among its first five) among 547 names, and the picture that is nearest in
pixels is the right one for 89%.
"""

from canon.images.imagen.model import PRESETS, Config, Imagen
from canon.images.imagen.sampling import generate
from canon.images.imagen.training import batches, build, example, from_pretrained, sample, train

__all__ = [
    "PRESETS",
    "Config",
    "Imagen",
    "batches",
    "build",
    "example",
    "from_pretrained",
    "generate",
    "sample",
    "train",
]
