"""A study in, 25 rows out, whatever is broken.

May use: members, read_ahead, results, schedule, grade, spine, data, in_flight, limits, names, problems.
"""

import os
import queue
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..data.competition import to_submission
from ..data.dicom import read_study
from ..data.greys import normalise_study
from ..data.tables import described_series, sample_studies, whole_number
from ..data.volume import Study
from ..grade.ensemble import combine_members, member_alone
from ..grade.member import Prediction, free_memory, silence, without_frames
from ..grade.registry import MEMBERS
from ..grade.tables import read_out_of_fold
from ..in_flight import ChildDied, InFlight, can_run_in_child, images_digest, run_in_child
from ..limits import cpu_limit
from ..names import (
    CLASS_COUNTS,
    CONDITIONS,
    LEVEL_TABLE_COLUMNS,
    LEVELS,
    SEVERITIES,
    SEVERITY_WEIGHTS,
    SUBMISSION_COLUMNS,
    progress,
)
from ..problems import Kind, Problem, kind_of_error
from ..spine.levels import locate_levels_surely
from .read_ahead import _STARTED, _Ahead
from .results import _load_result, _result, _results_key, _save_result, steps
from .schedule import Schedule


@dataclass
class Prepared:
    """A study made ready for the members: read, its levels found, their inputs made.

    boxes: five LevelBoxes, None without a readable image; inputs: dict member's name -> what its `prepare` made;
    seconds: dict of reading, locating and cropping, empty where the work was given up; preparing: how much of the
    cropping was for which member.
    """

    study: Study
    boxes: list | None
    inputs: dict
    problems: list[Problem]
    seconds: dict
    preparing: dict = field(default_factory=dict)


def prepare_study(folder, descriptions, members, wanted=None):
    """Everything about a study that needs no network of a member: Prepared. Never raises because of what the study is.

    folder, descriptions: as read_study takes them; wanted: names of the members whose inputs are made; None: all.
    """
    seconds = dict.fromkeys(("reading", "locating", "cropping"), 0.0)
    boxes, inputs, started = None, {}, time.perf_counter()
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
    try:
        boxes, _, problem = locate_levels_surely(study, members.spinenet, detector=members.detector)
    except Exception as error:
        problem = Problem.of(error, "no level can be placed: ", kind=Kind.LEVELS)
    if problem:
        problems.append(replace(problem, text=f"levels: {problem}"))
    seconds["locating"], preparing = time.perf_counter() - started, {}
    for member, weights in members.weights.items():
        if wanted is None or member in wanted:
            started = time.perf_counter()
            inputs[member] = MEMBERS[member].prepare(study, boxes, weights, members.device)
            preparing[member] = time.perf_counter() - started
    seconds["cropping"] = sum(preparing.values())
    return Prepared(study, boxes, inputs, problems, seconds, preparing)


def predict_studies(batch, members, views=None, clock=time.perf_counter):
    """The members on several Prepared studies at once: (list of dicts member -> (5, 5, 3) probabilities, NaN where it
    has nothing to say; list of lists of Problems; dict member -> seconds).

    views: dict member -> at most how many of its views, -1 all; members that it lacks are not run; None: everything.
    A study, or a member, that fails costs only its own contribution.
    """
    views = dict.fromkeys(members.weights, -1) if views is None else views
    predictions, problems, seconds = [{} for _ in batch], [[] for _ in batch], {}
    readable = [k for k, prepared in enumerate(batch) if prepared.study.volumes]
    for name in [m for m in members.weights if m in views and readable]:
        started, member, weights = clock(), MEMBERS[name], members.weights[name]
        inputs = [_inputs_of(batch[k], member, weights, members.device) for k in readable]
        try:
            found = member.predict(inputs, weights, views[name], members.device)
        except Exception as error:  # a member that does not keep its word, see Member.predict
            found = [Prediction(silence(), (Problem.of(without_frames(error), f"{name}: ", name),))] * len(readable)
        for k, prediction in zip(readable, found, strict=True):
            predictions[k][name] = prediction.probabilities
            problems[k] += prediction.problems
        seconds[name] = clock() - started
    return predictions, problems, seconds


