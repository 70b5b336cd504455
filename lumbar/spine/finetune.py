"""SpineNet trained further on the competition's own label points.

May use: chain, counting, level_scores, naming, fallbacks, spinenet_training, spinenet, vertebra, data, cluster,
names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from ..cluster import spread
from ..data.geometry import boxes_from_table, place_points
from ..data.source import Source
from ..data.tables import some_of
from ..data.volume import Study, load_study
from ..names import LEVEL_VERTEBRAE, LEVELS, progress
from .chain import merge_vertebrae
from .counting import Numberings, counted_shares, fit_counting, readers_step
from .fallbacks import complete_vertebrae, level_boxes, study_anchors
from .level_scores import compare_with_labels
from .naming import name_vertebrae
from .spinenet import SpineNet, detect_vertebrae
from .spinenet_training import spinenet_records
from .vertebra import _LUMBAR, Vertebra

# No real lumbar image has its vertebrae's corners marked, but every study of the competition has points at its five
# discs. So the model trained on phantoms draws the bodies, and the points say which of them to believe and what they
# are called: a self-training whose teacher is checked by readers.

FORAMEN_RISE_MM = 9.2  # how far above their disc's plane foraminal points lie, in 12 of the competition's studies
_RISE_STUDIES, _RISE_PAIRS = 100, 20  # how many studies tell of a data set's own rise, and how many levels it takes
_RISES_MM = (3.0, 16.0)  # that a foramen can have: another one is no anatomy but an error in the table
_TO_DISC = 0.67  # from a body's centre to the middle of the disc beside it, in heights of the body
POINT_TABLE_COLUMNS = ["study_id", "series_id", "description", "used", "reason", "levels", "confirmed"]
POINT_TABLE_COLUMNS += ["renamed", "completed", "dropped", "slices"]


def foramen_rise_mm(paths: Mapping[int, str | Path], coordinates: pd.DataFrame) -> float:
    """How far above the others of their level a data set's foraminal points lie: the median over levels with both.

    paths: study_id to volume file; coordinates: from read_coordinates. At most _RISE_STUDIES studies are read. Where
    fewer than _RISE_PAIRS levels have both kinds of points, or the median is out of _RISES_MM (which is printed), it is
    FORAMEN_RISE_MM.
    """
    rises: list[float] = []
    read = 0
    for study_id, points in coordinates.groupby("study_id"):
        if study_id not in paths or read >= _RISE_STUDIES:
            continue
        read += 1
        placed = _placed(points, paths[study_id])
        if placed is None:
            continue
        for _, own in placed.groupby("level"):
            raised, flat = (own.loc[own["foraminal"] == kind, "z_mm"].mean() for kind in (True, False))
            if np.isfinite(raised - flat):
                rises.append(float(raised - flat))
    if len(rises) < _RISE_PAIRS:
        return FORAMEN_RISE_MM
    rise_mm = float(np.median(rises))
    if not _RISES_MM[0] <= rise_mm <= _RISES_MM[1]:
        print(
            f"foraminal label points lie {rise_mm:.1f} mm above the others of their level, which no foramen does: "
            f"{FORAMEN_RISE_MM} mm are taken; check the table's levels and coordinates"
        )
        return FORAMEN_RISE_MM
    return rise_mm


def _placed(points, path):
    """A study's label points as place_points has them, with their level and whether they are foraminal; None where the
    study cannot be read: one odd study must not stop the others."""
    try:
        placed = place_points(points, load_study(path))
    except Exception:
        return None
    foraminal = points["condition"].str.contains("foraminal")
    return placed.assign(level=points["level"].to_numpy(), foraminal=foraminal.to_numpy())


def level_points(
    points_lps: ArrayLike,
    levels: ArrayLike,
    foraminal: ArrayLike | None = None,
    rise_mm: float = FORAMEN_RISE_MM,
) -> dict[str, np.ndarray]:
    """Label points of one study by level: dict level -> (n, 3) LPS mm, at the height of the disc.

    points_lps: (n, 3), NaN where unknown; levels: (n,) names; foraminal: (n,) bool, points in a foramen: they lie
    rise_mm higher (foramen_rise_mm) and are only taken, lowered, where a level has no other.
    """
    points_lps, levels = np.asarray(points_lps, float).reshape(-1, 3), np.asarray(levels)
    foraminal = np.zeros(len(levels), bool) if foraminal is None else np.asarray(foraminal, bool)
    known = np.isfinite(points_lps).all(1)
    result = {}
    for level in LEVELS:
        flat = known & (levels == level) & ~foraminal
        raised = known & (levels == level) & foraminal
        if flat.any():
            result[level] = points_lps[flat]
        elif raised.any():
            result[level] = points_lps[raised] - [0, 0, rise_mm]
    return result


_COUNTED_STUDIES = 1000  # that are read to learn how readers count


def learn_counting(
    numberings: Mapping[int, Numberings | None],
    paths: Mapping[int, str | Path],
    coordinates: pd.DataFrame,
    start: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """How the readers of these studies count (fit_counting), from where their points lie along the chains found.

    numberings: study_id to what chain_numberings measured; paths: study_id to volume file; coordinates: from
    read_coordinates, of studies that may be learned from; start: as fit_counting takes it. Says what came of it.
    """
    rise_mm = foramen_rise_mm(paths, coordinates)
    known: list[Numberings] = []
    steps: list[int] = []
    for study_id, points in coordinates.groupby("study_id"):
        chain = numberings.get(study_id)
        if chain is None or study_id not in paths or len(known) >= _COUNTED_STUDIES:
            continue
        placed = _placed(points, paths[study_id])
        if placed is None:
            continue
        by_level = level_points(placed[["x_mm", "y_mm", "z_mm"]], placed["level"], placed["foraminal"], rise_mm)
        step = None if _points_problem(by_level) else readers_step(chain, by_level)
        if step is not None:
            known.append(chain)
            steps.append(step)
    counting = fit_counting(known, steps, start)
    own, counted = (
        sum(int(counted_shares(chain, weights).argmax()) - 1 == step for chain, step in zip(known, steps, strict=True))
        for weights in ({}, counting)
    )
    learned = f"{counted} by what was learned from them" if counting else "nothing is learned"
    print(f"readers' counting: {own} of {len(known)} studies are numbered as by their label points, {learned}")
    return counting


def _points_problem(points):
    """What is wrong with a study's points, as a sentence; "" if nothing is."""
    if len(points) < 3:
        return f"only {len(points)} levels have points"
    number = [LEVELS.index(level) for level in points]
    middle = np.stack([points[level].mean(0) for level in points])
    step = np.linalg.norm(np.diff(middle, axis=0), axis=1) / np.diff(number)
    if (np.diff(middle[:, 2]) >= 0).any() or (step < 15).any() or (step > 60).any():
        return "the points are out of order, or those of neighbouring levels not 15 to 60 mm apart"
    return ""


