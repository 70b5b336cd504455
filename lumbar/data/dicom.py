"""DICOM files to slices, and a study's folder to a Study.

One file may hold one slice (MR Image Storage) or many (Enhanced MR Image Storage, also Legacy Converted: multi-frame
with functional groups). Files are known by their content, whatever their names.

May use: pixels, stacks, volume, storage, limits, names.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..limits import check_limit
from ..names import DESCRIPTIONS
from ..storage import kind_of_file
from .pixels import MAX_PIXELS, DicomProblem, padding_mask, plain_reason, stored_pixels
from .stacks import KINDS_OF_IMAGE, Contrast, stack_slices, values_of
from .volume import Study

if TYPE_CHECKING:
    from pydicom import Dataset

# All that is read of a file, with what pydicom's decoders need.
_TAGS = (
    "SOPClassUID InstanceNumber ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness "
    "SpacingBetweenSlices RescaleSlope RescaleIntercept SharedFunctionalGroupsSequence "
    "PerFrameFunctionalGroupsSequence NumberOfFrames Rows Columns SamplesPerPixel PlanarConfiguration "
    "PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue "
    "PixelPaddingRangeLimit FloatPixelPaddingValue FloatPixelPaddingRangeLimit DoubleFloatPixelPaddingValue "
    "DoubleFloatPixelPaddingRangeLimit PixelData FloatPixelData DoubleFloatPixelData ExtendedOffsetTable "
    "ExtendedOffsetTableLengths ImageType EchoTime EchoNumbers InversionTime DiffusionBValue SequenceName "
    "AcquisitionNumber TemporalPositionIdentifier TriggerTime StudyInstanceUID SeriesInstanceUID"
).split()


@cache
def _tags():
    from pydicom.tag import Tag

    return [Tag(keyword) for keyword in _TAGS]


# What no scan of a spine exceeds. Headers of damaged files can claim any size: cap before allocating.
MAX_FILE_BYTES = 1 << 28
MAX_INFLATED_BYTES = 1 << 28  # of a deflated file
MAX_READS = 100_000  # of one file: pydicom reads each element's header by itself
MAX_ITEMS = 20_000  # of one sequence, with those inside it; of functional groups a series of 500 frames has some 5,000
MIN_PIXEL_MM = 0.01
MAX_VIEW_MM = 1000.0  # of one slice, along its rows or columns: composed images of a whole spine reach some 900
MAX_AWAY_MM = 1e5  # of a position from the scanner's origin
MAX_STEP_MM = 500.0
# One series gives at most this many slices, pixels and square millimetres (the networks see millimetres): where there
# is more, every second slice is read, or every fourth, ... The largest real series reach about two thirds of any.
MAX_SLICES = 512
MAX_AREA_MM2 = 46e6  # 512 slices of 30 x 30 cm
MAX_STUDY_PIXELS = 1 << 26  # a study that has more leaves out its further series: float32 until it is normalised
MAX_SENTENCES = 20  # about one series
FEW_SLICES = 4  # fewer than this in a series are worth a sentence

# Files that operating systems and archives leave beside images, and the catalogue of a DICOM medium.
_STRAY = re.compile(r"\..*|__MACOSX|Thumbs\.db|desktop\.ini|DICOMDIR|.*\.(txt|json|csv|xml|html?|pdf|md|part)", re.I)


# Macro of the functional groups (PS3.3 C.7.6.16.2) that holds an attribute of a frame in a multi-frame file.
_MACROS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "DiffusionBValue": "MRDiffusionSequence",
    "InversionTimes": "MRModifierSequence",
    "FrameType": "MRImageFrameTypeSequence",
    "ComplexImageComponent": "MRImageFrameTypeSequence",
    "FrameAcquisitionNumber": "FrameContentSequence",
    "TemporalPositionIndex": "FrameContentSequence",
}


class _Frame:
    """The attributes of one frame of a multi-frame file, by keyword as a Dataset's: its own functional group's, else
    the shared one's, else the file's."""

    def __init__(self, dataset: Dataset, own: Dataset, shared: Dataset) -> None:
        self.dataset, self.groups = dataset, (own, shared)

    def holder(self, keyword: str) -> Dataset:
        """The Dataset that has this attribute for the frame."""
        for group in self.groups:
            macro = group.get(_MACROS[keyword]) if keyword in _MACROS else None
            if macro and keyword in macro[0]:
                return macro[0]
        return self.dataset


_BINARY = ("FD", "FL", "SL", "SS", "UL", "US", "SV", "UV", "OB", "OW", "OD", "OF", "OL", "OV", "AT", "SQ", "UN")


def _value(attributes, keyword):
    """The value of a Dataset or _Frame, None if there is none.

    Text comes as text, split at its backslashes whatever VR a writer stated for it: pydicom's own conversion of a
    study's decimal strings costs as much as all the rest of reading.
    """
    from pydicom.datadict import dictionary_VR

    dataset = attributes.holder(keyword) if isinstance(attributes, _Frame) else attributes
    try:
        element = dataset.get_item(keyword)
    except KeyError:
        return None
    if element is None:
        return None
    if isinstance(element, tuple) and isinstance(element.value, bytes):  # not parsed yet
        vr = element.VR
        if vr in (None, "UN"):
            known = dictionary_VR(element.tag)
            vr = known if known in ("DS", "IS", "CS", "SH", "LO", "UI") else vr
        if vr not in (None, *_BINARY):
            return _split(element.value.decode("ascii", "replace"))
    value = dataset.get(keyword)
    return _split(value) if isinstance(value, str) else value


def _split(text):
    parts = text.strip(" \0").split("\\")
    return parts if len(parts) > 1 else parts[0]


def _numbers(attributes, keyword, count):
    value = _value(attributes, keyword)
    try:
        values = np.array([_as_float(v) for v in ([value] if isinstance(value, str) else value)])
    except (TypeError, ValueError):
        values = np.array([])
    if values.shape != (count,) or not np.isfinite(values).all():
        raise DicomProblem(f"{keyword} is {'missing' if value in (None, '') else 'not usable'}")
    return values


def _number(attributes, keyword, default):
    """One optional number. Raises DicomProblem where it is there and cannot be used: a wrong scale is no default."""
    value = _value(attributes, keyword)
    if value is None or value == "":
        return default
    try:
        number = _as_float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DicomProblem(f"{keyword} is not usable")
    return number


def _as_float(value):
    """float, also of a number with a decimal comma, which some writers' language settings let through."""
    return float(value.replace(",", ".") if isinstance(value, str) and value.count(",") == 1 else value)


