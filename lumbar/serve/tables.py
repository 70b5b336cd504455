"""What infer_studies returns: the submission, the log and the members' tables, made from all studies' results.

May use: members, results, grade, data, names.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.competition import to_submission
from ..grade.ensemble import combine_members, member_alone
from ..grade.registry import MEMBERS
from ..names import CLASS_COUNTS, CONDITIONS, LEVEL_TABLE_COLUMNS, LEVELS, SEVERITIES, SEVERITY_WEIGHTS
from .members import Members
from .results import Result, steps

# ---- What stands where no member says anything ----


def complete_prior(prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The prior with no cell left out: (prior (5, 5, 3) with rows that sum to 1, by_class (5, 5) bool).

    prior: (5, 5, 3), the training set's prior of each condition and level. Where a cell is not usable (the weights
    carry no prior, or none for this cell) the mean over the condition's other levels stands, and without any that of
    CLASS_COUNTS by the metric's weights, all levels together; by_class marks both.
    """
    prior = np.array(np.broadcast_to(np.asarray(prior, np.float64), (len(CONDITIONS), len(LEVELS), len(SEVERITIES))))
    usable = (
        np.isfinite(prior).all(-1) & (np.nan_to_num(prior, nan=-1) >= 0).all(-1) & (np.nan_to_num(prior).sum(-1) > 0)
    )
    prior[usable] /= prior[usable].sum(-1, keepdims=True)
    counts = np.sum(CLASS_COUNTS, axis=1) * SEVERITY_WEIGHTS
    for c in range(len(CONDITIONS)):
        prior[c, ~usable[c]] = prior[c, usable[c]].mean(0) if usable[c].any() else counts[c] / counts[c].sum()
    return prior, ~usable


# ---- Tables ----


def collect(
    results: Mapping[int, Result], members: Members, ensemble: Mapping[str, Any], folder: Path
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, pd.DataFrame], pd.DataFrame]:
    """infer_studies' tables from the results of all studies; folder: where each has its file.

    The log has the columns study_id; members, partial (those that say something of all rows, of some); rows_from;
    prior_rows (of both priors); levels; second_share (of the second numbering of the vertebrae, by which the members
    were asked, too); dropped (for want of time); *_s seconds, of which `seconds` is the study's
    share of the whole run's time; problems; files (images_digest).
    Raises RuntimeError for a member that failed in every study, see infer_studies.
    """
    prior, by_class = complete_prior(members.prior)
    names = [m for m in MEMBERS if any(m in r["predictions"] for r in results.values())]
    shape = (len(results), len(CONDITIONS), len(LEVELS), len(SEVERITIES))
    stack = {m: np.full(shape, np.nan) for m in names}
    for number, result in enumerate(results.values()):
        for member, values in result["predictions"].items():
            values = np.asarray(values, np.float64)
            stack[member][number] = np.where(values < 0, np.nan, values)
    silent = dict.fromkeys(ensemble["weights"]["spinal"], np.full(shape, np.nan))
    probabilities, count = combine_members(stack or silent, ensemble, prior)
    log = []
    for number, (study_id, result) in enumerate(results.items()):
        there = {m: np.isfinite(stack[m][number]).all(-1) for m in names}
        whole = [there[m] for m in names if MEMBERS[m].whole_study]
        alone = np.any(whole, 0) & (count[number] == 1) if whole else np.zeros(by_class.shape, bool)
        rows = {
            "study model": int(alone.sum()),
            "level prior": int(((count[number] == 0) & ~by_class).sum()),
            "class prior": int(((count[number] == 0) & by_class).sum()),
        }
        rows = {"ensemble": by_class.size - sum(rows.values())} | rows
        log.append(
            {
                "study_id": study_id,
                "members": " ".join(m for m in names if there[m].all()),
                "partial": " ".join(m for m in names if there[m].any() and not there[m].all()),
                "rows_from": ", ".join(f"{what} {n}" for what, n in rows.items() if n),
                "prior_rows": int((count[number] == 0).sum()),
                "levels": " ".join(sorted({row["source"] for row in result["levels"]})),
                "second_share": max((row["second_share"] for row in result["levels"]), default=0.0),
                "dropped": " | ".join(result["dropped"]),
                **{f"{step}_s": result.get(f"{step}_s", 0.0) for step in (*steps(), "predicting")},
                "seconds": result.get("seconds", 0.0),
                "problems": " | ".join(problem["text"] for problem in result["problems"]),
                "files": result.get("files", ""),
            }
        )
    _refuse_lost_members(members, results, stack, folder)
    ids = np.array(list(results), np.int64)
    tables = {m: to_submission(ids, member_alone(stack[m], prior)) for m in names}
    levels = [row for result in results.values() for row in result["levels"]]
    return (
        to_submission(ids, probabilities),
        pd.DataFrame(log),
        tables,
        pd.DataFrame(levels, columns=LEVEL_TABLE_COLUMNS),
    )


def refuse_prior_only(log: pd.DataFrame) -> None:
    """Raise RuntimeError where every row of every study is a prior: that looks like a result and is none.

    Parameters
    ----------
    log : DataFrame
        The one that `collect` returns.

    Raises
    ------
    RuntimeError
        It is so. While Kaggle scores a submission it is printed instead.
    """
    rows = len(CONDITIONS) * len(LEVELS)
    if not len(log) or not (log["prior_rows"] >= rows).all():
        return
    why = next((str(problem) for problem in log["problems"] if problem), "no reason given")
    message = (
        f"no image of these {len(log)} studies could be graded: every row is the training set's frequency, which says "
        f"nothing of them ({why}). PRIOR_ONLY accepts that"
    )
    if not os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
        raise RuntimeError(message)
    print(message)


def _refuse_lost_members(
    members: Members, results: Mapping[int, Result], stack: Mapping[str, np.ndarray], folder: Path
) -> None:
    """Raise RuntimeError (on Kaggle's scoring run: print) for a member that ran and said nothing of any study."""
    for member in members.weights:
        ran = [r for r in results.values() if member in r["predictions"]]
        if not ran or np.isfinite(stack[member]).any():
            continue
        told = (problem["text"] for result in ran for problem in result["problems"] if problem["member"] == member)
        reason = next(told, "no reason given")
        message = f"{member} failed in each of {len(ran)} readable studies ({reason})"
        if not os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
            for study_id in results:  # what failed for this reason must not be found as finished work
                (folder / f"{study_id}.json").unlink(missing_ok=True)
            raise RuntimeError(message)
        print(message)
