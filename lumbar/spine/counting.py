"""How a data set's readers number a spine that can be numbered in two ways, learned from where their points lie.

May use: vertebra, names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax

from ..names import LEVEL_VERTEBRAE
from .vertebra import _CHAIN, spine_class

# One spine in ten has a vertebra between lumbar and sacral. Where the numbering starts there is convention: some count
# down from the ribs, some let the last full disc be L5/S1. The network's looks and the chain's layout follow the
# phantom's convention; here a few weights move whole numberings by one to where a data set's readers have them.

STEPS = (-1, 0, 1)  # every name becomes the one above, stays, becomes the one below
COUNTING_FEATURES = (
    "l5_s1_gap",  # how high the disc called L5/S1 is, in tenths of a body's height
    "s1_s2_gap",  # the same of the disc called S1/S2
    "l5_s1_turn",  # how much the body called S1 is turned against L5, in units of 5 degrees
    "s1_s2_depth",  # log of the depths' ratio of the bodies called S2 and S1, in tenths
    "lower_looks",  # log-probability, halved, that the bodies around the sacrum look like their names
    "upper_looks",  # the same around the last rib
    "above",  # 1 for the numbering by the names above
    "below",  # 1 for the one by the names below
)
_SPREAD = 3.0  # standard deviation of each weight before anything is learned
_SLIPS = 0.03  # share of studies whose points may say any numbering
_LEAST_SHARE = 0.01  # of a numbering: the chain knows one convention and is surer of it than readers are
_FEWEST = 20  # studies with points, below which nothing is learned
_FEWEST_MOVED = 3  # held-out studies that have to come right for each one that goes wrong, and at least
_LEAST_GAIN = 3.0  # nats by which the held-out names have to be more likely
_NEAR_MM = 12.0  # a point's distance from its disc's plane, at most


@dataclass(frozen=True)
class Numberings:
    """A chain's numbering as the layout has it, and those by one name above and below (STEPS).

    discs: (n, 7) for each disc between two neighbours: index into _CHAIN of the upper one, centre LPS mm, unit vector
    to the head; log_shares: (3,) how likely each numbering is; features: (3, len(COUNTING_FEATURES)).
    """

    discs: np.ndarray
    log_shares: np.ndarray
    features: np.ndarray

    def to_json(self) -> dict[str, list]:
        """Lists, as from_json takes them."""
        return {
            "discs": self.discs.round(3).tolist(),
            "log_shares": self.log_shares.round(4).tolist(),
            "features": self.features.round(4).tolist(),
        }

    @classmethod
    def from_json(cls, known: Mapping[str, list]) -> "Numberings":
        """What to_json made. Raises ValueError for anything else."""
        try:
            discs = np.array(known["discs"], float).reshape(-1, 7)
            log_shares = np.array(known["log_shares"], float).reshape(len(STEPS))
            features = np.array(known["features"], float).reshape(len(STEPS), len(COUNTING_FEATURES))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no numberings ({error})") from error
        if not all(np.isfinite(part).all() for part in (discs, log_shares, features)):
            raise ValueError("numberings that are not finite")
        return cls(discs, log_shares, features)


def numberings_of(
    names: Mapping[int, int],
    shares: np.ndarray,
    seen: Mapping[str, np.ndarray],
    seen_pairs: Mapping[str, np.ndarray],
    usual_pairs: Mapping[str, np.ndarray],
    looks: Sequence[np.ndarray | None],
) -> Numberings:
    """Measure a chain under its numbering and the two beside it.

    names: dict detection -> index into _CHAIN; shares: (detections, names); seen, seen_pairs: naming._shapes and
    _pair_shapes of the detections; usual_pairs: of the layout, which stands in for discs that were not seen; looks: of
    each detection, or None.
    """
    at = {k: i for i, k in names.items()}

    def pair(measure, upper):
        if upper in at and upper + 1 in at:
            return seen_pairs[measure][at[upper], at[upper + 1]]
        return usual_pairs[measure][upper, upper + 1]

    def look_like_names(step, around):
        total = 0.0
        for k in around:
            if k in at and looks[at[k]] is not None:
                total += max(looks[at[k]][spine_class(_CHAIN[k + step])], -4.0)
        return total / 2

    def share(step):
        return np.median([shares[i, k + step] if 0 <= k + step < shares.shape[1] else 0.0 for i, k in names.items()])

    last = _CHAIN.index("L5")
    first = _CHAIN.index("T12")
    features = [
        [
            10 * pair("gap", last - step),
            10 * pair("gap", last + 1 - step),
            pair("turn_deg", last - step) / 5,
            10 * pair("narrowing", last + 1 - step),
            look_like_names(step, range(last - 1, last + 3)),
            look_like_names(step, range(first - 1, first + 3)),
            float(step == -1),
            float(step == 1),
        ]
        for step in STEPS
    ]
    discs = []
    for k in sorted(at):
        if k + 1 in at:
            upper, lower = at[k], at[k + 1]
            middle = (seen["center"][upper] + seen["center"][lower]) / 2
            middle[1:] = (seen["lower"][upper] + seen["upper"][lower]) / 2
            head = np.array([0.0, *(seen["center"][upper] - seen["center"][lower])[1:]])
            discs.append([k, *middle, *(head / max(np.linalg.norm(head), 1e-6))])
    log_shares = np.log(np.maximum([share(step) for step in STEPS], _LEAST_SHARE))
    return Numberings(np.array(discs).reshape(-1, 7), log_shares, np.array(features))


def counted_shares(numberings: Numberings, counting: Mapping[str, float]) -> np.ndarray:
    """(3,) how likely readers who count so are to have each numbering of STEPS; they sum up to 1.

    counting: of fit_counting; {} leaves the chain's own shares.
    """
    weights = np.array([counting.get(name, 0.0) for name in COUNTING_FEATURES])
    return softmax(numberings.log_shares + (numberings.features - numberings.features[1]) @ weights, -1)


def readers_step(numberings: Numberings, points: Mapping[str, np.ndarray]) -> int | None:
    """By how many names readers number a chain lower than its layout does; None where their points do not tell.

    points: dict level -> (n, 3) LPS mm at the height of the disc, some millimetres behind it. Three levels have to be
    near a disc, and two of three of these to agree: single points slip.
    """
    steps = []
    for level, where in points.items():
        if not len(numberings.discs):
            break
        along = (where.mean(0) - numberings.discs[:, 1:4]) * numberings.discs[:, 4:]
        away_mm = np.abs(along.sum(1))
        nearest = int(away_mm.argmin())
        if away_mm[nearest] < _NEAR_MM:
            steps.append(_CHAIN.index(LEVEL_VERTEBRAE[level][0]) - int(numberings.discs[nearest, 0]))
    if len(steps) < 3:
        return None
    values, counts = np.unique(steps, return_counts=True)
    return int(values[counts.argmax()]) if 3 * counts.max() >= 2 * len(steps) else None


def _fit(log_shares, features, which):
    """(len(COUNTING_FEATURES),) the most likely weights; log_shares: (n, 3), features: (n, 3, f) against the chain's
    own numbering, which: (n,) index into STEPS."""
    rows = np.arange(len(which))

    def loss(weights):
        p = softmax(log_shares + features @ weights, -1)
        true = p[rows, which]
        likely = (1 - _SLIPS) * true + _SLIPS / len(STEPS)
        # d log(likely) = share of it that is no slip, times d log(true)
        part = (1 - _SLIPS) * true / likely
        slope = features[rows, which] - (p[:, :, None] * features).sum(1)
        value = -np.log(likely).sum() + 0.5 * (weights @ weights) / _SPREAD**2
        return value, -(part[:, None] * slope).sum(0) + weights / _SPREAD**2

    # Looks may count more than they do in the chain; fewer would be another way to write "above" and "below".
    bounds = [(0 if name.endswith("looks") else None, None) for name in COUNTING_FEATURES]
    return minimize(loss, np.zeros(features.shape[2]), jac=True, method="L-BFGS-B", bounds=bounds).x


def _log_likelihood(log_shares, features, which, weights):
    p = softmax(log_shares + features @ weights, -1)[np.arange(len(which)), which]
    return np.log((1 - _SLIPS) * p + _SLIPS / len(STEPS))


def fit_counting(
    numberings: Sequence[Numberings],
    steps: Sequence[int | None],
    start: Mapping[str, float] | None = None,
    folds: int = 5,
) -> dict[str, float]:
    """Weights of COUNTING_FEATURES under which the readers' numberings are most likely; {} where nothing is to learn.

    numberings, steps: of each study (readers_step); start: what was learned elsewhere, which stays where fewer than
    _FEWEST studies have a step. The weights are pulled towards 0, and a few studies may be slips of
    the pen. What is learned has to hold where it was not learned: in cross-validation it must move at least
    _FEWEST_MOVED studies to the readers' numbering, as many times more than away from it, and make their names more
    likely by _LEAST_GAIN nats. Else the chain's own numbering stays.
    """
    known = [(n, STEPS.index(step)) for n, step in zip(numberings, steps, strict=True) if step in STEPS]
    if len(known) < _FEWEST:
        return dict(start or {})
    log_shares = np.stack([n.log_shares for n, _ in known])
    features = np.stack([n.features - n.features[1] for n, _ in known])
    which = np.array([k for _, k in known])
    # Each fold gets its part of those that are numbered another way.
    fold = np.empty(len(known), int)
    fold[np.argsort(which, kind="stable")] = np.arange(len(known)) % folds
    gain, right, wrong = 0.0, 0, 0
    for k in range(folds):
        out = fold == k
        weights = _fit(log_shares[~out], features[~out], which[~out])
        held_out = log_shares[out], features[out], which[out]
        gain += (_log_likelihood(*held_out, weights) - _log_likelihood(*held_out, 0 * weights)).sum()
        before = log_shares[out].argmax(1) == which[out]
        after = (log_shares[out] + features[out] @ weights).argmax(1) == which[out]
        right, wrong = right + (after & ~before).sum(), wrong + (before & ~after).sum()
    if gain < _LEAST_GAIN or right < _FEWEST_MOVED * max(wrong, 1):
        return {}
    weights = _fit(log_shares, features, which)
    return {name: round(float(w), 4) for name, w in zip(COUNTING_FEATURES, weights, strict=True)}
