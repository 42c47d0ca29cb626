"""C sources: they compile wherever there is a compiler, and PyTorch serves where there is none."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from canon.core import native
from canon.core.generation import attention, sampling
from canon.core.nn import fused, group_norm, narrow, winograd


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A C file that has not been compiled, and an empty cache folder."""
    monkeypatch.setenv("CANON_HOME", str(tmp_path / "home"))
    file = tmp_path / "f.c"
    file.write_text("int f(void) { return 7; }\n")
    native.load_c.cache_clear()
    yield file
    native.load_c.cache_clear()


def test_every_source_compiles_where_there_is_a_compiler():
    kernels = (module.kernel for module in (attention, sampling, group_norm, narrow, winograd))
    found = [fused.library(), *(kernel() for kernel in kernels)]
    assert [library is not None for library in found] == [has_compiler()] * 6


def test_what_does_not_compile_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("CANON_HOME", str(tmp_path))
    source = tmp_path / "wrong.c"
    source.write_text("int f(void) { return nothing; }\n")
    assert native.load_c(source) is None
    said = capsys.readouterr().err
    assert not has_compiler() or ("wrong.c does not compile or load here" in said and "nothing" in said)


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


def test_a_damaged_library_is_made_again(source: Path):
    if native.load_c(source) is None:
        assert not has_compiler()
        return
    (made,) = source.parent.glob("home/native-*/*.so")
    made.unlink()  # which leaves what is loaded as it was
    made.write_bytes(b"")
    native.load_c.cache_clear()
    library = native.load_c(source)
    assert library is not None
    assert library.f() == 7


def test_a_folder_into_which_others_may_write_is_not_trusted(source: Path, capsys: pytest.CaptureFixture[str]):
    folder = source.parent / "home" / f"native-{os.getuid()}"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert native.load_c(source) is None
    assert not has_compiler() or "can be written by others" in capsys.readouterr().err


@pytest.mark.parametrize("compiler", [" ", "gcc '", "no-such-compiler"])
def test_a_compiler_that_is_none(source: Path, monkeypatch: pytest.MonkeyPatch, compiler: str):
    monkeypatch.setenv("CC", compiler)
    assert native.load_c(source) is None


def test_no_home(source: Path, monkeypatch: pytest.MonkeyPatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native, "cache_home", homeless)
    assert native.load_c(source) is None


def test_without_openmp_it_is_said(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(native, "FLAGS", (("-no-such-flag",), ()))
    library = native.load_c(source)
    assert not has_compiler() or (library is not None and "on one thread" in capsys.readouterr().err)


def test_threads_that_need_a_kernel_at_once_all_get_it(tmp_path: Path):
    """Of the first use: they used to overwrite each other's files, and a library might be half of it for ever."""
    script = """
import threading
from pathlib import Path
from canon.core import native
start, found = threading.Barrier(4), []
def use():
    start.wait()
    found.append(native.load_c(Path("f.c")))
threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print([None if library is None else library.f() for library in found])
"""
    (tmp_path / "f.c").write_text("int f(void) { return 7; }\n")
    environment = {**os.environ, "CANON_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == str([7 if has_compiler() else None] * 4), done.stderr


def has_compiler() -> bool:
    """Whether the kernels can be compiled here."""
    return shutil.which(shlex.split(os.environ.get("CC") or "cc")[0]) is not None
