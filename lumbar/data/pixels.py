"""The pixels of a DICOM data set: decoded as the standard says, with what pads them marked.

May use: nothing of the kit.
"""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset


class DicomProblem(ValueError):
    """A file that cannot become a slice; the message names the reason."""


# What no scan of a spine exceeds. Headers of damaged files can claim any size: cap before allocating.
MAX_SIDE_PX = 4096
MAX_PIXELS = 1 << 26  # of one file, and of one series; the largest real series have some 50 million
MAX_FRAGMENTS = 20_000  # of compressed pixels: a frame needs one, seldom a few

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

_ITEM = b"\xfe\xff\x00\xe0"  # the tag of a sequence's item or a fragment, little endian

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_FLOATS = {4: "Float", 8: "DoubleFloat"}  # what the names of float pixels' elements begin with, by a pixel's bytes
_WHOLE = (
    "NumberOfFrames SamplesPerPixel PlanarConfiguration Rows Columns BitsAllocated BitsStored HighBit "
    "PixelRepresentation"
).split()
_NUMBER = re.compile(r"([+-]?\d{1,9})(?:[.,]0*)?")
_BINARY_VRS = ("US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "OB", "OW")


def stored_pixels(dataset: Dataset, frames: int = 1) -> tuple[np.ndarray, list[str]]:
    """Decode the stored values of a data set, before rescaling.

    Decoding is pydicom's: whatever the bits above Bits Stored hold, they are masked, and the sign is extended from
    the highest stored bit (PS3.5 8.1.1). Where High Bit puts the stored bits above others, which are all 0, they are
    moved down.

    Parameters
    ----------
    dataset : pydicom.Dataset
        With the elements of the image pixel module. Absent optional elements, and Bits Stored and Pixel
        Representation where the pixels themselves leave no doubt, are filled in; whole numbers stored as text become
        int.
    frames : int
        Number of frames.

    Returns
    -------
    tuple
        ((frames, rows, columns) array of the stored kind, sentences about what is doubtful).

    Raises
    ------
    DicomProblem
        With the reason, where nothing can be decoded.
    """
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    _read_whole_numbers(dataset)
    shape, samples = (frames, dataset.get("Rows"), dataset.get("Columns")), dataset.get("SamplesPerPixel")
    if any(isinstance(side, int) and side > MAX_SIDE_PX for side in shape[1:]) or (
        all(isinstance(side, int) for side in shape[1:]) and math.prod(shape) > MAX_PIXELS
    ):
        raise DicomProblem(f"states {' x '.join(map(str, shape))} pixels (frames, rows, columns): too many")
    if samples not in (None, "", 1):
        raise DicomProblem(f"pixels have {samples} samples each: a colour picture")
    encapsulated = getattr(syntax, "is_encapsulated", False)
    if encapsulated:
        data = dataset.get("PixelData")
        if isinstance(data, bytes) and data.count(_ITEM) > MAX_FRAGMENTS:
            raise DicomProblem(f"compressed pixels come in more than {MAX_FRAGMENTS} pieces")
    if not any(dataset.get(keyword) for keyword in _PIXELS):
        empty = " and ".join(keyword for keyword in _PIXELS if keyword in dataset)
        raise DicomProblem(f"{empty} is empty: there is no image" if empty else "pixels cannot be decoded: none there")
    sign_known = _fill_in(dataset)
    allocated, bits, high = (dataset.get(keyword) for keyword in ("BitsAllocated", "BitsStored", "HighBit"))
    # Cells come whole where that can be, to see what is in the bits that are not stored.
    cells = "PixelData" in dataset and not encapsulated and all(isinstance(n, int) for n in (allocated, bits))
    cells = cells and 0 < bits < allocated
    try:
        decoder: Any = get_decoder(syntax)  # type: ignore[arg-type]  # None is refused, which is what is wanted
        whole = {"bits_stored": allocated} if cells else {}
        pixels, _ = decoder.as_array(dataset, raw=True, view_only=True, **whole)
    except Exception as error:  # pydicom raises many kinds, also from inside its decoders
        reason = _missing_decoder(syntax) or f"({plain_reason(error)})"
        raise DicomProblem(f"pixels cannot be decoded: {reason}") from None
    if pixels.ndim != 2 + (frames > 1) or pixels.size == 0:
        raise DicomProblem(f"pixels have the shape {pixels.shape}, not (rows, columns)")
    doubts = []
    if cells and _is_left_aligned(pixels, bits, high):
        pixels = pixels << (allocated - 1 - high) >> (allocated - bits)
    else:
        if isinstance(high, int) and isinstance(bits, int) and high != bits - 1 and pixels.dtype.kind in "ui":
            doubts.append(
                f"HighBit {high} does not belong to {bits} bits stored: read as {bits - 1}, grey values may be off"
            )
        if cells:
            stored = pixels << (allocated - bits) >> (allocated - bits)
            if _is_cut_off(pixels, stored):
                doubts.append(f"values need more than the {bits} bits stored: cut off, grey values may be off")
            pixels = stored
    if not sign_known and pixels.dtype.kind == "u" and (pixels >> (int(dataset.BitsStored) - 1)).any():
        raise DicomProblem("PixelRepresentation is missing: whether values have a sign is not known")
    return pixels.reshape(frames, *pixels.shape[-2:]), doubts


def _is_left_aligned(cells, bits, high) -> bool:
    """True where High Bit says that the stored bits are not the lowest ones, and the bits below them are all 0."""
    if not isinstance(high, int) or not bits <= high < 8 * cells.itemsize:
        return False
    return not (cells & ((1 << (high + 1 - bits)) - 1)).any()


def _is_cut_off(cells, pixels) -> bool:
    """True where what lies above the stored bits belongs to the values: neighbours that differ by one there differ less
    with it than without. Overlays, and whatever else may lie there, make them differ more."""
    above = cells.astype(np.float64) - pixels
    if not above.any():
        return False
    steps = np.abs(np.diff(above, axis=-1))
    by_one = (steps > 0) & (steps == np.min(steps, where=steps > 0, initial=np.inf))
    whole, cut = (np.abs(np.diff(values.astype(np.float64), axis=-1))[by_one] for values in (cells, pixels))
    return bool(by_one.any() and (whole < cut).mean() > 0.5)


def _read_whole_numbers(dataset) -> None:
    """Make int of the whole numbers that a writer stored as text. Raises DicomProblem where the text is none."""
    for keyword in _WHOLE:
        text = _text(dataset, keyword)
        found = _NUMBER.fullmatch(text) if text else None
        if found:
            dataset.add_new(keyword, "SL", int(found[1]))  # of any text, without a warning
        elif text and keyword not in ("HighBit", "PlanarConfiguration"):  # pixels can be decoded without these
            raise DicomProblem(f"{keyword} is {text[:20]!r}, which is not a whole number")


def _text(dataset, keyword) -> str | None:
    """The text of an element that should be binary, where a writer stated a text's VR for it; None otherwise."""
    element = dataset.get_item(keyword) if keyword in dataset else None
    value, vr = getattr(element, "value", None), getattr(element, "VR", None)
    if not isinstance(value, bytes):
        return str(value).strip(" \0") if isinstance(value, (str, float)) else None
    if vr in (None, "UN"):
        # Two digits are, as a binary number, more than any of _WHOLE holds; but any two bytes may be a pixel's value.
        binary = len(value) == 2 and (vr is None or keyword not in _WHOLE)
        if binary or not re.fullmatch(rb"[ \d.,eE+-]+", value):
            return None
    return None if vr in _BINARY_VRS else value.decode("latin-1").strip(" \0")


def _fill_in(dataset) -> bool:
    """Give pydicom the elements that it asks for and a file may lack. False where the sign is a guess."""
    if dataset.get("SamplesPerPixel") in (None, ""):
        dataset.SamplesPerPixel = 1
    if dataset.get("PhotometricInterpretation") in (None, ""):
        dataset.PhotometricInterpretation = "MONOCHROME2"
    for keyword in _PIXELS:
        if keyword in dataset and not dataset.get(keyword):
            del dataset[keyword]
    if not (dataset.get("ExtendedOffsetTable") and dataset.get("ExtendedOffsetTableLengths")):
        dataset.pop("ExtendedOffsetTable", None)  # pydicom takes both or none
    if "NumberOfFrames" in dataset and not dataset.get("NumberOfFrames"):
        del dataset.NumberOfFrames
    if dataset.get("BitsStored") in (None, "") and "PixelData" in dataset:
        high = dataset.get("HighBit")
        bits = high + 1 if isinstance(high, int) else dataset.get("BitsAllocated")
        if isinstance(bits, int):
            dataset.BitsStored = bits
    sign_known = dataset.get("PixelRepresentation") not in (None, "")
    if not sign_known and "PixelData" in dataset:
        dataset.PixelRepresentation = 0
    return sign_known


def _missing_decoder(syntax) -> str | None:
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


# Advice about a library's arguments and settings, which nobody can set from here.
_ADVICE = re.compile(
    r"\w+=(True|False|None)|pydicom\.|config\.|settings|argument|parameter|keyword|'\w+_\w+'|plugin", re.I
)


def plain_reason(error: Exception) -> str:
    """The sentences of a library's error that help somebody who has the file, in one line.

    >>> plain_reason(ValueError("The magic word is missing. Use force=True to force reading."))
    'The magic word is missing.'
    """
    text = " ".join(str(error).split())
    sentences = re.split(r"(?<=[.!?])\s+", text)
    kept = [sentence for sentence in sentences if not _ADVICE.search(sentence)]
    return " ".join(kept) or type(error).__name__


def padding_mask(dataset: Dataset, pixels: np.ndarray) -> np.ndarray | None:
    """Which stored values are padding that the file announces (PS3.3 C.7.5.1.1.2).

    Pixel Padding Value alone, or with Pixel Padding Range Limit every value between the two; of float pixels their own
    elements of that kind. A value inside the range of the other pixels (0 among signed ones, say) is padding only where
    it is connected to the image's border.

    Parameters
    ----------
    dataset : pydicom.Dataset
    pixels : (frames, rows, columns) array
        As stored_pixels gives them.

    Returns
    -------
    (frames, rows, columns) bool array, or None without any padding.
    """
    kind, read = ("", _stored_value) if pixels.dtype.kind in "ui" else (_FLOATS[pixels.itemsize], _float_value)
    value, limit = (read(dataset, f"{kind}PixelPadding{what}") for what in ("Value", "RangeLimit"))
    if value is None:
        return None
    low, high = (value, value) if limit is None else sorted([value, limit])
    mask = (pixels >= low) & (pixels <= high)
    if not mask.any():
        return None
    others = pixels[~mask]
    if others.size and others.min() < low and others.max() > high:
        mask = np.stack([at_the_border(frame) for frame in mask])
    return mask if mask.any() else None


def _stored_value(dataset, keyword) -> int | None:
    """An element that is a stored value (US or SS) as the pixels' decoding would give it; None if there is none."""
    text = _text(dataset, keyword)
    found = _NUMBER.fullmatch(text) if text else None
    value = int(found[1]) if found else dataset.get(keyword)
    if value is None:
        return None
    signed = dataset.get("PixelRepresentation") == 1
    if isinstance(value, bytes) and len(value) in (2, 4):  # its VR was not resolved
        value = int.from_bytes(value, "little", signed=signed)
    bits = dataset.get("BitsStored")
    if not isinstance(value, int) or not isinstance(bits, int) or not 0 < bits <= 64:
        return None
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def _float_value(dataset, keyword) -> float | None:
    """An element that is a value of float pixels (FL or FD); None if there is none."""
    try:
        return float(_text(dataset, keyword) or dataset.get(keyword))
    except (TypeError, ValueError):
        return None


def at_the_border(mask: np.ndarray) -> np.ndarray:
    """The parts of a (rows, columns) mask that touch the image's border."""
    from scipy import ndimage

    parts, _ = ndimage.label(mask)
    touching = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    return mask & np.isin(parts, touching[touching > 0])
