"""Member: what the ensemble, inference, the report, the viewer and the pipeline ask of a kind of network.

A new member is a module with a Member in it, one line in registry.py, and a notebook (or a parameter of one) that
trains it and writes its weights, `oof.csv` and `history.csv`.

May use: data, problems, names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.geometry import LevelBox
from ..data.volume import Study
from ..names import CONDITIONS, LEVELS, SEVERITIES
from ..problems import Problem


@dataclass(frozen=True)
class Weights:
    """A weights file that was loaded: one fold of a member, or of a part of it.

    name: the file's stem, such as level_0 or yolo_scs_0; model: whatever the member's `predict` takes; about: what the
    file says of it, in plain values.
    """

    name: str
    model: Any
    about: Mapping[str, Any]


@dataclass(frozen=True)
class TrainingStage:
    """A member's stage in the pipeline: one notebook, once for each fold.

    name: of the stage, which is its folder's; notebook: its stem; parameters: what the notebook is told besides DATA,
    OUT, FOLDS and where 01 and 02 left their work; seconds: of one fold in the demo, so that the longest come first;
    settings: dict size (demo, hour, smoke) -> parameters over the notebook's full-size defaults; pretrained: name of
    the weights that its full size starts from, as `python -m lumbar.grade.pretrained` fetches them, or empty.
    """

    name: str
    notebook: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 60.0
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pretrained: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a member says of a study: probabilities (5 conditions, 5 levels, 3) float64, NaN where nothing; problems."""

    probabilities: np.ndarray
    problems: tuple[Problem, ...] = ()


class Member(ABC):
    """One kind of network that grades studies.

    Attributes
    ----------
    name : str
        In tables, in files' names and in parameters.
    title : str
        In figures and reports.
    share : float
        Of the weights, in an ensemble that no out-of-fold predictions fitted.
    parts : tuple of str
        What the names of its weights files begin with: `<part>_<fold>.safetensors`.
    trainings : tuple of TrainingStage
    whole_study : bool
        True where it grades a study whose levels are not known: what it alone grades is said in the log.
    """

    name: str
    title: str
    share: float
    parts: tuple[str, ...]
    trainings: tuple[TrainingStage, ...] = ()
    whole_study: bool = False

    @abstractmethod
    def read_about(self, path: Path) -> Mapping[str, Any]:
        """What a weights file says of itself. Raises OSError, and DamagedFile also for a kind of network that is none
        of the member's."""

    @abstractmethod
    def load(self, path: Path, device: str) -> Weights:
        """A weights file, ready to predict on the device. Raises DamagedFile with what to do about it."""

    def is_finished(self, about: Mapping[str, Any]) -> bool:
        """False for weights that a training has written and not settled yet."""
        return True

    def views(self, weights: Weights, most: int = -1) -> list[dict]:
        """Its test-time views that paid in training, the plain one first: at most `most` where that is not -1."""
        known = list(weights.about.get("views") or [{}])
        return known if most < 0 else known[:most]

    def prepare(self, study: Study, boxes: Sequence[LevelBox] | None, weights: Sequence[Weights], device: str) -> Any:
        """Inputs of one study, made ahead of time in another thread. Never raises because of the study.

        study: normalised Study with volumes; boxes: five LevelBoxes, or None where no level could be placed.
        """
        return study, boxes

    @abstractmethod
    def predict(
        self, inputs: Sequence[Any], weights: Sequence[Weights], most_views: int, device: str
    ) -> list[Prediction]:
        """Predict several studies at once, each through at most so many of its views (-1: all).

        inputs: of `prepare`, one a study. A study, or weights, that fail cost only their own contribution.
        Results do not depend on batch composition, up to rounding.
        """

    def draw(self, weights: Sequence[Weights], study: Study, boxes: Sequence[LevelBox]) -> pd.DataFrame | None:
        """What it sees where, as a table of names.DETECTION_COLUMNS; None for a member that draws no boxes."""
        return None


def silence() -> np.ndarray:
    """(5, 5, 3) NaN: a member has nothing to say."""
    return np.full((len(CONDITIONS), len(LEVELS), len(SEVERITIES)), np.nan)


def without_frames(error: Exception) -> Exception:
    """The exception without the frames it came through, and those of what it came of: they keep tensors alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def together_or_alone(work: Callable[[list], list], items: list) -> list:
    """work(items), a list with a result for each; where that raises each item alone, an Exception being its result."""
    try:
        return work(items)
    except Exception as error:
        if len(items) == 1:
            return [without_frames(error)]
    return [together_or_alone(work, [item])[0] for item in items]


def free_memory() -> None:
    """Give back what is cached of the device's memory."""
    import torch

    try:
        torch.cuda.empty_cache()
    except Exception:
        pass  # on a device that fails altogether even this does