def _head(vertebra):
    """(3,) unit vector from a body's lower to its upper end plate, across its left-right axis."""
    front_top, back_top, back_low, front_low = vertebra.corners_lps_mm
    back = back_top + back_low - front_top - front_low
    head = np.cross(back, vertebra.left_lps)
    head = head / np.linalg.norm(head)
    return head if head @ (front_top + back_top - front_low - back_low) > 0 else -head


def _offsets_mm(vertebra, above, below):
    """How much farther than expected the discs above and below lie from the body's centre, along its own axis: list
    of floats for those of the two that have points."""
    head, corners = _head(vertebra), vertebra.corners_lps_mm
    expected = _TO_DISC * np.linalg.norm(corners[:2].mean(0) - corners[2:].mean(0))
    center = vertebra.center_lps_mm
    offsets = [] if above is None else [float((above.mean(0) - center) @ head - expected)]
    return offsets + ([] if below is None else [float((center - below.mean(0)) @ head - expected)])


def _in_front(vertebra, *points):
    """Does a body lie where points say that the spine is: in front of them by what canal and recess may lie behind a
    body's back wall, and not beside them? Their height says nothing about that: bowel lies as high as a disc."""
    corners, left = vertebra.corners_lps_mm, vertebra.left_lps
    back = corners[[1, 2]].mean(0) - corners[[0, 3]].mean(0)
    depth = np.linalg.norm(back)
    steps = [where.mean(0) - vertebra.center_lps_mm for where in points if where is not None]
    return all(-8 < step @ back / depth - depth / 2 < 22 and abs(step @ left) < 25 for step in steps)


