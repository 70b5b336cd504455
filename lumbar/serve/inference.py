"""A split's studies in, 25 rows of each out, whatever is broken.

Each finished study is saved in `out`/studies, so a restart continues; a damaged one, one of other weights, or one whose
files have changed is done again. One predicted with less for want of time is saved, too, and a restart does it again
with everything, as far as there is time after those without a result. One without a readable image is not saved, nor
one that was given up, took longer than study_s or found the device's memory full: these may go better another time.
Should the process be killed, the next start finds out which study it died of, passes it over and says so in the log
(see InFlight).

Memory does not grow with the number of studies: at most 2 * batch_studies + readers of them are held, and what one may
hold is bounded too (see dicom.MAX_SLICES). Results do not depend on batch composition, up to rounding in the networks.

What is left of the ensemble where a member fails, or has no time: the others carry its weight; where only the study
model is left, which needs no levels, it stands alone; where none is, the training set's prior for the condition and
level; and if the weights carry none, the class prior (complete_prior).

May use: ledger, members, results, schedule, study, tables, worker, grade, data, cluster, in_flight, names.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..cluster import spread
from ..data.dicom import read_study
from ..grade.registry import MEMBERS
from ..in_flight import ChildDied, InFlight, can_run_in_child, run_in_child
from ..names import progress
from .ledger import Ledger
from .members import Members
from .results import Result, results_key
from .schedule import Schedule
from .study import studies_to_predict
from .tables import collect
from .worker import Batch, Worker

PATIENCE_S = 900.0  # for one study to be read and located, before it is given up
# CPU seconds for the same, checked between its steps: a usual study takes 5 and the largest that the bounds of reading
# and locating let through 30, so more is a study that nobody foresaw. Patience is for what hangs without working.
STUDY_S = 60.0
PART_BATCHES = 2  # batches of one task of a cluster: while the networks work on one the next is read

# Folder of results -> the clock when this process began to work in it: a notebook's cell that is run again does not
# start the limit anew; a new process (on Kaggle a new session, with a clock of its own) does.
_STARTED: dict[str, float] = {}


def infer_studies(
    data: str | Path,
    split: str,
    members: Members,
    ensemble: Mapping[str, Any],
    out: str | Path,
    views: int = -1,
    batch_studies: int = 4,
    hours: float = 0.0,
    reserve: float = 0.5,
    readers: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    patience_s: float = PATIENCE_S,
    study_s: float = STUDY_S,
    scheduler: str = "",
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, pd.DataFrame], pd.DataFrame]:
    """Predict every study of a split, see studies_to_predict: 25 rows each, whatever is broken.

    What is kept in `out`, and what stands where a member fails: see the module's docstring.

    Parameters
    ----------
    data, split : path, str
        Competition folder; `test` or `train`.
    members, ensemble : Members, dict
        Of load_members; of ensemble_for or default_ensemble.
    out : path
        The stage's folder.
    views : int
        -1 for the views that the weights name, 1 for none, n for at most n.
    batch_studies : int
        Studies that go through the networks together.
    hours, reserve : float
        See Schedule; the limit runs from the first call of this process for this `out` until a call has finished.
    readers : int, optional
        Threads that read, locate and cut the studies to come; default: as many as the CPU has cores, at most 4.
    clock : callable
        Seconds, from anywhere.
    patience_s, study_s : float
        Seconds, and CPU seconds, for one study to be read and located before it is given up.
    scheduler : str
        Address of a Dask scheduler whose workers share the studies, see cluster.spread; `hours` then holds for each
        part of them. Empty: this machine.

    Returns
    -------
    submission, log : DataFrame
        The log says which members each study's rows are from, and why; its columns: see tables.collect.
    tables : dict
        Member's name -> its own submission.
    levels : DataFrame
        As boxes_to_table makes it.

    Raises
    ------
    ValueError
        No member, or one without a weight in the ensemble.
    RuntimeError
        A member that was loaded failed in every study: that is a mistake in the set-up, not bad luck with the data. Or
        the device itself fails, of which nothing is saved, so that a restart continues. While Kaggle scores a
        submission both are printed instead, a submission with less being better than none.
    """
    if scheduler:
        _infer_on_cluster(
            _Work(data, split, members, ensemble, out, views, batch_studies, hours, reserve, readers), scheduler
        )
    ledger = _do_studies(
        _Work(data, split, members, ensemble, out, views, batch_studies, hours, reserve, readers),
        clock=clock,
        patience_s=patience_s,
        study_s=study_s,
    )
    return collect(ledger.entries(), members, ensemble, ledger.folder)


@dataclass(frozen=True)
class _Work:
    """What infer_studies was asked for, see there."""

    data: str | Path
    split: str
    members: Members
    ensemble: Mapping[str, Any]
    out: str | Path
    views: int
    batch_studies: int
    hours: float
    reserve: float
    readers: int | None


def _ledger_of(work: _Work, jobs: Collection[int]) -> Ledger:
    folder = Path(work.out) / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    images = Path(work.data) / f"{work.split}_images"
    return Ledger(folder, images, jobs, results_key(work.members, work.views), work.members.weights)


def _infer_on_cluster(work: _Work, scheduler: str) -> None:
    """Have the workers of a cluster do the studies that are not finished, some batches to a task. What they leave,
    because workers died of it, say, is left to this process."""
    work = replace(work, data=Path(work.data).resolve(), out=Path(work.out).resolve())
    ledger = _ledger_of(work, studies_to_predict(work.data, work.split))
    left, size = [*ledger.missing(), *ledger.short()], PART_BATCHES * work.batch_studies
    parts = [tuple(left[first : first + size]) for first in range(0, len(left), size)]
    with progress(desc=f"predicting {work.split} studies on the cluster", total=len(parts)) as bar:
        spread(_infer_part, parts, work, scheduler=scheduler, lost=_leave_part, gpu=True, done=bar.update)


def _infer_part(work: _Work, study_ids: tuple[int, ...]) -> None:
    _do_studies(work, study_ids)


def _leave_part(study_ids: tuple[int, ...], why: str) -> None:
    print(f"studies {', '.join(map(str, study_ids))}: {why}; this process does them")


def _do_studies(
    work: _Work,
    study_ids: Collection[int] | None = None,
    clock: Callable[[], float] = time.monotonic,
    patience_s: float = PATIENCE_S,
    study_s: float = STUDY_S,
) -> Ledger:
    """Predict these studies (default: all of the split), each into its file. Returns their ledger."""
    views_of = _views_of(work.members, work.views)
    weights = _weights_of(views_of, work.ensemble)
    readers, batch_studies = work.readers or min(4, os.cpu_count() or 1), work.batch_studies
    jobs = studies_to_predict(work.data, work.split)
    jobs = {study_id: job for study_id, job in jobs.items() if study_ids is None or study_id in study_ids}
    ledger = _ledger_of(work, jobs)
    journal = InFlight(Path(work.out) / "in_flight", "study", ledger.key_of, ledger.is_finished, study_ids)
    suspects = _suspects(journal, ledger)
    batches = _batches(ledger, suspects, batch_studies)
    clock_key = str(ledger.folder.resolve())
    started = _STARTED.setdefault(clock_key, clock())
    schedule = Schedule(views_of, weights, work.hours, work.reserve, readers, clock, started)
    worker = Worker(jobs, ledger.images, work.members, schedule, ledger, journal, batch_studies, patience_s, study_s)
    before = len(jobs) - sum(len(batch.study_ids) for batch in batches) - len(suspects)
    with journal, progress(total=len(jobs), desc=f"predicting {work.split} studies", initial=before) as worker.bar:
        in_time = worker.work_off(batches, readers, batch_studies + readers)
        for number, study_id in enumerate(suspects):
            in_time = in_time and _work_off_suspect(worker, study_id, len(suspects) - number)
    _leave_late(ledger, schedule)
    _STARTED.pop(clock_key, None)
    return ledger


def _views_of(members: Members, most: int) -> dict[str, int]:
    """dict member -> the number of its views. Raises ValueError without any member."""
    if not members.weights:
        raise ValueError("no member to predict with: load_members loads them")
    return {m: max(len(MEMBERS[m].views(own, most)) for own in known) for m, known in members.weights.items()}


def _weights_of(members: Mapping[str, int], ensemble: Mapping[str, Any]) -> dict[str, float]:
    """dict member -> its mean weight in the ensemble's groups. Raises ValueError for a member without any."""
    groups = ensemble["weights"].values()
    for member in members:
        if not any(member in known for known in groups):
            raise ValueError(f"the ensemble has no weight for the member {member}: fit it with that, too")
    return {m: float(np.mean([group.get(m, 0.0) for group in groups])) for m in members}


