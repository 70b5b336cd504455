"""Crops, whole-study grids and reading: this kit beside the point-cloud way, SimpleITK and pydicom, in one run.

    python tests/benchmarks/bench_geometry.py --json geometry.json

One phantom study of a real one's size (two sagittal series of 20 slices, 384 x 384; 40 axial slices, 320 x 320) is
written as DICOM files once. Every method is timed on it in turn, round after round, so that what else the machine
does falls on all alike; the table has medians. Peak memory is measured in a fresh process for each method, less what
that process holds with the study loaded and the method's library imported. A script, which pytest does not collect.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from baselines import smeared_cloud, voxelise_point_cloud  # noqa: E402

import phantom  # noqa: E402
from lumbar.data import dicom, geometry, resample  # noqa: E402
from lumbar.data.crop import FULL_SIZE  # noqa: E402
from lumbar.data.greys import normalise_study  # noqa: E402
from lumbar.names import DESCRIPTIONS, LEVELS  # noqa: E402

DESCRIPTION_OF = dict(zip((1, 2, 3), DESCRIPTIONS, strict=True))  # series number in the folder -> description
LEVEL, STUDY = FULL_SIZE["level"], FULL_SIZE["study"]


# ---- The study ----


def resized(plan, count, size):
    """The phantom's SeriesPlan with `count` slices of size x size pixels, same middle, field of view and slice step."""
    row, column, normal = plan.row_cosine[0], plan.column_cosine[0], plan.normal[0]
    spacing = tuple(mm * n / size for mm, n in zip(plan.spacing_mm, plan.shape, strict=True))
    half = (np.array(plan.shape) - 1) / 2 * plan.spacing_mm
    middle = plan.position_mm.mean(0) + column * half[0] + row * half[1]
    first = middle - column * spacing[0] * (size - 1) / 2 - row * spacing[1] * (size - 1) / 2
    offsets = (np.arange(count) - (count - 1) / 2) * plan.gap_mm
    return replace(
        plan,
        position_mm=first + offsets[:, None] * normal,
        row_cosine=np.tile(row, (count, 1)),
        column_cosine=np.tile(column, (count, 1)),
        spacing_mm=spacing,
        shape=(size, size),
        instances=np.arange(1, count + 1),
    )


def write_study(folder, seed):
    """Write the study's series 1, 2, 3 under `folder`; boxes.json has its five LevelBoxes' centres and axes."""
    anatomy, _, _, grids, plans, rng = phantom.simulate(seed, anomalies="none")
    sizes = {"Sagittal T1": (20, 384), "Sagittal T2/STIR": (20, 384), "Axial T2": (40, 320)}
    plans = [resized(plan, *sizes[plan.description]) for plan in plans]
    for plan, image in zip(plans, phantom.acquire_study(rng, anatomy, grids, plans), strict=True):
        number = DESCRIPTIONS.index(plan.description) + 1
        phantom.write_series(
            folder / str(number), plan, image, study_id=1, number=number, patient="Bench", rng=rng, anomalies="none"
        )
    boxes = []
    for level in range(len(LEVELS)):
        disc = anatomy.disc(level)
        left, back, head = disc.frame.T
        boxes.append({"center": disc.centre_mm.tolist(), "axes": [head.tolist(), left.tolist(), back.tolist()]})
    (folder / "boxes.json").write_text(json.dumps(boxes))


def load(folder):
    """(normalised Study, five LevelBoxes) of a folder that write_study filled."""
    study = normalise_study(dicom.read_study(folder, DESCRIPTION_OF))
    if len(study.volumes) != 3:
        raise RuntimeError(f"the benchmark's study was not read whole: {study.problems}")
    boxes = [
        geometry.LevelBox(level, np.array(box["center"]), np.array(box["axes"]), np.array([30.0, 50.0, 40.0]))
        for level, box in zip(LEVELS, json.loads((folder / "boxes.json").read_text()), strict=True)
    ]
    return study, boxes


# ---- The methods: study, boxes -> list of (3, d, h, w) ----


def ours_levels(study, boxes):
    return [resample.crop_level(study, box, LEVEL)[0] for box in boxes]


def ours_study(study, boxes):
    return [resample.crop_study(study, STUDY)[0]]


def cloud_levels(study, boxes):
    cloud = smeared_cloud(study)
    return [voxelise_point_cloud(study, box, LEVEL, cloud=cloud)[0] for box in boxes]


def cloud_study(study, boxes):
    return [voxelise_point_cloud(study, None, STUDY)[0]]


