"""Readers who number transitional spines another way than the chain: learned from label points, applied ever after."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_naming import PRIOR, chain, sagittal, spine

import phantom
import utils
from lumbar.data.volume import Study, save_study
from lumbar.names import LEVELS
from lumbar.spine import counting as counting_module
from lumbar.spine import locating as locating_module
from lumbar.spine.counting import COUNTING_FEATURES, Numberings, fit_counting, readers_step
from lumbar.spine.fallbacks import level_boxes
from lumbar.spine.naming import chain_numberings, name_vertebrae
from lumbar.spine.placement import Placement
from lumbar.spine.spinenet import SpineNet
from lumbar.spine.vertebra import _CHAIN
from phantom import dataset

LAST_DISC = {"sacralised L5": 1, "lumbarised S1": -1}  # the last full disc is L5/S1
STUDIES = 40


def variant(seed, transitional):
    rng = np.random.default_rng(seed)
    return phantom.sample_anatomy(rng, np.clip(rng.normal(0.3, 0.7, (5, 5)), 0, 2), transitional).variant


def cases(seeds, convention):
    """Chains that the network sees surely, half of them transitional: list of (true names, bodies, Numberings, by how
    many names its readers number it lower)."""
    found = []
    for seed in seeds:
        transitional = float(seed % 2)
        truth, bodies = chain(seed, transitional=transitional, strength=5.0, flip=0.0)
        numberings = Numberings.from_json(chain_numberings(bodies, PRIOR).to_json())
        found.append((truth, bodies, numberings, convention.get(variant(seed, transitional), 0)))
    return found


@pytest.fixture(scope="module")
def last_disc():
    return cases(range(STUDIES), LAST_DISC)


@pytest.fixture(scope="module")
def others():
    return cases(range(1000, 1024), LAST_DISC)


def learned(known, steps=None):
    steps = [step for *_, step in known] if steps is None else steps
    return fit_counting([numberings for *_, numberings, _ in known], steps)


def names_right(known, counting):
    """Share of studies in which every body from L1 to S1 has the name that the readers give it."""
    right = []
    for truth, bodies, _, step in known:
        named, _ = name_vertebrae(bodies, PRIOR | ({"counting": counting} if counting else {}))
        wanted = [_CHAIN[_CHAIN.index(name) + step] if name in _CHAIN else "" for name in truth]
        given = {id(v.corners_lps_mm): v.name for v in named}
        right.append(all(given[id(v.corners_lps_mm)] == name for v, name in zip(bodies, wanted) if name[0] == "L"))
    return np.mean(right)


@pytest.mark.slow
def test_the_numbering_moves_to_the_readers(last_disc, others):
    counting = learned(last_disc)
    assert set(counting) == set(COUNTING_FEATURES)
    before, after = names_right(others, {}), names_right(others, counting)
    assert before < 0.6 and after >= 0.9, (before, after)
    ordinary = [case for case in others if case[-1] == 0]
    assert names_right(ordinary, counting) >= 0.9
    # A chain that moved is as sure as the readers' own names are, and says what it was before.
    _, bodies, *_ = next(case for case in others if case[-1] == 1)
    _, second = name_vertebrae(bodies, PRIOR | {"counting": counting})
    assert second is None or second.step == -1


def test_slips_and_few_points_change_nothing(last_disc):
    own = [0] * len(last_disc)
    assert learned(last_disc, own) == {}
    for slips in ([3], [3, 30], [10, 11]):  # readers slip in both directions
        slipped = list(own)
        for number, k in enumerate(slips):
            slipped[k] = (-1, 1)[number % 2]
        assert learned(last_disc, slipped) == {}
    assert learned(last_disc, [None] * len(last_disc)) == {}
    assert learned(last_disc[:12]) == {}
    kept = {"l5_s1_gap": 2.0}
    few = last_disc[:12]
    assert fit_counting([n for *_, n, _ in few], [step for *_, step in few], kept) == kept


def test_slips_do_not_hide_what_is_to_learn(last_disc, others):
    steps = [step for *_, step in last_disc]
    steps[next(k for k, step in enumerate(steps) if step == 0)] = 1
    steps[next(k for k, step in enumerate(steps) if step == 1)] = -1
    assert names_right(others, learned(last_disc, steps)) >= 0.75


def points_of(truth, step, slip=()):
    """Label points of a spine behind its discs, named `step` lower; those of the levels in `slip` one lower still."""
    renamed = [
        replace(v, name=_CHAIN[_CHAIN.index(v.name) + step])
        for v in truth
        if v.name in _CHAIN and 0 <= _CHAIN.index(v.name) + step < len(_CHAIN)
    ]
    points = {}
    for box in level_boxes(renamed):
        level = LEVELS[min(LEVELS.index(box.level) + (box.level in slip), len(LEVELS) - 1)]
        points[level] = box.to_lps([1.0, 2.0, box.extent_mm[2] / 2 + 6])[None]
    return points


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_label_points_tell_the_step(step):
    truth = spine(3)
    bodies = [replace(v, name="", appearance=None) for v in truth if v.name in _CHAIN[3:-1]]
    bodies = [replace(v, appearance=looks) for v, looks in zip(bodies, np.full((len(bodies), 5), np.log(0.2)))]
    numberings = chain_numberings(bodies, PRIOR)
    points = points_of(truth, step)
    assert readers_step(numberings, points) == step
    assert readers_step(numberings, points_of(truth, step, ("l2_l3",))) == step
    assert readers_step(numberings, dict(list(points.items())[:2])) is None
    assert readers_step(numberings, {level: where + [0, 0, 17.0] for level, where in points.items()}) is None
    assert readers_step(Numberings(np.zeros((0, 7)), numberings.log_shares, numberings.features), points) is None


def test_what_is_kept_must_be_numbers():
    _, bodies = chain(3)
    known = chain_numberings(bodies, PRIOR).to_json()
    for key, value in (("discs", [1]), ("log_shares", [0, 0, None]), ("features", [[np.nan] * 8] * 3), ("discs", "x")):
        with pytest.raises(ValueError, match="numberings"):
            Numberings.from_json(known | {key: value})


def test_the_counting_goes_with_the_weights(tmp_path):
    model = SpineNet((4, 8), 1, 2.0)
    model.about = {"prior": PRIOR | {"counting": {"l5_s1_gap": 2.0}}}
    path = tmp_path / "spinenet.safetensors"
    utils.save_spinenet(model, path)
    assert utils.load_spinenet(path).about["prior"]["counting"] == {"l5_s1_gap": 2.0}
    for wrong in ({"l5_s1_gap": "x"}, {"eval": 1.0}, [1.0]):
        model.about = {"prior": PRIOR | {"counting": wrong}}
        utils.save_spinenet(model, path)
        with pytest.raises(ValueError, match="counting|l5_s1_gap|eval"):
            utils.load_spinenet(path)


@pytest.mark.slow
def test_tuning_learns_from_label_points_and_looks_once(tmp_path, monkeypatch, capsys):
    """The whole way: studies on disk, label points, weights that name as the readers do."""
    monkeypatch.setattr(counting_module, "_FEWEST", 12)
    seeds = range(18)
    paths, chains, rows, steps, looked = {}, {}, [], {}, []
    for seed in seeds:
        study_id, transitional = seed + 1, float(seed % 2)
        volume = replace(sagittal(), study_id=study_id)
        paths[study_id] = tmp_path / f"{study_id}.safetensors"
        save_study(Study(study_id, [volume]), paths[study_id])
        _, chains[study_id] = chain(seed, transitional=transitional, strength=5.0, flip=0.0)
        steps[study_id] = LAST_DISC.get(variant(seed, transitional), 0)
        named, _ = name_vertebrae(chains[study_id], PRIOR)
        for level, (where,) in points_of(named, steps[study_id]).items():
            slice_, row, column = volume.lps_to_voxel(where)
            number = int(np.clip(round(slice_), 0, 12)) + 1
            rows.append([study_id, 1, number, "spinal_canal_stenosis", level, column, row])
    columns = ["study_id", "series_id", "instance_number", "condition", "level", "x_px", "y_px"]
    coordinates = pd.DataFrame(rows, columns=columns)

    def detect(volume):
        looked.append(volume.study_id)
        return chains[volume.study_id]

    model = SpineNet((4, 8), 1, 2.0)
    model.about = {"prior": PRIOR}
    held_out = {study_id for study_id in paths if study_id % 4 == 0}
    known = coordinates[~coordinates["study_id"].isin(held_out)]
    levels, _ = utils.locate_with_own_layout(paths, model, tmp_path / "kept", 2, detect, known)
    assert sorted(looked) == sorted(paths)
    assert "counting" in model.about["prior"] and "readers' counting" in capsys.readouterr().out
    own = {i: paths[i] for i in held_out}
    # Inference names as the training did, from the weights alone; without the learned part it does not.
    moved = next(i for i in held_out if steps[i])
    boxes, _ = utils.locate_levels(utils.load_study(paths[moved]), Placement.of(model, detect))
    table = levels[levels["study_id"] == moved]
    np.testing.assert_allclose([box.center_lps_mm[2] for box in boxes], table["z_mm"], atol=0.01)
    monkeypatch.setattr(locating_module, "learn_counting", lambda *args: {})
    model.about = {"prior": PRIOR}
    plain, _ = utils.locate_with_own_layout(own, model, detector=detect, coordinates=known)
    before, after = (utils.point_scores(each, own, coordinates) for each in (plain, levels))
    assert before["right_level"] < 0.8 and after["right_level"] > 0.95, (before, after)


def test_the_phantoms_readers_can_count_another_way(made_row):
    for step in (-1, 0, 1):
        row = dataset.renumbered(made_row, step)
        for name, *where in row["vertebrae"]:
            old = dataset.VERTEBRAE[dataset.VERTEBRAE.index(name) - step]
            assert where == next(rest for first, *rest in made_row["vertebrae"] if first == old)
        # Every point stays with its grade, its place and its bodies.
        assert len(row["points"]) == len(made_row["points"]) - 5 * abs(step)
        for series, instance, condition, level, x, y in row["points"]:
            k = [dataset.level_title(name) for name in LEVELS].index(level) - step
            assert [series, instance, condition, dataset.level_title(LEVELS[k]), x, y] in made_row["points"]
        for key, healthy in (("latent", -2.5), ("severity", 0.0), ("grade", 0), ("label", 0)):
            old, new = np.array(made_row[key]), np.array(row[key])
            assert new.shape == (5, 5) and (new.dtype == old.dtype)
            inside = slice(max(step, 0), 5 + min(step, 0))
            np.testing.assert_array_equal(new[:, inside], old[:, max(-step, 0) : 5 - max(step, 0)])
            assert step == 0 or (new[:, 0 if step == 1 else 4] == healthy).all()
    assert dataset.renumbered(made_row, 0) is made_row
    with pytest.raises(ValueError, match="readers.*last disc"):
        phantom.make_dataset("never", readers="nobody")


@pytest.fixture
def made_row():
    rng = np.random.default_rng(1)
    points = [
        [7, k + 1, condition, dataset.level_title(level), 10.0 * k, 20.0 + c]
        for k, level in enumerate(LEVELS)
        for c, condition in enumerate(utils.CONDITIONS)
    ]
    vertebrae = [[name, float(k), 0.0] for k, name in enumerate(dataset.TRUTH_VERTEBRAE)]
    cells = {key: rng.normal(size=(5, 5)).tolist() for key in ("latent", "severity")}
    return {
        "study_id": 3,
        "points": points,
        "vertebrae": vertebrae,
        "grade": [[0, 1, 2, 0, 1]] * 5,
        "label": [[0, 1, 2, 0, 2]] * 5,
    } | cells
