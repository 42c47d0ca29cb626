"""Tensors on disk: what is written comes back, and damage is one line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from canon.core.errors import UserError
from canon.core.hub import tensors as module
from canon.core.hub.tensors import load_tensors, save_tensors


def example() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.randn(3, 4),
        "half": torch.randn(5).to(torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_file_and_folder_come_back(tmp_path: Path):
    save_tensors(example() | {"weight": torch.ones(3, 4)}, tmp_path / "new" / "model.safetensors")
    expected = example()
    save_tensors(expected, tmp_path / "new" / "model.safetensors", {"note": "x"})
    assert_same(load_tensors(tmp_path / "new"), expected)
    assert_same(load_tensors(tmp_path / "new" / "model.safetensors"), expected)
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]


def test_shared_and_overlapping_tensors(tmp_path: Path):
    table = torch.randn(64, 64)
    tensors = {"embedding": table, "head": table, "rows": table[1:3], "transposed": table.t()}
    save_tensors(tensors, tmp_path / "model.safetensors")
    loaded = load_tensors(tmp_path)
    assert_same(loaded, tensors)
    assert loaded["head"].data_ptr() == loaded["embedding"].data_ptr()
    assert (tmp_path / "model.safetensors").stat().st_size < 2.5 * table.nbytes  # table, its transpose and two rows


def test_changing_a_loaded_tensor_leaves_the_file(tmp_path: Path):
    expected = example()
    save_tensors(expected, tmp_path / "model.safetensors")
    load_tensors(tmp_path)["weight"].fill_(0)
    assert_same(load_tensors(tmp_path), expected)


def test_shards(tmp_path: Path):
    expected = example()
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(expected)}
    for shard in set(weight_map.values()):
        save_file({name: expected[name] for name in expected if weight_map[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(load_tensors(tmp_path), expected)

    index.write_text(json.dumps({"weight_map": weight_map | {"more": "model-0.safetensors"}}))
    with pytest.raises(UserError, match="lack more"):
        load_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"evil": "../../secrets.safetensors"}}))
    with pytest.raises(UserError, match="outside its folder"):
        load_tensors(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"model-1.safetensors, one of 2 shards, is missing"):
        load_tensors(tmp_path)
    for nonsense in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        index.write_text(nonsense)
        with pytest.raises(UserError, match=r"index.json cannot be read"):
            load_tensors(tmp_path)


def test_pytorch_file_without_running_code(tmp_path: Path):
    expected = example()
    torch.save(expected, tmp_path / "pytorch_model.bin")
    assert_same(load_tensors(tmp_path), expected)

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "attacked"),))

    torch.save({"weight": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors"):
        load_tensors(tmp_path)
    assert not (tmp_path / "attacked").exists()
    torch.save({"weights": expected}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a table of names and tensors"):
        load_tensors(tmp_path)


def test_nothing_there_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"no weights in .*expected model.safetensors"):
        load_tensors(tmp_path)
    with pytest.raises(UserError, match="no file"):
        load_tensors(tmp_path / "none.safetensors")


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_are_one_line(tmp_path: Path, data: st.DataObject):
    path = tmp_path / data.draw(st.sampled_from(["m.safetensors", "m.bin"]))
    if not path.exists():
        (save_tensors if path.suffix == ".safetensors" else torch.save)(example(), path)
        (tmp_path / f"{path.name}.whole").write_bytes(path.read_bytes())
    whole = (tmp_path / f"{path.name}.whole").read_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        changed = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, min(len(whole), 600) - 1))] = data.draw(st.integers(0, 255))
        damaged = bytes(changed)
    path.write_bytes(damaged)
    try:
        load_tensors(path)  # a change among the values is no damage that can be seen
        said = path.name
    except UserError as error:
        said = str(error)
    assert path.name in said
    assert "\n" not in said


def test_truncated_safetensors_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_tensors(example(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            load_tensors(path)


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the library reports a full disk: an error of its own, the system's number in its text, half a file behind."""
    expected = example()
    path = tmp_path / "model.safetensors"
    save_tensors(expected, path)

    def full(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: No space left (os error {errno.ENOSPC})")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*model.safetensors: the disk is full"):
        save_tensors({"weight": torch.zeros(9)}, path)
    assert_same(load_tensors(path), expected)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_write_that_the_system_stops_keeps_the_old_file(tmp_path: Path):
    """The same with a real limit: one line for the user, and what it had written is removed."""
    program = """
import resource, sys, torch
from canon.core.errors import UserError
from canon.core.hub.tensors import load_tensors, save_tensors
path = sys.argv[1]
save_tensors({"weight": torch.ones(4)}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save_tensors({"weight": torch.zeros(1 << 20)}, path)
except UserError as error:
    print("allowed here" in str(error), load_tensors(path)["weight"].tolist())
"""
    path = tmp_path / "model.safetensors"
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert run.stdout == "True [1.0, 1.0, 1.0, 1.0]\n", run.stderr
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path: Path):
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "any").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_trainers_checkpoint_is_its_state_dict(tmp_path):
    weights = {"a": torch.arange(3.0)}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "model.ckpt")
    assert torch.equal(load_tensors(tmp_path / "model.ckpt")["a"], weights["a"])


def test_what_would_have_to_be_executed_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "callback": Path}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"holds more than tensors.*safetensors"):
        load_tensors(tmp_path / "model.ckpt")
