"""Training labels that out-of-fold predictions contradict strongly.

About one label in a hundred of the competition is wrong. A prediction by networks that never saw a label tells which:
where they are sure of another grade, and as sure as they usually are of that grade. The idea is that of confident
learning (Northcutt, Jiang and Chuang, JAIR 70, 2021), with a cap on how much of each grade can go.

May use: tables, data, names.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.tables import some_of
from ..names import GROUPS, SEVERITIES, SEVERITY_WEIGHTS
from .tables import align_members, read_bare_tables, read_out_of_fold

DOUBT = 0.05  # a label is doubtful where the members together give it less than this
MOST = 0.05  # of the labels of one grade, in one group of conditions: rare grades are hard, and hard is not wrong


def doubtful_labels(grades: np.ndarray, predictions: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Labels that the members contradict strongly.

    Parameters
    ----------
    grades : (n, 5, 5) int array
        By study, condition and level; -1 missing.
    predictions : mapping of str to (n, 5, 5, 3) array
        Out-of-fold probabilities of each member, NaN where it has none.

    Returns
    -------
    doubtful : (n, 5, 5) bool array
        At most MOST of the labels of a grade in a group of conditions, those that are contradicted most.
    seen : (n, 5, 5) int array
        The grade that the members see there; -1 where no member says anything.
    """
    log_p = np.log(np.clip(np.stack(list(predictions.values())).astype(np.float64), 1e-6, 1))
    there = np.all(np.isfinite(log_p), axis=-1)
    count = there.sum(0)
    mean = np.where(there[..., None], log_p, 0).sum(0) / np.maximum(count, 1)[..., None]
    # Members are trained with the metric's weights; without them their probabilities are those of the grades.
    p = np.exp(mean) / np.asarray(SEVERITY_WEIGHTS, np.float64)
    p /= p.sum(-1, keepdims=True)
    seen = np.where(count > 0, p.argmax(-1), -1)
    labelled = (grades >= 0) & (count > 0)
    stated = np.take_along_axis(p, np.clip(grades, 0, None)[..., None], -1)[..., 0]
    doubtful = np.zeros(grades.shape, bool)
    for conditions in GROUPS.values():
        own = np.zeros(grades.shape, bool)
        own[:, list(conditions)] = labelled[:, list(conditions)]
        of_grade = [own & (grades == k) for k in range(len(SEVERITIES))]
        # As sure as the members are, on average, of what is labelled so.
        usual = np.array([stated[cells].mean() if cells.any() else 1.0 for cells in of_grade])
        sure = p.max(-1) >= usual[np.clip(seen, 0, None)]
        for k, cells in enumerate(of_grade):
            found = np.flatnonzero(cells & (seen != k) & (stated < DOUBT) & sure)
            worst = found[np.argsort(stated.ravel()[found], kind="stable")]
            doubtful.ravel()[worst[: int(MOST * cells.sum())]] = True
    return doubtful, seen


def cleaned_grades(
    grades: np.ndarray,
    study_ids: Sequence[int],
    folders: Iterable[str | Path],
    replace: bool = False,
    folds: np.ndarray | None = None,
    trained: Sequence[int] = (),
) -> np.ndarray:
    """Grades to train on: a copy without the doubtful ones. Prints how many there are; scores are of all labels.

    Parameters
    ----------
    grades : (n, 5, 5) int array
        Of labels_to_array.
    study_ids : sequence of int
    folders : iterable of path
        Folders of finished trainings with an oof.csv, see read_out_of_fold, and other networks' tables of predictions
        that are out of fold, see read_bare_tables; none: nothing is doubtful.
    replace : bool
        Put what the members see in the place of a doubtful label, for a detector, whose images show the finding either
        way; otherwise it is missing (-1).
    folds : (n,) int array, optional
        Fold of each study; without it all studies are trained on.
    trained : sequence of int
        The folds whose networks are trained, each on the other folds' studies. Labels of studies that none of them is
        trained on stay as they are.

    Raises
    ------
    ValueError
        The folders have no out-of-fold predictions of these studies, or only of such that nothing is trained on.
    """
    folders = list(folders)
    if not folders:
        return grades
    tables = read_out_of_fold(folders)
    aligned = align_members(study_ids, {**tables, **read_bare_tables(folders, tables)})
    predicted = {member: p for member, p in aligned.items() if np.isfinite(p).any()}
    if not predicted:
        raise ValueError(
            f"CLEAN: no out-of-fold predictions of these studies in {some_of(folders)}: name folders of "
            "finished trainings of 03 and 04, a run's folder, or tables of such predictions"
        )
    doubtful, seen = doubtful_labels(grades, predicted)
    covered = np.any([np.isfinite(p).all(-1) for p in predicted.values()], 0) & (grades >= 0)
    taken = {fold: np.asarray(folds) != fold for fold in trained} if folds is not None else {}
    if taken:
        used = np.any(list(taken.values()), 0)[:, None, None]
        doubtful, covered = doubtful & used, covered & used
        if not covered.any():
            raise ValueError(
                f"CLEAN: {some_of(folders)} predict only studies that fold {', '.join(map(str, trained))} "
                "holds out, so that no label to train on can be cleaned: name trainings of other folds"
            )
    print(
        f"CLEAN: {doubtful.sum()} of {covered.sum()} labels that {', '.join(predicted)} predicted out of fold are "
        f"contradicted strongly; {'replaced' if replace else 'left out'} in training"
        + "".join(f", {doubtful[rows].sum()} of fold {fold}'s" for fold, rows in taken.items() if len(taken) > 1)
    )
    return np.where(doubtful, seen if replace else -1, grades)
