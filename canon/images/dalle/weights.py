"""Weights in and out: ours, and the released dVAE (its Transformer never was)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from canon.core.data.tokenizers import BPETokenizer
from canon.core.errors import UserError
from canon.core.hub.pretrained import Names, load_pretrained, load_weights, no_initialisation
from canon.core.hub.tensors import load_tensors
from canon.images.dalle.config import Config
from canon.images.dalle.dvae import DVAE
from canon.images.dalle.model import DALLE


def from_pretrained(source: str | Path) -> tuple[DALLE, BPETokenizer | None]:
    """A trained model in evaluation mode, and its tokenizer if there is one beside it, from a folder that a run wrote.

    Raises:
        UserError: there is nothing there, it is damaged, or it is another model.
    """
    model, tokenizer = load_pretrained(source, "dalle", Config, DALLE, {}, _from_published)
    return model, tokenizer if isinstance(tokenizer, BPETokenizer) else None


def _from_published(settings: dict[str, Any]) -> Config:
    raise UserError(
        f"a published {settings.get('model_type')!r} is not DALL-E, whose Transformer is not public: give the folder "
        "of a run (for the released dVAE there is released_dvae)"
    )


def released_dvae(folder: str | Path) -> DVAE:
    """The released dVAE in evaluation mode, from ``encoder.safetensors`` and ``decoder.safetensors``.

    They hold the state dicts of the two released modules under their own names, such as
    ``blocks.group_1.block_1.res_path.conv_1.w``. The released files themselves, ``encoder.pkl`` and ``decoder.pkl``,
    are pickled programs, which are never loaded here: whoever trusts them can do so elsewhere and save what
    ``state_dict()`` gives with ``safetensors.torch.save_file``.

    Raises:
        UserError: a file is missing or damaged, or its tensors are of another model.
    """
    folder = Path(folder)
    parts = {part: load_tensors(folder / f"{part}.safetensors") for part in ("encoder", "decoder")}
    config = config_from_shapes(parts["encoder"], f"{folder / 'encoder.safetensors'}")
    with no_initialisation():
        model = DVAE(config)
    networks: dict[str, nn.Module] = {"encoder": model.encoder, "decoder": model.decoder}
    for part, network in networks.items():
        names = released_names(config.dvae_groups, config.dvae_blocks)
        load_weights(network, parts[part], names, what=f"{folder / part}.safetensors, the {part} of a dVAE,")
    return model.eval()


def released_names(groups: int, blocks: int) -> Names:
    """Released name -> ours, for the encoder and the decoder alike."""
    layers = {"input": "input", "output.conv": "output"}
    for group in range(groups):
        for block in range(blocks):
            theirs, ours = f"group_{group + 1}.block_{block + 1}", f"groups.{group}.{block}"
            layers[f"{theirs}.id_path"] = f"{ours}.shortcut"
            for number in range(4):
                layers[f"{theirs}.res_path.conv_{number + 1}"] = f"{ours}.convolutions.{number}"
    kinds = (("w", "weight"), ("b", "bias"))
    return {f"blocks.{layer}.{a}": f"{ours}.{b}" for layer, ours in layers.items() for a, b in kinds}


def config_from_shapes(encoder: Mapping[str, Tensor], what: str = "the checkpoint") -> Config:
    """The configuration that the tensors of a released encoder have; that of the Transformer is the paper's.

    Raises:
        UserError: they are not those of a dVAE's encoder.
    """
    found = [re.fullmatch(r"blocks\.group_(\d+)\.block_(\d+)\..*", name) for name in encoder]
    try:
        return Config(
            codebook_size=encoder["blocks.output.conv.w"].shape[0],
            dvae_width=encoder["blocks.input.w"].shape[0],
            dvae_groups=max(int(match[1]) for match in found if match),
            dvae_blocks=max(int(match[2]) for match in found if match),
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{what} is not the encoder of a dVAE ({error}): take the released module's state dict"
        ) from error
