"""This kit beside the two solutions that it rebuilds, each trained its own way on the same phantoms with one budget.

    python tests/benchmarks/bench_solutions.py RUN [RUN ...] --workers 2

RUN: folders of finished runs of the pipeline on phantoms (data, 01_preprocess ... 05_inference; one fold held out),
for instance of several seeds. Of each run the held-out fold, the epochs, batches, learning rates, backbones and crop
shapes are read from its stages, solution A's and B's ways are trained with them on the same studies, and all are
scored on the run's test studies. Everything is kept beside the run, in RUN_solutions (--out puts it elsewhere), each
study and each epoch as it is finished: a killed benchmark goes on where it stopped, one with other settings moves the
old folder aside. scores.csv there has the run's table; table.csv and table.md (--table, by default in the first run's
folder of these) have all runs and their mean, with intervals from resampled test studies. --longer 4 gives A and B four
times the members' epochs (in RUN_solutions_4x): whether their ways learn at all, and what the one budget costs them.
--check 2 compares the voxelising below with Open3D's on two studies and stops. A script, which pytest does not collect.

What each way consists of, and what was decided where it could be read in more than one way:

A's way
- Levels: this kit's SpineNet on the Sagittal T1 alone. A study counts where all of L1 to S1 were seen; S1/S2 and T12
  are not asked for. Nothing is placed by neighbours, other series or a mean layout.
- Box of a level: along the patient's axes around both vertebrae's centres with one distance of the centres as margin,
  towards a random vector and across it, twice that margin to the back and half of it to the front; cut off by
  the two planes through the centres. The random vector so decides the size, between 0.7 and 1 distance, and not the
  turn: left stays left. It is seeded by study and level, so that a run repeats.
- Cloud: every pixel above 0 a point, again 1, 2, ... mm further, int(slice thickness) points in all, along patient x
  (sagittal) or z (axial) instead of the slice normal. Colours: T1, axial T2, T2/STIR; the brightest of a voxel
  counts. Their cut of the axial cloud to the sagittal one's box changes next to nothing within a level; left out.
- Grid: voxels of 1 mm from the cropped points' own corner, stretched linearly to the level member's shape.
- Network: the level member's backbone, one mean over the volume, five heads without a level's own cut points.
- Without six vertebrae the whole-study network of B's way answers for all 25; without any image 1/3 stands.

B's way
- Detectors: the detectors' scheme "original" (a class for condition x level x severity, whole slices, best confidence)
  at the run's YOLO_IMGSZ, with the members' epochs, batches and rates; flips are on at 0.5 for all three, as in B,
  though the class names a side: one of its faults. Where a detector says nothing: 1/3.
- Start: B's own detectors started from COCO's weights, of which there are none in a phantom's world. Here both sides'
  start from noise; or both from the run's WEIGHTS of 03_train_yolo, if it has any: detectors trained before on
  phantoms of another look, B's without the class layers, which do not fit.
- Network: the whole study as a cloud like A's, slices averaged to the grid's side first, stretched from corner to
  corner of the cloud to a cube with at least the study member's number of voxels; its backbone, one mean, 25 heads.
- Sum: .65 detectors + .35 network, as probabilities.

In favour of both, or the same for both
- Faults of mere bookkeeping (slice index as file name, swapped pixel spacing, rows lost in merges) are not repeated,
  nor the half pixel by which averaged slices were shifted; images have the kit's percentile scale, cut off at 0 and 1.
- Studies with missing labels are trained on (they dropped them), the missing ones masked.
- The loss has weights 1/2/4 and is the members' own, as are the optimiser, the averaged weights, and that the epoch is
  chosen by the competition's score on the held-out studies.
- Augmentation: mirroring with swapped labels, each time with probability .5 (they trained on both copies); no jitter
  (strength 0), no mixing. The trainer's little noise and its left-out channels stay.
- No test-time augmentation, no calibration.
- One budget means the same passes over the same studies. B's detectors see the labelled slices alone, whole, and ours
  patches of the slices near them, too: fewer and larger images, about as many pixels. counts.json has both.
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from baselines import (  # noqa: E402
    ORIGINAL_SETTINGS,
    GlobalRecipe,
    WholeSlices,
    load_global,
    load_original,
    original_study,
)
from scipy.special import softmax  # noqa: E402

import phantom  # noqa: E402
from lumbar.data.competition import class_prior, labels_to_array  # noqa: E402
from lumbar.data.crop import Crop  # noqa: E402
from lumbar.data.preprocess import preprocess_studies  # noqa: E402
from lumbar.data.source import Source  # noqa: E402
from lumbar.data.tables import read_coordinates, read_folds, read_labels  # noqa: E402
from lumbar.data.volume import load_study, study_paths  # noqa: E402
from lumbar.grade import classifier, crops, detector_data, detector_training, trainer  # noqa: E402
from lumbar.grade import tables as tables_module  # noqa: E402
from lumbar.look.report import TERM_NAMES, resampled_scores, score_table  # noqa: E402
from lumbar.names import DESCRIPTIONS, DETECTORS, LEVELS, device_for, progress  # noqa: E402
from lumbar.run.stages import open_stage  # noqa: E402
from lumbar.spine.locating import locate_studies  # noqa: E402
from lumbar.spine.placement import Placement  # noqa: E402
from lumbar.spine.spinenet import detect_vertebrae, load_spinenet  # noqa: E402
from lumbar.storage import write_csv, write_json  # noqa: E402

VERSION = 3  # goes up when the same settings give other results from this file
SIX = ("L1", "L2", "L3", "L4", "L5", "S1")
YOLO_SHARE = 0.65  # of the detectors in B's sum
RESAMPLES = 2000
MEMBER_TITLES = {
    "yolo": "our detectors",
    "slices": "our native slices",
    "level": "our level crops",
    "study": "our whole study",
}
OURS, A, B = "our ensemble", "A's way", "B's way"


# ---- The point-cloud way ----


def smear(volume):
    """(patient axis, number of points in a row 1 mm apart) that a pixel becomes."""
    return (2 if volume.description == "Axial T2" else 0), max(1, int(volume.thickness_mm))


def cloud_in_box(volume, low_mm, high_mm):
    """The smeared points of a volume inside a box along the patient's axes: (xyz (n, 3) LPS mm, values (n,) in 0..1).

    low_mm, high_mm: (3,) corners. Only the pixels that can reach the box are looked at.
    """
    axis, copies = smear(volume)
    reach = np.array(low_mm)
    reach[axis] -= copies - 1
    corners = volume.lps_to_voxel(list(itertools.product(*zip(reach, high_mm, strict=True))))
    first = np.clip(np.floor(corners.min(0)), 0, volume.array.shape).astype(int)
    last = np.clip(np.ceil(corners.max(0)) + 1, 0, volume.array.shape).astype(int)
    values = np.clip(volume.array[tuple(slice(a, b) for a, b in zip(first, last))].astype(np.float32), 0, 1).ravel()
    index = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(first, last)), indexing="ij"), -1).reshape(-1, 3)
    xyz, values = volume.voxel_to_lps(index[values > 0]), values[values > 0]
    others = [a for a in range(3) if a != axis]
    inside = ((xyz[:, others] >= low_mm[others]) & (xyz[:, others] <= high_mm[others])).all(1)
    xyz, values = xyz[inside], values[inside]
    points, colours = [np.zeros((0, 3))], [np.zeros(0, np.float32)]
    for step in range(copies):
        moved = xyz + step * np.eye(3)[axis]
        inside = (moved[:, axis] >= low_mm[axis]) & (moved[:, axis] <= high_mm[axis])
        points.append(moved[inside])
        colours.append(values[inside])
    return np.concatenate(points), np.concatenate(colours)


def level_bounds(upper_mm, lower_mm, rng):
    """Corners (3,), (3,) in LPS mm of A's box around two vertebrae's centres (3,); a random vector decides its size."""
    along = lower_mm - upper_mm
    distance = np.linalg.norm(along)
    first = rng.standard_normal(3)
    first -= first @ along * along / distance**2
    first *= distance / np.linalg.norm(first)
    second = np.cross(first, along / distance)
    around = np.array([c + sign * v for c in (upper_mm, lower_mm) for v in (first, second) for sign in (-1, 1)])
    low, high = around.min(0), around.max(0)
    front, back = sorted((upper_mm[1], lower_mm[1]))
    low[1], high[1] = front - (front - low[1]) / 2, back + 2 * (high[1] - back)
    return low, high


def brightest(cells, channels, values, size):
    """(3, *size) float32 grid of the brightest value in each cell. cells: (n, 3) int; channels, values: (n,)."""
    flat = np.ravel_multi_index((channels, *cells.T), (3, *size))
    grid = torch.zeros(3 * int(np.prod(size)))
    grid.scatter_reduce_(0, torch.from_numpy(flat), torch.from_numpy(values), "amax")
    return grid.reshape(3, *size)


def to_crop_axes(grid):
    """(3, x, y, z) along the patient's axes -> the kit's crop axes: head to foot, front to back, right to left."""
    return grid.permute(0, 3, 2, 1).flip(1)


def level_cells(study, upper_mm, lower_mm, rng):
    """(3, x, y, z) float32: A's level on voxels of 1 mm, black where no point fell; None without any point."""
    low, high = level_bounds(upper_mm, lower_mm, rng)
    along = lower_mm - upper_mm
    points, channels, values = [], [], []
    for volume in study.volumes:
        xyz, colours = cloud_in_box(volume, low, high)
        between = ((xyz - upper_mm) @ along > 0) & ((xyz - lower_mm) @ along < 0)
        points.append(xyz[between])
        values.append(colours[between])
        channels.append(np.full(int(between.sum()), DESCRIPTIONS.index(volume.description)))
    if not sum(map(len, points)):
        return None
    points = np.concatenate(points)
    # Open3D's grid begins half a voxel below the lowest point.
    cells = np.floor(points - (points.min(0) - 0.5)).astype(np.int64)
    return brightest(cells, np.concatenate(channels), np.concatenate(values), tuple(cells.max(0) + 1))


