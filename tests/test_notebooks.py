"""Every notebook has the form that Kaggle, papermill and readers rely on."""

import ast
import builtins
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

import utils

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def source_of(cell):
    return "".join(cell["source"])


def python_of(cell):
    """The cell as the kernel runs it, its magics turned into calls."""
    return TransformerManager().transform_cell(source_of(cell))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def tagged(notebook, tag):
    return [cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])]


def test_all_stages_have_a_notebook():
    names = {path.stem for path in NOTEBOOKS}
    assert names >= {
        "00_pipeline",
        "01_preprocess",
        "02_train_spinenet",
        "03_train_yolo",
        "04_train_vit",
        "05_inference",
        "06_report",
        "inspect",
    }


def test_format_is_valid_and_python3(notebook):
    nbformat.validate(nbformat.from_dict(notebook))
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["kernelspec"]["language"] == "python"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_small_enough_for_kaggle(path):
    assert path.stat().st_size < 1_000_000


def test_no_outputs_and_no_traces_of_a_run(notebook):
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert "papermill" not in cell["metadata"]
    assert not {"papermill", "widgets"} & set(notebook["metadata"])


def test_begins_with_a_title(notebook):
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown" and source_of(first).startswith("# ")


def test_one_cell_of_parameters_with_literals(notebook):
    cells = tagged(notebook, "parameters")
    assert len(cells) == 1
    assert notebook["cells"].index(cells[0]) == 1
    source = source_of(cells[0])
    assert source.startswith("# Parameters:")
    names, lines = set(), set()
    for node in ast.parse(source).body:
        assert isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        ast.literal_eval(node.value)
        assert node.lineno == node.end_lineno and node.lineno not in lines, "one parameter a line"
        assert "#" in source.splitlines()[node.lineno - 1], f"{node.targets[0].id}: say unit or why"
        assert node.targets[0].id.isupper() and node.targets[0].id not in names
        names.add(node.targets[0].id)
        lines.add(node.lineno)


def test_the_same_bootstrap_follows_the_parameters():
    cells = [json.loads(path.read_text(encoding="utf-8"))["cells"][2] for path in NOTEBOOKS]
    assert all(cell["metadata"].get("tags") == ["bootstrap"] for cell in cells)
    assert len({source_of(cell) for cell in cells}) == 1
    assert "import utils" in source_of(cells[0]) and len(source_of(cells[0]).splitlines()) <= 16


def test_every_name_is_defined_and_what_is_taken_from_utils_is_its_face(notebook):
    """A name that another module happened to leave in the notebook's reach fails only when its cell runs."""
    tree = ast.parse("\n".join(python_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"))
    defined = {*dir(builtins), "In", "display", "get_ipython"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert not used - defined
    taken = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "utils"}
    assert not taken - set(utils.__all__)


@pytest.mark.parametrize("mount", ["lumbar-code", "datasets/someone/lumbar-code", "datasets/someone/lumbar-code/kit"])
def test_the_bootstrap_finds_the_kit_here_above_or_attached(mount, tmp_path, monkeypatch):
    source = source_of(json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))["cells"][2]).partition("import utils")[0]

    def found(folder):
        names = {}
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", list(sys.path))
        exec(source, names)
        assert sys.path[0] == str(names["ROOT"])
        return names["ROOT"]

    (tmp_path / "working").mkdir()
    monkeypatch.setenv("KAGGLE_INPUT_DIR", str(tmp_path / "input"))
    assert found(ROOT) == ROOT and found(ROOT / "notebooks") == ROOT and found(ROOT / "tests" / "browser") == ROOT
    with pytest.raises(AssertionError, match="attach the data set with its code"):
        found(tmp_path / "working")
    kit = tmp_path / "input" / mount
    (kit / "lumbar").mkdir(parents=True)
    (kit / "lumbar" / "names.py").touch()
    assert found(tmp_path / "working") == kit


def test_a_notebook_starts_in_the_repository_with_checked_parameters(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_INPUT_DIR", str(tmp_path / "input"))
    (tmp_path / "input" / "lumbar-spine-preprocess" / "01_preprocess").mkdir(parents=True)
    value = "/kaggle/input/lumbar-spine-preprocess/01_preprocess"
    cell, names = f"# Parameters: full size\nPREPROCESSED = {value!r}  # folder\n", {"PREPROCESSED": value}
    monkeypatch.chdir(ROOT / "notebooks")
    assert utils.start_notebook([cell], names) == {"PREPROCESSED": value} and Path.cwd() == ROOT
    assert Path(names["PREPROCESSED"]).is_relative_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Did you mean PREPROCESSED"):
        utils.start_notebook([cell, "# Parameters\nPREPROCESED = 'x'\n"], names)
    assert Path.cwd() == tmp_path


def test_cells_are_short_and_are_python(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert len(source_of(cell).splitlines()) <= 60
            ast.parse(python_of(cell))


def test_long_functions_live_in_the_package(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse(python_of(cell))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    assert node.end_lineno - node.lineno < 20, f"{node.name} is long: move it to lumbar/"


GALLERY = sorted((ROOT / "docs" / "gallery").glob("*.ipynb"))


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_the_gallerys_notebooks_are_small_executed_and_of_no_machine(path):
    """Made by `python -m lumbar.look.gallery`, never by hand."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    nbformat.validate(nbformat.from_dict(notebook))
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"/home/|/root/|/Users/|/tmp/|papermill\"|<script|stderr", text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    assert any(kind.startswith("image/") for c in cells for o in c["outputs"] for kind in o.get("data", ()))


def test_the_gallery_has_every_stage():
    stems = " ".join(path.stem for path in GALLERY)
    assert all(path.stem in stems for path in NOTEBOOKS if path.stem[:2].isdigit())
