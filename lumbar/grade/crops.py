"""Crops for the 3D networks: cut, stored, augmented, mirrored, seen in test-time views.

May use: data, storage, names.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torch.utils.data
from numpy.typing import ArrayLike

from ..data.crop import Crop
from ..data.geometry import LevelBox, boxes_from_table
from ..data.resample import crop_level, crop_study
from ..data.volume import Study, load_study
from ..names import LEVELS, MIRRORED_CONDITIONS
from ..storage import write_whole

View = Mapping[str, Any]  # view_crops' arguments as plain numbers, of one test-time view
CROP_MARGIN = 1.2  # crops are cut this much larger, so that shifts and rotations in training see real surroundings


def margin_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The (d, h, w) at which crops are cut: CROP_MARGIN larger, even.

    Parameters
    ----------
    shape : sequence of int
        Voxels (d, h, w) of the network's input.

    Returns
    -------
    tuple of int
        Voxels.
    """
    return tuple(int(round(n * CROP_MARGIN / 2)) * 2 for n in shape)


def cut_crops(study: Study, boxes: Sequence[LevelBox] | None, crop: Crop, device: str = "cpu") -> np.ndarray:
    """A study's network inputs with margin: (5, 3, D, H, W) float16 for scope level, (1, 3, D, H, W) for study.

    boxes: the five LevelBoxes (scope level only); device: where the sampling runs. The margin enlarges shape and extent
    alike, so voxels keep their size.
    """
    with_margin = crop.resized(margin_shape(crop.shape))
    if crop.scope == "study":
        return crop_study(study, with_margin, device)[0][None]
    if boxes is None:
        raise ValueError("no level could be placed")
    return np.stack([crop_level(study, box, with_margin, device)[0] for box in boxes])


def _load_crops(path):
    """The crops in a cache's file, not yet read from the disk; None where there is none, or a damaged one."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


class CropDataset(torch.utils.data.Dataset):
    """Crops (with margin) and grades of studies.

    Items: crop (3, D, H, W) float16, level () int64, grades (5,) int64 for scope `level`, one item per study and
    level; crop, 0, grades (5, 5) for scope `study`. With a cache folder each study is cut once, all levels together;
    without one an item cuts what it needs and no more.
    """

    def __init__(
        self,
        paths: Mapping[int, str | Path],
        study_ids: Iterable[int],
        grades: ArrayLike,
        levels_table: pd.DataFrame | None,
        crop: Crop,
        cache: str | Path | None = None,
    ) -> None:
        self.paths, self.study_ids, self.grades = paths, list(study_ids), np.asarray(grades)
        self.levels_table, self.crop = levels_table, crop
        self.cache = Path(cache) if cache else None
        self.per_study = len(LEVELS) if crop.scope == "level" else 1

    def __len__(self) -> int:
        return len(self.study_ids) * self.per_study

    def crops_of(self, study_id: int, level: int | None = None) -> np.ndarray:
        """(1 or 5, 3, D, H, W) float16, from the cache if it is there; level: only this one's crop (`study`: 0)."""
        only = slice(None) if level is None else slice(level, level + 1)
        if not self.cache:
            return self._cut(study_id, only)
        path = self.cache / f"{study_id}.npy"
        crops = _load_crops(path)
        if crops is None:
            with write_whole(path) as temporary, open(temporary, "wb") as file:
                np.save(file, self._cut(study_id, slice(None)))
            crops = _load_crops(path)
        return crops[only]

    def _cut(self, study_id, levels):
        boxes = boxes_from_table(self.levels_table, study_id)[levels] if self.crop.scope == "level" else None
        return cut_crops(load_study(self.paths[study_id]), boxes, self.crop)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        study, level = divmod(number, self.per_study)
        crop = torch.from_numpy(np.array(self.crops_of(self.study_ids[study], level)[0]))
        grades = self.grades[study, :, level] if self.per_study > 1 else self.grades[study]
        return crop, level, torch.from_numpy(np.ascontiguousarray(grades))


