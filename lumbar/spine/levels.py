"""The levels of one study.

May use: chain, placement, naming, fallbacks, spinenet, vertebra, data, problems, limits, names.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..data.geometry import LevelBox
from ..data.source import Source
from ..data.volume import Study, Volume
from ..limits import check_limit, cpu_limit
from ..names import LEVEL_VERTEBRAE
from ..problems import Kind, Problem, kind_of_error
from .chain import merge_vertebrae, rejoined, smooth_sideways, thinned
from .fallbacks import axial_levels, complete_vertebrae, level_boxes, study_anchors
from .naming import name_vertebrae
from .placement import Placement
from .spinenet import SpineNet, surest
from .vertebra import _CHAIN, _LUMBAR, UNCERTAIN, Vertebra

# Detections of the sagittal series become one chain; one dynamic programme names it, counting up from the sacrum; what
# was not seen is placed by what was, by the axial slices or by the mean layout. Every level gets a box that says how
# sure it is and where it comes from.


def locate_levels(
    study: Study, placement: Placement | SpineNet, lost: dict[Problem, list[int]] | None = None
) -> tuple[list[LevelBox], list[Vertebra]]:
    """Find and name a study's vertebrae and disc levels; always answers, with a confidence.

    Where the levels come from (`source`), in this order:

    - t2, t1: bodies seen in the sagittal T2/STIR and T1 series. They form one chain; where both saw a body the T2's
      geometry counts. `official` instead where that package found them.
    - +extrapolated: a body that neither shows, placed by those seen.
    - axial: where the sagittal series show fewer than two bodies, from where the axial slices lie (axial_levels).
    - prior: the mean layout around the series' centre.

    `+uncertain` says that the levels' names are doubtful: no S1 in the chain, or a part of it only, or another
    numbering nearly as likely.
    `second` and `second_share` of the boxes say what they would be called by the second numbering, where that has some
    likelihood; second_boxes places the levels by it.

    Parameters
    ----------
    study : Study
        Normalised.
    placement : Placement or SpineNet
        A SpineNet stands for Placement.of(it).
    lost : dict, optional
        Gets the series whose search fails, as reason to list of series ids, and the others stand; default: raise.

    Returns
    -------
    boxes : list of LevelBox
        Five, head to foot.
    vertebrae : list of Vertebra
        At least L1 to S1, then those named `uncertain`.

    Raises
    ------
    ValueError
        A SpineNet without a prior.
    """
    placement = Placement.of(placement)
    prior, layout = placement.prior, placement.layout
    chain: list[Vertebra] = []
    volumes: list[Volume] = []
    for description in ("Sagittal T2/STIR", "Sagittal T1"):
        volumes += rejoined([volume for volume in study.of(description) if volume.plane == "sagittal"])
    for volume in thinned(volumes, getattr(placement.network, "resolution_mm", 2.0)):
        try:
            check_limit()
            chain = surest(merge_vertebrae(chain, surest(placement.detector(volume))))
        except Exception as error:
            if lost is None:
                raise
            lost.setdefault(Problem.of(error, kind=Kind.LEVELS), []).append(volume.series_id)
    anchors = study_anchors(study)
    second = None
    if not any(v.name for v in chain):
        chain, second = name_vertebrae(chain, prior, anchors.get("sagittal"))
    # Names of another detector may repeat: the surest body has it.
    by_name: dict[str, Vertebra] = {}
    for vertebra in sorted(chain, key=lambda v: -v.confidence):
        if vertebra.name in _CHAIN:
            by_name.setdefault(vertebra.name, vertebra)
    if by_name and "S1" not in by_name:  # nor has another detector anything to count from
        by_name = {name: replace(v, source=v.source | Source.UNCERTAIN) for name, v in by_name.items()}
    named = smooth_sideways(sorted(by_name.values(), key=lambda v: _CHAIN.index(v.name)))
    uncertain = [replace(v, name=UNCERTAIN) for v in chain if v.name not in _CHAIN]
    others = [v for v in named if v.name not in _LUMBAR]
    planned = axial_levels(study, layout) if len(named) < 2 else None
    if planned is not None:
        return planned[0], planned[1] + [replace(v, name=UNCERTAIN) for v in uncertain + named]
    complete = complete_vertebrae(named, anchors, prior if named else layout)
    boxes = level_boxes(complete)
    if second is not None:
        boxes = [_with_second(box, second) for box in boxes]
    return boxes, sorted(complete + others, key=lambda v: _CHAIN.index(v.name)) + uncertain


def _with_second(box, second):
    """The box with its name by the second numbering."""
    below = _CHAIN.index(LEVEL_VERTEBRAE[box.level][1]) + second.step
    return replace(box, second=f"{_CHAIN[below - 1]}_{_CHAIN[below]}".lower(), second_share=second.share)


def second_boxes(
    study: Study, boxes: Sequence[LevelBox], vertebrae: Sequence[Vertebra], placement: Placement
) -> tuple[list[LevelBox], float] | None:
    """Where the levels lie by the second numbering, and how likely that is beside the first; None where there is none.

    boxes, vertebrae: as locate_levels returns them.
    """
    told = next((box for box in boxes if box.second), None)
    if told is None:
        return None
    first = LEVEL_VERTEBRAE[told.level][1].lower()
    by_name = {name.lower(): number for number, name in enumerate(_CHAIN)}
    step = by_name[told.second.split("_")[1]] - by_name[first]
    moved = [
        replace(v, name=_CHAIN[_CHAIN.index(v.name) + step])
        for v in vertebrae
        if v.name in _CHAIN and v.source.seen and 0 <= _CHAIN.index(v.name) + step < len(_CHAIN)
    ]
    complete = complete_vertebrae(moved, study_anchors(study), placement.prior)
    return level_boxes(complete), told.second_share


def locate_levels_surely(
    study: Study, placement: Placement | SpineNet
) -> tuple[list[LevelBox], list[Vertebra], Problem | None]:
    """locate_levels for a study that may be odd.

    A series in which detection fails, or takes too long (LOCATING_S), is left out; where nothing is seen the levels
    come from the axial slices or the mean layout.

    Parameters
    ----------
    study : Study
        Normalised.
    placement : Placement or SpineNet
        As locate_levels takes it.

    Returns
    -------
    boxes, vertebrae : list of LevelBox, list of Vertebra
        As locate_levels returns them.
    problem : Problem or None
        What was not as usual.

    Raises
    ------
    ValueError
        A SpineNet without a prior.
    """
    placement = Placement.of(placement)
    lost: dict[Problem, list[int]] = {}
    try:
        with cpu_limit(LOCATING_S):
            boxes, vertebrae = locate_levels(study, placement, lost)
        sentences, kind = [], Kind.LEVELS
        if lost:
            where = [f"({reason}) in series {', '.join(map(str, sorted(set(ids))))}" for reason, ids in lost.items()]
            stand_in = "" if seen(vertebrae) else "; the axial slices or the mean layout stand in"
            sentences.append(f"detection failed {' and '.join(where[:3])}{stand_in}")
            kind = max((reason.kind for reason in lost), key=(Kind.LEVELS, Kind.MEMORY, Kind.TIME).index)
        if odd := _odd_size(vertebrae):
            sentences.append(odd)
        return boxes, vertebrae, Problem(kind, "; ".join(sentences)) if sentences else None
    except Exception as error:
        text = f"detection failed ({type(error).__name__}: {error}); the mean layout stands in"
        problem = Problem(kind_of_error(error, Kind.LEVELS), text)
    try:
        return *locate_levels(study, placement.blind()), problem
    except Exception:  # not even the axial slices' places can be used
        return *locate_levels(replace(study, volumes=[]), placement.blind()), problem


def seen(vertebrae: Sequence[Vertebra]) -> list[Vertebra]:
    """Those that a sagittal image showed."""
    return [v for v in vertebrae if v.source.seen]


BODY_DEPTH_MM = (24.0, 43.0)  # of lumbar bodies from front to back: some 34 in adults, spread 3


def _odd_size(vertebrae):
    """A sentence where the lumbar bodies that were seen have no adult's size: then the images' scale is in doubt."""
    corners = np.array([v.corners_lps_mm for v in seen(vertebrae) if v.name in _LUMBAR[:-1]]).reshape(-1, 4, 3)
    if len(corners) < 3:
        return None
    front, back = corners[:, [0, 3]].mean(1), corners[:, [1, 2]].mean(1)
    depth_mm = float(np.median(np.linalg.norm(back - front, axis=1)))
    if BODY_DEPTH_MM[0] <= depth_mm <= BODY_DEPTH_MM[1]:
        return None
    return (
        f"the bodies seen are {depth_mm:.0f} mm deep, as few are: the pixel spacing of the sagittal series is doubtful"
    )


# CPU seconds for the search of one study. A usual one takes 4, two whole spines 11, the largest that is searched
# (MAX_SEARCHED_PX) 25, be it noise that looks like bodies everywhere.
LOCATING_S = 45.0
