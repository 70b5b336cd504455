"""SpineNet: targets, decoding, linking, naming, levels, training. Truth comes from a drawn spine, no network needed
except in the training tests."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

import utils
from lumbar import limits
from lumbar.data.geometry import boxes_to_table
from lumbar.data.resample import study_box
from lumbar.data.source import Source
from lumbar.data.volume import Study, Volume
from lumbar.engine import folded
from lumbar.names import VERTEBRAE
from lumbar.problems import Kind
from lumbar.spine import chain as chain_module
from lumbar.spine import levels as levels_module
from lumbar.spine import spinenet
from lumbar.spine.chain import merge_vertebrae, smooth_sideways
from lumbar.spine.fallbacks import complete_vertebrae, fit_level_prior, level_boxes, refit_level_prior, study_anchors
from lumbar.spine.level_scores import compare_with_labels
from lumbar.spine.levels import locate_levels_surely
from lumbar.spine.locating import locate_unseen
from lumbar.spine.naming import name_vertebrae
from lumbar.spine.placement import Placement
from lumbar.spine.spinenet import (
    SpineNet,
    decode_slices,
    detect_vertebrae,
    every_nth_slice,
    link_slices,
    sagittal_images,
    surest,
)
from lumbar.spine.spinenet_training import SpineSlices, spinenet_loss, spinenet_records, spinenet_targets
from lumbar.spine.vertebra import (
    SPINE_CLASSES,
    UNCERTAIN,
    VERTEBRA_TABLE_COLUMNS,
    Vertebra,
    polygon_iou,
    project_vertebrae,
    spine_class,
    vertebrae_to_table,
)

NAMES = VERTEBRAE  # T10 ... S2, head to foot
CLASSES = len(SPINE_CLASSES)


def spine(seed=0, names=NAMES, shift_mm=(0, 0, 0)):
    """True Vertebrae of a lordotic spine, built upwards from S2."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.9, 1.1)
    tilt_deg = dict(zip(NAMES, np.array([-14, -12, -11, -10, -6, 0, 8, 20, 38, 50]) * rng.uniform(0.7, 1.1)))
    position, vertebrae = np.array([0.0, 25.0, -110.0]) + shift_mm + rng.uniform(-6, 6, 3), []
    for name in NAMES[::-1]:
        angle = np.radians(tilt_deg[name])
        back, head = np.array([0, np.cos(angle), np.sin(angle)]), np.array([0, -np.sin(angle), np.cos(angle)])
        height, depth = (20 if name == "S2" else 27) * size, (22 if name == "S2" else 34) * size
        position = position + head * height / 2
        low_back = 0.65 if name[0] == "S" else 1.0  # the sacrum tapers
        corners = np.stack(
            [
                position + head * height / 2 - back * depth / 2,
                position + head * height / 2 + back * depth / 2,
                position - head * height / 2 + back * depth * (low_back - 0.5),
                position - head * height / 2 - back * depth / 2,
            ]
        )
        vertebrae.append(Vertebra(corners, 46.0 * size, 1.0, name, Source.TRUTH))
        position = position + head * (height / 2 + (3 if name == "S2" else 9) * size)
    return [v for v in vertebrae[::-1] if v.name in names]


def empty_volume(description="Sagittal T2/STIR", slices=13, rows=200, columns=110, spacing=(4.4, 2.0, 2.0)):
    affine = np.zeros((4, 4))
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = [spacing[0], 0, 0], [0, 0, -spacing[1]], [0, spacing[2], 0]
    affine[:, 3] = [-spacing[0] * (slices - 1) / 2, -spacing[2] * columns / 2, spacing[1] * rows / 2 + 60, 1]
    series = {"Sagittal T2/STIR": 1, "Sagittal T1": 2, "Axial T2": 3}[description]
    return Volume(
        np.zeros((slices, rows, columns), np.float32), affine, 7, series, description, 0, np.arange(1, slices + 1), 4.0
    )


def draw(volume, vertebrae, body=0.8):
    """The volume with the bodies filled in."""
    rows, columns = np.mgrid[: volume.array.shape[1], : volume.array.shape[2]]
    points = np.stack([rows, columns], -1)
    for index in range(len(volume.array)):
        corners_px, offset_mm = project_vertebrae(vertebrae, volume.affine, index)
        for vertebra, corners, offset in zip(vertebrae, corners_px, offset_mm):
            if abs(offset) < vertebra.width_mm / 2:
                inside = np.ones(rows.shape, bool)
                for k in range(4):
                    edge, rest = corners[k] - corners[k - 1], points - corners[k - 1]
                    inside &= edge[0] * rest[..., 1] - edge[1] * rest[..., 0] <= 0
                volume.array[index][inside] = body
    return volume


class Oracle(torch.nn.Module):
    """Answers with the targets of given Vertebrae. Its images say which volume and slice they are: every pixel is
    (100 * series + slice) / 1000."""

    def __init__(self, study, vertebrae_by_series, looks=0.9, resolution_mm=2.0):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.resolution_mm, self.about, self.maps = resolution_mm, {}, {}
        for volume in study.volumes:
            volume.array[:] = ((100 * volume.series_id + np.arange(len(volume.array))) / 1000)[:, None, None]
            vertebrae = vertebrae_by_series.get(volume.series_id, [])
            images, affine = sagittal_images(volume, resolution_mm)
            for index in range(len(images)):
                corners, offset = project_vertebrae(vertebrae, affine, index)
                seen = np.abs(offset) < [v.width_mm / 2 for v in vertebrae]
                classes = torch.tensor([spine_class(v.name) for v in vertebrae], dtype=torch.int64)[seen]
                targets = spinenet_targets(
                    torch.tensor(corners[seen]),
                    classes,
                    torch.ones(int(seen.sum()), dtype=torch.bool),
                    images.shape[2:],
                    1.5,
                )
                heat = targets["heat"].clamp(1e-6, 1 - 1e-6).logit()
                one_hot = torch.nn.functional.one_hot(targets["classes"].clamp(min=0), CLASSES).permute(2, 0, 1)
                logits = torch.log(one_hot * looks + (1 - looks) / CLASSES)
                self.maps[100 * volume.series_id + index] = torch.cat([heat, targets["vectors"], logits])

    def forward(self, x):
        return torch.stack([self.maps[int(round(float(image.mean()) * 1000))] for image in x])


def prior_of(*spines):
    """A prior from spines in studies whose sagittal series is centred at the origin."""
    table = pd.concat([vertebrae_to_table(k, v) for k, v in enumerate(spines)], ignore_index=True)
    anchors = {k: {"sagittal": np.zeros(3), "axial": np.array([1.0, 2.0, -30.0])} for k in range(len(spines))}
    return fit_level_prior(anchors, table)


PRIOR = prior_of(spine(1), spine(2), spine(3), spine(4))


