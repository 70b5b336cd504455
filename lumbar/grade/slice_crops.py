"""Native slices around each level's places: cut, augmented, mirrored, seen in test-time views.

A study becomes six looks at each of its five levels. A look is a run of neighbouring slices of one series, each cut
around the same place in the patient; they are not resampled across slices. What a study does not show is missing.

May use: data, storage, names.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike

from ..data.geometry import LevelBox, boxes_from_table
from ..data.volume import Study, Volume, load_study
from ..names import LEVELS, MIRRORED_CONDITIONS
from ..storage import write_whole


@dataclass(frozen=True)
class Look:
    """Where one look at a level goes.

    description: of the series; condition: index of what is graded there; place_mm: (head, left, back) from the disc's
    centre along its axes; side: 1 left, -1 right, 0 the middle. Right sides are mirrored, so that every lateral look
    has the same side to the outside: slices run to the outside (sagittal), columns do (axial).
    """

    description: str
    condition: int
    place_mm: tuple[float, float, float]
    side: int = 0


# The canal is graded on sagittal T2 and, better, with axial T2 beside it. Foramina lie above the disc's plane: on the
# competition's data readers click them 9.2 mm above it.
LOOKS = (
    Look("Sagittal T2/STIR", 0, (0.0, 0.0, 25.0)),
    Look("Axial T2", 0, (0.0, 0.0, 25.0)),
    Look("Sagittal T1", 1, (9.2, 18.0, 22.0), 1),
    Look("Sagittal T1", 2, (9.2, -18.0, 22.0), -1),
    Look("Axial T2", 3, (0.0, 10.0, 22.0), 1),
    Look("Axial T2", 4, (0.0, -10.0, 22.0), -1),
)
LOOK_KINDS = (0, 1, 2, 2, 3, 3)  # a left and a right look are of one kind
MIRRORED_LOOKS = (0, 1, 3, 2, 5, 4)  # LOOKS after left and right change places

MARGIN = 1.25  # crops are cut this much larger, so that shifts and rotations in training see real surroundings
JITTER = 2  # slices by which a run of them moves in training, at most
REACH_MM = 12.0  # a place further from the nearest slice of a series is not on it


@dataclass(frozen=True, kw_only=True)
class SliceCrop:
    """What is cut: `slices` images a look, of size_px x size_px square pixels of mm_per_px millimetres.

    axial_mm_per_px: of axial looks, which are at smaller structures.
    channels: 3 puts both neighbours of a slice beside it as the image's channels; 1 is the slice alone.
    """

    size_px: int
    mm_per_px: float
    axial_mm_per_px: float
    slices: int
    channels: int = 3

    def __post_init__(self):
        if (
            self.slices < 1
            or self.size_px < 32
            or min(self.mm_per_px, self.axial_mm_per_px) <= 0
            or self.channels not in (1, 3)
        ):
            raise ValueError(
                f"SLICES must be 1 or more, SIZE_PX 32 or more, MM_PER_PX and AXIAL_MM_PER_PX above 0, CHANNELS 1 or "
                f"3, not {asdict(self)}"
            )

    @property
    def edge(self) -> int:
        """Slices that are cut on either side of a look's own: room for jitter, and the outer images' neighbours."""
        return JITTER + self.channels // 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a study that cut_slices cuts: (levels, looks, slices with edges, rows, columns)."""
        side = 2 * round(self.size_px * MARGIN / 2)
        return len(LEVELS), len(LOOKS), self.slices + 2 * self.edge, side, side

    def plain(self) -> dict:
        """As JSON, with its scope."""
        return {"scope": "slices", **asdict(self)}


def slice_crop(about: Mapping) -> SliceCrop:
    """The SliceCrop of SliceCrop.plain's values."""
    return SliceCrop(**{name: value for name, value in about.items() if name != "scope"})


def cut_slices(study: Study, boxes: Sequence[LevelBox], crop: SliceCrop) -> np.ndarray:
    """Cut a study's looks, with margin and edge: uint8 array of crop.shape, black where there is no slice.

    study: with normalised volumes (0 to 1 is what is kept of their grey values); boxes: of the five levels. Of several
    series or stacks of one description the one with the slice nearest to a place is taken. Rows run to the feet
    (sagittal) or to the back (axial), columns to the back or to the patient's left; runs of sagittal slices go to the
    patient's left, those of axial slices to the feet. Right looks are mirrored, see Look.
    """
    result = np.zeros(crop.shape, np.uint8)
    slices: dict[tuple[int, int], np.ndarray] = {}  # resampled once, cut for many places
    for number, look in enumerate(LOOKS):
        wanted = "axial" if look.description.startswith("Axial") else "sagittal"
        volumes = [v for v in study.of(look.description) if v.plane == wanted]
        for level, box in enumerate(boxes):
            place = box.to_lps(look.place_mm)
            volume = _nearest(volumes, place)
            if volume is not None:
                run = _cut_run(volume, place, crop, slices)
                # Sagittal runs go to the left: to the outside of the left side. Axial columns do.
                turned = (run[::-1] if wanted == "sagittal" else run[..., ::-1]) if look.side < 0 else run
                result[level, number] = turned
    return result


