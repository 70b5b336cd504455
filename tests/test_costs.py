"""What is said to be needed and to be there, before hours are spent: counted costs, and a machine held against them."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import utils
from lumbar.run import costs, preflight
from lumbar.run.costs import WEEK_HOURS, cost_line, cost_table, gpu_speed, kernel_costs, on_kaggle, stage_cost
from lumbar.run.pipeline import kaggle_kernels
from lumbar.run.preflight import Machine, count_studies, this_machine

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
VIT, YOLO = NOTEBOOKS / "04_train_vit.ipynb", NOTEBOOKS / "03_train_yolo.ipynb"
T4S = Machine((("Tesla T4", 15.0), ("Tesla T4", 15.0)), 4, 30.0, 70.0, 6.0)
BOX = Machine((("NVIDIA H100 80GB HBM3", 80.0),), 16, 128.0, 2000.0, 64.0)
LAPTOP = Machine((), 8, 14.0, 100.0, 7.0)


# ---- Costs ----


def test_the_table_counts_every_kernel_and_names_what_it_rests_on():
    kernels = kaggle_kernels()
    found = kernel_costs(NOTEBOOKS)
    assert list(found) == list(kernels)
    for name, cost in found.items():
        assert (cost.hours > 0) and not math.isnan(cost.hours)
        assert (cost.gpu_hours > 0) == kernels[name]["gpu"]
        if name.startswith("train-") and name != "train-spinenet":
            assert (
                cost.tflop > 0
                and "counted" in cost.note
                and cost.epoch_hours * cost.epochs == pytest.approx(cost.hours)
            )
    table = cost_table(found)
    assert list(table.index) == list(kernels) and table.loc["preprocess", "GPU hours"] == 0
    line = cost_line(found)
    assert f"of Kaggle's {WEEK_HOURS:.0f} a week" in line and "train-vit-level" in line


def test_costs_follow_the_parameters():
    def hours(notebook=VIT, **given):
        return stage_cost(notebook, {"FOLDS": [0], **given}).gpu_hours

    level = hours()
    assert hours(EPOCHS=20) == pytest.approx(level / 2) and hours(SHAPE=[64, 64, 64]) == pytest.approx(level / 8)
    assert hours(FOLDS=[0, 1]) == pytest.approx(2 * level) and hours(RECOMPUTE=False) == pytest.approx(0.75 * level)
    assert hours(BACKBONE="coatnet_nano_rw") < level / 8
    slices = hours(SCOPE="slices")
    assert slices == pytest.approx(2.74, abs=0.05)  # docs/benchmarks.md, "Full size"
    assert hours(SCOPE="slices", SLICES=1) == pytest.approx(slices / 5)
    scs = hours(YOLO, CONDITION="scs")
    assert hours(YOLO, CONDITION="scs", MODEL="yolov10n.yaml") < scs / 10
    assert hours(YOLO, CONDITION="scs", IMGSZ=192) == pytest.approx(scs / 4)
    assert math.isnan(hours(BACKBONE="coatnet_rmlp_2_rw")) and math.isnan(hours(YOLO, WIDTH=0.125))
    small, large = (stage_cost(VIT, {"CACHE": True, "SHAPE": [edge] * 3}).disk_gb for edge in (64, 128))
    assert small == pytest.approx(216 / 8, rel=0.3) and large == pytest.approx(
        216, rel=0.05
    )  # as the parameter's comment says
    assert stage_cost(VIT, {"SCOPE": "study", "CACHE": True}).disk_gb == pytest.approx(346, rel=0.05)
    with pytest.raises(ValueError, match="Did you mean EPOCHS"):
        stage_cost(VIT, {"EPOCH": 1})


def test_what_a_notebook_of_others_costs_is_not_known(tmp_path):
    own = shutil.copy(VIT, tmp_path / "07_train_mine.ipynb")
    cost = stage_cost(own, {})
    assert math.isnan(cost.hours) and "not counted" in cost.note
    assert "Not counted: train-mine." in cost_line({"train-mine": cost})
    assert "No kernel uses a GPU" in cost_line({"train-mine": on_kaggle(cost, gpu=False)})


def test_what_does_not_fit_a_week_is_said():
    found = kernel_costs(NOTEBOOKS, (0, 1, 2, 3, 4))
    assert "weeks: FOLDS, MEMBERS and SETTINGS make it less" in cost_line(found)
    given = {"04_train_vit": {"BACKBONE": "coatnet_0_rw"}}
    assert "Not counted: train-vit-level, " in cost_line(kernel_costs(NOTEBOOKS, settings=given))


def test_the_counted_operations_are_those_of_the_networks():
    """One of the tables' figures, counted again; the others take minutes."""
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = timm.create_model("convnext_nano", num_classes=0)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            net(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 1e12 == pytest.approx(costs.IMAGE_TFLOP["convnext_nano"], rel=0.01)
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    assert parameters == pytest.approx(costs.MILLION_PARAMETERS["convnext_nano"], rel=0.01)


def test_gpus_are_known_by_their_names():
    assert gpu_speed("Tesla T4") == 1.0 and gpu_speed("NVIDIA H100 80GB HBM3") > 10
    assert gpu_speed("NVIDIA GeForce RTX 3090") > 2 and gpu_speed("of another maker") == 1.0
    assert gpu_speed("NVIDIA A10G") == 1.0 and gpu_speed("NVIDIA A100-SXM4-40GB") > 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "GPU hours of Kaggle's 30 a week"),
        (["--folds", "0", "1", "2", "3", "4"], "weeks"),
        (["--settings", str(ROOT / "configs" / "kaggle.yaml")], "train-vit-slices-2"),
    ],
)
def test_the_command_prints_the_table(arguments, words, capsys):
    costs.main(arguments)
    said = capsys.readouterr().out
    assert words in said and "Counted: operations" in said and "Assumed: the speed of a T4" in said


