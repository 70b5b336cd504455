"""Severity: the latent disease, its grades, the perfect reader and its score.

May use: lumbar.data, lumbar.names.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from lumbar.data.competition import to_submission
from lumbar.names import CLASS_COUNTS, SEVERITY_WEIGHTS

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


def grade_frequencies(prevalence: float = 1.0) -> np.ndarray:
    """Frequencies of the grades, (condition, level, grade); the odds of not being normal are
    those of the real data times `prevalence`, moderate : severe stays as it is."""
    counts = np.array(CLASS_COUNTS, float)
    p = counts / counts.sum(-1, keepdims=True)
    odds = prevalence * (1 - p[..., 0]) / p[..., 0]
    ill = odds / (1 + odds)
    share = p[..., 1:] / p[..., 1:].sum(-1, keepdims=True)
    return np.concatenate([1 - ill[..., None], ill[..., None] * share], -1)


def grade_thresholds(prevalence: float = 1.0) -> np.ndarray:
    """Thresholds of the graded standard normal variable, (condition, level, 2)."""
    return ndtri(np.cumsum(grade_frequencies(prevalence), -1)[..., :2])


def sample_severity(rng: np.random.Generator, n: int, prevalence: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
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
    p = np.maximum(np.diff(edges), 1e-9) * np.array(SEVERITY_WEIGHTS, float)
    return p / p.sum(-1, keepdims=True)


def perfect_submission(folder: str | Path, split: str = "test") -> pd.DataFrame:
    """The perfect reader's submission for a data set on disk (split 'test' or 'train')."""
    table = pd.read_csv(Path(folder) / "phantom_severity.csv")
    table = table[table["split"] == split]
    prevalence = json.loads((Path(folder) / "phantom.json").read_text())["prevalence"]
    ids = list(dict.fromkeys(table["study_id"]))
    latent = table["latent"].to_numpy().reshape(len(ids), 5, 5)  # written condition-major
    return to_submission(ids, perfect_reader(latent, prevalence))
