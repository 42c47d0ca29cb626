"""Where a run happened: software, machine and the command, gathered without importing torch."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import canon


def environment() -> dict[str, Any]:
    """Facts about this process: versions, git commit, processor, cores, threads, date (UTC) and command line."""
    torch = sys.modules.get("torch")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "canon": canon.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
    }


def machine() -> str:
    """The machine in one line, for the ledger: processor, cores, torch."""
    facts = environment()
    return f"{facts['processor']}, {facts['cores']} cores, torch {facts['torch']}"


def command_line() -> list[str]:
    """The command as typed, without the path of the program: ``["canon", "run", "gpt2"]``."""
    program = Path(sys.argv[0] or "python")
    name = program.parent.name if program.name == "__main__.py" else program.name
    return [name, *sys.argv[1:]]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that is running, with ``+changes`` when its files differ from it; None elsewhere."""
    folder = Path(canon.__file__).parent
    if not (folder.parent / ".git").exists():  # an installed package inside somebody else's repository is not ours
        return None
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.returncode else "")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
