"""The training of a detector by ultralytics.

May use: detector_trainer, detector_weights, storage, names.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..names import SEVERITIES
from ..storage import DamagedFile, file_digest, read_checkpoint, read_json, write_json, write_text
from .detector_weights import (
    _write_yolo,
    _yolo_model_yaml,
    find_yolo_description,
    prepare_ultralytics,
    read_detector_about,
)

# AdamW with an equal nominal batch, a gentle warm-up and a strong class term trains from random weights within few
# epochs; no mosaic because every patch has the same millimetres a pixel, and scaling only as far as SCALE says. rect
# keeps patches unpadded. 03_train_yolo takes its learning rate from SCHEDULES.
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

# How the learning rate goes, by name. `short`: one epoch of warm-up, for few epochs or weights to start from. `B`: as
# solution B trained, ultralytics' defaults with a cosine.
SCHEDULES: dict[str, dict[str, Any]] = {
    "short": {"lr0": 0.001, "lrf": 0.01, "cos_lr": True, "warmup_epochs": 1.0, "warmup_bias_lr": 0.001},
    "B": {"lr0": 0.01, "lrf": 0.01, "cos_lr": True, "warmup_epochs": 3.0, "warmup_bias_lr": 0.1},
}


def yolo_schedule(name: str, learning_rate: float = 0.0) -> dict[str, Any]:
    """Settings of train_yolo for one of SCHEDULES.

    Parameters
    ----------
    name : str
        A key of SCHEDULES.
    learning_rate : float
        AdamW's peak in place of the schedule's own, 0 leaves that.

    Returns
    -------
    dict
        lr0, lrf, cos_lr, warmup_epochs and warmup_bias_lr, the last in proportion to the peak.

    Raises
    ------
    ValueError
        Another name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"SCHEDULE must be {' or '.join(SCHEDULES)}, not {name!r}")
    chosen = dict(SCHEDULES[name])
    if learning_rate:
        # The biases start as much above the peak as they did.
        chosen["warmup_bias_lr"] *= learning_rate / chosen["lr0"]
        chosen["lr0"] = learning_rate
    return chosen


def yolo_device(device: str | None, batch: int) -> str:
    """ultralytics' name of a device: "cpu", or numbers of GPUs, "0" or "0,1". None or "auto": all GPUs, if there are
    any, as far as each gets an image of the batch. With several, ultralytics starts a process for each, which takes its
    share of the batch."""
    if device in (None, "auto", "cuda"):
        return ",".join(map(str, range(min(torch.cuda.device_count(), int(batch))))) or "cpu"
    return str(device)


