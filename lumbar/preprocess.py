"""Every study of a split, read once and kept as volumes.

May use: dicom, greys, volume, tables, storage, names.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from .dicom import read_study
from .greys import normalise_study
from .names import progress
from .storage import DamagedFile
from .tables import described_series, some_of
from .volume import load_study, save_study, study_about


def preprocess_study(data, split, study_id, descriptions, out, bits=16):
    """Read one study of the competition folder, write its volumes to `out`. Returns rows for series.csv.

    A study whose file is already there is not read again, unless it was read with other descriptions.
    """
    path = Path(out) / f"{study_id}.safetensors"
    study = _finished(path, descriptions)
    if study is None:
        study = normalise_study(read_study(Path(data) / f"{split}_images" / str(study_id), descriptions))
        save_study(study, path, bits, descriptions)
    rows = []
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


def _finished(path, descriptions):
    """The study in a file of an earlier run; None where there is none, it is damaged, which is printed, or it was read
    with other series: a table may have been mended since."""
    if not path.is_file():
        return None
    wanted = {str(series_id): description for series_id, description in descriptions.items()}
    try:
        return load_study(path) if study_about(path).get("described") == wanted else None
    except DamagedFile as error:
        print(f"{error}; it is read anew now")
        return None


def preprocess_studies(data, split, out, workers=2, bits=16, labelled=()):
    """Read every study of a split into out/<study_id>.safetensors. Returns series.csv: one row a volume or problem.

    bits: of a stored grey value, see save_study. labelled: ids of studies that have labels; those that the descriptions
    table lacks cannot be read and are among the problems.

    Works in threads (decoding and percentiles run outside Python's lock, and nothing has to be imported anew), shows
    progress, and finds the studies that an earlier, killed run has finished.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    studies, table = described_series(data, split), f"{split}_series_descriptions.csv"
    if not studies:
        raise ValueError(f"{Path(data) / table} has no rows below its header: copy the competition's file anew")
    jobs = [(data, split, study_id, series, out, bits) for study_id, series in studies.items()]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(preprocess_study, *zip(*jobs, strict=True))
        rows = [row for rows in progress(results, f"reading {split} studies", len(jobs)) for row in rows]
    unread = sorted(set(labelled) - set(studies))
    if unread:
        print(f"{len(unread)} labelled studies are not in {table} and take no part: {some_of(unread)}")
    rows += [{"study_id": i, "problem": f"study {i}: labelled, but not in {table}"} for i in unread]
    return pd.DataFrame(rows)
