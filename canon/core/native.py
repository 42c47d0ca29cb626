"""C sources compiled on this machine, once: for the few loops in which PyTorch's overhead is most of the time.

Every one of them has a PyTorch path beside it, which is used where there is no C compiler.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch  # its OpenMP runtime must be loaded first
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from canon.core.data.assets import cache_home

FUNCTORCH = vars(torch._C)["_functorch"]  # of vmap and functional transforms; type checkers do not know it

# The first set of flags that the compiler accepts is used: this processor's instructions, threads.
FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())


def serves(*tensors: torch.Tensor) -> bool:
    """Whether kernels of ours may compute with these: plain tensors on the CPU, and nothing watches what is computed.

    Compilers, tracers, counters of operations, tensors that only pretend, vmap and functional transforms, and
    derivatives in forward mode see PyTorch's operations alone.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and all(type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu for x in tensors)
        and not is_in_torch_dispatch_mode()
        and FUNCTORCH.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


@cache
def load_c(source: Path) -> ctypes.CDLL | None:
    """The library of a C file, compiled with `$CC` (or cc) at the first call and kept in the cache folder.

    Args:
        source: the C file.

    Returns:
        The library, or None if there is no compiler, it fails (which is said on stderr), the cache folder cannot be
        written, or `$CANON_NATIVE` is 0.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")  # it may be "ccache gcc"
    if shutil.which(compiler[0]) is None or os.environ.get("CANON_NATIVE") == "0":
        return None
    # A cache folder may be shared by machines, and native instructions of one may be unknown to another.
    key = hashlib.sha256(f"{compiler} {_processor()} {Path(__file__).read_text()}".encode())
    for file in _with_included(source):
        key.update(file.read_bytes())
    library = cache_home() / "native" / f"{source.stem}-{key.hexdigest()[:20]}.so"
    try:
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True)
            errors = [_compile([*compiler, *flags], source, library) for flags in FLAGS if not library.is_file()]
            if not library.is_file():
                print(f"{source.name} does not compile here, PyTorch takes its place: {errors[-1]}", file=sys.stderr)
                return None
        return ctypes.CDLL(str(library))
    except OSError:  # a cache folder that cannot be written, or from which nothing may be executed
        return None


def load_functions(
    source: Path, shape: type[ctypes.Structure], tensors: Mapping[str, int], result: Any = None
) -> ctypes.CDLL | None:
    """`load_c`, its functions declared: each takes a pointer to a structure of sizes, then pointers to tensors.

    Args:
        source: the C file.
        shape: the structure.
        tensors: how many of them each function takes, by its name.
        result: what the functions return; None: nothing.
    """
    compiled = load_c(source)
    if compiled is not None:
        for name, count in tensors.items():
            function = getattr(compiled, name)
            function.argtypes, function.restype = [ctypes.POINTER(shape), *[ctypes.c_void_p] * count], result
    return compiled


def call(library: ctypes.CDLL | None, name: str, shape: ctypes.Structure, *tensors: torch.Tensor | None) -> Any:
    """Call a function of `load_functions` with a structure and with where tensors begin; None is a null pointer."""
    pointers = (None if x is None else x.data_ptr() for x in tensors)
    return getattr(library, name)(ctypes.byref(shape), *pointers)


def _with_included(source: Path) -> list[Path]:
    """The file, and the files of ours that it includes."""
    names = re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)
    return [source, *(file for name in names for file in _with_included(source.parent / name))]


def _compile(compiler: Sequence[str], source: Path, library: Path) -> str:
    """Make the library if these flags are understood and it can be loaded; returns the first line of what is wrong.

    OpenMP is asked for when compiling and not when linking: its symbols are then found in the runtime that PyTorch has
    loaded. Two runtimes would have two pools of threads, and the threads of one wait, spinning, on the cores of the
    other.
    """
    thing = library.with_suffix(f".{os.getpid()}.o")
    temporary = library.with_suffix(f".{os.getpid()}.so")
    try:
        for command in (
            [*compiler, "-O3", "-fPIC", "-c", str(source), "-o", str(thing)],
            [*compiler, "-shared", str(thing), "-o", str(temporary), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode:
                lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
                return next((line for line in lines if "error" in line), lines[0])
        try:
            ctypes.CDLL(str(temporary))
        except OSError as error:
            return str(error)
        os.replace(temporary, library)  # whole or not at all, even if several processes compile at once
        return ""
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
