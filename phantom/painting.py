"""An anatomy painted into tissue grids: body, discs, bones, canal, foramina.

May use: grid, anatomy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.interpolate import PchipInterpolator

from .anatomy import (
    FORAMEN_RISE_MM,
    FORAMEN_V_MM,
    RECESS_U_MM,
    VERTEBRAE,
    Anatomy,
    Disc,
    Vertebra,
    _bump,
    foramen_section,
    recess_section,
    sac_section,
)
from .grid import TISSUE, TissueGrid, _local, _Noise, _reach, _smooth_min


def paint(
    anatomy: Anatomy,
    spine_step_mm: Sequence[float] = (0.95, 0.8, 0.85),
    body_step_mm: Sequence[float] = (1.7, 1.7, 3.0),
) -> tuple[TissueGrid, TissueGrid]:
    """Anatomy -> (spine, body): a fine TissueGrid around the spine and a coarse one around it."""
    a = anatomy
    tail, head = a.vertebra("S3").centre_mm[2], a.vertebra("T10").centre_mm[2] + 10
    if a.wide:  # a steep S1 hangs lower than its neighbours
        tail = min(tail, *(a.vertebra(n).corners_mm()[:, 2].min() - 5 for n in ("S1", "S2")))
    used = [v for v in a.vertebrae if tail - 5 < v.centre_mm[2] < head + 20]
    front = min((v.centre_mm - v.frame[:, 1] * v.depth_mm / 2)[1] for v in used) - 14
    inside = (a.path_mm[:, 2] > tail) & (a.path_mm[:, 2] < head)
    back = max(
        a.path_mm[(a.path_mm[:, 2] > a.vertebra("S1").centre_mm[2]) & inside, 1].max() + 42,
        a.path_mm[inside, 1].max() + 22,
    )
    x = np.mean([a.path_mm[inside, 0].max(), a.path_mm[inside, 0].min()])
    spine = TissueGrid.empty((x - 50, front, tail), (x + 50, back, head), spine_step_mm, "fat")
    mid = a.vertebra("L3").centre_mm
    deep = 125
    if a.wide:
        deep = max(deep + a.body["fat_back_mm"] - 25, a.path_mm[inside, 1].max() - mid[1] + 48)
    body = TissueGrid.empty(
        (mid[0] - 118, mid[1] - 190, mid[2] - (210 if a.wide else 185)),
        (mid[0] + 118, mid[1] + deep, mid[2] + 185),
        body_step_mm,
        "air",
    )
    noise = _Noise(a.seed)
    for grid in (body, spine):
        _paint_body(grid, a, noise)
        _paint_pelvis(grid, a)
    for disc in a.discs:
        for grid in (body, spine) if disc.above in ("T8", "T9", "T10", "S3", "S4") else (spine,):
            _paint_disc(grid, a, disc, noise)
    if a.wide:
        _paint_ligaments(spine, a)
        kept = np.zeros(spine.shape, bool)
    for vertebra in a.vertebrae:
        for grid in (body, spine) if vertebra.name in ("T8", "T9", "T10", "S3", "S4", "S5") else (spine,):
            _paint_vertebra(grid, a, vertebra, noise, kept if a.wide and grid is spine else None)
    if a.wide:
        _paint_scar(spine, a)
        spine.keep = kept  # where a body has slipped, the canal gives way and not the body's corner
    _paint_canal(spine, a, noise)
    if a.wide:
        _paint_canal_extras(spine, a)
        spine.keep = None
        _paint_metal(spine, a)
    return spine, body


# Muscles in axial sections: level coordinate (T12 = 0, L1 = 1 .. S2 = 7) -> centre and half-axes
# relative to the canal's middle: x (left side), y, half-width, half-depth.
_AT = np.arange(-2, 9)
_MUSCLES = {
    "erector": (
        [30, 31, 32, 34, 36, 38, 40, 40, 36, 32, 28],
        [20, 22, 24, 25, 25, 25, 24, 21, 17, 12, 8],
        [18, 19, 20, 22, 24, 26, 26, 23, 15, 8, 1],
        [15, 16, 17, 18, 19, 20, 19, 16, 10, 5, 1],
    ),
    "multifidus": (
        [10, 10, 11, 12, 13, 14, 16, 18, 20, 18, 14],
        [24, 26, 28, 30, 31, 31, 31, 29, 25, 19, 14],
        [8, 8, 9, 10, 11, 12, 14, 16, 17, 13, 6],
        [9, 9, 10, 11, 12, 14, 15, 16, 14, 9, 5],
    ),
    "quadratus": (
        [48, 48, 48, 51, 56, 60, 64, 68, 70, 70, 70],
        [4, 4, 4, 3, 1, -1, -3, -6, -8, -8, -8],
        [0, 0, 4, 9, 12, 13, 12, 7, 0, 0, 0],
        [0, 0, 3, 6, 7, 8, 9, 6, 0, 0, 0],
    ),
    "psoas": (
        [26, 26, 26, 29, 32, 36, 40, 45, 52, 58, 62],
        [-20, -20, -20, -22, -24, -26, -30, -40, -58, -74, -88],
        [0, 0, 2, 7, 11, 16, 19, 20, 20, 19, 18],
        [0, 0, 3, 9, 13, 18, 21, 23, 22, 20, 19],
    ),
    "gluteus": (
        [80, 80, 80, 80, 80, 80, 80, 85, 78, 72, 72],
        [20, 20, 20, 20, 20, 20, 20, 20, 15, 5, 0],
        [0, 0, 0, 0, 0, 0, 0, 10, 30, 40, 46],
        [0, 0, 0, 0, 0, 0, 0, 8, 20, 24, 28],
    ),
}
# Vessels: x, y, radius, from level to level.
_VESSELS = (
    (
        "aorta",
        [4, 6, 8, 9, 10, 10, 11, 20, 34, 44, 50],
        [-49, -50, -52, -54, -55, -55, -56, -56, -60, -72, -84],
        [10, 10, 9.5, 9, 8.5, 8.5, 8, 5, 5, 4.5, 4.5],
        -2,
        8,
    ),
    (
        "right iliac",
        [0, 0, 0, 0, 0, 0, 6, -10, -30, -42, -50],
        [-55] * 6 + [-56, -58, -62, -74, -86],
        [0] * 6 + [6, 5, 5, 4.5, 4.5],
        4.2,
        8,
    ),
    (
        "cava",
        [-16, -16, -17, -18, -18, -18, -18, -20, -32, -42, -48],
        [-56, -54, -50, -50, -50, -50, -50, -50, -54, -66, -78],
        [10, 10, 10, 10, 10, 10, 10, 7, 6, 5.5, 5],
        -2,
        8,
    ),
    (
        "left iliac vein",
        [0] * 6 + [-12, 4, 26, 38, 44],
        [-50] * 6 + [-50, -50, -54, -66, -78],
        [0] * 6 + [5, 6.5, 6, 5.5, 5],
        4.6,
        8,
    ),
)


class _Section:
    """For a grid's z axis: where the canal is, and the level coordinate (T12 = 0 .. S2 = 7)."""

    def __init__(self, grid: TissueGrid, a: Anatomy) -> None:
        z = grid.axis_mm(2)
        order = np.argsort(a.path_mm[:, 2])
        self.x = np.interp(z, a.path_mm[order, 2], a.path_mm[order, 0]).astype(np.float32)
        y = np.interp(z, a.path_mm[order, 2], a.path_mm[order, 1])
        self.y = y.astype(np.float32)
        names = VERTEBRAE[2:13]
        zs = np.array([a.vertebra(n).centre_mm[2] for n in names])
        level = np.interp(-z, -zs, np.arange(-2, 9))
        self.level = ndimage.gaussian_filter1d(level, 8 / grid.step_mm[2], mode="nearest")
        self.z = z

    def table(self, values: Any) -> np.ndarray:
        return PchipInterpolator(_AT, values)(np.clip(self.level, -2, 8)).astype(np.float32)


