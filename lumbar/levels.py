"""Levels: the detections of a study as one named chain of vertebrae, and a box per disc level, whatever was seen."""

import hashlib
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from .geometry import LevelBox, boxes_from_table, boxes_to_table, coordinates_to_lps, study_box
from .in_flight import read_left_json
from .limits import check_limit, cpu_limit
from .names import LEVEL_TABLE_COLUMNS, LEVEL_VERTEBRAE, LEVELS, VERTEBRAE, progress
from .official import official_detector
from .spinenet import (
    _CHAIN,
    _LUMBAR,
    AMBIGUOUS_SHARE,
    MAX_SEARCHED_PX,
    SPINE_CLASSES,
    UNCERTAIN,
    VERTEBRA_TABLE_COLUMNS,
    Vertebra,
    detect_vertebrae,
    every_nth_slice,
    searched_px,
    spine_class,
    surest,
    vertebrae_from_table,
    vertebrae_to_table,
)
from .storage import write_json
from .volume import load_study

# ----------------------------------------------------------------------------------------------------------------
#  7. Levels: named vertebrae, a box for each disc level, and how good they are
# ----------------------------------------------------------------------------------------------------------------
#
# Detections of the sagittal series become one chain; one dynamic programme names it, counting up from the sacrum; what
# was not seen is placed by what was, by the axial slices or by the mean layout. Every level gets a box that says how
# sure it is and where it comes from.


# -- one chain of two series


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


def merge_vertebrae(first, second, distance_mm=13.0):
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
    partner = {}
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


def _numbered_differently(first, second):
    """Do named bodies at the same place (half a body's height) mostly have different names in the two lists?"""
    verdicts = [
        a.name == b.name
        for a in first
        for b in second
        if a.name and b.name and UNCERTAIN not in (a.name, b.name)
        if np.linalg.norm(a.center_lps_mm - b.center_lps_mm) < 13.0
    ]
    return len(verdicts) > 1 and np.mean(verdicts) < 0.5


def _doubtful(source):
    return source if "uncertain" in source else f"{source}+uncertain"


# -- names


def _shapes(corners):
    """Bodies' shapes from corners (n, 4, 3): dict center (n, 3), head (n, 2) unit vector in (y, z), tilt_deg (n,) of
    the line from front to back out of the horizontal, depth_mm and height_mm (n,), upper and lower (n, 2) middles of
    the end plates in (y, z)."""
    sagittal = corners[:, :, 1:]
    upper, lower = sagittal[:, [0, 1]], sagittal[:, [3, 2]]
    back = (upper[:, 1] - upper[:, 0]) + (lower[:, 1] - lower[:, 0])
    back = back / np.maximum(np.linalg.norm(back, axis=1, keepdims=True), 1e-6)
    return {
        "center": corners.mean(1),
        "head": np.column_stack([-back[:, 1], back[:, 0]]),
        "tilt_deg": np.degrees(np.arctan2(back[:, 1], back[:, 0])),
        "depth_mm": np.maximum(np.linalg.norm(corners[:, [1, 2]] - corners[:, [0, 3]], axis=2).mean(1), 1.0),
        "height_mm": np.maximum(np.linalg.norm(corners[:, [0, 1]] - corners[:, [3, 2]], axis=2).mean(1), 1.0),
        "upper": upper.mean(1),
        "lower": lower.mean(1),
    }


def _chain_layout(prior):
    """(len(_CHAIN), 4, 3) corners of the mean layout; names beyond its ends continue it by its last step."""
    layout = {name: np.array(corners, np.float64) for name, corners in prior["layout_mm"].items()}
    known = [k for k, name in enumerate(_CHAIN) if name in layout]
    corners = np.full((len(_CHAIN), 4, 3), np.nan)
    corners[known] = [layout[_CHAIN[k]] for k in known]
    inner = [k for k in range(known[0], known[-1]) if k not in known]
    for k in inner:  # between two known ones: halfway, by their number
        below, above = max(n for n in known if n < k), min(n for n in known if n > k)
        part = (k - below) / (above - below)
        corners[k] = (1 - part) * corners[below] + part * corners[above]
    for order, edge, step in ((range(known[0] - 1, -1, -1), known[0], 1), (range(known[-1] + 1, len(_CHAIN)), -1, -1)):
        edge = known[-1] if edge == -1 else edge
        move = corners[edge].mean(0) - corners[edge + step].mean(0)
        for k in order:
            corners[k] = corners[k + step] + move
    return corners


