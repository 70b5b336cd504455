"""Fine-tuning on label points: detections are confirmed, renamed and completed by them, against a drawn truth."""

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from test_spinenet import CLASSES, PRIOR, anonymous, draw, empty_volume, spine

import utils
from lumbar.data.geometry import boxes_to_table, coordinates_to_lps
from lumbar.data.source import Source
from lumbar.data.volume import Study, save_study
from lumbar.names import VERTEBRAE
from lumbar.spine import finetune
from lumbar.spine.fallbacks import level_boxes
from lumbar.spine.finetune import POINT_TABLE_COLUMNS, bodies_by_points, level_points, point_records
from lumbar.spine.spinenet import sagittal_images
from lumbar.spine.spinenet_training import SpineSlices, spinenet_records, spinenet_targets
from lumbar.spine.vertebra import project_vertebrae, spine_class

LUMBAR = ("L1", "L2", "L3", "L4", "L5", "S1")


def study_of(truth, study_id=7):
    """Both sagittal series and an axial stack of a drawn spine; the T1 series shows the patient moved."""
    volumes = [draw(empty_volume(), truth), draw(empty_volume("Sagittal T1"), moved(truth))]
    affine = np.array([[0, 0, 2.0, -60], [0, 2.0, 0, -60], [2.0, 0, 0, -160], [0, 0, 0, 1]])
    axial = replace(empty_volume("Axial T2", slices=150, rows=90, columns=60), affine=affine)
    return Study(study_id, [replace(v, study_id=study_id) for v in [*volumes, axial]])


def moved(vertebrae):
    return [replace(v, corners_lps_mm=v.corners_lps_mm + [0.0, 2.0, -2.5]) for v in vertebrae]


def coordinates_of(truth, study, levels=utils.LEVELS, off_mm=0.0, conditions=utils.CONDITIONS):
    """Label points as the competition has them: canal points on the sagittal T2 behind the disc, foraminal ones on
    the sagittal T1, higher, subarticular ones on axial slices; off_mm: too high."""
    rng = np.random.default_rng(3)
    series = {"spinal": "Sagittal T2/STIR", "foraminal": "Sagittal T1", "subarticular": "Axial T2"}
    rows = []
    for box in level_boxes(truth):
        for condition in conditions:
            if box.level not in levels:
                continue
            kind = next(kind for kind in series if kind in condition)
            (volume,) = study.of(series[kind])
            side = {"left": 14.0, "right": -14.0}.get(condition.split("_")[0], 0.0)
            rise = finetune.FORAMEN_RISE_MM if kind == "foraminal" else 0.0
            point = box.to_lps([rise + off_mm + rng.normal(0, 1), side, box.extent_mm[2] / 2 + 6])
            slice_, row, column = volume.lps_to_voxel(point)
            number = int(np.clip(round(slice_), 0, len(volume.array) - 1)) + 1
            row = [study.study_id, volume.series_id, number, condition, box.level, column, row]
            rows.append(row)
    columns = ["study_id", "series_id", "instance_number", "condition", "level", "x_px", "y_px"]
    return pd.DataFrame(rows, columns=columns)


def points_of(coordinates, study):
    foraminal = coordinates["condition"].str.contains("foraminal").to_numpy()
    return level_points(coordinates_to_lps(coordinates, study), coordinates["level"], foraminal)


def detections(truth, missing=(), shifted=0, noise_mm=0.7):
    """The model's bodies: named `shifted` too low, some missing."""
    rng = np.random.default_rng(1)
    names = [v.name for v in truth]
    found = []
    for k, v in enumerate(truth):
        if v.name not in missing:
            corners = v.corners_lps_mm + rng.normal(0, noise_mm, (4, 3)) * [0, 1, 1]
            name = names[min(k + shifted, len(names) - 1)]
            found.append(replace(v, corners_lps_mm=corners, name=name, source=Source.T2, confidence=0.8))
    return found


