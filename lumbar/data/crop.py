"""What is cut out of a study for a 3D network: the shape, size and place of a crop, in one order of axes.

May use: nothing of the kit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Stated beside a crop in a weights file. Older files lack it: they have extent and shift along head, left, back.
CROP_AXES = "head-foot, front-back, right-left"


@dataclass(frozen=True)
class Crop:
    """The grid that a 3D network sees: of one level, around its disc, or of a whole study.

    All three triples have the order of the crop's own axes: head to foot, front to back, right to left (of the
    patient).

    Parameters
    ----------
    scope : {"level", "study"}
    shape : tuple of 3 int
        Voxels.
    extent_mm : tuple of 3 float
        Size, in millimetres.
    shift_mm : tuple of 3 float
        From the disc's centre to the crop's, in millimetres: towards foot, back and left. Of a whole study it is 0,
        because its grid lies around the sagittal series.

    Raises
    ------
    ValueError
        For another scope, triples of other lengths, and a whole study with a shift.

    Examples
    --------
    >>> Crop.full_size("level", extent_mm=(40, 64, 48))
    Crop(scope='level', shape=(128, 128, 128), extent_mm=(40.0, 64.0, 48.0), shift_mm=(0.0, 14.0, 0.0))
    """

    scope: str
    shape: tuple[int, int, int]
    extent_mm: tuple[float, float, float]
    shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.scope not in ("level", "study"):
            raise ValueError(f"SCOPE must be level or study, not {self.scope!r}")
        for name, kind in (("shape", int), ("extent_mm", float), ("shift_mm", float)):
            object.__setattr__(self, name, tuple(kind(value) for value in _three(getattr(self, name), name.upper())))
        if self.scope == "study" and any(self.shift_mm):
            raise ValueError("SHIFT_MM is for SCOPE level: the grid of a whole study lies around its sagittal series")

    @classmethod
    def full_size(
        cls, scope: str, shape: Sequence[int] = (), extent_mm: Sequence[float] = (), shift_mm: Sequence[float] = ()
    ) -> Crop:
        """The crop for the competition's data; what is given, and not empty, replaces its part."""
        if scope not in FULL_SIZE:
            raise ValueError(f"SCOPE must be {' or '.join(FULL_SIZE)}, not {scope!r}")
        full = FULL_SIZE[scope]
        return cls(
            scope,
            _three(shape or full.shape, "SHAPE"),
            _three(extent_mm or full.extent_mm, "EXTENT_MM"),
            _three(shift_mm or full.shift_mm, "SHIFT_MM"),
        )

    def resized(self, shape: Sequence[int]) -> Crop:
        """A crop of another shape with voxels of the same size, around the same place."""
        extent_mm = [extent * (new / old) for extent, new, old in zip(self.extent_mm, shape, self.shape, strict=True)]
        return replace(self, shape=_three(shape, "SHAPE"), extent_mm=_three(extent_mm, "EXTENT_MM"))

    def to_json(self) -> dict[str, Any]:
        """What from_json reads, as plain values."""
        triples = {name: list(getattr(self, name)) for name in ("shape", "extent_mm", "shift_mm")}
        return {"scope": self.scope, **triples, "axes": CROP_AXES}

    @classmethod
    def from_json(cls, stated: Mapping[str, Any]) -> Crop:
        """The crop that a weights file states, also an older one that names no axes."""
        extent_mm, shift_mm = stated["extent_mm"], stated["shift_mm"]
        if "axes" not in stated:
            extent_mm = [extent_mm[k] for k in (0, 2, 1)]
            shift_mm = [-shift_mm[0], shift_mm[2], shift_mm[1]]  # it was towards the head
        if stated["scope"] == "study":
            shift_mm = (0.0, 0.0, 0.0)  # older files state one, which was never used
        return cls(stated["scope"], tuple(stated["shape"]), tuple(extent_mm), tuple(shift_mm))


def _three(values: Sequence[Any], name: str) -> tuple[Any, Any, Any]:
    if len(values) != 3:
        raise ValueError(f"{name} must have three numbers (head-foot, front-back, right-left), not {list(values)}")
    return tuple(values)


FULL_SIZE = {
    # Canal and foramina lie behind the disc.
    "level": Crop("level", (128, 128, 128), (48.0, 72.0, 72.0), (0.0, 14.0, 0.0)),
    "study": Crop("study", (256, 256, 256), (256.0, 160.0, 128.0)),
}
