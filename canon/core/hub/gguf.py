"""Read GGUF, the single-file format of quantised language models (llama.cpp).

A file is a header, typed metadata, a table of tensors and their data, which this reader maps into memory: nothing is
read before it is used, and every length is checked against the bytes that are left before anything is allocated. The
`gguf` package reads the same files some thirty times slower, because it walks them in numpy; it stays the reference in
the tests and the fallback for the rarer quantisations.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

import mmap
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from canon.core.errors import UserError

Value = bool | int | float | str | list[str] | np.ndarray
"""A metadata value; arrays of numbers are numpy views into the file, arrays of strings are lists."""

MAX_DIMS = 4  # GGML_MAX_DIMS
# Values unpacked at a time: the intermediate results stay in the cache, and every operation is just too small for
# PyTorch to split it, so whole tensors can be unpacked side by side instead, without a barrier after each operation.
CHUNK = (1 << 15) - 256

SCALARS = {  # metadata value type -> struct and numpy format
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9


# --- Blocks: how each type packs its weights --------------------------------------------------------------------------
# Each function takes uint8 blocks (n, bytes of a block) and returns float32 (n, values of a block). The arithmetic is
# that of ggml-quants.c: products of a float16 scale and small integers are exact in float32, so the results agree
# bit for bit.


def _f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Low nibbles of all bytes, then high nibbles: (..., m) -> (..., 2 m)."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _q4_0(blocks: Tensor) -> Tensor:  # d, 16 bytes of nibbles:  w = d (q - 8)
    return _f16(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).view(torch.int8) - 8)


def _q4_1(blocks: Tensor) -> Tensor:  # d, m, 16 bytes of nibbles:  w = d q + m
    scale = _f16(blocks[:, :4])
    return scale[:, :1] * _nibbles(blocks[:, 4:]) + scale[:, 1:]


def _q8_0(blocks: Tensor) -> Tensor:  # d, 32 int8:  w = d q
    return _f16(blocks[:, :2]) * blocks[:, 2:].view(torch.int8)


def _q4_k(blocks: Tensor) -> Tensor:  # d, dmin, 8 six-bit (scale, min) in 12 bytes, 128 bytes of nibbles
    scale = _f16(blocks[:, :4])
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=1)
    mins = torch.cat([mid & 63, (high >> 4) | ((mid >> 2) & 48)], dim=1)
    q = _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 8, 32)
    weights = (scale[:, :1] * scales)[:, :, None] * q - (scale[:, 1:] * mins)[:, :, None]
    return weights.flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:  # 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, d
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).flatten(1)
    pairs = blocks[:, 128:192].unflatten(1, (2, 32))
    high = torch.cat([(pairs >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    q = (low | (high << 4)).view(torch.int8) - 32
    scales = _f16(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8)
    return (scales[:, :, None] * q.view(-1, 16, 16)).flatten(1)


@dataclass(frozen=True)
class BlockType:
    """How a GGML type stores weights: `values` of them in every `size` bytes."""

    name: str
    values: int
    size: int
    unpack: Callable[[Tensor], Tensor] | None


BLOCK_TYPES = {  # GGML type number -> layout
    0: BlockType("F32", 1, 4, lambda blocks: blocks.view(torch.float32)),
    1: BlockType("F16", 1, 2, _f16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    30: BlockType("BF16", 1, 2, lambda blocks: blocks.view(torch.bfloat16).float()),
}


def _block_type(number: int) -> BlockType | None:
    """Layout of a GGML type, from the `gguf` package for those not listed above; None if nobody knows it."""
    if number in BLOCK_TYPES:
        return BLOCK_TYPES[number]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # 0.2 s, so only for the rarer types

    try:
        known = GGMLQuantizationType(number)
    except ValueError:
        return None
    return BlockType(known.name, *GGML_QUANT_SIZES[known], unpack=None)


# --- The file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file, still packed.

    Attributes:
        name: as in the file, such as `blk.0.attn_q.weight`.
        shape: in PyTorch's order, slowest dimension first (the file's order reversed).
        type: the GGML type, such as `Q4_1`.
        data: its bytes, a view into the mapped file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: UInt8[Tensor, " bytes"]
    layout: BlockType

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
        """Unpack to a new tensor of `shape`; exact in float32, rounded from it for other types.

        Raises:
            UserError: the type is one that no reader unpacks.
        """
        values, size, unpack = self.layout.values, self.layout.size, self.layout.unpack
        if unpack is None:
            return self._dequantize_with_package().to(dtype)
        if values == 1:
            return unpack(self.data).to(dtype, copy=True).view(self.shape)
        blocks = self.data.view(-1, size)
        weights = torch.empty(len(blocks), values, dtype=dtype)
        step = CHUNK // values
        for start in range(0, len(blocks), step):
            weights[start : start + step] = unpack(blocks[start : start + step])
        return weights.view(self.shape)

    def _dequantize_with_package(self) -> Tensor:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = self.data.numpy().reshape(-1, self.layout.size)
        try:
            unpacked = dequantize(rows, GGMLQuantizationType[self.type])
        except NotImplementedError as error:
            raise UserError(
                f"{self.name}: weights of type {self.type} cannot be unpacked; use a file of Q8_0"
            ) from error
        return torch.from_numpy(np.array(unpacked)).view(self.shape)


class GGUF:
    """A GGUF file, mapped into memory.

    Attributes:
        path: where it lies.
        version: of the format, 2 or 3.
        metadata: key -> value; see `Value`.
        tensors: name -> tensor, in the file's order.

    Raises:
        UserError: the file cannot be opened, or is not an intact GGUF file; the line says what is wrong.
    """

    metadata: dict[str, Value]
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                # A private mapping: writable for PyTorch's sake, while the file itself can never change through it.
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:  # mmap's name for an empty file
            self._fail("it is empty")
        except OSError as error:
            raise UserError(f"cannot open {self.path}: {error.strerror}; check the path") from error
        self._position = 0

        magic, self.version = self._unpack("<4sI")
        if magic != b"GGUF":
            self._fail("it does not begin with GGUF")
        if self.version not in (2, 3):
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big") in (2, 3)
            self._fail("it is big-endian" if swapped else f"version {self.version} is not 2 or 3")
        n_tensors, n_values = self._unpack("<QQ")
        self.metadata = self._read_metadata(n_values)
        self.tensors = self._read_tensors(n_tensors)

    def load(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Unpack every tensor, on as many threads as PyTorch uses: name -> new tensor.

        Raises:
            UserError: a tensor is of a type that no reader unpacks.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return dict(zip(self.tensors, pool.map(lambda tensor: tensor.dequantize(dtype), self.tensors.values())))

    def _fail(self, what: str) -> NoReturn:
        raise UserError(f"{self.path} is not a GGUF file that can be read: {what}; download it again")

    # Every read goes through these two, so none can leave the file.

    def _take(self, size: int, what: str) -> int:
        """Advance by `size` bytes and return where they began."""
        start = self._position
        if size > len(self._bytes) - start:
            self._fail(f"{what} at byte {start} needs {size} bytes and {len(self._bytes) - start} are left")
        self._position = start + size
        return start

    def _unpack(self, form: str) -> tuple:
        return struct.unpack_from(form, self._bytes, self._take(struct.calcsize(form), "a field"))

    def _count(self, count: int, size: int, what: str) -> int:
        """Check that `count` items of at least `size` bytes can be in the rest of the file."""
        if count * size > len(self._bytes) - self._position:
            self._fail(f"{count} {what} cannot fit in the {len(self._bytes) - self._position} bytes that are left")
        return count

    def _strings(self, count: int) -> list[str]:
        """Read `count` strings: the one hot loop (100,000 of them in a vocabulary), so its checks are inline."""
        data, position, end = self._bytes, self._position, len(self._bytes)
        length_of = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(self._count(count, 8, "strings")):
                start = position + 8
                position = start + length_of(data, position)[0]
                if position > end:
                    self._fail(f"a string at byte {start} needs {position - start} bytes and {end - start} are left")
                strings.append(str(data[start:position], "utf-8"))
        except struct.error:
            self._fail("it ends within a string")
        except UnicodeDecodeError:
            self._fail(f"the string before byte {position} is not UTF-8")
        self._position = position
        return strings

    def _read_metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(self._count(count, 13, "metadata values")):  # 8 of key length, 4 of type, 1 of value
            (key,) = self._strings(1)
            if key in metadata:
                self._fail(f"the metadata key {key[:64]!r} appears twice")
            metadata[key] = self._read_value(key, *self._unpack("<I"))
        return metadata

    def _read_value(self, key: str, kind: int) -> Value:
        if kind == STRING:
            return self._strings(1)[0]
        if kind == ARRAY:
            kind, count = self._unpack("<IQ")
            if kind == STRING:
                return self._strings(count)
            if kind == ARRAY:
                self._fail(f"the metadata value {key[:64]!r} nests arrays")
            return self._numbers(key, kind, count)
        return self._numbers(key, kind, 1)[0].item()

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:
            self._fail(f"the metadata value {key[:64]!r} is of the unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        start = self._take(count * dtype.itemsize, f"the metadata value {key[:64]!r}")
        numbers = np.frombuffer(self._bytes, dtype, count, start)
        return numbers != 0 if kind == BOOL else numbers

    def _read_tensors(self, count: int) -> dict[str, GGUFTensor]:
        table = {}
        for _ in range(self._count(count, 24, "tensors")):  # 8 of name length, 4 of rank, 4 of type, 8 of offset
            (name,) = self._strings(1)
            (n_dims,) = self._unpack("<I")
            if name in table:
                self._fail(f"the tensor {name[:64]!r} appears twice")
            if n_dims > MAX_DIMS:
                self._fail(f"the tensor {name[:64]!r} has {n_dims} dimensions, more than {MAX_DIMS}")
            table[name] = (self._unpack(f"<{n_dims}Q"), *self._unpack("<IQ"))

        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            self._fail(f"general.alignment is {str(alignment)[:20]}, not a positive multiple of 8")
        base = -(-self._position // alignment) * alignment
        whole = torch.frombuffer(self._bytes, dtype=torch.uint8)

        tensors, ends = {}, {base: base}
        for name, (dims, kind, offset) in table.items():
            layout = _block_type(kind)
            if layout is None:
                self._fail(f"the tensor {name[:64]!r} is of the unknown type {kind}")
            row, numel = dims[0] if dims else 1, 1
            for size in dims:
                numel *= size  # Python's integers do not overflow
            if not numel or row % layout.values:
                self._fail(f"the tensor {name[:64]!r} of type {layout.name} cannot have the dimensions {dims}")
            start, n_bytes = base + offset, numel // layout.values * layout.size
            if offset % alignment:
                self._fail(f"the tensor {name[:64]!r} is not aligned to {alignment} bytes")
            if start + n_bytes > len(whole):
                self._fail(f"the tensor {name[:64]!r} ends at byte {start + n_bytes} and the file at {len(whole)}")
            if start in ends and ends[start] > start:
                self._fail(f"the tensor {name[:64]!r} overlaps another")
            ends[start] = start + n_bytes
            tensors[name] = GGUFTensor(name, dims[::-1], layout.name, whole[start : start + n_bytes], layout)

        spans = sorted(ends.items())
        for (_, end), (start, _) in pairwise(spans):
            if start < end:
                self._fail(f"two tensors overlap at byte {start}")
        return tensors
