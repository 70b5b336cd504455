"""Combining members, finding weights, and the tables they come in."""

import json

import numpy as np
import pandas as pd
import pytest
from benchmarks import bench_ensemble
from scipy.optimize import check_grad

import utils
from lumbar.data.metric import term_sums
from lumbar.grade import ensemble as ensemble_module
from lumbar.grade import stacker as stacker_module
from lumbar.grade.crops import expand_view
from lumbar.grade.ensemble import VARIANTS, combine_members, default_ensemble, equal_ensemble
from lumbar.grade.stacker import apply_stacker, fit_stacker
from lumbar.grade.tables import check_predictions
from lumbar.names import LABEL_COLUMNS, MIRRORED_CONDITIONS, SEVERITY_WEIGHTS, SUBMISSION_COLUMNS


def case(studies=60, seed=0):
    """Grades, labels, and two members: one good, one that knows little."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(3, (studies, 5, 5), p=(0.6, 0.25, 0.15))
    ids = np.arange(1000, 1000 + studies)
    labels = pd.DataFrame(np.array(utils.GRADES, object)[grades.reshape(studies, 25)], columns=list(LABEL_COLUMNS))
    labels.insert(0, "study_id", ids)

    def member(sharpness):
        logits = sharpness * np.eye(3)[grades] + rng.standard_normal((studies, 5, 5, 3))
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    return grades, ids, labels, {"yolo": member(0.2), "level": member(2.0)}


def test_combination_is_the_weighted_mean_of_log_probabilities():
    grades, _, _, members = case(4)
    ensemble = default_ensemble(["yolo", "level"])
    result, count = combine_members(members, ensemble, utils.class_prior(grades))
    weight = np.array([utils.MEMBERS[m].share for m in members])
    logits = np.tensordot(weight / weight.sum(), np.log(np.stack(list(members.values()))), 1)
    np.testing.assert_allclose(result, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), atol=1e-9)
    assert (count == 2).all()


def test_an_absent_member_gives_its_weight_away_and_nothing_is_left_out():
    grades, _, _, members = case(4)
    prior = utils.class_prior(grades)
    members["yolo"][1] = np.nan
    members["level"][2, 3] = np.nan
    members["yolo"][2, 3] = np.nan
    result, count = combine_members(members, default_ensemble(["yolo", "level"]), prior)
    np.testing.assert_allclose(result[1], members["level"][1], atol=1e-9)
    np.testing.assert_allclose(result[2, 3], prior[3])
    assert count[1].max() == 1 and count[2, 3].max() == 0
    assert np.abs(result.sum(-1) - 1).max() < 1e-12


def test_calibration_applies_to_its_group_alone():
    grades, _, _, members = case(4)
    prior = utils.class_prior(grades)
    plain = default_ensemble(["yolo", "level"])
    before, _ = combine_members(members, plain, prior)
    warm = default_ensemble(["yolo", "level"])
    warm["temperature"]["foraminal"], warm["bias"]["foraminal"] = 2.0, [0.0, 0.0, 1.0]
    after, _ = combine_members(members, warm, prior)
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
        return utils.score_arrays(grades[60:], combine_members(rest, ensemble, prior)[0])["total"]

    assert all(fitted["weights"][group]["level"] > 0.6 for group in utils.GROUPS)
    assert score(fitted) < 0.95 * score(default_ensemble(["yolo", "level"]))


def test_few_rows_leave_the_defaults_nearly_alone():
    _, ids, labels, members = case(2)
    tables = {m: utils.to_submission(ids, p) for m, p in members.items()}
    fitted = utils.fit_ensemble(labels, tables, strength=1e6, members=["yolo", "level"], towards="defaults")
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
    for text, words in (("", "is no table of predictions"), ("row_id,severe\n1,1\n", "lacks the column normal_mild")):
        (tmp_path / name / "oof.csv").write_text(text)
        with pytest.raises(ValueError, match=f"{name}.oof.csv {words}"):
            utils.read_out_of_fold([tmp_path])


def test_an_unknown_view_is_refused():
    with pytest.raises(ValueError, match="unknown TTA view"):
        expand_view({"flip": True}, 2)


@pytest.fixture(scope="module")
def bed():
    """300 synthetic studies, seven members: (labels, tables, scores, submissions of nested cross-validation)."""
    labels, tables, folds = bench_ensemble.make_case(300, 5, "none", 3)
    return labels, tables, *utils.cross_validate_ensemble(labels, tables, folds)


@pytest.fixture(scope="module")
def fitted(bed):
    """The ensemble of all of the bed's studies. Not to be changed."""
    return utils.fit_ensemble(*bed[:2])


