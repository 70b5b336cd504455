"""Vertebral bodies: their corners, names and tables.

May use: data, names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..data.source import Source
from ..data.volume import Volume
from ..names import LEVEL_VERTEBRAE, VERTEBRAE

# The method of Windsor, Jamaludin, Kadir, Zisserman, "A Convolutional Approach to Vertebrae Detection and Labelling
# in Whole Spine MRI" (MICCAI 2020), from its description: a network marks the four corners and the centroid of each
# vertebral body in every sagittal slice and, at each corner, points to the centroid it belongs to; slices are linked
# to vertebrae in 3D, and the chain of vertebrae is named by appearance and order. Ours is smaller, and naming is one
# dynamic programme that counts up from the sacrum instead of two more networks and a beam search.

CORNERS = ("as", "ps", "pi", "ai")  # anterior-superior, posterior-superior, posterior-inferior, anterior-inferior
VERTEBRA_TABLE_COLUMNS = (
    ["study_id", "vertebra", "x_mm", "y_mm", "z_mm"]
    + [f"{corner}_{axis}_mm" for corner in CORNERS for axis in "xyz"]
    + ["width_mm", "confidence", "source"]
)
# What one body looks like: L5 is a wedge above the sacrum's tilt, the other lumbar ones resemble each other; S2 stands
# for all below S1.
SPINE_CLASSES = ("thoracic", "lumbar", "L5", "S1", "S2")
# A field of view may reach beyond the vertebrae that anyone asks for; naming needs places for those too.
_CHAIN = ("T7", "T8", "T9") + VERTEBRAE + ("S3",)
_LUMBAR = tuple(dict.fromkeys(name for pair in LEVEL_VERTEBRAE.values() for name in pair))  # L1 ... S1
UNCERTAIN = "uncertain"  # the name of a detection that has no place in the chain
AMBIGUOUS_SHARE = 0.7  # a name that fewer of all possible namings agree on is said to be uncertain


def spine_class(name: str) -> int:
    """Index into SPINE_CLASSES of a vertebra's name."""
    return {"T": 0, "L": 2 if name == "L5" else 1}.get(name[0], 3 if name == "S1" else 4)


def spanned_mm(corners_mm: np.ndarray) -> float:
    """From the middle of the upper edge to that of the lower one. corners_mm: (4, 2 or 3), in the order of CORNERS."""
    return float(np.linalg.norm(corners_mm[:2].mean(0) - corners_mm[2:].mean(0)))


@dataclass
class Vertebra:
    """One vertebral body.

    corners_lps_mm: (4, 3), in the order of CORNERS, in its mid-sagittal plane; width_mm: from right to left;
    appearance: (len(SPINE_CLASSES),) log-probabilities, or None; name: "T10" ... "S2", "uncertain", "" before naming;
    source: where it comes from; uncertain where its name is doubtful, see name_vertebrae; across_sd_mm: how surely its
    place across the slices is known, as a standard deviation; in_image_mm: where the images' border touches it, how
    much of its height lies within, else inf.
    """

    corners_lps_mm: np.ndarray
    width_mm: float
    confidence: float = 1.0
    name: str = ""
    source: Source = Source(0)
    appearance: np.ndarray | None = None
    across_sd_mm: float = 2.0
    in_image_mm: float = np.inf

    @property
    def center_lps_mm(self) -> np.ndarray:
        """(3,): mean of the corners."""
        return self.corners_lps_mm.mean(0)

    @property
    def height_mm(self) -> float:
        """From the middle of the upper end plate to that of the lower one."""
        return spanned_mm(self.corners_lps_mm)

    @property
    def left_lps(self) -> np.ndarray:
        """(3,) unit vector to the patient's left, perpendicular to the plane of the corners."""
        front_top, back_top, back_low, front_low = self.corners_lps_mm
        back = back_top + back_low - front_top - front_low
        head = front_top + back_top - front_low - back_low
        left = np.cross(back, head)
        return left / np.linalg.norm(left)


def vertebrae_to_table(study_id: int, vertebrae: Iterable[Vertebra]) -> pd.DataFrame:
    """Vertebrae of one study -> rows of vertebrae.csv.

    Parameters
    ----------
    study_id : int
    vertebrae : iterable of Vertebra

    Returns
    -------
    DataFrame
        VERTEBRA_TABLE_COLUMNS, a row for each vertebra: centre, corners and width in millimetres, in patient
        coordinates (LPS).
    """
    rows = [
        [study_id, v.name, *v.center_lps_mm, *v.corners_lps_mm.ravel(), v.width_mm, v.confidence, str(v.source)]
        for v in vertebrae
    ]
    return pd.DataFrame(rows, columns=VERTEBRA_TABLE_COLUMNS)


