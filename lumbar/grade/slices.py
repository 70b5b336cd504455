"""The slice network as a member: native slices around each level, see slice_crops.

May use: member, slice_network, slice_crops, data, limits, names, problems.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.geometry import LevelBox
from ..data.volume import Study
from ..limits import check_limit
from ..names import CONDITIONS, LEVELS, SEVERITIES
from ..problems import Problem
from .member import Member, Prediction, TrainingStage, Weights, free_memory, silence, together_or_alone, without_frames
from .slice_crops import SliceCrop, cut_slices, slice_crop
from .slice_network import load_slices, predict_slices, read_slices_about

BATCH_STUDIES = 4  # that go through the network together


class Slices(Member):
    """A 2.5D network on native slices, see SliceNetwork."""

    name, title, share = "slices", "Native slices, 2.5D network", 0.35
    parts = ("slices",)
    trainings = (
        TrainingStage(
            "04_train_vit_slices",
            "04_train_vit",
            {"SCOPE": "slices"},
            seconds=180,
            settings={
                "demo": {
                    "BACKBONE": "tf_efficientnet_lite0",
                    "PRETRAINED": "installed",
                    "STRIDE": 8,
                    "SIZE_PX": 48,
                    "MM_PER_PX": 0.8,
                    "AXIAL_MM_PER_PX": 0.5,
                    "SLICES": 1,
                    "EPOCHS": 20,
                    "BATCH": 1,
                    "ACCUMULATE": 1,
                    "LEARNING_RATE": 3.0e-3,
                    "BACKBONE_RATE": 1.0,
                    "DROPOUT": 0.2,
                    "MIX": 0.0,
                    "EXCHANGE": 0.0,
                    "EMA": 0.97,
                    "RECOMPUTE": False,
                    "CACHE": True,
                },
                "hour": {"EPOCHS": 24, "STRENGTH": 0.5, "EMA": 0.99},
                "smoke": {"EPOCHS": 2, "SIZE_PX": 32, "MM_PER_PX": 1.2, "AXIAL_MM_PER_PX": 0.8},
            },
            pretrained="convnext_small.fb_in22k_ft_in1k",
        ),
    )

    def read_about(self, path: Path) -> Mapping[str, Any]:
        return read_slices_about(path)

    def load(self, path: Path, device: str) -> Weights:
        return Weights(path.stem, *load_slices(path, device))

    def prepare(
        self, study: Study, boxes: Sequence[LevelBox] | None, weights: Sequence[Weights], device: str
    ) -> dict[SliceCrop, Any]:
        """dict of a crop (SliceCrop) -> what cut_slices cut, or the Exception that it raised."""
        found: dict[SliceCrop, Any] = {}
        if boxes is None:
            return found
        for crop in {slice_crop(own.about["crop"]) for own in weights}:
            try:
                check_limit()
                found[crop] = cut_slices(study, boxes, crop)
            except Exception as error:
                found[crop] = without_frames(error)
        return found

    def predict(
        self, inputs: Sequence[dict[SliceCrop, Any]], weights: Sequence[Weights], most_views: int, device: str
    ) -> list[Prediction]:
        logs = np.zeros((len(inputs), len(CONDITIONS), len(LEVELS), len(SEVERITIES)))
        folds = np.zeros(len(inputs))
        failed: list[dict[Problem, bool]] = [{} for _ in inputs]
        for own in weights:
            crop, views = slice_crop(own.about["crop"]), self.views(own, most_views)
            there = [k for k, cut in enumerate(inputs) if not isinstance(cut.get(crop), Exception | None)]
            seen = [k for k in there if inputs[k][crop].any()]  # of the others no series shows any level

            def work(numbers, own=own, crop=crop, views=views):
                crops = np.stack([inputs[k][crop] for k in numbers])
                log_p = _predict(own.model, crops, crop, views).mean(0)
                return list(log_p - np.logaddexp.reduce(log_p, -1, keepdims=True))

            found = dict(zip(seen, together_or_alone(work, seen) if seen else [], strict=True))
            for k, cut in enumerate(inputs):
                predicted = found.get(k, cut.get(crop) if k not in there else None)
                if isinstance(predicted, np.ndarray) and not np.isfinite(predicted).all():
                    predicted = ValueError("the network's answer is not finite")
                if isinstance(predicted, Exception):
                    failed[k][Problem.of(predicted, f"{self.name}: ", self.name)] = True  # once, whatever the folds
                elif predicted is not None:
                    logs[k] += predicted
                    folds[k] += 1
        means = [silence() if not count else np.exp(log / count) for log, count in zip(logs, folds, strict=True)]
        return [
            Prediction(mean / mean.sum(-1, keepdims=True), tuple(problems))
            for mean, problems in zip(means, failed, strict=True)
        ]


def _predict(model, crops, crop, views):
    """predict_slices in batches that fit the memory."""
    batch = BATCH_STUDIES
    while True:
        try:
            return predict_slices([model], crops, crop, views, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        free_memory()  # not inside `except`: there the error still holds what it was about
        batch //= 2
