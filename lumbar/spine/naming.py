"""Bodies that were found, named in one chain.

May use: counting, vertebra, data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.source import Source
from .counting import STEPS, Numberings, counted_shares, numberings_of
from .vertebra import _CHAIN, AMBIGUOUS_SHARE, SPINE_CLASSES, UNCERTAIN, Vertebra, spine_class


def numbered_differently(first: Sequence[Vertebra], second: Sequence[Vertebra]) -> bool:
    """Do named bodies at the same place (half a body's height) mostly have different names in the two lists?"""
    verdicts = [
        a.name == b.name
        for a in first
        for b in second
        if a.name and b.name and UNCERTAIN not in (a.name, b.name)
        if np.linalg.norm(a.center_lps_mm - b.center_lps_mm) < 13.0
    ]
    return len(verdicts) > 1 and bool(np.mean(verdicts) < 0.5)


def _shapes(corners):
    """Bodies' shapes from corners (n, 4, 3): dict center (n, 3), head (n, 2) unit vector in (y, z), tilt_deg (n,) of
    the line from front to back out of the horizontal, depth_mm and height_mm (n,), upper and lower (n, 2) middles of
    the end plates in (y, z)."""
    sagittal = corners[:, :, 1:]
    upper, lower = sagittal[:, [0, 1]], sagittal[:, [3, 2]]
    back = (upper[:, 1] - upper[:, 0]) + (lower[:, 1] - lower[:, 0])
    back = back / np.maximum(np.linalg.norm(back, axis=1, keepdims=True), 1e-6)
    return {
        "center": corners.mean(1),
        "head": np.column_stack([-back[:, 1], back[:, 0]]),
        "tilt_deg": np.degrees(np.arctan2(back[:, 1], back[:, 0])),
        "depth_mm": np.maximum(np.linalg.norm(corners[:, [1, 2]] - corners[:, [0, 3]], axis=2).mean(1), 1.0),
        "height_mm": np.maximum(np.linalg.norm(corners[:, [0, 1]] - corners[:, [3, 2]], axis=2).mean(1), 1.0),
        "upper": upper.mean(1),
        "lower": lower.mean(1),
    }


def chain_layout(prior: Mapping[str, Any]) -> np.ndarray:
    """(len(_CHAIN), 4, 3) corners of the mean layout; names beyond its ends continue it by its last step."""
    layout = {name: np.array(corners, np.float64) for name, corners in prior["layout_mm"].items()}
    known = [k for k, name in enumerate(_CHAIN) if name in layout]
    corners = np.full((len(_CHAIN), 4, 3), np.nan)
    corners[known] = [layout[_CHAIN[k]] for k in known]
    inner = [k for k in range(known[0], known[-1]) if k not in known]
    for k in inner:  # between two known ones: halfway, by their number
        below, above = max(n for n in known if n < k), min(n for n in known if n > k)
        part = (k - below) / (above - below)
        corners[k] = (1 - part) * corners[below] + part * corners[above]
    for order, edge, step in ((range(known[0] - 1, -1, -1), known[0], 1), (range(known[-1] + 1, len(_CHAIN)), -1, -1)):
        edge = known[-1] if edge == -1 else edge
        move = corners[edge].mean(0) - corners[edge + step].mean(0)
        for k in order:
            corners[k] = corners[k + step] + move
    return corners


def _pair_shapes(shapes):
    """How each body `b` lies below each body `a`: dict of (n, n), indexed [a, b]: gap (between their end plates, in
    mean heights), turn_deg (change of tilt), narrowing (log of the ratio of depths)."""
    head = shapes["head"][:, None] + shapes["head"]
    head = head / np.maximum(np.linalg.norm(head, axis=2, keepdims=True), 1e-6)
    between = shapes["lower"][:, None] - shapes["upper"]
    height = (shapes["height_mm"][:, None] + shapes["height_mm"]) / 2
    turn = shapes["tilt_deg"] - shapes["tilt_deg"][:, None]
    return {
        "gap": (between * head).sum(2) / height,
        "turn_deg": (turn + 180) % 360 - 180,
        "narrowing": np.log(shapes["depth_mm"] / shapes["depth_mm"][:, None]),
    }


def capped_half_square(deviation: np.ndarray, cap: float) -> np.ndarray:
    """Half the square of a deviation in standard deviations, at most `cap`: no single measure outvotes the others."""
    return np.minimum(0.5 * deviation**2, cap)


# Spread of people and of measurements around the mean layout, (standard deviation, cap). Wide: a chain counts the
# same evidence several times over, and patients are no phantoms.
_PAIR_SPREAD = {"gap": (0.16, 2.0), "turn_deg": (8.0, 3.0), "narrowing": (0.12, 3.0)}
_TILT_SPREAD_DEG = (18.0, 2.0)
PLACE_SPREAD_MM = (30.0, 3.0)
_SIZES = (0.82, 0.91, 1.0, 1.09, 1.18)  # of a patient, against the mean layout
_OVERLOOKED = 2.5  # penalty for each body that the network would have missed between two that it saw


def _chain_scores(vertebrae, prior, center_lps_mm=None, size=1.0):
    """What _best_chain and _name_shares add up: (single (n, names), pair (n, n, names, names), drop (n,)).

    size: of the patient, against the mean layout.

    pair[a, b, k, l]: detection a is _CHAIN[k], b is _CHAIN[l] and the next below; -inf where that cannot be.
    """
    count, names = len(vertebrae), len(_CHAIN)
    corners = np.stack([v.corners_lps_mm for v in vertebrae])
    layout = chain_layout(prior)
    seen, usual = _shapes(corners), _shapes(layout)
    # No body's looks alone may outvote the order of all others.
    classes = np.array([spine_class(name) for name in _CHAIN])
    unknown = np.full(len(SPINE_CLASSES), -np.log(len(SPINE_CLASSES)))
    looks = [unknown if v.appearance is None else np.maximum(v.appearance, -4.0) for v in vertebrae]
    single = np.stack([look[classes] for look in looks])
    turned = (seen["tilt_deg"][:, None] - usual["tilt_deg"] + 180) % 360 - 180
    single = single - capped_half_square(turned / _TILT_SPREAD_DEG[0], _TILT_SPREAD_DEG[1])
    if center_lps_mm is not None:
        # A study is planned around L3: where in the series a body lies tells a little, once for the whole chain.
        away = seen["center"][:, 2, None] - (usual["center"][:, 2] + center_lps_mm[2])
        single = single - capped_half_square(away / PLACE_SPREAD_MM[0], PLACE_SPREAD_MM[1]) / count
    # Bodies that happen to stand in line are rare: a false one in its place is less likely than odd looks.
    drop = np.array([-4.0 - 4.0 * v.confidence for v in vertebrae])
    before = np.concatenate([[0.0], np.cumsum(drop)])
    step = np.arange(names) - np.arange(names)[:, None]
    allowed = (step >= 1) & (step <= 3)
    expected = size * (usual["center"] - usual["center"][:, None])
    expected_mm = np.maximum(np.linalg.norm(expected, axis=2), 1.0)
    apart = seen["center"] - seen["center"][:, None]
    error = np.linalg.norm(apart[:, :, None, None] - expected, axis=4) / expected_mm
    pair = -capped_half_square(error / 0.3, 20.0)
    seen_pairs, usual_pairs = _pair_shapes(seen), _pair_shapes(usual)
    for name, (spread, cap) in _PAIR_SPREAD.items():
        wide = spread * np.sqrt(np.maximum(step, 1))
        pair = pair - capped_half_square((seen_pairs[name][:, :, None, None] - usual_pairs[name]) / wide, cap)
    pair = pair - _OVERLOOKED * (step - 1)
    number = np.arange(count)
    skipped = before[None, :-1] - before[1:, None]  # all between a and b are dropped
    pair = pair + skipped[:, :, None, None]
    # Bodies do not overlap: at most one of the two is real.
    height = (seen["height_mm"][:, None] + seen["height_mm"]) / 2
    possible = (number[:, None] < number) & (np.linalg.norm(apart, axis=2) >= 0.7 * height)
    return single, np.where(possible[:, :, None, None] & allowed, pair, -np.inf), drop


def _log_sum(values, axis):
    top = values.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - top).sum(axis)) + top.squeeze(axis)