def sitk_images(study):
    """SimpleITK images of the study's volumes, by channel."""
    import SimpleITK as sitk

    images = []
    for volume in study.volumes:
        image = sitk.GetImageFromArray(volume.array.astype(np.float32))
        steps = volume.spacing_mm
        image.SetSpacing(steps[::-1].tolist())
        image.SetOrigin(volume.affine[:3, 3].tolist())
        image.SetDirection((volume.affine[:3, :3] / steps)[:, ::-1].ravel().tolist())
        images.append((DESCRIPTIONS.index(volume.description), image))
    return images


def sitk_box(images, center, axes, extent_mm, shape):
    import SimpleITK as sitk

    affine = resample.crop_affine(center, axes, extent_mm, shape)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    resampler = sitk.ResampleImageFilter()
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.SetSize([int(n) for n in shape[::-1]])
    resampler.SetOutputSpacing(steps[::-1].tolist())
    resampler.SetOutputOrigin(affine[:3, 3].tolist())
    resampler.SetOutputDirection((affine[:3, :3] / steps)[:, ::-1].ravel().tolist())
    crop = np.zeros((len(DESCRIPTIONS), *shape), np.float16)
    for channel, image in images:
        crop[channel] = sitk.GetArrayFromImage(resampler.Execute(image))
    return crop


def sitk_levels(study, boxes):
    images = sitk_images(study)
    return [sitk_box(images, resample.crop_center(box, LEVEL), box.axes, LEVEL.extent_mm, LEVEL.shape) for box in boxes]


def sitk_study(study, boxes):
    return [sitk_box(sitk_images(study), *resample.study_box(study), STUDY.extent_mm, STUDY.shape)]


METHODS = {
    "five crops 128^3": {"this kit": ours_levels, "point cloud": cloud_levels, "SimpleITK": sitk_levels},
    "whole study 256^3": {"this kit": ours_study, "point cloud": cloud_study, "SimpleITK": sitk_study},
}


def ours_read(folder):
    dicom.read_study(folder, DESCRIPTION_OF)


def pydicom_read(folder):
    """Only what cannot be done without: parse and decode every file."""
    import pydicom

    for path in sorted(folder.glob("*/*.dcm")):
        pydicom.dcmread(path).pixel_array


# ---- Measuring ----


