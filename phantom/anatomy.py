"""Anatomy: vertebrae, discs and the canal's path, as parameters in patient space.

Canal coordinates (u, v, s): u = left of the canal's middle, v = behind it, s = distance along it from the head
downwards, all in mm.

May use: nothing of the kit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.interpolate import CubicSpline

VERTEBRAE = ("T8", "T9", "T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5", "S1", "S2", "S3", "S4", "S5")
TRUTH_VERTEBRAE = VERTEBRAE[2:12]


@dataclass
class Vertebra:
    """A vertebral body. frame columns: left, back, head (unit vectors in LPS)."""

    name: str
    centre_mm: np.ndarray
    frame: np.ndarray
    depth_mm: float  # front to back
    width_mm: float  # left to right
    height_mm: float  # in the middle of the body
    wedge: float  # radians; positive: taller in front
    shape: dict = field(default_factory=dict)

    def corners_mm(self) -> np.ndarray:
        """Mid-sagittal corners (4, 3) in LPS: anterior-superior, posterior-superior,
        posterior-inferior, anterior-inferior."""
        h, d, t = self.height_mm / 2, self.depth_mm / 2, np.tan(self.wedge / 2)
        local = np.array([[0, -d, h + d * t], [0, d, h - d * t], [0, d, -h + d * t], [0, -d, -h - d * t]])
        return self.centre_mm + local @ self.frame.T


@dataclass
class Disc:
    """The disc below vertebra `above`."""

    above: str
    centre_mm: np.ndarray
    frame: np.ndarray
    depth_mm: float
    width_mm: float
    height_mm: float
    water: float  # 1 young nucleus, 0 black disc
    shape: dict = field(default_factory=dict)


@dataclass
class Anatomy:
    """Everything that `paint` needs. severity is (condition, level) in grade units."""

    vertebrae: list
    discs: list
    severity: np.ndarray
    path_mm: np.ndarray  # canal middle, (n, 3) LPS, every 0.5 mm from head to tail
    path_s_mm: np.ndarray  # (n,) distance along it
    disc_s_mm: np.ndarray  # (5,) s of the five graded discs
    canal_ap_mm: float
    canal_lr_mm: float
    conus_s_mm: float
    variant: str
    body: dict
    seed: int
    wide: dict = field(default_factory=dict)  # what only the wide variety has; empty in the standard one

    def vertebra(self, name: str) -> Vertebra:
        return next(v for v in self.vertebrae if v.name == name)

    def disc(self, level: int) -> Disc:
        """The graded disc of level index 0 (L1/L2) .. 4 (L5/S1)."""
        return next(d for d in self.discs if d.above == f"L{level + 1}")

    def canal_to_lps(self, u_mm: ArrayLike, v_mm: ArrayLike, s_mm: ArrayLike) -> np.ndarray:
        """Canal coordinates -> LPS (..., 3)."""
        c, t = self._at(s_mm)
        back = np.stack([np.zeros_like(t[..., 0]), -t[..., 2], t[..., 1]], -1)
        left = np.array([1.0, 0, 0])
        return c + np.asarray(u_mm)[..., None] * left + np.asarray(v_mm)[..., None] * back

    def _at(self, s_mm):
        s = np.asarray(s_mm, float)
        c = np.stack([np.interp(s, self.path_s_mm, self.path_mm[:, k]) for k in range(3)], -1)
        d = np.gradient(self.path_mm, self.path_s_mm, axis=0)
        t = np.stack([np.interp(s, self.path_s_mm, d[:, k]) for k in range(3)], -1)
        t[..., 0] = 0  # bending to the side is small: sections stay sagittal
        return c, t / np.linalg.norm(t, axis=-1, keepdims=True)

    def points_mm(self) -> dict:
        """What a reader marks: {(condition index, level index): LPS (3,)}."""
        points = {}
        for level in range(5):
            s = self.disc_s_mm[level]
            sac = sac_section(self, s)
            points[0, level] = self.canal_to_lps(0.0, (sac["front"] + sac["rear"]) / 2, s)
            for side, sign in ((0, 1), (1, -1)):
                points[1 + side, level] = self.canal_to_lps(sign * 18.0, FORAMEN_V_MM, s + FORAMEN_POINT_MM)
                points[3 + side, level] = self.canal_to_lps(sign * RECESS_U_MM, sac["front"] + 3.0, s)
        return points


def turned_frame(sagittal: float, coronal: float, axial: float) -> np.ndarray:
    """Columns left, back, head; sagittal > 0: the head end leans forward. Radians."""
    c, s = np.cos(sagittal), np.sin(sagittal)
    r = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    c, s = np.cos(coronal), np.sin(coronal)
    q = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    c, s = np.cos(axial), np.sin(axial)
    return q @ r @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


#            T8   T9   T10  T11  T12  L1   L2   L3   L4   L5   S1   S2   S3   S4   S5
_HEIGHT = [21.0, 22.0, 23.0, 24.5, 26.0, 27.0, 28.0, 28.0, 27.5, 27.0, 27.0, 23.0, 19.0, 16.0, 13.0]
_DEPTH = [27.0, 28.0, 29.0, 30.0, 31.0, 32.0, 33.0, 34.0, 34.5, 34.0, 30.0, 21.0, 15.0, 12.0, 9.0]
_WIDTH = [30.0, 32.0, 34.0, 37.0, 40.0, 42.0, 44.0, 46.0, 48.0, 50.0, 48.0, 38.0, 32.0, 28.0, 24.0]
_WEDGE = [-4.0, -4.0, -4.0, -4.0, -3.0, -2.0, -1.0, 1.0, 3.0, 8.0, 7.0, 4.0, 2.0, 0.0, 0.0]  # degrees
_DISC = [4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 9.0, 10.0, 10.5, 9.5, 2.5, 1.0, 0.5, 0.5]  # below each
_DISC_WEDGE = [0.0, 0.0, 1.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, -8.0, -10.0, -12.0, -12.0]


S1, T11, L1 = (VERTEBRAE.index(name) for name in ("S1", "T11", "L1"))


@dataclass
class _Spine:
    """The measures of a spine before it stands in space, to be drawn and varied; arrays are changed in place.

    Arrays have an entry for each of VERTEBRAE, those of discs for each disc below one; mm and radians.
    """

    height: np.ndarray
    depth: np.ndarray
    width: np.ndarray
    wedge: np.ndarray
    disc_h: np.ndarray
    disc_w: np.ndarray
    water: np.ndarray  # of the discs
    coronal: np.ndarray
    axial: np.ndarray
    slope: float  # of S1's upper end plate
    slip: np.ndarray  # of all that stands on a disc
    bodies: list[dict]  # shapes that the wide variety adds
    discs: list[dict]


def _chord(spine: _Spine, top: int) -> float:
    """Angle of the chord from S1 to body `top` for a slope of 0 (radians, forward positive)."""
    tilt, y, z = 0.0, 0.0, 0.0
    for i in range(S1 - 1, top - 1, -1):
        for long, turn in ((spine.disc_h[i], spine.disc_w[i]), (spine.height[i], spine.wedge[i])):
            y, z = y + long * np.sin(tilt - turn / 2), z + long * np.cos(tilt - turn / 2)
            tilt -= turn
    return np.arctan2(y, z)


def _vary_spine(w: np.random.Generator, spine: _Spine, size: float) -> None:
    """Spread a spine's measures as far as people's; `size` multiplies them."""
    usual = spine.slope + _chord(spine, T11 + 1)
    curve = _vary_measures(w, spine, size)
    old = np.clip(w.normal(0.5, 0.3), 0, 1)
    spine.bodies, spine.discs = _usual_shapes(w)
    _wear_discs(w, spine, old)
    _break_bodies(w, spine)
    _mark_end_plates(w, spine, old)
    _vary_marrow(w, spine)
    _slip_bodies(w, spine, size)
    _bend_sideways(w, spine)
    _lay_on_table(w, spine, usual, curve)


def _vary_measures(w, spine: _Spine, size):
    """Sizes, curves and the sacrum. Returns the factor on the lumbar curve."""
    n = len(VERTEBRAE)
    height, depth, width, wedge = spine.height, spine.depth, spine.width, spine.wedge
    disc_h, disc_w = spine.disc_h, spine.disc_w
    for array, spread, each in ((height, 0.07, 0.035), (depth, 0.06, 0.025), (width, 0.06, 0.03)):
        array *= size * np.exp(w.normal(0, spread)) * w.normal(1, each, n)
    disc_h *= size * np.exp(w.normal(0, 0.17)) * w.normal(1, 0.12, n - 1)
    kind = w.choice(4, p=[0.45, 0.22, 0.1, 0.23])  # usual, flat, kyphotic, hollow back
    curve = w.uniform(*((0.75, 1.2), (0.25, 0.75), (-0.2, 0.25), (1.2, 1.5))[kind])
    base_w, base_d = np.radians(_WEDGE), np.radians(_DISC_WEDGE)
    up = slice(0, S1)
    # The lowest levels stay hollow in a flat back, too: the sacrum always slopes.
    part = np.full(n, curve)
    part[S1 - 2 : S1] = max(curve, w.uniform(0.6, 1.0))
    wedge[up] = base_w[up] * np.where(base_w[up] > 0, np.clip(part[up], 0.4, 1.4), 1)
    wedge += w.normal(0, np.radians(1.8), n)
    disc_w[up] = base_d[up] * part[up] + w.normal(0, np.radians(2), S1)
    if kind == 2:
        wedge[T11 : L1 + 2] -= np.radians(w.uniform(0, 4))
    # The sacrum: its curve, and the angle and height of the remnant below S1.
    bend = w.uniform(0.2, 2.0)
    wedge[S1:] = base_w[S1:] + w.normal(0, np.radians(2), n - S1)
    disc_w[S1:] = base_d[S1:] * bend + w.normal(0, np.radians(3), n - 1 - S1)
    disc_w[S1] += w.normal(0, np.radians(7))
    height[S1:] *= w.uniform(0.88, 1.15)
    depth[S1 + 1 :] *= w.uniform(0.85, 1.3)
    remnant = w.random()
    disc_h[S1] = w.uniform(0.3, 1.2) if remnant < 0.25 else w.uniform(1.2, 3.5) if remnant < 0.75 else w.uniform(3.5, 7)
    disc_h[S1 + 1] *= w.uniform(0.4, 2.5)
    return curve


def _usual_shapes(w):
    """Shapes of healthy bodies and discs: two lists of dicts."""
    n = len(VERTEBRAE)
    bodies = [
        dict(
            waist=w.uniform(0.02, 0.17),
            rear_waist=w.uniform(0.2, 0.8),
            hollow=w.uniform(0.0, 0.12),
            concave_mm=w.uniform(0.3, 3.0),
            modic=0.0,
            top=w.uniform(0.5, 1.4),
            bottom=w.uniform(0.5, 1.4),
            rearward=w.uniform(-0.1, 0.7),
            round_mm=w.uniform(1.0, 2.6),
            shell_mm=w.uniform(0.35, 1.3),
            lips={},
            nodes=[],
            bands=[],
            spots=[],
            base="marrow",
            mix=0.0,
            process=w.uniform(0.75, 1.15),
        )
        for _ in range(n)
    ]
    discs = [
        dict(
            slip=0.0,
            over_mm=w.uniform(-0.8, 1.6),
            fill=w.uniform(0.6, 0.95),
            cleft=w.choice([0, w.uniform(0.2, 0.9)]),
            gas=False,
            zone=False,
            hernia=None,
            fused=False,
            reach=5.5,
        )
        for _ in range(n - 1)
    ]
    return bodies, discs


def _wear_discs(w, spine: _Spine, old):
    """Discs dry out, sink, herniate or fuse. old: 0 young to 1."""
    n = len(VERTEBRAE)
    disc_h, disc_w, water, discs = spine.disc_h, spine.disc_w, spine.water, spine.discs
    dark = w.random()
    if dark < 0.12:
        water[:] = w.uniform(0.0, 0.2)
    elif dark < 0.26:
        water[:] = w.uniform(0.8, 1.2, n - 1)
    elif dark < 0.8:
        some = w.random(n - 1) < 0.6
        water[some] = w.uniform(0, 1.15, some.sum())
    low = S1 - 3  # L3/4 and below carry most of the wear
    for i in range(2, S1):
        worn = (0.05 + 0.13 * (i >= low)) * (0.4 + 1.2 * old)
        draw = w.random()
        if draw < worn:
            disc_h[i] = w.uniform(1.0, 3.5)
            water[i] = w.uniform(0, 0.25)
            discs[i]["gas"] = w.random() < 0.35
            discs[i]["over_mm"] = w.uniform(0, 3)
        elif draw < worn + 0.15:
            disc_h[i] *= w.uniform(0.5, 0.8)
        discs[i]["zone"] = w.random() < 0.12
        if i >= L1 - 1 and w.random() < 0.13:
            discs[i]["hernia"] = (
                w.uniform(3, 7.5),
                w.uniform(2.5, 8),
                w.normal(0, 5),
                w.normal(0, 5),
                w.random() < 0.5,
            )
    if w.random() < 0.05:
        i = int(w.integers(T11, S1 - 1))
        discs[i].update(fused=True, gas=False, zone=False, hernia=None)
        disc_h[i] = w.uniform(0.8, 2.0)
        disc_w[i] *= 0.3


def _break_bodies(w, spine: _Spine):
    """Bodies lose height: wedge (front only), biconcave (middle only), plana (everywhere)."""
    height, depth, wedge, bodies = spine.height, spine.depth, spine.wedge, spine.bodies
    if w.random() < 0.28:
        p = np.array([0, 0, 0.3, 0.8, 1.5, 1.6, 1.2, 1.0, 0.8, 0.6])
        for i in w.choice(10, int(w.integers(1, 3)), replace=False, p=p / p.sum()):
            loss, tall = w.uniform(0.15, 0.5), height[i]
            how = w.choice(3, p=[0.5, 0.3, 0.2])
            if how == 0:
                height[i] = tall * (1 - loss / 2)
                wedge[i] = -2 * np.arctan(loss * tall / (2 * depth[i]))
            elif how == 1:
                height[i] = tall * w.uniform(0.9, 1)
                bodies[i]["concave_mm"] = loss * tall * 0.45
            else:
                height[i] = tall * (1 - loss)
                depth[i] *= 1 + 0.2 * loss
            if w.random() < 0.4:
                bodies[i]["bands"].append(("oedema", "top", w.uniform(5, 25), 0.0, w.uniform(0.5, 0.95)))
            elif w.random() < 0.4:
                bodies[i]["bands"].append(("sclerosis", "top", w.uniform(1.5, 4), 0.0, w.uniform(0.4, 0.9)))
    if w.random() < 0.12:  # soft bones: every end plate gives way
        for b in bodies[:S1]:
            b["concave_mm"] = w.uniform(2.5, 6.0)
    for b in bodies[S1:]:
        b["concave_mm"] = min(b["concave_mm"], 1.0)


def _mark_end_plates(w, spine: _Spine, old):
    """Nodes, lips and bands at the end plates. old: 0 young to 1."""
    bodies, water = spine.bodies, spine.water
    scheuermann = w.random() < 0.12
    lipped = w.choice([0.0, 0.25, 0.7], p=[0.45, 0.35, 0.2]) * (0.3 + old)
    for i in range(S1):
        for b, end in ((bodies[i], "bottom"), (bodies[i + 1], "top")):
            if i + 1 < S1 or end == "bottom":
                for _ in range(1 + int(w.random() < 0.25)):
                    if w.random() < (0.35 if scheuermann and i < L1 + 3 else 0.035):
                        b["nodes"].append((end, w.normal(0, 6), w.normal(0, 5), w.uniform(2, 4.5), w.uniform(2, 6)))
            if w.random() < lipped * (1.5 if water[i] < 0.3 else 0.6):
                b["lips"][end] = (w.uniform(1, 6) * w.choice([0.3, 1]), w.uniform(0, 2.5) * (w.random() < 0.5))
        if w.random() < (0.26 if water[i] < 0.4 else 0.07):
            tissue = str(w.choice(["oedema", "fatty_marrow", "sclerosis"], p=[0.3, 0.5, 0.2]))
            bias, strength = w.normal(0, 0.8), w.uniform(0.4, 0.95)
            for b, end in ((bodies[i], "bottom"), (bodies[i + 1], "top")):
                if w.random() < 0.85:
                    b["bands"].append((tissue, end, w.uniform(2.5, 13), bias, strength))


def _vary_marrow(w, spine: _Spine):
    """Marrow: one kind for all bodies, each a little different, some with spots."""
    base = str(w.choice(["marrow", "red_marrow", "fatty_marrow"], p=[0.6, 0.25, 0.15]))
    mix, spread = w.uniform(0.0, 0.6), w.uniform(0.01, 0.12)
    many = w.random() < 0.05
    for b in spine.bodies:
        b["base"], b["mix"] = base, mix + w.normal(0, spread)
        if w.random() < 0.025:
            b["base"], b["mix"] = str(w.choice(["lesion", "oedema", "sclerosis"])), 0.0
        for tissue, chance in (("haemangioma", 0.07), ("fatty_marrow", 0.12), ("lesion", 0.5 if many else 0.035)):
            if w.random() < chance:
                r = w.uniform(2.5, 9)
                b["spots"].append((tissue, *w.uniform(-0.6, 0.6, 3), r, w.uniform(0.6, 1)))


def _slip_bodies(w, spine: _Spine, size):
    """Slips forwards at the lowest discs, backwards above, with what they do to arch and disc."""
    up = slice(0, S1)
    disc_h, disc_w, depth, slip = spine.disc_h, spine.disc_w, spine.depth, spine.slip
    bodies, discs, water = spine.bodies, spine.discs, spine.water
    # A disc cannot be thinner than nothing on its narrow side.
    limit = 2 * np.arctan(0.85 * np.maximum(disc_h, 0.4) / np.minimum(depth[:-1], depth[1:]))
    disc_w[up] = np.clip(disc_w, -limit, limit)[up]
    if w.random() < 0.2:
        slip[S1 - 2 + int(w.random() < 0.45)] = w.uniform(3, 12) * size
    for i in range(L1, S1):
        if slip[i] == 0 and w.random() < 0.06:
            slip[i] = -w.uniform(2, 4)
        discs[i]["slip"] = slip[i]
        bodies[i]["lysis_mm"] = 0.8 * slip[i] if slip[i] > 6 and w.random() < 0.7 else 0.0
        if slip[i] > 4:
            water[i] = min(water[i], w.uniform(0, 0.5))


def _bend_sideways(w, spine: _Spine):
    """Scoliosis, whose bodies turn with the curve; and how far a disc reaches into the dips of its end plates."""
    n = len(VERTEBRAE)
    bodies, discs = spine.bodies, spine.discs
    if w.random() < 0.35:
        cobb = np.radians(w.uniform(6, 25)) * w.choice([-1, 1])
        apex, span = w.uniform(L1 - 1, L1 + 3), w.uniform(2.5, 4.5)
        at = (np.arange(n) - apex) / span
        spine.coronal += 0.82 * cobb * at * np.exp(0.5 - at * at / 2) * (np.arange(n) <= S1)
        spine.axial += cobb * w.uniform(0.2, 0.7) * np.exp(-at * at / 2)
    spine.coronal += np.radians(w.normal(0, 2.5))
    for i in range(n - 1):
        dips = [bodies[k]["concave_mm"] * 1.4 + max([q[4] for q in bodies[k]["nodes"]], default=0) for k in (i, i + 1)]
        discs[i]["reach"] = max(dips) + 1.5
        discs[i]["dip"] = (
            bodies[i]["concave_mm"] * bodies[i]["bottom"],
            bodies[i + 1]["concave_mm"] * bodies[i + 1]["top"],
        )


def _lay_on_table(w, spine: _Spine, usual, curve):
    """Lying on the table, the chord of the lumbar spine is nearly level whatever its curve: that gives S1's slope."""
    n = len(VERTEBRAE)
    up = slice(0, S1)
    disc_w, wedge = spine.disc_w, spine.wedge
    usual, most = usual * np.clip(0.2 + 0.7 * curve, 0.1, 1.1) + np.radians(w.normal(0, 3.5)), w.uniform(48, 56)
    while usual - _chord(spine, T11 + 1) > np.radians(most):  # no sacrum lies flat
        disc_w[up] -= np.radians(0.5)
    spine.slope = max(usual - _chord(spine, T11 + 1), np.radians(w.uniform(12, 22)))
    tilt = spine.slope
    for i in range(S1, n - 1):
        tilt += wedge[i]
        disc_w[i] = min(disc_w[i], np.radians(62) - tilt)
        tilt += disc_w[i]


