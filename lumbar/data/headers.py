"""What one DICOM file says of itself without its pixels: whose it is, which series it belongs to, what that shows.

May use: dicom, series_kind, stacks, pixels.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .dicom import read_dataset
from .pixels import DicomProblem
from .series_kind import SeriesHeader, plane_of
from .stacks import KINDS_OF_IMAGE

_KEYWORDS = (
    "SOPClassUID SOPInstanceUID Modality StudyInstanceUID SeriesInstanceUID SeriesNumber InstanceNumber "
    "PatientID OtherPatientIDs AccessionNumber PatientName OtherPatientNames PatientBirthName ReferringPhysicianName "
    "SeriesDescription ProtocolName "
    "SequenceName PulseSequenceName BodyPartExamined "
    "RepetitionTime EchoTime InversionTime FlipAngle ScanningSequence ScanOptions ImageType ContrastBolusAgent "
    "DiffusionBValue NumberOfFrames ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness "
    "Rows Columns EchoPulseSequence InversionRecovery SpectrallySelectedSuppression ContrastBolusAgentSequence "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
).split()
# Who must not appear in anything that is written.
_NAMES = "PatientName OtherPatientNames PatientBirthName ReferringPhysicianName".split()
_NUMBERS = "PatientID OtherPatientIDs AccessionNumber".split()

# Storage classes (PS3.4 B.5) of MR slices; files that state none are judged by what else they say.
_MR_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.4",  # MR
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.3",  # Enhanced MR Color
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
)


@dataclass(frozen=True)
class FileHeader:
    """One file.

    uid: of the image, "" where it has none; study, series: whose files belong together; patient, case: words that name
    a person, and that number the person or the case, in small letters; planes, corners_lps_mm: of its frames, the
    latter (n, 3); kinds: of KINDS_OF_IMAGE.
    """

    path: Path
    uid: str
    study: tuple[str, ...]
    series: str
    instance: int
    patient: frozenset[str]
    case: frozenset[str]
    planes: tuple[str, ...]
    corners_lps_mm: np.ndarray
    kinds: frozenset[str]
    about: SeriesHeader


@cache
def _tags() -> list:
    from pydicom.tag import Tag

    return [Tag(keyword) for keyword in _KEYWORDS]


def read_header(path: str | Path) -> FileHeader:
    """The header of one file.

    Raises NotDicom for a file of another kind, DicomProblem for a damaged one and for DICOM files that hold no MR
    slices, with the reason.
    """
    dataset = read_dataset(path, _tags())
    try:
        return _header(Path(path), dataset)
    except DicomProblem:
        raise
    except Exception as error:  # pydicom converts values when they are asked for
        raise DicomProblem(f"its header cannot be read ({type(error).__name__})") from None


def _header(path: Path, dataset: Any) -> FileHeader:
    sop_class, modality = _text(dataset, "SOPClassUID"), _text(dataset, "Modality").upper()
    if modality not in ("MR", "") or (sop_class and sop_class not in _MR_CLASSES):
        name = dataset["SOPClassUID"].repval if sop_class and modality in ("MR", "") else f"modality {modality}"
        raise DicomProblem(f"no MR slices ({name.removesuffix(' Storage')})")
    if not (_positive(dataset, "Rows") > 0 and _positive(dataset, "Columns") > 0):
        raise DicomProblem("no image in it, or cut off before it")
    places = list(_places(dataset))
    planes = tuple(plane_of(row, column) for row, column, _ in places)
    kinds = frozenset(word for word in _words(dataset, "ImageType", "FrameType") if word)
    about = SeriesHeader(
        modality=modality or "MR",
        words=" ".join(
            filter(None, (_text(dataset, k) for k in ("SeriesDescription", "ProtocolName", "PulseSequenceName")))
        ),
        body_part=_text(dataset, "BodyPartExamined"),
        tr_ms=_positive(dataset, "RepetitionTime"),
        te_ms=_positive(dataset, "EffectiveEchoTime", "EchoTime"),
        ti_ms=_positive(dataset, "InversionTimes", "InversionTime"),
        flip_deg=_positive(dataset, "FlipAngle"),
        b_value=_positive(dataset, "DiffusionBValue"),
        sequence=_sequence(dataset),
        options=_options(dataset),
        image_type=kinds,
        contrast_agent=bool(_text(dataset, "ContrastBolusAgent")) or bool(dataset.get("ContrastBolusAgentSequence")),
        number=_whole(dataset, "SeriesNumber"),
        spacing_mm=_positive(dataset, "PixelSpacing"),
        thickness_mm=_positive(dataset, "SliceThickness"),
    )
    uid = _text(dataset, "SeriesInstanceUID")
    return FileHeader(
        path=path,
        uid=_text(dataset, "SOPInstanceUID"),
        study=(_text(dataset, "StudyInstanceUID"), _text(dataset, "PatientID")),
        # Without a UID the number and the name of a series are what its files have in common.
        series=uid or f"{about.number} {about.words}",
        instance=_whole(dataset, "InstanceNumber"),
        patient=_private(dataset, _NAMES),
        case=_private(dataset, _NUMBERS),
        planes=planes,
        corners_lps_mm=np.array([position for _, _, position in places]).reshape(-1, 3),
        kinds=kinds & KINDS_OF_IMAGE - {"LOCALIZER", "M"},
        about=about,
    )


def merge_headers(files: Sequence[FileHeader]) -> SeriesHeader:
    """One SeriesHeader of several files of a series: the numbers that most of them state, the words that any does."""
    first, planes = files[0].about, Counter(plane for file in files for plane in file.planes)

    def usual(name: str) -> float:
        stated = Counter(v for file in files if not math.isnan(v := getattr(file.about, name)))
        return stated.most_common(1)[0][0] if stated else math.nan

    b_values = [file.about.b_value for file in files if file.about.b_value > 0]
    return replace(
        first,
        tr_ms=usual("tr_ms"),
        te_ms=usual("te_ms"),
        ti_ms=usual("ti_ms"),
        flip_deg=usual("flip_deg"),
        spacing_mm=usual("spacing_mm"),
        thickness_mm=usual("thickness_mm"),
        b_value=max(b_values, default=math.nan),
        planes=tuple(plane for plane, _ in planes.most_common()),
        words=" ".join(dict.fromkeys(file.about.words for file in files if file.about.words))[:1000],
        contrast_agent=any(file.about.contrast_agent for file in files),
        slices=sum(planes.values()),
        corners_lps_mm=np.concatenate([file.corners_lps_mm for file in files]),
    )


# ---- Attributes, of a file with one frame or many ----


def _groups(dataset: Any) -> Iterator[Any]:
    """The data set, and the macros of its shared and of its first frame's functional groups (PS3.3 C.7.6.16)."""
    yield dataset
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(dataset.get(keyword) or [])[:1]:
            for element in group:
                if element.VR == "SQ" and element.value:
                    yield element.value[0]