def few(tables):
    """Three of the bed's members: one that lacks rows, one that looks at all cells, one that is complete."""
    return {name: tables[name] for name in ("yolo", "level", "study")}


@pytest.mark.slow
def test_the_search_gains_on_studies_it_has_not_seen(bed):
    _, tables, scores, _ = bed
    assert list(scores.index) == [*tables, *VARIANTS]
    total = scores["total"]
    assert total["equal weights"] < total[list(tables)].min(), "the bed's members complement each other"
    assert total["fitted weights"] < total["default weights"] + 0.002, "members so alike leave the weights nothing"
    assert total["+ scaling"] < total["fitted weights"] + 0.003
    assert total["+ stacker"] < total["+ scaling"] - 0.004, "grades correlate and the members do not know it"
    assert scores["gain"]["+ stacker"] > scores["gain"]["+ scaling"] + 0.004 and scores["gain_se"]["+ stacker"] > 0


@pytest.mark.slow
def test_scaling_mends_members_that_are_too_sure():
    labels, tables, folds = bench_ensemble.make_case(200, 3, folds=3)
    sharp = {}
    for name, table in few(tables).items():
        p = table[list(utils.SEVERITIES)] ** 2.5
        sharp[name] = table.assign(**p.div(p.sum(axis=1), axis=0))
    total = utils.cross_validate_ensemble(labels, sharp, folds)[0]["total"]
    assert total["+ scaling"] < total["fitted weights"] - 0.05


@pytest.mark.slow
def test_a_dozen_studies_change_next_to_nothing():
    scores = [bench_ensemble.run(12, seed, folds=3)["gain"] for seed in range(6)]
    for name in ("fitted weights", "+ scaling", "+ stacker"):
        gains = [score[name] for score in scores]
        assert np.mean(gains) > -0.004 and min(gains) > -0.02, name


@pytest.mark.slow
def test_where_nothing_is_to_be_found_nothing_is_lost():
    labels, tables, folds = bench_ensemble.make_case(200, 2, "null", 3)
    total = utils.cross_validate_ensemble(labels, few(tables), folds)[0]["total"]
    assert total["+ stacker"] < total["+ scaling"] + 0.002


def test_the_floor_is_the_priors_share_and_an_older_ensemble_has_none():
    grades, _, _, members = case(4)
    prior = utils.class_prior(grades)
    plain = default_ensemble(["yolo", "level"])
    floored = plain | {"floor": {"spinal": 0.0, "foraminal": 0.1, "subarticular": 0.0}}
    before, after = (combine_members(members, e, prior)[0] for e in (plain, floored))
    np.testing.assert_allclose(after[:, 1:3], 0.9 * before[:, 1:3] + 0.1 * prior[1:3])
    np.testing.assert_array_equal(after[:, [0, 3, 4]], before[:, [0, 3, 4]])
    old = {key: value for key, value in plain.items() if key != "floor"}
    np.testing.assert_array_equal(combine_members(members, old, prior)[0], before)


def test_slips_of_the_readers_find_their_floor():
    rng = np.random.default_rng(3)
    true, ids, _, members = case(300, 3)
    slip = rng.random(true.shape) < 0.15
    grades = np.where(slip, rng.choice(3, true.shape, p=(0.6, 0.25, 0.15)), true)
    sure = np.exp(8 * np.eye(3)[true] + rng.standard_normal((*true.shape, 3)))
    sure = {"level": sure / sure.sum(-1, keepdims=True)}
    fitted = ensemble_module._fit_arrays(
        grades[:150], {"level": sure["level"][:150]}, 80.0, ["level"], "equal", stacker=False
    )
    assert 0.02 < min(fitted["floor"].values()) and max(fitted["floor"].values()) < 0.15
    clean = ensemble_module._fit_arrays(
        true[:150], {"level": sure["level"][:150]}, 80.0, ["level"], "equal", stacker=False
    )
    assert max(clean["floor"].values()) < 0.005
    prior, rest = utils.class_prior(grades[:150]), {"level": sure["level"][150:]}
    scores = [
        utils.score_arrays(grades[150:], combine_members(rest, e, prior)[0])["total"]
        for e in (fitted, fitted | {"floor": {}}, equal_ensemble(["level"]))
    ]
    assert scores[0] < 0.8 * min(scores[1:])


