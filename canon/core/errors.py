"""What went wrong on the user's side, in one line, and what to do about it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


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
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full or unwritable disk into one line that names what was being written.

    Raises:
        UserError: the operating system refused the write (no space, quota, read-only, permission).
    """
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full; free some space and run the command again",
            errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
            errno.EFBIG: "the file would be larger than is allowed here; raise the limit (ulimit -f)",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.EACCES: "permission denied; choose a folder you may write to",
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise UserError(f"cannot write {what}: {advice}") from error
