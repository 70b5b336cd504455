"""Volumes resampled onto any grid in patient space: level crops and whole studies.

May use: crop, geometry, volume, limits, names.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike

from ..limits import check_limit
from ..names import DESCRIPTIONS
from .crop import FULL_SIZE, Crop
from .geometry import LevelBox, corners_between
from .volume import Study, Volume


def crop_affine(
    center_lps: ArrayLike, axes: ArrayLike, extent_mm: Sequence[float] | np.ndarray, shape: Sequence[int] | np.ndarray
) -> np.ndarray:
    """(4, 4) affine from crop indices to LPS millimetres.

    axes: rows head, left, back, as a LevelBox has them; extent_mm, shape: (3,) of the crop, along its own axes: head to
    foot, front to back, right to left (of the patient). Voxel centres fill the box: the first lies half a voxel inside
    its face.
    """
    head, left, back = np.asarray(axes, np.float64)
    along = (-head, back, left)
    steps = np.stack([axis * size / n for axis, size, n in zip(along, extent_mm, shape, strict=True)], 1)
    affine = np.eye(4)
    affine[:3, :3] = steps
    affine[:3, 3] = np.asarray(center_lps) - steps @ ((np.asarray(shape) - 1) / 2)
    return affine


class _OnGrid:
    """One volume made ready to be sampled on one grid.

    volume: a Volume; affine: (4, 4) from indices of the grid to LPS mm; shape: (d, h, w) of the grid; device: where to
    sample. window: three slices of the grid outside of which the volume has nothing, None if it has nothing at all.

    The slices lie below each other in one tall image, so that a trilinear sample is two bilinear ones, of a slice and
    of the next, and a line between them: on a CPU torch samples images several times as fast as volumes. The next
    slice is the same memory seen one slice later as a second channel.
    """

    def __init__(self, volume: Volume, affine: np.ndarray, shape: Sequence[int], device: str) -> None:
        to_voxel = np.linalg.inv(volume.affine) @ affine
        size = np.array(volume.array.shape)
        to_grid = np.linalg.inv(to_voxel)
        reach = corners_between((-0.5, -0.5, -0.5), size - 0.5) @ to_grid[:3, :3].T + to_grid[:3, 3]
        first = np.clip(np.ceil(reach.min(0) - 1e-6), 0, shape).astype(int)
        last = np.clip(np.floor(reach.max(0) + 1e-6) + 1, 0, shape).astype(int)
        self.window = None
        if (first >= last).any():
            return
        index = [np.arange(a, b, dtype=np.float64) for a, b in zip(first, last, strict=True)]
        # A voxel coordinate is a sum of three ramps: kept as one along the grid's first axis and one over the others.
        ramps = [(row[0] * index[0], row[1] * index[1][:, None] + row[2] * index[2] + row[3]) for row in to_voxel[:3]]
        self.start, self.stop = _covered_runs(to_voxel, size, index)
        if not (self.start < self.stop).any():
            return
        self.window = tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
        # Only the part of the volume that the window touches is converted and sent to the device.
        touched = corners_between(first, last - 1) @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        low = np.clip(np.floor(touched.min(0)) - 3, 0, size - 1).astype(int)
        high = np.clip(np.ceil(touched.max(0)) + 4, low + 1, size).astype(int)
        part = volume.array[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        step_mm = np.linalg.norm(affine[:3, :3], axis=0).min()
        pool = [int(n) for n in np.maximum(1, np.round(step_mm / volume.spacing_mm[1:]))]
        part = _on_device(part, device) if max(pool) == 1 else _pooled(part, pool, device)
        count, rows, columns = part.shape
        # A row more on either side keeps half a pixel beyond the edge from reaching into the neighbouring slice, and
        # the last slice comes twice.
        tall = torch.empty((count + 1, rows + 2, columns), dtype=torch.float32, device=device)
        tall[:count, 1:-1] = part
        tall[:count, 0], tall[:count, -1] = tall[:count, 1], tall[:count, -2]
        tall[count] = tall[count - 1]
        height = count * (rows + 2)
        self.image = tall.as_strided((1, 2, height, columns), (0, (rows + 2) * columns, columns, 1))
        self.count = count
        # grid_sample counts from -1 at the first pixel's centre to 1 at the last's. The centre of the first `factor`
        # pixels averaged lies (factor - 1) / 2 pixels inside.
        self.next_slice = (rows + 2) * 2.0 / (height - 1)
        self.ramps = []
        for axis, (factor, inside, scale, at) in enumerate(
            (
                (1, 0.0, 1.0, 0.0),
                (pool[0], 1.0, 2.0 / (height - 1), -1.0),
                (pool[1], 0.0, 2.0 / max(columns - 1, 1), -1.0),
            )
        ):
            along, across = ramps[axis]
            across = ((across - low[axis] - (factor - 1) / 2) / factor + inside) * scale + at
            self.ramps.append(
                tuple(torch.as_tensor(x, dtype=torch.float32, device=device) for x in (along / factor * scale, across))
            )
        self.k = torch.arange(len(index[2]), dtype=torch.int16, device=device)

    def block(
        self, i: slice, j: slice, scratch: torch.Tensor
    ) -> tuple[slice, torch.Tensor, torch.Tensor | None] | None:
        """Samples of a block of the window: slices i, j of its first two axes (window's own indices) -> (k, values,
        inside): slice of the third axis outside of which the block has nothing; values (i, j, k) float32, 0 where not
        inside, overwritten by the next call with this scratch; inside bool, None where all of it is. None instead of
        the three if the block has nothing.
        """
        start, stop = self.start[i, j], self.stop[i, j]
        k = slice(int(start.min()), int(stop.max()))
        if k.start >= k.stop:
            return None
        place, row, column = ((along[i, None, None], across[None, j, k]) for along, across in self.ramps)
        shape = (*start.shape, k.stop - k.start)
        share, below, x, y = space = scratch[:, : math.prod(shape)].view(4, *shape)
        torch.add(*place, out=share).clamp_(0, self.count - 1)
        torch.floor(share, out=below)
        share -= below
        torch.add(*column, out=x)
        torch.add(*row, out=y).add_(below, alpha=self.next_slice)
        # One image of the batch for each index of the first axis: torch's threads share a batch out.
        pair = F.grid_sample(
            self.image.expand(shape[0], -1, -1, -1),
            space[2:].permute(1, 2, 3, 0),
            mode="bilinear",
            padding_mode="border",
            align_corners=True,
        )
        values = torch.lerp(pair[:, 0], pair[:, 1], share, out=below)
        # All rows cover k from `low` to `high`; only what lies on either side of that needs a mask.
        low, high = min(int(start.max()), k.stop), max(int(stop.min()), k.start)
        if low == k.start and high == k.stop:
            return k, values, None
        inside = torch.ones(shape, dtype=torch.bool, device=values.device)
        start, stop = (torch.from_numpy(x).to(values.device)[..., None] for x in (start, stop))
        for a, b in ((k.start, low), (max(low, high), k.stop)):
            edge = slice(a - k.start, b - k.start)
            inside[..., edge] = (self.k[a:b] >= start) & (self.k[a:b] < stop)
            values[..., edge] *= inside[..., edge]
        return k, values, inside


_CONVERTED_PX = 1 << 24  # that are averaged at a time: their float32 is several times what is left


def _on_device(array, device):
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _pooled(array, pool, device):
    """(n, h, w) float32: pixels of the slices averaged by `pool` (rows, columns)."""
    together = max(1, _CONVERTED_PX // max(1, array[0].size))
    parts = [
        F.avg_pool2d(
            _on_device(array[k : k + together], device).float()[:, None], pool, ceil_mode=True, count_include_pad=False
        )[:, 0]
        for k in range(0, len(array), together)
    ]
    return torch.cat(parts)


def _covered_runs(to_voxel, size, index):
    """Where a grid lies inside a volume: (start, stop), each (d, h) int16: the run of the third axis, start <= k <
    stop, that is covered at each index of the first two; start = w, stop = 0 where none is.

    to_voxel: (4, 4) from grid to voxel; size: (3,) of the volume, covered from -0.5 to size - 0.5; index: the grid's
    indices along its axes, (d,), (h,), (w,). Runs suffice because a volume is convex.
    """
    count = len(index[2])
    low, high = np.full((2, len(index[0]), len(index[1])), -np.inf)
    high = -high
    for axis in range(3):
        a, b, c, d = to_voxel[axis]
        across = a * index[0][:, None] + b * index[1] + c * index[2][0] + d
        # A voxel face is met from both sides: what lies on it up to rounding is inside.
        below, above = -0.5 - 1e-6 - across, size[axis] - 0.5 + 1e-6 - across
        if abs(c) * count < 1e-7:
            outside = (below > 0) | (above < 0)
            high[outside] = -np.inf
        else:
            below, above = (below / c, above / c) if c > 0 else (above / c, below / c)
            np.maximum(low, below, out=low)
            np.minimum(high, above, out=high)
    start = np.clip(np.ceil(low), 0, count).astype(np.int16)
    stop = np.clip(np.floor(high) + 1, 0, count).astype(np.int16)
    empty = start >= stop
    start[empty], stop[empty] = count, 0
    return start, stop


# Samples in one go: on a CPU a block's temporaries stay in the cache.
_BLOCK = {"cpu": 1 << 17, "gpu": 1 << 24}


def _block_size(device):
    return _BLOCK["cpu" if torch.device(device).type == "cpu" else "gpu"]


def _blocks(shape, device):
    """Cut a grid (d, h, w) into pairs of slices (i, j) of at most _BLOCK samples, or one row."""
    rows = max(1, _block_size(device) // max(1, shape[2]))
    if rows >= shape[1]:
        step = rows // max(1, shape[1])
        return [(slice(i, min(i + step, shape[0])), slice(0, shape[1])) for i in range(0, shape[0], step)]
    step = -(-shape[1] // -(-shape[1] // rows))
    return [
        (slice(i, i + 1), slice(j, min(j + step, shape[1]))) for i in range(shape[0]) for j in range(0, shape[1], step)
    ]


def _zeros(shape, kind, device):
    """Zeros that a CPU's memory gets only where something is written: numpy asks the system for empty pages."""
    return torch.from_numpy(np.zeros(shape, kind)).to(device)


