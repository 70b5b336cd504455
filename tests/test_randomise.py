"""Training images rendered on the fly: do labels and pixels belong together, whatever was done to them?"""

import numpy as np
import pytest
import torch

import phantom
import utils
from lumbar.names import VERTEBRAE
from lumbar.spine import synthesis
from lumbar.spine.spinenet import SpineNet
from lumbar.spine.spinenet_training import SpineSlices
from lumbar.spine.synthesis import ARTEFACTS, load_anatomy, random_greys, random_slice, spoil

SHAPE = (160, 120)
# What else a body may be made of.
BONE = ("cortex", "oedema", "sclerosis", "haemangioma", "lesion", "vein", "metal", "metal_rim")


@pytest.fixture(scope="module")
def anatomies(tmp_path_factory):
    return utils.paint_anatomies(tmp_path_factory.mktemp("anatomies"), 2, seed=3, workers=1)


def inside(corners_px, shape, grow):
    """Mask of a quadrilateral whose corners are moved away from (grow > 1) or to its centre."""
    centre = corners_px.mean(0)
    corners = centre + grow * (corners_px - centre)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    sides = []
    for (r0, c0), (r1, c1) in zip(corners, np.roll(corners, -1, 0)):
        sides.append((r1 - r0) * (columns - c0) - (c1 - c0) * (rows - r0))
    return np.all(np.array(sides) >= 0, 0) | np.all(np.array(sides) <= 0, 0)


@pytest.mark.slow
def test_painted_anatomies_are_found_again(anatomies):
    before = [path.stat().st_mtime_ns for path in anatomies]
    again = utils.paint_anatomies(anatomies[0].parent, 2, seed=3, workers=1)
    assert again == anatomies and [path.stat().st_mtime_ns for path in again] == before
    with pytest.raises(FileNotFoundError, match="paint_anatomies"):
        load_anatomy(anatomies[0].with_name("absent.safetensors"))


@pytest.mark.slow
def test_planes_are_the_painted_tissues(anatomies):
    about, planes = load_anatomy(anatomies[0])
    _, _, _, grids, _, _ = phantom.simulate(about["seed"], prevalence=2.0, transitional=0.1, variety="wide")
    for number, grid in enumerate(grids):
        part = planes(number, 5, 8)
        first = int(round((part.origin_mm[0] - grid.origin_mm[0]) / grid.step_mm[0]))
        for name in ("under", "over", "share"):
            np.testing.assert_array_equal(getattr(part, name), getattr(grid, name)[first : first + 6 : 2])


@pytest.mark.slow
def test_corners_lie_on_the_rendered_bodies(anatomies, monkeypatch):
    """Bone marrow white and all else black: bodies fill their corners, the discs between them do not."""
    greys = np.zeros(len(phantom.TISSUES), np.float32)
    for name in phantom.TISSUES:
        greys[phantom.TISSUE[name]] = "marrow" in name or name in BONE
    monkeypatch.setattr(synthesis, "random_greys", lambda rng: greys)
    filled, between = [], []
    for path in anatomies:
        about, planes = load_anatomy(path)
        half_mm = np.array([body.width_mm / 2 for body in about["vertebrae"]])
        for seed in range(12):
            rng = np.random.default_rng(seed)
            image, corners_px, offset_mm, front_px = random_slice(about, planes, rng, SHAPE, 1.5)
            assert image.shape == SHAPE and front_px.shape == SHAPE[:1]
            for k in range(3, 9):  # T11 to L4: neither tilted nor cut
                window = inside(corners_px[k], SHAPE, 0.7)
                whole = ((corners_px[k] > 0) & (corners_px[k] < np.array(SHAPE) - 1)).all()
                if not whole or abs(offset_mm[k]) > 0.5 * half_mm[k]:
                    continue
                filled.append(image[window].mean())
                disc = np.stack([corners_px[k][3], corners_px[k][2], corners_px[k + 1][1], corners_px[k + 1][0]])
                if inside(disc, SHAPE, 0.6).any():
                    between.append(image[inside(disc, SHAPE, 0.6)].mean())
    assert len(filled) > 30
    assert np.median(filled) > 0.93 and np.quantile(filled, 0.1) > 0.75
    assert np.median(between) < 0.35


