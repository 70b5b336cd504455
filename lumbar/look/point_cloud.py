"""The point cloud of a study, as solution A has it, and as Open3D and plotly show it.

May use: slices, data, names.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from ..data.crop import Crop
from ..data.geometry import LevelBox, _open3d
from ..data.resample import crop_center, study_box
from ..data.volume import Study
from ..names import DESCRIPTIONS, LEVELS
from .slices import LEVEL_COLOURS, level_name


def point_cloud(study, every=2):
    """The study as an open3d.geometry.PointCloud in LPS millimetres, to look at in Open3D.

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


def smeared_cloud(study, step_mm=1.0):
    """Every voxel of a study as coloured points of an open3d.geometry.PointCloud in LPS millimetres.

    A voxel becomes ceil(slice thickness / step_mm) points, spread over the slice thickness along the slice normal. The
    colour's red, green and blue are T1, axial T2 and T2/STIR, clipped to [0, 1]. Some 50 million points for a study.
    """
    o3d = _open3d()
    smears = [max(1, math.ceil(volume.thickness_mm / step_mm)) for volume in study.volumes]
    count = sum(volume.array.size * smear for volume, smear in zip(study.volumes, smears, strict=True))
    cloud = o3d.geometry.PointCloud()
    points = np.empty((count, 3))
    at = 0
    for volume, smear in zip(study.volumes, smears, strict=True):
        normal = np.cross(volume.affine[:3, 2], volume.affine[:3, 1])
        normal *= volume.thickness_mm / np.linalg.norm(normal)
        centers = volume.voxel_to_lps(np.stack(np.indices(volume.array.shape), -1)).reshape(-1, 3)
        for share in (np.arange(smear) + 0.5) / smear - 0.5:
            np.add(centers, normal * share, out=points[at : at + len(centers)])
            at += len(centers)
    cloud.points = o3d.utility.Vector3dVector(points)
    del points
    colours = np.zeros((count, 3))
    at = 0
    for volume, smear in zip(study.volumes, smears, strict=True):
        own = colours[at : at + volume.array.size * smear, DESCRIPTIONS.index(volume.description)]
        own[:] = np.tile(np.clip(volume.array.ravel(), 0, 1), smear)
        at += len(own)
    cloud.colors = o3d.utility.Vector3dVector(colours)
    return cloud


def voxelise_point_cloud(
    study: Study,
    box: LevelBox | None,
    crop: Crop,
    pooling: Literal["max", "average"] = "max",
    voxel_mm: float = 1.0,
    cloud: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The same crop the point-cloud way: what crop_level and crop_study are compared with, and why they are not this.

    Points (smeared_cloud) inside the oriented box fall into voxels of voxel_mm, each of which keeps their brightest
    (pooling "max") or mean ("average") colour; the grid is then resized to `shape`. Voxels that no point falls into are
    holes; the mean mixes black from the other series' points into each channel.
    box: None for the whole study; cloud: smeared_cloud(study), if it is at hand.
    Returns (crop (3, d, h, w) float16, occupied (3, d, h, w) bool: brighter than 0 in the nearest voxel). Needs Open3D
    (ImportError).
    """
    o3d = _open3d()
    mode = getattr(o3d.geometry.VoxelGrid.VoxelPoolingMode, {"max": "MAX", "average": "AVG"}[pooling])
    center, axes = study_box(study) if box is None else (crop_center(box, crop), np.asarray(box.axes))
    cloud = smeared_cloud(study, voxel_mm) if cloud is None else cloud
    part = cloud.crop(o3d.geometry.OrientedBoundingBox(center, axes.T, np.asarray(crop.extent_mm)[[0, 2, 1]]))
    # Into the crop's axes: head to foot, front to back, right to left, from the box's corner.
    size = np.asarray(crop.extent_mm)
    to_crop = np.eye(4)
    to_crop[:3, :3] = np.stack([-axes[0], axes[2], axes[1]])
    to_crop[:3, 3] = size / 2 - to_crop[:3, :3] @ center
    part.transform(to_crop)
    cells = np.maximum(1, np.ceil(size / voxel_mm - 1e-6)).astype(int)
    dense = np.zeros((3, *cells), np.float32)
    if len(part.points):
        grid = o3d.geometry.VoxelGrid.create_from_point_cloud_within_bounds(part, voxel_mm, np.zeros(3), size, mode)
        voxels = grid.get_voxels()
        index = np.array([voxel.grid_index for voxel in voxels])
        colour = np.array([voxel.color for voxel in voxels])
        inside = (index < cells).all(1)  # a point on the far face
        dense[(slice(None), *index[inside].T)] = colour[inside].T
    dense = torch.from_numpy(dense)[None]
    colours = F.interpolate(dense, crop.shape, mode="trilinear", align_corners=False)[0]
    occupied = F.interpolate((dense > 0).float(), crop.shape, mode="nearest-exact")[0]
    return colours.half().numpy(), (occupied > 0).numpy()


def study_figure(study, boxes=(), points=40_000, seed=0):
    """The study in space as a plotly Figure to turn: Open3D's cloud of its bright voxels, and the level boxes.

    With boxes, of the voxels only those in and near them are shown (half a box more to every side): the rest would
    hide them. points: how many at most, drawn at random; the colours' red, green and blue are T1, axial T2 and
    T2/STIR. Axes are LPS millimetres. Needs open3d, which brings plotly along (ImportError says how to get it).
    """
    cloud, traces = point_cloud(study), []
    import plotly.graph_objects as go

    for box in boxes:
        style = {"color": LEVEL_COLOURS[LEVELS.index(box.level)], "width": 5}
        edges = _lps(_edges(box.as_open3d_lines()))
        traces.append(go.Scatter3d(**edges, mode="lines", line=style, name=level_name(box.level)))
    near = [cloud.crop(replace(box, extent_mm=2 * np.asarray(box.extent_mm)).as_open3d()) for box in boxes] or [cloud]
    xyz, colours = (np.concatenate([np.asarray(getattr(part, name)) for part in near]) for name in ("points", "colors"))
    chosen = np.random.default_rng(seed).permutation(len(xyz))[:points]
    shown = [f"rgb({r},{g},{b})" for r, g, b in (colours[chosen] * 255).astype(int)]
    marker = {"size": 1.5, "color": shown, "opacity": 0.5}
    traces.append(go.Scatter3d(**_lps(xyz[chosen]), mode="markers", marker=marker, name="voxels", hoverinfo="skip"))
    style = {"showbackground": False, "gridcolor": "#444", "color": "#bbb"}
    scene = {f"{axis}axis": style | {"title": {"text": text}} for axis, text in zip("xyz", ("left", "back", "head"))}
    camera = {"eye": {"x": 1.9, "y": 1.1, "z": 0.3}, "up": {"x": 0, "y": 0, "z": 1}}
    scene |= {"aspectmode": "data", "bgcolor": "black", "camera": camera}
    return go.Figure(traces, {"scene": scene, "height": 700, "margin": {"l": 0, "r": 0, "t": 30, "b": 0}})


def _lps(points):
    """(n, 3) points as plotly's keywords."""
    return dict(zip("xyz", np.asarray(points).T, strict=True))


def _edges(line_set):
    """An Open3D line set as (3 n, 3): start, end and NaN of each line, so that the pen lifts."""
    ends = np.asarray(line_set.points)[np.asarray(line_set.lines)]
    return np.concatenate([ends, np.full((len(ends), 1, 3), np.nan)], 1).reshape(-1, 3)