def _vary_rest(w, ahead_mm, body):
    """What surrounds the spine in the wide variety; changes `body` in place. ahead_mm: how far the
    foremost body lies in front of the canal."""
    back = float(np.clip(np.exp(w.normal(np.log(15), 0.75)), 4, 70))
    side = w.uniform(5, 16) + 0.5 * back
    visceral = w.uniform(45, 120)
    body.update(
        fat_back_mm=back,
        fat_side_mm=side,
        half_width_mm=w.uniform(135, 185),
        half_depth_mm=(50 + back + ahead_mm + visceral + 12 + side) / 2,
        muscle=np.clip(w.normal(0.97, 0.13), 0.65, 1.25),
        infiltration=w.choice([w.uniform(0, 0.2), w.uniform(0.2, 1), w.uniform(1, 2.2)], p=[0.3, 0.5, 0.2]),
    )
    first = int(w.integers(L1 + 1, S1))
    last = min(S1, first + int(w.integers(1, 3)))
    operated = w.random()
    return dict(
        sac_end_mm=w.normal(0, 13),
        lipomatosis=w.uniform(0.2, 0.5) if w.random() < 0.1 else 0.0,
        filum_fat=bool(w.random() < 0.1),
        cysts=int(w.choice([0, 1, 2, 3], p=[0.88, 0.06, 0.04, 0.02])),
        laminectomy=list(VERTEBRAE[first:last]) if 0.07 < operated < 0.2 else [],
        screws=list(VERTEBRAE[first : last + 1]) if operated < 0.1 else [],
        cage=bool(w.random() < 0.5),
        gap_mm=min(w.uniform(3, 40) * w.choice([0.4, 1]), 0.4 * visceral),
        visceral_mm=visceral,
        loops=int(w.integers(40, 120)),
        grain=(w.uniform(0.02, 0.1), w.uniform(0.0, 0.45) ** 2, w.uniform(0, 0.14), w.uniform(1.5, 4.5)),
        haze=w.uniform(0.0, 0.35),
        shift_mm=tuple(w.permutation([np.clip(w.normal(0, 0.4), -0.6, 0.6), 0.0])),
        vein=(w.uniform(0.8, 2.4), w.uniform(0.0, 3.0), w.uniform(0.2, 1.0)),
        pelvis=str(w.choice(["uterus", "none"])),
        ligament=w.uniform(0.3, 1.0),
    )