def medians(methods, arguments, repeats):
    """dict name -> median seconds; one call each before, then `repeats` rounds in turn."""
    seconds = {name: [] for name in methods}
    for round_ in range(repeats + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            method(*arguments)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_mb(folder, task, name):
    """Peak memory of one method in MB above the process' peak before it, from a fresh process."""
    command = [sys.executable, __file__, "--peak", task, name, "--folder", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{task}, {name}: {result.stderr[-2000:]}")
    return float(result.stdout.split()[-1])


def report_peak(folder, task, name):
    """What peak_mb runs: print the peak that the method adds."""
    if name == "point cloud":
        geometry.load_open3d()
    elif name == "SimpleITK":
        import SimpleITK  # noqa: F401
    study, boxes = load(folder)
    before = memory_kb("VmRSS")
    # Forget the peak of loading, else it hides what the method adds.
    Path("/proc/self/clear_refs").write_text("5")
    METHODS[task][name](study, boxes)
    print((memory_kb("VmHWM") - before) / 1024)


def memory_kb(field):
    """VmRSS (now) or VmHWM (peak) of this process, as Linux counts them.

    ru_maxrss is no use here: a process inherits it from the one that started it, which is the larger one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def bounds(shape, repeats):
    """Nanoseconds a sample of the least that a crop of this shape could take on this machine, by what bounds it.

    bare 2D / 3D grid_sample: torch's own interpolation, two images (a slice and the next) or one volume; memory: a copy
    of as many float32; per block: Python's and torch's overhead is what is left.
    """
    import torch
    import torch.nn.functional as F

    count = int(np.prod(shape))
    ramp = [torch.linspace(-0.5, 0.5, n) for n in shape]
    plane = torch.stack(torch.meshgrid(ramp[0], ramp[1] * 0.5, ramp[2], indexing="ij")[::-1], -1)  # x, y, z
    image, volume = torch.rand(1, 2, 20 * 146, 146), torch.rand(1, 1, 20, 146, 146)
    tasks = {
        "bare 2D grid_sample, two slices": lambda: F.grid_sample(
            image.expand(shape[0], -1, -1, -1), plane[..., :2].contiguous(), padding_mode="border", align_corners=True
        ),
        "bare 3D grid_sample": lambda: F.grid_sample(volume, plane[None], padding_mode="border", align_corners=True),
        "copy of the samples (float32)": lambda: plane[..., 0].clone(),
    }
    return {name: value / count * 1e9 for name, value in medians(tasks, (), repeats).items()}


def accuracy(study, boxes):
    """Of the kit's and the point cloud's crops: share of empty voxels and error where the kit's crop is covered.

    The study's pixels are replaced by a linear function of position, so that the truth is known everywhere.
    """
    box = boxes[2]
    center, shape, extent_mm = resample.crop_center(box, LEVEL), LEVEL.shape, LEVEL.extent_mm
    slope = np.array([0.3, 0.5, 0.8]) / 200
    volumes = []
    for volume in study.volumes:
        index = np.stack(np.meshgrid(*map(np.arange, volume.array.shape), indexing="ij"), -1)
        values = (volume.voxel_to_lps(index) - center) @ slope + 0.5
        volumes.append(replace(volume, array=values.astype(np.float32)))
    study = replace(study, volumes=volumes)
    affine = resample.crop_affine(center, box.axes, extent_mm, shape)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    truth = (index @ affine[:3, :3].T + affine[:3, 3] - center) @ slope + 0.5
    crop, covered = resample.crop_level(study, box, LEVEL)
    cloud, occupied = voxelise_point_cloud(study, box, LEVEL)
    rows = {}
    for name, values, filled in (("this kit", crop, covered), ("point cloud", cloud, occupied)):
        error = np.abs(values - truth)[covered] / np.ptp(truth)
        rows[name] = {
            "holes": float(1 - (filled & covered).sum() / covered.sum()),
            "mean error": float(error.mean()),
            "99% error": float(np.percentile(error, 99)),
            "largest error": float(error.max()),
        }
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of every method")
    parser.add_argument("--seed", type=int, default=3, help="of the phantom study")
    parser.add_argument("--folder", type=Path, help="keep the study here and use it again")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--device", help="sample on this device too, e.g. cuda")
    parser.add_argument("--peak", nargs=2, metavar=("TASK", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        return report_peak(options.folder, *options.peak)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "1"
        if not (folder / "boxes.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_study(folder, options.seed)
        results = measure(folder, options.repeats, options.device)
    print(as_markdown(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(folder, repeats, device=None):
    """All numbers as a dict; as_markdown lays them out."""
    import torch

    study, boxes = load(folder)
    results = {"threads": torch.get_num_threads(), "repeats": repeats, "tasks": {}}
    for task, methods in METHODS.items():
        methods = dict(methods)
        if device:
            if "five" in task:
                methods[f"this kit, {device}"] = lambda study, boxes: [
                    resample.crop_level(study, box, LEVEL, device) for box in boxes
                ]
            else:
                methods[f"this kit, {device}"] = lambda study, boxes: resample.crop_study(study, STUDY, device)
        seconds = medians(methods, (study, boxes), repeats)
        results["tasks"][task] = {
            name: {"seconds": seconds[name], "peak_mb": peak_mb(folder, task, name) if name in METHODS[task] else None}
            for name in methods
        }
    results["reading"] = medians({"this kit": ours_read, "pydicom": pydicom_read}, (folder,), max(9, repeats))
    results["accuracy"] = accuracy(study, boxes)
    results["ns_per_sample"] = bounds(LEVEL.shape, max(3, repeats))
    channels = 3 * len(boxes) * np.prod(LEVEL.shape)
    results["ns_per_sample"]["this kit, five crops"] = (
        results["tasks"]["five crops 128^3"]["this kit"]["seconds"] / channels * 1e9
    )
    return results


def as_markdown(results):
    lines = [f"{results['threads']} threads, medians of {results['repeats']} rounds", ""]
    lines += ["| task | method | seconds | point cloud / it | peak MB above the study |", "|---|---|---|---|---|"]
    for task, methods in results["tasks"].items():
        for name, row in methods.items():
            times = methods["point cloud"]["seconds"] / row["seconds"]
            peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
            lines.append(f"| {task} | {name} | {row['seconds']:.3f} | {times:.1f} | {peak} |")
    lines += ["", "| reading the study | seconds | of pydicom's |", "|---|---|---|"]
    for name, seconds in results["reading"].items():
        lines.append(f"| {name} | {seconds:.4f} | {seconds / results['reading']['pydicom']:.2f} |")
    lines += ["", "| linear phantom, L3/4 | holes | mean error | 99% | largest |", "|---|---|---|---|---|"]
    for name, row in results["accuracy"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.2%}" for value in row.values()) + " |")
    lines += ["", "| time a sample | ns |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in results["ns_per_sample"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
