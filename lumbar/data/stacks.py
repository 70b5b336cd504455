"""The slices of one series to volumes: one contrast, one pass, parallel and equally spaced slices each.

Geometry does not hang on last digits: what counts as the same place, size or direction has a tolerance, and what lies
between slices is compared with the other distances of the series.

May use: volume, agreement.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from .agreement import LEAST_SLICES, odd_slices, same_contrast
from .volume import Volume

# Words of ImageType, FrameType and ComplexImageComponent that tell images of one place apart.
KINDS_OF_IMAGE = frozenset(
    "P PHASE R REAL I IMAGINARY W WATER F FAT IP IN_PHASE OP OPP_PHASE OUT_PHASE ADC FA TRACEW".split()
    + ["PHASE MAP", "T1 MAP", "T2 MAP", "LOCALIZER"]
)
NOT_MAGNITUDE = KINDS_OF_IMAGE - {"W", "WATER", "IP", "IN_PHASE"}

USUAL_ECHO_MS = {"T1": 12.0, "T2": 100.0}  # echo times of spin echo series of the lumbar spine
LONGEST_T1_ECHO_MS, SHORTEST_T2_ECHO_MS = 50.0, 20.0  # STIR and gradient echo reach down to some 25
MAX_STACKS = 64  # volumes of a series: the longest stay
SAME_SIZE = 2e-3  # relative difference of pixel spacings that is no difference: half a millimetre over an image
SAME_AXES = 0.009  # of direction cosines: half a degree
SAME_PLACE_MM = 0.01
OVERLAP = 0.7  # neighbours nearer than this share of a slice's thickness are no neighbours of one pass
UNEVEN = 1.25  # largest ratio of the distances in a pass that counts as even


@dataclass(frozen=True)
class Contrast:
    """What makes two images of one place look different: NaN, -1 and an empty set where a file does not say."""

    echo_ms: float = math.nan
    echo_number: int = -1
    b_value: float = math.nan
    inversion_ms: float = math.nan
    kinds: frozenset = frozenset()

    @property
    def stated(self) -> int:
        """How many of its numbers a file states."""
        numbers = (self.echo_ms, self.b_value, self.inversion_ms)
        return sum(not math.isnan(number) for number in numbers) + (self.echo_number >= 0)

    def is_like(self, other: "Contrast") -> bool:
        """True where nothing that both say differs by more than a tenth."""
        measured = [
            (self.echo_ms, other.echo_ms),
            (self.b_value, other.b_value),
            (self.inversion_ms, other.inversion_ms),
        ]
        near = all(math.isnan(a) or math.isnan(b) or abs(a - b) <= 0.1 * max(abs(a), abs(b)) for a, b in measured)
        # An echo's number says what its time says, where that is known.
        timed = not (math.isnan(self.echo_ms) or math.isnan(other.echo_ms))
        numbered = timed or self.echo_number == other.echo_number or min(self.echo_number, other.echo_number) < 0
        return near and numbered and self.kinds == other.kinds

    def is_far(self, other: "Contrast") -> bool:
        """True where the two are no variants of one protocol: echo times of which one is twice the other, other
        kinds of image, diffusion beside none."""
        apart = self.echo_ms > 2 * other.echo_ms or other.echo_ms > 2 * self.echo_ms  # never of NaN
        weighted = not self.is_like(replace(other, echo_ms=math.nan, echo_number=-1))
        return apart or weighted

    def __str__(self) -> str:
        said = [
            ("echo time {:g} ms", self.echo_ms),
            ("b-value {:g}", self.b_value),
            ("inversion time {:g} ms", self.inversion_ms),
        ]
        words = [text.format(value) for text, value in said if not math.isnan(value)]
        if math.isnan(self.echo_ms) and self.echo_number >= 0:
            words.append(f"echo {self.echo_number}")
        return ", ".join([*words, *sorted(self.kinds)]) or "unknown contrast"


def values_of(slices: list[dict]) -> np.ndarray:
    """(n, h, w) float32 of slices of one size, rescaled straight into place; NaN where the files have padding."""
    values = np.empty((len(slices), *slices[0]["pixels"].shape), np.float32)
    for value, item in zip(values, slices, strict=True):
        value[:] = item["pixels"]
        if item["slope"] != 1:
            value *= np.float32(item["slope"])
        if item["intercept"]:
            value += np.float32(item["intercept"])
        if item.get("padding") is not None:
            value[item["padding"]] = np.nan
    return values


def stack_slices(
    slices: list[dict], study_id: int, series_id: int, description: str, problems: list[str]
) -> list[Volume]:
    """Slices of one series -> list of Volumes; what is left out or doubtful is said in `problems`.

    Slices of several contrasts never share a volume. The one that the description means is kept, and what differs
    little from it (an echo time, say) and lies elsewhere. Several passes over the same places (averages, repetitions)
    become a volume each. See _parallel_stacks for what belongs together. A stack is cut where a step exceeds 1.75
    times the usual one: each piece is one volume.
    """
    name = f"study {study_id}, series {series_id}"
    slices = _of_one_series(slices, name, problems)
    volumes: list[Volume] = []
    contrasts = _contrasts(slices, description, name, problems)
    problems += [f"{name}: {sentence}" for sentence in _unusual_echo(contrasts, description)]
    for number, (contrast, own) in enumerate(contrasts):
        if number:
            own, covered = ([], len(own)) if contrast.is_far(contrasts[0][0]) else _elsewhere(own, volumes)
            if covered:
                chosen = ", ".join(str(other) for other, _ in contrasts[:number])
                problems.append(
                    f"{name}: {covered} slices of another contrast ({contrast} beside {chosen}) were left out"
                )
        for stack in _of_one_size(_parallel_stacks(own), description, name, problems):
            for one in _passes(stack, name, problems):
                kept, sentences = _without_odd_slices(one)
                problems += [f"{name}: {sentence}" for sentence in sentences]
                for volume in _volumes(kept, study_id, series_id, description, len(volumes), name, problems):
                    if volume.plane != description.split()[0].lower():
                        count = len(volume.array)
                        problems.append(
                            f"{name}: {count} {volume.plane} slices in a series called {description}, left out"
                        )
                    else:
                        volumes.append(replace(volume, block=len(volumes)))
    count = sum(len(volume.array) for volume in volumes)
    if count >= LEAST_SLICES and len(volumes) > count / 2:
        problems.append(f"{name}: its {count} slices share no grid, they are {len(volumes)} separate stacks")
    if len(volumes) > MAX_STACKS:
        problems.append(f"{name}: {len(volumes)} separate stacks, the {MAX_STACKS} with most slices were kept")
        longest = sorted(volumes, key=lambda volume: -len(volume.array))[:MAX_STACKS]
        volumes = [replace(v, block=k) for k, v in enumerate(sorted(longest, key=lambda volume: volume.block))]
    return volumes


def _of_one_series(slices, name, problems):
    """The slices without a few that state another examination, or another series, than most: files that got into the
    wrong folder. Files that state nothing belong with the others. Where most state nothing in common the numbers mean
    nothing, as after some anonymisers."""
    for key, what, several, least in (
        ("study_uid", "another examination", "examinations", 0.7),
        ("series_uid", "another series", "series", 0.8),
    ):
        stated = [item[key] for item in slices if item.get(key)]
        most, count = Counter(stated).most_common(1)[0] if stated else ("", 0)
        if count == len(stated):
            continue
        if count < least * len(stated):
            kinds = len(set(stated))
            if kinds <= len(stated) / 2:  # else each file has a number of its own: a writer's habit
                problems.append(f"{name}: its files are of {kinds} {several}")
            continue
        others = [item["instance_number"] for item in slices if (item.get(key) or most) != most]
        problems.append(f"{name}: {len(others)} files are of {what} (the first: {others[0]}) and were left out")
        slices = [item for item in slices if (item.get(key) or most) == most]
    return slices


# -- contrasts


def _contrasts(slices, description, name, problems):
    """Slices by contrast: list of (Contrast, slices), the one that the description means first.

    Those that state most found the groups: one that states nothing is like every other. Where it is like several it
    goes to the nearest slice's that has none at its place.
    """
    groups, guessed = [], []
    contrasts = [item.get("contrast") or Contrast() for item in slices]
    for k in sorted(range(len(slices)), key=lambda k: -contrasts[k].stated):
        like = [own for contrast, own in groups if contrast.is_like(contrasts[k])]
        if len(like) > 1:
            like = _nearest_without(slices[k], like)
            guessed += [slices[k]["instance_number"]] * bool(like)
        if like:
            like[0].append(slices[k])
        else:
            groups.append((contrasts[k], [slices[k]]))
    order = {id(item): k for k, item in enumerate(slices)}
    for _, own in groups:
        own.sort(key=lambda item: order[id(item)])
    if guessed:
        problems.append(
            f"{name}: {len(guessed)} slices do not state which of {len(groups)} contrasts they are (the first: "
            f"{min(guessed)}): each was put with its neighbours"
        )
    most = max((len(own) for _, own in groups), default=0)

    def rank(group):
        contrast, own = group
        usual_ms = USUAL_ECHO_MS["T2" if "T2" in description else "T1"]
        return (
            len(own) < most / 2,
            bool(contrast.kinds & NOT_MAGNITUDE),
            0.0 if math.isnan(contrast.b_value) else contrast.b_value,
            abs(math.log(max(contrast.echo_ms, 1.0) / usual_ms)) if contrast.echo_ms > 0 else 0.0,
            -len(own),
        )

    return sorted(groups, key=rank)


def _nearest_without(item, groups):
    """Those of the lists of slices that have none at this slice's place, the nearest and of such the longest first."""
    away_mm = [min(math.dist(item["position_lps"], other["position_lps"]) for other in own) for own in groups]
    order = sorted(range(len(groups)), key=lambda k: (round(away_mm[k]), -len(groups[k])))
    return [groups[k] for k in order if away_mm[k] >= OVERLAP * item["thickness_mm"]]


