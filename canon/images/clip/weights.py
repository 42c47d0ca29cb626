"""Released weights: the names of OpenAI's archives and of Hugging Face's layout, and ours."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from canon.core.data.tokenizers import TOKENIZER_FILE, BPETokenizer
from canon.core.errors import UserError
from canon.core.hub.pretrained import (
    CONFIG_FILE,
    Names,
    load_config,
    load_pretrained,
    load_weights,
    no_initialisation,
    resolve,
)
from canon.core.hub.tensors import load_tensors
from canon.images.clip.model import CLIP, Config
from canon.images.clip.tokenizer import load_clip_tokenizer


def _both(names: Mapping[str, str]) -> Names:
    """The same names with ``.weight`` and with ``.bias``."""
    return {f"{theirs}.{end}": f"{ours}.{end}" for theirs, ours in names.items() for end in ("weight", "bias")}


def _under(theirs: str, ours: str, names: Names) -> Names:
    """The same names one level deeper."""
    return {f"{theirs}.{name}": f"{ours}.{to}" if isinstance(to, str) else to for name, to in names.items()}


def _scalar(scale: Tensor) -> Tensor:
    return scale.reshape(1)  # a number of its own cannot be sharded, so ours is a vector of one


# Hugging Face: its blocks have query, key and value apart; fuse_qkv puts them together first.

_HF_BLOCK = _both(
    {
        "layer_norm1": "attention_norm",
        "self_attn.qkv_proj": "qkv",
        "self_attn.out_proj": "out",
        "layer_norm2": "feed_forward_norm",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
    }
)
HF_TEXT_NAMES: Names = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "position_embedding.weight",
    "embeddings.position_ids": None,
    **_under("encoder.layers.{i}", "blocks.{i}", _HF_BLOCK),
    **_both({"final_layer_norm": "final_norm"}),
}
"""Of the text tower alone, as ``CLIPTextModel`` has it, with or without ``text_model.`` before each name."""

HF_NAMES: Names = {
    **_under("text_model", "text", HF_TEXT_NAMES),
    "vision_model.embeddings.class_embedding": "image.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "image.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight": "image.position_embedding.weight",
    "vision_model.embeddings.position_ids": None,
    **_both({"vision_model.pre_layrnorm": "image.pre_norm", "vision_model.post_layernorm": "image.post_norm"}),
    **_under("vision_model.encoder.layers.{i}", "image.blocks.{i}", _HF_BLOCK),
    "visual_projection.weight": "image_projection.weight",
    "text_projection.weight": "text_projection.weight",
    "logit_scale": ("logit_scale", _scalar),
}


def fuse_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors with ``q_proj``, ``k_proj`` and ``v_proj`` of each layer as one ``qkv_proj``."""
    fused = {}
    for name, tensor in tensors.items():
        part = re.search(r"\.([qkv])_proj\.", name)
        triple = [name.replace(part[0], f".{letter}_proj.") for letter in "qkv"] if part else []
        if part is None or not all(other in tensors for other in triple):
            fused[name] = tensor
        elif part[1] == "q":
            fused[name.replace(part[0], ".qkv_proj.")] = torch.cat([tensors[other] for other in triple])
    return fused


# OpenAI: projections are stored transposed; the ResNets' pool ends in the projection.

_BLOCK = {
    "attn.in_proj_weight": "qkv.weight",
    "attn.in_proj_bias": "qkv.bias",
    **_both(
        {
            "ln_1": "attention_norm",
            "attn.out_proj": "out",
            "ln_2": "feed_forward_norm",
            "mlp.c_fc": "up",
            "mlp.c_proj": "down",
        }
    ),
}
_TEXT: Names = {
    "token_embedding.weight": "text.token_embedding.weight",
    "positional_embedding": "text.position_embedding.weight",
    **_under("transformer.resblocks.{i}", "text.blocks.{i}", _BLOCK),
    **_both({"ln_final": "text.final_norm"}),
    "text_projection": ("text_projection.weight", "T"),
    "logit_scale": ("logit_scale", _scalar),
    **dict.fromkeys(("input_resolution", "context_length", "vocab_size", "attn_mask")),  # settings, and stored masks
}
OPENAI_VIT_NAMES: Names = {
    **_TEXT,
    "visual.class_embedding": "image.class_embedding",
    "visual.positional_embedding": "image.position_embedding.weight",
    "visual.conv1.weight": "image.patch_embedding.weight",
    **_both({"visual.ln_pre": "image.pre_norm", "visual.ln_post": "image.post_norm"}),
    **_under("visual.transformer.resblocks.{i}", "image.blocks.{i}", _BLOCK),
    "visual.proj": ("image_projection.weight", "T"),
}


def _convolutions(theirs: str, ours: str) -> Names:
    """Three convolutions and their norms."""
    kept = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norms = {f"{theirs}.bn{{n}}.{name}": f"{ours}.bn{{n}}.{name}" for name in kept}
    return {f"{theirs}.conv{{n}}.weight": f"{ours}.conv{{n}}.weight", **norms}


def _stage(number: int) -> Names:
    theirs, ours = f"visual.layer{number}.{{b}}", f"image.stages.{number - 1}.{{b}}"
    kept = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norms = {f"{theirs}.downsample.1.{name}": f"{ours}.shortcut.2.{name}" for name in kept}
    return {**_convolutions(theirs, ours), f"{theirs}.downsample.0.weight": f"{ours}.shortcut.1.weight", **norms}


