"""The tensors of a TorchScript archive (OpenAI's CLIP is released as such), read as data: its program is never run.

An archive is a zip file. ``data.pkl`` in it is a pickle of nested modules, whose tensors name files of plain numbers
beside it. The pickle is interpreted here, and can ask for no more than inert holders of modules, lists, and views of
numbers that are in the file.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {f"{name}Storage": getattr(torch, name.lower()) for name in ("Float", "Half", "BFloat16", "Double", "Long")}
DTYPES |= {"IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8}
DTYPES |= {"ByteStorage": torch.uint8, "BoolStorage": torch.bool}


class _Module:
    """What an archive says of a module: its attributes by name."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Makes what `find_class` names, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive, self.folder, self.numbers = archive, folder, dict[str, Tensor]()

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return _untagged
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist"):
            return list
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        if key not in self.numbers:
            entry = self.archive.getinfo(f"{self.folder}/data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED:  # a small file could ask for any amount of memory
                raise pickle.UnpicklingError("its tensors are compressed")
            self.numbers[key] = torch.frombuffer(bytearray(self.archive.read(entry)), dtype=dtype)
        return self.numbers[key]


def _view(numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return numbers.as_strided(size, stride, offset)  # which refuses to reach beyond them


def _untagged(value: Any, _tag: str) -> Any:
    return value


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive with a program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def torchscript_tensors(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of an archive, by the names that ``state_dict()`` of its module would have.

    Raises:
        Exception: of any type, where it is damaged or holds what a module does not.
    """
    with zipfile.ZipFile(path) as archive:
        root = _Reader(archive, archive.namelist()[0].split("/")[0]).load()
    found: dict[str, Tensor] = {}
    todo = [("", root)]
    while todo:
        prefix, module = todo.pop()
        if prefix.count(".") > 100:
            raise ValueError("its modules hold one another")
        for name, value in module.state.items():
            if isinstance(value, _Module) and isinstance(value.state, dict):
                todo.append((f"{prefix}{name}.", value))
            elif isinstance(value, Tensor):
                found[prefix + name] = value
    return found
