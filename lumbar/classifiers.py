"""The 3D classifiers: backbones, cumulative logits, crops and their views, training."""

import contextlib
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from .distributed import all_sum, launch, processes_for, rank, world
from .files import class_prior, score_arrays
from .geometry import boxes_from_table, crop_level, crop_study, study_box
from .names import (
    CONDITIONS,
    DESCRIPTIONS,
    GROUPS,
    LABEL_COLUMNS,
    LEVELS,
    MIRRORED_CONDITIONS,
    SEVERITIES,
    SEVERITY_WEIGHTS,
    device_for,
    progress,
)
from .storage import read_checkpoint, read_json, write_csv, write_json, write_tensors, write_whole
from .views import TTA_VIEWS, choose_views, cross_fitted_views, deal_parts
from .volume import load_study
from .weights import Stated, check_network, read_weights


def cumulative_log_probabilities(score, cutpoints):
    """Log probabilities of ordered classes from one logit each, all heads at once.

    score: (...,) float; cutpoints: (..., K - 1) ascending, broadcast against score. Returns (..., K) float32 log p.
    P(y <= k) = sigmoid(cutpoint_k - score) (McCullagh 1980; spacecutter's LogisticCumulativeLink). In log space,
    with log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a)) for a > b: finite, with
    a gradient, for scores at which differences of sigmoids round to 0.
    """
    below = cutpoints.float() - score.float()[..., None]
    first = F.logsigmoid(below[..., :1])
    last = F.logsigmoid(-below[..., -1:])
    gap = (below[..., 1:] - below[..., :-1]).clamp(min=1e-6)
    middle = F.logsigmoid(below[..., 1:]) + F.logsigmoid(-below[..., :-1]) + torch.log(-torch.expm1(-gap))
    return torch.cat([first, middle, last], -1)


def weighted_losses(log_probabilities, grades, share=None):
    """(sum of w * nll, sum of w), scalar tensors float32: what losses over several batches are put together from.

    log_probabilities: (..., 3); grades: (...) int64, -1 = missing label, weighs nothing; share: broadcast against
    grades, multiplies the weights (of labels that stand for a part of a mixed input). The weights are the metric's, and
    so is the first sum over the second; over the number of graded entries it is spacecutter's CumulativeLinkLoss.
    """
    safe = grades.clamp(min=0)
    nll = -log_probabilities.gather(-1, safe[..., None])[..., 0]
    weight = torch.as_tensor(SEVERITY_WEIGHTS, dtype=nll.dtype, device=nll.device)[safe] * (grades >= 0)
    if share is not None:
        weight = weight * share
    return (weight * nll).sum(), weight.sum()


class CumulativeHeads(nn.Module):
    """Cut points of many ordinal heads, kept ascending by construction.

    shape: of the heads; each has K - 1 = 2 cut points, the second at `margin` or more above the first (what
    spacecutter's AscensionCallback enforces after each step holds here by a softplus). prior: (*shape, 3)
    probabilities that a score of 0 shall give: training starts from the class prior.
    """

    def __init__(self, prior, margin=0.15):
        super().__init__()
        prior = torch.as_tensor(np.asarray(prior), dtype=torch.float64)
        cumulative = prior.cumsum(-1)[..., :-1].clamp(1e-4, 1 - 1e-4)
        cut = torch.logit(cumulative)
        gap = (cut[..., 1] - cut[..., 0] - margin).clamp(min=1e-3)
        self.margin = margin
        self.first = nn.Parameter(cut[..., 0].float())
        self.gap = nn.Parameter(torch.log(torch.expm1(gap)).float())

    @property
    def cutpoints(self):
        """(*shape, 2), ascending; spacecutter's `cutpoints` for each head."""
        return torch.stack([self.first, self.first + self.margin + F.softplus(self.gap)], -1)


# The demo's backbones, small enough for minutes on a CPU: a CoAtNet of three stages for crops, and one of two stages
# for whole studies, whose smaller stride still tells neighbouring levels apart.
SMALL_BACKBONES = {
    "tiny": dict(embed_dim=(24, 48, 96), depths=(1, 1, 1), block_type=("C", "C", "T"), stem_width=(12, 24)),
    "tiny_stride8": dict(embed_dim=(24, 64), depths=(1, 1), block_type=("C", "T"), stem_width=(12, 24)),
}


def backbone_config(name, img_size):
    """timm_3d's configuration of a MaxxVit.

    name: a key of SMALL_BACKBONES or of timm_3d's MaxxVit configurations (coatnet_rmlp_3_rw, maxvit_rmlp_tiny_rw, ...);
    img_size: (d, h, w), each divisible by the stride (32; `tiny`: 16, `tiny_stride8`: 8). Raises ValueError otherwise.
    """
    with warnings.catch_warnings():
        # timm_3d decorates with torch.jit.script, which newer versions of torch announce to leave.
        warnings.simplefilter("ignore", FutureWarning)
        from timm_3d.models import maxxvit

    if name in SMALL_BACKBONES:
        config = maxxvit.MaxxVitCfg(
            **SMALL_BACKBONES[name],
            conv_cfg=maxxvit.MaxxVitConvCfg(stride_mode="pool"),
            transformer_cfg=maxxvit.MaxxVitTransformerCfg(rel_pos_type="bias"),
        )
    else:
        known = {key.removesuffix("_256").removesuffix("_224"): value for key, value in maxxvit.model_cfgs.items()}
        if name not in known:
            names = ", ".join([*SMALL_BACKBONES, *sorted(known)])
            raise ValueError(f"unknown backbone, BACKBONE {name!r}; there are {names}")
        config = known[name]
    stride = 2 ** (1 + len(config.embed_dim))
    if len(img_size) != 3 or any(n < stride or n % stride for n in img_size):
        raise ValueError(
            f"backbone {name} needs a SHAPE of three sizes, each divisible by {stride}, not {list(img_size)}"
        )
    return config


