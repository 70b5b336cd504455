"""A box for every level, also where bodies were not found: the prior, the axial slices, the neighbours.

May use: vertebra, naming, data, names.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from ..data.geometry import LevelBox
from ..data.resample import study_box
from ..data.source import Source
from ..data.volume import Study
from ..names import LEVEL_VERTEBRAE, LEVELS, VERTEBRAE
from .naming import PLACE_SPREAD_MM, capped_half_square, chain_layout
from .vertebra import _CHAIN, _LUMBAR, Vertebra, vertebrae_from_table


def study_anchors(study: Study) -> dict[str, np.ndarray]:
    """Where a study's series lie: dict "sagittal", "axial" -> (3,) centre in LPS mm, as far as it has such series."""
    anchors = {}
    for plane in ("sagittal", "axial"):
        volumes = [v for v in study.volumes if v.description.lower().startswith(plane)]
        if volumes:
            anchors[plane] = study_box(replace(study, volumes=volumes))[0]
    return anchors


def fit_level_prior(anchors: Mapping[int, dict], vertebrae: pd.DataFrame) -> dict:
    """The mean layout of a set of studies.

    anchors: dict study_id -> study_anchors(study); vertebrae: table with the columns of vertebrae.csv, true or
    detected. Returns a dict for JSON: layout_mm (name -> (4, 3) median corners relative to the centre of the sagittal
    series), width_mm (name -> mm), axial_mm ((3,) median centre of the axial series relative to the sagittal one's).
    Raises ValueError when a vertebra of L1 to S1 occurs in no study with a sagittal series.
    """
    corners: dict[str, list[np.ndarray]] = {}
    widths: dict[str, list[float]] = {}
    for study_id, anchor in anchors.items():
        if "sagittal" in anchor:
            for vertebra in vertebrae_from_table(vertebrae, study_id):
                corners.setdefault(vertebra.name, []).append(vertebra.corners_lps_mm - anchor["sagittal"])
                widths.setdefault(vertebra.name, []).append(vertebra.width_mm)
    missing = [name for name in _LUMBAR if name not in corners]
    if missing:
        raise ValueError(f"no study shows {', '.join(missing)}: the mean layout needs L1 to S1")
    shifts = [a["axial"] - a["sagittal"] for a in anchors.values() if "axial" in a and "sagittal" in a]
    return {
        "layout_mm": {name: np.median(corners[name], 0).round(2).tolist() for name in VERTEBRAE if name in corners},
        "width_mm": {name: round(float(np.median(widths[name])), 2) for name in VERTEBRAE if name in widths},
        "axial_mm": np.median(shifts, 0).round(2).tolist() if shifts else [0.0, 0.0, 0.0],
        "studies": len(anchors),
    }


def refit_level_prior(anchors: Mapping[int, dict], vertebrae: pd.DataFrame, prior: dict, sure: float = 0.3) -> dict:
    """The mean layout of these studies themselves, from their surely detected bodies; `prior` where they show too few.

    anchors: dict study_id -> study_anchors(study); vertebrae: table, as locate_studies returns it.
    """
    by_image = vertebrae["source"].map(lambda source: Source.parse(source).sure)
    seen = vertebrae[(vertebrae["confidence"] > sure) & by_image]
    complete = seen[seen["vertebra"].isin(_LUMBAR)].groupby("study_id")["vertebra"].nunique() == len(_LUMBAR)
    if complete.sum() < 20:
        return prior
    return fit_level_prior({i: anchors[i] for i in complete.index[complete]}, seen)


