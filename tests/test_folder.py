"""Any folder of DICOM files: which studies and series there are, which are used, and that nothing names a patient."""

import json
import math
import os
import re
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import small_study
import tiny
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import utils
from lumbar.__main__ import main
from lumbar.data.headers import read_header
from lumbar.data.pixels import DicomProblem
from lumbar.data.series_kind import SeriesHeader, kind_of_series
from lumbar.data.source import Source
from lumbar.look.markups import write_markups
from lumbar.run.pipeline import run_notebook
from lumbar.serve import predict_folder
from lumbar.serve.folder import FoundStudy

ROOT = Path(__file__).resolve().parents[1]


MR = "1.2.840.10008.5.1.4.1.1.4"
AXES = {
    "sagittal": ([0, 1, 0], [0, 0, -1], [1, 0, 0]),
    "axial": ([1, 0, 0], [0, 1, 0], [0, 0, 1]),
    "coronal": ([1, 0, 0], [0, 0, -1], [0, 1, 0]),
}
T1 = {"RepetitionTime": 600, "EchoTime": 11}
T2 = {"RepetitionTime": 3500, "EchoTime": 102}


def a_slice(plane="sagittal", number=1, study="1.2.3", series="1.2.3.1", at_mm=0.0, step_mm=5.0, **attributes):
    """One slice's data set; attributes: by keyword, None leaves one out."""
    row, column, normal = (np.array(axis, float) for axis in AXES[plane])
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, "1.2"
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = (
        MR,
        generate_uid(entropy_srcs=[study, series, plane, str(number)]),
        "MR",
    )
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SeriesNumber = study, series, int(series.rsplit(".", 1)[1])
    ds.InstanceNumber, ds.PatientName, ds.PatientID = number, "Mustermann^Erika", "4711"
    ds.ImageOrientationPatient = [*row, *column]
    ds.ImagePositionPatient = list(normal * step_mm * number + np.array([0, 0, at_mm]))
    ds.PixelSpacing, ds.SliceThickness, ds.Rows, ds.Columns = [0.6, 0.6], step_mm - 1, 8, 8
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored = 1, "MONOCHROME2", 16, 12
    ds.HighBit, ds.PixelRepresentation = 11, 0
    ds.PixelData = np.full((8, 8), number, np.uint16).tobytes()
    for keyword, value in attributes.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)
    return ds


def write(path, dataset):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def write_series(folder, count=9, plane="sagittal", name="IM{:04}", **attributes):
    for number in range(1, count + 1):
        write(Path(folder) / name.format(number), a_slice(plane, number, **attributes))


def write_study(folder, study="1.2.3", **attributes):
    """A study of the three series, each in a folder of its own."""
    write_series(folder / "a", study=study, series=f"{study}.1", **T1, **attributes)
    write_series(folder / "b", study=study, series=f"{study}.2", **T2, **attributes)
    write_series(folder / "c", 20, "axial", study=study, series=f"{study}.3", **T2, **attributes)


def found(source, out):
    studies = utils.find_studies(source, out)
    utils.lay_out(studies, out)
    return studies


def used(study):
    return sorted((series.used, len(series.files)) for series in study.used)


ALL_THREE = [("Axial T2", 20), ("Sagittal T1", 9), ("Sagittal T2/STIR", 9)]

# ---- What a series shows ----

NAN = math.nan


