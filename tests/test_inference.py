"""Inference never loses a row: what fails costs its own contribution, and says so."""

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from IPython.core.interactiveshell import InteractiveShell
from stand_in import PRIOR, SAYS, StandIn, infer, members, readers, register, result_file, saved, write_studies
from traitlets.config import Config

import utils
from lumbar import limits
from lumbar.grade.ensemble import default_ensemble
from lumbar.in_flight import images_digest
from lumbar.names import CLASS_COUNTS
from lumbar.serve import results
from lumbar.serve.study import prepare_study, studies_to_predict
from lumbar.spine.placement import Placement
from lumbar.spine.spinenet import SpineNet


@pytest.fixture
def data(tmp_path):
    """Studies 1 and 2 with a series each, 3 with a folder only, 4 in the sample submission only."""
    write_studies(tmp_path, {1: 11, 2: 21})
    (tmp_path / "test_images" / "3").mkdir()
    (tmp_path / "test_images" / "notes").mkdir()
    pd.DataFrame({"row_id": ["1_spinal_canal_stenosis_l1_l2", "4_spinal_canal_stenosis_l1_l2"]}).to_csv(
        tmp_path / "sample_submission.csv", index=False
    )
    return tmp_path


@pytest.fixture
def level(monkeypatch):
    """The only member: says SAYS of every row."""
    stand_in = StandIn("level")
    register(monkeypatch, stand_in)
    return stand_in


def fails_at(study_id, error):
    return lambda asked: error if asked == study_id else None


def raises_at(study_id, error):
    """For on_prepare."""

    def hook(study):
        if study.study_id == study_id:
            raise error

    return hook


def is_prior(rows):
    np.testing.assert_allclose(rows, PRIOR, atol=1e-9)


def is_said(rows, says=SAYS):
    np.testing.assert_allclose(rows, np.tile(says, (5, 5, 1)), atol=1e-9)


def test_every_study_has_its_rows(data, level, tmp_path):
    found, log, tables = infer(data, members(), tmp_path / "out")
    assert list(found) == [1, 2, 3, 4]
    is_said(found[1])
    for study_id in (3, 4):
        is_prior(found[study_id])
        assert log.loc[study_id, "prior_rows"] == 25 and "no readable image" in log.loc[study_id, "problems"]
    assert log.loc[1, "members"] == "level" and list(tables) == ["level"]
    assert set(level.prepared) == {1, 2}


def test_a_table_with_empty_cells_and_odd_names_loses_no_study(data, level, tmp_path):
    """One empty cell turns a column of ids into floats; a bad row costs its series, and no study."""
    rows = [(1, 11, "Sagittal T1"), (2, None, "Sagittal T1"), (None, 31, "Axial T2"), (5, 4096820034, None)]
    pd.DataFrame(rows, columns=["study_id", "series_id", "series_description"]).to_csv(
        data / "test_series_descriptions.csv", index=False
    )
    (data / "test_images" / "\u00b2").mkdir()
    (data / "test_images" / "6").touch()
    jobs = studies_to_predict(data, "test")
    assert list(jobs) == [1, 2, 5, 3, 4, 6]  # those of the table come first
    assert jobs[1] == {11: "Sagittal T1"} and jobs[2] == jobs[5] == {}
    found, _, _ = infer(data, members(), tmp_path / "out")
    assert sorted(found) == [1, 2, 3, 4, 5, 6]


def test_what_preparing_raises_costs_one_study(data, level, tmp_path):
    level.on_prepare = raises_at(1, MemoryError("no room"))
    found, log, _ = infer(data, members(), tmp_path / "out")
    is_prior(found[1])
    is_said(found[2])
    assert "no room" in log.loc[1, "problems"]


def test_a_failing_member_costs_its_own_contribution(data, level, tmp_path):
    level.fails = fails_at(2, ValueError("the crop fell off"))
    found, log, _ = infer(data, members(), tmp_path / "out")
    is_said(found[1])
    is_prior(found[2])
    assert "level: ValueError: the crop fell off" in log.loc[2, "problems"]


def test_a_member_that_raises_costs_its_batch_and_no_other_member(data, level, tmp_path, monkeypatch):
    """It does not keep its word, see Member.predict; the run goes on."""
    study = StandIn("study")
    register(monkeypatch, study)

    def refuse(study_ids, views):
        if 2 in study_ids:
            raise RuntimeError("CUDA error")

    level.on_predict, study.says = refuse, lambda study_id: SAYS[::-1]
    found, log, _ = infer(data, members("level", "study"), tmp_path / "out", batch_studies=1)
    assert (found[1][..., 2] > found[1][..., 0]).all() and log.loc[1, "members"] == "level study"
    is_said(found[2], SAYS[::-1])
    assert "level: RuntimeError: CUDA error" in log.loc[2, "problems"] and log.loc[2, "members"] == "study"
    assert "CUDA" not in log.loc[1, "problems"]


