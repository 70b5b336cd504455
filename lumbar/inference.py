"""Inference: a study in, 25 rows out, whatever is broken."""

import atexit
import hashlib
import itertools
import json
import math
import os
import queue
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .classifiers import crops_to_studies, cut_crops, load_classifier, predict_crops
from .dicom import read_study
from .ensemble import MEMBERS, combine_members, member_alone, member_weights, read_out_of_fold
from .files import to_submission
from .geometry import boxes_to_table
from .greys import normalise_study
from .in_flight import ChildDied, InFlight, can_run_in_child, images_digest, read_left_json, run_in_child
from .levels import SOURCES, _locating_key, locate_levels_surely
from .limits import TookTooLong, check_limit, cpu_limit
from .names import (
    CONDITIONS,
    DETECTORS,
    GROUPS,
    LEVEL_TABLE_COLUMNS,
    LEVELS,
    SEVERITIES,
    SEVERITY_WEIGHTS,
    SUBMISSION_COLUMNS,
    device_for,
    progress,
)
from .official import official_detector
from .spinenet import load_spinenet
from .storage import plain, write_json
from .tables import described_series, sample_studies, whole_number
from .volume import Study
from .yolo import load_yolo, without_frames, yolo_studies


@dataclass
class Members:
    """Everything that inference needs, loaded from folders of weights."""

    spinenet: object
    yolo: dict  # detector (scs, nfn, ss) -> list of loaded models, one a fold
    level: list  # (model, about) of each fold
    study: list
    prior: np.ndarray  # (5, 5, 3), the training set's weighted class prior
    detector: object = "own"  # as locate_levels takes it; "official" is loaded once
    device: str = "cpu"  # where the networks are


def find_weights(folders, pattern):
    """Files of that name in the folders or one folder below, by name; of two with one name the first found."""
    found = {}
    for folder in folders:
        for path in sorted({*Path(folder).glob(pattern), *Path(folder).glob("*/" + pattern)}):
            if not any(".old-" in part for part in path.parts):
                found.setdefault(path.name, path)
    return [found[name] for name in sorted(found)]


def load_members(folders, members=MEMBERS, device="auto"):
    """Load every member's weights found in the folders, or one folder below. Returns Members.

    Which file stands for a fold, and which are left out: see member_weights. Prints both.
    Raises FileNotFoundError without a SpineNet or without any member: a submission made of nothing but a prior
    would look like a result.
    """
    device = device_for(device)
    places = ", ".join(map(str, folders))
    spinenet = find_weights(folders, "spinenet.safetensors")
    if not spinenet:
        raise FileNotFoundError(f"no spinenet.safetensors in {places}: attach 02_train_spinenet's output")
    chosen, sentences = member_weights(folders)
    wanted = {name: path for name, path in chosen.items() if name.startswith(tuple(f"{member}_" for member in members))}
    print(*sentences, *_where(wanted | {"spinenet": spinenet[0]}), sep="\n")
    classifiers = {
        scope: [load_classifier(path, device) for name, path in wanted.items() if name.startswith(f"{scope}_")]
        for scope in ("level", "study")
    }
    yolo = {
        condition: [load_yolo(path, device) for name, path in wanted.items() if name.startswith(f"yolo_{condition}_")]
        for condition in DETECTORS
    }
    abouts = [about for models in classifiers.values() for _, about in models]
    if not abouts and not any(yolo.values()):
        raise FileNotFoundError(f"no finished member's weights in {places}: attach the outputs of 03 and 04")
    priors = [about.get("prior") for about in abouts + [model.about for models in yolo.values() for model in models]]
    priors = [np.asarray(prior, np.float64) for prior in priors if prior is not None]
    model = load_spinenet(spinenet[0], device)
    # Boxes at inference come from the detector that made those of the training.
    official = model.about.get("detector") == "official"
    return Members(
        model,
        yolo,
        classifiers["level"],
        classifiers["study"],
        np.mean(priors, 0) if priors else np.full((len(CONDITIONS), len(LEVELS), len(SEVERITIES)), np.nan),
        official_detector(device) if official else "own",
        device,
    )


