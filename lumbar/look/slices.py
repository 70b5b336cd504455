"""Where things lie on a slice, and what they are called and coloured in figures.

May use: data, names.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..data.geometry import LevelBox, nearest_slice, on_image
from ..data.volume import Volume
from ..names import LEVELS

# Okabe and Ito's palette: told apart with every common kind of colour blindness. Severity is also always written.
# The levels' colours are lightened, for lines on dark images.
LEVEL_COLOURS = ("#62BEF5", "#FFB000", "#2ED8A3", "#F0E442", "#F590CF")
SEVERITY_COLOURS = ("#56B4E9", "#E69F00", "#D55E00")
SEVERITY_INKS = ("#7CC8F5", "#FFB733", "#FF9248")  # the same, for texts on dark images
MEMBER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8A00", "#555555")
LEVEL_NAMES = tuple(level.upper().replace("_", "/") for level in LEVELS)
CONDITION_NAMES = ("Spinal canal", "Left foramen", "Right foramen", "Left subarticular", "Right subarticular")
# Where a condition is to be seen: mm from the disc's centre along head, left, back.
CONDITION_OFFSETS_MM = ((0, 0, 23), (9, 17, 20), (9, -17, 20), (0, 9, 20), (0, -9, 20))


def direction_letter(vector: ArrayLike) -> str:
    """Letter of the side of the body that an LPS vector (3,) points to: L R P A H F (head, foot)."""
    vector = np.asarray(vector, dtype=float)
    axis = int(np.argmax(np.abs(vector)))
    return (("R", "L"), ("A", "P"), ("F", "H"))[axis][int(vector[axis] > 0)]


def slice_axes(volume: Volume) -> np.ndarray:
    """Unit vectors (LPS) of a volume's slice normal, rows (downwards) and columns (rightwards): (3, 3)."""
    down, right = (volume.affine[:3, axis] / np.linalg.norm(volume.affine[:3, axis]) for axis in (1, 2))
    normal = np.cross(right, down)
    return np.stack([normal / np.linalg.norm(normal), down, right])


def nearest_volume(volumes: Sequence[Volume], xyz_mm: np.ndarray) -> Volume:
    """The volume of a list whose images come nearest to an LPS point (3,); of equals the one with the nearest slice."""

    def distance_mm(volume):
        voxel = volume.lps_to_voxel(xyz_mm)
        outside = np.maximum(0, np.maximum(-0.5 - voxel, voxel - np.array(volume.array.shape) + 0.5))
        return np.linalg.norm(outside * volume.spacing_mm) + 1e-3 * nearest_slice(volume, xyz_mm)[1]

    return min(volumes, key=distance_mm)


def condition_point(box: LevelBox, condition: int) -> np.ndarray:
    """Point (3,) in LPS mm where condition number `condition` is to be seen at a LevelBox's level."""
    return box.to_lps(CONDITION_OFFSETS_MM[condition])


def corners_on_slice(corners_lps: np.ndarray, volume: Volume, index: int) -> np.ndarray:
    """Where a slice cuts a prism: polygon (n, 2) as x_px, y_px of pixel centres in order, n = 0 if it does not.

    corners_lps: (8, 3) in LPS mm, numbered in binary as LevelBox.corners_lps has them.
    """
    voxels = volume.lps_to_voxel(corners_lps)
    height = voxels[:, 0] - index
    cuts = []
    for a, b in itertools.combinations(range(8), 2):
        # Corners are numbered in binary: an edge joins two that differ in one bit.
        if (a ^ b).bit_count() == 1 and (height[a] > 0) != (height[b] > 0):
            cuts.append(voxels[a] + height[a] / (height[a] - height[b]) * (voxels[b] - voxels[a]))
    if len(cuts) < 3:
        return np.zeros((0, 2))
    polygon = np.array(cuts)[:, [2, 1]]
    around = polygon - polygon.mean(0)
    return polygon[np.argsort(np.arctan2(around[:, 1], around[:, 0]))]


def box_on_slice(box: LevelBox, volume: Volume, index: int) -> np.ndarray:
    """Where a slice cuts a LevelBox: polygon (n, 2) as x_px, y_px of pixel centres in order, n = 0 if it does not."""
    return corners_on_slice(box.corners_lps(), volume, index)


def points_on_slice(points: pd.DataFrame, volume: Volume, index: int) -> pd.DataFrame:
    """Rows of a table of label points (see read_coordinates) that lie on one slice of a volume."""
    return points[
        (points["series_id"] == volume.series_id)
        & (points["instance_number"] == int(volume.instance_numbers[index]))
        & on_image(volume, points["x_px"], points["y_px"])
    ]


def level_name(level: str) -> str:
    """`l4_l5` -> `L4/L5`."""
    return level.upper().replace("_", "/")


def slice_caption(volume: Volume, index: int, boxes: Sequence[LevelBox] | None = None) -> str:
    """Where a slice lies, in words: beside the spine's middle (sagittal), above or below a disc (axial)."""
    caption = f"slice {index + 1} of {len(volume.array)}"
    axis = {"sagittal": 0, "axial": 2}.get(volume.plane)
    boxes = boxes or ()
    if axis is None or (axis == 2 and not boxes):
        return caption
    normal = slice_axes(volume)[0]
    normal = normal if normal[axis] > 0 else -normal
    middle_px = (np.array(volume.array.shape) - 1) / 2
    here = volume.voxel_to_lps([index, *middle_px[1:]])
    if axis == 0:
        centres = [box.center_lps_mm for box in boxes] or [volume.voxel_to_lps(middle_px)]
        names, sides = ["the spine's middle" if boxes else "the stack's middle"], ("left of", "right of")
        beside = [(here - np.mean(centres, 0)) @ normal]
    else:
        names, sides = [level_name(box.level) for box in boxes], ("above", "below")
        beside = [(here - box.center_lps_mm) @ normal for box in boxes]
    nearest = int(np.argmin(np.abs(beside)))
    if abs(beside[nearest]) < 0.5:
        return f"{caption}, at {names[nearest]}"
    return f"{caption}, {abs(beside[nearest]):.0f} mm {sides[int(beside[nearest] < 0)]} {names[nearest]}"
