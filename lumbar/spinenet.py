"""SpineNet: vertebral bodies by vector-field regression, in sagittal slices and linked to 3D."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from .limits import check_limit
from .names import LEVEL_VERTEBRAE, VERTEBRAE, progress
from .storage import DamagedFile, read_tensors, write_tensors
from .weights import Stated, check_network, read_weights

# ----------------------------------------------------------------------------------------------------------------
#  6. SpineNet: vertebral bodies by vector-field regression
# ----------------------------------------------------------------------------------------------------------------
#
# The method of Windsor, Jamaludin, Kadir, Zisserman, "A Convolutional Approach to Vertebrae Detection and Labelling
# in Whole Spine MRI" (MICCAI 2020), from its description: a network marks the four corners and the centroid of each
# vertebral body in every sagittal slice and, at each corner, points to the centroid it belongs to; slices are linked
# to vertebrae in 3D, and the chain of vertebrae is named by appearance and order. Ours is smaller, and naming is one
# dynamic programme that counts up from the sacrum instead of two more networks and a beam search.

CORNERS = ("as", "ps", "pi", "ai")  # anterior-superior, posterior-superior, posterior-inferior, anterior-inferior
VERTEBRA_TABLE_COLUMNS = (
    ["study_id", "vertebra", "x_mm", "y_mm", "z_mm"]
    + [f"{corner}_{axis}_mm" for corner in CORNERS for axis in "xyz"]
    + ["width_mm", "confidence", "source"]
)
# What one body looks like: L5 is a wedge above the sacrum's tilt, the other lumbar ones resemble each other; S2 stands
# for all below S1.
SPINE_CLASSES = ("thoracic", "lumbar", "L5", "S1", "S2")
# A field of view may reach beyond the vertebrae that anyone asks for; naming needs places for those too.
_CHAIN = ("T7", "T8", "T9") + VERTEBRAE + ("S3",)
_LUMBAR = tuple(dict.fromkeys(name for pair in LEVEL_VERTEBRAE.values() for name in pair))  # L1 ... S1
UNCERTAIN = "uncertain"  # the name of a detection that has no place in the chain
AMBIGUOUS_SHARE = 0.7  # a name that fewer of all possible namings agree on is said to be uncertain


def spine_class(name):
    """Index into SPINE_CLASSES of a vertebra's name."""
    return {"T": 0, "L": 2 if name == "L5" else 1}.get(name[0], 3 if name == "S1" else 4)


@dataclass
class Vertebra:
    """One vertebral body.

    corners_lps_mm: (4, 3), in the order of CORNERS, in its mid-sagittal plane; width_mm: from right to left;
    appearance: (len(SPINE_CLASSES),) log-probabilities, or None; name: "T10" ... "S2", "uncertain", "" before naming;
    source: t2 | t1 | official | axial | prior | truth, and to the first three may be added +extrapolated (placed
    by its neighbours), +uncertain (its name is doubtful, see name_vertebrae).
    """

    corners_lps_mm: np.ndarray
    width_mm: float
    confidence: float = 1.0
    name: str = ""
    source: str = ""
    appearance: np.ndarray | None = None

    @property
    def center_lps_mm(self):
        """(3,): mean of the corners."""
        return self.corners_lps_mm.mean(0)

    @property
    def left_lps(self):
        """(3,) unit vector to the patient's left, perpendicular to the plane of the corners."""
        front_top, back_top, back_low, front_low = self.corners_lps_mm
        back = back_top + back_low - front_top - front_low
        head = front_top + back_top - front_low - back_low
        left = np.cross(back, head)
        return left / np.linalg.norm(left)


def vertebrae_to_table(study_id, vertebrae):
    """Vertebrae of one study -> rows of vertebrae.csv."""
    rows = [
        [study_id, v.name, *v.center_lps_mm, *v.corners_lps_mm.ravel(), v.width_mm, v.confidence, v.source]
        for v in vertebrae
    ]
    return pd.DataFrame(rows, columns=VERTEBRA_TABLE_COLUMNS)


