"""Every experiment that ships as a file is one that its notebook takes."""

from pathlib import Path

import pytest
import yaml

import utils
from lumbar.run.parameters import check_notebook_parameters
from lumbar.run.pipeline import kaggle_kernels, settings_of

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def notebook_of(path):
    """The notebook that the file's head names."""
    words = path.read_text(encoding="utf-8").split()
    return ROOT / next(word for word in words if word.startswith("notebooks/") and word.endswith(".ipynb"))


def test_the_ones_that_the_readme_names_are_there():
    assert {path.stem for path in CONFIGS} >= {"demo", "hour", "full", "kaggle"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_accepted_by_its_notebook_down_to_the_stages_parameters(path):
    given, notebook = yaml.safe_load(path.read_text(encoding="utf-8")), notebook_of(path)
    checked = check_notebook_parameters(notebook, given)
    assert f"-f configs/{path.name}" in path.read_text(encoding="utf-8")
    own = {name: checked[name] for name in ("FOLDS", "MEMBERS", "SETTINGS")}
    if notebook.stem == "publish":
        kernels = kaggle_kernels(folds=own["FOLDS"], members=own["MEMBERS"])
        settings = settings_of({name: kernel["names"] for name, kernel in kernels.items()}, own["SETTINGS"])
        for name, kernel in kernels.items():
            check_notebook_parameters(NOTEBOOKS / f"{kernel['notebook']}.ipynb", settings[name])
        return
    more = {name.lower(): value for name, value in own.items()}
    stages = utils.pipeline_stages(NOTEBOOKS, "data", checked["OUT"], checked["SIZE"], **more)
    assert utils.choose_stages(stages, checked["STAGES"])
    for stage in stages:
        check_notebook_parameters(stage["notebook"], stage["parameters"])
    if path.stem == "demo":  # the file is the notebook's own defaults
        assert checked == check_notebook_parameters(notebook, {})
