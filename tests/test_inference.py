"""Inference never loses a row: what fails costs its own contribution, and says so."""

import numpy as np
import pandas as pd
import pytest

import utils
from lumbar import inference

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
    box = utils.LevelBox("l1_l2", np.zeros(3), np.eye(3), np.ones(3), 1.0, "t2")

    def read_study(folder, descriptions):
        reads.append(folder.name)
        volumes = [utils.Volume(np.zeros((2, 4, 4), np.float32), np.eye(4), 1, 1, "Sagittal T1", 0, np.arange(2))]
        return utils.Study(int(folder.name), volumes if descriptions else [])

    def predict_crops(models, crops, *_):
        return np.tile(SAYS, (5, 5, 1))

    monkeypatch.setattr(inference, "read_study", read_study)
    monkeypatch.setattr(inference, "locate_levels_surely", lambda study, model, detector: ([box] * 5, [], None))
    monkeypatch.setattr(inference, "cut_crops", lambda study, boxes, crop, device: np.zeros(5) + study.study_id)
    monkeypatch.setattr(inference, "predict_crops", predict_crops)
    return reads


def members(level=True):
    return utils.Members(None, {}, [("network", {"crop": CROP})] if level else [], [], PRIOR)


def infer(data, loaded, out):
    ensemble = utils.default_ensemble()
    submission, log, tables, levels = utils.infer_studies(data, "test", loaded, ensemble, out)
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


def test_a_failing_member_costs_its_own_contribution(data, networks, tmp_path, monkeypatch):
    def cut_crops(study, boxes, crop, device):
        if study.study_id == 2:
            raise ValueError("the crop fell off")
        return np.zeros(5)

    monkeypatch.setattr(inference, "cut_crops", cut_crops)
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


def test_a_restart_continues(data, networks, tmp_path):
    first, _, _ = infer(data, members(), tmp_path / "out")
    (tmp_path / "out" / "studies" / "2.json").unlink()
    networks.clear()
    again, _, _ = infer(data, members(), tmp_path / "out")
    assert networks == ["2"]
    for study_id in first:
        np.testing.assert_array_equal(first[study_id], again[study_id])


def test_a_member_that_fails_everywhere_is_an_error_except_while_kaggle_scores(data, networks, tmp_path, monkeypatch):
    def cut_crops(*_):
        raise ValueError("wrong weights")

    monkeypatch.setattr(inference, "cut_crops", cut_crops)
    with pytest.raises(RuntimeError, match="level failed in each of 2 readable studies .*wrong weights"):
        infer(data, members(), tmp_path / "out")
    assert not list((tmp_path / "out" / "studies").glob("*.json"))  # the next run tries again
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    found, _, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], PRIOR, atol=1e-9)


def test_no_weights_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors in or below"):
        utils.weight_folders([tmp_path])
    with pytest.raises(FileNotFoundError, match="no spinenet.safetensors"):
        utils.load_members([tmp_path])


def test_weights_are_found_below_but_not_in_image_folders(tmp_path):
    for name in ("a/03_train_yolo_scs", "a/train_images/1", "a/01_preprocess/volumes", "a/02.old-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.safetensors").touch()
    assert utils.weight_folders([tmp_path]) == [tmp_path / "a/03_train_yolo_scs"]