def _beside(name, points):
    """The points of the discs above and below a body of L1 to S1, or None."""
    number = _LUMBAR.index(name)
    above = points.get(LEVELS[number - 1]) if number else None
    return above, points.get(LEVELS[number]) if number < len(LEVELS) else None


def bodies_by_points(
    bodies: Sequence[Vertebra], points: Mapping[str, np.ndarray], prior: dict | None = None, tolerance_mm: float = 6.0
) -> tuple[list[Vertebra], dict[str, bool], dict[str, bool], list[Vertebra]]:
    """Name detections by label points, and say which of them the points confirm.

    bodies: Vertebrae of one study, their names do not count; points: from level_points; prior: from fit_level_prior
    (None: a missing body is the mean of its neighbours, which a lordosis puts several mm off: never confirmed).
    A body is L3 when the points of L2/3 and L3/4 lie above and below its centre by about as much as the discs do, and
    close behind its back wall. A level is confirmed when its points lie within tolerance_mm of the plane between its
    two bodies (median). A body is confirmed when a level beside it is and none beside it is refuted. One that the
    model missed is completed from its neighbours and moved halfway to where the points want it; it counts as
    confirmed when both levels beside it are (then it is within some 2 mm on drawn spines).
    Returns (list of Vertebrae L1 to S1, as far as known, source "points" for completed ones; dict name -> confirmed;
    dict level -> confirmed, for levels with points; list of bodies not used).
    """
    candidates = []
    for name in _LUMBAR:
        for k, body in enumerate(bodies):
            offsets = _offsets_mm(body, *_beside(name, points))
            if offsets and max(map(abs, offsets)) < 10 and _in_front(body, *_beside(name, points)):
                # A body between its two points is surer than one beside a single point.
                candidates.append((np.mean(np.abs(offsets)) + 5 * (len(offsets) == 1), name, k))
    chosen: dict[str, int] = {}
    for _, name, k in sorted(candidates, key=lambda item: item[0]):
        if name not in chosen and k not in chosen.values():
            chosen[name] = k
    found = {name: bodies[k] for name, k in chosen.items()}
    found = {name: replace(body, name=name) for name, body in found.items()}
    completed = {}
    for number, name in enumerate(_LUMBAR):
        above, below = _beside(name, points)
        sides = [_LUMBAR[k] for k in (number - 1, number + 1) if 0 <= k < len(_LUMBAR)]
        if (
            name in found
            or len(sides) < 2
            or not all(side in found for side in sides)
            or above is None
            or below is None
        ):
            continue
        upper, lower = (found[side] for side in sides)
        width_mm = (upper.width_mm + lower.width_mm) / 2
        corners = (upper.corners_lps_mm + lower.corners_lps_mm) / 2
        if prior is not None:
            corners = {v.name: v for v in complete_vertebrae(list(found.values()), {}, prior)}[name].corners_lps_mm
        body = Vertebra(corners, width_mm, min(upper.confidence, lower.confidence), name, Source.POINTS)
        over, under = _offsets_mm(body, above, below)
        body.corners_lps_mm = body.corners_lps_mm + (over - under) / 2 * _head(body)
        completed[name] = body
    result = {name: {**found, **completed}[name] for name in _LUMBAR if name in found or name in completed}
    boxes = {box.level: box for box in level_boxes(list(result.values()))}
    levels = {}
    for level, where in points.items():
        if level in boxes:
            levels[level] = bool(np.median(np.abs(boxes[level].from_lps(where)[:, 0])) <= tolerance_mm)
    sure = {}
    for name in result:
        beside = [levels[level] for level in LEVELS if name in LEVEL_VERTEBRAE[level] and level in levels]
        sure[name] = (
            bool(beside) and all(beside) and (name not in completed or (len(beside) == 2 and prior is not None))
        )
    return list(result.values()), sure, levels, [v for k, v in enumerate(bodies) if k not in chosen.values()]


