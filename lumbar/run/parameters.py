"""A notebook's parameters, checked before anything runs.

May use: names, grade.
"""

import ast
import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..names import DETECTORS, device_for

# What a stage reads, by the parameter that says where it lies. A stage knows these by what is in them, not by where
# they are; see stages.stage_inputs.
READ_PATHS = (
    "DATA",
    "FOLDER",
    "PREPROCESSED",
    "LEVELS_DIR",
    "WEIGHTS",
    "CLEAN",
    "PRETRAINED",
    "SPINENET_DIR",
    "RUN",
    "PREDICTIONS",
    "INFERENCE",
)
WRITTEN_PATHS = ("OUT", "BUILD")  # where results go, which says nothing about them
PATH_PARAMETERS = (*READ_PATHS, *WRITTEN_PATHS)

# Parameter -> the least and the most that can be meant; of a list, of each of its items. A default is always allowed:
# it may stand for "choose yourself".
RANGES = {
    "ACCUMULATE": (1, 4096),
    "ANATOMIES": (1, 1_000_000),
    "AXIAL_MM_PER_PX": (0.05, 10.0),
    "BACKBONE_RATE": (0.0, 100.0),
    "BATCH": (1, 65_536),
    "BATCH_STUDIES": (1, 4096),
    "BITS": (8, 16),
    "BLOCKS": (1, 100),
    "CHANNELS": (1, 3),
    "CROP_PX": (16, 4096),
    "DRAWS": (1, 10_000_000),
    "DROPOUT": (0.0, 0.99),
    "DROP_PATH": (0.0, 0.99),
    "EMA": (0.0, 0.999999),
    "EPOCHS": (1, 100_000),
    "EXAMPLES": (0, 10_000),
    "EXCHANGE": (0.0, 1.0),
    "EXTENT_MM": (1.0, 2000.0),
    "FINE_TUNE_RATE": (1e-9, 10.0),
    "FINE_TUNE_STEPS": (0, 100_000_000),
    "FINE_TUNE_STUDIES": (1, 1_000_000),
    "FLIP": (0.0, 1.0),
    "FOLDS": (0, 1000),
    "HOLD_OUT": (0.0, 0.9),
    "HOURS": (0.0, 100.0),
    "HTML_STUDIES": (0, 10**12),
    "IMGSZ": (32, 4096),
    "LEARNING_RATE": (1e-9, 10.0),
    "LEVEL_STUDIES": (1, 1_000_000),
    "MIX": (0.0, 1.0),
    "MM_PER_PX": (0.05, 10.0),
    "N_FOLDS": (2, 100),
    "PREVALENCE": (1e-3, 1e3),
    "PROCESSES": (0, 4096),
    "READERS": (0, 1024),
    "RESERVE": (0.0, 100.0),
    "RESOLUTION_MM": (0.1, 20.0),
    "ROTATE": (0.0, 180.0),
    "SCALE": (0.0, 1.0),
    "SEED": (0, 2**32 - 1),
    "SHAPE": (4, 4096),
    "SHIFT_MM": (-500.0, 500.0),
    "SIZE_PX": (32, 1024),
    "SLICES": (1, 32),
    "STEPS": (0, 100_000_000),
    "STRENGTH": (0.0, 100.0),
    "STRIDE": (0, 64),
    "STUDY": (0, 10**12),
    "TEST_STUDIES": (1, 1_000_000),
    "THREADS": (0, 4096),
    "TRAIN_STUDIES": (1, 1_000_000),
    "TRANSLATE": (0.0, 1.0),
    "VIEWS": (1, 1000),
    "WEIGHT_DECAY": (0.0, 10.0),
    "WIDTH": (0.0, 100.0),
    "WIDTHS": (1, 65_536),
    "WORKERS": (0, 1024),
    "YOLO_IMGSZ": (32, 4096),
}
# Parameters of which only these values are meant.
CHOICES: dict[str, tuple[Any, ...]] = {
    "BITS": (8, 16),
    "CHANNELS": (1, 3),
    "CONDITION": tuple(DETECTORS),
    "DETECTOR": ("own", "official"),
    "POOLING": ("mean", "max", "attention"),
    "PRECISION": ("auto", "float32", "bfloat16", "float16"),
    "SCHEDULE": ("short", "B"),
    "SCOPE": ("level", "study", "slices"),
    "SEQUENCE": ("lstm", "none"),
    "SIZE": ("demo", "smoke", "hour", "full"),
    "SPLIT": ("test", "train"),
}
MULTIPLES = {"IMGSZ": 32, "YOLO_IMGSZ": 32}  # px: the detectors' largest stride
LENGTHS = {"CROP_PX": 2, "EXTENT_MM": 3, "SHAPE": 3, "SHIFT_MM": 3}  # of lists, unless they are empty as their default
ITEM_TYPES = {  # of lists that are empty by default
    "CLEAN": str,
    "CONTINUE": str,
    "EXTENT_MM": float,
    "SHIFT_MM": float,
    "FOLDS": int,
    "HTML_STUDIES": int,
    "MEMBERS": str,
    "NAMES": str,
    "PUSH": str,
    "SHAPE": int,
    "STAGES": str,
    "WEIGHTS": str,
}

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


