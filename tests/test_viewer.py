"""The viewer's page stands alone, escapes what it shows and is small; what it draws lies where it should."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from small_study import (
    make_boxes,
    make_detections,
    make_points,
    make_probabilities,
    make_study,
    make_vertebrae,
    no_network,
)

import utils
from lumbar.data.geometry import boxes_to_table
from lumbar.data.volume import Study, Volume, save_study
from lumbar.grade import detector_member
from lumbar.grade.detector import yolo_views
from lumbar.grade.detector_data import YOLO_VIEWS
from lumbar.grade.member import Weights
from lumbar.look.inspection import Inspection, fallen_back, study_detections
from lumbar.look.slices import condition_point
from lumbar.look.viewer_data import tilt_caption, vertebra_prism
from lumbar.names import DETECTION_COLUMNS
from lumbar.spine.vertebra import vertebrae_to_table


@pytest.fixture(scope="module")
def study():
    return make_study()


@pytest.fixture(scope="module")
def full_page(study):
    probabilities, truth = make_probabilities()
    return utils.study_html(
        study,
        make_boxes(),
        make_points(),
        {"one": probabilities, "<two>": make_probabilities(1)[0]},
        truth,
        title="<b>5 & 6</b></script>",
        page=True,
        vertebrae=make_vertebrae(),
        detections=make_detections(),
    )


def data_of(page):
    """What the page's script draws."""
    start = page.index("data = {") + len("data = ")
    return json.JSONDecoder().raw_decode(page[start:])[0]


def test_page_stands_alone(full_page, study):
    assert no_network(full_page) == [] and "http:" not in full_page and "https:" not in full_page
    assert full_page.count("<figure data-panel=") == full_page.count("aria-label='slice of ") == 3
    assert sum(map(len, data_of(full_page)["panels"])) == sum(len(volume.array) for volume in study.volumes)
    assert "&lt;b&gt;5 &amp; 6&lt;/b&gt;" in full_page and "<b>5 & 6" not in full_page
    assert "&lt;two&gt;" in full_page and "<two>" not in full_page
    assert full_page.count("</script>") == 1
    assert full_page.count("data-cell=") == 50
    assert len(full_page) < 3_000_000


def test_names_cannot_end_the_script(study):
    vertebrae = [replace(make_vertebrae()[0], name="</script><b>")]
    page = utils.study_html(study, vertebrae=vertebrae)
    assert page.count("</script>") == 1
    assert "<b>" not in page[page.index("data = {") :]
    assert data_of(page)["bones"][0]["name"] == "</script><b>"


def test_viewers_on_one_page_have_ids_of_their_own(study):
    identities = [set(re.findall(r"\bid=([^\s>]+)", utils.study_html(study))) for _ in range(2)]
    assert len(identities[0]) == 2 and not identities[0] & identities[1]


def test_page_of_a_study_without_a_series(study):
    page = utils.study_html(Study(7, study.of("Axial T2")))
    assert page.count("no such series") == 2 and page.count("<figure data-panel=") == 1
    empty = utils.study_html(Study(7, []))
    assert empty.count("no such series") == 3
    boxed = utils.study_html(Study(7, []), make_boxes(), probabilities=make_probabilities()[0])
    assert boxed.count("data-cell=") == 25 and data_of(boxed)["crops"] is None


@pytest.mark.parametrize("noise, kept", [(0.15, 150), (1.0, 75)])
def test_fragment_of_a_large_study_stays_small(noise, kept):
    """150 noisy slices of 384 px become coarser to fit; only pure noise, the worst case for JPEG, loses slices."""
    array = (0.3 + noise * np.random.default_rng(0).random((150, 384, 384))).astype(np.float16)
    study = Study(7, [Volume(array, np.eye(4), 7, 1, "Axial T2", 0, np.arange(150))])
    page = utils.study_html(study, max_bytes=2_400_000)
    assert len(page) < 3_000_000 and sum(map(len, data_of(page)["panels"])) == kept


