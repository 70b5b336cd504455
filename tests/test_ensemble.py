"""Combining members, finding weights, and the tables they come in."""

import numpy as np
import pandas as pd
import pytest

import utils


def case(studies=60, seed=0):
    """Grades, labels, and two members: one good, one that knows little."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(3, (studies, 5, 5), p=(0.6, 0.25, 0.15))
    ids = np.arange(1000, 1000 + studies)
    labels = pd.DataFrame(
        np.array(utils.GRADES, object)[grades.reshape(studies, 25)], columns=list(utils.LABEL_COLUMNS)
    )
    labels.insert(0, "study_id", ids)

    def member(sharpness):
        logits = sharpness * np.eye(3)[grades] + rng.standard_normal((studies, 5, 5, 3))
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    return grades, ids, labels, {"yolo": member(0.2), "level": member(2.0)}


def test_combination_is_the_weighted_mean_of_log_probabilities():
    grades, _, _, members = case(4)
    ensemble = utils.default_ensemble(["yolo", "level"])
    result, count = utils.combine_members(members, ensemble, utils.class_prior(grades))
    weight = np.array([utils.DEFAULT_WEIGHTS[m] for m in members])
    logits = np.tensordot(weight / weight.sum(), np.log(np.stack(list(members.values()))), 1)
    np.testing.assert_allclose(result, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), atol=1e-9)
    assert (count == 2).all()


def test_an_absent_member_gives_its_weight_away_and_nothing_is_left_out():
    grades, _, _, members = case(4)
    prior = utils.class_prior(grades)
    members["yolo"][1] = np.nan
    members["level"][2, 3] = np.nan
    members["yolo"][2, 3] = np.nan
    result, count = utils.combine_members(members, utils.default_ensemble(["yolo", "level"]), prior)
    np.testing.assert_allclose(result[1], members["level"][1], atol=1e-9)
    np.testing.assert_allclose(result[2, 3], prior[3])
    assert count[1].max() == 1 and count[2, 3].max() == 0
    assert np.abs(result.sum(-1) - 1).max() < 1e-12


def test_calibration_applies_to_its_group_alone():
    grades, _, _, members = case(4)
    prior = utils.class_prior(grades)
    plain = utils.default_ensemble(["yolo", "level"])
    before, _ = utils.combine_members(members, plain, prior)
    warm = utils.default_ensemble(["yolo", "level"])
    warm["temperature"]["foraminal"], warm["bias"]["foraminal"] = 2.0, [0.0, 0.0, 1.0]
    after, _ = utils.combine_members(members, warm, prior)
    np.testing.assert_array_equal(before[:, [0, 3, 4]], after[:, [0, 3, 4]])
    logits = np.log(before[:, 1:3]) / 2 + [0, 0, 1.0]
    np.testing.assert_allclose(after[:, 1:3], np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), atol=1e-9)


def test_fitted_weights_prefer_the_better_member_and_help_on_other_studies():
    grades, ids, labels, members = case(120)
    half = slice(0, 60)
    tables = {m: utils.to_submission(ids[half], p[half]) for m, p in members.items()}
    tables["yolo"] = tables["yolo"].drop(tables["yolo"].index[5:40])  # rows may be missing
    fitted = utils.fit_ensemble(labels, tables, members=["yolo", "level"])
    prior = utils.class_prior(grades)
    rest = {m: p[60:] for m, p in members.items()}

    def score(ensemble):
        return utils.score_arrays(grades[60:], utils.combine_members(rest, ensemble, prior)[0])["total"]

    assert all(fitted["weights"][group]["level"] > 0.6 for group in utils.GROUPS)
    assert score(fitted) < 0.95 * score(utils.default_ensemble(["yolo", "level"]))


def test_few_rows_leave_the_defaults_nearly_alone():
    _, ids, labels, members = case(2)
    tables = {m: utils.to_submission(ids, p) for m, p in members.items()}
    fitted = utils.fit_ensemble(labels, tables, strength=1e6, members=["yolo", "level"])
    for group in utils.GROUPS:
        assert fitted["weights"][group]["yolo"] == pytest.approx(0.65 / 0.9, abs=0.01)
        assert fitted["temperature"][group] == pytest.approx(1, abs=0.01)


def test_out_of_fold_tables_are_found_and_the_detectors_are_one_member(tmp_path):
    _, ids, _, members = case(3)
    whole = utils.to_submission(ids, members["yolo"]).assign(fold=0)
    spinal = whole["row_id"].str.contains("spinal")
    for name, part in (("03_train_yolo_scs", whole[spinal]), ("03_train_yolo_nfn", whole[~spinal])):
        (tmp_path / name).mkdir()
        part.to_csv(tmp_path / name / "oof.csv", index=False)
        (tmp_path / name / f"yolo_{name[-3:]}_0.safetensors").touch()
    tables = utils.read_out_of_fold([tmp_path, tmp_path / "03_train_yolo_scs"])
    assert list(tables) == ["yolo"] and len(tables["yolo"]) == len(whole)


def test_an_unknown_view_is_refused():
    with pytest.raises(ValueError, match="unknown TTA view"):
        utils.expand_view({"flip": True}, 2)
