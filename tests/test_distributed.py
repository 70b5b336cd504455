"""Training by two processes: the weights of one, errors and continuation."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import utils
from lumbar.data.geometry import LevelBox, boxes_to_table
from lumbar.grade import distributed, trainer
from lumbar.grade.classifier import load_classifier, predict_dataset

CROP = {"scope": "level", "shape": [16, 16, 32], "extent_mm": [32.0, 48.0, 64.0], "shift_mm": [0.0, 0.0, 0.0]}
# Four batches to a step, two for each process; everything random is in it.
CONFIG = {
    "backbone": "tiny",
    "epochs": 2,
    "batch": 2,
    "accumulate": 4,
    "mix": 0.5,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "dropout": 0.3,
    "strength": 1.0,
    "ema": 0.9,
    "about": {"fold": 0},
}


def dataset(folder, first, count):
    """A CropDataset whose crops lie in its cache: a bright left half for left disease, right for right."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(first)
    grades = rng.integers(0, 3, (count, 5, 5))
    grades[0, 3, 1] = -1
    shape = utils.margin_shape(CROP["shape"])
    for number in range(count):
        crops = 0.1 * rng.standard_normal((5, 3, *shape)).astype(np.float16)
        crops[..., shape[2] // 2 :] += grades[number, 3][:, None, None, None, None].astype(np.float16)
        np.save(folder / f"{first + number}.npy", crops)
    levels = pd.DataFrame(columns=["study_id", "level"])
    return utils.CropDataset({}, range(first, first + count), grades, levels, CROP, folder)


@pytest.mark.slow
def test_two_processes_equal_one_after_a_failure_too(tmp_path, monkeypatch, capfd):
    train, valid = dataset(tmp_path / "cache", 100, 6), dataset(tmp_path / "cache", 200, 3)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = utils.train_classifier(tmp_path / "one", "level_0", train, valid, CONFIG)

    # The first epoch by one process, killed in the second.
    calls, step = [], trainer._Training._step

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer._Training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        utils.train_classifier(tmp_path / "two", "level_0", train, valid, CONFIG)
    # Then by two, of which one meets a study that has gone: an error that says so, not a wait for ever.
    hidden = tmp_path / "cache" / "103.npy"
    hidden.rename(hidden.with_suffix(".away"))
    arguments = tmp_path / "two", "level_0", train, valid, CONFIG
    with pytest.raises(RuntimeError, match="one of 2 processes failed(.|\n)*no l1_l2 for study 103"):
        utils.train_classifier(*arguments, processes=2)
    hidden.with_suffix(".away").rename(hidden)
    capfd.readouterr()
    two = utils.train_classifier(*arguments, processes=2)

    bar = capfd.readouterr().err
    assert bar.count("level_0: 100%") == 1, "the first process shows its progress, and only that one"
    np.testing.assert_allclose(two.to_numpy(), one.to_numpy(), rtol=1e-4)
    expected, found = (load_file(tmp_path / name / "level_0.safetensors") for name in ("one", "two"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3, msg=lambda m: f"{name}: {m}")
    predicted = []
    for name in ("one", "two"):
        model, about = load_classifier(tmp_path / name / "level_0.safetensors")
        assert about["fold"] == 0 and about["crop"] == CROP and about["epoch"] == 2  # which two processes trained
        predicted.append(predict_dataset([model], valid))
    assert np.abs(predicted[0] - predicted[1]).max() < 1e-5
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["level_0.safetensors", "level_0_history.csv"]


def test_a_data_set_travels_as_text(tmp_path):
    grades = np.random.default_rng(0).integers(-1, 3, (2, 5, 5))
    levels = boxes_to_table(7, [LevelBox(level, np.zeros(3), np.eye(3), np.ones(3)) for level in utils.LEVELS])
    crop = {**CROP, "scope": "study"}
    sent = utils.CropDataset({7: tmp_path / "7.safetensors", 8: "x"}, np.array([7, 8]), grades, levels, crop)
    sent.save(tmp_path / "a")
    assert sorted(path.suffix for path in (tmp_path / "a").iterdir()) == [".csv", ".csv", ".json"]
    got = utils.CropDataset.load(tmp_path / "a")
    assert got.study_ids == [7, 8] and got.crop == crop and got.cache is None and got.per_study == 1
    assert got.paths[7] == str(tmp_path / "7.safetensors") and (got.grades == grades).all()
    np.testing.assert_allclose(
        utils.boxes_from_table(got.levels_table, 7)[3].axes, utils.boxes_from_table(levels, 7)[3].axes
    )
    json.loads((tmp_path / "a" / "data.json").read_text())


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


def test_other_data_sets_stay_in_this_process(tmp_path):
    class Own(utils.CropDataset):
        pass

    train = dataset(tmp_path, 100, 2)
    own = Own({}, train.study_ids, train.grades, None, CROP, tmp_path)
    with pytest.raises(TypeError, match="PROCESSES = 1"):
        utils.train_classifier(tmp_path, "a", own, own, CONFIG, processes=2)


def test_alone_there_is_one_process():
    assert distributed.rank() == 0 and distributed.world() == 1
    assert distributed.all_sum(torch.ones(2)).tolist() == [1, 1]


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
