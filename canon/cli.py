"""The ``canon`` command: one short function for each thing it does.

Options are the fields of the same dataclasses that the library uses. Mistakes of the user are one line on standard
error and exit code 2; a clean stop (Ctrl-C) is exit code 130 and leaves a run that can be resumed.
"""

import dataclasses
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_type_hints

from canon.arguments import parse, value_of
from canon.core.errors import UserError, disk_errors

_HELP = """canon: every system of the AI Canon, running

  canon                     the map: what runs, what does not yet, minutes, claims reproduced
  canon list                the same, by section or as JSON
  canon show NAME           one entry: idea, paper, what to read first, presets, claims, the file to open
  canon run NAME            train a preset, sample from it, verify the quick claims, write the report
  canon train NAME          train only
  canon sample NAME PROMPT  sample from a trained run
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

    _print(pages.map_json(section) if json else pages.map_page(section, lang), json)


def show(name: Annotated[str, "positional"], lang: Literal["en", "zh"] = "en", json: bool = False) -> None:
    """One entry: idea, paper, what to read first, presets, claims with their latest verdicts, the file to open.

    Args:
        name: an entry of the list, such as gpt2.
        lang: en or zh.
        json: print JSON.
    """
    from canon.catalog import find, pages

    entry = find(name)
    _print(pages.show_json(entry) if json else pages.show_page(entry, lang), json)


# Running systems ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where and how to run."""

    system: Annotated[str, "positional"]
    """A system of the list, such as gpt2."""
    preset: str = "laptop"
    """A named configuration of the system; every field of it can be changed below."""
    name: str = ""
    """Name of the run; by default the preset and the time."""
    resume: bool = False
    """Go on with the latest run of the system, or with the one called --name."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """CPU threads; by default as many as there are cores."""
    root: str = "runs"
    """Folder of all runs."""
    json: bool = False
    """Print one JSON object at the end and no progress."""


def run_system(arguments: list[str]) -> None:
    """Train a preset, sample from it, verify the quick claims, and write the report."""
    module, options, run, model = _train(arguments, "run")
    sample = module.sample(model, run)
    run.report()  # the claims take a while, and Ctrl-C may end them
    records = _verified(module, quick=True, options=options)
    run.claims(records)
    report = run.report()
    last = {key: value for row in run.metrics() for key, value in row.items()}
    if options.json:
        claims = {record.claim: record.verdict for record in records}
        _print({"run": str(run.path), "report": str(report), "metrics": last, "sample": sample, "claims": claims}, True)
    else:
        print(f"\n{sample.rstrip()}\n")
        print(f"report   {report}")
        print(f"sample   canon sample {options.system} --run {run.path}")
        print(f"claims   canon verify {options.system}{_root_option(options.root)}")


def train_system(arguments: list[str]) -> None:
    """Train a preset, or go on with a run."""
    _, options, run, _ = _train(arguments, "train")
    last = {key: value for row in run.metrics() for key, value in row.items()}
    if options.json:
        _print({"run": str(run.path), "metrics": last}, True)
    else:
        print(f"trained  {run.path}\nsample   canon sample {options.system} --run {run.path}")


def _train(arguments: list[str], command: str) -> tuple[ModuleType, RunOptions, Any, Any]:
    module, options, config = _options_and_config(arguments, command)
    from canon.core import device
    from canon.core.lab.files import read_json
    from canon.core.lab.run import Run
    from canon.core.training import distributed
    from canon.core.training.fit import Interrupted

    device.use_device(options.device)
    if options.resume:
        run = _run(options.system, options.name, options.root)
        threads = read_json(run.path / "environment.json").get("threads")
        device.use_threads(options.threads or threads)  # other threads would round sums differently
        run = Run(run.path, config)
    else:
        device.use_threads(options.threads)
        name = options.name or distributed.of_leader(_new_name(options.preset))
        run = Run.create(options.system, name, config, options.root)
    run.quiet = options.json
    if run.leader and not options.json:
        print(f"run      {run.path}", file=sys.stderr)
    try:
        model = module.train(config, run)
    except Interrupted as stop:
        run.report()
        if run.leader:
            again = f"canon {command} {options.system} --resume --name {run.name}{_root_option(options.root)}"
            print(f"\ncanon: {stop}. Go on with:  {again}", file=sys.stderr)
        sys.exit(130)
    finally:
        _, processes = distributed.world()
        distributed.leave()
    if not run.leader:  # what follows is the work of one process
        sys.exit(0)
    if processes > 1:  # this one holds its shard only
        model, *_ = module.from_pretrained(run.path / "model")
    return module, options, run, model


def _options_and_config(arguments: list[str], command: str) -> tuple[ModuleType, RunOptions, Any]:
    """The system, the options, and its configuration: a preset, or that of the run to resume, with what was changed."""
    word = _word_for_system(arguments)
    if word is None:
        parse(RunOptions, arguments, command)  # prints the help, or that the name is missing
        raise UserError(f"canon {command} needs the name of a system: canon {command} gpt2")
    name, module = _system(word)
    preset = value_of("--preset", arguments) or "laptop"
    if "--resume" in arguments:
        from canon.core.hub.pretrained import from_plain

        run = _run(name, value_of("--name", arguments) or "", value_of("--root", arguments) or "runs")
        default = from_plain(module.Config, run.config)
    elif preset in module.PRESETS:
        default = module.PRESETS[preset]
    else:
        raise UserError(f"{name} has no preset {preset!r}: choose from {', '.join(module.PRESETS)}")
    both = dataclasses.make_dataclass(
        "Command",
        [("options", RunOptions), ("config", module.Config, dataclasses.field(default=default))],
    )
    both.__doc__ = _COMMANDS[command].__doc__
    parsed = parse(both, arguments, f"{command} {name}")
    return module, dataclasses.replace(parsed.options, system=name), parsed.config


def _word_for_system(arguments: list[str]) -> str | None:
    """The word that names the system: the first entry of the list among those that cannot be an option's value.

    The options are known only when the system is, so the values of its own are told apart by the list.
    """
    from canon.catalog import find

    valued = {f"--{field.name}" for field in dataclasses.fields(RunOptions) if field.type is not bool}
    pairs = zip(["", *arguments], arguments)
    words = [word for before, word in pairs if not word.startswith("-") and before not in valued]
    for word in words:
        with suppress(UserError):
            find(word)
            return word
    return words[0] if words else None


def sample_system(arguments: list[str]) -> None:
    """Sample from a trained run."""
    if not arguments or arguments[0].startswith("-"):
        if "--help" in arguments or "-h" in arguments:
            print("usage: canon sample NAME [PROMPT] [--run FOLDER] [options]; canon sample NAME --help  lists them")
            return
        raise UserError("canon sample needs the name of a system first: canon sample gpt2 'To be'")
    (name, module), rest = _system(arguments[0]), arguments[1:]
    signature = inspect.signature(module.sample)
    own = list(signature.parameters.values())[2:]
    hints = get_type_hints(module.sample)

    def collect(**chosen: Any) -> dict[str, Any]:
        return chosen

    places = {"run": (str, ""), "root": (str, "runs"), "device": (str, "auto"), "threads": (int | None, None)}
    extra = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for key, (kind, default) in {**places, "json": (bool, False)}.items()
    ]
    for index, parameter in enumerate(own):
        hint = hints[parameter.name]
        hint = Annotated[hint, "positional"] if parameter.name == "prompt" else hint
        own[index] = parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
    collect.__doc__ = module.sample.__doc__
    collect.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *extra]}
    vars(collect)["__signature__"] = inspect.Signature([*own, *extra])  # what tyro reads
    chosen = parse(collect, rest, f"sample {name}")
    where, root, place, threads, as_json = (chosen.pop(parameter.name) for parameter in extra)
    from canon.core import device
    from canon.core.lab.run import Run

    device.use_threads(threads)
    target = device.use_device(place)
    run = Run.open(where) if where else Run.latest(name, root)
    model, *_ = module.from_pretrained(run.path / "model")
    text = module.sample(model.to(target), run, **chosen)
    _print({"run": str(run.path), "sample": text}, True) if as_json else print(text)


# Claims -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """Which claims to verify, and how."""

    system: Annotated[str, "positional"] = ""
    """A system of the list; none with --all."""
    all: bool = False
    """Every claim of every system (hours)."""
    claim: str = ""
    """Only the claim of this name."""
    quick: bool = False
    """Only claims of half a minute or less."""
    fresh: bool = False
    """Forget what an interrupted verification had finished."""
    publish: bool = False
    """Put the records, but for errors, into canon/claims/records and write docs/RESULTS.md (from a clone)."""
    device: str = "cpu"
    """Where to compute: auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """CPU threads; by default as many as there are cores."""
    root: str = "runs"
    """Folder of all runs."""
    json: bool = False
    """Print one JSON object for each claim."""


