"""What it is worth to predict the mean of two numberings where stage 1 doubts, by the demo's own members.

    python tests/benchmarks/bench_doubt.py runs/demo [--studies 12]

Every test study of a finished demo is predicted by its levels as stage 1 names them (they are right on phantoms) and
with all names moved by one, up and down in turn. The score of four cases: named right and sure; right, but doubted;
wrong and silent; wrong, but doubted, for several shares of the second numbering. Doubt pays where the last two columns
differ by more than the first two, times how often doubted numberings are right for each that is wrong.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from lumbar.data.competition import class_prior, labels_to_array  # noqa: E402
from lumbar.data.metric import score_arrays  # noqa: E402
from lumbar.data.tables import read_labels  # noqa: E402
from lumbar.grade.ensemble import combine_members, ensemble_for  # noqa: E402
from lumbar.names import progress  # noqa: E402
from lumbar.serve.members import load_members, weight_folders  # noqa: E402
from lumbar.serve.study import predict_studies, prepare_study, studies_to_predict  # noqa: E402
from lumbar.spine.levels import _with_second, locate_levels_surely, second_boxes  # noqa: E402
from lumbar.spine.naming import SecondNumbering  # noqa: E402

SHARES = (0.1, 0.2, 0.3, 0.4)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--studies", type=int, default=1000, help="at most so many")
    options = parser.parse_args(arguments)
    data = options.run / "data"
    folders = weight_folders(sorted(options.run.glob("0[234]_*")))
    members = load_members(folders, device="cpu")
    ensemble = ensemble_for(folders, data)
    ids, grades = labels_to_array(read_labels(data / "phantom_test_labels.csv"))
    prior = class_prior(labels_to_array(read_labels(data / "train.csv"))[1])
    jobs = studies_to_predict(data, "test")
    ids, grades = ids[: options.studies], grades[: options.studies]
    found = {"first": [], "second": []}
    for number, study_id in enumerate(progress(ids, "studies", len(ids))):
        study = prepare_study(data / "test_images" / str(study_id), jobs[int(study_id)], members)
        _, vertebrae, _ = locate_levels_surely(study.study, members.placement)
        moved = [_with_second(box, SecondNumbering((-1, 1)[number % 2], 0.5)) for box in study.boxes]
        boxes, _ = second_boxes(study.study, moved, vertebrae, members.placement)
        for name, own in (("first", study.boxes), ("second", boxes)):
            study.boxes, study.inputs, study.second = own, {}, None
            (predictions,), _, _ = predict_studies([study], members)
            found[name].append(predictions)
    stack = {name: {m: np.stack([one[m] for one in each]) for m in each[0]} for name, each in found.items()}

    def score(share):
        """Of the ensemble where `share` of each member's answer is by the other names."""
        mixed = {}
        for m, p in stack["first"].items():
            q = stack["second"][m]
            mean = (1 - share) * p + share * q
            mixed[m] = np.where(np.isfinite(mean), mean, np.where(np.isfinite(p), p, q) if share < 1 else q)
        return score_arrays(grades, combine_members(mixed, ensemble, prior)[0])["total"]

    rows = [
        {
            "share": share,
            "right, sure": score(0.0),
            "right, doubted": score(share),
            "wrong, silent": score(1.0),
            "wrong, doubted": score(1 - share),
        }
        for share in SHARES
    ]
    table = pd.DataFrame(rows)
    table["gain if wrong"] = table["wrong, silent"] - table["wrong, doubted"]
    table["cost if right"] = table["right, doubted"] - table["right, sure"]
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
