"""What the parts of the slice network are worth: trained without each, or with another, on a run's own studies.

    python tests/benchmarks/bench_slices.py RUN [--variants noise "3 slices"] [--seeds 3] [--workers 2]

RUN: a finished run of the pipeline on phantoms with a slice member (01_preprocess, 02_train_spinenet, its folder, and
05_inference for the test studies' levels). Each variant is trained with the member's own parameters but those named in
VARIANTS below, once for each seed; scored are the run's test studies, without test-time views. `minus base` is the
mean over the seeds of the difference to the base of the same seed, with its standard error. Finished trainings are kept
in RUN_slices. A script, which pytest does not collect.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from scipy.special import softmax  # noqa: E402

from lumbar.data.competition import labels_to_array  # noqa: E402
from lumbar.data.metric import score_arrays  # noqa: E402
from lumbar.data.preprocess import preprocess_studies  # noqa: E402
from lumbar.data.tables import read_folds, read_labels  # noqa: E402
from lumbar.data.volume import study_paths  # noqa: E402
from lumbar.grade.pretrained import pretrained_file  # noqa: E402
from lumbar.grade.slice_crops import SliceCrop, SliceDataset  # noqa: E402
from lumbar.grade.slice_network import load_slices, measure_slices  # noqa: E402
from lumbar.grade.slice_training import SliceConfig, SliceRecipe  # noqa: E402
from lumbar.grade.trainer import train_classifier  # noqa: E402
from lumbar.storage import write_json  # noqa: E402

VARIANTS = {
    "base": {},
    "noise": {"PRETRAINED": ""},
    "no neighbours as colours": {"CHANNELS": 1},
    "3 slices": {"SLICES": 3},
    "3 slices, no LSTM": {"SLICES": 3, "SEQUENCE": "none"},
    "levels apart": {"ACROSS_LEVELS": False},
    "no jitter": {"STRENGTH": 0.0},
    "CutMix of levels": {"EXCHANGE": 0.3},
    "mixup": {"MIX": 0.5},
    "drop path": {"DROP_PATH": 0.2},
    "lower rates": {"LEARNING_RATE": 1.0e-3, "BACKBONE_RATE": 0.3},
    "lower rates, half the epochs": {"LEARNING_RATE": 1.0e-3, "BACKBONE_RATE": 0.3, "EPOCHS": 10},
    "finer pixels": {"SIZE_PX": 64, "MM_PER_PX": 0.6, "AXIAL_MM_PER_PX": 0.375},
}


def member_of(run):
    """(parameters, fold) of the run's one slice member."""
    found = sorted(run.glob("04_train_vit_slices*/manifest.json"))
    if len(found) != 1:
        raise ValueError(f"{run}: {len(found)} finished folders of 04_train_vit_slices, not one")
    parameters = json.loads(found[0].read_text())["parameters"]
    return parameters, parameters["FOLDS"][0]


def config_of(p):
    """SliceConfig of a notebook's parameters, as 04 makes it."""
    pretrained = str(pretrained_file(p["PRETRAINED"], p["BACKBONE"]) or "")
    return SliceConfig(
        backbone=p["BACKBONE"],
        epochs=p["EPOCHS"],
        batch=p["BATCH"],
        accumulate=p["ACCUMULATE"],
        learning_rate=p["LEARNING_RATE"],
        weight_decay=p["WEIGHT_DECAY"],
        dropout=p["DROPOUT"],
        strength=p["STRENGTH"],
        mix=p["MIX"],
        ema=p["EMA"],
        precision=p["PRECISION"],
        recompute=p["RECOMPUTE"],
        pretrained=pretrained,
        backbone_rate=p["BACKBONE_RATE"] or 0.3,
        drop_path=p.get("DROP_PATH", 0.0),
        stride=p["STRIDE"],
        sequence=p["SEQUENCE"],
        levels=p["ACROSS_LEVELS"],
        exchange=p["EXCHANGE"],
    )


def trained(run, out, variant, seed):
    """(variant, seed, total on the test studies): trained unless it is known."""
    torch.set_num_threads(1)
    name = f"{variant.replace(' ', '_').replace(',', '')}_{seed}"
    known = out / f"{name}.json"
    if known.is_file():
        return variant, seed, json.loads(known.read_text())["total"]
    own, fold = member_of(run)
    p = own | VARIANTS[variant]
    names = ("SIZE_PX", "MM_PER_PX", "AXIAL_MM_PER_PX", "SLICES", "CHANNELS")
    crop = SliceCrop(**{name.lower(): p[name] for name in names})
    cache = out / "_".join(["crops", *(str(p[name]) for name in names)])
    cache.mkdir(exist_ok=True)
    paths = study_paths(run / "01_preprocess")
    labels = read_labels(run / "data" / "train.csv").merge(read_folds(run / "01_preprocess"), on="study_id")
    labels = labels[labels["study_id"].isin(paths)]
    study_ids, grades = labels_to_array(labels)
    held_out = np.isin(study_ids, labels.loc[labels["fold"] == fold, "study_id"])
    levels = pd.read_csv(run / "02_train_spinenet" / "levels.csv")
    train, valid = (SliceDataset(paths, study_ids[k], grades[k], levels, crop, cache) for k in (~held_out, held_out))
    config = replace(config_of(p), seed=seed)
    train_classifier(out, name, train, valid, config, {"fold": fold}, recipe=SliceRecipe())
    test_ids, test_grades = labels_to_array(read_labels(run / "data" / "phantom_test_labels.csv"))
    test_levels = pd.read_csv(run / "05_inference" / "levels.csv")
    test = SliceDataset(study_paths(out / "test"), test_ids, test_grades, test_levels, crop, cache)
    model, _ = load_slices(out / f"{name}.safetensors")
    total = float(score_arrays(test_grades, softmax(measure_slices([model], test)[0], -1))["total"])
    write_json(known, {"total": total})
    return variant, seed, total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    run = options.run.resolve()
    out = run.with_name(f"{run.name}_slices")
    (out / "test").mkdir(parents=True, exist_ok=True)
    preprocess_studies(run / "data", "test", out / "test" / "volumes", options.workers)
    totals = {}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        variants = dict.fromkeys(["base", *options.variants])
        work = [pool.submit(trained, run, out, name, seed) for seed in range(options.seeds) for name in variants]
        for future in as_completed(work):
            variant, seed, total = future.result()
            totals[variant, seed] = total
            print(f"{variant}, seed {seed}: {total:.4f}", flush=True)
    table = pd.Series(totals).unstack()
    less = table.sub(table.loc["base"])
    error = less.std(axis=1, ddof=1) / np.sqrt(options.seeds)
    shown = pd.DataFrame({"mean": table.mean(axis=1), "minus base": less.mean(axis=1), "standard error": error})
    print(pd.concat([shown, table.add_prefix("seed ")], axis=1).loc[list(variants)].round(4).to_string())


if __name__ == "__main__":
    main()
