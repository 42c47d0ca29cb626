"""The GGUF reader against the `gguf` package, and against every kind of damage."""

import resource
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from canon.core.errors import UserError
from canon.core.hub.gguf import BLOCK_TYPES, GGUF

LISTED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"]


def packed(kind: GGMLQuantizationType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks: every bit pattern is a possible block, infinities and nan among the scales included."""
    values, size = GGML_QUANT_SIZES[kind]
    return np.random.default_rng(seed).integers(0, 256, (rows, columns // values * size), dtype=np.uint8)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]], **metadata) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("small.number", 7)
    writer.add_array("some.words", ["a", "", "ünïcode", "Ġthe"])
    writer.add_array("some.numbers", [1, -2, 3])
    for add, (key, value) in metadata.items():
        getattr(writer, add)(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_file(path: Path) -> Path:
    return write(
        path,
        {
            "a.weight": (packed(GGMLQuantizationType.Q4_1, 3, 64), GGMLQuantizationType.Q4_1),
            "b.weight": (packed(GGMLQuantizationType.Q8_0, 2, 32), GGMLQuantizationType.Q8_0),
            "c.weight": (np.arange(6, dtype=np.float32), GGMLQuantizationType.F32),
        },
    )


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_file(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "damaged.gguf"


# --- What it reads ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value")  # the package's, on scales of infinity
@pytest.mark.parametrize("name", LISTED)
def test_unpacks_bit_for_bit(name: str, tmp_path: Path):
    kind = GGMLQuantizationType[name]
    data = packed(kind, rows=37, columns=2048)  # more than one chunk
    expected = gguf.quants.dequantize(data, kind)
    tensor = GGUF(write(tmp_path / "w.gguf", {"w": (data, kind)})).tensors["w"]
    ours = tensor.dequantize()
    assert (tensor.type, tensor.shape, ours.dtype) == (name, (37, 2048), torch.float32)
    number = ~np.isnan(expected)
    assert number.mean() > 0.8
    assert np.array_equal(ours.numpy().view(np.int32)[number], expected.view(np.int32)[number])
    assert np.isnan(ours.numpy()[~number]).all()
    assert torch.equal(tensor.dequantize(torch.bfloat16).nan_to_num(), ours.to(torch.bfloat16).nan_to_num())


@pytest.mark.parametrize("name", ["Q5_0", "Q3_K", "IQ4_NL"])
def test_rarer_types_go_through_the_package(name: str, tmp_path: Path):
    kind = GGMLQuantizationType[name]
    assert kind not in BLOCK_TYPES
    data = packed(kind, 2, 256)
    tensor = GGUF(write(tmp_path / "w.gguf", {"w": (data, kind)})).tensors["w"]
    assert np.array_equal(tensor.dequantize().numpy(), gguf.quants.dequantize(data, kind), equal_nan=True)


def test_a_type_that_nobody_unpacks_is_one_line(tmp_path: Path):
    file = GGUF(write(tmp_path / "w.gguf", {"w": (np.arange(8, dtype=np.int32), GGMLQuantizationType.I32)}))
    with pytest.raises(UserError, match="w: weights of type I32 cannot be unpacked"):
        file.load()


def test_metadata_of_every_type(tmp_path: Path):
    values = {
        "add_uint8": ("u8", 255), "add_int8": ("i8", -128), "add_uint16": ("u16", 65535), "add_int16": ("i16", -32768),
        "add_uint32": ("u32", 2**32 - 1), "add_int32": ("i32", -(2**31)), "add_uint64": ("u64", 2**64 - 1),
        "add_int64": ("i64", -(2**63)), "add_float32": ("f32", 0.5), "add_float64": ("f64", 0.1),
        "add_bool": ("bool", True), "add_string": ("string", "naïve\n𝄞"), "add_array": ("flags", [True, False]),
    }  # fmt: skip
    metadata = GGUF(write(tmp_path / "m.gguf", {}, **values)).metadata
    for key, value in values.values():
        found = metadata[key].tolist() if isinstance(metadata[key], np.ndarray) else metadata[key]
        assert (found, type(found)) == (value, type(value)), key
    assert metadata["general.architecture"] == "llama"
    assert metadata["some.words"] == ["a", "", "ünïcode", "Ġthe"]
    assert metadata["some.numbers"].tolist() == [1, -2, 3]


def test_shape_is_in_pytorch_order(tmp_path: Path):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensor = GGUF(write(tmp_path / "s.gguf", {"w": (values, GGMLQuantizationType.F32)})).tensors["w"]
    assert torch.equal(tensor.dequantize(), torch.from_numpy(values))


def test_unpacked_tensors_are_new_and_the_packed_ones_views(tmp_path: Path):
    path = small_file(tmp_path / "small.gguf")
    before = path.read_bytes()
    file = GGUF(path)
    first = file.tensors["c.weight"]
    first.dequantize().fill_(3)
    assert first.dequantize().tolist() == [0, 1, 2, 3, 4, 5]
    assert bytes(first.data) == np.arange(6, dtype=np.float32).tobytes()
    first.data.fill_(0)  # a private mapping: the file keeps its bytes
    assert path.read_bytes() == before


def test_reads_version_2(valid: bytes, target: Path):
    target.write_bytes(valid[:4] + struct.pack("<I", 2) + valid[8:])
    assert GGUF(target).version == 2


def test_load_unpacks_everything(tmp_path: Path):
    file = GGUF(small_file(tmp_path / "small.gguf"))
    loaded = file.load(torch.bfloat16)
    assert list(loaded) == ["a.weight", "b.weight", "c.weight"]
    for name, tensor in loaded.items():
        assert torch.equal(tensor.nan_to_num(), file.tensors[name].dequantize(torch.bfloat16).nan_to_num())


# --- Damage -----------------------------------------------------------------------------------------------------------


def outcome(path: Path, data: bytes) -> str:
    """Open and unpack: 'read', or the one line of a UserError; anything else fails the test."""
    path.write_bytes(data)
    tracemalloc.start()
    started = time.process_time()
    try:
        file = GGUF(path)
        for tensor in file.tensors.values():
            assert tensor.data.numel() <= len(data)
        file.load()
        said = "read"
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        assert path.name in said or "cannot be unpacked" in said
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(data) + (8 << 20), f"{peak} bytes for a file of {len(data)}"
    assert time.process_time() - started < 5
    return said


FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(body=st.binary(max_size=400), counts=st.tuples(st.integers(0, 3), st.integers(0, 3)))
@example(body=b"", counts=(0, 0))
def test_arbitrary_bytes(target: Path, body: bytes, counts: tuple[int, int]):
    outcome(target, body)
    outcome(target, b"GGUF" + struct.pack("<IQQ", 3, *counts) + body)


def test_truncated_at_every_byte(valid: bytes, target: Path):
    for length in range(len(valid) - 8):  # the last tensor ends 8 bytes before the padding does
        said = outcome(target, valid[:length])
        assert said != "read", f"{length} of {len(valid)} bytes were read without complaint"
    assert outcome(target, valid) == "read"


@FUZZ
@given(data=st.data())
def test_flipped_bits(valid: bytes, target: Path, data: st.DataObject):
    damaged = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(valid) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    outcome(target, bytes(damaged))


LIES = [0, 5, 2**31, 2**40, 2**63, 2**64 - 1]


@pytest.mark.parametrize("lie", LIES)
def test_every_field_overwritten(valid: bytes, target: Path, lie: int):
    for offset in range(4, valid.index(b"c.weight") + 32):  # from the version to the last tensor's offset
        width = "<Q" if offset % 2 else "<I"
        field = struct.pack(width, lie & (2**64 - 1 if width == "<Q" else 2**32 - 1))
        outcome(target, valid[:offset] + field + valid[offset + len(field) :])


def header(n_tensors: int, metadata: bytes = b"", n_values: int = 0, tensors: bytes = b"", data: bytes = b"") -> bytes:
    start = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + metadata + tensors
    return start + bytes(-len(start) % 32) + data


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def value(key: str, kind: int, body: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + body


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQI", 4, 1, 7)


DAMAGE = {
    "it is empty": b"",
    "does not begin with GGUF": b"GGML" + bytes(60),
    "version 1 is not 2 or 3": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "it is big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "18446744073709551615 tensors cannot fit": header(2**64 - 1),
    "4611686018427387904 metadata values cannot fit": header(0, n_values=2**62),
    "strings cannot fit": header(0, value("k", 9, struct.pack("<IQ", 8, 2**61)), 1),
    "nests arrays": header(0, value("k", 9, nested(1)), 1),
    "'k' nests arrays": header(0, value("k", 9, nested(10_000)), 1),
    "'k' at byte .* needs 8589934592 bytes": header(0, value("k", 9, struct.pack("<IQ", 4, 2**31)), 1),
    "unknown type 13": header(0, value("k", 13, bytes(8)), 1),
    "a string at byte .* needs 5000 bytes": header(0, value("k", 8, struct.pack("<Q", 5000)), 1),
    "is not UTF-8": header(0, value("k", 8, struct.pack("<Q", 2) + b"\xff\xfe"), 1),
    "key 'k' appears twice": header(0, value("k", 4, bytes(4)) * 2, 2),
    r"key 'two\\nlines' appears twice": header(0, value("two\nlines", 4, bytes(4)) * 2, 2),
    "general.alignment is 12": header(0, value("general.alignment", 4, struct.pack("<I", 12)), 1),
    "general.alignment is 0": header(0, value("general.alignment", 4, bytes(4)), 1),
    "general.alignment is x": header(0, value("general.alignment", 8, string("x")), 1),
    "'w' appears twice": header(2, tensors=info("w", [8]) + info("w", [8], offset=32), data=bytes(64)),
    "'w' has 4294967295 dimensions": header(1, tensors=string("w") + struct.pack("<I", 2**32 - 1) + bytes(64)),
    "'w' of type F32 cannot have the dimensions": header(1, tensors=info("w", [8, 0]), data=bytes(64)),
    "'w' of type Q4_1 cannot have the dimensions": header(1, tensors=info("w", [31], 3), data=bytes(64)),
    r"'w' ends at byte \d{20,}": header(1, tensors=info("w", [2**63, 2**63, 4, 4]), data=bytes(64)),
    "'w' ends at byte 132 and the file at 128": header(1, tensors=info("w", [17]), data=bytes(64)),
    "'w' is not aligned": header(1, tensors=info("w", [2], offset=8), data=bytes(64)),
    "'w' is of the unknown type 77": header(1, tensors=info("w", [8], 77), data=bytes(64)),
    "'v' overlaps another": header(2, tensors=info("w", [8]) + info("v", [8]), data=bytes(64)),
    "two tensors overlap": header(2, tensors=info("v", [8], offset=32) + info("w", [9]), data=bytes(64)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what: str, target: Path):
    target.write_bytes(DAMAGE[what])
    with pytest.raises(UserError, match=what) as caught:
        GGUF(target)
    assert str(target) in str(caught.value)
    assert str(caught.value).endswith("download it again")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="No such file"):
        GGUF(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="Is a directory"):
        GGUF(tmp_path)


def test_lies_allocate_nothing(tmp_path: Path):
    """Under a limit of address space, a lie about a length ends in a UserError and never in a MemoryError."""
    for index, data in enumerate(DAMAGE.values()):
        (tmp_path / f"{index:02d}.gguf").write_bytes(data)
    program = """
import resource, sys
from pathlib import Path
from canon.core.errors import UserError
from canon.core.hub.gguf import GGUF
import gguf.constants
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        GGUF(path)
    except UserError:
        continue
    sys.exit(f"{path} was read")
print("all refused")
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.stdout == "all refused\n", run.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
