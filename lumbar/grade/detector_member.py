"""The three detectors as one member.

May use: member, detector, detector_data, detector_weights, data, names, problems,
weights.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..data.geometry import LevelBox
from ..data.volume import Study
from ..names import CONDITIONS, DETECTION_COLUMNS, DETECTORS, LEVELS
from ..problems import Kind, Problem
from ..weights import Stated
from .detector import YoloDetector, dense_scores, load_yolo, yolo_studies, yolo_views
from .detector_data import SeverityImages
from .detector_weights import _REMEDY, read_detector_about
from .member import Member, Prediction, TrainingStage, Weights, free_memory, silence, together_or_alone

FEW_PATCHES = 4  # that go through a detector together where memory is short
LEAST_SCORE = 0.05  # of a box that is drawn

_SMALL = {
    "MODEL": "yolov10n.yaml",
    "EPOCHS": 6,
    "BATCH": 4,
    "LEARNING_RATE": 3.0e-3,
    "TRANSLATE": 0.05,
    "SCALE": 0.0,
    "ROTATE": 0.0,
}


def _training(condition, seconds, **own):
    settings = {"demo": _SMALL | own, "hour": {"EPOCHS": 5}, "smoke": {"EPOCHS": 1, "IMGSZ": 128}}
    return TrainingStage(
        f"03_train_yolo_{condition}", "03_train_yolo", {"CONDITION": condition}, seconds, settings, "yolov10x"
    )


class Detectors(Member):
    """YOLOv10 for each kind of condition; sides and levels by geometry, see yolo_scores."""

    name, title, share = "yolo", "YOLO detectors", 0.65
    parts = tuple(f"yolo_{condition}" for condition in DETECTORS)
    trainings = (_training("ss", 170, EPOCHS=4, BATCH=8), _training("nfn", 220), _training("scs", 140))

    def read_about(self, path: Path) -> Mapping[str, Any]:
        about = read_detector_about(path)
        Stated(path, about, _REMEDY).choice("scheme", (SeverityImages.scheme,), optional=True)
        return about

    def load(self, path: Path, device: str) -> Weights:
        detector = load_yolo(path, device)
        return Weights(path.stem, detector, detector.about)

    def is_finished(self, about: Mapping[str, Any]) -> bool:
        return about.get("calibration") is not None

    def predict(
        self, inputs: Sequence[Any], weights: Sequence[Weights], most_views: int, device: str
    ) -> list[Prediction]:
        probabilities = [silence() for _ in inputs]
        problems: list[list[Problem]] = [[] for _ in inputs]
        studies, boxes = zip(*inputs, strict=True)
        for condition, (description, conditions) in DETECTORS.items():
            said: list[list[np.ndarray]] = [[] for _ in inputs]
            for own in [own for own in weights if own.model.condition == condition]:
                views = self.views(own, most_views)

                def work(numbers, own=own, views=views, **options):
                    return yolo_studies(
                        own.model, [studies[k] for k in numbers], [boxes[k] for k in numbers], views, **options
                    )

                for k, found in enumerate(together_or_alone(work, list(range(len(inputs))))):
                    if isinstance(found, torch.OutOfMemoryError):
                        free_memory()
                        (found,) = together_or_alone(partial(work, batch=FEW_PATCHES), [k])
                    if isinstance(found, Exception):
                        problems[k].append(Problem.of(found, f"{self.name}: {condition}: ", self.name))
                    else:
                        said[k].append(found)
            for k, found in enumerate(said):
                if not found:
                    continue
                mean = _mean_of_folds(found)
                probabilities[k][list(conditions)] = mean
                unseen = ~np.isfinite(mean).all((0, 2))
                if unseen.any():
                    names = ", ".join(level for level, lost in zip(LEVELS, unseen, strict=True) if lost)
                    text = f"{self.name}: {condition}: no {description} slice shows {names}"
                    problems[k].append(Problem(Kind.MEMBER, text, self.name))
        return [Prediction(p, tuple(own)) for p, own in zip(probabilities, problems, strict=True)]

    def draw(self, weights: Sequence[Weights], study: Study, boxes: Sequence[LevelBox]) -> pd.DataFrame:
        """The box that a detector would draw for each place it judges, with its scores: table of DETECTION_COLUMNS.

        Of several folds of one condition the first. On every slice within reach of a condition's place at a level this
        is the anchor with the highest score times the weight that its distance from the place gives it, as in
        yolo_scores; left out below LEAST_SCORE. x_px and y_px are the box's centre, width_px and height_px its sides,
        in the slice's pixels; the severities' columns are raw scores, 0 to 1.
        """
        chosen: dict[str, YoloDetector] = {}
        for own in weights:
            chosen.setdefault(own.model.condition, own.model)
        rows = [row for detector in chosen.values() for row in _drawn(detector, study, boxes)]
        return pd.DataFrame(rows, columns=DETECTION_COLUMNS)


def _drawn(detector, study, boxes):
    """Rows of DETECTION_COLUMNS of one detector."""
    view, members = detector.view, DETECTORS[detector.condition][1]
    patches, views = yolo_views(detector, study, boxes)
    scores, centers = dense_scores(detector, patches)
    for score, seen in zip(scores, views, strict=True):
        volume = study.volumes[seen["volume"]]
        xy = (seen["to_slice"] @ np.c_[centers, np.ones(len(centers))].T).T[:, :2]
        at_lps = volume.voxel_to_lps(np.c_[np.full(len(xy), seen["slice"]), xy[:, 1], xy[:, 0]])
        normal = np.cross(volume.affine[:3, 2], volume.affine[:3, 1])
        normal /= np.linalg.norm(normal)
        for level, side, point, _ in seen["targets"]:
            offset = at_lps - point
            distance = np.linalg.norm(offset - (offset @ normal)[:, None] * normal, axis=1)
            gate = np.where(distance <= view.gate_mm, np.exp(-0.5 * (2 * distance / view.gate_mm) ** 2), 0)
            best = int(np.argmax(gate * score.max(1)))
            if gate[best] and score[best].max() >= LEAST_SCORE:
                _, row_mm, column_mm = volume.spacing_mm
                yield (
                    [study.study_id, volume.series_id, int(volume.instance_numbers[seen["slice"]])]
                    + [CONDITIONS[members[side]], LEVELS[level], *xy[best]]
                    + [view.box_mm / column_mm, view.box_mm / row_mm, *score[best]]
                )


def _mean_of_folds(found):
    """Mean log probabilities, normalised, of those folds that say something of a row; NaN where none does.

    found: list of (..., 3). Folds see a study through views of their own, so that one may miss a row of the others.
    """
    log_p = np.log(np.clip(found, 1e-12, 1))
    there = np.isfinite(log_p).all(-1, keepdims=True)
    count = there.sum(0)
    p = np.exp(np.where(there, log_p, 0).sum(0) / np.maximum(count, 1))
    return np.where(count > 0, p / p.sum(-1, keepdims=True), np.nan)
