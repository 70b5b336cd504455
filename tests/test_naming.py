"""Naming chains of vertebrae, chains of two series, the levels where no sagittal image helps, and many studies.

The chains are the phantom's spines with noise and corruptions: no network is needed.
"""

import itertools
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest

import phantom
import utils
from lumbar.data.geometry import boxes_to_table
from lumbar.data.source import Source
from lumbar.data.volume import Study, Volume, save_study
from lumbar.names import VERTEBRAE
from lumbar.spine import levels as levels_module
from lumbar.spine import locating as locating_module
from lumbar.spine import naming as naming_module
from lumbar.spine import spinenet
from lumbar.spine.chain import merge_vertebrae
from lumbar.spine.fallbacks import complete_vertebrae, fit_level_prior, level_boxes
from lumbar.spine.levels import second_boxes
from lumbar.spine.locating import locate_unseen
from lumbar.spine.naming import name_vertebrae
from lumbar.spine.placement import Placement
from lumbar.spine.spinenet import SpineNet, detect_vertebrae
from lumbar.spine.vertebra import (
    AMBIGUOUS_SHARE,
    SPINE_CLASSES,
    UNCERTAIN,
    Vertebra,
    spine_class,
    vertebrae_to_table,
)

CLASSES = len(SPINE_CLASSES)
LUMBAR = ("L1", "L2", "L3", "L4", "L5", "S1")


@cache
def spine(seed, transitional=0.0):
    """True Vertebrae, T8 to S5, of one of the phantom's spines."""
    rng = np.random.default_rng(seed)
    anatomy = phantom.sample_anatomy(rng, np.clip(rng.normal(0.3, 0.7, (5, 5)), 0, 2), transitional)
    return tuple(Vertebra(v.corners_mm(), v.width_mm, 1.0, v.name, Source.TRUTH) for v in anatomy.vertebrae)


def prior_of(seeds):
    spines = {k: [v for v in spine(k) if v.name in VERTEBRAE] for k in seeds}
    table = pd.concat([vertebrae_to_table(k, bodies) for k, bodies in spines.items()])
    anchors = {}
    for k, bodies in spines.items():
        boxes = level_boxes(bodies)
        axial_center = (boxes[0].center_lps_mm + boxes[-1].center_lps_mm) / 2 + [0, 15.0, 0]
        anchors[k] = {"sagittal": np.zeros(3), "axial": axial_center}
    return fit_level_prior(anchors, table)


PRIOR = prior_of(range(9000, 9040))


def looks(rng, name, strength, flip):
    """Log-probabilities of a network that errs: with the chance `flip` the neighbouring class."""
    k = spine_class(name)
    if rng.random() < flip:
        k = int(np.clip(k + rng.choice([-1, 1]), 0, CLASSES - 1))
    logits = rng.normal(0, 1, CLASSES) + strength * (np.arange(CLASSES) == k)
    return logits - np.log(np.exp(logits).sum())


def chain(seed, top="T11", bottom="S2", missing=(), lost=0, false=(), strength=2.5, flip=0.08, transitional=0.0):
    """Detections of one spine, head to foot: (true names, "" for false ones; Vertebrae).

    Corners are off by 1.2 mm, the posture by 8 degrees, the size by a tenth; missing: names that are not seen; lost:
    how many more, any; false: where false bodies lie: front, behind, between or twice (a body seen again)."""
    rng = np.random.default_rng((seed, 5))
    truth = spine(seed, transitional)
    names = [v.name for v in truth]
    bodies = truth[names.index(top) : names.index(bottom) + 1]
    kept = [v for v in bodies if v.name not in missing]
    for _ in range(lost):
        kept.pop(int(rng.integers(len(kept))))
    found = [(v.name, v.corners_lps_mm, rng.uniform(0.5, 0.95), looks(rng, v.name, strength, flip)) for v in kept]
    for where in false:
        name, corners, sure, seen = found[int(rng.integers(len(kept)))]
        away = rng.uniform(-15, 15)
        if where == "twice":
            found.append(
                ("", corners + [0, rng.normal(0, 4), rng.choice([-1, 1]) * rng.uniform(4, 10)], 0.8 * sure, seen)
            )
            continue
        if where == "between":
            shrunk = corners.mean(0) + 0.7 * (corners - corners.mean(0))
            corners = shrunk + [0, rng.normal(0, 5), rng.choice([-1, 1]) * rng.uniform(12, 20)]
        else:
            corners = corners + [0, rng.uniform(30, 60) * (-1 if where == "front" else 1), away]
        found.append(("", corners, rng.uniform(0.25, 0.7), looks(rng, rng.choice(["T12", "L3", "S1"]), strength, 0)))
    turn, size = np.radians(rng.normal(0, 8)), np.exp(rng.normal(0, 0.1))
    middle = next(v for v in truth if v.name == "L3").center_lps_mm
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    result = []
    for name, corners, sure, seen in found:
        corners = corners + rng.normal(0, 1.2, (4, 3)) * [0, 1, 1] + [rng.normal(0, 1.5), 0, 0]
        corners = size * (corners - middle) @ rotation.T + middle
        result.append((name, Vertebra(corners, 45.0, float(sure), "", Source.T2, seen)))
    result.sort(key=lambda item: -item[1].center_lps_mm[2])
    return [name for name, _ in result], [v for _, v in result]


