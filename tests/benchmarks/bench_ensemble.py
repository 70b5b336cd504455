"""What the search for an ensemble gains: seven synthetic members on 2,000 studies, nested cross-validation.

    python tests/benchmarks/bench_ensemble.py                           # every bed, as a Markdown table
    python tests/benchmarks/bench_ensemble.py --beds half --studies 12 --folds 4 --repeat 20

The latent severities have the competition's correlations and the grades its frequencies (phantom); the reader adds
noise, a part of it his own style over the whole study. A member is the Bayesian posterior of a grade given evidence:
the severity of its cell through noise that all members share, larger in poor images, and noise of its own with heavy
tails; and, blurred once more, that of the cells it looks at: its own, its level's, or all. Then its calibration is
spoiled: sharpness and class bias differ by condition, level and fold, most of it alike in all members. Rows are lost.
The beds:

none: a member sees its cell alone, an upper bound of what neighbours can be worth to the stacker;
half: other cells are blurred by a standard deviation of the severity; well: by a quarter of it, a lower bound;
rough: as half, but spoiled more, and 1% of the grades are slips, 1.5% of the studies are graded a level off;
null: as none, with grades that do not correlate: there is nothing to find for the stacker;
unlike: one member knows nearly all there is to know, of every row, and is well calibrated, as detectors on phantoms
are; the others have eight times the noise of their own. There is little to gain, and much to lose.
A script, which pytest does not collect.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from scipy.special import ndtr  # noqa: E402

import phantom  # noqa: E402
from lumbar.data.competition import make_folds, to_submission  # noqa: E402
from lumbar.grade import ensemble  # noqa: E402
from lumbar.names import GRADES, LABEL_COLUMNS, SEVERITY_WEIGHTS  # noqa: E402
from phantom import severity  # noqa: E402

RELIABILITY = 0.93  # correlation of the graded severity with the latent one
STYLE = 0.3  # correlation of a reader's noise between cells of one study
SHARED = np.repeat([0.30, 0.80, 0.80, 0.62, 0.62], 5)  # the shared noise of the cells, in standard deviations
# name: (shared noise, so that equal weights score about .39; blur of other cells; spoiled calibration; slips)
BEDS = {
    "none": (0.51, np.inf, 0.6, 0.0),
    "half": (0.56, 1.0, 0.6, 0.0),
    "well": (0.60, 0.25, 0.6, 0.0),
    "rough": (0.45, 1.0, 1.0, 1.0),
    "null": (0.45, np.inf, 0.6, 0.0),
    "unlike": (0.45, 0.25, 0.2, 0.0),
}
UNLIKE = {"yolo": 1.0}  # own noise in the bed of that name; others: 8 times
MEMBERS = {  # own noise (spinal, foraminal, subarticular), the cells it looks at, share of rows lost
    "yolo": ((0.08, 0.09, 0.09), "cell", 0.10),
    "level": ((0.07, 0.07, 0.07), "all", 0.03),
    "study": ((0.13, 0.13, 0.13), "all", 0.0),
    "level_large": ((0.07, 0.07, 0.07), "level", 0.03),
    "axial": ((0.09, 0.16, 0.07), "level", 0.05),
    "sagittal": ((0.07, 0.07, 0.15), "all", 0.0),
    "weak": ((0.12, 0.15, 0.13), "level", 0.05),
}
_CONDITION, _LEVEL = np.divmod(np.arange(25), 5)
_GROUP = np.array([0, 1, 1, 2, 2])[_CONDITION]


def make_case(studies, seed, bed="half", folds=5):
    """(labels in train.csv's form with gaps, dict member -> submission with rows missing, folds: study_id, fold)."""
    rng = np.random.default_rng(seed)
    noise, blur, spoiled, slips = BEDS[bed]
    latent, grades = _sample(rng, studies, bed == "null", slips)
    ids = np.sort(rng.choice(10**9, studies, replace=False))
    labels = pd.DataFrame(np.array(GRADES, object)[grades], columns=list(LABEL_COLUMNS))
    labels = labels.mask(rng.random(labels.shape) < 0.012)
    labels.insert(0, "study_id", ids)
    table = make_folds(labels, folds, seed)
    fold = table["fold"].to_numpy()

    def draw(size, *shape):
        return spoiled * size * rng.standard_normal(shape)

    poor = np.where(rng.random((studies, 1)) < 0.05, 2.0, 1.0) * np.where(rng.random(latent.shape) < 0.03, 2.5, 1.0)
    seen_by_all = latent + noise * SHARED * poor * rng.standard_normal(latent.shape)
    correlation = np.eye(25) if bed == "null" else _correlation()
    sharpness = draw(0.10, 3)[_GROUP] + draw(0.08, 3, 5)[_GROUP, _LEVEL]
    bias = draw(0.12, 3, 3)[_GROUP] + draw(0.12, 3, 5, 3)[_GROUP, _LEVEL]
    tables = {}
    for name, (noises, looks_at, lost) in MEMBERS.items():
        own = np.array(noises)[_GROUP] * (UNLIKE.get(name, 8.0) if bed == "unlike" else 1.0)
        tail = np.where(rng.random(latent.shape) < 0.04, 3.0, 1.0)
        evidence = seen_by_all + own * tail * rng.standard_normal(latent.shape)
        variance = 1.1 * ((noise * SHARED) ** 2 + own**2)
        if bed == "unlike":
            looks_at, lost = "all", 0.0
        logits = np.log(_posterior(rng, evidence, variance, correlation, looks_at, blur))
        sharp = sharpness + 0.06 * spoiled + draw(0.06, 3)[_GROUP] + draw(0.05, 3, 5)[_GROUP, _LEVEL]
        sharp = np.exp(sharp + draw(0.03, folds)[fold][:, None])
        moved = bias + draw(0.06, 3, 3)[_GROUP] + draw(0.10, 3, 5, 3)[_GROUP, _LEVEL]
        moved = moved + draw(0.05, folds, 3, 3)[fold][:, _GROUP]
        logits = logits * sharp[..., None] + moved
        p = np.exp(logits - logits.max(-1, keepdims=True)).reshape(studies, 5, 5, 3)
        predictions = to_submission(ids, p)
        tables[name] = predictions[rng.random(len(predictions)) >= lost]
    return labels, tables, table


def _correlation():
    """(25, 25) correlations of the latent severities: what the grades show, less the reader's part."""
    levels = severity._LEVEL_CORRELATION[np.abs(np.subtract.outer(range(5), range(5)))]
    shown = phantom.READER_RELIABILITY**2 * np.kron(severity._CONDITION_CORRELATION, levels)
    latent = shown - (1 - RELIABILITY**2) * STYLE
    np.fill_diagonal(latent, RELIABILITY**2)
    value, vector = np.linalg.eigh(latent)
    latent = (vector * np.maximum(value, 1e-3)) @ vector.T
    return latent / np.sqrt(np.outer(np.diag(latent), np.diag(latent)))


def _sample(rng, studies, independent, slips):
    """(latent severity (n, 25), grades (n, 25) int in {0, 1, 2})."""
    correlation = np.eye(25) if independent else _correlation()
    reader = np.eye(25) if independent else STYLE + (1 - STYLE) * np.eye(25)
    latent, noise = (rng.standard_normal((studies, 25)) @ np.linalg.cholesky(m).T for m in (correlation, reader))
    graded = RELIABILITY * latent + np.sqrt(1 - RELIABILITY**2) * noise
    grades = (graded[..., None] > phantom.grade_thresholds().reshape(25, 2)).sum(-1)
    slip = rng.random(grades.shape) < 0.01 * slips
    grades = np.where(slip, grades[rng.permutation(studies)], grades).reshape(-1, 5, 5)
    off = rng.random(studies) < 0.015 * slips
    grades[off] = np.concatenate([grades[off, :, 1:], grades[off, :, -1:]], 2)
    return latent, grades.reshape(-1, 25)


def _posterior(rng, evidence, variance, correlation, looks_at, blur):
    """The grades' probabilities (n, 25, 3), weighted as the metric is, given evidence (n, 25), variance (25,)."""
    blurred = evidence + (blur if np.isfinite(blur) else 0.0) * rng.standard_normal(evidence.shape)
    cuts = phantom.grade_thresholds().reshape(25, 2)
    result = np.empty((*evidence.shape, 3))
    for cell in range(25):
        seen = {"cell": _LEVEL < 0, "level": _LEVEL == _LEVEL[cell], "all": _LEVEL >= 0}[looks_at] & np.isfinite(blur)
        seen[cell] = True
        (seen,) = np.nonzero(seen)
        values = np.where(seen == cell, evidence[:, seen], blurred[:, seen])
        noise = variance[seen] + np.where(seen == cell, 0.0, blur if np.isfinite(blur) else 0.0) ** 2
        with_cell = RELIABILITY * correlation[seen, cell]
        gain = np.linalg.solve(correlation[np.ix_(seen, seen)] + np.diag(noise), with_cell)
        below = ndtr((cuts[cell] - (values @ gain)[:, None]) / np.sqrt(1 - with_cell @ gain))
        edges = np.concatenate([np.zeros((len(below), 1)), below, np.ones((len(below), 1))], 1)
        result[:, cell] = np.maximum(np.diff(edges), 1e-5) * SEVERITY_WEIGHTS
    return result


def run(studies, seed, bed="half", folds=5, **options):
    """Nested scores of one case: DataFrame as cross_validate_ensemble makes it."""
    return ensemble.cross_validate_ensemble(*make_case(studies, seed, bed, folds), **options)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--beds", nargs="+", default=list(BEDS), choices=list(BEDS))
    parser.add_argument("--studies", type=int, default=1975)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="cases, averaged; the error is then that of the mean")
    parser.add_argument("--towards", default="equal", choices=("scores", "defaults", "equal"))
    options = parser.parse_args()
    columns = {}
    for bed in options.beds:
        started = time.time()
        cases = range(options.seed, options.seed + options.repeat)
        tables = [run(options.studies, seed, bed, options.folds, towards=options.towards) for seed in cases]
        mean = sum(tables) / len(tables)
        best = mean["total"][list(MEMBERS)].idxmin()
        column = {"best member": f"{mean['total'][best]:.4f}"}
        column |= {name: f"{mean['total'][name]:.4f}" for name in ensemble.VARIANTS}
        for name, what in (("equal weights", "equal weights"), (best, "best member")):
            gains = [t["total"][name] - t["total"]["+ stacker"] for t in tables]
            column[f"gain over {what}"] = f"{np.mean(gains):.4f}"
            if options.repeat > 1:
                column[f"gain over {what}"] += f" +- {np.std(gains, ddof=1) / np.sqrt(len(tables)):.4f}"
                column[f"worst case's over {what}"] = f"{min(gains):.4f}"
        columns[bed] = column
        print(f"{bed}: {(time.time() - started) / len(tables):.0f} s a case", file=sys.stderr, flush=True)
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
