"""CLIP: Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021).

Paper: https://arxiv.org/abs/2103.00020
"""

from canon.images.clip.gallery import sample
from canon.images.clip.model import CLIP, PRESETS, Config
from canon.images.clip.text import TextTransformer, pool
from canon.images.clip.tokenizer import published_tokenizer, tokenize, train_tokenizer
from canon.images.clip.training import batches, build, train
from canon.images.clip.transfer import class_embeddings, image_embeddings, image_features, linear_probe, probabilities
from canon.images.clip.weights import from_pretrained

__all__ = [
    "CLIP",
    "PRESETS",
    "Config",
    "TextTransformer",
    "batches",
    "build",
    "class_embeddings",
    "from_pretrained",
    "image_embeddings",
    "image_features",
    "linear_probe",
    "pool",
    "probabilities",
    "published_tokenizer",
    "sample",
    "tokenize",
    "train",
    "train_tokenizer",
]