def make_backbone(name, img_size):
    """A timm_3d MaxxVit without its head: (B, 3, d, h, w) -> (B, features, d', h', w'). Arguments and errors are those
    of backbone_config."""
    config = backbone_config(name, img_size)
    from timm_3d.models.maxxvit import MaxxVit

    # The pretrained weights are for 2D images and another number of channels; and nothing is downloaded.
    net = MaxxVit(config, img_size=tuple(img_size), in_chans=len(DESCRIPTIONS), num_classes=0, global_pool="")
    # Some have a hidden layer there, which is not used and for whose gradients several GPUs would wait.
    net.head.requires_grad_(False)
    return net


class LevelAttention(nn.Module):
    """Five weighted means along the head-foot axis, one a level: where to look is part position, part content.

    centers: (5,) where the levels lie on average, as fractions of the grid from its upper end: the start of the
    position's part, a Gaussian of about half the distance between levels.
    """

    def __init__(self, channels, length, centers):
        super().__init__()
        place = (torch.arange(length) + 0.5) / length
        distance = place[None] - torch.as_tensor(centers, dtype=torch.float32)[:, None]
        self.position = nn.Parameter(-0.5 * (distance / 0.08) ** 2)
        self.content = nn.Conv1d(channels, len(LEVELS), 1)
        nn.init.zeros_(self.content.weight)
        nn.init.zeros_(self.content.bias)

    def forward(self, x):
        """x: (B, channels, length) -> (B, 5, channels)."""
        weight = F.softmax(self.position + self.content(x), -1)
        return weight @ x.transpose(1, 2)


# Discs from L1/2 to L5/S1 in a grid of some 25 cm around the lumbar spine, as fractions from its upper end.
USUAL_LEVEL_CENTERS = (0.22, 0.37, 0.52, 0.66, 0.78)