def errors(boxes, truth):
    tables = boxes_to_table(7, boxes), vertebrae_to_table(7, truth)
    return utils.level_errors(*tables).set_index("level")


def test_left_is_left():
    for vertebra in spine():
        np.testing.assert_allclose(vertebra.left_lps, [1, 0, 0], atol=1e-12)


def test_targets_point_from_corners_to_the_centroid():
    corners = torch.tensor([[[10.0, 8], [10, 24], [22, 24], [22, 8]], [[28.0, 8], [28, 24], [40, 24], [40, 8]]])
    targets = spinenet_targets(corners, torch.tensor([1, 2]), torch.tensor([True, True]), (50, 40), 1.5)
    assert targets["heat"].shape == (5, 50, 40)
    for kind in range(4):
        for body in range(2):
            row, column = corners[body, kind].int().tolist()
            assert targets["heat"][kind, row, column] == pytest.approx(1, abs=1e-6)
            for d_row, d_column in ((0, 0), (1, 0), (0, -1)):
                assert targets["near"][kind, row + d_row, column + d_column]
                vector = targets["vectors"][2 * kind : 2 * kind + 2, row + d_row, column + d_column]
                landed = vector + torch.tensor([row + d_row, column + d_column])
                torch.testing.assert_close(landed, corners[body].mean(0))
    assert targets["classes"][16, 16] == 1 and targets["classes"][34, 16] == 2 and targets["classes"][0, 0] == -1
    assert (targets["weight"] == 1).all()


def test_a_grazed_body_does_not_count():
    corners = torch.tensor([[[10.0, 8], [10, 24], [22, 24], [22, 8]]])
    targets = spinenet_targets(corners, torch.tensor([1]), torch.tensor([False]), (50, 40), 1.5)
    assert targets["heat"].max() == 0 and not targets["near"].any()
    assert targets["weight"][0, 16, 16] == 0 and targets["weight"][0, 45, 16] == 1
    empty = spinenet_targets(
        torch.zeros(0, 4, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), (50, 40), 1.5
    )
    assert {k: v.shape for k, v in empty.items()} == {k: v.shape for k, v in targets.items()}


@pytest.mark.parametrize("turn", ["as stored", "rows up", "columns forward", "transposed", "left first"])
def test_images_keep_their_place_in_the_patient(turn):
    volume = empty_volume(rows=120, columns=90, spacing=(4.4, 1.3, 1.1))
    volume.array[6, 60:66, 40:46] = 1
    spot = volume.voxel_to_lps([6, 62.5, 42.5])
    array, affine = volume.array, volume.affine.copy()
    flip = {"rows up": 1, "columns forward": 2, "left first": 0}.get(turn)
    if flip is not None:
        array = np.flip(array, flip)
        affine[:3, 3] += affine[:3, flip] * (array.shape[flip] - 1)
        affine[:3, flip] *= -1
    if turn == "transposed":
        array, affine = array.transpose(0, 2, 1), affine[:, [0, 2, 1, 3]]
    images, image_affine = sagittal_images(replace(volume, array=array, affine=affine), 2.0)
    assert images.shape == (13, 1, 78, 50)  # 156 x 99 mm
    assert image_affine[2, 1] < 0 < image_affine[1, 2]
    weight = images[:, 0].numpy()
    where = (np.stack(np.mgrid[:13, :78, :50], -1) * weight[..., None]).sum((0, 1, 2)) / weight.sum()
    np.testing.assert_allclose(image_affine[:3, :3] @ where + image_affine[:3, 3], spot, atol=0.05)


def test_axial_slices_are_refused():
    volume = empty_volume()
    volume.affine[:3, :3] = volume.affine[:3, [1, 0, 2]]
    with pytest.raises(ValueError, match="axial, not sagittal"):
        sagittal_images(volume, 2.0)


def test_polygon_iou():
    square = np.array([[0, 0], [0, 2], [2, 2], [2, 0]])
    assert polygon_iou(square, square) == pytest.approx(1)
    assert polygon_iou(square, square[::-1] + [0, 1]) == pytest.approx(1 / 3)
    assert polygon_iou(square, square + 5) == 0
    diamond = np.array([[1, -0.5], [2.5, 1], [1, 2.5], [-0.5, 1]])
    assert polygon_iou(square, diamond) == pytest.approx(3.5 / (4 + 4.5 - 3.5))


def test_detection_recovers_the_drawn_spine():
    truth = spine(5)
    study = Study(7, [empty_volume()])
    found = detect_vertebrae(Oracle(study, {1: truth}), study.volumes[0])
    assert len(found) == len(truth)
    for vertebra, true in zip(found, truth):
        assert np.abs(vertebra.corners_lps_mm[:, 1:] - true.corners_lps_mm[:, 1:]).max() < 0.5
        assert abs(vertebra.center_lps_mm[0] - true.center_lps_mm[0]) < 2.5
        assert abs(vertebra.width_mm - true.width_mm) < 5
        assert vertebra.confidence > 0.8 and vertebra.source == Source.T2
        assert np.exp(vertebra.appearance).sum() == pytest.approx(1)
        assert vertebra.appearance.argmax() == spine_class(true.name)


def test_one_missing_corner_is_completed_and_two_are_not():
    truth = spine(5, names=("L3",))
    study = Study(7, [empty_volume()])
    oracle = Oracle(study, {1: truth})
    for maps in oracle.maps.values():
        maps[2] = -20.0  # no posterior-inferior corner anywhere
    found = detect_vertebrae(oracle, study.volumes[0])
    assert len(found) == 1
    assert np.abs(found[0].corners_lps_mm - truth[0].corners_lps_mm)[:, 1:].max() < 1
    for maps in oracle.maps.values():
        maps[3] = -20.0
    maps = torch.stack(list(oracle.maps.values()))
    maps[:, :5] = maps[:, :5].sigmoid()
    assert not any(decode_slices(maps, 2.0))
    assert detect_vertebrae(oracle, study.volumes[0]) == []


def test_a_body_ends_where_it_is_seen_less_surely():
    truth = [replace(v, width_mm=100.0) for v in spine(5, names=("L3",))]
    study = Study(7, [empty_volume()])
    oracle = Oracle(study, {1: truth})
    for key, maps in oracle.maps.items():
        if abs(study.volumes[0].voxel_to_lps([key - 100, 0, 0])[0]) > 20:  # as along a rib
            maps[:5] = (0.4 * maps[:5].sigmoid()).logit()
    (found,) = detect_vertebrae(oracle, study.volumes[0])
    assert abs(found.width_mm - 9 * 4.4) < 1e-6


