"""Figures of what was predicted and how good it is: grades, probabilities, scores, errors.

Each function draws into `ax` and returns it.

May use: slices, names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..names import CONDITIONS, GRADES, LEVELS
from .slices import CONDITION_NAMES, LEVEL_NAMES, MEMBER_COLOURS, SEVERITY_COLOURS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


def plot_scores(
    ax: Axes,
    scores: Mapping[str, float],
    references: Mapping[str, float] | None = None,
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Axes:
    """Bars of scores (lower is better), best at the top; references as dotted lines with their names.

    Scores that are not finite are left out.

    Parameters
    ----------
    ax : Axes
    scores, references : mapping of str to float
        Name -> score.
    intervals : mapping of str to (2,) tuple of float, optional
        Name of a score -> (low, high), drawn as whiskers.

    Returns
    -------
    ax : Axes
    """
    scores = {name: value for name, value in scores.items() if np.isfinite(value)}
    order = sorted(scores, key=lambda name: scores[name], reverse=True)
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


def plot_grid(
    ax: Axes, values: ArrayLike, reference: np.ndarray | None = None, counts: np.ndarray | None = None
) -> Axes:
    """Numbers per condition (rows) and level (columns), tinted.

    Parameters
    ----------
    ax : Axes
    values : (5, 5) array-like
        NaN is left empty.
    reference : (5, 5) array, optional
        Such as the class prior's loss; then blue is below (better than) it and red above.
    counts : (5, 5) int array, optional
        Written below the numbers.

    Returns
    -------
    ax : Axes
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


def plot_confusion(ax: Axes, truth: ArrayLike, probabilities: ArrayLike) -> Axes:
    """Table of read grade (rows) against most probable grade (columns): per cent of each row, and counts.

    Parameters
    ----------
    ax : Axes
    truth : (...) int array-like
        -1 is left out.
    probabilities : (..., 3) array-like
        By severity; finite where there is a grade.

    Returns
    -------
    ax : Axes
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


def plot_reliability(ax: Axes, truth: ArrayLike, probabilities: ArrayLike, bins: int = 8) -> Axes:
    """Predicted probability against how often it came true, one curve a grade, in bins of equal count.

    On the diagonal the probabilities can be taken at their word. The bars are 95% Wilson intervals; "off by" is the
    mean distance to the diagonal, weighted by count.

    Parameters
    ----------
    ax : Axes
    truth : (...) int array-like
        -1 is left out.
    probabilities : (..., 3) array-like
        By severity; finite where there is a grade.
    bins : int
        How many on each curve.

    Returns
    -------
    ax : Axes
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


def plot_class_counts(ax: Axes, grades: np.ndarray) -> Axes:
    """Draw how many gradings of each class there are: one bar a condition and level, rare classes at the bottom.

    Parameters
    ----------
    ax : Axes
    grades : (n, 5, 5) int array
        By study, condition and level; -1 is missing and drawn in grey on top.

    Returns
    -------
    ax : Axes
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


def plot_probabilities(ax: Axes, probabilities: Sequence[float] | np.ndarray, grade: int = -1) -> Axes:
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


def plot_level_errors(ax: Axes, errors: pd.DataFrame, held_out: Iterable[int] = ()) -> Axes:
    """Histogram of the distances between found and true disc centres, held-out studies apart.

    Parameters
    ----------
    ax : Axes
    errors : DataFrame
        From level_errors.
    held_out : iterable of int
        Study ids.

    Returns
    -------
    ax : Axes
    """
    apart = errors["study_id"].isin(held_out)
    bins = np.linspace(0, max(10.0, min(errors["error_mm"].max(), 30.0)), 41).tolist()
    rest = "training studies" if apart.any() else "all studies"
    for part, name in ((errors[~apart], rest), (errors[apart], "held out")):
        if len(part):
            label = f"{name} ({len(part)} levels)"
            ax.hist(part["error_mm"].clip(upper=bins[-1]), bins, density=True, alpha=0.6, label=label)
    ax.set(xlabel="distance of disc centres (mm)", ylabel="share per mm")
    ax.legend(frameon=False)
    return ax
