"""Studies that kill the process, or its child: a later start passes over them, and loses nothing else."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from stand_in import PRIOR, SAYS, StandIn, die, infer, members, register, result_file, saved, write_studies

from lumbar import in_flight
from lumbar.serve import results

DEADLY = 105
STUDIES = range(100, 112)


def of_its_own(study_id):
    """Probabilities that no other study has."""
    p = SAYS ** (study_id / 100)
    return p / p.sum()


class Many:
    """Twelve studies and one member; a call predicts them in a process of its own."""

    def __init__(self, data):
        self.data, self.level = data, StandIn("level")
        self.level.says = of_its_own
        self.runs = []  # the number of the process that a call has started, in there

    def __call__(self, out, **options):
        """dict study_id -> (rows, problems). Raises ChildDied."""

        def process():
            torch.set_num_threads(1)
            self.runs.append(os.getpid())
            found, log, _ = infer(self.data, members(), out, **{"readers": 3, "batch_studies": 2} | options)
            return {str(i): (rows.tolist(), log.loc[i, "problems"]) for i, rows in found.items()}

        return {int(i): result for i, result in in_flight.run_in_child(process, 60.0).items()}

    def at(self, study_id, do):
        """Do something when the inputs of a study are made; None: nothing any more."""
        self.level.on_prepare = lambda study: do() if do and study.study_id == study_id else None


@pytest.fixture
def many(tmp_path, monkeypatch):
    write_studies(tmp_path, dict.fromkeys(STUDIES, 1))
    found = Many(tmp_path)
    register(monkeypatch, found.level)
    return found


def all_but(found, study_id=DEADLY):
    return {i: result for i, result in found.items() if i != study_id}


def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, words",
    [
        (lambda: kill(signal.SIGKILL), "SIGKILL (out of memory?)"),
        (lambda: os._exit(0), "exit status 0"),
    ],
)
def test_a_study_that_kills_the_process_is_passed_over_at_the_second_start(many, tmp_path, how, words):
    clean, out = many(tmp_path / "clean"), tmp_path / "out"
    many.at(DEADLY, how)
    with pytest.raises(in_flight.ChildDied):
        many(out)
    why = f"the process died while it was at this study (2 times, at last of {words})"
    for _ in range(2):
        found = many(out)
        assert found[DEADLY][1].startswith(why)
        np.testing.assert_allclose(found[DEADLY][0], PRIOR, atol=1e-9)
        assert all_but(found) == all_but(clean)
    assert DEADLY not in saved(out)
    many.at(DEADLY, None)
    # The next start passes over it without a look, until its files change.
    assert many(out)[DEADLY][1].startswith(why)
    (tmp_path / "test_images" / str(DEADLY) / "mended.txt").write_bytes(b"mended")
    assert many(out) == clean and not (out / "in_flight").exists()


@pytest.mark.slow
@pytest.mark.parametrize("readers", [1, 3])
def test_where_there_can_be_no_child_it_is_passed_over_at_the_third_start(many, tmp_path, monkeypatch, readers):
    clean = many(tmp_path / "clean")
    monkeypatch.setattr(sys, "platform", "darwin")  # where forking a process that has threads is not safe
    many.at(DEADLY, die)
    for _ in range(2):
        with pytest.raises(in_flight.ChildDied):
            many(tmp_path / "out", readers=readers)
    found = many(tmp_path / "out", readers=readers)
    assert found[DEADLY][1].startswith("the process died while it was at this study (2 times)")
    assert all_but(found) == all_but(clean)


@pytest.mark.slow
def test_a_study_whose_prediction_kills_the_process_is_passed_over_too(many, tmp_path):
    clean = many(tmp_path / "clean")
    many.level.on_predict = lambda study_ids, views: os._exit(1) if DEADLY in study_ids else None
    with pytest.raises(in_flight.ChildDied):
        many(tmp_path / "out")
    found = many(tmp_path / "out")
    assert "2 times, at last of exit status 1" in found[DEADLY][1]
    assert all_but(found) == all_but(clean)


@pytest.mark.slow
def test_kills_from_outside_cost_no_study(many, tmp_path):
    """Whatever is in flight when somebody kills the process again and again; the parent and its child alike."""
    clean, deaths = many(tmp_path / "clean"), 0

    def kill_the_run():
        os.kill(many.runs[-1], signal.SIGKILL)
        time.sleep(5)

    for number in (101, 104, 107, 110, 111):
        many.at(number, kill_the_run)
        try:  # how far the others were when it was killed is chance: this study may be finished already
            many(tmp_path / "out")
        except in_flight.ChildDied:
            deaths += 1
    assert deaths >= 1
    many.at(0, None)
    assert many(tmp_path / "out") == clean and not (tmp_path / "out" / "in_flight").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_orderly_end_makes_no_suspects(many, tmp_path, number):
    def stop(study_ids, views):
        if 106 in study_ids:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), number)

    many.level.on_predict = stop
    with pytest.raises(in_flight.ChildDied, match="SIGTERM" if number == signal.SIGTERM else "exit status 1"):
        many(tmp_path / "out")
    assert saved(tmp_path / "out") == list(range(100, 106)) and not (tmp_path / "out" / "in_flight").exists()


@pytest.mark.slow
def test_a_passed_over_study_keeps_what_it_had(many, tmp_path):
    """A result of fewer members stands where doing the study again with all of them kills the process."""
    out = tmp_path / "out"
    first, _ = many(out)[DEADLY]
    path = result_file(out, DEADLY)
    result = json.loads(path.read_text())["result"] | {"dropped": ["study: not run"]}
    results.save_result(path, result)
    many.at(DEADLY, lambda: os._exit(1))
    with pytest.raises(in_flight.ChildDied):
        many(out)
    rows, problems = many(out)[DEADLY]
    assert rows == first and "2 times" in problems and "prior" not in problems