def _pair_shapes(shapes):
    """How each body `b` lies below each body `a`: dict of (n, n), indexed [a, b]: gap (between their end plates, in
    mean heights), turn_deg (change of tilt), narrowing (log of the ratio of depths)."""
    head = shapes["head"][:, None] + shapes["head"]
    head = head / np.maximum(np.linalg.norm(head, axis=2, keepdims=True), 1e-6)
    between = shapes["lower"][:, None] - shapes["upper"]
    height = (shapes["height_mm"][:, None] + shapes["height_mm"]) / 2
    turn = shapes["tilt_deg"] - shapes["tilt_deg"][:, None]
    return {
        "gap": (between * head).sum(2) / height,
        "turn_deg": (turn + 180) % 360 - 180,
        "narrowing": np.log(shapes["depth_mm"] / shapes["depth_mm"][:, None]),
    }


def _capped(deviation, cap):
    """Half the square of a deviation in standard deviations, at most `cap`: no single measure outvotes the others."""
    return np.minimum(0.5 * deviation**2, cap)


# Spread of people and of measurements around the mean layout, (standard deviation, cap). Wide: a chain counts the
# same evidence several times over, and patients are no phantoms.
_PAIR_SPREAD = {"gap": (0.16, 2.0), "turn_deg": (8.0, 3.0), "narrowing": (0.12, 3.0)}
_TILT_SPREAD_DEG = (18.0, 2.0)
_PLACE_SPREAD_MM = (30.0, 3.0)
_SIZES = (0.82, 0.91, 1.0, 1.09, 1.18)  # of a patient, against the mean layout
_OVERLOOKED = 2.5  # penalty for each body that the network would have missed between two that it saw


def _chain_scores(vertebrae, prior, center_lps_mm=None, size=1.0):
    """What _best_chain and _name_shares add up: (single (n, names), pair (n, n, names, names), drop (n,)).

    size: of the patient, against the mean layout.

    pair[a, b, k, l]: detection a is _CHAIN[k], b is _CHAIN[l] and the next below; -inf where that cannot be.
    """
    count, names = len(vertebrae), len(_CHAIN)
    corners = np.stack([v.corners_lps_mm for v in vertebrae])
    layout = _chain_layout(prior)
    seen, usual = _shapes(corners), _shapes(layout)
    # No body's looks alone may outvote the order of all others.
    classes = np.array([spine_class(name) for name in _CHAIN])
    unknown = np.full(len(SPINE_CLASSES), -np.log(len(SPINE_CLASSES)))
    looks = [unknown if v.appearance is None else np.maximum(v.appearance, -4.0) for v in vertebrae]
    single = np.stack([look[classes] for look in looks])
    turned = (seen["tilt_deg"][:, None] - usual["tilt_deg"] + 180) % 360 - 180
    single = single - _capped(turned / _TILT_SPREAD_DEG[0], _TILT_SPREAD_DEG[1])
    if center_lps_mm is not None:
        # A study is planned around L3: where in the series a body lies tells a little, once for the whole chain.
        away = seen["center"][:, 2, None] - (usual["center"][:, 2] + center_lps_mm[2])
        single = single - _capped(away / _PLACE_SPREAD_MM[0], _PLACE_SPREAD_MM[1]) / count
    # Bodies that happen to stand in line are rare: a false one in its place is less likely than odd looks.
    drop = np.array([-4.0 - 4.0 * v.confidence for v in vertebrae])
    before = np.concatenate([[0.0], np.cumsum(drop)])
    step = np.arange(names) - np.arange(names)[:, None]
    allowed = (step >= 1) & (step <= 3)
    expected = size * (usual["center"] - usual["center"][:, None])
    expected_mm = np.maximum(np.linalg.norm(expected, axis=2), 1.0)
    apart = seen["center"] - seen["center"][:, None]
    error = np.linalg.norm(apart[:, :, None, None] - expected, axis=4) / expected_mm
    pair = -_capped(error / 0.3, 20.0)
    seen_pairs, usual_pairs = _pair_shapes(seen), _pair_shapes(usual)
    for name, (spread, cap) in _PAIR_SPREAD.items():
        wide = spread * np.sqrt(np.maximum(step, 1))
        pair = pair - _capped((seen_pairs[name][:, :, None, None] - usual_pairs[name]) / wide, cap)
    pair = pair - _OVERLOOKED * (step - 1)
    number = np.arange(count)
    skipped = before[None, :-1] - before[1:, None]  # all between a and b are dropped
    pair = pair + skipped[:, :, None, None]
    # Bodies do not overlap: at most one of the two is real.
    height = (seen["height_mm"][:, None] + seen["height_mm"]) / 2
    possible = (number[:, None] < number) & (np.linalg.norm(apart, axis=2) >= 0.7 * height)
    return single, np.where(possible[:, :, None, None] & allowed, pair, -np.inf), drop


