"""Small files that are either whole or not there, and line files that survive a crash."""

import json
import math
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, SupportsFloat

from canon.core.errors import UserError, disk_errors


def plain(value: Any) -> Any:
    """What JSON can hold of a value: dataclasses become objects, tuples lists, paths strings.

    JSON has no infinities and no nan: they become the strings ``inf``, ``-inf`` and ``nan``, which ``float`` reads.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, SupportsFloat):  # NumPy numbers and one-element tensors too
        number = float(value)
        return number if math.isfinite(number) else str(number)
    return str(value)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON text of :func:`plain` of the value."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file whole, creating its folder: a crash or a full disk leaves the old file, or none, never a half.

    Raises:
        UserError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                _write_all(descriptor, data.encode() if isinstance(data, str) else data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one when there is no file.

    Raises:
        UserError: the file cannot be read, or holds no JSON object.
    """
    with disk_errors(str(path), "read"):
        if not path.is_file():
            return {}
        content = path.read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is damaged ({error}): restore it, or delete it and make it anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object): restore it, or delete it and make it anew")
    return value


def merge_json(path: Path, values: dict[str, Any]) -> None:
    """Add entries to the object in a JSON file; an entry of the same name is replaced.

    Raises:
        UserError: the disk is full or not writable.
    """
    write_atomic(path, to_json({**read_json(path), **values}, indent=2) + "\n")


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as a line, at once and whole: what a full disk cut short is taken back.

    Raises:
        UserError: the disk is full or not writable.
    """
    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, (to_json(record) + "\n").encode())
            except BaseException:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a line file; the last one, torn by a kill or a power cut, is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was never finished
        try:
            records.append(json.loads(line))
        except ValueError:  # zeros that a file system leaves after a power cut: nothing later can be trusted
            break
    return records


def repair_lines(path: Path) -> None:
    """Cut a torn tail off a line file, so that the next append starts on a line of its own."""
    if not path.is_file():
        return
    whole = 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            json.loads(line)
        except ValueError:
            break
        whole += len(line) + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write every byte: one call may write fewer than it was given."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
