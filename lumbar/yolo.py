"""The YOLO detectors: data sets, training, dense class scores, side and level by geometry."""

import hashlib
import json
import logging
import os
import shutil
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from .geometry import boxes_from_table, place_points
from .names import CONDITIONS, DETECTORS, LEVELS, SEVERITIES, SEVERITY_WEIGHTS, progress
from .storage import DamagedFile, open_tensors, read_checkpoint, read_json, write_json, write_tensors
from .tables import some_of
from .views import choose_views, cross_fitted_views, deal_parts
from .volume import load_study, study_about
from .weights import Stated, check_network, read_weights

# A detector's classes are the three severities and nothing else. One sagittal slice cannot show its side and one
# axial slice barely shows its level, so both come from patient coordinates. It also makes a horizontal flip of an
# axial slice harmless: no class name carries a side.
#
# SCHEMES' second is there for comparison: whole slices, and a class for each condition, level and severity.
SCHEMES = ("severity", "original")


@dataclass(frozen=True)
class YoloView:
    """What one detector looks at. All lengths in millimetres.

    field_mm: (rows, columns) of the patch cut from a slice, at least; detail: its pixels per millimetre relative to
    the sagittal detectors'; box_mm: side of the square around a label point; label_reach_mm: slices this close to a
    labelled one carry its label too; point_mm: where the condition's points lie in the frame of a LevelBox, (head,
    lateral, back) from its centre, lateral counted towards the point's own side; reach_mm: slices at most this far
    from that point are looked at; gate_mm: anchors at most this far from it within the slice are counted, with a
    Gaussian of sigma gate_mm / 2.

    label_reach_mm matters most of all settings. Each level is labelled on one slice, and these differ: without it
    most discs that a patch shows would be unlabelled, and the detector would learn that they are background.
    """

    field_mm: tuple
    detail: float
    box_mm: float
    label_reach_mm: float
    point_mm: tuple
    reach_mm: float
    gate_mm: float


SAGITTAL_FIELD_MM = 208.0  # holds the five discs with a vertebra's margin

# Test-time views that may pay, the plain one first; what each is worth is measured on held-out studies
# (choose_detector_views). shift_px (down, right) moves the patch against the network's grid of cells, which is 8 px
# fine; zoom enlarges; mirror turns left and right round, which only axial patches look alike under, and the anchors'
# places with them; reach multiplies YoloView.reach_mm, so that slices next to the nearest ones have a say.
DETECTOR_VIEWS = {
    "scs": ({}, {"reach": 1.7}, {"shift_px": [4, 4]}, {"shift_px": [-3, 3]}, {"zoom": 1.06}, {"zoom": 0.94}),
    "nfn": ({}, {"reach": 1.7}, {"shift_px": [4, 4]}, {"shift_px": [-3, 3]}, {"zoom": 1.06}, {"zoom": 0.94}),
    "ss": (
        {},
        {"mirror": True},
        {"reach": 1.7},
        {"shift_px": [4, 4]},
        {"shift_px": [-3, 3], "mirror": True},
        {"zoom": 1.06},
        {"zoom": 0.94, "mirror": True},
    ),
}

# fit_point_offsets replaces point_mm by what the training labels say.
YOLO_VIEWS = {
    "scs": YoloView((SAGITTAL_FIELD_MM, 104.0), 1.0, 20.0, 5.5, (0.0, 0.0, 24.0), 6.0, 14.0),
    "nfn": YoloView((SAGITTAL_FIELD_MM, 104.0), 1.0, 20.0, 4.5, (5.0, 18.0, 22.0), 9.0, 14.0),
    "ss": YoloView((62.0, 62.0), 1.25, 16.0, 5.0, (0.0, 10.0, 22.0), 6.0, 10.0),
}

# AdamW with an equal nominal batch, a gentle warm-up and a strong class term trains from random weights within few
# epochs; no mosaic or scaling because every patch has the same millimetres a pixel. rect keeps patches unpadded.
YOLO_SETTINGS = {
    "optimizer": "AdamW",
    "lr0": 0.003,
    "lrf": 0.01,
    "cos_lr": True,
    "warmup_epochs": 1.0,
    "warmup_bias_lr": 0.003,
    "cls": 1.0,
    "cls_pw": 0.5,
    "mosaic": 0.0,
    "scale": 0.0,
    "translate": 0.05,
    "degrees": 0.0,
    "hsv_h": 0.0,
    "hsv_s": 0.0,
    "hsv_v": 0.0,
    "fliplr": 0.0,
    "flipud": 0.0,
    "erasing": 0.0,
    "auto_augment": None,
    "patience": 0,
}

ORIGINAL_BOX_PX = 20.0  # side of the original scheme's boxes on images of ORIGINAL_IMGSZ px
ORIGINAL_IMGSZ = 384
# ultralytics' usual flip, which the original scheme left on. It is wrong there: the picture changes sides, the class
# names do not, so that half of all axial examples teach the other side. Kept, because this is what is compared.
ORIGINAL_SETTINGS = {"fliplr": 0.5}


def yolo_shape_px(view, imgsz):
    """Shape of a detector's patches: ((rows, columns) in px, multiples of 32; mm per px).

    imgsz: rows of a sagittal patch in px; the other detectors follow from their view's field and detail.
    Raises ValueError when imgsz is no positive multiple of 32 (the largest stride).
    """
    if imgsz <= 0 or imgsz % 32:
        raise ValueError(f"image size {imgsz}: must be a positive multiple of 32, the detectors' largest stride")
    mm_per_px = SAGITTAL_FIELD_MM / imgsz / view.detail
    return tuple(int(32 * np.ceil(side / mm_per_px / 32 - 1e-6)) for side in view.field_mm), mm_per_px


def slice_patch(volume, index, center_lps_mm, shape_px, mm_per_px, shift_px=(0, 0)):
    """Cut an 8-bit patch with square pixels from one slice, turned so that rows run to the feet (sagittal) or to the
    back (axial) and columns to the back (sagittal) or to the patient's left (axial), however the series is stored.

    volume: Volume in the normalised scale (0 = 0.5th, 1 = 99.5th percentile). center_lps_mm: (3,), the point put in
    the middle of the patch; shift_px: (down, right), by which the patch is cut aside of it.
    Returns (patch (rows, columns) uint8, to_slice (3, 3)): to_slice maps homogeneous patch px (x, y, 1) to (column,
    row, 1) of the slice. Outside the slice the patch is 0.
    """
    step_row, step_column = volume.affine[:3, 1], volume.affine[:3, 2]
    down, right = (
        (np.array([0, 0, -1.0]), np.array([0, 1.0, 0]))
        if volume.plane == "sagittal"
        else (np.array([0, 1.0, 0]), np.array([1.0, 0, 0]))
    )
    height, width = volume.array.shape[1:]
    spacing_row, spacing_column = volume.spacing_mm[1:]
    new = max(1, round(height * spacing_row / mm_per_px)), max(1, round(width * spacing_column / mm_per_px))
    image = torch.from_numpy(np.asarray(volume.array[index], dtype=np.float32))[None, None]
    # Antialiasing matters: real matrices are up to three times finer than the patch.
    image = F.interpolate(image, size=new, mode="bilinear", align_corners=False, antialias=True)[0, 0].numpy()
    scale_x, scale_y = width / new[1], height / new[0]
    to_slice = np.array([[scale_x, 0, 0.5 * scale_x - 0.5], [0, scale_y, 0.5 * scale_y - 0.5], [0, 0, 1.0]])
    if step_row @ down < 0:
        image = image[::-1]
        to_slice = to_slice @ np.array([[1.0, 0, 0], [0, -1, new[0] - 1], [0, 0, 1]])
    if step_column @ right < 0:
        image = image[:, ::-1]
        to_slice = to_slice @ np.array([[-1.0, 0, new[1] - 1], [0, 1, 0], [0, 0, 1]])
    _, row, column = volume.lps_to_voxel(np.asarray(center_lps_mm, dtype=np.float64))
    middle = np.linalg.inv(to_slice) @ np.array([column, row, 1.0])
    x0 = int(round(middle[0] - (shape_px[1] - 1) / 2)) + int(shift_px[1])
    y0 = int(round(middle[1] - (shape_px[0] - 1) / 2)) + int(shift_px[0])
    patch = np.zeros(shape_px, dtype=np.float32)
    top, bottom = max(y0, 0), min(y0 + shape_px[0], new[0])
    left, right_end = max(x0, 0), min(x0 + shape_px[1], new[1])
    if top < bottom and left < right_end:
        patch[top - y0 : bottom - y0, left - x0 : right_end - x0] = image[top:bottom, left:right_end]
    to_slice = to_slice @ np.array([[1.0, 0, x0], [0, 1, y0], [0, 0, 1]])
    return (np.clip(patch, 0, 1) * 255 + 0.5).astype(np.uint8), to_slice


