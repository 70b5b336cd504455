"""The whole way on a handful of phantom studies: from nothing to a scored submission and a report, without network."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import toy_member
from test_official import write_package

import utils
from lumbar.run.parameters import check_notebook_parameters
from lumbar.run.pipeline import is_finished, run_notebook

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

# Imported by every Python process at its start: connections that leave this machine fail, and are written down.
NO_NETWORK = """
import os, socket

def _guarded(original):
    def connect(self, address, *rest):
        local = self.family == getattr(socket, "AF_UNIX", None) or str(address[0]) in ("127.0.0.1", "::1", "localhost")
        if not local:
            with open(os.environ["NETWORK_ATTEMPTS"], "a") as file:
                file.write(f"{address}\\n")
            raise OSError(101, "Network is unreachable")
        return original(self, address, *rest)
    return connect

socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)
_lookup = socket.getaddrinfo

def _getaddrinfo(host, *rest, **named):
    if host not in (None, "", "127.0.0.1", "::1", "localhost", socket.gethostname()):
        with open(os.environ["NETWORK_ATTEMPTS"], "a") as file:
            file.write(f"{host}\\n")
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    return _lookup(host, *rest, **named)

socket.getaddrinfo = _getaddrinfo
"""


def papermill(folder, kit=ROOT, **parameters):
    """Run 00_pipeline of the kit as the README does, network cut. Returns (exit status, output)."""
    (folder / "given.yaml").write_text(json.dumps(parameters, default=str))
    guard = folder / "guard"
    guard.mkdir(exist_ok=True)
    (guard / "sitecustomize.py").write_text(NO_NETWORK)
    environment = {**os.environ, "PYTHONPATH": str(guard), "NETWORK_ATTEMPTS": str(folder / "attempts.txt")}
    # Set on many machines without a screen; the pages must show their pictures all the same.
    environment["MPLBACKEND"] = "Agg"
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--log-output",
        "notebooks/00_pipeline.ipynb",
        str(folder / "run.ipynb"),
        "-f",
        str(folder / "given.yaml"),
    ]
    done = subprocess.run(command, cwd=kit, env=environment, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


# Six studies for five folds: with this seed two are held out in fold 0, the fewest that an ensemble is fitted on.
SETTINGS = {"SIZE": "smoke", "TRAIN_STUDIES": 6, "TEST_STUDIES": 2, "SEED": 2}
# Starting processes takes longer than the few steps for which they would load.
STAGE_SETTINGS = {"02_train_spinenet": {"WORKERS": 0}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    status, output = papermill(folder, OUT=folder / "out", SETTINGS=STAGE_SETTINGS, **SETTINGS)
    assert status == 0, output[-6000:]
    return folder


def test_a_run_ends_with_submission_report_and_manifest(run):
    out = run / "out"
    submission = pd.read_csv(out / "submission.csv")
    assert list(submission.columns) == ["row_id", "normal_mild", "moderate", "severe"] and len(submission) == 2 * 25
    sample = pd.read_csv(out / "data" / "sample_submission.csv")
    assert sorted(sample["row_id"]) == sorted(submission["row_id"])
    values = submission[list(utils.SEVERITIES)].to_numpy()
    assert np.isfinite(values).all() and (values >= 0).all() and np.abs(values.sum(1) - 1).max() < 1e-9
    labels = utils.read_labels(out / "data" / "phantom_test_labels.csv")
    assert 0 < utils.competition_score(labels, submission)["total"] < 3

    manifest = json.loads((out / "manifest.json").read_text())
    names = [
        "00_phantom",
        "01_preprocess",
        "02_train_spinenet",
        "03_train_yolo_nfn_0",
        "03_train_yolo_scs_0",
        "03_train_yolo_ss_0",
        "04_train_vit_level_0",
        "04_train_vit_slices_0",
        "04_train_vit_study_0",
        "05_inference",
        "06_report",
    ]
    assert sorted(manifest["stages"]) == names
    for name, stage in manifest["stages"].items():
        assert stage["seconds"] > 0 and stage["outputs"] and stage["versions"]["torch"]
        assert stage["inputs"] or name == "00_phantom"
    test_scores = manifest["stages"]["06_report"]["scores"]["test"]
    scored = utils.competition_score(labels, submission)
    assert {name: test_scores["Ensemble"][name] for name in scored} == pytest.approx(scored, abs=1e-6)
    assert np.isfinite(test_scores["Ensemble"]["closed"])

    log = pd.read_csv(out / "05_inference" / "inference_log.csv")
    assert len(log) == 2 and log["prior_rows"].max() == 0
    said = log["members"] + " " + log["partial"].astype(object).fillna("")
    assert said.str.split().apply(set).eq({"yolo", "slices", "level", "study"}).all(), log.to_dict("records")
    report = (out / "report.html").read_text()
    assert "<img" in report and re.search('type="?range', report)
    assert 'src="http' not in report and "@import url(http" not in report


def test_detectors_cut_their_own_images_and_leave_none(run):
    made = json.loads((run / "out" / "01_preprocess" / "manifest.json").read_text())
    assert not made["parameters"]["DETECTOR_IMAGES"] and not list(run.glob("out/01_preprocess/yolo"))
    for manifest in run.glob("out/03_train_yolo_*/manifest.json"):
        assert json.loads(manifest.read_text())["counts"]["images"] > 10
        assert not (manifest.parent / "yolo").exists() and (manifest.parent / "examples.png").is_file()


def test_no_step_reaches_for_the_network(run):
    attempts = run / "attempts.txt"
    assert not attempts.exists(), attempts.read_text()


def test_a_copied_run_is_found_until_a_byte_changes(run, tmp_path):
    copied = shutil.copytree(run / "out", tmp_path / "another user" / "out", copy_function=shutil.copyfile)
    stages = utils.pipeline_stages(ROOT / "notebooks", copied / "data", copied, "smoke", seed=SETTINGS["SEED"])
    assert [stage["name"] for stage in stages if not is_finished(stage)] == []
    shutil.rmtree(copied / "06_report")
    assert [stage["name"] for stage in stages if not is_finished(stage)] == ["06_report"]
    levels = copied / "02_train_spinenet" / "levels.csv"
    levels.write_bytes(levels.read_bytes().replace(b"1", b"2", 1))
    left = [stage["name"] for stage in stages if is_finished(stage)]
    assert left == ["01_preprocess", "02_train_spinenet"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would begin")
def test_the_full_size_is_refused_without_a_gpu_before_anything_is_made(tmp_path):
    status, output = papermill(tmp_path, OUT=tmp_path / "full", SIZE="full", TRAIN_STUDIES=1900)
    assert status != 0 and "hours would be lost" in output and "DEVICE: there is no GPU here" in output
    assert not (tmp_path / "full").exists()


def test_each_notebook_refuses_a_mistyped_parameter(run):
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = next(iter(check_notebook_parameters(notebook, {})))
        with pytest.raises(ValueError, match=f"no parameter '{name}X'.*Did you mean {name}"):
            check_notebook_parameters(notebook, {f"{name}X": "x"})


def notebook_02(run, folder, **parameters):
    """Run 02 on the run's volumes with these parameters."""
    folder.mkdir(exist_ok=True)
    given = {"DATA": run / "out" / "data", "PREPROCESSED": run / "out" / "01_preprocess", "OUT": folder, "WORKERS": 0}
    command = [sys.executable, "-m", "papermill", "notebooks/02_train_spinenet.ipynb", str(folder / "run.ipynb")]
    for name, value in (given | parameters).items():
        command += ["-p", name, str(value)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    return done.returncode, done.stderr, folder / "02_train_spinenet"


def test_a_new_member_and_one_more_fold_end_in_a_new_report(run, tmp_path):
    """A member is one module, one notebook and one line: it goes through its training, out-of-fold predictions, the
    ensemble, 05, 06 and the viewer. Another fold are the README's two lines. What was finished is left alone, what
    comes after is done again, and what the first fold alone gave is kept."""
    kit = tmp_path / "kit"
    kit.mkdir()
    copied = ("utils.py", "lumbar", "phantom", "notebooks", "weights")
    for name in copied:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, kit / name, ignore=ignored) if source.is_dir() else shutil.copy(source, kit / name)
    out = shutil.copytree(run / "out", tmp_path / "out")
    toy_member.add_to(kit)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"}
    old = {name: (out / name).read_bytes() for name in ("report.html", "submission.csv")}
    stages = ["04_train_vit_study", "07_train_toy_0", "05_inference", "06_report"]
    own = STAGE_SETTINGS | {"06_report": {"DRAWS": 20}}
    status, output = papermill(tmp_path, kit, OUT=out, FOLDS=[0, 3], STAGES=stages, SETTINGS=own, **SETTINGS)
    assert status == 0, output[-6000:]
    assert "04_train_vit_study_0 is finished" in output and "04_train_vit_study_3 finished in" in output
    assert "07_train_toy_0 finished in" in output
    left = {path for path, when in before.items() if path.is_file() and path.stat().st_mtime_ns == when}
    again = {"05_inference", "06_report", "notebooks", "manifest.json", "report.html", "submission.csv"}
    assert {path.relative_to(out).parts[0] for path in before.keys() - left} <= again
    assert all((out / name).read_bytes() != text for name, text in old.items())
    assert (out / "06_report.old-1" / "manifest.json").is_file()

    inferred = out / "05_inference"
    assert "toy" in json.loads((inferred / "ensemble.json").read_text())["weights"]["spinal"]
    log = pd.read_csv(inferred / "inference_log.csv")
    assert log["members"].str.contains("toy").all() and (log["toy_s"] >= 0).all()
    assert len(pd.read_csv(inferred / "submission_toy.csv")) == 50
    held_out = pd.read_csv(inferred / "oof.csv")
    assert set(held_out["member"]) == {"yolo", "slices", "level", "study", "toy"}
    assert set(held_out.loc[held_out["member"] == "study", "fold"]) == {0, 3}
    manifest = json.loads((out / "06_report" / "manifest.json").read_text())
    report = (out / "report.html").read_text()
    assert manifest["parameters"]["DRAWS"] == 20
    assert "Prior with noise" in report and "04_train_vit_study_3" in report
    scores = pd.read_csv(out / "06_report" / "scores.csv")
    assert set(scores.loc[scores["Prediction"] == "Prior with noise", "split"]) == {"out of fold", "test"}
    page = (out / "06_report" / "study.html").read_text()
    assert "Prior with noise" in page or "toy" in page


