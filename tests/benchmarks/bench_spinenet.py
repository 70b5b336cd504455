"""How well SpineNet finds, names and places vertebrae on phantom studies that it was not trained on.

    python tests/benchmarks/bench_spinenet.py --weights weights/spinenet_phantom.safetensors --studies 200 --workers 2

Two tables. *Contrast*: --studies anatomies of the phantom's variety "wide", one kind of contrast each, cyclic through
KINDS, from a clinical pair to images that no scanner makes; every tenth anatomy is transitional (a sacralised L5 or
lumbarised S1) and is counted in a row of its own. *Corruption*: a fifth as many clinical pairs, none transitional,
each of them damaged in all the ways of CORRUPTIONS; only scoliosis has anatomies of its own.

The studies are made in memory (simulate, acquire, stacked by the DICOM reader's own function, normalised) and kept in
--cache, about 7 MB each, so that several networks see the same ones; a killed run goes on where it stopped, and a
larger --studies adds to what is there. Corruptions are applied when a study is used.

Writes to --out: table_contrast.csv, table_corruption.csv, studies.csv (one row a study), summary.json, worst.png (the
ten worst detections, at most two of a kind) and examples.png, examples_corruption.png (the best detection of each
kind). `score_study` and `summarise` define every figure.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from scipy import ndimage  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

import phantom  # noqa: E402
from lumbar.data.dicom import stack_slices  # noqa: E402
from lumbar.data.geometry import boxes_to_table  # noqa: E402
from lumbar.data.greys import normalise_study  # noqa: E402
from lumbar.data.source import Source  # noqa: E402
from lumbar.data.volume import Study, load_study, save_study  # noqa: E402
from lumbar.look import plot_images  # noqa: E402
from lumbar.names import VERTEBRAE, progress  # noqa: E402
from lumbar.spine import fallbacks, level_scores, spinenet  # noqa: E402
from lumbar.spine import levels as levels_module  # noqa: E402
from lumbar.spine import vertebra as vertebra_module  # noqa: E402
from lumbar.storage import write_csv, write_json  # noqa: E402

CACHE_VERSION = 1  # goes up when the same study gets other pixels from this file
# Training anatomies count up from 1_000_000 (paint_anatomies), each set here from a number of its own.
FIRST_SEED = {"contrast": 10_000_000, "clinical": 20_000_000, "scoliosis": 30_000_000}
PREVALENCE = 3.0  # of disease, in the odds: the demo's, more than in the real data
KINDS = ("T1+T2", "T2", "T1", "STIR", "T1FS", "T2FS", "PD", "random", "inverted", "faint", "overexposed")
CORRUPTIONS = (
    "none",
    "noise",
    "third missing",
    "five slices",
    "cut at S1",
    "cut below L1",
    "off centre",
    "scoliosis",
    "metal",
    "wrap-around",
    "ghosts",
    "2.5 mm pixels",
    "T1 only",
)
SCOLIOSIS_CANDIDATES = 12  # anatomies drawn for each scoliotic one that is kept
LUMBAR = ("L1", "L2", "L3", "L4", "L5", "S1")  # the neighbours of the five discs
HIT_MM = 10.0  # a detection this near to a true body's centre has found it
EDGE_MM = 10.0  # bodies and discs nearer to an image's edge are not asked for
RIGHT_MM = 4.0  # as in lumbar_levels.locating_scores
UNSEEN = "extrapolated|prior|axial"  # in the source of a level that no sagittal image shows

# -- studies


def is_transitional(number):
    """Whether the contrast set's study of this number has transitional anatomy: one in ten.

    Ten and the number of KINDS have no common divisor, so that the kinds share them evenly.
    """
    return number % 10 == 9


def grey_table(kind, description, rng):
    """Grey values (tissue,) float32 for one series of a study of this kind.

    random: uniform for each tissue, drawn again until every kind of marrow differs by 0.15 from disc, cortex and fat
    (else there is no edge to find); faint: the usual contrast at 0.4 of its strength on an offset of 0.55, air stays
    dark; T1+T2, inverted, faint and overexposed: as the series' description says, the rest is done to the image.
    """
    own = "T1" if description == "Sagittal T1" else "T2"
    if kind == "random":
        marrow = [phantom.TISSUE[name] for name in ("marrow", "red_marrow", "fatty_marrow")]
        around = [phantom.TISSUE[name] for name in ("annulus", "cortex", "fat")]
        while True:
            grey = rng.uniform(0.02, 1.0, len(phantom.TISSUES)).astype(np.float32)
            if np.abs(grey[marrow][:, None] - grey[around]).min() > 0.15:
                return grey
    grey = phantom.contrast_table(kind if kind not in ("T1+T2", "inverted", "faint", "overexposed") else own, rng)
    if kind == "faint":
        tissue = np.arange(len(grey)) != phantom.TISSUE["air"]
        grey = np.where(tissue, 0.55 + 0.4 * grey, grey).astype(np.float32)
    return grey


def spoil_contrast(kind, stack, rng):
    """What a kind does to the acquired slices (n, h, w), whose brightest anatomy is near 1.

    inverted: the negative; faint: Rician noise of 0.03 to 0.06, a tenth of the contrast that is left; overexposed:
    everything above a grey value is that value, which the brightest 30 to 50% of the body's pixels exceed.
    """
    if kind == "inverted":
        return np.maximum(np.percentile(stack, 99.9) - stack, 0)
    if kind == "faint":
        sigma = rng.uniform(0.03, 0.06)
        noise = rng.standard_normal((2, *stack.shape), dtype=np.float32) * np.float32(sigma)
        return np.hypot(stack + noise[0], noise[1])
    if kind == "overexposed":
        body = stack[stack > 0.08]
        return np.minimum(stack, np.quantile(body, 1 - rng.uniform(0.3, 0.5)))
    return stack


def plan_volumes(plan, stack, study_id):
    """The Volumes that the DICOM reader makes of a series, without the files.

    plan: SeriesPlan; stack: (n, rows, columns) as phantom.acquire returns it. Values are rounded to 12 bits, as in the
    phantom's files.
    """
    stored = np.clip(np.round(stack * 1000), 0, 4095).astype(np.float32)
    slices = [
        {
            "pixels": stored[k],
            "position_lps": plan.position_mm[k],
            "row_lps": plan.row_cosine[k],
            "column_lps": plan.column_cosine[k],
            "spacing_mm": np.array(plan.spacing_mm, float),
            "thickness_mm": plan.thickness_mm,
            "step_mm": plan.gap_mm,
            "instance_number": int(plan.instances[k]),
            "slope": 1.0,
            "intercept": 0.0,
        }
        for k in range(len(stored))
    ]
    return stack_slices(slices, study_id, plan.series_id, plan.description, [])


def cobb_deg(anatomy):
    """The largest angle in the coronal plane between two of the end plates' normals, T10 to S1, in degrees."""
    lean = [
        math.degrees(math.atan2(vertebra.frame[0, 2], vertebra.frame[2, 2]))
        for vertebra in anatomy.vertebrae
        if vertebra.name in VERTEBRAE[:-1]
    ]
    return max(lean) - min(lean)


