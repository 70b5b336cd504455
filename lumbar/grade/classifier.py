"""3D networks that grade level crops and whole studies: backbones, heads, weights, prediction.

May use: ordinal, crops, tta, weights, data, storage, names.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from numpy.typing import ArrayLike
from scipy.special import softmax
from torch import nn

from ..data.crop import CROP_AXES, Crop
from ..data.geometry import boxes_from_table
from ..data.resample import study_box
from ..data.volume import load_study
from ..names import CONDITIONS, DESCRIPTIONS, LEVELS, SEVERITIES, device_for, progress
from ..storage import open_tensors, write_tensors
from ..weights import Stated, check_network, read_settled, read_weights, store_settled
from .crops import CropDataset, View, expand_view, mirror_conditions, view_crops
from .ordinal import CumulativeHeads, cumulative_log_probabilities, current_heads
from .tta import TTA_VIEWS, choose_views, cross_fitted_views, deal_parts

# The demo's backbones, small enough for minutes on a CPU: a CoAtNet of three stages for crops, and one of two stages
# for whole studies, whose smaller stride still tells neighbouring levels apart.
SMALL_BACKBONES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=(24, 48, 96), depths=(1, 1, 1), block_type=("C", "C", "T"), stem_width=(12, 24)),
    "tiny_stride8": dict(embed_dim=(24, 64), depths=(1, 1), block_type=("C", "T"), stem_width=(12, 24)),
}


def backbone_config(name: str, img_size: Sequence[int]) -> Any:
    """timm_3d's configuration of a MaxxVit.

    Parameters
    ----------
    name : str
        A key of SMALL_BACKBONES or of timm_3d's MaxxVit configurations (coatnet_rmlp_3_rw, maxvit_rmlp_tiny_rw, ...).
    img_size : sequence of 3 int
        Voxels (d, h, w), each divisible by the stride (32; `tiny`: 16, `tiny_stride8`: 8).

    Returns
    -------
    timm_3d.models.maxxvit.MaxxVitCfg

    Raises
    ------
    ValueError
        Another name, or other sizes.
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


def make_backbone(name: str, img_size: Sequence[int], drop_path: float = 0.0) -> Any:
    """A timm_3d MaxxVit without its head: (B, 3, d, h, w) -> (B, features, d', h', w').

    Parameters
    ----------
    name, img_size
        Of backbone_config.
    drop_path : float
        In training, how often the deepest residual branch is left out; those before it in proportion to their depth
        (Huang et al. 2016).

    Returns
    -------
    timm_3d.models.maxxvit.MaxxVit
        With random weights. Its forward_features gives the features, its num_features says how many.

    Raises
    ------
    ValueError
        As backbone_config.
    """
    config = backbone_config(name, img_size)
    from timm_3d.models.maxxvit import MaxxVit

    # The pretrained weights are for 2D images and another number of channels; and nothing is downloaded.
    net = MaxxVit(
        config,
        img_size=tuple(img_size),
        in_chans=len(DESCRIPTIONS),
        num_classes=0,
        global_pool="",
        drop_path_rate=drop_path,
    )
    # Some have a hidden layer there, which is not used and for whose gradients several GPUs would wait.
    net.head.requires_grad_(False)
    return net


