"""Correct each cell of the combined prediction by the cells around it: a regularised linear stacker.

May use: data, weights, names.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import softmax

from ..data.competition import make_folds
from ..data.metric import EPS, paired_gain
from ..names import GRADES, GROUPS, LABEL_COLUMNS, LEVELS, SEVERITY_WEIGHTS
from ..weights import Stated

# Penalties: a tenth of the strength over the number of studies, times the square of each move (studies, for the rows of
# one go together). The weights pay a share of it. Tuned on tests/benchmarks/bench_ensemble.py at 12 to 2,000 studies.
STRENGTH = 80.0
WEIGHT_SHARE = 0.02
FLOOR_UNIT = 0.1  # a tenth of the prior pays like a temperature of e
# The stacker's strength is the best of these by cross-validation, strongest first; it has to gain so many standard
# errors, because the best of several trials does by chance, and is not tried at all on fewer studies than these, where
# even the standard error is a guess.
STACKER_STUDIES = 100
STACKER_STRENGTHS = (1000.0, 300.0, 100.0, 30.0)
STACKER_ERRORS = 2.0
# What another cell says is a shift along the scale of severity; anything else pays this many times the penalty.
OFF_SCALE = 10.0
OWN_FEATURES = ("own", "level", "worst")  # how the names of a cell's own features begin


def stack_log_probabilities(predictions: Iterable[ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
    """List of (n, 5, 5, 3), NaN where absent -> (log p (members, n, 5, 5, 3), there (members, n, 5, 5) bool)."""
    stack = np.stack([np.asarray(p, np.float64) for p in predictions])
    there = np.isfinite(stack).all(-1) & (np.nan_to_num(stack).sum(-1) > 0)
    safe = np.where(there[..., None], stack, 1.0)
    return np.log(np.clip(safe / safe.sum(-1, keepdims=True), 1e-6, 1)), there


# ---- What the weights are found under: the competition's own terms, and their slopes ----


class _Target:
    """The graded rows of one group of conditions, as the metric weighs them.

    grades: (n, conditions of the group, 5) int, -1 where missing or where no member says anything; spinal: whether
    the any-severe term belongs to the loss.
    """

    def __init__(self, grades: np.ndarray, spinal: bool) -> None:
        graded, safe = grades >= 0, np.clip(grades, 0, 2)
        self.one_hot = np.eye(3)[safe]
        self.weight = np.where(graded, np.asarray(SEVERITY_WEIGHTS, np.float64)[safe], 0.0)
        self.rows, self.studies = int(graded.sum()), int(graded.any((1, 2)).sum())
        self.graded, self.spinal = graded, spinal
        self.any_weight = self.weight.max((1, 2)) if spinal else None
        self.any_true = (grades == 2).any((1, 2)) if spinal else None

    def loss(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        """logits (n, conditions, 5, 3) -> (the group's term(s) of the metric, its slope by logits, same shape)."""
        p = softmax(logits, -1)
        total = self.weight.sum()
        value = -(self.weight * np.log(np.maximum((p * self.one_hot).sum(-1), EPS))).sum() / total
        slope = (self.weight / total)[..., None] * (p - self.one_hot)
        if self.spinal:
            value += self._any_severe(p, slope)
        return value, slope

    def _any_severe(self, p, slope):
        """The any-severe term; adds its slope in place. Only the level with the highest p(severe) has one."""
        severe = np.where(self.graded[:, 0], p[:, 0, :, 2], 0.0)
        study, level = np.arange(len(p)), severe.argmax(1)
        worst = np.clip(severe[study, level], EPS, 1 - EPS)
        weight = self.any_weight / self.any_weight.sum()
        by_logit = np.where(self.any_true, -1.0, worst / (1 - worst)) * weight
        slope[study, 0, level] += by_logit[:, None] * (np.array([0.0, 0.0, 1.0]) - p[study, 0, level])
        return float(-(weight * np.log(np.where(self.any_true, worst, 1 - worst))).sum())


# ---- The stacker: what the neighbours say about a cell ----


def _log_odds(probabilities):
    """(..., 3) -> (..., 2): log odds of being at least moderate, and of being severe, within +-6."""
    p = np.clip(probabilities, 1e-6, 1)
    odds = np.stack([(p[..., 1] + p[..., 2]) / p[..., 0], p[..., 2] / (p[..., 0] + p[..., 1])], -1)
    return np.clip(np.log(odds), -6, 6)


def _standards(probabilities):
    """Middle per group and level {group: (5, 2)} and spread {group: (2,)} of the log odds; sides together."""
    odds = _log_odds(probabilities)
    centre = {group: odds[:, list(c)].mean((0, 1)) for group, c in GROUPS.items()}
    spread = {g: (odds[:, list(c)] - centre[g]).std((0, 1, 2)) + 0.1 for g, c in GROUPS.items()}
    return {"centre": centre, "spread": spread}


def stacker_features(
    probabilities: np.ndarray, standards: Mapping[str, Any]
) -> dict[str, tuple[list[str], np.ndarray]]:
    """What the stacker sees of each cell: dict group -> (names, (n, conditions of the group, 5, features)).

    probabilities: (n, 5, 5, 3); standards: {"centre": {group: (5, 2)}, "spread": {group: (2,)}} of the log odds (at
    least moderate; severe). They are taken of the cell itself, of the levels above and below, of the other side, and
    of the other conditions at the level: the canal sees both sides' means, a side sees its own side (the grades
    correlate by .26 to .48 there). 0, the middle, stands beyond L1/L2 and L5/S1. Left and right are mirror images.
    """
    odds = _log_odds(probabilities)
    scaled = np.empty_like(odds)
    for group, conditions in GROUPS.items():
        middle, spread = np.asarray(standards["centre"][group]), np.asarray(standards["spread"][group])
        scaled[:, list(conditions)] = (odds[:, list(conditions)] - middle) / spread
    sides = {group: scaled[:, list(conditions)] for group, conditions in GROUPS.items()}
    means = {group: values.mean(1, keepdims=True) for group, values in sides.items()}
    result = {}
    for group, own in sides.items():
        blocks = {"own": own, "above": np.zeros_like(own), "below": np.zeros_like(own)}
        blocks["above"][:, :, 1:], blocks["below"][:, :, :-1] = own[:, :, :-1], own[:, :, 1:]
        if group != "spinal":
            blocks["other side"] = own[:, ::-1]
        for other in GROUPS:
            if other != group:
                blocks[other] = (means if group == "spinal" else sides)[other] + np.zeros_like(own)
        names = [f"{block}, {grade}" for block in blocks for grade in ("at least moderate", "severe")]
        values = [*blocks.values(), np.broadcast_to(np.eye(len(LEVELS)), (*own.shape[:3], len(LEVELS)))]
        names += [f"level {level}" for level in LEVELS]
        if group == "spinal":
            values.append(_worst_features(odds[:, :1, :, 1]))
            names += ["worst", "worst, more than itself", "worst, how severe"]
        result[group] = (names, np.concatenate(values, -1))
    return result


def _worst_features(severe):
    """Log odds of severe (n, 1, 5) -> (n, 1, 5, 3), features that lift or lower the worst level alone.

    The any-severe term takes the highest level for the whole study, though any of the others may be the severe one
    and its weights differ: the worst level's share (a sharp softmax, so that two alike share it), the same times how
    much likelier "any" is than that level by itself (levels taken as independent), and times its own log odds.
    """
    share = softmax(3 * severe, -1)
    none = -np.logaddexp(0, severe).sum(-1, keepdims=True)  # log of the product of 1 - p
    some = np.log(-np.expm1(np.minimum(none, -1e-9))) - none
    top = severe.max(-1, keepdims=True)
    return np.stack([share, share * (some - top), share * top / 3], -1)


def apply_stacker(stacker: Mapping[str, Any], probabilities: np.ndarray) -> np.ndarray:
    """Correct the ensemble's probabilities by what the neighbouring cells say: (n, 5, 5, 3) -> the same.

    stacker: as fit_stacker returns it, or as ensemble.json holds it. A group of conditions without coefficients stays
    as it is. Raises ValueError where its features are not those of stacker_features.
    """
    result = np.array(probabilities, np.float64)
    for group, (names, features) in stacker_features(probabilities, stacker).items():
        if group not in stacker["coefficients"]:
            continue
        if stacker["features"][group] != names:
            raise ValueError(f"the stacker's {group} features are not this version's: fit the ensemble again")
        conditions = list(GROUPS[group])
        logits = np.log(np.clip(result[:, conditions], 1e-9, 1))
        logits[..., 1:] += features @ np.asarray(stacker["coefficients"][group])
        result[:, conditions] = softmax(logits, -1)
    return result


def check_stacker(stated: Stated) -> None:
    """Raise DamagedFile unless apply_stacker can use what a file states of a stacker."""
    standards = {"centre": stated.part("centre"), "spread": stated.part("spread")}
    for group in GROUPS:
        standards["centre"].numbers(group, (len(LEVELS), 2), -6, 6)
        standards["spread"].numbers(group, (2,), 0.01, 10)
    features, coefficients = stated.part("features"), stated.part("coefficients")
    coefficients.keys(GROUPS)
    thirds = np.full((1, 5, 5, 3), 1 / 3)
    for group, (names, _) in stacker_features(thirds, {key: part.about for key, part in standards.items()}).items():
        if group in coefficients.about:
            if features.about.get(group) != names:
                features.refuse(group, "this version's features of the stacker")
            coefficients.numbers(group, (len(names), 2), -100, 100)


def fit_stacker(
    grades: np.ndarray,
    probabilities: ArrayLike,
    strengths: Sequence[float] = STACKER_STRENGTHS,
    parts: int = 4,
    errors: float = STACKER_ERRORS,
) -> dict[str, Any]:
    """A correction of the log odds by those of the neighbouring cells, where cross-validation says that it gains.

    grades: (n, 5, 5) int, -1 left out; probabilities: (n, 5, 5, 3), the combined and calibrated ones. Per group of
    conditions one linear map from stacker_features to the log odds of moderate and of severe against normal/mild,
    added to the log probabilities: a multinomial logistic with the ensemble as its offset, under the metric's terms
    (canal together with any-severe). What other cells say is pulled to a shift along the scale of severity, as of a
    cumulative logit whose cut points stay (_fit_correction). No correction is the start and where the L2 penalty pulls
    to; its strength is the best of `strengths` in `parts`-fold cross-validation over studies. A group is kept only if
    its gain there exceeds `errors` standard errors; nothing is kept with fewer than STACKER_STUDIES studies.
    Returns {"centre", "spread", "features", "coefficients": {group: (features, 2) lists}, "gain": {group: [gain,
    standard error, strength]}} of plain numbers; `coefficients` lacks the groups in which nothing is gained.
    """
    studies = (grades >= 0).any((1, 2))
    grades, probabilities = grades[studies], np.asarray(probabilities, np.float64)[studies]
    standards = _standards(probabilities)
    features = stacker_features(probabilities, standards)
    result = {
        "centre": {group: v.tolist() for group, v in standards["centre"].items()},
        "spread": {group: v.tolist() for group, v in standards["spread"].items()},
        "features": {group: names for group, (names, _) in features.items()},
        "coefficients": {},
        "gain": {},
    }
    if len(grades) < STACKER_STUDIES:
        return result
    part = deal_studies(grades, parts)
    for number, (group, conditions) in enumerate(GROUPS.items()):
        if not (grades[:, list(conditions)] >= 0).any():
            continue
        names, values = features[group]
        case = (values, np.log(np.clip(probabilities[:, list(conditions)], 1e-9, 1)))
        is_own = np.array([name.startswith(OWN_FEATURES) for name in names])
        own = np.full_like(grades, -1)
        own[:, list(conditions)] = grades[:, list(conditions)]
        trials = _try_strengths(case, is_own, own, list(conditions), part, strengths, group == "spinal")
        terms = (0, 3) if group == "spinal" else (number,)
        gains = [paired_gain(own, probabilities, trial, terms) for trial in trials]
        best = int(np.argmax([gain for gain, _ in gains]))
        result["gain"][group] = [*gains[best], float(strengths[best])]
        if gains[best][0] > errors * gains[best][1]:
            target = _Target(own[:, list(conditions)], group == "spinal")
            result["coefficients"][group] = _fit_correction(*case, target, strengths[best], is_own).tolist()
    return result


def deal_studies(grades: np.ndarray, parts: int) -> np.ndarray:
    """Studies dealt into parts of alike severity: (n,) int. grades: (n, 5, 5)."""
    table = pd.DataFrame(np.array([*GRADES, None], object)[grades.reshape(len(grades), -1)], columns=[*LABEL_COLUMNS])
    return make_folds(table.assign(study_id=np.arange(len(grades))), parts)["fold"].to_numpy()


def _try_strengths(case, own, grades, conditions, part, strengths, spinal):
    """For each strength the probabilities (n, 5, 5, 3) that the stacker gives to the studies it was not fitted on."""
    features, logits = case
    trials = np.full((len(strengths), *grades.shape, 3), 1 / 3)
    for fold in range(part.max() + 1):
        inside, outside = part == fold, part != fold
        target = _Target(grades[outside][:, conditions], spinal)
        if not target.rows:
            continue
        found = None
        for number, strength in enumerate(strengths):  # strongest first, each starts where the last one ended
            found = _fit_correction(features[outside], logits[outside], target, strength, own, found)
            corrected = logits[inside].copy()
            corrected[..., 1:] += features[inside] @ found
            block = trials[number, inside]
            block[:, conditions] = softmax(corrected, -1)
            trials[number, inside] = block
    return trials


def _fit_correction(features, logits, target, strength, own, start=None):
    """Coefficients (features, 2) of the correction to the logits (n, conditions, 5, 3) of one group.

    own: (features,) bool, those of the cell itself, which may bend the log odds of moderate and of severe as they like;
    those of other cells pay OFF_SCALE times the penalty for anything but a shift along the scale of severity (severe
    twice as far as moderate).
    """
    from scipy.optimize import minimize

    flat = np.ascontiguousarray(features.reshape(-1, features.shape[-1]))
    scale = np.array([[1.0, 2.0], [2.0, -1.0]]) / np.sqrt(5)  # along the scale of severity, and across it
    penalty = 0.1 * strength / target.studies * np.where(own[:, None], 1.0, [1.0, OFF_SCALE])

    def loss(values):
        moves = values.reshape(-1, 2)
        corrected = logits.copy()
        corrected[..., 1:] += (flat @ (moves @ scale)).reshape(*logits.shape[:-1], 2)
        value, slope = target.loss(corrected)
        gradient = flat.T @ slope[..., 1:].reshape(-1, 2) @ scale.T + 2 * penalty * moves
        return value + (penalty * np.square(moves)).sum(), gradient.ravel()

    zero = np.zeros(penalty.size) if start is None else np.ravel(start @ scale.T)
    found = minimize(loss, zero, jac=True, method="L-BFGS-B", options={"ftol": 1e-7, "maxiter": 100})
    return found.x.reshape(-1, 2) @ scale
