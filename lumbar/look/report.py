"""Tables of scores, levels and settings for the report.

May use: slices, grade, spine, data, run, names.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.competition import class_prior, make_folds
from ..data.geometry import boxes_from_table
from ..data.metric import row_losses, score_arrays, term_sums
from ..data.source import Source
from ..data.volume import load_study
from ..grade.tables import align_members
from ..names import GRADES, LEVELS
from ..run.fingerprint import read_manifest
from ..spine.level_scores import compare_with_labels
from .slices import level_name

TERM_NAMES = {
    "spinal": "Spinal canal",
    "foraminal": "Foraminal",
    "subarticular": "Subarticular",
    "any_severe": "Any severe canal",
    "total": "Score",
}


def cell_losses(grades: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Weighted log loss of each condition and level.

    Parameters
    ----------
    grades : (n, 5, 5) int array
        By study, condition and level; -1 missing.
    probabilities : (n, 5, 5, 3) array
        NaN (left out) or rows that sum to 1.

    Returns
    -------
    (5, 5) float64 array
        By condition and level; NaN where nothing is graded.
    """
    weight, loss = known_losses(grades, probabilities)
    total = weight.sum(0)
    return np.where(total > 0, (weight * loss).sum(0) / np.where(total > 0, total, 1), np.nan)


