"""Labels and submissions as arrays, the class prior, folds.

May use: tables, names.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..names import CONDITIONS, GRADES, LABEL_COLUMNS, LEVELS, SEVERITIES, SEVERITY_WEIGHTS
from .tables import whole_number


def id_array(ids: Iterable, name: str = "study_id") -> np.ndarray:
    """Whole numbers of whatever type a table has them in -> (n,) int64. Raises ValueError naming the first other."""
    values = [whole_number(value) for value in ids]
    if None in values:
        raise ValueError(f"{name} {list(ids)[values.index(None)]!r} is no whole number")
    return np.array(values, np.int64)


def labels_to_array(labels: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Labels as an array.

    Parameters
    ----------
    labels : DataFrame
        train.csv's wide form: study_id, and a column of grades for each condition and level. Columns that are absent
        count as missing.

    Returns
    -------
    study_ids : (n,) int64 array
        In the order of the table.
    grades : (n, 5, 5) int64 array
        By study, condition and level: 0 normal/mild, 1 moderate, 2 severe, -1 missing.

    Raises
    ------
    ValueError
        An unknown grade, a study that is listed twice, or an id that is no whole number.

    Examples
    --------
    >>> table = pd.DataFrame({"study_id": [7], "spinal_canal_stenosis_l4_l5": ["Severe"]})
    >>> study_ids, grades = labels_to_array(table)
    >>> study_ids.tolist(), grades[0, 0].tolist()
    ([7], [-1, -1, -1, 2, -1])
    """
    study_ids = id_array(labels["study_id"])
    twice = pd.Index(study_ids).duplicated()
    if twice.any():
        raise ValueError(f"study {study_ids[twice][0]} has two rows of labels")
    columns = labels.reindex(columns=list(LABEL_COLUMNS))
    values, missing = columns.astype(object).to_numpy(copy=True), columns.isna().to_numpy(bool)
    values[missing] = None
    grades = np.full(values.shape, -1, np.int64)
    for number, grade in enumerate(GRADES):
        grades[values == grade] = number
    unknown = ~missing & (grades < 0)
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        raise ValueError(
            f"study {study_ids[row]}: {LABEL_COLUMNS[column]} is {values[row, column]!r}, "
            f"not one of {', '.join(GRADES)}"
        )
    return study_ids, grades.reshape(-1, len(CONDITIONS), len(LEVELS))


def row_ids(study_id: int) -> list[str]:
    """The 25 row ids of a study, in the order of an array (5 conditions, 5 levels).

    Parameters
    ----------
    study_id : int

    Returns
    -------
    list of str
        `{study_id}_{condition}_{level}`.
    """
    return [f"{study_id}_{column}" for column in LABEL_COLUMNS]


def to_submission(study_ids: Iterable, probabilities: ArrayLike) -> pd.DataFrame:
    """Probabilities as a submission.

    Parameters
    ----------
    study_ids : (n,) sequence of int
    probabilities : (n, 5, 5, 3) array
        By study, condition, level and severity; rows need not sum to 1.

    Returns
    -------
    DataFrame
        row_id, normal_mild, moderate, severe: 25 rows a study, sorted by row_id, each normalised in float64.

    Raises
    ------
    ValueError
        A value that is not finite or is negative, or a row of zeros.

    Examples
    --------
    >>> table = to_submission([7], np.ones((1, 5, 5, 3)))
    >>> len(table), table["row_id"][0]
    (25, '7_left_neural_foraminal_narrowing_l1_l2')
    """
    values = np.asarray(probabilities, np.float64).reshape(-1, len(SEVERITIES))
    if not np.isfinite(values).all() or (values < 0).any() or (values.sum(1) <= 0).any():
        raise ValueError("probabilities must be finite, not negative, and not all zero in a row")
    values = values / values.sum(1, keepdims=True)
    table = pd.DataFrame(values, columns=list(SEVERITIES))
    table.insert(0, "row_id", [row for study_id in id_array(study_ids) for row in row_ids(study_id)])
    return table.sort_values("row_id", ignore_index=True)


def severity_values(table: pd.DataFrame) -> np.ndarray:
    """The three severities of a submission-like table: (n, 3) float64, NaN where a cell is empty or no number."""
    columns = [pd.to_numeric(table[name].astype(object), errors="coerce") for name in SEVERITIES]
    return np.stack([column.to_numpy(np.float64, na_value=np.nan) for column in columns], 1)


