"""Training images for SpineNet: painted anatomies, random contrasts, artefacts.

May use: spinenet_training, vertebra, fallbacks, phantom, data, storage, names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage

from ..data.source import Source
from ..names import progress
from ..storage import write_tensors
from .fallbacks import fit_level_prior
from .spinenet_training import SpineSlices, spinenet_targets
from .vertebra import Vertebra, project_vertebrae, spine_class, vertebrae_to_table

if TYPE_CHECKING:
    import phantom

# The idea of Billot et al., "SynthSeg" (Medical Image Analysis 86, 2023): a network that was shown every contrast,
# resolution and artefact, far beyond what scanners make, takes a real image for one more of them. Anatomies are
# painted once into tissue labels; each training image is a new slice through one of them, with a new grey value per
# tissue, deformed, cut, shaded, blurred and spoilt anew.

# How often each way to spoil an image is used. Real series show most of them now and then; together they are rare.
ARTEFACTS = {
    "organs": 0.35,  # the belly replaced by made-up shapes: no phantom has the variety of bowels
    "soft": 0.12,  # the same behind the spine
    "band": 0.3,  # saturation band in front of the spine
    "blur": 0.5,
    "coarse": 0.3,  # larger pixels than the network's, in one or both directions
    "ghost": 0.12,  # copies along the phase direction
    "wrap": 0.08,  # what lies beyond the field of view, folded in
    "metal": 0.06,  # voids with bright rims
    "invert": 0.08,
    "faint": 0.08,
    "overexposed": 0.08,
    "gamma": 0.6,
}
_REACH_MM = 46.0  # planes are kept this far to both sides of the spine: nobody's bodies are wider


# -- painted anatomies on disk


def _paint_anatomy(job):
    """Worker: paint one anatomy and write the sagittal planes around its spine."""
    import phantom

    path, seed = job
    anatomy, _, _, grids, plans, _ = phantom.simulate(seed, prevalence=2.0, transitional=0.1, variety="wide")
    middle_mm = float(np.median([v.centre_mm[0] for v in anatomy.vertebrae]))
    about = {"seed": seed, "variant": anatomy.variant, "grids": [], "vertebrae": [], "anchors": _plan_anchors(plans)}
    tensors = {}
    for number, grid in enumerate(grids):
        # Every second plane is kept: slices are twice as thick as what lies between.
        x_mm = grid.axis_mm(0)
        kept = np.flatnonzero(np.abs(x_mm - middle_mm) < _REACH_MM)[::2]
        for name in ("under", "over", "share"):
            tensors[f"{name}_{number}"] = np.ascontiguousarray(getattr(grid, name)[kept])
        about["grids"].append(
            {
                "origin_mm": [float(x_mm[kept[0]]), *map(float, grid.origin_mm[1:])],
                "step_mm": [2 * float(grid.step_mm[0]), *map(float, grid.step_mm[1:])],
            }
        )
    for body in anatomy.vertebrae:
        if body.name not in ("S4", "S5"):  # too small and steep to have four corners; all else that is painted counts
            about["vertebrae"].append(
                {"name": body.name, "corners_mm": body.corners_mm().tolist(), "width_mm": float(body.width_mm)}
            )
    write_tensors(path, tensors, "anatomy", about)
    return path


def _plan_anchors(plans):
    """study_anchors of the series that a scanner would take of this anatomy."""
    anchors = {}
    for plane in ("sagittal", "axial"):
        corners = [
            plan.position_mm
            + down * (plan.shape[0] - 1) * plan.spacing_mm[0] * plan.column_cosine
            + aside * (plan.shape[1] - 1) * plan.spacing_mm[1] * plan.row_cosine
            for plan in plans
            if plan.description.lower().startswith(plane)
            for down in (0, 1)
            for aside in (0, 1)
        ]
        if corners:
            corners = np.concatenate(corners)
            anchors[plane] = ((corners.min(0) + corners.max(0)) / 2).tolist()
    return anchors


def paint_anatomies(folder: str | Path, count: int, seed: int = 0, workers: int = 2) -> list[Path]:
    """Paint anatomies of all kinds for RandomisedSlices, some 10 MB each. Those that are there are not painted again.

    Parameters
    ----------
    folder : str or Path
    count : int
    seed : int
        Seed k has the studies from 1_000_000_000 k + 1_000_000 on, which no benchmark uses.
    workers : int
        Processes.

    Returns
    -------
    list of Path
        Of the painted anatomies.
    """
    import multiprocessing

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [1_000_000_000 * seed + 1_000_000 + number for number in range(count)]
    paths = [folder / f"anatomy_{number}.safetensors" for number in seeds]
    jobs = [(path, number) for path, number in zip(paths, seeds, strict=True) if not path.is_file()]
    if len(jobs) and workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for _ in progress(pool.imap(_paint_anatomy, jobs), "painting anatomies", len(jobs)):
                pass
    else:
        for job in progress(jobs, "painting anatomies", len(jobs)):
            _paint_anatomy(job)
    return paths


def load_anatomy(path: str | Path) -> tuple[dict[str, Any], Callable[[int, int, int], phantom.TissueGrid]]:
    """(about, planes): about has seed, variant, grids (origin_mm, step_mm (3,) of x, y, z), shapes (of the grids as
    kept), vertebrae (list of Vertebra, named) and anchors (as study_anchors, lists); planes(number, first, last) reads
    the TissueGrid of grid `number`, planes first to last - 1 of it.

    Raises FileNotFoundError.
    """
    from safetensors import safe_open

    import phantom

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: paint_anatomies writes it")
    file = safe_open(path, framework="numpy")
    about = json.loads(file.metadata()["anatomy"])
    about["vertebrae"] = [
        Vertebra(np.array(item["corners_mm"]), item["width_mm"], name=item["name"], source=Source.TRUTH)
        for item in about["vertebrae"]
    ]

    def planes(number, first, last):
        grid = about["grids"][number]
        step = np.array(grid["step_mm"])
        origin = np.array(grid["origin_mm"]) + step * [first, 0, 0]
        part = [file.get_slice(f"{name}_{number}")[first:last] for name in ("under", "over", "share")]
        return phantom.TissueGrid(origin, step, *part)

    about["shapes"] = [file.get_slice(f"under_{number}").get_shape() for number in range(len(about["grids"]))]
    return about, planes


def prior_of_anatomies(paths: Iterable[str | Path]) -> dict:
    """fit_level_prior of painted anatomies, where their series would lie.

    Parameters
    ----------
    paths : iterable of path
        From paint_anatomies.

    Returns
    -------
    dict
        As fit_level_prior returns it.
    """
    anchors, tables = {}, []
    for number, path in enumerate(paths):
        about, _ = load_anatomy(path)
        anchors[number] = {plane: np.array(centre) for plane, centre in about["anchors"].items()}
        tables.append(vertebrae_to_table(number, about["vertebrae"]))
    return fit_level_prior(anchors, pd.concat(tables, ignore_index=True))


# -- grey values


def random_greys(rng: np.random.Generator) -> np.ndarray:
    """A grey value per tissue (tissue,) float32 in [0, 1.3]: physical, between and beyond two sequences, or any.

    Half of the tables are a sequence's with every tissue varied, a quarter lie on the line through two sequences, a
    quarter are drawn at random; in those a disc stays distinguishable from bone, else there is nothing to find.
    """
    import phantom

    kinds = ("T1", "T2", "STIR", "T1FS", "T2FS", "PD")
    often = np.array([0.3, 0.3, 0.2, 0.07, 0.07, 0.06])
    draw = rng.random()
    grey = phantom.contrast_table(str(rng.choice(kinds, p=often)), rng)
    if draw < 0.5:
        grey = grey * np.exp(rng.normal(0, 0.2, len(grey)))
    elif draw < 0.75:
        other = phantom.contrast_table(str(rng.choice(kinds, p=often)), rng)
        share = rng.uniform(-0.25, 1.25)
        grey = (share * grey + (1 - share) * other) * np.exp(rng.normal(0, 0.2, len(grey)))
    else:
        at = phantom.TISSUE
        dark = grey.copy()
        for _ in range(20):
            grey = rng.random(len(grey))
            grey[at["fatty_marrow"]] = grey[at["marrow"]] + rng.normal(0, 0.12)
            grey[at["nucleus"]] = grey[at["annulus"]] + rng.normal(0, 0.3)
            for name, chance in (("air", 0.9), ("cortex", 0.6)):
                if rng.random() < chance:
                    grey[at[name]] = dark[at[name]]
            if abs(grey[at["marrow"]] - grey[at["annulus"]]) > 0.15:
                break
    return np.clip(grey, 0, 1.3).astype(np.float32)


# -- one slice


def _smooth_field(rng, shape, spacing_px, order=1):
    """A random field (h, w) of about unit variance whose features are about spacing_px wide.

    order: of the spline between its knots; 3 where creases would show, three times as slow."""
    coarse = [int(math.ceil(n / spacing_px)) + 4 for n in shape]
    field = rng.standard_normal(coarse)
    at = [np.arange(n) / spacing_px + 1 + rng.random() for n in shape]
    field = ndimage.map_coordinates(field, np.meshgrid(*at, indexing="ij"), order=order, mode="nearest")
    return (field / 0.7).astype(np.float32)


def _sample(planes, about, number, places_mm, greys):
    """Rendered values of one grid at places_mm (3 arrays of one shape, LPS): (values, weight of this grid)."""
    import phantom

    grid = about["grids"][number]
    index = [(places_mm[k] - np.float32(grid["origin_mm"][k])) * np.float32(1 / grid["step_mm"][k]) for k in range(3)]
    size = about["shapes"][number]
    # Only what the slice touches is read and rendered.
    low = [int(np.clip(np.floor(index[k].min()), 0, size[k] - 2)) for k in range(3)]
    high = [int(np.clip(np.ceil(index[k].max()) + 1, a + 2, size[k])) for k, a in enumerate(low)]
    block = planes(number, low[0], high[0])
    inner = (slice(None), slice(low[1], high[1]), slice(low[2], high[2]))
    image = phantom.render(
        phantom.TissueGrid(block.origin_mm, block.step_mm, block.under[inner], block.over[inner], block.share[inner]),
        greys,
    )
    # grid_sample is several times as quick as map_coordinates; beyond the grid it repeats the outermost values.
    at = [(index[k] - low[k]) * np.float32(2 / (high[k] - low[k] - 1)) - 1 for k in (2, 1, 0)]
    at = torch.from_numpy(np.stack(at, -1).reshape(1, 1, 1, -1, 3))
    values = F.grid_sample(torch.from_numpy(image)[None, None], at, padding_mode="border", align_corners=True)
    values = values.numpy().reshape(places_mm[0].shape)
    inside = np.minimum.reduce([np.minimum(index[k], size[k] - 1 - index[k]) for k in (1, 2)])
    inside = np.minimum(inside, np.minimum(index[0] + 1, size[0] - index[0]) * 6)
    return values, np.clip(inside / 6, 0, 1).astype(np.float32)


def _into_grid(grid, shape, affine, size):
    """(3,) shift in LPS mm along y and z that brings a crop's middle to where the crop is filled, if it fits."""
    shift = np.zeros(3)
    middle = affine[:3, 3] + affine[:3, 1:3] @ ((size - 1) / 2)
    for k in (1, 2):
        low, high = grid["origin_mm"][k], grid["origin_mm"][k] + grid["step_mm"][k] * (shape[k] - 1)
        reach = 0.5 * abs(affine[k, 1:3]) @ size
        shift[k] = (
            np.clip(middle[k], min(low + reach, (low + high) / 2), max(high - reach, (low + high) / 2)) - middle[k]
        )
    return shift


