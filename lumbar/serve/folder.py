"""Any folder of DICOM files, or a zip of them, laid out as the competition's: which studies and series there are, and
which series serves as which of the three.

No table names a patient: files get numbers, words of the headers' names are struck out of folders' names, and these and
numbers of the patient and the case out of descriptions. The links and unpacked files are the patient's own.

May use: data, names, storage.
"""

import hashlib
import os
import shutil
import stat
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from ..data.dicom import MAX_FILE_BYTES, NotDicom
from ..data.headers import FileHeader, merge_headers, read_header
from ..data.pixels import DicomProblem
from ..data.series_kind import LOCALISER_SLICES, SeriesHeader, SeriesKind, kind_of_series
from ..data.tables import whole_number
from ..names import DESCRIPTIONS, progress
from ..storage import write_csv

MAX_FILES = 1_000_000  # of one folder or zip
STATION_MM = 80.0  # two sagittal series whose middles are further apart along the patient are two stations
SPLIT_ECHO = 1.5  # ratio of echo times of one series from which on they are two contrasts


@dataclass(frozen=True)
class FoundSeries:
    """One series of a study, or one contrast or plane of it.

    files: paths in the order of their instance numbers; used: one of DESCRIPTIONS, "" where it is left out; reason:
    why it is, or what is less than plain about it.
    """

    header: SeriesHeader
    kind: SeriesKind
    files: tuple[Path, ...]
    used: str
    reason: str


@dataclass(frozen=True)
class FoundStudy:
    """One study. name: the folder in which its files lie, relative to what was searched, without patients' names."""

    study_id: int
    key: str
    name: str
    series: tuple[FoundSeries, ...]

    @property
    def used(self) -> tuple[FoundSeries, ...]:
        return tuple(series for series in self.series if series.used)


