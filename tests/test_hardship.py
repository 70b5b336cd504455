"""Hard phantoms: moving patients, artefacts, readers who err; and nothing of it unless it is asked for."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import phantom
import utils
from lumbar.data.tables import described_series
from lumbar.names import GRADES, LABEL_COLUMNS, LEVELS
from phantom.hardship import disturb, moved_plans, scattered, slipped


def test_values_beyond_what_can_be_meant_are_refused():
    for values in ({"motion": 1.5}, {"slips": -0.1}, {"slips": 0.6}, {"scatter_mm": 11.0}, {"motion": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(values))} is .*: it must be from 0 to"):
            phantom.Hardship(**values)
    assert phantom.Hardship().settings == {} and set(phantom.HARD.settings) == {"motion", "slips", "scatter_mm"}


def test_headers_say_what_was_planned_and_slices_lie_elsewhere():
    anatomy = phantom.sample_anatomy(np.random.default_rng(3), np.full((5, 5), 0.1))
    plans = phantom.sample_protocol(np.random.default_rng(0), anatomy, "none")
    before = [plan.position_mm.copy() for plan in plans]
    rng = np.random.default_rng(1)
    away = [[p.position_mm - q for p, q in zip(moved_plans(rng, plans, 1.0), before)] for _ in range(60)]
    assert all(np.array_equal(plan.position_mm, old) for plan, old in zip(plans, before, strict=True))
    torn = [not np.allclose(series[0], series[1]) for study in away for series in study]
    assert 0.35 < np.mean(torn) < 0.65  # motion / 2
    whole = np.array([series[0] for study in away for series in study])
    assert np.abs(whole.mean(0)).max() < 0.35 and np.allclose(whole.std(0), 1.0, atol=0.2)
    for series in (series for study in away for series in study):
        assert np.allclose(series[::2], series[0]) and np.allclose(series[1::2], series[1])


def test_artefacts_come_as_often_as_asked_and_leave_an_image():
    image = np.random.default_rng(0).random((6, 40, 48), np.float32)
    kept = image.copy()
    rng = np.random.default_rng(1)
    found = [disturb(rng, image, 0.4) for _ in range(200)]
    assert np.array_equal(image, kept)  # the slices given stay as they are
    share = np.mean([not np.array_equal(other, image) for other in found])
    assert 0.28 < share < 0.5
    assert all(x.dtype == np.float32 and x.shape == image.shape and x.min() >= 0 for x in found)
    assert all(np.corrcoef(x.ravel(), image.ravel())[0, 1] > 0.3 for x in found)


def test_a_slip_renames_all_levels_of_one_kind_of_condition():
    grade = np.arange(25).reshape(5, 5) % 3
    points = [[7, 1, c, level, 10.0 * c, 10.0 * level] for c in range(5) for level in range(5)]
    for seed in range(200):
        rng = np.random.default_rng(seed)
        seen, left = slipped(rng, grade, points, 0.2)
        assert [p[4:] for p in points] == [[10.0 * c, 10.0 * k] for c in range(5) for k in range(5)]  # untouched
        steps = {c: {p[3] - round(p[5] / 10) for p in left if p[2] == c} for c in range(5)}
        assert all(len(step) == 1 for step in steps.values())
        assert steps[1] == steps[2] and steps[3] == steps[4]
        for c, (step,) in steps.items():
            assert sum(p[2] == c for p in left) == len(LEVELS) - abs(step)
            for level in range(5):
                if level - step not in range(5):
                    assert seen[c, level] == -1
                else:
                    assert abs(int(seen[c, level]) - grade[c, level - step]) <= 1 and 0 <= seen[c, level] <= 2


def test_slips_are_as_many_as_asked():
    rng, grade = np.random.default_rng(0), np.zeros((5, 5), int)
    grade[0, 0] = -1  # what has no grade gets none
    seen = np.array([slipped(rng, grade, [], 0.02)[0] for _ in range(3000)])
    fallen = (seen[:, :, 1:4] == -1).any((1, 2)).mean()  # none of these can be empty but by the first level's slip
    off = (seen == 1).mean()
    assert 0.015 < off < 0.025 and fallen < 0.02
    renamed = (seen[:, 1:3] == -1).any((1, 2)).mean()
    assert 0.012 < renamed < 0.028


def test_clicks_scatter():
    rng = np.random.default_rng(0)
    offset = rng.normal(0, 1, 2)
    assert scattered(rng, offset, 1.0)[1] == 0 and np.array_equal(scattered(rng, offset, 1.0)[0], offset)
    found = [scattered(rng, rng.normal(0, 1, 2), 2.0) for _ in range(4000)]
    offsets, beside = np.array([f[0] for f in found]), np.array([f[1] for f in found])
    middle = np.subtract(*np.percentile(offsets, (75, 25))) / 1.349
    assert 1.9 < middle < 2.15 and np.abs(offsets).max() > 8
    assert 0.2 < np.mean(beside != 0) < 0.3 and set(beside) == {-1, 0, 1}


@pytest.mark.slow
def test_a_hard_data_set_has_true_test_labels_and_a_truth_beside(tmp_path):
    given = ["--hard", "--slips", "0.4", "--train", "2", "--test", "1", "--seed", "5", "--workers", "1"]
    command = [sys.executable, "-m", "phantom", str(tmp_path / "hard"), *given]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "hard" / "phantom.json").read_text())
    assert settings["slips"] == 0.4 and settings["motion"] == phantom.HARD.motion and settings["variety"] == "wide"
    truth = pd.read_csv(tmp_path / "hard" / "phantom_severity.csv")

    def differing(name, split):
        labels = pd.read_csv(tmp_path / "hard" / name).set_index("study_id")[list(LABEL_COLUMNS)]
        own = truth[truth["split"] == split]
        true = own["grade"].map(lambda grade: GRADES[grade] if grade >= 0 else None)
        given = [labels.loc[row.study_id, f"{row.condition}_{row.level}"] for row in own.itertuples()]
        return np.mean([isinstance(a, str) and isinstance(b, str) and a != b for a, b in zip(given, true)])

    assert differing("train.csv", "train") > 0.1 and differing("phantom_test_labels.csv", "test") == 0
    study_id = int(pd.read_csv(tmp_path / "hard" / "train.csv")["study_id"].iloc[0])
    descriptions = described_series(tmp_path / "hard", "train")[study_id]
    study = utils.read_study(tmp_path / "hard" / "train_images" / str(study_id), descriptions)
    assert study.volumes and len(utils.read_coordinates(tmp_path / "hard"))


@pytest.mark.slow
def test_the_command_refuses_what_cannot_be_meant(tmp_path):
    command = [sys.executable, "-m", "phantom", str(tmp_path / "x"), "--slips", "2"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 2 and "slips is 2.0: it must be from 0 to 0.5" in done.stderr
    assert not (tmp_path / "x").exists()
