"""What the numbers of a configuration, or of a command, must be."""

import math

from canon.core.errors import UserError


def at_least(config: object, least: int, *names: str) -> None:
    """Refuse a configuration with numbers that are too small.

    Args:
        config: a configuration.
        least: the smallest number that makes sense.
        names: of its fields, each one number, or several of which there must be one.

    Raises:
        UserError: a number is smaller, or a field of several is empty.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, tuple):
            if not value or min(value) < least:
                raise UserError(f"{name} needs whole numbers of at least {least}, not {list(value)}")
        elif not value >= least:  # NaN, too
            raise UserError(f"{name} must be at least {least}, not {value}")


def check_numbers(*, least: float = -math.inf, **numbers: float) -> None:
    """Refuse numbers that are infinite, none at all, or too small.

    Args:
        least: the smallest number that makes sense.
        numbers: by name.

    Raises:
        UserError: one is not so.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, not {value}")
        if value < least:
            raise UserError(f"{name} must be at least {least:g}, not {value}")


def check_batch(count: int, batch_size: int, option: str = "--batch-size", what: str = "pictures") -> None:
    """Refuse to learn from fewer pictures than a batch holds.

    Args:
        count: how many there are.
        batch_size: how many a batch is to have.
        option: of the command, which sets it.
        what: they are.

    Raises:
        UserError: they do not fill it.
    """
    if count < batch_size:
        raise UserError(f"{count} {what} do not fill a batch of {batch_size}: lower {option}")
