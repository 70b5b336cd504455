"""The weighted ensemble, its stacker, and what both are worth.

Members are combined in three steps, each fitted on out-of-fold predictions under the competition's own terms and each
pulled to doing nothing: weights per group of conditions; temperature, class bias and a share of the prior per group;
and a correction of each cell's log odds by those of its neighbours. cross_validate_ensemble says what each step gains.
"""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from .files import (
    EPS,
    class_prior,
    from_submission,
    id_array,
    labels_to_array,
    make_folds,
    paired_gain,
    row_ids,
    score_arrays,
    severity_values,
    to_submission,
)
from .names import GRADES, GROUPS, LABEL_COLUMNS, LEVELS, SEVERITIES, SEVERITY_WEIGHTS, SUBMISSION_COLUMNS
from .storage import DamagedFile, open_tensors
from .tables import read_labels

MEMBERS = ("yolo", "level", "study")
# Solution B's weights, .65 for the detectors and .35 for the 3D networks, which are two here.
DEFAULT_WEIGHTS = {"yolo": 0.65, "level": 0.25, "study": 0.10}
# Penalties: a tenth of the strength over the number of studies, times the square of each move (studies, for the rows of
# one go together). The weights pay a share of it. Tuned on tests/benchmarks/bench_ensemble.py at 12 to 2,000 studies.
STRENGTH = 80.0
WEIGHT_SHARE = 0.02
FLOOR_UNIT = 0.1  # a tenth of the prior pays like a temperature of e
# On fewer studies than these a temperature that flatters them can cost others more than it brings: scaling then has to
# gain so many standard errors in cross-validation, a group at a time.
SCALING_STUDIES = 200
SCALING_ERRORS = 2.0
# The stacker's strength is the best of these by cross-validation, strongest first; it has to gain so many standard
# errors, because the best of several trials does by chance, and is not tried at all on fewer studies than these, where
# even the standard error is a guess.
STACKER_STUDIES = 100
STACKER_STRENGTHS = (1000.0, 300.0, 100.0, 30.0)
STACKER_ERRORS = 2.0
# What another cell says is a shift along the scale of severity; anything else pays this many times the penalty.
OFF_SCALE = 10.0
OWN_FEATURES = ("own", "level", "worst")  # how the names of a cell's own features begin
VARIANTS = ("equal weights", "default weights", "fitted weights", "+ scaling", "+ stacker")


def default_ensemble(members=MEMBERS):
    """The ensemble without out-of-fold predictions: default weights, no calibration."""
    return {
        "weights": {group: {m: DEFAULT_WEIGHTS.get(m, 0.1) for m in members} for group in GROUPS},
        "temperature": {group: 1.0 for group in GROUPS},
        "bias": {group: [0.0, 0.0, 0.0] for group in GROUPS},
        "floor": {group: 0.0 for group in GROUPS},
        "found": "defaults",
    }


def equal_ensemble(members):
    """The ensemble that trusts all members alike: no weights, no calibration."""
    return default_ensemble(members) | {
        "weights": {group: {m: 1 / len(members) for m in members} for group in GROUPS},
        "found": "equal",
    }


