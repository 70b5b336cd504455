"""Inference never loses a row: what fails costs its own contribution, and says so."""

import json
import os
import queue
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import save_file

import utils
from lumbar import in_flight
from lumbar import limits as limits_module
from lumbar.data.geometry import LevelBox
from lumbar.data.volume import Study, Volume
from lumbar.grade import crop_members, detector_member
from lumbar.grade import detector as detector_module
from lumbar.grade.detector import yolo_scores
from lumbar.grade.ensemble import default_ensemble
from lumbar.grade.member import Weights, together_or_alone
from lumbar.grade.registry import member_of, member_weights
from lumbar.in_flight import images_digest
from lumbar.names import CLASS_COUNTS, LABEL_COLUMNS
from lumbar.problems import Kind, Problem
from lumbar.run.pipeline import run_notebook
from lumbar.serve import inference, read_ahead, results
from lumbar.serve import members as members_module
from lumbar.serve.inference import predict_studies, prepare_study, studies_to_predict
from lumbar.serve.members import Members, weight_folders
from lumbar.serve.schedule import Schedule
from lumbar.spine.spinenet import SpineNet
from lumbar.storage import DamagedFile

PRIOR = np.random.default_rng(0).dirichlet((5, 2, 1), (5, 5))
CROP = {"scope": "level", "shape": [8, 8, 8], "extent_mm": [8.0, 8.0, 8.0], "shift_mm": [0.0, 0.0, 0.0]}
SAYS = np.array([0.2, 0.3, 0.5])


@pytest.fixture
def data(tmp_path):
    """Studies 1 and 2 with a series each, 3 with a folder only, 4 in the sample submission only."""
    pd.DataFrame({"study_id": [1, 2], "series_id": [11, 21], "series_description": "Sagittal T1"}).to_csv(
        tmp_path / "test_series_descriptions.csv", index=False
    )
    (tmp_path / "test_images" / "3").mkdir(parents=True)
    (tmp_path / "test_images" / "notes").mkdir()
    pd.DataFrame({"row_id": ["1_spinal_canal_stenosis_l1_l2", "4_spinal_canal_stenosis_l1_l2"]}).to_csv(
        tmp_path / "sample_submission.csv", index=False
    )
    return tmp_path


@pytest.fixture
def networks(monkeypatch):
    """Stand-ins: studies 1 and 2 can be read, the level network says SAYS of every row. Counts what is read."""
    reads = []
    box = LevelBox("l1_l2", np.zeros(3), np.eye(3), np.ones(3), 1.0, "t2")

    def read_study(folder, descriptions):
        reads.append(folder.name)
        volumes = [Volume(np.zeros((2, 4, 4), np.float32), np.eye(4), 1, 1, "Sagittal T1", 0, np.arange(2))]
        return Study(int(folder.name), volumes if descriptions else [])

    def predict_crops(models, crops, *_):
        return np.tile(SAYS, (len(crops), 5, 1))

    monkeypatch.setattr(inference, "read_study", read_study)
    monkeypatch.setattr(inference, "locate_levels_surely", lambda study, model, detector: ([box] * 5, [], None))
    monkeypatch.setattr(crop_members, "cut_crops", lambda study, boxes, crop, device: np.zeros(5) + study.study_id)
    monkeypatch.setattr(crop_members, "predict_crops", predict_crops)
    return reads


def detector(**about):
    """Weights of a detector of the canal that is nothing but what its file says."""
    return Weights("yolo_scs_0", SimpleNamespace(condition="scs", about=about), about)


def members(level=True):
    return Members(None, {"level": [Weights("level_0", "network", {"crop": CROP})]} if level else {}, PRIOR)


def infer(data, loaded, out, **options):
    ensemble = default_ensemble()
    submission, log, tables, levels = utils.infer_studies(data, "test", loaded, ensemble, out, **options)
    ids, probabilities = utils.from_submission(submission)
    assert np.abs(probabilities.sum(-1) - 1).max() < 1e-12
    return dict(zip(ids, probabilities, strict=True)), log.set_index("study_id"), tables


def test_every_study_has_its_rows(data, networks, tmp_path):
    found, log, tables = infer(data, members(), tmp_path / "out")
    assert list(found) == [1, 2, 3, 4]
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    for study_id in (3, 4):
        np.testing.assert_allclose(found[study_id], PRIOR, atol=1e-9)
        assert log.loc[study_id, "prior_rows"] == 25 and "no readable image" in log.loc[study_id, "problems"]
    assert log.loc[1, "members"] == "level" and list(tables) == ["level"]


def test_a_table_with_empty_cells_and_odd_names_loses_no_study(data, networks, tmp_path):
    """One empty cell turns a column of ids into floats; a bad row costs its series, and no study."""
    rows = [(1, 11, "Sagittal T1"), (2, None, "Sagittal T1"), (None, 31, "Axial T2"), (5, 4096820034, None)]
    pd.DataFrame(rows, columns=["study_id", "series_id", "series_description"]).to_csv(
        data / "test_series_descriptions.csv", index=False
    )
    (data / "test_images" / "\u00b2").mkdir()
    (data / "test_images" / "6").touch()
    jobs = studies_to_predict(data, "test")
    assert list(jobs) == [1, 2, 5, 3, 4, 6]  # those of the table come first
    assert jobs[1] == {11: "Sagittal T1"} and jobs[2] == jobs[5] == {}
    found, _, _ = infer(data, members(), tmp_path / "out")
    assert sorted(found) == [1, 2, 3, 4, 5, 6]


