"""Every notebook has the form that Kaggle, papermill and readers rely on."""

import ast
import json
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


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
    assert "import utils" in source_of(cells[0])


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
