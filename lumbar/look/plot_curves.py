"""Figures of trainings: losses and held-out scores over steps and epochs.

Each function draws into `ax` and returns it.

May use: slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .slices import MEMBER_COLOURS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes


def plot_spinenet_history(ax: Axes, history: pd.DataFrame) -> Axes:
    """Draw a training curve (history of train_spinenet): the loss smoothed, the validation's points.

    Parameters
    ----------
    ax : Axes
    history : DataFrame
        step, loss, split (`train` or `validation`).

    Returns
    -------
    ax : Axes
    """
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


def plot_yolo_training(ax: Axes, results_csv: str | Path, label: str | None = None) -> Axes:
    """Training losses (box, class, distribution) per epoch of one run's results.csv, and mAP50 where it was measured,
    on a second axis.

    Parameters
    ----------
    ax : Axes
    results_csv : path
        As ultralytics writes it; an mAP50 of 0 counts as not measured.
    label : str, optional
        Added to the losses' names in the legend.

    Returns
    -------
    ax : Axes
    """
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


def plot_learning_curves(
    ax: Axes, histories: Mapping[str, pd.DataFrame], columns: Sequence[str] = ("loss", "total"), x: str = "epoch"
) -> Axes:
    """Columns of training histories over their epochs: one colour a history, one line style a column.

    Parameters
    ----------
    ax : Axes
    histories : mapping of str to DataFrame
        Name (of a fold) -> history.
    columns : sequence of str
        Columns that a history lacks and cells without a number are left out, so losses and scores may be written at
        different epochs; of more than four that it has the first four are drawn.
    x : str
        Column of the horizontal axis.

    Returns
    -------
    ax : Axes
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