def _where(chosen):
    """Lines that say which weights are from which folder."""
    folders = {}
    for name, path in chosen.items():
        folders.setdefault(path.parent, []).append(name)
    return [f"{', '.join(names)} from {folder}" for folder, names in folders.items()]


def weight_folders(places):
    """Folders with trained weights in or below the given ones, in the order found.

    places: paths. Image folders and finished stages' caches are not searched: /kaggle/input may hold 150,000 files; nor
    is `solutions`, where tests/benchmarks/bench_solutions.py keeps the members of others, unless it is a place itself.
    Raises FileNotFoundError naming the places if there is none.
    """
    skipped = {"train_images", "test_images", "volumes", "crops", "yolo", "images", "labels", "studies", "solutions"}
    found = []
    for place in places:
        for folder, below, files in os.walk(place):
            depth = len(Path(folder).relative_to(place).parts)
            below[:] = (
                sorted(b for b in below if b not in skipped and ".old-" not in b and not b.startswith("."))
                if depth < 6
                else []
            )
            if any(name.endswith(".safetensors") for name in files):
                found.append(Path(folder))
    if not found:
        raise FileNotFoundError(
            f"no *.safetensors in or below {', '.join(map(str, places))}: attach the outputs of 02, 03 and 04"
        )
    return found


@dataclass
class Prepared:
    """A study made ready for the members: read, its levels found, its crops cut.

    boxes: five LevelBoxes, None without a readable image; crops: dict of _crop_key -> cut_crops' array, or the
    Exception that cutting raised; problems: list of sentences; seconds: dict of reading, locating and cropping, empty
    where the work was given up; cutting: how much of the cropping was for which member.
    """

    study: Study
    boxes: list | None
    crops: dict
    problems: list
    seconds: dict
    cutting: dict = field(default_factory=dict)


def _crop_key(crop):
    return json.dumps(crop, sort_keys=True)


def _views(about, limit=-1):
    """The views of a member's model: those that paid in training, at most `limit` of them where that is not -1."""
    views = about.get("views") or [{}]
    return views if limit < 0 else views[:limit]


def _abouts(members):
    """dict member -> the metadata of its models, of those members that were loaded."""
    found = {
        "yolo": [model.about for models in members.yolo.values() for model in models],
        "level": [about for _, about in members.level],
        "study": [about for _, about in members.study],
    }
    return {member: abouts for member, abouts in found.items() if abouts}


def prepare_study(folder, descriptions, members, wanted=("level", "study")):
    """Everything about a study that needs no member: Prepared. Never raises because of what the study is.

    folder, descriptions: as read_study takes them; wanted: the members whose crops are cut.
    """
    seconds = dict.fromkeys(("reading", "locating", "cropping"), 0.0)
    boxes, crops, started = None, {}, time.perf_counter()
    try:
        study = normalise_study(read_study(folder, descriptions))
    except Exception as error:
        study_id = int(Path(folder).name)
        study = Study(study_id, [], [f"study {study_id} cannot be read ({type(error).__name__}: {error})"])
    seconds["reading"], started = time.perf_counter() - started, time.perf_counter()
    problems = list(study.problems)
    if not study.volumes:
        problems.append("no readable image: every row is the prior")
        return Prepared(study, boxes, crops, problems, seconds)
    try:
        boxes, _, problem = locate_levels_surely(study, members.spinenet, detector=members.detector)
    except Exception as error:
        problem = f"no level can be placed ({type(error).__name__}: {error})"
    if problem:
        problems.append(f"levels: {problem}")
    seconds["locating"], cutting = time.perf_counter() - started, {}
    for scope in wanted:
        started = time.perf_counter()
        for _, about in getattr(members, scope):
            _cut(study, boxes, about["crop"], members.device, crops)
        cutting[scope] = time.perf_counter() - started
    seconds["cropping"] = sum(cutting.values())
    return Prepared(study, boxes, crops, problems, seconds, cutting)


