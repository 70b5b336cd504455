"""Cumulative logits against spacecutter, crops' views, mirroring, training and its continuation."""

import numpy as np
import pytest
import torch

import utils

CROP = {"scope": "level", "shape": [32, 32, 32], "extent_mm": [32.0, 48.0, 64.0], "shift_mm": [0.0, 0.0, 0.0]}


def test_probabilities_and_loss_equal_spacecutter():
    from spacecutter.losses import CumulativeLinkLoss
    from spacecutter.models import LogisticCumulativeLink

    torch.manual_seed(0)
    score, grades = torch.randn(64, dtype=torch.float32) * 3, torch.randint(0, 3, (64,))
    link = LogisticCumulativeLink(3)
    expected = link(score[:, None])
    log_p = utils.cumulative_log_probabilities(score, link.cutpoints.detach())
    torch.testing.assert_close(log_p.exp(), expected.detach(), atol=1e-6, rtol=1e-5)
    reference = CumulativeLinkLoss(class_weights=torch.tensor(utils.SEVERITY_WEIGHTS, dtype=torch.float32))
    torch.testing.assert_close(utils.cumulative_link_loss(log_p, grades), reference(expected, grades[:, None]).detach())


def test_gradients_equal_spacecutter():
    from spacecutter.losses import CumulativeLinkLoss
    from spacecutter.models import LogisticCumulativeLink

    score = torch.linspace(-4, 4, 30)
    grades = torch.arange(30) % 3
    link = LogisticCumulativeLink(3)
    theirs = score.clone().requires_grad_()
    CumulativeLinkLoss()(link(theirs[:, None]), grades[:, None]).backward()
    ours, cutpoints = score.clone().requires_grad_(), link.cutpoints.detach().clone().requires_grad_()
    log_p = utils.cumulative_log_probabilities(ours, cutpoints)
    utils.cumulative_link_loss(log_p, grades, class_weights=(1, 1, 1)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(cutpoints.grad, link.cutpoints.grad, atol=1e-6, rtol=1e-4)


def test_extreme_scores_stay_finite_with_a_gradient():
    score = torch.tensor([-100.0, -17.0, 17.0, 100.0], requires_grad=True)
    log_p = utils.cumulative_log_probabilities(score, torch.tensor([-1.0, 0.0]))
    assert torch.isfinite(log_p).all()
    # The severe class at a very low score: a difference of sigmoids gives exactly 0 here, and no gradient.
    log_p[0, 2].backward()
    assert score.grad[0] == pytest.approx(1.0)


def test_missing_labels_do_not_count():
    log_p = torch.log_softmax(torch.randn(6, 5, 3), -1)
    grades = torch.randint(0, 3, (6, 5))
    masked = grades.clone()
    masked[2:] = -1
    for by_weight in (False, True):
        part = utils.cumulative_link_loss(log_p[:2], grades[:2], by_weight=by_weight)
        torch.testing.assert_close(utils.cumulative_link_loss(log_p, masked, by_weight=by_weight), part)
    assert utils.cumulative_link_loss(log_p, torch.full_like(grades, -1)) == 0


def test_heads_start_at_the_prior_with_ascending_cutpoints():
    prior = np.random.default_rng(0).dirichlet((5, 2, 2), (5, 5))
    heads = utils.CumulativeHeads(prior)
    probabilities = utils.cumulative_log_probabilities(torch.zeros(5, 5), heads.cutpoints).exp()
    np.testing.assert_allclose(probabilities.detach().numpy(), prior, atol=2e-3)
    with torch.no_grad():
        heads.gap.fill_(-50)
    assert ((heads.cutpoints[..., 1] - heads.cutpoints[..., 0]) > heads.margin - 1e-6).all()


def test_views_cut_shift_and_mirror():
    crops = torch.randn(2, 3, *utils.margin_shape(CROP["shape"]))
    edge = [(n - s) // 2 for n, s in zip(crops.shape[2:], CROP["shape"], strict=True)]
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
    crops = torch.zeros(1, 3, *utils.margin_shape(CROP["shape"]))
    d, h, w = crops.shape[2:]
    # A point 10 mm towards the foot of the centre: 10 voxels; after a quarter turn about the left axis it lies
    # 10 mm in front of or behind it: 5 voxels.
    crops[0, :, d // 2 + 10, h // 2, w // 2] = 1
    turned = utils.view_crops(crops, CROP, rotation_deg=torch.tensor([[90.0, 0.0, 0.0]]))[0, 0]
    place = np.array(np.unravel_index(int(turned.argmax()), turned.shape)) - np.array(turned.shape) // 2
    assert abs(place[0]) <= 1 and abs(abs(place[1]) - 5) <= 1 and abs(place[2]) <= 1


def test_mirroring_swaps_left_and_right_conditions():
    grades = np.arange(2 * 5 * 5).reshape(2, 5, 5)
    mirrored = utils.mirror_conditions(grades, np.array([True, False]))
    for condition, name in enumerate(utils.CONDITIONS):
        other = name.replace("left", "?").replace("right", "left").replace("?", "right")
        assert (mirrored[0, condition] == grades[0, utils.CONDITIONS.index(other)]).all()
    assert (mirrored[1] == grades[1]).all()
    as_tensor = utils.mirror_conditions(torch.from_numpy(grades), torch.tensor([True, False]))
    assert (as_tensor.numpy() == mirrored).all()


class Blobs(utils.CropDataset):
    """Studies whose only sign of disease is a bright blob, on the left for left and on the right for right."""

    def __init__(self, studies, seed):
        rng = np.random.default_rng(seed)
        grades = np.zeros((studies, 5, 5), np.int64)
        grades[:, 3:5] = rng.choice(3, (studies, 2, 5))
        super().__init__({}, range(studies), grades, None, CROP)
        shape = utils.margin_shape(CROP["shape"])
        self.stored = 0.1 * rng.standard_normal((studies, 5, 3, *shape)).astype(np.float16)
        middle = shape[2] // 2
        for study in range(studies):
            for level in range(5):
                left, right = grades[study, 3, level], grades[study, 4, level]
                self.stored[study, level, 1, 14:24, 14:24, middle + 4 : middle + 12] += left
                self.stored[study, level, 1, 14:24, 14:24, middle - 12 : middle - 4] += right

    def crops_of(self, study_id):
        return self.stored[study_id]


CONFIG = {
    "backbone": "tiny",
    "epochs": 4,
    "batch": 8,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "dropout": 0.0,
    "strength": 0.3,
    "ema": 0.9,
    "about": {},
}


def test_training_learns_sides_and_mirrored_views_agree(tmp_path):
    train, valid = Blobs(16, 0), Blobs(6, 1)
    history = utils.train_classifier(tmp_path, "level_0", train, valid, {**CONFIG, "epochs": 7}, seed=1)
    model, about = utils.load_classifier(tmp_path / "level_0.safetensors")
    assert about["crop"] == CROP and len(history) == 7
    plain = utils.predict_dataset([model], valid)
    score = utils.score_arrays(valid.grades, plain)["subarticular"]
    prior = utils.class_prior(train.grades)
    assert score < 0.7 * utils.score_arrays(valid.grades, np.broadcast_to(prior, plain.shape))["subarticular"]
    # Seen in the mirror, with the labels swapped back, the prediction stays by and large what it was.
    mirrored = utils.predict_dataset([model], valid, ({"mirror": True},))
    assert np.abs(mirrored - plain).mean() < 0.1
    assert (
        np.abs(utils.mirror_conditions(mirrored) - plain)[:, 3:5].mean() > 2 * np.abs(mirrored - plain)[:, 3:5].mean()
    )


def test_a_killed_training_continues_to_the_same_result(tmp_path, monkeypatch):
    train, valid = Blobs(4, 0), Blobs(2, 1)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = utils.train_classifier(tmp_path / "whole", "a", train, valid, CONFIG)
    calls = []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(*args, **kwargs)

    from lumbar import classifiers

    predict = classifiers.predict_dataset
    monkeypatch.setattr(classifiers, "predict_dataset", killed)
    with pytest.raises(KeyboardInterrupt):
        utils.train_classifier(tmp_path / "killed", "a", train, valid, CONFIG)
    monkeypatch.setattr(classifiers, "predict_dataset", predict)
    continued = utils.train_classifier(tmp_path / "killed", "a", train, valid, CONFIG)
    np.testing.assert_allclose(continued.to_numpy(), whole.to_numpy(), rtol=1e-4)
    assert not (tmp_path / "killed" / "a.checkpoint").exists()


def test_backbones():
    with pytest.raises(ValueError, match="unknown backbone"):
        utils.make_backbone("resnet", (32, 32, 32))
    with pytest.raises(ValueError, match="divisible by 32"):
        utils.make_backbone("coatnet_rmlp_3_rw", (100, 128, 128))
    model = utils.OrdinalClassifier("study", "tiny", (48, 16, 32), np.full((5, 5, 3), 1 / 3)).eval()
    log_p = model(torch.zeros(2, 3, 48, 16, 32))
    assert log_p.shape == (2, 5, 5, 3)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 5, 5))
