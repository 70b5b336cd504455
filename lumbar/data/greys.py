"""Grey values as DICOM files have them to the networks' scale, padding left out.

May use: volume, pixels, agreement.
"""

from dataclasses import replace

import numpy as np

from .agreement import doubtful_polarity, doubtful_scales
from .pixels import at_the_border
from .volume import Study, Volume

# Padding that no tag announces: one value, the smallest or largest of its slice, in a part of the border that holds a
# corner and at least this share of the slice. It counts as padding where it moves the grey scale by more than
# PADDING_EFFECT: air of exactly 0, which many scanners write, mostly does not.
PADDING_SHARE = 0.005
PADDING_EFFECT = 0.02


def grey_range(array: np.ndarray) -> tuple[float, float]:
    """The values that become 0 and 1: percentiles 0.5 and 99.5 of what is finite; (0, 0) where nothing is."""
    there = np.isfinite(array)
    values = array if there.all() else array[there]
    low, high = np.percentile(values, (0.5, 99.5)) if values.size else (0.0, 0.0)
    return float(low), float(high)


def border_padding(array: np.ndarray) -> np.ndarray | None:
    """What looks like padding that no tag announces, see PADDING_SHARE: (slices, rows, columns) bool, None for none."""
    mask = None
    for k, image in enumerate(array):
        low, high = np.nanmin(image), np.nanmax(image)
        if not low < high:
            continue
        for value in {image[row, column] for row in (0, -1) for column in (0, -1)} & {low, high}:
            part = at_the_border(image == value)
            if part.mean() >= PADDING_SHARE:
                mask = np.zeros(array.shape, bool) if mask is None else mask
                mask[k] |= part
    return mask


def normalise_volume(volume: Volume) -> Volume:
    """The volume on the scale that every network sees: percentile 0.5 at 0 and 99.5 at 1, clipped to [-1, 8].

    Padding, announced in the file (NaN here) or found at the border (border_padding), has no say in the percentiles
    and becomes 0. A constant image becomes zeros.

    Parameters
    ----------
    volume : Volume
        With values as read; it stays as it is.

    Returns
    -------
    Volume
        With a float16 array (slice, row, column): 11 bits of mantissa hold what a 12-bit magnitude image carries above
        its noise, at half the size.
    """
    array = volume.array
    low, high = grey_range(array)
    if np.isfinite(array[:, :: max(1, array.shape[1] - 1), :: max(1, array.shape[2] - 1)]).any():
        padding = border_padding(array)
        if padding is not None and not padding.all():
            other_low, other_high = grey_range(np.where(padding, np.nan, array))
            if max(abs(low - other_low), abs(high - other_high)) > PADDING_EFFECT * (other_high - other_low) > 0:
                array, low, high = np.where(padding, np.nan, array), other_low, other_high
    scale = 1.0 / (high - low) if high > low else 0.0
    scaled = array.astype(np.float32)  # in place from here on: volumes may be large
    scaled -= np.float32(low)
    scaled *= np.float32(scale)
    np.clip(scaled, -1, 8, out=scaled)
    return replace(volume, array=np.nan_to_num(scaled, copy=False, nan=0.0).astype(np.float16))


def normalise_study(study: Study) -> Study:
    """The study with every volume on the networks' scale.

    Parameters
    ----------
    study : Study
        Of read_study; it stays as it is.

    Returns
    -------
    Study
        Its volumes are those of normalise_volume. What shows nothing is among the problems, and so is a series that
        states another scale than the study's other series: where two of them agree on that it is left out, for a
        network would be sure of what it sees there.
    """
    volumes = [normalise_volume(volume) for volume in study.volumes]
    problems = study.problems + [
        f"study {v.study_id}, series {v.series_id}: {len(v.array)} slices are of one grey"
        for v in volumes
        if not v.array.any()
    ]
    doubts = doubtful_scales(replace(study, volumes=volumes))
    wrong = {doubt.series_id for doubt in doubts if doubt.sure}
    problems += [doubt.text + (", left out" if doubt.sure else "") for doubt in doubts]
    problems += doubtful_polarity(replace(study, volumes=[v for v in volumes if v.series_id not in wrong]))
    return replace(study, volumes=[v for v in volumes if v.series_id not in wrong], problems=problems)