@pytest.mark.parametrize(
    "plane, words, times, about, expected",
    [
        ("sagittal", "t2_tse_sag", (3500, 102, NAN), {}, "Sagittal T2/STIR"),
        ("sagittal", "", (550, 9, NAN), {}, "Sagittal T1"),
        ("axial", "", (4200, 110, NAN), {}, "Axial T2"),
        ("sagittal", "T1 FLAIR", (2100, 9, 860), {"sequence": {"SE", "IR"}}, "Sagittal T1"),
        ("sagittal", "", (4500, 35, 160), {"sequence": {"SE", "IR"}}, "Sagittal T2/STIR"),
        ("sagittal", "T2 SPAIR", (4000, 80, 100), {}, "Sagittal T2/STIR"),
        ("sagittal", "", (1500, 130, NAN), {}, "Sagittal T2/STIR"),  # 3D turbo spin echo
        # names alone, as anonymisers leave them, in several languages and by several vendors
        ("sagittal", "Sagittal T1", (NAN, NAN, NAN), {}, "Sagittal T1"),
        ("sagittal", "sT2W_TSE", (NAN, NAN, NAN), {}, "Sagittal T2/STIR"),
        ("sagittal", "TIRM sag", (NAN, NAN, NAN), {}, "Sagittal T2/STIR"),
        ("sagittal", "Ponderé T1 rachis lombaire", (NAN, NAN, NAN), {}, "Sagittal T1"),
        ("sagittal", "Т2 сагиттальная поясничный отдел", (NAN, NAN, NAN), {}, "Sagittal T2/STIR"),
        ("axial", "腰椎 T2 横断", (NAN, NAN, NAN), {}, "Axial T2"),
        ("axial", "LWS t2_tse_tra", (NAN, NAN, NAN), {}, "Axial T2"),
        ("axial", "AX T2 FRFSE L-SPINE", (3000, 95, NAN), {}, "Axial T2"),
        ("axial", "medic", (800, 22, NAN), {"sequence": {"GR"}}, "Axial T2"),
        # names lie where times are clear; times that say nothing clear leave it to the name
        ("sagittal", "t1_tse", (3500, 102, NAN), {}, "Sagittal T2/STIR"),
        ("sagittal", "t2_tse", (2500, 50, NAN), {}, "Sagittal T2/STIR"),
        # left out
        ("axial", "t1_tse_tra", (600, 11, NAN), {}, ""),
        ("coronal", "t2 cor", (3500, 100, NAN), {}, ""),
        ("sagittal", "PD", (2500, 30, NAN), {}, ""),
        ("sagittal", "localizer", (800, 90, NAN), {}, ""),
        ("sagittal", "Survey", (NAN, NAN, NAN), {}, ""),
        ("sagittal", "", (NAN, NAN, NAN), {}, ""),
        ("sagittal", "t2", (9000, 110, 2400), {}, ""),
        ("sagittal", "ep2d_diff_b800", (3000, 80, NAN), {"b_value": 800.0}, ""),
        ("sagittal", "HWS t2_tse_sag", (3500, 102, NAN), {}, ""),
        ("sagittal", "c-spine t2", (3500, 102, NAN), {}, ""),
        ("sagittal", "T2 dixon", (3500, 102, NAN), {"image_type": {"ORIGINAL", "PRIMARY", "F"}}, ""),
        ("sagittal", "t2", (3500, 102, NAN), {"image_type": {"DERIVED", "PROJECTION IMAGE"}}, ""),
        ("coronal", "myelo haste", (8000, 1000, NAN), {}, ""),
        ("sagittal", "brain t2", (3500, 102, NAN), {}, ""),
    ],
)
def test_headers_tell_what_a_series_shows(plane, words, times, about, expected):
    about = {name: frozenset(v) if isinstance(v, set) else v for name, v in about.items()}
    header = SeriesHeader(planes=(plane,), words=words, slices=15, **about)
    header = replace(header, tr_ms=times[0], te_ms=times[1], ti_ms=times[2])
    kind = kind_of_series(header)
    assert kind.description == expected
    assert expected or kind.reason  # what is left out says why


def test_a_body_part_of_the_last_patient_leaves_nothing_out():
    header = SeriesHeader(planes=("sagittal",), tr_ms=3500, te_ms=100, body_part="CSPINE", slices=15)
    assert kind_of_series(header).description == "Sagittal T2/STIR"
    assert kind_of_series(replace(header, words="CTL spine: whole lumbar thoracic")).description


# ---- Folders ----


