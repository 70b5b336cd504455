"""What the benchmarks compare with: solution B's scheme of detectors, and networks with one mean over the volume."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.baselines import (
    GlobalClassifier,
    GlobalRecipe,
    WholeSlices,
    letterbox_slice,
    load_global,
    load_original,
    original_names,
    original_study,
)
from test_yolo import BrightNet, axial_volume, dataset, sagittal_volume, train_in_child  # noqa: F401

import utils
from lumbar.data.volume import Study
from lumbar.grade.classifier import OrdinalClassifier, load_classifier, save_classifier
from lumbar.grade.crop_members import LevelCrops
from lumbar.grade.crops import margin_shape
from lumbar.grade.detector import YoloDetector
from lumbar.grade.detector_member import Detectors
from lumbar.grade.trainer import TrainConfig, train_classifier
from lumbar.storage import DamagedFile


@pytest.mark.parametrize("shape", [(60, 96), (96, 60), (500, 300)])
def test_a_letterboxed_slice_is_whole_and_its_pixels_are_where_the_transform_says(shape):
    volume = replace(sagittal_volume(), array=np.zeros((2, *shape), np.float32))
    at = np.array([shape[0] * 3 // 4, shape[1] // 4])
    half = max(shape) // 32
    volume.array[1, at[0] - half : at[0] + half + 1, at[1] - half : at[1] + half + 1] = 1.0
    image, to_slice = letterbox_slice(volume, 1, 128)
    assert image.shape == (128, 128)
    short = 128 * min(shape) / max(shape)
    rows, columns = (image != 114).any(1).sum(), (image != 114).any(0).sum()
    assert abs(min(rows, columns) - short) <= 1 and max(rows, columns) == 128
    bright = np.where(image == 114, 0, image)
    row, column = (np.indices(image.shape) * bright).sum((1, 2)) / bright.sum()
    np.testing.assert_allclose((to_slice @ [column, row, 1])[1::-1], at, atol=0.3 * max(shape) / 128)


@pytest.fixture(scope="module")
def original_dataset(dataset):  # noqa: F811
    folder = dataset["root"] / "nfn_original"
    info = utils.write_yolo_dataset(folder, *dataset["arguments"], images=WholeSlices("nfn", 96))
    return {"dir": folder, "info": info}


def test_original_scheme_names_condition_level_and_severity(dataset, original_dataset):  # noqa: F811
    from PIL import Image

    info, names = original_dataset["info"], original_names("nfn")
    assert info["names"] == names and len(names) == 30 and len(original_names("scs")) == 15
    assert info["shape_px"] == [96, 96] and info["box_px"] == 5.0
    files = sorted((original_dataset["dir"] / "images").iterdir())
    assert len(files) == 8  # the labelled slices and no others
    seen = []
    for path in files:
        study, image = int(path.stem.split("_")[0]), np.asarray(Image.open(path))
        lines = np.loadtxt(original_dataset["dir"] / "labels" / f"{path.stem}.txt", ndmin=2)
        for cls, x, y, w, h in lines:
            np.testing.assert_allclose([w * 96, h * 96], 5.0, atol=1e-3)
            row, column = int(y * 96), int(x * 96)
            assert image[row - 1 : row + 2, column - 1 : column + 2].max() > 100
            seen.append((study, names[int(cls)]))
    expected = [
        (study, f"{utils.CONDITIONS[c]}_{utils.LEVELS[level]}_{utils.SEVERITIES[dataset['grades'][n, c, level]]}")
        for n, study in enumerate(range(101, 105))
        for c in (1, 2)
        for level in range(5)
        if dataset["grades"][n, c, level] >= 0
    ]
    assert sorted(seen) == sorted(expected)
    before = (original_dataset["dir"] / "dataset.json").stat().st_mtime_ns
    utils.write_yolo_dataset(original_dataset["dir"], *dataset["arguments"], images=WholeSlices("nfn", 96))
    assert (original_dataset["dir"] / "dataset.json").stat().st_mtime_ns == before


class ClassNet(BrightNet):
    """Stands in for a network of the original scheme: the score of class c is a slice's mean if it is c / 100."""

    def forward(self, x):
        cls = (x.mean((1, 2, 3)) * 100).round().long()
        p = torch.full((len(x), 30, 144), 0.01)
        p[torch.arange(len(x)), cls, 7] = 0.5 + 0.01 * torch.arange(len(x)) % 2
        head = {"scores": torch.logit(p)}
        return None, {"one2one": head, "one2many": head}


