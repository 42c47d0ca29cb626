"""Released weights into a model of LLaMA's architecture: unpacked, or left packed to be used fast on a CPU."""

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from canon.core.data.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer
from canon.core.device import bf16_pays, pick_device
from canon.core.errors import UserError
from canon.core.hub import llama_layouts as layouts
from canon.core.hub.gguf import GGUF, GGUFTensor
from canon.core.hub.pretrained import load_config, load_pretrained, load_weights, no_initialisation, resolve
from canon.core.hub.tensors import load_tensors
from canon.core.hub.tokenizer import gguf_tokenizer
from canon.core.nn import fused
from canon.core.nn.quantized import PackedMatrix, QuantizedEmbedding, QuantizedLinear, can_pack

Precision = Literal["fast", "exact"]
T = TypeVar("T", Tensor, GGUFTensor)


class Kind:
    """What to load into: the configuration and the model class of ``canon.language.llama``, or of its like.

    Args:
        config: made from keyword arguments, which are the settings of `llama_layouts`.
        model: made from a config; has ``set_rotations()``, and ``fused``, which is a `FusedDecoder` or None.
    """

    def __init__(self, config: type[Any], model: Callable[[Any], Any]):
        self.config, self.model = config, model


def load_llama(source: str | Path, precision: Precision, kind: Kind) -> tuple[Any, Tokenizer | None]:
    """A trained model of LLaMA's architecture and its tokenizer.

    Args:
        source: a folder of ours, one in Hugging Face's or Meta's layout, a GGUF file, an asset
            (``smollm2-135m-instruct``), or a repository on the Hugging Face hub.
        precision: ``exact`` computes in float32. ``fast`` is for using the model: packed weights stay packed on a CPU
            (see `canon.core.nn.fused`; what they multiply in prompts is rounded to 8 bits), other weights are in
            bfloat16 where that is faster; it differs from ``exact`` where the two best logits are within rounding.
        kind: what to load into.

    Raises:
        UserError: there is nothing there, it is damaged, or it is not a LLaMA.
    """
    path = resolve(source)
    folder, what = path if path.is_dir() else path.parent, f"{path}, loaded as 'llama',"
    if path.suffix == ".gguf":
        file = GGUF(path)
        settings, tokenizer = layouts.gguf_settings(file), gguf_tokenizer(file.metadata)
        if tokenizer.vocab_size > settings["vocab_size"]:
            raise UserError(
                f"{path} has {tokenizer.vocab_size} tokens and rows for {settings['vocab_size']}: download it again"
            )
        model, parts = _empty(kind, settings, file.tensors, "gguf", what)
        packs = precision == "fast" and pick_device().type == "cpu" and _packs(settings, parts)
        if packs and (compiled := fused.library()):
            return _packed(model, parts, compiled).eval(), tokenizer
        return _rounded(_filled(model, settings, file.load(), "gguf", what), precision), tokenizer

    tokenizer = load_tokenizer(folder) if (folder / TOKENIZER_FILE).is_file() else None
    if (folder / "params.json").is_file():
        settings, tensors = layouts.read_meta(folder)
        model, _ = _empty(kind, settings, tensors, "meta", what)
        model = _filled(model, settings, tensors, "meta", what)
    elif "system" in (published := load_config(folder)):
        model, tokenizer = load_pretrained(path, "llama", kind.config, kind.model, {}, layouts.hugging_face_settings)
    else:
        settings, tensors = layouts.hugging_face_settings(published), load_tensors(path)
        model, _ = _empty(kind, settings, tensors, "hugging_face", what)
        model = _filled(model, settings, tensors, "hugging_face", what)
    return _rounded(model, precision), tokenizer


def published_weights(model: nn.Module, config: object) -> dict[str, Tensor]:
    """The weights of a model under the names and in the order of Hugging Face's `LlamaForCausalLM`."""
    return layouts.to_hugging_face(model.state_dict(), vars(config))


def _empty(
    kind: Kind, settings: layouts.Settings, tensors: Mapping[str, T], layout: layouts.Layout, what: str
) -> tuple[Any, dict[str, list[T]]]:
    """A model without memory, and the parts of each of its weights, which fit it: what a file says of itself may lie.

    Raises:
        UserError: tensors are missing, left over or of another shape, or the context is out of proportion.
    """
    parts = layouts.collect(tensors, settings, layout, what)
    config = kind.config(**settings)
    layouts.check_context(config.context_length, config.d_head, tensors, what)
    with torch.device("meta"), no_initialisation():
        model = kind.model(config)
    layouts.check_shapes(model.state_dict(), parts, what)
    return model, parts


def _filled(
    model: Any, settings: layouts.Settings, tensors: Mapping[str, Tensor], layout: layouts.Layout, what: str
) -> Any:
    """The model of `_empty` in float32 with the given weights."""
    weights = layouts.from_published(tensors, settings, layout, what)
    model.to_empty(device="cpu")
    model.set_rotations()
    if settings["tied"]:
        model.head.weight = model.token_embedding.weight
    load_weights(model, weights, what=what)
    return model.eval()


def _rounded(model: nn.Module, precision: Precision) -> nn.Module:
    return model.to(torch.bfloat16) if precision == "fast" and bf16_pays(pick_device()) else model


def _packs(settings: layouts.Settings, parts: Mapping[str, list[GGUFTensor]]) -> bool:
    """Whether fused.c can run these weights."""
    matrices = [tensors for name, tensors in parts.items() if "norm" not in name]
    return settings["d_model"] // settings["n_heads"] % 32 == 0 and all(can_pack(*tensors) for tensors in matrices)


def _packed(model: Any, parts: Mapping[str, list[GGUFTensor]], compiled: ctypes.CDLL) -> Any:
    """The model of `_empty` with its linear layers and embedding packed; norms stay in float32."""
    model.set_rotations()
    config = model.config
    packed: dict[str, PackedMatrix] = {}
    layers: list[dict[str, Tensor | PackedMatrix]] = [{} for _ in range(config.n_layers)]
    for name, tensors in parts.items():
        path, _, part = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(path)
        if "norm" in part:
            value = tensors[0].dequantize()
            getattr(parent, part).weight = nn.Parameter(value, requires_grad=False)
        else:
            value = packed.get(tensors[0].name) or PackedMatrix(*tensors, library=compiled)
            packed[tensors[0].name] = value
            setattr(parent, part, (QuantizedEmbedding if part == "token_embedding" else QuantizedLinear)(value))
        if path.startswith("blocks."):
            layers[int(path.split(".")[1])][part] = value
    embedding, head = (packed[parts[f"{name}.weight"][0].name] for name in ("token_embedding", "head"))
    shape = {name: getattr(config, name) for name in fused.SHAPE}
    model.fused = fused.FusedDecoder(
        compiled, shape, config.norm_eps, layers, embedding, model.final_norm.weight, head, model.rotation
    )
    return model