def _paint_body(grid, a: Anatomy, noise):
    """Skin, fat, muscles, vessels and a hint of the organs."""
    c, b = _Section(grid, a), a.body
    everything = tuple(slice(0, k) for k in grid.shape)
    x, y, _ = grid.coordinates(everything)
    mid = a.vertebra("L3").centre_mm
    # The back's surface follows the canal at half its curve.
    canal = np.interp(mid[2], c.z, c.y)
    rear = (
        canal
        + 50
        + b["fat_back_mm"]
        + 0.45 * (ndimage.gaussian_filter1d(c.y, 20 / grid.step_mm[2]) - canal)
        + 14 * np.exp(-0.5 * ((c.level - 8) / 1.5) ** 2)
    )
    half_depth = b["half_depth_mm"]
    if a.wide:  # a steep sacrum pushes the skin back
        steep = ndimage.gaussian_filter1d(c.y, 8 / grid.step_mm[2]) + 24 + min(0.5 * b["fat_back_mm"], 15) - rear
        steep = np.logaddexp(0, steep / 6) * 6
        rear, half_depth = rear + steep, half_depth + steep / 2
    middle_y = (rear - half_depth).astype(np.float32)
    if grid.step_mm[0] > 1:
        p = np.abs((x - mid[0]) / np.float32(b["half_width_mm"]))
        q = np.abs((y - middle_y) / np.float32(half_depth))
        outside = p**2.4 + q**2.4  # first order around the surface
        stretch = 1 + np.float32(b["half_width_mm"] / half_depth - 1) * np.minimum(p * p, 1)
        outside = (outside - 1) * (np.float32(half_depth / 2.4) * stretch)
        grid.lay(everything, outside, "skin")
        grid.lay(everything, outside + 2.2, "fat")
        # Abdominal wall: a ring of muscle that is open behind.
        wall = np.abs(outside + b["fat_side_mm"] + 6) - 6 + np.maximum(0, y - (c.y - 5)) * 0.8
        grid.lay(everything, wall, "muscle")
        (_paint_wide_organs if a.wide else _paint_organs)(grid, a, c, outside + b["fat_side_mm"] + 12)
    else:
        (_paint_wide_organs if a.wide else _paint_organs)(grid, a, c, None)
        # The fine grid may reach through the skin of the back.
        back = grid.box((-1e3, rear.min() - 8, -1e3), (1e3, 1e3, 1e3))
        if back is not None:
            x, y, _ = grid.coordinates(back)
            p = np.abs((x - mid[0]) / np.float32(b["half_width_mm"])) ** 2.4
            outside = (y - middle_y) - np.float32(half_depth) * (1 - p) ** np.float32(1 / 2.4)
            grid.lay(back, -outside - 2.2, "skin")
            grid.lay(back, -outside, "air")
    for name, knots in _MUSCLES.items():
        cx, cy, hu, hv = (c.table(k) for k in knots)
        hu, hv = hu * b["muscle"], hv * b["muscle"]
        on = np.flatnonzero((hu > 1) & (hv > 1))
        if not len(on):
            continue
        infiltration = b["infiltration"] * {"multifidus": 1.0, "erector": 0.75}.get(name, 0.3)
        # Slabs along z keep the boxes tight around a muscle that drifts sideways.
        slab = max(1, int(45 / grid.step_mm[2]))
        for first in range(on[0], on[-1] + 1, slab):
            ks = np.arange(first, min(first + slab, on[-1] + 1))
            for side in (1, -1):
                _paint_muscle(
                    grid, c, ks, c.x + side * cx, c.y + cy, hu, hv, noise, infiltration, medial=name == "multifidus"
                )
    if a.wide:
        _paint_wide_vessels(grid, a, c)
        _paint_haze(grid, a, noise)
    for _, *course, start, stop in () if a.wide else _VESSELS:
        cx, cy, r = (c.table(k) for k in course)
        r = np.where((c.level > start) & (c.level < stop), r, 0)
        on = np.flatnonzero(r > 1)
        if not len(on):
            continue
        box = grid.box(
            [(c.x + cx - r)[on].min() - 3, (c.y + cy - r)[on].min() - 3, c.z[on[0]]],
            [(c.x + cx + r)[on].max() + 3, (c.y + cy + r)[on].max() + 3, c.z[on[-1]]],
        )
        if box is None:
            continue
        x, y, _ = grid.coordinates(box)
        k = box[2]
        d = np.hypot(x - (c.x + cx)[k], y - (c.y + cy)[k]) - r[k]
        grid.lay(box, d, "muscle")
        grid.lay(box, d + 1.2, "blood")


def _paint_muscle(grid, c, ks, at_x, at_y, half_x, half_y, noise, infiltration, medial):
    """One muscle on z indices ks: an elliptic cross-section with fat between its fibres."""
    box = grid.box(
        [(at_x - half_x)[ks].min() - 2, (at_y - half_y)[ks].min() - 2, c.z[ks[0]]],
        [(at_x + half_x)[ks].max() + 2, (at_y + half_y)[ks].max() + 2, c.z[ks[-1]]],
    )
    if box is None:
        return
    box = (box[0], box[1], slice(int(ks[0]), int(ks[-1]) + 1))
    x, y, _ = grid.coordinates(box)
    k = box[2]
    q = (y - at_y[k]) / np.maximum(half_y[k], 0.5)
    p = (x - at_x[k]) / np.maximum(half_x[k], 0.5)
    d = p * p + q * q
    np.sqrt(d, out=d)
    d -= 1
    d *= np.minimum(half_x, half_y)[k]
    d += (0.5 * np.sin(x / 5.1 + c.z[k] / 17)) + (0.5 * np.sin(y / 4.3 - c.z[k] / 23)).astype(np.float32)
    d[:, :, np.minimum(half_x, half_y)[k] < 1] = 9
    if grid.step_mm[0] < 1:
        grid.lay(box, d - 0.6, "fascia")
    grid.lay(box, d, "muscle")
    # Fat between the fibres, most in the multifidus and low down.
    low = (0.65 + 0.35 * np.clip(c.level / 5, 0, 1))[k].astype(np.float32)
    if medial:
        low = low + 0.35 * np.clip(-q, 0, 1)
    fat = noise(grid, box, (0.95, 0.8, 5.0), "fibre")
    fat += np.float32(1.3 * infiltration) * low - np.float32(1.5)
    fat = np.float32(0.09) + np.float32(0.06) * fat + np.float32(0.33) * np.maximum(fat, 0)
    np.minimum(fat, np.float32(-0.5) * d, out=fat)
    grid.blend(box, np.minimum(fat, np.float32(0.8)), "fat")