def simulate_sagittal(seed, kind, transitional=0.0, variety="wide", series=("T1", "T2")):
    """One study's sagittal series in memory.

    transitional: probability of transitional anatomy; variety: as sample_anatomy's; series: which are made. Returns
    (normalised Study whose id is the seed, truth: vertebra table of T8 to S5, anatomy).
    """
    anatomy, _, _, grids, plans, rng = phantom.simulate(
        seed, prevalence=PREVALENCE, transitional=transitional, anomalies="none", variety=variety
    )
    front = np.array([(v.centre_mm - v.frame[:, 1] * v.depth_mm / 2)[1:] for v in anatomy.vertebrae])
    volumes, made = [], [f"Sagittal {name}" for name in series]
    for number, plan in enumerate(plan for plan in plans if plan.description.startswith(tuple(made))):
        plan.series_id = number + 1
        table = grey_table(kind, plan.description, rng)
        images = [phantom.render(grid, table) for grid in grids]
        stack = phantom.acquire(rng, grids, plan, images, phantom.back_of(anatomy), front)
        volumes += plan_volumes(plan, spoil_contrast(kind, stack, rng), seed)
    bodies = [
        vertebra_module.Vertebra(v.corners_mm(), v.width_mm, 1.0, v.name, Source.TRUTH) for v in anatomy.vertebrae
    ]
    return normalise_study(Study(seed, volumes)), vertebra_module.vertebrae_to_table(seed, bodies), anatomy


def _make(job):
    """Worker: put one study into the cache, unless it is there. Its json is written last."""
    folder, seed, kind, transitional = job
    done = folder / f"{seed}.json"
    if done.is_file():
        return
    study, truth, anatomy = simulate_sagittal(seed, kind, transitional)
    save_study(study, folder / f"{seed}.safetensors")
    write_csv(folder / f"{seed}.csv", truth.round(4))
    about = {
        "study_id": seed,
        "contrast": kind,
        "corruption": "scoliosis" if folder.name == "scoliosis" else "none",
        "variant": anatomy.variant,
        "cobb_deg": cobb_deg(anatomy),
    }
    write_json(done, about)


def _candidate_cobb(seed):
    """The Cobb angle of the anatomy that simulate_sagittal(seed, ...) will draw; without painting it takes no time."""
    rng = np.random.default_rng(seed)
    latent, _ = phantom.sample_severity(rng, 1, PREVALENCE)
    visible = phantom.visible_severity(latent[0], PREVALENCE)
    return cobb_deg(phantom.sample_anatomy(rng, visible, 0.0, variety="wide"))


