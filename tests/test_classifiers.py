"""Cumulative logits against spacecutter, crops' views, mirroring, training and its continuation, views that pay."""

import copy
import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from safetensors import safe_open
from scipy.special import softmax
from torch import nn

import phantom
import utils
from lumbar.data.crop import Crop
from lumbar.data.dicom import read_study
from lumbar.data.geometry import boxes_to_table, coordinates_to_lps
from lumbar.data.greys import normalise_study
from lumbar.data.tables import read_descriptions
from lumbar.data.volume import save_study
from lumbar.grade import classifier, ordinal, trainer
from lumbar.grade import crops as crops_module
from lumbar.grade.classifier import (
    OrdinalClassifier,
    load_classifier,
    make_backbone,
    measure_views,
    save_classifier,
)
from lumbar.grade.crops import augment_crops, cut_crops, mirror_conditions
from lumbar.grade.ordinal import CumulativeHeads, cumulative_log_probabilities, weighted_losses
from lumbar.grade.trainer import TrainConfig, mix_crops, precision_for
from lumbar.grade.tta import choose_views
from lumbar.names import SEVERITY_WEIGHTS
from lumbar.run.parameters import TRACKERS, check_tracker_here, check_values
from lumbar.spine.fallbacks import level_boxes
from lumbar.storage import DamagedFile, write_tensors

CROP = Crop("level", (32, 32, 32), (32.0, 64.0, 48.0))


def predict_dataset(models, dataset, views=({},)):
    """(n studies, 5, 5, 3) probabilities of a CropDataset."""
    return softmax(measure_views(models, dataset, views).mean(0), -1)


def test_probabilities_and_loss_equal_spacecutter():
    from spacecutter.losses import CumulativeLinkLoss
    from spacecutter.models import LogisticCumulativeLink

    torch.manual_seed(0)
    score, grades = torch.randn(64, dtype=torch.float32) * 3, torch.randint(0, 3, (64,))
    link = LogisticCumulativeLink(3)
    expected = link(score[:, None])
    log_p = cumulative_log_probabilities(score, link.cutpoints.detach())
    torch.testing.assert_close(log_p.exp(), expected.detach(), atol=1e-6, rtol=1e-5)
    reference = CumulativeLinkLoss(class_weights=torch.tensor(SEVERITY_WEIGHTS, dtype=torch.float32))
    loss, weight = weighted_losses(log_p, grades)
    torch.testing.assert_close(loss / len(grades), reference(expected, grades[:, None]).detach())
    assert weight == np.array(SEVERITY_WEIGHTS)[grades].sum()