def _inputs_of(prepared, member, weights, device):
    """A member's inputs of a study, made now if they were not made ahead."""
    if member.name not in prepared.inputs:
        prepared.inputs[member.name] = member.prepare(prepared.study, prepared.boxes, weights, device)
    return prepared.inputs[member.name]


def studies_to_predict(data, split):
    """dict study_id -> dict series_id -> description: every study that a submission must have rows of.

    The descriptions table names the series; studies that only have a folder in {split}_images, rows in
    sample_submission.csv or bad rows in the descriptions table come with no series, and so with the prior.
    """
    jobs = described_series(data, split)
    others = {whole_number(path.name) for path in (Path(data) / f"{split}_images").glob("*")} - {None}
    sample = Path(data) / "sample_submission.csv"
    if split == "test" and sample.is_file():
        others |= set(sample_studies(sample))
    return jobs | {study_id: {} for study_id in sorted(others - set(jobs))}


def out_of_fold_table(folders):
    """All members' out-of-fold predictions that lie with the weights, as one table: row_id, the three severities, fold,
    member. folders: as weight_folders finds them. Without any the table is empty."""
    columns = [*SUBMISSION_COLUMNS, "fold", "member"]
    tables = [table.assign(member=member) for member, table in read_out_of_fold(folders, verbose=False).items()]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns) if tables else pd.DataFrame(columns=columns)


# ---- What stands where no member says anything ----


def complete_prior(prior):
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


_BY_CHANCE = {Kind.MEMORY, Kind.TIME, Kind.DEVICE}  # what went wrong so may go well another time
PATIENCE_S = 900.0  # for one study to be read and located, before it is given up
# CPU seconds for the same, checked between its steps: a usual study takes 5 and the largest that the bounds of reading
# and locating let through 30, so more is a study that nobody foresaw. Patience is for what hangs without working.
STUDY_S = 60.0


