"""What damaged files cost: the test studies of a finished demo run, all of them damaged in one way, scored beside the
clean ones, and whether the log says so.

    python tests/benchmarks/bench_damage.py runs/demo --out damage.md
    python tests/benchmarks/bench_damage.py runs/demo --out damage.md --damages overlay_bits,spacing_x2_t2 --studies 4
    python tests/benchmarks/bench_damage.py --list

The aim: a score within .02 of the clean one, or every damaged study's log speaks; never neither. A log speaks where it
has a sentence that the clean study's log has not (numbers aside). A kind is one small function over a pydicom Dataset
or over a series' folder; what it does is the same in every run. Each kind runs in a worker process that is killed
beyond --memory or --time; finished kinds are kept in a JSON file beside --out and not done again while lumbar/, the run
and --studies are the same. Networks run on the CPU. A study that is read to the very volumes and problems of the clean
one keeps the clean one's predictions, unless --whole. Weights: those of the run; labels: its phantom_test_labels.csv. A
script, which pytest does not collect.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import damage  # noqa: E402
import numpy as np  # noqa: E402
from damage import TOP, load, put, put_numbers, put_text, save, slices, text_of, values  # noqa: E402

T1, T2, AXIAL = "Sagittal T1", "Sagittal T2/STIR", "Axial T2"
EVERY = (T1, T2, AXIAL)
WITHIN = 0.02  # of the clean score
CHANGED = 0.1  # a study whose probabilities move by more than this anywhere has another answer


@dataclass
class Kind:
    """One kind of damage. work: (Dataset, index, rng) -> None or a Dataset in its place; or, where `folder` is set,
    (series folder, rng) -> None. series: descriptions of the series that are damaged; middle: one slice of each."""

    name: str
    family: str
    what: str
    work: object
    series: tuple = EVERY
    middle: bool = False
    folder: bool = False

    @property
    def harmless(self):
        """Whether the files still hold all of the same picture, so that the score should stay what it is."""
        return self.name in HARMLESS

    def apply(self, study, described, seed):
        """Damage one study's folder. described: dict series_id -> description."""
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), seed])
        for series_id, description in described.items():
            place = study / str(series_id)
            if description not in self.series or not place.is_dir():
                continue
            if self.folder:
                self.work(place, rng)
                continue
            paths = slices(place)
            chosen = [len(paths) // 2] if self.middle else range(len(paths))
            for index in chosen:
                dataset = load(paths[index])
                changed = self.work(dataset, index, rng)
                save(dataset if changed is None else changed, paths[index])


KINDS = {}
HARMLESS = (
    "rewritten overlay_bits signed_12_bare signed_12 allocated_32 big_endian monochrome1 rle jpeg2000 jpeg-ls rescaled "
    "twice_0.02mm twice_0.5mm twice_1.5mm averages digits_spacing_1e-4 digits_orientation_1e-4 digits_position_1e-4 "
    "digits_all_1e-5 digits_all_1e-6 between_is_gap between_0 between_-4 between_1e6 between_n/a no_thickness "
    "thickness_0 thickness_thin thickness_1e6 one_twice numbers_reversed names_shuffled suffix_upper_case suffix_none "
    "suffix_ima no_preamble no_meta spacing_as_ut spacing_as_lt position_as_lo geometry_as_un blanked frames_0 "
    "frames_empty litter deflated sparse_300mb empty_items"
).split()


def kind(name, family, what, work, **options):
    KINDS[name] = Kind(name, family, what, work, **options)


# Pixels ---------------------------------------------------------------------------------------------------------------


def overlay_bits(dataset, index, rng):
    stored = values(dataset)
    above = np.where(rng.random(stored.shape) < 0.03, rng.integers(1, 16, stored.shape), 0)
    put(dataset, stored | above << 12, stored=12)


def signed_12(dataset, index, rng, extended):
    """Values around 0, with the intercept that makes them the same; above the 12 bits the sign, or zeros."""
    offset = 200  # within the tissue
    stored = np.minimum(values(dataset), 2047 + offset) - offset
    put(dataset, stored if extended else stored & 0xFFF, stored=12, signed=True)
    slope = float(dataset.get("RescaleSlope") or 1)
    dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:g}", f"{offset * slope:g}"


def eight_bits(dataset, index, rng):
    put(dataset, np.minimum(values(dataset) >> 3, 255), 8)


