"""The training loop that all classifiers share, 2.5D and 3D: one loop over epochs, one over batches.

accelerate sees to devices, mixed precision, accumulation and several processes, timm to the schedule, the weight decay
and the averaged weights. Both are imported where they are used, because they take seconds.

May use: classifier, crops, ordinal, pretrained, distributed, data, storage, names.
"""

import math
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..data.competition import class_prior
from ..data.crop import Crop
from ..data.metric import score_arrays
from ..names import GROUPS, device_for, progress
from ..storage import file_digest, read_checkpoint, write_csv, write_whole
from .classifier import POOLINGS, USUAL_LEVEL_CENTERS, OrdinalClassifier, measure_views, save_classifier
from .crops import CropDataset, augment_crops
from .distributed import launch, processes_for, processes_of_launcher
from .ordinal import weighted_losses
from .pretrained import load_volumes


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyperparameters of a training, apart from its data and the machine it runs on.

    `asdict` gives JSON values, and TrainConfig(**values) is the same configuration again. Raises TypeError for a name
    that it does not know and ValueError for a number of epochs or batches below 1, a drop_path out of [0, 1) or an
    unknown pooling.
    """

    backbone: str  # of classifier.backbone_config
    epochs: int
    batch: int  # crops that go through the network at once, in each process
    learning_rate: float  # AdamW's peak
    weight_decay: float  # of weights; not of biases, norms, cut points and the places of levels
    dropout: float  # before the heads
    strength: float  # of the augmentation, see augment_crops
    ema: float  # decay of the averaged weights, a step
    accumulate: int = 1  # batches to a step of the optimizer, shared out to the processes
    mix: float = 0.0  # share of batches that mix_crops blends
    precision: str = "auto"  # see precision_for
    recompute: bool = False  # activations again in the backward pass: a third more time, a fraction of the memory
    level_centers: tuple[float, ...] = USUAL_LEVEL_CENTERS  # of OrdinalClassifier
    pretrained: str = ""  # file of weights that the backbone starts from, see pretrained.py
    backbone_rate: float = 1.0  # of the backbone, as a share of learning_rate
    drop_path: float = 0.0  # how often the backbone's deepest residual branch is left out
    pooling: str = "mean"  # of the 3D networks' cells, one of classifier.POOLINGS
    seed: int = 0  # of initialisation, order and augmentation

    def __post_init__(self) -> None:
        centers = tuple(float(center) for center in self.level_centers)  # a list, where it was JSON
        object.__setattr__(self, "level_centers", centers)
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.upper()} must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"DROP_PATH must be 0 or more and below 1, not {self.drop_path}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"POOLING must be {', '.join(POOLINGS)}, not {self.pooling!r}")


class Recipe:
    """What depends on the kind of network in a training: how it is made, fed and judged. This is the 3D networks'.

    Processes get it by its class's name, so it holds no state.
    """

    network = OrdinalClassifier

    def build(self, train: Any, config: TrainConfig, prior: np.ndarray) -> nn.Module:
        """A network that starts from the class prior (5, 5, 3), and with its backbone from pretrained weights."""
        crop = train.crop
        network = self.network(
            crop.scope,
            config.backbone,
            crop.shape,
            prior,
            config.dropout,
            config.level_centers,
            config.pooling,
            config.drop_path,
        )
        network.recompute = config.recompute
        if config.pretrained:
            load_volumes(network.backbone, config.pretrained, quiet=True)
        return network

    def augment(
        self, crops: torch.Tensor, grades: torch.Tensor, crop: Any, generator: torch.Generator, config: TrainConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and grades out of a batch of the data set's items, changed at random."""
        return augment_crops(crops, grades, crop, generator, config.strength)

    def exchange(self, batch: tuple, before: tuple, generator: torch.Generator, config: Any) -> tuple:
        """A batch (inputs, level, grades) that took parts of the one before it, labels included; here none."""
        return batch

    def losses(self, model: nn.Module, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """batch_losses."""
        return batch_losses(model, *batch)

    def measure(self, models: list, dataset: Any, views: Any, numbers: Any = None, workers: int = 0) -> np.ndarray:
        """classifier.measure_views."""
        return measure_views(models, dataset, views, numbers, workers)

    def save(self, path: Path, network: Any, about: dict[str, Any]) -> None:
        """Write a weights file. about: what else it says of itself."""
        save_classifier(path, network, about)


def train_classifier(
    out: str | Path,
    name: str,
    train: CropDataset,
    valid: CropDataset,
    config: TrainConfig,
    about: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int = 0,
    processes: int = 1,
    tracker: Any = "",
    recipe: Recipe = Recipe(),
) -> pd.DataFrame:
    """Train one fold of a classifier: out/<name>.safetensors and out/<name>_history.csv.

    The epoch with the best competition score on `valid`, of the averaged weights, is kept. A killed training continues
    after its last finished epoch; in one process on a CPU it ends with the same weights, bit by bit. A finished one is
    only read.

    Parameters
    ----------
    out : path
        A folder that exists.
    name : str
        Of the files, such as level_0.
    train, valid : CropDataset
        Studies to train on, and held-out ones.
    config : TrainConfig
    about : dict of JSON values, optional
        Stored with the weights, such as {"fold": 0}.
    device : str
        As names.device_for takes it.
    workers : int
        Processes that cut crops, for each process that trains.
    processes : int
        How many train together on this machine, see processes_for. They share out the batches of a step: `accumulate`
        is best a multiple of their number, otherwise it is rounded up to one. Under torchrun or `accelerate launch`,
        on one machine or several with a shared folder, all processes of those train together, and this is not used.
    tracker : str or accelerate.tracking.GeneralTracker
        Where the curves go as well: the name of one of accelerate's trackers ("tensorboard", "wandb", ...), or "".
    recipe : Recipe
        Of the kind of network; `train` and `valid` are of the data set that it takes.

    Returns
    -------
    DataFrame
        The history: epoch, loss (mean of the steps) and the scores on `valid`.

    Raises
    ------
    ValueError
        Without studies to train on or to hold out, and for a device, precision or tracker that there is not.
    ImportError
        Where the tracker's package is missing.
    RuntimeError
        Where one of several processes failed, with its last lines.
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
    check_tracker(tracker)
    joined = processes_of_launcher()
    processes, device = joined or processes_for(processes, device), device_for(device)
    arguments = (out, name, train, valid, config, about or {}, device, workers, processes, tracker, recipe)
    if processes == 1 or joined:
        _train(*arguments)
    else:
        launch(_train, arguments, processes)
    return pd.read_csv(history_path)


def _is_trained(out, name):
    paths = [out / f"{name}{ending}" for ending in (".safetensors", "_history.csv", ".checkpoint")]
    return [path.is_file() for path in paths] == [True, True, False]


def _train(out, name, train, valid, config, about, device, workers, processes, tracker, recipe):
    """train_classifier in this process, one of `processes`."""
    final, checkpoint = out / f"{name}.safetensors", out / f"{name}.checkpoint"
    training = prepare_training(train, config, device, workers, processes, tracker, out / "tracking", recipe)
    accelerator = training.accelerator
    history, best, first_epoch = [], math.inf, 0
    settings, saved = _settings(config), read_checkpoint(checkpoint)
    if saved is not None and _defaults_of(config) | saved.get("config", {}) != settings:
        accelerator.print(f"{checkpoint} is of a training with other settings: the training starts over")
    elif saved is not None:
        training.load_state(saved["training"])
        history, best, first_epoch = saved["history"], saved["best"], saved["epoch"]
    del saved  # twice the model, for as long as the training lasts
    accelerator.wait_for_everyone()  # until all have read the checkpoint, which the first will replace
    accelerator.init_trackers(name, config={**_plain(config), "level_centers": str(config.level_centers)})
    main = accelerator.is_main_process
    with progress(total=config.epochs, desc=name, initial=first_epoch, disable=not main) as bar:
        for epoch in range(first_epoch, config.epochs):
            loss = train_epoch(training, config, train.crop, epoch)
            scores = score_arrays(valid.grades, predict_held_out(training, valid, workers))
            history.append({"epoch": epoch + 1, "loss": loss, **scores})
            accelerator.log({"loss": loss, **scores}, step=epoch + 1)
            bar.set_postfix(loss=f"{loss:.3f}", score=f"{scores['total']:.3f}", refresh=False)
            bar.update()
            # Of few held-out studies a term may have no label at all; then the others decide.
            reached = float(np.nanmean([scores[term] for term in (*GROUPS, "any_severe")]))
            better = reached < best or epoch == 0
            best = reached if better else best
            if main and better:
                stated = {**about, "crop": train.crop, "epoch": epoch + 1, "scores": scores}
                recipe.save(final, training.average.module, stated)
            if main:
                state = {"config": settings, "training": training.state(), "history": history}
                with write_whole(checkpoint) as temporary:
                    torch.save({**state, "best": best, "epoch": epoch + 1}, temporary)
    if main:
        write_csv(out / f"{name}_history.csv", pd.DataFrame(history))
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()  # the others read the history
    accelerator.end_training()


def _settings(config):
    """What makes a training another one: the TrainConfig as JSON gives it back, its weights file by its content, which
    may lie elsewhere when the training goes on."""
    return _plain(config) | {"pretrained": file_digest(config.pretrained) if config.pretrained else ""}


def _defaults_of(config):
    """The settings that a TrainConfig of this class has by itself: what a checkpoint from before one of them meant."""
    return _as_lists({field.name: field.default for field in fields(config) if field.default is not MISSING})


def _plain(config):
    """A TrainConfig as JSON gives it back."""
    return _as_lists(asdict(config))


def _as_lists(values):
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass
class Training:
    """What a training works with: prepare_training makes it, train_epoch moves it on."""

    accelerator: Any  # accelerate.Accelerator
    network: Any  # of Recipe.build
    model: nn.Module  # the network as accelerate runs it: in mixed precision, in step with other processes
    average: Any  # timm's ModelEmaV3 of the network
    optimizer: Any
    schedule: Any  # timm's scheduler, which has no state beside `step`
    batches: Any  # DataLoader of this process' share
    order: torch.Generator  # of the batches
    recipe: Recipe = Recipe()
    step: int = 0  # of the optimizer, those that overflowed included

    def _parts(self):
        parts = {"network": self.network, "average": self.average, "optimizer": self.optimizer}
        return parts | ({"scaler": self.accelerator.scaler} if self.accelerator.scaler else {})

    def state(self) -> dict[str, Any]:
        """What continues the training after an epoch, as tensors and plain values; random numbers start from seeds."""
        return {"step": self.step, **{name: part.state_dict() for name, part in self._parts().items()}}

    def load_state(self, saved: dict[str, Any]) -> None:
        self.step = saved["step"]
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        self.schedule.step_update(self.step)


def prepare_training(
    train: CropDataset,
    config: TrainConfig,
    device: str | torch.device,
    workers: int = 0,
    processes: int = 1,
    tracker: Any = "",
    tracking: Path | None = None,
    recipe: Recipe = Recipe(),
) -> Training:
    """Make what train_epoch needs: AdamW, 10% warm-up, cosine decay, averaged weights and statistics.

    The grades of `train` give the class prior; tracking: folder for trackers that write files. The other arguments are
    train_classifier's.
    """
    from timm.optim import param_groups_weight_decay
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    accelerator = _accelerator(config, device, processes, tracker, tracking)
    torch.manual_seed(config.seed)
    network = recipe.build(train, config, class_prior(train.grades)).to(accelerator.device)
    average = ModelEmaV3(network, decay=config.ema)
    groups = param_groups_weight_decay(network, config.weight_decay, no_weight_decay_list=["attention.position"])
    groups = _with_rates(groups, network.backbone, config)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    order = torch.Generator()
    batches = torch.utils.data.DataLoader(
        train,
        config.batch,
        shuffle=True,
        generator=order,
        num_workers=workers,
        prefetch_factor=1 if workers and train.per_study == 1 else None,  # a whole study is 175 MB at full size
        pin_memory=accelerator.device.type == "cuda",
    )
    model, optimizer, batches = accelerator.prepare(network, optimizer, batches)
    steps = config.epochs * math.ceil(len(batches) / accelerator.gradient_accumulation_steps)
    warm = max(1, steps // 10)
    first_rate = config.learning_rate / warm
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=warm, warmup_lr_init=first_rate, t_in_epochs=False)
    return Training(accelerator, network, model, average, optimizer, schedule, batches, order, recipe)


def _with_rates(groups, backbone, config):
    """The optimizer's groups of parameters, the backbone's with its share of the rate."""
    own = {id(parameter) for parameter in backbone.parameters()}
    parts = ((True, config.learning_rate * config.backbone_rate), (False, config.learning_rate))
    divided = [
        {**group, "params": [p for p in group["params"] if (id(p) in own) == inside], "lr": rate}
        for group in groups
        for inside, rate in (parts if config.backbone_rate != 1 else ())
    ]
    return [group for group in divided if group["params"]] or groups


def _accelerator(config, device, processes, tracker, tracking):
    """accelerate's Accelerator for one training."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs, patch_environment

    # They outlive an Accelerator: without this the next training of a notebook would be held to this one's device and
    # precision, and one after an interruption to its half-used loader.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    device = torch.device(device)
    formats = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
    # Of several processes each finds its own GPU.
    with patch_environment(**({"ACCELERATE_TORCH_DEVICE": device} if processes == 1 else {})):
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=formats[precision_for(config.precision, device)],
            gradient_accumulation_steps=-(-config.accumulate // processes),
            log_with=tracker or None,
            project_dir=tracking,
            # A process that is late for so long is taken for lost: the others then fail instead of waiting on.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
        )


def train_epoch(training: Training, config: TrainConfig, crop: Crop, epoch: int) -> float:
    """One epoch over this process' batches. Returns the mean loss of the steps that did not overflow (NaN: all did).

    The loss of a step is the weighted mean over all its labels, as if its batches, in however many processes, were one.
    Random numbers start from seeds of the epoch, so that they do not depend on where the training began.
    """
    accelerator, network, optimizer = training.accelerator, training.network, training.optimizer
    training.order.manual_seed(_seed_of(config.seed, epoch))
    seed = _seed_of(config.seed, epoch, accelerator.process_index)
    torch.manual_seed(seed)  # noise and dropout, on the device
    generator = torch.Generator().manual_seed(seed)
    training.model.train()
    losses, sums, before = [], torch.zeros(2, device=accelerator.device), None
    for crops, level, grades in training.batches:
        with accelerator.accumulate(training.model):
            inputs, grades = training.recipe.augment(crops, grades, crop, generator, config)
            own = (inputs, level, grades)
            last = tuple(x[-1:].clone() for x in own)
            own = training.recipe.exchange(own, before or own, generator, config)
            mix = torch.rand((), generator=generator) < config.mix
            batch = mix_crops(own, before or own, generator) if mix else unmixed(own)
            before = last
            loss, weight = training.recipe.losses(training.model, *batch)
            # Divided by the labels of a batch, gradients stay within float16, which ends at 65,504. How much a step's
            # labels weigh is known at its end.
            labels = config.batch * grades[0].numel()
            accelerator.backward(loss / labels)
            sums += torch.stack([loss.detach(), weight])
            if not accelerator.sync_gradients:
                continue
            loss, weight = accelerator.reduce(sums)
            weight, sums = weight.clamp(min=1), torch.zeros_like(sums)
            # What accelerate and DistributedDataParallel have divided by: batches and processes.
            scale = labels * accelerator.gradient_accumulation_steps * accelerator.num_processes / weight
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad *= scale
            finite = bool(torch.isfinite(accelerator.clip_grad_norm_(network.parameters(), 1.0)))
            if finite or accelerator.scaler:  # float16's scaler leaves the step out itself, and lowers its scale
                optimizer.step()
            optimizer.zero_grad()
            training.step += 1
            training.schedule.step_update(training.step)
            if finite:
                network.heads.keep_ascending()
                training.average.update(network, step=training.step)
                losses.append(float(loss / weight))
            else:  # running statistics would never forget it
                for statistic, good in zip(network.buffers(), training.average.module.buffers(), strict=True):
                    statistic.copy_(good)
    return float(np.mean(losses)) if losses else math.nan


def predict_held_out(training: Training, valid: CropDataset, workers: int = 0) -> np.ndarray:
    """(n, 5, 5, 3) probabilities of the averaged weights, the studies shared out to the processes."""
    from accelerate.utils import broadcast

    accelerator, network = training.accelerator, training.average.module
    for statistic in network.buffers():  # each process saw its own batches; the first one's are kept
        broadcast(statistic)
    mine = range(accelerator.process_index, len(valid.study_ids), accelerator.num_processes)
    plain: tuple[dict, ...] = ({},)  # views are chosen when the training has ended
    log_p = training.recipe.measure([network], valid, plain, mine, workers)[0]  # 0 where another process predicts
    log_p = accelerator.reduce(torch.from_numpy(log_p).float().to(accelerator.device))
    return log_p.cpu().double().softmax(-1).numpy()


# -- batches and their loss


def mix_crops(
    batch: tuple[torch.Tensor, ...], before: tuple[torch.Tensor, ...], generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Mixup (Zhang et al. 2018): each input blended with the one before it, at a random share above a half.

    The whole crop is blended and not a patch of it put elsewhere: a grade is read at one small place, and a patch
    that misses or hides it says nothing of how much of the label is left. The labels are not blended: between two
    grades lies a third one. The loss counts both sets, by their shares; a missing label takes nothing from the
    other set. The partner may be of another level: its labels then meet the same scores at their own level's cut
    points.

    Parameters
    ----------
    batch : (inputs (B, 3, d, h, w), level (B,), grades (B, ...))
    before : the same of one item or more
        Its last item is the first one's partner, so that batches of one item are mixed, too.
    generator : torch.Generator, on the CPU

    Returns
    -------
    inputs (B, 3, d, h, w), level (B, 2), grades (B, 2, ...), share (B, 2)
        The item's own labels and its partner's, as batch_losses takes them.
    """
    inputs, level, grades = batch
    other, other_level, other_grades = (
        torch.cat([last[-1:], own[:-1]]) for last, own in zip(before, batch, strict=True)
    )
    share = (0.5 + 0.5 * torch.rand(len(inputs), generator=generator)).to(inputs.device)
    part = share.view(-1, *[1] * (inputs.ndim - 1))
    blended = inputs * part + other * (1 - part)
    if (missing := blended.isnan()).any():  # slices that only one of the two has
        blended = torch.where(missing, torch.where(inputs.isnan(), other, inputs), blended)
    return (
        blended,
        torch.stack([level, other_level], 1),
        torch.stack([grades, other_grades], 1),
        torch.stack([share, 1 - share], 1),
    )


def unmixed(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A batch in the form of mix_crops, with its own labels only: level (B, 1), grades (B, 1, ...), share (B, 1)."""
    inputs, level, grades = batch
    return inputs, level[:, None], grades[:, None], torch.ones(len(inputs), 1, device=inputs.device)


def batch_losses(
    model: nn.Module, inputs: torch.Tensor, level: torch.Tensor, grades: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """weighted_losses of a batch with m sets of labels for each input.

    inputs: (B, 3, d, h, w); level: (B, m); grades: (B, m, 5), or (B, m, 5, 5) for scope `study`; share: (B, m).
    """
    log_p = model(inputs, level)  # (B, m, 5, 3); (B, 5, 5, 3) for scope `study`, which has all levels in it
    if log_p.ndim == grades.ndim:
        log_p = log_p[:, None]
    share = share.view(*share.shape, *[1] * (grades.ndim - 2))
    return weighted_losses(log_p.expand(*grades.shape, -1), grades, share=share)


def precision_for(name: str, device: str | torch.device) -> torch.dtype:
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


def check_tracker(tracker: Any) -> None:
    """Refuse a tracker that accelerate does not know (ValueError) or whose package is not installed (ImportError)."""
    if not tracker or not isinstance(tracker, str):
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if tracker not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"TRACKER must be empty or one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, not {tracker!r}")
    if tracker not in [str(name) for name in get_available_trackers()]:
        package = {"comet_ml": "comet-ml"}.get(tracker, tracker)
        raise ImportError(
            f"TRACKER {tracker!r}: its package is not installed. Run `pip install {package}`, or leave TRACKER empty"
        )


def _seed_of(*numbers):
    """One seed out of several numbers; similar numbers give unlike seeds."""
    # Their count goes in, too: SeedSequence takes (1, 2) and (1, 2, 0) for the same.
    words = [n % 2**32 for n in (len(numbers), *numbers)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])
