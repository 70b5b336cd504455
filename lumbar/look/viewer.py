"""A study to look at: a viewer for notebooks, a page that opens offline.

Both are the same page. The kernel reads a study and sends its slices, outlines and crops once; from then on the
browser draws (viewer.js), so that nothing waits for the kernel, the page also works without one, and neither needs
a library beyond what shows an HTML page.

May use: slices, report, plots, serve, grade, spine, data, names.
"""

import base64
import html
import io
import itertools
import json
import uuid
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.competition import from_submission, labels_to_array
from ..data.dicom import read_study
from ..data.geometry import boxes_from_table
from ..data.greys import normalise_study
from ..data.resample import sample_box
from ..data.source import Source
from ..data.tables import read_coordinates, read_labels
from ..data.volume import load_study, study_paths
from ..grade.member import Member, Weights
from ..grade.registry import MEMBERS, by_member, member_weights
from ..grade.tables import read_out_of_fold
from ..names import CONDITIONS, DESCRIPTIONS, DETECTION_COLUMNS, GRADES, LEVELS, SEVERITIES
from ..serve.members import weight_folders
from ..serve.study import studies_to_predict
from ..spine.vertebra import vertebrae_from_table
from .report import worst_rows
from .slices import (
    CONDITION_NAMES,
    CONDITION_OFFSETS_MM,
    LEVEL_COLOURS,
    LEVEL_NAMES,
    SEVERITY_COLOURS,
    condition_point,
    corners_on_slice,
    direction_letter,
    level_name,
    points_on_slice,
    slice_axes,
    slice_caption,
)

PAGE_BYTES = 6_000_000  # for the slices' pictures of a page: with the rest it stays below 10 MB, which mail takes
FRAGMENT_BYTES = 2_000_000  # of a fragment in a notebook: Jupyter drops more than 3 MB in three seconds

CROP_MM = (56.0, 96.0, 96.0)  # what the crops show along head, left, back: as much as the classifiers see
CROP_PX = 0.75  # mm a pixel
CLOUD_POINTS = 18_000
CLOUD_MARGIN_MM = (25.0, 20.0, 20.0)  # around the level boxes
CLOUD_COLOURS = ((230, 159, 0), (86, 180, 233), (240, 240, 240))  # of the kinds of series, in the order of DESCRIPTIONS


# ---- What members see where ----


def load_drawing(places, device="cpu") -> list[tuple[Member, list[Weights]]]:
    """Members that draw boxes (see Member.draw), with their weights in or below the given places; [] without any."""
    try:
        folders = weight_folders([place for place in places if Path(place).is_dir()])
    except FileNotFoundError:
        return []
    found = by_member(member_weights(folders)[0])
    return [
        (MEMBERS[name], [MEMBERS[name].load(path, device) for path in paths.values()])
        for name, paths in found.items()
        if type(MEMBERS[name]).draw is not Member.draw
    ]


def study_detections(drawing, study, boxes):
    """What members see where: table of DETECTION_COLUMNS.

    drawing: of load_drawing; study: normalised; boxes: five LevelBoxes.
    """
    tables = [member.draw(weights, study, boxes) for member, weights in drawing]
    tables = [table for table in tables if table is not None and len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=DETECTION_COLUMNS)


# ---- The page's data ----


def encode_slice(image, longest_px, quality):
    """A slice (h, w) in the normalised scale -> base64 text of a JPEG whose longer side has at most longest_px."""
    from PIL import Image

    picture = Image.fromarray((np.clip(np.asarray(image, np.float32), 0, 1) * 255).astype(np.uint8))
    picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _encode_study(study, max_bytes):
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


def _picture_mm(xy_px, pixel_mm):
    """(..., 2) x_px, y_px of pixel centres -> list of millimetres from the picture's upper left corner."""
    return ((np.asarray(xy_px, np.float64) + 0.5) * pixel_mm).round(2).tolist()


def _plane(origin, right, down, width_mm, height_mm):
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