def monochrome1(dataset, index, rng):
    put(dataset, TOP - values(dataset), stored=12)
    dataset.PhotometricInterpretation = "MONOCHROME1"


def padded(dataset, index, rng, mask, value, tag=True, limit=None, stored=16):
    """Padding outside of `mask` (a function of the shape); with a limit any value between it and `value`."""
    pixels, signed = values(dataset), value < 0
    outside = mask(pixels.shape)
    pixels[outside] = value if limit is None else rng.integers(value, limit + 1, outside.sum())
    put(dataset, pixels, stored=stored, signed=signed)
    if tag:
        dataset.add_new(0x00280120, "SS" if signed else "US", value)
    if limit is not None:
        dataset.add_new(0x00280121, "SS" if signed else "US", limit)


def blacked(dataset, index, rng, mask):
    stored = values(dataset)
    stored[mask(stored.shape)] = 0
    put(dataset, stored)


def rescaled(dataset, index, rng, slope, intercept):
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept


def repainted(dataset, index, rng, paint):
    put(dataset, paint(values(dataset)))


family = "pixels"
kind("rewritten", family, "control: read and written by pydicom, unchanged", lambda d, k, r: None)
kind("overlay_bits", family, "12 bits stored of 16, others above them in 3% of the pixels", overlay_bits)
kind("signed_12_bare", family, "signed 12 bits of 16, sign not extended", partial(signed_12, extended=False))
kind("signed_12", family, "signed 12 bits of 16, sign extended", partial(signed_12, extended=True))
kind(
    "high_bit_15",
    family,
    "12 bits stored in the upper bits, HighBit 15",
    lambda d, k, r: put(d, values(d) << 4, stored=12, high=15),
)
kind(
    "high_bit_stated",
    family,
    "12 bits stored, HighBit says 15, pixels as ever",
    lambda d, k, r: put(d, values(d), stored=12, high=15),
)
kind("allocated_32", family, "32 bits allocated and stored", lambda d, k, r: put(d, values(d), 32))
kind("allocated_8", family, "8 bits, an eighth of the grey levels", eight_bits)
kind("big_endian", family, "explicit VR big endian", lambda d, k, r: damage.big_endian(d))
kind("monochrome1", family, "MONOCHROME1, pixels turned over", monochrome1)
for how in ("rle", "jpeg2000", "jpeg-ls", "jpeg"):
    kind(how, family, f"compressed: {how}", lambda d, k, r, how=how: damage.compress(d, how))
for place, mask in {"rows": damage.border, "corners": damage.corners}.items():
    kind(f"black_{place}", family, f"control: {place} are 0, no padding", partial(blacked, mask=mask))
    for value in (-2000, -32768, 65535):
        work = partial(padded, mask=mask, value=value)
        kind(f"padding_{place}_{value}", family, f"padding value {value} announced, in {place}", work)
        work = partial(padded, mask=mask, value=value, tag=False)
        kind(f"unannounced_{place}_{value}", family, f"{value} in {place}, no tag", work)
    work = partial(padded, mask=mask, value=4095, stored=12)
    kind(f"padding_{place}_4095", family, f"padding value 4095 of 12 bits announced, in {place}", work)
    work = partial(padded, mask=mask, value=-2000, limit=-1500)
    kind(f"padding_range_{place}", family, f"padding from -2000 to its range limit -1500, in {place}", work)
kind("rescaled", family, "RescaleSlope 2.5, intercept -100 in all", partial(rescaled, slope="2.5", intercept="-100"))
for slope in ("1000", "0.001", "4", "-1"):
    work = partial(rescaled, slope=slope, intercept="4095" if slope == "-1" else "0")
    kind(f"slice_slope_{slope}", family, f"one slice of each series: RescaleSlope {slope}", work, middle=True)
paints = {
    "swapped": ("bytes swapped", lambda v: (v >> 8) | ((v & 255) << 8)),
    "inverted": ("polarity turned", lambda v: v.max() - v),
    "black": ("all 0", lambda v: 0 * v),
    "saturated": ("all 4095", lambda v: 0 * v + TOP),
    "noise": ("noise", lambda v: np.random.default_rng(v.size).integers(0, v.max() + 1, v.shape)),
}
for name, (what, paint) in paints.items():
    work = partial(repainted, paint=paint)
    kind(f"slice_{name}", family, f"one slice of each series: {what}", work, middle=True)