def test_gradients_equal_spacecutter():
    from spacecutter.losses import CumulativeLinkLoss
    from spacecutter.models import LogisticCumulativeLink

    score = torch.linspace(-4, 4, 30)
    grades = torch.arange(30) % 3
    link = LogisticCumulativeLink(3)
    theirs = score.clone().requires_grad_()
    weights = torch.tensor(SEVERITY_WEIGHTS, dtype=torch.float32)
    CumulativeLinkLoss(class_weights=weights)(link(theirs[:, None]), grades[:, None]).backward()
    ours, cutpoints = score.clone().requires_grad_(), link.cutpoints.detach().clone().requires_grad_()
    log_p = cumulative_log_probabilities(ours, cutpoints)
    (weighted_losses(log_p, grades)[0] / len(grades)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(cutpoints.grad, link.cutpoints.grad, atol=1e-6, rtol=1e-4)


def test_extreme_scores_stay_finite_with_a_gradient():
    score = torch.tensor([-100.0, -17.0, 17.0, 100.0], requires_grad=True)
    log_p = cumulative_log_probabilities(score, torch.tensor([-1.0, 0.0]))
    assert torch.isfinite(log_p).all()
    # The severe class at a very low score: a difference of sigmoids gives exactly 0 here, and no gradient.
    log_p[0, 2].backward()
    assert score.grad[0] == pytest.approx(1.0)


def test_missing_labels_do_not_count():
    log_p = torch.log_softmax(torch.randn(6, 5, 3), -1)
    grades = torch.randint(0, 3, (6, 5))
    masked = grades.clone()
    masked[2:] = -1
    torch.testing.assert_close(weighted_losses(log_p, masked), weighted_losses(log_p[:2], grades[:2]))
    assert weighted_losses(log_p, torch.full_like(grades, -1)) == (0, 0)


def test_heads_start_at_the_prior_with_ascending_cutpoints():
    prior = np.random.default_rng(0).dirichlet((5, 2, 2), (5, 5))
    prior[0, 0] = [0.7, 0.0, 0.3]  # a grade that never occurs still has its place
    heads = CumulativeHeads(prior)
    probabilities = cumulative_log_probabilities(torch.zeros(5, 5), heads.cutpoints).exp().detach().numpy()
    gaps = np.diff(heads.cutpoints.detach().numpy())
    np.testing.assert_allclose(probabilities[gaps[..., 0] > 0.16], prior[gaps[..., 0] > 0.16], atol=2e-3)
    assert gaps.min() > ordinal.MARGIN - 1e-6
    with torch.no_grad():
        for link in heads.links[:7]:
            link.cutpoints.copy_(torch.tensor([1.0, -2.0]))
    untouched = heads.cutpoints.detach().flatten(0, 1)[7:].clone()
    heads.keep_ascending()
    cutpoints = heads.cutpoints.detach().flatten(0, 1)
    torch.testing.assert_close(cutpoints[:7], torch.tensor([-2.0 - ordinal.MARGIN, -2.0]).expand(7, 2))
    assert torch.equal(cutpoints[7:], untouched)


def test_weights_of_heads_and_of_spacecutters_links_load_in_each_other():
    from spacecutter.models import LogisticCumulativeLink

    heads = CumulativeHeads(np.random.default_rng(0).dirichlet((5, 2, 2), (5, 5)))
    link, score = LogisticCumulativeLink(3), torch.linspace(-3, 3, 7)
    link.load_state_dict(heads.links[8].state_dict())
    log_p = cumulative_log_probabilities(score, heads.cutpoints[1, 3])
    torch.testing.assert_close(log_p.exp(), link(score[:, None]))
    heads.links[8].load_state_dict(LogisticCumulativeLink(3).state_dict())
    assert heads.cutpoints[1, 3].tolist() == [-1.0, 0.0]


class FormerHeads(nn.Module):
    """The heads as earlier versions of the kit stored them: a first cut point, and the gap by a softplus."""

    def __init__(self, shape):
        super().__init__()
        self.first, self.gap = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    @property
    def cutpoints(self):
        return torch.stack([self.first, self.first + 0.15 + nn.functional.softplus(self.gap)], -1)


@pytest.mark.parametrize("scope", ["level", "study"])
def test_weights_of_earlier_versions_predict_what_they_did(tmp_path, scope):
    model = OrdinalClassifier(scope, "tiny", (32, 32, 32), np.full((5, 5, 3), 1 / 3)).eval()
    model.heads = FormerHeads(model.heads.shape)
    save_classifier(tmp_path / "a.safetensors", model, {})
    again, _ = load_classifier(tmp_path / "a.safetensors")
    assert isinstance(again.heads, CumulativeHeads)
    x, level = torch.randn(2, 3, 32, 32, 32), torch.tensor([1, 4])
    assert torch.equal(again(x, level), model(x, level))
    # A file that holds half of them is refused, and not mended.
    del model.heads.gap
    save_classifier(tmp_path / "b.safetensors", model, {})
    with pytest.raises(DamagedFile, match="b.safetensors: the network that it states has the tensor heads"):
        load_classifier(tmp_path / "b.safetensors")


def test_views_cut_shift_and_mirror():
    crops = torch.randn(2, 3, *utils.margin_shape(CROP.shape))
    edge = [(n - s) // 2 for n, s in zip(crops.shape[2:], CROP.shape, strict=True)]
    plain = crops[:, :, edge[0] : edge[0] + 32, edge[1] : edge[1] + 32, edge[2] : edge[2] + 32]
    torch.testing.assert_close(utils.view_crops(crops, CROP), plain, atol=1e-3, rtol=1e-3)
    mirrored = utils.view_crops(crops, CROP, mirror=torch.tensor([True, False]))
    torch.testing.assert_close(mirrored[0], plain[0].flip(-1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mirrored[1], plain[1], atol=1e-3, rtol=1e-3)
    # One voxel is 1 mm head-foot, 2 mm front-back (extent: head, left, back) and 1.5 mm left-right.
    moved = utils.view_crops(crops, CROP, shift_mm=torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, -1.5]]))
    expected = crops[0, :, edge[0] + 1 : edge[0] + 33, edge[1] + 1 : edge[1] + 33, edge[2] : edge[2] + 32]
    torch.testing.assert_close(moved[0], expected, atol=1e-3, rtol=1e-3)
    expected = crops[1, :, edge[0] : edge[0] + 32, edge[1] : edge[1] + 32, edge[2] - 1 : edge[2] + 31]
    torch.testing.assert_close(moved[1], expected, atol=1e-3, rtol=1e-3)


