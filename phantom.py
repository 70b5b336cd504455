"""Synthetic lumbar MRI in exactly the layout of the RSNA 2024 Lumbar Spine competition.

    python phantom.py OUT --train 60 --test 12 --seed 1 --workers 2 --prevalence 3
    python phantom.py OUT --variety wide
    python phantom.py --figure docs/phantom.png

The standard variety is a mostly healthy adult; the wide one adds fractures, slips, scoliosis,
implants and every look of marrow, discs, gut and fat, for training on phantoms alone.

A study is made in five steps that can each be used alone:

    severities  ->  Anatomy  ->  tissue grids  ->  series plans  ->  slices  ->  files
    sample_severity  sample_anatomy  paint        sample_protocol   acquire     write_series

Contents
    1. Names ............ conditions, levels, tissues
    2. Severity ......... latent disease, grades, the perfect reader, its score
    3. Anatomy .......... vertebrae, discs, canal path: parameters in patient space
    4. Tissue grids ..... painting signed distances into soft labels
    5. Painting ......... body, discs, bones, canal, foramina
    6. Contrast ......... tissue -> grey value for T1, T2, STIR
    7. Protocol ......... where the slices of a study lie
    8. Acquisition ...... slice profile, coil, noise
    9. DICOM ............ valid MR Image Storage files
   10. Data set ......... CSV files, truth, workers, resuming
   11. Figure and command line

Frames. Patient coordinates are DICOM LPS in mm: x to the patient's left, y to the back, z to
the head. Grid arrays are indexed (x, y, z). Images are indexed (slice, row, column); pixel
coordinates in tables are (x = column, y = row) of a pixel's centre.
Canal coordinates (u, v, s): u = left of the canal's middle, v = behind it, s = distance along
it from the head downwards, all in mm.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.interpolate import CubicSpline, PchipInterpolator
from scipy.special import ndtr, ndtri

from lumbar.names import CONDITIONS, GRADES, LABEL_COLUMNS, LEVELS

VERSION = 2  # goes up when the same seed gives other pixels

# =====================================================================================
# 1. Names
# =====================================================================================

VERTEBRAE = ("T8", "T9", "T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5", "S1", "S2", "S3", "S4", "S5")
TRUTH_VERTEBRAE = VERTEBRAE[2:12]
CORNERS = ("as", "ps", "pi", "ai")  # anterior-superior, posterior-superior, ...
SERIES = ("Sagittal T1", "Sagittal T2/STIR", "Axial T2")

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


def condition_title(condition: str) -> str:
    """'left_subarticular_stenosis' -> 'Left Subarticular Stenosis', as in the coordinates file."""
    return condition.replace("_", " ").title()


def level_title(level: str) -> str:
    """'l1_l2' -> 'L1/L2'."""
    return level.upper().replace("_", "/")


# =====================================================================================
# 2. Severity: the latent disease, its grades, the perfect reader
# =====================================================================================

# Numbers of Normal/Mild, Moderate, Severe in the real training set, per level.
_SCS = [(1886, 67, 21), (1770, 151, 53), (1622, 230, 122), (1482, 237, 255), (1904, 51, 19)]
_NFN = [(1900, 63, 8), (1791, 171, 11), (1522, 411, 40), (1204, 629, 140), (1264, 508, 198)]
_SS = [(1690, 93, 28), (1555, 255, 83), (1324, 454, 194), (887, 624, 461), (1408, 409, 147)]
REAL_COUNTS = np.array([_SCS, _NFN, _NFN, _SS, _SS], float)  # (condition, level, grade)

# Latent correlations; grades, which are mostly "normal", show about two thirds of them.
_CONDITION_CORRELATION = np.array(
    [
        [1.00, 0.56, 0.56, 0.87, 0.87],
        [0.56, 1.00, 0.62, 0.65, 0.55],
        [0.56, 0.62, 1.00, 0.55, 0.65],
        [0.87, 0.65, 0.55, 1.00, 0.80],
        [0.87, 0.55, 0.65, 0.80, 1.00],
    ]
)
_LEVEL_CORRELATION = np.array([1.0, 0.71, 0.51, 0.41, 0.33])  # by distance in levels

# Correlation of a reader's graded variable with the latent: below 1, nobody scores zero.
READER_RELIABILITY = 0.93
GRADE_WEIGHTS = np.array([1.0, 2.0, 4.0])


def grade_frequencies(prevalence: float = 1.0) -> np.ndarray:
    """Frequencies of the grades, (condition, level, grade); the odds of not being normal are
    those of the real data times `prevalence`, moderate : severe stays as it is."""
    p = REAL_COUNTS / REAL_COUNTS.sum(-1, keepdims=True)
    odds = prevalence * (1 - p[..., 0]) / p[..., 0]
    ill = odds / (1 + odds)
    share = p[..., 1:] / p[..., 1:].sum(-1, keepdims=True)
    return np.concatenate([1 - ill[..., None], ill[..., None] * share], -1)


def grade_thresholds(prevalence: float = 1.0) -> np.ndarray:
    """Thresholds of the graded standard normal variable, (condition, level, 2)."""
    return ndtri(np.cumsum(grade_frequencies(prevalence), -1)[..., :2])


def sample_severity(rng: np.random.Generator, n: int, prevalence: float = 1.0):
    """Draw n studies' latent severities and their grades.

    Returns latent (n, condition, level), standard normal, and grade (n, condition, level) in
    {0, 1, 2}: the latent seen through a reader's noise and cut at the thresholds."""
    levels = _LEVEL_CORRELATION[np.abs(np.subtract.outer(range(5), range(5)))]
    root = np.linalg.cholesky(np.kron(_CONDITION_CORRELATION, levels) + 1e-9 * np.eye(25))
    latent = (rng.standard_normal((n, 25)) @ root.T).reshape(n, 5, 5)
    noise = rng.standard_normal((n, 5, 5))
    seen = READER_RELIABILITY * latent + np.sqrt(1 - READER_RELIABILITY**2) * noise
    grade = (seen[..., None] > grade_thresholds(prevalence)).sum(-1)
    return latent, grade


def visible_severity(latent: np.ndarray, prevalence: float = 1.0) -> np.ndarray:
    """Latent -> severity in grade units, as it deforms the anatomy: 0 healthy, 1 where half the
    readers say moderate, 2 where half say severe, at most 3. Continuous and monotonic."""
    cut = grade_thresholds(prevalence) / READER_RELIABILITY
    lower, upper = cut[..., 0], cut[..., 1]
    above = 1 + (latent - lower) / (upper - lower)
    below = 1 + (latent - lower) / 1.3
    severity = np.where(latent > lower, above, below)
    # A soft floor: the healthy differ a little, too.
    severity = np.logaddexp(0, 5 * severity) / 5
    return np.minimum(severity, 3.0)


