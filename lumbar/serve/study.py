"""Studies on their way to the members: which there are, one made ready, a batch predicted.

May use: members, grade, spine, data, problems.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dicom import read_study
from ..data.geometry import LevelBox
from ..data.greys import normalise_study
from ..data.tables import described_series, sample_studies, whole_number
from ..data.volume import Study
from ..grade.member import Member, Prediction, Weights, silence, without_frames
from ..grade.registry import MEMBERS
from ..problems import Kind, Problem, kind_of_error
from ..spine.levels import locate_levels_surely, second_boxes
from .members import Members


def studies_to_predict(data: str | Path, split: str) -> dict[int, dict[int, str]]:
    """Every study that a submission must have rows of, with its series.

    The descriptions table names the series; studies that only have a folder in {split}_images, rows in
    sample_submission.csv or bad rows in the descriptions table come with no series, and so with the prior.

    Parameters
    ----------
    data, split : path, str
        Competition folder; `test` or `train`. sample_submission.csv counts for `test` only.

    Returns
    -------
    dict of int to dict
        study_id to dict series_id to description.

    Raises
    ------
    FileNotFoundError
        There is no descriptions table.
    ValueError
        That, or sample_submission.csv, is no such table.
    """
    jobs = described_series(data, split)
    named = (whole_number(path.name) for path in (Path(data) / f"{split}_images").glob("*"))
    others = {study_id for study_id in named if study_id is not None}
    sample = Path(data) / "sample_submission.csv"
    if split == "test" and sample.is_file():
        others |= set(sample_studies(sample))
    unlisted: dict[int, dict[int, str]] = {study_id: {} for study_id in sorted(others - set(jobs))}
    return jobs | unlisted


@dataclass
class Prepared:
    """A study made ready for the members: read, its levels found, their inputs made.

    boxes: five LevelBoxes, None without a readable image; second: the same by the second numbering and how likely that
    is, where stage 1 is in doubt; inputs, second_inputs: dict member's name -> what its `prepare` made of the boxes;
    seconds: dict of reading, locating and cropping, empty where the work was given up; preparing: how much of the
    cropping was for which member.
    """

    study: Study
    boxes: list[LevelBox] | None
    inputs: dict[str, Any]
    problems: list[Problem]
    seconds: dict[str, float]
    preparing: dict[str, float] = field(default_factory=dict)
    second: tuple[list[LevelBox], float] | None = None
    second_inputs: dict[str, Any] = field(default_factory=dict)


def prepare_study(
    folder: str | Path, descriptions: Mapping[int, str], members: Members, wanted: Collection[str] | None = None
) -> Prepared:
    """Everything about a study that needs no network of a member. Never raises because of what the study is.

    Parameters
    ----------
    folder, descriptions
        As read_study takes them.
    members : Members
        Of load_members.
    wanted : collection of str, optional
        Names of the members whose inputs are made; None: all.

    Returns
    -------
    Prepared
    """
    seconds = dict.fromkeys(("reading", "locating", "cropping"), 0.0)
    boxes: list[LevelBox] | None = None
    inputs: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        study = normalise_study(read_study(folder, descriptions))
        problems = [Problem(Kind.IMAGES, text) for text in study.problems]
    except Exception as error:
        study_id = int(Path(folder).name)
        text = f"study {study_id} cannot be read ({type(error).__name__}: {error})"
        study, problems = Study(study_id, [], [text]), [Problem(kind_of_error(error, Kind.IMAGES), text)]
    seconds["reading"], started = time.perf_counter() - started, time.perf_counter()
    if not study.volumes:
        problems.append(Problem(Kind.IMAGES, "no readable image: every row is the prior"))
        return Prepared(study, boxes, inputs, problems, seconds)
    problems += members.notes
    problem: Problem | None
    second = None
    try:
        boxes, vertebrae, problem = locate_levels_surely(study, members.placement)
        second = second_boxes(study, boxes, vertebrae, members.placement)
    except Exception as error:
        problem = Problem.of(error, "no level can be placed: ", kind=Kind.LEVELS)
    if problem:
        problems.append(replace(problem, text=f"levels: {problem}"))
    seconds["locating"] = time.perf_counter() - started
    preparing: dict[str, float] = {}
    second_inputs: dict[str, Any] = {}
    for member, weights in members.weights.items():
        if wanted is None or member in wanted:
            started = time.perf_counter()
            inputs[member] = MEMBERS[member].prepare(study, boxes, weights, members.device)
            if second is not None and not MEMBERS[member].whole_study:
                second_inputs[member] = MEMBERS[member].prepare(study, second[0], weights, members.device)
            preparing[member] = time.perf_counter() - started
    seconds["cropping"] = sum(preparing.values())
    return Prepared(study, boxes, inputs, problems, seconds, preparing, second, second_inputs)


def predict_studies(
    batch: Sequence[Prepared],
    members: Members,
    views: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[dict[str, np.ndarray]], list[list[Problem]], dict[str, float]]:
    """The members on several Prepared studies at once.

    A study, or a member, that fails costs only its own contribution. Where stage 1 is in doubt, a member that looks at
    levels is asked for both numberings, and what it says is the mean of both, by how likely they are.

    Parameters
    ----------
    batch : sequence of Prepared
        Of prepare_study.
    members : Members
        Of load_members.
    views : mapping of str to int, optional
        Member to at most how many of its views, -1 all; members that it lacks are not run. None: everything.
    clock : callable
        Seconds, from anywhere.

    Returns
    -------
    predictions : list of dict
        A study each: member to (5, 5, 3) probabilities by condition, level and severity, NaN where it has nothing to
        say; empty for a study without a readable image.
    problems : list of list of Problem
        A study each.
    seconds : dict of str to float
        Member to seconds.
    """
    views = dict.fromkeys(members.weights, -1) if views is None else views
    predictions: list[dict[str, np.ndarray]] = [{} for _ in batch]
    problems: list[list[Problem]] = [[] for _ in batch]
    seconds: dict[str, float] = {}
    readable = [k for k, prepared in enumerate(batch) if prepared.study.volumes]
    for name in [m for m in members.weights if m in views and readable]:
        started, member, weights = clock(), MEMBERS[name], members.weights[name]
        inputs = [_inputs_of(batch[k], member, weights, members.device) for k in readable]
        doubtful = [k for k in readable if batch[k].second is not None and not member.whole_study]
        inputs += [_second_inputs_of(batch[k], member, weights, members.device) for k in doubtful]
        try:
            found = member.predict(inputs, weights, views[name], members.device)
        except Exception as error:  # a member that does not keep its word, see Member.predict
            found = [Prediction(silence(), (Problem.of(without_frames(error), f"{name}: ", name),))] * len(inputs)
        by_second_numbering = dict(zip(doubtful, found[len(readable) :], strict=True))
        for k, first in zip(readable, found[: len(readable)], strict=True):
            prediction = _mixed(first, by_second_numbering.get(k), batch[k].second)
            predictions[k][name] = prediction.probabilities
            problems[k] += prediction.problems
        seconds[name] = clock() - started
    return predictions, problems, seconds


def _mixed(first: Prediction, other: Prediction | None, second: tuple[list[LevelBox], float] | None) -> Prediction:
    """The mean of both numberings' predictions; where one of them has nothing to say, what the other says."""
    if other is None or second is None:
        return first
    share, p, q = second[1], first.probabilities, other.probabilities
    mean = np.where(np.isfinite(p) & np.isfinite(q), (1 - share) * p + share * q, np.where(np.isfinite(p), p, q))
    return Prediction(mean, tuple(dict.fromkeys([*first.problems, *other.problems])))


def _second_inputs_of(prepared: Prepared, member: Member, weights: Sequence[Weights], device: str) -> Any:
    """As _inputs_of, of the second numbering's boxes."""
    if member.name not in prepared.second_inputs and prepared.second is not None:
        prepared.second_inputs[member.name] = member.prepare(prepared.study, prepared.second[0], weights, device)
    return prepared.second_inputs[member.name]


def _inputs_of(prepared: Prepared, member: Member, weights: Sequence[Weights], device: str) -> Any:
    """A member's inputs of a study, made now if they were not made ahead."""
    if member.name not in prepared.inputs:
        prepared.inputs[member.name] = member.prepare(prepared.study, prepared.boxes, weights, device)
    return prepared.inputs[member.name]
