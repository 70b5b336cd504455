"""The studies of any folder, from its laid-out series to tables of levels and of probabilities.

May use: folder, inference, members, tables, grade, spine, data, names, storage.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.competition import from_submission
from ..data.preprocess import preprocess_studies
from ..data.source import Source
from ..data.volume import study_about, study_paths
from ..grade.ensemble import ensemble_for
from ..names import CONDITIONS, LEVEL_TABLE_COLUMNS, LEVELS, SEVERITIES, device_for
from ..spine.locating import locate_studies
from ..spine.placement import Placement
from ..spine.spinenet import load_spinenet
from ..storage import write_csv, write_json
from .folder import FoundStudy
from .inference import infer_studies
from .members import Members, load_members, weight_folders
from .tables import refuse_prior_only

SHIPPED_WEIGHTS = Path(__file__).resolve().parents[2] / "weights" / "spinenet_phantom.safetensors"


def members_of(weights: Sequence[str | Path], device: str = "auto") -> Members | None:
    """The members in or below these folders; None without folders: then only levels are found, see placement_of.

    Parameters
    ----------
    weights : sequence of path
        Folders of a finished run, or of its stages.
    device : str
        As device_for takes it.

    Returns
    -------
    Members or None

    Raises
    ------
    FileNotFoundError
        There are no weights.
    ValueError
        As load_members.
    """
    if not weights:
        return None
    try:
        folders = weight_folders(weights)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"WEIGHTS: no trained weights in or below {', '.join(map(str, weights))}: give the folder of a finished "
            "run, such as runs/full, or none to find levels only"
        ) from None
    return load_members(folders, device=device)


def placement_of(members: Members | None, device: str = "auto") -> Placement:
    """How levels are placed: by the members' SpineNet, without members by the one that comes with the kit.

    Parameters
    ----------
    members : Members or None
        Of members_of.
    device : str
        For the kit's own SpineNet, as device_for takes it.

    Returns
    -------
    Placement
    """
    return Placement.of(load_spinenet(SHIPPED_WEIGHTS, device_for(device))) if members is None else members.placement


def locate_folder(out: str | Path, placement: Placement, workers: int = 2) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the studies that lay_out wrote to out/data, and find their levels.

    Writes out/01_preprocess (volumes, series.csv), out/levels.csv and out/vertebrae.csv; what an earlier call finished
    is found. A study without a readable image has no levels.

    Parameters
    ----------
    out : path
        As lay_out took it.
    placement : Placement
        Of placement_of.
    workers : int
        Threads that read and locate.

    Returns
    -------
    levels, vertebrae : DataFrame
        As locate_studies returns them.

    Raises
    ------
    RuntimeError
        As locate_studies.
    """
    out = Path(out)
    series = preprocess_studies(out / "data", "test", out / "01_preprocess" / "volumes", workers)
    write_csv(out / "01_preprocess" / "series.csv", series)
    wanted = set(series["study_id"])
    paths = {i: path for i, path in study_paths(out / "01_preprocess").items() if i in wanted}
    paths = {i: path for i, path in paths.items() if study_about(path)["volumes"]}
    problems: dict[int, str] = {}
    levels, vertebrae, _ = locate_studies(
        paths, placement, out / "01_preprocess" / "levels", workers, problems=problems
    )
    located = pd.DataFrame(list(problems.items()), columns=["study_id", "problem"])
    write_csv(out / "01_preprocess" / "locating.csv", located)
    write_csv(out / "levels.csv", levels.reindex(columns=LEVEL_TABLE_COLUMNS))
    write_csv(out / "vertebrae.csv", vertebrae)
    return levels, vertebrae


def read_problems(out: str | Path) -> pd.DataFrame:
    """What reading and locating had to say of the studies in a folder, as folder_log takes it.

    Parameters
    ----------
    out : path
        Of locate_folder, which wrote it.

    Returns
    -------
    DataFrame
        series.csv of 01_preprocess, and a row for each study whose levels did not come the usual way: study_id and
        problem, the rest NaN.
    """
    folder = Path(out) / "01_preprocess"
    located = pd.read_csv(folder / "locating.csv", dtype={"study_id": "int64", "problem": str})
    series = pd.read_csv(folder / "series.csv")
    return pd.concat([series, located], ignore_index=True) if len(located) else series


