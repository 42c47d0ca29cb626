"""C sources: they compile wherever there is a compiler, and PyTorch serves where there is none."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from canon.core import native
from canon.core.generation import attention, sampling
from canon.core.nn import fused


def test_every_source_compiles_where_there_is_a_compiler():
    found = [attention.kernel(), sampling.kernel(), fused.library()]
    assert [library is not None for library in found] == [has_compiler()] * 3


def test_what_does_not_compile_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("CANON_HOME", str(tmp_path))
    source = tmp_path / "wrong.c"
    source.write_text("int f(void) { return nothing; }\n")
    assert native.load_c(source) is None
    said = capsys.readouterr().err
    assert not has_compiler() or ("wrong.c does not compile here" in said and "nothing" in said)


def test_an_edit_of_an_included_file_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CANON_HOME", str(tmp_path))
    (tmp_path / "number.h").write_text("#define NUMBER 1\n")
    source = tmp_path / "f.c"
    source.write_text('#include "number.h"\nint f(void) { return NUMBER; }\n')
    numbers = []
    for number in (1, 2):
        (tmp_path / "number.h").write_text(f"#define NUMBER {number}\n")
        native.load_c.cache_clear()
        library = native.load_c(source)
        numbers.append(library.f() if library else number)
    native.load_c.cache_clear()
    assert numbers == [1, 2]


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CANON_HOME", str(tmp_path / "file"))
    source = tmp_path / "f.c"
    source.write_text("int f(void) { return 1; }\n")
    assert native.load_c(source) is None


def has_compiler() -> bool:
    """Whether the kernels can be compiled here."""
    return shutil.which(shlex.split(os.environ.get("CC") or "cc")[0]) is not None
