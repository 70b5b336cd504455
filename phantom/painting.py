"""An anatomy painted into tissue grids, from the outside in.

May use: bones, canal, soft_tissue, anatomy, grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .anatomy import Anatomy
from .bones import paint_disc, paint_ligaments, paint_metal, paint_pelvis, paint_scar, paint_vertebra
from .canal import paint_canal, paint_canal_extras
from .grid import Noise, TissueGrid
from .soft_tissue import paint_body


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
    noise = Noise(a.seed)
    for grid in (body, spine):
        paint_body(grid, a, noise)
        paint_pelvis(grid, a)
    for disc in a.discs:
        for grid in (body, spine) if disc.above in ("T8", "T9", "T10", "S3", "S4") else (spine,):
            paint_disc(grid, a, disc, noise)
    if a.wide:
        paint_ligaments(spine, a)
        kept = np.zeros(spine.shape, bool)
    for vertebra in a.vertebrae:
        for grid in (body, spine) if vertebra.name in ("T8", "T9", "T10", "S3", "S4", "S5") else (spine,):
            paint_vertebra(grid, a, vertebra, noise, kept if a.wide and grid is spine else None)
    if a.wide:
        paint_scar(spine, a)
        spine.keep = kept  # where a body has slipped, the canal gives way and not the body's corner
    paint_canal(spine, a, noise)
    if a.wide:
        paint_canal_extras(spine, a)
        spine.keep = None
        paint_metal(spine, a)
    return spine, body
