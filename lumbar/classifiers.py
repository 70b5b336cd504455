"""The 3D classifiers: backbones, cumulative logits, crops and their views, training."""

import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from .dicom import load_study
from .files import class_prior, score_arrays
from .geometry import boxes_from_table, crop_level, crop_study, study_box
from .names import (
    CONDITIONS,
    DESCRIPTIONS,
    GROUPS,
    LEVELS,
    MIRRORED_CONDITIONS,
    SEVERITIES,
    SEVERITY_WEIGHTS,
    _plain,
    device_for,
    progress,
    write_csv,
)


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


def cumulative_link_loss(log_probabilities, grades, class_weights=SEVERITY_WEIGHTS, by_weight=False):
    """Weighted negative log likelihood over the graded entries only.

    log_probabilities: (..., K); grades: (...) int64, -1 = missing label. Returns a scalar tensor, 0 (with a
    gradient of 0) if nothing is graded. By default mean(w * nll), as spacecutter's CumulativeLinkLoss; by_weight
    divides by sum(w) instead, as the competition's metric does.
    """
    graded = grades >= 0
    safe = grades.clamp(min=0)
    nll = -log_probabilities.gather(-1, safe[..., None])[..., 0]
    weight = torch.as_tensor(class_weights, dtype=nll.dtype, device=nll.device)[safe] * graded
    total = weight.sum() if by_weight else graded.sum()
    return (weight * nll).sum() / total.clamp(min=1)


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


def make_backbone(name, img_size):
    """A timm_3d MaxxVit without its head: (B, 3, d, h, w) -> (B, features, d', h', w').

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
            raise ValueError(f"unknown backbone {name!r}; there are {', '.join([*SMALL_BACKBONES, *sorted(known)])}")
        config = known[name]
    stride = 2 ** (1 + len(config.embed_dim))
    if any(n % stride for n in img_size):
        raise ValueError(f"backbone {name} needs sizes divisible by {stride}, not {tuple(img_size)}")
    # The pretrained weights are for 2D images and another number of channels; and nothing is downloaded.
    return maxxvit.MaxxVit(config, img_size=tuple(img_size), in_chans=len(DESCRIPTIONS), num_classes=0, global_pool="")


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

    Features are pooled to a coarse grid across the body and not to one vector: convolutions and relative attention
    alone hardly know left from right, and which side a narrowing is on is half of the question.
    """

    def __init__(self, scope, backbone, img_size, prior, dropout=0.2, level_centers=USUAL_LEVEL_CENTERS):
        super().__init__()
        if scope not in ("level", "study"):
            raise ValueError(f"SCOPE must be level or study, not {scope!r}")
        self.config = {
            "scope": scope,
            "backbone": backbone,
            "img_size": list(img_size),
            "prior": np.asarray(prior).tolist(),
            "dropout": dropout,
            "level_centers": list(level_centers),
        }
        self.scope = scope
        self.backbone = make_backbone(backbone, img_size)
        channels, stride = self.backbone.num_features, 2 ** (1 + len(self.backbone.stages))
        self.pool = (1, 2, 4) if scope == "level" else (img_size[0] // stride, 1, 4)
        if scope == "study":
            self.attention = LevelAttention(channels * 4, self.pool[0], level_centers)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(channels * (8 if scope == "level" else 4), len(CONDITIONS))
        nn.init.normal_(self.score.weight, std=0.03)  # a score near 0: about the prior
        nn.init.zeros_(self.score.bias)
        self.heads = CumulativeHeads(prior)

    def forward(self, x, level=None):
        """x: (B, 3, d, h, w) float; level: (B,) int64, index into LEVELS, for scope `level` only.

        Returns float32 log probabilities: (B, 5 conditions, 3), or (B, 5 conditions, 5 levels, 3) for `study`.
        """
        features = F.adaptive_avg_pool3d(self.backbone.forward_features(x), self.pool)
        if self.scope == "study":
            features = self.attention(features.transpose(2, 4).flatten(1, 3))  # (B, channels x right-left, head-foot)
        else:
            features = features.flatten(1)
        score = self.score(self.dropout(features))  # (B, 5 conditions) or (B, 5 levels, 5 conditions)
        with torch.autocast(x.device.type, enabled=False):
            cutpoints = self.heads.cutpoints
            if self.scope == "level":
                return cumulative_log_probabilities(score, cutpoints[:, level].transpose(0, 1))
            return cumulative_log_probabilities(score.transpose(1, 2), cutpoints)


def save_classifier(path, model, about):
    """Write a classifier's state and everything needed to rebuild and feed it, as safetensors."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    save_file(state, temporary, metadata={"classifier": json.dumps({**model.config, **about}, default=_plain)})
    os.replace(temporary, path)


def load_classifier(path, device="cpu"):
    """(model in evaluation mode, about): what save_classifier wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("classifier", "null"))
        if about is None:
            raise ValueError(f"{path} is not a classifier of this kit (04_train_vit writes them)")
        state = {name: file.get_tensor(name) for name in file.keys()}
    names = ("scope", "backbone", "img_size", "prior", "dropout", "level_centers")
    model = OrdinalClassifier(*(about[name] for name in names))
    model.load_state_dict(state)
    return model.to(device).eval(), about


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