@pytest.mark.slow
def test_what_other_cells_say_shifts_along_the_scale(fitted):
    stacker = fitted["stacker"]
    for group, names in stacker["features"].items():
        if group not in stacker["coefficients"]:
            continue
        of_others = [not name.startswith(stacker_module.OWN_FEATURES) for name in names]
        moderate, severe = np.array(stacker["coefficients"][group])[of_others].T
        assert np.abs(2 * moderate - severe).sum() < 0.4 * np.abs(moderate + 2 * severe).sum()


def test_on_few_studies_scaling_has_to_gain():
    rng = np.random.default_rng(4)
    p = rng.dirichlet([3, 1.5, 1], (60, 5, 5))
    true = p / np.array(SEVERITY_WEIGHTS)  # for these frequencies p is the metric's optimum
    true /= true.sum(-1, keepdims=True)
    grades = (rng.random((60, 5, 5, 1)) > true.cumsum(-1)[..., :2]).sum(-1)
    options = (80.0, ["level"], "equal")
    fair = ensemble_module._fit_arrays(grades, {"level": p}, *options, stacker=False)
    assert set(fair["temperature"].values()) == {1.0} and not np.any(list(fair["bias"].values()))
    forced = ensemble_module._fit_arrays(grades, {"level": p}, *options, stacker=False, judged=False)
    assert 1.0 not in forced["temperature"].values()
    sure = p**3 / (p**3).sum(-1, keepdims=True)
    mended = ensemble_module._fit_arrays(grades, {"level": sure}, *options, stacker=False)
    assert min(mended["temperature"].values()) > 1.2


def test_the_stacker_asks_for_enough_studies():
    rng = np.random.default_rng(0)
    grades = np.tile(rng.choice(3, (stacker_module.STACKER_STUDIES, 1, 1)), (1, 5, 5))  # every neighbour knows all
    logits = np.eye(3)[grades] + rng.standard_normal((*grades.shape, 3))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert set(fit_stacker(grades, p)["coefficients"]) == set(utils.GROUPS)
    assert not fit_stacker(grades[1:], p[1:])["coefficients"]


@pytest.mark.slow
def test_nested_predictions_are_a_submission_and_give_the_table(bed):
    labels, tables, scores, submissions = bed
    for name in ("yolo", "+ stacker"):
        table = submissions[name]
        assert list(table.columns) == list(SUBMISSION_COLUMNS) and len(table) == 300 * 25
        assert utils.competition_score(labels, table)["total"] == pytest.approx(scores["total"][name], abs=1e-9)
    assert scores["rows"]["yolo"] < scores["rows"]["study"] == labels[list(LABEL_COLUMNS)].notna().sum().sum()


@pytest.mark.slow
def test_nested_predictions_have_not_seen_their_fold():
    labels, tables, folds = bench_ensemble.make_case(80, 7, "none", 2)
    tables = few(tables)
    before = utils.cross_validate_ensemble(labels, tables, folds)[1]
    first = folds["study_id"][folds["fold"] == 0]
    changed = labels.copy()
    changed.loc[changed["study_id"].isin(first), list(LABEL_COLUMNS)] = "Severe"
    after = utils.cross_validate_ensemble(changed, tables, folds)[1]
    own = before["yolo"]["row_id"].str.split("_").str[0].astype(int).isin(first)
    for name in ("+ stacker", "yolo"):  # the latter lacks rows, where the other fold's prior stands
        pd.testing.assert_frame_equal(before[name][own], after[name][own])
        assert np.abs(before[name][~own].severe - after[name][~own].severe).max() > 0.05


@pytest.mark.slow
def test_rows_and_studies_may_be_missing():
    labels, tables, folds = bench_ensemble.make_case(60, 8, folds=3)
    ids = labels["study_id"].to_numpy()
    gone = {m: t[~t["row_id"].str.startswith(f"{ids[0]}_")] for m, t in few(tables).items()}
    lost = f"{ids[1]}_{LABEL_COLUMNS[0]}"
    gone = {m: t[t["row_id"] != lost] for m, t in gone.items()}
    scores, submissions = utils.cross_validate_ensemble(labels, gone, folds)
    rows = submissions["+ stacker"]["row_id"]
    assert len(rows) == 59 * 25 - 1 and lost not in set(rows)
    assert np.isfinite(scores.to_numpy(np.float64)).all()