def _cut(study, boxes, crop, device, crops):
    """The crops of a study from `crops`, where they are put if they are not there yet, or the Exception that cutting
    raised."""
    key = _crop_key(crop)
    if key not in crops:
        try:
            check_limit()
            crops[key] = cut_crops(study, boxes, crop, device)
        except Exception as error:
            crops[key] = without_frames(error)
    return crops[key]


def _cut_again(study, boxes, crop, device, crops):
    """_cut, and once more where the device's memory was too full for it."""
    if isinstance(_cut(study, boxes, crop, device, crops), torch.OutOfMemoryError):
        del crops[_crop_key(crop)]
        _free_memory()
    return _cut(study, boxes, crop, device, crops)


def _free_memory():
    """Give back what is cached of the device's memory."""
    try:
        torch.cuda.empty_cache()
    except Exception:
        pass  # on a device that fails altogether even this does: see _device_failure


def _out_of_memory(problems):
    """True if some of the sentences tell of a device whose memory was full: by chance, not because of the study."""
    return any(torch.OutOfMemoryError.__name__ in problem for problem in problems)


def _took_too_long(problems):
    """True if some of the sentences tell of work that was given up for its time: another machine may be faster."""
    return any(TookTooLong.__name__ in problem for problem in problems)


# Voxels that go through a network together, at most: eight crops of 128^3, one study of 256^3.
_BATCH_VOXELS = 1 << 24
_BATCH_CROPS = 16


