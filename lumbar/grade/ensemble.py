"""Members combined: shares by condition, scaling, what each step gains on studies that it was not fitted on.

Members are combined in three steps, each fitted on out-of-fold predictions under the competition's own terms and each
regularised towards the identity: shares per group of conditions; temperature, class bias and a share of the prior per
group; and a correction of each cell's log odds by those of its neighbours. cross_validate_ensemble says what each step
gains.

A share is what a member counts in the mean; weights are a network's files. Only ensemble.json, the rows of VARIANTS and
messages say weights of both.

May use: stacker, tables, registry, data, storage, weights, names.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import softmax

from ..data.competition import class_prior, to_submission
from ..data.metric import paired_gain, row_losses, score_arrays
from ..data.tables import read_labels
from ..names import GROUPS
from ..storage import read_json
from ..weights import Stated
from .registry import MEMBERS, by_member, member_weights
from .stacker import (
    FLOOR_UNIT,
    STRENGTH,
    WEIGHT_SHARE,
    _Target,
    apply_stacker,
    check_stacker,
    deal_studies,
    fit_stacker,
    stack_log_probabilities,
)
from .tables import (
    _fold_of,
    align_members,
    align_to_labels,
    check_predictions,
    partial_submission,
    read_out_of_fold,
    sorted_grades,
)

# On fewer studies than these a temperature that flatters them can cost others more than it brings: scaling then has to
# gain so many standard errors in cross-validation, a group at a time.
SCALING_STUDIES = 200
SCALING_ERRORS = 2.0
# The search starts from default shares times exp(-(a member's loss - the best one's) / scale): with a dozen studies the
# start weighs much, and fixed shares would hold up a member that is far behind. The scale is SCORE_SCALE on many
# studies, twice that on SCORE_STUDIES and more on fewer, which say less of who is better.
SCORE_SCALE, SCORE_STUDIES = 0.1, 12
# An ensemble.json is used as far as its numbers go: shares that rounding does not reach, temperatures and biases (log
# odds) that some fit might find. Beyond them a wrong hand or a damaged disk wrote it.
SHARE_SUM = (1e-3, 1e3)
TEMPERATURES = (0.01, 100.0)
MAX_BIAS = 20.0
VARIANTS = ("equal weights", "default weights", "fitted weights", "+ scaling", "+ stacker")


def default_share(member: str) -> float:
    """A member's share, where no out-of-fold predictions say what it is worth."""
    return MEMBERS[member].share if member in MEMBERS else 0.1


def default_ensemble(members: Iterable[str] = MEMBERS) -> dict[str, Any]:
    """The ensemble without out-of-fold predictions: default shares, no calibration.

    Parameters
    ----------
    members : iterable of str
        Names.

    Returns
    -------
    dict
        weights, temperature, bias and floor, each a dict by group of conditions (GROUPS): shares by member, which need
        not sum to 1; a number; three numbers, one a severity; a number. And `found`, where they are from.
    """
    members = list(members)
    return {
        "weights": {group: {m: default_share(m) for m in members} for group in GROUPS},
        "temperature": {group: 1.0 for group in GROUPS},
        "bias": {group: [0.0, 0.0, 0.0] for group in GROUPS},
        "floor": {group: 0.0 for group in GROUPS},
        "found": "defaults",
    }


def equal_ensemble(members: Collection[str]) -> dict[str, Any]:
    """The ensemble that trusts all members alike: equal shares, no calibration.

    Parameters
    ----------
    members : collection of str
        Names.

    Returns
    -------
    dict
        As default_ensemble's.
    """
    return default_ensemble(members) | {
        "weights": {group: {m: 1 / len(members) for m in members} for group in GROUPS},
        "found": "equal",
    }


