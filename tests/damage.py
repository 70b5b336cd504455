"""Small edits of DICOM files, which tests/mutate.py and tests/benchmarks/bench_damage.py put together to damages.

Uses pydicom alone, nothing of the kit: what is tried should not help to make what it is tried with.
"""

import io
import math
import re

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

TOP = 4095  # of the phantom's stored values


def slices(folder):
    """The *.dcm of a series' folder, by number."""
    return sorted(folder.glob("*.dcm"), key=lambda path: (len(path.stem), path.stem))


def load(path):
    return pydicom.dcmread(path)


def save(dataset, path):
    """Write in the transfer syntax that the file meta states, whatever the values are."""
    with pydicom.config.disable_value_validation():
        pydicom.dcmwrite(path, dataset)


def values(dataset):
    """The stored pixels, (rows, columns) int64 between 0 and TOP as the phantom wrote them."""
    return np.clip(dataset.pixel_array.astype(np.int64), 0, TOP)


def put(dataset, array, allocated=16, stored=None, high=None, signed=False):
    """Other pixels, and the elements that describe them; by default all bits are used."""
    stored = stored or allocated
    array = np.asarray(array, np.int64) & ((1 << allocated) - 1)
    dataset.Rows, dataset.Columns = array.shape
    dataset.BitsAllocated, dataset.BitsStored = allocated, stored
    dataset.HighBit, dataset.PixelRepresentation = stored - 1 if high is None else high, int(signed)
    data = array.astype(f"<u{allocated // 8}").tobytes()
    dataset.PixelData = data + bytes(len(data) % 2)
    dataset["PixelData"].VR = "OW"


def put_text(dataset, keyword, text, vr=None):
    """A value as it stands, also where the element's own VR, or the one stated, forbids it."""
    data = text if isinstance(text, bytes) else text.encode()
    data += b" " * (len(data) % 2)
    tag = Tag(keyword)
    dataset[tag] = RawDataElement(tag, vr or pydicom.datadict.dictionary_VR(tag), len(data), data, 0, False, True)


def text_of(dataset, keyword):
    """The value as the text that a file holds; "" where there is none."""
    value = dataset.get(keyword)
    return "" if value is None else "\\".join(map(str, value if np.ndim(value) else [value]))


def numbers(dataset, keyword):
    return np.array([float(value) for value in np.atleast_1d(dataset[keyword].value)])


def put_numbers(dataset, keyword, numbers):
    put_text(dataset, keyword, "\\".join(f"{number:.10g}"[:16] for number in np.atleast_1d(numbers)))


def normal(dataset):
    """The slice normal in LPS."""
    axes = numbers(dataset, "ImageOrientationPatient")
    return np.cross(axes[:3], axes[3:])


def move(dataset, offset_lps):
    put_numbers(dataset, "ImagePositionPatient", numbers(dataset, "ImagePositionPatient") + offset_lps)


def renumber(dataset, number):
    """Another instance number, and so another object."""
    dataset.InstanceNumber = str(number)
    dataset.SOPInstanceUID = f"{dataset.SOPInstanceUID}.{number}"[-64:]
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID


def big_endian(dataset):
    """The same dataset in explicit VR big endian."""
    swapped = dataset.pixel_array.astype(">u2").tobytes()  # first: both datasets share the element of the syntax
    other = Dataset()
    other.update({element.tag: element for element in dataset})
    other.preamble, other.file_meta = dataset.preamble, FileMetaDataset()
    other.file_meta.update(dataset.file_meta)
    other.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    other.PixelData = swapped
    return other


def deflate(dataset):
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian


def _encapsulate(dataset, encoded, syntax):
    dataset.PixelData = pydicom.encaps.encapsulate([encoded])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax


def compress(dataset, how):
    """how: rle, jpeg2000, jpeg-ls (these lose nothing) or jpeg (8 bits, lossy). Raises RuntimeError without an encoder
    for JPEG-LS."""
    from PIL import Image

    if how in ("rle", "jpeg-ls"):
        dataset.compress({"rle": RLELossless, "jpeg-ls": JPEGLSLossless}[how], generate_instance_uid=False)
        return
    encoded = io.BytesIO()
    if how == "jpeg2000":
        put(dataset, values(dataset))
        Image.fromarray(dataset.pixel_array.astype(np.uint16)).save(encoded, "JPEG2000", no_jp2=True)
        _encapsulate(dataset, encoded.getvalue(), JPEG2000Lossless)
    else:
        put(dataset, np.minimum(values(dataset) >> 3, 255), 8)
        Image.fromarray(dataset.pixel_array).save(encoded, "JPEG", quality=95)
        _encapsulate(dataset, encoded.getvalue(), JPEGBaseline8Bit)


def bare(dataset):
    """The bytes of the dataset alone in implicit VR little endian: no preamble, no file meta."""
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = True, True
    plain = Dataset()
    plain.update({element.tag: element for element in dataset})
    write_dataset(buffer, plain)
    return buffer.getvalue()


def border(shape, share=0.05):
    """Mask of the first and last rows: this share of all rows each."""
    mask = np.zeros(shape, bool)
    rows = max(1, math.ceil(share * shape[0]))
    mask[:rows] = mask[-rows:] = True
    return mask


def corners(shape):
    """Mask of what lies outside the ellipse that touches the image's edges."""
    row, column = (np.linspace(-1, 1, size) for size in shape)
    return np.hypot(row[:, None], column[None]) > 1


def sequence_of_nothing(dataset, items):
    """A private sequence of that many empty items, of undefined length."""
    dataset.add_new(0x00110010, "LO", "NOTHING")
    dataset.add_new(0x00111010, "SQ", [Dataset() for _ in range(items)])
    dataset[0x00111010].is_undefined_length = True


def news(problems, known):
    """The sentences of a log's problems that the text `known` has not, numbers aside."""

    def sentences(text):
        return sorted((re.sub(r"\d+(\.\d+)?", "#", said), said) for said in text.split(" | ") if said)

    old, new = [what for what, _ in sentences(known)], []
    for what, said in sentences(problems):
        if what in old:
            old.remove(what)
        else:
            new.append(said)
    return new


WEB_PAGE = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head><body>Sign in to download.</body></html>\n"
APPLE_DOUBLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4096)