def assigned_literals(source: str) -> dict[str, Any]:
    """The names a parameters cell assigns, with their literal values.

    source: the text of the cell. Returns a dict name -> value, in order.
    Raises ValueError where a value is not a literal: papermill can only inject literals, and values that depend on
    others must be derived in a later cell, after the injection.
    """
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not isinstance(node, ast.Assign) or not isinstance(target, ast.Name):
            raise ValueError(f"parameters cell, line {node.lineno}: write one `NAME = literal` a line")
        try:
            values[target.id] = _literal(node.value)
        except ValueError:
            raise ValueError(f"parameters cell: {target.id} must be a literal") from None
    return values


def _literal(node):
    """ast.literal_eval, and what papermill writes for numbers that are not finite: float('nan')."""
    if isinstance(node, ast.Call) and ast.unparse(node) in ("float('nan')", "float('inf')", "float('-inf')"):
        return float(node.args[0].value)
    return ast.literal_eval(node)


def check_values(defaults: Mapping[str, Any], given: Mapping[str, Any], where: str = "parameters") -> dict[str, Any]:
    """Refuse names that do not exist, values of another type than the default's, and invalid values.

    defaults, given: dicts name -> value. Returns `defaults` updated with `given` (an int is welcome where a float
    is expected). Raises ValueError naming the closest parameter or the RANGES, TypeError naming both types.
    """
    merged = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(
                f"{where}: there is no parameter {name!r}.{nearest(name, defaults)} There are: {', '.join(defaults)}"
            )
        default = defaults[name]
        is_number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        if default is not None and not is_number and type(value) is not type(default):
            raise TypeError(
                f"{where}: {name} must be {type(default).__name__} (as in {name} = {default!r}), "
                f"not {type(value).__name__} {value!r}{_way_to_write(name, default, value)}"
            )
        if name == "HOURS" and is_number and 60 <= value <= 6000:
            meant = f", or {value}.0 if you do mean {value} hours" if value <= RANGES["HOURS"][1] else ""
            raise ValueError(
                f"{where}: HOURS = {value} cannot be meant: YAML reads {value // 60}:{value % 60:02d} as {value}. "
                f"Write {value / 60:.4g}{meant}"
            )
        if value != default:
            _check_range(name, default, value, where)
        merged[name] = float(value) if is_number else value
    return merged


def _way_to_write(name, default, value):
    """How papermill takes a value of the right type, as the end of a sentence; empty where there is nothing to say."""
    if isinstance(default, (list, dict)):
        opening, closing = "[]" if isinstance(default, list) else "{}"
        text = str(value).strip()
        if not (isinstance(value, str) and text.startswith(opening)):
            text = f"{opening}{text}{closing}"
        return f"; papermill takes it as -y '{{{name}: {text}}}'"
    if isinstance(value, list) and len(value) == 1:
        return f"; write {value[0]!r}, without brackets"
    if isinstance(default, str) and isinstance(value, (int, float)):
        return f"; papermill takes a text as -r {name} {value}"
    if isinstance(default, (int, float)) and isinstance(value, str):
        if re.fullmatch(r"\d+:[0-5]\d", value):
            hours, minutes = map(int, value.split(":"))
            return f"; write {hours + minutes / 60:.4g}"
        if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):  # YAML takes 1e-4 for a text, 1.0e-4 for a number
            mantissa, exponent = value.lower().split("e")
            return f"; write {float(mantissa)}e{int(exponent):+d}"
    return ""


