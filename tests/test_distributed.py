"""Training by several processes: what two make of it, how they start, fail and end, and the loaders' memory."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import launched
import numpy as np
import pandas as pd
import pytest
import torch
from test_classifiers import predict_dataset

import utils
from lumbar.grade import distributed
from lumbar.grade.classifier import load_classifier
from lumbar.grade.trainer import TrainConfig

CROP = utils.Crop("level", (16, 16, 32), (32.0, 64.0, 48.0))
CONFIG = TrainConfig(
    backbone="tiny",
    epochs=2,
    batch=2,
    accumulate=4,
    mix=0.5,
    learning_rate=2e-3,
    weight_decay=0.01,
    dropout=0.1,
    strength=0.3,
    ema=0.8,
)


def dataset(folder, first, count):
    """A CropDataset whose crops lie in its cache: a bright left half for left disease, right for right."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(first)
    grades = rng.integers(0, 3, (count, 5, 5))
    grades[0, 3, 1] = -1
    shape = utils.margin_shape(CROP.shape)
    for number in range(count):
        crops = 0.1 * rng.standard_normal((5, 3, *shape)).astype(np.float16)
        crops[..., shape[2] // 2 :] += grades[number, 3][:, None, None, None, None].astype(np.float16)
        np.save(folder / f"{first + number}.npy", crops)
    levels = pd.DataFrame(columns=["study_id", "level"])
    return utils.CropDataset({}, range(first, first + count), grades, levels, CROP, folder)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, capfd):
    train, valid = dataset(tmp_path / "cache", 100, 4), dataset(tmp_path / "cache", 200, 3)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = utils.train_classifier(tmp_path / "one", "level_0", train, valid, CONFIG)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    environment = dict(os.environ)
    capfd.readouterr()
    two = utils.train_classifier(
        tmp_path / "two", "level_0", train, valid, CONFIG, about={"fold": 0}, device="cpu", processes=2
    )
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert environment.items() <= os.environ.items()
    bar = capfd.readouterr().err
    assert bar.count("0/2 [") == 1, "the first process shows its progress, and only that one"
    # They draw other random numbers, so they agree as seeds of one process do, which differ by up to 0.2 here.
    for column in ("loss", "total"):
        np.testing.assert_allclose(two[column], one[column], atol=0.25, err_msg=column)
    # The weights that the first process kept give the scores that both found: they have stayed in step.
    model, about = load_classifier(tmp_path / "two" / "level_0.safetensors")
    assert about["fold"] == 0 and about["crop"] == CROP
    scores = utils.score_arrays(valid.grades, predict_dataset([model], valid))
    assert scores["total"] == pytest.approx(two["total"][about["epoch"] - 1], rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["level_0.safetensors", "level_0_history.csv"]


def is_running(pid):
    """Whether there is such a process, other than one that has ended and waits to be fetched."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(found, seconds=120):
    """found() as soon as it is something."""
    end = time.monotonic() + seconds
    while not (items := found()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return items


def notes(folder):
    """The numbers that processes have left in a folder, see launched.wait."""
    return [int(text) for path in Path(folder).iterdir() if (text := path.read_text())]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="one of 2 processes failed. Its last lines:(.|\n)*no l1_l2 for study 103"):
        distributed.launch(launched.fail_on_one, (tmp_path,), 2)
    assert not any(map(is_running, notes(tmp_path)))


class TimeIsUp(BaseException):
    """As stages.time_limit stops a training."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("how", ["time is up", "Ctrl-C"])
def test_what_stops_the_launch_stops_its_processes(tmp_path, how):
    def ring(*_):
        raise TimeIsUp

    number, expected = (signal.SIGALRM, TimeIsUp) if how == "time is up" else (signal.SIGINT, KeyboardInterrupt)
    before = signal.signal(number, ring if how == "time is up" else signal.default_int_handler)
    thread = threading.Thread(target=lambda: (wait_for(lambda: notes(tmp_path)), os.kill(os.getpid(), number)))
    try:
        thread.start()
        with pytest.raises(expected):
            distributed.launch(launched.wait, (tmp_path,), 1)
    finally:
        thread.join()
        signal.signal(number, before)
    assert not is_running(*notes(tmp_path))


LAUNCHER = """
import sys
sys.path[:0] = sys.argv[1:3]
from launched import wait
from lumbar.grade.distributed import launch

if __name__ == "__main__":
    launch(wait, (sys.argv[3],), 1)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_processes_end_with_the_one_that_started_them(tmp_path):
    script, here, folder = tmp_path / "launcher.py", Path(__file__).resolve().parent, tmp_path / "notes"
    script.write_text(LAUNCHER)
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(here.parent), str(here), str(folder)])
    try:
        (pid,) = wait_for(lambda: notes(folder))
        assert is_running(pid)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not is_running(pid))


def test_how_many_processes(monkeypatch):
    assert (
        distributed.processes_for(0, "cpu") == distributed.processes_for(1, "cpu") == 1
        and distributed.processes_for(3, "cpu") == 3
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.processes_for(0, "auto") == distributed.processes_for(2, "cuda") == 2
    assert (
        distributed.processes_for(0, "1") == distributed.processes_for(0, "cuda:1") == 1
        and distributed.processes_for(4, "cpu") == 4
    )
    for processes, device in ((-1, "auto"), (3, "auto"), (2, "1"), (2, "cuda:0")):
        with pytest.raises(ValueError, match="PROCESSES"):
            distributed.processes_for(processes, device)


def test_too_little_shared_memory_is_said_before_loaders_start(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "_SHARED_MEMORY", str(tmp_path))
    room = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 0, 0, 0, 0, 255))  # Docker's 64 MB
    monkeypatch.setattr(distributed.os, "statvfs", lambda path: room)
    with pytest.raises(
        RuntimeError, match="WORKERS: 4 loader processes need at least 400 MB .* 67 MB free: set WORKERS"
    ):
        with utils.loader_memory(4, 100_000_000):
            raise AssertionError("started")
    for workers, batch_bytes in ((0, 100_000_000), (4, 10_000_000)):
        with utils.loader_memory(workers, batch_bytes):
            pass


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to open shared memory object </torch_29_3> in read/write mode: Too many open files (24)",
        "unable to write to file </torch_18692_1954506624>: No space left on device (28)",
        "one of 2 processes failed. Its last lines:\nRuntimeError: DataLoader worker is killed by signal: Bus error.",
    ],
)
def test_loaders_that_die_of_too_little_shared_memory_say_so(text):
    with pytest.raises(RuntimeError, match="WORKERS: loader processes ran out of shared memory: .*--shm-size"):
        with utils.loader_memory(2):
            raise RuntimeError(text)


def test_other_failures_keep_their_words():
    for error in (RuntimeError("out of resource: shared memory, Required: 90"), KeyError("x"), OSError("disk full")):
        with pytest.raises(type(error)) as caught, utils.loader_memory(2):
            raise error
        assert caught.value is error
    with pytest.raises(RuntimeError, match="^Bus error$"), utils.loader_memory(0):
        raise RuntimeError("Bus error")


def test_bytes_of_an_item():
    item = {"image": torch.zeros(2, 3), "targets": [np.zeros(4, np.float16), (torch.zeros(1, dtype=torch.uint8), 7)]}
    assert utils.bytes_of(item) == 24 + 8 + 1


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_distributed as t
folder = Path(sys.argv[1])
train, valid = t.dataset(folder / "cache", 100, 4), t.dataset(folder / "cache", 200, 3)
history = t.utils.train_classifier(folder / "out", "level_0", train, valid, t.CONFIG, device="cpu")
print("history of", len(history), "epochs")
"""


@pytest.mark.slow
def test_machines_that_torchrun_joins_train_together(tmp_path):
    (tmp_path / "out").mkdir()
    dataset(tmp_path / "cache", 100, 4), dataset(tmp_path / "cache", 200, 3)
    (tmp_path / "train.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1"]
    machines = [
        subprocess.Popen(
            [*command, "--local-addr", "127.0.0.1", str(tmp_path / "train.py"), str(tmp_path), str(here)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    told = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert all("history of 2 epochs" in text for text in told)
    assert sum("0/2 [" in text for text in told) == 1, "one of them shows its progress"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["level_0.safetensors", "level_0_history.csv"]
