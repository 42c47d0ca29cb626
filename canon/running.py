"""The commands that run systems: train, sample, verify."""

import dataclasses
import inspect
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_type_hints

from canon.arguments import parse, value_of
from canon.core.errors import UserError, disk_errors

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
    module, options, config, run, model = _train(arguments, "run")
    with _going_on(run, options, "run"):
        prompt = module.example(config) if hasattr(module, "example") else ""  # of what this very run learned
        sample = _shown(module.sample(model, run, *filter(None, [prompt])), run)
        run.report()  # the claims take a while, and Ctrl-C may end them
        records = _verified(module, quick=True, options=options)
        run.claims(records)
        report = run.report()
    last = {key: value for row in run.metrics() for key, value in row.items()}
    if options.json:
        claims = {record.claim: record.verdict for record in records}
        print_result(
            {"run": str(run.path), "report": str(report), "metrics": last, "sample": sample, "claims": claims}, True
        )
    else:
        print(f"\n{sample.rstrip()}\n")
        print(f"report   {report}")
        print(f"sample   canon sample {options.system} --run {run.path}")
        print(f"claims   canon verify {options.system}{_root_option(options.root)}")


def train_system(arguments: list[str]) -> None:
    """Train a preset, or go on with a run."""
    _, options, _, run, _ = _train(arguments, "train")
    last = {key: value for row in run.metrics() for key, value in row.items()}
    if options.json:
        print_result({"run": str(run.path), "metrics": last}, True)
    else:
        print(f"trained  {run.path}\nsample   canon sample {options.system} --run {run.path}")


def _train(arguments: list[str], command: str) -> tuple[ModuleType, RunOptions, Any, Any, Any]:
    module, options, config = _options_and_config(arguments, command)
    from canon.core import device
    from canon.core.lab.files import read_json
    from canon.core.lab.run import Run
    from canon.core.training import distributed

    device.use_device(options.device)
    if options.resume:
        run = _run(options.system, options.name, options.root)
        threads = read_json(run.path / "environment.json").get("threads")
        device.use_threads(options.threads or threads)  # other threads would round sums differently
        run, new = Run(run.path, config), False
    else:
        device.use_threads(options.threads)
        name = options.name or distributed.of_leader(_new_name(options.preset))
        new = not (Path(options.root) / options.system / name).exists()
        run = Run.create(options.system, name, config, options.root)
    run.quiet = options.json
    if run.leader and not options.json:
        print(f"run      {run.path}", file=sys.stderr)
    try:
        with _going_on(run, options, command):
            model = module.train(config, run)
    except UserError:
        if new and run.leader and not any(run.path.rglob("metrics.jsonl")):  # nothing began
            shutil.rmtree(run.path)
        raise
    finally:
        _, processes = distributed.world()
        distributed.leave()
    if not run.leader:  # what follows is the work of one process
        sys.exit(0)
    if processes > 1:  # this one holds its shard only
        model, *_ = module.from_pretrained(run.path / "model")
    return module, options, config, run, model


@contextmanager
def _going_on(run: Any, options: RunOptions, command: str) -> Iterator[None]:
    """Say how to go on with a run that Ctrl-C (anywhere) or SIGTERM (while it learns) stops."""
    from canon.core.training.fit import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        if run.leader:
            again = f"canon {command} {options.system} --resume --name {run.name}{_root_option(options.root)}"
            print(f"\ncanon: {stop if str(stop) else 'stopped'}. Go on with:  {again}", file=sys.stderr)
        run.report()
        sys.exit(130)


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
    both.__doc__ = {"run": run_system, "train": train_system}[command].__doc__
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
    """Sample from a trained run, or where there is none from the checkpoint that comes with the repository."""
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

    places = {"run": (str, ""), "out": (str, ""), "root": (str, "runs"), "device": (str, "auto")}
    extra = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for key, (kind, default) in {**places, "threads": (int | None, None), "json": (bool, False)}.items()
    ]
    for index, parameter in enumerate(own):
        hint = hints[parameter.name]
        hint = Annotated[hint, "positional"] if parameter.name == "prompt" else hint
        own[index] = parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
    collect.__doc__ = inspect.cleandoc(module.sample.__doc__ or "") + _PLACES
    collect.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *extra]}
    vars(collect)["__signature__"] = inspect.Signature([*own, *extra])  # what tyro reads
    chosen = parse(collect, rest, f"sample {name}")
    where, out, root, place, threads, as_json = (chosen.pop(parameter.name) for parameter in extra)
    from canon.core import device

    device.use_threads(threads)
    target = device.use_device(place)
    if out and getattr(hints["return"], "__name__", "") == "Image" and Path(out).suffix.lower() not in PICTURES:
        raise UserError(f"{out}: pictures are written as {', '.join(PICTURES)}")
    run = _trained(name, where, root)
    model, *_ = module.from_pretrained(run.path / "model")
    made = _shown(module.sample(model.to(target), run, **chosen), run, out)
    print_result({"run": str(run.path), "sample": made}, True) if as_json else print(made)


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff")

_PLACES = """
    out: file for the sample, such as apple.png; by default pictures stay in the run and text is printed.
    root: folder of all runs.
    device: auto, cpu, cuda, cuda:1 or mps.
    threads: CPU threads; by default as many as there are cores.
    json: print JSON.
"""


def _shown(sample: Any, run: Any, out: str = "") -> str:
    """What to print of a sample: text itself, of a picture its file; written to ``out`` where that is given."""
    if not out:
        return sample if isinstance(sample, str) else str(run.path / "samples" / run.samples()[-1]["file"])
    with disk_errors(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(sample, str) == (Path(out).suffix.lower() in PICTURES):
            raise UserError(
                f"{out}: this is {'text' if isinstance(sample, str) else 'a picture'}, so name it otherwise"
            )
        if isinstance(sample, str):
            Path(out).write_text(sample, "utf-8")
        else:
            sample.save(out)
    return out


def _trained(system: str, where: str, root: str) -> Any:
    """The run to sample from: the one named, the latest, or a copy of the checkpoint that comes with the repository."""
    from canon.core.hub.tensors import WEIGHTS_FILE
    from canon.core.lab.run import SHIPPED, Run

    if where:
        return Run.open(where)
    try:
        newest = Run.latest(system, root)
    except UserError:
        newest = None
    try:
        run = Run.latest(system, root, holding=f"model/{WEIGHTS_FILE}")
    except UserError:
        folder, copy = Path(__file__).parents[1] / "checkpoints", Path(root) / system / SHIPPED
        shipped = sorted(path.parent for path in folder.glob("*/config.json") if path.parts[-2].split("-")[0] == system)
        if not shipped:
            if newest is not None:
                return newest  # which says what it lacks
            raise
        with disk_errors(str(copy)):
            shutil.copytree(shipped[0], copy, dirs_exist_ok=True)
        run = Run.open(copy)
    if newest is not None and newest.path != run.path and run.name == SHIPPED:
        print(f"canon: {newest.path} is not trained to its end, so this is from {run.path}", file=sys.stderr)
    return run


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
        clone("the published records are")
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


# Shared by the commands ---------------------------------------------------------------------------------------------


def _system(name: str) -> tuple[str, ModuleType]:
    """The id, which is also the name of the folder of its runs, and the module of a system, however it was typed."""
    from canon import catalog, load

    entry = catalog.find(name)
    return entry.id, load(entry.id)


def clone(what: str) -> Path:
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


def print_result(value: Any, as_json: bool) -> None:
    """Print a value as JSON, or as rich shows it."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False, indent=1, default=str))
    else:
        from rich.console import Console

        Console(highlight=False).print(value)
