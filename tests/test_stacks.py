"""Slices to volumes: last digits, passes, contrasts and holes; and files known by their content."""

import shutil

import numpy as np
import pydicom
import pytest
import tiny
from pydicom.dataelem import RawDataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from lumbar.data import stacks
from lumbar.data.dicom import read_study

T2 = {103: "Sagittal T2/STIR"}
STEP_MM = 7.021  # of the tiny study's T2 slices


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacks") / "1"
    tiny.write_study(folder)
    return folder


@pytest.fixture(scope="module")
def right(base):
    (volume,) = read_study(base, T2).volumes
    return volume


@pytest.fixture
def study(base, tmp_path):
    """A copy of the T2 series, to be changed."""
    shutil.copytree(base / "103", tmp_path / "1" / "103")
    return tmp_path / "1"


def files(study):
    return sorted((study / "103").iterdir(), key=lambda path: int(path.stem))


def each(study, change):
    with pydicom.config.disable_value_validation():
        for k, path in enumerate(files(study)):
            dataset = pydicom.dcmread(path)
            change(dataset, k)
            dataset.save_as(path)


def again(study, change, number=lambda k, n: n + k + 1):
    """Every slice a second time: change(dataset, k), saved under number(k, n)."""
    own = files(study)
    for k, path in enumerate(own):
        dataset = pydicom.dcmread(path)
        change(dataset, k)
        dataset.save_as(path.with_name(f"{number(k, len(own))}.dcm"))


def moved(dataset, mm):
    normal = np.cross(*np.array(dataset.ImageOrientationPatient, float).reshape(2, 3))
    place = np.array(dataset.ImagePositionPatient, float) + mm * normal
    dataset.ImagePositionPatient = [f"{v:.6f}" for v in place]


def read(study):
    found = read_study(study, T2)
    return found.volumes, [problem for problem in found.problems if "series 103" in problem]


def assert_like(volume, right, atol_mm=0.01):
    assert volume.array.shape == right.array.shape
    np.testing.assert_allclose(volume.affine, right.affine, atol=atol_mm)


# ---- Last digits ----


@pytest.mark.parametrize("seed", range(6))
def test_geometry_does_not_hang_on_last_digits(study, right, seed):
    rng = np.random.default_rng(seed)
    size = 10.0 ** -rng.integers(3, 7)

    def shaken(values, digits, scale=1.0):
        return [f"{float(v) + scale * size * rng.uniform(-1, 1):.{digits}f}" for v in values]

    def change(dataset, k):
        dataset.PixelSpacing = shaken(dataset.PixelSpacing, 7)
        dataset.ImagePositionPatient = shaken(dataset.ImagePositionPatient, 7, 10)
        dataset.ImageOrientationPatient = shaken(dataset.ImageOrientationPatient, 8)

    each(study, change)
    (volume,), problems = read(study)
    assert_like(volume, right, atol_mm=0.03)
    assert problems == []
    np.testing.assert_array_equal(volume.array, right.array)


@pytest.mark.parametrize("between", ["0.4", "-7", "0", "1e6", "", "no number", "nan"])
def test_the_spacing_that_is_stated_decides_nothing_of_a_stack(study, right, between):
    tag, data = pydicom.tag.Tag("SpacingBetweenSlices"), between.encode() + b" " * (len(between) % 2)
    stated = RawDataElement(tag, "DS", len(data), data, 0, False, True)
    each(study, lambda dataset, k: dataset._dict.__setitem__(tag, stated))
    (volume,), problems = read(study)
    assert_like(volume, right)
    assert all("SpacingBetweenSlices is no length" in problem for problem in problems)
    assert bool(problems) == (between in ("1e6", "no number", "nan"))


def test_a_single_slice_is_as_thick_as_it_says(study):
    for path in files(study)[1:]:
        path.unlink()

    def change(dataset, k):
        dataset.SliceThickness, dataset.SpacingBetweenSlices = "4", "0.4"

    each(study, change)
    (volume,), _ = read(study)
    assert volume.spacing_mm[0] == pytest.approx(4.0)


# ---- Passes ----