def vertebra_prism(vertebra):
    """(8, 3) corners in LPS mm of the prism that a Vertebra stands for, numbered in binary as a LevelBox's."""
    front_top, back_top, back_low, front_low = vertebra.corners_lps_mm
    half = vertebra.left_lps * vertebra.width_mm / 2
    return np.array([c + s * half for s in (-1, 1) for c in (front_low, front_top, back_low, back_top)])


def tilt_caption(box):
    """How a LevelBox's disc lies against the patient's axes, in words."""
    head, parts = box.axes[0], []
    for towards, words in ((head[1], ("backward", "forward")), (head[0], ("left", "right"))):
        degrees = np.degrees(np.arctan2(towards, head[2]))
        if abs(degrees) >= 0.5:
            parts.append(f"{abs(degrees):.0f}° {words[int(degrees < 0)]}")
    return ", ".join(parts) or "none"


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


def _by_level(boxes, what):
    """what(box) for each of LEVELS, None where no box is of that level."""
    found = {box.level: what(box) for box in boxes}
    return [found.get(level) for level in LEVELS]


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


def _viewer_data(study, boxes, points, vertebrae, detections, max_bytes):
    """All that viewer.js draws, in numbers and pictures.

    stacks: one a volume (a plane's u, v, n, w, h, l as in _plane, g the slices' distance); panels: one a description,
    of frames: s the stack, i the picture, o the upper left corner, c the caption, m _slice_marks; boxes and bones:
    prisms in space; points: where each condition of each level is to be seen; crops, cloud; middle and reach: of the
    view in space; start: the level and condition shown first.
    """
    stacks, panels = [], [[] for _ in DESCRIPTIONS]
    # Stacks from head to foot, so that the slider runs through a series of one block per disc in the body's order.
    study = replace(
        study,
        volumes=sorted(
            study.volumes, key=lambda volume: -volume.voxel_to_lps((np.array(volume.array.shape) - 1) / 2)[2]
        ),
    )
    pictures = _encode_study(study, max_bytes)
    prisms = [vertebra_prism(vertebra) for vertebra in vertebrae]
    for number, volume in enumerate(study.volumes):
        _, down, right = slice_axes(volume)
        gap_mm, row_mm, column_mm = volume.spacing_mm
        pixel_mm = (column_mm, row_mm)
        plane = _plane(np.zeros(3), right, down, volume.array.shape[2] * column_mm, volume.array.shape[1] * row_mm)
        del plane["o"]
        stacks.append({**plane, "g": round(float(gap_mm), 2)})
        alike = [other for other in study.volumes if other.description == volume.description]
        place = next(i for i, other in enumerate(alike) if other is volume)
        for k in range(len(volume.array)):
            if (number, k) in pictures:
                panels[DESCRIPTIONS.index(volume.description)].append(
                    {
                        "s": number,
                        "i": pictures[number, k],
                        "o": volume.voxel_to_lps([k, -0.5, -0.5]).round(3).tolist(),
                        "c": slice_caption(volume, k, boxes)
                        + (f" (stack {place + 1} of {len(alike)})" if len(alike) > 1 else ""),
                        "m": _slice_marks(volume, k, pixel_mm, boxes, prisms, points, detections),
                    }
                )
    solid = [box.corners_lps() for box in boxes] or [
        volume.voxel_to_lps(list(itertools.product(*[(0, n - 1) for n in volume.array.shape])))
        for volume in study.volumes
    ]
    low, high = (np.concatenate(solid).min(0), np.concatenate(solid).max(0)) if solid else (np.zeros(3), np.ones(3))
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
        "crops": _crops(study, boxes) if boxes and study.volumes else None,
        "cloud": _cloud(study, low - CLOUD_MARGIN_MM, high + CLOUD_MARGIN_MM),
        "middle": ((low + high) / 2).round(1).tolist(),
        "reach": round(float(np.linalg.norm(high - low)) * 1.25, 1),
        "colours": LEVEL_COLOURS,
        "levels": LEVEL_NAMES,
        "conditions": CONDITION_NAMES,
        "grades": GRADES,
        "gradeColours": SEVERITY_COLOURS,
    }