def vertebrae_from_table(table, study_id):
    """The Vertebrae of a study, in the table's order; an empty list where it has none."""
    columns = VERTEBRA_TABLE_COLUMNS[5:17]
    return [
        Vertebra(
            np.array([row[c] for c in columns], np.float64).reshape(4, 3),
            float(row["width_mm"]),
            float(row["confidence"]),
            str(row["vertebra"]),
            str(row["source"]),
        )
        for row in table[table["study_id"] == study_id].to_dict("records")
    ]


# -- images and targets


def upright(volume):
    """(array (slice, row, column), affine): the volume with rows to the feet and columns to the back, not resampled."""
    array, affine = np.asarray(volume.array), np.array(volume.affine, np.float64)
    if abs(affine[2, 1]) < abs(affine[2, 2]):  # columns run along the spine
        array, affine = array.transpose(0, 2, 1), affine[:, [0, 2, 1, 3]]
    for axis, patient_axis, sign in ((1, 2, -1), (2, 1, 1)):
        if affine[patient_axis, axis] * sign < 0:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return array, affine


def sagittal_images(volume, resolution_mm):
    """A sagittal volume's slices as the network sees them: rows towards the feet, columns towards the back.

    Returns (images (n, 1, h, w) float32 tensor, affine (4, 4) from (slice, row, column, 1) of these images to LPS).
    The pixel size is resolution_mm up to rounding to whole pixels, and the affine has the exact one. Values are the
    volume's, which must be normalised, clipped to [-0.5, 2].
    Raises ValueError for a volume that is not sagittal.
    """
    if volume.plane != "sagittal":
        raise ValueError(f"study {volume.study_id}, series {volume.series_id}: {volume.plane}, not sagittal slices")
    array, affine = upright(volume)
    size = _resampled_px(array.shape, affine, resolution_mm)
    images = torch.empty((len(array), 1, *size))
    together = max(1, _CONVERTED_PX // math.prod(array.shape[1:]))
    for start in range(0, len(array), together):
        part = slice(start, start + together)
        pixels = torch.from_numpy(np.ascontiguousarray(array[part])).float()[:, None].clamp_(-0.5, 2)
        images[part] = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    for axis in (1, 2):
        ratio = array.shape[axis] / size[axis - 1]
        affine[:3, 3] += affine[:3, axis] * (ratio - 1) / 2  # pixel edges coincide, not the first pixels' centres
        affine[:3, axis] *= ratio
    return images, affine


_CONVERTED_PX = 1 << 24  # that are held in float32 at a time, before they are resampled


def _resampled_px(shape, affine, resolution_mm):
    """[rows, columns] of a volume's (shape, affine) slices once they are resampled."""
    sides_mm = np.array(shape[1:]) * np.linalg.norm(affine[:3, 1:3], axis=0)
    return [max(int(round(side)), 1) for side in sides_mm / resolution_mm]


def project_vertebrae(vertebrae, affine, index):
    """Where the bodies' corners lie in one slice.

    affine: (4, 4) from (slice, row, column, 1) to LPS; index: of the slice. The body is taken as a prism along its
    own left-right axis. Returns (corners_px (v, 4, 2) as (row, column), offset_mm (v,) from the body's
    mid-sagittal plane to the slice along that axis).
    """
    inverse = np.linalg.inv(affine)
    corners_px, offset_mm = np.zeros((len(vertebrae), 4, 2)), np.zeros(len(vertebrae))
    for number, vertebra in enumerate(vertebrae):
        step = inverse[:3, :3] @ vertebra.left_lps
        ijk = vertebra.corners_lps_mm @ inverse[:3, :3].T + inverse[:3, 3]
        offset_mm[number] = (index - ijk[:, 0].mean()) / step[0]
        corners_px[number] = (ijk + offset_mm[number] * step)[:, 1:]
    return corners_px, offset_mm


def spinenet_targets(corners_px, classes, certain, shape, sigma_px):
    """What the network shall answer for one image.

    corners_px: (v, 4, 2) tensor, (row, column) of the corners in the order of CORNERS; classes: (v,) indices into
    SPINE_CLASSES; certain: (v,) bool, False for a body whose side the slice grazes: there the heat maps do not count;
    shape: (h, w); sigma_px: of the corners' Gaussians, the centroid's is twice as wide.
    Returns a dict of tensors:
      heat (5, h, w)         Gaussians of height 1: the four corners, the centroid
      vectors (8, h, w)      for each corner kind, row and column difference in pixels from the pixel to the centroid
      near (4, h, w) bool    where `vectors` counts: within 1.5 sigma of a corner of this kind
      classes (h, w) int64   around a centroid the body's class, elsewhere -1
      weight (1, h, w)       of the heat maps, 0 or 1
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


def spinenet_records(study, vertebrae, resolution_mm):
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

    def __init__(self, records, length, shape, sigma_px, augment=True, seed=0):
        # As arrays: a tensor would take a file descriptor on its way to a worker process that is not forked.
        self.records = [{name: np.asarray(value) for name, value in record.items()} for record in records]
        self.length, self.shape = length, tuple(shape)
        self.sigma_px, self.augment, self.seed = sigma_px, augment, seed
        self.with_bodies = [k for k, record in enumerate(records) if len(record["corners_px"])]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        if self.augment:
            # Half of the slices pass beside the spine; a few of those teach what is no vertebra.
            choice = self.with_bodies if self.with_bodies and rng.random() < 0.8 else range(len(self.records))
            record = self.records[choice[int(rng.integers(len(choice)))]]
        else:
            record = self.records[index]
        record = {name: torch.from_numpy(value) for name, value in record.items()}
        image, corners_px = record["image"].float(), record["corners_px"]
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
        item = spinenet_targets(corners_px, record["classes"], record["certain"], self.shape, self.sigma_px)
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


# -- network and training


class _ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class SpineNet(nn.Module):
    """U-Net with a residual encoder for sagittal slices of a fixed pixel size.

    widths: channels at strides 2, 4, 8, ...; blocks: residual blocks a stride in the encoder; resolution_mm: the
    pixel size it is trained for. forward: (b, 1, h, w) -> (b, 13 + classes, h, w) of any h and w:
      0-4    logits of the corner and centroid heat maps, in the order of spinenet_targets
      5-12   vectors from the pixel to the centroid in pixels, (row, column) for each corner kind
      13-    logits of SPINE_CLASSES, to be read at centroids
    `about`: dict written as the weights' metadata; its "prior" is what fit_level_prior returns.

    Full resolution is only touched by folding 2 x 2 pixels into channels and back (Shi et al., CVPR 2016): half the
    rows and columns carry the same information at a quarter of the work.
    """

    def __init__(self, widths=(32, 48, 64, 96), blocks=1, resolution_mm=2.0):
        super().__init__()
        self.architecture = {"widths": list(widths), "blocks": blocks, "resolution_mm": float(resolution_mm)}
        self.resolution_mm = float(resolution_mm)
        self.about = {}
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.encoder, self.lateral, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for number, width in enumerate(widths):
            before = widths[max(number - 1, 0)]
            self.encoder.append(
                nn.Sequential(
                    _ResidualBlock(before, width, 2 if number else 1),
                    *[_ResidualBlock(width, width) for _ in range(blocks - 1)],
                )
            )
            if number:
                self.lateral.append(nn.Conv2d(width, before, 1))
                self.decoder.append(_ResidualBlock(2 * before, before))
        self.head = nn.Sequential(nn.Conv2d(widths[0], 4 * (13 + len(SPINE_CLASSES)), 1), nn.PixelShuffle(2))
        self.stride = 2 ** len(widths)
        # Heat maps are nearly everywhere 0: starting there saves the steps that would only learn it.
        with torch.no_grad():
            self.head[0].bias[:20] = -4.0

    def forward(self, x):
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        x = self.stem(x)
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        for skip, lateral, block in zip(skips[-2::-1], reversed(self.lateral), reversed(self.decoder)):
            x = F.interpolate(lateral(x), scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        x = self.head(x)[:, :, :height, :width]
        # Bodies are some 30 mm high: in units of 16 mm the vectors are of order 1, as the rest.
        vectors = x[:, 5:13] * (16.0 / self.resolution_mm)
        return torch.cat([x[:, :5], vectors, x[:, 13:]], 1)


def spinenet_loss(output, targets, resolution_mm):
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


def save_spinenet(model, path):
    """Write the weights as safetensors; architecture and `about` (prior, training) as JSON in its metadata."""
    about = {"architecture": model.architecture, "classes": list(SPINE_CLASSES), "about": model.about}
    write_tensors(path, model.state_dict(), "spinenet", about)


def load_spinenet(path, device="cpu"):
    """Read what save_spinenet wrote: the model in eval mode on `device`.

    Raises FileNotFoundError, or DamagedFile (a ValueError) for a file with other contents: numbers out of range, a
    network that its tensors do not fit, values that are not finite.
    """
    remedy = "give the file that 02_train_spinenet wrote (attach its output, or correct WEIGHTS)"
    state, about = read_weights(path, "spinenet", remedy, "SpineNet's")
    stated = Stated(path, about, remedy)
    if about.get("classes") != list(SPINE_CLASSES):
        stated.refuse("classes", f"{list(SPINE_CLASSES)} for this version of the kit; train again")
    architecture = stated.part("architecture")
    architecture.keys(("widths", "blocks", "resolution_mm"))
    widths = architecture.about.get("widths")
    if not isinstance(widths, list) or not 1 <= len(widths) <= 8:
        architecture.refuse("widths", "a list of one to eight numbers")
    architecture.numbers("widths", (len(widths),), 1, 4096, whole=True)
    architecture.number("blocks", 1, 32, whole=True)
    architecture.number("resolution_mm", 0.1, 20)
    _check_layouts(stated.part("about"))
    check_network(path, lambda: SpineNet(**architecture.about), state, remedy)
    model = SpineNet(**architecture.about)
    model.load_state_dict(state)
    model.about = about["about"]
    return model.to(device, memory_format=torch.channels_last).eval()


def _check_layouts(stated):
    """Refuse a prior or layout (of fit_level_prior) that would place levels by something other than millimetres."""
    for layout in (stated.part(name, optional=True) for name in ("prior", "layout")):
        if layout is None:
            continue
        layout.numbers("axial_mm", (3,), -2000, 2000)
        corners, widths = layout.part("layout_mm"), layout.part("width_mm")
        for part in (corners, widths):
            part.keys(VERTEBRAE)
        for name in {*_LUMBAR, *corners.about}:
            corners.numbers(name, (4, 3), -2000, 2000)
            widths.number(name, 0, 500)


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
    records,
    folder,
    *,
    start=None,
    validation=(),
    widths=(32, 48, 64, 96),
    blocks=1,
    resolution_mm=2.0,
    steps=400,
    batch_size=8,
    crop_px=(128, 96),
    learning_rate=3e-3,
    sigma_mm=3.0,
    device="cpu",
    workers=0,
    seed=0,
    save_every_s=30.0,
):
    """Train a SpineNet. Returns (model in eval mode, history: DataFrame step, loss, heat, vectors, appearance, split).

    records: from spinenet_records at the same resolution, or a data set of steps * batch_size items, as
    training_slices makes it; start: SpineNet whose weights are trained further, its widths, blocks and resolution
    count then; validation: from spinenet_records, or a data set of items; folder: gets spinenet_training.safetensors
    every save_every_s seconds, from which a killed run continues to the same weights as an uninterrupted one; steps:
    of the optimiser; crop_px: (rows, columns); sigma_mm: of the corners' Gaussians.
    Raises ValueError without records or with a data set of another length, RuntimeError when the loss stops being a
    number.
    """
    ready = isinstance(records, torch.utils.data.Dataset)
    if ready and len(records) != steps * batch_size:
        raise ValueError(f"the data set has {len(records)} items, {steps} steps of {batch_size} need their product")
    if not ready and not any(len(record["corners_px"]) for record in records):
        raise ValueError("no training image shows a vertebra: are vertebra table and volumes of the same studies?")
    if start is not None:
        widths, blocks, resolution_mm = (start.architecture[k] for k in ("widths", "blocks", "resolution_mm"))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = SpineNet(widths, blocks, resolution_mm).to(device, memory_format=torch.channels_last)
    if start is not None:
        model.load_state_dict(start.state_dict())
        model.about = dict(start.about)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    sigma_px = sigma_mm / resolution_mm
    state = folder / "spinenet_training.safetensors"
    first, history = _load_training(state, model, optimizer)
    dataset = records if ready else SpineSlices(records, steps * batch_size, crop_px, sigma_px, seed=seed)
    rest = torch.utils.data.Subset(dataset, range(first * batch_size, len(dataset)))
    loader = torch.utils.data.DataLoader(rest, batch_size, num_workers=workers, pin_memory=str(device) != "cpu")
    held_out = validation
    if not isinstance(validation, torch.utils.data.Dataset):
        # At most 64 images, spread evenly over the studies: enough to see overfitting, and quick.
        chosen = [validation[i] for i in np.linspace(0, len(validation) - 1, min(len(validation), 64)).astype(int)]
        held_out = SpineSlices(chosen, len(chosen), crop_px, sigma_px, augment=False)
    validate_at = {round(steps * k / 8) for k in range(1, 9)}
    saved = time.monotonic()
    bar = progress(loader, "training SpineNet", max(steps - first, 0))
    for step, batch in enumerate(bar, first):
        for group in optimizer.param_groups:
            group["lr"] = _one_cycle(step, steps, learning_rate)
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
        history.append({"step": step + 1, "loss": float(loss.detach()), **parts, "split": "train"})
        if step + 1 in validate_at and len(held_out):
            history.append(
                {"step": step + 1, **_validate_spinenet(model, held_out, resolution_mm, device), "split": "validation"}
            )
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
        if time.monotonic() - saved > save_every_s or step + 1 == steps:
            _save_training(state, model, optimizer, step + 1, history)
            saved = time.monotonic()
    return model.eval(), pd.DataFrame(history)


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


# -- from maps to vertebrae


@torch.no_grad()
def spinenet_maps(model, images, batch_size=8):
    """Run the network on images (n, 1, h, w). Returns (n, 13 + classes, h, w) float32 on the CPU; heat maps are
    probabilities."""
    device = next(model.parameters()).device
    maps = []
    for start in range(0, len(images), batch_size):
        images_now = images[start : start + batch_size].to(device).contiguous(memory_format=torch.channels_last)
        output = model(images_now).float()
        output[:, :5] = output[:, :5].sigmoid()
        maps.append(output.cpu())
    return torch.cat(maps)


_WINDOWS = 1 << 15  # surroundings of pixels that are looked at together


def _highest(where, values, most):
    """Of the peaks (p, 4) of each map and kind the `most` highest, in the same order."""
    group = where[:, 0] * values.shape[1] + where[:, 1]
    if not len(where) or np.bincount(group).max() <= most:
        return where
    order = np.lexsort((-values[tuple(where.T)], group))
    rank = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return where[np.sort(order[rank < most])]


def _peaks(heat, radius_px, threshold, most):
    """Local maxima of maps (n, k, h, w), of each map the `most` highest: array (p, 4) of map, kind, row, column, and
    their (p, 3) value and sub-pixel (row, column) from the parabola through the logarithms, which is exact for a
    Gaussian."""
    values = heat.numpy()
    where = np.argwhere(values > threshold)
    # Few pixels pass the threshold: looking around each is much quicker than a maximum filter over the maps. Where
    # many do (noise), they go through in parts.
    around = np.arange(-radius_px, radius_px + 1)
    padded = np.pad(values, ((0, 0), (0, 0), (radius_px, radius_px), (radius_px, radius_px)))
    peaks = []
    for part in np.array_split(where, range(_WINDOWS, len(where), _WINDOWS)):
        number, kind, row, column = (index[:, None, None] for index in part.T)
        window = padded[number, kind, row + radius_px + around[:, None], column + radius_px + around]
        peaks.append(part[values[tuple(part.T)] >= window.max((1, 2))])
    where = _highest(np.concatenate(peaks), values, most)
    position = where[:, 2:].astype(np.float64)
    for axis in (2, 3):
        last = heat.shape[axis] - 1
        before, after = where.copy(), where.copy()
        before[:, axis] = np.maximum(where[:, axis] - 1, 0)
        after[:, axis] = np.minimum(where[:, axis] + 1, last)
        low, middle, high = (np.log(np.maximum(values[tuple(w.T)], 1e-6)) for w in (before, where, after))
        curve = low - 2 * middle + high
        shift = np.where(curve < -1e-6, 0.5 * (low - high) / np.minimum(curve, -1e-6), 0.0)
        position[:, axis - 2] += np.clip(shift, -0.5, 0.5)
    return where, np.column_stack([values[tuple(where.T)], position])


def decode_slices(maps, resolution_mm, center_threshold=0.3, corner_threshold=0.1, reach_mm=12.0):
    """Vertebrae in each slice, from the network's maps (n, 13 + classes, h, w).

    Each peak of the centroid map takes of every corner kind the one whose position, displaced by its vector, comes
    nearest, if within reach_mm. One missing corner is completed to a parallelogram, with two missing it is dropped.
    (The paper takes one peak per thresholded component; local maxima also part bodies whose blobs touch.) Of more than
    MAX_BODIES in a slice the highest peaks count.
    Returns a list of n lists of dicts: corners_px (4, 2) as (row, column), score 0..1, logits (classes,).
    """
    slices = [[] for _ in range(len(maps))]
    centers, center_values = _peaks(maps[:, 4:5], max(int(round(8 / resolution_mm)), 1), center_threshold, MAX_BODIES)
    corners, corner_values = _peaks(
        maps[:, :4], max(int(round(5 / resolution_mm)), 1), corner_threshold, 2 * MAX_BODIES
    )
    array = maps.numpy()
    number, kind, row, column = corners.T
    displaced = np.stack(
        [row + array[number, 5 + 2 * kind, row, column], column + array[number, 6 + 2 * kind, row, column]], 1
    )
    for (index, _, row, column), (score, *center_px) in zip(centers, center_values):
        corners_px, heights = np.full((4, 2), np.nan), np.zeros(4)
        for which in range(4):
            candidates = np.flatnonzero((number == index) & (kind == which))
            if not len(candidates):
                continue
            distance = np.linalg.norm(displaced[candidates] - center_px, axis=1) * resolution_mm
            if distance.min() < reach_mm:
                best = candidates[distance.argmin()]
                corners_px[which], heights[which] = corner_values[best, 1:], corner_values[best, 0]
        missing = np.flatnonzero(np.isnan(corners_px[:, 0]))
        if len(missing) > 1:
            continue
        if len(missing):
            a = missing[0]
            corners_px[a] = corners_px[(a + 1) % 4] + corners_px[(a - 1) % 4] - corners_px[(a + 2) % 4]
        slices[index].append(
            {
                "corners_px": corners_px,
                "score": float(score * heights.mean()) ** 0.5,
                "logits": array[index, 13:, row, column],
            }
        )
    return slices


def _clip_polygon(polygon, edge_from, edge_to):
    """The part of a polygon [(row, column), ...] on the inner side of a line (Sutherland and Hodgman, 1974)."""
    normal = (edge_from[1] - edge_to[1], edge_to[0] - edge_from[0])
    side = [normal[0] * (p[0] - edge_from[0]) + normal[1] * (p[1] - edge_from[1]) for p in polygon]
    kept = []
    for k in range(len(polygon)):
        p, q, a, b = polygon[k - 1], polygon[k], side[k - 1], side[k]
        if (a < 0) != (b < 0):
            t = a / (a - b)
            kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        if b >= 0:
            kept.append(q)
    return kept


def _signed_area(polygon):
    return 0.5 * sum(polygon[k - 1][0] * polygon[k][1] - polygon[k][0] * polygon[k - 1][1] for k in range(len(polygon)))


def polygon_iou(first, second):
    """Intersection over union of two convex polygons (k, 2), in either sense of rotation."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    if (first.max(0) <= second.min(0)).any() or (second.max(0) <= first.min(0)).any():
        return 0.0
    first, second = [tuple(p) for p in first.tolist()], [tuple(p) for p in second.tolist()]
    if _signed_area(second) < 0:
        second = second[::-1]
    common = first
    for k in range(len(second)):
        common = _clip_polygon(common, second[k - 1], second[k])
        if len(common) < 3:
            return 0.0
    shared = abs(_signed_area(common))
    union = abs(_signed_area(first)) + abs(_signed_area(second)) - shared
    return shared / union if union > 0 else 0.0


def link_slices(slices, min_iou=0.2, gap=1):
    """Join the detections of neighbouring slices that overlap into vertebrae.

    slices: from decode_slices; gap: slices in which a vertebra may be missed. A detection joins the vertebra whose
    last polygon it overlaps most. Returns a list of lists of (slice index, detection).
    """
    tracks, recent = [], []
    for index, detections in enumerate(slices):
        check_limit()
        recent = [number for number in recent if index - tracks[number][-1][0] <= gap + 1]
        last = _polygons([tracks[number][-1][1] for number in recent])
        now = _polygons(detections)
        apart = (last.max(1)[:, None] <= now.min(1)).any(2) | (now.max(1) <= last.min(1)[:, None]).any(2)
        pairs = []
        for k, which in np.argwhere(~apart).tolist():
            iou = polygon_iou(last[k], now[which])
            if iou > min_iou:
                pairs.append((iou, recent[k], which))
        used_tracks, used = set(), set()
        for _, number, which in sorted(pairs, reverse=True):
            if number not in used_tracks and which not in used:
                tracks[number].append((index, detections[which]))
                used_tracks.add(number)
                used.add(which)
        new = [[(index, detection)] for which, detection in enumerate(detections) if which not in used]
        recent += range(len(tracks), len(tracks) + len(new))
        tracks += new
    return tracks


def _polygons(detections):
    """(n, 4, 2) corners of a list of detections."""
    return np.array([detection["corners_px"] for detection in detections], np.float64).reshape(-1, 4, 2)


# What detection takes on, whatever a volume states. Real series are far below: 25 slices of 300 mm, up to 250 of a
# 3D sequence; a composed image of a whole spine is some 900 mm long.
MAX_FIELD_MM = 1000.0  # of a slice, along its rows or columns
MAX_SEARCHED_SLICES = 256
MAX_SEARCHED_PX = 1 << 23  # of a study, resampled: about 25 s of one core
MAX_BODIES = 64  # a slice or a chain; a whole spine with its sacrum has 29
_BATCH_PX = 1 << 19  # that go through the network together: 8 slices of 500 mm


def searched_px(volume, resolution_mm):
    """Pixels of one slice of a sagittal volume once it is resampled.

    Raises ValueError where the slice would be larger than MAX_FIELD_MM: no spine is, and its pixel size must be wrong.
    """
    array, affine = upright(volume)
    sides_mm = np.array(array.shape[1:]) * np.linalg.norm(affine[:3, 1:3], axis=0)
    if not (sides_mm <= MAX_FIELD_MM).all():
        high, wide = sides_mm
        raise ValueError(f"slices of {high:.0f} x {wide:.0f} mm: larger than any image of a spine, {MAX_FIELD_MM:g} mm")
    return math.prod(_resampled_px(array.shape, affine, resolution_mm))


def every_nth_slice(volume, step):
    """The volume with every step-th of its slices, the first included."""
    if step == 1:
        return volume
    affine = volume.affine.copy()
    affine[:3, 0] *= step
    numbers = volume.instance_numbers[::step]
    return replace(volume, array=volume.array[::step], affine=affine, instance_numbers=numbers)


def detect_vertebrae(model, volume, batch_size=8):
    """Find the vertebral bodies of one sagittal volume.

    model: SpineNet in eval mode; volume: normalised. Returns Vertebrae without names, from head to foot; source is
    t2 or t1. A body seen in one slice only is dropped, unless the volume has no more than two; one that the image's
    border cuts has half the confidence.
    Time and memory are bounded: of more than MAX_SEARCHED_SLICES slices, or MAX_SEARCHED_PX resampled pixels, every
    second one is searched, or every third, ...; of more than MAX_BODIES bodies the surest are returned.
    Raises ValueError for a volume that is not sagittal or has slices larger than MAX_FIELD_MM, and TookTooLong (see
    check_limit).
    """
    slice_px, count = searched_px(volume, model.resolution_mm), len(volume.array)
    volume = every_nth_slice(volume, math.ceil(max(count / MAX_SEARCHED_SLICES, count * slice_px / MAX_SEARCHED_PX, 1)))
    images, affine = sagittal_images(volume, model.resolution_mm)
    batch_size = max(1, min(batch_size, _BATCH_PX // slice_px))
    slices = []
    for start in range(0, len(images), batch_size):
        check_limit()
        maps = spinenet_maps(model, images[start : start + batch_size], batch_size)
        slices += decode_slices(maps, model.resolution_mm)
    tracks = link_slices(slices)
    source = "t1" if volume.description == "Sagittal T1" else "t2"
    step_mm = volume.spacing_mm[0]
    vertebrae = []
    for track in tracks:
        # Beside a body the chain of overlaps may run on along a rib, a pedicle or the sacrum's wing, less surely.
        highest = max(detection["score"] for _, detection in track)
        track = [item for item in track if item[1]["score"] > 0.6 * highest]
        if len(track) < min(2, (len(images) + 1) // 2):
            continue
        index = np.array([i for i, _ in track], float)
        score = np.array([d["score"] for _, d in track])
        corners_px = np.array([d["corners_px"] for _, d in track]).reshape(len(track), 8)
        # Slices through the middle count more: towards its sides a body is shallower.
        span = index - (index[0] + index[-1]) / 2
        weight = score * (1 - 0.8 * (2 * span / (index[-1] - index[0] + 1)) ** 2)
        middle = np.average(index, weights=weight)
        rows_columns = np.average(corners_px, axis=0, weights=weight).reshape(4, 2)
        ijk = np.column_stack([np.full(4, middle), rows_columns])
        logits = np.array([d["logits"] for _, d in track], np.float64)
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        log_p = np.average(log_p, axis=0, weights=weight)
        best = np.sort(score)[::-1][:5]
        # A body that the image's border cuts has corners that nobody saw: its shape and its centre count less.
        last = np.array(images.shape[2:]) - 1
        cut = ((rows_columns < 1) | (rows_columns > last - 1)).any()
        vertebrae.append(
            Vertebra(
                ijk @ affine[:3, :3].T + affine[:3, 3],
                float((index[-1] - index[0] + 1) * step_mm),
                float(best.mean() * min(1.0, len(track) * step_mm / 25.0) * (0.5 if cut else 1.0)),
                source=source,
                appearance=log_p - np.log(np.exp(log_p).sum()),
            )
        )
    return sorted(surest(vertebrae), key=lambda v: -v.center_lps_mm[2])


def surest(vertebrae):
    """At most MAX_BODIES of the Vertebrae, those of the highest confidence, in the same order."""
    if len(vertebrae) <= MAX_BODIES:
        return list(vertebrae)
    ranked = sorted(range(len(vertebrae)), key=lambda k: -vertebrae[k].confidence)
    return [vertebrae[k] for k in sorted(ranked[:MAX_BODIES])]


# -- pictures


def plot_spinenet_target(ax, item):
    """Draw an item of SpineSlices: the crop, corners as dots, their vectors as lines to the centroid. Returns ax."""
    ax.imshow(item["image"][0].numpy(), cmap="gray", vmin=0, vmax=1)
    colors = ("tab:red", "tab:green", "tab:blue", "tab:orange")
    for kind, row, column in torch.nonzero(item["near"]).tolist():
        heat = item["heat"][kind]
        around = heat[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        if heat[row, column] == around.max():
            d_row, d_column = item["vectors"][2 * kind : 2 * kind + 2, row, column].tolist()
            ax.plot([column, column + d_column], [row, row + d_row], "-", color=colors[kind], linewidth=0.7)
            ax.plot(column, row, ".", color=colors[kind], markersize=4)
    ax.set_axis_off()
    return ax


def plot_spinenet_history(ax, history):
    """Draw a training curve (history of train_spinenet): the loss smoothed, the validation's points. Returns ax."""
    train, validation = (history[history["split"] == split] for split in ("train", "validation"))
    ax.plot(train["step"], train["loss"], color="tab:blue", alpha=0.2)
    ax.plot(
        train["step"],
        train["loss"].rolling(max(len(train) // 20, 1), min_periods=1).mean(),
        color="tab:blue",
        label="training (augmented)",
    )
    if len(validation):
        ax.plot(validation["step"], validation["loss"], "o-", color="tab:orange", label="validation")
    ax.set(xlabel="step", ylabel="loss", yscale="log")
    ax.legend(frameon=False)
    return ax