def _value(dataset: Any, keyword: str) -> Any:
    """The first value of that name that is there, None without any."""
    for group in _groups(dataset):
        value = group.get(keyword)
        if value is not None and str(value) != "":
            return value
    return None


def _text(dataset: Any, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else " ".join(str(value).replace("\0", " ").split())[:200]


def _positive(dataset: Any, *keywords: str) -> float:
    """The first of these attributes that holds a positive number, NaN without any; of several numbers the largest."""
    for keyword in keywords:
        value = _value(dataset, keyword)
        items = [value] if isinstance(value, (str, float, int)) or value is None else list(value)
        numbers = []
        for item in items:
            try:
                numbers.append(float(str(item).replace(",", ".")))
            except ValueError:
                continue
        good = [number for number in numbers if math.isfinite(number) and number > 0]
        if good:
            return max(good)
    return math.nan


def _whole(dataset: Any, keyword: str) -> int:
    number = _positive(dataset, keyword)
    return int(number) if number < 1e9 else 0


def _words(dataset: Any, *keywords: str) -> list[str]:
    found = []
    for keyword in keywords:
        value = _value(dataset, keyword)
        items = [] if value is None else [value] if isinstance(value, str) else list(value)
        found += [str(item).strip().upper() for item in items]
    return found


def _sequence(dataset: Any) -> frozenset[str]:
    """Words of ScanningSequence (C.8.3.1.1.1), also where an enhanced file says the same by other attributes."""
    words = {part for word in _words(dataset, "ScanningSequence") for part in word.split("\\")}
    pulse = str(_value(dataset, "EchoPulseSequence") or "").upper()
    words |= {"SPIN": {"SE"}, "GRADIENT": {"GR"}, "BOTH": {"SE", "GR"}}.get(pulse, set())
    if str(_value(dataset, "InversionRecovery") or "").upper() == "YES":
        words.add("IR")
    return frozenset(words)


def _options(dataset: Any) -> frozenset[str]:
    words = {part for word in _words(dataset, "ScanOptions") for part in word.split("\\")}
    suppressed = str(_value(dataset, "SpectrallySelectedSuppression") or "").upper()
    return frozenset(words | ({"FS"} if suppressed in ("FAT", "FAT AND WATER") else set()))


def _places(dataset: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(row, column, position) of each frame whose place in the patient is stated, each (3,) LPS."""
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    for frame in list(dataset.get("PerFrameFunctionalGroupsSequence") or []) or [dataset]:
        found = [_of_frame(keyword, frame, *shared, dataset) for keyword in ("Orientation", "Position")]
        orientation, position = (np.array(value if value is not None else [], float) for value in found)
        if orientation.shape == (6,) and position.shape == (3,) and np.isfinite([*orientation, *position]).all():
            if np.linalg.norm(np.cross(orientation[:3], orientation[3:])) > 0.5:
                yield orientation[:3], orientation[3:], position


def _of_frame(what: str, *groups: Any) -> Any:
    for group in groups:
        macro = group.get(f"Plane{what}Sequence")
        value = group.get(f"Image{what}Patient") or (macro[0].get(f"Image{what}Patient") if macro else None)
        if value is not None:
            return value
    return None


def _private(dataset: Any, keywords: Sequence[str]) -> frozenset[str]:
    """Words of three letters or more in these attributes, in small letters."""
    found: set[str] = set()
    for keyword in keywords:
        value = dataset.get(keyword)
        text = " ".join(str(part) for part in (value if isinstance(value, (list, tuple)) else [value]) if part)
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        found |= {word for word in words if len(word) >= 3}
    return frozenset(found)