@pytest.mark.slow
def test_the_order_of_rows_does_not_matter():
    labels, tables, _ = bench_ensemble.make_case(60, 9)
    tables = few(tables)
    mixed = {m: t.sample(frac=1, random_state=1) for m, t in tables.items()}
    one = utils.fit_ensemble(labels, tables)
    assert one == utils.fit_ensemble(labels.sample(frac=1, random_state=2), mixed) == utils.fit_ensemble(labels, tables)


def test_slopes_are_those_of_the_loss():
    rng = np.random.default_rng(0)
    for group, conditions in utils.GROUPS.items():
        target = stacker_module._Target(rng.choice(4, (6, len(conditions), 5)) - 1, group == "spinal")
        shape = (6, len(conditions), 5, 3)
        error = check_grad(
            lambda v: target.loss(v.reshape(shape))[0],
            lambda v: target.loss(v.reshape(shape))[1].ravel(),
            rng.standard_normal(np.prod(shape)),
        )
        assert error < 1e-6


def test_the_loss_is_the_competitions():
    rng = np.random.default_rng(1)
    grades, logits = rng.choice(4, (20, 5, 5)) - 1, rng.standard_normal((20, 5, 5, 3))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    score = utils.score_arrays(grades, p)
    for group, conditions in utils.GROUPS.items():
        part = list(conditions)
        value = stacker_module._Target(grades[:, part], group == "spinal").loss(logits[:, part])[0]
        assert value == pytest.approx(score[group] + (score["any_severe"] if group == "spinal" else 0))
    loss, weight = term_sums(grades, p)
    assert list(loss.sum(0) / weight.sum(0)) == pytest.approx([score[t] for t in (*utils.GROUPS, "any_severe")])


@pytest.mark.slow
def test_the_stacker_is_the_same_in_the_mirror_and_in_json(bed, fitted):
    ensemble = fitted
    assert set(ensemble["stacker"]["coefficients"]) >= {"foraminal", "subarticular"}
    _, p = utils.from_submission(bed[1]["study"])
    turned = list(MIRRORED_CONDITIONS)
    corrected = apply_stacker(ensemble["stacker"], p)
    np.testing.assert_allclose(apply_stacker(ensemble["stacker"], p[:, turned])[:, turned], corrected)
    assert np.abs(corrected - p).max() > 0.05 and np.abs(corrected.sum(-1) - 1).max() < 1e-12
    read = json.loads(json.dumps(ensemble))
    np.testing.assert_array_equal(
        combine_members({"study": p}, read, np.full((5, 5, 3), 1 / 3))[0],
        combine_members({"study": p}, ensemble, np.full((5, 5, 3), 1 / 3))[0],
    )
    read["stacker"]["features"]["foraminal"][0] = "something else"
    with pytest.raises(ValueError, match="fit the ensemble again"):
        apply_stacker(read["stacker"], p)


@pytest.mark.slow
def test_rows_without_a_member_keep_the_prior_under_a_stacker(bed, fitted):
    _, p = utils.from_submission(bed[1]["study"])
    prior = np.full((5, 5, 3), 1 / 3)
    p[0, 2, 1] = np.nan
    np.testing.assert_allclose(combine_members({"study": p}, fitted, prior)[0][0, 2, 1], 1 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="severe"), "level: no column severe"),
        (lambda t: pd.concat([t, t.iloc[[3]]]), "level: row_id .* appears twice"),
        (lambda t: t.assign(row_id=["7_left_knee_l1_l2", *t["row_id"][1:]]), "7_left_knee_l1_l2"),
        (lambda t: t.assign(severe=[np.nan, *t["severe"][1:]]), "level: row 1000_.* is not three finite numbers"),
        (lambda t: t.assign(severe=["high", *t["severe"][1:]]), "level: row 1000_.* is not three finite numbers"),
        (lambda t: t.assign(severe=[-0.5, *t["severe"][1:]]), "level: row 1000_.* is negative"),
        (lambda t: t.assign(severe=[*t["severe"][:-1], 1.5]), "level: row 1003_.* does not sum to 1"),
    ],
)
def test_a_bad_table_is_refused_with_its_row(change, message):
    _, ids, labels, members = case(4)
    tables = {m: utils.to_submission(ids, p) for m, p in members.items()}
    tables["level"] = change(tables["level"])
    with pytest.raises(ValueError, match=message):
        utils.fit_ensemble(labels, tables)