def test_a_study_that_cannot_be_read_does_not_stop_the_others(data, level, tmp_path):
    (image,) = (data / "test_images" / "1").rglob("*.dcm")
    image.write_bytes(image.read_bytes()[:200])
    found, log, _ = infer(data, members(), tmp_path / "out")
    is_prior(found[1])
    is_said(found[2])
    assert "1.dcm" in log.loc[1, "problems"] and "no readable image" in log.loc[1, "problems"]


def test_a_study_whose_reading_raises_is_prepared_without_images(data, level):
    class Denied(dict):
        def items(self):
            raise OSError("permission denied")

    prepared = prepare_study(data / "test_images" / "1", Denied({11: "Sagittal T1"}), members())
    assert prepared.study.study_id == 1 and not prepared.study.volumes and prepared.boxes is None
    told = [str(problem) for problem in prepared.problems]
    assert told[0] == "study 1 cannot be read (OSError: permission denied)" and "no readable image" in told[1]


def test_a_mended_study_is_done_again(tmp_path, level):
    """What the member says depends on how many slices were read."""
    write_studies(tmp_path, {7: 1, 8: 1}, slices=4)
    seen = {}
    level.on_prepare = lambda study: seen.update({study.study_id: len(study.volumes[0].array)})
    level.says = lambda study_id: np.roll(SAYS, seen[study_id])
    files = sorted((tmp_path / "test_images" / "7").rglob("*.dcm"))
    good = [path.read_bytes() for path in files]
    whole, clean, _ = infer(tmp_path, members(), tmp_path / "whole")
    assert not clean["problems"].str.contains("dcm").any()
    assert utils.mended_studies(tmp_path, "test", clean.reset_index()) == []

    for path in files[2:]:  # a download that was interrupted
        path.write_bytes(b"")
    broken, log, _ = infer(tmp_path, members(), tmp_path / "out")
    assert "4.dcm" in log.loc[7, "problems"] and saved(tmp_path / "out") == [7, 8]
    is_said(broken[7], np.roll(SAYS, 2))
    log = log.reset_index()
    assert utils.mended_studies(tmp_path, "test", log) == []
    for path, content in zip(files, good, strict=True):
        path.write_bytes(content)
    assert utils.mended_studies(tmp_path, "test", log) == [7]

    level.prepared.clear()
    again, _, _ = infer(tmp_path, members(), tmp_path / "out")
    assert level.prepared == [7] and np.abs(broken[7] - whole[7]).max() > 0.1
    for study_id in (7, 8):
        np.testing.assert_array_equal(again[study_id], whole[study_id])


def test_the_digest_of_images_is_that_of_their_contents(tmp_path):
    (tmp_path / "a" / "1").mkdir(parents=True)
    (tmp_path / "a" / "1" / "1.dcm").write_bytes(b"abcd")
    before = images_digest(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert images_digest(tmp_path / "b") == before
    (tmp_path / "b" / "1" / "1.dcm").write_bytes(b"abdc")  # of the same size
    assert images_digest(tmp_path / "b") != before


def test_the_digest_of_images_never_fails(tmp_path):
    empty = images_digest(tmp_path / "absent")
    (tmp_path / "1").mkdir()
    assert images_digest(tmp_path / "1") == empty
    (tmp_path / "1" / "loop").symlink_to(tmp_path / "1")
    (tmp_path / "1" / "dangling.dcm").symlink_to(tmp_path / "nowhere")
    assert images_digest(tmp_path / "1") == empty
    (tmp_path / "1" / "1.dcm").write_bytes(b"x")
    one = images_digest(tmp_path / "1")
    (tmp_path / "1" / "1.dcm").write_bytes(b"xy")
    assert len({empty, one, images_digest(tmp_path / "1")}) == 3


def test_a_member_without_a_weight_is_refused_at_the_start(data, level, tmp_path):
    with pytest.raises(ValueError, match="no weight for the member level"):
        utils.infer_studies(data, "test", members(), default_ensemble(["yolo"]), tmp_path / "out")
    with pytest.raises(ValueError, match="no member to predict with"):
        loaded = members()
        loaded.weights.clear()
        infer(data, loaded, tmp_path / "out")
    assert not level.prepared and not (tmp_path / "out").exists()


def test_a_restart_continues(data, level, tmp_path):
    out = tmp_path / "out"
    first, _, _ = infer(data, members(), out)
    assert saved(out) == [1, 2]  # those without an image are looked at again: it may be there by now
    result_file(out, 2).unlink()
    level.prepared.clear()
    again, _, _ = infer(data, members(), out)
    assert level.prepared == [2]
    for study_id in first:
        np.testing.assert_array_equal(first[study_id], again[study_id])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("0.3", "0.4", 1),
        lambda text: text.replace('"level"', '"yolo"', 1),
        lambda text: text.replace("slices are all", "slices were all", 1),
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: '{"result":' * 100_000,
        lambda text: text + " " * (1 << 24),
    ],
)
def test_a_damaged_saved_study_is_done_again(data, level, tmp_path, damage, capsys):
    path = result_file(tmp_path / "out", 2)

    def spoil():
        assert damage(path.read_text()) != path.read_text()
        path.write_text(damage(path.read_text()))

    _done_again(data, level, tmp_path, spoil, capsys)