def combine_members(predictions, ensemble, prior):
    """Weighted mean of log probabilities, calibrated per group of conditions; then the stacker, if there is one.

    Per group p = (1 - floor) softmax(sum of w_m log p_m / temperature + bias) + floor prior: the share of the prior is
    for what no member can see coming, a level named wrongly or a slip of the reader, where log p has a price without
    bound. 0 in an ensemble without the key "floor".

    predictions: dict member -> (n, 5, 5, 3), NaN where a member has nothing to say: its weight goes to the others.
    ensemble: as fit_ensemble or default_ensemble make it; its key "stacker" is optional, see apply_stacker.
    prior: (5, 5, 3), for the floor and where no member has anything. Returns (probabilities (n, 5, 5, 3) float64 with
    rows that sum to 1, n_members (n, 5, 5) int: how many members each row rests on). Raises ValueError for a member
    that the ensemble has no weight for: most likely its name is spelt in two ways.
    """
    members = list(predictions)
    known = {m for weights in ensemble["weights"].values() for m in weights}
    if set(members) - known:
        unknown = ", ".join(map(repr, sorted(set(members) - known)))
        raise ValueError(f"the ensemble has no weight for {unknown}, but for {', '.join(sorted(known))}")
    log_p, there = _log_probabilities([predictions[m] for m in members])
    prior = np.asarray(prior, np.float64) / np.sum(prior, -1, keepdims=True)
    result = np.empty(log_p.shape[1:])
    for group, conditions in GROUPS.items():
        conditions = list(conditions)
        weight = np.array([ensemble["weights"][group].get(m, 0.0) for m in members])
        weight = weight[:, None, None, None] * there[:, :, conditions]
        # Members of weight 0 still help where they are all there is.
        weight = np.where(weight.sum(0) > 0, weight, there[:, :, conditions].astype(np.float64))
        mean = (weight[..., None] * log_p[:, :, conditions]).sum(0) / np.maximum(weight.sum(0), 1e-12)[..., None]
        logits = mean / ensemble["temperature"][group] + np.asarray(ensemble["bias"][group])
        result[:, conditions] = _softmax(logits)
        floor = ensemble.get("floor", {}).get(group, 0.0)
        if floor:
            result[:, conditions] = (1 - floor) * result[:, conditions] + floor * prior[conditions]
    count = there.sum(0)
    result = np.where((count > 0)[..., None], result, prior)
    if ensemble.get("stacker"):
        result = np.where((count > 0)[..., None], apply_stacker(ensemble["stacker"], result), result)
    return result, count


def member_alone(predictions, prior):
    """A member's own probabilities, rows that sum to 1, and the prior where it has nothing to say: as it would be
    submitted by itself, its zeros included. predictions: (n, 5, 5, 3), NaN where absent; prior: (5, 5, 3)."""
    _, (there,) = _log_probabilities([predictions])
    p = np.where(there[..., None], predictions, prior)
    return p / p.sum(-1, keepdims=True)