def check(records, true_records, names=LUMBAR, near_px=1.5):
    """Every certain body is a true one of this class, in its place; all that the names ask for are certain."""
    classes = [spine_class(name) for name in names]
    assert len(records) == len(true_records)
    counted = 0
    for index, (record, true) in enumerate(zip(records, true_records)):
        assert record.keys() == true.keys() and torch.equal(record["image"], true["image"])
        for key, value in true.items():
            assert record[key].dtype == value.dtype and record[key].ndim == value.ndim
        for corners, kind, yes in zip(record["corners_px"], record["classes"], record["certain"]):
            if yes:
                distance = (true["corners_px"] - corners).abs().amax((1, 2))
                assert distance.min() < near_px and true["classes"][distance.argmin()] == kind
                counted += 1
        if index == len(records) // 2:
            assert sorted(record["classes"][record["certain"]].tolist()) == sorted(classes)
    assert counted > 5 * len(names)


@cache
def case(seed=4):
    """(true vertebrae, study, the study with its T2 series alone, points). Not to be changed."""
    truth = spine(seed)
    study = study_of(truth)
    sagittal = replace(study, volumes=study.volumes[:1])
    return truth, study, sagittal, points_of(coordinates_of(truth, study), study)


@cache
def true_records_of_case():
    truth, _, sagittal, _ = case()
    return spinenet_records(sagittal, truth, 2.0)


@pytest.mark.parametrize("prior", [PRIOR, None], ids=["prior", "no prior"])
@pytest.mark.parametrize("missing", [(), ("L3",), ("L5",)])
@pytest.mark.parametrize("shifted", [0, 1])
def test_records_come_out_right(missing, shifted, prior):
    truth, _, sagittal, points = case()
    bodies = detections(truth, missing, shifted)
    records, note = point_records(sagittal, bodies, points, 2.0, prior)
    # Without a layout a missed body lies only roughly where it is: nothing is learnt there.
    sure = [name for name in LUMBAR if prior is not None or name not in missing]
    check(records, true_records_of_case(), sure)
    assert note["used"] and note["confirmed"] == note["levels"] == 5 and note["completed"] == len(missing)
    if not missing:  # a slice that grazes a body is as uncertain as with the truth
        for record, true in zip(records, true_records_of_case()):
            lumbar = (true["classes"] > 0) & (true["classes"] < CLASSES - 1)
            assert record["certain"].sum() == true["certain"][lumbar].sum()
    assert note["renamed"] == (6 - len(missing) if shifted else 0) and note["dropped"] == 0


def test_what_the_points_do_not_confirm_is_not_certain():
    truth, _, sagittal, points = case()
    true_records = spinenet_records(sagittal, truth, 2.0)
    bodies = detections(truth)
    k = [v.name for v in bodies].index("L2")
    bodies[k] = replace(bodies[k], corners_lps_mm=bodies[k].corners_lps_mm + [0, 0, 15.0])
    records, note = point_records(sagittal, bodies, points, 2.0, PRIOR)
    check(records, true_records)
    # It is too far off to be L2: it is background, and L2 is where it should be.
    assert note["completed"] == note["dropped"] == 1
    # Points of one level 8 mm too low refute it, and both its bodies.
    off = bodies_by_points(detections(truth), points | {"l1_l2": points["l1_l2"] - [0, 0, 8.0]}, PRIOR)
    assert off[2] == {level: level != "l1_l2" for level in utils.LEVELS}
    assert [name for name, yes in off[1].items() if not yes] == ["L1", "L2"]
    records, note = point_records(sagittal, detections(truth), points | {"l1_l2": points["l1_l2"] - 8.0}, 2.0)
    assert note["confirmed"] == 4
    check(records, true_records, LUMBAR[2:])
    # A false body between L1 and S1 is background, one above L1 a place where the loss does not look.
    bodies = detections(truth, missing=("T12", "T11", "T10"))
    false = replace(bodies[2], corners_lps_mm=bodies[2].corners_lps_mm + [0, -60.0, 0], name="L4")
    records, note = point_records(sagittal, [*bodies, false], points, 2.0, PRIOR)
    assert note["dropped"] == 1
    check(records, true_records)
    middle = records[6]
    targets = spinenet_targets(middle["corners_px"], middle["classes"], middle["certain"], middle["image"].shape, 1.5)
    _, affine = sagittal_images(sagittal.volumes[0], 2.0)

    def weight_at(body):
        row, column = project_vertebrae([body], affine, 6)[0].mean(1).round().astype(int)[0]
        return float(targets["weight"][0, row, column])

    by_name = {v.name: v for v in truth}
    assert [weight_at(by_name[name]) for name in ("T11", "T12", "L3", "S2")] == [0, 0, 1, 0]
    assert weight_at(false) == 1 and float(targets["heat"][4].amax()) > 0.9


