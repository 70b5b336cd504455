"""The 3D networks as members: one on level crops, one on whole studies.

May use: member, classifier, crops, data, limits, names, problems, weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.crop import Crop
from ..data.geometry import LevelBox
from ..data.volume import Study
from ..limits import check_limit
from ..names import CONDITIONS, LEVELS, SEVERITIES
from ..problems import Problem
from ..weights import Stated
from .classifier import (
    _REMEDY,
    OrdinalClassifier,
    crops_to_studies,
    load_classifier,
    predict_crops,
    read_classifier_about,
)
from .crops import cut_crops
from .member import Member, Prediction, TrainingStage, Weights, free_memory, together_or_alone, without_frames

# Voxels that go through a network together, at most: eight crops of 128^3, one study of 256^3.
BATCH_VOXELS = 1 << 24
BATCH_CROPS = 16


@dataclass
class CropInputs:
    """A study and those of its crops that were cut ahead: crops: dict Crop -> cut_crops' array, or the Exception that
    cutting raised."""

    study: Study
    boxes: Sequence[LevelBox] | None
    crops: dict[Crop, Any] = field(default_factory=dict)

    def cut(self, crop: Crop, device: str) -> Any:
        """The crops as `crop` has them, cut unless they are there."""
        if crop not in self.crops:
            try:
                check_limit()
                self.crops[crop] = cut_crops(self.study, self.boxes, crop, device)
            except Exception as error:
                self.crops[crop] = without_frames(error)
        return self.crops[crop]

    def cut_surely(self, crop: Crop, device: str) -> Any:
        """cut, and once more where the device's memory was too full for it."""
        if isinstance(self.cut(crop, device), torch.OutOfMemoryError):
            del self.crops[crop]
            free_memory()
        return self.cut(crop, device)


class CropMember(Member):
    """A 3D network of one scope, see OrdinalClassifier."""

    def read_about(self, path: Path) -> Mapping[str, Any]:
        about = read_classifier_about(path)
        Stated(path, about, _REMEDY).choice("pooling", (OrdinalClassifier.layout,), optional=True)
        return about

    def load(self, path: Path, device: str) -> Weights:
        return Weights(path.stem, *load_classifier(path, device))

    def prepare(
        self, study: Study, boxes: Sequence[LevelBox] | None, weights: Sequence[Weights], device: str
    ) -> CropInputs:
        inputs = CropInputs(study, boxes)
        for own in weights:
            inputs.cut(own.about["crop"], device)
        return inputs

    def predict(
        self, inputs: Sequence[CropInputs], weights: Sequence[Weights], most_views: int, device: str
    ) -> list[Prediction]:
        # Folds mostly see the same crops through the same views: those go through all their models in one go.
        groups: dict[Any, tuple[Crop, list[dict], list]] = {}
        for own in weights:
            views = self.views(own, most_views)
            key = own.about["crop"], json.dumps(views, sort_keys=True)
            groups.setdefault(key, (own.about["crop"], views, []))[2].append(own.model)
        logs = np.zeros((len(inputs), len(CONDITIONS), len(LEVELS), len(SEVERITIES)))
        folds = np.zeros(len(inputs))
        failed: list[dict[Problem, bool]] = [{} for _ in inputs]
        for crop, views, models in groups.values():
            cut = [own.cut_surely(crop, device) for own in inputs]
            there = [k for k, crops in enumerate(cut) if not isinstance(crops, Exception)]

            def work(numbers, crop=crop, views=views, models=models, cut=cut):
                crops = np.concatenate([cut[k] for k in numbers])
                levels = np.tile(np.arange(len(LEVELS)), len(numbers)) if crop.scope == "level" else None
                return list(crops_to_studies(_predict(models, crops, crop, levels, views), crop.scope))

            found = dict(zip(there, together_or_alone(work, there) if there else [], strict=True))
            for k, crops in enumerate(cut):
                predicted = found.get(k, crops)
                if not isinstance(predicted, Exception) and not np.isfinite(predicted).all():
                    predicted = ValueError("the network's answer is not finite")
                if isinstance(predicted, Exception):
                    problem = Problem.of(predicted, f"{self.name}: ", self.name)
                    failed[k][problem] = True  # once, whatever the folds
                else:
                    logs[k] += len(models) * np.log(np.clip(predicted, 1e-12, 1))
                    folds[k] += len(models)
        means = np.exp(logs / np.maximum(folds, 1)[:, None, None, None])
        means = np.where(folds[:, None, None, None] > 0, means / means.sum(-1, keepdims=True), np.nan)
        return [Prediction(mean, tuple(problems)) for mean, problems in zip(means, failed, strict=True)]


def _predict(models, crops, crop, levels, views):
    """predict_crops in batches that fit the memory."""
    batch = int(np.clip(BATCH_VOXELS // np.prod(crop.shape), 1, BATCH_CROPS))
    while True:
        try:
            return predict_crops(models, crops, crop, levels, views, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        torch.cuda.empty_cache()  # not inside `except`: there the error still holds what it was about
        batch //= 2


# Settings of the small sizes. Mixup is for longer trainings than these.
_SMALL = {"MIX": 0.0, "ACCUMULATE": 1, "DROPOUT": 0.2, "CACHE": True}


class LevelCrops(CropMember):
    name, title, share = "level", "Level crops, 3D network", 0.25
    parts = ("level",)
    trainings = (
        TrainingStage(
            "04_train_vit_level",
            "04_train_vit",
            {"SCOPE": "level"},
            seconds=355,
            settings={
                "demo": {
                    **_SMALL,
                    "BACKBONE": "tiny",
                    "SHAPE": [32, 48, 48],
                    "EXTENT_MM": [44.0, 72.0, 72.0],
                    "EPOCHS": 12,
                    "BATCH": 8,
                    "LEARNING_RATE": 2.0e-3,
                    "EMA": 0.98,
                },
                "hour": {
                    "SHAPE": [32, 48, 64],
                    "EXTENT_MM": [40.0, 48.0, 64.0],
                    "EPOCHS": 10,
                    "BATCH": 16,
                    "LEARNING_RATE": 3.0e-3,
                },
                "smoke": {"EPOCHS": 2, "SHAPE": [16, 32, 32]},
            },
        ),
    )


class WholeStudy(CropMember):
    name, title, share = "study", "Whole study, 3D network", 0.10
    parts = ("study",)
    whole_study = True
    trainings = (
        TrainingStage(
            "04_train_vit_study",
            "04_train_vit",
            {"SCOPE": "study"},
            seconds=350,
            settings={
                "demo": {
                    **_SMALL,
                    "BACKBONE": "tiny_stride8",
                    "SHAPE": [96, 64, 32],
                    "EXTENT_MM": [230.0, 130.0, 80.0],
                    "EPOCHS": 30,  # it looks for the levels first: little shows before some 300 steps
                    "BATCH": 4,
                    "LEARNING_RATE": 3.0e-3,
                    "EMA": 0.95,
                },
                "hour": {"EPOCHS": 16, "BATCH": 8},
                "smoke": {"EPOCHS": 2, "SHAPE": [48, 32, 16]},
            },
            pretrained="maxvit_rmlp_tiny_rw_256.sw_in1k",
        ),
    )
