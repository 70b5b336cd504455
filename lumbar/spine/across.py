"""Where the middle of a body lies across sagittal slices, and how surely that is known.

May use: nothing of the kit.
"""

import numpy as np

# The first and the last slice that shows a body are a matter of chance, and a stack may end within it. But a body's
# outline is round: towards its sides it gets shallower, then less sure, then it is gone. Figures below were seen on
# phantoms, by the distance from the middle in half widths.
_AWAY = (0.0, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.1)
_LOG_DEPTH = (0.0, 0.0, -0.004, -0.007, -0.025, -0.042, -0.068, -0.105, -0.145, -0.18, -0.2)
_SURENESS = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.02, -0.065, -0.17, -0.22)
_SEEN_WITHIN, _SEEN_STEEPNESS = 0.955, 17.5  # as often seen as not, and how quickly that changes
_LOG_DEPTH_SD, _SURENESS_SD = 0.04, 0.05  # of one slice
_MOST_OFF = 3.0  # nats: no slice outvotes the others
_HALF_WIDTH, _HALF_WIDTH_SD = 0.62, 0.06  # of a body, in its depths
_TEMPER, _APART_MM = 0.7, 4.0  # slices err together, those nearer than this all the more


def middle_across(
    index: np.ndarray, depth_mm: np.ndarray, sureness: np.ndarray, count: int, step_mm: float
) -> tuple[float, float]:
    """(index of a body's middle, its standard deviation in mm) from the slices that show it.

    index: (n,) rising, of these slices; depth_mm: (n,) the body's from front to back in each; sureness: (n,) of the
    detection in each, 0 to 1; count: slices of the stack; step_mm: from slice to slice. The answer is the mean over
    where the middle may be and how wide the body is.
    """
    middle = (index[0] + index[-1]) / 2
    place_mm = (index - middle) * step_mm
    best = np.sort(sureness)[::-1][:5].mean()
    deep_mm = max(float(np.median(depth_mm[sureness >= np.median(sureness)])), 1.0)
    half_mm = deep_mm * (_HALF_WIDTH + _HALF_WIDTH_SD * np.linspace(-2, 2, 5))[:, None]
    reach_mm = max(deep_mm * _HALF_WIDTH, step_mm)
    grid_mm = np.linspace(-reach_mm, reach_mm, 2 * int(np.ceil(reach_mm / 0.5)) + 1)
    away = np.abs(place_mm - grid_mm[:, None])[None] / half_mm[..., None]  # (widths, middles, slices)
    score = -0.5 * np.linspace(-2, 2, 5)[:, None] ** 2 + _log_chance(away, True).sum(2)
    if len(index) > 2:  # from two slices nothing can be told about a curve
        deviation = np.log(np.maximum(depth_mm, 1e-3)) - np.interp(away, _AWAY, _LOG_DEPTH)
        deviation = deviation - np.median(deviation, 2, keepdims=True)
        score = score - np.minimum(0.5 * (deviation / _LOG_DEPTH_SD) ** 2, _MOST_OFF).sum(2)
    deviation = sureness / max(best, 1e-6) - 1 - np.interp(away, _AWAY, _SURENESS)
    score = score - np.minimum(0.5 * (deviation / _SURENESS_SD) ** 2, _MOST_OFF).sum(2)
    for beside in (index[0] - 2, index[0] - 1, index[-1] + 1, index[-1] + 2):
        if 0 <= beside < count:
            score = score + _log_chance(np.abs((beside - middle) * step_mm - grid_mm) / half_mm, False)
    weight = np.exp(_TEMPER * min(1.0, step_mm / _APART_MM) * (score - score.max())).sum(0)
    weight = weight / weight.sum()
    mean_mm = float(weight @ grid_mm)
    return middle + mean_mm / step_mm, float(np.sqrt(weight @ (grid_mm - mean_mm) ** 2 + (step_mm / 12) ** 2))


def _log_chance(away, seen):
    """Logarithm of the chance that a slice so far from the middle shows the body, or does not."""
    return -np.logaddexp(0, (1 if seen else -1) * _SEEN_STEEPNESS * (away - _SEEN_WITHIN))
