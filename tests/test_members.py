"""Members from weights files to predictions: what fails costs its own contribution."""

import json
import threading
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from small_study import make_boxes
from stand_in import SAYS, level_prior, register

import utils
from lumbar.data.volume import Study, Volume
from lumbar.grade import detector_member
from lumbar.grade.classifier import crops_to_studies, predict_crops
from lumbar.grade.crop_members import LevelCrops
from lumbar.grade.crops import cut_crops
from lumbar.grade.detector import YoloDetector, yolo_scores, yolo_studies
from lumbar.grade.detector_member import Detectors
from lumbar.grade.ensemble import default_ensemble
from lumbar.grade.member import Weights, together_or_alone
from lumbar.grade.registry import member_of, member_weights
from lumbar.names import LABEL_COLUMNS
from lumbar.serve.members import weight_folders
from lumbar.spine.spinenet import SpineNet
from lumbar.storage import DamagedFile

CROP = utils.Crop("level", (8, 8, 8), (8.0, 8.0, 8.0))


# ---- Networks on crops ----


def study_of(number, kind=Study):
    """A study whose crops have the value number / 8 throughout, all that a network can tell it by."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[-10.0, 0, 0], [0, 0, 4.0], [0, -4.0, 0]])
    affine[:3, 3] = [20, -60, 120]
    array = np.full((5, 60, 32), number / 8, np.float16)
    return kind(number, [Volume(array, affine, number, 11, "Sagittal T1", 0, np.arange(5) + 1)])


def numbers_in(crops):
    """The numbers of the studies that crops are of."""
    return (crops[:, 0].amax((1, 2, 3)).float() * 8).round().int().tolist()


class SaysTheSame(torch.nn.Module):
    """Stands in for an OrdinalClassifier of scope level; look: is called with the numbers of each batch's studies, and
    may raise, or give log probabilities instead."""

    scope = "level"

    def __init__(self, look=lambda numbers: None):
        super().__init__()
        self.look, self.nothing = look, torch.nn.Parameter(torch.zeros(1))

    def forward(self, crops, level=None):
        said = torch.as_tensor(SAYS).log().expand(len(crops), 5, 3)
        instead = self.look(numbers_in(crops))
        return said if instead is None else instead


def level_weights(*models, views=()):
    """A fold of each model; views: of each, the plain one by default."""
    return [
        Weights(f"level_{k}", model, {"crop": CROP, "views": views[k] if views else [{}]})
        for k, model in enumerate(models)
    ]


def predict_levels(weights, studies, most_views=-1):
    """The member's predictions, with inputs that were made ahead: (list of (5, 5, 3), list of lists of sentences)."""
    member = LevelCrops()
    inputs = [member.prepare(study, make_boxes(), weights, "cpu") for study in studies]
    found = member.predict(inputs, weights, most_views, "cpu")
    return [own.probabilities for own in found], [list(map(str, own.problems)) for own in found]


def is_said(rows):
    np.testing.assert_allclose(rows, np.tile(SAYS, (5, 5, 1)), atol=1e-6)


class FellOff(Study):
    """A study that no crop can be cut from."""

    def of(self, description):
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("the crop fell off") from error


def test_a_crop_that_cannot_be_cut_costs_its_study():
    weights = level_weights(SaysTheSame(), SaysTheSame())
    (first, second), (none, problems) = predict_levels(weights, [study_of(1), study_of(2, FellOff)])
    is_said(first)
    assert np.isnan(second).all() and none == []
    assert problems == ["level: ValueError: the crop fell off"]  # once, whatever the folds


def test_a_failing_fold_costs_its_own_contribution():
    def not_finite(numbers):
        return torch.full((len(numbers), 5, 3), torch.nan)

    # Folds whose views differ go through the networks one after the other.
    weights = level_weights(SaysTheSame(), SaysTheSame(not_finite), views=([{}], [{}, {"mirror": True}]))
    (p,), (problems,) = predict_levels(weights, [study_of(1)])
    is_said(p)
    assert len(problems) == 1 and problems[0].startswith("level: ValueError: the network's answer is not finite")