def test_series_folders_and_one_flat_folder_of_shuffled_names_are_the_same(tmp_path):
    write_study(tmp_path / "nested" / "deep" / "er")
    paths = sorted((tmp_path / "nested").rglob("IM*"))
    order = np.random.default_rng(0).permutation(len(paths))
    (tmp_path / "flat").mkdir()
    for name, k in enumerate(order):
        (tmp_path / "flat" / f"{name:x}.weird").write_bytes(paths[k].read_bytes())
    (tmp_path / "flat" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    for name in ("nested", "flat"):
        (study,) = found(tmp_path / name, tmp_path / f"out_{name}")
        assert study.study_id == 1 and used(study) == ALL_THREE
    one, other = (
        sorted((tmp_path / f"out_{name}" / "data" / "test_images").rglob("*.dcm")) for name in ("nested", "flat")
    )
    assert [pydicom.dcmread(p).SOPInstanceUID for p in one] == [pydicom.dcmread(p).SOPInstanceUID for p in other]
    table = pd.read_csv(tmp_path / "out_flat" / "data" / "test_series_descriptions.csv")
    assert table["series_description"].tolist() == [d for d, _ in [ALL_THREE[1], ALL_THREE[2], ALL_THREE[0]]]


@pytest.mark.slow
def test_what_is_laid_out_is_read_as_the_competitions_files_are(tmp_path):
    tiny.write_study(tmp_path / "any" / "x")
    (study,) = found(tmp_path / "any", tmp_path / "out")
    (descriptions,) = utils.studies_to_predict(tmp_path / "out" / "data", "test").values()
    read = utils.read_study(tmp_path / "out" / "data" / "test_images" / str(study.study_id), descriptions)
    assert not read.problems and {v.description for v in read.volumes} == set(utils.DESCRIPTIONS)
    assert sum(len(v.array) for v in read.volumes) == 9 + 9 + 12


def test_several_studies_in_one_folder_are_told_apart(tmp_path):
    for number, study in enumerate(("1.2.3", "1.2.4", "1.2.5")):
        for path in sorted((tmp_path / study).rglob("*")):
            path.unlink()
        write_study(tmp_path / study, study, PatientID=str(number))
    for k, path in enumerate(sorted(p for p in tmp_path.rglob("IM*"))):
        (tmp_path / "flat").mkdir(exist_ok=True)
        path.rename(tmp_path / "flat" / f"{k}")
    studies = found(tmp_path / "flat", tmp_path / "out")
    assert [s.study_id for s in studies] == [1, 2, 3] and all(used(s) == ALL_THREE for s in studies)


def test_the_same_study_number_of_two_patients_is_two_studies(tmp_path):
    write_study(tmp_path / "a", PatientID="1")
    write_study(tmp_path / "b", PatientID="2")
    for path in (tmp_path / "b").rglob("IM*"):
        ds = pydicom.dcmread(path)
        ds.SOPInstanceUID = generate_uid()
        ds.save_as(path)
    assert [used(s) for s in found(tmp_path, tmp_path / "out")] == [ALL_THREE] * 2


def test_files_without_numbers_are_told_apart_by_folder_and_name(tmp_path):
    for patient in ("p1", "p2"):
        for name, plane, times in (("t1", "sagittal", T1), ("t2", "sagittal", T2), ("ax", "axial", T2)):
            write_series(
                tmp_path / patient / name,
                plane=plane,
                SeriesDescription=name,
                StudyInstanceUID=None,
                SeriesInstanceUID=None,
                SOPInstanceUID=None,
                SeriesNumber=None,
                PatientID=None,
                **times,
            )
    studies = found(tmp_path, tmp_path / "out")
    assert [used(s) for s in studies] == [[("Axial T2", 9), ("Sagittal T1", 9), ("Sagittal T2/STIR", 9)]] * 2


def test_the_competitions_folders_keep_their_numbers(tmp_path):
    for study_id in (4003253, 7143189):
        write_study(tmp_path / "train_images" / str(study_id), f"1.2.{study_id}")
    assert [s.study_id for s in found(tmp_path, tmp_path / "out")] == [4003253, 7143189]
    assert [s.study_id for s in found(tmp_path / "train_images" / "7143189", tmp_path / "one")] == [7143189]


def test_numbers_stay_when_a_study_is_added(tmp_path):
    write_study(tmp_path / "in" / "m", "1.2.3")
    (first,) = found(tmp_path / "in", tmp_path / "out")
    write_study(tmp_path / "in" / "a", "1.2.9")
    studies = {s.name: s.study_id for s in found(tmp_path / "in", tmp_path / "out")}
    assert studies == {"m": first.study_id, "a": 2}
    for path in (tmp_path / "in" / "m").rglob("IM*"):
        path.unlink()
    (left,) = found(tmp_path / "in", tmp_path / "out")
    assert left.study_id == 2
    assert [p.name for p in (tmp_path / "out" / "data" / "test_images").iterdir()] == ["2"]


def test_copies_count_once_and_circles_of_links_end(tmp_path, capsys):
    write_study(tmp_path / "in" / "x")
    for path in list((tmp_path / "in" / "x" / "a").iterdir()):
        path.with_name(f"copy of {path.name}").write_bytes(path.read_bytes())
    (tmp_path / "in" / "x" / "up").symlink_to(tmp_path / "in", target_is_directory=True)
    os.mkfifo(tmp_path / "in" / "pipe")
    (study,) = found(tmp_path / "in", tmp_path / "out")
    assert used(study) == ALL_THREE and "\n9 files left out: copies of others" in capsys.readouterr().out


def test_results_in_the_folder_are_not_searched(tmp_path):
    write_study(tmp_path)
    first = found(tmp_path, tmp_path / "out")
    assert [used(s) for s in found(tmp_path, tmp_path / "out")] == [used(s) for s in first]


def test_a_single_file_is_a_study(tmp_path):
    write(tmp_path / "x", a_slice(**T2))
    (study,) = found(tmp_path / "x", tmp_path / "out")
    assert used(study) == [("Sagittal T2/STIR", 1)] and "1 slices" in study.series[0].reason


# ---- Zips ----


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, str(file.relative_to(folder)))
    return path