def find_studies(source: str | Path, out: str | Path, workers: int = 4) -> list[FoundStudy]:
    """Look through a folder, zip or single file for MR studies.

    Parameters
    ----------
    source : path
        A folder (nested or flat, any file names, zips in it included), a zip, or one DICOM file.
    out : path
        Zips are unpacked in its folder `unpacked`, once; study ids of an earlier call for the same `out` stay.
    workers : int
        Threads that read headers.

    Returns
    -------
    list of FoundStudy
        In the order of their numbers. A study's number is the whole number that its folder is called, where each study
        lies in such a folder of its own as in the competition's data; else they are counted from 1.

    Raises
    ------
    FileNotFoundError
        There is no such path.
    ValueError
        `out` is the folder itself, a zip that cannot be unpacked, more than MAX_FILES files, or not one MR image; it
        says what is there instead.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder or zip of DICOM files")
    if source.is_dir() and source.resolve() == out.resolve():
        raise ValueError(f"{out} is the folder of images itself: give another one for the results")
    places = list(_all_files(source, out))
    headers: list[FileHeader] = []
    names: dict[Path, str] = {}
    other: Counter[str] = Counter()

    def read(item: tuple[Path, str]) -> FileHeader | str:
        try:
            return read_header(item[0])
        except NotDicom:
            return "no DICOM file"
        except DicomProblem as problem:
            return str(problem).split(": ")[0]
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    with ThreadPoolExecutor(max(1, workers)) as pool, progress(desc="reading headers", total=len(places)) as bar:
        for (path, name), found in zip(places, pool.map(read, places), strict=True):
            if isinstance(found, FileHeader):
                headers.append(found)
                names[path] = name
            else:
                other[found] += 1
            bar.update()
    for what, count in other.most_common(10):
        print(f"{count} file{'s' * (count > 1)} left out: {what}")
    if not headers:
        there = ", ".join(f"{count} of them: {what}" for what, count in other.most_common(3)) or "it is empty"
        raise ValueError(f"{source} holds no MR image ({len(places)} files; {there})")
    return _studies(_without_copies(headers), names, source, out)


def lay_out(studies: Sequence[FoundStudy], out: str | Path) -> Path:
    """Write the series that are used as the competition's files: out/data/test_images/<study>/<series>/<n>.dcm and
    test_series_descriptions.csv; beside them out/series.csv and out/studies.csv, which say what became of every series.

    Files are links to where they lie, copies where the file system has no links.

    Parameters
    ----------
    studies : sequence of FoundStudy
        Of find_studies.
    out : path
        Folder of the results; in its `data`, studies that are not among these are removed.

    Returns
    -------
    Path
        out/data.

    Raises
    ------
    ValueError
        No study has a series of use, with the reasons.
    """
    data, rows = Path(out) / "data", []
    data.mkdir(parents=True, exist_ok=True)
    for old in (data / "test_images").iterdir() if (data / "test_images").is_dir() else ():
        if old.name not in {str(study.study_id) for study in studies if study.used}:
            shutil.rmtree(old)
    for study in studies:
        folder = data / "test_images" / str(study.study_id)
        wanted = {}
        for number, series in enumerate(study.used, 1):
            series_id = study.study_id * 100 + number
            wanted[str(series_id)] = series.files
            rows.append((study.study_id, series_id, series.used))
        if wanted:
            _link_series(folder, wanted)
    columns = ["study_id", "series_id", "series_description"]
    table = series_table(studies)
    write_csv(Path(out) / "series.csv", table)
    own = pd.DataFrame(
        [(s.study_id, s.name, len(s.series), len(s.used), s.key) for s in studies], columns=_STUDY_COLUMNS
    )
    earlier = _earlier_studies(out)
    earlier = earlier[~earlier["key"].isin(own["key"])]  # their numbers are theirs for good
    write_csv(Path(out) / "studies.csv", pd.concat([own, earlier]) if len(earlier) else own)
    if not rows:
        why = "; ".join(f"{row.description or 'a series'}: {row.reason}" for row in table.head(5).itertuples())
        raise ValueError(
            f"no series of these {len(table)} is a sagittal T1, a sagittal T2/STIR or an axial T2 of a lumbar spine "
            f"({why}); {Path(out) / 'series.csv'} has them all"
        )
    write_csv(data / "test_series_descriptions.csv", pd.DataFrame(rows, columns=columns))
    return data


def series_table(studies: Iterable[FoundStudy]) -> pd.DataFrame:
    """Every series that was found and what became of it.

    Parameters
    ----------
    studies : iterable of FoundStudy
        Of find_studies.

    Returns
    -------
    DataFrame
        study_id, number, description (the headers' words), plane, weighting, slices, used_as (one of DESCRIPTIONS or
        ""), reason.
    """
    return pd.DataFrame(
        [
            (
                study.study_id,
                series.header.number,
                series.header.words,
                series.header.planes[0] if series.header.planes else "",
                series.kind.weighting,
                series.header.slices or len(series.files),
                series.used,
                series.reason,
            )
            for study in studies
            for series in study.series
        ],
        columns=["study_id", "number", "description", "plane", "weighting", "slices", "used_as", "reason"],
    )


# ---- Files ----


def _all_files(source: Path, out: Path) -> Iterator[tuple[Path, str]]:
    """(path, name relative to what was searched) of every file; those of zips come unpacked."""
    if source.is_file():
        found: Iterable[tuple[Path, str]] = [(source, source.name)]
    else:
        found = _walk(source, out.resolve())
    count = 0
    for path, name in found:
        items = [(path, name)]
        if _is_zip(path):
            items = [(p, f"{name}/{n}" if source.is_dir() else n) for p, n in _unpack(path, out / "unpacked")]
        for item in items:
            count += 1
            if count > MAX_FILES:
                raise ValueError(f"{source} holds more than {MAX_FILES:,} files: give a folder of studies")
            yield item


def _walk(source: Path, out: Path) -> Iterator[tuple[Path, str]]:
    """The files below a folder in the order of their names, linked folders included, each folder once; not those of an
    earlier run's results."""
    seen = set()
    for place, folders, files in os.walk(source, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or Path(real) == out:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=_natural)
        for name in sorted(files, key=_natural):
            path = Path(place) / name
            yield path, str(path.relative_to(source))


