"""Inference never loses a row: what fails costs its own contribution, and says so."""

import threading
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import utils
from lumbar import inference

PRIOR = np.random.default_rng(0).dirichlet((5, 2, 1), (5, 5))
CROP = {"scope": "level", "shape": [8, 8, 8], "extent_mm": [8.0, 8.0, 8.0], "shift_mm": [0.0, 0.0, 0.0]}
SAYS = np.array([0.2, 0.3, 0.5])


@pytest.fixture
def data(tmp_path):
    """Studies 1 and 2 with a series each, 3 with a folder only, 4 in the sample submission only."""
    pd.DataFrame({"study_id": [1, 2], "series_id": [11, 21], "series_description": "Sagittal T1"}).to_csv(
        tmp_path / "test_series_descriptions.csv", index=False
    )
    (tmp_path / "test_images" / "3").mkdir(parents=True)
    (tmp_path / "test_images" / "notes").mkdir()
    pd.DataFrame({"row_id": ["1_spinal_canal_stenosis_l1_l2", "4_spinal_canal_stenosis_l1_l2"]}).to_csv(
        tmp_path / "sample_submission.csv", index=False
    )
    return tmp_path


@pytest.fixture
def networks(monkeypatch):
    """Stand-ins: studies 1 and 2 can be read, the level network says SAYS of every row. Counts what is read."""
    reads = []
    box = utils.LevelBox("l1_l2", np.zeros(3), np.eye(3), np.ones(3), 1.0, "t2")

    def read_study(folder, descriptions):
        reads.append(folder.name)
        volumes = [utils.Volume(np.zeros((2, 4, 4), np.float32), np.eye(4), 1, 1, "Sagittal T1", 0, np.arange(2))]
        return utils.Study(int(folder.name), volumes if descriptions else [])

    def predict_crops(models, crops, *_):
        return np.tile(SAYS, (len(crops), 5, 1))

    monkeypatch.setattr(inference, "read_study", read_study)
    monkeypatch.setattr(inference, "locate_levels_surely", lambda study, model, detector: ([box] * 5, [], None))
    monkeypatch.setattr(inference, "cut_crops", lambda study, boxes, crop, device: np.zeros(5) + study.study_id)
    monkeypatch.setattr(inference, "predict_crops", predict_crops)
    return reads


def members(level=True):
    return utils.Members(None, {}, [("network", {"crop": CROP})] if level else [], [], PRIOR)


def infer(data, loaded, out, **options):
    ensemble = utils.default_ensemble()
    submission, log, tables, levels = utils.infer_studies(data, "test", loaded, ensemble, out, **options)
    ids, probabilities = utils.from_submission(submission)
    assert np.abs(probabilities.sum(-1) - 1).max() < 1e-12
    return dict(zip(ids, probabilities, strict=True)), log.set_index("study_id"), tables


def test_every_study_has_its_rows(data, networks, tmp_path):
    found, log, tables = infer(data, members(), tmp_path / "out")
    assert list(found) == [1, 2, 3, 4]
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    for study_id in (3, 4):
        np.testing.assert_allclose(found[study_id], PRIOR, atol=1e-9)
        assert log.loc[study_id, "prior_rows"] == 25 and "no readable image" in log.loc[study_id, "problems"]
    assert log.loc[1, "members"] == "level" and list(tables) == ["level"]


def test_a_table_with_empty_cells_and_odd_names_loses_no_study(data, networks, tmp_path):
    """One empty cell turns a column of ids into floats."""
    rows = [(1, 11, "Sagittal T1"), (2, None, "Sagittal T1"), (None, 31, "Axial T2"), (5, 4096820034, None)]
    pd.DataFrame(rows, columns=["study_id", "series_id", "series_description"]).to_csv(
        data / "test_series_descriptions.csv", index=False
    )
    (data / "test_images" / "\u00b2").mkdir()
    (data / "test_images" / "6").touch()
    jobs = utils.studies_to_predict(data, "test")
    assert list(jobs) == [1, 2, 5, 3, 4, 6]
    assert jobs[1] == {11: "Sagittal T1"} and jobs[2] == {} and list(jobs[5]) == [4096820034]
    found, _, _ = infer(data, members(), tmp_path / "out")
    assert sorted(found) == [1, 2, 3, 4, 5, 6]