def infer_studies(
    data,
    split,
    members,
    ensemble,
    out,
    views=-1,
    batch_studies=4,
    hours=0.0,
    reserve=0.5,
    readers=None,
    clock=time.monotonic,
):
    """Predict every study of a split: (submission DataFrame, log DataFrame, member tables dict, levels DataFrame).

    Studies: see studies_to_predict. views: -1 for the views that the weights name, 1 for none, n for at most n.
    batch_studies: studies that go through the networks together. hours, reserve: see Schedule; the limit runs from the
    first call of this process for this `out` until a call has finished, so that a cell that is run again does not start
    it anew; a new process (on Kaggle a new session, with a clock of its own) does. readers: threads that read, locate
    and cut the studies to come, default as many as the CPU has cores, at most 4.

    Each finished study is saved in out/studies, so a restart continues; a damaged one, one of other weights, or one
    whose files have changed is done again. One predicted with less for want of time is saved, too, and a restart does
    it again with everything, as far as there is time after those without a result. One without a readable image is not
    saved, nor one that was given up, took longer than STUDY_S or found the device's memory full: these may go better
    another time. Should the process be killed, the next start finds out which study it died of, passes it over and says
    so in the log (see InFlight).
    Memory does not grow with the number of studies: at most 2 * batch_studies + readers of them are held, and what one
    may hold is bounded too (see dicom.MAX_SLICES). A batch's company does not change a study's result, up to rounding
    in the networks.

    What is left of the ensemble where a member fails, or has no time: the others carry its weight; where only the
    study model is left, which needs no levels, it stands alone; where none is, the training set's prior for the
    condition and level; and if the weights carry none, the class prior (complete_prior). The log says which, and why:
    columns study_id; members, partial (those that say something of all rows, of some); rows_from; prior_rows (of both
    priors); levels; dropped (for want of time); *_s seconds, of which `seconds` is the study's share of the whole
    run's time; problems; files (images_digest).

    Raises RuntimeError when a member that was loaded failed in every study: that is a mistake in the set-up, not bad
    luck with the data; and when the device itself fails, of which nothing is saved, so that a restart continues (while
    Kaggle scores a submission both are printed instead, a submission with less being better than none).
    """
    folder = Path(out) / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    readers = readers or min(4, os.cpu_count() or 1)
    jobs = studies_to_predict(data, split)
    key = _results_key(members, views)
    images, digests = Path(data) / f"{split}_images", {}

    def key_of(study_id):
        if study_id not in digests:
            digests[study_id] = images_digest(images / str(study_id))
        return f"{key} {digests[study_id]}"

    saved = {study_id: folder / f"{study_id}.json" for study_id in jobs}
    results = {i: _load_result(path, i, key_of, members.weights) for i, path in saved.items()}
    finished = {study_id for study_id, result in results.items() if result and not result["dropped"]}
    journal = InFlight(Path(out) / "in_flight", "study", key_of, finished.__contains__)
    for study_id, why in journal.passed_over.items():
        if study_id in jobs:
            results[study_id] = _passed_over(results[study_id], why, digests[study_id])
            print(f"study {study_id}: {why}")
    suspects = [study_id for study_id in journal.suspects if study_id in jobs]
    if suspects:
        ids = ", ".join(map(str, suspects))
        print(f"the process died while it was at {len(suspects)} studies ({ids}): they come last, one at a time")
    todo = [study_id for study_id, result in results.items() if result is None and study_id not in suspects]
    again = [i for i, result in results.items() if result and result["dropped"] and i not in suspects]
    counts = {m: max(len(MEMBERS[m].views(own, views)) for own in known) for m, known in members.weights.items()}
    weights = {m: float(np.mean([group.get(m, 0.0) for group in ensemble["weights"].values()])) for m in counts}
    if not counts:
        raise ValueError("no member to predict with: load_members loads them")
    for member in counts:
        if not any(member in known for known in ensemble["weights"].values()):
            raise ValueError(f"the ensemble has no weight for the member {member}: fit it with that, too")
    clock_key = str(folder.resolve())
    started = _STARTED.setdefault(clock_key, clock())
    schedule = Schedule(counts, weights, hours, reserve, readers, clock, started)

    def prepare(study_id, stopped=None):
        begun = clock()
        try:
            key_of(study_id)  # before reading: files that change meanwhile are read again by a restart
            with cpu_limit(STUDY_S, stopped):
                prepared = prepare_study(images / str(study_id), jobs[study_id], members, schedule.choice)
        except Exception as error:  # nothing known does this; whoever waits for the study shall not wait in vain
            text = f"given up ({type(error).__name__}: {error}), every row is the prior"
            problem = Problem(kind_of_error(error, Kind.PASSED_OVER), text)
            prepared = Prepared(Study(study_id, []), None, {}, [problem], {})
        return prepared, clock() - begun

    def begin_and_prepare(study_id):
        own = ahead
        journal.begin(study_id)
        return prepare(study_id, lambda: own.stopped)

    def predict(batch, begun):
        """(list of a result and whether it shall be kept, for each study; the seconds of each member)."""
        predictions, problems, seconds = predict_studies(batch, members, schedule.choice, clock)
        share = (clock() - begun) / len(batch)
        failure = _device_failure(members.device) if any(problems) else None
        found = []
        for prepared, predicted, failed in zip(batch, predictions, problems, strict=True):
            study_id = prepared.study.study_id
            extra = {f"{m}_s": round(s / len(batch), 3) for m, s in seconds.items()}
            extra |= {"predicting_s": round(sum(seconds.values()) / len(batch), 3), "seconds": round(share, 3)}
            extra["dropped"] = schedule.dropped() if prepared.study.volumes else []
            extra["files"] = digests.get(study_id, "")
            every = prepared.problems + failed + ([Problem(Kind.DEVICE, failure)] if failure else [])
            # What may go better another time is not saved, and does not take the place of what was.
            sound = bool(prepared.study.volumes) and not {problem.kind for problem in every} & _BY_CHANCE
            found.append((_result(prepared, predicted, every, f"{key} {extra['files']}", extra), sound))
        return found, seconds

    def keep(study_id, result, sound):
        if sound or results[study_id] is None:
            results[study_id] = _save_result(saved[study_id] if sound else None, result)

    def work_off(batches, bar):
        """Studies that `ahead` prepares. False when there is no time left."""
        for study_ids, left, whole in batches:
            begun = clock()
            if not schedule.plan(len(study_ids) if whole else left, batch_studies, whole):
                return False
            batch, lost_s = _take_batch(ahead, study_ids, schedule, prepare)
            choice = schedule.plan(len(study_ids) if whole else left, batch_studies, whole)
            if not choice:
                return False
            found, seconds = predict(batch, begun)
            for member, spent in seconds.items():
                schedule.note(member, spent, choice[member] * sum(bool(p.study.volumes) for p in batch))
            schedule.note_batch(clock() - begun - lost_s, len(batch))
            for prepared, (result, sound) in zip(batch, found, strict=True):
                keep(prepared.study.study_id, result, sound)
                if prepared.seconds:  # else a thread still hangs in it
                    journal.end(prepared.study.study_id)
            end_s = schedule.used_s() + (left - len(batch)) * schedule.pace_s(schedule.choice)
            limit = f" of {_hours(hours * 3600)}" if hours > 0 else ""
            bar.set_postfix_str(f"end at {_hours(end_s)}{limit} h", refresh=False)
            bar.update(len(batch))
            del batch, prepared  # they are large, and the next batch is waited for
        return True

    def in_child(study_id):
        """One study from its files to its result, in a process of its own."""
        torch.set_num_threads(1)  # none of the pool's threads has come along
        begun = clock()
        prepared, _ = prepare(study_id)
        return predict([prepared], begun)[0][0]

    def work_off_suspect(study_id, left, bar):
        """One study that this process, or an earlier one, may have died of. False when there is no time left."""
        nonlocal ahead
        whole, on_cpu = results[study_id] is not None, str(members.device) == "cpu"
        if not schedule.plan(1 if whole else left, 1, whole):
            return False
        journal.begin(study_id, child=can_run_in_child() and on_cpu)
        try:
            if can_run_in_child() and on_cpu:
                keep(study_id, *run_in_child(partial(in_child, study_id), PATIENCE_S))
                journal.end(study_id)
                bar.update(1)
                return True
            if can_run_in_child():  # what a GPU does cannot be tried in a child, but files can be read in one
                run_in_child(lambda: bool(read_study(images / str(study_id), jobs[study_id])), PATIENCE_S)
        except ChildDied as died:
            why = journal.condemn(study_id, str(died))
            print(f"study {study_id}: {why}")
            results[study_id] = _passed_over(results[study_id], why, digests[study_id])
        except (RuntimeError, TimeoutError) as error:
            why = f"given up ({type(error).__name__}: {error}), every row is the prior"
            keep(study_id, _passed_over(None, why, digests[study_id]), False)
            journal.end(study_id)
        else:
            ahead = _Ahead([study_id], begin_and_prepare, 1, 1)
            try:
                return work_off([([study_id], left, whole)], bar)
            finally:
                ahead.close()
        bar.update(1)
        return True

    batches = [
        (part[first : first + batch_studies], len(part) - first + (len(suspects) if part is todo else 0), part is again)
        for part in (todo, again)
        for first in range(0, len(part), batch_studies)
    ]
    ahead = _Ahead([*todo, *again], begin_and_prepare, readers, batch_studies + readers)
    before = len(jobs) - len(todo) - len(again) - len(suspects)
    with journal, progress(total=len(jobs), desc=f"predicting {split} studies", initial=before) as bar:
        try:
            in_time = work_off(batches, bar)
        finally:
            ahead.close()
        for number, study_id in enumerate(suspects):
            in_time = in_time and work_off_suspect(study_id, len(suspects) - number, bar)
    late = [study_id for study_id, result in results.items() if result is None]
    if late:
        print(f"the time is up: {len(late)} of {len(jobs)} studies are left to the prior")
    for study_id in late:  # not saved: a restart in a new session has time for them
        why = f"no time left: {schedule.used_s() / 3600:.2f} of {hours:g} h have passed, every row is the prior"
        problems = [Problem(Kind.TIME, why).to_dict()]
        results[study_id] = {"predictions": {}, "levels": [], "problems": problems, "dropped": schedule.dropped()}
    del _STARTED[clock_key]
    return _collect(jobs, results, members, ensemble, folder)


