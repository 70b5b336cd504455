"""Test-time views, and which of them pay.

May use: data.metric.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from ..data.metric import EPS, paired_gain, term_sums

View = Mapping[str, Any]  # what a test-time view changes, in plain values: {} is the plain one

# Views of the 3D networks whose log probabilities may be averaged, likely best first; the first is the plain one. What
# each is worth is measured on held-out studies (choose_views). Shifts run along the crop's axes (foot, back, left);
# some views are mirrored as well, so that a set of them looks from both sides.
TTA_VIEWS: tuple[View, ...] = (
    {},
    {"mirror": True},
    {"scale": 1.06},
    {"scale": 0.94, "mirror": True},
    {"shift_mm": [2.0, 0.0, 0.0]},
    {"shift_mm": [-2.0, 0.0, 0.0], "mirror": True},
    {"shift_mm": [0.0, 2.0, 0.0], "mirror": True},
    {"shift_mm": [0.0, -2.0, 0.0]},
    {"rotation_deg": [4.0, 0.0, 0.0]},
    {"rotation_deg": [-4.0, 0.0, 0.0], "mirror": True},
)


# A view has to gain so many standard errors: the best of ten that are worth nothing often gains one.
VIEW_ERRORS = 2.0


def choose_views(
    grades: np.ndarray, log_p: np.ndarray, views: Sequence[View], errors: float = VIEW_ERRORS
) -> tuple[list[dict], pd.DataFrame]:
    """Which views are worth averaging over, from a member's predictions for studies it was not trained on.

    grades: (n, 5, 5) int, -1 missing; log_p: (views, n, 5, 5, 3) log probabilities of each view, left and right
    already swapped back where it is mirrored; cells of which the plain view says nothing (NaN) do not count, and
    where another view says nothing the rest are averaged. views: the dicts, the plain one first.
    Forward and greedy from the plain view: the view that lowers the competition's score most joins, as long as that
    is more than `errors` standard errors of the paired difference. Terms without a label or prediction are left out.
    Returns (list of kept views, in the order in which they joined; DataFrame view (JSON text), alone (score of the
    view by itself), gain (of plain and this one averaged over plain), gain_se, kept (bool)). Deterministic: of equal
    ones the first wins. Raises ValueError if the shapes do not fit together.
    """
    grades, log_p = np.asarray(grades), np.asarray(log_p, np.float64)
    if log_p.shape != (len(views), *grades.shape, 3) or not len(views):
        raise ValueError(f"{len(views)} views of {grades.shape} grades do not fit log p of {log_p.shape}")
    # The metric's own clip: a view that is certain must not outweigh all others by a log probability of -inf.
    log_p = np.maximum(log_p, np.log(EPS))
    there = np.isfinite(log_p).all(-1)
    grades = np.where(there[0], grades, -1)
    plain = _mean_of_views(log_p, there, [0])

    def gain(before, after):
        _, weight = term_sums(grades, before)
        terms = np.flatnonzero(weight.sum(0) > 0)
        value, error = paired_gain(grades, before, after, terms) if len(terms) else (np.nan, np.nan)
        return value / max(len(terms), 1), error / max(len(terms), 1)

    pairs = [(0.0, 0.0), *(gain(plain, _mean_of_views(log_p, there, [0, v])) for v in range(1, len(views)))]
    kept, current = [0], plain
    while True:
        best = None
        for number in set(range(len(views))) - set(kept):
            candidate = _mean_of_views(log_p, there, [*kept, number])
            value, error = gain(current, candidate)
            # A copy of a kept view gains nothing but rounding.
            if value > max(errors * error, 1e-9) and (best is None or (value, -number) > best[:2]):
                best = (value, -number, candidate)
        if best is None:
            break
        kept, current = [*kept, -best[1]], best[2]
    plain_views = [json.loads(json.dumps(view)) for view in views]
    table = pd.DataFrame(
        {
            "view": [json.dumps(view) for view in plain_views],
            "alone": [_score_of_view(grades, log_p[v], there[v]) for v in range(len(views))],
            "gain": [value for value, _ in pairs],
            "gain_se": [error for _, error in pairs],
            "kept": [v in kept for v in range(len(views))],
        }
    )
    return [plain_views[number] for number in kept], table


def deal_parts(there: np.ndarray, parts: int = 5) -> np.ndarray:
    """Studies dealt into parts in their order: (n,) bool -> (n,) int, -1 where not there."""
    return np.where(there, np.cumsum(there) % parts, -1)


def cross_fitted_views(
    grades: np.ndarray, log_p: np.ndarray, views: Sequence[View], part: np.ndarray, errors: float = VIEW_ERRORS
) -> np.ndarray:
    """Which views the out-of-fold prediction of each study may average: those that pay on the other parts' studies.

    A choice made on a study's own labels would flatter it. grades, log_p, views, errors: see choose_views; part: (n,)
    int of deal_parts, -1 for studies that count nowhere. Returns (n, views) bool, alike within a part; the plain view
    is always among them, and alone for the studies of no part.
    """
    used = np.zeros((len(part), len(views)), bool)
    used[:, 0] = True
    for own in np.unique(part[part >= 0]):
        others = np.where(((part != own) & (part >= 0))[:, None, None], grades, -1)
        used[part == own] = choose_views(others, log_p, views, errors)[1]["kept"].to_numpy()
    return used


def _mean_of_views(log_p, there, numbers):
    """Probabilities (n, 5, 5, 3) of the mean log p over these views; 1/3 where none of them says anything."""
    there = there[numbers][..., None]
    mean = np.where(there, log_p[numbers], 0.0).sum(0) / np.maximum(there.sum(0), 1)
    return softmax(mean, -1)


def _score_of_view(grades, log_p, there):
    """Competition score of one view on the cells it has: the mean of the terms that have a label, NaN without any."""
    loss, weight = term_sums(np.where(there, grades, -1), _mean_of_views(log_p[None], there[None], [0]))
    terms = weight.sum(0) > 0
    return float((loss.sum(0)[terms] / weight.sum(0)[terms]).mean()) if terms.any() else float("nan")