def cached_studies(cache, name, count, workers):
    """The first `count` studies of a set, made where they are missing.

    name: a key of FIRST_SEED. Returns (studies: list of dicts as in their json, with `path`; truth: vertebra table
    with the columns of lumbar_levels.read_vertebra_truth, T8 to S5). studies.json and vertebrae.csv in the set's folder
    hold the same. Raises FileExistsError when the cache was made by another phantom.
    """
    folder = Path(cache) / name
    folder.mkdir(parents=True, exist_ok=True)
    marker, settings = folder / "cache.json", {"cache": CACHE_VERSION, "phantom": phantom.VERSION, "kinds": list(KINDS)}
    if not marker.is_file():
        write_json(marker, settings)
    elif json.loads(marker.read_text()) != settings:
        raise FileExistsError(f"{folder} holds studies of other settings than {settings}: delete it")
    seeds = [FIRST_SEED[name] + number for number in range(count)]
    if name == "contrast":
        jobs = [(folder, s, KINDS[k % len(KINDS)], float(is_transitional(k))) for k, s in enumerate(seeds)]
    else:
        if name == "scoliosis":  # of each block of candidates the most crooked: more studies leave the first ones
            blocks = np.arange(count * SCOLIOSIS_CANDIDATES).reshape(count, -1) + FIRST_SEED[name]
            seeds = [int(max(block, key=_candidate_cobb)) for block in blocks.tolist()]
        jobs = [(folder, seed, "T1+T2", 0.0) for seed in seeds]
    missing = [job for job in jobs if not (folder / f"{job[1]}.json").is_file()]
    started = time.time()
    if missing and workers > 1:
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(variable, "1")
        with multiprocessing.get_context("spawn").Pool(min(workers, len(missing))) as pool:
            for _ in progress(pool.imap_unordered(_make, missing), f"making {name} studies", len(missing)):
                pass
    else:
        for job in progress(missing, f"making {name} studies", len(missing)) if missing else ():
            _make(job)
    if missing:
        print(f"{len(missing)} {name} studies made, {(time.time() - started) / len(missing):.1f} s each")
    studies = [json.loads((folder / f"{seed}.json").read_text()) for seed in seeds]
    truth = pd.concat([pd.read_csv(folder / f"{seed}.csv") for seed in seeds], ignore_index=True)
    write_json(folder / "studies.json", studies)
    write_csv(folder / "vertebrae.csv", truth)
    return [about | {"path": folder / f"{about['study_id']}.safetensors"} for about in studies], truth


# -- corruptions: (study, its true bodies by name, rng) -> (study, volumes that say what the field of view shows)
#
# The phantom's sagittal images have rows towards the feet and columns towards the back.


def _change(study, function):
    """The study with function(volume as float32) -> Volume or list of Volumes, on the networks' scale again."""
    volumes = []
    for volume in study.volumes:
        made = function(replace(volume, array=volume.array.astype(np.float32)))
        volumes += made if isinstance(made, list) else [made]
    return normalise_study(replace(study, volumes=volumes))


def _cut(volume, axis, low, high):
    """Slices, rows or columns low <= index < high of a volume; at least 16 rows and columns."""
    size = volume.array.shape[axis]
    if axis:
        low = int(np.clip(low, 0, size - 16))
        high = int(np.clip(high, low + 16, size))
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, axis] * low
    numbers = volume.instance_numbers[low:high] if axis == 0 else volume.instance_numbers
    array = np.take(volume.array, np.arange(low, high), axis)
    return replace(volume, array=array, affine=affine, instance_numbers=numbers)


def _noise(study, bodies, rng):
    """Rician noise of 0.15 of the grey scale."""

    def noisy(volume):
        noise = 0.15 * rng.standard_normal((2, *volume.array.shape), dtype=np.float32)
        return replace(volume, array=np.hypot(volume.array + noise[0], noise[1]))

    return _change(study, noisy)


def _third_missing(study, bodies, rng):
    """Every third file is gone; the rest is stacked by the DICOM reader, which may cut it into several volumes."""
    first = int(rng.integers(3))

    def thinned(volume):
        spacing = volume.spacing_mm
        slices = [
            {
                "pixels": volume.array[k],
                "position_lps": volume.voxel_to_lps([k, 0, 0]),
                "row_lps": volume.affine[:3, 2] / spacing[2],
                "column_lps": volume.affine[:3, 1] / spacing[1],
                "spacing_mm": spacing[1:],
                "thickness_mm": volume.thickness_mm,
                "step_mm": spacing[0],
                "instance_number": int(volume.instance_numbers[k]),
                "slope": 1.0,
                "intercept": 0.0,
            }
            for k in range(len(volume.array))
            if k % 3 != first
        ]
        return stack_slices(slices, volume.study_id, volume.series_id, volume.description, [])

    return _change(study, thinned)


