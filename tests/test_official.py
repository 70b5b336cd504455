"""The official SpineNet package behind our detector's interface, with a stand-in for the package."""

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import tiny
from test_naming import PRIOR, spine

import utils
from lumbar.data.source import Source
from lumbar.data.volume import Study, Volume, save_study
from lumbar.problems import Kind
from lumbar.serve import members
from lumbar.serve.study import prepare_study
from lumbar.spine import official
from lumbar.spine.chain import merge_vertebrae
from lumbar.spine.fallbacks import level_boxes
from lumbar.spine.official import detect_vertebrae_official
from lumbar.spine.placement import Placement
from lumbar.spine.spinenet import SpineNet

NAMES = ("T11", "T12", "L1", "L2", "L3", "L4", "L5", "S1", "S2")


def volume_of(center, turn="as stored"):
    """A sagittal volume around a point, whose pixels hold their own height in the patient (z in mm) plus 1000."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[4.4, 0, 0], [0, 0.1, 1.5], [0, -1.6, 0.09]])
    shape = np.array([13, 200, 100])
    affine[:3, 3] = center - affine[:3, :3] @ ((shape - 1) / 2)
    ijk = np.stack(np.mgrid[: shape[0], : shape[1], : shape[2]], -1)
    array = (ijk @ affine[:3, :3].T + affine[:3, 3])[..., 2].astype(np.float32) + 1000
    flip = {"columns forward": 2, "rows up": 1, "left first": 0}.get(turn)
    if flip is not None:
        array = np.flip(array, flip)
        affine[:3, 3] += affine[:3, flip] * (array.shape[flip] - 1)
        affine[:3, flip] *= -1
    if turn == "transposed":
        array, affine = array.transpose(0, 2, 1), affine[:, [0, 2, 1, 3]]
    return Volume(array, affine, 5, 1, "Sagittal T2/STIR", 0, np.arange(len(array)) + 1)


class StandIn:
    """What the package's SpineNet gives for a known spine, from the pixels' own positions."""

    def __init__(self, truth, spacing, broken=None, labels=None):
        self.truth, self.spacing, self.broken, self.labels = truth, spacing, broken, labels or {}

    def detect_vb(self, volume, pixel_spacing):
        if self.broken is not None:
            raise self.broken
        height, width, slices = volume.shape
        assert (height, width, slices) == (200, 100, 13) and volume.dtype == np.float32 and volume.min() == 0
        # As the package does: a list raises TypeError here, an array of two ValueError below.
        patch_px = 260 / pixel_spacing
        if patch_px < 1:
            raise ValueError("patches of no pixel")
        assert patch_px == pytest.approx(260 / np.mean(self.spacing))
        assert (np.diff(volume, axis=0) < 0).all()  # rows to the feet
        assert (np.diff(volume, axis=1) > 0).all()  # columns to the back, where this volume rises
        columns, rows, result = np.arange(width), np.arange(height), []
        for vertebra, where in zip(self.truth, self.where):
            polygon = []
            for corner in (1, 2, 3, 0):  # right is the back
                polygon.append((where[corner, 2], where[corner, 1]))
            assert polygon[0][0] > polygon[3][0] and polygon[0][1] < polygon[1][1]
            assert columns[0] < polygon[0][0] < columns[-1] and rows[0] < polygon[0][1] < rows[-1]
            middle = where[:, 0].mean()
            result.append(
                {
                    "predicted_label": self.labels.get(vertebra.name, vertebra.name),
                    "slice_nos": [k for k in range(slices) if abs(k - middle) <= 4.5],
                    "polys": [],
                    "average_polygon": np.array(polygon),
                }
            )
        return result[::-1]


def stand_in(truth, volume, **kwargs):
    upright = volume_of(volume.voxel_to_lps((np.array(volume.array.shape) - 1) / 2))
    detector = StandIn(truth, (np.hypot(1.6, 0.1), np.hypot(1.5, 0.09)), **kwargs)
    detector.where = [upright.lps_to_voxel(v.corners_lps_mm) for v in truth]
    if volume.affine[0, 0] < 0:
        detector.where = [[12, 0, 0] + [-1, 1, 1] * where for where in detector.where]
    return detector


def installed(monkeypatch, detector):
    module = ModuleType("spinenet")
    module.SpineNet = lambda device, verbose: detector
    monkeypatch.setitem(sys.modules, "spinenet", module)


def case(seed=3):
    truth = [v for v in spine(seed) if v.name in NAMES]
    # Slices are as far apart as 4.4 mm: a body's middle is known no better than to half of that.
    center = np.mean([v.center_lps_mm for v in truth], 0)
    straight = [replace(v, corners_lps_mm=v.corners_lps_mm * [0, 1, 1] + [center[0], 0, 0]) for v in truth]
    return straight, center


@pytest.mark.parametrize("turn", ["as stored", "columns forward", "rows up", "left first", "transposed"])
def test_bodies_keep_their_place(turn, monkeypatch):
    truth, center = case()
    volume = volume_of(center, turn)
    installed(monkeypatch, stand_in(truth, volume))
    found = detect_vertebrae_official(volume)
    assert [v.name for v in found] == list(NAMES)
    for vertebra, true in zip(found, truth):
        assert np.abs(vertebra.corners_lps_mm - true.corners_lps_mm).max() < 1
        assert vertebra.left_lps[0] > 0.9 and vertebra.source == Source.OFFICIAL and vertebra.confidence == 1
        assert vertebra.width_mm == pytest.approx(9 * 4.4)


def test_levels_come_out_as_from_our_own(monkeypatch, tmp_path):
    truth, center = case()
    volume = volume_of(center)
    installed(monkeypatch, stand_in(truth, volume, labels={"T11": "C7", "L2": "L2"}))
    study = Study(5, [volume])
    boxes, vertebrae = utils.locate_levels(study, Placement.of(None, "official", PRIOR))
    assert [box.level for box in boxes] == list(utils.LEVELS) and {box.source for box in boxes} == {Source.OFFICIAL}
    for box, true in zip(boxes, level_boxes(truth)):
        assert np.abs(box.center_lps_mm - true.center_lps_mm).max() < 1
    assert [v.name for v in vertebrae] == [*NAMES[1:], "uncertain"]
    save_study(study, tmp_path / "5.safetensors")
    levels, table, _ = utils.locate_studies({5: tmp_path / "5.safetensors"}, Placement.of(None, "official", PRIOR))
    assert list(levels["level"]) == list(utils.LEVELS) and len(table) == 9
    # Another series fills in what the first lacks, also after the patient moved.
    first, second = detect_vertebrae_official(volume), detect_vertebrae_official(volume)
    second = [replace(v, corners_lps_mm=v.corners_lps_mm + [0, 20, 20]) for v in second]
    merged = merge_vertebrae([v for v in first if v.name != "L3"], second)
    assert [v.name for v in merged][1:] == list(NAMES[1:])
    assert np.abs(merged[4].center_lps_mm - truth[4].center_lps_mm).max() < 1


def test_a_name_given_twice_goes_to_the_surer(monkeypatch):
    truth, center = case()
    detector = stand_in(truth, volume_of(center), labels={"T12": "L1"})
    whole = detector.detect_vb

    def fewer(volume, spacing):
        result = whole(volume, spacing)
        result[-2]["slice_nos"] = result[-2]["slice_nos"][:3]
        return result

    detector.detect_vb = fewer
    found = detect_vertebrae_official(volume_of(center), detector)
    assert [v.name for v in found] == ["T11", "uncertain", *NAMES[2:]]
    assert found[1].confidence == pytest.approx(3 * 4.4 / 25)


@pytest.mark.parametrize(
    "error", [IndexError("list index out of range"), ValueError("zero-size array"), RuntimeError("a non-empty list")]
)
def test_nothing_found_is_an_empty_list(error):
    truth, center = case()
    volume = volume_of(center)
    assert detect_vertebrae_official(volume, stand_in(truth, volume, broken=error)) == []
    with pytest.raises(RuntimeError, match="out of memory"):
        detect_vertebrae_official(volume, stand_in(truth, volume, broken=RuntimeError("out of memory")))


def test_what_is_lacking_is_said(monkeypatch):
    truth, center = case()
    monkeypatch.setitem(sys.modules, "spinenet", None)
    with pytest.raises(ImportError, match="research only"):
        detect_vertebrae_official(volume_of(center))
    with pytest.raises(ImportError, match="research only"):
        utils.locate_levels(Study(5, [volume_of(center)]), Placement.of(None, "official", PRIOR))
    axial = replace(volume_of(center), affine=volume_of(center).affine[[2, 1, 0, 3]])
    with pytest.raises(ValueError, match="axial, not sagittal"):
        detect_vertebrae_official(axial)
    module = ModuleType("spinenet")

    def without_weights(device, verbose):
        raise NameError("No weights found")

    module.SpineNet = without_weights
    monkeypatch.setitem(sys.modules, "spinenet", module)
    with pytest.raises(FileNotFoundError, match="No weights found.*download_weights.*SPINENET_DIR"):
        utils.load_official_spinenet()


def test_the_stand_in_refuses_what_the_package_refuses():
    truth, center = case()
    detector = stand_in(truth, volume_of(center))
    stack = np.ascontiguousarray(volume_of(center).array.transpose(1, 2, 0))
    stack -= stack.min()
    with pytest.raises(TypeError):
        detector.detect_vb(stack, list(detector.spacing))
    with pytest.raises(ValueError, match="truth value"):
        detector.detect_vb(stack, np.array(detector.spacing))


PACKAGE = """
import os
from .models.network import found

