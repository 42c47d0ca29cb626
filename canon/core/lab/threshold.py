"""Thresholds of claims: one line that people read and the verdict is computed from, so the two cannot drift apart."""

import ast
import math

FUNCTIONS = {"abs": abs, "min": min, "max": max}
ALLOWED = (
    ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.Pow, ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.Name, ast.Load,
)  # fmt: skip


class Threshold:
    """A condition on measured numbers, such as ``"scaled >= 0.9 and unscaled <= 0.5"``.

    Comparisons (also chained, ``0.1 <= ratio <= 10``) of numbers, measured names, ``+ - * / **`` and ``abs``, ``min``,
    ``max``, joined by ``and``, ``or``, ``not``. A part that speaks of a number that is nan is never met.

    Attributes:
        text: the line itself.
        names: the measured names it speaks of.

    Raises:
        ValueError: the line is not such a condition.
    """

    def __init__(self, text: str):
        self.text = " ".join(text.split())
        try:
            condition = ast.parse(self.text, mode="eval").body
        except SyntaxError:
            condition = None
        if condition is None or not _is_condition(condition) or not all(map(_is_allowed, ast.walk(condition))):
            raise ValueError(
                f"{self.text!r} is not a condition on measured numbers: write one such as "
                "'scaled >= 0.9 and unscaled <= 0.5', in the names of the Measurement"
            )
        self.names = _names(condition)
        self._condition = condition

    def holds(self, numbers: dict[str, float]) -> bool:
        """Whether the measured numbers meet the condition.

        Raises:
            ValueError: a name of the condition was not measured.
        """
        missing = sorted(self.names - numbers.keys())
        if missing:
            raise ValueError(f"{missing[0]} was not measured (measured: {', '.join(sorted(numbers)) or 'nothing'})")
        return all(_is_met(part, numbers) for part in _conjunction(self._condition))

    def parts(self) -> list["Threshold"]:
        """The conditions joined by the outermost ``and``; the condition itself where there is none."""
        return [Threshold(ast.unparse(part)) for part in _conjunction(self._condition)]

    def limits(self) -> tuple[str, list[float]] | None:
        """``("ratio", [0.1, 10.0])`` for ``0.1 <= ratio <= 10``; None when it is not one name against numbers."""
        if not isinstance(self._condition, ast.Compare):
            return None
        sides = [self._condition.left, *self._condition.comparators]
        names = [side.id for side in sides if isinstance(side, ast.Name)]
        numbers = [
            float(side.value)
            for side in sides
            if isinstance(side, ast.Constant) and isinstance(side.value, int | float)
        ]
        return (names[0], numbers) if len(names) == 1 and len(numbers) == len(sides) - 1 else None


def _conjunction(condition: ast.expr) -> list[ast.expr]:
    """What the outermost ``and`` joins."""
    return condition.values if isinstance(condition, ast.BoolOp) and isinstance(condition.op, ast.And) else [condition]


def _is_condition(node: ast.AST) -> bool:
    """Whether an expression is true or false by its form: comparisons, and what joins them."""
    if isinstance(node, ast.BoolOp):
        return all(map(_is_condition, node.values))
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not) and _is_condition(node.operand)
    return isinstance(node, ast.Compare)


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
    return isinstance(node, ALLOWED)


def _names(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)} - FUNCTIONS.keys()


def _is_met(part: ast.expr, numbers: dict[str, float]) -> bool:
    if any(math.isnan(numbers[name]) for name in _names(part)):
        return False
    # Every node has passed _is_allowed: there is no attribute, index or call here but those of FUNCTIONS.
    code = compile(ast.Expression(part), "<threshold>", "eval")
    try:
        return bool(eval(code, {"__builtins__": {}}, {**FUNCTIONS, **numbers}))
    except (ZeroDivisionError, OverflowError):
        return False