def _five_slices(study, bodies, rng):
    """Only the five slices in the middle of each series."""

    def few(volume):
        first = max((len(volume.array) - 5) // 2, 0)
        return _cut(volume, 0, first, min(first + 5, len(volume.array)))

    return _change(study, few)


def _cut_at_s1(study, bodies, rng):
    """The lower edge passes through the middle of S1."""
    return _change(study, lambda v: _cut(v, 1, 0, v.lps_to_voxel(bodies["S1"].center_lps_mm)[1] + 1))


def _cut_below_l1(study, bodies, rng):
    """The upper edge passes through the disc below L1."""
    low = np.concatenate([bodies["L1"].corners_lps_mm[2:], bodies["L2"].corners_lps_mm[:2]]).mean(0)
    return _change(study, lambda v: _cut(v, 1, v.lps_to_voxel(low)[1], v.array.shape[1]))


def _off_centre(study, bodies, rng):
    """The front or the back edge lies 12 mm beyond the outermost corner of L1 to S1."""
    corners = np.concatenate([body.corners_lps_mm for name, body in bodies.items() if name in LUMBAR])
    front = rng.random() < 0.5

    def cut(volume):
        column = volume.lps_to_voxel(corners)[:, 2]
        margin = 12 / volume.spacing_mm[2]
        low = column.min() - margin if front else 0
        high = volume.array.shape[2] if front else column.max() + margin
        return _cut(volume, 2, low, high)

    return _change(study, cut)


def _metal(study, bodies, rng):
    """Two or three instrumented neighbours, a screw through each pedicle into the body: no signal within 4 to 7 mm of
    it, a bright rim, and the surroundings pushed by 3 mm along the rows, falling off with the distance's third power.
    """
    names = ("L2", "L3", "L4", "L5", "S1")
    count = int(rng.integers(2, 4))
    first = int(rng.integers(len(names) - count + 1))
    screws = []
    for name in names[first : first + count]:
        body = bodies[name]
        back = body.corners_lps_mm[1:3].mean(0) - body.center_lps_mm
        for side in (-1, 1):
            tip = body.center_lps_mm + side * 7 * body.left_lps
            screws.append((tip, tip + 2.4 * back + side * 9 * body.left_lps, rng.uniform(4, 7)))

    def void(volume):
        ends = volume.lps_to_voxel(np.array([end for screw in screws for end in screw[:2]]))
        reach = 30 / volume.spacing_mm  # nothing is pushed by more than a tenth of a millimetre there
        low = np.maximum(ends.min(0) - reach, 0).astype(int)
        high = np.minimum(ends.max(0) + reach + 2, volume.array.shape).astype(int)
        part = volume.array[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        index = np.stack(np.meshgrid(*[np.arange(a, b) for a, b in zip(low, high)], indexing="ij"), -1)
        points = volume.voxel_to_lps(index).astype(np.float32)
        near = np.full(part.shape, np.inf, np.float32)  # distance from the screws in units of their radius
        for start, end, radius_mm in screws:
            along = (end - start).astype(np.float32)
            away = points - start.astype(np.float32)
            t = np.clip(away @ along / (along @ along), 0, 1)
            near = np.minimum(near, np.linalg.norm(away - t[..., None] * along, axis=-1) / np.float32(radius_mm))
        push = 3.0 / volume.spacing_mm[1] / np.maximum(near, 1) ** 3
        rows, columns = np.mgrid[: part.shape[1], : part.shape[2]]
        moved = np.stack(
            [
                ndimage.map_coordinates(image, [rows + shift, columns], order=1, mode="nearest")
                for image, shift in zip(part, push)
            ]
        )
        moved *= 1 + 1.2 * np.exp(-0.5 * ((near - 1.2) / 0.15) ** 2)
        array = volume.array.copy()
        array[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = moved * np.clip((near - 0.9) / 0.2, 0, 1)
        return replace(volume, array=array)

    return _change(study, void)


def _wrap_around(study, bodies, rng):
    """The image rolled along its rows by 15 to 25% of its height, in either sense: its upper part appears below the
    rest, or its lower part above. What was rolled out does not count as in the field of view."""
    share = float(rng.uniform(0.15, 0.25) * rng.choice([-1, 1]))

    def parts(volume):
        size = volume.array.shape[1]
        shift = int(round(share * size))
        affine = volume.affine.copy()
        affine[:3, 3] -= affine[:3, 1] * shift  # the part that was not rolled out keeps its place in the patient
        rolled = replace(volume, array=np.roll(volume.array, shift, 1), affine=affine)
        return rolled, _cut(rolled, 1, max(shift, 0), size + min(shift, 0))

    return _change(study, lambda v: parts(v)[0]), [parts(volume)[1] for volume in study.volumes]


def _ghosts(study, bodies, rng):
    """The patient moves to and fro by 1.5 mm along rows and 3 mm along columns, with a period of 5 to 9 of the phase
    encoding's lines, which run along the rows: edges repeat at a fraction of the height of the image."""
    period, phase = rng.uniform(5, 9), rng.uniform(0, 2 * np.pi)

    def moved(volume):
        array = volume.array
        at_row, at_column = (np.fft.fftfreq(n) for n in array.shape[1:])
        line = np.arange(array.shape[1]) - array.shape[1] // 2
        swing = np.sin(2 * np.pi * np.fft.ifftshift(line) / period + phase)
        shift = np.multiply.outer(at_row * swing * 1.5 / volume.spacing_mm[1], np.ones(len(at_column)))
        shift += np.multiply.outer(swing * 3.0 / volume.spacing_mm[2], at_column)
        spectrum = np.fft.fft2(array) * np.exp(-2j * np.pi * shift)
        return replace(volume, array=np.abs(np.fft.ifft2(spectrum)).astype(np.float32))

    return _change(study, moved)


def _coarse(study, bodies, rng):
    """Pixels of 2.5 mm."""

    def shrunk(volume):
        images, affine = spinenet.sagittal_images(volume, 2.5)
        return replace(volume, array=images[:, 0].numpy(), affine=affine)

    return _change(study, shrunk)


def _t1_only(study, bodies, rng):
    """No T2 series."""
    return replace(study, volumes=study.of("Sagittal T1"))


_CORRUPT = {
    "noise": _noise,
    "third missing": _third_missing,
    "five slices": _five_slices,
    "cut at S1": _cut_at_s1,
    "cut below L1": _cut_below_l1,
    "off centre": _off_centre,
    "metal": _metal,
    "wrap-around": _wrap_around,
    "ghosts": _ghosts,
    "2.5 mm pixels": _coarse,
    "T1 only": _t1_only,
}


def corrupted_study(about, truth, corruption):
    """A study from the cache with one of CORRUPTIONS. Returns (Study, volumes that say what is in the field of view).

    about: as cached_studies gives it; truth: vertebra table. The same arguments give the same pixels.
    """
    study = load_study(about["path"])
    if corruption not in _CORRUPT:  # none; and scoliosis, which is in the anatomy
        return study, study.volumes
    bodies = {v.name: v for v in vertebra_module.vertebrae_from_table(truth, about["study_id"])}
    rng = np.random.default_rng((about["study_id"], CORRUPTIONS.index(corruption)))
    made = _CORRUPT[corruption](study, bodies, rng)
    return made if isinstance(made, tuple) else (made, made.volumes)


# -- scores


def in_view(volumes, points_lps_mm, edge_mm=EDGE_MM):
    """(n,) bool: which points a study's sagittal volumes show.

    A point counts when one of the volumes holds it at least edge_mm away from the edges of its images, and not farther
    than one and a half slice steps beyond its outermost slices (a volume may be cut at a missing slice).
    """
    seen = np.zeros(len(points_lps_mm), bool)
    for volume in volumes:
        index, size = volume.lps_to_voxel(points_lps_mm), np.array(volume.array.shape)
        inside_mm = np.minimum(index + 0.5, size - 0.5 - index) * volume.spacing_mm
        seen |= (inside_mm[:, 1:] >= edge_mm).all(1) & (inside_mm[:, 0] >= -volume.spacing_mm[0])
    return seen


def match_bodies(found_mm, true_mm, reach_mm=HIT_MM):
    """One-to-one pairs of centres (f, 3) and (t, 3) within reach_mm, as many as possible, then as near as possible.

    Returns a list of (index found, index true, distance in mm).
    """
    if not len(found_mm) or not len(true_mm):
        return []
    distance = np.linalg.norm(found_mm[:, None] - true_mm, axis=2)
    pairs = zip(*linear_sum_assignment(np.where(distance < reach_mm, distance, 1e4)), strict=True)
    return [(int(i), int(j), float(distance[i, j])) for i, j in pairs if distance[i, j] < reach_mm]


def score_study(boxes, bodies, truth, view):
    """One study's figures before they are put together.

    boxes, bodies: what locate_levels returned; truth: vertebra table of this study, T8 to S5; view: volumes that say
    what is in the field of view. Returns (dict, levels: DataFrame as level_errors gives it).

    Asked for are the true bodies T10 to S2 whose centre is in_view. Detections are the bodies that were seen, not
    placed by others or by a layout, and have a name; raw_ figures count those named "uncertain" too.
    hits: pairs of match_bodies; missed: bodies asked for without one; false: detections left over whose nearest true
    body is one of those asked for (nearer to another one, such as T9 or S1 at the image's edge, they count neither
    way); lumbar_hits, lumbar_named: hits of L1 to S1, and those of them under the true name; body_mm: the distances
    of the hits. Levels: those whose true centre is in_view; right: it is the nearest true disc's name and the centre
    is within RIGHT_MM.
    """
    study_id = int(truth["study_id"].iloc[0])
    true_bodies = vertebra_module.vertebrae_from_table(truth, study_id)
    true_mm = np.array([body.center_lps_mm for body in true_bodies])
    asked = in_view(view, true_mm) & np.array([body.name in VERTEBRAE for body in true_bodies])
    where = np.flatnonzero(asked)
    raw = [v for v in bodies if v.source.seen]
    counts = {}
    for prefix, seen in (("raw_", raw), ("", [v for v in raw if v.name != vertebra_module.UNCERTAIN])):
        seen_mm = np.array([v.center_lps_mm for v in seen]).reshape(-1, 3)
        pairs = match_bodies(seen_mm, true_mm[asked])
        left_over = sorted(set(range(len(seen))) - {i for i, _, _ in pairs})
        false = [i for i in left_over if asked[np.linalg.norm(true_mm - seen_mm[i], axis=1).argmin()]]
        counts |= {f"{prefix}hits": len(pairs), f"{prefix}missed": int(asked.sum()) - len(pairs)}
        counts |= {f"{prefix}false": len(false)}
    lumbar = [(seen[i].name, true_bodies[where[j]].name) for i, j, _ in pairs]  # of the loop's last round: with a name
    lumbar = [(name, true) for name, true in lumbar if true in LUMBAR]
    true_boxes = {box.level: box for box in fallbacks.level_boxes(true_bodies)}
    shown = in_view(view, np.array([box.center_lps_mm for box in true_boxes.values()]))
    levels = level_scores.level_errors(boxes_to_table(study_id, boxes), truth)
    levels = levels[levels["level"].map(dict(zip(true_boxes, shown, strict=True)))]
    levels = levels.assign(right=levels["named"] & (levels["error_mm"] < RIGHT_MM))
    score = {
        "study_id": study_id,
        "asked": int(asked.sum()),
        **counts,
        "lumbar_hits": len(lumbar),
        "lumbar_named": sum(name == true for name, true in lumbar),
        "levels": len(levels),
        "levels_right": int(levels["right"].sum()),
        "level_median_mm": float(levels["error_mm"].median()),
        "body_mm": [distance for _, _, distance in pairs],
    }
    return score, levels


def f1(scores, prefix=""):
    """Harmonic mean of the share of detections that are hits and the share of bodies that are hit."""
    hits = scores[f"{prefix}hits"].sum()
    wrong = scores[f"{prefix}missed"].sum() + scores[f"{prefix}false"].sum()
    return float(2 * hits / (2 * hits + wrong)) if hits + wrong else math.nan


def summarise(scores, levels):
    """A row of a table. scores: DataFrame of score_study's dicts; levels: their levels together.

    f1, raw_f1, named: over all bodies of these studies together (see score_study); body_median_mm, body_p95_mm: of
    the hits; levels: in the field of view, over which right, median_mm, p95_mm, median_deg (between the discs'
    normals) are taken; all_right: share of studies in which each of these (five, unless some are cut off) is right;
    confidence_right, confidence_wrong: mean confidence of the levels that are right, and of the others;
    doubted_right, doubted_wrong: share of them whose source says that the name is uncertain or the body unseen;
    seconds: median time of locate_levels on two threads.
    """
    with_levels = scores[scores["levels"] > 0]
    hits_mm = np.array([distance for distances in scores["body_mm"] for distance in distances])
    right, doubted = levels["right"].astype(bool), levels["source"].str.contains(f"uncertain|{UNSEEN}")
    return {
        "studies": len(scores),
        "f1": f1(scores),
        "raw_f1": f1(scores, "raw_"),
        "named": float(scores["lumbar_named"].sum() / max(scores["lumbar_hits"].sum(), 1)),
        "body_median_mm": float(np.median(hits_mm)) if len(hits_mm) else math.nan,
        "body_p95_mm": float(np.percentile(hits_mm, 95)) if len(hits_mm) else math.nan,
        "levels": len(levels),
        "right": float(right.mean()),
        "all_right": float((with_levels["levels_right"] == with_levels["levels"]).mean()),
        "median_mm": float(levels["error_mm"].median()),
        "p95_mm": float(levels["error_mm"].quantile(0.95)),
        "median_deg": float(levels["angle_deg"].median()),
        "confidence_right": float(levels.loc[right, "confidence"].mean()),
        "confidence_wrong": float(levels.loc[~right, "confidence"].mean()),
        "doubted_right": float(doubted[right].mean()),
        "doubted_wrong": float(doubted[~right].mean()),
        "seconds": float(scores["seconds"].median()),
    }


def locate_cases(cases, truth, model):
    """Run the network over cases (dicts: about, kind, corruption). Returns (scores, levels), DataFrames with `kind`.

    Each case gets `bodies`, what was found, for the pictures.
    """
    truth = dict(list(truth.groupby("study_id")))
    scores, levels = [], []
    for number, case in enumerate(progress(cases, "locating", len(cases))):
        about = case["about"]
        own = truth[about["study_id"]]
        study, view = corrupted_study(about, own, case["corruption"])
        started = time.perf_counter()
        boxes, bodies = levels_module.locate_levels(study, model)
        seconds = time.perf_counter() - started
        case["bodies"] = bodies
        score, errors = score_study(boxes, bodies, own, view)
        marks = {"case": number, "kind": case["kind"], "variant": about["variant"]}
        scores.append(marks | score | {"seconds": seconds})
        levels.append(errors.assign(**marks))
    return pd.DataFrame(scores), pd.concat(levels, ignore_index=True)


def tabulate(scores, levels, kinds):
    """One row a kind, without transitional studies; then all of them together, and the transitional ones."""
    ordinary, usual = scores["variant"] == "none", levels["variant"] == "none"
    parts = [(kind, ordinary & (scores["kind"] == kind), usual & (levels["kind"] == kind)) for kind in kinds]
    parts += [("all of these", ordinary, usual), ("transitional", ~ordinary, ~usual)]
    rows = [{"kind": name} | summarise(scores[own], levels[of_own]) for name, own, of_own in parts if own.any()]
    return pd.DataFrame(rows)


# -- pictures

_PANEL_MM = (320.0, 210.0)  # rows, around the image's middle; columns, around the true spine


def draw_case(ax, case, truth, score):
    """The slice in the middle of the true spine of the T2 series (else T1): truth green, what was found cyan, its
    names yellow, dashed where it was extrapolated and so is no detection, red without a name. Returns ax."""
    from matplotlib import patheffects

    study_id = case["about"]["study_id"]
    study, view = corrupted_study(case["about"], truth, case["corruption"])
    true_bodies = vertebra_module.vertebrae_from_table(truth, study_id)
    shown = in_view(view, np.array([body.center_lps_mm for body in true_bodies]), 0.0)
    middle = np.mean([body.center_lps_mm for body in true_bodies if body.name in LUMBAR], 0)
    volumes = study.of("Sagittal T2/STIR") or study.volumes
    # A series that was cut at missing slices has several volumes.
    volume = min(volumes, key=lambda v: abs(v.lps_to_voxel(middle)[0] - (len(v.array) - 1) / 2))
    index = int(np.clip(np.round(volume.lps_to_voxel(middle)[0]), 0, len(volume.array) - 1))
    for body, is_shown in zip(true_bodies, shown, strict=True):
        if is_shown and body.name in VERTEBRAE:
            corners = volume.lps_to_voxel(body.corners_lps_mm)[[0, 1, 2, 3, 0], 1:]
            center = corners[:4].mean(0)
            ax.plot(corners[:, 1], corners[:, 0], color="lime", linewidth=2.2, alpha=0.55)
            front = corners[[0, 3]].mean(0)
            beside = front - 4 * (center - front) / np.linalg.norm((center - front) * volume.spacing_mm[1:])
            ax.text(beside[1], beside[0], body.name, color="lime", fontsize=7, ha="right", va="center")
    plot_images.plot_vertebrae(ax, volume, index, [v for v in case["bodies"] if v.name != vertebra_module.UNCERTAIN])
    for body in case["bodies"]:
        if body.name == vertebra_module.UNCERTAIN:
            corners = volume.lps_to_voxel(body.corners_lps_mm)[[0, 1, 2, 3, 0]]
            ax.plot(corners[:, 2], corners[:, 1], color="tab:red", linewidth=0.7)
    for text in ax.texts:
        text.set(clip_on=True, path_effects=[patheffects.withStroke(linewidth=0.8, foreground="black")])
    # Every panel shows as many millimetres, so that they fit side by side.
    row, column = (volume.array.shape[1] - 1) / 2, volume.lps_to_voxel(middle)[2]
    half = np.array(_PANEL_MM) / 2 / volume.spacing_mm[1:]
    ax.set(xlim=(column - half[1], column + half[1]), ylim=(row + half[0], row - half[0]), facecolor="0.25")
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[])
    f_one, variant = f1(pd.DataFrame([score])), case["about"]["variant"]
    ax.set_title(
        f"{case['kind']} · {study_id}{'' if variant == 'none' else ' · ' + variant}\n"
        f"F1 {f_one:.2f} · {score['levels_right']} of {score['levels']} levels · {score['level_median_mm']:.1f} mm",
        fontsize=8,
    )
    return ax


def draw_sheet(path, title, chosen, cases, truth, columns):
    """A PNG of draw_case for these rows of the scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 4.3 * rows + 0.6), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, score in zip(axes.flat, chosen.to_dict("records")):
        own = truth[truth["study_id"] == score["study_id"]]
        draw_case(ax, cases[score["case"]], own, score)
    figure.suptitle(
        f"{title}\ngreen: truth · cyan: found (dashed: extrapolated) · yellow: its name · red: found, no name · "
        "titles: F1 of the bodies, levels right, median error of the levels",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def worst_rows(scores, count=10, of_a_kind=2):
    """The scores with the most wrong levels, then the most bodies missed or made up, then the largest error."""
    wrong = (scores["levels"] - scores["levels_right"]) / scores["levels"].clip(lower=1)
    bodies = (scores["missed"] + scores["false"]) / scores["asked"].clip(lower=1)
    ordered = scores.assign(wrong=wrong, bodies=bodies).sort_values(
        ["wrong", "bodies", "level_median_mm"], ascending=False
    )
    return ordered[ordered.groupby("kind").cumcount() < of_a_kind].head(count)


def best_rows(scores, kinds):
    """The best of the ordinary scores of each kind, in the order of kinds."""
    ordered = worst_rows(scores[scores["variant"] == "none"], len(scores), len(scores))[::-1]
    best = ordered.groupby("kind").head(1).set_index("kind", drop=False)
    return best.loc[[kind for kind in kinds if kind in best.index]]


# -- command line


def markdown(table):
    """A printed table: shares in percent."""
    shares = ("f1", "raw_f1", "named", "right", "all_right", "doubted_right", "doubted_wrong")
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    for row in table.to_dict("records"):
        cells = []
        for name, value in row.items():
            if isinstance(value, float):
                value = "-" if math.isnan(value) else f"{100 * value:.1f}%" if name in shares else f"{value:.2f}"
            cells.append(str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _records(table):
    """Rows for JSON, which has no NaN."""
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in table.to_dict("records")
    ]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "spinenet_phantom.safetensors")
    parser.add_argument("--studies", type=int, default=200, help="of the contrast table; a fifth for the corruptions")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "bench_spinenet" / "cache")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_spinenet")
    parser.add_argument("--workers", type=int, default=2, help="processes that make studies")
    parser.add_argument("--only", choices=("contrast", "corruption"))
    parser.add_argument("--corruptions", nargs="+", choices=CORRUPTIONS, default=CORRUPTIONS, help="default: all")
    options = parser.parse_args(arguments)
    model = spinenet.load_spinenet(options.weights)  # first: a wrong path shall not cost an hour of phantoms
    options.out.mkdir(parents=True, exist_ok=True)
    parts, truths = {}, {}
    if options.only != "corruption":
        studies, truths["contrast"] = cached_studies(options.cache, "contrast", options.studies, options.workers)
        parts["contrast"] = [{"about": s, "kind": s["contrast"], "corruption": "none"} for s in studies]
    if options.only != "contrast":
        count = max(options.studies // 5, 1)
        studies, of_clinical = cached_studies(options.cache, "clinical", count, options.workers)
        crooked, of_crooked = cached_studies(options.cache, "scoliosis", count, options.workers)
        truths["corruption"] = pd.concat([of_clinical, of_crooked], ignore_index=True)
        parts["corruption"] = [
            {"about": s, "kind": name, "corruption": name}
            for name in options.corruptions
            for s in (crooked if name == "scoliosis" else studies)
        ]
        cobb = [round(s["cobb_deg"], 1) for s in crooked]
    torch.set_num_threads(2)
    summary = {
        "weights": str(options.weights),
        "architecture": model.architecture,
        "studies": options.studies,
        "first_seeds": FIRST_SEED,
        "phantom_version": phantom.VERSION,
        "prevalence": PREVALENCE,
        "hit_mm": HIT_MM,
        "edge_mm": EDGE_MM,
        "right_mm": RIGHT_MM,
    }
    everything, cases, truth = [], [], pd.concat(truths.values(), ignore_index=True)
    for name, own in parts.items():
        if name == "corruption":
            summary["scoliosis_cobb_deg"] = cobb
        scores, levels = locate_cases(own, truths[name], model)
        kinds = KINDS if name == "contrast" else options.corruptions
        table = tabulate(scores, levels, kinds)
        write_csv(options.out / f"table_{name}.csv", table)
        summary[name] = _records(table)
        print(f"\n{name}\n\n{markdown(table)}\n")
        scores = scores.assign(table=name, case=scores["case"] + len(cases))
        everything.append(scores)
        cases += own
        picture, columns = ("examples.png", 6) if name == "contrast" else ("examples_corruption.png", 7)
        draw_sheet(options.out / picture, f"The best of each {name}", best_rows(scores, kinds), cases, truth, columns)
    scores = pd.concat(everything, ignore_index=True)
    write_csv(options.out / "studies.csv", scores.drop(columns=["body_mm", "case"]))
    write_json(options.out / "summary.json", summary)
    draw_sheet(options.out / "worst.png", "The ten worst, at most two of a kind", worst_rows(scores), cases, truth, 5)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