def _nearest(volumes: Sequence[Volume], place: np.ndarray) -> Volume | None:
    """The volume with the slice nearest to a place that it shows; None where none is near."""
    best, least = None, REACH_MM
    for volume in volumes:
        n, height, width = volume.array.shape
        k, row, column = volume.lps_to_voxel(place)
        away = abs(k - np.clip(round(k), 0, n - 1)) * volume.spacing_mm[0]
        if 0 <= row < height and 0 <= column < width and away < least:
            best, least = volume, away
    return best


def _cut_run(volume, place, crop, slices):
    """One look, (slices with edges, rows, columns) uint8."""
    _, _, count, side, _ = crop.shape
    run = np.zeros((count, side, side), np.uint8)
    sagittal = volume.plane == "sagittal"
    forward, down, right = ([1, 0, 0], [0, 0, -1], [0, 1, 0]) if sagittal else ([0, 0, -1], [0, 1, 0], [1, 0, 0])
    step = 1 if volume.affine[:3, 0] @ forward > 0 else -1
    flip_rows, flip_columns = volume.affine[:3, 1] @ down < 0, volume.affine[:3, 2] @ right < 0
    mm_per_px = crop.mm_per_px if sagittal else crop.axial_mm_per_px
    n, height, width = volume.array.shape
    at, row, column = volume.lps_to_voxel(place)
    first = int(np.clip(round(at), 0, n - 1)) - step * (count // 2)
    for slot in range(count):
        k = first + step * slot
        if not 0 <= k < n:
            continue
        key = (id(volume), k)
        if key not in slices:
            slices[key] = _resampled(volume, k, mm_per_px)
        image = slices[key]
        scale_y, scale_x = image.shape[0] / height, image.shape[1] / width
        y, x = (row + 0.5) * scale_y - 0.5, (column + 0.5) * scale_x - 0.5
        if flip_rows:
            image, y = image[::-1], image.shape[0] - 1 - y
        if flip_columns:
            image, x = image[:, ::-1], image.shape[1] - 1 - x
        top, left = round(y - (side - 1) / 2), round(x - (side - 1) / 2)
        rows = slice(max(top, 0), min(top + side, image.shape[0]))
        columns = slice(max(left, 0), min(left + side, image.shape[1]))
        if rows.start < rows.stop and columns.start < columns.stop:
            run[slot, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = image[
                rows, columns
            ]
    return run


def _resampled(volume, k, mm_per_px):
    """A slice at square pixels of mm_per_px, uint8. Antialiased: real matrices may be finer than that."""
    height, width = volume.array.shape[1:]
    _, row_mm, column_mm = volume.spacing_mm
    new = max(1, round(height * row_mm / mm_per_px)), max(1, round(width * column_mm / mm_per_px))
    image = torch.from_numpy(np.asarray(volume.array[k], np.float32))[None, None]
    image = F.interpolate(image, size=new, mode="bilinear", align_corners=False, antialias=True)[0, 0]
    # From 1: black inside of an image is no missing slice.
    return (image.clamp(0, 1) * 254 + 1.5).to(torch.uint8).numpy()


class SliceDataset(torch.utils.data.Dataset):
    """Looks (with margin and edge) and grades of studies, one item a study.

    Items: array of crop.shape uint8, 0, grades (5, 5) int64. With a cache folder each study is cut once.
    """

    per_study = 1

    def __init__(
        self,
        paths: Mapping[int, str | Path],
        study_ids: Iterable[int],
        grades: ArrayLike,
        levels_table: pd.DataFrame,
        crop: SliceCrop,
        cache: str | Path | None = None,
    ) -> None:
        self.paths, self.study_ids, self.grades = paths, list(study_ids), np.asarray(grades)
        self.levels_table, self.crop = levels_table, crop
        self.cache = Path(cache) if cache else None

    def __len__(self) -> int:
        return len(self.study_ids)

    def crops_of(self, study_id: int, level: int | None = None) -> np.ndarray:
        """(1, *crop.shape) uint8, from the cache if it is there."""
        if not self.cache:
            return self._cut(study_id)
        path = self.cache / f"{study_id}.npy"
        crops = _load(path)
        if crops is None or crops.shape != (1, *self.crop.shape):
            with write_whole(path) as temporary, open(temporary, "wb") as file:
                np.save(file, self._cut(study_id))
            crops = _load(path)
        return crops

    def _cut(self, study_id):
        boxes = boxes_from_table(self.levels_table, study_id)
        return cut_slices(load_study(self.paths[study_id]), boxes, self.crop)[None]

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        crops = torch.from_numpy(np.array(self.crops_of(self.study_ids[number])[0]))
        return crops, 0, torch.from_numpy(np.ascontiguousarray(self.grades[number]))


def _load(path):
    """The array in a cache's file, not yet read from the disk; None where there is none, or a damaged one."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


# Test-time views that may pay, the plain one first; what each is worth is measured on held-out studies. slice: the
# runs of slices move by so many; shift_px: (down, right) of the network's input.
SLICE_VIEWS: tuple[dict[str, Any], ...] = (
    {},
    {"mirror": True},
    {"scale": 1.08},
    {"scale": 0.93},
    {"slice": 1},
    {"slice": -1},
    {"shift_px": [3.0, 0.0]},
    {"shift_px": [-3.0, 0.0]},
    {"shift_px": [0.0, 3.0]},
    {"shift_px": [0.0, -3.0]},
)


def view_slices(
    crops: torch.Tensor,
    crop: SliceCrop,
    slice: torch.Tensor | None = None,
    shift_px: torch.Tensor | None = None,
    rotation_deg: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    mirror: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cut the network's input out of looks with margin and edge, moved as asked: augmentation and TTA alike.

    Parameters
    ----------
    crops : (B, *crop.shape) uint8 tensor on any device
    crop : SliceCrop
    slice : (B, 5, 6) int tensor, by which the runs move, at most JITTER
    shift_px : (B, 5, 6, 2) down and right, in pixels of the input
    rotation_deg, scale : (B, 5, 6); a scale above 1 enlarges
    mirror : (B,) bool, left and right change places (the caller swaps the labels, see mirror_conditions)

    Returns
    -------
    (B, 5, 6, slices + 2 * (channels // 2), size_px, size_px) float32 tensor, 0 to 1; NaN where there is no slice.
    """
    batch, levels, looks, count, side, _ = crops.shape
    device, own = crops.device, crop.slices + 2 * (crop.channels // 2)
    start = torch.full((batch, levels, looks), JITTER) if slice is None else JITTER + slice
    index = (start[..., None] + torch.arange(own)).to(device)
    crops = crops.gather(3, index[..., None, None].expand(-1, -1, -1, -1, side, side))
    there = crops.flatten(-2).amax(-1) > 0
    if mirror is not None:
        crops, there = _mirrored(crops, there, mirror.to(device))
    items = batch * levels * looks
    matrix = torch.eye(2).repeat(items, 1, 1)
    if rotation_deg is not None:
        angle = torch.deg2rad(rotation_deg.float()).reshape(items)
        matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(items, 2, 2)
    if scale is not None:
        matrix = matrix / scale.float().reshape(items, 1, 1)
    offset = torch.zeros(items, 2) if shift_px is None else shift_px.float().reshape(items, 2).flip(-1) * 2 / side
    theta = torch.cat([matrix * (crop.size_px / side), offset[..., None]], -1).to(device)
    grid = F.affine_grid(theta, [items, own, crop.size_px, crop.size_px], align_corners=False)
    # uint8 to 0 to 1, 1 being black: see _resampled.
    flat = (crops.view(items, own, side, side).float() - 1).clamp(min=0) / 254
    images = F.grid_sample(flat, grid, align_corners=False).view(batch, levels, looks, own, crop.size_px, crop.size_px)
    return images.masked_fill(~there[..., None, None], torch.nan)


def _mirrored(crops, there, mirror):
    """Looks of studies that are mirrored where `mirror` (B,) says so."""
    swapped, known = crops[:, :, list(MIRRORED_LOOKS)], there[:, :, list(MIRRORED_LOOKS)]
    # Lateral looks are mirrored already. The canal's sagittal run turns round, its axial columns do.
    swapped[:, :, 0], known[:, :, 0] = crops[:, :, 0].flip(2), there[:, :, 0].flip(2)
    swapped[:, :, 1] = crops[:, :, 1].flip(-1)
    wide = mirror[:, None, None, None]
    return torch.where(wide[..., None, None], swapped, crops), torch.where(wide, known, there)


def expand_slice_view(view: Mapping, batch: int) -> dict:
    """A view's plain numbers -> the tensors that view_slices takes. Raises ValueError for an unknown one."""
    if unknown := set(view) - {"slice", "shift_px", "scale", "mirror"}:
        raise ValueError(f"unknown view {', '.join(sorted(unknown))}; there are slice, shift_px, scale, mirror")
    shape, found = (batch, len(LEVELS), len(LOOKS)), {}
    if "slice" in view:
        found["slice"] = torch.full(shape, int(view["slice"]))
    if "scale" in view:
        found["scale"] = torch.full(shape, float(view["scale"]))
    if "shift_px" in view:
        found["shift_px"] = torch.tensor(view["shift_px"], dtype=torch.float32).expand(*shape, 2)
    if "mirror" in view:
        found["mirror"] = torch.full((batch,), bool(view["mirror"]))
    return found


def augment_slices(
    crops: torch.Tensor, grades: torch.Tensor, crop: SliceCrop, generator: torch.Generator, strength: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random views for training: stage-1 jitter, slices shifted, mirroring with labels, contrast, noise, looks lost.

    Parameters
    ----------
    crops : (B, *crop.shape) uint8 tensor
        Of cut_slices, on any device.
    grades : (B, 5, 5) int tensor
        By study, condition and level.
    crop : SliceCrop
    generator : torch.Generator, on the CPU
        Of all random numbers but the noise, which is drawn on the crops' device by torch's default one.
    strength : float
        Factor of the jitter's, the slices' and the contrast's standard deviations; mirroring, noise and looks that are
        lost stay as they are.

    Returns
    -------
    inputs : (B, 5, 6, slices + 2 * (channels // 2), size_px, size_px) float32 tensor
        Of view_slices; NaN where there is no slice.
    grades : (B, 5, 5) int tensor
        Left and right swapped where the input is mirrored.
    """
    shape = (len(crops), len(LEVELS), len(LOOKS))

    def normal(*size):
        return torch.randn(*size, generator=generator) * strength

    mirror = torch.rand(len(crops), generator=generator) < 0.5
    inputs = view_slices(
        crops,
        crop,
        # Of one slice a fifth: where a place lies between two, either may be the nearest. Of several slices more, as
        # far as the nearest one is still among them: a standard deviation of 1 for five.
        slice=(max(0.4, 0.2 * crop.slices) * normal(*shape)).round().clamp(-JITTER, JITTER).long(),
        shift_px=2.5 / _mm_per_px(crop)[:, None] * normal(*shape, 2),
        rotation_deg=7 * normal(*shape),
        scale=1 + 0.07 * normal(*shape),
        mirror=mirror,
    )
    tail = (1, 1, 1)
    gain = torch.exp(0.15 * normal(*shape, *tail)).to(inputs.device)
    bias = (0.05 * normal(*shape, *tail)).to(inputs.device)
    inputs = inputs * gain + bias + 0.02 * torch.randn_like(inputs)
    # A look is lost now and then: real studies lack series.
    lost = torch.rand(*shape, *tail, generator=generator) < 0.04
    inputs = inputs.masked_fill(lost.to(inputs.device), torch.nan)
    swapped = grades[:, list(MIRRORED_CONDITIONS)]
    return inputs, torch.where(mirror.to(grades.device)[:, None, None], swapped, grades)


def _mm_per_px(crop):
    """(6,) of each look."""
    axial = [look.description.startswith("Axial") for look in LOOKS]
    return torch.where(torch.tensor(axial), crop.axial_mm_per_px, crop.mm_per_px)


def exchange_levels(
    inputs: torch.Tensor,
    grades: torch.Tensor,
    generator: torch.Generator,
    share: float,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CutMix with whole levels: some levels come from the study before, with their labels.

    A grade is read at one small place. A patch that misses or hides it would say nothing of how much of its label is
    left; a whole level takes all of its labels along. share: of the studies in which that is done; before: inputs and
    grades whose last study is the one before the first, so that batches of one study get levels, too; None: the last
    of this batch.
    """
    last = (inputs, grades) if before is None else before
    other, other_grades = torch.cat([last[0][-1:], inputs[:-1]]), torch.cat([last[1][-1:], grades[:-1]])
    chosen = torch.rand(len(inputs), 1, generator=generator) < share
    chosen = (chosen & (torch.rand(len(inputs), len(LEVELS), generator=generator) < 0.4)).to(inputs.device)
    inputs = torch.where(chosen[..., None, None, None, None], other, inputs)
    return inputs, torch.where(chosen[:, None].to(grades.device), other_grades, grades)
