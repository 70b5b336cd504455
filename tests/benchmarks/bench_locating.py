"""Seconds to locate a study's levels on one core: as the engine and the search are, beside PyTorch on every slice.

    python tests/benchmarks/bench_locating.py --run runs/demo --studies 12 [--before WEIGHTS]

Both ways take the same volumes (01_preprocess) and weights, in turns, one thread; CPU seconds count, not the clock.
It ends with an error where a name differs or a level lies more than 0.1 mm elsewhere. What compiling takes, once in a
process, is printed apart. --before takes the seconds of other weights as well, as they were once run: every slice,
padded to whole strides, every channel at every pixel, by PyTorch. A script, which pytest does not collect.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import utils  # noqa: E402
from lumbar import engine  # noqa: E402
from lumbar.data.volume import load_study  # noqa: E402
from lumbar.spine import spinenet  # noqa: E402

ENGINE = os.environ.get("LUMBAR_ENGINE", "auto")  # of the fast way: LUMBAR_ENGINE=torch is PyTorch's share alone
WEIGHTS = ROOT / "weights" / "spinenet_phantom.safetensors"


@torch.no_grad()
def all_maps(model, images, batch_size, stride):
    """As spinenet_maps: every channel at every pixel, by the network as it was trained, of padded images."""
    height, width = images.shape[2:]
    images, maps = F.pad(images, (0, -width % stride, 0, -height % stride)), []
    for start in range(0, len(images), batch_size):
        output = model(images[start : start + batch_size].contiguous(memory_format=torch.channels_last))
        output[:, :5] = output[:, :5].sigmoid()
        maps.append(output[:, :, :height, :width])
    return spinenet.SpineMaps.of_output(torch.cat(maps))


def located(study, model, way):
    """(boxes, vertebrae, CPU seconds) of one study. way: before, plain or fast."""
    os.environ["LUMBAR_ENGINE"] = ENGINE if way == "fast" else "torch"
    fast = spinenet._slices_from_the_middle, spinenet.spinenet_maps
    if way != "fast":
        spinenet._slices_from_the_middle = spinenet._all_slices
        spinenet.spinenet_maps = functools.partial(all_maps, stride=32 if way == "before" else 1)
    started = time.process_time()
    try:
        boxes, vertebrae = utils.locate_levels(study, model)
    finally:
        spinenet._slices_from_the_middle, spinenet.spinenet_maps = fast
    return boxes, vertebrae, time.process_time() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run's folder with 01_preprocess")
    parser.add_argument("--studies", type=int, default=12)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--before", type=Path, help="weights of an earlier network, to be compared in seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = utils.load_spinenet(arguments.weights)
    paths = list(utils.study_paths(arguments.run / "01_preprocess").values())[: arguments.studies]
    engine._PAYS_AFTER_S = 0.0  # now, and not after some studies
    first = load_study(paths[0])
    compiling_s = located(first, model, "fast")[2] - located(first, model, "fast")[2]
    before, seconds_before = utils.load_spinenet(arguments.before) if arguments.before else None, []
    seconds, apart_mm, renamed = {"plain": [], "fast": []}, [], 0
    for path in paths:
        study = load_study(path)
        found = {way: located(study, model, way) for way in seconds}
        if before:
            seconds_before.append(located(study, before, "before")[2])
        for way, (_, _, cpu_s) in found.items():
            seconds[way].append(cpu_s)
        plain, fast = ([box.center_lps_mm for box in found[way][0]] for way in seconds)
        apart_mm.append(float(np.linalg.norm(np.subtract(plain, fast), axis=1).max()))
        plain, fast = ([v.name for v in found[way][1] if v.name != "uncertain"] for way in seconds)
        renamed += plain != fast
    ratios = [plain / fast for plain, fast in zip(*seconds.values(), strict=True)]
    for way, cpu_s in seconds.items():
        print(f"{way}: {statistics.median(cpu_s):.2f} s of CPU a study (median of {len(paths)})")
    if before:
        earlier = [old / fast for old, fast in zip(seconds_before, seconds["fast"], strict=True)]
        said = f"{statistics.median(seconds_before):.2f} s, {statistics.median(earlier):.2f} times fast's (median)"
        print(f"before: {said}")
    print(f"ratio of a study: {statistics.median(ratios):.2f} (median); compiling: {compiling_s:.1f} s")
    print(f"levels lie at most {max(apart_mm):.4f} mm apart; {renamed} studies with other names")
    if renamed or max(apart_mm) > 0.1:
        sys.exit("the two ways differ: one of them is wrong")


if __name__ == "__main__":
    main()
