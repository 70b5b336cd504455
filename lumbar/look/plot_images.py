"""Figures of slices with what lies on them: bodies, levels, labels, detections, one graded place.

Each function draws into `ax` and returns it.

May use: slices, plot_scores, spine, data, names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.geometry import coordinates_to_lps, nearest_slice
from ..names import CONDITIONS, DETECTORS, GRADES, LEVELS
from .plot_scores import plot_probabilities, plot_study_grades
from .slices import (
    CONDITION_NAMES,
    LEVEL_COLOURS,
    LEVEL_NAMES,
    SEVERITY_COLOURS,
    box_on_slice,
    condition_point,
    direction_letter,
    level_name,
    nearest_volume,
    points_on_slice,
    slice_axes,
    slice_caption,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    from ..data.geometry import LevelBox
    from ..data.volume import Study, Volume
    from ..spine.vertebra import Vertebra


def plot_slice(
    ax: Axes,
    volume: Volume,
    index: int,
    window: tuple[float, float] = (0.0, 1.0),
    boxes: Sequence[LevelBox] | None = None,
) -> Axes:
    """One slice in grey, in its true proportions, with the sides of the body at its edges.

    Parameters
    ----------
    ax : Axes
    volume : Volume
        In the normalised scale.
    index : int
        Of the slice.
    window : (2,) tuple of float
        Black and white in that scale.
    boxes : sequence of LevelBox, optional
        Used to say in the title where the slice lies.

    Returns
    -------
    ax : Axes
        In pixels, so the other plot functions draw on top.
    """
    height, width = volume.array.shape[1:]
    _, row_mm, column_mm = volume.spacing_mm
    ax.imshow(
        np.asarray(volume.array[index], dtype=np.float32),
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        aspect=row_mm / column_mm,
        interpolation="bilinear",
    )
    _, down, right = slice_axes(volume)
    style: dict[str, Any] = dict(color="white", fontsize=9, alpha=0.8, ha="center", va="center")
    ax.text(0.03, 0.5, direction_letter(-right), transform=ax.transAxes, **style)
    ax.text(0.97, 0.5, direction_letter(right), transform=ax.transAxes, **style)
    ax.text(0.5, 0.97, direction_letter(-down), transform=ax.transAxes, **style)
    ax.text(0.5, 0.03, direction_letter(down), transform=ax.transAxes, **style)
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)
    ax.set_axis_off()
    ax.set_title(f"{volume.description}\n{slice_caption(volume, index, boxes)}", fontsize=9)
    return ax


def plot_level_boxes(ax: Axes, boxes: Iterable[LevelBox], volume: Volume, index: int, names: bool = True) -> Axes:
    """Outlines of the LevelBoxes that one slice cuts (dashed: found with a confidence below 0.5), with their names."""
    for box in boxes:
        polygon = box_on_slice(box, volume, index)
        if not len(polygon):
            continue
        colour = LEVEL_COLOURS[LEVELS.index(box.level)]
        closed = np.vstack([polygon, polygon[:1]])
        ax.plot(
            closed[:, 0], closed[:, 1], color=colour, linewidth=1.3, linestyle="-" if box.confidence >= 0.5 else "--"
        )
        if names:
            corner = polygon[np.argmin(polygon[:, 0] + 0.5 * polygon[:, 1])]
            _outlined(
                ax.annotate(
                    level_name(box.level),
                    corner,
                    (3, -3),
                    textcoords="offset points",
                    color=colour,
                    fontsize=8,
                    va="top",
                )
            )
    return ax


def plot_label_points(ax: Axes, points: pd.DataFrame, volume: Volume, index: int, names: bool = True) -> Axes:
    """Label points of one slice as rings.

    Parameters
    ----------
    ax : Axes
    points : DataFrame
        Of read_coordinates (any studies and series).
    volume : Volume
    index : int
        Of the slice.
    names : bool
        Write level and condition beside each ring.

    Returns
    -------
    ax : Axes
    """
    shown = points_on_slice(points, volume, index)
    for row in shown.itertuples():
        colour = LEVEL_COLOURS[LEVELS.index(row.level)]
        ax.plot(
            row.x_px, row.y_px, "o", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=3
        )
        ax.plot(
            row.x_px, row.y_px, "o", markersize=9, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.5
        )
        if names:
            text = f"{level_name(row.level)} {CONDITION_NAMES[CONDITIONS.index(row.condition)].lower()}"
            # Of two points at one height, left and right, each has its name on its own side.
            partner = (shown["x_px"] > row.x_px + 1) & ((shown["y_px"] - row.y_px).abs() < 0.06 * volume.array.shape[1])
            side = -1 if partner.any() else 1
            _outlined(
                ax.annotate(
                    text,
                    (row.x_px, row.y_px),
                    (7 * side, 4),
                    textcoords="offset points",
                    color=colour,
                    fontsize=7,
                    ha="right" if side < 0 else "left",
                )
            )
    return ax


def plot_vertebrae(
    ax: Axes, volume: Volume, index: int, vertebrae: Iterable[Vertebra], boxes: Iterable[LevelBox] = ()
) -> Axes:
    """Draw one sagittal slice with bodies, names and level boxes.

    Bodies and boxes are drawn where they are projected onto the slice.

    Parameters
    ----------
    ax : Axes
    volume : Volume
        In the normalised scale.
    index : int
        Of the slice.
    vertebrae : iterable of Vertebra
        What no sagittal image showed is dashed.
    boxes : iterable of LevelBox
        Dotted.

    Returns
    -------
    ax : Axes
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
        known = vertebra.source.seen
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


