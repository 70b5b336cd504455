"""Small things that act like the real ones: a phantom study of few slices and pixels, members with random weights."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

import phantom
import utils
from lumbar.grade import detector_weights
from lumbar.grade.classifier import OrdinalClassifier, save_classifier
from lumbar.grade.detector_data import YOLO_VIEWS, yolo_shape_px
from lumbar.grade.slice_crops import SliceCrop
from lumbar.grade.slice_network import SliceNetwork, save_slices
from lumbar.spine.spinenet import SpineNet

SERIES = dict(zip((101, 102, 103), utils.DESCRIPTIONS, strict=True))  # series_id -> description
ROOT = Path(__file__).resolve().parent.parent


def resized(plan, count, size):
    """The phantom's SeriesPlan with `count` slices of size x size pixels, same middle and field of view."""
    row, column, normal = plan.row_cosine[0], plan.column_cosine[0], plan.normal[0]
    spacing = tuple(mm * n / size for mm, n in zip(plan.spacing_mm, plan.shape, strict=True))
    half = (np.array(plan.shape) - 1) / 2 * plan.spacing_mm
    middle = plan.position_mm.mean(0) + column * half[0] + row * half[1]
    gap_mm = plan.gap_mm * len(plan.position_mm) / count
    first = middle - column * spacing[0] * (size - 1) / 2 - row * spacing[1] * (size - 1) / 2
    return replace(
        plan,
        position_mm=first + (np.arange(count) - (count - 1) / 2)[:, None] * gap_mm * normal,
        row_cosine=np.tile(row, (count, 1)),
        column_cosine=np.tile(column, (count, 1)),
        spacing_mm=spacing,
        shape=(size, size),
        gap_mm=gap_mm,
        instances=np.arange(1, count + 1),
    )


@cache
def acquired(seed, slices, pixels):
    """(plans, images, random numbers) of write_study: to paint a spine takes seconds. Not to be changed."""
    anatomy, _, _, grids, plans, rng = phantom.simulate(seed, anomalies="none")
    plans = {plan.description: plan for plan in plans}
    plans = [
        resized(plans[d], *((slices[1], pixels[1]) if d == "Axial T2" else (slices[0], pixels[0])))
        for d in SERIES.values()
    ]
    return plans, phantom.acquire_study(rng, anatomy, grids, plans), rng


def write_study(folder, seed=3, slices=(9, 12), pixels=(112, 96)):
    """Write one phantom study's series (see SERIES) below `folder`; slices, pixels: of sagittal and axial series."""
    plans, images, rng = deepcopy(acquired(seed, slices, pixels))
    for number, (series_id, plan, image) in enumerate(zip(SERIES, plans, images, strict=True), 1):
        where, plan = Path(folder) / str(series_id), replace(plan, series_id=series_id)
        phantom.write_series(
            where, plan, image, study_id=seed, number=number, patient="Tiny", rng=rng, anomalies="none"
        )


def write_members(folder, shape=32, imgsz=96, backbones=("tiny", "tiny_stride8"), random_spinenet=False, fold=0):
    """Write random weights of every member into `folder`, SpineNet being the shipped or a random one. Returns it.

    shape: voxels along each side of both crops; imgsz: of the detectors; fold: in the files' names, other numbers are
    other weights; the detectors of fold 1 and on have a second view.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(fold)
    prior = utils.class_prior(np.random.default_rng(0).choice(3, (40, 5, 5), p=(0.7, 0.2, 0.1)))
    spinenet = utils.load_spinenet(ROOT / "weights" / "spinenet_phantom.safetensors")
    if random_spinenet:
        tiny = SpineNet(widths=(8, 8, 8), resolution_mm=4.0).eval()
        tiny.about = spinenet.about
        with torch.no_grad():  # sees something in every image, if no vertebrae
            tiny.head[0].weight.normal_(std=0.3)
            tiny.head[0].bias[:20] = -1.0
        spinenet = tiny
    utils.save_spinenet(spinenet, folder / "spinenet.safetensors")
    for scope, backbone in zip(("level", "study"), backbones, strict=True):
        crop = utils.Crop.full_size(scope, [shape] * 3)
        model = OrdinalClassifier(scope, backbone, crop.shape, prior).eval()
        torch.nn.init.normal_(model.score.weight, std=0.3)  # so that answers differ between studies
        about = {"crop": crop, "prior": prior.tolist(), "views": [{}, {"mirror": True}]}
        save_classifier(folder / f"{scope}_{fold}.safetensors", model, about)
    crop = SliceCrop(size_px=shape, mm_per_px=1.2, axial_mm_per_px=0.8, slices=2)
    model = SliceNetwork("test_efficientnet", crop, prior, width=16).eval()
    torch.nn.init.normal_(model.score[1].weight, std=0.3)
    save_slices(
        folder / f"slices_{fold}.safetensors", model, {"prior": prior.tolist(), "views": [{}, {"mirror": True}]}
    )
    detector_weights.prepare_ultralytics(folder / "ultralytics")
    from ultralytics.nn.tasks import DetectionModel

    # Scores times the metric's weights, which is what stands without a calibration; without one they were unfinished.
    unfitted = {"mean": [0.0, 0.0], "scale": [1.0, 1.0], "matrix": [[0.0, 0.0]] * 2, "bias": [0.0, 0.0]}
    calibration = {"trust": 1.0, "prior": [[1 / 3] * 3] * 5, **unfitted}
    description = detector_weights._yolo_model_yaml("yolov10n.yaml", 0.125, folder)
    for condition in utils.DETECTORS:
        net = DetectionModel(description, ch=1, nc=3, verbose=False)
        with torch.no_grad():
            for name, value in net.named_parameters():
                if "cv3" in name and name.endswith("2.bias"):  # class scores, near 0 in a network that saw nothing
                    value.copy_(torch.tensor([-2.0, -3.0, -4.0]))
                elif "cv3" in name and name.endswith("2.weight"):
                    value.normal_(std=0.5)
        shape_px, mm_per_px = yolo_shape_px(YOLO_VIEWS[condition], imgsz)
        about = {
            "kind": "yolo",
            "condition": condition,
            "cfg": net.yaml,
            "channels": 1,
            "names": list(utils.SEVERITIES),
            "shape_px": list(shape_px),
            "mm_per_px": mm_per_px,
            "prior": prior.tolist(),
            "calibration": calibration,
            "views": [{}, {"reach": 1.7}] if fold else [{}],
        }
        detector_weights._write_yolo(folder / f"yolo_{condition}_{fold}.safetensors", net.state_dict(), about)
    return folder
