"""Geometry in patient space: level boxes, crops, whole-study grids, the point cloud."""

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from .names import DESCRIPTIONS, LEVEL_TABLE_COLUMNS, LEVELS


def _open3d():
    try:
        import open3d
    except ImportError as error:
        raise ImportError(f"Open3D cannot be loaded ({error}); on Debian: apt-get install libusb-1.0-0") from None
    return open3d


@dataclass
class LevelBox:
    """The oriented box of one disc level.

    center_lps_mm: (3,) the disc's centre; axes: (3, 3), rows are unit vectors in LPS, a right-handed frame: towards
    the head along the disc's normal, to the patient's left, to the back; extent_mm: (3,) full edge lengths along them.
    """

    level: str
    center_lps_mm: np.ndarray
    axes: np.ndarray
    extent_mm: np.ndarray
    confidence: float = 1.0
    source: str = ""

    def to_lps(self, head_left_back_mm):
        """(..., 3) offsets from the centre along head, left, back -> (..., 3) LPS millimetres."""
        return np.asarray(head_left_back_mm, np.float64) @ self.axes + self.center_lps_mm

    def from_lps(self, xyz_mm):
        """(..., 3) LPS millimetres -> (..., 3) offsets from the centre along head, left, back."""
        return (np.asarray(xyz_mm, np.float64) - self.center_lps_mm) @ self.axes.T

    def corners_lps(self):
        """(8, 3) corners in LPS millimetres."""
        return self.to_lps(_unit_corners((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5)) * self.extent_mm)

    def as_open3d(self):
        """The box as open3d.geometry.OrientedBoundingBox; its axes are the columns of R."""
        o3d = _open3d()
        return o3d.geometry.OrientedBoundingBox(
            np.asarray(self.center_lps_mm), np.asarray(self.axes).T, np.asarray(self.extent_mm)
        )


def boxes_to_table(study_id, boxes):
    """LevelBoxes of one study -> rows of levels.csv."""
    rows = []
    for box in boxes:
        values = [
            study_id,
            box.level,
            *box.center_lps_mm,
            *np.ravel(box.axes),
            *box.extent_mm,
            box.confidence,
            box.source,
        ]
        rows.append(dict(zip(LEVEL_TABLE_COLUMNS, values)))
    return pd.DataFrame(rows, columns=LEVEL_TABLE_COLUMNS)


def boxes_from_table(table, study_id):
    """The five LevelBoxes of a study, head to foot. Raises KeyError when a level is absent."""
    rows = table[table["study_id"] == study_id].set_index("level")
    boxes = []
    for level in LEVELS:
        if level not in rows.index:
            raise KeyError(f"levels table: no {level} for study {study_id}; run 02_train_spinenet on this data")
        row = rows.loc[level]
        boxes.append(
            LevelBox(
                level,
                row[["x_mm", "y_mm", "z_mm"]].to_numpy(np.float64),
                row[[f"r{i}{j}" for i in range(3) for j in range(3)]].to_numpy(np.float64).reshape(3, 3),
                row[["extent_head_mm", "extent_left_mm", "extent_back_mm"]].to_numpy(np.float64),
                float(row["confidence"]),
                str(row["source"]),
            )
        )
    return boxes


def crop_affine(center_lps, axes, extent_mm, shape):
    """(4, 4) affine from crop indices to LPS millimetres.

    axes: rows head, left, back; extent_mm: (3,) along head, left, back; shape: (3,) of the crop, whose axes run
    head to foot, front to back, right to left (of the patient). Voxel centres fill the box: the first lies half a
    voxel inside its face.
    """
    head, left, back = np.asarray(axes, np.float64)
    extent_head, extent_left, extent_back = extent_mm
    steps = np.stack([-head * extent_head / shape[0], back * extent_back / shape[1], left * extent_left / shape[2]], 1)
    affine = np.eye(4)
    affine[:3, :3] = steps
    affine[:3, 3] = np.asarray(center_lps) - steps @ ((np.asarray(shape) - 1) / 2)
    return affine


