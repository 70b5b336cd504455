"""Section 6 of utils.py: data sets, training and reading of the YOLO detectors."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import utils
from lumbar.data.geometry import LevelBox
from lumbar.data.source import Source
from lumbar.data.volume import Study, Volume, save_study
from lumbar.grade import detector_weights
from lumbar.grade.calibration import (
    cross_fitted_probabilities,
    fit_yolo_calibration,
    mean_scores,
    severity_prior,
    yolo_probabilities,
)
from lumbar.grade.detector import (
    YoloDetector,
    choose_detector_views,
    yolo_scores,
    yolo_studies,
    yolo_views,
)
from lumbar.grade.detector_data import (
    SAGITTAL_FIELD_MM,
    YOLO_VIEWS,
    YoloView,
    slice_patch,
    yolo_shape_px,
)
from lumbar.grade.detector_training import YOLO_SETTINGS, yolo_device
from lumbar.grade.tta import deal_parts
from lumbar.names import SEVERITY_WEIGHTS
from lumbar.weights import store_settled

SIZE = 96
LEVEL_Z_MM = np.array([36.0, 18.0, 0.0, -18.0, -36.0])


def boxes():
    """Five level boxes along patient z; label points lie 20 mm behind them, +-12 mm to the side."""
    axes = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])
    return [
        LevelBox(level, np.array([0.0, -20.0, z]), axes, np.array([20.0, 40, 30]), 1.0, Source.POINTS)
        for level, z in zip(utils.LEVELS, LEVEL_Z_MM)
    ]


def sagittal_volume(marks=(), description="Sagittal T1", flip_rows=False, flip_columns=False, left_first=False):
    """A volume of 13 slices, x from -24 to 24 mm, rows .9 mm, columns 1.1 mm (unequal on purpose), showing bright
    squares at `marks` (LPS points). The flips store the same patient with other row, column or slice directions."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[4.0, 0, 0], [0, 0, 1.1], [0, -0.9, 0]])
    affine[:3, 3] = [-24, -1.1 * (SIZE - 1) / 2, 0.9 * (SIZE - 1) / 2]
    array = np.zeros((13, SIZE, SIZE), np.float32)
    for axis, turned in ((0, left_first), (1, flip_rows), (2, flip_columns)):
        if turned:
            last = np.zeros(4)
            last[axis], last[3] = array.shape[axis] - 1, 1
            affine[:3, 3] = (affine @ last)[:3]
            affine[:3, axis] *= -1
    volume = Volume(array, affine, 1, 11, description, 0, np.arange(13) * 3 + 5)
    for mark in marks:
        k, row, column = np.round(volume.lps_to_voxel(np.asarray(mark, float))).astype(int)
        volume.array[k, row - 1 : row + 2, column - 1 : column + 2] = 1.0
    return volume