def test_a_batch_that_fails_is_tried_study_by_study():
    batches = []

    def refuse(numbers):
        batches.append(sorted(set(numbers)))
        if 2 in numbers:
            raise RuntimeError("CUDA error")

    (first, second), (none, problems) = predict_levels(level_weights(SaysTheSame(refuse)), [study_of(1), study_of(2)])
    is_said(first)
    assert np.isnan(second).all() and none == [] and problems == ["level: RuntimeError: CUDA error"]
    assert batches == [[1, 2], [1], [2]]


def test_what_is_not_finite_is_no_prediction():
    def lost(numbers):
        log_p = torch.as_tensor(SAYS).log().repeat(len(numbers), 5, 1)
        log_p[[k for k, number in enumerate(numbers) if number == 2]] = torch.nan
        return log_p

    (first, second), (none, problems) = predict_levels(level_weights(SaysTheSame(lost)), [study_of(1), study_of(2)])
    is_said(first)
    assert np.isnan(second).all() and none == [] and "not finite" in problems[0]


class Lopsided(SaysTheSame):
    """What it says follows from the brightness at the left and towards the edges."""

    def forward(self, crops, level=None):
        parts = (crops[:, 0, :, :, :3], crops[:, 0, :, :, 3:], crops[:, 0, 3:5, 3:5, 3:5])
        brightness = torch.stack([part.float().mean((1, 2, 3)) for part in parts], -1)
        return (9 * brightness).log_softmax(-1)[:, None].expand(-1, 5, -1)


@pytest.mark.parametrize("most, expected", [(-1, 3), (1, 1), (2, 2), (9, 3)])
def test_crops_are_seen_through_the_first_views(most, expected):
    paid = [{}, {"mirror": True}, {"scale": 1.1}]
    network = Lopsided()
    study = study_of(3)
    study.volumes[0].array[:] = np.random.default_rng(0).random(study.volumes[0].array.shape)
    (found,), _ = predict_levels(level_weights(network, views=[paid]), [study], most)
    crops = cut_crops(study, make_boxes(), CROP)
    by_count = [
        crops_to_studies(predict_crops([network], crops, CROP, np.arange(5), paid[:count]), "level")[0]
        for count in (1, 2, 3)
    ]
    assert np.abs(by_count[0] - by_count[1]).max() > 1e-5 and np.abs(by_count[1] - by_count[2]).max() > 1e-5
    np.testing.assert_allclose(found, by_count[expected - 1], atol=1e-6)


class FullAtFirst(Study):
    """A study for which the device's memory is full as long as other threads than the main one ask."""

    asked = []

    def of(self, description):
        in_main = threading.current_thread() is threading.main_thread()
        self.asked.append(in_main)
        if not in_main:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().of(description)


def test_crops_that_found_the_memory_full_are_cut_again():
    member, weights, inputs = LevelCrops(), level_weights(SaysTheSame()), []
    thread = threading.Thread(
        target=lambda: inputs.append(member.prepare(study_of(2, FullAtFirst), make_boxes(), weights, "cpu"))
    )
    thread.start()
    thread.join()
    assert FullAtFirst.asked == [False]
    (prediction,) = member.predict(inputs, weights, -1, "cpu")
    is_said(prediction.probabilities)
    assert prediction.problems == () and FullAtFirst.asked[1:] and all(FullAtFirst.asked[1:])


def test_errors_that_are_kept_hold_no_frames():
    (kept,) = LevelCrops().prepare(study_of(1, FellOff), make_boxes(), level_weights(None), "cpu").crops.values()

    class NoBoxes:
        def __iter__(self):
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise ValueError("outer") from error

    def work(items):
        raise RuntimeError(items)

    (silent,) = yolo_scores(detector("scs"), [study_of(1)], [NoBoxes()])
    for error in (kept, silent, *together_or_alone(work, [1, 2])):
        assert isinstance(error, Exception)
        assert error.__traceback__ is None and error.__context__ is None and error.__cause__ is None


# ---- Detectors ----


