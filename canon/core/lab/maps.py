"""Attention and rows of pictures as figures."""

from collections.abc import Sequence

from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from canon.core.lab.labels import TEXT, cut


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
        axes.set_xticks(range(columns), map(cut, keys), rotation=90, fontsize=8, **TEXT)
        axes.set_yticks(range(rows), map(cut, queries), fontsize=8, **TEXT)
    return figure


def picture_figure(
    images: Float[Tensor, "rows columns 3 height width"],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    size: float = 0.85,
) -> Figure:
    """Pictures in [-1, 1] in rows and columns with their names; a picture that is not a number stays empty.

    Args:
        images: the pictures.
        rows: names of the rows, on the left.
        columns: names of the columns, on top.
        size: of a picture, in inches.
    """
    many, wide = images.shape[:2]
    rows, columns = [cut(name) for name in rows], [cut(name) for name in columns]
    longest = max(map(len, rows), default=0)
    close = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(size * wide + 0.075 * longest, size * many + 0.25 * bool(columns)), layout=close)
    for row, line in enumerate(figure.subplots(many, wide, squeeze=False)):
        for column, axes in enumerate(line):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            picture = images[row, column].detach().float().cpu()
            if bool(picture.isfinite().all()):
                axes.imshow((picture.clamp(-1, 1).permute(1, 2, 0) + 1) / 2, interpolation="nearest")
            if row == 0 and columns:
                axes.set_title(columns[column], fontsize=7, pad=2, **TEXT)
            if column == 0 and rows:
                axes.set_ylabel(rows[row], rotation=0, ha="right", va="center", fontsize=8, **TEXT)
    return figure
