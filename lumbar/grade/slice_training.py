"""The slice network's training: its hyperparameters and what differs from the 3D networks.

May use: trainer, slice_network, slice_crops, ordinal.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .ordinal import weighted_losses
from .slice_crops import augment_slices, exchange_levels
from .slice_network import SliceNetwork, measure_slices, save_slices
from .trainer import Recipe, TrainConfig

ALONE_SHARE = 0.5  # of the loss by a level's and condition's own looks alone, beside that of all together


@dataclass(frozen=True, kw_only=True)
class SliceConfig(TrainConfig):
    """Hyperparameters of a training of the slice network."""

    stride: int = 0  # of Encoder
    width: int = 128  # of SliceNetwork
    sequence: str = "lstm"  # of SliceNetwork
    levels: bool = True  # of SliceNetwork
    exchange: float = 0.0  # share of studies in which exchange_levels changes some


class SliceRecipe(Recipe):
    """Recipe of SliceNetwork, with SliceDatasets and a SliceConfig."""

    def build(self, train: Any, config: Any, prior: np.ndarray) -> nn.Module:
        network = SliceNetwork(
            config.backbone,
            train.crop,
            prior,
            config.dropout,
            config.stride,
            config.width,
            config.sequence,
            config.levels,
            config.pretrained,
            config.drop_path,
        )
        if config.recompute:
            network.backbone.recompute()
        return network

    def augment(
        self, crops: torch.Tensor, grades: torch.Tensor, crop: Any, generator: torch.Generator, config: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return augment_slices(crops, grades, crop, generator, config.strength)

    def exchange(self, batch: tuple, before: tuple, generator: torch.Generator, config: Any) -> tuple:
        inputs, level, grades = batch
        if config.exchange:
            inputs, grades = exchange_levels(inputs, grades, generator, config.exchange, (before[0], before[2]))
        return inputs, level, grades

    def losses(self, model: nn.Module, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, _, grades, share = batch
        share = share.view(*share.shape, *[1] * (grades.ndim - 2))
        both = model(inputs)
        sums = [weighted_losses(log_p[:, None].expand(*grades.shape, -1), grades, share) for log_p in both]
        (loss, weight), (alone, _) = sums
        return (loss + ALONE_SHARE * alone) / (1 + ALONE_SHARE), weight

    def measure(self, models: list, dataset: Any, views: Any, numbers: Any = None, workers: int = 0) -> np.ndarray:
        return measure_slices(models, dataset, views, numbers, workers)

    def save(self, path: Path, network: Any, about: dict[str, Any]) -> None:
        save_slices(path, network, about)
