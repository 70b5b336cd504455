"""The training of a detector by ultralytics.

May use: detector_weights, detector_data, pretrained, storage, names, detector_trainer, weights.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from ..storage import DamagedFile, read_checkpoint, read_json, write_json
from ..weights import read_weights
from .detector_weights import (
    _REMEDY,
    _write_yolo,
    _yolo_model_yaml,
    find_yolo_description,
    prepare_ultralytics,
    read_detector_about,
)
from .pretrained import read_state

# AdamW with an equal nominal batch, a gentle warm-up and a strong class term trains from random weights within few
# epochs; no mosaic or scaling because every patch has the same millimetres a pixel. rect keeps patches unpadded.
YOLO_SETTINGS = {
    "optimizer": "AdamW",
    "lr0": 0.003,
    "lrf": 0.01,
    "cos_lr": True,
    "warmup_epochs": 1.0,
    "warmup_bias_lr": 0.003,
    "cls": 1.0,
    "cls_pw": 0.5,
    "mosaic": 0.0,
    "scale": 0.0,
    "translate": 0.05,
    "degrees": 0.0,
    "hsv_h": 0.0,
    "hsv_s": 0.0,
    "hsv_v": 0.0,
    "fliplr": 0.0,
    "flipud": 0.0,
    "erasing": 0.0,
    "auto_augment": None,
    "patience": 0,
}
# ultralytics' usual flip, which the original scheme left on. It is wrong there: the picture changes sides, the class
# names do not, so that half of all axial examples teach the other side. Kept, because this is what is compared.
ORIGINAL_SETTINGS = {"fliplr": 0.5}


def yolo_device(device, batch):
    """ultralytics' name of a device: "cpu", or numbers of GPUs, "0" or "0,1". None or "auto": all GPUs, if there are
    any, as far as each gets an image of the batch. With several, ultralytics starts a process for each, which takes its
    share of the batch."""
    if device in (None, "auto", "cuda"):
        return ",".join(map(str, range(min(torch.cuda.device_count(), int(batch))))) or "cpu"
    return str(device)


def train_yolo(
    dataset_dir,
    condition,
    fold,
    out_dir,
    model="yolov10x.yaml",
    width=None,
    epochs=100,
    batch=16,
    seed=0,
    device="auto",
    workers=4,
    initial_weights=None,
    point_offsets=None,
    prior=None,
    settings=None,
):
    """Train one detector on one fold from random (or given) weights and write yolo_<condition>_<fold>.safetensors.

    dataset_dir: of write_yolo_dataset. model: name of an ultralytics description; width: other width factor (None =
    the description's). initial_weights: a file of this function to start from (shapes that differ are skipped), or
    COCO's weights of the same network (whose class head is left out, see pretrained.load_detector).
    point_offsets: result of fit_point_offsets, prior: (5, 5, 3) of class_prior; both are kept with the weights.
    settings: changes to YOLO_SETTINGS (ultralytics' names). device: of yolo_device.

    A killed run continues with its last finished epoch when called again with the same arguments, and ends as it would
    have ended (see PatchTrainer); a finished one returns at once. What is shipped are the averaged (EMA) weights of the
    last epoch: mAP on a handful of validation studies is no good guide to log loss. What an unfinished training needs
    is in out_dir/setup_<condition>_<fold>, without a pickle. Returns the path of the weights.
    Raises FileNotFoundError without a data set or an empty training list, ValueError for an unknown model, or initial
    weights that cannot be used.
    """
    dataset_dir, out_dir = Path(dataset_dir).resolve(), Path(out_dir).resolve()
    if not (dataset_dir / "dataset.json").exists():
        raise FileNotFoundError(
            f"{dataset_dir}: no dataset.json, the data set is missing or unfinished; run 01_preprocess"
        )
    info = read_json(dataset_dir / "dataset.json", "run 01_preprocess again")
    for part in ("train", "val"):
        listing = dataset_dir / f"{part}_{fold}.txt"
        if not listing.exists() or not listing.read_text().strip():
            raise FileNotFoundError(f"{listing}: no images in this list; folds of the data set: {info['folds']}")
    device = yolo_device(device, batch)
    scheme = info.get("scheme", "severity")
    chosen = YOLO_SETTINGS | (ORIGINAL_SETTINGS if scheme == "original" else {}) | (settings or {})
    arguments = {
        "dataset": info,
        "fold": int(fold),
        "model": str(model),
        "width": width,
        "epochs": int(epochs),
        "batch": int(batch),
        "seed": int(seed),
        "settings": chosen,
        "initial_weights": None if initial_weights is None else str(initial_weights),
    }
    weights = out_dir / f"yolo_{condition}_{fold}.safetensors"
    if _arguments_of(weights) == json.loads(json.dumps(arguments)):
        return weights
    find_yolo_description(model)
    if initial_weights is not None:
        try:  # unusable ones end here, not in a process for each GPU
            read_weights(initial_weights, "metadata", _REMEDY)
        except DamagedFile:
            read_state(initial_weights)  # COCO's are not a file of the kit
    out_dir.mkdir(parents=True, exist_ok=True)
    prepare_ultralytics(out_dir / "ultralytics")
    run = out_dir / f"run_{condition}_{fold}"
    # Not in the run's own folder: ultralytics empties that before it starts processes for several GPUs.
    setup = out_dir / f"setup_{condition}_{fold}"
    begun, state = setup / "arguments.json", setup / "state.pt"
    if not _holds(begun, json.loads(json.dumps(arguments))):
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(setup, ignore_errors=True)
        setup.mkdir()
        write_json(begun, arguments)
    # Absolute paths are written here, not with the data set, so that a moved data set still trains.
    data_yaml = setup / f"data_{fold}.yaml"
    data_yaml.write_text(
        json.dumps(
            {
                "path": str(dataset_dir),
                "train": str(dataset_dir / f"train_{fold}.txt"),
                "val": str(dataset_dir / f"val_{fold}.txt"),
                "nc": len(info["names"]),
                "channels": 1,
                "names": dict(enumerate(info["names"])),
                "initial_weights": arguments["initial_weights"] and str(Path(initial_weights).resolve()),
                "state": str(state),
                "title": f"yolo {condition} fold {fold}",
            }
        )
    )
    saved = read_checkpoint(state)
    if saved is None:
        state.unlink(missing_ok=True)
    if saved is None or saved["epoch"] + 1 < int(epochs):
        overrides = {
            "task": "detect",
            "mode": "train",
            "model": _yolo_model_yaml(model, width, setup),
            "data": str(data_yaml),
            "imgsz": info["imgsz"],
            "epochs": int(epochs),
            "batch": int(batch),
            "nbs": int(batch),
            "seed": int(seed),
            "device": device,
            "workers": 0 if device == "cpu" else workers,
            "cache": "ram",
            "amp": device != "cpu",
            "pretrained": False,
            "plots": False,
            "verbose": False,
            "project": str(out_dir),
            "name": run.name,
            "exist_ok": True,
            "val": device != "cpu",
            **chosen,
        }
        from .detector_trainer import PatchTrainer

        PatchTrainer(overrides=overrides).train()
        saved = read_checkpoint(state)
    metadata = {
        "kind": "yolo",
        "condition": condition,
        "fold": int(fold),
        "cfg": saved["cfg"],
        "scheme": scheme,
        "names": info["names"],
        "channels": 1,
        "shape_px": info["shape_px"],
        "mm_per_px": info["mm_per_px"],
        "imgsz": info["imgsz"],
        "point_offsets": point_offsets,
        "prior": None if prior is None else np.asarray(prior).tolist(),
        "calibration": None,
        "views": [{}],
        "arguments": arguments,
        "licence": "AGPL-3.0 (ultralytics)",
    }
    # Half the size and exact enough; nothing is beyond what half precision holds but what would round to infinity.
    averaged = {k: v.half().nan_to_num() if v.is_floating_point() else v for k, v in saved["ema"].items()}
    _write_yolo(weights, averaged, metadata)
    shutil.rmtree(run / "weights", ignore_errors=True)  # ultralytics makes it and nothing is in it
    state.unlink()
    return weights


def _arguments_of(weights):
    """What a weights file was trained with, None without a readable one."""
    try:
        return read_detector_about(weights).get("arguments")
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        print(f"{error}. It is trained again now.")
        return None


def _holds(path, data):
    """Whether a JSON file holds this."""
    try:
        return read_json(path) == data
    except (FileNotFoundError, DamagedFile):
        return False