def perfect_reader(latent: np.ndarray, prevalence: float = 1.0) -> np.ndarray:
    """Best probabilities for one who knows the latent: p proportional to weight * P(grade|latent).

    latent (n, condition, level) -> (n, condition, level, grade), rows sum to 1."""
    cut = grade_thresholds(prevalence)
    spread = np.sqrt(1 - READER_RELIABILITY**2)
    below = ndtr((cut - READER_RELIABILITY * latent[..., None]) / spread)
    edges = np.concatenate([np.zeros_like(below[..., :1]), below, np.ones_like(below[..., :1])], -1)
    p = np.maximum(np.diff(edges), 1e-9) * GRADE_WEIGHTS
    return p / p.sum(-1, keepdims=True)


def submission_table(study_ids, probability: np.ndarray) -> pd.DataFrame:
    """Probabilities (n, condition, level, grade) -> submission rows, sorted by row_id."""
    ids = [f"{s}_{column}" for s in study_ids for column in LABEL_COLUMNS]
    table = pd.DataFrame(probability.reshape(-1, 3), columns=["normal_mild", "moderate", "severe"])
    table.insert(0, "row_id", ids)
    return table.sort_values("row_id", ignore_index=True)


def perfect_submission(folder, split: str = "test") -> pd.DataFrame:
    """The perfect reader's submission for a data set on disk (split 'test' or 'train')."""
    table = pd.read_csv(Path(folder) / "phantom_severity.csv")
    table = table[table["split"] == split]
    prevalence = json.loads((Path(folder) / "phantom.json").read_text())["prevalence"]
    ids = list(dict.fromkeys(table["study_id"]))
    latent = table["latent"].to_numpy().reshape(len(ids), 5, 5)  # written condition-major
    return submission_table(ids, perfect_reader(latent, prevalence))


# =====================================================================================
# 3. Anatomy
# =====================================================================================


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
    bulge_mm: float = 0.0
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
    wide: dict | None = None  # what only the wide variety has; None: standard

    def vertebra(self, name: str) -> Vertebra:
        return next(v for v in self.vertebrae if v.name == name)

    def disc(self, level: int) -> Disc:
        """The graded disc of level index 0 (L1/L2) .. 4 (L5/S1)."""
        return next(d for d in self.discs if d.above == f"L{level + 1}")

    def canal_to_lps(self, u_mm, v_mm, s_mm) -> np.ndarray:
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
                points[1 + side, level] = self.canal_to_lps(sign * 18.0, FORAMEN_V_MM, s + FORAMEN_RISE_MM + 3)
                points[3 + side, level] = self.canal_to_lps(sign * RECESS_U_MM, sac["front"] + 3.0, s)
        return points


def _frame(sagittal, coronal, axial):
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