def names_right(truth, bodies, prior=PRIOR):
    """Has every true body of L1 to S1 its name, and no false one such a name? A body seen twice may go either way."""
    given = {id(v.corners_lps_mm): v.name for v in name_vertebrae(bodies, prior)[0]}
    given = [given.get(id(v.corners_lps_mm), "") for v in bodies]

    def near(body, name, of):
        return any(n == name and np.linalg.norm(v.center_lps_mm - body.center_lps_mm) < 15 for n, v in zip(of, bodies))

    for name, answer, body in zip(truth, given, bodies):
        if name in LUMBAR and answer != name and not near(body, name, given):
            return False
        if answer in LUMBAR and answer != name and not near(body, answer, truth):
            return False
    return True


def share_right(count=100, **corruptions):
    return np.mean([names_right(*chain(seed, **corruptions)) for seed in range(count)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "corruptions",
    [
        dict(),
        dict(lost=1),
        dict(false=("between",)),
        pytest.param(dict(lost=1, false=("front",)), marks=pytest.mark.slow),
        pytest.param(dict(lost=1, false=("behind",)), marks=pytest.mark.slow),
        pytest.param(dict(false=("front",) * 3), marks=pytest.mark.slow),
        pytest.param(dict(false=("twice",) * 3), marks=pytest.mark.slow),
        dict(missing=("L5",)),
        pytest.param(dict(bottom="S1"), marks=pytest.mark.slow),
        pytest.param(dict(bottom="S4", top="T8"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_names_are_right_under_noise(corruptions):
    assert share_right(**corruptions) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("corruptions", "least"),
    [
        (dict(missing=("S1",)), 0.95),
        (dict(top="L3", bottom="S1"), 0.95),
        (dict(top="T11", bottom="L5"), 0.95),
        (dict(transitional=1.0), 0.95),
        (dict(strength=1.0, flip=0.2, lost=1, false=("front",)), 0.92),
        (dict(strength=1.0, flip=0.2, transitional=1.0), 0.85),
    ],
    ids=str,
)
def test_names_are_mostly_right_where_less_is_to_be_seen(corruptions, least):
    assert share_right(**corruptions) >= least


@pytest.mark.parametrize("broken", ["no geometry", "no evidence but distance", "drops everything"])
def test_a_broken_naming_would_be_noticed(broken, monkeypatch):
    whole = naming_module._chain_scores

    def scores(vertebrae, *args):
        if broken == "no evidence but distance":
            vertebrae = [replace(v, appearance=None) for v in vertebrae]
        single, pair, drop = whole(vertebrae, *args)
        if broken == "no geometry":
            pair = np.where(np.isfinite(pair), 0.0, pair)
        return single, pair, drop * (broken != "drops everything")

    monkeypatch.setattr(naming_module, "_chain_scores", scores)
    if broken == "no evidence but distance":
        monkeypatch.setattr(naming_module, "_PAIR_SPREAD", {})
        monkeypatch.setattr(naming_module, "_TILT_SPREAD_DEG", (1e9, 1.0))
    assert share_right(40, lost=1, false=("front",)) < 0.9


def test_the_programme_finds_the_best_of_all_namings():
    _, bodies = chain(3, top="L4", bottom="S1", false=("front",))
    single, pair, drop = naming_module._chain_scores(bodies, PRIOR)
    assert len(bodies) == 4
    scores = {}
    for naming in itertools.product(range(-1, single.shape[1]), repeat=len(bodies)):
        used = [(i, k) for i, k in enumerate(naming) if k >= 0]
        if not used:
            continue
        score = drop[: used[0][0]].sum() + drop[used[-1][0] + 1 :].sum() + sum(single[i, k] for i, k in used)
        score += sum(pair[i, j, k, m] for (i, k), (j, m) in itertools.pairwise(used))  # has what it skips in it
        scores[naming] = score
    best = max(scores, key=scores.get)
    assert naming_module._best_chain(single, pair, drop) == (
        [(i, k) for i, k in enumerate(best) if k >= 0],
        pytest.approx(scores[best]),
    )
    weight = np.exp(np.array(list(scores.values())))
    weight /= weight.sum()
    shares = naming_module._name_shares(single, pair, drop)
    for i, k in itertools.product(range(len(bodies)), range(single.shape[1])):
        expected = weight[[naming[i] == k for naming in scores]].sum()
        assert shares[i, k] == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_shares_are_honest():
    sure, doubtful = [], []
    for seed in range(150):
        corruptions = [dict(), dict(top="L2", bottom="L5", strength=1.0), dict(bottom="L4", flip=0.3)][seed % 3]
        truth, bodies = chain(seed, **corruptions)
        by_place = {id(v.corners_lps_mm): name for name, v in zip(truth, bodies)}
        sure_of = {id(v.corners_lps_mm): v.confidence for v in bodies}
        for v in name_vertebrae(bodies, PRIOR)[0]:
            place = id(v.corners_lps_mm)
            share = v.confidence / sure_of[place]
            # Without an S1 there is nothing to count from, whatever the share.
            assert (Source.UNCERTAIN in v.source) == (share < AMBIGUOUS_SHARE or bool(seed % 3))
            (sure if share > 0.9 else doubtful if share < AMBIGUOUS_SHARE else []).append(v.name == by_place[place])
    assert len(sure) > 250 and np.mean(sure) > 0.97
    assert len(doubtful) > 20 and 0.2 < np.mean(doubtful) < 0.9


def test_what_has_no_place_is_uncertain():
    truth, bodies = chain(1, false=("front", "twice"))
    result, _ = name_vertebrae(bodies, PRIOR)
    assert [v.name for v in result if v.name != UNCERTAIN] == [name for name in truth if name]
    (odd,) = [v for v in result if v.name == UNCERTAIN]  # the body seen twice is no other body
    named = np.stack([v.center_lps_mm for v in result if v is not odd])
    assert np.abs(named - odd.center_lps_mm).min(0)[1] > 10 and odd.source == Source.T2
    # It goes into vertebrae.csv, and no level is made of it.
    study = Study(5, [sagittal()])
    boxes, vertebrae = utils.locate_levels(study, Placement.of(None, lambda volume: bodies, PRIOR))
    assert [v.name for v in vertebrae].count(UNCERTAIN) == 1 and vertebrae[-1].name == UNCERTAIN
    assert {box.source for box in boxes} == {Source.T2} and min(box.confidence for box in boxes) > 0.3
    table = vertebrae_to_table(5, vertebrae)
    assert (table["vertebra"] == "uncertain").sum() == 1
    assert utils.vertebrae_from_table(table, 5)[-1].name == "uncertain"


def test_levels_say_when_the_numbering_is_ambiguous():
    bodies = [replace(v, source=Source.T2, confidence=0.9) for v in spine(2) if v.name in ("L2", "L3", "L4")]
    flat = [replace(v, name="", appearance=None) for v in bodies]
    study = Study(5, [sagittal()])
    between = [replace(v, corners_lps_mm=v.corners_lps_mm + [0, 0, 17.0]) for v in flat]  # L2 to L4, or L1 to L3?
    boxes, vertebrae = utils.locate_levels(study, Placement.of(None, lambda volume: between, PRIOR))
    assert [box.level for box in boxes] == list(utils.LEVELS)
    assert all(Source.UNCERTAIN in box.source for box in boxes) and max(box.confidence for box in boxes) < 0.6
    # Where the bodies lie in the series is weak evidence, but evidence.
    center = next(v for v in spine(2) if v.name == "L3").center_lps_mm
    at = PRIOR["layout_mm"]["L3"]
    for shift, names in ((0, ["L2", "L3", "L4"]), (40, ["L1", "L2", "L3"])):
        named, _ = name_vertebrae(flat, PRIOR, center - np.mean(at, 0) - [0, 0, shift])
        assert [v.name for v in named] == names


def test_patients_move_between_series():
    truth, first = chain(11)
    second = [replace(v, corners_lps_mm=v.corners_lps_mm + [3.0, 8.0, -10.0], source=Source.T1) for v in first]
    assert np.linalg.norm([3, 8, -10]) > 13  # more than half a body: nearest neighbours alone would double them
    merged = merge_vertebrae(first[:3] + first[4:], second)
    assert [v.source for v in merged] == [Source.T2] * 3 + [Source.T1] + [Source.T2] * (len(first) - 4)
    np.testing.assert_allclose(merged[3].center_lps_mm, first[3].center_lps_mm, atol=1e-6)
    assert len(merge_vertebrae(first, second[2:4])) == len(first)
    # One common body is no evidence for a motion, none is no problem.
    assert len(merge_vertebrae(first[:3], second[6:])) == 3 + len(second) - 6
    for one, other in (([], first), (first, [])):
        assert [id(v.appearance) for v in merge_vertebrae(one, other)] == [id(v.appearance) for v in first]


def test_a_body_at_the_border_counts_less(monkeypatch):
    volume = sagittal()
    corners = np.array([[20.0, 8], [20, 24], [36, 24], [36, 8]])

    def found(shift):
        one = {"corners_px": corners + [shift, 0], "score": 0.9, "logits": np.zeros(CLASSES)}
        monkeypatch.setattr(spinenet, "spinenet_maps", lambda model, images, batch_size: images)
        monkeypatch.setattr(spinenet, "decode_slices", lambda maps, resolution_mm: [[one] for _ in maps])
        (body,) = detect_vertebrae(type("Model", (), {"resolution_mm": 2.0}), volume)
        return body

    whole, half = found(0.0), found(-28.0)
    assert half.confidence == pytest.approx(whole.confidence / 2)
    # How much of it is in the image, however much the network draws beyond.
    assert whole.in_image_mm == np.inf and half.in_image_mm == pytest.approx(whole.height_mm / 2, rel=0.01)


# -- levels without a sagittal image


def sagittal():
    affine = np.eye(4)
    affine[:3, :3] = np.array([[4.4, 0, 0], [0, 0, 2.0], [0, -2.0, 0]])
    affine[:3, 3] = [-26.4, -70, 140]
    return Volume(np.zeros((13, 140, 70), np.float32), affine, 5, 1, "Sagittal T2/STIR", 0, np.arange(13) + 1)


def axial(center, normal, slices, block=0, step_mm=4.4, flip=False):
    """A stack around a point; normal: towards the head; flip: stored caudal first."""
    normal = np.asarray(normal, float)
    left = np.array([1.0, 0, 0]) - normal[0] * normal
    left /= np.linalg.norm(left)
    back = np.cross(normal, left)
    affine = np.eye(4)
    affine[:3, 0] = normal * step_mm * (1 if flip else -1)
    affine[:3, 1], affine[:3, 2] = back * 8, left * 8
    affine[:3, 3] = center - affine[:3, :3] @ ((np.array([slices, 24, 24]) - 1) / 2)
    array = np.zeros((slices, 24, 24), np.float32)
    return Volume(array, affine, 5, 3, "Axial T2", block, np.arange(slices) + 1, 4.0)


def true_boxes(truth):
    return {box.level: box for box in level_boxes(truth)}


def compare(boxes, truth):
    levels, table = boxes_to_table(5, boxes), vertebrae_to_table(5, truth)
    return utils.level_errors(levels, table).set_index("level")


@pytest.mark.parametrize("shown", [(0, 1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4), (-1, 0, 1, 2, 3, 4), (0, 2, 3, 4)])
def test_tilted_blocks_tell_the_discs(shown):
    right = []
    for seed in range(12):
        truth = spine(seed)
        names = [v.name for v in truth]
        rng = np.random.default_rng(seed)
        blocks = []
        for number, level in enumerate(shown):
            k = names.index("L1") + level
            upper, lower = [replace(truth[k + n], name=name) for n, name in ((0, "L1"), (1, "L2"))]
            (box,) = level_boxes([upper, lower])
            center = box.to_lps([rng.normal(0, 1.5), rng.normal(0, 3), 15.0])  # planned around the canal
            blocks.append(axial(center, box.axes[0], int(rng.integers(3, 7)), number, flip=seed % 2))
        if seed % 3 == 0:  # a second series repeats a block
            blocks.append(replace(blocks[-1], series_id=4))
        study = Study(5, blocks[::-1])
        boxes, vertebrae = utils.locate_levels(study, Placement.of(None, prior=PRIOR))
        table = compare(boxes, truth)
        inside = [level for k, level in enumerate(utils.LEVELS) if k in shown]
        right.append(table["named"].all() and (table.loc[inside, "along_mm"] < 6).all())
        assert (table.loc[inside, "source"] == "axial").all() and (table.loc[inside, "confidence"] == 0.3).all()
        outside = table.drop(inside)
        assert (outside["source"] == "axial+extrapolated").all() and (outside["confidence"] == 0.15).all()
        assert [v.name for v in vertebrae] == list(LUMBAR)
        if right[-1]:
            assert table.loc[inside, "angle_deg"].max() < 1e-3
        for box in boxes:
            np.testing.assert_allclose(box.axes @ box.axes.T, np.eye(3), atol=1e-9)
            assert np.linalg.det(box.axes) == pytest.approx(1)
    assert np.mean(right) >= (0.9 if len(shown) >= 4 else 0.75)


@pytest.mark.parametrize("first", [0, 2])
def test_one_stack_places_the_layout(first):
    named, prior_named = [], []
    for seed in range(12):
        truth = spine(seed)
        boxes = list(true_boxes(truth).values())
        top, bottom = boxes[first].center_lps_mm, boxes[-1].center_lps_mm
        normal = np.array([0, -0.09, 0.996])
        slices = int(round(((top - bottom) @ normal + 22) / 4.4)) + 1
        stack = axial((top + bottom) / 2 + [0, 15, 0], normal / np.linalg.norm(normal), slices, flip=seed % 2)
        # A sagittal series centred elsewhere, in which nothing is seen.
        off = replace(sagittal(), affine=sagittal().affine + np.array([[0] * 4, [0] * 4, [0, 0, 0, 22.0], [0] * 4]))
        found, _ = utils.locate_levels(Study(5, [off, stack]), Placement.of(None, prior=PRIOR))
        assert {box.source for box in found} == {Source.AXIAL} and {box.confidence for box in found} == {0.2}
        named.append(compare(found, truth)["named"].mean())
        found, _ = utils.locate_levels(Study(5, [off]), Placement.of(None, prior=PRIOR))
        assert {box.source for box in found} == {Source.PRIOR}
        prior_named.append(compare(found, truth)["named"].mean())
    assert np.mean(named) > 0.9 > np.mean(prior_named) + 0.1


def test_another_layout_moves_what_was_not_seen(tmp_path, monkeypatch):
    truth = spine(2)
    boxes = list(true_boxes(truth).values())
    study = Study(5, [axial(box.to_lps([0, 0, 15.0]), box.axes[0], 5, k) for k, box in enumerate(boxes)])
    save_study(study, tmp_path / "5.safetensors")
    paths = {5: tmp_path / "5.safetensors"}
    levels, vertebrae, anchors = utils.locate_studies(paths, Placement.of(None, prior=PRIOR))
    layout = {name: (np.array(corners) + [0, 6.0, 0]).tolist() for name, corners in PRIOR["layout_mm"].items()}
    other = PRIOR | {"layout_mm": layout}
    new_levels, new_bodies = locate_unseen(levels, vertebrae, anchors, other, paths)
    assert set(new_levels["source"]) == {"axial"} and len(new_bodies) == len(vertebrae) == 6
    moved = new_levels[["x_mm", "y_mm", "z_mm"]].to_numpy() - levels[["x_mm", "y_mm", "z_mm"]].to_numpy()
    normals = levels[["r00", "r01", "r02"]].to_numpy()
    assert np.abs((moved * normals).sum(1)).max() < 1e-6 and moved[:, 1].min() > 3  # within the blocks' planes
    assert locate_unseen(levels, vertebrae, anchors, other)[0].equals(levels)
    # Where the axial slices do not fit the other prior, it places the study around the series' centre.
    monkeypatch.setattr(locating_module, "axial_levels", lambda study, prior: None)
    unfit, _ = locate_unseen(levels, vertebrae, anchors, other, paths)
    assert len(unfit) == len(levels) and unfit["source"].str.startswith("prior").all()


def test_detections_come_before_axial_slices():
    truth, bodies = chain(4)
    stack = axial(bodies[4].center_lps_mm, [0, 0, 1.0], 30)
    study = Study(5, [sagittal(), stack])
    boxes, _ = utils.locate_levels(study, Placement.of(None, lambda volume: bodies, PRIOR))
    assert {box.source for box in boxes} == {Source.T2}
    boxes, vertebrae = utils.locate_levels(study, Placement.of(None, lambda volume: bodies[:1], PRIOR))
    assert {box.source for box in boxes} == {Source.AXIAL}
    assert [v.name for v in vertebrae] == [*LUMBAR, "uncertain"]
    with pytest.raises(ValueError, match="detector is 'other'"):
        utils.locate_levels(study, Placement.of(None, "other", PRIOR))


# -- many studies


class Detector:
    """Finds a given chain in every volume; counts, and fails where it is told to."""

    def __init__(self, bodies, fail_at=(), error=RuntimeError):
        self.bodies, self.calls, self.fail_at, self.error = bodies, 0, fail_at, error

    def __repr__(self):  # one detector, for what is kept of its results
        return "Detector"

    def __call__(self, volume):
        self.calls += 1
        if self.calls in self.fail_at:
            raise self.error("broken")
        shift = volume.study_id - 1
        return [replace(v, corners_lps_mm=v.corners_lps_mm + [0, 0, shift]) for v in self.bodies]


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path, capsys):
    _, bodies = chain(6)
    paths = {}
    for study_id in (3, 1, 2):
        paths[study_id] = tmp_path / f"{study_id}.safetensors"
        save_study(Study(study_id, [replace(sagittal(), study_id=study_id)]), paths[study_id])
    whole = utils.locate_studies(paths, Placement.of(None, Detector(bodies), PRIOR))
    assert list(whole[0]["study_id"].unique()) == [3, 1, 2] and len(whole[0]) == 15
    kept = tmp_path / "kept"
    killed = Detector(bodies, fail_at=(2,), error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        utils.locate_studies(paths, Placement.of(None, killed, PRIOR), kept)
    assert [file.name for file in kept.iterdir() if file.name == "3.json"]
    done = len(list(kept.glob("*.json")))
    again = Detector(bodies)
    result = utils.locate_studies(paths, Placement.of(None, again, PRIOR), kept, workers=2)
    assert again.calls == 3 - done < 3 and not list(kept.glob("*.part"))
    for a, b in zip(whole[:2], result[:2]):
        pd.testing.assert_frame_equal(a, b)
    for study_id in paths:
        np.testing.assert_array_equal(whole[2][study_id]["sagittal"], result[2][study_id]["sagittal"])
    # A damaged file and results of another prior are made anew.
    good = json.loads((kept / "1.json").read_text())
    damaged = [good | {"levels": "x"}, good | {"levels": []}, good | {"vertebrae": [{"x": 1}]}, good | {"anchors": [0]}]
    damaged += [good | {"numberings": [0]}, {key: value for key, value in good.items() if key != "numberings"}]
    damaged = map(json.dumps, [*damaged, good | {"anchors": {"axial": [0, 0, None]}}, [], 7])
    for text in ('{"key": ', "", "[" * 100_000, *damaged):
        (kept / "1.json").write_text(text)
        again = Detector(bodies)
        table, _, _ = utils.locate_studies(paths, Placement.of(None, again, PRIOR), kept)
        assert again.calls == 1 and json.loads((kept / "1.json").read_text()) == good
        pd.testing.assert_frame_equal(whole[0], table)
        assert f"{kept / '1.json'} is no result of study 1" in capsys.readouterr().out
    again = Detector(bodies)
    utils.locate_studies(paths, Placement.of(None, again, prior_of(range(9000, 9005))), kept)
    assert again.calls == 3


def test_a_failed_study_is_tried_again(tmp_path, capsys):
    _, bodies = chain(6)
    path = tmp_path / "1.safetensors"
    save_study(Study(1, [replace(sagittal(), study_id=1)]), path)
    levels, _, _ = utils.locate_studies({1: path}, Placement.of(None, Detector(bodies, (1,)), PRIOR), tmp_path / "kept")
    assert set(levels["source"]) == {"prior"} and "detection failed (RuntimeError: broken)" in capsys.readouterr().out
    levels, _, _ = utils.locate_studies({1: path}, Placement.of(None, Detector(bodies), PRIOR), tmp_path / "kept")
    assert set(levels["source"]) == {"t2"}
    keys = [Placement.of(SpineNet((4, 8), 1, 2.0), prior=PRIOR).key() for _ in range(2)]
    assert keys[0] != keys[1]  # of other weights


def test_a_detector_that_never_works_stops_the_run(tmp_path):
    _, bodies = chain(6)
    paths = {study_id: tmp_path / f"{study_id}.safetensors" for study_id in (1, 2, 3)}
    for study_id, path in paths.items():
        save_study(Study(study_id, [replace(sagittal(), study_id=study_id)]), path)
    with pytest.raises(RuntimeError, match="in all of 3 studies.*broken"):
        utils.locate_studies(paths, Placement.of(None, Detector(bodies, (1, 2, 3)), PRIOR))
    levels, _, _ = utils.locate_studies(paths, Placement.of(None, Detector(bodies, (1, 2)), PRIOR))
    assert levels.groupby("study_id")["source"].first().tolist() == ["prior", "prior", "t2"]
    paths[2].write_bytes(b"cut short")
    with pytest.raises(RuntimeError, match="2.safetensors cannot be read.*01"):
        utils.locate_studies(paths, Placement.of(None, Detector(bodies), PRIOR))


def test_inference_places_studies_as_the_training_did(tmp_path):
    """Where nothing is seen both take these patients' own layout; names come from the prior in both."""
    paths, chains = {}, {}
    for study_id in range(1, 24):
        paths[study_id] = tmp_path / f"{study_id}.safetensors"
        volume = replace(sagittal(), study_id=study_id)
        save_study(Study(study_id, [volume]), paths[study_id])
        _, bodies = chain(study_id)
        chains[study_id] = [replace(v, corners_lps_mm=v.corners_lps_mm + [0, 9, 14]) for v in bodies]
    chains[23] = []
    detect = lambda volume: chains[volume.study_id]  # noqa: E731
    model = SpineNet((4, 8), 1, 2.0)
    model.about = {"prior": PRIOR, "layout": "of another run"}
    levels, vertebrae = utils.locate_with_own_layout(paths, model, detector=detect)
    assert model.about["prior"] is PRIOR and model.about["layout"]["studies"] == 22
    for study_id in (4, 23):
        boxes, _ = utils.locate_levels(utils.load_study(paths[study_id]), Placement.of(model, detect))
        pd.testing.assert_frame_equal(
            boxes_to_table(study_id, boxes),
            levels[levels["study_id"] == study_id].reset_index(drop=True),
            check_dtype=False,
        )
    unseen = levels[levels["study_id"] == 23]
    assert set(unseen["source"]) == {"prior"}
    shift = unseen[["y_mm", "z_mm"]].to_numpy() - [
        box.center_lps_mm[1:] for box in level_boxes(complete_vertebrae([], {"sagittal": np.zeros(3)}, PRIOR))
    ]
    assert np.abs(np.median(shift, 0) - [9, 14]).max() < 6


def test_series_numbered_differently_leave_the_names_in_doubt():
    _, bodies = chain(6)
    bodies = bodies[:8]
    first = [replace(v, appearance=None, name=name) for v, name in zip(bodies, VERTEBRAE[1:])]
    second = [replace(v, appearance=None, name=name) for v, name in zip(bodies, VERTEBRAE)]
    merged = merge_vertebrae(first, second)
    assert [v.name for v in merged] == [v.name for v in first]
    for body, true in zip(merged, first):
        np.testing.assert_allclose(body.center_lps_mm, true.center_lps_mm, atol=1e-6)
    assert all(Source.UNCERTAIN in v.source for v in merged)
    agreed = merge_vertebrae(first, first)
    assert not any(Source.UNCERTAIN in v.source for v in agreed)


@pytest.mark.parametrize("factor, said", [(1.0, False), (1.6, True), (0.6, True)])
def test_bodies_of_no_adults_size_are_said(factor, said):
    square = np.array([[0.0, -17, 13], [0, 17, 13], [0, 17, -13], [0, -17, -13]])
    names = ("L1", "L2", "L3", "L4", "L5", "S1")
    bodies = [Vertebra(factor * (square - [0, 0, 35 * k]), 40.0, 0.9, name, Source.T2) for k, name in enumerate(names)]
    sentence = levels_module._odd_size(bodies)
    assert bool(sentence) == said
    if said:
        assert f"{34 * factor:.0f} mm deep" in sentence
    placed = [replace(body, source=Source.T2 | Source.EXTRAPOLATED) for body in bodies]
    assert levels_module._odd_size(placed) is None


# -- doubt about the numbering


def seen_as(bodies, likely=0.97):
    """Vertebrae without names, each of which looks like what it is."""
    result = []
    for v in bodies:
        p = np.full(len(SPINE_CLASSES), (1 - likely) / (len(SPINE_CLASSES) - 1))
        p[spine_class(v.name)] = likely
        result.append(replace(v, name="", source=Source.T2, confidence=0.9, appearance=np.log(p)))
    return result


@pytest.mark.parametrize("lowest", ["L4", "L5"])
def test_a_chain_without_s1_is_doubtful_and_has_a_second_numbering(lowest):
    truth = spine(3)
    bodies = truth[: [v.name for v in truth].index(lowest) + 1]
    named, second = name_vertebrae(seen_as(bodies), PRIOR)
    assert [v.name for v in named] == [v.name for v in bodies]  # the likeliest name is given all the same
    assert all(Source.UNCERTAIN in v.source for v in named)
    assert second is not None and second.step in (-1, 1) and 0.1 <= second.share < 0.5


def test_an_s1_that_the_border_cuts_is_nothing_to_count_from():
    truth = spine(3)
    bodies = seen_as(truth[: [v.name for v in truth].index("S1") + 1])
    *above, s1 = bodies
    for in_image_mm, doubted in ((np.inf, False), (0.9 * s1.height_mm, False), (0.5 * s1.height_mm, True)):
        last = replace(s1, in_image_mm=in_image_mm)
        named, _ = name_vertebrae([*above, last], PRIOR)
        assert named[-1].name == "S1" and {Source.UNCERTAIN in v.source for v in named} == {doubted}


def test_a_chain_with_s1_is_sure_and_has_none():
    named, second = name_vertebrae(seen_as(spine(3)), PRIOR)
    assert second is None and not any(Source.UNCERTAIN in v.source for v in named)


def test_the_second_numbering_moves_every_level_by_one(tmp_path):
    bodies = [v for v in spine(3) if v.name not in ("S1", "S2")]
    study = Study(1, [replace(sagittal(), study_id=1)])
    placement = Placement.of(None, lambda volume: seen_as(bodies), PRIOR)
    boxes, vertebrae = utils.locate_levels(study, placement)
    assert [box.second for box in boxes] == ["t12_l1", "l1_l2", "l2_l3", "l3_l4", "l4_l5"]
    others, share = second_boxes(study, boxes, vertebrae, placement)
    assert share == boxes[0].second_share == boxes[4].second_share and 0.1 <= share < 0.5
    for box, moved in zip(boxes[1:4], others[:3], strict=True):
        assert np.linalg.norm(box.center_lps_mm - moved.center_lps_mm) < 3.0
    table = utils.boxes_to_table(1, boxes)
    path = tmp_path / "levels.csv"
    table.to_csv(path, index=False)
    for box, read in zip(boxes, utils.boxes_from_table(pd.read_csv(path), 1), strict=True):
        assert (read.second, read.second_share, read.source) == (box.second, box.second_share, box.source)
    # Tables of earlier versions say nothing of it; nor does one whose levels are sure.
    for other in (table.drop(columns=["second", "second_share"]), table.assign(second="", second_share=0.0)):
        other.to_csv(path, index=False)
        read = utils.boxes_from_table(pd.read_csv(path), 1)
        assert {(box.second, box.second_share) for box in read} == {("", 0.0)}
        assert second_boxes(study, read, vertebrae, placement) is None