def test_what_preparing_raises_costs_one_study(data, networks, tmp_path, monkeypatch):
    prepare = inference.prepare_study

    def broken(folder, *rest):
        if folder.name == "1":
            raise MemoryError("no room")
        return prepare(folder, *rest)

    monkeypatch.setattr(inference, "prepare_study", broken)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], PRIOR, atol=1e-9)
    np.testing.assert_allclose(found[2], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    assert "no room" in log.loc[1, "problems"]


def test_a_failing_member_costs_its_own_contribution(data, networks, tmp_path, monkeypatch):
    def cut_crops(study, boxes, crop, device):
        if study.study_id == 2:
            raise ValueError("the crop fell off")
        return np.zeros(5)

    monkeypatch.setattr(crop_members, "cut_crops", cut_crops)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    np.testing.assert_allclose(found[2], PRIOR, atol=1e-9)
    assert "level: ValueError: the crop fell off" in log.loc[2, "problems"]


def test_a_study_that_cannot_be_read_does_not_stop_the_others(data, networks, tmp_path, monkeypatch):
    read = inference.read_study

    def broken(folder, descriptions):
        if folder.name == "1":
            raise OSError("permission denied")
        return read(folder, descriptions)

    monkeypatch.setattr(inference, "read_study", broken)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], PRIOR, atol=1e-9)
    np.testing.assert_allclose(found[2], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    assert "permission denied" in log.loc[1, "problems"]


@pytest.mark.slow
def test_a_mended_study_is_done_again(tmp_path, data, monkeypatch):
    root = tmp_path / "real"
    loaded = utils.load_members([tiny.write_members(tmp_path / "weights", random_spinenet=True)], device="cpu")
    for study_id in (7, 8):
        tiny.write_study(root / "test_images" / str(study_id), seed=study_id)
    table = [(study_id, series_id, text) for study_id in (7, 8) for series_id, text in tiny.SERIES.items()]
    table = pd.DataFrame(table, columns=["study_id", "series_id", "series_description"])
    table.to_csv(root / "test_series_descriptions.csv", index=False)
    files = sorted((root / "test_images" / "7").rglob("*.dcm"))
    good = [path.read_bytes() for path in files]
    whole, clean, _ = infer(root, loaded, tmp_path / "whole")
    assert (clean["problems"] == "").all() and utils.mended_studies(root, "test", clean.reset_index()) == []

    for path in files[1:]:  # a download that was interrupted
        path.write_bytes(b"")
    broken, log, _ = infer(root, loaded, tmp_path / "out")
    assert log.loc[7, "problems"] and np.abs(broken[7] - whole[7]).max() > 1e-3
    log = log.reset_index()
    assert utils.mended_studies(root, "test", log) == []
    for path, content in zip(files, good, strict=True):
        path.write_bytes(content)
    assert utils.mended_studies(root, "test", log) == [7]

    read, reads = inference.read_study, []
    monkeypatch.setattr(inference, "read_study", lambda folder, d: reads.append(folder.name) or read(folder, d))
    again, _, _ = infer(root, loaded, tmp_path / "out")
    np.testing.assert_allclose(again[7], whole[7], atol=1e-5)
    assert reads == ["7"]


def test_the_digest_of_images_never_fails(tmp_path):
    empty = images_digest(tmp_path / "absent")
    (tmp_path / "1").mkdir()
    assert images_digest(tmp_path / "1") == empty
    (tmp_path / "1" / "loop").symlink_to(tmp_path / "1")
    (tmp_path / "1" / "dangling.dcm").symlink_to(tmp_path / "nowhere")
    assert images_digest(tmp_path / "1") == empty
    (tmp_path / "1" / "1.dcm").write_bytes(b"x")
    one = images_digest(tmp_path / "1")
    (tmp_path / "1" / "1.dcm").write_bytes(b"xy")
    assert len({empty, one, images_digest(tmp_path / "1")}) == 3


def test_a_failing_fold_costs_its_own_contribution(data, networks, tmp_path, monkeypatch):
    def predict_crops(models, crops, *_):
        return np.full((len(crops), 5, 3), np.nan) if models == ["bad"] else np.tile(SAYS, (len(crops), 5, 1))

    monkeypatch.setattr(crop_members, "predict_crops", predict_crops)
    loaded = members()
    # Folds whose views differ go through the networks one after the other.
    good, bad = {"crop": CROP}, {"crop": CROP, "views": [{}, {"mirror": True}]}
    loaded.weights["level"] = [Weights("level_0", "good", good), Weights("level_1", "bad", bad)]
    found, log, _ = infer(data, loaded, tmp_path / "out")
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    assert log.loc[1, "members"] == "level" and "level: ValueError: the network's answer" in log.loc[1, "problems"]


def test_a_member_without_a_weight_is_refused_at_the_start(data, networks, tmp_path):
    with pytest.raises(ValueError, match="no weight for the member level"):
        utils.infer_studies(data, "test", members(), default_ensemble(["yolo"]), tmp_path / "out")
    assert not networks


NO_IMAGE = ["3", "4"]  # studies that a restart looks at again: their images may be there by now


def test_a_restart_continues(data, networks, tmp_path):
    first, _, _ = infer(data, members(), tmp_path / "out")
    (tmp_path / "out" / "studies" / "2.json").unlink()
    networks.clear()
    again, _, _ = infer(data, members(), tmp_path / "out")
    assert sorted(networks) == ["2", *NO_IMAGE]
    for study_id in first:
        np.testing.assert_array_equal(first[study_id], again[study_id])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("0.3", "0.4", 1),
        lambda text: text.replace('"level"', '"yolo"', 1),
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: '{"result":' * 100_000,
        lambda text: text + " " * (1 << 24),
    ],
)
def test_a_damaged_saved_study_is_done_again(data, networks, tmp_path, damage, capsys):
    saved = tmp_path / "out" / "studies" / "2.json"

    def spoil():
        assert damage(saved.read_text()) != saved.read_text()
        saved.write_text(damage(saved.read_text()))

    _done_again(data, networks, tmp_path, spoil, capsys)


def _done_again(data, networks, tmp_path, spoil, capsys):
    """After spoil() study 2 is done again, with the same result, and the message names its file."""
    first, _, _ = infer(data, members(), tmp_path / "out")
    spoil()
    networks.clear()
    capsys.readouterr()
    again, _, _ = infer(data, members(), tmp_path / "out")
    assert f"{tmp_path / 'out' / 'studies' / '2.json'} is no result of study 2" in capsys.readouterr().out
    assert sorted(networks) == ["2", *NO_IMAGE]
    for study_id in first:
        np.testing.assert_array_equal(first[study_id], again[study_id])


def _rows(value):
    return np.full((5, 5, 3), value).tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("problems"),
        lambda r: r.pop("predictions"),
        lambda r: r.pop("dropped"),
        lambda r: r.update(problems="x"),
        lambda r: r.update(problems=[1]),
        lambda r: r.update(dropped=None),
        lambda r: r.update(files=7),
        lambda r: r.update(seconds="long"),
        lambda r: r["predictions"].update(level="x"),
        lambda r: r["predictions"].update(level=[[0.1]]),
        lambda r: r["predictions"].update(level=_rows(1e300)),
        lambda r: r["predictions"].update(level=_rows(float("nan"))),
        lambda r: r["predictions"].update(level=_rows("0.3")),
        lambda r: r["predictions"].update(level=_rows(0.3)),  # rows of .9
        lambda r: r["predictions"].update(level=np.tile([-1.0, 1.0, 1.0], (5, 5, 1)).tolist()),
        lambda r: r["predictions"].update(level=[[[0.2, 0.3, 10**400]] * 5] * 5),
        lambda r: r["predictions"].update(evil=_rows(1 / 3)),
        lambda r: r["predictions"].update(study=_rows(1 / 3)),  # a member, but none that was loaded
        lambda r: r.update(levels=[{"source": "=cmd()", "study_id": "<b>"}]),
        lambda r: r["levels"][0].update(source="<script>"),
        lambda r: r["levels"][0].update(x_mm="far"),
        lambda r: r["levels"][0].update(x_mm=float("inf")),
        lambda r: r["levels"][0].update(study_id=1),
        lambda r: r.update(levels=r["levels"] * 2),
    ],
)
def test_a_saved_study_of_the_right_hash_and_the_wrong_kind_is_done_again(data, networks, tmp_path, change, capsys):
    def spoil():
        path = tmp_path / "out" / "studies" / "2.json"
        result = json.loads(path.read_text())["result"]
        change(result)
        path.write_text(json.dumps({"result": result, "sha256": results._digest(result)}))

    _done_again(data, networks, tmp_path, spoil, capsys)


@pytest.mark.parametrize("put", [Path.mkdir, lambda path: path.symlink_to("/dev/zero"), os.mkfifo])
def test_what_is_no_file_is_no_saved_study(data, networks, tmp_path, put, capsys):
    saved = tmp_path / "out" / "studies" / "2.json"

    def spoil():
        saved.unlink()
        put(saved)

    _done_again(data, networks, tmp_path, spoil, capsys)
    assert not saved.is_symlink() and saved.is_file() == (put is not Path.mkdir)


def test_where_a_directory_is_in_the_way_the_run_goes_on_without_saving(data, networks, tmp_path, capsys):
    (tmp_path / "out" / "studies" / "2.json").mkdir(parents=True)
    found, _, _ = infer(data, members(), tmp_path / "out")
    said = capsys.readouterr().out
    assert "2.json is no result of study 2 (not a regular file)" in said and "2.json cannot be written" in said
    np.testing.assert_allclose(found[2], np.tile(SAYS, (5, 5, 1)), atol=1e-9)


