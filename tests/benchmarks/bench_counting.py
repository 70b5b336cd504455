"""Whether tuning on label points moves the numbering to where readers count another way, on held-out phantoms.

    python tests/benchmarks/bench_counting.py [--studies 100] [--cache runs/bench_counting] [--slips 0.02]

Phantoms of the standard variety, two of five with transitional anatomy (a sacralised L5 or a lumbarised S1), are looked
at once with the shipped weights. Four kinds of readers name their discs: by the vertebrae's own names, counted from
above (`own`); so that the last full disc is L5/S1, whether the vertebra above it is the fourth or the sixth lumbar one
(`last disc`); so only for sacralised L5 (`sacralised`), or only for lumbarised S1 (`lumbarised`). A share of --slips of
the training studies, at random, is named a level off. In five folds the counting is learned from four and judged on the
fifth: the share of levels that are named as the readers name them, within half a body's height, and of studies in which
all are, before and after; the last line of each kind takes a third of the training studies. Bodies are taken as named
from one T2 series; steps come from the truth, not from points on images (tests/test_counting.py goes that way).
"""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import bench_spinenet  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

from lumbar.data.source import Source  # noqa: E402
from lumbar.names import LEVEL_VERTEBRAE, progress  # noqa: E402
from lumbar.spine.counting import fit_counting  # noqa: E402
from lumbar.spine.fallbacks import study_anchors  # noqa: E402
from lumbar.spine.naming import chain_numberings, name_vertebrae  # noqa: E402
from lumbar.spine.spinenet import detect_vertebrae, load_spinenet  # noqa: E402
from lumbar.spine.vertebra import _CHAIN, Vertebra  # noqa: E402
from lumbar.storage import read_json, write_json  # noqa: E402

FIRST_SEED = 60_000_000
READERS = {  # by how many names lower they number a spine
    "own": {},
    "last disc": {"sacralised L5": 1, "lumbarised S1": -1},
    "sacralised": {"sacralised L5": 1},
    "lumbarised": {"lumbarised S1": -1},
}
FOLDS = 5
RIGHT_MM = 13.0  # half a body's height
WEIGHTS = ROOT / "weights" / "spinenet_phantom.safetensors"


def _look(job):
    """Worker: detections of one phantom, kept as JSON."""
    path, seed = job
    torch.set_num_threads(1)
    study, truth, anatomy = bench_spinenet.simulate_sagittal(seed, "T2", 0.4, "standard", ("T2",))
    chain = detect_vertebrae(load_spinenet(WEIGHTS), study.volumes[0])
    rows = [
        {
            "corners": v.corners_lps_mm.tolist(),
            "width": v.width_mm,
            "confidence": v.confidence,
            "looks": v.appearance.tolist(),
        }
        for v in chain
    ]
    center = study_anchors(study)["sagittal"].tolist()
    true = {row["vertebra"]: [row["x_mm"], row["y_mm"], row["z_mm"]] for row in truth.to_dict("records")}
    write_json(path, {"chain": rows, "center": center, "truth": true, "variant": anatomy.variant})


def read_case(path):
    """dict chain (Vertebrae), center, truth (name -> centre), variant: what _look kept."""
    case = read_json(path)
    case["chain"] = [
        Vertebra(np.array(v["corners"]), v["width"], v["confidence"], "", Source.T2, np.array(v["looks"]))
        for v in case["chain"]
    ]
    case["truth"] = {name: np.array(where) for name, where in case["truth"].items()}
    return case | {"center": np.array(case["center"])}


def levels_right(case, step, prior):
    """(5,) bool: which discs are named as by readers who number this spine `step` names lower."""
    named, _ = name_vertebrae(case["chain"], prior, case["center"])
    given = {v.name: v.center_lps_mm for v in named}
    true = {_CHAIN[_CHAIN.index(n) + step]: where for n, where in case["truth"].items() if n in _CHAIN[1:-1]}

    def off_mm(pair):
        return np.linalg.norm((np.mean([given[n] - true[n] for n in pair], 0))[1:])

    return np.array([all(n in given for n in pair) and off_mm(pair) < RIGHT_MM for pair in LEVEL_VERTEBRAE.values()])


def judge(cases, numberings, readers, prior, slips, share, rng):
    """A row of the table."""
    steps = [readers.get(case["variant"], 0) for case in cases]
    told = [int(rng.integers(-1, 2)) if rng.random() < slips else step for step in steps]
    order = rng.permutation(len(cases))
    before, after, learned = [], [], 0
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        known = [k for k in order if k not in set(out)]
        known = known[: int(round(share * len(known)))]
        counting = fit_counting([numberings[k] for k in known], [told[k] for k in known])
        learned += bool(counting)
        counted = prior | ({"counting": counting} if counting else {})
        for k in out:
            before.append(levels_right(cases[k], steps[k], prior))
            after.append(levels_right(cases[k], steps[k], counted))
    before, after = np.array(before), np.array(after)
    return {
        "trained on": len(known),
        "numbered another way": np.mean([step != 0 for step in steps]),
        "learned in folds": learned,
        "levels before": before.mean(),
        "levels after": after.mean(),
        "studies before": before.all(1).mean(),
        "studies after": after.all(1).mean(),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "bench_counting")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slips", type=float, default=0.02)
    options = parser.parse_args(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    paths = [options.cache / f"{FIRST_SEED + k}.json" for k in range(options.studies)]
    missing = [(path, int(path.stem)) for path in paths if not path.is_file()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            for _ in progress(pool.imap_unordered(_look, missing), "phantoms", len(missing)):
                pass
    prior = load_spinenet(WEIGHTS).about["prior"]
    cases = [read_case(path) for path in paths]
    numberings = [chain_numberings(case["chain"], prior, case["center"]) for case in cases]
    rows = [
        {"readers": name, **judge(cases, numberings, readers, prior, options.slips, share, np.random.default_rng(0))}
        for name, readers in READERS.items()
        for share in (1.0, 1 / 3)
    ]
    print(pd.Series([case["variant"] for case in cases]).value_counts().to_string())
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