def known_losses(grades: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """metric.row_losses, both (n, 5, 5), where there is no prediction 0 as well."""
    weight, loss = row_losses(grades, probabilities)
    known = np.isfinite(loss)
    return np.where(known, weight, 0), np.where(known, loss, 0)


def worst_rows(
    study_ids: Sequence[int] | np.ndarray, grades: np.ndarray, probabilities: np.ndarray, count: int = 6
) -> pd.DataFrame:
    """The most wrong predictions, at most one a study.

    Parameters
    ----------
    study_ids : (n,) sequence of int
    grades : (n, 5, 5) int array
        By study, condition and level; -1 missing.
    probabilities : (n, 5, 5, 3) array
        NaN (left out) or rows that sum to 1.
    count : int
        How many at most.

    Returns
    -------
    DataFrame
        study_id, condition, level (indices), grade (of the label), loss (without the weight). Ordered by weight times
        log loss, what a row costs in the metric.
    """
    weight, loss = known_losses(grades, probabilities)
    cost = weight * loss
    order = np.dstack(np.unravel_index(np.argsort(-cost, axis=None), cost.shape))[0]
    rows: list[list] = []
    seen = set()
    for n, condition, level in order:
        if len(rows) == count or cost[n, condition, level] == 0:
            break
        if n not in seen:
            seen.add(n)
            rows.append([study_ids[n], condition, level, grades[n, condition, level], loss[n, condition, level]])
    return pd.DataFrame(rows, columns=["study_id", "condition", "level", "grade", "loss"])


def score_table(grades: np.ndarray, predictions: Mapping[str, np.ndarray], draws: int = 0) -> pd.DataFrame:
    """The metric's terms of several predictions.

    A member that grades only some conditions or studies is scored on those; its terms without a row are NaN, and so is
    its total.

    Parameters
    ----------
    grades : (n, 5, 5) int array
        By study, condition and level; -1 missing.
    predictions : mapping of str to (n, 5, 5, 3) array
        Name -> probabilities, NaN where there are none.
    draws : int
        Of resampled_scores, for intervals; 0: none.

    Returns
    -------
    DataFrame
        One row a name. Columns: those of TERM_NAMES; with draws `low` and `high`, the total's 95% interval; with a
        `Class prior` and a `Perfect reader` among the names `closed`, how much of the distance between the two each
        prediction closes: 0 is no better than the prior, 1 is perfect; `rows`, the gradings that are scored.
    """
    table = {}
    for name, probabilities in predictions.items():
        there, known = _graded_rows(grades, probabilities)
        scores = score_arrays(there, known) if (there >= 0).any() else dict.fromkeys(TERM_NAMES, np.nan)
        table[name] = {**scores, "rows": int((there >= 0).sum())}
    table = pd.DataFrame.from_dict(table, orient="index")
    if draws:
        totals = np.stack([drawn[:, -1] for drawn in resampled_scores(grades, predictions, draws).values()], 1)
        for place, (end, percent) in enumerate((("low", 2.5), ("high", 97.5))):
            table.insert(len(TERM_NAMES) + place, end, percentiles(totals, percent))
    if {"Class prior", "Perfect reader"} <= set(table.index):
        prior, perfect = table.loc["Class prior", "total"], table.loc["Perfect reader", "total"]
        table.insert(table.columns.get_loc("rows"), "closed", (prior - table["total"]) / (prior - perfect))
    return table


def _graded_rows(grades, probabilities):
    """(grades, probabilities) with -1 and 1/3 where a prediction is missing."""
    there = (np.asarray(grades) >= 0) & np.isfinite(probabilities).all(-1)
    return np.where(there, grades, -1), np.where(there[..., None], probabilities, 1 / 3)


def resampled_scores(
    grades: np.ndarray, predictions: Mapping[str, np.ndarray], draws: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """The score on studies drawn anew with replacement, the bootstrap: dict name -> (draws, 5), TERM_NAMES' terms.

    predictions as in score_table. All of them meet the same draws, so that differences between two of them can be
    taken draw by draw. A term that has nothing to weigh in a draw is NaN there, and so is the total.
    """
    count = len(grades)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws).astype(np.float64)
    scores = {}
    for name, probabilities in predictions.items():
        there, known = _graded_rows(grades, probabilities)
        loss, weight = term_sums(there, known / known.sum(-1, keepdims=True))
        with np.errstate(invalid="ignore", divide="ignore"):
            terms = (times @ loss) / (times @ weight)
        scores[name] = np.concatenate([terms, terms.mean(1, keepdims=True)], 1)
    return scores


def percentiles(values: np.ndarray, percent: float | Sequence[float]) -> np.ndarray:
    """Percentile(s) of each column of values (n, k), NaN left out: ([p,] k), NaN for a column that has nothing else."""
    known = np.isfinite(values).any(0)
    return np.where(known, np.nanpercentile(np.where(known, values, 0), percent, axis=0), np.nan)


def interval_text(low: float, high: float, digits: int = 3) -> str:
    """`0.31 to 0.38`, or a dash."""
    return f"{low:.{digits}f} to {high:.{digits}f}" if np.isfinite(low) and np.isfinite(high) else "\N{EN DASH}"


def term_table(
    grades: np.ndarray, predictions: Mapping[str, np.ndarray], name: str, reference: str, draws: int = 1000
) -> pd.DataFrame:
    """One prediction's terms beside a reference's: DataFrame by term with 95% intervals over resampled studies.

    Parameters
    ----------
    grades, predictions
        As in score_table.
    name, reference : str
        Keys of `predictions`.
    draws : int
        Of resampled_scores.

    Returns
    -------
    DataFrame
        Columns: the reference's and the prediction's score, its interval, how much lower it is than the reference, and
        that difference's interval (text).
    """
    table = score_table(grades, {key: predictions[key] for key in (reference, name)})
    drawn = resampled_scores(grades, {key: predictions[key] for key in (reference, name)}, draws)
    rows = {}
    for place, (term, title) in enumerate(TERM_NAMES.items()):
        own, gain = drawn[name][:, place], drawn[reference][:, place] - drawn[name][:, place]
        ends = [interval_text(*percentiles(x[:, None], [2.5, 97.5])[:, 0]) for x in (own, gain)]
        rows[title] = {
            reference: table.loc[reference, term],
            name: table.loc[name, term],
            "95% interval": ends[0],
            "Lower by": table.loc[reference, term] - table.loc[name, term],
            "its 95% interval": ends[1],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Term")


def problem_table(sentences: Iterable[str]) -> pd.DataFrame:
    """What was left out or doubtful, counted.

    Parameters
    ----------
    sentences : iterable of str
        Problems of read_study, as series.csv and inference_log.csv have them. Those that differ only in studies,
        series, files and numbers count as one.

    Returns
    -------
    DataFrame
        what, times, example (the first of them), the most frequent first.
    """
    rows: dict[str, tuple[int, str]] = {}
    for sentence in sentences:
        what = re.sub(r"^study \d+(, series \d+)?: ", "", sentence)
        what = re.sub(r"\S+\.dcm\b", "a file", what)
        what = re.sub(r"\d+(\.\d+)?", "\N{HORIZONTAL ELLIPSIS}", what)
        times, example = rows.get(what, (0, sentence))
        rows[what] = (times + 1, example)
    table = [(what, times, example) for what, (times, example) in rows.items()]
    table.sort(key=lambda row: (-row[1], row[0]))
    return pd.DataFrame(table, columns=["what", "times", "example"])


def out_of_fold_prior(grades: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """For each study the weighted class prior of the studies in other folds.

    Parameters
    ----------
    grades : (n, 5, 5) int array
        By study, condition and level; -1 missing.
    folds : (n,) int array

    Returns
    -------
    (n, 5, 5, 3) float64 array
        By study, condition, level and severity.
    """
    return np.stack([class_prior(grades[folds != fold]) for fold in folds])


def nested_folds(
    labels: pd.DataFrame, folds: np.ndarray, tables: Mapping[str, pd.DataFrame], parts: int = 5
) -> pd.DataFrame:
    """The folds in which the ensemble is judged.

    They are the members' own folds: an ensemble for a fold's studies is found on the other folds, as the members were.
    Where the members predicted one fold only, its studies are dealt into `parts` instead.

    Parameters
    ----------
    labels : DataFrame
        train.csv's wide form.
    folds : (n,) int array
        Fold of each of its rows.
    tables : mapping of str to DataFrame
        Member -> out-of-fold table; at least one.
    parts : int
        Fewer where there are fewer studies.

    Returns
    -------
    DataFrame
        study_id, fold of the predicted studies, in the order of `labels`.

    Raises
    ------
    ValueError
        A table that check_predictions refuses.
    """
    aligned = align_members(labels["study_id"].to_numpy(), tables)
    predicted = np.any([np.isfinite(p).any((1, 2, 3)) for p in aligned.values()], axis=0)
    found = pd.DataFrame({"study_id": labels["study_id"], "fold": folds})[predicted].reset_index(drop=True)
    if found["fold"].nunique() == 1 and len(found) > 1:
        found = make_folds(labels[predicted], min(parts, len(found)))
    return found


def read_views(run: str | Path) -> pd.DataFrame:
    """The views.csv of the members' stages below `run`, one below the other.

    Parameters
    ----------
    run : path
        A run's folder.

    Returns
    -------
    DataFrame
        stage, and the columns of choose_views: view, alone, gain, gain_se, kept; no columns if there is no file.
        Folders that were put aside (.old-) are left out.
    """
    paths = [p for p in sorted(Path(run).glob("*/views.csv")) if ".old-" not in p.parent.name]
    tables = [pd.read_csv(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        table.insert(0, "stage", path.parent.name)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def ensemble_table(ensemble: Mapping[str, Any]) -> pd.DataFrame:
    """What ensemble.json holds, for people.

    Parameters
    ----------
    ensemble : mapping
        As fit_ensemble or default_ensemble make it.

    Returns
    -------
    DataFrame
        One row a group of conditions: each member's weight, Temperature, Bias of moderate and severe, Floor, Stacker
        (whether there is one).
    """
    groups = list(ensemble["weights"])
    table = pd.DataFrame(ensemble["weights"]).T
    table["Temperature"] = [ensemble["temperature"][group] for group in groups]
    for k, grade in enumerate(GRADES[1:], 1):
        table[f"Bias, {grade.lower()}"] = [ensemble["bias"][group][k] for group in groups]
    table["Floor"] = [ensemble.get("floor", {}).get(group, 0.0) for group in groups]
    table["Stacker"] = [group in ensemble.get("stacker", {}).get("coefficients", {}) for group in groups]
    table.index = pd.Index([TERM_NAMES[group] for group in groups], name="Condition")
    return table


def level_label_table(
    paths: Mapping[int, Path], levels: pd.DataFrame, coordinates: pd.DataFrame, limit: int = 200
) -> pd.DataFrame:
    """How well the level boxes meet the label points.

    Parameters
    ----------
    paths : mapping of int to Path
        study_id -> volume file.
    levels : DataFrame
        levels.csv.
    coordinates : DataFrame
        Of read_coordinates.
    limit : int
        Studies looked at, at most; spread evenly.

    Returns
    -------
    DataFrame
        One row a point, see compare_with_labels, with study_id.
    """
    study_ids = sorted(set(paths) & set(levels["study_id"]) & set(coordinates["study_id"]))
    rows = []
    for study_id in study_ids[:: max(1, -(-len(study_ids) // limit))]:
        points = coordinates[coordinates["study_id"] == study_id]
        compared = compare_with_labels(boxes_from_table(levels, study_id), points, load_study(paths[study_id]))
        rows.append(compared.assign(study_id=study_id))
    return (
        pd.concat(rows, ignore_index=True)
        if rows
        else pd.DataFrame(columns=["study_id", "condition", "level", "nearest"])
    )


def summarise_levels(compared: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Per level: label points, those at the right level, how far the disc plane is from the canal and subarticular
    points (which lie at the disc's height; foraminal ones lie above it), how often a second numbering calls the level
    something else and how likely that is, and where the boxes came from.

    Parameters
    ----------
    compared : DataFrame
        Of level_label_table.
    levels : DataFrame
        levels.csv.

    Returns
    -------
    DataFrame
        One row a level, head to foot; headings name the units, mm or %.
    """
    rows, shares = [], second_shares(levels)
    for level in LEVELS:
        part = compared[compared["level"] == level]
        flat = (
            part.loc[~part["condition"].str.contains("foraminal"), "head_mm"].abs()
            if len(part)
            else pd.Series(dtype=float)
        )
        found = levels[levels["level"] == level]
        sources = found["source"].value_counts()
        rows.append(
            {
                "Level": level_name(level),
                "Points": len(part),
                "Right level, %": 100 * (part["nearest"] == level).mean() if len(part) else np.nan,
                "Median distance, mm": flat.median(),
                "Within 5 mm, %": 100 * (flat <= 5).mean() if len(flat) else np.nan,
                "Median confidence": found["confidence"].median(),
                "In doubt, %": 100 * found["source"].map(in_doubt).mean() if len(found) else np.nan,
                "Second numbering, %": 100 * shares[found.index].notna().mean() if len(found) else np.nan,
                "its mean share, %": 100 * shares[found.index].mean(),
                "Found on": ", ".join(f"{name} {count}" for name, count in sources.items()),
            }
        )
    return pd.DataFrame(rows)


def second_shares(levels: pd.DataFrame) -> pd.Series:
    """How likely the second numbering of each row of levels.csv is, NaN where there is none."""
    if not {"second", "second_share"} <= set(levels):  # earlier tables
        return pd.Series(np.nan, index=levels.index)
    named = levels["second"].notna() & (levels["second"].astype(str) != "")
    return pd.to_numeric(levels["second_share"]).where(named)


def in_doubt(source: str) -> bool:
    """Whether a level of this source, as levels.csv has it, may be another one: uncertain, or guessed without an image
    that showed it."""
    parsed = Source.parse(source)
    return bool(parsed & (Source.UNCERTAIN | Source.PRIOR | Source.AXIAL))


def read_manifests(out: str | Path) -> dict[str, dict[str, Any]]:
    """dict stage -> manifest of every complete stage in a folder, in the order of their names; see read_manifest.

    Parameters
    ----------
    out : path
        A run's folder.

    Returns
    -------
    dict of str to dict
        Folders that were put aside (.old-) are left out.
    """
    folders = [path.parent for path in sorted(Path(out).glob("*/manifest.json")) if ".old-" not in path.parent.name]
    return {folder.name: manifest for folder in folders if (manifest := read_manifest(folder)) is not None}


def read_histories(out: str | Path) -> dict[str, dict[str, pd.DataFrame]]:
    """dict stage -> dict run -> training history: *history*.csv of our own training, results.csv of ultralytics.

    Parameters
    ----------
    out : path
        A run's folder. A file that cannot be read is named, printed and left out.

    Returns
    -------
    dict of str to dict of str to DataFrame
        A run is called as its file without `_history`, or as the folder of its results.csv; one with a column split is
        several, with the split in their names. NaN stands where ultralytics wrote an epoch without validation as zeros.
        Folders that were put aside (.old-) are left out.
    """
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for path in sorted({*Path(out).glob("*/*history*.csv"), *Path(out).glob("*/**/results.csv")}):
        stage = path.relative_to(out).parts[0]
        if ".old-" not in stage:
            try:
                table = pd.read_csv(path)
            except ValueError as error:  # empty, cut, or no table
                print(f"{path} cannot be read ({error}): its curves are left out")
                continue
            name = path.parent.name if path.name == "results.csv" else path.stem.replace("_history", "")
            table = table.rename(columns=str.strip)
            if path.name == "results.csv":  # an epoch without validation is written as zeros
                measured = [column for column in table if column.startswith(("metrics/", "val/"))]
                table[measured] = table[measured].where((table[measured] != 0).any(axis=1))
            parts = table.groupby("split", sort=False) if "split" in table else [("", table)]
            for split, part in parts:
                found.setdefault(stage, {})[f"{name} {split}".strip()] = part
    return found
