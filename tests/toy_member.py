"""A member that is nothing but a noisy prior: all that a new member has to bring. For test_pipeline.py."""

import json
from pathlib import Path

import numpy as np

from lumbar.grade.member import Member, Prediction, TrainingStage, Weights
from lumbar.storage import open_tensors

NOTEBOOK = """
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lumbar.storage import write_tensors

labels = utils.read_labels(Path(DATA) / "train.csv").merge(utils.read_folds(PREPROCESSED), on="study_id")
stage = utils.open_stage(OUT, utils.member_folder("07_train_toy", FOLDS), PARAMETERS)
if not stage.done:
    ids, grades = utils.labels_to_array(labels)
    held_out = labels["fold"].to_numpy() == FOLDS[0]
    prior = utils.class_prior(grades[~held_out])
    rng = np.random.default_rng(SEED)
    noisy = prior * np.exp(NOISE * rng.standard_normal((held_out.sum(), *prior.shape)))
    table = utils.to_submission(ids[held_out], noisy / noisy.sum(-1, keepdims=True))
    utils.write_csv(stage.dir / "oof.csv", table.assign(fold=FOLDS[0]))
    utils.write_csv(stage.dir / "history.csv", pd.DataFrame({"epoch": [1], "held_out": [1.0]}))
    state = {"prior": torch.as_tensor(prior)}
    about = {"prior": prior.tolist(), "noise": NOISE}
    write_tensors(stage.dir / f"toy_{FOLDS[0]}.safetensors", state, "toy", about)
    stage.close(outputs=["oof.csv", f"toy_{FOLDS[0]}.safetensors"])
"""
PARAMETERS = """# Parameters: of the toy
DATA = "data"  # folder with train.csv
PREPROCESSED = "01_preprocess"  # output of 01_preprocess
LEVELS_DIR = "02_train_spinenet"  # output of 02_train_spinenet
OUT = "out"  # the stage's folder is made in here
FOLDS = [0]  # folds to train
SEED = 0  # of the noise
WORKERS = 0  # unused
NOISE = 0.2  # standard deviation of the log probabilities
"""


class Toy(Member):
    name, title, share = "toy", "Prior with noise", 0.05
    parts = ("toy",)
    trainings = (TrainingStage("07_train_toy", "toy", seconds=1.0),)

    def read_about(self, path):
        with open_tensors(path, "toy", "train it again") as (about, _):
            return about

    def load(self, path, device):
        about = self.read_about(path)
        return Weights(path.stem, np.array(about["prior"]), about)

    def predict(self, inputs, weights, most_views, device):
        prior = np.mean([own.model for own in weights], 0)
        found = []
        for study, _ in inputs:
            rng = np.random.default_rng(study.study_id)
            p = prior * np.exp(weights[0].about["noise"] * rng.standard_normal(prior.shape))
            found.append(Prediction(p / p.sum(-1, keepdims=True)))
        return found


def add_to(kit: Path) -> None:
    """Add the toy to a copy of the kit: one module, one notebook, one line in the registry."""
    (kit / "lumbar" / "grade" / "toy_member.py").write_text(Path(__file__).read_text())
    notebook = json.loads((kit / "notebooks" / "04_train_vit.ipynb").read_text())
    cells = notebook["cells"]
    parameters = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    bootstrap = next(cell for cell in cells if "bootstrap" in cell["metadata"].get("tags", ()))
    work = {**bootstrap, "id": "toy", "metadata": {}, "source": NOTEBOOK}
    notebook["cells"] = [{**parameters, "source": PARAMETERS}, bootstrap, work]
    (kit / "notebooks" / "toy.ipynb").write_text(json.dumps(notebook))
    registry = kit / "lumbar" / "grade" / "registry.py"
    text = registry.read_text().replace("        WholeStudy(),\n", "        WholeStudy(),\n        Toy(),\n", 1)
    registry.write_text(
        text.replace("from .member import Member\n", "from .member import Member\nfrom .toy_member import Toy\n", 1)
    )