def test_points_move_a_completed_body():
    truth, study, _, _ = case()
    up = [replace(v, corners_lps_mm=v.corners_lps_mm + [0, 0, 5.0 * (v.name == "L3")]) for v in truth]
    errors = []
    for true in (truth, up):  # the layout knows nothing of the higher disc below L3, the points do
        points = points_of(coordinates_of(true, study), study)
        named, sure, _, _ = bodies_by_points(detections(true, missing=("L3",)), points, PRIOR)
        (body,) = [v for v in named if v.source == Source.POINTS]
        errors.append(body.center_lps_mm[2] - next(v for v in truth if v.name == "L3").center_lps_mm[2])
        assert all(sure.values())
    assert 1.5 < errors[1] - errors[0] < 3.5


@pytest.mark.parametrize("aside", [[0, -45.0, 0], [0, 40.0, 0], [35.0, 0, 0]], ids=["front", "behind", "left"])
def test_what_lies_beside_the_spine_is_not_taken_for_it(aside):
    truth, _, sagittal, points = case()
    (false,) = [v for v in detections(truth) if v.name == "L3"]
    false = replace(false, corners_lps_mm=false.corners_lps_mm + aside)
    bodies = sorted([*detections(truth, missing=("L3",)), false], key=lambda v: -v.center_lps_mm[2])
    named, sure, _, rest = bodies_by_points(bodies, points, PRIOR)
    assert all(sure.values()) and [v.source for v in named if v.name == "L3"] == [Source.POINTS]
    assert any(v.corners_lps_mm is false.corners_lps_mm for v in rest)


def test_levels_without_points_stay_uncertain():
    truth, study, sagittal, _ = case()
    points = points_of(coordinates_of(truth, study, utils.LEVELS[1:]), study)
    records, note = point_records(sagittal, detections(truth), points, 2.0, PRIOR)
    check(records, spinenet_records(sagittal, truth, 2.0), LUMBAR[1:])
    assert note["levels"] == note["confirmed"] == 4


def test_the_labels_name_also_where_they_disagree():
    truth, study, sagittal, _ = case()
    # The readers counted from elsewhere: what the model calls L2 they call L1.
    names = dict(zip(VERTEBRAE[1:], VERTEBRAE))
    theirs = [replace(v, name=names[v.name]) for v in truth if v.name in names]
    points = points_of(coordinates_of(theirs, study), study)
    records, note = point_records(sagittal, detections(truth), points, 2.0, PRIOR)
    assert note["renamed"] == 6
    check(records, spinenet_records(sagittal, theirs, 2.0))