def _draw_spine(
    rng: np.random.Generator, severity: np.ndarray, transitional: float
) -> tuple[_Spine, float, float, str]:
    """The measures of a mostly healthy adult's spine; also size (1 usual), age (0 young to 1) and variant."""
    n = len(VERTEBRAE)
    size = rng.normal(1, 0.06)
    variant = "none"
    if rng.random() < transitional:
        variant = str(rng.choice(["sacralised L5", "lumbarised S1"]))
    age = np.clip(rng.normal(0.45, 0.22), 0, 1)
    height = np.array(_HEIGHT) * size * rng.normal(1, 0.025, n)
    depth = np.array(_DEPTH) * size * rng.normal(1, 0.02, n)
    width = np.array(_WIDTH) * size * rng.normal(1, 0.02, n)
    lordosis = np.clip(rng.normal(0.92, 0.15), 0.6, 1.25)
    wedge = np.radians(np.array(_WEDGE) * np.where(np.array(_WEDGE) > 0, lordosis, 1) + rng.normal(0, 1.0, n))
    disc_h = np.array(_DISC) * size * rng.normal(1, 0.07, n - 1)
    disc_w = np.radians(np.array(_DISC_WEDGE) * lordosis + rng.normal(0, 1.0, n - 1))

    # Discs dry out and sink with age and with the disease of their level.
    water = np.clip(rng.normal(1.05 - 0.75 * age, 0.13, n - 1), 0.02, 1)
    for level in range(5):
        disease = 0.45 * severity[0, level] + 0.3 * severity[1:3, level].mean() + 0.3 * severity[3:5, level].mean()
        water[L1 + level] = np.clip(water[L1 + level] - 0.33 * disease, 0.02, 1)
        disc_h[L1 + level] *= 1 - 0.12 * min(disease, 3) - 0.08 * (water[L1 + level] < 0.25)
    if variant == "sacralised L5":
        disc_h[VERTEBRAE.index("L5")] = 3.5 * size
        disc_w[VERTEBRAE.index("L5")] *= 0.3
    if variant == "lumbarised S1":
        disc_h[S1] = 7.5 * size
        disc_w[S1] = np.radians(5)
        depth[S1] *= 1.06
        depth[VERTEBRAE.index("S2")] *= 1.2

    coronal = np.radians(
        rng.normal(0, 1.6) * np.sin(np.linspace(0, np.pi * rng.uniform(1, 2.2), n) + rng.uniform(0, 6))
        + rng.normal(0, 0.8)
    )
    axial = np.radians(rng.normal(0, 2)) + coronal * rng.normal(0, 0.5)
    pose = np.radians(rng.normal(0, 2.5))
    slope = np.radians(38 * lordosis - 4.5 + rng.normal(0, 3)) + pose
    spine = _Spine(
        height,
        depth,
        width,
        wedge,
        disc_h,
        disc_w,
        water,
        coronal,
        axial,
        slope,
        np.zeros(n - 1),
        [{}] * n,
        [{}] * (n - 1),
    )
    return spine, size, age, variant