def _softmax(logits):
    """(..., 3) -> the same, rows sum to 1."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _log_probabilities(predictions):
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

    def __init__(self, grades, spinal):
        graded, safe = grades >= 0, np.clip(grades, 0, 2)
        self.one_hot = np.eye(3)[safe]
        self.weight = np.where(graded, np.asarray(SEVERITY_WEIGHTS, np.float64)[safe], 0.0)
        self.rows, self.studies = int(graded.sum()), int(graded.any((1, 2)).sum())
        self.graded, self.spinal = graded, spinal
        self.any_weight = self.weight.max((1, 2)) if spinal else None
        self.any_true = (grades == 2).any((1, 2)) if spinal else None

    def loss(self, logits):
        """logits (n, conditions, 5, 3) -> (the group's term(s) of the metric, its slope by logits, same shape)."""
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
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


# ---- Weights, temperature, bias, floor ----


def fit_ensemble(labels, tables, strength=STRENGTH, members=MEMBERS, towards="defaults", scaling=True, stacker=True):
    """Weights, temperature, class bias and floor per group from out-of-fold predictions; then a stacker.

    labels: train.csv's wide form; tables: dict member -> submission-like DataFrame (any rows may be missing).
    The competition's own terms are minimised (canal together with any-severe), plus a penalty of `strength` over the
    number of studies that pulls toward the start: a few dozen studies must not decide alone.
    members: the order of the names; others follow. towards: "defaults" (DEFAULT_WEIGHTS) or "equal", the weights that
    the penalty pulls to. scaling: whether temperature, bias and floor are tried, stacker: whether fit_stacker is: both
    are kept only in groups where cross-validation within these studies says that they gain (scaling: with
    SCALING_STUDIES or more always).
    Returns a dict like default_ensemble's, with the scores before and after in `found`, and `stacker` where it gains.
    Deterministic, whatever the order of the rows. Raises ValueError on tables that check_predictions refuses, and on
    one that predicts none of the labelled studies.
    """
    if towards not in ("defaults", "equal"):
        raise ValueError(f"towards is 'defaults' or 'equal', not {towards!r}")
    study_ids, grades = _sorted_grades(labels)
    return _fit_arrays(grades, _align_to_labels(study_ids, tables), strength, members, towards, scaling, stacker)


def _fit_arrays(grades, predictions, strength, members, towards, scaling=True, stacker=True, judged=True):
    """fit_ensemble on arrays: grades (n, 5, 5), predictions dict member -> (n, 5, 5, 3), NaN where absent.

    judged: whether scaling has to gain in cross-validation to be kept.
    """
    names = [m for m in members if m in predictions] + [m for m in predictions if m not in members]
    ensemble = default_ensemble(names) if towards == "defaults" else equal_ensemble(names)
    log_p, there = _log_probabilities([predictions[m] for m in names])
    prior, grades = class_prior(grades), np.where(there.any(0), grades, -1)
    scaled = dict.fromkeys(GROUPS, scaling)
    if scaling and judged:
        scaled = _scaling_gains(grades, predictions, strength=strength, members=members, towards=towards)
    before, after = {}, {}
    for group, conditions in GROUPS.items():
        conditions = list(conditions)
        studies = (grades[:, conditions] >= 0).any((1, 2))
        if studies.sum() < 2:
            continue
        target = _Target(grades[studies][:, conditions], group == "spinal")
        start = np.array([ensemble["weights"][group][m] for m in names])
        part = (log_p[:, studies][:, :, conditions], there[:, studies][:, :, conditions], prior[conditions])
        fitted, before[group], after[group] = _fit_group(*part, target, start, strength, scaled[group])
        ensemble["weights"][group] = dict(zip(names, fitted.pop("weights")))
        for key, value in fitted.items():
            ensemble[key][group] = value
    if after:
        ensemble["found"] = {"rows": int(there.any(0).sum()), "before": before, "after": after}
    if after and stacker:
        found = fit_stacker(grades, combine_members(predictions, ensemble, prior)[0])
        if found["coefficients"]:
            ensemble["stacker"] = found
    return ensemble


def _scaling_gains(grades, predictions, parts=4, errors=SCALING_ERRORS, **options):
    """Whether scaling gains in each group on studies that it was not fitted on: dict group -> bool.

    options: strength, members and towards of fit_ensemble. From SCALING_STUDIES on it is taken for granted; with fewer
    than two studies a part nothing gains.
    """
    studies = (grades >= 0).any((1, 2))
    if studies.sum() >= SCALING_STUDIES or studies.sum() < 2 * parts:
        return dict.fromkeys(GROUPS, studies.sum() >= SCALING_STUDIES)
    grades = grades[studies]
    predictions = {name: p[studies] for name, p in predictions.items()}
    part = _deal(grades, parts)
    without, scaled = np.full((2, *grades.shape, 3), 1 / 3)
    for fold in range(part.max() + 1):
        inside = part == fold
        rest = {name: p[~inside] for name, p in predictions.items()}
        own = {name: p[inside] for name, p in predictions.items()}
        for found, scaling in ((without, False), (scaled, True)):
            ensemble = _fit_arrays(grades[~inside], rest, scaling=scaling, stacker=False, judged=False, **options)
            found[inside] = combine_members(own, ensemble, class_prior(grades[~inside]))[0]
    gains = {}
    for number, group in enumerate(GROUPS):
        gain, error = paired_gain(grades, without, scaled, (0, 3) if group == "spinal" else (number,))
        gains[group] = gain > errors * error
    return gains


def _fit_group(log_p, there, prior, target, start, strength, scaling):
    """(dict of weights (list), temperature, bias (list of 3), floor; loss at the start; loss found) of one group.

    log_p: (members, n, conditions, 5, 3); there: the same without the last axis; prior: (conditions, 5, 3); start:
    (members,) weights. The unknowns are how much the log of each weight, the log of the temperature and the two
    biases move, and the share of the prior, in FLOOR_UNIT.
    """
    from scipy.optimize import minimize

    count = len(start)
    # Weights trade one fair member for another; a wrong bias or temperature spoils every row, so it pays more.
    penalty = 0.1 * strength / target.studies * np.repeat([WEIGHT_SHARE, 1.0], [count, 4])

    def loss(values):
        share = np.exp(np.log(start) + values[:count])[:, None, None, None] * there
        share /= np.maximum(share.sum(0), 1e-12)
        mean = np.einsum("mncl,mnclk->nclk", share, log_p)
        cold, floor = np.exp(-values[count]), FLOOR_UNIT * values[-1]
        p = _softmax(mean * cold + np.array([0.0, *values[count + 1 : -1]]))
        mixed = (1 - floor) * p + floor * prior
        value, by_log = target.loss(np.log(mixed))
        by_floor = (by_log * (prior - p) / mixed).sum()
        slope = by_log * (1 - floor) * p / mixed
        slope -= p * slope.sum(-1, keepdims=True)
        by_mean = slope * cold
        by_weight = np.einsum("nclk,mnclk->mncl", by_mean, log_p) - (by_mean * mean).sum(-1)
        by_scale = [-(by_mean * mean).sum(), *slope.sum((0, 1, 2))[1:], FLOOR_UNIT * by_floor]
        return value, np.array([*(share * by_weight).sum((1, 2, 3)), *by_scale])

    def penalised(values):
        value, gradient = loss(values)
        return value + (penalty * np.square(values)).sum(), gradient + 2 * penalty * values

    zero = np.zeros(count + 4)
    bounds = [(-3, 3)] * (count + 3) + [(0, 0.2 / FLOOR_UNIT)] if scaling else [(-3, 3)] * count + [(0, 0)] * 4
    found = minimize(penalised, zero, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-8}).x
    weight = start * np.exp(found[:count])
    fitted = {
        "weights": (weight / weight.sum()).tolist(),
        "temperature": float(np.exp(found[count])),
        "bias": [0.0, *found[count + 1 : -1].tolist()],
        "floor": float(FLOOR_UNIT * found[-1]),
    }
    return fitted, float(loss(zero)[0]), float(loss(found)[0])


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