def _suspects(journal: InFlight, ledger: Ledger) -> list[int]:
    """The studies that an earlier start may have died of; those that it did die of are passed over. Both are said."""
    for study_id, why in journal.passed_over.items():
        if study_id in ledger.results:
            ledger.pass_over(study_id, why)
            print(f"study {study_id}: {why}")
    suspects = [study_id for study_id in journal.suspects if study_id in ledger.results]
    if suspects:
        ids = ", ".join(map(str, suspects))
        print(f"the process died while it was at {len(suspects)} studies ({ids}): they come last, one at a time")
    return suspects


def _batches(ledger: Ledger, suspects: Sequence[int], size: int) -> list[Batch]:
    """All studies but the suspects that are not finished: first those without a result, then those with a short one."""
    missing = [study_id for study_id in ledger.missing() if study_id not in suspects]
    short = [study_id for study_id in ledger.short() if study_id not in suspects]
    return [
        Batch(part[first : first + size], len(part) - first + (0 if whole else len(suspects)), whole)
        for part, whole in ((missing, False), (short, True))
        for first in range(0, len(part), size)
    ]


def _work_off_suspect(worker: Worker, study_id: int, left: int) -> bool:
    """Do one study that this process, or an earlier one, may have died of. False when there is no time left.

    Where possible in a child, whose death costs nothing else: all of it, or, since what a GPU does cannot be tried in
    one, the reading.
    """
    journal, ledger = worker.journal, worker.ledger
    batch = Batch([study_id], left, whole=ledger.results[study_id] is not None)
    in_child = can_run_in_child() and str(worker.members.device) == "cpu"
    if not worker.schedule.plan(batch.planned, 1, batch.whole):
        return False
    journal.begin(study_id, child=in_child)
    try:
        if in_child:
            ledger.keep(study_id, *run_in_child(partial(_do_study, worker, study_id), worker.patience_s))
            journal.end(study_id)
        elif can_run_in_child():
            run_in_child(
                lambda: bool(read_study(worker.images / str(study_id), worker.jobs[study_id])), worker.patience_s
            )
    except ChildDied as died:
        why = journal.condemn(study_id, str(died))
        print(f"study {study_id}: {why}")
        ledger.pass_over(study_id, why)
    except (RuntimeError, TimeoutError) as error:
        ledger.give_up(study_id, f"given up ({type(error).__name__}: {error}), every row is the prior")
        journal.end(study_id)
    else:
        if not in_child:
            return worker.work_off([batch], readers=1, ahead=1)
    worker.bar.update(1)
    return True


def _leave_late(ledger: Ledger, schedule: Schedule) -> None:
    """Leave the studies that there was no time for to the prior, and say so."""
    late = ledger.missing()
    if late:
        print(f"the time is up: {len(late)} of {len(ledger.results)} studies are left to the prior")
    for study_id in late:
        used_h = schedule.used_s() / 3600
        why = f"no time left: {used_h:.2f} of {schedule.hours:g} h have passed, every row is the prior"
        ledger.leave(study_id, why, schedule.dropped())


def _do_study(worker: Worker, study_id: int) -> tuple[Result, bool]:
    """One study from its files to its result, and whether that is sound, in a process of its own."""
    torch.set_num_threads(1)  # none of the pool's threads has come along
    begun = worker.schedule.clock()
    prepared, _ = worker.prepare(study_id)
    return worker.predict([prepared], begun)[0][0]