def level_grid(study, upper_mm, lower_mm, shape, rng):
    """(3, *shape) float16: level_cells stretched to the network's shape."""
    cells = level_cells(study, upper_mm, lower_mm, rng)
    if cells is None:
        return np.zeros((3, *shape), np.float16)
    return F.interpolate(to_crop_axes(cells)[None], shape, mode="trilinear")[0].half().numpy()


def study_grid(study, side):
    """(3, side, side, side) float16: the whole study's cloud, from its lowest to its highest corner."""
    points, channels, values = [], [], []
    for volume in study.volumes:
        count, *size = volume.array.shape
        array = torch.from_numpy(np.clip(volume.array.astype(np.float32), 0, 1))
        small = F.interpolate(array[:, None], (side, side), mode="area")[:, 0].numpy()
        places = [(np.arange(side) + 0.5) * n / side - 0.5 for n in size]
        index = np.stack(np.meshgrid(np.arange(count), *places, indexing="ij"), -1)
        xyz, bright = volume.voxel_to_lps(index[small > 0]), small[small > 0]
        axis, copies = smear(volume)
        for step in range(copies):
            points.append(xyz + step * np.eye(3)[axis])
            values.append(bright)
            channels.append(np.full(len(bright), DESCRIPTIONS.index(volume.description)))
    if not sum(map(len, points)):
        return np.zeros((3, side, side, side), np.float16)
    points = np.concatenate(points)
    extent = np.maximum(points.max(0) - points.min(0), 1e-6)
    cells = np.round((points - points.min(0)) * ((side - 1) / extent)).astype(np.int64)
    grid = brightest(cells, np.concatenate(channels), np.concatenate(values), (side,) * 3)
    return to_crop_axes(grid).half().numpy()


