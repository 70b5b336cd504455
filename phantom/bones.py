"""Bones, discs, ligaments and metal: what of an anatomy is hard, painted into tissue grids.

May use: anatomy, grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .anatomy import VERTEBRAE, Anatomy, Disc, Vertebra
from .grid import (
    Noise,
    TissueGrid,
    capsule_distance,
    local_coordinates,
    oriented_bounds,
    paint_tube,
    rounded_radius,
    smooth_min,
)


def _spinous(a, v, along):
    """LPS point on a spinous process: along = 0 at the lamina, 1 at the tip."""
    lamina = v.depth_mm / 2 + a.canal_ap_mm + 2.5 + v.shape.get("lysis_mm", 0)
    long = 26 * v.shape.get("process", 1)
    local = np.array([0, lamina + 4 + along * (long - 4), -v.height_mm / 2 * (0.55 + 0.3 * along)])
    return v.centre_mm + v.frame @ local


def paint_ligaments(grid: TissueGrid, a: Anatomy) -> None:
    """Between the spinous processes and along their tips."""
    line = [v for v in a.vertebrae if v.name[0] in "TL"]
    for v, w in zip(line, line[1:]):
        p, q = _spinous(a, v, 0.5), _spinous(a, w, 0.45)
        box = grid.box(np.minimum(p, q) - (4, 12, 3), np.maximum(p, q) + (4, 12, 3))
        if box is not None:
            d = capsule_distance(grid.coordinates(box), p, q, 1.0, (1.8, 9.0, 9.0))
            grid.lay(box, d, "flavum", strength=a.wide["ligament"])
        paint_tube(grid, _spinous(a, v, 1), _spinous(a, w, 1), 1.7, "flavum")


def paint_scar(grid: TissueGrid, a: Anatomy) -> None:
    """What fills the place of a removed arch, and the cut to the skin."""
    for name in a.wide["laminectomy"]:
        v = a.vertebra(name)
        at = _spinous(a, v, 0.3)
        box = grid.box(at - (16, 20, 24), at + (16, 20, 24))
        if box is not None:
            d = capsule_distance(grid.coordinates(box), at - (0, 3, 3), at + (0, 3, -3), 1.0, (12, 8, 14))
            grid.lay(box, d + 1.2 * np.sin(at[1] + 0.5 * sum(grid.coordinates(box))), "scar", strength=0.8)
        paint_tube(grid, at, at + (0, 60, -6), 2.2, "scar", strength=0.7)


def paint_metal(grid: TissueGrid, a: Anatomy) -> None:
    """Pedicle screws, rods and cages: a void larger than the thing, with a bright rim."""
    names = a.wide["screws"]
    if not names:
        return
    rng = np.random.default_rng((a.seed, 14))
    bloom = rng.uniform(0, 4)
    pieces: list[tuple] = []
    heads: dict[int, list] = {1: [], -1: []}
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
        paint_tube(grid, p, q, r + bloom + 1.5, "metal_rim", strength=0.55)
    for p, q, r in pieces:
        paint_tube(grid, p, q, r + bloom, "metal")


def _paint_bone(grid, centre, frame, pieces, marrow="marrow", smooth_mm=2.5, shell_mm=1.0):
    """Union of capsules [(p, q, radius, scale), ...] in a local frame: cortex and marrow."""
    lows, highs = [], []
    boxes = []
    for p, q, r, scale, *turn in pieces:
        pad = r * (np.full(3, max(scale)) if turn else np.array(scale)) + 3
        lo, hi = np.minimum(p, q) - pad, np.maximum(p, q) + pad
        low, high = oriented_bounds(centre + frame @ ((lo + hi) / 2), frame, (hi - lo) / 2)
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
        d = capsule_distance(local_coordinates(grid, box, centre, frame), p, q, r, scale, *turn)
        inner = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(box, whole))
        distance[inner] = smooth_min(distance[inner], d, smooth_mm)
    grid.lay(whole, distance, "cortex")
    grid.lay(whole, distance + shell_mm, marrow)


def paint_pelvis(grid: TissueGrid, a: Anatomy) -> None:
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
    return rounded_radius(p, q)


def paint_disc(grid: TissueGrid, a: Anatomy, disc: Disc, noise: Noise) -> None:
    if a.wide:
        return _paint_wide_disc(grid, a, disc, noise)
    half = (disc.width_mm / 2 + 5, disc.depth_mm / 2 + 5, disc.height_mm / 2 + 6)
    box = grid.box(*oriented_bounds(disc.centre_mm, disc.frame, half))
    if box is None:
        return
    x, y, z = local_coordinates(grid, box, disc.centre_mm, disc.frame)
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
    box = grid.box(*oriented_bounds(disc.centre_mm, disc.frame, half))
    if box is None:
        return
    x, y, z = local_coordinates(grid, box, disc.centre_mm, disc.frame)
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
    d = -smooth_min(-radial, -plates, s["round_mm"])
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


def paint_vertebra(grid: TissueGrid, a: Anatomy, v: Vertebra, noise: Noise, kept: np.ndarray | None = None) -> None:
    """Body with end plates, waist, vein; then the arch with its processes. kept: mask (grid) that
    gets the body's voxels, wide variety only."""
    half: Any = (v.width_mm / 2 + 3, v.depth_mm / 2 + 3, v.height_mm / 2 + 5)
    if a.wide:
        lip = max([max(k) for k in v.shape["lips"].values()], default=0)
        half = np.add(half, (lip, lip, 0.4 * lip + v.depth_mm / 2 * abs(np.tan(v.wedge / 2)) - 3))
    box = grid.box(*oriented_bounds(v.centre_mm, v.frame, half))
    sacral = v.name[0] == "S"
    if a.wide and box is not None:
        _paint_wide_body(grid, a, v, noise, box, local_coordinates(grid, box, v.centre_mm, v.frame), kept)
    elif box is not None:
        x, y, z = local_coordinates(grid, box, v.centre_mm, v.frame)
        h = v.height_mm / 2
        rho = _outline(x, y, v.depth_mm, v.width_mm)
        waist = 1 - v.shape["waist"] * np.clip(1 - (z / h) ** 2, 0, 1) * np.where(y > 0, 0.55, 1)
        radial = (rho - waist) * (v.depth_mm / 2)
        dip = v.shape["concave_mm"] * np.clip(1 - rho * rho, 0, 1)
        slant = y * np.float32(np.tan(v.wedge / 2))
        top = z - (h - slant - dip)
        bottom = -z - (h - slant - dip)
        d = -smooth_min(-radial, -np.maximum(top, bottom), 1.8)
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