for short, description in {"t1": T1, "t2": T2, "axial": AXIAL}.items():
    work = partial(repainted, paint=lambda v: TOP - v)
    kind(f"series_inverted_{short}", family, f"{description}: polarity turned", work, series=(description,))


# Scale and geometry ---------------------------------------------------------------------------------------------------


def spaced(dataset, index, rng, factor):
    put_numbers(dataset, "PixelSpacing", factor * damage.numbers(dataset, "PixelSpacing"))


def anisotropic(dataset, index, rng, swapped):
    """Every second row is left out; the spacing says so, or says it of the columns."""
    put(dataset, values(dataset)[::2])
    spacing = damage.numbers(dataset, "PixelSpacing") * (2, 1)
    put_numbers(dataset, "PixelSpacing", spacing[::-1] if swapped else spacing)


def noisy(dataset, index, rng, keywords, relative):
    for keyword in keywords:
        exact = damage.numbers(dataset, keyword)
        put_numbers(dataset, keyword, exact * (1 + relative * rng.uniform(-1, 1, exact.shape)))


def twice(folder, rng, shift_mm):
    """A second pass over all places, shifted along the normal, numbered after the first."""
    paths = slices(folder)
    count = max(int(path.stem) for path in paths)
    for path in paths:
        dataset = load(path)
        put(dataset, values(dataset) + rng.normal(0, 5, (dataset.Rows, dataset.Columns)).clip(0, 20).astype(int))
        damage.move(dataset, shift_mm * damage.normal(dataset))
        damage.renumber(dataset, count + int(path.stem))
        dataset.AcquisitionNumber = "2"
        save(dataset, path.with_name(f"{count + int(path.stem)}.dcm"))


def two_contrasts(folder, rng, jitter_mm, order, about):
    """Each place once more with dark for bright; numbered after the first pass ("passes") or in turns ("turns").
    about: (Dataset, 1 or 2) states which of the two this is."""
    datasets = [load(path) for path in slices(folder)]
    for path in slices(folder):
        path.unlink()
    for index, original in enumerate(datasets):
        pixels, place = values(original), damage.numbers(original, "ImagePositionPatient")
        other = 3 * (np.percentile(pixels, 99).astype(int) - np.minimum(pixels, np.percentile(pixels, 99).astype(int)))
        for which, shown in enumerate((pixels, other), 1):
            number = (which - 1) * len(datasets) + index + 1 if order == "passes" else 2 * index + which
            put(original, shown)
            aside = jitter_mm * rng.uniform(-1, 1) * damage.normal(original)
            put_numbers(original, "ImagePositionPatient", place + aside)
            damage.renumber(original, number)
            about(original, which)
            save(original, folder / f"{number}.dcm")


def echoes(dataset, which):
    dataset.EchoNumbers, dataset.EchoTime = str(which), ("12", "90")[which - 1]


def b_values(dataset, which):
    dataset.AcquisitionNumber = str(which)
    dataset.add_new(0x00189087, "FD", (0.0, 800.0)[which - 1])


def averages(folder, rng):
    twice(folder, rng, 0.0)


def stated(**texts):
    """Elements set to these texts."""

    def work(dataset, index, rng):
        for keyword, text in texts.items():
            put_text(dataset, keyword, text)

    return work


def gap(dataset, index, rng):
    between = float(dataset.SpacingBetweenSlices) - float(dataset.SliceThickness)
    put_numbers(dataset, "SpacingBetweenSlices", max(between, 0.1))


def without_thickness(dataset, index, rng):
    for keyword in ("SliceThickness", "SpacingBetweenSlices"):
        if keyword in dataset:
            delattr(dataset, keyword)


def every_third_lost(folder, rng):
    for path in slices(folder)[1::3]:
        path.unlink()