def _vary_spine(w, n, size, height, depth, width, wedge, disc_h, disc_w, water, coronal, axial, slope):
    """Spread a spine's parameters in place (arrays over `VERTEBRAE` or the discs below them; mm and
    radians). Returns the slope of S1, slips (disc,) in mm, and the shapes of bodies and discs."""
    s1, t11, l1 = (VERTEBRAE.index(k) for k in ("S1", "T11", "L1"))

    def lean(top):
        """Angle of the chord from S1 to T12 for a slope of 0 (radians, forward positive)."""
        tilt, y, z = 0.0, 0.0, 0.0
        for i in range(s1 - 1, top - 1, -1):
            for long, turn in ((disc_h[i], disc_w[i]), (height[i], wedge[i])):
                y, z = y + long * np.sin(tilt - turn / 2), z + long * np.cos(tilt - turn / 2)
                tilt -= turn
        return np.arctan2(y, z)

    usual = slope + lean(t11 + 1)
    for array, spread, each in ((height, 0.07, 0.035), (depth, 0.06, 0.025), (width, 0.06, 0.03)):
        array *= size * np.exp(w.normal(0, spread)) * w.normal(1, each, n)
    disc_h *= size * np.exp(w.normal(0, 0.17)) * w.normal(1, 0.12, n - 1)
    kind = w.choice(4, p=[0.45, 0.22, 0.1, 0.23])  # usual, flat, kyphotic, hollow back
    curve = w.uniform(*((0.75, 1.2), (0.25, 0.75), (-0.2, 0.25), (1.2, 1.5))[kind])
    base_w, base_d = np.radians(_WEDGE), np.radians(_DISC_WEDGE)
    up = slice(0, s1)
    # The lowest levels stay hollow in a flat back, too: the sacrum always slopes.
    part = np.full(n, curve)
    part[s1 - 2 : s1] = max(curve, w.uniform(0.6, 1.0))
    wedge[up] = base_w[up] * np.where(base_w[up] > 0, np.clip(part[up], 0.4, 1.4), 1)
    wedge += w.normal(0, np.radians(1.8), n)
    disc_w[up] = base_d[up] * part[up] + w.normal(0, np.radians(2), s1)
    if kind == 2:
        wedge[t11 : l1 + 2] -= np.radians(w.uniform(0, 4))
    # The sacrum: its curve, and the angle and height of the remnant below S1.
    bend = w.uniform(0.2, 2.0)
    wedge[s1:] = base_w[s1:] + w.normal(0, np.radians(2), n - s1)
    disc_w[s1:] = base_d[s1:] * bend + w.normal(0, np.radians(3), n - 1 - s1)
    disc_w[s1] += w.normal(0, np.radians(7))
    height[s1:] *= w.uniform(0.88, 1.15)
    depth[s1 + 1 :] *= w.uniform(0.85, 1.3)
    remnant = w.random()
    disc_h[s1] = w.uniform(0.3, 1.2) if remnant < 0.25 else w.uniform(1.2, 3.5) if remnant < 0.75 else w.uniform(3.5, 7)
    disc_h[s1 + 1] *= w.uniform(0.4, 2.5)

    old = np.clip(w.normal(0.5, 0.3), 0, 1)
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
    dark = w.random()
    if dark < 0.12:
        water[:] = w.uniform(0.0, 0.2)
    elif dark < 0.26:
        water[:] = w.uniform(0.8, 1.2, n - 1)
    elif dark < 0.8:
        some = w.random(n - 1) < 0.6
        water[some] = w.uniform(0, 1.15, some.sum())
    low = s1 - 3  # L3/4 and below carry most of the wear
    for i in range(2, s1):
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
        if i >= l1 - 1 and w.random() < 0.13:
            discs[i]["hernia"] = (
                w.uniform(3, 7.5),
                w.uniform(2.5, 8),
                w.normal(0, 5),
                w.normal(0, 5),
                w.random() < 0.5,
            )
    if w.random() < 0.05:
        i = int(w.integers(t11, s1 - 1))
        discs[i].update(fused=True, gas=False, zone=False, hernia=None)
        disc_h[i] = w.uniform(0.8, 2.0)
        disc_w[i] *= 0.3

    # Bodies lose height: wedge (front only), biconcave (middle only), plana (everywhere).
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
        for b in bodies[:s1]:
            b["concave_mm"] = w.uniform(2.5, 6.0)
    for b in bodies[s1:]:
        b["concave_mm"] = min(b["concave_mm"], 1.0)

    # Nodes, lips and bands at the end plates.
    scheuermann = w.random() < 0.12
    lipped = w.choice([0.0, 0.25, 0.7], p=[0.45, 0.35, 0.2]) * (0.3 + old)
    for i in range(s1):
        for b, end in ((bodies[i], "bottom"), (bodies[i + 1], "top")):
            if i + 1 < s1 or end == "bottom":
                for _ in range(1 + int(w.random() < 0.25)):
                    if w.random() < (0.35 if scheuermann and i < l1 + 3 else 0.035):
                        b["nodes"].append((end, w.normal(0, 6), w.normal(0, 5), w.uniform(2, 4.5), w.uniform(2, 6)))
            if w.random() < lipped * (1.5 if water[i] < 0.3 else 0.6):
                b["lips"][end] = (w.uniform(1, 6) * w.choice([0.3, 1]), w.uniform(0, 2.5) * (w.random() < 0.5))
        if w.random() < (0.26 if water[i] < 0.4 else 0.07):
            tissue = str(w.choice(["oedema", "fatty_marrow", "sclerosis"], p=[0.3, 0.5, 0.2]))
            bias, strength = w.normal(0, 0.8), w.uniform(0.4, 0.95)
            for b, end in ((bodies[i], "bottom"), (bodies[i + 1], "top")):
                if w.random() < 0.85:
                    b["bands"].append((tissue, end, w.uniform(2.5, 13), bias, strength))

    # Marrow: one kind for all, each a little different, some with spots.
    base = str(w.choice(["marrow", "red_marrow", "fatty_marrow"], p=[0.6, 0.25, 0.15]))
    mix, spread = w.uniform(0.0, 0.6), w.uniform(0.01, 0.12)
    many = w.random() < 0.05
    for b in bodies:
        b["base"], b["mix"] = base, mix + w.normal(0, spread)
        if w.random() < 0.025:
            b["base"], b["mix"] = str(w.choice(["lesion", "oedema", "sclerosis"])), 0.0
        for tissue, chance in (("haemangioma", 0.07), ("fatty_marrow", 0.12), ("lesion", 0.5 if many else 0.035)):
            if w.random() < chance:
                r = w.uniform(2.5, 9)
                b["spots"].append((tissue, *w.uniform(-0.6, 0.6, 3), r, w.uniform(0.6, 1)))

    # A disc cannot be thinner than nothing on its narrow side.
    limit = 2 * np.arctan(0.85 * np.maximum(disc_h, 0.4) / np.minimum(depth[:-1], depth[1:]))
    disc_w[up] = np.clip(disc_w, -limit, limit)[up]
    slip = np.zeros(n - 1)
    if w.random() < 0.2:
        slip[s1 - 2 + int(w.random() < 0.45)] = w.uniform(3, 12) * size
    for i in range(l1, s1):
        if slip[i] == 0 and w.random() < 0.06:
            slip[i] = -w.uniform(2, 4)
        discs[i]["slip"] = slip[i]
        bodies[i]["lysis_mm"] = 0.8 * slip[i] if slip[i] > 6 and w.random() < 0.7 else 0.0
        if slip[i] > 4:
            water[i] = min(water[i], w.uniform(0, 0.5))

    # Scoliosis: the bodies turn with the curve.
    if w.random() < 0.35:
        cobb = np.radians(w.uniform(6, 25)) * w.choice([-1, 1])
        apex, span = w.uniform(l1 - 1, l1 + 3), w.uniform(2.5, 4.5)
        at = (np.arange(n) - apex) / span
        coronal += 0.82 * cobb * at * np.exp(0.5 - at * at / 2) * (np.arange(n) <= s1)
        axial += cobb * w.uniform(0.2, 0.7) * np.exp(-at * at / 2)
    coronal += np.radians(w.normal(0, 2.5))
    for i in range(n - 1):
        dips = [bodies[k]["concave_mm"] * 1.4 + max([q[4] for q in bodies[k]["nodes"]], default=0) for k in (i, i + 1)]
        discs[i]["reach"] = max(dips) + 1.5
        discs[i]["dip"] = (
            bodies[i]["concave_mm"] * bodies[i]["bottom"],
            bodies[i + 1]["concave_mm"] * bodies[i + 1]["top"],
        )
    # Lying on the table, the chord of the lumbar spine is nearly level whatever its curve.
    usual, most = usual * np.clip(0.2 + 0.7 * curve, 0.1, 1.1) + np.radians(w.normal(0, 3.5)), w.uniform(48, 56)
    while usual - lean(t11 + 1) > np.radians(most):  # no sacrum lies flat
        disc_w[up] -= np.radians(0.5)
    slope = max(usual - lean(t11 + 1), np.radians(w.uniform(12, 22)))
    tilt = slope
    for i in range(s1, n - 1):
        tilt += wedge[i]
        disc_w[i] = min(disc_w[i], np.radians(62) - tilt)
        tilt += disc_w[i]
    return slope, slip, bodies, discs


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
    l1, s1 = VERTEBRAE.index("L1"), VERTEBRAE.index("S1")
    first = int(w.integers(l1 + 1, s1))
    last = min(s1, first + int(w.integers(1, 3)))
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
    first = VERTEBRAE.index("L1")
    for level in range(5):
        disease = 0.45 * severity[0, level] + 0.3 * severity[1:3, level].mean() + 0.3 * severity[3:5, level].mean()
        water[first + level] = np.clip(water[first + level] - 0.33 * disease, 0.02, 1)
        disc_h[first + level] *= 1 - 0.12 * min(disease, 3) - 0.08 * (water[first + level] < 0.25)
    if variant == "sacralised L5":
        disc_h[VERTEBRAE.index("L5")] = 3.5 * size
        disc_w[VERTEBRAE.index("L5")] *= 0.3
    if variant == "lumbarised S1":
        disc_h[VERTEBRAE.index("S1")] = 7.5 * size
        disc_w[VERTEBRAE.index("S1")] = np.radians(5)
        depth[VERTEBRAE.index("S1")] *= 1.06
        depth[VERTEBRAE.index("S2")] *= 1.2

    coronal = np.radians(
        rng.normal(0, 1.6) * np.sin(np.linspace(0, np.pi * rng.uniform(1, 2.2), n) + rng.uniform(0, 6))
        + rng.normal(0, 0.8)
    )
    axial = np.radians(rng.normal(0, 2)) + coronal * rng.normal(0, 0.5)
    pose = np.radians(rng.normal(0, 2.5))

    # Stack from the top end plate of S1: upwards to T8, downwards to S5.
    s1 = VERTEBRAE.index("S1")
    slope = np.radians(38 * lordosis - 4.5 + rng.normal(0, 3)) + pose
    slip, body_shapes, disc_shapes = np.zeros(n - 1), None, None
    if w is not None:
        factor = np.clip(w.normal(1, 0.1), 0.8, 1.2) / size
        size *= factor
        slope, slip, body_shapes, disc_shapes = _vary_spine(
            w, n, factor, height, depth, width, wedge, disc_h, disc_w, water, coronal, axial, slope
        )
    vertebrae, discs = [None] * n, [None] * (n - 1)
    point, tilt = np.zeros(3), slope
    for i in range(s1 - 1, -1, -1):
        f = _frame(tilt - disc_w[i] / 2, coronal[i], axial[i])
        if slip[i]:  # all that stands on this disc goes along
            discs[i] = (point + f[:, 2] * disc_h[i] / 2 - f[:, 1] * slip[i] / 2, f)
            point = point - f[:, 1] * slip[i]
        else:
            discs[i] = (point + f[:, 2] * disc_h[i] / 2, f)
        point, tilt = point + f[:, 2] * disc_h[i], tilt - disc_w[i]
        f = _frame(tilt - wedge[i] / 2, coronal[i], axial[i])
        vertebrae[i] = (point + f[:, 2] * height[i] / 2, f)
        point, tilt = point + f[:, 2] * height[i], tilt - wedge[i]
    point, tilt = np.zeros(3), slope
    for i in range(s1, n):
        f = _frame(tilt + wedge[i] / 2, coronal[i], axial[i])
        # The sacrum tapers: each front face steps back, rear walls stay in line.
        vertebrae[i] = (point - f[:, 2] * height[i] / 2, f)
        point, tilt = point - f[:, 2] * height[i], tilt + wedge[i]
        if i < n - 1:
            f = _frame(tilt + disc_w[i] / 2, coronal[i], axial[i])
            discs[i] = (point - f[:, 2] * disc_h[i] / 2, f)
            point = point - f[:, 2] * disc_h[i] + f[:, 1] * (depth[i] - depth[i + 1]) / 2
            tilt += disc_w[i]

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

    if w is not None:
        for item, shape in zip(bodies + plates, body_shapes + disc_shapes):
            item.shape.update(shape)

    # The canal runs behind the bodies at half its own depth.
    canal_ap = np.clip(rng.normal(17.0, 1.0), 15, 19) * size**0.5
    canal_lr = np.clip(rng.normal(23.5, 1.2), 21, 26) * size**0.5
    knots = []
    for i in range(n):
        gap = canal_ap / 2 * (1 if i <= s1 else max(0.35, 1 - 0.25 * (i - s1)))
        v = bodies[i]
        knots.append(v.centre_mm + v.frame[:, 1] * (v.depth_mm * (1 - 0.5 * v.shape["waist"]) / 2 + gap))
        if i < n - 1 and i < s1:
            d = plates[i]
            rear = (bodies[i].depth_mm + bodies[i + 1].depth_mm) / 4
            knots.append(d.centre_mm + d.frame[:, 1] * (rear + gap))
    knots = np.array(knots)
    knots = np.concatenate([knots[:1] * 2 - knots[1:2], knots, knots[-1:] * 2 - knots[-2:-1]])
    chord = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))])
    spline = CubicSpline(chord, ndimage.gaussian_filter1d(knots, 0.6, axis=0, mode="nearest"))
    fine = spline(np.arange(0, chord[-1], 0.5))
    s = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(fine, axis=0), axis=1))])
    disc_s = []
    for level in range(5):
        d = plates[first + level]
        at = np.abs((fine - d.centre_mm) @ d.frame[:, 2])
        near = np.linalg.norm(fine - d.centre_mm, axis=1) < 60
        disc_s.append(s[np.argmin(np.where(near, at, 1e9))])
    l1 = bodies[first]
    conus = s[np.argmin(np.linalg.norm(fine - l1.centre_mm, axis=1))] + rng.normal(2, 9)
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
    wide = None
    if w is not None:
        # The belly follows the canal at half its curve, as the back does (see `_paint_body`), and stays
        # in front of the fine grid, whose face lies before the foremost body.
        canal = fine[np.argmin(np.abs(s - disc_s[2])), 1]
        foremost = min(v.centre_mm[1] - v.frame[1, 1] * v.depth_mm / 2 for v in bodies[2 : s1 + 1])
        used = (fine[:, 2] > bodies[s1 + 1].centre_mm[2]) & (fine[:, 2] < bodies[2].centre_mm[2])
        ahead = canal + max(0, 0.45 * (fine[used, 1].max() - canal)) - foremost
        wide = _vary_rest(w, ahead, body)
    return Anatomy(
        bodies,
        plates,
        np.asarray(severity, float),
        fine,
        s,
        np.array(disc_s),
        canal_ap,
        canal_lr,
        conus,
        variant,
        body,
        int(rng.integers(2**31)),
        wide,
    )


