"""The 2.5D network: a 2D backbone on every slice, a sequence over slices, one over the levels; its weights files.

May use: slice_crops, crops, ordinal, pretrained, weights, storage, names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn

from ..names import CONDITIONS, LEVELS, SEVERITIES
from ..storage import open_tensors, write_tensors
from ..weights import Stated, check_network, read_settled, read_weights
from .crops import mirror_conditions
from .ordinal import CumulativeHeads, cumulative_log_probabilities
from .pretrained import load_images
from .slice_crops import JITTER, LOOK_KINDS, SliceCrop, SliceDataset, expand_slice_view, slice_crop, view_slices

CONDITION_KINDS = (0, 1, 1, 2, 2)  # conditions of one kind share what scores them: both sides are one
MOST_IMAGES = 192  # that go through a backbone together when predicting
SEQUENCES = ("lstm", "none")
GRID = 6  # cells along the sides of a feature map that is not pooled by the backbone itself


class Encoder(nn.Module):
    """A timm network without its head: images (n, channels, h, w), grey from 0 to 1 -> features (n, num_features).

    name: as timm names it; stride: 0 is the whole network; 8 or another of its feature maps' strides ends it there,
    for small crops: the features are then that map's means in a grid, which keeps where something is, and its maxima;
    drop_path: in training, how often its deepest residual branch is left out;
    pretrained: a file of weights to start from (see pretrained.load_images, which prints how much of it fits unless
    `quiet`). Raises ValueError for what timm cannot build.
    """

    def __init__(
        self,
        name: str,
        channels: int,
        size_px: int,
        stride: int = 0,
        pretrained: str | Path = "",
        quiet: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        import timm

        # A name with a colon would be fetched.
        if ":" in name or not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.partition('_')[0]}*")[:8])
            raise ValueError(f"BACKBONE {name!r} is no network that timm builds" + (f"; there are {near}" * bool(near)))
        options: dict[str, Any] = {"num_classes": 0, "in_chans": channels} | ({"global_pool": ""} if stride else {})
        options |= {"drop_path_rate": drop_path} if drop_path else {}  # not all networks know it
        try:
            net: Any = timm.create_model(name, img_size=size_px, **options)
        except TypeError:  # most convolutional networks take any size, and no such argument
            try:
                net = timm.create_model(name, **options)
            except TypeError as error:
                if "drop_path_rate" in str(error):
                    raise ValueError(
                        f"to timm {name} has no residual branches to leave out: set DROP_PATH to 0"
                    ) from None
                raise
        self.net, self.index = net, None
        if pretrained:
            load_images(net, pretrained, quiet)
        if not stride:
            self.num_features = int(getattr(net, "head_hidden_size", None) or net.num_features)
            return
        strides = [int(about["reduction"]) for about in getattr(net, "feature_info", [])]
        if stride not in strides or not hasattr(net, "prune_intermediate_layers"):
            raise ValueError(f"STRIDE of {name} must be 0 or one of {', '.join(map(str, strides))}, not {stride}")
        self.index = len(strides) - 1 - strides[::-1].index(stride)  # the deepest: all of a ViT's have one stride
        self.num_features = (GRID * GRID + 1) * int(net.feature_info[self.index]["num_chs"])
        net.prune_intermediate_layers([self.index], prune_norm=True, prune_head=True)
        _scale_drop_path(net, drop_path)

    def recompute(self) -> None:
        """Compute activations again in the backward pass. Raises ValueError for a network that cannot."""
        try:
            self.net.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError, TypeError):
            name = type(self.net).__name__
            raise ValueError(f"RECOMPUTE: timm's {name} cannot compute activations again, set it to False") from None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        if self.index is None:
            return self.net(images)
        (x,) = self.net.forward_intermediates(images, indices=[self.index], stop_early=True, intermediates_only=True)
        return torch.cat([F.adaptive_avg_pool2d(x, GRID).flatten(1), x.amax((2, 3))], 1)


def _scale_drop_path(net, rate):
    """Let the rates of what is left of a network rise to `rate`: timm let them rise over all of its depth."""
    from timm.layers import DropPath

    layers = [layer for layer in net.modules() if isinstance(layer, DropPath)]
    deepest = max((layer.drop_prob for layer in layers), default=0.0)
    for layer in layers if deepest else []:
        layer.drop_prob *= rate / deepest


class SliceNetwork(nn.Module):
    """Grades all five levels of a study from native slices, see slice_crops.LOOKS.

    Each slice goes through one 2D network. The slices of a look then see one another (sequence `lstm`: both ways) and
    are averaged by attention; the 25 pairs of level and condition see one another (`levels`: one transformer layer),
    so that an axial slice tells of the canal's neighbours and a level of the next. Both sides share all weights.

    crop: SliceCrop of its inputs; prior: (5, 5, 3) class probabilities at score 0; width: of what stands for a slice;
    drop_path and the other arguments: of Encoder.
    """

    def __init__(
        self,
        backbone: str,
        crop: SliceCrop,
        prior: ArrayLike,
        dropout: float = 0.2,
        stride: int = 0,
        width: int = 128,
        sequence: str = "lstm",
        levels: bool = True,
        pretrained: str | Path = "",
        drop_path: float = 0.0,
    ):
        super().__init__()
        if sequence not in SEQUENCES:
            raise ValueError(f"SEQUENCE must be {' or '.join(SEQUENCES)}, not {sequence!r}")
        self.crop = crop
        self.config = {
            "backbone": backbone,
            "crop": crop.plain(),
            "prior": np.asarray(prior).tolist(),
            "dropout": dropout,
            "stride": stride,
            "width": width,
            "sequence": sequence,
            "levels": levels,
        }
        self.backbone = Encoder(backbone, crop.channels, crop.size_px, stride, pretrained, True, drop_path)
        # As its weights want grey values, the mean of its colours.
        known: Any = self.backbone.net.pretrained_cfg
        self.grey_mean, self.grey_std = (float(np.mean(known.get(key) or 0.5)) for key in ("mean", "std"))
        self.reduce = nn.Sequential(nn.Linear(self.backbone.num_features, width), nn.LayerNorm(width), nn.GELU())
        self.kind = nn.Parameter(0.02 * torch.randn(1 + max(LOOK_KINDS), width))
        self.lstm = nn.LSTM(width, width // 2, bidirectional=True, batch_first=True) if sequence == "lstm" else None
        self.attention = nn.Linear(width, 1 + max(LOOK_KINDS))
        self.absent = nn.Parameter(torch.zeros(1 + max(LOOK_KINDS), width))
        self.place = nn.Parameter(0.02 * torch.randn(len(CONDITIONS), len(LEVELS), width))
        self.levels = (
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
            if levels
            else None
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        # One for a look by itself, one after the levels saw one another.
        self.score = nn.ModuleList(nn.Linear(width, 1 + max(CONDITION_KINDS)) for _ in range(2))
        for layer in self.score:
            nn.init.normal_(layer.get_parameter("weight"), std=0.03)  # a score near 0: about the prior
            nn.init.zeros_(layer.get_parameter("bias"))
        self.heads = CumulativeHeads(prior)

    def forward(self, x: torch.Tensor, level: torch.Tensor | None = None) -> torch.Tensor:
        """x: of view_slices, NaN where there is no slice; level: taken for the other networks' sake.

        Returns float32 log probabilities (B, 5 conditions, 5 levels, 3); in training a second time, in front, those of
        each condition and level by its own looks alone: (2, B, 5, 5, 3).
        """
        looks, there = self._looks(x)
        with torch.autocast(x.device.type, enabled=False):
            kinds = list(LOOK_KINDS)
            seen = there.any(-1)[..., None]
            looks = torch.where(seen, looks.float(), self.absent[kinds])
            # The canal has two looks, of which one may be missing.
            share = seen[:, :, :2] / seen[:, :, :2].sum(2, keepdim=True).clamp(min=1)
            canal = torch.where(seen[:, :, :2].any(2), (looks[:, :, :2] * share).sum(2), looks[:, :, :2].mean(2))
            tokens = torch.cat([canal[:, :, None], looks[:, :, 2:]], 2).transpose(1, 2)  # (B, conditions, levels, .)
            alone = self._log_p(self.score[0], tokens)
            if self.levels is not None:
                tokens = self.levels((tokens + self.place).flatten(1, 2)).view(tokens.shape)
            log_p = self._log_p(self.score[1], tokens)
        return torch.stack([log_p, alone]) if self.training else log_p

    def _log_p(self, score, tokens):
        scores = score(self.dropout(self.norm(tokens)))  # (B, conditions, levels, kinds)
        own = torch.stack([scores[:, c, :, kind] for c, kind in enumerate(CONDITION_KINDS)], 1)
        return cumulative_log_probabilities(own, self.heads.cutpoints)

    def _looks(self, x):
        """(looks (B, 5, 6, width), there (B, 5, 6, slices) bool: which slices a study has)."""
        channels, count = self.crop.channels, self.crop.slices
        there = ~x[..., channels // 2 : channels // 2 + count, 0, 0].isnan()
        images = x.unfold(3, channels, 1).movedim(-1, 4)[there]  # (n, channels, h, w)
        # A neighbour beyond the last slice looks like that one.
        images = torch.where(images.isnan(), images[:, channels // 2, None], images)
        images = (images - self.grey_mean) / self.grey_std
        if self.training or len(images) <= MOST_IMAGES:
            parts = [images]
        else:
            parts = images.split(MOST_IMAGES)
        features = torch.cat([self.reduce(self.backbone(part)) for part in parts if len(part)] or [x.new_zeros(0, 1)])
        slices = x.new_zeros((*there.shape, self.kind.shape[1]), dtype=torch.float32)
        if len(images):
            slices[there] = features.float()
        kinds = list(LOOK_KINDS)
        slices = (slices + self.kind[kinds][:, None]) * there[..., None]
        if self.lstm is not None:
            flat = slices.flatten(0, 2)
            slices = slices + self.lstm(flat)[0].float().view(slices.shape)
        weight = torch.stack([self.attention(slices[:, :, n])[..., kind] for n, kind in enumerate(kinds)], 2)
        weight = weight.float().masked_fill(~there, -1e4).softmax(-1)
        return (weight[..., None] * slices).sum(3), there


def save_slices(path: str | Path, model: SliceNetwork, about: Mapping[str, Any]) -> None:
    """Write a network's state and everything needed to rebuild and feed it, as safetensors."""
    write_tensors(path, model.state_dict(), "slices", {**about, **model.config})


