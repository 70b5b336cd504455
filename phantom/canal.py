"""The canal with its sac, roots, recesses and foramina, painted into a tissue grid: where severity shows.

May use: anatomy, grid.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .anatomy import (
    FORAMEN_RISE_MM,
    FORAMEN_V_MM,
    RECESS_U_MM,
    VERTEBRAE,
    Anatomy,
    foramen_section,
    gaussian_bump,
    recess_section,
    sac_section,
)
from .grid import Noise, TissueGrid, local_coordinates, oriented_bounds, paint_tube, rounded_radius, smooth_min


def paint_canal_extras(grid: TissueGrid, a: Anatomy) -> None:
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
        box = grid.box(*oriented_bounds(at, disc.frame, half + 3))
        if box is None:
            continue
        d = sum((k / np.float32(m)) ** 2 for k, m in zip(local_coordinates(grid, box, at, disc.frame), half))
        d = (np.sqrt(d) - 1) * np.float32(half.min())
        grid.lay(box, d.copy(), "cortex" if rim else "annulus")
        grid.lay(box, d + 1.0, "extruded" if disc.water > 0.2 else "annulus")
    for _ in range(a.wide["cysts"]):
        r = rng.uniform(3.5, 9)
        at = a.canal_to_lps(rng.choice([-1, 1]) * rng.uniform(5, 13), 0.0, a.disc_s_mm[4] + rng.uniform(32, 58))
        paint_tube(grid, at - (0, 0, 3), at + (0, 0, 3), r, "csf")
    if a.wide["filum_fat"]:
        s = np.arange(a.conus_s_mm + 20, a.disc_s_mm[4] + 30, 10)
        points = a.canal_to_lps(0.0 * s, 3.0 + 0 * s, s)
        for p, q in zip(points, points[1:]):
            paint_tube(grid, p, q, 1.0, "fat")


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


def paint_canal(grid: TissueGrid, a: Anatomy, noise: Noise) -> None:
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
    disc_near = np.max([gaussian_bump(s, c, 6.5) for c in a.disc_s_mm], 0).astype(np.float32)
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
        g = gaussian_bump(s, a.disc_s_mm[level], 5.0 + 0.6 * c)
        thick = np.maximum(thick, g * (2.6 + 1.2 * c))
        push = np.maximum(push, gaussian_bump(s, a.disc_s_mm[level], 3.4 + 0.8 * c) * (0.4 + 1.8 * c))
    outer = ap + 1.2
    gap = np.maximum(0, 1.9 - au) * 1.2  # the two halves meet loosely
    d = np.maximum(np.abs(roof - (outer - thick / 2)) - (thick / 2 - gap), au - lr - 1)
    grid.lay(index, np.where(disc_near > 0.3, d, 9), "flavum")
    bulge = v + ap + 0.3 - push * np.clip(1.25 - (au / (lr + 1)) ** 2, 0, 1)
    bulge = -smooth_min(-bulge, lr - 0.5 - au, 5.0)  # round shoulders
    grid.lay(index, np.where(push > 0.15, bulge, 9), "annulus")
    rim = np.maximum(np.abs(bulge) - 0.5, au - lr + 2)
    grid.lay(index, np.where(disc_near > 0.05, rim, 9), "cortex", strength=0.8)

    for level in range(5):
        for side, sign in ((0, 1), (1, -1)):
            _paint_recess(grid, a, wide_index, sign * wide_u, v, s, level, a.severity[3 + side, level])

    # The sac: dura, CSF, and what floats in it.
    wide = np.where(u > 0, sac["left"], sac["right"])
    middle, half = (sac["front"] + sac["rear"]) / 2, (sac["rear"] - sac["front"]) / 2
    d = (rounded_radius(u / wide, ((v - middle) / half)[None, :]) - 1) * np.minimum(half, wide)
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
    d = smooth_min(upper * min(f["upper_v"], f["upper_s"]), lower * min(f["lower_v"], f["lower_s"]), 2.0)
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