def level_rng(study_id, level):
    return np.random.default_rng([int(study_id), level])


def save_grids(job):
    """Write the study's grids that are not there yet. job: study_id, path, centers ((6, 3) or None), level_shape,
    side, folder. Returns processor seconds spent on the levels and on the whole study."""
    study_id, seconds = job["study_id"], [0.0, 0.0]
    todo = {
        0: job["folder"] / "level" / f"{study_id}.npy" if job["centers"] is not None else None,
        1: job["folder"] / "study" / f"{study_id}.npy",
    }
    todo = {which: path for which, path in todo.items() if path is not None and not path.is_file()}
    if not todo:
        return seconds
    study = load_study(job["path"])
    for which, path in todo.items():
        started = time.process_time()
        if which:
            grids = study_grid(study, job["side"])[None]
        else:
            pairs = zip(job["centers"][:-1], job["centers"][1:], strict=True)
            grids = np.stack(
                [level_grid(study, *pair, job["level_shape"], level_rng(study_id, n)) for n, pair in enumerate(pairs)]
            )
        temporary = path.with_suffix(".part")
        with open(temporary, "wb") as file:
            np.save(file, grids)
        os.replace(temporary, path)
        seconds[which] = time.process_time() - started
    return seconds


def reference_cells(study, upper_mm, lower_mm, rng):
    """What level_cells is a faster form of: every point of the study, cropped and voxelised by Open3D."""
    import open3d as o3d

    cloud = o3d.geometry.PointCloud()
    for volume in study.volumes:
        values = np.clip(volume.array.astype(np.float32), 0, 1).ravel()
        index = np.stack(np.indices(volume.array.shape), -1).reshape(-1, 3)[values > 0]
        axis, copies = smear(volume)
        colours = np.zeros((len(index), 3))
        colours[:, DESCRIPTIONS.index(volume.description)] = values[values > 0]
        for step in range(copies):
            part = o3d.geometry.PointCloud()
            part.points = o3d.utility.Vector3dVector(volume.voxel_to_lps(index) + step * np.eye(3)[axis])
            part.colors = o3d.utility.Vector3dVector(colours)
            cloud += part
    low, high = level_bounds(upper_mm, lower_mm, rng)
    cloud = cloud.crop(o3d.geometry.AxisAlignedBoundingBox(low, high))
    xyz, along = np.asarray(cloud.points), lower_mm - upper_mm
    between = ((xyz - upper_mm) @ along > 0) & ((xyz - lower_mm) @ along < 0)
    cloud = cloud.select_by_index(np.flatnonzero(between))
    mode = o3d.geometry.VoxelGrid.VoxelPoolingMode.MAX
    voxels = o3d.geometry.VoxelGrid.create_from_point_cloud(cloud, 1.0, mode).get_voxels()
    index = np.array([voxel.grid_index for voxel in voxels])
    grid = np.zeros((3, *(index.max(0) + 1)), np.float32)
    grid[(slice(None), *index.T)] = np.array([voxel.color for voxel in voxels]).T
    return torch.from_numpy(grid)