def _log_sum(values, axis):
    top = values.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - top).sum(axis)) + top.squeeze(axis)


def _best_chain(single, pair, drop):
    """The naming with the highest score (Viterbi, 1967): list of (detection, index into _CHAIN), head to foot, and the
    score."""
    count, names = single.shape
    best = single + np.concatenate([[0.0], np.cumsum(drop)[:-1]])[:, None]
    back = np.full((count, names, 2), -1)
    for i in range(1, count):
        score = (best[:i, :, None] + pair[:i, i]).reshape(i * names, names)
        top = score.argmax(0)
        value = score[top, np.arange(names)] + single[i]
        better = value > best[i]
        best[i][better] = value[better]
        back[i][better] = np.column_stack(np.divmod(top, names))[better]
    after = np.concatenate([np.cumsum(drop[::-1])[::-1][1:], [0.0]])
    i, k = np.unravel_index(np.argmax(best + after[:, None]), best.shape)
    chain = []
    while i >= 0:
        chain.append((int(i), int(k)))
        i, k = back[i, k]
    return chain[::-1], float((best + after[:, None]).max())


def _name_shares(single, pair, drop):
    """(n, names): share of all namings, each weighted by its exponentiated score, that give the detection the name."""
    count, names = single.shape
    forth = single + np.concatenate([[0.0], np.cumsum(drop)[:-1]])[:, None]
    rear = np.repeat(np.concatenate([np.cumsum(drop[::-1])[::-1][1:], [0.0]])[:, None], names, 1)
    for i in range(1, count):
        by_way = (forth[:i, :, None] + pair[:i, i]).reshape(i * names, names)
        forth[i] = np.logaddexp(forth[i], _log_sum(by_way, 0) + single[i])
    for i in range(count - 2, -1, -1):
        by_way = pair[i, i + 1 :] + (single[i + 1 :] + rear[i + 1 :])[:, None]  # (later, names, names)
        rear[i] = np.logaddexp(rear[i], _log_sum(by_way.transpose(1, 0, 2).reshape(names, -1), 1))
    total = forth + rear
    ends = forth + np.concatenate([np.cumsum(drop[::-1])[::-1][1:], [0.0]])[:, None]
    return np.exp(total - _log_sum(ends.ravel(), 0))


def name_vertebrae(vertebrae, prior, center_lps_mm=None):
    """Name a chain of Vertebrae by one dynamic programme. Returns them head to foot, some named "uncertain".

    vertebrae: with `appearance`, head to foot; prior: from fit_level_prior; center_lps_mm: (3,) of the sagittal
    series, which is planned around L3.
    Each detection gets a name or is dropped; names rise in order. The score adds
    - the log-probabilities of the looks, one for each of SPINE_CLASSES;
    - for every pair of neighbours how well the way from one to the other fits that of the names in the prior's
      layout, at the patient's size: this also keeps off what lies beside the spine's curve;
    - shape, also against the layout: tilt, its change from body to body (largest at L5/S1), the gap between the end
      plates (it nearly vanishes below S1) and the ratio of depths (S2 is much smaller than S1);
    - a little for the place in the series;
    - _OVERLOOKED for each body that would have been missed, and a penalty for each detection dropped, the higher the
      surer it was.
    S1 differs most from its neighbours, so in effect the chain is counted up from the sacrum; none of these decides
    alone, and all but the way from body to body are capped, so that a thin L5/S1 disc (sacralised L5) or a high S1/S2
    disc (lumbarised S1) is outvoted by the rest.
    A dropped detection is kept under the name UNCERTAIN, unless it overlaps a named one (then it is the same body seen
    twice). Confidence is the detection's times the share of its name among all namings (_name_shares); where that
    share is below AMBIGUOUS_SHARE "+uncertain" is added to the source.
    """
    if not vertebrae:
        return []
    # The patient's size is tried out: missed and false bodies spoil any median of distances.
    tried = []
    for size in _SIZES:
        scores = _chain_scores(vertebrae, prior, center_lps_mm, size)
        chain, total = _best_chain(*scores)
        tried.append((total - 0.5 * (np.log(size) / 0.1) ** 2, chain, scores))
    _, chain, scores = max(tried, key=lambda item: item[0])
    names, shares = dict(chain), _name_shares(*scores)
    result = []
    for i, vertebra in enumerate(vertebrae):
        if i in names:
            share = float(min(shares[i, names[i]], 1.0))
            source = vertebra.source + ("+uncertain" if share < AMBIGUOUS_SHARE else "")
            found = replace(vertebra, name=_CHAIN[names[i]], confidence=vertebra.confidence * share, source=source)
            result.append(found)
        else:
            height = np.linalg.norm(vertebra.corners_lps_mm[:2].mean(0) - vertebra.corners_lps_mm[2:].mean(0))
            distance = [np.linalg.norm(vertebrae[k].center_lps_mm - vertebra.center_lps_mm) for k in names]
            if min(distance) > 0.7 * height:
                result.append(replace(vertebra, name=UNCERTAIN))
    return result


