"""One call of C for a token, or for a prompt, through a decoder of LLaMA's architecture.

The architecture (pre-RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases) is that of LLaMA, Mistral,
SmolLM and most models that come as GGUF files. `fused.c` computes what `canon.language.llama` does, on packed weights:
single tokens at the speed of memory, prompts by products of 8-bit integers where the processor has them (AVX-512 VNNI).
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from canon.core import native
from canon.core.generation.cache import KVCache
from canon.core.nn.quantized import MatrixStruct, PackedMatrix, fast_integers

P, N = ctypes.c_void_p, ctypes.c_int64
NORMS, MATRICES = ("attention_norm", "feed_forward_norm"), ("qkv", "out", "gate_up", "down")
PROMPT = 512
"""Tokens that are read at once, at most: the working memory grows with them (5 MB for SmolLM2, and 1 KB for each token
of the past)."""
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
        compiled.prefill.argtypes = [ctypes.POINTER(ModelStruct), P, P, P, N, N, N, P, ctypes.c_int]
    return compiled


class FusedDecoder:
    """A decoder for one row of tokens.

    Weights are never rounded; keys and values are bfloat16, all else is float32. In prompts, queries and attention's
    weights are bfloat16, too, and inputs of the products are rounded to 8 bits, see `canon.core.nn.quantized`.

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
        self._decode, self._prefill = compiled.decode, compiled.prefill
        self._reads_prompts = fast_integers(compiled)
        final_norm = final_norm.detach()  # of a parameter, `module.to` would free the memory
        self._kept = (layers, final_norm, head)  # what the pointers below point to
        self._embedding, self._rotation, self._vocab_size = embedding, rotation.flatten(1), head.rows
        self._layers = (LayerStruct * len(layers))(
            *(LayerStruct(*(_pointer(layer[name]) for name in (*NORMS, *MATRICES))) for layer in layers)
        )
        sizes = (shape[name] for name in SHAPE)
        self._model = ModelStruct(*sizes, norm_eps, final_norm.data_ptr(), head.struct(), self._layers)

    def __call__(
        self, tokens: Int[Tensor, "batch time"], cache: KVCache, last_only: bool = False
    ) -> Float[Tensor, "1 1 vocab"] | None:
        """Logits of the token after ``tokens``, which are added to the cache.

        None, and nothing added, where PyTorch is what to compute with: several rows or none, a cache of another type,
        more positions than there are, the logits of every position of a prompt, or a prompt on a processor without fast
        products of integers.

        Raises:
            UserError: the tokens do not fit into the cache.
            MemoryError: there is not enough memory for the prompt.
        """
        past, time = cache.filled, tokens.shape[1]
        served = time == 1 or (last_only and self._reads_prompts)
        if not served or not tokens.numel() or len(tokens) > 1:
            return None
        memory = cache.reserve(time)
        if memory[0].dtype != torch.bfloat16 or len(memory[0]) > 1 or past + time > len(self._rotation):
            return None
        pointers = (P * len(memory))(*[slot.data_ptr() for slot in memory])
        logits = torch.empty(1, 1, self._vocab_size, dtype=torch.float32, device="cpu")
        threads, capacity = torch.get_num_threads(), memory[0].shape[2]
        for part in tokens.split(PROMPT, dim=1):
            x, rotation = self._embedding.take(part).contiguous(), self._rotation[past:]
            arguments = ctypes.byref(self._model), x.data_ptr(), rotation.data_ptr(), pointers, capacity, past
            past, size = past + part.shape[1], part.shape[1]
            wanted = logits.data_ptr() if past == cache.filled + time else None
            if size == time == 1:
                self._decode(*arguments, wanted, threads)
            elif self._prefill(*arguments, size, wanted, threads):
                raise MemoryError(f"not enough memory to read {time} tokens behind {cache.filled}")
        cache.advance(time)
        return logits


def _pointer(value: Tensor | PackedMatrix) -> int | MatrixStruct:
    return value.struct() if isinstance(value, PackedMatrix) else value.data_ptr()