def _predict(models, crops, crop, levels, views):
    """predict_crops in batches that fit the memory."""
    batch = int(np.clip(_BATCH_VOXELS // np.prod(crop["shape"]), 1, _BATCH_CROPS))
    while True:
        try:
            return predict_crops(models, crops, crop, levels, views, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        torch.cuda.empty_cache()  # not inside `except`: there the error still holds what it was about
        batch //= 2


def _together_or_alone(work, items):
    """work(items), a list with a result for each; where that raises each item alone, an Exception being its result."""
    try:
        return work(items)
    except Exception as error:
        if len(items) == 1:
            return [without_frames(error)]
    return [_together_or_alone(work, [item])[0] for item in items]


def _classify(scope, batch, members, views):
    """A classifier member on Prepared studies: list of ((5, 5, 3) probabilities, NaN where all folds failed; list of
    sentences about those that did).

    Folds mostly see the same crops through the same views: those go through all their models in one go.
    """
    own = getattr(members, scope)
    groups = {}
    for model, about in own:
        key = _crop_key(about["crop"]), json.dumps(_views(about, views))
        groups.setdefault(key, (about["crop"], _views(about, views), []))[2].append(model)
    logs = np.zeros((len(batch), len(CONDITIONS), len(LEVELS), len(SEVERITIES)))
    folds, failed = np.zeros(len(batch)), [{} for _ in batch]
    for crop, chosen, models in groups.values():
        cut = [_cut_again(p.study, p.boxes, crop, members.device, p.crops) for p in batch]
        there = [k for k, crops in enumerate(cut) if not isinstance(crops, Exception)]

        def work(numbers, crop=crop, chosen=chosen, models=models, cut=cut):
            crops = np.concatenate([cut[k] for k in numbers])
            levels = np.tile(np.arange(len(LEVELS)), len(numbers)) if scope == "level" else None
            return list(crops_to_studies(_predict(models, crops, crop, levels, chosen), scope))

        found = dict(zip(there, _together_or_alone(work, there) if there else [], strict=True))
        for k, crops in enumerate(cut):
            predicted = found.get(k, crops)
            if not isinstance(predicted, Exception) and not np.isfinite(predicted).all():
                predicted = ValueError("the network's answer is not finite")
            if isinstance(predicted, Exception):
                failed[k][f"{scope}: {type(predicted).__name__}: {predicted}"] = True  # once, whatever the folds
            else:
                logs[k] += len(models) * np.log(np.clip(predicted, 1e-12, 1))
                folds[k] += len(models)
    means = np.exp(logs / np.maximum(folds, 1)[:, None, None, None])
    means = np.where(folds[:, None, None, None] > 0, means / means.sum(-1, keepdims=True), np.nan)
    return [(mean, list(sentences)) for mean, sentences in zip(means, failed, strict=True)]


_FEW_PATCHES = 4  # that go through a detector together where memory is short


def _mean_of_folds(found):
    """Mean log probabilities, normalised, of those folds that say something of a row; NaN where none does.

    found: list of (..., 3). Folds see a study through views of their own, so that one may miss a row of the others.
    """
    log_p = np.log(np.clip(found, 1e-12, 1))
    there = np.isfinite(log_p).all(-1, keepdims=True)
    count = there.sum(0)
    p = np.exp(np.where(there, log_p, 0).sum(0) / np.maximum(count, 1))
    return np.where(count > 0, p / p.sum(-1, keepdims=True), np.nan)


def _detect(batch, members, views):
    """The detectors on Prepared studies: list of ((5, 5, 3) probabilities, NaN where they say nothing; list of
    sentences about detectors that failed)."""
    results = [(np.full((len(CONDITIONS), len(LEVELS), len(SEVERITIES)), np.nan), []) for _ in batch]
    studies, boxes = [p.study for p in batch], [p.boxes for p in batch]
    for condition, models in members.yolo.items():
        said = [[] for _ in batch]
        for model in models:
            chosen = _views(model.about, views)

            def work(numbers, model=model, chosen=chosen, **options):
                return yolo_studies(
                    model, [studies[k] for k in numbers], [boxes[k] for k in numbers], chosen, **options
                )

            for k, found in enumerate(_together_or_alone(work, list(range(len(batch))))):
                if isinstance(found, torch.OutOfMemoryError):
                    _free_memory()
                    (found,) = _together_or_alone(partial(work, batch=_FEW_PATCHES), [k])
                if isinstance(found, Exception):
                    results[k][1].append(f"yolo: {condition}: {type(found).__name__}: {found}")
                else:
                    said[k].append(found)
        for k, found in enumerate(said):
            if found:
                mean = _mean_of_folds(found)
                results[k][0][list(DETECTORS[condition][1])] = mean
                unseen = ~np.isfinite(mean).all((0, 2))
                if unseen.any():
                    names = ", ".join(level for level, lost in zip(LEVELS, unseen, strict=True) if lost)
                    results[k][1].append(f"yolo: {condition}: no {DETECTORS[condition][0]} slice shows {names}")
    return results


def predict_studies(batch, members, views=None, clock=time.perf_counter):
    """The members on several Prepared studies at once: (list of dicts member -> (5, 5, 3) probabilities, NaN where it
    has nothing to say; list of lists of sentences about what failed; dict member -> seconds).

    views: dict member -> at most how many of its views, -1 all; members that it lacks are not run; None: everything.
    A study, a detector or a member that fails costs only its own contribution.
    """
    views = dict.fromkeys(_abouts(members), -1) if views is None else views
    predictions, problems, seconds = [{} for _ in batch], [[] for _ in batch], {}
    readable = [k for k, prepared in enumerate(batch) if prepared.study.volumes]
    part = [batch[k] for k in readable]
    for member in [m for m in MEMBERS if m in views and part]:
        started = clock()
        if member == "yolo":
            results = _detect(part, members, views[member])
        else:
            results = _classify(member, part, members, views[member])
        for k, (found, sentences) in zip(readable, results, strict=True):
            predictions[k][member] = found
            problems[k] += sentences
        seconds[member] = clock() - started
    return predictions, problems, seconds


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

# Grades of the competition's training set, all levels together: normal/mild, moderate, severe.
CLASS_COUNTS = {"spinal": (8664, 736, 470), "foraminal": (7672, 1794, 399), "subarticular": (6864, 1835, 913)}


def complete_prior(prior):
    """The prior with no cell left out: (prior (5, 5, 3) with rows that sum to 1, by_class (5, 5) bool).

    prior: (5, 5, 3), the training set's prior of each condition and level. Where a cell is not usable (the weights
    carry no prior, or none for this cell) the mean over the condition's other levels stands, and without any that of
    CLASS_COUNTS by the metric's weights; by_class marks both.
    """
    prior = np.array(np.broadcast_to(np.asarray(prior, np.float64), (len(CONDITIONS), len(LEVELS), len(SEVERITIES))))
    usable = (
        np.isfinite(prior).all(-1) & (np.nan_to_num(prior, nan=-1) >= 0).all(-1) & (np.nan_to_num(prior).sum(-1) > 0)
    )
    prior[usable] /= prior[usable].sum(-1, keepdims=True)
    for group, conditions in GROUPS.items():
        counts = np.asarray(CLASS_COUNTS[group], np.float64) * SEVERITY_WEIGHTS
        for c in conditions:
            prior[c, ~usable[c]] = prior[c, usable[c]].mean(0) if usable[c].any() else counts / counts.sum()
    return prior, ~usable


# ---- Time ----


class Schedule:
    """What the time that is left is enough for.

    views: dict member -> its number of views; weights: dict member -> its weight in the ensemble; hours: the limit, 0
    for none; reserve: hours of it that stay unused; readers: threads that prepare studies; clock: seconds, from
    anywhere; started: the clock when the limit began to run.

    What a member costs is measured while it runs (see note). When the projected end exceeds the limit less the
    reserve, views are dropped first, the last and least useful ones of all members alike; then members: those with the
    most weight stay that are in time for every study, and where none is, the fastest for as many as it can; and when
    not even a batch of that fits, everything. What reading alone takes is not made up by dropping members. The choice
    is made anew for each batch.
    """

    def __init__(self, views, weights, hours=9.0, reserve=0.5, readers=1, clock=time.monotonic, started=None):
        self.views, self.weights, self.readers, self.clock = dict(views), weights, readers, clock
        self.hours, self.limit_s = hours, (hours - reserve) * 3600 if hours > 0 else math.inf
        self.started = clock() if started is None else started
        self.spent = {}
        self.batches, self.expected = 0, deque(maxlen=20)
        self.choice, self.reason = dict(views), ""

    def used_s(self):
        """Seconds of the limit that have passed."""
        return self.clock() - self.started

    def note(self, step, seconds, units):
        """A member took `seconds` for `units` studies times views; or for studies "preparing", of which that member's
        crops apart ("cutting level", "cutting study")."""
        if units:
            self.spent.setdefault(step, deque(maxlen=20)).append((seconds, units))

    def cost_s(self, step):
        """Seconds a unit of late; the first time does not count where there are others: it has loading in it."""
        known = list(self.spent.get(step, ()))
        known = known[1:] or known
        return sum(s for s, _ in known) / max(1e-9, sum(u for _, u in known)) if known else 0.0

    def _network_s(self, choice):
        return sum(self.cost_s(member) * views for member, views in choice.items())

    def _preparing_s(self, choice):
        cutting = sum(self.cost_s(f"cutting {member}") for member in choice)
        return (self.cost_s("preparing") + cutting) / self.readers

    def pace_s(self, choice):
        """Seconds a study with this choice: what is slower of the networks and of preparing."""
        pace = max(self._network_s(choice), self._preparing_s(choice))
        real, thought = (sum(values) for values in zip(*self.expected, strict=True)) if self.expected else (0, 0)
        return pace * max(1.0, real / thought if thought else 1.0)

    def note_batch(self, seconds, studies):
        """A batch took `seconds`: where that is more than the sum of what is measured, projections heed it.

        What was waited for studies that were given up does not belong to it: it says nothing of those to come.
        """
        self.batches += 1
        if self.batches > 1:  # the first one waits for studies that nobody has read ahead
            thought = max(self._network_s(self.choice), self._preparing_s(self.choice)) * studies
            self.expected.append((seconds, thought))

    def plan(self, left, batch=1, whole=False):
        """The choice for the next `batch` of `left` studies: dict member -> number of views, empty for none at all.

        whole: everything or nothing. `.choice` and `.reason` keep it.
        """
        time_s = self.limit_s - self.used_s()
        choice, projected = dict(self.views), left * self.pace_s(self.views)
        if not whole and projected > time_s:
            # Late by how much, then what it is worth, then how many views.
            choice = max(
                self._choices(),
                key=lambda c: (min(0.0, time_s - left * self.pace_s(c)), self._weight(c), sum(c.values())),
            )
        if time_s <= 0 or min(batch, left) * self.pace_s(choice) > time_s:
            choice = {}
        end = (self.used_s() + projected) / 3600
        self.reason = "" if choice == self.views else f"with everything the end would come after {end:.2f} h"
        self.choice = choice
        return choice

    def _choices(self):
        """All members or some, with all views or the first ones."""
        for most in range(max(self.views.values()), 0, -1):
            for count in range(len(self.views), 0, -1):
                for some in itertools.combinations(self.views, count):
                    yield {member: min(self.views[member], most) for member in some}

    def _weight(self, choice):
        return sum(self.weights.get(member, 0.0) for member in choice)

    def dropped(self):
        """The last plan's losses, in words."""
        lost = [
            f"{member}: not run" if member not in self.choice else f"{member}: {self.choice[member]} of {views} views"
            for member, views in self.views.items()
            if self.choice.get(member, 0) < views
        ]
        return [f"{what} ({self.reason}, the limit is {self.hours:g} h)" for what in lost]


_STARTED = {}  # stage folder -> when this process first worked in it


# ---- Reading ahead ----

CLOSING_S = 10.0  # for threads to end: the next check of a study's limit is a second away at most


class _Slot:
    """One job's place: whether (begun) and since when (since_s, of time.monotonic) it is worked on, by which
    thread, and its result."""

    def __init__(self, job):
        self.job, self.begun, self.since_s, self.result = job, threading.Event(), 0.0, queue.SimpleQueue()
        self.thread = None


class _Ahead:
    """Work on jobs in threads, a bounded number of them ahead of who takes the results, in the jobs' order.

    jobs: list; work: function of one job that does not raise; threads: how many jobs are worked on at a time; ahead:
    how many are being worked on or waiting. The threads are daemons: one that hangs does not keep the process alive.
    """

    def __init__(self, jobs, work, threads, ahead):
        self.jobs, self.work, self.ahead = deque(jobs), work, ahead
        self.tasks, self.slots, self.stopped = queue.SimpleQueue(), deque(), False
        self.threads, self.given_up = [], []
        _AT_WORK.add(self)
        for _ in range(threads):
            self._start()

    def _start(self):
        thread = threading.Thread(target=self._run, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _run(self):
        while (slot := self.tasks.get()) is not None and not self.stopped:
            slot.since_s, slot.thread = time.monotonic(), threading.current_thread()
            slot.begun.set()
            slot.result.put(self.work(slot.job))

    def take(self, patience_s, wait_s=math.inf):
        """The next job's result. Raises queue.Empty when it has been worked on for patience_s seconds, or was waited
        for wait_s seconds here; then another thread takes the place of the one that hangs, and the job is passed over.
        """
        while self.jobs and len(self.slots) < self.ahead:
            self.slots.append(_Slot(self.jobs.popleft()))
            self.tasks.put(self.slots[-1])
        slot, until_s = self.slots.popleft(), time.monotonic() + wait_s
        try:
            if not slot.begun.wait(min(wait_s, threading.TIMEOUT_MAX)):
                raise queue.Empty
            return slot.result.get(timeout=max(0.0, min(until_s, slot.since_s + patience_s) - time.monotonic()))
        except queue.Empty:
            if slot.thread in self.threads:
                self.threads.remove(slot.thread)
                self.given_up.append(slot.thread)
            self._start()
            raise

    def close(self, patience_s=CLOSING_S):
        """Work off nothing more; wait for what is being worked on, but no longer than patience_s.

        Python ends daemon threads wherever they are when the interpreter exits, and one that is then inside PyTorch
        takes the process with it ("terminate called without an active exception"). So they are waited for, and `work`
        should return early when `stopped` is set. Those that were given up get their time when the process exits.
        """
        self.stopped = True
        for _ in (*self.threads, *self.given_up):
            self.tasks.put(None)
        _join(self.threads, patience_s)


_AT_WORK = weakref.WeakSet()  # all _Ahead; one with threads at work stays in it, since they refer to it


@atexit.register
def _close_all():
    """Wait once more, for threads that were given up or whose _Ahead nobody closed: see _Ahead.close."""
    aheads = list(_AT_WORK)
    for ahead in aheads:
        ahead.close(0)
    _join([thread for ahead in aheads for thread in (*ahead.threads, *ahead.given_up)], CLOSING_S)


def _join(threads, patience_s):
    """Wait until all the threads have ended, or patience_s have passed."""
    until_s = time.monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))


# ---- Finished studies ----


def mended_studies(data, split, log):
    """Ids (list of int) of the studies that had problems when `log` was written, and whose files are others now.

    log: infer_studies' log or its CSV; without its column `files` (of an earlier version) nothing can be told.
    """
    if "files" not in log.columns:
        return []
    rows = log[log["problems"].fillna("") != ""]
    folder = Path(data) / f"{split}_images"
    pairs = zip(rows["study_id"], rows["files"].fillna(""), strict=True)
    return [int(study_id) for study_id, files in pairs if images_digest(folder / str(study_id)) != files]


def _results_key(members, views):
    """What a study's result depends on besides its images, as a hash: the members' metadata, what locates levels."""
    detector = members.detector if isinstance(members.detector, str) else members.detector.__qualname__
    spinenet = _locating_key(members.spinenet, getattr(members.spinenet, "about", None), detector)
    known = [_RESULTS_VERSION, views, _abouts(members), spinenet]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=plain).encode()).hexdigest()[:16]