def complete_vertebrae(named: Sequence[Vertebra], anchors: Mapping[str, np.ndarray], prior: dict) -> list[Vertebra]:
    """L1 to S1, whatever was found: list of six Vertebrae.

    A missing one is placed by the prior's layout, shifted, turned and scaled in the sagittal plane to fit the bodies
    found (least squares, the weight halving with each step away from the missing one), and continues their line to the
    side; confidence halves with each
    step to the nearest. With none found the layout stands around the series' centre: source prior, confidence 0.1,
    or 0 for a study without volumes. anchors: study_anchors(study).
    """
    found = {v.name: v for v in named}
    layout = {name: np.array(corners) for name, corners in prior["layout_mm"].items()}
    usable = [name for name in found if name in layout]
    vertebrae = []
    for name in _LUMBAR:
        if name in found:
            vertebrae.append(found[name])
            continue
        corners = layout[name].copy()
        if not usable:
            axial = anchors.get("axial", np.zeros(3)) - np.array(prior["axial_mm"])
            corners += anchors.get("sagittal", axial)
            vertebrae.append(Vertebra(corners, prior["width_mm"][name], 0.1 if anchors else 0.0, name, Source.PRIOR))
            continue
        steps = np.array([abs(_CHAIN.index(other) - _CHAIN.index(name)) for other in usable])
        weight = np.repeat(0.5**steps, 4)
        weight = weight / weight.sum()
        model = np.concatenate([layout[other] for other in usable])
        seen = np.concatenate([found[other].corners_lps_mm for other in usable])
        model_mean, seen_mean = weight @ model, weight @ seen
        # Turn and scale in (y, z) as one complex factor.
        p = (model - model_mean) @ [0, 1, 1j]
        q = (seen - seen_mean) @ [0, 1, 1j]
        factor = (weight * p.conj()) @ q / (weight @ np.abs(p) ** 2)
        factor *= np.clip(abs(factor), 0.75, 1.3) / abs(factor)
        placed = factor * ((corners - model_mean) @ [0, 1, 1j])
        corners = np.column_stack([corners[:, 0] - model_mean[0], placed.real, placed.imag]) + seen_mean
        # Sideways it continues the line of the bodies around it; of few that lie near each other no line is known.
        x, _, z = ((seen - seen_mean) * np.sqrt(weight)[:, None]).T
        lean = np.clip(x @ z / (z @ z + _LEANING_MM**2), -_STEEPEST, _STEEPEST)
        corners[:, 0] += lean * (corners[:, 2].mean() - seen_mean[2])
        nearest = found[usable[int(steps.argmin())]]
        source = nearest.source | Source.EXTRAPOLATED
        confidence = nearest.confidence * 0.5 ** int(steps.min())
        vertebrae.append(Vertebra(corners, prior["width_mm"][name], confidence, name, source))
    return vertebrae


def _lefts(vertebrae, level):
    """(3,) unit vector to the patient's left in the plane of a level's disc.

    True bodies know their own left. Detected ones do not: their corners lie in the slices' plane, which follows the
    scanner and not a scoliosis. There the disc stands across the line through the bodies around it (weights 1 for its
    two, 1/4 for the next ones: a centre is known to a millimetre or two sideways, a tilt from two would be noise).
    """
    found = {v.name: v for v in vertebrae}
    pair = [found[name] for name in LEVEL_VERTEBRAE[level]]
    if all(v.source == Source.TRUTH for v in pair):
        left = sum(v.left_lps for v in pair)
        return left / np.linalg.norm(left)
    first = _CHAIN.index(LEVEL_VERTEBRAE[level][0])
    near = [
        (found[name], weight)
        for name, weight in zip(_CHAIN[first - 1 : first + 3], (0.25, 1, 1, 0.25))
        if name in found
    ]
    x, _, z = np.stack([v.center_lps_mm for v, _ in near], 1)
    weight = np.array([w * max(v.confidence, 0.01) for v, w in near])
    x, z = x - np.average(x, weights=weight), z - np.average(z, weights=weight)
    slope = (weight * x * z).sum() / (weight * z**2).sum()
    slope = np.clip(slope, -_STEEPEST, _STEEPEST)
    return np.array([1.0, 0.0, -slope]) / np.hypot(1.0, slope)


_STEEPEST = np.tan(np.radians(25))  # coronal tilt of a disc; more is a wrong detection
_LEANING_MM = 12.0  # bodies less far apart than this do not tell how a spine leans


def level_boxes(vertebrae: Sequence[Vertebra]) -> list[LevelBox]:
    """The LevelBoxes between named neighbours, head to foot; levels without both neighbours are left out.

    Centre: between the end plates. Axes: head perpendicular to the mean of the two end plates and to the left-right
    axis of _lefts; left across both. Extent: head from body centre to body centre; left the bodies' width; back the
    end plates' depth.
    """
    found = {v.name: v for v in vertebrae}
    boxes = []
    for level in LEVELS:
        upper, lower = (found.get(name) for name in LEVEL_VERTEBRAE[level])
        if upper is None or lower is None:
            continue
        plates = np.stack([upper.corners_lps_mm[[3, 2]], lower.corners_lps_mm[[0, 1]]])  # (plate, front | back, 3)
        along = plates[:, 1] - plates[:, 0]
        back = (along / np.linalg.norm(along, axis=1, keepdims=True)).sum(0)
        left = _lefts(vertebrae, level)
        head = np.cross(left, back)
        head /= np.linalg.norm(head)
        boxes.append(
            LevelBox(
                level,
                plates.mean((0, 1)),
                np.stack([head, left, np.cross(head, left)]),
                np.array(
                    [
                        abs((upper.center_lps_mm - lower.center_lps_mm) @ head),
                        (upper.width_mm + lower.width_mm) / 2,
                        np.linalg.norm(along, axis=1).mean(),
                    ]
                ),
                float(min(upper.confidence, lower.confidence)),
                upper.source | lower.source,
            )
        )
    return boxes


