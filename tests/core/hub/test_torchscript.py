"""Tensors of TorchScript archives, of which nothing is run."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from canon.core.errors import UserError
from canon.core.hub.tensors import load_tensors


class Net(nn.Module):
    """Modules in modules, several types of numbers, a view and a weight that two names share."""

    table: Tensor

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5).half())
        self.head = nn.Linear(5, 4)
        self.tied = nn.Linear(5, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("table", torch.arange(12).view(3, 4).t()[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.body[0](x)


def rewrite(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Replace a file of an archive."""
    with zipfile.ZipFile(path) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for entry, old in files.items():
            archive.writestr(entry, content if entry.endswith(name) else old)


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


def test_nothing_but_tensors_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.script(Net()), path)
    rewrite(path, "data.pkl", pickle.dumps(Command()))
    with pytest.raises(UserError, match="asks for"):
        load_tensors(path)
    assert not Path("ran").exists()


def test_damage_is_one_line(tmp_path):
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.script(Net()), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    cases = {
        "shorter": (lambda: rewrite(path, "data/0", b"\0" * 8)),  # than its shape: the tensor would reach beyond
        "compressed": (lambda: rewrite(path, "nothing", b"", zipfile.ZIP_DEFLATED)),
        "cut": (lambda: path.write_bytes(whole[: len(whole) // 2])),
        "half a pickle": (lambda: rewrite(path, "data.pkl", data[: len(data) // 2])),
        "no module": (lambda: rewrite(path, "data.pkl", pickle.dumps([1, 2]))),
    }
    for name, damage in cases.items():
        path.write_bytes(whole)
        damage()
        with pytest.raises(UserError) as error:
            load_tensors(path)
        assert "\n" not in str(error.value), name
