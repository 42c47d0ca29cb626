"""The ``canon`` command: one short function for each thing it does.

Options are the fields of the same dataclasses that the library uses. Mistakes of the user are one line on standard
error and exit code 2; a clean stop (Ctrl-C) is exit code 130 and leaves a run that can be resumed.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from canon.arguments import parse
from canon.core.errors import UserError, disk_errors
from canon.running import clone, print_result, run_system, sample_system, train_system, verify

_HELP = """canon: every system of the AI Canon, running

  canon                     the map: what runs, what does not yet, minutes, claims reproduced
  canon list                the same, by section or as JSON
  canon show NAME           one entry: idea, paper, what to read first, presets, claims, the file to open
  canon run NAME            train a preset, sample from it, verify the quick claims, write the report
  canon train NAME          train only
  canon sample NAME PROMPT  sample from a trained run, or from the checkpoint that comes with the repository
  canon verify NAME         run the paper's claims: every seed, then the sabotage
  canon chat                talk with a language model
  canon generate            continue raw text with a language model
  canon fetch NAME          bring data or weights here; --list names them
  canon bench               compare with other libraries (from a clone of the repository)

Every command explains itself:  canon run --help,  canon run gpt2 --help"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with disk_errors():
            _dispatch(arguments)
    except UserError as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        print("\ncanon: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _dispatch(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("list", [])
    if command in ("-h", "--help", "help"):
        print(_HELP)
    elif command == "--version":
        import canon

        print(f"canon {canon.__version__}")
    elif command in _COMMANDS:
        _COMMANDS[command](rest)
    else:
        from difflib import get_close_matches

        near = get_close_matches(command, _COMMANDS, 1)
        hint = f"did you mean  canon {near[0]} ?" if near else "canon --help  lists the commands"
        raise UserError(f"there is no command {command!r}: {hint}")


# Reading the list ---------------------------------------------------------------------------------------------------


def list_entries(section: str | None = None, lang: Literal["en", "zh"] = "en", json: bool = False) -> None:
    """The map of the reading list: what runs, what does not yet, minutes on two CPU cores, claims reproduced.

    Args:
        section: only this section or part of the list, such as agents.
        lang: en or zh.
        json: print JSON.
    """
    from canon.catalog import pages

    print_result(pages.map_json(section) if json else pages.map_page(section, lang), json)


def show(name: Annotated[str, "positional"], lang: Literal["en", "zh"] = "en", json: bool = False) -> None:
    """One entry: idea, paper, what to read first, presets, claims with their latest verdicts, the file to open.

    Args:
        name: an entry of the list, such as gpt2.
        lang: en or zh.
        json: print JSON.
    """
    from canon.catalog import find, pages

    entry = find(name)
    print_result(pages.show_json(entry) if json else pages.show_page(entry, lang), json)


# Language models ----------------------------------------------------------------------------------------------------


def chat(arguments: list[str]) -> None:
    """Talk with a language model in this terminal; Ctrl-C stops a reply, Ctrl-D or /exit leaves."""
    from canon.core import llm

    parse(llm.chat_command, arguments, "chat")


def generate(arguments: list[str]) -> None:
    """Continue raw text with a language model."""
    from canon.core import llm

    parse(llm.generate_command, arguments, "generate")


# Data, weights, benchmarks ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FetchOptions:
    """What to bring here."""

    names: Annotated[tuple[str, ...], "positional"] = ()
    """Assets by name."""
    list: bool = False
    """List the assets: size, licence, whether they are here."""
    json: bool = False
    """Print JSON."""


def fetch(arguments: list[str]) -> None:
    """Bring data or weights into the cache (CANON_HOME, or ~/.cache/canon); everything is offline afterwards."""
    from canon.core.data import assets

    options = parse(FetchOptions, arguments, "fetch", fetch.__doc__)
    if options.list or not options.names:
        rows = assets.assets()
        if options.json:
            print_result([dataclasses.asdict(row) | {"cached": row.cached} for row in rows], True)
            return
        from rich.table import Table

        table = Table("asset", "here", "size", "licence", "what it is", box=None, pad_edge=False)
        for row in rows:
            here = "yes" if row.cached else "damaged" if row.home.exists() else ""
            table.add_row(row.name, here, f"{row.size / 1e6:.1f} MB", row.licence, row.note)
        print_result(table, False)
        return
    paths = {name: str(assets.fetch(name, quiet=options.json)) for name in options.names}
    if options.json:
        print_result(paths, True)
    else:
        for name, path in paths.items():
            print(f"{name}  {path}")


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure."""

    names: Annotated[tuple[str, ...], "positional"] = ()
    """Benchmarks by name; all of them by default."""


def bench(arguments: list[str]) -> None:
    """Compare with other libraries, both sides in one run, and write docs/PERFORMANCE.md (from a clone)."""
    import subprocess

    options = parse(BenchOptions, arguments, "bench", bench.__doc__)
    folder = clone("the benchmarks are")
    sys.exit(subprocess.run([sys.executable, "-m", "benchmarks", *options.names], cwd=folder).returncode)


def _complain(message: str) -> int:
    print(f"canon: {' '.join(message.split())}", file=sys.stderr)
    return 2


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "list": lambda arguments: parse(list_entries, arguments, "list"),
    "show": lambda arguments: parse(show, arguments, "show"),
    "run": run_system,
    "train": train_system,
    "sample": sample_system,
    "verify": verify,
    "chat": chat,
    "generate": generate,
    "fetch": fetch,
    "bench": bench,
}