class CropDataset(torch.utils.data.Dataset):
    """Crops (with margin) and grades of studies.

    Items: crop (3, D, H, W) float16, level () int64, grades (5,) int64 for scope `level`, one item per study and
    level; crop, 0, grades (5, 5) for scope `study`. With a cache folder each study is cut once.
    """

    def __init__(self, paths, study_ids, grades, levels_table, crop, cache=None):
        self.paths, self.study_ids, self.grades = paths, list(study_ids), np.asarray(grades)
        self.levels_table, self.crop = levels_table, crop
        self.cache = Path(cache) if cache else None
        self.per_study = len(LEVELS) if crop["scope"] == "level" else 1

    def __len__(self):
        return len(self.study_ids) * self.per_study

    def crops_of(self, study_id):
        """(1 or 5, 3, D, H, W) float16, from the cache if it is there."""
        path = self.cache / f"{study_id}.npy" if self.cache else None
        if path and path.is_file():
            return np.load(path, mmap_mode="r")
        boxes = boxes_from_table(self.levels_table, study_id) if self.crop["scope"] == "level" else None
        crops = cut_crops(load_study(self.paths[study_id]), boxes, self.crop)
        if path:
            temporary = path.with_name(f"{path.stem}.{os.getpid()}.part")
            with open(temporary, "wb") as file:
                np.save(file, crops)
            os.replace(temporary, path)
        return crops

    def __getitem__(self, number):
        study, level = divmod(number, self.per_study)
        crop = torch.from_numpy(np.array(self.crops_of(self.study_ids[study])[level]))
        grades = self.grades[study, :, level] if self.per_study > 1 else self.grades[study]
        return crop, level, torch.from_numpy(np.ascontiguousarray(grades))


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
def predict_crops(models, crops, crop, levels=None, views=({},), batch=16):
    """Mean log probabilities of models over views, renormalised.

    models: OrdinalClassifiers; crops: (N, 3, D, H, W) with margin; levels: (N,) for scope `level`; views: dicts of
    view_crops' arguments as plain numbers, see TTA_VIEWS. Returns (N, 5, [5,] 3) float64 probabilities.
    """
    results = []
    device = next(models[0].parameters()).device
    for start in range(0, len(crops), batch):
        part = torch.from_numpy(np.array(crops[start : start + batch])).to(device)
        level = None if levels is None else torch.as_tensor(levels[start : start + batch], device=device)
        total = 0
        for view in views:
            mirror = bool(view.get("mirror", False))
            inputs = view_crops(part, crop, **expand_view(view, len(part)))
            for model in models:
                with torch.autocast(device.type, enabled=device.type == "cuda"):
                    log_p = model(inputs, level) if model.scope == "level" else model(inputs)
                total = total + (mirror_conditions(log_p) if mirror else log_p).double().cpu()
        results.append(F.softmax(total / (len(views) * len(models)), -1))
    return torch.cat(results).numpy()


def crops_to_studies(predicted, scope):
    """predict_crops' output -> (n studies, 5 conditions, 5 levels, 3)."""
    if scope == "study":
        return predicted
    return predicted.reshape(-1, len(LEVELS), len(CONDITIONS), len(SEVERITIES)).transpose(0, 2, 1, 3)


