"""Images and labels for the detectors, in the layout that ultralytics reads.

May use: data, storage, names.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike

from ..data.geometry import LevelBox, place_points
from ..data.tables import some_of
from ..data.volume import Study, Volume, load_study, study_about
from ..names import CONDITIONS, DETECTORS, LEVELS, SEVERITIES, progress
from ..storage import DamagedFile, read_json, write_csv, write_json, write_text

# A detector's classes are the three severities and nothing else. One sagittal slice cannot show its side and one
# axial slice barely shows its level, so both come from patient coordinates. It also makes a horizontal flip of an
# axial slice harmless: no class name carries a side.


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

    field_mm: tuple[float, float]
    detail: float
    box_mm: float
    label_reach_mm: float
    point_mm: tuple[float, ...]
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
    "nfn": YoloView((SAGITTAL_FIELD_MM, 104.0), 1.0, 20.0, 4.5, (9.0, 18.0, 22.0), 9.0, 14.0),
    "ss": YoloView((62.0, 62.0), 1.25, 16.0, 5.0, (0.0, 10.0, 22.0), 6.0, 10.0),
}


def yolo_shape_px(view: YoloView, imgsz: int) -> tuple[tuple[int, int], float]:
    """Shape of a detector's patches: ((rows, columns) in px, multiples of 32; mm per px).

    imgsz: rows of a sagittal patch in px; the other detectors follow from their view's field and detail.
    Raises ValueError when imgsz is no positive multiple of 32 (the largest stride).
    """
    if imgsz <= 0 or imgsz % 32:
        raise ValueError(f"image size {imgsz}: must be a positive multiple of 32, the detectors' largest stride")
    mm_per_px = SAGITTAL_FIELD_MM / imgsz / view.detail
    rows, columns = (int(32 * np.ceil(side / mm_per_px / 32 - 1e-6)) for side in view.field_mm)
    return (rows, columns), mm_per_px


def slice_patch(
    volume: Volume,
    index: int,
    center_lps_mm: ArrayLike,
    shape_px: tuple[int, int],
    mm_per_px: float,
    shift_px: Sequence[int] | np.ndarray = (0, 0),
) -> tuple[np.ndarray, np.ndarray]:
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
    whole = torch.from_numpy(np.asarray(volume.array[index], dtype=np.float32))[None, None]
    # Antialiasing matters: real matrices are up to three times finer than the patch.
    image = F.interpolate(whole, size=new, mode="bilinear", align_corners=False, antialias=True)[0, 0].numpy()
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


def yolo_examples(
    coordinates: pd.DataFrame, study_ids: Iterable[int], grades: ArrayLike, condition: str
) -> pd.DataFrame:
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


class SeverityImages:
    """The images of a detector's data set: patches with square millimetres of the labelled slices, and of those within
    the labels' reach. The class of a box is its severity.

    write_yolo_dataset takes any object with these attributes and `of_study`.

    Attributes
    ----------
    scheme : str
        Its name, in dataset.json and in weights.
    shape_px : (int, int)
        Rows and columns of every image.
    mm_per_px : float or None
        None where images differ in it.
    box_px : float
        Side of the square around a label point.
    about : dict
        Its own entries of dataset.json: the classes' names, and what the boxes follow from.
    """

    scheme = "severity"

    def __init__(self, condition: str, imgsz: int = 384, view: YoloView | None = None) -> None:
        """condition: a key of DETECTORS; imgsz: as in yolo_shape_px; view: a YoloView, that of YOLO_VIEWS if None."""
        self.view = view or YOLO_VIEWS[condition]
        self.shape_px, self.mm_per_px = yolo_shape_px(self.view, imgsz)
        self.box_px = self.view.box_mm / self.mm_per_px
        own = {"box_mm": self.view.box_mm, "label_reach_mm": self.view.label_reach_mm}
        self.about = {"names": list(SEVERITIES), **own}

    def of_study(
        self, study: Study, here: pd.DataFrame
    ) -> Iterator[tuple[Volume, int, np.ndarray, np.ndarray, np.ndarray]]:
        """One study's images. here: of _locate_examples.

        Yields (volume, slice, image (rows, columns) uint8, class of each box (n,), its middle (n, 2) x, y in px).
        """
        xyz = here[["x_mm", "y_mm", "z_mm"]].to_numpy()
        # Middle of the canal: left and right points of a level averaged, so that one-sided slices stay centred.
        midline = here.groupby("level")[["x_mm", "y_mm", "z_mm"]].mean().to_numpy()
        shown: dict[tuple[int, int], list[int]] = {}
        for row, (v, k) in enumerate(zip(here["volume"], here["slice"])):
            for near in _near_slices(study.volumes[v], k, self.view.label_reach_mm):
                shown.setdefault((v, near), []).append(row)
        for (v, k), rows in shown.items():
            volume = study.volumes[v]
            center = midline.mean(axis=0)
            if volume.plane == "axial":
                own = np.unique(here["level"].to_numpy()[rows])
                center = here[here["level"].isin(own)].groupby("level")[["x_mm", "y_mm", "z_mm"]].mean().mean()
            patch, to_slice = slice_patch(volume, k, center, self.shape_px, self.mm_per_px)
            voxels = volume.lps_to_voxel(xyz[rows])
            xy = (np.linalg.inv(to_slice) @ np.c_[voxels[:, 2], voxels[:, 1], np.ones(len(rows))].T).T[:, :2]
            yield volume, k, patch, here["grade"].to_numpy()[rows], xy


def write_yolo_dataset(
    out_dir: str | Path,
    condition: str,
    volumes_dir: str | Path,
    coordinates: pd.DataFrame,
    study_ids: Iterable[int],
    grades: np.ndarray,
    folds: pd.DataFrame,
    imgsz: int = 384,
    view: YoloView | None = None,
    images: SeverityImages | None = None,
) -> dict[str, Any]:
    """Write one detector's data set in YOLO's folder layout.

    out_dir gets images/*.png (8-bit grey, all of one shape), labels/*.txt (class xc yc w h, relative), points.csv
    (every label point in LPS mm), train_<fold>.txt and val_<fold>.txt (paths relative to the list: the folder can be
    moved), and dataset.json, written last. Studies whose points contradict the order of the levels or the sides are
    printed, and used. A point that lies on no slice of its study (see place_points), and a study
    without a volume file, costs only itself: it is left out, counted (without_slice) and printed. A finished folder of
    the same settings, points and volumes is left alone.

    Parameters
    ----------
    out_dir : path
        Is made where there is none.
    condition : str
        A key of DETECTORS.
    volumes_dir : path
        Folder of <study_id>.safetensors (save_study).
    coordinates, study_ids, grades
        Of read_coordinates and labels_to_array.
    folds : DataFrame
        study_id, fold; studies without a fold are left out.
    imgsz, view
        Of SeverityImages.
    images : SeverityImages, optional
        What stands in the place of these two.

    Returns
    -------
    dict
        The content of its dataset.json.

    Raises
    ------
    FileNotFoundError
        No study has a volume file.
    ValueError
        Nothing could be labelled, or imgsz is no positive multiple of 32.
    """
    images = images or SeverityImages(condition, imgsz, view)
    out_dir = Path(out_dir)
    fold_of = dict(zip(folds["study_id"].astype(int), folds["fold"].astype(int)))
    points = yolo_examples(coordinates, study_ids, grades, condition)
    points = points[points["study_id"].isin(fold_of)]
    there = _volume_files(Path(volumes_dir), points["study_id"])
    settings = images.about | {
        "condition": condition,
        "scheme": images.scheme,
        "imgsz": max(images.shape_px),
        "shape_px": list(images.shape_px),
        "mm_per_px": images.mm_per_px,
        "points": len(points),
        "folds": sorted(set(fold_of.values())),
        "studies": len(fold_of),
        "content": _content(points, fold_of, there.values()),
    }
    done = out_dir / "dataset.json"
    known = _read_finished(done, settings)
    if known is not None:
        return known
    done.unlink(missing_ok=True)
    located, written, outside, left_out = _write_images(out_dir, condition, images, points, there)
    which = some_of(dict.fromkeys(left_out), between="; ")
    if not located:
        raise ValueError(
            f"no label point of '{condition}' lies in a cached series of {volumes_dir} ({which or 'none graded'}): "
            "check that series and instance numbers of the coordinates match the volumes"
        )
    if left_out:
        print(f"yolo {condition}: {len(left_out)} of {len(points)} label points are left out: {which}")
    if odd := _contradictions(pd.concat(located)):
        which = some_of((f"study {study_id}: {why}" for study_id, why in odd.items()), 3, "; ")
        print(
            f"yolo {condition}: the label points of {len(odd)} of {len(located)} studies cannot be true ({which}), and "
            "are used as they are: check the levels, sides and pixel coordinates of the table"
        )
    write_csv(out_dir / "points.csv", pd.concat(located).drop(columns=["volume", "slice"]))
    _write_lists(out_dir, written, fold_of)
    counts = {"images": sum(map(len, written.values())), "outside_field": outside, "without_slice": len(left_out)}
    write_json(done, settings | counts)
    return settings | counts


# Discs are further apart than that, as are the two sides of one; points in fractions of the image's size are not.
_APART_MM = 3.0


def _contradictions(points):
    """Dict study_id -> what its label points say that no patient is like; points: of _locate_examples."""
    found = {}
    for study_id, own in points.groupby("study_id"):
        down_mm = -np.diff(own.groupby("level")["z_mm"].mean())
        side = own["condition"].map(side_sign)
        sides = (own["x_mm"] * side)[side != 0].groupby(own["level"]).agg(["sum", "size"])
        across_mm = sides.loc[sides["size"] == 2, "sum"]
        wrong = ["its levels do not follow each other from head to foot"] * bool((down_mm < _APART_MM).any())
        wrong += ["its left points are not to the left of the right ones"] * bool((across_mm < _APART_MM).any())
        if wrong:
            found[int(study_id)] = " and ".join(wrong)
    return found


def _volume_files(folder, study_ids):
    """Dict study_id -> its volume file, for those that have one. Raises FileNotFoundError where none has."""
    paths = {study_id: folder / f"{study_id}.safetensors" for study_id in sorted(set(study_ids))}
    there = {study_id: path for study_id, path in paths.items() if path.is_file()}
    if paths and not there:
        raise FileNotFoundError(
            f"{next(iter(paths.values()))}: no volumes for a labelled study; run 01_preprocess for it first"
        )
    return there


def _read_finished(path, settings):
    """The content of a finished dataset.json of these settings; None without one."""
    try:
        known = {"scheme": SeverityImages.scheme} | read_json(path)
    except (FileNotFoundError, DamagedFile):
        return None
    return known if all(known.get(key) == value for key, value in settings.items()) else None


def _write_images(out_dir, condition, images, points, paths):
    """Write images and labels of all studies, in place of what is there.

    points: of yolo_examples; paths: dict study_id -> volumes, of the studies that have any. Returns (list of
    _locate_examples' tables; dict study_id -> its images, as the lists name them; how many labels lie outside of an
    image that was cut for others; for each point that is left out, why).
    """
    from PIL import Image

    for name in ("images", "labels"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
        (out_dir / name).mkdir(parents=True)
    located, written, outside, left_out = [], {}, 0, []
    limits = np.array(images.shape_px[::-1]) - 1
    for study_id, of_study in progress(points.groupby("study_id"), f"yolo {condition}", points["study_id"].nunique()):
        if study_id not in paths:
            left_out += [f"study {study_id}: no volumes"] * len(of_study)
            continue
        study = load_study(paths[study_id], [DETECTORS[condition][0]])
        here, problems = _locate_examples(study, of_study)
        left_out += problems
        if here.empty:
            continue
        located.append(here)
        names = written.setdefault(int(study_id), [])
        for volume, k, image, classes, xy in images.of_study(study, here):
            inside = ((xy >= 0) & (xy <= limits)).all(axis=1)
            outside += int((~inside).sum())
            if not inside.any():
                continue
            name = f"{study_id}_{volume.series_id}_{volume.block}_{int(volume.instance_numbers[k])}"
            Image.fromarray(image).save(out_dir / "images" / f"{name}.png")
            lines = _label_lines(classes[inside], xy[inside], images.box_px, images.shape_px)
            (out_dir / "labels" / f"{name}.txt").write_text("\n".join(lines) + "\n")
            names.append(f"./images/{name}.png")
    return located, written, outside, left_out


def _write_lists(out_dir, written, fold_of):
    """Write the lists of images to train on and to hold out, for each fold. written: dict study_id -> images."""
    for fold in sorted(set(fold_of.values())):
        for part in ("train", "val"):
            names = [
                name
                for study_id, own in written.items()
                if (fold_of[study_id] == fold) == (part == "val")
                for name in own
            ]
            write_text(out_dir / f"{part}_{fold}.txt", "\n".join(sorted(names)) + "\n")


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


def fit_point_offsets(points: pd.DataFrame, boxes: Mapping[int, Sequence[LevelBox]]) -> dict[str, Any] | None:
    """Where a detector's label points lie relative to the located levels.

    Points more than 40 mm from their box are left out (wrong level names exist).

    Parameters
    ----------
    points : DataFrame
        points.csv of write_yolo_dataset.
    boxes : mapping of int to sequence of LevelBox
        study_id to its five boxes, in the order of LEVELS; points of other studies are left out.

    Returns
    -------
    dict or None
        point_mm, the medians (head, lateral, back) in mm, lateral counted towards the point's own side; spread_mm,
        1.4826 x median absolute deviation, likewise; n, how many points count. None with fewer than 10 usable points.
    """
    found = []
    for row in points.itertuples():
        if int(row.study_id) not in boxes:
            continue
        box = boxes[int(row.study_id)][int(row.level)]
        head, left, back = box.from_lps([row.x_mm, row.y_mm, row.z_mm])
        found.append((head, left * side_sign(int(row.condition)), back))
    offsets = np.array(found).reshape(-1, 3)
    offsets = offsets[np.linalg.norm(offsets, axis=1) < 40]
    if len(offsets) < 10:
        return None
    middle = np.median(offsets, axis=0)
    spread = 1.4826 * np.median(np.abs(offsets - middle), axis=0)
    return {"point_mm": middle.tolist(), "spread_mm": spread.tolist(), "n": len(offsets)}


def side_sign(condition: int) -> float:
    """+1 for a left condition, -1 for a right one, 0 in the midline (condition: index in CONDITIONS)."""
    return {"left": 1.0, "right": -1.0}.get(CONDITIONS[condition].split("_")[0], 0.0)
