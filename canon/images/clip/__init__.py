"""CLIP: Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021).

Paper: https://arxiv.org/abs/2103.00020

The idea. Two towers, one for pictures and one for captions, learn to tell which caption of a batch belongs to which
picture: with embeddings I_i and T_j of length 1, the loss is the cross-entropy of softmax_j(exp(t) I_i . T_j) at j = i,
by rows and by columns (figure 3). Captions are free to have and name anything, so afterwards any list of names, written
as captions, is a classifier that needs no labels. Predicting which caption instead of every word of it learns several
times as fast.

Faithful. Bias-free linear projections; the learned temperature from 0.07, exp(t) at most 100; the Vision Transformer
with one more LayerNorm; the modified ResNet (stem of three convolutions, blurred strides, attention pooling, gains of
zero at the end of blocks); the causal text tower read at the end of text, lower-cased byte-level BPE of 49,408 tokens,
context of 77; initialisation of the released code; random square crops; prompt ensembles as mean embeddings; linear
probes by L-BFGS. All nine published sizes, which released weights fill; the loss contrasts the batch of all processes.

Scaled down. `laptop` learns 1,652 emoji of one style (Noto, 32 x 32 pixels) from their names and tags, and is tested on
two other styles. The published presets train on a folder of captioned pictures.

Deviations.
    paper                        ours                                    why
    WIT, 400 million pairs       emoji with names and tags; shapes;      WIT was never released
                                 a folder of pictures with captions
    AdamW                        Muon on matrices in `laptop`            45% of the emoji named after 350 steps,
                                                                         7 to 11% with AdamW (one seed)
    random square crops          `laptop` moves, resizes and recolours   1,652 drawings are soon known by heart
    broken text is mended        Unicode's NFC, as Hugging Face does     ids differ for ’ and full-width signs
    statistics of batch norms    each process has its own                the paper does not say

Run. `canon run clip`: 4 minutes on two threads, reckoned from 40 steps; it names 21.6% of Twitter's and 19.1% of
Microsoft's emoji, which it never saw, among all names (a nearest neighbour in pixels: 28.7 and 24.6).
"""

from canon.images.clip.gallery import sample
from canon.images.clip.model import CLIP, PRESETS, Config
from canon.images.clip.text import TextTransformer, pool
from canon.images.clip.tokenizer import published_tokenizer, tokenize, train_tokenizer
from canon.images.clip.training import batches, build, train
from canon.images.clip.transfer import class_embeddings, image_embeddings, image_features, linear_probe, probabilities
from canon.images.clip.weights import from_pretrained

__all__ = ["CLIP", "PRESETS", "Config", "TextTransformer", "batches", "build", "class_embeddings", "from_pretrained",
           "image_embeddings", "image_features", "linear_probe", "pool", "probabilities", "published_tokenizer",
           "sample", "tokenize", "train", "train_tokenizer"]  # fmt: skip