# ---- The page ----


def grade_table_html(probabilities=None, truth=None):
    """A study's 25 cells as an HTML table: most probable grade, its probability, a bar, the grade in the labels."""
    head = "".join(f"<th scope=col>{name}</th>" for name in ("Level", *CONDITION_NAMES))
    rows = []
    for number in range(len(LEVELS)):
        cells = [f"<th scope=row>{LEVEL_NAMES[number]}</th>"]
        for condition in range(len(CONDITIONS)):
            text, read = "", -1 if truth is None else int(truth[condition][number])
            if probabilities is not None and np.isfinite(probabilities[condition][number]).all():
                p = np.asarray(probabilities[condition][number], np.float64)
                guess = int(p.argmax())
                bar = "".join(
                    f"<i style='width:{100 * part:.1f}%;background:{colour}'></i>"
                    for part, colour in zip(p, SEVERITY_COLOURS)
                )
                spoken = ", ".join(f"{grade} {part:.0%}" for grade, part in zip(GRADES, p))
                text = f"<span title='{spoken}'>{GRADES[guess]} {p[guess]:.0%}</span>"
                if read >= 0:
                    text += f"<br><span class='{'miss' if read != guess else 'hit'}'>label: {GRADES[read]}</span>"
                text += f"<div class=bar aria-hidden=true>{bar}</div>"
            elif read >= 0:
                text = f"label: {GRADES[read]}"
            cells.append(f"<td tabindex=0 data-cell={number},{condition}>{text or '&ndash;'}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


_KEYS = (
    (
        "wheel, slider, arrow keys",
        "turn the slices of the image under the mouse or last clicked; Page up and down: five",
    ),
    ("click or drag", "the other series follow to that place; dashed white: where their slices cut this one"),
    ("1 2 3 4 5", "the level, L1/L2 to L5/S1"),
    ("c, shift c", "next, previous condition"),
    ("z", "closer, around the marked place"),
    ("o", "all outlines off and on"),
    ("+ &minus; 0, shift and drag", "contrast and brightness; 0: as at first"),
    ("in space", "drag or arrow keys turn, wheel or + &minus; come closer"),
)


def _choice(name, text, options):
    items = "".join(f"<option value={number}>{html.escape(str(item))}</option>" for number, item in enumerate(options))
    return f"<label>{text} <select data-pick={name}>{items}</select></label>"


def _figures(data):
    """The three panels of slices."""
    figures = []
    for number, (description, frames) in enumerate(zip(DESCRIPTIONS, data["panels"])):
        if not frames:
            figures.append(
                f"<figure><figcaption><b>{description}</b></figcaption>"
                "<div class=none>no such series in this study</div></figure>"
            )
            continue
        stacks = list(dict.fromkeys(frame["s"] for frame in frames))
        series = "".join(f"<option value={stack}>stack {place}</option>" for place, stack in enumerate(stacks, 1))
        figures.append(
            f"<figure data-panel={number}><figcaption><b>{description}</b>"
            + (f"<select aria-label='stack of {description}'>{series}</select>" if len(stacks) > 1 else "")
            + f"<span></span></figcaption><div class=picture><canvas class=grey></canvas>"
            f"<svg tabindex=0 role=img aria-label='{description}'><g></g></svg></div>"
            f"<input type=range min=0 max={len(frames) - 1} value={len(frames) // 2} "
            "aria-label='slice of {description}'></figure>".replace("{description}", description)
        )
    return "".join(figures)


def _below(data, boxes):
    """What stands below the slices: the crops, the study in space, the chosen cell's answer."""
    parts = []
    if data["crops"]:
        names = "".join(f"<b>{description}</b>" for description in DESCRIPTIONS)
        cells = "".join(
            f"<svg role=img aria-label='{plane} plane of the crop, {description}'>"
            "<image class=grey preserveAspectRatio=none></image><g></g></svg>"
            for plane, description in itertools.product(("sagittal", "coronal", "axial"), DESCRIPTIONS)
        )
        parts.append(
            "<figure><figcaption><b>The level along its disc</b><span class=crop-caption></span></figcaption>"
            f"<div class=crops>{names}{cells}</div><div class=row>Planes through the condition&rsquo;s place. "
            "Black: no slice there.</div></figure>"
        )
    if any(data["panels"]):
        shown = "".join(
            f"<label><input type=checkbox data-show={name}{state}> {text}</label>"
            for name, text, state in (("planes", "slices", " checked"), ("cloud", "points", ""))
        )
        looks = "".join(f"<button data-look={name}>{name}</button>" for name in ("oblique", "front", "left", "above"))
        parts.append(
            "<figure class=space><figcaption><b>In space</b><span>the slices as chosen, level boxes, vertebrae</span>"
            "</figcaption><canvas tabindex=0 role=img aria-label='the study in space'></canvas>"
            f"<div class=row>{shown}<span>from {looks}</span></div></figure>"
        )
    answer = ""
    if data["members"] or data["truth"]:
        heads = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in data["names"])
        answer = (
            "<figcaption><b>Predicted and read</b><span class=answer-caption></span></figcaption>"
            f"<table><thead><tr><th>Grade</th>{heads}<th>Label</th></tr></thead><tbody class=grades></tbody></table>"
            + ("" if data["members"] else "<p>No prediction of this study was given.</p>")
        )
    found = "".join(
        f"<tr><th scope=row>{html.escape(level_name(box.level))}</th>"
        f"<td>{html.escape(str(box.source) or 'unknown')}</td>"
        f"<td>{box.confidence:.2f}</td><td>{tilt_caption(box)}</td></tr>"
        for box in boxes
    )
    if found:
        answer += (
            "<figcaption><b>Where the levels are from</b></figcaption><table class=levels><thead><tr><th>Level</th>"
            f"<th>Found on</th><th>Sure</th><th>Tilt</th></tr></thead><tbody>{found}</tbody></table>"
        )
    if answer:
        parts.append(f"<figure class=answer>{answer}</figure>")
    return f"<div class=below>{''.join(parts)}</div>"