def test_studies_of_other_weights_are_not_taken(data, networks, tmp_path):
    infer(data, members(), tmp_path / "out")
    networks.clear()
    other = members()
    other.weights["level"][0].about["epoch"] = 7
    infer(data, other, tmp_path / "out")
    assert sorted(networks) == ["1", "2", "3", "4"]


def test_a_crash_keeps_what_was_finished(data, networks, tmp_path, monkeypatch):
    def cut_crops(study, boxes, crop, device):
        if study.study_id == 2:
            raise KeyboardInterrupt
        return np.zeros(5)

    monkeypatch.setattr(crop_members, "cut_crops", cut_crops)
    with pytest.raises(KeyboardInterrupt):
        # Cut in the main thread, as a member is that was dropped when the study was read.
        monkeypatch.setattr(inference, "prepare_study", without_crops(inference.prepare_study))
        infer(data, members(), tmp_path / "out", batch_studies=1)
    assert [path.stem for path in (tmp_path / "out" / "studies").glob("*.json")] == ["1"]


def without_crops(prepare):
    return lambda folder, descriptions, loaded, wanted=(): prepare(folder, descriptions, loaded, ())


def test_the_order_of_fallbacks(data, networks, tmp_path, monkeypatch):
    """Ensemble, then what is left of it, then the study model alone, then the prior, then the class prior."""
    study_crop = CROP | {"scope": "study"}

    def cut_crops(study, boxes, crop, device):
        if crop["scope"] == "level" and study.study_id == 2:
            raise ValueError("no crop")
        return np.zeros(5 if crop["scope"] == "level" else 1)

    def predict_crops(models, crops, crop, *_):
        shape = (len(crops), 5, 1) if crop["scope"] == "level" else (len(crops), 5, 5, 1)
        return np.tile(SAYS if crop["scope"] == "level" else SAYS[::-1], shape)

    monkeypatch.setattr(crop_members, "cut_crops", cut_crops)
    monkeypatch.setattr(crop_members, "predict_crops", predict_crops)
    loaded = members()
    loaded.weights["study"] = [Weights("study_0", "network", {"crop": study_crop})]
    loaded.prior = PRIOR.copy()
    loaded.prior[0, 2] = np.nan
    loaded.prior[3] = np.nan
    found, log, _ = infer(data, loaded, tmp_path / "out")
    assert (found[1][..., 2] > found[1][..., 0]).all()  # level, which weighs more
    np.testing.assert_allclose(found[2], np.tile(SAYS[::-1], (5, 5, 1)), atol=1e-9)
    np.testing.assert_allclose(found[3][1], PRIOR[1], atol=1e-9)
    np.testing.assert_allclose(found[3][0, 2], PRIOR[0, [0, 1, 3, 4]].mean(0), atol=1e-9)
    counts = np.sum(CLASS_COUNTS[3], 0) * (1, 2, 4)
    np.testing.assert_allclose(found[3][3], np.tile(counts / counts.sum(), (5, 1)), atol=1e-9)
    assert log["rows_from"].to_dict() == {
        1: "ensemble 25",
        2: "study model 25",
        3: "level prior 19, class prior 6",
        4: "level prior 19, class prior 6",
    }
    assert "level: ValueError: no crop" in log.loc[2, "problems"]


def test_batches_do_not_change_what_is_predicted(data, networks, tmp_path):
    one, _, _ = infer(data, members(), tmp_path / "one", batch_studies=1, readers=1)
    four, _, _ = infer(data, members(), tmp_path / "four", batch_studies=4, readers=3)
    for study_id in one:
        np.testing.assert_array_equal(one[study_id], four[study_id])


def test_a_batch_that_fails_is_tried_study_by_study(data, networks, tmp_path, monkeypatch):
    monkeypatch.setattr(crop_members, "cut_crops", lambda study, *_: np.zeros(5) + study.study_id)

    def predict_crops(models, crops, crop, *_):
        if (crops == 2).any():
            raise RuntimeError("CUDA error")
        return np.tile(SAYS, (len(crops), 5, 1))

    monkeypatch.setattr(crop_members, "predict_crops", predict_crops)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    np.testing.assert_allclose(found[2], PRIOR, atol=1e-9)
    assert "CUDA error" in log.loc[2, "problems"] and "CUDA" not in log.loc[1, "problems"]


def test_what_is_not_finite_is_no_prediction(data, networks, tmp_path, monkeypatch):
    def predict_crops(models, crops, crop, *_):
        return np.where((crops == 2)[:, None, None], np.nan, np.tile(SAYS, (len(crops), 5, 1)))

    monkeypatch.setattr(crop_members, "predict_crops", predict_crops)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    np.testing.assert_allclose(found[2], PRIOR, atol=1e-9)
    assert "not finite" in log.loc[2, "problems"]


@pytest.mark.parametrize("views, expected", [(-1, 3), (1, 1), (2, 2), (9, 3)])
def test_views_are_those_that_paid_in_training(data, networks, tmp_path, monkeypatch, views, expected):
    paid = [{}, {"mirror": True}, {"scale": 1.1}]
    seen = []

    def predict_crops(models, crops, crop, levels, views, batch):
        seen.append(views)
        return np.tile(SAYS, (len(crops), 5, 1))

    monkeypatch.setattr(crop_members, "predict_crops", predict_crops)
    loaded = Members(None, {"level": [Weights("level_0", "network", {"crop": CROP, "views": paid})]}, PRIOR)
    infer(data, loaded, tmp_path / "out", views=views)
    assert seen == [paid[:expected]]
    seen.clear()
    infer(data, members(), tmp_path / "plain", views=views)  # weights that name none
    assert seen == [[{}]]


def test_reading_ahead_is_bounded(data, networks, tmp_path, monkeypatch):
    study_ids = list(range(100, 160))
    table = pd.DataFrame({"study_id": study_ids, "series_id": 1, "series_description": "Sagittal T1"})
    table.to_csv(data / "test_series_descriptions.csv", index=False)
    (data / "sample_submission.csv").unlink()
    finished, most = [], []
    save = results._save_result

    def counted(path, result):
        finished.append(path)
        most.append(len(networks) - len(finished))
        return save(path, result)

    monkeypatch.setattr(inference, "_save_result", counted)
    found, _, _ = infer(data, members(), tmp_path / "out", batch_studies=3, readers=2)
    assert len(found) == 61 and max(most) <= 2 * 3 + 2


