"""Vertebrae from SpineNet's official package, for those who may use it.

May use: vertebra, data.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..data.source import Source
from ..data.volume import Volume
from .vertebra import _CHAIN, UNCERTAIN, Vertebra, upright

# Package and weights (Windsor, Jamaludin, Kadir, Zisserman) may be used for research only and pin old versions of
# Python and torch, so nothing here needs them: the import happens where a user asks for the official detector.

# Where our CORNERS (anterior-superior, posterior-superior, posterior-inferior, anterior-inferior) are in its polygons
# (right-top, right-bottom, left-bottom, left-top), in an image whose columns run to the back.
_POLYGON_ORDER = (3, 0, 1, 2)


def load_official_spinenet(device: str = "cpu") -> Any:
    """Load SpineNet's official package with its own weights.

    Parameters
    ----------
    device : str

    Returns
    -------
    spinenet.SpineNet
        For detect_vertebrae_official.

    Raises
    ------
    ImportError
        The package is not installed.
    FileNotFoundError
        Its weights are missing. Both messages say what to do.
    """
    try:
        import spinenet
    except ImportError as error:
        raise ImportError(
            "the official SpineNet is not installed: it is on GitHub (rwindsor1/SpineNet) with its weights, for "
            'research only; install it with pip install --no-deps, or use detector="own" with the weights that '
            f"02_train_spinenet writes ({error})"
        ) from None
    try:
        return spinenet.SpineNet(device=device, verbose=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the official SpineNet lacks its weights: call spinenet.download_weights() once, online ({error})"
        ) from None


def official_detector(device: str = "cpu") -> Callable[[Volume], list[Vertebra]]:
    """The official detector as a function volume -> Vertebrae, which locate_levels takes; loads it once."""
    detector = load_official_spinenet(device)
    return lambda volume: detect_vertebrae_official(volume, detector)


def detect_vertebrae_official(volume: Volume, detector: Any = None) -> list[Vertebra]:
    """Find and name the vertebral bodies of one sagittal volume with the official package.

    volume: sagittal Volume; detector: from load_official_spinenet (default: load it), anything with
    detect_vb(volume (h, w, slices), pixel_spacing (2,) in mm) -> list of dicts predicted_label, slice_nos (from 0),
    average_polygon (4, 2) as (x, y) = (column, row), right-top, right-bottom, left-bottom, left-top.
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
        found = detector.detect_vb(stack - stack.min(), [float(spacing_mm[1]), float(spacing_mm[2])])
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
