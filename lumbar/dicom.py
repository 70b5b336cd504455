"""DICOM series to volumes: files -> slices -> Volume(array, affine to LPS mm) -> Study.

One file may hold one slice (MR Image Storage) or many (Enhanced MR Image Storage, also Legacy Converted: multi-frame
with functional groups). pydicom decodes what is compressed; which further package a transfer syntax needs is said where
it is missing (see DECODERS).
"""

import math
import os
import stat
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .names import DESCRIPTIONS
from .volume import Study, Volume


class DicomProblem(ValueError):
    """A file that cannot become a slice; the message names the reason."""


# Transfer syntax -> (what pip installs for it, the module that this brings), where pydicom alone is not enough.
_LIBJPEG = ("pylibjpeg pylibjpeg-libjpeg", "libjpeg")
_OPENJPEG = ("pylibjpeg pylibjpeg-openjpeg", "openjpeg")
_CHARLS = ("pyjpegls", "jpeg_ls")
DECODERS = {
    "1.2.840.10008.1.2.4.50": _LIBJPEG,  # JPEG baseline
    "1.2.840.10008.1.2.4.51": _LIBJPEG,  # JPEG extended (12 bit)
    "1.2.840.10008.1.2.4.57": _LIBJPEG,  # JPEG lossless
    "1.2.840.10008.1.2.4.70": _LIBJPEG,  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": _CHARLS,  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81": _CHARLS,  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.90": _OPENJPEG,  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": _OPENJPEG,  # JPEG 2000
    "1.2.840.10008.1.2.4.201": _OPENJPEG,  # High-throughput JPEG 2000
    "1.2.840.10008.1.2.4.202": _OPENJPEG,
    "1.2.840.10008.1.2.4.203": _OPENJPEG,
}

# All that is read of a file, with what pydicom's decoders need.
_TAGS = (
    "SOPClassUID InstanceNumber ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness "
    "SpacingBetweenSlices RescaleSlope RescaleIntercept SharedFunctionalGroupsSequence "
    "PerFrameFunctionalGroupsSequence NumberOfFrames Rows Columns SamplesPerPixel PlanarConfiguration "
    "PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation PixelData FloatPixelData "
    "DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths"
).split()


@cache
def _tags():
    from pydicom.tag import Tag

    return [Tag(keyword) for keyword in _TAGS]


# What no scan of a spine exceeds. Damaged files state anything, and what they state decides how much memory is taken.
MAX_FILE_BYTES = 1 << 29
MAX_SIDE_PX = 4096
MIN_PIXEL_MM = 0.01
MAX_VIEW_MM = 2000.0  # of one slice, along its rows or columns
MAX_AWAY_MM = 1e5  # of a position from the scanner's origin
MAX_STEP_MM = 500.0
# One series gives at most this many slices, pixels and square millimetres (the networks see millimetres): where there
# is more, every second slice is read, or every fourth, ... The largest real series reach about a third of any.
MAX_SLICES = 512
MAX_PIXELS = 1 << 27
MAX_AREA_MM2 = 46e6  # 512 slices of 30 x 30 cm
MAX_STACKS = 64  # volumes of a series: the longest stay
MAX_STUDY_PIXELS = 1 << 28  # a study that has more leaves out its further series
MAX_SENTENCES = 20  # about one series
FEW_SLICES = 4  # fewer than this in a series are worth a sentence


# Macro of the functional groups (PS3.3 C.7.6.16.2) that holds an attribute of a frame in a multi-frame file.
_MACROS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}


class _Frame:
    """The attributes of one frame of a multi-frame file, by keyword as a Dataset's: its own functional group's, else
    the shared one's, else the file's."""

    def __init__(self, dataset, own, shared):
        self.dataset, self.groups = dataset, (own, shared)

    def holder(self, keyword):
        """The Dataset that has this attribute for the frame."""
        for group in self.groups:
            macro = group.get(_MACROS[keyword])
            if macro and keyword in macro[0]:
                return macro[0]
        return self.dataset


def _value(attributes, keyword):
    """The value of a Dataset or _Frame, None if there is none. Decimal strings come as text: pydicom's own conversion
    of a study's costs as much as all the rest of reading."""
    dataset = attributes.holder(keyword) if isinstance(attributes, _Frame) else attributes
    try:
        element = dataset.get_item(keyword)
    except KeyError:
        return None
    if isinstance(element, tuple) and element.VR in ("DS", "IS") and isinstance(element.value, bytes):  # not parsed yet
        parts = element.value.decode("ascii", "replace").strip(" \0").split("\\")
        return parts if len(parts) > 1 else parts[0]
    return dataset.get(keyword)