def test_what_preparing_raises_costs_one_study(data, networks, tmp_path, monkeypatch):
    prepare = inference.prepare_study

    def broken(folder, *rest):
        if folder.name == "1":
            raise MemoryError("no room")
        return prepare(folder, *rest)

    monkeypatch.setattr(inference, "prepare_study", broken)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], PRIOR, atol=1e-9)
    np.testing.assert_allclose(found[2], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    assert "no room" in log.loc[1, "problems"]


def test_a_failing_member_costs_its_own_contribution(data, networks, tmp_path, monkeypatch):
    def cut_crops(study, boxes, crop, device):
        if study.study_id == 2:
            raise ValueError("the crop fell off")
        return np.zeros(5)

    monkeypatch.setattr(inference, "cut_crops", cut_crops)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    np.testing.assert_allclose(found[2], PRIOR, atol=1e-9)
    assert "level: ValueError: the crop fell off" in log.loc[2, "problems"]


def test_a_study_that_cannot_be_read_does_not_stop_the_others(data, networks, tmp_path, monkeypatch):
    read = inference.read_study

    def broken(folder, descriptions):
        if folder.name == "1":
            raise OSError("permission denied")
        return read(folder, descriptions)

    monkeypatch.setattr(inference, "read_study", broken)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], PRIOR, atol=1e-9)
    np.testing.assert_allclose(found[2], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    assert "permission denied" in log.loc[1, "problems"]


def test_a_restart_continues(data, networks, tmp_path):
    first, _, _ = infer(data, members(), tmp_path / "out")
    (tmp_path / "out" / "studies" / "2.json").unlink()
    networks.clear()
    again, _, _ = infer(data, members(), tmp_path / "out")
    assert networks == ["2"]
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
    ],
)
def test_a_damaged_saved_study_is_done_again(data, networks, tmp_path, damage):
    first, _, _ = infer(data, members(), tmp_path / "out")
    saved = tmp_path / "out" / "studies" / "2.json"
    assert damage(saved.read_text()) != saved.read_text()
    saved.write_text(damage(saved.read_text()))
    networks.clear()
    again, _, _ = infer(data, members(), tmp_path / "out")
    assert networks == ["2"]
    np.testing.assert_array_equal(first[2], again[2])


def test_studies_of_other_weights_are_not_taken(data, networks, tmp_path):
    infer(data, members(), tmp_path / "out")
    networks.clear()
    other = members()
    other.level[0][1]["epoch"] = 7
    infer(data, other, tmp_path / "out")
    assert sorted(networks) == ["1", "2", "3", "4"]


def test_a_crash_keeps_what_was_finished(data, networks, tmp_path, monkeypatch):
    def cut_crops(study, boxes, crop, device):
        if study.study_id == 2:
            raise KeyboardInterrupt
        return np.zeros(5)

    monkeypatch.setattr(inference, "cut_crops", cut_crops)
    with pytest.raises(KeyboardInterrupt):
        # Cut in the main thread, as a member is that was dropped when the study was read.
        monkeypatch.setattr(inference, "prepare_study", without_crops(inference.prepare_study))
        infer(data, members(), tmp_path / "out", batch_studies=1)
    assert [path.stem for path in (tmp_path / "out" / "studies").glob("*.json")] == ["1"]


def without_crops(prepare):
    return lambda folder, descriptions, loaded, wanted=(): prepare(folder, descriptions, loaded, ())


