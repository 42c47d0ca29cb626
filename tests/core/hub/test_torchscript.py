"""Tensors of TorchScript archives, of which nothing is run."""

import pickle
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from canon.core.errors import UserError
from canon.core.hub.tensors import load_tensors


class Net(nn.Module):
    """Modules in modules, several types of numbers, views, a weight of two names, and attributes of all kinds."""

    table: Tensor

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5).half())
        self.head, self.tied = nn.Linear(5, 4), nn.Linear(5, 4)
        self.tied.weight = self.head.weight
        self.memory = nn.LSTM(4, 3)  # keeps a list of its tensors
        self.register_buffer("table", torch.arange(12).view(3, 4).t()[1:])
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("number", torch.tensor(3.5))
        self.register_buffer("turned", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("spread", torch.ones(1).expand(7))
        self.words, self.pair, self.place = {"a": 1.5}, (1, "b"), torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.body[0](x)


def archive(path: Path) -> Path:
    """A file with the program of a `Net`."""
    torch.jit.save(torch.jit.script(Net()), path)
    return path


def rewrite(path: Path, name: str, content: bytes, compressed: str = " ") -> None:
    """Replace a file of an archive, and compress one."""
    with zipfile.ZipFile(path) as old:
        files = {entry: old.read(entry) for entry in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for entry, data in files.items():
            method = zipfile.ZIP_DEFLATED if entry.endswith(compressed) else zipfile.ZIP_STORED
            new.writestr(entry, content if entry.endswith(name) else data, method)


def nested(levels: int, cycle: bool = False) -> bytes:
    """A pickle of modules of which each holds the next one under two names; the innermost perhaps the outermost."""
    made = b"\x80\x02"
    for level in range(levels):
        inner = b"h" + bytes([level - 1]) if level else b"N"
        made += b"c__torch__\nM\n)\x81q" + bytes([level]) + b"}("
        made += b"".join(b"X\x01\x00\x00\x00" + name + inner for name in (b"a", b"b")) + b"ub"
    if cycle:
        last = bytes([levels - 1])
        made += b"h\x00}(X\x01\x00\x00\x00ch" + last + b"ubh" + last
    return made + b"."


def view(size: int, stride: int) -> bytes:
    """A pickle of a module with one tensor, in the numbers of the file called 0."""
    storage = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    numbers = b"J" + size.to_bytes(4, "little") + b"\x85" + b"K" + bytes([stride]) + b"\x85"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + b"K\x00" + numbers + b"\x89NtR"
    return b"\x80\x02c__torch__\nM\n)\x81}(X\x01\x00\x00\x00w" + tensor + b"ub."


@pytest.mark.parametrize("made", ["script", "trace"])
def test_the_tensors_are_those_of_the_module(tmp_path, made):
    net, path = Net().eval(), tmp_path / "net.pt"
    program = torch.jit.script(net) if made == "script" else torch.jit.trace(net, torch.randn(1, 3, 5, 5))
    torch.jit.save(program, path)
    found = load_tensors(path)
    assert found.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


class Command:
    """What a pickle would run."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "net.pt")
    rewrite(path, "data.pkl", pickle.dumps(Command(), protocol=2))
    with pytest.raises(UserError):
        load_tensors(path)
    assert not Path("ran").exists()


def test_a_view_is_read_as_it_is_noted(tmp_path):
    path = archive(tmp_path / "net.pt")
    rewrite(path, "data.pkl", view(1000, 0))
    assert load_tensors(path)["w"].shape == (1000,)


@pytest.mark.parametrize(
    ("name", "content", "compressed", "said"),
    [
        ("data.pkl", nested(60), " ", "hold one another"),  # 2^60 ways
        ("data.pkl", nested(3, cycle=True), " ", "hold one another"),
        ("data.pkl", view(10**9, 0), " ", "more than there is"),  # from four numbers
        ("data.pkl", view(10**6, 1), " ", "out of bounds"),
        ("data.pkl", b"\x80\x02Nr\xff\xff\xff\x7f.", " ", ""),  # a place far away to remember nothing at
        ("data.pkl", pickle.dumps([1, 2], protocol=2), " ", ""),
        ("data.pkl", pickle.dumps({1, 2}), " ", "which no module needs"),
        ("data.pkl", b"\x80\x02c__torch__\nM\n", " ", ""),
        ("data/0", b"\0" * 8, " ", ""),  # shorter than its shape
        (" ", b"", "data/0", "compressed"),
        (" ", b"", "data.pkl", "compressed"),
    ],
)
def test_damage_and_malice_are_one_line(tmp_path, name, content, compressed, said):
    path, start = archive(tmp_path / "net.pt"), time.monotonic()
    rewrite(path, name, content, compressed)
    with pytest.raises(UserError, match=said) as error:
        load_tensors(path)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("kind", ["program", "tensors"])
def test_a_damaged_directory_is_one_line(tmp_path, kind):
    path = tmp_path / "net.pt"
    if kind == "program":
        archive(path)
    else:
        torch.save({"a": torch.ones(3)}, path)
    whole = path.read_bytes()
    for damaged in (whole.replace(b"PK\1\2", b"PK\1\3"), whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            load_tensors(path)
        assert "\n" not in str(error.value)


def test_a_frozen_program_says_what_it_lacks(tmp_path):
    torch.jit.save(torch.jit.freeze(torch.jit.script(Net().eval())), tmp_path / "net.pt")
    with pytest.raises(UserError, match="frozen"):
        load_tensors(tmp_path / "net.pt")