def test_the_shipped_weights_find_levels_and_can_be_tuned(run):
    status, output, folder = notebook_02(run, run / "tuned", ANATOMIES=2, FINE_TUNE_STEPS=2, FINE_TUNE_STUDIES=4)
    assert status == 0, output[-4000:]
    scores = json.loads((folder / "manifest.json").read_text())["scores"]
    assert scores["all"]["right"] > 0.9 and scores["labels"]["right_level"] > 0.95
    assert set(scores["tuned"]) == {"kept", "before", "after"} and scores["tuned"]["before"]["points"] > 0
    used = pd.read_csv(folder / "fine_tuning.csv")
    assert used["used"].mean() > 0.5 and len(pd.read_csv(folder / "tuning_history.csv")) == 2
    assert not any((folder / name).exists() for name in ("anatomies", "training", "tuning", "located"))
    model = utils.load_spinenet(folder / "spinenet.safetensors")
    assert model.about["layout"] and model.about["detector"] == "own"


def test_the_official_package_can_be_chosen(run):
    package = write_package(run / "clone")
    status, output, folder = notebook_02(run, run / "official", DETECTOR="official", SPINENET_DIR=package)
    assert status == 0, output[-4000:]
    levels = pd.read_csv(folder / "levels.csv")
    assert len(levels) == 5 * 6 and set(levels["source"].str.split("+").str[0]) <= {"axial", "prior"}
    assert utils.load_spinenet(folder / "spinenet.safetensors").about["detector"] == "official"
    assert not (folder / "history.csv").exists() and not (folder / "fine_tuning.csv").exists()
    with pytest.raises(ValueError, match="DETECTOR must be own or official, not 'Official'"):
        check_notebook_parameters(ROOT / "notebooks" / "02_train_spinenet.ipynb", {"DETECTOR": "Official"})


