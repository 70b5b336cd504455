"""The training of the 3D networks.

May use: classifier, crops, ordinal, distributed, data, storage.
"""

import contextlib
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch.utils.checkpoint
from torch import nn

from ..data.competition import class_prior
from ..data.metric import score_arrays
from ..names import GROUPS, device_for, progress
from ..storage import read_checkpoint, write_csv, write_whole
from .classifier import USUAL_LEVEL_CENTERS, OrdinalClassifier, predict_dataset, save_classifier
from .crops import CropDataset, augment_crops
from .distributed import all_sum, launch, processes_for, rank, world
from .ordinal import weighted_losses

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
    machine, see processes_for and distributed.py. A step's items are shared out to them, see epoch_batches;
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
