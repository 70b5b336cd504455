"""Looking: plots, viewers, HTML pages."""

import base64
import html
import io
import itertools
import json
import os
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from .dicom import load_study
from .ensemble import align_members
from .files import class_prior, from_submission, labels_to_array, make_folds, score_arrays
from .geometry import boxes_from_table, coordinates_to_lps, crop_level, nearest_slice
from .levels import compare_with_labels
from .names import CONDITIONS, DESCRIPTIONS, DETECTORS, GRADES, LEVELS, SEVERITY_WEIGHTS

# Okabe and Ito's palette: told apart with every common kind of colour blindness. Severity is also always written.
# The levels' colours are lightened, for lines on dark images.
LEVEL_COLOURS = ("#62BEF5", "#FFB000", "#2ED8A3", "#F0E442", "#F590CF")
SEVERITY_COLOURS = ("#56B4E9", "#E69F00", "#D55E00")
MEMBER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8A00", "#555555")
LEVEL_NAMES = tuple(level.upper().replace("_", "/") for level in LEVELS)
CONDITION_NAMES = ("Spinal canal", "Left foramen", "Right foramen", "Left subarticular", "Right subarticular")
TERM_NAMES = {
    "spinal": "Spinal canal",
    "foraminal": "Foraminal",
    "subarticular": "Subarticular",
    "any_severe": "Any severe canal",
    "total": "Score",
}
# Where a condition is to be seen: mm from the disc's centre along head, left, back.
CONDITION_OFFSETS_MM = ((0, 0, 23), (5, 17, 20), (5, -17, 20), (0, 9, 20), (0, -9, 20))


def direction_letter(vector):
    """Letter of the side of the body that an LPS vector (3,) points to: L R P A H F (head, foot)."""
    vector = np.asarray(vector, dtype=float)
    axis = int(np.argmax(np.abs(vector)))
    return (("R", "L"), ("A", "P"), ("F", "H"))[axis][int(vector[axis] > 0)]


def slice_axes(volume):
    """Unit vectors (LPS) of a volume's slice normal, rows (downwards) and columns (rightwards): (3, 3)."""
    down, right = (volume.affine[:3, axis] / np.linalg.norm(volume.affine[:3, axis]) for axis in (1, 2))
    normal = np.cross(right, down)
    return np.stack([normal / np.linalg.norm(normal), down, right])


def nearest_volume(volumes, xyz_mm):
    """The volume of a list whose images come nearest to an LPS point (3,); of equals the one with the nearest slice."""

    def distance_mm(volume):
        voxel = volume.lps_to_voxel(xyz_mm)
        outside = np.maximum(0, np.maximum(-0.5 - voxel, voxel - np.array(volume.array.shape) + 0.5))
        return np.linalg.norm(outside * volume.spacing_mm) + 1e-3 * nearest_slice(volume, xyz_mm)[1]

    return min(volumes, key=distance_mm)


def condition_point(box, condition):
    """Point (3,) in LPS mm where condition number `condition` is to be seen at a LevelBox's level."""
    return box.to_lps(CONDITION_OFFSETS_MM[condition])


def box_on_slice(box, volume, index):
    """Where a slice cuts a LevelBox: polygon (n, 2) as x_px, y_px of pixel centres in order, n = 0 if it does not."""
    voxels = volume.lps_to_voxel(box.corners_lps())
    height = voxels[:, 0] - index
    cuts = []
    for a, b in itertools.combinations(range(8), 2):
        # Corners are numbered in binary: an edge joins two that differ in one bit.
        if (a ^ b).bit_count() == 1 and (height[a] > 0) != (height[b] > 0):
            cuts.append(voxels[a] + height[a] / (height[a] - height[b]) * (voxels[b] - voxels[a]))
    if len(cuts) < 3:
        return np.zeros((0, 2))
    polygon = np.array(cuts)[:, [2, 1]]
    around = polygon - polygon.mean(0)
    return polygon[np.argsort(np.arctan2(around[:, 1], around[:, 0]))]


def points_on_slice(points, volume, index):
    """Rows of a table of label points (see read_coordinates) that lie on one slice of a volume."""
    return points[
        (points["series_id"] == volume.series_id) & (points["instance_number"] == int(volume.instance_numbers[index]))
    ]


def level_name(level):
    """`l4_l5` -> `L4/L5`."""
    return level.upper().replace("_", "/")


def slice_caption(volume, index, boxes=None):
    """Where a slice lies, in words: beside the spine's middle (sagittal), above or below a disc (axial)."""
    caption = f"slice {index + 1} of {len(volume.array)}"
    axis = {"sagittal": 0, "axial": 2}.get(volume.plane)
    if axis is None or (axis == 2 and not boxes):
        return caption
    normal = slice_axes(volume)[0]
    normal = normal if normal[axis] > 0 else -normal
    middle_px = (np.array(volume.array.shape) - 1) / 2
    here = volume.voxel_to_lps([index, *middle_px[1:]])
    if axis == 0:
        centres = [box.center_lps_mm for box in boxes or ()] or [volume.voxel_to_lps(middle_px)]
        names, sides = ["the spine's middle" if boxes else "the stack's middle"], ("left of", "right of")
        beside = [(here - np.mean(centres, 0)) @ normal]
    else:
        names, sides = [level_name(box.level) for box in boxes], ("above", "below")
        beside = [(here - box.center_lps_mm) @ normal for box in boxes]
    nearest = int(np.argmin(np.abs(beside)))
    if abs(beside[nearest]) < 0.5:
        return f"{caption}, at {names[nearest]}"
    return f"{caption}, {abs(beside[nearest]):.0f} mm {sides[int(beside[nearest] < 0)]} {names[nearest]}"