def random_slice(
    about: dict[str, Any],
    planes: Callable[[int, int, int], phantom.TissueGrid],
    rng: np.random.Generator,
    shape: Sequence[int],
    resolution_mm: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One slice through an anatomy under random grey values, not yet spoilt.

    shape: (h, w) in pixels of resolution_mm. Returns (image (h, w) float32, corners_px (v, 4, 2) as (row, column),
    offset_mm (v,) of the slice from each body's middle, front_px (h,): the column of the bodies' front in each row).
    """
    bodies = about["vertebrae"]
    size = np.array(shape)
    # Centres of real fields of view lie at L3; what is hard to tell apart lies at the sacrum.
    often = np.array([{"T": 0.5, "L": 1.0}.get(body.name[0], 1.5 if body.name == "S1" else 0.8) for body in bodies])
    aim = bodies[int(rng.choice(len(bodies), p=often / often.sum()))]
    # Three of four slices pass through the bodies, one beside them: ribs, foramina and muscle are no vertebrae.
    aside = rng.uniform(-0.5, 0.5) * aim.width_mm if rng.random() < 0.78 else rng.uniform(-1, 1) * (_REACH_MM - 4)
    centre = aim.center_lps_mm + [aside, 0, 0]
    lean, turn = rng.normal(0, 0.035, 2)
    normal = np.array([1.0, math.tan(turn), math.tan(lean)])
    normal /= np.linalg.norm(normal)
    angle = rng.normal(0, 0.16)
    zoom_rows, zoom_columns = np.exp(rng.normal(0, 0.12) + rng.normal(0, 0.04, 2))
    down = np.array([0.0, math.sin(angle), -math.cos(angle)])
    down -= normal * (normal @ down)
    down /= np.linalg.norm(down)
    back = np.cross(normal, down)
    back *= math.copysign(1, back[1])
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = (
        normal,
        down * resolution_mm / zoom_rows,
        back * resolution_mm / zoom_columns,
    )
    middle_px = size / 2 - 0.5 + rng.uniform(-0.42, 0.42, 2) * size
    affine[:3, 3] = centre - affine[:3, 1] * middle_px[0] - affine[:3, 2] * middle_px[1]
    affine[:3, 3] += _into_grid(about["grids"][1], about["shapes"][1], affine, size)
    # A smooth deformation gives each body another shape; corners follow it.
    bend = [
        _smooth_field(rng, shape, rng.uniform(35, 90) / resolution_mm, 3)
        * np.float32(rng.uniform(0, 2.2) / resolution_mm)
        for _ in range(2)
    ]
    rows = np.arange(shape[0], dtype=np.float32)[:, None] + bend[0]
    columns = np.arange(shape[1], dtype=np.float32)[None, :] + bend[1]
    thickness_mm = rng.uniform(2.5, 5.5)
    greys = random_greys(rng)
    depth_mm = np.array([-1, 1], np.float32)[:, None, None] * np.float32(thickness_mm / 4)
    exact = affine.astype(np.float32)  # a hundredth of a millimetre at worst, at half the time
    places = [exact[k, 3] + exact[k, 1] * rows + exact[k, 2] * columns + depth_mm * exact[k, 0] for k in range(3)]
    fine, weight = _sample(planes, about, 0, places, greys)
    coarse, _ = _sample(planes, about, 1, places, greys)
    image = (weight * fine + (1 - weight) * coarse).mean(0)
    corners_px, offset_mm = project_vertebrae(bodies, affine, 0)
    straight = corners_px.reshape(-1, 2).T
    moved = straight.copy()
    for _ in range(4):  # where does the deformed grid meet the corner?
        moved = straight - [ndimage.map_coordinates(b, moved, order=1, mode="nearest") for b in bend]
    corners_px = moved.T.reshape(-1, 4, 2)
    front = corners_px[:, [0, 3]].reshape(-1, 2)
    front = front[np.argsort(front[:, 0])]
    front_px = np.interp(np.arange(shape[0]), front[:, 0], front[:, 1])
    return image, corners_px, offset_mm, front_px.astype(np.float32)


def _made_up_shapes(rng, shape, resolution_mm):
    """(h, w): patches of a few random greys with texture, like organs that nobody has."""
    patches = _smooth_field(rng, shape, rng.uniform(8, 40) / resolution_mm, 3)
    edges = np.sort(rng.normal(0, 1, int(rng.integers(2, 7))))
    grey = rng.random(len(edges) + 1).astype(np.float32) ** rng.uniform(0.7, 2)
    image = grey[np.searchsorted(edges, patches)]
    texture = _smooth_field(rng, shape, rng.uniform(3, 12) / resolution_mm)
    return image * (1 + np.float32(rng.uniform(0, 0.25)) * texture)


def spoil(
    image: np.ndarray, front_px: np.ndarray, rng: np.random.Generator, resolution_mm: float, scale: float = 1.0
) -> np.ndarray:
    """What scanners, patients and windowing do to a slice: (h, w) float32 -> (h, w) float32 around [0, 1].

    front_px: (h,) column of the bodies' front; scale: factor on the chances in ARTEFACTS.
    """
    shape = image.shape
    use = {name: rng.random() < chance * scale for name, chance in ARTEFACTS.items()}
    rows = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, shape[1], dtype=np.float32)
    ahead_mm = (front_px[:, None] - np.arange(shape[1], dtype=np.float32)) * resolution_mm  # in front of the bodies
    top = max(float(np.percentile(image, 99)), 1e-3)
    image = image / top
    if use["organs"]:
        away = np.float32(rng.uniform(1, 25))
        mask = 1 / (1 + np.exp(np.clip((away - ahead_mm) / rng.uniform(0.7, 2.0), -30, 30)))
        image = image + mask * rng.uniform(0.5, 1.0) * (_made_up_shapes(rng, shape, resolution_mm) - image)
    if use["soft"]:
        away = np.float32(rng.uniform(60, 90))
        mask = 1 / (1 + np.exp(np.clip((away + ahead_mm) / 1.5, -30, 30)))
        image = image + mask * rng.uniform(0.5, 1.0) * (_made_up_shapes(rng, shape, resolution_mm) - image)
    for spacing_mm, strength in ((rng.uniform(2, 5), 0.12), (rng.uniform(15, 60), 0.15)):
        image = image * (1 + rng.uniform(0, strength) * _smooth_field(rng, shape, spacing_mm / resolution_mm))
    if use["metal"]:
        image = _voids(image, rng, front_px, resolution_mm)
    # Coil: bright near the back; a slow change along the spine; a bend of second order.
    reach_mm = rng.uniform(60, 300)
    image = image * np.exp(-np.maximum(ahead_mm + 80, 0) / reach_mm * rng.uniform(0, 1))
    tilt = rng.normal(0, 0.25, 4)
    image = image * np.exp(tilt[0] * rows + tilt[1] * columns - np.abs(tilt[2]) * rows**2 + tilt[3] * rows * columns)
    if use["band"]:
        edge = (ahead_mm - rng.uniform(8, 40)) / rng.uniform(2, 8)
        image = image * (1 - rng.uniform(0.4, 0.95) / (1 + np.exp(np.clip(-edge, -30, 30))))
    if use["ghost"]:
        shift, axis = int(rng.integers(6, 60)), int(rng.integers(2))
        strength = rng.uniform(0.03, 0.2)
        image = image + strength * (np.roll(image, shift, axis) + np.roll(image, -shift, axis))
    if use["wrap"]:
        folded = np.roll(image, shape[0] // 2, 0)
        edge = np.abs(rows) if rng.random() < 0.6 else np.abs(columns)[None, :]
        image = image + rng.uniform(0.2, 1) * folded * np.clip((edge - rng.uniform(0.6, 0.9)) * 8, 0, 1)
    if use["blur"]:
        image = ndimage.gaussian_filter(image, rng.uniform(0.2, 1.1, 2))
    if use["coarse"]:
        factor = np.maximum(rng.uniform(0.8, 2.6, 2), 1.0)
        small = ndimage.zoom(ndimage.gaussian_filter(image, 0.4 * factor), 1 / factor, order=1)
        image = ndimage.zoom(small, np.array(shape) / small.shape, order=1)[: shape[0], : shape[1]]
    # Rician noise, as coarse as the pixels it was measured in.
    sigma = rng.uniform(0, 0.02) if rng.random() < 0.6 else rng.uniform(0.02, 0.1)
    smooth = rng.uniform(0, 0.8)
    noise = rng.standard_normal((2, *shape), dtype=np.float32)
    if smooth > 0.3:
        noise = ndimage.gaussian_filter(noise, (0, smooth, smooth))
        noise /= noise.std()
    image = np.hypot(image + sigma * noise[0], sigma * noise[1])
    low, high = np.percentile(image, (0.5, 99.5))
    image = (image - low) / max(high - low, 1e-6)
    if use["gamma"]:
        image = np.maximum(image, 0) ** math.exp(rng.normal(0, 0.35))
    if use["invert"]:
        image = 1 - np.clip(image, 0, 1)
    if use["overexposed"]:
        image = np.minimum(image * rng.uniform(1.3, 2.5), 1)
    if use["faint"]:
        strength = rng.uniform(0.12, 0.4)
        image = strength * image + rng.uniform(0, 1 - strength)
        image = image + rng.uniform(0, 0.04) * noise[0]
    # Percentiles are a volume's, not a slice's: the slice's own scale wanders.
    return (image * math.exp(rng.normal(0, 0.2)) + rng.normal(0, 0.04)).astype(np.float32)


def _voids(image, rng, front_px, resolution_mm):
    """Metal: black where it lies, bright at the rim. Screws and rods lie behind, cages within the spine."""
    shape = image.shape
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    for _ in range(int(rng.integers(1, 4))):
        row = rng.uniform(0, shape[0])
        column = front_px[int(min(row, shape[0] - 1))] + rng.uniform(5, 75) / resolution_mm
        half = rng.uniform(3, 14, 2) / resolution_mm
        turn = rng.uniform(0, np.pi)
        a = (rows - row) * math.cos(turn) + (columns - column) * math.sin(turn)
        b = (columns - column) * math.cos(turn) - (rows - row) * math.sin(turn)
        distance = np.sqrt((a / half[0]) ** 2 + (b / half[1]) ** 2)
        image = image * np.clip((distance - 1) * 4, 0, 1)
        image = image + rng.uniform(0, 1.5) * np.exp(-(((distance - 1.15) / 0.12) ** 2)) * (a > 0)
    return image.astype(np.float32)


def _cut(image, rng):
    """Now and then the field of view ends inside the crop: 0 beyond, as where the network pads."""
    for axis in (0, 1):
        for end in (0, 1):
            if rng.random() < 0.12:
                n = int(image.shape[axis] * rng.uniform(0.02, 0.3))
                index = [slice(None), slice(None)]
                index[axis] = slice(0, n) if end == 0 else slice(image.shape[axis] - n, None)
                image[tuple(index)] = 0
    return image


class RandomisedSlices(torch.utils.data.Dataset):
    """Training items rendered on the fly, the same ones whenever they are asked for.

    An item is the dict of spinenet_targets with `image` (1, h, w) float32.

    Parameters
    ----------
    paths : iterable of path
        From paint_anatomies.
    length : int
        Number of items.
    shape : (2,) sequence of int
        (h, w) of a crop in pixels.
    resolution_mm : float
        Of a pixel.
    sigma_px : float
        See spinenet_targets.
    seed : int
    scale : float
        Factor on the chances in ARTEFACTS.

    Raises
    ------
    ValueError
        There are no anatomies.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        length: int,
        shape: Sequence[int],
        resolution_mm: float,
        sigma_px: float,
        seed: int = 0,
        scale: float = 1.0,
    ) -> None:
        self.paths, self.length, self.shape = list(paths), length, tuple(shape)
        self.resolution_mm, self.sigma_px, self.seed, self.scale = resolution_mm, sigma_px, seed, scale
        if not self.paths:
            raise ValueError("no painted anatomies: paint_anatomies makes them")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, 7, index))
        about, planes = load_anatomy(self.paths[int(rng.integers(len(self.paths)))])
        image, corners_px, offset_mm, front_px = random_slice(about, planes, rng, self.shape, self.resolution_mm)
        image = _cut(spoil(image, front_px, rng, self.resolution_mm, self.scale), rng)
        bodies = about["vertebrae"]
        half_mm = np.array([v.width_mm / 2 for v in bodies])
        centroids = corners_px.mean(1)
        inside = ((centroids > 0) & (centroids < np.array(self.shape) - 1)).all(1)
        shown = inside.copy()
        row, column = np.round(centroids[inside]).astype(int).T
        shown[inside] = image[row, column] != 0  # cut off: nothing there to be found
        # A slice of some millimetres shows a body's rim as a mixture: neither a body nor none.
        seen = (np.abs(offset_mm) < 1.15 * half_mm) & shown
        item = spinenet_targets(
            torch.from_numpy(corners_px[seen]).float(),
            torch.tensor([spine_class(v.name) for v in bodies])[torch.from_numpy(seen)],
            torch.from_numpy(np.abs(offset_mm[seen]) < 0.85 * half_mm[seen]),
            self.shape,
            self.sigma_px,
        )
        return item | {"image": torch.from_numpy(image)[None].clamp(-0.5, 2)}