def test_the_command_names_what_is_wrong(capsys):
    with pytest.raises(SystemExit):
        costs.main(["--members", "slice"])
    assert "Did you mean slices" in capsys.readouterr().err


# ---- Preflight ----


def judged(notebook=VIT, machine=T4S, studies=1975, **given):
    preflight.preflight(notebook, {"FOLDS": [0], **given}, machine, studies)


@pytest.mark.parametrize("scope", ["level", "study", "slices"])
def test_the_full_size_starts_where_it_can_work(scope, capsys):
    for machine in (T4S, BOX):
        judged(machine=machine, SCOPE=scope)
        assert "04_train_vit: about" in capsys.readouterr().out
    for condition in utils.DETECTORS:
        judged(YOLO, CONDITION=condition)


@pytest.mark.parametrize(
    "given, machine, words",
    [
        ({}, LAPTOP, "DEVICE: there is no GPU here, and 8 CPU cores would take about .* days"),
        ({"BATCH": 12}, T4S, "BATCH: a step takes about .* GB of GPU memory, and there are 15"),
        ({"SCOPE": "study", "SHAPE": [384] * 3, "BATCH": 1}, T4S, "SHAPE: a step takes"),
        ({"CACHE": True}, T4S, "CACHE: about 22. GB of disk are needed, and 70 are free. Set CACHE to false"),
        ({}, replace(T4S, shared_gb=0.06), "WORKERS: its loader processes need .* /dev/shm has 0.1 free"),
        ({"WORKERS": 64}, T4S, "WORKERS: about .* GB of memory are needed, and 30 are free"),
        ({"HOURS": 0.05}, T4S, "HOURS: one pass over the training studies takes about"),
        ({}, replace(T4S, disk_gb=1.0), "OUT: about 7 GB of disk are needed, and 1 are free"),
    ],
)
def test_what_cannot_work_is_refused_with_the_parameter_to_change(given, machine, words, monkeypatch, capsys):
    monkeypatch.delenv(preflight.OFF, raising=False)
    with pytest.raises(ValueError, match=f"hours would be lost:\n- 04_train_vit: .*{words}"):
        judged(machine=machine, **given)
    monkeypatch.setenv(preflight.OFF, "warn")
    judged(machine=machine, **given)
    assert "preflight: 04_train_vit: " in capsys.readouterr().out


