"""Tables of predictions, out of fold and of members: read, checked, brought into one order.

May use: registry, data, names.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.competition import from_submission, id_array, labels_to_array, row_ids, severity_values, to_submission
from ..names import LABEL_COLUMNS, SEVERITIES, SUBMISSION_COLUMNS
from .registry import by_member, member_of, member_weights


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


def partial_submission(study_ids: Iterable[int], probabilities: np.ndarray, there: np.ndarray) -> pd.DataFrame:
    """Submission of the rows that are there: (n,), (n, 5, 5, 3), (n, 5, 5) bool."""
    table = to_submission(study_ids, np.where(there[..., None], probabilities, 1.0))
    kept = [row for row, known in zip((r for s in study_ids for r in row_ids(s)), there.ravel()) if known]
    return table[table["row_id"].isin(kept)].reset_index(drop=True)


# ---- Tables of members ----

OOF = "oof.csv"  # out-of-fold predictions, beside the weights


def check_predictions(table: pd.DataFrame, name: str = "predictions") -> tuple[np.ndarray, np.ndarray]:
    """A submission-like table -> from_submission's (study_ids, (n, 5, 5, 3)), NaN where a row is absent.

    Parameters
    ----------
    table : DataFrame
        Rows in any order, any of them may be absent or empty (three NaN, as a join leaves them), further columns (fold)
        are fine.
    name : str
        Of the table, in errors.

    Returns
    -------
    study_ids : (n,) int64 array
        Ascending.
    probabilities : (n, 5, 5, 3) float64 array
        By study, condition, level and severity.

    Raises
    ------
    ValueError
        With the table and the row named: a missing column, an unknown or double row_id, values that are not numbers,
        not finite, negative, or whose sum is off 1 by more than .002 (a member that is not normalised is no
        probability; three values rounded to three digits are off by .0015 at most).
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


def sorted_grades(labels: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """labels_to_array in the order of study_id; ValueError where these are no labels at all."""
    if "study_id" not in labels.columns or not set(LABEL_COLUMNS) & set(labels.columns):
        raise ValueError("labels need the column study_id and train.csv's label columns")
    study_ids, grades = labels_to_array(labels)
    order = np.argsort(study_ids)
    return study_ids[order], grades[order]


def align_members(study_ids: Sequence[int] | np.ndarray, tables: Mapping[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    """dict member -> submission-like table -> dict member -> (n, 5, 5, 3), NaN where a row is missing.

    Parameters
    ----------
    study_ids : (n,) sequence of int
        The order of the result; other studies of the tables are ignored.
    tables : mapping of str to DataFrame
        Of check_predictions, by member.

    Returns
    -------
    dict of str to (n, 5, 5, 3) float64 array
        Probabilities by study, condition, level and severity.

    Raises
    ------
    ValueError
        As check_predictions does, and for a study_id that is no whole number.
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


def align_to_labels(study_ids: Sequence[int] | np.ndarray, tables: Mapping[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    """align_members; ValueError for a table that predicts none of these studies."""
    aligned = align_members(study_ids, tables)
    for member, values in aligned.items():
        if not np.isfinite(values).any():
            raise ValueError(f"{member}: its table predicts none of the {len(study_ids)} labelled studies")
    return aligned


def read_out_of_fold(folders: Iterable[str | Path], verbose: bool = True) -> dict[str, pd.DataFrame]:
    """dict member -> out-of-fold table, from the stage folders of the trainings.

    Only of weights that stand (see member_weights): of the oof.csv beside them the rows of their folds; without a
    column `fold` all rows.

    Parameters
    ----------
    folders : iterable of path
        Of member_weights.
    verbose : bool
        Print member_weights' sentences.

    Returns
    -------
    dict of str to DataFrame
        By member, the columns of oof.csv, each row_id once.

    Raises
    ------
    ValueError
        An oof.csv is empty, or lacks a column; the message names the file.
    """
    chosen, sentences = member_weights(folders)
    if verbose and sentences:
        print(*sentences, sep="\n")
    tables: dict[str, list[pd.DataFrame]] = {}
    for member, paths in by_member(chosen).items():
        places: dict[Path, set[str]] = {}
        for name, path in paths.items():
            places.setdefault(path.parent, set()).add(name.rpartition("_")[2])
        for folder, folds in places.items():
            if (folder / OOF).is_file():
                table = _read_predictions(folder / OOF)
                if "fold" in table.columns:
                    table = table[table["fold"].astype(str).str.removesuffix(".0").isin(folds)]
                tables.setdefault(member, []).append(table)
    return {
        member: pd.concat(found, ignore_index=True).drop_duplicates("row_id", ignore_index=True)
        for member, found in tables.items()
    }


def is_bare(files: Iterable[str]) -> bool:
    """Whether a folder with files of these names has an oof.csv that no stage of the kit wrote."""
    names = set(files)
    return OOF in names and not names & {"manifest.json", "begun.json"}


def has_own_weights(folder: Path) -> bool:
    """Whether weights of a member of the kit lie in the folder."""
    return any(member_of(path.stem) for path in folder.glob("*.safetensors"))


def read_bare_tables(places: Iterable[str | Path], taken: Collection[str] = ()) -> dict[str, pd.DataFrame]:
    """Out-of-fold predictions of anybody's networks: tables without weights of the kit.

    Parameters
    ----------
    places : iterable of path
        Tables, or folders with an oof.csv; folders with weights of the kit, or of its stages, are left to
        read_out_of_fold.
    taken : collection of str
        Names that are not given.

    Returns
    -------
    dict of str to DataFrame
        By what a column `member` says, else the file's name, or the folder's where the file is an oof.csv, with a
        number where that is taken; each with columns row_id and SEVERITIES.

    Raises
    ------
    ValueError
        A table is empty, lacks a column, or is none of check_predictions; the message names the file.
    """
    tables: dict[str, pd.DataFrame] = {}
    for place in map(Path, places):
        if place.is_dir() and (has_own_weights(place) or not is_bare(path.name for path in place.iterdir())):
            continue
        path = place / OOF if place.is_dir() else place
        if not path.is_file():
            continue
        table = _read_predictions(path, "give a table of predictions")
        own = path.resolve().parent.name if path.name == OOF else path.stem
        for member, rows in table.groupby("member", sort=False) if "member" in table.columns else [(own, table)]:
            check_predictions(rows, str(path))
            names = itertools.chain([str(member)], (f"{member}_{number}" for number in itertools.count(2)))
            tables[next(name for name in names if name not in tables and name not in taken)] = rows
    return tables


def _read_predictions(path, remedy="run the training's stage again"):
    """An oof.csv. Raises ValueError, naming the file, where it has no rows or lacks columns."""
    try:
        table = pd.read_csv(path)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table of predictions ({error}): {remedy}") from None
    if missing := [name for name in ("row_id", *SEVERITIES) if name not in table.columns]:
        raise ValueError(f"{path} lacks the column {', '.join(missing)}: {remedy}")
    if not len(table):
        raise ValueError(f"{path} has no rows: {remedy}")
    return table