def test_a_study_that_hangs_is_given_up(data, networks, tmp_path, monkeypatch):
    hanging = threading.Event()
    read = inference.read_study
    monkeypatch.setattr(inference, "PATIENCE_S", 0.3)

    def hang(folder, descriptions):
        if folder.name == "1":
            hanging.wait(30)
        return read(folder, descriptions)

    monkeypatch.setattr(inference, "read_study", hang)
    found, log, _ = infer(data, members(), tmp_path / "out", readers=1)
    hanging.set()
    np.testing.assert_allclose(found[1], PRIOR, atol=1e-9)
    np.testing.assert_allclose(found[2], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    assert "given up" in log.loc[1, "problems"]
    assert not (tmp_path / "out" / "studies" / "1.json").exists()  # a restart tries again


class Clock:
    """Seconds that pass only where a test says so, and not for the threads that read ahead: theirs would be chance."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now if threading.current_thread() is threading.main_thread() else 0.0


@pytest.fixture
def timed(data, networks, tmp_path, monkeypatch):
    """Sixty studies, three members of known cost; run(hours, ...) predicts them on a clock that only they move."""
    study_ids = list(range(100, 160))
    table = pd.DataFrame({"study_id": study_ids, "series_id": 1, "series_description": "Sagittal T1"})
    table.to_csv(data / "test_series_descriptions.csv", index=False)
    (data / "sample_submission.csv").unlink()
    (data / "test_images" / "3").rmdir()
    clock, costs_s = Clock(), {"yolo": 20.0, "level": 10.0, "study": 5.0}

    def predict_crops(models, crops, crop, levels, views, batch):
        clock.now += costs_s[crop["scope"]] * len(views) * len(crops) / (5 if crop["scope"] == "level" else 1)
        return np.tile(SAYS, (len(crops), 5, 1) if crop["scope"] == "level" else (len(crops), 5, 5, 1))

    def cut_crops(study, boxes, crop, device):
        return np.zeros(5 if crop["scope"] == "level" else 1)

    def yolo_studies(detector, studies, boxes, views):
        clock.now += costs_s["yolo"] * len(views) * len(studies)
        return [np.tile(SAYS, (1, 5, 1)) for _ in studies]

    monkeypatch.setattr(crop_members, "predict_crops", predict_crops)
    monkeypatch.setattr(crop_members, "cut_crops", cut_crops)
    monkeypatch.setattr(detector_member, "yolo_studies", yolo_studies)
    two = [{}, {"mirror": True}]
    own = {"yolo": [detector(views=two)]}
    own |= {
        s: [Weights(f"{s}_0", "network", {"crop": CROP | {"scope": s}, "views": v})]
        for s, v in (("level", two), ("study", [{}]))
    }
    loaded = Members(None, own, PRIOR)

    def run(hours, out="out", **options):
        before = clock.now
        options = {"reserve": 0.0, "batch_studies": 2, "clock": clock} | options
        found, log, _ = infer(data, loaded, tmp_path / out, hours=hours, **options)
        assert len(found) == 60
        return (clock.now - before) / 3600, log.fillna("")

    run.clock = clock
    return run


def test_with_enough_time_nothing_is_dropped(timed):
    used, log = timed(9.0)
    assert used == pytest.approx(60 * 65 / 3600) and (log["dropped"] == "").all()
    assert (log["members"] == "level study").all() and (log["partial"] == "yolo").all()
    no_limit, log = timed(0.0, out="again")
    assert no_limit == used and (log["dropped"] == "").all()


def test_views_go_first(timed):
    used, log = timed(0.8)  # everything: 1.08 h; one view: 0.58 h
    assert 0.5 < used <= 0.8
    dropped = log[log["dropped"] != ""]
    assert len(dropped) and dropped["dropped"].str.contains("yolo: 1 of 2 views").all()
    assert (log["partial"] == "yolo").all() and not log["dropped"].str.contains("not run").any()
    assert dropped["dropped"].str.contains(r"the end would come after [\d.]+ h, the limit is 0.8 h").all()
    assert (log["dropped"] == "").any()  # what time is left is used


def test_then_members_and_those_of_most_weight_stay_that_are_in_time(timed):
    # One view of each takes 0.58 h, yolo and level 0.5 h, yolo (.65) and study (.10) 0.42 h, yolo alone 0.33 h; of the
    # limit the first batch, of which nothing is known, has taken a part.
    used, log = timed(0.42)
    assert 0.35 < used <= 0.42
    without = {member: log["dropped"].str.contains(f"{member}: not run") for member in ("yolo", "level", "study")}
    assert without["level"].sum() > 40 and 0 < without["study"].sum() < 40 and not without["yolo"].any()
    assert (log["partial"] == "yolo").all()


def test_members_are_lost_before_studies(timed):
    used, log = timed(0.25)  # the detectors, of most weight, would take 0.33 h; level and study 0.25 h, level 0.17 h
    assert used <= 0.25 and (log["prior_rows"] < 25).all()
    assert log["dropped"].str.contains("yolo: not run").sum() > 40
    assert log["members"].str.contains("level").all()


def test_at_the_very_end_only_the_prior(timed):
    used, log = timed(0.09)  # 0.04 h for the first batch, and the fastest member alone takes 0.08 h for the others
    assert used <= 0.09
    late = log[log["problems"].str.contains("no time left")]
    assert 10 < len(late) < 50 and (late["prior_rows"] == 25).all()
    assert late["problems"].str.contains("0.09 h have passed|of 0.09 h").all()
    assert (log["prior_rows"] < 25).sum() == 60 - len(late)


def test_the_reserve_stays(timed):
    used, _ = timed(0.9, reserve=0.3)
    assert used <= 0.6


def test_the_limit_runs_on_in_this_process_and_anew_in_another(timed, monkeypatch, tmp_path):
    real, done = results._save_result, []

    def killed(path, result):
        done.append(path)
        if len(done) > 20:
            raise KeyboardInterrupt
        return real(path, result)

    monkeypatch.setattr(inference, "_save_result", killed)
    with pytest.raises(KeyboardInterrupt):
        timed(9.0)  # uses .37 h
    monkeypatch.setattr(inference, "_save_result", real)
    used, log = timed(0.8)  # .43 h are left for 40 studies that take .71 h
    assert used <= 0.45 and log["dropped"].str.contains("1 of 2 views").any()
    assert (log["dropped"].iloc[:20] == "").all()  # finished before, and counted
    again, log = timed(0.8, out="another")  # a finished run has ended its clock, another folder has its own
    assert again == pytest.approx(0.8, abs=0.05)


def test_reading_that_is_too_slow_costs_no_member():
    clock = Clock()
    schedule = Schedule({"yolo": 2, "level": 1}, {"yolo": 0.6, "level": 0.4}, 1.0, 0.0, 2, clock)
    for member, seconds in (("yolo", 2.0), ("level", 1.0), ("preparing", 30.0)):
        schedule.note(member, seconds, 1)
    assert schedule.plan(1000) == {"yolo": 2, "level": 1}


def test_crops_that_are_too_slow_cost_the_member_they_are_for():
    clock = Clock()
    weights = {"yolo": 0.6, "level": 0.3, "study": 0.1}
    schedule = Schedule(dict.fromkeys(weights, 2), weights, 1.0, 0.0, 2, clock)
    for member, seconds in (("yolo", 2.0), ("preparing", 4.0), ("preparing level", 2.0), ("preparing study", 60.0)):
        schedule.note(member, seconds, 1)
    assert schedule.plan(1000) == {"yolo": 1, "level": 1}  # 3 s a study, and 33 with the crops of study
    assert schedule.plan(100) == {"yolo": 2, "level": 2, "study": 2}


def test_a_member_that_fails_everywhere_is_an_error_except_while_kaggle_scores(data, networks, tmp_path, monkeypatch):
    def cut_crops(*_):
        raise ValueError("wrong weights")

    monkeypatch.setattr(crop_members, "cut_crops", cut_crops)
    with pytest.raises(RuntimeError, match="level failed in each of 2 readable studies .*wrong weights"):
        infer(data, members(), tmp_path / "out")
    assert not list((tmp_path / "out" / "studies").glob("*.json"))  # the next run tries again
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    found, _, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], PRIOR, atol=1e-9)


def test_no_weights_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors in or below"):
        weight_folders([tmp_path])
    with pytest.raises(FileNotFoundError, match="no spinenet.safetensors"):
        utils.load_members([tmp_path])


def test_weights_are_found_below_but_not_in_image_folders(tmp_path):
    for name in ("a/03_train_yolo_scs", "a/train_images/1", "a/01_preprocess/volumes", "a/02.old-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.safetensors").touch()
    assert weight_folders([tmp_path]) == [tmp_path / "a/03_train_yolo_scs"]


def weights(folder, name, **about):
    """A file that looks like a member's weights of 03 or 04: metadata, and next to nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "metadata" if name.startswith("yolo") else "classifier"
    about = ({"calibration": {"trust": 1.0}} if name.startswith("yolo") else {}) | about
    save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors", metadata={kind: json.dumps(about)})
    return folder


def out_of_fold(folder, studies, fold, severe, conditions=utils.CONDITIONS):
    """An oof.csv of these studies, in which every row says `severe`."""
    p = np.tile([1 - severe, 0.0, severe], (len(studies), 5, 5, 1))
    table = utils.to_submission(studies, p).assign(fold=fold)
    table = table[table["row_id"].str.contains("|".join(conditions))]
    before = [pd.read_csv(folder / "oof.csv")] if (folder / "oof.csv").is_file() else []
    pd.concat([*before, table]).to_csv(folder / "oof.csv", index=False)


def severe_by_study(table):
    return table.groupby(table["row_id"].str.split("_").str[0].astype(int))["severe"].first().round(3).to_dict()


def test_weights_of_other_kinds_stand_only_alone_and_are_refused_by_name(tmp_path):
    ours, theirs = tmp_path / "03_train_yolo_scs", tmp_path / "03_another"
    weights(ours, "yolo_scs_0")
    for fold in (0, 1):
        weights(theirs, f"yolo_scs_{fold}", scheme="original")
    weights(tmp_path / "04_train_vit_level_1", "level_2", pooling="global")
    weights(tmp_path / "04_train_vit_level_2", "level_2", pooling="grid")
    found, sentences = member_weights(weight_folders([tmp_path]))
    assert {name: path.parent.name for name, path in found.items()} == {
        "level_2": "04_train_vit_level_2",
        "yolo_scs_0": "03_train_yolo_scs",
        "yolo_scs_1": "03_another",
    }
    assert any(f"yolo_scs_0 in {theirs} left out: already found in {ours}" in text for text in sentences)
    for name in ("yolo_scs_1", "level_2"):
        path = found[name] if name == "yolo_scs_1" else tmp_path / "04_train_vit_level_1" / "level_2.safetensors"
        with pytest.raises(DamagedFile, match=f"{name}.safetensors states (scheme 'original'|pooling 'global')"):
            member_of(name).read_about(path)


def test_unfinished_weights_are_left_out_and_a_fold_is_taken_from_one_folder(tmp_path, capsys):
    for place, severe in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        folder = tmp_path / place
        weights(folder, "level_0")
        out_of_fold(folder, [1, 2], 0, severe)
        out_of_fold(folder, [ord(place)], 0, severe)  # a study that the others' fold lacks
    (tmp_path / "a" / "level_0.checkpoint").touch()
    weights(tmp_path / "a", "level_1")
    out_of_fold(tmp_path / "a", [3], 1, 0.1)
    weights(tmp_path / "c", "level_2")
    out_of_fold(tmp_path / "c", [4], 2, 0.3)
    weights(tmp_path / "a", "yolo_ss_0", scheme="severity", calibration=None)
    (tmp_path / "a" / "study_0.safetensors").write_bytes(b"cut")
    weights(tmp_path / "c", "study_0")
    folders = weight_folders([tmp_path])
    found, sentences = member_weights(folders)
    places = {name: path.parent.name for name, path in found.items()}
    assert places == {"level_0": "b", "level_1": "a", "level_2": "c", "study_0": "c"}
    unfinished = [text for text in sentences if "has not finished" in text]
    assert unfinished == [f"level_0, yolo_ss_0 in {tmp_path / 'a'} left out: training has not finished"]
    assert any(f"level_0 in {tmp_path / 'c'} left out: already found in {tmp_path / 'b'}" in text for text in sentences)
    tables = utils.read_out_of_fold(folders)
    assert severe_by_study(tables["level"]) == {1: 0.2, 2: 0.2, ord("b"): 0.2, 3: 0.1, 4: 0.3}
    said = capsys.readouterr().out
    assert "already found in" in said and "has not finished" in said


def test_what_is_loaded_from_where_is_printed(tmp_path, monkeypatch, capsys):
    for name in ("level_0", "level_1"):
        weights(tmp_path / "04_train_vit_level", name)
    weights(tmp_path / "03_train_yolo_nfn_3", "yolo_nfn_3")
    weights(tmp_path / "03_train_yolo_nfn_3_old", "yolo_nfn_3")
    weights(tmp_path / "02_train_spinenet", "spinenet")
    monkeypatch.setattr(crop_members, "load_classifier", lambda path, device: (path.stem, {}))
    monkeypatch.setattr(detector_member, "load_yolo", lambda path, device: SimpleNamespace(about={}, path=path))
    monkeypatch.setattr(members_module, "load_spinenet", lambda path, device: SimpleNamespace(about={}))
    loaded = utils.load_members(weight_folders([tmp_path]), device="cpu")
    assert [own.name for own in loaded.weights["level"]] == ["level_0", "level_1"] and "study" not in loaded.weights
    assert [own.model.path.parent.name for own in loaded.weights["yolo"]] == ["03_train_yolo_nfn_3"]
    said = capsys.readouterr().out
    assert f"level_0, level_1 from {tmp_path / '04_train_vit_level'}" in said
    assert f"yolo_nfn_3 in {tmp_path / '03_train_yolo_nfn_3_old'} left out: already found in" in said
    utils.load_members([tmp_path], ["level"], "cpu")
    assert "yolo_nfn_3 from" not in capsys.readouterr().out


def test_a_member_without_out_of_fold_predictions_gets_its_default_share(tmp_path, capsys):
    rng = np.random.default_rng(0)
    studies = np.arange(100, 130)
    grades = np.array(utils.GRADES, object)[rng.choice(3, (len(studies), 25))]
    labels = pd.DataFrame(grades, columns=list(LABEL_COLUMNS))
    labels.insert(0, "study_id", studies)
    labels.to_csv(tmp_path / "train.csv", index=False)
    weights(tmp_path / "level", "level_0")
    weights(tmp_path / "study", "study_0")
    p = rng.dirichlet((1, 1, 1), (len(studies), 5, 5))
    utils.to_submission(studies, p).assign(fold=0).to_csv(tmp_path / "level" / "oof.csv", index=False)
    folders = [tmp_path / "level", tmp_path / "study"]
    fitted = utils.ensemble_for(folders, tmp_path)
    assert "default shares stand: study 0.29" in capsys.readouterr().out
    for group in utils.GROUPS:
        assert fitted["weights"][group] == pytest.approx({"level": 0.25 / 0.35, "study": 0.10 / 0.35})
    assert fitted["temperature"]["spinal"] != 1  # the rest is fitted
    utils.write_json(tmp_path / "level" / "ensemble.json", default_ensemble(["level"]))
    kept = utils.ensemble_for(folders, tmp_path)
    assert kept["weights"]["spinal"]["study"] == pytest.approx(0.10 / 0.35)
    asked = utils.ensemble_for(folders, tmp_path, ["level"])
    assert list(asked["weights"]["spinal"]) == ["level"]


def test_folds_of_a_detector_are_averaged_as_logs_where_they_speak(data, networks, monkeypatch):
    """Each fold has its own views; where one of them sees no level the others stand."""
    one, two = np.full((1, 5, 3), [0.9, 0.08, 0.02]), np.full((1, 5, 3), [0.1, 0.2, 0.7])
    one[0, [0, 2]] = np.nan
    two[0, [1, 2]] = np.nan
    folds = [detector(views=[{}], says=one), detector(views=[{}, {"reach": 1.7}], says=two)]
    seen = []

    def yolo_studies(detector, studies, boxes, views):
        seen.append(views)
        return [detector.about["says"] for _ in studies]

    monkeypatch.setattr(detector_member, "yolo_studies", yolo_studies)
    loaded = Members(None, {"yolo": folds}, PRIOR)
    prepared = prepare_study(data / "test_images" / "1", {11: "Sagittal T1"}, loaded)
    (predicted,), (problems,), _ = predict_studies([prepared], loaded)
    assert seen == [[{}], [{}, {"reach": 1.7}]]
    levels = predicted["yolo"][0]
    np.testing.assert_allclose(levels[0], [0.1, 0.2, 0.7], atol=1e-9)
    np.testing.assert_allclose(levels[1], [0.9, 0.08, 0.02], atol=1e-9)
    assert np.isnan(levels[2]).all() and list(map(str, problems)) == [
        "yolo: scs: no Sagittal T2/STIR slice shows l3_l4"
    ]
    geometric = np.sqrt([0.09, 0.016, 0.014])
    np.testing.assert_allclose(levels[3:], np.tile(geometric / geometric.sum(), (2, 1)), atol=1e-9)


# ---- Time: what is short is done again ----


def test_waiting_for_a_study_that_hangs_is_no_pace(timed, monkeypatch):
    hanging = threading.Event()
    read, take = inference.read_study, read_ahead._Ahead.take
    clock = timed.clock

    def hang(folder, descriptions):
        if folder.name == "106":
            hanging.wait(30)
        return read(folder, descriptions)

    def slowly(self, *limits):
        try:
            return take(self, *limits)
        except queue.Empty:
            clock.now += 900
            raise

    monkeypatch.setattr(inference, "PATIENCE_S", 0.3)
    monkeypatch.setattr(inference, "read_study", hang)
    monkeypatch.setattr(read_ahead._Ahead, "take", slowly)
    used, log = timed(2.0, readers=2)  # 1.08 h of work and .25 h of waiting
    hanging.set()
    assert "given up" in log.loc[106, "problems"]
    assert used > 1.25 and (log["dropped"] == "").all()


def test_what_was_short_of_time_is_done_again_with_everything(timed, networks):
    _, first = timed(0.8)
    short = first.index[first["dropped"] != ""]
    networks.clear()
    used, second = timed(0.3)  # enough for some of them
    done = sorted(set(short) - set(second.index[second["dropped"] != ""]))
    assert 0 < len(done) < len(short) and used <= 0.3
    assert set(networks) >= set(map(str, done)) and set(networks) <= set(map(str, short))
    assert (second.loc[second["dropped"] != "", "partial"] == "yolo").all()  # the old result stands
    networks.clear()
    used, third = timed(9.0)
    assert (third["dropped"] == "").all() and len(networks) == len(short) - len(done)
    networks.clear()
    assert timed(9.0)[0] == 0 and not networks


def test_what_was_short_of_time_stands_where_doing_it_again_fails(timed, monkeypatch, tmp_path):
    _, first = timed(0.8)
    short = first["dropped"] != ""
    saved = {path: path.read_text() for path in (tmp_path / "out" / "studies").iterdir()}

    def cut_crops(*_):
        raise full()

    monkeypatch.setattr(crop_members, "cut_crops", cut_crops)
    _, second = timed(9.0)
    columns = ["members", "partial", "dropped", "problems"]
    pd.testing.assert_frame_equal(first.loc[short, columns], second.loc[short, columns])
    assert saved == {path: path.read_text() for path in (tmp_path / "out" / "studies").iterdir()}


def test_those_without_a_result_come_before_those_that_were_short(timed, networks):
    _, first = timed(0.09)  # some late, the others short or whole
    late = set(map(str, first.index[first["problems"].str.contains("no time left")]))
    short = set(map(str, first.index[first["dropped"] != ""])) - late
    assert late and short
    networks.clear()
    _, second = timed(9.0, readers=1)  # several start side by side, in any order
    assert (second["dropped"] == "").all() and (second["prior_rows"] < 25).all()
    assert set(networks) == late | short and set(networks[: len(late)]) == late


def test_patience_begins_with_the_work():
    ahead = read_ahead._Ahead([1], lambda job: job + 1, 0, 1)
    threading.Timer(0.4, ahead._start).start()
    assert ahead.take(0.1) == 2
    waiting = read_ahead._Ahead([1], lambda job: job, 0, 1)
    with pytest.raises(queue.Empty):
        waiting.take(10.0, 0.1)
    waiting.close(1)
    ahead.close(1)


def test_studies_that_hang_together_are_given_up_together():
    hanging = threading.Event()
    ahead = read_ahead._Ahead([1, 2, 3, 4, 5], lambda job: hanging.wait(30 if job < 5 else 0), 4, 5)
    started = time.monotonic()
    for _ in range(4):
        with pytest.raises(queue.Empty):
            ahead.take(0.5)
    ahead.take(5.0)
    assert time.monotonic() - started < 1.5
    hanging.set()
    ahead.close(9)


# ---- Processes that die ----


DEADLY = 105


@pytest.fixture
def many(data, networks, monkeypatch):
    """Twelve studies; start(out) predicts them in a process of its own: dict study_id -> (rows, problems)."""
    study_ids = list(range(100, 112))
    table = pd.DataFrame({"study_id": study_ids, "series_id": 1, "series_description": "Sagittal T1"})
    table.to_csv(data / "test_series_descriptions.csv", index=False)
    (data / "sample_submission.csv").unlink()
    (data / "test_images" / "3").rmdir()
    for study_id in study_ids:
        (data / "test_images" / str(study_id)).mkdir()

    def predict_crops(models, crops, *_):  # of its own for each study
        return np.tile(SAYS, (len(crops), 5, 1)) ** (crops[:, None, None] / 100)

    monkeypatch.setattr(crop_members, "predict_crops", predict_crops)

    def process(out, **options):
        torch.set_num_threads(1)
        found, log, _ = infer(data, members(), out, **{"readers": 3, "batch_studies": 2} | options)
        return {str(i): (rows.tolist(), log.loc[i, "problems"]) for i, rows in found.items()}

    def start(out, **options):
        return in_flight.run_in_child(lambda: process(out, **options), 60.0)

    start.study_ids = study_ids
    return start


def at(study_id, do):
    """read_study that does something at one study."""
    read = inference.read_study
    return lambda folder, series: (do() if folder.name == str(study_id) else None, read(folder, series))[1]


def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.parametrize(
    "how, words",
    [
        (lambda: kill(signal.SIGKILL), "SIGKILL (out of memory?)"),
        (lambda: os._exit(0), "exit status 0"),
    ],
)
def test_a_study_that_kills_the_process_is_passed_over_at_the_second_start(many, tmp_path, monkeypatch, how, words):
    clean, out = many(tmp_path / "clean"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(inference, "read_study", at(DEADLY, how))
        with pytest.raises(in_flight.ChildDied):
            many(out)
        for _ in range(2):
            found = many(out)
            why = f"the process died while it was at this study (2 times, at last of {words})"
            assert found[str(DEADLY)][1].startswith(why)
            np.testing.assert_allclose(found[str(DEADLY)][0], PRIOR, atol=1e-9)
            del found[str(DEADLY)]
            assert found == {i: result for i, result in clean.items() if i != str(DEADLY)}
    assert not (out / "studies" / f"{DEADLY}.json").exists()
    # The next start passes over it without a look, until its files change.
    assert DEADLY not in [int(i) for i, result in many(out).items() if not result[1]]
    (tmp_path / "test_images" / str(DEADLY) / "1.dcm").write_bytes(b"mended")
    assert many(out) == clean and not (out / "in_flight").exists()


@pytest.mark.parametrize("readers", [1, 3])
def test_where_there_can_be_no_child_it_is_passed_over_at_the_third_start(many, tmp_path, monkeypatch, readers):
    clean = many(tmp_path / "clean")
    monkeypatch.setattr(inference, "can_run_in_child", lambda: False)
    monkeypatch.setattr(inference, "read_study", at(DEADLY, lambda: os._exit(3)))
    for _ in range(2):
        with pytest.raises(in_flight.ChildDied):
            many(tmp_path / "out", readers=readers)
    found = many(tmp_path / "out", readers=readers)
    assert found.pop(str(DEADLY))[1].startswith("the process died while it was at this study (2 times)")
    assert found == {i: result for i, result in clean.items() if i != str(DEADLY)}


def test_a_study_whose_prediction_kills_the_process_is_passed_over_too(many, tmp_path, monkeypatch):
    clean, predict = many(tmp_path / "clean"), crop_members.predict_crops

    def predict_crops(models, crops, *rest):
        return os._exit(1) if (crops == DEADLY).any() else predict(models, crops, *rest)

    monkeypatch.setattr(crop_members, "predict_crops", predict_crops)
    with pytest.raises(in_flight.ChildDied):
        many(tmp_path / "out")
    found = many(tmp_path / "out")
    assert "2 times, at last of exit status 1" in found.pop(str(DEADLY))[1]
    assert found == {i: result for i, result in clean.items() if i != str(DEADLY)}


@pytest.mark.slow
def test_kills_from_outside_cost_no_study(many, tmp_path, monkeypatch):
    """Whatever is in flight when somebody kills the process again and again; the parent and its child alike."""
    clean, read, deaths = many(tmp_path / "clean"), inference.read_study, 0
    for number in (101, 104, 107, 110, 111):
        parent = []

        def killed(folder, series, number=number, parent=parent):
            if folder.name == str(number):
                os.kill(parent[0], signal.SIGKILL)
                time.sleep(5)
            return read(folder, series)

        monkeypatch.setattr(inference, "read_study", killed)
        start = inference.InFlight
        monkeypatch.setattr(inference, "InFlight", lambda *a, p=parent, s=start: (p.append(os.getpid()), s(*a))[1])
        try:  # how far the others were when it was killed is chance: this study may be finished already
            many(tmp_path / "out")
        except in_flight.ChildDied:
            deaths += 1
        monkeypatch.setattr(inference, "InFlight", start)
    assert deaths >= 1
    monkeypatch.setattr(inference, "read_study", read)
    assert many(tmp_path / "out") == clean and not (tmp_path / "out" / "in_flight").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_orderly_end_makes_no_suspects(many, tmp_path, monkeypatch, number):
    def stop():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), number)

    save = results._save_result
    with monkeypatch.context() as patch:
        patch.setattr(inference, "_save_result", lambda *a: (stop() if a[0].stem == "106" else None, save(*a))[1])
        with pytest.raises(in_flight.ChildDied, match="SIGTERM" if number == signal.SIGTERM else "exit status 1"):
            many(tmp_path / "out")
    assert (tmp_path / "out" / "studies" / "104.json").is_file() and not (tmp_path / "out" / "in_flight").exists()


