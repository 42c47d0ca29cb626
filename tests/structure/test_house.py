"""The rules of the house, as DESIGN states them."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from torch import nn

import canon
from canon.catalog import entries, find

ROOT = Path(canon.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
SYSTEMS = {entry.id: entry.system for entry in entries() if entry.system}
REFERENCES = {"transformers", "diffusers", "peft", "sklearn", "gensim", "torch_geometric", "sacrebleu", "trl", "scipy"}
READ_COST = 350 + 1200


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def files_of(module: str) -> list[Path]:
    """The files of a system: its module, or all of its folder."""
    path = ROOT.parent.joinpath(*module.split("."))
    return [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.rglob("*.py"))


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of everything a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def ancestors(name: str) -> set[str]:
    needed: set[str] = set()
    todo = [name]
    while todo:
        for other in find(todo.pop()).needs:
            if other not in needed:
                needed.add(other)
                todo.append(other)
    return needed


def lines_of_code(path: Path) -> int:
    """Lines that hold code: no blank lines, no comments, no docstrings."""
    source = path.read_text()
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in skipped for n, line in lines)


def test_core_knows_no_system():
    for path in (ROOT / "core").rglob("*.py"):
        outside = {name for name in imports(path) if name.startswith("canon.")} - {"canon.__version__"}
        bad = [name for name in outside if not name.startswith(("canon.core", "canon.catalog"))]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_imports_core_and_its_ancestors(name):
    allowed = {SYSTEMS[other] for other in ancestors(name) & SYSTEMS.keys()} | {SYSTEMS[name], "canon.core"}
    for path in files_of(SYSTEMS[name]):
        for imported in imports(path):
            if imported.startswith("canon."):
                assert any(f"{imported}.".startswith(f"{good}.") for good in allowed), f"{path.name} imports {imported}"


def test_references_stay_outside():
    for path in FILES:
        found = {name.split(".")[0] for name in imports(path)} & REFERENCES
        assert not found, f"{path.relative_to(ROOT)} imports {found}: references belong in tests and benchmarks"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file_is_short(path):
    limit = 300 if path.name == "fit.py" else 500
    count = len(path.read_text().splitlines())
    assert count <= limit, f"{count} lines, {limit} allowed"


@pytest.mark.parametrize("name", SYSTEMS)
def test_read_cost(name):
    """A file and what it imports can be read in one sitting; systems that it builds on are read for themselves."""
    for path in files_of(SYSTEMS[name]):
        imported = set()
        for dotted in imports(path):
            for candidate in (dotted, dotted.rsplit(".", 1)[0]):
                file = ROOT.parent.joinpath(*candidate.split(".")).with_suffix(".py")
                if candidate.startswith("canon.core.") and file.is_file():
                    imported.add(file)
        assert sum(map(lines_of_code, [path, *imported])) <= READ_COST, (path, sorted(file.name for file in imported))


@pytest.mark.parametrize("name", SYSTEMS)
def test_anatomy(name):
    module = importlib.import_module(SYSTEMS[name])
    text = module.__doc__ or ""
    assert re.search(r"\(.+\d{4}\)", text.splitlines()[0]), "the first line names title, authors and year"
    assert "http" in text, "the docstring links the paper"
    for part in ("The idea.", "Faithful.", "Scaled down.", "Deviations.", "Run."):
        assert f"\n{part}" in text, f"the docstring lacks {part!r}"
    assert f"canon run {name}" in text
    for part in ("Config", "PRESETS", "build", "batches", "train", "sample", "from_pretrained"):
        assert hasattr(module, part), f"{name} lacks {part}"
    assert "laptop" in module.PRESETS
    assert all(isinstance(preset, module.Config) for preset in module.PRESETS.values())
    claims = ROOT.joinpath("claims", *SYSTEMS[name].split(".")[1:]).with_suffix(".py")
    assert claims.is_file(), f"{claims} is missing"


# What stands in a system's file, in this order; a larger system's files each hold a part of it.
ANATOMY = ("Config", "PRESETS", "modules", "from_pretrained", "train", "sample")


def anatomy(path: Path) -> list[str]:
    """Which parts of ANATOMY a file holds, in its order."""
    found = []
    for node in ast.parse(path.read_text()).body:
        names = [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            module = isinstance(node, ast.ClassDef) and "nn.Module" in map(ast.unparse, node.bases)
            names = ["modules" if module else node.name]
        found += [name for name in names if name in ANATOMY]
    return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_parts_stand_in_one_order(name):
    files = {path: anatomy(path) for path in files_of(SYSTEMS[name])}
    for path, parts in files.items():
        assert parts == sorted(parts, key=ANATOMY.index), path
        assert ("Config" in parts) == ("PRESETS" in parts), f"{path.name}: PRESETS stands beside Config"
    assert {part for parts in files.values() for part in parts} == set(ANATOMY)


def leaves(kind: type) -> int:
    hints = inspect.get_annotations(kind, eval_str=True)
    return sum(
        leaves(hints[f.name]) if dataclasses.is_dataclass(hints.get(f.name)) else 1 for f in dataclasses.fields(kind)
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_config_is_small_frozen_and_documented(name):
    config = importlib.import_module(SYSTEMS[name]).Config
    assert config.__dataclass_params__.frozen
    assert leaves(config) <= 40
    source = inspect.getsource(config)
    for field in dataclasses.fields(config):
        assert re.search(rf"\n    {field.name}:.*\n(?:        .*\n|    \).*\n)*    \"\"\"", source), (
            f"{field.name}: undocumented"
        )


def test_core_constructors_are_small():
    for path in (ROOT / "core").rglob("*.py"):
        module = importlib.import_module(module_name(path)) if path.name != "__main__.py" else None
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module_name(path) and issubclass(kind, nn.Module):
                count = len(inspect.signature(kind.__init__).parameters) - 1
                assert count <= 12, f"{kind.__name__} takes {count} parameters"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    overrides = any(ast.unparse(d) in ("override", "property.setter") for d in method.decorator_list)
                    setter = any(ast.unparse(d).endswith(".setter") for d in method.decorator_list)
                    if method.name != "forward" and not overrides and not setter:
                        assert ast.get_docstring(method), f"{node.name}.{method.name}"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_reading_the_list_loads_no_torch():
    code = "import sys, canon, canon.cli; canon.cli.main(['list']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"


def test_nothing_is_left_undone():
    for path in [
        *FILES,
        *ROOT.parent.joinpath("tests").rglob("*.py"),
        *ROOT.parent.joinpath("benchmarks").rglob("*.py"),
    ]:
        if path == Path(__file__):
            continue
        source = path.read_text()
        for word in ("TODO", "FIXME", "type: ignore", "raise NotImplementedError", "weights_only=False"):
            assert word not in source, f"{path} holds {word}"