class OrdinalClassifier(nn.Module):
    """A 3D backbone and cumulative-logit heads.

    scope `level`: 5 heads (conditions) on the crop of one level; scope `study`: the same 5 on each of five weighted
    means along the head-foot axis (LevelAttention), so that a level learns from all others. In both the cut points
    differ by level: a crop does not tell how common a grade is at its level.

    pooling `grid`: features are pooled to a coarse grid across the body and not to one vector: convolutions and
    relative attention alone hardly know left from right, and which side a narrowing is on is half of the question.
    `global` is the plain way, to compare with: one mean over the whole volume; for scope `level` 5 heads whose cut
    points all levels share, for scope `study` 25 outputs of the one vector, each with its own cut points.
    """

    def __init__(
        self,
        scope,
        backbone,
        img_size,
        prior,
        dropout=0.2,
        level_centers=USUAL_LEVEL_CENTERS,
        pooling="grid",
    ):
        super().__init__()
        if scope not in ("level", "study"):
            raise ValueError(f"SCOPE must be level or study, not {scope!r}")
        if pooling not in ("grid", "global"):
            raise ValueError(f"POOLING must be grid or global, not {pooling!r}")
        self.config = {
            "scope": scope,
            "backbone": backbone,
            "img_size": list(img_size),
            "prior": np.asarray(prior).tolist(),
            "dropout": dropout,
            "level_centers": list(level_centers),
            "pooling": pooling,
        }
        self.scope, self.pooling = scope, pooling
        self.recompute = False  # in training: a block's activations are not kept but computed again for its gradients
        self.backbone = make_backbone(backbone, img_size)
        channels, stride = self.backbone.num_features, 2 ** (1 + len(self.backbone.stages))
        outputs = len(CONDITIONS)
        if pooling == "global":
            self.pool, cells = (1, 1, 1), 1
            outputs *= len(LEVELS) if scope == "study" else 1
        elif scope == "level":
            self.pool, cells = (1, 2, 4), 8
        else:
            self.pool, cells = (img_size[0] // stride, 1, 4), 4
            self.attention = LevelAttention(channels * cells, self.pool[0], level_centers)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(channels * cells, outputs)
        nn.init.normal_(self.score.weight, std=0.03)  # a score near 0: about the prior
        nn.init.zeros_(self.score.bias)
        shared = pooling == "global" and scope == "level"
        self.heads = CumulativeHeads(np.mean(prior, 1) if shared else prior)

    def forward(self, x, level=None):
        """x: (B, 3, d, h, w) float; level: (B,) int64, index into LEVELS, for scope `level` only.

        Returns float32 log probabilities: (B, 5 conditions, 3), or (B, 5 conditions, 5 levels, 3) for `study`.
        level may be (B, m): the same scores seen as m levels each, -> (B, m, 5 conditions, 3).
        """
        features = self._features(x)
        # Under mixed precision only the backbone is: scores and cut points keep all their digits.
        with torch.autocast(x.device.type, enabled=False):
            features = F.adaptive_avg_pool3d(features.float(), self.pool)
            if self.scope == "study" and self.pooling == "grid":
                # (B, channels x right-left, head-foot) -> (B, 5 levels, channels x right-left)
                features = self.attention(features.transpose(2, 4).flatten(1, 3))
                score = self.score(self.dropout(features)).transpose(1, 2)
            else:
                score = self.score(self.dropout(features.flatten(1)))
            cutpoints = self.heads.cutpoints
            if self.scope == "study":
                return cumulative_log_probabilities(score.view(len(x), *cutpoints.shape[:2]), cutpoints)
            if level.ndim == 2:
                score = score[:, None].expand(-1, level.shape[1], -1)
            if self.pooling == "grid":
                cutpoints = cutpoints[:, level].movedim(0, -2)
            return cumulative_log_probabilities(score, cutpoints)

    def _features(self, x):
        if not (self.recompute and self.training):
            return self.backbone.forward_features(x)
        x = self.backbone.stem(x)
        for stage in self.backbone.stages:
            for block in stage.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.backbone.norm(x)


def save_classifier(path, model, about):
    """Write a classifier's state and everything needed to rebuild and feed it, as safetensors."""
    write_tensors(path, model.state_dict(), "classifier", {**model.config, **about})


# What to do about weights that cannot be used, after the file's name and what is wrong with it.
_REMEDY = "give a classifier's file as 04_train_vit wrote it (attach its output again, or train again)"


def load_classifier(path, device="cpu"):
    """(model in evaluation mode, about): what save_classifier wrote.

    Raises FileNotFoundError, or DamagedFile (a ValueError) for a file with other contents: numbers out of range, a
    network that its tensors do not fit, values that are not finite.
    """
    state, about = read_weights(path, "classifier", _REMEDY, "a classifier's")
    _check_classifier(Stated(path, about, _REMEDY))
    names = ("scope", "backbone", "img_size", "prior", "dropout", "level_centers")
    arguments = (*(about[name] for name in names), about.get("pooling", "grid"))
    check_network(path, lambda: OrdinalClassifier(*arguments), state, _REMEDY)
    model = OrdinalClassifier(*arguments)
    model.load_state_dict(state)
    return model.to(device).eval(), about


def _check_classifier(stated):
    """Refuse a file of which OrdinalClassifier, cut_crops or view_crops would make something else than was trained."""
    scope = stated.choice("scope", ("level", "study"))
    stated.choice("pooling", ("grid", "global"), optional=True)
    sizes = stated.numbers("img_size", (3,), 1, 512, whole=True)
    if math.prod(sizes) > 320**3:
        stated.refuse("img_size", "less than 320 x 320 x 320 voxels")
    try:
        backbone_config(stated.about.get("backbone"), sizes)
    except (ValueError, TypeError, AttributeError) as error:
        stated.refuse("backbone", f"one that this kit knows ({error})")
    stated.numbers("prior", (len(CONDITIONS), len(LEVELS), len(SEVERITIES)), 0, 1)
    stated.number("dropout", 0, 1)
    stated.numbers("level_centers", (len(LEVELS),), 0, 1)
    crop = stated.part("crop", optional=True)
    if crop is not None:
        crop.choice("scope", (scope,))
        crop.choice("shape", (sizes,))
        crop.numbers("extent_mm", (3,), 1, 2000)
        crop.numbers("shift_mm", (3,), -1000, 1000)
    for view in stated.parts("views", 100, optional=True):
        view.keys(("rotation_deg", "shift_mm", "scale", "mirror"))
        view.numbers("rotation_deg", (3,), -180, 180, optional=True)
        view.numbers("shift_mm", (3,), -100, 100, optional=True)
        view.number("scale", 0.2, 5, optional=True)
        view.choice("mirror", (True, False), optional=True)


def store_views(path, views):
    """Put the views that pay (of choose_views) into a weights file, as about["views"]."""
    state, about = read_weights(path, "classifier", _REMEDY, "a classifier's")
    changed = json.loads(json.dumps(about | {"views": views}))
    if changed != about:
        write_tensors(path, state, "classifier", changed)


CROP_MARGIN = 1.2  # crops are cut this much larger, so that shifts and rotations in training see real surroundings


def margin_shape(shape):
    """The (d, h, w) at which crops are cut: CROP_MARGIN larger, even."""
    return tuple(int(round(n * CROP_MARGIN / 2)) * 2 for n in shape)


def cut_crops(study, boxes, crop, device="cpu"):
    """A study's network inputs with margin: (5, 3, D, H, W) float16 for scope level, (1, 3, D, H, W) for study.

    boxes: the five LevelBoxes (scope level only); crop: dict scope, shape (d, h, w), extent_mm (head, left, back),
    shift_mm; device: where the sampling runs. The margin enlarges shape and extent alike, so voxels keep their size.
    """
    shape = margin_shape(crop["shape"])
    grown = np.asarray(shape) / np.asarray(crop["shape"])
    extent_mm = np.asarray(crop["extent_mm"]) * grown[[0, 2, 1]]
    if crop["scope"] == "study":
        return crop_study(study, shape, extent_mm, device)[0][None]
    return np.stack([crop_level(study, box, shape, extent_mm, crop["shift_mm"], device)[0] for box in boxes])


def level_centers(paths, levels_table, crop):
    """(5,) mean places of the levels in the whole-study grid, as fractions from its upper end. See LevelAttention.

    paths: dict study_id -> volumes; levels_table: levels.csv; crop: dict with extent_mm.
    """
    found = []
    for study_id, path in paths.items():
        center_lps, _ = study_box(load_study(path))
        z_mm = np.array([box.center_lps_mm[2] for box in boxes_from_table(levels_table, study_id)])
        found.append(0.5 - (z_mm - center_lps[2]) / crop["extent_mm"][0])
    return np.mean(found, 0).tolist()


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

    def __init__(self, paths, study_ids, grades, levels_table, crop, cache=None):
        self.paths, self.study_ids, self.grades = paths, list(study_ids), np.asarray(grades)
        self.levels_table, self.crop = levels_table, crop
        self.cache = Path(cache) if cache else None
        self.per_study = len(LEVELS) if crop["scope"] == "level" else 1

    def __len__(self):
        return len(self.study_ids) * self.per_study

    def crops_of(self, study_id, level=None):
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
        boxes = boxes_from_table(self.levels_table, study_id)[levels] if self.crop["scope"] == "level" else None
        return cut_crops(load_study(self.paths[study_id]), boxes, self.crop)

    def __getitem__(self, number):
        study, level = divmod(number, self.per_study)
        crop = torch.from_numpy(np.array(self.crops_of(self.study_ids[study], level)[0]))
        grades = self.grades[study, :, level] if self.per_study > 1 else self.grades[study]
        return crop, level, torch.from_numpy(np.ascontiguousarray(grades))

    def save(self, folder):
        """Describe the data set in a folder, for another process: data.json, grades.csv, levels.csv."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame(self.grades.reshape(len(self.grades), -1), columns=list(LABEL_COLUMNS))
        table.insert(0, "study_id", self.study_ids)
        write_csv(folder / "grades.csv", table)
        if self.levels_table is not None:
            write_csv(folder / "levels.csv", self.levels_table)
        paths = {str(s): str(Path(self.paths[s]).resolve()) for s in self.study_ids if s in self.paths}
        cache = str(self.cache.resolve()) if self.cache else None
        write_json(folder / "data.json", {"crop": self.crop, "paths": paths, "cache": cache})

    @classmethod
    def load(cls, folder):
        """The data set that `save` described."""
        folder = Path(folder)
        about = read_json(folder / "data.json")
        table = pd.read_csv(folder / "grades.csv")
        grades = table[list(LABEL_COLUMNS)].to_numpy(np.int64).reshape(-1, len(CONDITIONS), len(LEVELS))
        levels = folder / "levels.csv"
        levels_table = pd.read_csv(levels) if levels.is_file() else None
        paths = {int(study_id): path for study_id, path in about["paths"].items()}
        return cls(paths, table["study_id"].tolist(), grades, levels_table, about["crop"], about["cache"])


def view_crops(crops, crop, rotation_deg=None, shift_mm=None, scale=None, mirror=None):
    """Cut the network's input out of crops with margin, moved as asked: augmentation and TTA alike.

    crops: (B, 3, D, H, W) on any device; crop: dict as cut_crops takes it. rotation_deg: (B, 3) about the left,
    head and back axes; shift_mm: (B, 3) along the crop's axes (foot, back, left); scale: (B,), above 1 enlarges;
    mirror: (B,) bool, left and right change places (the caller swaps the labels, see mirror_conditions).
    Returns (B, 3, d, h, w) float32.
    """
    batch, device = len(crops), crops.device
    shape = crop["shape"]
    full = np.asarray(crops.shape[2:], np.float64)
    half_mm = torch.tensor(np.asarray(crop["extent_mm"])[[0, 2, 1]] * full / np.asarray(shape) / 2, dtype=torch.float32)
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
    matrix = matrix * (half_mm * torch.tensor(np.asarray(shape) / full, dtype=torch.float32)) / half_mm[:, None]
    if mirror is not None:
        matrix[:, 2] = torch.where(mirror[:, None], -matrix[:, 2], matrix[:, 2])
    offset = torch.zeros(batch, 3) if shift_mm is None else shift_mm.float() / half_mm
    theta = torch.cat([matrix, offset[..., None]], -1)
    theta = theta[:, [2, 1, 0]][:, :, [2, 1, 0, 3]].to(device)  # affine_grid wants x, y, z = the last axis first
    grid = F.affine_grid(theta, (batch, 3, *shape), align_corners=False)
    return F.grid_sample(crops.float(), grid, align_corners=False)


def mirror_conditions(array, mirror=None, axis=1):
    """Swap the left and the right conditions along `axis`, for the items where mirror (B,) is true (or all).

    array: numpy or torch, batch first. The inverse of itself.
    """
    index = [slice(None)] * array.ndim
    index[axis] = list(MIRRORED_CONDITIONS)
    swapped = array[tuple(index)]
    if mirror is None:
        return swapped
    where = mirror.reshape(-1, *[1] * (array.ndim - 1))
    return torch.where(where, swapped, array) if torch.is_tensor(array) else np.where(where, swapped, array)


def augment_crops(crops, grades, crop, generator, strength=1.0):
    """Random views for training: stage-1 jitter (shift, rotation, scale), mirroring with labels, contrast, noise.

    crops: (B, 3, D, H, W); grades: (B, 5, ...). Returns (inputs (B, 3, d, h, w) float32, grades).
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


def expand_view(view, batch):
    """A view's plain numbers -> the per-item tensors that view_crops takes."""
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


@torch.no_grad()
def predict_views(models, crops, crop, levels=None, views=({},), batch=16):
    """Log probabilities of each view, the mean over models: (views, N, 5, [5,] 3) float64, left and right in place.

    models: OrdinalClassifiers; crops: (N, 3, D, H, W) with margin; levels: (N,) for scope `level`; views: dicts of
    view_crops' arguments as plain numbers, see TTA_VIEWS. A mean of several models is not normalised.
    """
    results = []
    device = next(models[0].parameters()).device
    for start in range(0, len(crops), batch):
        part = torch.from_numpy(np.array(crops[start : start + batch])).to(device)
        level = None if levels is None else torch.as_tensor(levels[start : start + batch], device=device)
        means = []
        for view in views:
            inputs = view_crops(part, crop, **expand_view(view, len(part)))
            total = sum(_log_p(model, inputs, level).double() for model in models) / len(models)
            means.append((mirror_conditions(total) if view.get("mirror") else total).cpu())
        results.append(torch.stack(means))
    return torch.cat(results, 1).numpy()


def _log_p(model, inputs, level):
    """A model's log probabilities, on a GPU in half precision; in full where that overflows."""
    arguments = (inputs, level) if model.scope == "level" else (inputs,)
    half = inputs.device.type == "cuda"
    with torch.autocast(inputs.device.type, enabled=half):
        log_p = model(*arguments)
    return model(*arguments) if half and not torch.isfinite(log_p).all() else log_p


def predict_crops(models, crops, crop, levels=None, views=({},), batch=16):
    """Mean log probabilities of models over views, renormalised: (N, 5, [5,] 3) float64 probabilities.

    The arguments are predict_views'.
    """
    return _softmax(predict_views(models, crops, crop, levels, views, batch).mean(0))


def _softmax(logits):
    return F.softmax(torch.from_numpy(logits), -1).numpy()


def crops_to_studies(predicted, scope):
    """predict_crops' output -> (n studies, 5 conditions, 5 levels, 3)."""
    if scope == "study":
        return predicted
    return predicted.reshape(-1, len(LEVELS), len(CONDITIONS), len(SEVERITIES)).transpose(0, 2, 1, 3)


class _Studies(torch.utils.data.Dataset):
    """All crops of a study as one item, for those of a CropDataset's studies with these numbers."""

    def __init__(self, dataset, numbers):
        self.dataset, self.numbers = dataset, [int(number) for number in numbers]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, place):
        return torch.from_numpy(np.array(self.dataset.crops_of(self.dataset.study_ids[self.numbers[place]])))