def test_a_body_in_a_single_slice_is_dropped():
    corners = np.array([[10.0, 8], [10, 24], [22, 24], [22, 8]])
    detection = {"corners_px": corners, "score": 1.0, "logits": np.zeros(4)}
    other = detection | {"corners_px": corners + [30, 0]}
    tracks = link_slices([[detection], [detection, other], [], [detection | {"corners_px": corners + 1}]])
    assert sorted(len(track) for track in tracks) == [1, 3]  # the gap of one slice is bridged
    assert sorted(len(t) for t in link_slices([[detection], [], [], [detection]])) == [1, 1]


# -- bounds


class Noise(torch.nn.Module):
    """Sees bodies everywhere. Counts the pixels that went through it, in all and at most at a time."""

    resolution_mm = 2.0

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.about, self.pixels, self.most = {"prior": PRIOR}, 0, 0

    def forward(self, x):
        self.pixels, self.most = self.pixels + x.numel(), max(self.most, x.numel())
        maps = torch.randn((len(x), 13 + CLASSES, *x.shape[2:]), generator=torch.Generator().manual_seed(0))
        maps[:, 5:13] *= 2
        return maps


def many_slices(count, side=20, **options):
    return empty_volume(slices=count, rows=side, columns=side, **options)


def test_a_slice_larger_than_a_spine_is_refused_before_it_is_resampled(monkeypatch):
    monkeypatch.setattr(spinenet, "sagittal_images", None)
    for spacing in ((4.0, 9.9, 9.9), (4.0, 2.0, 9.9), (4.0, 9.9, 2.0), (4.0, 1e9, 1e9)):
        with pytest.raises(ValueError, match="larger than any image of a spine"):
            detect_vertebrae(Noise(), empty_volume(rows=200, columns=200, spacing=spacing))


def test_the_work_on_one_volume_is_bounded(monkeypatch):
    monkeypatch.setattr(spinenet, "MAX_SEARCHED_PX", 20_000)
    monkeypatch.setattr(spinenet, "MAX_SEARCHED_SLICES", 30)
    monkeypatch.setattr(spinenet, "_BATCH_PX", 1000)
    for volume, searched in ((many_slices(29), 29), (many_slices(31), 16), (many_slices(25, 60), 5)):
        model = Noise()
        detect_vertebrae(model, volume)
        side = volume.array.shape[1]
        assert model.pixels == searched * side**2 and model.most <= max(1000, side**2)


def test_every_nth_slice_stays_in_its_place():
    volume = many_slices(10)
    thinned = every_nth_slice(volume, 3)
    assert len(thinned.array) == 4 and thinned.instance_numbers.tolist() == [1, 4, 7, 10]
    np.testing.assert_allclose(thinned.voxel_to_lps([3, 5, 5]), volume.voxel_to_lps([9, 5, 5]))
    assert every_nth_slice(volume, 1) is volume


def test_the_batches_change_nothing(monkeypatch):
    truth = spine(5)
    study = Study(7, [empty_volume()])
    whole = detect_vertebrae(Oracle(study, {1: truth}), study.volumes[0])
    monkeypatch.setattr(spinenet, "_BATCH_PX", 1)
    monkeypatch.setattr(spinenet, "_CONVERTED_PX", 1)
    monkeypatch.setattr(spinenet, "_WINDOWS", 7)
    for one, other in zip(whole, detect_vertebrae(Oracle(study, {1: truth}), study.volumes[0]), strict=True):
        np.testing.assert_array_equal(one.corners_lps_mm, other.corners_lps_mm)
        np.testing.assert_array_equal(one.appearance, other.appearance)


def test_of_too_many_peaks_the_highest_count(monkeypatch):
    maps = Noise()(torch.zeros(2, 1, 90, 90))
    maps[:, :5] = maps[:, :5].sigmoid()
    every, values = spinenet._peaks(maps[:, :5], 2, 0.1, 10**6)
    some, best = spinenet._peaks(maps[:, :5], 2, 0.1, 7)
    assert len(every) > 10 * len(some) == 10 * 7 * 2 * 5
    for number in range(2):
        for kind in range(5):
            of = [(peaks[:, :2] == [number, kind]).all(1) for peaks in (every, some)]
            np.testing.assert_array_equal(np.sort(values[of[0], 0])[-7:], np.sort(best[of[1], 0]))
    monkeypatch.setattr(spinenet, "MAX_BODIES", 5)
    assert max(map(len, decode_slices(maps, 2.0))) <= 5


def test_of_too_many_bodies_the_surest_stay(monkeypatch):
    bodies = [replace(v, confidence=c) for v, c in zip(spine(5), (0.3, 0.9, 0.5, 0.9, 0.1), strict=False)]
    assert surest(bodies) == bodies
    monkeypatch.setattr(spinenet, "MAX_BODIES", 3)
    assert surest(bodies) == bodies[1:4]


@pytest.mark.slow
def test_a_study_of_many_volumes_is_thinned_and_noise_makes_no_endless_chain(monkeypatch):
    volumes = [replace(many_slices(9, 40), block=k, affine=many_slices(9, 40).affine) for k in range(6)]
    for k, volume in enumerate(volumes):
        volume.affine[1, 3] += 300 * k
    study = Study(7, volumes)
    model = Noise()
    boxes, vertebrae, problem = locate_levels_surely(study, model)
    assert model.pixels == 6 * 9 * 1600 and len(boxes) == 5 and problem is None
    monkeypatch.setattr(chain_module, "MAX_SEARCHED_PX", 3 * 9 * 1600)
    model = Noise()
    locate_levels_surely(study, model)
    assert model.pixels == 6 * 5 * 1600
    monkeypatch.setattr(spinenet, "MAX_BODIES", 6)
    _, vertebrae, _ = locate_levels_surely(study, Noise())
    assert len(vertebrae) <= 6 + len(utils.LEVELS) + 1


def test_a_series_that_cannot_be_searched_costs_itself():
    truth = spine(5)
    wide = replace(empty_volume(), series_id=9, affine=empty_volume().affine * [1, 9, 9, 1])
    study = Study(7, [empty_volume(), empty_volume("Sagittal T1")])
    oracle = Oracle(study, {1: truth, 2: truth})
    alone, _, said = locate_levels_surely(Study(7, study.volumes[:1]), Placement.of(oracle, prior=PRIOR))
    assert said is None
    both, _, said = locate_levels_surely(Study(7, [wide, study.volumes[0]]), Placement.of(oracle, prior=PRIOR))
    assert said.text.startswith("detection failed (ValueError: slices of") and said.text.endswith("in series 9")
    np.testing.assert_allclose([b.center_lps_mm for b in both], [b.center_lps_mm for b in alone], atol=1.0)
    boxes, _, said = locate_levels_surely(Study(7, [wide]), Placement.of(oracle, prior=PRIOR))
    assert said.text.endswith("the axial slices or the mean layout stand in") and len(boxes) == 5