def test_rotation_turns_in_millimetres():
    crops = torch.zeros(1, 3, *utils.margin_shape(CROP.shape))
    d, h, w = crops.shape[2:]
    # A point 10 mm towards the foot of the centre: 10 voxels; after a quarter turn about the left axis it lies
    # 10 mm in front of or behind it: 5 voxels.
    crops[0, :, d // 2 + 10, h // 2, w // 2] = 1
    turned = utils.view_crops(crops, CROP, rotation_deg=torch.tensor([[90.0, 0.0, 0.0]]))[0, 0]
    place = np.array(np.unravel_index(int(turned.argmax()), turned.shape)) - np.array(turned.shape) // 2
    assert abs(place[0]) <= 1 and abs(abs(place[1]) - 5) <= 1 and abs(place[2]) <= 1


def test_mirroring_swaps_left_and_right_conditions():
    grades = np.arange(2 * 5 * 5).reshape(2, 5, 5)
    mirrored = mirror_conditions(grades, np.array([True, False]))
    for condition, name in enumerate(utils.CONDITIONS):
        other = name.replace("left", "?").replace("right", "left").replace("?", "right")
        assert (mirrored[0, condition] == grades[0, utils.CONDITIONS.index(other)]).all()
    assert (mirrored[1] == grades[1]).all()
    as_tensor = mirror_conditions(torch.from_numpy(grades), torch.tensor([True, False]))
    assert (as_tensor.numpy() == mirrored).all()


@pytest.fixture(scope="module")
def phantom_study(tmp_path_factory):
    """One phantom study: (study with its volumes, true level boxes, grades (5, 5), table of label points)."""
    out = tmp_path_factory.mktemp("phantom")
    phantom.make_dataset(out, train=1, test=0, seed=5, workers=1, prevalence=3, progress=False)
    table = read_descriptions(out, "train")
    study_id = int(table["study_id"].iloc[0])
    descriptions = dict(zip(table["series_id"], table["description"], strict=True))
    study = read_study(out / "train_images" / str(study_id), descriptions)
    truth = utils.read_vertebra_truth(out / "phantom_vertebrae.csv", "train")
    boxes = level_boxes(utils.vertebrae_from_table(truth, study_id))
    grades = utils.labels_to_array(utils.read_labels(out / "train.csv"))[1][0]
    return normalise_study(study), boxes, grades, utils.read_coordinates(out)


def in_the_mirror(study, boxes):
    """The study and its boxes with patient x negated; a box's second axis points to the new left."""
    study, boxes = copy.deepcopy(study), copy.deepcopy(boxes)
    for volume in study.volumes:
        volume.affine[0] *= -1
    for box in boxes:
        box.center_lps_mm[0] *= -1
        box.axes[:, 0] *= -1
        box.axes[1] *= -1
    return study, boxes


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["level", "study"])
def test_a_mirrored_patient_is_a_mirrored_crop_with_swapped_labels(phantom_study, scope):
    study, boxes, grades, coordinates = phantom_study
    mirrored_study, mirrored_boxes = in_the_mirror(study, boxes)
    crop = replace(CROP, scope=scope, extent_mm=(56.0, 96.0, 96.0) if scope == "level" else (230.0, 130.0, 80.0))
    here = torch.from_numpy(cut_crops(study, boxes, crop))
    there = torch.from_numpy(cut_crops(mirrored_study, mirrored_boxes, crop))
    difference = (here.float() - there.float()).abs().mean()
    seen = utils.view_crops(here, crop, mirror=torch.ones(len(here), dtype=torch.bool))
    other = utils.view_crops(there, crop)
    assert (seen - other).abs().mean() < 0.02 * difference and difference > 0.01
    # Where the reader clicked left he clicks right in the mirror, on the same tissue: the crop's left half changes
    # places with its right one, and with it the grades, which differ between the sides here.
    assert (mirror_conditions(grades[None])[0] != grades).any()
    for row, lps in zip(coordinates.itertuples(), coordinates_to_lps(coordinates, study), strict=True):
        sign = {"left": 1, "right": -1}.get(row.condition.split("_")[0])
        if sign is not None:
            box, mirrored_box = (b[utils.LEVELS.index(row.level)] for b in (boxes, mirrored_boxes))
            assert sign * box.from_lps(lps)[1] > 0 > sign * mirrored_box.from_lps(lps * (-1, 1, 1))[1]
    # Augmentation does just this: every item is the patient or the patient in the mirror, with the labels to it.
    if scope == "level":
        batch, labels = here.repeat(4, 1, 1, 1, 1), torch.from_numpy(grades.T.copy()).repeat(4, 1)
        inputs, swapped = augment_crops(batch, labels, crop, torch.Generator().manual_seed(0), 0.0)
        plain, mirrored = utils.view_crops(batch, crop), seen.repeat(4, 1, 1, 1, 1)
        flipped = ((inputs - mirrored).abs().mean((1, 2, 3, 4)) < (inputs - plain).abs().mean((1, 2, 3, 4))).tolist()
        assert 0 < sum(flipped) < 20
        for turned, before, after in zip(flipped, labels, swapped, strict=True):
            expected = mirror_conditions(before[None])[0] if turned else before
            assert (after == expected).all()


@pytest.mark.slow
def test_an_item_without_a_cache_cuts_its_own_crop_only(phantom_study, tmp_path, monkeypatch):
    study, boxes, grades, _ = phantom_study
    save_study(study, tmp_path / "7.safetensors")
    table, cut = boxes_to_table(7, boxes), []
    crop_level = crops_module.crop_level
    monkeypatch.setattr(crops_module, "crop_level", lambda *given: cut.append(given[1].level) or crop_level(*given))

    def items(cache):
        data = utils.CropDataset({7: tmp_path / "7.safetensors"}, [7], grades[None], table, CROP, cache)
        cut.clear()
        return data, [data[number] for number in (3, 1)]

    data, alone = items(None)
    assert cut == [utils.LEVELS[3], utils.LEVELS[1]]
    (tmp_path / "cache").mkdir()
    kept, cached = items(tmp_path / "cache")
    assert cut == list(utils.LEVELS)  # with one all, once
    every = data.crops_of(7)
    assert every.shape[0] == 5 and np.array_equal(every, kept.crops_of(7)) and every.any()
    for level, own, other in zip((3, 1), alone, cached, strict=True):
        np.testing.assert_array_equal(own[0], every[level])
        np.testing.assert_array_equal(other[0], every[level])
        assert own[1] == level and own[2].tolist() == grades[:, level].tolist()
    # A whole study is one crop.
    whole = utils.CropDataset({7: tmp_path / "7.safetensors"}, [7], grades[None], None, replace(CROP, scope="study"))
    np.testing.assert_array_equal(whole[0][0], whole.crops_of(7)[0])


class Blobs(utils.CropDataset):
    """Studies whose only sign of disease is a bright blob, on the left for left and on the right for right."""

    def __init__(self, studies, seed):
        rng = np.random.default_rng(seed)
        grades = np.zeros((studies, 5, 5), np.int64)
        grades[:, 3:5] = rng.choice(3, (studies, 2, 5))
        super().__init__({}, range(studies), grades, None, CROP)
        shape = utils.margin_shape(CROP.shape)
        self.stored = 0.1 * rng.standard_normal((studies, 5, 3, *shape)).astype(np.float16)
        middle = shape[2] // 2
        for study in range(studies):
            for level in range(5):
                left, right = grades[study, 3, level], grades[study, 4, level]
                self.stored[study, level, 1, 14:24, 14:24, middle + 4 : middle + 12] += left
                self.stored[study, level, 1, 14:24, 14:24, middle - 12 : middle - 4] += right

    def crops_of(self, study_id, level=None):
        return self.stored[study_id] if level is None else self.stored[study_id][level : level + 1]


CONFIG = TrainConfig(
    backbone="tiny",
    epochs=4,
    batch=8,
    learning_rate=3e-3,
    weight_decay=0.01,
    dropout=0.0,
    strength=0.3,
    ema=0.9,
)


def changed(**values):
    return dataclasses.replace(CONFIG, **values)