def _scratch(shape, device):
    """(4, samples) float32 for the blocks of a grid of this shape."""
    return torch.empty((4, min(max(_block_size(device), shape[2]), math.prod(shape))), device=device)


def resample(
    volume: Volume, affine: np.ndarray, shape: Sequence[int], device: str = "cpu"
) -> tuple[tuple[slice, ...], torch.Tensor, torch.Tensor] | tuple[None, None, None]:
    """Trilinear samples of a volume on another grid.

    affine: (4, 4) from indices of the new grid to LPS mm; shape: (d, h, w). Returns (window, values, covered):
    window: three slices of the grid outside of which the volume has nothing, None if it has nothing at all; values
    float32 and covered bool: tensors on `device` of the window's shape. Covered is where the point lies within half a
    step of the outermost voxel centres, values are 0 elsewhere.

    Linear along the slice normal: between two slices the profile falls off linearly, as their overlap does. A grid
    coarser than the pixels samples pixels averaged to about its own step, else it would alias.
    """
    source = _OnGrid(volume, affine, shape, device)
    if source.window is None:
        return None, None, None
    size = tuple(w.stop - w.start for w in source.window)
    values = torch.zeros(size, device=device)
    covered = torch.zeros(size, dtype=torch.bool, device=device)

    scratch = _scratch(size, device)
    for i, j in _blocks(size, device):
        found = source.block(i, j, scratch)
        if found is not None:
            _put(values[i, j], covered[i, j], *found)
    return source.window, values, covered


