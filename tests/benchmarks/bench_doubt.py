"""What it is worth to predict the mean of two numberings where stage 1 doubts, by the demo's own members.

    python tests/benchmarks/bench_doubt.py runs/demo [--studies 12]
    python -m phantom runs/transitional --train 20 --test 60 --seed 7 --prevalence 3 --transitional 0.5
    python tests/benchmarks/bench_doubt.py runs/demo --cut runs/transitional

Every test study of a finished demo is predicted by its levels as stage 1 names them (they are right on phantoms) and
with all names moved by one, up and down in turn. The score of four cases: named right and sure; right, but doubted;
wrong and silent; wrong, but doubted, for several shares of the second numbering. Doubt pays where the last two columns
differ by more than the first two, times how often doubted numberings are right for each that is wrong.

With --cut other phantoms are predicted by stage 1's own numberings and shares: the sagittal series of their test
studies are cut in bench_numbering's ways in turn, and what both numberings predict is scored beside the first alone.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import bench_numbering  # noqa: E402
import bench_real  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from lumbar.data.competition import class_prior, labels_to_array  # noqa: E402
from lumbar.data.greys import normalise_study  # noqa: E402
from lumbar.data.metric import score_arrays  # noqa: E402
from lumbar.data.tables import read_labels  # noqa: E402
from lumbar.grade.ensemble import combine_members, ensemble_for  # noqa: E402
from lumbar.names import progress  # noqa: E402
from lumbar.serve import study as one_study  # noqa: E402
from lumbar.serve.members import load_members, weight_folders  # noqa: E402
from lumbar.serve.study import predict_studies, prepare_study, studies_to_predict  # noqa: E402
from lumbar.spine.level_scores import read_vertebra_truth  # noqa: E402
from lumbar.spine.levels import _with_second, locate_levels_surely, second_boxes  # noqa: E402
from lumbar.spine.naming import SecondNumbering  # noqa: E402
from lumbar.spine.vertebra import vertebrae_from_table  # noqa: E402

SHARES = (0.1, 0.2, 0.3, 0.4)


def cut_study(study, bodies, kind, seed):
    """The normalised study with its sagittal series cut in one of bench_numbering's ways."""
    sagittal = [volume for volume in study.volumes if volume.plane == "sagittal"]
    others = [volume for volume in study.volumes if volume.plane != "sagittal"]
    cut = bench_numbering.cut(replace(study, volumes=sagittal), bodies, kind, np.random.default_rng(seed))
    return replace(study, volumes=[*cut.volumes, *others])


def by_own_numberings(folder, count, members):
    """(grades, probabilities of the first numbering and of both by member, table of the studies) of cut phantoms."""
    truth = read_vertebra_truth(folder / "phantom_vertebrae.csv", "test")
    ids, grades = labels_to_array(read_labels(folder / "phantom_test_labels.csv"))
    jobs, rows, found = studies_to_predict(folder, "test"), [], {"first": [], "both": []}
    for number, study_id in enumerate(progress(ids[:count], "studies", len(ids[:count]))):
        bodies = {body.name: body for body in vertebrae_from_table(truth, int(study_id))}
        kind = bench_numbering.CUTS[number % len(bench_numbering.CUTS)]

        def cut(study, bodies=bodies, kind=kind, number=number):
            return cut_study(normalise_study(study), bodies, kind, number)

        with mock.patch.object(one_study, "normalise_study", cut):
            study = prepare_study(folder / "test_images" / str(study_id), jobs[int(study_id)], members)
        levels = bench_numbering.seen_levels(study.study, bodies)
        judged = bench_real.judge(study.boxes, levels) if levels else {"all_right": False}
        rows.append({"cut": kind, "right": judged["all_right"], "share": study.second[1] if study.second else 0.0})
        (both,), _, _ = predict_studies([study], members)
        (first,), _, _ = predict_studies([replace(study, second=None)], members)
        found["first"].append(first)
        found["both"].append(both)
    stack = {way: {m: np.stack([one[m] for one in each]) for m in each[0]} for way, each in found.items()}
    return grades[:count], stack, pd.DataFrame(rows)


def score_own_numberings(options, members, ensemble, prior):
    """Print what both numberings are worth, and where."""
    grades, stack, table = by_own_numberings(options.cut, options.studies, members)
    mean = {way: combine_members(p, ensemble, prior)[0] for way, p in stack.items()}
    table["state"] = np.where(table["right"], "right", "wrong") + np.where(table["share"] > 0, ", two numberings", "")
    rows = []
    for state, own in [("all", table), *table.groupby("state")]:
        scores = {way: score_arrays(grades[own.index], p[own.index])["total"] for way, p in mean.items()}
        row = {"studies": state, "number": len(own), "mean share": own["share"].mean(), **scores}
        rows.append({**row, "gain": scores["first"] - scores["both"]})
    print(pd.DataFrame(rows).round(3).to_string(index=False))
    print(table.groupby("cut")[["right", "share"]].agg(["size", "mean"]).round(2).to_string())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--studies", type=int, default=1000, help="at most so many")
    parser.add_argument("--cut", type=Path, help="a folder of phantoms: by stage 1's own numberings, of cut series")
    options = parser.parse_args(arguments)
    data = options.run / "data"
    folders = weight_folders(sorted(options.run.glob("0[234]_*")))
    members = load_members(folders, device="cpu")
    ensemble = ensemble_for(folders, data)
    ids, grades = labels_to_array(read_labels(data / "phantom_test_labels.csv"))
    prior = class_prior(labels_to_array(read_labels(data / "train.csv"))[1])
    if options.cut:
        return score_own_numberings(options, members, ensemble, prior)
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
