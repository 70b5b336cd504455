"""The house stands: imports go down only, docstrings say what a module may use, `utils` is what its readers need."""

import ast
import inspect
import json
import re
from functools import cache
from pathlib import Path

import pytest

import utils

ROOT = Path(__file__).resolve().parents[1]
TOP = "top"  # `python -m lumbar`
BASE = "base"  # the modules beside the rooms: names, storage, limits, in_flight, weights
# Who stands above whom: a room imports from itself and from what is to its right in a row. Neither of spine and grade
# is above the other, nor of grade and the phantom.
ROWS = (
    (TOP, "look", "run", "serve", "spine", "phantom", "data", BASE),
    (TOP, "look", "run", "serve", "grade", "data", BASE),
)
NOTHING = "nothing of the kit"


@cache
def kit() -> dict[str, Path]:
    """Every module of the kit by its dotted name."""
    files = [path for folder in ("lumbar", "phantom") for path in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return dict(zip(names, files, strict=True))


def room(module: str) -> str:
    """The room of a module. That of `lumbar.data.dicom` is data, that of `lumbar.names` is base."""
    parts = module.split(".")
    if parts[0] == "phantom":
        return "phantom"
    return parts[1] if len(parts) > 2 or module in rooms() else TOP if module == "lumbar.__main__" else BASE


@cache
def rooms() -> dict[str, str]:
    """The packages of the kit that are rooms: dotted name -> room."""
    return {
        name: name.split(".")[-1] for name, path in kit().items() if path.name == "__init__.py" and name != "lumbar"
    }


@cache
def tree_of(path: Path) -> ast.Module:
    """A module, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(name: str, path: Path, source: str | None = None) -> set[str]:
    """The kit's modules that a module imports, inside functions and at its top."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree_of(path) if source is None else ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in kit() else base for alias in node.names}
    return {module for module in found if module.split(".")[0] in ("lumbar", "phantom", "utils")} - {name}


def may_import(upper: str, lower: str) -> bool:
    """Whether a module of one room may import from another room, or its own."""
    return upper == lower or any(upper in row and lower in row and row.index(upper) < row.index(lower) for row in ROWS)


@pytest.mark.parametrize("name", kit())
def test_imports_go_down_only(name):
    wrong = [other for other in imports_of(name, kit()[name]) if other not in kit()]
    assert not wrong, f"{name} imports {wrong}, which is no module of the kit's rooms"
    wrong = [other for other in imports_of(name, kit()[name]) if not may_import(room(name), room(other))]
    assert not wrong, f"{name} imports {wrong}: from {room(name)} that leads up or aside"


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or by way of others: one list for each circle's members."""
    reached = {}
    for start in imports:
        seen, ahead = set(), list(imports[start])
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead += imports.get(module, ())
        reached[start] = seen
    groups = {
        frozenset(other for other in imports if other in reached[name] and name in reached[other])
        for name in imports
        if name in reached[name]
    }
    return sorted(map(sorted, groups))


# A package's __init__ takes from its modules what it shows; they do not take it back.
def test_no_module_imports_itself_by_way_of_others():
    assert circles({name: imports_of(name, path) for name, path in kit().items()}) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("from ..names import LEVELS", "lumbar.names"),
        ("from .. import storage", "lumbar.storage"),
        ("def f():\n    from .volume import Study", "lumbar.data.volume"),
        ("from . import volume", "lumbar.data.volume"),
        ("import phantom.grid as grid", "phantom.grid"),
        ("from lumbar.data import dicom", "lumbar.data.dicom"),
    ],
)
def test_imports_are_found(source, expected):
    assert imports_of("lumbar.data.tables", kit()["lumbar.data.tables"], source) == {expected}


def allowed_by(docstring: str, name: str) -> set[str]:
    """What a docstring's "May use:" names: modules and rooms (without their modules' names), dotted.

    The names are those of modules beside this one, of base modules, of rooms, and `room.module`.
    """
    found = re.search(r"May use:\s*(.+?)\.(\s|$)", docstring, re.S)
    assert found, f'{name}: its docstring has no line "May use: ... ."'
    text = " ".join(found[1].split())
    if text == NOTHING:
        return set()
    own, allowed = name.rpartition(".")[0], set()
    for word in text.split(", "):
        known = [f"{place}{word}" for place in (f"{own}.", "lumbar.", "") if f"{place}{word}" in kit()]
        assert known, f'{name}: {word!r} after "May use:" is no module and no room'
        allowed.add(known[0])
    return allowed