def combine_members(
    predictions: Mapping[str, ArrayLike], ensemble: Mapping[str, Any], prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean of log probabilities, calibrated per group of conditions; then the stacker, if there is one.

    Per group p = (1 - floor) softmax(sum of share_m log p_m / temperature + bias) + floor prior: the prior's part is
    for what no member can see coming, a level named wrongly or a slip of the reader, where log p has a price without
    bound. 0 in an ensemble without the key "floor".

    Parameters
    ----------
    predictions : mapping of str to (n, 5, 5, 3) array
        Of each member, NaN where it has nothing to say: its share goes to the others.
    ensemble : mapping
        As fit_ensemble or default_ensemble make it; its key "stacker" is optional, see apply_stacker.
    prior : (5, 5, 3) array
        For the floor and where no member has anything.

    Returns
    -------
    probabilities : (n, 5, 5, 3) float64 array
        Rows sum to 1.
    n_members : (n, 5, 5) int array
        How many members each row rests on.

    Raises
    ------
    ValueError
        A member that the ensemble has no share for: most likely its name is spelt in two ways. Or a stacker of another
        version, see apply_stacker.
    """
    members = list(predictions)
    known = {m for shares in ensemble["weights"].values() for m in shares}
    if set(members) - known:
        unknown = ", ".join(map(repr, sorted(set(members) - known)))
        raise ValueError(f"the ensemble has no weight for {unknown}, but for {', '.join(sorted(known))}")
    log_p, there = stack_log_probabilities([predictions[m] for m in members])
    prior = np.asarray(prior, np.float64) / np.sum(prior, -1, keepdims=True)
    result = np.empty(log_p.shape[1:])
    for group, members_of_group in GROUPS.items():
        conditions = list(members_of_group)
        share = np.array([ensemble["weights"][group].get(m, 0.0) for m in members])
        share = share[:, None, None, None] * there[:, :, conditions]
        # Members without a share still help where they are all there is.
        share = np.where(share.sum(0) > 0, share, there[:, :, conditions].astype(np.float64))
        mean = (share[..., None] * log_p[:, :, conditions]).sum(0) / np.maximum(share.sum(0), 1e-12)[..., None]
        logits = mean / ensemble["temperature"][group] + np.asarray(ensemble["bias"][group])
        result[:, conditions] = softmax(logits, -1)
        floor = ensemble.get("floor", {}).get(group, 0.0)
        if floor:
            result[:, conditions] = (1 - floor) * result[:, conditions] + floor * prior[conditions]
    count = there.sum(0)
    result = np.where((count > 0)[..., None], result, prior)
    if ensemble.get("stacker"):
        result = np.where((count > 0)[..., None], apply_stacker(ensemble["stacker"], result), result)
    return result, count


def member_alone(predictions: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """A member's own probabilities, rows that sum to 1, and the prior where it has nothing to say: as it would be
    submitted by itself, its zeros included. predictions: (n, 5, 5, 3), NaN where absent; prior: (5, 5, 3)."""
    _, (there,) = stack_log_probabilities([predictions])
    p = np.where(there[..., None], predictions, prior)
    return p / p.sum(-1, keepdims=True)


# ---- Shares, temperature, bias, floor ----


def fit_ensemble(
    labels: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    strength: float = STRENGTH,
    members: Collection[str] = MEMBERS,
    towards: str = "scores",
    scaling: bool = True,
    stacker: bool = True,
) -> dict[str, Any]:
    """Shares, temperature, class bias and floor per group from out-of-fold predictions; then a stacker.

    The competition's own terms are minimised (canal together with any-severe), plus a penalty of `strength` over the
    number of studies that keeps them near the start: a few dozen studies must not decide alone. Deterministic, whatever
    the order of the rows.

    Parameters
    ----------
    labels : DataFrame
        train.csv's wide form.
    tables : mapping of str to DataFrame
        Of each member, submission-like; any rows may be missing.
    strength : float
        Of the penalty.
    members : collection of str
        The order of the names; others follow.
    towards : {"scores", "defaults", "equal"}
        The shares that the penalty regularises towards: default_share, less for members that are behind the best on
        these studies, see SCORE_SCALE; default_share alone; or equal ones.
    scaling, stacker : bool
        Whether temperature, bias and floor are tried, and whether fit_stacker is: both are kept only in groups where
        cross-validation within these studies says that they gain (scaling: with SCALING_STUDIES or more always).

    Returns
    -------
    dict
        Like default_ensemble's, with the scores before and after in `found`, and `stacker` where it gains.

    Raises
    ------
    ValueError
        Tables that check_predictions refuses, or one that predicts none of the labelled studies; labels without
        study_id or any label column; another `towards`.
    """
    if towards not in ("scores", "defaults", "equal"):
        raise ValueError(f"towards is 'scores', 'defaults' or 'equal', not {towards!r}")
    study_ids, grades = sorted_grades(labels)
    return _fit_arrays(grades, align_to_labels(study_ids, tables), strength, members, towards, scaling, stacker)


def _fit_arrays(grades, predictions, strength, members, towards, scaling=True, stacker=True, judged=True):
    """fit_ensemble on arrays: grades (n, 5, 5), predictions dict member -> (n, 5, 5, 3), NaN where absent.

    judged: whether scaling has to gain in cross-validation to be kept.
    """
    names = [m for m in members if m in predictions] + [m for m in predictions if m not in members]
    ensemble = equal_ensemble(names) if towards == "equal" else default_ensemble(names)
    if towards == "scores":
        ensemble["weights"] = _shares_by_score(grades, predictions, names)
    log_p, there = stack_log_probabilities([predictions[m] for m in names])
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


def _shares_by_score(grades, predictions, names):
    """dict group -> dict member -> default share, less for each by its loss on these studies, see SCORE_SCALE.

    Members are compared on the rows that all of them have, or each on its own where those are none.
    """
    row_weights, losses = zip(*(row_losses(grades, predictions[m]) for m in names), strict=True)
    known = np.isfinite(losses) & (np.array(row_weights) > 0)
    shares = {}
    for group, conditions in GROUPS.items():
        own = known[:, :, list(conditions)]
        own = np.where(own.all(0).any(), own.all(0), own)
        weight = np.where(own, np.array(row_weights)[:, :, list(conditions)], 0.0)
        loss = np.where(own, np.array(losses)[:, :, list(conditions)], 0.0)
        total = weight.sum((1, 2, 3))
        mean = (weight * loss).sum((1, 2, 3)) / np.where(total > 0, total, 1)
        best = mean[total > 0].min() if (total > 0).any() else 0.0
        studies = max(int((weight > 0).any((0, 2, 3)).sum()), 1)
        scale = SCORE_SCALE * (1 + SCORE_STUDIES / studies)
        behind = np.where(total > 0, np.exp(-(mean - best) / scale), 1.0)
        # Never nothing: what was unlucky on a few studies must be able to come back.
        share = np.array([default_share(m) for m in names]) * np.maximum(behind, 1e-3)
        shares[group] = dict(zip(names, (share / share.sum()).tolist(), strict=True))
    return shares


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
    part = deal_studies(grades, parts)
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
    (members,) shares. The unknowns are how much the log of each share, the log of the temperature and the two
    biases move, and the share of the prior, in FLOOR_UNIT.
    """
    from scipy.optimize import minimize

    count = len(start)
    # Shares trade one fair member for another; a wrong bias or temperature spoils every row, so it pays more.
    penalty = 0.1 * strength / target.studies * np.repeat([WEIGHT_SHARE, 1.0], [count, 4])

    def loss(values):
        share = np.exp(np.log(start) + values[:count])[:, None, None, None] * there
        share /= np.maximum(share.sum(0), 1e-12)
        mean = np.einsum("mncl,mnclk->nclk", share, log_p)
        cold, floor = np.exp(-values[count]), FLOOR_UNIT * values[-1]
        p = softmax(mean * cold + np.array([0.0, *values[count + 1 : -1]]), -1)
        mixed = (1 - floor) * p + floor * prior
        value, by_log = target.loss(np.log(mixed))
        by_floor = (by_log * (prior - p) / mixed).sum()
        slope = by_log * (1 - floor) * p / mixed
        slope -= p * slope.sum(-1, keepdims=True)
        by_mean = slope * cold
        by_share = np.einsum("nclk,mnclk->mncl", by_mean, log_p) - (by_mean * mean).sum(-1)
        by_scale = [-(by_mean * mean).sum(), *slope.sum((0, 1, 2))[1:], FLOOR_UNIT * by_floor]
        return value, np.array([*(share * by_share).sum((1, 2, 3)), *by_scale])

    def penalised(values):
        value, gradient = loss(values)
        return value + (penalty * np.square(values)).sum(), gradient + 2 * penalty * values

    zero = np.zeros(count + 4)
    bounds = [(-3, 3)] * (count + 3) + [(0, 0.2 / FLOOR_UNIT)] if scaling else [(-3, 3)] * count + [(0, 0)] * 4
    found = minimize(penalised, zero, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-8}).x
    share = start * np.exp(found[:count])
    fitted = {
        "weights": (share / share.sum()).tolist(),
        "temperature": float(np.exp(found[count])),
        "bias": [0.0, *found[count + 1 : -1].tolist()],
        "floor": float(FLOOR_UNIT * found[-1]),
    }
    return fitted, float(loss(zero)[0]), float(loss(found)[0])


