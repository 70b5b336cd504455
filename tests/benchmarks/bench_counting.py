"""Whether tuning on label points moves the numbering to where readers count another way, on held-out phantoms.

    python tests/benchmarks/bench_counting.py [--studies 120] [--cache runs/bench_counting] [--slips 0.02]

Phantoms of the standard variety, two of five with transitional anatomy (a sacralised L5 or a lumbarised S1), are looked
at once with the shipped weights. Four kinds of readers name their discs: by the vertebrae's own names (`own`); so that
the last full disc is L5/S1, be the vertebra above it a fourth or a sixth lumbar one (`last disc`); so only for
sacralised L5 (`sacralised`) or lumbarised S1 (`lumbarised`). A share of --slips of the training studies is named
another level off. In five folds the counting is learned from four and judged on the fifth: the share of levels named as
the readers do, and the share of studies named so throughout, before and after.
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
from lumbar.names import progress  # noqa: E402
from lumbar.spine.fallbacks import study_anchors  # noqa: E402
from lumbar.spine.spinenet import detect_vertebrae, load_spinenet  # noqa: E402
from lumbar.spine.vertebra import Vertebra  # noqa: E402
from lumbar.storage import read_json, write_json  # noqa: E402

FIRST_SEED = 60_000_000
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


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=120)
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


if __name__ == "__main__":
    main()
