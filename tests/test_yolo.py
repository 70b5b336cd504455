"""Section 6 of utils.py: data sets, training and reading of the YOLO detectors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import utils

SIZE = 96
LEVEL_Z_MM = np.array([36.0, 18.0, 0.0, -18.0, -36.0])


def boxes():
    """Five level boxes along patient z; label points lie 20 mm behind them, +-12 mm to the side."""
    axes = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])
    return [
        utils.LevelBox(level, np.array([0.0, -20.0, z]), axes, np.array([20.0, 40, 30]), 1.0, "labels")
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
    volume = utils.Volume(array, affine, 1, 11, description, 0, np.arange(13) * 3 + 5)
    for mark in marks:
        k, row, column = np.round(volume.lps_to_voxel(np.asarray(mark, float))).astype(int)
        volume.array[k, row - 1 : row + 2, column - 1 : column + 2] = 1.0
    return volume


def axial_volume(z_mm):
    """One axial slice at z, rows to the back, columns to the patient's left."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, 0.8], [0, 0.8, 0], [4.0, 0, 0]])
    affine[:3, 3] = [-0.8 * (SIZE - 1) / 2, -0.8 * (SIZE - 1) / 2, z_mm]
    return utils.Volume(np.zeros((1, SIZE, SIZE), np.float32), affine, 1, 12, "Axial T2", 0, np.array([7]))


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
    return utils.YoloDetector(BrightNet().eval(), meta)


@pytest.mark.parametrize("flips", [{}, {"flip_rows": True}, {"flip_columns": True}, {"left_first": True}])
def test_patch_shows_the_marked_point_where_the_transform_says(flips):
    mark = np.array([8.0, 11.0, -13.5])
    volume = sagittal_volume([mark], **flips)
    k = int(round(volume.lps_to_voxel(mark)[0]))
    patch, to_slice = utils.slice_patch(volume, k, [0.0, 5.0, 0.0], (96, 64), 1.0)
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
    patch, to_slice = utils.slice_patch(volume, 6, [0, 0, 0], (32, 32), 3.3)
    row, column = (np.indices(patch.shape) * patch).sum((1, 2)) / patch.sum()
    np.testing.assert_allclose((to_slice @ [column, row, 1])[:2], [35.5, 45.5], atol=0.3)


def test_patch_has_square_pixels_and_zeros_outside():
    volume = sagittal_volume()
    volume.array[:] = 1.0
    patch, _ = utils.slice_patch(volume, 0, [0, 0, 0], (128, 128), 1.0)
    rows, columns = (patch > 0).any(1).sum(), (patch > 0).any(0).sum()
    assert abs(rows - 0.9 * SIZE) <= 1 and abs(columns - 1.1 * SIZE) <= 1
    assert patch[0, 0] == 0 and patch[64, 64] == 255


def test_shapes_are_multiples_of_32_that_hold_the_field():
    for condition, view in utils.YOLO_VIEWS.items():
        for imgsz in (128, 192, 256, 384):
            shape, mm_per_px = utils.yolo_shape_px(view, imgsz)
            assert all(px % 32 == 0 and px * mm_per_px >= mm - 0.01 for px, mm in zip(shape, view.field_mm))
    assert utils.yolo_shape_px(utils.YOLO_VIEWS["scs"], 256) == ((256, 128), 0.8125)
    with pytest.raises(ValueError, match="multiple of 32"):
        utils.yolo_shape_px(utils.YOLO_VIEWS["scs"], 250)


@pytest.mark.parametrize("flips", [{}, {"left_first": True, "flip_columns": True}])
def test_side_and_level_come_from_patient_coordinates(flips):
    # A finding on the patient's left at L3/L4 and one on the right at L1/L2, nothing else.
    points = [(12.0, 0.0, LEVEL_Z_MM[2]), (-12.0, 0.0, LEVEL_Z_MM[0])]
    study = utils.Study(1, [sagittal_volume(points, **flips)])
    scores = utils.yolo_scores(bright_detector("nfn"), study, boxes())
    assert scores.shape == (5, 2, 3)
    severe = scores[..., 2] > 0.1
    expected = np.zeros((5, 2), bool)
    expected[2, 0] = expected[0, 1] = True  # sides in the order of DETECTORS: left, right
    np.testing.assert_array_equal(severe, expected)


