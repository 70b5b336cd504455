"""Pixels are what the standard says, padding is no tissue, and small files cannot ask for much."""

import io
import re
import shutil
import struct
import zlib
from dataclasses import replace

import numpy as np
import pydicom
import pytest
import tiny
from pydicom.dataelem import RawDataElement
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

import utils
from lumbar.data import agreement, dicom, greys, pixels
from lumbar.data.dicom import read_slice, read_slices, read_study
from lumbar.data.greys import normalise_study
from lumbar.data.volume import Study

SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
)
T2 = {103: "Sagittal T2/STIR"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny study: {101, 102, 103}/<number>.dcm. Only read."""
    folder = tmp_path_factory.mktemp("pixels") / "1"
    tiny.write_study(folder)
    return folder


@pytest.fixture(scope="module")
def good(base):
    return normalise_study(read_study(base, tiny.SERIES))


def copied(base, folder, change, series=tuple(T2)):
    """A copy of the study's series, with change(dataset, number of the file) applied to each file."""
    study = folder / "1"
    with pydicom.config.disable_value_validation():
        for number in series:
            shutil.copytree(base / str(number), study / str(number))
            for k, path in enumerate(sorted((study / str(number)).glob("*.dcm"), key=lambda p: int(p.stem))):
                dataset = pydicom.dcmread(path)
                change(dataset, k)
                dataset.save_as(path)
    return study


def read(study):
    return normalise_study(read_study(study, T2)).volumes[0]


@pytest.fixture(scope="module")
def right(good):
    return good.of("Sagittal T2/STIR")[0]


@pytest.fixture(scope="module")
def raw(base):
    """The T2 series' values before they are normalised."""
    return read_study(base, T2).volumes[0].array


def restate(dataset, stored, signed=False, bits=16):
    """Put these stored values (as unsigned cells of 16 bits) into a dataset."""
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = int(signed)
    for keyword in ("SmallestImagePixelValue", "LargestImagePixelValue"):
        if keyword in dataset:
            delattr(dataset, keyword)
    dataset.PixelData = np.asarray(stored).astype("<u2").tobytes()


# ---- Stored bits ----


def write_bits(path, base, values, allocated, stored, signed, syntax, rng):
    """Write values in the lowest `stored` bits of each cell; the bits above hold anything."""
    dataset = pydicom.dcmread(base / "101" / "1.dcm")
    cells = values.astype(np.int64) & ((1 << stored) - 1)
    cells |= rng.integers(0, 1 << (allocated - stored), values.shape) << stored
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset.Rows, dataset.Columns = values.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, stored - 1
    dataset.PixelRepresentation = int(signed)
    dataset.PixelData = cells.astype(f"{order}u{allocated // 8}").tobytes()
    dataset["PixelData"].VR = "OB" if allocated == 8 and syntax != ImplicitVRLittleEndian else "OW"
    for keyword in ("SmallestImagePixelValue", "LargestImagePixelValue", "RescaleSlope", "RescaleIntercept"):
        if keyword in dataset:
            delattr(dataset, keyword)
    if syntax == RLELossless:
        dataset.BitsStored, dataset.HighBit = allocated, allocated - 1  # else the encoder would not take the cells
        own = cells.astype(f"<u{allocated // 8}").view(f"<{'ui'[signed]}{allocated // 8}")
        dataset.compress(RLELossless, own, generate_instance_uid=False)
        dataset.BitsStored, dataset.HighBit = stored, stored - 1
        dataset.save_as(path)
        return
    dataset.file_meta.TransferSyntaxUID = syntax
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    copy = pydicom.Dataset({element.tag: element for element in dataset})
    copy.file_meta = dataset.file_meta
    copy.save_as(path, implicit_vr=implicit, little_endian=little, enforce_file_format=True)


@pytest.mark.parametrize("seed", range(40))
def test_values_are_the_stored_bits_whatever_the_others_hold(tmp_path, base, seed):
    rng = np.random.default_rng(seed)
    syntax = SYNTAXES[seed % len(SYNTAXES)]
    allocated = int(rng.choice([8, 16] if syntax == RLELossless else [8, 16, 32]))  # pydicom encodes no more
    stored, signed = int(rng.integers(2, allocated + 1)), bool(rng.integers(2))
    low, high = (-(1 << (stored - 1)), 1 << (stored - 1)) if signed else (0, 1 << stored)
    values = rng.integers(low, high, (6, 10))
    path = tmp_path / "2.dcm"
    write_bits(path, base, values, allocated, stored, signed, syntax, rng)
    ours = read_slice(path)["pixels"]
    np.testing.assert_array_equal(ours, values.astype(np.float32))
    np.testing.assert_array_equal(ours, pydicom.dcmread(path).pixel_array.astype(np.float32))


def test_a_high_bit_that_does_not_belong_is_said(tmp_path, base):
    study = copied(base, tmp_path, lambda dataset, k: setattr(dataset, "HighBit", 11))
    (sentence,) = [p for p in read_study(study, T2).problems if "HighBit" in p]
    assert "9 files: HighBit 11 does not belong to 16 bits stored" in sentence


def test_a_missing_sign_is_guessed_only_where_pixels_leave_no_doubt(tmp_path, base):
    def unsigned(dataset, k):
        del dataset.PixelRepresentation
        if k == 0:
            dataset.PixelData = np.full((112, 112), 0x8001, "<u2").tobytes()

    study = read_study(copied(base, tmp_path, unsigned), T2)
    assert len(study.volumes[0].array) == 8
    assert any("1.dcm: PixelRepresentation is missing" in problem for problem in study.problems)


@pytest.mark.parametrize("stored, signed, high", [(12, False, 15), (12, True, 15), (10, False, 15), (11, True, 13)])
def test_stored_bits_above_others_are_moved_down(tmp_path, base, stored, signed, high):
    values = np.random.default_rng(stored).integers(-1000 * signed, 1000, (6, 10))
    dataset = pydicom.dcmread(base / "101" / "1.dcm")
    dataset.Rows, dataset.Columns = values.shape
    restate(dataset, (values << (high + 1 - stored)) & 0xFFFF, signed, stored)
    dataset.HighBit = high
    dataset.save_as(tmp_path / "1.dcm")
    ((slice_,), _) = read_slices(tmp_path / "1.dcm")
    np.testing.assert_array_equal(slice_["pixels"], values)
    assert slice_["doubts"] == []


@pytest.mark.parametrize("bits, signed", [(9, True), (10, False)])
def test_bits_stored_that_cut_values_off_are_said(tmp_path, base, bits, signed):
    study = copied(base, tmp_path, lambda dataset, k: restate(dataset, dataset.pixel_array, signed, bits))
    problems = [p for p in read_study(study, T2).problems if "cut off" in p]
    assert problems == [
        f"study 1, series 103: 9 files: values need more than the {bits} bits stored: cut off, grey values may be off"
    ]


@pytest.mark.parametrize("what", ["overlay", "noise", "sign"])
def test_other_things_above_the_stored_bits_are_no_doubt(tmp_path, base, raw, what):
    def change(dataset, k):
        values = dataset.pixel_array.astype(int)
        if what == "overlay":
            values[5:12, 5:60] |= 0x8000
        elif what == "noise":
            values |= np.random.default_rng(k).integers(0, 16, values.shape) << 12
        else:
            values -= 200
            dataset.RescaleSlope, dataset.RescaleIntercept = "1", "200"
        restate(dataset, values & (0xFFF if what == "sign" and k % 2 else 0xFFFF), what == "sign", 12)

    study = read_study(copied(base, tmp_path, change), T2)
    np.testing.assert_array_equal(study.volumes[0].array, raw)
    assert not any("series 103" in problem for problem in study.problems)


# ---- Elements of another kind, or empty ----


def set_text(dataset, keyword, text, vr):
    data = text.encode() + b" " * (len(text) % 2)
    tag = pydicom.tag.Tag(keyword)
    dataset._dict[tag] = RawDataElement(tag, vr, len(data), data, 0, False, True)


WHOLE = "Rows Columns SamplesPerPixel BitsAllocated BitsStored HighBit PixelRepresentation".split()


@pytest.mark.parametrize("text", ["{}", " {} ", "{}.0"])
@pytest.mark.parametrize("vr", ["LO", "DS", "SH", "IS", "UN", "UT"])
def test_whole_numbers_are_read_as_text_too(tmp_path, base, raw, vr, text):
    def change(dataset, k):
        for keyword in WHOLE:
            set_text(dataset, keyword, text.format(dataset[keyword].value), vr)

    study = read_study(copied(base, tmp_path, change), T2)
    np.testing.assert_array_equal(study.volumes[0].array, raw)
    assert not any("series 103" in problem for problem in study.problems)


@pytest.mark.parametrize(
    "keyword, text, said",
    [
        ("Rows", "many", "Rows is 'many', which is not a whole number"),
        ("BitsStored", "11.5", "BitsStored is '11.5', which is not a whole number"),
        ("Columns", "112\\112", "Columns is .* not a whole number"),
        ("Rows", "99999", "states 1 x 99999 x 112 pixels"),
    ],
)
@pytest.mark.parametrize("vr", ["LO", "DS"])
def test_text_that_is_no_size_is_named(tmp_path, base, keyword, text, said, vr):
    study = copied(base, tmp_path, lambda dataset, k: set_text(dataset, keyword, text, vr))
    with pytest.raises(pixels.DicomProblem, match=said):
        read_slices(study / "103" / "1.dcm")


@pytest.mark.parametrize("value, vr", [(-2000, "LO"), (-2000, "DS"), (4095, "SH"), (-32768, "UN"), (4095, "UN")])
def test_padding_stated_as_text_is_padding(tmp_path, base, value, vr):
    outside = bordered((112, 112), "circle")

    def change(dataset, k):
        stored = dataset.pixel_array.astype(int)
        stored[outside] = value
        restate(dataset, stored & 0xFFFF, True)
        set_text(dataset, "PixelPaddingValue", str(value), vr)

    study = read_study(copied(base, tmp_path, change), T2)
    assert (np.isnan(study.volumes[0].array) == outside).all()


@pytest.mark.parametrize("kind, vr", [("Float", "FL"), ("DoubleFloat", "FD"), ("Float", "LO")])
@pytest.mark.parametrize("value, limit", [(-1e10, None), (1e30, None), (-2e30, -1e10)])
def test_padding_of_float_pixels_is_padding(tmp_path, base, raw, kind, vr, value, limit):
    outside = bordered((112, 112), "circle")

    def change(dataset, k):
        stored = dataset.pixel_array.astype(np.float32 if kind == "Float" else np.float64)
        stored[outside] = np.linspace(value, value if limit is None else limit, outside.sum())
        del dataset.PixelData
        dataset.BitsAllocated = 8 * stored.itemsize
        setattr(dataset, f"{kind}PixelData", stored.tobytes())
        for what, number in (("Value", value), ("RangeLimit", limit)):
            if number is not None and vr == "LO":
                set_text(dataset, f"{kind}PixelPadding{what}", repr(float(np.float32(number))), vr)
            elif number is not None:
                dataset.add_new(f"{kind}PixelPadding{what}", vr, number)

    study = read_study(copied(base, tmp_path, change), T2)
    np.testing.assert_array_equal(study.volumes[0].array, np.where(outside, np.nan, raw))


def test_an_empty_table_of_offsets_is_none(tmp_path, base, raw):
    def change(dataset, k):
        if k % 3 == 0:
            dataset.compress(RLELossless, generate_instance_uid=False)
        for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")[: 1 + k % 2]:
            dataset.add_new(keyword, "OV", b"")

    study = read_study(copied(base, tmp_path, change), T2)
    np.testing.assert_array_equal(study.volumes[0].array, raw)


@pytest.mark.parametrize("keyword", ["PixelData", "FloatPixelData"])
def test_no_pixels_are_called_so(tmp_path, base, keyword):
    def change(dataset):
        del dataset.PixelData
        dataset.add_new(keyword, "OF" if keyword.startswith("F") else "OW", b"")

    study = copied(base, tmp_path, one(change))
    (problem,) = [p for p in read_study(study, T2).problems if "5.dcm" in p]
    assert problem == f"study 1, series 103: 5.dcm: {keyword} is empty: there is no image"


# ---- Padding ----


def bordered(shape, what):
    """A mask of the places that a scan of that shape leaves empty."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    if what == "rows":
        return (rows < shape[0] // 20) | (rows >= shape[0] - shape[0] // 20)
    if what == "columns":
        return columns < shape[1] // 10
    middle = (np.array(shape) - 1) / 2
    return np.hypot(rows - middle[0], columns - middle[1]) > 0.56 * max(shape)


@pytest.mark.parametrize("where", ["rows", "columns", "circle"])
@pytest.mark.parametrize(
    "value, signed, announced",
    [
        (-2000, True, True),
        (-32768, True, True),
        (65535, False, True),
        (4095, False, True),
        (-2000, True, False),
        (-32768, True, False),
        (65535, False, False),
        (4095, False, False),
        (3000, False, False),
    ],
)
def test_padding_does_not_decide_the_grey_scale(tmp_path, base, raw, value, signed, announced, where):
    def padded(dataset, k):
        stored = dataset.pixel_array.astype(np.int32)
        stored[bordered(stored.shape, where)] = value
        restate(dataset, stored & 0xFFFF, signed)
        if announced:
            dataset.add_new(0x00280120, "SS" if signed else "US", value)

    array = read(copied(base, tmp_path, padded)).array
    tissue = ~bordered(array.shape[1:], where)
    low, high = greys.grey_range(raw[:, tissue])
    np.testing.assert_allclose(array[:, tissue], np.clip((raw[:, tissue] - low) / (high - low), -1, 8), atol=2e-3)
    assert (array[:, ~tissue] == 0).all()


def test_a_range_of_padding_values_and_one_inside_the_tissues(tmp_path, base):
    corners = bordered((112, 112), "circle")

    def change(dataset, k):
        stored = dataset.pixel_array.astype(np.int32)
        stored[corners] = -np.random.default_rng(k).integers(1000, 1500, corners.sum())
        restate(dataset, stored & 0xFFFF, True)
        dataset.add_new(0x00280120, "SS", -1500)
        dataset.add_new(0x00280121, "SS", -1000)

    study = read_study(copied(base, tmp_path / "range", change), T2)
    assert (np.isnan(study.volumes[0].array) == corners).all()

    def inside(dataset, k):
        stored = dataset.pixel_array.astype(np.int32) - 100
        stored[corners] = 50
        restate(dataset, stored & 0xFFFF, True)
        dataset.add_new(0x00280120, "SS", 50)

    study = read_study(copied(base, tmp_path / "inside", inside), T2)
    empty = np.isnan(study.volumes[0].array)
    assert empty[:, corners].all()
    assert empty[:, ~corners].mean() < 0.01  # tissue of that very value stays, but where it touches the corners


def test_ordinary_images_keep_their_scale_bit_for_bit(right, raw):
    low, high = np.percentile(raw, (0.5, 99.5))
    scaled = np.clip((raw - np.float32(low)) * np.float32(1 / (high - low)), -1, 8)
    np.testing.assert_array_equal(right.array, scaled.astype(np.float16))
    # Air of exactly 0 around the body is background, as noise there is.
    masked = replace(right, array=np.where(raw < np.percentile(raw, 8), 0, raw))
    assert np.abs(greys.normalise_volume(masked).array - right.array).max() < 0.06


# ---- Slices that do not fit ----


def one(change):
    def apply(dataset, k):
        if k == 4:
            change(dataset)

    return apply


def set_slope(slope):
    def change(dataset):
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, "0"

    return change


def swap_bytes(dataset):
    dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()


def turn_round(dataset):
    stored = dataset.pixel_array
    dataset.PixelData = (stored.max() - stored).tobytes()


def noise(dataset):
    dataset.PixelData = np.random.default_rng(0).integers(0, 800, dataset.pixel_array.shape).astype("<u2").tobytes()


@pytest.mark.parametrize(
    "change, reason",
    [
        (set_slope("1000"), "span 1e\\+03 times|span .* times those .* 1000 and 0, theirs 1 and 0"),
        (set_slope("0.001"), "span 0.00"),
        (set_slope("2.5"), "do not fit its neighbours'.*2.5 and 0"),
        (swap_bytes, "times those of its neighbours"),
        (turn_round, "turned round|nothing in common"),
        (noise, "nothing in common"),
        (lambda dataset: restate(dataset, np.zeros((112, 112))), "of one grey"),
    ],
)
def test_a_slice_of_another_scale_order_or_polarity_is_left_out_and_said(tmp_path, base, right, change, reason):
    study = normalise_study(read_study(copied(base, tmp_path, one(change)), T2))
    (sentence,) = [problem for problem in study.problems if "file 5: " in problem]
    assert re.search(reason, sentence) and sentence.endswith("left out")
    found = {int(n): image for v in study.volumes for n, image in zip(v.instance_numbers, v.array, strict=True)}
    assert set(found) == set(right.instance_numbers.tolist()) - {5}
    for number, image in found.items():
        np.testing.assert_allclose(image, right.array[right.slice_of(number)], atol=0.3)


def test_a_series_of_noise_is_said(tmp_path, base):
    def change(dataset, k):
        restate(dataset, np.random.default_rng(k).integers(0, 800, dataset.pixel_array.shape))

    study = read_study(copied(base, tmp_path, change), T2)
    assert len(study.volumes[0].array) == 9
    assert any("grey values of 7 of 9 slices do not fit" in problem for problem in study.problems)


def test_slopes_that_differ_from_slice_to_slice_are_no_fault(tmp_path, base, right):
    def change(dataset, k):
        slope = 1 + k / 3
        restate(dataset, np.round(dataset.pixel_array / slope))
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.6f}", "0"

    study = normalise_study(read_study(copied(base, tmp_path, change), T2))
    assert not any("series 103" in problem for problem in study.problems)
    assert np.abs(study.volumes[0].array.astype(float) - right.array).max() < 0.02


# ---- Series of another scale ----


@pytest.mark.parametrize("description", utils.DESCRIPTIONS)
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_series_of_another_pixel_spacing_is_said(good, description, factor):
    study = Study(1, [scaled(v, factor) if v.description == description else v for v in good.volumes])
    (doubt,) = agreement.doubtful_scales(study)
    assert f"scale of {description} is doubtful" in doubt.text
    assert f"only if they are {1 / factor:.2g} times as large" in doubt.text
    left = greys.normalise_study(study)
    assert doubt.sure and {v.description for v in left.volumes} == set(utils.DESCRIPTIONS) - {description}
    assert any(problem.endswith("times as large, left out") for problem in left.problems)
    assert agreement.doubtful_scales(good) == [] and good.problems == []


def test_of_two_series_that_contradict_each_other_both_stay(good):
    volumes = [v for v in good.volumes if v.description != "Axial T2"]
    study = greys.normalise_study(Study(1, [scaled(volumes[0], 2.0), volumes[1]]))
    assert len(study.volumes) == 2
    assert len(study.problems) == 1 and ", or it is series" in study.problems[0]


def scaled(volume, factor):
    affine = volume.affine.copy()
    affine[:3, 1:3] *= factor
    return replace(volume, affine=affine)


@pytest.mark.parametrize("description", utils.DESCRIPTIONS)
def test_a_series_turned_round_is_said(good, description):
    study = Study(1, [turned(v) if v.description == description else v for v in good.volumes])
    (sentence,) = agreement.doubtful_polarity(study)
    (own,) = study.of(description)
    assert f"{own.series_id}" in sentence and "turned round" in sentence
    assert agreement.doubtful_polarity(good) == []


def turned(volume):
    return replace(volume, array=(1 - volume.array).astype(np.float16))


def test_mutual_information_tells_dependence_from_none():
    rng = np.random.default_rng(0)
    a = rng.random(20_000)
    assert agreement.mutual_information(a, 1 - a) == pytest.approx(1)
    assert agreement.mutual_information(a, rng.random(20_000)) < 0.01


# ---- Bounds ----


def dataset_bytes(base):
    """(what stands before a slice's data set, the data set itself, explicit little endian)."""
    buffer = io.BytesIO()
    pydicom.dcmread(base / "101" / "1.dcm").save_as(buffer)
    data = buffer.getvalue()
    start = 132 + 12 + struct.unpack("<I", data[140:144])[0]
    return data[:start], data[start:]


def deflated_head(base):
    dataset = pydicom.dcmread(base / "101" / "1.dcm")
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    return data[: 132 + 12 + struct.unpack("<I", data[140:144])[0]]


ITEM, UNKNOWN = b"\xfe\xff\x00\xe0", b"\xff\xff\xff\xff"
GROUPS = b"\x00\x52\x30\x92SQ\0\0"  # the tag of the per-frame functional groups
PRIVATE = b"\x09\x00\x10\x10SQ\0\0"


def test_what_a_deflated_file_inflates_to_is_bounded(tmp_path, base, monkeypatch):
    monkeypatch.setattr(dicom, "MAX_INFLATED_BYTES", 1 << 20)
    _, body = dataset_bytes(base)
    path = tmp_path / "1.dcm"
    for extra, reason in ((0, None), (4 << 20, "inflates to more than 1 MB")):
        padded = body + (b"\xfc\xff\xfc\xffOB\0\0" + struct.pack("<I", extra) + bytes(extra) if extra else b"")
        press = zlib.compressobj(9, zlib.DEFLATED, -15)
        path.write_bytes(deflated_head(base) + press.compress(padded) + press.flush())
        if reason is None:
            own = read_slice(path)["pixels"]
            np.testing.assert_array_equal(own, read_slice(base / "101" / "1.dcm")["pixels"])
        else:
            with pytest.raises(pixels.DicomProblem, match=reason):
                read_slices(path)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize(
    "bomb",
    [
        GROUPS + struct.pack("<I", 8 * 1_500) + (ITEM + bytes(4)) * 1_500,
        GROUPS + UNKNOWN + (ITEM + bytes(4)) * 8_000 + b"\xfe\xff\xdd\xe0" + bytes(4),
        PRIVATE + UNKNOWN + (ITEM + bytes(4)) * 8_000 + b"\xfe\xff\xdd\xe0" + bytes(4),
        PRIVATE + UNKNOWN + ITEM + UNKNOWN + b"\x0a\x00\x10\x10SH\0\0" * 8_000,
        (PRIVATE + UNKNOWN + ITEM + UNKNOWN) * 8_000,
        b"".join(struct.pack("<HH2sH", 0x7001, k % 65536, b"SH", 0) for k in range(8_000)),
    ],
    ids=["items", "items of unknown length", "private items", "elements in an item", "nesting", "elements"],
)
def test_what_a_header_may_hold_is_bounded(tmp_path, base, monkeypatch, bomb, deflated):
    monkeypatch.setattr(dicom, "MAX_READS", 5_000)
    monkeypatch.setattr(dicom, "MAX_ITEMS", 1_000)
    head, body = dataset_bytes(base)
    at = body.index(b"\xe0\x7f\x10\x00")
    if bomb.startswith(b"\x09"):
        at = body.index(b"\x10\x00\x10\x00")
    body = body[:at] + bomb + body[at:]
    if deflated:
        press = zlib.compressobj(9, zlib.DEFLATED, -15)
        head, body = deflated_head(base), press.compress(body) + press.flush()
    path = tmp_path / "1.dcm"
    path.write_bytes(head + body)
    with pytest.raises(pixels.DicomProblem):
        read_slices(path)


def test_reasons_give_no_advice_that_nobody_can_follow():
    texts = [
        "File is missing DICOM File Meta Information header. Use force=True to force reading.",
        "The length is wrong. You can pass 'allow_excess_frames=False' to the decoder.",
        "Set pydicom.config.settings.reading_validation_mode.",
    ]
    for text in texts:
        reason = pixels.plain_reason(ValueError(text))
        assert reason and not any(word in reason for word in ("force", "=", "pydicom", "config"))


@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x89PNG\r\n", "a PNG picture"),
        (bytes(4000), "neither the mark DICM"),
    ],
)
def test_files_of_another_kind_are_called_by_their_name(tmp_path, content, what):
    (tmp_path / "1.dcm").write_bytes(content)
    with pytest.raises(dicom.NotDicom, match=what):
        read_slices(tmp_path / "1.dcm")