def from_submission(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """A submission as an array.

    Parameters
    ----------
    table : DataFrame
        row_id, normal_mild, moderate, severe; rows in any order.

    Returns
    -------
    study_ids : (n,) int64 array
        Ascending.
    probabilities : (n, 5, 5, 3) float64 array
        As they stand, by study, condition, level and severity; NaN where a row or a value is absent.

    Raises
    ------
    ValueError
        A row_id that is no `{study_id}_{condition}_{level}` or that appears twice, or a value that is no number.
    """
    names = table["row_id"].astype(object).astype(str)
    parts = names.str.extract(r"^([0-9]{1,18})_(.+)$")
    position = {column: number for number, column in enumerate(LABEL_COLUMNS)}
    column = parts[1].map(position)
    if column.isna().any():
        raise ValueError(f"row_id {names[column.isna()].iloc[0]!r} names no study, condition and level")
    if names.duplicated().any():
        raise ValueError(f"row_id {names[names.duplicated()].iloc[0]!r} appears twice")
    severities = severity_values(table)
    odd = np.isnan(severities) & table[list(SEVERITIES)].notna().to_numpy(bool)
    if odd.any():
        row, severity = np.argwhere(odd)[0]
        raise ValueError(f"row {names.iloc[row]}: {table[SEVERITIES[severity]].iloc[row]!r} is no number")
    study_ids, row = np.unique(parts[0].to_numpy(object).astype(np.int64), return_inverse=True)
    values = np.full((len(study_ids), len(LABEL_COLUMNS), len(SEVERITIES)), np.nan)
    values[row, column.to_numpy(np.int64)] = severities
    return study_ids, values.reshape(-1, len(CONDITIONS), len(LEVELS), len(SEVERITIES))


def class_prior(grades: np.ndarray, weighted: bool = True, smoothing: float = 1.0) -> np.ndarray:
    """Frequencies of the grades for each condition and level.

    Parameters
    ----------
    grades : (n, 5, 5) int array
        By study, condition and level; -1 missing.
    weighted : bool
        Multiply by the metric's weights, which gives the constant prediction with the lowest expected weighted log
        loss.
    smoothing : float
        A count added to each class.

    Returns
    -------
    (5, 5, 3) float64 array
        By condition, level and severity; rows sum to 1.

    Examples
    --------
    >>> class_prior(np.zeros((2, 5, 5), int), weighted=False)[0, 0].round(2).tolist()
    [0.6, 0.2, 0.2]
    """
    counts = np.stack([(grades == k).sum(0) for k in range(len(SEVERITIES))], -1) + smoothing
    if weighted:
        counts = counts * np.asarray(SEVERITY_WEIGHTS, np.float64)
    return counts / counts.sum(-1, keepdims=True)


def make_folds(labels: pd.DataFrame, folds: int, seed: int = 0) -> pd.DataFrame:
    """Deal studies out to folds of equal size with alike severities.

    Studies are sorted by how much disease they carry, those with severe canal stenosis last, and dealt out in shuffled
    rounds: each fold has a like share of every degree, whatever their number.

    Parameters
    ----------
    labels : DataFrame
        train.csv's wide form.
    folds : int
        From 2 to the number of studies.
    seed : int

    Returns
    -------
    DataFrame
        study_id and fold (both int64, folds from 0), in the order of `labels`.

    Raises
    ------
    ValueError
        More folds than studies, fewer than two, or labels that labels_to_array refuses.
    """
    study_ids, grades = labels_to_array(labels)
    if not 2 <= folds <= len(study_ids):
        raise ValueError(f"{len(study_ids)} studies cannot be dealt into {folds} folds")
    rng = np.random.default_rng(seed)
    weight = np.where(grades > 0, np.asarray(SEVERITY_WEIGHTS)[np.clip(grades, 0, 2)], 0)
    any_severe = (grades[:, 0] == 2).any(1)
    order = np.lexsort((rng.random(len(study_ids)), weight.sum((1, 2)), any_severe))
    fold = np.empty(len(study_ids), np.int64)
    for start in range(0, len(order), folds):
        block = order[start : start + folds]
        fold[block] = rng.permutation(folds)[: len(block)]
    return pd.DataFrame({"study_id": study_ids, "fold": fold})
