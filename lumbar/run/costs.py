"""What trainings at full size cost: hours, memory and disk, estimated before any is spent.

`python -m lumbar.run.costs` prints the table for Kaggle; `--folds`, `--members` and `--settings FILE` (a file of
configs/) change what is counted.

May use: pipeline, parameters, data, grade.full_size.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.crop import Crop
from ..grade.full_size import FULL_SIZE
from .parameters import check_notebook_parameters
from .pipeline import TRAINING_HOURS, kaggle_kernels, settings_of

WEEK_HOURS, SESSION_HOURS, OUTPUT_GB = 30.0, 12.0, 20.0  # Kaggle's: GPU hours a week, a session's end, its output
KAGGLE_GPUS, KAGGLE_CORES, KAGGLE_MEMORY_GB = (15.0, 15.0), 4, 30.0  # two T4

STUDIES, SHARE = 1975, 0.8  # of the competition; one fold trains on four fifths of them

# Counted: operations of one forward pass of the backbone, in TFLOP, by torch.utils.flop_counter (a multiplication and
# an addition are two), at the size that is named. Other sizes are taken in proportion to their pixels or voxels.
VOLUME_TFLOP = {  # backbone -> of one crop, voxels along its edge
    "coatnet_rmlp_3_rw": (0.556, 128),
    "coatnet_rmlp_1_rw": (0.0861, 128),
    "coatnet_nano_rw": (0.0496, 128),
    "maxvit_rmlp_tiny_rw": (0.823, 256),
}
IMAGE_TFLOP = {  # backbone -> of one image of 224 x 224
    "convnext_small": 0.01737,
    "convnext_nano": 0.00489,
    "tf_efficientnetv2_s": 0.00570,
    "tf_efficientnet_lite0": 0.00077,
}
PATCH_TFLOP = {  # description -> of one patch of 384 x 192
    "yolov10n.yaml": 0.00147,
    "yolov10s.yaml": 0.00438,
    "yolov10m.yaml": 0.01139,
    "yolov10b.yaml": 0.01759,
    "yolov10l.yaml": 0.02270,
    "yolov10x.yaml": 0.03051,
}
MILLION_PARAMETERS = {
    "coatnet_rmlp_3_rw": 164.2,
    "coatnet_rmlp_1_rw": 41.1,
    "coatnet_nano_rw": 14.8,
    "maxvit_rmlp_tiny_rw": 28.9,
    "convnext_small": 49.5,
    "convnext_nano": 15.0,
    "tf_efficientnetv2_s": 20.2,
    "tf_efficientnet_lite0": 3.4,
    "yolov10n.yaml": 2.7,
    "yolov10s.yaml": 8.1,
    "yolov10m.yaml": 16.5,
    "yolov10b.yaml": 20.5,
    "yolov10l.yaml": 25.8,
    "yolov10x.yaml": 31.7,
}
# A training step is three forward passes, and four where activations are computed again (RECOMPUTE).
STEP_PASSES, RECOMPUTED_PASSES = 3, 4
LOOKS = 30  # of a study: five levels, six looks each

# Measured, on this kit: patches that a study gives (60 phantoms), seconds of one CPU core that cutting its inputs takes
# (two cores with other work on both), gigabytes that a sample adds to a training step (on a CPU, see "Full size" in
# docs/benchmarks.md; of `slices` by what RECOMPUTE keeps, counted).
PATCHES = {"nfn": 6.0, "scs": 3.7, "ss": 15.7}
CUT_S = {"level": 1.0, "study": 1.4, "slices": 0.4}
SAMPLE_GB = {"level": (3.3, 128**3), "study": (11.5, 256**3), "slices": (4.0, 150 * 224**2), "yolo": (0.48, 384**2)}
LOCATING_S = 1.8  # of one core for a study, in 02: twice .9 s

# Assumed, and measured by nobody here: what a T4 does in half precision, in TFLOP/s, of the 65 that its data sheet
# names; depthwise convolutions in 3D wait for its memory. Of the detectors it follows from 5.0, 1.6 and 8.1 hours that
# solution B's trainings took on two T4s.
T4_TFLOPS = {"level": 10.0, "study": 10.0, "slices": 20.0, "yolo": 4.0}
SECOND_GPU = 0.8  # what each further GPU adds
DATA_SHEET_TFLOPS = {  # half precision, dense; a name is found in the GPU's
    "T4": 65,
    "P100": 19,
    "V100": 125,
    "L4": 121,
    "L40": 181,
    "A10": 125,
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A6000": 155,
    "3090": 142,
    "4090": 330,
    "5090": 419,
}
QUICK = ("00_pipeline", "06_report", "inspect", "predict", "pretrained", "publish")  # notebooks that take minutes
CORE_TFLOPS = 0.04  # of a CPU core: measured, coatnet_rmlp_3_rw on level crops


@dataclass(frozen=True)
class Cost:
    """What one stage costs.

    gpu_hours: of one T4, were it never to wait; hours: of a session on Kaggle's two, cutting of inputs on four cores
    included; epoch_hours: of these, a pass over the training studies, NaN where nothing is trained. gpu_gb: in each
    GPU; memory_gb: of the machine; shared_gb: in /dev/shm; disk_gb: while it runs, output_gb: that stays. NaN: not
    known. tflop: counted operations. kind: of network; note: on what it rests.
    """

    kind: str = ""
    gpu_hours: float = 0.0
    hours: float = 0.0
    epoch_hours: float = math.nan
    gpu_gb: float = 0.0
    memory_gb: float = 4.0
    shared_gb: float = 0.0
    disk_gb: float = 0.1
    output_gb: float = 0.1
    tflop: float = 0.0
    cpu_hours: float = 0.0
    epochs: int = 0
    note: str = ""


def gpu_speed(name: str) -> float:
    """How many times as fast as a T4 a GPU is, by the data sheets' half precision; of a name that is not known, 1."""
    words = name.upper().replace("-", " ").split()
    found = [tflops for key, tflops in DATA_SHEET_TFLOPS.items() if key in words or f"RTX{key}" in words]
    return max(found) / DATA_SHEET_TFLOPS["T4"] if found else 1.0