def test_marks_lie_on_their_slices(full_page, study):
    data = data_of(full_page)
    t2 = data["panels"][2]
    # x = 0 is the T2 series' fifth slice; pixel (50, 50) of 2 mm is 101 mm from the picture's corner.
    assert t2[4]["m"]["p"] == [[2, 101.0, 101.0, "L3/L4 spinal canal"]]
    assert t2[4]["m"]["d"] == [[2, 0, [0.1, 0.2, 0.71], 101.0, 101.0, 20.0]]
    assert [len(frame["m"]["p"]) for frame in t2] == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert {level for level, _, _ in t2[4]["m"]["b"]} == set(range(5))
    number, outline = t2[4]["m"]["v"][0]
    corners = np.reshape(outline, (-1, 2))
    # L1: from 99.5 to 75.5 mm above the origin and 15 mm around it; the picture begins at z = 101, y = -81.
    assert data["bones"][number]["name"] == "L1" and not data["bones"][-1]["seen"]
    np.testing.assert_allclose(corners.min(0), [66, 1.5], atol=0.02)
    np.testing.assert_allclose(corners.max(0), [96, 25.5], atol=0.02)
    axial = next(frame for frame in data["panels"][1] if frame["m"]["p"])
    assert axial["o"][2] == 54 and len(axial["m"]["d"]) == 2
    # Without its series' slice a body is not outlined: 40 mm wide, it ends at x = -20.
    assert [len(frame["m"]["v"]) for frame in t2][-1] == 0 and len(t2[7]["m"]["v"]) == 6


def test_vertebra_prism_has_the_bodys_corners():
    vertebra = make_vertebrae()[1]
    corners = vertebra_prism(vertebra)
    np.testing.assert_allclose(corners.min(0), [-20, -15, 40.5])
    np.testing.assert_allclose(corners.max(0), [20, 15, 64.5])
    for a in range(8):  # an edge joins two corners that differ in one bit
        assert sorted(np.linalg.norm(corners[a] - corners[a ^ bit]).round(6) for bit in (1, 2, 4)) == [24, 30, 40]


def test_crops_go_through_the_place_along_the_disc(study):
    tilt = np.radians(20)
    head = np.array([0, -np.sin(tilt), np.cos(tilt)])
    box = replace(make_boxes()[2], axes=np.stack([head, [1, 0, 0], np.cross(head, [1, 0, 0])]))
    assert tilt_caption(box) == "20° forward"
    crops = data_of(utils.study_html(study, [*make_boxes()[:2], box, *make_boxes()[3:]]))["crops"]
    for condition in range(5):
        place = condition_point(box, condition)
        for plane, axis in zip(crops["planes"][2][condition], (1, 2, 0)):
            normal, origin = np.array(plane["n"]), np.array(plane["o"])
            assert abs(normal @ box.axes[axis]) == pytest.approx(1, abs=1e-4)
            assert (place - origin) @ normal == pytest.approx(0, abs=0.01)
            inside = [(place - origin) @ np.array(plane[side]) for side in "uv"]
            assert 0 < inside[0] < plane["w"] and 0 < inside[1] < plane["h"]
    sagittal = crops["planes"][2][0][0]
    assert sagittal["l"] == ["A", "P", "H", "F"] and sagittal["i"].count(-1) == 0
    # Left and right foramen are seen on different sagittal planes, the axial one is the same for both.
    left, right = crops["planes"][2][1], crops["planes"][2][2]
    assert left[0]["o"][0] - right[0]["o"][0] == pytest.approx(34) and left[2]["i"] == right[2]["i"]


def test_crop_pictures_show_what_lies_there(study):
    """The ball at the origin is bright in the middle of L3/L4's crop and absent from L1/L2's."""
    import base64
    import io

    from PIL import Image

    crops = data_of(utils.study_html(study, make_boxes()))["crops"]

    def picture(level, plane, kind):
        frame = crops["planes"][level][0][plane]
        data = base64.b64decode(crops["pictures"][frame["i"][kind]])
        return frame, np.asarray(Image.open(io.BytesIO(data)), float)

    frame, image = picture(2, 0, 0)
    x = int(-np.array(frame["o"]) @ frame["u"] / 0.75)
    y = int(-np.array(frame["o"]) @ frame["v"] / 0.75)
    assert image[y - 3 : y + 4, x - 3 : x + 4].mean() > 190
    assert picture(0, 0, 0)[1].mean() < 60


def test_cloud_keeps_to_bright_places_near_the_spine(study):
    import base64

    cloud = data_of(utils.study_html(study, make_boxes()))["cloud"]
    xyz = np.frombuffer(base64.b64decode(cloud["xyz"]), "<i2").reshape(-1, 3) / 10
    assert len(xyz) == sum(cloud["counts"]) and min(cloud["counts"]) > 500
    assert np.linalg.norm(xyz, axis=1).max() < 40  # the ball is brighter than 0.4 up to there