class Bright(torch.nn.Module):
    """Stands in for a detector's network: an anchor's severe score is the brightness of its cell, the moderate one a
    share of it.

    look: is called with the number of patches, and may raise.
    """

    stride = torch.tensor([8.0])

    def __init__(self, look, moderate):
        super().__init__()
        self.look, self.moderate, self.nothing = look, moderate, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.look(len(x))
        bright = torch.nn.functional.max_pool2d(x, 8).flatten(1)
        p = torch.stack([torch.full_like(bright, 0.01), self.moderate * bright, bright], 1).clamp(1e-4, 1 - 1e-4)
        return None, {"one2one": {"scores": torch.logit(p)}}


def detector(condition, head_mm=0.0, look=lambda count: None, moderate=0.5):
    """A detector that expects what it looks for so far above the disc; look, moderate: see Bright."""
    about = {
        "condition": condition,
        "shape_px": (64, 64),
        "mm_per_px": 1.0,
        "names": list(utils.SEVERITIES),
        "point_offsets": {"point_mm": [head_mm, 12.0, 20.0], "spread_mm": [1, 1, 1], "n": 50},
    }
    return YoloDetector(Bright(look, moderate).eval(), about)


def axial_study(number, heights_mm):
    """Axial slices of noise, one a volume, at these heights."""
    volumes = []
    for height in heights_mm:
        affine = np.eye(4)
        affine[:3, :3] = np.array([[0, 0, 2.0], [0, 2.0, 0], [1.0, 0, 0]])
        affine[:3, 3] = [-63, -63, height]
        array = np.random.default_rng(number).random((1, 64, 64)).astype(np.float32)
        volumes.append(Volume(array, affine, number, 12, "Axial T2", 0, np.array([1])))
    return Study(number, volumes)


HEIGHTS_MM = [box.center_lps_mm[2] for box in make_boxes()]


def test_folds_of_a_detector_are_averaged_as_logs_where_they_speak():
    """Each fold has its own views; where one of them sees no level the other stands."""
    reach_mm = detector("ss").view.reach_mm
    higher = detector("ss", head_mm=0.5 * reach_mm, moderate=0.9)
    # L1/L2: seen by the first fold alone, L2/L3: by none, L3/L4: by the second alone, the others by both.
    heights = [HEIGHTS_MM[0] - 0.9 * reach_mm, HEIGHTS_MM[2] + 1.8 * reach_mm, *HEIGHTS_MM[3:]]
    study, views = axial_study(1, heights), ([{}], [{}, {"reach": 1.4}])
    weights = [
        Weights(f"yolo_ss_{fold}", model, {"views": own})
        for fold, (model, own) in enumerate(zip((detector("ss"), higher), views, strict=True))
    ]
    (one,), (two,) = (yolo_studies(own.model, [study], [make_boxes()], list(own.about["views"])) for own in weights)
    assert [np.isfinite(fold).all((0, 2)).tolist() for fold in (one, two)] == [
        [True, False, False, True, True],
        [False, False, True, True, True],
    ]
    (found,) = Detectors().predict([(study, make_boxes())], weights, -1, "cpu")
    levels = found.probabilities[3:5]  # both subarticular conditions
    np.testing.assert_allclose(levels[:, 0], one[:, 0], atol=1e-9)
    np.testing.assert_allclose(levels[:, 2], two[:, 2], atol=1e-9)
    assert np.isnan(levels[:, 1]).all() and np.isnan(found.probabilities[:3]).all()
    assert np.abs(one[:, 3:] - two[:, 3:]).max() > 1e-4
    geometric = np.sqrt(one[:, 3:] * two[:, 3:])
    np.testing.assert_allclose(levels[:, 3:], geometric / geometric.sum(-1, keepdims=True), atol=1e-9)
    assert list(map(str, found.problems)) == ["yolo: ss: no Axial T2 slice shows l2_l3"]


def test_a_detector_that_found_the_memory_full_is_asked_again_for_less():
    batches, few = [], detector_member.FEW_PATCHES

    def full(count):
        batches.append(count)
        if count > few:
            raise torch.OutOfMemoryError("CUDA out of memory")

    heights = [height + shift for height in HEIGHTS_MM for shift in (-1.0, 0.0, 1.0)]
    inputs = [(axial_study(number, heights), make_boxes()) for number in (1, 2)]
    found = Detectors().predict(inputs, [Weights("yolo_ss_0", detector("ss", look=full), {})], -1, "cpu")
    assert max(batches) == 16 and batches[-1] <= few
    for prediction, (study, boxes) in zip(found, inputs, strict=True):
        (alone,) = yolo_studies(detector("ss"), [study], [boxes])
        np.testing.assert_allclose(prediction.probabilities[3:5], alone, atol=1e-6)
        assert prediction.problems == ()


