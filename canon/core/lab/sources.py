"""Which source files a function depends on, so that a kept result dies with the code that made it."""

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import canon

ROOT = Path(canon.__file__).parent.parent


def fingerprint(function: Callable[..., Any], device: str) -> str:
    """Twelve hex digits over the function's file, every Canon file it imports (at any depth), torch and the device.

    What lies beside a Python file and is no Python (C sources, recorded references) counts as part of it.
    """
    digest = hashlib.sha256(f"{version('torch')} {device}".encode())
    files = closure(Path(inspect.getfile(function)))
    beside = {other for path in files for other in path.parent.iterdir() if other.suffix in (".c", ".h", ".json")}
    for path in sorted(files | beside):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def closure(start: Path) -> set[Path]:
    """A source file and every file of Canon reached from it by imports, those inside functions included."""
    reached, waiting = set(), [start.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting.extend(_imports(path))
    return reached


def _imports(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "canon":
                base = ROOT.joinpath(*name.split("."))
                yield from (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())