def test_locating_ends_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(levels_module, "LOCATING_S", 0.0)
    study = Study(7, [many_slices(9), replace(many_slices(9), series_id=2)])
    boxes, _, said = locate_levels_surely(study, Noise())
    assert len(boxes) == 5 and {box.source for box in boxes} == {Source.PRIOR}
    assert said.text.startswith("detection failed (TookTooLong: more than 0 s of CPU time) in series 1, 2;")
    assert said.kind is Kind.TIME


def test_limits_nest_and_end_with_their_blocks():
    limits.check_limit()
    with limits.cpu_limit(0.05):
        with limits.cpu_limit(60.0, lambda: False):
            limits.check_limit()
            with pytest.raises(limits.TookTooLong, match="more than 0.05 s"):
                while True:
                    limits.check_limit()
        with limits.cpu_limit(60.0, lambda: True), pytest.raises(limits.TookTooLong):
            limits.check_limit()
    limits.check_limit()


def test_pieces_that_would_be_too_large_stay_apart(monkeypatch):
    pieces = [replace(many_slices(4), block=k, affine=many_slices(4).affine) for k in range(3)]
    for k, piece in enumerate(pieces):
        piece.affine[0, 3] += 6 * 4.4 * k
    (joined,) = chain_module.rejoined(pieces)
    assert len(joined.array) == 16 and joined.array.dtype == np.float32
    monkeypatch.setattr(chain_module, "_REJOINED_PX", 15 * 400)
    assert chain_module.rejoined(pieces) == pieces


def named(vertebrae):
    return [v.name for v in name_vertebrae(vertebrae, PRIOR)[0] if v.name != UNCERTAIN]


def anonymous(vertebrae, looks=0.85, confidence=0.9):
    """Detections: the true looks with this probability, all else alike."""
    result = []
    for v in vertebrae:
        p = np.full(CLASSES, (1 - looks) / (CLASSES - 1))
        p[spine_class(v.name)] = looks
        result.append(replace(v, name="", source=Source.T2, confidence=confidence, appearance=np.log(p)))
    return result


def test_naming_counts_up_from_the_sacrum():
    truth = spine(6)
    assert named(anonymous(truth)) == list(NAMES)
    # T12 is taken for a lumbar body and L1 for a thoracic one: S1 decides.
    chain = anonymous(truth)
    chain[2], chain[3] = [replace(chain[k], appearance=chain[5 - k].appearance) for k in (2, 3)]
    assert named(chain) == list(NAMES)
    # Nothing but the sacrum looks like anything.
    chain = [
        replace(v, appearance=np.log([0.4, 0.4, 0.1, 0.05, 0.05])) if v is not chain[-2] else v for v in chain[:-1]
    ]
    assert named(chain) == list(NAMES[:-1])


def test_naming_bridges_a_missed_body_and_drops_a_false_one():
    truth = spine(6)
    chain = anonymous(truth)
    assert named(chain[:5] + chain[6:]) == [n for n in NAMES if n != "L3"]
    false = replace(chain[5], corners_lps_mm=(chain[5].corners_lps_mm + chain[6].corners_lps_mm) / 2, confidence=0.35)
    assert named(chain[:6] + [false] + chain[6:]) == list(NAMES)
    beside = [
        replace(false, corners_lps_mm=false.corners_lps_mm + [30.0 * k, -80, k], confidence=0.2) for k in (-1, 0, 1, 2)
    ]
    assert named(chain[:6] + beside + chain[6:]) == list(NAMES)


def test_naming_is_unsure_without_the_sacrum():
    lumbar = [v for v in anonymous(spine(6)) if v.appearance.argmax() == 1][:3]
    sure, _ = name_vertebrae(anonymous(spine(6)), PRIOR)
    unsure, _ = name_vertebrae(lumbar, PRIOR)
    assert min(v.confidence for v in sure) > 0.8
    assert len(unsure) == 3 and max(v.confidence for v in unsure) < 0.6
    assert name_vertebrae([], PRIOR) == ([], None)


def test_sideways_an_outlier_goes_and_a_scoliosis_stays():
    bent = []
    for v in spine(6):
        x = 12 * np.cos((v.center_lps_mm[2] - 40) / 85)  # 12 mm to either side, a Cobb angle of 16 degrees
        bent.append(replace(v, corners_lps_mm=v.corners_lps_mm + [x, 0, 0]))
    smooth = smooth_sideways(bent)
    assert max(np.abs(a.center_lps_mm - b.center_lps_mm).max() for a, b in zip(smooth, bent)) < 2.5
    straight = spine(6)
    for k in (0, 4, 9):
        chain = list(straight)
        chain[k] = replace(chain[k], corners_lps_mm=chain[k].corners_lps_mm + [9, 0, 0])
        smooth = smooth_sideways(chain)
        # Beyond the last body there is nothing that would tell a bend from an outlier.
        least = 1.0 if k == 4 else 3.0
        assert max(np.abs(a.center_lps_mm - b.center_lps_mm).max() for a, b in zip(smooth, straight)) < least
        # What is known surely stays where it is.
        chain[k] = replace(chain[k], across_sd_mm=0.2)
        off = smooth_sideways([v if v is chain[k] else replace(v, across_sd_mm=8.0) for v in chain])[k]
        assert abs(off.center_lps_mm[0] - chain[k].center_lps_mm[0]) < 1.0
    assert smooth_sideways(straight[:2]) == straight[:2]


def test_levels_from_both_series():
    truth = spine(8)
    study = Study(7, [empty_volume(), empty_volume("Sagittal T1")])
    # The T2 series misses L2, the T1 series L4; patients move half a centimetre between series.
    moved = [replace(v, corners_lps_mm=v.corners_lps_mm + [0, 3, 4]) for v in truth]
    model = Oracle(study, {1: [v for v in truth if v.name != "L2"], 2: [v for v in moved if v.name != "L4"]})
    boxes, vertebrae = utils.locate_levels(study, Placement.of(model, prior=PRIOR))
    assert [v.name for v in vertebrae] == list(NAMES)
    assert [box.level for box in boxes] == list(utils.LEVELS)
    table = errors(boxes, truth)
    assert table["named"].all() and table["error_mm"].max() < 5
    assert list(table["source"]) == ["t2+t1", "t2+t1", "t2", "t2", "t2"]
    assert table.loc[["l3_l4", "l4_l5", "l5_s1"], "error_mm"].max() < 2.5
    for box in boxes:
        np.testing.assert_allclose(box.axes @ box.axes.T, np.eye(3), atol=1e-9)
        assert box.axes[0, 2] > 0.5 and box.axes[1, 0] > 0.9 and box.axes[2, 1] > 0.5  # head, left, back
        assert 25 < box.extent_mm[0] < 50 and 35 < box.extent_mm[1] < 60 and 25 < box.extent_mm[2] < 45
    assert table["angle_deg"].max() < 2