def hours_on(cost: Cost, gpus: Sequence[str], cores: int) -> float:
    """Hours of a stage's work on a machine with these GPUs (their names; none: its CPU cores)."""
    if gpus:
        speed = min(map(gpu_speed, gpus)) * (1 + SECOND_GPU * (len(gpus) - 1))
        return max(cost.gpu_hours / speed, cost.cpu_hours / cores)
    return cost.tflop / (CORE_TFLOPS * cores) / 3600 + cost.cpu_hours / cores


def stage_cost(notebook: str | Path, parameters: Mapping[str, Any], studies: int = STUDIES) -> Cost:
    """What a stage with these parameters (all, or those that differ from the notebook's defaults) costs.

    notebook: its path; studies: of the data. Of networks that are not in the tables above, and of notebooks that do not
    come with the kit, the hours are NaN.
    """
    given, stem = check_notebook_parameters(notebook, parameters), Path(notebook).stem
    if stem == "04_train_vit":
        cost = _classifier(given, studies)
    elif stem == "03_train_yolo":
        cost = _detector(given, studies)
    elif stem == "02_train_spinenet":
        hours = 0.5 * studies / STUDIES + LOCATING_S * studies / 3600
        cost = Cost(gpu_hours=0.2, cpu_hours=hours, note="measured on two CPU cores; its GPU hours are idle ones")
    elif stem == "01_preprocess":
        # The images are taken for 36 GB, of which 16 bits keep all and 8 a half.
        disk = ((18.0 if given["BITS"] == 8 else 36.0) + given["DETECTOR_IMAGES"]) * studies / STUDIES
        cost = Cost(cpu_hours=1.2 * studies / STUDIES, disk_gb=disk, output_gb=disk, note="measured on phantoms")
    elif stem == "05_inference":
        cost = Cost(hours=0.2, gpu_hours=0.2, gpu_gb=4.0, note="the visible test study only")
    elif stem in QUICK:
        return Cost(hours=0.1)
    else:
        cost = Cost(gpu_hours=math.nan, note=f"{stem} was not counted")
    if math.isnan(cost.gpu_hours):
        return replace(cost, hours=math.nan)
    hours = max(hours_on(cost, ["T4", "T4"], KAGGLE_CORES), cost.hours)
    return replace(cost, hours=hours, epoch_hours=hours / cost.epochs if cost.epochs else math.nan)


def _training(kind, backbone, forward_tflop, samples, epochs, passes, **more):
    """A Cost by counted operations; forward_tflop: of a sample, None where they are not known."""
    if forward_tflop is None:
        return Cost(kind, math.nan, math.nan, epochs=epochs, note=f"{backbone} was not counted", **more)
    tflop = forward_tflop * passes * samples * epochs
    gpu_hours = tflop / T4_TFLOPS[kind] / 3600
    return Cost(kind, gpu_hours, tflop=tflop, epochs=epochs, note="operations counted, speed assumed", **more)