def test_a_passed_over_study_keeps_what_it_had(many, tmp_path, monkeypatch):
    """A result of fewer members stands where doing the study again with all of them kills the process."""
    out = tmp_path / "out"
    many(out)
    path = out / "studies" / f"{DEADLY}.json"
    result = json.loads(path.read_text())["result"] | {"dropped": ["study: not run"]}
    path.write_text(json.dumps({"result": result, "sha256": results._digest(result)}))
    first = many(tmp_path / "clean")[str(DEADLY)][0]
    monkeypatch.setattr(inference, "read_study", at(DEADLY, lambda: os._exit(1)))
    with pytest.raises(in_flight.ChildDied):
        many(out)
    rows, problems = many(out)[str(DEADLY)]
    assert rows == first and "2 times" in problems and "prior" not in problems


# ---- A limit on CPU time ----


def test_a_study_that_works_too_long_is_given_up(data, networks, tmp_path, monkeypatch):
    def long_work(study, model, detector):
        while study.study_id == 1:
            limits_module.check_limit()
        return [LevelBox("l1_l2", np.zeros(3), np.eye(3), np.ones(3), 1.0, "t2")] * 5, [], None

    monkeypatch.setattr(inference, "STUDY_S", 0.2)
    monkeypatch.setattr(inference, "locate_levels_surely", long_work)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[2], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    assert "TookTooLong: more than 0.2 s of CPU time" in log.loc[1, "problems"]
    assert not (tmp_path / "out" / "studies" / "1.json").exists()  # a faster machine may finish it