def _numbers(dataset, keyword, count):
    value = _value(dataset, keyword)
    try:
        values = np.array([float(v) for v in ([value] if isinstance(value, str) else value)])
    except (TypeError, ValueError):
        values = np.array([])
    if values.shape != (count,) or not np.isfinite(values).all():
        raise DicomProblem(f"{keyword} is {'missing' if value in (None, '') else 'not usable'}")
    return values


def _number(dataset, keyword, default):
    """One optional number. Raises DicomProblem where it is there and cannot be used: a wrong scale is no default."""
    value = _value(dataset, keyword)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DicomProblem(f"{keyword} is not usable")
    return number


def _place(attributes):
    """The geometry and scale of one slice from a Dataset or _Frame -> dict, see read_slices."""
    orientation = _numbers(attributes, "ImageOrientationPatient", 6)
    row, column = orientation[:3], orientation[3:]
    lengths = math.hypot(*row), math.hypot(*column)
    if not (0.9 < lengths[0] < 1.1 and 0.9 < lengths[1] < 1.1 and abs(row @ column) < 0.05):
        raise DicomProblem("ImageOrientationPatient is not two perpendicular unit vectors")
    spacing = _numbers(attributes, "PixelSpacing", 2)
    if (spacing <= 0).any():
        raise DicomProblem("PixelSpacing is not positive")
    if (spacing < MIN_PIXEL_MM).any():
        raise DicomProblem("PixelSpacing is not a pixel of a body")
    position = _numbers(attributes, "ImagePositionPatient", 3)
    if np.abs(position).max() > MAX_AWAY_MM:
        raise DicomProblem("ImagePositionPatient is not in the scanner")
    # Some writers give the spacing a sign, for the direction in which they count.
    thickness_mm = abs(_number(attributes, "SliceThickness", 0.0)) or 4.0
    step_mm = abs(_number(attributes, "SpacingBetweenSlices", 0.0)) or thickness_mm
    if max(thickness_mm, step_mm) > MAX_STEP_MM:
        raise DicomProblem("SliceThickness or SpacingBetweenSlices is no length in a body")
    slope, intercept = _number(attributes, "RescaleSlope", 1.0), _number(attributes, "RescaleIntercept", 0.0)
    # Beyond these the values, or what they are divided by, leave float32.
    if not (slope == 0 or 1e-12 < abs(slope) < 1e12) or abs(intercept) > 1e12:
        raise DicomProblem("RescaleSlope or RescaleIntercept is not usable")
    return {
        "position_lps": position,
        "row_lps": row / lengths[0],
        "column_lps": column / lengths[1],
        "spacing_mm": spacing,
        "thickness_mm": thickness_mm,
        "step_mm": step_mm,
        "slope": slope,
        "intercept": intercept,
    }


