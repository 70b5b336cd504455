"""Tissue grids: signed distances painted into soft labels. Grid arrays are indexed (x, y, z).

May use: nothing of the kit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

TISSUES = (
    "air",
    "fat",
    "muscle",
    "csf",
    "cord",
    "root",
    "cortex",
    "marrow",
    "annulus",
    "nucleus",
    "flavum",
    "blood",
    "vein",
    "fluid",
    "liver",
    "kidney",
    "bowel",
    "skin",
    "fatty_marrow",
    "fascia",
    # Only in anatomies of wide variety; appended, so that the indices above stay.
    "red_marrow",
    "oedema",
    "sclerosis",
    "haemangioma",
    "lesion",
    "extruded",
    "slow_blood",
    "vessel_wall",
    "uterus",
    "stool",
    "scar",
    "metal",
    "metal_rim",
)
STANDARD_TISSUES = 20  # how many of them the standard variety uses
TISSUE = {name: i for i, name in enumerate(TISSUES)}


@dataclass
class TissueGrid:
    """Soft labels on a regular grid in LPS, arrays indexed (x, y, z).

    A voxel holds two tissues: `under` with weight 1 - share/255 and `over` with share/255."""

    origin_mm: np.ndarray
    step_mm: np.ndarray
    under: np.ndarray  # uint8
    over: np.ndarray  # uint8
    share: np.ndarray  # uint8
    keep: np.ndarray | None = None  # bool: voxels that nothing may overwrite now

    @classmethod
    def empty(cls, low_mm: ArrayLike, high_mm: ArrayLike, step_mm: ArrayLike, tissue: str = "air") -> TissueGrid:
        step = np.asarray(step_mm, float)
        shape = tuple(int(k) for k in np.ceil((np.asarray(high_mm) - low_mm) / step) + 1)
        t = TISSUE[tissue]
        return cls(
            np.asarray(low_mm, float),
            step,
            np.full(shape, t, np.uint8),
            np.full(shape, t, np.uint8),
            np.zeros(shape, np.uint8),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.under.shape

    @property
    def affine(self) -> np.ndarray:
        """(4, 4): index (i, j, k, 1) -> LPS mm."""
        a = np.diag([*self.step_mm, 1.0])
        a[:3, 3] = self.origin_mm
        return a

    def axis_mm(self, k: int) -> np.ndarray:
        return (self.origin_mm[k] + self.step_mm[k] * np.arange(self.shape[k])).astype(np.float32)

    def box(self, low_mm: ArrayLike, high_mm: ArrayLike) -> tuple[slice, ...] | None:
        """Index slices of the box (clipped to the grid), or None when it is outside."""
        lo = np.floor((np.asarray(low_mm) - self.origin_mm) / self.step_mm).astype(int)
        hi = np.ceil((np.asarray(high_mm) - self.origin_mm) / self.step_mm).astype(int) + 1
        lo, hi = np.maximum(lo, 0), np.minimum(hi, self.shape)
        if (hi <= lo).any():
            return None
        return tuple(slice(int(a), int(b)) for a, b in zip(lo, hi))

    def coordinates(self, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Open coordinate arrays (nx,1,1), (1,ny,1), (1,1,nz) of a box in LPS mm."""
        x, y, z = (self.axis_mm(k)[box[k]] for k in range(3))
        return x[:, None, None], y[None, :, None], z[None, None, :]

    def lay(
        self, box: Any, distance_mm: np.ndarray, tissue: str, edge_mm: float | None = None, strength: Any = 1.0
    ) -> None:
        """Paint a tissue where the signed distance is negative, with an edge as wide as a voxel.

        box: slices (or any index) into the arrays; distance_mm must have that index's shape."""
        edge = np.float32(edge_mm or float(self.step_mm.mean()) * 1.15)
        touched = distance_mm < edge / 2
        near = distance_mm[touched]
        if near.size:
            near *= -1 / edge
            near += 0.5
            self._write(box, touched, np.minimum(near, 1) * np.float32(255 * strength), tissue)

    def blend(self, box: Any, alpha: np.ndarray, tissue: str) -> None:
        """Paint a tissue with weights alpha (0..1)."""
        touched = alpha > 0.004
        self._write(box, touched, alpha[touched] * np.float32(255), tissue)

    def _write(self, box, touched, weight, tissue):
        """Two tissues a voxel: the weaker of an edge's old pair is lost."""
        if not weight.size:
            return
        t = TISSUE[tissue]
        a = (weight + np.float32(0.5)).astype(np.uint8)
        if isinstance(box[0], slice):
            under, over, share = self.under[box], self.over[box], self.share[box]
            where = touched
        else:  # broadcast index arrays: pick the flat list
            under, over, share = self.under, self.over, self.share
            where = tuple(np.broadcast_to(b, touched.shape)[touched] for b in box)
        if self.keep is not None:
            free = ~(self.keep[box] if isinstance(box[0], slice) else self.keep)[where]
            a = a[free]
            where = tuple(k[free] for k in (np.nonzero(where) if isinstance(where, np.ndarray) else where))
        u, o, w = under[where], over[where], share[where]
        grow = (o == t) & (w > 0)  # a second piece of the same tissue: union
        u = np.where((w > 127) & ~grow, o, u)
        under[where], over[where] = u, t
        share[where] = np.where(grow, np.maximum(w, a), a)