def test_studies_that_cannot_be_used_are_left_out():
    truth, study, sagittal, points = case()
    few = {level: points[level] for level in utils.LEVELS[:2]}
    assert "only 2 levels" in point_records(sagittal, detections(truth), few, 2.0)[1]["reason"]
    swapped = points | {"l2_l3": points["l3_l4"], "l3_l4": points["l2_l3"]}
    assert "out of order" in point_records(sagittal, detections(truth), swapped, 2.0)[1]["reason"]
    off = points_of(coordinates_of(truth, study, off_mm=8.5), study)
    records, note = point_records(sagittal, detections(truth), off, 2.0)
    assert records == [] and not note["used"] and "the points confirm 0 levels" in note["reason"]
    records, note = point_records(sagittal, detections(truth, missing=LUMBAR[1:]), points, 2.0)
    assert records == [] and "levels, 3 are needed" in note["reason"]
    assert point_records(sagittal, [], points, 2.0)[0] == []


def test_foraminal_points_count_only_alone_and_lowered():
    truth, study, _, _ = case()
    whole = points_of(coordinates_of(truth, study), study)
    alone = points_of(coordinates_of(truth, study, conditions=utils.CONDITIONS[1:3]), study)
    for box in level_boxes(truth):
        assert len(whole[box.level]) == 3 and len(alone[box.level]) == 2
        assert np.abs(box.from_lps(alone[box.level])[:, 0]).max() < 5  # the T1 series' patient has moved by 2.5
    coordinates = coordinates_of(truth, study).assign(instance_number=999)
    assert points_of(coordinates, study) == {}


def save(tmp_path, count):
    paths, tables, truths = {}, [], {}
    for study_id in range(count):
        truths[study_id] = spine(30 + study_id)
        study = study_of(truths[study_id], study_id)
        paths[study_id] = tmp_path / f"{study_id}.safetensors"
        save_study(study, paths[study_id])
        tables.append(coordinates_of(truths[study_id], study))
    return paths, pd.concat(tables, ignore_index=True), truths


class Model:
    resolution_mm = 2.0
    about = {"prior": PRIOR}


@pytest.mark.slow
def test_a_set_of_studies(tmp_path, monkeypatch):
    paths, coordinates, truths = save(tmp_path, 4)
    coordinates = coordinates[(coordinates["study_id"] != 2) | (coordinates["level"] == "l1_l2")]

    def detect(model, volume):
        truth = truths[volume.study_id] if volume.series_id == 1 else moved(truths[volume.study_id])
        if volume.study_id == 3:
            raise RuntimeError("odd")
        gone = {1: ("L4", "T10"), 2: ("L2",)}[volume.series_id]
        return [replace(v, source=Source.T2) for v in anonymous(truth) if v.name not in gone]

    monkeypatch.setattr(finetune, "detect_vertebrae", detect)
    records, table = utils.fine_tuning_set(paths, Model, coordinates, slices=None)
    assert list(table.columns) == POINT_TABLE_COLUMNS
    assert list(table["study_id"]) == [0, 0, 1, 1, 2, 2, 3] and list(table["used"]) == [True] * 4 + [False] * 3
    assert "only 1 levels" in table["reason"][4] and table["reason"][6] == "RuntimeError: odd"
    # What one series misses the other one shows, in its own place.
    assert (table["completed"][:4] == 0).all() and (table["confirmed"][:4] == 5).all()
    start = 0
    for study_id in (0, 1):
        for volume in utils.load_study(paths[study_id]).volumes[:2]:
            truth = truths[study_id] if volume.series_id == 1 else moved(truths[study_id])
            true_records = spinenet_records(Study(study_id, [volume]), truth, 2.0)
            check(records[start : start + len(true_records)], true_records, near_px=0.2)
            start += len(true_records)
    assert start == len(records) == table["slices"].sum()
    fewer, table = utils.fine_tuning_set(paths, Model, coordinates, slices=6, limit=3, seed=1)
    assert table["study_id"].nunique() == 3 and table["slices"].max() == 6
    again, _ = utils.fine_tuning_set(paths, Model, coordinates, slices=6, limit=3, seed=1, workers=3)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(again, fewer, strict=True))
    shows = [bool(record["certain"].any()) for record in fewer]
    assert np.mean(shows) >= 0.75
    # The records are what training takes, mixed with others.
    item = SpineSlices(fewer + records[:3], 4, (64, 48), 1.5)[0]
    assert item["image"].shape == (1, 64, 48) and item["heat"].shape == (5, 64, 48)


