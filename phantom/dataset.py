"""Studies as DICOM files and tables, in the competition's layout: workers, resuming, truth.

Pixel coordinates in tables are (x = column, y = row) of a pixel's centre.

May use: anatomy, painting, scanner, hardship, severity, grid, lumbar.data,
lumbar.names, lumbar.storage.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lumbar.data.competition import to_submission
from lumbar.names import CONDITIONS, GRADES, LABEL_COLUMNS, LEVELS
from lumbar.storage import write_csv, write_text

from .anatomy import TRUTH_VERTEBRAE, VERTEBRAE, Anatomy, sample_anatomy
from .grid import TissueGrid
from .hardship import Hardship, disturb, moved_plans, scattered, slipped
from .painting import paint
from .scanner import SeriesPlan, acquire_study, sample_protocol
from .severity import perfect_submission, sample_severity, visible_severity

VERSION = 2  # goes up when the same seed gives other pixels
CORNERS = ("as", "ps", "pi", "ai")  # anterior-superior, posterior-superior, ...


def condition_title(condition: str) -> str:
    """'left_subarticular_stenosis' -> 'Left Subarticular Stenosis', as in the coordinates file."""
    return condition.replace("_", " ").title()


def level_title(level: str) -> str:
    """'l1_l2' -> 'L1/L2'."""
    return level.upper().replace("_", "/")


def _uid(*parts) -> str:
    """A deterministic UID under the 2.25 root."""
    return "2.25." + str(int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:15], "big"))


def _text(values):
    """Numbers as DICOM's decimal strings."""
    return [f"{x:.10g}"[:16] for x in values]


def _slice_header(plan: SeriesPlan, k: int, study_id: int, number: int, patient: str):
    """The data set of slice k of a series, without its pixels. number: of the series in the study."""
    from pydicom.dataset import Dataset
    from pydicom.uid import MRImageStorage

    t1 = plan.contrast == "T1"
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "SE"]
    ds.SOPClassUID = MRImageStorage
    ds.SOPInstanceUID = _uid(study_id, plan.series_id, int(plan.instances[k]))
    ds.StudyDate, ds.StudyTime = "20240101", "120000"
    ds.AccessionNumber = ""
    ds.Modality = "MR"
    ds.Manufacturer = "PHANTOM"
    ds.ReferringPhysicianName = ""
    ds.SeriesDescription = plan.description if plan.contrast != "STIR" else "Sagittal STIR"
    ds.PatientName, ds.PatientID = patient, patient.replace("^", "")
    ds.PatientBirthDate, ds.PatientSex = "", "O"
    ds.BodyPartExamined = "LSPINE"
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions = ("SE", "SK", "")
    ds.MRAcquisitionType = "2D"
    ds.SliceThickness = f"{plan.thickness_mm:g}"
    ds.RepetitionTime, ds.EchoTime = ("600", "12") if t1 else ("3500", "100")
    if plan.contrast == "STIR":
        ds.ScanningSequence = ["SE", "IR"]
        ds.InversionTime = "160"
    ds.EchoTrainLength = "3" if t1 else "16"
    ds.MagneticFieldStrength = "1.5"
    ds.SpacingBetweenSlices = f"{plan.gap_mm:.6g}"
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = _uid(study_id)
    ds.SeriesInstanceUID = _uid(study_id, plan.series_id)
    ds.StudyID = "1"
    ds.SeriesNumber, ds.InstanceNumber = str(number), str(int(plan.instances[k]))
    ds.ImagePositionPatient = _text(plan.position_mm[k])
    ds.ImageOrientationPatient = _text([*plan.row_cosine[k], *plan.column_cosine[k]])
    ds.FrameOfReferenceUID = _uid(study_id, "frame")
    ds.PositionReferenceIndicator = ""
    ds.PixelSpacing = _text(plan.spacing_mm)
    return ds