def _beyond(named, rest):
    """Bodies above L1 and below S1, which no point confirms: those detected, and where none is, where one should be.

    The network must learn nothing there: neither that there is a body nor that there is none."""
    beyond = []
    ends = {0: [v for v in rest if v.center_lps_mm[2] > named[0].center_lps_mm[2]]}
    ends[-1] = [v for v in rest if v.center_lps_mm[2] < named[-1].center_lps_mm[2]]
    for end, others in ends.items():
        edge = named[end]
        height = np.linalg.norm(edge.corners_lps_mm[:2].mean(0) - edge.corners_lps_mm[2:].mean(0))
        step = (1 if end == 0 else -1) * _head(edge) * height * (1.28 if end == 0 or edge.name != "S1" else 1.0)
        name = "T12" if end == 0 else "S2"
        beyond += [Vertebra(v.corners_lps_mm, v.width_mm, v.confidence, name, v.source) for v in others]
        for k in range(1, 5):
            corners = edge.corners_lps_mm + k * step
            distance = [np.linalg.norm(v.center_lps_mm - corners.mean(0)) for v in others]
            if min(distance, default=np.inf) > 0.6 * height:
                beyond.append(Vertebra(corners, edge.width_mm, 0.0, name, Source.EXTRAPOLATED))
    return beyond


def point_records(
    study: Study,
    bodies: Sequence[Vertebra],
    points: Mapping[str, np.ndarray],
    resolution_mm: float,
    prior: dict | None = None,
    tolerance_mm: float = 6.0,
    least: int = 3,
) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """Training images of a study without true vertebrae: the model's own, as far as label points confirm them.

    study: normalised; bodies: the model's Vertebrae in it, names do not count; points: from level_points; least: how
    many levels the points have to confirm. See bodies_by_points for what is confirmed. Bodies not confirmed, and
    places above L1 and below S1, where no point is, have certain False: there the loss does not look. A detection
    between L1 and S1 that is none of them is background.
    Returns (records as spinenet_records gives them, [] for a study that cannot be used; dict for the table of
    fine_tuning_set: used, reason, levels (with points), confirmed, renamed, completed, dropped).
    """
    note = {"used": False, "reason": _points_problem(points), "levels": len(points), "confirmed": 0}
    note |= {"renamed": 0, "completed": 0, "dropped": 0}
    if note["reason"]:
        return [], note
    named, sure, levels, rest = bodies_by_points(bodies, points, prior, tolerance_mm)
    note["confirmed"] = sum(levels.values())
    if note["confirmed"] < least:
        note["reason"] = f"the points confirm {note['confirmed']} levels, {least} are needed"
        return [], note
    beyond = _beyond(named, rest)
    at = {id(v.corners_lps_mm): v.name for v in named}
    note |= {
        "used": True,
        "renamed": sum(bool(v.name) and at.get(id(v.corners_lps_mm), v.name) != v.name for v in bodies),
        "completed": sum(v.source == Source.POINTS for v in named),
        "dropped": len(rest) - sum(v.source != Source.EXTRAPOLATED for v in beyond),
    }
    records = spinenet_records(study, named + beyond, resolution_mm)
    confirmed = spinenet_records(study, [v for v in named if sure[v.name]], resolution_mm)
    for record, known in zip(records, confirmed, strict=True):
        # The same body has the same corners in both: certain is what is so among the confirmed ones.
        certain = torch.zeros(len(record["certain"]), dtype=torch.bool)
        for corners, yes in zip(known["corners_px"], known["certain"]):
            certain |= yes & ((record["corners_px"] - corners).abs().amax((1, 2)) < 1e-3)
        record["certain"] = certain
    return records, note