def smooth_sideways(vertebrae, trusted_mm=6.0):
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


# -- levels


def study_anchors(study):
    """Where a study's series lie: dict "sagittal", "axial" -> (3,) centre in LPS mm, as far as it has such series."""
    anchors = {}
    for plane in ("sagittal", "axial"):
        volumes = [v for v in study.volumes if v.description.lower().startswith(plane)]
        if volumes:
            anchors[plane] = study_box(replace(study, volumes=volumes))[0]
    return anchors


def fit_level_prior(anchors, vertebrae):
    """The mean layout of a set of studies.

    anchors: dict study_id -> study_anchors(study); vertebrae: table with the columns of vertebrae.csv, true or
    detected. Returns a dict for JSON: layout_mm (name -> (4, 3) median corners relative to the centre of the sagittal
    series), width_mm (name -> mm), axial_mm ((3,) median centre of the axial series relative to the sagittal one's).
    Raises ValueError when a vertebra of L1 to S1 occurs in no study with a sagittal series.
    """
    corners, widths = {}, {}
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


def refit_level_prior(anchors, vertebrae, prior, sure=0.3):
    """The mean layout of these studies themselves, from their surely detected bodies; `prior` where they show too few.

    anchors: dict study_id -> study_anchors(study); vertebrae: table, as locate_studies returns it.
    """
    seen = vertebrae[(vertebrae["confidence"] > sure) & ~vertebrae["source"].str.contains(_NOT_SEEN + "|uncertain")]
    complete = seen[seen["vertebra"].isin(_LUMBAR)].groupby("study_id")["vertebra"].nunique() == len(_LUMBAR)
    if complete.sum() < 20:
        return prior
    return fit_level_prior({i: anchors[i] for i in complete.index[complete]}, seen)


