"""Work on a Dask cluster: a scheduler and two workers in processes of their own, of which some die."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import cluster_work
import numpy as np
import pandas as pd
import pytest
import tiny
from test_stages import write_notebook

import utils
from lumbar import cluster
from lumbar.in_flight import InFlight

distributed = pytest.importorskip("distributed")
ROOT = Path(__file__).resolve().parent.parent


# ---- This machine ----


def test_work_of_this_machine_keeps_its_order(tmp_path):
    done = []
    found = cluster.spread(cluster_work.square, [5, 3, 4], tmp_path, workers=2, done=lambda: done.append(1))
    assert list(found.items()) == [(5, 25), (3, 9), (4, 16)] and len(done) == 3


def test_an_error_ends_what_has_not_begun(tmp_path):
    with pytest.raises(KeyError, match="three"):
        cluster.spread(cluster_work.fail_at_three, [3, *range(10, 300)], tmp_path, workers=1)
    assert len(list(tmp_path.iterdir())) < 250


def test_a_scheduler_that_is_not_there_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_S", 0.5)
    with pytest.raises(ValueError, match="SCHEDULER 'tcp://127.0.0.1:9'"):
        cluster.spread(cluster_work.square, [1], tmp_path, scheduler="tcp://127.0.0.1:9")


def test_without_dask_the_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ModuleNotFoundError, match="pip install distributed"):
        cluster.spread(cluster_work.square, [1], tmp_path, scheduler="tcp://127.0.0.1:9")


def test_a_journal_of_some_items_leaves_the_others_alone(tmp_path):
    other = InFlight(tmp_path, "study", key_of=str)
    other.begin(1)
    other.begin(2)
    other._open.clear()  # the process dies
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace(str(os.getpid()), "99999999"))
    assert list(InFlight(tmp_path, "study", key_of=str, items=[2, 3]).suspects) == [2]
    assert list(InFlight(tmp_path, "study", key_of=str).suspects) == [1, 2]


# ---- A cluster ----


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """The file by which a scheduler with two workers, each with a nanny that replaces it, is found."""
    folder = tmp_path_factory.mktemp("cluster")
    file = folder / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = "1"
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    commands = [["dask_scheduler", "--host", "127.0.0.1", "--port", "0", *common]]
    commands.append(["dask_worker", "--nworkers", "2", "--nthreads", "1", "--resources", "GPU=1", *common])
    with open(folder / "log", "w") as log:
        running = [
            subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{command}", *rest],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
            for command, *rest in commands
        ]
        try:
            while not file.is_file() or not file.stat().st_size:
                assert running[0].poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield str(file)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_task_only(scheduler, tmp_path):
    found = cluster.spread(cluster_work.square_or_die_once, range(12), tmp_path, scheduler=scheduler, gpu=True)
    assert found == {item: item * item for item in range(12)}
    assert (tmp_path / "died").exists() and os.getpid() not in {
        int(path.name.split("-")[1]) for path in tmp_path.glob("*-*")
    }


@pytest.mark.slow
def test_what_kills_every_worker_is_passed_over_or_an_error(scheduler, tmp_path):
    found = cluster.spread(
        cluster_work.die_at_three, range(6), tmp_path, scheduler=scheduler, lost=lambda item, why: why
    )
    assert "died" in found[3] and {k: v for k, v in found.items() if k != 3} == {0: 0, 1: 1, 2: 4, 4: 16, 5: 25}
    with pytest.raises(RuntimeError, match="worker after worker died at 3"):
        cluster.spread(cluster_work.die_at_three, [3], tmp_path, scheduler=scheduler)


@pytest.mark.slow
def test_an_error_of_the_work_comes_back_as_it_is(scheduler, tmp_path):
    with pytest.raises(KeyError, match="three"):
        cluster.spread(cluster_work.fail_at_three, range(5), tmp_path, scheduler=scheduler)


@pytest.mark.slow
def test_workers_of_another_version_are_refused(scheduler, tmp_path, monkeypatch):
    (tmp_path / "lumbar").mkdir()
    monkeypatch.setattr(cluster, "__file__", str(tmp_path / "lumbar" / "cluster.py"))  # here, not on the workers
    with pytest.raises(ValueError, match="run another version of the kit"):
        cluster.spread(cluster_work.square, [1], tmp_path, scheduler=scheduler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A competition folder with three small test studies."""
    root = tmp_path_factory.mktemp("data")
    for study_id in (7, 8, 9):
        tiny.write_study(root / "test_images" / str(study_id), seed=study_id, slices=(5, 6), pixels=(64, 48))
    rows = [(study_id, s, text) for study_id in (7, 8, 9) for s, text in tiny.SERIES.items()]
    table = pd.DataFrame(rows, columns=["study_id", "series_id", "series_description"])
    table.to_csv(root / "test_series_descriptions.csv", index=False)
    return root