def test_a_zip_is_a_folder(tmp_path):
    write_study(tmp_path / "in" / "x")
    path = zipped(tmp_path / "in", tmp_path / "z.bin")  # known by its content
    (study,) = found(path, tmp_path / "out")
    assert used(study) == ALL_THREE and study.name == "x"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "unpacked").rglob("*")}
    found(path, tmp_path / "out")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "unpacked").rglob("*")}


def test_zips_in_a_folder_are_studies(tmp_path):
    for study in ("1.2.3", "1.2.4"):
        write_study(tmp_path / study, study)
        (tmp_path / "in").mkdir(exist_ok=True)
        zipped(tmp_path / study, tmp_path / "in" / f"{study}.zip")
    assert [used(s) for s in found(tmp_path / "in", tmp_path / "out")] == [ALL_THREE] * 2


def test_names_in_a_zip_lead_nowhere(tmp_path):
    write(tmp_path / "x", a_slice(**T2))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("../../evil", (tmp_path / "x").read_bytes())
        archive.writestr("/etc/evil", (tmp_path / "x").read_bytes())
    found(tmp_path / "z.zip", tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("fault", ["cut", "encrypted", "wrong sum", "huge"])
def test_a_zip_that_cannot_be_unpacked_says_so(tmp_path, fault, monkeypatch):
    write(tmp_path / "in" / "x", a_slice(**T2))
    path = zipped(tmp_path / "in", tmp_path / "z.zip")
    content = bytearray(path.read_bytes())
    if fault == "cut":
        content = content[: len(content) // 2]
    elif fault == "encrypted":
        content[6] |= 1
        content[content.rindex(b"PK\1\2") + 8] |= 1
    elif fault == "wrong sum":
        content[100] ^= 255
    else:
        entry = content.rindex(b"PK\1\2")
        content[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)
        monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10**9}))
    path.write_bytes(content)
    told = {"encrypted": "is encrypted", "huge": "needs"}.get(fault, "cannot be unpacked")
    with pytest.raises(ValueError, match=f"z.zip {told}"):
        found(path, tmp_path / "out")


# ---- Choosing ----


def series_of(tmp_path, *items):
    """The used series of a study: list of (plane, count, attributes) -> dict series number -> used as."""
    for number, (plane, count, attributes) in enumerate(items, 1):
        write_series(tmp_path / "in" / str(number), count, plane, series=f"1.2.3.{number}", **attributes)
    (study,) = found(tmp_path / "in", tmp_path / "out")
    return {series.header.number: series.used for series in study.series}, study


