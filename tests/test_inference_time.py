"""The limit of time in inference: what is dropped, in which order, and what a later start does again."""

import queue
import threading
import time

import pandas as pd
import pytest
import torch
from stand_in import Clock, StandIn, infer, members, readers, register, result_file, saved, write_studies

from lumbar.serve import read_ahead
from lumbar.serve.read_ahead import ReadAhead
from lumbar.serve.schedule import Schedule

# Seconds of each member for a study and view.
COSTS_S = {"yolo": 40.0, "level": 20.0, "study": 10.0}
TWO = [{}, {"mirror": True}]


class Timed:
    """Thirty studies and three stand-ins of known cost; a call predicts them on a clock that only they move."""

    def __init__(self, data, stand_ins):
        self.data, self.members, self.clock = data, stand_ins, Clock()
        for name, member in stand_ins.items():
            member.on_predict = lambda study_ids, views, cost_s=COSTS_S[name]: self.spend(
                cost_s * len(study_ids) * views
            )

    def spend(self, seconds):
        self.clock.now += seconds

    def prepared(self):
        """The studies that were done since this was asked last, in order."""
        found = list(self.members["study"].prepared)
        found = list(dict.fromkeys(found + [i for m in self.members.values() for i in m.prepared]))
        for member in self.members.values():
            member.prepared.clear()
        return found

    def __call__(self, hours, out="out", **options):
        """(hours used, the log)."""
        before = self.clock.now
        loaded = members(*COSTS_S, views={"yolo": TWO, "level": TWO})
        options = {"reserve": 0.0, "batch_studies": 1, "clock": self.clock} | options
        found, log, _ = infer(self.data, loaded, self.data / out, hours=hours, **options)
        assert len(found) == 30
        return (self.clock.now - before) / 3600, log.fillna("")


@pytest.fixture
def timed(tmp_path, monkeypatch):
    write_studies(tmp_path, dict.fromkeys(range(100, 130), 1))
    stand_ins = {name: StandIn(name) for name in COSTS_S}
    stand_ins["yolo"].conditions = [0]  # the only one that has something to say of some rows alone
    register(monkeypatch, *stand_ins.values())
    return Timed(tmp_path, stand_ins)


def test_with_enough_time_nothing_is_dropped(timed):
    used, log = timed(9.0)
    assert used == pytest.approx(30 * 130 / 3600) and (log["dropped"] == "").all()
    assert (log["members"] == "level study").all() and (log["partial"] == "yolo").all()
    no_limit, log = timed(0.0, out="again")
    assert no_limit == used and (log["dropped"] == "").all()


def test_views_go_first(timed):
    used, log = timed(0.8)  # everything: 1.08 h; one view: 0.58 h
    assert 0.5 < used <= 0.8
    dropped = log[log["dropped"] != ""]
    assert len(dropped) and dropped["dropped"].str.contains("yolo: 1 of 2 views").all()
    assert (log["partial"] == "yolo").all() and not log["dropped"].str.contains("not run").any()
    assert dropped["dropped"].str.contains(r"the end would come after [\d.]+ h, the limit is 0.8 h").all()
    assert (log["dropped"] == "").any()  # what time is left is used


def test_then_members_and_those_of_most_weight_stay_that_are_in_time(timed):
    # One view of each takes 0.58 h, yolo and level 0.5 h, yolo (.65) and study (.10) 0.42 h, yolo alone 0.33 h; of the
    # limit the first batch, of which nothing is known, has taken a part.
    used, log = timed(0.42)
    assert 0.35 < used <= 0.42
    without = {member: log["dropped"].str.contains(f"{member}: not run") for member in ("yolo", "level", "study")}
    assert without["level"].sum() > 20 and 0 < without["study"].sum() < 20 and not without["yolo"].any()
    assert (log["partial"] == "yolo").all()


def test_members_are_lost_before_studies(timed):
    used, log = timed(0.25)  # the detectors, of most weight, would take 0.33 h; level and study 0.25 h, level 0.17 h
    assert used <= 0.25 and (log["prior_rows"] < 25).all()
    assert log["dropped"].str.contains("yolo: not run").sum() > 20
    assert log["members"].str.contains("level").all()


def test_at_the_very_end_only_the_prior(timed):
    used, log = timed(0.09)  # 0.04 h for the first batch, and the fastest member alone takes 0.08 h for the others
    assert used <= 0.09
    late = log[log["problems"].str.contains("no time left")]
    assert 5 < len(late) < 25 and (late["prior_rows"] == 25).all()
    assert late["problems"].str.contains("0.09 h have passed|of 0.09 h").all()
    assert (log["prior_rows"] < 25).sum() == 30 - len(late)


def test_the_reserve_stays(timed):
    used, _ = timed(0.9, reserve=0.3)
    assert used <= 0.6


@pytest.mark.slow
def test_the_limit_runs_on_in_this_process_and_anew_in_another(timed):
    real, done = timed.members["yolo"].on_predict, []

    def killed(study_ids, views):
        if len(done) == 10:
            raise KeyboardInterrupt
        done.extend(study_ids)
        real(study_ids, views)

    timed.members["yolo"].on_predict = killed
    with pytest.raises(KeyboardInterrupt):
        timed(9.0)  # uses .36 h
    timed.members["yolo"].on_predict = real
    assert len(saved(timed.data / "out")) == 10
    used, log = timed(0.8)  # .44 h are left for 20 studies that take .72 h
    assert used <= 0.45 and log["dropped"].str.contains("1 of 2 views").any()
    assert (log["dropped"].iloc[:10] == "").all()  # finished before, and counted
    again, log = timed(0.8, out="another")  # a finished run has ended its clock, another folder has its own
    assert again == pytest.approx(0.8, abs=0.05)