def test_a_configuration_travels_as_json():
    config = changed(level_centers=[0.1, 0.2, 0.3, 0.4, 0.5], mix=0.5, seed=7)
    assert TrainConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
    with pytest.raises(TypeError, match="learning_rat"):
        TrainConfig(**{**dataclasses.asdict(config), "learning_rat": 1.0})
    for name in ("epochs", "batch", "accumulate"):
        with pytest.raises(ValueError, match=f"{name.upper()} must be 1 or more, not 0"):
            changed(**{name: 0})


@pytest.mark.slow
def test_training_learns_sides_and_mirrored_views_agree(tmp_path):
    train, valid = Blobs(16, 0), Blobs(6, 1)
    history = utils.train_classifier(tmp_path, "level_0", train, valid, changed(epochs=7, seed=1))
    model, about = load_classifier(tmp_path / "level_0.safetensors")
    assert about["crop"] == CROP and len(history) == 7
    plain = predict_dataset([model], valid)
    score = utils.score_arrays(valid.grades, plain)["subarticular"]
    prior = utils.class_prior(train.grades)
    assert score < 0.7 * utils.score_arrays(valid.grades, np.broadcast_to(prior, plain.shape))["subarticular"]
    # Seen in the mirror, with the labels swapped back, the prediction stays by and large what it was.
    mirrored = predict_dataset([model], valid, ({"mirror": True},))
    assert np.abs(mirrored - plain).mean() < 0.1
    assert np.abs(mirror_conditions(mirrored) - plain)[:, 3:5].mean() > 2 * np.abs(mirrored - plain)[:, 3:5].mean()


def weights_of(path):
    """dict name -> tensor, and the metadata, of a weights file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


# What has a state of its own: averaged weights, dropout, mixing, steps of several batches.
EVERYTHING = changed(batch=3, accumulate=2, mix=0.5, dropout=0.3, strength=1.0, epochs=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(training and held-out studies, folder with their finished training "a", its history)."""
    train, valid, out = Blobs(2, 0), Blobs(1, 1), tmp_path_factory.mktemp("trained")
    return train, valid, out, utils.train_classifier(out, "a", train, valid, EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in an epoch", "after an epoch"])
def test_a_killed_training_continues_to_the_same_weights(trained, tmp_path, monkeypatch, where):
    train, valid, whole_folder, whole = trained
    # Four batches an epoch: killed in the middle of the first step of the second one, or when it was validated.
    target, last = ("augment_crops", 6) if where == "in an epoch" else ("measure_views", 2)
    calls, real = [], getattr(trainer, target)

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, target, killed)
    with pytest.raises(KeyboardInterrupt):
        utils.train_classifier(tmp_path, "a", train, valid, EVERYTHING)
    assert (tmp_path / "a.checkpoint").exists() and not (tmp_path / "a_history.csv").exists()
    monkeypatch.setattr(trainer, target, real)
    saved = torch.load(tmp_path / "a.checkpoint", weights_only=True)
    del saved["config"]["pooling"], saved["config"]["drop_path"]  # as one from before there was a choice
    torch.save(saved, tmp_path / "a.checkpoint")
    # How many processes cut the crops makes no difference, either.
    workers = 2 if where == "in an epoch" else 0
    continued = utils.train_classifier(tmp_path, "a", train, valid, EVERYTHING, workers=workers)
    assert continued.equals(whole) and len(continued) == 2
    expected, found = (weights_of(folder / "a.safetensors") for folder in (whole_folder, tmp_path))
    assert found[1] == expected[1]
    assert all(torch.equal(found[0][name], tensor) for name, tensor in expected[0].items())
    assert not (tmp_path / "a.checkpoint").exists()