class LevelAttention(nn.Module):
    """Five weighted means along the head-foot axis, one a level: where to look is part position, part content.

    centers: (5,) where the levels lie on average, as fractions of the grid from its upper end: the start of the
    position's part, a Gaussian of about half the distance between levels.
    """

    def __init__(self, channels: int, length: int, centers: ArrayLike) -> None:
        super().__init__()
        place = (torch.arange(length) + 0.5) / length
        distance = place[None] - torch.as_tensor(centers, dtype=torch.float32)[:, None]
        self.position = nn.Parameter(-0.5 * (distance / 0.08) ** 2)
        self.content = nn.Conv1d(channels, len(LEVELS), 1)
        for parameter in self.content.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, channels, length) -> (B, 5, channels)."""
        weight = F.softmax(self.position + self.content(x), -1)
        return weight @ x.transpose(1, 2)


# Discs from L1/2 to L5/S1 in a grid of some 25 cm around the lumbar spine, as fractions from its upper end.
USUAL_LEVEL_CENTERS = (0.22, 0.37, 0.52, 0.66, 0.78)


POOLINGS = ("mean", "max", "attention")


class CellPooling(nn.Module):
    """Features (B, channels, d, h, w) -> (B, channels, *cells): a coarse grid, each cell its features' mean, maximum or
    weighted mean. The weights (`attention`) follow from the features, one for each place, and are equal at first."""

    def __init__(self, kind: str, channels: int, cells: tuple[int, int, int]) -> None:
        super().__init__()
        if kind not in POOLINGS:
            raise ValueError(f"POOLING must be {', '.join(POOLINGS)}, not {kind!r}")
        self.kind, self.cells = kind, cells
        self.weight = nn.Conv3d(channels, 1, 1) if kind == "attention" else None
        if self.weight is not None:
            for parameter in self.weight.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "max":
            return F.adaptive_max_pool3d(x, self.cells)
        if self.weight is None:
            return F.adaptive_avg_pool3d(x, self.cells)
        # Bounded: of a cell far below its crop's highest weight nothing but 0 / 0 would be left.
        weight = (10 * torch.tanh(self.weight(x) / 10)).exp()
        return F.adaptive_avg_pool3d(x * weight, self.cells) / F.adaptive_avg_pool3d(weight, self.cells)


class OrdinalClassifier(nn.Module):
    """A 3D backbone and cumulative-logit heads.

    scope `level`: 5 heads (conditions) on the crop of one level; scope `study`: the same 5 on each of five weighted
    means along the head-foot axis (LevelAttention), so that a level learns from all others. In both the cut points
    differ by level: a crop does not tell how common a grade is at its level.

    Features are pooled to a coarse grid across the body and not to one vector: convolutions and relative attention
    alone hardly know left from right, and which side a narrowing is on is half of the question. pooling: how each
    cell is, one of POOLINGS; drop_path: of make_backbone.
    """

    layout = "grid"  # weights files name it as `pooling`, because there are networks with one mean over all

    def __init__(
        self,
        scope: str,
        backbone: str,
        img_size: Sequence[int],
        prior: ArrayLike,
        dropout: float = 0.2,
        level_centers: Sequence[float] = USUAL_LEVEL_CENTERS,
        pooling: str = "mean",
        drop_path: float = 0.0,
    ) -> None:
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
            "pooling": self.layout,
            "cells": pooling,
        }
        self.scope = scope
        self.recompute = False  # in training: a block's activations are not kept but computed again for its gradients
        self.backbone = make_backbone(backbone, img_size, drop_path)
        channels, stride = self.backbone.num_features, 2 ** (1 + len(self.backbone.stages))
        grid = (1, 2, 4) if scope == "level" else (img_size[0] // stride, 1, 4)
        features = math.prod(grid[1:]) * channels
        if scope == "study":
            self.attention = LevelAttention(features, grid[0], level_centers)
        self.pool = CellPooling(pooling, channels, grid)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(features, len(CONDITIONS))
        nn.init.normal_(self.score.weight, std=0.03)  # a score near 0: about the prior
        nn.init.zeros_(self.score.bias)
        self.heads = CumulativeHeads(prior)

    def forward(self, x: torch.Tensor, level: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, 3, d, h, w) float; level: (B,) int64, index into LEVELS, for scope `level` only.

        Returns float32 log probabilities: (B, 5 conditions, 3), or (B, 5 conditions, 5 levels, 3) for `study`.
        level may be (B, m): the same scores seen as m levels each, -> (B, m, 5 conditions, 3).
        """
        features = self._features(x)
        # Under mixed precision only the backbone is: scores and cut points keep all their digits.
        with torch.autocast(x.device.type, enabled=False):
            features = self.pool(features.float())
            if self.scope == "study":
                # (B, channels x right-left, head-foot) -> (B, 5 levels, channels x right-left)
                features = self.attention(features.transpose(2, 4).flatten(1, 3))
                score = self.score(self.dropout(features)).transpose(1, 2)
            else:
                score = self.score(self.dropout(features.flatten(1)))
            cutpoints = self.heads.cutpoints
            if self.scope == "study":
                return cumulative_log_probabilities(score.view(len(x), *cutpoints.shape[:2]), cutpoints)
            if level is None:
                raise ValueError("scope level needs to know which level a crop is of")
            if level.ndim == 2:
                score = score[:, None].expand(-1, level.shape[1], -1)
            return cumulative_log_probabilities(score, cutpoints[:, level].movedim(0, -2))

    def _features(self, x):
        if not (self.recompute and self.training):
            return self.backbone.forward_features(x)
        x = self.backbone.stem(x)
        for stage in self.backbone.stages:
            for block in stage.blocks:
                contexts = functools.partial(_recompute_contexts, block)
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return self.backbone.norm(x)