def test_threads_end_with_the_run(data, networks, tmp_path, monkeypatch):
    """Also those that were at work when the time was up: the next check of their limit ends them."""
    ended = []

    def long_work(study, model, detector):
        try:
            while True:
                limits_module.check_limit()
                time.sleep(0.001)
        except limits_module.TookTooLong as error:
            ended.append(str(error))
            raise

    monkeypatch.setattr(inference, "locate_levels_surely", long_work)
    _, log, _ = infer(data, members(), tmp_path / "out", hours=0.0003, reserve=0.0, readers=2)
    assert ended == ["no longer wanted: the run has ended"] * 2
    assert not [t for t in threading.enumerate() if t.name.endswith("(_run)")]


def test_threads_that_nobody_closed_are_waited_for_when_the_process_exits():
    begun, ended = threading.Event(), []

    def work(job):
        begun.set()
        while not ahead.stopped:
            time.sleep(0.001)
        time.sleep(0.05)  # a last call into PyTorch
        ended.append(job)

    ahead = read_ahead._Ahead([1, 2], work, 1, 2)
    with pytest.raises(queue.Empty):  # the first is given up
        ahead.take(0.02)
    with pytest.raises(queue.Empty):
        ahead.take(9.0, 0.02)
    assert begun.is_set() and not ended
    read_ahead._close_all()
    assert sorted(ended) == [1, 2]