def _stack(spine: _Spine) -> tuple[list[tuple], list[tuple]]:
    """Stand bodies and discs on S1's upper end plate, which is the origin: upwards to T8, downwards to S5.

    Returns (centre (3,), frame (3, 3)) of each body, and of each disc.
    """
    n = len(VERTEBRAE)
    height, depth, wedge, disc_h, disc_w = spine.height, spine.depth, spine.wedge, spine.disc_h, spine.disc_w
    coronal, axial, slope, slip = spine.coronal, spine.axial, spine.slope, spine.slip
    vertebrae: list[Any] = [None] * n
    discs: list[Any] = [None] * (n - 1)
    point, tilt = np.zeros(3), slope
    for i in range(S1 - 1, -1, -1):
        f = turned_frame(tilt - disc_w[i] / 2, coronal[i], axial[i])
        if slip[i]:  # all that stands on this disc goes along
            discs[i] = (point + f[:, 2] * disc_h[i] / 2 - f[:, 1] * slip[i] / 2, f)
            point = point - f[:, 1] * slip[i]
        else:
            discs[i] = (point + f[:, 2] * disc_h[i] / 2, f)
        point, tilt = point + f[:, 2] * disc_h[i], tilt - disc_w[i]
        f = turned_frame(tilt - wedge[i] / 2, coronal[i], axial[i])
        vertebrae[i] = (point + f[:, 2] * height[i] / 2, f)
        point, tilt = point + f[:, 2] * height[i], tilt - wedge[i]
    point, tilt = np.zeros(3), slope
    for i in range(S1, n):
        f = turned_frame(tilt + wedge[i] / 2, coronal[i], axial[i])
        # The sacrum tapers: each front face steps back, rear walls stay in line.
        vertebrae[i] = (point - f[:, 2] * height[i] / 2, f)
        point, tilt = point - f[:, 2] * height[i], tilt + wedge[i]
        if i < n - 1:
            f = turned_frame(tilt + disc_w[i] / 2, coronal[i], axial[i])
            discs[i] = (point - f[:, 2] * disc_h[i] / 2, f)
            point = point - f[:, 2] * disc_h[i] + f[:, 1] * (depth[i] - depth[i + 1]) / 2
            tilt += disc_w[i]
    return vertebrae, discs