def vertebrae_from_table(table: pd.DataFrame, study_id: int) -> list[Vertebra]:
    """The vertebrae of a study.

    Parameters
    ----------
    table : DataFrame
        vertebrae.csv (VERTEBRA_TABLE_COLUMNS): millimetres in patient coordinates.
    study_id : int

    Returns
    -------
    list of Vertebra
        In the table's order; empty where it has none.
    """
    columns = VERTEBRA_TABLE_COLUMNS[5:17]
    return [
        Vertebra(
            np.array([row[c] for c in columns], np.float64).reshape(4, 3),
            float(row["width_mm"]),
            float(row["confidence"]),
            str(row["vertebra"]),
            Source.parse(row["source"]),
        )
        for row in table[table["study_id"] == study_id].to_dict("records")
    ]


# -- bodies in slices


def upright(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """(array (slice, row, column), affine): the volume with rows to the feet and columns to the back, not resampled."""
    array, affine = np.asarray(volume.array), np.array(volume.affine, np.float64)
    if abs(affine[2, 1]) < abs(affine[2, 2]):  # columns run along the spine
        array, affine = array.transpose(0, 2, 1), affine[:, [0, 2, 1, 3]]
    for axis, patient_axis, sign in ((1, 2, -1), (2, 1, 1)):
        if affine[patient_axis, axis] * sign < 0:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return array, affine


def project_vertebrae(vertebrae: Sequence[Vertebra], affine: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the bodies' corners lie in one slice.

    affine: (4, 4) from (slice, row, column, 1) to LPS; index: of the slice. The body is taken as a prism along its
    own left-right axis. Returns (corners_px (v, 4, 2) as (row, column), offset_mm (v,) from the body's
    mid-sagittal plane to the slice along that axis).
    """
    inverse = np.linalg.inv(affine)
    corners_px, offset_mm = np.zeros((len(vertebrae), 4, 2)), np.zeros(len(vertebrae))
    for number, vertebra in enumerate(vertebrae):
        step = inverse[:3, :3] @ vertebra.left_lps
        ijk = vertebra.corners_lps_mm @ inverse[:3, :3].T + inverse[:3, 3]
        offset_mm[number] = (index - ijk[:, 0].mean()) / step[0]
        corners_px[number] = (ijk + offset_mm[number] * step)[:, 1:]
    return corners_px, offset_mm


def _clip_polygon(polygon, edge_from, edge_to):
    """The part of a polygon [(row, column), ...] on the inner side of a line (Sutherland and Hodgman, 1974)."""
    normal = (edge_from[1] - edge_to[1], edge_to[0] - edge_from[0])
    side = [normal[0] * (p[0] - edge_from[0]) + normal[1] * (p[1] - edge_from[1]) for p in polygon]
    kept = []
    for k in range(len(polygon)):
        p, q, a, b = polygon[k - 1], polygon[k], side[k - 1], side[k]
        if (a < 0) != (b < 0):
            t = a / (a - b)
            kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        if b >= 0:
            kept.append(q)
    return kept


def _signed_area(polygon):
    return 0.5 * sum(polygon[k - 1][0] * polygon[k][1] - polygon[k][0] * polygon[k - 1][1] for k in range(len(polygon)))


def polygon_iou(first: ArrayLike, second: ArrayLike) -> float:
    """Intersection over union of two convex polygons (k, 2), in either sense of rotation.

    >>> round(polygon_iou([(0, 0), (0, 2), (2, 2), (2, 0)], [(0, 1), (0, 3), (2, 3), (2, 1)]), 3)
    0.333
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if (first.max(0) <= second.min(0)).any() or (second.max(0) <= first.min(0)).any():
        return 0.0
    first, second = [tuple(p) for p in first.tolist()], [tuple(p) for p in second.tolist()]
    if _signed_area(second) < 0:
        second = second[::-1]
    common = first
    for k in range(len(second)):
        common = _clip_polygon(common, second[k - 1], second[k])
        if len(common) < 3:
            return 0.0
    shared = abs(_signed_area(common))
    union = abs(_signed_area(first)) + abs(_signed_area(second)) - shared
    return shared / union if union > 0 else 0.0
