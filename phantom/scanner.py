"""Where the slices of a study lie, and how they are acquired: slice profile, coil, noise.

Images are indexed (slice, row, column).

May use: contrast, anatomy, grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from .anatomy import Anatomy, turned_frame
from .contrast import contrast_table, render
from .grid import TissueGrid


@dataclass
class SeriesPlan:
    """Geometry of one series. Slices in file order."""

    description: str
    contrast: str
    position_mm: np.ndarray  # (n, 3) LPS of the first pixel's centre
    row_cosine: np.ndarray  # (n, 3) direction of increasing column
    column_cosine: np.ndarray  # (n, 3) direction of increasing row
    spacing_mm: tuple  # (between rows, between columns)
    shape: tuple  # (rows, columns)
    thickness_mm: float
    gap_mm: float  # distance between slice centres
    instances: np.ndarray
    series_id: int = 0

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.row_cosine, self.column_cosine)

    def project(self, point_mm: ArrayLike) -> tuple[int, float, float, float]:
        """LPS point -> (slice index, x px, y px, distance to that slice in mm)."""
        away = np.einsum("nk,nk->n", point_mm - self.position_mm, self.normal)
        x = np.einsum("nk,nk->n", point_mm - self.position_mm, self.row_cosine) / self.spacing_mm[1]
        y = np.einsum("nk,nk->n", point_mm - self.position_mm, self.column_cosine) / self.spacing_mm[0]
        inside = (x > 2) & (x < self.shape[1] - 3) & (y > 2) & (y < self.shape[0] - 3)
        k = int(np.argmin(np.abs(away) + 1e6 * ~inside))
        return k, float(x[k]), float(y[k]), float(abs(away[k]) if inside[k] else np.inf)


def _instances(rng, n, anomalies):
    """Mostly 1..n; some start elsewhere or have gaps."""
    start, numbers = 1, np.arange(n)
    if anomalies and rng.random() < 0.06:
        start = int(rng.integers(2, 40))
    if anomalies and rng.random() < 0.04:
        numbers = np.sort(rng.choice(int(n * 1.6), n, replace=False))
    if anomalies and rng.random() < 0.004:
        numbers = np.sort(rng.choice(5000, n, replace=False))
    return start + numbers


def _plan(description, contrast, centres, rows_dir, cols_dir, spacing, shape, thickness, gap, instances):
    """Slices given by their middle points."""
    ext = np.array([(shape[1] - 1) / 2 * spacing[1], (shape[0] - 1) / 2 * spacing[0]])
    position = centres - rows_dir * ext[0] - cols_dir * ext[1]
    return SeriesPlan(
        description, contrast, position, rows_dir, cols_dir, tuple(spacing), tuple(shape), thickness, gap, instances
    )


def sample_protocol(rng: np.random.Generator, anatomy: Anatomy, anomalies: str = "real") -> list:
    """Draw the series of a study as SeriesPlans (without series ids)."""
    a, odd = anatomy, anomalies == "real"
    plans = []
    middle = a.canal_to_lps(0.0, 0.0, a.disc_s_mm[2])
    lean = np.radians(rng.normal(0, 1.5, 2))
    gap = float(np.clip(rng.normal(4.4, 0.35), 3.3, 5.5))
    count = int(np.clip(np.round(rng.normal(17, 2.2)), 11, 27))
    fov = rng.uniform(260, 320)
    centre = middle + [rng.normal(0, 2), rng.normal(-12, 8), rng.normal(2, 9)]
    if a.wide:  # more or fewer bodies in the picture
        own = np.random.default_rng((a.seed, 15))
        fov *= own.uniform(0.75, 1.12)
        centre = centre + own.normal(0, 1, 3) * (2, 8, 10)
    for description in ("Sagittal T1", "Sagittal T2/STIR"):
        if odd and rng.random() < (0.001 if "T1" in description else 0.0005):
            continue
        contrast = "T1" if "T1" in description else ("STIR" if rng.random() < 0.12 else "T2")
        size = int(rng.choice([256, 288, 320, 352, 384, 448], p=[0.2, 0.12, 0.34, 0.12, 0.17, 0.05]))
        shape = (size, size)
        if rng.random() < 0.136:
            shape = (size, int(size * rng.choice([0.75, 0.8125, 0.875])))
        across = np.array([np.cos(lean[1]), 0, np.sin(lean[1])])
        row = np.array([lean[0], 1, 0.0])
        row = row - across * (row @ across)
        row = row / np.linalg.norm(row)
        col = np.cross(across, row)  # completes the frame ...
        col = -col if col[2] > 0 else col  # ... pointing to the feet
        n = count + int(rng.integers(-1, 2))
        offsets = (np.arange(n) - (n - 1) / 2) * gap + rng.normal(0, 0.5)
        left_first = rng.random() < (0.36 if "T1" in description else 0.25)
        if left_first:
            offsets = offsets[::-1]
        centres = centre + offsets[:, None] * across
        spacing = (fov / size, fov / size)
        plans.append(
            _plan(
                description,
                contrast,
                centres,
                np.tile(row, (n, 1)),
                np.tile(col, (n, 1)),
                spacing,
                shape,
                round(gap - rng.choice([0, 0.4, 0.4, 0.8]), 2),
                gap,
                _instances(rng, n, odd),
            )
        )
    # Axial: one oblique pack, or a block per disc.
    number = int(rng.choice([1, 2, 3], p=[0.83, 0.155, 0.015])) if odd else 1
    tilted = rng.random() < 0.45
    levels = [list(range(5))]
    if number == 2:
        levels = [[0, 1, 2], [3, 4]] if rng.random() < 0.5 else [list(range(5))] * 2
    if number == 3:
        levels = [[0, 1], [2, 3], [4]]
    for group in levels:
        plans.append(_axial(rng, a, group, tilted, odd))
    return plans


def _axial(rng, a, group, tilted, odd):
    size = int(rng.choice([256, 288, 320], p=[0.45, 0.2, 0.35]))
    fov = rng.uniform(170, 215)
    thickness = float(rng.choice([3.5, 4.0, 4.0, 4.0, 4.5]))
    gap = round(thickness * rng.choice([1.0, 1.1, 1.1, 1.2]), 2)
    slack = np.radians(rng.normal(0, 2, 2))
    centres, tilts = [], []
    if tilted:
        for level in group:
            n = int(rng.integers(4, 8))
            d = a.disc(level)
            f = d.frame @ turned_frame(slack[0] * 0.6 + np.radians(rng.normal(0, 2)), slack[1], 0)
            at = a.canal_to_lps(0.0, -6.0, a.disc_s_mm[level])
            for offset in ((n - 1) / 2 - np.arange(n)) * gap:
                centres.append(at + f[:, 2] * offset)
                tilts.append(f)
    else:
        top, bottom = a.disc(group[0]).centre_mm, a.disc(group[-1]).centre_mm
        f = turned_frame(np.radians(rng.normal(5, 4)) + slack[0], slack[1], 0)
        length = (top - bottom) @ f[:, 2] + rng.uniform(14, 30)
        n = int(np.clip(np.round(length / gap) + 1, 6, 44))
        mid = (a.canal_to_lps(0.0, -6.0, a.disc_s_mm[group[0]]) + a.canal_to_lps(0.0, -6.0, a.disc_s_mm[group[-1]])) / 2
        for offset in ((n - 1) / 2 - np.arange(n)) * gap:
            centres.append(mid + f[:, 2] * offset)
            tilts.append(f)
    centres, tilts = np.array(centres), np.array(tilts)
    row = tilts[:, :, 0]
    # Columns point to the back; rows to the left: normals point to the head.
    col = tilts[:, :, 1]
    spacing = (fov / size, fov / size)
    instances = _instances(rng, len(centres), odd)
    if odd and rng.random() < 0.12:  # caudal first
        centres, row, col = centres[::-1], row[::-1], col[::-1]
    return _plan("Axial T2", "T2", centres, row, col, spacing, (size, size), thickness, gap, instances)


def acquire(
    rng: np.random.Generator,
    grids: Sequence[TissueGrid],
    plan: SeriesPlan,
    images: Sequence[np.ndarray],
    back_mm: float,
    spine_front_mm: np.ndarray,
) -> np.ndarray:
    """Slices (n, rows, columns) float32, brightest anatomy near 1.

    grids: (spine, body) TissueGrids; images: their renderings under the series' contrast;
    back_mm: y of the back's skin, where the coil lies; spine_front_mm: (n, 2) y, z of the bodies'
    front walls from head to tail."""
    n, (rows, cols) = len(plan.position_mm), plan.shape
    out = np.empty((n, rows, cols), np.float32)
    sharp = rng.uniform(0.25, 0.5)  # blur in pixels
    sigma = rng.uniform(0.010, 0.028)
    reach = rng.uniform(90, 200)  # mm, of the surface coil
    tilt = rng.normal(0, 0.08, 3)
    # A saturation band in front of the spine against moving bowel, in most sagittal series.
    band = rng.uniform(0.15, 0.5) if "Sagittal" in plan.description and rng.random() < 0.55 else 1.0
    grain = ndimage.gaussian_filter(rng.standard_normal((rows + 64, cols + 64), dtype=np.float32), 1.3)
    grain *= np.float32(0.03) / grain.std()
    upright = abs(plan.normal[0, 0]) > 0.7
    if not upright:
        images = [np.ascontiguousarray(i.transpose(2, 1, 0)) for i in images]
    gains = {}
    for k in range(n):
        image = _slice(grids, images, upright, plan, k)
        same = (plan.row_cosine[k].tobytes(), plan.column_cosine[k].tobytes())
        if same not in gains:
            gains[same] = _gain(plan, k, back_mm, spine_front_mm, reach, tilt, band)
        gain = gains[same]
        shift = rng.integers(0, 64, 2)
        image *= gain * (1 + grain[shift[0] : shift[0] + rows, shift[1] : shift[1] + cols])
        image = ndimage.gaussian_filter(image, sharp)
        out[k] = image
    # Rician: noise in both channels; the imaginary one borrows the next slice's.
    noise = rng.standard_normal((n + 1, rows, cols), dtype=np.float32)
    noise *= np.float32(sigma)
    for k in range(n):
        out[k] += noise[k]
        np.hypot(out[k], noise[k + 1], out=out[k])
    return out


def _slice(grids, images, upright, plan: SeriesPlan, k):
    """Slice k as the tissue gives it, (rows, columns) float32: the coarse grid, and within it the fine one."""
    spine, body = grids
    rows, cols = plan.shape
    step_c = plan.row_cosine[k] * plan.spacing_mm[1]
    step_r = plan.column_cosine[k] * plan.spacing_mm[0]
    normal = plan.normal[k]
    origin = plan.position_mm[k]
    # The coarse grid needs only every second pixel.
    image = _sample(
        body,
        images[1],
        upright,
        origin - 0.5 * (step_r + step_c),
        normal,
        2 * step_r,
        2 * step_c,
        (rows // 2 + 2, cols // 2 + 2),
        (0.0,),
    )
    image = _double(_double(image).T).T[1 : rows + 1, 1 : cols + 1].copy()
    # Only the part of the slice that the fine grid covers.
    corners = _grid_corners(spine) - origin
    c = corners @ plan.row_cosine[k] / plan.spacing_mm[1]
    r = corners @ plan.column_cosine[k] / plan.spacing_mm[0]
    c0, c1 = max(0, int(c.min())), min(cols, int(c.max()) + 2)
    r0, r1 = max(0, int(r.min())), min(rows, int(r.max()) + 2)
    if c1 > c0 and r1 > r0:
        start = origin + c0 * step_c + r0 * step_r
        part = _sample(
            spine,
            images[0],
            upright,
            start,
            normal,
            step_r,
            step_c,
            (r1 - r0, c1 - c0),
            (-0.25 * plan.thickness_mm, 0.25 * plan.thickness_mm),
        )
        w = _coverage(spine, start, step_r, step_c, (r1 - r0, c1 - c0))
        view = image[r0:r1, c0:c1]
        view += (part - view) * w
    return image


def _gain(plan, k, back_mm, spine_front_mm, reach_mm, tilt, band):
    """Receive sensitivity over slice k (rows, columns): the coil under the back, a slow tilt and
    the saturation band (its remaining signal, 1 = none)."""
    rows, cols = plan.shape
    column = np.arange(cols, dtype=np.float32)[None, :]
    row = np.arange(rows, dtype=np.float32)[:, None]
    step_c = (plan.row_cosine[k] * plan.spacing_mm[1]).astype(np.float32)
    step_r = (plan.column_cosine[k] * plan.spacing_mm[0]).astype(np.float32)
    origin = plan.position_mm[k].astype(np.float32)
    y = origin[1] + step_c[1] * column + step_r[1] * row
    gain = 0.35 + 0.95 * np.exp(-np.maximum(back_mm + 15 - y, 0) / np.float32(reach_mm))
    if band < 1:
        z = origin[2] + step_c[2] * cols / 2 + step_r[2] * row[:, 0]
        front = np.interp(z, spine_front_mm[::-1, 1], spine_front_mm[::-1, 0]).astype(np.float32)[:, None]
        gain = gain * (band + (1 - band) / (1 + np.exp(np.clip((front - 17 - y) / 5, -30, 30))))
    gain = gain * (1 + np.float32(tilt[0]) * (column / cols - 0.5) + np.float32(tilt[1]) * (row / rows - 0.5))
    return gain.astype(np.float32)


def _double(image):
    """Twice as many rows by linear interpolation; sample k lies between new rows 2k and 2k + 1."""
    out = np.empty((2 * len(image), image.shape[1]), np.float32)
    ahead = np.concatenate([image[1:], image[-1:]])
    behind = np.concatenate([image[:1], image[:-1]])
    out[0::2] = 0.75 * image + 0.25 * behind
    out[1::2] = 0.75 * image + 0.25 * ahead
    return out


def _grid_corners(grid):
    hi = grid.origin_mm + grid.step_mm * (np.array(grid.shape) - 1)
    return np.array(
        [
            [x, y, z]
            for x in (grid.origin_mm[0], hi[0])
            for y in (grid.origin_mm[1], hi[1])
            for z in (grid.origin_mm[2], hi[2])
        ]
    )


def _sample(grid, image, upright, origin, normal, step_r, step_c, shape, offsets_mm):
    """Mean over sub-slices of the linear interpolation in a grid, (rows, columns).

    image: the grid's rendering, indexed (x, y, z), or (z, y, x) where upright is False. A slice's
    neighbours then lie together in memory, which is worth a factor of three; for the same reason
    the inner loop runs along rows of an upright (sagittal) slice and along columns otherwise."""
    axes = [0, 1, 2] if upright else [2, 1, 0]
    steps = [normal, step_c, step_r] if upright else [normal, step_r, step_c]
    matrix = (np.stack(steps, 1) / grid.step_mm[:, None])[axes]
    size = (1, shape[1], shape[0]) if upright else (1, *shape)
    total = None
    for offset in offsets_mm:
        start = ((origin + normal * offset - grid.origin_mm) / grid.step_mm)[axes]
        part = ndimage.affine_transform(image, matrix, start, size, np.float32, order=1, mode="constant", cval=0.012)[0]
        total = part if total is None else total + part
    total = total / np.float32(len(offsets_mm))
    return total.T if upright else total


def _coverage(grid, origin, step_r, step_c, shape, ramp=6.0):
    """Weight of the fine grid in a slice: 1 inside, falling to 0 at its faces."""
    w = np.ones(shape, np.float32)
    for k in range(3):
        scale = 1 / (grid.step_mm[k] * ramp)
        across = (step_c[k] * scale * np.arange(shape[1])).astype(np.float32)
        down = ((step_r[k] * np.arange(shape[0]) + origin[k] - grid.origin_mm[k]) * scale).astype(np.float32)
        at = across[None, :] + down[:, None]
        low, high = 1 / ramp, (grid.shape[k] - 2) / ramp
        if at[[0, 0, -1, -1], [0, -1, 0, -1]].min() > low + 1 and at[[0, 0, -1, -1], [0, -1, 0, -1]].max() < high - 1:
            continue  # wholly inside along this axis
        np.minimum(w, at - np.float32(low), out=w)
        np.minimum(w, np.float32(high) - at, out=w)
    return np.maximum(w, 0, out=w)


def back_of(anatomy: Anatomy) -> float:
    """y of the skin of the back at L3 in LPS mm."""
    return float(anatomy.canal_to_lps(0.0, 0.0, anatomy.disc_s_mm[2])[1] + 50 + anatomy.body["fat_back_mm"])


def acquire_study(
    rng: np.random.Generator, anatomy: Anatomy, grids: Sequence[TissueGrid], plans: Sequence[SeriesPlan]
) -> list:
    """Image stacks of all plans; renderings are shared by series of one contrast table."""
    stacks, rendered = [], {}
    for plan in plans:
        if plan.contrast not in rendered:
            table = contrast_table(plan.contrast, rng)
            rendered[plan.contrast] = [render(g, table) for g in grids]
        front = np.array([(v.centre_mm - v.frame[:, 1] * v.depth_mm / 2)[1:] for v in anatomy.vertebrae])
        stacks.append(acquire(rng, grids, plan, rendered[plan.contrast], back_of(anatomy), front))
    return stacks
