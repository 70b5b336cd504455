"""The slice member: which slices are cut and where, what views and augmentation do to them, training, prediction."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from small_study import make_boxes, make_study

import utils
from lumbar.data.geometry import LevelBox
from lumbar.data.volume import Study, Volume
from lumbar.grade.crops import mirror_conditions
from lumbar.grade.slice_crops import (
    JITTER,
    LOOKS,
    SLICE_VIEWS,
    SliceCrop,
    SliceDataset,
    augment_slices,
    cut_slices,
    exchange_levels,
    expand_slice_view,
    slice_crop,
    view_slices,
)
from lumbar.grade.slice_network import Encoder, SliceNetwork, load_slices, measure_slices, predict_slices, save_slices
from lumbar.grade.slice_training import SliceConfig, SliceRecipe
from lumbar.grade.slices import Slices
from lumbar.grade.trainer import mix_crops

CROP = SliceCrop(size_px=32, mm_per_px=1.0, axial_mm_per_px=1.0, slices=3)
BACKBONE = "test_efficientnet"
PRIOR = np.full((5, 5, 3), 1 / 3)


def spot_study(points, grey=1.0):
    """A study whose volumes show bright balls of 3 mm around the points (n, 3) LPS mm, and nothing else."""

    def volume(description, number, step, row, column, origin, shape):
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1], affine[:3, 2], affine[:3, 3] = step, row, column, origin
        own = Volume(np.zeros(shape, np.float32), affine, 7, number, description, 0, np.arange(shape[0]) + 1)
        for point in points:  # the axes are the patient's, so that distances are sums along them
            away = 0.0
            for axis, count in enumerate(shape):
                along = int(np.abs(affine[:3, axis]).argmax())
                at = affine[along, axis] * np.arange(count) + origin[along] - point[along]
                away = np.add.outer(away, at**2) if axis else at**2
            own.array[away < 9] = grey
        return replace(own, array=own.array.astype(np.float16))

    # Stored the other way round than cut: slices to the right, rows to the head, columns to the front or to the right.
    sagittal = ([-2, 0, 0], [0, 0, 1.4], [0, -1.4, 0], [40, 70, -110], (41, 150, 100))
    return Study(
        7,
        [
            volume("Sagittal T1", 1, *sagittal),
            volume("Sagittal T2/STIR", 2, *sagittal),
            volume("Axial T2", 3, [0, 0, 4], [0, -1.6, 0], [-1.6, 0, 0], [59.2, 80, -100], (51, 100, 75)),
        ],
    )


def middle_of(image):
    """(row, column) of what is bright in an image."""
    return np.argwhere(image > 128).mean(0)


@pytest.mark.parametrize("number", range(len(LOOKS)))
def test_a_look_has_its_place_in_the_middle(number):
    look, boxes = LOOKS[number], make_boxes()
    study = spot_study([box.to_lps(look.place_mm) for box in boxes])
    cut = cut_slices(study, boxes, CROP)
    assert cut.shape == CROP.shape == (5, 6, 3 + 2 * 3, 40, 40) and cut.dtype == np.uint8
    for level in range(5):
        run = cut[level, number]
        assert run.max() > 200 and (run.max((1, 2)) > 128).argmax() in (3, 4)
        assert np.allclose(middle_of(run[4]), 19.5, atol=1.2)


def test_runs_and_columns_go_the_same_way_however_a_series_is_stored():
    boxes = make_boxes()
    shown = {}
    for number, look in enumerate(LOOKS):
        outside, front = look.side or 1, np.array([0, -6, 0])
        place = boxes[2].to_lps(look.place_mm)
        sagittal = look.description.startswith("Sagittal")
        # 4 mm further outside, 5 to the head: sagittal runs go to the outside and rows to the feet.
        point = place + ([4 * outside, 0, 5] if sagittal else np.array([6 * outside, 0, 0]) + front)
        run = cut_slices(spot_study([point]), boxes, CROP)[2, number]
        best = run.reshape(len(run), -1).max(1).argmax() if sagittal else 4
        shown[number] = (best, *(middle_of(run[best if sagittal else 4]) - 19.5).round())
    for number in (0, 2, 3):  # the next slice but one (2 mm apart) is brightest from 5 to 7
        best, row, column = shown[number]
        assert best >= 5 and row == pytest.approx(-5, abs=1) and column == pytest.approx(0, abs=1)
    for number in (1, 4, 5):
        _, row, column = shown[number]
        assert row == pytest.approx(-6, abs=1) and column == pytest.approx(6, abs=1)


def test_what_a_study_lacks_is_missing_and_black_is_not():
    study, boxes = make_study(), make_boxes()
    without = Study(7, [v for v in study.volumes if v.description != "Axial T2"])
    cut = cut_slices(without, boxes, CROP)
    for number, look in enumerate(LOOKS):
        assert cut[:, number].any() == (look.description != "Axial T2")
    assert not cut_slices(Study(7, []), boxes, CROP).any()
    # Black slices of a series are there.
    dark = cut_slices(spot_study([[500, 0, 0]]), boxes, CROP)
    assert dark.any((-1, -2)).all() and dark.max() == 1
    # A place beyond the series, and one between two stacks: the nearer is taken.
    far = [replace_center(box, [0, 0, 900]) for box in boxes]
    assert not cut_slices(study, far, CROP).any()


def replace_center(box, center):
    return LevelBox(box.level, np.array(center, float), box.axes, box.extent_mm, box.confidence, box.source)


def test_slices_beyond_a_series_are_missing():
    boxes = make_boxes()
    cut = cut_slices(spot_study([[0, 0, 0]]), boxes, replace(CROP, slices=31))
    there = cut[2, 0].any((-1, -2))  # 41 slices of 2 mm, 37 wanted: all are there
    assert there.all()
    there = cut[0, 1].any((-1, -2))  # L1/L2 at 70 mm: the axial stack ends at 100 mm, after 7 slices of 4 mm
    assert not there.all() and there[18]


def crops_of(study=None, boxes=None, crop=CROP):
    return torch.from_numpy(cut_slices(study or make_study(), boxes or make_boxes(), crop))[None]


def test_the_plain_view_is_the_middle_of_the_crop():
    crops = crops_of()
    seen = view_slices(crops, CROP)
    assert seen.shape == (1, 5, 6, 5, 32, 32)
    inner = crops[:, :, :, JITTER : JITTER + 5, 4:36, 4:36]
    there = crops[:, :, :, JITTER : JITTER + 5].amax((-1, -2)) > 0
    wanted = ((inner.float() - 1).clamp(min=0) / 254).masked_fill(~there[..., None, None], torch.nan)
    assert torch.allclose(seen, wanted, atol=1e-5, equal_nan=True)
    moved = view_slices(crops, CROP, **expand_slice_view({"slice": 1, "shift_px": [0.0, 3.0]}, 1))
    inner = crops[:, :, :, JITTER + 1 : JITTER + 6, 4:36, 7:39]
    there = crops[:, :, :, JITTER + 1 : JITTER + 6].amax((-1, -2)) > 0
    wanted = ((inner.float() - 1).clamp(min=0) / 254).masked_fill(~there[..., None, None], torch.nan)
    assert torch.allclose(moved, wanted, atol=1e-4, equal_nan=True)


def test_a_mirrored_study_is_the_mirrored_patient():
    # A patient who is mirrored in x = 0, the plane of the boxes: every look is the other side's.
    boxes = make_boxes()
    points = [box.to_lps(look.place_mm) + [3, 2, 2] for box in boxes for look in LOOKS if look.side >= 0]
    own, other = (
        crops_of(spot_study([[s * x, y, z] for x, y, z in points]), boxes, replace(CROP, mm_per_px=0.8))
        for s in (1, -1)
    )
    mirrored = view_slices(own, CROP, mirror=torch.tensor([True]))
    plain = view_slices(other, CROP)
    # Slices and pixels of the two do not lie alike to the last pixel: sagittal slices do, at multiples of 2 mm.
    for number in (0, 1, 3, 5):  # nothing is on the left of the mirrored patient
        a, b = mirrored[0, :, number].nan_to_num(), plain[0, :, number].nan_to_num()
        assert a.sum() > 0 and (a - b).abs().mean() < 0.5 * a.mean()
        assert (view_slices(own, CROP)[0, :, number].nan_to_num() - b).abs().mean() > 0.8 * b.mean()


def test_augmentation_is_repeatable_and_swaps_the_labels():
    crops, grades = crops_of().expand(6, -1, -1, -1, -1, -1), torch.arange(150).view(6, 5, 5)

    def augmented(strength):
        return augment_slices(crops, grades, CROP, torch.Generator().manual_seed(1), strength)

    inputs, swapped = augmented(0.0)
    mirror = torch.rand(6, generator=torch.Generator().manual_seed(1)) < 0.5
    assert 0 < mirror.sum() < 6
    assert torch.equal(swapped, mirror_conditions(grades, mirror))
    plain = view_slices(crops, CROP, mirror=mirror)
    kept = ~inputs.isnan()
    assert (inputs - plain)[kept].abs().max() < 0.15 and kept.float().mean() > 0.5  # noise alone
    torch.manual_seed(0)
    first = augmented(1.0)[0]
    torch.manual_seed(0)
    assert torch.allclose(first, augmented(1.0)[0], equal_nan=True)
    assert (first - plain)[~(first - plain).isnan()].abs().mean() > 0.03


def test_levels_are_exchanged_with_their_labels():
    inputs = torch.arange(4.0).view(4, 1, 1, 1, 1, 1).expand(4, 5, 6, 5, 2, 2)
    grades = torch.arange(4).view(4, 1, 1).expand(4, 5, 5)
    mixed, labels = exchange_levels(inputs, grades, torch.Generator().manual_seed(0), 1.0)
    assert torch.equal(mixed[..., 0, 0, 0, 0].long(), labels[:, 0]) and (labels != grades).any()
    assert torch.equal(exchange_levels(inputs, grades, torch.Generator().manual_seed(0), 0.0)[0], inputs)


def test_a_study_alone_takes_levels_from_the_one_before():
    inputs, grades = torch.zeros(1, 5, 6, 5, 2, 2), torch.zeros(1, 5, 5, dtype=torch.long)
    before = torch.ones(2, 5, 6, 5, 2, 2), torch.ones(2, 5, 5, dtype=torch.long)
    mixed, labels = exchange_levels(inputs, grades, torch.Generator().manual_seed(0), 1.0, before)
    assert torch.equal(mixed[..., 0, 0, 0, 0].long(), labels[:, 0]) and 0 < labels.float().mean() < 1
    # So does a training with batches of one, where config says so.
    for share, differ in ((1.0, True), (0.0, False)):
        config = SimpleNamespace(exchange=share)
        one = (inputs, torch.zeros(1), grades)
        batch = SliceRecipe().exchange(one, (before[0], torch.zeros(2), before[1]), torch.Generator(), config)
        assert bool((batch[2] != grades).any()) == differ


def test_of_several_slices_the_nearest_moves_as_far_as_it_is_still_seen():
    moved = {}
    for slices in (1, 5):
        crop, seen = replace(CROP, slices=slices), []
        crops = torch.zeros(40, *crop.shape, dtype=torch.uint8)
        with patch("lumbar.grade.slice_crops.view_slices", lambda c, crop, slice, **_: seen.append(slice) or c.float()):
            augment_slices(crops, torch.zeros(40, 5, 5), crop, torch.Generator().manual_seed(0))
        moved[slices] = torch.bincount(seen[0].abs().flatten(), minlength=3) / seen[0].numel()
    assert moved[1][1] < 0.3 and moved[1][2] < 0.01
    assert moved[5][1] > 0.4 and moved[5][2] > 0.08


def test_a_look_that_one_of_two_blended_studies_lacks_is_the_others():
    inputs, grades = torch.zeros(2, 5, 6, 1, 4, 4), torch.zeros(2, 5, 5, dtype=torch.long)
    inputs[1] = 1.0
    inputs[0, :, 1:] = torch.nan
    blended, *_ = mix_crops((inputs, torch.zeros(2), grades), (inputs, torch.zeros(2), grades), torch.Generator())
    assert torch.isfinite(blended).all() and (blended[:, :, 1:] == 1).all() and (blended[1, :, 0] < 1).all()


def test_networks_that_cannot_recompute_say_so():
    with pytest.raises(ValueError, match="RECOMPUTE: timm's VGG cannot .* set it to False"):
        Encoder("vgg11", 3, 64).recompute()
    Encoder("test_efficientnet", 3, 64).recompute()


def test_a_vit_is_cut_at_its_last_block_of_a_stride():
    encoder = Encoder("test_vit", 3, 64, 16)
    assert len(encoder.net.blocks) == len(timm.create_model("test_vit").blocks)
    assert encoder(torch.rand(1, 3, 64, 64)).shape == (1, encoder.num_features)


@pytest.mark.parametrize("settings", [{"slices": 0}, {"size_px": 8}, {"channels": 2}, {"mm_per_px": 0.0}])
def test_impossible_crops_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings)).upper()):
        replace(CROP, **settings)


def network(**settings):
    torch.manual_seed(0)
    model = SliceNetwork(BACKBONE, CROP, PRIOR, **{"width": 16, **settings}).eval()
    for layer in model.score:
        torch.nn.init.normal_(layer.weight, std=1.0)
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"sequence": "none", "levels": False}, {"stride": 16}, {"crop": replace(CROP, channels=1)}]
)
def test_weights_come_back(tmp_path, settings):
    model = network(**settings) if "crop" not in settings else SliceNetwork(BACKBONE, prior=PRIOR, width=16, **settings)
    model.eval()
    crop = model.crop
    save_slices(tmp_path / "slices_0.safetensors", model, {"fold": 0, "crop": "not this"})
    again, about = load_slices(tmp_path / "slices_0.safetensors")
    assert about["fold"] == 0 and slice_crop(about["crop"]) == crop == again.crop
    crops = crops_of(crop=crop).numpy()
    one, two = (predict_slices([m], crops, crop, ({}, {"mirror": True})) for m in (model, again))
    assert one.shape == (2, 1, 5, 5, 3) and np.allclose(one, two) and np.allclose(np.exp(one).sum(-1), 1, atol=1e-5)


def test_a_grade_depends_on_its_own_looks_and_through_the_levels_on_the_others():
    crops = crops_of(spot_study([box.to_lps(look.place_mm) for box in make_boxes() for look in LOOKS]))
    x = view_slices(crops, CROP)
    changed = x.clone()
    changed[:, 2, 3] = torch.rand_like(changed[:, 2, 3])  # the right foramen at L3/L4
    for levels in (False, True):
        model = network(levels=levels)
        with torch.no_grad():
            differs = (model(x) - model(changed)).abs().amax(-1)[0] > 1e-6  # (conditions, levels)
        assert differs[2, 2] and differs.sum() == (25 if levels else 1)


def test_missing_looks_change_nothing_but_themselves():
    model, x = network(levels=False), view_slices(crops_of(), CROP)
    without = x.clone()
    without[:, :, 1] = torch.nan  # the canal's axial look
    with torch.no_grad():
        assert torch.allclose(model(x)[:, 1:], model(without)[:, 1:]) and model(without).isfinite().all()
        assert model(torch.full_like(x, torch.nan)).isfinite().all()


def test_a_side_is_graded_as_the_other_side_of_the_mirrored_patient():
    model, crops = network(levels=False), crops_of()
    own, mirrored = predict_slices([model], crops.numpy(), CROP, ({}, {"mirror": True}))
    # Both sides share all weights: mirroring and swapping back changes lateral grades by nothing.
    assert np.allclose(own[:, 1:], mirrored[:, 1:], atol=1e-5) and not np.allclose(own[:, 0], mirrored[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"backbone": "hf-hub:someone/net"}, "backbone"),
        ({"backbone": "no_such_net"}, "backbone"),
        ({"backbone": 7}, "backbone"),
        ({"crop": {**CROP.plain(), "size_px": 99999}}, "size_px"),
        ({"crop": {**CROP.plain(), "channels": 2}}, "channels"),
        ({"stride": 5}, "STRIDE"),
        ({"width": 32}, "shape"),
        ({"sequence": "eval()"}, "sequence"),
        ({"views": [{"slice": 99}]}, "slice"),
        ({"views": [{"turn": 1}]}, "turn"),
        ({"prior": [1.0]}, "prior"),
    ],
)
def test_files_that_state_something_else_are_refused(tmp_path, change, word):
    path, model = tmp_path / "slices_0.safetensors", network()
    model.config |= change
    save_slices(path, model, {"views": change.get("views", [{}])})
    with pytest.raises(utils.DamagedFile, match=word):
        load_slices(path)


class Graded(SliceDataset):
    """Studies of noise whose looks are bright where the grade is severe."""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        grades = rng.integers(0, 3, (count, 5, 5))
        super().__init__({}, range(count), grades, None, CROP)
        noise = rng.integers(1, 60, (count, *CROP.shape))
        own = grades[:, [look.condition for look in LOOKS]].transpose(0, 2, 1)  # (studies, levels, looks)
        self.crops = (noise + 90 * own[..., None, None, None]).astype(np.uint8)

    def crops_of(self, study_id, level=None):
        return self.crops[study_id][None]


CONFIG = SliceConfig(
    backbone=BACKBONE,
    epochs=3,
    batch=2,
    learning_rate=3e-3,
    weight_decay=0.05,
    dropout=0.0,
    strength=0.5,
    ema=0.8,
    mix=0.3,
    exchange=0.3,
    width=16,
    stride=16,
    backbone_rate=0.5,
)


@pytest.mark.slow
def test_training_learns_goes_on_after_a_kill_and_settles_its_views(tmp_path, monkeypatch):
    train, valid = Graded(16, 0), Graded(6, 1)
    arguments = (train, valid, CONFIG, {"fold": 0, "prior": PRIOR.tolist()}, "cpu")
    whole = utils.train_classifier(tmp_path, "slices_0", *arguments, recipe=SliceRecipe())
    assert len(whole) == 3 and whole["total"].iloc[-1] < 0.9 * whole["total"].iloc[0] or whole["total"].min() < 0.6

    saves = []

    class Killed(SliceRecipe):
        def measure(self, *given):
            saves.append(1)
            if len(saves) == 2:
                raise KeyboardInterrupt
            return super().measure(*given)

    (tmp_path / "again").mkdir()
    with pytest.raises(KeyboardInterrupt):
        utils.train_classifier(tmp_path / "again", "slices_0", *arguments, recipe=Killed())
    again = utils.train_classifier(tmp_path / "again", "slices_0", *arguments, recipe=SliceRecipe())
    pd.testing.assert_frame_equal(whole, again)
    ours, theirs = (load_slices(folder / "slices_0.safetensors")[0] for folder in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))

    predicted, table = utils.settle_views(
        tmp_path, {"slices_0": valid}, "cpu", SLICE_VIEWS[:3], load=load_slices, measure=measure_slices
    )
    assert predicted["slices_0"].shape == (6, 5, 5, 3) and len(table) == 3
    assert load_slices(tmp_path / "slices_0.safetensors")[1]["views"][0] == {}


def test_branches_of_the_backbone_can_be_left_out():
    def branches(net):
        return [m.drop_prob for m in net.modules() if type(m).__name__ == "DropPath"]

    left_out = branches(SliceNetwork("test_efficientnet", CROP, PRIOR, width=16, drop_path=0.4))
    assert left_out and 0 < max(left_out) <= 0.4
    assert not any(branches(SliceNetwork("test_efficientnet", CROP, PRIOR, width=16)))
    for stride in (8, 16):  # what is left of the network has the rate, not what was cut off
        rates = branches(Encoder("tf_efficientnet_lite0", 3, 64, stride, drop_path=0.4))
        assert max(rates) == pytest.approx(0.4) and rates == sorted(rates)
    with pytest.raises(ValueError, match="vgg11 has no residual branches to leave out: set DROP_PATH to 0"):
        Encoder("vgg11", 3, 64, drop_path=0.4)


def test_the_member_predicts_what_it_sees_and_says_what_fails(tmp_path):
    member, path = Slices(), tmp_path / "slices_0.safetensors"
    save_slices(path, network(), {"prior": PRIOR.tolist(), "views": [{}, {"scale": 1.1}]})
    weights = [member.load(path, "cpu")]
    assert json.loads(json.dumps(member.read_about(path)["crop"])) == CROP.plain() and member.is_finished({})
    study, boxes = make_study(), make_boxes()
    damaged = replace_volumes(study)
    inputs = [member.prepare(s, b, weights, "cpu") for s, b in ((study, boxes), (study, None), (damaged, boxes))]
    inputs.append(member.prepare(Study(7, []), boxes, weights, "cpu"))
    good, unplaced, failed, empty = member.predict(inputs, weights, -1, "cpu")
    assert np.allclose(good.probabilities.sum(-1), 1) and good.problems == ()
    assert np.isnan(unplaced.probabilities).all() and unplaced.problems == ()
    assert np.isnan(failed.probabilities).all() and failed.problems[0].text.startswith("slices: ")
    assert np.isnan(empty.probabilities).all() and empty.problems == ()
    (alone,) = member.predict(inputs[:1], weights, 1, "cpu")
    both = predict_slices([weights[0].model], inputs[0][CROP][None], CROP)
    assert np.allclose(alone.probabilities, np.exp(both[0, 0]), atol=1e-6)
    assert not np.allclose(alone.probabilities, good.probabilities, atol=1e-6)


def replace_volumes(study):
    """A study with volumes that cannot be cut."""
    return Study(7, [replace(volume, array=volume.array[:, :0]) for volume in study.volumes[:1]] + [None])