# ---- how disease shapes canal, recess and foramen: the only place where severity acts ----

FORAMEN_V_MM = -3.0  # the foramen's middle lies a little in front of the canal's
FORAMEN_RISE_MM = -8.5  # ... and above the disc (s grows downwards)
RECESS_U_MM = 9.5


def _bump(s_mm, centre_mm, sigma_mm):
    return np.exp(-0.5 * ((s_mm - centre_mm) / sigma_mm) ** 2)


def sac_section(anatomy: Anatomy, s_mm) -> dict:
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
        g = _bump(s, a.disc_s_mm[level], 4.0 + 0.8 * c)
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


# =====================================================================================
# 4. Tissue grids
# =====================================================================================


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
    def empty(cls, low_mm, high_mm, step_mm, tissue="air"):
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
    def shape(self):
        return self.under.shape

    @property
    def affine(self) -> np.ndarray:
        """(4, 4): index (i, j, k, 1) -> LPS mm."""
        a = np.diag([*self.step_mm, 1.0])
        a[:3, 3] = self.origin_mm
        return a

    def axis_mm(self, k: int) -> np.ndarray:
        return (self.origin_mm[k] + self.step_mm[k] * np.arange(self.shape[k])).astype(np.float32)

    def box(self, low_mm, high_mm):
        """Index slices of the box (clipped to the grid), or None when it is outside."""
        lo = np.floor((np.asarray(low_mm) - self.origin_mm) / self.step_mm).astype(int)
        hi = np.ceil((np.asarray(high_mm) - self.origin_mm) / self.step_mm).astype(int) + 1
        lo, hi = np.maximum(lo, 0), np.minimum(hi, self.shape)
        if (hi <= lo).any():
            return None
        return tuple(slice(int(a), int(b)) for a, b in zip(lo, hi))

    def coordinates(self, box):
        """Open coordinate arrays (nx,1,1), (1,ny,1), (1,1,nz) of a box in LPS mm."""
        x, y, z = (self.axis_mm(k)[box[k]] for k in range(3))
        return x[:, None, None], y[None, :, None], z[None, None, :]

    def fractions(self) -> np.ndarray:
        """Dense (tissue, x, y, z) float32 fractions; large, meant for small boxes and tests."""
        out = np.zeros((len(TISSUES), *self.shape), np.float32)
        w = self.share.astype(np.float32) / 255
        for t in range(len(TISSUES)):
            out[t] = (self.under == t) * (1 - w) + (self.over == t) * w
        return out

    def lay(self, box, distance_mm, tissue: str, edge_mm: float | None = None, strength=1.0):
        """Paint a tissue where the signed distance is negative, with an edge as wide as a voxel.

        box: slices (or any index) into the arrays; distance_mm must have that index's shape."""
        edge = np.float32(edge_mm or float(self.step_mm.mean()) * 1.15)
        touched = distance_mm < edge / 2
        near = distance_mm[touched]
        if near.size:
            near *= -1 / edge
            near += 0.5
            self._write(box, touched, np.minimum(near, 1) * np.float32(255 * strength), tissue)

    def blend(self, box, alpha, tissue: str):
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