@pytest.mark.parametrize("name", [name for name, path in kit().items() if path.name != "__init__.py"])
def test_docstrings_say_what_is_used(name):
    docstring = ast.get_docstring(tree_of(kit()[name])) or ""
    allowed = allowed_by(docstring, name)
    used = imports_of(name, kit()[name])
    unsaid = [other for other in used if other not in allowed and other.rpartition(".")[0] not in allowed]
    assert not unsaid, f"{name} uses {unsaid}, which its docstring does not say"
    unused = allowed - used - {other.rpartition(".")[0] for other in used}
    assert not unused, f"{name} does not use {sorted(unused)}, which its docstring says it may"


def test_rooms_say_what_they_are_for():
    for name in rooms():
        assert ast.get_docstring(tree_of(kit()[name])), f"{name} has no docstring"


def unprepared_imports(source: str) -> list[int]:
    """Lines that import ultralytics, directly or with its trainer, where no call before them in the same function
    prepares it.

    The process' first import decides whether ultralytics may use the network: a file of tests that imports it
    unprepared makes others fail, or not, by the order in which they run.
    """
    found, prepared = set(), set()
    for top in ast.parse(source).body:
        for node in ast.walk(top):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("prepare_ultralytics"):
                prepared |= set(range(node.lineno, top.end_lineno + 1))
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "ultralytics" or name.endswith("detector_trainer") for name in names):
                found.add(node.lineno)
    return sorted(found - prepared)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_ultralytics_is_prepared_before_tests_import_it(path):
    lines = unprepared_imports(path.read_text(encoding="utf-8"))
    assert not lines, f"{path.name}: call prepare_ultralytics in the function before lines {lines} import ultralytics"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("from ultralytics.nn import tasks", [1]),
        ("import torch\nimport ultralytics.cfg as cfg", [2]),
        ("def f():\n    from lumbar.grade.detector_trainer import PatchTrainer", [2]),
        ("def f():\n    from lumbar.grade import detector_trainer\n    prepare_ultralytics(x)", [2]),
        ("def f():\n    prepare_ultralytics(x)\ndef g():\n    import ultralytics", [4]),
        ("def f():\n    own.prepare_ultralytics(x)\n    import ultralytics", []),
        ("from ultralytics_thop import x", []),
    ],
)
def test_unprepared_imports_are_found(source, expected):
    assert unprepared_imports(source) == expected


@cache
def used_of_utils() -> frozenset[str]:
    """The names that notebooks, README, docs and test_front.py, which stands for users' scripts, take from `utils`."""
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    texts = ["".join(cell["source"]) for notebook in notebooks for cell in notebook["cells"]]
    pages = [ROOT / "README.md", ROOT / "tests" / "test_front.py", *sorted((ROOT / "docs").glob("*.md"))]
    texts += [path.read_text(encoding="utf-8") for path in pages]
    return frozenset(re.findall(r"(?<![\w./])utils\.(?!py\b)([A-Za-z_]\w*)", "\n".join(texts)))


def test_public_functions_say_what_their_parameters_are():
    """numpydoc sections with an entry for each, and for nothing else."""
    unsaid = []
    for name in utils.__all__:
        function = getattr(utils, name)
        if not inspect.isfunction(function):
            continue
        _, *rest = re.split(r"^Parameters\n-+\n", inspect.getdoc(function) or "", flags=re.MULTILINE)
        section = re.split(r"^\w+\n-{3,}\n", rest[0], flags=re.MULTILINE)[0] if rest else ""
        entries = [line.split(":")[0] for line in section.splitlines() if line and not line.startswith(" ")]
        said = {entry.strip().lstrip("*") for line in entries for entry in line.split(",")}
        if said != set(inspect.signature(function).parameters):
            unsaid.append(name)
    assert unsaid == []


def test_utils_is_what_notebooks_and_readme_use():
    assert sorted(set(utils.__all__) - used_of_utils()) == [], "nobody uses these"
    assert sorted(used_of_utils() - set(utils.__all__)) == [], "these are missing"
    assert len(utils.__all__) == len(set(utils.__all__))


@pytest.mark.parametrize("name", utils.__all__)
def test_what_utils_names_is_there(name):
    assert hasattr(utils, name)
