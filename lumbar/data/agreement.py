"""Do the parts of a study agree? Slices with their neighbours, passes with one another, series with series.

What does not fit is named with its reason: a wrong scale in one header leaves an image that looks sound by itself.

May use: resample, volume.
"""

from collections import Counter
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from .volume import Study

LEAST_SLICES, LEAST_PX = 5, 32  # of a stack in which slices are compared, and of their sides
SCALE_RATIO = 4.0  # of the spread of grey values, to the neighbours': coils and anatomy stay below 2
STATED_RATIO = 1.5  # the same, where the slice states another scale than the others
LIKE, UNLIKE = 0.5, 0.1  # correlation of slices that show the same, and that have nothing in common
SAME_LOOK = 0.7  # correlation of passes over the same places
COARSE_PX = 48  # pixels a side, on which slices are compared: below this noise and small structures average out


def coarse(item: dict) -> np.ndarray:
    """A slice's values on about COARSE_PX pixels a side, each the mean of two by two pixels: (rows, columns) float64.

    item: as read_slices gives it; NaN where the file has padding.
    """
    rows, columns = (max(1, side // (2 * COARSE_PX)) for side in item["pixels"].shape)
    image = item["pixels"][::rows, ::columns].astype(np.float64)
    if item.get("padding") is not None:
        image[item["padding"][::rows, ::columns]] = np.nan
    image = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]
    image = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4
    return image * item["slope"] + item["intercept"]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, of the places where both are finite; 0 where one is constant."""
    a, b = first.ravel(), second.ravel()
    both = np.isfinite(a + b)
    if not both.all():
        a, b = a[both], b[both]
    if a.size < 16:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def odd_slices(stack: list[dict]) -> dict[int, str]:
    """Slices of a stack whose grey values fit none of their neighbours'.

    One slice of another scale (RescaleSlope), byte order or polarity decides the grey scale of its whole series, or is
    taken for disease. Compared are the spread and the middle of the grey values, and the correlation with the
    neighbours: only what no anatomy, coil or saturation band does is odd.

    Parameters
    ----------
    stack : list of dict
        Slices as read_slices gives them, in the order of their normal.

    Returns
    -------
    dict
        Index -> reason, a part of a sentence.
    """
    if len(stack) < LEAST_SLICES or min(stack[0]["pixels"].shape) < LEAST_PX:
        return {}
    images = [coarse(item) for item in stack]
    low, middle, high = np.array([_percentiles(image) for image in images]).T
    middle, spread = middle.tolist(), (high - low).tolist()
    like = [correlation(a, b) for a, b in zip(images, images[1:])]
    noise = median(like) < UNLIKE  # of the whole stack: no slice has anything in common with the next
    scales = [(item["slope"], item["intercept"]) for item in stack]
    usual = max(set(scales), key=scales.count)
    odd = {}
    for k in range(len(stack)):
        near = [j for j in range(max(0, k - 2), min(len(stack), k + 3)) if j != k]
        around, level = median(spread[j] for j in near), median(middle[j] for j in near)
        if not around > 0:
            continue
        ratio = spread[k] / around
        if spread[k] == 0:
            odd[k] = "it is of one grey"
        elif not 1 / SCALE_RATIO < ratio < SCALE_RATIO or abs(middle[k] - level) > SCALE_RATIO * around:
            odd[k] = f"its grey values span {ratio:.3g} times those of its neighbours{_stated(scales[k], usual)}"
        elif scales[k] != usual and _fits_better(ratio, scales[k][0], usual[0]):
            odd[k] = f"its grey values do not fit its neighbours'{_stated(scales[k], usual)}"
        elif 0 < k < len(stack) - 1:
            own = max(like[k - 1], like[k])
            if own < UNLIKE and (noise or correlation(images[k - 1], images[k + 1]) > LIKE):
                turned = "its dark and bright are turned round against its neighbours'"
                odd[k] = turned if own < -UNLIKE and not noise else "it has nothing in common with its neighbours"
        else:
            inner, own = (like[1], like[0]) if k == 0 else (like[-2], like[-1])
            if inner > LIKE and own < -LIKE:
                odd[k] = "its dark and bright are turned round against its neighbour's"
    return odd


def _percentiles(image):
    there = image[np.isfinite(image)]
    if not there.size:
        return np.zeros(3)
    places = [there.size // 20, there.size // 2, there.size - 1 - there.size // 20]
    return np.partition(there, places)[places]


def _stated(scale, usual):
    if scale == usual:
        return ""
    own, others = (f"{slope:g} and {intercept:g}" for slope, intercept in (scale, usual))
    return f" (its RescaleSlope and RescaleIntercept are {own}, theirs {others})"


def _fits_better(ratio, slope, usual_slope):
    """True where a slice of another stated slope fits its neighbours with theirs, and not with its own."""
    if slope == 0 or not 1 / STATED_RATIO < ratio * abs(usual_slope / slope) < STATED_RATIO:
        return False
    return not 1 / STATED_RATIO < ratio < STATED_RATIO


def same_contrast(first: list[dict], second: list[dict], most: int = 8) -> bool:
    """True if two passes over the same places look alike, up to noise and a small shift."""
    normal = np.cross(first[0]["row_lps"], first[0]["column_lps"])
    places = np.array([item["position_lps"] for item in first]) @ normal
    alike, spreads = [], []
    for item in second[:: max(1, len(second) // most)]:
        nearest = first[int(np.argmin(np.abs(places - item["position_lps"] @ normal)))]
        a, b = coarse(nearest), coarse(item)
        alike.append(correlation(a, b))
        spreads.append([np.ptp(_percentiles(image)) for image in (a, b)])
    sums = np.sum(spreads, 0)
    return bool(np.median(alike) > SAME_LOOK and sums.min() > 0 and sums.max() < 1.6 * sums.min())


# -- series with series

GRID_MM = 3.0  # step of the grid on which two series are compared
GRID_SLICES = 6
LEAST_SHARED = 400  # points of that grid
AGREED = 0.2  # mutual information (see below) above which no other scale is tried: series of one patient lie above
BETTER = 2.0  # another scale is believed when its mutual information is this many times the stated one's,
TRUSTED = 0.13  # and at least this
FACTORS = (1 / 3, 0.5, 2 / 3, 0.75, 0.8, 1.25, 4 / 3, 1.5, 2.0, 3.0)


def mutual_information(first: np.ndarray, second: np.ndarray, bins: int = 24) -> float:
    """Normalised mutual information of two lists of normalised grey values: 0 for independent ones, at most 1.

    (H(a) + H(b)) / H(a, b) - 1 of Studholme et al. (Pattern Recognition 32, 1999), from a histogram of bins^2 cells.
    It asks whether one image tells the other, whatever the contrast.
    """
    joint, _, _ = np.histogram2d(np.clip(first, 0, 1.2), np.clip(second, 0, 1.2), bins, range=[[0, 1.2]] * 2)
    joint /= max(1.0, joint.sum())

    def entropy(p):
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    both = entropy(joint)
    return (entropy(joint.sum(0)) + entropy(joint.sum(1))) / both - 1 if both > 0 else 0.0


BRIGHT = 0.55  # median grey value above which a sagittal series is doubted: air and muscle keep it below .45
OPPOSED = -0.4  # correlation of sagittal and axial T2 at the same places below which one of them is turned round


def doubtful_polarity(study: Study) -> list[str]:
    """Sentences about series whose dark and bright seem turned round.

    Most of a sagittal image is dark: air, muscle and bone. And the sagittal and the axial T2 series show the same
    tissue bright.

    Parameters
    ----------
    study : Study
        Normalised.
    """
    largest = _largest_volumes(study)
    sentences = [
        f"study {v.study_id}, series {v.series_id}: most of it is bright, dark and bright of {v.description} may be "
        "turned round"
        for v in largest
        if v.plane == "sagittal" and np.median(v.array) > BRIGHT
    ]
    pair = [v for v in largest if "T2" in v.description]
    if len(pair) == 2 and not any(f"series {v.series_id}:" in text for v in pair for text in sentences):
        affine, shape = _coarse_grid(pair[0])
        first, second = (_on_grid(volume, affine, shape) for volume in pair)
        if np.isfinite(first + second).sum() >= LEAST_SHARED and correlation(first, second) < OPPOSED:
            sentences.append(
                f"study {study.study_id}, series {pair[0].series_id} and {pair[1].series_id}: what is bright in one is "
                "dark in the other, one of them may be turned round"
            )
    return sentences


def _largest_volumes(study):
    """The largest volume of each kind of series, axial last."""
    chosen = {}
    for volume in study.volumes:
        known = chosen.get(volume.description)
        if known is None or volume.array.size > known.array.size:
            chosen[volume.description] = volume
    return sorted(chosen.values(), key=lambda volume: volume.description.startswith("Axial"))


@dataclass(frozen=True)
class DoubtfulScale:
    """A series whose stated pixel spacing others contradict. sure: two others agree with each other, and with this one
    at another scale as series of one patient do; text: a sentence."""

    series_id: int
    sure: bool
    text: str


def doubtful_scales(study: Study) -> list[DoubtfulScale]:
    """Series whose pixel spacing the study's other series contradict.

    Two series of one patient tell each other at the same places of the patient. Where they do so clearly better with
    another pixel spacing of one than with the stated one, that spacing is doubtful. With three series the one that
    two others contradict is named, with two the pair.

    Parameters
    ----------
    study : Study
        Normalised.
    """
    volumes = _largest_volumes(study)
    agreed: Counter[int] = Counter()
    contradicted = []
    for number, fixed in enumerate(volumes):
        for moving in volumes[number + 1 :]:
            found = _other_scale(moving, fixed)
            if found is None:
                agreed.update((moving.series_id, fixed.series_id))
            elif found[0] is not None:
                contradicted.append((*found, moving, fixed))
    doubts: dict[int, DoubtfulScale] = {}
    for factor, told, moving, fixed in contradicted:
        # Whoever agrees with a third series is right.
        if agreed[moving.series_id] > agreed[fixed.series_id]:
            factor, moving, fixed = 1 / factor if factor else 0, fixed, moving
        sure = agreed[fixed.series_id] > 0 and told >= AGREED
        doubt = DoubtfulScale(
            moving.series_id, sure, _scale_sentence(factor, moving, fixed, agreed[fixed.series_id] > 0)
        )
        if moving.series_id not in doubts or sure > doubts[moving.series_id].sure:
            doubts[moving.series_id] = doubt
    return list(doubts.values())


def _scale_sentence(factor, moving, fixed, sure):
    stated = " x ".join(f"{side:.2f}" for side in moving.spacing_mm[1:])
    needed = "rows and columns change places" if factor == 0 else f"they are {1 / factor:.2g} times as large"
    either = "" if sure else f", or it is series {fixed.series_id} that states a wrong size"
    return (
        f"study {moving.study_id}, series {moving.series_id}: the scale of {moving.description} is doubtful: pixels "
        f"of {stated} mm show what series {fixed.series_id} shows only if {needed}{either}"
    )


def _other_scale(moving, fixed):
    """What two series tell of the moving one's scale: None where the stated one fits; else (the factor by which its
    pixel spacing seems too large, 0 where rows and columns seem to have changed places, None where nothing is told; how
    well the two then tell each other)."""
    affine, shape = _coarse_grid(fixed)
    wanted = _on_grid(fixed, affine, shape)
    stated = _told(moving, wanted, affine, shape)
    if stated is None:
        return None, 0.0
    if stated >= AGREED:
        return None
    best, factor = 0.0, None
    rows_mm, columns_mm = moving.spacing_mm[1:]
    scales = {value: (1 / value, 1 / value) for value in FACTORS}
    if abs(rows_mm / columns_mm - 1) > 0.03:
        scales[0] = (columns_mm / rows_mm, rows_mm / columns_mm)
    for value, steps in scales.items():
        for corner in (True, False):
            told = _told(_rescaled(moving, steps, corner), wanted, affine, shape)
            if told is not None and told > best:
                best, factor = told, value
    if best > max(TRUSTED, BETTER * stated):
        return factor, best
    return None if stated >= TRUSTED else (None, best)


def _coarse_grid(volume):
    """(affine, shape) of a grid through a volume's slices: about GRID_SLICES of them, points GRID_MM apart."""
    count, height, width = volume.array.shape
    every = max(1, count // GRID_SLICES)
    size = [max(8, int(n * mm / GRID_MM)) for n, mm in zip((height, width), volume.spacing_mm[1:], strict=True)]
    affine = volume.affine.copy()
    affine[:3, 0] *= every
    affine[:3, 1] *= height / size[0]
    affine[:3, 2] *= width / size[1]
    return affine, (-(-count // every), *(min(n, 400) for n in size))


def _on_grid(volume, affine, shape):
    """The volume's values on a grid, NaN where it has none: (d, h, w) float32."""
    from .resample import resample

    values = np.full(shape, np.nan, np.float32)
    window, samples, covered = resample(volume, affine, shape)
    if window is not None:
        values[window] = np.where(covered.numpy(), samples.numpy(), np.nan)
    return values


def _told(moving, wanted, affine, shape):
    """mutual_information of a volume and the values on a grid; None where they share too few points."""
    found = _on_grid(moving, affine, shape)
    both = np.isfinite(found) & np.isfinite(wanted)
    return mutual_information(found[both], wanted[both]) if both.sum() >= LEAST_SHARED else None


def _rescaled(volume, steps, corner):
    """The volume with its rows' and columns' steps multiplied, about its first pixel or its middle."""
    affine = volume.affine.copy()
    affine[:3, 1:3] *= np.asarray(steps)
    if not corner:
        middle = np.array([0.0, *(np.array(volume.array.shape[1:]) - 1) / 2])
        affine[:3, 3] += volume.affine[:3, :3] @ middle - affine[:3, :3] @ middle
    return replace(volume, affine=affine)