def view_crops(
    crops: torch.Tensor,
    crop: Crop,
    rotation_deg: torch.Tensor | None = None,
    shift_mm: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    mirror: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cut the network's input out of crops with margin, moved as asked: augmentation and TTA alike.

    Parameters
    ----------
    crops : (B, 3, D, H, W) tensor on any device
        As cut_crops cuts them for this crop.
    crop : Crop
        Without the margin.
    rotation_deg : (B, 3) tensor on the CPU, optional
        About the left, head and back axes.
    shift_mm : (B, 3) tensor on the CPU, optional
        Of the place that is cut out, along the crop's axes (foot, back, left).
    scale : (B,) tensor on the CPU, optional
        Above 1 enlarges.
    mirror : (B,) bool tensor on the CPU, optional
        Left and right change places (the caller swaps the labels, see mirror_conditions).

    Returns
    -------
    (B, 3, d, h, w) float32 tensor
        On the crops' device; 0 beyond their margin.
    """
    batch, device = len(crops), crops.device
    full = np.asarray(crops.shape[2:], np.float64)
    half_mm = torch.tensor(np.asarray(crop.extent_mm) * full / np.asarray(crop.shape) / 2, dtype=torch.float32)
    matrix = torch.eye(3).repeat(batch, 1, 1)
    if rotation_deg is not None:
        angle = torch.deg2rad(rotation_deg.float())
        for axis, (i, j) in enumerate(((0, 1), (1, 2), (0, 2))):  # planes of the crop axes (foot, back, left)
            turn = torch.eye(3).repeat(batch, 1, 1)
            turn[:, i, i] = turn[:, j, j] = torch.cos(angle[:, axis])
            turn[:, i, j], turn[:, j, i] = -torch.sin(angle[:, axis]), torch.sin(angle[:, axis])
            matrix = turn @ matrix
    if scale is not None:
        matrix = matrix / scale.float()[:, None, None]
    # Positions run over +-shape/full of the crop with margin; rotations act in mm, not in unequal voxels.
    matrix = matrix * (half_mm * torch.tensor(np.asarray(crop.shape) / full, dtype=torch.float32)) / half_mm[:, None]
    if mirror is not None:
        matrix[:, 2] = torch.where(mirror[:, None], -matrix[:, 2], matrix[:, 2])
    offset = torch.zeros(batch, 3) if shift_mm is None else shift_mm.float() / half_mm
    theta = torch.cat([matrix, offset[..., None]], -1)
    theta = theta[:, [2, 1, 0]][:, :, [2, 1, 0, 3]].to(device)  # affine_grid wants x, y, z = the last axis first
    grid = F.affine_grid(theta, [batch, 3, *crop.shape], align_corners=False)
    return F.grid_sample(crops.float(), grid, align_corners=False)


def mirror_conditions(array: Any, mirror: Any = None, axis: int = 1) -> Any:
    """Swap the left and the right conditions along `axis`, for the items where mirror (B,) is true (or all).

    array: numpy or torch, batch first. The inverse of itself.
    """
    index: list[Any] = [slice(None)] * array.ndim
    index[axis] = list(MIRRORED_CONDITIONS)
    swapped = array[tuple(index)]
    if mirror is None:
        return swapped
    where = mirror.reshape(-1, *[1] * (array.ndim - 1))
    return torch.where(where, swapped, array) if torch.is_tensor(array) else np.where(where, swapped, array)


def augment_crops(
    crops: torch.Tensor, grades: torch.Tensor, crop: Crop, generator: torch.Generator, strength: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random views for training: stage-1 jitter (shift, rotation, scale), mirroring with labels, contrast, noise.

    Parameters
    ----------
    crops : (B, 3, D, H, W) tensor
        With margin, on any device.
    grades : (B, 5, ...) tensor
        By crop and condition.
    crop : Crop
        Of view_crops.
    generator : torch.Generator, on the CPU
        Of all random numbers but the noise, which is drawn on the crops' device by torch's default one.
    strength : float
        Factor of the jitter's and the contrast's standard deviations; mirroring, noise and channels that are left out
        stay as they are.

    Returns
    -------
    inputs : (B, 3, d, h, w) float32 tensor
    grades : (B, 5, ...) tensor
        Left and right swapped where the input is mirrored.
    """
    batch = len(crops)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * strength

    mirror = torch.rand(batch, generator=generator) < 0.5
    inputs = view_crops(
        crops,
        crop,
        rotation_deg=5 * normal(batch, 3),
        shift_mm=2.5 * normal(batch, 3),
        scale=1 + 0.06 * normal(batch),
        mirror=mirror,
    )
    gain = torch.exp(0.15 * normal(batch, 3, 1, 1, 1)).to(inputs.device)
    bias = (0.05 * normal(batch, 3, 1, 1, 1)).to(inputs.device)
    # A channel is left out now and then: real studies lack series.
    keep = (torch.rand(batch, 3, 1, 1, 1, generator=generator) > 0.05).to(inputs.device)
    inputs = (inputs * gain + bias + 0.03 * torch.randn_like(inputs)) * keep
    return inputs, mirror_conditions(grades, mirror.to(grades.device))


def expand_view(view: View, batch: int) -> dict[str, torch.Tensor]:
    """A view's plain numbers -> the per-item tensors that view_crops takes.

    Parameters
    ----------
    view : mapping
        Any of shift_mm and rotation_deg (three numbers), scale and mirror, as in TTA_VIEWS.
    batch : int
        Items, B.

    Returns
    -------
    dict of str to tensor
        view_crops' arguments, alike for all items: float32 (B, 3) or (B,), `mirror` bool (B,).

    Raises
    ------
    ValueError
        A view with other keys.
    """
    tensors = {
        name: torch.tensor(value, dtype=torch.float32).expand(batch, 3)
        for name, value in view.items()
        if name in ("shift_mm", "rotation_deg")
    }
    if "scale" in view:
        tensors["scale"] = torch.full((batch,), float(view["scale"]))
    if "mirror" in view:
        tensors["mirror"] = torch.full((batch,), bool(view["mirror"]))
    unknown = set(view) - {"shift_mm", "rotation_deg", "scale", "mirror"}
    if unknown:
        raise ValueError(f"unknown TTA view {', '.join(sorted(unknown))}")
    return tensors
