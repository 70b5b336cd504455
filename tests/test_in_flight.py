"""The journal of what a process is at, and children that die in its place."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

import utils
from lumbar.data import preprocess
from lumbar.data.volume import Study, Volume
from lumbar.in_flight import ChildDied, InFlight, run_in_child


def journal(folder, key_of=lambda item: "files", is_done=lambda item: False):
    return InFlight(folder, "study", key_of, is_done)


def died_at(folder, *items, child=False):
    """A process that dies while it is at these items."""

    def process():
        own = journal(folder)
        for item in items:
            own.begin(item, child)
        os._exit(9)

    with pytest.raises(ChildDied, match="exit status 9"):
        run_in_child(process, 30.0)


def test_what_was_in_flight_when_a_process_died_is_suspect_and_not_guilty(tmp_path):
    died_at(tmp_path / "at", 1, 2, 3)
    found = journal(tmp_path / "at", is_done=lambda item: item == 2)
    assert list(found.suspects) == [1, 3] and not found.passed_over
    assert list(journal(tmp_path / "at").suspects) == [1, 3]  # asked twice, no one died meanwhile
    for item in (1, 3):
        found.begin(item)
        found.end(item)
    found.close()
    assert not (tmp_path / "at").exists()


def test_who_dies_alone_and_not_for_the_first_time_is_guilty(tmp_path):
    died_at(tmp_path / "at", 1, 2)
    died_at(tmp_path / "at", 2)
    found = journal(tmp_path / "at")
    assert list(found.suspects) == [1] and list(found.passed_over) == [2]
    assert "study (2 times); passed over" in found.passed_over[2]
    died_at(tmp_path / "at", 5)  # alone, but once
    assert list(journal(tmp_path / "at").suspects) == [1, 5]
    assert not journal(tmp_path / "at", lambda item: "other files").passed_over


def test_a_parent_that_is_killed_beside_its_child_needs_three_deaths(tmp_path):
    died_at(tmp_path / "at", 1, 2, 3)
    for times in (2, 3):
        died_at(tmp_path / "at", 3, child=True)
        found = journal(tmp_path / "at")
        assert list(found.suspects) == [1, 2, 3] and found.suspects[3]["deaths"] == times  # the often killed one last
    died_at(tmp_path / "at", 3, child=True)
    assert "(4 times)" in journal(tmp_path / "at").passed_over[3]


def test_condemned_stays_condemned_until_its_files_change(tmp_path):
    died_at(tmp_path / "at", 7)
    found = journal(tmp_path / "at")
    why = found.condemn(7, "SIGSEGV")
    found.close()
    assert why.startswith("the process died while it was at this study (2 times, at last of SIGSEGV)")
    again = journal(tmp_path / "at")
    assert again.passed_over == {7: why} and not again.suspects
    changed = journal(tmp_path / "at", lambda item: "other files")
    assert not changed.passed_over and not changed.suspects
    assert not list((tmp_path / "at").iterdir())


def test_items_that_are_not_ended_are_as_they_were(tmp_path):
    died_at(tmp_path / "at", 1, 2)
    with journal(tmp_path / "at") as found:
        found.begin(1)
        found.begin(9)
    after = journal(tmp_path / "at")
    assert {item: entry["deaths"] for item, entry in after.suspects.items()} == {1: 1, 2: 1}


def test_a_process_that_still_runs_is_left_alone(tmp_path):
    code = "import sys; from lumbar.in_flight import InFlight; j = InFlight(sys.argv[1], 'study', str); j.begin(4)"
    code += "; print('at it', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "at")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "at it\n"
        assert not journal(tmp_path / "at", str).suspects
        other.kill()
        other.stdout.read()
        time.sleep(0.05)  # a zombie by now: nobody has asked for its status
        assert list(journal(tmp_path / "at", str).suspects) == [4]


def test_a_later_process_of_the_same_number_is_another(tmp_path):
    found = journal(tmp_path / "at")
    found.begin(1)
    assert not journal(tmp_path / "at").suspects  # this process itself
    path = tmp_path / "at" / "1.json"
    entry = json.loads(path.read_text())
    entry["process"]["began"] = "another boot 12345"
    path.write_text(json.dumps(entry))
    assert list(journal(tmp_path / "at").suspects) == [1]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"deaths": "x"}', "[" * 100_000, "\udcff"])
def test_foreign_files_are_no_entries(tmp_path, text):
    (tmp_path / "1.json").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "2.json").mkdir()
    (tmp_path / "3.json").symlink_to("/dev/zero")
    found = journal(tmp_path)
    assert not found.suspects and not found.passed_over


def test_what_a_dying_process_left_half_written_goes(tmp_path):
    (tmp_path / "at").mkdir()
    (tmp_path / "at" / "3.json.999999999.part").write_text("{")
    with journal(tmp_path / "at") as found:
        found.begin(1)
        found.end(1)
    assert not (tmp_path / "at").exists()


def test_a_folder_that_cannot_be_written_costs_the_journal_only(tmp_path, capsys):
    (tmp_path / "at").write_text("a file")
    with journal(tmp_path / "at") as found:
        for item in (1, 2):
            found.begin(item)
            found.end(item)
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_sigterm_is_handled_only_where_nobody_else_does(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with journal(tmp_path / "at"):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with journal(tmp_path / "at"):
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- Children ----


def test_a_child_returns_what_it_made(capsys):
    assert run_in_child(lambda: [np.float32(0.5), np.arange(3), print("lost")], 30.0) == [0.5, [0, 1, 2], None]
    assert len(run_in_child(lambda: "x" * 3_000_000, 30.0)) == 3_000_000  # more than a pipe holds
    assert capsys.readouterr().out == ""


def test_what_a_child_raises_is_told():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        run_in_child(lambda: 1 / 0, 30.0)
    with pytest.raises(ChildDied, match="exit status 1"):
        run_in_child(lambda: sys.exit(0), 30.0)
    with pytest.raises(ChildDied, match="SIGKILL .out of memory"):
        run_in_child(lambda: os.kill(os.getpid(), signal.SIGKILL), 30.0)


@pytest.mark.slow
def test_a_child_that_hangs_is_killed(tmp_path):
    def hang():
        (tmp_path / "number").write_text(str(os.getpid()))
        time.sleep(60)

    with pytest.raises(TimeoutError):
        run_in_child(hang, 1.0)
    with pytest.raises(ProcessLookupError):  # gone, not even a zombie (other tests' children may be there)
        os.kill(int((tmp_path / "number").read_text()), 0)


# ---- Preprocessing ----


DEADLY = 4


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(out) reads studies 1 to 6 in a process of its own: rows of series.csv."""
    rows = [(study_id, 10 * study_id, "Sagittal T1") for study_id in range(1, 7)]
    table = pd.DataFrame(rows, columns=["study_id", "series_id", "series_description"])
    table.to_csv(tmp_path / "train_series_descriptions.csv", index=False)
    for study_id in range(1, 7):
        (tmp_path / "train_images" / str(study_id)).mkdir(parents=True)

    def read_study(folder, descriptions):
        study_id = int(folder.name)
        with open(tmp_path / "reads", "a") as file:
            file.write(f"{study_id} ")
        if study_id == DEADLY and start.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        array = np.random.default_rng(study_id).random((2, 4, 4)).astype(np.float32)
        volume = Volume(array, np.eye(4), study_id, 10 * study_id, "Sagittal T1", 0, np.arange(2) + 1)
        return Study(study_id, [volume])

    def process(out):
        table = utils.preprocess_studies(tmp_path, "train", out, workers=3)
        return json.loads(table.to_json(orient="records"))

    def start(out):
        (tmp_path / "reads").write_text("")
        return run_in_child(lambda: process(out), 60.0)

    monkeypatch.setattr(preprocess, "read_study", read_study)
    start.deadly = False
    start.reads = lambda: sorted(map(int, (tmp_path / "reads").read_text().split()))
    return start


@pytest.mark.slow
@pytest.mark.parametrize("child", [True, False])
def test_a_study_that_kills_preprocessing_is_passed_over(start, tmp_path, monkeypatch, child):
    clean = start(tmp_path / "clean")
    out, start.deadly = tmp_path / "out", True
    monkeypatch.setattr(preprocess, "can_run_in_child", lambda: child)
    for _ in range(1 if child else 2):
        with pytest.raises(ChildDied):
            start(out)
    found = start(out)
    assert found == start(out) and start.reads() == []
    (passed_over,) = [row for row in found if row["study_id"] == DEADLY]
    assert passed_over["problem"].startswith(f"study {DEADLY}: the process died while it was at this study (2 times")
    assert [row for row in found if row["study_id"] != DEADLY] == [row for row in clean if row["study_id"] != DEADLY]
    assert utils.load_study(out / f"{DEADLY}.safetensors").volumes == []  # later stages find a study without images
    start.deadly = False
    (tmp_path / "train_images" / str(DEADLY) / "1.dcm").write_bytes(b"mended")
    assert start(out) == clean and start.reads() == [DEADLY]
    assert not (out / "in_flight").exists()