def letterbox_slice(volume, index, imgsz):
    """A whole slice as stored, in 8 bits, its longer side imgsz px, padded with ultralytics' grey to a square.

    volume: Volume in the normalised scale. Returns (image (imgsz, imgsz) uint8, to_slice (3, 3)), see slice_patch.
    """
    height, width = volume.array.shape[1:]
    new = [max(1, round(side * imgsz / max(height, width))) for side in (height, width)]
    slice_ = torch.from_numpy(np.asarray(volume.array[index], dtype=np.float32))[None, None]
    slice_ = F.interpolate(slice_, size=new, mode="bilinear", align_corners=False, antialias=True)[0, 0].numpy()
    image = np.full((imgsz, imgsz), 114, np.uint8)
    top, left = (imgsz - new[0]) // 2, (imgsz - new[1]) // 2
    image[top : top + new[0], left : left + new[1]] = (np.clip(slice_, 0, 1) * 255 + 0.5).astype(np.uint8)
    scale_x, scale_y = width / new[1], height / new[0]
    to_slice = [[scale_x, 0, (0.5 - left) * scale_x - 0.5], [0, scale_y, (0.5 - top) * scale_y - 0.5], [0, 0, 1]]
    return image, np.array(to_slice)


def original_names(condition):
    """The original scheme's classes of a detector: a name for each condition, level and severity, in this order."""
    return [
        f"{CONDITIONS[c]}_{level}_{grade}" for c in DETECTORS[condition][1] for level in LEVELS for grade in SEVERITIES
    ]


def yolo_examples(coordinates, study_ids, grades, condition):
    """Label points of one detector that have a grade.

    coordinates: table of read_coordinates; study_ids, grades: result of labels_to_array (grades (n, 5, 5), -1
    missing); condition: a key of DETECTORS. Returns a table study_id, series_id, instance_number, condition (index),
    level (index), x_px, y_px, grade (0..2). Points without a grade and grades without a point fall away.
    """
    conditions = DETECTORS[condition][1]
    points = coordinates[coordinates["condition"].isin([CONDITIONS[i] for i in conditions])].copy()
    points["condition"] = points["condition"].map({name: i for i, name in enumerate(CONDITIONS)}).astype(int)
    points["level"] = points["level"].map({name: i for i, name in enumerate(LEVELS)}).astype(int)
    rows = {int(s): i for i, s in enumerate(study_ids)}
    points = points[points["study_id"].isin(rows)]
    index = points["study_id"].map(rows).to_numpy(dtype=int)
    points["grade"] = np.asarray(grades)[index, points["condition"].to_numpy(), points["level"].to_numpy()]
    points = points[points["grade"] >= 0]
    columns = ["study_id", "series_id", "instance_number", "condition", "level", "x_px", "y_px", "grade"]
    return points[columns].sort_values(columns[:5], ignore_index=True)


def _locate_examples(study, points):
    """One study's label points that lie on a slice, with volume, slice and x_mm, y_mm, z_mm of place_points; and for
    each of the others why it does not."""
    placed = place_points(points, study)
    found = pd.concat([points.reset_index(drop=True), placed], axis=1)[placed["problem"] == ""]
    return found.drop(columns="problem"), placed.loc[placed["problem"] != "", "problem"].tolist()


def _near_slices(volume, index, reach_mm):
    """Indices of the slices of `volume` at most reach_mm from slice `index`, itself included."""
    n = volume.array.shape[0]
    away = np.abs(np.arange(n) - index) * volume.spacing_mm[0]
    return np.flatnonzero((away <= reach_mm) | (np.arange(n) == index))


def _severity_images(study, here, view, shape_px, mm_per_px):
    """Patches of one study's labelled slices, and of those within the labels' reach.

    here: of _locate_examples. Yields (volume, slice, patch, rows of `here` that it shows, class of each, (n, 2) px).
    """
    xyz = here[["x_mm", "y_mm", "z_mm"]].to_numpy()
    # Middle of the canal: left and right points of a level averaged, so that one-sided slices stay centred.
    midline = here.groupby("level")[["x_mm", "y_mm", "z_mm"]].mean().to_numpy()
    shown = {}
    for row, (v, k) in enumerate(zip(here["volume"], here["slice"])):
        for near in _near_slices(study.volumes[v], k, view.label_reach_mm):
            shown.setdefault((v, near), []).append(row)
    for (v, k), rows in shown.items():
        volume = study.volumes[v]
        center = midline.mean(axis=0)
        if volume.plane == "axial":
            own = np.unique(here["level"].to_numpy()[rows])
            center = here[here["level"].isin(own)].groupby("level")[["x_mm", "y_mm", "z_mm"]].mean().mean()
        patch, to_slice = slice_patch(volume, k, center, shape_px, mm_per_px)
        voxels = volume.lps_to_voxel(xyz[rows])
        xy = (np.linalg.inv(to_slice) @ np.c_[voxels[:, 2], voxels[:, 1], np.ones(len(rows))].T).T[:, :2]
        yield volume, k, patch, here["grade"].to_numpy()[rows], xy


def _original_images(study, here, condition, imgsz):
    """The labelled slices themselves, whole. Yields as _severity_images does."""
    first = DETECTORS[condition][1][0]
    for (v, k), rows in here.groupby(["volume", "slice"]):
        image, to_slice = letterbox_slice(study.volumes[v], k, imgsz)
        xy = (np.linalg.inv(to_slice) @ np.c_[rows[["x_px", "y_px"]], np.ones(len(rows))].T).T[:, :2]
        cell = (rows["condition"].to_numpy() - first) * len(LEVELS) + rows["level"].to_numpy()
        yield study.volumes[v], k, image, cell * len(SEVERITIES) + rows["grade"].to_numpy(), xy