def one_lost(folder, rng):
    paths = slices(folder)
    paths[len(paths) // 2].unlink()


def one_twice(folder, rng):
    paths = slices(folder)
    dataset = load(paths[len(paths) // 2])
    damage.renumber(dataset, 900)
    save(dataset, folder / "900.dcm")


def renamed(folder, rng, name, number=True):
    """name: (list of numbers) -> as many names; number: InstanceNumber goes with the name."""
    paths = slices(folder)
    names = name([int(path.stem) for path in paths], rng)
    datasets = [load(path) for path in paths]
    for path in paths:
        path.unlink()
    for dataset, new in zip(datasets, names, strict=True):
        if number:
            dataset.InstanceNumber = str(new)
        save(dataset, folder / f"{new}.dcm")


family = "geometry"
for short, description in {"t1": T1, "t2": T2, "axial": AXIAL}.items():
    for factor in (2, 0.5, 10) if short == "t2" else (2, 0.5):
        what = f"{description}: PixelSpacing x {factor:g}"
        kind(f"spacing_x{factor:g}_{short}", family, what, partial(spaced, factor=factor), series=(description,))
kind("spacing_x2_all", family, "PixelSpacing x 2 in all series", partial(spaced, factor=2))
kind("anisotropic", family, "control: every second row left out, PixelSpacing right", partial(anisotropic, swapped=0))
kind("anisotropic_swapped", family, "the same, PixelSpacing in the wrong order", partial(anisotropic, swapped=1))
for shift in (0.02, 0.5, 1.5):
    kind(
        f"twice_{shift:g}mm",
        family,
        f"each place twice, {shift:g} mm apart",
        partial(twice, shift_mm=shift),
        folder=True,
    )
for order in ("passes", "turns"):
    work = partial(two_contrasts, jitter_mm=1e-4, order=order, about=echoes)
    kind(f"echoes_{order}", family, f"a second echo at each place, 1e-4 mm aside, in {order}", work, folder=True)
kind(
    "b_values",
    family,
    "T2: a second b-value at each place, its numbers in turns",
    partial(two_contrasts, jitter_mm=0.0, order="turns", about=b_values),
    series=(T2,),
    folder=True,
)
kind("averages", family, "T2: each place twice, other noise", averages, series=(T2,), folder=True)
for short, keyword in {
    "spacing": "PixelSpacing",
    "orientation": "ImageOrientationPatient",
    "position": "ImagePositionPatient",
}.items():
    work = partial(noisy, keywords=[keyword], relative=1e-4)
    kind(f"digits_{short}_1e-4", family, f"{keyword} differs by 1e-4 of itself from slice to slice", work)
for relative in ("1e-5", "1e-6"):
    work = partial(
        noisy,
        keywords=["PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"],
        relative=float(relative),
    )
    kind(f"digits_all_{relative}", family, f"all three differ by {relative}", work)
kind("between_is_gap", family, "SpacingBetweenSlices holds the gap", gap)
for text in ("0", "-4", "1e6", "n/a"):
    kind(f"between_{text}", family, f"SpacingBetweenSlices is {text}", stated(SpacingBetweenSlices=text))
kind("no_thickness", family, "no SliceThickness, no SpacingBetweenSlices", without_thickness)
for text in ("0", "thin", "1e6"):
    kind(f"thickness_{text}", family, f"SliceThickness is {text}", stated(SliceThickness=text))
kind("every_third_lost", family, "every third slice is missing", every_third_lost, folder=True)
kind("one_lost", family, "the middle slice is missing", one_lost, folder=True)
kind("one_twice", family, "one slice twice", one_twice, folder=True)
work = partial(renamed, name=lambda numbers, rng: numbers[::-1])
kind("numbers_reversed", family, "names and instance numbers run the other way", work, folder=True)
work = partial(renamed, name=lambda numbers, rng: rng.permutation(numbers), number=False)
kind("names_shuffled", family, "names in another order than instance numbers", work, folder=True)


# Files ----------------------------------------------------------------------------------------------------------------


def suffix(folder, rng, end):
    for path in slices(folder):
        path.rename(path.with_suffix(end))


def rewritten(make):
    """make(Dataset, bytes of the file) -> bytes of all files of the series."""

    def work(folder, rng):
        for path in slices(folder):
            path.write_bytes(make(load(path), path.read_bytes()))

    return work


def middle_file(make):
    """make(path): what happens to one file of the series."""

    def work(folder, rng):
        paths = slices(folder)
        make(paths[len(paths) // 2])

    return work


def restated(vr, *keywords):
    def work(dataset, index, rng):
        for keyword in keywords:
            put_text(dataset, keyword, text_of(dataset, keyword), vr)

    return work


def blanked(dataset, index, rng):
    for keyword in (
        "SliceThickness SpacingBetweenSlices RescaleSlope RescaleIntercept InstanceNumber PhotometricInterpretation "
        "WindowCenter WindowWidth NumberOfFrames PlanarConfiguration SeriesDescription"
    ).split():
        put_text(dataset, keyword, "")
    put_text(dataset, "PixelPaddingValue", "", "US")


def litter(folder, rng):
    for path in slices(folder):
        path.with_name("._" + path.name).write_bytes(damage.APPLE_DOUBLE)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(6000))
    (folder / "Thumbs.db").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(5000))
    directory = load(slices(folder)[0])
    directory.file_meta.MediaStorageSOPClassUID = directory.SOPClassUID = "1.2.840.10008.1.3.10"
    for keyword in ("PixelData", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(directory, keyword)
    save(directory, folder / "DICOMDIR")
    save(directory, folder.parent / "DICOMDIR")


def cut(path):
    os.truncate(path, path.stat().st_size * 6 // 10)


def sparse(path):
    """A copy of a slice with 300 MB of nothing behind it."""
    copy = path.with_name("998.dcm")
    shutil.copy(path, copy)
    os.truncate(copy, 300 << 20)


def wide(dataset, index, rng):
    shown = values(dataset)[::2, ::2][:200, :200]
    put(dataset, shown)
    put_numbers(dataset, "PixelSpacing", [9.9, 9.9])


family = "files"
for name, end in {"upper_case": ".DCM", "none": "", "ima": ".IMA"}.items():
    kind(f"suffix_{name}", family, f"files end in {end or 'nothing'}", partial(suffix, end=end), folder=True)
kind("no_preamble", family, "no preamble, file meta first", rewritten(lambda dataset, data: data[132:]), folder=True)
kind("no_meta", family, "implicit VR without file meta", rewritten(lambda d, data: damage.bare(d)), folder=True)
kind("spacing_as_ut", family, "PixelSpacing in VR UT", restated("UT", "PixelSpacing"))
kind("spacing_as_lt", family, "PixelSpacing in VR LT", restated("LT", "PixelSpacing"))
kind("position_as_lo", family, "ImagePositionPatient in VR LO", restated("LO", "ImagePositionPatient"))
geometry = ("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness")
kind("geometry_as_un", family, "all geometry in VR UN", restated("UN", *geometry))
kind("blanked", family, "optional elements there with no value", blanked)
kind("frames_0", family, "NumberOfFrames 0", stated(NumberOfFrames="0"))
kind("frames_empty", family, "NumberOfFrames empty", stated(NumberOfFrames=""))
kind("litter", family, "AppleDouble, .DS_Store, Thumbs.db, DICOMDIR beside", litter, folder=True)
kind("one_cut", family, "one file of each series cut at 60%", middle_file(cut), folder=True)
page = middle_file(lambda path: path.write_bytes(damage.WEB_PAGE))
kind("one_web_page", family, "one file of each series is a web page", page, folder=True)
kind("deflated", family, "deflated transfer syntax", lambda d, k, r: damage.deflate(d))
family = "huge or odd"
kind("sparse_300mb", family, "T2: one more file, of 300 MB", middle_file(sparse), series=(T2,), folder=True)
kind("wide_pixels", family, "T2: pixels of 9.9 mm", wide, series=(T2,))
kind("empty_items", family, "a private sequence of 600 empty items", lambda d, k, r: damage.sequence_of_nothing(d, 600))


# One kind, in a worker ------------------------------------------------------------------------------------------------


def content(folder):
    """Digest of all files of a study, by name."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            with path.open("rb") as file:  # the first megabytes: nothing else is of interest in a sparse file
                found.update(file.read(4 << 20))
    return found.hexdigest()


def as_read(utils, study, described):
    """Digest of what a study's folder is read to: its volumes on the networks' scale, and its problems."""
    from lumbar.data.dicom import read_study
    from lumbar.data.greys import normalise_study

    read = normalise_study(read_study(study, described))
    found = hashlib.sha256(json.dumps(read.problems).encode())
    for volume in read.volumes:
        about = volume.series_id, volume.description, volume.block, volume.array.shape, volume.thickness_mm
        found.update(json.dumps(about).encode() + volume.affine.tobytes() + volume.instance_numbers.tobytes())
        found.update(np.ascontiguousarray(volume.array))
    return found.hexdigest()


def worker(run, names, count, threads, folder, whole=False):
    """Do these kinds; beside each result, `current` names what is being done."""
    import pandas as pd
    import torch

    import utils
    from lumbar.serve.members import weight_folders

    torch.set_num_threads(threads)
    data = run / "data"
    table = pd.read_csv(data / "test_series_descriptions.csv")
    labels = utils.read_labels(data / "phantom_test_labels.csv")
    ids = [int(i) for i in labels["study_id"] if i in set(table["study_id"])][:count]
    labels, table = labels[labels["study_id"].isin(ids)], table[table["study_id"].isin(ids)]
    members = utils.load_members(weight_folders([run]), device="cpu")
    ensemble = json.loads((run / "05_inference" / "ensemble.json").read_text())
    clean = None
    if (folder / "clean.json").is_file():
        clean = json.loads((folder / "clean.json").read_text())
    for name in names:
        (folder / "current").write_text(name)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            place = Path(place)
            damaged, problem, digests = 0, "", {}
            for study_id in ids:
                study = place / "test_images" / str(study_id)
                shutil.copytree(data / "test_images" / str(study_id), study)
                rows = table[table["study_id"] == study_id]
                described = dict(zip(rows["series_id"], rows["series_description"], strict=True))
                if name != "clean":
                    before = content(study)
                    try:
                        KINDS[name].apply(study, described, study_id)
                    except RuntimeError as error:  # no encoder for this compression
                        problem = f"not tried: {' '.join(str(error).split())}"
                        break
                    damaged += content(study) != before
                try:
                    digests[str(study_id)] = as_read(utils, study, described)
                except Exception:  # whether infer_studies stands this is seen below
                    digests[str(study_id)] = ""
                if clean and not whole and digests[str(study_id)] == clean["digests"][str(study_id)]:
                    shutil.rmtree(study)
            row = {"damaged": damaged, "problem": problem, "digests": digests}
            if not problem:
                started = time.monotonic()
                try:
                    row |= outcome(utils, place, members, ensemble, labels, table, clean)
                except Exception as error:
                    row["problem"] = f"{type(error).__name__}: {error}"
                row["seconds"] = round(time.monotonic() - started, 1)
        if name == "clean":
            clean = row
        (folder / f"{name}.json").write_text(json.dumps(row, default=np.generic.item))
    (folder / "current").write_text("")


def outcome(utils, data, members, ensemble, labels, table, clean):
    """What infer_studies makes of the studies in a folder, and the clean row of the others: part of a kind's row."""
    import pandas as pd

    from lumbar.data.competition import row_ids

    ids = [int(study_id) for study_id in labels["study_id"]]
    own = [i for i in ids if (data / "test_images" / str(i)).is_dir()]
    submission, problems, probabilities = None, {}, {}
    if own:
        table[table["study_id"].isin(own)].to_csv(data / "test_series_descriptions.csv", index=False)
        submission, log, _, _ = utils.infer_studies(data, "test", members, ensemble, data / "out", readers=1)
        log = log.set_index("study_id")
        problems = {str(i): str(log.loc[i, "problems"]) for i in own if i in log.index}
        found_ids, found = utils.from_submission(submission)
        probabilities = {str(i): p.tolist() for i, p in zip(found_ids, found, strict=True) if i in own}
    others = [i for i in ids if i not in own]
    if others:
        problems |= {str(i): clean["problems"][str(i)] for i in others}
        probabilities |= {str(i): clean["probabilities"][str(i)] for i in others}
        known = np.array([clean["probabilities"][str(i)] for i in others])
        kept = utils.to_submission(np.array(others), known)
        submission = pd.concat([submission, kept], ignore_index=True) if own else kept
    row = {
        "score": utils.competition_score(labels, submission)["total"],
        "rows": int(submission["row_id"].isin([row for i in ids for row in row_ids(i)]).sum()),
        "as_clean": len(others),
        "problems": problems,
        "probabilities": probabilities,
    }
    if clean is not None:
        new = {i: damage.news(problems[i], clean["problems"][i]) for i in problems}
        moved = {i: np.abs(np.subtract(p, clean["probabilities"][i])) for i, p in probabilities.items()}
        row["speaking"] = sum(map(bool, new.values()))
        row["moved"] = float(np.mean([m.mean() for m in moved.values()])) if moved else None
        row["silently_changed"] = sum(bool(m.max() > CHANGED) and not new[i] for i, m in moved.items())
        said = utils.problem_table([sentence for found in new.values() for sentence in found])
        row["said"] = [f"{times} x {example}" for _, times, example in said.head(3).itertuples(index=False)]
    return row


# All kinds ------------------------------------------------------------------------------------------------------------


def run_kinds(chosen, names, folder, finished):
    """Start workers until every kind has a row; finished(name, row) takes each. chosen: main's arguments."""
    import psutil

    todo = list(names)
    while todo:
        for name in [*todo, "current"]:
            (folder / (name if name == "current" else f"{name}.json")).unlink(missing_ok=True)
        command = [sys.executable, __file__, str(chosen.run.resolve()), "--worker", ",".join(todo)]
        command += ["--studies", str(chosen.studies), "--threads", str(chosen.threads), "--folder", str(folder)]
        command += ["--whole"] * chosen.whole
        with (folder / "worker.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        watched, current, begun, at_start, peak, why = psutil.Process(process.pid), "", time.monotonic(), 0, 0, ""
        while process.poll() is None:
            time.sleep(0.2)
            try:
                resident = watched.memory_info().rss >> 20
                now = (folder / "current").read_text()
            except (OSError, psutil.Error):
                continue
            if now != current:
                if current in todo:
                    take(folder, todo, current, peak - at_start, finished)
                current, begun, at_start, peak = now, time.monotonic(), resident, resident
            peak = max(peak, resident)
            if current and resident - at_start > chosen.memory:
                why = f"killed: more than {chosen.memory} MB"
            elif current and time.monotonic() - begun > chosen.time:
                why = f"killed: more than {chosen.time} s"
            if why:
                process.kill()
                process.wait()
        if current in todo and (folder / f"{current}.json").is_file():
            take(folder, todo, current, peak - at_start, finished)
        for name in [name for name in todo if (folder / f"{name}.json").is_file()]:
            take(folder, todo, name, 0, finished)
        if todo and process.returncode:
            tail = " ".join((folder / "worker.log").read_text(errors="replace").split())[-300:]
            if not current:
                sys.exit(f"the worker ends before its first kind: {tail}")
            row = {"problem": why or f"the process ended with status {process.returncode}: {tail}", "damaged": 0}
            (folder / f"{current}.json").write_text(json.dumps(row))
            take(folder, todo, current, peak - at_start, finished)


def take(folder, todo, name, peak_mb, finished):
    todo.remove(name)
    finished(name, json.loads((folder / f"{name}.json").read_text()) | {"peak_mb": int(peak_mb)})


def breaks_goal(row, clean):
    """Why a kind misses the aim; "" where it does not."""
    if row["problem"].startswith("not tried"):
        return ""
    if row["problem"]:
        return row["problem"]
    if row["rows"] < clean["rows"]:
        return f"{clean['rows'] - row['rows']} rows are missing"
    difference = row["score"] - clean["score"]
    if abs(difference) > WITHIN and row["speaking"] < row["damaged"]:
        return f"{difference:+.3f}, and {row['damaged'] - row['speaking']} of {row['damaged']} logs say nothing"
    return ""


def short(text, length=110):
    text = text.replace("|", "/")
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def of_files(row, clean):
    """The studies of which a sentence about reading them is new, and not only one about what the networks then miss."""
    new = [damage.news(said, clean["problems"][study_id]) for study_id, said in row["problems"].items()]
    return sum(any(sentence.startswith("study ") for sentence in sentences) for sentences in new)


COLUMNS = (
    "damage",
    "what",
    "score",
    "difference",
    "logs that speak",
    "of the files",
    "silent, other answer",
    "read as clean",
    "rows",
    "s",
    "MB",
    "first said",
)


def report(rows, names):
    """The Markdown table of the finished kinds, and those that miss the aim."""
    clean = rows["clean"]
    lines = [
        f"{len(clean['problems'])} studies, clean score {clean['score']:.3f}, {clean['rows']} rows. "
        f"Aim: within {WITHIN} of it, or every damaged study's log speaks. Of the files: logs with a new "
        "sentence about reading, not only about what the networks miss. MB: the peak above the memory before.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    missed, lost = [], []
    for name in [name for name in names if name in rows and name != "clean"]:
        row, about = rows[name], KINDS[name]
        why = breaks_goal(row, clean)
        if why:
            missed.append(f"- `{name}` ({about.what}): {short(why, 300)}")
        if about.harmless and not row["problem"] and abs(row["score"] - clean["score"]) > WITHIN:
            lost.append(f"- `{name}` ({about.what}): {row['score'] - clean['score']:+.3f}")
        if row["problem"]:
            cells = ["-"] * 7
        else:
            cells = [
                f"{row['score']:.3f}",
                f"{row['score'] - clean['score']:+.3f}",
                f"{row['speaking']} of {row['damaged']}",
                str(of_files(row, clean)),
                str(row["silently_changed"]),
                str(row["as_clean"]),
                str(row["rows"]),
            ]
        said = row["problem"] or "; ".join(row["said"][:1])
        cells += [f"{row.get('seconds', 0):.0f}", str(row["peak_mb"]), short(said)]
        lines.append(f"| {'**' + name + '**' if why else name} | {about.what} | " + " | ".join(cells) + " |")
    lines += ["", f"{len(missed)} kinds miss the aim" + (":" if missed else "."), *missed]
    if lost:
        lines += ["", f"{len(lost)} kinds leave the picture whole and cost it all the same, said or not:", *lost]
    return "\n".join(lines) + "\n"


def identity(run, count):
    """What a kept row depends on: the kit's code, the run, the number of studies."""
    found = hashlib.sha256(f"{count}".encode())
    for path in sorted([*(ROOT / "lumbar").rglob("*.py"), *run.glob("0*/manifest.json")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished demo run")
    parser.add_argument("--damages", default="", help="kinds, in this order; a word stands for all with it")
    parser.add_argument("--studies", type=int, default=10**6, help="the first so many test studies")
    parser.add_argument("--out", type=Path, default=Path("damage.md"), help="the table; a .json beside it keeps rows")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the networks")
    parser.add_argument("--memory", type=int, default=6000, help="MB above the loaded weights before a kind is killed")
    parser.add_argument("--time", type=int, default=1800, help="seconds of a kind before it is killed")
    parser.add_argument("--whole", action="store_true", help="predict also what is read as the clean studies are")
    parser.add_argument("--list", action="store_true", help="print the kinds and end")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.list:
        print(*(f"{k.name:28}{k.family:14}{k.what}" for k in KINDS.values()), sep="\n")
        return
    if chosen.run is None:
        parser.error("RUN is missing: the folder of a finished demo run")
    if chosen.worker:
        worker(chosen.run, chosen.worker.split(","), chosen.studies, chosen.threads, chosen.folder, chosen.whole)
        return
    if not (chosen.run / "05_inference" / "manifest.json").is_file():
        parser.error(f"{chosen.run} has no finished 05_inference")
    words = [word for word in chosen.damages.split(",") if word]
    unknown = [word for word in words if not any(word in name for name in KINDS)]
    if unknown:
        parser.error(f"no kind {', '.join(unknown)}; --list names them")
    # A kind's own name means that kind alone, a part of names all that have it.
    names = list(dict.fromkeys(n for w in words or [""] for n in KINDS if n == w or (w not in KINDS and w in n)))
    kept_path, key = chosen.out.with_suffix(".json"), identity(chosen.run, chosen.studies)
    kept = json.loads(kept_path.read_text()) if kept_path.is_file() else {}
    rows = kept["rows"] if kept.get("key") == key else {}
    if kept and not rows:
        print(f"{kept_path} is of other code or another run: all is done again")
    todo = [name for name in ("clean", *names) if name not in rows]
    started = time.monotonic()

    def finished(name, row):
        rows[name] = row
        kept_path.write_text(json.dumps({"key": key, "rows": rows}))
        if "clean" in rows and "problems" in rows["clean"]:
            chosen.out.write_text(report(rows, [n for n in KINDS if n in rows]))
        done = sum(n in rows for n in todo)
        said = row["problem"] or f"{row['score']:.3f}, {row.get('speaking', '-')} of {row['damaged']} speak"
        minutes = (time.monotonic() - started) / 60
        print(f"[{done}/{len(todo)}, {minutes:.1f} min] {name}: {short(said)}", flush=True)
        if name == "clean" and row["problem"]:
            sys.exit("the clean studies cannot be predicted")

    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if "clean" in rows:
            (Path(folder) / "clean.json").write_text(json.dumps(rows["clean"]))
        run_kinds(chosen, todo, Path(folder), finished)
    print(report(rows, [name for name in KINDS if name in rows]))


if __name__ == "__main__":
    main()
