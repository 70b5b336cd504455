"""Volume and Study: what a patient's images are once they are read, and how they are stored.

May use: storage.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..storage import DamagedFile, open_tensors, write_tensors


@dataclass
class Volume:
    """Parallel, equally spaced slices of one series.

    array: (n, h, w) = (slice, row, column), slices in the order of their position along the slice normal; as read from
    files NaN where they have padding, never once it is normalised;
    affine: (4, 4) float64, takes (slice, row, column, 1) of a voxel's centre to LPS millimetres;
    instance_numbers: (n,) int64, the file each slice came from, or the frame of a multi-frame file, from 1 (the frames
    of a series' second such file count on from the first's); block: counts the volumes of one series (a series
    with one tilted stack per disc becomes several); thickness_mm: of one slice, along the normal.
    """

    array: np.ndarray
    affine: np.ndarray
    study_id: int
    series_id: int
    description: str
    block: int
    instance_numbers: np.ndarray
    thickness_mm: float = 0.0

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,): distance between neighbouring slices, rows and columns."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def plane(self) -> str:
        """sagittal, coronal or axial: the patient axis (x, y, z) that the slice normal is closest to."""
        normal = np.cross(self.affine[:3, 1], self.affine[:3, 2])
        return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(normal)))]

    def voxel_to_lps(self, ijk: ArrayLike) -> np.ndarray:
        """(..., 3) positions (slice, row, column) -> (..., 3) LPS millimetres."""
        return np.asarray(ijk, np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def lps_to_voxel(self, xyz: ArrayLike) -> np.ndarray:
        """(..., 3) LPS millimetres -> (..., 3) positions (slice, row, column), not rounded."""
        return (np.asarray(xyz, np.float64) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def slice_of(self, instance_number: int) -> int | None:
        """The index of the slice that came from this file, or None."""
        found = np.flatnonzero(self.instance_numbers == instance_number)
        return int(found[0]) if len(found) else None


@dataclass
class Study:
    """All volumes of a study, and in sentences what could not be read."""

    study_id: int
    volumes: list
    problems: list = field(default_factory=list)

    def of(self, description: str) -> list[Volume]:
        """The volumes with this series description."""
        return [volume for volume in self.volumes if volume.description == description]


# Volumes in 8 bits: grey values from -1/8 to 1.47 (1 is the 99.5th percentile), in steps below an image's noise.
_GREY_STEP, _GREY_LOW = 1 / 160, -1 / 8


def save_study(study: Study, path: str | Path, bits: int = 16, made_of: dict[str, Any] | None = None) -> None:
    """Write a normalised study as one safetensors file, complete or not at all.

    Parameters
    ----------
    study : Study
        Normalised.
    path : str or Path
    bits : int
        16, as normalised; 8 for half the disk: rounded to steps of 1/160, and cut off below -1/8 and above 1.47.
    made_of : dict, optional
        What the study was read from, plain JSON, kept for study_about.

    Raises
    ------
    ValueError
        Other bits.
    """
    if bits not in (8, 16):
        raise ValueError(f"BITS must be 8 or 16, not {bits!r}")
    about: dict[str, Any] = {"study_id": study.study_id, "problems": study.problems, "volumes": []}
    if made_of is not None:
        about["made_of"] = made_of
    tensors = {}
    for number, volume in enumerate(study.volumes):
        array = volume.array
        if bits == 8:
            array = np.clip(np.round((array.astype(np.float32) - _GREY_LOW) / _GREY_STEP), 0, 255).astype(np.uint8)
        tensors[f"array_{number}"] = array
        tensors[f"affine_{number}"] = volume.affine
        tensors[f"instance_numbers_{number}"] = volume.instance_numbers
        about["volumes"].append(
            {
                "series_id": int(volume.series_id),
                "description": volume.description,
                "block": volume.block,
                "thickness_mm": volume.thickness_mm,
            }
        )
    write_tensors(path, tensors, "study", about)


_REMEDY = "delete it and run 01_preprocess again, which reads the study anew"


def study_about(path: str | Path) -> dict[str, Any]:
    """What save_study wrote of a study but its arrays: dict study_id, problems, volumes, made_of. Raises as
    load_study does."""
    with open_tensors(path, "study", _REMEDY, "numpy") as (about, _):
        return about


def load_study(path: str | Path, descriptions: Container[str] | None = None) -> Study:
    """Read a study that save_study wrote.

    Parameters
    ----------
    path : str or Path
    descriptions : container of str, optional
        Read only series with these descriptions.

    Returns
    -------
    Study
        Its volumes have float16 arrays (slice, row, column) of normalised grey values.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DamagedFile
        It is not what save_study wrote. The study can be read again from its DICOM files.
    """
    with open_tensors(path, "study", _REMEDY, "numpy") as (about, file):
        try:
            volumes = [
                _stored_volume(file, about["study_id"], number, item)
                for number, item in enumerate(about["volumes"])
                if descriptions is None or item["description"] in descriptions
            ]
            return Study(int(about["study_id"]), volumes, [str(problem) for problem in about["problems"]])
        except Exception as error:  # a tensor or a key that is not there, numbers that are words
            raise DamagedFile(f"{path} is not as it was written ({type(error).__name__}: {error}): {_REMEDY}") from None


def _stored_volume(file, study_id, number, item):
    """One Volume of save_study's file. Raises ValueError for tensors that do not belong to one another."""
    array, affine, instance_numbers = (
        file.get_tensor(f"{name}_{number}") for name in ("array", "affine", "instance_numbers")
    )
    if array.ndim != 3 or not array.size or array.dtype not in (np.uint8, np.float16, np.float32):
        raise ValueError(f"volume {number} is {array.dtype} of the shape {array.shape}")
    if instance_numbers.shape != array.shape[:1]:
        raise ValueError(f"volume {number} has {len(array)} slices and {instance_numbers.size} instance numbers")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
        raise ValueError(f"volume {number} has no usable affine matrix")
    return Volume(
        _as_float16(array),
        affine,
        study_id,
        item["series_id"],
        item["description"],
        item["block"],
        instance_numbers,
        float(item["thickness_mm"]),
    )


def _as_float16(array):
    """The grey values of a stored array, whichever way save_study wrote it."""
    if array.dtype != np.uint8:
        return array
    return (array * np.float32(_GREY_STEP) + np.float32(_GREY_LOW)).astype(np.float16)


def study_paths(preprocessed: str | Path) -> dict[int, Path]:
    """The files of all studies that 01_preprocess wrote.

    Parameters
    ----------
    preprocessed : str or Path
        The folder 01_preprocess of a run.

    Returns
    -------
    dict of int to Path
        study_id to the file of its volumes, for load_study.

    Raises
    ------
    FileNotFoundError
        There is none.
    """
    paths = {int(path.stem): path for path in sorted((Path(preprocessed) / "volumes").glob("*.safetensors"))}
    if not paths:
        raise FileNotFoundError(
            f"{Path(preprocessed).resolve() / 'volumes'} holds no study: PREPROCESSED is the folder 01_preprocess of a "
            "run; run that notebook first, or correct the path"
        )
    return paths
