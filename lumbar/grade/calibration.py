"""Calibrate a detector's scores: a weighted multinomial logistic regression, shrunk towards the class prior.

May use: data, names, tta.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, softmax

from ..data.competition import class_prior
from ..data.metric import row_losses
from ..names import LEVELS, SEVERITY_WEIGHTS
from .tta import deal_parts


def mean_scores(scores: ArrayLike) -> np.ndarray:
    """Geometric mean over views: scores (views, ...) -> (...), of those that say anything; NaN where none does.

    A calibration's logits are linear in the log scores, so calibrating this mean is the same as averaging the log
    probabilities of the views, each with that calibration, and normalising.
    """
    logs = np.log(np.clip(np.asarray(scores, dtype=np.float64), 1e-6, None))
    there = np.isfinite(logs)
    count = there.sum(axis=0)
    mean = np.exp(np.where(there, logs, 0).sum(axis=0) / np.maximum(count, 1))
    return np.where(count > 0, mean, np.nan)


def severity_prior(grades: ArrayLike, strength: float = 10.0) -> np.ndarray:
    """Frequencies of the severities per level, (5, 3), from grades (n, 5, sides) with -1 missing, drawn towards the
    pooled frequencies by `strength` pseudo-observations (and those by one a class), so that none is 0."""
    grades = np.asarray(grades)
    pooled = np.array([(grades == k).sum() + 1.0 for k in range(3)])
    pooled /= pooled.sum()
    counts = np.array([[(grades[:, level] == k).sum() for k in range(3)] for level in range(grades.shape[1])])
    return (counts + strength * pooled) / (counts.sum(axis=1, keepdims=True) + strength)


def _score_features(scores):
    """Log ratios (..., 2) of the moderate and the severe score to the normal one."""
    logs = np.log(np.clip(scores, 1e-6, None))
    return logs[..., 1:] - logs[..., :1]


def _calibration_logits(scores, level, calibration):
    """Logits (rows, 3) of scores (rows, 3) at levels (rows,), and the standardised log ratios (rows, 2)."""
    trust, prior = calibration["trust"], np.asarray(calibration["prior"], float)
    ratios = _score_features(scores)
    z = (ratios - np.array(calibration["mean"])) / np.array(calibration["scale"])
    evidence = np.concatenate([np.zeros_like(ratios[:, :1]), ratios], axis=1)
    base = np.log(np.array(SEVERITY_WEIGHTS, float)) + trust * evidence + (1 - trust) * np.log(prior)[level]
    base[:, 1:] += z @ np.array(calibration["matrix"]).T + np.array(calibration["bias"])
    return base, z


def fit_yolo_calibration(
    scores: ArrayLike,
    grades: ArrayLike,
    prior: ArrayLike,
    ridges: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0, 1e4),
) -> dict[str, Any]:
    """Fit scores -> probabilities by weighted log loss (weights 1/2/4) on out-of-fold rows.

    scores: (n, 5, sides, 3) of yolo_scores; grades: (n, 5, sides), -1 missing; prior: (5, 3) of severity_prior.
    A multinomial logistic regression that starts from one of two calibrations which need no fitting, and is drawn
    back to it by a ridge on its correction b_k + sum_j A_kj z_j (z: standardised log ratios of the scores):
        trust 1: probability ~ weight_k * score_k;    trust 0: probability ~ weight_k * class prior of the level.
    Which one, and the ridge's strength, is decided by five-fold cross validation over studies: good scores are
    trusted although rows are few, and useless ones lose nothing against the class prior. Returns a dict for JSON;
    with fewer than four graded studies it is the prior.
    """
    from scipy.optimize import minimize

    scores, grades = np.asarray(scores, float), np.asarray(grades)
    study, level, side = np.nonzero((grades >= 0) & np.isfinite(scores).all(axis=-1))
    start = {
        "prior": np.asarray(prior, float).tolist(),
        "trust": 0.0,
        "mean": [0.0, 0.0],
        "scale": [1.0, 1.0],
        "matrix": [[0.0] * 2] * 2,
        "bias": [0.0, 0.0],
        "ridge": None,
        "rows": len(study),
    }
    rows, y = scores[study, level, side], grades[study, level, side]
    if len(np.unique(study)) < 4 or len(np.unique(y)) < 2:
        return start
    ratios = _score_features(rows)
    start |= {"mean": ratios.mean(axis=0).tolist(), "scale": (ratios.std(axis=0) + 1e-6).tolist()}
    w = np.array(SEVERITY_WEIGHTS, float)[y]
    bases = {trust: _calibration_logits(rows, level, start | {"trust": trust}) for trust in (1.0, 0.0)}

    def loss(flat, part, ridge, trust):
        base, z = bases[trust]
        logits, x = base[part].copy(), np.c_[np.ones(len(part)), z[part]]
        logits[:, 1:] += x @ flat.reshape(2, 3).T
        logp = log_softmax(logits, 1)
        at = np.arange(len(part)), y[part]
        residual = np.exp(logp)
        residual[at] -= 1
        gradient = ((w[part, None] * residual)[:, 1:].T @ x).ravel() + ridge * flat
        return -(w[part] * logp[at]).sum() + 0.5 * ridge * (flat**2).sum(), gradient

    def fit(part, ridge, trust):
        return minimize(loss, np.zeros(6), args=(part, ridge, trust), jac=True, method="L-BFGS-B").x

    block = np.unique(study, return_inverse=True)[1] % 5
    every = np.arange(len(y))
    choices = [(trust, ridge) for trust in bases for ridge in ridges]
    held_out = [
        sum(loss(fit(every[block != b], ridge, trust), every[block == b], 0.0, trust)[0] for b in np.unique(block))
        for trust, ridge in choices
    ]
    trust, ridge = choices[int(np.argmin(held_out))]
    theta = fit(every, ridge, trust).reshape(2, 3)
    return start | {"trust": trust, "matrix": theta[:, 1:].tolist(), "bias": theta[:, 0].tolist(), "ridge": ridge}


def yolo_probabilities(scores: ArrayLike, calibration: Mapping[str, Any] | None = None) -> np.ndarray:
    """Severity probabilities (..., 5 levels, sides, 3) float64 from raw scores of that shape; rows sum to 1.

    calibration: of fit_yolo_calibration; None: scores times the weights 1/2/4, normalised (the weighted log loss is
    least for p proportional to weight x posterior). Levels without scores (NaN) stay NaN for the ensemble to fill.
    """
    scores = np.asarray(scores, dtype=np.float64)
    missing = ~np.isfinite(scores).all(axis=-1)
    safe = np.where(missing[..., None], 1.0, scores)
    if calibration is None:
        p = np.clip(safe, 1e-6, None) * np.array(SEVERITY_WEIGHTS, float)
        p /= p.sum(axis=-1, keepdims=True)
    else:
        level = np.broadcast_to(np.arange(len(LEVELS))[:, None], missing.shape)
        logits = _calibration_logits(safe.reshape(-1, 3), level.ravel(), calibration)[0].reshape(safe.shape)
        p = softmax(logits, -1)
    return np.where(missing[..., None], np.nan, p)


def has_scores(scores: ArrayLike) -> np.ndarray:
    """(n, ...) -> (n,) bool: the studies that a detector held out and has scores of."""
    return np.asarray(np.isfinite(scores).any(axis=tuple(range(1, np.ndim(scores)))))


def cross_fitted_probabilities(scores: ArrayLike, grades: ArrayLike, used: np.ndarray) -> np.ndarray:
    """Calibrated probabilities in which no study saw its own labels, neither in the network nor in the calibration.

    scores: (n, views, 5, sides, 3) out of fold, NaN throughout for studies that no detector held out: these serve the
    prior alone. grades: (n, 5, sides), -1 missing. The held-out studies are dealt into parts (deal_parts), each is
    calibrated on the others. used: (n, views) bool, alike within a part: the views whose mean scores are calibrated.
    Returns (n, 5, sides, 3), NaN where these scores are.
    """
    scores, grades = np.asarray(scores, float), np.asarray(grades)
    part = deal_parts(has_scores(scores))
    result = np.full((len(scores), *scores.shape[2:]), np.nan)
    for p in np.unique(part[part >= 0]):
        others = part != p
        mean = mean_scores(np.moveaxis(scores[:, used[~others][0]], 1, 0))
        calibration = fit_yolo_calibration(mean[others], grades[others], severity_prior(grades[others]))
        result[~others] = yolo_probabilities(mean[~others], calibration)
    return result


def yolo_loss_against_prior(grades: np.ndarray, probabilities: np.ndarray, folds: np.ndarray) -> dict[str, float]:
    """Weighted log loss of held-out probabilities, and of the class prior on the same rows.

    Each study's prior is made of the other folds' grades.

    Parameters
    ----------
    grades : (n, 5, sides) int array
        By study, level and side; -1 missing.
    probabilities : (n, 5, sides, 3) array
        Rows that are NaN are left out.
    folds : (n,) array
        Fold of each study.

    Returns
    -------
    dict
        weighted_log_loss; class_prior, the prior's loss; gain, the share of it that is saved, below 0 where the prior
        is better; rows, how many count. Without any the others are NaN.
    """
    use = (grades >= 0) & np.isfinite(probabilities).all(axis=-1)
    if not use.any():
        return {"weighted_log_loss": float("nan"), "class_prior": float("nan"), "gain": float("nan"), "rows": 0}
    prior = np.zeros(probabilities.shape)
    for fold in np.unique(folds):
        prior[folds == fold] = class_prior(grades[folds != fold])
    rows = (row_losses(grades[use], p[use]) for p in (probabilities, prior))
    loss, base = (float((weight * losses).sum() / weight.sum()) for weight, losses in rows)
    return {"weighted_log_loss": loss, "class_prior": base, "gain": 1 - loss / base, "rows": int(use.sum())}