def _done_again(data, level, tmp_path, spoil, capsys):
    """After spoil() study 2 is done again, with the same result, and the message names its file."""
    first, _, _ = infer(data, members(), tmp_path / "out")
    spoil()
    level.prepared.clear()
    capsys.readouterr()
    again, _, _ = infer(data, members(), tmp_path / "out")
    assert f"{result_file(tmp_path / 'out', 2)} is no result of study 2" in capsys.readouterr().out
    assert level.prepared == [2]
    for study_id in first:
        np.testing.assert_array_equal(first[study_id], again[study_id])


def _rows(value):
    return np.full((5, 5, 3), value).tolist()


def change_result(path, change):
    """Change what a file says of a study; its hash is right again."""
    result = json.loads(path.read_text())["result"]
    change(result)
    path.unlink()
    results.save_result(path, result)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("problems"),
        lambda r: r.pop("predictions"),
        lambda r: r.pop("dropped"),
        lambda r: r.update(problems="x"),
        lambda r: r.update(problems=[1]),
        lambda r: r.update(dropped=None),
        lambda r: r.update(files=7),
        lambda r: r.update(seconds="long"),
        lambda r: r["predictions"].update(level="x"),
        lambda r: r["predictions"].update(level=[[0.1]]),
        lambda r: r["predictions"].update(level=_rows(1e300)),
        lambda r: r["predictions"].update(level=_rows(float("nan"))),
        lambda r: r["predictions"].update(level=_rows("0.3")),
        lambda r: r["predictions"].update(level=_rows(0.3)),  # rows of .9
        lambda r: r["predictions"].update(level=np.tile([-1.0, 1.0, 1.0], (5, 5, 1)).tolist()),
        lambda r: r["predictions"].update(level=[[[0.2, 0.3, 10**400]] * 5] * 5),
        lambda r: r["predictions"].update(evil=_rows(1 / 3)),
        lambda r: r["predictions"].update(study=_rows(1 / 3)),  # a member, but none that was loaded
        lambda r: r.update(levels=[{"source": "=cmd()", "study_id": "<b>"}]),
        lambda r: r["levels"][0].update(source="<script>"),
        lambda r: r["levels"][0].update(x_mm="far"),
        lambda r: r["levels"][0].update(x_mm=float("inf")),
        lambda r: r["levels"][0].update(study_id=1),
        lambda r: r.update(levels=r["levels"] * 2),
        lambda r: r.update(levels=[r["levels"][0]] * 5),
        lambda r: r.update(levels=[*r["levels"][:4], r["levels"][1]]),
        lambda r: r["levels"][0].update(second=["x"]),
        lambda r: r["levels"][0].update(second=None),
        lambda r: r["levels"][0].update(second_share=7),
        lambda r: r.update(predictions={}),
        lambda r: r.update(predictions={}, dropped=["level: not run"]),
        lambda r: r.update(predictions={}, dropped=["yolo: not run"]),
        lambda r: r.update(predictions={"level": _rows(-1)}, problems=[]),
    ],
)
def test_a_saved_study_of_the_right_hash_and_the_wrong_kind_is_done_again(data, level, tmp_path, change, capsys):
    def spoil():
        change_result(result_file(tmp_path / "out", 2), change)

    _done_again(data, level, tmp_path, spoil, capsys)