def plot_spinenet_target(ax: Axes, item: Mapping[str, torch.Tensor]) -> Axes:
    """Draw an item of SpineSlices: the crop, corners as dots, their vectors as lines to the centroid.

    Parameters
    ----------
    ax : Axes
    item : mapping of str to tensor
        Or of RandomisedSlices: image (1, h, w), and heat, vectors and near of spinenet_targets.

    Returns
    -------
    ax : Axes
    """
    ax.imshow(item["image"][0].numpy(), cmap="gray", vmin=0, vmax=1)
    colors = ("tab:red", "tab:green", "tab:blue", "tab:orange")
    for kind, row, column in torch.nonzero(item["near"]).tolist():
        heat = item["heat"][kind]
        around = heat[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        if heat[row, column] == around.max():
            d_row, d_column = item["vectors"][2 * kind : 2 * kind + 2, row, column].tolist()
            ax.plot([column, column + d_column], [row, row + d_row], "-", color=colors[kind], linewidth=0.7)
            ax.plot(column, row, ".", color=colors[kind], markersize=4)
    ax.set_axis_off()
    return ax


def plot_detections(
    ax: Axes,
    patch: np.ndarray,
    scores: np.ndarray,
    centers_px: np.ndarray,
    box_px: float,
    truth: Iterable[Sequence[float]] = (),
    threshold: float = 0.1,
    top: int = 8,
) -> Axes:
    """Show a patch with the strongest anchors of dense_scores and, dashed, the label boxes.

    Parameters
    ----------
    ax : Axes
    patch : (rows, columns) uint8 array
    scores : (anchors, 3) array
        By severity. Also (anchors, classes) of the original scheme, whose classes' severity is their number modulo 3.
    centers_px : (anchors, 2) array
        x, y in the patch.
    box_px : float
        Side of the square drawn. Anchors within half of it, in x and y, of a stronger one that is drawn are left out.
    truth : iterable of (5,) rows
        (class, xc, yc, w, h) as in YOLO's label files: fractions of the patch.
    threshold : float
        The lowest score that is drawn.
    top : int
        How many anchors at most.

    Returns
    -------
    ax : Axes
    """
    from matplotlib.patches import Rectangle

    colors = SEVERITY_COLOURS
    ax.imshow(patch, cmap="gray", vmin=0, vmax=255)
    height, width = patch.shape
    for grade, x, y, w, h in truth:
        ax.add_patch(
            Rectangle(
                ((x - w / 2) * width - 0.5, (y - h / 2) * height - 0.5),
                w * width,
                h * height,
                fill=False,
                ls="--",
                lw=1.2,
                ec=colors[int(grade) % 3],
            )
        )
    shown: list[int] = []
    best = scores.max(axis=1)
    for anchor in np.argsort(-best):
        if len(shown) >= top or best[anchor] < threshold:
            break
        if any(np.abs(centers_px[anchor] - centers_px[other]).max() < box_px / 2 for other in shown):
            continue
        shown.append(anchor)
        x, y = centers_px[anchor] - box_px / 2
        color = colors[int(scores[anchor].argmax()) % 3]
        ax.add_patch(Rectangle((x, y), box_px, box_px, fill=False, lw=1.2, ec=color))
        _outlined(ax.text(x, y - 1, f"{best[anchor]:.2f}", color=color, fontsize=7))
    ax.set_axis_off()
    return ax


def plot_case(
    ax: Axes,
    study: Study,
    box: LevelBox,
    condition: int,
    point_lps_mm: np.ndarray | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    zoom_mm: float | None = 90.0,
) -> Axes:
    """The slice on which one condition of one level is to be graded, enlarged around it.

    study: Study (normalised); box: LevelBox; condition: number 0..4; point_lps_mm: where to look (default: beside the
    disc's centre); zoom_mm: shown width, None for the whole slice. Without a series of the wanted kind the axes say so.
    """
    wanted = next(description for description, conditions in DETECTORS.values() if condition in conditions)
    volumes = study.of(wanted)
    if not volumes:
        ax.text(0.5, 0.5, f"no {wanted}\nin this study", ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
        return ax
    point = condition_point(box, condition) if point_lps_mm is None else point_lps_mm
    volume = nearest_volume(volumes, point)
    index, _, y, x = nearest_slice(volume, point)
    plot_slice(ax, volume, index, window, boxes=[box])
    _, row_mm, column_mm = volume.spacing_mm
    if zoom_mm is not None:
        ax.set_xlim(x - zoom_mm / 2 / column_mm, x + zoom_mm / 2 / column_mm)
        ax.set_ylim(y + zoom_mm / 2 / row_mm, y - zoom_mm / 2 / row_mm)
        ax.set_title(f"{zoom_mm:.0f} mm around the place", fontsize=9)
    ax.plot(x, y, "+", color=LEVEL_COLOURS[LEVELS.index(box.level)], markersize=14, markeredgewidth=1.2)
    return ax


def plot_example(
    axes: np.ndarray,
    study: Study,
    boxes: Sequence[LevelBox],
    condition: int,
    level: int,
    probabilities: np.ndarray,
    grade: int = -1,
    points: pd.DataFrame | None = None,
) -> np.ndarray:
    """One graded place in three axes: the whole slice with the level boxes, the place enlarged, the probabilities.

    Parameters
    ----------
    axes : (3,) array of Axes
    study : Study
        Normalised.
    boxes : sequence of LevelBox
        Its five.
    condition, level : int
        Indices.
    probabilities : (3,) array
        Of this place.
    grade : int
        Of the label, -1 without one.
    points : DataFrame, optional
        Label points of read_coordinates: where the label lies, the pictures look.

    Returns
    -------
    axes : (3,) array of Axes
    """
    where = None
    if points is not None:
        mine = points[
            (points["study_id"] == study.study_id)
            & (points["condition"] == CONDITIONS[condition])
            & (points["level"] == LEVELS[level])
        ]
        known = coordinates_to_lps(mine, study)
        where = known[0] if len(known) and np.isfinite(known[0]).all() else None
    box = boxes[level]
    plot_case(axes[1], study, box, condition, where)
    plot_case(axes[0], study, box, condition, where, zoom_mm=None)
    volumes = study.of(next(description for description, members in DETECTORS.values() if condition in members))
    if volumes:
        point = condition_point(box, condition) if where is None else where
        volume = nearest_volume(volumes, point)
        plot_level_boxes(axes[0], boxes, volume, nearest_slice(volume, point)[0])
    plot_probabilities(axes[2], probabilities, grade)
    axes[2].set_title(f"{CONDITION_NAMES[condition]}, {LEVEL_NAMES[level]}", fontsize=9)
    return axes


def plot_findings(axes: np.ndarray, study: Study, boxes: list[LevelBox], probabilities: np.ndarray) -> np.ndarray:
    """One predicted study in three axes: the level boxes on the middle sagittal slice, the worst finding enlarged, and
    all 25 predictions.

    The worst finding has the highest mean grade, where moderate counts 1 and severe 2.

    Parameters
    ----------
    axes : (3,) array of Axes
    study : Study
        Normalised.
    boxes : list of LevelBox
        Its five.
    probabilities : (5, 5, 3) array
        By condition, level and severity.

    Returns
    -------
    axes : (3,) array of Axes
    """
    volumes = study.of("Sagittal T2/STIR") or study.of("Sagittal T1") or study.volumes
    middle = boxes[len(boxes) // 2].center_lps_mm
    volume = nearest_volume(volumes, middle)
    index = nearest_slice(volume, middle)[0]
    plot_slice(axes[0], volume, index, boxes=boxes)
    plot_level_boxes(axes[0], boxes, volume, index)
    expected = np.asarray(probabilities) @ np.arange(3)
    condition, level = map(int, np.unravel_index(np.argmax(expected), expected.shape))
    plot_case(axes[1], study, boxes[level], condition)
    p = probabilities[condition, level]
    guess = int(np.argmax(p))
    axes[1].set_title(
        f"{CONDITION_NAMES[condition]}, {LEVEL_NAMES[level]}:\n{GRADES[guess].lower()} {p[guess]:.0%}", fontsize=9
    )
    plot_study_grades(axes[2], probabilities)
    return axes


def _outlined(text: Text) -> Text:
    """Black rim around a matplotlib text, so that it is readable on grey images."""
    from matplotlib import patheffects

    text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])
    text.set_clip_on(True)
    return text