def _passed_over(result, why, files):
    """The result of a study that is not looked at; an earlier one of fewer views or members stands, if there is any."""
    earlier = result or {"predictions": {}, "levels": [], "problems": []}
    why = why if result else f"{why}; every row is the prior"
    problems = [*earlier["problems"], Problem(Kind.PASSED_OVER, why).to_dict()]
    return earlier | {"problems": problems, "dropped": [], "files": files}


def _hours(seconds):
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02}"


def _take_batch(ahead, study_ids, schedule, prepare):
    """(the next studies, Prepared; the seconds that were waited for those given up). See _take; prepare: what `ahead`
    does, for studies that found the device's memory full: they are prepared once more, by this thread alone."""
    batch, lost_s = [], 0.0
    for study_id in study_ids:
        begun = schedule.clock()
        prepared = _take(ahead, study_id, schedule)
        if not prepared.seconds:
            lost_s += schedule.clock() - begun
        elif any(problem.kind is Kind.MEMORY for problem in prepared.problems):
            free_memory()
            prepared, _ = prepare(study_id)
        batch.append(prepared)
    return batch, lost_s


def _take(ahead, study_id, schedule):
    """The next Prepared study; one without images, and the reason, where preparing it hangs."""
    try:
        prepared, seconds = ahead.take(PATIENCE_S, max(1.0, schedule.limit_s - schedule.used_s()))
        schedule.note("preparing", max(0.0, seconds - sum(prepared.preparing.values())), 1)
        for member, own_s in prepared.preparing.items():
            schedule.note(f"preparing {member}", own_s, 1)
        return prepared
    except queue.Empty:
        text = f"given up: not read and located in {PATIENCE_S:.0f} s or before the end, every row is the prior"
        problem = Problem(Kind.TIME, text)
        return Prepared(Study(study_id, []), None, {}, [problem], {})