def test_a_finished_training_is_only_read(trained):
    train, valid, folder, whole = trained
    before = (folder / "a.safetensors").stat().st_mtime_ns
    assert utils.train_classifier(folder, "a", train, valid, EVERYTHING).equals(whole)
    assert (folder / "a.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("which", ["other settings", "an earlier version"])
def test_a_checkpoint_of_another_training_is_not_continued(tmp_path, capsys, which):
    train, valid, config = Blobs(1, 0), Blobs(1, 1), changed(epochs=1)
    saved = {"epoch": 1, "best": 0.0, "history": [{"epoch": 1, "loss": 0.0}]}
    if which == "other settings":
        saved["config"] = dataclasses.asdict(changed(epochs=1, learning_rate=1.0))
    torch.save(saved, tmp_path / "a.checkpoint")
    history = utils.train_classifier(tmp_path, "a", train, valid, config)
    assert history["loss"][0] > 0 and not (tmp_path / "a.checkpoint").exists()
    assert "a.checkpoint is of a training with other settings: the training starts over" in capsys.readouterr().out


def steps_of(train, config, epoch=0, training=None):
    """(Training, loss, number of steps) of one epoch."""
    training = training or trainer.prepare_training(train, config, "cpu")
    before = training.step
    loss = trainer.train_epoch(training, config, train.crop, epoch)
    return training, loss, training.step - before


def test_held_out_studies_are_seen_through_one_view_while_training(monkeypatch):
    seen, view_crops = [], classifier.view_crops
    monkeypatch.setattr(classifier, "view_crops", lambda *given, **how: seen.append(how) or view_crops(*given, **how))
    p = trainer.predict_held_out(trainer.prepare_training(Blobs(2, 0), CONFIG, "cpu"), Blobs(2, 1))
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    assert len(seen) == 2  # one for each study


@pytest.mark.slow
def test_the_steps_of_an_epoch(monkeypatch):
    train, seen = Blobs(3, 0), []  # fifteen items
    augment = trainer.augment_crops
    monkeypatch.setattr(
        trainer, "augment_crops", lambda *given: seen.append(given[0].sum((1, 2, 3, 4))) or augment(*given)
    )
    training, _, steps = steps_of(train, changed(batch=2, accumulate=3, epochs=2))
    # Eight batches, the last step and batch smaller; all items, in another order in each epoch, the same after a kill.
    assert steps == 3 and [len(batch) for batch in seen] == [2] * 7 + [1]
    first = torch.cat(seen)
    assert len(first.unique()) == 15
    rates = {group["lr"] for group in training.optimizer.param_groups}
    seen.clear()
    steps_of(train, changed(batch=2, accumulate=3, epochs=2), 1, training)
    second = torch.cat(seen)
    assert not torch.equal(first, second) and torch.equal(first.sort()[0], second.sort()[0])
    seen.clear()
    steps_of(train, changed(batch=2, accumulate=3, epochs=2), 1)
    assert torch.equal(torch.cat(seen), second)
    # The rate falls along the cosine to nothing.
    assert max(rates) < CONFIG.learning_rate and training.optimizer.param_groups[0]["lr"] < 1e-9


class Plain(nn.Module):
    """A backbone without batch normalisation, for which several batches are one."""

    def __init__(self, *_):
        super().__init__()
        self.stages, self.num_features = [None] * 3, 4
        self.layer = nn.Conv3d(3, 4, 16, 16)

    def forward_features(self, x):
        return self.layer(x)


@pytest.mark.slow
def test_accumulated_batches_equal_one_large_batch(tmp_path, monkeypatch):
    train, valid = Blobs(4, 0), Blobs(2, 1)
    train.grades[0], train.grades[1, 3] = -1, -1  # batches differ in what they weigh
    monkeypatch.setattr(classifier, "make_backbone", Plain)
    plain_view = lambda crops, grades, crop, *_: (utils.view_crops(crops, crop), grades)  # noqa: E731
    monkeypatch.setattr(trainer, "augment_crops", plain_view)
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)  # which, unlike AdamW, shows the gradients' size
    results = []
    for batch, accumulate in ((10, 1), (2, 5), (3, 1)):
        config = changed(backbone="plain", epochs=2, batch=batch, accumulate=accumulate, learning_rate=0.5)
        name = f"{batch}x{accumulate}"
        history = utils.train_classifier(tmp_path, name, train, valid, config)
        results.append((history["loss"].to_numpy(), weights_of(tmp_path / f"{name}.safetensors")[0]))
    (loss, weights), (split_loss, split_weights), (other_loss, _) = results
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(split_weights[name], tensor, atol=1e-5, rtol=1e-3)
    assert np.abs(other_loss - loss).max() > 1e-3


def finite(state):
    return all(torch.isfinite(x).all() for x in state.values() if x.is_floating_point())


@pytest.mark.slow
def test_a_step_that_overflows_is_left_out():
    train, config = Blobs(4, 0), changed(epochs=3)
    training, loss, _ = steps_of(train, config)
    assert np.isfinite(loss)
    before = {name: copy.deepcopy(getattr(training, name).state_dict()) for name in ("network", "average")}
    stored = train.stored.copy()
    train.stored[:] = np.inf
    assert np.isnan(steps_of(train, config, 1, training)[1])
    # Neither weights nor averages move, which an average over the same weights once more would do.
    parameters = {name for name, _ in training.network.named_parameters()}
    for name, tensor in before["network"].items():
        assert name not in parameters or torch.equal(training.network.state_dict()[name], tensor), name
    for name, tensor in before["average"].items():
        assert torch.equal(training.average.state_dict()[name], tensor), name
    assert finite(training.network.state_dict())  # running statistics included
    # One bad crop among good ones costs its own step only.
    train.stored[:] = stored
    train.stored[3, 2] = np.inf
    assert np.isfinite(steps_of(train, config, 2, training)[1])
    moved = training.average.state_dict()
    assert finite(moved) and finite(training.network.state_dict())
    assert not all(torch.equal(moved[name], tensor) for name, tensor in before["average"].items())


class Scaler:
    """As accelerate keeps a float16 scaler: the optimizer asks it to step, overflow or not."""

    def __init__(self):
        self.steps = 0

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        pass

    def step(self, optimizer, closure):
        self.steps += 1

    def update(self):
        pass


def test_the_scaler_of_float16_hears_of_every_step():
    """It lowers its scale at an overflow, so a step that is left out must reach it, too."""
    train, config = Blobs(1, 0), changed(batch=5)
    training = trainer.prepare_training(train, config, "cpu")
    scaler = Scaler()
    training.accelerator.scaler = training.optimizer.scaler = scaler
    training.optimizer._optimizer_original_step_method = training.optimizer._optimizer_patched_step_method = None
    training.optimizer._accelerate_step_called = False
    train.stored[:] = np.inf
    _, loss, steps = steps_of(train, config, 0, training)
    assert np.isnan(loss) and steps == scaler.steps == 1