def test_of_two_that_serve_the_better_one_is_used(tmp_path):
    used_as, study = series_of(
        tmp_path,
        ("sagittal", 9, T2 | {"SeriesDescription": "t2 fs", "ScanOptions": "FS"}),
        ("sagittal", 9, T2),
        ("sagittal", 9, T1 | {"ContrastBolusAgent": "Gd"}),
        ("sagittal", 9, T1),
        (
            "sagittal",
            9,
            {"RepetitionTime": 4000, "EchoTime": 40, "InversionTime": 150, "ScanningSequence": ["SE", "IR"]},
        ),
    )
    assert used_as == {1: "", 2: "Sagittal T2/STIR", 3: "", 4: "Sagittal T1", 5: ""}
    assert "series 2 serves better" in study.series[0].reason


def test_a_repeated_series_replaces_the_first(tmp_path):
    used_as, _ = series_of(tmp_path, ("sagittal", 9, T2), ("sagittal", 9, T2 | {"at_mm": 3.0}))
    assert used_as == {1: "", 2: "Sagittal T2/STIR"}


def test_stir_serves_where_there_is_no_t2(tmp_path):
    stir = {"RepetitionTime": 4000, "EchoTime": 40, "InversionTime": 150, "ScanningSequence": ["SE", "IR"]}
    assert series_of(tmp_path, ("sagittal", 9, stir), ("sagittal", 9, T1))[0] == {
        1: "Sagittal T2/STIR",
        2: "Sagittal T1",
    }


def test_the_lower_station_of_a_whole_spine_is_lumbar(tmp_path):
    assert series_of(tmp_path, ("sagittal", 9, T2), ("sagittal", 9, T2 | {"at_mm": 300.0}))[0] == {
        1: "Sagittal T2/STIR",
        2: "",
    }


def test_axial_series_of_different_discs_are_all_used(tmp_path):
    used_as, _ = series_of(
        tmp_path,
        ("axial", 4, T2),
        ("axial", 4, T2 | {"at_mm": 40.0}),
        ("axial", 4, T2 | {"at_mm": 1.0, "SeriesDescription": "fs"}),  # the first one's places
    )
    assert used_as == {1: "Axial T2", 2: "Axial T2", 3: ""}


def test_planes_and_echoes_of_one_series_are_split(tmp_path):
    for number in range(1, 10):
        write(tmp_path / "in" / f"s{number}", a_slice("sagittal", number, **T2))
        write(tmp_path / "in" / f"a{number}", a_slice("axial", 20 + number, **T2))
        write(tmp_path / "in" / f"p{number}", a_slice("sagittal", 40 + number, **(T2 | {"EchoTime": 20})))
    (study,) = found(tmp_path / "in", tmp_path / "out")
    assert used(study) == [("Axial T2", 9), ("Sagittal T2/STIR", 9)]
    assert "proton density" in " ".join(series.reason for series in study.series)


def test_a_series_in_three_planes_is_a_localiser(tmp_path):
    for plane in AXES:
        write_series(tmp_path / "in" / plane, 3, plane, series="1.2.3.1", **T2)
    write_series(tmp_path / "in" / "real", series="1.2.3.2", **T1)
    (study,) = found(tmp_path / "in", tmp_path / "out")
    assert [series.reason for series in study.series if not series.used] == ["a localiser"]


