"""Batches of studies from their files to the ledger, as far as there is time.

May use: ledger, members, read_ahead, results, schedule, study, grade, data, in_flight, limits, problems.
"""

import os
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.volume import Study
from ..grade.member import free_memory
from ..in_flight import InFlight
from ..limits import cpu_limit
from ..problems import Kind, Problem, kind_of_error
from .ledger import Ledger, by_chance
from .members import Members
from .read_ahead import ReadAhead
from .results import Result, make_result
from .schedule import Schedule
from .study import Prepared, predict_studies, prepare_study


class Batch(NamedTuple):
    """Studies that go through the networks together.

    left: how many studies still have to be done, these included; whole: they have a result with something dropped and
    are done again, so with everything or not at all.
    """

    study_ids: Sequence[int]
    left: int
    whole: bool

    @property
    def planned(self) -> int:
        """How many studies the time has to be enough for."""
        return len(self.study_ids) if self.whole else self.left


@dataclass
class Worker:
    """Reads, predicts and enters studies.

    jobs: dict study_id -> dict series_id -> description; images: folder of the studies' folders; batch_studies: how
    many go through the networks together; patience_s: for one study to be read and located before it is given up;
    study_s: CPU seconds for the same; bar: of progress, set by who has one.
    """

    jobs: Mapping[int, Mapping[int, str]]
    images: Path
    members: Members
    schedule: Schedule
    ledger: Ledger
    journal: InFlight
    batch_studies: int
    patience_s: float
    study_s: float
    bar: Any = None

    def prepare(self, study_id: int, stopped: Callable[[], bool] | None = None) -> tuple[Prepared, float]:
        """A Prepared study and the seconds that it took. stopped: see cpu_limit."""
        begun = self.schedule.clock()
        try:
            self.ledger.key_of(study_id)  # before reading: files that change meanwhile are read again by a restart
            with cpu_limit(self.study_s, stopped):
                folder = self.images / str(study_id)
                prepared = prepare_study(folder, self.jobs[study_id], self.members, self.schedule.choice)
        except Exception as error:  # not expected, but the consumer has to get a result
            text = f"given up ({type(error).__name__}: {error}), every row is the prior"
            prepared = _given_up(study_id, Problem(kind_of_error(error, Kind.PASSED_OVER), text))
        return prepared, self.schedule.clock() - begun

    def predict(self, batch: Sequence[Prepared], begun: float) -> tuple[list[tuple[Result, bool]], dict[str, float]]:
        """(a result and whether it is sound, for each study; the seconds of each member).

        begun: the clock when work on the batch began. Raises RuntimeError where the device fails.
        """
        predictions, problems, seconds = predict_studies(batch, self.members, self.schedule.choice, self.schedule.clock)
        share = (self.schedule.clock() - begun) / len(batch)
        failure = _device_failure(self.members.device) if any(problems) else None
        found = []
        for prepared, predicted, failed in zip(batch, predictions, problems, strict=True):
            files = self.ledger.files_of(prepared.study.study_id)
            extra: dict[str, Any] = {f"{m}_s": round(s / len(batch), 3) for m, s in seconds.items()}
            extra |= {"predicting_s": round(sum(seconds.values()) / len(batch), 3), "seconds": round(share, 3)}
            extra["dropped"] = self.schedule.dropped() if prepared.study.volumes else []
            extra["files"] = files
            every = prepared.problems + failed + ([Problem(Kind.DEVICE, failure)] if failure else [])
            # What may go better another time is not saved, and does not take the place of what was.
            sound = bool(prepared.study.volumes) and not by_chance(every)
            found.append((make_result(prepared, predicted, every, f"{self.ledger.key} {files}", extra), sound))
        return found, seconds

    def work_off(self, batches: Sequence[Batch], readers: int, ahead: int) -> bool:
        """Do all studies of the batches. False when there is no time left.

        readers: threads that prepare studies; ahead: how many are being prepared or waiting.
        """
        reading = ReadAhead([i for batch in batches for i in batch.study_ids], self._begin, readers, ahead)
        try:
            return all(self._work_off_batch(batch, reading) for batch in batches)
        finally:
            reading.close()

    def _begin(self, study_id: int, stopped: Callable[[], bool]) -> tuple[Prepared, float]:
        self.journal.begin(study_id)
        return self.prepare(study_id, stopped)

    def _work_off_batch(self, batch: Batch, reading: ReadAhead) -> bool:
        """The batch's studies are large: they are gone when this returns, and the next batch is waited for."""
        schedule, begun = self.schedule, self.schedule.clock()
        if not schedule.plan(batch.planned, self.batch_studies, batch.whole):
            return False
        studies, lost_s = self._take_batch(batch.study_ids, reading)
        choice = schedule.plan(batch.planned, self.batch_studies, batch.whole)
        if not choice:
            return False
        found, seconds = self.predict(studies, begun)
        for member, spent_s in seconds.items():
            schedule.note(member, spent_s, choice[member] * sum(bool(p.study.volumes) for p in studies))
        schedule.note_batch(schedule.clock() - begun - lost_s, len(studies))
        for prepared, (result, sound) in zip(studies, found, strict=True):
            self.ledger.keep(prepared.study.study_id, result, sound)
            if prepared.seconds:  # else a thread still hangs in it
                self.journal.end(prepared.study.study_id)
        self._show(batch.left - len(studies), len(studies))
        return True

    def _take_batch(self, study_ids: Sequence[int], reading: ReadAhead) -> tuple[list[Prepared], float]:
        """(the next studies; the seconds that were waited for those given up).

        Studies that found the device's memory full are prepared once more, by this thread alone.
        """
        batch, lost_s = [], 0.0
        for study_id in study_ids:
            begun = self.schedule.clock()
            prepared = self._take(study_id, reading)
            if not prepared.seconds:
                lost_s += self.schedule.clock() - begun
            elif any(problem.kind is Kind.MEMORY for problem in prepared.problems):
                free_memory()
                prepared, _ = self.prepare(study_id)
            batch.append(prepared)
        return batch, lost_s

    def _take(self, study_id: int, reading: ReadAhead) -> Prepared:
        """The next study; one without images, and the reason, where preparing it hangs."""
        schedule = self.schedule
        try:
            prepared, seconds = reading.take(self.patience_s, max(1.0, schedule.limit_s - schedule.used_s()))
        except queue.Empty:
            text = (
                f"given up: not read and located in {self.patience_s:.0f} s or before the end, every row is the prior"
            )
            return _given_up(study_id, Problem(Kind.TIME, text))
        schedule.note("preparing", max(0.0, seconds - sum(prepared.preparing.values())), 1)
        for member, own_s in prepared.preparing.items():
            schedule.note(f"preparing {member}", own_s, 1)
        return prepared

    def _show(self, left: int, done: int) -> None:
        """Move the bar on by the studies that are done, and say when the end will come."""
        end_s = self.schedule.used_s() + left * self.schedule.pace_s(self.schedule.choice)
        hours = self.schedule.hours
        limit = f" of {_hours(hours * 3600)}" if hours > 0 else ""
        self.bar.set_postfix_str(f"end at {_hours(end_s)}{limit} h", refresh=False)
        self.bar.update(done)


def _given_up(study_id: int, problem: Problem) -> Prepared:
    return Prepared(Study(study_id, []), None, {}, [problem], {})


def _hours(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02}"


def _device_failure(device: str) -> str | None:
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
