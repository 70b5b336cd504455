"""ultralytics' detection trainer, changed where our patches and our restarts need it.

A module of its own because it imports ultralytics, which all else does late (yolo.prepare_ultralytics comes first),
and because the processes that ultralytics starts for several GPUs find the class by its module's name.
"""

import os
import random

import numpy as np
import torch
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from .distributed import end_with_parent
from .names import progress


class PatchTrainer(DetectionTrainer):
    """DetectionTrainer for images of one shape, which a kill costs no more than the epoch it hits.

    Nothing is padded beyond the image: ultralytics' own validation loader adds half a stride of border (rect, pad
    0.5), which on patches that already fill the network's input changes the picture and hides most of the true mAP.
    It also turns rect off on several GPUs, where narrow patches would be padded to squares.

    ultralytics resumes from the averaged weights in half precision. Here each checkpoint has a file with the exact
    state beside it, and every epoch draws its random numbers from its own seed: a resumed run does what the killed one
    would have done, to the last bit on a CPU.

    Two keys of the data description are ours: `initial_weights` (file of train_yolo to start from, or None) and
    `title` (of the progress bar). They live there because ultralytics passes that file on to all its processes.
    """

    bar = None

    def build_dataset(self, img_path, mode="train", batch=None):
        return YOLODataset(
            img_path=img_path,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=self.args,
            rect=True,
            cache=self.args.cache or None,
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

    def build_optimizer(self, *arguments, **named):
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
        if self.resume:
            self._restore()
        elif self.data.get("initial_weights"):
            start_from(self.data["initial_weights"], unwrap_model(self.model), self.ema.ema)

    def run_callbacks(self, event):
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

    def _state_file(self, epoch):
        return self.wdir / f"state_{epoch}.pt"

    def save_model(self):
        """ultralytics' checkpoint and the exact state. At no moment does last.pt lack its state or its end."""
        last, self.last = self.last, self.last.with_suffix(".part")
        try:
            saved = super().save_model()
            state = {
                "model": unwrap_model(self.model).state_dict(),
                "ema": self.ema.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            part = self._state_file(self.epoch).with_suffix(".part")
            torch.save(state, part)
            os.replace(part, self._state_file(self.epoch))
            os.replace(self.last, last)
        finally:
            self.last = last
        for old in self.wdir.glob("state_*.pt"):
            if old != self._state_file(self.epoch):
                old.unlink()
        return saved

    def _restore(self):
        """Put the exact state in place of what ultralytics read from its checkpoint."""
        state = torch.load(self._state_file(self.start_epoch - 1), map_location="cpu", weights_only=True)
        unwrap_model(self.model).load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if RANK in {-1, 0} and self.csv.exists():  # a line of an epoch whose checkpoint was not written any more
            lines = self.csv.read_text().splitlines(keepends=True)
            self.csv.write_text("".join(lines[: self.start_epoch + 1]))

    def final_eval(self):
        """Nothing: ultralytics would look at the validation images once more, and rewrite last.pt."""


def start_from(path, *networks):
    """Copy the tensors of a weights file that fit into the networks."""
    from safetensors.torch import load_file

    given = load_file(str(path))
    for network in networks:
        own = network.state_dict()
        fitting = {k: v.to(own[k].dtype) for k, v in given.items() if k in own and own[k].shape == v.shape}
        network.load_state_dict(own | fitting)