def _axial_stacks(study):
    """What the axial series cover: list of dicts center (3,), normal (3,) unit vector to the head, low_mm and high_mm
    (of the first and last slice along the normal, from the origin), one for each Volume of two slices or more."""
    stacks = []
    for volume in study.of("Axial T2"):
        if volume.plane != "axial" or len(volume.array) < 2:
            continue
        normal = np.cross(volume.affine[:3, 1], volume.affine[:3, 2])
        normal = normal / np.linalg.norm(normal) * (1 if normal[2] > 0 else -1)
        middle = (np.array(volume.array.shape[1:]) - 1) / 2
        ends = volume.voxel_to_lps([[0, *middle], [len(volume.array) - 1, *middle]])
        low, high = sorted((ends @ normal).tolist())
        stacks.append({"center": ends.mean(0), "normal": normal, "low_mm": low, "high_mm": high})
    return sorted(stacks, key=lambda stack: -stack["center"][2])


def _axial_blocks(stacks, near_mm=15.0, longest_mm=50.0):
    """Stacks that show one disc each, head to foot: dicts center, normal. Repeated ones (nearer than near_mm) are
    taken together; fewer than three are no such protocol, but a broken-up stack: []."""
    blocks = []
    for stack in stacks:
        if stack["high_mm"] - stack["low_mm"] > longest_mm:
            continue
        if blocks and np.linalg.norm(blocks[-1][-1]["center"] - stack["center"]) < near_mm:
            blocks[-1].append(stack)
        else:
            blocks.append([stack])
    if len(blocks) < 3:
        return []
    means = [{key: np.mean([stack[key] for stack in block], 0) for key in ("center", "normal")} for block in blocks]
    return [mean | {"normal": mean["normal"] / np.linalg.norm(mean["normal"])} for mean in means]


def _match_blocks(blocks, discs):
    """Which disc each block shows: list of indices into discs (dicts center, normal; head to foot, six or seven with
    T12/L1 first and S1/S2 last), rising, or None for more blocks than discs.

    Tilts and distances between the blocks are compared with the mean layout's. Protocols end at L5/S1 and leave out
    none between: what differs from that is charged for.
    """
    tilt = np.degrees([np.arctan2(-b["normal"][1], b["normal"][2]) for b in blocks])
    usual = np.degrees([np.arctan2(-d["normal"][1], d["normal"][2]) for d in discs])
    best, answer = np.inf, None
    for chosen in itertools.combinations(range(len(discs)), len(blocks)):
        picked = list(chosen)
        turn = tilt - usual[picked]
        cost = capped_half_square((turn - np.median(turn)) / 6.0, 6.0).sum() + capped_half_square(
            np.median(turn) / 10.0, 6.0
        )
        found = np.stack([b["center"] for b in blocks])
        where = np.stack([discs[k]["center"] for k in picked])
        steps = np.linalg.norm(np.diff(found, axis=0), axis=1) - np.linalg.norm(np.diff(where, axis=0), axis=1)
        cost += capped_half_square(steps / 6.0, 6.0).sum()
        cost += capped_half_square((found - where)[:, 2].mean() / PLACE_SPREAD_MM[0], PLACE_SPREAD_MM[1])
        cost += 4.0 * (np.diff(picked) - 1).sum()
        cost += (
            3.0 * (LEVELS.index("l5_s1") + 1 not in picked) + 1.5 * (0 in picked) + 3.0 * (len(LEVELS) + 1 in picked)
        )
        if cost < best:
            best, answer = cost, picked
    return answer


def axial_levels(study: Study, prior: dict) -> tuple[list[LevelBox], list[Vertebra]] | None:
    """Levels from where the axial slices were planned, without looking into an image.

    Tilted blocks, one a disc (three to seven of them): each gives its disc's plane, by centre and normal; which disc
    it is follows from tilts and distances (_match_blocks). Confidence 0.3, for discs without a block 0.15 (source
    axial+extrapolated). One contiguous stack: it covers the discs from some level down to L5/S1 with about 12 mm to
    spare at both ends; the mean layout moves along the stack's normal to its middle. Confidence 0.2.
    Position within the slices is the mean layout's, relative to their centre.
    Returns (five LevelBoxes, six Vertebrae), or None where no axial series can tell.
    """
    stacks = _axial_stacks(study)
    if not stacks:
        return None
    anchors = study_anchors(study)
    if "sagittal" in anchors:
        # The height comes from the sagittal series; within their slices the axial ones are centred on the spine.
        within = anchors["axial"][:2] - np.array(prior["axial_mm"])[:2]
        anchors["sagittal"] = np.array([*within, anchors["sagittal"][2]])
    bodies = complete_vertebrae([], anchors, prior)
    blocks = _axial_blocks(stacks)
    return _levels_of_blocks(blocks, bodies, prior) if blocks else _levels_of_stack(stacks, bodies)


