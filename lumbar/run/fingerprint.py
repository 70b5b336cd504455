"""Files, runs and code known by their content.

May use: storage, parameters.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from ..storage import file_digest, read_json
from .parameters import PATH_PARAMETERS


def versions() -> dict[str, str]:
    """Versions of what decides the results: a dict package -> version."""
    return dict(_versions())


@functools.cache
def _versions():
    found = {"python": platform.python_version()}
    for name in (
        "torch",
        "timm",
        "timm_3d",
        "accelerate",
        "spacecutter",
        "ultralytics-opencv-headless",
        "ultralytics",
        "open3d-cpu",
        "open3d",
        "openvino",
        "pydicom",
        "numpy",
        "pandas",
        "papermill",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---- What is in a file or folder ----


# What comes and goes in a folder without being part of its content.
PASSING_FILES = re.compile(r"^\.|\.(cache|lock|tmp)$|\.part(\.\w+)?$")


def files_below(folder: Path) -> list[tuple[str, int]]:
    """(name relative to the folder, size in bytes) of each file below it, in order."""
    found = []
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not PASSING_FILES.search(name))
        for name in files:
            if not PASSING_FILES.search(name):
                path = Path(place, name)
                if path.is_file():
                    found.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    return sorted(found)


def content_digest(path: str | Path) -> tuple[int, str]:
    """(bytes, SHA-256) of an output: of a file, or of a folder's files and their names."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size, file_digest(path)
    files = files_below(path)
    with ThreadPoolExecutor(4) as pool:  # hashing and reading leave Python's lock alone
        digests = pool.map(lambda entry: file_digest(path / entry[0]), files)
        text = "".join(f"{digest} {name}\n" for digest, (name, _) in zip(digests, files, strict=True))
    return sum(size for _, size in files), hashlib.sha256(text.encode()).hexdigest()


def fingerprint(path: str | Path) -> str:
    """A short hash of what a stage reads, which changes when its content does: not when it is copied or moved.

    A file is known by its bytes. Of a folder these count: the bytes of the tables, weights and ensemble.json in it, the
    names of studies and series below *_images, the names and sizes of what lies in the folders among a finished
    stage's outputs (thousands of volumes), and of a finished stage its parameters, inputs and what its manifest says of
    the contents of its outputs. Times, memory and places do not.
    """
    path = Path(path)
    if path.is_file():
        return file_digest(path)[:16]
    if not path.is_dir():
        raise FileNotFoundError(f"input {path} does not exist: run the stage that writes it, or correct the path")
    digest = hashlib.sha256()
    known = sorted(
        p for pattern in ("*.csv", "*.safetensors", "*.settled.json", "ensemble.json") for p in path.glob(pattern)
    )
    for file in known:
        if file.is_file():
            digest.update(f"{file.name} {file_digest(file)}\n".encode())
    for folder in sorted(path.glob("*_images/*/*")):
        digest.update(f"{folder.parent.name}/{folder.name}\n".encode())
    manifest = read_manifest(path) or {"outputs": {}}
    for name in sorted(name for name in manifest["outputs"] if (path / name).is_dir()):
        digest.update(f"{name} {files_below(path / name)}\n".encode())
    if "sha256" in manifest:
        made = {"stage": manifest["stage"], "work": work_of(manifest), "outputs": _lasting(manifest["sha256"])}
        digest.update(json.dumps(made, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _lasting(contents):
    """The contents of outputs without pictures and pages, which no stage reads and which may show times."""
    return {name: value for name, value in contents.items() if PurePath(name).suffix not in (".png", ".html")}


# ---- What makes two runs the same ----

# What may differ between two runs of the same work, besides PATH_PARAMETERS: of these only what they lead to counts.
PARAMETERS_WITHOUT_EFFECT = (
    "OUT",
    "WORKERS",
    "THREADS",
    "DEVICE",
    "PROCESSES",
    "READERS",
    "BATCH_STUDIES",
    "HOURS",
    "RESERVE",
    "TRACKER",
    "SCHEDULER",
    "PRIOR_ONLY",
)


# Parameters that notebooks got when runs without them existed, each with the value at which it changes nothing: such a
# run is the same work. A learning rate of 0, the schedule's own, was written as what it stands for.
SINCE = {"SCHEDULE": "short", "POOLING": "mean", "DROP_PATH": 0.0}
_SCHEDULES_OWN = 0.001


def work_of(known: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for two runs to have done the same: of an identity, of begun.json or a manifest."""
    left_out = (*PARAMETERS_WITHOUT_EFFECT, *PATH_PARAMETERS)
    given = {name: value for name, value in known["parameters"].items() if name not in left_out}
    if given.get("SCHEDULE") == "short" and given.get("LEARNING_RATE") == 0:
        given["LEARNING_RATE"] = _SCHEDULES_OWN
    parameters = {name: value for name, value in given.items() if name not in SINCE or value != SINCE[name]}
    return {"parameters": parameters, "inputs": known["inputs"]}


def code_fingerprint() -> str:
    """A short hash of the kit's modules, to tell results of an older version."""
    digest = hashlib.sha256()
    kit = Path(__file__).parents[1]
    for module in sorted(path for ending in ("py", "js", "css") for path in kit.rglob(f"*.{ending}")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:12]


def is_below(name: str) -> bool:
    """True for a path that leads from a folder to something in it."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


IDENTITY_FIELDS = {"parameters": dict, "inputs": dict}
MANIFEST_FIELDS = IDENTITY_FIELDS | {
    "stage": str,
    "outputs": dict,
    "seconds": (int, float),
    "versions": dict,
    "code": str,
    "scores": dict,
    "counts": dict,
    "finished": str,
}


# What 00_phantom's manifest lists in runs of the time when paths counted.
_OLD_OUTPUTS = ("../data/train.csv", "../data/train_images", "../data/test_images")


def read_identity(path: Path, expected: Mapping[str, Any] = IDENTITY_FIELDS) -> dict[str, Any] | None:
    """begun.json or manifest.json; None where there is none. Raises ValueError, naming the file, if it is not ours."""
    if not path.exists() and not path.is_symlink():
        return None
    try:
        known = read_json(path, "")
    except FileNotFoundError:
        raise ValueError(f"{path} is damaged (it is no file)") from None
    for key, kind in expected.items():
        if not isinstance(known.get(key), kind) or isinstance(known[key], bool):
            raise ValueError(f"{path} is damaged or not of this kit ({key!r} is missing or of the wrong type)")
    if not all(isinstance(value, (str, list)) for value in known["inputs"].values()):
        raise ValueError(f"{path} is damaged or not of this kit (its inputs are no fingerprints)")
    if expected is MANIFEST_FIELDS:
        if not all(type(size) is int for size in known["outputs"].values()):
            raise ValueError(f"{path} is damaged or not of this kit (the sizes of its outputs are no numbers)")
        outside = [name for name in known["outputs"] if not is_below(name) and name not in _OLD_OUTPUTS]
        if outside:
            raise ValueError(f"{path} lists outputs outside its folder: {', '.join(outside[:3])}")
        sums = known.get("sha256", {})
        if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
            raise ValueError(f"{path} is damaged or not of this kit ('sha256' is of the wrong type)")
    return known


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a finished stage's folder, a dict; None where there is none.

    One that is damaged, foreign, or lists outputs outside the folder counts as none, and a line says so.
    """
    try:
        return read_identity(Path(folder) / "manifest.json", MANIFEST_FIELDS)
    except ValueError as error:
        print(f"{error}: it does not count, and its stage is done again")
        return None
