"""The part of a detector's training that ultralytics' own processes import.

A module of its own because it imports ultralytics, which all else does late, after
detector_weights.prepare_ultralytics, and because the processes that ultralytics starts for several GPUs find the class
by its module's name.

May use: distributed, pretrained, weights, storage, names.
"""

import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from ultralytics.data import dataset as ultralytics_dataset
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..names import progress
from ..storage import DamagedFile, read_checkpoint, write_whole
from ..weights import read_weights
from .distributed import end_with_parent
from .pretrained import copy_matching, load_detector


class PatchDataset(YOLODataset):
    """YOLODataset that reads images and labels, and nothing that an earlier run may have left beside them.

    ultralytics keeps what it read of the labels in labels.cache, a pickle, and images in *.npy; it takes both for
    its own wherever it finds them. The data set is an input of this kit: anybody may have written it, it may have
    changed since, and it may lie where nothing can be written.
    """

    def get_labels(self) -> list[dict]:
        with patch.multiple(ultralytics_dataset, load_dataset_cache_file=_no_cache, save_dataset_cache_file=_keep):
            return super().get_labels()

    @property
    def npy_files(self) -> list[Path]:
        return [Path(file) / "absent" for file in self.im_files]  # below a file there is none

    @npy_files.setter
    def npy_files(self, paths: list[Path]) -> None:
        pass


def _no_cache(path):
    raise FileNotFoundError(path)


def _keep(prefix, path, labels, version):
    """In place of writing the labels to a file; the version is what the caller looks for afterwards."""
    labels["version"] = version