def measure_views(models, dataset, views=TTA_VIEWS, numbers=None, workers=0):
    """Log probabilities of each view for a CropDataset: (views, n studies, 5, 5, 3), as choose_views takes them.

    A study at a time, so that memory stays small; its crops are cut once for all views, by `workers` other processes
    while the models see the studies before (0: by this one), which does not change the result. numbers: which studies,
    by their place in dataset.study_ids (all, if None); the rows of the others are 0.
    """
    result = np.zeros((len(views), len(dataset.study_ids), len(CONDITIONS), len(LEVELS), len(SEVERITIES)))
    numbers = range(len(dataset.study_ids)) if numbers is None else numbers
    loader = torch.utils.data.DataLoader(
        _Studies(dataset, numbers),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=1 if workers else None,  # a whole study of full size has 175 MB
        generator=torch.Generator(),  # the caller's random numbers stay as they are
    )
    for number, crops in zip(numbers, loader, strict=True):
        levels = np.arange(len(crops)) if dataset.per_study > 1 else None
        for view, log_p in enumerate(predict_views(models, crops.numpy(), dataset.crop, levels, views)):
            result[view, number] = crops_to_studies(log_p, dataset.crop["scope"])[0]
    return result


def predict_dataset(models, dataset, views=({},), numbers=None, workers=0):
    """(n studies, 5, 5, 3) probabilities for a CropDataset; rows of studies not among `numbers` are uniform.

    The arguments are measure_views'.
    """
    return _softmax(measure_views(models, dataset, views, numbers, workers).mean(0))


