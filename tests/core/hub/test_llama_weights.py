"""What a LLaMA checkpoint says of itself may lie: one line, nothing large allocated, and no read out of bounds in C."""

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from canon.core.errors import UserError
from canon.core.hub.gguf import GGUF
from canon.language import llama
from tests.language.test_llama import write_gguf

HUGGING_FACE = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
LIES = [0, 1, 3, 5, 33, 64, 2**16, 2**24, 2**31, 2**32 - 1]
SIZES = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
         "attention.head_count_kv")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("whole") / "model.gguf", "Q4_1").read_bytes()


def lying(data: bytes, key: str, lie: int) -> bytes:
    """The file with another unsigned number in its metadata."""
    place = data.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4  # after the type
    return data[:place] + struct.pack("<I", lie) + data[place + 4 :]


def outcome(path: Path) -> str:
    """Load fast and decode one token: what was refused, or that it went well."""
    try:
        model, _ = llama.from_pretrained(path, "fast")
        with torch.inference_mode():
            logits = model(torch.tensor([[0]]), model.new_cache(1, 4))
    except UserError as error:
        said = str(error)
    else:
        assert logits.shape == (1, 1, model.config.vocab_size)
        said = "read"
    assert "\n" not in said
    return said


def test_the_whole_file_is_read(whole: bytes, tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(whole)
    assert outcome(tmp_path / "model.gguf") == "read"


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_lies(whole: bytes, tmp_path: Path, key: str, lie: int):
    (tmp_path / "model.gguf").write_bytes(lying(whole, key, lie))
    said = outcome(tmp_path / "model.gguf")
    honest = key == "context_length" and 1 <= lie <= 2**16
    assert (said == "read") == honest, said


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bits(whole: bytes, tmp_path: Path, data: st.DataObject):
    damaged = bytearray(whole)
    start = data_start(whole, tmp_path)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, start - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    outcome(tmp_path / "damaged.gguf")


def data_start(data: bytes, folder: Path) -> int:
    """Where the tensors' data begins."""
    path = folder / "whole.gguf"
    path.write_bytes(data)
    return len(data) - sum(-(-len(tensor.data) // 32) * 32 for tensor in GGUF(path).tensors.values())


@pytest.mark.parametrize("name", ["blk.0.attn_norm", "output_norm", "blk.1.ffn_down", "blk.0.attn_k"])
def test_a_tensor_of_another_shape(whole: bytes, tmp_path: Path, name: str):
    """Half as many rows, or half as long a norm, than the settings say: C would read what is not there."""
    key = f"{name}.weight".encode()
    place = whole.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    (rank,) = struct.unpack_from("<I", whole, place)
    last = place + 4 + 8 * (rank - 1)
    (size,) = struct.unpack_from("<Q", whole, last)
    (tmp_path / "model.gguf").write_bytes(whole[:last] + struct.pack("<Q", size // 2) + whole[last + 8 :])
    assert "do not fit" in outcome(tmp_path / "model.gguf")


def test_more_tokens_than_the_model_knows(whole: bytes, tmp_path: Path):
    key = b"token_embd.weight"
    rows = whole.index(key) + len(key) + 12
    (tmp_path / "model.gguf").write_bytes(whole[:rows] + struct.pack("<Q", 48) + whole[rows + 8 :])
    assert "has 96 tokens and rows for 48" in outcome(tmp_path / "model.gguf")


def test_lies_allocate_nothing(whole: bytes, tmp_path: Path):
    """Under a limit of address space, a lie about a size ends in a UserError and never in a MemoryError."""
    for key in SIZES:
        for lie in LIES[-3:]:
            (tmp_path / f"{key}-{lie}.gguf").write_bytes(lying(whole, key, lie))
    program = """
import resource, sys
from pathlib import Path
from canon.core.errors import UserError
from canon.language import llama
llama.build(llama.Config(d_model=64, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=64))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20),) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    for precision in ("fast", "exact"):
        try:
            llama.from_pretrained(path, precision)
        except UserError:
            continue
        sys.exit(f"{path} was read")
print("all refused")
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.stdout == "all refused\n", run.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "n_heads is 0"),
        ({"num_attention_heads": 3}, "does not divide evenly"),
        ({"num_key_value_heads": 3}, "does not divide evenly"),
        ({"num_hidden_layers": 2**24}, "of 16777216 layers most are missing"),
        ({"num_hidden_layers": 10**30}, "n_layers is 1000"),
        ({"num_hidden_layers": True}, "n_layers is True"),
        ({"vocab_size": "96"}, "vocab_size is '96'"),
        ({"hidden_size": 2**23}, "context_length is 64, and its rotations"),
        ({"hidden_size": 128}, "of another shape"),
        ({"intermediate_size": 2**24}, "of another shape"),
        ({"max_position_embeddings": 2**24}, "context_length is 16777216, and its rotations"),
        ({"max_position_embeddings": -1}, "context_length is -1"),
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": "many"}, "rope_theta is 'many'"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "gates with 'gelu'"),
    ],
)
def test_a_config_that_lies(tmp_path: Path, change: dict[str, Any], message: str):
    config = {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
    published = llama.to_hugging_face(llama.build(llama.Config(context_length=64, **config)))
    save_file({name: weight.clone().contiguous() for name, weight in published.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE))
    llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE | change))
    with pytest.raises(UserError, match=message) as caught:
        llama.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_queries_that_are_not_whole_heads(tmp_path: Path):
    """As many rows as wanted altogether, cut elsewhere."""
    published = llama.to_hugging_face(
        llama.build(llama.Config(96, 64, d_model=64, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=96))
    )
    prefix = "model.layers.0.self_attn"
    rows = torch.cat([published[f"{prefix}.{name}_proj.weight"] for name in "qkv"]).split([60, 36, 32])
    published |= {f"{prefix}.{name}_proj.weight": part for name, part in zip("qkv", rows)}
    save_file({name: weight.clone().contiguous() for name, weight in published.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match="rows for heads of 16"):
        llama.from_pretrained(tmp_path)