def fine_tuning_set(
    paths: Mapping[int, str | Path],
    model: SpineNet,
    coordinates: pd.DataFrame,
    *,
    prior: dict | None = None,
    limit: int | None = None,
    slices: int = 12,
    tolerance_mm: float = 6.0,
    least: int = 3,
    seed: int = 0,
    workers: int = 1,
) -> tuple[list[dict[str, torch.Tensor]], pd.DataFrame]:
    """Make training images from studies with label points.

    Each series has records of its own: its own detections, completed by the other series' (moved by what the patient
    moved in between). Label points that lie on no slice are left out and printed.

    Parameters
    ----------
    paths : mapping of int to path
        study_id to volume file, without the studies held out for point_scores.
    model : SpineNet
        The teacher.
    coordinates : DataFrame
        From read_coordinates.
    prior : dict, optional
        From fit_level_prior; default: the model's.
    limit : int, optional
        Number of studies, drawn at random; default: all.
    slices : int
        Kept of each series, of which at most a quarter show no confirmed body (a study's all would be some 4 MB).
    tolerance_mm : float
        Largest distance of a level's points from its disc's plane; see bodies_by_points.
    least : int
        Number of levels that the points have to confirm; see point_records.
    seed : int
    workers : int
        Threads; how many makes no difference to what comes out.

    Returns
    -------
    records : list of dict
        As spinenet_records makes them.
    table : DataFrame
        POINT_TABLE_COLUMNS, one row a series or unusable study.
    """
    prior = prior if prior is not None else model.about.get("prior")
    by_study = dict(list(coordinates.groupby("study_id")))
    study_ids = sorted(set(paths) & set(by_study))
    rng = np.random.default_rng(seed)
    if limit is not None and limit < len(study_ids):
        study_ids = sorted(int(i) for i in rng.choice(study_ids, limit, replace=False))
    rise_mm = foramen_rise_mm(paths, coordinates)
    shared = _Confirming(paths, by_study, model, prior, rise_mm, slices, tolerance_mm, least, seed)
    with progress(desc="confirming vertebrae", total=len(study_ids)) as bar:
        found = spread(_confirm, study_ids, shared, workers, done=bar.update)
    unplaced = [problem for *_, problems in found.values() for problem in problems]
    if unplaced:
        print(f"fine-tuning: {len(unplaced)} label points are left out: {some_of(unplaced, between='; ')}")
    records = [record for own, _, _ in found.values() for record in own]
    rows = [{"study_id": study_id} | note for study_id, (_, notes, _) in found.items() for note in notes]
    return records, pd.DataFrame(rows, columns=POINT_TABLE_COLUMNS)


@dataclass(frozen=True)
class _Confirming:
    """What confirming one study's vertebrae needs besides its number: see fine_tuning_set."""

    paths: Mapping[int, str | Path]
    points: Mapping[int, pd.DataFrame]
    model: SpineNet
    prior: dict | None
    rise_mm: float
    slices: int | None
    tolerance_mm: float
    least: int
    seed: int


def _confirm(shared: _Confirming, study_id: int) -> tuple[list[dict[str, torch.Tensor]], list[dict], list[str]]:
    """(records, notes of its series, why label points were left out) of one study."""
    unplaced: list[str] = []
    try:
        study, points = load_study(shared.paths[study_id]), shared.points[study_id]
        placed = place_points(points, study)
        unplaced = placed.loc[placed["problem"] != "", "problem"].tolist()
        foraminal = points["condition"].str.contains("foraminal").to_numpy()
        by_level = level_points(placed[["x_mm", "y_mm", "z_mm"]], points["level"].to_numpy(), foraminal, shared.rise_mm)
        rng = np.random.default_rng((shared.seed, study_id))
        records, notes = _study_records(
            study, shared.model, by_level, shared.prior, shared.slices, shared.tolerance_mm, shared.least, rng
        )
    except Exception as error:  # one odd study must not stop the others
        records, notes = [], [{"used": False, "reason": f"{type(error).__name__}: {error}"}]
    return records, notes or [{"used": False, "reason": "no sagittal series"}], unplaced


