"""Conditions, levels, severities, the columns of tables; progress bars and devices.

May use: nothing of the kit.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

CONDITIONS = (
    "spinal_canal_stenosis",
    "left_neural_foraminal_narrowing",
    "right_neural_foraminal_narrowing",
    "left_subarticular_stenosis",
    "right_subarticular_stenosis",
)
LEVELS = ("l1_l2", "l2_l3", "l3_l4", "l4_l5", "l5_s1")
SEVERITIES = ("normal_mild", "moderate", "severe")  # the submission's columns
GRADES = ("Normal/Mild", "Moderate", "Severe")  # the same three, as train.csv writes them
SEVERITY_WEIGHTS = (1, 2, 4)  # the metric's sample weight, by the true grade
# How many of the real training set's gradings are of each severity, by condition, level and severity. Source: the 1,975
# studies of the competition's train.csv; the sides are alike (foramina: their mean; subarticular: the left one).
_CANAL = ((1886, 67, 21), (1770, 151, 53), (1622, 230, 122), (1482, 237, 255), (1904, 51, 19))
_FORAMEN = ((1900, 63, 8), (1791, 171, 11), (1522, 411, 40), (1204, 629, 140), (1264, 508, 198))
_RECESS = ((1690, 93, 28), (1555, 255, 83), (1324, 454, 194), (887, 624, 461), (1408, 409, 147))
CLASS_COUNTS = (_CANAL, _FORAMEN, _FORAMEN, _RECESS, _RECESS)
LABEL_COLUMNS = tuple(f"{condition}_{level}" for condition in CONDITIONS for level in LEVELS)
SUBMISSION_COLUMNS = ("row_id",) + SEVERITIES
GROUPS = {"spinal": (0,), "foraminal": (1, 2), "subarticular": (3, 4)}  # metric term -> indices into CONDITIONS
MIRRORED_CONDITIONS = (0, 2, 1, 4, 3)  # CONDITIONS after left and right change places
DESCRIPTIONS = ("Sagittal T1", "Axial T2", "Sagittal T2/STIR")  # also the channel order of every crop
DETECTORS = {  # detector -> the series it reads, the conditions (indices) it grades
    "scs": ("Sagittal T2/STIR", (0,)),
    "nfn": ("Sagittal T1", (1, 2)),
    "ss": ("Axial T2", (3, 4)),
}
VERTEBRAE = ("T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5", "S1", "S2")  # head to foot
LEVEL_VERTEBRAE = {
    "l1_l2": ("L1", "L2"),
    "l2_l3": ("L2", "L3"),
    "l3_l4": ("L3", "L4"),
    "l4_l5": ("L4", "L5"),
    "l5_s1": ("L5", "S1"),
}
LEVEL_TABLE_COLUMNS = (
    ["study_id", "level", "x_mm", "y_mm", "z_mm"]
    + [f"r{row}{column}" for row in range(3) for column in range(3)]
    + ["extent_head_mm", "extent_left_mm", "extent_back_mm", "confidence", "source"]
    + ["second", "second_share"]
)


DETECTION_COLUMNS = (  # of a table of boxes that a member draws, see Member.draw
    "study_id series_id instance_number condition level x_px y_px width_px height_px".split() + list(SEVERITIES)
)


def progress(
    iterable: Iterable | None = None, desc: str | None = None, total: int | None = None, **kwargs: Any
) -> tqdm:
    """A text progress bar on stderr: tqdm's, with its arguments.

    `tqdm.auto` stays at 0% inside papermill, so this is always the text bar; it writes at most every two seconds,
    because papermill's log gets a new line for each update.
    """
    return tqdm(iterable, desc=desc, total=total, mininterval=2.0, ncols=88, file=sys.stderr, **kwargs)


def device_for(name: str | int = "auto") -> str:
    """Name a device as PyTorch does.

    Parameters
    ----------
    name : str or int
        `auto` for the first GPU or, without one, the CPU; `cpu`, `cuda`, `mps`; the number of a GPU.

    Returns
    -------
    str
        Such as `cpu` or `cuda:1`.

    Raises
    ------
    ValueError
        For a device that this machine does not have.

    Examples
    --------
    >>> device_for("cpu")
    'cpu'
    """
    import torch  # not at the top: the phantom's workers need these names, and no torch

    name = str(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    device = f"cuda:{name}" if name.isdigit() else name
    kind, _, number = device.partition(":")
    if kind == "cuda" and not count:
        raise ValueError(
            f"DEVICE {name!r}: PyTorch finds no GPU here. Take auto or cpu; on Kaggle choose an accelerator in the "
            "notebook's settings, elsewhere install the driver and a PyTorch with CUDA"
        )
    if kind == "cuda" and number and not (number.isdigit() and int(number) < count):
        there = "0" if count == 1 else f"0 to {count - 1}"
        raise ValueError(f"DEVICE {name!r}: there is no such GPU here; their numbers are {there}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("DEVICE 'mps': PyTorch finds no Apple GPU here. Take auto or cpu")
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"DEVICE must be auto, cpu, cuda or the number of one GPU, not {name!r}")
    return device