def _place(rng: np.random.Generator, spine: _Spine) -> tuple[list[Vertebra], list[Disc]]:
    """Bodies and discs of a spine, L3 near the origin of patient space."""
    n = len(VERTEBRAE)
    vertebrae, discs = _stack(spine)
    height, depth, width, wedge, disc_h, water = (
        spine.height,
        spine.depth,
        spine.width,
        spine.wedge,
        spine.disc_h,
        spine.water,
    )
    middle = vertebrae[VERTEBRAE.index("L3")][0]
    shift = np.array([rng.normal(0, 4), rng.normal(0, 6), rng.normal(0, 6)]) - middle
    bodies = [
        Vertebra(
            VERTEBRAE[i],
            vertebrae[i][0] + shift,
            vertebrae[i][1],
            depth[i],
            width[i],
            height[i],
            wedge[i],
            dict(waist=rng.uniform(0.07, 0.12), concave_mm=rng.uniform(0.8, 2.2), modic=float(rng.random() < 0.25)),
        )
        for i in range(n)
    ]
    plates = [
        Disc(
            VERTEBRAE[i],
            discs[i][0] + shift,
            discs[i][1],
            min(depth[i], depth[i + 1]) + 0.6,
            min(width[i], width[i + 1]) + 0.6,
            disc_h[i],
            water[i],
        )
        for i in range(n - 1)
    ]
    for vertebra, shape in zip(bodies, spine.bodies, strict=True):
        vertebra.shape.update(shape)
    for plate, shape in zip(plates, spine.discs, strict=True):
        plate.shape.update(shape)
    return bodies, plates