def _natural(name: str) -> tuple[int, str]:
    return (len(name), name) if name.split(".")[0].isdecimal() else (1 << 30, name)


def _is_zip(path: Path) -> bool:
    """A zip by its content: a folder may hold it under any name, a damaged one is told from one that is none."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
    except OSError:
        return False


def _unpack(path: Path, place: Path) -> list[tuple[Path, str]]:
    """Unpack a zip into a folder of its own below `place`, once: (file, its name in the zip) of each.

    Files get numbers, whatever their names say of folders above. Raises ValueError for a zip that is damaged,
    encrypted, larger unpacked than the disk has room for, or has a file too large for slices.
    """
    remedy = "unpack it yourself and give the folder"
    try:
        with zipfile.ZipFile(path) as archive:
            items = [item for item in archive.infolist() if not item.is_dir() and "__MACOSX" not in item.filename]
            if len(items) > MAX_FILES:
                raise ValueError(f"{path} holds more than {MAX_FILES:,} files")
            stated = "\n".join(f"{item.filename} {item.file_size} {item.CRC}" for item in items)
            folder = place / hashlib.sha256(stated.encode(errors="surrogateescape")).hexdigest()[:16]
            targets = [(folder / f"{number:06}", item.filename) for number, item in enumerate(items)]
            if (folder / "complete").is_file():
                return targets
            if any(item.flag_bits & 1 for item in items):
                raise ValueError(f"{path} is encrypted: {remedy}")
            total = sum(item.file_size for item in items)
            place.mkdir(parents=True, exist_ok=True)
            if total > 0.9 * shutil.disk_usage(place).free:
                raise ValueError(f"{path} needs {total / 1e9:.1f} GB unpacked, {place} has less: choose another OUT")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for (target, _), item in zip(progress(targets, f"unpacking {path.name}", len(targets)), items, strict=True):
                if item.file_size > MAX_FILE_BYTES:  # no file of slices, and zeros pack to nothing
                    target.touch()
                    continue
                with archive.open(item) as packed, open(target, "wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)  # ends at the stated size, which the sum above counted
            (folder / "complete").touch()
            return targets
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): {remedy}") from None


def _link_series(folder: Path, wanted: dict[str, tuple[Path, ...]]) -> None:
    """Make `folder` hold these series, each its files as 1.dcm, 2.dcm, ...; what is there already stays as it is."""
    for old in folder.iterdir() if folder.is_dir() else ():
        if old.name not in wanted:
            shutil.rmtree(old)
    for name, files in wanted.items():
        series = folder / name
        links = {f"{number}.dcm": path.resolve() for number, path in enumerate(files, 1)}
        if series.is_dir() and {p.name: p.resolve() for p in series.iterdir()} == links:
            continue
        shutil.rmtree(series, ignore_errors=True)
        series.mkdir(parents=True)
        for link, path in links.items():
            try:
                (series / link).symlink_to(path)
            except OSError:  # a file system without links
                shutil.copyfile(path, series / link)


# ---- Studies and series ----


def _without_copies(headers: Sequence[FileHeader]) -> list[FileHeader]:
    """Each image once, however often it was exported into the folder."""
    seen, kept = set(), []
    for header in headers:
        key = (header.uid, header.series) if header.uid else (str(header.path), "")
        if key not in seen:
            seen.add(key)
            kept.append(header)
    if len(kept) < len(headers):
        print(f"{len(headers) - len(kept)} files left out: copies of others")
    return kept


def _studies(headers: Sequence[FileHeader], names: dict[Path, str], source: Path, out: Path) -> list[FoundStudy]:
    groups: dict[tuple[str, ...], list[FileHeader]] = defaultdict(list)
    for header in headers:
        name = PurePosixPath(names[header.path])
        uid, patient = header.study
        groups[(uid, patient) if uid else ("", patient, name.parts[0] if len(name.parts) > 1 else "")].append(header)
    folders = {key: _common_folder(names[h.path] for h in files) for key, files in groups.items()}
    keys = {key: hashlib.sha256("\0".join(key).encode(errors="surrogateescape")).hexdigest()[:16] for key in groups}
    own_name = source.resolve().name if source.is_dir() else ""
    ids = _study_ids({keys[key]: folder.name or own_name for key, folder in folders.items()}, out)
    studies = []
    for key, files in groups.items():
        private = frozenset().union(*(file.patient for file in files))
        numbers = private.union(*(file.case for file in files))
        series = tuple(
            replace(one, header=replace(one.header, words=_struck_out(one.header.words, numbers)))
            for one in _chosen(_series(files))
        )
        folder = _struck_out(str(folders[key]), private)
        studies.append(FoundStudy(ids[keys[key]], keys[key], "" if folder == "." else folder, series))
    return sorted(studies, key=lambda study: study.study_id)


def _common_folder(names: Iterable[str]) -> PurePosixPath:
    """The deepest folder in which all these files lie."""
    return PurePosixPath(os.path.commonpath([str(PurePosixPath(name).parent) for name in names]) or ".")


def _study_ids(folders: dict[str, str], out: Path) -> dict[str, int]:
    """dict key -> study_id: as an earlier call numbered them, as their folders (dict key -> name) are numbered, else
    counted."""
    earlier = {str(row.key): int(row.study_id) for row in _earlier_studies(out).itertuples()}
    known = {key: study_id for key, study_id in earlier.items() if key in folders}
    numbers = {key: whole_number(folder) for key, folder in folders.items()}
    stated = [number for number in numbers.values() if number is not None and 0 < number < 10**12]
    numbered = len(set(stated)) == len(folders)
    used = set(earlier.values())  # by others, too: what is kept of them must not be taken for a new study's
    free = (number for number in range(1, MAX_FILES + 2) if number not in used)
    for key, number in numbers.items():
        if key not in known:
            known[key] = number if numbered and number is not None and number not in used else next(free)
            used.add(known[key])
    return known


_STUDY_COLUMNS = ["study_id", "folder", "series", "used", "key"]


def _earlier_studies(out: str | Path) -> pd.DataFrame:
    """studies.csv of earlier calls with the same folder for results; empty where there was none.

    Raises ValueError for another table."""
    path = Path(out) / "studies.csv"
    if not path.is_file():
        return pd.DataFrame(columns=_STUDY_COLUMNS)
    try:
        table = pd.read_csv(path, dtype={"key": str, "folder": str, "study_id": "int64"})
        good = set(_STUDY_COLUMNS) <= set(table) and table["key"].is_unique and table["study_id"].is_unique
    except (ValueError, UnicodeDecodeError):
        good = False
    if not good:
        raise ValueError(f"{path} does not say how the studies here were numbered: choose another folder for results")
    return table[_STUDY_COLUMNS]


def _struck_out(text: str, private: frozenset[str]) -> str:
    """The text without words of a person's name."""
    for word in sorted(private, key=len, reverse=True):
        place = text.lower().find(word)
        while place >= 0:
            text = f"{text[:place]}…{text[place + len(word) :]}"
            place = text.lower().find(word)
    return text