def _put(values, covered, k, samples, inside):
    """Write what _OnGrid.block returned into views of the result."""
    values[..., k] = samples
    covered[..., k] = True if inside is None else inside


def sample_box(
    study: Study,
    center_lps: ArrayLike,
    axes: ArrayLike,
    extent_mm: Sequence[float] | np.ndarray,
    shape: Sequence[int],
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The study's three kinds of series on one oriented grid.

    study: normalised; center_lps, axes, extent_mm: as crop_affine takes them; shape: (d, h, w).
    Returns (crop (3, d, h, w) float16, covered (3, d, h, w) bool): channels in the order of DESCRIPTIONS, axes head
    to foot, front to back, right to left. Where several volumes of a kind overlap (blocks, repeated series) their
    mean; 0 where none lies. Computed on `device`, returned as numpy arrays. Raises TookTooLong, see check_limit.
    """
    shape = tuple(int(n) for n in shape)
    affine = crop_affine(center_lps, axes, extent_mm, shape)
    crop, covered = (_zeros((len(DESCRIPTIONS), *shape), kind, device) for kind in (np.float16, bool))
    scratch = _scratch(shape, device)
    for channel, description in enumerate(DESCRIPTIONS):
        sources = [_OnGrid(volume, affine, shape, device) for volume in study.of(description)]
        sources = [source for source in sources if source.window is not None]
        if len(sources) == 1:
            window = sources[0].window
            values, inside = crop[channel][window], covered[channel][window]
            for i, j in _blocks(values.shape, device):
                found = sources[0].block(i, j, scratch)
                if found is not None:
                    _put(values[i, j], inside[i, j], *found)
        elif sources:
            for i, j in _blocks(shape, device):
                check_limit()
                crop[channel, i, j], covered[channel, i, j] = _mean(sources, i, j, shape, scratch)
    return crop.cpu().numpy(), covered.cpu().numpy()


def _mean(sources, i, j, shape, scratch):
    """Block (i, j) of the grid: (mean float32 of all volumes that cover a sample, 0 where none does; covered bool)."""
    size = (i.stop - i.start, j.stop - j.start, shape[2])
    total, weight = torch.zeros((2, *size), device=scratch.device)
    for source in sources:
        window = source.window
        start = [max(block.start, w.start) for block, w in zip((i, j), window)]
        stop = [min(block.stop, w.stop) for block, w in zip((i, j), window)]
        if start[0] >= stop[0] or start[1] >= stop[1]:
            continue
        own = [slice(a - w.start, b - w.start) for a, b, w in zip(start, stop, window)]
        found = source.block(*own, scratch)
        if found is None:
            continue
        k, samples, inside = found
        here = (
            slice(start[0] - i.start, stop[0] - i.start),
            slice(start[1] - j.start, stop[1] - j.start),
            slice(k.start + window[2].start, k.stop + window[2].start),
        )
        total[here] += samples
        weight[here] += 1 if inside is None else inside
    return total / weight.clamp(min=1), weight > 0


def crop_level(
    study: Study, box: LevelBox, crop: Crop = FULL_SIZE["level"], device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """What the classifiers see of one level.

    Parameters
    ----------
    study : Study
        Normalised.
    box : LevelBox
        Of the level; the crop lies along its axes.
    crop : Crop
        Shape, size and place, scope `level`.
    device : str
        To compute on, as PyTorch names it.

    Returns
    -------
    crop : (3, d, h, w) float16 array
        Channels in the order of DESCRIPTIONS; axes head to foot, front to back, right to left. See sample_box.
    covered : (3, d, h, w) bool array
        Where a volume lies; elsewhere the crop is 0.

    Raises
    ------
    TookTooLong
        See check_limit.
    """
    return sample_box(study, crop_center(box, crop), box.axes, crop.extent_mm, crop.shape, device)


def crop_center(box: LevelBox, crop: Crop) -> np.ndarray:
    """(3,) centre of a level's crop, in LPS millimetres."""
    foot_mm, back_mm, left_mm = crop.shift_mm
    return box.to_lps((-foot_mm, left_mm, back_mm))


def study_box(study: Study) -> tuple[np.ndarray, np.ndarray]:
    """(center_lps (3,), axes (3, 3)) of the whole-study grid: along the patient axes, around the sagittal series.

    Needs no detection, so that the whole-study model can stand in where there is none. Without a sagittal series
    the axial ones serve; without any, the origin.
    """
    axes = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # head, left, back
    for description in ("Sagittal T2/STIR", "Sagittal T1", "Axial T2"):
        volumes = study.of(description)
        if volumes:
            corners = np.concatenate(
                [
                    volume.voxel_to_lps(corners_between((0, 0, 0), np.array(volume.array.shape) - 1))
                    for volume in volumes
                ]
            )
            return (corners.min(0) + corners.max(0)) / 2, axes
    return np.zeros(3), axes


def crop_study(study: Study, crop: Crop = FULL_SIZE["study"], device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """The whole study on one grid, around the sagittal series.

    Parameters
    ----------
    study : Study
        Normalised.
    crop : Crop
        Shape and size, scope `study`.
    device : str
        To compute on, as PyTorch names it.

    Returns
    -------
    crop, covered
        (3, d, h, w) float16 and bool arrays, as crop_level returns them, along the patient axes (see study_box).

    Raises
    ------
    TookTooLong
        See check_limit.
    """
    center, axes = study_box(study)
    return sample_box(study, center, axes, crop.extent_mm, crop.shape, device)
