"""Looking: plots, tables, the report as a page."""

import html
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from .ensemble import align_members
from .files import class_prior, make_folds, score_arrays, term_sums
from .geometry import boxes_from_table, coordinates_to_lps, nearest_slice, on_image, point_cloud
from .levels import compare_with_labels
from .names import CONDITIONS, DESCRIPTIONS, DETECTORS, GRADES, LEVELS, SEVERITY_WEIGHTS
from .stages import read_manifest
from .storage import write_text
from .volume import load_study

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


def corners_on_slice(corners_lps, volume, index):
    """Where a slice cuts a prism: polygon (n, 2) as x_px, y_px of pixel centres in order, n = 0 if it does not.

    corners_lps: (8, 3) in LPS mm, numbered in binary as LevelBox.corners_lps has them.
    """
    voxels = volume.lps_to_voxel(corners_lps)
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


def box_on_slice(box, volume, index):
    """Where a slice cuts a LevelBox: polygon (n, 2) as x_px, y_px of pixel centres in order, n = 0 if it does not."""
    return corners_on_slice(box.corners_lps(), volume, index)


def points_on_slice(points, volume, index):
    """Rows of a table of label points (see read_coordinates) that lie on one slice of a volume."""
    return points[
        (points["series_id"] == volume.series_id)
        & (points["instance_number"] == int(volume.instance_numbers[index]))
        & on_image(volume, points["x_px"], points["y_px"])
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


def plot_scores(ax, scores, references=None, intervals=None):
    """Bars of scores (lower is better), best at the top; references as dotted lines with their names.

    scores, references: dicts of name -> score. Scores that are not finite are left out. intervals: dict of name ->
    (low, high), drawn as whiskers.
    """
    scores = {name: value for name, value in scores.items() if np.isfinite(value)}
    order = sorted(scores, key=scores.get, reverse=True)
    ax.barh(range(len(order)), [scores[name] for name in order], height=0.6, color=MEMBER_COLOURS[0])
    ends = [scores[name] for name in order]
    for position, name in enumerate(order):
        low, high = (intervals or {}).get(name, (np.nan, np.nan))
        if np.isfinite(low) and np.isfinite(high):
            ax.plot([low, high], [position] * 2, color="0.25", linewidth=1.6, solid_capstyle="butt")
            ends[position] = max(high, scores[name])
        ax.text(ends[position], position, f" {scores[name]:.3f}", va="center", fontsize=8)
    ax.set_yticks(range(len(order)), order, fontsize=8)
    ax.set_ylim(-0.6, len(order) - 0.4)
    lines = {name: value for name, value in (references or {}).items() if np.isfinite(value)}
    for number, (name, value) in enumerate(sorted(lines.items(), key=lambda item: item[1])):
        colour = MEMBER_COLOURS[(4, 2, 3)[number % 3]]
        ax.axvline(value, color=colour, linestyle=":", linewidth=1.4, label=f"{name}: {value:.3f}")
    ax.set_xlim(0, 1.15 * max([*ends, *lines.values(), 1e-9]))
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
                label=" ".join(filter(None, [name, names.get(column, column)])).replace("$", r"\$"),  # no formula
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


def score_table(grades, predictions, draws=0):
    """The metric's terms of several predictions: DataFrame, one row a name, columns of TERM_NAMES and rows.

    predictions: dict name -> (n, 5, 5, 3), NaN where there is none. A member that grades only some conditions or
    studies is scored on those (`rows` counts them); its terms without a row are NaN, and so is its total.
    With a `Class prior` and a `Perfect reader` among them, `closed` is how much of the distance between the two each
    prediction closes: 0 is no better than the prior, 1 is perfect. draws: above 0, `low` and `high` are the total's
    95% interval over so many draws of resampled_scores.
    """
    table = {}
    for name, probabilities in predictions.items():
        there, known = _graded_rows(grades, probabilities)
        scores = score_arrays(there, known) if (there >= 0).any() else dict.fromkeys(TERM_NAMES, np.nan)
        table[name] = {**scores, "rows": int((there >= 0).sum())}
    table = pd.DataFrame.from_dict(table, orient="index")
    if draws:
        totals = np.stack([drawn[:, -1] for drawn in resampled_scores(grades, predictions, draws).values()], 1)
        for place, (end, percent) in enumerate((("low", 2.5), ("high", 97.5))):
            table.insert(len(TERM_NAMES) + place, end, percentiles(totals, percent))
    if {"Class prior", "Perfect reader"} <= set(table.index):
        prior, perfect = table.loc["Class prior", "total"], table.loc["Perfect reader", "total"]
        table.insert(table.columns.get_loc("rows"), "closed", (prior - table["total"]) / (prior - perfect))
    return table


def _graded_rows(grades, probabilities):
    """(grades, probabilities) with -1 and 1/3 where a prediction is missing."""
    there = (np.asarray(grades) >= 0) & np.isfinite(probabilities).all(-1)
    return np.where(there, grades, -1), np.where(there[..., None], probabilities, 1 / 3)


def resampled_scores(grades, predictions, draws=1000, seed=0):
    """The score on studies drawn anew with replacement, the bootstrap: dict name -> (draws, 5), TERM_NAMES' terms.

    predictions as in score_table. All of them meet the same draws, so that differences between two of them can be
    taken draw by draw. A term that has nothing to weigh in a draw is NaN there, and so is the total.
    """
    count = len(grades)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws).astype(np.float64)
    scores = {}
    for name, probabilities in predictions.items():
        there, known = _graded_rows(grades, probabilities)
        loss, weight = term_sums(there, known / known.sum(-1, keepdims=True))
        with np.errstate(invalid="ignore", divide="ignore"):
            terms = (times @ loss) / (times @ weight)
        scores[name] = np.concatenate([terms, terms.mean(1, keepdims=True)], 1)
    return scores


