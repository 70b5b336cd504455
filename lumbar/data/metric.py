"""The competition's metric, and how much one prediction gains over another.

May use: competition, names.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..names import CONDITIONS, GROUPS, LEVELS, SEVERITY_WEIGHTS
from .competition import from_submission, labels_to_array, severity_values

EPS = np.finfo(np.float64).eps  # the metric's clip of probabilities, as scikit-learn has it


def score_arrays(grades: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """The competition's metric on arrays; see competition_score.

    Parameters
    ----------
    grades : (n, 5, 5) int array
        By study, condition and level; -1 missing.
    probabilities : (n, 5, 5, 3) array
        Rows are normalised here in float64. Those without a grade may be NaN.

    Returns
    -------
    dict of str to float
        spinal, foraminal, subarticular, any_severe and total, their mean. A term without a single grade is NaN, and so
        is then the total.

    Raises
    ------
    ValueError
        A graded row has no finite prediction.

    Examples
    --------
    >>> scores = score_arrays(np.zeros((1, 5, 5), int), np.full((1, 5, 5, 3), 1 / 3))
    >>> round(scores["spinal"], 4), round(scores["any_severe"], 4)
    (1.0986, 0.4055)
    """
    true, predicted = np.asarray(grades), np.asarray(probabilities, np.float64)
    predicted = predicted / predicted.sum(-1, keepdims=True)
    if not np.isfinite(predicted[true >= 0]).all():
        raise ValueError("a graded row has no finite prediction")
    losses, weights = (sums.sum(0) for sums in term_sums(true, predicted))
    scores = {
        term: float(loss / weight) if weight > 0 else float("nan")
        for term, loss, weight in zip((*GROUPS, "any_severe"), losses, weights, strict=True)
    }
    scores["total"] = float(np.mean([scores[term] for term in (*GROUPS, "any_severe")]))
    return scores


def row_losses(grades: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each grade weighs in the metric, and its loss: (weight, -log p of the true severity), both float64 (...).

    grades: (...) int, -1 missing; probabilities: (..., 3), rows that sum to 1. Both are 0 where there is no grade; the
    loss is NaN where a grade has no prediction.
    """
    grades, probabilities = np.asarray(grades), np.asarray(probabilities, np.float64)
    graded, safe = grades >= 0, np.clip(grades, 0, 2)
    weight = np.where(graded, np.asarray(SEVERITY_WEIGHTS, np.float64)[safe], 0.0)
    true = np.take_along_axis(probabilities, safe[..., None], -1)[..., 0]
    return weight, -np.log(np.clip(np.where(graded, true, 1), EPS, 1))


def term_sums(grades: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each study's share in the four terms: (loss (n, 4), weight (n, 4)); a term is loss.sum() / weight.sum().

    grades: (n, 5, 5) int, -1 left out; probabilities: (n, 5, 5, 3). The terms are those of GROUPS, then any severe.
    """
    weight, loss = row_losses(grades, probabilities)
    loss = weight * loss
    severe = np.where(grades[:, 0] >= 0, probabilities[:, 0, :, 2], 0.0).max(1)
    any_weight, any_true = weight[:, 0].max(1), (grades[:, 0] == 2).any(1)
    any_loss = -any_weight * np.log(np.clip(np.where(any_true, severe, 1 - severe), EPS, 1 - EPS))
    losses = [loss[:, list(members)].sum((1, 2)) for members in GROUPS.values()]
    weights = [weight[:, list(members)].sum((1, 2)) for members in GROUPS.values()]
    return np.stack([*losses, any_loss], 1), np.stack([*weights, any_weight], 1)


def paired_gain(
    grades: np.ndarray, before: np.ndarray, after: np.ndarray, terms: Sequence[int] = (0, 1, 2, 3)
) -> tuple[float, float]:
    """How much lower `after` scores than `before`, summed over the terms, and the standard error of that.

    grades: (n, 5, 5) int, -1 left out; before, after: (n, 5, 5, 3); terms: which of term_sums' four.
    The error is that of a ratio of sums over independent studies (the delta method), of the paired difference.
    """
    loss_before, weight = term_sums(grades, before)
    loss_after, _ = term_sums(grades, after)
    total = np.maximum(weight.sum(0), 1e-12)
    saved = loss_before - loss_after
    gain = saved.sum(0) / total
    influence = ((saved - gain * weight) / total)[:, list(terms)].sum(1)
    return float(gain[list(terms)].sum()), float(np.sqrt(np.square(influence).sum()))


def competition_score(labels: pd.DataFrame, submission: pd.DataFrame) -> dict[str, float]:
    """The competition's score: weighted log loss per condition group, and for any severe canal stenosis.

    The loss of a row weighs 1, 2 or 4 by its true grade. The any-severe term has one row a study: its probability is
    the largest p(severe) of the canal's graded levels, its weight the largest of theirs. Source: the competition's
    evaluation page and metric notebook (RSNA 2024 Lumbar Spine Degenerative Classification, Kaggle).

    Parameters
    ----------
    labels : DataFrame
        train.csv's wide form. Missing labels are left out.
    submission : DataFrame
        The competition's form, rows in any order. Studies without labels are ignored.

    Returns
    -------
    dict of str to float
        spinal, foraminal, subarticular, any_severe and total, their mean. A term without a single label is NaN.

    Raises
    ------
    ValueError
        A graded row has no prediction, or a row has one that is negative, not finite or all zero; the message names it.

    Examples
    --------
    >>> import pandas as pd
    >>> from lumbar.data.competition import to_submission
    >>> labels = pd.DataFrame({"study_id": [7], "spinal_canal_stenosis_l4_l5": ["Severe"]})
    >>> round(competition_score(labels, to_submission([7], np.full((1, 5, 5, 3), 1 / 3)))["spinal"], 4)
    1.0986
    """
    study_ids, grades = labels_to_array(labels)
    predicted_ids, probabilities = from_submission(submission)
    values = severity_values(submission)
    bad = ~np.isfinite(values).all(1) | (values < 0).any(1) | (values.sum(1) <= 0)
    if bad.any():
        raise ValueError(f"{submission['row_id'][bad].iloc[0]}: needs three finite values >= 0, not all zero")
    aligned = np.full((len(study_ids), *probabilities.shape[1:]), np.nan)
    where = {study_id: number for number, study_id in enumerate(predicted_ids)}
    for number, study_id in enumerate(study_ids):
        if study_id in where:
            aligned[number] = probabilities[where[study_id]]
    absent = (grades >= 0) & np.isnan(aligned[..., 0])
    if absent.any():
        study, condition, level = np.argwhere(absent)[0]
        name = f"{study_ids[study]}_{CONDITIONS[condition]}_{LEVELS[level]}"
        raise ValueError(f"{int(absent.sum())} graded rows have no prediction, the first is {name}")
    return score_arrays(grades, aligned)