# What to do about weights that cannot be used, after the file's name and what is wrong with it.
_REMEDY = "give a slice network's file as 04_train_vit wrote it (attach its output again, or train again)"
_ARGUMENTS = ("backbone", "prior", "dropout", "stride", "width", "sequence", "levels")


def load_slices(path: str | Path, device: str = "cpu") -> tuple[SliceNetwork, dict[str, Any]]:
    """(network in evaluation mode, about): what save_slices wrote.

    Parameters
    ----------
    path : path
    device : str
        Of the network, as torch names it.

    Returns
    -------
    network : SliceNetwork
    about : dict
        `crop` in it in plain values, see slice_crop. Also holds what store_settled wrote beside the file, such as
        `views`.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    DamagedFile
        A file with other contents. It is a ValueError.
    """
    state, about = read_weights(path, "slices", _REMEDY, "a slice network's")
    about |= read_settled(path)
    crop = _check_slices(Stated(path, about, _REMEDY))

    def build():
        return SliceNetwork(crop=crop, **{name: about[name] for name in _ARGUMENTS})

    check_network(path, build, state, _REMEDY)
    model = build()
    model.load_state_dict(state)
    return model.to(device).eval(), about


def read_slices_about(path: str | Path) -> dict[str, Any]:
    """What a slice network's weights file says of itself. Raises DamagedFile, FileNotFoundError."""
    with open_tensors(path, "slices", _REMEDY, whose="a slice network's") as (about, _):
        return about | read_settled(path)