def write_series(
    folder: Path,
    plan: SeriesPlan,
    image: np.ndarray,
    *,
    study_id: int,
    number: int,
    patient: str,
    rng: np.random.Generator,
    compress: str = "none",
    anomalies: str = "real",
) -> None:
    """Write a series as MR Image Storage, explicit VR little endian, 16 bit; one file a slice,
    named after its instance number."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    folder.mkdir(parents=True, exist_ok=True)
    odd = anomalies == "real"
    signed = odd and rng.random() < 0.12
    bits = 16 if signed or rng.random() < 0.5 else 12
    slope = float(rng.choice([0.5, 2.0])) if odd and rng.random() < 0.08 else None
    scale = rng.uniform(500, 1400)
    stored = np.clip(np.round(image * scale / (slope or 1)), 0, 2**12 - 1)
    stored = stored.astype(np.int16 if signed else np.uint16)
    for k in range(len(stored)):
        ds = _slice_header(plan, k, study_id, number, patient)
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows, ds.Columns = plan.shape
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
        ds.PixelRepresentation = int(signed)
        top = float(stored[k].max()) * (slope or 1)
        ds.WindowCenter, ds.WindowWidth = f"{top * 0.4:.1f}", f"{top * 0.8 + 1:.1f}"
        if slope:
            ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", f"{slope:g}", "US"
        ds.PixelData = stored[k].tobytes()
        ds["PixelData"].VR = "OW"
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        if compress != "none":
            ds.compress(
                {"rle": pydicom.uid.RLELossless, "j2k": pydicom.uid.JPEG2000Lossless}[compress],
                generate_instance_uid=False,
            )
        ds.save_as(folder / f"{int(plan.instances[k])}.dcm", enforce_file_format=True)


def simulate(
    seed: int | Sequence[int],
    prevalence: float = 1.0,
    transitional: float = 0.03,
    anomalies: str = "real",
    severity: np.ndarray | None = None,
    variety: str = "standard",
) -> tuple[Anatomy, np.ndarray, np.ndarray, tuple[TissueGrid, TissueGrid], list[SeriesPlan], np.random.Generator]:
    """One study in memory: (anatomy, latent, grade, grids, plans, rng). severity (condition,
    level) in grade units replaces the sampled one; variety as in `sample_anatomy`."""
    rng = np.random.default_rng(seed)
    latent, grade = sample_severity(rng, 1, prevalence)
    latent, grade = latent[0], grade[0]
    visible = visible_severity(latent, prevalence) if severity is None else np.asarray(severity, float)
    anatomy = sample_anatomy(rng, visible, transitional, variety)
    grids = paint(anatomy)
    plans = sample_protocol(rng, anatomy, anomalies)
    return anatomy, latent, grade, grids, plans, rng


def _missing(rng, anomalies):
    """Which cells have no grade, no coordinates: two masks (condition, level)."""
    rate = np.full((5, 5), 0.0015)
    rate[3:, :2] = 0.055
    rate[3:, 2:] = 0.009
    no_grade = rng.random((5, 5)) < rate
    no_point = no_grade & (rng.random((5, 5)) < 0.94)
    no_point |= ~no_grade & (rng.random((5, 5)) < 0.003)
    if anomalies != "real":
        no_grade[:] = no_point[:] = False
    return no_grade, no_point


# By how many names lower readers number a spine, by its variant: counted from above, or so that the last full disc is
# L5/S1, whether the vertebra above it is the fourth lumbar one or the sixth.
READERS: dict[str, dict[str, int]] = {"from above": {}, "last disc": {"sacralised L5": 1, "lumbarised S1": -1}}
# Of a disc above or below the five that have disease.
_HEALTHY = {"latent": -2.5, "severity": 0.0, "grade": 0, "label": 0}


def renumbered(row: dict, step: int) -> dict:
    """A study's table rows with all names `step` lower: grades and points go with their discs. What moves out of the
    five levels is dropped; what moves in has no disease, and no points."""
    if step == 0:
        return row
    levels, titles = range(len(LEVELS)), [level_title(level) for level in LEVELS]

    def moved(cells, healthy):
        return [[cells[c][k - step] if k - step in levels else healthy for k in levels] for c in range(len(cells))]

    points = []
    for *start, title, x, y in row["points"]:
        if titles.index(title) + step in levels:
            points.append([*start, titles[titles.index(title) + step], x, y])
    vertebrae = []
    for name, *rest in row["vertebrae"]:
        number = VERTEBRAE.index(name) + step
        if 0 <= number < len(VERTEBRAE) and VERTEBRAE[number] in TRUTH_VERTEBRAE:
            vertebrae.append([VERTEBRAE[number], *rest])
    cells = {key: moved(row[key], value) for key, value in _HEALTHY.items() if key in row}
    return row | cells | {"points": points, "vertebrae": vertebrae}


def _make_study(job: dict) -> dict:
    """Worker: make one study and write its images; returns its table rows."""
    done = Path(job["out"]) / ".studies" / f"{job['study_id']}.json"
    if done.exists():
        try:
            return json.loads(done.read_text())
        except ValueError:  # cut, when the power failed
            done.unlink()
    anatomy, latent, grade, grids, plans, rng = simulate(
        job["seed"], job["prevalence"], job["transitional"], job["anomalies"], variety=job["variety"]
    )
    hardship, own_rng = Hardship(**job["hardship"]), np.random.default_rng((anatomy.seed, 16))
    # Where slices really lie, and so where readers see things; files say what was planned.
    seen = moved_plans(own_rng, plans, hardship.motion) if hardship.motion else plans
    stacks = acquire_study(rng, anatomy, grids, seen)
    if hardship.motion:
        stacks = [disturb(own_rng, stack, hardship.motion) for stack in stacks]
    base = Path(job["out"]) / f"{job['split']}_images" / str(job["study_id"])
    used = set()
    for number, (plan, stack) in enumerate(zip(plans, stacks), 1):
        while plan.series_id == 0 or plan.series_id in used:
            plan.series_id = int(rng.integers(1_000_000, 2**32))
        used.add(plan.series_id)
        write_series(
            base / str(plan.series_id),
            plan,
            stack,
            study_id=job["study_id"],
            number=number,
            patient=f"PHANTOM^{job['index']:04d}",
            rng=rng,
            compress=job["compress"],
            anomalies=job["anomalies"],
        )
    no_grade, no_point = _missing(rng, job["anomalies"])
    points = []
    for (c, level), where in sorted(anatomy.points_mm().items()):
        kind = "Sagittal T2/STIR" if c == 0 else "Sagittal T1" if c < 3 else "Axial T2"
        jitter = rng.normal(0, 1.0, 2)  # mm: readers click
        if no_point[c, level]:
            continue
        found = [(*s.project(where), p) for p, s in zip(plans, seen) if p.description == kind]
        found = [f for f in found if f[3] < 0.75 * f[4].gap_mm + 1]
        if not found:
            continue
        k, x, y, _, plan = min(found, key=lambda f: f[3])
        jitter, beside = scattered(own_rng, jitter, hardship.scatter_mm)
        points.append(
            [
                plan.series_id,
                int(plan.instances[min(max(k + beside, 0), len(plan.instances) - 1)]),
                c,
                level,
                x + jitter[0] / plan.spacing_mm[1],
                y + jitter[1] / plan.spacing_mm[0],
            ]
        )
    vertebrae = []
    for v in anatomy.vertebrae:
        if v.name in TRUTH_VERTEBRAE:
            vertebrae.append([v.name, *v.centre_mm, *v.corners_mm().ravel(), *v.frame[:, 2], v.width_mm / 2])
    grade = np.where(no_grade, -1, grade)
    label, points = slipped(own_rng, grade, points, hardship.slips) if hardship.slips else (grade, points)
    points = [[*p[:2], condition_title(CONDITIONS[p[2]]), level_title(LEVELS[p[3]]), *p[4:]] for p in points]
    row = dict(
        study_id=job["study_id"],
        split=job["split"],
        index=job["index"],
        series=[[p.series_id, p.description] for p in plans],
        latent=latent.tolist(),
        grade=grade.tolist(),
        label=label.tolist(),
        points=points,
        vertebrae=[[v[0], *map(float, v[1:])] for v in vertebrae],
        variant=anatomy.variant,
        severity=anatomy.severity.tolist(),
    )
    row = renumbered(row, READERS[job["readers"]].get(anatomy.variant, 0))
    write_text(done, json.dumps(row))
    return row


def _floor_of(out, settings):
    """The floor of the data set that `out` holds, finished with these settings; None where it is still to be made.

    Raises FileExistsError where the folder holds anything else."""
    marker = out / "phantom.json"
    if not marker.exists():
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} is not empty and was not made by the phantom: choose another folder")
        return None
    try:
        same = json.loads(marker.read_text()) == settings
    except ValueError:
        raise FileExistsError(f"{marker} is damaged: delete {out}, or choose another folder") from None
    if not same:
        raise FileExistsError(
            f"{out} holds another data set ({marker.read_text().strip()}); choose another folder or delete it"
        )
    try:
        return json.loads((out / "phantom_floor.json").read_text())
    except (FileNotFoundError, ValueError):  # not finished, or cut
        return None


def make_dataset(
    out: str | Path,
    train: int = 60,
    test: int = 12,
    seed: int = 0,
    workers: int = 2,
    prevalence: float = 1.0,
    transitional: float = 0.03,
    compress: str = "none",
    anomalies: str = "real",
    progress: bool = True,
    variety: str = "standard",
    readers: str = "from above",
    hardship: Hardship = Hardship(),
) -> dict:
    """Write a data set and return its floor (the perfect reader's scores).

    readers: how they number transitional spines, a key of READERS; hardship: patients who move, and readers who err
    in train.csv and its label points, not in the test studies' labels; phantom_severity.csv has the true grades.
    The same arguments give the same bytes for any number of workers. An interrupted run goes on
    where it stopped; a folder that holds another data set is refused."""
    out = Path(out)
    if readers not in READERS:
        raise ValueError(f"readers is {readers!r}: one of {', '.join(READERS)}")
    settings = dict(
        version=VERSION,
        train=train,
        test=test,
        seed=seed,
        prevalence=prevalence,
        transitional=transitional,
        compress=compress,
        anomalies=anomalies,
    )
    if variety != "standard":  # the standard's marker stays as it was
        settings["variety"] = variety
    if readers != "from above":
        settings["readers"] = readers
    settings |= hardship.settings
    floor = _floor_of(out, settings)
    if floor is not None:
        return floor
    (out / ".studies").mkdir(parents=True, exist_ok=True)
    write_text(out / "phantom.json", json.dumps(settings) + "\n")

    ids = np.random.default_rng([seed, 77]).choice(4_290_000_000, train + test, replace=False) + 1_000_000
    seeds = np.random.SeedSequence(seed).spawn(train + test)
    jobs = [
        dict(
            out=str(out),
            study_id=int(ids[i]),
            split="train" if i < train else "test",
            index=i + 1,
            seed=seeds[i],
            prevalence=prevalence,
            transitional=transitional,
            compress=compress,
            anomalies=anomalies,
            variety=variety,
            readers=readers,
            hardship=hardship.settings,
        )
        for i in range(train + test)
    ]
    rows = list(_run(jobs, workers, progress))
    floor = _write_tables(out, rows, prevalence)
    for file in (out / ".studies").iterdir():
        file.unlink()
    (out / ".studies").rmdir()
    return floor


def _run(jobs, workers, progress):
    from tqdm import tqdm

    bar = tqdm(total=len(jobs), desc="phantom", unit="study", disable=not progress)
    if workers <= 1:
        for job in jobs:
            yield _make_study(job)
            bar.update()
    else:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for row in pool.imap(_make_study, jobs):
                yield row
                bar.update()
    bar.close()


def _write_tables(out: Path, rows: list, prevalence: float) -> dict:
    """All CSV files; phantom_floor.json last."""
    from lumbar.data.metric import competition_score

    def labels(rows, given="label"):
        named = {r["study_id"]: np.ravel(r.get(given, r["grade"])) for r in rows}
        values = [[i, *[GRADES[g] if g >= 0 else np.nan for g in own]] for i, own in named.items()]
        return pd.DataFrame(values, columns=["study_id", *LABEL_COLUMNS]).sort_values("study_id")

    def series(rows):
        values = [[r["study_id"], *s] for r in rows for s in r["series"]]
        return pd.DataFrame(values, columns=["study_id", "series_id", "series_description"])

    by = {k: sorted([r for r in rows if r["split"] == k], key=lambda r: r["study_id"]) for k in ("train", "test")}
    write_csv(out / "train.csv", labels(by["train"]))
    write_csv(out / "phantom_test_labels.csv", labels(by["test"], "grade"))
    for k in by:
        write_csv(out / f"{k}_series_descriptions.csv", series(by[k]))
    columns = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
    points = [[r["study_id"], *p] for r in by["train"] for p in r["points"]]
    write_csv(out / "train_label_coordinates.csv", pd.DataFrame(points, columns=columns))
    test_ids = [r["study_id"] for r in by["test"]]
    uniform = np.full((len(test_ids), 5, 5, 3), 1 / 3)
    write_csv(out / "sample_submission.csv", to_submission(test_ids, uniform))
    columns = [
        "study_id",
        "split",
        "vertebra",
        "x_mm",
        "y_mm",
        "z_mm",
        *[f"{c}_{k}_mm" for c in CORNERS for k in "xyz"],
        "normal_x",
        "normal_y",
        "normal_z",
        "half_width_mm",
        "variant",
    ]
    vertebrae = [[r["study_id"], k, *v, r["variant"]] for k in by for r in by[k] for v in r["vertebrae"]]
    write_csv(out / "phantom_vertebrae.csv", pd.DataFrame(vertebrae, columns=columns).round(4))
    cells = [
        [r["study_id"], k, CONDITIONS[c], LEVELS[v], r["latent"][c][v], r["severity"][c][v], r["grade"][c][v]]
        for k in by
        for r in by[k]
        for c in range(5)
        for v in range(5)
    ]
    columns = ["study_id", "split", "condition", "level", "latent", "severity", "grade"]
    write_csv(out / "phantom_severity.csv", pd.DataFrame(cells, columns=columns).round(6))
    floor = {}
    for k in by:
        if by[k]:
            floor[k] = competition_score(labels(by[k], "grade"), perfect_submission(out, k))["total"]
    write_text(out / "phantom_floor.json", json.dumps(floor) + "\n")
    return floor