_RESULTS_VERSION = 3  # to be raised when the same weights give other predictions


def _digest(result):
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _save_result(path, result):
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


def _load_result(path, study_id, key_of, members):
    """What _save_result wrote; None where there is none, it is damaged (which is printed), or other weights made it.

    key_of: study_id -> what the result must have been made of; members: the names that it may have predictions of.
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
    """Raise ValueError where a dict is not what _result makes: whatever it holds goes into the submission."""
    kinds = {"predictions": dict, "levels": list, "problems": list, "dropped": list, "files": str}
    for name, kind in kinds.items():
        if not isinstance(result.get(name), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    if not all(isinstance(text, str) for text in result["problems"] + result["dropped"]):
        raise ValueError("problems or dropped are no texts")
    if not all(_is_number(value) for name, value in result.items() if name.endswith("_s") or name == "seconds"):
        raise ValueError("seconds are no numbers")
    for member, values in result["predictions"].items():
        if member not in members:
            raise ValueError(f"predictions of {member}, which is no member here")
        if not _are_probabilities(values):
            raise ValueError(f"predictions of {member} are no probabilities of {len(CONDITIONS)} x {len(LEVELS)} rows")
    if len(result["levels"]) > len(LEVELS):
        raise ValueError(f"{len(result['levels'])} levels")
    numbers = set(LEVEL_TABLE_COLUMNS) - {"study_id", "level", "source"}
    for row in result["levels"]:
        if not (
            isinstance(row, dict)
            and set(row) == set(LEVEL_TABLE_COLUMNS)
            and row["study_id"] == study_id
            and row["level"] in LEVELS
            and isinstance(row["source"], str)
            and set(row["source"].split("+")) <= {*SOURCES, ""}
            and all(_is_number(row[name]) for name in numbers)
        ):
            raise ValueError("a level is no box")


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


def _result(prepared, predictions, problems, key, extra):
    return {
        "key": key,
        "predictions": {m: np.where(np.isfinite(p), p, -1) for m, p in predictions.items()},
        "levels": boxes_to_table(prepared.study.study_id, prepared.boxes or []).to_dict("records"),
        "problems": problems,
        **{f"{step}_s": round(seconds, 3) for step, seconds in prepared.seconds.items()},
        **extra,
    }


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
    results = {i: _load_result(path, i, key_of, _abouts(members)) for i, path in saved.items()}
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
    counts = {m: max(len(_views(about, views)) for about in abouts) for m, abouts in _abouts(members).items()}
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
        wanted = [scope for scope in ("level", "study") if scope in schedule.choice]
        try:
            key_of(study_id)  # before reading: files that change meanwhile are read again by a restart
            with cpu_limit(STUDY_S, stopped):
                prepared = prepare_study(images / str(study_id), jobs[study_id], members, wanted)
        except Exception as error:  # nothing known does this; whoever waits for the study shall not wait in vain
            problem = f"given up ({type(error).__name__}: {error}), every row is the prior"
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
            sentences = prepared.problems + failed + ([failure] if failure else [])
            # What may go better another time is not saved, and does not take the place of what was.
            sound = bool(prepared.study.volumes) and not failure
            sound = sound and not _out_of_memory(sentences) and not _took_too_long(sentences)
            found.append((_result(prepared, predicted, sentences, f"{key} {extra['files']}", extra), sound))
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
        results[study_id] = {"predictions": {}, "levels": [], "problems": [why], "dropped": schedule.dropped()}
    del _STARTED[clock_key]
    return _collect(jobs, results, members, ensemble, folder)


def _passed_over(result, why, files):
    """The result of a study that is not looked at; an earlier one of fewer views or members stands, if there is any."""
    earlier = result or {"predictions": {}, "levels": [], "problems": []}
    why = why if result else f"{why}; every row is the prior"
    return earlier | {"problems": [*earlier["problems"], why], "dropped": [], "files": files}


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
        elif _out_of_memory(prepared.problems):
            _free_memory()
            prepared, _ = prepare(study_id)
        batch.append(prepared)
    return batch, lost_s


def _take(ahead, study_id, schedule):
    """The next Prepared study; one without images, and the reason, where preparing it hangs."""
    try:
        prepared, seconds = ahead.take(PATIENCE_S, max(1.0, schedule.limit_s - schedule.used_s()))
        schedule.note("preparing", max(0.0, seconds - sum(prepared.cutting.values())), 1)
        for member, cutting in prepared.cutting.items():
            schedule.note(f"cutting {member}", cutting, 1)
        return prepared
    except queue.Empty:
        problem = f"given up: not read and located in {PATIENCE_S:.0f} s or before the end, every row is the prior"
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
        alone = there.get("study", np.zeros(by_class.shape, bool)) & (count[number] == 1)
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
                **{f"{step}_s": result.get(f"{step}_s", 0.0) for step in (*STEPS, "predicting")},
                "seconds": result.get("seconds", 0.0),
                "problems": " | ".join(result["problems"]),
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


STEPS = ("reading", "locating", "cropping", *MEMBERS)


def _refuse_lost_members(members, results, stack, folder):
    """Raise RuntimeError (on Kaggle's scoring run: print) for a member that ran and said nothing of any study."""
    for member in _abouts(members):
        ran = [r for r in results.values() if member in r["predictions"]]
        if not ran or np.isfinite(stack[member]).any():
            continue
        reason = next((p for r in ran for p in r["problems"] if p.startswith(f"{member}:")), "no reason given")
        message = f"{member} failed in each of {len(ran)} readable studies ({reason})"
        if not os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
            for study_id in results:  # what failed for this reason must not be found as finished work
                (folder / f"{study_id}.json").unlink(missing_ok=True)
            raise RuntimeError(message)
        print(message)