# ---- The device's memory, and the device ----


def full():
    return torch.OutOfMemoryError("CUDA out of memory")


def test_crops_that_found_the_memory_full_are_cut_again(data, networks, tmp_path, monkeypatch):
    calls = []

    def cut_crops(study, boxes, crop, device):
        calls.append((study.study_id, threading.current_thread() is threading.main_thread()))
        if study.study_id == 2 and not calls[-1][1]:
            raise full()
        return np.zeros(5)

    monkeypatch.setattr(crop_members, "cut_crops", cut_crops)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[2], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    assert [call for call in calls if call[0] == 2] == [(2, False), (2, True)]
    assert "Memory" not in log.loc[2, "problems"] and (tmp_path / "out" / "studies" / "2.json").is_file()


def test_levels_that_found_the_memory_full_are_located_again(data, networks, tmp_path, monkeypatch):
    locate, calls = inference.locate_levels_surely, []

    def short(study, model, detector):
        boxes, vertebrae, _ = locate(study, model, detector)
        calls.append(study.study_id)
        full_ = study.study_id == 2 and calls.count(2) == 1
        return boxes, vertebrae, Problem.of(full(), "detection failed ", kind=Kind.LEVELS) if full_ else None

    monkeypatch.setattr(inference, "locate_levels_surely", short)
    found, log, _ = infer(data, members(), tmp_path / "out")
    assert calls.count(2) == 2 and "Memory" not in log.loc[2, "problems"] and log.loc[2, "members"] == "level"