def write_yolo_dataset(
    out_dir,
    condition,
    volumes_dir,
    coordinates,
    study_ids,
    grades,
    folds,
    imgsz=384,
    view=None,
    scheme="severity",
):
    """Write one detector's data set in YOLO's folder layout.

    out_dir gets images/*.png (8-bit grey, all of one shape), labels/*.txt (class xc yc w h, relative), points.csv
    (every label point in LPS mm), train_<fold>.txt and val_<fold>.txt (paths relative to the list: the folder can be
    moved), and dataset.json, written last.

    condition: a key of DETECTORS. volumes_dir: folder of <study_id>.safetensors (save_study). coordinates: table of
    read_coordinates. study_ids, grades: of labels_to_array. folds: table study_id, fold.
    scheme: "severity": patches with square millimetres of the labelled slices and their neighbours, class = severity,
    see YoloView; imgsz as in yolo_shape_px; view: a YoloView, by default YOLO_VIEWS[condition]. "original": the
    labelled slices alone, whole, imgsz px square, classes of original_names, boxes of ORIGINAL_BOX_PX at 384 px.
    A point that lies on no slice of its study (see place_points), and a study without a volume file, costs only itself:
    it is left out, counted (without_slice) and printed.
    A finished folder of the same settings, points and volumes is left alone. Returns the content of dataset.json.
    Raises FileNotFoundError when no study has a volume file, ValueError when nothing could be labelled.
    """
    from PIL import Image

    if scheme not in SCHEMES:
        raise ValueError(f"SCHEME must be one of {', '.join(SCHEMES)}, not {scheme!r}")
    out_dir, volumes_dir = Path(out_dir), Path(volumes_dir)
    points = yolo_examples(coordinates, study_ids, grades, condition)
    fold_of = dict(zip(folds["study_id"].astype(int), folds["fold"].astype(int)))
    points = points[points["study_id"].isin(fold_of)]
    paths = {study_id: volumes_dir / f"{study_id}.safetensors" for study_id in sorted(points["study_id"].unique())}
    without_volumes = [study_id for study_id, path in paths.items() if not path.is_file()]
    if paths and len(without_volumes) == len(paths):
        raise FileNotFoundError(
            f"{paths[without_volumes[0]]}: no volumes for a labelled study; run 01_preprocess for it first"
        )
    view = view or YOLO_VIEWS[condition]
    if scheme == "original":
        shape_px, mm_per_px, side_px = (imgsz, imgsz), None, ORIGINAL_BOX_PX * imgsz / ORIGINAL_IMGSZ
        own = {"names": original_names(condition), "box_px": side_px}
    else:
        shape_px, mm_per_px = yolo_shape_px(view, imgsz)
        side_px = view.box_mm / mm_per_px
        own = {"names": list(SEVERITIES), "box_mm": view.box_mm, "label_reach_mm": view.label_reach_mm}
    settings = own | {
        "condition": condition,
        "scheme": scheme,
        "imgsz": max(shape_px),
        "shape_px": list(shape_px),
        "mm_per_px": mm_per_px,
        "points": len(points),
        "folds": sorted(set(fold_of.values())),
        "studies": len(fold_of),
        "content": _content(points, fold_of, [path for path in paths.values() if path.is_file()]),
    }
    done = out_dir / "dataset.json"
    if done.exists():
        old = {"scheme": "severity"} | json.loads(done.read_text())
        if all(old.get(key) == value for key, value in settings.items()):
            return old
    for name in ("images", "labels"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
        (out_dir / name).mkdir(parents=True)
    done.unlink(missing_ok=True)
    lists = {fold: {"train": [], "val": []} for fold in settings["folds"]}
    located, outside, unplaced = [], 0, []
    for study_id, of_study in progress(points.groupby("study_id"), f"yolo {condition}", points["study_id"].nunique()):
        if study_id in without_volumes:
            unplaced += [f"study {study_id}: no volumes"] * len(of_study)
            continue
        study = load_study(paths[study_id], [DETECTORS[condition][0]])
        here, problems = _locate_examples(study, of_study)
        unplaced += problems
        if here.empty:
            continue
        located.append(here)
        images = (
            _original_images(study, here, condition, imgsz)
            if scheme == "original"
            else _severity_images(study, here, view, shape_px, mm_per_px)
        )
        for volume, k, image, classes, xy in images:
            inside = ((xy >= 0) & (xy <= np.array(shape_px[::-1]) - 1)).all(axis=1)
            outside += int((~inside).sum())
            if not inside.any():
                continue
            name = f"{study_id}_{volume.series_id}_{volume.block}_{int(volume.instance_numbers[k])}"
            Image.fromarray(image).save(out_dir / "images" / f"{name}.png")
            lines = _label_lines(classes[inside], xy[inside], side_px, shape_px)
            (out_dir / "labels" / f"{name}.txt").write_text("\n".join(lines) + "\n")
            for fold in lists:
                lists[fold]["val" if fold_of[int(study_id)] == fold else "train"].append(f"./images/{name}.png")
    which = some_of(dict.fromkeys(unplaced), between="; ")
    if not located:
        raise ValueError(
            f"no label point of '{condition}' lies in a cached series of {volumes_dir} ({which or 'none graded'}): "
            "check that series and instance numbers of the coordinates match the volumes"
        )
    if unplaced:
        print(f"yolo {condition}: {len(unplaced)} of {len(points)} label points are left out: {which}")
    pd.concat(located).drop(columns=["volume", "slice"]).to_csv(out_dir / "points.csv", index=False)
    for fold, parts in lists.items():
        for part, names in parts.items():
            (out_dir / f"{part}_{fold}.txt").write_text("\n".join(sorted(names)) + "\n")
    result = settings | {
        "images": sum(len(p["val"]) for p in lists.values()),
        "outside_field": outside,
        "without_slice": len(unplaced),
    }
    write_json(done, result)
    return result


def _content(points, fold_of, paths):
    """A hash of what a data set is made of besides its settings: it changes when a table or a study is mended."""
    digest = hashlib.sha256(points.to_csv(index=False).encode())
    digest.update(json.dumps(sorted(fold_of.items())).encode())
    for path in paths:
        digest.update(json.dumps(study_about(path), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _label_lines(classes, xy, side_px, shape_px):
    """Lines of YOLO's label file: squares of side_px around the points xy (n, 2), cut at the image's border."""
    lines = []
    for cls, (x, y) in zip(classes, xy):
        low = np.maximum([x + 0.5 - side_px / 2, y + 0.5 - side_px / 2], 0)
        high = np.minimum([x + 0.5 + side_px / 2, y + 0.5 + side_px / 2], shape_px[::-1])
        box = np.r_[(low + high) / 2, high - low] / np.r_[shape_px[::-1], shape_px[::-1]]
        lines.append(f"{cls} " + " ".join(f"{value:.6f}" for value in box))
    return list(dict.fromkeys(lines))


def fit_point_offsets(points, boxes):
    """Where a detector's label points lie relative to the located levels.

    points: points.csv of write_yolo_dataset; boxes: dict study_id -> list of five LevelBox. Returns
    {"point_mm": (head, lateral, back) medians in mm, "spread_mm": 1.4826 x median absolute deviation, "n": rows},
    lateral counted towards the point's own side. Points more than 40 mm from their box are left out (wrong level
    names exist). Returns None with fewer than 10 usable points.
    """
    offsets = []
    for row in points.itertuples():
        if int(row.study_id) not in boxes:
            continue
        box = boxes[int(row.study_id)][int(row.level)]
        head, left, back = box.from_lps([row.x_mm, row.y_mm, row.z_mm])
        offsets.append((head, left * _side_sign(int(row.condition)), back))
    offsets = np.array(offsets).reshape(-1, 3)
    offsets = offsets[np.linalg.norm(offsets, axis=1) < 40]
    if len(offsets) < 10:
        return None
    middle = np.median(offsets, axis=0)
    spread = 1.4826 * np.median(np.abs(offsets - middle), axis=0)
    return {"point_mm": middle.tolist(), "spread_mm": spread.tolist(), "n": len(offsets)}


def _side_sign(condition):
    """+1 for a left condition, -1 for a right one, 0 in the midline (condition: index in CONDITIONS)."""
    return {"left": 1.0, "right": -1.0}.get(CONDITIONS[condition].split("_")[0], 0.0)


def prepare_ultralytics(config_dir):
    """Set the environment under which ultralytics never tries the network, then import and return it.

    config_dir: a writable folder for its settings and font. Must be called before any other import of ultralytics
    (RuntimeError otherwise, unless that import was prepared as well).
    """
    import sys

    import matplotlib

    config_dir = Path(config_dir)
    if "ultralytics" in sys.modules and os.environ.get("YOLO_OFFLINE") != "1":
        raise RuntimeError(
            "ultralytics was imported before prepare_ultralytics: it may use the network. "
            "Call prepare_ultralytics first, in a fresh process."
        )
    if "ultralytics" not in sys.modules:
        os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="0", YOLO_CONFIG_DIR=str(config_dir.resolve()))
        os.environ["ULTRALYTICS_SAFE_LOAD"] = (
            "1"  # should it ever open a checkpoint or build a network, it evaluates none
        )
        font = config_dir / "Ultralytics" / "Arial.ttf"
        font.parent.mkdir(parents=True, exist_ok=True)
        if not font.exists():
            shutil.copy(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", font)
    import ultralytics

    logging.getLogger("ultralytics").setLevel(logging.WARNING)
    return ultralytics


def find_yolo_description(model):
    """Path of a model description that ultralytics ships, by its name (yolov10x.yaml; for families with one file for
    all sizes that file). Raises ValueError for other names: weights can only be loaded of networks that are known."""
    model = str(model)
    stem, ending = model.removesuffix(".yaml"), model[-5:]
    # A family's file has no size in its name: yolov8n.yaml is described in yolov8.yaml.
    for name in (model, f"{stem[:-1]}.yaml" if stem[-1:] in tuple("nsmblx") else model):
        found = [path for path in _shipped_descriptions() if path.name == name]
        if found and ending == ".yaml":
            return found[0]
    known = ", ".join(path.name for path in _shipped_descriptions() if path.name.startswith("yolov10"))
    raise ValueError(f"MODEL {model!r} is no description that ultralytics ships, as are {known}")


def _shipped_descriptions():
    """All model descriptions in ultralytics' package, sorted."""
    # Looked up, not imported: its first import decides where it keeps its settings (see prepare_ultralytics).
    return sorted((Path(find_spec("ultralytics").origin).parent / "cfg/models").rglob("*.yaml"))


@cache
def _shipped_cfg(path):
    """A description's contents, if it is of a detector as _network_scores reads them; otherwise None."""
    import yaml

    cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    return cfg if cfg["head"][-1][2] in ("Detect", "v10Detect") else None


def _yolo_model_yaml(model, width, folder):
    """Write ultralytics' description `model` into a folder, with another width factor if one is given (a slimmer
    network for a CPU). Returns its path; its name says the size."""
    import yaml

    description = yaml.safe_load(find_yolo_description(model).read_text(encoding="utf-8"))
    if width is not None:
        letter = Path(model).stem[-1]
        depth, _, channels = description["scales"][letter]
        description["scales"] = {letter: [depth, float(width), channels]}
    path = Path(folder) / model
    path.write_text(yaml.safe_dump(description), encoding="utf-8")
    return str(path)


def yolo_device(device, batch):
    """ultralytics' name of a device: "cpu", or numbers of GPUs, "0" or "0,1". None or "auto": all GPUs, if there are
    any, as far as each gets an image of the batch. With several, ultralytics starts a process for each, which takes its
    share of the batch."""
    if device in (None, "auto", "cuda"):
        return ",".join(map(str, range(min(torch.cuda.device_count(), int(batch))))) or "cpu"
    return str(device)


def train_yolo(
    dataset_dir,
    condition,
    fold,
    out_dir,
    model="yolov10x.yaml",
    width=None,
    epochs=100,
    batch=16,
    seed=0,
    device="auto",
    workers=4,
    initial_weights=None,
    point_offsets=None,
    prior=None,
    settings=None,
):
    """Train one detector on one fold from random (or given) weights and write yolo_<condition>_<fold>.safetensors.

    dataset_dir: of write_yolo_dataset. model: name of an ultralytics description; width: other width factor (None =
    the description's). initial_weights: a file of this function to start from (shapes that differ are skipped).
    point_offsets: result of fit_point_offsets, prior: (5, 5, 3) of class_prior; both are kept with the weights.
    settings: changes to YOLO_SETTINGS (ultralytics' names). device: of yolo_device.

    A killed run continues with its last finished epoch when called again with the same arguments, and ends as it would
    have ended (see PatchTrainer); a finished one returns at once. What is shipped are the averaged (EMA) weights of the
    last epoch: mAP on a handful of validation studies is no good guide to log loss. What an unfinished training needs
    is in out_dir/setup_<condition>_<fold>, without a pickle. Returns the path of the weights.
    Raises FileNotFoundError without a data set or an empty training list, ValueError for an unknown model, or initial
    weights that cannot be used.
    """
    dataset_dir, out_dir = Path(dataset_dir).resolve(), Path(out_dir).resolve()
    if not (dataset_dir / "dataset.json").exists():
        raise FileNotFoundError(
            f"{dataset_dir}: no dataset.json, the data set is missing or unfinished; run 01_preprocess"
        )
    info = read_json(dataset_dir / "dataset.json", "run 01_preprocess again")
    for part in ("train", "val"):
        listing = dataset_dir / f"{part}_{fold}.txt"
        if not listing.exists() or not listing.read_text().strip():
            raise FileNotFoundError(f"{listing}: no images in this list; folds of the data set: {info['folds']}")
    device = yolo_device(device, batch)
    scheme = info.get("scheme", "severity")
    chosen = YOLO_SETTINGS | (ORIGINAL_SETTINGS if scheme == "original" else {}) | (settings or {})
    arguments = {
        "dataset": info,
        "fold": int(fold),
        "model": str(model),
        "width": width,
        "epochs": int(epochs),
        "batch": int(batch),
        "seed": int(seed),
        "settings": chosen,
        "initial_weights": None if initial_weights is None else str(initial_weights),
    }
    weights = out_dir / f"yolo_{condition}_{fold}.safetensors"
    if _arguments_of(weights) == json.loads(json.dumps(arguments)):
        return weights
    find_yolo_description(model)
    if initial_weights is not None:
        read_weights(initial_weights, "metadata", _REMEDY)  # unusable ones end here, not in a process for each GPU
    out_dir.mkdir(parents=True, exist_ok=True)
    prepare_ultralytics(out_dir / "ultralytics")
    run = out_dir / f"run_{condition}_{fold}"
    # Not in the run's own folder: ultralytics empties that before it starts processes for several GPUs.
    setup = out_dir / f"setup_{condition}_{fold}"
    begun, state = setup / "arguments.json", setup / "state.pt"
    if not _holds(begun, json.loads(json.dumps(arguments))):
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(setup, ignore_errors=True)
        setup.mkdir()
        write_json(begun, arguments)
    # Absolute paths are written here, not with the data set, so that a moved data set still trains.
    data_yaml = setup / f"data_{fold}.yaml"
    data_yaml.write_text(
        json.dumps(
            {
                "path": str(dataset_dir),
                "train": str(dataset_dir / f"train_{fold}.txt"),
                "val": str(dataset_dir / f"val_{fold}.txt"),
                "nc": len(info["names"]),
                "channels": 1,
                "names": dict(enumerate(info["names"])),
                "initial_weights": arguments["initial_weights"] and str(Path(initial_weights).resolve()),
                "state": str(state),
                "title": f"yolo {condition} fold {fold}",
            }
        )
    )
    saved = read_checkpoint(state)
    if saved is None:
        state.unlink(missing_ok=True)
    if saved is None or saved["epoch"] + 1 < int(epochs):
        overrides = {
            "task": "detect",
            "mode": "train",
            "model": _yolo_model_yaml(model, width, setup),
            "data": str(data_yaml),
            "imgsz": info["imgsz"],
            "epochs": int(epochs),
            "batch": int(batch),
            "nbs": int(batch),
            "seed": int(seed),
            "device": device,
            "workers": 0 if device == "cpu" else workers,
            "cache": "ram",
            "amp": device != "cpu",
            "pretrained": False,
            "plots": False,
            "verbose": False,
            "project": str(out_dir),
            "name": run.name,
            "exist_ok": True,
            "val": device != "cpu",
            **chosen,
        }
        from .yolo_trainer import PatchTrainer

        PatchTrainer(overrides=overrides).train()
        saved = read_checkpoint(state)
    metadata = {
        "kind": "yolo",
        "condition": condition,
        "fold": int(fold),
        "cfg": saved["cfg"],
        "scheme": scheme,
        "names": info["names"],
        "channels": 1,
        "shape_px": info["shape_px"],
        "mm_per_px": info["mm_per_px"],
        "imgsz": info["imgsz"],
        "point_offsets": point_offsets,
        "prior": None if prior is None else np.asarray(prior).tolist(),
        "calibration": None,
        "views": [{}],
        "arguments": arguments,
        "licence": "AGPL-3.0 (ultralytics)",
    }
    # Half the size and exact enough; nothing is beyond what half precision holds but what would round to infinity.
    averaged = {k: v.half().nan_to_num() if v.is_floating_point() else v for k, v in saved["ema"].items()}
    _write_yolo(weights, averaged, metadata)
    shutil.rmtree(run / "weights", ignore_errors=True)  # ultralytics makes it and nothing is in it
    state.unlink()
    return weights


# What to do about weights that cannot be used, after the file's name and what is wrong with it.
_REMEDY = "give a detector's file as 03_train_yolo wrote it (attach its output again, or train again)"


def _arguments_of(weights):
    """What a weights file was trained with, None without a readable one."""
    try:
        return _read_yolo_metadata(weights).get("arguments")
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        print(f"{error}. It is trained again now.")
        return None


def _holds(path, data):
    """Whether a JSON file holds this."""
    try:
        return read_json(path) == data
    except (FileNotFoundError, DamagedFile):
        return False


def _write_yolo(path, state, metadata):
    """Write tensors + JSON metadata, complete or not at all."""
    write_tensors(path, state, "metadata", metadata)


def _read_yolo_metadata(path):
    with open_tensors(path, "metadata", _REMEDY, whose="a detector's") as (about, _):
        return about


def store_yolo_calibration(path, calibration, views=({},)):
    """Put a calibration (of fit_yolo_calibration), and the views whose mean scores it is for, into a weights file of
    train_yolo."""
    state, metadata = read_weights(path, "metadata", _REMEDY, "a detector's")
    changed = json.loads(json.dumps(metadata | {"calibration": calibration, "views": list(views)}))
    if changed != metadata:
        _write_yolo(path, state, changed)


@dataclass
class YoloDetector:
    """A loaded detector: net (ultralytics DetectionModel in eval mode), about (the file's metadata)."""

    net: torch.nn.Module
    about: dict

    @property
    def condition(self):
        return self.about["condition"]

    @property
    def original(self):
        """True of a detector that was trained in the original scheme."""
        return self.about.get("scheme") == "original"

    @property
    def view(self):
        """Its YoloView, with point_mm from the training labels where they were fitted."""
        offsets = self.about.get("point_offsets")
        default = YOLO_VIEWS[self.condition]
        return replace(default, point_mm=tuple(offsets["point_mm"])) if offsets else default


def load_yolo(path, device="cpu", config_dir=None):
    """Rebuild a detector from a file of train_yolo. Returns YoloDetector.

    The network is one that ultralytics ships: of the file only its name and numbers count, and nothing is evaluated.
    config_dir: writable folder for ultralytics' settings, by default one in the system's temporary folder.
    Raises FileNotFoundError when there is no file, DamagedFile (a ValueError) when it is no detector, describes another
    network than ultralytics does, states numbers out of range, or has values that are not finite.
    """
    import tempfile

    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such weights file; run 03_train_yolo or name the weights folder")
    state, meta = read_weights(path, "metadata", _REMEDY, "a detector's")
    _check_yolo(Stated(path, meta, _REMEDY))
    cfg = _known_cfg(path, meta)
    prepare_ultralytics(config_dir or Path(tempfile.gettempdir()) / "ultralytics_config")
    from ultralytics.nn.tasks import DetectionModel, parse_model

    def layers():
        return torch.nn.ModuleDict({"model": parse_model(deepcopy(cfg), 1, verbose=False)[0]})

    check_network(path, layers, state, _REMEDY)
    net = DetectionModel(deepcopy(cfg), ch=1, nc=len(meta["names"]), verbose=False)
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    net.names = dict(enumerate(meta["names"]))
    return YoloDetector(net.to(device).eval(), meta)


def _check_yolo(stated):
    """Refuse a file of which yolo_views or yolo_scores would make something else than was trained."""
    stated.choice("kind", ("yolo",))
    condition = stated.choice("condition", tuple(DETECTORS))
    scheme = stated.choice("scheme", SCHEMES, optional=True)
    stated.choice("names", (original_names(condition) if scheme == "original" else list(SEVERITIES),))
    stated.choice("channels", (1,))
    for side in stated.numbers("shape_px", (2,), 32, 2048, whole=True):
        if side % 32:
            stated.refuse("shape_px", "multiples of 32")
    stated.number("mm_per_px", 0.01, 100, optional=scheme == "original")
    stated.number("imgsz", 32, 2048, whole=True, optional=scheme != "original")
    stated.numbers("prior", (len(CONDITIONS), len(LEVELS), len(SEVERITIES)), 0, 1, optional=True)
    offsets = stated.part("point_offsets", optional=True)
    if offsets is not None:
        offsets.numbers("point_mm", (3,), -1000, 1000)
    for view in stated.parts("views", 100, optional=True):
        view.keys(("shift_px", "zoom", "mirror", "reach"))
        view.numbers("shift_px", (2,), -512, 512, optional=True)
        view.number("zoom", 0.2, 5, optional=True)
        view.number("reach", 0, 20, optional=True)
        view.choice("mirror", (True, False), optional=True)
    calibration = stated.part("calibration", optional=True)
    if calibration is not None:
        calibration.number("trust", 0, 1, optional=True)
        calibration.numbers("prior", (len(LEVELS), len(SEVERITIES)), 1e-12, 1, optional=True)
        calibration.numbers("scale", (2,), 1e-12, 1e6, optional=True)
        for name, shape in (("mean", (2,)), ("matrix", (2, 2)), ("bias", (2,))):
            calibration.numbers(name, shape, -1e6, 1e6, optional=True)


def _known_cfg(path, meta):
    """ultralytics' own description of the network that a weights file states, with the file's width and classes.

    By the name that the file gives; among all that ultralytics ships where it gives none. Every other word of the
    file's description has to be the same: parse_model evaluates some of them. Raises DamagedFile.
    """
    stated, arguments = Stated(path, meta, _REMEDY).part("cfg").about, meta.get("arguments")
    name = arguments.get("model") if isinstance(arguments, dict) else stated.get("yaml_file")
    own = {key: value for key, value in stated.items() if key != "yaml_file"}
    try:
        known = [find_yolo_description(Path(name).name)]
    except (ValueError, TypeError):
        known = _shipped_descriptions()
    different = []
    for cfg in filter(None, map(_shipped_cfg, known)):
        scales, letter = cfg.get("scales"), own.get("scale")
        cfg = cfg | {"nc": len(meta["names"]), "channels": 1}
        if isinstance(letter, str) and letter in {"", *(scales or ())}:
            cfg["scale"] = letter
        if scales and own.get("scales") != scales and isinstance(own.get("scales"), dict) and len(own["scales"]) == 1:
            letter, numbers = next(iter(own["scales"].items()))  # of a training with WIDTH
            if letter in scales and isinstance(numbers, list) and len(numbers) == 3:
                depth, _, channels = scales[letter]
                Stated(path, {"width": numbers[1]}, _REMEDY).number("width", 0.01, 4)
                cfg["scales"] = {letter: [depth, numbers[1], channels]}
        keys = sorted(key for key in cfg.keys() | own.keys() if not _same(cfg.get(key), own.get(key)))
        if not keys:
            return cfg
        different = different or keys
    what = f": {', '.join(different)} in it is not as in {known[0].name}" if len(known) == 1 else ""
    raise DamagedFile(
        f"{path} describes a network (cfg) that ultralytics does not ship{what}. Nothing of it was built: {_REMEDY}"
    )


def _same(one, other):
    """Whether two values are alike as JSON, 1 and true not being so."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _anchor_centers(detector, rows, columns):
    """Centres (anchors, 2) x, y in px of the cells of an image's anchors, in the network's order."""
    centers = []
    for stride in detector.net.stride.int().tolist():
        x = (np.arange(columns // stride) + 0.5) * stride - 0.5
        y = (np.arange(rows // stride) + 0.5) * stride - 0.5
        centers.append(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2))
    return np.concatenate(centers)


def _network_scores(detector, patches):
    """Class scores (n, anchors, classes) float32 of patches (n, rows, columns) uint8, in one batch."""
    with torch.inference_mode():
        x = torch.from_numpy(patches).to(next(detector.net.parameters()).device)[:, None].float() / 255
        _, raw = detector.net(x)
        heads = [raw[name]["scores"] for name in ("one2one", "one2many") if name in raw] or [raw["scores"]]
        return torch.stack([h.sigmoid() for h in heads]).mean(0).permute(0, 2, 1).float().cpu().numpy()


def dense_scores(detector, patches, batch=16):
    """Class scores of every anchor, without threshold or NMS.

    patches: (n, rows, columns) uint8. Returns (scores (n, anchors, classes) float32 in 0..1, centers_px (anchors, 2):
    x, y of the anchors' cells in patch px). The mean of the one-to-one and the one-to-many head: they are trained
    differently and their errors differ. Runs in chunks of `batch`.
    """
    centers = _anchor_centers(detector, *patches.shape[1:])
    found = [_network_scores(detector, patches[start : start + batch]) for start in range(0, len(patches), batch)]
    empty = np.zeros((0, len(centers), len(detector.about["names"])), np.float32)
    return (np.concatenate(found) if found else empty), centers


def yolo_views(detector, study, boxes, change=None):
    """The patches a detector needs to judge a study, and what each is for.

    boxes: five LevelBox in the order of LEVELS; change: a dict as in DETECTOR_VIEWS, by default none. Returns
    (patches (n, rows, columns) uint8, views): views is a list of dicts volume (index in study.volumes), slice,
    to_slice (3, 3), reach_mm, targets: list of (level, side, expected point LPS (3,), distance of the slice from it in
    mm). One patch serves all targets of a sagittal slice; an axial slice is cut once for every level it may show.
    """
    view, change = detector.view, change or {}
    unknown = set(change) - {"shift_px", "zoom", "mirror", "reach"}
    if unknown:
        raise ValueError(f"a detector's view has no {', '.join(sorted(unknown))}")
    mm_per_px = detector.about["mm_per_px"] / change.get("zoom", 1.0)
    shift_px = np.asarray(change.get("shift_px", (0, 0)))
    description, conditions = DETECTORS[detector.condition]
    expected = np.zeros((len(LEVELS), len(conditions), 3))
    for level, box in enumerate(boxes):
        for side, condition in enumerate(conditions):
            head, lateral, back = view.point_mm
            local = np.array([head, lateral * _side_sign(condition), back])
            expected[level, side] = box.to_lps(local)
    patches, views = [], []
    shape_px = tuple(detector.about["shape_px"])
    for v, volume in enumerate(study.volumes):
        if volume.description != description:
            continue
        n, height, width = volume.array.shape
        wanted = {}
        for level in range(len(LEVELS)):
            for side in range(len(conditions)):
                slice_, row, column = volume.lps_to_voxel(expected[level, side])
                away = np.abs(np.arange(n) - slice_) * volume.spacing_mm[0]
                # A stack with gaps wider than the reach still shows the level in its nearest slice.
                reach = max(view.reach_mm * change.get("reach", 1.0), 0.51 * volume.spacing_mm[0])
                if not (0 <= row < height and 0 <= column < width):
                    continue
                for k in np.flatnonzero(away <= reach):
                    key = (int(k), level if volume.plane == "axial" else -1)
                    wanted.setdefault(key, []).append((level, side, expected[level, side], float(away[k])))
        for (k, level), targets in sorted(wanted.items()):
            center = expected.mean(axis=(0, 1)) if level < 0 else expected[level].mean(axis=0)
            patch, to_slice = slice_patch(volume, k, center, shape_px, mm_per_px, shift_px)
            if change.get("mirror"):
                patch = patch[:, ::-1]
                to_slice = to_slice @ np.array([[-1.0, 0, shape_px[1] - 1], [0, 1, 0], [0, 0, 1]])
            patches.append(patch)
            reach_mm = view.reach_mm * change.get("reach", 1.0)
            views.append({"volume": v, "slice": k, "to_slice": to_slice, "targets": targets, "reach_mm": reach_mm})
    return (np.stack(patches) if patches else np.zeros((0, *shape_px), np.uint8)), views


def _study_patches(detector, study, boxes, views):
    """One study's patches under each view: list of (number of the view, patch (rows, columns) uint8, its use)."""
    if not detector.original:
        return [
            (number, patch, seen)
            for number, change in enumerate(views)
            for patch, seen in zip(*yolo_views(detector, study, boxes, change), strict=True)
        ]
    description, imgsz = DETECTORS[detector.condition][0], detector.about["imgsz"]
    own = [volume for volume in study.volumes if volume.description == description]
    return [(0, letterbox_slice(volume, k, imgsz)[0], None) for volume in own for k in range(len(volume.array))]


def _add_severity_scores(detector, study, seen, scores, centers, total, weight):
    """Add what one patch says of its targets to total (5, sides, 3) and weight (5, sides, 1)."""
    view, volume = detector.view, study.volumes[seen["volume"]]
    columns_rows = (seen["to_slice"] @ np.c_[centers, np.ones(len(centers))].T).T
    at_lps = volume.voxel_to_lps(np.c_[np.full(len(centers), seen["slice"]), columns_rows[:, 1], columns_rows[:, 0]])
    normal = volume.affine[:3, 0] / np.linalg.norm(volume.affine[:3, 0])
    for level, side, point, away in seen["targets"]:
        offset = at_lps - point
        offset -= (offset @ normal)[:, None] * normal
        distance = np.linalg.norm(offset, axis=1)
        gate = np.where(distance <= view.gate_mm, np.exp(-0.5 * (2 * distance / view.gate_mm) ** 2), 0)
        near = np.exp(-0.5 * (away / max(seen["reach_mm"] / 2, 1e-6)) ** 2)
        total[level, side] += near * (gate[:, None] * scores).sum(axis=0)
        weight[level, side] += near


def _pooled_scores(detector, studies, patches, views, batch):
    """Raw scores of studies from their patches (of _study_patches), all in common batches: list of arrays as in
    yolo_scores."""
    shape = (len(views), len(LEVELS), len(DETECTORS[detector.condition][1]), len(SEVERITIES))
    total, weight = np.zeros((len(studies), *shape)), np.zeros((len(studies), *shape[:3], 1))
    queue = [(n, *item) for n, own in enumerate(patches) for item in own]
    centers = _anchor_centers(detector, *detector.about["shape_px"])
    for start in range(0, len(queue), batch):
        chunk = queue[start : start + batch]
        for (n, view, _, seen), scores in zip(chunk, _network_scores(detector, np.stack([item[2] for item in chunk]))):
            if detector.original:
                best = scores.max(axis=0).reshape(shape[2], shape[1], shape[3]).transpose(1, 0, 2)
                total[n, view], weight[n, view] = np.maximum(total[n, view], best), 1
            else:
                _add_severity_scores(detector, studies[n], seen, scores, centers, total[n, view], weight[n, view])
    with np.errstate(invalid="ignore", divide="ignore"):
        return list(np.where(weight > 0, total / weight, np.nan))


def without_frames(error):
    """The exception without the frames it came through, and those of what it came of: they keep tensors alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def yolo_scores(detector, studies, boxes, views=({},), batch=16):
    """Raw severity scores of studies under each view: list of (views, 5 levels, sides, 3 severities) float64, NaN where
    no slice shows a level. An entry is the Exception instead where that study failed; the others are not harmed.

    Every anchor of every slice within reach of a level counts, weighted by a Gaussian of its in-slice distance from
    the place where the condition's points lie at that level (patient mm, so side and level follow from geometry).
    Per slice and class the weighted scores are summed; slices are averaged with a Gaussian weight of their distance.
    A detector of the original scheme gives the best score of each class over all anchors and slices: no geometry.
    Sides are in the order of DETECTORS[condition]: canal one, else left and right. boxes: five LevelBox a study (the
    original scheme needs none: None). The network sees the patches of all studies in common batches of `batch`.
    """
    views = [{}] if detector.original else list(views)
    result = []
    for study, own in zip(studies, boxes, strict=True):
        try:
            result.append(_study_patches(detector, study, own, views))
        except Exception as error:
            result.append(without_frames(error))
    good = [n for n, patches in enumerate(result) if not isinstance(patches, Exception)]

    def pooled(numbers):
        return _pooled_scores(detector, [studies[n] for n in numbers], [result[n] for n in numbers], views, batch)

    try:
        found = pooled(good)
    except Exception:  # whose fault it was shows one by one, and not in here, where its tensors are still held
        found = None
    if found is None:
        found = []
        for n in good:
            try:
                found += pooled([n])
            except Exception as error:
                found.append(without_frames(error))
    for n, scores in zip(good, found):
        result[n] = scores
    return result


def mean_scores(scores):
    """Geometric mean over views: scores (views, ...) -> (...), of those that say anything; NaN where none does.

    A calibration's logits are linear in the log scores, so calibrating this mean is the same as averaging the log
    probabilities of the views, each with that calibration, and normalising.
    """
    logs = np.log(np.clip(np.asarray(scores, dtype=np.float64), 1e-6, None))
    there = np.isfinite(logs)
    count = there.sum(axis=0)
    mean = np.exp(np.where(there, logs, 0).sum(axis=0) / np.maximum(count, 1))
    return np.where(count > 0, mean, np.nan)


def choose_detector_views(grades, scores, condition, views):
    """Which of a detector's test-time views pay on held-out studies. See choose_views and cross_fitted_views.

    grades: (n, 5 conditions, 5 levels), -1 missing; scores: (n, views, 5 levels, sides, 3) out of fold, NaN where there
    are none. Each view has a cross-fitted calibration of its own here: what it is worth, not how it is calibrated,
    decides. Returns (list of views that pay on all of them, table, (n, views) bool: which views pay for a study on the
    parts of cross_fitted_probabilities other than its own).
    """
    conditions = list(DETECTORS[condition][1])
    own = grades[:, conditions].transpose(0, 2, 1)
    log_p = np.full((len(views), *grades.shape, len(SEVERITIES)), np.nan)
    for number, alone in enumerate(np.eye(len(views), dtype=bool)):
        p = cross_fitted_probabilities(scores, own, np.broadcast_to(alone, scores.shape[:2]))
        log_p[number, :, conditions] = np.log(p).transpose(2, 0, 1, 3)
    kept, table = choose_views(grades, log_p, views)
    return kept, table, cross_fitted_views(grades, log_p, views, deal_parts(_has_scores(scores)))


def settle_detectors(weights, grades, scores, views):
    """Choose the test-time views and the calibration of a condition's detectors on their held-out studies, store both
    in the weights, predict these studies.

    weights: files of train_yolo, a fold each; grades: (n, 5 conditions, 5 levels), -1 missing; scores: (n, views, 5
    levels, sides, 3) of score_studies by the detector that held the study out, NaN where there are none; views: dicts,
    the plain one first. Stored is what all of these studies say. The predictions are cross-fitted in both: a study's
    own label chose none of its views and calibrated nothing of it. Returns ((n, 5 levels, sides, 3) probabilities, NaN
    where the scores are; table of choose_views). Done again after a kill it ends the same.
    A detector of the original scheme has one view, no calibration, and 1/3 where the scores are NaN.
    """
    about = _read_yolo_metadata(weights[0])
    own = grades[:, list(DETECTORS[about["condition"]][1])].transpose(0, 2, 1)
    kept, table, used = choose_detector_views(grades, scores, about["condition"], views)
    mean = mean_scores(np.moveaxis(scores[:, table["kept"].to_numpy()], 1, 0))
    if about["scheme"] == "original":
        p, calibration = original_probabilities(mean), None
    else:
        p = cross_fitted_probabilities(scores, own, used)
        calibration = fit_yolo_calibration(mean, own, severity_prior(own))
    for path in weights:
        store_yolo_calibration(path, calibration, kept)
    return p, table


def severity_prior(grades, strength=10.0):
    """Frequencies of the severities per level, (5, 3), from grades (n, 5, sides) with -1 missing, drawn towards the
    pooled frequencies by `strength` pseudo-observations (and those by one a class), so that none is 0."""
    grades = np.asarray(grades)
    pooled = np.array([(grades == k).sum() + 1.0 for k in range(3)])
    pooled /= pooled.sum()
    counts = np.array([[(grades[:, level] == k).sum() for k in range(3)] for level in range(grades.shape[1])])
    return (counts + strength * pooled) / (counts.sum(axis=1, keepdims=True) + strength)


def _score_features(scores):
    """Log ratios (..., 2) of the moderate and the severe score to the normal one."""
    logs = np.log(np.clip(scores, 1e-6, None))
    return logs[..., 1:] - logs[..., :1]


def _calibration_logits(scores, level, calibration):
    """Logits (rows, 3) of scores (rows, 3) at levels (rows,), and the standardised log ratios (rows, 2)."""
    trust, prior = calibration["trust"], np.asarray(calibration["prior"], float)
    ratios = _score_features(scores)
    z = (ratios - np.array(calibration["mean"])) / np.array(calibration["scale"])
    evidence = np.concatenate([np.zeros_like(ratios[:, :1]), ratios], axis=1)
    base = np.log(np.array(SEVERITY_WEIGHTS, float)) + trust * evidence + (1 - trust) * np.log(prior)[level]
    base[:, 1:] += z @ np.array(calibration["matrix"]).T + np.array(calibration["bias"])
    return base, z


def fit_yolo_calibration(scores, grades, prior, ridges=(1.0, 3.0, 10.0, 30.0, 100.0, 1e4)):
    """Fit scores -> probabilities by weighted log loss (weights 1/2/4) on out-of-fold rows.

    scores: (n, 5, sides, 3) of yolo_scores; grades: (n, 5, sides), -1 missing; prior: (5, 3) of severity_prior.
    A multinomial logistic regression that starts from one of two calibrations which need no fitting, and is drawn
    back to it by a ridge on its correction b_k + sum_j A_kj z_j (z: standardised log ratios of the scores):
        trust 1: probability ~ weight_k * score_k;    trust 0: probability ~ weight_k * class prior of the level.
    Which one, and the ridge's strength, is decided by five-fold cross validation over studies: good scores are
    trusted although rows are few, and useless ones lose nothing against the class prior. Returns a dict for JSON;
    with fewer than four graded studies it is the prior.
    """
    from scipy.optimize import minimize

    scores, grades = np.asarray(scores, float), np.asarray(grades)
    study, level, side = np.nonzero((grades >= 0) & np.isfinite(scores).all(axis=-1))
    start = {
        "prior": np.asarray(prior, float).tolist(),
        "trust": 0.0,
        "mean": [0.0, 0.0],
        "scale": [1.0, 1.0],
        "matrix": [[0.0] * 2] * 2,
        "bias": [0.0, 0.0],
        "ridge": None,
        "rows": len(study),
    }
    rows, y = scores[study, level, side], grades[study, level, side]
    if len(np.unique(study)) < 4 or len(np.unique(y)) < 2:
        return start
    ratios = _score_features(rows)
    start |= {"mean": ratios.mean(axis=0).tolist(), "scale": (ratios.std(axis=0) + 1e-6).tolist()}
    w = np.array(SEVERITY_WEIGHTS, float)[y]
    bases = {trust: _calibration_logits(rows, level, start | {"trust": trust}) for trust in (1.0, 0.0)}

    def loss(flat, part, ridge, trust):
        base, z = bases[trust]
        logits, x = base[part].copy(), np.c_[np.ones(len(part)), z[part]]
        logits[:, 1:] += x @ flat.reshape(2, 3).T
        logits -= logits.max(axis=1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        at = np.arange(len(part)), y[part]
        residual = np.exp(logp)
        residual[at] -= 1
        gradient = ((w[part, None] * residual)[:, 1:].T @ x).ravel() + ridge * flat
        return -(w[part] * logp[at]).sum() + 0.5 * ridge * (flat**2).sum(), gradient

    def fit(part, ridge, trust):
        return minimize(loss, np.zeros(6), args=(part, ridge, trust), jac=True, method="L-BFGS-B").x

    block = np.unique(study, return_inverse=True)[1] % 5
    every = np.arange(len(y))
    choices = [(trust, ridge) for trust in bases for ridge in ridges]
    held_out = [
        sum(loss(fit(every[block != b], ridge, trust), every[block == b], 0.0, trust)[0] for b in np.unique(block))
        for trust, ridge in choices
    ]
    trust, ridge = choices[int(np.argmin(held_out))]
    theta = fit(every, ridge, trust).reshape(2, 3)
    return start | {"trust": trust, "matrix": theta[:, 1:].tolist(), "bias": theta[:, 0].tolist(), "ridge": ridge}


def yolo_probabilities(scores, calibration=None):
    """Severity probabilities (..., 5 levels, sides, 3) float64 from raw scores of that shape; rows sum to 1.

    calibration: of fit_yolo_calibration; None: scores times the weights 1/2/4, normalised (the weighted log loss is
    least for p proportional to weight x posterior). Levels without scores (NaN) stay NaN for the ensemble to fill.
    """
    scores = np.asarray(scores, dtype=np.float64)
    missing = ~np.isfinite(scores).all(axis=-1)
    safe = np.where(missing[..., None], 1.0, scores)
    if calibration is None:
        p = np.clip(safe, 1e-6, None) * np.array(SEVERITY_WEIGHTS, float)
    else:
        level = np.broadcast_to(np.arange(len(LEVELS))[:, None], missing.shape)
        logits = _calibration_logits(safe.reshape(-1, 3), level.ravel(), calibration)[0].reshape(safe.shape)
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.where(missing[..., None], np.nan, p)


def _has_scores(scores):
    """(n, ...) -> (n,) bool: the studies that a detector held out, and has a word on."""
    return np.isfinite(scores).any(axis=tuple(range(1, np.ndim(scores))))


def cross_fitted_probabilities(scores, grades, used):
    """Calibrated probabilities in which no study saw its own labels, neither in the network nor in the calibration.

    scores: (n, views, 5, sides, 3) out of fold, NaN throughout for studies that no detector held out: these serve the
    prior alone. grades: (n, 5, sides), -1 missing. The held-out studies are dealt into parts (deal_parts), each is
    calibrated on the others. used: (n, views) bool, alike within a part: the views whose mean scores are calibrated.
    Returns (n, 5, sides, 3), NaN where these scores are.
    """
    scores, grades = np.asarray(scores, float), np.asarray(grades)
    part = deal_parts(_has_scores(scores))
    result = np.full((len(scores), *scores.shape[2:]), np.nan)
    for p in np.unique(part[part >= 0]):
        others = part != p
        mean = mean_scores(np.moveaxis(scores[:, used[~others][0]], 1, 0))
        calibration = fit_yolo_calibration(mean[others], grades[others], severity_prior(grades[others]))
        result[~others] = yolo_probabilities(mean[~others], calibration)
    return result


def original_probabilities(scores):
    """Best confidences (..., 3) of the original scheme, normalised over the severities; 1/3 where nothing is said."""
    scores = np.nan_to_num(np.asarray(scores, dtype=np.float64))
    total = scores.sum(axis=-1, keepdims=True)
    return np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / len(SEVERITIES))


def score_studies(detector, paths, levels, study_ids, views=({},), batch=16):
    """Raw scores of cached studies: (n, views, 5 levels, sides, 3), see yolo_scores.

    paths: dict study_id -> file, of study_paths; levels: table of levels.csv (the original scheme needs none: None). A
    study that is not cached, or fails, gives NaN; the latter is printed.
    """
    description, conditions = DETECTORS[detector.condition]
    scores = np.full((len(study_ids), len(views), len(LEVELS), len(conditions), len(SEVERITIES)), np.nan)
    cached = [n for n, study_id in enumerate(study_ids) if int(study_id) in paths]
    parts = [cached[start : start + 8] for start in range(0, len(cached), 8)]  # in memory at a time
    for part in progress(parts, f"scores {detector.condition}", len(parts)):
        ids = [int(study_ids[n]) for n in part]
        studies = [load_study(paths[study_id], [description]) for study_id in ids]
        boxes = [None if levels is None else boxes_from_table(levels, study_id) for study_id in ids]
        for n, found in zip(part, yolo_scores(detector, studies, boxes, views, batch)):
            if isinstance(found, Exception):
                print(f"study {study_ids[n]}: no scores of {detector.condition} ({type(found).__name__}: {found})")
            else:
                scores[n] = found
    return scores


def yolo_studies(detector, studies, boxes, views=None, batch=16):
    """One detector's word on studies: list with an entry a study, (conditions, 5 levels, 3) probabilities or the
    Exception that this study raised, which harms no other.

    Conditions are in the order of DETECTORS; rows are NaN where no slice shows a level. The calibration is the one that
    the weights carry, and so are the views by default (a list of dicts, see DETECTOR_VIEWS). studies, boxes, batch: see
    yolo_scores. A detector of the original scheme knows no calibration, views or boxes, and no NaN.
    """
    views = detector.about.get("views") or [{}] if views is None else views
    result = []
    for scores in yolo_scores(detector, studies, boxes, views, batch):
        if not isinstance(scores, Exception):
            mean = mean_scores(scores)
            calibration = detector.about.get("calibration")
            p = original_probabilities(mean) if detector.original else yolo_probabilities(mean, calibration)
            scores = p.transpose(1, 0, 2)
        result.append(scores)
    return result


def yolo_table(study_ids, probabilities, condition):
    """Rows of a detector's conditions: table study_id, row_id, normal_mild, moderate, severe, sorted by row_id.

    probabilities: (n, 5 levels, sides, 3); rows that are NaN are left out.
    """
    rows = [
        (int(study_id), f"{study_id}_{CONDITIONS[index]}_{level}", *probabilities[n, at, side])
        for n, study_id in enumerate(study_ids)
        for side, index in enumerate(DETECTORS[condition][1])
        for at, level in enumerate(LEVELS)
        if np.isfinite(probabilities[n, at, side]).all()
    ]
    return pd.DataFrame(rows, columns=["study_id", "row_id", *SEVERITIES]).sort_values("row_id", ignore_index=True)


def yolo_loss_against_prior(grades, probabilities, folds):
    """Weighted log loss of held-out probabilities, and of the class prior on the same rows.

    grades (n, 5, sides), probabilities (n, 5, sides, 3) with NaN rows left out, folds (n,): each study's prior is
    made of the other folds' grades. Returns {"weighted_log_loss", "class_prior", "gain", "rows"}, gain in 0..1.
    """
    use = (grades >= 0) & np.isfinite(probabilities).all(axis=-1)
    if not use.any():
        return {"weighted_log_loss": float("nan"), "class_prior": float("nan"), "gain": float("nan"), "rows": 0}
    prior = np.zeros(probabilities.shape)
    for fold in np.unique(folds):
        counts = np.stack([(grades[folds != fold] == k).sum(axis=0) + 1.0 for k in range(len(SEVERITIES))], axis=-1)
        counts *= np.array(SEVERITY_WEIGHTS)
        prior[folds == fold] = counts / counts.sum(axis=-1, keepdims=True)
    weight = np.array(SEVERITY_WEIGHTS, float)[grades[use]]
    at = np.arange(int(use.sum())), grades[use]
    loss, base = (
        float((weight * -np.log(np.clip(p[use][at], 1e-15, 1))).sum() / weight.sum()) for p in (probabilities, prior)
    )
    return {"weighted_log_loss": loss, "class_prior": base, "gain": 1 - loss / base, "rows": int(use.sum())}


def plot_detections(ax, patch, scores, centers_px, box_px, truth=(), threshold=0.1, top=8):
    """Show a patch with the strongest anchors of dense_scores and, dashed, the label boxes. Returns ax.

    patch: (rows, columns) uint8; scores: (anchors, 3); centers_px: (anchors, 2); box_px: side of the square drawn;
    truth: rows (class, xc, yc, w, h) as in YOLO's label files. Also (anchors, classes) of the original scheme, whose
    classes' severity is their number modulo 3.
    """
    from matplotlib.patches import Rectangle

    colors = ("#4daf4a", "#ff9f1c", "#e41a1c")
    ax.imshow(patch, cmap="gray", vmin=0, vmax=255)
    height, width = patch.shape
    for grade, x, y, w, h in truth:
        ax.add_patch(
            Rectangle(
                ((x - w / 2) * width - 0.5, (y - h / 2) * height - 0.5),
                w * width,
                h * height,
                fill=False,
                ls="--",
                lw=1.2,
                ec=colors[int(grade) % 3],
            )
        )
    best, shown = scores.max(axis=1), []
    for anchor in np.argsort(-best):
        if len(shown) >= top or best[anchor] < threshold:
            break
        if any(np.abs(centers_px[anchor] - centers_px[other]).max() < box_px / 2 for other in shown):
            continue
        shown.append(anchor)
        x, y = centers_px[anchor] - box_px / 2
        color = colors[int(scores[anchor].argmax()) % 3]
        ax.add_patch(Rectangle((x, y), box_px, box_px, fill=False, lw=1.2, ec=color))
        ax.text(x, y - 1, f"{best[anchor]:.2f}", color=color, fontsize=7)
    ax.set_axis_off()
    return ax


def plot_yolo_training(ax, results_csv, label=None):
    """Training losses (box, class, distribution) per epoch of one run's results.csv, and mAP50 where it was measured,
    on a second axis. Returns ax."""
    table = pd.read_csv(results_csv)
    table.columns = [name.strip() for name in table.columns]
    for name in [name for name in table.columns if name.startswith("train/")]:
        ax.plot(table["epoch"], table[name], label=f"{name[6:]}{'' if label is None else f' {label}'}")
    ax.set_xlabel("epoch")
    ax.set_ylabel("training loss")
    ax.legend(loc="upper right", fontsize=7)
    measured = table[table["metrics/mAP50(B)"] > 0]
    if len(measured):
        right = ax.twinx()
        right.plot(measured["epoch"], measured["metrics/mAP50(B)"], "k.--", lw=1)
        right.set_ylim(0, 1)
        right.set_ylabel("validation mAP50 (dashed)")
    return ax