def _local(grid, box, centre, frame):
    """Coordinates of a box's voxels in a frame: three float32 arrays (nx, ny, nz)."""
    x, y, z = grid.coordinates(box)
    x, y, z = x - np.float32(centre[0]), y - np.float32(centre[1]), z - np.float32(centre[2])
    f = frame.astype(np.float32)
    return [x * f[0, k] + y * f[1, k] + z * f[2, k] for k in range(3)]


def _smooth_min(a, b, k):
    h = np.clip(0.5 + 0.5 * (b - a) / k, 0, 1)
    return b + (a - b) * h - k * h * (1 - h)


def _reach(centre, frame, half):
    """Axis-aligned box around an oriented box with half-sizes `half`."""
    r = np.abs(frame) @ np.asarray(half, float)
    return centre - r, centre + r


class _Noise:
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


# =====================================================================================
# 5. Painting
# =====================================================================================


def paint(anatomy: Anatomy, spine_step_mm=(0.95, 0.8, 0.85), body_step_mm=(1.7, 1.7, 3.0)):
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

    def __init__(self, grid, a: Anatomy):
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

    def table(self, values):
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
    for name, (cx, cy, hu, hv) in _MUSCLES.items():
        cx, cy, hu, hv = (c.table(k) for k in (cx, cy, hu, hv))
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
    for _, cx, cy, r, start, stop in () if a.wide else _VESSELS:
        cx, cy, r = c.table(cx), c.table(cy), c.table(r)
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


def _paint_wide_body(grid, a: Anatomy, v: Vertebra, noise, box, x, y, z, kept):
    """A body with dips, nodes and lips at its end plates and marrow of many looks."""
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
    half = (v.width_mm / 2 + 3, v.depth_mm / 2 + 3, v.height_mm / 2 + 5)
    if a.wide:
        lip = max([max(k) for k in v.shape["lips"].values()], default=0)
        half = np.add(half, (lip, lip, 0.4 * lip + v.depth_mm / 2 * abs(np.tan(v.wedge / 2)) - 3))
    box = grid.box(*_reach(v.centre_mm, v.frame, half))
    sacral = v.name[0] == "S"
    if a.wide and box is not None:
        _paint_wide_body(grid, a, v, noise, box, *_local(grid, box, v.centre_mm, v.frame), kept)
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
    pieces = [((0, lamina + 4, -h * 0.55), (0, lamina + long, -h * 0.85), 3.6, (0.85, 1, 2.3 if lumbar else 1.3))]
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
    pieces = [((0, back + canal + 3, h * 0.5), (0, back + canal + 9 - 2 * i, -h * 0.5), 3.2, (1, 1, 1.4))]
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


def canal_coordinates(anatomy: Anatomy, y_mm, z_mm):
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


# =====================================================================================
# 6. Contrast
# =====================================================================================

# Relative brightness per tissue.
_CONTRAST = {
    #            T1    T2    STIR  T1FS  T2FS  PD
    "air": (0.012, 0.012, 0.012, 0.012, 0.012, 0.012),
    "fat": (1.00, 0.74, 0.09, 0.14, 0.10, 0.92),
    "muscle": (0.37, 0.17, 0.22, 0.52, 0.24, 0.48),
    "csf": (0.17, 1.00, 1.00, 0.22, 1.00, 0.62),
    "cord": (0.43, 0.42, 0.45, 0.60, 0.48, 0.66),
    "root": (0.40, 0.28, 0.36, 0.56, 0.36, 0.58),
    "cortex": (0.05, 0.04, 0.04, 0.07, 0.05, 0.06),
    "marrow": (0.58, 0.40, 0.16, 0.40, 0.20, 0.60),
    "annulus": (0.28, 0.12, 0.12, 0.42, 0.15, 0.30),
    "nucleus": (0.36, 0.74, 0.80, 0.52, 0.80, 0.72),
    "flavum": (0.24, 0.13, 0.13, 0.36, 0.16, 0.26),
    "blood": (0.10, 0.05, 0.07, 0.14, 0.06, 0.08),
    "vein": (0.40, 0.62, 0.50, 0.62, 0.62, 0.66),
    "fluid": (0.24, 0.88, 0.85, 0.30, 0.92, 0.64),
    "liver": (0.47, 0.24, 0.30, 0.70, 0.30, 0.50),
    "kidney": (0.42, 0.50, 0.55, 0.62, 0.60, 0.62),
    "bowel": (0.40, 0.42, 0.40, 0.56, 0.46, 0.56),
    "skin": (0.50, 0.30, 0.20, 0.50, 0.25, 0.45),
    "fatty_marrow": (0.92, 0.72, 0.08, 0.18, 0.11, 0.86),
    "fascia": (0.12, 0.07, 0.07, 0.18, 0.08, 0.10),
    "red_marrow": (0.42, 0.30, 0.27, 0.52, 0.30, 0.48),
    "oedema": (0.30, 0.62, 0.78, 0.44, 0.80, 0.62),
    "sclerosis": (0.16, 0.10, 0.08, 0.20, 0.10, 0.16),
    "haemangioma": (0.90, 0.95, 0.55, 0.50, 0.70, 0.92),
    "lesion": (0.24, 0.34, 0.55, 0.36, 0.52, 0.44),
    "extruded": (0.34, 0.30, 0.32, 0.48, 0.34, 0.46),
    "slow_blood": (0.34, 0.55, 0.55, 0.50, 0.55, 0.56),
    "vessel_wall": (0.36, 0.22, 0.26, 0.52, 0.28, 0.42),
    "uterus": (0.40, 0.42, 0.48, 0.56, 0.52, 0.58),
    "stool": (0.58, 0.30, 0.25, 0.66, 0.30, 0.48),
    "scar": (0.33, 0.24, 0.26, 0.48, 0.30, 0.38),
    "metal": (0.012, 0.012, 0.012, 0.012, 0.012, 0.012),
    "metal_rim": (1.15, 1.05, 0.90, 1.00, 1.00, 1.10),
}


def contrast_table(kind: str, rng: np.random.Generator | None = None):
    """Grey values (tissue,) of 'T1', 'T2', 'STIR', 'PD' or, with the fat suppressed, 'T1FS' and
    'T2FS'; with rng they vary as scanners do."""
    column = ("T1", "T2", "STIR", "T1FS", "T2FS", "PD").index(kind)
    grey = np.array([_CONTRAST[t][column] for t in TISSUES], np.float32)
    if rng is not None:
        jitter = rng.normal(0, 0.07, STANDARD_TISSUES)
        # The appended tissues draw elsewhere: rng goes on as if they were not there.
        own = np.random.default_rng(jitter[:1].view(np.uint64))
        jitter = np.concatenate([jitter, own.normal(0, 0.07, len(grey) - STANDARD_TISSUES)])
        grey = grey * np.exp(jitter).astype(np.float32)
        grey = grey ** np.float32(np.exp(rng.normal(0, 0.08)))
    return grey


