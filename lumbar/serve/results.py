"""What was predicted of a study, kept so that a second start finds it.

May use: members, study, data, in_flight, storage, grade, names, problems.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.geometry import boxes_to_table
from ..data.source import Source
from ..grade.registry import MEMBERS
from ..in_flight import images_digest, read_left_json
from ..names import CONDITIONS, LEVEL_TABLE_COLUMNS, LEVELS, SEVERITIES
from ..problems import Problem
from ..storage import plain, write_json
from .members import Members
from .study import Prepared

Result = dict[str, Any]  # of make_result, and as JSON gives it back

# ---- Finished studies ----


def mended_studies(data: str | Path, split: str, log: pd.DataFrame) -> list[int]:
    """Ids of the studies that had problems when `log` was written, and whose files have changed since.

    Parameters
    ----------
    data, split : path, str
        Competition folder; `test` or `train`.
    log : DataFrame
        infer_studies' log or its CSV; without its column `files` (of an earlier version) nothing can be told.

    Returns
    -------
    list of int
        In the order of the log.
    """
    if "files" not in log.columns:
        return []
    rows = log[log["problems"].fillna("") != ""]
    folder = Path(data) / f"{split}_images"
    pairs = zip(rows["study_id"], rows["files"].fillna(""), strict=True)
    return [int(study_id) for study_id, files in pairs if images_digest(folder / str(study_id)) != files]


def results_key(members: Members, views: int) -> str:
    """What a study's result depends on besides its images, as a hash: the members' metadata, what locates levels."""
    known = [_RESULTS_VERSION, views, members.abouts(), members.placement.key(), members.placement.layout]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=plain).encode()).hexdigest()[:16]


_RESULTS_VERSION = 4  # to be raised when the same weights give other predictions


def _digest(result):
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def save_result(path: Path | None, result: Result) -> Result:
    """Write a finished study (path None: do not) with a hash of its contents; returns it as it would be read.

    A disk that is full costs the restart, not the run.
    """
    result = json.loads(json.dumps(result, default=plain))
    try:
        if path:
            write_json(path, {"result": result, "sha256": _digest(result)})
    except OSError as error:
        print(f"{path} cannot be written ({error}): a restart will do this study again")
    return result


def load_result(path: Path, study_id: int, key_of: Callable[[int], str], members: Collection[str]) -> Result | None:
    """What save_result wrote; None where there is none, it is damaged (which is printed), or other weights made it.

    key_of: study_id -> what the result must have been made of; members: the names that it has predictions of, but for
    those that there was no time for.
    """
    if not os.path.lexists(path):
        return None
    try:
        saved = read_left_json(path)
        result = saved.get("result")
        if not isinstance(result, dict) or saved.get("sha256") != _digest(result):
            raise ValueError("its contents are not what was written")
        if result.get("key") != key_of(study_id):
            return None
        _check_result(result, study_id, members)
        return result
    except (ValueError, RecursionError) as error:
        print(f"{path} is no result of study {study_id} ({error}): the study is done again")
        return None


def _check_result(result, study_id, members):
    """Raise ValueError where a dict is not what make_result makes: whatever it holds goes into the submission."""
    kinds = {"predictions": dict, "levels": list, "problems": list, "dropped": list, "files": str}
    for name, kind in kinds.items():
        if not isinstance(result.get(name), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    if not all(isinstance(text, str) for text in result["dropped"]):
        raise ValueError("dropped are no texts")
    for problem in result["problems"]:
        Problem.from_dict(problem)
    if not all(_is_number(value) for name, value in result.items() if name.endswith("_s") or name == "seconds"):
        raise ValueError("seconds are no numbers")
    for member, values in result["predictions"].items():
        if member not in members:
            raise ValueError(f"predictions of {member}, which is no member here")
        if not _are_probabilities(values):
            raise ValueError(f"predictions of {member} are no probabilities of {len(CONDITIONS)} x {len(LEVELS)} rows")
    # A member that fails is there and silent, so one that is absent was not run, and `dropped` says so.
    not_run = {text.partition(": not run")[0] for text in result["dropped"] if ": not run" in text}
    for member in members:
        if member not in result["predictions"] and member not in not_run:
            raise ValueError(f"no predictions of {member}, which was not dropped")
    if not result["predictions"]:
        raise ValueError("no predictions")
    if not result["problems"] and not any((np.array(p) >= 0).any() for p in result["predictions"].values()):
        raise ValueError("nothing is predicted, and no problem says why")
    if len(result["levels"]) > len(LEVELS):
        raise ValueError(f"{len(result['levels'])} levels")
    numbers = set(LEVEL_TABLE_COLUMNS) - {"study_id", "level", "source", "second"}
    for row in result["levels"]:
        if not (
            isinstance(row, dict)
            and set(row) == set(LEVEL_TABLE_COLUMNS)
            and row["study_id"] == study_id
            and row["level"] in LEVELS
            and isinstance(row["source"], str)
            and isinstance(row["second"], str)
            and all(_is_number(row[name]) for name in numbers)
            and 0 <= row["second_share"] <= 1
        ):
            raise ValueError("a level is no box")
        Source.parse(row["source"])
    names = [row["level"] for row in result["levels"]]
    if len(set(names)) < len(names):
        raise ValueError(f"levels {', '.join(names)}: one is there twice")


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12


def _are_probabilities(values):
    """Are nested lists an array (5, 5, 3) whose rows are probabilities, or -1 throughout?"""
    try:
        array = np.array(values)
    except ValueError:  # of no one shape
        return False
    if array.shape != (len(CONDITIONS), len(LEVELS), len(SEVERITIES)) or array.dtype.kind not in "if":
        return False
    silent = (array == -1).all(-1)
    sums_to_one = (array >= 0).all(-1) & (np.abs(array.sum(-1) - 1) < 1e-3)
    return bool((silent | sums_to_one).all())


def make_result(
    prepared: Prepared,
    predictions: Mapping[str, np.ndarray],
    problems: Collection[Problem],
    key: str,
    extra: Mapping[str, Any],
) -> Result:
    """What is kept of a study, in plain values.

    predictions: dict member -> (5, 5, 3) probabilities, NaN where it has nothing to say, which is kept as -1; key: of
    what the result depends on; extra: seconds, what was dropped, the files' digest.
    """
    return {
        "key": key,
        "predictions": {m: np.where(np.isfinite(p), p, -1) for m, p in predictions.items()},
        "levels": boxes_to_table(prepared.study.study_id, prepared.boxes or []).to_dict("records"),
        "problems": [problem.to_dict() for problem in problems],
        **{f"{step}_s": round(seconds, 3) for step, seconds in prepared.seconds.items()},
        **extra,
    }


def steps() -> tuple[str, ...]:
    """What takes a study's time, in the order of the log's columns."""
    return ("reading", "locating", "cropping", *MEMBERS)
