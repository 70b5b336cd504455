"""Levels as files that 3D Slicer opens: points and boxes in its markups format (.mrk.json, LPS millimetres).

Source of the format: Slicer's markups-schema-v1.0.3.json (github.com/Slicer/Slicer, Modules/Loadable/Markups).

May use: slices, data, storage.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.geometry import LevelBox
from ..storage import write_json
from .slices import level_name

_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)


def write_markups(boxes: Sequence[LevelBox], folder: str | Path) -> list[Path]:
    """Write one study's levels for 3D Slicer: levels.mrk.json (a point at each disc's centre) and a box for each level,
    box_l1_l2.mrk.json and so on, since Slicer reads one markup from a file.

    Returns the files. Slicer opens them by drag and drop, over the study's images.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    markups = {"levels.mrk.json": points_markup(boxes)}
    markups |= {f"box_{box.level}.mrk.json": box_markup(box) for box in boxes}
    for name, markup in markups.items():
        write_json(folder / name, {"@schema": _SCHEMA, "markups": [markup]})
    return [folder / name for name in markups]


def points_markup(boxes: Sequence[LevelBox]) -> dict[str, Any]:
    """The discs' centres as one list of points, each called as its level is."""
    return _markup("Fiducial", "lumbar discs") | {
        "controlPoints": [_point(number, box) for number, box in enumerate(boxes, 1)]
    }


def box_markup(box: LevelBox) -> dict[str, Any]:
    """A level's box as a region of interest."""
    return _markup("ROI", level_name(box.level)) | {
        "roiType": "Box",
        "center": _numbers(box.center_lps_mm),
        # Its columns are the box's axes in patient coordinates.
        "orientation": _numbers(np.asarray(box.axes).T),
        "size": _numbers(box.extent_mm),
        "insideOut": False,
        "controlPoints": [_point(1, box)],
        "display": {"visibility": True, "opacity": 1.0, "fillVisibility": False, "handlesInteractive": False},
    }


def _markup(kind: str, name: str) -> dict[str, Any]:
    return {
        "type": kind,
        "name": name,
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": True,
        "labelFormat": "%N",
    }


def _point(number: int, box: LevelBox) -> dict[str, Any]:
    doubt = f", or {level_name(box.second)} ({box.second_share:.0%})" if box.second else ""
    return {
        "id": str(number),
        "label": level_name(box.level),
        "description": f"{box.source}, confidence {box.confidence:.2f}{doubt}",
        "position": _numbers(box.center_lps_mm),
        "selected": True,
        "locked": True,
        "visibility": True,
        "positionStatus": "defined",
    }


def _numbers(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in np.asarray(values, float).ravel()]