@pytest.mark.parametrize("seen", [("L5", "S1", "S2"), ("T12", "L1", "L2", "L4", "L5", "S1"), ("S1",)])
def test_missing_levels_are_extrapolated(seen):
    truth = spine(9)
    study = Study(7, [empty_volume()])
    model = Oracle(study, {1: [v for v in truth if v.name in seen]}, looks=0.999)
    model.about["prior"] = PRIOR
    boxes, vertebrae = utils.locate_levels(study, model)
    assert [box.level for box in boxes] == list(utils.LEVELS)
    table = errors(boxes, truth)
    if "L4" in seen:
        assert table["named"].all() and table["error_mm"].max() < 3
        assert list(table["source"]) == ["t2", "t2+extrapolated", "t2+extrapolated", "t2", "t2"]
    else:
        assert table["error_mm"].max() < 25
        assert list(table["confidence"]) == sorted(table["confidence"])
    by_source = table.groupby(table["source"].str.contains("extrapolated"))["confidence"]
    if by_source.ngroups == 2:
        assert by_source.max()[True] < by_source.min()[False]
    assert {v.name for v in vertebrae} >= {"L1", "L2", "L3", "L4", "L5", "S1"}


@pytest.mark.parametrize("missing", [("S1",), ("L1",), ("L4", "L5"), ("L1", "L2")])
def test_extrapolation_follows_a_curve_sideways(missing):
    straight = [v for v in spine(6) if v.name in ("T12", "L1", "L2", "L3", "L4", "L5", "S1")]

    def leaning(slope):
        return [replace(v, corners_lps_mm=v.corners_lps_mm + [slope * v.center_lps_mm[2], 0, 0]) for v in straight]

    def off_mm(truth):
        seen = [v for v in truth if v.name not in missing]
        placed = {v.name: v for v in complete_vertebrae(seen, {}, PRIOR)}
        return max(abs(placed[v.name].center_lps_mm[0] - v.center_lps_mm[0]) for v in truth if v.name in missing)

    assert off_mm(leaning(0.25)) < off_mm(leaning(0.0)) + 4.0  # by 10 mm a body
    alone = complete_vertebrae([v for v in leaning(0.25) if v.name == "L3"], {}, PRIOR)
    assert np.ptp([v.center_lps_mm[0] for v in alone]) < 5.0


def test_extrapolation_follows_posture_and_size():
    turn, names = np.radians(14), [name for name in PRIOR["layout_mm"] if name != "L3"]

    def patient(name):
        x, y, z = 1.1 * np.array(PRIOR["layout_mm"][name]).T
        y, z = np.cos(turn) * y - np.sin(turn) * z, np.sin(turn) * y + np.cos(turn) * z
        return Vertebra(np.stack([x, y, z], 1) + [5, 6, 7], 46.0, 0.9, name, Source.T2)

    complete = complete_vertebrae([patient(name) for name in names], {}, PRIOR)
    found = {v.name: v for v in complete}["L3"]
    np.testing.assert_allclose(found.corners_lps_mm[:, 1:], patient("L3").corners_lps_mm[:, 1:], atol=1e-6)
    assert found.source == (Source.T2 | Source.EXTRAPOLATED) and found.confidence == pytest.approx(0.45)


def test_a_box_lies_between_the_end_plates():
    upper = np.array([[2.0, 0, 58], [2, 30, 58], [2, 30, 33], [2, 0, 30]])
    lower = np.array([[2.0, 0, 20], [2, 30, 23], [2, 30, -5], [2, 0, -5]])
    (box,) = level_boxes([Vertebra(upper, 44, 0.9, "L4", Source.T2), Vertebra(lower, 48, 0.7, "L5", Source.T1)])
    np.testing.assert_allclose(box.center_lps_mm, [2, 15, 26.5])
    assert box.level == "l4_l5" and box.confidence == 0.7 and box.source == (Source.T2 | Source.T1)
    tilt = np.arctan2(3, 30)
    np.testing.assert_allclose(box.axes[0], [0, -np.sin(tilt), np.cos(tilt)], atol=1e-9)
    assert box.extent_mm[1] == 46 and box.extent_mm[2] == pytest.approx(np.hypot(30, 3))
    assert box.extent_mm[0] == pytest.approx((44.75 - 8.25) * np.cos(tilt))


def test_nothing_found_gives_the_prior():
    study = Study(7, [empty_volume()])
    model = Oracle(study, {})
    for use in (model, None):
        boxes, vertebrae = utils.locate_levels(study, Placement.of(use, prior=PRIOR))
        assert {box.source for box in boxes} == {Source.PRIOR} and {box.confidence for box in boxes} == {0.1}
        assert len(boxes) == 5 and len(vertebrae) == 6
    anchor = study_anchors(study)["sagittal"]
    layout = np.array(PRIOR["layout_mm"]["L3"]).mean(0)
    np.testing.assert_allclose([v for v in vertebrae if v.name == "L3"][0].center_lps_mm, anchor + layout, atol=1e-9)
    # Only axial slices, too few to tell which discs they cover: their centre stands for the sagittal one's.
    axial = replace(
        empty_volume("Axial T2", slices=9), affine=np.array([[0, 0, 1.0, 5], [0, 1, 0, 6], [4, 0, 0, 7], [0, 0, 0, 1]])
    )
    boxes, vertebrae = utils.locate_levels(Study(7, [axial]), Placement.of(None, prior=PRIOR))
    center = study_box(Study(7, [axial]))[0]
    np.testing.assert_allclose(vertebrae[2].center_lps_mm, center - PRIOR["axial_mm"] + layout, atol=1e-9)
    boxes, _ = utils.locate_levels(Study(7, []), Placement.of(None, prior=PRIOR))
    assert len(boxes) == 5 and {box.confidence for box in boxes} == {0.0}
    with pytest.raises(ValueError, match="without a prior"):
        Placement.of(None)


def test_the_prior_becomes_the_patients_own():
    paths_anchor = {k: {"sagittal": np.array([0.0, 10.0 * (k % 3), 0.0])} for k in range(25)}
    seen = pd.concat([vertebrae_to_table(k, [replace(v, source=Source.T2) for v in spine(k)]) for k in range(25)])
    own = refit_level_prior(paths_anchor, seen, PRIOR)
    assert own["studies"] == 25 and own["layout_mm"] != PRIOR["layout_mm"]
    assert refit_level_prior(paths_anchor, seen[seen["study_id"] < 10], PRIOR) is PRIOR
    assert refit_level_prior(paths_anchor, seen.assign(source="prior"), PRIOR) is PRIOR
    boxes, vertebrae = utils.locate_levels(Study(30, [empty_volume()]), Placement.of(None, prior=PRIOR))
    levels = pd.concat([boxes_to_table(k, level_boxes(spine(k))) for k in range(2)] + [boxes_to_table(30, boxes)])
    bodies = pd.concat([seen[seen["study_id"] < 2], vertebrae_to_table(30, vertebrae)])
    moved = PRIOR | {"layout_mm": {k: (np.array(v) + [0, 0, 5]).tolist() for k, v in PRIOR["layout_mm"].items()}}
    anchors = {30: study_anchors(Study(30, [empty_volume()]))}
    new_levels, new_bodies = locate_unseen(levels, bodies, anchors, moved)
    assert len(new_levels) == len(levels) and len(new_bodies) == len(bodies)
    difference = new_levels.set_index(["study_id", "level"])["z_mm"] - levels.set_index(["study_id", "level"])["z_mm"]
    assert (difference[30] - 5).abs().max() < 1e-9 and (difference.drop(30) == 0).all()