def _study_records(study, model, points, prior, slices, tolerance_mm, least, rng):
    """(records, notes) of one study: see fine_tuning_set; points: of level_points."""
    volumes = [v for v in study.volumes if v.description.startswith("Sagittal") and v.plane == "sagittal"]
    # T2 first: its bodies' names count, where the model is asked for them.
    volumes = sorted(volumes, key=lambda v: v.description == "Sagittal T1")
    problem = _points_problem(points)
    detected = [[] if problem else detect_vertebrae(model, volume) for volume in volumes]
    records, notes = [], []
    for number, volume in enumerate(volumes):
        chain = detected[number]
        for other in detected[:number] + detected[number + 1 :]:
            chain = merge_vertebrae(chain, other) if chain else other
        if prior is not None:
            chain, _ = name_vertebrae(chain, prior, study_anchors(study).get("sagittal"))
        alone = replace(study, volumes=[volume])
        own, note = point_records(alone, chain, points, model.resolution_mm, prior, tolerance_mm, least)
        if slices is not None and len(own) > slices:
            shows = np.array([bool(record["certain"].any()) for record in own])
            beside = rng.permutation(np.flatnonzero(~shows))[: slices // 4]
            inside = rng.permutation(np.flatnonzero(shows))[: slices - len(beside)]
            own = [own[k] for k in sorted([*beside, *inside])]
        records += own
        notes.append({"series_id": volume.series_id, "description": volume.description, "slices": len(own)} | note)
    return records, notes


def point_scores(levels: pd.DataFrame, paths: Mapping[int, str | Path], coordinates: pd.DataFrame) -> dict[str, float]:
    """How well level boxes meet the label points of canal and subarticular zone, which lie at their disc's height.

    Parameters
    ----------
    levels : DataFrame
        levels.csv, of the studies held out from fine_tuning_set, before or after the tuning.
    paths : mapping of int to path
        study_id to volume file.
    coordinates : DataFrame
        From read_coordinates.

    Returns
    -------
    dict of str to float
        studies, points, right_level (share of points whose nearest disc plane is their own level's), median_mm and
        p90_mm (distance from the plane of their own level's box, along the spine), within_5mm (share).
    """
    tables = []
    by_study = dict(list(coordinates.groupby("study_id")))
    for study_id in sorted(set(paths) & set(levels["study_id"]) & set(by_study)):
        own = by_study[study_id]
        own = own[~own["condition"].str.contains("foraminal")]
        tables.append(compare_with_labels(boxes_from_table(levels, study_id), own, load_study(paths[study_id])))
    table = (
        pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"head_mm": [], "nearest": [], "level": []})
    )
    distance = table["head_mm"].astype(float).abs()
    return {
        "studies": len(tables),
        "points": len(table),
        "right_level": float((table["nearest"] == table["level"]).mean()),
        "median_mm": float(distance.median()),
        "p90_mm": float(distance.quantile(0.9)),
        "within_5mm": float((distance <= 5).mean()),
    }


_NOTICED_MM = 0.05


def tuning_helped(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether tuning made no held-out score worse and at least one better.

    What counts: the share of points nearest to their own level's disc, the share within 5 mm of it, and, if both stay
    as they are, the median distance, of which less than _NOTICED_MM is nothing: readers' points scatter by a millimetre
    and more. Without held-out points nothing is shown.

    Parameters
    ----------
    before, after : mapping of str to float
        From point_scores.

    Returns
    -------
    bool
    """
    steps = [after[name] - before[name] for name in ("right_level", "within_5mm")]
    if not np.isfinite(steps).all() or min(steps) < 0:
        return False
    return bool(max(steps) > 0 or after["median_mm"] < before["median_mm"] - _NOTICED_MM)