def test_enhanced_files_are_understood(tmp_path):
    ds = a_slice("sagittal", **dict.fromkeys(("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")))
    ds.SOPClassUID, ds.NumberOfFrames = "1.2.840.10008.5.1.4.1.1.4.1", 3
    ds.EchoPulseSequence, ds.InversionRecovery = "SPIN", "YES"
    shared, timing, echo, modifier = (Dataset() for _ in range(4))
    timing.RepetitionTime, echo.EffectiveEchoTime, modifier.InversionTimes = 4200.0, 42.0, [160.0]
    shared.MRTimingAndRelatedParametersSequence, shared.MREchoSequence = [timing], [echo]
    shared.MRModifierSequence = [modifier]
    orientation = Dataset()
    orientation.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    shared.PlaneOrientationSequence = [orientation]
    ds.SharedFunctionalGroupsSequence, frames = [shared], []
    for number in range(3):
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = [5.0 * number, 0, 0]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    write(tmp_path / "x.dcm", ds)
    header = read_header(tmp_path / "x.dcm")
    assert header.planes == ("sagittal",) * 3 and header.corners_lps_mm[:, 0].tolist() == [0, 5, 10]
    about = header.about
    assert (about.tr_ms, about.te_ms, about.ti_ms, about.sequence) == (4200, 42, 160, {"SE", "IR"})


# ---- What cannot serve ----


