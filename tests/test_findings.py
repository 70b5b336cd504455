"""The report's sentences say what its tables and figures show."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from small_study import make_boxes

import utils
from lumbar.data.geometry import boxes_to_table
from lumbar.look import findings
from lumbar.look.report import second_shares


def scores(**totals):
    """A score_table with these totals; spaces are written as _."""
    totals = {name.replace("_", " "): total for name, total in totals.items()}
    table = pd.DataFrame({"total": totals})
    return table.assign(low=table["total"] - 0.1, high=table["total"] + 0.1)


def test_the_ensemble_beside_prior_and_best_member():
    table = scores(Uniform=1.1, Class_prior=1.0, Yolo=0.5, Partly=np.nan, Level=0.7, Ensemble=0.4, Perfect_reader=0.2)
    assert findings.best_member(table, "Ensemble") == ("Yolo", 0.5)
    score, rank = findings.score_findings({"Test": table}, "Ensemble")
    assert "Test: 0.400, 60% below the class prior (1.000)" in score.text and not score.alarm
    assert "Test: 0.100 ahead of Yolo (0.500)" in rank.text and not rank.alarm
    row = findings.headline_table({"Test": table}, "Ensemble").loc["Test"]
    assert row["95% interval"] == "0.300 to 0.500" and (row["Best member"], row["its score"]) == ("Yolo", 0.5)
    assert findings.scores_text(table).startswith("Ensemble 0.400, Yolo 0.500, Level 0.700; perfect reader 0.200")


def test_what_is_worse_asks_for_attention():
    good, bad = scores(Class_prior=1.0, Yolo=0.5, Ensemble=0.4), scores(Class_prior=1.0, Yolo=0.5, Ensemble=1.2)
    score, rank = findings.score_findings({"Test": good, "Out of fold": bad}, "Ensemble")
    assert score.alarm and "20% above the class prior" in score.text
    assert rank.alarm and "0.700 behind Yolo" in rank.text
    (alone,) = findings.score_findings({"Out of fold": scores(Uniform=1.1, Class_prior=1.0)}, "Class prior")
    assert alone.alarm and "no ensemble" in alone.text
    assert "Best member" not in findings.headline_table({"x": scores(Uniform=1.1, Class_prior=1.0)}, "Class prior")


def test_where_it_gains_most_and_least():
    prior = np.full((5, 5), 0.9)
    losses = np.full((5, 5), 0.5)
    losses[1, 4], losses[0, 0] = 0.8, 0.1
    found = findings.grid_finding(losses, prior)
    assert "in 25 of 25" in found.text and not found.alarm
    assert "gain is at L1/L2 spinal canal (0.10, prior 0.90), the smallest at L5/S1 left foramen (0.80" in found.text
    losses[1, 4], losses[2, 2] = 1.0, np.nan
    found = findings.grid_finding(losses, prior)
    assert "in 23 of 24" in found.text and "largest loss at L5/S1 left foramen" in found.text and found.alarm
    assert findings.grid_finding(prior, prior).text == "Nowhere better or worse than the class prior."
    assert "No condition" in findings.grid_finding(np.full((5, 5), np.nan), prior).text


def test_grades_and_their_probabilities():
    grades = np.array([0, 0, 2, 2, -1, 1])
    p = np.array([[0.8, 0.1, 0.1]] * 2 + [[0.1, 0.2, 0.7], [0.5, 0.2, 0.3], [1, 0, 0], [np.nan] * 3])
    assert findings.confusion_text(grades, p) == "100% of 2 normal/mild, 50% of 2 severe are called that"
    assert findings.calibration_text(grades, p).endswith("severe 30% predicted, 50% true")
    assert (
        findings.confusion_text(grades[4:], p[4:])
        == findings.calibration_text(grades[4:], p[4:])
        == "nothing is graded"
    )
    whole, said = np.full((4, 5, 5), -1), np.full((4, 5, 5, 3), 1 / 3)
    assert "no severe" in findings.severe_finding(whole, said).text
    assert "nothing to compare" in findings.calibration_finding(whole, said).text
    whole[:, 3, 0], said[:, 3, 0] = (2, 2, 2, 0), ((0, 0, 1), (1, 0, 0), (1, 0, 0), (1, 0, 0))
    found = findings.severe_finding(whole, said)
    assert "subarticular 1 of 3" in found.text and found.alarm
    assert "severe, predicted with 25% on average and true in 75%" in findings.calibration_finding(whole, said).text


def test_the_second_numbering_is_counted_by_study():
    tables = [boxes_to_table(n, make_boxes(second=share)) for n, share in ((1, 0.0), (2, 0.2), (3, 0.4), (4, 0.0))]
    levels = pd.concat(tables, ignore_index=True)
    expected = "in doubt in 2 of 4 studies, with a second numbering in 2 (50%), which is 30% likely on average"
    assert findings.numbering_text(levels) == expected
    compared = pd.DataFrame({"level": ["l1_l2"] * 20, "nearest": ["l1_l2"] * 20, "condition": "x", "head_mm": 0.0})
    found = findings.levels_finding(compared, {"training": levels})
    assert found.alarm and expected in found.text and found.text.startswith("100.0% of 20 label points")
    assert not findings.levels_finding(compared, {"training": tables[0]}).alarm
    row = utils.summarise_levels(compared.assign(head_mm=1.0), levels).iloc[0]
    assert (row["Second numbering, %"], row["its mean share, %"]) == (50, pytest.approx(30))
    # Tables of before the second numbering, and as CSV has them, with empty cells.
    assert second_shares(levels.drop(columns=["second", "second_share"])).isna().all()
    assert "in doubt in 2 of 4 studies, with a second numbering in 0 (0%)" == findings.numbering_text(
        levels.drop(columns=["second", "second_share"])
    )


def test_the_second_numbering_survives_a_file(tmp_path):
    levels = pd.concat([boxes_to_table(n, make_boxes(second=0.25 * (n == 2))) for n in (1, 2)], ignore_index=True)
    levels.to_csv(tmp_path / "levels.csv", index=False)
    assert second_shares(pd.read_csv(tmp_path / "levels.csv")).dropna().tolist() == [0.25] * 5


def test_time_files_and_the_worst():
    log = pd.DataFrame({"seconds": [40.0, 60.0], "prior_rows": [0, 25]})
    found = findings.time_finding(log)
    assert "50.0 s a study" in found.text and "10.0 of the 9 hours" in found.text and found.alarm
    met = {"Training studies": pd.Series(["a", None, "b"]), "Test studies": pd.Series([None, ""])}
    found = findings.left_out_finding(met, log)
    assert "training studies 2, test studies 0" in found.text and "25 of 50 test rows" in found.text and found.alarm
    assert (
        findings.left_out_finding({"Training studies": pd.Series([], dtype=str)}, None).text == "Nothing was left out."
    )
    worst = pd.DataFrame([[7, 1, 4, 2, 3.0]], columns=["study_id", "condition", "level", "grade", "loss"])
    assert "study 7, L5/S1 left foramen, labelled severe, which was given 5%" in findings.worst_finding(worst).text
    assert findings.worst_finding(worst[:0]).text == "None is wrong."


def test_training_curves_in_words():
    runs = {
        "a": pd.DataFrame({"epoch": [1, 2, 3], "loss": [1.0, 0.8, 0.7], "total": [0.9, 0.6, 0.7]}),
        "b": pd.DataFrame({"epoch": [1, 2], "metrics/mAP50(B)": [0.2, np.nan], "train/cls_loss": ["5", "4"]}),
    }
    assert findings.curves_text(runs, "epoch") == (
        "a training loss from 1 to 0.7; a held-out score best at epoch 2 with 0.600; "
        "b training loss from 5 to 4; b mAP50 best at epoch 1 with 0.200"
    )
    assert findings.curves_text({"c": pd.DataFrame({"epoch": [1]})}, "epoch") == "no figures"


def test_a_shown_figure_says_what_it_shows(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, metadata, raw: shown.append((data, metadata)))
    fig, _ = plt.subplots()
    utils.show_figure(fig, "two lines that cross")
    ((data, metadata),) = shown
    assert metadata == {"image/png": {"alt": "two lines that cross"}} and data["image/png"].startswith("iVBORw0KGgo")
    assert not plt.fignum_exists(fig.number)