def verify(arguments: list[str]) -> None:
    """Run the paper's claims: every seed, then the sabotage; goes on where an earlier verification stopped."""
    options = parse(VerifyOptions, arguments, "verify", verify.__doc__)
    if bool(options.system) == options.all:
        raise UserError("name one system, or say --all: canon verify gpt2")
    import canon
    from canon.core import device

    if options.publish:
        _clone("the published records are")
    device.use_device(options.device)
    options = dataclasses.replace(options, threads=device.use_threads(options.threads))
    failed = False
    for name, module in map(_system, canon.systems() if options.all else [options.system]):
        records = _verified(module, quick=options.quick, options=options, only=options.claim, system=name)
        failed |= any(record.verdict == "error" for record in records)
    if failed:
        sys.exit(1)


def _verified(module: ModuleType, quick: bool, options: Any, only: str = "", system: str = "") -> list[Any]:
    from importlib import import_module

    from canon.core.device import pick_device
    from canon.core.lab.claim import claims_of
    from canon.core.lab.claim import verify as verify_claim

    place = module.__name__.replace("canon.", "canon.claims.", 1)
    claims = claims_of(import_module(place))
    if only and only not in [claim.name for claim in claims]:
        raise UserError(f"{system} has no claim {only!r}: choose from {', '.join(claim.name for claim in claims)}")
    records = []
    for claim in claims:
        if (only and claim.name != only) or (quick and not claim.quick):
            continue
        record = verify_claim(
            claim,
            root=options.root,
            device=str(pick_device()),
            threads=options.threads,
            fresh=getattr(options, "fresh", False),
            quiet=options.json,
        )
        records.append(record)
        if getattr(options, "publish", False) and record.verdict != "error":  # an error says nothing of the claim
            from canon.core.lab import ledger

            ledger.publish([record])
        if system and options.json:
            print(json.dumps(record.as_json()), flush=True)
        elif not options.json:
            print(f"{record.verdict:<20} {claim.name}: {claim.statement}\n{'':<20} {record.reason}", flush=True)
    return records


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
            _print([dataclasses.asdict(row) | {"cached": row.cached} for row in rows], True)
            return
        from rich.table import Table

        table = Table("asset", "here", "size", "licence", "what it is", box=None, pad_edge=False)
        for row in rows:
            here = "yes" if row.cached else "damaged" if row.home.exists() else ""
            table.add_row(row.name, here, f"{row.size / 1e6:.1f} MB", row.licence, row.note)
        _print(table, False)
        return
    paths = {name: str(assets.fetch(name, quiet=options.json)) for name in options.names}
    if options.json:
        _print(paths, True)
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
    folder = _clone("the benchmarks are")
    sys.exit(subprocess.run([sys.executable, "-m", "benchmarks", *options.names], cwd=folder).returncode)


# Shared by the commands ---------------------------------------------------------------------------------------------


def _system(name: str) -> tuple[str, ModuleType]:
    """The id, which is also the name of the folder of its runs, and the module of a system, however it was typed."""
    from canon import catalog, load

    entry = catalog.find(name)
    return entry.id, load(entry.id)


def _clone(what: str) -> Path:
    """The folder of the clone of the repository that this package runs from."""
    folder = Path(__file__).parents[1]
    if not (folder / "benchmarks" / "__main__.py").is_file():
        raise UserError(f"{what} part of the repository, not of the package: run this in a clone of it")
    return folder


def _root_option(root: str) -> str:
    """What a command that is to find the run again must say of its root."""
    return "" if root == "runs" else f" --root {shlex.quote(root)}"


def _run(system: str, name: str, root: str) -> Any:
    from canon.core.lab.run import Run

    return Run.open(Path(root) / system / name) if name else Run.latest(system, root)


def _new_name(preset: str) -> str:
    from datetime import datetime

    return f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False, indent=1, default=str))
    else:
        from rich.console import Console

        Console(highlight=False).print(value)


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
