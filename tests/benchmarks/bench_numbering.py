"""Whether doubt about the numbering holds: phantoms seen whole and cut, half of them transitional.

    python tests/benchmarks/bench_numbering.py --studies 80 [--workers 2] [--real FOLDER]

Anatomies of the `wide` variety with seeds that no training uses, T2 alone, each as it is and cut: below S1's upper
plate, around it, below L1, or through L5. A chain is right where all of its levels in view are. Printed are how many
right and wrong chains are doubtful, with and without an S1 in the picture, and how often the first numbering is right
by how likely it is said to be; with --real (a folder of bench_real) both for its volumes, too. A script, which pytest
does not collect.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import bench_real  # noqa: E402
import bench_spinenet as views  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

from lumbar.names import LEVEL_VERTEBRAE, progress  # noqa: E402
from lumbar.spine.levels import locate_levels  # noqa: E402
from lumbar.spine.placement import Placement  # noqa: E402
from lumbar.spine.spinenet import load_spinenet  # noqa: E402
from lumbar.spine.vertebra import vertebrae_from_table  # noqa: E402

FIRST_SEED = 60_000_000
TRANSITIONAL = 0.5
CUTS = ("whole", "below S1's plate", "around S1's plate", "below L1", "through L5")


def cut(study, bodies, kind, rng):
    """The study as it is or cut in one of the ways of CUTS."""
    if kind == CUTS[1]:
        return views._cut_at_s1(study, bodies, rng)
    if kind == CUTS[3]:
        return views._cut_below_l1(study, bodies, rng)
    if kind == CUTS[0]:
        return study
    plate = bodies["S1"].corners_lps_mm[:2].mean(0)
    at = (plate if kind == CUTS[2] else bodies["L5"].center_lps_mm) + [0, 0, rng.uniform(-12, 12)]
    return views._change(study, lambda v: views._cut(v, 1, 0, v.lps_to_voxel(at)[1] + 1))


def seen_levels(study, bodies):
    """dict level -> (3,) centre, of those whose two bodies lie in the picture."""
    volume, levels = study.volumes[0], {}
    for level, names in LEVEL_VERTEBRAE.items():
        pair = [bodies[name].center_lps_mm for name in names]
        inside = [(0 <= volume.lps_to_voxel(p)[1:]).all() for p in pair]
        inside += [(volume.lps_to_voxel(p)[1:] < volume.array.shape[1:]).all() for p in pair]
        if all(inside):
            upper, lower = (bodies[name] for name in names)
            levels[level] = (upper.corners_lps_mm[2:].mean(0) + lower.corners_lps_mm[:2].mean(0)) / 2
    return levels


def judged(number, weights):
    """Rows of one anatomy: it whole, and cut in one way."""
    torch.set_num_threads(1)
    placement = Placement.of(load_spinenet(weights))
    seed = FIRST_SEED + number
    study, truth, anatomy = views.simulate_sagittal(seed, "T1+T2", TRANSITIONAL, series=("T2",))
    bodies = {body.name: body for body in vertebrae_from_table(truth, seed)}
    rows = []
    for kind in (CUTS[0], CUTS[1 + number % 4]):
        shown = cut(study, bodies, kind, np.random.default_rng(seed))
        levels = seen_levels(shown, bodies)
        if levels:
            with bench_real.every_second_numbering():
                boxes, _ = locate_levels(shown, placement)
            with_s1 = "l5_s1" in levels
            rows.append({"view": kind, "variant": anatomy.variant, "S1": with_s1, **bench_real.judge(boxes, levels)})
    return rows


def show(title, table):
    print(f"{title}: {len(table)} chains")
    doubt = table.groupby(["S1", "all_right"])["doubtful"].agg(["size", "sum"]) if "S1" in table else None
    if doubt is not None:
        print(doubt.set_axis(["chains", "doubtful"], axis=1).to_string())
    print(bench_real.reliability(table).round(3).to_string(index=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=80)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "spinenet_phantom.safetensors")
    parser.add_argument("--real", type=Path, help="a folder as bench_real takes it")
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        work = pool.map(partial(judged, weights=options.weights), range(options.studies))
        for found in progress(work, "anatomies", options.studies):
            rows += found
    table = pd.DataFrame(rows)
    print(table.groupby(["view", "variant"])[["all_right", "doubtful"]].agg(["size", "sum"]).to_string())
    show("phantoms", table)
    if options.real:
        real = bench_real.measure(options.real, options.weights)
        show("real volumes", real)
        show("all", pd.concat([table[["all_right", "second_share"]], real[["all_right", "second_share"]]]))


if __name__ == "__main__":
    main()