def test_what_failed_for_want_of_memory_is_not_kept(data, networks, tmp_path, monkeypatch):
    def cut_crops(study, boxes, crop, device):
        if study.study_id == 2:
            raise full()
        return np.zeros(5)

    with monkeypatch.context() as patch:
        patch.setattr(crop_members, "cut_crops", cut_crops)
        _, log, _ = infer(data, members(), tmp_path / "out")
    assert "OutOfMemoryError" in log.loc[2, "problems"]
    assert sorted(path.stem for path in (tmp_path / "out" / "studies").glob("*.json")) == ["1"]
    networks.clear()
    _, log, _ = infer(data, members(), tmp_path / "out")
    assert sorted(networks) == ["2", *NO_IMAGE] and log.loc[2, "members"] == "level"


def test_a_detector_that_found_the_memory_full_is_asked_again_for_less(data, networks, tmp_path, monkeypatch):
    batches = []

    def yolo_studies(detector, studies, boxes, views, batch=16):
        batches.append((len(studies), batch))
        return [full() if s.study_id == 2 and batch == 16 else np.tile(SAYS, (1, 5, 1)) for s in studies]

    monkeypatch.setattr(detector_member, "yolo_studies", yolo_studies)
    loaded = Members(None, {"yolo": [detector()]}, PRIOR)
    found, log, _ = infer(data, loaded, tmp_path / "out")
    np.testing.assert_allclose(found[2][0], np.tile(SAYS, (5, 1)), atol=1e-9)
    assert batches == [(2, 16), (1, detector_member.FEW_PATCHES)] and "Memory" not in log.loc[2, "problems"]


def test_errors_that_are_kept_hold_no_frames(data, networks, monkeypatch):
    def cut_crops(*_):
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    monkeypatch.setattr(crop_members, "cut_crops", cut_crops)
    prepared = prepare_study(data / "test_images" / "1", {11: "Sagittal T1"}, members())
    (kept,) = prepared.inputs["level"].crops.values()

    def work(items):
        raise RuntimeError(items)

    monkeypatch.setattr(detector_module, "_study_patches", cut_crops)
    detector = detector_module.YoloDetector(None, {"condition": "scs"})
    (silent,) = yolo_scores(detector, [prepared.study], [prepared.boxes])
    for error in (kept, silent, *together_or_alone(work, [1, 2])):
        assert isinstance(error, Exception)
        assert error.__traceback__ is None and error.__context__ is None and error.__cause__ is None


def test_a_device_that_fails_ends_the_run_with_nothing_of_it_saved(data, networks, tmp_path, monkeypatch, capsys):
    zeros, predict = torch.zeros, crop_members.predict_crops

    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def breaks(models, crops, *rest):
        if (crops == 2).any():
            monkeypatch.setattr(torch, "zeros", broken)
        return predict(models, crops, *rest) if torch.zeros is zeros else broken()

    monkeypatch.setattr(crop_members, "predict_crops", breaks)
    saved = tmp_path / "out" / "studies"
    with pytest.raises(RuntimeError, match="the device cpu fails .*illegal memory access.*start again"):
        infer(data, members(), tmp_path / "out", batch_studies=1)
    assert [path.stem for path in saved.glob("*.json")] == ["1"]
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    found, log, _ = infer(data, members(), tmp_path / "out", batch_studies=1)
    assert "the device cpu fails" in log.loc[2, "problems"] and "the device cpu fails" in capsys.readouterr().out
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    np.testing.assert_allclose(found[2], PRIOR, atol=1e-9)
    assert not (saved / "2.json").exists()
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(crop_members, "predict_crops", predict)
    networks.clear()
    _, log, _ = infer(data, members(), tmp_path / "out", batch_studies=1)
    assert "2" in networks and "1" not in networks and log.loc[2, "members"] == "level"


def test_results_belong_to_what_located_the_levels():
    loaded = members()
    keys = [results._results_key(loaded, -1)]
    for spinenet, detector in ((SimpleNamespace(about={"steps": 30}), "own"), (None, lambda volume: [])):
        loaded.spinenet, loaded.detector = spinenet, detector
        keys.append(results._results_key(loaded, -1))
        assert results._results_key(loaded, -1) == keys[-1]
    network = SpineNet(widths=(8, 8, 8))
    for step in range(2):
        network.about = {}
        with torch.no_grad():
            network.head[0].weight.add_(step)
        loaded.spinenet, loaded.detector = network, "own"
        keys.append(results._results_key(loaded, -1))
    assert len(set(keys)) == len(keys)


# ---- Notebook 05 ----


@pytest.mark.slow
def test_the_notebook_closes_when_nothing_is_late_and_only_reads_finished_work(tmp_path):
    study = tmp_path / "data" / "test_images" / "7"
    tiny.write_study(study)
    rows = [(7, series_id, what) for series_id, what in tiny.SERIES.items()]
    columns = ["study_id", "series_id", "series_description"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "data" / "test_series_descriptions.csv", index=False)
    tiny.write_members(tmp_path / "weights", random_spinenet=True)
    stage = tmp_path / "out" / "05_inference"

    def run(hours):
        parameters = {"DATA": tmp_path / "data", "WEIGHTS": [str(tmp_path / "weights")], "OUT": tmp_path / "out"}
        parameters = {k: v if isinstance(v, list) else str(v) for k, v in parameters.items()}
        parameters |= {"HOURS": hours, "RESERVE": 0.0001, "DEVICE": "cpu"}
        output = tmp_path / "run.ipynb"
        run_notebook(tiny.ROOT / "notebooks" / "05_inference.ipynb", output, parameters)
        return pd.read_csv(tmp_path / "out" / "submission.csv"), output.read_text()

    file = sorted(study.rglob("*.dcm"))[0]
    good = file.read_bytes()
    file.write_bytes(good[:1000])
    late, said = run(0.00011)
    assert len(late) == 25 and not (stage / "manifest.json").exists() and "more HOURS" in said
    found, _ = run(9.0)
    assert (stage / "manifest.json").is_file() and not np.allclose(found["severe"], late["severe"])
    (tmp_path / "out" / "submission.csv").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again, _ = run(9.0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    pd.testing.assert_frame_equal(found, again)

    assert pd.read_csv(stage / "inference_log.csv")["problems"].str.contains(file.name).all()
    file.write_bytes(good)
    _, said = run(9.0)
    assert "1 studies had problems last time and have other files now" in said
    assert pd.read_csv(stage / "inference_log.csv")["problems"].isna().all()
    assert (stage / "manifest.json").stat().st_mtime_ns != before[stage / "manifest.json"]
