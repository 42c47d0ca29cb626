"""Released weights of Stable Diffusion and its relatives into our networks, from either layout.

One file holds all networks as they were trained (the CompVis layout); or a folder has a file for each (diffusers).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from canon.core.data.tokenizers import TOKENIZER_FILE, BPETokenizer
from canon.core.errors import UserError
from canon.core.hub.pretrained import (
    CONFIG_FILE,
    Names,
    Transform,
    from_plain,
    load_config,
    load_pretrained,
    load_weights,
    no_initialisation,
    resolve,
)
from canon.core.hub.tensors import load_tensors
from canon.images.clip.tokenizer import load_clip_tokenizer, published_tokenizer
from canon.images.clip.weights import HF_TEXT_NAMES, fuse_qkv
from canon.images.latent_diffusion.autoencoder import AutoencoderKL, AutoencoderVQ
from canon.images.latent_diffusion.model import PRESETS, Config, LatentDiffusion
from canon.images.latent_diffusion.unet import UNet

Modules = Mapping[str, str]
"""Published name of a module -> ours; ``{i}`` stands for a number on both sides."""

LATENT_SCALE = 0.18215
"""What the latents of Stable Diffusion v1 are multiplied by; no published file states it."""

SHIPPED = Path(__file__).parents[3] / "checkpoints" / "latent_diffusion-shapes" / "model"

# --- The parts of a checkpoint ----------------------------------------------------------------------------------------

PREFIXES = {
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
}
FILES = {
    "unet": "unet/diffusion_pytorch_model",
    "autoencoder": "vae/diffusion_pytorch_model",
    "text": "text_encoder/model",
}


def from_pretrained(source: str | Path) -> tuple[LatentDiffusion, BPETokenizer | None]:
    """A trained model and its tokenizer, if there is one beside it.

    Args:
        source: a folder of ours; or Stable Diffusion v1, its inpainting model too, in either layout, see `read_parts`.

    Raises:
        UserError: there is nothing there, it is damaged, or it is another model.
    """
    path = resolve(source)
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        model, _ = load_pretrained(path, "latent_diffusion", Config, LatentDiffusion, {}, _not_ours)
        return model, load_clip_tokenizer(path) if (path / TOKENIZER_FILE).is_file() else None
    parts = read_parts(path)
    config = published_config(parts["unet"])
    with no_initialisation():
        model = LatentDiffusion(config)
    load_parts(model, parts)
    return model.eval(), published_tokenizer()


def load_base(source: str = "") -> tuple[LatentDiffusion, BPETokenizer]:
    """A trained model to build on, and its tokenizer.

    Args:
        source: a run, or what `from_pretrained` takes; by default the model of shapes that comes with the repository.

    Raises:
        UserError: there is none.
    """
    folder = Path(source).expanduser() if source else SHIPPED
    folder = folder / "model" if (folder / "model").is_dir() else folder  # of a run
    if not folder.exists() and source.count("/") != 1:  # nor a repository on the hub
        made = "canon train latent_diffusion --preset shapes  makes one:  --base runs/latent_diffusion/NAME/model"
        raise UserError(f"there is no trained latent diffusion model {folder};  {made}")
    model, tokenizer = from_pretrained(folder if folder.exists() else source)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer.json: take the whole folder that a run wrote")
    return model, tokenizer


def load_base_of(folder: Path, base: str) -> LatentDiffusion:
    """What the model in ``folder`` was built upon: the shape of it where a run left that, else ``base`` itself.

    Raises:
        UserError: as :func:`load_base`, or the description is damaged.
    """
    if not (folder / "base").is_dir():
        return load_base(base)[0]
    shape = {key: value for key, value in load_config(folder / "base").items() if key != "system"}
    return LatentDiffusion(from_plain(Config, shape))


def _not_ours(settings: Mapping[str, object]) -> Config:
    raise UserError(
        f"a published {settings.get('model_type', settings.get('_class_name'))!r} alone is no latent diffusion model: "
        "give the folder above it, with unet/, vae/ and text_encoder/"
    )


def published_config(unet: Mapping[str, Tensor]) -> Config:
    """Stable Diffusion v1, or its inpainting model: the U-Net's first kernel tells which."""
    first = next((unet[name] for name in ("input_blocks.0.0.weight", "conv_in.weight") if name in unet), None)
    config = PRESETS["sd-v1"]
    if first is None or first.shape[0] != config.channels or first.shape[1] not in (4, 9):
        raise UserError("the U-Net is not that of Stable Diffusion v1 (320 channels, 4 or 9 of them given)")
    return replace(config, condition_channels=first.shape[1] - config.latent_channels)


