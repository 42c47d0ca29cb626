"""Numbers, spans of time and names as people read them, on pages and in terminals."""

import math
from typing import Any

UNITS = {"tokens_per_second": "tokens/s", "examples_per_second": "examples/s", "utilisation": "model FLOPs utilisation"}


def number(value: float) -> str:
    """A number with four significant digits, thousands apart, powers of ten where it is tiny or huge.

    ``1234567 -> 1.235 M``, ``0.0003 -> 3×10⁻⁴``, ``1.4731 -> 1.473``, ``nan -> not a number``.
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa.rstrip('0').rstrip('.')}×10{power}".replace("-", "−")
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if size >= scale:
            return f"{value / scale:.4g} {unit}".replace("-", "−")
    if size >= 1e4:
        return f"{value:,.0f}".replace(",", " ").replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def spread(entry: dict[str, Any]) -> str:
    """A measured number of a claim's record: ``mean ± standard deviation [95% interval of the mean]``.

    The deviation has two significant digits; the mean stands alone where it has none, or none to speak of.
    """
    mean, deviation = number(entry["mean"]), entry["sd"]
    if not deviation:
        return mean
    low, high = map(number, entry["interval"])
    return f"{mean} ± {number(float(f'{deviation:.2g}'))} [{low}, {high}]"


def duration(seconds: float) -> str:
    """A time span: ``0.4 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def words(name: str) -> str:
    """A metric's or a field's name as words: ``validation_loss`` becomes ``validation loss``."""
    return UNITS.get(name, name.replace("_", " ").replace("/", " "))


def signs(condition: str) -> str:
    """A condition with the signs of print: ``x >= 2 * y`` becomes ``x ≥ 2 × y``."""
    for typed, printed in ((">=", "≥"), ("<=", "≤"), ("==", "="), (" * ", " × ")):
        condition = condition.replace(typed, printed)
    return condition