@pytest.mark.parametrize("scope", ["level", "study"])
def test_mixed_inputs_count_both_label_sets(scope):
    torch.manual_seed(0)
    inputs, generator = torch.randn(4, 3, 32, 32, 32), torch.Generator().manual_seed(3)
    level = torch.tensor([0, 4, 2, 1])
    grades = torch.randint(-1, 3, (4, 5) if scope == "level" else (4, 5, 5))
    grades[2] = -1  # nothing known of one: its partners' labels still count
    before = (torch.randn(2, 3, 32, 32, 32), torch.tensor([1, 3]), torch.randint(0, 3, (2, *grades.shape[1:])))
    blended, levels, both, share = mix_crops((inputs, level, grades), before, generator)
    # Each has the one before it as its partner, the first the last of the batch before.
    assert levels.tolist() == [[0, 3], [4, 0], [2, 4], [1, 2]]
    assert torch.equal(both[:, 0], grades) and torch.equal(both[1:, 1], grades[:-1])
    assert torch.equal(both[0, 1], before[2][1])
    assert (share[:, 0] >= 0.5).all() and share[:, 0].std() > 0 and torch.equal(share.sum(1), torch.ones(4))
    torch.testing.assert_close(blended[1], share[1, 0] * inputs[1] + share[1, 1] * inputs[0])
    torch.testing.assert_close(blended[0], share[0, 0] * inputs[0] + share[0, 1] * before[0][1])
    prior = np.random.default_rng(0).dirichlet((5, 2, 2), (5, 5))
    model = OrdinalClassifier(scope, "tiny", (32, 32, 32), prior).eval()
    loss, weight = trainer.batch_losses(model, blended, levels, both, share)
    seen = [model(blended, levels[:, place]) for place in (0, 1)]
    expected = [0.0, 0.0]
    for place, log_p in enumerate(seen):
        for number in range(4):
            found = ordinal.weighted_losses(log_p[number].detach(), both[number, place])
            expected = [e + float(share[number, place] * f) for e, f in zip(expected, found, strict=True)]
    np.testing.assert_allclose([float(loss.detach()), float(weight)], expected, rtol=1e-5)
    if scope == "level":
        assert (seen[0] - seen[1]).abs().max() > 0.01  # the other's labels meet their own level's cut points
    # Unmixed, it is the plain loss.
    plain = trainer.batch_losses(model, *trainer.unmixed((inputs, level, grades)))
    torch.testing.assert_close(plain, ordinal.weighted_losses(model(inputs, level), grades))


def test_crops_that_come_one_by_one_are_mixed_with_the_one_before(monkeypatch):
    train, seen = Blobs(2, 0), []
    losses = trainer.batch_losses
    monkeypatch.setattr(trainer, "batch_losses", lambda *given: seen.append(given[1:]) or losses(*given))
    steps_of(train, changed(batch=1, accumulate=2, strength=0.0, mix=1.0))
    assert len(seen) == 10 and {tuple(x.shape[:2]) for _, *rest in seen for x in rest} == {(1, 2)}
    levels = [level[0].tolist() for _, level, _, _ in seen]
    assert [partner for _, partner in levels[1:]] == [own for own, _ in levels[:-1]] and levels[0][0] == levels[0][1]
    for (_, _, grades, share), (_, _, earlier, _) in zip(seen[1:], seen[:-1], strict=True):
        assert torch.equal(grades[0, 1], earlier[0, 0]) and 0.5 <= share[0, 0] < 1
    seen.clear()
    steps_of(train, changed(batch=1, accumulate=2, mix=0.0))
    assert {tuple(level.shape) for _, level, _, _ in seen} == {(1, 1)}


class Notes(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "notes", False

    def __init__(self):
        super().__init__()
        self.config, self.curves, self.ended = None, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **_):
        self.curves.append({"epoch": step, **values})

    def finish(self):
        self.ended = True


def test_curves_go_to_a_tracker_as_well(tmp_path):
    notes, config = Notes(), changed(epochs=2)
    history = utils.train_classifier(tmp_path, "a", Blobs(1, 0), Blobs(1, 1), config, tracker=notes)
    assert pd.DataFrame(notes.curves).equals(history[list(notes.curves[0])])
    assert notes.config["learning_rate"] == config.learning_rate and notes.ended


def test_trackers_that_there_are_not_are_refused_before_anything_runs(tmp_path, monkeypatch):
    assert set(TRACKERS) == set(tracking.LOGGER_TYPE_TO_CLASS)
    arguments = tmp_path, "a", Blobs(1, 0), Blobs(1, 1), CONFIG
    with pytest.raises(ValueError, match="TRACKER must be empty or one of aim, .*, not 'tensorbord'"):
        utils.train_classifier(*arguments, tracker="tensorbord")
    with pytest.raises(ValueError, match="not 'Tensorbord'. Did you mean tensorboard?"):
        check_values({"TRACKER": ""}, {"TRACKER": "Tensorbord"})
    monkeypatch.setattr(tracking, "_available_trackers", [])
    for refuse in (lambda: utils.train_classifier(*arguments, tracker="wandb"), lambda: check_tracker_here("wandb")):
        with pytest.raises(ImportError, match="TRACKER 'wandb': its package is not installed. Run `pip install wandb`"):
            refuse()
    assert check_values({"TRACKER": ""}, {"TRACKER": "wandb"}) == {"TRACKER": "wandb"}
    assert list(tmp_path.iterdir()) == []
    check_tracker_here("")


@pytest.mark.skipif("tensorboard" not in tracking.get_available_trackers(), reason="tensorboard is not installed")
def test_tensorboard_gets_the_curves(tmp_path):
    utils.train_classifier(tmp_path, "a", Blobs(1, 0), Blobs(1, 1), changed(epochs=1), tracker="tensorboard")
    assert list((tmp_path / "tracking" / "a").rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_recomputed_activations_train_to_the_same_weights(tmp_path):
    train, valid = Blobs(2, 0), Blobs(1, 1)
    for name, recompute in (("kept", False), ("again", True)):
        config = dataclasses.replace(EVERYTHING, epochs=1, recompute=recompute)
        utils.train_classifier(tmp_path, name, train, valid, config)
    kept, again = (weights_of(tmp_path / f"{name}.safetensors")[0] for name in ("kept", "again"))
    for name, tensor in kept.items():
        if not name.endswith("num_batches_tracked"):  # which decides nothing
            torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=1e-3)
    # And they are not kept: all that the forward pass holds on to is where each block began.
    model, held = OrdinalClassifier("level", "tiny", (32, 32, 32), np.full((5, 5, 3), 1 / 3)), {}
    for model.recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.nbytes), x)[1], lambda x: x):
            model(torch.zeros(1, 3, 32, 32, 32), torch.tensor([0]))
        held[model.recompute] = sum(sizes)
    assert held[True] < 0.5 * held[False]