def _device_failure(device):
    """None if the device still works, else a sentence; raises RuntimeError with it, but not while Kaggle scores.

    Some errors of CUDA leave every later call in this process failing, whatever it is about.
    """
    try:
        torch.zeros(1, device=device).add_(1).item()
    except torch.OutOfMemoryError:  # it works, for others
        return None
    except Exception as error:
        failure = f"the device {device} fails ({type(error).__name__}: {error})"
    else:
        return None
    if not os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
        raise RuntimeError(f"{failure}: start again, in a new process; the studies until here are finished")
    print(failure)
    return failure


def _collect(jobs, results, members, ensemble, folder):
    """infer_studies' tables from the results of all studies."""
    prior, by_class = complete_prior(members.prior)
    names = [m for m in MEMBERS if any(m in r["predictions"] for r in results.values())]
    shape = (len(jobs), len(CONDITIONS), len(LEVELS), len(SEVERITIES))
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
                "dropped": " | ".join(result["dropped"]),
                **{f"{step}_s": result.get(f"{step}_s", 0.0) for step in (*steps(), "predicting")},
                "seconds": result.get("seconds", 0.0),
                "problems": " | ".join(problem["text"] for problem in result["problems"]),
                "files": result.get("files", ""),
            }
        )
    _refuse_lost_members(members, results, stack, folder)
    ids = np.array(list(jobs), np.int64)
    tables = {m: to_submission(ids, member_alone(stack[m], prior)) for m in names}
    levels = [row for result in results.values() for row in result["levels"]]
    return (
        to_submission(ids, probabilities),
        pd.DataFrame(log),
        tables,
        pd.DataFrame(levels, columns=LEVEL_TABLE_COLUMNS),
    )


def _refuse_lost_members(members, results, stack, folder):
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
