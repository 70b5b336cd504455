"""What makes a data set harder and truer: patients who move, artefacts, readers who slip and click beside.

Each draws from a generator of its own, so that a study without any is what it was.

May use: scanner, lumbar.names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from lumbar.names import GROUPS, LEVELS, SEVERITIES

from .scanner import SeriesPlan


@dataclass(frozen=True)
class Hardship:
    """How hard a data set is; the defaults are how it was without this.

    motion: share of series with an artefact, see disturb; half as many are torn in two besides, and with more than 0
    all lie a millimetre or so beside what their headers say (moved_plans); 0 to 1.
    slips: how many of a reader's levels are called by a neighbour's name, and how many grades are one off; 0 to 0.5.
    scatter_mm: standard deviation of label points in each direction of the slice; with more than the 1 mm of the
    default some lie far off, and a quarter on the next slice.
    Raises ValueError for values beyond.
    """

    motion: float = 0.0
    slips: float = 0.0
    scatter_mm: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("motion", 1.0), ("slips", 0.5), ("scatter_mm", 10.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from 0 to {most:g}")

    @property
    def settings(self) -> dict[str, float]:
        """What differs from the defaults."""
        return {k: getattr(self, k) for k in ("motion", "slips", "scatter_mm") if getattr(self, k) != getattr(_NONE, k)}


_NONE = Hardship()
HARD = Hardship(motion=0.35, slips=0.01, scatter_mm=2.0)


# -- the patient moves


def moved_plans(rng: np.random.Generator, plans: list[SeriesPlan], motion: float) -> list[SeriesPlan]:
    """Where the slices of each series really lie: the headers go on saying what was planned.

    Between two series patients move by a millimetre or two; half of `motion` of the series are besides torn in two, the
    odd slices (measured in one go, before the even ones) lying a millimetre or more beside the others.
    """
    moved = []
    for plan in plans:
        position = plan.position_mm + rng.normal(0, 1.0, 3)
        torn, by_mm = rng.random() < motion / 2, rng.normal(0, 1.2, 3)
        if torn:
            position = position + np.where(np.arange(len(position))[:, None] % 2, by_mm, 0.0)
        moved.append(replace(plan, position_mm=position))
    return moved


def disturb(rng: np.random.Generator, image: np.ndarray, motion: float) -> np.ndarray:
    """A series' slices (n, rows, columns) float32 with artefacts in `motion` of the cases, one kind each.

    Ghosts: faint copies along the phase direction, as breathing and pulsing vessels leave them. Blur along it, in some
    slices or all. A spike in k-space: stripes over a few slices. Noise: twice as much as usual. A zip of bright dots
    along one row, from a radio frequency that leaks in.
    """
    if rng.random() >= motion:
        return image
    image, kind = image.copy(), rng.choice(5, p=(0.4, 0.25, 0.1, 0.15, 0.1))
    n, rows, columns = image.shape
    axis = int(rng.integers(1, 3))
    some = np.flatnonzero(rng.random(n) < rng.uniform(0.3, 1.0))
    some = some if len(some) else np.arange(n)
    if kind == 0:
        strength, apart = rng.uniform(0.06, 0.2), image.shape[axis] * rng.uniform(0.08, 0.3)
        for order in (1, 2):
            for sign in (-1, 1):
                copy = np.roll(image[some], sign * round(order * apart), axis)
                image[some] += strength / order * (copy - copy.mean())
    elif kind == 1:
        sigma = [0.0, 0.0, 0.0]
        sigma[axis] = rng.uniform(0.8, 2.0)
        image[some] = ndimage.gaussian_filter(image[some], sigma)
    elif kind == 2:
        row, column = np.indices((rows, columns))
        wave = 2 * np.pi * (row * rng.uniform(0.02, 0.3) + column * rng.uniform(0.02, 0.3))
        for k in some[:4]:
            image[k] += (rng.uniform(0.05, 0.15) * np.sin(wave + rng.uniform(0, 6.3))).astype(np.float32)
    elif kind == 3:
        image += rng.normal(0, rng.uniform(0.03, 0.06), image.shape).astype(np.float32)
    else:
        where: list[Any] = [some, slice(None), slice(None)]
        where[axis] = int(rng.integers(image.shape[axis] // 8, image.shape[axis]))
        line = image[tuple(where)]
        image[tuple(where)] = line + rng.uniform(0.2, 0.8) * (rng.random(line.shape) < 0.5)
    return np.maximum(image, 0, out=image).astype(np.float32, copy=False)


# -- the readers err


def slipped(
    rng: np.random.Generator, grade: np.ndarray, points: list[list], slips: float
) -> tuple[np.ndarray, list[list]]:
    """What readers who slip hand in: (grades (5, 5) with -1 for none, label points).

    A reader goes through one kind of condition (canal, foramina, subarticular) at a time: with the chance `slips` all
    of its levels get their neighbour's name. What falls off the end is lost, what is left free has no grade. Of all
    grades `slips` are one off. points: rows of (series, instance, condition, level, x, y), the two as indices.
    """
    grade = grade.copy()
    for conditions in GROUPS.values():
        if rng.random() >= slips:
            continue
        rows, step = list(conditions), int(rng.choice((-1, 1)))
        before = grade[rows]
        grade[rows] = -1
        kept = slice(max(step, 0), len(LEVELS) + min(step, 0))
        grade[rows, kept] = before[:, max(-step, 0) : len(LEVELS) - max(step, 0)]
        moved = [[*p[:3], p[3] + step, *p[4:]] if p[2] in rows else p for p in points]
        points = [p for p in moved if p[3] in range(len(LEVELS))]
    off = (rng.random(grade.shape) < slips) & (grade >= 0)
    by = np.where(rng.random(grade.shape) < 0.5, -1, 1)
    by = np.where(grade == 0, 1, np.where(grade == len(SEVERITIES) - 1, -1, by))
    return np.where(off, grade + by, grade), points


def scattered(rng: np.random.Generator, offset: np.ndarray, scatter_mm: float) -> tuple[np.ndarray, int]:
    """How far from the place a reader clicks: ((2,) mm along the slice's rows and columns, slices beside it).

    offset: (2,) the same with a standard deviation of 1 mm.
    """
    if scatter_mm <= _NONE.scatter_mm:
        return offset * scatter_mm, 0
    far, beside = rng.random() < 0.03, rng.choice((-1, 0, 1), p=(0.125, 0.75, 0.125))
    return offset * scatter_mm * (3.0 if far else 1.0), int(beside)