def _recompute_contexts(block):
    """For torch's checkpoint: (context of the forward pass, context of computing it again)."""
    return contextlib.nullcontext(), _same_statistics(block)


@contextlib.contextmanager
def _same_statistics(block):
    """Leave the running statistics of batch normalisation alone, so that a batch seen twice counts once."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def save_classifier(path: str | Path, model: OrdinalClassifier, about: Mapping[str, Any]) -> None:
    """Write a classifier's state and everything needed to rebuild and feed it, as safetensors. about: `crop`, a Crop,
    and what else is to be known of it."""
    if isinstance(about.get("crop"), Crop):
        about = {**about, "crop": about["crop"].to_json()}
    write_tensors(path, model.state_dict(), "classifier", {**model.config, **about})


# What to do about weights that cannot be used, after the file's name and what is wrong with it.
_REMEDY = "give a classifier's file as 04_train_vit wrote it (attach its output again, or train again)"


def load_classifier(
    path: str | Path, device: str | torch.device = "cpu", network: type[OrdinalClassifier] = OrdinalClassifier
) -> tuple[OrdinalClassifier, dict[str, Any]]:
    """(model in evaluation mode, about): what save_classifier wrote of a model of the class `network`, `crop` in it a
    Crop.

    Parameters
    ----------
    path : path
    device : str or torch.device
        Of the model, as torch names it.
    network : type
        OrdinalClassifier or a class derived from it.

    Returns
    -------
    model : OrdinalClassifier
        Of the class `network`.
    about : dict
        Also holds what store_settled wrote beside the file, such as `views`.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DamagedFile
        A file with other contents: numbers out of range, a network that its tensors do not fit, values that are not
        finite. It is a ValueError.
    """
    state, about = read_weights(path, "classifier", _REMEDY, "a classifier's")
    about |= read_settled(path)
    _check_classifier(Stated(path, about, _REMEDY), network)
    names = ("scope", "backbone", "img_size", "prior", "dropout", "level_centers")
    arguments = [about[name] for name in names] + ([about["cells"]] if about.get("cells") else [])
    state = current_heads(state)
    check_network(path, lambda: network(*arguments), state, _REMEDY)
    model = network(*arguments)
    model.load_state_dict(state)
    if "crop" in about:
        about["crop"] = Crop.from_json(about["crop"])
    return model.to(device).eval(), about


def read_classifier_about(path: str | Path) -> dict[str, Any]:
    """What a classifier's weights file says of itself: dict. Raises DamagedFile, FileNotFoundError."""
    with open_tensors(path, "classifier", _REMEDY, whose="a classifier's") as (about, _):
        return about | read_settled(path)


def _check_classifier(stated, network):
    """Refuse a file of which the network, cut_crops or view_crops would make something else than was trained."""
    scope = stated.choice("scope", ("level", "study"))
    stated.choice("pooling", (network.layout,), optional=True)
    stated.choice("cells", POOLINGS, optional=True)
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
        crop.choice("axes", (CROP_AXES,), optional=True)
    for view in stated.parts("views", 100, optional=True):
        view.keys(("rotation_deg", "shift_mm", "scale", "mirror"))
        view.numbers("rotation_deg", (3,), -180, 180, optional=True)
        view.numbers("shift_mm", (3,), -100, 100, optional=True)
        view.number("scale", 0.2, 5, optional=True)
        view.choice("mirror", (True, False), optional=True)