def _stored_pixels(dataset):
    """Pixels as stored, (rows, columns) or (frames, rows, columns). Raises DicomProblem with the reason.

    Uncompressed little-endian pixels are a view of the file's bytes; all else is pydicom's to decode.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    bits, frames = dataset.get("BitsAllocated"), int(_number(dataset, "NumberOfFrames", 1))
    shape = (frames, dataset.get("Rows"), dataset.get("Columns"))
    if any(isinstance(side, int) and side > MAX_SIDE_PX for side in shape[1:]) or (
        all(isinstance(side, int) for side in shape[1:]) and math.prod(shape) > MAX_PIXELS
    ):
        raise DicomProblem(f"states {' x '.join(map(str, shape))} pixels (frames, rows, columns): too many")
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise DicomProblem(f"pixels have {dataset.get('SamplesPerPixel')} samples each: a colour picture")
    if syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1") and bits in (8, 16) and all(shape):
        data = dataset.get_item("PixelData")
        data = None if data is None else data.value
        size = math.prod(shape) * bits // 8
        # One byte more is the padding to an even length. Anything else is unusual enough for pydicom's own checks.
        if isinstance(data, bytes) and size <= len(data) <= size + 1 and dataset.get("PixelRepresentation") in (0, 1):
            kind = f"<{'ui'[dataset.PixelRepresentation]}{bits // 8}"
            pixels = np.frombuffer(data, kind, math.prod(shape)).reshape(shape)
            return pixels[0] if frames == 1 else pixels
    try:
        return dataset.pixel_array
    except Exception as error:  # pydicom raises many kinds, also from inside its decoders
        reason = _missing_decoder(syntax) or f"({' '.join(str(error).split())})"
        raise DicomProblem(f"pixels cannot be decoded: {reason}") from None


def _missing_decoder(syntax):
    """What to install for pixels that could not be decoded; None if that is not the reason."""
    from pydicom.pixels import get_decoder

    name = getattr(syntax, "name", syntax)
    try:
        available = get_decoder(syntax).is_available
    except Exception:  # no transfer syntax, or one without any decoder: pydicom's own words say so
        return None
    # Pillow, where it is there, decodes 8-bit baseline JPEG and most JPEG 2000, and may have failed.
    package, module = DECODERS.get(syntax, ("", ""))
    if module and find_spec(module) is None:
        return f"{name} needs {'another decoder' if available else 'a decoder'}: pip install {package}"
    return None


def read_slices(path):
    """One MR file -> list with a dict a slice, and a list of sentences about frames that had to be left out.

    A dict has: pixels (h, w) as stored, slope, intercept (values are pixels * slope + intercept, C.11.1.1.2),
    position_lps (3,), row_lps (3,), column_lps (3,), spacing_mm (2,) (between rows, between columns), thickness_mm,
    step_mm, instance_number (of a file with one frame its name, as the competition's tables have it; with several the
    frame's number from 1).

    row_lps is the direction in which the column index grows, column_lps that in which the row index grows
    (DICOM PS3.3 C.7.6.2.1.1). MONOCHROME1 (C.7.6.3.1.2: the smallest value is white)
    is turned over within the range that the stored bits can hold, the same for every slice, so that bright is large.
    Frames of Enhanced MR (C.8.13, and Legacy Converted) take all this from their functional groups (C.7.6.16); frames
    without them have no known place. Raises DicomProblem with the reason when the whole file is unusable.
    """
    import pydicom

    try:
        about = os.stat(path)
        # To open a pipe would wait for somebody to write into it.
        if not stat.S_ISREG(about.st_mode):
            raise DicomProblem("not a regular file")
        if about.st_size > MAX_FILE_BYTES:
            raise DicomProblem(f"{about.st_size >> 20} MB: too large for a file of slices")
        dataset = pydicom.dcmread(path, specific_tags=_tags())
    except DicomProblem:
        raise
    except Exception as error:
        raise DicomProblem(f"no readable DICOM file ({type(error).__name__}: {error})") from None
    own = dataset.get("PerFrameFunctionalGroupsSequence")
    frames = int(_number(dataset, "NumberOfFrames", 1))
    if not own and frames > 1:
        raise DicomProblem(f"{frames} frames without functional groups: where they lie is not known")
    if not own:
        places = [_place(dataset)]
    elif len(own) != frames:
        raise DicomProblem(f"{frames} frames, but functional groups for {len(own)}")
    else:
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
        places = []
        for group in own:
            try:
                places.append(_place(_Frame(dataset, group, shared)))
            except DicomProblem as problem:
                places.append(str(problem))
    stored = _stored_pixels(dataset)
    if stored.ndim != 2 + (frames > 1) or stored.size == 0:
        raise DicomProblem(f"pixels have the shape {stored.shape}, not (rows, columns)")
    stored = stored.reshape(frames, *stored.shape[-2:])
    sides_mm = [place["spacing_mm"] * stored.shape[-2:] for place in places if not isinstance(place, str)]
    if sides_mm and np.max(sides_mm) > MAX_VIEW_MM:
        raise DicomProblem("PixelSpacing makes the image larger than a body")
    # Float pixel data may hold anything; no value but NaN fails both comparisons.
    if stored.dtype.kind == "f" and not (-1e20 < stored.min() and stored.max() < 1e20):
        raise DicomProblem("pixels are not finite")
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
        stored = ((1 << bits) - 1 - (signed << bits)) - stored.astype(np.int64)
    stem = Path(path).stem
    number = int(stem) if stem.isdecimal() and len(stem) < 19 else int(_number(dataset, "InstanceNumber", 0))
    number = number if abs(number) < 1 << 62 else 0
    slices, problems = [], []
    for frame, (place, pixels) in enumerate(zip(places, stored, strict=True), 1):
        if isinstance(place, str):
            problems.append(f"frame {frame}: {place}")
            continue
        slices.append({"pixels": pixels, "instance_number": frame if frames > 1 else number, **place})
    return slices, problems


def read_slice(path):
    """The slice of a single-frame MR file: a dict as read_slices has it, but its pixels are values, (h, w) float32.

    Raises DicomProblem with the reason.
    """
    slices, problems = read_slices(path)
    if len(slices) + len(problems) > 1:
        raise DicomProblem("several frames in one file: read_slices reads them")
    if problems:
        raise DicomProblem(problems[0])
    return slices[0] | {"pixels": _values(slices)[0], "slope": 1.0, "intercept": 0.0}


def _values(slices):
    """(n, h, w) float32 of slices of one size, rescaled straight into place."""
    values = np.empty((len(slices), *slices[0]["pixels"].shape), np.float32)
    for value, item in zip(values, slices, strict=True):
        value[:] = item["pixels"]
        if item["slope"] != 1:
            value *= np.float32(item["slope"])
        if item["intercept"]:
            value += np.float32(item["intercept"])
    return values


def _parallel_stacks(slices):
    """Slices of one series -> lists that each lie one behind the other, ordered along their normal.

    Same orientation (within half a degree), matrix and pixel spacing; and from one slice to the next no step sideways
    of more than half a slice step and a millimetre: two discs with the same tilt have two stacks beside each other.
    """
    groups = []
    for item in slices:
        axes = np.concatenate([item["row_lps"], item["column_lps"]])
        key = (item["pixels"].shape, tuple(np.round(item["spacing_mm"], 3)))
        for group in groups:
            if group["key"] == key and np.abs(group["axes"] - axes).max() < 0.009:
                group["slices"].append(item)
                break
        else:
            groups.append({"key": key, "axes": axes, "slices": [item]})
    stacks = []
    for group in groups:
        row, column = group["axes"][:3], group["axes"][3:]
        normal = np.cross(row, column)
        own = []
        for item in sorted(group["slices"], key=lambda s: (float(s["position_lps"] @ normal), s["instance_number"])):
            last = np.array([stack[-1]["position_lps"] for stack in own]).reshape(-1, 3)
            aside = np.hypot(*((item["position_lps"] - last) @ np.stack([row, column], 1)).T)
            if len(aside) and aside.min() <= 1.0 + 0.5 * item["step_mm"]:
                own[int(np.argmin(aside))].append(item)
            else:
                own.append([item])
        stacks += own
    return stacks


def stack_slices(slices, study_id, series_id, description, problems):
    """Slices of one series -> list of Volumes; what is left out or doubtful is said in `problems`.

    See _parallel_stacks for what belongs together. A stack is cut where a step exceeds 1.75 times the usual one: each
    piece is one volume.
    """
    name = f"study {study_id}, series {series_id}"
    volumes = []
    for stack in _parallel_stacks(slices):
        row, column = stack[0]["row_lps"], stack[0]["column_lps"]
        normal = np.cross(row, column)
        unique = []
        for item in stack:
            if unique and (item["position_lps"] - unique[-1]["position_lps"]) @ normal < 0.01:
                problems.append(
                    f"{name}: file {item['instance_number']} lies at the same place as "
                    f"{unique[-1]['instance_number']} and was left out"
                )
            else:
                unique.append(item)
        position = np.array([item["position_lps"] for item in unique])
        steps = np.diff(position @ normal)
        usual = np.median(steps) if len(steps) else unique[0]["step_mm"]
        cuts = np.flatnonzero(steps > 1.75 * usual) + 1
        for piece in np.split(np.arange(len(unique)), cuts):
            first, last = unique[piece[0]], unique[piece[-1]]
            affine = np.eye(4)
            if len(piece) > 1:
                affine[:3, 0] = (last["position_lps"] - first["position_lps"]) / (len(piece) - 1)
                regular = first["position_lps"] + np.arange(len(piece))[:, None] * affine[:3, 0]
                error = np.linalg.norm(position[piece] - regular, axis=1).max()
                if error > 0.25 * usual:
                    problems.append(f"{name}: slices are not equally spaced (up to {error:.1f} mm off)")
            else:
                affine[:3, 0] = normal * first["step_mm"]
            affine[:3, 1] = column * first["spacing_mm"][0]
            affine[:3, 2] = row * first["spacing_mm"][1]
            affine[:3, 3] = first["position_lps"]
            volume = Volume(
                _values([unique[i] for i in piece]),
                affine,
                study_id,
                series_id,
                description,
                len(volumes),
                np.array([unique[i]["instance_number"] for i in piece]),
                first["thickness_mm"],
            )
            if volume.plane != description.split()[0].lower():
                problems.append(
                    f"{name}: {len(piece)} {volume.plane} slices in a series called {description}, left out"
                )
            else:
                volumes.append(volume)
    if len(volumes) > MAX_STACKS:
        problems.append(f"{name}: {len(volumes)} separate stacks, the {MAX_STACKS} with most slices were kept")
        longest = sorted(volumes, key=lambda volume: -len(volume.array))[:MAX_STACKS]
        volumes = [replace(v, block=k) for k, v in enumerate(sorted(longest, key=lambda volume: volume.block))]
    return volumes


def _read_series(folder, name, problems):
    """The slices of a series' folder, as read_slices has them; sentences about the rest are added to `problems`.

    Slices are counted in the order of the files' numbers. Where they exceed MAX_SLICES, MAX_PIXELS or MAX_AREA_MM2
    those already read are thinned to every second one and so are those to come, as often as it takes: however large the
    series, no more than this is held.
    """
    try:
        files = sorted(
            (path for path in folder.iterdir() if path.suffix == ".dcm"), key=lambda p: (len(p.stem), p.stem)
        )
    except OSError as error:
        problems.append(f"{name}: folder cannot be read ({error})")
        files = []
    slices, taken, count, frames, every = [], 0.0, 0, 0, 1
    for path in files:
        if count % every:
            count += 1
            continue
        found, lost = [], []
        try:
            found, lost = read_slices(path)
            problems += [f"{name}: {path.name}: {problem}" for problem in lost]
        except DicomProblem as problem:
            problems.append(f"{name}: {path.name}: {problem}")
        except Exception as error:  # whatever else a damaged file can do, it costs one slice
            problems.append(f"{name}: {path.name}: {type(error).__name__}: {error}")
        several = len(found) + len(lost) > 1
        for place, item in enumerate(found):
            item["count"] = count + place
            item["instance_number"] += frames if several else 0
        frames += len(found) + len(lost) if several else 0
        count += max(1, len(found) + len(lost))
        found = [item for item in found if item["count"] % every == 0]
        slices, taken = slices + found, taken + sum(map(_share, found))
        while taken > 1 + 1e-9:
            every *= 2
            slices = [item for item in slices if item["count"] % every == 0]
            taken = sum(map(_share, slices))
    if every > 1:
        problems.insert(0, f"{name}: of {count} slices every {every}th was read, they are too many")
    if not slices:
        problems.insert(0, f"{name}: no readable slice")
    return slices


def _share(item):
    """How much of what one series may have a slice takes, 0 to 1."""
    pixels = item["pixels"].size
    return max(1 / MAX_SLICES, pixels / MAX_PIXELS, pixels * float(np.prod(item["spacing_mm"])) / MAX_AREA_MM2)


def read_study(folder, descriptions):
    """Read the series of a study: Study, with a sentence in `.problems` for everything that could not be read.

    folder: {split}_images/<study_id>; descriptions: dict series_id -> description, as the descriptions table has
    them. Never raises because of what is in the folder: a study without a single readable file has no volumes.
    Memory is bounded whatever is there, see MAX_SLICES and the other limits.
    """
    folder = Path(folder)
    study_id = int(folder.name)
    study = Study(study_id, [])
    for series_id, description in descriptions.items():
        name = f"study {study_id}, series {series_id}"
        if description not in DESCRIPTIONS:
            study.problems.append(f"{name}: unknown series description {description!r}")
        elif sum(volume.array.size for volume in study.volumes) >= MAX_STUDY_PIXELS:
            study.problems.append(f"{name}: not read, the study's other series are as large as memory allows")
        else:
            problems = []
            try:
                slices = _read_series(folder / str(series_id), name, problems)
                study.volumes += stack_slices(slices, study_id, series_id, description, problems)
            except Exception as error:  # whatever else a damaged series can do, it costs that series
                problems.append(f"{name}: {type(error).__name__}: {error}")
            count = sum(len(volume.array) for volume in study.volumes if volume.series_id == series_id)
            if 0 < count < FEW_SLICES:
                problems.append(f"{name}: {count} slices are all there is")
            if len(problems) > MAX_SENTENCES:
                problems[MAX_SENTENCES:] = [f"{name}: and {len(problems) - MAX_SENTENCES} more problems"]
            study.problems += problems
    try:
        there = {path.name for path in folder.iterdir() if path.is_dir()}
    except OSError:
        there = set()
    for series_id in sorted(there - {str(series_id) for series_id in descriptions}):
        study.problems.append(f"study {study_id}, series {series_id}: not in the descriptions table, not used")
    for description in DESCRIPTIONS:
        if not study.of(description):
            study.problems.append(f"study {study_id}: no {description} series")
    return study
