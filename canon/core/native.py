"""C sources compiled on this machine, once: for the few loops in which PyTorch's overhead is most of the time.

Every one of them has a PyTorch path beside it, which is used where there is no C compiler.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime must be loaded first)

from canon.core.data.assets import cache_home
from canon.core.errors import disk_errors

# The first set of flags that the compiler accepts is used: this processor's instructions, threads.
FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())


@cache
def load_c(source: Path, *included: Path) -> ctypes.CDLL | None:
    """The library of a C file, compiled with `$CC` (or cc) at the first call and kept in the cache folder.

    Args:
        source: the C file.
        included: the files it includes by name.

    Returns:
        The library, or None if there is no compiler, it fails, or `$CANON_NATIVE` is 0.

    Raises:
        UserError: the cache folder cannot be written.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or os.environ.get("CANON_NATIVE") == "0":
        return None
    # A cache folder may be shared by machines, and native instructions of one may be unknown to another.
    key = hashlib.sha256(f"{compiler} {_processor()} {Path(__file__).read_text()}".encode())
    for file in (source, *included):
        key.update(file.read_bytes())
    library = cache_home() / "native" / f"{source.stem}-{key.hexdigest()[:20]}.so"
    if not library.is_file():
        with disk_errors(f"{library}"):
            library.parent.mkdir(parents=True, exist_ok=True)
        folders = [f"-I{file.parent}" for file in included]
        if not any(_compile(compiler, [*flags, *folders], source, library) for flags in FLAGS):
            return None
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # for instance a cache folder from which nothing may be executed
        return None


def _compile(compiler: str, flags: list[str], source: Path, library: Path) -> bool:
    """Whether the library could be made with these flags, and be loaded.

    OpenMP is asked for when compiling and not when linking: its symbols are then found in the runtime that PyTorch has
    loaded. Two runtimes would have two pools of threads, and the threads of one wait, spinning, on the cores of the
    other.
    """
    thing = library.with_suffix(f".{os.getpid()}.o")
    temporary = library.with_suffix(f".{os.getpid()}.so")
    try:
        for command in (
            [compiler, "-O3", "-fPIC", *flags, "-c", str(source), "-o", str(thing)],
            [compiler, "-shared", str(thing), "-o", str(temporary), "-lm"],
        ):
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return False
        try:
            ctypes.CDLL(str(temporary))
        except OSError:
            return False
        os.replace(temporary, library)  # whole or not at all, even if several processes compile at once
        return True
    finally:
        thing.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)


def _processor() -> str:
    """What this processor can do, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