def _best_chain(single, pair, drop):
    """The naming with the highest score (Viterbi, 1967): list of (detection, index into _CHAIN), head to foot, and the
    score."""
    count, names = single.shape
    best = single + np.concatenate([[0.0], np.cumsum(drop)[:-1]])[:, None]
    back = np.full((count, names, 2), -1)
    for i in range(1, count):
        score = (best[:i, :, None] + pair[:i, i]).reshape(i * names, names)
        top = score.argmax(0)
        value = score[top, np.arange(names)] + single[i]
        better = value > best[i]
        best[i][better] = value[better]
        back[i][better] = np.column_stack(np.divmod(top, names))[better]
    after = np.concatenate([np.cumsum(drop[::-1])[::-1][1:], [0.0]])
    i, k = np.unravel_index(np.argmax(best + after[:, None]), best.shape)
    chain = []
    while i >= 0:
        chain.append((int(i), int(k)))
        i, k = back[i, k]
    return chain[::-1], float((best + after[:, None]).max())


def _name_shares(single, pair, drop):
    """(n, names): share of all namings, each weighted by its exponentiated score, that give the detection the name."""
    count, names = single.shape
    forth = single + np.concatenate([[0.0], np.cumsum(drop)[:-1]])[:, None]
    rear = np.repeat(np.concatenate([np.cumsum(drop[::-1])[::-1][1:], [0.0]])[:, None], names, 1)
    for i in range(1, count):
        by_way = (forth[:i, :, None] + pair[:i, i]).reshape(i * names, names)
        forth[i] = np.logaddexp(forth[i], _log_sum(by_way, 0) + single[i])
    for i in range(count - 2, -1, -1):
        by_way = pair[i, i + 1 :] + (single[i + 1 :] + rear[i + 1 :])[:, None]  # (later, names, names)
        rear[i] = np.logaddexp(rear[i], _log_sum(by_way.transpose(1, 0, 2).reshape(names, -1), 1))
    total = forth + rear
    ends = forth + np.concatenate([np.cumsum(drop[::-1])[::-1][1:], [0.0]])[:, None]
    return np.exp(total - _log_sum(ends.ravel(), 0))


