"""The tensors of a TorchScript archive (OpenAI's CLIP is released as such), read as data: its program is never run.

An archive is a zip file. ``data.pkl`` in it is a pickle of nested modules, whose tensors name files of plain numbers
beside it. The pickle is not loaded: its opcodes are interpreted here, and whatever it asks to be called is noted by
name only. What is read takes no more memory than the file, but for views that repeat numbers, which are kept small.
"""

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {f"{name}Storage": getattr(torch, name.lower()) for name in ("Float", "Half", "BFloat16", "Double", "Long")}
DTYPES |= {"IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8}
DTYPES |= {"ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UInt16Storage": torch.uint16}
DTYPES |= {"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128}
REPEATED = 1 << 20
"""Numbers that a view may have if it has more than its file."""
MOST_MODULES, LONGEST_NAME = 100_000, 1000
"""Of an archive; modules that hold one another would never end."""


class _Module:
    """A module, or any other object: its attributes by name."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}


class _View(NamedTuple):
    """A tensor: the file that holds its numbers, and where they are in it."""

    storage: str
    key: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive with a program.

    Raises:
        Exception: of any type, where it is damaged.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def torchscript_tensors(path: Path) -> dict[str, Tensor]:
    """The parameters, buffers and other tensors of an archive, named as in ``state_dict()``.

    Raises:
        Exception: of any type, where it is damaged or holds what is not read.
    """
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].split("/")[0]
        root = _interpreted(_content(archive, f"{folder}/data.pkl"))
        found: dict[str, Tensor] = {}
        storages: dict[str, Tensor] = {}
        todo, visited = [("", root)], 0
        while todo:
            prefix, module = todo.pop()
            visited += 1
            if visited > MOST_MODULES or len(prefix) > LONGEST_NAME:
                raise ValueError("its modules hold one another")
            for name, value in module.attributes.items():
                if isinstance(value, _Module):
                    todo.append((f"{prefix}{name}.", value))
                elif isinstance(value, _View):
                    if value.key not in storages:
                        storages[value.key] = _numbers(value, _content(archive, f"{folder}/data/{value.key}"))
                    found[prefix + name] = _tensor(value, storages[value.key])
    if not found:
        raise ValueError("a frozen program keeps no tensors under their names")
    return found


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:  # a small file could ask for any amount of memory
        raise ValueError(f"{name} is compressed")
    return archive.read(entry)


def _numbers(view: _View, content: bytes) -> Tensor:
    if view.storage not in DTYPES:
        raise ValueError(f"it holds numbers as {view.storage}, which is not read")
    dtype = DTYPES[view.storage]
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _tensor(view: _View, numbers: Tensor) -> Tensor:
    if math.prod(view.size) > max(len(numbers), REPEATED):
        raise ValueError(f"a tensor of {list(view.size)} is more than there is in the file")
    return numbers.as_strided(view.size, view.stride, view.offset)  # which refuses to reach beyond them


def _interpreted(data: bytes) -> Any:
    """What a pickle describes, as far as modules, tensors and plain values go."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("GLOBAL", "BINUNICODE", "BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(argument)  # of GLOBAL, the two names
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            stack[-1].update({key: value for key, value in zip(items[::2], items[1::2]) if isinstance(key, str)})
        elif name in ("NEWOBJ", "REDUCE"):
            arguments, called = stack.pop(), stack.pop()
            stack.append(_made(called, arguments) if name == "REDUCE" else _Module())
        elif name == "BUILD":
            state = stack.pop()
            built = stack[-1]
            if isinstance(state, dict) and isinstance(built, _Module):
                built.attributes = state
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "BINPERSID"):  # the latter's names of a storage stay as they are
            raise ValueError(f"its pickle has {name}, which no module needs")
    raise ValueError("its pickle has no end")


def _made(called: Any, arguments: Any) -> Any:
    """What a call would have made: a tensor's place, the value that a type is noted of, or nothing that is needed."""
    if called == "torch._utils _rebuild_tensor_v2":
        (_, storage, key, *_), offset, size, stride, *_ = arguments
        return _View(str(storage).rpartition(" ")[2], str(key), offset, size, stride)
    if called == "torch.jit._pickle restore_type_tag":
        return arguments[0]
    return None
