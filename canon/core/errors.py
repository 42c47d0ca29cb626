"""What went wrong on the user's side, in one line, and what to do about it."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Literal


class UserError(Exception):
    """A mistake or a missing thing that the user can mend; the command line prints it as one line and exits with 2."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name of the module.
        extra: the extra of this distribution that installs it.

    Raises:
        UserError: the module is not installed; the line says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0] and error.name != module:
            raise
        raise UserError(f"{module} is not installed: run  pip install 'aicanon[{extra}]'") from error


@contextmanager
def disk_errors(what: str = "", operation: Literal["write", "read"] = "write") -> Iterator[None]:
    """Turn what the disk refuses (no space, no permission, a file where a folder is needed ...) into one line.

    Args:
        what: what was being read or written; empty: the file that the operating system names, or else the output.
        operation: which of the two.

    Raises:
        UserError: the operating system refused it, for a reason that the user can mend.
    """
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full; free some space and run the command again",
            errno.EIO: "the disk fails (input/output error); check it, or choose another",
            errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
            errno.EFBIG: "the file would be larger than is allowed here; raise the limit (ulimit -f)",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.EACCES: "permission denied; ask for it, or choose another place",
            errno.EPERM: "that is not permitted; choose another place",
            errno.ENOTDIR: "a part of that path is a file, not a folder; choose another path",
            errno.EISDIR: "it is a folder, not a file; choose another path",
            errno.EEXIST: "a file of that name is in the way; choose another path",
            errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
            errno.ENOENT: "a file or folder of that path is missing; choose another path",
        }.get(_number(error))
        if advice is None:
            raise
        unnamed = f"open {error.filename}" if error.filename else "write the output"
        raise UserError(f"cannot {f'{operation} {what}' if what else unnamed}: {advice}") from error


def _number(error: OSError) -> int:
    """Its errno; that of the first failure where a whole folder was copied, which is only in shutil's text."""
    first = re.search(r"\[Errno (\d+)\]", str(error)) if isinstance(error, shutil.Error) else None
    return int(first[1]) if first else error.errno or 0
