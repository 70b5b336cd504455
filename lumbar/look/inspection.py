"""What there is to look at in a run: studies, levels, labels, predictions, and what members see where.

May use: slices, viewer_page, serve, grade, spine, data, names.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.competition import from_submission, labels_to_array
from ..data.dicom import read_study
from ..data.geometry import LevelBox, boxes_from_table
from ..data.greys import normalise_study
from ..data.source import Source
from ..data.tables import read_coordinates, read_labels
from ..data.volume import Study, load_study, study_paths
from ..grade.member import Member, Weights
from ..grade.registry import MEMBERS, by_member, member_weights
from ..grade.tables import read_out_of_fold
from ..names import DETECTION_COLUMNS
from ..serve.members import weight_folders
from ..serve.study import studies_to_predict
from ..spine.vertebra import vertebrae_from_table
from .slices import level_name
from .viewer_page import study_html

Drawing = Sequence[tuple[Member, Sequence[Weights]]]  # members that draw boxes, with their weights


@dataclass
class Inspection:
    """What there is to look at.

    paths: dict study_id -> volume file, as study_paths returns it, or a function that returns the normalised Study
    (unseen_studies); levels, vertebrae: tables of 02 or 05; coordinates: as read_coordinates has them; truths: dict
    study_id -> (5, 5) grades, -1 missing; predicted: dict name -> dict study_id -> (5, 5, 3), NaN where it says
    nothing, the first of which ranks the errors; detectors: list of load_drawing, or a function that returns it; log:
    inference_log.csv.
    """

    paths: dict[int, Path | Callable[[], Study]]
    levels: pd.DataFrame | None = None
    vertebrae: pd.DataFrame | None = None
    coordinates: pd.DataFrame | None = None
    truths: dict[int, np.ndarray] = field(default_factory=dict)
    predicted: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    detectors: Drawing | Callable[[], Drawing] = ()
    log: pd.DataFrame | None = None

    def first_study(self) -> int:
        """The study to open on: of those with most members' predictions and, if possible, labels the first.

        Raises ValueError without any study.
        """
        if not self.paths:
            raise ValueError("no study to look at: paths is empty (run 01_preprocess first)")

        def shown(study_id):
            return sum(study_id in own for own in self.predicted.values()), study_id in self.truths

        return max(sorted(self.paths), key=shown)

    def load(self, study_id: int) -> Study:
        """A study, normalised. Raises ValueError for one that is not there."""
        if study_id not in self.paths:
            raise ValueError(f"there is no study {study_id}; one of the {len(self.paths)} is {next(iter(self.paths))}")
        path = self.paths[study_id]
        return path() if callable(path) else load_study(path)

    def study_html(self, study_id: int, detections: bool = False, **options: Any) -> tuple[str, list[str]]:
        """A study's page or fragment: (HTML text, the study's problems as sentences).

        detections: run the detectors, a second or two; options: as study_html takes them.
        """
        study = self.load(study_id)
        there = self.levels is not None and (self.levels["study_id"] == study_id).any()
        boxes = boxes_from_table(self.levels, study_id) if there else []
        found = study_detections(self._drawing(), study, boxes) if detections and boxes else None
        text = study_html(
            study,
            boxes,
            self.coordinates,
            {name: own[study_id] for name, own in self.predicted.items() if study_id in own},
            self.truths.get(study_id),
            vertebrae=vertebrae_from_table(self.vertebrae, study_id) if self.vertebrae is not None else None,
            detections=found,
            **options,
        )
        return text, study.problems

    def _drawing(self) -> Drawing:
        """The members that draw boxes, loaded when they are asked for the first time."""
        if callable(self.detectors):
            self.detectors = self.detectors()
        return self.detectors


def read_inspection(
    data: str | Path,
    preprocessed: str | Path,
    levels_dir: str | Path = "",
    predictions: Sequence[str | Path] = (),
    inference: str | Path = "",
    first: str = "level",
    verbose: bool = True,
) -> Inspection:
    """Gather an Inspection from a run's folders; what is absent is left out.

    Parameters
    ----------
    data : path
        Competition folder.
    preprocessed : path
        Of 01.
    levels_dir : path
        Of 02; empty: none.
    predictions : sequence of paths
        Folders of 03 and 04, or one above them.
    inference : path
        Of 05, with which the test set is looked at, too; empty: none.
    first : str
        The member that ranks the errors.
    verbose : bool
        Print what was looked for and is not there.

    Returns
    -------
    Inspection
        Its predictions are the members' out of fold, `first` before the others, then `ensemble`, the submission of 05.

    Raises
    ------
    FileNotFoundError
        There are no volumes.
    ValueError
        `first` is a member that does not exist.
    """
    if first not in MEMBERS:
        raise ValueError(f"MEMBER must be one of {', '.join(MEMBERS)}, not {first!r}")

    def table(folder, name):
        path = Path(folder) / name
        return pd.read_csv(path) if str(folder) and path.is_file() else None

    labels = Path(data) / "train.csv"
    members = read_out_of_fold(predictions, verbose)
    tables = {name: members[name] for name in sorted(members, key=lambda name: name != first)}
    log, submission = table(inference, "inference_log.csv"), table(inference, "submission.csv")
    if submission is not None:
        tables["ensemble"] = submission
    levels = [found for folder in (levels_dir, inference) if (found := table(folder, "levels.csv")) is not None]
    absent = {
        f"labels: {labels}": labels.is_file(),
        f"level boxes: levels.csv in {levels_dir or 'LEVELS_DIR'}": levels,
        f"out-of-fold predictions: oof.csv in or below {', '.join(map(str, predictions)) or 'PREDICTIONS'}": members,
    }
    for what in (what for what, there in absent.items() if verbose and not there):
        print(f"not there: {what}")
    volumes = study_paths(preprocessed)
    unseen = unseen_studies(data) if submission is not None or log is not None else {}
    return Inspection(
        {**volumes, **{study_id: read for study_id, read in unseen.items() if study_id not in volumes}},
        pd.concat(levels, ignore_index=True) if levels else None,
        table(levels_dir, "vertebrae.csv"),
        read_coordinates(data) if labels.is_file() else None,
        dict(zip(*labels_to_array(read_labels(labels)))) if labels.is_file() else {},
        {name: dict(zip(*from_submission(own))) for name, own in tables.items()},
        partial(load_drawing, predictions),
        log,
    )


def unseen_studies(data: str | Path) -> dict[int, Callable[[], Study]]:
    """dict study_id -> function without arguments that reads that study of the competition folder's test set.

    For an Inspection, whose paths may be such functions: the test set has no volumes of 01. Empty without a test set.
    """

    def read(study_id, series):
        return normalise_study(read_study(Path(data) / "test_images" / str(study_id), series))

    if not (Path(data) / "test_series_descriptions.csv").is_file():
        return {}
    return {study_id: partial(read, study_id, series) for study_id, series in studies_to_predict(data, "test").items()}


def fallen_back(levels: pd.DataFrame | None = None, log: pd.DataFrame | None = None) -> pd.DataFrame:
    """The studies where something did not go the usual way: DataFrame study_id, why; the most telling reasons first.

    levels: levels.csv as a table: levels that no sagittal image showed, or whose naming is in doubt; log:
    inference_log.csv: rows left to a prior or to the whole-study network alone, members lost, what was reported.
    """
    reasons: dict[int, list[str]] = {}
    if log is not None:
        log = log.fillna("")
        for row in log.to_dict("records"):
            why = []
            if row.get("prior_rows"):
                why.append(f"{int(row['prior_rows'])} rows are the prior")
            if "study model" in str(row.get("rows_from", "")):
                why.append("the whole-study network alone")
            why += [str(row[column]) for column in ("dropped", "problems") if row.get(column)]
            if why:
                reasons.setdefault(int(row["study_id"]), []).extend(why)
    if levels is not None:
        for study_id, rows in levels.groupby("study_id", sort=False):
            odd = rows[~rows["source"].map(lambda source: Source.parse(source).sure)]
            if len(odd):
                names = ", ".join(f"{level_name(level)} {source}" for level, source in zip(odd["level"], odd["source"]))
                reasons.setdefault(int(study_id), []).append(f"levels: {names}")
    table = pd.DataFrame([(study_id, "; ".join(why)) for study_id, why in reasons.items()], columns=["study_id", "why"])
    prior_first = ~table["why"].str.contains("prior|alone")
    return table.iloc[np.argsort(prior_first, kind="stable")].reset_index(drop=True)


# ---- What members see where ----


def load_drawing(places: Iterable[str | Path], device: str = "cpu") -> Drawing:
    """Members that draw boxes (see Member.draw), with their weights in or below the given places; [] without any."""
    try:
        folders = weight_folders([place for place in places if Path(place).is_dir()])
    except FileNotFoundError:
        return []
    found = by_member(member_weights(folders)[0])
    return [
        (MEMBERS[name], [MEMBERS[name].load(path, device) for path in paths.values()])
        for name, paths in found.items()
        if type(MEMBERS[name]).draw is not Member.draw
    ]


def study_detections(drawing: Drawing, study: Study, boxes: Sequence[LevelBox]) -> pd.DataFrame:
    """What members see where: table of DETECTION_COLUMNS.

    drawing: of load_drawing; study: normalised; boxes: five LevelBoxes.
    """
    tables = [member.draw(weights, study, boxes) for member, weights in drawing]
    tables = [table for table in tables if table is not None and len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=DETECTION_COLUMNS)