@pytest.mark.parametrize("name", ["level", "study"])
def test_a_saved_study_that_lacks_a_member_is_done_again_unless_that_was_dropped(
    data, level, tmp_path, monkeypatch, name, capsys
):
    other = StandIn("study")
    register(monkeypatch, other)
    both, path = members("level", "study"), result_file(tmp_path / "out", 2)
    first, _, _ = infer(data, both, tmp_path / "out")
    for dropped, said in (([], True), ([f"{name}: 1 of 2 views"], True), ([f"{name}: not run (late)"], False)):
        change_result(path, lambda r, own=dropped: (r["predictions"].pop(name), r.update(dropped=own)))
        level.prepared.clear()
        capsys.readouterr()
        again, _, _ = infer(data, both, tmp_path / "out")
        assert (f"no predictions of {name}, which was not dropped" in capsys.readouterr().out) is said
        assert level.prepared == [2]  # one that was dropped is made up for
        np.testing.assert_array_equal(first[2], again[2])


@pytest.mark.parametrize("put", [Path.mkdir, lambda path: path.symlink_to("/dev/zero"), os.mkfifo])
def test_what_is_no_file_is_no_saved_study(data, level, tmp_path, put, capsys):
    path = result_file(tmp_path / "out", 2)

    def spoil():
        path.unlink()
        put(path)

    _done_again(data, level, tmp_path, spoil, capsys)
    assert not path.is_symlink() and path.is_file() == (put is not Path.mkdir)


def test_where_a_directory_is_in_the_way_the_run_goes_on_without_saving(data, level, tmp_path, capsys):
    result_file(tmp_path / "out", 2).mkdir(parents=True)
    found, _, _ = infer(data, members(), tmp_path / "out")
    said = capsys.readouterr().out
    assert "2.json is no result of study 2 (not a regular file)" in said and "2.json cannot be written" in said
    is_said(found[2])


def test_studies_of_other_weights_are_not_taken(data, level, tmp_path):
    infer(data, members(), tmp_path / "out")
    level.prepared.clear()
    other = members()
    other.weights["level"][0].about["epoch"] = 7
    infer(data, other, tmp_path / "out")
    assert sorted(level.prepared) == [1, 2]


def test_a_crash_keeps_what_was_finished(data, level, tmp_path):
    def interrupt(study_ids, views):
        if 2 in study_ids:
            raise KeyboardInterrupt

    level.on_predict = interrupt
    with pytest.raises(KeyboardInterrupt):
        infer(data, members(), tmp_path / "out", batch_studies=1)
    assert saved(tmp_path / "out") == [1]


def test_the_order_of_fallbacks(data, level, tmp_path, monkeypatch):
    """Ensemble, then what is left of it, then the study model alone, then the prior, then the class prior."""
    study = StandIn("study")
    register(monkeypatch, study)
    level.fails, study.says = fails_at(2, ValueError("no crop")), lambda study_id: SAYS[::-1]
    loaded = members("level", "study")
    loaded.prior[0, 2] = np.nan
    loaded.prior[3] = np.nan
    found, log, _ = infer(data, loaded, tmp_path / "out")
    assert (found[1][..., 2] > found[1][..., 0]).all()  # level, which weighs more
    is_said(found[2], SAYS[::-1])
    np.testing.assert_allclose(found[3][1], PRIOR[1], atol=1e-9)
    np.testing.assert_allclose(found[3][0, 2], PRIOR[0, [0, 1, 3, 4]].mean(0), atol=1e-9)
    counts = np.sum(CLASS_COUNTS[3], 0) * (1, 2, 4)
    np.testing.assert_allclose(found[3][3], np.tile(counts / counts.sum(), (5, 1)), atol=1e-9)
    assert log["rows_from"].to_dict() == {
        1: "ensemble 25",
        2: "study model 25",
        3: "level prior 19, class prior 6",
        4: "level prior 19, class prior 6",
    }
    assert "level: ValueError: no crop" in log.loc[2, "problems"]


def test_batches_do_not_change_what_is_predicted(data, level, tmp_path):
    level.says = lambda study_id: np.roll(SAYS, study_id)
    one, _, _ = infer(data, members(), tmp_path / "one", batch_studies=1, readers=1)
    four, _, _ = infer(data, members(), tmp_path / "four", batch_studies=4, readers=3)
    is_said(one[2], np.roll(SAYS, 2))
    for study_id in one:
        np.testing.assert_array_equal(one[study_id], four[study_id])


