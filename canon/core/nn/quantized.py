"""Linear layers and embeddings whose weights stay in the 4- or 8-bit blocks of a GGUF file, for CPUs.

A block is a scale d (in Q4_1 also a minimum m), in float16, and 32 small integers q: w = d q + m. Decoding one token
reads every weight once, so its time is the number of bytes, and it is multiplied in float32. Several are limited by
arithmetic instead: they are rounded to 8 bits, 32 numbers sharing a scale, and those of a group that hides its others
behind an outlier to 16 (as LLM.int8() does with columns; Dettmers et al., 2022). On SmolLM2, logits are then about as
near to those of float32 as by bfloat16. Where the processor has no such products (AVX-512 VNNI), and where gradients
are wanted, a layer is unpacked to bfloat16 instead and multiplied as any other.

`quantized.c` describes the layout, in which 16 rows lie side by side. Nothing is rounded on the way into it.
"""

import ctypes
from functools import partial

import torch
from einops import rearrange
from jaxtyping import BFloat16, Float, Int, UInt8
from torch import Tensor, nn

from canon.core import native
from canon.core.hub.gguf import GGUFTensor

TYPES = {"Q4_1": (3, 20), "Q8_0": (8, 34)}
"""Type -> GGML's number of it, bytes of a block."""
LANES, GROUP = 16, 32
AT_ONCE = 1024
"""Vectors that are multiplied at once, so that results in float32 take little memory where another type is wanted."""