def _state_gb(backbone):
    """Weights, gradients, AdamW's two averages and the averaged weights, 4 bytes each."""
    return 20 * MILLION_PARAMETERS.get(backbone, 1.0 if backbone.startswith("tiny") else 30.0) / 1000


def _classifier(given, studies):
    scope, workers = given["SCOPE"], given["WORKERS"]
    if scope not in FULL_SIZE:
        raise ValueError(f"SCOPE must be {', '.join(FULL_SIZE)}, not {scope!r}")
    full = FULL_SIZE[scope]
    backbone = given["BACKBONE"] or full.backbone
    batch, epochs = given["BATCH"] or full.batch, given["EPOCHS"] or full.epochs
    per_study = 5 if scope == "level" else 1
    if scope == "slices":
        per_side, images = given["SIZE_PX"], LOOKS * given["SLICES"]
        size = images * per_side**2
        counted = IMAGE_TFLOP.get(backbone) if not given["STRIDE"] else None
        forward = counted and counted * size / 224**2
        # Cut with a margin of a quarter, for shifts, and with three slices on either side.
        sample_gb = LOOKS * (given["SLICES"] + 6) * (1.25 * per_side) ** 2 * 1e-9
    else:
        size = math.prod(Crop.full_size(scope, given["SHAPE"]).shape)
        counted = VOLUME_TFLOP.get(backbone)
        forward = counted and counted[0] * size / counted[1] ** 3
        sample_gb = size * 3 * 2 * 1.74e-9  # three series in half precision, with the margin for augmentation
    share, whole = SAMPLE_GB[scope]
    folds, samples = len(given["FOLDS"]), studies * SHARE * per_study
    passes = RECOMPUTED_PASSES if given["RECOMPUTE"] else STEP_PASSES
    cost = _training(scope, backbone, forward, samples * folds, epochs, passes)
    cached = given["CACHE"]
    state = _state_gb(backbone)
    relative = size / whole
    return replace(
        cost,
        cpu_hours=CUT_S[scope] * relative * studies * SHARE * folds * (1 if cached else epochs) / 3600,
        gpu_gb=0.5 + state + share * relative * batch * (1 if given["RECOMPUTE"] else 1.5),
        memory_gb=4.0 + workers * (0.5 + 2 * batch * sample_gb),
        shared_gb=workers * batch * sample_gb,
        disk_gb=2 * state + 0.1 + (sample_gb * per_study * studies if cached else 0.0),
        output_gb=(state + 0.1) * folds,
    )


def _detector(given, studies):
    condition, model = given["CONDITION"], given["MODEL"]
    if condition not in PATCHES:
        raise ValueError(f"CONDITION must be {', '.join(PATCHES)}, not {condition!r}")
    # Sagittal patches are half as wide as high; axial ones are squares of 160 where those have 384 rows.
    pixels = given["IMGSZ"] ** 2 * (0.5 if condition != "ss" else (160 / 384) ** 2)
    counted = None if given["WIDTH"] else PATCH_TFLOP.get(model)
    forward = counted and counted * pixels / (384 * 192)
    folds, images = len(given["FOLDS"]), PATCHES[condition] * studies
    cost = _training("yolo", model, forward, images * SHARE * folds, given["EPOCHS"], STEP_PASSES)
    share, whole = SAMPLE_GB["yolo"]
    state, patch_gb = _state_gb(model), pixels * 1e-9
    return replace(
        cost,
        gpu_gb=0.5 + state + share * pixels / whole * given["BATCH"],
        memory_gb=4.0 + images * patch_gb + 0.5 * given["WORKERS"],
        shared_gb=given["WORKERS"] * given["BATCH"] * patch_gb,
        disk_gb=2 * state + 0.1 + images * patch_gb,
        output_gb=(state + 0.1) * folds,
    )


def kernel_costs(
    notebooks: str | Path,
    folds: Sequence[int] = (0,),
    members: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Cost]:
    """What each kernel costs on Kaggle: dict name -> Cost, in their order. Arguments as stage_kaggle's.

    Raises ValueError or TypeError for settings that a kernel cannot have.
    """
    kernels = kaggle_kernels(folds=folds, members=members)
    own = settings_of({name: kernel["names"] for name, kernel in kernels.items()}, settings or {})
    found = {}
    for name, kernel in kernels.items():
        path = Path(notebooks) / f"{kernel['notebook']}.ipynb"
        known = check_notebook_parameters(path, {})
        parameters = {k: v for k, v in kernel["parameters"].items() if k in known} | own[name]
        found[name] = on_kaggle(stage_cost(path, parameters), kernel["gpu"])
    return found


