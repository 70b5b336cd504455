"""Figures: each function draws into `ax` and returns it.

May use: slices, grade, spine, data, names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ..data.geometry import coordinates_to_lps, nearest_slice
from ..names import CONDITIONS, DESCRIPTIONS, DETECTORS, GRADES, LEVELS
from ..spine.fallbacks import _NOT_SEEN
from .slices import (
    CONDITION_NAMES,
    LEVEL_COLOURS,
    LEVEL_NAMES,
    MEMBER_COLOURS,
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
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from ..data.geometry import LevelBox
    from ..data.volume import Study

# -- pictures


def plot_spinenet_target(ax, item):
    """Draw an item of SpineSlices: the crop, corners as dots, their vectors as lines to the centroid. Returns ax."""
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


def plot_spinenet_history(ax, history):
    """Draw a training curve (history of train_spinenet): the loss smoothed, the validation's points. Returns ax."""
    train, validation = (history[history["split"] == split] for split in ("train", "validation"))
    ax.plot(train["step"], train["loss"], color="tab:blue", alpha=0.2)
    ax.plot(
        train["step"],
        train["loss"].rolling(max(len(train) // 20, 1), min_periods=1).mean(),
        color="tab:blue",
        label="training (augmented)",
    )
    if len(validation):
        ax.plot(validation["step"], validation["loss"], "o-", color="tab:orange", label="validation")
    ax.set(xlabel="step", ylabel="loss", yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.legend(frameon=False)
    return ax


def plot_vertebrae(ax, volume, index, vertebrae, boxes=()):
    """Draw one sagittal slice with bodies, names and level boxes. Returns ax.

    volume: Volume; index: of the slice; vertebrae: Vertebrae; boxes: LevelBoxes. Both are drawn where they are
    projected onto the slice; what no sagittal image showed is dashed.
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
        known = not any(word in vertebra.source for word in _NOT_SEEN.split("|"))
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


def plot_level_errors(ax, errors, held_out=()):
    """Histogram of the distances between found and true disc centres, held-out studies apart. Returns ax.

    errors: from level_errors; held_out: study ids.
    """
    apart = errors["study_id"].isin(held_out)
    bins = np.linspace(0, max(10.0, min(errors["error_mm"].max(), 30.0)), 41)
    rest = "training studies" if apart.any() else "all studies"
    for part, name in ((errors[~apart], rest), (errors[apart], "held out")):
        if len(part):
            label = f"{name} ({len(part)} levels)"
            ax.hist(part["error_mm"].clip(upper=bins[-1]), bins, density=True, alpha=0.6, label=label)
    ax.set(xlabel="distance of disc centres (mm)", ylabel="share per mm")
    ax.legend(frameon=False)
    return ax


def plot_detections(ax, patch, scores, centers_px, box_px, truth=(), threshold=0.1, top=8):
    """Show a patch with the strongest anchors of dense_scores and, dashed, the label boxes. Returns ax.

    patch: (rows, columns) uint8; scores: (anchors, 3); centers_px: (anchors, 2); box_px: side of the square drawn;
    truth: rows (class, xc, yc, w, h) as in YOLO's label files. Also (anchors, classes) of the original scheme, whose
    classes' severity is their number modulo 3.
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
    best, shown = scores.max(axis=1), []
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


def plot_yolo_training(ax, results_csv, label=None):
    """Training losses (box, class, distribution) per epoch of one run's results.csv, and mAP50 where it was measured,
    on a second axis. Returns ax."""
    table = pd.read_csv(results_csv)
    table.columns = [name.strip() for name in table.columns]
    for name in [name for name in table.columns if name.startswith("train/")]:
        ax.plot(table["epoch"], table[name], label=f"{name[6:]}{'' if label is None else f' {label}'}")
    ax.set_xlabel("epoch")
    ax.set_ylabel("training loss")
    ax.legend(loc="upper right", fontsize=7)
    measured = table[table["metrics/mAP50(B)"] > 0]
    if len(measured):
        right = ax.twinx()
        right.plot(measured["epoch"], measured["metrics/mAP50(B)"], "k.--", lw=1)
        right.set_ylim(0, 1)
        right.set_ylabel("validation mAP50 (dashed)")
    return ax


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
    coverage: (3, d, h, w) bool; what no slice covers is tinted blue. extent_mm: (head, left, back) for proportions and
    the names of the axes.
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
    names = {"sagittal": ("head-foot", "front-back"), "coronal": ("head-foot", "left-right")}
    names["axial"] = ("front-back", "left-right")
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
            if extent_mm is not None:
                ax.set_ylabel(f"{names[name][0]}, {tall_mm:g} mm", fontsize=7)
            if extent_mm is not None and channel == len(rows) - 1:
                ax.set_xlabel(f"{names[name][1]}, {wide_mm:g} mm", fontsize=7)
        if len(rows) == 3:
            description = f"channel {channel}: {DESCRIPTIONS[channel]}"
            beside = {"xycoords": "axes fraction", "textcoords": "offset points", "rotation": 90, "va": "center"}
            row[0].annotate(description, (0, 0.5), (-30, 0), ha="center", fontsize=8, **beside)
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


# -- what the notebooks explain by a picture

# Steps of a run: name -> (column, row, text). Columns run from the images to the submission.
_STEPS = {
    "images": (0, 1, "DICOM series\nT1, T2/STIR, axial T2"),
    "01": (1, 1, "01 Volumes\nin patient millimetres"),
    "02": (2, 1, "02 SpineNet\na box for each disc"),
    "03": (3, 0, "03 YOLO detectors\nseverity on slices"),
    "slices": (3, 0.75, "04 Native slices\n2D network, sequence"),
    "level": (3, 1.5, "04 Level crops\nCoAtNet"),
    "study": (3, 2.25, "04 Whole study\nMaxViT"),
    "05": (4, 1, "05 Ensemble\nweighted, calibrated"),
    "submission": (5, 1, "submission.csv\n25 rows a study"),
}
_FLOW = "images>01 01>02 02>03 02>slices 02>level 02>study 03>05 slices>05 level>05 study>05 05>submission"


def plot_pipeline(ax: Axes, here: tuple[str, ...] = ()) -> Axes:
    """Draw the steps from images to submission as boxes and arrows.

    here: steps to highlight: 01, 02, 03, slices, level, study, 05. Returns ax. Raises ValueError for another name.
    """
    from matplotlib.patches import FancyBboxPatch

    if unknown := set(here) - set(_STEPS):
        raise ValueError(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(_STEPS)}")
    for pair in _FLOW.split():
        (x0, y0, _), (x1, y1, _) = (_STEPS[name] for name in pair.split(">"))
        style = {"arrowstyle": "-|>", "color": "0.45", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
        ax.annotate("", (x1 - 0.42, y1), (x0 + 0.42, y0), arrowprops=style)
    for name, (x, y, text) in _STEPS.items():
        face, edge = ("#FFE3B0", MEMBER_COLOURS[1]) if name in here else ("#EAF3FA", MEMBER_COLOURS[0])
        box = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": face, "edgecolor": edge}
        ax.add_patch(FancyBboxPatch((x - 0.42, y - 0.27), 0.84, 0.54, mutation_aspect=1.5, **box))
        ax.text(x, y, text, ha="center", va="center", fontsize=8, linespacing=1.4)
    ax.set_xlim(-0.5, 5.5)
    ax.set_ylim(2.6, -0.4)
    ax.set_axis_off()
    return ax


def plot_class_counts(ax: Axes, grades: np.ndarray) -> Axes:
    """Draw how many gradings of each class there are: one bar a condition and level, rare classes at the bottom.

    grades: (n, 5, 5) int, -1 is missing and drawn in grey on top. Returns ax.
    """
    grades = np.asarray(grades)
    counts = np.stack([(grades == k).sum(0) for k in (2, 1, 0, -1)])  # (4, conditions, levels)
    place = (np.arange(len(LEVELS)) + (len(LEVELS) + 1) * np.arange(len(CONDITIONS))[:, None]).ravel()
    bottom = np.zeros(len(place))
    colours = (*reversed(SEVERITY_COLOURS), "0.85")
    for part, name, colour in zip(counts.reshape(4, -1), (*reversed(GRADES), "No label"), colours, strict=True):
        if part.any():
            ax.bar(place, part, 0.8, bottom, color=colour, label=f"{name} ({part.sum():,})")
        bottom += part
    ax.set_xticks(place, LEVEL_NAMES * len(CONDITIONS), fontsize=7, rotation=90)
    for number, name in enumerate(CONDITION_NAMES):
        middle = place.reshape(len(CONDITIONS), -1)[number].mean()
        ax.text(middle, 1.02, name, transform=ax.get_xaxis_transform(), ha="center", fontsize=9)
    ax.set_ylabel("studies", fontsize=8)
    ax.tick_params(axis="y", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4)
    return ax


def plot_cumulative_logits(ax: Axes, prior: np.ndarray, example: float = 1.5) -> Axes:
    """Draw how one score becomes three probabilities: the score's axis, two cut points, a curve for each class.

    prior: (3,) class probabilities at score 0, which place the cut points: P(class <= k) = sigmoid(cut_k - score).
    example: a score at which the three probabilities are read off. Returns ax.
    """
    first, second = (float(np.log(p / (1 - p))) for p in np.clip(np.cumsum(prior)[:2], 1e-4, 1 - 1e-4))
    low, high = min(first, 0) - 4, max(second, example, 0) + 4
    score = np.linspace(low, high, 400)

    def classes(at):
        at_most = 1 / (1 + np.exp(np.subtract.outer(at, [first, second])))
        return np.concatenate([at_most[..., :1], np.diff(at_most), 1 - at_most[..., 1:]], -1)

    for severity, p in enumerate(classes(score).T):
        ax.plot(score, p, color=SEVERITY_COLOURS[severity], linewidth=2, label=GRADES[severity])
    for number, cut in enumerate((first, second), 1):
        ax.axvline(cut, color="0.3", linewidth=1.1)
        ax.text(cut, 1.12, f"cut point {number}\n{cut:.1f}", fontsize=8, ha="center", va="bottom")
    for at, what, side in ((0.0, "score 0:\nthe prior", "right"), (example, f"score {example:g}", "left")):
        ax.axvline(at, color="0.5", linewidth=1, linestyle=":")
        shift = 0.08 if side == "left" else -0.08
        ax.text(at + shift, 1.08, what, fontsize=8, ha=side, va="top", color="0.3")
        for severity, p in enumerate(classes(np.array(at))):
            ax.plot(at, p, "o", color=SEVERITY_COLOURS[severity], markersize=5, zorder=3)
            box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
            ax.text(at + shift, p + 0.02, f"{p:.0%}", fontsize=8, ha=side, va="bottom", weight="bold", bbox=box)
    ax.set_xlim(low, high)
    ax.set_ylim(0, 1.12)
    ax.set_yticks([0, 0.5, 1])
    ax.set_xlabel("score: the one number that the network gives for this condition", fontsize=8)
    ax.set_ylabel("probability", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="center right")
    return ax


def plot_crop_gallery(axes: np.ndarray, crops: np.ndarray, titles: list[str], extent_mm: Sequence[float]) -> np.ndarray:
    """Show crops side by side: above the middle sagittal plane of T2/STIR, below an axial plane of axial T2.

    axes: (2, n); crops: (n, channels, d, h, w), axes (channel, head-foot, front-back, right-left); extent_mm: (head,
    left, back). The axial plane is the same in all: the one nearest to the first crop's middle that axial slices
    cover, as far as they cover any. Returns axes.
    """
    crops = np.asarray(crops, dtype=np.float32)
    head_mm, left_mm, back_mm = extent_mm
    axes[0, 0].get_gridspec().set_height_ratios((head_mm, back_mm))
    covered = (crops[0, 1] > 0).mean((1, 2))
    places = np.flatnonzero(covered >= 0.8 * covered.max())
    place = places[np.argmin(np.abs(places - len(covered) // 2))]
    for number, (crop, title) in enumerate(zip(crops, titles, strict=True)):
        planes = ((crop[2, :, :, crop.shape[3] // 2], head_mm, back_mm), (crop[1, place], back_mm, left_mm))
        for ax, (plane, tall_mm, wide_mm) in zip(axes[:, number], planes, strict=True):
            ax.imshow(plane, cmap="gray", vmin=0, vmax=1, extent=(0, wide_mm, tall_mm, 0), interpolation="bilinear")
            ax.set_xticks([])
            ax.set_yticks([])
        axes[0, number].set_title(title, fontsize=8)
    axes[0, 0].set_ylabel("sagittal T2/STIR", fontsize=8)
    axes[1, 0].set_ylabel("axial T2", fontsize=8)
    return axes


def view_name(view: dict) -> str:
    """A test-time view (see TTA_VIEWS) in a few words, one a line: `plain`, `6% smaller,` `mirrored`."""
    words = ["mirrored"] if view.get("mirror") else []
    if "scale" in view:
        words.append(f"{abs(view['scale'] - 1):.0%} {'larger' if view['scale'] > 1 else 'smaller'}")
    for amount, sides in zip(view.get("shift_mm", ()), (("foot", "head"), ("back", "front"), ("left", "right"))):
        words += [f"{abs(amount):g} mm to the {sides[int(amount < 0)]}"] if amount else []
    for amount, turned in zip(view.get("rotation_deg", ()), ("tilted", "twisted", "leant")):
        words += [f"{turned} by {amount:g}\N{DEGREE SIGN}"] if amount else []
    return ",\n".join(words) or "plain"


def plot_study_grades(ax: Axes, probabilities: np.ndarray) -> Axes:
    """Draw a study's 25 predictions: a bar of three probabilities for each level (rows) and condition (columns).

    probabilities: (5 conditions, 5 levels, 3). What is most probably moderate or severe has its percentage. Returns ax.
    """
    from matplotlib.patches import Patch

    for (condition, level), p in zip(np.ndindex(len(CONDITIONS), len(LEVELS)), np.reshape(probabilities, (-1, 3))):
        start = condition - 0.45
        for severity, share in enumerate(0.9 * p / p.sum()):
            ax.barh(level, share, 0.62, start, color=SEVERITY_COLOURS[severity])
            start += share
        guess = int(np.argmax(p))
        if guess:
            text = f"{GRADES[guess].lower()} {p[guess]:.0%}"
            ax.text(condition, level + 0.43, text, ha="center", va="center", fontsize=7)
    ax.set_xticks(range(len(CONDITIONS)), [name.replace(" ", "\n") for name in CONDITION_NAMES], fontsize=8)
    ax.set_yticks(range(len(LEVELS)), LEVEL_NAMES, fontsize=8)
    ax.set_xlim(-0.55, len(CONDITIONS) - 0.45)
    ax.set_ylim(len(LEVELS) - 0.4, -0.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    handles = [Patch(color=colour, label=name) for colour, name in zip(SEVERITY_COLOURS, GRADES, strict=True)]
    ax.legend(handles=handles, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=3)
    return ax


def plot_findings(axes: np.ndarray, study: Study, boxes: list[LevelBox], probabilities: np.ndarray) -> np.ndarray:
    """One predicted study in three axes: the level boxes on the middle sagittal slice, the worst finding enlarged, and
    all 25 predictions.

    axes: (3,); study: Study (normalised); boxes: its five LevelBoxes; probabilities: (5, 5, 3). The worst finding is
    where moderate counts 1 and severe 2. Returns axes.
    """
    volumes = study.of("Sagittal T2/STIR") or study.of("Sagittal T1") or study.volumes
    middle = boxes[len(boxes) // 2].center_lps_mm
    volume = nearest_volume(volumes, middle)
    index = nearest_slice(volume, middle)[0]
    plot_slice(axes[0], volume, index, boxes=boxes)
    plot_level_boxes(axes[0], boxes, volume, index)
    expected = np.asarray(probabilities) @ np.arange(3)
    condition, level = np.unravel_index(np.argmax(expected), expected.shape)
    plot_case(axes[1], study, boxes[level], condition)
    p = probabilities[condition, level]
    guess = int(np.argmax(p))
    axes[1].set_title(
        f"{CONDITION_NAMES[condition]}, {LEVEL_NAMES[level]}:\n{GRADES[guess].lower()} {p[guess]:.0%}", fontsize=9
    )
    plot_study_grades(axes[2], probabilities)
    return axes
