"""The sagittal series of a study as one chain of bodies: pieces rejoined, series merged, places steadied.

May use: naming, spinenet, vertebra, data.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..data.source import Source
from ..data.volume import Volume
from .naming import numbered_differently
from .spinenet import MAX_SEARCHED_PX, every_nth_slice, searched_px
from .vertebra import UNCERTAIN, Vertebra


def rejoined(volumes: Sequence[Volume]) -> list[Volume]:
    """Pieces of one series, cut where slices are missing, as one Volume: what is missing is interpolated.

    The reader must not invent slices, but a body whose left and right half lie in two pieces would be found twice,
    or beside its place. Pieces belong together when they are parallel and aligned, and no more than three slices are
    missing between them, unless together they would exceed _REJOINED_PX. Returns Volumes; those alone in their series
    are unchanged.
    """
    result: list[Volume] = []
    pieces = sorted(volumes, key=lambda v: (v.series_id, v.block))
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
    if first[0].name and second[0].name and not numbered_differently(first, second):
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
    contradict = numbered_differently(first, second)
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
            kept.in_image_mm = max(vertebra.in_image_mm, other.in_image_mm)
            if vertebra.appearance is not None and other.appearance is not None:
                appearance = (vertebra.appearance + other.appearance) / 2
                kept.appearance = appearance - np.log(np.exp(appearance).sum())
            precision = np.array([vertebra.across_sd_mm, other.across_sd_mm]) ** -2.0
            x_mm = np.average([vertebra.center_lps_mm[0], across_mm[partner[i]]], weights=precision)
            kept.across_sd_mm = float(precision.mean() ** -0.5)  # both see the same body in slices as thick
            kept.corners_lps_mm = kept.corners_lps_mm + [x_mm - kept.center_lps_mm[0], 0, 0]
            merged.append(kept)
        else:
            merged.append(vertebra)
    rest = [other for k, other in enumerate(second) if k not in partner.values()]
    if contradict:
        merged = [v if v.name == UNCERTAIN else replace(v, source=v.source | Source.UNCERTAIN) for v in merged]
        rest = [replace(v, name=UNCERTAIN) for v in rest]
    return sorted(merged + rest, key=lambda v: -v.center_lps_mm[2])


# By which a spine turns sideways from one body to the next, as the tangent's standard deviation: straight to crooked.
_BENDS = (0.02, 0.04, 0.08, 0.16)
_OUTLYING = 2.0  # standard deviations, from which on a body counts ever less


def smooth_sideways(vertebrae: Sequence[Vertebra]) -> list[Vertebra]:
    """Vertebrae, head to foot and named, with their left-right position steadied by their neighbours'.

    Across the slices a centre is known worse than within them (across_sd_mm), but a spine has no steps: the line
    through the centres that is most likely when the bodies lie off it by their standard deviations and it bends from
    body to body by one of _BENDS, whichever makes the whole most likely. So a scoliosis keeps its bends, and in a
    straight spine a body that lies beside the line of the others counts little.
    """
    if len(vertebrae) < 4:
        return list(vertebrae)
    x, _, z = np.stack([v.center_lps_mm for v in vertebrae], 1)
    sd_mm = np.hypot([v.across_sd_mm for v in vertebrae], 0.5)
    count = len(x)
    slopes = np.zeros((count - 1, count))  # of the line from each body to the next
    down = np.maximum(z[:-1] - z[1:], 5.0)
    slopes[np.arange(count - 1), np.arange(count - 1)] = 1 / down
    slopes[np.arange(count - 1), np.arange(1, count)] = -1 / down
    best = np.inf
    line = x
    for bend in _BENDS:
        bends = np.diff(slopes, axis=0) / bend
        trust = np.ones(count)
        for _ in range(8):
            weight = trust / sd_mm**2
            matrix = np.diag(weight) + bends.T @ bends
            along = np.linalg.solve(matrix, weight * x)
            off = (x - along) / sd_mm
            trust = 1 / (1 + (off / _OUTLYING) ** 2)
        cost = 0.5 * _OUTLYING**2 * np.log1p((off / _OUTLYING) ** 2).sum() + 0.5 * ((bends @ along) ** 2).sum()
        cost += (count - 2) * np.log(bend) + 0.5 * np.linalg.slogdet(matrix)[1]
        if cost < best:
            best, line = cost, along
    return [replace(v, corners_lps_mm=v.corners_lps_mm + [dx, 0, 0]) for v, dx in zip(vertebrae, line - x)]


def thinned(volumes: Sequence[Volume], resolution_mm: float) -> list[Volume]:
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
