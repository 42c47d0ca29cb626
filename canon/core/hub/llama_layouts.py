"""How the weights of LLaMA-like models are published: Meta's release, Hugging Face's layout, GGUF.

The three differ in names, in the order of the rows that rotary positions turn in pairs, and in how they say the shape.
Everything here is plain: settings are dicts with the field names of `canon.language.llama.Config`, weights are dicts
with the names of its parameters.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from canon.core.errors import UserError
from canon.core.hub.gguf import GGUF, GGUFTensor
from canon.core.hub.pretrained import check_fit
from canon.core.hub.tensors import load_tensors

Layout = Literal["hugging_face", "meta", "gguf"]
Settings = dict[str, Any]
T = TypeVar("T")

SIZES = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
LARGEST = 1 << 24  # of any size: sixteen million, more than any published model says
SMALL_TABLE = 1 << 24  # numbers in a table of rotations that any file may ask for: 128k positions of heads of 128

LAYOUTS: tuple[Layout, ...] = ("hugging_face", "meta", "gguf")
LAYER_PREFIX = ("model.layers.{i}.", "layers.{i}.", "blk.{i}.")
# Ours -> the matrices that stand in it one above the other, by their names in the three layouts.
LAYER_NAMES = {
    "attention_norm": [("input_layernorm", "attention_norm", "attn_norm")],
    "attention.qkv": [
        ("self_attn.q_proj", "attention.wq", "attn_q"),
        ("self_attn.k_proj", "attention.wk", "attn_k"),
        ("self_attn.v_proj", "attention.wv", "attn_v"),
    ],
    "attention.out": [("self_attn.o_proj", "attention.wo", "attn_output")],
    "feed_forward_norm": [("post_attention_layernorm", "ffn_norm", "ffn_norm")],
    "feed_forward.gate_up": [
        ("mlp.gate_proj", "feed_forward.w1", "ffn_gate"),
        ("mlp.up_proj", "feed_forward.w3", "ffn_up"),
    ],
    "feed_forward.down": [("mlp.down_proj", "feed_forward.w2", "ffn_down")],
}
NAMES = {
    "token_embedding": [("model.embed_tokens", "tok_embeddings", "token_embd")],
    "final_norm": [("model.norm", "norm", "output_norm")],
    "head": [("lm_head", "output", "output")],
}
TURNED = ("q_proj.weight", "k_proj.weight")


# --- Names ------------------------------------------------------------------------------------------------------------


def names(n_layers: int, tied: bool, layout: Layout) -> dict[str, list[str]]:
    """Our weight -> the names of its parts in a layout, for all weights of a model."""
    column = LAYOUTS.index(layout)
    table = {f"{ours}.weight": [f"{part[column]}.weight" for part in parts] for ours, parts in NAMES.items()}
    for i in range(n_layers):
        prefix = LAYER_PREFIX[column].format(i=i)
        for ours, parts in LAYER_NAMES.items():
            table[f"blocks.{i}.{ours}.weight"] = [f"{prefix}{part[column]}.weight" for part in parts]
    if tied:
        table["head.weight"] = table["token_embedding.weight"]
    return table


def collect(tensors: Mapping[str, T], settings: Settings, layout: Layout, what: str) -> dict[str, list[T]]:
    """Our weight -> its parts.

    Raises:
        UserError: tensors are missing or left over; ``what`` names the checkpoint.
    """
    if settings["n_layers"] > len(tensors):  # so no table of names is longer than the file
        raise UserError(
            f"the weights of {what} do not fit: of {settings['n_layers']} layers most are missing, for there are "
            f"{len(tensors)} tensors; download it again"
        )
    table = names(settings["n_layers"], settings["tied"], layout)
    wanted = {name for parts in table.values() for name in parts}
    missing = sorted(wanted - tensors.keys())
    known = ("inv_freq", "rope.freqs", "lm_head.weight")  # a table of angles; a head stored again though it is tied
    left = sorted(name for name in tensors.keys() - wanted if not name.endswith(known))
    if missing or left:
        raise UserError(
            f"the weights of {what} do not fit: {len(missing)} missing {missing[:3]}, {len(left)} unexpected {left[:3]}"
        )
    return {ours: [tensors[name] for name in parts] for ours, parts in table.items()}


def check_context(context_length: int, d_head: int, tensors: Mapping[str, Tensor | GGUFTensor], what: str) -> None:
    """Refuse a context whose table of rotations would be larger than the model, for then the file lies.

    Raises:
        UserError: it would.
    """
    if context_length * d_head > max(SMALL_TABLE, sum(math.prod(tensor.shape) for tensor in tensors.values())):
        raise UserError(
            f"{what} says context_length is {context_length}, and its rotations would be larger than its weights: "
            "download it again"
        )


def check_shapes(own: Mapping[str, Tensor], parts: Mapping[str, Sequence[Tensor | GGUFTensor]], what: str) -> None:
    """Compare the parts of each weight, one above the other, with the ``state_dict`` of the model they are for.

    Raises:
        UserError: one is of another shape.
    """
    shapes = {}
    for name, tensors in parts.items():
        width = tuple(own[name].shape[1:])
        odd = [tuple(tensor.shape) for tensor in tensors if not tensor.shape or tuple(tensor.shape[1:]) != width]
        shapes[name] = odd[0] if odd else (sum(tensor.shape[0] for tensor in tensors), *width)
    check_fit(own, shapes, what=what)


def from_published(tensors: Mapping[str, Tensor], settings: Settings, layout: Layout, what: str) -> dict[str, Tensor]:
    """Published weights under our names and in our order.

    Raises:
        UserError: see `collect`.
    """
    if layout == "hugging_face":
        d_head = settings["d_model"] // settings["n_heads"]
        turned = {name: weight for name, weight in tensors.items() if name.endswith(TURNED)}
        for name, weight in turned.items():
            if weight.shape[0] % d_head:
                raise UserError(
                    f"the weights of {what} do not fit: {name} has {len(weight)} rows for heads of {d_head}"
                )
        tensors = {**tensors, **{name: halves_to_pairs(weight, d_head) for name, weight in turned.items()}}
    return {ours: torch.cat(parts) for ours, parts in collect(tensors, settings, layout, what).items()}


def to_hugging_face(weights: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """Our weights under the names and in the order of Hugging Face's `LlamaForCausalLM`."""
    d_head = settings["d_model"] // settings["n_heads"]
    heads = [settings["n_heads"], settings["n_kv_heads"], settings["n_kv_heads"]]
    published = {}
    for ours, parts in names(settings["n_layers"], settings["tied"], "hugging_face").items():
        weight = weights[ours]
        rows = [n * d_head for n in heads] if len(parts) == 3 else weight.shape[0] // len(parts)
        for name, part in zip(parts, weight.split(rows)):
            published[name] = pairs_to_halves(part, d_head) if name.endswith(TURNED) else part
    if settings["tied"]:
        published["lm_head.weight"] = published["model.embed_tokens.weight"]
    return published


