"""What viewer.js draws of a study, in numbers and pictures: its series, the levels' crops, the study in space.

May use: slices, spine, data, names.
"""

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..data.geometry import LevelBox
from ..data.resample import sample_box
from ..data.volume import Study
from ..names import CONDITIONS, DESCRIPTIONS, GRADES, LEVELS, SEVERITIES
from ..spine.vertebra import Vertebra
from .slices import (
    CONDITION_NAMES,
    CONDITION_OFFSETS_MM,
    LEVEL_COLOURS,
    LEVEL_NAMES,
    SEVERITY_COLOURS,
    SEVERITY_INKS,
    condition_point,
    corners_on_slice,
    direction_letter,
    level_name,
    points_on_slice,
    slice_axes,
    slice_caption,
)

CROP_MM = (56.0, 96.0, 96.0)  # what the crops show along head, left, back: a little more than the level network sees
CROP_PX = 0.75  # mm a pixel
GRADED_ON = (2, 0, 0, 1, 1)  # the kind of series, in DESCRIPTIONS, on which each condition is graded
CLOUD_POINTS = 18_000
CLOUD_MARGIN_MM = (25.0, 20.0, 20.0)  # around the level boxes
CLOUD_COLOURS = ((230, 159, 0), (86, 180, 233), (240, 240, 240))  # of the kinds of series, in the order of DESCRIPTIONS


def viewer_data(
    study: Study,
    boxes: Sequence[LevelBox],
    points: pd.DataFrame | None,
    vertebrae: Sequence[Vertebra],
    detections: pd.DataFrame | None,
    max_bytes: float,
) -> dict[str, Any]:
    """All that viewer.js draws, in numbers and pictures.

    Stacks: one a volume (a plane's u, v, n, w, h, l as in _plane, g the slices' distance); panels: one a description,
    of frames: s the stack, i the picture, o the upper left corner, c the caption, m _slice_marks; boxes and bones:
    prisms in space; points: where each condition of each level is to be seen; second: a level's name and share by the
    second numbering, or null; graded: the panel of each condition; crops, cloud; middle and reach: of the view in
    space. study_html's arguments; max_bytes: for the slices' pictures.
    """
    study = _from_head_to_foot(study)
    prisms = [vertebra_prism(vertebra) for vertebra in vertebrae]
    stacks, panels = _stacks_and_panels(study, boxes, prisms, points, detections, max_bytes)
    low, high = _bounds(study, boxes)
    return {
        "stacks": stacks,
        "panels": panels,
        "boxes": [
            {
                "level": LEVELS.index(box.level),
                "sure": int(box.confidence >= 0.5),
                "corners": box.corners_lps().round(1).tolist(),
            }
            for box in boxes
        ],
        "bones": [
            {
                "name": vertebra.name,
                "seen": int(vertebra.source.seen),
                "corners": prism.round(1).tolist(),
            }
            for vertebra, prism in zip(vertebrae, prisms, strict=True)
        ],
        "points": [
            None if box is None else [condition_point(box, c).round(1).tolist() for c in range(len(CONDITIONS))]
            for box in _by_level(boxes, lambda box: box)
        ],
        "second": _by_level(
            boxes, lambda box: [level_name(box.second), round(box.second_share, 3)] if box.second else None
        ),
        "graded": GRADED_ON,
        "crops": _crops(study, boxes) if boxes and study.volumes else None,
        "cloud": _cloud(study, low - CLOUD_MARGIN_MM, high + CLOUD_MARGIN_MM),
        "middle": ((low + high) / 2).round(1).tolist(),
        "reach": round(float(np.linalg.norm(high - low)) * 1.25, 1),
        "colours": LEVEL_COLOURS,
        "levels": LEVEL_NAMES,
        "conditions": CONDITION_NAMES,
        "grades": GRADES,
        "gradeColours": SEVERITY_COLOURS,
        "gradeInks": SEVERITY_INKS,
    }


def _from_head_to_foot(study: Study) -> Study:
    """The slider then runs through a series of one block per disc in the body's order."""

    def height_mm(volume):
        return volume.voxel_to_lps((np.array(volume.array.shape) - 1) / 2)[2]

    return replace(study, volumes=sorted(study.volumes, key=lambda volume: -height_mm(volume)))