def stacker_features(probabilities, standards):
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
    share = np.exp(3 * (severe - severe.max(-1, keepdims=True)))
    share /= share.sum(-1, keepdims=True)
    none = -np.logaddexp(0, severe).sum(-1, keepdims=True)  # log of the product of 1 - p
    some = np.log(-np.expm1(np.minimum(none, -1e-9))) - none
    top = severe.max(-1, keepdims=True)
    return np.stack([share, share * (some - top), share * top / 3], -1)


def apply_stacker(stacker, probabilities):
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
        result[:, conditions] = _softmax(logits)
    return result


def fit_stacker(grades, probabilities, strengths=STACKER_STRENGTHS, parts=4, errors=STACKER_ERRORS):
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
    part = _deal(grades, parts)
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


def _deal(grades, parts):
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
            block[:, conditions] = _softmax(corrected)
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


# ---- What the search really gains ----


def cross_validate_ensemble(labels, tables, folds, strength=STRENGTH, members=MEMBERS, towards="defaults"):
    """Nested cross-validation of the whole search: everything is fitted on the other folds, scored on this one.

    labels: train.csv's wide form; tables: dict member -> out-of-fold submission (any rows may be missing, as may
    studies); folds: DataFrame study_id, fold, the folds the members were trained in (what a fold's own models have
    seen must not choose its weights). strength, members, towards: see fit_ensemble.
    Returns (scores, submissions). scores: a DataFrame with a row for each member alone, then "equal weights",
    "default weights", "fitted weights", "+ scaling", "+ stacker"; the columns are the metric's terms pooled over all
    folds, `gain` over the default weights, its standard error `gain_se`, and `rows`, the graded rows that rest on a
    member. All are scored on the rows that any member has; where a member alone lacks one, the prior of the other
    folds stands. submissions: dict of those names -> the nested predictions in the competition's form, without the
    rows that no member has. Raises ValueError on bad tables, a study without a fold, or fewer than two folds.
    """
    if not tables:
        raise ValueError("no member's predictions to combine")
    study_ids, grades = _sorted_grades(labels)
    aligned = _align_to_labels(study_ids, tables)
    there = np.any([np.isfinite(p).all(-1) for p in aligned.values()], axis=0)
    fold_of = _fold_of(folds, study_ids, there.any((1, 2)))
    names = [*aligned, *VARIANTS]
    nested = {name: np.full((*grades.shape, 3), np.nan) for name in names}
    for fold in np.unique(fold_of[fold_of >= 0]):
        inside, rest = fold_of == fold, (fold_of != fold) & (fold_of >= 0)
        prior = class_prior(grades[rest])
        part, others = ({m: p[where] for m, p in aligned.items()} for where in (inside, rest))
        for name, (used, ensemble) in _variants(grades[rest], others, strength, members, towards).items():
            nested[name][inside] = combine_members({m: part[m] for m in used}, ensemble, prior)[0]
        for name, p in part.items():
            nested[name][inside] = member_alone(p, prior)
    grades = np.where(there, grades, -1)
    scores = {}
    for name, p in nested.items():
        own = np.isfinite(aligned[name]).all(-1) if name in aligned else there
        safe = np.where(there[..., None], p, 1 / 3)
        gain = paired_gain(grades, np.where(there[..., None], nested["default weights"], 1 / 3), safe)
        scores[name] = {
            **score_arrays(grades, safe),
            "gain": gain[0] / 4,
            "gain_se": gain[1] / 4,
            "rows": int((own & (grades >= 0)).sum()),
        }
    submissions = {name: _partial_submission(study_ids, p, there) for name, p in nested.items()}
    return pd.DataFrame.from_dict(scores, orient="index"), submissions


