"""What the search for an ensemble gains: seven synthetic members on 2,000 studies, nested cross-validation.

    python tests/benchmarks/bench_ensemble.py                    # the table for 2,000 studies
    python tests/benchmarks/bench_ensemble.py --studies 12 --repeat 20

The grades are the phantom's: the competition's frequencies, correlated between sides, levels and conditions. A
member sees each grade through noise, part of it shared by all members (the image's and the reader's), part its own,
of a size per group of conditions; it weighs what it sees with the cell's prior as the metric wants, then is made too
sure or too unsure, is biased and loses rows. Members look at one cell at a time, so what the neighbours know is
left to the stacker: an upper bound of what it can gain on real members, whose crops show neighbours, too. With
`--context` each member has learned on 1,500 other studies what neighbours say (a lower bound). With `--independent`
grades do not correlate and the stacker has nothing to find. A script, which pytest does not collect.
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

import phantom  # noqa: E402
from lumbar import ensemble  # noqa: E402
from lumbar.files import class_prior, make_folds, to_submission  # noqa: E402
from lumbar.names import GRADES, GROUPS, LABEL_COLUMNS  # noqa: E402

SHARED = 0.59  # standard deviation of the noise that all members share, in grades
MEMBERS = {  # own noise in grades (spinal, foraminal, subarticular), sharpness (1 is right), bias, share of rows lost
    "yolo": ((0.17, 0.18, 0.22), 1.3, (0.0, -0.1, -0.2), 0.10),
    "level": ((0.14, 0.14, 0.14), 1.2, (0.0, 0.1, -0.2), 0.03),
    "study": ((0.28, 0.31, 0.29), 0.8, (0.0, 0.0, 0.0), 0.0),
    "level_large": ((0.12, 0.15, 0.13), 1.5, (0.0, -0.2, -0.1), 0.03),
    "axial": ((0.23, 0.38, 0.12), 1.2, (0.0, 0.0, 0.3), 0.05),
    "sagittal": ((0.14, 0.16, 0.34), 0.7, (0.0, 0.2, 0.0), 0.0),
    "weak": ((0.42, 0.42, 0.42), 1.6, (0.0, 0.3, 0.3), 0.05),
}


def make_case(studies, seed, independent=False, context=False):
    """(labels in train.csv's form with gaps, dict member -> submission with rows missing)."""
    rng = np.random.default_rng(seed)
    _, grades = phantom.sample_severity(rng, studies)
    if independent:
        grades = np.stack([rng.permutation(column) for column in grades.reshape(studies, 25).T], 1).reshape(-1, 5, 5)
    ids = np.sort(rng.choice(10**9, studies, replace=False))
    labels = pd.DataFrame(np.array(GRADES, object)[grades.reshape(studies, 25)], columns=list(LABEL_COLUMNS))
    labels = labels.mask(rng.random(labels.shape) < 0.012)
    labels.insert(0, "study_id", ids)
    _, population = phantom.sample_severity(np.random.default_rng(10**6), 4000)
    prior = np.log(class_prior(population))
    population = population[:1500]
    shared, other = (SHARED * rng.standard_normal(g.shape) for g in (grades, population))
    tables = {}
    for name, (noises, sharpness, bias, lost) in MEMBERS.items():
        p = _member(rng, grades, prior, shared, noises, sharpness, bias)
        if context:
            learned = ensemble.fit_stacker(population, _member(rng, population, prior, other, noises, sharpness, bias))
            p = ensemble.apply_stacker(learned, p)
        table = to_submission(ids, p)
        tables[name] = table[rng.random(len(table)) >= lost]
    return labels, tables


def _member(rng, grades, prior, shared, noises, sharpness, bias):
    """One member's probabilities (n, 5, 5, 3)."""
    own = np.empty((1, 5, 1))
    for group, noise in zip(GROUPS.values(), noises, strict=True):
        own[:, list(group)] = noise
    seen = grades + shared + own * rng.standard_normal(grades.shape)
    logits = prior - np.square(seen[..., None] - np.arange(3)) / (2 * (own**2 + SHARED**2))[..., None]
    logits = sharpness * logits + np.asarray(bias)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def run(studies, seed, folds=5, independent=False, context=False, **options):
    """Nested scores of one case: DataFrame as cross_validate_ensemble makes it."""
    labels, tables = make_case(studies, seed, independent, context)
    return ensemble.cross_validate_ensemble(labels, tables, make_folds(labels, folds, seed), **options)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="cases, averaged; gain_se is then that of the mean")
    parser.add_argument("--towards", default="defaults", choices=("defaults", "equal"))
    parser.add_argument("--independent", action="store_true", help="grades without correlations")
    parser.add_argument("--context", action="store_true", help="members know what neighbours say")
    options = parser.parse_args()
    started = time.time()
    tables = [
        run(
            options.studies,
            options.seed + n,
            options.folds,
            options.independent,
            options.context,
            towards=options.towards,
        )
        for n in range(options.repeat)
    ]
    scores = sum(tables) / len(tables)
    if options.repeat > 1:
        scores["gain_se"] = np.std([t["gain"] for t in tables], axis=0, ddof=1) / np.sqrt(options.repeat)
        scores["worst_gain"] = np.min([t["gain"] for t in tables], axis=0)
    print(scores.round(4).to_string())
    print(f"{(time.time() - started) / options.repeat:.1f} s a case")


if __name__ == "__main__":
    main()