# ---- Weights files ----


def test_no_weights_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors in or below"):
        weight_folders([tmp_path])
    with pytest.raises(FileNotFoundError, match="no spinenet.safetensors"):
        utils.load_members([tmp_path])


def test_weights_are_found_below_but_not_in_image_folders(tmp_path):
    for name in ("a/03_train_yolo_scs", "a/train_images/1", "a/01_preprocess/volumes", "a/02.old-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.safetensors").touch()
    assert weight_folders([tmp_path]) == [tmp_path / "a/03_train_yolo_scs"]


def weights(folder, name, **about):
    """A file that looks like a member's weights of 03 or 04: metadata, and next to nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "metadata" if name.startswith("yolo") else "classifier"
    about = ({"calibration": {"trust": 1.0}} if name.startswith("yolo") else {}) | about
    save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors", metadata={kind: json.dumps(about)})
    return folder


def out_of_fold(folder, studies, fold, severe, conditions=utils.CONDITIONS):
    """An oof.csv of these studies, in which every row says `severe`."""
    p = np.tile([1 - severe, 0.0, severe], (len(studies), 5, 5, 1))
    table = utils.to_submission(studies, p).assign(fold=fold)
    table = table[table["row_id"].str.contains("|".join(conditions))]
    before = [pd.read_csv(folder / "oof.csv")] if (folder / "oof.csv").is_file() else []
    pd.concat([*before, table]).to_csv(folder / "oof.csv", index=False)


def severe_by_study(table):
    return table.groupby(table["row_id"].str.split("_").str[0].astype(int))["severe"].first().round(3).to_dict()


def test_weights_of_other_kinds_stand_only_alone_and_are_refused_by_name(tmp_path):
    ours, theirs = tmp_path / "03_train_yolo_scs", tmp_path / "03_another"
    weights(ours, "yolo_scs_0")
    for fold in (0, 1):
        weights(theirs, f"yolo_scs_{fold}", scheme="original")
    weights(tmp_path / "04_train_vit_level_1", "level_2", pooling="global")
    weights(tmp_path / "04_train_vit_level_2", "level_2", pooling="grid")
    found, sentences = member_weights(weight_folders([tmp_path]))
    assert {name: path.parent.name for name, path in found.items()} == {
        "level_2": "04_train_vit_level_2",
        "yolo_scs_0": "03_train_yolo_scs",
        "yolo_scs_1": "03_another",
    }
    assert any(f"yolo_scs_0 in {theirs} left out: already found in {ours}" in text for text in sentences)
    for name in ("yolo_scs_1", "level_2"):
        path = found[name] if name == "yolo_scs_1" else tmp_path / "04_train_vit_level_1" / "level_2.safetensors"
        with pytest.raises(DamagedFile, match=f"{name}.safetensors states (scheme 'original'|pooling 'global')"):
            member_of(name).read_about(path)


def test_unfinished_weights_are_left_out_and_a_fold_is_taken_from_one_folder(tmp_path, capsys):
    for place, severe in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        folder = tmp_path / place
        weights(folder, "level_0")
        out_of_fold(folder, [1, 2], 0, severe)
        out_of_fold(folder, [ord(place)], 0, severe)  # a study that the others' fold lacks
    (tmp_path / "a" / "level_0.checkpoint").touch()
    weights(tmp_path / "a", "level_1")
    out_of_fold(tmp_path / "a", [3], 1, 0.1)
    weights(tmp_path / "c", "level_2")
    out_of_fold(tmp_path / "c", [4], 2, 0.3)
    weights(tmp_path / "a", "yolo_ss_0", scheme="severity", calibration=None)
    (tmp_path / "a" / "study_0.safetensors").write_bytes(b"cut")
    weights(tmp_path / "c", "study_0")
    folders = weight_folders([tmp_path])
    found, sentences = member_weights(folders)
    places = {name: path.parent.name for name, path in found.items()}
    assert places == {"level_0": "b", "level_1": "a", "level_2": "c", "study_0": "c"}
    unfinished = [text for text in sentences if "has not finished" in text]
    assert unfinished == [f"level_0, yolo_ss_0 in {tmp_path / 'a'} left out: training has not finished"]
    assert any(f"level_0 in {tmp_path / 'c'} left out: already found in {tmp_path / 'b'}" in text for text in sentences)
    tables = utils.read_out_of_fold(folders)
    assert severe_by_study(tables["level"]) == {1: 0.2, 2: 0.2, ord("b"): 0.2, 3: 0.1, 4: 0.3}
    said = capsys.readouterr().out
    assert "already found in" in said and "has not finished" in said


@dataclass
class Unread:
    """What a weights file would be loaded to."""

    path: object
    about: dict


class UnreadCrops(LevelCrops):
    def load(self, path, device):
        return Weights(path.stem, Unread(path, {}), {})


class UnreadDetectors(Detectors):
    def load(self, path, device):
        return Weights(path.stem, Unread(path, {}), {})


def test_what_is_loaded_from_where_is_printed(tmp_path, monkeypatch, capsys):
    register(monkeypatch, UnreadDetectors(), UnreadCrops())
    for name in ("level_0", "level_1"):
        weights(tmp_path / "04_train_vit_level", name)
    weights(tmp_path / "03_train_yolo_nfn_3", "yolo_nfn_3")
    weights(tmp_path / "03_train_yolo_nfn_3_old", "yolo_nfn_3")
    spinenet = SpineNet(widths=(8, 8, 8))
    spinenet.about = {"prior": level_prior()}
    (tmp_path / "02_train_spinenet").mkdir()
    utils.save_spinenet(spinenet, tmp_path / "02_train_spinenet" / "spinenet.safetensors")
    loaded = utils.load_members(weight_folders([tmp_path]), device="cpu")
    assert [own.name for own in loaded.weights["level"]] == ["level_0", "level_1"] and "study" not in loaded.weights
    assert [own.model.path.parent.name for own in loaded.weights["yolo"]] == ["03_train_yolo_nfn_3"]
    said = capsys.readouterr().out
    assert f"level_0, level_1 from {tmp_path / '04_train_vit_level'}" in said
    assert f"yolo_nfn_3 in {tmp_path / '03_train_yolo_nfn_3_old'} left out: already found in" in said
    utils.load_members([tmp_path], ["level"], "cpu")
    assert "yolo_nfn_3 from" not in capsys.readouterr().out


def test_a_member_without_out_of_fold_predictions_gets_its_default_share(tmp_path, capsys):
    rng = np.random.default_rng(0)
    studies = np.arange(100, 130)
    grades = np.array(utils.GRADES, object)[rng.choice(3, (len(studies), 25))]
    labels = pd.DataFrame(grades, columns=list(LABEL_COLUMNS))
    labels.insert(0, "study_id", studies)
    labels.to_csv(tmp_path / "train.csv", index=False)
    weights(tmp_path / "level", "level_0")
    weights(tmp_path / "study", "study_0")
    p = rng.dirichlet((1, 1, 1), (len(studies), 5, 5))
    utils.to_submission(studies, p).assign(fold=0).to_csv(tmp_path / "level" / "oof.csv", index=False)
    folders = [tmp_path / "level", tmp_path / "study"]
    fitted = utils.ensemble_for(folders, tmp_path)
    assert "default shares stand: study 0.29" in capsys.readouterr().out
    for group in utils.GROUPS:
        assert fitted["weights"][group] == pytest.approx({"level": 0.25 / 0.35, "study": 0.10 / 0.35})
    assert fitted["temperature"]["spinal"] != 1  # the rest is fitted
    utils.write_json(tmp_path / "level" / "ensemble.json", default_ensemble(["level"]))
    kept = utils.ensemble_for(folders, tmp_path)
    assert kept["weights"]["spinal"]["study"] == pytest.approx(0.10 / 0.35)
    asked = utils.ensemble_for(folders, tmp_path, ["level"])
    assert list(asked["weights"]["spinal"]) == ["level"]