def predict_dataset(models, dataset, views=({},)):
    """(n studies, 5, 5, 3) probabilities for a CropDataset, a study at a time: memory stays small."""
    results = []
    for study_id in dataset.study_ids:
        crops = dataset.crops_of(study_id)
        levels = np.arange(len(crops)) if dataset.per_study > 1 else None
        results.append(
            crops_to_studies(predict_crops(models, crops, dataset.crop, levels, views), dataset.crop["scope"])
        )
    return np.concatenate(results)


def train_classifier(out, name, train, valid, config, seed=0, device="auto", workers=0):
    """Train one fold of a classifier: out/<name>.safetensors and out/<name>_history.csv.

    train, valid: CropDatasets; config: dict with backbone, epochs, batch, learning_rate, weight_decay, dropout,
    strength (of the augmentation), ema (decay a step), and `about`, stored with the weights.
    The epoch with the best competition score on `valid`, of the averaged weights, is kept. A killed run continues
    at its last finished epoch with the same result; a finished one is only loaded. Returns the history DataFrame.
    """
    out, device = Path(out), torch.device(device_for(device))
    final, history_path, checkpoint = (
        out / f"{name}.safetensors",
        out / f"{name}_history.csv",
        out / f"{name}.checkpoint",
    )
    if final.is_file() and history_path.is_file() and not checkpoint.is_file():
        return pd.read_csv(history_path)
    if not len(train) or not len(valid):
        raise ValueError(
            f"{name}: {len(train.study_ids)} training and {len(valid.study_ids)} held-out studies; is the "
            "fold one of folds.csv?"
        )
    torch.manual_seed(seed)
    crop = train.crop
    prior = class_prior(train.grades)
    centers = config.get("level_centers", USUAL_LEVEL_CENTERS)
    model = OrdinalClassifier(crop["scope"], config["backbone"], crop["shape"], prior, config["dropout"], centers)
    model = model.to(device)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config["ema"]), use_buffers=True
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=config["learning_rate"],
    )
    steps = max(1, len(train) // config["batch"]) * config["epochs"]
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))
    )
    scaler = torch.amp.GradScaler(enabled=device.type == "cuda")
    history, best, first_epoch = [], math.inf, 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        for part, state in (
            ("model", model),
            ("average", average),
            ("optimizer", optimizer),
            ("schedule", schedule),
            ("scaler", scaler),
        ):
            state.load_state_dict(saved[part])
        history, best, first_epoch = saved["history"], saved["best"], saved["epoch"]
    with progress(total=config["epochs"], desc=name, initial=first_epoch) as bar:
        for epoch in range(first_epoch, config["epochs"]):
            # Seeded by the epoch: a continued run draws what an unbroken one would have drawn.
            torch.manual_seed(seed * 10_007 + epoch)
            generator = torch.Generator().manual_seed(seed * 10_007 + epoch)
            loader = torch.utils.data.DataLoader(
                train,
                config["batch"],
                shuffle=True,
                drop_last=len(train) > config["batch"],
                num_workers=workers,
                generator=generator,
            )
            model.train()
            losses = []
            for crops, level, grades in loader:
                inputs, grades = augment_crops(crops.to(device), grades.to(device), crop, generator, config["strength"])
                with torch.autocast(device.type, enabled=device.type == "cuda"):
                    log_p = model(inputs, level.to(device))
                loss = cumulative_link_loss(log_p, grades, by_weight=True)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                average.update_parameters(model)
                losses.append(float(loss.detach()))
            scores = score_arrays(valid.grades, predict_dataset([average.module.eval()], valid))
            history.append({"epoch": epoch + 1, "loss": float(np.mean(losses)), **scores})
            bar.set_postfix(loss=f"{np.mean(losses):.3f}", score=f"{scores['total']:.3f}", refresh=False)
            bar.update()
            # Of few held-out studies a term may have no label at all; then the others decide.
            reached = float(np.nanmean([scores[term] for term in (*GROUPS, "any_severe")]))
            if reached < best or epoch == 0:
                best = reached
                save_classifier(
                    final, average.module, {**config["about"], "crop": crop, "epoch": epoch + 1, "scores": scores}
                )
            temporary = checkpoint.with_name(checkpoint.name + ".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "scaler": scaler.state_dict(),
                    "history": history,
                    "best": best,
                    "epoch": epoch + 1,
                },
                temporary,
            )
            os.replace(temporary, checkpoint)
    history = pd.DataFrame(history)
    write_csv(history_path, history)
    checkpoint.unlink(missing_ok=True)
    return history