def test_original_scheme_takes_the_best_confidence_over_all_slices():
    names = original_names("nfn")
    meta = {"condition": "nfn", "scheme": "original", "imgsz": 96, "shape_px": [96, 96], "names": names}
    detector = YoloDetector(ClassNet().eval(), meta | {"calibration": None, "views": [{}]})
    study = Study(1, [sagittal_volume(), sagittal_volume(description="Sagittal T2/STIR")])
    found = names.index("right_neural_foraminal_narrowing_l4_l5_severe")
    study.volumes[0].array[:] = 0.0
    study.volumes[0].array[3] = found / 100
    study.volumes[1].array[:] = names.index("left_neural_foraminal_narrowing_l2_l3_severe") / 100  # another series
    p, nothing = original_study(detector, study, batch=2), original_study(detector, Study(2, [axial_volume(0.0)]))
    assert p.shape == (2, 5, 3)
    expected = np.full((2, 5, 3), 1 / 3)
    expected[0, 0] = np.array([0.5, 0.01, 0.01]) / 0.52  # class 0: all dark slices
    expected[1, 3] = np.array([0.01, 0.01, 0.5]) / 0.52
    np.testing.assert_allclose(p, expected, atol=0.01)
    np.testing.assert_allclose(nothing, 1 / 3)


@pytest.mark.slow
def test_original_scheme_trains_and_predicts_and_the_kit_refuses_it(dataset, original_dataset, tmp_path):  # noqa: F811
    done = train_in_child(original_dataset["dir"], tmp_path, "go", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    weights = tmp_path / "yolo_nfn_0.safetensors"
    detector = load_original(weights)
    assert detector.about["scheme"] == "original" and len(detector.net.names) == 30
    p = original_study(detector, utils.load_study(utils.study_paths(dataset["root"])[101]))
    assert p.shape == (2, 5, 3) and np.abs(p - 1 / 3).max() > 1e-4
    np.testing.assert_allclose(p.sum(-1), 1)
    for read in (utils.load_yolo, Detectors().read_about):
        with pytest.raises(DamagedFile, match="yolo_nfn_0.safetensors states scheme 'original'"):
            read(weights)


@pytest.mark.parametrize("scope", ["level", "study"])
def test_a_global_network_sees_one_vector_and_the_kit_refuses_it(tmp_path, scope):
    prior = np.random.default_rng(0).dirichlet((5, 2, 2), (5, 5))
    x, level = torch.randn(3, 3, 32, 32, 32), torch.tensor([0, 2, 4])
    model = GlobalClassifier(scope, "tiny", (32, 32, 32), prior).eval()
    log_p = model(x, level)
    assert log_p.shape == ((3, 5, 3) if scope == "level" else (3, 5, 5, 3))
    path = tmp_path / f"{scope}_0.safetensors"
    save_classifier(path, model, {"fold": 0})
    again, about = load_global(path)
    assert about["pooling"] == again.layout == "global"
    torch.testing.assert_close(again(x, level), log_p)
    # What stands where in the features does not matter.
    turned = torch.flip(model.backbone.forward_features(x), (2, 3, 4))
    model.backbone.forward_features = lambda _: turned
    torch.testing.assert_close(model(x, level), log_p, atol=1e-4, rtol=1e-4)
    if scope == "level":
        torch.testing.assert_close(model(x, torch.zeros_like(level)), log_p, atol=1e-4, rtol=1e-4)
        assert model(x, level[:, None].expand(3, 2)).shape == (3, 2, 5, 3)
    else:
        assert model.score.out_features == 25 and not hasattr(model, "attention")
    for read in (load_classifier, LevelCrops().read_about):
        with pytest.raises(DamagedFile, match=f"{scope}_0.safetensors states pooling 'global', it must be one of grid"):
            read(path)
    save_classifier(path, OrdinalClassifier(scope, "tiny", (32, 32, 32), prior), {})
    with pytest.raises(DamagedFile, match="pooling 'grid', it must be one of global"):
        load_global(path)


class Noise(torch.utils.data.Dataset):
    """Crops of noise with the interface of CropDataset."""

    def __init__(self, study_ids):
        self.study_ids, self.per_study = study_ids, 5
        self.crop = utils.Crop("level", (32, 32, 32), (1.0, 1.0, 1.0))
        self.grades = np.random.default_rng(0).choice(3, (len(study_ids), 5, 5))

    def __len__(self):
        return 5 * len(self.study_ids)

    def crops_of(self, study_id):
        generator = torch.Generator().manual_seed(study_id)
        return torch.randn(5, 3, *margin_shape((32, 32, 32)), generator=generator).half().numpy()

    def __getitem__(self, number):
        study, level = divmod(number, 5)
        crop = torch.from_numpy(self.crops_of(self.study_ids[study])[level])
        return crop, level, torch.from_numpy(self.grades[study, :, level])


@pytest.mark.slow
def test_the_kits_trainer_trains_a_global_network(tmp_path):
    config = TrainConfig(
        backbone="tiny", epochs=1, batch=5, learning_rate=1e-3, weight_decay=0.01, dropout=0.1, strength=0.0, ema=0.9
    )
    data = Noise([1, 2]), Noise([3])
    history = train_classifier(tmp_path, "a_levels", *data, config, {"fold": 0}, "cpu", recipe=GlobalRecipe())
    assert len(history) == 1 and load_global(tmp_path / "a_levels.safetensors")[1]["fold"] == 0