def check_voxels(paths, centers, shape, side, studies):
    """Print how level_cells and reference_cells differ, and the processor seconds of each, for some studies."""
    torch.set_num_threads(1)
    rows = []
    for study_id in list(centers)[:studies]:
        study, pair = load_study(paths[study_id]), centers[study_id][2:4]
        started = time.process_time()
        slow = reference_cells(study, *pair, level_rng(study_id, 2))
        middle = time.process_time()
        fast = level_cells(study, *pair, level_rng(study_id, 2))
        end = time.process_time()
        for level in range(len(LEVELS)):
            level_grid(study, *centers[study_id][level : level + 2], shape, level_rng(study_id, level))
        levels_end = time.process_time()
        study_grid(study, side)
        same = slow.shape == fast.shape
        rows.append(
            {
                "study_id": study_id,
                "cells": " x ".join(map(str, fast.shape[1:])),
                "same shape": same,
                "cells that differ": float((slow != fast).float().mean()) if same else np.nan,
                "largest difference": float((slow - fast).abs().max()) if same else np.nan,
                **{f"black {name}": float((fast[k] == 0).float().mean()) for k, name in enumerate(DESCRIPTIONS)},
                "Open3D, one level, s": middle - started,
                "here, one level, s": end - middle,
                "here, five levels, s": levels_end - end,
                "here, whole study, s": time.process_time() - levels_end,
            }
        )
    print(pd.DataFrame(rows).T.to_string(header=False))


# ---- What our run did ----


def member(run, name):
    """(folder, parameters, fold) of a member's one finished stage. Raises ValueError without it, or with more folds."""
    found = [
        path.parent
        for path in sorted(run.glob(f"{name}*/manifest.json"))
        if path.parent.name == name or path.parent.name.removeprefix(f"{name}_").isdigit()
    ]
    if len(found) != 1:
        raise ValueError(f"{run}: {len(found)} finished folders of {name}, not one: only runs with one fold compare")
    parameters = json.loads((found[0] / "manifest.json").read_text())["parameters"]
    if len(parameters["FOLDS"]) != 1:
        raise ValueError(f"{found[0]} holds folds {parameters['FOLDS']}: only runs with one fold compare")
    return found[0], parameters, int(parameters["FOLDS"][0])


def classifier_settings(run, scope):
    """What the run's 3D network of this scope was trained with: dict for JSON."""
    folder, parameters, fold = member(run, f"04_train_vit_{scope}")
    _, about = classifier.load_classifier(folder / f"{scope}_{fold}.safetensors")
    config = {key.lower(): parameters[key] for key in ("EPOCHS", "BATCH", "LEARNING_RATE", "WEIGHT_DECAY", "DROPOUT")}
    config |= {"accumulate": parameters.get("ACCUMULATE", 1)}
    config |= {"ema": parameters["EMA"], "backbone": about["backbone"], "strength": 0.0}
    return {"config": config, "shape": list(about["crop"].shape), "fold": fold, "seed": parameters["SEED"] + fold}


def detector_settings(run, condition):
    """What the run's detector of this condition was trained with: dict for JSON."""
    _, parameters, fold = member(run, f"03_train_yolo_{condition}")
    keys = ("MODEL", "WIDTH", "EPOCHS", "BATCH", "TRANSLATE", "SCALE", "ROTATE", "SEED")
    settings = {key.lower(): parameters[key] for key in keys} | {"fold": fold}
    rates = detector_training.yolo_schedule(parameters.get("SCHEDULE", "short"), parameters["LEARNING_RATE"])
    start = Path(parameters["WEIGHTS"]) / f"yolo_{condition}_{fold}.safetensors" if parameters["WEIGHTS"] else None
    if start is not None and not start.is_file():
        raise FileNotFoundError(f"{start}: our detector started from it, so that B's has to")
    digest = hashlib.sha256(start.read_bytes()).hexdigest() if start else None
    return settings | {"rates": rates, "start": str(start) if start else None, "start_sha256": digest}


