"""Test-time views and the weighted ensemble."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from .files import class_prior, from_submission, labels_to_array, read_labels, score_arrays
from .names import GROUPS

# Views whose log probabilities are averaged at inference, best first; the first is the plain one.
TTA_VIEWS = (
    {},
    {"mirror": True},
    {"shift_mm": (2.0, 0.0, 0.0)},
    {"shift_mm": (-2.0, 0.0, 0.0)},
    {"shift_mm": (0.0, 2.0, 0.0), "mirror": True},
    {"shift_mm": (0.0, -2.0, 0.0)},
    {"rotation_deg": (4.0, 0.0, 0.0)},
    {"rotation_deg": (-4.0, 0.0, 0.0), "mirror": True},
)
MEMBERS = ("yolo", "level", "study")
# Solution B's weights, .65 for the detectors and .35 for the 3D networks, which are two here.
DEFAULT_WEIGHTS = {"yolo": 0.65, "level": 0.25, "study": 0.10}


def default_ensemble(members=MEMBERS):
    """The ensemble without out-of-fold predictions: default weights, no calibration."""
    return {
        "weights": {group: {m: DEFAULT_WEIGHTS.get(m, 0.1) for m in members} for group in GROUPS},
        "temperature": {group: 1.0 for group in GROUPS},
        "bias": {group: [0.0, 0.0, 0.0] for group in GROUPS},
        "found": "defaults",
    }


def combine_members(predictions, ensemble, prior):
    """Weighted mean of log probabilities, calibrated per group of conditions.

    predictions: dict member -> (n, 5, 5, 3), NaN where a member has nothing to say: its weight goes to the others.
    prior: (5, 5, 3), used where no member has anything. Returns (probabilities (n, 5, 5, 3) float64 with rows that
    sum to 1, n_members (n, 5, 5) int: how many members each row rests on).
    """
    members = list(predictions)
    stack = np.stack([np.asarray(predictions[m], np.float64) for m in members])
    there = np.isfinite(stack).all(-1) & (np.nan_to_num(stack).sum(-1) > 0)
    safe = np.where(there[..., None], stack, 1.0)
    log_p = np.log(np.clip(safe / safe.sum(-1, keepdims=True), 1e-6, 1))
    result = np.empty(stack.shape[1:])
    for group, conditions in GROUPS.items():
        conditions = list(conditions)
        weight = np.array([ensemble["weights"][group].get(m, 0.0) for m in members])
        weight = weight[:, None, None, None] * there[:, :, conditions]
        total = weight.sum(0)
        # Members of weight 0 still help where they are all there is.
        weight = np.where(total > 0, weight, there[:, :, conditions].astype(np.float64))
        mean = (weight[..., None] * log_p[:, :, conditions]).sum(0) / np.maximum(weight.sum(0), 1e-12)[..., None]
        logits = mean / ensemble["temperature"][group] + np.asarray(ensemble["bias"][group])
        result[:, conditions] = np.exp(logits - logits.max(-1, keepdims=True))
    count = there.sum(0)
    result = np.where((count > 0)[..., None], result, np.asarray(prior)[None])
    return result / result.sum(-1, keepdims=True), count


def fit_ensemble(labels, tables, strength=40.0, members=MEMBERS):
    """Weights, temperature and class bias per group of conditions from out-of-fold predictions.

    labels: train.csv's wide form; tables: dict member -> submission-like DataFrame (any rows may be missing).
    The competition's own terms are minimised (canal together with any-severe), plus a penalty worth `strength`
    graded rows that pulls toward the defaults: a few dozen rows must not decide alone. Returns a dict like
    default_ensemble's, with the scores before and after in `found`.
    """
    from scipy.optimize import minimize

    study_ids, grades = labels_to_array(labels)
    predictions = align_members(study_ids, tables)
    names = [m for m in members if m in predictions] + [m for m in predictions if m not in members]
    ensemble = default_ensemble(names)
    prior = class_prior(grades)
    covered = np.stack([np.isfinite(predictions[m]).all(-1) for m in names])
    before, after = {}, {}
    for group, conditions in GROUPS.items():
        conditions = list(conditions)
        graded = (grades[:, conditions] >= 0) & covered[:, :, conditions].any(0)
        studies = graded.any((1, 2))
        if studies.sum() < 2:
            continue
        masked = np.full_like(grades[studies], -1)
        masked[:, conditions] = np.where(graded, grades[:, conditions], -1)[studies]
        part = {m: predictions[m][studies] for m in names}
        start = np.log([ensemble["weights"][group][m] for m in names])

        def unpack(values, group=group, start=start):
            weight = np.exp(start + values[: len(names)])
            trial = {key: dict(ensemble[key]) for key in ("weights", "temperature", "bias")}
            trial["weights"][group] = dict(zip(names, (weight / weight.sum()).tolist()))
            trial["temperature"][group] = float(np.exp(values[len(names)]))
            trial["bias"][group] = [0.0, *values[len(names) + 1 :].tolist()]
            return trial

        def loss(values, penalised=True, part=part, masked=masked, group=group, rows=graded.sum()):
            scores = score_arrays(masked, combine_members(part, unpack(values), prior)[0])
            value = scores[group] + (scores["any_severe"] if group == "spinal" else 0.0)
            return value + penalised * strength / rows * 0.1 * float(np.sum(np.square(values)))

        zero = np.zeros(len(names) + 3)
        found = minimize(loss, zero, method="L-BFGS-B", bounds=[(-3, 3)] * len(zero))
        trial = unpack(found.x)
        before[group], after[group] = loss(zero, False), loss(found.x, False)
        for key in ("weights", "temperature", "bias"):
            ensemble[key][group] = trial[key][group]
    if after:
        ensemble["found"] = {"rows": int(covered.any(0).sum()), "before": before, "after": after}
    return ensemble


def align_members(study_ids, tables):
    """dict member -> submission-like table -> dict member -> (n, 5, 5, 3), NaN where a row is missing."""
    place = {study_id: number for number, study_id in enumerate(study_ids)}
    aligned = {}
    for member, table in tables.items():
        ids, values = from_submission(table)
        result = np.full((len(study_ids), *values.shape[1:]), np.nan)
        for study_id, value in zip(ids, values):
            if study_id in place:
                result[place[study_id]] = value
        aligned[member] = result
    return aligned


def read_out_of_fold(folders):
    """dict member -> out-of-fold table, from the stage folders of 03 and 04; the three detectors are one member.

    Looks for */oof.csv below each folder too, as the outputs of several Kaggle kernels lie side by side.
    """
    tables = {}
    for folder in folders:
        for path in sorted({*Path(folder).glob("oof.csv"), *Path(folder).glob("*/oof.csv")}):
            for member, pattern in (
                ("yolo", "yolo_*.safetensors"),
                ("level", "level_*.safetensors"),
                ("study", "study_*.safetensors"),
            ):
                if any(path.parent.glob(pattern)):
                    tables.setdefault(member, {})[path.resolve()] = pd.read_csv(path)
    # The same fold's table may be attached twice.
    return {
        member: pd.concat(found.values(), ignore_index=True).drop_duplicates("row_id", ignore_index=True)
        for member, found in tables.items()
    }


def ensemble_for(folders, data, members=MEMBERS):
    """The ensemble's weights: an ensemble.json that lies with the weights (05_inference writes one, keep it there);
    else fitted on the oof.csv files that lie there and data/train.csv; else the defaults. See fit_ensemble.

    folders: as weight_folders finds them. Prints which of the three it was.
    """
    for folder in folders:
        if (Path(folder) / "ensemble.json").is_file():
            print(f"the ensemble's weights are those of {Path(folder) / 'ensemble.json'}")
            return json.loads((Path(folder) / "ensemble.json").read_text())
    tables = {m: t for m, t in read_out_of_fold(folders).items() if m in members}
    labels = Path(data) / "train.csv"
    if not tables or not labels.is_file():
        print("no out-of-fold predictions or no train.csv: the ensemble's default weights stand")
        return default_ensemble([m for m in MEMBERS if m in members])
    print(f"the ensemble's weights are fitted on out-of-fold predictions of {', '.join(tables)}")
    return fit_ensemble(read_labels(labels), tables, members=[m for m in MEMBERS if m in members])