@pytest.mark.slow
def test_studies_are_the_same_on_a_cluster_of_which_a_worker_dies(scheduler, data, tmp_path_factory):
    weights = tiny.write_members(tmp_path_factory.mktemp("weights"), random_spinenet=True)
    members = utils.load_members([weights], ["level"], device="cpu")
    ensemble, results = utils.equal_ensemble(list(members.weights)), []
    for place in ("", scheduler):
        out = tmp_path_factory.mktemp("out")
        timer = threading.Timer(1.0, _kill_a_worker, [place]) if place else None
        if timer:
            timer.start()
        series = utils.preprocess_studies(data, "test", out / "volumes", scheduler=place)
        paths = utils.study_paths(out)
        levels, vertebrae, _ = utils.locate_studies(paths, members.placement, out / "located", scheduler=place)
        submission, log, _, _ = utils.infer_studies(
            data, "test", members, ensemble, out, batch_studies=1, scheduler=place
        )
        if timer:
            timer.join()
        results.append((series, levels, vertebrae, submission, log[["study_id", "members", "rows_from", "problems"]]))
    for here, there in zip(*results, strict=True):
        pd.testing.assert_frame_equal(here, there, rtol=0, atol=1e-5)
    assert len(results[1][3]) == 75 and (results[1][4]["rows_from"] == "ensemble 25").all()
    assert np.ptp(results[1][3]["severe"]) > 1e-3


def _kill_a_worker(scheduler):
    with cluster.connect(scheduler) as client:
        pids = list(client.run(os.getpid).values())
    os.kill(pids[0], 9)


@pytest.mark.slow
def test_stages_run_on_a_cluster_one_after_another(scheduler, tmp_path, capfd):
    body = """
import json, os, pathlib
folder = pathlib.Path(OUT) / pathlib.Path(OUT).name
print("hello from a stage")
(pathlib.Path(OUT) / f"{len(os.listdir(OUT))}.txt").write_text(str(os.getppid()))
"""
    (tmp_path / "kit" / "notebooks").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    write_notebook(tmp_path / "kit" / "notebooks" / "a.ipynb", body)
    stages = [
        {
            "name": name,
            "notebook": tmp_path / "kit" / "notebooks" / "a.ipynb",
            "parameters": {"OUT": str(tmp_path / "out"), "WAIT": 0.0},
            "after": after,
            "threads": 1,
            "gpu": bool(after),
        }
        for name, after in (("01_a", []), ("02_b", ["01_a"]))
    ]
    seconds = utils.run_stages(stages, tmp_path / "runs", scheduler=scheduler)
    assert capfd.readouterr().out.count("hello from a stage") == 2
    assert list(seconds) == ["01_a", "02_b"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.txt", "1.txt"]
    broken = [{**stages[0], "name": "03_c", "parameters": {"OUT": str(tmp_path / "nowhere"), "WAIT": 0.0}}]
    with pytest.raises(RuntimeError, match="failed; see"):
        utils.run_stages(broken, tmp_path / "runs", scheduler=scheduler)