def _unit_corners(low, high):
    """(8, 3) corners of the box from low (3,) to high (3,)."""
    return np.array(list(itertools.product(*zip(low, high, strict=True))), np.float64)


def resample(volume, affine, shape, device="cpu"):
    """Trilinear samples of a volume on another grid.

    affine: (4, 4) from indices of the new grid to LPS mm; shape: (d, h, w). Returns (window, values, covered):
    window: three slices of the grid outside of which the volume has nothing, None if it has nothing at all; values
    float32 and covered bool: tensors on `device` of the window's shape. Covered is where the point lies within half a
    step of the outermost voxel centres, values are 0 elsewhere.

    Linear along the slice normal: between two slices the profile falls off linearly, as their overlap does. A grid
    coarser than the pixels samples pixels averaged to about its own step, else it would alias.
    """
    to_voxel = np.linalg.inv(volume.affine) @ affine
    size = np.array(volume.array.shape)
    to_grid = np.linalg.inv(to_voxel)
    reach = _unit_corners((-0.5, -0.5, -0.5), size - 0.5) @ to_grid[:3, :3].T + to_grid[:3, 3]
    first = np.clip(np.ceil(reach.min(0) - 1e-6), 0, shape).astype(int)
    last = np.clip(np.floor(reach.max(0) + 1e-6) + 1, 0, shape).astype(int)
    if (first >= last).any():
        return None, None, None
    window = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    # Only the part of the volume that the window touches is converted and sent to the device.
    touched = _unit_corners(first, last - 1) @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    low = np.clip(np.floor(touched.min(0)) - 3, 0, size - 1).astype(int)
    high = np.clip(np.ceil(touched.max(0)) + 4, low + 1, size).astype(int)
    part = volume.array[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    part = torch.from_numpy(np.ascontiguousarray(part)).to(device).float()
    step_mm = np.linalg.norm(affine[:3, :3], axis=0).min()
    pool = [int(n) for n in np.maximum(1, np.round(step_mm / volume.spacing_mm[1:]))]
    if max(pool) > 1:
        part = F.avg_pool2d(part[:, None], pool, ceil_mode=True, count_include_pad=False)[:, 0]
    matrix = torch.as_tensor(to_voxel[:3], dtype=torch.float32, device=device)
    index = [torch.arange(a, b, dtype=torch.float32, device=device) for a, b in zip(first, last, strict=True)]
    covered, grid = True, []
    for axis, factor in enumerate((1, *pool)):
        # A voxel coordinate is a sum of three one-dimensional ramps: no (d, h, w, 3) grid of indices is needed.
        place = (
            matrix[axis, 0] * index[0][:, None, None]
            + matrix[axis, 1] * index[1][None, :, None]
            + (matrix[axis, 2] * index[2] + matrix[axis, 3])[None, None, :]
        )
        covered = covered & (place >= -0.5) & (place <= float(size[axis]) - 0.5)
        # The centre of the first `factor` pixels averaged lies (factor - 1) / 2 pixels inside.
        place = (place - float(low[axis]) - (factor - 1) / 2) / factor
        grid.append(place * (2.0 / max(part.shape[axis] - 1, 1)) - 1.0)
    grid = torch.stack(grid[::-1], -1)[None]  # grid_sample wants (x, y, z) = (column, row, slice)
    values = F.grid_sample(part[None, None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0, 0]
    return window, values * covered, covered


def sample_box(study, center_lps, axes, extent_mm, shape, device="cpu"):
    """The study's three kinds of series on one oriented grid.

    study: normalised; center_lps, axes, extent_mm: as crop_affine takes them; shape: (d, h, w).
    Returns (crop (3, d, h, w) float16, covered (3, d, h, w) bool): channels in the order of DESCRIPTIONS, axes head
    to foot, front to back, right to left. Where several volumes of a kind overlap (blocks, repeated series) their
    mean; 0 where none lies.
    """
    shape = tuple(int(n) for n in shape)
    affine = crop_affine(center_lps, axes, extent_mm, shape)
    total = torch.zeros((len(DESCRIPTIONS), *shape), device=device)
    weight = torch.zeros((len(DESCRIPTIONS), *shape), device=device)
    for channel, description in enumerate(DESCRIPTIONS):
        for volume in study.of(description):
            window, values, covered = resample(volume, affine, shape, device)
            if window is not None:
                total[channel][window] += values
                weight[channel][window] += covered
    crop = total / weight.clamp(min=1)
    return crop.half().cpu().numpy(), (weight > 0).cpu().numpy()


def crop_level(
    study, box, shape=(128, 128, 128), extent_mm=(56.0, 96.0, 96.0), shift_mm=(0.0, 0.0, 14.0), device="cpu"
):
    """What the classifiers see of one level.

    box: LevelBox; extent_mm, shift_mm: size of the crop and offset of its centre from the disc's, both along head,
    left, back: canal and foramina lie behind the disc. Returns (crop (3, d, h, w) float16, covered (3, d, h, w)
    bool), see sample_box.
    """
    return sample_box(study, box.to_lps(shift_mm), box.axes, extent_mm, shape, device)


def study_box(study):
    """(center_lps (3,), axes (3, 3)) of the whole-study grid: along the patient axes, around the sagittal series.

    Needs no detection, so that the whole-study model can stand in where there is none. Without a sagittal series
    the axial ones serve; without any, the origin.
    """
    axes = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # head, left, back
    for description in ("Sagittal T2/STIR", "Sagittal T1", "Axial T2"):
        volumes = study.of(description)
        if volumes:
            corners = np.concatenate(
                [volume.voxel_to_lps(_unit_corners((0, 0, 0), np.array(volume.array.shape) - 1)) for volume in volumes]
            )
            return (corners.min(0) + corners.max(0)) / 2, axes
    return np.zeros(3), axes


def crop_study(study, shape=(256, 256, 256), extent_mm=(256.0, 128.0, 160.0), device="cpu"):
    """The whole study on one grid: (crop (3, d, h, w) float16, covered). extent_mm: along head, left, back."""
    center, axes = study_box(study)
    return sample_box(study, center, axes, extent_mm, shape, device)


def nearest_slice(volume, xyz_mm):
    """(slice index, distance in mm along the normal, row, column) of an LPS point; the index is clipped."""
    ijk = volume.lps_to_voxel(xyz_mm)
    index = int(np.clip(np.round(ijk[0]), 0, volume.array.shape[0] - 1))
    normal = np.cross(volume.affine[:3, 1], volume.affine[:3, 2])
    normal = normal / np.linalg.norm(normal)
    distance = abs((ijk[0] - index) * volume.affine[:3, 0] @ normal)
    return index, float(distance), float(ijk[1]), float(ijk[2])


def coordinates_to_lps(coordinates, study):
    """Label points of one study -> (n, 3) LPS millimetres, NaN where series or slice is not there."""
    points = np.full((len(coordinates), 3), np.nan)
    for number, row in enumerate(coordinates.itertuples()):
        for volume in study.volumes:
            index = volume.slice_of(row.instance_number) if volume.series_id == row.series_id else None
            if index is not None:
                points[number] = volume.voxel_to_lps([index, row.y_px, row.x_px])
    return points


def point_cloud(study, every=2):
    """The study as an open3d.geometry.PointCloud in LPS millimetres, for the 3D view.

    A point per voxel (every `every`-th row and column) brighter than 5% of the scale; the colour's red, green and
    blue are T1, axial T2 and T2/STIR, so that one glance tells which series a point is from.
    """
    o3d = _open3d()
    points, colours = [], []
    for volume in study.volumes:
        channel = DESCRIPTIONS.index(volume.description)
        values = np.asarray(volume.array[:, ::every, ::every], np.float32)
        index = np.argwhere(values > 0.05)
        colour = np.zeros((len(index), 3))
        colour[:, channel] = np.clip(values[tuple(index.T)], 0, 1)
        points.append(volume.voxel_to_lps(index * [1, every, every]))
        colours.append(colour)
    cloud = o3d.geometry.PointCloud()
    if points:
        cloud.points = o3d.utility.Vector3dVector(np.concatenate(points))
        cloud.colors = o3d.utility.Vector3dVector(np.concatenate(colours))
    return cloud
