"""Vertebrae from SpineNet's official package, for those who may use it.

May use: vertebra, data.
"""

import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..data.source import Source
from ..data.volume import Volume
from .vertebra import _CHAIN, UNCERTAIN, Vertebra, upright

# Package and weights (Windsor, Jamaludin, Kadir, Zisserman) may be used for research only and pin old versions of
# Python and torch, so nothing here needs them: the import happens where a user asks for the official detector. It is
# the package that reads its weights, which are pickles; the kit opens none of its files.

# Where our CORNERS (anterior-superior, posterior-superior, posterior-inferior, anterior-inferior) are in its polygons
# (right-top, right-bottom, left-bottom, left-top), in an image whose columns run to the back.
_POLYGON_ORDER = (3, 0, 1, 2)
_DETECTOR_WEIGHTS = "detect-vfr"  # a folder in its folder of weights
_DEPTH = 4  # folders below the one given in which package and weights are looked for
_REMEDY = (
    "it is on GitHub (rwindsor1/SpineNet) with its weights, for research only, and pip does not install it: name the "
    "folder that has both as SPINENET_DIR (a parameter of 02_train_spinenet, an environment variable elsewhere; on "
    'Kaggle attach it as a data set), or use DETECTOR = "own"'
)


def _attached() -> Path | None:
    """The input attached on Kaggle that has the package; None where none does."""
    inputs = Path(os.environ.get("KAGGLE_INPUT_DIR", "/kaggle/input"))
    places = [place for depth in ("datasets/*/*", "*") for place in sorted(inputs.glob(depth))]
    return next((place for place in places if _package_below(place) is not None), None)


def _folders_below(place: Path) -> Iterator[Path]:
    """A folder and those below it down to _DEPTH, nearest first, without those that hold thousands of images."""
    level = [place] if place.is_dir() else []
    for depth in range(_DEPTH + 1):
        yield from level
        if depth < _DEPTH:
            level = [below for folder in level for below in sorted(folder.iterdir()) if _may_hold_code(below)]


