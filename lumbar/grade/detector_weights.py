"""What a detector's weights file may state: a network that ships with ultralytics, by name.

May use: weights, storage.
"""

import logging
import os
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from ..storage import open_tensors, write_tensors
from ..weights import read_settled


def prepare_ultralytics(config_dir: str | Path) -> ModuleType:
    """Set the environment under which ultralytics never tries the network, then import and return it.

    config_dir: a writable folder for its settings and font. Must be called before any other import of ultralytics
    (RuntimeError otherwise, unless that import was prepared as well).
    """
    import sys

    import matplotlib

    config_dir = Path(config_dir)
    if "ultralytics" in sys.modules and os.environ.get("YOLO_OFFLINE") != "1":
        raise RuntimeError(
            "ultralytics was imported before prepare_ultralytics: it may use the network. "
            "Call prepare_ultralytics first, in a fresh process."
        )
    if "ultralytics" not in sys.modules:
        os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="0", YOLO_CONFIG_DIR=str(config_dir.resolve()))
        os.environ["ULTRALYTICS_SAFE_LOAD"] = (
            "1"  # should it ever open a checkpoint or build a network, it evaluates none
        )
        font = config_dir / "Ultralytics" / "Arial.ttf"
        font.parent.mkdir(parents=True, exist_ok=True)
        if not font.exists():
            shutil.copy(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", font)
    import ultralytics

    logging.getLogger("ultralytics").setLevel(logging.WARNING)
    return ultralytics


def find_yolo_description(model: str) -> Path:
    """Path of a model description that ultralytics ships, by its name.

    Parameters
    ----------
    model : str
        Such as yolov10x.yaml.

    Returns
    -------
    Path
        For families with one file for all sizes that file.

    Raises
    ------
    ValueError
        Another name: weights can only be loaded of networks that are known.
    """
    model = str(model)
    stem, ending = model.removesuffix(".yaml"), model[-5:]
    # A family's file has no size in its name: yolov8n.yaml is described in yolov8.yaml.
    for name in (model, f"{stem[:-1]}.yaml" if stem[-1:] in tuple("nsmblx") else model):
        found = [path for path in shipped_descriptions() if path.name == name]
        if found and ending == ".yaml":
            return found[0]
    known = ", ".join(path.name for path in shipped_descriptions() if path.name.startswith("yolov10"))
    raise ValueError(f"MODEL {model!r} is no description that ultralytics ships, as are {known}")


def shipped_descriptions() -> list[Path]:
    """All model descriptions in ultralytics' package, sorted."""
    # Looked up, not imported: its first import decides where it keeps its settings (see prepare_ultralytics).
    found = find_spec("ultralytics")
    assert found is not None and found.origin is not None, "a requirement of the kit"
    return sorted((Path(found.origin).parent / "cfg/models").rglob("*.yaml"))


@cache
def shipped_cfg(path: Path) -> dict[str, Any] | None:
    """A description's contents, if it is of a detector as _network_scores reads them; otherwise None."""
    import yaml

    cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    return cfg if cfg["head"][-1][2] in ("Detect", "v10Detect") else None


def _yolo_model_yaml(model, width, folder):
    """Write ultralytics' description `model` into a folder, with another width factor if one is given (a slimmer
    network for a CPU). Returns its path; its name says the size."""
    import yaml

    description = yaml.safe_load(find_yolo_description(model).read_text(encoding="utf-8"))
    if width is not None:
        letter = Path(model).stem[-1]
        depth, _, channels = description["scales"][letter]
        description["scales"] = {letter: [depth, float(width), channels]}
    path = Path(folder) / model
    path.write_text(yaml.safe_dump(description), encoding="utf-8")
    return str(path)


# What to do about weights that cannot be used, after the file's name and what is wrong with it.
_REMEDY = "give a detector's file as 03_train_yolo wrote it (attach its output again, or train again)"


def _write_yolo(path, state, metadata):
    """Write tensors + JSON metadata, complete or not at all."""
    write_tensors(path, state, "metadata", metadata)


def read_detector_about(path: str | Path) -> dict[str, Any]:
    """What a detector's weights file says of itself: dict. Raises DamagedFile, FileNotFoundError."""
    with open_tensors(path, "metadata", _REMEDY, whose="a detector's") as (about, _):
        return about | read_settled(path)