def test_axial_sides_and_levels_without_slices():
    volume = axial_volume(LEVEL_Z_MM[3])
    k, row, column = np.round(volume.lps_to_voxel([12.0, 0.0, LEVEL_Z_MM[3]])).astype(int)
    volume.array[k, row - 1 : row + 2, column - 1 : column + 2] = 1
    scores = utils.yolo_scores(bright_detector("ss"), utils.Study(1, [volume]), boxes())
    assert np.isnan(scores[[0, 1, 2, 4]]).all() and np.isfinite(scores[3]).all()
    assert scores[3, 0, 2] > 10 * scores[3, 1, 2]


def test_study_without_the_series_gives_nan_rows_only():
    scores = utils.yolo_scores(bright_detector("scs", (0.0, 0.0, 20.0)), utils.Study(1, [axial_volume(0.0)]), boxes())
    assert scores.shape == (5, 1, 3) and np.isnan(scores).all()
    assert np.isnan(utils.yolo_probabilities(scores)).all()


def weighted_loss(p, grades):
    w = np.array(utils.SEVERITY_WEIGHTS)[grades]
    return (w * -np.log(np.take_along_axis(p, grades[..., None], -1)[..., 0])).sum() / w.sum()


LEVEL_FREQUENCIES = np.array([[97, 2, 1], [90, 7, 3], [60, 25, 15], [30, 40, 30], [90, 5, 5]]) / 100


def draw_grades(rng, studies):
    return np.stack([rng.choice(3, size=(studies, 2), p=p) for p in LEVEL_FREQUENCIES], axis=1)


def prior_probabilities(grades):
    p = utils.severity_prior(grades) * np.array(utils.SEVERITY_WEIGHTS)
    return np.broadcast_to((p / p.sum(-1, keepdims=True))[:, None], (*grades.shape, 3))


def test_calibration_corrects_a_class_that_scores_low():
    rng = np.random.default_rng(0)
    grades = draw_grades(rng, 60)
    scores = 0.05 + 0.3 * np.eye(3)[grades] + 0.2 * rng.random((*grades.shape, 3))
    scores[..., 2] *= 0.1
    fitted = weighted_loss(utils.cross_fitted_probabilities(scores, grades), grades)
    assert fitted < 0.6 * weighted_loss(prior_probabilities(grades), grades)
    assert fitted < 0.9 * weighted_loss(utils.yolo_probabilities(scores), grades)


def test_useless_scores_lose_nothing_against_the_class_prior():
    rng = np.random.default_rng(1)
    grades = draw_grades(rng, 60)
    scores = 0.1 + rng.random((*grades.shape, 3))
    base = weighted_loss(prior_probabilities(grades), grades)
    assert weighted_loss(utils.cross_fitted_probabilities(scores, grades), grades) < 1.05 * base
    assert weighted_loss(utils.yolo_probabilities(scores), grades) > 1.2 * base  # so the line above means something