def test_bad_folds_and_labels_are_refused():
    _, ids, labels, members = case(4)
    tables = {m: utils.to_submission(ids, p) for m, p in members.items()}
    folds = pd.DataFrame({"study_id": ids, "fold": [0, 1, 0, 1]})
    for bad, message in (
        (folds.drop(columns="fold"), "no column fold"),
        (folds[1:], "study 1000 has no fold"),
        (pd.concat([folds, folds[1:2].assign(fold=0)]), "study 1001 has two folds"),
        (folds.assign(fold=0), "two folds or more"),
    ):
        with pytest.raises(ValueError, match=message):
            utils.cross_validate_ensemble(labels, tables, bad)
    with pytest.raises(ValueError, match="study_id"):
        utils.fit_ensemble(labels.drop(columns="study_id"), tables)
    with pytest.raises(ValueError, match="no member"):
        utils.cross_validate_ensemble(labels, {}, folds)
    with pytest.raises(ValueError, match="towards"):
        utils.fit_ensemble(labels, tables, towards="best")


def test_folds_and_ids_of_any_type_are_the_same_folds():
    _, ids, labels, members = case(12)
    tables = {m: utils.to_submission(ids, p) for m, p in members.items()}
    folds = pd.DataFrame({"study_id": ids, "fold": np.arange(12) % 2})
    expected, _ = utils.cross_validate_ensemble(labels, tables, folds)
    mixed = folds.astype({"fold": object, "study_id": str})
    mixed.loc[::3, "fold"] = mixed.loc[::3, "fold"].astype(str)
    for other in (mixed, folds.astype({"fold": float}), pd.concat([folds, folds])):  # the last: a row for each label
        found, _ = utils.cross_validate_ensemble(labels, tables, other)
        pd.testing.assert_frame_equal(found, expected)


def test_names_spelt_in_two_ways_are_an_error():
    _, ids, labels, members = case(10)
    tables = {m: utils.to_submission(ids, p) for m, p in members.items()}
    prior, ensemble = np.full((5, 5, 3), 1 / 3), utils.fit_ensemble(labels, tables)
    with pytest.raises(ValueError, match="no weight for 'Level', but for level, yolo"):
        utils.combine_tables({"yolo": tables["yolo"], "Level": tables["level"]}, ensemble, prior)


@pytest.mark.parametrize("table", ["of other studies", "empty"])
def test_a_table_of_none_of_the_labelled_studies_is_an_error(table):
    _, ids, labels, members = case(10)
    tables = {m: utils.to_submission(ids, p) for m, p in members.items()}
    folds = pd.DataFrame({"study_id": ids, "fold": np.arange(10) % 2})
    other = utils.to_submission(ids + 5000, members["level"]) if table == "of other studies" else tables["level"][:0]
    tables["level"] = other
    for search in (
        lambda: utils.fit_ensemble(labels, tables),
        lambda: utils.cross_validate_ensemble(labels, tables, folds),
    ):
        with pytest.raises(ValueError, match="level: its table predicts none of the 10 labelled studies"):
            search()


def test_a_member_alone_scores_what_it_would_if_it_were_submitted():
    grades, ids, labels, members = case(16)
    members["level"] = np.eye(3)[members["level"].argmax(-1)]  # sure of everything, and sometimes wrong
    tables = {m: utils.to_submission(ids, p) for m, p in members.items()}
    folds = pd.DataFrame({"study_id": ids, "fold": np.arange(16) % 2})
    scores, _ = utils.cross_validate_ensemble(labels, tables, folds)
    for member, table in tables.items():
        assert scores.loc[member, "total"] == pytest.approx(utils.competition_score(labels, table)["total"], rel=1e-6)


def test_rounded_tables_and_empty_rows_are_fine():
    _, ids, _, members = case(10)
    table = utils.to_submission(ids, members["level"]).round(3)
    assert (table[list(utils.SEVERITIES)].sum(axis=1) < 1 - 9e-4).any()
    severities = list(utils.SEVERITIES)
    table.loc[[3, 70], severities] = np.nan
    _, p = check_predictions(table)
    assert np.isnan(p).all(-1).sum() == 2 and np.isnan(p).any(-1).sum() == 2
    table.loc[5, severities[0]] = np.nan
    with pytest.raises(ValueError, match="three finite numbers"):
        check_predictions(table)