def test_a_training_that_ran_out_of_time_goes_on_from_its_attached_output(run):
    """As on Kaggle: the kernel ends well without a manifest, its output is mounted read-only for the next version."""
    finished = run / "out" / "04_train_vit_study_0"
    parameters = json.loads((finished / "manifest.json").read_text())["parameters"]
    attached, working = run / "attached", run / "working"

    def start(hours):
        given = json.dumps({**parameters, "OUT": str(working), "HOURS": hours, "WORKERS": 0})
        command = [sys.executable, "-m", "papermill", "--log-output", "notebooks/04_train_vit.ipynb"]
        environment = {**os.environ, "KAGGLE_INPUT_DIR": str(attached)}
        done = subprocess.run(
            [*command, str(run / "study.ipynb"), "-y", given], cwd=ROOT, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    folder = working / finished.name
    assert "time is up" in start(0.0001) and (folder / "begun.json").is_file()
    assert not (folder / "manifest.json").exists() and not (folder / "oof.csv").exists()
    place = attached / "notebooks" / "someone" / "lumbar-spine-train-vit-study" / finished.name
    place.parent.mkdir(parents=True)
    folder.rename(place)
    (place / "kept.txt").write_text("of the first start")
    for path in (*place.rglob("*"), place):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert f"continues what {place} has" in start(1.0)
    assert (folder / "kept.txt").is_file() and (folder / "manifest.json").is_file()
    ours, theirs = ((place / "oof.csv").read_text() for place in (folder, finished))
    assert ours == theirs


def test_inspect_shows_a_study(run):
    out = run / "out"
    parameters = {
        "DATA": str(out / "data"),
        "PREPROCESSED": str(out / "01_preprocess"),
        "OUT": str(run),
        "LEVELS_DIR": str(out / "02_train_spinenet"),
        "PREDICTIONS": [str(out)],
    }
    study_id = min(utils.study_paths(out / "01_preprocess"))
    run_notebook(
        ROOT / "notebooks" / "inspect.ipynb", run / "inspect.ipynb", {**parameters, "HTML_STUDIES": [study_id]}
    )
    text = (run / "inspect.ipynb").read_text()
    assert "application/vnd.jupyter.widget-view+json" in text
    assert re.search('type="?range', (run / f"study_{study_id}.html").read_text())
