"""A detector of severities: its weights, its dense class scores in every slice, and a study's probabilities.

Not to be taken for a detector of vertebrae, see lumbar/spine/placement.py.

May use: detector_weights, detector_data, calibration, tta, data, engine, names, member, storage, weights.
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..data.geometry import LevelBox, boxes_from_table
from ..data.volume import Study, load_study
from ..engine import on_cpu
from ..names import CONDITIONS, DETECTORS, LEVELS, SEVERITIES, progress
from ..storage import DamagedFile
from ..weights import Stated, check_network, read_settled, read_weights, store_settled
from .calibration import (
    cross_fitted_probabilities,
    fit_yolo_calibration,
    has_scores,
    mean_scores,
    severity_prior,
    yolo_probabilities,
)
from .detector_data import YOLO_VIEWS, SeverityImages, YoloView, side_sign, slice_patch
from .detector_weights import (
    _REMEDY,
    find_yolo_description,
    prepare_ultralytics,
    read_detector_about,
    shipped_cfg,
    shipped_descriptions,
)
from .member import together_or_alone, without_frames
from .tta import View, choose_views, cross_fitted_views, deal_parts


@dataclass
class YoloDetector:
    """A loaded detector: net (ultralytics DetectionModel in eval mode), about (the file's metadata)."""

    net: Any
    about: dict[str, Any]

    @property
    def condition(self) -> str:
        return self.about["condition"]

    @property
    def view(self) -> YoloView:
        """Its YoloView, with point_mm from the training labels where they were fitted."""
        offsets = self.about.get("point_offsets")
        default = YOLO_VIEWS[self.condition]
        return replace(default, point_mm=tuple(offsets["point_mm"])) if offsets else default


def load_yolo(path: str | Path, device: str = "cpu", config_dir: str | Path | None = None) -> YoloDetector:
    """Rebuild a detector from a file of train_yolo.

    The network is one that ultralytics ships: of the file only its name and numbers count, and nothing is evaluated.

    Parameters
    ----------
    path : path
    device : str
        Of the network, as torch names it.
    config_dir : path, optional
        Writable folder for ultralytics' settings, by default one in the system's temporary folder.

    Returns
    -------
    YoloDetector
        In evaluation mode; its `about` also holds what settle_detectors stored beside the file.

    Raises
    ------
    FileNotFoundError
        There is no file.
    DamagedFile
        It is no detector, one whose classes are not the severities, describes another network than ultralytics does,
        states numbers out of range, or has values that are not finite. This is a ValueError.
    RuntimeError
        ultralytics was imported unprepared, see prepare_ultralytics.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such weights file; run 03_train_yolo or name the weights folder")
    state, meta = read_weights(path, "metadata", _REMEDY, "a detector's")
    meta |= read_settled(path)
    _check_yolo(Stated(path, meta, _REMEDY))
    return rebuild_detector(path, state, meta, device, config_dir)


def rebuild_detector(
    path: str | Path,
    state: Mapping[str, torch.Tensor],
    meta: dict[str, Any],
    device: str = "cpu",
    config_dir: str | Path | None = None,
) -> YoloDetector:
    """The YoloDetector of a weights file's tensors and metadata, which are taken as they are but for the network.

    path: names the file in errors. Raises DamagedFile for a network that ultralytics does not ship, or that the tensors
    do not fit.
    """
    import tempfile

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
    stated.choice("condition", tuple(DETECTORS))
    stated.choice("scheme", (SeverityImages.scheme,), optional=True)
    stated.choice("names", (list(SEVERITIES),))
    stated.choice("channels", (1,))
    for side in stated.numbers("shape_px", (2,), 32, 2048, whole=True):
        if side % 32:
            stated.refuse("shape_px", "multiples of 32")
    stated.number("mm_per_px", 0.01, 100)
    stated.number("imgsz", 32, 2048, whole=True, optional=True)
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
        known = shipped_descriptions()
    different = []
    for cfg in filter(None, map(shipped_cfg, known)):
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


class _ClassScores(torch.nn.Module):
    """A DetectionModel's class scores (n, anchors, classes) of images (n, 1, rows, columns), mean of its heads."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        _, raw = self.net(x)
        heads = [raw[name]["scores"] for name in ("one2one", "one2many") if name in raw] or [raw["scores"]]
        return torch.stack([h.sigmoid() for h in heads]).mean(0).permute(0, 2, 1)


def _network_scores(detector, patches):
    """Class scores (n, anchors, classes) float32 of patches (n, rows, columns) uint8, in one batch."""
    with torch.inference_mode():
        x = torch.from_numpy(patches).to(next(detector.net.parameters()).device)[:, None].float() / 255
        return on_cpu(detector.net, x, _ClassScores)(x).float().cpu().numpy()


def dense_scores(detector: YoloDetector, patches: np.ndarray, batch: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Class scores of every anchor, without threshold or NMS.

    The mean of the one-to-one and the one-to-many head: they are trained differently and their errors differ.

    Parameters
    ----------
    detector : YoloDetector
    patches : (n, rows, columns) uint8 array
    batch : int
        Patches that go through the network at once.

    Returns
    -------
    scores : (n, anchors, classes) float32 array
        0 to 1.
    centers_px : (anchors, 2) array
        x, y of the anchors' cells in patch px.
    """
    centers = _anchor_centers(detector, *patches.shape[1:])
    found = [_network_scores(detector, patches[start : start + batch]) for start in range(0, len(patches), batch)]
    empty = np.zeros((0, len(centers), len(detector.about["names"])), np.float32)
    return (np.concatenate(found) if found else empty), centers


def yolo_views(
    detector: YoloDetector, study: Study, boxes: Sequence[LevelBox], change: View | None = None
) -> tuple[np.ndarray, list[dict[str, Any]]]:
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
            local = np.array([head, lateral * side_sign(condition), back])
            expected[level, side] = box.to_lps(local)
    patches, views = [], []
    shape_px = tuple(detector.about["shape_px"])
    for v, volume in enumerate(study.volumes):
        if volume.description != description:
            continue
        n, height, width = volume.array.shape
        wanted: dict[tuple[int, int], list] = {}
        for level in range(len(LEVELS)):
            for side in range(len(conditions)):
                slice_, row, column = volume.lps_to_voxel(expected[level, side])
                away = np.abs(np.arange(n) - slice_) * volume.spacing_mm[0]
                # A stack with gaps wider than the reach still shows the level in its nearest slice.
                reach = max(view.reach_mm * change.get("reach", 1.0), 0.51 * volume.spacing_mm[0])
                if not (0 <= row < height and 0 <= column < width):
                    continue
                for near in np.flatnonzero(away <= reach):
                    key = (int(near), level if volume.plane == "axial" else -1)
                    wanted.setdefault(key, []).append((level, side, expected[level, side], float(away[near])))
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
    return [
        (number, patch, seen)
        for number, change in enumerate(views)
        for patch, seen in zip(*yolo_views(detector, study, boxes, change), strict=True)
    ]


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
            _add_severity_scores(detector, studies[n], seen, scores, centers, total[n, view], weight[n, view])
    with np.errstate(invalid="ignore", divide="ignore"):
        return list(np.where(weight > 0, total / weight, np.nan))


def yolo_scores(
    detector: YoloDetector,
    studies: Sequence[Study],
    boxes: Sequence[Sequence[LevelBox]],
    views: Sequence[View] = ({},),
    batch: int = 16,
) -> list[Any]:
    """Raw severity scores of studies under each view: list of (views, 5 levels, sides, 3 severities) float64, NaN where
    no slice shows a level. An entry is the Exception instead where that study failed; the others are not harmed.

    Every anchor of every slice within reach of a level counts, weighted by a Gaussian of its in-slice distance from
    the place where the condition's points lie at that level (patient mm, so side and level follow from geometry).
    Per slice and class the weighted scores are summed; slices are averaged with a Gaussian weight of their distance.
    Sides are in the order of DETECTORS[condition]: canal one, else left and right. boxes: five LevelBox a study. The
    network sees the patches of all studies in common batches of `batch`.
    """
    views = list(views)
    result = []
    for study, own in zip(studies, boxes, strict=True):
        try:
            result.append(_study_patches(detector, study, own, views))
        except Exception as error:
            result.append(without_frames(error))
    good = [n for n, patches in enumerate(result) if not isinstance(patches, Exception)]

    def pooled(numbers):
        return _pooled_scores(detector, [studies[n] for n in numbers], [result[n] for n in numbers], views, batch)

    for n, scores in zip(good, together_or_alone(pooled, good), strict=True):
        result[n] = scores
    return result


def choose_detector_views(
    grades: np.ndarray, scores: np.ndarray, condition: str, views: Sequence[View]
) -> tuple[list[dict], pd.DataFrame, np.ndarray]:
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
    return kept, table, cross_fitted_views(grades, log_p, views, deal_parts(has_scores(scores)))


def settle_detectors(
    weights: Sequence[str | Path], grades: np.ndarray, scores: np.ndarray, views: Sequence[View]
) -> tuple[np.ndarray, pd.DataFrame]:
    """Choose the test-time views and the calibration of a condition's detectors on their held-out studies, store both
    beside the weights, predict these studies.

    Stored is what all of these studies say. The predictions are cross-fitted in both: a study's own label chose none of
    its views and calibrated nothing of it. Safe to re-run after an interruption.

    Parameters
    ----------
    weights : sequence of path
        Files of train_yolo, a fold each.
    grades : (n, 5, 5) int array
        By study, condition and level; -1 missing.
    scores : (n, views, 5, sides, 3) array
        Of score_studies by the detector that held the study out, NaN where there are none.
    views : sequence of mapping
        As in DETECTOR_VIEWS, the plain one first.

    Returns
    -------
    probabilities : (n, 5, sides, 3) float64 array
        By study, level, side and severity, NaN where the scores are.
    table : DataFrame
        Of choose_views.

    Raises
    ------
    FileNotFoundError, DamagedFile
        As read_detector_about, for the first of the weights.
    """
    about = read_detector_about(weights[0])
    own = grades[:, list(DETECTORS[about["condition"]][1])].transpose(0, 2, 1)
    kept, table, used = choose_detector_views(grades, scores, about["condition"], views)
    mean = mean_scores(np.moveaxis(scores[:, table["kept"].to_numpy()], 1, 0))
    p = cross_fitted_probabilities(scores, own, used)
    calibration = fit_yolo_calibration(mean, own, severity_prior(own))
    for path in weights:
        store_settled(path, {"calibration": calibration, "views": kept})
    return p, table


def score_studies(
    detector: YoloDetector,
    paths: Mapping[int, Path],
    levels: pd.DataFrame,
    study_ids: Sequence[int],
    views: Sequence[View] = ({},),
    batch: int = 16,
) -> np.ndarray:
    """Raw scores of cached studies: (n, views, 5 levels, sides, 3), see yolo_scores.

    Parameters
    ----------
    detector : YoloDetector
    paths : mapping of int to path
        study_id to the file of its volumes, of study_paths.
    levels : DataFrame
        levels.csv.
    study_ids : (n,) sequence of int
    views : sequence of mapping
        As in DETECTOR_VIEWS.
    batch : int
        Patches that go through the network at once.

    Returns
    -------
    (n, views, 5, sides, 3) float64 array
        By study, view, level, side (see yolo_scores) and severity. NaN for a study that is not cached or that
        yolo_scores fails on; the latter is printed.

    Raises
    ------
    KeyError
        The table lacks a level of a cached study.
    DamagedFile
        A file of volumes cannot be read.
    """
    description, conditions = DETECTORS[detector.condition]
    scores = np.full((len(study_ids), len(views), len(LEVELS), len(conditions), len(SEVERITIES)), np.nan)
    cached = [n for n, study_id in enumerate(study_ids) if int(study_id) in paths]
    parts = [cached[start : start + 8] for start in range(0, len(cached), 8)]  # in memory at a time
    for part in progress(parts, f"scores {detector.condition}", len(parts)):
        ids = [int(study_ids[n]) for n in part]
        studies = [load_study(paths[study_id], [description]) for study_id in ids]
        boxes = [boxes_from_table(levels, study_id) for study_id in ids]
        for n, found in zip(part, yolo_scores(detector, studies, boxes, views, batch)):
            if isinstance(found, Exception):
                print(f"study {study_ids[n]}: no scores of {detector.condition} ({type(found).__name__}: {found})")
            else:
                scores[n] = found
    return scores


def yolo_studies(
    detector: YoloDetector,
    studies: Sequence[Study],
    boxes: Sequence[Sequence[LevelBox]],
    views: Sequence[View] | None = None,
    batch: int = 16,
) -> list[Any]:
    """Predict several studies with one detector.

    Returns a list with an entry a study: (conditions, 5 levels, 3) probabilities, or the Exception that this study
    raised, which harms no other.

    Conditions are in the order of DETECTORS; rows are NaN where no slice shows a level. The calibration is the one that
    the weights carry, and so are the views by default (a list of dicts, see DETECTOR_VIEWS). studies, boxes, batch: see
    yolo_scores.
    """
    views = detector.about.get("views") or [{}] if views is None else views
    result = []
    for scores in yolo_scores(detector, studies, boxes, views, batch):
        if not isinstance(scores, Exception):
            p = yolo_probabilities(mean_scores(scores), detector.about.get("calibration"))
            scores = p.transpose(1, 0, 2)
        result.append(scores)
    return result


def yolo_table(study_ids: Sequence[int], probabilities: np.ndarray, condition: str) -> pd.DataFrame:
    """Rows of a detector's conditions: table study_id, row_id, normal_mild, moderate, severe, sorted by row_id.

    Parameters
    ----------
    study_ids : (n,) sequence of int
    probabilities : (n, 5, sides, 3) array
        By study, level, side (in the order of DETECTORS) and severity; rows that are NaN are left out.
    condition : str
        A key of DETECTORS.

    Returns
    -------
    DataFrame
    """
    rows = [
        (int(study_id), f"{study_id}_{CONDITIONS[index]}_{level}", *probabilities[n, at, side])
        for n, study_id in enumerate(study_ids)
        for side, index in enumerate(DETECTORS[condition][1])
        for at, level in enumerate(LEVELS)
        if np.isfinite(probabilities[n, at, side]).all()
    ]
    return pd.DataFrame(rows, columns=["study_id", "row_id", *SEVERITIES]).sort_values("row_id", ignore_index=True)
