"""How many wrong labels CLEAN finds, and how many right ones it takes for wrong, by a run's own members.

    python tests/benchmarks/bench_cleaning.py RUN [RUN ...] [--share 0.02] [--draws 50]

RUN: finished runs of the pipeline. Their out-of-fold predictions were made without the labels of the studies that they
are of: so these labels are spoiled here, afterwards, --share of them at a time by one grade up or down, and CLEAN is
asked which it doubts. That the labels of the other folds are right (as a phantom's are) flatters the members a little.
Where the run's data are a phantom whose readers slip, a second table has the labels as those gave them. A script, which
pytest does not collect.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from lumbar.data.competition import labels_to_array  # noqa: E402
from lumbar.data.tables import read_labels  # noqa: E402
from lumbar.grade.cleaning import doubtful_labels  # noqa: E402
from lumbar.grade.tables import align_members, read_out_of_fold  # noqa: E402
from lumbar.names import CONDITIONS, GRADES, LEVELS  # noqa: E402


def spoiled(grades, share, rng):
    """The grades (n, 5, 5) with `share` of those that are there one up or down."""
    step = np.where(grades == 0, 1, np.where(grades == len(GRADES) - 1, -1, rng.choice((-1, 1), grades.shape)))
    return np.where((rng.random(grades.shape) < share) & (grades >= 0), grades + step, grades)


def counts(labels, truth, predictions):
    """(wrong labels, of these doubted, right labels, of these doubted) where a member predicted."""
    seen = np.any([np.isfinite(p).all(-1) for p in predictions.values()], 0) & (labels >= 0) & (truth >= 0)
    doubted, _ = doubtful_labels(np.where(seen, labels, -1), predictions)
    wrong = seen & (labels != truth)
    return np.array([wrong.sum(), (wrong & doubted).sum(), (seen & ~wrong).sum(), (seen & ~wrong & doubted).sum()])


def row(total):
    wrong, found, right, lost = total
    return {
        "wrong labels": wrong,
        "found": found / max(wrong, 1),
        "precision": found / max(found + lost, 1),
        "right labels lost": lost / max(right, 1),
    }


def true_grades(data, study_ids):
    """(n, 5, 5) grades of the phantom's own table; None where the data are no phantom's."""
    if not (data / "phantom_severity.csv").is_file():
        return None
    table = pd.read_csv(data / "phantom_severity.csv").set_index(["study_id", "condition", "level"])["grade"]
    return np.array([[[table[i, c, k] for k in LEVELS] for c in CONDITIONS] for i in study_ids])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--share", type=float, default=0.02, help="of the labels that are spoiled")
    parser.add_argument("--draws", type=int, default=50)
    options = parser.parse_args()
    drawn, given = {}, {}
    for run in options.runs:
        study_ids, labels = labels_to_array(read_labels(run / "data" / "train.csv"))
        aligned = align_members(study_ids, read_out_of_fold([run], verbose=False))
        truth = true_grades(run / "data", study_ids)
        truth = labels if truth is None else truth
        rng = np.random.default_rng(0)
        draws = [spoiled(truth, options.share, rng) for _ in range(options.draws)]
        for name, members in {**{name: {name: p} for name, p in aligned.items()}, "all together": aligned}.items():
            found = sum(counts(labels_of, truth, members) for labels_of in draws)
            drawn[name] = drawn.get(name, 0) + found
            given[name] = given.get(name, 0) + counts(labels, truth, members)
    print(f"{options.share:.1%} of the held-out labels spoiled, {options.draws} draws of {len(options.runs)} runs:")
    print(pd.DataFrame({name: row(total) for name, total in drawn.items()}).T.round(4).to_string())
    if any(total[0] for total in given.values()):
        print("labels as the readers gave them:")
        print(pd.DataFrame({name: row(total) for name, total in given.items()}).T.round(4).to_string())


if __name__ == "__main__":
    main()
