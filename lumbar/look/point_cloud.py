"""The point cloud of a study, as Open3D and plotly show it.

May use: slices, data, names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.geometry import LevelBox, load_open3d
from ..data.volume import Study
from ..names import DESCRIPTIONS, LEVELS
from .slices import LEVEL_COLOURS, level_name

if TYPE_CHECKING:
    import open3d
    from plotly.graph_objects import Figure


def point_cloud(study: Study, every: int = 2) -> open3d.geometry.PointCloud:
    """The study as an open3d.geometry.PointCloud in LPS millimetres, to look at in Open3D.

    A point per voxel (every `every`-th row and column) brighter than 5% of the scale; the colour's red, green and
    blue are T1, axial T2 and T2/STIR, so that one glance tells which series a point is from.
    """
    o3d = load_open3d()
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


def study_figure(study: Study, boxes: Sequence[LevelBox] = (), points: int = 40_000, seed: int = 0) -> Figure:
    """The study in space as a plotly Figure to turn: Open3D's cloud of its bright voxels, and the level boxes.

    The colours' red, green and blue are T1, axial T2 and T2/STIR. Needs open3d, which brings plotly along.

    Parameters
    ----------
    study : Study
        Normalised.
    boxes : sequence of LevelBox
        With boxes, of the voxels only those in and near them are shown (half a box more to every side): the rest would
        hide them.
    points : int
        How many at most, drawn at random.
    seed : int
        Of that draw.

    Returns
    -------
    Figure
        Axes are LPS millimetres.

    Raises
    ------
    ImportError
        Open3D cannot be loaded; it says how to get it.
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
    scene: dict[str, Any] = {
        f"{axis}axis": style | {"title": {"text": text}} for axis, text in zip("xyz", ("left", "back", "head"))
    }
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