def test_prior_names_what_it_lacks():
    with pytest.raises(ValueError, match="L1"):
        prior_of(spine(1, names=("L2", "L3", "L4", "L5", "S1")))


def test_tables_keep_what_they_are_given():
    truth = spine(3)
    table = vertebrae_to_table(12, truth)
    assert list(table.columns) == VERTEBRA_TABLE_COLUMNS
    back = utils.vertebrae_from_table(table, 12)
    for a, b in zip(truth, back):
        np.testing.assert_allclose(a.corners_lps_mm, b.corners_lps_mm)
        assert (a.name, a.width_mm, a.source) == (b.name, b.width_mm, b.source)
    assert utils.vertebrae_from_table(table, 13) == []
    json.dumps(PRIOR)


def test_scores_tell_shifted_from_misnamed():
    truth = spine(3)
    table = vertebrae_to_table(12, truth)
    moved = [replace(v, corners_lps_mm=v.corners_lps_mm + [0, 0, 3.0], source=Source.T2) for v in truth]

    def score(vertebrae):
        levels = boxes_to_table(12, level_boxes(vertebrae))
        return utils.locating_scores(levels, vertebrae_to_table(12, vertebrae), table)

    scores = score(moved)
    assert scores["right"] == scores["named"] == scores["vertebrae_found"] == scores["vertebrae_named"] == 1
    assert scores["median_mm"] == pytest.approx(3) and scores["median_angle_deg"] == pytest.approx(0, abs=1e-3)
    # Everything is called by the name of its upper neighbour; S1 was not seen.
    wrong = [replace(v, name=NAMES[k]) for k, v in enumerate(moved[1:])]
    wrong = [replace(v, source=Source.T2 | Source.EXTRAPOLATED) if v.name == "L5" else v for v in wrong]
    scores = score(wrong)
    assert scores["named"] < 0.3 and scores["right"] == scores["vertebrae_named"] == 0
    assert scores["vertebrae_found"] == pytest.approx(5 / 6)


def test_phantom_truth_becomes_a_vertebra_table(tmp_path):
    table = vertebrae_to_table(12, spine(3)).drop(columns=["width_mm", "confidence", "source"])
    table = table.assign(split=["train"] * 6 + ["test"] * 4, half_width_mm=21.5, normal_x=0.0)
    table.to_csv(tmp_path / "phantom_vertebrae.csv", index=False)
    truth = utils.read_vertebra_truth(tmp_path / "phantom_vertebrae.csv", "train")
    assert len(truth) == 6 and utils.vertebrae_from_table(truth, 12)[0].width_mm == 43
    with pytest.raises(FileNotFoundError, match="only phantom data"):
        utils.read_vertebra_truth(tmp_path / "absent.csv")
    table.drop(columns="ps_y_mm").to_csv(tmp_path / "broken.csv", index=False)
    with pytest.raises(ValueError, match="ps_y_mm"):
        utils.read_vertebra_truth(tmp_path / "broken.csv")


def test_merging_joins_what_both_series_saw():
    first, second = anonymous(spine(6), looks=0.9), anonymous(spine(6), looks=0.5)
    second = [replace(v, corners_lps_mm=v.corners_lps_mm + [2, 3, 4], source=Source.T1) for v in second]
    merged = merge_vertebrae(first[2:6], second[4:])
    assert [v.source for v in merged] == [Source.T2] * 4 + [Source.T1] * 4
    both = np.exp(merged[3].appearance)
    assert both.sum() == pytest.approx(1) and 0.5 < both.max() < 0.9
    assert np.exp(merged[0].appearance).max() == pytest.approx(0.9)
    sure = replace(second[4], confidence=1.0)
    assert merge_vertebrae([replace(first[4], confidence=0.2)], [sure])[0].source == Source.T1


def test_label_points_in_the_frame_of_their_box():
    truth = spine(3)
    volume = empty_volume()
    boxes = level_boxes(truth)
    rows = []
    for box in boxes:
        slice_, row, column = volume.lps_to_voxel(box.center_lps_mm)
        rows.append(
            {
                "series_id": 1,
                "instance_number": int(round(slice_)) + 1,
                "level": box.level,
                "x_px": column,
                "y_px": row,
                "condition": "spinal_canal_stenosis",
            }
        )
    rows.append(rows[0] | {"instance_number": 999})  # no such file
    rows.append(rows[0] | {"level": "l2_l3"})  # labelled one too low
    table = compare_with_labels(boxes, pd.DataFrame(rows), Study(7, [volume]))
    assert len(table) == 6
    assert table["head_mm"][:5].abs().max() < 1e-6 and table["left_mm"].abs().max() <= 2.3
    assert list(table["nearest"]) == ["l1_l2", "l2_l3", "l3_l4", "l4_l5", "l5_s1", "l1_l2"]
    assert table["head_mm"][5] > 20


def test_slices_beside_a_body_do_not_show_it():
    truth = spine(20)
    records = spinenet_records(Study(1, [empty_volume(slices=21)]), truth, 2.0)
    assert len(records) == 21
    shown = [len(record["corners_px"]) for record in records]
    assert shown[0] == shown[-1] == 0 and 9 <= np.count_nonzero(shown) <= 13


def test_crops_stay_on_the_image():
    nobody = {"corners_px": torch.zeros(0, 4, 2), "classes": torch.zeros(0).long(), "certain": torch.zeros(0).bool()}
    data = SpineSlices([{"image": torch.ones(150, 110).half(), **nobody}], 60, (96, 64), 1.5)
    data._contrast = lambda image, rng: image
    assert min(float((data[k]["image"] > 0.5).float().mean()) for k in range(60)) > 0.6


def small_records(count=3):
    records = []
    for seed in range(count):
        truth = spine(20 + seed)
        volume = draw(empty_volume(), truth)
        records += spinenet_records(Study(seed, [volume]), truth, 2.0)
    return records