def _variants(grades, predictions, *options):
    """Everything cross_validate_ensemble compares, fitted on these studies: dict name -> (members, ensemble)."""
    names = list(predictions)
    stacked = _fit_arrays(grades, predictions, *options)
    fitted = (
        equal_ensemble(names),
        default_ensemble(names),
        _fit_arrays(grades, predictions, *options, scaling=False, stacker=False),
        {key: value for key, value in stacked.items() if key != "stacker"},
        stacked,
    )
    return {name: (names, ensemble) for name, ensemble in zip(VARIANTS, fitted, strict=True)}


def _fold_of(folds, study_ids, needed):
    """The fold number (n,) int of each study, -1 for those that no member predicted."""
    missing = [column for column in ("study_id", "fold") if column not in folds.columns]
    if missing:
        raise ValueError(f"the folds have no column {', '.join(missing)}")
    folds = folds[["study_id", "fold"]].astype(object)
    # One row a label, ids read as text and folds both as 0 and "0" or 0.0 are the same folds.
    known = pd.DataFrame(
        {
            "study_id": pd.to_numeric(folds["study_id"], errors="coerce"),
            "fold": folds["fold"].astype(str).str.removesuffix(".0").where(folds["fold"].notna()),
        }
    )
    known = known.dropna().drop_duplicates()
    if known["study_id"].duplicated().any():
        raise ValueError(f"study {int(known.study_id[known.study_id.duplicated()].iloc[0])} has two folds")
    found = pd.Series(study_ids).map(known.set_index("study_id")["fold"])
    if (found.isna() & needed).any():
        raise ValueError(f"study {study_ids[found.isna() & needed][0]} has no fold")
    result = np.where(needed, pd.factorize(found, sort=True)[0], -1)
    if len(np.unique(result[needed])) < 2:
        raise ValueError(
            "nested cross-validation wants predicted studies in two folds or more; "
            "utils.nested_folds deals those of a single one into parts"
        )
    return result


def _partial_submission(study_ids, probabilities, there):
    """Submission of the rows that are there: (n,), (n, 5, 5, 3), (n, 5, 5) bool."""
    table = to_submission(study_ids, np.where(there[..., None], probabilities, 1.0))
    kept = [row for row, known in zip((r for s in study_ids for r in row_ids(s)), there.ravel()) if known]
    return table[table["row_id"].isin(kept)].reset_index(drop=True)


# ---- Tables of members ----