def _check_range(name, default, value, where):
    """Raise ValueError where a value of the right type is out of range."""
    if isinstance(value, list):
        items = value
        kind = ITEM_TYPES.get(name) or (type(default[0]) if default else None)
        for item in items:
            fits = type(item) is kind or (kind is float and type(item) is int)
            if kind is not None and not fits:
                raise TypeError(f"{where}: {name} holds {kind.__name__}, not {type(item).__name__} {item!r}")
        if name in LENGTHS and len(items) != LENGTHS[name]:
            raise ValueError(f"{where}: {name} holds {LENGTHS[name]} numbers, not {len(items)}")
        if name == "FOLDS" and len(set(items)) < len(items):
            raise ValueError(f"{where}: FOLDS {items} names a fold twice")
    else:
        items = [value]
    least, most = RANGES.get(name, (-math.inf, math.inf))
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            continue
        if not math.isfinite(item) or not least <= item <= most:
            own = f" (or {default!r}, its default)" if default == [] or not _within(default, least, most) else ""
            bounds = f"from {least:,} to {most:,}{own}" if math.isfinite(least) else "a finite number"
            raise ValueError(f"{where}: {name} must be {bounds}, not {item!r}")
    if name in CHOICES and value not in CHOICES[name]:
        *most_of, last = map(str, CHOICES[name])
        hint = nearest(value, CHOICES[name]) if isinstance(value, str) else ""
        raise ValueError(f"{where}: {name} must be {', '.join(most_of)} or {last}, not {value!r}.{hint}")
    if (step := MULTIPLES.get(name)) and value % step:
        raise ValueError(f"{where}: {name} must be a multiple of {step}, not {value!r}")
    if name == "DEVICE":
        check_device_name(value, where)
    if name == "TRACKER":
        check_tracker_name(value, where)


def _within(default, least, most):
    return all(least <= item <= most for item in (default if isinstance(default, list) else [default]))


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean x?" for the known name that a mistyped one resembles most; empty where none does."""
    known = list(known)
    folded = {other.lower(): other for other in known}
    close = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.5)
    return f" Did you mean {folded[close[0]]}?" if close else ""


def check_device_name(name: str, where: str = "parameters") -> None:
    """Refuse a DEVICE that names none on any machine: a misspelt one. Whether it is here: see names.device_for."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?|\d+(,\d+)*", name):
        hint = nearest(name, ("auto", "cpu", "cuda", "mps"))
        raise ValueError(f"{where}: DEVICE is auto, cpu, cuda or the number of a GPU (0), not {name!r}.{hint}")


def check_device_here(name: str) -> None:
    """Refuse a DEVICE that this machine does not have; several GPUs are written as 0,1."""
    for part in name.split(","):
        if part not in ("auto", "cpu"):  # torch is not loaded for these
            device_for(part)


def check_tracker_name(name: str, where: str = "parameters") -> None:
    """Refuse a TRACKER that accelerate does not have. Whether it is installed here: see check_tracker_here."""
    if name and name not in TRACKERS:
        hint = nearest(name, TRACKERS)
        raise ValueError(f"{where}: TRACKER is empty or one of {', '.join(TRACKERS)}, not {name!r}.{hint}")


def check_tracker_here(name: str) -> None:
    """Refuse a TRACKER whose package is not installed, before anything runs. Raises ImportError."""
    if name:
        from ..grade.trainer import check_tracker

        check_tracker(name)


def notebook_parameters(history: Sequence[str], namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in force in the running notebook, checked.

    history: IPython's `In`; namespace: `globals()`. papermill warns of a mistyped parameter and runs on with the
    default: here it is an error. Found by their first lines: our parameters cell starts with `# Parameters:` and
    papermill's injected one is `# Parameters` alone. Values that were typed into the cell itself are held against the
    defaults of the kit's notebook with the same parameters.
    """
    cells = [cell for cell in history if cell.startswith("# Parameters:")]
    if not cells:
        raise ValueError("run the parameters cell (its first line starts with '# Parameters:') before this one")
    typed = assigned_literals(cells[-1])
    notebook, defaults = shipped_defaults(tuple(typed)) or ("parameters", typed)
    check_values(defaults, typed, notebook)
    injected = [cell for cell in history if cell.startswith("# Parameters\n")]
    if injected:
        check_values(defaults, assigned_literals(injected[-1]), notebook)
    parameters = check_values(defaults, {name: namespace[name] for name in typed}, notebook)
    check_device_here(parameters.get("DEVICE", "auto"))
    check_tracker_here(parameters.get("TRACKER", ""))
    return parameters


@functools.cache
def shipped_defaults(names: tuple[str, ...]) -> tuple[str, dict[str, Any]] | None:
    """(file name, dict name -> default) of the kit's notebook that has just these parameters; None without one."""
    for path in sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb")):
        defaults = check_notebook_parameters(path, {})
        if set(defaults) == set(names):
            return path.name, defaults
    return None


def check_notebook_parameters(notebook: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse parameters that a notebook does not have, before it starts. See check_values."""
    status = Path(notebook).stat()
    return check_values(
        assigned_literals(_parameters_cell(str(notebook), status.st_mtime_ns, status.st_size)),
        given,
        Path(notebook).name,
    )


@functools.lru_cache(maxsize=100)
def _parameters_cell(notebook: str, changed_ns: int, size: int) -> str:
    """The text of a notebook's parameters cell, read once unless the file changes."""
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    source = next((c.source for c in cells if "parameters" in c.metadata.get("tags", [])), None)
    if source is None:
        raise ValueError(f"{notebook} has no cell tagged `parameters`")
    return source