def plot_slice(ax, volume, index, window=(0.0, 1.0), boxes=None):
    """One slice in grey, in its true proportions, with the sides of the body at its edges.

    volume: Volume in the normalised scale; index: slice; window: (black, white) in that scale; boxes: LevelBoxes,
    used to say in the title where the slice lies. Axes are in pixels, so the other plot functions draw on top.
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
    style = dict(color="white", fontsize=9, alpha=0.8, ha="center", va="center")
    ax.text(0.03, 0.5, direction_letter(-right), transform=ax.transAxes, **style)
    ax.text(0.97, 0.5, direction_letter(right), transform=ax.transAxes, **style)
    ax.text(0.5, 0.97, direction_letter(-down), transform=ax.transAxes, **style)
    ax.text(0.5, 0.03, direction_letter(down), transform=ax.transAxes, **style)
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)
    ax.set_axis_off()
    ax.set_title(f"{volume.description}\n{slice_caption(volume, index, boxes)}", fontsize=9)
    return ax


def plot_label_points(ax, points, volume, index, names=True):
    """Label points of one slice as rings; points: table of read_coordinates (any studies and series)."""
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


def plot_level_boxes(ax, boxes, volume, index, names=True):
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


def _outlined(text):
    """Black rim around a matplotlib text, so that it is readable on grey images."""
    from matplotlib import patheffects

    text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])
    text.set_clip_on(True)
    return text


def plot_level_crop(axes, crop, coverage=None, extent_mm=None, window=(0.0, 1.0)):
    """Three planes through the middle of a level's crop, seen as radiologists do (patient's left at the right).

    axes: (3, 3) Axes, rows = channels T1, axial T2, T2/STIR, columns = sagittal, coronal, axial plane; or (3,) for a
    crop of one channel (d, h, w). crop: (3, d, h, w), axes (channel, head-foot, front-back, right-left).
    coverage: (3, d, h, w) bool; what no slice covers is tinted blue. extent_mm: (head, left, back) for proportions.
    """
    crop = np.asarray(crop, dtype=np.float32)
    axes = np.asarray(axes)
    crops = crop[None] if crop.ndim == 3 else crop
    covered = (
        np.ones(crops.shape, dtype=bool) if coverage is None else np.asarray(coverage, dtype=bool).reshape(crops.shape)
    )
    rows = axes.reshape(len(crops), 3)
    depth, height, width = crops.shape[1:]
    head_mm, left_mm, back_mm = extent_mm if extent_mm is not None else (depth, width, height)
    planes = (
        ("sagittal", np.s_[:, :, width // 2], (head_mm, back_mm), "AP"),
        ("coronal", np.s_[:, height // 2, :], (head_mm, left_mm), "RL"),
        ("axial", np.s_[depth // 2, :, :], (back_mm, left_mm), "RL"),
    )
    for channel, row in enumerate(rows):
        for ax, (name, cut, (tall_mm, wide_mm), sides) in zip(row, planes):
            ax.imshow(
                crops[channel][cut],
                cmap="gray",
                vmin=window[0],
                vmax=window[1],
                extent=(0, wide_mm, tall_mm, 0),
                interpolation="bilinear",
            )
            blank = np.zeros((*crops[channel][cut].shape, 4))
            blank[..., :] = (0.0, 0.45, 0.7, 0.45)
            blank[..., 3] *= ~covered[channel][cut]
            ax.imshow(blank, extent=(0, wide_mm, tall_mm, 0), interpolation="nearest")
            for x, letter in zip((0.05, 0.95), sides):
                ax.text(x, 0.5, letter, transform=ax.transAxes, color="white", fontsize=7, ha="center", va="center")
            ax.set_xticks([])
            ax.set_yticks([])
            if channel == 0:
                ax.set_title(name, fontsize=9)
        if len(rows) == 3:
            row[0].set_ylabel(DESCRIPTIONS[channel], fontsize=8)
    return axes


def plot_case(ax, study, box, condition, point_lps_mm=None, window=(0.0, 1.0), zoom_mm=90.0):
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


def plot_confusion(ax, truth, probabilities):
    """Table of read grade (rows) against most probable grade (columns): per cent of each row, and counts.

    truth: int (...), -1 is left out; probabilities: (..., 3).
    """
    truth = np.asarray(truth).reshape(-1)
    guess = np.asarray(probabilities).reshape(-1, 3).argmax(axis=1)
    known = truth >= 0
    counts = np.zeros((3, 3), dtype=int)
    np.add.at(counts, (truth[known], guess[known]), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(3):
        for j in range(3):
            ax.text(
                j,
                i,
                f"{share[i, j]:.0%}\n({counts[i, j]})",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if share[i, j] > 0.55 else "black",
            )
    ax.set_xticks(range(3), GRADES, fontsize=8)
    ax.set_yticks(range(3), GRADES, fontsize=8, rotation=90, va="center")
    ax.set_xlabel("most probable grade", fontsize=8)
    ax.set_ylabel("grade in the labels", fontsize=8)
    return ax


def plot_reliability(ax, truth, probabilities, bins=8):
    """Predicted probability against how often it came true, one curve a grade, in bins of equal count.

    truth: int (...), -1 is left out; probabilities: (..., 3). On the diagonal the probabilities can be taken at
    their word. The bars are 95% Wilson intervals; "off by" is the mean distance to the diagonal, weighted by count.
    """
    truth = np.asarray(truth).reshape(-1)
    probabilities = np.asarray(probabilities, dtype=float).reshape(-1, 3)[truth >= 0]
    truth = truth[truth >= 0]
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    for severity in range(3):
        p, hit = probabilities[:, severity], truth == severity
        parts = [part for part in np.array_split(np.argsort(p, kind="stable"), bins) if len(part)]
        n = np.array([len(part) for part in parts])
        said = np.array([p[part].mean() for part in parts])
        came = np.array([hit[part].mean() for part in parts])
        if not len(parts):
            continue
        centre = (came + 1.92 / n) / (1 + 3.84 / n)
        half = 1.96 / (1 + 3.84 / n) * np.sqrt(came * (1 - came) / n + 0.96 / n**2)
        bars = np.abs(np.stack([came - (centre - half), (centre + half) - came]))
        off = float(np.sum(n * np.abs(said - came)) / n.sum())
        ax.errorbar(
            said,
            came,
            bars,
            color=SEVERITY_COLOURS[severity],
            marker="os^"[severity],
            markersize=4,
            linewidth=1.2,
            elinewidth=0.7,
            label=f"{GRADES[severity]} (off by {off:.2f})",
        )
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("predicted probability", fontsize=8)
    ax.set_ylabel("share that came true", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=7, frameon=False, loc="upper left")
    return ax


def plot_scores(ax, scores, references=None):
    """Bars of scores (lower is better), best at the top; references as dotted lines with their names.

    scores, references: dicts of name -> score. Scores that are not finite are left out.
    """
    scores = {name: value for name, value in scores.items() if np.isfinite(value)}
    order = sorted(scores, key=scores.get, reverse=True)
    ax.barh(range(len(order)), [scores[name] for name in order], height=0.6, color=MEMBER_COLOURS[0])
    for position, name in enumerate(order):
        ax.text(scores[name], position, f" {scores[name]:.3f}", va="center", fontsize=8)
    ax.set_yticks(range(len(order)), order, fontsize=8)
    ax.set_ylim(-0.6, len(order) - 0.4)
    lines = {name: value for name, value in (references or {}).items() if np.isfinite(value)}
    for number, (name, value) in enumerate(sorted(lines.items(), key=lambda item: item[1])):
        colour = MEMBER_COLOURS[(4, 2, 3)[number % 3]]
        ax.axvline(value, color=colour, linestyle=":", linewidth=1.4, label=f"{name}: {value:.3f}")
    ax.set_xlim(0, 1.15 * max([*scores.values(), *lines.values(), 1e-9]))
    if lines:
        ax.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(lines))
    ax.set_xlabel("weighted log loss (lower is better)", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_learning_curves(ax, histories, columns=("loss", "total"), x="epoch"):
    """Columns of training histories over their epochs: one colour a history, one line style a column.

    histories: dict name (of a fold) -> DataFrame; columns that a history lacks and cells without a number are left
    out, so losses and scores may be written at different epochs. x: column of the horizontal axis.
    """
    names = {"loss": "training loss", "total": "held-out score"}
    drawn = []
    for place, (name, history) in enumerate(histories.items()):
        for style, column in zip(("-", "--", "-.", ":"), [c for c in columns if c in history]):
            part = history[[x, column]].apply(pd.to_numeric, errors="coerce").dropna()
            ax.plot(
                part[x],
                part[column],
                style,
                color=MEMBER_COLOURS[place % len(MEMBER_COLOURS)],
                linewidth=1.3,
                marker="o" if len(part) < 3 else None,
                markersize=3,
                label=" ".join(filter(None, [name, names.get(column, column)])),
            )
            drawn += part[column].tolist()
    if drawn:
        ax.legend(fontsize=7, frameon=False)
        # A first epoch far off must not flatten what comes after.
        ax.set_ylim(min(0, min(drawn)), 1.05 * max(np.percentile(drawn, 97), 1e-6))
    ax.set_xlabel(x, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_grid(ax, values, reference=None, counts=None):
    """Numbers per condition (rows) and level (columns), tinted: (5, 5), NaN is left empty.

    reference: (5, 5), such as the class prior's loss; then blue is below (better than) it and red above.
    counts: (5, 5) ints, written below the numbers.
    """
    values = np.asarray(values, np.float64)
    tint = values if reference is None else values - reference
    limit = max(float(np.nanmax(np.abs(tint), initial=0)), 1e-9)
    low = 0 if reference is None else -limit
    ax.imshow(tint, cmap="Blues" if reference is None else "RdBu_r", vmin=low * 1.6, vmax=limit * 1.6, aspect="auto")
    for i, j in np.argwhere(np.isfinite(values)):
        below = "" if counts is None else f"\n({counts[i, j]})"
        ax.text(j, i, f"{values[i, j]:.2f}{below}", ha="center", va="center", fontsize=8, color="black")
    ax.set_xticks(range(len(LEVELS)), LEVEL_NAMES, fontsize=8)
    ax.set_yticks(range(len(CONDITIONS)), CONDITION_NAMES, fontsize=8)
    return ax


# -- numbers for tables and plots


def cell_losses(grades, probabilities):
    """Weighted log loss of each condition and level: (5, 5), NaN where nothing is graded.

    grades: (n, 5, 5), -1 missing; probabilities: (n, 5, 5, 3), NaN (left out) or rows that sum to 1.
    """
    weight, loss = row_losses(grades, probabilities)
    total = weight.sum(0)
    return np.where(total > 0, (weight * loss).sum(0) / np.where(total > 0, total, 1), np.nan)


def row_losses(grades, probabilities):
    """(weight, -log p of the true grade), both (n, 5, 5); both 0 where there is no grade or no prediction."""
    grades, probabilities = np.asarray(grades), np.asarray(probabilities, np.float64)
    safe = np.clip(grades, 0, 2)
    true = np.take_along_axis(probabilities, safe[..., None], -1)[..., 0]
    known = (grades >= 0) & np.isfinite(true)
    weight = np.where(known, np.asarray(SEVERITY_WEIGHTS, np.float64)[safe], 0)
    return weight, np.where(known, -np.log(np.clip(np.where(known, true, 1), np.finfo(np.float64).eps, 1)), 0)


def worst_rows(study_ids, grades, probabilities, count=6):
    """The most wrong predictions, at most one a study: DataFrame study_id, condition, level (indices), grade, loss.

    Ordered by weight times log loss, what a row costs in the metric.
    """
    weight, loss = row_losses(grades, probabilities)
    cost = weight * loss
    order = np.dstack(np.unravel_index(np.argsort(-cost, axis=None), cost.shape))[0]
    rows, seen = [], set()
    for n, condition, level in order:
        if len(rows) == count or cost[n, condition, level] == 0:
            break
        if n not in seen:
            seen.add(n)
            rows.append([study_ids[n], condition, level, grades[n, condition, level], loss[n, condition, level]])
    return pd.DataFrame(rows, columns=["study_id", "condition", "level", "grade", "loss"])


def score_table(grades, predictions):
    """The metric's terms of several predictions: DataFrame, one row a name, columns of TERM_NAMES and rows.

    predictions: dict name -> (n, 5, 5, 3), NaN where there is none. A member that grades only some conditions or
    studies is scored on those (`rows` counts them); its terms without a row are NaN, and so is its total.
    With a `Class prior` and a `Perfect reader` among them, `closed` is how much of the distance between the two each
    prediction closes: 0 is no better than the prior, 1 is perfect.
    """
    table = {}
    for name, probabilities in predictions.items():
        there = (np.asarray(grades) >= 0) & np.isfinite(probabilities).all(-1)
        scores = (
            score_arrays(np.where(there, grades, -1), np.where(there[..., None], probabilities, 1 / 3))
            if there.any()
            else dict.fromkeys(TERM_NAMES, np.nan)
        )
        table[name] = {**scores, "rows": int(there.sum())}
    table = pd.DataFrame.from_dict(table, orient="index")
    if {"Class prior", "Perfect reader"} <= set(table.index):
        prior, perfect = table.loc["Class prior", "total"], table.loc["Perfect reader", "total"]
        table.insert(len(TERM_NAMES), "closed", (prior - table["total"]) / (prior - perfect))
    return table


def out_of_fold_prior(grades, folds):
    """For each study the weighted class prior of the studies in other folds: (n, 5, 5, 3). folds: (n,) int."""
    return np.stack([class_prior(grades[folds != fold]) for fold in folds])


def nested_folds(labels, folds, tables, parts=5):
    """The folds in which the ensemble is judged: DataFrame study_id, fold of the predicted studies.

    labels: train.csv's wide form; folds: (n,) fold of each of its rows; tables: dict member -> out-of-fold table.
    They are the members' own folds: an ensemble for a fold's studies is found on the other folds, as the members
    were. Where the members predicted one fold only, its studies are dealt into `parts` instead.
    """
    aligned = align_members(labels["study_id"].to_numpy(), tables)
    predicted = np.any([np.isfinite(p).any((1, 2, 3)) for p in aligned.values()], axis=0)
    found = pd.DataFrame({"study_id": labels["study_id"], "fold": folds})[predicted].reset_index(drop=True)
    if found["fold"].nunique() == 1 and len(found) > 1:
        found = make_folds(labels[predicted], min(parts, len(found)))
    return found


def read_views(run):
    """The views.csv of the members' stages below `run`, one below the other: DataFrame stage, view, alone, gain, ..."""
    paths = [p for p in sorted(Path(run).glob("*/views.csv")) if ".old-" not in p.parent.name]
    tables = [pd.read_csv(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        table.insert(0, "stage", path.parent.name)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def level_label_table(paths, levels, coordinates, limit=200):
    """How well the level boxes meet the label points: one row a point, see compare_with_labels, with study_id.

    paths: dict study_id -> volume file; levels: levels.csv as a table; limit: studies looked at, spread evenly.
    """
    study_ids = sorted(set(paths) & set(levels["study_id"]) & set(coordinates["study_id"]))
    rows = []
    for study_id in study_ids[:: max(1, -(-len(study_ids) // limit))]:
        points = coordinates[coordinates["study_id"] == study_id]
        compared = compare_with_labels(boxes_from_table(levels, study_id), points, load_study(paths[study_id]))
        rows.append(compared.assign(study_id=study_id))
    return (
        pd.concat(rows, ignore_index=True)
        if rows
        else pd.DataFrame(columns=["study_id", "condition", "level", "nearest"])
    )


def summarise_levels(compared, levels):
    """Per level: label points, those at the right level, how far the disc plane is from the canal and subarticular
    points (which lie at the disc's height; foraminal ones lie above it), and where the boxes came from."""
    rows = []
    for level in LEVELS:
        part = compared[compared["level"] == level]
        flat = (
            part.loc[~part["condition"].str.contains("foraminal"), "head_mm"].abs()
            if len(part)
            else pd.Series(dtype=float)
        )
        found = levels[levels["level"] == level]
        sources = found["source"].value_counts()
        rows.append(
            {
                "Level": level_name(level),
                "Points": len(part),
                "Right level, %": 100 * (part["nearest"] == level).mean() if len(part) else np.nan,
                "Median distance, mm": flat.median(),
                "Within 5 mm, %": 100 * (flat <= 5).mean() if len(flat) else np.nan,
                "Median confidence": found["confidence"].median(),
                "Found on": ", ".join(f"{name} {count}" for name, count in sources.items()),
            }
        )
    return pd.DataFrame(rows)


def read_manifests(out):
    """dict stage -> manifest of every complete stage in a folder, in the order of their names."""
    paths = [path for path in sorted(Path(out).glob("*/manifest.json")) if ".old-" not in path.parent.name]
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def read_histories(out):
    """dict stage -> dict run -> training history: *history*.csv of our own training, results.csv of ultralytics."""
    found = {}
    for path in sorted({*Path(out).glob("*/*history*.csv"), *Path(out).glob("*/**/results.csv")}):
        stage = path.relative_to(out).parts[0]
        if ".old-" not in stage:
            table = pd.read_csv(path)
            name = path.parent.name if path.name == "results.csv" else path.stem.replace("_history", "")
            table = table.rename(columns=str.strip)
            if path.name == "results.csv":  # an epoch without validation is written as zeros
                measured = [column for column in table if column.startswith(("metrics/", "val/"))]
                table[measured] = table[measured].where((table[measured] != 0).any(axis=1))
            parts = table.groupby("split", sort=False) if "split" in table else [("", table)]
            for split, part in parts:
                found.setdefault(stage, {})[f"{name} {split}".strip()] = part
    return found


def plot_probabilities(ax, probabilities, grade=-1):
    """Three probabilities as bars; the grade of the label, if there is one, is marked."""
    ax.barh(range(3), probabilities, color=SEVERITY_COLOURS, height=0.6)
    for severity, p in enumerate(probabilities):
        ax.text(p, severity, f" {p:.0%}" + ("  \u25c0 label" if severity == grade else ""), va="center", fontsize=8)
    ax.set_yticks(range(3), GRADES, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.35)
    ax.set_xticks([])
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    return ax


def plot_example(axes, study, boxes, condition, level, probabilities, grade=-1, points=None):
    """One graded place in three axes: the whole slice with the level boxes, the place enlarged, the probabilities.

    condition, level: indices; points: label points of read_coordinates: where the label lies, the pictures look.
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


# -- pages and viewers


def short(value, digits=3):
    """A value of a parameters or counts table as short text: rounded numbers, lists in brackets."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(short(item, digits) for item in value)}]"
    return str(value)


def write_text(path, text):
    """Write a text file so that the file is either the old one or complete. Returns the path."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def table_html(table, caption="", decimals=3, names=None):
    """A DataFrame as a clean HTML table: numbers to the right and rounded, missing ones as a dash, text escaped.

    caption: a sentence above the table; names: dict column -> heading. The index is shown if it has a name.
    """
    shown = table.reset_index() if table.index.name else table

    def side(value):
        return "right" if isinstance(value, (int, float, np.number)) else "left"

    def cell(value):
        if isinstance(value, (bool, np.bool_)):
            return "yes" if value else "no"
        if isinstance(value, (int, np.integer)):
            return f"{value:d}" if abs(value) > 9999999 else f"{value:,}"
        if isinstance(value, (float, np.floating)):
            return f"{value:.{decimals}f}" if np.isfinite(value) else "&ndash;"
        return html.escape(str(value))

    head = "".join(
        f"<th>{html.escape(str((names or {}).get(column, column)).replace('_', ' '))}</th>" for column in shown
    )
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:{side(value)}'>{cell(value)}</td>" for value in row) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    title = f"<caption style='text-align:left;caption-side:top'>{html.escape(caption)}</caption>" if caption else ""
    return f"<table class=kit>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_VIEWER_STYLE = """
.lumbar-viewer{--ink:#1b1b1b;--soft:#5a5a5a;--paper:#fff;--rule:#d0d0d0;--key:#0072b2;color:var(--ink);
 background:var(--paper);font:14px/1.4 system-ui,sans-serif;padding:12px;border:1px solid var(--rule);border-radius:6px}
@media (prefers-color-scheme:dark){.lumbar-viewer{--ink:#eee;--soft:#b0b0b0;--paper:#1c1c1c;--rule:#444;--key:#56b4e9}}
.lumbar-viewer h3{margin:0 0 4px;font-size:17px}
.lumbar-viewer p{margin:4px 0;color:var(--soft)}
.lumbar-viewer .panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:12px}
.lumbar-viewer figure{margin:0;min-width:0}
.lumbar-viewer figcaption{min-height:2.8em}
.lumbar-viewer figcaption b{display:block}
.lumbar-viewer figcaption span,.lumbar-viewer .legend{color:var(--soft);font-size:13px}
.lumbar-viewer svg{display:block;width:100%;aspect-ratio:1;background:#000;outline-offset:2px}
.lumbar-viewer svg:focus{outline:2px solid var(--key)}
.lumbar-viewer .none{display:grid;place-items:center;aspect-ratio:1;background:#000;color:#ccc}
.lumbar-viewer input[type=range]{width:100%;margin:6px 0;accent-color:var(--key)}
.lumbar-viewer svg text{paint-order:stroke;stroke:#000;stroke-width:.22em;stroke-linejoin:round;font-family:inherit}
.lumbar-viewer svg polygon,.lumbar-viewer svg circle,.lumbar-viewer svg line{
 fill:none;vector-effect:non-scaling-stroke;stroke-width:1.5px}
.lumbar-viewer .tools{display:flex;flex-wrap:wrap;gap:4px 18px;align-items:center;margin:6px 0}
.lumbar-viewer .tools input[type=range]{width:110px;margin:0 0 0 6px;vertical-align:middle}
.lumbar-viewer .scroll{overflow-x:auto}
.lumbar-viewer table{border-collapse:collapse;margin-top:8px;font-size:13px;width:100%;table-layout:fixed;
 min-width:640px}
.lumbar-viewer th,.lumbar-viewer td{padding:3px 6px;border:1px solid var(--rule);text-align:left;vertical-align:top;
 color:var(--ink);background:none}
.lumbar-viewer th:first-child{width:4.5em}
.lumbar-viewer td[tabindex]{cursor:pointer}
.lumbar-viewer td[tabindex]:hover,.lumbar-viewer td.here{outline:2px solid var(--key);outline-offset:-2px}
.lumbar-viewer .bar{display:flex;height:7px;margin-top:3px;background:var(--rule)}
.lumbar-viewer .bar i{display:block;height:100%}
.lumbar-viewer .miss{font-weight:bold}
.lumbar-viewer .swatch{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 .8em;vertical-align:-.05em}
"""

_VIEWER_SCRIPT = """
(() => {
const root = document.getElementById(ROOT_ID), data = DATA;
const dot = (a, b) => a[0]*b[0] + a[1]*b[1] + a[2]*b[2];
const sub = (a, b) => [a[0]-b[0], a[1]-b[1], a[2]-b[2]];
const add = (o, u, s, v, t) => [0, 1, 2].map(i => o[i] + u[i]*s + v[i]*t);
const panels = [...root.querySelectorAll('figure[data-panel]')].map(figure => ({
  figure, frames: data.panels[+figure.dataset.panel], svg: figure.querySelector('svg'), now: 0,
  slider: figure.querySelector('input'), caption: figure.querySelector('figcaption span'),
  image: figure.querySelector('image'), over: figure.querySelector('g') }));
const on = name => root.querySelector('input[data-show=' + name + ']').checked;
function put(parent, tag, attributes, text) {
  const item = document.createElementNS(parent.namespaceURI, tag);
  for (const name in attributes) item.setAttribute(name, attributes[name]);
  if (text) item.textContent = text;
  return parent.appendChild(item);
}
// The line in which slice a cuts slice b, within both pictures: two points in b's millimetres, or null.
function cut(a, b) {
  const A = data.stacks[a.s], B = data.stacks[b.s];
  const p = dot(A.n, B.u), q = dot(A.n, B.v), r = dot(A.n, sub(a.o, b.o)), size = p*p + q*q;
  if (size < 1e-3) return null;
  const start = add(b.o, B.u, r*p/size, B.v, r*q/size), along = add([0, 0, 0], B.u, -q, B.v, p);
  let low = -1e9, high = 1e9;
  const limit = (from, step, length) => {
    if (Math.abs(step) < 1e-9) { if (from < 0 || from > length) high = -1e9; return; }
    const one = -from/step, two = (length - from)/step;
    low = Math.max(low, Math.min(one, two)); high = Math.min(high, Math.max(one, two));
  };
  for (const [frame, S] of [[a, A], [b, B]]) {
    limit(dot(sub(start, frame.o), S.u), dot(along, S.u), S.w);
    limit(dot(sub(start, frame.o), S.v), dot(along, S.v), S.h);
  }
  if (low >= high) return null;
  return [low, high].map(t => sub(add(start, along, t, along, 0), b.o)).map(d => [dot(d, B.u), dot(d, B.v)]);
}
function draw(panel) {
  const frame = panel.frames[panel.now], stack = data.stacks[frame.s], size = Math.max(stack.w, stack.h);
  panel.svg.setAttribute('viewBox', '0 0 ' + stack.w + ' ' + stack.h);
  panel.image.setAttribute('width', stack.w); panel.image.setAttribute('height', stack.h);
  panel.image.setAttribute('href', 'data:image/jpeg;base64,' + frame.i);
  panel.slider.value = panel.now; panel.caption.textContent = frame.c;
  panel.slider.setAttribute('aria-valuetext', frame.c);
  panel.over.replaceChildren();
  const font = { 'font-size': size*.036 };
  if (on('lines')) for (const other of panels) {
    const line = other !== panel && cut(other.frames[other.now], frame);
    if (line) put(panel.over, 'line', { x1: line[0][0], y1: line[0][1], x2: line[1][0], y2: line[1][1], stroke: '#fff',
      'stroke-dasharray': '5 4', opacity: .65 });
  }
  if (on('boxes')) for (const [level, sure, points] of frame.b) {
    const colour = data.colours[level];
    put(panel.over, 'polygon', { points: points.join(' '), stroke: colour, 'stroke-dasharray': sure ? 'none' : '6 4' });
    const y = points.filter((_, i) => i % 2), x = points.filter((_, i) => i % 2 === 0), left = Math.min(...x);
    const beside = left > size*.13;
    put(panel.over, 'text', { ...font, fill: colour, 'text-anchor': beside ? 'end' : 'start',
      x: beside ? left - size*.01 : size*.01,
      y: Math.min(Math.max(y.reduce((a, b) => a + b)/y.length, size*.05), stack.h - 4) }, data.levels[level]);
  }
  if (on('points')) for (const [level, x, y, name] of frame.p) {
    put(panel.over, 'circle', { cx: x, cy: y, r: size*.014, stroke: data.colours[level] });
    // Of two points at one height, left and right, each has its name on its own side.
    const end = frame.p.some(other => other[1] > x + 1 && Math.abs(other[2] - y) < size*.06);
    put(panel.over, 'text', { ...font, fill: data.colours[level], 'text-anchor': end ? 'end' : 'start',
      x: x + (end ? -1 : 1)*size*.022, y: y + size*.012 }, name);
  }
  const sides = [[.025, .5], [.975, .5], [.5, .045], [.5, .985]];
  sides.forEach(([x, y], i) => put(panel.over, 'text', { ...font, fill: '#ddd', 'text-anchor': 'middle', x: x*stack.w,
    y: y*stack.h }, stack.l[i]));
}
const drawAll = () => panels.forEach(draw);
function show(panel, number) {
  panel.now = Math.max(0, Math.min(panel.frames.length - 1, number)); drawAll();
}
// Every series goes to the slice nearest to a point of the patient.
function jump(point) {
  for (const panel of panels) {
    let best = 1e9;
    panel.frames.forEach((frame, number) => {
      const S = data.stacks[frame.s], d = sub(point, frame.o), x = dot(d, S.u), y = dot(d, S.v);
      const away = Math.abs(dot(d, S.n)) + Math.max(0, -x, x - S.w) + Math.max(0, -y, y - S.h);
      if (away < best) { best = away; panel.now = number; }
    });
  }
  drawAll();
}
for (const panel of panels) {
  panel.now = +panel.slider.value;
  panel.slider.addEventListener('input', () => show(panel, +panel.slider.value));
  panel.svg.addEventListener('wheel', event => {
    event.preventDefault(); show(panel, panel.now + Math.sign(event.deltaY));
  }, { passive: false });
  panel.svg.addEventListener('pointerdown', () => panel.svg.focus());
  panel.svg.addEventListener('keydown', event => {
    const step = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -5, PageDown: 5 }[event.key];
    // Jupyter has its own meaning for these keys.
    if (step) { event.preventDefault(); event.stopPropagation(); show(panel, panel.now + step); }
  });
}
for (const box of root.querySelectorAll('input[data-show]')) box.addEventListener('change', drawAll);
root.querySelector('input[data-light]').addEventListener('input', event => {
  for (const panel of panels) panel.image.style.filter = 'brightness(' + event.target.value + ')';
});
for (const cell of root.querySelectorAll('td[data-point]')) {
  const go = () => {
    root.querySelectorAll('td.here').forEach(other => other.classList.remove('here'));
    cell.classList.add('here'); jump(JSON.parse(cell.dataset.point));
  };
  cell.addEventListener('click', go);
  cell.addEventListener('keydown', event => { if (event.key === 'Enter') go(); });
}
if (data.start) jump(data.start); else drawAll();
})();
"""


def encode_slice(image, longest_px, quality):
    """A slice (h, w) in the normalised scale -> base64 text of a JPEG whose longer side has at most longest_px."""
    from PIL import Image

    picture = Image.fromarray((np.clip(np.asarray(image, np.float32), 0, 1) * 255).astype(np.uint8))
    picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _encode_study(study, max_bytes):
    """dict (volume number, slice) -> base64 JPEG, as fine as fits into max_bytes; at the coarsest some are left out."""
    keys = [(number, k) for number, volume in enumerate(study.volumes) for k in range(len(volume.array))]
    for longest_px, quality in ((512, 80), (384, 75), (320, 65), (256, 55)):
        # A guess from every 8th slice saves encoding all of them in vain.
        some = [len(encode_slice(study.volumes[v].array[k], longest_px, quality)) for v, k in keys[::8]]
        if some and np.mean(some) * len(keys) < 0.95 * max_bytes:
            break
    else:
        keys = keys[:: int(np.ceil(np.mean(some) * len(keys) / (0.95 * max_bytes)))] if some else keys
    return {(v, k): encode_slice(study.volumes[v].array[k], longest_px, quality) for v, k in keys}


def _picture_mm(xy_px, pixel_mm):
    """(..., 2) x_px, y_px of pixel centres -> list of millimetres from the picture's upper left corner."""
    return ((np.asarray(xy_px, np.float64) + 0.5) * pixel_mm).round(2).tolist()


def _viewer_data(study, boxes, points, max_bytes):
    """What the viewer's script draws, in numbers: panels (one a description) of frames, and the frames' stacks."""
    stacks, panels = [], [[] for _ in DESCRIPTIONS]
    # Stacks from head to foot, so that the slider runs through a series of one block per disc in the body's order.
    study = replace(
        study,
        volumes=sorted(
            study.volumes, key=lambda volume: -volume.voxel_to_lps((np.array(volume.array.shape) - 1) / 2)[2]
        ),
    )
    pictures = _encode_study(study, max_bytes)
    for number, volume in enumerate(study.volumes):
        normal, down, right = slice_axes(volume)
        _, row_mm, column_mm = volume.spacing_mm
        pixel_mm = (column_mm, row_mm)
        height_mm, width_mm = volume.array.shape[1] * row_mm, volume.array.shape[2] * column_mm
        stacks.append(
            {
                "w": round(width_mm, 2),
                "h": round(height_mm, 2),
                "u": right.round(5).tolist(),
                "v": down.round(5).tolist(),
                "n": normal.round(5).tolist(),
                "l": [direction_letter(side) for side in (-right, right, -down, down)],
            }
        )
        alike = [other for other in study.volumes if other.description == volume.description]
        place = next(i for i, other in enumerate(alike) if other is volume)
        for k in range(len(volume.array)):
            if (number, k) not in pictures:
                continue
            cuts = [
                (LEVELS.index(box.level), int(box.confidence >= 0.5), box_on_slice(box, volume, k)) for box in boxes
            ]
            rings = [] if points is None else points_on_slice(points, volume, k).itertuples()
            panels[DESCRIPTIONS.index(volume.description)].append(
                {
                    "s": number,
                    "i": pictures[number, k],
                    "o": volume.voxel_to_lps([k, -0.5, -0.5]).round(3).tolist(),
                    "c": slice_caption(volume, k, boxes)
                    + (f" (stack {place + 1} of {len(alike)})" if len(alike) > 1 else ""),
                    "b": [
                        [level, sure, np.ravel(_picture_mm(polygon, pixel_mm)).tolist()]
                        for level, sure, polygon in cuts
                        if len(polygon)
                    ],
                    "p": [
                        [
                            LEVELS.index(row.level),
                            *_picture_mm((row.x_px, row.y_px), pixel_mm),
                            f"{level_name(row.level)} {CONDITION_NAMES[CONDITIONS.index(row.condition)].lower()}",
                        ]
                        for row in rings
                    ],
                }
            )
    start = condition_point(boxes[-2], 0).round(1).tolist() if len(boxes) > 1 else None
    return {"stacks": stacks, "panels": panels, "colours": LEVEL_COLOURS, "levels": LEVEL_NAMES, "start": start}


def grade_table_html(probabilities=None, truth=None, boxes=()):
    """A study's 25 cells as an HTML table: most probable grade, its probability, a bar, the grade in the labels."""
    head = "".join(f"<th scope=col>{name}</th>" for name in ("Level", *CONDITION_NAMES))
    points = {box.level: box for box in boxes}
    rows = []
    for number, level in enumerate(LEVELS):
        cells = [f"<th scope=row>{LEVEL_NAMES[number]}</th>"]
        for condition in range(len(CONDITIONS)):
            text, read = "", -1 if truth is None else int(truth[condition][number])
            if probabilities is not None and np.isfinite(probabilities[condition][number]).all():
                p = np.asarray(probabilities[condition][number], np.float64)
                guess = int(p.argmax())
                bar = "".join(
                    f"<i style='width:{100 * part:.1f}%;background:{colour}'></i>"
                    for part, colour in zip(p, SEVERITY_COLOURS)
                )
                spoken = ", ".join(f"{grade} {part:.0%}" for grade, part in zip(GRADES, p))
                text = f"<span title='{spoken}'>{GRADES[guess]} {p[guess]:.0%}</span>"
                if read >= 0:
                    text += f"<br><span class='{'miss' if read != guess else 'hit'}'>label: {GRADES[read]}</span>"
                text += f"<div class=bar aria-hidden=true>{bar}</div>"
            elif read >= 0:
                text = f"label: {GRADES[read]}"
            go = ""
            if level in points:
                point = json.dumps(condition_point(points[level], condition).round(1).tolist())
                go = f" tabindex=0 data-point='{point}' title='show this place in all series'"
            cells.append(f"<td{go}>{text or '&ndash;'}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def study_html(
    study, boxes=None, points=None, probabilities=None, truth=None, title=None, page=False, max_bytes=2_400_000
):
    """A study to leaf through in any browser, offline: one file or fragment with pictures, style and script inside.

    study: normalised Study; boxes: LevelBoxes (outlined; dashed below a confidence of 0.5); points: label points as
    read_coordinates has them; probabilities: (5, 5, 3) and truth: (5, 5) grades of this study, -1 missing, for the
    table below the images (a click on a cell moves all series to that place); title: any text, escaped here.
    page: a whole page instead of a fragment for a notebook or report; several fragments on a page do not disturb
    each other. max_bytes: for the pictures, which become coarser to fit. Shows no id but the study's, in `title`.
    Slices turn with slider, mouse wheel, and, on a clicked image, arrow keys. Returns the HTML text.
    """
    boxes = list(boxes or ())
    points = None if points is None else points[points["study_id"] == study.study_id]
    data = _viewer_data(study, boxes, points, max_bytes)
    name = html.escape(title or f"Study {study.study_id}")
    figures = []
    for number, (description, frames) in enumerate(zip(DESCRIPTIONS, data["panels"])):
        if not frames:
            figures.append(
                f"<figure><figcaption><b>{description}</b><span></span></figcaption>"
                "<div class=none>no such series in this study</div></figure>"
            )
            continue
        figures.append(
            f"<figure data-panel={number}><figcaption><b>{description}</b><span></span></figcaption>"
            f"<svg tabindex=0 role=img aria-label='{description}'><image preserveAspectRatio=none></image><g></g></svg>"
            f"<input type=range min=0 max={len(frames) - 1} value={len(frames) // 2} "
            f"aria-label='slice of {description}'>"
            "</figure>"
        )
    table = (
        grade_table_html(probabilities, truth, boxes)
        if any(x is not None for x in (probabilities, truth)) or boxes
        else ""
    )
    swatches = "".join(
        f"<i class=swatch style='background:{colour}'></i>{grade}" for grade, colour in zip(GRADES, SEVERITY_COLOURS)
    )
    identity = f"viewer-{uuid.uuid4().hex}"
    # Nothing from outside is among these texts, so none can end the script.
    numbers = json.dumps(data, separators=(",", ":"))
    script = _VIEWER_SCRIPT.replace("ROOT_ID", f"'{identity}'", 1).replace("DATA", numbers, 1)
    fragment = (
        f"<style>{_VIEWER_STYLE}</style><section class=lumbar-viewer id={identity}><h3>{name}</h3>"
        "<p>Slider, mouse wheel or, after a click on an image, arrow keys turn the slices. "
        "A click on a cell of the table shows its place in all series. Dashed white: where the others' slices cut.</p>"
        "<div class=tools><label><input type=checkbox data-show=boxes checked> level boxes</label>"
        "<label><input type=checkbox data-show=points checked> label points</label>"
        "<label><input type=checkbox data-show=lines checked> slice lines</label>"
        "<label>brightness<input type=range data-light min=0.4 max=2.5 step=0.05 value=1></label></div>"
        f"<div class=panels>{''.join(figures)}</div>{table}"
        + (
            f"<div class=legend>Probabilities:{swatches}. Bold: the label is not the most probable grade.</div>"
            if probabilities is not None
            else ""
        )
        + f"<noscript>The images need JavaScript.</noscript></section><script>{script}</script>"
    )
    if not page:
        return fragment
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<meta name=color-scheme content='light dark'><title>{name}</title></head><body>{fragment}</body></html>\n"
    )


def inspect_study(paths, levels=None, coordinates=None, labels=None, submission=None):
    """Live viewer for a notebook: study, series, slice, level, condition, window; needs a running kernel.

    paths: dict study_id -> volume file, as study_paths returns it; levels: levels.csv as a table; coordinates: as
    read_coordinates has them; labels: train.csv's wide form; submission: any table of predictions. Choosing a level
    or condition moves to the slice on which it is graded. Returns an ipywidgets.VBox whose `.controls` are the
    widgets by name. Raises ValueError when there is no study.
    """
    import ipywidgets as widgets

    if not paths:
        raise ValueError("no study to look at: paths is empty (run 01_preprocess first)")
    predicted = dict(zip(*from_submission(submission))) if submission is not None else {}
    truths = dict(zip(*labels_to_array(labels))) if labels is not None else {}
    wide = {"style": {"description_width": "70px"}, "layout": widgets.Layout(width="330px")}
    controls = {
        "study": widgets.Dropdown(description="study", options=sorted(paths), **wide),
        "series": widgets.Dropdown(description="series", **wide),
        "slice": widgets.IntSlider(description="slice", min=0, max=0, continuous_update=True, **wide),
        "level": widgets.Dropdown(description="level", options=list(zip(LEVEL_NAMES, range(5))), value=3, **wide),
        "condition": widgets.Dropdown(description="condition", options=list(zip(CONDITION_NAMES, range(5))), **wide),
        "window": widgets.FloatRangeSlider(
            description="window", value=(0.0, 1.0), min=-0.2, max=2.0, step=0.02, **wide
        ),
    }
    image, table = widgets.Image(format="png"), widgets.HTML()
    state = {"study": None, "boxes": [], "busy": False}

    def redraw(change=None):
        if state["busy"]:
            return
        study, boxes = state["study"], state["boxes"]
        box = boxes[controls["level"].value] if boxes else None
        volume = study.volumes[controls["series"].value] if study.volumes else None
        image.value = _inspection_png(
            study,
            volume,
            controls["slice"].value,
            controls["window"].value,
            boxes,
            box,
            coordinates,
            controls["condition"].value,
        )
        table.value = (
            grade_table_html(predicted.get(study.study_id), truths.get(study.study_id)) if predicted or truths else ""
        )

    def choose_series(number):
        controls["series"].value = number
        count = len(state["study"].volumes[number].array)
        controls["slice"].max = count - 1
        controls["slice"].value = count // 2

    def go_to_level(change=None):
        """The series and slice on which the chosen condition is graded at the chosen level."""
        condition, volumes = controls["condition"].value, state["study"].volumes
        wanted = next(description for description, members in DETECTORS.values() if condition in members)
        found = [number for number, volume in enumerate(volumes) if volume.description == wanted] or range(len(volumes))
        if not volumes or (change is not None and state["busy"]):
            return
        was_busy, state["busy"] = state["busy"], True
        if state["boxes"]:
            point = condition_point(state["boxes"][controls["level"].value], condition)
            volume = nearest_volume([volumes[number] for number in found], point)
            choose_series(next(number for number, other in enumerate(volumes) if other is volume))
            controls["slice"].value = nearest_slice(volume, point)[0]
        else:
            choose_series(found[0])
        state["busy"] = was_busy
        redraw()

    def load(change=None):
        state["busy"] = True
        study_id = controls["study"].value
        state["study"] = load_study(paths[study_id])
        there = levels is not None and (levels["study_id"] == study_id).any()
        state["boxes"] = boxes_from_table(levels, study_id) if there else []
        controls["series"].options = [
            (f"{volume.description}, {len(volume.array)} slices", number)
            for number, volume in enumerate(state["study"].volumes)
        ]
        go_to_level()
        state["busy"] = False
        redraw()

    def series_changed(change):
        if not state["busy"] and change["new"] is not None:
            state["busy"] = True
            choose_series(change["new"])
            state["busy"] = False
            redraw()

    controls["study"].observe(load, "value")
    controls["series"].observe(series_changed, "value")
    for name, action in (("slice", redraw), ("window", redraw), ("level", go_to_level), ("condition", go_to_level)):
        controls[name].observe(action, "value")
    load()
    viewer = widgets.VBox([widgets.HBox([widgets.VBox(list(controls.values())), image]), table])
    viewer.controls = controls
    return viewer


def _inspection_png(study, volume, index, window, boxes, box, coordinates, condition):
    """The live viewer's picture as PNG bytes: a slice, and three planes of the level's crop of the same series kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    axes = figure.subplot_mosaic(
        [["slice", "slice", "sagittal"], ["slice", "slice", "coronal"], ["slice", "slice", "axial"]]
    )
    if volume is None:
        axes["slice"].set_title("; ".join(study.problems)[:120] or "no readable series", fontsize=9, wrap=True)
    else:
        plot_slice(axes["slice"], volume, index, window, boxes)
        plot_level_boxes(axes["slice"], boxes, volume, index)
        if coordinates is not None:
            plot_label_points(axes["slice"], coordinates, volume, index)
    planes = [axes[name] for name in ("sagittal", "coronal", "axial")]
    if volume is None or box is None:
        for ax in planes:
            ax.set_axis_off()
    else:
        size_mm = (56.0, 96.0, 96.0)
        crop, covered = crop_level(study, box, (56, 96, 96), size_mm)
        channel = DESCRIPTIONS.index(volume.description)
        plot_level_crop(planes, crop[channel], covered[channel], size_mm, window)
        planes[0].set_title(f"{level_name(box.level)} on {volume.description}: sagittal", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return file.getvalue()


_PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--soft:#555;--paper:#fff;--rule:#ccc;--stripe:#f4f6f8}
@media (prefers-color-scheme:dark){:root{--ink:#eaeaea;--soft:#b5b5b5;--paper:#161616;--rule:#444;--stripe:#202326}}
body{margin:0 auto;padding:24px 20px 80px;max-width:1060px;background:var(--paper);
 color:var(--ink);font:16px/1.55 system-ui,sans-serif}
h1{font-size:1.9em;line-height:1.2}h2{margin-top:2.2em;border-bottom:1px solid var(--rule);padding-bottom:.2em}
img{max-width:100%;height:auto}img,.output_png img{background:#fff;border-radius:4px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
table.kit{margin:10px 0}caption{color:var(--soft);padding:4px 0}
th,td{padding:4px 10px;border-bottom:1px solid var(--rule);text-align:left}
table.kit tbody tr:nth-child(even){background:var(--stripe)}
pre{white-space:pre-wrap;font-size:13px;color:var(--soft)}code{font-size:.92em}
.anchor-link,.jp-InputPrompt,.jp-OutputPrompt,.prompt{display:none}
.jp-OutputArea-output,.output_html,.jp-RenderedHTMLCommon{overflow-x:auto}
"""


def export_html(notebook, page, title=None, printed=False):
    """An executed notebook as one HTML page without its code that needs no network: for readers, not for editing.

    notebook: .ipynb; page: the .html to write; title: of the browser's tab (default: the notebook's first heading);
    printed: keep what cells print, too. Keeps text, figures and HTML outputs; leaves out code, progress bars (stderr)
    and widgets, which need a kernel.
    Returns the path. Raises FileNotFoundError without the notebook.
    """
    import nbformat
    from nbconvert import HTMLExporter

    if not Path(notebook).is_file():
        raise FileNotFoundError(f"{notebook} does not exist: run it with papermill first")
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if (output.output_type != "stream" or (printed and output.name == "stdout"))
                and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]
    if title is None:
        headings = [
            line.lstrip("# ")
            for cell in content.cells
            if cell.cell_type == "markdown"
            for line in cell.source.splitlines()
            if line.startswith("# ")
        ]
        title = headings[0] if headings else Path(notebook).stem
    # nbconvert's "basic" template is the bare body: none of the libraries that the others load from the network.
    exporter = HTMLExporter(
        template_name="basic", exclude_input=True, exclude_output_prompt=True, exclude_input_prompt=True
    )
    body, _ = exporter.from_notebook_node(content)
    return write_text(
        page,
        (
            "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{_PAGE_STYLE}</style></head><body>{body}</body></html>\n"
        ),
    )