def test_reading_that_is_too_slow_costs_no_member():
    clock = Clock()
    schedule = Schedule({"yolo": 2, "level": 1}, {"yolo": 0.6, "level": 0.4}, 1.0, 0.0, 2, clock)
    for member, seconds in (("yolo", 2.0), ("level", 1.0), ("preparing", 30.0)):
        schedule.note(member, seconds, 1)
    assert schedule.plan(1000) == {"yolo": 2, "level": 1}


def test_crops_that_are_too_slow_cost_the_member_they_are_for():
    clock = Clock()
    weights = {"yolo": 0.6, "level": 0.3, "study": 0.1}
    schedule = Schedule(dict.fromkeys(weights, 2), weights, 1.0, 0.0, 2, clock)
    for member, seconds in (("yolo", 2.0), ("preparing", 4.0), ("preparing level", 2.0), ("preparing study", 60.0)):
        schedule.note(member, seconds, 1)
    assert schedule.plan(1000) == {"yolo": 1, "level": 1}  # 3 s a study, and 33 with the crops of study
    assert schedule.plan(100) == {"yolo": 2, "level": 2, "study": 2}


# ---- What is short is done again ----


def test_waiting_for_a_study_that_hangs_is_no_pace(timed):
    hanging, started = threading.Event(), []

    def waited():
        """900 s, once: as soon as another thread has taken the place of the one that hangs."""
        if len(readers()) == 2 or started:
            return 0.0
        started.append(True)
        return 900.0

    def hang(study):
        if study.study_id == 106:
            timed.clock.waited = waited
            hanging.wait(30)

    timed.members["level"].on_prepare = hang
    used, log = timed(2.0, readers=2, patience_s=0.3)  # 1.08 h of work and .25 h of waiting
    hanging.set()
    assert "given up" in log.loc[106, "problems"]
    assert used > 1.25 and (log["dropped"] == "").all()


def test_what_was_short_of_time_is_done_again_with_everything(timed):
    _, first = timed(0.8)
    short = set(first.index[first["dropped"] != ""])
    timed.prepared()
    used, second = timed(0.3)  # enough for some of them
    done = short - set(second.index[second["dropped"] != ""])
    assert 0 < len(done) < len(short) and used <= 0.3
    assert done <= set(timed.prepared()) <= short
    assert (second.loc[second["dropped"] != "", "partial"] == "yolo").all()  # the old result stands
    used, third = timed(9.0)
    assert (third["dropped"] == "").all() and set(timed.prepared()) == short - done
    assert timed(9.0)[0] == 0 and not timed.prepared()


def test_what_was_short_of_time_stands_where_doing_it_again_fails(timed):
    _, first = timed(0.8)
    short = first["dropped"] != ""
    kept = {i: result_file(timed.data / "out", i).read_text() for i in saved(timed.data / "out")}
    for name in ("level", "study"):
        timed.members[name].fails = lambda study_id: torch.OutOfMemoryError("CUDA out of memory")
    _, second = timed(9.0)
    columns = ["members", "partial", "dropped", "problems"]
    pd.testing.assert_frame_equal(first.loc[short, columns], second.loc[short, columns])
    assert kept == {i: result_file(timed.data / "out", i).read_text() for i in saved(timed.data / "out")}


def test_those_without_a_result_come_before_those_that_were_short(timed):
    _, first = timed(0.09)  # some late, the others short or whole
    late = set(first.index[first["problems"].str.contains("no time left")])
    short = set(first.index[first["dropped"] != ""]) - late
    assert late and short
    timed.prepared()
    _, second = timed(9.0, readers=1)  # several start side by side, in any order
    assert (second["dropped"] == "").all() and (second["prior_rows"] < 25).all()
    done = timed.prepared()
    assert set(done) == late | short and set(done[: len(late)]) == late


# ---- Reading ahead ----


def test_patience_begins_with_the_work():
    ahead = ReadAhead([1], lambda job, stopped: job + 1, 0, 1)
    threading.Timer(0.4, ahead._start).start()
    assert ahead.take(0.1) == 2
    waiting = ReadAhead([1], lambda job, stopped: job, 0, 1)
    with pytest.raises(queue.Empty):
        waiting.take(10.0, 0.1)
    waiting.close(1)
    ahead.close(1)


def test_studies_that_hang_together_are_given_up_together():
    hanging = threading.Event()
    ahead = ReadAhead([1, 2, 3, 4, 5], lambda job, stopped: hanging.wait(30 if job < 5 else 0), 4, 5)
    started = time.monotonic()
    for _ in range(4):
        with pytest.raises(queue.Empty):
            ahead.take(0.5)
    ahead.take(5.0)
    assert time.monotonic() - started < 1.5
    hanging.set()
    ahead.close(9)


def test_threads_that_nobody_closed_are_waited_for_when_the_process_exits():
    begun, ended = threading.Event(), []

    def work(job, stopped):
        begun.set()
        while not stopped():
            time.sleep(0.001)
        time.sleep(0.05)  # a last call into PyTorch
        ended.append(job)

    ahead = ReadAhead([1, 2], work, 1, 2)
    with pytest.raises(queue.Empty):  # the first is given up
        ahead.take(0.02)
    with pytest.raises(queue.Empty):
        ahead.take(9.0, 0.02)
    assert begun.is_set() and not ended
    read_ahead._close_all()
    assert sorted(ended) == [1, 2]