# The score adds evidence that is correlated: neighbours see the same slice, a tilt and its change the same end plate.
# Taken at its word it would call nearly every naming sure, wrong ones included. Half of it fits what is seen on real
# volumes, less where no S1 is in the chain to count from (tests/benchmarks/bench_real.py draws the curve).
_TEMPER, _TEMPER_WITHOUT_S1 = 0.5, 0.3
_LEAST_SHARE = 0.1  # a less likely second numbering is not worth asking every member twice


@dataclass(frozen=True)
class SecondNumbering:
    """The naming of a whole chain that is next to the best: every name is another by `step` (1: the one below).

    share: of the two namings' probability, the second's.
    """

    step: int
    share: float


def _numbering(names, scores, numberings=None, counting=None):
    """(by how many names the chain is moved, how likely its names are as a whole, SecondNumbering or None).

    names: dict detection -> index into _CHAIN; scores: of _chain_scores. A chain is as likely as the median of its
    names: the upper ones' shares also count that a body was overlooked in between. Where a counting was learned
    (fit_counting) it divides what is likely among the numberings anew.
    """
    shares = _tempered_shares(names, scores)

    def share_of(step):
        moved = [(i, k + step) for i, k in names.items()]
        return float(np.median([shares[i, k] if 0 <= k < shares.shape[1] else 0.0 for i, k in moved]))

    likely = {step: share_of(step) for step in STEPS}
    first = 0
    if counting:
        together = min(sum(likely.values()), 1.0)
        likely = {step: together * share for step, share in zip(STEPS, counted_shares(numberings, counting))}
        first = max(STEPS, key=lambda step: likely[step])
    step = max((step for step in STEPS if abs(step - first) == 1), key=lambda step: likely[step])
    share = likely[step] / max(likely[step] + likely[first], 1e-12)
    second = SecondNumbering(step - first, float(share)) if share >= _LEAST_SHARE else None
    return first, float(min(likely[first], 1.0)), second


def _tempered_shares(names, scores):
    """_name_shares of a score that is not taken at its word."""
    from_s1 = _CHAIN.index("S1") in names.values()
    return _name_shares(*(part * (_TEMPER if from_s1 else _TEMPER_WITHOUT_S1) for part in scores))


def _best_size(vertebrae, prior, center_lps_mm):
    """(names: dict detection -> index into _CHAIN, scores) at the patient's size, which is tried out: missed and false
    bodies spoil any median of distances."""
    tried = []
    for size in _SIZES:
        scores = _chain_scores(vertebrae, prior, center_lps_mm, size)
        chain, total = _best_chain(*scores)
        tried.append((total - 0.5 * (np.log(size) / 0.1) ** 2, chain, scores))
    _, chain, scores = max(tried, key=lambda item: item[0])
    return dict(chain), scores


