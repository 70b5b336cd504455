"""Damaged studies beside good ones: every row is there, the good ones' do not change, and the log says what was lost.

Real (tiny, random) networks, real files, one run over all.
"""

import builtins
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import tiny

import utils
from lumbar.data import dicom, stacks
from lumbar.data import pixels as pixels_module
from lumbar.data.competition import row_ids
from lumbar.data.dicom import read_study
from lumbar.grade.ensemble import default_ensemble

EVERY_MEMBER = " ".join(utils.MEMBERS)
GOOD = (7, 1505, 9000)  # before, between and after the broken ones
T1, AXIAL, T2 = tiny.SERIES
ALL = tuple(tiny.SERIES)


def files(study, series=ALL):
    return [path for number in series for path in sorted((study / str(number)).glob("*.dcm"))]


def edit(change, series=ALL, first=None):
    """A breakage: change(dataset, number of the file) on the first (default all) files of these series."""

    def apply(study):
        for number in series:
            for k, path in enumerate(files(study, [number])[:first]):
                dataset = pydicom.dcmread(path)
                change(dataset, k)
                dataset.save_as(path)

    return apply


def put(series=ALL, **values):
    def change(dataset, k):
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    return edit(change, series)


def drop(keyword, series=ALL):
    return edit(lambda dataset, k: delattr(dataset, keyword), series)


def pixels(make, series=ALL):
    """make(stored (rows, columns), number of the file) -> what is stored instead."""

    def change(dataset, k):
        dataset.PixelData = make(dataset.pixel_array, k).astype(dataset.pixel_array.dtype).tobytes()

    return edit(change, series)


def contents(make, series=ALL):
    """make(bytes of the file) -> bytes that stand there instead."""

    def apply(study):
        for path in files(study, series):
            path.write_bytes(make(path.read_bytes()))

    return apply


def instead(make, series=ALL, keep=0):
    """Files (but the first `keep` of each series) are removed, and make(path) puts something in their place."""

    def apply(study):
        for number in series:
            for path in files(study, [number])[keep:]:
                path.unlink()
                make(path)

    return apply


def without(*series):
    return lambda study: [shutil.rmtree(study / str(number)) for number in series]


def place(make):
    """make(number of the file, its position) -> its ImagePositionPatient."""

    def change(dataset, k):
        dataset.ImagePositionPatient = make(k, [float(x) for x in dataset.ImagePositionPatient])

    return edit(change)


def thousands(study):
    """2,100 slices of 8 x 8 pixels, 0.05 mm apart, in the T2 series."""
    path = files(study, [T2])[0]
    dataset = pydicom.dcmread(path)
    dataset.PixelData = dataset.pixel_array[::14, ::14].tobytes()
    dataset.Rows = dataset.Columns = 8
    dataset.PixelSpacing = [12.0, 12.0]
    marker = "+0.000000001"  # as long as what takes its place
    dataset.ImagePositionPatient = [marker, *dataset.ImagePositionPatient[1:]]
    dataset.save_as(path)
    data = path.read_bytes()
    for number in range(1, 2101):
        path.with_name(f"{number}.dcm").write_bytes(data.replace(marker.encode(), f"{0.05 * number:+012.6f}".encode()))


def turned(dataset, k):
    angle = np.random.default_rng(k).normal(size=(3, 3))
    dataset.ImageOrientationPatient = [f"{v:.6f}" for v in np.linalg.qr(angle)[0][:2].ravel()]


def shapes(dataset, k):
    stored = np.ascontiguousarray(dataset.pixel_array[: 40 + 3 * k, : 60 - 2 * k])
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelData = stored.tobytes()


def colour(dataset, k):
    stored = dataset.pixel_array
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.PixelData = np.repeat(stored[..., None], 3, -1).tobytes()


def floats(dataset, k):
    stored = dataset.pixel_array.astype(np.float32)
    stored[3, 3] = np.nan
    del dataset.PixelData
    dataset.BitsAllocated = 32
    dataset.FloatPixelData = stored.tobytes()


def garbled_rle(dataset, k):
    dataset.compress(pydicom.uid.RLELossless)
    data = bytearray(dataset.PixelData)
    data[20:] = bytes(np.random.default_rng(k).integers(0, 256, len(data) - 20, dtype=np.uint8))
    dataset.PixelData = bytes(data)


