"""Skin, fat, muscles, vessels and organs around the spine, painted into tissue grids.

May use: anatomy, grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage
from scipy.interpolate import PchipInterpolator

from .anatomy import VERTEBRAE, Anatomy
from .grid import TISSUE, Noise, TissueGrid, paint_tube

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


def paint_body(grid: TissueGrid, a: Anatomy, noise: Noise) -> None:
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


def _paint_wide_organs(grid, a, c, inside_mm):
    """Gut in more or less fat, pelvic and upper organs. inside_mm as in `_paint_organs`."""
    rng = np.random.default_rng((a.seed, 11))
    _paint_gut(grid, a, rng, inside_mm)
    _paint_pelvic_organs(grid, a, rng, inside_mm)
    _paint_upper_organs(grid, a, rng, inside_mm)


def _paint_ball(grid, inside_mm, centre, half, tissue, grow=0.0, wobble=0.0):
    """An ellipsoid of half axes `half` + grow, its surface uneven by `wobble` mm."""
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


def _paint_gut(grid, a, rng, inside_mm):
    """Walled tubes with changing contents, and the vessels of the mesentery."""
    l3, gap = a.vertebra("L3").centre_mm, a.wide["gap_mm"]
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
            paint_tube(grid, points[k], points[k + 1], radii[k], skin, inside_mm)
        for k in range(len(points) - 1):
            inner = content if rng.random() < 0.8 else str(rng.choice(["bowel", "air", "stool"]))
            paint_tube(grid, points[k], points[k + 1], radii[k] - wall, inner, inside_mm, gas)
    for _ in range(14):  # vessels of the mesentery
        p = l3 + (rng.uniform(-50, 50), 0, rng.uniform(-110, 110))
        p[1] = _front_of_spine(a, p[2]) - rng.uniform(15, 60)
        q = p + rng.normal(0, 1, 3) * (14, 12, 28)
        q[1] = min(q[1], _front_of_spine(a, q[2]) - 9)
        paint_tube(grid, p, q, rng.uniform(1.2, 3), str(rng.choice(["blood", "slow_blood", "muscle"])))


def _paint_pelvic_organs(grid, a, rng, inside_mm):
    """Bladder, womb, and the rectum along the sacrum."""
    s3 = a.vertebra("S3").centre_mm
    if rng.random() < 0.85:
        centre = s3 + (rng.normal(0, 6), rng.uniform(-95, -65), rng.uniform(-35, 15))
        half = rng.uniform((28, 16, 14), (45, 36, 40))
        _paint_ball(grid, inside_mm, centre, half, "muscle", 3)
        _paint_ball(grid, inside_mm, centre, half, "fluid")
    if a.wide["pelvis"] == "uterus":
        centre = s3 + (rng.normal(0, 8), rng.uniform(-58, -40), rng.uniform(-15, 15))
        half = rng.uniform((22, 14, 20), (30, 24, 38))
        _paint_ball(grid, inside_mm, centre, half, "uterus")
        _paint_ball(grid, inside_mm, centre, (half[0] * 0.4, 4.5, half[2] * 0.7), "muscle")
        _paint_ball(grid, inside_mm, centre, (half[0] * 0.3, 2.2, half[2] * 0.55), "fluid")
    r = rng.uniform(8, 17)
    away = r + rng.uniform(5, 16)
    line = [a.vertebra(n) for n in ("S2", "S3", "S4", "S5")]
    line = [v.centre_mm - v.frame[:, 1] * (v.depth_mm / 2 + away) for v in line]
    line = [line[0] + (rng.normal(0, 15), -rng.uniform(5, 25), 12), *line, line[-1] + (0, 4, -35)]
    for k in range(len(line) - 1):
        paint_tube(grid, line[k], line[k + 1], r, "vessel_wall")
    content = str(rng.choice(["stool", "air", "bowel", "fluid"], p=[0.4, 0.3, 0.2, 0.1]))
    for k in range(len(line) - 1):
        paint_tube(grid, line[k], line[k + 1], r * rng.uniform(0.6, 0.85), content if rng.random() < 0.75 else "air")


def _paint_upper_organs(grid, a, rng, inside_mm):
    """Liver, spleen, stomach and kidneys."""
    l1, l2 = (a.vertebra(name).centre_mm for name in ("L1", "L2"))
    _paint_ball(
        grid,
        inside_mm,
        l1 + (rng.uniform(-80, -55), rng.uniform(-90, -70), rng.uniform(30, 60)),
        (75, 80, rng.uniform(60, 85)),
        "liver",
        0.0,
        rng.uniform(3, 9),
    )
    _paint_ball(
        grid, inside_mm, l1 + (80, rng.uniform(-35, 0), rng.uniform(40, 70)), (32, 38, rng.uniform(35, 60)), "liver"
    )  # spleen
    if rng.random() < 0.6:
        centre = l1 + (rng.uniform(15, 60), rng.uniform(-95, -70), rng.uniform(20, 60))
        half = rng.uniform((25, 16, 18), (50, 30, 34))
        _paint_ball(grid, inside_mm, centre, half, "vessel_wall", 3)
        _paint_ball(grid, inside_mm, centre, half, str(rng.choice(["fluid", "air", "stool"])))
    for side in (1, -1):
        k = l2 + (side * rng.uniform(58, 72), rng.uniform(-12, 2), rng.uniform(-5, 25))
        size = rng.uniform(0.8, 1.15)
        _paint_ball(grid, inside_mm, k, np.array((25, 23, 50)) * size, "kidney")
        _paint_ball(grid, inside_mm, k + (-side * 12, -6, 0), (12, 9, 26), "fat")
        if rng.random() < 0.15:
            r = rng.uniform(5, 20)
            _paint_ball(grid, inside_mm, k + (side * 10, -8, rng.uniform(-40, 40)), (r, r, r), "fluid")


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