def test_combined_tables_have_every_row():
    _, ids, _, members = case(6)
    tables = {m: utils.to_submission(ids, p) for m, p in members.items()}
    first = tables["yolo"]["row_id"].str.startswith(f"{ids[0]}_")
    tables["yolo"] = tables["yolo"][~first].sample(frac=1, random_state=0)
    prior = np.random.default_rng(0).dirichlet((5, 2, 2), (5, 5))
    ensemble = default_ensemble(["yolo", "level"])
    combined = utils.combine_tables(tables, ensemble, prior)
    assert len(combined) == 6 * 25
    found, p = utils.from_submission(combined)
    np.testing.assert_allclose(p[list(found).index(ids[0])], members["level"][0], atol=1e-9)
    more = utils.combine_tables(tables, ensemble, prior, [*ids, 7])
    found, p = utils.from_submission(more)
    assert len(more) == 7 * 25
    np.testing.assert_allclose(p[list(found).index(7)], prior, atol=1e-9)


def test_out_of_fold_tables_of_other_studies_leave_the_defaults(tmp_path, monkeypatch, capsys):
    _, ids, labels, members = case(10)
    labels.to_csv(tmp_path / "train.csv", index=False)
    tables = {m: utils.to_submission(ids + 5000, p) for m, p in members.items()}
    monkeypatch.setattr(ensemble_module, "read_out_of_fold", lambda *_, **__: dict(tables))
    monkeypatch.setattr(ensemble_module, "member_weights", lambda folders: ({"yolo_scs_0": None, "level_0": None}, []))
    assert utils.ensemble_for([tmp_path], tmp_path)["found"] == "defaults"
    assert "yolo, level are of other studies" in capsys.readouterr().out
    tables["level"] = utils.to_submission(ids, members["level"])
    found = utils.ensemble_for([tmp_path], tmp_path)
    assert found["found"] != "defaults" and 0 < found["weights"]["spinal"]["yolo"] < 1


@pytest.mark.slow
def test_a_kept_ensemble_json_brings_its_stacker(fitted, tmp_path):
    utils.write_json(tmp_path / "ensemble.json", fitted)
    assert utils.ensemble_for([tmp_path], tmp_path)["stacker"] == fitted["stacker"]
    (tmp_path / "ensemble.json").write_text("{")
    with pytest.raises(utils.DamagedFile, match="ensemble.json is no JSON: delete it"):
        utils.ensemble_for([tmp_path], tmp_path)


def stacked_ensemble():
    """An ensemble of two members with a stacker, without the long search for one."""
    _, _, labels, members = case(20)
    grades = utils.labels_to_array(labels)[1]
    stacker = fit_stacker(grades, members["level"])
    stacker["coefficients"] = {"spinal": np.full((len(stacker["features"]["spinal"]), 2), 0.1).tolist()}
    return json.loads(json.dumps(default_ensemble(["yolo", "level"]) | {"stacker": stacker}))