def _by_member(probabilities):
    """dict name -> (5, 5, 3) from what study_html takes as probabilities."""
    if probabilities is None:
        return {}
    return probabilities if isinstance(probabilities, dict) else {"prediction": probabilities}


def study_html(
    study,
    boxes=None,
    points=None,
    probabilities=None,
    truth=None,
    title=None,
    page=False,
    max_bytes=None,
    vertebrae=None,
    detections=None,
    start=(3, 0),
):
    """A study to look through in any browser, offline: one file or fragment with pictures, style and script inside.

    Three linked panels of slices, the chosen level's crop in three planes along its disc, the study in space, and a
    table of all cells; viewer.js draws them. A click in one series moves the others to that place of the patient.

    study: normalised Study; boxes: LevelBoxes (outlined; dashed below a confidence of 0.5); points: label points as
    read_coordinates has them; probabilities: (5, 5, 3), or a dict name -> such; truth: (5, 5) grades of this study, -1
    missing; title: any text, escaped here; vertebrae: list of Vertebra; detections: table of study_detections.
    page: a whole page instead of a fragment for a notebook or report; several fragments on a page do not disturb
    each other. max_bytes: for the slices' pictures, which become coarser to fit (default PAGE_BYTES, FRAGMENT_BYTES);
    crops and the rest add about 0.7 MB. start: level and condition shown first. Shows no id but the study's, in
    `title`. Returns the HTML text.
    """
    boxes, vertebrae = list(boxes or ()), list(vertebrae or ())
    points, detections = (
        None if table is None else table[table["study_id"] == study.study_id] for table in (points, detections)
    )
    members = _by_member(probabilities)
    data = _viewer_data(
        study, boxes, points, vertebrae, detections, max_bytes or (PAGE_BYTES if page else FRAGMENT_BYTES)
    )
    data["members"] = [
        [[row.round(4).tolist() if np.isfinite(row).all() else None for row in cells] for cells in np.asarray(p, float)]
        for p in members.values()
    ]
    data["names"] = [str(name) for name in members]
    data["truth"] = None if truth is None else np.asarray(truth, int).tolist()
    data["start"] = [int(number) for number in start]
    # Names come from outside: without this sign none of them can end the script.
    numbers = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    identity = f"viewer-{uuid.uuid4().hex}"
    here = Path(__file__).parent
    style, script = ((here / f"viewer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    script = script.replace("ROOT_ID", f"'{identity}'", 1).replace("data = DATA", f"data = {numbers}", 1)
    name = html.escape(title or f"Study {study.study_id}")
    keys = "".join(f"<dt>{key}</dt><dd>{meaning}</dd>" for key, meaning in _KEYS)
    marks = [("boxes", "level boxes", boxes), ("bones", "vertebrae", vertebrae)]
    marks += [("points", "label points", points is not None and len(points))]
    marks += [("found", "detections", detections is not None and len(detections)), ("lines", "slice lines", True)]
    toggles = "".join(
        f"<label><input type=checkbox data-show={mark} checked> {text}</label>" for mark, text, there in marks if there
    )
    several = _choice("member", "table of", members) if len(members) > 1 else ""
    tables = "".join(
        f"<div data-member={number}{' hidden' if number else ''}>{grade_table_html(p, truth)}</div>"
        for number, p in enumerate(members.values())
    )
    tables = tables or (grade_table_html(None, truth) if truth is not None or boxes else "")
    swatches = "".join(
        f"<i class=swatch style='background:{colour}'></i>{grade}" for grade, colour in zip(GRADES, SEVERITY_COLOURS)
    )
    fragment = (
        f"<style>{style}</style><section class=lumbar-viewer id={identity} "
        f"data-lm-suppress-shortcuts=true><div class=head><h3>{name}</h3>"
        f"<details><summary>Mouse and keys</summary><dl>{keys}</dl></details></div><div class=tools>"
        f"{_choice('level', 'level', LEVEL_NAMES)}{_choice('condition', 'condition', CONDITION_NAMES)}"
        f"{several}{toggles}"
        "<label><input type=checkbox data-zoom> closer</label>"
        "<span><label>window: centre <input type=range data-grey=centre min=0 max=1 step=0.01 value=0.5></label>"
        "<label>width <input type=range data-grey=width min=0.05 max=2 step=0.01 value=1></label>"
        "<button data-reset>reset</button></span></div>"
        f"<div class=panels>{_figures(data)}</div>{_below(data, boxes)}"
        + (f"<div class=scroll>{tables}</div>" if tables else "")
        + (
            f"<div class=legend>Probabilities:{swatches}. Bold: the label is not the most probable grade. "
            "A cell shows its place in all series.</div>"
            if members
            else ""
        )
        + f"<noscript>The images need JavaScript.</noscript>{_grey_filter(identity)}</section><script>{script}</script>"
    )
    if not page:
        return fragment
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<meta name=color-scheme content='light dark'><title>{name}</title></head><body>{fragment}</body></html>\n"
    )


def _grey_filter(identity):
    """Window and level for all pictures of one viewer: a straight line from stored to shown grey."""
    functions = "".join(f"<feFunc{c} type=linear slope=1 intercept=0 data-grey></feFunc{c}>" for c in "RGB")
    return (
        f"<style>#{identity} .grey{{filter:url(#{identity}-grey)}}</style>"
        f"<svg width=0 height=0 style='position:absolute' aria-hidden=true>"
        f"<filter id={identity}-grey color-interpolation-filters=sRGB><feComponentTransfer>"
        f"{functions}</feComponentTransfer></filter></svg>"
    )


# ---- Live, in a notebook ----


def unseen_studies(data):
    """dict study_id -> function without arguments that reads that study of the competition folder's test set.

    For an Inspection, whose paths may be such functions: the test set has no volumes of 01. Empty without a test set.
    """

    def read(study_id, series):
        return normalise_study(read_study(Path(data) / "test_images" / str(study_id), series))

    if not (Path(data) / "test_series_descriptions.csv").is_file():
        return {}
    return {study_id: partial(read, study_id, series) for study_id, series in studies_to_predict(data, "test").items()}


def fallen_back(levels=None, log=None):
    """The studies where something did not go the usual way: DataFrame study_id, why; the most telling reasons first.

    levels: levels.csv as a table: levels that no sagittal image showed, or whose naming is in doubt; log:
    inference_log.csv: rows left to a prior or to the whole-study network alone, members lost, what was reported.
    """
    reasons = {}
    if log is not None:
        log = log.fillna("")
        for row in log.to_dict("records"):
            why = []
            if row.get("prior_rows"):
                why.append(f"{int(row['prior_rows'])} rows are the prior")
            if "study model" in str(row.get("rows_from", "")):
                why.append("the whole-study network alone")
            why += [str(row[column]) for column in ("dropped", "problems") if row.get(column)]
            if why:
                reasons.setdefault(int(row["study_id"]), []).extend(why)
    if levels is not None:
        for study_id, rows in levels.groupby("study_id", sort=False):
            odd = rows[~rows["source"].map(lambda source: Source.parse(source).sure)]
            if len(odd):
                names = ", ".join(f"{level_name(level)} {source}" for level, source in zip(odd["level"], odd["source"]))
                reasons.setdefault(int(study_id), []).append(f"levels: {names}")
    table = pd.DataFrame([(study_id, "; ".join(why)) for study_id, why in reasons.items()], columns=["study_id", "why"])
    prior_first = ~table["why"].str.contains("prior|alone")
    return table.iloc[np.argsort(prior_first, kind="stable")].reset_index(drop=True)


# In the frame: the page takes the notebook's theme, and the frame the page's height. Both fail harmlessly where the
# frame may not see the notebook.
_FRAME_SCRIPT = """
(() => {
const root = document.querySelector('.lumbar-viewer');
document.body.style.margin = 0;
try {
  const theme = window.frameElement.ownerDocument.body.dataset.jpThemeLight;
  if (theme) root.dataset.theme = theme === 'true' ? 'light' : 'dark';
  const fit = () => { window.frameElement.style.height = root.offsetHeight + 4 + 'px'; };
  new ResizeObserver(fit).observe(root);
} catch (error) {}
})();
"""


def _frame(page):
    """A page as a frame of its own within a notebook: widgets run no scripts, frames do."""
    page = page.replace("</body>", f"<script>{_FRAME_SCRIPT}</script></body>")
    return (
        "<iframe title='study' style='width:100%;height:1500px;border:0;display:block' "
        f'srcdoc="{html.escape(page)}"></iframe>'
    )


@dataclass
class Inspection:
    """What there is to look at.

    paths: dict study_id -> volume file, as study_paths returns it, or a function that returns the normalised Study
    (unseen_studies); levels, vertebrae: tables of 02 or 05; coordinates: as read_coordinates has them; truths: dict
    study_id -> (5, 5) grades, -1 missing; predicted: dict name -> dict study_id -> (5, 5, 3), NaN where it says
    nothing, the first of which ranks the errors; detectors: list of load_drawing, or a function that returns it; log:
    inference_log.csv.
    """

    paths: dict
    levels: pd.DataFrame | None = None
    vertebrae: pd.DataFrame | None = None
    coordinates: pd.DataFrame | None = None
    truths: dict = field(default_factory=dict)
    predicted: dict = field(default_factory=dict)
    detectors: object = ()
    log: pd.DataFrame | None = None

    def study_html(self, study_id, detections=False, **options):
        """A study's page or fragment: (HTML text, the study's problems as sentences).

        detections: run the detectors, a second or two; options: as study_html takes them.
        """
        if study_id not in self.paths:
            raise ValueError(f"there is no study {study_id}; one of the {len(self.paths)} is {next(iter(self.paths))}")
        path = self.paths[study_id]
        study = path() if callable(path) else load_study(path)
        there = self.levels is not None and (self.levels["study_id"] == study_id).any()
        boxes = boxes_from_table(self.levels, study_id) if there else []
        if detections and callable(self.detectors):
            self.detectors = self.detectors()
        text = study_html(
            study,
            boxes,
            self.coordinates,
            {name: own[study_id] for name, own in self.predicted.items() if study_id in own},
            self.truths.get(study_id),
            vertebrae=vertebrae_from_table(self.vertebrae, study_id) if self.vertebrae is not None else None,
            detections=study_detections(self.detectors, study, boxes) if detections and boxes else None,
            **options,
        )
        return text, study.problems


def read_inspection(data, preprocessed, levels_dir="", predictions=(), inference="", first="level"):
    """Gather an Inspection from a run's folders; what is absent is left out.

    data: competition folder; preprocessed: of 01; levels_dir: of 02; predictions: folders of 03 and 04, or one above
    them; inference: of 05, with which the test set is looked at, too; first: the member that ranks the errors.
    Raises FileNotFoundError without volumes, ValueError for a member that does not exist. What was looked for and is
    not there is printed.
    """
    if first not in MEMBERS:
        raise ValueError(f"MEMBER must be one of {', '.join(MEMBERS)}, not {first!r}")

    def table(folder, name):
        path = Path(folder) / name
        return pd.read_csv(path) if str(folder) and path.is_file() else None

    labels = Path(data) / "train.csv"
    members = read_out_of_fold(predictions)
    tables = {name: members[name] for name in sorted(members, key=lambda name: name != first)}
    log, submission = table(inference, "inference_log.csv"), table(inference, "submission.csv")
    if submission is not None:
        tables["ensemble"] = submission
    levels = [found for folder in (levels_dir, inference) if (found := table(folder, "levels.csv")) is not None]
    absent = {
        f"labels: {labels}": labels.is_file(),
        f"level boxes: levels.csv in {levels_dir or 'LEVELS_DIR'}": levels,
        f"out-of-fold predictions: oof.csv in or below {', '.join(map(str, predictions)) or 'PREDICTIONS'}": members,
    }
    for what in (what for what, there in absent.items() if not there):
        print(f"not there: {what}")
    return Inspection(
        study_paths(preprocessed) | (unseen_studies(data) if submission is not None or log is not None else {}),
        pd.concat(levels, ignore_index=True) if levels else None,
        table(levels_dir, "vertebrae.csv"),
        read_coordinates(data) if labels.is_file() else None,
        dict(zip(*labels_to_array(read_labels(labels)))) if labels.is_file() else {},
        {name: dict(zip(*from_submission(own))) for name, own in tables.items()},
        partial(load_drawing, predictions),
        log,
    )


def _jumps(inspection, count):
    """Options of the two lists to jump from: worst errors, studies that fell back: lists of (text, place)."""
    worst, truths, paths = [], inspection.truths, inspection.paths
    said = next(iter(inspection.predicted.values()), {})
    both = [study_id for study_id in said if study_id in truths and study_id in paths]
    if both:
        grades, said = np.array([truths[s] for s in both]), np.array([said[s] for s in both], float)
        # What a member does not say is no error of it.
        grades = np.where(np.isfinite(said).all(-1), grades, -1)
        for rank, row in enumerate(worst_rows(both, grades, np.nan_to_num(said, nan=1 / 3), count).itertuples(), 1):
            text = f"{rank}. study {row.study_id}: {LEVEL_NAMES[row.level]} {CONDITION_NAMES[row.condition].lower()}"
            place = (int(row.study_id), int(row.level), int(row.condition))
            worst.append((f"{text}, label {GRADES[int(row.grade)]}, loss {row.loss:.2f}", place))
    back = [
        (f"study {row.study_id}: {row.why}"[:160], (int(row.study_id), None, None))
        for row in fallen_back(inspection.levels, inspection.log).itertuples()
        if row.study_id in paths
    ]
    return worst, back


def inspect_study(inspection, worst=30, max_bytes=FRAGMENT_BYTES):
    """Live viewer for a notebook: choose a study, jump to errors and fallbacks; needs a running kernel.

    inspection: Inspection; worst: how many errors to list; max_bytes: of one study's slices, see FRAGMENT_BYTES.
    Everything within a study happens in the browser (study_html). Returns an ipywidgets.VBox whose `.controls` are the
    widgets by name, and whose `.place` holds the page. Raises ValueError when there is no study.
    """
    import ipywidgets as widgets

    if not inspection.paths:
        raise ValueError("no study to look at: paths is empty (run 01_preprocess first)")
    errors, back = _jumps(inspection, worst)
    why = {place[0]: text for text, place in back}
    wide = {"style": {"description_width": "110px"}, "layout": widgets.Layout(width="min(620px, 98%)")}
    studies = sorted(inspection.paths)

    def jumps(description, options):
        options = [(f"choose one of {len(options)}", None), *options] if options else [("none", None)]
        return widgets.Dropdown(description=description, options=options, disabled=len(options) == 1, **wide)

    controls = {
        "study": widgets.Dropdown(description="study", options=studies, **wide),
        "previous": widgets.Button(description="previous", layout=widgets.Layout(width="90px")),
        "next": widgets.Button(description="next", layout=widgets.Layout(width="90px")),
        "errors": jumps("worst errors", errors),
        "fallbacks": jumps("fell back", back),
        "detections": widgets.Checkbox(
            description="run the detectors on each study", value=False, indent=False, disabled=not inspection.detectors
        ),
    }
    said, place = widgets.HTML(), widgets.VBox(layout=widgets.Layout(overflow="hidden"))
    state = {"start": (3, 0), "busy": False}

    def show(change=None):
        if state["busy"]:
            return
        study_id = controls["study"].value
        said.value = f"study {study_id} &hellip;"
        try:
            page, problems = inspection.study_html(
                study_id, controls["detections"].value, page=True, max_bytes=max_bytes, start=state["start"]
            )
        except Exception as error:
            # One study that cannot be shown must not end the look at the others.
            said.value = html.escape(f"study {study_id} cannot be shown ({type(error).__name__}: {error})")
            place.children = ()
            return
        said.value = html.escape("; ".join([*problems, *([why[study_id]] if study_id in why else [])]))
        # A new widget, not a new value: Jupyter's limit on messages spares those that open one.
        old, place.children = place.children, (widgets.HTML(_frame(page), layout=widgets.Layout(margin="0")),)
        for widget in old:
            widget.close()

    def go(study_id, start):
        """Show a study once, at a level and condition."""
        state["start"], state["busy"] = start, True
        controls["study"].value = study_id
        state["busy"] = False
        show()

    def jumped(change):
        if change["new"] is not None:
            study_id, level, condition = change["new"]
            go(study_id, (3, 0) if level is None else (level, condition))

    def step(by):
        go(studies[(studies.index(controls["study"].value) + by) % len(studies)], state["start"])

    controls["study"].observe(show, "value")
    controls["detections"].observe(show, "value")
    controls["errors"].observe(jumped, "value")
    controls["fallbacks"].observe(jumped, "value")
    controls["previous"].on_click(lambda _: step(-1))
    controls["next"].on_click(lambda _: step(1))
    show()
    top = widgets.HBox([controls["study"], controls["previous"], controls["next"], controls["detections"]])
    viewer = widgets.VBox([top, controls["errors"], controls["fallbacks"], said, place])
    viewer.controls, viewer.place = controls, place
    return viewer