def _series(files: Sequence[FileHeader]) -> list[FoundSeries]:
    """A study's files as series, split where one holds several planes or contrasts; all of them yet left out."""
    groups: dict[str, list[FileHeader]] = defaultdict(list)
    for file in files:
        groups[file.series].append(file)
    found = []
    for own in groups.values():
        for part in _parts(own):
            header = merge_headers(part)
            kind = kind_of_series(header)
            paths = tuple(file.path for file in sorted(part, key=lambda file: (file.instance, str(file.path))))
            found.append(FoundSeries(header, kind, paths, "", kind.reason))
    return sorted(found, key=lambda one: (one.header.number, one.header.words))


def _parts(files: Sequence[FileHeader]) -> list[list[FileHeader]]:
    """The files of one series by plane and by what they show: kinds of image and echo times."""
    planes = {plane for file in files for plane in file.planes}
    if len(planes) == 3 and sum(len(file.planes) for file in files) < LOCALISER_SLICES:
        return [list(files)]
    bands = _echo_bands([file.about.te_ms for file in files])
    groups: dict[tuple, list[FileHeader]] = defaultdict(list)
    for file, band in zip(files, bands, strict=True):
        plane = Counter(file.planes).most_common(1)[0][0] if file.planes else ""
        groups[(plane, file.kinds, band)].append(file)
    return list(groups.values())