def _may_hold_code(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and not path.name.endswith("_images")


def _package_below(place: Path) -> Path | None:
    """The package's own folder, with __init__.py and main.py: the place itself or one below it."""
    for folder in _folders_below(place):
        if (folder / "__init__.py").is_file() and (folder / "main.py").is_file() and (folder / "models").is_dir():
            return folder
    return None


def _package(place: str | Path) -> ModuleType:
    """The package from a folder, "" for wherever it is. Raises ImportError."""
    if place:
        return _import_package(Path(place))
    try:
        import spinenet

        return spinenet
    except ModuleNotFoundError as error:
        attached = _attached() if error.name in (None, "spinenet") else None
        if attached is None:
            raise
        return _import_package(attached)


def _import_package(place: Path) -> ModuleType:
    """The package `spinenet` from a folder, under its own name, without touching sys.path.

    It reads its weights from beside its code. Where they lie elsewhere below the place, a temporary folder of links
    brings the two together.
    Raises ImportError.
    """
    package = _package_below(place)
    if package is None:
        raise ImportError(f"there is no package spinenet in {place}")
    if not (package / "weights" / _DETECTOR_WEIGHTS).is_dir():
        weights = [folder.parent for folder in _folders_below(place) if folder.name == _DETECTOR_WEIGHTS]
        if weights:
            package = _with_weights(package, weights[0])
    spec = importlib.util.spec_from_file_location(
        "spinenet", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec and spec.loader  # of a file that is there
    module = importlib.util.module_from_spec(spec)
    _forget()
    sys.modules["spinenet"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        _forget()
        raise
    return module


def _forget() -> None:
    """Take the package and its modules out of those that Python knows."""
    for name in [name for name in sys.modules if name == "spinenet" or name.startswith("spinenet.")]:
        del sys.modules[name]


_together: list[tempfile.TemporaryDirectory] = []  # until the process ends: the package reads its weights later


def _with_weights(package: Path, weights: Path) -> Path:
    """A temporary folder with links to a package's files and to its weights."""
    folder = tempfile.TemporaryDirectory(prefix="spinenet_")
    _together.append(folder)
    together = Path(folder.name)
    for path in package.iterdir():
        if path.name not in ("weights", "__pycache__"):
            (together / path.name).symlink_to(path.resolve())
    (together / "weights").symlink_to(weights.resolve(), target_is_directory=True)
    return together


def load_official_spinenet(device: str = "cpu", folder: str | Path | None = None) -> Any:
    """Load SpineNet's official package with its own weights.

    Parameters
    ----------
    device : str
    folder : path, optional
        With the package and its weights, at most four folders down. Default: what the environment variable
        SPINENET_DIR names, else the package as Python finds it, else an input attached on Kaggle that has it.

    Returns
    -------
    spinenet.SpineNet
        For detect_vertebrae_official.

    Raises
    ------
    ImportError
        There is no package, or what it needs itself is missing.
    FileNotFoundError
        Its weights are missing. Both messages say what to do.
    """
    try:
        package = _package(folder or os.environ.get("SPINENET_DIR", ""))
    except ImportError as error:
        raise ImportError(f"the official SpineNet cannot be imported ({error}): {_REMEDY}") from None
    try:
        return package.SpineNet(device=device, verbose=False)
    except (FileNotFoundError, NameError) as error:  # a NameError is how the package says that a folder is empty
        raise FileNotFoundError(
            f"the official SpineNet lacks its weights ({error}): call spinenet.download_weights() once, online; "
            f"{_REMEDY}"
        ) from None


def official_detector(device: str = "cpu") -> Callable[[Volume], list[Vertebra]]:
    """The official detector as a function volume -> Vertebrae, which locate_levels takes; loads it once."""
    detector, lock = load_official_spinenet(device), threading.Lock()

    def detect(volume: Volume) -> list[Vertebra]:
        with lock:  # nothing says that the package is safe in threads
            return detect_vertebrae_official(volume, detector)

    return detect


def check_official(detect: Callable[[Volume], list[Vertebra]]) -> None:
    """Let a detector search a small volume of noise: what a package cannot do with the versions that are here raises
    now, and not in every study. What else it makes of noise is its own."""
    noise = np.random.default_rng(0).random((4, 160, 160), dtype=np.float32)
    affine = np.array([[4.0, 0, 0, 0], [0, 0, 1.6, 0], [0, -1.6, 0, 0], [0, 0, 0, 1]])
    with suppress(AssertionError, LookupError, ValueError, ArithmeticError):
        detect(Volume(noise, affine, 0, 0, "Sagittal T2/STIR", 0, np.arange(1, 5)))


def detect_vertebrae_official(volume: Volume, detector: Any = None) -> list[Vertebra]:
    """Find and name the vertebral bodies of one sagittal volume with the official package.

    volume: sagittal Volume; detector: from load_official_spinenet (default: load it), anything with
    detect_vb(volume (h, w, slices), pixel_spacing in mm, a float) -> list of dicts predicted_label, slice_nos (from 0),
    average_polygon (4, 2) as (x, y) = (column, row), right-top, right-bottom, left-bottom, left-top.
    It cuts square patches of 260 mm / pixel_spacing, so it gets the mean of the two, whatever its documentation says.
    Returns Vertebrae from head to foot; name: its label, "uncertain" for one that no lumbar study can show or that
    a surer body has; confidence: 1 for a body seen over 25 mm from side to side, less for fewer slices; source:
    official. Where the package finds nothing it stops with an error: that is an empty list here.
    Raises ValueError for a volume that is not sagittal, ImportError without the package.
    """
    if volume.plane != "sagittal":
        raise ValueError(f"study {volume.study_id}, series {volume.series_id}: {volume.plane}, not sagittal slices")
    detector = detector if detector is not None else load_official_spinenet()
    array, affine = upright(volume)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    stack = np.ascontiguousarray(array.transpose(1, 2, 0), dtype=np.float32)
    try:
        found = detector.detect_vb(stack - stack.min(), float(spacing_mm[1:].mean()))
    except (IndexError, KeyError, ZeroDivisionError, ValueError, RuntimeError) as error:
        # Where it finds nothing it takes the first of an empty list, or stacks one; all else is a failure.
        if isinstance(error, (ValueError, RuntimeError)) and not any(
            word in str(error) for word in ("empty", "at least one", "zero-size")
        ):
            raise
        name = f"study {volume.study_id}, series {volume.series_id}"
        print(f"{name}: the official detector stopped ({type(error).__name__}: {error}): no vertebrae there")
        return []
    vertebrae = []
    for body in found or []:
        polygon = np.asarray(body["average_polygon"], np.float64)
        slices = np.asarray(body["slice_nos"], np.float64)
        if polygon.shape != (4, 2) or not np.isfinite(polygon).all() or not len(slices):
            continue
        x_y = polygon[list(_POLYGON_ORDER)]
        ijk = np.column_stack([np.full(4, (slices.min() + slices.max()) / 2), x_y[:, 1], x_y[:, 0]])
        name = str(body["predicted_label"])
        vertebrae.append(
            Vertebra(
                ijk @ affine[:3, :3].T + affine[:3, 3],
                float((slices.max() - slices.min() + 1) * spacing_mm[0]),
                float(min(1.0, len(slices) * spacing_mm[0] / 25.0)),
                name if name in _CHAIN else UNCERTAIN,
                Source.OFFICIAL,
            )
        )
    surest: dict[str, Vertebra] = {}
    for vertebra in sorted(vertebrae, key=lambda v: -v.confidence):
        if surest.setdefault(vertebra.name, vertebra) is not vertebra:
            vertebra.name = UNCERTAIN
    return sorted(vertebrae, key=lambda v: -v.center_lps_mm[2])
