"""Level boxes and label points in patient space, and where they lie in slices.

May use: source, tables, volume, names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..names import LEVEL_TABLE_COLUMNS, LEVELS
from .source import Source
from .tables import whole_number
from .volume import Study, Volume


def load_open3d() -> ModuleType:
    """Open3D, imported when first needed. Raises ImportError, saying what it needs from the system."""
    try:
        import open3d
    except ImportError as error:
        raise ImportError(f"Open3D cannot be loaded ({error}); on Debian: apt-get install libusb-1.0-0") from None
    return open3d


@dataclass
class LevelBox:
    """The oriented box of one disc level.

    center_lps_mm: (3,) the disc's centre; axes: (3, 3), rows are unit vectors in LPS, a right-handed frame: towards
    the head along the disc's normal, to the patient's left, to the back; extent_mm: (3,) full edge lengths along them.
    second: what the disc would be called by the second likeliest numbering of the vertebrae, "" where that is none;
    second_share: how likely that is, beside this one.
    """

    level: str
    center_lps_mm: np.ndarray
    axes: np.ndarray
    extent_mm: np.ndarray
    confidence: float = 1.0
    source: Source = Source(0)
    second: str = ""
    second_share: float = 0.0

    def to_lps(self, head_left_back_mm: ArrayLike) -> np.ndarray:
        """(..., 3) offsets from the centre along head, left, back -> (..., 3) LPS millimetres."""
        return np.asarray(head_left_back_mm, np.float64) @ self.axes + self.center_lps_mm

    def from_lps(self, xyz_mm: ArrayLike) -> np.ndarray:
        """(..., 3) LPS millimetres -> (..., 3) offsets from the centre along head, left, back."""
        return (np.asarray(xyz_mm, np.float64) - self.center_lps_mm) @ self.axes.T

    def corners_lps(self) -> np.ndarray:
        """(8, 3) corners in LPS millimetres."""
        return self.to_lps(corners_between((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5)) * self.extent_mm)

    def as_open3d(self) -> Any:
        """The box as open3d.geometry.OrientedBoundingBox; its axes are the columns of R."""
        o3d = load_open3d()
        return o3d.geometry.OrientedBoundingBox(
            np.asarray(self.center_lps_mm), np.asarray(self.axes).T, np.asarray(self.extent_mm)
        )

    def as_open3d_lines(self) -> Any:
        """The box's edges as open3d.geometry.LineSet."""
        box = self.as_open3d()
        box.color = (0.0, 0.0, 0.0)  # it is made without one, which Open3D warns of
        return load_open3d().geometry.LineSet.create_from_oriented_bounding_box(box)


def boxes_to_table(study_id: int, boxes: Iterable[LevelBox]) -> pd.DataFrame:
    """LevelBoxes of one study -> rows of levels.csv.

    Parameters
    ----------
    study_id : int
    boxes : iterable of LevelBox

    Returns
    -------
    DataFrame
        LEVEL_TABLE_COLUMNS, a row for each box: centre and edge lengths in millimetres, its axes as r00 ... r22, row by
        row; all in patient coordinates (LPS).
    """
    rows = []
    for box in boxes:
        values = [
            study_id,
            box.level,
            *box.center_lps_mm,
            *np.ravel(box.axes),
            *box.extent_mm,
            box.confidence,
            str(box.source),
            box.second,
            box.second_share,
        ]
        rows.append(dict(zip(LEVEL_TABLE_COLUMNS, values)))
    return pd.DataFrame(rows, columns=LEVEL_TABLE_COLUMNS)


def boxes_from_table(table: pd.DataFrame, study_id: int) -> list[LevelBox]:
    """The boxes of a study's five levels.

    Parameters
    ----------
    table : DataFrame
        levels.csv, see LEVEL_TABLE_COLUMNS: millimetres in patient coordinates.
    study_id : int

    Returns
    -------
    list of LevelBox
        Five, head to foot.

    Raises
    ------
    KeyError
        A level is absent.
    ValueError
        A source that is none, see Source; numbers that are not finite, axes that are no right-handed frame, or edges
        that are not positive.
    """
    rows = table[table["study_id"] == study_id].set_index("level")
    boxes = []
    for level in LEVELS:
        if level not in rows.index:
            raise KeyError(f"levels table: no {level} for study {study_id}; run 02_train_spinenet on this data")
        row = rows.loc[level]
        box = LevelBox(
            level,
            row[["x_mm", "y_mm", "z_mm"]].to_numpy(np.float64),
            row[[f"r{i}{j}" for i in range(3) for j in range(3)]].to_numpy(np.float64).reshape(3, 3),
            row[["extent_head_mm", "extent_left_mm", "extent_back_mm"]].to_numpy(np.float64),
            float(row["confidence"]),
            Source.parse(row["source"]),
            *_second(row),
        )
        if wrong := _what_is_wrong(box):
            raise ValueError(
                f"levels table: {level} of study {study_id} {wrong}; run 02_train_spinenet on this data again"
            )
        boxes.append(box)
    return boxes