def check_predictions(table, name="predictions"):
    """A submission-like table -> from_submission's (study_ids, (n, 5, 5, 3)), NaN where a row is absent.

    Rows in any order, any of them may be absent or empty (three NaN, as a join leaves them), further columns (fold) are
    fine. Raises ValueError, with the table and the row named, on a missing column, an unknown or double row_id, values
    that are not numbers, not finite, negative, or whose sum is off 1 by more than .002 (a member that is not normalised
    is no probability; three values rounded to three digits are off by .0015 at most).
    """
    missing = [column for column in SUBMISSION_COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(f"{name}: no column {', '.join(missing)}")
    table = table[~table[list(SEVERITIES)].isna().all(axis=1)]
    values = severity_values(table)
    for bad, what in (
        (~np.isfinite(values).all(1), "is not three finite numbers"),
        ((values < 0).any(1), "is negative"),
        (np.abs(values.sum(1) - 1) > 2e-3, "does not sum to 1"),
    ):
        if bad.any():
            row = table.iloc[int(bad.argmax())]
            raise ValueError(f"{name}: row {row['row_id']} {what}: {[row[column] for column in SEVERITIES]}")
    try:
        return from_submission(table)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _sorted_grades(labels):
    """labels_to_array in the order of study_id; ValueError where these are no labels at all."""
    if "study_id" not in labels.columns or not set(LABEL_COLUMNS) & set(labels.columns):
        raise ValueError("labels need the column study_id and train.csv's label columns")
    study_ids, grades = labels_to_array(labels)
    order = np.argsort(study_ids)
    return study_ids[order], grades[order]


def align_members(study_ids, tables):
    """dict member -> submission-like table -> dict member -> (n, 5, 5, 3), NaN where a row is missing.

    Studies that are not asked for are ignored. Raises ValueError as check_predictions does.
    """
    place = {study_id: number for number, study_id in enumerate(id_array(study_ids))}
    aligned = {}
    for member, table in tables.items():
        ids, values = check_predictions(table, member)
        result = np.full((len(study_ids), *values.shape[1:]), np.nan)
        for study_id, value in zip(ids, values):
            if study_id in place:
                result[place[study_id]] = value
        aligned[member] = result
    return aligned


def _align_to_labels(study_ids, tables):
    """align_members; ValueError for a table that predicts none of these studies."""
    aligned = align_members(study_ids, tables)
    for member, values in aligned.items():
        if not np.isfinite(values).any():
            raise ValueError(f"{member}: its table predicts none of the {len(study_ids)} labelled studies")
    return aligned


def combine_tables(tables, ensemble, prior, study_ids=None):
    """Members' predictions of the same split -> the ensemble's, a complete submission.

    tables: dict member -> submission-like DataFrame, as of align_members; any rows may be missing in some. prior:
    (5, 5, 3) as of class_prior, for what is missing in all. study_ids: which studies to predict, for instance those of
    sample_submission.csv; None: all that any table has. Raises ValueError as align_members and combine_members do.
    """
    if study_ids is None:
        study_ids = sorted(
            {study_id for name, table in tables.items() for study_id in check_predictions(table, name)[0]}
        )
    return to_submission(study_ids, combine_members(align_members(study_ids, tables), ensemble, prior)[0])


def member_weights(folders):
    """Which file stands for each fold of each member's weights: (dict name -> path, list of sentences).

    folders: looked at themselves and one folder below, as the outputs of several Kaggle kernels lie side by side; the
    names are the files', such as yolo_scs_0 and level_3, in order. The sentences say what is left out, and why:
    - unfinished weights: a classifier beside its checkpoint, where 04 writes each better epoch, and a detector that 03
      has not calibrated yet;
    - those trained for comparison, as other solutions have them (detectors of the scheme "original", classifiers with
      global pooling), where there are any of the kit's own of that detector or classifier. Attached alone they stand.
    - all but the first of one fold, in the order of the folders; one that cannot be read comes last, and where it is
      all there is loading it says what is wrong.
    """
    found, left_out = {}, {}
    for folder in map(Path, folders):
        for path in sorted({*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")}):
            name = re.fullmatch(r"(yolo_[a-z]+|level|study)_.+", path.stem)
            below = path.relative_to(folder).parts
            if name and "solutions" not in below and not any(".old-" in part for part in path.parts):
                found.setdefault(name[1], {}).setdefault(path.resolve(), path)
    chosen = {}
    for part, paths in found.items():
        kinds = {path: _kind_of_weights(path) for path in paths.values()}
        wanted = "comparison" if "comparison" in kinds.values() and "own" not in kinds.values() else "own"
        for path in sorted(kinds, key=lambda path: kinds[path] == "unreadable"):
            if kinds[path] not in (wanted, "unreadable"):
                left_out.setdefault((kinds[path], path.parent), []).append(path.stem)
            elif chosen.setdefault(path.stem, path) != path:
                left_out.setdefault((f"already found in {chosen[path.stem].parent}", path.parent), []).append(path.stem)
    why = {"comparison": "trained for comparison, the kit's own stand", "unfinished": "training has not finished"}
    sentences = [
        f"{', '.join(names)} in {folder} left out: {why.get(kind, kind)}" for (kind, folder), names in left_out.items()
    ]
    return dict(sorted(chosen.items())), sentences


def _kind_of_weights(path):
    """own, comparison, unfinished or unreadable, see member_weights."""
    key = "metadata" if path.stem.startswith("yolo") else "classifier"
    try:
        with open_tensors(path, key, "") as (about, _):
            pass
    except (OSError, DamagedFile):
        return "unreadable"
    comparison = about.get("scheme") == "original" or about.get("pooling") == "global"
    uncalibrated = path.stem.startswith("yolo") and not comparison and about.get("calibration") is None
    if uncalibrated or path.with_suffix(".checkpoint").is_file():
        return "unfinished"
    return "comparison" if comparison else "own"


def read_out_of_fold(folders, verbose=True):
    """dict member -> out-of-fold table, from the stage folders of 03 and 04; the three detectors are one member.

    Only of weights that stand (see member_weights, whose sentences `verbose` prints): of the oof.csv beside them the
    rows of their folds; without a column `fold` all rows.
    """
    chosen, sentences = member_weights(folders)
    if verbose and sentences:
        print(*sentences, sep="\n")
    places = {}
    for name, path in chosen.items():
        part, _, fold = name.rpartition("_")
        places.setdefault(part.split("_")[0], {}).setdefault(path.parent, set()).add(fold)
    tables = {}
    for member in [m for m in MEMBERS if m in places]:
        for folder, folds in places[member].items():
            if (folder / "oof.csv").is_file():
                table = pd.read_csv(folder / "oof.csv")
                if "fold" in table.columns:
                    table = table[table["fold"].astype(str).str.removesuffix(".0").isin(folds)]
                tables.setdefault(member, []).append(table)
    return {
        member: pd.concat(found, ignore_index=True).drop_duplicates("row_id", ignore_index=True)
        for member, found in tables.items()
    }


def ensemble_for(folders, data, members=MEMBERS):
    """The ensemble's weights: an ensemble.json that lies with the weights (05_inference writes one, keep it there);
    else fitted on the oof.csv files that lie there and data/train.csv; else the defaults. See fit_ensemble.

    A member with weights in the folders of which neither knows anything gets the share that DEFAULT_WEIGHTS give it
    among the attached ones, and the others' weights share the rest as before.
    folders: as weight_folders finds them. Prints which of the three it was, and who got a default share.
    """
    members = [m for m in MEMBERS if m in members]
    attached = {name.split("_")[0] for name in member_weights(folders)[0]}
    attached = [m for m in members if m in attached]
    for folder in folders:
        if (Path(folder) / "ensemble.json").is_file():
            print(f"the ensemble's weights are those of {Path(folder) / 'ensemble.json'}")
            return _with_default_shares(json.loads((Path(folder) / "ensemble.json").read_text()), attached)
    tables = {m: t for m, t in read_out_of_fold(folders, verbose=False).items() if m in members}
    labels = Path(data) / "train.csv"
    if not tables or not labels.is_file():
        print("no out-of-fold predictions or no train.csv: the ensemble's default weights stand")
        return default_ensemble(members)
    labels = read_labels(labels)
    # Weights of other data, a phantom's for instance, come with predictions that nothing here can judge.
    foreign = [m for m, p in align_members(labels["study_id"], tables).items() if not np.isfinite(p).any()]
    tables = {m: table for m, table in tables.items() if m not in foreign}
    if foreign:
        print(f"the out-of-fold predictions of {', '.join(foreign)} are of other studies than train.csv: left out")
    if not tables:
        print("the ensemble's default weights stand")
        return default_ensemble(members)
    print(f"the ensemble's weights are fitted on out-of-fold predictions of {', '.join(tables)}")
    return _with_default_shares(fit_ensemble(labels, tables, members=members), attached)


def _with_default_shares(ensemble, attached):
    """The ensemble with a default share of the weights for each attached member that it does not know."""
    defaults, weights = DEFAULT_WEIGHTS, {}
    for group, known in ensemble["weights"].items():
        unknown = [m for m in attached if m not in known]
        every = sum(defaults.get(m, 0.1) for m in {*known, *unknown})
        shares = {m: defaults.get(m, 0.1) / every for m in unknown}
        scale = (1 - sum(shares.values())) / (sum(known.values()) or 1.0)
        weights[group] = {m: weight * scale for m, weight in known.items()} | shares if unknown else known
        if unknown and group == next(iter(GROUPS)):
            text = ", ".join(f"{m} {share:.2f}" for m, share in shares.items())
            print(f"nothing is known of what these members are worth, their default shares stand: {text}")
    return {**ensemble, "weights": weights}
