"""A finished run in miniature, made by hand: six training studies, two test studies, one member's predictions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from small_study import make_boxes, make_points, make_probabilities, make_study, make_vertebrae

import utils
from lumbar.data.geometry import boxes_to_table
from lumbar.data.volume import Study, save_study
from lumbar.grade.ensemble import default_ensemble
from lumbar.names import LABEL_COLUMNS
from lumbar.spine.vertebra import vertebrae_to_table

TRAIN, TEST = range(1, 7), (11, 12)
STAGES = ("01_preprocess", "02_train_spinenet", "04_train_vit_level_0", "05_inference")


def make_run(out: Path) -> Path:
    """Write data/ and the stages' folders below `out`; study 3 and test study 12 have a second numbering."""
    for name in ("data", "01_preprocess/volumes", *STAGES[1:]):
        (out / name).mkdir(parents=True)
    study, series = make_study(), ["problem"]
    rng = np.random.default_rng(0)
    for study_id in TRAIN:
        volumes = [replace(volume, study_id=study_id) for volume in study.volumes]
        save_study(Study(study_id, volumes), out / f"01_preprocess/volumes/{study_id}.safetensors")
        series.append(f"study {study_id}: a series has no slices" if study_id == 2 else "")
    (out / "01_preprocess/series.csv").write_text("\n".join(series) + "\n")
    folds = pd.DataFrame({"study_id": TRAIN, "fold": np.arange(len(TRAIN)) % 2})
    folds.to_csv(out / "01_preprocess/folds.csv", index=False)

    def located(study_ids, doubtful):
        tables = [boxes_to_table(n, make_boxes(second=0.3 if n == doubtful else 0.0)) for n in study_ids]
        return pd.concat(tables, ignore_index=True)

    located(TRAIN, 3).to_csv(out / "02_train_spinenet/levels.csv", index=False)
    located(TEST, 12).to_csv(out / "05_inference/levels.csv", index=False)
    bones = pd.concat([vertebrae_to_table(n, make_vertebrae()) for n in TRAIN], ignore_index=True)
    bones.to_csv(out / "02_train_spinenet/vertebrae.csv", index=False)

    for name, study_ids in (("train", TRAIN), ("phantom_test_labels", TEST)):
        grades = rng.integers(0, 3, (len(study_ids), 25))
        labels = pd.DataFrame(np.array(utils.GRADES)[grades], columns=LABEL_COLUMNS)
        labels.insert(0, "study_id", list(study_ids))
        labels.to_csv(out / f"data/{name}.csv", index=False)
        predicted = 0.7 * np.eye(3)[grades.reshape(-1, 5, 5)] + 0.3 * np.stack(
            [make_probabilities(n)[0] for n in study_ids]
        )
        table = utils.to_submission(study_ids, predicted)
        if name == "train":
            table["fold"] = np.repeat(folds["fold"], 25).to_numpy()
            table.to_csv(out / "04_train_vit_level_0/oof.csv", index=False)
        else:
            for end in ("", "_level"):
                table.to_csv(out / f"05_inference/submission{end}.csv", index=False)
    points = make_points().drop(columns="study_id").merge(pd.DataFrame({"study_id": TRAIN}), how="cross")
    points["condition"] = points["condition"].str.replace("_", " ").str.title()
    points["level"] = points["level"].str.upper().str.replace("_", "/")
    points.rename(columns={"x_px": "x", "y_px": "y"}).to_csv(out / "data/train_label_coordinates.csv", index=False)
    for fold in (0, 1):  # named only: nobody loads them
        (out / f"04_train_vit_level_0/level_{fold}.safetensors").write_bytes(b"no weights")
    history = pd.DataFrame({"epoch": [1, 2, 3], "loss": [1.0, 0.8, 0.7], "total": [0.9, 0.6, 0.7]})
    history.to_csv(out / "04_train_vit_level_0/level_0_history.csv", index=False)
    log = {"prior_rows": [0, 25], "seconds": [5.0, 7.0], "problems": ["", "study 12: no Axial T2"], "partial": ""}
    pd.DataFrame({"study_id": TEST, **log}).to_csv(out / "05_inference/inference_log.csv", index=False)
    (out / "05_inference/ensemble.json").write_text(json.dumps(default_ensemble(["level"])))
    for name in STAGES:
        # What is there is kept: a stage that is not known moves a folder aside.
        (out / name).rename(out / f"{name}.made")
        stage = utils.open_stage(out, name, {"SEED": 1})
        for path in (out / f"{name}.made").iterdir():
            path.rename(stage.dir / path.name)
        (out / f"{name}.made").rmdir()
        stage.close(counts={"studies": len(TRAIN)})
    return out