def _bounds(study: Study, boxes: Sequence[LevelBox]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest LPS mm (3,) of the level boxes, without any of the volumes."""
    solid = [box.corners_lps() for box in boxes] or [
        volume.voxel_to_lps(list(itertools.product(*[(0, n - 1) for n in volume.array.shape])))
        for volume in study.volumes
    ]
    return (np.concatenate(solid).min(0), np.concatenate(solid).max(0)) if solid else (np.zeros(3), np.ones(3))


def _by_level(boxes, what):
    """what(box) for each of LEVELS, None where no box is of that level."""
    found = {box.level: what(box) for box in boxes}
    return [found.get(level) for level in LEVELS]


# ---- Series ----


def encode_slice(image: np.ndarray, longest_px: int, quality: int) -> str:
    """A slice (h, w) in the normalised scale -> base64 text of a JPEG whose longer side has at most longest_px."""
    from PIL import Image

    picture = Image.fromarray((np.clip(np.asarray(image, np.float32), 0, 1) * 255).astype(np.uint8))
    picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _encode_study(study: Study, max_bytes: float) -> dict[tuple[int, int], str]:
    """dict (volume number, slice) -> base64 JPEG, as fine as fits into max_bytes; at the coarsest some are left out."""
    keys = [(number, k) for number, volume in enumerate(study.volumes) for k in range(len(volume.array))]
    for longest_px, quality in ((512, 80), (384, 75), (320, 65), (256, 55)):
        # A guess from every 8th slice saves encoding all of them in vain.
        some = [len(encode_slice(study.volumes[v].array[k], longest_px, quality)) for v, k in keys[::8]]
        if some and np.mean(some) * len(keys) < 0.95 * max_bytes:
            break
    else:
        keys = keys[:: int(np.ceil(np.mean(some) * len(keys) / (0.95 * max_bytes)))] if some else keys
    return {(v, k): encode_slice(study.volumes[v].array[k], longest_px, quality) for v, k in keys}


def _plane(
    origin: np.ndarray, right: np.ndarray, down: np.ndarray, width_mm: float, height_mm: float
) -> dict[str, Any]:
    """A plane picture in space as viewer.js knows it: upper left corner, unit vectors, size, letters of its sides."""
    return {
        "o": np.round(origin, 3).tolist(),
        "u": np.round(right, 5).tolist(),
        "v": np.round(down, 5).tolist(),
        "n": np.round(np.cross(right, down), 5).tolist(),
        "w": round(float(width_mm), 2),
        "h": round(float(height_mm), 2),
        "l": [direction_letter(side) for side in (-right, right, -down, down)],
    }


def _stacks_and_panels(
    study: Study,
    boxes: Sequence[LevelBox],
    prisms: Sequence[np.ndarray],
    points: pd.DataFrame | None,
    detections: pd.DataFrame | None,
    max_bytes: float,
) -> tuple[list[dict], list[list[dict]]]:
    """The series' planes and their slices, see viewer_data."""
    stacks: list[dict] = []
    panels: list[list[dict]] = [[] for _ in DESCRIPTIONS]
    pictures = _encode_study(study, max_bytes)
    for number, volume in enumerate(study.volumes):
        _, down, right = slice_axes(volume)
        gap_mm, row_mm, column_mm = volume.spacing_mm
        pixel_mm = (column_mm, row_mm)
        plane = _plane(np.zeros(3), right, down, volume.array.shape[2] * column_mm, volume.array.shape[1] * row_mm)
        del plane["o"]
        stacks.append({**plane, "g": round(float(gap_mm), 2)})
        for k in range(len(volume.array)):
            if (number, k) in pictures:
                panels[DESCRIPTIONS.index(volume.description)].append(
                    {
                        "s": number,
                        "i": pictures[number, k],
                        "o": volume.voxel_to_lps([k, -0.5, -0.5]).round(3).tolist(),
                        "c": slice_caption(volume, k, boxes),
                        "m": _slice_marks(volume, k, pixel_mm, boxes, prisms, points, detections),
                    }
                )
    return stacks, panels


def vertebra_prism(vertebra: Vertebra) -> np.ndarray:
    """(8, 3) corners in LPS mm of the prism that a Vertebra stands for, numbered in binary as a LevelBox's."""
    front_top, back_top, back_low, front_low = vertebra.corners_lps_mm
    half = vertebra.left_lps * vertebra.width_mm / 2
    return np.array([c + s * half for s in (-1, 1) for c in (front_low, front_top, back_low, back_top)])


def _picture_mm(xy_px: ArrayLike, pixel_mm: tuple[float, float]) -> list:
    """(..., 2) x_px, y_px of pixel centres -> list of millimetres from the picture's upper left corner."""
    return ((np.asarray(xy_px, np.float64) + 0.5) * np.asarray(pixel_mm)).round(2).tolist()


def _slice_marks(volume, k, pixel_mm, boxes, prisms, points, detections):
    """What is drawn on one slice, in the picture's millimetres: b(oxes), v(ertebrae), p(oints), d(etections)."""
    cuts = [
        (LEVELS.index(box.level), int(box.confidence >= 0.5), corners_on_slice(box.corners_lps(), volume, k))
        for box in boxes
    ]
    bones = [(number, corners_on_slice(prism, volume, k)) for number, prism in enumerate(prisms)]
    rings = [] if points is None else points_on_slice(points, volume, k).itertuples()
    found = [] if detections is None else points_on_slice(detections, volume, k).to_dict("records")
    return {
        "b": [
            [level, sure, np.ravel(_picture_mm(polygon, pixel_mm)).tolist()]
            for level, sure, polygon in cuts
            if len(polygon)
        ],
        "v": [[number, np.ravel(_picture_mm(cut, pixel_mm)).tolist()] for number, cut in bones if len(cut)],
        "p": [
            [
                LEVELS.index(row.level),
                *_picture_mm((row.x_px, row.y_px), pixel_mm),
                f"{level_name(row.level)} {CONDITION_NAMES[CONDITIONS.index(row.condition)].lower()}",
            ]
            for row in rings
        ],
        "d": [
            [
                LEVELS.index(row["level"]),
                CONDITIONS.index(row["condition"]),
                [round(float(row[severity]), 3) for severity in SEVERITIES],
                *_picture_mm((row["x_px"], row["y_px"]), pixel_mm),
                round(row["width_px"] * pixel_mm[0], 1),
            ]
            for row in found
        ],
    }


# ---- Crops ----


def tilt_caption(box: LevelBox) -> str:
    """How a LevelBox's disc lies against the patient's axes, in words."""
    head, parts = box.axes[0], []
    for towards, words in ((head[1], ("backward", "forward")), (head[0], ("left", "right"))):
        degrees = np.degrees(np.arctan2(towards, head[2]))
        if abs(degrees) >= 0.5:
            parts.append(f"{abs(degrees):.0f}° {words[int(degrees < 0)]}")
    return ", ".join(parts) or "none"


def _crops(study, boxes):
    """The levels' crops: pictures, and for each level and condition three planes through its place, by numbers."""
    pictures, planes = [], {}
    for box in boxes:
        made, own = {}, []
        for head, left, back in CONDITION_OFFSETS_MM:
            own.append([])
            # Each plane goes through the condition's place; along it the crop keeps its centre.
            for across, offset in ((1, (0, left, 14)), (2, (0, 0, back)), (0, (head, 0, 14))):
                if (across, offset) not in made:
                    frame, encoded = _crop_plane(study, box, offset, across)
                    numbers = [
                        -1 if one is None else len(pictures) + sum(x is not None for x in encoded[:n])
                        for n, one in enumerate(encoded)
                    ]
                    pictures += [one for one in encoded if one is not None]
                    made[across, offset] = {**frame, "i": numbers}
                own[-1].append(made[across, offset])
        planes[LEVELS.index(box.level)] = own
    return {
        "pictures": pictures,
        "planes": [planes.get(level) for level in range(len(LEVELS))],
        "tilts": _by_level(boxes, tilt_caption),
    }


def _crop_plane(study, box, offset_mm, across):
    """One plane of a level's crop: (its picture's frame, list of base64 JPEGs by DESCRIPTIONS, None without slices).

    offset_mm: the crop's centre along head, left, back; across: the axis (0 head, 1 left, 2 back) that is cut.
    """
    extent = np.array(CROP_MM)
    extent[across] = 1.0
    head_px, left_px, back_px = (max(1, round(mm / CROP_PX)) if a != across else 1 for a, mm in enumerate(extent))
    centre = box.to_lps(offset_mm)
    crop, covered = sample_box(study, centre, box.axes, extent[[0, 2, 1]], (head_px, back_px, left_px))
    head, left, back = box.axes
    right, down, wide, tall = (
        (left, back, extent[1], extent[2]),
        (back, -head, extent[2], extent[0]),
        (left, -head, extent[1], extent[0]),
    )[across]
    frame = _plane(centre - right * wide / 2 - down * tall / 2, right, down, wide, tall)
    axis = {0: 1, 1: 3, 2: 2}[across]  # crops have the axes channel, head, back, left
    pictures = [
        encode_slice(np.take(crop, 0, axis)[channel], 1000, 75) if covered[channel].any() else None
        for channel in range(len(DESCRIPTIONS))
    ]
    return frame, pictures


# ---- In space ----


def _cloud(study, low, high):
    """Bright voxels of each kind of series, thinned at random: coordinates in 0.1 mm and grey values, as base64.

    low, high: (3,) LPS mm; only what lies between them: near the spine the points say more than in the fat below the
    skin, which is brighter.
    """
    rng = np.random.default_rng(0)
    points, greys, counts = [], [], []
    for description in DESCRIPTIONS:
        own, grey = [np.zeros((0, 3))], [np.zeros(0)]
        for volume in study.of(description):
            index = rng.integers(0, volume.array.shape, (8 * CLOUD_POINTS // len(study.of(description)), 3))
            xyz = volume.voxel_to_lps(index)
            values = np.asarray(volume.array[tuple(index.T)], np.float32)
            kept = (values > 0.4) & (xyz > low).all(1) & (xyz < high).all(1)
            own.append(xyz[kept])
            grey.append(np.clip(values[kept], 0, 1) * 255)
        own, grey = np.concatenate(own), np.concatenate(grey)
        kept = rng.permutation(len(own))[: CLOUD_POINTS // len(DESCRIPTIONS)]
        counts.append(len(kept))
        points.append(own[kept])
        greys.append(grey[kept])
    tenths = np.clip(np.concatenate(points) * 10, -32767, 32767).round().astype("<i2")
    return {
        "xyz": base64.b64encode(tenths.tobytes()).decode(),
        "grey": base64.b64encode(np.concatenate(greys).astype(np.uint8).tobytes()).decode(),
        "counts": counts,
        "colours": CLOUD_COLOURS,
    }