def level_centers(paths: Mapping[int, str | Path], levels_table: pd.DataFrame, crop: Crop) -> list[float]:
    """(5,) mean places of the levels in the whole-study grid, as fractions from its upper end. See LevelAttention.

    Parameters
    ----------
    paths : mapping of int to path
        study_id to the file of its volumes, of the studies to average over.
    levels_table : DataFrame
        levels.csv.
    crop : Crop
        Of scope `study`; its extent from head to foot counts.

    Returns
    -------
    list of 5 float
        Head to foot.

    Raises
    ------
    KeyError
        The table lacks a level of a study.
    """
    found = []
    for study_id, path in paths.items():
        center_lps, _ = study_box(load_study(path))
        z_mm = np.array([box.center_lps_mm[2] for box in boxes_from_table(levels_table, study_id)])
        found.append(0.5 - (z_mm - center_lps[2]) / crop.extent_mm[0])
    return np.mean(found, 0).tolist()


@torch.no_grad()
def predict_views(
    models: Sequence[OrdinalClassifier],
    crops: np.ndarray,
    crop: Crop,
    levels: np.ndarray | None = None,
    views: Sequence[View] = ({},),
    batch: int = 16,
) -> np.ndarray:
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


def predict_crops(
    models: Sequence[OrdinalClassifier],
    crops: np.ndarray,
    crop: Crop,
    levels: np.ndarray | None = None,
    views: Sequence[View] = ({},),
    batch: int = 16,
) -> np.ndarray:
    """Mean log probabilities of models over views, renormalised: (N, 5, [5,] 3) float64 probabilities.

    The arguments are predict_views'.
    """
    return softmax(predict_views(models, crops, crop, levels, views, batch).mean(0), -1)


def crops_to_studies(predicted: np.ndarray, scope: str) -> np.ndarray:
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


def measure_views(
    models: Sequence[OrdinalClassifier],
    dataset: CropDataset,
    views: Sequence[View] = TTA_VIEWS,
    numbers: Sequence[int] | np.ndarray | None = None,
    workers: int = 0,
) -> np.ndarray:
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
            result[view, number] = crops_to_studies(log_p, dataset.crop.scope)[0]
    return result


def settle_views(
    out: str | Path,
    held_out: Mapping[str, Any],
    device: str | int = "auto",
    views: Sequence[View] = TTA_VIEWS,
    workers: int = 0,
    load: Callable[..., Any] | None = None,
    measure: Callable[..., np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Choose the test-time views on held-out studies, store them beside the weights, predict these studies.

    What is stored is chosen on all of the studies together, see choose_views. The predictions are cross-fitted: each
    fifth of the studies is predicted with the views that pay on the other four fifths, see cross_fitted_views. Safe to
    run again after an interruption.

    Parameters
    ----------
    out : path
        Folder with <name>.safetensors.
    held_out : mapping of str to CropDataset
        By the name of the weights, the studies that these were not trained on; SliceDatasets with `load` and `measure`.
    device : str or int
        As names.device_for takes it.
    views : sequence of mapping
        The candidates, the plain one first.
    workers : int
        Processes that cut crops.
    load, measure : callable, optional
        Of another kind of network, in place of load_classifier and measure_views.

    Returns
    -------
    predicted : dict of str to (n, 5, 5, 3) array
        Probabilities by study, condition, level and severity, for each name; studies in the data set's order.
    table : DataFrame
        Of choose_views.

    Raises
    ------
    ValueError
        For a device that this machine does not have.
    FileNotFoundError, DamagedFile
        As load_classifier.
    """
    device, measured = device_for(device), []
    load, measure = load or load_classifier, measure or measure_views
    for name, dataset in progress(held_out.items(), desc="views"):
        model, _ = load(Path(out) / f"{name}.safetensors", device)
        measured.append(measure([model], dataset, views, workers=workers))
    grades, log_p = np.concatenate([dataset.grades for dataset in held_out.values()]), np.concatenate(measured, 1)
    chosen, table = choose_views(grades, log_p, views)
    for name in held_out:
        store_settled(Path(out) / f"{name}.safetensors", {"views": chosen})
    used = cross_fitted_views(grades, log_p, views, deal_parts(np.ones(len(grades), bool)))
    share = (used / used.sum(1, keepdims=True)).T[..., None, None, None]
    ends = np.cumsum([len(dataset.study_ids) for dataset in held_out.values()])
    return dict(zip(held_out, np.split(softmax((log_p * share).sum(0), -1), ends[:-1]), strict=True)), table