def test_the_order_of_fallbacks(data, networks, tmp_path, monkeypatch):
    """Ensemble, then what is left of it, then the study model alone, then the prior, then the class prior."""
    study_crop = CROP | {"scope": "study"}

    def cut_crops(study, boxes, crop, device):
        if crop["scope"] == "level" and study.study_id == 2:
            raise ValueError("no crop")
        return np.zeros(5 if crop["scope"] == "level" else 1)

    def predict_crops(models, crops, crop, *_):
        shape = (len(crops), 5, 1) if crop["scope"] == "level" else (len(crops), 5, 5, 1)
        return np.tile(SAYS if crop["scope"] == "level" else SAYS[::-1], shape)

    monkeypatch.setattr(inference, "cut_crops", cut_crops)
    monkeypatch.setattr(inference, "predict_crops", predict_crops)
    loaded = members()
    loaded.study.append(("network", {"crop": study_crop}))
    loaded.prior = PRIOR.copy()
    loaded.prior[0, 2] = np.nan
    loaded.prior[3] = np.nan
    found, log, _ = infer(data, loaded, tmp_path / "out")
    assert (found[1][..., 2] > found[1][..., 0]).all()  # level, which weighs more
    np.testing.assert_allclose(found[2], np.tile(SAYS[::-1], (5, 5, 1)), atol=1e-9)
    np.testing.assert_allclose(found[3][1], PRIOR[1], atol=1e-9)
    np.testing.assert_allclose(found[3][0, 2], PRIOR[0, [0, 1, 3, 4]].mean(0), atol=1e-9)
    counts = np.array(inference.CLASS_COUNTS["subarticular"]) * (1, 2, 4)
    np.testing.assert_allclose(found[3][3], np.tile(counts / counts.sum(), (5, 1)), atol=1e-9)
    assert log["rows_from"].to_dict() == {
        1: "ensemble 25",
        2: "study model 25",
        3: "level prior 19, class prior 6",
        4: "level prior 19, class prior 6",
    }
    assert "level: ValueError: no crop" in log.loc[2, "problems"]


def test_batches_do_not_change_what_is_predicted(data, networks, tmp_path):
    one, _, _ = infer(data, members(), tmp_path / "one", batch_studies=1, readers=1)
    four, _, _ = infer(data, members(), tmp_path / "four", batch_studies=4, readers=3)
    for study_id in one:
        np.testing.assert_array_equal(one[study_id], four[study_id])


def test_a_batch_that_fails_is_tried_study_by_study(data, networks, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "cut_crops", lambda study, *_: np.zeros(5) + study.study_id)

    def predict_crops(models, crops, crop, *_):
        if (crops == 2).any():
            raise RuntimeError("CUDA error")
        return np.tile(SAYS, (len(crops), 5, 1))

    monkeypatch.setattr(inference, "predict_crops", predict_crops)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    np.testing.assert_allclose(found[2], PRIOR, atol=1e-9)
    assert "CUDA error" in log.loc[2, "problems"] and "CUDA" not in log.loc[1, "problems"]


def test_what_is_not_finite_is_no_prediction(data, networks, tmp_path, monkeypatch):
    def predict_crops(models, crops, crop, *_):
        return np.where((crops == 2)[:, None, None], np.nan, np.tile(SAYS, (len(crops), 5, 1)))

    monkeypatch.setattr(inference, "predict_crops", predict_crops)
    found, log, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    np.testing.assert_allclose(found[2], PRIOR, atol=1e-9)
    assert "not finite" in log.loc[2, "problems"]


@pytest.mark.parametrize("views, expected", [(-1, 3), (1, 1), (2, 2), (9, 3)])
def test_views_are_those_that_paid_in_training(data, networks, tmp_path, monkeypatch, views, expected):
    paid = [{}, {"mirror": True}, {"scale": 1.1}]
    seen = []

    def predict_crops(models, crops, crop, levels, views, batch):
        seen.append(views)
        return np.tile(SAYS, (len(crops), 5, 1))

    monkeypatch.setattr(inference, "predict_crops", predict_crops)
    loaded = utils.Members(None, {}, [("network", {"crop": CROP, "views": paid})], [], PRIOR)
    infer(data, loaded, tmp_path / "out", views=views)
    assert seen == [paid[:expected]]
    seen.clear()
    infer(data, members(), tmp_path / "plain", views=views)  # weights that name none
    assert seen == [[{}]]


