"""A seeded mutator of DICOM studies: one to three random damages each, read and predicted beside good neighbours.

    python tests/mutate.py --count 2000 --seed 0 --out mutants          # a summary and a line for each in mutants/
    python tests/mutate.py --only 17 --out mutants                      # that one alone, its files kept, all said

For each mutant: does an exception escape, how long, how much memory, are there 25 rows, do the neighbours' rows stay as
they are; and is it *silently* changed, that is, do grey values or geometry of its volumes differ from the unmutated
study's while neither study.problems nor the log says anything new? A silent change whose kind carries a reason in
MUTATIONS cannot be known from the files (a person may judge otherwise). A mutant's seed is all that it depends on.

Mutants go in batches through processes of limited memory (--memory) and time (--time); one that takes its process down
is a line of the records, and the rest go on. Finished ones are not done again. A script and, for test_mutants.py, a
module; pytest collects nothing here.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import damage  # noqa: E402
import numpy as np  # noqa: E402
import pydicom  # noqa: E402
import torch  # noqa: E402
from damage import load, put, put_numbers, put_text, save, values  # noqa: E402

import utils  # noqa: E402
from lumbar.data.competition import row_ids  # noqa: E402
from lumbar.data.dicom import read_study  # noqa: E402
from lumbar.data.greys import normalise_study  # noqa: E402
from lumbar.grade.ensemble import default_ensemble  # noqa: E402

T1, AXIAL, T2 = 101, 102, 103  # tiny.SERIES
BASES = 3  # phantom studies that mutants are made of
NEIGHBOURS = (7, 9000000000)  # good studies before and behind the mutants
GREY, CORRELATION, MOVED_MM = 0.02, 0.99, 0.5  # from here on a slice counts as changed

READ = (
    "SOPClassUID InstanceNumber ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness "
    "SpacingBetweenSlices RescaleSlope RescaleIntercept NumberOfFrames Rows Columns SamplesPerPixel "
    "PlanarConfiguration PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation "
    "PixelPaddingValue SpecificCharacterSet SeriesInstanceUID StudyInstanceUID SOPInstanceUID EchoTime EchoNumbers "
    "AcquisitionNumber TemporalPositionIdentifier DiffusionBValue ImageType SeriesDescription FrameOfReferenceUID"
).split()


# Mutations: (study folder, rng, another study's folder) -> what was done, in words ------------------------------------

MUTATIONS = {}  # name -> (function, why a silent change of this kind cannot be known ("" where it can), of which words)


def mutation(reason="", of=""):
    """reason: why a silent change of this kind cannot be known; of: a regex, it holds where the words have this."""

    def register(work):
        MUTATIONS[work.__name__] = work, reason, of
        return work

    return register


def reason_for(name, record):
    """Why a mutation of this name cannot be known in this mutant, "" where it can."""
    _, reason, of = MUTATIONS[name]
    words = [part for part in record["what"].split("; ") if part.startswith(f"{name}: ")]
    return reason if all(re.search(of, part) for part in words) else ""


def slices(folder):
    """The *.dcm of a series that an earlier mutation has left as files of usual size."""
    return [path for path in damage.slices(folder) if path.is_file() and path.stat().st_size < 10 << 20]


def some(study, rng, most="all"):
    """(files, words): one, a few, a series or all of the study's; most: the widest choice."""
    series = [place for place in sorted(study.iterdir()) if place.is_dir() and slices(place)] if study.is_dir() else []
    if not series:
        return [], "nothing, no file is left"
    place = series[rng.integers(len(series))]
    paths = slices(place)
    choice = rng.choice(["one", "few", "series", "all"][: ["one", "few", "series", "all"].index(most) + 1])
    if choice == "one":
        path = paths[rng.integers(len(paths))]
        return [path], f"{place.name}/{path.name}"
    if choice == "few":
        chosen = sorted(rng.choice(len(paths), min(len(paths), int(rng.integers(2, 5))), replace=False))
        return [paths[k] for k in chosen], f"{len(chosen)} files of {place.name}"
    if choice == "series":
        return paths, f"series {place.name}"
    return [path for place in series for path in slices(place)], "all files"


def edit(study, rng, change, most="all"):
    """change(Dataset, rng) on some files; those that are no longer DICOM are passed over."""
    paths, words = some(study, rng, most)
    for path in paths:
        try:
            dataset = load(path)
            other = change(dataset, rng)
            save(dataset if other is None else other, path)
        except Exception:  # an earlier mutation has spoilt it
            continue
    return words


def bytes_of(study, rng, change, most="all"):
    paths, words = some(study, rng, most)
    for path in paths:
        data = path.read_bytes()
        if data:
            path.write_bytes(change(bytearray(data), rng))
    return words


def flipped(data, rng, first, last):
    """A few bytes between these places with one bit turned, or replaced altogether."""
    first, last = min(first, len(data) - 1), min(last, len(data))
    for place in rng.integers(first, max(first + 1, last), int(rng.choice([1, 2, 8, 50]))):
        data[place] = data[place] ^ (1 << int(rng.integers(8))) if rng.random() < 0.5 else int(rng.integers(256))
    return bytes(data)


def pixels_at(data):
    """Where the pixel data begin, roughly."""
    place = bytes(data).rfind(b"\xe0\x7f\x10\x00")
    return place + 12 if place >= 0 else len(data)


@mutation("a digit that became another digit is a valid number")
def flip_header(study, rng, other):
    return "bytes of the header of " + bytes_of(
        study, rng, lambda data, rng: flipped(data, rng, 340, pixels_at(data)), "series"
    )


@mutation("pixels carry no checksum")
def flip_pixels(study, rng, other):
    return "bytes of the pixels of " + bytes_of(
        study, rng, lambda data, rng: flipped(data, rng, pixels_at(data), len(data)), "series"
    )


@mutation()
def flip_meta(study, rng, other):
    return "bytes of the file meta of " + bytes_of(study, rng, lambda data, rng: flipped(data, rng, 128, 340))


@mutation()
def truncate(study, rng, other):
    share = rng.uniform(0, 1)
    return f"cut at {share:.0%}: " + bytes_of(study, rng, lambda data, rng: bytes(data[: int(share * len(data))]))


