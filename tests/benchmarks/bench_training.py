"""What the full-size networks cost: one training step and one batch of inference each, on the device at hand.

    python tests/benchmarks/bench_training.py                                            # full size
    python tests/benchmarks/bench_training.py --level 64 --study 64 --yolo 128 --batch 1 --rounds 1   # a try on a CPU
    python tests/benchmarks/bench_training.py --precision bfloat16 --json training.json

CoAtNet on level crops, MaxViT on whole studies, YOLOv10x on patches, at the batches that the notebooks use. A step of
the 3D networks is that of train_classifier (augmentation, forward, backward, AdamW, averaging) on random crops that lie
in memory; one of the detector is ultralytics' loss, backward and AdamW. Inference is one plain view of a batch. Every
network runs in a fresh process, so that its peak memory is its own and one that does not fit costs only its row: on a
GPU the peak of what torch allocated, on a CPU the process' largest resident memory. A script, which pytest does not
collect.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from lumbar import names  # noqa: E402
from lumbar.data.crop import Crop  # noqa: E402
from lumbar.grade import classifier, detector_weights, trainer  # noqa: E402
from lumbar.grade import crops as crops_module  # noqa: E402
from lumbar.run import stages  # noqa: E402

# name -> (backbone or description, batch, extent in mm of the crop)
NETWORKS = {
    "level": ("coatnet_rmlp_3_rw", 3),
    "study": ("maxvit_rmlp_tiny_rw", 1),
    "yolo": ("yolov10x.yaml", 16),
}
COLUMNS = (
    ("network", "{}"),
    ("input", "{}"),
    ("precision", "{}"),
    ("parameters_million", "{:.1f}"),
    ("batch", "{}"),
    ("step_s", "{:.3f}"),
    ("step_samples_s", "{:.2f}"),
    ("inference_s", "{:.3f}"),
    ("inference_samples_s", "{:.2f}"),
    ("peak_gb", "{:.1f}"),
)


class RandomCrops(torch.utils.data.Dataset):
    """As a CropDataset, `count` items of one random crop, with random grades."""

    def __init__(self, crop, count):
        rng = np.random.default_rng(0)
        self.crop, self.per_study = crop, len(names.LEVELS) if crop.scope == "level" else 1
        self.study_ids = list(range(-(-count // self.per_study)))
        self.grades = rng.integers(0, 3, (len(self.study_ids), len(names.CONDITIONS), len(names.LEVELS)))
        self.values = torch.from_numpy(rng.random((3, *crops_module.margin_shape(crop.shape)), np.float32)).half()
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        study, level = divmod(number, self.per_study)
        grades = self.grades[study, :, level] if self.per_study > 1 else self.grades[study]
        return self.values, level, torch.from_numpy(np.ascontiguousarray(grades))


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action, rounds, device):
    """The median of `rounds` calls, after one that warms up (lazy kernels, the allocator, the optimizer's state)."""
    taken = []
    for _ in range(rounds + 1):
        wait(device)
        started = time.perf_counter()
        action()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def classifier_actions(scope, options, device):
    """(model, training step, inference): of an OrdinalClassifier as notebook 04 trains it."""
    backbone, batch = NETWORKS[scope]
    batch = options.batch or batch
    shape = [options.level if scope == "level" else options.study] * 3
    crop = Crop.full_size(scope, shape)
    config = trainer.TrainConfig(
        backbone=backbone,
        epochs=options.rounds + 1,
        batch=batch,
        learning_rate=3e-4,
        weight_decay=0.05,
        dropout=0.3,
        strength=1.0,
        ema=0.998,
        precision=options.precision,
        recompute=not options.keep,
    )
    data = RandomCrops(crop, batch)
    training = trainer.prepare_training(data, config, device)
    crops = data.values[None].expand(batch, -1, -1, -1, -1)
    levels = np.arange(batch) % len(names.LEVELS) if scope == "level" else None

    def step():
        loss = trainer.train_epoch(training, config, crop, 0)  # an epoch of one step
        assert np.isfinite(loss), "the loss is not finite"

    def infer():
        classifier.predict_crops([training.average.module], crops, crop, levels, batch=batch)

    precision = trainer.precision_for(options.precision, device)
    return training.network, step, infer, batch, "x".join(map(str, shape)), str(precision).split(".")[1]


def detector_actions(options, device):
    """The same of ultralytics' YOLOv10x on one-channel patches with one box each."""
    pass

    detector_weights.prepare_ultralytics(Path(tempfile.gettempdir()) / "ultralytics_config")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    description, batch = NETWORKS["yolo"]
    batch, edge = options.batch or batch, options.yolo
    precision = trainer.precision_for(options.precision, device)
    torch.manual_seed(0)
    net = DetectionModel(description, ch=1, nc=len(names.SEVERITIES), verbose=False).to(device)
    net.args = get_cfg()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    images = torch.rand(batch, 1, edge, edge, device=device)
    sample = {
        "img": images,
        "batch_idx": torch.arange(batch, device=device, dtype=torch.float32),
        "cls": (torch.arange(batch, device=device) % len(names.SEVERITIES)).float()[:, None],
        "bboxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]], device=device).repeat(batch, 1),
    }

    def step():
        net.train()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = net(sample)[0].sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.isfinite(loss), "the loss is not finite"

    @torch.inference_mode()
    def infer():
        net.eval()(images)

    return net, step, infer, batch, f"{edge}x{edge}", str(precision).split(".")[1]


def measure(network, options):
    """One row of the table, measured in this process."""
    device = torch.device(names.device_for(options.device))
    make = detector_actions if network == "yolo" else lambda *a: classifier_actions(network, *a)
    model, step, infer, batch, size, precision = make(options, device)
    step_s = seconds_of(step, options.rounds, device)
    gpu = device.type == "cuda"
    peak_gb = torch.cuda.max_memory_allocated(device) / 2**30 if gpu else stages.peak_memory_mb() / 1024
    inference_s = seconds_of(infer, options.rounds, device)
    return {
        "network": NETWORKS[network][0].removesuffix(".yaml"),
        "input": size,
        "precision": precision,
        "parameters_million": sum(p.numel() for p in model.parameters()) / 1e6,
        "batch": batch,
        "step_s": step_s,
        "step_samples_s": batch / step_s,
        "inference_s": inference_s,
        "inference_samples_s": batch / inference_s,
        "peak_gb": peak_gb,
    }


def measure_apart(network, arguments):
    """measure in a process of its own; a row that says why where that fails."""
    command = [sys.executable, __file__, *arguments, "--apart", network]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = "killed, most likely for memory" if done.returncode < 0 else "failed, see above"
    return {"network": NETWORKS[network][0].removesuffix(".yaml"), "input": reason}


def as_markdown(rows):
    titles = [name.replace("_", " ") for name, _ in COLUMNS]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "" for name, form in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--level", type=int, default=128, help="edge of a level's crop, voxels, a multiple of 32")
    parser.add_argument(
        "--study", type=int, default=256, help="edge of a study's grid, voxels, a multiple of 32, 64 or more"
    )
    parser.add_argument("--yolo", type=int, default=384, help="edge of a patch, pixels, a multiple of 32")
    parser.add_argument("--batch", type=int, default=0, help="in place of the notebooks'")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement, after one to warm up; the median")
    parser.add_argument("--precision", default="auto", help="as PRECISION of notebook 04")
    parser.add_argument("--keep", action="store_true", help="keep activations, as RECOMPUTE = False of notebook 04")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--apart", choices=tuple(NETWORKS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.apart:
        print(json.dumps(measure(options.apart, options)))
        return
    rows = []
    for network in options.networks:
        rows.append(measure_apart(network, arguments))
        print(as_markdown(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    device = names.device_for(options.device)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}\n\n{as_markdown(rows)}")
    if options.json:
        options.json.write_text(json.dumps({"device": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