def local_coordinates(
    grid: TissueGrid, box: tuple[slice, ...], centre: np.ndarray, frame: np.ndarray
) -> list[np.ndarray]:
    """Coordinates of a box's voxels in a frame: three float32 arrays (nx, ny, nz)."""
    x, y, z = grid.coordinates(box)
    x, y, z = x - np.float32(centre[0]), y - np.float32(centre[1]), z - np.float32(centre[2])
    f = frame.astype(np.float32)
    return [x * f[0, k] + y * f[1, k] + z * f[2, k] for k in range(3)]


def smooth_min(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """The smaller of two distances; where they differ by less than k the step from one to the other is rounded."""
    h = np.clip(0.5 + 0.5 * (b - a) / k, 0, 1)
    return b + (a - b) * h - k * h * (1 - h)


def oriented_bounds(centre: np.ndarray, frame: np.ndarray, half: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Axis-aligned box around an oriented box with half-sizes `half`."""
    r = np.abs(frame) @ np.asarray(half, float)
    return centre - r, centre + r


class Noise:
    """A periodic block of smooth noise that any grid can index: texture without memory."""

    def __init__(self, seed: int, size: int = 80):
        white = np.random.default_rng(seed).standard_normal((size,) * 3).astype(np.float32)
        fine = ndimage.gaussian_filter(white, 1.0, mode="wrap")
        self.fine = fine / fine.std()
        coarse = ndimage.gaussian_filter(white, 2.2, mode="wrap")
        self.coarse = coarse / coarse.std()
        # Muscle: fine grains on longer strands.
        self.fibre = 0.75 * self.fine + 0.7 * self.coarse
        self.size = size

    def __call__(self, grid, box, voxel_mm, which="fine"):
        """Noise at a box's voxels; voxel_mm (3,) is the size of a noise voxel (stretch)."""
        i, j = (np.round(grid.axis_mm(k)[box[k]] / voxel_mm[k]).astype(int) % self.size for k in (0, 1))
        z = grid.axis_mm(2)[box[2]] / np.float32(voxel_mm[2])  # the stretched axis: interpolate
        k = np.floor(z).astype(int)
        block = getattr(self, which)
        low, high = block[:, :, k % self.size], block[:, :, (k + 1) % self.size]
        return (low + (high - low) * (z - k).astype(np.float32))[np.ix_(i, j)]


def paint_tube(
    grid: TissueGrid,
    p: ArrayLike,
    q: ArrayLike,
    radius: float,
    tissue: str,
    limit_mm: np.ndarray | None = None,
    gas: float | None = None,
    strength: float = 1.0,
) -> None:
    """A thick line from p to q (LPS mm). limit_mm: signed distance of the grid to a wall it must not
    cross; gas: share of the radius that fluid leaves to the gas above it (the patient lies on the
    back), None for no gas."""
    p, q = np.asarray(p, float), np.asarray(q, float)
    box = grid.box(np.minimum(p, q) - radius - 2, np.maximum(p, q) + radius + 2)
    if box is None:
        return
    points = grid.coordinates(box)
    d = capsule_distance(points, p, q, radius)
    if limit_mm is not None:
        d = np.maximum(d, limit_mm[box] + 2)
    grid.lay(box, d.copy(), tissue, strength=strength)
    if gas is not None:
        level = np.float32((p[1] + q[1]) / 2 + (2 * gas - 1) * radius)
        grid.lay(box, np.maximum(d, points[1] - level), "air")


def capsule_distance(
    points: Sequence[np.ndarray],
    p: Sequence[Any] | np.ndarray,
    q: Sequence[Any] | np.ndarray,
    radius: float,
    scale: Sequence[float] = (1, 1, 1),
    turn: float = 0.0,
) -> np.ndarray:
    """Signed distance to a thick line from p to q in local coordinates, stretched by scale along
    axes that are turned about z by `turn` radians."""
    x, y, z = points
    if turn:
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        x, y = c * x + s * y, c * y - s * x
        p, q = ((c * k[0] + s * k[1], c * k[1] - s * k[0], k[2]) for k in (p, q))
    sx, sy, sz = scale
    d = np.array([(q[0] - p[0]) / sx, (q[1] - p[1]) / sy, (q[2] - p[2]) / sz], np.float32)
    ax, ay, az = (x - p[0]) / sx, (y - p[1]) / sy, (z - p[2]) / sz
    t = np.clip((ax * d[0] + ay * d[1] + az * d[2]) / max(float(d @ d), 1e-6), 0, 1)
    return (
        np.sqrt((ax - t * d[0]) ** 2 + (ay - t * d[1]) ** 2 + (az - t * d[2]) ** 2) - np.float32(radius)
    ) * np.float32(min(scale))


def rounded_radius(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Radius whose unit line lies between a circle and a square."""
    p, q = p * p, q * q
    r = np.sqrt(p + q)
    r += np.sqrt(np.sqrt(p * p + q * q))
    r *= np.float32(0.5)
    return r