def on_kaggle(cost: Cost, gpu: bool) -> Cost:
    """The cost of a kernel that has GPUs or not: without, it spends none of the week's hours."""
    return cost if gpu else replace(cost, gpu_hours=0.0, gpu_gb=0.0)


def cost_table(costs: Mapping[str, Cost]) -> pd.DataFrame:
    """The costs as a table for people, a row for each kernel, GPU hours being what Kaggle takes off the week's."""
    rows = [
        {
            "kernel": name,
            "GPU hours": cost.hours if cost.gpu_hours else 0.0,
            "of one T4": cost.gpu_hours,
            "GPU memory, GB": cost.gpu_gb,
            "memory, GB": cost.memory_gb,
            "disk, GB": cost.disk_gb,
            "output, GB": cost.output_gb,
            "rests on": cost.note,
        }
        for name, cost in costs.items()
    ]
    return pd.DataFrame(rows).set_index("kernel").round(1)


def cost_line(costs: Mapping[str, Cost]) -> str:
    """In a sentence or two: what all that costs of Kaggle's week, and what will not fit.

    Parameters
    ----------
    costs : mapping of str to Cost
        Kernel to its cost on Kaggle, as kernel_costs and staged_costs return it.

    Returns
    -------
    str
    """
    on_gpu = {name: cost.hours for name, cost in costs.items() if cost.gpu_hours}
    if not on_gpu:
        return "No kernel uses a GPU: nothing of the week's hours is spent."
    unknown = [name for name, hours in on_gpu.items() if math.isnan(hours)]
    total = sum(hours for hours in on_gpu.values() if not math.isnan(hours))
    longest = max((name for name in on_gpu if name not in unknown), key=lambda name: on_gpu[name], default="")
    said = [f"About {total:.0f} GPU hours of Kaggle's {WEEK_HOURS:.0f} a week, by counted operations."]
    if longest:
        said.append(f"The longest session is {longest}, about {on_gpu[longest]:.1f} of {SESSION_HOURS:.0f} hours.")
    if total > WEEK_HOURS:
        weeks = math.ceil(total / WEEK_HOURS)
        said.append(f"That is {weeks} weeks: FOLDS, MEMBERS and SETTINGS make it less, see configs/kaggle.yaml.")
    late = [name for name, hours in on_gpu.items() if hours > TRAINING_HOURS]
    if late:
        said.append(f"{', '.join(late)} will need a second session: see CONTINUE.")
    if unknown:
        said.append(f"Not counted: {', '.join(unknown)}.")
    return " ".join(said)


def main(arguments: Sequence[str] | None = None) -> None:
    import yaml

    parser = argparse.ArgumentParser(
        prog="python -m lumbar.run.costs", description="What trainings at full size cost on Kaggle, before it is spent."
    )
    parser.add_argument("--folds", type=int, nargs="+", help="to train; default 0")
    parser.add_argument("--members", nargs="+", help="to train; default all")
    parser.add_argument("--settings", help="a file of parameters for publish.ipynb, such as configs/kaggle.yaml")
    options = parser.parse_args(arguments)
    notebooks = Path(__file__).resolve().parents[2] / "notebooks"
    given: dict[str, Any] = {}
    if options.settings:
        try:
            given = yaml.safe_load(Path(options.settings).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--settings: {error}")
    folds = options.folds or given.get("FOLDS") or [0]
    members = options.members or given.get("MEMBERS") or []
    try:
        check_notebook_parameters(notebooks / "publish.ipynb", given)
        costs = kernel_costs(notebooks, folds, members, given.get("SETTINGS"))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    print(cost_table(costs).to_string())
    print(f"\n{cost_line(costs)}\n")
    print(
        "Counted: operations, by torch's flop_counter. Measured: patches a study, seconds to cut inputs, memory on a\n"
        "CPU. Assumed: the speed of a T4, which may be wrong by a factor of two; GPU hours are those of a session\n"
        "with both T4s. The first training that ends tells how far: its manifest.json has the seconds."
    )


if __name__ == "__main__":
    main()