def train_yolo(
    dataset_dir: str | Path,
    condition: str,
    fold: int,
    out_dir: str | Path,
    model: str = "yolov10x.yaml",
    width: float | None = None,
    epochs: int = 100,
    batch: int = 16,
    seed: int = 0,
    device: str | None = "auto",
    workers: int = 4,
    initial_weights: str | Path | None = None,
    point_offsets: Mapping[str, Any] | None = None,
    prior: ArrayLike | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Train one detector on one fold and write out_dir/yolo_<condition>_<fold>.safetensors.

    A killed run continues with its last finished epoch when called again with the same arguments, and ends as it would
    have ended (see PatchTrainer); a finished one returns at once. What is shipped are the averaged (EMA) weights of the
    last epoch: mAP on a handful of validation studies is no good guide to log loss. What an unfinished training needs
    is in out_dir/setup_<condition>_<fold>, without a pickle.

    Parameters
    ----------
    dataset_dir : path
        Of write_yolo_dataset.
    condition : str
        The key of DETECTORS that the data set is of.
    fold : int
        The one that is held out.
    out_dir : path
        Is made where there is none.
    model, width
        Name of a description that ultralytics ships, and a width factor in place of its own.
    epochs : int
        Passes over the training images.
    batch : int
        Images in a step, on all GPUs together.
    seed : int
        Of initialisation, order and augmentation.
    device : str, optional
        Of yolo_device.
    workers : int
        Loader processes, for each GPU; none on a CPU.
    initial_weights : path, optional
        A file of this function, or COCO's weights (see load_detector), to start from; tensors whose shapes differ are
        skipped. None: random weights.
    point_offsets, prior
        Of fit_point_offsets, and (5, 5, 3) of class_prior: kept with the weights.
    settings : dict, optional
        Changes to YOLO_SETTINGS, by ultralytics' names.

    Returns
    -------
    Path
        Of the weights.

    Raises
    ------
    FileNotFoundError
        No data set, an empty list of images, or no initial weights where they are said to be.
    ValueError
        An unknown model, or initial weights that cannot be used.
    RuntimeError
        The training diverged (on one device), or ultralytics was imported unprepared, see prepare_ultralytics.
    """
    dataset_dir, out_dir = Path(dataset_dir).resolve(), Path(out_dir).resolve()
    info = _read_dataset(dataset_dir, fold)
    arguments = {
        "dataset": info,
        "fold": int(fold),
        "model": str(model),
        "width": width,
        "epochs": int(epochs),
        "batch": int(batch),
        "seed": int(seed),
        "settings": YOLO_SETTINGS | dict(settings or {}),
        # Known by its content: it may lie elsewhere when the training goes on.
        "initial_weights": None if initial_weights is None else file_digest(initial_weights),
    }
    weights = out_dir / f"yolo_{condition}_{fold}.safetensors"
    if _arguments_of(weights) == json.loads(json.dumps(arguments)):
        return weights
    find_yolo_description(model)
    if initial_weights is not None:
        check_initial_weights(initial_weights, model, width)  # here, not later in a process for each GPU
    run = out_dir / f"run_{condition}_{fold}"
    # Not in the run's own folder: ultralytics empties that before it starts processes for several GPUs.
    setup = out_dir / f"setup_{condition}_{fold}"
    saved = _begin(run, setup, arguments)
    if saved is None or saved["epoch"] + 1 < int(epochs):
        data = _describe_data(setup, dataset_dir, arguments, initial_weights, f"yolo {condition} fold {fold}")
        saved = _train_on(data, run, setup, arguments, yolo_device(device, batch), workers)
    # Half the size and exact enough; nothing is beyond what half precision holds but what would round to infinity.
    averaged = {k: v.half().nan_to_num() if v.is_floating_point() else v for k, v in saved["ema"].items()}
    _write_yolo(weights, averaged, _metadata(condition, saved["cfg"], arguments, point_offsets, prior))
    shutil.rmtree(run / "weights", ignore_errors=True)  # ultralytics makes it and nothing is in it
    (setup / "state.pt").unlink()
    return weights


def check_initial_weights(path: str | Path, model: str = "yolov10x.yaml", width: float | None = None) -> None:
    """Say how much of a detector's network a weights file fills.

    Parameters
    ----------
    path : str or Path
        A file of train_yolo, or COCO's weights.
    model, width
        As train_yolo takes them.

    Raises
    ------
    ValueError
        An unknown model.
    DamagedFile
        The file holds no weights, or another network's.
    """
    prepare_ultralytics(Path(tempfile.gettempdir()) / "ultralytics_config")
    from ultralytics.nn.tasks import DetectionModel

    from .detector_trainer import start_from

    with tempfile.TemporaryDirectory() as folder:
        description = _yolo_model_yaml(model, width, Path(folder))
        start_from(path, DetectionModel(description, ch=1, nc=len(SEVERITIES), verbose=False))


def _read_dataset(folder, fold):
    """dataset.json of a data set that has images to train on and to hold out in this fold. Raises FileNotFoundError."""
    if not (folder / "dataset.json").exists():
        raise FileNotFoundError(f"{folder}: no dataset.json, the data set is missing or unfinished; run 01_preprocess")
    info = read_json(folder / "dataset.json", "run 01_preprocess again")
    for part in ("train", "val"):
        listing = folder / f"{part}_{fold}.txt"
        if not listing.exists() or not listing.read_text().strip():
            raise FileNotFoundError(f"{listing}: no images in this list; folds of the data set: {info['folds']}")
    return info


def _begin(run, setup, arguments):
    """Make the folders of a training ready, and empty unless they are of one with the same arguments.

    Returns the state in which that one was left (of PatchTrainer), None without a readable one.
    """
    setup.parent.mkdir(parents=True, exist_ok=True)
    prepare_ultralytics(setup.parent / "ultralytics")
    if not _holds(setup / "arguments.json", json.loads(json.dumps(arguments))):
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(setup, ignore_errors=True)
        setup.mkdir()
        write_json(setup / "arguments.json", arguments)
    saved = read_checkpoint(setup / "state.pt")
    if saved is None:
        (setup / "state.pt").unlink(missing_ok=True)
    return saved


def _describe_data(setup, dataset_dir, arguments, initial, title):
    """Write the description of the data that ultralytics and PatchTrainer read. Returns its path.

    Absolute paths are written here, not with the data set, so that a moved data set still trains.
    """
    fold, names = arguments["fold"], arguments["dataset"]
    description = {
        "path": str(dataset_dir),
        "train": str(dataset_dir / f"train_{fold}.txt"),
        "val": str(dataset_dir / f"val_{fold}.txt"),
        "nc": len(names["names"]),
        "channels": 1,
        "names": dict(enumerate(names["names"])),
        "initial_weights": initial and str(Path(initial).resolve()),
        "state": str(setup / "state.pt"),
        "title": title,
    }
    return write_text(setup / f"data_{fold}.yaml", json.dumps(description))


def _train_on(data, run, setup, arguments, device, workers):
    """Let ultralytics train, or continue, on the described data. Returns the state that PatchTrainer left."""
    from .detector_trainer import PatchTrainer

    cpu = device == "cpu"
    overrides = {
        "task": "detect",
        "mode": "train",
        "model": _yolo_model_yaml(arguments["model"], arguments["width"], setup),
        "data": str(data),
        "imgsz": arguments["dataset"]["imgsz"],
        "epochs": arguments["epochs"],
        "batch": arguments["batch"],
        "nbs": arguments["batch"],
        "seed": arguments["seed"],
        "device": device,
        "workers": 0 if cpu else workers,
        "cache": "ram",
        "amp": not cpu,
        "pretrained": False,
        "plots": False,
        "verbose": False,
        "project": str(run.parent),
        "name": run.name,
        "exist_ok": True,
        "val": not cpu,
        **arguments["settings"],
    }
    PatchTrainer(overrides=overrides).train()
    return read_checkpoint(setup / "state.pt")


def _metadata(condition, cfg, arguments, point_offsets, prior):
    """What a weights file says of itself; cfg: ultralytics' description of the network."""
    info = arguments["dataset"]
    return {
        "kind": "yolo",
        "condition": condition,
        "fold": arguments["fold"],
        "cfg": cfg,
        "scheme": info.get("scheme", "severity"),
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
