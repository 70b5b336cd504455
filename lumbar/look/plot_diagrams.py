"""Figures that explain: the way from images to the submission, one score and its three probabilities.

Each function draws into `ax` and returns it.

May use: slices, names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..names import GRADES
from .slices import MEMBER_COLOURS, SEVERITY_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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

    Parameters
    ----------
    ax : Axes
    here : tuple of str
        Steps to highlight: images, 01, 02, 03, slices, level, study, 05, submission.

    Returns
    -------
    ax : Axes

    Raises
    ------
    ValueError
        Another name.
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
        box = FancyBboxPatch(
            (x - 0.42, y - 0.27),
            0.84,
            0.54,
            "round,pad=0,rounding_size=0.06",
            mutation_aspect=1.5,
            facecolor=face,
            edgecolor=edge,
        )
        ax.add_patch(box)
        ax.text(x, y, text, ha="center", va="center", fontsize=8, linespacing=1.4)
    ax.set_xlim(-0.5, 5.5)
    ax.set_ylim(2.6, -0.4)
    ax.set_axis_off()
    return ax


def plot_cumulative_logits(ax: Axes, prior: np.ndarray, example: float = 1.5) -> Axes:
    """Draw how one score becomes three probabilities: the score's axis, two cut points, a curve for each class.

    Parameters
    ----------
    ax : Axes
    prior : (3,) array
        Class probabilities at score 0, which place the cut points: P(class <= k) = sigmoid(cut_k - score).
    example : float
        A score at which the three probabilities are read off.

    Returns
    -------
    ax : Axes
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
