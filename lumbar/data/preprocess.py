"""Every study of a split, read once and stored.

May use: dicom, greys, volume, tables, cluster, in_flight, storage, names.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ..cluster import spread
from ..in_flight import DIED, ChildDied, InFlight, can_run_in_child, images_digest, run_in_child
from ..names import progress
from ..storage import DamagedFile
from .dicom import read_study
from .greys import normalise_study
from .tables import described_series, some_of
from .volume import Study, load_study, save_study, study_about


def preprocess_study(
    data: str | Path,
    split: str,
    study_id: int,
    descriptions: Mapping[int, str],
    out: str | Path,
    bits: int = 16,
    journal: InFlight | None = None,
) -> list[dict[str, Any]]:
    """Read one study of the competition folder, write its volumes to `out`. Returns rows for series.csv.

    A study whose file is already there is not read again, unless it was passed over, or its files or descriptions have
    changed since. journal: InFlight that is told when the study is read.
    """
    path = Path(out) / f"{study_id}.safetensors"
    images = Path(data) / f"{split}_images" / str(study_id)
    made_of = {"described": {str(s): d for s, d in descriptions.items()}, "files": images_digest(images)}
    study = _finished(path, made_of)
    if study is None:
        if journal is not None:
            journal.begin(study_id)
        study = normalise_study(read_study(images, descriptions))
        save_study(study, path, bits, made_of)
        if journal is not None:
            journal.end(study_id)
    return _series_rows(study)


def _finished(path, made_of):
    """The study in a file of an earlier run; None where there is none, it is damaged, which is printed, it was passed
    over, or was made of other series or files: a table or a file may have been mended since."""
    if not path.is_file():
        return None
    try:
        study = load_study(path) if study_about(path).get("made_of") == made_of else None
    except DamagedFile as error:
        print(f"{error}; it is read anew now")
        return None
    return None if study is None or _was_passed_over(study) else study


def _was_passed_over(study):
    return any(problem.startswith(f"study {study.study_id}: {DIED}") for problem in study.problems)


def _pass_over(study_id, why, out, bits):
    """Keep a study that the process died of as one of which nothing could be read. Returns rows for series.csv."""
    study = Study(study_id, [], [f"study {study_id}: {why}"])
    save_study(study, Path(out) / f"{study_id}.safetensors", bits)
    print(study.problems[0])
    return _series_rows(study)


def _preprocess_job(jobs, study_id):
    """preprocess_study of one study, on a worker of a cluster."""
    return preprocess_study(*jobs[study_id])


def _pass_over_lost(study_id, why, out, bits):
    return _pass_over(study_id, f"{DIED} study ({why}); passed over until its files change", out, bits)


def _series_rows(study):
    study_id, rows = study.study_id, []
    for volume in study.volumes:
        row = {
            "study_id": study_id,
            "series_id": volume.series_id,
            "block": volume.block,
            "description": volume.description,
            "plane": volume.plane,
            "slices": volume.array.shape[0],
            "rows": volume.array.shape[1],
            "columns": volume.array.shape[2],
            "thickness_mm": volume.thickness_mm,
            "problem": "",
        }
        row |= {f"a{i}{j}": volume.affine[i, j] for i in range(3) for j in range(4)}
        rows.append(row)
    rows += [{"study_id": study_id, "problem": problem} for problem in study.problems]
    return rows


def preprocess_studies(
    data: str | Path,
    split: str,
    out: str | Path,
    workers: int = 2,
    bits: int = 16,
    labelled: Iterable[int] = (),
    scheduler: str = "",
) -> pd.DataFrame:
    """Read every study of a split and store its volumes as out/<study_id>.safetensors.

    Works in threads (decoding and percentiles run outside Python's lock, and nothing has to be imported anew) and shows
    progress. Safe to re-run after an interruption: finished studies are found. Those that an earlier run may have been
    killed by come last; one that kills the process is passed over, which is among the problems (see InFlight).

    Parameters
    ----------
    data : str or Path
        The competition's folder.
    split : str
        `train` or `test`.
    out : str or Path
        Folder of the volumes; made when needed.
    workers : int
        Threads.
    bits : int
        16 or 8, of a stored grey value; see save_study.
    labelled : iterable of int
        Ids of studies that have labels; those that the descriptions table lacks cannot be read and are among the
        problems.
    scheduler : str
        Address of a Dask scheduler whose workers read the studies, see cluster.spread; empty: threads of this machine.

    Returns
    -------
    DataFrame
        The rows of series.csv, one a volume or problem: study_id, series_id, block, description, plane, slices, rows,
        columns, thickness_mm, problem, and the affine matrix as a00 ... a23 (from slice, row, column, 1 to LPS mm).

    Raises
    ------
    ValueError
        The descriptions table has no rows.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    studies, table = described_series(data, split), f"{split}_series_descriptions.csv"
    if not studies:
        raise ValueError(f"{Path(data) / table} has no rows below its header: copy the competition's file anew")
    data, out = Path(data).resolve(), Path(out).resolve()  # workers elsewhere have another working folder
    jobs = {study_id: (data, split, study_id, series, out, bits) for study_id, series in studies.items()}
    images = Path(data) / f"{split}_images"
    journal = InFlight(
        Path(out) / "in_flight",
        "study",
        key_of=lambda study_id: images_digest(images / str(study_id)),
        is_done=lambda study_id: (Path(out) / f"{study_id}.safetensors").is_file(),
    )
    with journal, progress(desc=f"reading {split} studies", total=len(jobs)) as bar:
        passed_over = {i: why for i, why in journal.passed_over.items() if i in jobs}
        suspects = [study_id for study_id in journal.suspects if study_id in jobs]
        usual = [study_id for study_id in jobs if study_id not in {*passed_over, *suspects}]
        found = {study_id: _pass_over(study_id, why, out, bits) for study_id, why in passed_over.items()}
        bar.update(len(found))
        if scheduler:
            lost = partial(_pass_over_lost, out=out, bits=bits)
            found |= spread(_preprocess_job, usual, jobs, scheduler=scheduler, lost=lost, done=bar.update)
        else:
            with ThreadPoolExecutor(max(1, workers)) as pool:
                results = pool.map(lambda study_id: preprocess_study(*jobs[study_id], journal), usual)
                for study_id, rows in zip(usual, results, strict=True):
                    found[study_id] = rows
                    bar.update()
        for study_id in suspects:
            found[study_id] = _preprocess_suspect(jobs[study_id], journal)
            bar.update()
    rows = [row for study_id in jobs for row in found[study_id]]
    return pd.DataFrame(rows + _unread_rows(sorted(set(labelled) - set(studies)), table))


def _unread_rows(study_ids, table):
    """Rows of labelled studies that the descriptions table lacks; says so."""
    if study_ids:
        print(f"{len(study_ids)} labelled studies are not in {table} and take no part: {some_of(study_ids)}")
    return [{"study_id": i, "problem": f"study {i}: labelled, but not in {table}"} for i in study_ids]


_PATIENCE_S = 900.0  # for a suspect to be read


def _preprocess_suspect(job, journal):
    """preprocess_study of a study that an earlier process may have died of; job: its arguments."""
    study_id, out, bits = job[2], job[4], job[5]
    if not can_run_in_child():
        return preprocess_study(*job, journal)
    journal.begin(study_id, child=True)
    try:
        rows = run_in_child(lambda: preprocess_study(*job), _PATIENCE_S)
    except (ChildDied, TimeoutError) as died:
        return _pass_over(study_id, journal.condemn(study_id, str(died)), out, bits)
    journal.end(study_id)
    return rows
