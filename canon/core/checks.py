"""What the numbers of a configuration must be."""

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
