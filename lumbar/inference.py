"""Inference: a study in, 25 rows out, whatever is broken."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .classifiers import crops_to_studies, cut_crops, load_classifier, predict_crops
from .dicom import Study, normalise_study, read_study
from .ensemble import MEMBERS, TTA_VIEWS, combine_members, default_ensemble
from .files import read_descriptions, to_submission
from .geometry import boxes_to_table
from .levels import locate_levels_surely
from .names import (
    CONDITIONS,
    DETECTORS,
    LEVEL_TABLE_COLUMNS,
    LEVELS,
    SEVERITIES,
    device_for,
    progress,
    write_json,
)
from .official import official_detector
from .spinenet import load_spinenet
from .yolo import load_yolo, yolo_study


@dataclass
class Members:
    """Everything that inference needs, loaded from folders of weights."""

    spinenet: object
    yolo: dict  # detector (scs, nfn, ss) -> list of loaded models, one a fold
    level: list  # (model, about) of each fold
    study: list
    prior: np.ndarray  # (5, 5, 3), the training set's weighted class prior
    detector: object = "own"  # as locate_levels takes it; "official" is loaded once
    device: str = "cpu"  # where the networks are


def find_weights(folders, pattern):
    """Files of that name in the folders or one folder below, by name; of two with one name the first found."""
    found = {}
    for folder in folders:
        for path in sorted({*Path(folder).glob(pattern), *Path(folder).glob("*/" + pattern)}):
            if not any(".old-" in part for part in path.parts):
                found.setdefault(path.name, path)
    return [found[name] for name in sorted(found)]


def load_members(folders, members=MEMBERS, device="auto"):
    """Load every member's weights found in the folders (see find_weights). Returns Members.

    Raises FileNotFoundError without a SpineNet or without any member: a submission made of nothing but a prior
    would look like a result.
    """
    device = device_for(device)
    spinenet = find_weights(folders, "spinenet.safetensors")
    if not spinenet:
        raise FileNotFoundError(
            f"no spinenet.safetensors in {', '.join(map(str, folders))}: attach 02_train_spinenet's output"
        )
    classifiers = {
        scope: [load_classifier(path, device) for path in find_weights(folders, f"{scope}_*.safetensors")]
        if scope in members
        else []
        for scope in ("level", "study")
    }
    yolo = {
        condition: [load_yolo(path, device) for path in find_weights(folders, f"yolo_{condition}_*.safetensors")]
        if "yolo" in members
        else []
        for condition in DETECTORS
    }
    abouts = [about for models in classifiers.values() for _, about in models]
    if not abouts and not any(yolo.values()):
        raise FileNotFoundError(
            f"no member's weights in {', '.join(map(str, folders))}: attach the outputs of 03 and 04"
        )
    priors = [about["prior"] for about in abouts + [model.about for models in yolo.values() for model in models]]
    model = load_spinenet(spinenet[0], device)
    # Boxes at inference come from the detector that made those of the training.
    official = model.about.get("detector") == "official"
    return Members(
        model,
        yolo,
        classifiers["level"],
        classifiers["study"],
        np.mean(np.asarray(priors, np.float64), 0),
        official_detector(device) if official else "own",
        device,
    )


def weight_folders(places):
    """Folders with trained weights in or below the given ones, in the order found.

    places: paths. Image folders and finished stages' caches are not searched: /kaggle/input may hold 150,000 files.
    Raises FileNotFoundError naming the places if there is none.
    """
    skipped = {"train_images", "test_images", "volumes", "crops", "yolo", "images", "labels", "studies"}
    found = []
    for place in places:
        for folder, below, files in os.walk(place):
            depth = len(Path(folder).relative_to(place).parts)
            below[:] = (
                sorted(b for b in below if b not in skipped and ".old-" not in b and not b.startswith("."))
                if depth < 6
                else []
            )
            if any(name.endswith(".safetensors") for name in files):
                found.append(Path(folder))
    if not found:
        raise FileNotFoundError(
            f"no *.safetensors in or below {', '.join(map(str, places))}: attach the outputs of 02, 03 and 04"
        )
    return found


def predict_study(study, members, views=TTA_VIEWS[:2]):
    """One normalised study -> (dict member -> (5, 5, 3) probabilities or NaN, list of LevelBox, list of sentences).

    A member that fails costs only its own contribution: its rows are NaN and the sentence says why.
    """
    problems = list(study.problems)
    if not study.volumes:
        problems.append("no readable image: every row is the prior")
        return {}, None, problems
    empty = np.full((len(CONDITIONS), len(LEVELS), len(SEVERITIES)), np.nan)
    predictions = {}
    boxes, _, problem = locate_levels_surely(study, members.spinenet, detector=members.detector)
    if problem:
        problems.append(f"levels: {problem}")

    def attempt(name, work):
        try:
            predictions[name] = work()
        except Exception as error:
            predictions[name] = empty.copy()
            problems.append(f"{name}: {type(error).__name__}: {error}")

    def classify(models, scope):
        # Folds mostly see the same crops: those are cut once and go through all their models.
        results = []
        for crop in {json.dumps(about["crop"]): about["crop"] for _, about in models}.values():
            crops = cut_crops(study, boxes, crop, members.device)
            levels = np.arange(len(LEVELS)) if scope == "level" else None
            own = [model for model, about in models if about["crop"] == crop]
            predicted = predict_crops(own, crops, crop, levels, views)
            results += [np.log(crops_to_studies(predicted, scope)[0])] * len(own)
        mean = np.exp(np.mean(results, 0))
        return mean / mean.sum(-1, keepdims=True)

    def detect():
        result = empty.copy()
        for condition, models in members.yolo.items():
            if models:
                rows = [yolo_study(model, study, boxes) for model in models]
                indices = list(DETECTORS[condition][1])
                result[indices] = np.mean(rows, 0)
        return result

    if any(members.yolo.values()):
        attempt("yolo", detect)
    if members.level:
        attempt("level", lambda: classify(members.level, "level"))
    if members.study:
        attempt("study", lambda: classify(members.study, "study"))
    return predictions, boxes, problems


def studies_to_predict(data, split):
    """dict study_id -> dict series_id -> description: every study that a submission must have rows of.

    The descriptions table names the series; studies that only have a folder in {split}_images or rows in
    sample_submission.csv come with no series, and so with the prior.
    """
    table = read_descriptions(data, split)
    jobs = {
        int(study_id): dict(zip(group["series_id"], group["description"], strict=True))
        for study_id, group in table.groupby("study_id")
    }
    others = {path.name for path in (Path(data) / f"{split}_images").glob("*") if path.name.isdigit()}
    sample = Path(data) / "sample_submission.csv"
    if split == "test" and sample.is_file():
        others |= set(pd.read_csv(sample)["row_id"].astype(str).str.split("_").str[0])
    return jobs | {study_id: {} for study_id in sorted(map(int, others)) if study_id not in jobs}


def infer_studies(data, split, members, ensemble, out, views=TTA_VIEWS[:2]):
    """Predict every study of a split: (submission DataFrame, log DataFrame, member tables dict, levels DataFrame).

    Studies: see studies_to_predict. Reads the next study while one is predicted. Each finished study is saved in
    out/studies, so a restart continues; memory does not grow with their number.

    Where a member has nothing to say the others carry its weight; where none has, the training set's prior for
    the condition and level stands, and the log names it. Raises RuntimeError when a member that was loaded failed in
    every study: that is a mistake in the set-up, not bad luck with the data (while Kaggle scores a submission it is
    printed instead, a submission without that member being better than none).
    """
    from concurrent.futures import ThreadPoolExecutor

    folder = Path(out) / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = studies_to_predict(data, split)
    todo = [study_id for study_id in jobs if not (folder / f"{study_id}.json").is_file()]

    def read(study_id):
        started = time.time()
        try:
            study = normalise_study(read_study(Path(data) / f"{split}_images" / str(study_id), jobs[study_id]))
        except Exception as error:
            study = Study(study_id, [], [f"study {study_id} cannot be read ({type(error).__name__}: {error})"])
        return study, time.time() - started

    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(read, todo[0]) if todo else None
        for number in progress(range(len(todo)), f"predicting {split} studies"):
            study, reading = following.result()
            if number + 1 < len(todo):
                following = reader.submit(read, todo[number + 1])
            started = time.time()
            predictions, boxes, problems = predict_study(study, members, views)
            write_json(
                folder / f"{study.study_id}.json",
                {
                    "predictions": {m: np.where(np.isfinite(p), p, -1) for m, p in predictions.items()},
                    "levels": boxes_to_table(study.study_id, boxes or []).to_dict("records"),
                    "problems": problems,
                    "reading_s": round(reading, 3),
                    "predicting_s": round(time.time() - started, 3),
                },
            )
    log, levels, results = (
        [],
        [],
        {study_id: json.loads((folder / f"{study_id}.json").read_text()) for study_id in jobs},
    )
    names = [m for m in MEMBERS if any(m in r["predictions"] for r in results.values())]
    stack = {m: np.full((len(jobs), len(CONDITIONS), len(LEVELS), len(SEVERITIES)), np.nan) for m in names}
    for number, (study_id, result) in enumerate(results.items()):
        for member, values in result["predictions"].items():
            values = np.asarray(values, np.float64)
            stack[member][number] = np.where(values < 0, np.nan, values)
        levels += result["levels"]
    shape = (len(jobs), len(CONDITIONS), len(LEVELS), len(SEVERITIES))
    nothing = {"study": np.full(shape, np.nan)}
    probabilities, count = combine_members(stack or nothing, ensemble, members.prior)
    for number, (study_id, result) in enumerate(results.items()):
        complete = [m for m in names if np.isfinite(stack[m][number]).all()]
        partial = [m for m in names if m not in complete and np.isfinite(stack[m][number]).any()]
        log.append(
            {
                "study_id": study_id,
                "members": " ".join(complete),
                "partial": " ".join(partial),
                "prior_rows": int((count[number] == 0).sum()),
                "levels": " ".join(sorted({row["source"] for row in result["levels"]})),
                "reading_s": result["reading_s"],
                "predicting_s": result["predicting_s"],
                "problems": " | ".join(result["problems"]),
            }
        )
    ids = np.array(list(jobs), np.int64)
    for member in [m for m in MEMBERS if m not in names or not np.isfinite(stack[m]).any()]:
        loaded = {"yolo": any(members.yolo.values()), "level": members.level, "study": members.study}[member]
        readable = [r for r in results.values() if r["levels"]]
        if loaded and readable:
            reason = next((p for r in readable for p in r["problems"] if p.startswith(f"{member}:")), "no reason given")
            message = f"{member} failed in each of {len(readable)} readable studies ({reason})"
            if not os.environ.get("KAGGLE_IS_COMPETITION_RERUN"):
                for study_id in jobs:  # what failed for this reason must not be found as finished work
                    (folder / f"{study_id}.json").unlink()
                raise RuntimeError(message)
            print(message)
    tables = {
        m: to_submission(ids, combine_members({m: stack[m]}, default_ensemble([m]), members.prior)[0]) for m in names
    }
    return (
        to_submission(ids, probabilities),
        pd.DataFrame(log),
        tables,
        pd.DataFrame(levels, columns=LEVEL_TABLE_COLUMNS),
    )