@pytest.mark.parametrize("views, expected", [(-1, 3), (1, 1), (2, 2), (9, 3)])
def test_views_are_those_that_paid_in_training(data, level, tmp_path, views, expected):
    paid = [{}, {"mirror": True}, {"scale": 1.1}]
    infer(data, members(views={"level": paid}), tmp_path / "out", views=views)
    assert level.asked == [expected]
    level.asked.clear()
    infer(data, members(), tmp_path / "plain", views=views)  # weights that name none
    assert level.asked == [1]


def test_reading_ahead_is_bounded(data, level, tmp_path):
    write_studies(data, dict.fromkeys(range(100, 130), 1))
    (data / "sample_submission.csv").unlink()
    most, done = [], []

    def count(study_ids, views):
        time.sleep(0.01)  # readers that nothing holds back run far ahead
        most.append(len(level.prepared) - len(done))
        done.extend(study_ids)

    level.on_predict = count
    found, _, _ = infer(data, members(), tmp_path / "out", batch_studies=3, readers=2)
    assert len(found) == 33 and len(done) == 30 and max(most) <= 2 * 3 + 2


def test_a_study_that_hangs_is_given_up(data, level, tmp_path):
    hanging = threading.Event()
    level.on_prepare = lambda study: study.study_id == 1 and hanging.wait(30)
    found, log, _ = infer(data, members(), tmp_path / "out", readers=1, patience_s=0.3)
    hanging.set()
    is_prior(found[1])
    is_said(found[2])
    assert "given up" in log.loc[1, "problems"]
    assert saved(tmp_path / "out") == [2]  # a restart tries again


def test_a_member_that_fails_everywhere_is_an_error_except_while_kaggle_scores(data, level, tmp_path, monkeypatch):
    level.fails = lambda study_id: ValueError("wrong weights")
    with pytest.raises(RuntimeError, match="level failed in each of 2 readable studies .*wrong weights"):
        infer(data, members(), tmp_path / "out")
    assert not saved(tmp_path / "out")  # the next run tries again
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    found, _, _ = infer(data, members(), tmp_path / "out")
    is_prior(found[1])


# ---- A limit on CPU time ----


def test_a_study_that_works_too_long_is_given_up(data, level, tmp_path):
    def long_work(volume):
        while volume.study_id == 1:
            limits.check_limit()
        return []

    found, log, _ = infer(data, members(detector=long_work), tmp_path / "out", study_s=0.2)
    is_said(found[2])
    assert "TookTooLong: more than 0.2 s of CPU time" in log.loc[1, "problems"]
    assert saved(tmp_path / "out") == [2]  # a faster machine may finish it


@pytest.mark.slow
def test_threads_end_with_the_run(data, level, tmp_path):
    """Also those that were at work when the time was up: the next check of their limit ends them."""
    ended = []

    def long_work(study):
        try:
            while True:
                limits.check_limit()
                time.sleep(0.001)
        except limits.TookTooLong as error:
            ended.append(str(error))
            raise

    level.on_prepare = long_work
    infer(data, members(), tmp_path / "out", hours=0.0003, reserve=0.0, readers=2)
    assert ended == ["no longer wanted: the run has ended"] * 2
    assert not readers()


# ---- The device's memory, and the device ----


def full():
    return torch.OutOfMemoryError("CUDA out of memory")


def test_levels_that_found_the_memory_full_are_located_again(data, level, tmp_path):
    calls = []

    def short(volume):
        calls.append(volume.study_id)
        if volume.study_id == 2 and calls.count(2) == 1:
            raise full()
        return []

    _, log, _ = infer(data, members(detector=short), tmp_path / "out")
    assert calls.count(2) == 2 and calls.count(1) == 1
    assert "Memory" not in log.loc[2, "problems"] and log.loc[2, "members"] == "level"
    assert saved(tmp_path / "out") == [1, 2]


def test_what_failed_for_want_of_memory_is_not_kept(data, level, tmp_path):
    level.fails = fails_at(2, full())
    _, log, _ = infer(data, members(), tmp_path / "out")
    assert "OutOfMemoryError" in log.loc[2, "problems"]
    assert saved(tmp_path / "out") == [1]
    level.prepared.clear()
    level.fails = lambda study_id: None
    _, log, _ = infer(data, members(), tmp_path / "out")
    assert level.prepared == [2] and log.loc[2, "members"] == "level"


