"""Tissues to grey values for T1, T2, STIR.

May use: grid.
"""

from __future__ import annotations

import numpy as np

from .grid import STANDARD_TISSUES, TISSUES, TissueGrid

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


def contrast_table(kind: str, rng: np.random.Generator | None = None) -> np.ndarray:
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