def _levels_of_stack(stacks, bodies):
    """axial_levels of one contiguous stack: the layout's bodies, moved along its normal to its middle."""
    longest = max(stacks, key=lambda stack: stack["high_mm"] - stack["low_mm"])
    normal = longest["normal"]
    parallel = [stack for stack in stacks if stack["normal"] @ normal > np.cos(np.radians(15))]
    low = min(float(stack["low_mm"]) for stack in parallel)
    high = max(float(stack["high_mm"]) for stack in parallel)
    if high - low < 40:
        return None
    discs_mm = [float(box.center_lps_mm @ normal) for box in level_boxes(bodies)]
    # The uppermost disc that the stack shows: by its length, and by where the layout stands in the series.
    fits = []
    for first in range(len(LEVELS) - 1):
        spare = (high - low - 24 - (discs_mm[first] - discs_mm[-1])) / 12
        move = (high + low) / 2 - (discs_mm[first] + discs_mm[-1]) / 2
        away = move / PLACE_SPREAD_MM[0]
        fits.append((float(capped_half_square(spare, 10.0) + capped_half_square(away, PLACE_SPREAD_MM[1])), move))
    shift = min(fits)[1] * normal
    bodies = [replace(v, corners_lps_mm=v.corners_lps_mm + shift, source=Source.AXIAL, confidence=0.2) for v in bodies]
    return level_boxes(bodies), bodies


def _levels_of_blocks(blocks, bodies, prior):
    """axial_levels of one block a disc: the layout's bodies, moved to the discs that the blocks show."""
    boxes = level_boxes(bodies)
    discs = _layout_discs(boxes, bodies, prior)
    blocks = sorted(blocks, key=lambda block: -block["center"][2])[-len(discs) :]  # more reach into the chest
    picked = _match_blocks(blocks, discs)
    if picked is None:
        return None
    shown = {k - 1: block for k, block in zip(picked, blocks) if 1 <= k <= len(LEVELS)}
    if not shown:
        return None

    def to_plane(level, box):  # the step along the block's normal that brings the box's centre into its middle
        normal = shown[level]["normal"]
        return ((shown[level]["center"] - box.center_lps_mm) @ normal) * normal

    nearest = [min(shown, key=lambda k: abs(k - level)) for level in range(len(LEVELS))]
    steps = [to_plane(level, boxes[level]) for level in nearest]
    moved = []
    for number, body in enumerate(bodies):
        shift = np.mean(steps[max(number - 1, 0) : number + 1], 0)  # of the discs above and below it
        moved.append(replace(body, corners_lps_mm=body.corners_lps_mm + shift, source=Source.AXIAL, confidence=0.3))
    result = []
    for level, box in enumerate(level_boxes(moved)):
        if level in shown:
            head = shown[level]["normal"]
            left = np.array([1.0, 0, 0]) - head[0] * head
            left = left / np.linalg.norm(left)
            center = box.center_lps_mm + to_plane(level, box)
            result.append(replace(box, center_lps_mm=center, axes=np.stack([head, left, np.cross(head, left)])))
        else:
            result.append(replace(box, confidence=0.15, source=Source.AXIAL | Source.EXTRAPOLATED))
    return result, moved


def _layout_discs(boxes, bodies, prior):
    """Dicts center, normal of the layout's discs, head to foot: those of the boxes, with T12/L1 and S1/S2."""
    layout = chain_layout(prior)
    chain = {name: Vertebra(corners, 40.0, name=name) for name, corners in zip(_CHAIN, layout)}
    offset = bodies[0].corners_lps_mm.mean(0) - chain["L1"].center_lps_mm

    def disc(upper, lower):
        around = np.concatenate([chain[upper].corners_lps_mm[[3, 2]], chain[lower].corners_lps_mm[[0, 1]]])
        back = (around[1] - around[0]) + (around[3] - around[2])
        normal = np.array([0.0, -back[2], back[1]])
        return {"center": around.mean(0) + offset, "normal": normal / np.linalg.norm(normal)}

    between = [{"center": box.center_lps_mm, "normal": box.axes[0]} for box in boxes]
    return [disc("T12", "L1"), *between, disc("S1", "S2")]