def _measured(vertebrae, prior, names, scores):
    """Numberings of what _best_size found."""
    shapes, usual = (_shapes(c) for c in (np.stack([v.corners_lps_mm for v in vertebrae]), chain_layout(prior)))
    looks = [v.appearance for v in vertebrae]
    shares = _tempered_shares(names, scores)
    return numberings_of(names, shares, shapes, _pair_shapes(shapes), _pair_shapes(usual), looks)


def chain_numberings(
    vertebrae: Sequence[Vertebra], prior: dict, center_lps_mm: np.ndarray | None = None
) -> Numberings | None:
    """What fit_counting learns from: the numbering that name_vertebrae would give a chain without a learned counting,
    and the two beside it. None for fewer than two bodies; arguments as of name_vertebrae."""
    if len(vertebrae) < 2:
        return None
    return _measured(vertebrae, prior, *_best_size(vertebrae, prior, center_lps_mm))


_WHOLE = 0.6  # of the body above: S1 is about as high as L5


def _is_whole(vertebra, above):
    """Whether so much of a body is in the image that it is as high as those above it."""
    return not above or vertebra.in_image_mm >= _WHOLE * above[-1].height_mm


def name_vertebrae(
    vertebrae: Sequence[Vertebra], prior: dict, center_lps_mm: np.ndarray | None = None
) -> tuple[list[Vertebra], SecondNumbering | None]:
    """Name a chain of Vertebrae by one dynamic programme: (Vertebrae head to foot, some named "uncertain"; the second
    numbering, where there is one of some likelihood).

    vertebrae: with `appearance`, head to foot; prior: from fit_level_prior; center_lps_mm: (3,) of the sagittal
    series, which is planned around L3.
    Each detection gets a name or is dropped; names rise in order. The score adds
    - the log-probabilities of the looks, one for each of SPINE_CLASSES;
    - for every pair of neighbours how well the way from one to the other fits that of the names in the prior's
      layout, at the patient's size: this also keeps off what lies beside the spine's curve;
    - shape, also against the layout: tilt, its change from body to body (largest at L5/S1), the gap between the end
      plates (it nearly vanishes below S1) and the ratio of depths (S2 is much smaller than S1);
    - a little for the place in the series;
    - _OVERLOOKED for each body that would have been missed, and a penalty for each detection dropped, the higher the
      surer it was.
    S1 differs most from its neighbours, so in effect the chain is counted up from the sacrum; none of these decides
    alone, and all but the way from body to body are capped, so that a thin L5/S1 disc (sacralised L5) or a high S1/S2
    disc (lumbarised S1) is outvoted by the rest.
    A dropped detection is kept under the name UNCERTAIN, unless it overlaps a named one (then it is the same body seen
    twice). Confidence is the detection's times the share of its name among all namings (_name_shares), or times the
    whole chain's (_numbering) where that is lower. A counting that was learned from readers' points
    (prior["counting"], see fit_counting) may move all names by one. The source is uncertain, too, where confidence is
    lowered below AMBIGUOUS_SHARE, and throughout where the chain has no S1, or only a part of it is in the image: then
    nothing is there to count from.
    """
    if not vertebrae:
        return [], None
    names, scores = _best_size(vertebrae, prior, center_lps_mm)
    shares = _name_shares(*scores)
    counting = prior.get("counting")
    numberings = _measured(vertebrae, prior, names, scores) if counting else None
    moved, chain_share, second = _numbering(names, scores, numberings, counting)
    own_share = {i: shares[i, k] for i, k in names.items()}
    names = {i: k + moved for i, k in names.items() if 0 <= k + moved < len(_CHAIN)}
    from_s1 = any(_CHAIN[k] == "S1" and _is_whole(vertebrae[i], vertebrae[:i]) for i, k in names.items())
    result = []
    for i, vertebra in enumerate(vertebrae):
        if i in names:
            share = float(min(own_share[i], chain_share))
            doubtful = share < AMBIGUOUS_SHARE or not from_s1
            source = vertebra.source | (Source.UNCERTAIN if doubtful else Source(0))
            found = replace(vertebra, name=_CHAIN[names[i]], confidence=vertebra.confidence * share, source=source)
            result.append(found)
        else:
            height = vertebra.height_mm
            distance = [np.linalg.norm(vertebrae[k].center_lps_mm - vertebra.center_lps_mm) for k in names]
            if min(distance) > 0.7 * height:
                result.append(replace(vertebra, name=UNCERTAIN))
    return result, second