def settle_views(out, held_out, device="auto", views=TTA_VIEWS, workers=0):
    """Choose the test-time views on held-out studies, store them in the weights, predict these studies.

    out: folder with <name>.safetensors; held_out: dict name -> CropDataset of the studies that these weights were not
    trained on; workers: processes that cut crops. What is stored is chosen on all of the studies together, see
    choose_views. The predictions are cross-fitted: each fifth of the studies is predicted with the views that pay on
    the other four fifths, see cross_fitted_views. Returns (dict name -> (n, 5, 5, 3) probabilities, choose_views'
    table). Done again after a kill it ends the same.
    """
    device, measured = device_for(device), []
    for name, dataset in progress(held_out.items(), desc="views"):
        model, _ = load_classifier(Path(out) / f"{name}.safetensors", device)
        measured.append(measure_views([model], dataset, views, workers=workers))
    grades, log_p = np.concatenate([dataset.grades for dataset in held_out.values()]), np.concatenate(measured, 1)
    chosen, table = choose_views(grades, log_p, views)
    for name in held_out:
        store_views(Path(out) / f"{name}.safetensors", chosen)
    used = cross_fitted_views(grades, log_p, views, deal_parts(np.ones(len(grades), bool)))
    share = (used / used.sum(1, keepdims=True)).T[..., None, None, None]
    ends = np.cumsum([len(dataset.study_ids) for dataset in held_out.values()])
    return dict(zip(held_out, np.split(_softmax((log_p * share).sum(0)), ends[:-1]), strict=True)), table


# ---- Training ----


