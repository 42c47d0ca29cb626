"""Decoding at the speed of memory: one call of C for one token through a decoder of LLaMA's architecture.

The architecture (pre-RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases) is that of LLaMA, Mistral,
SmolLM and most models that come as GGUF files. `fused.c` computes what `canon.language.llama` does, on packed weights.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from canon.core import native
from canon.core.generation.cache import KVCache
from canon.core.nn.quantized import MatrixStruct, PackedMatrix

P, N = ctypes.c_void_p, ctypes.c_int64
NORMS, MATRICES = ("attention_norm", "feed_forward_norm"), ("qkv", "out", "gate_up", "down")
SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff")


class LayerStruct(ctypes.Structure):
    """`Layer` of fused.c."""

    _fields_ = (*((name, P) for name in NORMS), *((name, MatrixStruct) for name in MATRICES))


class ModelStruct(ctypes.Structure):
    """`Model` of fused.c."""

    _fields_ = (
        *((name, N) for name in SHAPE),
        ("norm_eps", ctypes.c_float),
        ("final_norm", P),
        ("head", MatrixStruct),
        ("layers", ctypes.POINTER(LayerStruct)),
    )


def library() -> ctypes.CDLL | None:
    """The compiled fused.c; None where there is no C compiler."""
    compiled = native.load_c(Path(__file__).with_name("fused.c"))
    if compiled is not None:
        compiled.decode.argtypes = [ctypes.POINTER(ModelStruct), P, P, P, N, N, P, ctypes.c_int]
        compiled.decode.restype = None
    return compiled


class FusedDecoder:
    """A decoder for one row, one token at a time.

    Weights are unpacked to float32 exactly and activations are float32; keys and values are bfloat16.

    Args:
        compiled: of :func:`library`.
        shape: n_layers, d_model, n_heads, n_kv_heads, d_head (a multiple of 32) and d_ff.
        norm_eps: of every RMSNorm.
        layers: of each layer the gains attention_norm and feed_forward_norm (float32) and the packed matrices qkv,
            out, gate_up and down.
        embedding: rows are tokens.
        final_norm: gain of the last norm.
        head: rows are tokens.
        rotation: cosine and sine of each pair at each position.
    """

    def __init__(
        self,
        compiled: ctypes.CDLL,
        shape: Mapping[str, int],
        norm_eps: float,
        layers: Sequence[Mapping[str, Tensor | PackedMatrix]],
        embedding: PackedMatrix,
        final_norm: Float[Tensor, " d_model"],
        head: PackedMatrix,
        rotation: Float[Tensor, "context pairs 2"],
    ):
        self._decode = compiled.decode
        final_norm = final_norm.detach()  # of a parameter, `module.to` would free the memory
        self._kept = (layers, final_norm, head)  # what the pointers below point to
        self._embedding, self._rotation, self._vocab_size = embedding, rotation.flatten(1), head.rows
        self._layers = (LayerStruct * len(layers))(
            *(LayerStruct(*(_pointer(layer[name]) for name in (*NORMS, *MATRICES))) for layer in layers)
        )
        sizes = (shape[name] for name in SHAPE)
        self._model = ModelStruct(*sizes, norm_eps, final_norm.data_ptr(), head.struct(), self._layers)

    def __call__(self, tokens: Int[Tensor, "1 1"], cache: KVCache) -> Float[Tensor, "1 1 vocab"]:
        """Logits of the token after ``tokens``, which is added to the cache (of bfloat16)."""
        past = cache.filled
        memory = cache.reserve(1)
        pointers = (P * len(memory))(*[slot.data_ptr() for slot in memory])
        x = self._embedding.take(tokens).contiguous()
        logits = torch.empty(1, 1, self._vocab_size, dtype=torch.float32, device="cpu")
        self._decode(
            ctypes.byref(self._model),
            x.data_ptr(),
            self._rotation[past].data_ptr(),
            pointers,
            memory[0].shape[2],
            past,
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        cache.advance(1)
        return logits


def _pointer(value: Tensor | PackedMatrix) -> int | MatrixStruct:
    return value.struct() if isinstance(value, PackedMatrix) else value.data_ptr()