def _canal_path(bodies: list[Vertebra], plates: list[Disc], canal_ap: float) -> tuple[np.ndarray, np.ndarray]:
    """The canal's middle behind the bodies, at half its own depth: (m, 3) LPS every 0.5 mm, and (m,) distance along."""
    n = len(VERTEBRAE)
    knots = []
    for i in range(n):
        gap = canal_ap / 2 * (1 if i <= S1 else max(0.35, 1 - 0.25 * (i - S1)))
        v = bodies[i]
        knots.append(v.centre_mm + v.frame[:, 1] * (v.depth_mm * (1 - 0.5 * v.shape["waist"]) / 2 + gap))
        if i < n - 1 and i < S1:
            d = plates[i]
            rear = (bodies[i].depth_mm + bodies[i + 1].depth_mm) / 4
            knots.append(d.centre_mm + d.frame[:, 1] * (rear + gap))
    inner = np.array(knots)
    path = np.concatenate([inner[:1] * 2 - inner[1:2], inner, inner[-1:] * 2 - inner[-2:-1]])
    chord = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    spline = CubicSpline(chord, ndimage.gaussian_filter1d(path, 0.6, axis=0, mode="nearest"))
    fine = spline(np.arange(0, chord[-1], 0.5))
    s = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(fine, axis=0), axis=1))])
    return fine, s