def test_precision():
    assert precision_for("auto", "cpu") == torch.float32
    assert precision_for("bfloat16", "cpu") == torch.bfloat16
    for name in ("float16", "half"):
        with pytest.raises(ValueError, match="PRECISION"):
            precision_for(name, "cpu")


@pytest.mark.slow
def test_half_precision_trains_alike_and_heads_stay_full(tmp_path):
    train, valid = Blobs(4, 0), Blobs(2, 1)
    exact = utils.train_classifier(tmp_path, "a", train, valid, changed(epochs=2))
    half = utils.train_classifier(tmp_path, "b", train, valid, changed(epochs=2, precision="bfloat16"))
    assert not half.equals(exact)
    np.testing.assert_allclose(half["loss"], exact["loss"], rtol=0.02)
    model = OrdinalClassifier("level", "tiny", (32, 32, 32), np.full((5, 5, 3), 1 / 3))
    with torch.autocast("cpu", torch.bfloat16):
        log_p = model(torch.zeros(2, 3, 32, 32, 32), torch.tensor([0, 1]))
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 5), atol=1e-6, rtol=0)


def test_weights_from_before_there_was_a_choice_of_pooling(tmp_path):
    model = OrdinalClassifier("level", "tiny", (32, 32, 32), np.full((5, 5, 3), 1 / 3)).eval()
    del model.config["pooling"]
    save_classifier(tmp_path / "a.safetensors", model, {})
    again, about = load_classifier(tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 32, 32, 32)
    torch.testing.assert_close(again(x, torch.tensor([1])), model(x, torch.tensor([1])))
    assert "pooling" not in about and again.layout == "grid"


@pytest.mark.parametrize("scope", ["level", "study"])
@pytest.mark.parametrize("pooling", ["max", "attention"])
def test_cells_are_pooled_as_the_weights_say(tmp_path, scope, pooling):
    prior, x, level = np.full((5, 5, 3), 1 / 3), torch.randn(2, 3, 32, 32, 32), torch.tensor([1, 4])
    torch.manual_seed(0)
    model = OrdinalClassifier(scope, "tiny", (32, 32, 32), prior, pooling=pooling).eval()
    mean = OrdinalClassifier(scope, "tiny", (32, 32, 32), prior).eval()
    mean.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pool.")})
    alike = torch.allclose(model(x, level), mean(x, level), atol=1e-6)
    assert alike == (pooling == "attention")  # whose weights are equal at first
    for parameter in model.pool.parameters():
        nn.init.normal_(parameter)
    save_classifier(tmp_path / "a.safetensors", model, {})
    again, about = load_classifier(tmp_path / "a.safetensors")
    assert about["cells"] == pooling and torch.equal(again(x, level), model(x, level))
    assert not torch.allclose(model(x, level), mean(x, level), atol=1e-4)


@pytest.mark.parametrize("cells", [None, "median", ["max"]])
def test_what_weights_say_of_their_cells_is_one_of_three_or_nothing(tmp_path, cells):
    model = OrdinalClassifier("level", "tiny", (32, 32, 32), np.full((5, 5, 3), 1 / 3)).eval()
    write_tensors(tmp_path / "a.safetensors", model.state_dict(), "classifier", {**model.config, "cells": cells})
    if cells is None:
        x, level = torch.randn(1, 3, 32, 32, 32), torch.tensor([1])
        assert torch.equal(load_classifier(tmp_path / "a.safetensors")[0](x, level), model(x, level))
    else:
        with pytest.raises(DamagedFile, match="cells"):
            load_classifier(tmp_path / "a.safetensors")


def test_attention_in_cells_is_their_weighted_mean():
    x = torch.arange(16.0).reshape(1, 1, 2, 2, 4).repeat(1, 2, 1, 1, 1)
    pool = classifier.CellPooling("attention", 2, (1, 1, 2))
    torch.nn.init.constant_(pool.weight.weight, 50.0)  # to the bound: the highest place of each cell nearly alone
    found = pool(x).detach()
    assert found.shape == (1, 2, 1, 1, 2)
    weight = np.exp(10 * np.tanh(100 * x[0, 0].numpy() / 10))
    for cell, part in enumerate((slice(0, 2), slice(2, 4))):
        expected = np.average(x[0, 0, ..., part].numpy(), weights=weight[..., part])
        assert found[0, 0, 0, 0, cell] == pytest.approx(expected, rel=1e-5)
    x = x.requires_grad_()
    pool(x * 1e4).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_branches_are_left_out_in_training_only():
    prior, x, level = np.full((5, 5, 3), 1 / 3), torch.randn(2, 3, 32, 32, 32), torch.tensor([1, 4])
    model = OrdinalClassifier("level", "tiny", (32, 32, 32), prior, dropout=0.0, drop_path=0.9)
    model.train()
    with torch.no_grad():
        one, other = model(x, level), model(x, level)
        assert not torch.equal(one, other)
        model.eval()
        assert torch.equal(model(x, level), model(x, level))


@pytest.mark.parametrize("wrong, words", [({"pooling": "sum"}, "POOLING must be"), ({"drop_path": 1.0}, "DROP_PATH")])
def test_a_configuration_that_cannot_be_meant_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        changed(**wrong)


