"""Attention as a picture: who looks at whom."""

from collections.abc import Sequence

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor


def attention_figure(
    weights: Float[Tensor, "heads time source"], queries: Sequence[str], keys: Sequence[str]
) -> Figure:
    """One panel a head: a row for each token that looks, a column for each it looks at.

    Args:
        weights: attention weights.
        queries: the tokens that look.
        keys: the tokens they look at.
    """
    heads, rows, columns = weights.shape
    width, height = 0.9 + 0.24 * columns, 0.9 + 0.24 * rows
    figure = Figure(figsize=(0.8 + width * heads, height), layout="constrained")
    for head, axes in enumerate(figure.subplots(1, heads, squeeze=False, sharey=True)[0]):
        axes.imshow(weights[head].cpu(), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"head {head + 1}", fontsize=9)
        axes.set_xticks(range(columns), keys, rotation=90, fontsize=8)
        axes.set_yticks(range(rows), queries, fontsize=8)
    return figure
