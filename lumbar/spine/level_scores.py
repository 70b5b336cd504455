"""How good levels and vertebrae are, against the phantom's truth and the readers' points.

May use: vertebra, fallbacks, data.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.geometry import LevelBox, boxes_from_table, coordinates_to_lps
from ..data.source import Source
from ..data.volume import Study
from .fallbacks import level_boxes
from .vertebra import _LUMBAR, VERTEBRA_TABLE_COLUMNS, vertebrae_from_table


def read_vertebra_truth(path: str | Path, split: str | None = None) -> pd.DataFrame:
    """Read the phantom's true vertebrae.

    Parameters
    ----------
    path : str or Path
        phantom_vertebrae.csv.
    split : str, optional
        `train` or `test`; default: both.

    Returns
    -------
    DataFrame
        The columns of vertebrae.csv (VERTEBRA_TABLE_COLUMNS), source `truth`.

    Raises
    ------
    FileNotFoundError
        There is no such file: only phantoms have true vertebrae.
    ValueError
        A column is missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: only phantom data have true vertebrae")
    table = pd.read_csv(path)
    if split is not None and "split" in table:
        table = table[table["split"] == split]
    table = table.assign(width_mm=2 * table["half_width_mm"], confidence=1.0, source=str(Source.TRUTH))
    missing = [column for column in VERTEBRA_TABLE_COLUMNS if column not in table]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}")
    return table[VERTEBRA_TABLE_COLUMNS].reset_index(drop=True)


def level_errors(levels: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Compare level boxes with true vertebrae.

    Parameters
    ----------
    levels : DataFrame
        levels.csv.
    truth : DataFrame
        From read_vertebra_truth.

    Returns
    -------
    DataFrame
        One row for each level of each study that is in both: study_id, level, error_mm (between centres), along_mm (of
        it along the true disc's normal), angle_deg (between the normals), named (the nearest true disc has this name),
        confidence, source.
    """
    rows = []
    for study_id in sorted(set(levels["study_id"]) & set(truth["study_id"])):
        true_boxes = {box.level: box for box in level_boxes(vertebrae_from_table(truth, study_id))}
        centers = np.stack([box.center_lps_mm for box in true_boxes.values()])
        for box in boxes_from_table(levels, study_id):
            if box.level not in true_boxes:
                continue
            true_box = true_boxes[box.level]
            offset = true_box.from_lps(box.center_lps_mm)
            nearest = list(true_boxes)[int(np.linalg.norm(centers - box.center_lps_mm, axis=1).argmin())]
            angle = np.degrees(np.arccos(np.clip(box.axes[0] @ true_box.axes[0], -1, 1)))
            rows.append(
                [
                    study_id,
                    box.level,
                    float(np.linalg.norm(offset)),
                    float(abs(offset[0])),
                    float(angle),
                    nearest == box.level,
                    box.confidence,
                    str(box.source),
                ]
            )
    return pd.DataFrame(
        rows, columns=["study_id", "level", "error_mm", "along_mm", "angle_deg", "named", "confidence", "source"]
    )


def vertebra_errors(vertebrae: pd.DataFrame, truth: pd.DataFrame, reach_mm: float = 12.0) -> pd.DataFrame:
    """Detected bodies against true ones, L1 to S1.

    vertebrae, truth: vertebra tables. Returns a DataFrame, one row for each true body of each study that is in both:
    study_id, vertebra, error_mm (to the nearest body that was seen, not extrapolated), found (within reach_mm),
    named (found, and under its name).
    """
    seen = vertebrae[vertebrae["source"].map(lambda source: Source.parse(source).seen)]
    rows = []
    for study_id in sorted(set(vertebrae["study_id"]) & set(truth["study_id"])):
        bodies = vertebrae_from_table(seen, study_id)
        for true in vertebrae_from_table(truth, study_id):
            if true.name not in _LUMBAR:
                continue
            distance = [np.linalg.norm(body.center_lps_mm - true.center_lps_mm) for body in bodies]
            error_mm = float(min(distance, default=np.inf))
            found = error_mm < reach_mm
            rows.append(
                [study_id, true.name, error_mm, found, found and bodies[int(np.argmin(distance))].name == true.name]
            )
    return pd.DataFrame(rows, columns=["study_id", "vertebra", "error_mm", "found", "named"])


def locating_scores(
    levels: pd.DataFrame, vertebrae: pd.DataFrame, truth: pd.DataFrame, right_mm: float = 4.0
) -> dict[str, float]:
    """Sum level_errors and vertebra_errors up.

    Parameters
    ----------
    levels, vertebrae : DataFrame
        levels.csv and vertebrae.csv.
    truth : DataFrame
        From read_vertebra_truth.
    right_mm : float
        A level is right if it is named rightly and its centre lies within this distance of the true one.

    Returns
    -------
    dict of str to float
        studies, levels (numbers), right, named (shares), median_mm, p95_mm, median_angle_deg, vertebrae_found,
        vertebrae_named (shares).
    """
    boxes, bodies = level_errors(levels, truth), vertebra_errors(vertebrae, truth)
    return {
        "studies": int(boxes["study_id"].nunique()),
        "levels": len(boxes),
        "right": float((boxes["named"] & (boxes["error_mm"] < right_mm)).mean()),
        "named": float(boxes["named"].mean()),
        "median_mm": float(boxes["error_mm"].median()),
        "p95_mm": float(boxes["error_mm"].quantile(0.95)),
        "median_angle_deg": float(boxes["angle_deg"].median()),
        "vertebrae_found": float(bodies["found"].mean()),
        "vertebrae_named": float(bodies.loc[bodies["found"], "named"].mean()) if bodies["found"].any() else 0.0,
    }


def compare_with_labels(boxes: Sequence[LevelBox], coordinates: pd.DataFrame, study: Study) -> pd.DataFrame:
    """Boxes of one study against the competition's label points, which real data have too.

    coordinates: this study's rows of read_coordinates. Returns a DataFrame condition, level, head_mm, left_mm,
    back_mm (the point in the frame of its level's box) and nearest (the level whose disc plane is nearest); points
    that lie on no slice (see place_points) are left out.
    """
    by_level = {box.level: box for box in boxes}
    rows = []
    for row, point in zip(coordinates.itertuples(), coordinates_to_lps(coordinates, study)):
        if np.isfinite(point).all() and row.level in by_level:
            head_mm = {level: abs(box.from_lps(point)[0]) for level, box in by_level.items()}
            rows.append(
                [row.condition, row.level, *by_level[row.level].from_lps(point), min(head_mm, key=head_mm.__getitem__)]
            )
    return pd.DataFrame(rows, columns=["condition", "level", "head_mm", "left_mm", "back_mm", "nearest"])