@mutation()
def append(study, rng, other):
    more = bytes(rng.integers(0, 256, int(rng.choice([1, 7, 1000, 100_000])), dtype=np.uint8))
    return f"{len(more)} random bytes behind " + bytes_of(study, rng, lambda data, rng: bytes(data) + more)


@mutation()
def empty_files(study, rng, other):
    return "zero bytes: " + bytes_of(study, rng, lambda data, rng: b"")


@mutation()
def other_files(study, rng, other):
    """Files that are none of DICOM, in place of or beside slices."""
    kinds = {
        "a web page": damage.WEB_PAGE,
        "AppleDouble": damage.APPLE_DOUBLE,
        "a PNG": b"\x89PNG\r\n\x1a\n" + rng.bytes(3000),
        "a ZIP": b"PK\x03\x04" + rng.bytes(3000),
        "random bytes": rng.bytes(4000),
        "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }
    what = str(rng.choice(list(kinds)))
    paths, words = some(study, rng, "series")
    beside = rng.random() < 0.5
    for number, path in enumerate(paths):
        (path.with_name(f"{700 + number}.dcm") if beside else path).write_bytes(kinds[what])
    return f"{what} {'beside' if beside else 'in place of'} {words}"


@mutation()
def rename(study, rng, other):
    pattern = str(
        rng.choice(["{}.DCM", "{}.IMA", "{}", "._{}.dcm", "Wirbels\u00e4ule {}.dcm", "99999999999999999999{}.dcm"])
    )
    paths, words = some(study, rng)
    for number, path in enumerate(paths):
        path.rename(path.with_name(pattern.format(f"{path.stem[:40]}{number}")))
    return f"named {pattern}: {words}"


@mutation()
def shuffle_names(study, rng, other):
    paths, words = some(study, rng, "series")
    contents = [path.read_bytes() for path in paths]
    for path, k in zip(paths, rng.permutation(len(paths)), strict=True):
        path.write_bytes(contents[k])
    return f"names in another order: {words}"


@mutation()
def swap_series(study, rng, other):
    """Slices of two series take each other's place."""
    series = [place for place in sorted(study.iterdir()) if place.is_dir() and slices(place)] if study.is_dir() else []
    if len(series) < 2:
        return "nothing to swap"
    one, two = (slices(series[k]) for k in rng.choice(len(series), 2, replace=False))
    count = int(rng.choice([1, 2, min(len(one), len(two))]))
    for a, b in zip(one[:count], two[:count], strict=False):
        data = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(data)
    return f"{count} slices of {one[0].parent.name} and {two[0].parent.name} swapped"


@mutation("the files state the same examination", "anonymised")
def mix_studies(study, rng, other):
    """Slices of another patient beside or in place of this one's; anonymised: under the same identifiers."""
    paths, words = some(study, rng, "series")
    beside, anonymised = rng.random() < 0.5, rng.random() < 0.3
    for number, path in enumerate(paths):
        source = other / path.parent.name / path.name
        if source.is_file():
            goal = path.with_name(f"{800 + number}.dcm") if beside else path
            try:
                dataset, own = load(source), load(path)
                for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID") if anonymised else ():
                    put_text(dataset, keyword, own[keyword].value)
                save(dataset, goal)
            except Exception:  # an earlier mutation has spoilt this patient's file
                shutil.copy(source, goal)
    whose = "another patient's anonymised slices" if anonymised else "another patient's slices"
    return f"{whose} {'beside' if beside else 'in place of'} {words}"


@mutation()
def remove(study, rng, other):
    """Slices from within a series, or all of it."""
    paths, words = some(study, rng, "series")
    ends = [ends for path in paths for ends in (slices(path.parent)[0], slices(path.parent)[-1])]
    for path in paths:
        if path not in ends or len(paths) == len(slices(path.parent)):
            path.unlink()
    return f"removed: {words}"


@mutation("nothing says how far a series should reach")
def remove_end(study, rng, other):
    """The first or last slices of a series."""
    place = study / str(rng.choice([T1, AXIAL, T2]))
    paths = slices(place) if place.is_dir() else []
    gone = int(rng.integers(1, 4))
    for path in paths[:gone] if rng.random() < 0.5 else paths[-gone:]:
        path.unlink()
    return f"{gone} slices from an end of {place.name} removed"


@mutation()
def repeat(study, rng, other):
    """Slices once more, a little aside."""
    aside_mm = float(rng.choice([0, 1e-6, 1e-4, 0.02, 0.3, 1.5]))
    paths, words = some(study, rng, "series")
    for number, path in enumerate(paths):
        try:
            dataset = load(path)
            damage.move(dataset, aside_mm * rng.choice([-1, 1]) * damage.normal(dataset))
            damage.renumber(dataset, 400 + number)
            save(dataset, path.with_name(f"{400 + number}.dcm"))
        except Exception:  # an earlier mutation has spoilt it
            continue
    return f"once more {aside_mm:g} mm aside: {words}"


@mutation()
def many(study, rng, other):
    """Hundreds of copies at places of their own."""
    paths, _ = some(study, rng, "one")
    count, step_mm = int(rng.integers(100, 400)), float(rng.choice([0.0, 0.01, 1.0, 4.0]))
    for path in paths:
        try:
            dataset = load(path)
            direction = damage.normal(dataset)
            for number in range(count):
                damage.move(dataset, step_mm * direction)
                save(dataset, path.with_name(f"{2000 + number}.dcm"))
        except Exception:  # an earlier mutation has spoilt it
            continue
    return f"{count} copies of one slice, {step_mm:g} mm apart"


@mutation()
def delete_tag(study, rng, other):
    keyword = str(rng.choice([*READ, "PixelData"]))

    def change(dataset, rng):
        if keyword in dataset:
            delattr(dataset, keyword)

    return f"no {keyword}: {edit(study, rng, change)}"


@mutation("of two elements with one tag either may be meant")
def duplicate_tag(study, rng, other):
    """An element twice in the bytes, the second time with another value."""
    keyword = str(rng.choice(["PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "Rows", "BitsStored"]))
    tag = pydicom.tag.Tag(keyword)
    head = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")

    def change(data, rng):
        place = bytes(data).find(head)
        if place < 0:
            return bytes(data)
        length = int.from_bytes(data[place + 6 : place + 8], "little")
        element = bytes(data[place : place + 8 + length]).replace(b"1", b"2").replace(b"0.", b"1.")
        return bytes(data[: place + 8 + length]) + element + bytes(data[place + 8 + length :])

    return f"{keyword} twice: {bytes_of(study, rng, change)}"


HOSTILE = [
    "", " ", "0", "-1", "1", "nan", "inf", "-inf", "1e308", "-1e308", "1e-308", "1e9999", "99999999999999999999",
    "0\\0", "1\\2\\3", "\\", "0\\0\\0\\0\\0\\0", "1\\0\\0\\0\\1\\0", "-100", "1000", "0.001", "3,5", "0x10",
    "\u8170\u690e", "\u00e4" * 200, "A" * 70_000, "\\".join("1" * 3000), "%s%n", "<script>", "../../etc/passwd", "\0\0",
]  # fmt: skip


@mutation()
def hostile_value(study, rng, other):
    keyword, text = str(rng.choice(READ)), str(rng.choice(HOSTILE))
    vr = str(rng.choice(["own", "own", "own", "UN", "UT", "LO", "DS", "OB", "FD"]))
    own = pydicom.datadict.dictionary_VR(keyword)

    def change(dataset, rng):
        stated = own if vr == "own" else vr
        if stated in ("US", "US or SS", "FD"):  # binary: whatever the text's first bytes are
            stated = "US" if stated != "FD" else stated
            data = text.encode()[: 8 if stated == "FD" else 2].ljust(8 if stated == "FD" else 2, b"\0")
        else:
            data = text.encode()[:60_000]
        put_text(dataset, keyword, data, stated)

    words = edit(study, rng, change)
    return f"{keyword} is {text[:30]!r}{'...' * (len(text) > 30)} in VR {vr}: {words}"


@mutation()
def state_syntax(study, rng, other):
    """Another transfer syntax than the one written."""
    from pydicom import uid

    syntax = rng.choice(
        [
            uid.ImplicitVRLittleEndian,
            uid.ExplicitVRBigEndian,
            uid.DeflatedExplicitVRLittleEndian,
            uid.RLELossless,
            uid.JPEGBaseline8Bit,
            uid.JPEG2000,
            uid.JPEGLSLossless,
            uid.MPEG2MPML,
            "1.2.3.4.5",
            "",
        ]
    )

    def change(data, rng):
        place = bytes(data).find(b"\x02\x00\x10\x00UI")
        if place < 0:
            return bytes(data)
        length = int.from_bytes(data[place + 6 : place + 8], "little")
        value = str(syntax).encode()
        value += b"\0" * (len(value) % 2)
        group = bytes(data).find(b"\x02\x00\x00\x00UL\x04\x00") + 8
        total = int.from_bytes(data[group : group + 4], "little") + len(value) - length
        data[group : group + 4] = (total % 2**32).to_bytes(4, "little")
        return bytes(data[: place + 6]) + len(value).to_bytes(2, "little") + value + bytes(data[place + 8 + length :])

    return f"transfer syntax stated as {syntax or 'nothing'}: {bytes_of(study, rng, change)}"


@mutation()
def nested(study, rng, other):
    """Sequences within sequences, or one of many empty items, before the pixels."""
    depth, items = (int(rng.choice([3, 50, 1000, 5000])), 1) if rng.random() < 0.5 else (1, int(rng.choice([10, 8000])))
    sequence, item = b"\x11\x00\x10\x10SQ\0\0\xff\xff\xff\xff", b"\xfe\xff\x00\xe0"
    ends = b"\xfe\xff\x0d\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0\0\0\0\0"
    if depth == 1:
        more = sequence + (item + bytes(4)) * items + ends[1]
    else:  # written as bytes: pydicom itself cannot write so deep
        more = (sequence + item + b"\xff\xff\xff\xff") * depth + (ends[0] + ends[1]) * depth

    def change(data, rng):
        place = pixels_at(data)
        place -= 12 if place < len(data) else 0
        return bytes(data[:place]) + more + bytes(data[place:])

    return f"sequence {depth} deep, {items} items: {bytes_of(study, rng, change, 'series')}"


@mutation("what the bits mean is what the header says of them")
def state_bits(study, rng, other):
    """Another description of the same pixels."""
    keyword = str(rng.choice(["BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"]))
    value = int(rng.choice([0, 1, 7, 8, 11, 12, 13, 15, 16, 24, 32, 64]))

    def change(dataset, rng):
        put_text(dataset, keyword, value.to_bytes(2, "little"), "US")

    return f"{keyword} {value}, pixels unchanged: {edit(study, rng, change)}"


@mutation()
def bits_above(study, rng, other):
    """12 bits stored, other things above them."""

    def change(dataset, rng):
        stored = values(dataset)
        put(dataset, stored | rng.integers(0, 16, stored.shape) << 12, stored=12)

    return f"bits above the 12 stored: {edit(study, rng, change)}"


@mutation()
def represent(study, rng, other):
    """The same values in other bits."""
    allocated, stored, signed = [(32, 32, 0), (32, 16, 1), (16, 13, 1), (16, 12, 0)][int(rng.integers(4))]

    def change(dataset, rng):
        put(dataset, values(dataset), allocated, stored, signed=bool(signed))

    return f"{stored} of {allocated} bits, {'signed' * signed or 'unsigned'}: {edit(study, rng, change)}"


@mutation()
def encode(study, rng, other):
    """Another transfer syntax, the pixels in it."""
    how = str(rng.choice(["rle", "jpeg2000", "jpeg", "deflated", "big endian"]))

    def change(dataset, rng):
        if how == "deflated":
            return damage.deflate(dataset)
        return damage.big_endian(dataset) if how == "big endian" else damage.compress(dataset, how)

    return f"encoded as {how}: {edit(study, rng, change)}"


@mutation("a pixel value that is compressed wrongly is a pixel value")
def spoil_compressed(study, rng, other):
    """Compressed, then bytes of it flipped."""
    how = str(rng.choice(["rle", "jpeg2000", "jpeg"]))
    paths, words = some(study, rng, "series")
    for path in paths:
        try:
            dataset = load(path)
            damage.compress(dataset, how)
            save(dataset, path)
        except Exception:  # an earlier mutation has spoilt it
            continue
        data = bytearray(path.read_bytes())
        path.write_bytes(flipped(data, rng, pixels_at(data), len(data)))
    return f"encoded as {how} and spoilt: {words}"


@mutation("a study that was really scanned a little turned looks the same")
def turn_little(study, rng, other):
    return f"orientation turned by 1 to 5 degrees: {edit(study, rng, turned(rng.uniform(1, 5)), 'series')}"


@mutation()
def turn_much(study, rng, other):
    return f"orientation turned by 10 to 180 degrees: {edit(study, rng, turned(rng.uniform(10, 180)))}"


def turned(degrees):
    def change(dataset, rng):
        axes = damage.numbers(dataset, "ImageOrientationPatient").reshape(2, 3)
        angle, about = np.deg2rad(degrees), np.array([0.6, 0.48, 0.64])
        cross = np.array([[0, -about[2], about[1]], [about[2], 0, -about[0]], [-about[1], about[0], 0]])
        matrix = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        put_numbers(dataset, "ImageOrientationPatient", (axes @ matrix.T).ravel())

    return change


@mutation()
def shear(study, rng, other):
    """Axes that are not perpendicular, or no unit vectors."""
    by = float(rng.choice([1e-5, 1e-3, 0.02, 0.2, 1.0]))

    def change(dataset, rng):
        axes = damage.numbers(dataset, "ImageOrientationPatient")
        axes[3:] += by * axes[:3]
        put_numbers(dataset, "ImageOrientationPatient", axes)

    return f"axes sheared by {by:g}: {edit(study, rng, change)}"


@mutation()
def mirror(study, rng, other):
    """A direction that is turned over."""
    axis = int(rng.integers(2))

    def change(dataset, rng):
        axes = damage.numbers(dataset, "ImageOrientationPatient")
        axes[3 * axis : 3 * axis + 3] *= -1
        put_numbers(dataset, "ImageOrientationPatient", axes)

    return f"{'row' if axis == 0 else 'column'} direction turned over: {edit(study, rng, change)}"


@mutation("a scan that lies a little elsewhere looks the same")
def move_little(study, rng, other):
    offset = rng.normal(0, 8, 3)
    words = edit(study, rng, lambda dataset, rng: damage.move(dataset, offset), "series")
    return f"moved by {np.linalg.norm(offset):.0f} mm: {words}"


@mutation("where the scanner has its origin changes no result", "all files")
def move_far(study, rng, other):
    far_mm = float(rng.choice([300, 3000, 9e4, 2e5, 1e12, 1e30]))
    return f"moved by {far_mm:g} mm: {edit(study, rng, lambda dataset, rng: damage.move(dataset, far_mm))}"


@mutation()
def jitter(study, rng, other):
    """Last digits of the geometry differ from slice to slice."""
    keyword = str(rng.choice(["PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"]))
    relative = float(rng.choice([1e-3, 1e-4, 1e-5, 1e-6]))

    def change(dataset, rng):
        exact = damage.numbers(dataset, keyword)
        put_numbers(dataset, keyword, exact * (1 + relative * rng.uniform(-1, 1, exact.shape)))

    return f"{keyword} off by {relative:g}: {edit(study, rng, change)}"


@mutation("people differ by as much in size")
def scale_little(study, rng, other):
    return scaled(study, rng, float(rng.uniform(0.85, 1.18)), "series")


@mutation()
def scale_much(study, rng, other):
    return scaled(study, rng, float(rng.choice([0.01, 0.1, 0.5, 2, 3, 10, 30])), "all")


def scaled(study, rng, factor, most):
    def change(dataset, rng):
        put_numbers(dataset, "PixelSpacing", factor * damage.numbers(dataset, "PixelSpacing"))

    return f"PixelSpacing x {factor:.3g}: {edit(study, rng, change, most)}"


@mutation()
def rescale(study, rng, other):
    slope, intercept = str(rng.choice(["1000", "0.001", "4", "-1", "0", "1e-30"])), str(rng.choice(["0", "-500"]))

    def change(dataset, rng):
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept

    return f"RescaleSlope {slope}, intercept {intercept}: {edit(study, rng, change)}"


@mutation("an image upside down or mirrored is an image", "(upside down|left for right): (series|all files)")
def repaint(study, rng, other):
    """Pixels that are none of this slice."""
    paints = {
        "turned over": lambda v: v.max() - v,
        "bytes swapped": lambda v: (v >> 8) | ((v & 255) << 8),
        "all 0": lambda v: 0 * v,
        "all 65535": lambda v: 0 * v + 65535,
        "noise": lambda v: np.random.default_rng(v.size).integers(0, v.max() + 2, v.shape),
        "upside down": lambda v: v[::-1],
        "left for right": lambda v: v[:, ::-1],
        "MONOCHROME1 unsaid": lambda v: damage.TOP - v,
    }
    name = str(rng.choice(list(paints)))
    words = edit(study, rng, lambda dataset, rng: put(dataset, paints[name](values(dataset))))
    return f"pixels {name}: {words}"


@mutation("anatomy has no side that pixels would show; a whole series upside down is an image")
def turn_pixels(study, rng, other):
    """All pixels of a series mirrored."""
    axis = int(rng.integers(2))
    place = study / str(rng.choice([T1, AXIAL, T2]))
    for path in slices(place) if place.is_dir() else []:
        try:
            dataset = load(path)
            put(dataset, np.flip(values(dataset), axis))
            save(dataset, path)
        except Exception:  # an earlier mutation has spoilt it
            continue
    return f"pixels of {place.name} mirrored along axis {axis}"


@mutation()
def pad(study, rng, other):
    """Padding at the border or in the corners, announced or not."""
    value, said = int(rng.choice([-32768, -2000, 4095, 65535])), bool(rng.random() < 0.6)
    mask = damage.border if rng.random() < 0.5 else damage.corners

    def change(dataset, rng):
        pixels = values(dataset)
        pixels[mask(pixels.shape)] = value
        put(dataset, pixels, signed=value < 0)
        if said:
            dataset.add_new(0x00280120, "SS" if value < 0 else "US", value)

    words = edit(study, rng, change)
    return f"padding {value}{'' if said else ' unannounced'} in the {mask.__name__}: {words}"


@mutation()
def state_size(study, rng, other):
    """Rows and columns that the pixels have not, or have in another shape."""
    rows, columns = [(0.5, 2), (2, 0.5), (1, 1.5), (0, 1), (600, 600), (4000, 4000), (1, 0.5)][int(rng.integers(7))]

    def change(dataset, rng):
        dataset.Rows = min(65535, int(rows * dataset.Rows))
        dataset.Columns = min(65535, int(columns * dataset.Columns))

    return f"Rows x {rows}, Columns x {columns}: {edit(study, rng, change)}"


@mutation("an image of a smaller field is an image", "series|all files")
def resize(study, rng, other):
    """Slices with another matrix, the spacing unchanged."""

    def change(dataset, rng):
        put(dataset, values(dataset)[:-rows, :-columns])

    rows, columns = rng.integers(1, 30, 2)
    return f"cropped: {edit(study, rng, change)}"


@mutation()
def frames(study, rng, other):
    count = str(rng.choice(["0", "2", "-1", "1000000", "", "1.0", "two"]))
    words = edit(study, rng, lambda dataset, rng: put_text(dataset, "NumberOfFrames", count))
    return f"NumberOfFrames {count!r}: {words}"


@mutation()
def photometric(study, rng, other):
    text = str(rng.choice(["MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL", "monochrome2", "", "X"]))

    def change(dataset, rng):
        put_text(dataset, "PhotometricInterpretation", text)

    return f"PhotometricInterpretation {text!r}: {edit(study, rng, change)}"


@mutation()
def sparse(study, rng, other):
    size = int(rng.choice([20, 150, 600])) << 20
    paths, words = some(study, rng, "one")
    for path in paths:
        os.truncate(path, size)
    return f"{size >> 20} MB of nothing in {words}"


@mutation()
def bomb(study, rng, other):
    """Deflated data that inflate to a hundred times their size."""
    size = int(rng.choice([10, 100, 400])) << 20

    def change(dataset, rng):
        dataset.add_new(0x00420011, "OB", bytes(size))
        damage.deflate(dataset)

    return f"deflated, {size >> 20} MB of zeros: {edit(study, rng, change, 'one')}"


@mutation()
def no_files(study, rng, other):
    """Links, folders, or nothing where files should be."""
    what = str(rng.choice(["a folder", "a broken link", "a link to itself", "a file for the series", "no study"]))
    paths, words = some(study, rng, "series")
    if what == "no study" and study.is_dir():
        shutil.rmtree(study)
    elif what == "a file for the series" and paths:
        shutil.rmtree(paths[0].parent)
        paths[0].parent.write_text("not a folder")
    else:
        for path in paths:
            path.unlink()
            if what == "a folder":
                path.mkdir()
            else:
                path.symlink_to("gone" if what == "a broken link" else path.name)
    return f"{what}: {words}"


@mutation()
def bare(study, rng, other):
    """No preamble, or no file meta."""
    meta = bool(rng.random() < 0.5)
    paths, words = some(study, rng)
    for path in paths:
        try:
            path.write_bytes(path.read_bytes()[132:] if meta else damage.bare(load(path)))
        except Exception:  # an earlier mutation has spoilt it
            continue
    return f"no {'preamble' if meta else 'file meta'}: {words}"


# Mutants --------------------------------------------------------------------------------------------------------------


def draw(seed, bases=BASES):
    """What a seed stands for: (number of its base study, [(mutation, seed of that)])."""
    rng = np.random.default_rng(seed)
    base = int(rng.integers(bases))
    count = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
    return base, [(str(rng.choice(list(MUTATIONS))), [seed, k]) for k in range(count)]


def write_bases(folder, count=BASES):
    """Good studies below `folder`, one a number from 0, unless they are there."""
    import tiny

    for number in range(count):
        if not (folder / str(number)).is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as place:
                tiny.write_study(Path(place) / "study", seed=3 + number, slices=(7, 9), pixels=(96, 80))
                os.rename(Path(place) / "study", folder / str(number))
    return [folder / str(number) for number in range(count)]


def make(seed, bases, study, only=None):
    """Write the mutant of a seed as the folder `study`; only: numbers of the mutations to apply. Returns (number of
    its base, the mutations' names, descriptions)."""
    base, mutations = draw(seed, len(bases))
    shutil.copytree(bases[base], study)
    names, words = [], []
    for number, (name, own_seed) in enumerate(mutations):
        if only is None or number in only:
            names.append(name)
            with pydicom.config.disable_value_validation():
                other = bases[(base + 1) % len(bases)]
                words.append(f"{name}: {MUTATIONS[name][0](study, np.random.default_rng(own_seed), other)}")
    return base, names, words


def read(study):
    """What the kit reads of a study's folder, on the networks' scale."""
    import tiny

    return normalise_study(read_study(study, tiny.SERIES))


def corners_lps(volume, shape):
    """Where three corners of a (rows, columns) image would lie in each slice: (n, 3, 3) LPS mm."""
    n, (rows, columns) = len(volume.array), shape
    ends = np.array([[0, 0], [0, columns - 1], [rows - 1, 0]])
    places = np.concatenate([np.repeat(np.arange(n), 3)[:, None], np.tile(ends, (n, 1))], 1)
    return volume.voxel_to_lps(places).reshape(n, 3, 3)


def slices_of(study, series_id, shape):
    """[(pixels, corners, instance number)] of a series' volumes, in all."""
    return [
        (volume.array[k], place, int(volume.instance_numbers[k]))
        for volume in study.volumes
        if volume.series_id == series_id
        for k, place in enumerate(corners_lps(volume, shape))
    ]


def greys_differ(one, two):
    """(mean difference, correlation) of two slices, on what both show: not where padding blackens up to a third."""
    rows, columns = np.minimum(one.shape, two.shape)
    one, two = (pixels[:rows, :columns].astype(np.float64) for pixels in (one, two))
    black = two == 0
    if 0 < black.mean() < 1 / 3:
        one, two = one[~black], two[~black]
    if (one == two).all():
        return 0.0, 1.0
    alike = np.corrcoef(one.ravel(), two.ravel())[0, 1] if one.std() > 0 and two.std() > 0 else 0.0
    return float(np.abs(one - two).mean()), float(alike)


def changes(good, bad):
    """How the volumes of a study differ from those of the unmutated one: sentences, none where they do not.

    A slice that lies where one of the good study's does is held against that, on what both show of it.
    """
    found = []
    for series_id in sorted({volume.series_id for volume in (*good.volumes, *bad.volumes)}):
        shapes = [v.array.shape[1:] for study in (good, bad) for v in study.volumes if v.series_id == series_id]
        free, left, moved, grey = slices_of(bad, series_id, shapes[0]), [], [], []
        for pixels, place, number in slices_of(good, series_id, shapes[0]):
            away = [np.linalg.norm(other - place, axis=-1).max() for _, other, _ in free]
            if not away or min(away) > MOVED_MM:
                left.append((place, number))
                continue
            difference, alike = greys_differ(pixels, free.pop(int(np.argmin(away)))[0])
            if difference > GREY or alike < CORRELATION:
                grey.append((difference, alike))
        missing = 0
        for place, number in left:
            again = [k for k, (_, _, other) in enumerate(free) if other == number]
            missing += not again
            if again:
                moved.append(float(np.linalg.norm(free.pop(again[0])[1] - place, axis=-1).max()))
        if grey:
            most, least = max(difference for difference, _ in grey), min(alike for _, alike in grey)
            found.append(f"{series_id}: greys of {len(grey)} slices, by up to {most:.2f}, correlation from {least:.2f}")
        if moved:
            found.append(f"{series_id}: geometry of {len(moved)} slices, by up to {max(moved):.4g} mm")
        if missing:
            found.append(f"{series_id}: {missing} slices are missing")
        if free:
            found.append(f"{series_id}: {len(free)} slices more")
    return found


def culprits(seed, bases, good, names, folder):
    """Which of several mutations change a study silently when each is alone: names, those of all where none does."""
    alone = []
    for number, name in enumerate(names):
        study = folder / f"alone{number}" / "5"
        make(seed, bases, study, [number])
        found = read(study)
        if changes(good, found) and not found.problems:
            alone.append(name)
        shutil.rmtree(study.parent)
    return alone or names


class Peak:
    """The resident memory's peak since this was made, in MB above what it was then."""

    def __init__(self):
        self.reset = Path("/proc/self/clear_refs")
        try:
            self.reset.write_text("5")
        except OSError:  # not Linux: the process' peak so far is all there is
            pass
        self.start = self.now("VmRSS")

    @staticmethod
    def now(what):
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith(what))) // 1024
        except OSError:
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << 20)

    def mb(self):
        return max(0, self.now("VmHWM") - self.start)


def try_reading(seed, bases, good, study):
    """Make, read and compare one mutant: its record so far."""
    base, names, words = make(seed, bases, study)
    record = {"seed": seed, "base": base, "kinds": names, "what": "; ".join(words), "escaped": "", "crash": ""}
    peak, started = Peak(), time.monotonic()
    try:
        found = read(study)
    except Exception as error:
        record["escaped"] = f"reading: {type(error).__name__}: {error}"[:300]
        found = None
    record |= {"read_s": round(time.monotonic() - started, 3), "read_mb": peak.mb()}
    record["problems"] = [] if found is None else [problem[:160] for problem in found.problems[:4]]
    record["changes"] = [] if found is None else changes(good[base], found)
    return record


def try_predicting(records, folder, members, bases, known):
    """Predict the mutants below folder/test_images and the neighbours; adds to the records.

    known: {"neighbours": the rows of each alone, "problems": what the log says of each base}."""
    put_neighbours(folder / "test_images", bases)
    ids = [*NEIGHBOURS, *(1000 + record["seed"] for record in records)]
    write_descriptions(folder, ids)
    peak, started = Peak(), time.monotonic()
    try:
        submission, log, _, _ = utils.infer_studies(
            folder, "test", members, default_ensemble(), folder / "out", readers=1
        )
    except Exception as error:
        for record in records:
            record["escaped"] = record["escaped"] or f"infer_studies: {type(error).__name__}: {error}"[:300]
        return False
    wall_s = time.monotonic() - started
    log = log.set_index("study_id")
    table = submission.set_index("row_id")
    assert table.index.is_unique, "a row is there twice"
    rows_of = table.reindex([row for i in ids for row in row_ids(i)])[list(utils.SEVERITIES)]
    rows_of = dict(zip(ids, rows_of.to_numpy(np.float64).reshape(len(ids), -1, 3), strict=True))
    off = max(float(np.abs(rows_of[i] - known["neighbours"][str(i)]).max()) for i in NEIGHBOURS)
    for record in records:
        study_id = 1000 + record["seed"]
        rows = rows_of[study_id]
        good = np.isfinite(rows).all(1) & (rows >= 0).all(1) & (np.abs(rows.sum(1) - 1) < 1e-9)
        record["rows"] = int(good.sum())
        record["neighbours"] = off
        record["predict_s"] = round(float(log.loc[study_id, ["reading_s", "locating_s", "cropping_s"]].sum()), 3)
        record["predict_mb"], record["beside"] = peak.mb(), len(records) - 1
        record["batch_s"] = round(wall_s, 1)
        said = damage.news(str(log.loc[study_id, "problems"]), known["problems"][record["base"]])
        record["said"] = [sentence[:160] for sentence in said[:4]]
    return True


def put_neighbours(tests, bases):
    """Good studies: the first base, brighter by a factor of each one's own."""
    for study_id in NEIGHBOURS:
        shutil.copytree(bases[0], tests / str(study_id))
        rng = np.random.default_rng(study_id)
        for path in sorted((tests / str(study_id)).glob("*/*.dcm")):
            dataset = load(path)
            put(dataset, values(dataset) * rng.uniform(0.6, 1.4))
            save(dataset, path)


def write_descriptions(folder, ids):
    import pandas as pd
    import tiny

    rows = [(study_id, series_id, what) for study_id in ids for series_id, what in tiny.SERIES.items()]
    columns = ["study_id", "series_id", "series_description"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "test_series_descriptions.csv", index=False)


def learn(bases, members, folder):
    """What good studies give: `known` of try_predicting."""
    tests = folder / "test_images"
    put_neighbours(tests, bases)
    for number, base in enumerate(bases):
        shutil.copytree(base, tests / str(10 + number))
    write_descriptions(folder, [*NEIGHBOURS, *range(10, 10 + len(bases))])
    submission, log, _, _ = utils.infer_studies(folder, "test", members, default_ensemble(), folder / "out", readers=1)
    table, log = submission.set_index("row_id"), log.set_index("study_id")
    rows = {str(i): table.loc[row_ids(i), list(utils.SEVERITIES)].to_numpy().tolist() for i in NEIGHBOURS}
    return {"neighbours": rows, "problems": [str(log.loc[10 + k, "problems"]) for k in range(len(bases))]}


def speaks(record):
    """Whether study.problems or the log say anything of the mutant."""
    return bool(record["problems"] or record.get("said"))


def finish(record, bases, good, folder):
    """Whether the mutant is silently changed, and by which mutations."""
    record["silent"] = bool(record["changes"]) and not speaks(record)
    record["culprits"] = []
    if record["silent"]:
        names = record["kinds"]
        record["culprits"] = (
            names if len(names) == 1 else culprits(record["seed"], bases, good[record["base"]], names, folder)
        )
    return record


# Batches in processes of their own ------------------------------------------------------------------------------------


def work(seeds, group, chosen):
    """A worker: mutants of these seeds, `group` of them predicted together; one line each on chosen.records."""
    import tiny

    torch.set_num_threads(1)
    bases = write_bases(chosen.out / "bases")
    weights = chosen.out / ("weights_fast" if chosen.fast else "weights")
    if not weights.is_dir():
        with tempfile.TemporaryDirectory(dir=chosen.out) as place:
            tiny.write_members(Path(place) / "weights", random_spinenet=chosen.fast)
            os.rename(Path(place) / "weights", weights)
    members = utils.load_members([weights], device="cpu")
    current = chosen.out / "current"
    good, learnt = [read(base) for base in bases], chosen.out / "known.json"
    if not learnt.is_file():
        with tempfile.TemporaryDirectory() as place:
            learnt.write_text(json.dumps(learn(bases, members, Path(place))))
    known = json.loads(learnt.read_text())
    limit_memory(chosen.memory)
    start_mb = Peak.now("VmRSS")
    for first in range(0, len(seeds), group):
        part = seeds[first : first + group]
        with tempfile.TemporaryDirectory() as place:
            place, records = Path(place), []
            for seed in part:
                current.write_text(json.dumps([seed]))
                records.append(try_reading(seed, bases, good, place / "test_images" / str(1000 + seed)))
            current.write_text(json.dumps(part))
            asked = [r for r in records if r["seed"] % chosen.predict == 0 or (r["changes"] and not r["problems"])]
            if asked:
                sound = try_predicting(asked, place, members, bases, known)
                if len(part) > 1 and not (sound and asked[0]["predict_mb"] < 500):
                    sys.exit(3)  # one at a time, to know which it was
            for seed, record in zip(part, records, strict=True):
                current.write_text(json.dumps([seed]))
                line = json.dumps(finish(record, bases, good, place))
                with (chosen.out / "records.jsonl").open("a") as file:
                    file.write(line + "\n")
        current.write_text("[]")
        if Peak.now("VmRSS") > start_mb + chosen.memory // 4:
            sys.exit(4)  # what a mutant leaves behind is not to be the next one's end


def limit_memory(extra_mb):
    """No more address space than this above what is taken now, where the system knows such a limit."""
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (extra_mb << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (OSError, ValueError):
        pass


def read_records(out):
    path = out / "records.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {record["seed"]: record for record in map(json.loads, lines)}


def run(chosen):
    """All mutants that have no record yet, batch by batch."""
    first = chosen.seed * 1_000_000
    seeds = range(first, first + chosen.count)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "bases").mkdir(exist_ok=True)
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "lumbar").rglob("*.py")))).hexdigest()
    kept = chosen.out / "code"
    if kept.is_file() and kept.read_text() != code:
        sys.exit(f"{chosen.out} holds mutants read by other code of lumbar/: take another --out, or empty it")
    kept.write_text(code)
    todo = [seed for seed in seeds if seed not in read_records(chosen.out)]
    queue = [(todo[k : k + chosen.batch], chosen.group) for k in range(0, len(todo), chosen.batch)]
    started, current = time.monotonic(), chosen.out / "current"
    while queue:
        part, group = queue.pop(0)
        current.write_text("null")
        command = [sys.executable, __file__, "--work", ",".join(map(str, part)), "--group", str(group)]
        command += ["--out", str(chosen.out), "--memory", str(chosen.memory)]
        command += ["--predict", str(chosen.predict)] + ["--fast"] * chosen.fast
        log_path = chosen.out / "worker.log"
        with log_path.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        why = ""
        while process.poll() is None:
            time.sleep(0.5)
            at = json.loads(current.read_text() or "null")
            if time.time() - current.stat().st_mtime > chosen.time * max(1, len(at or [])) + 120 * (at is None):
                why = f"killed after {chosen.time} s"
                process.kill()
                process.wait()
        left = [seed for seed in part if seed not in read_records(chosen.out)]
        if left:
            at = json.loads(current.read_text() or "null")
            if at is None:
                sys.exit(f"the worker ends before its first mutant: {log_path.read_text(errors='replace')[-600:]}")
            if len(at) > 1:
                queue[:0] = [(at, 1)] + [([s for s in left if s not in at], group)] * bool(set(left) - set(at))
            elif at and at[0] in left:
                tail = " ".join(log_path.read_text(errors="replace").split())[-300:]
                note_crash(chosen.out, at[0], why or f"status {process.returncode}: {tail}")
                queue[:0] = [([s for s in left if s != at[0]], group)] * (len(left) > 1)
            else:
                queue[:0] = [(left, group)]
        records = read_records(chosen.out)
        done = [records[seed] for seed in seeds if seed in records]
        minutes = (time.monotonic() - started) / 60
        silent = sum(r.get("silent", False) for r in done)
        trouble = sum(bool(r["escaped"] or r["crash"]) for r in done)
        print(
            f"[{len(done)}/{len(seeds)}, {minutes:.1f} min] {silent} silent, {trouble} escaped or crashed", flush=True
        )
        (chosen.out / "summary.md").write_text(summary(done))
    done = [record for seed, record in read_records(chosen.out).items() if seed in seeds]
    (chosen.out / "summary.md").write_text(summary(done))
    print((chosen.out / "summary.md").read_text())