# ---- What the search really gains ----


def cross_validate_ensemble(
    labels: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    folds: pd.DataFrame,
    strength: float = STRENGTH,
    members: Collection[str] = MEMBERS,
    towards: str = "scores",
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Nested cross-validation of the whole search: everything is fitted on the other folds, scored on this one.

    Parameters
    ----------
    labels : DataFrame
        train.csv's wide form.
    tables : mapping of str to DataFrame
        Out-of-fold submission of each member (any rows may be missing, as may studies).
    folds : DataFrame
        study_id, fold: the folds the members were trained in (what a fold's own models have seen must not choose its
        weights).
    strength, members, towards
        Of fit_ensemble.

    Returns
    -------
    scores : DataFrame
        A row for each member alone, then "equal weights", "default weights", "fitted weights", "+ scaling" and
        "+ stacker". The columns are the metric's terms pooled over all folds, `gain` over the default weights, its
        standard error `gain_se`, and `rows`, the graded rows that rest on a member. All are scored on the rows that any
        member has; where a member alone lacks one, the prior of the other folds stands.
    submissions : dict of str to DataFrame
        By those names, the nested predictions in the competition's form, without the rows that no member has.

    Raises
    ------
    ValueError
        No tables or bad ones, a study without a fold or with two, or fewer than two folds.
    """
    if not tables:
        raise ValueError("no member's predictions to combine")
    study_ids, grades = sorted_grades(labels)
    aligned = align_to_labels(study_ids, tables)
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
    submissions = {name: partial_submission(study_ids, p, there) for name, p in nested.items()}
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


def combine_tables(
    tables: Mapping[str, pd.DataFrame],
    ensemble: Mapping[str, Any],
    prior: np.ndarray,
    study_ids: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Members' predictions of the same split -> the ensemble's, a complete submission.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        Of each member, submission-like as of align_members; any rows may be missing in some.
    ensemble : mapping
        Of combine_members.
    prior : (5, 5, 3) array
        As of class_prior, for what is missing in all.
    study_ids : sequence of int, optional
        Which studies to predict, for instance those of sample_submission.csv; None: all that any table has.

    Returns
    -------
    DataFrame
        As to_submission's: 25 rows a study, sorted by row_id.

    Raises
    ------
    ValueError
        As align_members and combine_members do.
    """
    if study_ids is None:
        study_ids = sorted(
            {study_id for name, table in tables.items() for study_id in check_predictions(table, name)[0]}
        )
    return to_submission(study_ids, combine_members(align_members(study_ids, tables), ensemble, prior)[0])


def ensemble_for(folders: Sequence[str | Path], data: str | Path, members: Collection[str] = MEMBERS) -> dict[str, Any]:
    """The ensemble: an ensemble.json that lies with the weights (05_inference writes one, keep it there);
    else fitted on the oof.csv files that lie there and data/train.csv; else the defaults. See fit_ensemble.

    A member with weights in the folders of which neither knows anything gets its default share beside those that are
    known, and these divide the rest as before. Prints which of the three it was, and who got a default share.

    Parameters
    ----------
    folders : sequence of path
        As weight_folders finds them.
    data : path
        Folder with train.csv, if there is one.
    members : collection of str
        Those of MEMBERS that are fitted, and that the defaults are for.

    Returns
    -------
    dict
        As fit_ensemble's.

    Raises
    ------
    ValueError
        As fit_ensemble; or, as DamagedFile, an ensemble.json that cannot be read or is none that a stage wrote: shares,
        temperature, bias, floor or stacker are absent or out of range.
    """
    members = [m for m in MEMBERS if m in members]
    attached = [m for m in by_member(member_weights(folders)[0]) if m in members]
    for folder in folders:
        path = Path(folder) / "ensemble.json"
        if path.is_file():
            print(f"the ensemble's weights are those of {path}")
            return _with_default_shares(_read_ensemble(path), attached)
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


def _read_ensemble(path):
    """The ensemble that an ensemble.json holds; DamagedFile where combine_members could not use it, or only to spoil
    every row."""
    remedy = "delete it, or take that of a finished 05_inference"
    ensemble = read_json(path, remedy)
    known = Stated(path, ensemble, remedy)
    parts = {key: known.part(key) for key in ("weights", "temperature", "bias")}
    if floor := known.part("floor", optional=True):
        parts["floor"] = floor
    for part in parts.values():
        part.keys(GROUPS)
    stated = Stated(
        path, {f"{group} {key}": p.about.get(group) for key, p in parts.items() for group in GROUPS}, remedy
    )
    for group in GROUPS:
        given = stated.part(f"{group} weights").about
        shares = Stated(path, {f"{group} weight of {member}": share for member, share in given.items()}, remedy)
        total = sum(shares.number(name, 0, SHARE_SUM[1]) for name in shares.about)
        if not SHARE_SUM[0] <= total <= SHARE_SUM[1]:
            stated.refuse(f"{group} weights", f"numbers whose sum is from {SHARE_SUM[0]} to {SHARE_SUM[1]}")
        stated.number(f"{group} temperature", *TEMPERATURES)
        stated.numbers(f"{group} bias", (3,), -MAX_BIAS, MAX_BIAS)
        stated.number(f"{group} floor", 0, 1, optional=True)
    stacker = known.part("stacker", optional=True)
    if stacker and stacker.about:
        check_stacker(stacker)
    return ensemble


def _with_default_shares(ensemble, attached):
    """The ensemble with a default share for each attached member that it does not know."""
    shares: dict[str, dict[str, float]] = {}
    for group, known in ensemble["weights"].items():
        unknown = [m for m in attached if m not in known]
        every = sum(default_share(m) for m in {*known, *unknown})
        new = {m: default_share(m) / every for m in unknown}
        scale = (1 - sum(new.values())) / (sum(known.values()) or 1.0)
        shares[group] = {m: share * scale for m, share in known.items()} | new if unknown else known
        if unknown and group == next(iter(GROUPS)):
            text = ", ".join(f"{m} {share:.2f}" for m, share in new.items())
            print(f"nothing is known of what these members are worth, their default shares stand: {text}")
    return {**ensemble, "weights": shares}