@pytest.mark.slow
def test_items_are_reproducible_and_different(anatomies):
    slices = utils.RandomisedSlices(anatomies, 6, SHAPE, 1.5, 2.0, seed=1)
    items = [slices[k] for k in range(6)]
    for k, item in enumerate(items):
        again = slices[k]
        assert set(item) == {"heat", "vectors", "near", "classes", "weight", "image"}
        assert all(torch.equal(item[name], again[name]) for name in item)
        assert item["image"].shape == (1, *SHAPE) and item["heat"].shape == (5, *SHAPE)
        assert torch.isfinite(item["image"]).all() and item["image"].min() >= -0.5 and item["image"].max() <= 2
    assert all(not torch.equal(items[0]["image"], other["image"]) for other in items[1:])
    assert not torch.equal(items[0]["image"], utils.RandomisedSlices(anatomies, 6, SHAPE, 1.5, 2.0, seed=2)[0]["image"])
    assert sum(float(item["heat"][4].max()) > 0.9 for item in items) >= 3
    with pytest.raises(ValueError, match="paint_anatomies"):
        utils.RandomisedSlices([], 6, SHAPE, 1.5, 2.0)


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_every_artefact_changes_the_image_and_stays_finite(artefact, monkeypatch):
    image = 0.2 + 0.6 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)).numpy()
    front_px = np.full(SHAPE[0], 60, np.float32)
    results = []
    for chance in (0.0, 1.0):
        monkeypatch.setattr(synthesis, "ARTEFACTS", {name: chance * (name == artefact) for name in ARTEFACTS})
        results.append(spoil(image.copy(), front_px, np.random.default_rng(4), 1.5))
        assert results[-1].shape == SHAPE and np.isfinite(results[-1]).all() and results[-1].dtype == np.float32
    assert np.abs(results[0] - results[1]).max() > 0.01


def test_greys_keep_disc_and_bone_apart():
    marrow, annulus = phantom.TISSUE["marrow"], phantom.TISSUE["annulus"]
    tables = np.stack([random_greys(np.random.default_rng(seed)) for seed in range(200)])
    assert tables.shape == (200, len(phantom.TISSUES)) and tables.min() >= 0 and tables.max() <= 1.3
    assert np.mean(np.abs(tables[:, marrow] - tables[:, annulus]) > 0.03) > 0.8
    assert 0.15 < np.mean(tables[:, marrow] < tables[:, annulus]) < 0.6  # both ways round


@pytest.mark.slow
def test_the_mixture_takes_its_share_from_each_source(anatomies):
    record = {
        "image": torch.full(SHAPE, 0.5, dtype=torch.float16),
        "corners_px": torch.tensor([[[50.0, 40], [50, 60], [70, 60], [70, 40]]]),
        "classes": torch.tensor([1]),
        "certain": torch.tensor([True]),
    }
    only = utils.training_slices([], [record], 8, SHAPE, 1.5, 2.0)
    assert isinstance(only, SpineSlices) and len(only) == 8
    both = utils.training_slices(anatomies, [record], 40, SHAPE, 1.5, 2.0, share=0.75, seed=2)
    rendered = utils.RandomisedSlices(anatomies, 40, SHAPE, 1.5, 2.0, seed=2)
    acquired = SpineSlices([record], 40, SHAPE, 2.0, seed=2)
    sources = []
    for k in range(12):
        first, second = (torch.equal(both[k]["image"], s[k]["image"]) for s in (rendered, acquired))
        assert first != second
        sources.append(first)
    assert 0 < sum(sources) < 12
    with pytest.raises(ValueError, match="nothing to learn from"):
        utils.training_slices([], [], 8, SHAPE, 1.5, 2.0)


@pytest.mark.slow
def test_the_layout_of_anatomies_is_a_prior(anatomies):
    prior = utils.prior_of_anatomies(anatomies)
    assert set(VERTEBRAE[3:9]) <= set(prior["layout_mm"])
    height = [np.mean(prior["layout_mm"][name], 0)[2] for name in ("L1", "L3", "L5", "S1")]
    assert height == sorted(height, reverse=True) and abs(height[1]) < 60


@pytest.mark.slow
def test_training_goes_on_from_given_weights(anatomies, tmp_path):
    torch.manual_seed(0)
    start = SpineNet((16, 16), 1, 3.0)
    start.about = {"prior": "kept"}
    slices = utils.training_slices(anatomies, [], 4, (64, 48), 3.0, 1.0)
    with pytest.raises(ValueError, match="product"):
        utils.train_spinenet(slices, tmp_path / "a", steps=3, batch_size=2)
    model, history = utils.train_spinenet(
        slices, tmp_path / "b", start=start, steps=2, batch_size=2, crop_px=(64, 48), learning_rate=0.0
    )
    assert model.about == {"prior": "kept"} and model.resolution_mm == 3.0 and len(history) == 2
    for name, value in start.named_parameters():
        assert torch.equal(value, dict(model.named_parameters())[name])