@pytest.mark.slow
def test_views_are_measured_chosen_and_stored(tmp_path, monkeypatch):
    held_out = {"level_0": Blobs(3, 1), "level_1": Blobs(2, 2)}
    torch.manual_seed(0)
    for name in held_out:
        model = OrdinalClassifier("level", "tiny", (32, 32, 32), np.full((5, 5, 3), 1 / 3)).eval()
        save_classifier(tmp_path / f"{name}.safetensors", model, {"crop": CROP, "fold": 0})
    before = weights_of(tmp_path / "level_1.safetensors")[0]
    views = ({}, {"mirror": True}, {"scale": 1.06})
    log_p = measure_views([model], held_out["level_1"], views)
    assert log_p.shape == (3, 2, 5, 5, 3)
    for view, measured in zip(views, log_p, strict=True):
        np.testing.assert_allclose(np.exp(measured), predict_dataset([model], held_out["level_1"], (view,)))
    seen = []

    def choose(grades, log_p, views):
        seen.append((grades, log_p))
        table = choose_views(grades, log_p, views)[1].assign(kept=[True, False, True])
        return [views[0], views[2]], table

    def cross_fitted(grades, log_p, views, part):
        seen.append((grades, log_p))
        assert len(set(part)) == 5
        return np.arange(5)[:, None] >= [0, 4, 1]  # the first study has no view but the plain one, the last has all

    monkeypatch.setattr(classifier, "choose_views", choose)
    monkeypatch.setattr(classifier, "cross_fitted_views", cross_fitted)
    predicted, table = utils.settle_views(tmp_path, held_out, "cpu", views)
    # One choice on all held-out studies, which both weights carry; each study is predicted with its own views.
    assert len(seen) == 2
    for grades, given in seen:
        assert len(grades) == 5 and given.shape[:2] == (3, 5)
        np.testing.assert_array_equal(given[:, 3:], log_p)
    assert table["view"].map(json.loads).tolist() == list(views)
    after, metadata = weights_of(tmp_path / "level_1.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and len(after) == len(before)
    for name in held_out:
        model, about = load_classifier(tmp_path / f"{name}.safetensors")
        assert about["views"] == [{}, {"scale": 1.06}] and about["fold"] == 0
        expected = predict_dataset([model], held_out[name], about["views"])
        if name == "level_0":
            expected[0] = predict_dataset([model], held_out[name])[0]
        else:
            expected[1] = predict_dataset([model], held_out[name], views)[1]
        np.testing.assert_allclose(predicted[name], expected, atol=1e-12)
    # Once more: nothing changes, and nothing is written.
    times = [path.stat().st_mtime_ns for path in sorted(Path(tmp_path).iterdir())]
    utils.settle_views(tmp_path, held_out, "cpu", views)
    assert times == [path.stat().st_mtime_ns for path in sorted(Path(tmp_path).iterdir())]


class Signed(Blobs):
    """Leaves a note for each study: which process cut its crops."""

    def crops_of(self, study_id, level=None):
        Path(self.notes, f"{study_id}_{os.getpid()}").touch()
        return super().crops_of(study_id, level)


@pytest.mark.slow
def test_other_processes_cut_the_crops_of_held_out_studies(tmp_path):
    model = OrdinalClassifier("level", "tiny", (32, 32, 32), np.full((5, 5, 3), 1 / 3)).eval()
    nn.init.normal_(model.score.weight, std=0.3)
    data, found = Signed(5, 3), []
    for workers in (0, 2):
        data.notes = tmp_path / str(workers)
        data.notes.mkdir()
        found.append(measure_views([model], data, ({}, {"mirror": True}), [4, 0, 2], workers))
        studies, processes = zip(*(path.name.split("_") for path in data.notes.iterdir()), strict=True)
        assert sorted(studies) == ["0", "2", "4"]
        assert len(set(processes)) == 2 and str(os.getpid()) not in processes if workers else len(set(processes)) == 1
    np.testing.assert_array_equal(*found)
    assert (found[0][:, [1, 3]] == 0).all() and np.abs(found[0][:, 0] - found[0][:, 4]).max() > 1e-3


def test_every_trained_parameter_has_a_gradient():
    """What has none stops DistributedDataParallel; some backbones have a hidden layer in the head that is not used."""
    model = OrdinalClassifier("level", "coatnet_0", (32, 32, 32), np.full((5, 5, 3), 1 / 3))
    assert any(name.startswith("backbone.head.") for name, _ in model.named_parameters())
    model(torch.rand(2, 3, 32, 32, 32), torch.tensor([0, 1])).sum().backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking


@pytest.mark.parametrize("scope", ["level", "study"])
def test_cut_points_and_places_do_not_decay(scope):
    train = Blobs(1, 0)
    train.crop = replace(CROP, scope=scope)
    training = trainer.prepare_training(train, CONFIG, "cpu")
    names = {id(p): name for name, p in training.network.named_parameters() if p.requires_grad}
    decay = {names[id(p)]: g["weight_decay"] for g in training.optimizer.param_groups for p in g["params"]}
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        plain = training.network.get_parameter(name).ndim <= 1 or name == "attention.position"
        assert value == (0.0 if plain else CONFIG.weight_decay), name
    assert decay["heads.links.24.cutpoints"] == decay["score.bias"] == 0.0 < decay["score.weight"]
    assert ("attention.position" in decay) == (scope == "study")


def test_backbones():
    with pytest.raises(ValueError, match="unknown backbone"):
        make_backbone("resnet", (32, 32, 32))
    for shape in ((100, 128, 128), (0, 128, 128), (128, 128)):
        with pytest.raises(ValueError, match="SHAPE of three sizes, each divisible by 32"):
            utils.backbone_config("coatnet_rmlp_3_rw", shape)
    model = OrdinalClassifier("study", "tiny", (48, 16, 32), np.full((5, 5, 3), 1 / 3)).eval()
    log_p = model(torch.zeros(2, 3, 48, 16, 32))
    assert log_p.shape == (2, 5, 5, 3)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 5, 5))