def at(*keys, value):
    """A change of one value of an ensemble, at these keys."""

    def change(ensemble):
        for key in keys[:-1]:
            ensemble = ensemble[key]
        ensemble[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda e: e.clear(), "weights None"),
        (lambda e: e.pop("bias"), "bias None"),
        (lambda e: e["weights"].pop("foraminal"), "foraminal weights None"),
        (at("weights", "knee", value={"level": 1.0}), "knee"),
        (at("weights", value=[0.5, 0.5]), "weights"),
        *((at("weights", "spinal", value=v), "spinal weights") for v in ([1.0], {}, {"level": 0}, {"level": 1e-9})),
        *(
            (at("weights", "subarticular", "yolo", value=v), "subarticular weight of yolo")
            for v in (float("nan"), float("inf"), -0.1, 1e308, "0.5", None, True, [1], 10**400)
        ),
        *(
            (at("temperature", "foraminal", value=v), "foraminal temperature")
            for v in (-1, 0, 1e-9, 1e9, float("nan"), "1", None, True)
        ),
        *(
            (at("bias", "spinal", value=v), "spinal bias")
            for v in ([0, 0, 1e9], [0, float("nan"), 0], [0, 0], 0.0, "000", [0, 0, "1"], None, [[0, 0, 0]])
        ),
        *((at("floor", "spinal", value=v), "spinal floor") for v in (-0.1, 1.1, float("nan"), "0")),
        (at("floor", value=0.1), "floor"),
        (at("stacker", value=[1]), "stacker"),
        (at("stacker", "coefficients", value=None), "coefficients"),
        (at("stacker", "coefficients", "spinal", value=[[0.1, 0.1]]), "spinal"),
        (at("stacker", "coefficients", "spinal", 0, value=[0.1, 1e9]), "spinal"),
        (at("stacker", "centre", "foraminal", value=[0, 0]), "foraminal"),
        (at("stacker", "spread", "subarticular", value=[0, 0]), "subarticular"),
        (at("stacker", "features", "spinal", 0, value="something else"), "spinal .* this version"),
    ],
)
def test_an_ensemble_json_that_cannot_be_meant_is_refused(tmp_path, change, what):
    ensemble, path = stacked_ensemble(), tmp_path / "ensemble.json"
    utils.write_json(path, ensemble)
    assert utils.ensemble_for([tmp_path], tmp_path) == ensemble
    change(ensemble)
    utils.write_json(path, ensemble)
    with pytest.raises(utils.DamagedFile, match=f"ensemble.json states {what}.*: delete it, or take that of"):
        utils.ensemble_for([tmp_path], tmp_path)


def test_an_ensemble_json_of_an_earlier_version_or_without_a_fit_is_taken(tmp_path):
    for ensemble in (
        default_ensemble(["level"]),
        {key: value for key, value in default_ensemble(["level"]).items() if key not in ("floor", "found")},
        default_ensemble(["level"]) | {"stacker": {}},
        default_ensemble() | {"weights": {group: {"level": 2, "study": 0} for group in utils.GROUPS}},
    ):
        utils.write_json(tmp_path / "ensemble.json", ensemble)
        assert utils.ensemble_for([tmp_path], tmp_path) == ensemble


@pytest.mark.parametrize("studies", [12, 60])
def test_a_member_that_is_far_behind_does_not_hold_the_best_up(studies):
    """On few studies the start weighs much: fixed shares would give a poor member a third of the weight."""
    rng = np.random.default_rng(studies)
    grades = rng.choice(3, (studies + 200, 5, 5), p=(0.7, 0.2, 0.1))

    def member(sharpness):
        logits = rng.normal(0, 1, (*grades.shape, 3)) + sharpness * np.eye(3)[grades]
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    good, poor = member(2.0), member(0.3)
    scores = {}
    for towards in ("scores", "defaults"):
        seen = {"level": good[:studies], "yolo": poor[:studies]}
        found = ensemble_module._fit_arrays(grades[:studies], seen, 1.0, ["yolo", "level"], towards, stacker=False)
        rest = {"level": good[studies:], "yolo": poor[studies:]}
        prior = utils.class_prior(grades[:studies])
        scores[towards] = utils.score_arrays(grades[studies:], combine_members(rest, found, prior)[0])["total"]
        if towards == "scores":
            assert all(weights["level"] > 0.8 for weights in found["weights"].values())
    alone = utils.score_arrays(grades[studies:], good[studies:])["total"]
    assert scores["scores"] < scores["defaults"] + 0.005 and scores["scores"] < alone + 0.02


def test_shares_by_score_are_the_defaults_where_nothing_tells_members_apart():
    rng = np.random.default_rng(0)
    grades = rng.choice(3, (10, 5, 5))
    p = rng.dirichlet((1, 1, 1), grades.shape)
    same = ensemble_module._shares_by_score(grades, {"yolo": p, "level": p}, ["yolo", "level"])
    nothing = ensemble_module._shares_by_score(np.full_like(grades, -1), {"yolo": p, "level": p}, ["yolo", "level"])
    for shares in (*same.values(), *nothing.values()):
        assert shares["yolo"] / shares["level"] == pytest.approx(0.65 / 0.25)
    apart = {"yolo": np.where(np.arange(10)[:, None, None, None] < 5, p, np.nan), "level": p}
    apart["level"] = np.where(np.arange(10)[:, None, None, None] < 5, np.nan, p)  # no row in common
    for shares in ensemble_module._shares_by_score(grades, apart, ["yolo", "level"]).values():
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
