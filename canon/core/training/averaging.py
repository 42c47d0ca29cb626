"""A moving average of the weights, which generalises better than the last of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def update(average: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """average <- decay average + (1 - decay) weights (Polyak and Juditsky 1992, in its exponential form)."""
    for key, value in weights.items():
        if value.is_floating_point():
            average[key].lerp_(value.detach(), 1 - decay)
        else:
            average[key].copy_(value)


@contextmanager
def using(model: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """Swap the averaged weights in, if there are any, and the trained ones back afterwards."""
    if not average:
        yield
        return
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(average)
    try:
        yield
    finally:
        model.load_state_dict(trained)