def complete_vertebrae(named, anchors, prior):
    """L1 to S1, whatever was found: list of six Vertebrae.

    A missing one is placed by the prior's layout, shifted, turned and scaled in the sagittal plane to fit the bodies
    found (least squares, the weight halving with each step away from the missing one); confidence halves with each
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
            vertebrae.append(Vertebra(corners, prior["width_mm"][name], 0.1 if anchors else 0.0, name, "prior"))
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
        nearest = found[usable[int(steps.argmin())]]
        source = nearest.source.split("+")[0] + "+extrapolated" + "+uncertain" * ("uncertain" in nearest.source)
        confidence = nearest.confidence * 0.5 ** int(steps.min())
        vertebrae.append(Vertebra(corners, prior["width_mm"][name], confidence, name, source))
    return vertebrae


SOURCES = ("truth", "official", "t2", "t1", "axial", "prior", "extrapolated", "uncertain")  # as sources are joined
_NOT_SEEN = "extrapolated|prior|axial"  # sources of bodies that no sagittal image showed


def _lefts(vertebrae, level):
    """(3,) unit vector to the patient's left in the plane of a level's disc.

    True bodies know their own left. Detected ones do not: their corners lie in the slices' plane, which follows the
    scanner and not a scoliosis. There the disc stands across the line through the bodies around it (weights 1 for its
    two, 1/4 for the next ones: a centre is known to a millimetre or two sideways, a tilt from two would be noise).
    """
    found = {v.name: v for v in vertebrae}
    pair = [found[name] for name in LEVEL_VERTEBRAE[level]]
    if all(v.source == "truth" for v in pair):
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


def level_boxes(vertebrae):
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
        parts = set(f"{upper.source}+{lower.source}".split("+"))
        order = [part for part in SOURCES if part in parts]
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
                "+".join(order),
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
        cost = _capped((turn - np.median(turn)) / 6.0, 6.0).sum() + _capped(np.median(turn) / 10.0, 6.0)
        found = np.stack([b["center"] for b in blocks])
        where = np.stack([discs[k]["center"] for k in picked])
        steps = np.linalg.norm(np.diff(found, axis=0), axis=1) - np.linalg.norm(np.diff(where, axis=0), axis=1)
        cost += _capped(steps / 6.0, 6.0).sum()
        cost += _capped((found - where)[:, 2].mean() / _PLACE_SPREAD_MM[0], _PLACE_SPREAD_MM[1])
        cost += 4.0 * (np.diff(picked) - 1).sum()
        cost += (
            3.0 * (LEVELS.index("l5_s1") + 1 not in picked) + 1.5 * (0 in picked) + 3.0 * (len(LEVELS) + 1 in picked)
        )
        if cost < best:
            best, answer = cost, picked
    return answer


def axial_levels(study, prior):
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
    if not blocks:
        longest = max(stacks, key=lambda stack: stack["high_mm"] - stack["low_mm"])
        normal = longest["normal"]
        parallel = [stack for stack in stacks if stack["normal"] @ normal > np.cos(np.radians(15))]
        low = min(float(stack["low_mm"]) for stack in parallel)
        high = max(float(stack["high_mm"]) for stack in parallel)
        discs_mm = [float(box.center_lps_mm @ normal) for box in level_boxes(bodies)]
        if high - low < 40:
            return None
        # The uppermost disc that the stack shows: by its length, and by where the layout stands in the series.
        fits = []
        for first in range(len(LEVELS) - 1):
            spare = (high - low - 24 - (discs_mm[first] - discs_mm[-1])) / 12
            move = (high + low) / 2 - (discs_mm[first] + discs_mm[-1]) / 2
            away = move / _PLACE_SPREAD_MM[0]
            fits.append((float(_capped(spare, 10.0) + _capped(away, _PLACE_SPREAD_MM[1])), move))
        shift = min(fits)[1] * normal
        bodies = [replace(v, corners_lps_mm=v.corners_lps_mm + shift, source="axial", confidence=0.2) for v in bodies]
        return level_boxes(bodies), bodies
    boxes = level_boxes(bodies)
    layout = _chain_layout(prior)
    chain = {name: Vertebra(corners, 40.0, name=name) for name, corners in zip(_CHAIN, layout)}
    offset = bodies[0].corners_lps_mm.mean(0) - chain["L1"].center_lps_mm

    def disc(upper, lower):
        around = np.concatenate([chain[upper].corners_lps_mm[[3, 2]], chain[lower].corners_lps_mm[[0, 1]]])
        back = (around[1] - around[0]) + (around[3] - around[2])
        normal = np.array([0.0, -back[2], back[1]])
        return {"center": around.mean(0) + offset, "normal": normal / np.linalg.norm(normal)}

    discs = [disc("T12", "L1")] + [{"center": b.center_lps_mm, "normal": b.axes[0]} for b in boxes] + [disc("S1", "S2")]
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
        moved.append(replace(body, corners_lps_mm=body.corners_lps_mm + shift, source="axial", confidence=0.3))
    result = []
    for level, box in enumerate(level_boxes(moved)):
        if level in shown:
            head = shown[level]["normal"]
            left = np.array([1.0, 0, 0]) - head[0] * head
            left = left / np.linalg.norm(left)
            center = box.center_lps_mm + to_plane(level, box)
            result.append(replace(box, center_lps_mm=center, axes=np.stack([head, left, np.cross(head, left)])))
        else:
            result.append(replace(box, confidence=0.15, source="axial+extrapolated"))
    return result, moved


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


def locate_levels(study, model, prior=None, detector="own", layout=None, lost=None):
    """Find and name a study's vertebrae and disc levels; always answers, with a confidence.

    study: normalised; model: SpineNet, or None to take the prior alone; prior: from fit_level_prior, default the one
    in model.about; detector: "own" (model), "official" (the research-only package, see lumbar/official.py), or a
    function volume -> Vertebrae, which may have names already; layout: as prior, for where nothing is seen, default
    model.about["layout"] (how these patients lie, see locate_with_own_layout), else the prior; lost: a dict to which a
    series is added whose search fails, as reason -> list of series ids, and the others stand; default: raise.
    Where the levels come from (`source`), in this order:
    - t2, t1: bodies seen in the sagittal T2/STIR and T1 series. They form one chain; where both saw a body the T2's
      geometry counts. "official" instead where that package found them.
    - +extrapolated: a body that neither shows, placed by those seen.
    - axial: where the sagittal series show fewer than two bodies, from where the axial slices lie (axial_levels).
    - prior: the mean layout around the series' centre.
    "+uncertain" says that the levels' names are doubtful: no sacrum in view, or contradictory looks.
    Returns (five LevelBoxes, head to foot, list of Vertebrae, at least L1 to S1, then those named "uncertain").
    Raises ValueError for an unknown detector, and when there is neither a prior nor a model that carries one.
    """
    prior = prior if prior is not None else (model.about.get("prior") if model is not None else None)
    if prior is None:
        raise ValueError("locate_levels needs a prior: give fit_level_prior's, or weights from 02_train_spinenet")
    if layout is None:
        layout = (model.about.get("layout") if model is not None else None) or prior
    detect = _detector(detector, model)
    chain, volumes = [], []
    for description in ("Sagittal T2/STIR", "Sagittal T1"):
        volumes += _rejoined([volume for volume in study.of(description) if volume.plane == "sagittal"])
    for volume in _searched(volumes, getattr(model, "resolution_mm", 2.0)):
        try:
            check_limit()
            chain = surest(merge_vertebrae(chain, surest(detect(volume))))
        except Exception as error:
            if lost is None:
                raise
            lost.setdefault(f"{type(error).__name__}: {error}", []).append(volume.series_id)
    anchors = study_anchors(study)
    if not any(v.name for v in chain):
        chain = name_vertebrae(chain, prior, anchors.get("sagittal"))
    # Names of another detector may repeat: the surest body has it.
    named = {}
    for vertebra in sorted(chain, key=lambda v: -v.confidence):
        if vertebra.name in _CHAIN:
            named.setdefault(vertebra.name, vertebra)
    named = smooth_sideways(sorted(named.values(), key=lambda v: _CHAIN.index(v.name)))
    uncertain = [replace(v, name=UNCERTAIN) for v in chain if v.name not in _CHAIN]
    others = [v for v in named if v.name not in _LUMBAR]
    planned = axial_levels(study, layout) if len(named) < 2 else None
    if planned is not None:
        return planned[0], planned[1] + [replace(v, name=UNCERTAIN) for v in uncertain + named]
    complete = complete_vertebrae(named, anchors, prior if named else layout)
    return level_boxes(complete), sorted(complete + others, key=lambda v: _CHAIN.index(v.name)) + uncertain


def locate_levels_surely(study, model, prior=None, detector="own", layout=None):
    """locate_levels for a study that may be odd: (LevelBoxes, Vertebrae, None or what went wrong, as a sentence).

    A series in which detection fails, or takes too long (LOCATING_S), is left out; where nothing is seen the levels
    come from the axial slices or the mean layout.
    Raises ValueError when there is neither a prior nor a model that carries one.
    """
    prior = prior if prior is not None or model is None else model.about.get("prior")
    layout = layout or (model.about.get("layout") if model is not None else None) or prior
    lost = {}
    try:
        with cpu_limit(LOCATING_S):
            boxes, vertebrae = locate_levels(study, model, prior, detector, layout, lost)
        problem = None
        if lost:
            where = [f"({reason}) in series {', '.join(map(str, sorted(set(ids))))}" for reason, ids in lost.items()]
            problem = f"detection failed {' and '.join(where[:3])}"
            if not _seen(vertebrae):
                problem += "; the axial slices or the mean layout stand in"
        sentences = [sentence for sentence in (problem, _odd_size(vertebrae)) if sentence]
        return boxes, vertebrae, "; ".join(sentences) or None
    except Exception as error:
        problem = f"detection failed ({type(error).__name__}: {error}); the mean layout stands in"
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


def locate_studies(paths, model, prior=None, folder=None, workers=1, detector="own"):
    """Levels and vertebrae of many studies.

    paths: dict study_id -> file, as study_paths returns it; prior, detector: as locate_levels takes them; folder:
    where each study's result is kept as <study_id>.json, so that a killed run continues (a result of other weights,
    prior or detector is not taken; a function is known by its repr), default nowhere; workers: threads (most of the
    time is spent outside Python's lock).
    A study whose detection fails gets its levels from the axial slices or the mean layout, which is not kept in
    `folder`. Returns (levels table, vertebrae table, anchors: dict study_id -> study_anchors).
    Raises RuntimeError when a file cannot be read, and when detection failed in every one of
    three or more studies.
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
    finally:  # a killed run shall not work off the rest first
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


def locate_unseen(levels, vertebrae, anchors, prior, paths=None):
    """The two tables with the studies in which nothing was seen placed by another prior.

    paths: dict study_id -> volume file; with it also those placed by their axial slices, whose position within the
    slices is the prior's.
    """
    placed = "prior|axial" if paths is not None else "prior"
    unseen = levels.groupby("study_id")["source"].agg(lambda sources: sources.str.match(placed).all())
    for study_id in unseen.index[unseen]:
        own = levels[levels["study_id"] == study_id]
        if own["source"].str.match("axial").any():
            boxes, bodies = axial_levels(load_study(paths[study_id]), prior)
        else:
            bodies = complete_vertebrae([], anchors[study_id], prior)
            boxes = level_boxes(bodies)
        old = vertebrae[(vertebrae["study_id"] == study_id) & (vertebrae["vertebra"] == UNCERTAIN)]
        levels = pd.concat([levels[levels["study_id"] != study_id], boxes_to_table(study_id, boxes)])
        rest = vertebrae[vertebrae["study_id"] != study_id]
        vertebrae = pd.concat([rest, vertebrae_to_table(study_id, bodies)] + ([old] if len(old) else []))
    return levels.reset_index(drop=True), vertebrae.reset_index(drop=True)


def locate_with_own_layout(paths, model, folder=None, workers=1, detector="own"):
    """locate_studies; and where nothing is seen, the mean layout of these patients instead of the phantoms'.

    The layout goes into model.about["layout"], so that inference places its studies alike; names are given with
    model.about["prior"] here and there. Returns (levels table, vertebrae table).
    """
    prior = model.about["prior"]
    levels, vertebrae, anchors = locate_studies(paths, model, prior, folder, workers, detector)
    model.about["layout"] = refit_level_prior(anchors, vertebrae, prior)
    return locate_unseen(levels, vertebrae, anchors, model.about["layout"], paths)


# -- how good are they


def read_vertebra_truth(path, split=None):
    """The phantom's true vertebrae as a table with the columns of vertebrae.csv (source "truth").

    path: phantom_vertebrae.csv; split: "train" or "test", default both.
    Raises FileNotFoundError or ValueError, naming what is missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: only phantom data have true vertebrae")
    table = pd.read_csv(path)
    if split is not None and "split" in table:
        table = table[table["split"] == split]
    table = table.assign(width_mm=2 * table["half_width_mm"], confidence=1.0, source="truth")
    missing = [column for column in VERTEBRA_TABLE_COLUMNS if column not in table]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}")
    return table[VERTEBRA_TABLE_COLUMNS].reset_index(drop=True)


def level_errors(levels, truth):
    """Boxes against true vertebrae.

    levels: table of levels.csv; truth: vertebra table. Returns a DataFrame, one row for each level of each study that
    is in both: study_id, level, error_mm (between centres), along_mm (of it along the true disc's normal), angle_deg
    (between the normals), named (the nearest true disc has this name), confidence, source.
    """
    rows = []
    for study_id in sorted(set(levels["study_id"]) & set(truth["study_id"])):
        true_boxes = {box.level: box for box in level_boxes(vertebrae_from_table(truth, study_id))}
        centers = np.stack([box.center_lps_mm for box in true_boxes.values()])
        for box in boxes_from_table(levels, study_id):
            if box.level not in true_boxes:
                continue
            true_box = true_boxes[box.level]
            offset = true_box.from_lps(box.center_lps_mm)
            nearest = list(true_boxes)[int(np.linalg.norm(centers - box.center_lps_mm, axis=1).argmin())]
            angle = np.degrees(np.arccos(np.clip(box.axes[0] @ true_box.axes[0], -1, 1)))
            rows.append(
                [
                    study_id,
                    box.level,
                    float(np.linalg.norm(offset)),
                    float(abs(offset[0])),
                    float(angle),
                    nearest == box.level,
                    box.confidence,
                    box.source,
                ]
            )
    return pd.DataFrame(
        rows, columns=["study_id", "level", "error_mm", "along_mm", "angle_deg", "named", "confidence", "source"]
    )


def vertebra_errors(vertebrae, truth, reach_mm=12.0):
    """Detected bodies against true ones, L1 to S1.

    vertebrae, truth: vertebra tables. Returns a DataFrame, one row for each true body of each study that is in both:
    study_id, vertebra, error_mm (to the nearest body that was seen, not extrapolated), found (within reach_mm),
    named (found, and under its name).
    """
    seen = vertebrae[~vertebrae["source"].str.contains(_NOT_SEEN)]
    rows = []
    for study_id in sorted(set(vertebrae["study_id"]) & set(truth["study_id"])):
        bodies = vertebrae_from_table(seen, study_id)
        for true in vertebrae_from_table(truth, study_id):
            if true.name not in _LUMBAR:
                continue
            distance = [np.linalg.norm(body.center_lps_mm - true.center_lps_mm) for body in bodies]
            error_mm = float(min(distance, default=np.inf))
            found = error_mm < reach_mm
            rows.append(
                [study_id, true.name, error_mm, found, found and bodies[int(np.argmin(distance))].name == true.name]
            )
    return pd.DataFrame(rows, columns=["study_id", "vertebra", "error_mm", "found", "named"])


def locating_scores(levels, vertebrae, truth, right_mm=4.0):
    """The figures of level_errors and vertebra_errors in one dict; `right`: named, and the centre within right_mm."""
    boxes, bodies = level_errors(levels, truth), vertebra_errors(vertebrae, truth)
    return {
        "studies": int(boxes["study_id"].nunique()),
        "levels": len(boxes),
        "right": float((boxes["named"] & (boxes["error_mm"] < right_mm)).mean()),
        "named": float(boxes["named"].mean()),
        "median_mm": float(boxes["error_mm"].median()),
        "p95_mm": float(boxes["error_mm"].quantile(0.95)),
        "median_angle_deg": float(boxes["angle_deg"].median()),
        "vertebrae_found": float(bodies["found"].mean()),
        "vertebrae_named": float(bodies.loc[bodies["found"], "named"].mean()) if bodies["found"].any() else 0.0,
    }


def compare_with_labels(boxes, coordinates, study):
    """Boxes of one study against the competition's label points, which real data have too.

    coordinates: this study's rows of read_coordinates. Returns a DataFrame condition, level, head_mm, left_mm,
    back_mm (the point in the frame of its level's box) and nearest (the level whose disc plane is nearest); points
    that lie on no slice (see place_points) are left out.
    """
    by_level = {box.level: box for box in boxes}
    rows = []
    for row, point in zip(coordinates.itertuples(), coordinates_to_lps(coordinates, study)):
        if np.isfinite(point).all() and row.level in by_level:
            head_mm = {level: abs(box.from_lps(point)[0]) for level, box in by_level.items()}
            rows.append([row.condition, row.level, *by_level[row.level].from_lps(point), min(head_mm, key=head_mm.get)])
    return pd.DataFrame(rows, columns=["condition", "level", "head_mm", "left_mm", "back_mm", "nearest"])


def plot_vertebrae(ax, volume, index, vertebrae, boxes=()):
    """Draw one sagittal slice with bodies, names and level boxes. Returns ax.

    volume: Volume; index: of the slice; vertebrae: Vertebrae; boxes: LevelBoxes. Both are drawn where they are
    projected onto the slice; what no sagittal image showed is dashed.
    """
    ax.imshow(
        np.asarray(volume.array[index], np.float32),
        cmap="gray",
        vmin=0,
        vmax=1,
        aspect=volume.spacing_mm[1] / volume.spacing_mm[2],
    )
    for vertebra in vertebrae:
        corners = volume.lps_to_voxel(vertebra.corners_lps_mm)[[0, 1, 2, 3, 0]]
        known = not any(word in vertebra.source for word in _NOT_SEEN.split("|"))
        ax.plot(corners[:, 2], corners[:, 1], "-" if known else "--", color="tab:cyan", linewidth=1)
        ax.text(
            corners[:4, 2].mean(),
            corners[:4, 1].mean(),
            vertebra.name,
            color="yellow",
            fontsize=8,
            ha="center",
            va="center",
        )
    for box in boxes:
        head, _, back = box.extent_mm / 2
        outline = [(head, 0, -back), (head, 0, back), (-head, 0, back), (-head, 0, -back), (head, 0, -back)]
        corners = volume.lps_to_voxel(box.to_lps(outline))
        ax.plot(corners[:, 2], corners[:, 1], ":", color="tab:orange", linewidth=1)
        center = volume.lps_to_voxel(box.center_lps_mm)
        ax.plot(center[2], center[1], "+", color="tab:orange")
    ax.set_xlim(-0.5, volume.array.shape[2] - 0.5)
    ax.set_ylim(volume.array.shape[1] - 0.5, -0.5)
    ax.set_axis_off()
    return ax


def plot_level_errors(ax, errors, held_out=()):
    """Histogram of the distances between found and true disc centres, held-out studies apart. Returns ax.

    errors: from level_errors; held_out: study ids.
    """
    apart = errors["study_id"].isin(held_out)
    bins = np.linspace(0, max(10.0, min(errors["error_mm"].max(), 30.0)), 41)
    rest = "training studies" if apart.any() else "all studies"
    for part, name in ((errors[~apart], rest), (errors[apart], "held out")):
        if len(part):
            label = f"{name} ({len(part)} levels)"
            ax.hist(part["error_mm"].clip(upper=bins[-1]), bins, density=True, alpha=0.6, label=label)
    ax.set(xlabel="distance of disc centres (mm)", ylabel="share per mm")
    ax.legend(frameon=False)
    return ax
