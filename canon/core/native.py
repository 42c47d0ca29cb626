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
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
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
LOCK = threading.Lock()  # of the thread that compiles or loads


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
    try:
        compiler = shlex.split(os.environ.get("CC") or "cc")  # it may be "ccache gcc"
        if not compiler or shutil.which(compiler[0]) is None or os.environ.get("CANON_NATIVE") == "0":
            return None
        # A cache folder may be shared by machines, and native instructions of one may be unknown to another.
        key = hashlib.sha256(f"{compiler} {_processor()} {Path(__file__).read_text()}".encode())
        for file in _with_included(source):
            key.update(file.read_bytes())
        with LOCK:
            library = _own_folder() / f"{source.stem}-{key.hexdigest()[:20]}.so"
            try:
                return ctypes.CDLL(str(library))
            except OSError:  # not there yet, or damaged
                return _compile(compiler, source, library)
    except (OSError, ValueError, RuntimeError):  # nothing to be written here, unbalanced quotes in $CC, or no home
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


def differentiable(
    formula: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], dy: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gradients that have gradients themselves, for the backward pass of a kernel when a graph is made of it.

    Args:
        formula: what the kernel computes, by PyTorch.
        inputs: of the formula, as saved by the forward pass.
        dy: gradient of its output.

    Returns:
        The gradient of each input; None where none is needed.
    """
    apart = [None if x is None else x.view_as(x) for x in inputs]  # one tensor may be several inputs
    wanted = [x for x in apart if x is not None and x.requires_grad]
    with torch.autocast(dy.device.type, enabled=False):
        found = iter(torch.autograd.grad(formula(*apart), wanted, dy, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in apart)


def _with_included(source: Path) -> list[Path]:
    """The file, and the files of ours that it includes."""
    names = re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)
    return [source, *(file for name in names for file in _with_included(source.parent / name))]


def _own_folder() -> Path:
    """Where libraries are kept, of this user only: who could write there, could have any code run.

    Raises:
        PermissionError: it belongs to someone else, or others may write there.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = cache_home() / f"native-{user}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if hasattr(os, "getuid") and (found.st_uid != user or found.st_mode & 0o022):
        print(f"{folder} can be written by others: PyTorch takes the place of our kernels", file=sys.stderr)
        raise PermissionError(folder)
    return folder


def _compile(compiler: Sequence[str], source: Path, library: Path) -> ctypes.CDLL | None:
    """Make a library by the first flags with which it compiles and loads; says so if there are none."""
    error = ""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # no other process, nor container, shares it
        for number, flags in enumerate(FLAGS):
            made = Path(folder) / f"{number}.so"
            error = _build([*compiler, *flags], source, made)
            if not error:
                with made.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(made, library)  # whole or not at all, even if several processes compile at once
                if "-fopenmp" not in flags:
                    print(f"{source.name} is compiled without OpenMP, so it runs on one thread", file=sys.stderr)
                return ctypes.CDLL(str(library))
    print(f"{source.name} does not compile or load here, PyTorch takes its place: {error}", file=sys.stderr)
    return None


def _build(compiler: Sequence[str], source: Path, library: Path) -> str:
    """Make the library if these flags are understood and it can be loaded; returns the first line of what is wrong.

    OpenMP is asked for when compiling and not when linking: its symbols are then found in the runtime that PyTorch has
    loaded. Two runtimes would have two pools of threads, and the threads of one wait, spinning, on the cores of the
    other.
    """
    thing = library.with_suffix(".o")
    for command in (
        [*compiler, "-O3", "-fPIC", "-c", str(source), "-o", str(thing)],
        [*compiler, "-shared", str(thing), "-o", str(library), "-lm"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
            return next((line for line in lines if "error" in line), lines[0])
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return ""


def _processor() -> str:
    """What this processor can do, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