OPENAI_RESNET_NAMES: Names = {
    **_TEXT,
    **_convolutions("visual", "image"),
    **{name: to for number in range(1, 5) for name, to in _stage(number).items()},
    "visual.attnpool.positional_embedding": "image.attention_pool.position_embedding.weight",
    **_both({f"visual.attnpool.{part}_proj": f"image.attention_pool.{part}" for part in "qkv"}),
    **_both({"visual.attnpool.c_proj": "image_projection"}),
}


def from_pretrained(source: str | Path) -> tuple[CLIP, BPETokenizer | None]:
    """A trained CLIP in evaluation mode, and its tokenizer if there is one beside it.

    Args:
        source: a folder of ours; one in Hugging Face's layout, or such a repository on its hub
            (``openai/clip-vit-base-patch32``); or a file of tensors under OpenAI's names (its released archives such
            as ``RN50.pt``, of which the program is not run; ``.safetensors``; a ``.pt`` of a state dict), to which
            :func:`published_tokenizer` belongs. LAION's models have the same names and sizes but another activation,
            which such a file does not tell: they are not for this function.

    Raises:
        UserError: there is nothing there, it is damaged, or it is another model.
    """
    path = resolve(source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and "system" in load_config(path):
        model, _ = load_pretrained(path, "clip", Config, CLIP, {}, config_from_settings)
    elif path.is_file() and "visual.conv1.weight" in (tensors := load_tensors(path)):
        model = _empty(config_from_shapes(tensors, str(path)))
        names = OPENAI_VIT_NAMES if "visual.proj" in tensors else OPENAI_RESNET_NAMES
        load_weights(model, tensors, names, what=f"{path}, loaded as 'clip',")
    else:
        model = _empty(config_from_settings(load_config(folder)))
        load_weights(model, fuse_qkv(load_tensors(path)), HF_NAMES, what=f"{path}, loaded as 'clip',")
    has_tokenizer = any((folder / name).is_file() for name in (TOKENIZER_FILE, "merges.txt"))
    return model.eval(), load_clip_tokenizer(folder) if has_tokenizer and (folder / CONFIG_FILE).is_file() else None


def _empty(config: Config) -> CLIP:
    with no_initialisation():
        return CLIP(config)


def config_from_shapes(tensors: Mapping[str, Tensor], what: str = "the checkpoint") -> Config:
    """The configuration that OpenAI's tensors have, of which only the shapes are looked at.

    Raises:
        UserError: a tensor is missing or has too few dimensions.
    """

    def count(pattern: str) -> int:
        """How many different numbers stand in names of this pattern."""
        return len({found[1] for name in tensors if (found := re.match(pattern, name))})

    try:
        if "visual.proj" in tensors:
            image_width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
            layers = (count(r"visual\.transformer\.resblocks\.(\d+)\."),)
            image_size = patch_size * round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
        else:
            image_width, patch_size = len(tensors["visual.layer1.0.conv1.weight"]), Config.patch_size
            layers = tuple(count(rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
            image_size = 32 * round((len(tensors["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        vocab_size, d_model = tensors["token_embedding.weight"].shape
        return Config(
            d_embedding=tensors["text_projection"].shape[1],
            image_size=image_size,
            image_layers=layers,
            image_width=image_width,
            image_heads=image_width * (1 if len(layers) == 1 else 32) // 64,  # heads of width 64 throughout
            patch_size=patch_size,
            vocab_size=vocab_size,
            context_length=len(tensors["positional_embedding"]),
            d_model=d_model,
            n_layers=count(r"transformer\.resblocks\.(\d+)\."),
            n_heads=d_model // 64,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{what} is not a whole CLIP ({error}): take a state dict of the model") from error


# What the towers of a published CLIP state, or leave out; others with this layout (LAION's) differ here.
FIXED = {"hidden_act": ("quick_gelu",), "layer_norm_eps": (1e-5,), "num_channels": (3,)}


def config_from_settings(settings: dict[str, Any]) -> Config:
    """The configuration of a ``config.json`` of Hugging Face's.

    Raises:
        UserError: it is another model, or one that computes something else.
    """
    if settings.get("model_type") != "clip":
        raise UserError(
            f"the checkpoint is a {settings.get('model_type')!r}, not a 'clip': load it with another system"
        )
    text = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 49_408}
    text = text | {"max_position_embeddings": 77} | (settings.get("text_config") or {})
    image = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    }
    image = image | (settings.get("vision_config") or {})
    for tower in (text, image):
        for name, values in (FIXED | {"intermediate_size": (4 * tower["hidden_size"],)}).items():
            if (value := tower.get(name, values[0])) not in values:
                raise UserError(f"the checkpoint has {name} {value!r}, and CLIP has {values[0]!r}: it is another model")
    if text.get("eos_token_id", 2) not in (2, text["vocab_size"] - 1):  # 2 stands in the oldest files, by mistake
        raise UserError(
            "the checkpoint's captions end with another token than the last of its vocabulary: it is not CLIP"
        )
    return Config(
        d_embedding=settings.get("projection_dim", 512),
        image_size=image["image_size"],
        image_layers=(image["num_hidden_layers"],),
        image_width=image["hidden_size"],
        image_heads=image["num_attention_heads"],
        patch_size=image["patch_size"],
        vocab_size=text["vocab_size"],
        context_length=text["max_position_embeddings"],
        d_model=text["hidden_size"],
        n_layers=text["num_hidden_layers"],
        n_heads=text["num_attention_heads"],
    )