def test_reading_ahead_is_bounded(data, networks, tmp_path, monkeypatch):
    study_ids = list(range(100, 160))
    table = pd.DataFrame({"study_id": study_ids, "series_id": 1, "series_description": "Sagittal T1"})
    table.to_csv(data / "test_series_descriptions.csv", index=False)
    (data / "sample_submission.csv").unlink()
    finished, most = [], []
    save = inference._save_result

    def counted(path, result):
        finished.append(path)
        most.append(len(networks) - len(finished))
        return save(path, result)

    monkeypatch.setattr(inference, "_save_result", counted)
    found, _, _ = infer(data, members(), tmp_path / "out", batch_studies=3, readers=2)
    assert len(found) == 61 and max(most) <= 2 * 3 + 2


def test_a_study_that_hangs_is_given_up(data, networks, tmp_path, monkeypatch):
    hanging = threading.Event()
    read = inference.read_study
    monkeypatch.setattr(inference, "PATIENCE_S", 0.3)

    def hang(folder, descriptions):
        if folder.name == "1":
            hanging.wait(30)
        return read(folder, descriptions)

    monkeypatch.setattr(inference, "read_study", hang)
    found, log, _ = infer(data, members(), tmp_path / "out", readers=1)
    hanging.set()
    np.testing.assert_allclose(found[1], PRIOR, atol=1e-9)
    np.testing.assert_allclose(found[2], np.tile(SAYS, (5, 5, 1)), atol=1e-9)
    assert "given up" in log.loc[1, "problems"]
    assert not (tmp_path / "out" / "studies" / "1.json").exists()  # a restart tries again


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def timed(data, networks, tmp_path, monkeypatch):
    """Sixty studies, three members of known cost; run(hours, ...) predicts them on a clock that only they move."""
    study_ids = list(range(100, 160))
    table = pd.DataFrame({"study_id": study_ids, "series_id": 1, "series_description": "Sagittal T1"})
    table.to_csv(data / "test_series_descriptions.csv", index=False)
    (data / "sample_submission.csv").unlink()
    (data / "test_images" / "3").rmdir()
    clock, costs_s = Clock(), {"yolo": 20.0, "level": 10.0, "study": 5.0}

    def predict_crops(models, crops, crop, levels, views, batch):
        clock.now += costs_s[crop["scope"]] * len(views) * len(crops) / (5 if crop["scope"] == "level" else 1)
        return np.tile(SAYS, (len(crops), 5, 1) if crop["scope"] == "level" else (len(crops), 5, 5, 1))

    def cut_crops(study, boxes, crop, device):
        return np.zeros(5 if crop["scope"] == "level" else 1)

    def yolo_studies(detector, studies, boxes, views):
        clock.now += costs_s["yolo"] * len(views) * len(studies)
        return [np.tile(SAYS, (1, 5, 1)) for _ in studies]

    monkeypatch.setattr(inference, "predict_crops", predict_crops)
    monkeypatch.setattr(inference, "cut_crops", cut_crops)
    monkeypatch.setattr(inference, "yolo_studies", yolo_studies)
    two = [{}, {"mirror": True}]
    detector = SimpleNamespace(about={"views": two})
    networks_ = {
        s: [("network", {"crop": CROP | {"scope": s}, "views": v})] for s, v in (("level", two), ("study", [{}]))
    }
    loaded = utils.Members(None, {"scs": [detector]}, networks_["level"], networks_["study"], PRIOR)

    def run(hours, out="out", **options):
        before = clock.now
        options = {"reserve": 0.0, "batch_studies": 2, "clock": clock} | options
        found, log, _ = infer(data, loaded, tmp_path / out, hours=hours, **options)
        assert len(found) == 60
        return (clock.now - before) / 3600, log.fillna("")

    return run


