"""Products of several vectors with packed matrices, by 8-bit integers."""

import platform
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from canon.core import native
from canon.core.hub.gguf import GGUF
from canon.core.nn import fused, quantized
from canon.core.nn.quantized import PackedMatrix, QuantizedLinear

COLUMNS = 96


def write(path: Path, kind: str, rows: int) -> tuple[Path, Tensor]:
    """A file with one random matrix, and what it holds according to the reference."""
    quantised = gguf.GGMLQuantizationType[kind]
    weight = np.random.default_rng(0).normal(0.1, 1, (rows, COLUMNS)).astype(np.float32)
    data = gguf.quants.quantize(weight, quantised)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, torch.from_numpy(gguf.quants.dequantize(data, quantised))


@pytest.fixture
def matrix(request, tmp_path, tmp_path_factory):
    """A packed matrix and what it holds; the parameter is its type, its rows, and a processor if not this one."""
    kind, rows, *processor = request.param
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        if processor:
            stack.callback(native.load_c.cache_clear)
            named = processor if platform.machine() == "x86_64" else []
            patch.setattr(native, "FLAGS", ((*named, "-fopenmp"),))
            patch.setattr(native, "cache_home", lambda: tmp_path_factory.getbasetemp() / processor[0])
            native.load_c.cache_clear()
        library = fused.library()
        assert library is not None
        path, dense = write(tmp_path / "w.gguf", kind, rows)
        yield PackedMatrix(GGUF(path).tensors["w"], library=library), dense


def vectors(count: int) -> Tensor:
    """Random ones; every third has an outlier in its second group, and the fourth is zero."""
    x = torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(count))
    x[::3, 40] = 25
    x[3:4] = 0
    return x


def rounded(x: Tensor, twice: bool = True) -> Tensor:
    """What quantized.c documents, written out: 8 bits a number, and 8 more where one number is most of a group."""
    groups = x.unflatten(-1, (-1, 32)).double()
    largest = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1)
    coarse = (groups / scale).round()
    fine = ((groups / scale - coarse) * 254).round() / 254
    outlier = 6 * largest.square() > 5 * groups.square().sum(-1, keepdim=True)
    return ((coarse + fine * (outlier & twice)) * scale).flatten(-2)


NATIVE = [("Q4_1", 48), ("Q4_0", 32), ("Q8_0", 48)]
OTHERS = [("Q4_1", 48, f"-march={name}") for name in ("haswell", "x86-64")]


@pytest.mark.parametrize("matrix", NATIVE + OTHERS, indirect=True)
@pytest.mark.parametrize("count", [2, 6, 7, 400])
def test_products_are_those_of_rounded_vectors(matrix, count):
    packed, dense = matrix
    x = vectors(count)
    error = (packed.times_all(x) - rounded(x) @ dense.double().T).abs()
    # A number halfway between two integers may go either way.
    assert error.max() <= 1.01 * 25 / 127 * dense.abs().max()
    assert (error < 2e-5 * (x.abs().double() @ dense.abs().double().T) + 1e-6).float().mean() > 0.99


@pytest.mark.parametrize("matrix", NATIVE, indirect=True)
def test_an_outlier_does_not_hide_its_group(matrix):
    packed, dense = matrix
    x = vectors(60)[::3]
    exact = x.double() @ dense.double().T
    ours = (packed.times_all(x) - exact).std()
    assert ours < 0.25 * (rounded(x, twice=False) @ dense.double().T - exact).std()
    assert ours < (x.bfloat16().double() @ dense.bfloat16().double().T - exact).std()


@pytest.mark.parametrize("matrix", NATIVE[:1], indirect=True)
def test_threads_and_neighbours_change_nothing(matrix):
    packed, _ = matrix
    x, before = vectors(400), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed.times_all(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(packed.times_all(x[7:9]), results[0][7:9])  # beside others, in another block


@pytest.mark.parametrize("matrix", NATIVE[:1] + OTHERS[-1:], indirect=True)
def test_what_is_no_number_stays_none_and_alone(matrix):
    packed, _ = matrix
    x = vectors(9)
    x[4, 50], x[6, 3] = torch.nan, torch.inf
    wrong = packed.times_all(x).isfinite().logical_not()
    assert wrong[[4, 6]].all()
    assert not wrong[[0, 1, 2, 3, 5, 7, 8]].any()


@pytest.mark.parametrize("matrix", NATIVE[:1] + OTHERS[-1:], indirect=True)
@pytest.mark.parametrize("size", [1e-44, 3e-39, 1e-37, 1e-30, 1e30])
def test_tiny_and_huge_numbers_are_numbers(matrix, size):
    packed, dense = matrix
    y, exact = packed.times_all(vectors(9) * size), vectors(9) @ dense.T
    assert y.isfinite().all()
    error = (y.double() / size - exact).abs().max()
    assert error < (0.02 * exact.abs().max() if size > 1e-34 else 1.01 * exact.abs().max())  # the smallest become 0


@pytest.mark.parametrize("matrix", NATIVE[:1], indirect=True)
def test_many_vectors_are_multiplied_some_at_a_time(matrix, monkeypatch):
    packed, _ = matrix
    x = vectors(50)
    whole = packed.times_all(x), packed.times_all(x.bfloat16())
    monkeypatch.setattr(quantized, "AT_ONCE", 16)
    assert torch.equal(packed.times_all(x), whole[0])
    assert torch.equal(packed.times_all(x.bfloat16()), whole[1])
    assert packed.times_all(x[:0]).shape == (0, 48)


@pytest.mark.parametrize("matrix", NATIVE, indirect=True)
def test_a_layer_of_any_shape_with_and_without_gradients(matrix):
    packed, dense = matrix
    layer, x = QuantizedLinear(packed), torch.randn(2, 3, COLUMNS)
    expected = x @ dense.T
    for given in (x, x.bfloat16(), x.clone().requires_grad_()):
        y = layer(given)
        assert y.shape == expected.shape
        assert (y.float() - expected).abs().max() < 0.02 * expected.abs().max()
    assert layer(x).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 3, len(dense))
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, COLUMNS // 2))