class _Mixture(torch.utils.data.Dataset):
    """Item k comes from the first data set with probability `share`, else from the second, always the same way."""

    def __init__(self, first: RandomisedSlices, second: SpineSlices, share: float, seed: int) -> None:
        self.first, self.second, self.share, self.seed = first, second, share, seed

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chosen = self.first if np.random.default_rng((self.seed, 11, index)).random() < self.share else self.second
        return chosen[index]


def training_slices(
    anatomies: Sequence[str | Path],
    records: Sequence[dict[str, torch.Tensor]],
    length: int,
    shape: Sequence[int],
    resolution_mm: float,
    sigma_px: float,
    share: float = 0.8,
    seed: int = 0,
) -> torch.utils.data.Dataset:
    """What train_spinenet learns from: rendered slices, mixed with acquired ones. Either source may be missing.

    Parameters
    ----------
    anatomies : sequence of path
        From paint_anatomies; may be empty.
    records : sequence of dict
        From spinenet_records or point_records; may be empty.
    length : int
        Number of items.
    shape : (2,) sequence of int
        (h, w) of an item, in pixels of resolution_mm.
    resolution_mm, sigma_px : float
        As train_spinenet has them.
    share : float
        Of rendered slices, where there are both.
    seed : int

    Returns
    -------
    Dataset
        Items as spinenet_targets gives them, with `image` (1, h, w) float32.

    Raises
    ------
    ValueError
        There are neither anatomies nor slices with vertebrae.
    """
    acquired = any(len(record["corners_px"]) for record in records)
    if not anatomies and not acquired:
        raise ValueError("nothing to learn from: neither painted anatomies nor slices with vertebrae")
    if not anatomies:
        return SpineSlices(records, length, shape, sigma_px, seed=seed)
    rendered = RandomisedSlices(anatomies, length, shape, resolution_mm, sigma_px, seed)
    if not acquired:
        return rendered
    return _Mixture(rendered, SpineSlices(records, length, shape, sigma_px, seed=seed), share, seed)