def _check_slices(stated: Stated) -> SliceCrop:
    """Refuse a file of which SliceNetwork or cut_slices would make something else than was trained."""
    crop = stated.part("crop")
    crop.keys(("scope", "size_px", "mm_per_px", "axial_mm_per_px", "slices", "channels"))
    crop.choice("scope", ("slices",))
    crop.number("size_px", 32, 1024, whole=True)
    crop.number("mm_per_px", 0.05, 10)
    crop.number("axial_mm_per_px", 0.05, 10)
    crop.number("slices", 1, 32, whole=True)
    crop.choice("channels", (1, 3))
    stated.numbers("prior", (len(CONDITIONS), len(LEVELS), len(SEVERITIES)), 0, 1)
    stated.number("dropout", 0, 1)
    stated.number("stride", 0, 64, whole=True)
    stated.number("width", 4, 4096, whole=True)
    stated.choice("sequence", SEQUENCES)
    stated.choice("levels", (True, False))
    for view in stated.parts("views", 100, optional=True):
        view.keys(("slice", "shift_px", "scale", "mirror"))
        view.number("slice", -JITTER, JITTER, whole=True, optional=True)
        view.numbers("shift_px", (2,), -200, 200, optional=True)
        view.number("scale", 0.2, 5, optional=True)
        view.choice("mirror", (True, False), optional=True)
    name = stated.about.get("backbone")
    if not isinstance(name, str):
        stated.refuse("backbone", "the name of one that timm builds")
    try:
        with torch.device("meta"):
            Encoder(name, crop.about["channels"], crop.about["size_px"], stated.about["stride"])
    except (ValueError, RuntimeError, TypeError) as error:
        stated.refuse("backbone", f"one that timm builds ({error})")
    return slice_crop(crop.about)