def fake_detector(monkeypatch, at_lps, scores):
    """A detector that answers `scores` at the anchor nearest to a point, and little elsewhere."""
    from types import SimpleNamespace

    pass

    about = {"condition": "scs", "mm_per_px": 1.0, "shape_px": (224, 128), "names": list(utils.SEVERITIES)}
    detector = SimpleNamespace(condition="scs", view=YOLO_VIEWS["scs"], about=about)
    centers = np.stack(np.meshgrid(np.arange(0, 128, 8.0), np.arange(0, 224, 8.0)), -1).reshape(-1, 2)

    def dense(_, patches):
        result = np.full((len(patches), len(centers), 3), 0.01, np.float32)
        result[:, np.abs(centers - at_lps).sum(1).argmin()] = scores
        return result, centers

    monkeypatch.setattr(detector_member, "dense_scores", dense)
    return detector, [(detector_member.Detectors(), [Weights("yolo_scs_0", detector, about)])]


def test_detections_lie_where_the_anchor_is(study, monkeypatch):
    boxes = make_boxes()
    volume = study.of("Sagittal T2/STIR")[0]
    probe, _ = fake_detector(monkeypatch, np.zeros(2), [0, 0, 0])
    _, views = yolo_views(probe, study, boxes)
    seen = next(view for view in views if view["slice"] == 4)
    # The canal's place at L3/L4 in the patch: 24 mm behind the disc's centre.
    voxel = volume.lps_to_voxel(boxes[2].to_lps([0, 0, 24]))
    xy = np.linalg.inv(seen["to_slice"]) @ [voxel[2], voxel[1], 1]
    # What the network sees lies 8 px of 1 mm farther back: nearer anchors say less.
    _, drawing = fake_detector(monkeypatch, xy[:2] + [8, 0], [0.1, 0.2, 0.6])
    found = study_detections(drawing, study, boxes)
    assert list(found) == DETECTION_COLUMNS
    own = found[(found["level"] == "l3_l4") & (found["instance_number"] == 5)]
    assert len(own) == 1 and set(found["level"]) == {"l3_l4"}
    row = own.iloc[0]
    assert (row["series_id"], row["condition"]) == (12, "spinal_canal_stenosis")
    assert np.hypot(row["x_px"] - voxel[2] - 4, row["y_px"] - voxel[1]) * 2 < 6  # mm; the anchors are 8 mm apart
    assert row[list(utils.SEVERITIES)].tolist() == pytest.approx([0.1, 0.2, 0.6])
    assert row["width_px"] == row["height_px"] == 10  # 20 mm in pixels of 2 mm
    monkeypatch.setattr(detector_member, "LEAST_SCORE", 0.7)
    assert study_detections(drawing, study, boxes).empty
    assert study_detections([], study, boxes).empty


def test_what_fell_back_is_named():
    levels = pd.concat([boxes_to_table(n, make_boxes()) for n in (1, 2, 3)], ignore_index=True)
    levels.loc[(levels["study_id"] == 2) & (levels["level"] == "l5_s1"), "source"] = "t2+extrapolated"
    log = pd.DataFrame(
        {
            "study_id": [8, 9, 10],
            "rows_from": ["ensemble 25", "study model 25", "ensemble 25"],
            "prior_rows": [0, 0, 25],
            "dropped": [None, None, None],
            "problems": ["study 8: no Axial T2 series", None, None],
        }
    )
    table = fallen_back(levels, log)
    assert table["study_id"].tolist() == [9, 10, 8, 2]
    assert table["why"].tolist()[0] == "the whole-study network alone"
    assert "L5/S1 t2+extrapolated" in table["why"].iloc[-1] and "25 rows are the prior" in table["why"].iloc[1]
    assert fallen_back().empty


@pytest.fixture
def inspection(tmp_path, study):
    """Studies 7 and 9 (alike), 8 without images, 10 that only a function reads; predictions of 7 and 9."""
    save_study(study, tmp_path / "7.safetensors")
    save_study(replace(study, study_id=9), tmp_path / "9.safetensors")
    save_study(Study(8, [], ["study 8: nothing"]), tmp_path / "8.safetensors")
    paths = {n: tmp_path / f"{n}.safetensors" for n in (7, 8, 9)}
    probabilities, truth = make_probabilities()
    wrong = probabilities.copy()
    wrong[1, 2] = (0.98, 0.01, 0.01)
    sure = np.eye(3)[np.maximum(truth, 0)] * 0.9 + 0.03
    truth = truth.copy()
    truth[1, 2] = 2
    sure[1, 2] = (0.98, 0.01, 0.01)
    return Inspection(
        paths | {10: partial(replace, study, study_id=10)},
        pd.concat([boxes_to_table(n, make_boxes()) for n in (7, 9)], ignore_index=True),
        pd.concat([vertebrae_to_table(n, make_vertebrae()) for n in (7, 9)], ignore_index=True),
        make_points(),
        {7: np.where(truth == 2, 1, truth), 9: truth},
        {"member": {7: sure, 9: sure}},
        log=pd.DataFrame({"study_id": [10], "prior_rows": [25], "rows_from": ["class prior 25"]}),
    )