def read_settings(run, longer=1):
    """Everything that the benchmark takes from a run, and that its results depend on, with `longer` times the epochs.
    Raises ValueError where the members held out different folds."""
    settings = {
        "version": VERSION,
        "imgsz": json.loads((run / "01_preprocess" / "manifest.json").read_text())["parameters"]["YOLO_IMGSZ"],
        "spinenet": hashlib.sha256((run / "02_train_spinenet" / "spinenet.safetensors").read_bytes()).hexdigest(),
        "level": classifier_settings(run, "level"),
        "study": classifier_settings(run, "study"),
        "yolo": {condition: detector_settings(run, condition) for condition in DETECTORS},
    }
    folds = {settings["level"]["fold"], settings["study"]["fold"], *(s["fold"] for s in settings["yolo"].values())}
    if len(folds) != 1:
        raise ValueError(f"{run}: the members held out folds {sorted(folds)}, not one and the same")
    settings["fold"] = folds.pop()
    for trained in (settings["level"]["config"], settings["study"]["config"], *settings["yolo"].values()):
        trained["epochs"] *= longer
    shape, stride = settings["study"]["shape"], 2 ** (1 + _stages(settings["study"]["config"]["backbone"]))
    settings["side"] = int(stride * np.ceil(np.prod(shape) ** (1 / 3) / stride - 1e-6))
    return settings


def _stages(backbone):
    """Number of stages of a backbone: its stride is 2 to the power of one more."""
    small = classifier.SMALL_BACKBONES.get(backbone)
    return len(small["depths"]) if small else 4


# ---- Levels and grids ----


class OnT1:
    """A detector as locate_levels takes it: SpineNet, blind but for the Sagittal T1."""

    def __init__(self, model):
        self.model = model

    def __call__(self, volume):
        return detect_vertebrae(self.model, volume) if volume.description == "Sagittal T1" else []

    def __repr__(self):
        return "SpineNet on the Sagittal T1 alone"


def six_centers(vertebrae):
    """dict study_id -> (6, 3) centres L1 to S1 in LPS mm, of the studies where all six were seen.

    vertebrae: table of locate_studies.
    """
    seen = vertebrae[vertebrae["source"].map(lambda s: Source.parse(s).seen) & vertebrae["vertebra"].isin(SIX)]
    centers = {}
    for study_id, rows in seen.groupby("study_id"):
        rows = rows.set_index("vertebra")
        if len(rows) == len(SIX) and set(rows.index) == set(SIX):
            centers[int(study_id)] = rows.loc[list(SIX), ["x_mm", "y_mm", "z_mm"]].to_numpy(np.float64)
    return centers


def prepare(run, out, workers):
    """Test volumes, levels and grids of all studies. Returns (paths, centers), dicts by study_id."""
    data = run / "data"
    preprocess_studies(data, "test", out / "test" / "volumes", workers)
    paths = study_paths(run / "01_preprocess") | study_paths(out / "test")
    table = out / "vertebrae.csv"
    if not table.is_file():
        model = load_spinenet(run / "02_train_spinenet" / "spinenet.safetensors")
        _, vertebrae, _ = locate_studies(paths, Placement.of(model, OnT1(model)), out / "located", workers)
        write_csv(table, vertebrae)
    return paths, six_centers(pd.read_csv(table, dtype={"source": str, "vertebra": str}))


