"""Command-line arguments into dataclasses and function calls (tyro), with mistakes told in one line."""

import contextlib
import dataclasses
import io
import re
from typing import Any, get_args, get_type_hints

from canon.core.errors import UserError


def parse(target: Any, arguments: list[str], command: str, description: str | None = None) -> Any:
    """Fill a dataclass or call a function from command-line arguments; mistakes become one line.

    A field annotated ``"positional"`` is one; the marker keeps tyro out of what does not parse.
    """
    if _says_it_all(target, arguments):
        return target(*arguments)
    import tyro

    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            return tyro.cli(
                _with_positionals(target),
                prog=f"canon {command}",
                args=arguments,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [re.sub(r"[│╭╮╰╯─┌┐└┘|]", " ", line).strip() for line in error.getvalue().splitlines()]
        said = [line for line in lines if line and not set(line) <= {"-", "─"}][1:]
        message = next((line for line in said if ":" in line), "")
        if not message:  # a sentence over several lines, such as that on a wrong choice
            end = next((index for index, line in enumerate(said) if line.startswith("For full helptext")), len(said))
            message = " ".join(said[:end]) or "cannot read the arguments"
        if message.startswith("Missing from"):
            message = "something is missing: " + "; ".join(
                line.split(" (required)")[0] for line in said if "(required)" in line
            )
        raise UserError(f"{message}  (canon {command} --help  explains)") from None


def _says_it_all(target: Any, arguments: list[str]) -> bool:
    """Whether the arguments are just a function's positional ones, so that tyro, slow to import, is not needed."""
    plain = not dataclasses.is_dataclass(target) and "__signature__" not in vars(target)
    if not plain or any(argument.startswith("-") for argument in arguments):
        return False
    hints = get_type_hints(target, include_extras=True)
    return len(arguments) == sum("positional" in get_args(hint)[1:] for hint in hints.values())


def _with_positionals(target: Any) -> Any:
    import tyro

    for name, hint in get_type_hints(target, include_extras=True).items():
        if "positional" in get_args(hint)[1:]:
            target.__annotations__[name] = tyro.conf.Positional[get_args(hint)[0]]
        elif dataclasses.is_dataclass(hint):
            _with_positionals(hint)
    return target


def value_of(flag: str, arguments: list[str]) -> str | None:
    """What follows ``flag`` among the arguments, before they are parsed; None where it does not stand."""
    for index, word in enumerate(arguments):
        if word == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{flag}="):
            return word.split("=", 1)[1]
    return None
