"""Where stage 1 doubts its numbering every member that looks at levels is asked for both, and the mean is predicted."""

from dataclasses import replace

import numpy as np
import pytest
from small_study import make_boxes, make_study
from stand_in import PRIOR, StandIn, register

import utils
from lumbar.grade.member import Prediction, Weights, silence
from lumbar.look.viewer_page import study_html
from lumbar.problems import Problem
from lumbar.serve.members import Members
from lumbar.serve.study import Prepared, predict_studies

FIRST, SECOND = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.2, 0.7])


class ByPlace(StandIn):
    """Says FIRST of boxes as they are and SECOND of others; `fails` for one of the two."""

    def __init__(self, name, failing=None):
        super().__init__(name)
        self.failing = failing

    def prepare(self, study, boxes, weights, device):
        return study.study_id, boxes[0].center_lps_mm[2] == make_boxes()[0].center_lps_mm[2]

    def predict(self, inputs, weights, most_views, device):
        self.asked.append(list(inputs))
        return [self._said(first) for _, first in inputs]

    def _said(self, first):
        if self.failing == ("first" if first else "second"):
            return Prediction(silence(), (Problem.of(ValueError("no"), f"{self.name}: ", self.name),))
        return Prediction(np.tile(FIRST if first else SECOND, (5, 5, 1)))


def loaded(*names):
    return Members(None, {name: [Weights(f"{name}_0", None, {"views": [{}]})] for name in names}, PRIOR)


def prepared(share):
    """Study 7 with inputs not made yet; share: of the second numbering, None without one."""
    moved = [replace(box, center_lps_mm=box.center_lps_mm + [0, 0, 35.0]) for box in make_boxes()]
    second = None if share is None else (moved, share)
    return Prepared(make_study(), make_boxes(), {}, [], {}, second=second)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.49])
def test_a_prediction_is_the_mean_of_both_numberings(monkeypatch, share):
    member = ByPlace("level")
    register(monkeypatch, member)
    batch = [prepared(None), prepared(share), prepared(None)]
    found, problems, _ = predict_studies(batch, loaded("level"))
    assert len(member.asked[0]) == 4 and problems == [[], [], []]
    for k, expected in enumerate((FIRST, (1 - share) * FIRST + share * SECOND, FIRST)):
        np.testing.assert_allclose(found[k]["level"], np.tile(expected, (5, 5, 1)))


def test_a_member_of_whole_studies_is_asked_once(monkeypatch):
    member = ByPlace("study")
    register(monkeypatch, member)
    found, _, _ = predict_studies([prepared(0.3)], loaded("study"))
    assert len(member.asked[0]) == 1
    np.testing.assert_allclose(found[0]["study"], np.tile(FIRST, (5, 5, 1)))


@pytest.mark.parametrize("failing, says", [("first", SECOND), ("second", FIRST)])
def test_one_numbering_that_fails_leaves_the_other(monkeypatch, failing, says):
    register(monkeypatch, ByPlace("level", failing))
    found, problems, _ = predict_studies([prepared(0.3)], loaded("level"))
    np.testing.assert_allclose(found[0]["level"], np.tile(says, (5, 5, 1)))
    assert [str(problem) for problem in problems[0]] == ["level: ValueError: no"]


def test_the_viewer_shows_the_other_name_and_its_share():
    boxes = [
        replace(box, second=second, second_share=0.28)
        for box, second in zip(make_boxes(), ("t12_l1", "l1_l2", "l2_l3", "l3_l4", "l4_l5"), strict=True)
    ]
    page = study_html(make_study(), boxes, None, {}, None, page=True)
    assert "<td>L3/L4, 28%</td>" in page and "<td>T12/L1, 28%</td>" in page
    assert "28%" not in study_html(make_study(), make_boxes(), None, {}, None, page=True)
    assert utils.boxes_to_table(7, boxes)["second_share"].eq(0.28).all()
