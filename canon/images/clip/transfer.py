"""What a trained CLIP is used for: a classifier made of names (section 3.1), and features for a probe (section 3.2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from canon.core.data.tokenizers import BPETokenizer
from canon.images.clip.model import CLIP
from canon.images.clip.tokenizer import tokenize


@torch.no_grad()
def class_embeddings(
    model: CLIP, tokenizer: BPETokenizer, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
) -> Float[Tensor, "classes d_embedding"]:
    """A classifier's weights, one row of length 1 for each name: its prompts, averaged as embeddings (section 3.1.4).

    Args:
        model: a trained model.
        tokenizer: its tokenizer.
        names: of the classes.
        templates: prompts with ``{}`` where the name goes; several make an ensemble.
    """
    device = model.logit_scale.device
    total = torch.zeros(len(names), model.config.d_embedding, device=device)
    for template in templates:
        tokens = tokenize(tokenizer, [template.format(name) for name in names], model.config.context_length)
        tokens = tokens[:, : int(tokens.argmax(dim=1).max()) + 1].to(device)  # nothing looks beyond the ends
        # "we construct the ensemble over the embedding space instead of probability space"
        total += torch.cat([model.encode_text(part) for part in tokens.split(256)])
    return F.normalize(total, dim=1)


@torch.no_grad()
def image_features(model: CLIP, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n d_features"]:
    """Features before the projection, for probes; any number of pictures in [-1, 1], some at a time."""
    device = model.logit_scale.device
    return torch.cat([model.image_features(part.to(device)).float() for part in images.split(256)])


@torch.no_grad()
def image_embeddings(model: CLIP, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n d_embedding"]:
    """Embeddings of length 1 of any number of pictures in [-1, 1]."""
    return F.normalize(model.image_projection(image_features(model, images)).float(), dim=1)


@torch.no_grad()
def probabilities(
    model: CLIP, images: Float[Tensor, "n d_embedding"], classes: Float[Tensor, "classes d_embedding"]
) -> Float[Tensor, "n classes"]:
    """How likely each class is for each picture: a softmax over scaled cosines."""
    return (model.scale() * images @ classes.t()).softmax(dim=1)


def accuracy(
    images: Float[Tensor, "n d_embedding"],
    classes: Float[Tensor, "classes d_embedding"],
    labels: Int[Tensor, " n"],
    top: int = 1,
) -> float:
    """Share of pictures whose class is among the ``top`` closest."""
    closest = (images @ classes.t()).topk(top, dim=1).indices
    return float((closest == labels[:, None]).any(dim=1).float().mean())


def linear_probe(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    classes: int,
    strength: float = 0.316,
    max_iterations: int = 1000,
) -> nn.Linear:
    """Logistic regression on frozen features by L-BFGS (section 3.2, appendix A.3).

    Minimises |W|^2 / 2 + C sum_i cross-entropy_i; the bias is free.

    Args:
        features: of the training pictures.
        labels: their classes.
        classes: how many there are.
        strength: C, the inverse of the L2 penalty; the paper sweeps it on a validation set, its code has 0.316.
        max_iterations: "at most 1,000 iterations".

    Returns:
        A linear layer from features to logits.
    """
    probe = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=max_iterations, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def objective() -> float:
        optimizer.zero_grad()
        total = F.cross_entropy(probe(features), labels, reduction="sum")
        loss = (0.5 * probe.weight.square().sum() / strength + total) / len(labels)  # scaled: gradients of order one
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(objective)
    return probe.requires_grad_(False)