@pytest.mark.parametrize("numbered", ["in turn", "interleaved", "backwards"])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("shift_mm", [0.0, 0.02, 0.5, 1.5, 2.2])
def test_a_second_pass_is_a_volume_of_its_own(study, right, shift_mm, told, numbered):
    number = {
        "in turn": lambda k, n: n + k + 1,
        "interleaved": lambda k, n: 1000 + 2 * k + 1,
        "backwards": lambda k, n: 2 * n - k,
    }[numbered]

    def change(dataset, k):
        moved(dataset, shift_mm)
        dataset.AcquisitionNumber = 2 if told else 1
        noise = np.random.default_rng(k).integers(0, 9, dataset.pixel_array.shape)
        dataset.PixelData = (dataset.pixel_array + noise).astype("<u2").tobytes()

    again(study, change, number)
    if numbered == "interleaved":
        for path in files(study):
            if int(path.stem) < 1000:
                path.rename(path.with_name(f"{1000 + 2 * (int(path.stem) - 1)}.dcm"))
    volumes, problems = read(study)
    assert [len(volume.array) for volume in volumes] == [9, 9]
    for volume in volumes:
        assert volume.spacing_mm[0] == pytest.approx(right.spacing_mm[0], rel=1e-3)
    assert [problem.split(": ", 1)[1] for problem in problems] == ["places were imaged 2 times, each pass is a volume"]


def test_an_incomplete_pass_is_left_out(study):
    again(study, lambda dataset, k: (moved(dataset, 0.5), mark(dataset, 2)))
    for k, path in enumerate(files(study)[:2]):
        dataset = pydicom.dcmread(path)
        moved(dataset, 1.1)
        mark(dataset, 3)
        dataset.save_as(path.with_name(f"{900 + k}.dcm"))
    volumes, problems = read(study)
    assert [len(volume.array) for volume in volumes] == [9, 9]
    assert any("2 slices lie at the same place as others, or nearly, and were left out" in p for p in problems)


def mark(dataset, acquisition):
    dataset.AcquisitionNumber = acquisition
    dataset.PixelData = (dataset.pixel_array + acquisition).astype("<u2").tobytes()


def test_files_of_the_same_image_are_left_out_in_one_sentence(study, right):
    again(study, lambda dataset, k: None)
    (volume,), problems = read(study)
    assert_like(volume, right)
    assert len(problems) == 1 and "9 files are the same image at the same place" in problems[0]


def test_odd_and_even_slices_of_two_acquisitions_are_one_volume(study, right):
    each(study, lambda dataset, k: setattr(dataset, "AcquisitionNumber", 1 + k % 2))
    (volume,), problems = read(study)
    assert_like(volume, right)
    assert problems == []


@pytest.mark.parametrize("thickness", ["14", ""])
def test_overlapping_slices_with_one_missing_stay_one_series(study, thickness):
    (study / "103" / "5.dcm").unlink()

    def change(dataset, k):
        dataset.SliceThickness, dataset.SpacingBetweenSlices = thickness, ""
        moved(dataset, -0.8 * STEP_MM * (int(dataset.InstanceNumber) - 1) * direction)

    first, second = (pydicom.dcmread(path) for path in files(study)[:2])
    normal = np.cross(*np.array(first.ImageOrientationPatient, float).reshape(2, 3))
    step = np.subtract(second.ImagePositionPatient, first.ImagePositionPatient).astype(float)
    direction = np.sign(step @ normal)
    each(study, change)
    volumes, problems = read(study)
    assert sorted(n for v in volumes for n in v.instance_numbers.tolist()) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [problem.split(": ", 1)[1] for problem in problems] == ["1 slices are missing in 1 places between others"]


# ---- Contrasts ----


def other_contrast(dataset):
    stored = dataset.pixel_array
    dataset.PixelData = (3 * (600 - np.minimum(stored, 600))).astype("<u2").tobytes()


TOLD = {
    "echo time": lambda dataset, second: setattr(dataset, "EchoTime", 90 if second else 12),
    "echo number": lambda dataset, second: setattr(dataset, "EchoNumbers", 1 + second),
    "b-value": lambda dataset, second: setattr(dataset, "DiffusionBValue", 800.0 * (not second)),
    "phase": lambda dataset, second: setattr(dataset, "ImageType", ["ORIGINAL", "PRIMARY", "M" if second else "P"]),
    "sequence": lambda dataset, second: setattr(dataset, "SequenceName", f"ep_b{800 * (not second)}"),
    "nothing": lambda dataset, second: None,
}