def mix_crops(inputs, generator):
    """Mixup (Zhang et al. 2018): each input blended with its neighbour in the batch, at a random share above a half.

    inputs: (B, 3, d, h, w). Returns (inputs, partner (B,) int64, share (B,) float32 of the input's own part).
    The whole crop is blended and not a patch of it put elsewhere: a grade is read at one small place, and a patch
    that misses or hides it says nothing of how much of the label is left. The labels are not blended: between two
    grades lies a third one. The loss counts both sets, by their shares; a missing label takes nothing from the
    other set. The partner may be of another level: its labels then meet the same scores at their own level's cut
    points.
    """
    share = 0.5 + 0.5 * torch.rand(len(inputs), generator=generator)
    partner = torch.arange(len(inputs)).roll(1)
    part = share.to(inputs.device)[:, None, None, None, None]
    return inputs * part + inputs[partner.to(inputs.device)] * (1 - part), partner, share


def mixed_losses(model, inputs, level, grades, mixed=None):
    """weighted_losses of a batch, with both sets of labels where it was mixed.

    level, grades: of the B inputs, and of further items behind them that are partners only. mixed: (partner (B,), share
    (B,)) of mix_crops, or None.
    """
    own = len(inputs)
    if mixed is None:
        return weighted_losses(model(inputs, level[:own]), grades[:own])
    partner, share = (x.to(inputs.device) for x in mixed)
    log_p = model(inputs, torch.stack([level[:own], level[partner]], 1))  # (B, 2, 5, 3); (B, 5, 5, 3) for scope study
    if grades.ndim == 3:
        log_p = log_p[:, None].expand(-1, 2, -1, -1, -1)
    grades = torch.stack([grades[:own], grades[partner]], 1)
    share = torch.stack([share, 1 - share], 1)
    return weighted_losses(log_p, grades, share=share.view(*share.shape, *[1] * (grades.ndim - 2)))


def precision_for(name, device):
    """The number format of the backbone's activations: `auto`, float32, bfloat16 or float16 -> torch.dtype.

    auto is the GPU's own half precision (bfloat16 where it has it, else float16 with scaled losses), and float32 on a
    CPU: there bfloat16 saves little, and only with instructions that not every CPU has. Raises ValueError on another
    name and for float16 on a CPU.
    """
    gpu = torch.device(device).type == "cuda"
    if name == "auto":
        if not gpu:
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known or (name == "float16" and not gpu):
        raise ValueError(f"PRECISION must be auto, float32, bfloat16, or on a GPU float16, not {name!r}")
    return known[name]


