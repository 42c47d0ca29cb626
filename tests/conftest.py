"""Shared by all tests: few threads, quiet TensorBoard, and models whose training is quick and depends on everything."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads spin, and CI has two cores

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  the hook finds it by name

# Every shape annotation is checked at every call in the tests, except where a forkserver preloads canon itself.
install_import_hook(
    ["canon.language", "canon.images", "canon.core.generation", "canon.core.nn"], "tests.typecheck.check"
)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that ``runs/`` lands there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