def _disc_places(plates: list[Disc], path_mm: np.ndarray, s: np.ndarray) -> np.ndarray:
    """(5,) distance along the canal's path at which each graded disc's plane meets it."""
    disc_s = []
    for level in range(5):
        d = plates[L1 + level]
        at = np.abs((path_mm - d.centre_mm) @ d.frame[:, 2])
        near = np.linalg.norm(path_mm - d.centre_mm, axis=1) < 60
        disc_s.append(s[np.argmin(np.where(near, at, 1e9))])
    return np.array(disc_s)


def sample_anatomy(
    rng: np.random.Generator, severity: np.ndarray, transitional: float = 0.0, variety: str = "standard"
) -> Anatomy:
    """Draw a spine. severity (condition, level) in grade units (`visible_severity`).

    variety: 'standard', or 'wide' for what training on the phantom alone needs: fractures, slips,
    curves, implants, and every look of marrow, discs and what lies around them."""
    if variety not in ("standard", "wide"):
        raise ValueError(f"variety is 'standard' or 'wide', not {variety!r}")
    # A generator of its own: the standard spine's numbers stay the same.
    w = np.random.default_rng((int(copy.deepcopy(rng).integers(2**31)), 1)) if variety == "wide" else None
    spine, size, age, variant = _draw_spine(rng, severity, transitional)
    if w is not None:
        factor = np.clip(w.normal(1, 0.1), 0.8, 1.2) / size
        size *= factor
        _vary_spine(w, spine, factor)
    bodies, plates = _place(rng, spine)
    canal_ap = np.clip(rng.normal(17.0, 1.0), 15, 19) * size**0.5
    canal_lr = np.clip(rng.normal(23.5, 1.2), 21, 26) * size**0.5
    path_mm, s = _canal_path(bodies, plates, canal_ap)
    disc_s = _disc_places(plates, path_mm, s)
    conus = s[np.argmin(np.linalg.norm(path_mm - bodies[L1].centre_mm, axis=1))] + rng.normal(2, 9)
    body = dict(
        fat_back_mm=rng.uniform(9, 26),
        fat_side_mm=rng.uniform(12, 30),
        half_width_mm=rng.uniform(145, 180),
        half_depth_mm=rng.uniform(102, 128),
        muscle=rng.normal(1, 0.08),
        infiltration=np.clip(0.15 + 0.75 * age + rng.normal(0, 0.12), 0, 1),
        marrow_fat=np.clip(age + rng.normal(0, 0.15), 0, 1),
        age=age,
    )
    wide = {}
    if w is not None:
        wide = _vary_rest(w, _ahead_mm(bodies, path_mm, s, disc_s), body)
    return Anatomy(
        bodies,
        plates,
        np.asarray(severity, float),
        path_mm,
        s,
        disc_s,
        canal_ap,
        canal_lr,
        conus,
        variant,
        body,
        int(rng.integers(2**31)),
        wide,
    )