def percentiles(values, percent):
    """Percentile(s) of each column of values (n, k), NaN left out: ([p,] k), NaN for a column that has nothing else."""
    known = np.isfinite(values).any(0)
    return np.where(known, np.nanpercentile(np.where(known, values, 0), percent, axis=0), np.nan)


def interval_text(low, high, digits=3):
    """`0.31 to 0.38`, or a dash."""
    return f"{low:.{digits}f} to {high:.{digits}f}" if np.isfinite(low) and np.isfinite(high) else "\N{EN DASH}"


def term_table(grades, predictions, name, reference, draws=1000):
    """One prediction's terms beside a reference's: DataFrame by term with 95% intervals over resampled studies.

    predictions as in score_table; name, reference: keys of it. Columns: the reference's and the prediction's score,
    its interval, how much lower it is than the reference, and that difference's interval (text).
    """
    table = score_table(grades, {key: predictions[key] for key in (reference, name)})
    drawn = resampled_scores(grades, {key: predictions[key] for key in (reference, name)}, draws)
    rows = {}
    for place, (term, title) in enumerate(TERM_NAMES.items()):
        own, gain = drawn[name][:, place], drawn[reference][:, place] - drawn[name][:, place]
        ends = [interval_text(*percentiles(x[:, None], [2.5, 97.5])[:, 0]) for x in (own, gain)]
        rows[title] = {
            reference: table.loc[reference, term],
            name: table.loc[name, term],
            "95% interval": ends[0],
            "Lower by": table.loc[reference, term] - table.loc[name, term],
            "its 95% interval": ends[1],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Term")


def problem_table(sentences):
    """What was left out or doubtful, counted: DataFrame what, times, example, the most frequent first.

    sentences: problems of read_study, as series.csv and inference_log.csv have them. Those that differ only in
    studies, series, files and numbers count as one.
    """
    rows = {}
    for sentence in sentences:
        what = re.sub(r"^study \d+(, series \d+)?: ", "", sentence)
        what = re.sub(r"\S+\.dcm\b", "a file", what)
        what = re.sub(r"\d+(\.\d+)?", "\N{HORIZONTAL ELLIPSIS}", what)
        times, example = rows.get(what, (0, sentence))
        rows[what] = (times + 1, example)
    table = [(what, times, example) for what, (times, example) in rows.items()]
    table.sort(key=lambda row: (-row[1], row[0]))
    return pd.DataFrame(table, columns=["what", "times", "example"])


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


def ensemble_table(ensemble):
    """What ensemble.json holds, for people: DataFrame, one row a group of conditions."""
    groups = list(ensemble["weights"])
    table = pd.DataFrame(ensemble["weights"]).T
    table["Temperature"] = [ensemble["temperature"][group] for group in groups]
    for k, grade in enumerate(GRADES[1:], 1):
        table[f"Bias, {grade.lower()}"] = [ensemble["bias"][group][k] for group in groups]
    table["Floor"] = [ensemble.get("floor", {}).get(group, 0.0) for group in groups]
    table["Stacker"] = [group in ensemble.get("stacker", {}).get("coefficients", {}) for group in groups]
    table.index = pd.Index([TERM_NAMES[group] for group in groups], name="Condition")
    return table


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
    """dict stage -> manifest of every complete stage in a folder, in the order of their names; see read_manifest."""
    folders = [path.parent for path in sorted(Path(out).glob("*/manifest.json")) if ".old-" not in path.parent.name]
    return {folder.name: manifest for folder in folders if (manifest := read_manifest(folder)) is not None}


def read_histories(out):
    """dict stage -> dict run -> training history: *history*.csv of our own training, results.csv of ultralytics."""
    found = {}
    for path in sorted({*Path(out).glob("*/*history*.csv"), *Path(out).glob("*/**/results.csv")}):
        stage = path.relative_to(out).parts[0]
        if ".old-" not in stage:
            try:
                table = pd.read_csv(path)
            except ValueError as error:  # empty, cut, or no table
                print(f"{path} cannot be read ({error}): its curves are left out")
                continue
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


# -- pages and viewers


def short(value, digits=3):
    """A value of a parameters or counts table as short text: rounded numbers, lists in brackets."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(short(item, digits) for item in value)}]"
    return str(value)


def paragraph_html(text):
    """Any text as a paragraph of a page that shows just this text: for all that comes from files, such as names,
    versions and problems. In Markdown it would be obeyed: HTML, links, images, formulas."""
    return f"<p>{html.escape(str(text))}</p>"


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
    from bs4 import BeautifulSoup  # nbconvert's
    from bs4.formatter import HTMLFormatter
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
    # nbconvert parses the page and writes quotes in texts as they are. Nothing in a text shall look like an attribute.
    body = BeautifulSoup(body, "html.parser").decode(formatter=HTMLFormatter(entity_substitution=html.escape))
    return write_text(
        page,
        (
            "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{_PAGE_STYLE}</style></head><body>{body}</body></html>\n"
        ),
    )
