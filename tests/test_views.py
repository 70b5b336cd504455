"""Which test-time views pay is measured, and only those are kept."""

import json

import numpy as np
import pytest

import utils
from lumbar.grade.crops import expand_view
from lumbar.grade.tta import TTA_VIEWS, choose_views, cross_fitted_views, deal_parts

VIEWS = [{}, {"mirror": True}, {"scale": 1.06}, {"shift_mm": [2.0, 0.0, 0.0]}]


def studies(n=120, seed=0):
    """Grades (n, 5, 5) with a few missing, and the logits (n, 5, 5, 3) of a fair member."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(3, (n, 5, 5), p=(0.7, 0.2, 0.1))
    logits = 1.5 * np.eye(3)[grades] + np.log((0.7, 0.2, 0.1))
    grades[rng.random(grades.shape) < 0.05] = -1
    return grades, logits


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def noisy(logits, seed, spread=1.0):
    return log_softmax(logits + spread * np.random.default_rng(seed).standard_normal(logits.shape))


def test_views_that_average_noise_out_are_kept():
    grades, logits = studies()
    log_p = np.stack([noisy(logits, v) for v in range(4)])
    kept, table = choose_views(grades, log_p, VIEWS)
    assert kept[0] == {} and len(kept) >= 3 and table["kept"].sum() == len(kept)
    assert len(choose_views(grades, log_p, VIEWS, errors=0.5)[0]) == 4
    assert (table["gain"][1:] > 2 * table["gain_se"][1:]).all()
    # What is shown is the metric: the plain view alone, and what the first pair gains on it.
    plain = utils.score_arrays(grades, np.exp(log_p[0]))["total"]
    pair = utils.score_arrays(grades, np.exp(log_p[:2].mean(0)))["total"]
    assert table["alone"][0] == pytest.approx(plain, abs=1e-6)
    assert table["gain"][1] == pytest.approx(plain - pair, abs=1e-6)


def test_views_that_do_not_pay_are_off():
    grades, logits = studies()
    good, bad = noisy(logits, 0, 0.1), noisy(-logits, 1)
    kept, table = choose_views(grades, np.stack([good, bad, good, bad]), VIEWS)
    assert kept == [{}]  # neither what is worse nor a mere copy of the plain view
    assert table["kept"].tolist() == [True, False, False, False]
    assert table["gain"][1] < 0 and abs(table["gain"][2]) < 1e-9


def test_one_good_view_among_bad_ones_is_found_whatever_its_place():
    grades, logits = studies()
    log_p = np.stack([noisy(logits, 0), noisy(-logits, 1), noisy(-logits, 2), noisy(logits, 3)])
    kept, table = choose_views(grades, log_p, VIEWS)
    assert kept == [{}, VIEWS[3]] and table["view"].map(json.loads).tolist() == VIEWS
    again = choose_views(grades, log_p, VIEWS)
    assert again[0] == kept and again[1].equals(table)
    assert choose_views(grades, log_p, VIEWS, errors=1e3)[0] == [{}]


def test_cells_and_terms_without_a_prediction_do_not_count():
    grades, logits = studies()
    log_p = np.stack([noisy(logits, v) for v in range(4)])
    log_p[:, :, 1:3] = np.nan  # a detector of two groups: the foraminal term is left out
    table = choose_views(grades, log_p, VIEWS)[1]
    own = np.where(np.isfinite(log_p[0]).all(-1), grades, -1)
    terms = utils.score_arrays(own, np.exp(np.nan_to_num(log_p[0])))
    assert table["alone"][0] == pytest.approx(np.mean([terms[t] for t in ("spinal", "subarticular", "any_severe")]))
    masked = choose_views(own, np.nan_to_num(log_p), VIEWS)[1]
    np.testing.assert_allclose(masked[["alone", "gain", "gain_se"]], table[["alone", "gain", "gain_se"]])
    # A view that lacks some cells only leaves them to the others.
    log_p[1, :60] = np.nan
    gain = choose_views(grades, log_p, VIEWS)[1]["gain"]
    assert 0 < gain[1] < table["gain"][1]
    # Nothing to measure: the plain view alone.
    for nothing in (np.full_like(grades, -1), grades):
        kept, table = choose_views(nothing, np.full_like(log_p, np.nan), VIEWS)
        assert kept == [{}] and table["alone"].isna().all()


def test_a_study_chooses_no_view_for_itself():
    grades, logits = studies(100)
    part = deal_parts(np.ones(100, bool))
    assert np.bincount(part).tolist() == [20] * 5
    # The second view pays, by what it does to the first part alone; the other parts' studies lose by it.
    first, views = part == 0, VIEWS[:2]
    log_p = np.stack([noisy(logits, 0, 0.1), noisy(0.2 * logits, 1, 0.1)])
    log_p[:, first] = noisy(-2 * logits[first], 2), noisy(logits[first], 3)
    used = cross_fitted_views(grades, log_p, views, part)
    assert choose_views(grades, log_p, views)[0] == views
    assert used[:, 0].all() and not used[first, 1].any() and used[~first, 1].all()
    # A part's own labels have no say in it, whatever they are.
    for own in range(5):
        changed = np.where((part == own)[:, None, None], (grades + 1) % 3, grades)
        assert (cross_fitted_views(changed, log_p, views, part)[part == own] == used[part == own]).all()
    # Studies of no part choose nothing, and are seen plainly.
    fewer = np.where(np.arange(100) < 50, part, -1)
    used = cross_fitted_views(grades, log_p, views, fewer)
    assert (used[:50] == cross_fitted_views(grades[:50], log_p[:, :50], views, part[:50])).all()
    assert (used[50:] == [True, False]).all()


def test_parts_are_dealt_among_those_that_are_there():
    assert deal_parts(np.array([True, False, True, True]), 2).tolist() == [1, -1, 0, 1]


def test_certain_views_stay_finite():
    grades, logits = studies()
    log_p = np.stack([noisy(logits, v) for v in range(4)])
    # One is certain, and right but for one cell: it helps; where it errs it costs what the clip says.
    with np.errstate(divide="ignore"):
        log_p[2] = np.log(np.eye(3)[np.clip(grades, 0, 2)])
        log_p[2, 0, 0, 0] = np.log(np.eye(3)[(grades[0, 0, 0] + 1) % 3])
    kept, table = choose_views(grades, log_p, VIEWS)
    assert np.isfinite(table[["alone", "gain", "gain_se"]].to_numpy()).all()
    assert kept[1] == VIEWS[2] and 0 < table["alone"][2] < table["alone"][0]


def test_shapes_are_checked():
    grades, logits = studies(4)
    with pytest.raises(ValueError, match="do not fit"):
        choose_views(grades, log_softmax(logits)[None], VIEWS)


def test_candidates_are_plain_json_and_start_plain():
    assert TTA_VIEWS[0] == {} and {"mirror": True} in TTA_VIEWS
    for view in TTA_VIEWS:
        assert json.loads(json.dumps(view)) == view
        expand_view(view, 2)