def _length_mm(attributes, keyword, doubts):
    """An optional length that only helps: 0 where it is absent or, which is added to `doubts`, no length in a body.
    Some writers give it a sign."""
    try:
        length = abs(_number(attributes, keyword, 0.0))
    except DicomProblem:
        length = math.inf
    if length > MAX_STEP_MM:
        doubts.append(f"{keyword} is no length in a body and was ignored")
    return length if length <= MAX_STEP_MM else 0.0


def _whole(attributes, *keywords):
    """The first of these attributes that holds a whole number, -1 without any."""
    for keyword in keywords:
        value = _value(attributes, keyword)
        value = value[0] if isinstance(value, list) and value else value
        try:
            return int(float(value))
        except (TypeError, ValueError, OverflowError):
            continue
    return -1


# What some writers put behind a number: of echo and other times, and of b-values.
_UNIT = re.compile(r"\s*(ms|msec|s/mm\^?2)\s*$", re.I)


def _measured(attributes, *keywords):
    """The first of these attributes that holds a number, with its unit or without, NaN without any."""
    for keyword in keywords:
        value = _value(attributes, keyword)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        try:
            number = _as_float(_UNIT.sub("", value) if isinstance(value, str) else value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            return number
    return math.nan


def _place(attributes):
    """All but the pixels of one slice from a Dataset or _Frame -> dict, see read_slices."""
    return _look(attributes) | {"position_lps": _position(attributes)}


# What differs from file to file of a series, and has no say in what _look and _uids return.
_OF_ONE_FILE = (
    "InstanceNumber ImagePositionPatient PixelPaddingValue PixelPaddingRangeLimit FloatPixelPaddingValue "
    "FloatPixelPaddingRangeLimit DoubleFloatPixelPaddingValue DoubleFloatPixelPaddingRangeLimit PixelData "
    "FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths"
).split()


@cache
def _tags_of_one_file():
    from pydicom.tag import Tag

    return {Tag(keyword) for keyword in _OF_ONE_FILE}


def _place_like(dataset, known):
    """_place and _uids of a data set of one frame, taken from the last file's where all that they depend on has the
    same bytes.

    known: dict that holds what was found in the last file of the series, and is brought up to date.
    """
    own = _tags_of_one_file()
    elements = tuple((tag, element.VR, element.value) for tag, element in dataset.items() if tag not in own)
    key = (dataset.original_encoding, elements)
    try:
        shared = known.get(key)
    except TypeError:  # a value that was parsed already, such as a sequence
        return _place(dataset) | _uids(dataset)
    if shared is None:
        known.clear()  # elements of a damaged file may be large: one is held
        shared = known[key] = _look(dataset) | _uids(dataset)
    return shared | {"position_lps": _position(dataset)}


def _uids(dataset):
    return {f"{what}_uid": str(_value(dataset, f"{what.title()}InstanceUID") or "") for what in ("study", "series")}


def _position(attributes):
    position = _numbers(attributes, "ImagePositionPatient", 3)
    if np.abs(position).max() > MAX_AWAY_MM:
        raise DicomProblem("ImagePositionPatient is not in the scanner")
    return position


def _look(attributes):
    """Orientation, sizes, scale and contrast of one slice from a Dataset or _Frame -> dict, see read_slices."""
    orientation = _numbers(attributes, "ImageOrientationPatient", 6)
    row, column = orientation[:3], orientation[3:]
    lengths = math.hypot(*row), math.hypot(*column)
    if not (0.9 < lengths[0] < 1.1 and 0.9 < lengths[1] < 1.1 and abs(row @ column) < 0.01):
        raise DicomProblem("ImageOrientationPatient is not two perpendicular unit vectors")
    spacing = _numbers(attributes, "PixelSpacing", 2)
    if (spacing <= 0).any():
        raise DicomProblem("PixelSpacing is not positive")
    if (spacing < MIN_PIXEL_MM).any():
        raise DicomProblem("PixelSpacing is not a pixel of a body")
    doubts = []
    thickness_mm = _length_mm(attributes, "SliceThickness", doubts) or 4.0
    # Some writers put the gap between slices here, others the distance of their middles: slices do not overlap.
    step_mm = max(_length_mm(attributes, "SpacingBetweenSlices", doubts), thickness_mm)
    slope, intercept = _number(attributes, "RescaleSlope", 1.0), _number(attributes, "RescaleIntercept", 0.0)
    # Beyond these the values, or what they are divided by, leave float32.
    if not (slope == 0 or 1e-12 < abs(slope) < 1e12) or abs(intercept) > 1e12:
        raise DicomProblem("RescaleSlope or RescaleIntercept is not usable")
    kind = [_value(attributes, keyword) for keyword in ("ImageType", "FrameType", "ComplexImageComponent")]
    words = {
        str(word).strip().upper() for value in kind for word in ([value] if isinstance(value, str) else value or [])
    }
    return {
        "row_lps": row / lengths[0],
        "column_lps": column / lengths[1],
        "spacing_mm": spacing,
        "thickness_mm": thickness_mm,
        "step_mm": step_mm,
        "slope": slope,
        "intercept": intercept,
        "doubts": doubts,
        "contrast": Contrast(
            _measured(attributes, "EffectiveEchoTime", "EchoTime"),
            _whole(attributes, "EchoNumbers"),
            _measured(attributes, "DiffusionBValue"),
            _measured(attributes, "InversionTimes", "InversionTime"),
            frozenset(words & KINDS_OF_IMAGE),
        ),
        "passes": (
            _whole(attributes, "FrameAcquisitionNumber", "AcquisitionNumber"),
            _whole(attributes, "TemporalPositionIndex", "TemporalPositionIdentifier"),
            _measured(attributes, "TriggerTime"),
            str(_value(attributes, "SequenceName")),
        ),
    }


class _Counted:
    """A file that pydicom may read from so many times, and no more bytes than are there to be inflated.

    pydicom reads each element's header by itself: what it builds in memory is bounded by the number of reads.
    """

    def __init__(self, file):
        self.file, self.left, self.name = file, MAX_READS, getattr(file, "name", "")
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise DicomProblem(f"more than {MAX_READS} elements: no file of slices has as many")
        if size is None or size < 0:  # only the rest of a deflated file is asked for so
            raise _Deflated
        return self.file.read(size)


class _Deflated(Exception):
    """The rest of the file is deflated."""


def _read_dataset(path, tags=None):
    """pydicom's data set of a file, read in bounded time and memory. Raises DicomProblem, and what pydicom raises.

    tags: those that are wanted; None: all that read_slices needs.
    """
    import pydicom

    with open(path, "rb") as file:
        head = file.read(1024)
        if not _is_dicom(head):
            raise NotDicom(f"no readable DICOM file ({_what_it_is(head)})")
        content = head + file.read()
    source = io.BytesIO(content)
    # An element takes eight bytes at least: only a large file, or one that is inflated, can have too many.
    if len(content) > 8 * MAX_READS or pydicom.uid.DeflatedExplicitVRLittleEndian.encode() in content:
        source = _Counted(source)
    try:
        # `force` only lets files without the preamble through: _is_dicom looked at the others.
        dataset = pydicom.dcmread(source, specific_tags=tags or _tags(), force=True)
    except _Deflated:
        dataset = _read_deflated(path, source.file, tags)
    if not dataset.file_meta.get("TransferSyntaxUID"):
        little, implicit = dataset.original_encoding[1], dataset.original_encoding[0]
        uid = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else uid
    return dataset


def _read_deflated(path, file, tags=None):
    """The data set of a deflated file (PS3.5 A.5), of which `file` stands behind the meta information."""
    from pydicom.dataset import FileDataset
    from pydicom.filereader import read_dataset, read_file_meta_info

    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflate.decompress(file.read(), MAX_INFLATED_BYTES)
    if inflate.unconsumed_tail:
        raise DicomProblem(f"inflates to more than {MAX_INFLATED_BYTES >> 20} MB: too large for a file of slices")
    source = _Counted(io.BytesIO(data))
    found = read_dataset(source, is_implicit_VR=False, is_little_endian=True, specific_tags=tags or _tags())
    meta = read_file_meta_info(path)
    return FileDataset(None, found, file_meta=meta, is_implicit_VR=False, is_little_endian=True)


class NotDicom(DicomProblem):
    """A file of another kind."""


def _is_dicom(head):
    """True if a file that begins so is DICOM: behind a preamble, or a data set without one."""
    if head[128:132] == b"DICM":
        return True
    # Groups 2 and 8 come first; what follows is a VR, or in implicit VR a length that the file can have.
    vr, length = head[4:6], int.from_bytes(head[4:8], "little")
    return (
        len(head) > 132
        and head[:2] in (b"\x02\0", b"\x08\0")
        and head[3:4] == b"\0"
        and ((vr.isalpha() and vr.isupper()) or length < 1024)
    )


def _what_it_is(head):
    if not head:
        return "it is empty"
    kind = kind_of_file(head)
    return f"it is {kind}" if kind else "neither the mark DICM nor a data set's first element is where it should be"


def _check_items(dataset):
    """Raise DicomProblem where a sequence has too many items, before pydicom makes an object of each."""
    from pydicom.datadict import dictionary_VR, keyword_for_tag

    for element in dataset.values():
        value, count = element.value, 0
        if not isinstance(value, bytes):  # of unknown length, which is read at once
            count = len(value) if element.VR == "SQ" else 0
        elif element.VR == "SQ" or (element.VR in (None, "UN") and dictionary_VR(element.tag) == "SQ"):
            count = value.count(b"\xfe\xff\x00\xe0") + value.count(b"\xff\xfe\xe0\x00")
        if count > MAX_ITEMS:
            raise DicomProblem(f"{keyword_for_tag(element.tag)} has more than {MAX_ITEMS} items")


def read_dataset(path: str | Path, tags: list | None = None) -> Dataset:
    """pydicom's data set of a file, in bounded time and memory: the elements with these tags (None: those that
    read_slices needs).

    Raises DicomProblem with the reason when the file is unusable, NotDicom when it is of another kind.
    """
    try:
        about = os.stat(path)
        # Opening a FIFO would block.
        if not stat.S_ISREG(about.st_mode):
            raise NotDicom("not a regular file")
        if about.st_size > MAX_FILE_BYTES:
            raise DicomProblem(f"{about.st_size >> 20} MB: too large for a file of slices")
        dataset = _read_dataset(path, tags)
        _check_items(dataset)
        return dataset
    except DicomProblem:
        raise
    except RecursionError:
        raise DicomProblem("no readable DICOM file (its sequences are nested too deep)") from None
    except Exception as error:
        raise DicomProblem(f"no readable DICOM file ({type(error).__name__}: {plain_reason(error)})") from None


def read_slices(path: str | Path, known: dict | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """One MR file -> list with a dict a slice, and a list of sentences about frames that had to be left out.

    MONOCHROME1 (C.7.6.3.1.2: the smallest value is white) is turned over within the range that the stored bits can
    hold, the same for every slice, so that bright is large. Frames of Enhanced MR (C.8.13, and Legacy Converted) take
    what a dict has from their functional groups (C.7.6.16); frames without them have no known place. The sections are
    those of DICOM PS3.3.

    Parameters
    ----------
    path : str or Path
    known : dict, optional
        Shared by the calls for the files of one series: headers that say the same are understood once.

    Returns
    -------
    slices : list of dict
        pixels (h, w): as stored; values are pixels * slope + intercept (C.11.1.1.2).
        slope, intercept: float.
        padding (h, w) bool, or None: pixels that the file says are none (C.7.5.1.1.2).
        position_lps (3,): of the first pixel's centre, in millimetres.
        row_lps (3,): unit vector in which the column index grows (C.7.6.2.1.1).
        column_lps (3,): unit vector in which the row index grows.
        spacing_mm (2,): between rows, between columns.
        thickness_mm, step_mm: of the slice, and from slice to slice as the header says it.
        instance_number: of a file with one frame its name, as the competition's tables have it, and InstanceNumber
        where that is no number; with several frames the frame's number from 1.
        contrast: Contrast.
        passes: what tells one pass over the slices from another: acquisition, temporal position, trigger time, name of
        the sequence.
        study_uid, series_uid: str.
        doubts: list of sentences.
    problems : list of str
        `frame {number}: {reason}`.

    Raises
    ------
    DicomProblem
        The whole file is unusable; the message says why.
    NotDicom
        It is of another kind.
    """
    dataset = read_dataset(path)
    own = dataset.get("PerFrameFunctionalGroupsSequence")
    frames = int(_number(dataset, "NumberOfFrames", 1)) or 1
    if not own and frames > 1:
        raise DicomProblem(f"{frames} frames without functional groups: where they lie is not known")
    if not own:
        places = [_place_like(dataset, {} if known is None else known)]
    elif len(own) != frames:
        raise DicomProblem(f"{frames} frames, but functional groups for {len(own)}")
    else:
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
        places = []
        for group in own:
            try:
                places.append(_place(_Frame(dataset, group, shared)) | _uids(dataset))
            except DicomProblem as problem:
                places.append(str(problem))
    stored, doubts = stored_pixels(dataset, frames)
    sides_mm = [place["spacing_mm"] * stored.shape[-2:] for place in places if not isinstance(place, str)]
    if sides_mm and np.max(sides_mm) > MAX_VIEW_MM:
        raise DicomProblem(f"PixelSpacing makes the image {np.max(sides_mm):.0f} mm wide or high, larger than a body")
    padding = padding_mask(dataset, stored)
    # Float pixel data may hold anything, padding more so; NaN fails the comparison.
    if stored.dtype.kind == "f" and not (np.abs(stored[... if padding is None else ~padding]) < 1e20).all():
        raise DicomProblem("pixels are not finite")
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1" and stored.dtype.kind in "ui":
        bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
        wide = stored.astype(np.int32 if stored.dtype.itemsize < 4 else np.int64)
        stored = np.subtract((1 << bits) - 1 - (signed << bits), wide, dtype=wide.dtype)
    stem = Path(path).stem
    number = int(stem) if stem.isdecimal() and len(stem) < 19 else max(0, _whole(dataset, "InstanceNumber"))
    number = number if abs(number) < 1 << 62 else 0
    slices, problems = [], []
    for frame, (place, pixels) in enumerate(zip(places, stored, strict=True)):
        if isinstance(place, str):
            problems.append(f"frame {frame + 1}: {place}")
            continue
        own_padding = None if padding is None or not padding[frame].any() else padding[frame]
        where = {
            "pixels": pixels,
            "padding": own_padding,
            "instance_number": frame + 1 if frames > 1 else number,
        }
        slices.append(where | place | {"doubts": place["doubts"] + doubts})
    return slices, problems


def read_slice(path: str | Path) -> dict[str, Any]:
    """The slice of a single-frame MR file.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    dict
        As read_slices has it, but its pixels are values, (h, w) float32, NaN where the file has padding.

    Raises
    ------
    DicomProblem
        The file is unusable or has several frames; the message says why.
    """
    slices, problems = read_slices(path)
    if len(slices) > 1:
        raise DicomProblem("several frames in one file: read_slices reads them")
    if not slices:
        raise DicomProblem(problems[0])
    return slices[0] | {"pixels": values_of(slices)[0], "slope": 1.0, "intercept": 0.0}


def _series_files(folder, name, problems):
    """A series' files in the order of their numbers, without what operating systems leave beside images."""
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        problems.append(f"{name}: folder cannot be read ({error})")
        return []
    return sorted(paths, key=lambda path: (len(path.stem), path.stem, path.name))


def _read_series(folder, name, problems):
    """The slices of a series' folder, as read_slices has them; sentences about the rest are added to `problems`.

    Slices are counted in the order of the files' numbers. Where they exceed MAX_SLICES, MAX_PIXELS or MAX_AREA_MM2
    those already read are thinned to every second one and so are those to come, as often as it takes: however large the
    series, no more than this is held.
    """
    files = _series_files(folder, name, problems)
    slices, taken, count, frames, every, strays, doubts, known = [], 0.0, 0, 0, 1, [], Counter(), {}
    for path in files:
        check_limit()
        if count % every:
            count += 1
            continue
        found, lost = [], []
        try:
            found, lost = read_slices(path, known)
            problems += [f"{name}: {path.name}: {problem}" for problem in lost]
        except NotDicom as problem:
            if _STRAY.fullmatch(path.name):
                strays.append(path.name)
                continue
            problems.append(f"{name}: {path.name}: {problem}")
        except DicomProblem as problem:
            problems.append(f"{name}: {path.name}: {problem}")
        except Exception as error:  # whatever else a damaged file can do, it costs one slice
            problems.append(f"{name}: {path.name}: {type(error).__name__}: {plain_reason(error)}")
        several = len(found) + len(lost) > 1
        for place, item in enumerate(found):
            item["count"] = count + place
            item["instance_number"] += frames if several else 0
        frames += len(found) + len(lost) if several else 0
        count += max(1, len(found) + len(lost))
        found = [item for item in found if item["count"] % every == 0]
        doubts.update({doubt: 1 for item in found[:1] for doubt in item["doubts"]})
        slices, taken = slices + found, taken + sum(map(_share, found))
        while taken > 1 + 1e-9:
            every *= 2
            slices = [item for item in slices if item["count"] % every == 0]
            taken = sum(map(_share, slices))
    problems += [f"{name}: {number} files: {doubt}" for doubt, number in doubts.items()]
    if strays:
        problems.append(f"{name}: {len(strays)} files that are no images were passed over ({strays[0]}, ...)")
    if every > 1:
        problems.insert(0, f"{name}: of {count} slices every {every}th was read, they are too many")
    if not slices:
        problems.insert(0, f"{name}: no readable slice")
    return slices


def _share(item):
    """How much of what one series may have a slice takes, 0 to 1."""
    pixels, (rows_mm, columns_mm) = item["pixels"].size, item["spacing_mm"].tolist()
    return max(1 / MAX_SLICES, pixels / MAX_PIXELS, pixels * rows_mm * columns_mm / MAX_AREA_MM2)


def read_study(folder: str | Path, descriptions: Mapping[int, str]) -> Study:
    """Read the series of a study.

    Never raises because of what is in the folder: a study without a single readable file has no volumes. Memory is
    bounded whatever is there, see MAX_SLICES and the other limits.

    Parameters
    ----------
    folder : str or Path
        {split}_images/<study_id>.
    descriptions : mapping of int to str
        series_id to description, as the descriptions table has them.

    Returns
    -------
    Study
        Its volumes have float32 arrays (slice, row, column) of values, NaN where the files have padding; a sentence in
        `.problems` for everything that could not be read.
    """
    folder = Path(folder)
    study_id = int(folder.name)
    study, uids = Study(study_id, []), {}
    for series_id, description in descriptions.items():
        name = f"study {study_id}, series {series_id}"
        if description not in DESCRIPTIONS:
            study.problems.append(f"{name}: unknown series description {description!r}")
        elif sum(volume.array.size for volume in study.volumes) >= MAX_STUDY_PIXELS:
            study.problems.append(f"{name}: not read, the study's other series are as large as memory allows")
        else:
            problems: list[str] = []
            slices: list[dict] = []
            try:
                slices = _read_series(folder / str(series_id), name, problems)
                study.volumes += stack_slices(slices, study_id, series_id, description, problems)
            except Exception as error:  # whatever else a damaged series can do, it costs that series
                problems.append(f"{name}: {type(error).__name__}: {error}")
            uids[series_id] = Counter(item["study_uid"] for item in slices).most_common(1)[0][0] if slices else ""
            count = sum(len(volume.array) for volume in study.volumes if volume.series_id == series_id)
            if 0 < count < FEW_SLICES:
                problems.append(f"{name}: {count} slices are all there is")
            if len(problems) > MAX_SENTENCES:
                problems[MAX_SENTENCES:] = [f"{name}: and {len(problems) - MAX_SENTENCES} more problems"]
            study.problems += problems
    try:
        there = {path.name for path in folder.iterdir() if path.is_dir() and not _STRAY.fullmatch(path.name)}
    except OSError:
        there = set()
    for name in sorted(there - {str(series_id) for series_id in descriptions}):
        study.problems.append(f"study {study_id}, series {name}: not in the descriptions table, not used")
    most, agree = Counter(uid for uid in uids.values() if uid).most_common(1)[0] if any(uids.values()) else ("", 0)
    for series, uid in uids.items():
        if uid and uid != most and agree > 1:
            study.problems.append(f"study {study_id}, series {series}: is of another examination than the others")
    for description in DESCRIPTIONS:
        if not study.of(description):
            study.problems.append(f"study {study_id}: no {description} series")
    return study