def test_records_hold_bodies_where_the_image_shows_them():
    records = small_records(1)
    middle = records[len(records) // 2]
    assert middle["image"].dtype == torch.float16 and len(middle["corners_px"]) == len(NAMES)
    assert middle["certain"].all() and not all(record["certain"].all() for record in records)
    for corners in middle["corners_px"]:
        row, column = corners.mean(0).round().int().tolist()
        assert middle["image"][row, column] > 0.7
        outside = (corners[0] + (corners[0] - corners.mean(0)) * 0.25).round().int().tolist()
        assert middle["image"][outside[0], outside[1]] < 0.3


def test_crops_move_image_and_corners_alike():
    data = SpineSlices(small_records(1)[5:8], 40, (96, 64), 1.5, seed=3)
    data._contrast = lambda image, rng: image
    inside = []
    for k in range(len(data)):
        item = data[k]
        assert item["image"].shape == (1, 96, 64) and item["heat"].shape == (5, 96, 64)
        peaks = torch.nonzero(item["heat"][4] > 0.98)
        inside += [float(item["image"][0, r, c]) for r, c in peaks]
    assert len(inside) > 60 and np.mean(np.array(inside) > 0.7) > 0.97
    again, first = data[7], SpineSlices(small_records(1)[5:8], 40, (96, 64), 1.5, seed=3)
    first._contrast = data._contrast
    torch.testing.assert_close(again["image"], first[7]["image"], rtol=0, atol=0)


SMALL = dict(widths=(8, 16), steps=24, batch_size=4, crop_px=(64, 48), learning_rate=5e-3)


@pytest.mark.slow
def test_training_learns_and_continues_after_a_kill(tmp_path, monkeypatch):
    records = small_records(2)
    whole, history = utils.train_spinenet(records, tmp_path / "whole", validation=records[:4], **SMALL)
    heat = history[history["split"] == "train"]["heat"].to_numpy()
    assert len(heat) == 24 and heat[-4:].mean() < 0.92 * heat[:4].mean()
    assert len(history[history["split"] == "validation"]) == 8

    calls = []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return loss_function(*args, **kwargs)

    loss_function = spinenet_loss
    monkeypatch.setattr("lumbar.spine.spinenet_training.spinenet_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        utils.train_spinenet(records, tmp_path / "cut", save_every_s=0, **SMALL)
    continued, history_cut = utils.train_spinenet(records, tmp_path / "cut", **SMALL)
    assert len(calls) == 11 + 24 - 10  # ten steps were saved
    assert list(history_cut["step"]) == list(range(1, 25))
    for (name, a), b in zip(whole.state_dict().items(), continued.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_training_needs_images(tmp_path):
    with pytest.raises(ValueError, match="no training image"):
        utils.train_spinenet([], tmp_path)


def test_weights_survive_the_file(tmp_path):
    model = SpineNet((8, 16), 2, 1.5).eval()
    model.about = {"prior": PRIOR}
    utils.save_spinenet(model, tmp_path / "spinenet.safetensors")
    loaded = utils.load_spinenet(tmp_path / "spinenet.safetensors")
    assert loaded.about == model.about and loaded.resolution_mm == 1.5 and not loaded.training
    images = torch.rand(2, 1, 37, 50)  # any size
    output = loaded(images)
    assert output.shape == (2, 13 + CLASSES, 37, 50)
    torch.testing.assert_close(output, model(images))
    # Whatever an untrained network answers, every level gets a box.
    study = Study(7, [draw(empty_volume(), spine(2))])
    boxes, _ = utils.locate_levels(study, loaded)
    assert [box.level for box in boxes] == list(utils.LEVELS)
    with pytest.raises(FileNotFoundError, match="02_train_spinenet"):
        utils.load_spinenet(tmp_path / "absent.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="without SpineNet's metadata"):
        utils.load_spinenet(tmp_path / "other.safetensors")


def test_plot_returns_its_axes():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    truth = spine(3)
    figure, ax = plt.subplots()
    assert utils.plot_vertebrae(ax, draw(empty_volume(), truth), 6, truth, level_boxes(truth)) is ax
    assert {text.get_text() for text in ax.texts} >= {"L1", "S1"}
    assert utils.plot_spinenet_target(ax, SpineSlices(small_records(1), 2, (96, 64), 1.5)[0]) is ax
    history = pd.DataFrame({"step": [1, 2, 2], "loss": [2.0, 1.0, 1.5], "split": ["train", "train", "validation"]})
    assert utils.plot_spinenet_history(ax, history) is ax
    table = utils.level_errors(boxes_to_table(7, level_boxes(truth)), vertebrae_to_table(7, truth))
    assert utils.plot_level_errors(ax, table, [7]) is ax
    plt.close(figure)


@pytest.mark.parametrize("lean_deg", [-15.0, 0.0, 12.0])
def test_boxes_follow_a_scoliosis(lean_deg):
    """Corners of detected bodies lie in the slices' plane; the disc's tilt to the side shows in their centres."""
    lean = np.radians(lean_deg)
    turn = np.array([[np.cos(lean), 0, np.sin(lean)], [0, 1, 0], [-np.sin(lean), 0, np.cos(lean)]])
    upright = spine(4)
    leaning = [replace(v, corners_lps_mm=v.corners_lps_mm @ turn.T) for v in upright]
    seen = []
    for v in leaning:  # each body's corners as a slice along the patient's axes shows them
        corners = v.corners_lps_mm.copy()
        corners[:, 0] = v.center_lps_mm[0]
        seen.append(replace(v, corners_lps_mm=corners, source=Source.T2))
    for straight, true, found in zip(level_boxes(upright), level_boxes(leaning), level_boxes(seen)):
        np.testing.assert_allclose(true.axes, straight.axes @ turn.T, atol=1e-9)
        assert np.degrees(np.arccos(np.clip(true.axes[0] @ found.axes[0], -1, 1))) < 2.5
        np.testing.assert_allclose(found.axes @ found.axes.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(found.axes) > 0.99


def test_pieces_of_a_series_are_looked_at_as_one():
    """Slices are missing: the reader gives pieces, of which none shows the bodies' middle."""
    rng = np.random.default_rng(0)
    whole = replace(empty_volume(slices=13), array=rng.random((13, 20, 10)).astype(np.float32))

    def piece(slices, block):
        affine = whole.affine.copy()
        affine[:3, 3] = whole.voxel_to_lps([slices[0], 0, 0])
        return replace(
            whole,
            array=whole.array[slices],
            affine=affine,
            block=block,
            instance_numbers=whole.instance_numbers[slices],
        )

    pieces = [piece(slices, k) for k, slices in enumerate(([0, 1], [3, 4], [6, 7, 8], [11, 12]))]
    seen = []
    study = Study(7, pieces[::-1] + [replace(pieces[0], series_id=99)])
    utils.locate_levels(study, Placement.of(None, lambda volume: seen.append(volume) or [], PRIOR))
    one, other = sorted(seen, key=lambda volume: -len(volume.array))
    assert other.series_id == 99 and other.array is pieces[0].array
    np.testing.assert_allclose(one.affine, whole.affine, atol=1e-9)
    assert one.array.shape == whole.array.shape and set(one.instance_numbers) < set(whole.instance_numbers)
    for k in (0, 1, 3, 4, 6, 7, 8, 11, 12):
        np.testing.assert_allclose(one.array[k], whole.array[k], atol=1e-6)
    np.testing.assert_allclose(one.array[2], (whole.array[1] + whole.array[3]) / 2, atol=1e-6)
    np.testing.assert_allclose(one.array[9], (2 * whole.array[8] + whole.array[11]) / 3, atol=1e-6)


def one_by_one(shown):
    """The slices that a search from the middle looks at, when each is looked at alone."""
    seen = [[] for _ in shown]
    ahead = [list(range(len(shown) // 2, len(shown))), list(range(len(shown) // 2 - 1, -1, -1))]
    empty, last = [0, 0], [0, 0]
    while any(ahead):
        for side in (0, 1):
            if ahead[side]:
                index = ahead[side].pop(0)
                seen[index] = shown[index]
                empty[side] = 0 if shown[index] else empty[side] + 1
                last[side] = len(shown[index]) or last[side]
        if any(seen):
            few = [0 < last[side] <= max(map(len, seen)) / 2 for side in (0, 1)]
            ahead = [[] if empty[side] > (0 if few[side] else 1) else ahead[side] for side in (0, 1)]
    return seen


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_slices_that_are_looked_at_together_are_those_of_one_by_one(batch_size, monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(1, 25))
        # Slices with a body and without, or with several: anyhow.
        bodies = rng.integers(1, rng.choice([2, 8]), count) * (rng.random(count) < rng.choice([0.1, 0.5, 0.9]))
        shown = [[k] * int(several) for k, several in enumerate(bodies)]
        looked = []

        def look(model, images, size, shown=shown, looked=looked):
            assert size == batch_size
            looked.append(len(images))
            return [shown[int(k)] for k in images.flatten()]

        monkeypatch.setattr(spinenet, "_all_slices", look)
        found = spinenet._slices_from_the_middle(None, torch.arange(count), batch_size)
        assert found == one_by_one(shown) and sum(looked) <= count
        assert batch_size > 1 or max(looked) <= 2


@pytest.mark.parametrize(
    "bodies, looked_at",
    [
        ([2, 0, 0, 8, 8, 8, 8, 8, 0, 0, 1], slice(1, 10)),  # what comes beyond two empty slices is no spine
        ([2, 0, 3, 8, 8, 8, 8, 8, 4, 0, 1], slice(1, 10)),  # nor beyond one, where the spine had thinned out
        ([7, 0, 8, 8, 8, 8, 8, 8, 0, 5, 2], slice(0, 11)),  # one that was missed within the spine
    ],
)
def test_a_search_ends_beside_the_spine(bodies, looked_at, monkeypatch):
    shown = [[k] * several for k, several in enumerate(bodies)]
    monkeypatch.setattr(spinenet, "_all_slices", lambda model, images, size: [shown[int(k)] for k in images])
    found = spinenet._slices_from_the_middle(None, torch.arange(len(bodies)), 8)
    assert found == [slice_ if k in range(len(bodies))[looked_at] else [] for k, slice_ in enumerate(shown)]


def test_maps_are_read_where_they_are_asked_for():
    """Heat everywhere and the rest at pixels are what the whole network says, of any size, batch and channels."""
    rng = np.random.default_rng(1)
    for seed in range(8):
        torch.manual_seed(seed)
        model = SpineNet(widths=rng.integers(4, 20, rng.integers(1, 5)).tolist(), blocks=int(rng.integers(1, 3)))
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(norm.running_mean), torch.nn.init.uniform_(norm.running_var, 0.5, 2)
            torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        model.eval()
        images = torch.randn(5, 1, *rng.integers(8, 70, 2).tolist())
        with torch.no_grad():
            expected = model(images)
        maps = spinenet.spinenet_maps(model, images, int(rng.integers(1, 7)))
        torch.testing.assert_close(maps.heat, expected[:, :5].sigmoid(), atol=1e-4, rtol=1e-3)
        number, row, column = (rng.integers(0, size, 60) for size in (5, *images.shape[2:]))
        where = expected[number, 5:, row, column]
        torch.testing.assert_close(torch.from_numpy(maps.read(number, row, column)), where, atol=1e-3, rtol=1e-3)
        assert maps.read(*np.zeros((3, 0), int)).shape == (0, where.shape[1])
        assert spinenet.SpineMaps.of_output(expected).read(number, row, column) == pytest.approx(where.numpy())
        # Weights that change are not answered by a copy of the old ones.
        with torch.no_grad():
            model.stem[2].bias += 1
            expected = model(images)[:, :5].sigmoid()
        torch.testing.assert_close(spinenet.spinenet_maps(model, images, 4).heat, expected, atol=1e-4, rtol=1e-3)


def test_a_copy_with_folded_norms_is_never_an_old_one():
    """Whatever changes the weights: in place, by others in their place, in inference mode."""
    model, x = SpineNet(widths=[8, 8]).eval(), torch.randn(1, 1, 16, 16)
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}

    def same():
        with torch.no_grad():
            torch.testing.assert_close(folded(model)(x), model(x), atol=1e-4, rtol=1e-4)

    same()
    assert folded(model) is folded(model) and folded(model) is not model
    model.load_state_dict(changed, strict=False, assign=True)
    same()
    with torch.no_grad():
        model.stem[2].running_var.mul_(4)
    same()
    model.train()
    assert folded(model) is model
    model.eval().stem.train()
    assert folded(model) is model
    model.eval()
    with torch.inference_mode():
        model = SpineNet(widths=[8]).eval()
        same()
        model.stem[1].weight.mul_(2)
        same()


def test_peaks_are_those_of_a_maximum_filter():
    rng = np.random.default_rng(3)
    for _ in range(40):
        shape = (2, 2, *rng.integers(1, 30, 2))
        heat = rng.integers(0, 12, shape).astype(np.float32) / 12  # with plateaus
        radius_px = int(rng.integers(1, 5))
        where, _ = spinenet._peaks(torch.from_numpy(heat), radius_px, 0.3, 10_000)
        window = (1, 1, 2 * radius_px + 1, 2 * radius_px + 1)
        highest = ndimage.maximum_filter(heat, size=window, mode="constant", cval=0.0)
        assert (where == np.argwhere((heat > 0.3) & (heat >= highest))).all()


def test_images_of_any_size_keep_it():
    """An image ends where it ends, as crops do in training: nothing pads it to whole strides."""
    model = SpineNet(widths=[8, 8, 8]).eval()
    for height, width in ((1, 1), (7, 9), (16, 24), (31, 33)):
        with torch.no_grad():
            assert model(torch.zeros(1, 1, height, width)).shape[2:] == (height, width)
            assert model.features(torch.zeros(1, 1, height, width)).shape[2:] == (-(-height // 2), -(-width // 2))