@pytest.mark.parametrize("order", ["echo", "slice"])
@pytest.mark.parametrize("jitter_mm", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("told", TOLD)
def test_contrasts_are_never_mixed(study, right, told, jitter_mm, order):
    rng = np.random.default_rng(0)
    originals = [pydicom.dcmread(path) for path in files(study)]
    for path in files(study):
        path.unlink()
    second_of = {}
    for k, dataset in enumerate(originals):
        place, stored = list(dataset.ImagePositionPatient), dataset.PixelData
        for second in (False, True):
            dataset.ImagePositionPatient, dataset.PixelData = place, stored
            for keyword in ("EchoTime", "EchoNumbers"):
                if keyword in dataset:
                    delattr(dataset, keyword)
            moved(dataset, jitter_mm * rng.uniform(-1, 1))
            if not second:
                other_contrast(dataset)
            TOLD[told](dataset, second)
            number = 1 + k + second * len(originals) if order == "echo" else 1 + 2 * k + second
            second_of[number] = second
            dataset.save_as(study / "103" / f"{number}.dcm")
    (volume,), problems = read(study)
    assert len({second_of[number] for number in volume.instance_numbers.tolist()}) == 1
    assert volume.array.shape == right.array.shape
    assert volume.spacing_mm[0] == pytest.approx(right.spacing_mm[0], rel=0.02)
    assert len(problems) == 1 and "contrast" in problems[0] and "left out" in problems[0]
    if told in ("echo time", "b-value", "phase"):
        np.testing.assert_array_equal(np.sort(volume.array.sum((1, 2))), np.sort(right.array.sum((1, 2))))


def halves(study, echo_ms, empty=(), text="{}"):
    """The lower half of the slices at one echo time and the upper one at another, other tissues bright."""

    def change(dataset, k):
        if k < 5:
            other_contrast(dataset)
        dataset.EchoNumbers = None
        data = b"" if k in empty else text.format(echo_ms[k >= 5]).encode()
        data += b" " * (len(data) % 2)
        dataset._dict[pydicom.tag.Tag("EchoTime")] = RawDataElement(
            pydicom.tag.Tag("EchoTime"), "DS", len(data), data, 0, False, True
        )

    each(study, change)


@pytest.mark.parametrize("empty", [(), (0,), (3,), (8,), (0, 4, 7)])
@pytest.mark.parametrize("echo_ms", [(12, 90), (90, 12)])
def test_slices_that_state_no_contrast_join_no_two_others(study, echo_ms, empty):
    halves(study, echo_ms, empty)
    volumes, problems = read(study)
    (kept,) = volumes
    halves_of = {number > 5 for number in kept.instance_numbers.tolist()}
    assert len(halves_of) == 1 and len(kept.array) == (4 if halves_of == {True} else 5)
    assert "slices of another contrast (echo time" in " ".join(problems)
    said = [problem for problem in problems if "do not state which of 2 contrasts they are" in problem]
    assert len(said) == bool(empty)
    if empty:
        assert f": {len(empty)} slices do" in said[0] and f"(the first: {empty[0] + 1})" in said[0]


@pytest.mark.parametrize("text", ["{},0", "{} ms", "{},5 ms", " {} MS", "{}.0msec"])
def test_echo_times_with_a_comma_or_a_unit_tell_contrasts_apart(study, text):
    halves(study, (12, 90), text=text)
    (kept,), problems = read(study)
    assert len({number > 5 for number in kept.instance_numbers.tolist()}) == 1
    assert any("slices of another contrast (echo time" in problem for problem in problems)


def test_a_slice_without_an_echo_time_goes_where_one_is_missing(study, right):
    own = files(study)
    for k, path in enumerate(own):
        dataset = pydicom.dcmread(path)
        for second in (False, True):
            if second:
                other_contrast(dataset)
            dataset.EchoNumbers = None
            dataset.EchoTime = None if k in (0, 4) and not second else 12 if second else 90
            dataset.save_as(study / "103" / f"{101 + k + len(own) * second}.dcm")
        path.unlink()
    (volume,), problems = read(study)
    np.testing.assert_array_equal(volume.array, right.array)
    assert [p.split(": ", 1)[1] for p in problems] == [
        "2 slices do not state which of 2 contrasts they are (the first: 101): each was put with its neighbours",
        "9 slices of another contrast (echo time 12 ms beside echo time 90 ms) were left out",
    ]


def test_a_slice_of_another_weighting_is_left_out_wherever_it_lies(study):
    each(study, lambda dataset, k: setattr(dataset, "EchoTime", 12 if k == 0 else 100))
    (volume,), problems = read(study)
    assert len(volume.array) == 8
    assert len(problems) == 1 and "1 slices of another contrast (echo time 12 ms" in problems[0]


@pytest.mark.parametrize("echo_ms, said", [(8, True), (30, False), (100, False)])
def test_an_echo_time_of_another_weighting_is_said(study, echo_ms, said):
    each(study, lambda dataset, k: setattr(dataset, "EchoTime", echo_ms))
    _, problems = read(study)
    assert any("is unusual for Sagittal T2/STIR" in problem for problem in problems) == said


def test_files_of_several_series_without_a_majority_are_said(study):
    each(study, lambda dataset, k: setattr(dataset, "SeriesInstanceUID", f"1.2.{k % 3}"))
    (volume,), problems = read(study)
    assert len(volume.array) == 9 and problems == ["study 1, series 103: its files are of 3 series"]
    each(study, lambda dataset, k: setattr(dataset, "SeriesInstanceUID", f"1.2.{k}"))
    assert read(study)[1] == []  # a writer that numbers each file


def test_slices_that_share_no_grid_are_said(study):
    def change(dataset, k):
        pixels = dataset.pixel_array[: 96 - 3 * k, :]
        dataset.Rows, dataset.PixelData = len(pixels), pixels.tobytes()

    each(study, change)
    volumes, problems = read(study)
    assert len(volumes) == 9 and "its 9 slices share no grid, they are 9 separate stacks" in problems[0]


def test_blocks_of_another_echo_time_at_other_places_stay(study):
    def change(dataset, k):
        dataset.EchoTime = 80 if k < 5 else 110

    each(study, change)
    volumes, problems = read(study)
    assert sorted(len(volume.array) for volume in volumes) == [4, 5]
    assert problems == []


def test_contrasts_compare_only_what_both_say():
    assert stacks.Contrast(echo_ms=90).is_like(stacks.Contrast(echo_ms=95))
    assert not stacks.Contrast(echo_ms=90).is_like(stacks.Contrast(echo_ms=12))
    assert stacks.Contrast(echo_ms=90).is_like(stacks.Contrast(b_value=0))
    assert not stacks.Contrast(echo_number=1).is_like(stacks.Contrast(echo_number=2))
    assert stacks.Contrast(90.0, echo_number=1).is_like(stacks.Contrast(90.0, echo_number=2))


# ---- Holes ----


def test_missing_slices_are_said_in_one_sentence(study):
    for number in (3, 4, 7):
        (study / "103" / f"{number}.dcm").unlink()
    volumes, problems = read(study)
    assert [len(volume.array) for volume in volumes] == [2, 2, 2]
    assert [problem.split(": ", 1)[1] for problem in problems] == ["3 slices are missing in 2 places between others"]


def test_a_slice_of_another_pixel_size_is_left_out_and_said(study, right):
    def change(dataset, k):
        if k == 3:
            dataset.PixelSpacing = [2 * float(v) for v in dataset.PixelSpacing]

    each(study, change)
    volumes, problems = read(study)
    numbers = sorted(n for volume in volumes for n in volume.instance_numbers.tolist())
    assert numbers == [1, 2, 3, 5, 6, 7, 8, 9]
    assert all(volume.spacing_mm[1] == pytest.approx(right.spacing_mm[1]) for volume in volumes)
    assert any("file 4: 112 x 112 pixels of 5.59" in problem and "left out" in problem for problem in problems)


def test_slices_of_another_examination_are_left_out_and_said(study, right):
    def change(dataset, k):
        if k in (2, 5):
            dataset.StudyInstanceUID = "1.2.3.4"

    each(study, change)
    volumes, problems = read(study)
    numbers = sorted(n for volume in volumes for n in volume.instance_numbers.tolist())
    assert numbers == [1, 2, 4, 5, 7, 8, 9]
    assert any("2 files are of another examination (the first: 3) and were left out" in p for p in problems)


def test_a_slice_of_another_series_is_left_out_and_said(study, right):
    each(study, lambda dataset, k: setattr(dataset, "SeriesInstanceUID", "1.2.3.4") if k == 3 else None)
    volumes, problems = read(study)
    assert sum(len(volume.array) for volume in volumes) == 8
    assert any("1 files are of another series (the first: 4) and were left out" in p for p in problems)


@pytest.mark.parametrize("empty", [(0,), (2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID"])
def test_files_that_state_no_series_belong_with_the_others(study, right, keyword, absent, empty):
    def change(dataset, k):
        if k in empty:
            setattr(dataset, keyword, "")
            if absent:
                delattr(dataset, keyword)

    each(study, change)
    (volume,), problems = read(study)
    np.testing.assert_array_equal(volume.array, right.array)
    assert problems == []


def test_a_stranger_is_left_out_where_others_state_nothing(study):
    each(study, lambda dataset, k: setattr(dataset, "StudyInstanceUID", {2: "", 5: "", 3: "1.2.3.4"}.get(k, "1.2.3.5")))
    volumes, problems = read(study)
    assert sum(len(volume.array) for volume in volumes) == 8
    assert any("1 files are of another examination (the first: 4) and were left out" in p for p in problems)


def test_a_series_of_another_examination_is_said(base, tmp_path):
    shutil.copytree(base, tmp_path / "1")
    each(tmp_path / "1", lambda dataset, k: setattr(dataset, "StudyInstanceUID", "1.2.3.4"))
    study = read_study(tmp_path / "1", tiny.SERIES)
    assert len(study.volumes) == 3
    assert study.problems == ["study 1, series 103: is of another examination than the others"]


def test_examinations_that_differ_from_file_to_file_mean_nothing(study, right):
    each(study, lambda dataset, k: setattr(dataset, "StudyInstanceUID", f"1.2.3.{k}"))
    (volume,), problems = read(study)
    assert_like(volume, right)
    assert problems == []


# ---- Files ----


@pytest.mark.parametrize("pattern", ["{}.DCM", "{}", "MR{}.IMA", "{}.dicom", "image {}.dat"])
def test_files_are_known_by_their_content(study, right, pattern):
    for path in files(study):
        path.rename(path.with_name(pattern.format(path.stem)))
    (volume,), problems = read(study)
    assert_like(volume, right)
    np.testing.assert_array_equal(volume.instance_numbers, right.instance_numbers)
    assert problems == []


def test_what_systems_leave_is_passed_over_in_one_sentence(study, right):
    for path in files(study):
        path.with_name("._" + path.name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(200))
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "readme.txt", "DICOMDIR"):
        (study / "103" / name).write_bytes(b"\0\0\0\1Bud1")
    (study / "__MACOSX").mkdir()
    (study / "103" / "__MACOSX").mkdir()
    (volume,), problems = read(study)
    assert_like(volume, right)
    assert len(problems) == 1 and "15 files that are no images were passed over" in problems[0]
    assert not any("__MACOSX" in problem for problem in read_study(study, T2).problems)


def without_preamble(path, implicit):
    dataset = pydicom.dcmread(path)
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = implicit, True
    bare = pydicom.Dataset({element.tag: element for element in dataset})
    write_dataset(buffer, bare)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("implicit", [True, False])
def test_a_data_set_without_preamble_is_read(study, right, implicit):
    for path in files(study):
        without_preamble(path, implicit)
    (volume,), problems = read(study)
    assert_like(volume, right)
    np.testing.assert_array_equal(volume.array, right.array)
    assert problems == []


@pytest.mark.parametrize("vr", ["UT", "LT", "LO", "SH", "UN", "ST", "UC", "CS"])
def test_numbers_are_numbers_in_whatever_text(study, right, vr):
    def change(dataset, k):
        for keyword in ("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"):
            value = dataset[keyword].value
            text = "\\".join(map(str, value)) if isinstance(value, pydicom.multival.MultiValue) else str(value)
            data = text.encode() + b" " * (len(text) % 2)
            tag = pydicom.tag.Tag(keyword)
            dataset._dict[tag] = RawDataElement(tag, vr, len(data), data, 0, False, True)

    each(study, change)
    (volume,), problems = read(study)
    assert_like(volume, right)
    assert problems == []


EMPTY = (
    "RescaleSlope RescaleIntercept NumberOfFrames SliceThickness SpacingBetweenSlices SamplesPerPixel "
    "PhotometricInterpretation InstanceNumber BitsStored HighBit PixelRepresentation PlanarConfiguration EchoTime "
    "EchoNumbers ImageType AcquisitionNumber PixelPaddingValue DiffusionBValue SequenceName"
).split()


@pytest.mark.parametrize("keyword", EMPTY)
def test_an_empty_value_is_as_good_as_none(study, right, keyword):
    vr = pydicom.datadict.dictionary_VR(keyword)
    vr = "US" if vr == "US or SS" else vr

    def change(dataset, k):
        dataset.add_new(keyword, vr, None)

    each(study, change)
    assert pydicom.dcmread(files(study)[0])[keyword].is_empty
    (volume,), problems = read(study)
    assert_like(volume, right)
    np.testing.assert_array_equal(volume.array, right.array)
    assert problems == []


def test_no_frames_are_one(study, right):
    each(study, lambda dataset, k: setattr(dataset, "NumberOfFrames", "0"))
    (volume,), _ = read(study)
    np.testing.assert_array_equal(volume.array, right.array)


def test_a_folder_of_other_things_says_so(study):
    for path in files(study):
        path.write_bytes(b"<html>not found</html>")
    volumes, problems = read(study)
    assert volumes == [] and "no readable slice" in problems[0]
    assert "it is a web page" in problems[1] and not any("force" in problem for problem in problems)