def _what_is_wrong(box: LevelBox) -> str:
    """Why a box can be nowhere, as the rest of a sentence; otherwise ""."""
    if not np.isfinite([*box.center_lps_mm, *box.extent_mm, *box.axes.ravel()]).all():
        return "has coordinates, axes or edges that are not finite"
    # Tables may be rounded to a few digits.
    if np.abs(box.axes @ box.axes.T - np.eye(3)).max() > 0.01 or np.linalg.det(box.axes) < 0:
        return "has axes (r00 ... r22) that are no right-handed frame of unit vectors"
    return "" if (box.extent_mm > 0).all() else "has edges that are not positive"


def _second(row: pd.Series) -> tuple[str, float]:
    """What a row of levels.csv says of the second numbering; earlier tables say nothing."""
    name, share = row.get("second"), row.get("second_share")
    told = isinstance(name, str) and name != "" and share is not None and np.isfinite(share)
    return (str(name), float(share)) if told else ("", 0.0)


def corners_between(low: Iterable[float], high: Iterable[float]) -> np.ndarray:
    """(8, 3) corners of the box from low (3,) to high (3,)."""
    return np.array(list(itertools.product(*zip(low, high, strict=True))), np.float64)


def nearest_slice(volume: Volume, xyz_mm: ArrayLike) -> tuple[int, float, float, float]:
    """The slice of a volume that lies nearest to a point, and where the point is on it.

    Parameters
    ----------
    volume : Volume
    xyz_mm : (3,) sequence of float
        LPS.

    Returns
    -------
    index : int
        Of the slice; the first or last for a point beyond them.
    distance_mm : float
        From the slice to the point along the slice's normal; not negative.
    row_px, column_px : float
        From the centre of the first pixel; may lie outside of the image.
    """
    ijk = volume.lps_to_voxel(xyz_mm)
    index = int(np.clip(np.round(ijk[0]), 0, volume.array.shape[0] - 1))
    normal = np.cross(volume.affine[:3, 1], volume.affine[:3, 2])
    normal = normal / np.linalg.norm(normal)
    distance = abs((ijk[0] - index) * volume.affine[:3, 0] @ normal)
    return index, float(distance), float(ijk[1]), float(ijk[2])


def on_image(volume: Volume, x_px: Any, y_px: Any) -> Any:
    """Whether pixel coordinates (numbers or arrays) lie on a volume's slices; a pixel beyond the edge still does, for
    tools that count from a corner. False for NaN."""
    _, height, width = volume.array.shape
    return (x_px >= -1) & (x_px <= width) & (y_px >= -1) & (y_px <= height)


def place_points(coordinates: pd.DataFrame, study: Study) -> pd.DataFrame:
    """Where the label points of one study lie: DataFrame volume (index in study.volumes), slice (index), x_mm, y_mm,
    z_mm (LPS) and problem, in the order of the points.

    coordinates: rows of read_coordinates. A point on no slice of the study has -1, -1, NaN and says why in `problem`,
    which is "" for the others.
    """
    where: dict[int | None, dict[int | None, tuple[int, int]]] = {}
    for v, volume in enumerate(study.volumes):
        slices = where.setdefault(int(volume.series_id), {})
        slices.update({int(instance): (v, k) for k, instance in enumerate(volume.instance_numbers)})
    rows = []
    for row in coordinates.itertuples():
        name = f"study {study.study_id}, series {row.series_id}, slice {row.instance_number}"
        known = where.get(whole_number(row.series_id))
        v, k = (known or {}).get(whole_number(row.instance_number), (-1, -1))
        if known is None:
            problem = f"{name}: no such series was read"
        elif v < 0:
            problem = f"{name}: no such slice was read"
        elif not on_image(study.volumes[v], row.x_px, row.y_px):
            problem = f"{name}: ({row.x_px:.0f}, {row.y_px:.0f}) is outside the image"
        else:
            xyz = study.volumes[v].voxel_to_lps([k, row.y_px, row.x_px])
            rows.append((v, k, *xyz, ""))
            continue
        rows.append((-1, -1, np.nan, np.nan, np.nan, problem))
    return pd.DataFrame(rows, columns=["volume", "slice", "x_mm", "y_mm", "z_mm", "problem"])


def coordinates_to_lps(coordinates: pd.DataFrame, study: Study) -> np.ndarray:
    """Label points of one study -> (n, 3) LPS millimetres, NaN where place_points has a problem."""
    return place_points(coordinates, study)[["x_mm", "y_mm", "z_mm"]].to_numpy(np.float64)