def make_grids(paths, centers, settings, out, workers):
    """Grids of all studies in out/grids. Prints the processor seconds that they took."""
    folder = out / "grids"
    for name in ("level", "study"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = [
        {
            "study_id": study_id,
            "path": path,
            "centers": centers.get(study_id),
            "level_shape": tuple(settings["level"]["shape"]),
            "side": settings["side"],
            "folder": folder,
        }
        for study_id, path in paths.items()
    ]
    with _pool(workers) as pool:
        found = list(progress(pool.map(save_grids, jobs, chunksize=4), "voxelising", len(jobs)))
    seconds = np.array(found)
    for column, name in enumerate(("five levels", "the whole study")):
        made = seconds[seconds[:, column] > 0, column]
        if len(made):
            print(f"{name}: {made.mean():.2f} processor s a study, {made.sum() / 60:.1f} min for {len(made)} studies")


def _start_process():
    """One thread; and the end of the benchmark ends its processes, else a new start would meet them at work."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _pool(workers):
    """Processes of one thread each: what they share is the disk."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_process)


class Grids(torch.utils.data.Dataset):
    """Cached grids with the interface of classifiers.CropDataset; black around them where it has its margin."""

    def __init__(self, folder, study_ids, grades, crop):
        self.folder, self.study_ids, self.grades = Path(folder), [int(i) for i in study_ids], np.asarray(grades)
        self.crop = crop
        self.per_study = len(LEVELS) if crop.scope == "level" else 1

    def __len__(self):
        return len(self.study_ids) * self.per_study

    def _padded(self, study_id, which):
        grids = np.load(self.folder / f"{study_id}.npy", mmap_mode="r")[which]
        sides = [(full - n) // 2 for full, n in zip(crops.margin_shape(grids.shape[2:]), grids.shape[2:])]
        return np.pad(grids, [(0, 0), (0, 0), *((side, side) for side in sides)])

    def crops_of(self, study_id):
        """(1 or 5, 3, D, H, W) float16."""
        return self._padded(study_id, slice(None))

    def __getitem__(self, number):
        study, level = divmod(number, self.per_study)
        crop = torch.from_numpy(self._padded(self.study_ids[study], slice(level, level + 1))[0])
        grades = self.grades[study, :, level] if self.per_study > 1 else self.grades[study]
        return crop, level, torch.from_numpy(np.ascontiguousarray(grades))


# ---- Training and predicting ----


def train_network(job):
    """Train a 3D network on cached grids and predict the test studies that have any: out/<name>_test.npz.

    job: name, out, grids (folder), crop, settings (of classifier_settings), train, valid, test: (study_ids, grades).
    """
    target = job["out"] / f"{job['name']}_test.npz"
    if target.is_file():
        return
    settings = job["settings"]
    train, valid, test = (Grids(job["grids"], *job[part], job["crop"]) for part in ("train", "valid", "test"))
    config = trainer.TrainConfig(**settings["config"], seed=settings["seed"])
    trainer.train_classifier(
        job["out"], job["name"], train, valid, config, {"fold": settings["fold"]}, recipe=GlobalRecipe()
    )
    model, _ = load_global(job["out"] / f"{job['name']}.safetensors", device_for())
    p = softmax(classifier.measure_views([model], test)[0], -1) if len(test) else np.zeros((0, 5, 5, 3))
    _save(target, study_ids=np.array(test.study_ids, np.int64), p=p)


def train_detector(job):
    """Train one of B's detectors and predict the test studies: out/yolo_<condition>_test.npz.

    job: name, condition, out, run, settings (of detector_settings), imgsz, train: (study_ids, grades), folds: table,
    test: dict study_id -> path.
    """
    condition, settings = job["condition"], job["settings"]
    target = job["out"] / f"yolo_{condition}_test.npz"
    if target.is_file():
        return
    dataset = job["out"] / "yolo" / condition
    detector_data.write_yolo_dataset(
        dataset,
        condition,
        job["run"] / "01_preprocess" / "volumes",
        read_coordinates(job["run"] / "data"),
        *job["train"],
        job["folds"],
        images=WholeSlices(condition, job["imgsz"]),
    )
    changes = {
        **settings["rates"],
        "translate": settings["translate"],
        "scale": settings["scale"],
        "degrees": settings["rotate"],
        **ORIGINAL_SETTINGS,
    }
    weights = detector_training.train_yolo(
        dataset,
        condition,
        settings["fold"],
        job["out"] / "detectors" / condition,
        settings["model"],
        settings["width"] or None,
        settings["epochs"],
        settings["batch"],
        settings["seed"],
        workers=0,
        initial_weights=settings["start"],
        settings=changes,
    )
    detector = load_original(weights, device_for())
    p = []
    for study_id in progress(list(job["test"]), f"yolo {condition} on the test studies"):
        p.append(original_study(detector, load_study(job["test"][study_id], [DETECTORS[condition][0]])))
    _save(target, study_ids=np.array(list(job["test"]), np.int64), p=np.array(p))


def detector_images(run, out, settings):
    """dict of what the detectors see in an epoch: images and millions of pixels, ours and B's."""
    counts = {}
    for condition in DETECTORS:
        for name, folder in (("our", run / "01_preprocess" / "yolo"), ("B's", out / "yolo")):
            height, width = json.loads((folder / condition / "dataset.json").read_text())["shape_px"]
            images = len((folder / condition / f"train_{settings['fold']}.txt").read_text().split())
            counts[f"{name} {condition} images"] = images
            counts[f"{name} {condition} megapixels"] = round(images * height * width / 1e6, 1)
    return counts


def _save(path, **arrays):
    temporary = path.with_suffix(".part")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def _timed(work, job):
    """(name, processor minutes) of a job done."""
    started = time.process_time()
    work(job)
    return job["name"], (time.process_time() - started) / 60


def train_all(run, out, settings, paths, centers, workers):
    """Train and predict with everything that A's and B's ways need, side by side in processes."""
    labels = read_labels(run / "data" / "train.csv")
    folds = read_folds(run / "01_preprocess")
    labels = labels.merge(folds, on="study_id")
    labels = labels[labels["study_id"].isin(paths)].reset_index(drop=True)
    study_ids, grades = labels_to_array(labels)
    held_out = (labels["fold"] == settings["fold"]).to_numpy()
    test = {i: path for i, path in paths.items() if path.parent.parent == out / "test"}
    nothing = np.full((len(test), 5, 5), -1)

    def network(name, scope, shape, usable):
        use = np.isin(study_ids, list(usable))
        known = [i for i in test if i in usable]
        return {
            "name": name,
            "out": out,
            "grids": out / "grids" / scope,
            "crop": Crop(scope, shape, (1.0, 1.0, 1.0)),
            "settings": settings[scope],
            "train": (study_ids[use & ~held_out], grades[use & ~held_out]),
            "valid": (study_ids[use & held_out], grades[use & held_out]),
            "test": (known, nothing[: len(known)]),
        }

    jobs = []
    # What trains longest comes first.
    job = network("a_levels", "level", settings["level"]["shape"], centers)
    if len(job["train"][0]) and len(job["valid"][0]):
        jobs.append((train_network, job))
    else:
        print("A's way: too few studies with six vertebrae to train on; its whole-study network answers for all")
    for condition in sorted(DETECTORS, key=lambda c: c != "ss"):
        part = {
            "name": f"yolo {condition}",
            "condition": condition,
            "out": out,
            "run": run,
            "settings": settings["yolo"][condition],
            "imgsz": settings["imgsz"],
            "train": (study_ids, grades),
            "folds": folds,
            "test": test,
        }
        jobs.append((train_detector, part))
    jobs.append((train_network, network("b_study", "study", [settings["side"]] * 3, paths)))
    with _pool(workers) as pool:
        for future in as_completed([pool.submit(_timed, work, job) for work, job in jobs]):
            name, minutes = future.result()
            print(f"{name}: {minutes:.1f} processor min", flush=True)


# ---- Aggregation ----


def _read(path, ids):
    """Predictions of a file of _save for these studies: (n, ..., 3), NaN where it has none; None without a file."""
    if not path.is_file():
        return None
    with np.load(path) as saved:
        known, p = saved["study_ids"], saved["p"]
    result = np.full((len(ids), *p.shape[1:]), np.nan)
    where = {int(study_id): row for row, study_id in enumerate(known)}
    for number, study_id in enumerate(ids):
        if int(study_id) in where:
            result[number] = p[where[int(study_id)]]
    return result


def solutions(out, ids):
    """dict name -> (n, 5, 5, 3): A's and B's ways, and what B's is the sum of."""
    uniform = np.full((len(ids), 5, 5, 3), 1 / 3)

    def filled(p):
        return uniform if p is None else np.where(np.isfinite(p).all(-1, keepdims=True), p, uniform)

    network, levels = _read(out / "b_study_test.npz", ids), _read(out / "a_levels_test.npz", ids)
    detectors = np.full(uniform.shape, np.nan)
    for condition, (_, conditions) in DETECTORS.items():
        detectors[:, list(conditions)] = _read(out / f"yolo_{condition}_test.npz", ids)
    network = filled(network)
    whole = np.full(uniform.shape, np.nan) if levels is None else levels
    return {
        A: np.where(np.isfinite(whole).all(-1, keepdims=True), whole, network),
        B: YOLO_SHARE * filled(detectors) + (1 - YOLO_SHARE) * network,
        "B's detectors alone": filled(detectors),
        "B's network alone": network,
    }


def all_predictions(run, out):
    """(study_ids, grades (n, 5, 5), dict name -> (n, 5, 5, 3)) of the run's test studies."""
    ids, grades = labels_to_array(read_labels(run / "data" / "phantom_test_labels.csv"))
    _, train_grades = labels_to_array(read_labels(run / "data" / "train.csv"))
    shape = (len(ids), 5, 5, 3)
    found = {"uniform": np.full(shape, 1 / 3), "class prior": np.broadcast_to(class_prior(train_grades), shape)}
    found |= solutions(out, ids)
    tables = {
        title: pd.read_csv(run / "05_inference" / f"submission_{name}.csv")
        for name, title in MEMBER_TITLES.items()
        if (run / "05_inference" / f"submission_{name}.csv").is_file()
    }
    tables[OURS] = pd.read_csv(run / "05_inference" / "submission.csv")
    tables["perfect reader"] = phantom.perfect_submission(run / "data", "test")
    return ids, grades, found | tables_module.align_members(ids, tables)


# ---- Scores ----


def run_scores(grades, predictions, seed):
    """(scores DataFrame by name: the terms, total, closed; dict name -> (RESAMPLES,) totals of studies drawn anew).
    seed: of the draws, another one for each run."""
    scores = score_table(grades, predictions).drop(columns="rows")
    prior, perfect = scores.loc["class prior", "total"], scores.loc["perfect reader", "total"]
    scores["closed"] = (prior - scores["total"]) / (prior - perfect)
    drawn = resampled_scores(grades, predictions, RESAMPLES, seed)
    return scores, {name: terms[:, -1] for name, terms in drawn.items()}


def differences(results):
    """How much higher than our ensemble others score: DataFrame by name: difference, low, high (95% interval over
    test studies, mean of all runs), ours_better (share of draws).

    results: list of what run_scores returns. Each run's studies are drawn on their own; what chance does in training
    shows between the runs' columns and not here.
    """
    rows = {}
    for name in (A, B):
        drawn = np.mean([totals[name] - totals[OURS] for _, totals in results], 0)
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        rows[name] = {
            "difference": np.mean([s.loc[name, "total"] - s.loc[OURS, "total"] for s, _ in results]),
            "low": low,
            "high": high,
            "ours_better": float(np.nanmean(drawn > 0)),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def final_table(results, names):
    """Mean of the runs' scores, and each run's total: DataFrame by name."""
    scores = [s for s, _ in results]
    table = sum(scores) / len(scores)
    if len(scores) > 1:
        for name, own in zip(names, scores):
            table[f"total {name}"] = own["total"]
    table.index.name = "prediction"
    return table


def markdown(table, digits=3):
    """A DataFrame with its index as a markdown table."""

    def text(value, column):
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0%}" if column in ("closed", "ours_better") else f"{value:.{digits}f}"

    columns = [TERM_NAMES.get(column, column) for column in table.columns]
    lines = ["| " + " | ".join(["", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.iterrows():
        lines.append("| " + " | ".join([str(name), *(text(row[c], c) for c in table.columns)]) + " |")
    return "\n".join(lines)


# ---- Running ----


def bench_run(run, out, workers, check, seed, longer=1):
    """Everything for one run, in `out`. Returns what run_scores returns, None if only checking; seed: of its draws."""
    started = time.time()
    settings = read_settings(run, longer)
    out = open_stage(out.parent, out.name, settings).dir
    paths, centers = prepare(run, out, workers)
    if check:
        check_voxels(paths, centers, tuple(settings["level"]["shape"]), settings["side"], check)
        return None
    make_grids(paths, centers, settings, out, workers)
    train_all(run, out, settings, paths, centers, workers)
    ids, grades, predictions = all_predictions(run, out)
    result = run_scores(grades, predictions, seed)
    write_csv(out / "scores.csv", result[0].rename_axis("prediction").reset_index())
    np.savez(out / "predictions.npz", study_ids=ids, grades=grades, **predictions)
    counts = {
        **detector_images(run, out, settings),
        "studies with six vertebrae": len(centers),
        "studies": len(paths),
        "test studies with six vertebrae": int(np.isin(ids, list(centers)).sum()),
        "test studies": len(ids),
        "minutes, last start": round((time.time() - started) / 60, 1),
    }
    write_json(out / "counts.json", counts)
    print(f"{run.name}: " + ", ".join(f"{name} {value}" for name, value in counts.items()))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs on phantoms")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help="folder for <run's name>_solutions in place of the runs' own")
    parser.add_argument("--table", type=Path, help="folder for table.csv and table.md")
    parser.add_argument("--longer", type=int, default=1, help="so many times the members' epochs for A and B")
    parser.add_argument("--check", type=int, default=0, help="compare the voxelising on so many studies, and stop")
    options = parser.parse_args()
    if options.longer < 1:
        parser.error("--longer: at least 1")
    name = "solutions" if options.longer == 1 else f"solutions_{options.longer}x"
    runs = [run.resolve() for run in options.runs]
    outs = [(options.out.resolve() if options.out else run.parent) / f"{run.name}_{name}" for run in runs]
    results = [
        bench_run(run, out, options.workers, options.check, seed, options.longer)
        for seed, (run, out) in enumerate(zip(runs, outs))
    ]
    if options.check:
        return
    folder = options.table or outs[0]
    folder.mkdir(parents=True, exist_ok=True)
    table, gaps = final_table(results, [run.name for run in runs]), differences(results)
    write_csv(folder / "table.csv", table.reset_index())
    write_csv(folder / "differences.csv", gaps.rename_axis("prediction").reset_index())
    text = f"{markdown(table)}\n\nHigher than our ensemble (95% interval over test studies):\n\n{markdown(gaps)}\n"
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