def framed(viewer):
    """The data of the page in the viewer's frame."""
    import html

    text = viewer.place.children[0].value
    return data_of(html.unescape(re.search('srcdoc="([^"]*)"', text).group(1)))


def test_live_viewer_follows_its_controls(inspection):
    viewer = utils.inspect_study(inspection)
    controls = viewer.controls
    assert framed(viewer)["start"] == [3, 0] and len(framed(viewer)["bones"]) == 6
    text, place = controls["errors"].options[1]
    assert place == (9, 2, 1) and "L3/L4 left foramen" in text and "Severe" in text
    controls["errors"].value = place
    assert controls["study"].value == 9 and framed(viewer)["start"] == [2, 1]
    controls["fallbacks"].value = controls["fallbacks"].options[1][1]
    assert controls["study"].value == 10 and framed(viewer)["crops"] is None
    assert "25 rows are the prior" in viewer.children[3].value
    controls["study"].value = 8
    assert "study 8: nothing" in viewer.children[3].value and framed(viewer)["panels"] == [[], [], []]
    controls["previous"].click()
    assert controls["study"].value == 7 and framed(viewer)["truth"] is not None
    assert controls["detections"].disabled


def test_it_opens_on_a_study_with_predictions(inspection):
    inspection.predicted = {"one": {9: None, 8: None}, "two": {9: None, 8: None, 7: None}}
    assert inspection.first_study() == 9  # 8 has no labels
    inspection.predicted = {}
    assert inspection.first_study() == 7
    inspection.predicted, inspection.truths = {"ensemble": {10: None}}, {}
    assert inspection.first_study() == 10 and inspection.load(10).study_id == 10
    inspection.predicted = {"member": {9: make_probabilities()[0]}}
    assert utils.inspect_study(inspection).controls["study"].value == 9
    with pytest.raises(ValueError, match="there is no study 77; one of the 4"):
        inspection.load(77)


def test_a_study_that_cannot_be_read_is_named(inspection):
    inspection.paths[8].write_bytes(b"no such thing")
    viewer = utils.inspect_study(inspection)
    viewer.controls["study"].value = 8
    assert "study 8 cannot be shown" in viewer.children[3].value and not viewer.place.children
    viewer.controls["study"].value = 7
    assert framed(viewer)["panels"][0]


@pytest.mark.slow
def test_detectors_are_loaded_when_asked_for(inspection, monkeypatch):
    asked = []

    def load():
        asked.append(1)
        return fake_detector(monkeypatch, np.array([64, 112]), [0.5, 0.3, 0.2])[1]

    inspection.detectors = load
    viewer = utils.inspect_study(inspection)
    assert not asked
    viewer.controls["detections"].value = True
    assert any(frame["m"]["d"] for frame in framed(viewer)["panels"][2])
    viewer.controls["study"].value = 9
    assert len(asked) == 1


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match="01_preprocess"):
        utils.inspect_study(Inspection({}))


def test_inspection_of_folders(tmp_path, study):
    for name in ("01/volumes", "02", "05", "data"):
        (tmp_path / name).mkdir(parents=True)
    save_study(study, tmp_path / "01/volumes/7.safetensors")
    bare = utils.read_inspection(tmp_path / "data", tmp_path / "01")
    assert list(bare.paths) == [7] and bare.levels is None and not bare.predicted and not bare.truths
    boxes_to_table(7, make_boxes()).to_csv(tmp_path / "02/levels.csv", index=False)
    boxes_to_table(5, make_boxes()).to_csv(tmp_path / "05/levels.csv", index=False)
    utils.to_submission([5], make_probabilities()[0][None]).to_csv(tmp_path / "05/submission.csv", index=False)
    (tmp_path / "data/test_series_descriptions.csv").write_text("study_id,series_id,series_description\n5,1,Axial T2\n")
    found = utils.read_inspection(tmp_path / "data", tmp_path / "01", tmp_path / "02", [tmp_path], tmp_path / "05")
    assert list(found.paths) == [7, 5] and set(found.levels["study_id"]) == {5, 7}
    assert list(found.predicted) == ["ensemble"] and found.detectors() == []
    page, problems = found.study_html(5)
    assert problems and data_of(page)["panels"] == [[], [], []] and data_of(page)["members"]