def _echo_bands(times_ms: Sequence[float]) -> list[int]:
    """For each echo time the number of the group of like ones that it belongs to."""
    stated = sorted({time for time in times_ms if time > 0})
    starts = [time for k, time in enumerate(stated) if not k or time > SPLIT_ECHO * stated[k - 1]]
    return [int(np.searchsorted(starts, time, "right")) if time > 0 else 1 for time in times_ms]


def _chosen(series: Sequence[FoundSeries]) -> list[FoundSeries]:
    """The series with the better ones of each description used; the others say which one is."""
    chosen = list(series)
    for description in DESCRIPTIONS:
        candidates = [k for k, one in enumerate(chosen) if one.kind.description == description]
        best = sorted(candidates, key=lambda k: _worth(chosen[k], [chosen[j] for j in candidates]))
        taken: list[int] = []
        for k in best:
            # Axial slices often come as a series a disc: each that shows places of its own is used.
            if not taken or (description == "Axial T2" and _adds(chosen[k], [chosen[j] for j in taken])):
                taken.append(k)
                chosen[k] = replace(chosen[k], used=description)
            else:
                better = chosen[taken[0]].header
                why = f"series {better.number} serves better as {description}"
                chosen[k] = replace(chosen[k], reason="; ".join(filter(None, (why, chosen[k].reason))))
    return chosen


def _worth(one: FoundSeries, others: Sequence[FoundSeries]) -> tuple[float, ...]:
    """What orders series of one description, the best first."""
    header = one.header
    middle_mm = float(header.corners_lps_mm[:, 2].mean()) if len(header.corners_lps_mm) else 0.0
    lowest_mm = min(float(o.header.corners_lps_mm[:, 2].mean()) for o in others if len(o.header.corners_lps_mm))
    station = 0.0 if header.planes[0] != "sagittal" or middle_mm < lowest_mm + STATION_MM else 1.0
    coarse = header.spacing_mm if header.spacing_mm > 0 else 1.0
    # A repeated series was usually asked for because the first one was blurred: the later wins among equals.
    return (station, one.kind.penalty, round(np.log2(coarse) * 2), -round(np.log2(header.slices) * 2), -header.number)


def _adds(one: FoundSeries, taken: Sequence[FoundSeries]) -> bool:
    """Whether at least half of a series' slices lie at heights that no series taken so far covers."""
    heights = one.header.corners_lps_mm[:, 2]
    covered = np.zeros(len(heights), bool)
    for other in taken:
        theirs = other.header.corners_lps_mm[:, 2]
        margin_mm = other.header.thickness_mm if other.header.thickness_mm > 0 else 4.0
        # Slices that are there, not all between the lowest and the highest: stacks lie at discs, with gaps between.
        covered |= np.abs(heights[:, None] - theirs[None]).min(1) <= margin_mm
    return bool(covered.mean() < 0.5)