@pytest.mark.parametrize(
    "fill, match",
    [
        (lambda folder: None, "no MR image.*it is empty"),
        (lambda folder: (folder / "a.txt").write_text("text"), "no MR image.*no DICOM file"),
        (lambda folder: write(folder / "x", a_slice(Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")), "CT"),
        (lambda folder: write_series(folder, plane="coronal", **T2), "no series of these 1.*coronal"),
        (lambda folder: write_series(folder, ImagePositionPatient=None, **T2), "where it lies"),
    ],
)
def test_a_folder_without_anything_of_use_says_what_is_there(tmp_path, fill, match):
    (tmp_path / "in").mkdir()
    fill(tmp_path / "in")
    with pytest.raises(ValueError, match=re.compile(match, re.S)):
        found(tmp_path / "in", tmp_path / "out")


def test_a_folder_is_no_place_for_its_own_results(tmp_path):
    write_study(tmp_path)
    with pytest.raises(ValueError, match="is the folder of images itself"):
        utils.find_studies(tmp_path, tmp_path)


def test_numbers_of_the_case_are_struck_out_of_descriptions(tmp_path):
    words = "Sagittal T2 Erika 4711 AC998877"
    write_series(tmp_path / "4711", SeriesDescription=words, AccessionNumber="AC998877", **T2)
    (study,) = found(tmp_path, tmp_path / "out")
    assert utils.series_table([study])["description"].tolist() == ["Sagittal T2 … … …"]
    assert study.name == "4711"  # studies.csv stays at home


def test_levels_that_are_guessed_are_called_so():
    levels = utils.boxes_to_table(1, [replace(box, source=Source.AXIAL) for box in small_study.make_boxes()])
    study = FoundStudy(1, "", "", ())
    series = pd.DataFrame({"study_id": [1], "problem": ["study 1: no Sagittal T1 series"]})
    (row,) = utils.folder_log([study], levels, series).to_dict("records")
    assert row["problems"].startswith(
        "levels are guessed from where the axial slices lie: their numbering is not known |"
    )
    assert "| no Sagittal T1 series |" in row["problems"]


def test_a_path_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        utils.find_studies(tmp_path / "nothing", tmp_path / "out")


def test_damaged_files_cost_only_themselves(tmp_path):
    write_study(tmp_path / "in")
    whole = (tmp_path / "in" / "a" / "IM0001").read_bytes()
    (tmp_path / "in" / "a" / "cut").write_bytes(whole[:300])
    (tmp_path / "in" / "a" / "noise").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "in" / "a" / "marked").write_bytes(b"\0" * 128 + b"DICM" + np.random.default_rng(0).bytes(4000))
    (study,) = found(tmp_path / "in", tmp_path / "out")
    assert used(study) == ALL_THREE


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "keyword",
    ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ContrastBolusAgentSequence"],
)
def test_a_sequence_of_a_header_is_bounded(tmp_path, keyword, known):
    write(tmp_path / "good", a_slice(**{keyword: [Dataset()] * 9}))
    read_header(tmp_path / "good")
    count, element = 25_000, a_slice()
    items = b"\xfe\xff\x00\xe0" + bytes(4)
    tag = Tag(keyword)
    element._dict[tag] = RawDataElement(tag, "SQ", 8 * count, items * count, 0, False, True)
    write(tmp_path / "bad", element)
    data = (tmp_path / "bad").read_bytes()
    if not known:
        length = struct.pack("<I", 8 * count)
        at = data.index(items) - 4
        assert data[at : at + 4] == length
        end = at + 4 + 8 * count
        data = data[:at] + b"\xff" * 4 + data[at + 4 : end] + b"\xfe\xff\xdd\xe0" + bytes(4) + data[end:]
        (tmp_path / "bad").write_bytes(data)
    with pytest.raises(DicomProblem, match=f"{keyword} has more than 20000 items"):
        read_header(tmp_path / "bad")


# ---- From files to pages ----


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """The command's output folder for one small study in files without order, and another without a useful series."""
    root = tmp_path_factory.mktemp("own")
    tiny.write_study(root / "in" / "Mustermann Erika" / "dicom")
    for path in (root / "in").rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        ds.PatientName, ds.SeriesDescription = "Mustermann^Erika", f"{ds.SeriesDescription} MUSTERMANN"
        ds.save_as(path)
    write_series(root / "in" / "other", plane="coronal", study="1.9", series="1.9.1", **T2)
    assert main([str(root / "in"), "--out", str(root / "out")]) == 0
    return root / "out"


@pytest.mark.slow
def test_the_command_writes_levels_pages_and_markups(predicted):
    levels = pd.read_csv(predicted / "levels.csv")
    assert levels["level"].tolist() == list(utils.LEVELS) and set(levels["study_id"]) == {1}
    assert (predicted / "study_1.html").is_file() and "study_1.html" in (predicted / "index.html").read_text()
    assert not (predicted / "study_2.html").exists() and not (predicted / "probabilities.csv").exists()
    log = pd.read_csv(predicted / "inference_log.csv", keep_default_na=False).set_index("study_id")
    assert log.loc[1, "problems"] == "" and "no series of use: coronal" in log.loc[2, "problems"]
    assert len(list((predicted / "slicer" / "1").glob("*.mrk.json"))) == 6


@pytest.mark.slow
def test_nothing_names_the_patient(predicted):
    for path in predicted.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        assert "mustermann" not in path.name.lower()
        content = path.read_bytes().lower()
        assert b"mustermann" not in content and b"erika" not in content, path


@pytest.mark.slow
def test_a_second_run_finds_what_is_finished_and_inspect_opens_it(predicted, monkeypatch, capsys):
    def not_again(*_):
        raise AssertionError("done again")

    monkeypatch.setattr("lumbar.spine.locating._locate", not_again)
    monkeypatch.setattr("lumbar.data.preprocess.read_study", not_again)
    assert main([str(predicted.parent / "in"), "--out", str(predicted)]) == 0
    inspection = utils.open_folder(predicted, predicted.parent / "unused")
    assert list(inspection.paths) == [1] and len(inspection.levels) == 5
    assert "<svg" in inspection.study_html(1)[0] and not (predicted.parent / "unused").exists()


@pytest.mark.slow
def test_the_notebook_does_the_same_and_names_no_folder(predicted):
    given = predicted.parent / "in" / "Mustermann Erika"
    out = shutil.copytree(predicted, predicted.parent / "by notebook", symlinks=True)
    (out / "index.html").unlink()
    run_notebook(
        ROOT / "notebooks" / "predict.ipynb", predicted.parent / "run.ipynb", {"FOLDER": str(given), "OUT": str(out)}
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"]["studies"] == 1 and "FOLDER" not in manifest["parameters"]
    assert "mustermann" not in (out / "manifest.json").read_text().lower()
    assert "study_1.html" in (out / "index.html").read_text()


def test_a_command_that_cannot_serve_ends_with_a_sentence(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert "error:" in capsys.readouterr().err and not (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize("accepted", [False, True])
def test_predictions_that_rest_on_no_image_are_an_error_unless_asked_for(tmp_path, accepted, monkeypatch):
    ids = np.array([1, 2])
    submission = utils.to_submission(ids, np.ones((2, 5, 5, 3)))
    log = pd.DataFrame({"study_id": ids, "prior_rows": 25, "problems": ["", "no readable image"]})
    monkeypatch.setattr(predict_folder, "weight_folders", lambda weights: [])
    monkeypatch.setattr(predict_folder, "infer_studies", lambda *_, **__: (submission, log, {}, None))
    members = type("Members", (), {"weights": {"level": []}})()
    if accepted:
        predict_folder.grade_folder(tmp_path, members, [], prior_only=True)
    else:
        with pytest.raises(RuntimeError, match="no readable image.*PRIOR_ONLY"):
            predict_folder.grade_folder(tmp_path, members, [])
    assert pd.read_csv(tmp_path / "probabilities.csv")["prior"].all()  # nothing is lost either way


def test_one_graded_study_is_enough_and_kaggle_is_only_told(monkeypatch, capsys):
    log = pd.DataFrame({"study_id": [1, 2], "prior_rows": [25, 24], "problems": ""})
    utils.refuse_prior_only(log)
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    utils.refuse_prior_only(log.assign(prior_rows=25))
    assert "no image of these 2 studies" in capsys.readouterr().out


def test_markups_are_what_slicer_reads(tmp_path):
    boxes = small_study.make_boxes()
    tilted = np.array([[0, 0.6, 0.8], [1, 0, 0], [0, 0.8, -0.6]])
    boxes[3] = replace(boxes[3], axes=tilted, second="l3_l4", second_share=0.25)
    write_markups(boxes, tmp_path)
    read = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(read) == {"levels.mrk.json", *(f"box_{level}.mrk.json" for level in utils.LEVELS)}
    for content in read.values():
        (markup,) = content["markups"]
        assert "markups-schema-v1.0.3" in content["@schema"]
        assert markup["coordinateSystem"] == "LPS" and markup["coordinateUnits"] == "mm"
    points = read["levels.mrk.json"]["markups"][0]
    assert points["type"] == "Fiducial" and [p["label"] for p in points["controlPoints"]][0] == "L1/L2"
    roi = read["box_l4_l5.mrk.json"]["markups"][0]
    assert (
        roi["type"] == "ROI" and roi["roiType"] == "Box" and "or L3/L4 (25%)" in roi["controlPoints"][0]["description"]
    )
    # A corner by the schema: centre + orientation @ half the size, the orientation's columns being the axes.
    corner = np.array(roi["center"]) + np.array(roi["orientation"]).reshape(3, 3) @ (np.array(roi["size"]) / 2)
    assert np.abs(boxes[3].corners_lps() - corner).sum(1).min() < 1e-4


@pytest.mark.slow
def test_another_patients_study_gets_levels_of_its_own(tmp_path):
    """Into the same folder for results, one after the other, with files of the same names and sizes."""
    for name, seed in (("a", 3), ("b", 4)):
        tiny.write_study(tmp_path / name, seed=seed)
        assert main([str(tmp_path / name), "--out", str(tmp_path / "alone" / name)]) == 0
    for name in ("a", "b", "a"):
        assert main([str(tmp_path / name), "--out", str(tmp_path / "both")]) == 0
        both, alone = (pd.read_csv(out / "levels.csv") for out in (tmp_path / "both", tmp_path / "alone" / name))
        assert np.allclose(both[["x_mm", "y_mm", "z_mm"]], alone[["x_mm", "y_mm", "z_mm"]], atol=1e-6)
    # Numbers stay with their patients.
    assert pd.read_csv(tmp_path / "both" / "studies.csv")["study_id"].tolist() == [1, 2]
    (tmp_path / "both" / "studies.csv").write_text("folder,study_id\na,1\n")
    assert main([str(tmp_path / "a"), "--out", str(tmp_path / "both")]) == 2


@pytest.mark.slow
def test_names_that_are_no_utf8_are_read_and_written(tmp_path, capfd):
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    tiny.write_study(folder, seed=3)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xe9t\xe9.dcm")).write_bytes(b"hello")
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 0
    table = pd.DataFrame({"name": [os.fsdecode(b"M\xfcller")]})
    utils.write_csv(tmp_path / "a.csv", table)
    utils.write_text(tmp_path / "a.txt", table["name"][0])
    assert (tmp_path / "a.txt").read_text() == "M\\udcfcller" in (tmp_path / "a.csv").read_text()