def _ahead_mm(bodies: list[Vertebra], path_mm: np.ndarray, s: np.ndarray, disc_s: np.ndarray) -> float:
    """How far the foremost body lies in front of the canal.

    The belly follows the canal at half its curve, as the back does (see `paint_body`), and stays in front of the
    fine grid, whose face lies before the foremost body.
    """
    canal = path_mm[np.argmin(np.abs(s - disc_s[2])), 1]
    foremost = min(v.centre_mm[1] - v.frame[1, 1] * v.depth_mm / 2 for v in bodies[2 : S1 + 1])
    used = (path_mm[:, 2] > bodies[S1 + 1].centre_mm[2]) & (path_mm[:, 2] < bodies[2].centre_mm[2])
    return canal + max(0, 0.45 * (path_mm[used, 1].max() - canal)) - foremost


# -- how disease shapes canal, recess and foramen: the only place where severity acts

FORAMEN_V_MM = -3.0  # the foramen's middle lies a little in front of the canal's
FORAMEN_RISE_MM = -8.5  # ... and above the disc (s grows downwards)
FORAMEN_POINT_MM = -9.2  # where readers mark it: measured in 12 of the competition's studies
RECESS_U_MM = 9.5


def gaussian_bump(s_mm: np.ndarray, centre_mm: float, sigma_mm: float) -> np.ndarray:
    """1 at centre_mm, falling off like a Gaussian on both sides."""
    return np.exp(-0.5 * ((s_mm - centre_mm) / sigma_mm) ** 2)


def sac_section(anatomy: Anatomy, s_mm: ArrayLike) -> dict:
    """The thecal sac's section at s: front, rear (v of its walls), left, right (half-widths),
    crowding (0 free CSF .. 1 only roots) in mm; arrays like s_mm."""
    s = np.asarray(s_mm, float)
    a = anatomy
    ap, lr = a.canal_ap_mm - 2.6, a.canal_lr_mm - 4.5
    # Below L5/S1 the sac tapers and ends at S2, with fat around it.
    end = a.disc_s_mm[4] + 55 + (a.wide["sac_end_mm"] if a.wide else 0)
    taper = np.clip((end - s) / 62, 0.02, 1) ** 0.6
    # In front of it there is hardly any fat above L5.
    low = np.clip((s - a.disc_s_mm[3] - 8) / 30, 0, 1)
    front = (-a.canal_ap_mm / 2 + 0.3 + 2.8 * low) * taper
    rear = front + (ap + 0.2 - 1.4 * low) * taper
    left, right, crowding = lr / 2 * taper, lr / 2 * taper, np.zeros_like(s)
    if a.wide and a.wide["lipomatosis"]:
        squeeze = a.wide["lipomatosis"] * np.clip((s - a.disc_s_mm[2]) / 30, 0, 1)
        rear = rear - squeeze * (rear - front)
        left, right = left * (1 - 0.7 * squeeze), right * (1 - 0.7 * squeeze)
    for level in range(5):
        c = a.severity[0, level]
        g = gaussian_bump(s, a.disc_s_mm[level], 4.0 + 0.8 * c)
        limit = taper  # nothing narrower than nothing
        front = front + g * (1.75 * c + 0.5) * limit
        rear = rear - g * (1.45 * c + 0.3) * limit
        left = left - g * 0.9 * c * limit
        right = right - g * 0.9 * c * limit
        crowding = np.maximum(crowding, g * np.clip((c - 0.7) / 1.7, 0, 0.92))
        left = left - g * 1.2 * a.severity[3, level] * limit
        right = right - g * 1.2 * a.severity[4, level] * limit
    middle, half = (front + rear) / 2, np.maximum((rear - front) / 2, 0.8 * taper)
    return dict(
        front=middle - half,
        rear=middle + half,
        left=np.maximum(left, 2 * taper),
        right=np.maximum(right, 2 * taper),
        crowding=crowding,
        taper=taper,
    )


def foramen_section(severity: float) -> dict:
    """Half-axes in mm of the foramen's upper and lower part and of the root at one severity."""
    f = severity
    return dict(
        upper_v=max(6.4 - 1.45 * f, 2.1),
        upper_s=max(8.0 - 1.75 * f, 2.9),
        lower_v=max(4.6 - 2.0 * f, 0.2),
        lower_s=max(6.0 - 1.8 * f, 0.2),
        root_v=max(3.1 - 0.3 * f, 2.2),
        root_s=max(3.8 - 0.25 * f, 3.0),
    )


def recess_section(severity: float) -> dict:
    """Half-axes in mm of the lateral recess and of the traversing root, and its displacement."""
    a = severity
    return dict(
        u=max(5.4 - 1.7 * a, 0.3),
        v=max(4.0 - 1.1 * a, 0.4),
        root=max(2.0 - 0.25 * a, 1.2),
        inward=0.9 * a,
        backward=0.5 * a,
    )