def _elsewhere(slices, volumes):
    """(those slices whose middle lies in none of the volumes, number of the others)."""
    outside = []
    for item in slices:
        height, width = item["pixels"].shape
        middle = item["position_lps"] + item["row_lps"] * item["spacing_mm"][1] * (width - 1) / 2
        middle = middle + item["column_lps"] * item["spacing_mm"][0] * (height - 1) / 2
        normal = np.cross(item["row_lps"], item["column_lps"])
        for volume in volumes:
            own = volume.affine[:3, 0] / volume.spacing_mm[0]
            index = volume.lps_to_voxel(middle)
            inside = (index > -0.5).all() and (index < np.array(volume.array.shape) - 0.5).all()
            if inside and abs(own @ normal) > 0.99:
                break
        else:
            outside.append(item)
    return outside, len(slices) - len(outside)


def _unusual_echo(contrasts, description):
    """A sentence where the echo time is one of T2 in a series called T1, or the other way round."""
    echo_ms = contrasts[0][0].echo_ms if contrasts else math.nan
    low, high = (0.0, LONGEST_T1_ECHO_MS) if "T1" in description else (SHORTEST_T2_ECHO_MS, math.inf)
    if low <= echo_ms <= high or not echo_ms > 0:
        return []
    return [f"an echo time of {echo_ms:g} ms is unusual for {description}: it may be another contrast"]