def load_parts(model: LatentDiffusion, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy the published networks into a model.

    Raises:
        UserError: they do not fit.
    """
    load_unet(model.unet, parts["unet"])
    load_autoencoder(model.autoencoder, parts["autoencoder"])
    load_weights(model.text, fuse_qkv(parts["text"]), HF_TEXT_NAMES, what="the text encoder")
    model.latent_scale.fill_(LATENT_SCALE)


def read_parts(source: str | Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of ``unet``, ``autoencoder`` and ``text``, under their published names.

    Args:
        source: a ``.safetensors`` file in the CompVis layout, a folder in the diffusers layout, or a repository on the
            Hugging Face hub that is such a folder. The text encoder's names are those of ``transformers`` in both.

    Raises:
        UserError: there is nothing there, or a network is missing.
    """
    path = resolve(source)
    if path.is_dir():
        files = {part: (path / name).with_suffix(".safetensors") for part, name in FILES.items()}
        parts = {part: load_tensors(file) for part, file in files.items() if file.is_file()}
    else:
        parts = split(load_tensors(path))
    missing = [FILES[part] if path.is_dir() else PREFIXES[part] for part in PREFIXES if not parts.get(part)]
    if missing:
        raise UserError(f"{path} has no {missing[0]}: give a Stable Diffusion .safetensors file, or a diffusers folder")
    return parts


def split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts of one file; stored schedules and averaged weights belong to none."""
    return {
        part: {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for part, prefix in PREFIXES.items()
    }


def load_unet(unet: UNet, tensors: Mapping[str, Tensor]) -> None:
    """Copy published weights into a U-Net, from either layout.

    Raises:
        UserError: they do not fit.
    """
    n_levels = len(unet.up) // (unet.res_blocks + 1)
    compvis = any(name.startswith("input_blocks.") for name in tensors)
    modules = UNET_COMPVIS if compvis else unet_diffusers(n_levels, unet.res_blocks)
    load_weights(unet, tensors, names_of(modules), what="the U-Net")


def load_autoencoder(autoencoder: AutoencoderKL | AutoencoderVQ, tensors: Mapping[str, Tensor]) -> None:
    """Copy published weights into an autoencoder, from either layout; what trained it (``loss.*``) is left out.

    Raises:
        UserError: they do not fit.
    """
    compvis = any(".mid." in name for name in tensors)
    modules = autoencoder_compvis(len(autoencoder.decoder.up)) if compvis else AUTOENCODER_DIFFUSERS
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("loss.")}
    load_weights(autoencoder, kept, {**names_of(modules), **CODES}, what="the autoencoder")


# --- Names: published -> ours -----------------------------------------------------------------------------------------


def names_of(modules: Modules) -> Names:
    """Names of the weights and biases of modules."""
    table: dict[str, str | tuple[str, Transform]] = {}
    for theirs, ours in modules.items():
        # What some layouts store as a 1x1 convolution is a matrix in ours.
        matrix = ours.rpartition(".")[2] in ("proj_in", "proj_out", "q", "k", "v", "out")
        table[f"{theirs}.weight"] = (f"{ours}.weight", _matrix) if matrix else f"{ours}.weight"
        table[f"{theirs}.bias"] = f"{ours}.bias"
    return table


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _inside(theirs: str, ours: str, modules: Modules) -> Modules:
    return {f"{theirs}.{a}": f"{ours}.{b}" for a, b in modules.items()}


_QKV = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
_BLOCK = {
    "norm1": "self_attention_norm",
    **_inside("attn1", "self_attention", _QKV),
    "norm2": "cross_attention_norm",
    **_inside("attn2", "cross_attention", _QKV),
    "norm3": "feed_forward_norm",
    "ff.net.0.proj": "feed_forward.up",
    "ff.net.2": "feed_forward.out",
}
TRANSFORMER = {
    "norm": "norm",
    "proj_in": "proj_in",
    **_inside("transformer_blocks.{k}", "blocks.{k}", _BLOCK),
    "proj_out": "proj_out",
}

# CompVis: the U-Net's residual blocks, then the U-Net, whose stages are numbered as ours.
_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "shortcut",
}
UNET_COMPVIS = {
    "time_embed.0": "time1",
    "time_embed.2": "time2",
    "input_blocks.0.0": "down.0.resample",
    **_inside("input_blocks.{i}.0", "down.{i}.res", _RES),
    **_inside("input_blocks.{i}.1", "down.{i}.attention", TRANSFORMER),
    "input_blocks.{i}.0.op": "down.{i}.resample.conv",
    **_inside("middle_block.0", "middle.res1", _RES),
    **_inside("middle_block.1", "middle.attention", TRANSFORMER),
    **_inside("middle_block.2", "middle.res2", _RES),
    **_inside("output_blocks.{i}.0", "up.{i}.res", _RES),
    **_inside("output_blocks.{i}.1", "up.{i}.attention", TRANSFORMER),
    "output_blocks.{i}.1.conv": "up.{i}.resample.conv",  # where there is no Transformer
    "output_blocks.{i}.2.conv": "up.{i}.resample.conv",
    "out.0": "norm_out",
    "out.2": "conv_out",
}

# diffusers: the residual blocks of both networks, then the U-Net, whose stages are numbered level by level.
_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_emb_proj": "time",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "shortcut",
}


def unet_diffusers(n_levels: int, res_blocks: int) -> Modules:
    """A U-Net of so many levels, with so many residual blocks a level."""
    modules = {
        "time_embedding.linear_1": "time1",
        "time_embedding.linear_2": "time2",
        "conv_in": "down.0.resample",
        **_inside("mid_block.resnets.0", "middle.res1", _RESNET),
        **_inside("mid_block.attentions.0", "middle.attention", TRANSFORMER),
        **_inside("mid_block.resnets.1", "middle.res2", _RESNET),
        "conv_norm_out": "norm_out",
        "conv_out": "conv_out",
    }
    for level in range(n_levels):
        first = level * (res_blocks + 1)
        for i in range(res_blocks + 1):
            for theirs, ours in (("down_blocks", f"down.{first + i + 1}"), ("up_blocks", f"up.{first + i}")):
                modules |= _inside(f"{theirs}.{level}.resnets.{i}", f"{ours}.res", _RESNET)
                modules |= _inside(f"{theirs}.{level}.attentions.{i}", f"{ours}.attention", TRANSFORMER)
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"down.{first + res_blocks + 1}.resample.conv"
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"up.{first + res_blocks}.resample.conv"
    return modules


# The autoencoder in both layouts: levels, then halves, then the whole.
_OLD_QKV = {"query": "q", "key": "k", "value": "v", "proj_attn": "out"}  # as Stable Diffusion v1 was uploaded
_ATTENTION = {"group_norm": "norm", **_QKV, **_OLD_QKV}
_LEVEL = {
    **_inside("resnets.{i}", "blocks.{i}", _RESNET),
    **_inside("attentions.{i}", "attentions.{i}", _ATTENTION),
    "downsamplers.0.conv": "resample.conv",
    "upsamplers.0.conv": "resample.conv",
}
_HALF = {
    "conv_in": "conv_in",
    **_inside("down_blocks.{l}", "down.{l}", _LEVEL),
    **_inside("mid_block.resnets.0", "middle.0", _RESNET),
    **_inside("mid_block.attentions.0", "middle.1", _ATTENTION),
    **_inside("mid_block.resnets.1", "middle.2", _RESNET),
    **_inside("up_blocks.{l}", "up.{l}", _LEVEL),
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
_BETWEEN = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
CODES: Names = {"quantize.embedding.weight": "quantizer.codes"}
AUTOENCODER_DIFFUSERS = {**_inside("encoder", "encoder", _HALF), **_inside("decoder", "decoder", _HALF), **_BETWEEN}


def autoencoder_compvis(n_levels: int) -> Modules:
    """An autoencoder of so many levels, whose decoder counts them from the finest."""
    res = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "shortcut"}
    attention = {"norm": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"}
    level = {
        **_inside("block.{i}", "blocks.{i}", res),
        **_inside("attn.{i}", "attentions.{i}", attention),
        "downsample.conv": "resample.conv",
        "upsample.conv": "resample.conv",
    }
    half = {
        "conv_in": "conv_in",
        **_inside("down.{l}", "down.{l}", level),
        **_inside("mid.block_1", "middle.0", res),
        **_inside("mid.attn_1", "middle.1", attention),
        **_inside("mid.block_2", "middle.2", res),
        "norm_out": "norm_out",
        "conv_out": "conv_out",
    }
    for i in range(n_levels):
        half |= _inside(f"up.{i}", f"up.{n_levels - 1 - i}", level)
    return {**_inside("encoder", "encoder", half), **_inside("decoder", "decoder", half), **_BETWEEN}