def test_few_rows_do_not_spoil_good_scores():
    rng = np.random.default_rng(3)
    grades = rng.choice(3, size=(240, 5, 2), p=[0.7, 0.2, 0.1])
    # Exactly calibrated: the likelihood ratio of x ~ N(2 onehot, 1) is exp(2 x).
    scores = np.array([0.7, 0.2, 0.1]) * np.exp(2 * (2 * np.eye(3)[grades] + rng.normal(size=(*grades.shape, 3))))
    scores /= scores.sum(-1, keepdims=True)
    prior, plain = utils.severity_prior(grades), weighted_loss(utils.yolo_probabilities(scores), grades)
    fitted = [
        weighted_loss(
            utils.yolo_probabilities(scores, utils.fit_yolo_calibration(scores[i : i + 8], grades[i : i + 8], prior)),
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
    calibration = json.loads(json.dumps(utils.fit_yolo_calibration(scores, grades, utils.severity_prior(grades))))
    p = utils.yolo_probabilities(scores, calibration)
    assert np.isnan(p[0, 1]).all() and np.isfinite(np.delete(p.reshape(10, 3), 1, 0)).all()
    np.testing.assert_allclose(np.delete(p.reshape(10, 3), 1, 0).sum(-1), 1)


def test_default_probabilities_carry_the_weights():
    p = utils.yolo_probabilities(np.full((5, 1, 3), 0.3))
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
        utils.save_study(utils.Study(int(study_id), [volume]), root / "volumes" / f"{study_id}.safetensors")
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
    view = utils.YoloView((96.0, 64.0), utils.SAGITTAL_FIELD_MM / 96, 16.0, 3.0, (0.0, 12.0, 20.0), 6.0, 12.0)
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


def test_point_offsets_count_towards_the_own_side(dataset):
    points = pd.read_csv(dataset["dir"] / "points.csv")
    offsets = utils.fit_point_offsets(points, {i: boxes() for i in range(101, 105)})
    np.testing.assert_allclose(offsets["point_mm"], [0, 12, 20], atol=0.6)
    assert utils.fit_point_offsets(points, {}) is None


CHILD = """
import socket, sys, json
def refuse(*a, **k): raise RuntimeError("network attempt")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import torch
torch.set_num_threads(1)
import utils
kill = sys.argv[3] == "kill"
if kill:
    import os
    class Bar:
        def __init__(self, it): self.it, self.n = iter(it), 0
        def __iter__(self): return self
        def __next__(self):
            self.n += 1
            if self.n == 3: os._exit(9)
            return next(self.it)
    sys.modules[utils.train_yolo.__module__].progress = lambda it, *a, **k: Bar(it)
import shutil
from pathlib import Path
module = sys.modules[utils.train_yolo.__module__]
write = module._write_yolo
def keep_checkpoint(path, *rest):
    shutil.copy(Path(sys.argv[2]) / "run_nfn_0" / "weights" / "last.pt", Path(sys.argv[2]) / "kept.pt")
    write(path, *rest)
module._write_yolo = keep_checkpoint
path = utils.train_yolo(sys.argv[1], "nfn", 0, sys.argv[2], model="yolov10n.yaml", width=0.125, epochs=4, batch=4,
                        device="cpu")
print(path)
"""


@pytest.fixture(scope="module")
def trained(dataset):
    """Trained from a moved copy of the data set, killed after two epochs, continued: (weights, run folder,
    results.csv at the kill)."""
    moved = dataset["root"] / "elsewhere" / "nfn"
    shutil.copytree(dataset["dir"], moved)
    out = dataset["root"] / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(utils.__file__).parent), "OMP_NUM_THREADS": "1"}

    def child(how):
        return subprocess.run(
            [sys.executable, "-c", CHILD, moved, out, how], env=environment, capture_output=True, text=True, timeout=600
        )

    killed = child("kill")
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert not (out / "yolo_nfn_0.safetensors").exists()
    before = (out / "run_nfn_0" / "results.csv").read_text()
    finished = child("go")
    assert finished.returncode == 0, finished.stderr[-2000:]
    return out / "yolo_nfn_0.safetensors", out / "run_nfn_0", before


def test_training_resumes_after_a_kill(trained):
    weights, run, before = trained
    assert weights.exists()
    epochs = pd.read_csv(run / "results.csv")["epoch"].tolist()
    assert epochs == [1, 2, 3, 4]
    # The lines of the first two epochs, their times included, are those of the killed run.
    assert len(before.splitlines()) == 3 and (run / "results.csv").read_text().startswith(before)


def test_loaded_weights_predict_what_ultralytics_does(trained):
    weights, run, _ = trained
    detector = utils.load_yolo(weights)
    # The checkpoint is ultralytics' pickle, written by the fixture above.
    assert not (run / "weights").exists()
    reference = torch.load(run.parent / "kept.pt", weights_only=False)
    reference = (reference.get("ema") or reference["model"]).float().eval()
    x = torch.rand(2, 1, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, ours = detector.net(x)
        _, theirs = reference(x)
    for head in ("one2one", "one2many"):
        torch.testing.assert_close(ours[head]["scores"], theirs[head]["scores"], rtol=0, atol=1e-5)
    patches = (x[:, 0].numpy() * 255).astype(np.uint8)
    whole, centers = utils.dense_scores(detector, patches, batch=2)
    chunked, _ = utils.dense_scores(detector, patches, batch=1)
    np.testing.assert_allclose(whole, chunked, atol=1e-5)
    assert whole.shape == (2, 12 * 8 + 6 * 4 + 3 * 2, 3) == (2, len(centers), 3)


def test_anchor_centers_are_ultralytics_anchors(trained):
    detector = utils.load_yolo(trained[0])
    _, centers = utils.dense_scores(detector, np.zeros((1, 96, 64), np.uint8))
    with torch.no_grad():
        detector.net(torch.zeros(1, 1, 96, 64))
    head = detector.net.model[-1]
    anchors = (head.anchors * head.strides).T.numpy()
    np.testing.assert_allclose(centers, anchors - 0.5, atol=1e-4)  # ultralytics counts from the pixel's corner


def test_calibration_is_kept_with_the_weights(trained, tmp_path):
    copy = tmp_path / trained[0].name
    shutil.copy(trained[0], copy)
    before = utils.load_yolo(copy).net.state_dict()
    utils.store_yolo_calibration(copy, {"ridge": 3.0})
    detector = utils.load_yolo(copy)
    assert detector.about["calibration"] == {"ridge": 3.0}
    assert all(torch.equal(v, before[k]) for k, v in detector.net.state_dict().items())


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
