"""SpineNet's targets, loss and training.

May use: spinenet, vertebra, data, storage, names.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from ..data.volume import Study
from ..names import progress
from ..storage import DamagedFile, read_tensors, write_tensors
from .spinenet import SpineNet, sagittal_images
from .vertebra import Vertebra, project_vertebrae, spine_class


def spinenet_targets(
    corners_px: torch.Tensor, classes: torch.Tensor, certain: torch.Tensor, shape: Sequence[int], sigma_px: float
) -> dict[str, torch.Tensor]:
    """Build the training targets of one image.

    Parameters
    ----------
    corners_px : (v, 4, 2) tensor
        (row, column) of the bodies' corners, in the order of CORNERS.
    classes : (v,) int64 tensor
        Indices into SPINE_CLASSES.
    certain : (v,) bool tensor
        False for a body whose side the slice grazes: there the heat maps do not count.
    shape : (2,) sequence of int
        (h, w) of the image.
    sigma_px : float
        Of the corners' Gaussians; the centroid's is twice as wide.

    Returns
    -------
    dict of str to tensor
        heat (5, h, w): Gaussians of height 1, of the four corners and the centroid.
        vectors (8, h, w): for each corner, row and column difference in pixels from the pixel to the centroid.
        near (4, h, w) bool: where `vectors` counts, within 1.5 sigma of such a corner.
        classes (h, w) int64: around a centroid the body's class, elsewhere -1.
        weight (1, h, w): of the heat maps, 0 or 1.
    """
    height, width = shape
    rows, columns = torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)
    targets = {
        "heat": torch.zeros(5, height, width),
        "vectors": torch.zeros(8, height, width),
        "near": torch.zeros(4, height, width, dtype=torch.bool),
        "classes": torch.full((height, width), -1, dtype=torch.int64),
        "weight": torch.ones(1, height, width),
    }
    if len(corners_px) == 0:
        return targets
    centroids = corners_px.mean(1, keepdim=True)
    points = torch.cat([corners_px, centroids], 1).float()  # (v, 5, 2)
    width_px = torch.tensor([sigma_px] * 4 + [2 * sigma_px])
    by_row = torch.exp(-0.5 * ((rows - points[..., 0, None]) / width_px[:, None]) ** 2)
    by_column = torch.exp(-0.5 * ((columns - points[..., 1, None]) / width_px[:, None]) ** 2)
    blobs = by_row[..., :, None] * by_column[..., None, :]  # (v, 5, h, w)
    targets["heat"], owner = (blobs * certain[:, None, None, None]).max(0)
    targets["near"] = targets["heat"][:4] > math.exp(-0.5 * 1.5**2)
    centroid = centroids[:, 0].float()[owner[:4]]  # (4, h, w, 2)
    vectors = torch.stack([centroid[..., 0] - rows[:, None], centroid[..., 1] - columns], 1)
    targets["vectors"] = vectors.reshape(8, height, width) * targets["near"].repeat_interleave(2, 0)
    targets["classes"][targets["heat"][4] > 0.5] = classes[owner[4]][targets["heat"][4] > 0.5]
    for number in torch.nonzero(~certain).flatten().tolist():
        low = (points[number].amin(0) - 3 * sigma_px).int().clamp(min=0).tolist()
        high = (points[number].amax(0) + 3 * sigma_px).int().clamp(min=0).tolist()
        targets["weight"][:, low[0] : high[0] + 1, low[1] : high[1] + 1] = 0
    return targets


def spinenet_records(
    study: Study, vertebrae: Sequence[Vertebra], resolution_mm: float
) -> list[dict[str, torch.Tensor]]:
    """Training images of one study: its sagittal slices, also those beside the spine.

    study: normalised; vertebrae: its true Vertebrae. Returns a list of dicts: image (h, w) float16 tensor,
    corners_px (v, 4, 2), classes (v,), certain (v,), as spinenet_targets takes them, only of bodies that the slice
    meets and whose centroid lies in the image.
    """
    records = []
    classes = np.array([spine_class(v.name) for v in vertebrae])
    half_mm = np.array([v.width_mm / 2 for v in vertebrae])
    for volume in study.volumes:
        if not volume.description.startswith("Sagittal") or volume.plane != "sagittal":
            continue
        images, affine = sagittal_images(volume, resolution_mm)
        shape = np.array(images.shape[2:])
        for index in range(len(images)):
            corners_px, offset_mm = project_vertebrae(vertebrae, affine, index)
            centroids = corners_px.mean(1)
            # A slice of some millimetres shows a body's rim as a mixture: neither a body nor none.
            seen = (np.abs(offset_mm) < 1.15 * half_mm) & ((centroids > 0) & (centroids < shape - 1)).all(1)
            records.append(
                {
                    "image": images[index, 0].half(),
                    "corners_px": torch.from_numpy(corners_px[seen]).float(),
                    "classes": torch.from_numpy(classes[seen]),
                    "certain": torch.from_numpy(np.abs(offset_mm[seen]) < 0.85 * half_mm[seen]),
                }
            )
    return records


class SpineSlices(torch.utils.data.Dataset):
    """`length` random crops from records, the same ones whenever it is asked, so that a killed training continues.

    records: from spinenet_records; shape: (h, w) of a crop in pixels; sigma_px: see spinenet_targets;
    augment: False gives the crop around the middle body, unchanged.
    An item is the dict of spinenet_targets with `image` (1, h, w).
    """

    def __init__(
        self,
        records: Sequence[dict[str, torch.Tensor]],
        length: int,
        shape: Sequence[int],
        sigma_px: float,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        # As arrays: a tensor would take a file descriptor on its way to a worker process that is not forked.
        self.records = [{name: np.asarray(value) for name, value in record.items()} for record in records]
        self.length, self.shape = length, tuple(shape)
        self.sigma_px, self.augment, self.seed = sigma_px, augment, seed
        self.with_bodies = [k for k, record in enumerate(records) if len(record["corners_px"])]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        if self.augment:
            # Half of the slices pass beside the spine; a few of those teach what is no vertebra.
            choice = self.with_bodies if self.with_bodies and rng.random() < 0.8 else range(len(self.records))
            record = self.records[choice[int(rng.integers(len(choice)))]]
        else:
            record = self.records[index]
        tensors = {name: torch.from_numpy(value) for name, value in record.items()}
        image, corners_px = tensors["image"].float(), tensors["corners_px"]
        size = torch.tensor(image.shape, dtype=torch.float32)
        middle = corners_px.mean((0, 1)) if len(corners_px) else (size - 1) / 2
        turn, zoom = 0.0, 1.0
        if self.augment:
            turn, zoom = rng.uniform(-0.26, 0.26), math.exp(rng.uniform(-0.2, 0.2))
            if len(corners_px) and rng.random() < 0.8:  # else anywhere: belly, back and air are to be seen too
                middle = corners_px[int(rng.integers(len(corners_px)))].mean(0)
            else:
                middle = size * torch.from_numpy(rng.random(2)).float()
            crop = torch.tensor(self.shape, dtype=torch.float32)
            middle = middle + torch.from_numpy(rng.uniform(-0.3, 0.3, 2)).float() * crop
            # No more than a tenth of the crop lies outside of the image: nothing is to be learnt there.
            reach = ((size - crop / zoom) / 2).clamp(min=0) + 0.1 * crop
            middle = torch.minimum(torch.maximum(middle, size / 2 - reach), size / 2 + reach)
        cosine, sine = math.cos(turn), math.sin(turn)
        matrix = torch.tensor([[cosine, -sine], [sine, cosine]]) / zoom  # crop -> image, both about their middles
        half = (torch.tensor(self.shape, dtype=torch.float32) - 1) / 2
        rows = torch.arange(self.shape[0], dtype=torch.float32)[:, None] - half[0]
        columns = torch.arange(self.shape[1], dtype=torch.float32) - half[1]
        from_row = matrix[0, 0] * rows + matrix[0, 1] * columns + middle[0]
        from_column = matrix[1, 0] * rows + matrix[1, 1] * columns + middle[1]
        grid = torch.stack([from_column * 2 / (size[1] - 1) - 1, from_row * 2 / (size[0] - 1) - 1], -1)
        image = F.grid_sample(image[None, None], grid[None], padding_mode="zeros", align_corners=True)[0]
        corners_px = (corners_px - middle) @ torch.linalg.inv(matrix).T + half
        if self.augment:
            image = self._contrast(image, rng)
        item = spinenet_targets(corners_px, tensors["classes"], tensors["certain"], self.shape, self.sigma_px)
        return item | {"image": image}

    @staticmethod
    def _contrast(image, rng):
        """Other scanners: inverted, gamma, brightness, coil sensitivity, noise."""
        if rng.random() < 0.15:
            image = 1 - image.clamp(0, 1)
        image = image.clamp(0, 2) ** math.exp(rng.uniform(-0.5, 0.5))
        bias = rng.uniform(-0.4, 0.4, 4)
        rows = torch.linspace(-1, 1, image.shape[1])[:, None]
        columns = torch.linspace(-1, 1, image.shape[2])
        image = image * torch.exp(bias[0] * rows + bias[1] * columns + bias[2] * rows**2 + bias[3] * columns**2)
        image = image * rng.uniform(0.7, 1.3) + rng.uniform(-0.1, 0.1)
        noise = rng.standard_normal(tuple(image.shape), dtype=np.float32) * np.float32(rng.uniform(0, 0.06))
        return image + torch.from_numpy(noise)


def spinenet_loss(
    output: torch.Tensor, targets: Mapping[str, torch.Tensor], resolution_mm: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of a batch: a scalar tensor, and its three parts as floats (heat, vectors, appearance).

    Heat: binary cross-entropy, 10 times as heavy on a peak as on the background: peaks are 1% of the pixels, but a
    heavier weight makes unsure maps blunt. Per peak, so that it does not depend on how many a batch shows, unless it
    shows hardly any.
    Vectors: smooth L1 of the error in units of 8 mm, around corners. Appearance: cross-entropy around centroids.
    """
    heat = targets["heat"]
    weight = targets["weight"] * (1 + 9 * heat)
    per_pixel = F.binary_cross_entropy_with_logits(output[:, :5], heat, reduction="none")
    heat_loss = (per_pixel * weight).sum() / (10 * heat.sum()).clamp(min=0.05 * heat.numel())
    near = targets["near"].repeat_interleave(2, 1)
    error = (output[:, 5:13] - targets["vectors"]) * (resolution_mm / 8.0)
    vector_loss = (F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none") * near).sum()
    vector_loss = vector_loss / near.sum().clamp(min=1)
    logits, classes = output[:, 13:].float(), targets["classes"]
    class_loss = F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum") / (classes >= 0).sum().clamp(min=1)
    parts = {"heat": heat_loss, "vectors": vector_loss, "appearance": class_loss}
    return heat_loss + vector_loss + class_loss, {name: float(part.detach()) for name, part in parts.items()}


def _save_training(path, model, optimizer, step, history):
    """The state of an unfinished training, without a pickle: AdamW keeps three tensors a parameter."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    write_tensors(path, tensors, "training", {"step": step, "history": history})


def _load_training(path, model, optimizer):
    """Put back what _save_training wrote. Returns (step, history): (0, []) where there is nothing to put back."""
    try:
        tensors, about = read_tensors(path, "training", "the training starts over")
    except FileNotFoundError:
        return 0, []
    except DamagedFile as error:
        print(error)
        return 0, []
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    state = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return about["step"], about["history"]


def _one_cycle(step, steps, peak):
    """Learning rate: a cosine up to `peak` over the first quarter, then down to peak / 1000 (Smith, 2018)."""
    rise = max(steps // 4, 1)
    if step < rise:
        return peak * (0.1 + 0.9 * (1 - math.cos(math.pi * step / rise)) / 2)
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1))) / 2)


def _set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def _half_precision(device):
    """bfloat16 where the hardware multiplies it (twice as fast on a CPU with AMX), else a context that does nothing.

    float16 would need its gradients scaled; older GPUs go without.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.autocast(kind, torch.bfloat16, enabled=bool(fast))


def train_spinenet(
    records: Any,
    folder: str | Path,
    *,
    start: SpineNet | None = None,
    validation: Any = (),
    widths: Sequence[int] = (32, 48, 64, 96),
    blocks: int = 1,
    resolution_mm: float = 2.0,
    steps: int = 400,
    batch_size: int = 8,
    crop_px: Sequence[int] = (128, 96),
    learning_rate: float = 3e-3,
    sigma_mm: float = 3.0,
    device: str = "cpu",
    workers: int = 0,
    seed: int = 0,
    save_every_s: float = 30.0,
) -> tuple[SpineNet, pd.DataFrame]:
    """Train a SpineNet. Safe to re-run after an interruption, to the same weights.

    Parameters
    ----------
    records : list of dict, or Dataset
        From spinenet_records at the same resolution; or steps * batch_size items, as training_slices makes them.
    folder : str or Path
        Gets spinenet_training.safetensors, from which an interrupted run continues.
    start : SpineNet, optional
        Trained further; its widths, blocks and resolution count then.
    validation : list of dict, or Dataset
        From spinenet_records, or items.
    widths, blocks
        Channels, and how many residual blocks, of each scale.
    resolution_mm : float
        Size of a pixel at which the network works.
    steps, batch_size
        Of the optimiser; crops in each step.
    crop_px : (2,) sequence of int
        Rows and columns.
    learning_rate : float
        The highest one.
    sigma_mm : float
        Of the corners' Gaussians.
    device : str
        As PyTorch names it.
    workers : int
        Processes that make the items; 0: none but this one.
    seed : int
        Of the first weights, and of the crops from records.
    save_every_s : float
        Seconds after which the state in `folder` is written anew; it is after the last step, too.

    Returns
    -------
    model : SpineNet
        In eval mode.
    history : DataFrame
        step, loss, heat, vectors, appearance, split.

    Raises
    ------
    ValueError
        No records, or a data set of another length.
    RuntimeError
        The loss is no longer a number.
    """
    torch.manual_seed(seed)
    model = _first_network(start, widths, blocks, resolution_mm).to(device).to(memory_format=torch.channels_last)
    resolution_mm = model.architecture["resolution_mm"]
    sigma_px = sigma_mm / resolution_mm
    dataset = _training_items(records, steps, batch_size, crop_px, sigma_px, seed)
    held_out = _validation_items(validation, crop_px, sigma_px)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    state = Path(folder) / "spinenet_training.safetensors"
    state.parent.mkdir(parents=True, exist_ok=True)
    first, history = _load_training(state, model, optimizer)
    loader = _batches_from(first, dataset, batch_size, workers, pin_memory=str(device) != "cpu")
    validate_at = {round(steps * k / 8) for k in range(1, 9)}
    saved = time.monotonic()
    bar = progress(loader, "training SpineNet", max(steps - first, 0))
    for step, batch in enumerate(bar, first):
        _set_rate(optimizer, _one_cycle(step, steps, learning_rate))
        losses = _train_step(model, optimizer, batch, step, resolution_mm, device)
        history.append({"step": step + 1, **losses, "split": "train"})
        if step + 1 in validate_at and len(held_out):
            held_out_losses = _validate_spinenet(model, held_out, resolution_mm, device)
            history.append({"step": step + 1, **held_out_losses, "split": "validation"})
        bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
        if time.monotonic() - saved > save_every_s or step + 1 == steps:
            _save_training(state, model, optimizer, step + 1, history)
            saved = time.monotonic()
    return model.eval(), pd.DataFrame(history)


def _first_network(start, widths, blocks, resolution_mm):
    """What a training starts from: a network of random weights, or a copy of `start`, whose architecture counts."""
    if start is None:
        return SpineNet(widths, blocks, resolution_mm)
    model = SpineNet(**start.architecture)
    model.load_state_dict(start.state_dict())
    model.about = dict(start.about)
    return model


def _training_items(records, steps, batch_size, crop_px, sigma_px, seed):
    """train_spinenet's data set of steps * batch_size items: the given one, or random crops from records."""
    if isinstance(records, torch.utils.data.Dataset):
        if len(records) != steps * batch_size:
            raise ValueError(f"the data set has {len(records)} items, {steps} steps of {batch_size} need their product")
        return records
    if not any(len(record["corners_px"]) for record in records):
        raise ValueError("no training image shows a vertebra: are vertebra table and volumes of the same studies?")
    return SpineSlices(records, steps * batch_size, crop_px, sigma_px, seed=seed)


def _validation_items(validation, crop_px, sigma_px):
    """The given data set, or at most 64 of the records, spread evenly over the studies: enough to see overfitting."""
    if isinstance(validation, torch.utils.data.Dataset):
        return validation
    chosen = [validation[i] for i in np.linspace(0, len(validation) - 1, min(len(validation), 64)).astype(int)]
    return SpineSlices(chosen, len(chosen), crop_px, sigma_px, augment=False)


def _batches_from(first, dataset, batch_size, workers, pin_memory):
    """The data set's batches in their order, without those before batch `first`."""
    rest = torch.utils.data.Subset(dataset, range(first * batch_size, len(dataset)))
    return torch.utils.data.DataLoader(rest, batch_size, num_workers=workers, pin_memory=pin_memory)


def _train_step(model, optimizer, batch, step, resolution_mm, device):
    """One step of the optimiser on a batch of items. Returns dict loss, heat, vectors, appearance."""
    model.train()
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    with _half_precision(device):
        output = model(batch["image"].contiguous(memory_format=torch.channels_last))
    loss, parts = spinenet_loss(output.float(), batch, resolution_mm)
    if not torch.isfinite(loss):
        raise RuntimeError(f"SpineNet: the loss is {float(loss)} at step {step}: lower LEARNING_RATE and run again")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return {"loss": float(loss.detach()), **parts}


@torch.no_grad()
def _validate_spinenet(model, dataset, resolution_mm, device):
    """Mean losses over a data set: dict loss, heat, vectors, appearance."""
    model.eval()
    sums = []
    for batch in torch.utils.data.DataLoader(dataset, 16):
        batch = {name: value.to(device) for name, value in batch.items()}
        loss, parts = spinenet_loss(model(batch["image"]).float(), batch, resolution_mm)
        sums.append({"loss": float(loss), **parts})
    return pd.DataFrame(sums).mean().to_dict()