# -- stacks and passes


def _parallel_stacks(slices):
    """Slices of one contrast -> lists that each lie one behind the other, ordered along their normal.

    Same orientation (within half a degree), matrix and pixel spacing (within SAME_SIZE); and from one slice to the next
    no step sideways of more than half a slice step and a millimetre: two discs with the same tilt have two stacks
    beside each other.
    """
    groups, seen = [], {}
    for item in slices:
        axes = _axes(item)
        stated = item["pixels"].shape, item["spacing_mm"].tobytes(), axes.tobytes()
        group = seen.get(stated) or next((group for group in groups if _may_join(item, axes, group)), None)
        if group is None:
            group = {"axes": axes, "slices": []}
            groups.append(group)
        group["slices"].append(item)
        seen[stated] = group
    stacks = []
    for group in groups:
        row, column = group["axes"][:3], group["axes"][3:]
        frame = np.stack([np.cross(row, column), row, column], 1)
        places = [(*np.dot(item["position_lps"], frame).tolist(), item) for item in group["slices"]]
        own = []  # of (its last slice's place along row and column, slices)
        for _, x, y, item in sorted(places, key=lambda place: (place[0], place[3]["instance_number"])):
            aside = [math.hypot(x - last_x, y - last_y) for last_x, last_y, _ in own]
            nearest = aside.index(min(aside)) if aside else 0
            if aside and aside[nearest] <= 1.0 + 0.5 * item["step_mm"]:
                stack = own[nearest][2]
                stack.append(item)
                own[nearest] = x, y, stack
            else:
                own.append((x, y, [item]))
        stacks += [stack for _, _, stack in own]
    return stacks


