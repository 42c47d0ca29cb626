"""DALL-E: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021).

Paper: https://arxiv.org/abs/2102.12092

The idea. Write a picture as text is written: a discrete autoencoder turns it into a grid of codes from a codebook, and
a Transformer learns caption and codes as one stream, token after token; to draw, it continues the caption. Together the
two stages raise a lower bound on the likelihood of pictures x and captions y (Eq. 1):

    ln p(x, y) >= E_{z ~ q(z | x)} [ ln p(x | y, z) - beta KL( q(y, z | x) || p(y, z) ) ]

Of many samples CLIP picks the ones that fit the caption.

Faithful. Stage 1: the released encoder and decoder (bottleneck blocks scaled by 1/n_layers^2, max-pooling, nearest
neighbours up, 1x1 convolutions around the codes), which released weights fill; the gumbel-softmax relaxation with tau
from 1 to 1/16 by a cosine, nothing passed straight through; the KL divergence to uniform codes with beta to 6.6; the
logit-Laplace likelihood; AdamW and averaged weights. Stage 2: the caption's own byte-pair encoding with a tenth of the
merges dropped, a padding token of its own for each position, the likeliest codes; codes see the whole caption, and each
other by row, column, row, row and so on, at last in a convolution; positions by row and column; losses weighted 1/8 and
7/8. Samples at temperature 1, ranked by CLIP.

Scaled down. `laptop`: 6,000 drawn shapes of 32 x 32 pixels, 8 x 8 of 128 codes, a Transformer of 6 layers (2 million
parameters, where the paper has 12 billion). `emoji` has drawings of things. The published preset trains on a folder.

Deviations.
    paper                        ours                                    why
    250 million pictures         shapes, emoji, a folder of pictures     they were never released
    beta 6.6                     small presets: 1.65                     its codes stand for 48 values, the paper's for
                                                                         192: the same weight a value
    photographs                  drawings get uniform noise in stage 1   the density of flat pixels has no bound
    AdamW                        small presets: Muon                     the same loss after fewer steps
    learning rate of stage 2     falls by a cosine to a 32nd             steps known beforehand
    halved at plateaus
    block-sparse kernels         dense attention under the same masks    the same function, simple to read
    16-bit tricks, PowerSGD      none                                    engineering of 12 billion parameters on 2020's
                                                                         GPUs
    where the stream is shifted  a start of text, then a start of image  figure 10 leaves it open
    is not stated                whose output is the first code

Run. `canon run dalle`: 6 minutes on two threads, its report included (seed 0). Of 240 captions of fresh shapes, one
sample each at temperature 1, an oracle reads the colour asked for in 99%, the form in 87%, the place in
all, the size in 97%.
"""

from canon.images.dalle.config import PRESETS, Config
from canon.images.dalle.model import DALLE, generate_codes, generate_images, rank
from canon.images.dalle.training import batches, build, example, sample, train
from canon.images.dalle.weights import from_pretrained, released_dvae

__all__ = ["DALLE", "PRESETS", "Config", "batches", "build", "example", "from_pretrained", "generate_codes",
           "generate_images", "rank", "released_dvae", "sample", "train"]  # fmt: skip
