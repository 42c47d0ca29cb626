"""Kernels as other processors would compile them."""

import platform

import pytest

from canon.core import native
from canon.core.nn import group_norm, narrow, winograd


@pytest.fixture
def kernels(request, monkeypatch, tmp_path):
    """Our C kernels for the x86 processor that the parameter names to GCC; elsewhere, for none in particular."""
    caches = [native.load_c, *(module.kernel for module in (group_norm, narrow, winograd))]
    processor = [f"-march={request.param}"] if platform.machine() == "x86_64" else []
    monkeypatch.setattr(native, "FLAGS", ((*processor, "-fopenmp"),))
    monkeypatch.setattr(native, "cache_home", lambda: tmp_path)
    for cached in caches:
        cached.cache_clear()
    assert winograd.kernel() is not None
    yield
    for cached in caches:
        cached.cache_clear()
