"""Canon: every system of the AI Canon, faithful to its paper, in one small library.

``canon.systems()`` names what runs, ``canon.load("gpt2")`` gives the system's module, and from there everything is
plain PyTorch: ``canon.load("gpt2").build(config)``. Importing :mod:`canon` loads neither torch nor any system.
"""

import os
from importlib import import_module
from types import ModuleType

# OpenMP's threads wait for each other by spinning, for milliseconds. Where another program wants their cores, torch
# becomes ten times slower or more. After some 50 microseconds they should sleep; read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"


def systems() -> list[str]:
    """Names of the systems that run, in the reading list's order."""
    from canon.catalog import entries

    return [entry.id for entry in entries() if entry.system]


def load(name: str) -> ModuleType:
    """Import the module of one system.

    Args:
        name: a name from :func:`systems`, such as ``"gpt2"``.

    Raises:
        UserError: the catalog has no such entry, or the entry does not run yet.
    """
    from canon.catalog import find
    from canon.core.errors import UserError

    entry = find(name)
    if not entry.system:
        raise UserError(f"{entry.id} does not run yet; these do: {', '.join(systems())}")
    return import_module(entry.system)