def render(grid: TissueGrid, grey: np.ndarray) -> np.ndarray:
    """Tissue grid -> float32 brightness (x, y, z) under one table of grey values (tissue,)."""
    image = grey[grid.under]
    part = grey[grid.over]
    part -= image
    part *= np.arange(256, dtype=np.float32)[grid.share] * np.float32(1 / 255)
    image += part
    return image


# =====================================================================================
# 7. Protocol
# =====================================================================================


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

    def project(self, point_mm):
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
            f = d.frame @ _frame(slack[0] * 0.6 + np.radians(rng.normal(0, 2)), slack[1], 0)
            at = a.canal_to_lps(0.0, -6.0, a.disc_s_mm[level])
            for offset in ((n - 1) / 2 - np.arange(n)) * gap:
                centres.append(at + f[:, 2] * offset)
                tilts.append(f)
    else:
        top, bottom = a.disc(group[0]).centre_mm, a.disc(group[-1]).centre_mm
        f = _frame(np.radians(rng.normal(5, 4)) + slack[0], slack[1], 0)
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


# =====================================================================================
# 8. Acquisition
# =====================================================================================


def acquire(
    rng: np.random.Generator, grids, plan: SeriesPlan, images, back_mm: float, spine_front_mm: np.ndarray
) -> np.ndarray:
    """Slices (n, rows, columns) float32, brightest anatomy near 1.

    grids: (spine, body) TissueGrids; images: their renderings under the series' contrast;
    back_mm: y of the back's skin, where the coil lies; spine_front_mm: (n, 2) y, z of the bodies'
    front walls from head to tail."""
    spine, body = grids
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


# =====================================================================================
# 9. DICOM
# =====================================================================================


def _uid(*parts) -> str:
    """A deterministic UID under the 2.25 root."""
    return "2.25." + str(int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:15], "big"))