def test_with_enough_time_nothing_is_dropped(timed):
    used, log = timed(9.0)
    assert used == pytest.approx(60 * 65 / 3600) and (log["dropped"] == "").all()
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


def test_then_members_with_the_least_weight_for_their_seconds(timed):
    used, log = timed(
        0.42
    )  # one view of each: 0.58 h; without study (.10 for 5 s) 0.5 h; nor level (.25 for 10 s) 0.33 h
    assert 0.3 < used <= 0.42
    without = {member: log["dropped"].str.contains(f"{member}: not run") for member in ("yolo", "level", "study")}
    assert without["study"].sum() > 30 and without["level"].any() and not without["yolo"].any()
    assert not (without["level"] & ~without["study"]).any()
    assert (log["partial"] == "yolo").all()


def test_at_the_very_end_only_the_prior(timed):
    used, log = timed(0.2)  # one view of the detectors alone: 0.33 h
    assert used <= 0.2
    late = log[log["problems"].str.contains("no time left")]
    assert 10 < len(late) < 50 and (late["prior_rows"] == 25).all()
    assert late["problems"].str.contains("0.20 h have passed|of 0.2 h").all()
    assert (log["prior_rows"] < 25).sum() == 60 - len(late)


def test_the_reserve_stays(timed):
    used, _ = timed(0.9, reserve=0.3)
    assert used <= 0.6


def test_the_limit_runs_on_in_this_process_and_anew_in_another(timed, monkeypatch, tmp_path):
    real, done = inference._save_result, []

    def killed(path, result):
        done.append(path)
        if len(done) > 20:
            raise KeyboardInterrupt
        return real(path, result)

    monkeypatch.setattr(inference, "_save_result", killed)
    with pytest.raises(KeyboardInterrupt):
        timed(9.0)  # uses .37 h
    monkeypatch.setattr(inference, "_save_result", real)
    used, log = timed(0.8)  # .43 h are left for 40 studies that take .71 h
    assert used <= 0.45 and log["dropped"].str.contains("1 of 2 views").any()
    assert (log["dropped"].iloc[:20] == "").all()  # finished before, and counted
    again, log = timed(0.8, out="another")  # a finished run has ended its clock, another folder has its own
    assert again == pytest.approx(0.8, abs=0.05)


def test_reading_that_is_too_slow_costs_no_member():
    clock = Clock()
    schedule = utils.Schedule({"yolo": 2, "level": 1}, {"yolo": 0.6, "level": 0.4}, 1.0, 0.0, 2, clock)
    for member, seconds in (("yolo", 2.0), ("level", 1.0), ("preparing", 30.0)):
        schedule.note(member, seconds, 1)
    assert schedule.plan(1000) == {"yolo": 2, "level": 1}


def test_a_member_that_fails_everywhere_is_an_error_except_while_kaggle_scores(data, networks, tmp_path, monkeypatch):
    def cut_crops(*_):
        raise ValueError("wrong weights")

    monkeypatch.setattr(inference, "cut_crops", cut_crops)
    with pytest.raises(RuntimeError, match="level failed in each of 2 readable studies .*wrong weights"):
        infer(data, members(), tmp_path / "out")
    assert not list((tmp_path / "out" / "studies").glob("*.json"))  # the next run tries again
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    found, _, _ = infer(data, members(), tmp_path / "out")
    np.testing.assert_allclose(found[1], PRIOR, atol=1e-9)


def test_no_weights_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors in or below"):
        utils.weight_folders([tmp_path])
    with pytest.raises(FileNotFoundError, match="no spinenet.safetensors"):
        utils.load_members([tmp_path])


def test_weights_are_found_below_but_not_in_image_folders(tmp_path):
    for name in ("a/03_train_yolo_scs", "a/train_images/1", "a/01_preprocess/volumes", "a/02.old-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.safetensors").touch()
    assert utils.weight_folders([tmp_path]) == [tmp_path / "a/03_train_yolo_scs"]