def note_crash(out, seed, why):
    """The record of a mutant that took its process down; --only says what exactly it was."""
    base, mutations = draw(seed)
    names = [name for name, _ in mutations]
    record = {"seed": seed, "base": base, "kinds": names, "what": ", ".join(names), "escaped": "", "crash": why}
    with (out / "records.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def summary(records):
    """The counts as Markdown."""
    if not records:
        return "no mutants\n"
    finished, predicted = [r for r in records if not r["crash"]], [r for r in records if "rows" in r]
    worst = {
        "seconds to read": max(records, key=lambda r: r.get("read_s", 0)),
        "seconds to read, locate and cut": max(records, key=lambda r: r.get("predict_s", 0)),
        "MB more while reading": max(records, key=lambda r: r.get("read_mb", 0)),
        "MB more while predicting": max(records, key=lambda r: r.get("predict_mb", 0)),
    }
    keys = dict(zip(worst, ("read_s", "predict_s", "read_mb", "predict_mb"), strict=True))
    silent = [record for record in finished if record["silent"]]
    known = [r for r in silent if all(reason_for(name, r) for name in r["culprits"])]
    lines = [
        "| | |",
        "|---|---|",
        f"| mutants | {len(records)} |",
        f"| exceptions that escape | {sum(bool(r['escaped']) for r in records)} |",
        f"| processes that end (crash, memory, time) | {sum(bool(r['crash']) for r in records)} |",
        f"| predicted mutants with 25 sound rows | {sum(r['rows'] == 25 for r in predicted)} of {len(predicted)} |",
        f"| neighbours' largest difference | {max((r['neighbours'] for r in predicted), default=0):.2g} |",
        *(f"| worst {name} | {r.get(keys[name], 0):.4g} (seed {r['seed']}) |" for name, r in worst.items()),
        f"| changed, and said | {sum(bool(r['changes']) and speaks(r) for r in finished)} |",
        f"| unchanged, and something said | {sum(not r['changes'] and speaks(r) for r in finished)} |",
        f"| unchanged, nothing said | {sum(not r['changes'] and not speaks(r) for r in finished)} |",
        f"| silently changed | {len(silent)} |",
        f"| ... of kinds that cannot be known | {len(known)} |",
        f"| ... **to be judged** | {len(silent) - len(known)} |",
        "",
        "Silent changes by kind (of mutants with several mutations, those that change it silently alone):",
        "",
        "| kind | mutants with it | silent | escaped or crashed | |",
        "|---|---|---|---|---|",
    ]
    of_kind = Counter(name for record in records for name in set(record["kinds"]))
    silent_of = Counter(name for record in silent for name in set(record["culprits"]))
    trouble_of = Counter(n for r in records if r["escaped"] or r["crash"] for n in set(r["kinds"]))
    for name in sorted(
        MUTATIONS, key=lambda name: (bool(MUTATIONS[name][1]) and not MUTATIONS[name][2], -silent_of[name], name)
    ):
        _, reason, of = MUTATIONS[name]
        said = f"undetectable{f' ({of})' if of else ''}: {reason}" if reason else ""
        lines.append(f"| {name} | {of_kind[name]} | {silent_of[name]} | {trouble_of[name]} | {said} |")
    lines += ["", "To be judged:", ""]
    judged = [record for record in silent if record not in known]
    lines += [
        f"- {r['seed']}: {r['what'].replace('|', '/')} -> {'; '.join(r['changes'])} (by {', '.join(r['culprits'])})"
        for r in judged[:200]
    ]
    lines += ["", "Escaped or crashed:", ""]
    lines += [
        f"- {r['seed']}: {r['what']} -> {r['escaped'] or r['crash']}" for r in records if r["escaped"] or r["crash"]
    ]
    return "\n".join(lines) + "\n"


def show(chosen):
    """One mutant alone, in this process, its files kept."""
    import tiny

    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "bases").mkdir(exist_ok=True)
    bases = write_bases(chosen.out / "bases")
    place = chosen.out / f"mutant_{chosen.only}"
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = tiny.write_members(Path(folder) / "weights", random_spinenet=chosen.fast)
        members = utils.load_members([weights], device="cpu")
        good, known = [read(base) for base in bases], learn(bases, members, Path(folder))
    record = try_reading(chosen.only, bases, good, place / "test_images" / str(1000 + chosen.only))
    try_predicting([record], place, members, bases, known)
    print(json.dumps(finish(record, bases, good, place), indent=1))
    print(f"files: {place / 'test_images' / str(1000 + chosen.only)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=200, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="mutants of another seed are others")
    parser.add_argument("--out", type=Path, default=Path("mutants"), help="folder of records.jsonl and summary.md")
    parser.add_argument("--only", type=int, help="the mutant with this seed (as records and summary name it) alone")
    parser.add_argument(
        "--predict", type=int, default=1, help="predict every n-th, and those that are read otherwise without a word"
    )
    parser.add_argument("--fast", action="store_true", help="a small random SpineNet instead of the shipped one")
    parser.add_argument("--batch", type=int, default=96, help="mutants a process")
    parser.add_argument("--group", type=int, default=8, help="mutants that are predicted together")
    parser.add_argument("--memory", type=int, default=8000, help="MB of address space above the loaded weights")
    parser.add_argument("--time", type=int, default=180, help="seconds of a mutant before its process is killed")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.predict < 1:
        parser.error("--predict is 1 or more")
    if chosen.work:
        work([int(seed) for seed in chosen.work.split(",")], chosen.group, chosen)
    elif chosen.only is not None:
        show(chosen)
    else:
        run(chosen)


if __name__ == "__main__":
    main()
