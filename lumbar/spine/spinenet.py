"""SpineNet after Windsor et al. (MICCAI 2020), trained here: its network and weights, and how it finds bodies.

May use: across, counting, vertebra, data, engine, weights, storage, limits, names.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.source import Source
from ..data.volume import Volume
from ..engine import folded, on_cpu
from ..limits import check_limit
from ..names import VERTEBRAE
from ..storage import write_tensors
from ..weights import Stated, check_network, read_weights
from .across import middle_across
from .counting import COUNTING_FEATURES
from .vertebra import _LUMBAR, SPINE_CLASSES, Vertebra, polygon_iou, spanned_mm, upright


def sagittal_images(volume: Volume, resolution_mm: float) -> tuple[torch.Tensor, np.ndarray]:
    """A sagittal volume's slices as the network sees them: rows towards the feet, columns towards the back.

    Returns (images (n, 1, h, w) float32 tensor, affine (4, 4) from (slice, row, column, 1) of these images to LPS).
    The pixel size is resolution_mm up to rounding to whole pixels, and the affine has the exact one. Values are the
    volume's, which must be normalised, clipped to [-0.5, 2].
    Raises ValueError for a volume that is not sagittal.
    """
    if volume.plane != "sagittal":
        raise ValueError(f"study {volume.study_id}, series {volume.series_id}: {volume.plane}, not sagittal slices")
    array, affine = upright(volume)
    size = _resampled_px(array.shape, affine, resolution_mm)
    images = torch.empty((len(array), 1, *size))
    together = max(1, _CONVERTED_PX // math.prod(array.shape[1:]))
    for start in range(0, len(array), together):
        part = slice(start, start + together)
        pixels = torch.from_numpy(np.ascontiguousarray(array[part])).float()[:, None].clamp_(-0.5, 2)
        images[part] = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    for axis in (1, 2):
        ratio = array.shape[axis] / size[axis - 1]
        affine[:3, 3] += affine[:3, axis] * (ratio - 1) / 2  # pixel edges coincide, not the first pixels' centres
        affine[:3, axis] *= ratio
    return images, affine


_CONVERTED_PX = 1 << 24  # that are held in float32 at a time, before they are resampled


def _resampled_px(shape, affine, resolution_mm):
    """[rows, columns] of a volume's (shape, affine) slices once they are resampled."""
    sides_mm = np.array(shape[1:]) * np.linalg.norm(affine[:3, 1:3], axis=0)
    return [max(int(round(side)), 1) for side in sides_mm / resolution_mm]


# -- network

