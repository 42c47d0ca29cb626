"""Named tensors on disk: safetensors, whole or in shards, and the older PyTorch files, read without running code."""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from canon.core.errors import UserError, disk_errors
from canon.core.hub.torchscript import is_torchscript, torchscript_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint into CPU memory: name -> tensor.

    Args:
        path: a `.safetensors` file; a PyTorch file (`.bin`, `.pt`, `.pth`, `.ckpt`), read with ``weights_only``, or, of
            a TorchScript archive, its tensors alone; or a folder
            that holds ``model.safetensors``, its shards and their index, or ``pytorch_model.bin``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        for name, read in ((WEIGHTS_FILE, _load_file), (INDEX_FILE, _load_shards), (PICKLE_FILE, _load_pickle)):
            if (path / name).is_file():
                return read(path / name)
        raise UserError(
            f"there are no weights in {path}: expected {WEIGHTS_FILE} (or {INDEX_FILE}, {PICKLE_FILE}); a run that was "
            "stopped early gets them when it goes on (--resume)"
        )
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return _load_pickle(path)
    return _load_file(path)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors into a `.safetensors` file, whole or not at all; the folder is created.

    Names that share one tensor, such as a head tied to the embedding, are stored once and come back sharing it.

    Args:
        tensors: name -> tensor, on any device.
        path: the file; an old one is replaced only when the new one is safely on disk.
        metadata: text to store beside them.

    Raises:
        UserError: the disk is full or not writable.
    """
    path = Path(path)
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        first = names.setdefault(identity, name) if tensor.numel() else name
        if first == name:
            unique[name] = _own(tensor.detach())
        else:
            aliases[name] = first
    notes = {"format": "pt", **(metadata or {})}
    if aliases:
        notes["shared"] = json.dumps(aliases)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            with _system_errors():
                save_file(unique, temporary, notes)
            temporary.chmod(mode)  # the library lets nobody else read it
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _own(tensor: Tensor) -> Tensor:
    """The tensor in CPU memory that is contiguous and shared with no other, as the format needs it."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@contextmanager
def _system_errors() -> Iterator[None]:
    """The library reports a failed write as an error of its own with the number in its text: raise what it was."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _sync(path: Path) -> None:
    """Have the file (or the folder's entries) written through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = file.get_tensors()
            aliases = json.loads((file.metadata() or {}).get("shared", "{}"))
        return {**tensors, **{name: tensors[first] for name, first in aliases.items()}}
    except Exception as error:  # SafetensorError, and whatever PyTorch makes of a header that lies
        raise _damaged(path, error) from error


def _load_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from error
    if outside:
        raise UserError(f"{index} names {outside[0]!r}, which is outside its folder; do not trust this checkpoint")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise UserError(f"{index.parent / shard}, one of {len(shards)} shards, is missing; download it again")
        tensors |= _load_file(index.parent / shard)
    missing = weight_map.keys() - tensors.keys()
    if missing:
        raise UserError(
            f"the shards beside {index} lack {min(missing)} and {len(missing) - 1} more; download them again"
        )
    return tensors


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        if is_torchscript(path):
            return torchscript_tensors(path)
    except Exception as error:  # damage is met with errors of every type
        raise _damaged(path, error) from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets damage with errors of every type
        if "Weights only load failed" in str(error):
            raise UserError(
                f"{path} holds more than tensors, and nothing of a download is executed: where it is trusted, save its "
                "state_dict as .safetensors"
            ) from error
        raise _damaged(path, error) from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):  # as trainers save it
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a table of names and tensors; save model.state_dict() instead")
    return tensors


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return UserError(f"{path} cannot be read ({reason}); it is damaged or of another kind: download or save it again")