class PatchTrainer(DetectionTrainer):
    """DetectionTrainer for images of one shape, which a kill costs no more than the epoch it hits.

    Nothing is padded beyond the image: ultralytics' own validation loader adds half a stride of border (rect, pad
    0.5), which on patches that already fill the network's input changes the picture and hides most of the true mAP.
    It also turns rect off on several GPUs, where narrow patches would be padded to squares.

    ultralytics resumes from a pickle with the averaged weights in half precision. Here a file holds the exact state in
    its place, and every epoch draws its random numbers from its own seed: a resumed run does what the killed one
    would have done, to the last bit on a CPU.

    Three keys of the data description are ours: `state` (the file of that state), `initial_weights` (file of
    train_yolo to start from, or None) and `title` (of the progress bar). They live there because ultralytics passes
    that file on to all its processes.
    """

    bar: Any = None
    data: Any  # ultralytics sets these; their types there are None's
    ema: Any
    metrics: Any
    model: Any
    optimizer: Any

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> PatchDataset:
        return PatchDataset(
            img_path=img_path,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=self.args,
            rect=True,
            cache="ram" if self.args.cache else None,  # on the disk it would be with the data set
            single_cls=False,
            stride=32,
            pad=0.0,
            prefix=f"{mode}: ",
            task="detect",
            classes=None,
            data=self.data,
            fraction=1.0,
        )

    def _setup_ddp(self):
        end_with_parent()  # where time_limit ends the notebook, torchrun is killed, and these would go on writing
        super()._setup_ddp()

    def build_optimizer(self, *arguments: Any, **named: Any) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(*arguments, **named)
        if self.device.type == "cpu" and isinstance(optimizer, torch.optim.AdamW):
            for group in optimizer.param_groups:  # one pass over a tensor in place of a dozen
                group["fused"] = True
        return optimizer

    def _setup_train(self):
        super()._setup_train()
        if self.device.type == "cpu":  # ultralytics does so on GPUs; small images gain here as well
            self.model.to(memory_format=torch.channels_last)
            self.ema.ema.to(memory_format=torch.channels_last)
        if self.start_epoch:
            self._restore(self._saved)
            del self._saved
        elif self.data.get("initial_weights"):
            start_from(self.data["initial_weights"], unwrap_model(self.model), self.ema.ema)

    def resume_training(self, ckpt: Any) -> None:
        """Continue after the last epoch whose state was written, without a checkpoint of ultralytics'."""
        self._saved = read_checkpoint(self.data["state"])
        if self._saved is not None:
            self.resume = True
            super().resume_training(self._saved["rest"] | {"epoch": self._saved["epoch"]})
            self.resume = False  # of this process alone

    def run_callbacks(self, event: str) -> None:
        super().run_callbacks(event)
        if event == "on_train_epoch_start":
            self._seed_epoch()
            if RANK in {-1, 0}:
                if self.bar is None:
                    self.bar = progress(desc=self.data.get("title"), total=self.epochs, initial=self.start_epoch)
                else:
                    self.bar.update()
        elif event == "on_fit_epoch_end" and self.bar is not None:
            said = {"loss": f"{sum(self.label_loss_items(self.tloss).values()):.3f}"}
            if self.args.val:  # not on a CPU, where it would only cost time: it chooses nothing
                said["mAP50"] = f"{self.metrics.get('metrics/mAP50(B)', 0.0):.3f}"
            self.bar.set_postfix(said, refresh=False)
        elif event == "on_train_end" and self.bar is not None:
            self.bar.update()
            self.bar.close()

    def _seed_epoch(self):
        """Let the epoch's order and augmentation depend on its number alone, not on what was drawn before."""
        seed = int(np.random.SeedSequence([self.args.seed, self.epoch, RANK + 1]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.train_loader.reset()  # workers take their seeds when they start
        self.train_loader.generator.manual_seed(seed)

    def save_model(self) -> bool:
        """Write the exact state in place of ultralytics' checkpoint, which is a pickle."""
        network: Any = unwrap_model(self.model)
        state = {
            "epoch": self.epoch,
            "cfg": {key: value for key, value in network.yaml.items() if key != "yaml_file"},  # a path of this machine
            "model": network.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "results": self.csv.read_text(encoding="utf-8"),
            "rest": {
                "scaler": self.scaler.state_dict(),
                "best_fitness": _plain(self.best_fitness),
                "stopper": {name: _plain(getattr(self.stopper, name)) for name in ("best_fitness", "best_epoch")},
            },
        }
        with write_whole(self.data["state"]) as temporary:
            torch.save(state, temporary)
        return True

    def _restore(self, saved):
        unwrap_model(self.model).load_state_dict(saved["model"])
        self.ema.ema.load_state_dict(saved["ema"])
        self.ema.updates = saved["updates"]
        self.optimizer.load_state_dict(saved["optimizer"])
        if RANK in {-1, 0}:  # its lines go as far as the state
            self.csv.write_text(saved["results"], encoding="utf-8")

    def _handle_nan_recovery(self, epoch):
        """Whether the epoch has to be done again, because its loss or the averaged weights are not finite.

        As ultralytics does it, at most three times and from the averaged weights, but with the file of save_model.
        """
        tensors = [self.loss, *self.ema.ema.state_dict().values()]
        spoilt = any(value is not None and not torch.isfinite(value).all() for value in tensors)
        if RANK != -1:  # the first process decides for all
            said = [spoilt if RANK == 0 else None]
            dist.broadcast_object_list(said, 0)
            spoilt = said[0]
        if not spoilt:
            return False
        saved = read_checkpoint(self.data["state"])
        self.nan_recovery_attempts += 1
        if saved is None or self.nan_recovery_attempts > 3:
            raise RuntimeError(
                f"{self.data.get('title')}: the loss or the weights of epoch {epoch + 1} are not finite: lower the "
                "learning rate (lr0) and train again"
            )
        self._model_train()
        self._restore(saved)
        unwrap_model(self.model).load_state_dict(saved["ema"])
        self.scheduler.last_epoch = epoch - 1
        return True

    def final_eval(self) -> None:
        """Nothing: ultralytics would look at the validation images once more, and rewrite last.pt."""


def _plain(value):
    """NumPy's numbers as Python's, which a file without a pickle can hold."""
    return value.item() if hasattr(value, "item") else value


def start_from(path: str | Path, *networks: torch.nn.Module) -> None:
    """Copy the tensors of a weights file that fit into the networks, and print how many did.

    Raises DamagedFile for the file of another network, see pretrained.copy_matching.
    """
    try:
        given, _ = read_weights(path, "metadata", "give the file of a detector to start from, or none")
    except DamagedFile:  # not the kit's
        load_detector(path, *networks)
        return
    for number, network in enumerate(networks):
        copy_matching(network, given, path, number > 0)