def syntax(uid):
    """The transfer syntax stated is another than the one written."""
    own = pydicom.uid.ExplicitVRLittleEndian.encode()

    def stated(data):
        # The element's length (its two bytes before the value) and the group's before it change alike.
        at = data.index(own)
        value = uid.encode() + b"\0" * (len(uid) % 2)
        grown = len(value) - len(own) - len(own) % 2
        group = data.index(b"\x02\x00\x00\x00UL\x04\x00") + 8
        length = int.from_bytes(data[group : group + 4], "little") + grown
        head = data[:group] + length.to_bytes(4, "little") + data[group + 4 : at - 2]
        return head + len(value).to_bytes(2, "little") + value + data[at + len(own) + len(own) % 2 :]

    return contents(stated)


def box(stored, k):
    empty = np.zeros_like(stored)
    empty[30:60, 30:60] = 900
    return empty


def noise(data):
    return np.random.default_rng(len(data)).bytes(4000)


def a_file(study):
    shutil.rmtree(study)
    study.write_text("not a folder")


def series_as_files(study):
    for number in ALL:
        shutil.rmtree(study / str(number))
        (study / str(number)).write_text("not a folder")


def twice(study):
    for path in files(study):
        shutil.copy(path, path.with_name(f"{500 + int(path.stem)}.dcm"))


def named(pattern):
    def apply(study):
        for number, path in enumerate(files(study)):
            path.rename(path.with_name(pattern.format(number)))

    return apply


def denied(study):
    for path in files(study):
        path.chmod(0)  # keeps everybody out but root: see refuse_denied
    (study / "denied").touch()


