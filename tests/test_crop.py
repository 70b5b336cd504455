"""The crop of a 3D network: one order of axes, from the parameters to the weights file and back."""

import numpy as np
import pytest
from safetensors.torch import load_file
from small_study import make_study

import utils
from lumbar.data.crop import CROP_AXES, Crop
from lumbar.grade.classifier import OrdinalClassifier, save_classifier
from lumbar.grade.crops import cut_crops, margin_shape
from lumbar.storage import open_tensors, write_tensors


@pytest.mark.parametrize("scope", ["level", "study"])
def test_what_is_given_replaces_its_part_of_the_full_size(scope):
    full = Crop.full_size(scope)
    assert Crop.full_size(scope, shape=[16, 32, 48]) == Crop(scope, (16, 32, 48), full.extent_mm, full.shift_mm)
    assert Crop.full_size(scope, extent_mm=[1, 2, 3]).extent_mm == (1.0, 2.0, 3.0)
    assert Crop.from_json(full.to_json()) == full


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("disc", (8, 8, 8), (1, 1, 1)), "SCOPE"),
        (("level", (8, 8), (1, 1, 1)), "SHAPE"),
        (("level", (8, 8, 8), (1, 1)), "EXTENT_MM"),
        (("level", (8, 8, 8), (1, 1, 1), (1,)), "SHIFT_MM"),
        (("study", (8, 8, 8), (1, 1, 1), (0, 14, 0)), "SHIFT_MM"),
    ],
)
def test_a_crop_that_cannot_be_cut_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Crop(*given)
    if said == "SCOPE":
        with pytest.raises(ValueError, match=said):
            Crop.full_size("disc")


def test_a_margin_keeps_the_size_of_voxels():
    crop = Crop("level", (16, 32, 48), (40.0, 48.0, 64.0), (1.0, 2.0, 3.0))
    grown = crop.resized(margin_shape(crop.shape))
    voxel_mm = np.divide(crop.extent_mm, crop.shape)
    np.testing.assert_allclose(np.divide(grown.extent_mm, grown.shape), voxel_mm)
    assert grown.shape == margin_shape(crop.shape) and grown.shift_mm == crop.shift_mm


@pytest.mark.parametrize("scope", ["level", "study"])
def test_weights_from_before_the_axes_were_stated_see_the_same_crop(scope, tmp_path):
    path = tmp_path / f"{scope}_0.safetensors"
    model = OrdinalClassifier(scope, "tiny", (32, 32, 32), np.full((5, 5, 3), 1 / 3))
    save_classifier(path, model, {"crop": Crop.full_size(scope, (32, 32, 32))})
    with open_tensors(path, "classifier", "", whose="") as (about, _):
        assert about["crop"]["axes"] == CROP_AXES
    about["crop"] = {
        "scope": scope,
        "shape": [32, 32, 32],
        "extent_mm": [44.0, 62.0, 82.0],
        "shift_mm": [2.0, -3.0, 14.0],
    }
    write_tensors(path, load_file(path), "classifier", about)
    _, read = utils.load_classifier(path)
    # They were along head, left, back.
    expected = Crop("level", (32, 32, 32), (44.0, 82.0, 62.0), (-2.0, 14.0, -3.0))
    assert read["crop"] == (expected if scope == "level" else Crop("study", expected.shape, expected.extent_mm))


def test_a_crop_is_moved_towards_foot_back_and_left():
    study = make_study()
    box = utils.LevelBox("l1_l2", np.zeros(3), np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]), np.ones(3))
    still = Crop("level", (20, 20, 20), (40.0, 40.0, 40.0))
    plain, _ = utils.crop_level(study, box, still)
    for axis in range(3):
        moved, _ = utils.crop_level(study, box, Crop("level", still.shape, still.extent_mm, np.eye(3)[axis] * 4.0))
        ahead = [slice(None)] * 4
        behind = list(ahead)
        ahead[axis + 1], behind[axis + 1] = slice(2, None), slice(None, -2)
        np.testing.assert_allclose(moved[tuple(behind)], plain[tuple(ahead)], atol=2e-3)
        assert np.abs(moved.astype(float) - plain).max() > 0.05
    with_margin = cut_crops(study, [box] * 5, still)
    assert with_margin.shape == (5, 3, 24, 24, 24)
    np.testing.assert_allclose(with_margin[0, :, 2:-2, 2:-2, 2:-2], plain, atol=2e-3)