def test_scores_on_label_points(tmp_path):
    paths, coordinates, truths = save(tmp_path, 2)
    boxes = {study_id: level_boxes(truth) for study_id, truth in truths.items()}
    levels = pd.concat([boxes_to_table(study_id, own) for study_id, own in boxes.items()])
    before = utils.point_scores(levels, paths, coordinates)
    assert before["studies"] == 2 and before["points"] == 30 and before["right_level"] == 1
    assert before["median_mm"] < 1.5 and before["within_5mm"] == 1
    high = {k: [replace(b, center_lps_mm=b.center_lps_mm + 7 * b.axes[0]) for b in own] for k, own in boxes.items()}
    levels = pd.concat([boxes_to_table(study_id, own) for study_id, own in high.items()])
    after = utils.point_scores(levels, paths, coordinates)
    assert after["median_mm"] == pytest.approx(7, abs=0.7) and after["within_5mm"] < 0.2
    shifted = {
        k: [replace(b, level=name) for b, name in zip(own, [*utils.LEVELS[1:], "l1_l2"])] for k, own in boxes.items()
    }
    levels = pd.concat([boxes_to_table(study_id, own) for study_id, own in shifted.items()])
    assert utils.point_scores(levels, paths, coordinates)["right_level"] == 0
    nothing = utils.point_scores(levels, {}, coordinates)
    assert nothing["studies"] == nothing["points"] == 0 and np.isnan(nothing["right_level"])


def test_tuning_is_kept_only_if_nothing_got_worse():
    before = {"right_level": 0.98, "within_5mm": 0.90, "median_mm": 2.0}
    for after, helped in (
        ({}, False),
        ({"within_5mm": 0.91}, True),
        ({"right_level": 0.99}, True),
        ({"right_level": 0.99, "within_5mm": 0.60}, False),
        ({"right_level": 0.97, "within_5mm": 0.99}, False),
        ({"median_mm": 1.9}, True),
        ({"median_mm": 1.96}, False),  # chance
        ({"median_mm": 2.1}, False),
        ({"right_level": float("nan")}, False),
    ):
        assert utils.tuning_helped(before, before | after) is helped


@pytest.mark.parametrize("rise_mm, taken_mm", [(4.0, 4.0), (9.2, 9.2), (13.0, 13.0), (-30.0, 9.2), (25.0, 9.2)])
def test_the_rise_of_the_foramina_is_the_data_sets_own(tmp_path, capsys, rise_mm, taken_mm):
    rows, paths = [], {}
    for study_id in range(1, 7):
        volume = replace(empty_volume(), study_id=study_id)
        paths[study_id] = tmp_path / f"{study_id}.safetensors"
        save_study(Study(study_id, [volume]), paths[study_id])
        for number, level in enumerate(utils.LEVELS):
            for condition, up_mm in (("spinal_canal_stenosis", 0.0), ("left_neural_foraminal_narrowing", rise_mm)):
                ijk = np.array([3.0, 30.0 + 15 * number, 20.0])
                ijk = volume.lps_to_voxel(volume.voxel_to_lps(ijk) + [0, 0, up_mm])
                rows.append((study_id, volume.series_id, volume.instance_numbers[3], condition, level, ijk[2], ijk[1]))
    columns = ["study_id", "series_id", "instance_number", "condition", "level", "x_px", "y_px"]
    table = pd.DataFrame(rows, columns=columns)
    assert finetune.foramen_rise_mm(paths, table) == pytest.approx(taken_mm, abs=0.3)
    # One that no foramen has is an error in the table, and said.
    assert ("which no foramen does" in capsys.readouterr().out) == (rise_mm != taken_mm)
    few = table[table["study_id"] <= 3]
    assert finetune.foramen_rise_mm(paths, few) == finetune.FORAMEN_RISE_MM