def _may_join(item, axes, group):
    first = group["slices"][0]
    return (
        first["pixels"].shape == item["pixels"].shape
        and np.abs(item["spacing_mm"] / first["spacing_mm"] - 1).max() < SAME_SIZE
        and np.abs(group["axes"] - axes).max() < SAME_AXES
    )


def _of_one_size(stacks, description, name, problems):
    """The stacks without a few slices that lie among those of a larger one but share no grid with them: a header that
    is wrong in one file, or a file of another patient, gives a slice of the wrong scale or place.

    Among them is between two of them and parallel; in a sagittal series also next to them, and in another direction:
    axial stacks, one for each disc, may differ.
    """
    most = max(stacks, key=len, default=[])
    if len(most) < LEAST_SLICES:
        return stacks
    places, kept = _places_mm(most), []
    beside = 1.5 * np.median(np.diff(places))
    for stack in stacks:
        first, usual = stack[0], most[0]
        own = np.array([item["position_lps"] for item in stack]) @ _normal(most)
        near = (places[0] - beside < own) & (own < places[-1] + beside)
        if description.startswith("Axial"):
            among = near.all() and np.abs(_axes(first) - _axes(usual)).max() < SAME_AXES
        else:
            among = near.any()
        if stack is most or len(stack) > max(2, len(most) // 5) or not among:
            kept.append(stack)
            continue
        files = ", ".join(str(item["instance_number"]) for item in stack)
        sizes = [(item["pixels"].shape, item["spacing_mm"].round(3).tolist()) for item in (first, usual)]
        if sizes[0] == sizes[1]:
            problems.append(f"{name}: file {files}: lies aside of the slices around it, left out")
            continue
        (shape, mm), (other_shape, other_mm) = sizes
        problems.append(
            f"{name}: file {files}: {shape[0]} x {shape[1]} pixels of {mm[0]:g} x {mm[1]:g} mm between slices of "
            f"{other_shape[0]} x {other_shape[1]} pixels of {other_mm[0]:g} x {other_mm[1]:g} mm, left out"
        )
    return kept


def _axes(item):
    return np.concatenate([item["row_lps"], item["column_lps"]])


def _normal(stack):
    return np.cross(stack[0]["row_lps"], stack[0]["column_lps"])


def _places_mm(stack):
    """(n,) positions along the stack's normal."""
    return np.array([item["position_lps"] for item in stack]) @ _normal(stack)


def _is_one_pass(places_mm, thickness_mm):
    """True if slices at these ascending places may come from one pass: evenly spaced, or none overlapping the next."""
    steps = np.diff(places_mm)
    if not len(steps):
        return True
    even = steps.min() >= SAME_PLACE_MM and steps.max() <= UNEVEN * steps.min()
    return bool(even or steps.min() >= OVERLAP * thickness_mm)


def _passes(stack, name, problems):
    """The passes over the places of a parallel stack: list of lists of slices in the order of the normal.

    Files of the same image are left out. Where slices lie nearer than their thickness allows and unevenly, each place
    was imaged more than once: what the headers tell apart (acquisition, time), runs through the stack in the order of
    the files, or each place's first, second, ... image are the passes, whichever explains it first. A pass of another
    look than the fullest, or of a few slices beside many, is left out.
    """
    stack, twins = _without_twins(stack)
    if twins:
        first, of = twins[0]
        problems.append(
            f"{name}: {len(twins)} {'file is' if len(twins) == 1 else 'files are'} the same image at the same place as "
            f"another (the first: {first}, as {of}) and left out"
        )
    thickness_mm = float(np.median([item["thickness_mm"] for item in stack]))
    if _is_one_pass(_places_mm(stack), thickness_mm):
        return [stack]
    passes = max(_partitions(stack), key=lambda parts: _explains(parts, thickness_mm))
    if _explains(passes, thickness_mm)[0] < 0.8 and np.diff(_places_mm(stack)).min() >= SAME_PLACE_MM:
        return [stack]  # one uneven pass, such as thin overlapping slices of which some are missing
    passes.sort(key=lambda own: (-len(own), min(item["instance_number"] for item in own)))
    full, *others = passes
    kept = [full]
    few = unlike = 0
    for own in others:
        if len(own) < max(2, len(full) / 2):
            few += len(own)
        elif not same_contrast(full, own):
            unlike += len(own)
        else:
            kept.append(own)
    if len(kept) > 1:
        problems.append(f"{name}: places were imaged {len(kept)} times, each pass is a volume")
    if few:
        problems.append(f"{name}: {few} slices lie at the same place as others, or nearly, and were left out")
    if unlike:
        problems.append(f"{name}: {unlike} slices show the same places in another contrast and were left out")
    return kept


def _without_twins(stack):
    """(the stack with one of slices that are the same in place and pixels, [(left out, of which), ...])."""
    unique, twins = [], []
    places = _places_mm(stack).tolist()
    for k, item in enumerate(stack):
        near = takewhile(lambda j: places[k] - places[j] < SAME_PLACE_MM, reversed(unique))
        same = next((j for j in near if _same_image(stack[j], item)), None)
        if same is None:
            unique.append(k)
        else:
            twins.append((item["instance_number"], stack[same]["instance_number"]))
    return [stack[k] for k in unique], twins


def _same_image(first, second):
    scale = first["slope"] == second["slope"] and first["intercept"] == second["intercept"]
    return scale and np.array_equal(first["pixels"], second["pixels"])


def _partitions(stack):
    """Ways to deal a stack's slices into passes, the likeliest first. Each part in the order of the normal."""
    keys = list(zip(*(item.get("passes", ()) for item in stack)))
    for key in keys:
        if 1 < len(set(key)) <= len(stack) / 2:
            yield _dealt(stack, key)
    # In the order of the files a pass runs one way through the stack.
    order = np.argsort([item["instance_number"] for item in stack], kind="stable")
    places = _places_mm(stack)
    run, runs, direction = 0, np.zeros(len(stack), int), 0.0
    for before, now in zip(order, order[1:]):
        step = places[now] - places[before]
        if direction * step < 0 or abs(step) < SAME_PLACE_MM:
            run, direction = run + 1, 0.0
        else:
            direction = step
        runs[now] = run
    yield _dealt(stack, runs)
    # The k-th image of each place: places end where the distance to the next slice jumps.
    steps = np.sort(np.maximum(np.diff(places), SAME_PLACE_MM / 2))
    ratio = steps[1:] / steps[:-1]
    least = steps[int(np.argmax(ratio))] if len(ratio) else steps[0]
    cluster = np.concatenate([[0], np.cumsum(np.diff(places) > least)])
    turn, seen = np.zeros(len(stack), int), Counter()
    for k in order:
        turn[k] = seen[cluster[k]]
        seen[cluster[k]] += 1
    inside = [np.ptp(places[cluster == one]) for one in range(cluster[-1] + 1)]
    between = [places[cluster == one + 1][0] - places[cluster == one][-1] for one in range(cluster[-1])]
    if max(inside) < min(between, default=math.inf):
        yield _dealt(stack, turn)


def _dealt(stack, key):
    parts = {}
    for item, value in zip(stack, key, strict=True):
        parts.setdefault(value, []).append(item)
    return list(parts.values())


def _explains(parts, thickness_mm):
    """How well a partition explains a stack: the share of slices in parts that may be one pass each, then few parts."""
    good = sum(len(part) for part in parts if _is_one_pass(_places_mm(part), thickness_mm))
    return good / sum(map(len, parts)), -len(parts)


def _without_odd_slices(stack):
    """(the slices without those whose grey values fit none of their neighbours', sentences)."""
    odd = odd_slices(stack)
    if len(odd) > len(stack) / 4:
        return stack, [f"grey values of {len(odd)} of {len(stack)} slices do not fit their neighbours'"]
    sentences = [f"file {stack[k]['instance_number']}: {reason}, left out" for k, reason in odd.items()]
    return [item for k, item in enumerate(stack) if k not in odd], sentences


# -- volumes


def _volumes(stack, study_id, series_id, description, block, name, problems):
    """Volumes of one pass, cut where slices are missing."""
    axes = np.median([_axes(item) for item in stack], axis=0)
    row, column = axes[:3], axes[3:]
    spacing_mm = np.median([item["spacing_mm"] for item in stack], axis=0)
    normal = np.cross(row, column)
    position = np.array([item["position_lps"] for item in stack])
    steps = np.diff(position @ normal)
    usual = np.median(steps) if len(steps) else stack[0]["step_mm"]
    cuts = np.flatnonzero(steps > 1.75 * usual) + 1
    missing = [round(steps[k - 1] / usual) - 1 for k in cuts if _is_hole(steps[k - 1] / usual, description)]
    if missing:
        problems.append(f"{name}: {sum(missing)} slices are missing in {len(missing)} places between others")
    volumes = []
    for piece in np.split(np.arange(len(stack)), cuts):
        first, last = stack[piece[0]], stack[piece[-1]]
        affine = np.eye(4)
        if len(piece) > 1:
            affine[:3, 0] = (last["position_lps"] - first["position_lps"]) / (len(piece) - 1)
            regular = first["position_lps"] + np.arange(len(piece))[:, None] * affine[:3, 0]
            error = np.linalg.norm(position[piece] - regular, axis=1).max()
            if error > 0.25 * usual:
                problems.append(f"{name}: slices are not equally spaced (up to {error:.1f} mm off)")
        else:
            affine[:3, 0] = normal * first["step_mm"]
        affine[:3, 1] = column * spacing_mm[0]
        affine[:3, 2] = row * spacing_mm[1]
        affine[:3, 3] = first["position_lps"]
        volumes.append(
            Volume(
                values_of([stack[i] for i in piece]),
                affine,
                study_id,
                series_id,
                description,
                block + len(volumes),
                np.array([stack[i]["instance_number"] for i in piece]),
                first["thickness_mm"],
            )
        )
    return volumes


def _is_hole(ratio, description):
    """True where a step of so many usual ones is a hole in a stack: whole steps. Axial stacks, one for each disc, may
    follow one another at any distance."""
    few = 2.5 if description.startswith("Axial") else 6.5
    return ratio < few and abs(ratio - round(ratio)) < 0.1