@torch.no_grad()
def predict_slices(
    models: Sequence[SliceNetwork], crops: np.ndarray, crop: SliceCrop, views: Sequence[Mapping] = ({},), batch: int = 4
) -> np.ndarray:
    """Log probabilities of each view, the mean over models: (views, N, 5, 5, 3) float64, left and right in place.

    crops: (N, *crop.shape) uint8 of cut_slices; views: dicts as in SLICE_VIEWS.
    """
    device, results = next(models[0].parameters()).device, []
    for start in range(0, len(crops), batch):
        part = torch.from_numpy(np.array(crops[start : start + batch])).to(device)
        means = []
        for view in views:
            inputs = view_slices(part, crop, **expand_slice_view(view, len(part)))
            total = sum(_log_p_of(model, inputs).double() for model in models) / len(models)
            means.append((mirror_conditions(total) if view.get("mirror") else total).cpu())
        results.append(torch.stack(means))
    return torch.cat(results, 1).numpy()


def _log_p_of(model, inputs):
    """A model's log probabilities, on a GPU in half precision; in full where that overflows."""
    half = inputs.device.type == "cuda"
    with torch.autocast(inputs.device.type, enabled=half):
        log_p = model(inputs)
    return model(inputs) if half and not torch.isfinite(log_p).all() else log_p


def measure_slices(
    models: Sequence[SliceNetwork],
    dataset: SliceDataset,
    views: Sequence[Mapping] = ({},),
    numbers: Sequence[int] | np.ndarray | None = None,
    workers: int = 0,
) -> np.ndarray:
    """Log probabilities of each view for a SliceDataset: (views, n studies, 5, 5, 3), as choose_views takes them.

    Arguments as of classifier.measure_views.
    """
    result = np.zeros((len(views), len(dataset), len(CONDITIONS), len(LEVELS), len(SEVERITIES)))
    numbers = range(len(dataset)) if numbers is None else numbers
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(dataset, [int(number) for number in numbers]),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        generator=torch.Generator(),  # the caller's random numbers stay as they are
    )
    for number, (crops, _, _) in zip(numbers, loader, strict=True):
        result[:, number] = predict_slices(models, crops[None].numpy(), dataset.crop, views)[:, 0]
    return result