def axial_volume(z_mm):
    """One axial slice at z, rows to the back, columns to the patient's left."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, 0.8], [0, 0.8, 0], [4.0, 0, 0]])
    affine[:3, 3] = [-0.8 * (SIZE - 1) / 2, -0.8 * (SIZE - 1) / 2, z_mm]
    return Volume(np.zeros((1, SIZE, SIZE), np.float32), affine, 1, 12, "Axial T2", 0, np.array([7]))


class BrightNet(torch.nn.Module):
    """Stands in for a network: the severe score of an anchor is the brightness of its cell, the moderate half."""

    stride = torch.tensor([8.0])

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        bright = torch.nn.functional.max_pool2d(x, 8).flatten(1)
        p = torch.stack([torch.full_like(bright, 0.01), bright / 2, bright], 1).clamp(1e-4, 1 - 1e-4)
        head = {"scores": torch.logit(p)}
        return None, {"one2one": head, "one2many": head}


def bright_detector(condition, point_mm=(0.0, 12.0, 20.0)):
    meta = {
        "condition": condition,
        "shape_px": (96, 64),
        "mm_per_px": 1.0,
        "names": list(utils.SEVERITIES),
        "point_offsets": {"point_mm": list(point_mm), "spread_mm": [1, 1, 1], "n": 50},
    }
    return YoloDetector(BrightNet().eval(), meta)


def raw_scores(detector, study, view=None):
    """(5, sides, 3) of one study under one view."""
    (found,) = yolo_scores(detector, [study], [boxes()], [view or {}])
    if isinstance(found, Exception):
        raise found
    return found[0]


@pytest.mark.parametrize("flips", [{}, {"flip_rows": True}, {"flip_columns": True}, {"left_first": True}])
def test_patch_shows_the_marked_point_where_the_transform_says(flips):
    mark = np.array([8.0, 11.0, -13.5])
    volume = sagittal_volume([mark], **flips)
    k = int(round(volume.lps_to_voxel(mark)[0]))
    patch, to_slice = slice_patch(volume, k, [0.0, 5.0, 0.0], (96, 64), 1.0)
    row, column = (np.indices(patch.shape) * patch).sum((1, 2)) / patch.sum()
    slice_column, slice_row, _ = to_slice @ [column, row, 1]
    found = volume.voxel_to_lps([k, slice_row, slice_column])
    assert np.abs(found - mark).max() < 0.7  # the mark is drawn on whole pixels
    # Below the middle of the patch means towards the feet, right of it towards the back: in every storage order.
    assert row > 48 + 8 and column > 32 + 3
    np.testing.assert_allclose([row, column], [47.5 + 13.5, 31.5 + 6], atol=1.2)


@pytest.mark.parametrize("flips", [{}, {"flip_rows": True, "flip_columns": True}])
def test_coarse_patches_are_not_shifted(flips):
    volume = sagittal_volume(**flips)
    volume.array[6, 40:52, 30:42] = 1.0
    patch, to_slice = slice_patch(volume, 6, [0, 0, 0], (32, 32), 3.3)
    row, column = (np.indices(patch.shape) * patch).sum((1, 2)) / patch.sum()
    np.testing.assert_allclose((to_slice @ [column, row, 1])[:2], [35.5, 45.5], atol=0.3)


def test_patch_has_square_pixels_and_zeros_outside():
    volume = sagittal_volume()
    volume.array[:] = 1.0
    patch, _ = slice_patch(volume, 0, [0, 0, 0], (128, 128), 1.0)
    rows, columns = (patch > 0).any(1).sum(), (patch > 0).any(0).sum()
    assert abs(rows - 0.9 * SIZE) <= 1 and abs(columns - 1.1 * SIZE) <= 1
    assert patch[0, 0] == 0 and patch[64, 64] == 255


def test_shapes_are_multiples_of_32_that_hold_the_field():
    for condition, view in YOLO_VIEWS.items():
        for imgsz in (128, 192, 256, 384):
            shape, mm_per_px = yolo_shape_px(view, imgsz)
            assert all(px % 32 == 0 and px * mm_per_px >= mm - 0.01 for px, mm in zip(shape, view.field_mm))
    assert yolo_shape_px(YOLO_VIEWS["scs"], 256) == ((256, 128), 0.8125)
    with pytest.raises(ValueError, match="multiple of 32"):
        yolo_shape_px(YOLO_VIEWS["scs"], 250)


@pytest.mark.parametrize("flips", [{}, {"left_first": True, "flip_columns": True}])
def test_side_and_level_come_from_patient_coordinates(flips):
    # A finding on the patient's left at L3/L4 and one on the right at L1/L2, nothing else.
    points = [(12.0, 0.0, LEVEL_Z_MM[2]), (-12.0, 0.0, LEVEL_Z_MM[0])]
    study = Study(1, [sagittal_volume(points, **flips)])
    scores = raw_scores(bright_detector("nfn"), study)
    assert scores.shape == (5, 2, 3)
    severe = scores[..., 2] > 0.1
    expected = np.zeros((5, 2), bool)
    expected[2, 0] = expected[0, 1] = True  # sides in the order of DETECTORS: left, right
    np.testing.assert_array_equal(severe, expected)


def test_axial_sides_and_levels_without_slices():
    volume = axial_volume(LEVEL_Z_MM[3])
    k, row, column = np.round(volume.lps_to_voxel([12.0, 0.0, LEVEL_Z_MM[3]])).astype(int)
    volume.array[k, row - 1 : row + 2, column - 1 : column + 2] = 1
    scores = raw_scores(bright_detector("ss"), Study(1, [volume]))
    assert np.isnan(scores[[0, 1, 2, 4]]).all() and np.isfinite(scores[3]).all()
    assert scores[3, 0, 2] > 10 * scores[3, 1, 2]


def test_study_without_the_series_gives_nan_rows_only():
    scores = raw_scores(bright_detector("scs", (0.0, 0.0, 20.0)), Study(1, [axial_volume(0.0)]))
    assert scores.shape == (5, 1, 3) and np.isnan(scores).all()
    assert np.isnan(yolo_probabilities(scores)).all()


def noisy_study(study_id=1, description="Axial T2", seed=0):
    """Five axial slices at the levels, or a sagittal series, of nothing but noise, dark on the patient's right."""
    rng = np.random.default_rng(seed)
    volumes = [sagittal_volume(description=description)] if description != "Axial T2" else map(axial_volume, LEVEL_Z_MM)
    study = Study(study_id, list(volumes))
    for volume in study.volumes:
        volume.array = rng.random(volume.array.shape, np.float32) ** 8
        (volume.array[:6] if volume.plane == "sagittal" else volume.array[:, :, : SIZE // 2])[:] *= 0.03
    return study


def mirrored(study):
    """The same patient with left and right exchanged; the volumes are symmetric about x = 0, so only pixels move."""
    axis = 0 if study.volumes[0].plane == "sagittal" else 2
    volumes = [replace(v, array=np.ascontiguousarray(np.flip(v.array, axis))) for v in study.volumes]
    return Study(study.study_id, volumes)


def pixel_wise(condition):
    """bright_detector whose patches have the axial slices' own pixels, so that mirrored ones have mirrored cells."""
    detector = bright_detector(condition, (0.0, 0.0 if condition == "scs" else 12.0, 20.0))
    detector.about["mm_per_px"] = 0.8
    return detector


@pytest.mark.parametrize(
    ("condition", "description"), [("ss", "Axial T2"), ("nfn", "Sagittal T1"), ("scs", "Sagittal T2/STIR")]
)
def test_a_mirrored_patient_has_left_and_right_exchanged(condition, description):
    study, detector = noisy_study(description=description), pixel_wise(condition)
    p, q = yolo_studies(detector, [study, mirrored(study)], [boxes(), boxes()])
    np.testing.assert_allclose(q, p[::-1], atol=1e-6)
    if condition != "scs":
        assert (np.abs(p - p[::-1]).max(-1) > 0.02).all()  # so the line above means something


def test_a_mirrored_view_names_the_sides_as_they_are():
    study, detector = noisy_study(), pixel_wise("ss")
    plain, turned = raw_scores(detector, study), raw_scores(detector, study, {"mirror": True})
    patch, other = (yolo_views(detector, study, boxes(), view)[0][0] for view in ({}, {"mirror": True}))
    np.testing.assert_array_equal(patch, other[:, ::-1])
    assert np.abs(plain[:, 0] - plain[:, 1]).max() > 0.05
    np.testing.assert_allclose(turned, plain, atol=1e-6)


def test_every_view_finds_the_sides_and_levels():
    points = [(12.0, 0.0, LEVEL_Z_MM[2]), (-12.0, 0.0, LEVEL_Z_MM[0])]
    axial = Study(1, [axial_volume(z) for z in LEVEL_Z_MM])
    for number, point in ((2, points[0]), (0, points[1])):
        _, row, column = np.round(axial.volumes[number].lps_to_voxel(point)).astype(int)
        axial.volumes[number].array[0, row - 1 : row + 2, column - 1 : column + 2] = 1.0
    expected = np.zeros((5, 2), bool)
    expected[2, 0] = expected[0, 1] = True
    for condition, study in (("nfn", Study(1, [sagittal_volume(points)])), ("ss", axial)):
        views = utils.DETECTOR_VIEWS[condition]
        assert views[0] == {} and json.loads(json.dumps(views)) == list(views)
        (found,) = yolo_scores(bright_detector(condition), [study], [boxes()], views)
        for view, scores in zip(views, found, strict=True):
            np.testing.assert_array_equal(scores[..., 2] > 0.1, expected, err_msg=f"{condition} {view}")
    with pytest.raises(ValueError, match="no turn"):
        raw_scores(bright_detector("ss"), axial, {"turn": 1})


def test_a_wider_reach_sees_neighbouring_slices():
    study, detector = noisy_study(description="Sagittal T1"), bright_detector("nfn")
    slices = [
        {view["slice"] for view in yolo_views(detector, study, boxes(), change)[1]} for change in ({}, {"reach": 1.7})
    ]
    assert slices[0] < slices[1]


def test_studies_share_batches_and_only_the_broken_one_fails():
    studies, detector = [noisy_study(number, seed=number) for number in range(3)], bright_detector("ss")
    alone = [yolo_studies(detector, [study], [boxes()])[0] for study in studies]
    sizes, forward = [], detector.net.forward
    detector.net.forward = lambda x: sizes.append(len(x)) or forward(x)
    found = yolo_studies(detector, studies, [boxes(), None, boxes()], batch=7)
    assert sizes == [7, 3]
    assert isinstance(found[1], TypeError)
    for n in (0, 2):
        assert found[n].shape == (2, 5, 3)
        np.testing.assert_allclose(found[n], alone[n], atol=1e-6)

    def refuse(x):
        if (x == x.amax()).any() and x.amax() == 1:
            raise RuntimeError("too bright")
        return forward(x)

    for study in (studies[0], studies[2]):
        for volume in study.volumes:
            volume.array *= 0.9
    studies[1].volumes[0].array[0] = 1.0
    detector.net.forward = refuse
    found = yolo_studies(detector, studies, [boxes()] * 3, batch=64)
    assert [type(entry) for entry in found] == [np.ndarray, RuntimeError, np.ndarray]
    assert yolo_studies(detector, [], []) == []


def test_views_are_averaged_as_log_probabilities():
    study, detector = noisy_study(), bright_detector("ss")
    detector.about["calibration"] = {
        "trust": 1.0,
        "prior": np.full((5, 3), 1 / 3).tolist(),
        "mean": [-1.0, -2.0],
        "scale": [0.5, 2.0],
        "matrix": [[0.3, -0.2], [0.1, 0.4]],
        "bias": [0.1, -0.3],
    }
    views = [{}, {"shift_px": [4, 4]}, {"zoom": 1.1}]
    logs = np.log([yolo_studies(detector, [study], [boxes()], [view])[0] for view in views])
    mean = np.exp(logs.mean(0))
    (p,) = yolo_studies(detector, [study], [boxes()], views)
    np.testing.assert_allclose(p, mean / mean.sum(-1, keepdims=True), atol=1e-9)
    assert np.abs(p - np.exp(logs[0])).max() > 1e-3
    detector.about["views"] = views  # what the weights carry is the default
    np.testing.assert_allclose(yolo_studies(detector, [study], [boxes()])[0], p, atol=1e-9)


def test_a_view_without_a_word_leaves_it_to_the_others():
    scores = np.array([[[0.2, 0.1, 0.4]] * 2, [[0.05, 0.1, 0.1]] * 2, [[np.nan] * 3] * 2])
    scores[:, 1] = np.nan
    mean = mean_scores(scores)
    np.testing.assert_allclose(mean[0], [0.1, 0.1, 0.2])
    assert np.isnan(mean[1]).all()


@pytest.mark.slow
def test_detector_views_that_pay_are_chosen():
    rng = np.random.default_rng(5)
    grades = np.full((80, 5, 5), -1)
    grades[:, 1:3] = rng.choice(3, size=(80, 2, 5), p=[0.7, 0.2, 0.1])
    truth = 1.5 * np.eye(3)[grades[:, 1:3].transpose(0, 2, 1)]
    noise = rng.normal(size=(3, *truth.shape))
    # The second view errs on its own, the third repeats the first's errors.
    scores = 0.01 * np.exp(np.stack([truth + noise[0], truth + noise[1], truth + noise[0] + 0.01 * noise[2]], axis=1))
    scores[60:] = np.nan  # of other folds
    kept, table, used = choose_detector_views(grades, scores, "nfn", [{}, {"reach": 2.0}, {"zoom": 1.01}])
    assert kept == [{}, {"reach": 2.0}] and list(table["kept"]) == [True, True, False]
    assert (used[:60] == [True, True, False]).all() and (used[60:] == [True, False, False]).all()


@pytest.mark.slow
def test_views_and_calibration_are_stored_and_no_study_has_its_own(tmp_path):
    rng = np.random.default_rng(5)
    grades = np.full((110, 5, 5), -1)
    grades[:, 1:3] = rng.choice(3, size=(110, 2, 5), p=[0.7, 0.2, 0.1])
    own = grades[:, 1:3].transpose(0, 2, 1)
    held_out = np.arange(110) % 11 != 3
    part = deal_parts(held_out)
    # A second view that pays, by what it does to the first part alone.
    first = part == 0
    sight = np.where(first[:, None], [-1.0, 3.0], [3.0, 1.0])[..., None, None, None]  # (studies, views)
    noise = np.where(sight == 3, 0.7, 1.5) * rng.normal(size=(110, 2, 5, 2, 3))
    scores = 0.01 * np.exp(sight * np.eye(3)[own][:, None] + noise)
    scores[~held_out] = np.nan
    weights, views = [tmp_path / f"yolo_nfn_{fold}.safetensors" for fold in (0, 1)], [{}, {"zoom": 1.06}]
    for path in weights:
        about = {"condition": "nfn", "scheme": "severity", "calibration": None, "views": [{}]}
        detector_weights._write_yolo(path, {"x": torch.zeros(1)}, about)
    p, table = utils.settle_detectors(weights, grades, scores, views)
    assert table["kept"].all()
    mean = mean_scores(np.moveaxis(scores, 1, 0))
    for path in weights:
        about = detector_weights.read_detector_about(path)
        assert about["views"] == views
        assert about["calibration"] == fit_yolo_calibration(mean, own, severity_prior(own))
    # The first part is predicted without that view, the others with it, each calibrated on the rest.
    assert np.isnan(p[~held_out]).all() and np.isfinite(p[held_out]).all()
    for number in range(5):
        inside, rest = part == number, part != number
        given = scores[:, 0] if number == 0 else mean
        calibration = fit_yolo_calibration(given[rest], own[rest], severity_prior(own[rest]))
        np.testing.assert_allclose(p[inside], yolo_probabilities(given[inside], calibration), atol=1e-9)
    changed = np.where(first[:, None, None] & (grades >= 0), (grades + 1) % 3, grades)
    assert np.abs(utils.settle_detectors(weights, changed, scores, views)[0] - p)[first].max() < 1e-12


def weighted_loss(p, grades):
    w = np.array(SEVERITY_WEIGHTS)[grades]
    return (w * -np.log(np.take_along_axis(p, grades[..., None], -1)[..., 0])).sum() / w.sum()


LEVEL_FREQUENCIES = np.array([[97, 2, 1], [90, 7, 3], [60, 25, 15], [30, 40, 30], [90, 5, 5]]) / 100


def draw_grades(rng, studies):
    return np.stack([rng.choice(3, size=(studies, 2), p=p) for p in LEVEL_FREQUENCIES], axis=1)


def prior_probabilities(grades):
    p = severity_prior(grades) * np.array(SEVERITY_WEIGHTS)
    return np.broadcast_to((p / p.sum(-1, keepdims=True))[:, None], (*grades.shape, 3))


def cross_fitted(scores, grades):
    """Of a single view."""
    return cross_fitted_probabilities(scores[:, None], grades, np.ones((len(scores), 1), bool))


@pytest.mark.slow
def test_calibration_corrects_a_class_that_scores_low():
    rng = np.random.default_rng(0)
    grades = draw_grades(rng, 60)
    scores = 0.05 + 0.3 * np.eye(3)[grades] + 0.2 * rng.random((*grades.shape, 3))
    scores[..., 2] *= 0.1
    fitted = weighted_loss(cross_fitted(scores, grades), grades)
    assert fitted < 0.6 * weighted_loss(prior_probabilities(grades), grades)
    assert fitted < 0.9 * weighted_loss(yolo_probabilities(scores), grades)


@pytest.mark.slow
def test_useless_scores_lose_nothing_against_the_class_prior():
    rng = np.random.default_rng(1)
    grades = draw_grades(rng, 60)
    scores = 0.1 + rng.random((*grades.shape, 3))
    base = weighted_loss(prior_probabilities(grades), grades)
    assert weighted_loss(cross_fitted(scores, grades), grades) < 1.05 * base
    assert weighted_loss(yolo_probabilities(scores), grades) > 1.2 * base  # so the line above means something


@pytest.mark.slow
def test_few_rows_do_not_spoil_good_scores():
    rng = np.random.default_rng(3)
    grades = rng.choice(3, size=(240, 5, 2), p=[0.7, 0.2, 0.1])
    # Exactly calibrated: the likelihood ratio of x ~ N(2 onehot, 1) is exp(2 x).
    scores = np.array([0.7, 0.2, 0.1]) * np.exp(2 * (2 * np.eye(3)[grades] + rng.normal(size=(*grades.shape, 3))))
    scores /= scores.sum(-1, keepdims=True)
    prior, plain = severity_prior(grades), weighted_loss(yolo_probabilities(scores), grades)
    fitted = [
        weighted_loss(
            yolo_probabilities(scores, fit_yolo_calibration(scores[i : i + 8], grades[i : i + 8], prior)),
            grades,
        )
        for i in range(0, 240, 8)
    ]
    assert np.mean(fitted) < 1.1 * plain


def test_calibration_survives_json_missing_labels_and_few_rows():
    scores = np.full((2, 5, 1, 3), 0.2)
    scores[0, 1] = np.nan
    scores[1, 2] = 0.0
    grades = np.full((2, 5, 1), -1)
    calibration = json.loads(json.dumps(fit_yolo_calibration(scores, grades, severity_prior(grades))))
    p = yolo_probabilities(scores, calibration)
    assert np.isnan(p[0, 1]).all() and np.isfinite(np.delete(p.reshape(10, 3), 1, 0)).all()
    np.testing.assert_allclose(np.delete(p.reshape(10, 3), 1, 0).sum(-1), 1)


def test_default_probabilities_carry_the_weights():
    p = yolo_probabilities(np.full((5, 1, 3), 0.3))
    np.testing.assert_allclose(p, np.broadcast_to(np.array([1, 2, 4]) / 7, (5, 1, 3)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four studies of T1 volumes with a mark at every foramen, as write_yolo_dataset finds them."""
    root = tmp_path_factory.mktemp("yolo")
    (root / "volumes").mkdir()
    rng = np.random.default_rng(1)
    ids, rows = np.arange(101, 105), []
    grades = np.full((4, 5, 5), -1)
    for n, study_id in enumerate(ids):
        points = [(side * 12.0, 0.0, z) for z in LEVEL_Z_MM for side in (1, -1)]
        volume = sagittal_volume(points)
        volume.study_id = int(study_id)
        save_study(Study(int(study_id), [volume]), root / "volumes" / f"{study_id}.safetensors")
        for level in range(5):
            for condition, side in ((1, 1), (2, -1)):
                grades[n, condition, level] = rng.integers(0, 3)
                k, row, column = volume.lps_to_voxel([side * 12.0, 0.0, LEVEL_Z_MM[level]])
                rows.append(
                    (
                        study_id,
                        11,
                        int(volume.instance_numbers[int(round(k))]),
                        utils.CONDITIONS[condition],
                        utils.LEVELS[level],
                        column,
                        row,
                    )
                )
    grades[0, 1, 0] = -1  # a point without a grade
    rows.append((ids[1], 11, 999, utils.CONDITIONS[1], utils.LEVELS[0], 5.0, 5.0))  # a slice that is not there
    names = ["study_id", "series_id", "instance_number", "condition", "level", "x_px", "y_px"]
    coordinates = pd.DataFrame(rows, columns=names)
    folds = pd.DataFrame({"study_id": ids, "fold": [0, 1, 1, 1]})
    # The volumes are 86 mm high: a patch of 96 x 64 px at 1 mm.
    view = YoloView((96.0, 64.0), SAGITTAL_FIELD_MM / 96, 16.0, 3.0, (0.0, 12.0, 20.0), 6.0, 12.0)
    arguments = ("nfn", root / "volumes", coordinates, ids, grades, folds)
    info = utils.write_yolo_dataset(root / "nfn", *arguments, imgsz=96, view=view)
    return {"root": root, "dir": root / "nfn", "info": info, "grades": grades, "arguments": arguments, "view": view}


def test_dataset_boxes_sit_on_the_marks(dataset):
    from PIL import Image

    assert dataset["info"]["without_slice"] == 1 and dataset["info"]["outside_field"] == 0
    images = sorted((dataset["dir"] / "images").glob("*.png"))
    assert len(images) == 8  # two labelled slices a study
    seen = 0
    for path in images:
        patch = np.asarray(Image.open(path))
        assert patch.shape == tuple(dataset["info"]["shape_px"]) and patch.dtype == np.uint8
        lines = (path.parent.parent / "labels" / f"{path.stem}.txt").read_text().split("\n")[:-1]
        for cls, x, y, w, h in (map(float, line.split()) for line in lines):
            row, column = int(y * patch.shape[0]), int(x * patch.shape[1])
            assert patch[row - 1 : row + 2, column - 1 : column + 2].max() > 100
            assert abs(w * patch.shape[1] - 16) < 1.5 and abs(h * patch.shape[0] - 16) < 1.5
            seen += 1
    assert seen == (dataset["grades"] >= 0).sum()
    points = pd.read_csv(dataset["dir"] / "points.csv")
    assert (np.sign(points["x_mm"]) == np.where(points["condition"] == 1, 1, -1)).all()


def test_dataset_is_left_alone_when_finished(dataset):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (dataset["dir"] / "images").iterdir())
    utils.write_yolo_dataset(dataset["dir"], *dataset["arguments"], imgsz=96, view=dataset["view"])
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (dataset["dir"] / "images").iterdir())


@pytest.mark.parametrize("damage", ["{", "[1]", ""])
def test_a_dataset_whose_description_is_damaged_is_made_again(dataset, tmp_path, damage):
    shutil.copytree(dataset["dir"], tmp_path / "nfn")
    (tmp_path / "nfn" / "dataset.json").write_text(damage)
    (tmp_path / "nfn" / "images" / "old.png").touch()
    again = utils.write_yolo_dataset(tmp_path / "nfn", *dataset["arguments"], imgsz=96, view=dataset["view"])
    assert again == json.loads((tmp_path / "nfn" / "dataset.json").read_text()) == dataset["info"]
    assert not (tmp_path / "nfn" / "images" / "old.png").exists()


def test_a_point_on_no_slice_costs_itself_and_a_mended_table_counts(dataset, tmp_path, capsys):
    condition, volumes, coordinates, ids, grades, folds = dataset["arguments"]
    good = coordinates[coordinates["instance_number"] != 999]

    def written(points, name="nfn"):
        info = utils.write_yolo_dataset(
            tmp_path / name, condition, volumes, points, ids, grades, folds, imgsz=96, view=dataset["view"]
        )
        return info, {path.name: path.read_bytes() for path in sorted((tmp_path / name).glob("*/*"))}

    info, files = written(good)
    assert info["without_slice"] == 0 and "left out" not in capsys.readouterr().out
    for change in ({"x_px": 9999.0}, {"y_px": np.nan}, {"series_id": 5}, {"instance_number": -3}):
        bad = pd.concat([good, good.iloc[[-1]].assign(**change)])
        again, same = written(bad)  # in the same folder: another table's data set is made anew
        assert again["without_slice"] == 1 and again["images"] == info["images"] and same == files
        assert re.search(r"yolo nfn: 1 of \d+ label points are left out: study 104, series", capsys.readouterr().out)
    moved, other = written(good.assign(x_px=good["x_px"] + 1))
    assert moved["points"] == info["points"] and other != files

    absent = dict(zip(ids, grades, strict=True)) | {999: grades[0]}
    more = pd.concat([good, good[good["study_id"] == ids[0]].assign(study_id=999)])
    folds = pd.concat([folds, pd.DataFrame({"study_id": [999], "fold": [0]})])
    ids, grades = np.array(list(absent)), np.array(list(absent.values()))
    undescribed, same = written(more, "undescribed")
    assert same == files and "study 999: no volumes" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="999.safetensors: no volumes for a labelled study"):
        written(more[more["study_id"] == 999], "nothing")


def test_points_that_contradict_the_patient_are_said_and_used(dataset, tmp_path, capsys):
    condition, volumes, coordinates, ids, grades, folds = dataset["arguments"]
    good = coordinates[coordinates["instance_number"] != 999]

    def said(change, studies):
        bad = good["study_id"].isin(studies)
        points = pd.concat([good[~bad], change(good[bad])])
        info = utils.write_yolo_dataset(
            tmp_path / "nfn", condition, volumes, points, ids, grades, folds, imgsz=96, view=dataset["view"]
        )
        assert info["points"] == dataset["info"]["points"] - 1 and info["without_slice"] == 0
        return capsys.readouterr().out

    def renamed(column, names):
        return lambda points: points.assign(**{column: points[column].replace(names)})

    def fractions(points):
        return points.assign(x_px=points["x_px"] / 1000, y_px=points["y_px"] / 1000)

    upside_down = renamed("level", dict(zip(utils.LEVELS, utils.LEVELS[::-1], strict=True)))
    sides = utils.CONDITIONS[1:3]
    exchanged = renamed("condition", dict(zip(sides, sides[::-1], strict=True)))
    levels, lefts = "its levels do not follow each other", "its left points are not to the left"
    for change, why in (
        (upside_down, levels),
        (renamed("level", {"l2_l3": "l3_l4", "l3_l4": "l2_l3"}), levels),
        (exchanged, lefts),
        (fractions, levels),
        (lambda points: points.assign(x_px=0.0, y_px=0.0), levels),
        (lambda points: points.assign(x_px=20.0, y_px=20.0), levels),
    ):
        text = said(change, ids[1:2])
        assert f"yolo nfn: the label points of 1 of 4 studies cannot be true (study 102: {why}" in text
    text = said(lambda points: exchanged(upside_down(points)), ids)
    assert "4 of 4 studies" in text and text.count(f"{levels} from head to foot and {lefts}") == 3 and "1 more" in text
    assert "cannot be true" not in said(lambda points: points, ids)


def test_point_offsets_count_towards_the_own_side(dataset):
    points = pd.read_csv(dataset["dir"] / "points.csv")
    offsets = utils.fit_point_offsets(points, {i: boxes() for i in range(101, 105)})
    np.testing.assert_allclose(offsets["point_mm"], [0, 12, 20], atol=0.6)
    assert utils.fit_point_offsets(points, {}) is None


CHILD = """
import copy, os, socket, sys
def refuse(*a, **k): raise RuntimeError("network attempt")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from pathlib import Path
import torch
torch.set_num_threads(1)
import utils
from lumbar.grade.detector_weights import prepare_ultralytics
out = Path(sys.argv[2])
prepare_ultralytics(out / "ultralytics")
from lumbar.grade.detector_trainer import PatchTrainer
if sys.argv[3] == "kill":
    run_callbacks = PatchTrainer.run_callbacks
    def die(self, event):
        run_callbacks(self, event)
        if event == "on_train_batch_end" and self.epoch == 2: os._exit(9)  # amid the third epoch
    PatchTrainer.run_callbacks = die
save_model = PatchTrainer.save_model
def keep_answers(self):
    x = torch.rand(2, 1, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, raw = copy.deepcopy(self.ema.ema).half().float().eval()(x)
    torch.save({head: raw[head]["scores"] for head in ("one2one", "one2many")}, out / "answers.pt")
    return save_model(self)
PatchTrainer.save_model = keep_answers
print(utils.train_yolo(sys.argv[1], "nfn", 0, out, model="yolov10n.yaml", width=0.125, epochs=int(sys.argv[4]), batch=4,
                       device="cpu", settings={"scale": 0.1, "degrees": 5.0}))
"""


def train_in_child(dataset_dir, out, how, epochs):
    command = [sys.executable, "-c", CHILD, dataset_dir, out, how, str(epochs)]
    environment = os.environ | {"PYTHONPATH": str(Path(utils.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def trained(dataset):
    """Trained from a moved copy of the data set, killed in the third epoch, continued: (weights, run folder,
    results.csv at the kill, weights of a run that nothing stopped)."""
    moved = dataset["root"] / "elsewhere" / "nfn"
    shutil.copytree(dataset["dir"], moved)
    out, whole = dataset["root"] / "out", dataset["root"] / "whole"

    def child(how, out=out):
        return train_in_child(moved, out, how, 4)

    killed = child("kill")
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert not (out / "yolo_nfn_0.safetensors").exists()
    before = (out / "run_nfn_0" / "results.csv").read_text()
    finished = child("go")
    assert finished.returncode == 0, finished.stderr[-2000:]
    unstopped = child("go", whole)
    assert unstopped.returncode == 0, unstopped.stderr[-2000:]
    assert re.search(r"yolo nfn fold 0.*loss=\d+\.\d+", unstopped.stderr)  # the bar says how it goes
    assert "mAP50=" not in unstopped.stderr  # nothing is validated on a CPU
    return out / "yolo_nfn_0.safetensors", out / "run_nfn_0", before, whole / "yolo_nfn_0.safetensors"


@pytest.mark.slow
def test_training_resumes_after_a_kill(trained):
    weights, run, before, _ = trained
    assert weights.exists()
    epochs = pd.read_csv(run / "results.csv")["epoch"].tolist()
    assert epochs == [1, 2, 3, 4]
    # The lines of the first two epochs, their times included, are those of the killed run.
    assert len(before.splitlines()) == 3 and (run / "results.csv").read_text().startswith(before)


@pytest.mark.slow
def test_a_killed_training_ends_as_one_that_was_not(trained):
    resumed, whole = utils.load_yolo(trained[0]), utils.load_yolo(trained[3])
    assert resumed.about == whole.about
    other = whole.net.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in resumed.net.state_dict().items())
    losses = [
        pd.read_csv(path.parent / "run_nfn_0" / "results.csv").drop(columns="time") for path in (trained[0], trained[3])
    ]
    pd.testing.assert_frame_equal(*losses)


@pytest.mark.slow
def test_loaded_weights_predict_what_ultralytics_does(trained):
    weights, run, *_ = trained
    detector = utils.load_yolo(weights)
    # No pickle is left, and none was written.
    assert [p.name for p in run.parent.rglob("*.pt")] == ["answers.pt"]
    theirs = torch.load(run.parent / "answers.pt", weights_only=True)
    x = torch.rand(2, 1, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, ours = detector.net(x)
    for head in ("one2one", "one2many"):
        torch.testing.assert_close(ours[head]["scores"], theirs[head], rtol=0, atol=1e-5)
    patches = (x[:, 0].numpy() * 255).astype(np.uint8)
    whole, centers = utils.dense_scores(detector, patches, batch=2)
    chunked, _ = utils.dense_scores(detector, patches, batch=1)
    np.testing.assert_allclose(whole, chunked, atol=1e-5)
    assert whole.shape == (2, 12 * 8 + 6 * 4 + 3 * 2, 3) == (2, len(centers), 3)


@pytest.mark.slow
def test_anchor_centers_are_ultralytics_anchors(trained):
    detector = utils.load_yolo(trained[0])
    _, centers = utils.dense_scores(detector, np.zeros((1, 96, 64), np.uint8))
    with torch.no_grad():
        detector.net(torch.zeros(1, 1, 96, 64))
    head = detector.net.model[-1]
    anchors = (head.anchors * head.strides).T.numpy()
    np.testing.assert_allclose(centers, anchors - 0.5, atol=1e-4)  # ultralytics counts from the pixel's corner


@pytest.mark.slow
def test_calibration_is_kept_with_the_weights(trained, tmp_path):
    copy = tmp_path / trained[0].name
    shutil.copy(trained[0], copy)
    before = utils.load_yolo(copy).net.state_dict()
    store_settled(copy, {"calibration": {"ridge": 3.0}})
    detector = utils.load_yolo(copy)
    assert detector.about["calibration"] == {"ridge": 3.0}
    assert all(torch.equal(v, before[k]) for k, v in detector.net.state_dict().items())


DISTRIBUTED = """
import sys
from pathlib import Path
from lumbar.grade.detector_weights import prepare_ultralytics
prepare_ultralytics(Path(sys.argv[1]) / "config")
from types import SimpleNamespace
from ultralytics.utils import callbacks, dist
from lumbar.grade.detector_trainer import PatchTrainer
# A trainer for two GPUs cannot be made without them; what ultralytics writes down of one can.
trainer = PatchTrainer.__new__(PatchTrainer)
trainer.args, trainer.model = SimpleNamespace(model="yolov10n.yaml"), "yolov10n.yaml"
trainer.callbacks, trainer.world_size, trainer.resume = callbacks.get_default_callbacks(), 2, False
trainer.save_dir = Path(sys.argv[1]) / "run"
trainer.save_dir.mkdir()
command, file = dist.generate_ddp_command(trainer)
assert not trainer.save_dir.exists()  # why setup_* lies beside it
print(" ".join(command), file=sys.stderr)
print(file)
"""


@pytest.mark.slow
def test_processes_for_several_gpus_find_the_trainer(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(utils.__file__).parent)}
    made = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED, tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert "torch.distributed.run --nproc_per_node 2" in made.stderr
    script = Path(made.stdout.split()[-1])
    text = script.read_text()
    begin, build = text.split("    trainer = state", 1)
    assert build.startswith('["trainer"](cfg=cfg, overrides=state["args"]')
    script.write_text(begin + '    print(state["trainer"].__module__, state["trainer"].__mro__[1].__name__)\n')
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0", "YOLO_CONFIG_DIR": str(tmp_path / "config")}
    ran = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split()[-2:] == ["lumbar.grade.detector_trainer", "DetectionTrainer"]


ORPHAN = """
import sys, time
import utils, lumbar.grade.detector_weights as own
from pathlib import Path
own.prepare_ultralytics(sys.argv[1])
from lumbar.grade.detector_trainer import DetectionTrainer, PatchTrainer
DetectionTrainer._setup_ddp = lambda self: None
PatchTrainer._setup_ddp(PatchTrainer.__new__(PatchTrainer))
Path(sys.argv[1], "ready").touch()
time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux only")
def test_processes_for_several_gpus_end_with_torchrun(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    # Stands for torchrun: starts a process, and is killed outright.
    parent = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
    command = [sys.executable, "-c", parent, sys.executable, tmp_path / "orphan.py", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(Path(utils.__file__).parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as started:
        child = int(started.stdout.readline())
        until = time.monotonic() + 120
        while not (tmp_path / "ready").exists() and time.monotonic() < until:
            time.sleep(0.2)
        assert (tmp_path / "ready").exists() and _runs(child)
        started.kill()
    until = time.monotonic() + 30
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _runs(child)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_all_gpus_are_used_as_far_as_each_gets_an_image(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert yolo_device("auto", 16) == yolo_device(None, 16) == "0,1,2,3"
    assert yolo_device("auto", 2) == "0,1" and yolo_device("1", 16) == "1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert yolo_device("auto", 16) == yolo_device("cpu", 16) == "cpu"


def test_table_leaves_rows_without_prediction_out():
    p = np.full((2, 5, 2, 3), 1 / 3)
    p[1, 0, 1] = np.nan
    table = utils.yolo_table([7, 8], p, "ss")
    assert len(table) == 19 and table["row_id"].is_monotonic_increasing
    assert "8_right_subarticular_stenosis_l1_l2" not in set(table["row_id"])
    ids, back = utils.from_submission(table)
    np.testing.assert_array_equal(np.isfinite(back[1, 4, :, 0]), [False, True, True, True, True])


def test_loss_against_prior_is_the_metric():
    rng = np.random.default_rng(0)
    grades = rng.choice(3, size=(40, 5, 1), p=[0.7, 0.2, 0.1])
    p = rng.dirichlet([2, 1, 1], size=(40, 5, 1))
    found = utils.yolo_loss_against_prior(grades, p, np.arange(40) % 4)
    wide, full = np.full((40, 5, 5), -1), np.full((40, 5, 5, 3), 1 / 3)
    wide[:, 0], full[:, 0] = grades[..., 0], p[:, :, 0]
    assert found["weighted_log_loss"] == pytest.approx(utils.score_arrays(wide, full)["spinal"])
    assert found["rows"] == 200 and found["gain"] < 0
    for fold in range(4):
        full[np.arange(40) % 4 == fold, 0] = utils.class_prior(wide[np.arange(40) % 4 != fold])[0]
    assert found["class_prior"] == pytest.approx(utils.score_arrays(wide, full)["spinal"])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="01_preprocess"):
        utils.train_yolo(tmp_path, "nfn", 0, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="03_train_yolo"):
        utils.load_yolo(tmp_path / "yolo_nfn_0.safetensors")


def test_plot_returns_its_axes():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    _, ax = plt.subplots()
    scores = np.zeros((4, 3))
    scores[2, 1] = 0.9
    centers = np.array([[4, 4], [12, 4], [4, 12], [12, 12]], float)
    assert utils.plot_detections(ax, np.zeros((16, 16), np.uint8), scores, centers, 6, [(1, 0.5, 0.5, 0.3, 0.3)]) is ax
    assert len(ax.patches) == 2
    plt.close()


def test_model_names():
    assert utils.find_yolo_description("yolov10x.yaml").name == "yolov10x.yaml"
    assert utils.find_yolo_description("yolov8n.yaml").name == "yolov8.yaml"
    for wrong in ("yolov10q.yaml", "yolov10n.pt", "yolov10n", ""):
        with pytest.raises(ValueError, match="MODEL .*yolov10x.yaml"):
            utils.find_yolo_description(wrong)


def test_a_schedule_by_its_name_or_with_a_rate_of_ones_own():
    short, b = utils.yolo_schedule("short"), utils.yolo_schedule("B")
    assert short["lr0"] == 0.001 and b["lr0"] == 0.01 and b["warmup_epochs"] == 3 and b["cos_lr"]
    assert set(short) == set(b) <= set(YOLO_SETTINGS)
    faster = utils.yolo_schedule("B", 0.02)
    assert faster == b | {"lr0": 0.02, "warmup_bias_lr": pytest.approx(0.2)}
    assert utils.yolo_schedule("B") == b  # the table is as it was
    with pytest.raises(ValueError, match="SCHEDULE must be short or B, not 'linear'"):
        utils.yolo_schedule("linear")


@pytest.mark.slow
def test_looking_a_model_up_leaves_ultralytics_unimported():
    code = "import sys, utils; utils.find_yolo_description('yolov10n.yaml'); sys.exit('ultralytics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(utils.__file__).parent).returncode == 0