# name, what is done to a copy of a good study, what the log must say (None: nothing needs to be lost).
BROKEN = [
    ("no folder", shutil.rmtree, "folder cannot be read"),
    ("an empty folder", lambda study: without(*ALL)(study), "folder cannot be read"),
    ("empty series", instead(lambda path: None), "no readable slice"),
    ("a file for a study", a_file, "Not a directory"),
    ("files for series", series_as_files, "Not a directory"),
    ("cut at 60%", contents(lambda data: data[: len(data) * 6 // 10]), r"\.dcm: "),
    ("cut at 200 bytes", contents(lambda data: data[:200]), r"\.dcm: "),
    ("text", contents(lambda data: b"The images are on the other disk.\n"), "no readable DICOM"),
    ("zero bytes", contents(lambda data: b""), "no readable DICOM"),
    ("random bytes", contents(noise), "no readable DICOM|ImageOrientationPatient"),
    ("encrypted behind the preamble", contents(lambda data: data[:132] + noise(data)), r"\.dcm: "),
    ("encrypted behind the header", contents(lambda data: data[:700] + noise(data)), r"\.dcm: "),
    ("no ImagePositionPatient", drop("ImagePositionPatient"), "ImagePositionPatient is missing"),
    ("no ImageOrientationPatient", drop("ImageOrientationPatient"), "ImageOrientationPatient is missing"),
    ("no PixelSpacing", drop("PixelSpacing"), "PixelSpacing is missing"),
    ("no Rows", drop("Rows"), "pixels cannot be decoded"),
    ("no Columns", drop("Columns"), "pixels cannot be decoded"),
    ("no PixelData", drop("PixelData"), "pixels cannot be decoded"),
    ("no BitsAllocated", drop("BitsAllocated"), "pixels cannot be decoded"),
    ("no PixelRepresentation", drop("PixelRepresentation"), None),
    ("no SamplesPerPixel", drop("SamplesPerPixel"), None),
    ("no PhotometricInterpretation", drop("PhotometricInterpretation"), None),
    ("no InstanceNumber", drop("InstanceNumber"), None),
    ("no SeriesInstanceUID", drop("SeriesInstanceUID"), None),
    ("no SOPClassUID", drop("SOPClassUID"), None),
    ("no T1", without(T1), "no Sagittal T1 series"),
    ("no T2", without(T2), "no Sagittal T2/STIR series"),
    ("no axial", without(AXIAL), "no Axial T2 series"),
    ("T1 alone", without(T2, AXIAL), "no Axial T2 series"),
    ("T2 alone", without(T1, AXIAL), "no Sagittal T1 series"),
    ("axial alone", without(T1, T2), "no Sagittal T1 series"),
    ("descriptions unknown", lambda study: None, "not in the descriptions table"),
    ("descriptions swapped", lambda study: None, "left out"),
    ("descriptions missing", lambda study: None, "not in the descriptions table"),
    ("noise", pixels(lambda stored, k: np.random.default_rng(k).integers(0, 4000, stored.shape)), None),
    ("constant", pixels(lambda stored, k: np.full_like(stored, 400)), "slices are of one grey"),
    ("zeros", pixels(lambda stored, k: np.zeros_like(stored)), "slices are of one grey"),
    ("a box", pixels(box), None),
    ("upside down", pixels(lambda stored, k: stored[::-1]), None),
    ("one slice each", instead(lambda path: None, keep=1), "1 slices are all there is"),
    ("one slice in all", lambda s: (without(T1, AXIAL)(s), instead(lambda p: None, [T2], 1)(s)), "no Sagittal T1"),
    ("thousands of slices", thousands, "of 2100 slices every 8th was read"),
    ("spacing not a number", put(PixelSpacing=["nan", "nan"]), "PixelSpacing is not usable"),
    ("spacing zero", put(PixelSpacing=[0.0, 0.0]), "PixelSpacing is not positive"),
    ("spacing negative", put(PixelSpacing=[-1.0, -1.0]), "PixelSpacing is not positive"),
    ("spacing huge", put(PixelSpacing=["1e9", "1e9"]), "larger than a body"),
    ("spacing minute", put(PixelSpacing=["1e-9", "1e-9"]), "PixelSpacing is not a pixel of a body"),
    ("thickness huge", put(SliceThickness="1e30", SpacingBetweenSlices="1e30"), "no length in a body"),
    ("positions not numbers", place(lambda k, xyz: ["nan"] * 3), "ImagePositionPatient is not usable"),
    ("positions infinite", place(lambda k, xyz: ["inf", *xyz[1:]]), "ImagePositionPatient is not usable"),
    ("positions in another room", place(lambda k, xyz: [1e12, *xyz[1:]]), "not in the scanner"),
    ("one position for all", place(lambda k, xyz: [10.0, 20.0, 30.0]), "lie at the same place"),
    ("orientation of zeros", put(ImageOrientationPatient=[0.0] * 6), "perpendicular unit vectors"),
    ("orientations mixed", edit(turned), "left out"),
    ("shapes mixed", edit(shapes), "no .* slice shows l"),
    ("everything twice", twice, "the same image at the same place"),
    ("colour", edit(colour), "colour picture"),
    ("slope infinite", put(RescaleSlope="inf", RescaleIntercept="0"), "RescaleSlope is not usable"),
    ("slope not a number", put(RescaleSlope="nan", RescaleIntercept="0"), "RescaleSlope is not usable"),
    ("slope huge", put(RescaleSlope="1e38", RescaleIntercept="0"), "RescaleSlope or RescaleIntercept is not usable"),
    ("slope zero", put(RescaleSlope="0", RescaleIntercept="0"), "slices are of one grey"),
    ("floats with holes", edit(floats), "pixels are not finite"),
    ("too few pixels", edit(lambda d, k: setattr(d, "PixelData", d.PixelData[:-200])), "pixels cannot be decoded"),
    ("too many pixels", edit(lambda d, k: setattr(d, "PixelData", d.PixelData + b"\0" * 200)), None),
    ("65535 x 65535 stated", put(Rows=65535, Columns=65535), "65535 x 65535 pixels"),
    ("65535 x 65535 compressed", edit(lambda d, k: (garbled_rle(d, k), put_size(d))), "65535 x 65535 pixels"),
    ("a million frames", put(NumberOfFrames=1000000), "1000000 frames"),
    ("64 bits stated", put(BitsAllocated=64, BitsStored=64), "pixels cannot be decoded"),
    ("RLE of garbage", edit(garbled_rle), None),
    ("an unknown transfer syntax", syntax("1.2.3.4.5"), r"\.dcm: "),
    ("video", syntax("1.2.840.10008.1.2.4.100"), "pixels cannot be decoded"),
    ("JPEG that is none", syntax("1.2.840.10008.1.2.4.50"), "pixels cannot be decoded"),
    ("deflated that is not", syntax("1.2.840.10008.1.2.1.99"), r"\.dcm: "),
    ("permission denied", denied, "Permission denied"),
    ("links that loop", instead(lambda path: path.symlink_to(path.name)), "symbolic links"),
    ("links to nothing", instead(lambda path: path.symlink_to("gone")), "No such file"),
    ("links to an endless device", instead(lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    ("directories for files", instead(lambda path: path.mkdir()), "not a regular file"),
    ("pipes for files", instead(os.mkfifo, keep=2), "not a regular file"),
    ("names in other digits", named("\u00b2{}\u0664.dcm"), None),
    ("names without numbers", named("Wirbels\u00e4ule \u8170\u690e {} \U0001f9b4.dcm"), None),
    ("numbers too large", named("9999999999999999999999{}.dcm"), None),
]


def put_size(dataset):
    dataset.Rows = dataset.Columns = 65535


IDS = {name: 1000 + 10 * number for number, (name, _, _) in enumerate(BROKEN)}


def describe(name):
    """A broken study's rows of the descriptions table."""
    if name == "descriptions unknown":
        return dict.fromkeys(ALL, "Sagittal CT")
    if name == "descriptions swapped":
        return dict(zip(ALL, ("Axial T2", "Sagittal T2/STIR", "Axial T2"), strict=True))
    return {T1: "Sagittal T1"} if name == "descriptions missing" else tiny.SERIES


def write_table(data, studies):
    rows = [(study_id, series_id, what) for study_id, series in studies.items() for series_id, what in series.items()]
    table = pd.DataFrame(rows, columns=["study_id", "series_id", "series_description"])
    table.to_csv(data / "test_series_descriptions.csv", index=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """infer_studies' results on the good studies alone and on all of them, and the seconds of the latter."""
    root = tmp_path_factory.mktemp("broken")
    tiny.write_study(root / "base")
    for place in ("alone", "together"):
        for study_id in GOOD:
            study = root / place / "test_images" / str(study_id)
            shutil.copytree(root / "base", study)
            rng = np.random.default_rng(study_id)
            pixels(lambda stored, k, rng=rng: stored * rng.uniform(0.6, 1.4) + rng.integers(0, 90, stored.shape))(study)
    write_table(root / "alone", dict.fromkeys(GOOD, tiny.SERIES))
    with pytest.MonkeyPatch.context() as patch:
        refuse_denied(patch)
        with pydicom.config.disable_value_validation():
            for name, break_it, _ in BROKEN:
                study = root / "together" / "test_images" / str(IDS[name])
                shutil.copytree(root / "base", study)
                break_it(study)
        described = dict.fromkeys(GOOD, tiny.SERIES) | {IDS[name]: describe(name) for name, _, _ in BROKEN}
        write_table(root / "together", described)
        members = utils.load_members([tiny.write_members(root / "weights", random_spinenet=True)], device="cpu")
        results = {}
        for place in ("alone", "together"):
            started = time.time()
            results[place] = utils.infer_studies(
                root / place, "test", members, default_ensemble(), root / "out" / place, hours=9.0, patience_s=60.0
            )
        return results, time.time() - started


def refuse_denied(patch):
    """What chmod 000 does to everybody but root, who runs most containers."""
    real = builtins.open

    def guarded(path, *rest, **named):
        if isinstance(path, (str, Path)) and (Path(path).parent.parent / "denied").exists():
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **named)

    patch.setattr(builtins, "open", guarded)


def rows_of(result):
    ids, probabilities = utils.from_submission(result[0])
    return dict(zip(ids, probabilities, strict=True))


@pytest.mark.slow
def test_every_row_is_there_and_sums_to_one(runs):
    submission = runs[0]["together"][0]
    assert len(BROKEN) >= 60
    expected = [row for study_id in (*GOOD, *IDS.values()) for row in row_ids(study_id)]
    assert submission["row_id"].tolist() == sorted(expected)
    values = submission[list(utils.SEVERITIES)].to_numpy(np.float64)
    assert np.isfinite(values).all() and (values >= 0).all() and np.abs(values.sum(1) - 1).max() < 1e-12


@pytest.mark.slow
def test_the_good_studies_are_as_they_are_alone(runs):
    alone, together = (rows_of(runs[0][place]) for place in ("alone", "together"))
    for study_id in GOOD:
        # Convolutions over another batch may round the last digit of float32 differently.
        np.testing.assert_allclose(together[study_id], alone[study_id], rtol=0, atol=1e-6)
    assert np.abs(alone[GOOD[0]] - alone[GOOD[1]]).max() > 1e-3  # the networks do look at the images
    log = runs[0]["together"][1].set_index("study_id")
    assert (log.loc[list(GOOD), "members"] == EVERY_MEMBER).all() and (log.loc[list(GOOD), "problems"] == "").all()


@pytest.mark.slow
@pytest.mark.parametrize("name, reason", [(name, reason) for name, _, reason in BROKEN if reason])
def test_what_is_lost_has_its_reason_in_the_log(runs, name, reason):
    log = runs[0]["together"][1].set_index("study_id")
    said = log["problems"].str.contains(reason)
    assert said[IDS[name]], log.loc[IDS[name], "problems"][:400]


@pytest.mark.slow
def test_what_a_member_does_not_say_has_its_reason(runs):
    log = runs[0]["together"][1]
    less = (log["members"] != EVERY_MEMBER) & (log["problems"] == "")
    assert not less.any(), log[less]


@pytest.mark.slow
def test_nothing_hangs_or_is_retold_at_length(runs):
    _, log, _, levels = runs[0]["together"]
    assert not log["problems"].str.contains("given up").any()
    assert log["problems"].str.len().max() < 20_000
    assert (log["reading_s"] + log["locating_s"]).max() < 30
    assert np.isfinite(levels[["x_mm", "y_mm", "z_mm"]].to_numpy(np.float64)).all()


@pytest.mark.slow
def test_the_prior_stands_only_where_no_image_can_be_read(runs):
    log = runs[0]["together"][1].set_index("study_id")
    unreadable = log["problems"].str.contains("no readable image")
    assert (log.loc[unreadable, "rows_from"] == "level prior 25").all()
    assert (log.loc[~unreadable, "prior_rows"] == 0).all(), log.loc[~unreadable, ["rows_from", "problems"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    study = tmp_path_factory.mktemp("bounds") / "1"
    tiny.write_study(study)
    return study


@pytest.mark.slow
def test_a_series_that_is_too_large_is_thinned_evenly(base, monkeypatch):
    monkeypatch.setattr(dicom, "MAX_PIXELS", 4 * 112 * 112)
    study = read_study(base, tiny.SERIES)
    volumes = [study.of(description) for description in ("Sagittal T1", "Sagittal T2/STIR")]
    for (volume,) in volumes:
        assert volume.instance_numbers.tolist() in ([1, 5, 9], [9, 5, 1])
        np.testing.assert_allclose(volume.spacing_mm[0], 4 * whole(base, volume.description).spacing_mm[0], rtol=1e-3)
    assert sum("of 9 slices every 4th was read" in problem for problem in study.problems) == 2


def whole(base, description):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dicom, "MAX_PIXELS", 1 << 27)
        return read_study(base, tiny.SERIES).of(description)[0]


@pytest.mark.slow
def test_frames_of_one_file_are_thinned_alike(monkeypatch, tmp_path):
    (tmp_path / "1.dcm").touch()
    place = {"pixels": np.zeros((4, 4)), "spacing_mm": np.ones(2), "doubts": []}
    frames = [place | {"instance_number": number} for number in range(1, 41)]
    monkeypatch.setattr(dicom, "read_slices", lambda path, known: ([dict(frame) for frame in frames], []))
    monkeypatch.setattr(dicom, "MAX_SLICES", 10)
    problems = []
    slices = dicom._read_series(tmp_path, "series", problems)
    assert [item["instance_number"] for item in slices] == list(range(1, 41, 4))
    assert problems == ["series: of 40 slices every 4th was read, they are too many"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit, value, reason, left",
    [
        ("MAX_STUDY_PIXELS", 1000, "the study's other series are as large as memory allows", 1),
        ("MAX_FILE_BYTES", 1000, "too large for a file of slices", 0),
        ("MAX_SIDE_PX", 100, "112 x 112 pixels .* too many", 1),
        ("MAX_VIEW_MM", 5.0, "larger than a body", 0),
        ("MAX_SENTENCES", 3, None, 3),
    ],
)
def test_other_bounds(base, monkeypatch, limit, value, reason, left):
    monkeypatch.setattr(pixels_module if limit == "MAX_SIDE_PX" else dicom, limit, value)
    study = read_study(base, tiny.SERIES)
    assert len(study.volumes) == left
    assert reason is None or any(re.search(reason, problem) for problem in study.problems)


@pytest.mark.slow
def test_only_the_longest_stacks_of_a_torn_series_stay_and_few_sentences(base, monkeypatch, tmp_path):
    study = tmp_path / "1"
    shutil.copytree(base, study)

    # Every slice but the first four looks into a direction of its own, and stays sagittal.
    def tilted(dataset, k):
        angle = 0.02 * max(0, k - 3)
        dataset.ImageOrientationPatient = [f"{v:.6f}" for v in (np.sin(angle), np.cos(angle), 0, 0, 0, -1)]

    edit(tilted, [T1])(study)
    assert len(read_study(study, {T1: "Sagittal T1"}).volumes) == 6
    monkeypatch.setattr(stacks, "MAX_STACKS", 2)
    found = read_study(study, {T1: "Sagittal T1"})
    assert len(found.volumes) == 2 and max(len(v.array) for v in found.volumes) == 4
    assert any("6 separate stacks, the 2 with most slices were kept" in problem for problem in found.problems)
    contents(lambda data: b"")(study)
    monkeypatch.setattr(dicom, "MAX_SENTENCES", 3)
    problems = read_study(study, {T1: "Sagittal T1"}).problems
    assert any(problem.endswith("and 7 more problems") for problem in problems) and "no readable slice" in problems[0]