_HEAT, _VECTORS, _CLASSES = 5, slice(5, 13), slice(13, None)  # channels: see SpineNet


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class SpineNet(nn.Module):
    """U-Net with a residual encoder for sagittal slices of a fixed pixel size.

    widths: channels at strides 2, 4, 8, ...; blocks: residual blocks a stride in the encoder; resolution_mm: the
    pixel size it is trained for. forward: (b, 1, h, w) -> (b, 13 + classes, h, w) of any h and w:
      0-4    logits of the corner and centroid heat maps, in the order of spinenet_targets
      5-12   vectors from the pixel to the centroid in pixels, (row, column) for each corner kind
      13-    logits of SPINE_CLASSES, to be read at centroids
    `about`: dict written as the weights' metadata; its "prior" is what fit_level_prior returns.

    Full resolution is only touched by folding 2 x 2 pixels into channels and back (Shi et al., CVPR 2016): half the
    rows and columns carry the same information at a quarter of the work.
    """

    def __init__(self, widths: Sequence[int] = (32, 48, 64, 96), blocks: int = 1, resolution_mm: float = 2.0) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {
            "widths": list(widths),
            "blocks": blocks,
            "resolution_mm": float(resolution_mm),
        }
        self.resolution_mm = float(resolution_mm)
        self.about: dict[str, Any] = {}  # prior, layout, how it was trained
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.encoder, self.lateral, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for number, width in enumerate(widths):
            before = widths[max(number - 1, 0)]
            self.encoder.append(
                nn.Sequential(
                    _ResidualBlock(before, width, 2 if number else 1),
                    *[_ResidualBlock(width, width) for _ in range(blocks - 1)],
                )
            )
            if number:
                self.lateral.append(nn.Conv2d(width, before, 1))
                self.decoder.append(_ResidualBlock(2 * before, before))
        self.head = nn.Sequential(nn.Conv2d(widths[0], 4 * (13 + len(SPINE_CLASSES)), 1), nn.PixelShuffle(2))
        # Heat maps are nearly everywhere 0: starting there saves the steps that would only learn it.
        with torch.no_grad():
            last: Any = self.head[0]
            last.bias[:20] = -4.0

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the head reads: (b, 1, h, w) -> (b, widths[0], ceil(h / 2), ceil(w / 2)), a vector for 2 x 2 pixels.

        Maps end where the image does, as crops do in training: no stride pads them to whole multiples."""
        height, width = x.shape[2:]
        x = self.stem(F.pad(x, (0, width % 2, 0, height % 2)))
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        for skip, lateral, block in zip(skips[-2::-1], reversed(self.lateral), reversed(self.decoder)):
            x = F.interpolate(lateral(x), scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x[:, :, : skip.shape[2], : skip.shape[3]], skip], 1))
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        x = self.head(self.features(x))[:, :, :height, :width]
        return torch.cat([x[:, :_HEAT], x[:, _VECTORS] * self.vector_px, x[:, _CLASSES]], 1)

    @property
    def vector_px(self) -> float:
        """Bodies are some 30 mm high: in units of 16 mm the vectors are of order 1, as the rest."""
        return 16.0 / self.resolution_mm


def save_spinenet(model: SpineNet, path: str | Path) -> None:
    """Write a network's weights as safetensors, complete or not at all.

    Architecture and `about` (prior, training) are JSON in its metadata.

    Parameters
    ----------
    model : SpineNet
    path : str or Path
    """
    about = {"architecture": model.architecture, "classes": list(SPINE_CLASSES), "about": model.about}
    write_tensors(path, model.state_dict(), "spinenet", about)


def load_spinenet(path: str | Path, device: str = "cpu") -> SpineNet:
    """Read what save_spinenet wrote.

    Parameters
    ----------
    path : str or Path
    device : str
        As PyTorch names it.

    Returns
    -------
    SpineNet
        In eval mode on the device.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DamagedFile
        It has other contents: numbers out of range, a network that its tensors do not fit, values that are not finite.
    """
    remedy = "give the file that 02_train_spinenet wrote (attach its output, or correct WEIGHTS)"
    state, about = read_weights(path, "spinenet", remedy, "SpineNet's")
    stated = Stated(path, about, remedy)
    if about.get("classes") != list(SPINE_CLASSES):
        stated.refuse("classes", f"{list(SPINE_CLASSES)} for this version of the kit; train again")
    architecture = stated.part("architecture")
    architecture.keys(("widths", "blocks", "resolution_mm"))
    widths = architecture.about.get("widths")
    if not isinstance(widths, list) or not 1 <= len(widths) <= 8:
        architecture.refuse("widths", "a list of one to eight numbers")
    architecture.numbers("widths", (len(widths),), 1, 4096, whole=True)
    architecture.number("blocks", 1, 32, whole=True)
    architecture.number("resolution_mm", 0.1, 20)
    _check_layouts(stated.part("about"))
    check_network(path, lambda: SpineNet(**architecture.about), state, remedy)
    model = SpineNet(**architecture.about)
    model.load_state_dict(state)
    model.about = about["about"]
    return model.to(device).to(memory_format=torch.channels_last).eval()


def _check_layouts(stated):
    """Refuse a prior or layout (of fit_level_prior) that would place levels by something other than millimetres, or
    name them by something other than numbers."""
    for layout in (stated.part(name, optional=True) for name in ("prior", "layout")):
        if layout is None:
            continue
        layout.numbers("axial_mm", (3,), -2000, 2000)
        corners, widths = layout.part("layout_mm"), layout.part("width_mm")
        for part in (corners, widths):
            part.keys(VERTEBRAE)
        for name in {*_LUMBAR, *corners.about}:
            corners.numbers(name, (4, 3), -2000, 2000)
            widths.number(name, 0, 500)
        counting = layout.part("counting", optional=True)
        if counting is not None:
            counting.keys(COUNTING_FEATURES)
            for name in counting.about:
                counting.number(name, -1000, 1000)


# -- from maps to vertebrae


@dataclass(frozen=True)
class SpineMaps:
    """What the network shows of n slices: heat maps everywhere, the rest where it is asked for.

    heat: (n, 5, h, w) float32 probabilities on the CPU, as SpineNet orders them. read: from maps, rows and columns,
    (p,) integers each, to the other channels of the network there, (p, 8 + classes) float32: vectors, then logits.
    """

    heat: torch.Tensor
    read: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    @staticmethod
    def of_output(maps: torch.Tensor) -> "SpineMaps":
        """Of (n, 13 + classes, h, w) maps as the network returns them, with probabilities for heat."""
        array = maps[:, _HEAT:].numpy()
        return SpineMaps(maps[:, :_HEAT], lambda number, row, column: array[number, :, row, column])


class _Features(nn.Module):
    """A SpineNet without its head, for inference."""

    def __init__(self, model: SpineNet) -> None:
        super().__init__()
        self.network = folded(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.features(x)


@torch.no_grad()
def spinenet_maps(model: nn.Module, images: torch.Tensor, batch_size: int = 8) -> SpineMaps:
    """Run a SpineNet, or another network with its channels, on images (n, 1, h, w), batch_size at a time.

    Of a SpineNet vectors and classes are only worked out at peaks: at every pixel, they take a third of the time."""
    device, (height, width) = next(model.parameters()).device, images.shape[2:]
    parts = [part.contiguous(memory_format=torch.channels_last) for part in images.split(batch_size)]
    if type(model) is not SpineNet:  # whose forward may be another
        forward = on_cpu(model, images[:1])
        maps = torch.cat([forward(part.to(device)).float().cpu() for part in parts])
        maps[:, :_HEAT] = maps[:, :_HEAT].sigmoid()
        return SpineMaps.of_output(maps)
    last: Any = model.head[0]
    heat_weight, heat_bias = last.weight[: 4 * _HEAT], last.bias[: 4 * _HEAT]
    weight = last.weight[4 * _HEAT :].float().cpu().numpy().reshape(-1, 4, last.in_channels)
    bias = last.bias[4 * _HEAT :].float().cpu().numpy().reshape(-1, 4)
    forward = on_cpu(model, images[:1], lambda _: _Features(model))
    features, heat = [], []
    for part in parts:
        output = forward(part.to(device))
        heat_now = F.conv2d(output, heat_weight, heat_bias).float().sigmoid().cpu()
        heat.append(F.pixel_shuffle(heat_now, 2)[:, :, :height, :width])
        features.append(output.float().cpu().numpy())

    def read(number, row, column):
        vectors = np.empty((len(number), last.in_channels), np.float32)
        for batch, part in enumerate(features):
            here = number // batch_size == batch
            vectors[here] = part[number[here] % batch_size, :, row[here] // 2, column[here] // 2]
        values = np.empty((len(number), len(weight)), np.float32)
        for which in range(4):  # of 2 x 2 pixels that share a vector of features, as nn.PixelShuffle unfolds them
            here = 2 * (row % 2) + column % 2 == which
            values[here] = vectors[here] @ weight[:, which].T + bias[:, which]
        values[:, :8] *= model.vector_px
        return values

    return SpineMaps(heat[0] if len(heat) == 1 else torch.cat(heat), read)


_WINDOWS = 1 << 15  # surroundings of pixels that are looked at together


def _highest(where, values, most):
    """Of the peaks (p, 4) of each map and kind the `most` highest, in the same order."""
    group = where[:, 0] * values.shape[1] + where[:, 1]
    if not len(where) or np.bincount(group).max() <= most:
        return where
    order = np.lexsort((-values[tuple(where.T)], group))
    rank = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return where[np.sort(order[rank < most])]


def _peaks(heat, radius_px, threshold, most):
    """Local maxima of maps (n, k, h, w), of each map the `most` highest: array (p, 4) of map, kind, row, column, and
    their (p, 3) value and sub-pixel (row, column) from the parabola through the logarithms, which is exact for a
    Gaussian."""
    values = heat.numpy()
    # Few pixels pass the threshold, and few of them are as high as their four neighbours: looking around each of these
    # is much quicker than a maximum filter over the maps. Where many are (noise), they go through in parts.
    edge = ((0, 0), (0, 0), (radius_px, radius_px), (radius_px, radius_px))
    padded = np.pad(values, edge)
    flat, row_px = padded.ravel(), padded.shape[3]
    where = np.flatnonzero(np.pad(values > threshold, edge))
    for step in (1, -1, row_px, -row_px):
        where = where[flat[where] >= flat[where + step]]
    around = np.arange(-radius_px, radius_px + 1)
    window = (row_px * around[:, None] + around).ravel()
    parts = np.array_split(where, range(_WINDOWS, len(where), _WINDOWS))
    where = np.concatenate([part[flat[part] >= flat[part[:, None] + window].max(1)] for part in parts])
    where = np.column_stack(np.unravel_index(where, padded.shape)) - [0, 0, radius_px, radius_px]
    where = _highest(where, values, most)
    position = where[:, 2:].astype(np.float64)
    for axis in (2, 3):
        last = heat.shape[axis] - 1
        before, after = where.copy(), where.copy()
        before[:, axis] = np.maximum(where[:, axis] - 1, 0)
        after[:, axis] = np.minimum(where[:, axis] + 1, last)
        low, middle, high = (np.log(np.maximum(values[tuple(w.T)], 1e-6)) for w in (before, where, after))
        curve = low - 2 * middle + high
        shift = np.where(curve < -1e-6, 0.5 * (low - high) / np.minimum(curve, -1e-6), 0.0)
        position[:, axis - 2] += np.clip(shift, -0.5, 0.5)
    return where, np.column_stack([values[tuple(where.T)], position])


def decode_slices(
    maps: SpineMaps | torch.Tensor,
    resolution_mm: float,
    center_threshold: float = 0.3,
    corner_threshold: float = 0.1,
    reach_mm: float = 12.0,
) -> list[list[dict[str, Any]]]:
    """Vertebrae in each slice, from what the network shows: of spinenet_maps, or (n, 13 + classes, h, w) maps.

    Each peak of the centroid map takes of every corner kind the one whose position, displaced by its vector, comes
    nearest, if within reach_mm. One missing corner is completed to a parallelogram, with two missing it is dropped.
    (The paper takes one peak per thresholded component; local maxima also part bodies whose blobs touch.) Of more than
    MAX_BODIES in a slice the highest peaks count.
    Returns a list of n lists of dicts: corners_px (4, 2) as (row, column), score 0..1, logits (classes,).
    """
    if isinstance(maps, torch.Tensor):
        maps = SpineMaps.of_output(maps)
    slices: list[list[dict[str, Any]]] = [[] for _ in range(len(maps.heat))]
    radius_px, corner_radius_px = (max(int(round(radius_mm / resolution_mm)), 1) for radius_mm in (8, 5))
    centers, center_values = _peaks(maps.heat[:, 4:], radius_px, center_threshold, MAX_BODIES)
    corners, corner_values = _peaks(maps.heat[:, :4], corner_radius_px, corner_threshold, 2 * MAX_BODIES)
    number, kind, row, column = corners.T
    vectors = maps.read(number, row, column)[:, :8].reshape(-1, 4, 2)
    displaced = corners[:, 2:] + vectors[np.arange(len(corners)), kind]
    center_logits = maps.read(centers[:, 0], centers[:, 2], centers[:, 3])[:, 8:]
    for (index, *_), (score, *center_px), logits in zip(centers, center_values, center_logits):
        corners_px, heights = np.full((4, 2), np.nan), np.zeros(4)
        for which in range(4):
            candidates = np.flatnonzero((number == index) & (kind == which))
            if not len(candidates):
                continue
            distance = np.linalg.norm(displaced[candidates] - center_px, axis=1) * resolution_mm
            if distance.min() < reach_mm:
                best = candidates[distance.argmin()]
                corners_px[which], heights[which] = corner_values[best, 1:], corner_values[best, 0]
        missing = np.flatnonzero(np.isnan(corners_px[:, 0]))
        if len(missing) > 1:
            continue
        if len(missing):
            a = missing[0]
            corners_px[a] = corners_px[(a + 1) % 4] + corners_px[(a - 1) % 4] - corners_px[(a + 2) % 4]
        slices[index].append(
            {
                "corners_px": corners_px,
                "score": float(score * heights.mean()) ** 0.5,
                "logits": logits,
            }
        )
    return slices


_GAP = 1  # slices in which a vertebra may be missed


def link_slices(
    slices: Sequence[list[dict[str, Any]]], min_iou: float = 0.2, gap: int = _GAP
) -> list[list[tuple[int, dict[str, Any]]]]:
    """Join the detections of neighbouring slices that overlap into vertebrae.

    slices: from decode_slices; gap: slices in which a vertebra may be missed. A detection joins the vertebra whose
    last polygon it overlaps most. Returns a list of lists of (slice index, detection).
    """
    tracks: list[list[tuple[int, dict[str, Any]]]] = []
    recent: list[int] = []  # tracks that a slice may continue
    for index, detections in enumerate(slices):
        check_limit()
        recent = [number for number in recent if index - tracks[number][-1][0] <= gap + 1]
        last = _polygons([tracks[number][-1][1] for number in recent])
        now = _polygons(detections)
        apart = (last.max(1)[:, None] <= now.min(1)).any(2) | (now.max(1) <= last.min(1)[:, None]).any(2)
        pairs = []
        for k, which in np.argwhere(~apart).tolist():
            iou = polygon_iou(last[k], now[which])
            if iou > min_iou:
                pairs.append((iou, recent[k], which))
        used_tracks, used = set(), set()
        for _, number, which in sorted(pairs, reverse=True):
            if number not in used_tracks and which not in used:
                tracks[number].append((index, detections[which]))
                used_tracks.add(number)
                used.add(which)
        new = [[(index, detection)] for which, detection in enumerate(detections) if which not in used]
        recent += range(len(tracks), len(tracks) + len(new))
        tracks += new
    return tracks


def _polygons(detections):
    """(n, 4, 2) corners of a list of detections."""
    return np.array([detection["corners_px"] for detection in detections], np.float64).reshape(-1, 4, 2)


# What detection takes on, whatever a volume states. Real series are far below: 25 slices of 300 mm, up to 250 of a
# 3D sequence; a composed image of a whole spine is some 900 mm long.
MAX_FIELD_MM = 1000.0  # of a slice, along its rows or columns
MAX_SEARCHED_SLICES = 256
MAX_SEARCHED_PX = 1 << 23  # of a study, resampled: about 25 s of one core
MAX_BODIES = 64  # a slice or a chain; a whole spine with its sacrum has 29
_BATCH_PX = 1 << 19  # that go through the network together: 8 slices of 500 mm


def searched_px(volume: Volume, resolution_mm: float) -> float:
    """Pixels of one slice of a sagittal volume once it is resampled.

    Raises ValueError where the slice would be larger than MAX_FIELD_MM: no spine is, and its pixel size must be wrong.
    """
    array, affine = upright(volume)
    sides_mm = np.array(array.shape[1:]) * np.linalg.norm(affine[:3, 1:3], axis=0)
    if not (sides_mm <= MAX_FIELD_MM).all():
        high, wide = sides_mm
        raise ValueError(f"slices of {high:.0f} x {wide:.0f} mm: larger than any image of a spine, {MAX_FIELD_MM:g} mm")
    return math.prod(_resampled_px(array.shape, affine, resolution_mm))


def every_nth_slice(volume: Volume, step: int) -> Volume:
    """The volume with every step-th of its slices, the first included."""
    if step == 1:
        return volume
    affine = volume.affine.copy()
    affine[:3, 0] *= step
    numbers = volume.instance_numbers[::step]
    return replace(volume, array=volume.array[::step], affine=affine, instance_numbers=numbers)


def _all_slices(model, images, batch_size):
    """What every slice shows: list of decode_slices."""
    slices = []
    for start in range(0, len(images), batch_size):
        check_limit()
        maps = spinenet_maps(model, images[start : start + batch_size], batch_size)
        slices += decode_slices(maps, model.resolution_mm)
    return slices


def _slices_from_the_middle(model, images, batch_size):
    """What slices show, as _all_slices, without those beside the spine.

    From the middle outwards, the next of either side together. Once bodies have been seen anywhere, a side ends with
    the second slice in a row that shows nothing, for link_slices would not bridge the two; or with the first, where the
    one before it showed half as many bodies as the fullest or fewer: there the spine ends, and beyond are ribs.
    """
    slices: list[list[dict[str, Any]]] = [[] for _ in images]
    middle = len(images) // 2
    ahead = [list(range(middle, len(images))), list(range(middle - 1, -1, -1))]
    empty, last = [0, 0], [0, 0]  # slices in a row that showed nothing; bodies in the one before them
    while any(ahead):
        sides = [side for side in (0, 1) if ahead[side]]
        next_ones = [ahead[side].pop(0) for side in sides]
        shown = _all_slices(model, images[next_ones], batch_size)
        for side, index, bodies in zip(sides, next_ones, shown, strict=True):
            slices[index] = bodies
            empty[side], last[side] = (0, len(bodies)) if bodies else (empty[side] + 1, last[side])
        most = max(map(len, slices))
        for side in (0, 1):
            few = 0 < last[side] <= most / 2
            if most and empty[side] > (0 if few else _GAP):
                ahead[side] = []
    return slices


def detect_vertebrae(model: SpineNet, volume: Volume, batch_size: int = 8) -> list[Vertebra]:
    """Find the vertebral bodies of one sagittal volume.

    model: SpineNet in eval mode; volume: normalised. Returns Vertebrae without names, from head to foot; source is
    t2 or t1. A body seen in one slice only is dropped, unless the volume has no more than two; one that the image's
    border cuts has half the confidence.
    Time and memory are bounded: of more than MAX_SEARCHED_SLICES slices, or MAX_SEARCHED_PX resampled pixels, every
    second one is searched, or every third, ...; of more than MAX_BODIES bodies the surest are returned.
    Raises ValueError for a volume that is not sagittal or has slices larger than MAX_FIELD_MM, and TookTooLong (see
    check_limit).
    """
    slice_px, count = searched_px(volume, model.resolution_mm), len(volume.array)
    volume = every_nth_slice(volume, math.ceil(max(count / MAX_SEARCHED_SLICES, count * slice_px / MAX_SEARCHED_PX, 1)))
    images, affine = sagittal_images(volume, model.resolution_mm)
    batch_size = int(max(1, min(batch_size, _BATCH_PX // slice_px)))
    # A GPU is quicker with many slices at a time than with few.
    on_gpu = isinstance(model, nn.Module) and next(model.parameters()).device.type != "cpu"
    slices = _all_slices(model, images, batch_size) if on_gpu else _slices_from_the_middle(model, images, batch_size)
    source = Source.T1 if volume.description == "Sagittal T1" else Source.T2
    return _bodies(slices, affine, images.shape[2:], volume.spacing_mm[0], source)


def _bodies(slices, affine, shape, step_mm, source):
    """Vertebrae, head to foot, of what the slices of one volume show: see detect_vertebrae.

    slices: list of decode_slices; affine, shape: of the images; step_mm: from slice to slice."""
    vertebrae = []
    for track in link_slices(slices):
        # Beside a body the chain of overlaps may run on along a rib, a pedicle or the sacrum's wing, less surely.
        highest = max(detection["score"] for _, detection in track)
        track = [item for item in track if item[1]["score"] > 0.6 * highest]
        if len(track) < min(2, (len(slices) + 1) // 2):
            continue
        index = np.array([i for i, _ in track], float)
        score = np.array([d["score"] for _, d in track])
        corners_px = np.array([d["corners_px"] for _, d in track])
        corners_mm = corners_px @ affine[:3, 1:3].T
        depth_mm = np.linalg.norm(corners_mm[:, [1, 2]] - corners_mm[:, [0, 3]], axis=2).mean(1)
        middle, across_sd_mm = middle_across(index, depth_mm, score, len(slices), step_mm)
        # Slices through the middle count more: towards its sides a body is shallower. Where the stack ends within it,
        # it is wider than what is seen of it.
        reach = max(middle - index[0] + 0.5, index[-1] - middle + 0.5, 1.0)
        away = (index - middle) / reach
        weight = score * (1 - 0.8 * away**2)
        rows_columns = np.average(corners_px, axis=0, weights=weight)
        ijk = np.column_stack([np.full(4, middle), rows_columns])
        logits = np.array([d["logits"] for _, d in track], np.float64)
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        log_p = np.average(log_p, axis=0, weights=weight)
        best = np.sort(score)[::-1][:5]
        # A body that the image's border cuts has corners that nobody saw: its shape and its centre count less.
        last = np.array(shape) - 1
        cut = ((rows_columns < 1) | (rows_columns > last - 1)).any()
        within = np.clip(rows_columns, 0, last) @ affine[:3, 1:3].T
        vertebrae.append(
            Vertebra(
                ijk @ affine[:3, :3].T + affine[:3, 3],
                float(max((index[-1] - index[0] + 1) * step_mm, min(2 * reach * step_mm, 1.5 * np.median(depth_mm)))),
                float(best.mean() * min(1.0, len(track) * step_mm / 25.0) * (0.5 if cut else 1.0)),
                source=source,
                appearance=log_p - np.log(np.exp(log_p).sum()),
                across_sd_mm=across_sd_mm,
                in_image_mm=spanned_mm(within) if cut else np.inf,
            )
        )
    return sorted(surest(vertebrae), key=lambda v: -v.center_lps_mm[2])


def surest(vertebrae: list[Vertebra]) -> list[Vertebra]:
    """At most MAX_BODIES of the Vertebrae, those of the highest confidence, in the same order."""
    if len(vertebrae) <= MAX_BODIES:
        return list(vertebrae)
    ranked = sorted(range(len(vertebrae)), key=lambda k: -vertebrae[k].confidence)
    return [vertebrae[k] for k in sorted(ranked[:MAX_BODIES])]