class SpineNet:
    def __init__(self, device, verbose):
        folder = os.path.join(os.path.dirname(__file__), "weights", "detect-vfr")
        if not (os.path.isdir(folder) and os.listdir(folder)):
            raise NameError(f"nothing in {folder}")

    def detect_vb(self, volume, pixel_spacing):
        260 / pixel_spacing
        return found
"""


def write_package(folder, weights="spinenet/weights"):
    """A folder as one makes it of the package's repository: its code in `spinenet`, its weights beside or apart."""
    package = folder / "spinenet"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("from .main import SpineNet\n")
    (package / "main.py").write_text(PACKAGE)
    (package / "models" / "__init__.py").touch()
    (package / "models" / "network.py").write_text("found = []\n")
    if weights:
        (folder / weights / "detect-vfr").mkdir(parents=True)
        (folder / weights / "detect-vfr" / "ckpt1.pt").write_text("a pickle, which nobody but the package opens")
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No package where Python or Kaggle would have it, and none afterwards."""
    for name in [name for name in sys.modules if name.split(".")[0] == "spinenet"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("SPINENET_DIR", raising=False)
    monkeypatch.setenv("KAGGLE_INPUT_DIR", str(tmp_path / "input"))
    yield tmp_path / "input"
    official._forget()


@pytest.mark.parametrize("how", ["argument", "environment", "input", "data set of an owner"])
@pytest.mark.parametrize("weights", ["spinenet/weights", "own/weights"])
def test_the_package_is_found_in_a_folder(how, weights, nowhere, tmp_path, monkeypatch):
    place = {"input": nowhere / "spinenet-of-oxford", "data set of an owner": nowhere / "datasets" / "who" / "spine"}
    folder = write_package(place.get(how, tmp_path / "clone") / "SpineNet-main", weights)
    before = list(sys.path)
    if how == "environment":
        monkeypatch.setenv("SPINENET_DIR", str(folder))
    detector = utils.load_official_spinenet("cpu", folder.parent if how == "argument" else None)
    assert detect_vertebrae_official(volume_of(case()[1]), detector) == []
    assert sys.path == before


def test_a_folder_without_the_package_or_its_weights_says_so(nowhere, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImportError, match="no package spinenet in .*empty.*SPINENET_DIR"):
        utils.load_official_spinenet("cpu", tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="lacks its weights .nothing in"):
        utils.load_official_spinenet("cpu", write_package(tmp_path / "bare", weights=""))
    broken = write_package(tmp_path / "broken")
    (broken / "spinenet" / "main.py").write_text("import a_package_that_nobody_has")
    with pytest.raises(ImportError, match="a_package_that_nobody_has"):
        utils.load_official_spinenet("cpu", broken)
    assert "spinenet" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["no package", "no weights", "of another torch", "of another NumPy"])
def test_inference_goes_on_with_the_kits_own_detector(broken, nowhere, tmp_path, monkeypatch, capsys):
    if broken != "no package":
        folder = write_package(tmp_path / "clone", "" if broken == "no weights" else "spinenet/weights")
        monkeypatch.setenv("SPINENET_DIR", str(folder))
        if broken == "of another torch":
            (folder / "spinenet" / "main.py").write_text("import torch\nSpineNet = torch.what_is_no_more")
        if broken == "of another NumPy":  # it loads, and fails where it is used
            code = (folder / "spinenet" / "main.py").read_text()
            assert "260 / pixel_spacing" in code
            code = code.replace("260 / pixel_spacing", "__import__('numpy').what_is_no_more")
            (folder / "spinenet" / "main.py").write_text(code)
    model = SpineNet((4,))
    model.about = {"prior": PRIOR, "detector": "official"}
    placement, notes = members._placement(model.eval(), tmp_path / "spinenet.safetensors")
    assert placement.name == "own" and "kit's own detector" in capsys.readouterr().out
    (note,) = notes
    assert note.kind == Kind.LEVELS and "kit's own detector, not the official one" in note.text
    loaded = members.Members(placement, {}, np.full((5, 5, 3), np.nan), notes=notes)
    tiny.write_study(tmp_path / "7", seed=1, slices=(6, 6), pixels=(64, 64))
    prepared = prepare_study(tmp_path / "7", tiny.SERIES, loaded)
    assert note in prepared.problems and len(prepared.boxes) == 5
    if broken != "no package":
        write_package(tmp_path / "good")
        monkeypatch.setenv("SPINENET_DIR", str(tmp_path / "good"))
        placement, notes = members._placement(model, tmp_path / "spinenet.safetensors")
        assert placement.name == "official" and not notes
