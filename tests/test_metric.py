"""The metric, submissions, labels and folds."""

import math

import numpy as np
import pandas as pd
import pytest

import utils
from lumbar.data.metric import row_losses
from lumbar.names import LABEL_COLUMNS


def random_case(seed=0, studies=7, missing=0.1):
    """Labels with gaps and a submission, as DataFrames, and the same as plain Python for the hand computation."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(10**9, studies, replace=False)
    grades = rng.choice(3, (studies, 25), p=(0.6, 0.25, 0.15))
    table = pd.DataFrame(np.array(utils.GRADES, object)[grades], columns=list(LABEL_COLUMNS))
    table = table.mask(rng.random(table.shape) < missing)
    table.insert(0, "study_id", ids)
    probabilities = rng.dirichlet((1, 1, 1), (studies, 5, 5))
    return table, utils.to_submission(ids, probabilities)


def score_by_hand(labels, submission):
    """The competition's rule, row by row with math.log and nothing of ours but the names."""
    weight_of = {"Normal/Mild": 1, "Moderate": 2, "Severe": 4}
    column_of = dict(zip(weight_of, ("normal_mild", "moderate", "severe"), strict=True))
    predicted = {row.row_id: row for row in submission.itertuples()}
    sums = {name: [0.0, 0.0] for name in ("spinal", "foraminal", "subarticular", "any_severe")}
    for row in labels.to_dict("records"):
        any_true, any_p, any_w = False, 0.0, 0
        for column in LABEL_COLUMNS:
            grade = row[column]
            if not isinstance(grade, str):
                continue
            p = predicted[f"{row['study_id']}_{column}"]
            total = p.normal_mild + p.moderate + p.severe
            term = next(name for name in sums if name in column)
            w = weight_of[grade]
            sums[term][0] += w * -math.log(getattr(p, column_of[grade]) / total)
            sums[term][1] += w
            if term == "spinal":
                any_true |= grade == "Severe"
                any_p, any_w = max(any_p, p.severe / total), max(any_w, w)
        if any_w:
            sums["any_severe"][0] += any_w * -math.log(any_p if any_true else 1 - any_p)
            sums["any_severe"][1] += any_w
    scores = {name: total / weight for name, (total, weight) in sums.items()}
    return scores | {"total": sum(scores.values()) / 4}


@pytest.mark.parametrize("seed", range(5))
def test_score_equals_a_computation_by_hand(seed):
    labels, submission = random_case(seed)
    expected = score_by_hand(labels, submission)
    shuffled = submission.sample(frac=1, random_state=seed)
    assert utils.competition_score(labels, shuffled) == pytest.approx(expected, abs=1e-9)


def test_rows_are_normalised_before_scoring():
    labels, submission = random_case()
    tripled = submission.assign(**{name: submission[name] * 3 for name in utils.SEVERITIES})
    assert utils.competition_score(labels, tripled) == pytest.approx(
        utils.competition_score(labels, submission), abs=1e-12
    )


def test_uniform_scores_log_three():
    labels, submission = random_case()
    uniform = submission.assign(**dict.fromkeys(utils.SEVERITIES, 1 / 3))
    scores = utils.competition_score(labels, uniform)
    assert [scores[name] for name in utils.GROUPS] == pytest.approx([math.log(3)] * 3)


def test_one_class_of_any_severe_and_certain_predictions_are_finite():
    labels, submission = random_case(studies=2, missing=0)
    labels[list(LABEL_COLUMNS)] = "Normal/Mild"
    certain = submission.assign(normal_mild=1.0, moderate=0.0, severe=0.0)
    assert utils.competition_score(labels, certain)["total"] == pytest.approx(0, abs=1e-9)
    wrong = submission.assign(normal_mild=0.0, moderate=0.0, severe=1.0)
    assert utils.competition_score(labels, wrong)["total"] == pytest.approx(-math.log(np.finfo(float).eps))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.drop(s.index[3]), "no prediction"),
        (lambda s: s.assign(severe=np.nan), "finite"),
        (lambda s: s.assign(severe=-0.1), "finite values >= 0"),
        (lambda s: pd.concat([s, s.iloc[:1]]), "twice"),
        (lambda s: s.assign(row_id="12_left_knee_l1_l2"), "names no study"),
    ],
)
def test_a_bad_submission_is_refused(change, message):
    labels, submission = random_case(missing=0)
    with pytest.raises(ValueError, match=message):
        utils.competition_score(labels, change(submission))


def test_unknown_grade_is_refused():
    labels, submission = random_case()
    labels.loc[2, LABEL_COLUMNS[4]] = "Sever"
    with pytest.raises(ValueError, match="Sever"):
        utils.competition_score(labels, submission)


def test_submission_round_trip():
    _, submission = random_case()
    ids, probabilities = utils.from_submission(submission.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(utils.to_submission(ids, probabilities), submission)
    assert submission["row_id"].is_monotonic_increasing
    assert submission[list(utils.SEVERITIES)].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-15)


def test_rows_weigh_by_their_grade_and_a_missing_prediction_is_not_a_good_one():
    p = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [1, 0, 0], [np.nan] * 3, [np.nan] * 3])
    weight, loss = row_losses(np.array([0, 1, 2, 2, -1, 1]), p)
    assert weight.tolist() == [1, 2, 4, 4, 0, 2]
    np.testing.assert_allclose(loss, [-np.log(0.5), -np.log(0.3), -np.log(0.2), 52 * np.log(2), 0, np.nan], rtol=1e-12)


def test_weighted_prior_is_the_best_constant():
    labels, _ = random_case(studies=60)
    _, grades = utils.labels_to_array(labels)

    def score(prior):
        return utils.score_arrays(grades, np.broadcast_to(prior, (len(grades), *prior.shape)))["foraminal"]

    best = score(utils.class_prior(grades, smoothing=1e-9))
    assert best < score(utils.class_prior(grades, weighted=False))
    rng = np.random.default_rng(0)
    for _ in range(5):
        moved = utils.class_prior(grades) * np.exp(0.1 * rng.standard_normal((5, 5, 3)))
        assert best < score(moved)


def test_folds_keep_studies_whole_and_severity_even():
    labels, _ = random_case(studies=100, missing=0)
    folds = utils.make_folds(labels, 5, seed=3)
    assert folds["study_id"].is_unique and (folds["fold"].value_counts() == 20).all()
    _, grades = utils.labels_to_array(labels)
    severe = [(grades[(folds["fold"] == f).to_numpy(), 0] == 2).any(1).mean() for f in range(5)]
    assert max(severe) - min(severe) <= 0.1
    assert utils.make_folds(labels, 5, seed=3).equals(folds)
    assert not utils.make_folds(labels, 5, seed=4).equals(folds)