def write_series(
    folder: Path,
    plan: SeriesPlan,
    image: np.ndarray,
    *,
    study_id: int,
    number: int,
    patient: str,
    rng: np.random.Generator,
    compress: str = "none",
    anomalies: str = "real",
):
    """Write a series as MR Image Storage, explicit VR little endian, 16 bit; one file a slice,
    named after its instance number."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    folder.mkdir(parents=True, exist_ok=True)
    odd = anomalies == "real"
    signed = odd and rng.random() < 0.12
    bits = 16 if signed or rng.random() < 0.5 else 12
    slope = float(rng.choice([0.5, 2.0])) if odd and rng.random() < 0.08 else None
    scale = rng.uniform(500, 1400)
    stored = np.clip(np.round(image * scale / (slope or 1)), 0, 2**12 - 1)
    stored = stored.astype(np.int16 if signed else np.uint16)
    t1 = plan.contrast == "T1"
    series_uid = _uid(study_id, plan.series_id)
    frame_uid = _uid(study_id, "frame")

    def text(v):
        return [f"{x:.10g}"[:16] for x in v]

    for k in range(len(stored)):
        ds = Dataset()
        ds.SpecificCharacterSet = "ISO_IR 100"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "SE"]
        ds.SOPClassUID = MRImageStorage
        ds.SOPInstanceUID = _uid(study_id, plan.series_id, int(plan.instances[k]))
        ds.StudyDate, ds.StudyTime = "20240101", "120000"
        ds.AccessionNumber = ""
        ds.Modality = "MR"
        ds.Manufacturer = "PHANTOM"
        ds.ReferringPhysicianName = ""
        ds.SeriesDescription = plan.description if plan.contrast != "STIR" else "Sagittal STIR"
        ds.PatientName, ds.PatientID = patient, patient.replace("^", "")
        ds.PatientBirthDate, ds.PatientSex = "", "O"
        ds.BodyPartExamined = "LSPINE"
        ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions = ("SE", "SK", "")
        ds.MRAcquisitionType = "2D"
        ds.SliceThickness = f"{plan.thickness_mm:g}"
        ds.RepetitionTime, ds.EchoTime = ("600", "12") if t1 else ("3500", "100")
        if plan.contrast == "STIR":
            ds.ScanningSequence = ["SE", "IR"]
            ds.InversionTime = "160"
        ds.EchoTrainLength = "3" if t1 else "16"
        ds.MagneticFieldStrength = "1.5"
        ds.SpacingBetweenSlices = f"{plan.gap_mm:.6g}"
        ds.PatientPosition = "HFS"
        ds.StudyInstanceUID = _uid(study_id)
        ds.SeriesInstanceUID = series_uid
        ds.StudyID = "1"
        ds.SeriesNumber, ds.InstanceNumber = str(number), str(int(plan.instances[k]))
        ds.ImagePositionPatient = text(plan.position_mm[k])
        ds.ImageOrientationPatient = text([*plan.row_cosine[k], *plan.column_cosine[k]])
        ds.FrameOfReferenceUID = frame_uid
        ds.PositionReferenceIndicator = ""
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows, ds.Columns = plan.shape
        ds.PixelSpacing = text(plan.spacing_mm)
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
        ds.PixelRepresentation = int(signed)
        top = float(stored[k].max()) * (slope or 1)
        ds.WindowCenter, ds.WindowWidth = f"{top * 0.4:.1f}", f"{top * 0.8 + 1:.1f}"
        if slope:
            ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", f"{slope:g}", "US"
        ds.PixelData = stored[k].tobytes()
        ds["PixelData"].VR = "OW"
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        if compress != "none":
            ds.compress(
                {"rle": pydicom.uid.RLELossless, "j2k": pydicom.uid.JPEG2000Lossless}[compress],
                generate_instance_uid=False,
            )
        ds.save_as(folder / f"{int(plan.instances[k])}.dcm", enforce_file_format=True)


# =====================================================================================
# 10. Data set
# =====================================================================================


def simulate(seed, prevalence=1.0, transitional=0.03, anomalies="real", severity=None, variety="standard"):
    """One study in memory: (anatomy, latent, grade, grids, plans, rng). severity (condition,
    level) in grade units replaces the sampled one; variety as in `sample_anatomy`."""
    rng = np.random.default_rng(seed)
    latent, grade = sample_severity(rng, 1, prevalence)
    latent, grade = latent[0], grade[0]
    visible = visible_severity(latent, prevalence) if severity is None else np.asarray(severity, float)
    anatomy = sample_anatomy(rng, visible, transitional, variety)
    grids = paint(anatomy)
    plans = sample_protocol(rng, anatomy, anomalies)
    return anatomy, latent, grade, grids, plans, rng


def back_of(anatomy: Anatomy) -> float:
    """y of the skin of the back at L3 in LPS mm."""
    return float(anatomy.canal_to_lps(0.0, 0.0, anatomy.disc_s_mm[2])[1] + 50 + anatomy.body["fat_back_mm"])


def acquire_study(rng, anatomy, grids, plans) -> list:
    """Image stacks of all plans; renderings are shared by series of one contrast table."""
    stacks, rendered = [], {}
    for plan in plans:
        if plan.contrast not in rendered:
            table = contrast_table(plan.contrast, rng)
            rendered[plan.contrast] = [render(g, table) for g in grids]
        front = np.array([(v.centre_mm - v.frame[:, 1] * v.depth_mm / 2)[1:] for v in anatomy.vertebrae])
        stacks.append(acquire(rng, grids, plan, rendered[plan.contrast], back_of(anatomy), front))
    return stacks


def _missing(rng, anomalies):
    """Which cells have no grade, no coordinates: two masks (condition, level)."""
    rate = np.full((5, 5), 0.0015)
    rate[3:, :2] = 0.055
    rate[3:, 2:] = 0.009
    no_grade = rng.random((5, 5)) < rate
    no_point = no_grade & (rng.random((5, 5)) < 0.94)
    no_point |= ~no_grade & (rng.random((5, 5)) < 0.003)
    if anomalies != "real":
        no_grade[:] = no_point[:] = False
    return no_grade, no_point


def _make_study(job: dict) -> dict:
    """Worker: make one study and write its images; returns its table rows."""
    done = Path(job["out"]) / ".studies" / f"{job['study_id']}.json"
    if done.exists():
        try:
            return json.loads(done.read_text())
        except ValueError:  # cut, when the power failed
            done.unlink()
    anatomy, latent, grade, grids, plans, rng = simulate(
        job["seed"], job["prevalence"], job["transitional"], job["anomalies"], variety=job["variety"]
    )
    stacks = acquire_study(rng, anatomy, grids, plans)
    base = Path(job["out"]) / f"{job['split']}_images" / str(job["study_id"])
    used = set()
    for number, (plan, stack) in enumerate(zip(plans, stacks), 1):
        while plan.series_id == 0 or plan.series_id in used:
            plan.series_id = int(rng.integers(1e6, 2**32))
        used.add(plan.series_id)
        write_series(
            base / str(plan.series_id),
            plan,
            stack,
            study_id=job["study_id"],
            number=number,
            patient=f"PHANTOM^{job['index']:04d}",
            rng=rng,
            compress=job["compress"],
            anomalies=job["anomalies"],
        )
    no_grade, no_point = _missing(rng, job["anomalies"])
    points = []
    for (c, level), where in sorted(anatomy.points_mm().items()):
        kind = "Sagittal T2/STIR" if c == 0 else "Sagittal T1" if c < 3 else "Axial T2"
        jitter = rng.normal(0, 1.0, 2)  # mm: readers click
        if no_point[c, level]:
            continue
        found = [(*p.project(where), p) for p in plans if p.description == kind]
        found = [f for f in found if f[3] < 0.75 * f[4].gap_mm + 1]
        if not found:
            continue
        k, x, y, _, plan = min(found, key=lambda f: f[3])
        points.append(
            [
                plan.series_id,
                int(plan.instances[k]),
                condition_title(CONDITIONS[c]),
                level_title(LEVELS[level]),
                x + jitter[0] / plan.spacing_mm[1],
                y + jitter[1] / plan.spacing_mm[0],
            ]
        )
    vertebrae = []
    for v in anatomy.vertebrae:
        if v.name in TRUTH_VERTEBRAE:
            vertebrae.append([v.name, *v.centre_mm, *v.corners_mm().ravel(), *v.frame[:, 2], v.width_mm / 2])
    grade = np.where(no_grade, -1, grade)
    row = dict(
        study_id=job["study_id"],
        split=job["split"],
        index=job["index"],
        series=[[p.series_id, p.description] for p in plans],
        latent=latent.tolist(),
        grade=grade.tolist(),
        points=points,
        vertebrae=[[v[0], *map(float, v[1:])] for v in vertebrae],
        variant=anatomy.variant,
        severity=anatomy.severity.tolist(),
    )
    temporary = done.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(row))
    temporary.replace(done)
    return row


def make_dataset(
    out,
    train: int = 60,
    test: int = 12,
    seed: int = 0,
    workers: int = 2,
    prevalence: float = 1.0,
    transitional: float = 0.03,
    compress: str = "none",
    anomalies: str = "real",
    progress: bool = True,
    variety: str = "standard",
) -> dict:
    """Write a data set and return its floor (the perfect reader's scores).

    The same arguments give the same bytes for any number of workers. An interrupted run goes on
    where it stopped; a folder that holds another data set is refused."""
    out = Path(out)
    settings = dict(
        version=VERSION,
        train=train,
        test=test,
        seed=seed,
        prevalence=prevalence,
        transitional=transitional,
        compress=compress,
        anomalies=anomalies,
    )
    if variety != "standard":  # the standard's marker stays as it was
        settings["variety"] = variety
    marker = out / "phantom.json"
    if marker.exists():
        try:
            same = json.loads(marker.read_text()) == settings
        except ValueError:
            raise FileExistsError(f"{marker} is damaged: delete {out}, or choose another folder") from None
        if not same:
            raise FileExistsError(
                f"{out} holds another data set ({marker.read_text().strip()}); choose another folder or delete it"
            )
        try:
            return json.loads((out / "phantom_floor.json").read_text())
        except (FileNotFoundError, ValueError):  # not finished, or cut
            pass
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and was not made by phantom.py: choose another folder")
    (out / ".studies").mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(settings) + "\n")

    ids = np.random.default_rng([seed, 77]).choice(4_290_000_000, train + test, replace=False) + 1_000_000
    seeds = np.random.SeedSequence(seed).spawn(train + test)
    jobs = [
        dict(
            out=str(out),
            study_id=int(ids[i]),
            split="train" if i < train else "test",
            index=i + 1,
            seed=seeds[i],
            prevalence=prevalence,
            transitional=transitional,
            compress=compress,
            anomalies=anomalies,
            variety=variety,
        )
        for i in range(train + test)
    ]
    rows = list(_run(jobs, workers, progress))
    floor = _write_tables(out, rows, prevalence)
    for file in (out / ".studies").iterdir():
        file.unlink()
    (out / ".studies").rmdir()
    return floor


def _run(jobs, workers, progress):
    from tqdm import tqdm

    bar = tqdm(total=len(jobs), desc="phantom", unit="study", disable=not progress)
    if workers <= 1:
        for job in jobs:
            yield _make_study(job)
            bar.update()
    else:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for row in pool.imap(_make_study, jobs):
                yield row
                bar.update()
    bar.close()


def _write_tables(out: Path, rows: list, prevalence: float) -> dict:
    """All CSV files; phantom_floor.json last."""
    import utils  # needs torch: not at the top, workers do without

    def labels(rows):
        values = [[r["study_id"], *[GRADES[g] if g >= 0 else np.nan for g in np.ravel(r["grade"])]] for r in rows]
        return pd.DataFrame(values, columns=["study_id", *LABEL_COLUMNS]).sort_values("study_id")

    def series(rows):
        values = [[r["study_id"], *s] for r in rows for s in r["series"]]
        return pd.DataFrame(values, columns=["study_id", "series_id", "series_description"])

    by = {k: sorted([r for r in rows if r["split"] == k], key=lambda r: r["study_id"]) for k in ("train", "test")}
    labels(by["train"]).to_csv(out / "train.csv", index=False)
    labels(by["test"]).to_csv(out / "phantom_test_labels.csv", index=False)
    for k in by:
        series(by[k]).to_csv(out / f"{k}_series_descriptions.csv", index=False)
    columns = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
    pd.DataFrame([[r["study_id"], *p] for r in by["train"] for p in r["points"]], columns=columns).to_csv(
        out / "train_label_coordinates.csv", index=False
    )
    test_ids = [r["study_id"] for r in by["test"]]
    uniform = np.full((len(test_ids), 5, 5, 3), 1 / 3)
    submission_table(test_ids, uniform).to_csv(out / "sample_submission.csv", index=False)
    columns = [
        "study_id",
        "split",
        "vertebra",
        "x_mm",
        "y_mm",
        "z_mm",
        *[f"{c}_{k}_mm" for c in CORNERS for k in "xyz"],
        "normal_x",
        "normal_y",
        "normal_z",
        "half_width_mm",
        "variant",
    ]
    pd.DataFrame(
        [[r["study_id"], k, *v, r["variant"]] for k in by for r in by[k] for v in r["vertebrae"]], columns=columns
    ).round(4).to_csv(out / "phantom_vertebrae.csv", index=False)
    pd.DataFrame(
        [
            [r["study_id"], k, CONDITIONS[c], LEVELS[v], r["latent"][c][v], r["severity"][c][v], r["grade"][c][v]]
            for k in by
            for r in by[k]
            for c in range(5)
            for v in range(5)
        ],
        columns=["study_id", "split", "condition", "level", "latent", "severity", "grade"],
    ).round(6).to_csv(out / "phantom_severity.csv", index=False)
    floor = {}
    for k in by:
        if by[k]:
            floor[k] = utils.competition_score(labels(by[k]), perfect_submission(out, k))["total"]
    (out / "phantom_floor.json").write_text(json.dumps(floor) + "\n")
    return floor


# =====================================================================================
# 11. Figure and command line
# =====================================================================================


def _panel(ax, image, title, centre=None, half_mm=None, spacing_mm=1.0, window=None):
    """Show a slice, or the square of +-half_mm around a pixel (x, y)."""
    ax.imshow(image, cmap="gray", vmin=0, vmax=window or np.percentile(image, 98), interpolation="bicubic")
    if centre is not None:
        r = half_mm / spacing_mm
        ax.set_xlim(centre[0] - r, centre[0] + r)
        ax.set_ylim(centre[1] + r, centre[1] - r)
    ax.set_title(title, fontsize=10)
    ax.set_xticks([]), ax.set_yticks([])


def figure(out_png, seed: int = 3):
    """Draw one study in three planes, and one level healthy beside the same level severe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def study(severity):
        anatomy, _, _, grids, plans, rng = simulate(seed, severity=severity, anomalies="none")
        return anatomy, plans, acquire_study(rng, anatomy, grids, plans)

    def cut(made, key):
        anatomy, plans, stacks = made
        kind = "Sagittal T2/STIR" if key[0] == 0 else "Sagittal T1" if key[0] < 3 else "Axial T2"
        i = [p.description for p in plans].index(kind)
        k, x, y, _ = plans[i].project(anatomy.points_mm()[key])
        return stacks[i][k], (x, y), plans[i].spacing_mm[0], plans[i], k

    level = 3
    mild = np.full((5, 5), 0.1)
    ill = {name: mild.copy() for name in ("canal", "foramen", "recess")}
    ill["canal"][0, level] = ill["foramen"][1, level] = ill["recess"][3, level] = 2.6
    healthy, made = study(mild), {k: study(v) for k, v in ill.items()}

    fig = plt.figure(figsize=(15, 11.6), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[1.0, 1.85])
    axes = top.subplots(1, 4)
    anatomy, plans, stacks = healthy
    t1 = next(i for i, p in enumerate(plans) if p.description == "Sagittal T1")
    image, _, _, plan, k = cut(healthy, (0, 2))
    j = plans[t1].project(anatomy.points_mm()[0, 2])[0]
    _panel(axes[0], stacks[t1][j], "Sagittal T1, middle")
    _panel(axes[1], image, f"Sagittal {plan.contrast}, middle")
    for ax, p, i in ((axes[0], plans[t1], j), (axes[1], plan, k)):
        for v in anatomy.vertebrae:
            q = v.centre_mm - p.position_mm[i]
            x, y = q @ p.row_cosine[i] / p.spacing_mm[1], q @ p.column_cosine[i] / p.spacing_mm[0]
            if 0 < y < p.shape[0] and v.name in TRUTH_VERTEBRAE:
                ax.text(x, y, v.name, color="gold", fontsize=8, ha="center", va="center")
    _panel(axes[2], cut(healthy, (1, 2))[0], "Sagittal T1 through the left foramina")
    _panel(axes[3], cut(healthy, (3, 2))[0], "Axial T2 at L3/L4")
    axes = bottom.subplots(2, 4)
    shows = (
        ("canal", (0, level), 42, "Canal, sagittal T2"),
        ("canal", (3, level), 42, "Canal, axial T2"),
        ("foramen", (1, level), 38, "Left foramen, sagittal T1"),
        ("recess", (3, level), 34, "Left recess, axial T2"),
    )
    for column, (which, key, half, title) in enumerate(shows):
        for row, (one, word) in enumerate(((healthy, "healthy"), (made[which], "severe"))):
            image, (x, y), spacing, *_ = cut(one, key)
            if which == "canal" and key[0] == 3:
                x -= RECESS_U_MM / spacing
            r = int(half / spacing)
            inside = image[max(0, int(y) - r) : int(y) + r, max(0, int(x) - r) : int(x) + r]
            window = 1.05 * np.percentile(inside, 99)
            _panel(axes[row, column], image, f"{title}: {word}", (x, y), half, spacing, window)
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out_png, dpi=80)
    plt.close(fig)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Synthetic lumbar MRI in the competition's layout.")
    parser.add_argument("out", nargs="?", help="folder to write")
    parser.add_argument("--train", type=int, default=60)
    parser.add_argument("--test", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prevalence", type=float, default=1.0, help="factor on the odds of disease")
    parser.add_argument("--transitional", type=float, default=0.03, help="share of transitional vertebrae")
    parser.add_argument("--compress", choices=("none", "rle", "j2k"), default="none")
    parser.add_argument("--anomalies", choices=("real", "none"), default="real")
    parser.add_argument("--variety", choices=("standard", "wide"), default="standard", help="spread of spines")
    parser.add_argument("--figure", metavar="PNG", help="draw an example instead")
    a = parser.parse_args(arguments)
    if a.figure:
        figure(a.figure)
        return 0
    if not a.out:
        parser.error("OUT is missing")
    if a.train + a.test < 1:
        parser.error("--train and --test are both 0: there is nothing to make")
    try:
        floor = make_dataset(
            a.out,
            a.train,
            a.test,
            a.seed,
            a.workers,
            a.prevalence,
            a.transitional,
            a.compress,
            a.anomalies,
            variety=a.variety,
        )
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 2
    print("floor (score of a reader who knows the anatomy): " + ", ".join(f"{k} {v:.4f}" for k, v in floor.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
