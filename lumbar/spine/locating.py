"""The levels of every study of a split, kept as they are found.

May use: levels, placement, finetune, counting, naming, fallbacks, spinenet, vertebra, data, cluster, in_flight,
problems, storage, names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..cluster import spread
from ..data.geometry import boxes_to_table
from ..data.source import Source
from ..data.volume import load_study
from ..in_flight import read_left_json
from ..names import LEVEL_TABLE_COLUMNS, LEVELS, progress
from ..problems import Problem
from ..storage import file_digest, write_json
from .counting import Numberings
from .fallbacks import axial_levels, complete_vertebrae, level_boxes, refit_level_prior, study_anchors
from .finetune import learn_counting
from .levels import locate_levels_surely, seen
from .naming import chain_numberings
from .placement import Detector, Placement
from .spinenet import SpineNet
from .vertebra import UNCERTAIN, VERTEBRA_TABLE_COLUMNS, vertebrae_to_table


def _check_located(known):
    """Raise ValueError where a dict is not what locate_studies keeps of a study."""
    for name, columns in (("levels", LEVEL_TABLE_COLUMNS), ("vertebrae", VERTEBRA_TABLE_COLUMNS)):
        rows = known.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == set(columns) for row in rows):
            raise ValueError(f"{name} are no rows of a table")
    if len(known["levels"]) != len(LEVELS):
        raise ValueError(f"{len(known['levels'])} levels")
    places = known.get("anchors")
    if not isinstance(places, dict) or not set(places) <= {"sagittal", "axial"}:
        raise ValueError("anchors are no places")
    for name in ("levels", "vertebrae"):
        for row in known[name]:
            Source.parse(row["source"])
    texts = ("level", "vertebra", "source", "second")
    numbers = [v for name in ("levels", "vertebrae") for row in known[name] for k, v in row.items() if k not in texts]
    for center in places.values():
        if not isinstance(center, list) or len(center) != 3:
            raise ValueError("anchors are no places")
        numbers += center
    if not all(isinstance(value, (int, float)) and abs(value) < 1e12 for value in numbers):
        raise ValueError("some numbers are none, or not finite")
    numberings = known.get("numberings", {})
    if numberings is not None:
        Numberings.from_json(numberings)


_NOT_TRIED = ""  # of a study that was found, or has no sagittal series: it says nothing of the detector


@dataclass(frozen=True)
class _Locating:
    """What locating one study needs besides its number."""

    placement: Placement
    key: str
    paths: Mapping[int, Path]
    folder: Path | None


def _locate_kept(shared: _Locating, study_id: int) -> tuple[dict[str, Any], Problem | str | None]:
    """(a study's rows for JSON, the Problem where nothing was seen in its sagittal series, None where something was,
    _NOT_TRIED), kept in the folder where there is one and nothing went wrong."""
    file = shared.folder / f"{study_id}.json" if shared.folder is not None else None
    # Of these very images: another patient's study may have had the number.
    key = f"{shared.key} {file_digest(shared.paths[study_id])[:16]}" if file is not None else ""
    known = _kept(file, key, study_id) if file is not None else None
    if known is not None:
        return known, _NOT_TRIED
    result, problem, blind = _locate(study_id, shared.paths[study_id], shared.placement)
    if file is not None and not problem:
        write_json(file, {"key": key} | result)
    return result, _NOT_TRIED if blind is None else problem if blind else None


def _lost(shared: _Locating, study_id: int, why: str) -> tuple[dict[str, Any], Problem | str | None]:
    """Levels of a study at which worker after worker died: those of the mean layout."""
    print(f"study {study_id}: {why}; its levels are those of the mean layout")
    return _locate(study_id, shared.paths[study_id], shared.placement.blind())[0], _NOT_TRIED


def locate_studies(
    paths: Mapping[int, str | Path],
    placement: Placement | SpineNet,
    folder: str | Path | None = None,
    workers: int = 1,
    scheduler: str = "",
    problems: dict[int, str] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[int, dict]]:
    """Levels and vertebrae of many studies.

    A study whose detection fails gets its levels from the axial slices or the mean layout, which is not kept in
    `folder`.

    Parameters
    ----------
    paths : mapping of int to path
        study_id to volume file, as study_paths returns it.
    placement : Placement or SpineNet
        As locate_levels takes it. Where nothing is seen its prior stands in, not its layout.
    folder : str or Path, optional
        Where each study's result is kept as <study_id>.json, so that an interrupted run continues. A result of other
        images, weights, prior or detector is not taken; a function is known by its repr.
    workers : int
        Threads; most of the time is spent outside Python's lock.
    scheduler : str
        Address of a Dask scheduler whose workers locate the studies, see cluster.spread; empty: this machine.
    problems : dict of int to str, optional
        Gets study_id to a sentence, of the studies in which something was not as usual.

    Returns
    -------
    levels, vertebrae : DataFrame
        levels.csv and vertebrae.csv.
    anchors : dict of int to dict
        study_id to study_anchors(study).

    Raises
    ------
    RuntimeError
        A file cannot be read, or detection failed in every one of three or more studies.
    """
    return _tables(_located(paths, Placement.of(placement), folder, workers, scheduler, problems))


def _tables(results):
    """(levels, vertebrae, anchors) of what _located returns."""
    levels = pd.DataFrame([row for result in results.values() for row in result["levels"]], columns=LEVEL_TABLE_COLUMNS)
    rows = [row for result in results.values() for row in result["vertebrae"]]
    anchors = {
        study_id: {plane: np.array(center) for plane, center in result["anchors"].items()}
        for study_id, result in results.items()
    }
    return levels, pd.DataFrame(rows, columns=VERTEBRA_TABLE_COLUMNS), anchors


def _located(paths, placement, folder, workers, scheduler="", said=None):
    """dict study_id -> what _locate finds, kept in the folder; arguments and errors as of locate_studies."""
    placement = replace(placement, layout=placement.prior)
    key = placement.key()
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    shared = _Locating(
        placement,
        key,
        {i: Path(p).resolve() for i, p in paths.items()},
        Path(folder).resolve() if folder is not None else None,
    )
    with progress(desc="locating levels", total=len(paths)) as bar:
        located = spread(_locate_kept, list(paths), shared, workers, scheduler, partial(_lost, shared), done=bar.update)
    results = [result for result, _ in located.values()]
    problems = [problem for _, problem in located.values() if problem != _NOT_TRIED]
    if len(problems) > 2 and all(problems):  # no odd studies, but an installation that cannot work
        raise RuntimeError(f"the detector failed in all of {len(problems)} studies; the first: {problems[0]}")
    if said is not None:
        said |= {i: result["problem"] for i, (result, _) in located.items() if result.get("problem")}
    return dict(zip(paths, results, strict=True))


def _kept(file, key, study_id):
    """What locate_studies kept of a study under this key; None where there is nothing, or something else."""
    if not file.exists():
        return None
    try:
        known = read_left_json(file)
        if known.get("key") == key:
            _check_located(known)
            return known
    except ValueError as error:
        print(f"{file} is no result of study {study_id} ({error}): its levels are located again")
    return None


def _locate(study_id, path, placement):
    """(a study's rows for JSON, Problem or None, was nothing seen in its sagittal series: None without any)."""
    try:
        study = load_study(path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"{path} cannot be read ({reason}): delete it and run 01 again") from error
    boxes, bodies, problem = locate_levels_surely(study, placement)
    if problem:
        print(f"study {study_id}: {problem}")
    anchors = study_anchors(study)
    # Another detector's names are its own.
    chain = [body for body in seen(bodies) if body.appearance is not None]
    numberings = chain_numberings(chain, placement.prior, anchors.get("sagittal"))
    result = {
        "levels": boxes_to_table(study_id, boxes).to_dict("records"),
        "vertebrae": vertebrae_to_table(study_id, bodies).to_dict("records"),
        "anchors": {plane: center.tolist() for plane, center in anchors.items()},
        "numberings": None if numberings is None else numberings.to_json(),
        "problem": None if problem is None else str(problem),
    }
    sagittal = any(volume.plane == "sagittal" for volume in study.volumes)
    return result, problem, not seen(bodies) if sagittal else None


def locate_unseen(
    levels: pd.DataFrame,
    vertebrae: pd.DataFrame,
    anchors: Mapping[int, dict],
    prior: dict,
    paths: Mapping[int, str | Path] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables with the studies in which nothing was seen placed by another prior.

    paths: dict study_id -> volume file; with it also those placed by their axial slices, whose position within the
    slices is the prior's.
    """
    placed = Source.PRIOR | Source.AXIAL if paths is not None else Source.PRIOR
    origin = levels["source"].map(lambda source: Source.parse(source).origin)
    unseen = origin.map(lambda source: bool(source & placed)).groupby(levels["study_id"]).all().astype(bool)
    for study_id in unseen.index[unseen]:
        own = levels[levels["study_id"] == study_id]
        planned = None
        if paths is not None and (origin[own.index] == Source.AXIAL).any():
            planned = axial_levels(load_study(paths[study_id]), prior)  # None where this prior does not fit the slices
        if planned is None:
            bodies = complete_vertebrae([], anchors[study_id], prior)
            planned = level_boxes(bodies), bodies
        boxes, bodies = planned
        old = vertebrae[(vertebrae["study_id"] == study_id) & (vertebrae["vertebra"] == UNCERTAIN)]
        levels = pd.concat([levels[levels["study_id"] != study_id], boxes_to_table(study_id, boxes)])
        rest = vertebrae[vertebrae["study_id"] != study_id]
        vertebrae = pd.concat([rest, vertebrae_to_table(study_id, bodies)] + ([old] if len(old) else []))
    return levels.reset_index(drop=True), vertebrae.reset_index(drop=True)


def locate_with_own_layout(
    paths: Mapping[int, str | Path],
    model: SpineNet,
    folder: str | Path | None = None,
    workers: int = 1,
    detector: Detector = "own",
    coordinates: pd.DataFrame | None = None,
    scheduler: str = "",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """locate_studies, counted as these readers count; and where nothing is seen, by the mean layout of these patients.

    The layout goes into model.about["layout"], what was learned of the counting into model.about["prior"], so that
    inference places and names its studies alike.

    Parameters
    ----------
    paths, model, folder, workers, detector, scheduler
        As locate_studies and Placement.of take them; the model must carry a prior.
    coordinates : DataFrame, optional
        From read_coordinates, without the studies held out. Where readers number transitional spines another way than
        the chains are, and their points suffice to learn it, names are given as they give them.

    Returns
    -------
    levels, vertebrae : DataFrame
        levels.csv and vertebrae.csv.
    """
    placement = Placement.of(model, detector)
    if coordinates is not None:
        placement = replace(placement, detector=_remembering(placement.detector))
    results = _located(paths, placement, folder, workers, scheduler)
    if coordinates is not None:
        numberings = {
            study_id: None if result["numberings"] is None else Numberings.from_json(result["numberings"])
            for study_id, result in results.items()
        }
        before = placement.prior.get("counting", {})
        counting = learn_counting(numberings, paths, coordinates, before)
        if counting != before:
            prior = {key: value for key, value in placement.prior.items() if key != "counting"}
            model.about["prior"] = prior | ({"counting": counting} if counting else {})
            placement = replace(placement, prior=model.about["prior"])
            results = _located(paths, placement, folder, workers, scheduler)
    levels, vertebrae, anchors = _tables(results)
    model.about["layout"] = refit_level_prior(anchors, vertebrae, placement.prior)
    return locate_unseen(levels, vertebrae, anchors, model.about["layout"], paths)


def _remembering(detector):
    """The detector, which looks at each volume once: bodies are small, and naming them anew needs no second look."""
    found = {}

    def detect(volume):
        place = (volume.study_id, volume.series_id, volume.block, volume.array.shape)
        if place not in found:
            found[place] = detector(volume)
        return list(found[place])

    return detect
