"""Invalid values are refused with what to write instead, before anything runs."""

import ast
import json
import math
from pathlib import Path

import pytest
import torch

import utils
from lumbar.run import parameters
from lumbar.run.parameters import (
    ITEM_TYPES,
    PATH_PARAMETERS,
    RANGES,
    check_notebook_parameters,
    check_values,
    notebook_parameters,
)

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def parameters_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(next(c["source"] for c in cells if "parameters" in c["metadata"].get("tags", [])))


def notebook(stem):
    return next(path for path in NOTEBOOKS if path.stem == stem)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_path_is_known_as_one_and_every_number_has_its_range(path):
    source = parameters_cell(path)
    lines = source.splitlines()
    for node in ast.parse(source).body:
        name, value = node.targets[0].id, ast.literal_eval(node.value)
        comment = lines[node.lineno - 1].partition("#")[2]
        texts = value if isinstance(value, list) else [value]
        is_path = any(isinstance(text, str) and "/" in text for text in texts)
        said = isinstance(value, (str, list)) and any(word in comment for word in ("folder", "written", "path"))
        if is_path or (said and "yolov10" not in comment and name not in ("SHAPE", "EXTENT_MM")):
            assert name in PATH_PARAMETERS, f"{name}: is it a path? Then it belongs in PATH_PARAMETERS"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert name in RANGES, f"{name}: give it a range"
        if value == []:
            assert name in ITEM_TYPES, f"{name}: say what it holds"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defaults_are_allowed_and_numbers_beyond_their_range_are_not(path):
    defaults = check_notebook_parameters(path, {})
    assert check_notebook_parameters(path, dict(defaults)) == defaults
    for name, value in defaults.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        for wrong in (-7, 10**15) if isinstance(value, int) else (-7.5, 1e15, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{path.name}: {name} must be from"):
                check_notebook_parameters(path, {name: wrong})


@pytest.mark.parametrize(
    "stem, name, value, words",
    [
        ("02_train_spinenet", "BATCH", -1, "BATCH must be from 1 to"),
        ("03_train_yolo", "EPOCHS", 0, "03_train_yolo.ipynb: EPOCHS must be from 1 to"),
        ("04_train_vit", "BATCH", -1, r"BATCH must be from 1 to 65,536 \(or 0, its default\), not -1"),
        ("04_train_vit", "HOURS", -0.5, "HOURS must be from 0.0 to 100.0, not -0.5"),
        ("04_train_vit", "HOURS", 630, "YAML reads 10:30 as 630. Write 10.5$"),
        ("05_inference", "HOURS", 90, "YAML reads 1:30 as 90. Write 1.5, or 90.0 if you do mean 90 hours"),
        ("05_inference", "HOURS", 630.0, "HOURS must be from 0.0 to 100.0"),
        ("04_train_vit", "SHAPE", [96, 64], "SHAPE holds 3 numbers, not 2"),
        ("04_train_vit", "SHAPE", [96, 64, -1], "SHAPE must be from 4 to"),
        ("04_train_vit", "DROPOUT", 1.5, "DROPOUT must be from"),
        ("04_train_vit", "FOLDS", [1, 1], "names a fold twice"),
        ("04_train_vit", "FOLDS", [-1], "FOLDS must be from 0"),
        ("01_preprocess", "BITS", 12, "01_preprocess.ipynb: BITS must be 8 or 16, not 12"),
        ("04_train_vit", "CHANNELS", 2, "CHANNELS must be 1 or 3, not 2"),
        ("04_train_vit", "SCOPE", "slice", "SCOPE must be level, study or slices, not 'slice'. Did you mean slices"),
        ("04_train_vit", "SEQUENCE", "gru", "SEQUENCE must be lstm or none, not 'gru'"),
        ("03_train_yolo", "CONDITION", "NFN", "CONDITION must be scs, nfn or ss, not 'NFN'. Did you mean nfn"),
        ("03_train_yolo", "IMGSZ", 100, "IMGSZ must be a multiple of 32, not 100"),
        ("01_preprocess", "YOLO_IMGSZ", 250, "YOLO_IMGSZ must be a multiple of 32, not 250"),
        ("00_pipeline", "SIZE", "Full", "SIZE must be demo, smoke, hour or full, not 'Full'. Did you mean full"),
        ("03_train_yolo", "DEVICE", "cdua", "not 'cdua'. Did you mean cuda"),
        ("05_inference", "DEVICE", "GPU", "DEVICE is auto, cpu, cuda or the number of a GPU"),
    ],
)
def test_what_cannot_be_meant_is_refused(stem, name, value, words):
    with pytest.raises(ValueError, match=words):
        check_notebook_parameters(notebook(stem), {name: value})


@pytest.mark.parametrize(
    "stem, name, value, words",
    [
        ("04_train_vit", "FOLDS", 0, r"not int 0; papermill takes it as -y '\{FOLDS: \[0\]\}'"),
        ("00_pipeline", "FOLDS", "[0]", r"as -y '\{FOLDS: \[0\]\}'"),
        ("00_pipeline", "FOLDS", "0,1", r"as -y '\{FOLDS: \[0,1\]\}'"),
        ("00_pipeline", "STAGES", '["04_train_vit_level"]', r"""as -y '\{STAGES: \["04_train_vit_level"\]\}'"""),
        ("00_pipeline", "STAGES", "04_train_vit_level", r"as -y '\{STAGES: \[04_train_vit_level\]\}'"),
        ("00_pipeline", "STAGES", [4], "STAGES holds str, not int 4"),
        ("04_train_vit", "FOLDS", ["0"], "FOLDS holds int, not str '0'"),
        ("04_train_vit", "FOLDS", [True], "FOLDS holds int, not bool"),
        ("03_train_yolo", "EPOCHS", [3], "; write 3, without brackets"),
        ("03_train_yolo", "DEVICE", 0, "; papermill takes a text as -r DEVICE 0"),
        ("03_train_yolo", "HOURS", "10:30", "; write 10.5"),
        ("03_train_yolo", "LEARNING_RATE", "1e-4", "; write 1.0e-4"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_way_to_write_it(stem, name, value, words):
    with pytest.raises(TypeError, match=words):
        check_notebook_parameters(notebook(stem), {name: value})


def test_hours_that_are_meant_are_taken():
    for hours in (0, 9, 10.5, 59, 72.0):
        assert check_values({"HOURS": 0.0}, {"HOURS": hours}) == {"HOURS": float(hours)}


def test_a_number_that_is_not_finite_arrives_as_papermill_writes_it():
    cell = "# Parameters: of a test\nRATE = 0.1"
    for text in ("float('nan')", "float('-inf')"):
        with pytest.raises(ValueError, match="RATE must be a finite number"):
            notebook_parameters([cell, f"# Parameters\nRATE = {text}\n"], {"RATE": 0.1})


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_device_that_is_not_here_is_refused(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert utils.device_for("cpu") == "cpu" and utils.device_for() == ("cuda" if gpus else "cpu")
    cell = "# Parameters: of a test\nDEVICE = 'auto'"
    if gpus:
        assert [utils.device_for(name) for name in ("cuda", "1", "cuda:1")] == ["cuda", "cuda:1", "cuda:1"]
        notebook_parameters([cell], {"DEVICE": "0,1"})
        for name in ("2", "cuda:7", "0,2"):
            with pytest.raises(ValueError, match="there is no such GPU here; their numbers are 0 to 1"):
                notebook_parameters([cell], {"DEVICE": name})
    else:
        for name in ("cuda", "0", "cuda:0"):
            with pytest.raises(ValueError, match=f"DEVICE '{name}': PyTorch finds no GPU here. Take auto or cpu"):
                notebook_parameters([cell], {"DEVICE": name})
    for name in ("cdua", "0,1", "cuda:x"):
        with pytest.raises(ValueError, match="DEVICE"):
            utils.device_for(name)


def test_the_pipeline_refuses_what_a_later_stage_cannot_take_before_the_first_runs(tmp_path):
    stages = utils.pipeline_stages(ROOT / "notebooks", "data", tmp_path)
    stages[-2]["parameters"]["HOURS"] = 630
    with pytest.raises(ValueError, match="05_inference.ipynb: HOURS = 630"):
        utils.run_stages(stages, tmp_path / "notebooks")
    assert not list(tmp_path.iterdir())


def test_ranges_are_ranges():
    assert all(least < most for least, most in parameters.RANGES.values())


def test_choices_are_those_that_the_code_takes():
    from lumbar.run.pipeline import SIZES

    assert set(parameters.CHOICES["SIZE"]) == set(SIZES) and set(parameters.CHOICES["CONDITION"]) == set(
        utils.DETECTORS
    )
    defaults = {key: value for path in NOTEBOOKS for key, value in check_notebook_parameters(path, {}).items()}
    assert all(defaults[name] in choices for name, choices in parameters.CHOICES.items())