class MatrixStruct(ctypes.Structure):
    """`Matrix` of quantized.c."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


def fast_integers(library: ctypes.CDLL) -> bool:
    """Whether this processor multiplies 8-bit integers fast, as quantized.c was compiled for it."""
    return bool(ctypes.c_int.in_dll(library, "fast_integers").value)


def can_pack(*tensors: GGUFTensor) -> bool:
    """Whether these tensors, one above the other, can be a `PackedMatrix`."""
    rows = sum(tensor.shape[0] for tensor in tensors)
    kinds = {tensor.type for tensor in tensors}
    return len(kinds) == 1 and (kinds <= {"Q4_0", *TYPES}) and rows % LANES == 0


class PackedMatrix:
    """A matrix in blocks, laid out for `quantized.c`.

    Args:
        tensors: of one type (Q4_0, Q4_1 or Q8_0) and width; their rows are put one above the other.
        library: the compiled quantized.c.
    """

    def __init__(self, *tensors: GGUFTensor, library: ctypes.CDLL):
        self.library = library
        self.rows, self.columns = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
        self.type = "Q8_0" if tensors[0].type == "Q8_0" else "Q4_1"
        unpacked = [tensor.data.view(-1, self.columns // GROUP, tensor.layout.size) for tensor in tensors]
        blocks = torch.cat([_as_q4_1(part) if tensors[0].type == "Q4_0" else part for part in unpacked])
        self.data = _transpose(blocks, self.type)

    def struct(self) -> MatrixStruct:
        """For C; valid as long as this matrix lives."""
        return MatrixStruct(self.data.data_ptr(), TYPES[self.type][0], self.rows, self.columns)

    def transposed(self) -> BFloat16[Tensor, "columns rows"]:
        """The transpose, unpacked and rounded to bfloat16."""
        out = torch.empty(self.columns, self.rows, dtype=torch.bfloat16, device="cpu")
        matrix = self.struct()
        self.library.transpose_to_bf16(ctypes.byref(matrix), ctypes.c_void_p(out.data_ptr()), torch.get_num_threads())
        return out

    def times(self, x: Float[Tensor, " columns"]) -> Float[Tensor, " rows"]:
        """The product with one vector, in float32 throughout."""
        x, matrix = x.float().contiguous(), self.struct()
        y = torch.empty(self.rows, dtype=torch.float32, device="cpu")  # whatever the default is
        self.library.matvec(
            ctypes.byref(matrix), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), torch.get_num_threads()
        )
        return y

    def times_all(self, x: Float[Tensor, "vectors columns"]) -> Float[Tensor, "vectors rows"]:
        """The products with several vectors, which are rounded to 8 bits (in part to 16); of the type of ``x``.

        Raises:
            MemoryError: there is not enough of it.
        """
        matrix, threads = self.struct(), torch.get_num_threads()
        out = torch.empty(len(x), self.rows, dtype=x.dtype, device="cpu")
        for given, kept in zip(x.split(AT_ONCE), out.split(AT_ONCE)):
            given = given.float().contiguous()
            y = kept if kept.dtype == torch.float32 else torch.empty(kept.shape, dtype=torch.float32, device="cpu")
            pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, y))
            if self.library.matmul(ctypes.byref(matrix), *pointers, ctypes.c_int64(len(given)), threads):
                raise MemoryError(f"not enough memory to multiply {len(given)} vectors of {self.columns}")
            if y is not kept:
                kept.copy_(y)
        return out

    def take(self, rows: Int[Tensor, "..."]) -> Float[Tensor, "... columns"]:
        """Some rows, unpacked exactly."""
        tiles = self.data[rows // LANES].flatten(0, -3)  # (n, groups, bytes)
        lane = rows.flatten() % LANES
        pick = partial(_lane, lane=lane)
        if self.type == "Q4_1":
            words = tiles.view(torch.int32).unflatten(-1, (5, LANES))
            scale = pick(words[:, :, :1]).view(torch.float16).float()  # (n, groups, d and m)
            packed = pick(words[:, :, 1:]).view(torch.uint8)
            weights = torch.cat([packed & 15, packed >> 4], -1) * scale[..., :1] + scale[..., 1:]
        else:
            scale = pick(tiles[..., :32].contiguous().view(torch.float16)[:, :, None]).float()
            words = tiles[..., 32:].contiguous().view(torch.int32).unflatten(-1, (8, LANES))
            weights = pick(words).view(torch.int8) * scale
        return weights.reshape(*rows.shape, self.columns)


class QuantizedLinear(nn.Module):
    """y = W x. One vector is multiplied in float32, and so is the result; several by 8-bit integers, or with W unpacked
    to bfloat16, and their results are of the type of x.
    """

    def __init__(self, matrix: PackedMatrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        fits = x.shape[-1] == self.matrix.columns and x.numel()
        if fits and native.serves(x) and not (torch.is_grad_enabled() and x.requires_grad):
            if x.numel() == x.shape[-1]:
                return self.matrix.times(x.flatten()).view(*x.shape[:-1], -1)
            if fast_integers(self.matrix.library):
                return self.matrix.times_all(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return (x.bfloat16() @ self.matrix.transposed()).to(x.dtype)


class QuantizedEmbedding(nn.Module):
    """Rows of a packed matrix by number."""

    def __init__(self, matrix: PackedMatrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time columns"]:
        return self.matrix.take(tokens).bfloat16()


def _lane(words: Tensor, lane: Tensor) -> Tensor:
    """(n, groups, words, lanes) -> (n, groups, words) of the lane given for each n."""
    index = lane[:, None, None, None].expand(-1, *words.shape[1:3], 1)
    return words.gather(-1, index)[..., 0].contiguous()


def _as_q4_1(blocks: UInt8[Tensor, "rows groups 18"]) -> UInt8[Tensor, "rows groups 20"]:
    """Q4_0 is d (q - 8), so m = -8 d, which is exact: a power of two only moves the exponent."""
    scale = blocks[..., :2].contiguous().view(torch.float16)
    return torch.cat([blocks[..., :2], (-8 * scale).view(torch.uint8), blocks[..., 2:]], -1)


def _transpose(blocks: UInt8[Tensor, "rows groups bytes"], kind: str) -> UInt8[Tensor, "tiles groups tile_bytes"]:
    """Lay 16 rows side by side: the first words of their blocks, then the second, and so on."""

    def aligned(*shape: int) -> Tensor:  # to cache lines, as vectors are loaded
        size = torch.Size(shape).numel()
        memory = torch.empty(size + 63, dtype=torch.uint8, device="cpu")
        start = -memory.data_ptr() % 64
        return memory[start : start + size].view(shape)

    rows, groups, size = blocks.shape
    tiles = aligned(rows // LANES, groups, LANES * size)
    if kind == "Q4_1":
        words = rearrange(blocks.view(torch.int32), "(n r) g w -> n g w r", r=LANES)
        tiles.view(torch.int32).view(words.shape).copy_(words)
    else:  # two bytes of scale before the words
        scales = blocks[..., :2].contiguous().view(torch.int16)
        tiles[..., :32].view(torch.int16).copy_(rearrange(scales, "(n r) g 1 -> n g r", r=LANES))
        words = blocks[..., 2:].contiguous().view(torch.int32)
        words = rearrange(words, "(n r) g w -> n g (w r)", r=LANES)
        tiles[..., 32:].view(torch.int32).copy_(words)
    return tiles
