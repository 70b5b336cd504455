"""Stand-ins for what inference is given: a member after the contract, a clock, studies of one tiny real image each."""

import os
import tempfile
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

import phantom
import utils
from lumbar.grade.ensemble import default_ensemble
from lumbar.grade.member import Member, Prediction, Weights, silence
from lumbar.grade.registry import MEMBERS
from lumbar.problems import Problem
from lumbar.serve.members import Members
from lumbar.spine.placement import Placement
from phantom.scanner import SeriesPlan

ROOT = Path(__file__).resolve().parent.parent
PRIOR = np.random.default_rng(0).dirichlet((5, 2, 1), (5, 5))
SAYS = np.array([0.2, 0.3, 0.5])


class StandIn(Member):
    """A member in the place of a registered one that says the same of every study.

    prepared: ids of the studies whose inputs were made, in that order; asked: how many views each call may use. The
    tests change what follows: says(study_id) -> probabilities; fails(study_id) -> an exception that costs it the study,
    or None; on_prepare(study), in the thread that makes the inputs; on_predict(list of ids, number of views).
    """

    def __init__(self, name, conditions=slice(None)):
        stood_for = MEMBERS[name]
        self.name, self.title, self.share = name, stood_for.title, stood_for.share
        self.parts, self.whole_study = stood_for.parts, stood_for.whole_study
        self.conditions, self.prepared, self.asked = conditions, [], []
        self.says, self.fails = lambda study_id: SAYS, lambda study_id: None
        self.on_prepare, self.on_predict = lambda study: None, lambda study_ids, views: None

    def read_about(self, path):
        return {}

    def load(self, path, device):
        return Weights(path.stem, None, {})

    def prepare(self, study, boxes, weights, device):
        self.prepared.append(study.study_id)
        self.on_prepare(study)
        return study

    def predict(self, inputs, weights, most_views, device):
        self.asked.append(len(self.views(weights[0], most_views)))
        self.on_predict([study.study_id for study in inputs], self.asked[-1])
        return [self._answer(study.study_id) for study in inputs]

    def _answer(self, study_id):
        p, error = silence(), self.fails(study_id)
        if error:
            return Prediction(p, (Problem.of(error, f"{self.name}: ", self.name),))
        p[self.conditions] = self.says(study_id)
        return Prediction(p)


def register(monkeypatch, *stand_ins):
    """Put the stand-ins into the registry until the test ends."""
    for member in stand_ins:
        monkeypatch.setitem(MEMBERS, member.name, member)


def see_nothing(volume):
    """A detector of vertebrae that finds none: the levels come from the mean layout."""
    return []


@cache
def level_prior():
    return utils.load_spinenet(ROOT / "weights" / "spinenet_phantom.safetensors").about["prior"]


def members(*names, views=None, detector=see_nothing):
    """Members with one fold of each of these stand-ins, `level` alone by default; views: dict name -> list of views."""
    weights = {m: [Weights(f"{m}_0", None, {"views": (views or {}).get(m, [{}])})] for m in names or ["level"]}
    return Members(Placement.of(None, detector, level_prior()), weights, PRIOR.copy())


@cache
def _image(number):
    """The bytes of slice `number` (from 1) of a sagittal T1 series of 8 x 8 pixels."""
    plan = SeriesPlan(
        description="Sagittal T1",
        contrast="T1",
        position_mm=np.array([[-4.0 * number, 0.0, 0.0]]),
        row_cosine=np.array([[0.0, 1.0, 0.0]]),
        column_cosine=np.array([[0.0, 0.0, -1.0]]),
        spacing_mm=(4.0, 4.0),
        shape=(8, 8),
        thickness_mm=4.0,
        gap_mm=4.0,
        instances=np.array([number]),
        series_id=11,
    )
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        about = {"study_id": 1, "number": 1, "patient": "Tiny", "rng": rng, "anomalies": "none"}
        phantom.write_series(Path(folder), plan, rng.random((1, 8, 8)), **about)
        return next(Path(folder).glob("*.dcm")).read_bytes()


def write_studies(data, series, slices=1):
    """Studies of one series each, and their table; series: dict study_id -> series_id; slices: files of each."""
    rows = [(study_id, series_id, "Sagittal T1") for study_id, series_id in series.items()]
    table = pd.DataFrame(rows, columns=["study_id", "series_id", "series_description"])
    table.to_csv(data / "test_series_descriptions.csv", index=False)
    for study_id, series_id in series.items():
        folder = data / "test_images" / str(study_id) / str(series_id)
        folder.mkdir(parents=True)
        for number in range(1, slices + 1):
            (folder / f"{number}.dcm").write_bytes(_image(number))


def infer(data, loaded, out, **options):
    """infer_studies: (dict study_id -> (5, 5, 3), the log by study, the members' tables)."""
    options = {"patience_s": 20.0} | options  # what hangs by mistake ends the test
    submission, log, tables, _ = utils.infer_studies(data, "test", loaded, default_ensemble(), out, **options)
    ids, probabilities = utils.from_submission(submission)
    assert np.abs(probabilities.sum(-1) - 1).max() < 1e-12
    return dict(zip(ids, probabilities, strict=True)), log.set_index("study_id"), tables


class Clock:
    """Seconds that pass only where a test says so, and not for the threads that read ahead: theirs would be chance.

    waited: a function without arguments that gives the seconds that have passed since it was asked last.
    """

    def __init__(self):
        self.now, self.waited = 1000.0, lambda: 0.0

    def __call__(self):
        if threading.current_thread() is not threading.main_thread():
            return 0.0
        self.now += self.waited()
        return self.now


def readers():
    """The threads of this process that prepare studies."""
    return [thread for thread in threading.enumerate() if thread.name.endswith("(_run)")]


def result_file(out, study_id):
    return Path(out) / "studies" / f"{study_id}.json"


def saved(out):
    """The studies that have a file with a result."""
    return sorted(int(path.stem) for path in (Path(out) / "studies").glob("*.json"))


def die():
    os._exit(3)