def test_a_device_that_fails_ends_the_run_with_nothing_of_it_saved(data, level, tmp_path, monkeypatch, capsys):
    """The device `meta` has no memory: nothing can be computed on it."""
    loaded = members()

    def breaks(study_ids, views):
        if 2 in study_ids:
            loaded.device = "meta"

    level.on_predict, level.fails = breaks, fails_at(2, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="the device meta fails .*start again"):
        infer(data, loaded, tmp_path / "out", batch_studies=1)
    assert saved(tmp_path / "out") == [1]
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    found, log, _ = infer(data, loaded, tmp_path / "out", batch_studies=1)
    assert "the device meta fails" in log.loc[2, "problems"] and "the device meta fails" in capsys.readouterr().out
    is_said(found[1])
    is_prior(found[2])
    assert saved(tmp_path / "out") == [1]
    level.on_predict, level.fails = lambda *_: None, lambda study_id: None
    loaded.device = "cpu"
    level.prepared.clear()
    _, log, _ = infer(data, loaded, tmp_path / "out", batch_studies=1)
    assert level.prepared == [2] and log.loc[2, "members"] == "level"


def test_results_belong_to_what_located_the_levels():
    loaded = members()
    keys = [results.results_key(loaded, -1)]
    placement = loaded.placement
    other = {**placement.prior, "studies": 1}
    for changed in ({"prior": other}, {"layout": other}, {"name": "another"}):
        loaded.placement = replace(placement, **changed)
        keys.append(results.results_key(loaded, -1))
        assert results.results_key(loaded, -1) == keys[-1]
    network = SpineNet(widths=(8, 8, 8))
    for step in range(2):
        with torch.no_grad():
            network.head[0].weight.add_(step)
        loaded.placement = Placement.of(network, prior=placement.prior)
        keys.append(results.results_key(loaded, -1))
    assert len(set(keys)) == len(keys)


# ---- Notebook 05 ----


class Shell(InteractiveShell):
    """Leaves this process' way to show figures as it is, which `%matplotlib inline` would change."""

    def enable_matplotlib(self, gui=None):
        return gui, plt.get_backend()


def run_cells(notebook, parameters):
    """Run a notebook's cells in this process, which has everything imported already, with parameters as papermill
    injects them. Raises what a cell raises."""
    shell = Shell(config=Config({"HistoryManager": {"enabled": False}}))
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            for source in (cell.source, injected) if "parameters" in cell.metadata.get("tags", ()) else (cell.source,):
                shell.run_cell(source, store_history=True).raise_error()
    plt.close("all")


@pytest.mark.slow
def test_the_notebook_closes_when_nothing_is_late_and_only_reads_finished_work(tmp_path, capsys):
    study = tmp_path / "data" / "test_images" / "7"
    tiny.write_study(study)
    rows = [(7, series_id, what) for series_id, what in tiny.SERIES.items()]
    columns = ["study_id", "series_id", "series_description"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "data" / "test_series_descriptions.csv", index=False)
    tiny.write_members(tmp_path / "weights", random_spinenet=True)
    stage = tmp_path / "out" / "05_inference"

    def run(hours, prior_only=False):
        parameters = {"DATA": str(tmp_path / "data"), "WEIGHTS": [str(tmp_path / "weights")], "PRIOR_ONLY": prior_only}
        parameters |= {"OUT": str(tmp_path / "out"), "HOURS": hours, "RESERVE": 0.0001, "DEVICE": "cpu"}
        run_cells(tiny.ROOT / "notebooks" / "05_inference.ipynb", parameters)
        return pd.read_csv(tmp_path / "out" / "submission.csv"), capsys.readouterr().out

    file = sorted(study.rglob("*.dcm"))[0]
    good = file.read_bytes()
    file.write_bytes(good[:1000])
    with pytest.raises(RuntimeError, match="no time left.*PRIOR_ONLY"):
        run(0.00011)
    late, said = run(0.00011, prior_only=True)
    assert len(late) == 25 and not (stage / "manifest.json").exists() and "more HOURS" in said
    found, _ = run(9.0)
    assert (stage / "manifest.json").is_file() and not np.allclose(found["severe"], late["severe"])
    (tmp_path / "out" / "submission.csv").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again, _ = run(9.0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    pd.testing.assert_frame_equal(found, again)

    assert pd.read_csv(stage / "inference_log.csv")["problems"].str.contains(file.name).all()
    file.write_bytes(good)
    _, said = run(9.0)
    assert "1 studies had problems last time and have other files now" in said
    assert pd.read_csv(stage / "inference_log.csv")["problems"].isna().all()
    assert (stage / "manifest.json").stat().st_mtime_ns != before[stage / "manifest.json"]