def halves_to_pairs(weight: Float[Tensor, "rows d_model"], d_head: int) -> Float[Tensor, "rows d_model"]:
    """Rows of W_q or W_k from Hugging Face's order to the paper's.

    The paper turns neighbours (2i, 2i + 1); Hugging Face turns (i, i + d_head / 2), with the rows permuted to match.
    """
    return rearrange(weight, "(h two i) d -> (h i two) d", two=2, i=d_head // 2)


def pairs_to_halves(weight: Float[Tensor, "rows d_model"], d_head: int) -> Float[Tensor, "rows d_model"]:
    """The inverse of `halves_to_pairs`."""
    return rearrange(weight, "(h i two) d -> (h two i) d", two=2, i=d_head // 2)


# --- Settings ---------------------------------------------------------------------------------------------------------


def hugging_face_settings(published: Mapping[str, Any]) -> Settings:
    """From a ``config.json``.

    Raises:
        UserError: it is of another model, of a variant with biases, scaled rotations or another activation, or damaged.
    """
    scaling = published.get("rope_scaling") or published.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise UserError(f"the checkpoint's rope_scaling is {str(scaling)[:40]}, not an object: download it again")
    rope = scaling.get("rope_type", scaling.get("type", "default"))
    if published.get("model_type") != "llama":
        raise UserError(f"the checkpoint is a {published.get('model_type', 'unknown')!r}, not a 'llama'")
    if rope != "default" or published.get("attention_bias") or published.get("mlp_bias"):
        raise UserError(f"this LLaMA has biases or {rope!r} rotations, which the paper's model has not")
    if (activation := published.get("hidden_act", "silu")) != "silu":
        raise UserError(f"this LLaMA gates with {activation!r}, and the paper's model with 'silu'")
    try:
        settings = {
            "vocab_size": published["vocab_size"],
            "context_length": published.get("max_position_embeddings", 2048),
            "d_model": published["hidden_size"],
            "n_layers": published["num_hidden_layers"],
            "n_heads": published["num_attention_heads"],
            "n_kv_heads": published.get("num_key_value_heads") or published["num_attention_heads"],
            "d_ff": published["intermediate_size"],
            "norm_eps": published.get("rms_norm_eps", 1e-6),
            "rope_theta": published.get("rope_theta") or scaling.get("rope_theta", 10_000.0),
            "tied": bool(published.get("tie_word_embeddings", False)),
        }
    except KeyError as error:
        raise UserError(f"the checkpoint's config.json lacks {error}") from error
    return _checked(settings, "the checkpoint's config.json", published.get("head_dim"))


def gguf_settings(file: GGUF) -> Settings:
    """From the metadata of a GGUF file.

    Raises:
        UserError: the file holds another architecture, a variant of this one, or is damaged.
    """
    kind = file.metadata.get("general.architecture")
    if kind != "llama":
        raise UserError(f"{file.path} holds a {kind!r}, not a 'llama'")
    if "rope_freqs.weight" in file.tensors or "llama.rope.scaling.type" in file.metadata:
        raise UserError(f"{file.path} has scaled rotations, which the paper's model has not")

    def value(key: str, default: Any = None) -> Any:
        found = file.metadata.get(f"llama.{key}", default)
        if found is None:
            raise UserError(f"{file.path} lacks llama.{key}: the file is damaged, download it again")
        return found

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{file.path} lacks a matrix token_embd.weight: the file is damaged, download it again")
    n_heads = value("attention.head_count")
    settings = {
        "vocab_size": embedding.shape[0],
        "context_length": value("context_length"),
        "d_model": value("embedding_length"),
        "n_layers": value("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": value("attention.head_count_kv", n_heads),
        "d_ff": value("feed_forward_length"),
        "norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10_000.0),
        "tied": "output.weight" not in file.tensors,
    }
    settings = _checked(settings, str(file.path), value("rope.dimension_count", 0))
    # float32 in the file: back to the decimal number that was meant
    return settings | {"norm_eps": float(f"{settings['norm_eps']:.6g}")}


def read_meta(folder: Path) -> tuple[Settings, dict[str, Tensor]]:
    """Meta's release: ``params.json`` and ``consolidated.*.pth``, split over as many files as it ran on GPUs.

    Raises:
        UserError: it is not complete.
    """
    try:
        params = json.loads((folder / "params.json").read_bytes())
        shards = [load_tensors(path) for path in sorted(folder.glob("consolidated.*.pth"))]
        tensors = {name: _unsplit(name, [shard[name] for shard in shards]) for name in shards[0]}
        settings = {
            "vocab_size": tensors["tok_embeddings.weight"].shape[0],
            "d_model": params["dim"],
            "n_layers": params["n_layers"],
            "n_heads": params["n_heads"],
            "n_kv_heads": params.get("n_kv_heads", params["n_heads"]),
            "d_ff": tensors["layers.0.feed_forward.w1.weight"].shape[0],
            "norm_eps": params["norm_eps"],
            "rope_theta": params.get("rope_theta", 10_000.0),
            "tied": False,
        }
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder} is not a complete release of Meta's ({error!r:.160}); download it again") from error
    return _checked(settings, str(folder / "params.json"), None), tensors


def _unsplit(name: str, shards: list[Tensor]) -> Tensor:
    if "norm" in name or "rope" in name:  # the same in every file
        return shards[0]
    by_columns = name.endswith(("tok_embeddings.weight", "wo.weight", "w2.weight"))
    return torch.cat(shards, dim=1 if by_columns else 0)


def _checked(settings: Settings, what: str, d_head: Any) -> Settings:
    """The settings, once their numbers can be those of a model; ``what`` says where they stand."""
    for name in SIZES:
        size = settings.get(name, 1)  # Meta's release does not say its context
        if type(size) is not int or not 1 <= size <= LARGEST:
            raise UserError(f"{what} says {name} is {size!r:.40}, not a number from 1 to {LARGEST}: download it again")
    for name in ("norm_eps", "rope_theta"):
        number = settings[name]
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise UserError(f"{what} says {name} is {number!r:.40}, not a positive number: download it again")
        settings[name] = float(number)
    d_model, n_heads, n_kv_heads = (settings[name] for name in ("d_model", "n_heads", "n_kv_heads"))
    if d_model % (2 * n_heads) or n_heads % n_kv_heads:
        raise UserError(
            f"{what} says {n_heads} heads, {n_kv_heads} of them with keys, share a width of {d_model}, "
            "which does not divide evenly: download it again"
        )
    usual = d_model // n_heads
    if d_head and d_head != usual:
        raise UserError(f"this LLaMA has heads of {d_head}, not of d_model / n_heads = {usual}")
    return settings