def _paint_organs(grid, a, c, inside_mm):
    """Liver, kidneys and bowel loops: something to look at in front. inside_mm: signed distance to
    the abdominal wall's inside, or None where the grid does not reach it."""
    rng = np.random.default_rng(a.seed + 1)
    l1, l2, l4 = (a.vertebra(n).centre_mm for n in ("L1", "L2", "L4"))

    def blob(centre, half, tissue, wobble=0.0):
        box = grid.box(np.subtract(centre, half) - 4, np.add(centre, half) + 4)
        if box is None:
            return
        x, y, z = grid.coordinates(box)
        d = np.sqrt(
            ((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2 + ((z - centre[2]) / half[2]) ** 2
        )
        d = (d - 1) * np.float32(min(half))
        grid.lay(box, d if inside_mm is None else np.maximum(d, inside_mm[box] + 2), tissue)

    blob(l1 + (-75, -75, 45), (75, 85, 75), "liver")
    for side in (1, -1):
        k = l2 + (side * 68, -5, 12)
        blob(k, (26, 24, 52), "kidney")
        blob(k + (-side * 12, -6, 0), (12, 9, 26), "fat")
    for _ in range(230):
        at = l4 + (rng.uniform(-115, 115), rng.uniform(-135, -48), rng.uniform(-125, 125))
        r = rng.uniform(8, 16)
        half = np.array((r * rng.uniform(0.9, 2.0), r * rng.uniform(0.8, 1.1), r * rng.uniform(0.8, 1.3)))
        blob(at, half, "muscle")
        blob(at, half - 1.6, str(rng.choice(["bowel", "fluid", "air", "liver"], p=[0.55, 0.1, 0.1, 0.25])))


def _front_of_spine(a, z_mm):
    """y of the bodies' front walls at heights z (mm)."""
    p = np.array([v.centre_mm - v.frame[:, 1] * v.depth_mm / 2 for v in a.vertebrae])
    order = np.argsort(p[:, 2])
    return np.interp(z_mm, p[order, 2], p[order, 1])


def _tube(grid, p, q, radius, tissue, limit_mm=None, gas=None, strength=1.0):
    """A thick line from p to q (LPS mm). limit_mm: signed distance of the grid to a wall it must not
    cross; gas: share of the radius that fluid leaves to the gas above it (the patient lies on the
    back), None for no gas."""
    p, q = np.asarray(p, float), np.asarray(q, float)
    box = grid.box(np.minimum(p, q) - radius - 2, np.maximum(p, q) + radius + 2)
    if box is None:
        return
    points = grid.coordinates(box)
    d = _capsule(points, p, q, radius)
    if limit_mm is not None:
        d = np.maximum(d, limit_mm[box] + 2)
    grid.lay(box, d.copy(), tissue, strength=strength)
    if gas is not None:
        level = np.float32((p[1] + q[1]) / 2 + (2 * gas - 1) * radius)
        grid.lay(box, np.maximum(d, points[1] - level), "air")


def _paint_wide_organs(grid, a, c, inside_mm):
    """Gut as walled tubes with changing contents in more or less fat, pelvic and upper organs.
    inside_mm as in `_paint_organs`."""
    rng = np.random.default_rng((a.seed, 11))
    l1, l2, l3, s1, s3 = (a.vertebra(n).centre_mm for n in ("L1", "L2", "L3", "S1", "S3"))
    gap = a.wide["gap_mm"]

    def ball(centre, half, tissue, grow=0.0, wobble=0.0):
        half = np.asarray(half, float) + grow
        box = grid.box(centre - half - 3, centre + half + 3)
        if box is None:
            return
        d = sum(((k - np.float32(m)) / np.float32(r)) ** 2 for k, m, r in zip(grid.coordinates(box), centre, half))
        d = (np.sqrt(d) - 1) * np.float32(min(half))
        if wobble:
            px, _, pz = grid.coordinates(box)
            d += np.float32(wobble) * np.sin((px - centre[0]) / 19 + 1) * np.sin((pz - centre[2]) / 15 + wobble)
        grid.lay(box, d if inside_mm is None else np.maximum(d, inside_mm[box] + 2), tissue)

    for _ in range(a.wide["loops"]):
        colon = rng.random() < 0.3
        r = rng.uniform(12, 22) if colon else rng.uniform(6, 13)
        z = l3[2] + rng.uniform(-150, 140)
        p = np.array([l3[0] + rng.uniform(-65, 65), 0, z])
        p[1] = _front_of_spine(a, z) - gap - r - 2 - rng.uniform(0, a.wide["visceral_mm"] - gap)
        turn = rng.uniform(0, 2 * np.pi)
        wall, skin = rng.uniform(1.2, 2.8), str(rng.choice(["vessel_wall", "muscle", "bowel"]))
        content = str(rng.choice(["bowel", "fluid", "air", "stool", "vessel_wall"], p=[0.28, 0.2, 0.17, 0.2, 0.15]))
        if colon and rng.random() < 0.5:
            content = "stool"
        gas = rng.uniform(0.15, 0.7) if content in ("fluid", "stool") and rng.random() < 0.4 else None
        points, radii = [p], [r]
        for _ in range(int(rng.integers(2, 7))):
            turn += rng.normal(0, 0.8)
            p = p + 1.5 * r * np.array([np.cos(turn), rng.normal(0, 0.25), np.sin(turn)])
            p[1] = min(p[1], _front_of_spine(a, p[2]) - gap - r - 4)
            points.append(p)
            radii.append(r * rng.uniform(0.75, 1.1))
        for k in range(len(points) - 1):
            _tube(grid, points[k], points[k + 1], radii[k], skin, inside_mm)
        for k in range(len(points) - 1):
            inner = content if rng.random() < 0.8 else str(rng.choice(["bowel", "air", "stool"]))
            _tube(grid, points[k], points[k + 1], radii[k] - wall, inner, inside_mm, gas)
    for _ in range(14):  # vessels of the mesentery
        p = l3 + (rng.uniform(-50, 50), 0, rng.uniform(-110, 110))
        p[1] = _front_of_spine(a, p[2]) - rng.uniform(15, 60)
        q = p + rng.normal(0, 1, 3) * (14, 12, 28)
        q[1] = min(q[1], _front_of_spine(a, q[2]) - 9)
        _tube(grid, p, q, rng.uniform(1.2, 3), str(rng.choice(["blood", "slow_blood", "muscle"])))

    # Pelvis: bladder, womb, and the rectum along the sacrum.
    if rng.random() < 0.85:
        centre = s3 + (rng.normal(0, 6), rng.uniform(-95, -65), rng.uniform(-35, 15))
        half = rng.uniform((28, 16, 14), (45, 36, 40))
        ball(centre, half, "muscle", 3)
        ball(centre, half, "fluid")
    if a.wide["pelvis"] == "uterus":
        centre = s3 + (rng.normal(0, 8), rng.uniform(-58, -40), rng.uniform(-15, 15))
        half = rng.uniform((22, 14, 20), (30, 24, 38))
        ball(centre, half, "uterus")
        ball(centre, (half[0] * 0.4, 4.5, half[2] * 0.7), "muscle")
        ball(centre, (half[0] * 0.3, 2.2, half[2] * 0.55), "fluid")
    r = rng.uniform(8, 17)
    away = r + rng.uniform(5, 16)
    line = [a.vertebra(n) for n in ("S2", "S3", "S4", "S5")]
    line = [v.centre_mm - v.frame[:, 1] * (v.depth_mm / 2 + away) for v in line]
    line = [line[0] + (rng.normal(0, 15), -rng.uniform(5, 25), 12), *line, line[-1] + (0, 4, -35)]
    for k in range(len(line) - 1):
        _tube(grid, line[k], line[k + 1], r, "vessel_wall")
    content = str(rng.choice(["stool", "air", "bowel", "fluid"], p=[0.4, 0.3, 0.2, 0.1]))
    for k in range(len(line) - 1):
        _tube(grid, line[k], line[k + 1], r * rng.uniform(0.6, 0.85), content if rng.random() < 0.75 else "air")

    ball(
        l1 + (rng.uniform(-80, -55), rng.uniform(-90, -70), rng.uniform(30, 60)),
        (75, 80, rng.uniform(60, 85)),
        "liver",
        0.0,
        rng.uniform(3, 9),
    )
    ball(l1 + (80, rng.uniform(-35, 0), rng.uniform(40, 70)), (32, 38, rng.uniform(35, 60)), "liver")  # spleen
    if rng.random() < 0.6:
        centre = l1 + (rng.uniform(15, 60), rng.uniform(-95, -70), rng.uniform(20, 60))
        half = rng.uniform((25, 16, 18), (50, 30, 34))
        ball(centre, half, "vessel_wall", 3)
        ball(centre, half, str(rng.choice(["fluid", "air", "stool"])))
    for side in (1, -1):
        k = l2 + (side * rng.uniform(58, 72), rng.uniform(-12, 2), rng.uniform(-5, 25))
        size = rng.uniform(0.8, 1.15)
        ball(k, np.array((25, 23, 50)) * size, "kidney")
        ball(k + (-side * 12, -6, 0), (12, 9, 26), "fat")
        if rng.random() < 0.15:
            r = rng.uniform(5, 20)
            ball(k + (side * 10, -8, rng.uniform(-40, 40)), (r, r, r), "fluid")


def _paint_haze(grid, a, noise):
    """Small vessels, nodes and folds in the fat in front of the spine, as a texture."""
    front = a.vertebra("L3").centre_mm - (0, a.vertebra("L3").depth_mm / 2, 0)
    box = grid.box(front - (45, 0.85 * a.wide["visceral_mm"], 160), front + (45, 6, 160))
    if box is None:
        return
    haze = noise(grid, box, (2.0, 2.0, 3.0), "coarse")
    haze += np.float32(0.5) * noise(grid, box, (1.7, 1.7, 3.0), "fine")
    fat = (grid.under[box] == TISSUE["fat"]) & (grid.share[box] == 0)
    fat |= (grid.over[box] == TISSUE["fat"]) & (grid.share[box] == 255)
    grid.blend(box, np.clip(np.float32(a.wide["haze"]) * (haze - 0.2), 0, 0.6) * fat, "muscle")
    # Folds and lumps in the gut.
    for tissue, other in (("bowel", "vessel_wall"), ("stool", "air"), ("fluid", "bowel")):
        filled = grid.over[box] == TISSUE[tissue]
        grid.blend(box, np.clip(0.3 * haze + 0.1, 0, 0.55) * filled, other)


def _paint_wide_vessels(grid, a, c):
    """Aorta, cava and their branches along the front of the bodies, straight or winding, in more or
    less fat; flowing blood is dark, slow blood is not."""
    rng = np.random.default_rng((a.seed, 12))
    front = ndimage.gaussian_filter1d(_front_of_spine(a, c.z) - c.y, 5 / grid.step_mm[2], mode="nearest")
    low = np.clip((c.level - 4.3) / 1.3, 0, 1)  # the branches leave the spine
    winding = rng.uniform(0, 3) * rng.choice([0.3, 3])
    fat = rng.uniform(0.5, 3) if rng.random() < 0.6 else rng.uniform(3, 10)
    bump = rng.uniform(0.3, 1.2) if rng.random() < 0.08 else 0.0
    for name, cx, cy, r, start, stop in _VESSELS:
        phase, pace = rng.uniform(0, 6), rng.uniform(0.6, 1.4)
        scale, aside = rng.uniform(0.75, 1.25), rng.normal(0, 5)
        slow = rng.random() < (0.2 if name in ("aorta", "right iliac") else 0.55)
        wall = rng.uniform(0.8, 1.8)
        flat = rng.uniform(0.55, 1.0) if name == "cava" else 1.0
        r = c.table(r) * np.float32(scale)
        if name == "aorta":
            r = r * (1 + bump * np.exp(-0.5 * ((c.level - 3.6) / 0.8) ** 2))
        r = np.where((c.level > start) & (c.level < stop), r, 0).astype(np.float32)
        wave = winding * np.sin(pace * c.level + phase) * (1 - low)
        cx = c.table(cx) + (aside + wave) * (1 - 0.7 * low)
        along = front - r * flat - fat - 0.4 * np.abs(wave)
        cy = along * (1 - low) + np.minimum(c.table(cy), np.where(c.level < 6, along, 1e3)) * low
        on = np.flatnonzero(r > 1)
        if not len(on):
            continue
        at_x, at_y = (c.x + cx).astype(np.float32), (c.y + cy).astype(np.float32)
        box = grid.box(
            [(at_x - r)[on].min() - 3, (at_y - r)[on].min() - 3, c.z[on[0]]],
            [(at_x + r)[on].max() + 3, (at_y + r)[on].max() + 3, c.z[on[-1]]],
        )
        if box is None:
            continue
        x, y, _ = grid.coordinates(box)
        k = box[2]
        d = np.hypot(x - at_x[k], (y - at_y[k]) / np.float32(flat)) - r[k]
        grid.lay(box, d.copy(), "vessel_wall")
        grid.lay(box, d + np.float32(wall), "slow_blood" if slow else "blood")


def _spinous(a, v, along):
    """LPS point on a spinous process: along = 0 at the lamina, 1 at the tip."""
    lamina = v.depth_mm / 2 + a.canal_ap_mm + 2.5 + v.shape.get("lysis_mm", 0)
    long = 26 * v.shape.get("process", 1)
    local = np.array([0, lamina + 4 + along * (long - 4), -v.height_mm / 2 * (0.55 + 0.3 * along)])
    return v.centre_mm + v.frame @ local


def _paint_ligaments(grid, a):
    """Between the spinous processes and along their tips."""
    line = [v for v in a.vertebrae if v.name[0] in "TL"]
    for v, w in zip(line, line[1:]):
        p, q = _spinous(a, v, 0.5), _spinous(a, w, 0.45)
        box = grid.box(np.minimum(p, q) - (4, 12, 3), np.maximum(p, q) + (4, 12, 3))
        if box is not None:
            d = _capsule(grid.coordinates(box), p, q, 1.0, (1.8, 9.0, 9.0))
            grid.lay(box, d, "flavum", strength=a.wide["ligament"])
        _tube(grid, _spinous(a, v, 1), _spinous(a, w, 1), 1.7, "flavum")


def _paint_scar(grid, a):
    """What fills the place of a removed arch, and the cut to the skin."""
    for name in a.wide["laminectomy"]:
        v = a.vertebra(name)
        at = _spinous(a, v, 0.3)
        box = grid.box(at - (16, 20, 24), at + (16, 20, 24))
        if box is not None:
            d = _capsule(grid.coordinates(box), at - (0, 3, 3), at + (0, 3, -3), 1.0, (12, 8, 14))
            grid.lay(box, d + 1.2 * np.sin(at[1] + 0.5 * sum(grid.coordinates(box))), "scar", strength=0.8)
        _tube(grid, at, at + (0, 60, -6), 2.2, "scar", strength=0.7)


def _paint_canal_extras(grid, a):
    """Extruded discs, cysts of the sacral roots, fat in the filum."""
    rng = np.random.default_rng((a.seed, 13))
    first = VERTEBRAE.index("L1")
    for level in range(5):
        disc = a.discs[first + level]
        if disc.shape["hernia"] is None:
            continue
        deep, half_s, shift, side, rim = disc.shape["hernia"]
        shift = np.clip(shift, -half_s - 1, half_s + 1)
        s = a.disc_s_mm[level] + shift
        at = a.canal_to_lps(side, -a.canal_ap_mm / 2 - 0.5, s)
        half = np.array([rng.uniform(4, 9), deep, half_s + 2])
        box = grid.box(*_reach(at, disc.frame, half + 3))
        if box is None:
            continue
        d = sum((k / np.float32(m)) ** 2 for k, m in zip(_local(grid, box, at, disc.frame), half))
        d = (np.sqrt(d) - 1) * np.float32(half.min())
        grid.lay(box, d.copy(), "cortex" if rim else "annulus")
        grid.lay(box, d + 1.0, "extruded" if disc.water > 0.2 else "annulus")
    for _ in range(a.wide["cysts"]):
        r = rng.uniform(3.5, 9)
        at = a.canal_to_lps(rng.choice([-1, 1]) * rng.uniform(5, 13), 0.0, a.disc_s_mm[4] + rng.uniform(32, 58))
        _tube(grid, at - (0, 0, 3), at + (0, 0, 3), r, "csf")
    if a.wide["filum_fat"]:
        s = np.arange(a.conus_s_mm + 20, a.disc_s_mm[4] + 30, 10)
        points = a.canal_to_lps(0.0 * s, 3.0 + 0 * s, s)
        for p, q in zip(points, points[1:]):
            _tube(grid, p, q, 1.0, "fat")


def _paint_metal(grid, a):
    """Pedicle screws, rods and cages: a void larger than the thing, with a bright rim."""
    names = a.wide["screws"]
    if not names:
        return
    rng = np.random.default_rng((a.seed, 14))
    bloom = rng.uniform(0, 4)
    pieces, heads = [], {1: [], -1: []}
    for name in names:
        v = a.vertebra(name)
        wide = a.canal_lr_mm / 2 + 4.5 + {"L4": 0.8, "L5": 3.0}.get(name, 0)
        back, h = v.depth_mm / 2, v.height_mm / 2
        for side in (1, -1):
            head = v.centre_mm + v.frame @ (side * (wide + 4), back + 26, h * 0.45)
            tip = v.centre_mm + v.frame @ (side * (wide - 6), -back * rng.uniform(0.1, 0.6), h * rng.uniform(0, 0.4))
            pieces.append((head, tip, 2.6))
            heads[side].append(head)
    for line in heads.values():
        pieces += [(p, q, 3.2) for p, q in zip(line, line[1:])]
        pieces += [(p, p + (0, 3, 0), 5.5) for p in line]
    if a.wide["cage"]:
        for name in names[:-1]:
            disc = a.discs[VERTEBRAE.index(name)]
            for side in (-9, 0, 9):
                at = disc.centre_mm + disc.frame[:, 0] * side
                reach = disc.frame[:, 1] * rng.uniform(6, 10)
                pieces.append((at - reach, at + reach, max(2.0, disc.height_mm / 2 - 1.5 - bloom)))
    for p, q, r in pieces:
        _tube(grid, p, q, r + bloom + 1.5, "metal_rim", strength=0.55)
    for p, q, r in pieces:
        _tube(grid, p, q, r + bloom, "metal")


def _capsule(points, p, q, radius, scale=(1, 1, 1), turn=0.0):
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


def _paint_bone(grid, centre, frame, pieces, marrow="marrow", smooth_mm=2.5, shell_mm=1.0):
    """Union of capsules [(p, q, radius, scale), ...] in a local frame: cortex and marrow."""
    lows, highs = [], []
    boxes = []
    for p, q, r, scale, *turn in pieces:
        pad = r * (np.full(3, max(scale)) if turn else np.array(scale)) + 3
        lo, hi = np.minimum(p, q) - pad, np.maximum(p, q) + pad
        low, high = _reach(centre + frame @ ((lo + hi) / 2), frame, (hi - lo) / 2)
        boxes.append((low, high))
        lows.append(low)
        highs.append(high)
    whole = grid.box(np.min(lows, 0), np.max(highs, 0))
    if whole is None:
        return
    distance = np.full([s.stop - s.start for s in whole], 6, np.float32)
    for (low, high), (p, q, r, scale, *turn) in zip(boxes, pieces):
        box = grid.box(low, high)
        if box is None:
            continue
        d = _capsule(_local(grid, box, centre, frame), p, q, r, scale, *turn)
        inner = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(box, whole))
        distance[inner] = _smooth_min(distance[inner], d, smooth_mm)
    grid.lay(whole, distance, "cortex")
    grid.lay(whole, distance + shell_mm, marrow)


def _paint_pelvis(grid, a: Anatomy):
    """Sacral wings and iliac bones."""
    s1 = a.vertebra("S1")
    for side in (1, -1):
        wing = [
            ((side * 18, 3, 1), (side * 44, 9, -9), 8.5, (1, 1.15, 1.5)),
            ((side * 15, 5, -24), (side * 38, 11, -28), 8, (1, 1, 1.8)),
            ((side * 14, 6, -46), (side * 26, 10, -48), 6, (1, 1, 2)),
        ]
        _paint_bone(grid, s1.centre_mm, s1.frame, wing, shell_mm=1.3, smooth_mm=6)
        upright = np.eye(3)
        at = s1.centre_mm
        ilium = [
            ((side * 56, 38, -8), (side * 74, -20, 16), 7, (1, 1, 2.2)),
            ((side * 74, -20, 16), (side * 100, -62, 14), 6, (1, 1, 2.2)),
            ((side * 52, 44, -30), (side * 72, -12, -40), 8, (1, 1, 2.6)),
        ]
        _paint_bone(grid, at, upright, ilium, shell_mm=1.6)


def _outline(x, y, depth, width, hollow=0.13):
    """Radius of a point relative to a kidney-shaped outline of the given size (1 = on it); hollow is
    the rear wall's dent as a share of the half-depth."""
    p, q = x / np.float32(width / 2), y / np.float32(depth / 2)
    q = q * np.where(q > 0, 1 + np.float32(hollow) * np.clip(1 - 2.2 * p * p, 0, 1), 1)
    return _rounded(p, q)


def _rounded(p, q):
    """Radius whose unit line lies between a circle and a square."""
    p, q = p * p, q * q
    r = np.sqrt(p + q)
    r += np.sqrt(np.sqrt(p * p + q * q))
    r *= np.float32(0.5)
    return r


def _paint_disc(grid, a: Anatomy, disc: Disc, noise):
    if a.wide:
        return _paint_wide_disc(grid, a, disc, noise)
    half = (disc.width_mm / 2 + 5, disc.depth_mm / 2 + 5, disc.height_mm / 2 + 6)
    box = grid.box(*_reach(disc.centre_mm, disc.frame, half))
    if box is None:
        return
    x, y, z = _local(grid, box, disc.centre_mm, disc.frame)
    rho = _outline(x, y, disc.depth_mm, disc.width_mm, 0.06)
    sunk = np.clip(1 - disc.water, 0, 1)
    radial = (rho - 1) * (disc.depth_mm / 2) - 1.2 * sunk
    # Rounded between the rims, and reaching under the end plates' hollows.
    hug = np.maximum(0, np.abs(z) - disc.height_mm / 2 + 1.5)
    d = np.maximum(radial + 0.45 * hug * hug, np.abs(z) - disc.height_mm / 2 - 4.5)
    d = np.where(rho < 0.9, np.abs(z) - disc.height_mm / 2 - 4.5, d)
    grid.lay(box, d, "annulus")
    # A lens with soft edges.
    p, q = rho * np.float32(1 / 0.8), z * np.float32(1 / (disc.height_mm / 2 + 0.8))
    p, q = p * p, q * q
    nucleus = np.clip((1 - np.sqrt(p * p + q * q)) * np.float32(2.4), 0, 1)
    cleft = 1 - 0.35 * np.exp(-((z / 0.9) ** 2)) * np.clip((0.6 - rho) * 4, 0, 1)
    nucleus = nucleus * cleft * disc.water * (1 + 0.12 * noise(grid, box, (1.6, 1.6, 1.6), "coarse"))
    grid.blend(box, np.clip(nucleus, 0, 1), "nucleus")


def _paint_wide_disc(grid, a: Anatomy, disc: Disc, noise):
    """A disc that may be sheared, collapsed, torn, full of gas, or bone."""
    s, tall = disc.shape, disc.height_mm
    depth, width = disc.depth_mm + 2 * s["over_mm"], disc.width_mm + 1.5 * s["over_mm"]
    half = (width / 2 + 4, depth / 2 + 4 + abs(s["slip"]) / 2, tall / 2 + max(6, s["reach"] + 1))
    box = grid.box(*_reach(disc.centre_mm, disc.frame, half))
    if box is None:
        return
    x, y, z = _local(grid, box, disc.centre_mm, disc.frame)
    if s["slip"]:
        y = y + np.float32(s["slip"]) * np.clip(z / np.float32(tall), -0.5, 0.5)
    rho = _outline(x, y, depth, width, 0.06)
    above = np.abs(z) - np.float32(tall / 2)
    hug = np.maximum(0, above + 1.5)
    flat = above - np.float32(s["reach"])  # under the hollows of the end plates
    d = np.where(rho < 0.9, flat, np.maximum((rho - 1) * np.float32(depth / 2) + 0.45 * hug * hug, flat))
    grid.lay(box, d, "fatty_marrow" if s["fused"] else "annulus")
    if s["fused"]:
        return
    up, down = s["dip"][1], s["dip"][0]  # the disc's lower and upper surface follow the dips
    bulge = np.float32(tall / 2 + 0.8) + 0.75 * np.clip(1 - rho * rho, 0, 1) * np.where(z > 0, down, up)
    p, q = rho * np.float32(1 / s["fill"]), z / bulge
    nucleus = np.clip((1 - np.sqrt(p * p + q * q)) * np.float32(2.4), 0, 1)
    if s["cleft"]:
        nucleus *= 1 - np.float32(s["cleft"]) * np.exp(-((z / 1.1) ** 2)) * np.clip((0.62 - rho) * 4, 0, 1)
    nucleus *= np.float32(disc.water) * (1 + 0.16 * noise(grid, box, (1.6, 1.6, 1.6), "coarse"))
    grid.blend(box, np.clip(nucleus, 0, 1), "nucleus")
    if s["gas"]:
        thin = np.exp(-((z / np.float32(0.3 * tall)) ** 2)) * np.clip((0.75 - rho) * 5, 0, 1)
        grid.blend(box, np.clip(thin * (1.1 + 0.5 * noise(grid, box, (2, 2, 2), "coarse")), 0, 1), "air")
    if s["zone"]:
        grid.lay(box, np.sqrt((x / 3) ** 2 + (y - depth / 2 + 3) ** 2 + z * z) - 1.5, "fluid", strength=0.8)


def _paint_wide_body(grid, a: Anatomy, v: Vertebra, noise, box, local, kept):
    """A body with dips, nodes and lips at its end plates and marrow of many looks. local: x, y, z in its frame."""
    x, y, z = local
    s, h = v.shape, np.float32(v.height_mm / 2)
    # The rear wall's middle lies at half the depth, its sides a little further back.
    rho = _outline(x, np.where(y > 0, y / np.float32(1 + s["hollow"]), y), v.depth_mm, v.width_mm, s["hollow"])
    waist = 1 - s["waist"] * np.clip(1 - (z / h) ** 2, 0, 1) * np.where(y > 0, np.float32(s["rear_waist"]), 1)
    radial = (rho - waist) * np.float32(v.depth_mm / 2)
    front = y * np.float32(-2 / v.depth_mm)
    slant = y * np.float32(np.tan(v.wedge / 2))
    dish = np.clip(1 - rho * rho, 0, 1) * (1 - np.float32(s["rearward"]) * front) * np.float32(s["concave_mm"])
    ends = {"top": z - h + slant, "bottom": -z - h + slant}
    for end, edge in ends.items():
        edge += dish * np.float32(s[end])
        for where, nx, ny, r, deep in s["nodes"]:
            if where == end:
                edge += np.float32(deep) * np.exp(-((((x - nx) ** 2 + (y - ny) ** 2) / np.float32(2 * r * r)) ** 2))
        if end in s["lips"]:
            ahead, behind = s["lips"][end]
            side = ahead * np.clip(front, 0, 1) ** 2 + behind * np.clip(-front, 0, 1) ** 2
            near = np.clip(1 + edge / np.float32(3 + 0.5 * ahead), 0, 1)
            radial -= side * near * near
            edge -= 0.35 * side * np.clip((rho - 0.98) * 9, 0, 1)
    plates = np.maximum(ends["top"], ends["bottom"])
    d = -_smooth_min(-radial, -plates, s["round_mm"])
    if kept is not None:
        kept[box] |= d < 0
    # Fat lies a little beside water in the picture: one end plate looks thicker than the other.
    along, across = a.wide["shift_mm"]
    deep = np.maximum(np.maximum(ends["top"] + along, ends["bottom"] - along) + 0.4, d + across * front)
    deep = np.maximum(deep + s["shell_mm"], d + 0.2)
    grid.lay(box, d, "cortex")
    partner = "marrow" if s["base"] == "fatty_marrow" else "fatty_marrow"
    grid.lay(box, deep.copy(), s["base"])
    fine, patch, stripe, size = a.wide["grain"]
    mix = np.float32(s["mix"]) + np.float32(fine) * noise(grid, box, (1.3, 1.3, 1.3), "fibre")
    mix += np.float32(patch) * noise(grid, box, (size, size, size), "coarse")
    if stripe > 0.07:
        mix += np.float32(stripe) * noise(grid, box, (1.1, 1.1, 6.0), "fine")
    inside = deep < -0.4
    grid.blend(box, np.clip(mix, 0, 0.9) * inside, partner)
    for tissue, end, thick, bias, strength in s["bands"]:
        ramp = np.clip((ends[end] + np.float32(thick)) / np.float32(0.35 * thick + 0.6), 0, 1)
        ramp *= np.clip(1 + np.float32(bias) * front, 0, 1) * np.float32(strength)
        grid.blend(box, ramp * inside, tissue)
    for tissue, px, py, pz, r, strength in s["spots"]:
        away = (x - px * v.width_mm / 2) ** 2 + (y - py * v.depth_mm / 2) ** 2 + (z - pz * h) ** 2
        grid.lay(box, np.maximum(np.sqrt(away) - np.float32(r), deep), tissue, strength=strength)
    if v.name[0] != "S":
        r, flare, strength = a.wide["vein"]
        vein = np.hypot(x * 0.35, z) - np.float32(r) - np.float32(flare) * np.clip(-front, 0, 1) ** 2
        grid.lay(box, np.maximum(np.maximum(vein, front * 8 + 1), radial + 0.6), "vein", strength=strength)


def _paint_vertebra(grid, a: Anatomy, v: Vertebra, noise, kept=None):
    """Body with end plates, waist, vein; then the arch with its processes. kept: mask (grid) that
    gets the body's voxels, wide variety only."""
    half: Any = (v.width_mm / 2 + 3, v.depth_mm / 2 + 3, v.height_mm / 2 + 5)
    if a.wide:
        lip = max([max(k) for k in v.shape["lips"].values()], default=0)
        half = np.add(half, (lip, lip, 0.4 * lip + v.depth_mm / 2 * abs(np.tan(v.wedge / 2)) - 3))
    box = grid.box(*_reach(v.centre_mm, v.frame, half))
    sacral = v.name[0] == "S"
    if a.wide and box is not None:
        _paint_wide_body(grid, a, v, noise, box, _local(grid, box, v.centre_mm, v.frame), kept)
    elif box is not None:
        x, y, z = _local(grid, box, v.centre_mm, v.frame)
        h = v.height_mm / 2
        rho = _outline(x, y, v.depth_mm, v.width_mm)
        waist = 1 - v.shape["waist"] * np.clip(1 - (z / h) ** 2, 0, 1) * np.where(y > 0, 0.55, 1)
        radial = (rho - waist) * (v.depth_mm / 2)
        dip = v.shape["concave_mm"] * np.clip(1 - rho * rho, 0, 1)
        slant = y * np.float32(np.tan(v.wedge / 2))
        top = z - (h - slant - dip)
        bottom = -z - (h - slant - dip)
        d = -_smooth_min(-radial, -np.maximum(top, bottom), 1.8)
        grid.lay(box, d, "cortex")
        deep = np.maximum(np.maximum(top, bottom) + 0.4, d) + 1.0
        grid.lay(box, deep, "marrow")
        grain = noise(grid, box, (1.3, 1.3, 1.3), "fibre")
        fat = np.clip(a.body["marrow_fat"] * 0.35 + 0.12 * grain, 0, 0.8) * (deep < -0.5)
        grid.blend(box, fat, "fatty_marrow")
        if v.shape["modic"]:
            low = np.clip((bottom + 6) / 4, 0, 1) * np.clip((0.9 - rho) * 4, 0, 1) * (deep < -0.4)
            grid.blend(box, low * 0.7, "fatty_marrow")
        if not sacral:
            vein = np.maximum(np.hypot(x * 0.35, z) - 1.5, -y)
            vein = np.maximum(vein, rho * 16 - 16)
            grid.lay(box, vein, "vein", strength=0.75)
    if sacral:
        _paint_sacral_arch(grid, a, v)
    else:
        _paint_arch(grid, a, v)


def _paint_arch(grid, a: Anatomy, v: Vertebra):
    """Pedicles, laminae, articular, transverse and spinous processes in the vertebra's frame."""
    back = v.depth_mm / 2
    canal = a.canal_ap_mm
    lumbar = v.name[0] == "L"
    wide = a.canal_lr_mm / 2 + {"L4": 0.8, "L5": 3.0}.get(v.name, 0)
    h = v.height_mm / 2
    lamina = back + canal + 2.5
    level_below = int(v.name[1]) - 1 if lumbar else -1  # index of the disc below
    long = 26 * v.shape.get("process", 1)
    pieces: list[tuple] = [
        ((0, lamina + 4, -h * 0.55), (0, lamina + long, -h * 0.85), 3.6, (0.85, 1, 2.3 if lumbar else 1.3))
    ]
    for side in (1, -1):

        def grow(level):
            if not 0 <= level < 5:
                return 0.0
            k = 0 if side == 1 else 1
            return min(3, 0.6 * a.severity[1 + k, level] + 0.5 * a.severity[3 + k, level])

        above, below = grow(level_below - 1), grow(level_below)
        p = wide + 4.5
        pieces += [
            ((side * p, back - 6, h * 0.36), (side * (p + 1), back + 12, h * 0.34), 3.6, (1, 1, 1.9)),
            # Superior articular process: a shell in front of the joint, up past the disc above;
            # isthmus; inferior one: behind the joint, down past the disc below.
            (
                (side * (p + 3.5), back + canal / 2 + 4.6, h * 0.25),
                (side * (p + 4.2), back + canal / 2 + 5.2, h + 8),
                3.8 + 0.25 * above,
                (1.65, 1, 1.3),
                side * 0.75,
            ),
            ((side * (p + 0.5), back + 14, h * 0.2), (side * (p - 1.0), lamina - 1, -h * 0.6), 4.2, (1, 0.9, 1.2)),
            (
                (side * (p - 1.5), lamina - 0.8, -h * 0.6),
                (side * (p - 2.4), lamina - 1.2, -h - 9),
                4.5 + 0.2 * below,
                (1.6, 1, 1.2),
                side * 0.8,
            ),
            # lamina
            ((side * (p - 1), lamina - 1.5, -h * 0.35), (0, lamina + 4, -h * 0.65), 3.0, (1, 1, 3.0)),
            # transverse process
            (
                (side * (p + 2), back + 9, h * 0.3),
                (side * (p + (24 if lumbar else 12)), back + 15, h * 0.35),
                3.2 + (1.5 if v.name == "L5" and a.variant == "sacralised L5" else 0),
                (1, 1, 1.5),
            ),
        ]
    centre = v.centre_mm
    if a.wide:
        if v.name in a.wide["laminectomy"]:
            pieces = [k for k in pieces if k[0][0] and k[1][0]]
        centre = centre + v.frame[:, 1] * v.shape.get("lysis_mm", 0)  # a broken arch stays behind
    _paint_bone(grid, centre, v.frame, pieces)


def _paint_sacral_arch(grid, a: Anatomy, v: Vertebra):
    back = v.depth_mm / 2
    if v.name not in ("S1", "S2", "S3"):
        return
    i = int(v.name[1])
    wide = a.canal_lr_mm / 2 * (1.1 - 0.2 * i)
    canal = a.canal_ap_mm * (1.0 - 0.22 * i)
    h = v.height_mm / 2
    pieces: list[tuple] = [((0, back + canal + 3, h * 0.5), (0, back + canal + 9 - 2 * i, -h * 0.5), 3.2, (1, 1, 1.4))]
    for side in (1, -1):
        pieces += [
            ((side * (wide + 5), back - 4, 0), (side * (wide + 5), back + canal * 0.7, 0), 4.5, (1, 1, 1.9)),
            ((side * (wide + 4), back + canal * 0.7, 0), (0, back + canal + 3, 0), 2.6, (1, 1, 3.2)),
        ]
        if i == 1:  # the articular processes for L5
            at = a.canal_lr_mm / 2 + 9.5
            pieces.append(
                ((side * at, back + 13, h * 0.4), (side * at, back + 14, h + 7), 3.9, (1.75, 1, 1.2), side * 0.8)
            )
    _paint_bone(grid, v.centre_mm, v.frame, pieces)


def canal_coordinates(anatomy: Anatomy, y_mm: np.ndarray, z_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LPS y, z (arrays of one shape) -> (s, v) in mm: the nearest point of the canal's path."""
    a = anatomy
    path, s_tab = a.path_mm, a.path_s_mm
    order = np.argsort(path[:, 2])
    s = np.interp(z_mm, path[order, 2], s_tab[order])
    d = np.gradient(path, s_tab, axis=0)
    d = ndimage.gaussian_filter1d(d, 6, axis=0, mode="nearest")
    norm = np.hypot(d[:, 1], d[:, 2])
    ty, tz = d[:, 1] / norm, d[:, 2] / norm
    for _ in range(6):
        dy = y_mm - np.interp(s, s_tab, path[:, 1])
        dz = z_mm - np.interp(s, s_tab, path[:, 2])
        s = s + 0.8 * (dy * np.interp(s, s_tab, ty) + dz * np.interp(s, s_tab, tz))
    dy = y_mm - np.interp(s, s_tab, path[:, 1])
    dz = z_mm - np.interp(s, s_tab, path[:, 2])
    # back = tangent turned by 90 degrees: (ty, tz) -> (-tz, ty)
    return s, -dy * np.interp(s, s_tab, tz) + dz * np.interp(s, s_tab, ty)


def _paint_canal(grid, a: Anatomy, noise):
    """Epidural fat, ligaments, sac with cord and roots, lateral recesses, foramina."""
    y, z = np.meshgrid(grid.axis_mm(1), grid.axis_mm(2), indexing="ij")
    s, v = canal_coordinates(a, y, z)
    near = (v > -16) & (v < 18) & (s > 5) & (s < a.disc_s_mm[4] + 85)
    j, k = np.nonzero(near)
    s, v = s[near].astype(np.float32), v[near].astype(np.float32)
    centre = np.interp(s, a.path_s_mm, a.path_mm[:, 0]).astype(np.float32)
    xs = grid.axis_mm(0)
    i = np.flatnonzero(np.abs(xs - centre.mean()) < 34)
    index = (i[:, None], j[None, :], k[None, :])
    u = xs[i][:, None] - centre[None, :]  # (nx, n)
    au = np.abs(u)
    sac = {name: value.astype(np.float32) for name, value in sac_section(a, s).items()}
    disc_near = np.max([_bump(s, c, 6.5) for c in a.disc_s_mm], 0).astype(np.float32)
    sacral = np.clip((s - a.disc_s_mm[4] - 12) / 8, 0, 1)
    ap, lr = a.canal_ap_mm / 2, a.canal_lr_mm / 2
    narrow = np.clip(1 - 0.012 * np.maximum(0, s - a.disc_s_mm[4] - 10), 0.3, 1)

    wide_u, wide_index = u, index
    core = au.min(1) < lr + 4
    u, au, index = u[core], au[core], (index[0][core], index[1], index[2])
    # The bony canal, lined with fat; deeper in the midline between the laminae.
    tent = np.maximum(0, 3.2 - 0.55 * au) * disc_near * (1 - sacral)
    d = np.hypot(u / (lr * narrow), np.where(v > 0, v / (ap * narrow + tent), v / (ap * narrow))) - 1
    d = d * ap
    d = np.where(v < -ap * narrow + 0.4, np.maximum(d, -v - ap * narrow), d)
    grid.lay(index, d, "fat")

    # Foramina: fat, then the root, both sides and every level; severity closes them.
    for level in range(5):
        for side, sign in ((0, 1), (1, -1)):
            _paint_foramen(grid, a, wide_index, sign * wide_u, v, s, level, a.severity[1 + side, level])

    # Yellow ligament and disc bulge: all that lies between the wall and the sac at disc level.
    roof = 0.30 * au + v  # lines parallel to the laminae
    thick = np.zeros_like(s)
    push = np.zeros_like(s)
    for level in range(5):
        c = a.severity[0, level]
        g = _bump(s, a.disc_s_mm[level], 5.0 + 0.6 * c)
        thick = np.maximum(thick, g * (2.6 + 1.2 * c))
        push = np.maximum(push, _bump(s, a.disc_s_mm[level], 3.4 + 0.8 * c) * (0.4 + 1.8 * c))
    outer = ap + 1.2
    gap = np.maximum(0, 1.9 - au) * 1.2  # the two halves meet loosely
    d = np.maximum(np.abs(roof - (outer - thick / 2)) - (thick / 2 - gap), au - lr - 1)
    grid.lay(index, np.where(disc_near > 0.3, d, 9), "flavum")
    bulge = v + ap + 0.3 - push * np.clip(1.25 - (au / (lr + 1)) ** 2, 0, 1)
    bulge = -_smooth_min(-bulge, lr - 0.5 - au, 5.0)  # round shoulders
    grid.lay(index, np.where(push > 0.15, bulge, 9), "annulus")
    rim = np.maximum(np.abs(bulge) - 0.5, au - lr + 2)
    grid.lay(index, np.where(disc_near > 0.05, rim, 9), "cortex", strength=0.8)

    for level in range(5):
        for side, sign in ((0, 1), (1, -1)):
            _paint_recess(grid, a, wide_index, sign * wide_u, v, s, level, a.severity[3 + side, level])

    # The sac: dura, CSF, and what floats in it.
    wide = np.where(u > 0, sac["left"], sac["right"])
    middle, half = (sac["front"] + sac["rear"]) / 2, (sac["rear"] - sac["front"]) / 2
    d = (_rounded(u / wide, ((v - middle) / half)[None, :]) - 1) * np.minimum(half, wide)
    d = np.where(s < a.disc_s_mm[4] + 54 + (a.wide["sac_end_mm"] if a.wide else 0), d, 9)
    grid.lay(index, d - 0.5, "flavum", strength=0.7)
    grid.lay(index, d, "csf")
    inside = (d < -0.2) & (sac["crowding"] > 0.03)
    grid.blend(index, np.where(inside, sac["crowding"], 0) * np.float32(0.95), "root")
    _paint_nerves(grid, a, index, u, v, s, sac, d)


def _paint_foramen(grid, a, index, u, v, s, level, severity):
    """u here is measured towards the foramen's side."""
    at = a.disc_s_mm[level]
    cols = np.abs(s - at) < 26
    rows = (u.max(1) > 8) & (u.min(1) < a.canal_lr_mm / 2 + 21)
    if not cols.any():
        return
    sub = (index[0][rows], index[1][:, cols], index[2][:, cols])
    u, v, s = u[np.ix_(rows, cols)], v[cols], s[cols]
    f = foramen_section(severity)
    ps, pv = s - (at + FORAMEN_RISE_MM), v - FORAMEN_V_MM
    upper = np.hypot(pv / f["upper_v"], ps / f["upper_s"]) - 1
    lower = np.hypot((pv + 0.8) / f["lower_v"], (ps - 8.5) / f["lower_s"]) - 1
    d = _smooth_min(upper * min(f["upper_v"], f["upper_s"]), lower * min(f["lower_v"], f["lower_s"]), 2.0)
    inner, outer = a.canal_lr_mm / 2 - 2.5, a.canal_lr_mm / 2 + 13.5
    tunnel = np.maximum(d, np.maximum(inner - u, u - outer))
    # What closes it is tissue of disc and joint capsule: dark on T1 and T2.
    healthy = foramen_section(0)
    full = np.hypot(pv / healthy["upper_v"], ps / healthy["upper_s"]) - 1
    full2 = np.hypot((pv + 0.8) / healthy["lower_v"], (ps - 8.5) / healthy["lower_s"]) - 1
    plug = np.minimum(full * 5, full2 * 4) + 9 * np.clip(np.abs(u - (inner + outer) / 2) / 8 - 0.35, 0, 2) ** 2
    grid.lay(sub, plug + 0.8 - 0.5 * min(severity, 3), "annulus")
    grid.lay(sub, tunnel, "fat")
    # The exiting root runs down and forward as it leaves.
    run = np.clip((u - inner) / 14, -0.3, 1.2)
    root = np.hypot((pv + 0.8 * run) / f["root_v"], (ps + 1.0 - 3.0 * (run - 0.5)) / f["root_s"]) - 1
    root = np.maximum(root * min(f["root_v"], f["root_s"]), np.maximum(inner - 1 - u, u - outer - 6))
    grid.lay(sub, root, "root")
    # Veins in the fat: two dots.
    for dv, ds in ((2.8, -4.5), (-3.0, 3.5)):
        vein = np.hypot(pv - dv * f["upper_v"] / 6.4, ps - ds) - 0.9
        grid.lay(sub, np.maximum(vein, tunnel + 1.2), "vein", strength=0.6)


def _paint_recess(grid, a, index, u, v, s, level, severity):
    """The corner where sac, disc and facet meet, with the traversing root."""
    at = a.disc_s_mm[level]
    cols = np.abs(s - at) < 16
    rows = (u.max(1) > 0) & (u.min(1) < RECESS_U_MM + 9)
    if not cols.any():
        return
    sub = (index[0][rows], index[1][:, cols], index[2][:, cols])
    u, v, s = u[np.ix_(rows, cols)], v[cols], s[cols]
    r = recess_section(severity)
    sac = sac_section(a, at)
    side_v = sac["front"] + 2.6
    g = np.clip((13 - np.abs(s - at)) / 4, 0, 1)
    # Dark tissue takes the recess; the fat that is left lies against the sac.
    plug = np.hypot((u - RECESS_U_MM - 1.2) / 5.8, (v - side_v + 0.9) / 5.6) - 1
    plug = np.where(g > 0.3, plug * 5.4, 9) + 1.2 * max(0, 1 - severity)
    if severity > 0.15:
        grid.lay(sub, plug, "annulus")
    free = np.hypot((u - RECESS_U_MM + 0.6 * severity) / r["u"], (v - side_v - 0.3 * severity) / r["v"]) - 1
    grid.lay(sub, np.where(g > 0.3, free * min(r["u"], r["v"]), 9), "fat")
    root_u = RECESS_U_MM - 0.2 - r["inward"] - 0.12 * (at - s)
    root = np.hypot(u - root_u, (v - side_v - r["backward"]) * 1.15) - r["root"]
    grid.lay(sub, np.where(g > 0.1, root, 9), "root")


def _paint_nerves(grid, a, index, u, v, s, sac, inside_mm):
    """Cord down to the conus, then the roots of the cauda equina, which lie behind."""
    middle, half = (sac["front"] + sac["rear"]) / 2, (sac["rear"] - sac["front"]) / 2
    thin = np.clip((a.conus_s_mm - s) / 30, 0, 1) ** 0.6
    cord = np.hypot(u / np.maximum(4.6 * thin, 0.2), (v - middle - 0.6) / np.maximum(3.9 * thin, 0.2)) - 1
    cord = np.where(thin > 0.02, cord, 9)
    grid.lay(index, cord * 3.5 * np.maximum(thin, 0.1), "cord")
    rng = np.random.default_rng(a.seed + 2)
    start = a.conus_s_mm - 45
    below = np.flatnonzero((s > start) & (np.abs(v) < half.max() + 1) & (s < a.disc_s_mm[4] + 50))
    rows = np.abs(u).min(1) < 11
    sub = (index[0][rows], index[1][:, below], index[2][:, below])
    u, v, s = u[np.ix_(rows, below)], v[below], s[below]
    middle, half = middle[below], half[below]
    wide = np.minimum(sac["left"], sac["right"])[below]
    inside = inside_mm[np.ix_(rows, below)]
    nearest = np.full(u.shape, 9, np.float32)
    down = np.clip((s - start) / 60, 0, 1)
    for side in (1, -1):
        for n in range(9):
            # Roots that leave lower lie nearer to the midline and further back.
            leaves = a.disc_s_mm[min(n, 4)] - 12 if n < 5 else a.disc_s_mm[4] + 40
            across = side * (0.82 - 0.085 * n + rng.normal(0, 0.03))
            depth = 0.35 + 0.055 * n - 0.25 * abs(across) + rng.normal(0, 0.09)
            wave = 0.05 * np.sin(s / rng.uniform(14, 30) + rng.uniform(0, 6))
            out = np.clip((s - leaves + 35) / 35, 0, 1) ** 2  # towards the exit
            ru = wide * (across + wave * 0.6) * (0.35 + 0.65 * down) + side * out * (
                wide * 0.85 - np.abs(across) * wide
            )
            rv = middle + half * ((depth + wave) * (0.3 + 0.7 * down) - out * 1.0)
            r = 0.85 + 0.15 * rng.random()
            d = np.hypot(u - ru, v - rv) - r
            nearest = np.minimum(nearest, np.where((s < leaves + 4), d, 9))
    grid.lay(sub, np.maximum(nearest, inside + 0.3), "root", strength=0.85)