def test_what_only_takes_longer_is_said(capsys):
    judged(HOURS=4.0)
    assert "HOURS = 4 ends it before: it takes about 3 starts" in capsys.readouterr().out


def test_small_trainings_start_anywhere():
    tiny = Machine((), 1, 6.0, 8.0, 0.064)
    for size in ("demo", "smoke", "hour"):
        stages = utils.pipeline_stages(NOTEBOOKS, "data", "out", size)
        preflight.preflight_stages(stages, tiny, 60 if size != "hour" else 300)


def test_a_pipeline_is_held_against_the_machine_before_its_first_stage(capsys):
    stages = utils.pipeline_stages(NOTEBOOKS, "data", "out", "full", folds=[0])
    hours = preflight.preflight_stages(stages, BOX, 1975)
    assert set(hours) == {stage["name"] for stage in stages if stage["name"][:2] in ("03", "04")}
    with pytest.raises(ValueError, match="(?s)01_preprocess: BITS: about 37 GB.*04_train_vit_level_0: OUT: about 7 GB"):
        preflight.preflight_stages(stages, replace(BOX, disk_gb=6.0), 1975)
    with pytest.raises(ValueError, match="all stages: OUT: they write about"):
        preflight.preflight_stages(stages, replace(BOX, disk_gb=40.0), 1975)


def test_what_is_wrong_with_every_fold_is_said_once():
    stages = utils.pipeline_stages(NOTEBOOKS, "data", "out", "full")
    with pytest.raises(ValueError) as caught:
        preflight.preflight_stages(stages, replace(LAPTOP, disk_gb=500.0), 1975)
    folds = ", ".join(f"04_train_vit_level_{fold}" for fold in range(5))
    assert f"- {folds}: DEVICE: there is no GPU here" in str(caught.value)


def test_this_machine_is_measured(tmp_path):
    found = this_machine(tmp_path / "not" / "there" / "yet", "cpu")
    assert found.gpus == () and found.cores >= 1 and found.memory_gb > 0.1 and found.disk_gb > 0


def test_studies_are_counted(tmp_path):
    assert count_studies(tmp_path) == count_studies("") == costs.STUDIES
    (tmp_path / "train.csv").write_text("study_id\n1\n2\n\n")
    assert count_studies(tmp_path) == 2


def test_the_documents_table_is_what_the_command_prints():
    table = cost_table(kernel_costs(NOTEBOOKS))
    rows = [
        line.split("|")[1:-1] for line in (ROOT / "docs" / "kaggle.md").read_text().splitlines() if "`train-" in line
    ]
    shown = {
        re.search("`(train-[a-z-]+)`", row[0])[1]: [cell.strip() for cell in row[1:4]] for row in rows if len(row) == 5
    }
    assert set(shown) == {name for name in table.index if name.startswith("train-")}
    for name, cells in shown.items():
        counted = [f"{table.loc[name, column]:.1f}" for column in ("GPU hours", "of one T4", "GPU memory, GB")]
        assert cells == (counted if name != "train-spinenet" else [counted[0], "", ""])


def test_trainings_and_pipeline_are_held_against_the_machine_before_they_begin():
    for stem, call, before in (
        ("00_pipeline", "utils.preflight_stages(", "phantom.make_dataset("),
        ("03_train_yolo", 'utils.preflight("03_train_yolo"', "utils.write_yolo_dataset("),
        ("04_train_vit", 'utils.preflight("04_train_vit"', "utils.train_classifier("),
    ):
        cells = json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert 0 < text.index(call) < text.index(before)