def grade_folder(
    out: str | Path, members: Members, weights: Sequence[str | Path], prior_only: bool = False, readers: int = 0
) -> pd.DataFrame:
    """Predict the studies that lay_out wrote to out/data.

    Writes out/05_inference (submission.csv, inference_log.csv, ensemble.json) and out/probabilities.csv: study_id,
    condition, level, normal_mild, moderate, severe, prior (whether the whole study rests on the training set's
    frequencies).

    Parameters
    ----------
    out : path
        As lay_out took it.
    members : Members
        Of members_of.
    weights : sequence of path
        Where the members are from, for the ensemble that lies there.
    prior_only : bool
        Accept that every row is the prior.
    readers : int
        Threads that read ahead, see infer_studies; 0 for its default.

    Returns
    -------
    DataFrame
        infer_studies' log.

    Raises
    ------
    RuntimeError
        No network had anything to say of any study, so that every row is the prior, and `prior_only` is false. What
        was written stays.
    """
    out = Path(out)
    folder = out / "05_inference"
    # An ensemble.json of the stage 05 lies in a folder beside those with weights.
    beside = [path.parent for place in weights for path in sorted(Path(place).glob("*/ensemble.json"))]
    ensemble = ensemble_for([*weight_folders(weights), *beside], out / "data", list(members.weights))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "ensemble.json", ensemble)
    submission, log, _, _ = infer_studies(out / "data", "test", members, ensemble, folder, readers=readers or None)
    write_csv(folder / "submission.csv", submission)
    write_csv(folder / "inference_log.csv", log)
    write_csv(out / "probabilities.csv", _long(submission, log))
    if not prior_only:
        refuse_prior_only(log)
    return log


def _long(submission: pd.DataFrame, log: pd.DataFrame) -> pd.DataFrame:
    ids, p = from_submission(submission)
    table = pd.DataFrame(
        [(study_id, condition, level) for study_id in ids for condition in CONDITIONS for level in LEVELS],
        columns=["study_id", "condition", "level"],
    )
    table[list(SEVERITIES)] = np.asarray(p).reshape(-1, len(SEVERITIES))
    return table.merge(log.assign(prior=log["prior_rows"] >= len(CONDITIONS) * len(LEVELS))[["study_id", "prior"]])


def folder_log(
    studies: Sequence[FoundStudy], levels: pd.DataFrame, series: pd.DataFrame, log: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What became of every study.

    Parameters
    ----------
    studies : sequence of FoundStudy
        Of find_studies.
    levels : DataFrame
        Of locate_folder.
    series : DataFrame
        Of read_problems: study_id and problem, empty where there is none.
    log : DataFrame, optional
        infer_studies' log, None where nothing was graded.

    Returns
    -------
    DataFrame
        study_id, series (that are used), levels (where they are from), second_share (how likely another numbering is),
        rows_from, prior_rows, problems; in the order of `studies`.
    """
    graded = {} if log is None else {row["study_id"]: row for row in log.to_dict("records")}
    problems = (
        series[series["problem"].notna() & (series["problem"] != "")].groupby("study_id")["problem"].agg(list).to_dict()
    )
    rows = []
    for study in studies:
        own = levels[levels["study_id"] == study.study_id]
        row = graded.get(study.study_id, {})
        told = [*problems.get(study.study_id, []), *str(row.get("problems") or "").split(" | ")]
        guessed = {str(source) for source in own["source"]} & {str(Source.AXIAL), str(Source.PRIOR)}
        if guessed:
            where = "where the axial slices lie" if str(Source.AXIAL) in guessed else "how spines lie on average"
            told.insert(0, f"levels are guessed from {where}: their numbering is not known")
        if not study.used:
            told.append("no series of use: " + "; ".join(dict.fromkeys(one.reason for one in study.series)))
        rows.append(
            {
                "study_id": study.study_id,
                "series": ", ".join(one.used for one in study.used),
                "levels": " ".join(sorted(set(own["source"]))),
                "second_share": own["second_share"].max() if len(own) else 0.0,
                "rows_from": row.get("rows_from", ""),
                "prior_rows": row.get("prior_rows", 0),
                "problems": " | ".join(dict.fromkeys(t.removeprefix(f"study {study.study_id}: ") for t in told if t)),
            }
        )
    return pd.DataFrame(rows)
