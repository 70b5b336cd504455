"""The levels of a study, and of every study of a split.

May use: naming, fallbacks, spinenet, official, vertebra, data, in_flight, problems, storage, limits, names.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from ..data.geometry import LevelBox, boxes_to_table
from ..data.volume import Study, Volume, load_study
from ..in_flight import read_left_json
from ..limits import check_limit, cpu_limit
from ..names import LEVEL_TABLE_COLUMNS, LEVELS, progress
from ..problems import Kind, Problem, kind_of_error
from ..storage import write_json
from .fallbacks import _NOT_SEEN, axial_levels, complete_vertebrae, level_boxes, refit_level_prior, study_anchors
from .naming import _doubtful, _numbered_differently, name_vertebrae
from .official import official_detector
from .spinenet import MAX_SEARCHED_PX, SpineNet, detect_vertebrae, every_nth_slice, searched_px, surest
from .vertebra import _CHAIN, _LUMBAR, UNCERTAIN, VERTEBRA_TABLE_COLUMNS, Vertebra, vertebrae_to_table

Detector = str | Callable[[Volume], list[Vertebra]]  # "own", "official", or a function

# Detections of the sagittal series become one chain; one dynamic programme names it, counting up from the sacrum; what
# was not seen is placed by what was, by the axial slices or by the mean layout. Every level gets a box that says how
# sure it is and where it comes from.


def _rejoined(volumes):
    """Pieces of one series, cut where slices are missing, as one Volume: what is missing is interpolated.

    The reader must not invent slices, but a body whose left and right half lie in two pieces would be found twice,
    or beside its place. Pieces belong together when they are parallel and aligned, and no more than three slices are
    missing between them, unless together they would exceed _REJOINED_PX. Returns Volumes; those alone in their series
    are unchanged.
    """
    result, pieces = [], sorted(volumes, key=lambda v: (v.series_id, v.block))
    while pieces:
        group, pieces = [pieces[0]], pieces[1:]
        first = group[0]
        normal = first.affine[:3, 0] / first.spacing_mm[0]
        for other in list(pieces):
            apart = other.affine[:3, 3] - group[-1].voxel_to_lps([len(group[-1].array) - 1, 0, 0])
            if (
                other.series_id == first.series_id
                and other.array.shape[1:] == first.array.shape[1:]
                and np.abs(other.affine[:3, 1:3] - first.affine[:3, 1:3]).max() < 1e-3
                and 0 < apart @ normal < 4.5 * first.spacing_mm[0]
                and np.linalg.norm(apart - (apart @ normal) * normal) < 2.0
            ):
                group.append(other)
                pieces = [piece for piece in pieces if piece is not other]
        joined = _fill(group, normal) if len(group) > 1 else None
        result += group if joined is None else [joined]
    return result


_REJOINED_PX = 1 << 26  # 256 MB; a 3D sequence of 250 slices of 512 x 512 has as many


def _fill(group, normal):
    """One Volume of aligned pieces in the order of `normal`, its missing slices linear between their neighbours; None
    where it would be too large."""
    origins = np.concatenate([v.voxel_to_lps(np.eye(1, 3) * np.arange(len(v.array))[:, None]) for v in group])
    place_mm = (origins - origins[0]) @ normal
    steps_mm = np.diff(place_mm)
    step_mm = max(steps_mm.min(), np.median(steps_mm) / 3)  # two slices in nearly one place make no fine grid
    count = int(round(place_mm[-1] / step_mm)) + 1
    if count * group[0].array[0].size > _REJOINED_PX:
        return None
    wanted_mm = place_mm[0] + step_mm * np.arange(count)
    above = np.clip(np.searchsorted(place_mm, wanted_mm), 1, len(place_mm) - 1)
    share = np.clip((wanted_mm - place_mm[above - 1]) / (place_mm[above] - place_mm[above - 1]), 0, 1)
    slices = [image for v in group for image in v.array]
    array = np.empty((count, *slices[0].shape), np.float32)
    for k, (b, part) in enumerate(zip(above, share.astype(np.float32), strict=True)):
        array[k] = (1 - part) * slices[b - 1].astype(np.float32) + part * slices[b].astype(np.float32)
    affine = group[0].affine.copy()
    affine[:3, 0] = (origins[-1] - origins[0]) / (len(wanted_mm) - 1)
    nearest = np.where(share.astype(np.float32) < 0.5, above - 1, above)
    return replace(
        group[0],
        array=array,
        affine=affine,
        instance_numbers=np.concatenate([v.instance_numbers for v in group])[nearest],
    )


def _motion_mm(first, second, reach_mm=16.0, tolerance_mm=8.0):
    """(3,) what to add to the second series' centres so that most of its bodies meet the first's; 0 if fewer than two
    would. reach_mm: less than half the way from body to body, else the neighbour would do as well."""
    if not first or not second:
        return np.zeros(3)
    offsets = np.stack([v.center_lps_mm for v in first])[:, None] - np.stack([v.center_lps_mm for v in second])
    # The names tell which is which, unless the two series are numbered differently.
    if first[0].name and second[0].name and not _numbered_differently(first, second):
        same = np.array([[a.name == b.name != UNCERTAIN for b in second] for a in first])
        return np.median(offsets[same], 0) if same.sum() > 1 else np.zeros(3)
    best, motion = 1, np.zeros(3)
    for candidate in sorted(offsets.reshape(-1, 3), key=np.linalg.norm):
        if np.linalg.norm(candidate) > reach_mm:
            break
        rest = np.linalg.norm(offsets - candidate, axis=2)
        met = rest.min(0) < tolerance_mm
        if met.sum() > best:
            best = met.sum()
            motion = np.median(offsets[rest.argmin(0)[met], np.flatnonzero(met)], 0)
    return motion


def merge_vertebrae(first: Sequence[Vertebra], second: Sequence[Vertebra], distance_mm: float = 13.0) -> list[Vertebra]:
    """Two series' Vertebrae as one chain in the first's place, head to foot.

    Between the series the patient may have moved: the second's bodies are shifted by the motion that lets most of
    them meet a body of the first (_motion_mm). Half a body's height apart two detections are the same body; named
    ones (of another detector) are the same when their names are. A body that both saw keeps the first's geometry
    (unless the second is clearly surer: marrow in STIR may be as dark as its surroundings) and the mean of both
    appearances and of both positions across the slices, which lie 4 mm apart in either series.
    """
    motion = _motion_mm(first, second)
    # Across the slices a small motion is no more than their spacing makes of a patient who lay still.
    across_mm = [v.center_lps_mm[0] + motion[0] * (abs(motion[0]) > 3.0) for v in second]
    second = [replace(v, corners_lps_mm=v.corners_lps_mm + motion) for v in second]
    contradict = _numbered_differently(first, second)
    pairs = []
    for i, vertebra in enumerate(first):
        for k, other in enumerate(second):
            distance = float(np.linalg.norm(other.center_lps_mm - vertebra.center_lps_mm))
            by_name = vertebra.name and other.name and UNCERTAIN not in (vertebra.name, other.name) and not contradict
            if vertebra.name == other.name if by_name else distance < distance_mm:
                pairs.append((distance, i, k))
    partner: dict[int, int] = {}
    for _, i, k in sorted(pairs):
        if i not in partner and k not in partner.values():
            partner[i] = k
    merged = []
    for i, vertebra in enumerate(first):
        if i in partner:
            other = second[partner[i]]
            kept = other if other.confidence > 1.15 * vertebra.confidence else vertebra
            known = [v.name for v in (vertebra, other) if v.name not in ("", UNCERTAIN)]
            name = known[0] if known else vertebra.name
            kept = replace(kept, name=name, confidence=max(vertebra.confidence, other.confidence))
            if vertebra.appearance is not None and other.appearance is not None:
                appearance = (vertebra.appearance + other.appearance) / 2
                kept.appearance = appearance - np.log(np.exp(appearance).sum())
            x_mm = np.average(
                [vertebra.center_lps_mm[0], across_mm[partner[i]]],
                weights=[max(vertebra.confidence, 0.01), max(other.confidence, 0.01)],
            )
            kept.corners_lps_mm = kept.corners_lps_mm + [x_mm - kept.center_lps_mm[0], 0, 0]
            merged.append(kept)
        else:
            merged.append(vertebra)
    rest = [other for k, other in enumerate(second) if k not in partner.values()]
    if contradict:
        merged = [v if v.name == UNCERTAIN else replace(v, source=_doubtful(v.source)) for v in merged]
        rest = [replace(v, name=UNCERTAIN) for v in rest]
    return sorted(merged + rest, key=lambda v: -v.center_lps_mm[2])


def smooth_sideways(vertebrae: Sequence[Vertebra], trusted_mm: float = 6.0) -> list[Vertebra]:
    """Vertebrae, head to foot and named, with their left-right position steadied by their neighbours'.

    Sagittal slices lie 4 mm apart, and the first and last slice that shows a body are a matter of chance: across the
    slices a centre is known worse than within them, but a spine has no steps. Each body moves sideways onto a line
    through itself and its neighbours (weights Gaussian in their number, standard deviation 0.6: wider lines cut the
    bends of a scoliosis). One that lies farther than about trusted_mm off the line through its neighbours alone is
    put there first.
    """
    if len(vertebrae) < 4:
        return list(vertebrae)
    x, _, z = np.stack([v.center_lps_mm for v in vertebrae], 1)
    number = np.array([_CHAIN.index(v.name) for v in vertebrae], float)
    steps = number - number[:, None]
    sure = np.array([v.confidence for v in vertebrae])

    def on_line(x, weight):  # weight (n, n): row k's line, at body k
        weight = weight + 1e-9
        weight = weight / weight.sum(1, keepdims=True)
        z_mean, x_mean = weight @ z, weight @ x
        from_mean = z - z_mean[:, None]
        slope = (weight * from_mean * (x - x_mean[:, None])).sum(1) / (weight * from_mean**2).sum(1)
        return x_mean + slope * (z - z_mean)

    trust = sure
    for _ in range(2):
        others = on_line(x, trust * np.exp(-0.5 * (steps / 1.3) ** 2) * (steps != 0))
        own = 1 / (1 + (np.abs(x - others) / trusted_mm) ** 4)
        trust = sure * own
    smooth = on_line(own * x + (1 - own) * others, sure * np.exp(-0.5 * (steps / 0.6) ** 2))
    return [replace(v, corners_lps_mm=v.corners_lps_mm + [dx, 0, 0]) for v, dx in zip(vertebrae, smooth - x)]


def _detector(detector, model):
    """What finds the bodies of a volume: detector as locate_levels takes it -> a function volume -> Vertebrae."""
    if callable(detector):
        return detector
    if detector == "own":
        return (lambda volume: detect_vertebrae(model, volume)) if model is not None else (lambda volume: [])
    if detector == "official":
        return official_detector(str(next(model.parameters()).device) if isinstance(model, nn.Module) else "cpu")
    raise ValueError(f'detector is {detector!r}: "own", "official", or a function that takes a Volume')


def _searched(volumes, resolution_mm):
    """Sagittal Volumes with every second of their slices, every third, ... where a study has more than can be searched
    (MAX_SEARCHED_PX). Those with slices too large to be searched are unchanged: detection says so."""

    def size_px(volume):
        try:
            return searched_px(volume, resolution_mm)
        except ValueError:
            return 0

    sizes_px = [size_px(volume) for volume in volumes]
    total_px = sum(size * len(volume.array) for size, volume in zip(sizes_px, volumes, strict=True))
    step = max(1, math.ceil(total_px / MAX_SEARCHED_PX))
    return [every_nth_slice(volume, step if size else 1) for size, volume in zip(sizes_px, volumes, strict=True)]


def locate_levels(
    study: Study,
    model: SpineNet | None,
    prior: dict | None = None,
    detector: Detector = "own",
    layout: dict | None = None,
    lost: dict[Problem, list[int]] | None = None,
) -> tuple[list[LevelBox], list[Vertebra]]:
    """Find and name a study's vertebrae and disc levels; always answers, with a confidence.

    Where the levels come from (`source`), in this order:

    - t2, t1: bodies seen in the sagittal T2/STIR and T1 series. They form one chain; where both saw a body the T2's
      geometry counts. `official` instead where that package found them.
    - +extrapolated: a body that neither shows, placed by those seen.
    - axial: where the sagittal series show fewer than two bodies, from where the axial slices lie (axial_levels).
    - prior: the mean layout around the series' centre.

    `+uncertain` says that the levels' names are doubtful: no sacrum in view, or contradictory looks.

    Parameters
    ----------
    study : Study
        Normalised.
    model : SpineNet or None
        None takes the prior alone.
    prior : dict, optional
        From fit_level_prior; default: model.about["prior"].
    detector : str or callable
        `own` (the model), `official` (the research-only package, see official.py), or a function from a Volume to
        Vertebrae, which may have names already.
    layout : dict, optional
        As prior, for where nothing is seen; default: model.about["layout"] (how these patients lie, see
        locate_with_own_layout), else the prior.
    lost : dict, optional
        Gets the series whose search fails, as reason to list of series ids, and the others stand; default: raise.

    Returns
    -------
    boxes : list of LevelBox
        Five, head to foot.
    vertebrae : list of Vertebra
        At least L1 to S1, then those named `uncertain`.

    Raises
    ------
    ValueError
        An unknown detector, or neither a prior nor a model that carries one.
    """
    prior = prior if prior is not None else (model.about.get("prior") if model is not None else None)
    if prior is None:
        raise ValueError("locate_levels needs a prior: give fit_level_prior's, or weights from 02_train_spinenet")
    if layout is None:
        layout = (model.about.get("layout") if model is not None else None) or prior
    detect = _detector(detector, model)
    chain: list[Vertebra] = []
    volumes: list[Volume] = []
    for description in ("Sagittal T2/STIR", "Sagittal T1"):
        volumes += _rejoined([volume for volume in study.of(description) if volume.plane == "sagittal"])
    for volume in _searched(volumes, getattr(model, "resolution_mm", 2.0)):
        try:
            check_limit()
            chain = surest(merge_vertebrae(chain, surest(detect(volume))))
        except Exception as error:
            if lost is None:
                raise
            lost.setdefault(Problem.of(error, kind=Kind.LEVELS), []).append(volume.series_id)
    anchors = study_anchors(study)
    if not any(v.name for v in chain):
        chain = name_vertebrae(chain, prior, anchors.get("sagittal"))
    # Names of another detector may repeat: the surest body has it.
    by_name: dict[str, Vertebra] = {}
    for vertebra in sorted(chain, key=lambda v: -v.confidence):
        if vertebra.name in _CHAIN:
            by_name.setdefault(vertebra.name, vertebra)
    named = smooth_sideways(sorted(by_name.values(), key=lambda v: _CHAIN.index(v.name)))
    uncertain = [replace(v, name=UNCERTAIN) for v in chain if v.name not in _CHAIN]
    others = [v for v in named if v.name not in _LUMBAR]
    planned = axial_levels(study, layout) if len(named) < 2 else None
    if planned is not None:
        return planned[0], planned[1] + [replace(v, name=UNCERTAIN) for v in uncertain + named]
    complete = complete_vertebrae(named, anchors, prior if named else layout)
    return level_boxes(complete), sorted(complete + others, key=lambda v: _CHAIN.index(v.name)) + uncertain


def locate_levels_surely(
    study: Study,
    model: SpineNet | None,
    prior: dict | None = None,
    detector: Detector = "own",
    layout: dict | None = None,
) -> tuple[list[LevelBox], list[Vertebra], Problem | None]:
    """locate_levels for a study that may be odd: (LevelBoxes, Vertebrae, None or the Problem).

    A series in which detection fails, or takes too long (LOCATING_S), is left out; where nothing is seen the levels
    come from the axial slices or the mean layout.
    Raises ValueError when there is neither a prior nor a model that carries one.
    """
    prior = prior if prior is not None or model is None else model.about.get("prior")
    layout = layout or (model.about.get("layout") if model is not None else None) or prior
    lost: dict[Problem, list[int]] = {}
    try:
        with cpu_limit(LOCATING_S):
            boxes, vertebrae = locate_levels(study, model, prior, detector, layout, lost)
        sentences, kind = [], Kind.LEVELS
        if lost:
            where = [f"({reason}) in series {', '.join(map(str, sorted(set(ids))))}" for reason, ids in lost.items()]
            stand_in = "" if _seen(vertebrae) else "; the axial slices or the mean layout stand in"
            sentences.append(f"detection failed {' and '.join(where[:3])}{stand_in}")
            kind = max((reason.kind for reason in lost), key=(Kind.LEVELS, Kind.MEMORY, Kind.TIME).index)
        if odd := _odd_size(vertebrae):
            sentences.append(odd)
        return boxes, vertebrae, Problem(kind, "; ".join(sentences)) if sentences else None
    except Exception as error:
        text = f"detection failed ({type(error).__name__}: {error}); the mean layout stands in"
        problem = Problem(kind_of_error(error, Kind.LEVELS), text)
    try:
        return *locate_levels(study, None, prior, layout=layout), problem
    except Exception:  # not even the axial slices' places can be used
        return *locate_levels(replace(study, volumes=[]), None, prior, layout=layout), problem


def _seen(vertebrae):
    """Those that a sagittal image showed."""
    return [v for v in vertebrae if not set(v.source.split("+")) & set(_NOT_SEEN.split("|"))]


BODY_DEPTH_MM = (24.0, 43.0)  # of lumbar bodies from front to back: some 34 in adults, spread 3


def _odd_size(vertebrae):
    """A sentence where the lumbar bodies that were seen have no adult's size: then the images' scale is in doubt."""
    corners = np.array([v.corners_lps_mm for v in _seen(vertebrae) if v.name in _LUMBAR[:-1]]).reshape(-1, 4, 3)
    if len(corners) < 3:
        return None
    front, back = corners[:, [0, 3]].mean(1), corners[:, [1, 2]].mean(1)
    depth_mm = float(np.median(np.linalg.norm(back - front, axis=1)))
    if BODY_DEPTH_MM[0] <= depth_mm <= BODY_DEPTH_MM[1]:
        return None
    return (
        f"the bodies seen are {depth_mm:.0f} mm deep, as few are: the pixel spacing of the sagittal series is doubtful"
    )


# CPU seconds for the search of one study. A usual one takes 4, two whole spines 11, the largest that is searched
# (MAX_SEARCHED_PX) 25, be it noise that looks like bodies everywhere.
LOCATING_S = 45.0


_LOCATING_VERSION = 4  # to be raised when the same network gives other levels: results kept by older code do not count


def _locating_key(model, prior, detector):
    """What the result for a study depends on besides its images, as a hash: weights, prior, detector."""
    known = [_LOCATING_VERSION, prior, detector if isinstance(detector, str) else repr(detector)]
    digest = hashlib.sha256(json.dumps(known).encode())
    if isinstance(model, nn.Module):
        for name, value in model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_located(known):
    """Raise ValueError where a dict is not what locate_studies keeps of a study."""
    for name, columns in (("levels", LEVEL_TABLE_COLUMNS), ("vertebrae", VERTEBRA_TABLE_COLUMNS)):
        rows = known.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == set(columns) for row in rows):
            raise ValueError(f"{name} are no rows of a table")
    if len(known["levels"]) != len(LEVELS):
        raise ValueError(f"{len(known['levels'])} levels")
    places = known.get("anchors")
    if not isinstance(places, dict) or not set(places) <= {"sagittal", "axial"}:
        raise ValueError("anchors are no places")
    texts = ("level", "vertebra", "source")
    numbers = [v for name in ("levels", "vertebrae") for row in known[name] for k, v in row.items() if k not in texts]
    for center in places.values():
        if not isinstance(center, list) or len(center) != 3:
            raise ValueError("anchors are no places")
        numbers += center
    if not all(isinstance(value, (int, float)) and abs(value) < 1e12 for value in numbers):
        raise ValueError("some numbers are none, or not finite")


def locate_studies(
    paths: Mapping[int, str | Path],
    model: SpineNet | None,
    prior: dict | None = None,
    folder: str | Path | None = None,
    workers: int = 1,
    detector: Detector = "own",
) -> tuple[pd.DataFrame, pd.DataFrame, dict[int, dict]]:
    """Levels and vertebrae of many studies.

    A study whose detection fails gets its levels from the axial slices or the mean layout, which is not kept in
    `folder`.

    Parameters
    ----------
    paths : mapping of int to path
        study_id to volume file, as study_paths returns it.
    model, prior, detector
        As locate_levels takes them.
    folder : str or Path, optional
        Where each study's result is kept as <study_id>.json, so that an interrupted run continues. A result of other
        weights, prior or detector is not taken; a function is known by its repr.
    workers : int
        Threads; most of the time is spent outside Python's lock.

    Returns
    -------
    levels, vertebrae : DataFrame
        levels.csv and vertebrae.csv.
    anchors : dict of int to dict
        study_id to study_anchors(study).

    Raises
    ------
    RuntimeError
        A file cannot be read, or detection failed in every one of three or more studies.
    """
    prior = prior if prior is not None else (model.about.get("prior") if model is not None else None)
    if prior is None:
        raise ValueError("locate_studies needs a prior: give fit_level_prior's, or weights from 02_train_spinenet")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        key = _locating_key(model, prior, detector)
    detect = _detector(detector, model)  # once: the official package loads its weights here
    problems = []

    def locate(study_id):
        file = Path(folder) / f"{study_id}.json" if folder is not None else None
        if file is not None and file.exists():
            try:
                known = read_left_json(file)
                if known.get("key") == key:
                    _check_located(known)
                    return known
            except ValueError as error:
                print(f"{file} is no result of study {study_id} ({error}): its levels are located again")
        try:
            study = load_study(paths[study_id])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"{paths[study_id]} cannot be read ({reason}): delete it and run 01 again") from error
        boxes, bodies, problem = locate_levels_surely(study, model, prior, detect, prior)
        if any(volume.plane == "sagittal" for volume in study.volumes):
            problems.append(None if _seen(bodies) else problem)
        if problem:
            print(f"study {study_id}: {problem}")
        result = {
            "levels": boxes_to_table(study_id, boxes).to_dict("records"),
            "vertebrae": vertebrae_to_table(study_id, bodies).to_dict("records"),
            "anchors": {plane: center.tolist() for plane, center in study_anchors(study).items()},
        }
        if file is not None and not problem:
            write_json(file, {"key": key} | result)
        return result

    pool = ThreadPoolExecutor(max(int(workers), 1))
    try:
        results = list(progress(pool.map(locate, paths), "locating levels", len(paths)))
    finally:  # an interrupted run must not finish the queue first
        pool.shutdown(cancel_futures=True)
    if len(problems) > 2 and all(problems):  # no odd studies, but an installation that cannot work
        raise RuntimeError(f"the detector failed in all of {len(problems)} studies; the first: {problems[0]}")
    levels = pd.DataFrame([row for result in results for row in result["levels"]], columns=LEVEL_TABLE_COLUMNS)
    rows = [row for result in results for row in result["vertebrae"]]
    anchors = {
        study_id: {plane: np.array(center) for plane, center in result["anchors"].items()}
        for study_id, result in zip(paths, results)
    }
    return levels, pd.DataFrame(rows, columns=VERTEBRA_TABLE_COLUMNS), anchors


def locate_unseen(
    levels: pd.DataFrame,
    vertebrae: pd.DataFrame,
    anchors: Mapping[int, dict],
    prior: dict,
    paths: Mapping[int, str | Path] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables with the studies in which nothing was seen placed by another prior.

    paths: dict study_id -> volume file; with it also those placed by their axial slices, whose position within the
    slices is the prior's.
    """
    placed = "prior|axial" if paths is not None else "prior"
    unseen = levels.groupby("study_id")["source"].agg(lambda sources: sources.str.match(placed).all())
    for study_id in unseen.index[unseen]:
        own = levels[levels["study_id"] == study_id]
        planned = None
        if paths is not None and own["source"].str.match("axial").any():
            planned = axial_levels(load_study(paths[study_id]), prior)  # None where this prior does not fit the slices
        if planned is None:
            bodies = complete_vertebrae([], anchors[study_id], prior)
            planned = level_boxes(bodies), bodies
        boxes, bodies = planned
        old = vertebrae[(vertebrae["study_id"] == study_id) & (vertebrae["vertebra"] == UNCERTAIN)]
        levels = pd.concat([levels[levels["study_id"] != study_id], boxes_to_table(study_id, boxes)])
        rest = vertebrae[vertebrae["study_id"] != study_id]
        vertebrae = pd.concat([rest, vertebrae_to_table(study_id, bodies)] + ([old] if len(old) else []))
    return levels.reset_index(drop=True), vertebrae.reset_index(drop=True)


def locate_with_own_layout(
    paths: Mapping[int, str | Path],
    model: SpineNet,
    folder: str | Path | None = None,
    workers: int = 1,
    detector: Detector = "own",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """locate_studies; and where nothing is seen, the mean layout of these patients instead of the phantoms'.

    The layout goes into model.about["layout"], so that inference places its studies alike; names are given with
    model.about["prior"] here and there.

    Parameters
    ----------
    paths, model, folder, workers, detector
        As locate_studies takes them; the model must carry a prior.

    Returns
    -------
    levels, vertebrae : DataFrame
        levels.csv and vertebrae.csv.
    """
    prior = model.about["prior"]
    levels, vertebrae, anchors = locate_studies(paths, model, prior, folder, workers, detector)
    model.about["layout"] = refit_level_prior(anchors, vertebrae, prior)
    return locate_unseen(levels, vertebrae, anchors, model.about["layout"], paths)