def epoch_batches(count, batch, accumulate, processes, seed):
    """The items of one epoch in random order: (batches: list of lists of int, batches to a step).

    A step takes batch x accumulate items (all, if there are fewer; what is left of the epoch after the last whole
    step is dropped) in as many batches, or more and smaller ones, until they can be shared out evenly to the
    processes. So the items of a step never depend on the number of processes, and its batches do not where
    `accumulate` is a multiple of it. Raises ValueError on more processes than items.
    """
    size = min(batch * accumulate, count)
    parts = -(-size // batch)
    parts = -(-parts // processes) * processes
    if parts > size:
        raise ValueError(f"{size} items cannot be shared out to {processes} processes")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    steps = order[: count // size * size].view(-1, size)
    return [part.tolist() for step in steps for part in step.tensor_split(parts)], parts


def with_partners(batches, mixes):
    """The batches of an epoch, those of one item that are to be mixed with that of the next batch behind it.

    mixes: a bool for each batch. Which item it is depends on the whole epoch's order alone, and so not on who works on
    the batches.
    """
    nexts = [*batches[1:], batches[0]]
    return [
        [*batch, after[0]] if mix and len(batch) == 1 else batch
        for batch, after, mix in zip(batches, nexts, mixes, strict=True)
    ]


def _seed_of(*numbers):
    """One seed out of several numbers; similar numbers give unlike seeds."""
    # Their count goes in, too: SeedSequence takes (1, 2) and (1, 2, 0) for the same.
    words = [n % 2**32 for n in (len(numbers), *numbers)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])


def decayed_parameters(model):
    """(parameters of an OrdinalClassifier that weight decay pulls to 0, the others): weights, but not biases, nor the
    heads' cut points, which would drift from the classes' frequencies, nor where each level lies."""
    groups = ([], [])
    for name, parameter in model.named_parameters():
        plain = parameter.ndim <= 1 or name.startswith("heads.") or name.endswith("attention.position")
        groups[plain].append(parameter)
    return groups


class _StepNorms:
    """Running statistics of batch normalisation, once a step: the mean over the step's batches, of all processes.

    As they come they would weigh a step's last batch most, and each process would have its own.
    """

    def __init__(self, model):
        kinds = nn.modules.batchnorm._BatchNorm
        self.norms = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
        self.momentum = [norm.momentum for norm in self.norms]

    def _state(self):
        return [x for norm in self.norms for x in (norm.running_mean, norm.running_var)]

    def batch(self, number):
        """Before batch `number`, from 0, of this process' share of a step."""
        if number == 0:
            self.before = [x.clone() for x in self._state()]
            self.counts = [norm.num_batches_tracked.clone() for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 1 / (number + 1)  # so that they become the mean of the step's

    def hold(self):
        """Between a batch's forward and backward pass: blocks that are computed again must not count twice."""
        for norm in self.norms:
            norm.momentum = 0.0

    def end(self):
        """After the last batch of a step. What overflowed leaves no trace: it would never fade."""
        if not self.norms:
            return
        mean = all_sum(torch.cat(self._state())) / world()
        sizes = [len(x) for x in self.before]
        momenta = [m for m in self.momentum for _ in range(2)]
        for state, before, new, m in zip(self._state(), self.before, mean.split(sizes), momenta, strict=True):
            state.copy_(torch.where(torch.isfinite(new), before.lerp(new, m), before))
        for norm, momentum, count in zip(self.norms, self.momentum, self.counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count + 1)


class _Training:
    """A model in training, and everything that a checkpoint keeps of it.

    train: data set (its grades give the class prior); config: see train_classifier; seed: int; device: torch.device.
    """

    def __init__(self, train, config, seed, device):
        torch.manual_seed(seed)
        crop, self.config, self.device = train.crop, config, device
        centers = config.get("level_centers", USUAL_LEVEL_CENTERS)
        prior = class_prior(train.grades)
        self.model = OrdinalClassifier(
            crop["scope"],
            config["backbone"],
            crop["shape"],
            prior,
            config["dropout"],
            centers,
            config.get("pooling", "grid"),
        ).to(device)
        self.model.recompute = config.get("recompute", False)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config["ema"]), use_buffers=True
        )
        decayed, others = decayed_parameters(self.model)
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
            lr=config["learning_rate"],
        )
        step = config["batch"] * config.get("accumulate", 1)
        steps = max(1, len(train) // step) * config["epochs"]
        warm = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: min(1, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))
        )
        self.precision = precision_for(config.get("precision", "auto"), device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.norms = _StepNorms(self.model)
        # Gradients of a batch are kept of about the size of one cell's: float16 ends at 65,504.
        self.entries = config["batch"] * train.grades[0].size // train.per_study
        self.network = self.model
        if world() > 1:
            devices = [device.index] if device.type == "cuda" else None
            with warnings.catch_warnings():
                # Newer versions of torch have another name for this argument, older ones only this.
                warnings.simplefilter("ignore", FutureWarning)
                # Buffers are those of batch normalisation, which _StepNorms keeps alike.
                self.network = nn.parallel.DistributedDataParallel(self.model, devices, broadcast_buffers=False)

    PARTS = ("model", "average", "optimizer", "schedule", "scaler")

    def state(self):
        """What continues the training bit by bit, with the number of the epoch: random numbers start from seeds."""
        return {part: getattr(self, part).state_dict() for part in self.PARTS}

    def load_state(self, saved):
        for part in self.PARTS:
            getattr(self, part).load_state_dict(saved[part])

    def epoch(self, train, seed, workers):
        """One epoch over this process' share of the batches. Returns the mean loss of its steps, without those that
        overflowed (NaN, if all did).

        Random numbers come from a seed for each batch: they depend neither on workers or processes nor on where the
        training began.
        """
        config, count, device = self.config, world(), self.device
        batches, parts = epoch_batches(len(train), config["batch"], config.get("accumulate", 1), count, _seed_of(*seed))
        # There are as many for each process: nothing is added or dropped.
        mine = list(torch.utils.data.DistributedSampler(batches, count, rank(), shuffle=False))
        draws = (np.random.default_rng(_seed_of(*seed, number, 1)).random() for number in range(len(batches)))
        mixes = [draw < config.get("mix", 0.0) for draw in draws]
        loaded = with_partners(batches, mixes)
        loader = torch.utils.data.DataLoader(
            train,
            batch_sampler=[loaded[number] for number in mine],
            num_workers=workers,
            prefetch_factor=1 if workers and train.per_study == 1 else None,  # a whole study is 175 MB at full size
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),
        )
        self.model.train()
        parts //= count
        losses, sums = [], torch.zeros(2, device=device)
        for turn, (number, (crops, level, grades)) in enumerate(zip(mine, loader, strict=True)):
            last = turn % parts == parts - 1
            self.norms.batch(turn % parts)
            with contextlib.nullcontext() if last or count == 1 else self.network.no_sync():
                batch = (crops.to(device), level.to(device), grades.to(device))
                sums += self._batch(*batch, len(batches[number]), mixes[number], train.crop, (*seed, number))
            if last:
                losses.append(self._step(sums))
                sums = torch.zeros(2, device=device)
        losses = [loss for loss in losses if math.isfinite(loss)]
        return float(np.mean(losses)) if losses else math.nan

    def _batch(self, crops, level, grades, own, mix, crop, seed):
        """Augment a batch, mix it or not, and add the gradients of its first `own` items. Returns (2,): their
        weighted_losses."""
        seed = _seed_of(*seed)
        torch.manual_seed(seed)  # noise and dropout, on the device
        generator = torch.Generator().manual_seed(seed)
        mixed = None
        with torch.no_grad():
            inputs, grades = augment_crops(crops, grades, crop, generator, self.config["strength"])
            if mix:
                inputs, *mixed = mix_crops(inputs, generator)
                mixed = [x[:own] for x in mixed]
            inputs = inputs[:own]
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            loss, weight = mixed_losses(self.network, inputs, level, grades, mixed)
        self.norms.hold()
        self.scaler.scale(loss / self.entries).backward()
        return torch.stack([loss.detach(), weight])

    def _step(self, sums):
        """Move the weights by the gradients of all batches of a step, if they are finite. Returns the step's loss.

        The loss of a step is the sum of its batches' losses over the sum of their weights, of all processes: as if
        they had been one batch. The weights are only known at the end, so the gradients are divided then.
        """
        loss, weight = all_sum(sums)
        self.scaler.unscale_(self.optimizer)
        factor = self.entries * world() / weight.clamp(min=1)  # DistributedDataParallel has taken the processes' mean
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        # The same in all processes, which have the same gradients.
        finite = bool(torch.isfinite(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()  # in float16 a step that overflowed is followed by smaller losses
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.norms.end()
        if finite:
            self.average.update_parameters(self.model)
        return float(loss / weight.clamp(min=1))

    def predict(self, valid, workers):
        """(n, 5, 5, 3) probabilities of the averaged weights, the studies shared out to the processes."""
        mine = np.arange(rank(), len(valid.study_ids), world())
        predicted = predict_dataset([self.average.module.eval()], valid, numbers=mine, workers=workers)
        result = torch.zeros(predicted.shape, dtype=torch.float64, device=self.device)
        result[mine] = torch.from_numpy(predicted[mine]).to(self.device)
        return all_sum(result).cpu().numpy()


def train_classifier(out, name, train, valid, config, seed=0, device="auto", workers=0, processes=1):
    """Train one fold of a classifier: out/<name>.safetensors and out/<name>_history.csv.

    train, valid: CropDatasets. config: dict with backbone, epochs, batch (items that go through the network at once,
    in each process), learning_rate, weight_decay, dropout, strength (of the augmentation), ema (decay a step), and
    `about`, stored with the weights; optional are accumulate (1; batches to a step of the optimizer), mix (0; share
    of batches that mix_crops blends), precision ("auto", see precision_for), recompute (False; activations are computed
    again in the backward pass: a third more time, a fraction of the memory), pooling ("grid") and level_centers (of
    OrdinalClassifier).
    workers: processes that cut crops, for each process that trains; processes: how many train together on this
    machine, see processes_for and lumbar/distributed.py. A step's items are shared out to them, see epoch_batches;
    with `accumulate` a multiple of their number the result is that of one process up to rounding.

    The epoch with the best competition score on `valid`, of the averaged weights, is kept. A killed run continues
    at its last finished epoch with the same result; a finished one is only loaded. Returns the history DataFrame.
    """
    out = Path(out)
    history_path = out / f"{name}_history.csv"
    if _is_trained(out, name):
        return pd.read_csv(history_path)
    if not len(train) or not len(valid):
        raise ValueError(
            f"{name}: {len(train.study_ids)} training and {len(valid.study_ids)} held-out studies; is the "
            "fold one of folds.csv?"
        )
    processes, device = processes_for(processes, device), device_for(device)
    if processes == 1:
        _train(out, name, train, valid, config, seed, torch.device(device), workers)
        return pd.read_csv(history_path)
    if type(train) is not CropDataset or type(valid) is not CropDataset:
        raise TypeError("only CropDatasets can be described to other processes: train with PROCESSES = 1")
    folder = out / f"{name}.job"
    train.save(folder / "train")
    valid.save(folder / "valid")
    launch(folder, {"name": name, "config": config, "seed": seed, "device": device, "workers": workers}, processes)
    shutil.rmtree(folder)
    return pd.read_csv(history_path)


def train_described(folder, job, device):
    """train_classifier's part in each of several processes: folder is <out>/<name>.job, as it was written there."""
    train, valid = (CropDataset.load(Path(folder) / part) for part in ("train", "valid"))
    _train(
        Path(folder).parent, job["name"], train, valid, job["config"], job["seed"], torch.device(device), job["workers"]
    )


def _is_trained(out, name):
    paths = [out / f"{name}{ending}" for ending in (".safetensors", "_history.csv", ".checkpoint")]
    return [path.is_file() for path in paths] == [True, True, False]


def _train(out, name, train, valid, config, seed, device, workers):
    """train_classifier in this process, one of world()."""
    final, checkpoint = out / f"{name}.safetensors", out / f"{name}.checkpoint"
    training = _Training(train, config, seed, device)
    history, best, first_epoch = [], math.inf, 0
    saved = read_checkpoint(checkpoint)
    if saved is not None:
        training.load_state(saved)
        history, best, first_epoch = saved["history"], saved["best"], saved["epoch"]
    del saved  # twice the model, for as long as the training lasts
    all_sum(torch.zeros(1, device=device))  # all have read the checkpoint before the first may replace or remove it
    with progress(total=config["epochs"], desc=name, initial=first_epoch, disable=rank() > 0) as bar:
        for epoch in range(first_epoch, config["epochs"]):
            loss = training.epoch(train, (seed, epoch), workers)
            scores = score_arrays(valid.grades, training.predict(valid, workers))
            history.append({"epoch": epoch + 1, "loss": loss, **scores})
            bar.set_postfix(loss=f"{loss:.3f}", score=f"{scores['total']:.3f}", refresh=False)
            bar.update()
            # Of few held-out studies a term may have no label at all; then the others decide.
            reached = float(np.nanmean([scores[term] for term in (*GROUPS, "any_severe")]))
            better = reached < best or epoch == 0
            best = reached if better else best
            if rank() > 0:
                continue
            if better:
                about = {**config["about"], "crop": train.crop, "epoch": epoch + 1, "scores": scores}
                save_classifier(final, training.average.module, about)
            with write_whole(checkpoint) as temporary:
                torch.save({**training.state(), "history": history, "best": best, "epoch": epoch + 1}, temporary)
    if rank() == 0:
        write_csv(out / f"{name}_history.csv", pd.DataFrame(history))
        checkpoint.unlink(missing_ok=True)
